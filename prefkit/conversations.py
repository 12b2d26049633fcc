"""What a chat template is given of a pair: messages and tools as transformers has them, and whether it prints them.

Comes in: a chat row. Goes out: three conversations (prompt, prompt + chosen, prompt + rejected). A template that has no
place for tools leaves them out without a word, so that an empty answer would be trained: `marked` puts words that no
text holds where the tools, their calls and their results are, and they have to come out again.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = "qzx{}xzq"  # letters and digits, which no template changes and no JSON escapes


class Conversation(NamedTuple):
    """`messages` and `tools` as transformers knows them; `ask`: whether a reply is asked for."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    ask: bool

    def uses_tools(self) -> bool:
        """Whether tools are offered, called or answered."""
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)


def conversations_of(row: dict[str, Any]) -> list[Conversation]:
    """The three conversations of a chat row: prompt, chosen, rejected and, where there are some, tools."""
    prompt, chosen, rejected = ([_unpacked(m) for m in row[name]] for name in ("prompt", "chosen", "rejected"))
    tools = json.loads(row["tools"]) if row.get("tools") else None
    return [
        Conversation(prompt, tools, True),
        Conversation(prompt + chosen, tools, False),
        Conversation(prompt + rejected, tools, False),
    ]


def asking_of(row: dict[str, Any]) -> Conversation:
    """The conversation that asks for a reply: the prompt of a chat row and, where there are some, its tools."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    return Conversation([_unpacked(m) for m in row["prompt"]], tools, True)


def _unpacked(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates know it: arguments of a tool call as an object."""
    plain = {"role": message["role"], "content": message["content"]}
    if not message.get("extra"):
        return plain
    extra = json.loads(message["extra"])
    for function in _functions(extra.get("tool_calls")):
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):  # OpenAI writes it as JSON text
                function["arguments"] = json.loads(function["arguments"])
    return {**extra, **plain}


def _functions(calls_or_tools: Any) -> list[dict[str, Any]]:
    """The functions that a list of calls or tools names, each with or without its `function` around it."""
    listed = calls_or_tools if isinstance(calls_or_tools, list) else []
    inner = [one.get("function", one) for one in listed if isinstance(one, dict)]
    return [function for function in inner if isinstance(function, dict)]


def hidden_texts(conversation: Conversation) -> Iterator[str]:
    """Every text of a conversation but roles and contents: what tools and calls hold, names of keys too."""
    yield from _texts(conversation.tools)
    for message in conversation.messages:
        yield from _texts([value for key, value in message.items() if key not in ("role", "content")])


def _texts(value: Any) -> Iterator[str]:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            todo += one


def marked(conversation: Conversation, num_prompt: int) -> tuple[Conversation, list[str]]:
    """The same conversation with marks, and the marks that a template must print.

    Args:
        conversation: left as it is.
        num_prompt: messages of its prompt.

    Marked are the names of the tools that the prompt offers (where it asks for the reply) and of those that are called,
    what tools answer, and in a reply the content beside a call. What a template leaves out of a prompt's content beside
    a call, or of reasoning, it leaves out when the model is used, too.
    """
    copy: Conversation = Conversation(*json.loads(json.dumps(conversation)))
    marks: list[str] = []

    def put(holder: dict[str, Any], key: str) -> None:
        marks.append(MARK.format(len(marks)))
        holder[key] = marks[-1] + holder[key]

    named = list(_functions(copy.tools)) if copy.ask else []
    named += [function for message in copy.messages for function in _functions(message.get("tool_calls"))]
    for function in named:
        if isinstance(function.get("name"), str):
            put(function, "name")
    for number, message in enumerate(copy.messages):
        beside_call = number >= num_prompt and message.get("tool_calls")
        if message["content"].strip() and (message["role"] == "tool" or beside_call):
            put(message, "content")
    return copy, marks
