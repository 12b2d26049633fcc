"""What every way of making pairs shares: the columns of a draft, how a score counts, and pairs that come ready made.

Comes in: a frame of records (sources.py). Goes out: a frame of draft pairs with the columns of `format.ORIGIN`, not yet
validated. Corrections, comparisons and candidates have a module each.
"""

from typing import Literal, NamedTuple

import polars as pl

from prefkit.format import ORIGIN, Kind, schema
from prefkit.screen import Screened, screen
from prefkit.text import words_of

Direction = Literal["higher_is_better", "lower_is_better"]
SIGNIFICANT = 12  # digits of a score that count: .3 - .1 is a margin of .2, and a mean has no order of its terms
SLACK = 1e-12  # of the scores themselves: what subtracting two of them may lose

DRAFT = ("prompt", "chosen", "rejected", "tools", *(column.name for column in ORIGIN))
ORIGIN_DTYPES = {"tools": pl.String, **{column.name: column.dtype for column in ORIGIN}}


class Bounds(NamedTuple):
    """What the margin, the score of chosen and the lengths of the sides must keep to; both ends belong to a bound."""

    min_margin: float = 0.0
    max_margin: float | None = None
    min_chosen_score: float | None = None
    length_cap: float | None = None


def as_drafts(frame: pl.DataFrame, **columns: pl.Expr) -> pl.DataFrame:
    """Fill up to the draft columns, in order, with nulls where the method has nothing to say."""
    have = frame.with_columns(**columns)
    missing = [pl.lit(None, ORIGIN_DTYPES[name]).alias(name) for name in DRAFT if name not in have.columns]
    return have.with_columns(missing).select(DRAFT)


def as_dropped(frame: pl.DataFrame, kind: Kind, stage: str = "pairs") -> pl.DataFrame:
    """Fill up to the columns of the dropped table, with nulls where there is nothing to say."""
    dtypes = {name: dtype for name, dtype in schema("dropped", kind).items() if name != "split"}
    have = frame.with_columns(stage=pl.lit(stage))
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in dtypes.items() if name not in have.columns]
    return have.with_columns(missing).select(*dtypes)


def signed(direction: Direction) -> Literal[1, -1]:
    """The factor that turns the source's score into "higher is better"."""
    return 1 if direction == "higher_is_better" else -1


def ready_pairs(records: pl.DataFrame, direction: Direction) -> pl.DataFrame:
    """Pairs as they were handed in. The margin is above 0 where the scores agree with the order."""
    margin = ((pl.col("chosen_score") - pl.col("rejected_score")) * signed(direction)).round_sig_figs(SIGNIFICANT)
    return as_drafts(records, method=pl.lit("paired"), margin=margin)


def bounded_pairs(drafts: pl.DataFrame, kind: Kind, direction: Direction, bounds: Bounds) -> Screened:
    """Drafts that keep to the bounds, and drops named as the stages of pairing.py name them.

    A pair without scores is touched by `length_cap` alone, and one whose scores tie or speak against its order by no
    margin: validate.py says so of it by name. Example: margin 1 and min_margin 2 give `under_min_margin`.
    """
    sign = signed(direction)
    slack = SLACK * (pl.col("chosen_score").abs() + pl.col("rejected_score").abs())
    chars = [words_of(side, kind).str.len_chars() for side in ("chosen", "rejected")]
    ratio = pl.when(pl.min_horizontal(chars) > 0).then((chars[0] / chars[1]).log().abs())
    rules: dict[str, pl.Expr] = {}
    if bounds.min_chosen_score is not None:
        rules["under_min_chosen_score"] = pl.col("chosen_score") * sign < bounds.min_chosen_score * sign
    rules["under_min_margin"] = (pl.col("margin") > 0) & (pl.col("margin") + slack < bounds.min_margin)
    if bounds.max_margin is not None:
        rules["over_max_margin"] = pl.col("margin") - slack > bounds.max_margin
    if bounds.length_cap is not None:
        rules["over_length_cap"] = ratio > bounds.length_cap + SLACK
    judged = screen(drafts, "pairs", rules)
    return Screened(judged.kept, as_dropped(judged.dropped, kind))
