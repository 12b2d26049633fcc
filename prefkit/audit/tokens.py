"""Which words are in chosen and not in rejected, and how sure one can be of it. One row a word, the unit is a pair.

Presence, not frequency: what is on both sides of a pair cancels, which correction data depends on. Price: one Python
set a side, some 60 microseconds a pair, and a count for every distinct word in memory.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np
import polars as pl
from scipy import stats

from prefkit.format import Kind, schema
from prefkit.text import WORD, words_of

MIN_DISCORDANT_TESTED = 10  # below it a token cannot reach significance among thousands, and only costs power
MIN_ONE_SIDED = 20  # Bonferroni at 5% over 20,000 tokens: 2 * 2^-20 * 20,000 < .05


def words(text: str) -> set[str]:
    r"""The distinct words of a text: \w+|[^\w\s] over casefolded NFC text. `"Hi, hi!"` gives hi , !"""
    return set(WORD.findall(unicodedata.normalize("NFC", text).casefold()))


def count_sides(chosen: Iterable[str], rejected: Iterable[str]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """How many pairs have each word in chosen only, in rejected only, and in both."""
    chosen_only: Counter[str] = Counter()
    rejected_only: Counter[str] = Counter()
    both: Counter[str] = Counter()
    for one, other in zip(chosen, rejected, strict=True):
        in_chosen, in_rejected = words(one), words(other)
        chosen_only.update(in_chosen - in_rejected)
        rejected_only.update(in_rejected - in_chosen)
        both.update(in_chosen & in_rejected)
    return chosen_only, rejected_only, both


def sign_test(num_chosen_only: np.ndarray, num_discordant: np.ndarray) -> np.ndarray:
    """Exact two-sided sign test (McNemar): p = min(1, 2 P(Binomial(d, 1/2) <= min(b, d - b))); NaN where d = 0.

    Example: b = 5, d = 5 gives 2 * (1/2)^5 = .0625.
    """
    fewer = np.minimum(num_chosen_only, num_discordant - num_chosen_only)
    p = np.minimum(1.0, 2 * stats.binom.cdf(fewer, num_discordant, 0.5))
    return np.where(num_discordant > 0, p, np.nan)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """The q of each test: its false discovery rate with all smaller ones (Benjamini and Hochberg 1995)."""
    return np.asarray(stats.false_discovery_control(p, method="bh")) if len(p) else p


def token_table(pairs: pl.DataFrame, kind: Kind, allow: Iterable[str] = ()) -> pl.DataFrame:
    """The columns of format.TOKENS over all pairs, surest first.

    Args:
        pairs: with chosen and rejected.
        kind: of the dataset.
        allow: words that are the point of the data, compared casefolded.
    """
    sides = pairs.select(words_of(side, kind).alias(side) for side in ("chosen", "rejected"))
    counts = count_sides(sides["chosen"], sides["rejected"])
    tokens = sorted(set().union(*counts))
    b, c, both = (np.array([count[token] for token in tokens], dtype=np.int64) for count in counts)
    d = b + c
    p = sign_test(b, d)
    tested = d >= MIN_DISCORDANT_TESTED
    q = np.full(len(tokens), np.nan)
    q[tested] = benjamini_hochberg(p[tested])
    one_sided = (np.minimum(b, c) == 0) & (d >= MIN_ONE_SIDED)
    allowed = {unicodedata.normalize("NFC", word).casefold() for word in allow}
    with np.errstate(invalid="ignore"):
        win_rate = b / d
    frame = pl.DataFrame(
        {
            "token": tokens,
            "n": np.ones(len(tokens), dtype=np.int32),
            "alphabet": ["word"] * len(tokens),
            "num_chosen_only": b,
            "num_rejected_only": c,
            "num_both": both,
            "num_discordant": d,
            "coverage": d / max(1, pairs.height),
            "win_rate": win_rate,
            "odds_ratio": (b + 0.5) / (c + 0.5),
            "p": p,
            "q": q,
            "side": [("chosen" if x > y else "rejected") if x != y else None for x, y in zip(b, c, strict=True)],
            "one_sided": one_sided,
            "exclusive": one_sided & (both == 0),
            "allowed": [token in allowed for token in tokens],
        },
        schema=schema("tokens", "text"),
    )
    return frame.with_columns(pl.col("win_rate", "p", "q").fill_nan(None)).sort(
        "p", "num_discordant", "token", descending=[False, True, False], nulls_last=True
    )
