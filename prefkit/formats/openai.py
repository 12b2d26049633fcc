"""OpenAI preference fine-tuning: one JSON line an example, a prompt and two outputs of one assistant message each.

Tool calls need an id, and their arguments are JSON text, never an object; beside calls the content may be null. Ids
that a pair lacks are made, numbered through the conversation, and tool turns take them in order. Only text is accepted,
and no reasoning.
"""

import json
from collections.abc import Mapping
from itertools import count
from typing import Any

from prefkit.formats.fields import messages as read_messages
from prefkit.formats.reading import Columns, Format, Row, require
from prefkit.formats.turns import TOOL_KEYS, functions_of, one_answer, refuse_more
from prefkit.formats.writing import Messages, Unwritable, Writer, Written, as_messages

FIELDS = "input{messages[], tools[], parallel_tool_calls}, preferred_output[], non_preferred_output[]"
OUTPUTS = ("preferred_output", "non_preferred_output")
ROLES = ("system", "developer", "user", "assistant", "tool")


def read_openai(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair; calls stay as they are, their arguments text."""
    prompt, chosen, rejected = (read_messages(row, name) for name in ("input.messages", *OUTPUTS))
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tools = require(row, "input").get("tools") if isinstance(row.get("input"), Mapping) else None
    return [{**pair, "tools": tools} if tools else pair]


def _as_accepted(messages: Messages) -> Messages:
    """Messages by OpenAI's rules: an id a call, arguments as text, no empty content beside calls."""
    given = {call.get("id") for message in messages for call in message.get("tool_calls", [])}
    made = (name for name in map("call_{}".format, count()) if name not in given)
    open_ids: list[str] = []
    accepted: Messages = []
    for message in messages:
        if functions := functions_of(message):
            ids = [call.get("id") or next(made) for call in message["tool_calls"]]
            calls = [
                {"id": name, "type": "function", "function": {"name": f["name"], "arguments": _text(call)}}
                for name, f, call in zip(ids, functions, message["tool_calls"], strict=True)
            ]
            open_ids = ids
            accepted.append({**message, "content": message["content"] or None, "tool_calls": calls})
        elif message["role"] == "tool":
            known = message.get("tool_call_id") or (open_ids[0] if open_ids else None)
            if known not in open_ids:
                raise Unwritable("tool_call_order")
            open_ids = [name for name in open_ids if name != known]
            accepted.append({"role": "tool", "tool_call_id": known, "content": message["content"]})
        else:
            accepted.append(message)
    return accepted


def _text(call: Mapping[str, Any]) -> str:
    arguments = call.get("function", call)["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def write_openai(pair: Written) -> list[dict[str, Any]]:
    """One row."""
    prompt = as_messages(pair.prompt, "user")
    outputs = {}
    for name, side in zip(OUTPUTS, (pair.chosen, pair.rejected), strict=True):
        conversation = [*prompt, one_answer(side)]
        refuse_more(conversation, TOOL_KEYS, ROLES)
        *accepted, answer = _as_accepted(conversation)
        outputs[name] = [answer]
    given: dict[str, Any] = {"messages": accepted}
    if pair.tools:
        given |= {"tools": pair.tools, "parallel_tool_calls": True}
    return [{"input": given, **outputs}]


def detect_openai(row: Row) -> str | None:
    """An input with messages, and both outputs."""
    given = row.get("input")
    if isinstance(given, Mapping) and "messages" in given and all(isinstance(row.get(name), list) for name in OUTPUTS):
        return "it has input.messages, preferred_output and non_preferred_output"
    return None


OPENAI_PREFERENCE = Format(
    "openai_preference",
    "pairs",
    (),
    False,
    FIELDS,
    "OpenAI preference fine-tuning (DPO)",
    read_openai,
    lambda _row, _columns: True,
    detect=detect_openai,
)
OPENAI_PREFERENCE_WRITER = Writer(
    "openai_preference", FIELDS, "OpenAI and Azure OpenAI preference fine-tuning; .jsonl only", write_openai
)
