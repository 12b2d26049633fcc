"""Tables in numbered Parquet parts: written row group by row group, read back block by block, their hashes checked.

Comes in: frames of a table, in any pieces. Goes out: parts whose bytes depend on the rows alone and not on the pieces:
a row group ends after ROWS_PER_GROUP rows or GROUP_BYTES of text, a part after ROWS_PER_PART rows or PART_BYTES.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.errors import DatasetError
from prefkit.format import (
    MESSAGES,
    PLAIN_MESSAGES,
    ROWS_PER_GROUP,
    ROWS_PER_PART,
    SPLITS,
    Kind,
    Split,
    part_name,
    schema,
)
from prefkit.sources import file_sha256
from prefkit.store import REMAKE, atomic_path, written

GROUP_BYTES = 1 << 28  # of text: what a reader of long conversations has to hold
PART_BYTES = 1 << 32


class Part(NamedTuple):
    """One Parquet file of a table, as the manifest records it."""

    file: str
    rows: int
    sha256: str


class TableWriter:
    """A table that is written as its rows come: parts from 0 on, at least one, each whole or not there.

    A part of the pairs holds one split: `parts` names those of train first, then those of test. A split without rows
    has no part; of a table without any the one part is that of train.

    Args:
        folder: of the table.
        name: of the table in format.TABLES.
        kind: of the dataset.
        plain: messages without `extra`, for a dataset in which none has any (`are_plain`).

    Raises:
        MachineError: the disk is full.
        DatasetError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, name: str, kind: Kind, *, plain: bool = False) -> None:
        self.folder, self.schema = folder, schema(name, kind, plain=plain)
        splits = SPLITS if "split" in self.schema else (None,)
        self.of_split = {split: PartsWriter(folder, self.schema, split) for split in splits}

    @property
    def parts(self) -> list[Part]:
        """The parts that are finished, in their order."""
        return [part for writer in self.of_split.values() for part in writer.parts]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return self._abandon(error)
        try:
            for writer in self.of_split.values():
                writer.finish()
            if not self.parts:
                next(iter(self.of_split.values())).write_empty()
        except BaseException as failed:
            self._abandon(failed)
            raise
        for stale in set(self.folder.glob("part-*.parquet")) - {self.folder / part.file for part in self.parts}:
            stale.unlink()
        return None

    def _abandon(self, error: BaseException) -> None:
        for writer in self.of_split.values():
            writer.abandon(error)

    def add(self, frame: pl.DataFrame) -> None:
        """Put rows to the table; columns it does not have are left out, those that the frame lacks are null."""
        rows = frame.select(
            pl.col(c).cast(t) if c in frame.columns else pl.lit(None, t).alias(c) for c, t in self.schema.items()
        )
        if None in self.of_split:
            return self.of_split[None].add(rows)
        found = {split: rows.filter(pl.col("split") == split) for split in self.of_split}
        assert sum(part.height for part in found.values()) == rows.height, "a row is of no split"
        for split, part in found.items():
            few = 2 * part.height < rows.height  # they wait for many others, and would keep the rows' texts alive
            self.of_split[split].add(compact(part) if few else part)
        return None


class PartsWriter:
    """The parts of a table, or of one split of it: `add` rows with the table's schema, then `finish` or `abandon`."""

    def __init__(self, folder: Path, columns: pl.Schema, split: Split | None) -> None:
        self.folder, self.schema, self.split = folder, columns, split
        self.parts: list[Part] = []
        self.pending: list[pl.DataFrame] = []
        self.rows = self.size = 0  # of the row group that is gathered
        self.part_rows = self.part_size = 0
        self.stack = contextlib.ExitStack()
        self.path: Path | None = None
        self.writer: Any = None

    def add(self, rows: pl.DataFrame) -> None:
        """Gather rows; a row group is written when it is full."""
        sizes = np.cumsum(_text_bytes(rows))
        start = 0
        while start < rows.height:
            before = int(sizes[start - 1]) if start else 0
            full = int(np.searchsorted(sizes, before + GROUP_BYTES - self.size)) + 1
            room = min(ROWS_PER_GROUP, ROWS_PER_PART - self.part_rows) - self.rows
            end = min(rows.height, start + room, full)
            self.pending.append(rows.slice(start, end - start))
            self.rows, self.size = self.rows + end - start, self.size + int(sizes[end - 1]) - before
            if end == start + room or self.size >= GROUP_BYTES:
                self._write_group()
            start = end

    def finish(self) -> None:
        """Write what is gathered, and end the last part."""
        self._write_group()
        self._close()

    def write_empty(self) -> None:
        """Write a part without rows."""
        self._open(self._table(pl.DataFrame(schema=self.schema)))
        self._close()

    def abandon(self, error: BaseException) -> None:
        """Leave nothing of the part that was begun."""
        if self.writer is not None:
            with contextlib.suppress(Exception):
                self.writer.close()
            self.writer = None
        with contextlib.suppress(Exception):
            self.stack.__exit__(type(error), error, error.__traceback__)

    def _write_group(self) -> None:
        if not self.rows:
            return
        table = self._table(pl.concat(self.pending, rechunk=True))  # pages of the file would end where chunks do
        self.pending.clear()
        if self.writer is None:
            self._open(table)
        assert self.path is not None
        with written(self.path):
            self.writer.write_table(table, row_group_size=self.rows)
        self.part_rows, self.part_size = self.part_rows + self.rows, self.part_size + self.size
        self.rows = self.size = 0
        if self.part_rows >= ROWS_PER_PART or self.part_size >= PART_BYTES:
            self._close()

    @staticmethod
    def _table(frame: pl.DataFrame) -> pa.Table:
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest())

    def _open(self, table: pa.Table) -> None:
        self.path = self.folder / part_name(len(self.parts), self.split)
        beside = self.stack.enter_context(atomic_path(self.path))
        self.writer = parquet_writer(beside, table.schema)

    def _close(self) -> None:
        if self.writer is not None:
            assert self.path is not None
            with written(self.path):
                self.writer.close()
            self.stack.close()
            self.parts.append(Part(self.path.name, self.part_rows, file_sha256(self.path)))
            self.writer, self.part_rows, self.part_size = None, 0, 0


