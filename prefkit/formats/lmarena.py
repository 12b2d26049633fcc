"""LMArena (lmsys/chatbot_arena_conversations, lmarena-ai): two models' conversations with one person, and a vote.

`winner` is model_a, model_b, or one of three ties (tie, "tie (bothbad)", both_bad): a tie is not a win for b. Both
conversations are whole, and the same person wrote the user turns of both, so they must be equal. The prompt is what
both share up to the last shared turn that an assistant answers. Where earlier answers differ already, the vote is about
all that follows: each side then holds the rest of its conversation, user turns included.
"""

from typing import Any

from prefkit.formats.fields import messages, named, verdict
from prefkit.formats.reading import Columns, Format, Row, Unreadable
from prefkit.formats.turns import said, split_sides

WINNER = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie", "both_bad": "tie"}


def read_lmarena(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    a, b = messages(row, "conversation_a"), messages(row, "conversation_b")
    asked, other = ([said(turn) for turn in side if turn["role"] != "assistant"] for side in (a, b))
    if asked != other:
        raise Unreadable("conversation_b", "different_prompts")
    prompt, *sides = split_sides(a, b, "conversation_a")
    for name, side in zip(("conversation_a", "conversation_b"), sides, strict=True):
        if not side:
            raise Unreadable(name, "no_assistant_turn")
    models = {"model_a": row.get("model_a"), "model_b": row.get("model_b")}
    return [
        {
            "prompt": prompt,
            "response_a": sides[0],
            "response_b": sides[1],
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
