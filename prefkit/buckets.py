"""Rows that share a band of their signatures, and how similar the n-gram sets of two rows are.

Comes in: band keys, n-gram sets. Goes out: candidate pairs, Jaccard similarities. All in numpy, a bucket or a thousand
pairs at once.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from prefkit.grams import SPARE_BITS, Array, Grams, offsets_of
from prefkit.minhash import shingles

CROWDS = (256, 128, 64, 32)  # texts in a bucket, above which not all meet all: the first that time allows
COMPARED = 2**SPARE_BITS  # pairs of sets compared in one go: their numbers fit the bits that hashes leave free
SORTED = 1 << 21  # members of sets compared in one go, about
_MANY = 1 << 23  # candidates held before those found twice are put together


def meeting_rows(bands: Iterable[Array], places: Array, num_texts: int) -> tuple[Array, bool]:
    """Pairs of places that share the key of some band, and whether a bucket was crowded.

    Args:
        bands: for each band the keys of all texts, uint64 (texts,).
        places: for each text its row's place times `num_texts`, plus which of the row's texts it is.
        num_texts: of a row.

    Returns:
        ascending, distinct, as smaller place << 32 | larger place, uint64. In a crowd (more texts than one of CROWDS)
        each meets the next one, and the first that is the same text of its row and the first that is the other, so that
        time does not grow with the square and no direction of preference hides the other.
    """
    bits = np.uint64(int(places.max(initial=0)).bit_length())
    found: list[Array] = [np.empty(0, np.uint64)]
    num_found, crowded = 0, False
    for keys in bands:
        pairs, crowd = _meeting_in_band(keys, places, bits, num_texts)
        crowded |= crowd
        found.append(pairs)
        num_found += len(pairs)
        if num_found > _MANY:
            found = [_distinct(np.concatenate(found))]
            num_found = len(found[0])
    return _distinct(np.concatenate(found)), crowded


def _meeting_in_band(keys: Array, places: Array, bits: np.uint64, num_texts: int) -> tuple[Array, bool]:
    packed = (keys >> bits << bits) | places.astype(np.uint64)  # the lowest bits of a key are not missed
    packed = pl.Series(packed).sort().to_numpy()
    bucket = packed >> bits
    starts = np.flatnonzero(np.concatenate([[True], bucket[1:] != bucket[:-1]])) if len(bucket) else np.empty(0, int)
    sizes = np.diff(np.append(starts, len(bucket)))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    texts = packed & ((np.uint64(1) << bits) - np.uint64(1))
    rows, which = texts // np.uint64(num_texts), texts % np.uint64(num_texts)
    at = np.repeat(starts - offsets_of(sizes)[:-1], sizes) + np.arange(int(sizes.sum()))
    left_in_bucket = np.repeat(starts + sizes, sizes) - at  # members from this one on
    crowd_size = _crowd_size(sizes, len(keys))
    large = np.repeat(sizes > crowd_size, sizes)
    pairs = [np.empty(0, np.uint64)]
    if large.any():
        crowd, heads = at[large], offsets_of(sizes[sizes > crowd_size])[:-1]
        for text in range(num_texts):
            firsts = np.minimum.reduceat(np.where(which[crowd] == text, crowd, len(rows)), heads)
            first = np.repeat(firsts, sizes[sizes > crowd_size])
            there = first < len(rows)
            pairs.append(_pairs(rows, first[there], crowd[there]))
    for step in range(1, crowd_size):
        reaches = (left_in_bucket > step) & ~(large & (step > 1))
        at, left_in_bucket, large = at[reaches], left_in_bucket[reaches], large[reaches]
        if not len(at):
            break
        pairs.append(_pairs(rows, at, at + step))
    return np.concatenate(pairs), bool((sizes > crowd_size).any())


def _crowd_size(sizes: Array, num_texts: int) -> int:
    """The size of buckets up to which all can meet all, as long as these are some two pairs a text."""
    for crowd in CROWDS:
        small = sizes[sizes <= crowd]
        if int((small * (small - 1) // 2).sum()) <= 2 * num_texts + 1_000_000:
            return crowd
    return CROWDS[-1]


def _pairs(rows: Array, left: Array, right: Array) -> Array:
    low, high = np.minimum(rows[left], rows[right]), np.maximum(rows[left], rows[right])
    pairs: Array = (low << np.uint64(32) | high)[low != high]
    return pairs


def _distinct(values: Array) -> Array:
    ordered = pl.Series(values).sort().to_numpy()
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def sets_of(texts: pl.Series, ngram: int) -> Grams:
    """The set of n-grams of each text, ascending; at most COMPARED texts."""
    grams = shingles(texts, ngram)
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(grams.offsets))
    shift = np.uint64(64 - SPARE_BITS)
    packed = _distinct(owner << shift | grams.hashes >> np.uint64(SPARE_BITS))
    counts = np.bincount((packed >> shift).astype(np.int64), minlength=len(texts))
    return Grams(packed << np.uint64(SPARE_BITS), offsets_of(counts))


def jaccards(hashes: Array, starts: tuple[Array, Array], counts: tuple[Array, Array]) -> Array:
    """The Jaccard similarity of pairs of sets: set k of a side is `hashes[starts[side][k]:][:counts[side][k]]`."""
    found = np.empty(len(starts[0]))
    sizes = np.cumsum(counts[0] + counts[1])
    begin = 0
    while begin < len(found):
        before = int(sizes[begin - 1]) if begin else 0
        full = int(np.searchsorted(sizes, before + SORTED)) + 1
        some = slice(begin, min(begin + COMPARED, max(full, begin + 1)))
        begin = some.stop
        sides = [
            (_gathered(hashes, start[some], count[some]), count[some])
            for start, count in zip(starts, counts, strict=True)
        ]
        numbers = np.arange(len(starts[0][some]), dtype=np.uint64)
        keys = [values | np.repeat(numbers, count) for values, count in sides]  # the low bits of a hash are free
        ordered = pl.Series(np.concatenate(keys)).sort().to_numpy()
        both = ordered[1:][ordered[1:] == ordered[:-1]] & np.uint64(COMPARED - 1)
        shared = np.bincount(both.astype(np.int64), minlength=len(numbers))
        found[some] = shared / (sides[0][1] + sides[1][1] - shared)
    return found


def _gathered(hashes: Array, starts: Array, counts: Array) -> Array:
    ends = offsets_of(counts)
    return np.asarray(hashes[np.repeat(starts - ends[:-1], counts) + np.arange(int(ends[-1]))])


def components(num_rows: int, left: Array, right: Array) -> Array:
    """The number of the connected component of each row: int64 (num_rows,)."""
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(num_rows, num_rows))
    found: Array = connected_components(graph.tocsr(), directed=False)[1].astype(np.int64)
    return found
