"""`prefkit query`: SQL over a dataset with DuckDB, one view a table. Runs offline and reads nothing but the dataset."""

from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from prefkit.errors import InputError
from prefkit.store import read_manifest
from prefkit.views import VIEW_FILES, view_sql


def connect_dataset(dataset: str | Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views of views.VIEW_FILES.

    The connection can read the dataset's directory and nothing else, and its configuration is locked.

    Raises:
        DatasetError: there is no finished dataset.
    """
    root = Path(dataset).resolve()
    kind = read_manifest(Path(dataset))["kind"]
    connection = duckdb.connect()
    for view, (_, pattern, _) in VIEW_FILES.items():
        files = sorted(str(path) for path in root.glob(pattern))
        connection.execute(view_sql(view, kind, files))
    connection.execute(f"SET allowed_directories=['{str(root).replace(chr(39), chr(39) * 2)}/']")
    connection.execute("SET enable_external_access=false")
    connection.execute("SET lock_configuration=true")
    return connection


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


def write_result(relation: duckdb.DuckDBPyRelation, form: str, out: str | None, write: Any) -> int:
    """Write a result as csv, json (one object a line) or parquet, to a file or through `write`. Returns its rows.

    Raises:
        InputError: parquet without a file, or the query fails while it runs.
    """
    from prefkit.store import atomic_path

    if form == "parquet" and out is None:
        raise InputError("--format parquet needs a file", hint="--out FILE.parquet")
    try:
        frame: pl.DataFrame = relation.pl()
    except duckdb.Error as error:
        raise as_input_error(error) from None
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
        expected="views: " + ", ".join(VIEW_FILES),
        hint='columns with a slash need double quotes: select "rewards/margins" from steps',
    )
