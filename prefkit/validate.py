"""The rules that make a pair fit to train on, each a named expression; the first that matches names the drop.

Rules that need a tokenizer (length in tokens, equality after truncation, special tokens written in the text) belong to
encode.py and run during `precompute`. Facts behind the rules: 5 of 2,312 rows of HH harmless-base/test have sides with
different prompts; ties that became pairs (chosen == rejected) shipped in several public datasets.
"""

from collections.abc import Mapping

import polars as pl

from prefkit.format import Kind
from prefkit.keys import key_of
from prefkit.screen import Screened, screen
from prefkit.text import VISIBLE, flat, says_nothing, words_of

SIDES = ("chosen", "rejected")
# ours: what an instruction model puts before a text that it was asked to revise; only at the very start, and only where
# it names a text of its own: "here are the updated opening hours" and "I have edited the file" are plain replies
_REVISED = r"(revised|corrected|improved|updated|rewritten|edited|polished)"
_TEXT = r"(version|answer|response|text|sentences?|translation|draft)"
META_PHRASE = (
    r"(?i)^\W*((sure|certainly|of course|absolutely)\W+)?"
    r"((here(['’]s| is| are)|below is|this is) (the |my |your |a |an )?(\w+ )?"
    rf"({_REVISED}( and {_REVISED})? {_TEXT}(\s*([^\w\s]|$)|\s+(of|with|that|based|as|for)\b)"
    r"|(revision|correction|rewrite)\s*([:.!]|$))"
    rf"|(the |my |your |a |an )?{_REVISED}( and {_REVISED})? {_TEXT}\W*:)"
)
# a call of tools is the assistant's turn, and their answers stand between it and the assistant's next one
PROMPT_ROLES = r"^((system|developer),)?(user,(assistant,(tool,)+)*assistant,)*user(,assistant(,tool)+)*$"
REPLY_ROLES = r"^assistant((,tool)+,assistant|,user,assistant)*$"


def _roles(column: str) -> pl.Expr:
    return pl.col(column).list.eval(pl.element().struct.field("role")).list.join(",")


def _last_role(column: str) -> pl.Expr:
    return pl.col(column).list.last().struct.field("role")


def _any_text(rule: str, kind: Kind, limit: int = 0) -> pl.Expr:
    texts = [words_of(column, kind) for column in ("prompt", *SIDES)]
    if rule == "nul":
        return pl.any_horizontal(text.str.contains("\0", literal=True) for text in texts)
    return pl.any_horizontal(text.str.len_chars() > limit for text in texts)


def _meta_phrase(kind: Kind) -> pl.Expr:
    """Whether a correction speaks of being one, as models do that were asked for it, and the response does not."""
    chosen, rejected = (words_of(side, kind).str.contains(META_PHRASE) for side in SIDES)
    return (pl.col("method") == "correction") & chosen & ~rejected


def rules(
    kind: Kind, max_chars: int, score_scale: tuple[float, float] | None = None, *, meta_phrases: bool = False
) -> Mapping[str, pl.Expr]:
    """The rule table for a kind of dataset, in the order in which reasons are given.

    Args:
        kind: chat | text.
        max_chars: longest prompt or side, in characters, > 0.
        score_scale: lowest and highest allowed score, both inclusive; None: any finite score.
        meta_phrases: whether a correction may not begin by saying that it is a revision.
    """
    no_prompt = ~words_of("prompt", kind).str.contains(VISIBLE).fill_null(False)
    empty = {"empty_prompt": no_prompt, **{f"empty_{side}": says_nothing(side, kind) for side in SIDES}}
    turns = {
        "prompt_ends_without_user_turn": ~_last_role("prompt").is_in(["user", "tool"]),
        "side_ends_without_assistant_turn": pl.any_horizontal(_last_role(side) != "assistant" for side in SIDES),
        "roles_out_of_order": ~_roles("prompt").str.contains(PROMPT_ROLES)
        | pl.any_horizontal(~_roles(side).str.contains(REPLY_ROLES) for side in SIDES),
    }
    low, high = score_scale or (float("-inf"), float("inf"))
    return {
        **empty,
        **(turns if kind == "chat" else {}),
        "identical": flat("chosen", kind) == flat("rejected", kind),
        "identical_after_folding": key_of("chosen", kind) == key_of("rejected", kind),
        **({"meta_phrase": _meta_phrase(kind)} if meta_phrases else {}),
        "nul_byte": _any_text("nul", kind),
        "too_long": _any_text("length", kind, max_chars),
        "score_out_of_scale": pl.any_horizontal(
            pl.col(f"{side}_score").is_not_null() & ~pl.col(f"{side}_score").is_between(low, high) for side in SIDES
        ),
        "tied_scores": pl.col("margin") == 0,
        "scores_against_order": pl.col("margin") < 0,
    }


def validate_pairs(
    pairs: pl.DataFrame,
    kind: Kind,
    max_chars: int,
    score_scale: tuple[float, float] | None = None,
    *,
    meta_phrases: bool = False,
) -> Screened:
    """Drop what no policy should be trained on, with the rule's name as the reason and "validate" as the stage."""
    return screen(pairs, "validate", rules(kind, max_chars, score_scale, meta_phrases=meta_phrases))