def _text_bytes(frame: pl.DataFrame) -> np.ndarray[Any, np.dtype[Any]]:
    """Bytes of text in each row."""
    found = np.zeros(frame.height, np.int64)
    for name, dtype in frame.schema.items():
        if dtype == pl.String:
            found += frame[name].str.len_bytes().fill_null(0).to_numpy()
        elif dtype in (MESSAGES, PLAIN_MESSAGES):
            fields = ("content", "extra") if dtype == MESSAGES else ("content",)
            sizes = [pl.element().struct.field(field).str.len_bytes().fill_null(0) for field in fields]
            found += frame[name].list.eval(pl.sum_horizontal(sizes)).list.sum().fill_null(0).to_numpy()
    return found


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same frame in memory of its own: rows gathered from a frame keep all of its texts alive."""
    copied = pl.from_arrow(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), schema=frame.schema)
    assert isinstance(copied, pl.DataFrame)
    return copied


def parquet_writer(path: Path, columns: pa.Schema) -> Any:
    """A writer of the house's Parquet: zstd 3, text with a dictionary, floats without one.

    Arrow's own schema is left out: it would make large_string and large_list of what every other file calls string and
    list, and `datasets` does not concatenate the two.
    """
    texts = [field.name for field in columns if pa.types.is_large_string(field.type)]
    return pq.ParquetWriter(
        path, columns, compression="zstd", compression_level=3, use_dictionary=texts, store_schema=False
    )


def write_parquet(path: Path, frame: pl.DataFrame) -> Part:
    """Write one Parquet file atomically."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    with atomic_path(path) as beside:
        with parquet_writer(beside, table.schema) as writer:
            if frame.height:  # a row group without rows: `datasets` takes its size for that of a batch
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        digest = file_sha256(beside)
    return Part(path.name, frame.height, digest)


def write_table(folder: Path, name: str, frame: pl.DataFrame, kind: Kind, *, plain: bool = False) -> list[Part]:
    """Write a table that is in memory; see `TableWriter`."""
    with TableWriter(folder, name, kind, plain=plain) as writer:
        writer.add(frame)
    return writer.parts


def are_plain(frames: Sequence[pl.DataFrame]) -> bool:
    """Whether no message of the frames has any `extra`."""
    extra = pl.element().struct.field("extra").is_not_null()
    return not any(
        frame.select(pl.col(name).list.eval(extra).list.any().any()).item()
        for frame in frames
        for name, dtype in frame.schema.items()
        if dtype == MESSAGES
    )


def check_parts(folder: Path, parts: list[Mapping[str, Any]]) -> None:
    """Compare the parts of a table with their recorded hashes.

    Raises:
        DatasetError: a part is missing or its sha256 is not the recorded one, by name.
    """
    for part in parts:
        path = folder / part["file"]
        if not path.exists():
            raise DatasetError("part is missing", where=str(path), hint=REMAKE)
        if file_sha256(path) != part["sha256"]:
            raise DatasetError("part was changed: its sha256 is not the recorded one", where=str(path), hint=REMAKE)


def read_table(dataset: Path, name: str, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """A table of the dataset, its parts checked against the manifest."""
    check_parts(dataset / name, manifest["parts"][name])
    parts = [pl.read_parquet(dataset / name / part["file"], glob=False) for part in manifest["parts"][name]]
    return pl.concat(parts).cast({PLAIN_MESSAGES: MESSAGES})  # messages have all fields in memory


def table_blocks(
    dataset: Path, name: str, manifest: Mapping[str, Any], columns: Sequence[str], rows: int
) -> Iterator[pl.DataFrame]:
    """Some columns of a table, some rows at a time; the parts are not checked again (`check_parts`)."""
    for part in manifest["parts"][name]:
        # pre_buffer would keep the whole compressed file in memory
        with pq.ParquetFile(dataset / name / part["file"], pre_buffer=False) as file:
            for batch in file.iter_batches(rows, columns=[c for c in columns if c in file.schema_arrow.names]):
                frame = pl.DataFrame(pl.from_arrow(batch))
                yield frame.cast({PLAIN_MESSAGES: MESSAGES})
