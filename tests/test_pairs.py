"""Best against worst of N equals a plain Python oracle in exact fractions, whatever the order of the rows."""

import random
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.corrections import corrected_pairs
from prefkit.format import MESSAGES
from prefkit.pairing import Rules
from prefkit.pairs import Direction, ready_pairs
from prefkit.selection import Selected, select_pairs
from prefkit.text import bare

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True, database=None)


class Row(NamedTuple):
    prompt: str
    response: str
    score: float
    model: str | None = None


def select(
    rows: Sequence[Row | tuple[Any, ...]], direction: Direction = "higher_is_better", min_margin: float = 0.0
) -> Selected:
    records = [Row(*row) for row in rows]
    frame = pl.DataFrame(
        {
            "prompt": [row.prompt for row in records],
            "response": [row.response for row in records],
            "score": [float(row.score) for row in records],
            "model": pl.Series([row.model for row in records], dtype=pl.String),
            "source": ["rows.jsonl"] * len(records),
            "source_row": pl.Series(range(1, len(records) + 1), dtype=pl.Int64),
        },
        schema_overrides={"prompt": pl.String, "response": pl.String, "score": pl.Float64, "source": pl.String},
    )
    return select_pairs(frame, "text", direction, Rules(min_margin=min_margin))


def sides(selected: Selected) -> dict[str, tuple[str, str]]:
    return {row["prompt"]: (row["chosen"], row["rejected"]) for row in selected.pairs.iter_rows(named=True)}


def reasons(selected: Selected) -> dict[str, str]:
    return dict(selected.dropped.select("prompt", "reason").rows())


def test_the_best_candidate_is_chosen_and_the_worst_rejected() -> None:
    selected = select([("p", "mid", 5, "m1"), ("p", "bad", 1, "m2"), ("p", "good", 9, "m3")])
    (pair,) = selected.pairs.to_dicts()
    assert (pair["chosen"], pair["rejected"]) == ("good", "bad")
    assert (pair["chosen_score"], pair["rejected_score"], pair["margin"]) == (9.0, 1.0, 8.0)
    assert (pair["chosen_model"], pair["rejected_model"]) == ("m3", "m2")
    assert (pair["method"], pair["num_candidates"], pair["source"], pair["source_row"]) == (
        "best_of_n",
        3,
        "rows.jsonl",
        3,
    )
    assert pair["weight"] == 1.0


def test_where_lower_is_better_the_lowest_rank_is_chosen_and_the_margin_is_still_above_zero() -> None:
    selected = select([("p", "first", 1), ("p", "third", 3), ("p", "second", 2)], "lower_is_better")
    (pair,) = selected.pairs.to_dicts()
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("first", "third", 2.0)
    assert (pair["chosen_score"], pair["rejected_score"]) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("rows", "min_margin", "reason"),
    [
        ([("p", "a", 5), ("p", "b", 5), ("p", "c", 5)], 0.0, "tie"),
        ([("p", "a", 5)], 0.0, "one_candidate"),
        ([("p", "a", 5), ("p", "a", 1)], 0.0, "one_candidate"),
        ([("p", "a", 5), ("p", " \n", 1)], 0.0, "one_candidate"),
        ([("p", "", 5), ("p", " \t", 1)], 0.0, "no_candidate"),
        ([("p", "a", 5), ("p", "b", 4)], 1.5, "under_min_margin"),
    ],
)
def test_a_prompt_that_gives_no_pair_is_one_dropped_row_with_its_reason(
    rows: list[tuple[Any, ...]], min_margin: float, reason: str
) -> None:
    selected = select(rows, min_margin=min_margin)
    assert selected.pairs.is_empty()
    (dropped,) = selected.dropped.to_dicts()
    assert (dropped["prompt"], dropped["stage"], dropped["reason"]) == ("p", "pairs", reason)
    assert (dropped["pair_id"], dropped["chosen"], dropped["rejected"]) == (None, None, None)
    assert len(dropped["prompt_id"]) == 64


