"""A model's own responses, from which the source's `rules:` make the corrections (corrections.py applies them)."""

from typing import Any

from prefkit.formats.reading import Columns, Format, Row, is_chat_field, read_fields

OPTIONAL = ("tools", "model")


def read_responses(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one response."""
    return [read_fields(row, columns, ("prompt", "response"), OPTIONAL)]


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the prompt or the response is a list of messages."""
    return any(is_chat_field(row, columns, name) for name in ("prompt", "response"))


REWRITE = Format(
    "rewrite",
    "responses",
    ("prompt", "response", *OPTIONAL),
    False,
    "prompt, response [, model, tools]",
    "the response becomes rejected, what rules: make of it chosen: regular expressions or module:function",
    read_responses,
    is_chat,
)
