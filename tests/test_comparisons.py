"""Comparisons: who won by hand-counted votes, agreement, ties dropped."""

from typing import Any

import polars as pl
import pytest

from prefkit.comparisons import compared_pairs
from prefkit.format import schema


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
