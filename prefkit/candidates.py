"""The candidates of a source become pairs within a memory limit, whatever the size of the source.

Comes in: something that reads the records, frame by frame, and can do so again. Goes out: what selection.select_pairs
makes of all of them together, to the last bit, part by part.

Where the rows of each prompt stand together (most files), prompts are decided as they pass, and memory is that of a
batch and of 8 bytes a prompt. Where a prompt comes back after others, or where raters or several scorers are compared
over the whole source, the records are held as long as they fit the limit and lie in temporary files beyond it (Arrow,
uncompressed, mapped), while the decision is made on some 40 bytes a row.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from prefkit.format import Kind, text_dtype
from prefkit.pairing import Pairing, Rules, pair_candidates
from prefkit.pairs import Direction
from prefkit.quality import Ints, candidates_of, narrow_rows, starts_of
from prefkit.selection import (
    SameHash,
    Selected,
    Tally,
    as_complete,
    dropped_frame,
    gather_from,
    pairs_frame,
    selected_of,
    tally,
    texts_from,
)
from prefkit.store import written

Read = Callable[[], Iterable[pl.DataFrame]]

MEMORY_LIMIT = 4_000_000_000
BATCH_ROWS = 1 << 16  # decided in one go where prompts stand together; more are slower, as memory comes fresh each time
SHARE = 8  # such a batch has at most this part of the memory limit
PAIRS = 1 << 17  # gathered in one go
USED = ("prompt", "response", "tools", "model", "source", "source_row")  # what a pair is made of


class Part(NamedTuple):
    """Some of the pairs and drops, in their order; the tallies of all parts are the account of the source."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    tally: Tally | None


class _Scattered(Exception):  # noqa: N818  no error: the source needs another way
    """The prompts cannot be decided one after the other."""


def select_candidates(
    read: Read,
    kind: Kind,
    direction: Direction,
    rules: Rules,
    memory_limit: int = MEMORY_LIMIT,
    scratch: Path | None = None,
) -> Selected:
    """`selection.select_pairs` of all records that `read` gives; see there for the rules.

    Args:
        read: gives the records of one source, frame by frame; called again where the first reading was in vain.
        kind: of the dataset.
        direction: which way the scores count.
        rules: what makes a pair.
        memory_limit: bytes of records that may be held at once, but for the pairs themselves.
        scratch: folder for temporary files; the system's own if None.

    Raises:
        ConfigError: a rule that the data do not allow.
        MachineError: the disk is full.
    """
    parts: list[Part] = []
    for part in select_parts(read, kind, direction, rules, memory_limit, scratch):
        if part is None:
            parts.clear()
        else:
            parts.append(part)
    pairs, dropped = (pl.concat([getattr(part, name) for part in parts]) for name in ("pairs", "dropped"))
    return selected_of(pairs, dropped, [part.tally for part in parts if part.tally], rules)


def select_parts(
    read: Read, kind: Kind, direction: Direction, rules: Rules, memory_limit: int, scratch: Path | None
) -> Iterator[Part | None]:
    """The same part by part, at least one; None: what came before is void, the source is read again."""
    try:
        yield from _one_after_the_other(read, kind, direction, rules, memory_limit)
    except (_Scattered, SameHash):
        yield None
    else:
        return
    for hash_seed in range(1, 8):
        try:
            yield from _all_together(read, kind, direction, rules, memory_limit, scratch, hash_seed)
        except SameHash:
            yield None
        else:
            return
    raise AssertionError("seven hashes in a row are the same for different prompts")


# -- prompts whose rows stand together


