"""An opener is cut off, and what the rules of a build say of the pairs then.

Comes in: pairs with `origin`, their pair_id before any repair, and `cut`, what was cut off so far. Goes out: the pairs
that are left, with new ids where they were edited, and those that had to go: a side says nothing any more, both say the
same, or a pair now repeats or contradicts another.
"""

import shlex

import polars as pl

from prefkit.assembly import how_to_compare
from prefkit.audit.repair import SIDES, strip_opener
from prefkit.comparing import dedupe_pairs
from prefkit.config import Pipeline
from prefkit.errors import InputError
from prefkit.format import Kind
from prefkit.screen import Screened
from prefkit.text import with_pair_ids
from prefkit.validate import validate_pairs


def without_opener(pairs: pl.DataFrame, kind: Kind, pipeline: Pipeline, text: str, dataset: str) -> Screened:
    """Pairs without an opener on either side.

    Args:
        pairs: with `origin` and `cut`.
        kind: of the dataset.
        pipeline: whose rules edited pairs have to pass.
        text: the opener.
        dataset: how messages name it.

    Returns:
        kept in order; dropped with origin, rule, detail, twin (origin of the pair that it repeats or contradicts) and
        jaccard.

    Raises:
        InputError: no reply begins with it.
    """
    stripped = strip_opener(pairs, kind, text)
    if not stripped.edited.any():
        hint = f"prefkit show {shlex.quote(dataset)} shows how replies begin"
        raise InputError(f"no reply begins with {text!r}", where="--strip-opener", hint=hint)
    told = [_told(*both) for both in zip(*(stripped.cut[side] for side in SIDES), strict=True)]
    cut = pl.concat_str("cut", pl.Series("told", told, pl.String), separator="; ", ignore_nulls=True)
    edited = pl.Series("edited", stripped.edited)
    marked = with_pair_ids(stripped.pairs, kind).with_columns(
        pl.when(edited).then(cut).otherwise("cut").alias("cut"), stripped.emptied.alias("rule"), edited
    )
    valid = _valid(marked.with_row_index("at"), kind, pipeline)
    how = how_to_compare(pipeline, None, pipeline.build.num_processes())
    unique = dedupe_pairs(valid.kept, kind, how)
    ids = [dict(frame.select("pair_id", "origin").rows()) for frame in (valid.kept, unique.kept)]
    other = pl.coalesce("duplicate_of", "contradicts")
    twin = other.replace_strict(ids[0] | ids[1], default=None, return_dtype=pl.String).alias("twin")
    met = unique.dropped.select("origin", twin, "jaccard", rule="reason")
    lost = pl.concat([valid.dropped.select("origin", "rule"), met], how="diagonal")
    detail = pl.concat_str("rule", pl.lit(f", once {text!r} is cut off")).alias("detail")
    return Screened(unique.kept, lost.with_columns(detail))


def _valid(marked: pl.DataFrame, kind: Kind, pipeline: Pipeline) -> Screened:
    """Edited pairs by the rules of the build, all others as they are; dropped with `rule`."""
    limits = pipeline.validate_
    judged = validate_pairs(
        marked.filter("edited", pl.col("rule").is_null()),
        kind,
        limits.max_chars,
        limits.score_scale,
        meta_phrases=limits.meta_phrases == "drop",
    )
    lost = [
        marked.filter(pl.col("rule").is_not_null()).select("at", "origin", "rule"),
        judged.dropped.select("at", "origin", rule="reason"),
    ]
    kept = pl.concat([marked.filter(~pl.col("edited")), judged.kept]).sort("at")
    return Screened(kept.drop("at", "edited", "rule"), pl.concat(lost).sort("at"))


def _told(chosen: str | None, rejected: str | None) -> str | None:
    """What was cut off, for a reader: "cut off chosen: 'Certainly,'"."""
    parts = [f"{side}: {gone!r}" for side, gone in zip(SIDES, (chosen, rejected), strict=True) if gone is not None]
    return f"cut off {', '.join(parts)}" if parts else None
