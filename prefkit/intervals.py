"""Means with intervals where several values come from one prompt: prompts are what was drawn, not responses.

Comes in: a frame with a column `prompt_id` and a value a row. Goes out: a `Measured`. N responses to one prompt are
alike, so an interval that counted each as a draw of its own would be too narrow; here a prompt counts once, by the mean
of its values. With a single prompt there is no interval. Below FEW_PROMPTS prompts the ends are rough.

Formulas: the mean of prompt means and Student's t over prompts (the usual treatment of clusters of one size, e.g.
arXiv 2411.00640, section 2.2); ratios by linearisation (Cochran, Sampling Techniques, 1977, section 6.3 and 9A); shares
by Wilson's score interval (1927) with the number of draws that the spread between prompts is worth (Korn and Graubard,
1998, Survey Methodology 24:193, with Wilson's in place of Clopper and Pearson's).
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import stats

from prefkit.audit.significance import score_interval

CONFIDENCE = 0.95
FEW_PROMPTS = 20  # fewer: t quantiles are above 2.09, and a share's interval rests on a guess of its own spread


class Measured(NamedTuple):
    """A value and its interval; None where there is no row, or one prompt only."""

    value: float | None
    low: float | None
    high: float | None
    num_prompts: int
    num_responses: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is there and 0 lies outside of it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


NOTHING = Measured(None, None, None, 0, 0)


def prompt_means(rows: pl.DataFrame, value: str) -> pl.DataFrame:
    """Of each prompt the mean of its values and their number; rows without a value are left out.

    Returns:
        prompt_id, mean, num, sorted by prompt_id.
    """
    some = rows.select("prompt_id", pl.col(value).cast(pl.Float64).alias("value")).drop_nulls("value")
    means = some.group_by("prompt_id").agg(mean=pl.col("value").mean(), num=pl.len().cast(pl.Int64))
    return means.sort("prompt_id")


def mean_by_prompt(rows: pl.DataFrame, value: str, confidence: float = CONFIDENCE) -> Measured:
    """The mean of the prompts' means, with Student's t interval over prompts.

    Args:
        rows: prompt_id and the value; nulls are left out.
        value: the name of its column.
        confidence: of the interval, 0..1.

    Example: prompts with means 1, 2 and 3 give 2 -+ 4.303 x 1 / sqrt(3), so -.48 to 4.48.
    """
    means = prompt_means(rows, value)
    if means.is_empty():
        return NOTHING
    values = means["mean"].to_numpy()
    return _around(float(values.mean()), _standard_error(values), means, confidence)


def gain_by_prompt(rows: pl.DataFrame, others: pl.DataFrame, value: str, confidence: float = CONFIDENCE) -> Measured:
    """The mean over prompts of one mean minus another, of the prompts that both have: a paired interval.

    Prompts differ far more than models do; where both answer the same ones, that falls out of the difference.

    Args:
        rows: prompt_id and the value.
        others: likewise, of what it is compared with.
        value: the name of the column in both.
        confidence: of the interval.
    """
    both = prompt_means(rows, value).join(prompt_means(others, value), on="prompt_id", how="inner").sort("prompt_id")
    if both.is_empty():
        return NOTHING
    gains = (both["mean"] - both["mean_right"]).to_numpy()
    return _around(float(gains.mean()), _standard_error(gains), both, confidence)


def ratio_by_prompt(rows: pl.DataFrame, value: str, count: str, confidence: float = CONFIDENCE) -> Measured:
    """The sum of one column over the sum of another, as in nats a token: linearised, Student's t over prompts.

    With x and n the sums of a prompt and r the ratio, the error of r is that of the mean of x - r n, over mean n.

    Args:
        rows: prompt_id, the value and the count; rows where either is null are left out.
        value: the column above the line.
        count: the column below it, whose sum is not 0.
        confidence: of the interval.
    """
    some = rows.select("prompt_id", x=pl.col(value).cast(pl.Float64), n=pl.col(count).cast(pl.Float64)).drop_nulls()
    sums = some.group_by("prompt_id").agg(pl.col("x").sum(), pl.col("n").sum(), num=pl.len().cast(pl.Int64))
    sums = sums.sort("prompt_id")
    total = float(sums["n"].sum())
    if sums.is_empty() or total == 0:
        return NOTHING
    ratio = float(sums["x"].sum()) / total
    errors = sums["x"].to_numpy() - ratio * sums["n"].to_numpy()
    error = _standard_error(errors)
    return _around(ratio, None if error is None else error * len(errors) / total, sums, confidence)


def share_by_prompt(rows: pl.DataFrame, value: str, confidence: float = CONFIDENCE) -> Measured:
    """The mean of the prompts' shares (values of 0..1), with Wilson's score interval.

    Where each prompt has one value of 0 or 1 it is Wilson's with a t quantile. Else the number of draws is what the
    spread of the prompts' shares is worth, p (1 - p) / se^2: at least 1, at most the number of values. Of shares that
    are all 0 or all 1, prompts count as draws.

    Args:
        rows: prompt_id and the value, 0..1 (a tie may be a half).
        value: the name of its column.
        confidence: of the interval.
    """
    means = prompt_means(rows, value)
    if means.is_empty():
        return NOTHING
    values, num = means["mean"].to_numpy(), means.height
    share = min(1.0, max(0.0, float(values.mean())))
    variance = float(((values - share) ** 2).mean()) / num  # of values of 0 and 1 it is p (1 - p) / num
    return _wilson(share, variance, means, confidence)


def pooled_share(rows: pl.DataFrame, value: str, confidence: float = CONFIDENCE) -> Measured:
    """The share over all values, however many a prompt has, with the interval of `share_by_prompt`: linearised.

    Args:
        rows: prompt_id and the value, 0..1.
        value: the name of its column.
        confidence: of the interval.
    """
    means = prompt_means(rows, value)
    if means.is_empty():
        return NOTHING
    total = float(means["num"].sum())
    share = min(1.0, max(0.0, float((means["mean"].to_numpy() * means["num"].to_numpy()).sum()) / total))
    errors = (means["mean"].to_numpy() - share) * means["num"].to_numpy()
    return _wilson(share, float((errors**2).sum()) / total**2, means, confidence)


def _wilson(share: float, variance: float, prompts: pl.DataFrame, confidence: float) -> Measured:
    """Wilson's interval with as many draws as a variance is worth."""
    num, most = prompts.height, float(prompts["num"].sum())
    if num == 1:
        return _around(share, None, prompts, confidence)
    spread = share * (1 - share)
    draws = float(num) if spread == 0 else most if variance == 0 else min(most, max(1.0, spread / variance))
    t = float(stats.t.ppf((1 + confidence) / 2, num - 1))
    found = score_interval(share, draws, t)
    return Measured(share, float(found.low), float(found.high), num, int(most))


def _standard_error(values: npt.NDArray[np.float64]) -> float | None:
    """Of the mean of independent values; None of a single one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _around(value: float, error: float | None, prompts: pl.DataFrame, confidence: float) -> Measured:
    counts = prompts.height, int(prompts["num"].sum())
    if error is None:
        return Measured(value, None, None, *counts)
    half = float(stats.t.ppf((1 + confidence) / 2, prompts.height - 1)) * error
    return Measured(value, value - half, value + half, *counts)