def _one_after_the_other(
    read: Read, kind: Kind, direction: Direction, rules: Rules, memory_limit: int
) -> Iterator[Part]:
    pending = [as_complete(pl.DataFrame(schema=_schema(kind)))]
    rows = size = held_rows = held_size = 0  # held: of a prompt that may go on
    ended = _Ended()
    for frame in read():
        pending.append(as_complete(frame))
        rows, size = rows + frame.height, size + int(frame.estimated_size())
        if size > memory_limit:
            raise _Scattered
        if rows < max(BATCH_ROWS, 2 * held_rows) and size < max(memory_limit // SHARE, 2 * held_size):
            continue
        batch = pl.concat(pending)
        narrow = narrow_rows(batch, kind, random_seed=rules.lottery)
        complete = ended.add(narrow, is_last=False)
        if complete:
            yield _decided(batch.head(complete), narrow.head(complete), kind, direction, rules)
        pending = [compact(batch.slice(complete))]
        rows = held_rows = pending[0].height
        size = held_size = int(pending[0].estimated_size())
    batch = pl.concat(pending)
    narrow = narrow_rows(batch, kind, random_seed=rules.lottery)
    ended.add(narrow, is_last=True)
    yield _decided(batch, narrow, kind, direction, rules)
    ended.check()


def _decided(batch: pl.DataFrame, narrow: pl.DataFrame, kind: Kind, direction: Direction, rules: Rules) -> Part:
    """Whole prompts."""
    gather = gather_from(batch)
    candidates = candidates_of(narrow, direction, rules.scorers)
    pairing = pair_candidates(candidates, narrow, direction, rules, texts_from(gather, kind))
    pairs = pairs_frame(pairing, candidates, gather, kind)
    dropped = dropped_frame(pairing, candidates, gather, kind)
    return Part(compact(pairs), compact(dropped), tally(pairing, candidates))


def _schema(kind: Kind) -> dict[str, Any]:
    """Of records of candidates, as sources.py makes them."""
    texts = dict.fromkeys(("prompt", "response"), text_dtype(kind))
    return texts | {"score": pl.Float64, "model": pl.String, "source": pl.String, "source_row": pl.Int64}


class _Ended:
    """The prompts whose rows have ended, and the one scorer that there may be. What does not fit is _Scattered."""

    def __init__(self) -> None:
        self.prompts: list[npt.NDArray[np.uint64]] = []
        self.num_prompts = 0
        self.next_check = BATCH_ROWS
        self.scorers: pl.Series = pl.Series("scorer", [], pl.String)

    def add(self, narrow: pl.DataFrame, *, is_last: bool) -> int:
        """Take in a batch; how many of its rows are of prompts that have ended: all, or all but the last one's."""
        self.scorers = pl.concat([self.scorers, narrow["scorer"].unique()]).unique()
        if len(self.scorers) > 1 or narrow["rater"].null_count() < narrow.height:
            raise _Scattered
        key = narrow["prompt_key"].to_numpy()
        starts = starts_of(key)
        if not is_last and len(starts):
            complete = int(starts[-1])
            starts = starts[:-1]
        else:
            complete = narrow.height
        self.prompts.append(key[starts])
        self.num_prompts += len(starts)
        if len(np.unique(key[starts])) < len(starts):
            raise _Scattered
        if self.num_prompts >= self.next_check:
            self.check()
            self.next_check = 2 * self.num_prompts
        return complete

    def check(self) -> None:
        """Whether a prompt has come back."""
        self.prompts = [np.concatenate(self.prompts)] if self.prompts else []
        if self.prompts and pl.Series(self.prompts[0]).n_unique() < self.num_prompts:
            raise _Scattered


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same frame in memory of its own: rows gathered from a frame keep all of its texts alive."""
    copied = pl.from_arrow(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), schema=frame.schema)
    assert isinstance(copied, pl.DataFrame)
    return copied


# -- prompts whose rows are anywhere


def _all_together(
    read: Read,
    kind: Kind,
    direction: Direction,
    rules: Rules,
    memory_limit: int,
    scratch: Path | None,
    hash_seed: int,
) -> Iterator[Part]:
    with _Held(memory_limit, scratch) as held:
        narrows = []
        for frame in read():
            complete = as_complete(frame)
            narrows.append(narrow_rows(complete, kind, hash_seed=hash_seed, random_seed=rules.lottery))
            held.add(complete.select(USED))
        narrow = pl.concat(narrows)
        narrows.clear()
        candidates = candidates_of(narrow, direction, rules.scorers)
        pairing = pair_candidates(candidates, narrow, direction, rules, texts_from(held.gather, kind))
        del narrow
        nothing = dropped_frame(pairing._replace(reason=pairing.reason[:0]), candidates, held.gather, kind)
        for start in range(0, max(len(pairing.chosen), 1), PAIRS):
            some = slice(start, start + PAIRS)
            sides = Pairing(pairing.chosen[some], pairing.rejected[some], pairing.margin[some], pairing.reason)
            yield Part(compact(pairs_frame(sides, candidates, held.gather, kind)), nothing, None)
        dropped = dropped_frame(pairing, candidates, held.gather, kind)
        no_pairs = Pairing(pairing.chosen[:0], pairing.rejected[:0], pairing.margin[:0], pairing.reason)
        pairs = pairs_frame(no_pairs, candidates, held.gather, kind)
        yield Part(pairs, compact(dropped), tally(pairing, candidates))


class _Held:
    """Records that can be gathered by their row: in memory up to a limit, beyond it all in a temporary file.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(self, memory_limit: int, scratch: Path | None) -> None:
        self.memory_limit, self.scratch = memory_limit, scratch
        self.frames: list[pl.DataFrame] = []  # those in memory
        self.firsts = [0]  # the first row of each frame, and the number of all
        self.size = 0
        self.folder: Path | None = None
        self.writer: Any = None
        self.reader: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.frames.clear()
        if self.folder is not None:
            self._close()
            self.reader = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, frame: pl.DataFrame) -> None:
        """Take in the next rows."""
        self.size += int(frame.estimated_size())
        self.firsts.append(self.firsts[-1] + frame.height)
        self.frames.append(frame)
        if self.size > self.memory_limit or self.folder is not None:
            for held in self.frames:
                self._to_disk(held)
            self.frames.clear()

    def _to_disk(self, frame: pl.DataFrame) -> None:
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        if self.folder is None:
            if self.scratch is not None:
                self.scratch.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=".candidates-", dir=self.scratch))
            self.writer = pa.ipc.new_file(str(self.folder / "records.arrow"), table.schema)
        with written(self.folder):
            self.writer.write_batch(_one_batch(table))

    def _close(self) -> None:
        if self.writer is not None:
            assert self.folder is not None
            with written(self.folder):
                self.writer.close()
            self.writer = None

    def gather(self, rows: Ints, columns: Sequence[str]) -> pl.DataFrame:
        """These rows, in this order."""
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], self.firsts)
        ends[0] = 0
        spans = zip(self.firsts, ends, ends[1:], strict=False)
        taken = [
            self._take(number, rows[order[begin:end]] - first, columns)
            for number, (first, begin, end) in enumerate(spans)
            if end > begin or not number
        ]
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pl.concat(taken)[back]

    def _take(self, number: int, rows: Ints, columns: Sequence[str]) -> pl.DataFrame:
        if self.folder is None:
            return self.frames[number].select(columns)[rows]
        self._close()
        if self.reader is None:
            self.reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "records.arrow")))
        batch = self.reader.get_batch(number).select(list(columns))
        taken = pl.from_arrow(pa.Table.from_batches([batch.take(pa.array(rows))]))
        assert isinstance(taken, pl.DataFrame)
        return taken


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
