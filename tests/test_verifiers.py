"""Verifiers: the last number of a response by hand, and GSM8K's own labels."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from prefkit.verifiers import last_number, same_number, same_text, verify_answers

NUMBERS = [
    ("The answer is 18", Fraction(18)),
    ("16 - 3 - 4 = 9, and 9 * 2 = <<9*2=18>>18\n#### 18", Fraction(18)),
    ("#### 1,200.00", Fraction(1200)),
    ("first #### 3\nno, #### 4", Fraction(4)),
    ("#### 5\nThat is 6 less than 11.", Fraction(5)),
    ("####\n7", Fraction(7)),
    ("it costs $1,234.50.", Fraction(2469, 2)),
    ("-$5", Fraction(-5)),
    ("$-5", Fraction(-5)),
    ("x = -5", Fraction(-5)),
    ("x = \u22125", Fraction(-5)),
    ("10-5", Fraction(5)),
    ("10 - 5", Fraction(5)),
    ("so 50%", Fraction(1, 2)),
    ("so 50 \\%", Fraction(1, 2)),
    ("1/2", Fraction(1, 2)),
    ("0.5", Fraction(1, 2)),
    (".5", Fraction(1, 2)),
    ("1/3", Fraction(1, 3)),
    ("0.3333", Fraction(3333, 10000)),
    ("\\boxed{42}", Fraction(42)),
    ("\\boxed{\\frac{3}{4}} of 100", Fraction(3, 4)),
    ("\\boxed{1} then \\boxed{2} and 3", Fraction(2)),
    ("\\boxed{1,000\\text{ km}}", Fraction(1000)),
    ("\\boxed{unclosed 8", Fraction(8)),
    ("3 apples, 4 pears.", Fraction(4)),
    ("1,2", Fraction(2)),
    ("#### $5.00 per 2 apples", Fraction(5)),
    ("#### 8 hours and 0 minutes", Fraction(8)),
    ("#### 12 cm^2", Fraction(12)),
    ("\\boxed{12 \\text{ cm}^2}", Fraction(12)),
    ("\\boxed{12 \\text{ cm}^{2}}", Fraction(12)),
    ("an area of 12 cm^2", Fraction(12)),
    ("so 7 = x_1", Fraction(7)),
    ("so 7 = x_{12}", Fraction(7)),
    ("2 1/2", Fraction(5, 2)),
    ("-2 1/2", Fraction(-5, 2)),
    ("\\boxed{2\\frac{1}{2}}", Fraction(5, 2)),
    ("of 2 3/2", Fraction(3, 2)),
    ("1e5", Fraction(100_000)),
    ("2.5E-3", Fraction(1, 400)),
    ("3 x 10^5", Fraction(300_000)),
    ("$3 \\times 10^{-2}$", Fraction(3, 100)),
    ("2^10", Fraction(1024)),
    ("4e", Fraction(4)),
    ("2^999", None),
    ("0^-1", None),
    ("1 000 000", Fraction(1_000_000)),
    ("1\u202f000", Fraction(1000)),
    ("1_000", Fraction(1000)),
    ("3 apples and 100 pears", Fraction(100)),
    ("no number", None),
    ("", None),
    ("1/0", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_answer_of_a_text(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_equal_numbers_are_equal_however_they_are_written() -> None:
    assert same_number("It is 0.50", "#### 1/2") == 1.0
    assert same_number("It is 50%", "#### .5") == 1.0
    assert same_number("It is 0.3333", "#### 1/3") == 0.0
    assert same_number("#### 70%", "70") == 1.0
    assert same_number("#### 0.7", "70%") == 1.0
    assert same_number("#### 70", "70%") == 1.0
    assert same_number("#### 70", "0.7") == 0.0
    assert same_number("#### 70%", "7000%") == 0.0
    assert same_number("I do not know", "#### 1") == 0.0
    assert same_number("1", "none at all") is None


def test_a_text_of_digits_without_end_is_no_answer() -> None:
    assert last_number("9" * 5000) is None
    assert last_number("1/" + "9" * 5000) is None


def test_exact_texts_are_folded() -> None:
    assert same_text("  Caf\u00e9\n au lait", "cafe\u0301 AU LAIT") == 1.0
    assert same_text("Paris.", "Paris") == 0.0


def test_without_a_reference_there_is_no_score() -> None:
    assert verify_answers("number", ["1", "1", "1"], ["1", None, "one"]) == [1.0, None, None]
    assert verify_answers("exact", ["a", "a"], ["A", "b"]) == [1.0, 0.0]


def test_the_number_agrees_with_every_label_of_gsm8k(test_data: Path) -> None:
    """3,600 solutions of four models with the label is_correct; 1,319 references agree with themselves."""
    folder = test_data / "gsm8k"
    labels = wrong = 0
    with gzip.open(folder / "example_model_solutions.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for told in row.values():
                if isinstance(told, dict) and "is_correct" in told:
                    labels += 1
                    wrong += same_number(told["solution"], row["ground_truth"]) != float(told["is_correct"])
    assert (labels, wrong) == (3600, 0)
    answers = [json.loads(line)["answer"] for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [same_number(answer, answer) for answer in answers] == [1.0] * 1319
