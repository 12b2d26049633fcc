"""Tests and intervals equal scipy's and plain Python; echoes of length go, shortcuts stay; p by prompt holds."""

import gzip
import itertools
import json
import math
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from prefkit.audit.significance import (
    FlipTest,
    Floats,
    Ints,
    LengthModel,
    Signs,
    benjamini_hochberg,
    benjamini_yekutieli,
    firth_log_odds,
    fit_length,
    length_basis,
    log_odds_z,
    net_signs,
    odds,
    pair_weights,
    sign_test,
    smallest_detectable_win_rate,
    wilson,
    z_from_sums,
    z_of_signs,
)

Rng = np.random.Generator


def cluster_sign_test(gram: Any, pair: Any, sign: Any, num_grams: int, clusters: Any) -> Any:
    """The exact sign test over prompts, as alphabets.py makes it of `net_signs`."""
    net = net_signs(gram, pair, sign, num_grams, clusters)
    won, lost = (net > 0).sum(axis=1), (net < 0).sum(axis=1)
    return sign_test(won, won + lost)


def test_the_sign_test_is_scipys_binomial_test() -> None:
    b, d = np.array([0, 3, 5, 20, 7, 139]), np.array([5, 10, 5, 20, 14, 200])
    expected = [stats.binomtest(int(k), int(n), 0.5).pvalue for k, n in zip(b, d, strict=True)]
    assert sign_test(b, d) == pytest.approx(expected, rel=1e-12)
    assert sign_test(np.array([5]), np.array([5]))[0] == 0.0625  # 2 * (1/2)^5
    assert np.isnan(sign_test(np.array([0]), np.array([0]))[0])


def test_wilsons_interval_is_scipys() -> None:
    for wins, total in ((8, 10), (0, 7), (7, 7), (50, 139), (1, 1)):
        exact = stats.binomtest(wins, total).proportion_ci(0.95, method="wilson")
        low, high = wilson(np.array([wins]), np.array([total]))
        assert (low[0], high[0]) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert np.isnan(wilson(np.array([0]), np.array([0])).low).all()
    assert wilson(3, 4, level=0.99).low < wilson(3, 4).low


def test_corrections_of_many_tests_are_the_textbook_ones() -> None:
    # Benjamini and Hochberg: p m / rank, then the smallest from there on
    p = np.array([0.01, 0.04, 0.03, 0.5])
    assert benjamini_hochberg(p) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert benjamini_yekutieli(p) == pytest.approx(np.minimum(1, benjamini_hochberg(p) * (1 + 1 / 2 + 1 / 3 + 1 / 4)))
    assert len(benjamini_hochberg(np.zeros(0))) == len(benjamini_yekutieli(np.zeros(0))) == 0


def test_odds_are_finite_where_one_side_has_none() -> None:
    ratio, log_se = odds(np.array([20, 3]), np.array([0, 1]))
    assert ratio == pytest.approx([41, 3.5 / 1.5])
    assert log_se == pytest.approx([math.sqrt(1 / 20.5 + 1 / 0.5), math.sqrt(1 / 3.5 + 1 / 1.5)])


def test_log_odds_are_those_of_monroe_and_others() -> None:
    # eq. 16: ln((y + a) / (n + a0 - y - a)) of one side minus the other's; eq. 20: 1 / (y + a) of both; by hand
    expected = (math.log((8 + 2) / (20 + 6 - 8 - 2)) - math.log((2 + 2) / (10 + 6 - 2 - 2))) / math.sqrt(1 / 10 + 1 / 4)
    assert log_odds_z([8, 12], [2, 8], 20, 10, [2, 4])[0] == pytest.approx(expected)
    # with the pooled frequencies as prior: a = 10, 20; n = 20, 10
    expected = (math.log(18 / (20 + 30 - 18)) - math.log(12 / (10 + 30 - 12))) / math.sqrt(1 / 18 + 1 / 12)
    assert log_odds_z([8, 12], [2, 8])[0] == pytest.approx(expected)
    assert np.isnan(log_odds_z([3], [1])).all()
    assert log_odds_z([], []).shape == (0,)


def test_log_odds_rank_sure_words_above_rare_ones() -> None:
    z = log_odds_z([3, 300, 5000, 20_000], [0, 100, 5000, 20_000])
    assert z[1] > z[0] > 0
    assert abs(z[2]) < z[1]


