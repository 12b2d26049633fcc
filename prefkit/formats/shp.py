"""Stanford Human Preferences (stanfordnlp/SHP and SHP-2): a Reddit post and two comments on it.

`labels` is 1 where comment A is the better one and 0 where B is: not the place of the winner, which would be the other
way round. The scores are votes; a comment counts as better only where it came later and has more of them. Their
usual filter, a ratio of at least 2, is a matter for the rows (`score_ratio`), as a margin here is a difference.
"""

from typing import Any

from prefkit.formats.fields import named, text, verdict
from prefkit.formats.reading import Columns, Format, Row

LABELS = {"1": "a", "0": "b"}


def read_shp(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    return [
        {
            "prompt": text(row, "history"),
            "response_a": text(row, "human_ref_A"),
            "response_b": text(row, "human_ref_B"),
            "votes": verdict(row, "labels", LABELS),
            "score_a": row.get("score_A"),
            "score_b": row.get("score_B"),
        }
    ]


SHP = Format(
    "shp",
    "comparisons",
    (),
    False,
    "history, human_ref_A, human_ref_B, labels, score_A, score_B",
    "Stanford Human Preferences; the scores are votes, and a margin is their difference",
    read_shp,
    lambda _row, _columns: False,
    "labels 1: human_ref_A is better; 0: human_ref_B",
    lambda row: named(row, "history", "human_ref_A", "human_ref_B", "labels"),
)