@pytest.mark.parametrize(
    ("high", "low", "min_margin"),
    [(0.3, 0.1, 0.2), (0.8, 0.7, 0.1), (1.1, 0.4, 0.7), (4.35, 4.25, 0.1), (1.0, 0.9, 0.1)],
)
def test_a_margin_is_compared_as_the_decimal_that_it_is(high: float, low: float, min_margin: float) -> None:
    for direction, (better, worse) in {"higher_is_better": (high, low), "lower_is_better": (low, high)}.items():
        selected = select([("p", "a", better), ("p", "b", worse)], direction, min_margin)  # type: ignore[arg-type]
        assert selected.pairs["margin"].to_list() == [min_margin]
    assert reasons(select([("p", "a", high), ("p", "b", low)], min_margin=min_margin + 1e-6)) == {
        "p": "under_min_margin"
    }


def test_identical_texts_are_one_candidate_with_their_mean_score() -> None:
    selected = select([("p", "a", 9), ("p", "b", 4), ("p", "a", 1), ("p", "c", 6)])
    assert sides(selected) == {"p": ("c", "b")}
    assert selected.pairs["num_candidates"].to_list() == [3]
    (pair,) = select([("p", "a", 9), ("p", "b", 4), ("p", "a", 2)]).pairs.to_dicts()
    assert (pair["chosen"], pair["chosen_score"], pair["margin"]) == ("a", 5.5, 1.5)


def test_one_text_under_two_prompts_is_two_candidates() -> None:
    selected = select([("p", "a", 9), ("q", "a", 1), ("p", "b", 5), ("q", "b", 5)])
    assert sides(selected) == {"p": ("a", "b"), "q": ("b", "a")}


def test_among_tied_candidates_the_two_of_the_closest_length_are_taken() -> None:
    rows = [
        ("p", "x" * 30, 9),
        ("p", "x" * 12, 9),
        ("p", "y" * 50, 1),
        ("p", "y" * 10, 1),
        ("p", "z" * 11, 5),
    ]
    assert sides(select(rows)) == {"p": ("x" * 12, "y" * 10)}


def test_lengths_are_counted_in_characters_and_not_in_bytes() -> None:
    assert sides(select([("p", "雪雪雪", 9), ("p", "snowsnow!", 9), ("p", "???", 1)])) == {"p": ("雪雪雪", "???")}


def test_full_ties_are_broken_by_content_and_not_by_place() -> None:
    rows = [("p", text, score) for text, score in (("aa", 9), ("bb", 9), ("cc", 1), ("dd", 1))]
    found = {tuple(sides(select(order)).values()) for order in (rows, rows[::-1], rows[2:] + rows[:2])}
    assert len(found) == 1


@pytest.mark.parametrize("merged", ["ab", "a long answer"])
def test_the_mean_of_equal_texts_ties_with_the_same_number_written_once(merged: str) -> None:
    """.1, .2 and .3 have the mean .2; as a float it may be another number, and depend on the order of the three."""
    single = "ab" if merged != "ab" else "a long answer"
    means, others = [("p", merged, score) for score in (0.1, 0.2, 0.3)], [("p", single, 0.2), ("p", "xy", 0.0)]
    for rows in (means + others, means[::-1] + others, others + means):
        assert sides(select(rows)) == {"p": ("ab", "xy")}
    assert reasons(select([*means, ("p", single, 0.2)])) == {"p": "tie"}


def test_the_model_of_a_text_that_two_models_wrote_does_not_depend_on_the_order_of_rows() -> None:
    rows = [("p", "same", 9, "m1"), ("p", "same", 9, "m2"), ("p", "other", 1, "m3")]
    found = {select(order).pairs["chosen_model"].item() for order in (rows, rows[::-1])}
    assert len(found) == 1


