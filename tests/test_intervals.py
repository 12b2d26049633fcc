"""Means, ratios and shares by prompt: by hand, beside scipy, and how often the intervals hold what they should."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import pytest
from scipy import optimize, stats

from prefkit.intervals import (
    NOTHING,
    Measured,
    gain_by_prompt,
    mean_by_prompt,
    pooled_share,
    prompt_means,
    ratio_by_prompt,
    share_by_prompt,
)

REPEATS = 600


def frame(values: Mapping[str, Sequence[float | None]]) -> pl.DataFrame:
    """Rows of some prompts, in an order that says nothing."""
    rows = [(prompt, value) for prompt, some in values.items() for value in some]
    return pl.DataFrame(rows[::-1], schema={"prompt_id": pl.String, "value": pl.Float64}, orient="row")


def test_a_prompt_counts_once_however_many_responses_it_has() -> None:
    measured = mean_by_prompt(frame({"a": [1, 1, 1, 1], "b": [2], "c": [2, 4]}), "value")
    # means 1, 2, 3: s = 1, t(.975, 2) = 4.302653
    half = 4.302652729911275 / math.sqrt(3)
    assert measured.value == pytest.approx(2)
    assert measured[1:3] == pytest.approx((2 - half, 2 + half))
    assert (measured.num_prompts, measured.num_responses) == (3, 7)
    assert not measured.excludes_zero


def test_the_interval_of_single_values_is_scipys() -> None:
    values = [0.3, 1.7, -0.4, 2.2, 0.9]
    measured = mean_by_prompt(frame({str(n): [value] for n, value in enumerate(values)}), "value", 0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert measured[1:3] == pytest.approx((expected.low, expected.high))


def test_a_paired_gain_is_scipys_of_the_prompts_that_both_have() -> None:
    one, other = [0.3, 1.7, -0.4, 2.2], [0.1, 1.1, -0.5, 2.3]
    rows = frame({str(n): [value, value] for n, value in enumerate(one)} | {"only here": [9.0]})
    others = frame({str(n): [value - 1, value + 1] for n, value in enumerate(other)} | {"only there": [-9.0]})
    measured = gain_by_prompt(rows, others, "value")
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert measured.value == pytest.approx(np.mean(np.subtract(one, other)))
    assert measured[1:3] == pytest.approx((expected.low, expected.high))
    assert measured.num_prompts == 4


def test_nothing_and_a_single_prompt_have_no_interval() -> None:
    empty = frame({})
    for measured in (mean_by_prompt(empty, "value"), share_by_prompt(empty, "value")):
        assert measured == NOTHING
    assert gain_by_prompt(empty, empty, "value") == NOTHING
    assert ratio_by_prompt(empty.with_columns(n=pl.lit(1)), "value", "n") == NOTHING
    one = frame({"a": [0.5, 1.0]})
    assert mean_by_prompt(one, "value") == Measured(0.75, None, None, 1, 2)
    assert share_by_prompt(one, "value") == Measured(0.75, None, None, 1, 2)
    assert gain_by_prompt(one, frame({"a": [0.25]}), "value") == Measured(0.5, None, None, 1, 2)
    assert ratio_by_prompt(one.with_columns(n=pl.lit(2)), "value", "n") == Measured(0.375, None, None, 1, 2)
    assert not mean_by_prompt(one, "value").excludes_zero


def test_values_that_are_not_there_are_left_out() -> None:
    rows = frame({"a": [1.0, None], "b": [None], "c": [3.0]})
    assert prompt_means(rows, "value").rows() == [("a", 1.0, 1), ("c", 3.0, 1)]
    assert mean_by_prompt(rows, "value").num_responses == 2


def test_a_ratio_is_that_of_the_sums_with_the_linearised_error() -> None:
    rows = pl.DataFrame({"prompt_id": ["a", "a", "b", "c"], "value": [1.0, 2.0, 2.0, 4.0], "n": [2, 2, 3, 5]})
    measured = ratio_by_prompt(rows, "value", "n")
    # sums (3, 4), (2, 3), (4, 5): r = 9 / 12; errors 0, -.25, .25, whose s is .25; mean n is 4
    half = 4.302652729911275 * 0.25 / math.sqrt(3) / 4
    assert measured.value == pytest.approx(0.75)
    assert measured[1:3] == pytest.approx((0.75 - half, 0.75 + half))
    equal = rows.with_columns(n=pl.lit(1))
    alone = equal.filter(pl.col("prompt_id") != "a")
    assert ratio_by_prompt(alone, "value", "n") == pytest.approx(mean_by_prompt(alone, "value"))


def test_a_share_of_single_values_is_the_score_interval() -> None:
    rows = frame({str(n): [1.0 if n < 8 else 0.0] for n in range(10)})
    measured = share_by_prompt(rows, "value")
    t = stats.t.ppf(0.975, 9)
    # Wilson's ends are where the distance to the share is t standard errors of the END

    def apart(p: float) -> float:
        return float((0.8 - p) ** 2 - t**2 * p * (1 - p) / 10)

    assert measured.low == pytest.approx(optimize.brentq(apart, 0, 0.8))
    assert measured.high == pytest.approx(optimize.brentq(apart, 0.8, 1))
    wilson = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert measured.low < wilson.low < wilson.high < measured.high  # t is a little above z


def test_shares_that_are_all_alike_have_an_interval_nonetheless() -> None:
    always = share_by_prompt(frame({str(n): [1.0, 1.0, 1.0] for n in range(30)}), "value")
    t = stats.t.ppf(0.975, 29)
    assert always.value == always.high == 1
    assert always.low == pytest.approx(30 / (30 + t**2))  # Wilson's lower end at 30 of 30
    halves = share_by_prompt(frame({str(n): [1.0, 0.0] for n in range(30)}), "value")
    assert halves.value == 0.5
    assert halves.low is not None
    assert halves.high is not None
    assert 0.3 < halves.low < 0.5 < halves.high < 0.7  # as of 60 draws, not of width 0
    never = share_by_prompt(frame({str(n): [0.0] for n in range(5)}), "value")
    assert never.low == 0


@pytest.mark.parametrize(("num_prompts", "n"), [(8, 6), (40, 4)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_prompts: int, n: int) -> None:
    """Prompts with a mean of their own (sd 1) and noise (sd 1) around it: 95 % hold 0, and intervals that took
    responses for independent draws would not."""
    draw = np.random.default_rng(1)
    ids = [str(prompt) for prompt in range(num_prompts) for _ in range(n)]
    held = naive = 0
    for _ in range(REPEATS):
        values = (draw.normal(size=(num_prompts, 1)) + draw.normal(size=(num_prompts, n))).ravel()
        measured = mean_by_prompt(pl.DataFrame({"prompt_id": ids, "value": values}), "value")
        assert measured.low is not None
        assert measured.high is not None
        held += measured.low <= 0 <= measured.high
        error = values.std(ddof=1) / math.sqrt(len(values)) * stats.t.ppf(0.975, len(values) - 1)
        naive += abs(values.mean()) <= error
    assert 0.93 <= held / REPEATS <= 0.97
    assert naive / REPEATS < 0.85


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(share: float) -> None:
    """Prompts whose own shares are spread around the true one (beta, of weight 2), four draws each."""
    draw = np.random.default_rng(2)
    num_prompts, n = 40, 4
    ids = [str(prompt) for prompt in range(num_prompts) for _ in range(n)]
    held = 0
    for _ in range(REPEATS):
        own = draw.beta(2 * share, 2 * (1 - share), size=(num_prompts, 1))
        values = (draw.random((num_prompts, n)) < own).astype(float).ravel()
        measured = share_by_prompt(pl.DataFrame({"prompt_id": ids, "value": values}), "value")
        assert measured.low is not None
        assert measured.high is not None
        held += measured.low <= share <= measured.high
    assert 0.93 <= held / REPEATS <= 0.98


def test_a_pooled_share_counts_every_value_and_widens_with_alike_ones() -> None:
    rows = frame({"a": [1.0, 1.0, 1.0], "b": [0.0], "c": [1.0], "d": [0.0]})
    pooled = pooled_share(rows, "value")
    assert pooled.value == pytest.approx(4 / 6)
    assert pooled.num_responses == 6
    # errors by prompt: 3 (1/3), -2/3, 1/3, -2/3; variance (1 + 4/9 + 1/9 + 4/9) / 36, spread 2/9: 4 draws
    t, draws = stats.t.ppf(0.975, 3), (2 / 9) * 36 / 2
    assert draws == pytest.approx(4)

    def apart(p: float) -> float:
        return float((4 / 6 - p) ** 2 - t**2 * p * (1 - p) / draws)

    assert pooled[1:3] == pytest.approx((optimize.brentq(apart, 0, 4 / 6), optimize.brentq(apart, 4 / 6, 1)))
    single = frame({str(n): [float(n < 8)] for n in range(10)})
    assert pooled_share(single, "value") == pytest.approx(share_by_prompt(single, "value"))
    assert pooled_share(frame({}), "value") == NOTHING
