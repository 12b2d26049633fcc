"""What an evaluation warns of, and what its headline is, from figures made up by hand."""

from typing import Any

import polars as pl
import pytest

from prefkit.intervals import Measured
from prefkit.measures import Row, Summary, Unscored, headline, summary_frame, summary_row, unscored, warnings_of


def row(role: str, metric: str, value: float, *ends: float, scorer: str | None = None, num: int = 50) -> Row:
    low, high = ends or (None, None)
    return summary_row(role, metric, Measured(value, low, high, num, 2 * num), temperature=1.0, scorer=scorer)


def warned(*rows: Row, unscored: dict[str, list[Unscored]] | None = None) -> dict[str, str]:
    told = warnings_of(Summary(summary_frame(rows)), unscored or {})
    return {one["name"]: one["text"] for one in told}


SURE = row("difference", "reward", 1.0, 0.5, 1.5, scorer="s")
REWARD = row("policy", "reward", 3.0, 2.0, 4.0, scorer="s")


def test_a_sure_gain_warns_of_nothing_and_is_the_headline() -> None:
    rows = [REWARD, SURE, row("policy", "tokens", 20.0, 19.0, 21.0)]
    assert warned(*rows) == {}
    told = headline(Summary(summary_frame(rows)), [0.5, 1.0])
    wanted = {"scorer": "s", "temperature": 1.0, "value": 1.0, "low": 0.5, "high": 1.5, "num_prompts": 50}
    assert told == wanted
    assert headline(Summary(summary_frame(rows[:1])), [1.0]) is None


@pytest.mark.parametrize(
    ("rows", "name", "text"),
    [
        ([row("difference", "reward", 1.0, -0.5, 2.5, scorer="s")], "gain_unsure", "the gain by s may be none"),
        ([row("difference", "reward", -1.0, -1.5, -0.5, scorer="s")], "reward_fell", "the mean reward by s fell"),
        (
            [
                SURE,
                row("policy", "tokens", 30.0, 29.0, 31.0),
                row("reference", "tokens", 20.0, 19.0, 21.0),
                row("difference", "tokens", 10.0, 9.0, 11.0),
            ],
            "length",
            "responses grew from 20 to 30 tokens along with the reward by s: it may be paid for length",
        ),
        ([row("policy", "cut_off", 0.25, 0.2, 0.3)], "cut_off", "25% of the responses were cut off"),
        (
            [row("policy", "distinct_2", 0.2), row("reference", "distinct_2", 0.5)],
            "diversity",
            "distinct_2 fell from 0.50 to 0.20: less than half",
        ),
        (
            [row("policy", "inconsistent", 0.8, 0.7, 0.9, scorer="j")],
            "inconsistent",
            "j changed its mind with the order in 80% of the comparisons",
        ),
        ([row("policy", "tokens", 9.0, num=7)], "few_prompts", "7 prompts are few"),
    ],
)
def test_what_the_figures_tell_at_once_is_said(rows: list[Any], name: str, text: str) -> None:
    told = warned(REWARD, *rows)
    assert list(told) == [name]
    assert text in told[name]


def test_responses_without_a_score_are_said_to_be_left_out() -> None:
    many = Unscored(20, 100, 0, 25)
    said = "s gave 20 of 100 responses no score: means are over the rest"
    assert warned(REWARD, SURE, unscored={"s": [many]})["unscored"] == said
    few = Unscored(4, 100, 1, 25)
    said = "s gave 24 of 200 responses no score: means are over the rest; 1 of 25 prompts has none"
    assert warned(REWARD, SURE, unscored={"s": [many, few]})["unscored"] == said
    assert warned(REWARD, SURE, unscored={"s": [few]})["unscored"].startswith("s gave 4 of 100 responses no score")
    assert "unscored" not in warned(REWARD, SURE, unscored={"s": [Unscored(4, 100, 0, 25)]})


def test_what_has_no_score_is_counted_against_the_samples() -> None:
    samples = pl.DataFrame({"prompt_id": ["a", "a", "b", "b", "c"]})
    scores = pl.DataFrame({"prompt_id": ["a", "a", "b", "b"], "score": [1.0, None, None, None]})
    assert unscored(scores, samples) == Unscored(4, 5, 2, 3)


def test_longer_responses_without_more_reward_are_no_warning() -> None:
    lengths = [
        row("policy", "tokens", 30.0),
        row("reference", "tokens", 20.0),
        row("difference", "tokens", 10.0, 9, 11),
    ]
    assert "length" not in warned(REWARD, row("difference", "reward", -1.0, -1.5, -0.5, scorer="s"), *lengths)
