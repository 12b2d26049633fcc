"""What formats of conversations share: where the prompt ends, what a format cannot hold, and tool calls without ids.

A conversation whose prompt is implicit is cut by turns, after the last turn that both sides share and that an assistant
answers, so a reply is never cut. Tool calls are {"function": {"name", "arguments"}}; formats that write a call as
{"name", "arguments"} know it by its place alone, so ids are left out there and answers must come in the calls' order.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefkit.format import EXTRA_KEYS
from prefkit.formats.reading import Unreadable
from prefkit.formats.writing import Messages, Unwritable, Written, as_json, as_messages, from_json

ASKS = ("user", "tool")  # whom an assistant answers
ANSWER_KEYS = ("tool_call_id", "name")
TOOL_KEYS = ("tool_calls", *ANSWER_KEYS)
CALL_KEYS = {"assistant": TOOL_KEYS[:1], "tool": ANSWER_KEYS}  # what a format can tell by the place of a turn


def said(turn: Any) -> Any:
    """What of a message becomes part of a record, in which two messages are the same or are not; ids do not count."""
    if not isinstance(turn, Mapping):
        return turn
    more = {key: turn[key] for key in (*EXTRA_KEYS, "extra") if turn.get(key) not in (None, "", [])}
    return turn.get("role"), turn.get("content"), more


def split_sides(
    chosen: Sequence[Any], rejected: Sequence[Any], field: str = "prompt"
) -> tuple[list[Any], list[Any], list[Any]]:
    """The prompt that two conversations share, and what is left of each.

    Raises:
        Unreadable: they share no turn that an assistant answers; `field` is at fault.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and said(chosen[shared]) == said(rejected[shared]):
        shared += 1
    while shared and not (isinstance(chosen[shared - 1], Mapping) and chosen[shared - 1].get("role") in ASKS):
        shared -= 1
    if not shared:
        raise Unreadable(field, "no_shared_prompt")
    return list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:])


def whole_sides(pair: Written) -> tuple[Messages, Messages]:
    """Both conversations from their first turn on, where `split_sides` finds the prompt again.

    Raises:
        Unwritable: the sides begin with turns that they share, so the prompt would end elsewhere.
    """
    prompt = as_messages(pair.prompt, "user")
    chosen, rejected = as_messages(pair.chosen, "assistant"), as_messages(pair.rejected, "assistant")
    try:
        kept = split_sides(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)
    except Unreadable:
        kept = False
    if not kept:
        raise Unwritable("prompt_would_move")
    return prompt + chosen, prompt + rejected


def one_answer(side: str | Messages) -> dict[str, Any]:
    """A side that is one assistant turn.

    Raises:
        Unwritable: it has several turns, or another role.
    """
    messages = as_messages(side, "assistant")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Unwritable("more_than_one_turn")
    return messages[0]


def refuse_more(messages: Messages, held: Sequence[str] = (), roles: Sequence[str] = ()) -> None:
    """See that a format holds everything in the messages.

    Args:
        messages: of the prompt or a side.
        held: the keys that the format holds besides role and content.
        roles: those that its consumer knows; none given: any.

    Raises:
        Unwritable: by the name of the first key that it does not hold, or `unknown_role`.
    """
    for message in messages:
        more = [key for key in message if key not in ("role", "content", *held)]
        is_answer = message["role"] == "tool" and not set(held) & set(TOOL_KEYS[:2])
        if is_answer or set(more) & set(TOOL_KEYS[:2]):
            raise Unwritable("tool_calls")
        if more:
            raise Unwritable(more[0])
        if roles and message["role"] not in roles:
            raise Unwritable("unknown_role")


def refuse_tools(pair: Written) -> None:
    """For a format that has no place for the tools a prompt offers.

    Raises:
        Unwritable: there are some.
    """
    if pair.tools:
        raise Unwritable("tools")


def tools_text(pair: Written) -> str:
    """The tools as JSON: text has one type in every row, which readers of columns need; empty without tools."""
    return as_json(pair.tools) if pair.tools else ""


def functions_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message as {"name", "arguments"}, arguments that are JSON text as the object they stand for.

    Raises:
        Unwritable: they are no function calls, or the text is no JSON, or a number in it is not finite.
    """
    try:
        called = [call.get("function", call) for call in message.get("tool_calls", [])]
        functions = [{"name": f["name"], "arguments": _parsed(f["arguments"])} for f in called]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise Unwritable("tool_calls") from None
    if not all(isinstance(function["name"], str) for function in functions):
        raise Unwritable("tool_calls")
    return functions


def _parsed(arguments: Any) -> Any:
    return from_json(arguments) if isinstance(arguments, str) else arguments


def calls_from(text: Any, field: str) -> list[dict[str, Any]]:
    """The tool calls that the JSON of one {"name", "arguments"}, or of a list of them, stands for.

    Raises:
        Unreadable: it is no such JSON.
    """
    try:
        found = json.loads(text)
        called = found if isinstance(found, list) else [found]
        calls = [{"type": "function", "function": {"name": f["name"], "arguments": f["arguments"]}} for f in called]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Unreadable(field, "not_tool_calls") from None
    if not calls:
        raise Unreadable(field, "not_tool_calls")
    return calls


def refuse_disorder(messages: Messages) -> None:
    """See that calls are known by their place: each tool turn answers the next open call.

    An id is left out then, and so is a tool turn's name, which the call has; nothing else may be lost.

    Raises:
        Unwritable: an id or a name says otherwise, or a turn holds more than its place can tell.
    """
    names: list[Any] = []
    ids: list[Any] = []
    for message in messages:
        refuse_more([message], CALL_KEYS.get(message["role"], ()))
        if message["role"] != "tool":
            names = [function["name"] for function in functions_of(message)]
            ids = [call.get("id") for call in message.get("tool_calls", [])]
            continue
        name, known = (names.pop(0), ids.pop(0)) if names else (None, None)
        if message.get("tool_call_id", known) != known or message.get("name", name) != name:
            raise Unwritable("tool_call_order")
