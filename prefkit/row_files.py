"""Rows of plain values in a file: lines of JSON, one JSON list, or Parquet.

Comes in: dicts, some at a time. Goes out: a file that appears whole or not at all, by its ending. Nothing is gathered
but a row group. Parquet wants one schema for all rows: it is inferred from the first row group, and a later one that
has more (a column, a field of a struct, a type where nulls stood) is a reason to write again what is there already,
group by group. Rows that no schema fits are refused. The bytes depend on the rows alone, not on the pieces.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.errors import InputError, first_line
from prefkit.records import LONE_SURROGATE
from prefkit.store import atomic_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
OPEN_KEYS = ("arguments", "tools")  # objects without fixed fields: Arrow would give each row the fields of all others
ROWS_PER_GROUP = 10_000
ROWS_AT_ONCE = 1_000  # as Python objects; a row group of 10,000 long token lists would take half a gigabyte

Rows: TypeAlias = list[dict[str, Any]]
Put: TypeAlias = Callable[[Rows], None]


@contextlib.contextmanager
def row_file(path: Path, types: Mapping[str, pa.DataType]) -> Iterator[Put]:
    """A function that adds rows to a file, which is in its place when the block has ended well.

    Args:
        path: its ending is one of SUFFIXES.
        types: of columns whose type in Parquet values do not tell, such as float32.

    Raises:
        InputError: the rows fit no one schema (Parquet).
        DatasetError: the place cannot be written to.
        MachineError: the disk is full.
    """
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            columns = _Columns(path, temporary, types)
            try:
                yield columns.put
                columns.end()
            finally:
                with contextlib.suppress(Exception):
                    columns.close()
            return
        packed = path.suffix == ".gz"
        with contextlib.ExitStack() as files:
            raw = files.enter_context(temporary.open("wb"))
            # neither name nor time in its header: the same rows give the same bytes
            stream = files.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if packed else raw
            text = files.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))
            before = chain(["[\n"], repeat(",\n")) if path.suffix == ".json" else repeat("")
            after = "" if path.suffix == ".json" else "\n"
            yield lambda rows: text.writelines(f"{next(before)}{as_line(row)}{after}" for row in rows)
            text.write("\n]\n" if path.suffix == ".json" else "")


def as_line(row: Mapping[str, Any]) -> str:
    """A row as JSON on one line; a float has as many digits as give back the very same one."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return json.dumps(row) if LONE_SURROGATE.search(text) else text  # half a character has no UTF-8


class _Columns:
    """A Parquet file that grows by row groups, and whose schema grows where a later group has more."""

    def __init__(self, path: Path, temporary: Path, types: Mapping[str, pa.DataType]) -> None:
        self.path, self.temporary, self.types = path, temporary, types
        self.rows: Rows = []
        self.tables: list[pa.Table] = []
        self.schema: pa.Schema | None = None
        self.writer: Any = None

    def put(self, rows: Rows) -> None:
        """Add rows."""
        for row in rows:
            self.rows.append(row)
            if len(self.rows) == ROWS_AT_ONCE:
                self._convert()

    def end(self) -> None:
        """Write what is left."""
        self._convert()
        self._write_group()
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None

    def _convert(self) -> None:
        """Gathered rows become a table of what columns they have."""
        if not self.rows:
            return
        names = dict.fromkeys(name for row in self.rows for name in row)
        with self._fitting():
            columns = {name: self._column(name) for name in names}
        self.tables.append(pa.table(columns))
        self.rows = []
        if sum(table.num_rows for table in self.tables) == ROWS_PER_GROUP:
            self._write_group()

    def _column(self, name: str) -> Any:
        values = [row.get(name) for row in self.rows]
        if (known := self.types.get(name)) is not None:
            return pa.array(values, known)
        return pa.array([_for_columns(value, name) for value in values])

    def _write_group(self) -> None:
        if not self.tables:
            return
        with self._fitting():
            known = [] if self.schema is None else [self.schema]
            wanted = pa.unify_schemas([*known, *(t.schema for t in self.tables)], promote_options="permissive")
            group = pa.concat_tables([_fitted(table, wanted) for table in self.tables]).combine_chunks()
        self.tables = []
        if self.writer is None:
            self._open(wanted)
        elif wanted != self.schema:
            self._grow(wanted)
        self.writer.write_table(group, row_group_size=group.num_rows)

    def _open(self, schema: pa.Schema) -> None:
        self.schema, self.writer = schema, pq.ParquetWriter(self.temporary, schema, compression="zstd")

    def _grow(self, wanted: pa.Schema) -> None:
        """Write again, with the wider schema, what is there."""
        self.close()
        old = self.temporary.with_name(f"{self.temporary.name}.old")
        try:
            self.temporary.replace(old)
            self._open(wanted)
            with pq.ParquetFile(old, pre_buffer=False) as written:
                for number in range(written.num_row_groups):
                    with self._fitting():
                        group = _fitted(written.read_row_group(number), wanted)
                    self.writer.write_table(group, row_group_size=group.num_rows)
        finally:
            old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            what = f"the rows fit no one schema: {first_line(error)}"
            raise InputError(what, where=str(self.path), hint="--out FILE.jsonl") from None


def _fitted(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The table with the columns, fields and types of a wider schema."""
    if table.schema == wanted:
        return table
    columns = [_widened(table, field) for field in wanted]
    return pa.table(columns, schema=wanted)


def _widened(table: pa.Table, field: pa.Field) -> Any:
    if field.name not in table.column_names:
        return pa.nulls(table.num_rows, field.type)
    column = table.column(field.name)
    # through Python: not every release of Arrow can cast a struct to one with more fields
    return column if column.type == field.type else pa.array(column.to_pylist(), field.type)


def _for_columns(value: Any, name: str) -> Any:
    """A value as a column can hold it: what has no fixed fields becomes JSON text."""
    if isinstance(value, (dict, list)) and name in OPEN_KEYS:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return {key: _for_columns(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_for_columns(inner, "") for inner in value]
    return value
