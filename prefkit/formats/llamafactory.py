"""LLaMA-Factory preference data: alpaca rows, sharegpt conversations, and the v1 layout of whole conversations.

* alpaca: a prompt is instruction and input joined by a line break; `system` and `history`, pairs of a question and its
  answer, come before it.
* sharegpt: turns {from, value}. After an optional first `system` turn it wants questions (human, observation) and
  answers (gpt, function_call) in turn, beginning and ending with a question; a row that breaks this is left out there
  without an error, so it is not written here. The value of a function_call is the JSON of one call or of a list,
  without any other text, and one observation answers it.
* v1: chosen_messages and rejected_messages with content in parts {type, value} and a loss_weight, which is not read.

`dataset_info.json` beside the files says which columns to take: without "ranking": true they would be read as SFT data.
Where it lists columns or tags at all, what it leaves out does not exist there, so all of them are listed.
"""

import json
from collections.abc import Mapping
from typing import Any

from prefkit.formats.fields import messages
from prefkit.formats.reading import ASKED, Columns, Format, Row, Unreadable, read_fields, says_more, with_system
from prefkit.formats.turns import (
    ASKS,
    calls_from,
    functions_of,
    one_answer,
    refuse_disorder,
    refuse_more,
    refuse_tools,
    split_sides,
    tools_text,
)
from prefkit.formats.writing import Messages, Unwritable, Writer, Written, as_json, as_messages, one_text

ALPACA_OPTIONAL = ("input", "system", "history", "tools")
NOT_ALPACA = ASKED - {"instruction", "input", "system", "history"} | {"prompt"}
ALPACA_FIELDS = "instruction, input, chosen, rejected [, system, history[[question, answer]]]"
SHAREGPT_OPTIONAL = ("system", "tools")
SHAREGPT_FIELDS = "conversations[{from, value}], chosen{from, value}, rejected{from, value} [, tools]"
ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
TAG_OF = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


# alpaca


