"""Which words and n-grams are in chosen and not in rejected, and how sure one can be of it: one row each.

Comes in: how many pairs have each on which side (counting.py). Goes out: format.TOKENS. Presence, not frequency: what
is on both sides of a pair cancels, which correction data depends on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from prefkit.audit.counting import ONE
from prefkit.audit.significance import (
    LengthModel,
    benjamini_hochberg,
    benjamini_yekutieli,
    log_odds_z,
    odds,
    sign_test,
    wilson,
    z_from_sums,
)
from prefkit.format import schema

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MIN_DISCORDANT_TESTED = 10  # below it a token cannot reach significance among thousands, and only costs power
MIN_ONE_SIDED = 20  # Bonferroni at 5% over 20,000 tokens: 2 * 2^-20 * 20,000 < .05


def token_table(
    counts: pl.DataFrame,
    names: Sequence[str],
    alphabet: str,
    num_pairs: int,
    model: LengthModel,
    allowed: Callable[[str], bool],
    prompts: tuple[Ints, Ints],
    ids: Sequence[Sequence[int]] | None = None,
) -> pl.DataFrame:
    """The columns of format.TOKENS for the n-grams of one alphabet, in the order of `counts`; strict's are null.

    Args:
        counts: of count_grams with the weights of `model`: signed_0 the score, unsigned_0 its variance without length,
            signed_1.. its covariance with the length basis.
        names: of each n-gram, as a person reads it.
        alphabet: word | model.
        num_pairs: pairs that were counted.
        model: what length alone says.
        allowed: whether a token is the point of the data.
        prompts: of each n-gram, the prompts with more pairs that have it in chosen only, and in rejected only.
        ids: token ids of each n-gram, of the model alphabet.
    """
    b, c, both = (counts[f"num_{name}"].to_numpy() for name in ("chosen_only", "rejected_only", "both"))
    d, num_prompts = b + c, prompts[0] + prompts[1]
    p = sign_test(prompts[0], num_prompts)
    win_rate = b / d if len(d) else d.astype(np.float64)
    low, high = wilson(b, d)
    ratio, se = odds(b, c)
    one_sided = (np.minimum(b, c) == 0) & (num_prompts >= MIN_ONE_SIDED)
    columns = {
        "token": names,
        "n": counts["n"],
        "alphabet": [alphabet] * counts.height,
        "token_ids": ids if ids is not None else [None] * counts.height,
        "num_chosen_only": b,
        "num_rejected_only": c,
        "num_both": both,
        "num_discordant": d,
        "num_prompts": num_prompts,
        "coverage": d / max(1, num_pairs),
        "win_rate": win_rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "odds_ratio": ratio,
        "log_odds_se": se,
        "p": p,
        "q": among_tested(p, num_prompts, benjamini_hochberg),
        "q_by": among_tested(p, num_prompts, benjamini_yekutieli),
        "z_length": _z_length(counts, model),
        "log_odds_z": _rank(counts["n"].to_numpy(), b + both, c + both),
        "side": side_of(b, c),
        "one_sided": one_sided,
        "exclusive": one_sided & (both == 0),
        "allowed": [allowed(name) for name in names],
    }
    return as_table(columns, "tokens", counts.height)


def as_table(columns: dict[str, Any], table: str, height: int) -> pl.DataFrame:
    """Columns in the order and types of a table of the format, what is missing as nulls, NaN as null."""
    dtypes = schema(table, "text")
    nothing = [None] * height
    series = [pl.Series(name, columns.get(name, nothing), dtype, strict=False) for name, dtype in dtypes.items()]
    return pl.DataFrame(series).with_columns(pl.col(pl.Float64).fill_nan(None))


def among_tested(p: Floats, num_prompts: Ints, correct: Callable[[Floats], Floats]) -> Floats:
    """A correction for many tests over those with at least MIN_DISCORDANT_TESTED prompts; NaN elsewhere."""
    q = np.full(len(p), np.nan)
    tested = num_prompts >= MIN_DISCORDANT_TESTED
    q[tested] = correct(p[tested])
    return q


def side_of(b: Ints, c: Ints) -> list[str | None]:
    """Where there is more of it; None where b = c."""
    named = {1: "chosen", -1: "rejected", 0: None}
    return [named[sign] for sign in np.sign(b - c).tolist()]


def _z_length(counts: pl.DataFrame, model: LengthModel) -> Floats:
    named = [f"signed_{k + 1}" for k in range(len(model.gamma))]
    r = np.stack([counts[name].to_numpy() for name in named], axis=1) / ONE
    return z_from_sums(counts["signed_0"].to_numpy() / ONE, counts["unsigned_0"].to_numpy() / ONE, r, model.m)


def _rank(n: Ints, chosen: Ints, rejected: Ints) -> Floats:
    """Monroe's z, among the n-grams of one length each."""
    z = np.full(len(n), np.nan)
    for length in np.unique(n):
        same = n == length
        z[same] = log_odds_z(chosen[same], rejected[same])
    return z
