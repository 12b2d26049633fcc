"""What a user may hand us, as pydantic models: one record a line, checked for type before anything else happens.

A line that does not fit becomes a reject with the field and the rule's name; values are never guessed. A score may be
a number, a boolean or a number written as text (WildBench's score column is text).
"""

import math
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_SCORE = 1e30  # above it, rounding to 12 digits is no longer exact, and sums may overflow

Annotator: TypeAlias = Literal["human", "model", "rule"]


def _number(value: Any) -> Any:
    """A score as a finite float; booleans count as 0 and 1, text is parsed."""
    if isinstance(value, str):
        try:
            value = float(value.strip()) if "_" not in value else None  # Python's own spelling of numbers
        except ValueError:
            raise PydanticCustomError("not_a_number", "a number, or a number written as text") from None
    if isinstance(value, (bool, int, float, Decimal)):
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = math.inf
        if not math.isfinite(number):
            raise PydanticCustomError("not_finite", "a finite number")
        if abs(number) > MAX_SCORE:
            raise PydanticCustomError("out_of_range", "a number that others can be added to")
        return number
    raise PydanticCustomError("not_a_number", "a number, or a number written as text")


Score: TypeAlias = Annotated[float, BeforeValidator(_number)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Message(_Record):
    """One turn of a conversation."""

    role: str = Field(description="system | user | assistant")
    content: str


Text: TypeAlias = str | list[Message]


class Pair(_Record):
    """A ready-made pair. In a chat dataset a plain string stands for one user turn, or one assistant turn."""

    prompt: Text
    chosen: Text
    rejected: Text
    chosen_score: Score | None = None
    rejected_score: Score | None = None
    chosen_model: str | None = None
    rejected_model: str | None = None
    annotator: Annotator | None = None
    weight: Annotated[Score, Field(gt=0)] = 1.0


class Candidate(_Record):
    """One scored response to a prompt. `scorer` and further scores come with selection over several scorers."""

    prompt: Text
    response: Text
    score: Score
    model: str | None = None


class Correction(_Record):
    """A model's own response (it becomes rejected) and its corrected form (it becomes chosen)."""

    prompt: Text
    response: Text
    correction: Text
    model: str | None = None
    annotator: Annotator | None = None


RECORDS: dict[str, type[_Record]] = {"pairs": Pair, "candidates": Candidate, "corrections": Correction}
