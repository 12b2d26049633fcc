"""`prefkit query`: SQL over a dataset with DuckDB, one view a table. Runs offline and reads nothing but the dataset.

Comes in: a dataset and one SELECT (see guard). Goes out: a DuckDB relation, which computes nothing until it is asked
for rows. Price: the files of the views that a statement names are hashed first (1 GiB in .6 s on one core of the
machine it was written on), those of other views are not opened.
"""

import atexit
import functools
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from prefkit.documents import Audit
from prefkit.errors import DatasetError, InputError, MachineError, PrefkitError, first_line, no_room
from prefkit.format import AUDIT_JSON, REFERENCES
from prefkit.guard import EXTERNAL, SQL, VIEWS_THERE, check_statement
from prefkit.reference_table import AGAIN, read_reference
from prefkit.store import REMAKE, list_references, read_document, read_manifest, view_files
from prefkit.tables import check_parts
from prefkit.target import path_of
from prefkit.views import (
    AUDIT_VIEWS,
    MANIFEST_VIEWS,
    REFERENCE_VIEWS,
    SOURCES_OF,
    VIEW_DOCS,
    VIEW_FILES,
    VIEW_NAMES,
    comments_sql,
    quoted,
    view_sql,
)

Tell = Callable[[str], None]
Watch = Callable[[duckdb.DuckDBPyConnection], None]
LISTED = "prefkit query DATASET lists the views and their columns"
HINTS: Mapping[str, str] = {  # by how DuckDB's words begin
    "Binder Error: Referenced column": 'columns with a slash need double quotes: select "rewards/margins" from steps',
    "Catalog Error": LISTED,
    "Permission Error": EXTERNAL,
}
DIRECTORY = "a dataset directory"
MEMORY = "ask for fewer rows or columns at a time, or close what else needs memory"


def query_dataset(
    dataset: str | Path,
    sql: str,
    *,
    external: bool = False,
    verify: bool = True,
    tell: Tell = lambda _: None,
    watch: Watch = lambda _: None,
) -> duckdb.DuckDBPyRelation:
    """The result of one SELECT over a dataset.

    Args:
        dataset: its directory.
        sql: one SELECT over the views pairs, dropped, rejects, changes, tokens, structure, probe, pair_scores,
            reference, reference_dropped, steps, perf, pair_dynamics, learning, evaluations, evaluation_prompts and
            sweeps.
        external: let it read other files and URLs too, with DuckDB's own configuration unlocked.
        verify: compare the files of the views it names with their recorded hashes (those of runs have none).
        tell: told what is done.
        watch: given the connection before anything is computed, so that it can be asked how far it is.

    Returns:
        a DuckDB relation: `.pl()` is a Polars frame, `.df()` one of pandas, `.fetchall()` a list of tuples.

    Raises:
        DatasetError: there is no finished dataset, or a file of a view was changed or is missing.
        GateError: the identity of a reference was changed.
        InputError: it is more or something else than one SELECT, or does not run; the message is DuckDB's.

    Example:
        print(prefkit.query_dataset("demo/dataset", "select reason, count(*) from dropped group by all").pl())
    """
    asked = check_statement(sql, external=external)
    views = VIEW_NAMES if asked.catalogue else asked.views
    if verify:
        check_views(dataset, views, tell)
    connection = connect_dataset(dataset, views, external=external)
    watch(connection)
    tell("querying")
    try:
        return connection.sql(sql)
    except duckdb.Error as error:
        raise as_query_error(error) from None


def connect_dataset(
    dataset: str | Path, views: Collection[str] = VIEW_NAMES, *, external: bool = False
) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with those views.

    It can read their files and nothing else, and its configuration is locked. Python variables are no tables.

    Args:
        dataset: the directory.
        views: of views.VIEW_NAMES.
        external: it can read and write whatever DuckDB can, and its configuration can be changed.

    Raises:
        DatasetError: there is no finished dataset, or a file cannot be read.
        GateError: the identity of a reference was changed.
    """
    folder = path_of(dataset, DIRECTORY)
    root, manifest = folder.resolve(), read_manifest(folder)
    wanted = [view for view in VIEW_NAMES if view in with_sources(views)]
    files = {view: _files(root, manifest, view) for view in wanted if view in VIEW_FILES}
    connection = duckdb.connect()
    settings = {"temp_directory": quoted(_scratch()), "python_enable_replacements": "false"}
    # nothing is fetched on the quiet: a function of an extension that is not there is an error
    settings |= {} if external else {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    settings |= {"enable_progress_bar": "true", "enable_progress_bar_print": "false"}  # so that it knows how far it is
    if not external:
        named = [name for listed in files.values() for path in listed for name in {path: 0, literal(path): 0}]
        settings["allowed_paths"] = "[" + ", ".join(map(quoted, named)) + "]"
        settings |= {"enable_external_access": "false", "lock_configuration": "true"}
    for name, value in settings.items():
        connection.execute(f"SET {name} = {value}")
    for view in wanted:
        try:
            connection.execute(view_sql(view, manifest["kind"], [literal(path) for path in files.get(view, [])]))
        except duckdb.Error as error:
            reason = f"the files of {view} cannot be read: {first_line(error)}"
            raise DatasetError(reason, where=str(dataset), hint=REMAKE) from None
        if len(wanted) == len(VIEW_NAMES):  # whoever asks for all may ask what they are
            connection.execute("\n".join(comments_sql(view)))
    return connection


def literal(path: str) -> str:
    """A file's name as a pattern that fits no other: DuckDB takes [ * and ? for those of a pattern."""
    return re.sub(r"[\[*?]", r"[\g<0>]", path)


