"""Pairs that hold an item of an evaluation are dropped: most of its words stand in one of their texts.

Comes in: the texts of evaluation items, made into an `Index` once, and blocks of pairs. Goes out: which item each pair
holds, or kept and dropped. A word is `grams.words_in(text, marks=False, unspaced=True)`. The overlap of an evaluation
text with a training text is the share of its words that lie in an n-gram of it which the training text holds as well,
at whatever place; of a text of fewer than `ngram` words it is 1 if the training text has the same words, else 0.
Prompt, chosen and rejected are training texts by themselves; so is the last message of the user, as a short question
asked at the end of a conversation is the item. What this does not find: items said in other words, or translated.

Price: some 4 microseconds a kB beside the 11 of hashing its words; 60 bytes of memory a word of the evaluations, and
100 MB for what is looked at in one go.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.format import Kind
from prefkit.grams import Array, Grams, Lookup, hash_words
from prefkit.screen import Screened
from prefkit.text import words_of

SIDES = ("prompt", "chosen", "rejected")
BLOCK = 4096  # ours: pairs whose words are hashed in one go
AT_ONCE = 2**20  # ours: occurrences of n-grams looked at in one go, which bounds the memory
BASE = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: sequences are polynomials in it, modulo 2^64
COLUMNS = {"eval_item": pl.String, "eval_overlap": pl.Float64, "eval_side": pl.String}


class Index(NamedTuple):
    """The evaluation texts that have words, by item, and where their n-grams occur; the most common n-gram is 0.

    Holds arrays and one Series, so that it can be pickled.
    """

    ngram: int
    items: pl.Series  # (texts,), sorted
    offsets: Array  # int64 (texts + 1,): the words of text t are offsets[t] to offsets[t + 1]
    at: Array  # int32 (words,): the n-gram that begins at a word, -1 where its text ends before
    grams: Lookup  # from the hash of an n-gram to its number
    occurrences: Array  # int64 (n-grams + 1,): those of n-gram g are occurrences[g] to occurrences[g + 1]
    texts: Array  # int32 (occurrences,): a text that holds the n-gram, those with the largest reach first
    reach: Array  # float32 (occurrences,): share of the text that this n-gram and more common ones cover together
    wholes: Lookup  # from the hash of a short text to its place in `short`
    short: Array  # int64: texts of fewer than `ngram` words, the smallest item of equal ones


class _Held(NamedTuple):
    """What training texts hold of evaluation texts, an entry each: every (text, of) once."""

    text: Array  # int64: number of the training text
    of: Array  # int64: number of the evaluation text
    overlap: Array  # float64, > 0

    def most(self) -> "_Held":
        """The largest overlap of each training text; the smallest item of several."""
        order = np.lexsort((self.of, -self.overlap, self.text))
        first = order[np.diff(self.text[order], prepend=-1) > 0]
        return _Held(*(column[first] for column in self))


def index_of(items: pl.DataFrame, ngram: int) -> Index:
    """The index of evaluation texts.

    Args:
        items: `item`, a name that several texts may share, and `text`.
        ngram: words of an n-gram, >= 2.
    """
    ordered = items.select("item", "text").sort("item")  # texts of one item are told apart by nobody
    words = hash_words(ordered["text"], marks=False, unspaced=True)
    spoken = np.diff(words.offsets) > 0
    offsets = np.concatenate([[0], words.offsets[1:][spoken]])
    lengths = np.diff(offsets)
    text_of = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.arange(len(text_of)) + ngram <= offsets[1:][text_of]
    hashes, number, places = np.unique(_sequences(words.hashes, ngram)[begins], return_inverse=True, return_counts=True)
    order = np.argsort(-places, kind="stable")
    at = np.full(len(text_of), -1, dtype=np.int32)
    at[begins] = np.argsort(order)[number]
    gram, text = np.divmod(np.unique(at[begins] * np.int64(len(lengths)) + text_of[begins]), max(len(lengths), 1))
    reach = _reach(at, text_of, ngram, gram, text) / lengths[text]
    by_reach = np.lexsort((-reach, gram))
    few = np.flatnonzero(lengths < ngram)
    wholes, first = np.unique(_wholes(Grams(words.hashes, offsets), few), return_index=True)
    return Index(
        ngram,
        ordered["item"].filter(pl.Series(spoken)),
        offsets,
        at,
        Lookup.of(hashes[order]),
        np.concatenate([[0], np.cumsum(np.bincount(gram, minlength=len(hashes)))]),
        text[by_reach].astype(np.int32),
        np.nextafter(reach[by_reach].astype(np.float32), np.float32(2)),  # never less than it is
        Lookup.of(wholes),
        few[first],
    )


def _reach(at: Array, text_of: Array, ngram: int, gram: Array, text: Array) -> Array:
    """How many words of `text` are covered by `gram` and all n-grams of it with smaller numbers."""
    none = np.int64(len(at))
    numbers = np.where(at >= 0, at, none)
    smallest = numbers.copy()  # of the n-grams that cover a word
    for back in range(1, ngram):
        np.minimum(smallest[back:], numbers[:-back], out=smallest[back:])
    by_text = np.sort(text_of * (none + 1) + smallest)
    starts = np.searchsorted(text_of, text)
    return np.searchsorted(by_text, text * (none + 1) + gram, side="right") - starts


def contaminated(pairs: pl.DataFrame, kind: Kind, index: Index, max_overlap: float) -> pl.DataFrame:
    """What each pair holds of the evaluations: the item of the largest overlap, the smallest of several such.

    Args:
        pairs: with prompt, chosen and rejected.
        kind: of the dataset.
        index: of the evaluations.
        max_overlap: only a larger overlap counts, and one of 1 always does; in [0, 1].

    Returns:
        eval_item, eval_overlap in (0, 1] and eval_side (prompt, chosen, rejected: the first of several), a row
        for each of `pairs`; null where a pair is clean.
    """
    parts = [_judged(block, kind, index, max_overlap) for block in pairs.iter_slices(BLOCK)]
    return pl.concat([pl.DataFrame(schema=COLUMNS), *parts])


def _judged(pairs: pl.DataFrame, kind: Kind, index: Index, max_overlap: float) -> pl.DataFrame:
    sides = _training_texts(pairs, kind)
    texts = pl.concat([side.fill_null("").rename("text") for _, side in sides])
    distinct = texts.unique(maintain_order=True).to_frame().with_row_index("number")
    numbers = texts.to_frame().join(distinct, on="text", how="left", maintain_order="left")["number"]
    held = _held(distinct["text"], index, max_overlap)
    rows = np.arange(pairs.height)
    by_side = pl.DataFrame(
        {
            "row": np.tile(rows, len(sides)),
            "eval_side": np.repeat([name for name, _ in sides], pairs.height),
            "number": numbers.cast(pl.Int64),
        }
    )
    most = pl.DataFrame({"number": held.text, "eval_item": index.items.gather(held.of), "eval_overlap": held.overlap})
    found = by_side.join(most, on="number", maintain_order="left").sort(
        "row", -pl.col("eval_overlap"), "eval_item", maintain_order=True
    )
    first = found.unique("row", keep="first", maintain_order=True)
    every = pl.DataFrame({"row": rows}).join(first, on="row", how="left", maintain_order="left")
    return every.select(pl.col(name).cast(dtype) for name, dtype in COLUMNS.items())


def _training_texts(pairs: pl.DataFrame, kind: Kind) -> list[tuple[str, pl.Series]]:
    """What is judged by itself, and the side that it is of."""
    sides = [(name, pairs.select(words_of(name, kind)).to_series()) for name in SIDES]
    if kind == "text":
        return sides
    of_user = pl.element().filter(pl.element().struct.field("role") == "user")
    asked = pl.col("prompt").list.eval(of_user).list.last().struct.field("content")
    return [sides[0], ("prompt", pairs.select(asked).to_series()), *sides[1:]]


def decontaminate_pairs(pairs: pl.DataFrame, kind: Kind, index: Index, max_overlap: float) -> Screened:
    """Drop the contaminated pairs, with the columns of `contaminated`; both sides in the order of `pairs`."""
    judged = pl.concat([pairs, contaminated(pairs, kind, index, max_overlap)], how="horizontal")
    dropped = judged.filter(pl.col("eval_item").is_not_null())
    return Screened(
        judged.filter(pl.col("eval_item").is_null()).drop(COLUMNS),
        dropped.with_columns(stage=pl.lit("decontaminate"), reason=pl.lit("contaminated")),
    )


def _held(texts: pl.Series, index: Index, max_overlap: float) -> _Held:
    """The largest overlap of each text that is above `max_overlap`."""
    words = hash_words(texts, marks=False, unspaced=True)
    over = min(max_overlap, np.nextafter(1.0, 0.0))
    shared = _shared(words, index)
    probes = _probes(index, over)
    parts = [_equal(words, index)]
    for part in _slices(probes[shared.gram], shared.text):
        some = _Shared(*(column[part] for column in shared))
        parts.append(_covered(some, index, over, probes).most())
    return _Held(*(np.concatenate(columns) for columns in zip(*parts, strict=True))).most()


def _equal(words: Grams, index: Index) -> _Held:
    """The texts of fewer than `ngram` words that have those of an evaluation text."""
    few = np.flatnonzero(np.diff(words.offsets) < index.ngram)  # without a word: 0, which is no hash
    place = index.wholes.find(_wholes(words, few))
    known = place >= 0
    return _Held(few[known], index.short[place[known]], np.ones(int(known.sum())))


class _Shared(NamedTuple):
    """The n-grams of the evaluations that training texts hold, sorted and each once."""

    text: Array  # int64: number of the training text
    gram: Array  # int64


def _shared(words: Grams, index: Index) -> _Shared:
    number = index.grams.find(_sequences(words.hashes, index.ngram))
    starts = np.flatnonzero(number >= 0)
    text = np.searchsorted(words.offsets, starts, side="right") - 1
    inside = starts + index.ngram <= words.offsets[text + 1]  # others go on into the next text
    num_grams = max(len(index.occurrences) - 1, 1)
    return _Shared(*np.divmod(np.unique(text[inside] * np.int64(num_grams) + number[starts[inside]]), num_grams))


def _probes(index: Index, over: float) -> Array:
    """In how many evaluation texts an n-gram has to be looked for, the first of its occurrences; int64 (n-grams,).

    Where a training text holds none of an evaluation text's n-grams but those whose reach is `over` or less, all of
    them together cover no more than the rarest of them reaches: that is `over` or less. So what is common to thousands
    of items, such as the sentence that each begins with, leads to none of them.
    """
    before = np.concatenate([[0], np.cumsum(index.reach > over)])
    return np.diff(before[index.occurrences])


def _covered(shared: _Shared, index: Index, over: float, probes: Array) -> _Held:
    """The evaluation texts of which whole training texts hold more than `over`; memory: see `AT_ONCE`."""
    num_texts, lengths = len(index.items), np.diff(index.offsets)
    counts = probes[shared.gram]
    occurrences = _runs(index.occurrences[shared.gram], counts)
    keys = np.unique(np.repeat(shared.text, counts) * np.int64(num_texts) + index.texts[occurrences])
    text, of = np.divmod(keys, max(num_texts, 1))
    parts = [_Held(text[:0], of[:0], np.empty(0))]
    for part in _slices(lengths[of], np.arange(len(of))):
        overlap = _words_covered(text[part], of[part], shared, index) / lengths[of[part]]
        found = overlap > over
        parts.append(_Held(text[part][found], of[part][found], overlap[found]))
    return _Held(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _words_covered(text: Array, of: Array, shared: _Shared, index: Index) -> Array:
    """How many words of evaluation text `of` the n-grams cover that `text` shares with it; float64."""
    num_grams = len(index.occurrences) - 1
    lengths = np.diff(index.offsets)[of]
    number = index.at[_runs(index.offsets[of], lengths)]
    starts = np.flatnonzero(number >= 0)
    which = np.repeat(np.arange(len(of)), lengths)[starts]
    known = shared.text * np.int64(num_grams) + shared.gram
    wanted = text[which] * np.int64(num_grams) + number[starts]
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    held = known[place] == wanted
    # no n-gram begins in the last words of a text, so that of the next one none begins within `ngram` words
    starts, which = starts[held], which[held]
    new = np.minimum(np.diff(starts, append=starts[-1:] + index.ngram), index.ngram)
    return np.bincount(which, weights=new, minlength=len(of))


def _slices(counts: Array, groups: Array) -> Iterator[slice]:
    """Cut rows, sorted by group, into parts of `AT_ONCE` counts at most, or of one group."""
    ends = np.flatnonzero(np.diff(groups, append=groups[-1:] + 1)) + 1
    total = np.concatenate([[0], np.cumsum(counts)])[ends] if len(ends) else ends
    first, done = 0, 0
    while len(total) and first < ends[-1]:
        last = int(np.searchsorted(total, done + AT_ONCE, side="right")) - 1
        last = max(last, int(np.searchsorted(ends, first, side="right")))
        yield slice(first, int(ends[last]))
        first, done = int(ends[last]), int(total[last])


def _runs(starts: Array, counts: Array) -> Array:
    """The numbers from each start on, as many as its count. starts [5, 9], counts [2, 1] give 5 6 9."""
    ends = np.cumsum(counts)
    found: Array = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
    return found


def _sequences(words: Array, length: int) -> Array:
    """The hash of the `length` words from each word on; uint64, a multiple of 2^SPARE_BITS as those of words are.

    At the end, where fewer follow, it is that of no sequence of the text. Doubling: three passes for eight words.
    """
    found, done = words, 1
    for bit in bin(length)[3:]:
        found, done = _followed(found, found, done, done), 2 * done
        if bit == "1":
            found, done = _followed(found, words, done, 1), done + 1
    return found


def _followed(head: Array, tail: Array, shift: int, length: int) -> Array:
    """Sequences, each with the one of `length` words behind it, which begins `shift` words on."""
    joined = head * np.uint64(pow(int(BASE), length, 2**64))
    if shift < len(joined):
        joined[:-shift] += tail[shift:]
    return joined


def _wholes(words: Grams, few: Array) -> Array:
    """The hash of all words of some texts, by `few`; uint64."""
    starts, lengths = words.offsets[:-1][few], np.diff(words.offsets)[few]
    found = np.zeros(len(few), dtype=np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > place)
        found[longer] = found[longer] * BASE + words.hashes[starts[longer] + place]
    return found
