"""What every writer is made of: a pair of ours in, the rows of an outside format out.

A writer is a pure function from a `Written` pair to one or more rows. What its format cannot hold is `Unwritable` with
a reason: the pair is left out by name, never bent to fit.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from prefkit.format import EXTRA_KEYS

Messages: TypeAlias = list[dict[str, Any]]


class Unwritable(Exception):  # noqa: N818 - it becomes a row of the list of what was left out
    """A pair that a format cannot hold; `reason` is a name like a drop's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def as_json(value: Any) -> str:
    """A value as JSON text.

    Raises:
        Unwritable: a number in it is not finite, for which JSON has no word.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Unwritable("not_finite") from None


def from_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is no JSON.
        Unwritable: a number in it is not finite; Python reads and writes NaN, and nobody else does.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Unwritable("not_finite")
    return number


class Written(NamedTuple):
    """A pair as writers get it: texts are strings, or messages of {role, content[, tool_calls, ...]}.

    `tools`: what the prompt offers, None without; `row`: the other columns of the pairs table.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None
    row: Mapping[str, Any]


class Writer(NamedTuple):
    """One outside format that pairs are exported to.

    `beside`: files that belong next to the exported ones, given their names by split: name -> text; `reference`: what a
    row holds of a reference: sums, where they are asked for, as ref_chosen_logps and ref_rejected_logps beside all
    else; ids, that it is made of the scored tokens; or nothing.
    """

    name: str
    fields: str
    note: str
    write: Callable[[Written], list[dict[str, Any]]]
    beside: Callable[[Mapping[str, str]], dict[str, str]] | None = None
    reference: Literal["", "sums", "ids"] = ""


def unpacked(text: str | list[Mapping[str, Any]]) -> str | Messages:
    """Messages of ours (role, content, extra) as others have them: what `extra` holds becomes keys of the message.

    Raises:
        Unwritable: `extra`, where it is no JSON object; `not_finite`, where a number in it is none.
    """
    if isinstance(text, str):
        return text
    return [{"role": m["role"], "content": m["content"], **_more(m.get("extra"))} for m in text]


def _more(extra: str | None) -> dict[str, Any]:
    try:
        held = from_json(extra) if extra else {}
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise Unwritable("extra")
    return {key: value for key, value in held.items() if key in EXTRA_KEYS}


def scores_of(pair: Written) -> tuple[Any, Any]:
    """The scores of chosen and rejected, where the higher one is the better one in what is written.

    The scores of a source with `direction: lower_is_better` say the opposite of the order to everybody who reads them
    without the pipeline, and so may the mean of several scorers: both are left out then.
    """
    chosen, rejected, margin = (pair.row.get(name) for name in ("chosen_score", "rejected_score", "margin"))
    if chosen is None or rejected is None or margin is None or (chosen > rejected) == (margin > 0):
        return chosen, rejected
    return None, None


def as_messages(text: str | Messages, role: str) -> Messages:
    """A text as messages: a plain string is one turn of that role."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def one_text(text: str | Messages, role: str) -> str:
    """A text as a string: only a single turn of that role, without tool calls, is one.

    Raises:
        Unwritable: it has several turns, a system message or tool calls.
    """
    if isinstance(text, str):
        return text
    if len(text) != 1 or text[0]["role"] != role:
        raise Unwritable("more_than_one_turn")
    if set(text[0]) != {"role", "content"}:
        raise Unwritable("tool_calls")
    return str(text[0]["content"])
