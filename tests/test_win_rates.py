"""Wins by scores and by verdicts, counted by hand."""

import polars as pl

from prefkit.win_rates import BY_PROMPT, wins_by_score, wins_by_verdict


def scores(**values: list[float | None]) -> pl.DataFrame:
    rows = [(prompt, value) for prompt, some in values.items() for value in some]
    return pl.DataFrame(rows, schema={"prompt_id": pl.String, "score": pl.Float64}, orient="row")


def test_every_response_meets_every_other_one_and_ties_are_halves() -> None:
    found = wins_by_score(scores(p=[1, 3], q=[5], r=[1]), scores(p=[1, 2], q=[9, None], s=[0]))
    assert found.rows() == [("p", (0 + 0.5 + 1 + 1) / 4, 4, 0), ("q", 0.0, 1, 0)]
    assert found.schema == BY_PROMPT


def test_a_side_without_scores_is_compared_with_nothing() -> None:
    assert wins_by_score(scores(p=[None]), scores(p=[1])).is_empty()
    assert wins_by_score(scores(), scores()).schema == BY_PROMPT


def test_inconsistent_verdicts_are_counted_apart_and_are_no_ties() -> None:
    verdicts = pl.DataFrame(
        {"prompt_id": ["q", "p", "p", "p", "p"], "winner": [None, "a", "tie", "b", None]},
        schema={"prompt_id": pl.String, "winner": pl.String},
    )
    assert wins_by_verdict(verdicts).rows() == [("p", 0.5, 3, 1), ("q", None, 0, 1)]
    assert wins_by_verdict(verdicts.clear()).schema == BY_PROMPT


def test_a_judge_that_always_prefers_the_first_says_nothing() -> None:
    always = pl.DataFrame({"prompt_id": ["p", "q"], "winner": [None, None]}, schema_overrides={"winner": pl.String})
    assert wins_by_verdict(always)["win"].null_count() == 2