def with_sources(views: Collection[str]) -> set[str]:
    """The views, and those that they are made of."""
    return {*views, *(source for view in views for source in SOURCES_OF.get(view, ()))}


def _files(root: Path, manifest: Mapping[str, Any], view: str) -> list[str]:
    """The files of one view; each that is listed is there."""
    if view in AUDIT_VIEWS and (root / AUDIT_JSON).exists():
        read_document(root / AUDIT_JSON, Audit)
    if view in REFERENCE_VIEWS:
        for key in list_references(root):
            read_reference(root, key)
    found = [root / name for name in view_files(root, manifest)[view]]
    for path in found:
        if not path.exists():
            raise DatasetError("part is missing", where=str(path), hint=REMAKE)
    return [str(path) for path in found]


def check_views(dataset: str | Path, views: Collection[str], tell: Tell = lambda _: None) -> None:
    """Compare the files of those views with the hashes that manifest, audit and references have of them.

    Nothing has any of the tables of runs.

    Raises:
        DatasetError: there is no finished dataset; a file was changed or is missing, by name.
        GateError: the identity of a reference was changed.
    """
    folder = path_of(dataset, DIRECTORY)
    root, manifest, views = folder.resolve(), read_manifest(folder), with_sources(views)
    for view in [view for view in MANIFEST_VIEWS if view in views]:
        tell(f"checking {view}")
        check_parts(root / view, manifest["parts"].get(view, []))
    audited = read_document(root / AUDIT_JSON, Audit).get("parts", []) if (root / AUDIT_JSON).exists() else []
    for part in [part for part in audited if part["file"].removesuffix(".parquet") in views]:
        tell(f"checking {part['file']}")
        _check_parts((root / AUDIT_JSON).parent, [part], f"prefkit audit {dataset}")
    for key in list_references(root) if views & {*REFERENCE_VIEWS} else []:
        tell(f"checking reference {key}")
        recorded = read_reference(root, key)
        _check_parts(root / REFERENCES / key, [*recorded["parts"], recorded["dropped"]], AGAIN)


def _check_parts(folder: Path, parts: Sequence[Mapping[str, Any]], hint: str) -> None:
    """As `check_parts`, of tables that no build makes."""
    try:
        check_parts(folder, [*parts])
    except DatasetError as error:
        error.hint = hint
        raise


def list_views(dataset: str | Path) -> duckdb.DuckDBPyRelation:
    """Every view that a query may ask: its name, its rows, what it is about, and its columns.

    Args:
        dataset: its directory.

    Returns:
        a DuckDB relation of view, num_rows, about and columns, a row a view.

    Raises:
        DatasetError: there is no finished dataset, or a file cannot be read.

    Example:
        print(prefkit.list_views("demo/dataset").pl())
    """
    connection = connect_dataset(dataset)
    order = ", ".join(f"({number}, '{view}', {quoted(VIEW_DOCS[view])})" for number, view in enumerate(VIEW_NAMES))
    counts = " UNION ALL ".join(f"SELECT '{view}' AS view, count(*) AS num_rows FROM {view}" for view in VIEW_NAMES)
    return connection.sql(f"""
        WITH counts AS ({counts}), about(place, view, about) AS (VALUES {order}), named AS (
            SELECT table_name AS view, list(column_name ORDER BY column_index) AS columns
            FROM duckdb_columns() GROUP BY table_name)
        SELECT view, num_rows, about, columns FROM about JOIN counts USING (view) JOIN named USING (view) ORDER BY place
    """)


def read_sql(text: str) -> str:
    """The SQL that an argument stands for: `-` the text of stdin, `@FILE.sql` that of a file, else itself.

    Raises:
        InputError: it cannot be read.
    """
    if text != "-" and not text.startswith("@"):
        return text
    where = "stdin" if text == "-" else text[1:]
    try:
        found = sys.stdin.buffer.read() if text == "-" else Path(where).read_bytes()
        return found.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as SQL: {error}", where=where, expected="a text in UTF-8") from None


@functools.cache
def scratch_root() -> str:
    """A folder of this process for what outgrows memory: nobody else's to read, and not where a dataset may lie."""
    try:
        folder = tempfile.mkdtemp(prefix="prefkit-query-")
    except OSError as error:
        raise MachineError(
            f"no folder for temporary files: {error}", where="TMPDIR", hint="TMPDIR=FOLDER prefkit query ..."
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _scratch() -> str:
    return str(Path(scratch_root()) / uuid.uuid4().hex)


def as_query_error(error: BaseException) -> PrefkitError:
    """DuckDB's own words for what is wrong with a query, and the views there are; or what the machine ran out of."""
    lines = str(error).strip().splitlines() or ["the query fails"]
    if lines[0].startswith("Out of Memory Error"):
        return MachineError(f"the query runs out of memory: {lines[0]}", where="DuckDB", hint=MEMORY)
    if lines[0].startswith("IO Error") and (full := no_room(error, f"{scratch_root()} (what outgrows memory)")):
        return full
    more = [line for line in lines[1:] if line.startswith(("Did you mean", "Candidate"))]
    hint = next((hint for said, hint in HINTS.items() if lines[0].startswith(said)), "")
    return InputError(" ".join([lines[0], *more]), where=SQL, expected=VIEWS_THERE, hint=hint)
