"""OpenRLHF preference data: chosen and rejected as text or messages, beside a prompt that --prompt_key names.

Without a prompt both sides are whole conversations, and the last turn is the answer. `margin` is optional there; it is
written where scores gave one, and not read, since a pair of ours has it from its scores alone. The chat template is
given the messages, tool calls included, but never a list of tools. The layout is TRL's: it is never guessed.
"""

from typing import Any

from prefkit.formats.reading import Columns, Format, Row
from prefkit.formats.trl import is_chat, read_trl
from prefkit.formats.turns import refuse_tools
from prefkit.formats.writing import Writer, Written


def read_openrlhf(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair; an implicit prompt is found as TRL's is."""
    return read_trl(row, columns)


def write_openrlhf(pair: Written) -> list[dict[str, Any]]:
    """One row: strings of a text dataset, messages of a chat dataset (--apply_chat_template)."""
    refuse_tools(pair)
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    margin = pair.row.get("margin")
    return [row if margin is None else {**row, "margin": margin}]


OPENRLHF = Format(
    "openrlhf",
    "pairs",
    ("prompt", "chosen", "rejected", "system"),
    False,
    "[prompt,] chosen, rejected (strings, or lists of {role, content})",
    "OpenRLHF; columns: names its --prompt_key",
    read_openrlhf,
    is_chat,
    required=("chosen", "rejected"),
)
OPENRLHF_WRITER = Writer(
    "openrlhf",
    "prompt, chosen, rejected (strings, or lists of {role, content}) [, margin]",
    "OpenRLHF: --prompt_key prompt, with --apply_chat_template for messages",
    write_openrlhf,
)
