"""What every way of making pairs shares: the columns of a draft, how a score counts, and pairs that come ready made.

Comes in: a frame of records (sources.py). Goes out: a frame of draft pairs with the columns of `format.ORIGIN`, not yet
validated. Corrections, comparisons and candidates have a module each.
"""

from typing import Literal

import polars as pl

from prefkit.format import ORIGIN, Kind, schema

Direction = Literal["higher_is_better", "lower_is_better"]
SIGNIFICANT = 12  # digits of a score that count: .3 - .1 is a margin of .2, and a mean has no order of its terms
SLACK = 1e-12  # of the scores themselves: what subtracting two of them may lose

DRAFT = ("prompt", "chosen", "rejected", "tools", *(column.name for column in ORIGIN))
ORIGIN_DTYPES = {"tools": pl.String, **{column.name: column.dtype for column in ORIGIN}}


def as_drafts(frame: pl.DataFrame, **columns: pl.Expr) -> pl.DataFrame:
    """Fill up to the draft columns, in order, with nulls where the method has nothing to say."""
    have = frame.with_columns(**columns)
    missing = [pl.lit(None, ORIGIN_DTYPES[name]).alias(name) for name in DRAFT if name not in have.columns]
    return have.with_columns(missing).select(DRAFT)


def as_dropped(frame: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Fill up to the columns of the dropped table before dedupe, with nulls where there is nothing to say."""
    dtypes = {name: dtype for name, dtype in schema("dropped", kind).items() if name != "split"}
    have = frame.with_columns(stage=pl.lit("pairs"))
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in dtypes.items() if name not in have.columns]
    return have.with_columns(missing).select(*dtypes)


def signed(direction: Direction) -> Literal[1, -1]:
    """The factor that turns the source's score into "higher is better"."""
    return 1 if direction == "higher_is_better" else -1


def ready_pairs(records: pl.DataFrame, direction: Direction) -> pl.DataFrame:
    """Pairs as they were handed in. The margin is above 0 where the scores agree with the order."""
    margin = ((pl.col("chosen_score") - pl.col("rejected_score")) * signed(direction)).round_sig_figs(SIGNIFICANT)
    return as_drafts(records, method=pl.lit("paired"), margin=margin)
