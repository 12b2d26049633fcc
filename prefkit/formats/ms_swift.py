"""ms-swift preference data: messages that end with the chosen answer, and rejected_response, the other answer's text.

`rejected_response` takes the place of everything after the last user or tool turn; `rejected_messages`, a second whole
conversation, can say more and is written where it has to. A tool call is a turn of its own there, role `tool_call`,
its content the JSON of {"name", "arguments"}; it belongs to the assistant turn before it. Its answer's role is `tool`
or `tool_response`. `tools` is the JSON of a list. A `system` column beside the messages becomes their first turn where
they have none of that role.
"""

from typing import Any

from prefkit.formats.fields import messages as read_messages
from prefkit.formats.reading import Columns, Format, Row, Unreadable, require, with_system
from prefkit.formats.turns import (
    ASKS,
    calls_from,
    functions_of,
    refuse_disorder,
    split_sides,
    tools_text,
    whole_sides,
)
from prefkit.formats.writing import Messages, Unwritable, Writer, Written, as_json, as_messages

FIELDS = "messages[], rejected_response | rejected_messages[] [, tools]"
READ_FIELDS = "messages[], rejected_response | rejected_messages[] [, system, tools]"


def _read_turns(row: Row, field: str) -> Messages:
    """Turns as we have them: calls go into the assistant turn that they follow."""
    turns: Messages = []
    for message in read_messages(row, field):
        if message["role"] == "tool_call":
            calls = calls_from(message.get("content"), field)
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            earlier = turns[-1].get("tool_calls")
            turns[-1] = {**turns[-1], "tool_calls": [*(earlier if isinstance(earlier, list) else []), *calls]}
        elif message["role"] == "tool_response":
            turns.append({**message, "role": "tool"})
        else:
            turns.append(dict(message))
    return turns


def read_ms_swift(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    turns = _read_turns(row, "messages")
    if row.get("rejected_messages") is not None:
        prompt, chosen, rejected = split_sides(turns, _read_turns(row, "rejected_messages"))
    else:
        text = require(row, "rejected_response")
        cut = 1 + max((i for i, turn in enumerate(turns) if turn["role"] in ASKS), default=-1)
        prompt, chosen, rejected = turns[:cut], turns[cut:], [{"role": "assistant", "content": text}]
    if not prompt or not chosen:
        raise Unreadable("messages", "no_assistant_turn" if prompt else "no_shared_prompt")
    pair = {"prompt": with_system(prompt, row.get("system"), "system"), "chosen": chosen, "rejected": rejected}
    return [{**pair, "tools": row["tools"]} if row.get("tools") else pair]


def _written_turns(messages: Messages) -> Messages:
    turns: Messages = []
    for message, follower in zip(messages, [*messages[1:], {"role": ""}], strict=True):
        if message["role"] == follower["role"] == "assistant":
            raise Unwritable("two_assistant_turns")  # ms-swift joins them
        calls = functions_of(message)
        if message["content"] or not calls:
            turns.append({"role": message["role"], "content": message["content"]})
        turns += [{"role": "tool_call", "content": as_json(call)} for call in calls]
    return turns


def write_ms_swift(pair: Written) -> list[dict[str, Any]]:
    """One row; ids of tool calls are left out, as their order says which answer is whose."""
    chosen, rejected = whole_sides(pair)
    for conversation in (chosen, rejected):
        refuse_disorder(conversation)
    row: dict[str, Any] = {"messages": _written_turns(chosen)}
    sides = [as_messages(side, "assistant") for side in (pair.chosen, pair.rejected)]
    if all(len(side) == 1 and "tool_calls" not in side[0] for side in sides):
        row["rejected_response"] = sides[1][0]["content"]
    else:
        row["rejected_messages"] = _written_turns(rejected)
    return [{**row, "tools": tools_text(pair)} if pair.tools else row]


def detect_ms_swift(row: Row) -> str | None:
    """Messages beside what was rejected, under these names."""
    for name in ("rejected_response", "rejected_messages"):
        if isinstance(row.get("messages"), list) and row.get(name) is not None:
            return f"it has messages and {name}"
    return None


MS_SWIFT = Format(
    "ms_swift",
    "pairs",
    (),
    False,
    READ_FIELDS,
    "ms-swift; messages end with the chosen answer",
    read_ms_swift,
    lambda _row, _columns: True,
    detect=detect_ms_swift,
)
MS_SWIFT_WRITER = Writer("ms_swift", FIELDS, "ms-swift: swift rlhf --rlhf_type dpo and its kin", write_ms_swift)
