"""Rows that outgrow memory, in partitions on disk: what a count appends now and reads back one partition at a time."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from prefkit.store import SCRATCH, written


class Spill:
    """Frames by partition number, in a folder of its own that goes when the work is done or fails.

    Nothing is made on disk before the first frame is.
    """

    def __init__(self, parent: Path | None) -> None:
        self.parent = parent or Path(tempfile.gettempdir())
        self.folder: Path | None = None
        self.parts: dict[int, list[Path]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, partition: int, frame: pl.DataFrame) -> None:
        """Put rows to those of a partition; all frames of a partition have the same columns."""
        with written(self.parent):
            if self.folder is None:
                self.parent.mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.parent))
            parts = self.parts.setdefault(partition, [])
            path = self.folder / f"{partition:04d}-{len(parts):06d}.arrow"
            frame.write_ipc(path, compression="uncompressed")
            parts.append(path)

    def partitions(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """The rows of each partition in the order of their numbers, once: what has been read is gone."""
        for partition in sorted(self.parts):
            paths = self.parts.pop(partition)
            rows = pl.concat([pl.read_ipc(io.BytesIO(path.read_bytes())) for path in paths])
            for path in paths:
                path.unlink()
            yield partition, rows
