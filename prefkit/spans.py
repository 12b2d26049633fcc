"""Places in texts: where two sides differ, word by word, and where the n-grams of findings stand.

Pure functions. A place is from where to where, in characters of a text as it is.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein, Postfix, Prefix

from prefkit.grams import fold
from prefkit.text import WORD

Spans = list[tuple[int, int]]  # places in a text, in characters, or in a list of words: from, to
MAX_WORDS = 20_000  # of a side, but for what both begin and end with: beyond it all between counts as different
CHANCE = 3  # two replies share the odd "of the"


class Flag(NamedTuple):
    """An n-gram of folded words, as a finding names it, and whether it counts `anywhere`, `first` or `last`."""

    name: str
    words: tuple[str, ...]
    place: str


class Word(NamedTuple):
    """One word of a side: folded as the audit counts it, as it stands, and where: number of the text, from, to."""

    folded: str
    raw: str
    text: int
    start: int
    end: int


class Change(NamedTuple):
    """Words of one side that stand where others stand on the other side: from, to of each; one may be empty."""

    start: int
    end: int
    other_start: int
    other_end: int

    def size(self) -> int:
        """Words of the longer side."""
        return max(self.end - self.start, self.other_end - self.other_start)


def placed_words(text: str, number: int = 0) -> Iterator[Word]:
    """The words that `grams.words_in` gives, and where they stand in the text as it is."""
    pieces = _pieces(text)
    folded = [fold(piece) for piece in pieces]
    owner = [i for i, piece in enumerate(folded) for _ in piece]  # of each folded character
    places = [0, *accumulate(map(len, pieces))]
    for match in WORD.finditer("".join(folded)):
        start, end = places[owner[match.start()]], places[owner[match.end() - 1] + 1]
        yield Word(match[0], text[start:end], number, start, end)


def _pieces(text: str) -> list[str]:
    """Characters, each with what NFC may compose it with: marks, and the later letters of a Hangul syllable."""
    if unicodedata.is_normalized("NFC", text):
        return list(text)
    pieces: list[str] = []
    for character in text:
        if pieces and (unicodedata.category(character).startswith("M") or "\u1100" <= character <= "\u11ff"):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def side_words(texts: Iterable[str]) -> list[Word]:
    """The words of all messages of a side."""
    return [word for number, text in enumerate(texts) for word in placed_words(text, number)]


def flag_places(words: Sequence[Word], flags: Iterable[Flag]) -> dict[Flag, Spans]:
    """The flags that are there, each with the runs of words that it is."""
    by_word: dict[str, list[int]] = {}
    for number, word in enumerate(words):
        by_word.setdefault(word.folded, []).append(number)
    found: dict[Flag, Spans] = {}
    for flag in flags:
        size = len(flag.words)
        only = {"first": 0, "last": len(words) - size}.get(flag.place)
        starts = [at for at in by_word.get(flag.words[0], []) if only is None or at == only]
        runs = [(at, at + size) for at in starts if tuple(w.folded for w in words[at : at + size]) == flag.words]
        if runs:
            found[flag] = runs
    return found


def in_texts(words: Sequence[Word], runs: Iterable[tuple[int, int]], num_texts: int) -> list[Spans]:
    """Runs of words as places in the texts of a side, from the first word to the last of each run."""
    found: list[Spans] = [[] for _ in range(num_texts)]
    for first, last in runs:
        for number, inside in groupby(words[first:last], key=lambda word: word.text):
            same = list(inside)
            found[number].append((same[0].start, same[-1].end))
    return found


def changes(one: Sequence[str], other: Sequence[str]) -> list[Change]:
    """What differs between two lists of words, by an edit script of the fewest words inserted, deleted or replaced.

    Words that are equal between two changes, and fewer than either, agree by chance: they make one change of the two.
    So do fewer than CHANCE words, where the sides have less than half of their words in common.
    """
    before = Prefix.similarity(one, other)
    after = Postfix.similarity(one[before:], other[before:])
    inner, outer = one[before : len(one) - after], other[before : len(other) - after]
    whole = Change(before, len(one) - after, before, len(other) - after)
    if max(len(inner), len(outer)) > MAX_WORDS:
        return [whole]
    ops = Levenshtein.opcodes(inner, outer)
    equal = before + after + sum(op.src_end - op.src_start for op in ops if op.tag == "equal")
    least = CHANCE if 2 * equal < max(len(one), len(other)) else 1
    found: list[Change] = []
    for op in ops:
        if op.tag != "equal":
            places = (op.src_start, op.src_end, op.dest_start, op.dest_end)
            _add(found, Change(*(before + place for place in places)), least)
    return found


def _add(found: list[Change], change: Change, least: int) -> None:
    if found and change.start - found[-1].end < max(least, min(found[-1].size(), change.size())):
        last = found.pop()
        change = Change(last.start, change.end, last.other_start, change.other_end)
    found.append(change)


def differences(one: Sequence[str], other: Sequence[str]) -> tuple[list[Spans], list[Spans]]:
    """Where the texts of two sides differ, for each text of each: words, and white space between equal words."""
    mine, theirs = _framed(one), _framed(other)
    found = changes([word.raw for word in mine], [word.raw for word in theirs])
    spans = in_texts(mine, [(c.start, c.end) for c in found], len(one))
    others = in_texts(theirs, [(c.other_start, c.other_end) for c in found], len(other))
    for at, place in _equal_neighbours(found, len(mine), len(theirs)):
        gap, other_gap = _gap(mine, at), _gap(theirs, place)
        number, other_number = mine[at].text, theirs[place].text
        if one[number][slice(*gap)] != other[other_number][slice(*other_gap)]:
            spans[number].append(gap)
            others[other_number].append(other_gap)
    return _sorted(spans), _sorted(others)


def _framed(texts: Sequence[str]) -> list[Word]:
    """The words of a side with two that no text can hold, where each text begins and where it ends."""
    framed: list[Word] = []
    for number, text in enumerate(texts):
        first, last = Word("", "", number, 0, 0), Word(" ", " ", number, len(text), len(text))
        framed += [first, *placed_words(text, number), last]
    return framed


def _equal_neighbours(found: Sequence[Change], size: int, other_size: int) -> Iterator[tuple[int, int]]:
    """Where a word and the one before it are equal on both sides: its number in each."""
    edges = [Change(0, 0, 0, 0), *found, Change(size, size, other_size, other_size)]
    for last, following in pairwise(edges):
        for step in range(1, following.start - last.end):
            yield last.end + step, last.other_end + step


def _gap(words: Sequence[Word], at: int) -> tuple[int, int]:
    """The place between a word and the one before it; nothing where a text begins with it."""
    start, end = words[at - 1].end, words[at].start
    return (start, end) if words[at - 1].text == words[at].text else (end, end)


def _sorted(spans: list[Spans]) -> list[Spans]:
    return [sorted(span for span in inside if span[0] < span[1]) for inside in spans]
