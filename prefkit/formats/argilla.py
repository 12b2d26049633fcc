"""Argilla's cleaned UltraFeedback (argilla/ultrafeedback-binarized-preferences-cleaned): ready-made pairs.

The side called `chosen` is the better one. The trap: both sides hold the whole conversation, the user's turn included,
and the names of the ratings and models have a hyphen (`chosen-rating`). The prompt is everything before the last turn,
in which both sides must agree; `prompt` repeats it as a string and is not read.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.fields import messages, named
from prefkit.formats.reading import Columns, Format, Row, Unreadable
from prefkit.formats.turns import said


def _split(row: Row, side: str) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    turns = messages(row, side)
    if not turns or turns[-1]["role"] != "assistant":
        raise Unreadable(side, "no_assistant_turn")
    if len(turns) == 1:
        raise Unreadable(side, "no_shared_prompt")
    return turns[:-1], turns[-1:]


def read_argilla_cleaned(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    prompt, chosen = _split(row, "chosen")
    other, rejected = _split(row, "rejected")
    if [*map(said, prompt)] != [*map(said, other)]:
        raise Unreadable("rejected", "different_prompts")
    return [
        {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": row.get("chosen-rating"),
            "rejected_score": row.get("rejected-rating"),
            "chosen_model": row.get("chosen-model"),
            "rejected_model": row.get("rejected-model"),
        }
    ]


ARGILLA_CLEANED = Format(
    "argilla_cleaned",
    "pairs",
    (),
    False,
    "prompt, chosen[], chosen-rating, chosen-model, rejected[], rejected-rating, rejected-model",
    "both sides hold the whole conversation; the prompt is what comes before its last turn",
    read_argilla_cleaned,
    lambda _row, _columns: True,
    "the side called chosen is better",
    lambda row: named(row, "chosen", "rejected", "chosen-rating", "rejected-rating"),
)
