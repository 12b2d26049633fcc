"""Two responses and a verdict, with the file's own column names: the better one becomes chosen.

`winner` is one label, or a list of votes (one path to a list, or a list of paths to one label each). What a label means
is the source's `labels:`; without them only words that cannot be taken for their opposite are read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefkit.formats.reading import (
    BESIDE,
    Columns,
    Format,
    Reader,
    Row,
    Unreadable,
    holds_messages,
    read_fields,
    require,
    says_more,
)

OPTIONAL = ("tools", "model_a", "model_b", "score_a", "score_b", "annotator")
WORDS: Mapping[str, str] = {
    "a": "a",
    "b": "b",
    "model_a": "a",
    "model_b": "b",
    "response_a": "a",
    "response_b": "b",
    "tie": "tie",
    "equal": "tie",
}  # no numbers: 0 is a tie here, the first side there
WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,300}))\.0+")  # a whole number as a column of floats has it in a .csv


def label_key(label: object) -> str:
    """A label as it is compared: 1, 1.0, "1" and "1.0" are one label, and case and white space do not count."""
    whole = int(label) if isinstance(label, float) and label.is_integer() else label
    text = str(whole).strip().casefold()
    written = WHOLE.fullmatch(text)
    return str(int(written[1])) if written else text


def votes_of(winner: Any, meaning: Mapping[str, str], field: str) -> list[str]:
    """The verdicts a | b | tie of a winner column; votes that are null were not given."""
    given = [vote for vote in (winner if isinstance(winner, list) else [winner]) if vote is not None]
    if not given:
        raise Unreadable(field, "no_verdict")
    if any(isinstance(vote, (list, dict)) for vote in given):
        raise Unreadable(field, "wrong_type")
    try:
        return [meaning[label_key(vote)] for vote in given]
    except KeyError:
        raise Unreadable(field, "unknown_label") from None


def read_comparisons(row: Row, columns: Columns, meaning: Mapping[str, str] = WORDS) -> list[dict[str, Any]]:
    """One row, one comparison.

    Args:
        row: of the file.
        columns: our names to the file's.
        meaning: what each label (by `label_key`) stands for: a | b | tie.
    """
    where = columns.get("winner", "winner")
    winner = [require(row, path) for path in where] if isinstance(where, list) else require(row, where)
    fields = read_fields(row, columns, ("prompt", "response_a", "response_b"), OPTIONAL)
    return [{**fields, "votes": votes_of(winner, meaning, where if isinstance(where, str) else "winner")}]


def with_labels(a: Sequence[Any], b: Sequence[Any], tie: Sequence[Any]) -> Reader:
    """The reader of a source that says what its labels mean."""
    meaning = {label_key(label): side for side, labels in (("a", a), ("b", b), ("tie", tie)) for label in labels}
    return lambda row, columns: read_comparisons(row, columns, meaning)


def _detect(row: Row) -> str | None:
    names = ("prompt", "response_a", "response_b", "winner")
    if not all(name in row for name in names) or says_more(row, BESIDE):
        return None
    try:
        votes_of(row["winner"], WORDS, "winner")
    except Unreadable:
        return None  # labels: has to say what it means
    return "it has " + ", ".join(names)


COMPARISONS = Format(
    "comparisons",
    "comparisons",
    ("prompt", "response_a", "response_b", "winner", *OPTIONAL, "system"),
    False,
    "prompt, response_a, response_b, winner or votes[] [, " + ", ".join(OPTIONAL) + "]",
    "two responses and who won; labels: {a: [1], b: [2], tie: [0]} says what the winner column means",
    read_comparisons,
    holds_messages("prompt", "response_a", "response_b"),
    "the side that most votes name; ties are dropped",
    _detect,
    ("prompt", "response_a", "response_b", "winner"),
)
