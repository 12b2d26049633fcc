"""NeMo-RL preference data: a context and ranked completions. The LOWER rank is the better one.

DPO there takes exactly two completions and stops at a tie. Messages go to the chat template whole, tool calls included,
but without a list of tools.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.fields import messages, number, objects
from prefkit.formats.reading import Columns, Format, Row, Unreadable
from prefkit.formats.turns import refuse_tools
from prefkit.formats.writing import Writer, Written, as_messages

FIELDS = "context[], completions[{rank, completion[]}]"
DIRECTION = "the lower rank is better"


def read_nemo_rl(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    if len(objects(row, "completions")) != 2:
        raise Unreadable("completions", "not_two_completions")
    one, two = (number(row, f"completions.{place}.rank") for place in (0, 1))
    if one == two:
        raise Unreadable("completions", "tie")
    best, worst = (0, 1) if one < two else (1, 0)
    chosen, rejected = (messages(row, f"completions.{place}.completion") for place in (best, worst))
    return [{"prompt": messages(row, "context"), "chosen": chosen, "rejected": rejected}]


def write_nemo_rl(pair: Written) -> list[dict[str, Any]]:
    """One row: chosen has rank 0, rejected rank 1."""
    refuse_tools(pair)
    sides = (as_messages(side, "assistant") for side in (pair.chosen, pair.rejected))
    completions = [{"rank": rank, "completion": side} for rank, side in enumerate(sides)]
    return [{"context": as_messages(pair.prompt, "user"), "completions": completions}]


def detect_nemo_rl(row: Row) -> str | None:
    """Completions that have a rank and a completion each."""
    completions = row.get("completions")
    if not isinstance(completions, list) or not completions or not isinstance(row.get("context"), list):
        return None
    if all(isinstance(c, Mapping) and "rank" in c and "completion" in c for c in completions):
        return "it has a context, and completions with rank and completion"
    return None


NEMO_RL = Format(
    "nemo_rl",
    "pairs",
    (),
    False,
    FIELDS,
    "NeMo-RL preference data",
    read_nemo_rl,
    lambda _row, _columns: True,
    DIRECTION,
    detect_nemo_rl,
)
NEMO_RL_WRITER = Writer("nemo_rl", FIELDS, "NeMo-RL: PreferenceDataset", write_nemo_rl)
