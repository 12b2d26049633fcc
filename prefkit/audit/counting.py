"""In how many pairs an n-gram is on one side only: exact counts and sums over all n-grams, in bounded memory.

Presence, not frequency. Comes in: blocks of pairs in order, and how their sides become hashes (`of_words`, `of_ids`).
Goes out: one row an n-gram. The plain code is a set a side and a Counter, four to nine times slower. All sums are of
integers, so nothing depends on memory, blocks or threads.

The way: hash both sides of a few hundred pairs, put pair and side into the spare bits of each hash, sort once; equal
neighbours are one word twice, neighbours that differ in the last bit are both sides of a pair.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl

from prefkit.grams import SPARE_BITS, Array, Grams, Lookup, extended, hash_ids, hash_words, ngrams, selected

Texts = Callable[[], Iterator[pl.DataFrame]]  # each call starts again; frames in the order of the pairs
Hash = Callable[[pl.DataFrame], tuple[Grams, Grams]]  # the 1-grams of chosen and of rejected

ONE = 2**30  # 1 as a fixed-point number
MIN_PART_PAIRS = 10  # a longer n-gram is counted where both its parts are in this many pairs, on whatever side
BLOCK_PAIRS = 1024  # they fit into the spare bits with their side
BLOCK_BYTES = 2**20  # of a block: what is in cache is not fetched again
MERGE_ROWS = 2**20
PARTITIONS = 64  # of one n, by the highest bits of the hash
WORK = 4  # merging takes this many times the rows that it holds
_PAIR = np.uint64(2**SPARE_BITS - 1)


class Weights(NamedTuple):
    """Numbers of every pair in fixed point (ONE = 1), so that sums are exact in any order."""

    signed: Array  # int64 (N, S): added where chosen has the n-gram, subtracted where rejected has it
    unsigned: Array  # int64 (N, T): added in both cases


class Scratch(Protocol):
    """Where rows wait that memory does not hold: `spill.Spill`."""

    def append(self, partition: int, frame: pl.DataFrame) -> None:
        """Put rows to a partition."""

    def partitions(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """All rows of each partition, by number; they are gone from it then."""


class Slots(NamedTuple):
    """Every n-gram of every pair of a block once, by hash, then pair."""

    hashes: Array  # uint64
    pairs: Array  # int64: places in the block
    signs: Array  # int8: +1 in chosen only, -1 in rejected only, 0 in both


NO_SLOTS = Slots(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int8))


def of_words(block: pl.DataFrame) -> tuple[Grams, Grams]:
    """Hash the words of chosen and rejected."""
    return hash_words(block["chosen"]), hash_words(block["rejected"])


def of_ids(block: pl.DataFrame) -> tuple[Grams, Grams]:
    """Hash the tokens of chosen_ids and rejected_ids."""
    return hash_ids(block["chosen_ids"]), hash_ids(block["rejected_ids"])


def as_fixed(numbers: Array) -> Array:
    """Real numbers in fixed point, int64."""
    fixed: Array = np.rint(numbers * ONE).astype(np.int64)
    return fixed


def count_grams(
    texts: Texts,
    hashed: Hash,
    n: Sequence[int] = (1, 2),
    *,
    weights: Weights | None = None,
    only: Array | None = None,
    memory_limit: int = 10**9,
    scratch: Scratch | None = None,
    min_discordant: int = 1,
) -> pl.DataFrame:
    """Count n-grams over pairs, and sum numbers of the pairs that they separate.

    n = 1 and 2 take one pass over `texts`. n = 3 takes another one, and counts only trigrams both of whose bigrams are
    in at least MIN_PART_PAIRS pairs, on whatever side: what is rarer cannot reach significance. (The discordant pairs
    of the parts are no bound: a phrase can be one-sided while its words are on both sides.)

    Args:
        texts: the pairs.
        hashed: how the sides of a block become hashes.
        n: lengths to count, of 1, 2, 3.
        weights: numbers of the pairs to sum.
        only: hashes that count, all others do not; then the rule for trigrams does not apply, and one pass does.
        memory_limit: bytes that counting may hold, above what `texts` and the result do; the rest goes to `scratch`.
        scratch: where it goes; without one all is held, whatever the limit.
        min_discordant: smallest b + c of a row of the result.

    Returns:
        By n, then hash: hash (uint64), n (int32), num_chosen_only, num_rejected_only, num_both, first_pair (the
        smallest that has it), signed_0.., unsigned_0.. (over discordant pairs); int64.
    """
    counter = _Counter(texts, hashed, weights, memory_limit, scratch)
    if only is not None:
        lookup = Lookup.of(np.unique(only))
        tables = counter.count(sorted(set(n)), lambda words, k: _only(ngrams(words, k), lookup))
        return _result(tables, set(n), min_discordant, weights)
    counted = {k for k in n if k < 3} | ({2} if 3 in n else set())
    common: list[Array] = []
    tables = _noting(counter.count(sorted(counted), ngrams), common if 3 in n else None)
    result = _result(tables, set(n), min_discordant, weights)
    if 3 not in n:
        return result
    parts = Lookup.of(np.concatenate([np.empty(0, dtype=np.uint64), *common]))
    longer = counter.count([3], lambda words, _: _of_parts(words, parts))
    return pl.concat([result, _result(longer, {3}, min_discordant, weights)])


def blocks(texts: Texts) -> Iterator[tuple[int, pl.DataFrame]]:
    """The pairs in blocks that fit into a cache, each with the number of its first pair."""
    first = 0
    for frame in texts():
        height = max(frame.height, 1)
        rows = max(1, min(BLOCK_PAIRS, height * BLOCK_BYTES // max(int(frame.estimated_size()), 1)))
        for block in frame.iter_slices(rows):
            yield first, block
            first += block.height


def slots(chosen: Grams, rejected: Grams) -> Slots:
    """Which n-grams each pair of a block has, and on which sides. At most BLOCK_PAIRS pairs."""
    pairs = np.arange(len(chosen.offsets) - 1, dtype=np.uint64) << np.uint64(1)
    sides = [
        grams.hashes | np.repeat(pairs | np.uint64(side), np.diff(grams.offsets))
        for side, grams in enumerate((chosen, rejected))
    ]
    keys = pl.Series(np.concatenate(sides)).sort().to_numpy()
    starts = starts_of(keys >> np.uint64(1))
    ends = np.append(starts[1:], len(keys)) - 1 if len(starts) else starts
    found = keys[starts]
    first, last = ((keys[at] & np.uint64(1)).astype(np.int8) for at in (starts, ends))
    return Slots(found & ~_PAIR, ((found & _PAIR) >> np.uint64(1)).astype(np.int64), 1 - first - last)


def starts_of(values: Array) -> Array:
    """Where runs of equal values begin."""
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return np.flatnonzero(new)


def _only(grams: Grams, lookup: Lookup) -> Grams:
    return selected(grams, lookup.find(grams.hashes) >= 0)


def _of_parts(words: Grams, parts: Lookup) -> Grams:
    """The trigrams both of whose bigrams are among `parts`."""
    bigrams = ngrams(words, 2)
    return extended(bigrams, words, 2, parts.find(bigrams.hashes) >= 0)


def _noting(
    tables: Iterable[tuple[int, pl.DataFrame]], common: list[Array] | None
) -> Iterator[tuple[int, pl.DataFrame]]:
    """The tables, while the bigrams of enough pairs are noted."""
    for n, table in tables:
        if n == 2 and common is not None:
            num_pairs = pl.sum_horizontal("num_chosen_only", "num_rejected_only", "num_both")
            common.append(table.filter(num_pairs >= MIN_PART_PAIRS)["hash"].to_numpy())
        yield n, table


def _result(
    tables: Iterable[tuple[int, pl.DataFrame]], wanted: set[int], min_discordant: int, weights: Weights | None
) -> pl.DataFrame:
    discordant = pl.col("num_chosen_only") + pl.col("num_rejected_only")
    empty = _counts(NO_SLOTS, 0, weights)
    found = [
        table.filter(discordant >= min_discordant).select("hash", pl.lit(n, pl.Int32).alias("n"), pl.exclude("hash"))
        for n, table in itertools.chain([(0, empty)], tables)
        if n in wanted or n == 0
    ]
    return pl.concat(found).with_columns(pl.exclude("hash", "n").cast(pl.Int64))


def _counts(slots: Slots, first: int, weights: Weights | None) -> pl.DataFrame:
    """The counts of one block, by hash."""
    starts = starts_of(slots.hashes)
    kinds = {"num_chosen_only": slots.signs == 1, "num_rejected_only": slots.signs == -1, "num_both": slots.signs == 0}
    columns = {"hash": slots.hashes[starts]}
    columns |= {name: _sums(kind.astype(np.uint32), starts) for name, kind in kinds.items()}
    columns["first_pair"] = (slots.pairs[starts] + first).astype(np.uint32)
    if weights is not None:
        pairs = slots.pairs + first
        for place, numbers in enumerate(weights.signed.T):
            columns[f"signed_{place}"] = _sums(numbers[pairs] * slots.signs, starts)
        discordant = slots.signs != 0
        for place, numbers in enumerate(weights.unsigned.T):
            columns[f"unsigned_{place}"] = _sums(numbers[pairs] * discordant, starts)
    return pl.DataFrame(columns)


def _sums(values: Array, starts: Array) -> Array:
    return np.add.reduceat(values, starts, dtype=values.dtype) if len(starts) else values


class _Counter:
    """What stays the same over the passes of one count."""

    def __init__(
        self, texts: Texts, hashed: Hash, weights: Weights | None, memory_limit: int, scratch: Scratch | None
    ) -> None:
        self.texts, self.hashed, self.weights = texts, hashed, weights
        self.memory_limit, self.scratch = memory_limit, scratch

    def count(self, orders: Sequence[int], grams: Callable[[Grams, int], Grams]) -> Iterator[tuple[int, pl.DataFrame]]:
        """One pass: tables of counts, by n and then hash, each with the n that it is of."""
        tallies = {n: _Tally(self.weights) for n in orders}
        spilled = False
        for first, block in blocks(self.texts):
            chosen, rejected = self.hashed(block)
            for n, tally in tallies.items():
                tally.add(_counts(slots(grams(chosen, n), grams(rejected, n)), first, self.weights))
            if self.scratch is not None and self._is_full(tallies.values()):
                spilled = True
                for n, tally in tallies.items():
                    _spill(self.scratch, n, tally.taken())
        if not spilled:
            yield from ((n, tally.taken()) for n, tally in tallies.items())
            return
        assert self.scratch is not None
        for n, tally in tallies.items():
            _spill(self.scratch, n, tally.taken())
        for partition, rows in self.scratch.partitions():
            yield partition // PARTITIONS, merged(rows)

    def _is_full(self, tallies: Iterable["_Tally"]) -> bool:
        """Whether the rows are too many even when those of one n-gram are one."""
        most = self.memory_limit // WORK
        if sum(tally.num_bytes() for tally in tallies) <= most:
            return False
        for tally in tallies:
            tally.merge()
        return sum(tally.num_bytes() for tally in tallies) > most // 2


class _Tally:
    """The counts of one n, as a merged table and blocks that came since."""

    def __init__(self, weights: Weights | None) -> None:
        self.weights = weights
        self.table: pl.DataFrame | None = None
        self.new: list[pl.DataFrame] = []
        self.num_new = 0

    def add(self, counts: pl.DataFrame) -> None:
        """Take the counts of a block; merge when the table would double, so that merging stays linear."""
        self.new.append(counts)
        self.num_new += counts.height
        if self.num_new > max(MERGE_ROWS, self.table.height if self.table is not None else 0):
            self.merge()

    def merge(self) -> None:
        """Make one row of all rows of an n-gram."""
        if self.num_new:
            self.table = merged(pl.concat([*([] if self.table is None else [self.table]), *self.new]))
            self.new, self.num_new = [], 0

    def num_bytes(self) -> int:
        """What it holds."""
        one = self.table if self.table is not None else self.new[0] if self.new else None
        if one is None:
            return 0
        width = sum(_WIDTHS[dtype] for dtype in one.dtypes)
        return width * (self.num_new + (self.table.height if self.table is not None else 0))

    def taken(self) -> pl.DataFrame:
        """All of it, by hash; it is empty afterwards."""
        self.merge()
        table, self.table = self.table, None
        return table if table is not None else _counts(NO_SLOTS, 0, self.weights)


_WIDTHS: dict[pl.DataType | type[pl.DataType], int] = {pl.UInt64: 8, pl.Int64: 8, pl.UInt32: 4}


def merged(counts: pl.DataFrame) -> pl.DataFrame:
    """One row of all rows of an n-gram, by hash.

    By sorting, as `group_by` takes three times as long; and one column after the other, so that a copy of one is held.
    """
    order = counts["hash"].arg_sort()
    hashes = counts["hash"].gather(order).to_numpy()
    starts = starts_of(hashes)
    columns = {"hash": hashes[starts]}
    del hashes
    for name in counts.columns[1:]:
        values = counts[name].gather(order).to_numpy()
        columns[name] = np.minimum.reduceat(values, starts) if name == "first_pair" else _sums(values, starts)
    return pl.DataFrame(columns)


def _spill(scratch: Scratch, n: int, table: pl.DataFrame) -> None:
    bounds = np.arange(1, PARTITIONS, dtype=np.uint64) << np.uint64(64 - PARTITIONS.bit_length() + 1)
    places = [0, *table["hash"].search_sorted(pl.Series(bounds)).to_list(), table.height]
    for partition, (start, end) in enumerate(itertools.pairwise(places)):
        if end > start:
            scratch.append(n * PARTITIONS + partition, table[start:end])
