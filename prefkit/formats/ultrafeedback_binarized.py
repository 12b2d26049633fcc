"""UltraFeedback binarized (HuggingFaceH4/ultrafeedback_binarized, and many that follow it): conversations with scores.

Both sides begin with the prompt, which `prompt` repeats as the text of the first user turn alone, so the prompt is what
the sides share. `messages` is chosen once more. Its splits are called train_prefs and test_prefs.
"""

from typing import Any

from prefkit.formats.fields import messages
from prefkit.formats.reading import Columns, Format, Row, require
from prefkit.formats.turns import one_answer, refuse_more, refuse_tools, split_sides, whole_sides
from prefkit.formats.writing import Messages, Writer, Written, scores_of

FIELDS = "prompt, prompt_id, chosen[], rejected[], messages[], score_chosen, score_rejected"


def read_scored(row: Row, chosen_score: str, rejected_score: str) -> dict[str, Any]:
    """The pair of two whole conversations and their scores under these names, where they are not null."""
    prompt, chosen, rejected = split_sides(messages(row, "chosen"), messages(row, "rejected"))
    scores = {"chosen_score": require(row, chosen_score), "rejected_score": require(row, rejected_score)}
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | {name: score for name, score in scores.items() if score is not None}


def read_ultrafeedback_binarized(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    return [read_scored(row, "score_chosen", "score_rejected")]


def first_question(conversation: Messages) -> str:
    """The text of the first user turn, which layouts of whole conversations repeat as `prompt`; empty without one."""
    return next((str(turn["content"]) for turn in conversation if turn["role"] == "user"), "")


def whole_plain_sides(pair: Written) -> tuple[Messages, Messages]:
    """Both conversations from their first turn on, of role and content alone, each ending with its one answer.

    Raises:
        Unwritable: the pair holds more than that.
    """
    refuse_tools(pair)
    for side in (pair.chosen, pair.rejected):
        one_answer(side)
    chosen, rejected = whole_sides(pair)
    refuse_more(chosen)
    refuse_more(rejected)
    return chosen, rejected


def write_ultrafeedback_binarized(pair: Written) -> list[dict[str, Any]]:
    """One row; its consumers take the last turn of each side for the answer, and the higher score for the better."""
    chosen, rejected = whole_plain_sides(pair)
    scores = scores_of(pair)
    return [
        {
            "prompt": first_question(chosen),
            "prompt_id": pair.row["prompt_id"],
            "chosen": chosen,
            "rejected": rejected,
            "messages": chosen,
            "score_chosen": scores[0],
            "score_rejected": scores[1],
        }
    ]


def detect_ultrafeedback_binarized(row: Row) -> str | None:
    """Two lists, each with its score under these names."""
    if not all(isinstance(row.get(side), list) for side in ("chosen", "rejected")):
        return None
    if "score_chosen" in row and "score_rejected" in row:
        return "chosen and rejected are conversations, with score_chosen and score_rejected"
    return None


ULTRAFEEDBACK_BINARIZED = Format(
    "ultrafeedback_binarized",
    "pairs",
    (),
    False,
    FIELDS,
    "UltraFeedback binarized; both sides hold the whole conversation",
    read_ultrafeedback_binarized,
    lambda _row, _columns: True,
    detect=detect_ultrafeedback_binarized,
)
ULTRAFEEDBACK_BINARIZED_WRITER = Writer(
    "ultrafeedback_binarized", FIELDS, "alignment-handbook and its kin", write_ultrafeedback_binarized
)
