"""What a row may hold: scores as numbers, booleans or text, never guessed; everything else by its exact type."""

from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from prefkit.records import RECORDS, Candidate, Correction, Pair


def candidate(score: Any) -> Candidate:
    return Candidate.model_validate({"prompt": "p", "response": "r", "score": score})


def pair(**fields: Any) -> Pair:
    return Pair.model_validate({"prompt": "p", "chosen": "c", "rejected": "r", **fields})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, 3.0),
        (-2.5, -2.5),
        (True, 1.0),
        (False, 0.0),
        ("7", 7.0),
        (" 8.5 ", 8.5),
        ("-1e-3", -0.001),
        (Decimal("2.5"), 2.5),
    ],
)
def test_a_score_is_a_number_a_boolean_or_a_number_written_as_text(given: Any, expected: float) -> None:
    score = candidate(given).score
    assert score == expected
    assert type(score) is float


@pytest.mark.parametrize(
    "given",
    [float("nan"), float("inf"), float("-inf"), "nan", "inf", "-Infinity", 10**400, "1e999"],
    ids=lambda given: str(given)[:10],
)
def test_a_score_that_is_not_finite_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="finite"):
        candidate(given)


@pytest.mark.parametrize("given", ["", "good", "7/10", "1,5", None, [7], {"value": 7}])
def test_what_is_no_number_is_no_score(given: Any) -> None:
    with pytest.raises(ValidationError, match="score"):
        candidate(given)


@pytest.mark.parametrize("text", [5, None, True, 1.5, {"role": "user", "content": "x"}, ["x"]])
def test_a_text_is_a_string_or_messages_and_nothing_is_turned_into_one(text: Any) -> None:
    with pytest.raises(ValidationError, match="chosen"):
        pair(chosen=text)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, "x"])
def test_a_message_has_a_role_and_a_text(message: Any) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        pair(prompt=[message])


def test_messages_and_strings_are_both_texts() -> None:
    record = pair(prompt=[{"role": "user", "content": "hi"}])
    assert not isinstance(record.prompt, str)
    assert [(message.role, message.content) for message in record.prompt] == [("user", "hi")]
    assert record.chosen == "c"


def test_fields_that_we_do_not_know_are_left_out() -> None:
    assert "topic" not in pair(topic="x").model_dump()


def test_scores_models_and_annotator_of_a_pair_are_null_unless_given_and_the_weight_is_one() -> None:
    record = pair()
    assert (record.chosen_score, record.rejected_score, record.annotator, record.weight) == (None, None, None, 1.0)
    assert pair(chosen_score=None, annotator=None, chosen_model=None).chosen_score is None


@pytest.mark.parametrize("weight", [0, -1, "0", float("inf")])
def test_a_weight_is_above_zero_and_finite(weight: Any) -> None:
    with pytest.raises(ValidationError, match="weight"):
        pair(weight=weight)


def test_an_annotator_is_human_model_or_rule() -> None:
    assert [pair(annotator=name).annotator for name in ("human", "model", "rule")] == ["human", "model", "rule"]
    with pytest.raises(ValidationError, match="annotator"):
        pair(annotator="crowd")


def test_a_correction_needs_prompt_response_and_correction() -> None:
    whole = {"prompt": "p", "response": "r", "correction": "c"}
    assert Correction.model_validate(whole).correction == "c"
    for field in whole:
        with pytest.raises(ValidationError, match=field):
            Correction.model_validate({name: text for name, text in whole.items() if name != field})


def test_a_record_cannot_be_changed_once_it_is_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        candidate(1).score = 2.0  # type: ignore[misc]


def test_there_is_a_record_for_each_family_of_formats() -> None:
    assert set(RECORDS) == {"pairs", "candidates", "corrections", "comparisons", "responses", "prompts"}


def test_a_number_may_name_a_rater_and_a_truth_value_may_not() -> None:
    given = {"prompt": "p", "response": "r", "score": 1}
    assert Candidate.model_validate({**given, "rater": 7, "scorer": 2}).rater == "7"
    with pytest.raises(ValidationError, match="rater"):
        Candidate.model_validate({**given, "rater": True})
