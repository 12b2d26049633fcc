"""Which side of the pairs has more of each feature, and how sure one can be of it: structure.parquet.

Comes in: one number or value a side (`features`, `values`, the model's own counts). Goes out: one row a feature, and
one a value that separates at least 10 pairs. Tested by the sign test on the paired difference, which asks for no scale;
the effect says how large the difference is. For the report also how alike the sides of a pair are (`pair_similarity`).
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rapidfuzz.distance import Levenshtein, Prefix
from scipy import stats

from prefkit.audit.allow import allows
from prefkit.audit.features import FEATURES, Sides
from prefkit.audit.significance import (
    LengthModel,
    benjamini_hochberg,
    pair_weights,
    prompts_won,
    sign_test,
    wilson,
    z_from_sums,
)
from prefkit.audit.tokens import MIN_DISCORDANT_TESTED, MIN_ONE_SIDED, among_tested
from prefkit.audit.values import CATEGORICAL
from prefkit.format import schema
from prefkit.grams import Array, words_in

LEVEL = 0.95
MAX_WORDS = 20_000  # of a side: the time of an edit distance grows with the product of both
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
ROUNDING = 1e-9  # of the largest difference: a smaller standard deviation is rounding, the difference is constant
ScoreTest = Callable[[Array], float]  # of the signs of a difference, int8 (N,): its z beside length, NaN for none


def beside_length(model: LengthModel) -> ScoreTest:
    """`significance.z_of_signs` of one model for many features: looks only at the pairs that a feature separates."""
    weights = pair_weights(model)

    def z_of(signs: Array) -> float:
        some = np.flatnonzero(signs != 0)  # of booleans it is ten times as fast as of int8
        sums = signs[some] @ weights.signed[some]
        return float(z_from_sums(sums[:1], weights.unsigned[some].sum(axis=0), sums[None, 1:], model.m)[0])

    return z_of


class Effect(NamedTuple):
    """Mean difference / its standard deviation, and an interval; None where it does not exist."""

    effect: float | None
    low: float | None
    high: float | None


def structure_table(
    chosen: pl.DataFrame,
    rejected: pl.DataFrame,
    values: Sides,
    *,
    clusters: Array,
    z_of: ScoreTest,
    allow: Sequence[str] = (),
    allow_features: Container[str] = (),
) -> pl.DataFrame:
    """The columns of format.STRUCTURE: features in the order of FEATURES, then values, surest first within a feature.

    Args:
        chosen: (N rows) columns of FEATURES; a null or NaN on a side leaves the pair out of that feature.
        rejected: likewise.
        values: columns of CATEGORICAL of both sides, likewise N rows.
        clusters: (N,) the prompt of each pair, 0..C-1.
        z_of: the score test of the signs of a difference beside length.
        allow: entries of audit.allow; they allow values, as they allow tokens.
        allow_features: names of features that are the point of the data.
    """
    rows = [_measured(name, chosen[name], rejected[name], clusters, z_of) for name in FEATURES if name in chosen]
    for column in [name for name in CATEGORICAL if name in values.chosen]:
        rows += _compared(column, values.chosen[column], values.rejected[column], clusters, z_of)
    allowed = allows(allow)
    for row in rows:
        row["allowed"] = row["feature"] in allow_features or (row["value"] is not None and allowed(row["value"]))
    return _tested(pl.DataFrame(rows, schema=_ROW), len(clusters))


SCHEMA = schema("structure", "text")
_ROW = pl.Schema(
    {name: dtype for name, dtype in SCHEMA.items() if name not in ("p", "q", "num_prompts")}
    | {"rank": pl.Int64(), "won": pl.List(pl.Int64)}
)


def _tested(rows: pl.DataFrame, num_pairs: int) -> pl.DataFrame:
    """What the counts say: coverage, win rate, tests and marks; rows in their order."""
    b, c = (rows[name].to_numpy() for name in ("num_chosen_more", "num_rejected_more"))
    d = b + c
    won, lost = (rows["won"].list.get(place).to_numpy() for place in (0, 1))
    num_prompts = won + lost
    p, (low, high) = sign_test(won, num_prompts), wilson(b, d)
    q = among_tested(p, num_prompts, benjamini_hochberg)
    one_sided = (np.minimum(b, c) == 0) & (num_prompts >= MIN_ONE_SIDED)
    found = rows.with_columns(
        pl.Series("num_discordant", d, pl.Int64),
        pl.Series("num_prompts", num_prompts, pl.Int64),
        pl.Series("coverage", d / max(1, num_pairs)),
        pl.Series("win_rate", np.divide(b, d, out=np.full(len(d), np.nan), where=d > 0)),
        pl.Series("win_rate_low", low),
        pl.Series("win_rate_high", high),
        pl.Series("p", p),
        pl.Series("q", q),
        pl.Series("side", np.sign(b - c)).replace_strict([1, -1], ["chosen", "rejected"], default=None),
        pl.Series("one_sided", one_sided),
        pl.Series("exclusive", one_sided) & pl.col("exclusive"),
    )
    floats = [name for name, dtype in SCHEMA.items() if dtype == pl.Float64]
    ordered = found.with_columns(pl.col(floats).fill_nan(None)).sort(
        "rank", "p", "num_discordant", "value", descending=[False, False, True, False], nulls_last=True
    )
    return ordered.select(*SCHEMA).cast(SCHEMA)


def _measured(name: str, chosen: pl.Series, rejected: pl.Series, clusters: Array, z_of: ScoreTest) -> dict[str, Any]:
    """The row of a numeric feature; `exclusive` says only that the side with less has none at all."""
    one, other = (side.cast(pl.Float64).fill_null(math.nan).to_numpy() for side in (chosen, rejected))
    known = ~(np.isnan(one) | np.isnan(other))
    difference = np.where(known, one - other, 0.0)
    one, other = one[known], other[known]
    signs, some = np.sign(difference).astype(np.int8), np.flatnonzero(difference)
    b, c = int((signs > 0).sum()), int((signs < 0).sum())
    effect = paired_effect(difference[some], clusters[some], np.bincount(clusters[known], minlength=1))
    return {
        "feature": name,
        "value": None,
        "family": FEATURES[name].family,
        "num_chosen_more": b,
        "num_rejected_more": c,
        "num_both": int(((one > 0) & (other > 0)).sum()),
        "mean_chosen": float(one.mean()) if len(one) else None,
        "mean_rejected": float(other.mean()) if len(other) else None,
        "won": prompts_won(some, signs[some], clusters),
        **_columns(effect),
        "z_length": z_of(signs) if b + c and name != "words" else None,
        "exclusive": not (other if b >= c else one).any(),
        "rank": [*FEATURES].index(name),
    }


def _compared(
    column: str, chosen: pl.Series, rejected: pl.Series, clusters: Array, z_of: ScoreTest
) -> Iterator[dict[str, Any]]:
    """The rows of the values of a column that separate enough pairs to be tested."""
    feature = CATEGORICAL[column]
    pairs = pl.DataFrame({"chosen": chosen, "rejected": rejected}).with_row_index("pair")
    known = np.ones(pairs.height, dtype=bool)
    if feature.unknown:
        known = (chosen.is_not_null() & rejected.is_not_null()).to_numpy()
    sizes, num_known = np.bincount(clusters[known], minlength=1), int(known.sum())
    apart, alike = _apart(pairs.filter(pl.Series(known))), _alike(pairs)
    for (value,), group in apart.group_by("value", maintain_order=True):
        where, sign = group["pair"].to_numpy(), group["sign"].to_numpy()
        signs = np.zeros(pairs.height, dtype=np.int8)
        signs[where] = sign
        b, c, both = int((sign > 0).sum()), int((sign < 0).sum()), alike.get(str(value), 0)
        yield {
            "feature": feature.feature,
            "value": value,
            "family": feature.family,
            "num_chosen_more": b,
            "num_rejected_more": c,
            "num_both": both,
            "mean_chosen": (b + both) / num_known,
            "mean_rejected": (c + both) / num_known,
            "won": prompts_won(where, sign, clusters),
            **_columns(paired_effect(sign.astype(np.float64), clusters[where], sizes)),
            "z_length": z_of(signs),
            "exclusive": both == 0,
            "rank": len(FEATURES) + [found.feature for found in CATEGORICAL.values()].index(feature.feature),
        }


def _apart(pairs: pl.DataFrame) -> pl.DataFrame:
    """pair, sign and value, one row for each value of a pair that its other side does not have; rarer ones left out."""
    differ = pairs.filter(pl.col("chosen").ne_missing(pl.col("rejected")))
    sides = [
        differ.select("pair", pl.lit(sign, pl.Int8).alias("sign"), pl.col(side).alias("value"))
        for side, sign in (("chosen", 1), ("rejected", -1))
    ]
    found = pl.concat(sides).drop_nulls("value")
    return found.filter(pl.len().over("value") >= MIN_DISCORDANT_TESTED).sort("value", "pair")


def _alike(pairs: pl.DataFrame) -> dict[str, int]:
    """How many pairs have each value on both sides."""
    same = pairs.filter(pl.col("chosen") == pl.col("rejected"))
    return dict(same.group_by("chosen").len().iter_rows())


def _columns(found: Effect) -> dict[str, float | None]:
    return {"effect": found.effect, "effect_low": found.low, "effect_high": found.high}


def paired_effect(differences: Array, clusters: Array, sizes: Array) -> Effect:
    """Cohen's d of paired differences (d_z = mean / standard deviation) with a 95% interval that knows of clusters.

    The interval is d +- t(C - 1) SE. SE^2 = C / (C - 1) sum over clusters (sum of its pairs' influences)^2 / n^2 (Liang
    and Zeger 1986), the influence of x on d being u - d (u^2 - 1) / 2 with u = (x - mean) / sd: the delta method.
    One pair a cluster and normal differences give the textbook's SE^2 = (1 + d^2 / 2) / n (Hedges and Olkin 1985).

    Args:
        differences: (D,) those that are not 0.
        clusters: (D,) of these.
        sizes: (C,) pairs of each cluster, those with a difference of 0 too; n is their sum.
    """
    n, zeros = int(sizes.sum()), int(sizes.sum()) - len(differences)
    if n < 2:
        return Effect(None, None, None)
    mean = float(differences.sum()) / n
    sd = math.sqrt((float(((differences - mean) ** 2).sum()) + zeros * mean**2) / (n - 1))
    if sd <= ROUNDING * float(np.abs(differences).max(initial=0.0)):
        return Effect(None, None, None)
    effect, num_clusters = mean / sd, int((sizes > 0).sum())
    if num_clusters < 2:
        return Effect(effect, None, None)
    squares = _cluster_squares(_influence(differences, mean, sd), _influence(0.0, mean, sd), clusters, sizes)
    error = math.sqrt(num_clusters / (num_clusters - 1) * squares) / n
    half = float(stats.t.isf((1 - LEVEL) / 2, num_clusters - 1)) * error
    return Effect(effect, effect - half, effect + half)


def _influence(difference: Any, mean: float, sd: float) -> Any:
    u = (difference - mean) / sd
    return u - mean / sd * (u**2 - 1) / 2


def _cluster_squares(influences: Array, of_zero: float, clusters: Array, sizes: Array) -> float:
    """The sum of squared cluster sums of all influences, from those that are not `of_zero`'s."""
    touched, where = np.unique(clusters, return_inverse=True)
    beyond = np.bincount(where, weights=influences - of_zero, minlength=len(touched))
    cross = 2 * of_zero * float((sizes[touched] * beyond).sum())
    return of_zero**2 * float((sizes.astype(np.float64) ** 2).sum()) + cross + float((beyond**2).sum())


