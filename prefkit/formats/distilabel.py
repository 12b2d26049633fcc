"""distilabel: generations of one instruction with their ratings, and the pairs that its FormatTextGenerationDPO makes.

A preference task leaves `instruction` (or `messages`), `generations`, `ratings` and, where a pipeline gathers them,
`generation_models`; a rating that the judge did not give is null. The formatting step keeps those columns and adds
chosen and rejected as whole conversations: such a row is read as a pair, since distilabel has chosen already. It takes
the first of equal ratings for both ends, so chosen = rejected comes out of a tie: validation drops it.
"""

import hashlib
from typing import Any

from prefkit.formats.fields import messages
from prefkit.formats.reading import Columns, Format, Row, Unreadable, require, with_system
from prefkit.formats.ultrafeedback_binarized import first_question, read_scored, whole_plain_sides
from prefkit.formats.writing import Writer, Written, scores_of

SIDES = ("chosen", "rejected")
PAIR_FIELDS = (
    "prompt, prompt_id, chosen[], chosen_rating [, chosen_model], rejected[], rejected_rating [, rejected_model]"
)


def _prompt(row: Row) -> Any:
    asked = require(row, "instruction") if row.get("messages") is None else messages(row, "messages")
    return with_system(asked, row.get("system_prompt"), "system_prompt")


def read_distilabel(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, all candidates of its instruction."""
    prompt, texts, ratings = _prompt(row), require(row, "generations"), require(row, "ratings")
    models = row.get("generation_models") or []
    for name, value in (("generations", texts), ("ratings", ratings), ("generation_models", models)):
        if not isinstance(value, list):
            raise Unreadable(name, "not_a_list")
    if not texts:
        raise Unreadable("generations", "no_responses")
    models = models or [None] * len(texts)
    if len(ratings) != len(texts) or len(models) != len(texts):
        raise Unreadable("ratings" if len(ratings) != len(texts) else "generation_models", "length_mismatch")
    triples = zip(texts, ratings, models, strict=True)
    return [{"prompt": prompt, "response": text, "score": rating, "model": model} for text, rating, model in triples]


def detect_distilabel(row: Row) -> str | None:
    """Generations with ratings from which no pair was made yet."""
    lists = all(isinstance(row.get(name), list) for name in ("generations", "ratings"))
    if lists and ("instruction" in row or "messages" in row) and "chosen_rating" not in row:
        return "generations and ratings are lists"
    return None


def read_distilabel_pairs(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one pair."""
    models = {name: row.get(name) for name in ("chosen_model", "rejected_model")}
    given = {name: model for name, model in models.items() if model is not None}
    return [read_scored(row, "chosen_rating", "rejected_rating") | given]


def write_distilabel_pairs(pair: Written) -> list[dict[str, Any]]:
    """One row; `prompt_id` is distilabel's own, the sha256 of `prompt`."""
    sides = whole_plain_sides(pair)
    question = first_question(sides[0])
    prompt_id = hashlib.sha256(question.encode()).hexdigest()
    row: dict[str, Any] = {"prompt": question, "prompt_id": prompt_id}
    for name, conversation, score in zip(SIDES, sides, scores_of(pair), strict=True):
        row |= {name: conversation, f"{name}_rating": score}
        if (model := pair.row.get(f"{name}_model")) is not None:
            row[f"{name}_model"] = model
    return [row]


def detect_distilabel_pairs(row: Row) -> str | None:
    """Two conversations with their ratings under these names."""
    if all(isinstance(row.get(side), list) and f"{side}_rating" in row for side in SIDES):
        return "chosen and rejected are conversations, with chosen_rating and rejected_rating"
    return None


DISTILABEL = Format(
    "distilabel",
    "candidates",
    (),
    False,
    "instruction [, system_prompt] | messages[]; generations[], ratings[] [, generation_models[]]",
    "distilabel, after a preference task",
    read_distilabel,
    lambda _row, _columns: True,  # any later row may have messages or a system prompt
    "the higher rating is better",
    detect_distilabel,
)
DISTILABEL_PAIRS = Format(
    "distilabel_pairs",
    "pairs",
    (),
    False,
    PAIR_FIELDS,
    "distilabel, after FormatTextGenerationDPO or FormatChatGenerationDPO",
    read_distilabel_pairs,
    lambda _row, _columns: True,
    detect=detect_distilabel_pairs,
)
DISTILABEL_PAIRS_WRITER = Writer(
    "distilabel_pairs", PAIR_FIELDS, "as distilabel's FormatTextGenerationDPO leaves them", write_distilabel_pairs
)
