"""The candidates of a source become pairs within a memory limit, whatever the size of the source.

Comes in: something that reads the records, frame by frame, and can do so again. Goes out: what selection.select_pairs
makes of all of them together, to the last bit, part by part.

Where the rows of each prompt stand together (most files), prompts are decided as they pass, and memory is that of a
batch and of 8 bytes a prompt. Where a prompt comes back after others, or where raters or several scorers are compared
over the whole source, the decision is made on some 40 bytes a row, and the records that it may need are held as long as
they fit the limit and lie in temporary files beyond it (Arrow, uncompressed, mapped). Of best against worst that is
what ties for either, which a second reading finds.
"""

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from prefkit.ahead import ahead
from prefkit.format import Kind, text_dtype
from prefkit.pairing import Rules, only_extremes, pair_candidates
from prefkit.pairs import Direction
from prefkit.quality import Ints, candidates_of, extreme_rows, narrow_rows, starts_of
from prefkit.selection import (
    HASH_SEEDS,
    Selected,
    Tally,
    as_complete,
    dropped_frame,
    gather_from,
    pairs_frame,
    selected_of,
    sides_of,
    tally,
    texts_from,
)
from prefkit.store import SCRATCH, written
from prefkit.tables import compact

Read = Callable[[], Iterable[pl.DataFrame]]

MEMORY_LIMIT = 4_000_000_000
BATCH_ROWS = 1 << 16  # decided in one go where prompts stand together; more are slower, as memory comes fresh each time
SHARE = 8  # such a batch has at most this part of the memory limit
PAIRS = 1 << 18  # gathered in one go
OVERHEAD = 1.5  # of allocators: what holding a byte of records takes, measured
USED = ("prompt", "response", "tools", "model", "source", "source_row")  # what a pair is made of


class Part(NamedTuple):
    """Some of the pairs and drops, in their order; the tallies of all parts are the account of the source."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    tally: Tally | None


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
    decided = yield from _one_after_the_other(read, kind, direction, rules, memory_limit)
    hash_seeds = iter(HASH_SEEDS)
    while not decided:
        yield None
        decided = yield from _all_together(read, kind, direction, rules, memory_limit, scratch, next(hash_seeds))


# -- prompts whose rows stand together


def _one_after_the_other(
    read: Read, kind: Kind, direction: Direction, rules: Rules, memory_limit: int
) -> Generator[Part, None, bool]:
    """Whether it went well: no prompt came back, and a score is all that there is to compare."""
    pending = [as_complete(pl.DataFrame(schema=_schema(kind)))]
    rows = size = held_rows = held_size = 0  # held: of a prompt that may go on
    ended = _Ended()
    for frame in ahead(read()):
        pending.append(as_complete(frame))
        rows, size = rows + frame.height, size + int(frame.estimated_size())
        if size > memory_limit:
            return False
        if rows < max(BATCH_ROWS, 2 * held_rows) and size < max(memory_limit // SHARE, 2 * held_size):
            continue
        batch = pl.concat(pending)
        narrow = narrow_rows(batch, kind, random_seed=rules.lottery)
        complete = ended.add(narrow, is_last=False)
        if not ended.stay_ended:
            return False
        if complete:
            part = _decided(batch.head(complete), narrow.head(complete), kind, direction, rules)
            if part is None:
                return False
            yield part
        pending = [compact(batch.slice(complete))]
        rows = held_rows = pending[0].height
        size = held_size = int(pending[0].estimated_size())
    batch = pl.concat(pending)
    narrow = narrow_rows(batch, kind, random_seed=rules.lottery)
    ended.add(narrow, is_last=True)
    ended.check()
    last = _decided(batch, narrow, kind, direction, rules) if ended.stay_ended else None
    if last is None:
        return False
    yield last
    return True


def _decided(batch: pl.DataFrame, narrow: pl.DataFrame, kind: Kind, direction: Direction, rules: Rules) -> Part | None:
    """Whole prompts; None where two neighbours have one hash."""
    gather = gather_from(batch)
    candidates = candidates_of(narrow, direction, rules.scorers)
    pairing = pair_candidates(candidates, narrow, direction, rules, texts_from(gather, kind))
    sides = sides_of(pairing, candidates, gather)
    if candidates.mixed or not sides.share_prompts(kind):
        return None
    pairs = pairs_frame(sides, pairing, candidates, gather)
    dropped = dropped_frame(pairing, candidates, gather, kind)
    return Part(compact(pairs), compact(dropped), tally(pairing, candidates))


def _schema(kind: Kind) -> dict[str, Any]:
    """Of records of candidates, as sources.py makes them."""
    texts = dict.fromkeys(("prompt", "response"), text_dtype(kind))
    return texts | {"score": pl.Float64, "model": pl.String, "source": pl.String, "source_row": pl.Int64}


class _Ended:
    """The prompts whose rows have ended. `stay_ended`: none came back, and there is one scorer and no rater."""

    def __init__(self) -> None:
        self.stay_ended = True
        self.prompts: list[npt.NDArray[np.uint64]] = []
        self.num_prompts = 0
        self.next_check = BATCH_ROWS
        self.scorers = pl.Series("scorer", [], pl.String)

    def add(self, narrow: pl.DataFrame, *, is_last: bool) -> int:
        """Take in a batch; how many of its rows are of prompts that have ended: all, or all but the last one's."""
        self.scorers = pl.concat([self.scorers, narrow["scorer"].unique().cast(pl.String)]).unique()
        rated = narrow["rater"].null_count() < narrow.height
        key = narrow["prompt_key"].to_numpy()
        starts = starts_of(key)
        complete = narrow.height if is_last or not len(starts) else int(starts[-1])
        heads = key[starts[starts < complete]]
        self.prompts.append(heads)
        self.num_prompts += len(heads)
        came_back = pl.Series(key[starts]).n_unique() < len(starts)
        self.stay_ended = self.stay_ended and not rated and not came_back and len(self.scorers) <= 1
        if self.num_prompts >= self.next_check:
            self.check()
            self.next_check = 2 * self.num_prompts
        return complete

    def check(self) -> None:
        """Whether a prompt of an earlier batch has come back."""
        self.prompts = [np.concatenate(self.prompts)]
        self.stay_ended = self.stay_ended and pl.Series(self.prompts[0]).n_unique() == self.num_prompts