def test_the_smallest_detectable_win_rate_is_that_of_the_design() -> None:
    # .5 + z / (2 sqrt d), z of .05 over 2 * 20,000 tests
    z = stats.norm.isf(0.05 / 40_000)
    assert smallest_detectable_win_rate(139, 20_000, 0.05) == pytest.approx(0.5 + z / (2 * math.sqrt(139)))
    assert smallest_detectable_win_rate(139, 20_000, 0.05) == pytest.approx(0.7, abs=0.003)


# length ---------------------------------------------------------------------------------------------------------------


def words_like(rng: Rng, num: int) -> Ints:
    return np.asarray(rng.lognormal(4, 0.7, num).astype(np.int64) + 1)


def test_the_length_model_has_the_largest_likelihood() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = words_like(rng, 600), words_like(rng, 600)
    model = fit_length(chosen, rejected)
    assert model.basis.shape == (600, 4)
    assert model.basis[:, 0] == pytest.approx(np.log1p(chosen) - np.log1p(rejected))

    def cost(gamma: Floats) -> float:
        return float(np.logaddexp(0, -model.basis @ gamma).sum() + 0.5e-6 * gamma @ gamma)

    found = optimize.minimize(cost, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-7, "maxiter": 10_000})
    assert model.gamma == pytest.approx(found.x, abs=1e-4)
    assert model.p == pytest.approx(1 / (1 + np.exp(-model.basis @ model.gamma)))
    by_pair = [q * np.outer(row, row) for q, row in zip(model.q, model.basis, strict=True)]
    assert model.m == pytest.approx(np.sum(by_pair, axis=0))


def test_swapped_sides_have_the_opposite_basis() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = words_like(rng, 300), words_like(rng, 300)
    assert np.array_equal(length_basis(chosen, rejected), -length_basis(rejected, chosen))


@pytest.mark.parametrize("num", [0, 1, 2, 20, 1000])
@pytest.mark.parametrize("kind", ["equal", "separated", "one pair differs"])
def test_a_length_model_survives_what_lengths_there_are(num: int, kind: str) -> None:
    chosen = np.full(num, 20)
    rejected = {"equal": chosen, "separated": chosen - 5}.get(kind, np.where(np.arange(num) == 0, 3, 20))
    model = fit_length(chosen, rejected)
    assert all(np.isfinite(part).all() for part in model)
    if kind == "equal":
        assert model.p == pytest.approx(np.full(num, 0.5))
    if kind == "separated" and num >= 20:
        assert model.p.min() > 0.99
        # every longer side won: whatever is in chosen only, these pairs cannot tell it from length
        assert math.isnan(z_of_signs(np.ones(num, dtype=np.int8), model))


def test_the_score_test_is_the_formula_of_the_design() -> None:
    rng = np.random.default_rng(2)
    model = fit_length(words_like(rng, 40), words_like(rng, 40))  # 40 pairs: dL alone
    assert model.basis.shape == (40, 1)
    signs = rng.integers(-1, 2, 40).astype(np.int8)
    u = sum(s * (1 - p) for s, p in zip(signs, model.p, strict=True))
    v = sum(q for s, q in zip(signs, model.q, strict=True) if s)
    cross = sum(s * q * x for s, q, x in zip(signs, model.q, model.basis[:, 0], strict=True))
    squares = sum(q * x * x for q, x in zip(model.q, model.basis[:, 0], strict=True))
    assert z_of_signs(signs, model) == pytest.approx(u / math.sqrt(v - cross**2 / squares))


def test_sums_by_token_give_the_z_of_each() -> None:
    rng = np.random.default_rng(3)
    model = fit_length(words_like(rng, 500), words_like(rng, 500))
    signs = rng.integers(-1, 2, (7, 500)).astype(np.int8)
    weights = pair_weights(model)
    signed, unsigned = signs @ weights.signed, np.abs(signs) @ weights.unsigned
    z = z_from_sums(signed[:, 0], unsigned[:, 0], signed[:, 1:], model.m)
    assert z == pytest.approx([z_of_signs(row, model) for row in signs])


