"""The three plain families: pairs, candidates (long and list form) and corrections, with the file's own column names.

`columns:` in the pipeline maps our names to the file's, with dotted paths for nested fields; a name left out is taken
as it is where the file has it. A column that the pipeline names must be there in every row (its value may be null).
`system` alone is never taken as it is: the pipeline has to name it.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.reading import (
    BESIDE,
    Columns,
    Format,
    Row,
    Unreadable,
    holds_messages,
    is_chat_field,
    optional_of,
    prompt_of,
    read_fields,
    require,
    says_more,
)
from prefkit.formats.turns import tools_text
from prefkit.formats.writing import Writer, Written, scores_of

PAIR_OPTIONAL = ("chosen_score", "rejected_score", "chosen_model", "rejected_model", "annotator", "weight", "tools")
LONG_OPTIONAL = ("scorer", "rater", "model", "tools")
SEVERAL = ("responses", "scores", "models")


def read_pairs(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    return [read_fields(row, columns, ("prompt", "chosen", "rejected"), PAIR_OPTIONAL)]


def read_corrections(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one correction."""
    return [read_fields(row, columns, ("prompt", "response", "correction"), ("model", "annotator", "tools"))]


def _several(row: Row, columns: Columns, name: str) -> list[Any]:
    """A list-form column: one path to a list, or a list of paths to one value each."""
    where = columns.get(name, name)
    if isinstance(where, list):
        return [require(row, path) for path in where]
    value = require(row, where)
    if not isinstance(value, list):
        raise Unreadable(where, "not_a_list")
    return value


def _long_form(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One candidate a row; `score` mapped to several paths is a scorer each, named by its path."""
    where = columns.get("score", "score")
    if isinstance(where, str):
        return [read_fields(row, columns, ("prompt", "response", "score"), LONG_OPTIONAL)]
    rest = read_fields(row, columns, ("prompt", "response"), LONG_OPTIONAL)
    return [{**rest, "score": require(row, path), "scorer": path} for path in where]


def _is_list_form(row: Row, columns: Columns) -> bool:
    where = columns.get("responses", "responses" if "response" not in columns and "responses" in row else "")
    return where != ""


def read_candidates(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row is one candidate (prompt, response, score), or all of a prompt's (prompt, responses[], scores[]).

    In list form scorer, rater and model are one value for all responses, or a list with one each; `models` goes before
    `model`. A name of the other form that `columns:` maps would have no effect, and is a reject.
    """
    is_list_form = _is_list_form(row, columns)
    for name in ("response", "score") if is_list_form else SEVERAL:
        if columns.get(name):
            raise Unreadable(name, f"not_in_{'list' if is_list_form else 'long'}_form")
    return _list_form(row, columns) if is_list_form else _long_form(row, columns)


def _list_form(row: Row, columns: Columns) -> list[dict[str, Any]]:
    shared = {"prompt": prompt_of(row, columns)} | read_fields(row, columns, (), ("tools",))
    responses, scores = _several(row, columns, "responses"), _several(row, columns, "scores")
    if len(responses) != len(scores):
        raise Unreadable("scores", "length_mismatch")
    if not responses:
        raise Unreadable("responses", "no_responses")
    each = {"response": responses, "score": scores}
    each |= {name: _one_each(optional_of(row, columns, name), len(responses), name) for name in LONG_OPTIONAL[:3]}
    if columns.get("models", "models" if "models" in row else ""):
        each["model"] = _one_each(_several(row, columns, "models"), len(responses), "models")
    said = [name for name, values in each.items() if name in ("response", "score") or values != [None] * len(values)]
    return [{**shared, **{name: each[name][at] for name in said}} for at in range(len(responses))]


def _one_each(value: Any, num: int, name: str) -> list[Any]:
    """A value for each of the responses: the list of them, or the one that all have."""
    if not isinstance(value, list):
        return [value] * num
    if len(value) != num:
        raise Unreadable(name, "length_mismatch")
    return value


_has_messages = holds_messages("prompt", "chosen", "rejected", "response", "correction")


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the prompt or a side of the row is a list of messages."""
    return _has_messages(row, columns) or is_chat_field(row, columns, "responses", of_list=True)


def write_pairs(pair: Written) -> list[dict[str, Any]]:
    """One row with all that `read_pairs` reads, but nulls, and no scores that speak against the order."""
    given = {name: pair.row.get(name) for name in PAIR_OPTIONAL} | {"tools": tools_text(pair) or None}
    given["chosen_score"], given["rejected_score"] = scores_of(pair)
    row: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return [row | {name: value for name, value in given.items() if value is not None}]


def detect_pairs(row: Row) -> str | None:
    """A pair with something more under our own names; sides that are messages do not begin with the prompt again."""
    own = [name for name in PAIR_OPTIONAL if name != "tools" and name in row]
    if (
        says_more(row, BESIDE)
        or not own
        or not {"prompt", "chosen", "rejected"} <= set(row)
        or {"chosen_rating", "score_chosen"} & set(row)
    ):
        return None
    sides = [row["chosen"], row["rejected"]]
    first = [side[0] if isinstance(side, list) and side else None for side in sides]
    answers = all(isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in first)
    if answers or all(isinstance(side, str) for side in sides):
        return f"it has prompt, chosen, rejected and {', '.join(own)}"
    return None


def detect_candidates(row: Row) -> str | None:
    """The names of the long form, or of the list form, and nothing beside the prompt."""
    if says_more(row, BESIDE):
        return None
    for names in (("prompt", "response", "score"), ("prompt", "responses", "scores")):
        if set(names) <= set(row):
            return f"it has {', '.join(names)}"
    return None


def detect_corrections(row: Row) -> str | None:
    """A response beside its correction, and nothing beside the prompt."""
    has = {"prompt", "response", "correction"} <= set(row) and not says_more(row, BESIDE)
    return "it has prompt, response, correction" if has else None


PAIRS = Format(
    "pairs",
    "pairs",
    ("prompt", "chosen", "rejected", *PAIR_OPTIONAL, "system"),
    True,
    "prompt, chosen, rejected [, " + ", ".join(PAIR_OPTIONAL) + "]",
    "ready-made pairs, text or messages; columns: maps the names",
    read_pairs,
    is_chat,
    detect=detect_pairs,
    required=("prompt", "chosen", "rejected"),
)
PAIRS_WRITER = Writer(
    "pairs",
    "prompt, chosen, rejected [, " + ", ".join(PAIR_OPTIONAL) + "]",
    "prefkit's own names, for another build",
    write_pairs,
    reference="sums",
)
CANDIDATES = Format(
    "candidates",
    "candidates",
    ("prompt", "response", "score", *LONG_OPTIONAL, *SEVERAL, "system"),
    True,
    "prompt, response, score  |  prompt, responses[], scores[] [, models[]]; [scorer, rater, model, tools]",
    "N scored responses a prompt: best against worst; direction: says whether a higher score is better",
    read_candidates,
    is_chat,
    detect=detect_candidates,
    required=("prompt", "response", "score", "scores"),
)
CORRECTIONS = Format(
    "corrections",
    "corrections",
    ("prompt", "response", "correction", "model", "annotator", "tools", "system"),
    False,
    "prompt, response, correction [, model, annotator, tools]",
    "the model's response becomes rejected, its correction chosen",
    read_corrections,
    is_chat,
    detect=detect_corrections,
    required=("prompt", "response", "correction"),
)
