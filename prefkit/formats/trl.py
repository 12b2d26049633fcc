"""TRL preference datasets: standard (strings), conversational (messages), each with or without its own prompt.

Without a prompt both sides hold the whole conversation. Messages are split by turns: the prompt is what both sides
share up to the last shared user turn, so a reply is never cut. Strings have no turns: the prompt is the shared text
before the last white space in it, so a word is never cut, and the space goes with the word that follows, where most
tokenizers have it. A string prompt beside conversational sides also means implicit prompt.
"""

from typing import Any

from prefkit.formats.reading import Columns, Format, Row, Unreadable, dig, require


def _split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not (isinstance(chosen[shared - 1], dict) and chosen[shared - 1].get("role") == "user"):
        shared -= 1
    if not shared:
        raise Unreadable("prompt", "no_shared_prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


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
    prompt = require(row, str(columns["prompt"])) if "prompt" in columns else row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt, chosen, rejected = _split_messages(chosen, rejected)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_text(chosen, rejected)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the sides are lists of messages."""
    try:
        return isinstance(dig(row, str(columns.get("chosen", "chosen"))), list)
    except KeyError:
        return False


TRL = Format(
    "trl",
    "pairs",
    ("prompt", "chosen", "rejected"),
    False,
    "[prompt,] chosen, rejected (strings, or lists of {role, content})",
    "TRL standard and conversational, explicit or implicit prompt",
    read_trl,
    is_chat,
)