def test_where_length_says_nothing_z_is_that_of_the_sign_test() -> None:
    signs = np.array([1] * 16 + [0] * 24, dtype=np.int8)
    model = fit_length(np.full(40, 9), np.full(40, 9))
    assert z_of_signs(signs, model) == pytest.approx(4)  # (b - c) / sqrt(d)
    assert z_of_signs(-signs, model) == pytest.approx(-4)
    assert math.isnan(z_of_signs(np.array([1, 1, 1] + [0] * 37, dtype=np.int8), model))  # V = 3/4


def test_z_is_standard_normal_where_length_decides_and_words_do_not() -> None:
    """Sides drawn by length: by ratio, by words, always the longer one by 9 of 10, and none too long."""
    rng = np.random.default_rng(4)
    one, other = words_like(rng, 20_000), words_like(rng, 20_000)
    ratio = np.log1p(one) - np.log1p(other)
    sign = np.where(ratio >= 0, 0.9, 0.1)
    too_long = np.where(np.abs(ratio) > np.median(np.abs(ratio)), 1 - sign, sign)
    for p in (1 / (1 + np.exp(-2 * ratio)), 1 / (1 + np.exp(-(one - other) / 50)), sign, too_long):
        first = rng.random(20_000) < p
        model = fit_length(np.where(first, one, other), np.where(first, other, one))
        z = np.empty(400)
        for token in range(400):  # a text of n words has a word of rate r with 1 - exp(-r n)
            rate = np.exp(rng.uniform(-7, -4))
            has, lacks = (rng.random(20_000) < 1 - np.exp(-rate * n) for n in (one, other))
            signs = (has.astype(np.int8) - lacks) * np.where(first, 1, -1)
            z[token] = z_of_signs(signs.astype(np.int8), model)
        assert abs(z.mean()) < 0.25
        assert 0.85 < z.std() < 1.15
        assert (np.abs(z) > 3).sum() <= 5  # 1.1 expected


def brute_force_firth(signs: Signs, basis: Floats) -> float:
    design = np.column_stack([signs, basis])

    def cost(theta: Floats) -> float:
        p = 1 / (1 + np.exp(-design @ theta))
        information = sum(w * np.outer(row, row) for w, row in zip(p * (1 - p), design, strict=True))
        return -float(np.log(p).sum() + 0.5 * math.log(np.linalg.det(information)))

    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
    return float(optimize.minimize(cost, np.zeros(design.shape[1]), method="Nelder-Mead", options=options).x[0])


