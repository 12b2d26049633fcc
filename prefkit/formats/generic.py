"""The three plain families: pairs, candidates (long and list form) and corrections, with the file's own column names.

`columns:` in the pipeline maps our names to the file's, with dotted paths for nested fields; a name left out is taken
as it is where the file has it. A column that the pipeline names must be there in every row (its value may be null).
"""

from collections.abc import Sequence
from typing import Any

from prefkit.formats.reading import Columns, Format, Row, Unreadable, dig, require

PAIR_OPTIONAL = ("chosen_score", "rejected_score", "chosen_model", "rejected_model", "annotator", "weight")


def _fields(row: Row, columns: Columns, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    record = {name: require(row, str(columns.get(name, name))) for name in required}
    for name in optional:
        value = require(row, str(columns[name])) if name in columns else row.get(name)
        if value is not None and value != "":  # an empty cell of a .csv says nothing
            record[name] = value
    return record


def read_pairs(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    return [_fields(row, columns, ("prompt", "chosen", "rejected"), PAIR_OPTIONAL)]


def read_corrections(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row, one correction."""
    return [_fields(row, columns, ("prompt", "response", "correction"), ("model", "annotator"))]


def _several(row: Row, columns: Columns, name: str) -> list[Any]:
    """A list-form column: one path to a list, or a list of paths to one value each."""
    where = columns.get(name, name)
    if isinstance(where, list):
        return [require(row, path) for path in where]
    value = require(row, where)
    if not isinstance(value, list):
        raise Unreadable(where, "not_a_list")
    return value


def read_candidates(row: Row, columns: Columns) -> list[dict[str, Any]]:
    """One row is one candidate (prompt, response, score), or all of a prompt's (prompt, responses[], scores[])."""
    if "responses" not in columns and ("response" in columns or "responses" not in row):
        return [_fields(row, columns, ("prompt", "response", "score"), ("model",))]
    prompt = require(row, str(columns.get("prompt", "prompt")))
    responses, scores = _several(row, columns, "responses"), _several(row, columns, "scores")
    models = _several(row, columns, "models") if "models" in columns or "models" in row else [None] * len(responses)
    if not len(responses) == len(scores) == len(models):
        raise Unreadable("scores", "length_mismatch")
    if not responses:
        raise Unreadable("responses", "no_responses")
    triples = zip(responses, scores, models, strict=True)
    return [{"prompt": prompt, "response": r, "score": s, "model": m} for r, s, m in triples]


def is_chat(row: Row, columns: Columns) -> bool:
    """Whether the prompt or a side of the row is a list of messages."""
    for name in ("prompt", "chosen", "response", "correction", "responses"):
        where = columns.get(name, name)
        try:
            value = dig(row, where if isinstance(where, str) else where[0])
            several = name == "responses" and isinstance(where, str) and isinstance(value, list) and value
            if isinstance(value[0] if several else value, list) and (several or name != "responses"):
                return True
        except KeyError:
            continue
    return False


PAIRS = Format(
    "pairs",
    "pairs",
    ("prompt", "chosen", "rejected", *PAIR_OPTIONAL),
    True,
    "prompt, chosen, rejected [, " + ", ".join(PAIR_OPTIONAL) + "]",
    "ready-made pairs, text or messages; columns: maps the names",
    read_pairs,
    is_chat,
)
CANDIDATES = Format(
    "candidates",
    "candidates",
    ("prompt", "response", "score", "model", "responses", "scores", "models"),
    True,
    "prompt, response, score [, model]  |  prompt, responses[], scores[] [, models[]]",
    "N scored responses a prompt: best against worst; direction: says whether a higher score is better",
    read_candidates,
    is_chat,
)
CORRECTIONS = Format(
    "corrections",
    "corrections",
    ("prompt", "response", "correction", "model", "annotator"),
    False,
    "prompt, response, correction [, model, annotator]",
    "the model's response becomes rejected, its correction chosen",
    read_corrections,
    is_chat,
)
