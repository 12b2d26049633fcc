"""A model's own responses, from which the source's `rules:` make the corrections (corrections.py applies them)."""

from typing import Any

from prefkit.formats.reading import Columns, Format, Row, holds_messages, read_fields

OPTIONAL = ("tools", "model")


def read_responses(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one response."""
    return [read_fields(row, columns, ("prompt", "response"), OPTIONAL)]


REWRITE = Format(
    "rewrite",
    "responses",
    ("prompt", "response", *OPTIONAL, "system"),
    False,
    "prompt, response [, model, tools]",
    "the response becomes rejected, what rules: make of it chosen: regular expressions or module:function",
    read_responses,
    holds_messages("prompt", "response"),
    required=("prompt", "response"),
)