@pytest.mark.parametrize(("b", "c"), [(12, 5), (20, 0), (0, 20), (1, 1), (300, 2)])
def test_firth_without_a_basis_adds_a_half_to_each_side(b: int, c: int) -> None:
    signs = np.array([1] * b + [-1] * c + [0] * 7, dtype=np.int8)
    assert firth_log_odds(signs, np.zeros((len(signs), 0))) == pytest.approx(math.log((b + 0.5) / (c + 0.5)), abs=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_firth_beside_length_is_the_largest_penalised_likelihood(one_sided: bool) -> None:
    rng = np.random.default_rng(5)
    signs = rng.integers(0 if one_sided else -1, 2, 80).astype(np.int8)
    basis = rng.normal(0.3, 1, (80, 2))
    found = firth_log_odds(signs, basis)
    assert found == pytest.approx(brute_force_firth(signs, basis), abs=1e-4)
    # columns say nothing new: zero, or twice the same
    again = np.column_stack([basis, np.zeros(80), basis[:, 0] * 2])
    assert firth_log_odds(signs, again) == pytest.approx(found, abs=1e-6)


def test_firth_is_finite_where_all_separates_and_nan_where_it_is_length_itself() -> None:
    signs = np.ones(50, dtype=np.int8)
    assert math.isfinite(firth_log_odds(signs, np.linspace(1, 2, 50)[:, None]))
    assert math.isnan(firth_log_odds(signs, np.full((50, 1), 2.0)))
    assert math.isnan(firth_log_odds(np.zeros(50, dtype=np.int8), np.zeros((50, 0))))


# prompts --------------------------------------------------------------------------------------------------------------


def test_flips_find_the_exact_family_wise_p() -> None:
    """Three prompts, eight equally likely flips: the p of a token is the share of flips with a maximum as large."""
    nets = np.array([[2, 1, 1], [1, -1, 0]])
    clusters = np.array([0, 0, 1, 2])
    signs = np.array([[1, 1, 1, 1], [1, 0, -1, 0]], dtype=np.int8)
    size = np.sqrt((nets**2).sum(axis=1))
    largest = [max(np.abs(nets @ flip) / size) for flip in itertools.product((-1, 1), repeat=3)]
    exact = [np.mean([m >= stat - 1e-12 for m in largest]) for stat in np.abs(nets.sum(axis=1)) / size]
    gram, pair = np.nonzero(signs)
    test = FlipTest(clusters, 20_000, 0)
    test.add(gram, pair, signs[gram, pair], 2)
    assert test.p() == pytest.approx(exact, abs=0.012)


def test_batches_of_tokens_have_the_p_of_all_at_once() -> None:
    rng = np.random.default_rng(6)
    signs = rng.integers(-1, 2, (30, 90)).astype(np.int8)
    signs[3] = 0
    clusters = rng.integers(0, 40, 90)
    gram, pair = np.nonzero(signs)
    whole, parts = FlipTest(clusters, 150, 7), FlipTest(clusters, 150, 7)
    whole.add(gram, pair, signs[gram, pair], 30)
    for start, stop in ((0, 4), (4, 29), (29, 30)):
        inside = (gram >= start) & (gram < stop)
        parts.add(gram[inside] - start, pair[inside], signs[gram, pair][inside], stop - start)
    assert np.array_equal(whole.p(), parts.p())
    assert whole.p()[3] == 1
    assert whole.p().min() >= 1 / 151
    assert FlipTest(clusters, 10, 0).p().shape == (0,)


def test_p_values_by_prompt_hold_their_level_where_a_prompt_has_several_pairs() -> None:
    """Null data: a prompt's pairs all go one way, a coin says which. Tests by pair fail here, by prompt they hold."""
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(60), 4)
    by_pair, by_prompt, by_flip = [], [], []
    for _ in range(300):
        has = rng.random((12, 240)) < 0.4
        signs = (has * np.repeat(rng.choice([-1, 1], (12, 60)), 4, axis=1)).astype(np.int8)
        gram, pair = np.nonzero(signs)
        postings = (gram, pair, signs[gram, pair], 12)
        flips = FlipTest(clusters, 99, 0)
        flips.add(*postings)
        by_flip.append(flips.p().min() <= 0.05)
        by_prompt.append(cluster_sign_test(*postings, clusters))
        by_pair.append(sign_test((signs > 0).sum(axis=1), (signs != 0).sum(axis=1)))
    assert np.mean(np.array(by_pair) <= 0.05) > 0.15
    assert np.mean(np.array(by_prompt) <= 0.05) <= 0.055  # exact, so under its level
    # of 300 families, 15 at the level: at most 27 with probability .999
    assert sum(by_flip) <= stats.binom.ppf(0.999, 300, 0.05)
    assert sum(by_flip) >= stats.binom.ppf(0.001, 300, 0.05)


def test_the_sign_test_by_prompt_is_that_by_pair_where_each_prompt_has_one() -> None:
    rng = np.random.default_rng(9)
    signs = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (20, 70), p=[0.1, 0.5, 0.4])
    gram, pair = np.nonzero(signs)
    p = cluster_sign_test(gram, pair, signs[gram, pair], 20, np.arange(70))
    assert np.array_equal(p, sign_test((signs > 0).sum(axis=1), (signs != 0).sum(axis=1)))


def test_a_prompt_counts_once_in_the_sign_test_by_prompt() -> None:
    # prompt 0: +++, prompt 1: +-, prompt 2: -: one won, one drawn, one lost
    signs = np.array([1, 1, 1, 1, -1, -1], dtype=np.int8)
    p = cluster_sign_test(np.zeros(6, dtype=np.int64), np.arange(6), signs, 1, np.array([0, 0, 0, 1, 1, 2]))
    assert p == pytest.approx([1.0])


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(-1, 1)), max_size=80))
def test_no_pairs_break_the_length_test(pairs: list[tuple[int, int, int]]) -> None:
    chosen, rejected, signs = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    model = fit_length(chosen, rejected)
    z = z_of_signs(signs.astype(np.int8), model)
    swapped = z_of_signs(-signs.astype(np.int8), model)
    assert math.isnan(z) or z == pytest.approx(-swapped)
    assert not math.isinf(firth_log_odds(signs.astype(np.int8), model.basis))


