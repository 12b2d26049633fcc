"""Corrections: distances derived by hand, rules and what they leave behind."""

import re
from typing import Any

import polars as pl
import pytest

from prefkit.corrections import (
    CLOSE,
    MAX_WORDS,
    Rule,
    corrected_pairs,
    correction_report,
    distances,
    rewrite_responses,
)
from prefkit.format import MESSAGES


def records(*responses: Any, chat: bool = False) -> pl.DataFrame:
    dtype = MESSAGES if chat else pl.String
    prompts = [[{"role": "user", "content": "p"}]] * len(responses) if chat else ["p"] * len(responses)
    return pl.DataFrame(
        {
            "prompt": pl.Series(prompts, dtype=dtype),
            "response": pl.Series(responses, dtype=dtype),
            "tools": pl.Series([None] * len(responses), dtype=pl.String),
            "model": ["m"] * len(responses),
            "source": ["s.jsonl"] * len(responses),
            "source_row": [*range(1, len(responses) + 1)],
        }
    )


def swap(pattern: str, replace: str, *gone: str) -> Rule:
    return Rule(pattern, lambda text: re.sub(pattern, replace, text), gone)


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [
        ("a b c", "a x c", (1 / 3, 1 / 3, 1)),  # one of three words replaced; one shared at the start
        ("a b", "a b", (0.0, 1.0, 2)),
        ("a  b\n", "a b", (0.0, 1.0, 2)),  # white space does not count
        ("A b", "a b", (0.5, 0.0, 0)),  # case does
        ("Yes.", "Yes", (0.5, 1.0, 1)),  # a mark is a word: one of two inserted, the shorter is all shared
        ("a b c d", "", (1.0, 0.0, 0)),
        ("", "", (0.0, 0.0, 0)),
        ("b a", "a b", (1.0, 0.0, 0)),  # Levenshtein: two replaced (or one deleted and one inserted) of two
        ("東京 は 雨", "東京 は 晴れ", (1 / 3, 2 / 3, 2)),
    ],
)
def test_distances_count_words_as_they_are_written(chosen: str, rejected: str, wanted: tuple[float, ...]) -> None:
    row = distances(pl.Series([chosen]), pl.Series([rejected])).row(0)
    assert row == pytest.approx(wanted)


def test_a_side_of_too_many_words_has_no_edit_distance() -> None:
    """It would take the product of both: 37 s for two sides of a million marks, of a pair that is then too long."""
    at_most, more = "! " * MAX_WORDS, "! " * (MAX_WORDS + 1)
    found = distances(pl.Series([at_most, more, "? !"]), pl.Series(["!", "!", more]))
    assert found.rows() == [((MAX_WORDS - 1) / MAX_WORDS, 1.0, 1), (None, 1.0, 1), (None, 0.0, 0)]
    marks = distances(pl.Series(["!" * 1_000_000]), pl.Series(["?" * 1_000_000]))
    assert marks.row(0) == (None, 0.0, 0)


def test_a_correction_has_the_response_as_rejected_and_carries_its_distance() -> None:
    frame = records("the cat sat").with_columns(correction=pl.lit("the cat sits"), annotator=pl.lit("human"))
    (pair,) = corrected_pairs(frame, "text").to_dicts()
    assert (pair["chosen"], pair["rejected"], pair["rejected_model"]) == ("the cat sits", "the cat sat", "m")
    assert (pair["method"], pair["annotator"], pair["first_divergence"]) == ("correction", "human", 2)
    assert (pair["edit_distance"], pair["shared_prefix"]) == pytest.approx((1 / 3, 2 / 3))


def test_an_identity_change_leaves_the_old_name_in_no_chosen_and_says_what_it_dropped() -> None:
    responses = ["I am Alpaca.", "Hello!", "Alpaca, not ALPACA", "I, Alpaca, was made by Acme"]
    rules = [swap("Alpaca", "Nova", "alpaca"), swap("Acme", "Orbit")]
    made = rewrite_responses(records(*responses), rules, "text")
    assert made.corrections["correction"].to_list() == ["I am Nova.", "I, Nova, was made by Orbit"]
    assert made.corrections["response"].to_list() == ["I am Alpaca.", "I, Alpaca, was made by Acme"]
    assert made.touched == {"Alpaca": 3, "Acme": 1}
    lost = made.dropped.select("source_row", "reason", "stage", "method", "rejected", "chosen").rows()
    assert lost == [
        (2, "untouched", "pairs", "correction", "Hello!", None),
        (3, "old_text_remains", "pairs", "correction", "Alpaca, not ALPACA", "Nova, not ALPACA"),
    ]


def test_rules_apply_one_after_the_other_and_each_counts_the_rows_it_changed() -> None:
    rules = [swap("a", "b"), swap("b", "c"), swap("z", "y")]
    made = rewrite_responses(records("a", "b", "x"), rules, "text")
    assert made.corrections["correction"].to_list() == ["c", "c"]
    assert made.touched == {"a": 1, "b": 2, "z": 0}


def test_rules_that_undo_each_other_leave_a_response_untouched() -> None:
    made = rewrite_responses(records("a"), [swap("a", "b"), swap("b", "a")], "text")
    assert made.dropped["reason"].to_list() == ["untouched"]
    assert made.touched == {"a": 1, "b": 1}


def test_in_chat_rules_change_the_turns_of_the_assistant_only() -> None:
    turns = [
        {"role": "assistant", "content": "I am Alpaca", "extra": None},
        {"role": "user", "content": "Alpaca?", "extra": None},
        {"role": "assistant", "content": "Yes", "extra": '{"name": "x"}'},
    ]
    (pair,) = rewrite_responses(records(turns, chat=True), [swap("Alpaca", "Nova")], "chat").corrections.to_dicts()
    assert [turn["content"] for turn in pair["correction"]] == ["I am Nova", "Alpaca?", "Yes"]
    assert [turn["extra"] for turn in pair["correction"]] == [None, None, '{"name": "x"}']


def test_close_corrections_are_advised_about_and_far_ones_are_not() -> None:
    close = pl.DataFrame({"edit_distance": [0.05, 0.1, 0.9, None], "shared_prefix": [0.9, 0.8, 0.0, None]})
    report = correction_report(close)
    assert report["num_pairs"] == 3  # a pair that is no correction has none
    assert report["close"] == pytest.approx(2 / 3)
    assert report["edit_distance"]["median"] == pytest.approx(0.1)
    assert "2402.13228" in report["advice"][0]
    assert "dpop" in report["advice"][0]
    far = pl.DataFrame({"edit_distance": [CLOSE, 0.9], "shared_prefix": [0.0, 0.0]})
    assert correction_report(far)["advice"] == []
    assert correction_report(far.clear()) == {}
