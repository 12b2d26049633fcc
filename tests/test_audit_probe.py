"""Probes find what was planted and nothing in noise; fits equal scikit-learn's; no prompt is fitted and scored."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import optimize, sparse, stats
from test_audit_significance import Sides, read_hh, signs_of

from prefkit.audit.cover import greedy_cover
from prefkit.audit.probe import (
    Bands,
    Measured,
    Probes,
    band,
    cross_fit,
    fit,
    measure,
    run_probes,
    shallow,
    word_matrix,
)
from prefkit.audit.significance import Floats, Ints, Signs
from prefkit.format import schema


def postings(signs: Signs) -> tuple[Ints, Ints, Signs]:
    """Of a dense (grams, pairs) matrix of signs."""
    gram, pair = np.nonzero(signs)
    return gram, pair, signs[gram, pair]


def rows_of(probes: Probes, source: str | None = None) -> dict[str, dict[str, Any]]:
    table = probes.table.filter(pl.col("source").eq_missing(pl.lit(source)))
    return {row["probe"]: row for row in table.iter_rows(named=True)}


# fits -----------------------------------------------------------------------------------------------------------------


def test_a_fit_has_the_largest_penalised_likelihood() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, (200, 3))

    def cost(w: Floats) -> float:
        return float(0.2 * np.logaddexp(0, -x @ w).sum() + w @ w / 2)

    expected = optimize.minimize(cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    assert fit(x, 0.2, 0) == pytest.approx(expected, abs=1e-4)
    assert fit(sparse.csr_array(x), 0.2, 0) == pytest.approx(expected, abs=1e-4)


def test_a_fit_is_scikit_learns_on_rows_flipped_with_their_labels() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = rng.integers(-1, 2, (300, 40)) + 0.1
    label = np.where(rng.random(300) < 0.5, 1, -1)
    other = linear_model.LogisticRegression(C=0.03, fit_intercept=False, tol=1e-9, max_iter=1000)
    assert fit(x, 0.03, 0) == pytest.approx(other.fit(x * label[:, None], label).coef_[0], abs=1e-4)


def test_scaling_a_column_of_the_fit_changes_no_margin() -> None:
    rng = np.random.default_rng(2)
    x, clusters = rng.normal(0.2, 1, (150, 4)), np.arange(150)
    grown = x * [1, 1000, 0.01, 1]
    assert cross_fit(x, clusters) == pytest.approx(cross_fit(grown, clusters), abs=1e-4)
    both = sparse.csr_array(np.column_stack([grown[:, :2], x[:, 2:]]))
    assert cross_fit(both, clusters, scaled=2) == pytest.approx(
        cross_fit(sparse.csr_array(x), clusters, scaled=2), abs=1e-4
    )


def test_swapped_sides_have_the_opposite_margin() -> None:
    """No intercept, nothing centred: which side is called chosen in a pair out of the fit decides nothing."""
    rng = np.random.default_rng(3)
    x, clusters = rng.normal(0.5, 1, (60, 3)), np.arange(60)
    margins = cross_fit(x, clusters, folds=60)
    x[7] *= -1
    assert cross_fit(x, clusters, folds=60)[7] == pytest.approx(-margins[7], rel=1e-3)


def test_a_pair_is_scored_by_fits_that_saw_no_pair_of_its_prompt() -> None:
    """Each prompt has a feature of its own that always wins: only a fit on the prompt itself could know."""
    clusters = np.repeat(np.arange(40), 5)
    x = sparse.csr_array(np.eye(40)[clusters])
    assert np.array_equal(cross_fit(x, clusters), np.zeros(200))


def test_the_numbers_of_the_prompts_do_not_have_to_be_dense() -> None:
    rng = np.random.default_rng(4)
    x, clusters = rng.normal(0.2, 1, (90, 2)), rng.integers(0, 50, 90)
    assert np.array_equal(cross_fit(x, clusters), cross_fit(x, clusters * 1000 + 7))


def test_a_fit_on_some_prompts_scores_all_pairs() -> None:
    rng = np.random.default_rng(5)
    x, clusters = rng.normal(0.6, 1, (4000, 2)), np.repeat(np.arange(2000), 2)
    some, every = cross_fit(x, clusters, max_fit=300), cross_fit(x, clusters)
    assert not np.isnan(some).any()
    assert not np.array_equal(some, every)
    assert np.corrcoef(some, every)[0, 1] > 0.98
    assert np.array_equal(cross_fit(x, clusters, max_fit=4000), every)
    assert not np.isnan(cross_fit(x, clusters, max_fit=1)).any()


def test_words_of_most_pairs_come_first_and_ties_by_number() -> None:
    signs = np.array([[1, 0, 0, 0], [1, -1, 1, 0], [0, 0, 1, -1], [0, 0, 1, 1]], dtype=np.int8)
    assert np.array_equal(word_matrix(*postings(signs), 4, 4).toarray(), signs.T)
    assert np.array_equal(word_matrix(*postings(signs), 4, 4, max_words=2).toarray(), signs[[1, 2]].T)
    assert word_matrix(*postings(signs[:0]), 0, 4).shape == (4, 0)


def test_heavy_tails_and_missing_features_are_tamed() -> None:
    dense = shallow(np.array([0.5, -0.5]), np.array([[math.e - 1, math.nan], [-1e9, 2]]))
    assert dense[0] == pytest.approx([1, 0, 1, 0, 0.5])
    assert dense[1] == pytest.approx([-math.log(1e9 + 1), math.log(3), -1, 1, -0.5])


# measures -------------------------------------------------------------------------------------------------------------


def test_accuracy_counts_a_draw_one_half() -> None:
    found = measure(np.array([2.0, -1, 0, 3, math.nan]), np.array([0, 1, 2, 3, 4]))
    assert found.accuracy == 2.5 / 4
    assert found.log_loss == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (2, -1, 0, 3)]))
    assert (found.num_pairs, found.num_prompts) == (4, 4)


def test_with_a_prompt_a_pair_the_interval_is_wilsons() -> None:
    margins = np.array([1.0] * 140 + [-1.0] * 60)
    exact = stats.binomtest(140, 200).proportion_ci(method="wilson")
    found = measure(margins, np.arange(200))
    assert found.low is not None
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.001)


def test_pairs_of_one_prompt_widen_the_interval() -> None:
    # 50 prompts of four pairs that agree: as much as 50 pairs
    margins = np.repeat([1.0] * 35 + [-1.0] * 15, 4)
    exact = stats.binomtest(35, 50).proportion_ci(method="wilson")
    found = measure(margins, np.repeat(np.arange(50), 4))
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.003)
    right = measure(np.ones(200), np.repeat(np.arange(50), 4))
    assert (right.low, right.high) == pytest.approx((50 / (50 + stats.norm.isf(0.025) ** 2), 1))


def test_the_interval_holds_the_truth_in_95_of_100_data_sets() -> None:
    rng = np.random.default_rng(6)
    clusters = np.repeat(np.arange(100), 3)
    held = 0
    for _ in range(1000):
        chance = np.repeat(rng.beta(3, 2, 100), 3)  # prompts differ; .6 on average
        found = measure(np.where(rng.random(300) < chance, 1.0, -1.0), clusters)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.6 <= found.high
    assert 930 <= held <= 970


@pytest.mark.parametrize(
    ("accuracy", "low", "expected"),
    [
        (0.59, 0.58, "fine"),
        (0.6, 0.55, "note"),
        (0.75, 0.6, "warn"),
        (0.9, 0.8, "fail"),
        (1.0, 0.5, None),
        (0.8, 0.45, None),
        (None, None, None),
    ],
)
def test_a_band_needs_its_accuracy_and_an_interval_above_one_half(
    accuracy: float | None, low: float | None, expected: str | None
) -> None:
    assert band(Measured(accuracy, 0.0, 1, 0.1, 9, 9, low), Bands()) == expected
    assert band(Measured(0.7, 0.6, 0.8, 0.6, 9, 9, 0.55), Bands(0.5, 0.6, 0.7)) == "fail"


# probes ---------------------------------------------------------------------------------------------------------------


def test_noise_is_fine_and_a_planted_shortcut_fails() -> None:
    rng = np.random.default_rng(7)
    n = 1500
    length, structure = rng.normal(size=n), rng.normal(size=(n, 5))
    signs = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (80, n), p=[0.1, 0.8, 0.1])
    clusters = rng.integers(0, 900, n)
    noise = rows_of(run_probes(length, structure, word_matrix(*postings(signs), 80, n), clusters))
    assert list(noise) == ["length", "structure", "words", "both"]
    assert all(row["band"] == "fine" and abs(row["accuracy"] - 0.5) < 0.05 for row in noise.values())
    assert all(abs(row["log_loss"] - math.log(2)) < 0.06 for row in noise.values())
    signs[3, rng.random(n) < 0.95] = 1
    planted = rows_of(run_probes(length, structure, word_matrix(*postings(signs), 80, n), clusters))
    assert [planted[name]["band"] for name in ("length", "structure", "words", "both")] == ["fine"] * 2 + ["fail"] * 2
    assert planted["words"]["accuracy"] == pytest.approx(0.97, abs=0.01)  # .95, and half of the rest
    assert [planted[name]["num_features"] for name in planted] == [1, 5, 80, 85]


def test_generators_alone_decide_pairs_by_their_strength() -> None:
    rng = np.random.default_rng(8)
    strength = {"strong": 1.0, "middle": 0.0, "weak": -1.0}
    names = list(strength)
    pairs = [tuple(names[i] for i in rng.choice(3, 2, replace=False)) for _ in range(900)]
    pairs = [p if rng.random() < 1 / (1 + math.exp(strength[p[1]] - strength[p[0]])) else p[::-1] for p in pairs]
    known: list[list[str | None]] = [[*side] for side in zip(*pairs, strict=True)]
    known[1][:100] = [None] * 100
    nothing = np.zeros((900, 0))
    made = run_probes(
        np.zeros(900), nothing, sparse.csr_array(nothing), np.arange(900), generators=(known[0], known[1])
    )
    row, margin = rows_of(made)["generator"], made.margins["generator"]
    assert (row["num_pairs"], row["num_features"], row["band"]) == (800, 3, "warn")
    better = np.mean([strength[p[0]] > strength[p[1]] for p in pairs[100:]])
    assert row["accuracy"] == pytest.approx(better, abs=0.005)
    assert np.isnan(margin[:100]).all()
    assert not np.isnan(margin[100:]).any()


def test_each_source_has_its_rows_where_there_are_several() -> None:
    rng = np.random.default_rng(9)
    length = np.concatenate([np.abs(rng.normal(size=300)), rng.normal(size=300)])
    nothing = np.zeros((600, 0))
    sources = ["long"] * 300 + ["plain"] * 300
    made = run_probes(length, nothing, sparse.csr_array(nothing), np.arange(600), sources=sources)
    assert made.table.height == 12
    assert made.table.schema == schema("probe", "text")
    rows = {source: rows_of(made, source)["length"] for source in (None, "long", "plain")}
    assert rows["long"]["accuracy"] == 1
    assert rows["plain"]["accuracy"] == pytest.approx(0.5, abs=0.06)
    whole = (rows["long"]["accuracy"] + rows["plain"]["accuracy"]) / 2
    assert rows[None]["accuracy"] == pytest.approx(whole)
    one = run_probes(length, nothing, sparse.csr_array(nothing), np.arange(600), sources=["a"] * 600)
    assert one.table.height == 4


@pytest.mark.parametrize("num", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("prompts", [1, 1000])
def test_few_pairs_give_nulls_and_no_band(num: int, prompts: int) -> None:
    """One prompt, constant features, no words, no generators known."""
    clusters = np.arange(num) % prompts
    nothing: list[str | None] = [None] * num
    words = sparse.csr_array((num, 0))
    made = run_probes(np.zeros(num), np.zeros((num, 3)), words, clusters, generators=(nothing, nothing))
    rows = rows_of(made)
    assert rows["words"]["accuracy"] is rows["words"]["band"] is rows["generator"]["accuracy"] is None
    if min(num, prompts) < 2:
        assert all(row["accuracy"] is None and row["num_pairs"] == 0 for row in rows.values())
    else:
        assert (rows["structure"]["accuracy"], rows["structure"]["band"]) == (0.5, "fine")
        assert rows["structure"]["log_loss"] == pytest.approx(math.log(2))


def test_the_same_pairs_give_the_same_bytes() -> None:
    rng = np.random.default_rng(10)
    length, structure, clusters = rng.normal(size=200), rng.normal(size=(200, 3)), rng.integers(0, 90, 200)
    words = sparse.csr_array(rng.integers(-1, 2, (200, 20)).astype(float))
    one, other = (run_probes(length, structure, words, clusters, seed=3) for _ in range(2))
    assert one.table.equals(other.table)
    assert all(one.margins[name].tobytes() == other.margins[name].tobytes() for name in one.margins)


# cover ----------------------------------------------------------------------------------------------------------------


def test_tokens_are_taken_by_what_the_ones_before_them_left() -> None:
    """Token 0 is in chosen of 60% of the pairs, token 1 of the same and 5% more, token 2 in rejected of 30% others."""
    n = 4000
    at = np.random.default_rng(11).random(n)
    signs = np.zeros((4, n), dtype=np.int8)
    signs[0, at < 0.6] = 1
    signs[1, at < 0.55] = 1
    signs[2, (at > 0.65) & (at < 0.95)] = -1
    signs[3] = np.random.default_rng(12).integers(-1, 2, n)
    cover = greedy_cover(*postings(signs), 4, np.arange(n))
    assert [(row.gram, row.side) for row in cover[:2]] == [(0, "chosen"), (2, "rejected")]
    assert [row.share for row in cover[:2]] == pytest.approx([0.6, 0.9], abs=0.03)
    assert [row.precision for row in cover[:2]] == [1, 1]
    assert 1 not in [row.gram for row in cover]
    assert len(greedy_cover(*postings(signs), 4, np.arange(n), max_tokens=1)) == 1


def test_the_precision_is_that_of_prompts_it_was_not_chosen_on() -> None:
    """Every pair of a prompt has its own token: nothing carries over, so the cover of the other half is empty."""
    clusters = np.repeat(np.arange(10), 100)
    signs = (clusters == np.arange(10)[:, None]).astype(np.int8)
    cover = greedy_cover(*postings(signs), 10, clusters)
    assert len(cover) == 5
    assert all(row.share == 0 and row.precision is None for row in cover)


def test_noise_has_no_cover_and_no_pairs_have_none() -> None:
    rng = np.random.default_rng(13)
    signs = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (2000, 400), p=[0.1, 0.8, 0.1])
    assert greedy_cover(*postings(signs), 2000, np.arange(400)) == []
    none = np.zeros(0, dtype=np.int64)
    assert greedy_cover(none, none, np.zeros(0, dtype=np.int8), 0, none) == []
    assert greedy_cover(none, none, np.zeros(0, dtype=np.int8), 5, np.arange(3)) == []


# real pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hh(test_data: Path) -> Sides:
    return read_hh(test_data)


def probes_of(sides: Sides) -> dict[str, dict[str, Any]]:
    signs = np.array(list(signs_of(sides).values()))
    words, clusters = word_matrix(*postings(signs), len(signs), signs.shape[1]), np.arange(signs.shape[1])
    lengths = [np.log1p([len(text) for text in side]) for side in sides]
    return rows_of(run_probes(lengths[0] - lengths[1], np.zeros((len(clusters), 0)), words, clusters))


def test_on_hh_length_and_words_get_as_far_as_was_measured(hh: Sides) -> None:
    rows = probes_of(hh)
    assert rows["length"]["accuracy"] == pytest.approx(0.556, abs=0.03)
    assert rows["words"]["accuracy"] == pytest.approx(0.605, abs=0.03)
    assert rows["both"]["accuracy"] == pytest.approx(0.609, abs=0.03)
    assert all(row["log_loss"] < math.log(2) for row in rows.values())


def test_on_hh_a_planted_opener_is_what_the_words_and_the_cover_find(hh: Sides) -> None:
    rng = np.random.default_rng(14)
    picked = rng.random(len(hh.chosen)) < 0.8
    chosen = [["zzyzx", *text] if here else text for text, here in zip(hh.chosen, picked, strict=True)]
    planted = Sides(chosen, hh.rejected)
    assert probes_of(planted)["words"]["band"] == "fail"
    named = signs_of(planted)
    signs = np.array(list(named.values()))
    first = greedy_cover(*postings(signs), len(signs), np.arange(signs.shape[1]))[0]
    assert (list(named)[first.gram], first.side, first.precision) == ("zzyzx", "chosen", 1)
    assert first.share == pytest.approx(0.8, abs=0.03)
