"""Comparisons: who won by hand-counted votes, agreement, ties dropped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit

from prefkit.comparisons import compared_pairs
from prefkit.format import MESSAGES, schema
from prefkit.pairs import Bounds, bounded_pairs, ready_pairs


def records(*votes: list[str], scores: tuple[float | None, float | None] = (None, None)) -> pl.DataFrame:
    rows: list[dict[str, Any]] = [
        {
            "prompt": "p",
            "response_a": f"A{number}",
            "response_b": f"B{number}",
            "tools": None,
            "votes": given,
            "model_a": "ma",
            "model_b": "mb",
            "score_a": scores[0],
            "score_b": scores[1],
            "annotator": "human",
            "source": "s",
            "source_row": number,
        }
        for number, given in enumerate(votes, start=1)
    ]
    types: dict[str, Any] = {
        "tools": pl.String,
        "score_a": pl.Float64,
        "score_b": pl.Float64,
        "votes": pl.List(pl.String),
    }
    return pl.DataFrame(rows, schema_overrides=types)


@pytest.mark.parametrize(
    ("votes", "chosen", "agreement"),
    [
        (["a"], "A1", 1.0),
        (["b"], "B1", 1.0),
        (["b", "b", "a"], "B1", 2 / 3),
        (["a", "tie", "a", "b"], "A1", 2 / 4),
        (["b", "b", "tie"], "B1", 2 / 3),
    ],
)
def test_the_side_with_the_most_votes_is_chosen(votes: list[str], chosen: str, agreement: float) -> None:
    (pair,) = compared_pairs(records(votes), "text").kept.to_dicts()
    assert pair["chosen"] == chosen
    assert {pair["chosen"], pair["rejected"]} == {"A1", "B1"}
    assert pair["chosen_model"] == ("ma" if chosen == "A1" else "mb")
    assert pair["agreement"] == pytest.approx(agreement)
    assert (pair["method"], pair["annotator"], pair["weight"]) == ("comparison", "human", 1.0)


@pytest.mark.parametrize("votes", [["tie"], ["a", "b"], ["a", "a", "b", "b", "tie"], ["a", "b", "b", "tie", "tie"]])
def test_a_tie_is_a_win_for_nobody(votes: list[str]) -> None:
    made = compared_pairs(records(votes), "text")
    assert made.kept.height == 0
    (lost,) = made.dropped.to_dicts()
    assert (lost["reason"], lost["stage"], lost["chosen"], lost["rejected"]) == ("tie", "pairs", "A1", "B1")


def test_weak_agreement_is_dropped_where_asked_for() -> None:
    made = compared_pairs(records(["a", "a", "b"], ["a", "a", "a"]), "text", min_agreement=0.7)
    assert made.kept["source_row"].to_list() == [2]
    assert made.dropped["reason"].to_list() == ["under_min_agreement"]


def test_the_margin_follows_the_winner() -> None:
    for votes, margin in (
        (["b"], 3.0),
        (["a"], -3.0),
    ):  # scores against the votes give a margin below 0: validate drops it
        (pair,) = compared_pairs(records(votes, scores=(2.0, 5.0)), "text").kept.to_dicts()
        assert pair["margin"] == pytest.approx(margin)


def test_the_frames_have_the_columns_of_the_road() -> None:
    made = compared_pairs(records(["a"], ["tie"]), "text")
    assert made.dropped.schema == {n: t for n, t in schema("dropped", "text").items() if n != "split"}
    assert "agreement" in made.kept.columns


def ready(*rows: tuple[str, str, float | None, float | None], lower: bool = False) -> pl.DataFrame:
    columns = {"chosen": pl.String, "rejected": pl.String, "chosen_score": pl.Float64, "rejected_score": pl.Float64}
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_row_index("source_row", offset=1)
    whole = frame.with_columns(
        pl.col("source_row").cast(pl.Int64), prompt=pl.lit("p"), tools=pl.lit(None, pl.String), source=pl.lit("s")
    )
    return ready_pairs(whole, "lower_is_better" if lower else "higher_is_better")


def reasons(drafts: pl.DataFrame, bounds: Bounds, *, lower: bool = False) -> dict[int, str]:
    """source_row -> reason; every other row is kept."""
    found = bounded_pairs(drafts, "text", "lower_is_better" if lower else "higher_is_better", bounds)
    lost = dict(found.dropped.select("source_row", "reason").rows())
    assert found.kept["source_row"].to_list() == [row for row in drafts["source_row"] if row not in lost]
    assert set(found.dropped["stage"]) <= {"pairs"}
    assert found.dropped.schema == {n: t for n, t in schema("dropped", "text").items() if n != "split"}
    assert found.kept.columns == drafts.columns
    return lost


SCORED = [("a", "b", 5.0, 4.0), ("a", "b", 5.0, 3.0), ("a", "b", 5.0, 2.0), ("a", "b", None, None)]


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        (Bounds(), {}),
        (Bounds(min_margin=2), {1: "under_min_margin"}),
        (Bounds(max_margin=2), {3: "over_max_margin"}),
        (Bounds(min_margin=1.5, max_margin=2.5), {1: "under_min_margin", 3: "over_max_margin"}),
        (Bounds(min_chosen_score=5), {}),
        (Bounds(min_chosen_score=5.1), dict.fromkeys([1, 2, 3], "under_min_chosen_score")),
    ],
)
def test_bounds_hold_for_pairs_that_have_scores(bounds: Bounds, wanted: dict[int, str]) -> None:
    assert reasons(ready(*SCORED), bounds) == wanted


def test_scores_that_count_downwards_are_bounded_downwards() -> None:
    drafts = ready(("a", "b", 1.0, 2.0), ("a", "b", 2.0, 4.0), lower=True)
    assert reasons(drafts, Bounds(min_margin=1.5), lower=True) == {1: "under_min_margin"}
    assert reasons(drafts, Bounds(min_chosen_score=1.5), lower=True) == {2: "under_min_chosen_score"}


def test_scores_that_tie_or_speak_against_the_order_are_left_to_their_own_rules() -> None:
    drafts = ready(("a", "b", 1.0, 1.0), ("a", "b", 1.0, 3.0))
    assert reasons(drafts, Bounds(min_margin=1.5)) == {}


def test_a_margin_that_only_rounding_puts_beside_a_bound_keeps_to_it() -> None:
    drafts = ready(("a", "b", 0.3, 0.1))  # 0.19999999999999998 as floats
    assert reasons(drafts, Bounds(min_margin=0.2, max_margin=0.2)) == {}


def test_a_length_cap_holds_for_pairs_with_and_without_scores() -> None:
    drafts = ready(("ab", "a", None, None), ("a", "abc", None, None), ("abc", "ab", 2.0, 1.0), ("", "a", None, None))
    assert reasons(drafts, Bounds(length_cap=0.69)) == dict.fromkeys([1, 2], "over_length_cap")  # ln 2 is .693
    assert reasons(drafts, Bounds(length_cap=0.7)) == {2: "over_length_cap"}  # ln 3 is 1.0986; an empty side has none


def test_the_length_of_messages_is_that_of_what_they_say() -> None:
    def said(*texts: str) -> pl.Series:
        return pl.Series([[{"role": "assistant", "content": text}] for text in texts], dtype=MESSAGES)

    drafts = ready(("x", "y", None, None), ("x", "y", None, None))
    drafts = drafts.with_columns(prompt=said("p", "p"), chosen=said("abcd", "abcd"), rejected=said("ab", "a"))
    found = bounded_pairs(drafts, "chat", "higher_is_better", Bounds(length_cap=1.0))
    assert found.kept["source_row"].to_list() == [1]


def test_labels_that_nobody_explained_are_named_with_what_to_type(
    write_jsonl: Callable[..., Path], prefkit: Prefkit, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{n}", "response_a": "x", "response_b": "y", "winner": [n % 2, "left"]} for n in range(4)]
    write_jsonl("rows.jsonl", rows)
    (tmp_path / "p.yaml").write_text("dataset: d\nsources: [{path: rows.jsonl, format: comparisons}]\n")
    error = prefkit("build", "p.yaml", "--json").error()
    assert "4 unknown_label (winner)" in error["message"]
    assert "; labels: 0, 1, left" in error["message"]
    meaning = "labels: {a: [1], b: [2], tie: [0]} of this source says which label stands for which response"
    assert error["hint"] == meaning
