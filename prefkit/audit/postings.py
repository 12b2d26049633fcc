"""Where the n-grams of a table are: every pair that they separate, and how they are spelt. Each is one more pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.audit.counting import Hash, Texts, blocks, of_ids, of_words, slots
from prefkit.grams import Array, Grams, Lookup, ngrams, selected, words_in

Spelt = Callable[[pl.DataFrame, str], list[list[Any]]]  # the tokens of one side (chosen | rejected) of each pair
PAIR_BITS, SIGN_BITS = 32, 1


class Postings(NamedTuple):
    """The discordant pairs of n-grams, by n-gram, then pair. 17 bytes each, three times that while they are found."""

    gram: Array  # int64: row of the table of wanted n-grams
    pair: Array  # int64: 0..N-1
    sign: Array  # int8: +1 in chosen only, -1 in rejected only


def postings(texts: Texts, hashed: Hash, wanted: pl.DataFrame) -> Postings:
    """Every discordant pair of some n-grams.

    Args:
        texts: the pairs.
        hashed: how the sides of a block become hashes.
        wanted: hash and n, each n-gram once.
    """
    lookups = _lookups(wanted)
    found = [np.empty(0, dtype=np.uint64)]
    for first, block in blocks(texts):
        words = hashed(block)
        for n, (rows, lookup) in lookups.items():
            chosen, rejected = (_wanted(grams, n, lookup) for grams in words)
            block_slots = slots(chosen, rejected)
            discordant = block_slots.signs != 0
            grams = rows[lookup.find(block_slots.hashes[discordant])].astype(np.uint64)
            pairs = (block_slots.pairs[discordant] + first).astype(np.uint64)
            ahead = (block_slots.signs[discordant] > 0).astype(np.uint64)
            found.append((grams << np.uint64(PAIR_BITS) | pairs) << np.uint64(SIGN_BITS) | ahead)
    return _unpacked(pl.Series(np.concatenate(found)).sort().to_numpy())


def names_of(texts: Texts, wanted: pl.DataFrame, hashed: Hash = of_words) -> list[str]:
    """The words of n-grams, joined by spaces: `i ' m`.

    Args:
        texts: the pairs.
        wanted: hash, n and first_pair, as `count_grams` gives them; only these pairs are looked at.
        hashed: how they were hashed.
    """
    return [" ".join(words) for words in _spelt(texts, wanted, hashed, _words_of)]


def ids_of(texts: Texts, wanted: pl.DataFrame, hashed: Hash = of_ids) -> list[list[int]]:
    """The token ids of n-grams over chosen_ids and rejected_ids; arguments as in `names_of`."""
    return _spelt(texts, wanted, hashed, _ids_of)


def _words_of(block: pl.DataFrame, side: str) -> list[list[str]]:
    return [words_in(text or "") for text in block[side]]


def _ids_of(block: pl.DataFrame, side: str) -> list[list[int]]:
    return [ids or [] for ids in block[f"{side}_ids"].to_list()]


def _lookups(wanted: pl.DataFrame) -> dict[int, tuple[Array, Lookup]]:
    """For each n its rows in `wanted`, and where a hash is among them."""
    n, hashes = wanted["n"].to_numpy(), wanted["hash"].to_numpy()
    rows = {int(k): np.flatnonzero(n == k) for k in np.unique(n)}
    return {k: (at, Lookup.of(hashes[at])) for k, at in rows.items()}


def _wanted(words: Grams, n: int, lookup: Lookup) -> Grams:
    grams = ngrams(words, n)
    return selected(grams, lookup.find(grams.hashes) >= 0)


def _unpacked(keys: Array) -> Postings:
    pairs = (keys >> np.uint64(SIGN_BITS)) & np.uint64(2**PAIR_BITS - 1)
    signs = (keys & np.uint64(1)).astype(np.int8) * 2 - 1
    return Postings((keys >> np.uint64(PAIR_BITS + SIGN_BITS)).astype(np.int64), pairs.astype(np.int64), signs)


def _spelt(texts: Texts, wanted: pl.DataFrame, hashed: Hash, spelt: Spelt) -> list[list[Any]]:
    names: list[list[Any]] = [[]] * wanted.height
    ordered = wanted.select("hash", "n", "first_pair").with_row_index("row").sort("first_pair")
    pairs = ordered["first_pair"].to_numpy()
    first = 0
    for frame in texts():
        start, end = np.searchsorted(pairs, [first, first + frame.height])
        if end > start:
            here = ordered[int(start) : int(end)]
            for row, name in _spelt_in(frame, here.with_columns(pl.col("first_pair") - first), hashed, spelt):
                names[row] = name
        first += frame.height
    assert all(names), "an n-gram is not in its first pair"
    return names


def _spelt_in(frame: pl.DataFrame, wanted: pl.DataFrame, hashed: Hash, spelt: Spelt) -> list[tuple[int, list[Any]]]:
    """Row and tokens of each wanted n-gram, whose first_pair is a row of `frame`."""
    pairs, places = np.unique(wanted["first_pair"].to_numpy(), return_inverse=True)
    block = frame[pairs]
    rows = wanted["row"].to_numpy()
    found: dict[int, list[Any]] = {}
    for side, words in zip(("chosen", "rejected"), hashed(block), strict=True):
        tokens = spelt(block, side)
        for n, (at, lookup) in _lookups(wanted).items():
            for place, pair, start in _first_places(ngrams(words, n), lookup, places[at]):
                found.setdefault(int(rows[at[place]]), tokens[pair][start : start + n])
    return list(found.items())


def _first_places(grams: Grams, lookup: Lookup, pairs: Array) -> Sequence[tuple[int, int, int]]:
    """For each n-gram of a lookup that is in its own document: its place there, the document, where it stands in it."""
    document = np.repeat(np.arange(len(grams.offsets) - 1), np.diff(grams.offsets))
    place = lookup.find(grams.hashes)
    at = np.flatnonzero(place >= 0)
    at = at[pairs[place[at]] == document[at]][::-1]
    position = np.full(len(pairs), -1, dtype=np.int64)
    position[place[at]] = at  # the last one written is the first in the text
    there = np.flatnonzero(position >= 0)
    inside = position[there] - grams.offsets[pairs[there]]
    return list(zip(there.tolist(), pairs[there].tolist(), inside.tolist(), strict=True))
