"""Stack Exchange: ready-made pairs (lvwerra/stack-exchange-paired) and scored answers (HuggingFaceH4's preferences).

In the pairs `response_j` was voted above `response_k`; nothing in the names says so. In the other set `pm_score` is the
rounded log2 of 1 + votes, plus 1 for the accepted answer, and -1 below zero votes: higher is better, ties are common.
Its texts are HTML, and stay HTML; the pairs are Markdown.
"""

from typing import Any

from prefkit.formats.fields import first, named, objects, text
from prefkit.formats.reading import Columns, Format, Row, require


def read_paired(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    question, better, worse = (text(row, name) for name in ("question", "response_j", "response_k"))
    return [{"prompt": question, "chosen": better, "rejected": worse}]


def read_scored(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, as many candidates as the question has answers."""
    question = text(row, "question")
    return [
        {
            "prompt": question,
            "response": require(row, f"answers.{at}.text"),
            "score": require(row, f"answers.{at}.pm_score"),
        }
        for at in range(len(objects(row, "answers")))
    ]


def _detect(row: Row) -> str | None:
    has = "question" in row and "pm_score" in first(row, "answers")
    return "it has question and answers[] with pm_score" if has else None


STACKEXCHANGE_PAIRED = Format(
    "stackexchange_paired",
    "pairs",
    (),
    False,
    "question, response_j, response_k",
    "Stack Exchange pairs: j was voted above k",
    read_paired,
    lambda _row, _columns: False,
    "response_j is better",
    lambda row: named(row, "question", "response_j", "response_k"),
)
STACKEXCHANGE = Format(
    "stackexchange",
    "candidates",
    (),
    False,
    "question, answers[{text, pm_score}]",
    "Stack Exchange answers with the score of their votes; HTML stays HTML",
    read_scored,
    lambda _row, _columns: False,
    "a higher pm_score is better",
    _detect,
)
