r"""Which pairs a repair edits or drops: openers cut off, tokens and lengths balanced.

Comes in: pairs, and how much shallow features give each away (its score). Goes out: edited texts, or the rows to drop.
Nothing is written here and no pair is made up. Balancing drops pairs of the side that has more, highest score first, so
that what is left says nothing about the side: P(chosen has it) = P(rejected has it) = 1/2 among the pairs that differ.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from prefkit.format import Kind, text_dtype
from prefkit.grams import words_in
from prefkit.text import CALLS

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]

SIDES = ("chosen", "rejected")
# |difference of log(1 + words)|: a twentieth up to a tenth (one word more of 20), then wider as pairs become fewer
LENGTH_BINS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
# the rest of a longer word: Certainly in Certainly's, Well in Well-known, 3 in 3.5
GOES_ON = re.compile(r"\w|['’.\-‐‑/]\w")
# what goes with an opener that is given without a mark: `Certainly` takes the comma of `Certainly, here` along
MARKS = re.compile(r"^(?:[,;:.!?…]+|[ \t]*[–—]+|[ \t]+-(?=[ \t]))")
JOINERS = "\u200c\u200d"
IN_WORD = re.compile(r"\w")


class Stripped(NamedTuple):
    """Pairs without an opener, in their order.

    `edited`: (N,) whether a side was cut; `emptied`: empty_chosen | empty_rejected where a cut left a message without a
    visible character, else null; `cut`: what went, per side, null where nothing did.
    """

    pairs: pl.DataFrame
    edited: Bools
    emptied: pl.Series
    cut: dict[str, pl.Series]


class Cut(NamedTuple):
    """What cutting made of a side: `gone` is None where the side does not begin with the opener."""

    text: Any
    gone: str | None
    emptied: bool


def fold_opener(text: str) -> str:
    """What an opener is compared by: NFC, casefolded, runs of white space as one space."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return re.sub(r"\s+", " ", folded)


def opener_end(text: str, opener: str) -> int | None:
    """Where an opener ends that a text begins with, whole words only; None where it does not.

    Args:
        text: without white space at its beginning.
        opener: folded.

    Example: `certainly` ends at 9 in "Certainly, yes", and is not how "Certainly's" or "Certainlyness" begins.
    """
    reach = 4 * len(opener) + 16  # characters: NFC makes one of up to four
    if not fold_opener(text[:reach]).startswith(opener):
        return None
    ends = [len(opener), *range(1, min(reach, len(text)) + 1)]
    return next((end for end in ends if fold_opener(text[:end]) == opener and _is_end(text, end)), None)


def _is_end(text: str, end: int) -> bool:
    rest = text[end:]
    if not rest:
        return True
    if unicodedata.category(rest[0])[0] == "M" or rest[0] in JOINERS:
        return False
    return not (IN_WORD.match(text[end - 1]) and GOES_ON.match(rest))


def cut_opener(text: str, opener: str) -> str | None:
    """A text without an opener (folded), as often as it begins with it; None where it does not.

    White space behind the opener goes too, that before it stays. A first letter becomes upper case where that of the
    opener was. Example: "Certainly! here it is" without `certainly!` is "Here it is".
    """
    body = text.lstrip()
    before, left = text[: len(text) - len(body)], body
    while (end := opener_end(left, opener)) is not None:
        upper, last, left = left[0].isupper(), left[end - 1], left[end:]
        if IN_WORD.match(last):
            left = MARKS.sub("", left)
        left = left.lstrip()
        left = left[:1].title() + left[1:] if upper else left
    return None if left == body else before + left


def _cut_side(side: Any, opener: str) -> Cut:
    """A text, or every assistant message of a reply."""
    if isinstance(side, str):
        left = cut_opener(side, opener)
        return Cut(side, None, emptied=False) if left is None else Cut(left, _gone(side, left), not _visible(left))
    messages, gone, emptied = [], [], False
    for message in side:
        content = message["content"] or ""
        left = cut_opener(content, opener) if message["role"] == "assistant" else None
        if left is not None:
            gone.append(_gone(content, left))
            emptied = emptied or not (_visible(left) or CALLS in (message.get("extra") or ""))
        messages.append(message if left is None else {**message, "content": left})
    return Cut(messages, " ".join(gone) if gone else None, emptied)


