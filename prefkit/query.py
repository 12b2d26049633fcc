"""`prefkit query`: SQL over a dataset with DuckDB, one view a table. Runs offline and reads nothing but the dataset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from prefkit.errors import DatasetError, InputError
from prefkit.format import REFERENCE_JSON, REFERENCES
from prefkit.store import REMAKE, atomic_path, read_json, read_manifest
from prefkit.views import DERIVED_VIEWS, VIEW_FILES, VIEW_NAMES, view_sql


def connect_dataset(dataset: str | Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views of views.VIEW_NAMES.

    The connection can read the dataset's directory and nothing else, and its configuration is locked.

    Raises:
        DatasetError: there is no finished dataset.
    """
    root, manifest = Path(dataset).resolve(), read_manifest(Path(dataset))
    connection = duckdb.connect()
    for view in VIEW_FILES:
        files = [str(path) for path in view_files(root, manifest, view)]
        try:
            connection.execute(view_sql(view, manifest["kind"], files))
        except duckdb.Error as error:
            reason = f"the files of {view} cannot be read: {str(error).splitlines()[0]}"
            raise DatasetError(reason, where=str(dataset), hint=REMAKE) from None
    for view in DERIVED_VIEWS:
        connection.execute(view_sql(view, manifest["kind"]))
    connection.execute(f"SET allowed_directories=['{str(root).replace(chr(39), chr(39) * 2)}/']")
    connection.execute("SET enable_external_access=false")
    connection.execute("SET lock_configuration=true")
    return connection


def view_files(root: Path, manifest: Mapping[str, Any], view: str) -> list[Path]:
    """The files of a view: those that the manifest or a finished reference lists, for other views those there are.

    Raises:
        DatasetError: a listed file is missing.
    """
    if view in manifest["parts"]:
        found = [root / view / part["file"] for part in manifest["parts"][view]]
    elif view == "reference":
        listed = sorted(root.glob(f"{REFERENCES}/*/{REFERENCE_JSON}"))
        found = [path.parent / part["file"] for path in listed for part in read_json(path).get("parts", [])]
    else:
        found = sorted(root.glob(VIEW_FILES[view][1]))
    for path in found:
        if not path.exists():
            raise DatasetError("part is missing", where=str(path), hint=REMAKE)
    return found


def query_dataset(dataset: str | Path, sql: str) -> duckdb.DuckDBPyRelation:
    """The result of one SQL query over a dataset, as a DuckDB relation (`.pl()`, `.fetchall()`, `.df()`).

    Example: `query_dataset("demo/dataset", "select reason, count(*) from dropped group by all").pl()`

    Raises:
        DatasetError: there is no finished dataset.
        InputError: the SQL does not run; the message is DuckDB's.
    """
    connection = connect_dataset(dataset)
    try:
        if any(
            s.type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
            for s in connection.extract_statements(sql)
        ):
            raise InputError("only a SELECT can be asked: a query changes nothing")
        relation = connection.sql(sql)
    except duckdb.Error as error:
        raise as_input_error(error) from None
    if relation is None:
        raise InputError("the statement gives no rows", expected="one SELECT")
    return relation


def refuse_inside(dataset: str | Path, out: str | None) -> None:
    """A query's result may not be written into the dataset that it asks.

    Raises:
        InputError: `out` lies inside.
    """
    if out is not None and Path(out).resolve().is_relative_to(Path(dataset).resolve()):
        raise InputError("a result cannot be written into the dataset", where=out, hint="--out elsewhere")


def write_result(relation: duckdb.DuckDBPyRelation, form: str, out: str | None, write: Any) -> int:
    """Write a result as csv, json (one object a line) or parquet, to a file or through `write`. Returns its rows.

    Raises:
        InputError: parquet without a file, or the query fails while it runs.
    """
    if form == "parquet" and out is None:
        raise InputError("--format parquet needs a file", hint="--out FILE.parquet")
    try:
        return _write_result(relation, form, out, write)
    except duckdb.Error as error:
        raise as_input_error(error) from None
    # Polars panics at what it cannot hold or write (binary as json, years above 262,000), which is no Exception
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the result cannot be written: {reason}", hint="cast the column in the query") from None


def _write_result(relation: duckdb.DuckDBPyRelation, form: str, out: str | None, write: Any) -> int:
    frame: pl.DataFrame = relation.pl()
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    if form == "csv" and nested:
        raise InputError(f"csv holds no lists: {', '.join(nested)}", hint="--format json or parquet")
    if form == "parquet":
        with atomic_path(Path(str(out))) as beside:
            frame.write_parquet(beside)
        return frame.height
    text = frame.write_csv() if form == "csv" else frame.write_ndjson()
    if out is None:
        write(text)
    else:
        with atomic_path(Path(out)) as beside:
            beside.write_text(text, encoding="utf-8")
    return frame.height


def as_input_error(error: duckdb.Error) -> InputError:
    """DuckDB's own words for what is wrong with a query, and the views there are."""
    message = str(error).strip()
    return InputError(
        message.splitlines()[0] if message else "the query fails",
        expected="views: " + ", ".join(VIEW_NAMES),
        hint='columns with a slash need double quotes: select "rewards/margins" from steps',
    )
