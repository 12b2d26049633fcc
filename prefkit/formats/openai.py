"""OpenAI preference fine-tuning: one JSON line an example, a prompt and two outputs of one assistant message each.

Tool calls need an id, and their arguments are JSON text, never an object; beside calls the content may be null. Ids
that a pair lacks are made, numbered through the prompt and both answers, and tool turns take them in order; the name of
a tool turn is left out, as the call has it. Only text is accepted, and no reasoning.
"""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from prefkit.formats.fields import messages as read_messages
from prefkit.formats.reading import Columns, Format, Row, require
from prefkit.formats.turns import ANSWER_KEYS, functions_of, one_answer, refuse_more
from prefkit.formats.writing import Messages, Unwritable, Writer, Written, as_json, as_messages

FIELDS = "input{messages[], tools[], parallel_tool_calls}, preferred_output[], non_preferred_output[]"
OUTPUTS = ("preferred_output", "non_preferred_output")
ROLES = ("system", "developer", "user", "assistant", "tool")
HELD = {"assistant": ("tool_calls", "name"), "tool": ANSWER_KEYS}


def read_openai(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair; calls stay as they are, their arguments text."""
    prompt, chosen, rejected = (read_messages(row, name) for name in ("input.messages", *OUTPUTS))
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tools = require(row, "input").get("tools") if isinstance(row.get("input"), Mapping) else None
    return [{**pair, "tools": tools} if tools else pair]


def _ids_of(message: Mapping[str, Any]) -> list[str | None]:
    """The id of each call of a message, None where it has none."""
    if not functions_of(message):
        return []
    ids = [call.get("id") or None for call in message["tool_calls"]]
    if not all(isinstance(name, str | None) for name in ids):
        raise Unwritable("tool_calls")
    return ids


def _as_accepted(messages: Messages, made: Iterator[str]) -> Messages:
    """Messages by OpenAI's rules: an id a call, arguments as text, no empty content beside calls."""
    open_calls: dict[str, str] = {}
    accepted: Messages = []
    for message in messages:
        if functions := functions_of(message):
            ids = [name or next(made) for name in _ids_of(message)]
            calls = [
                {"id": name, "type": "function", "function": {"name": f["name"], "arguments": _text(call)}}
                for name, f, call in zip(ids, functions, message["tool_calls"], strict=True)
            ]
            open_calls = {name: f["name"] for name, f in zip(ids, functions, strict=True)}
            accepted.append({**message, "content": message["content"] or None, "tool_calls": calls})
        elif message["role"] == "tool":
            known = message.get("tool_call_id") or next(iter(open_calls), None)
            if not isinstance(known, str) or known not in open_calls:
                raise Unwritable("tool_call_order")
            name = open_calls.pop(known)
            if message.get("name", name) != name:
                raise Unwritable("tool_call_order")
            accepted.append({"role": "tool", "tool_call_id": known, "content": message["content"]})
        else:
            accepted.append(message)
    return accepted


def _text(call: Mapping[str, Any]) -> str:
    arguments = call.get("function", call)["arguments"]
    return arguments if isinstance(arguments, str) else as_json(arguments)


def write_openai(pair: Written) -> list[dict[str, Any]]:
    """One row."""
    prompt, answers = as_messages(pair.prompt, "user"), [one_answer(side) for side in (pair.chosen, pair.rejected)]
    for message in (*prompt, *answers):
        refuse_more([message], HELD.get(message["role"], ("name",)), ROLES)
    taken = {name for message in (*prompt, *answers) for name in _ids_of(message)}
    made = (name for name in map("call_{}".format, count()) if name not in taken)
    given: dict[str, Any] = {"messages": _as_accepted(prompt, made)}
    outputs = {name: _as_accepted([answer], made) for name, answer in zip(OUTPUTS, answers, strict=True)}
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