def pair_similarity(texts: Callable[[], Iterator[pl.DataFrame]], num_pairs: int, at_most: int = 5000) -> dict[str, Any]:
    """How alike the sides of a pair are: quantiles (min, p10, median, p90, max) over evenly spaced pairs.

    Args:
        texts: yields frames with chosen and rejected, all pairs in order.
        num_pairs: all pairs.
        at_most: of them are compared.

    Returns:
        num_pairs compared; shared_prefix: words that both sides begin with / words of the shorter one; edit_distance:
        words to insert, delete or replace / words of the longer one, over pairs of at most MAX_WORDS a side.
    """
    step = max(1, -(-num_pairs // at_most))
    found = [_similarity(*row) for row in _every(texts(), step)]
    prefixes, distances = zip(*found, strict=True) if found else ((), ())
    measured = [distance for distance in distances if distance is not None]
    return {"num_pairs": len(found), "shared_prefix": _quantiles(prefixes), "edit_distance": _quantiles(measured)}


def _every(frames: Iterator[pl.DataFrame], step: int) -> Iterator[tuple[str, str]]:
    """Both sides of every step-th pair, from the first."""
    seen = 0
    for frame in frames:
        yield from frame.select("chosen", "rejected").gather_every(step, -seen % step).iter_rows()
        seen += frame.height


def _similarity(chosen: str, rejected: str) -> tuple[float, float | None]:
    one, other = words_in(chosen), words_in(rejected)
    shorter = min(len(one), len(other))
    distance = Levenshtein.normalized_distance(one, other) if max(len(one), len(other)) <= MAX_WORDS else None
    return Prefix.similarity(one, other) / shorter if shorter else 0.0, distance


def _quantiles(numbers: Sequence[float]) -> dict[str, float] | None:
    """By name, None of no numbers."""
    if not len(numbers):
        return None
    return dict(zip(QUANTILES, np.quantile(numbers, [*QUANTILES.values()]).tolist(), strict=True))
