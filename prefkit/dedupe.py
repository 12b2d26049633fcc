"""One pair once, and no pair against another: exact duplicates and direct reversals.

Duplicate keys are the folded prompt, chosen and rejected (NFC, white space), never the metadata. Of equal pairs the one
kept is the human's over the model's, then the larger margin, then the smaller pair_id, then the first in the sources.
A reversal is A over B and B over A for one folded prompt. A middle candidate that is chosen in one pair and rejected in
another is legitimate and stays.
"""

from typing import Literal

import polars as pl

from prefkit.format import Kind
from prefkit.screen import Screened
from prefkit.text import folded

Contradictions = Literal["drop_both", "majority", "higher_margin", "keep"]
KEYS = ("key_prompt", "key_chosen", "key_rejected")
TRUST = {"human": 0, "rule": 1, "model": 2}  # no annotator at all comes last


def _with_keys(pairs: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    return pairs.with_columns(folded(key.removeprefix("key_"), kind).alias(key) for key in KEYS).with_row_index("row")


def _ranked(pairs: pl.DataFrame) -> pl.DataFrame:
    """Best claim to be kept first."""
    trust = pl.col("annotator").replace_strict(TRUST, default=3, return_dtype=pl.Int8)
    return pairs.sort(trust, -pl.col("margin").fill_null(float("-inf")), "pair_id", "row", nulls_last=True)


def _as_dropped(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    return rows.sort("row").with_columns(
        pl.lit("dedupe").alias("stage"),
        pl.lit(reason).alias("reason"),
        pl.lit(None, pl.Float64).alias("jaccard"),
    )


def dedupe_pairs(
    pairs: pl.DataFrame, kind: Kind, *, exact: bool = True, contradictions: Contradictions = "drop_both"
) -> Screened:
    """Drop exact duplicates (reason `duplicate`, jaccard 1), then judge reversals (reason `contradiction`).

    Args:
        pairs: with pair_id, prompt_id, texts, annotator, margin.
        kind: of the dataset.
        exact: whether duplicates are dropped.
        contradictions: drop_both; majority: the direction with more copies before deduplication stays; higher_margin:
            the
            larger margin stays; in both a draw drops both; keep: reversals stay.

    Returns:
        kept in the order of `pairs`; dropped with stage, reason, duplicate_of and jaccard.
    """
    ranked = _ranked(_with_keys(pairs, kind))
    first = pl.col("pair_id").first().over(KEYS)
    marked = ranked.with_columns(
        first.alias("duplicate_of"),
        pl.len().over(KEYS).alias("num_copies"),
        pl.int_range(pl.len()).over(KEYS).alias("copy"),
    )
    repeated = pl.int_range(pl.len()).over("pair_id") > 0  # a pair_id names one row, whatever the settings
    is_copy = (pl.col("copy") > 0) if exact else repeated
    copies = _as_dropped(marked.filter(is_copy), "duplicate").with_columns(pl.lit(1.0).alias("jaccard"))
    kept, lost = _judge_reversals(marked.filter(~is_copy), contradictions)
    scratch = [*KEYS, "row", "copy", "num_copies"]
    dropped = pl.concat([copies.drop(scratch), lost.drop(scratch)], how="diagonal")
    return Screened(kept.sort("row").drop(*scratch, "duplicate_of"), dropped)


def _judge_reversals(pairs: pl.DataFrame, policy: Contradictions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs that stay, and those whose claim is not larger than that of the opposite direction."""
    claim = {
        "majority": pl.col("num_copies").cast(pl.Float64),
        "higher_margin": pl.col("margin").fill_null(0.0),
    }
    keyed = pairs.drop("duplicate_of").with_columns(
        pl.min_horizontal("key_chosen", "key_rejected").alias("low"),
        pl.max_horizontal("key_chosen", "key_rejected").alias("high"),
        (pl.col("key_chosen") < pl.col("key_rejected")).alias("ahead"),
        claim.get(policy, pl.lit(0.0)).alias("claim"),
    )
    direction = ["key_prompt", "low", "high", "ahead"]
    opposite = keyed.group_by(direction).agg(
        pl.col("pair_id").min().alias("duplicate_of"), pl.col("claim").max().alias("rival")
    )
    judged = keyed.join(opposite.with_columns(~pl.col("ahead")), on=direction, how="left")
    loses = (pl.col("claim") <= pl.col("rival")).fill_null(False) if policy != "keep" else pl.lit(False)
    scratch = ["low", "high", "ahead", "claim", "rival"]
    lost = judged.filter(loses).drop(scratch)
    return judged.filter(~loses).drop(scratch), _as_dropped(lost, "contradiction")