# -- prompts whose rows are anywhere


def _all_together(
    read: Read,
    kind: Kind,
    direction: Direction,
    rules: Rules,
    memory_limit: int,
    scratch: Path | None,
    hash_seed: int,
) -> Generator[Part, None, bool]:
    """Whether it went well: no two prompts have one hash."""
    twice = only_extremes(rules)  # to read again is dearer than to hold a third of the rows, and less than to hold all
    with _Held(memory_limit, scratch) as held:
        narrows = []
        for frame in ahead(read()):
            complete = as_complete(frame)
            narrows.append(narrow_rows(complete, kind, hash_seed=hash_seed, random_seed=rules.lottery))
            if not twice:
                held.add(complete.select(USED))
        narrow = pl.concat(narrows, how="vertical_relaxed")
        narrows.clear()
        candidates = candidates_of(narrow, direction, rules.scorers)
        if candidates.mixed:
            return False
        if twice:
            held.only = extreme_rows(candidates, narrow.height)
            for frame in ahead(read()):
                held.add(as_complete(frame).select(USED))
        pairing = pair_candidates(candidates, narrow, direction, rules, texts_from(held.gather, kind))
        del narrow
        no_drops = dropped_frame(pairing.without_prompts(), candidates, held.gather, kind)
        for start in range(0, len(pairing.chosen), PAIRS):
            some = pairing.pairs(slice(start, start + PAIRS))
            sides = sides_of(some, candidates, held.gather)
            if not sides.share_prompts(kind):
                return False
            yield Part(compact(pairs_frame(sides, some, candidates, held.gather)), no_drops, None)
        none = pairing.pairs(slice(0))
        no_pairs = pairs_frame(sides_of(none, candidates, held.gather), none, candidates, held.gather)
        dropped = dropped_frame(pairing, candidates, held.gather, kind)
        yield Part(no_pairs, compact(dropped), tally(pairing, candidates))
    return True


class _Held:
    """Records that can be gathered by their row: in memory up to a limit, beyond it all in a temporary file.

    `only`: the rows that are held, ascending; all if None.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(self, memory_limit: int, scratch: Path | None) -> None:
        self.memory_limit, self.scratch = memory_limit, scratch
        self.only: Ints | None = None
        self.num_seen = 0
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
        self.reader = None
        try:
            self._close()
        finally:
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, frame: pl.DataFrame) -> None:
        """Take in the next rows."""
        first, self.num_seen = self.num_seen, self.num_seen + frame.height
        if self.only is not None:
            begin, end = np.searchsorted(self.only, (first, self.num_seen))
            frame = compact(frame[self.only[begin:end] - first])
        self.size += int(frame.estimated_size() * OVERHEAD)
        self.firsts.append(self.firsts[-1] + frame.height)
        if self.folder is None and self.size <= self.memory_limit:
            self.frames.append(
                compact(frame)
            )  # so the reader's own memory is reused: new pages cost more than the copy
            return
        for held in (*self.frames, frame):
            self._to_disk(held)
        self.frames.clear()

    def _to_disk(self, frame: pl.DataFrame) -> None:
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        with written(self.scratch or Path(tempfile.gettempdir())):
            if self.folder is None:
                if self.scratch is not None:
                    self.scratch.mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.scratch))
                self.writer = pa.ipc.new_file(str(self.folder / "records.arrow"), table.schema)
            self.writer.write_batch(_one_batch(table))

    def _close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with written(self.scratch or Path(tempfile.gettempdir())):
                writer.close()

    def gather(self, rows: Ints, columns: Sequence[str]) -> pl.DataFrame:
        """These rows, in this order."""
        if self.only is not None:
            rows = np.searchsorted(self.only, rows)
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
