r"""Nectar (berkeley-nest/Nectar): a prompt and seven answers, ranked.

Rank 1 is the BEST. A well-known trainer ships this format inverted. The score here is minus the rank, so that higher is
better as everywhere else. The prompt is a transcript ("\n\nHuman: ...\n\nAssistant:") whose last turn is still empty.
"""

from typing import Any

from prefkit.formats.fields import first, number, objects
from prefkit.formats.hh import parse_transcript
from prefkit.formats.reading import Columns, Format, Row, Unreadable, require


def read_nectar(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, as many candidates as it has answers."""
    turns = parse_transcript(require(row, "prompt"), "prompt")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    if not turns:
        raise Unreadable("prompt", "not_a_transcript")
    return [
        {
            "prompt": turns,
            "response": require(row, f"answers.{at}.answer"),
            "score": -number(row, f"answers.{at}.rank"),
            "model": answer.get("model"),
        }
        for at, answer in enumerate(objects(row, "answers"))
    ]


def _detect(row: Row) -> str | None:
    answer = first(row, "answers")
    return (
        "it has prompt and answers[] with rank" if "prompt" in row and "answer" in answer and "rank" in answer else None
    )


NECTAR = Format(
    "nectar",
    "candidates",
    (),
    False,
    "prompt (transcript), answers[{answer, model, rank}]",
    "seven ranked answers; the score is minus the rank",
    read_nectar,
    lambda _row, _columns: True,
    "a lower rank is better: rank 1 is the best",
    _detect,
)
