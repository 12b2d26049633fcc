"""Texts as sets of word n-grams, and MinHash signatures of them that datasketch can read, whole blocks at once.

Comes in: texts. Goes out: their n-grams as 64-bit hashes, signatures (Broder 1997) under the permutations of
`datasketch.MinHash(num_perm, seed=1, scheme="affine32")`, and keys of bands (Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, chapter 3): two texts of Jaccard similarity s share one of b bands of r rows with probability
1 - (1 - s^r)^b.

datasketch's `threshold` is the middle between two errors and no recall: at .8 with 128 permutations and its own weights
it takes 9 bands of 13 rows, which share a pair of similarity .8 with probability .40. So weights are chosen for recall,
and what shares a band is verified (near.py).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.grams import Array, Grams, hash_words, joined_words

SEED, SCHEME = 1, "affine32"  # datasketch 2 has three schemes that do not mix; these two are its defaults
_BLOCK = 1 << 15  # hashes permuted in one go: 128 kB, as long as they stay in the processor's own memory


class Nearness(NamedTuple):
    """When two texts are nearly the same.

    `threshold`: smallest Jaccard similarity of their sets of word n-grams, 0..1; `weights`: of a look in vain and of a
    miss, by which the bands are chosen from `num_perm` permutations.
    """

    threshold: float = 0.8
    ngram: int = 5
    num_perm: int = 128
    weights: tuple[float, float] = (0.05, 0.95)

    def bands(self) -> tuple[int, int]:
        """How many bands, of how many rows."""
        return choose_bands(self.threshold, self.num_perm, self.weights)


@lru_cache(maxsize=8)
def permutations(num_perm: int) -> Array:
    """The factors (odd) and summands of datasketch's permutations: uint32 (2, num_perm)."""
    from datasketch import MinHash

    found: Array = MinHash(num_perm=num_perm, seed=SEED, scheme=SCHEME).permutations
    return found


@lru_cache(maxsize=32)
def choose_bands(threshold: float, num_perm: int, weights: tuple[float, float]) -> tuple[int, int]:
    """How many bands of how many rows `datasketch.MinHashLSH` takes for a threshold and weights of its two errors.

    Where it would take a single band, which it refuses itself, there are two.
    """
    from datasketch import MinHashLSH

    try:
        index = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=(weights[0], 1 - weights[0]))
    except ValueError:
        return 2, num_perm // 2
    return int(index.b), int(index.r)


def shingles(texts: pl.Series, ngram: int) -> Grams:
    """The word n-grams of each text in order, repeats and all; a text of fewer words has one: all of them."""
    return joined_words(hash_words(texts, unspaced=True), ngram)


def hashes32(grams: Grams) -> Array:
    """What goes into a signature: the upper halves of the hashes, uint32 (T,)."""
    halves: Array = (grams.hashes >> np.uint64(32)).astype(np.uint32)
    return halves


def signatures(grams: Grams, chosen: Array) -> Array:
    """MinHash signatures: uint32 (documents, permutations); every document has at least one gram.

    Equal to `datasketch.MinHash.bulk(..., hashfunc=lambda x: x)` over `hashes32`, under `permutations`.
    """
    hashes, starts = _mixed32(hashes32(grams)), grams.offsets[:-1]
    found = np.empty((chosen.shape[1], len(starts)), np.uint32)
    for begin, end in _blocks(grams.offsets):
        inside = hashes[grams.offsets[begin] : grams.offsets[end]]
        at = (starts[begin:end] - starts[begin]).astype(np.intp)
        moved = np.empty_like(inside)
        for number, (factor, summand) in enumerate(chosen.T):
            np.multiply(inside, factor, out=moved)
            np.add(moved, summand, out=moved)
            np.minimum.reduceat(moved, at, out=found[number, begin:end])
    signed: Array = found.T
    return signed


def band_keys(signed: Array, bands: int, rows: int) -> Array:
    """A hash of each band of each signature: uint64 (bands, documents)."""
    found = np.zeros((bands, len(signed)), np.uint64)
    for band in range(bands):
        for row in range(band * rows, (band + 1) * rows):
            found[band] = found[band] * np.uint64(0x9E3779B97F4A7C15) + signed[:, row]
        found[band] ^= found[band] >> np.uint64(32)
        found[band] *= np.uint64(0xD6E8FEB86659FD93)  # Rothe's mixer: high bits depend on all
        found[band] ^= found[band] >> np.uint64(32)
    return found


def _mixed32(values: Array) -> Array:
    """The 32-bit finaliser of MurmurHash3, with which the scheme begins."""
    mixed: Array = values ^ (values >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _blocks(offsets: Array) -> list[tuple[int, int]]:
    """Runs of documents of some _BLOCK hashes each."""
    wanted = np.arange(_BLOCK, int(offsets[-1]), _BLOCK)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(offsets, wanted), [len(offsets) - 1]]))
    return [*zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]
