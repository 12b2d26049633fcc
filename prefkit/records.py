"""What a user may hand us, as pydantic models: one record a line, checked for type before anything else happens.

A line that does not fit becomes a reject with the field and the rule's name; values are never guessed. A score may be
a number, a boolean or a number written as text (WildBench's score column is text).
"""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from prefkit.format import EXTRA_KEYS

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
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
    """One turn of a conversation. Content may be a list of text parts; beside tool calls it may be missing."""

    role: str = Field(description="system | developer | user | assistant | tool")
    content: str
    extra: str | None = Field(
        None, description="JSON object of " + ", ".join(EXTRA_KEYS) + "; read from keys of these names"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """Text parts become one text, and what else a message may hold becomes `extra`."""
        if not isinstance(value, Mapping):
            return value
        if value.get("function_call"):
            raise PydanticCustomError("function_call", "tool_calls, which took the place of function_call")
        content = value.get("content")
        extra = {key: value[key] for key in EXTRA_KEYS if value.get(key) not in (None, "", [])}
        extra = extra or _own_extra(value.get("extra"))
        if content is None and "tool_calls" in extra:
            content = ""
        elif isinstance(content, list):
            content = "".join(_text_part(part) for part in content)
        given = {"role": value["role"]} if "role" in value else {}
        if "content" in value or content is not None:
            given["content"] = content
        return {**given, "extra": _json_text(extra) if extra else None}


def _own_extra(written: Any) -> dict[str, Any]:
    """What a dataset of ours wrote into `extra`; anything else under that name is a key that is not read."""
    try:
        found = json.loads(written) if isinstance(written, str) else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.keys() <= set(EXTRA_KEYS) else {}


def _json_text(value: Any) -> str:
    """A value as JSON text that any reader takes: finite numbers, whole characters, not nested without end."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise PydanticCustomError("not_json", "nested less deeply") from None
    except (TypeError, ValueError):
        raise PydanticCustomError("not_finite", "finite numbers and texts") from None
    if LONE_SURROGATE.search(text):
        raise PydanticCustomError("lone_surrogate", "whole characters")
    return text


def _text_part(part: Any) -> str:
    """The text of `{"type": "text", "text": ...}`; LLaMA-Factory says value. An image has none."""
    text = part.get("text", part.get("value")) if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise PydanticCustomError("not_text_content", "a string, or a list of text parts")
    return text


def _tools(value: Any) -> Any:
    """Tools as JSON text: a list of objects, or the JSON of one."""
    if value is None or value in ("", "[]", []):
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        return _json_text(tools)
    raise PydanticCustomError("not_tools", "a list of tools, or the JSON of one")


def _name(value: Any) -> Any:
    """The number of a person or thing as its name."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name: TypeAlias = Annotated[str | None, BeforeValidator(_name)]
Text: TypeAlias = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")],
    Discriminator(lambda value: "messages" if isinstance(value, list) else "text"),  # an error is then of one of them
]
Tools: TypeAlias = Annotated[str | None, BeforeValidator(_tools)]


class Pair(_Record):
    """A ready-made pair. In a chat dataset a plain string stands for one user turn, or one assistant turn."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: Tools = None
    chosen_score: Score | None = None
    rejected_score: Score | None = None
    chosen_model: str | None = None
    rejected_model: str | None = None
    annotator: Annotator | None = None
    weight: Annotated[Score, Field(gt=0)] = 1.0


class Candidate(_Record):
    """One response to a prompt with one score; several scorers or raters give a row each."""

    prompt: Text
    response: Text
    tools: Tools = None
    score: Score
    scorer: Name = Field(None, description="what the score measures, or the model that gave it")
    rater: Name = Field(None, description="the person who gave it; a number is a name too")
    model: str | None = None


class Correction(_Record):
    """A model's own response (it becomes rejected) and its corrected form (it becomes chosen)."""

    prompt: Text
    response: Text
    correction: Text
    tools: Tools = None
    model: str | None = None
    annotator: Annotator | None = None


class Response(_Record):
    """A model's own response, from which the rules of a `rewrite` source make the correction."""

    prompt: Text
    response: Text
    tools: Tools = None
    model: str | None = None


class Comparison(_Record):
    """Two responses to a prompt, and who won: one verdict, or one a rater."""

    prompt: Text
    response_a: Text
    response_b: Text
    tools: Tools = None
    votes: Annotated[list[Literal["a", "b", "tie"]], Field(min_length=1)] = Field(
        description="read from `winner`, by the source's labels"
    )
    model_a: str | None = None
    model_b: str | None = None
    score_a: Score | None = None
    score_b: Score | None = None
    annotator: Annotator | None = None


def _answer(value: Any) -> Any:
    """A right answer as text: many files hold it as a number."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class Prompt(_Record):
    """What a model is asked, and the right answer where there is one. A plain string stands for one user turn."""

    prompt: Text
    reference: Annotated[str | None, BeforeValidator(_answer)] = Field(
        None, description="the right answer, for scorers"
    )
    tools: Tools = None


RECORDS: dict[str, type[_Record]] = {
    "pairs": Pair,
    "candidates": Candidate,
    "corrections": Correction,
    "responses": Response,
    "comparisons": Comparison,
    "prompts": Prompt,
}
