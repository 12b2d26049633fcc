"""Order, updates and rates: functions of the settings, the lengths and the step."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefkit.config import TrainConfig
from prefkit.schedule import (
    Limits,
    beta_at,
    dealt,
    epochs_made,
    learning_rate_at,
    limits_of,
    micro_batches,
    num_updates,
    pair_order,
    step_rows,
)

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
LIMITS = st.builds(Limits, st.none() | st.integers(1, 9), st.none() | st.integers(1, 120))


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("constant", 0, [1, 1, 1, 1]),
        ("cosine", 0, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_the_learning_rate_by_hand(kind: str, warmup: int, expected: list[float]) -> None:
    values = {"learning_rate": 2e-3, "lr_scheduler_type": kind, "warmup_steps": warmup}
    settings = TrainConfig.model_validate(values)
    rates = [learning_rate_at(step, 4, settings) for step in range(4)]
    assert rates == pytest.approx([2e-3 * share for share in expected])


@pytest.mark.parametrize(
    ("kind", "total", "expected"),
    [
        # the last value is of the evaluation after all updates
        ("linear", 3, [0.1, 0.3, 0.5, 0.5]),
        ("linear", 5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]),
        # (1 - cos(pi / 4)) / 2 = (2 - sqrt 2) / 4 of the way, then half of it
        ("cosine", 5, [0.1, 0.3 - 0.1 * math.sqrt(2), 0.3, 0.3 + 0.1 * math.sqrt(2), 0.5, 0.5]),
        ("cosine", 3, [0.1, 0.3, 0.5, 0.5]),
        ("linear", 2, [0.1, 0.5, 0.5]),
        ("linear", 1, [0.1, 0.5]),
        ("cosine", 1, [0.1, 0.5]),
    ],
)
def test_beta_by_hand(kind: str, total: int, expected: list[float]) -> None:
    settings = TrainConfig.model_validate({"beta": 0.1, "beta_end": 0.5, "beta_schedule": kind})
    assert [beta_at(step, total, settings) for step in range(total + 1)] == pytest.approx(expected, abs=1e-12)
    turned = TrainConfig.model_validate({"beta": 0.5, "beta_end": 0.1, "beta_schedule": kind})
    assert [beta_at(step, total, turned) for step in range(total + 1)] == pytest.approx([0.6 - b for b in expected])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("beta", "end"), [(0.1, 0.7), (0.3, 0.1), (1e-3, 5.0)])
def test_beta_begins_and_ends_at_what_is_set_to_the_bit(kind: str, beta: float, end: float) -> None:
    settings = TrainConfig.model_validate({"beta": beta, "beta_end": end, "beta_schedule": kind})
    assert [beta_at(step, 7, settings) for step in (0, 6, 7)] == [beta, end, end]


def test_a_schedule_of_beta_needs_an_end() -> None:
    with pytest.raises(ValidationError, match=r"train.beta_schedule has no effect without train.beta_end"):
        TrainConfig(beta_schedule="cosine")


def test_beta_stays_where_no_end_is_set() -> None:
    assert {beta_at(step, 9, TrainConfig(beta=0.3)) for step in range(10)} == {0.3}


@pytest.mark.parametrize(
    ("pairs", "size", "times", "epochs", "expected"),
    [(10, 4, 1, 1, 3), (10, 2, 2, 2, 6), (8, 4, 2, 0.5, 1), (3, 8, 1, 1, 1)],
)
def test_the_number_of_updates_by_hand(pairs: int, size: int, times: int, epochs: float, expected: int) -> None:
    settings = TrainConfig(batch_size=size, gradient_accumulation_steps=times, epochs=epochs)
    assert num_updates(pairs, settings) == expected
    assert num_updates(pairs, TrainConfig(max_steps=7)) == 7


def test_the_order_is_one_permutation_a_pass_and_depends_on_the_seed_alone() -> None:
    one, again, other = pair_order(9, 0), pair_order(9, 0), pair_order(9, 1)
    passes = [next(one) for _ in range(3)]
    assert all(sorted(order) == list(range(9)) for order in passes)
    assert passes == [next(again) for _ in range(3)]
    assert len({tuple(order) for order in [*passes, next(other)]}) == 4


def test_a_step_is_batch_size_times_accumulation_and_no_pass_begins_inside_one() -> None:
    steps = step_rows(7, TrainConfig(batch_size=2, gradient_accumulation_steps=2, seed=3))
    order = pair_order(7, 3)
    for number in (0, 1):
        rows = next(order)
        assert next(steps) == (number, rows[:4])
        assert next(steps) == (number + 4 / 7, rows[4:])
        assert epochs_made(2 * number + 1, 7, TrainConfig(batch_size=4)) == number + 4 / 7


# --- micro-batches


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(2, None), [[3, 1], [5, 0], [4]]),
        (Limits(8, None), [[3, 1, 5, 0, 4]]),
        (Limits(None, 20), [[3], [1, 5], [0, 4]]),  # 30; 9 + 9, and 6 more are 24; 6 + 2
        (Limits(None, 24), [[3], [1, 5, 0], [4]]),
        (Limits(2, 24), [[3], [1, 5], [0, 4]]),
        (Limits(None, 1), [[3], [1], [5], [0], [4]]),
        (Limits(None, None), [[3, 1, 5, 0, 4]]),
    ],
)
def test_micro_batches_by_hand(limits: Limits, expected: list[list[int]]) -> None:
    lengths = [6, 9, 1000, 30, 2, 9]  # row 2 is of another update
    assert micro_batches([4, 5, 0, 3, 1], lengths, limits) == expected


def test_tokens_take_the_place_of_a_number_of_pairs_where_they_are_set() -> None:
    assert limits_of(TrainConfig(batch_size=4), None) == Limits(4, None)
    assert limits_of(TrainConfig(batch_size=4), 2048) == Limits(4, 2048)
    assert limits_of(TrainConfig(batch_size=4, max_batch_tokens=100), 2048) == Limits(None, 100)


@PROPERTY
@given(lengths=LENGTHS, limits=LIMITS)
def test_a_micro_batch_keeps_to_its_limits_and_takes_what_it_can(lengths: list[int], limits: Limits) -> None:
    batches = micro_batches(range(len(lengths)), lengths, limits)
    pairs, tokens = limits.pairs or math.inf, limits.tokens or math.inf
    order = [number for batch in batches for number in batch]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    held = [[lengths[number] for number in batch] for batch in batches]
    assert all(batch and len(batch) <= pairs and (len(batch) == 1 or sum(batch) <= tokens) for batch in held)
    assert all(len(one) == pairs or sum(one) + after[0] > tokens for one, after in itertools.pairwise(held))


@PROPERTY
@given(lengths=LENGTHS, limits=LIMITS, size=st.integers(1, 5), times=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_pairs_of_an_update_are_those_of_the_permutation_whatever_their_lengths(
    lengths: list[int], limits: Limits, size: int, times: int, seed: int
) -> None:
    """Drawn by chance alone: no update sees the long pairs, and each pass sees every pair once."""
    config = TrainConfig(batch_size=size, gradient_accumulation_steps=times, seed=seed)
    an_epoch = num_updates(len(lengths), config)
    updates = itertools.islice(step_rows(len(lengths), config), 2 * an_epoch)
    steps = [micro_batches(rows, lengths, limits) for _, rows in updates]
    found = [sorted(number for batch in batches for number in batch) for batches in steps]
    expected = [
        sorted(order[start : start + size * times])
        for order in itertools.islice(pair_order(len(lengths), seed), 2)
        for start in range(0, len(lengths), size * times)
    ]
    assert found == expected
    for epoch in (found[:an_epoch], found[an_epoch:]):
        assert sorted(number for step in epoch for number in step) == [*range(len(lengths))]
    # by count alone there are no more micro-batches than are asked for
    if limits.tokens is None and limits.pairs == size:
        assert all(len(batches) <= times for batches in steps)


# --- several processes


@pytest.mark.parametrize(
    ("processes", "limits", "expected"),
    [
        (1, Limits(2, None), [[[3, 1], [5, 0], [4]]]),
        # 30 to the first; 9, 9 to the second (18); 6 (24) and 2 (26) too
        (2, Limits(2, None), [[[3]], [[1, 5], [0, 4]]]),
        # 30; 9; 9; then 6 to the second (15), and 2 to the third (11)
        (3, Limits(8, None), [[[3]], [[1, 0]], [[5, 4]]]),
        (6, Limits(8, None), [[[3]], [[1]], [[5]], [[0]], [[4]], []]),
    ],
)
def test_rows_dealt_out_by_hand(processes: int, limits: Limits, expected: list[list[list[int]]]) -> None:
    assert dealt([0, 1, 3, 4, 5], [6, 9, 0, 30, 2, 9], limits, processes) == expected


@PROPERTY
@given(lengths=LENGTHS, limits=LIMITS, processes=st.integers(1, 4))
def test_every_row_is_dealt_once_and_nobody_has_more_than_a_row_too_many(
    lengths: list[int], limits: Limits, processes: int
) -> None:
    shares = dealt(range(len(lengths)), lengths, limits, processes)
    assert len(shares) == processes
    hands = [[number for batch in share for number in batch] for share in shares]
    assert sorted(itertools.chain(*hands)) == [*range(len(lengths))]
    held = [sum(lengths[number] for number in hand) for hand in hands]
    assert max(held) - min(held) <= max(lengths, default=0)
