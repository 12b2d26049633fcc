"""TRL preference datasets: standard (strings), conversational (messages), each with or without its own prompt.

Without a prompt both sides hold the whole conversation. Messages are split by turns: the prompt is what both sides
share up to the last shared turn that an assistant answers, so a reply is never cut. Strings have no turns: the prompt
is the shared text before the last white space in it, so a word is never cut, and the space goes with the word that
follows, where most tokenizers have it. A string prompt beside conversational sides also means implicit prompt. Written
are explicit prompts only, and tools as JSON text, which TRL's trainers read.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.generic import PAIR_OPTIONAL
from prefkit.formats.reading import Columns, Format, Row, Unreadable, is_chat_field, require
from prefkit.formats.turns import split_sides, tools_text
from prefkit.formats.writing import Writer, Written

# the fields by which richer layouts that hold chosen and rejected as well are known
OTHERS = {"instruction", "conversations", "score_chosen", "score_rejected", "chosen_rating", "rejected_rating"}
OTHERS |= {"chosen-rating", "rejected-rating"} | set(PAIR_OPTIONAL) - {"tools"}


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    cut = 0
    for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            break
        cut = i if one.isspace() and not chosen[i - 1 : i].isspace() else cut
    if not cut:
        raise Unreadable("prompt", "no_shared_prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def read_trl(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    chosen, rejected = (require(row, str(columns.get(name, name))) for name in ("chosen", "rejected"))
    prompt, tools = (
        require(row, str(columns[name])) if name in columns else row.get(name) for name in ("prompt", "tools")
    )
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt, chosen, rejected = split_sides(chosen, rejected)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_text(chosen, rejected)
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return [{**pair, "tools": tools} if tools else pair]


def write_trl(pair: Written) -> list[dict[str, Any]]:
    """One row: strings of a text dataset, messages of a chat dataset."""
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return [_with_tools(row, pair)]


def write_trl_unpaired(pair: Written) -> list[dict[str, Any]]:
    """Two rows: the chosen completion with label true, the rejected one with false."""
    sides = ((pair.chosen, True), (pair.rejected, False))
    return [_with_tools({"prompt": pair.prompt, "completion": side, "label": label}, pair) for side, label in sides]


def _with_tools(row: dict[str, Any], pair: Written) -> dict[str, Any]:
    return {**row, "tools": tools_text(pair)} if pair.tools else row


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the sides are lists of messages."""
    return is_chat_field(row, columns, "chosen")


def detect_trl(row: Row) -> str | None:
    """Both sides are strings (no transcripts), or conversations, and nothing speaks for a richer layout."""
    sides = [row.get("chosen"), row.get("rejected")]
    if OTHERS & set(row) or not isinstance(row.get("prompt", ""), (str, list)):
        return None
    if all(isinstance(side, str) and not side.startswith("\n\nHuman:") for side in sides):
        return "chosen and rejected are strings"
    if all(isinstance(side, list) and side and all(_is_message(m) for m in side) for side in sides):
        return "chosen and rejected are lists of messages"
    return None


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value


TRL = Format(
    "trl",
    "pairs",
    ("prompt", "chosen", "rejected", "tools"),
    False,
    "[prompt,] chosen, rejected (strings, or lists of {role, content}) [, tools]",
    "TRL standard and conversational, explicit or implicit prompt",
    read_trl,
    is_chat,
    detect=detect_trl,
)
TRL_WRITER = Writer(
    "trl",
    "prompt, chosen, rejected (strings, or lists of {role, content}) [, tools]",
    "TRL: DPOTrainer and its kin; explicit prompt",
    write_trl,
)
TRL_UNPAIRED_WRITER = Writer(
    "trl_unpaired",
    "prompt, completion, label (two rows a pair) [, tools]",
    "TRL: KTOTrainer, BCOTrainer",
    write_trl_unpaired,
)
