"""A plan is a function of lengths and budget alone."""

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.batches import BATCHES_PER_PART, plan_batches
from prefkit.format import schema

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
LENGTHS = st.lists(st.tuples(*[st.integers(1, 40)] * 3), max_size=60)


def encoded(lengths: list[tuple[int, int, int]]) -> pl.DataFrame:
    columns = {
        "pair_id": pl.Series([f"{number:04d}" for number in range(len(lengths))], dtype=pl.String),
        "num_boundary_tokens": pl.Series([0] * len(lengths), dtype=pl.Int32),
        "num_unended": pl.Series([0] * len(lengths), dtype=pl.Int32),
        "prompt_cut": pl.Series([False] * len(lengths), dtype=pl.Boolean),
        "spells_control_token": pl.Series([False] * len(lengths), dtype=pl.Boolean),
    }
    for place, side in enumerate(("prompt", "chosen", "rejected")):
        columns[f"num_{side}_tokens"] = pl.Series([length[place] for length in lengths], dtype=pl.Int32)
    return pl.DataFrame(columns)


def batches_of(plan: pl.DataFrame) -> list[list[int]]:
    return [rows["num_tokens"].to_list() for _, rows in plan.group_by("batch", maintain_order=True)]


def test_a_small_plan_by_hand() -> None:
    # 10 + 10 padded to 10, then 6 + 4 + 3 padded to 6, then 1: within 20 tokens a batch
    plan = plan_batches(encoded([(1, 1, 1), (2, 2, 6), (4, 3, 3), (1, 1, 2), (2, 2, 2), (1, 0, 0)]), 20)
    assert plan["pair_id"].to_list() == ["0001", "0002", "0004", "0003", "0000", "0005"]
    assert plan["num_tokens"].to_list() == [10, 10, 6, 4, 3, 1]
    assert plan["batch"].to_list() == [0, 0, 1, 1, 1, 2]
    assert plan["part"].to_list() == [0] * 6


def test_a_pair_above_the_budget_is_a_batch_of_its_own() -> None:
    plan = plan_batches(encoded([(30, 30, 30), (40, 30, 30), (2, 2, 2)]), 50)
    assert batches_of(plan) == [[100], [90], [6]]


def test_numbers_go_on_behind_an_earlier_plan() -> None:
    plan = plan_batches(encoded([(9, 9, 9), (8, 8, 8)]), 10, first_batch=7, first_part=3)
    assert plan["batch"].to_list() == [7, 8]
    assert plan["part"].to_list() == [3, 3]


def test_a_part_is_a_fixed_number_of_whole_batches() -> None:
    plan = plan_batches(encoded([(5, 5, 5)] * (2 * BATCHES_PER_PART + 1)), 1, first_batch=5, first_part=2)
    assert plan["part"].to_list() == [2] * BATCHES_PER_PART + [3] * BATCHES_PER_PART + [4]


def test_no_pairs_make_an_empty_plan_of_the_right_columns() -> None:
    assert plan_batches(encoded([]), 10).schema == schema("plan", "text")


@PROPERTY
@given(lengths=LENGTHS, budget=st.integers(1, 300))
def test_every_batch_keeps_to_the_budget_longest_first(lengths: list[tuple[int, int, int]], budget: int) -> None:
    plan = plan_batches(encoded(lengths), budget)
    assert sorted(plan["pair_id"].to_list()) == [f"{number:04d}" for number in range(len(lengths))]
    sizes = {f"{number:04d}": sum(length) for number, length in enumerate(lengths)}
    assert plan["num_tokens"].to_list() == [sizes[pair] for pair in plan["pair_id"].to_list()]
    assert plan["num_tokens"].to_list() == sorted(sizes.values(), reverse=True)
    batches = batches_of(plan)
    assert all(len(batch) == 1 or len(batch) * max(batch) <= budget for batch in batches)
    # no batch could have taken the next pair as well
    assert all((len(one) + 1) * one[0] > budget for one in batches[:-1])
    assert plan["batch"].to_list() == [number for number, batch in enumerate(batches) for _ in batch]


@PROPERTY
@given(lengths=LENGTHS, budget=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_order_of_the_rows_has_no_say(lengths: list[tuple[int, int, int]], budget: int, seed: int) -> None:
    rows = encoded(lengths)
    assert plan_batches(rows.sample(fraction=1, shuffle=True, seed=seed), budget).equals(plan_batches(rows, budget))
