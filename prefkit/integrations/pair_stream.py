"""Scored pairs that are read as they are asked for: shared out among ranks and workers, mixed, and gone on with.

Comes in: a checked reference. Goes out: items. All rows of an epoch stand in one line: the parts in an order of chance,
the rows of a part as they lie there. A rank reads one stretch of the line, a worker one stretch of its rank's, both as
long as any other's but for a row, and a stretch is read window by window, the rows of each in an order of chance. So
who reads which row depends on the seed, the epoch and the numbers alone, no part is read by more of them than need be,
and a stretch can be gone on with at any row. Price: a part and a window of rows in memory. What runs in a worker uses
no Polars, whose threads a fork does not take along.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from prefkit.errors import InputError
from prefkit.format import differing
from prefkit.integrations.pair_tensors import ITEMS_AT_ONCE, LENGTH_OF, LENGTHS, Item, PairTensors
from prefkit.reference_table import Opened, looked_up

Uneven: TypeAlias = Literal["drop", "repeat", "keep"]


class Parts(NamedTuple):
    """Where the wanted rows lie: (P + 1,) where each part begins among the N rows, their numbers in it, weights."""

    files: tuple[str, ...]
    starts: Tensor  # int64
    rows: Tensor  # (N,) int32
    weights: Tensor  # (N,) float32


class Order(NamedTuple):
    """How the line of an epoch is made, and shared out: see `torch_stream`."""

    shuffle: bool
    seed: int
    window_rows: int
    uneven: Uneven


class Place(NamedTuple):
    """Which of the ranks this is."""

    rank: int
    world_size: int


def find_parts(opened: Opened, split: str | None) -> Parts:
    """Where the scored pairs of a split lie in the parts of a checked reference."""
    wanted = opened.pairs if split is None else opened.pairs.filter(pl.col("split") == split)
    files = tuple(str(opened.folder / part["file"]) for part in opened.recorded["parts"])
    rows, weights, counts = [], [], []
    for file in files:
        ids = pl.read_parquet(file, columns=["pair_id"], glob=False)
        found = looked_up(ids, wanted).with_row_index("row").filter(pl.col("split").is_not_null())
        rows.append(found["row"].cast(pl.Int32).to_numpy())
        weights.append(found["weight"].cast(pl.Float32).to_numpy())
        counts.append(found.height)
    starts = torch.from_numpy(np.cumsum([0, *counts]))
    return Parts(files, starts, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(weights)))


def place_of(rank: int | None, world_size: int | None) -> Place:
    """The rank as it was told, or as torch.distributed, the environment, or nobody has it.

    Raises:
        InputError: one of the two is missing, they cannot be, or accelerate has several processes: it may deal out what
            was shared out already.
    """
    if (rank is None) != (world_size is None):
        raise InputError("rank and world_size belong together", where="torch_stream", expected="both, or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            what = f"rank {rank} of {world_size}"
            raise InputError(what, where="torch_stream", expected="0 <= rank < world_size")
        return Place(rank, world_size)
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.is_initialized() and accelerate.PartialState().num_processes > 1:
        raise InputError(
            "accelerate has several processes, and deals out the rows of a prepared DataLoader once more",
            where="torch_stream",
            hint="torch_dataset in a prepared DataLoader; or rank=, world_size= and a DataLoader that is not prepared",
        )
    return _found_place()


def _found_place() -> Place:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Place(distributed.get_rank(), distributed.get_world_size())
    names = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return Place(*map(int, names)) if all(name.isdecimal() for name in names) else Place(0, 1)


class PairStream(IterableDataset[Item]):
    """The scored pairs of a split, read from the parts as they are asked for. `torch_stream` makes it.

    Attributes:
        reference: what reference.json holds: `key`, and whose reference it is under `identity`.
        place: the rank that it reads for.
    """

    reference: dict[str, Any]
    place: Place

    def __init__(
        self,
        reference: dict[str, Any],
        parts: Parts,
        columns: tuple[str, ...],
        order: Order,
        place: Place,
        *,
        told: bool,
    ) -> None:
        self.reference, self.parts, self.columns, self.order = reference, parts, columns, order
        self.place, self.told = place, told
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call] # workers that persist see it change
        self.rows_sha256 = hashlib.sha256(parts.starts.numpy().tobytes() + parts.rows.numpy().tobytes()).hexdigest()
        self.made, self.resumed = 0, False  # of this process: items made in this epoch

    @property
    def num_pairs(self) -> int:
        """How many items this rank's workers make in an epoch, all together."""
        begin, end = self._of_rank()
        return end - begin

    def set_epoch(self, epoch: int) -> None:
        """Another order of chance; before each pass over a DataLoader, the same in all ranks."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Item]:
        self._refuse_another_place()
        epoch, (begin, end) = int(self.epoch), self._of_worker()
        skip, self.resumed = self.made if self.resumed else 0, False
        self.made = skip
        window = self.order.window_rows
        reader = _Reader(self.parts, self.columns, self._line(epoch))
        for start in range(begin + skip // window * window, end, window):
            rows = reader.read(start, min(end, start + window))
            if self.order.shuffle:
                rows.order = torch.from_numpy(self._chance(epoch, start).permutation(len(rows)))
            first = begin + skip - start if start <= begin + skip else 0
            for at in range(first, len(rows), ITEMS_AT_ONCE):
                for item in rows.items(range(at, min(len(rows), at + ITEMS_AT_ONCE))):
                    self.made += 1
                    yield item

    def _line(self, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The parts in the order of this epoch."""
        count = len(self.parts.files)
        return self._chance(epoch, -1).permutation(count) if self.order.shuffle else np.arange(count)

    def _chance(self, epoch: int, start: int) -> np.random.Generator:
        return np.random.default_rng([self.order.seed, epoch, start + 1])

    def _of_rank(self) -> tuple[int, int]:
        """The stretch of the line that this rank reads; beyond the end of the line it begins again."""
        count, (rank, size) = len(self.parts.rows), self.place
        if self.order.uneven == "keep":
            return rank * count // size, (rank + 1) * count // size
        each = count // size if self.order.uneven == "drop" else -(-count // size)
        return rank * each, (rank + 1) * each

    def _of_worker(self) -> tuple[int, int]:
        """The stretch of its rank's that this worker reads."""
        (begin, end), (worker, workers) = self._of_rank(), _worker()
        return begin + worker * (end - begin) // workers, begin + (worker + 1) * (end - begin) // workers

    def _refuse_another_place(self) -> None:
        now = _found_place()
        if not self.told and now not in (self.place, Place(0, 1)):
            raise InputError(
                f"was made for rank {self.place.rank} of {self.place.world_size}, and this is rank {now.rank} of "
                f"{now.world_size}",
                where="torch_stream",
                hint="make it after torch.distributed.init_process_group, or say rank= and world_size=",
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_another_place()  # a spawned worker knows nothing of torch.distributed
        return self.__dict__

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands in the epoch: in a worker, where the worker stands.

        torchdata's StatefulDataLoader asks each worker for it. Of a plain DataLoader with workers it knows nothing.
        """
        return {"epoch": int(self.epoch), "made": self.made, "of": self._told()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood; the next pass gives the rest of its epoch.

        Raises:
            InputError: it was another stream, or shared out among another number of ranks or workers.
        """
        if lines := differing(state["of"], self._told()):
            what = "the state is that of another stream (state and stream): " + "; ".join(lines)
            raise InputError(what, where="torch_stream", expected="the same rows, seed, ranks and workers")
        self.set_epoch(state["epoch"])
        self.made, self.resumed = state["made"], True

    def _told(self) -> dict[str, Any]:
        """What decides which rows this process reads, and in which order."""
        worker, workers = _worker()
        told = {"key": self.reference["key"], "rows_sha256": self.rows_sha256, **self.order._asdict()}
        return told | {**self.place._asdict(), "worker": worker, "num_workers": workers}


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class _Reader:
    """Stretches of a line of parts; the part that was read last is kept."""

    def __init__(self, parts: Parts, columns: tuple[str, ...], line: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        self.parts, self.columns, self.line = parts, columns, line
        self.ends = np.cumsum(np.diff(parts.starts.numpy())[line])
        self.number, self.part = -1, pa.table({})

    def read(self, start: int, end: int) -> PairTensors:
        """The rows from `start` to `end` of the line; beyond its end it begins again."""
        count, pieces = len(self.parts.rows), []
        while start < end:
            at = start % count
            place = int(np.searchsorted(self.ends, at, side="right"))
            stop = min(int(self.ends[place]), at + end - start)
            pieces.append(self._rows(int(self.line[place]), at - int(self.ends[place]), stop - int(self.ends[place])))
            start += stop - at
        rows = PairTensors(
            pa.concat_tables(piece.select(["pair_id", *LENGTHS]) for piece in pieces),
            [name for name in self.columns if name in LENGTH_OF],
        )
        for piece in pieces:
            rows.add(piece)
        return rows

    def _rows(self, number: int, start: int, end: int) -> pa.Table:
        """Wanted rows of a part, counted from its end: start < end <= 0."""
        if number != self.number:
            with pq.ParquetFile(self.parts.files[number], pre_buffer=False) as file:
                self.part = file.read(columns=[*self.columns, *LENGTHS], use_threads=False)
            self.number = number
        last = int(self.parts.starts[number + 1])
        found = slice(last + start, last + end)
        weight = pa.array(self.parts.weights[found].numpy())
        return self.part.take(pa.array(self.parts.rows[found].numpy())).append_column("weight", weight)
