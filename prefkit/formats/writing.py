"""What every writer is made of: a pair of ours in, the rows of an outside format out.

A writer is a pure function from a `Written` pair to one or more rows. What its format cannot hold is `Unwritable` with
a reason: the pair is left out by name, never bent to fit.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

Messages: TypeAlias = list[dict[str, Any]]


class Unwritable(Exception):  # noqa: N818 - it becomes a row of the list of what was left out
    """A pair that a format cannot hold; `reason` is a name like a drop's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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

    `beside`: files that belong next to the exported ones, given their names by split: name -> text.
    """

    name: str
    fields: str
    note: str
    write: Callable[[Written], list[dict[str, Any]]]
    beside: Callable[[Mapping[str, str]], dict[str, str]] | None = None


def unpacked(text: str | list[Mapping[str, Any]]) -> str | Messages:
    """Messages of ours (role, content, extra) as others have them: what `extra` holds becomes keys of the message."""
    if isinstance(text, str):
        return text
    return [
        {"role": m["role"], "content": m["content"], **(json.loads(m["extra"]) if m.get("extra") else {})} for m in text
    ]


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
