"""axolotl's chat_template.default for DPO: the prompt as messages, and one message a side.

It copies role and content of each message and nothing else, and has no place for tools: what more a message holds would
be dropped there without a word, so such a pair is not written.
"""

from typing import Any

from prefkit.formats.turns import one_answer, refuse_more, refuse_tools
from prefkit.formats.writing import Writer, Written, as_messages

ROLES = ("system", "user", "assistant")  # it stops at any other


def write_axolotl(pair: Written) -> list[dict[str, Any]]:
    """One row."""
    refuse_tools(pair)
    messages = as_messages(pair.prompt, "user")
    chosen, rejected = one_answer(pair.chosen), one_answer(pair.rejected)
    refuse_more([*messages, chosen, rejected], roles=ROLES)
    return [{"messages": messages, "chosen": chosen, "rejected": rejected}]


AXOLOTL_WRITER = Writer(
    "axolotl",
    "messages[], chosen{}, rejected{}",
    "axolotl: type: chat_template.default in a dpo or orpo dataset",
    write_axolotl,
)