def read_alpaca(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    record = read_fields(row, columns, ("instruction", "chosen", "rejected"), ALPACA_OPTIONAL)
    parts = [record.pop("instruction"), record.pop("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise Unreadable("instruction" if isinstance(parts[1], str) else "input", "wrong_type")
    before: Messages = []
    for turn in _history(record.pop("history", [])):
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n".join(part for part in parts if part)
    asked = [*before, {"role": "user", "content": question}] if before else question
    return [{"prompt": with_system(asked, record.pop("system", None), "system"), **record}]


def _history(value: Any) -> list[list[Any]]:
    if not isinstance(value, list):
        raise Unreadable("history", "not_a_list")
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        raise Unreadable("history", "wrong_type")
    return value


def write_alpaca(pair: Written) -> list[dict[str, Any]]:
    """One row; all columns in every row, as dataset_info.json names them."""
    refuse_tools(pair)
    turns = as_messages(pair.prompt, "user")
    refuse_more(turns)
    system = "".join(turn["content"] for turn in turns[:1] if turn["role"] == "system")
    turns = turns[1:] if system else turns  # an empty one cannot be told from none
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Unwritable("turns_out_of_order")
    texts = [turn["content"] for turn in turns]
    return [
        {
            "instruction": texts[-1],
            "input": "",
            "chosen": one_text(pair.chosen, "assistant"),
            "rejected": one_text(pair.rejected, "assistant"),
            "system": system,
            "history": [list(turn) for turn in zip(texts[:-1:2], texts[1::2], strict=True)],
        }
    ]


def detect_alpaca(row: Row) -> str | None:
    """An instruction with two answers that are strings, and no other column that may be the prompt."""
    if not says_more(row, NOT_ALPACA) and all(
        isinstance(row.get(name), str) for name in ("instruction", "chosen", "rejected")
    ):
        return "instruction, chosen and rejected are strings"
    return None


# sharegpt


def _read_turn(turn: Any, field: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Unreadable(field, "wrong_type")
    if "from" not in turn or "value" not in turn:
        raise Unreadable(field, "missing_field")
    tag, value = turn["from"], turn["value"]
    if not isinstance(tag, str) or tag not in ROLE_OF:
        raise Unreadable(field, "unknown_role")
    if tag == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": calls_from(value, field)}
    return {"role": ROLE_OF[tag], "content": value}


def read_sharegpt(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair; a `system` column counts where the conversation has no system turn of its own."""
    record = read_fields(row, columns, ("conversations", "chosen", "rejected"), SHAREGPT_OPTIONAL)
    turns, system = record.pop("conversations"), record.pop("system", None)
    if not isinstance(turns, list):
        raise Unreadable("conversations", "not_a_list")
    prompt = [_read_turn(turn, "conversations") for turn in turns]
    sides = {side: [_read_turn(record.pop(side), side)] for side in ("chosen", "rejected")}
    return [{"prompt": with_system(prompt, system, "system"), **sides, **record}]


def _written_turn(message: Mapping[str, Any]) -> dict[str, str]:
    if message["role"] not in TAG_OF:
        raise Unwritable("unknown_role")
    functions = functions_of(message)
    if not functions:
        return {"from": TAG_OF[message["role"]], "value": message["content"]}
    if message["content"]:
        raise Unwritable("text_beside_tool_calls")
    value = functions[0] if len(functions) == 1 else functions
    return {"from": "function_call", "value": as_json(value)}


def write_sharegpt(pair: Written) -> list[dict[str, Any]]:
    """One row; ids of tool calls are left out, as each observation answers the call before it."""
    prompt, chosen, rejected = as_messages(pair.prompt, "user"), one_answer(pair.chosen), one_answer(pair.rejected)
    for answer in (chosen, rejected):
        refuse_disorder([*prompt, answer])
    turns = prompt[1:] if [turn["role"] for turn in prompt[:1]] == ["system"] else prompt
    due = [(*ASKS,), ("assistant",)] * (len(turns) // 2) + [(*ASKS,)]
    if len(turns) != len(due) or any(turn["role"] not in roles for turn, roles in zip(turns, due, strict=True)):
        raise Unwritable("turns_out_of_order")
    return [
        {
            "conversations": [_written_turn(turn) for turn in prompt],
            "chosen": _written_turn(chosen),
            "rejected": _written_turn(rejected),
            "tools": tools_text(pair),
        }
    ]


def detect_sharegpt(row: Row) -> str | None:
    """Turns with from and value, and one such turn a side."""
    turns, sides = row.get("conversations"), [row.get("chosen"), row.get("rejected")]
    if isinstance(turns, list) and turns and all(isinstance(t, Mapping) and "from" in t for t in [*turns, *sides]):
        return "conversations, chosen and rejected are turns with from and value"
    return None


# v1


def _read_parts(message: Mapping[str, Any], field: str) -> tuple[dict[str, Any], Any]:
    """A message of parts as ours, and the tools that one of its parts may hold."""
    read: dict[str, Any] = {"role": message["role"], "content": ""}
    parts, tools = message.get("content"), None
    for part in parts if isinstance(parts, list) else [{"type": "text", "value": parts}]:
        kind, value = (part.get("type"), part.get("value")) if isinstance(part, Mapping) else (None, None)
        if not isinstance(value, str):
            raise Unreadable(field, "wrong_type")
        if kind == "text":
            read["content"] += value
        elif kind == "reasoning":
            read["reasoning_content"] = read.get("reasoning_content", "") + value
        elif kind in ("tool_call", "tool_calls"):
            read["tool_calls"] = [*read.get("tool_calls", []), *calls_from(value, field)]
        elif kind == "tools":
            tools = value
        else:
            raise Unreadable(field, "not_text_content")
    return read, tools


def read_messages(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    conversations, tools = [], None
    for field in ("chosen_messages", "rejected_messages"):
        turns = [_read_parts(message, field) for message in messages(row, field)]
        tools = next((found for _, found in turns if found), tools)
        conversations.append([turn for turn, found in turns if not (found and turn["content"] == "")])
    prompt, chosen, rejected = split_sides(conversations[0], conversations[1])
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return [{**pair, "tools": tools} if tools else pair]


def detect_messages(row: Row) -> str | None:
    """Both whole conversations under these names."""
    if all(isinstance(row.get(name), list) for name in ("chosen_messages", "rejected_messages")):
        return "chosen_messages and rejected_messages are lists"
    return None


# dataset_info.json


def _dataset_info(files: Mapping[str, str], shared: Mapping[str, Any]) -> dict[str, str]:
    stanzas = {f"prefkit_{split}": {"file_name": name, "ranking": True, **shared} for split, name in files.items()}
    return {"dataset_info.json": json.dumps(stanzas, indent=2) + "\n"}


def alpaca_info(files: Mapping[str, str]) -> dict[str, str]:
    """The dataset_info.json that alpaca files need."""
    columns = {"prompt": "instruction", "query": "input"}
    columns |= {name: name for name in ("chosen", "rejected", "system", "history")}
    return _dataset_info(files, {"formatting": "alpaca", "columns": columns})


def sharegpt_info(files: Mapping[str, str]) -> dict[str, str]:
    """The dataset_info.json that sharegpt files need."""
    columns = {"messages": "conversations"} | {name: name for name in ("chosen", "rejected", "tools")}
    return _dataset_info(files, {"formatting": "sharegpt", "columns": columns, "tags": TAGS})


LLAMAFACTORY_ALPACA = Format(
    "llamafactory_alpaca",
    "pairs",
    ("instruction", "chosen", "rejected", *ALPACA_OPTIONAL),
    False,
    ALPACA_FIELDS,
    "LLaMA-Factory, formatting: alpaca",
    read_alpaca,
    lambda _row, _columns: True,  # any later row may have a system prompt or a history
    detect=detect_alpaca,
    required=("instruction", "chosen", "rejected"),
)
LLAMAFACTORY_SHAREGPT = Format(
    "llamafactory_sharegpt",
    "pairs",
    ("conversations", "chosen", "rejected", *SHAREGPT_OPTIONAL),
    False,
    SHAREGPT_FIELDS,
    "LLaMA-Factory, formatting: sharegpt",
    read_sharegpt,
    lambda _row, _columns: True,
    detect=detect_sharegpt,
    required=("conversations", "chosen", "rejected"),
)
LLAMAFACTORY_MESSAGES = Format(
    "llamafactory_messages",
    "pairs",
    (),
    False,
    "chosen_messages[], rejected_messages[] (content in parts {type, value})",
    "LLaMA-Factory v1",
    read_messages,
    lambda _row, _columns: True,
    detect=detect_messages,
)
LLAMAFACTORY_ALPACA_WRITER = Writer(
    "llamafactory_alpaca", ALPACA_FIELDS, "LLaMA-Factory: stage dpo; with dataset_info.json", write_alpaca, alpaca_info
)
LLAMAFACTORY_SHAREGPT_WRITER = Writer(
    "llamafactory_sharegpt",
    SHAREGPT_FIELDS,
    "LLaMA-Factory: stage dpo; with dataset_info.json",
    write_sharegpt,
    sharegpt_info,
)
