"""AlpacaEval annotations (tatsu-lab/alpaca_eval): an instruction, two outputs and which one the annotator prefers.

`preference` is 1 where output_1 is better and 2 where output_2 is, not 0 and 1; 1.5 is a tie, and so is the 0 of old
files. What lies between is 1 plus the probability that output_2 is preferred: the likelier side wins, and both
probabilities are kept as the scores, so that `min_margin` can ask for more than a coin's toss. A preference that is
null was not given, and is a reject.
"""

from typing import Any

from prefkit.formats.fields import named, number, text
from prefkit.formats.reading import Columns, Format, Row, Unreadable


def read_alpaca_eval(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    preference = number(row, "preference") or 1.5
    if not 1 <= preference <= 2:
        raise Unreadable("preference", "out_of_range")
    return [
        {
            "prompt": _prompt(row),
            "response_a": text(row, "output_1"),
            "response_b": text(row, "output_2"),
            "votes": ["a" if preference < 1.5 else "b" if preference > 1.5 else "tie"],
            "score_a": 2 - preference,
            "score_b": preference - 1,
            "model_a": row.get("generator_1"),
            "model_b": row.get("generator_2"),
        }
    ]


def _prompt(row: Row) -> str:
    """The instruction; the files of AlpacaFarm have its input apart."""
    instruction = text(row, "instruction")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise Unreadable("input", "wrong_type")
    return f"{instruction}\n\n{given}" if given else instruction


ALPACA_EVAL = Format(
    "alpaca_eval",
    "comparisons",
    (),
    False,
    "instruction, output_1, output_2, preference, generator_1, generator_2",
    "AlpacaEval annotations; a preference between 1 and 2 is a probability, kept as the scores",
    read_alpaca_eval,
    lambda _row, _columns: False,
    "preference below 1.5: output_1 is better; above: output_2; 1.5 (and 0) is a tie",
    lambda row: named(row, "instruction", "output_1", "output_2", "preference"),
)