def test_candidates_of_messages_are_compared_by_their_text() -> None:
    def reply(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    prompt = [{"role": "user", "content": "q"}]
    frame = pl.DataFrame(
        {
            "prompt": pl.Series([prompt] * 4, dtype=MESSAGES),
            "response": pl.Series([reply("a"), reply("b"), reply(" "), reply("a")], dtype=MESSAGES),
            "score": [9.0, 5.0, 1.0, 7.0],
            "model": pl.Series([None] * 4, dtype=pl.String),
            "source": ["f"] * 4,
            "source_row": [1, 2, 3, 4],
        }
    )
    selected = select_pairs(frame, "chat", "higher_is_better", Rules())
    (pair,) = selected.pairs.to_dicts()
    assert [bare(pair[name]) for name in ("prompt", "chosen", "rejected")] == [prompt, reply("a"), reply("b")]
    assert (pair["chosen_score"], pair["num_candidates"]) == (8.0, 2)


def test_no_candidates_give_no_pairs_and_no_drops() -> None:
    selected = select([])
    assert (selected.pairs.height, selected.dropped.height, selected.num_prompts) == (0, 0, 0)


def test_unused_candidates_are_counted_by_reason() -> None:
    rows = [("p", "a", 9), ("p", "b", 1), ("p", "c", 5), ("p", "a", 9), ("p", "", 3), ("q", "a", 1), ("q", "b", 1)]
    selected = select(rows)
    assert (selected.num_prompts, selected.num_used) == (2, 2)
    assert selected.unused == {"empty_response": 1, "identical_response": 1, "not_selected": 3}


# against an oracle

CANDIDATES = st.lists(
    st.tuples(
        st.sampled_from("pq"),
        st.sampled_from(["a", "bb", "cc", "dddd", "eeeeeee", "", "  "]),
        st.integers(0, 6).map(lambda tenths: tenths / 10),
    ),
    max_size=14,
)


def by_prompt(rows: Sequence[tuple[str, str, float]], sign: int) -> dict[str, dict[str, Fraction]]:
    """Prompt -> distinct non-blank text -> exact mean of its scores, higher is better."""
    scores: dict[str, dict[str, list[Fraction]]] = defaultdict(lambda: defaultdict(list))
    for prompt, text, score in rows:
        scores[prompt]  # a prompt with nothing but blank responses is a prompt
        if text.strip():
            scores[prompt][text].append(sign * Fraction(round(score * 10), 10))
    return {p: {t: sum(s, Fraction()) / len(s) for t, s in texts.items()} for p, texts in scores.items()}


def expected_reason(texts: dict[str, Fraction], min_margin: Fraction) -> str | None:
    if len(texts) < 2:
        return ["no_candidate", "one_candidate"][len(texts)]
    margin = max(texts.values()) - min(texts.values())
    return "tie" if margin == 0 else "under_min_margin" if margin < min_margin else None


@PROPERTY
@given(CANDIDATES, st.integers(0, 5), st.sampled_from([1, -1]))
def test_pairs_are_those_of_a_plain_oracle(rows: list[tuple[str, str, float]], tenths: int, sign: int) -> None:
    direction: Direction = "higher_is_better" if sign == 1 else "lower_is_better"
    selected = select(rows, direction, tenths / 10)
    wanted = by_prompt(rows, sign)
    judged = {prompt: expected_reason(texts, Fraction(tenths, 10)) for prompt, texts in wanted.items()}
    assert reasons(selected) == {prompt: reason for prompt, reason in judged.items() if reason}
    pairs = {row["prompt"]: row for row in selected.pairs.iter_rows(named=True)}
    assert set(pairs) == {prompt for prompt, reason in judged.items() if reason is None}
    for prompt, pair in pairs.items():
        texts = wanted[prompt]
        best, worst = max(texts.values()), min(texts.values())
        tops = [text for text, quality in texts.items() if quality == best]
        bottoms = [text for text, quality in texts.items() if quality == worst]
        assert pair["chosen"] in tops
        assert pair["rejected"] in bottoms
        apart = min(abs(len(top) - len(bottom)) for top in tops for bottom in bottoms)
        assert abs(len(pair["chosen"]) - len(pair["rejected"])) == apart
        assert pair["margin"] == pytest.approx(float(best - worst), abs=1e-9)
        assert pair["chosen_score"] == pytest.approx(sign * float(best), abs=1e-9)
        assert pair["rejected_score"] == pytest.approx(sign * float(worst), abs=1e-9)
        assert pair["num_candidates"] == len(texts)


@PROPERTY
@given(CANDIDATES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_shuffling_the_rows_changes_nothing(
    rows: list[tuple[str, str, float]], tenths: int, shuffler: random.Random
) -> None:
    shuffled = rows.copy()
    shuffler.shuffle(shuffled)

    def result(candidates: list[tuple[str, str, float]]) -> tuple[Any, ...]:
        selected = select(candidates, min_margin=tenths / 10)
        columns = ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin", "num_candidates"]
        return sorted(selected.pairs.select(columns).rows()), reasons(selected), selected.unused, selected.num_used

    assert result(shuffled) == result(rows)


@PROPERTY
@given(CANDIDATES)
def test_every_candidate_is_used_or_unused_and_every_prompt_a_pair_or_a_drop(
    rows: list[tuple[str, str, float]],
) -> None:
    selected = select(rows)
    assert selected.num_used + sum(selected.unused.values()) == len(rows)
    assert selected.num_used == 2 * selected.pairs.height
    assert selected.num_prompts == len({row[0] for row in rows}) == selected.pairs.height + selected.dropped.height


# corrections and ready-made pairs


def test_the_response_of_a_correction_is_rejected_and_its_correction_chosen() -> None:
    frame = pl.DataFrame(
        {
            "prompt": ["p"],
            "response": ["wrong"],
            "correction": ["right"],
            "model": ["m"],
            "annotator": ["human"],
            "source": ["f"],
            "source_row": [4],
        }
    )
    (pair,) = corrected_pairs(frame, "text").to_dicts()
    assert (pair["chosen"], pair["rejected"], pair["method"]) == ("right", "wrong", "correction")
    assert (pair["chosen_model"], pair["rejected_model"], pair["annotator"]) == (None, "m", "human")
    assert (pair["margin"], pair["source_row"], pair["weight"]) == (None, 4, 1.0)


@pytest.mark.parametrize(
    ("direction", "chosen_score", "rejected_score", "margin"),
    [
        ("higher_is_better", 3.0, 1.0, 2.0),
        ("lower_is_better", 1.0, 3.0, 2.0),
        ("higher_is_better", 1.0, 3.0, -2.0),
        ("higher_is_better", 0.3, 0.1, 0.2),
        ("higher_is_better", 2.0, 2.0, 0.0),
        ("higher_is_better", None, 2.0, None),
        ("lower_is_better", None, None, None),
    ],
)
def test_the_margin_of_a_ready_pair_is_above_zero_where_its_scores_agree_with_its_order(
    direction: Direction, chosen_score: float | None, rejected_score: float | None, margin: float | None
) -> None:
    row = {
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "chosen_model": None,
        "rejected_model": None,
        "annotator": "model",
        "weight": 2.0,
        "source": "f",
        "source_row": 1,
    }
    texts = dict.fromkeys(
        ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "annotator", "source"), pl.String
    )
    numbers = dict.fromkeys(("chosen_score", "rejected_score", "weight"), pl.Float64)
    frame = pl.DataFrame([row], schema={**texts, **numbers, "source_row": pl.Int64})
    (pair,) = ready_pairs(frame, direction).to_dicts()
    assert pair["margin"] == margin
    assert (pair["method"], pair["weight"], pair["annotator"]) == ("paired", 2.0, "model")
