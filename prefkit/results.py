"""What becomes of a query's rows: the first ones for a screen, or all of them as csv, json or parquet, in flat memory.

Comes in: a DuckDB relation. Goes out: text or a file, written as the rows come, and whole or not there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefkit.errors import InputError
from prefkit.guard import SQL
from prefkit.query import Tell, as_query_error, query_dataset
from prefkit.store import atomic_path

Form = Literal["table", "csv", "json", "parquet"]
ENDINGS: dict[str, Form] = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
BLOCK_ROWS = 4_096
GROUP_ROWS, GROUP_BYTES = 50_000, 1 << 26  # of a row group
NESTED = {"list", "array", "map", "struct", "union", "variant"}
BYTES = {"blob", "bit", "bignum", "geometry"}
LOOK = 0.1  # seconds
WIDE = {"hugeint": "BIGINT", "uhugeint": "BIGINT", "decimal": "DOUBLE"}  # within a column of JSON
CAST = "cast the column in the query"
MOST_DAYS = 94_900_000  # from 1970, some 260,000 years
PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}


Interrupt = Callable[[], Any]


class Rows(NamedTuple):
    """The first rows of a result; `more`: there are others."""

    columns: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]
    more: bool


def result_form(form: Form | None, out: str | None, dataset: str | Path) -> Form:
    """The form that a result is written in: the one asked for, or the one that the file's name ends in.

    Raises:
        InputError: a file in the dataset, one whose name says no form, a table in a file, or parquet without a file.
    """
    if out is None:
        if form == "parquet":
            raise InputError("--format parquet needs a file", hint="--out FILE.parquet")
        return form or "table"
    if Path(out).resolve().is_relative_to(Path(dataset).resolve()):
        raise InputError("a result cannot be written into the dataset", where=out, hint="--out elsewhere")
    if form == "table":
        raise InputError("--format table is for a screen", where=out, hint="--format csv, json or parquet")
    if form is None and (form := ENDINGS.get(Path(out).suffix.lower())) is None:
        raise InputError("the name does not say the form", where=out, expected=" ".join(ENDINGS), hint="--format csv")
    return form


def first_rows(relation: duckdb.DuckDBPyRelation, number: int, interrupt: Interrupt | None = None) -> Rows:
    """So many rows, computed alone where the query lets DuckDB stop there; `interrupt` as in `write_result`.

    Raises:
        InputError: the query fails while it runs.
        MachineError: it runs out of memory or disk.
    """
    try:
        types = [str(kind.id) for kind in relation.types]
        with _Worker(interrupt) as worker:
            found = worker.result(relation.limit(number + 1).fetchall)
    except duckdb.Error as error:
        raise as_query_error(error) from None
    return Rows(relation.columns, types, found[:number], len(found) > number)


def write_result(
    relation: duckdb.DuckDBPyRelation,
    form: Form,
    out: str | None,
    write: Callable[[str], Any],
    interrupt: Interrupt | None = None,
) -> int:
    """Write a result as csv, json (one object a line) or parquet, to a file or through `write`. Returns its rows.

    Integers beyond 64 bits, such as sums, are written as integers of 64 bits; lists and structs as JSON in a csv.

    Args:
        relation: of query_dataset.
        form: not table.
        out: the file, None for `write`.
        write: takes text, block by block.
        interrupt: stops DuckDB (`connection.interrupt`) where somebody presses Ctrl-C; without it DuckDB is left to
            see that by itself, which it does not always.

    Raises:
        InputError: a column that the form cannot hold, or the query fails while it runs.
        MachineError: it runs out of memory or disk.
        DatasetError: the file cannot be written to.
    """
    if form == "parquet" and out is None:
        raise InputError("--format parquet needs a file", hint="--out FILE.parquet")
    try:
        prepared = writable(relation, form)
        with _Worker(interrupt) as worker, contextlib.closing(_Batches(prepared, worker)) as reader:
            if out is None:
                return _write_text(reader, form, write)
            with atomic_path(Path(out)) as beside:
                if form == "parquet":
                    return _write_parquet(reader, beside)
                with beside.open("w", encoding="utf-8", newline="") as file:
                    return _write_text(reader, form, file.write)
    except duckdb.Error as error:
        raise as_query_error(error) from None
    # Polars panics at what it cannot hold or write (years above 262,000), which is no Exception
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the result cannot be written: {reason}", where=SQL, hint=CAST) from None


def write_query(
    dataset: str | Path,
    sql: str,
    out: str | Path,
    *,
    form: Form | None = None,
    external: bool = False,
    verify: bool = True,
    tell: Tell = lambda _: None,
) -> int:
    """Write the result of one SELECT over a dataset to a file, as its rows come: any number of them, in flat memory.

    Args:
        dataset: its directory.
        sql: one SELECT, as in `query_dataset`.
        out: the file, outside of the dataset; it appears whole or not at all, and replaces what is there.
        form: csv | json (one object a line) | parquet; None: by the ending of `out`.
        external: as in `query_dataset`.
        verify: likewise.
        tell: called with what is done.

    Returns:
        the number of rows.

    Raises:
        DatasetError: as in `query_dataset`, or the file cannot be written to.
        GateError: the identity of a reference was changed.
        InputError: as in `query_dataset`, the file has no form or lies in the dataset, or a column has no place in it.
        MachineError: it runs out of memory or disk.

    Example:
        print(prefkit.write_query("demo/dataset", "select * from tokens where exclusive", "tokens.parquet"))
    """
    wanted = result_form(form, str(out), dataset)
    connections: list[duckdb.DuckDBPyConnection] = []
    relation = query_dataset(dataset, sql, external=external, verify=verify, tell=tell, watch=connections.append)
    return write_result(relation, wanted, str(out), lambda _: None, connections[0].interrupt)


def writable(relation: duckdb.DuckDBPyRelation, form: Form) -> duckdb.DuckDBPyRelation:
    """The relation with columns that the form can hold.

    Raises:
        InputError: two columns of one name, or one of bytes in a form of text.
    """
    names, types = relation.columns, relation.types
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several columns are called {', '.join(twice)}", where=SQL, hint="select ... as another_name")
    if form != "parquet" and (
        held := [name for name, kind in zip(names, types, strict=True) if BYTES & {*_kinds(kind)}]
    ):
        raise InputError(f"{form} holds no bytes: {', '.join(held)}", where=SQL, hint=CAST)
    columns = [_column(name, kind, form) for name, kind in zip(names, types, strict=True)]
    return relation.project(", ".join(columns)) if any(" AS " in column for column in columns) else relation


def _children(kind: Any) -> list[tuple[str, Any]]:
    """The types that a type is made of, by name."""
    return [(name, of) for name, of in kind.children if not isinstance(of, int)] if str(kind.id) in NESTED else []


def _kinds(kind: Any) -> Iterator[str]:
    """The names of a type and of all types in it."""
    yield str(kind.id)
    for _, of in _children(kind):
        yield from _kinds(of)


def _with_numbers(kind: Any) -> str:
    """A type whose numbers are those that JSON writes as numbers, at any depth."""
    name, children = str(kind.id), _children(kind)
    if name in WIDE:
        return WIDE[name]
    if name == "list":
        return f"{_with_numbers(children[0][1])}[]"
    if name == "array":
        return f"{_with_numbers(children[0][1])}[{dict(kind.children)['size']}]"
    if name == "map":
        return f"MAP({', '.join(_with_numbers(of) for _, of in children)})"
    if name == "struct":
        fields = [f'"{field.replace(chr(34), chr(34) * 2)}" {_with_numbers(of)}' for field, of in children]
        return f"STRUCT({', '.join(fields)})"
    return str(kind)


def _column(name: str, dtype: Any, form: Form) -> str:
    quoted, kind = '"' + name.replace('"', '""') + '"', str(dtype.id)
    if kind in ("hugeint", "uhugeint"):  # what sum() and count_if() make of integers
        return f"CAST({quoted} AS BIGINT) AS {quoted}"
    if kind == "decimal" and form == "json":  # a number there, not a text
        return f"CAST({quoted} AS DOUBLE) AS {quoted}"
    if kind in NESTED and form == "json" and WIDE.keys() & {*_kinds(dtype)}:
        return f"CAST({quoted} AS {_with_numbers(dtype)}) AS {quoted}"
    if kind in NESTED and form == "csv":
        return f"CAST(to_json({quoted}) AS VARCHAR) AS {quoted}"
    return quoted


class _Worker:
    """Calls into DuckDB, from a thread where they can be interrupted: the thread that waits for them hears Ctrl-C."""

    def __init__(self, interrupt: Interrupt | None) -> None:
        self.interrupt, self.pool = interrupt, ThreadPoolExecutor(1) if interrupt is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def result(self, call: Callable[[], Any]) -> Any:
        if self.pool is None or self.interrupt is None:
            return call()
        future = self.pool.submit(call)
        try:
            while not future.done():  # a signal may reach another thread than this one, which then must look by itself
                wait([future], timeout=LOOK)
            return future.result()
        except KeyboardInterrupt:
            while not future.done():  # it may not have begun when it is first told
                self.interrupt()
                time.sleep(0.05)
            raise


class _Batches:
    """The batches of a relation; whatever DuckDB says while it computes them is an error of the query."""

    def __init__(self, relation: duckdb.DuckDBPyRelation, worker: _Worker) -> None:
        self.worker, self.reader = worker, worker.result(lambda: relation.to_arrow_reader(BLOCK_ROWS))
        self.schema: pa.Schema = self.reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while (batch := self.worker.result(self._next)) is not None:
            yield batch

    def _next(self) -> pa.RecordBatch | None:
        try:
            return self.reader.read_next_batch()
        except StopIteration:
            return None
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # an OSError: so pyarrow hands on DuckDB's
            raise as_query_error(error) from None

    def close(self) -> None:
        self.reader.close()


def _write_text(reader: _Batches, form: Form, write: Callable[[str], Any]) -> int:
    rows = 0
    for batch in reader:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _check_times(name, column)
        frame = pl.DataFrame(pl.from_arrow(batch))
        write(frame.write_csv(include_header=rows == 0) if form == "csv" else frame.write_ndjson())
        rows += frame.height
    if form == "csv" and rows == 0:
        write(pl.DataFrame(pl.from_arrow(reader.schema.empty_table())).write_csv())
    return rows


def _check_times(name: str, column: pa.Array) -> None:
    """Refuse a time that Polars does not write: it panics, and its own words go to stderr.

    Raises:
        InputError: there is one, at any depth.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        a_day = PER_DAY[kind.unit] if pa.types.is_timestamp(kind) else 1 if pa.types.is_date32(kind) else PER_DAY["ms"]
        ends = pc.min_max(column.view(pa.int32() if pa.types.is_date32(kind) else pa.int64())).as_py()
        if any(end is not None and abs(end) > MOST_DAYS * a_day for end in ends.values()):
            raise InputError(f"the result cannot be written: {name} has a year beyond 260,000", where=SQL, hint=CAST)
    elif pa.types.is_map(kind):
        _check_times(name, column.keys)
        _check_times(name, column.items)
    elif pa.types.is_struct(kind):
        for inner in column.flatten():
            _check_times(name, inner)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _check_times(name, column.flatten())


def _write_parquet(reader: _Batches, path: Path) -> int:
    rows, pending, size = 0, list[pa.RecordBatch](), 0
    with pq.ParquetWriter(path, reader.schema, compression="zstd", compression_level=3) as writer:

        def flush() -> None:
            table = pa.Table.from_batches(pending, reader.schema)
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            pending.clear()

        for batch in reader:
            pending.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if size >= GROUP_BYTES or sum(one.num_rows for one in pending) >= GROUP_ROWS:
                flush()
                size = 0
        flush()
    return rows