def _gone(before: str, after: str) -> str:
    return before.strip()[: len(before.strip()) - len(after.strip())].strip()


def _visible(text: str) -> bool:
    return any(not c.isspace() and unicodedata.category(c) != "Cf" for c in text)


def strip_opener(pairs: pl.DataFrame, kind: Kind, opener: str) -> Stripped:
    """Cut an opener from both sides alike, wherever a reply begins with it.

    Args:
        pairs: with chosen and rejected; in a chat dataset each assistant message of a side is a reply.
        kind: of the dataset.
        opener: as a person writes it; case, composed characters, and white space before it do not count.
    """
    wanted = fold_opener(opener).strip()
    cuts = {side: [_cut_side(text, wanted) for text in pairs[side].to_list()] for side in SIDES}
    texts = [pl.Series(side, [cut.text for cut in cuts[side]], text_dtype(kind)) for side in SIDES]
    gone = {side: pl.Series(side, [cut.gone for cut in cuts[side]], pl.String) for side in SIDES}
    emptied = [
        next((f"empty_{side}" for side, cut in zip(SIDES, both, strict=True) if cut.emptied), None)
        for both in zip(*cuts.values(), strict=True)
    ]
    edited = np.asarray([any(cut.gone is not None for cut in both) for both in zip(*cuts.values(), strict=True)], bool)
    return Stripped(pairs.with_columns(texts), edited, pl.Series("emptied", emptied, pl.String), gone)


def has_gram(texts: pl.Series, words: Sequence[str]) -> Bools:
    """Whether each text has some words in a row (N,), as `words_in` splits it."""
    steps = [_bounded(word) for word in words]
    gaps = [r"\s+" if IN_WORD.match(one[-1]) and IN_WORD.match(other[0]) else r"\s*" for one, other in pairwise(words)]
    pattern = re.compile("".join(part for pair in zip(steps, [*gaps, ""], strict=True) for part in pair))
    folded = (unicodedata.normalize("NFC", text or "").casefold() for text in texts)
    return np.asarray([words[0] in text and pattern.search(text) is not None for text in folded], dtype=np.bool_)


def _bounded(word: str) -> str:
    return rf"(?<!\w){re.escape(word)}(?!\w)" if IN_WORD.match(word) else re.escape(word)


def token_signs(texts: pl.DataFrame, token: str) -> Signs:
    """+1 where only chosen has a token (a word or n-gram), -1 where only rejected has it, 0 elsewhere (N,).

    Args:
        texts: chosen and rejected as plain text.
        token: split as the audit splits texts.
    """
    words = words_in(token)
    chosen, rejected = (has_gram(texts[side], words) for side in SIDES)
    return chosen.astype(np.int8) - rejected.astype(np.int8)


def surplus(signs: Signs, scores: Floats, pair_ids: pl.Series) -> Ints:
    """The rows to drop so that as many signs are +1 as -1: of the sign that is more frequent, highest score first.

    Ties go by pair_id. What the other sign has none of goes as a whole.
    """
    excess = int(signs.sum())
    rows = np.flatnonzero(signs == np.sign(excess))
    order = np.lexsort((pair_ids.to_numpy()[rows].astype(np.str_), -np.nan_to_num(scores[rows], nan=-np.inf)))
    return np.sort(rows[order][: abs(excess)])


def length_surplus(difference: Floats, scores: Floats, pair_ids: pl.Series) -> Ints:
    """The rows to drop so that in every bin of |difference| as many chosen sides are longer as rejected ones.

    Args:
        difference: (N,) of log(1 + words), chosen - rejected; bins end at LENGTH_BINS, the last one nowhere.
        scores: (N,) which go first.
        pair_ids: (N,) in ties.
    """
    signs, bins = np.sign(difference).astype(np.int8), np.digitize(np.abs(difference), LENGTH_BINS)
    found = [np.empty(0, dtype=np.int64)]
    for one in np.unique(bins):
        rows = np.flatnonzero(bins == one)
        found.append(rows[surplus(signs[rows], scores[rows], pair_ids.gather(rows))])
    return np.sort(np.concatenate(found))
