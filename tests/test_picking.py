"""Picking a token: against transformers' own warpers, exact probabilities, and plain Python."""

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prefkit.picking import LIKELIEST, Warping, pick, uniforms, warp

SOME = [
    Warping(0.7),
    Warping(1.0, top_p=0.9),
    Warping(1.3, top_p=0.5),
    Warping(1.0, top_k=5),
    Warping(0.5, 0.8, 20),
    Warping(2.0, 0.99, 300),
    Warping(1.0, 1e-6),
    Warping(1.0, top_k=1),
]


def logits_of(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def transformers_probs(logits: torch.Tensor, warping: Warping) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(warping.temperature)])
    if warping.top_k is not None:
        warpers.append(TopKLogitsWarper(warping.top_k))
    if warping.top_p < 1:
        warpers.append(TopPLogitsWarper(warping.top_p))
    ids: Any = torch.zeros(len(logits), 1, dtype=torch.long)
    return warpers(ids, logits).softmax(-1)


@pytest.mark.parametrize("warping", SOME, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 400, 2000])
def test_what_is_left_and_how_likely_it_is_are_those_of_transformers(warping: Warping, vocabulary: int) -> None:
    for spread in (0.01, 1.0, 4.0):  # nearly even: more than LIKELIEST tokens hold the share
        logits = logits_of(16, vocabulary, seed=vocabulary, spread=spread)
        found = warp(logits, warping)
        wanted = transformers_probs(logits, warping)
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted, rtol=1e-4, atol=1e-7)


def test_a_nucleus_larger_than_what_is_sorted_first_is_found_all_the_same() -> None:
    even = torch.zeros(2, 4 * LIKELIEST)
    even[1, 3] = 20.0  # of two rows one needs all, the other one token
    left = (warp(even, Warping(1.0, top_p=0.75)) > 0).sum(-1).tolist()
    assert left[1] == 1
    assert abs(left[0] - 3 * LIKELIEST) <= 1


def test_log_probs_are_the_models_own_whatever_is_picked_from() -> None:
    logits = logits_of(40, 50, seed=3)
    numbers = torch.from_numpy(np.random.default_rng(0).random(40))
    for warping in [*SOME, Warping(0.0), Warping()]:
        picked = pick(logits, numbers, warping)
        for row, (token, logp) in enumerate(zip(picked.ids.tolist(), picked.logps.tolist(), strict=True)):
            values = [math.exp(x) for x in logits[row].double().tolist()]
            assert logp == pytest.approx(math.log(values[token] / sum(values)), abs=1e-5)


def test_the_picked_token_is_the_first_whose_cumulative_probability_exceeds_the_number() -> None:
    probs = [0.1, 0.0, 0.25, 0.4, 0.25]
    logits = torch.tensor([probs]).log()
    cases = {0.0: 0, 0.05: 0, 0.2: 2, 0.3: 2, 0.36: 3, 0.7: 3, 0.76: 4, 1 - 2**-53: 4}
    for number, token in cases.items():
        assert pick(logits, torch.tensor([number], dtype=torch.float64), Warping()).ids.tolist() == [token], number


def test_a_number_close_to_one_never_picks_a_token_of_probability_zero() -> None:
    logits = logits_of(200, 300, seed=9)
    logits[:, 100:] = -torch.inf
    last = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    for warping in (Warping(), Warping(0.9, 0.5), Warping(1.0, top_k=3)):
        ids = pick(logits, last, warping).ids
        assert bool((warp(logits, warping).gather(-1, ids[:, None]) > 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("warping", [Warping(), Warping(0.0), Warping(0.8, 0.9), Warping(1.0, top_k=2)], ids=str)
def test_logits_that_are_not_finite_give_a_log_prob_that_is_not(warping: Warping, bad: float) -> None:
    logits = logits_of(3, 10, seed=1)
    logits[1, 4] = bad
    picked = pick(logits, torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64), warping, num_ids=8)
    assert picked.logps.isfinite().tolist() == [True, False, True]
    assert bool((picked.ids < 8).all())


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 1.0, 1.0]])
    assert pick(logits, torch.tensor([0.9, 0.9]).double(), Warping(0.0)).ids.tolist() == [1, 0]


def test_ids_that_the_tokenizer_does_not_know_are_never_picked() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 8] = 50.0
    for warping in (Warping(), Warping(0.0), Warping(0.5, 0.9, 4)):
        for number in (0.0, 0.5, 0.999):
            picked = pick(logits, torch.tensor([number], dtype=torch.float64), warping, num_ids=8)
            assert picked.ids.item() < 8
            assert picked.logps.item() == pytest.approx(-50.0, abs=1e-3)  # as the model has it


@pytest.mark.parametrize("warping", [Warping(), Warping(0.7), Warping(1.0, 0.8), Warping(1.5, 0.9, 6)], ids=str)
def test_tokens_are_as_frequent_as_they_are_likely(warping: Warping) -> None:
    logits = logits_of(1, 12, seed=5, spread=1.5)
    exact = transformers_probs(logits, warping)[0].double().numpy()
    draws = 20_000
    numbers = torch.from_numpy(np.concatenate([uniforms(7, f"prompt {i}", 0, 100) for i in range(draws // 100)]))
    ids = pick(logits.expand(draws, -1), numbers, warping).ids.numpy()
    counts = np.bincount(ids, minlength=12)
    assert counts[exact == 0].sum() == 0
    kept = exact > 0
    assert chisquare(counts[kept], draws * exact[kept] / exact[kept].sum()).pvalue > 0.01


def test_random_numbers_belong_to_seed_prompt_number_and_position_alone() -> None:
    one = uniforms(0, "a", 0, 50)
    assert one.tolist() == uniforms(0, "a", 0, 50).tolist()
    assert one[:20].tolist() == uniforms(0, "a", 0, 20).tolist()  # however many are asked for
    for other in (uniforms(1, "a", 0, 50), uniforms(0, "b", 0, 50), uniforms(0, "a", 1, 50)):
        assert not set(one) & set(other)


def test_random_numbers_are_even_and_do_not_follow_one_another() -> None:
    drawn = np.stack([uniforms(3, f"prompt {i}", k, 25) for i in range(40) for k in range(5)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert kstest(drawn.ravel(), "uniform").pvalue > 0.01
    rng = random.Random(0)
    columns = [drawn[:, rng.randrange(25)] for _ in range(6)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.25 or np.array_equal(a, b) for a, b in pairwise(columns))


def test_the_first_numbers_are_these_on_any_machine() -> None:
    # by the definition: key = the first 16 bytes of the hash, little end first; 53 bits of each raw number
    import hashlib

    digest = hashlib.sha256(b'["sample",0,"p",2]').digest()
    low, high = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    raw = np.random.Philox(key=low + (high << 64)).random_raw(4)
    assert uniforms(0, "p", 2, 4).tolist() == [(int(bits) >> 11) / 2**53 for bits in raw]
