"""TRL preference datasets: standard (strings), conversational (messages), each with or without its own prompt.

Without a prompt both sides hold the whole conversation. Messages are split by turns: the prompt is what both sides
share up to the last shared turn that an assistant answers, so a reply is never cut. Strings have no turns: the prompt
is the shared text before the last white space in it, so a word is never cut, and the space goes with the word that
follows, where most tokenizers have it. A string prompt beside conversational sides also means implicit prompt. Written
are explicit prompts only, and tools as JSON text, which TRL's trainers read.

Strings without a prompt beside a column that may be one (question, instruction, ...) are refused: what their answers
have in common is not what was asked. `columns:` says where the prompt is, or `prompt: null` that there is none.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.generic import PAIR_OPTIONAL
from prefkit.formats.reading import (
    ASKED,
    BESIDE,
    Columns,
    Format,
    Row,
    Unreadable,
    holds_messages,
    optional_of,
    prompt_of,
    require,
    says_more,
    system_of,
    with_system,
)
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
    without = columns.get("prompt") == "" or ("prompt" not in columns and "prompt" not in row)
    prompt = None if without else prompt_of(row, {**columns, "system": ""})
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt, chosen, rejected = split_sides(chosen, rejected)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in columns and (name := _asked_elsewhere(row, columns)):
            raise Unreadable(name, "prompt_elsewhere")
        prompt, chosen, rejected = _split_text(chosen, rejected)
    pair = {"prompt": with_system(prompt, *system_of(row, columns)), "chosen": chosen, "rejected": rejected}
    tools = optional_of(row, columns, "tools")
    return [{**pair, "tools": tools} if tools else pair]


def _asked_elsewhere(row: Row, columns: Columns) -> str | None:
    """The first column that holds a text or a list under a name that a prompt may have, and is not mapped."""
    mapped = [*columns.values()]
    return next(
        (n for n, value in row.items() if n.casefold() in ASKED and n not in mapped and isinstance(value, (str, list))),
        None,
    )


def write_trl(pair: Written) -> list[dict[str, Any]]:
    """One row: strings of a text dataset, messages of a chat dataset."""
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return [_with_tools(row, pair)]


TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


def write_trl_tokenized(pair: Written) -> list[dict[str, Any]]:
    """One row: the tokens that were scored, and the sums of their log-probs."""
    return [{name: pair.row[name] for name in TOKENIZED}]


def write_trl_unpaired(pair: Written) -> list[dict[str, Any]]:
    """Two rows: the chosen completion with label true, the rejected one with false."""
    sides = ((pair.chosen, True), (pair.rejected, False))
    return [_with_tools({"prompt": pair.prompt, "completion": side, "label": label}, pair) for side, label in sides]


def _with_tools(row: dict[str, Any], pair: Written) -> dict[str, Any]:
    return {**row, "tools": tools_text(pair)} if pair.tools else row


is_chat = holds_messages("chosen")


def detect_trl(row: Row) -> str | None:
    """Both sides are strings (no transcripts), or conversations, and nothing speaks for a richer layout.

    Without a prompt no other column may be one; beside a prompt none may be a part of it.
    """
    sides = [row.get("chosen"), row.get("rejected")]
    if (
        OTHERS & set(row)
        or says_more(row, BESIDE if "prompt" in row else ASKED)
        or not isinstance(row.get("prompt", ""), (str, list))
    ):
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
    ("prompt", "chosen", "rejected", "tools", "system"),
    False,
    "[prompt,] chosen, rejected (strings, or lists of {role, content}) [, tools]",
    "TRL standard and conversational, explicit or implicit prompt",
    read_trl,
    is_chat,
    detect=detect_trl,
    required=("chosen", "rejected"),
)
TRL_WRITER = Writer(
    "trl",
    "prompt, chosen, rejected (strings, or lists of {role, content}) [, tools]",
    "TRL: DPOTrainer and its kin; explicit prompt",
    write_trl,
    reference="sums",
)
TRL_UNPAIRED_WRITER = Writer(
    "trl_unpaired",
    "prompt, completion, label (two rows a pair) [, tools]",
    "TRL: KTOTrainer, BCOTrainer",
    write_trl_unpaired,
)
TRL_TOKENIZED_WRITER = Writer(
    "trl_tokenized",
    "prompt_ids, chosen_ids, rejected_ids (lists of int), ref_chosen_logps, ref_rejected_logps (sums, in nats)",
    "a reference's own tokens, under the names that TRL's preference collator reads",
    write_trl_tokenized,
    reference="ids",
)
