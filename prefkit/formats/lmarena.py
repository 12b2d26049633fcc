"""LMArena (lmsys/chatbot_arena_conversations, lmarena-ai): two models' conversations with one person, and a vote.

`winner` is model_a, model_b, or one of three ties (tie, "tie (bothbad)", both_bad): a tie is not a win for b. Both
conversations are whole, and the same person wrote the user turns of both, so they must be equal. The prompt is what
both share up to the last shared user turn. Where earlier answers differ already, the vote is about all that follows:
each side then holds the rest of its conversation, user turns included.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.fields import messages, named, said, verdict
from prefkit.formats.reading import Columns, Format, Row, Unreadable

WINNER = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie", "both_bad": "tie"}


def _num_shared(a: list[Mapping[str, Any]], b: list[Mapping[str, Any]]) -> int:
    """How many first messages are the prompt: those that both share, up to a user turn."""
    same = [one == other for one, other in zip(said(a), said(b), strict=False)]
    num = same.index(False) if False in same else len(same)
    while num and a[num - 1]["role"] != "user":
        num -= 1
    return num


def read_lmarena(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    a, b = messages(row, "conversation_a"), messages(row, "conversation_b")
    asked, other = ([turn for turn in said(side) if turn[0] != "assistant"] for side in (a, b))
    if asked != other:
        raise Unreadable("conversation_b", "different_prompts")
    num = _num_shared(a, b)
    if not num:
        raise Unreadable("conversation_a", "no_shared_prompt")
    for name, side in (("conversation_a", a), ("conversation_b", b)):
        if len(side) == num:
            raise Unreadable(name, "no_assistant_turn")
    models = {"model_a": row.get("model_a"), "model_b": row.get("model_b")}
    return [
        {
            "prompt": a[:num],
            "response_a": a[num:],
            "response_b": b[num:],
            "votes": verdict(row, "winner", WINNER),
            **models,
        }
    ]


LMARENA = Format(
    "lmarena",
    "comparisons",
    (),
    False,
    "conversation_a[], conversation_b[], winner, model_a, model_b",
    "Chatbot Arena battles; a side holds everything from the first answer that differs",
    read_lmarena,
    lambda _row, _columns: True,
    "the model that winner names is better; tie, tie (bothbad) and both_bad are ties",
    lambda row: named(row, "conversation_a", "conversation_b", "winner"),
)