# real pairs -----------------------------------------------------------------------------------------------------------

Words = list[str]


class Sides(NamedTuple):
    """The words of both sides of each pair."""

    chosen: list[Words]
    rejected: list[Words]


def read_hh(test_data: Path) -> Sides:
    sides = Sides([], [])
    with gzip.open(test_data / "hh" / "harmless_base_test_part.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            ends = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
            if ends[0][0] == ends[1][0] and ends[0][2] != ends[1][2]:
                for side, end in zip(sides, ends, strict=True):
                    side.append(re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", end[2]).casefold()))
    return sides


def signs_of(sides: Sides, at_least: int = 10) -> dict[str, Signs]:
    signs: dict[str, Signs] = defaultdict(lambda: np.zeros(len(sides.chosen), dtype=np.int8))
    for i, (one, other) in enumerate(zip(map(set, sides.chosen), map(set, sides.rejected), strict=True)):
        for word in one ^ other:
            signs[word][i] = 1 if word in one else -1
    return {word: row for word, row in sorted(signs.items()) if np.count_nonzero(row) >= at_least}


def model_of(sides: Sides) -> LengthModel:
    return fit_length(*([len(words) for words in side] for side in sides))


@pytest.fixture(scope="module")
def hh(test_data: Path) -> Sides:
    return read_hh(test_data)


def found_in(sides: Sides) -> dict[str, float]:
    """z beside length of the words that the sign test finds: q <= .05, and at least .7 won by one side."""
    words, model = signs_of(sides), model_of(sides)
    b = np.array([np.count_nonzero(row > 0) for row in words.values()])
    d = np.array([np.count_nonzero(row) for row in words.values()])
    q = benjamini_hochberg(sign_test(b, d))
    large = np.maximum(b, d - b) >= 0.7 * d
    kept = (q <= 0.05) & large
    return {word: z_of_signs(row, model) for (word, row), keep in zip(words.items(), kept, strict=True) if keep}


def test_on_hh_an_apology_is_no_echo_of_length_and_an_article_is_nothing(hh: Sides) -> None:
    words, model = signs_of(hh), model_of(hh)
    assert z_of_signs(words["sorry"], model) > 4
    assert abs(z_of_signs(words["the"], model)) < 2
    assert "sorry" in found_in(hh)


@pytest.mark.parametrize(("share", "least"), [(0.01, 3), (0.02, 5), (0.05, 8), (0.5, 25), (1, 35)])
def test_an_opener_planted_in_chosen_stays(hh: Sides, share: float, least: float) -> None:
    picked = np.random.default_rng(0).choice(len(hh.chosen), round(share * len(hh.chosen)), replace=False)
    chosen = list(hh.chosen)
    for i in picked:
        chosen[i] = ["zzyzx", "!", *chosen[i]]
    planted = Sides(chosen, hh.rejected)
    signs, model = signs_of(planted)["zzyzx"], model_of(planted)
    assert z_of_signs(signs, model) > least
    assert firth_log_odds(signs, model.basis) > 3


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1])
def test_a_planted_length_shortcut_leaves_no_words_beside_length(hh: Sides, share: float) -> None:
    """Sides by a coin, so that nothing else separates them; then rejected ones cut at random points.

    What ends a text is no echo of its length: cut texts do lack a last full stop or question mark. Nor are the few
    words left, those of naturally short replies (you, yes, welcome), which a long reply cut short lacks.
    """
    echoes = other = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sides = Sides([], [])
        for pair in zip(*hh, strict=True):
            first = int(rng.integers(2))
            kept, cut = pair[first], pair[1 - first]
            if rng.random() < share and len(cut) > 1:
                cut = cut[: rng.integers(1, len(cut))]
            sides.chosen.append(kept)
            sides.rejected.append(cut)
        found = found_in(sides)
        echoes += len(found)
        other += sum(abs(z) > 3 for word, z in found.items() if word not in {".", "?"})
    assert other <= 3 + 0.02 * echoes
    if share >= 0.9:
        assert echoes > 200
