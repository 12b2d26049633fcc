"""The three plain families: pairs, candidates (long and list form) and corrections, with the file's own column names.

`columns:` in the pipeline maps our names to the file's, with dotted paths for nested fields; a name left out is taken
as it is where the file has it. A column that the pipeline names must be there in every row (its value may be null).
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.reading import Columns, Format, Row, Unreadable, is_chat_field, prompt_of, read_fields, require
from prefkit.formats.turns import tools_text
from prefkit.formats.writing import Writer, Written

PAIR_OPTIONAL = ("chosen_score", "rejected_score", "chosen_model", "rejected_model", "annotator", "weight", "tools")
LONG_OPTIONAL = ("scorer", "rater", "model", "tools")


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


def read_candidates(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row is one candidate (prompt, response, score), or all of a prompt's (prompt, responses[], scores[])."""
    if "responses" not in columns and ("response" in columns or "responses" not in row):
        return _long_form(row, columns)
    prompt = prompt_of(row, columns)
    responses, scores = _several(row, columns, "responses"), _several(row, columns, "scores")
    models = (
        _several(row, columns, "models")
        if columns.get("models", "models" if "models" in row else "")
        else [None] * len(responses)
    )
    if not len(responses) == len(scores) == len(models):
        raise Unreadable("scores", "length_mismatch")
    if not responses:
        raise Unreadable("responses", "no_responses")
    shared = {"prompt": prompt} | read_fields(row, columns, (), ("tools",))
    triples = zip(responses, scores, models, strict=True)
    return [{**shared, "response": r, "score": s, "model": m} for r, s, m in triples]


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the prompt or a side of the row is a list of messages."""
    names = ("prompt", "chosen", "rejected", "response", "correction")
    return any(is_chat_field(row, columns, name) for name in names) or is_chat_field(
        row, columns, "responses", of_list=True
    )


def write_pairs(pair: Written) -> list[dict[str, Any]]:
    """One row with all that `read_pairs` reads, but nulls."""
    given = {name: pair.row.get(name) for name in PAIR_OPTIONAL} | {"tools": tools_text(pair) or None}
    row: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return [row | {name: value for name, value in given.items() if value is not None}]


def detect_pairs(row: Row) -> str | None:
    """A pair with something more under our own names; sides that are messages do not begin with the prompt again."""
    own = [name for name in PAIR_OPTIONAL if name != "tools" and name in row]
    if not own or not {"prompt", "chosen", "rejected"} <= set(row) or {"chosen_rating", "score_chosen"} & set(row):
        return None
    sides = [row["chosen"], row["rejected"]]
    first = [side[0] if isinstance(side, list) and side else None for side in sides]
    answers = all(isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in first)
    if answers or all(isinstance(side, str) for side in sides):
        return f"it has prompt, chosen, rejected and {', '.join(own)}"
    return None


def detect_candidates(row: Row) -> str | None:
    """The names of the long form, or of the list form."""
    for names in (("prompt", "response", "score"), ("prompt", "responses", "scores")):
        if set(names) <= set(row):
            return f"it has {', '.join(names)}"
    return None


def detect_corrections(row: Row) -> str | None:
    """A response beside its correction."""
    return "it has prompt, response, correction" if {"prompt", "response", "correction"} <= set(row) else None


PAIRS = Format(
    "pairs",
    "pairs",
    ("prompt", "chosen", "rejected", *PAIR_OPTIONAL),
    True,
    "prompt, chosen, rejected [, " + ", ".join(PAIR_OPTIONAL) + "]",
    "ready-made pairs, text or messages; columns: maps the names",
    read_pairs,
    is_chat,
    detect=detect_pairs,
)
PAIRS_WRITER = Writer(
    "pairs",
    "prompt, chosen, rejected [, " + ", ".join(PAIR_OPTIONAL) + "]",
    "prefkit's own names, for another build",
    write_pairs,
)
CANDIDATES = Format(
    "candidates",
    "candidates",
    ("prompt", "response", "score", *LONG_OPTIONAL, "responses", "scores", "models"),
    True,
    "prompt, response, score [, scorer, rater, model, tools]  |  prompt, responses[], scores[] [, models[], tools]",
    "N scored responses a prompt: best against worst; direction: says whether a higher score is better",
    read_candidates,
    is_chat,
    detect=detect_candidates,
)
CORRECTIONS = Format(
    "corrections",
    "corrections",
    ("prompt", "response", "correction", "model", "annotator", "tools"),
    False,
    "prompt, response, correction [, model, annotator, tools]",
    "the model's response becomes rejected, its correction chosen",
    read_corrections,
    is_chat,
    detect=detect_corrections,
)
