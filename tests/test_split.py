"""Prompts are held out whole, by a hash of their content and the seed: near the share asked for, and stable."""

import math

import polars as pl

from prefkit.comparing import Comparing, dedupe_pairs
from prefkit.dedupe import Rules
from prefkit.format import Kind
from prefkit.split import is_test
from prefkit.text import with_pair_ids

ALL_STAY = Comparing(None, None, Rules(exact=False, contradictions="keep", cycles="keep"))


def split_pairs(frame: pl.DataFrame, kind: Kind, share: float, seed: int) -> pl.DataFrame:
    """The pairs with their split, compared by nothing but their prompts."""
    empty = {"annotator": pl.String, "margin": pl.Float64, "agreement": pl.Float64}
    whole = frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in empty.items())
    return dedupe_pairs(whole, kind, ALL_STAY, share, seed).kept.drop(*empty)


def pairs(*prompts: str) -> pl.DataFrame:
    rows = {"prompt": prompts, "chosen": [f"c{i}" for i in range(len(prompts))], "rejected": ["r"] * len(prompts)}
    return with_pair_ids(pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String)), "text")


def splits(frame: pl.DataFrame, share: float = 0.3, seed: int = 0) -> list[str]:
    found: list[str] = split_pairs(frame, "text", share, seed)["split"].to_list()
    return found


def test_no_prompt_is_on_both_sides() -> None:
    frame = split_pairs(pairs(*[f"prompt {i % 50}" for i in range(400)]), "text", 0.3, 0)
    sides = frame.group_by("prompt").agg(pl.col("split").n_unique())["split"]
    assert sides.to_list() == [1] * 50
    assert set(frame["split"]) == {"train", "test"}


def test_prompts_that_fold_to_the_same_are_one_prompt() -> None:
    for i in range(40):
        found = splits(pairs(f"caf\u00e9 {i}", f"cafe\u0301  {i}", f" caf\u00e9\t{i}\n"), 0.5)
        assert len(set(found)) == 1


def test_which_variant_of_a_prompt_comes_first_decides_nothing() -> None:
    for i in range(40):
        frame = pairs(f"caf\u00e9 {i}", f"cafe\u0301  {i}", f" caf\u00e9\t{i}\n")
        assert splits(frame, 0.5) == splits(frame.reverse(), 0.5)


def test_the_share_of_prompts_that_is_held_out_is_near_the_one_asked_for() -> None:
    number = 4000
    frame = pairs(*[f"prompt {i}" for i in range(number)])
    for share in (0.05, 0.3):
        found = splits(frame, share).count("test")
        spread = math.sqrt(number * share * (1 - share))  # of a binomial: four of them is one in 16,000
        assert abs(found - number * share) < 4 * spread


def test_a_share_of_nothing_holds_out_none_and_a_share_of_one_holds_out_all() -> None:
    frame = pairs(*[f"prompt {i}" for i in range(200)])
    assert set(splits(frame, 0.0)) == {"train"}
    assert set(splits(frame, 1.0)) == {"test"}


def test_adding_rows_and_changing_their_order_moves_no_prompt() -> None:
    few = pairs(*[f"prompt {i}" for i in range(200)])
    more = pairs(*[f"prompt {i}" for i in range(0, 600, 2)], *[f"prompt {i}" for i in range(199, 0, -1)], "prompt 0")
    before = dict(split_pairs(few, "text", 0.3, 0).select("prompt", "split").rows())
    after = dict(split_pairs(more, "text", 0.3, 0).select("prompt", "split").rows())
    assert {prompt: after[prompt] for prompt in before} == before
    assert dict(split_pairs(few.reverse(), "text", 0.3, 0).select("prompt", "split").rows()) == before


def test_a_larger_share_only_adds_to_what_is_held_out() -> None:
    frame = pairs(*[f"prompt {i}" for i in range(500)])
    small, large = splits(frame, 0.1), splits(frame, 0.4)
    assert all(later == "test" for earlier, later in zip(small, large, strict=True) if earlier == "test")


def test_another_seed_is_another_split() -> None:
    frame = pairs(*[f"prompt {i}" for i in range(300)])
    assert splits(frame, seed=0) == splits(frame, seed=0)
    assert splits(frame, seed=0) != splits(frame, seed=1)


def test_the_kind_of_side_does_not_decide_but_the_prompt() -> None:
    ids = pairs("a", "a", "b")["prompt_id"].to_list()
    assert is_test(ids[0], 0.5, 7) == is_test(ids[1], 0.5, 7)


def test_rows_keep_their_order_and_their_columns() -> None:
    frame = pairs("z", "a", "m")
    assert split_pairs(frame, "text", 0.5, 0).drop("split").equals(frame)


def test_no_pairs_have_no_split() -> None:
    assert splits(pairs()) == []
