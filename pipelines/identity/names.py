"""Does an answer say the new name, and not the old one? A reward function in TRL's signature."""

from collections.abc import Sequence
from typing import Any

OLD = ("gull", "harbour labs")


def says_the_new_name(
    completions: Sequence[Sequence[dict[str, str]]],
    solution: Sequence[str | None],
    **columns: Any,  # noqa: ARG001 - a reward function is given all columns of the rows
) -> list[float | None]:
    """Rate answers: 1 with the name that the prompt asks for and neither old name, in upper or lower case; else 0.

    Args:
        completions: lists of one message each, the answer.
        solution: what a right answer says, the `reference` of each prompt: the new name, or the new maker's.
        columns: of the rows, which are not needed.

    Returns:
        a rating each; None for a prompt without a reference.
    """
    return [_rated(said[0]["content"], right) for said, right in zip(completions, solution, strict=True)]


def _rated(text: str, right: str | None) -> float | None:
    return None if right is None else float(right in text and not any(old in text.lower() for old in OLD))
