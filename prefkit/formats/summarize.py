"""OpenAI's summarize_from_feedback, its comparisons: a Reddit post and two summaries, of which a person chose one.

`choice` is the place of the better summary in `summaries`: 0 is the first. The prompt is the layout of the paper
(Stiennon et al. 2020, arXiv 2009.01325): subreddit, title and post, closed by "TL;DR:"; the summaries begin with the
space that follows it, and keep it. News articles (part of the validation split) have no post, and are rejects.
"""

from typing import Any

from prefkit.formats.fields import objects, text, verdict
from prefkit.formats.reading import Columns, Format, Row, Unreadable

CHOICE = {"0": "a", "1": "b"}


def read_openai_summarize(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    subreddit, title, post = (text(row, f"info.{name}") for name in ("subreddit", "title", "post"))
    summaries = objects(row, "summaries")
    if len(summaries) != 2:
        raise Unreadable("summaries", "length_mismatch")
    return [
        {
            "prompt": f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
            "response_a": text(row, "summaries.0.text"),
            "response_b": text(row, "summaries.1.text"),
            "votes": verdict(row, "choice", CHOICE),
            "model_a": summaries[0].get("policy"),
            "model_b": summaries[1].get("policy"),
        }
    ]


def _detect(row: Row) -> str | None:
    has = isinstance(row.get("info"), dict) and "summaries" in row and "choice" in row
    return "it has info, summaries, choice" if has else None


OPENAI_SUMMARIZE = Format(
    "openai_summarize",
    "comparisons",
    (),
    False,
    "info{post, title, subreddit}, summaries[{text, policy}], choice",
    "summarize_from_feedback comparisons; the prompt is subreddit, title and post, then TL;DR:",
    read_openai_summarize,
    lambda _row, _columns: False,
    "choice 0: the first summary is better; 1: the second",
    _detect,
)
