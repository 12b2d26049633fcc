"""Screened(kept, dropped): the only way a row leaves the road, always with a stage and a reason.

A rule is a named boolean expression that is true for a row that must go. The first rule that matches names the reason,
so the order of a rule table is part of its meaning.
"""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl


class Screened(NamedTuple):
    """The rows that go on, and those that a rule removed (with `stage`, `reason`, perhaps `duplicate_of`)."""

    kept: pl.DataFrame
    dropped: pl.DataFrame


def first_reason(rules: Mapping[str, pl.Expr]) -> pl.Expr:
    """The name of the first rule that is true for a row, null where none is. A null rule is not true."""
    named = [pl.when(rule).then(pl.lit(name)) for name, rule in rules.items()]
    return pl.coalesce(named) if named else pl.lit(None, pl.String)


def screen(frame: pl.DataFrame, stage: str, rules: Mapping[str, pl.Expr]) -> Screened:
    """Split a frame by a table of rules, in one pass. Row order is kept on both sides."""
    judged = frame.with_columns(first_reason(rules).alias("reason"))
    kept = judged.filter(pl.col("reason").is_null()).drop("reason")
    dropped = judged.filter(pl.col("reason").is_not_null()).with_columns(pl.lit(stage).alias("stage"))
    return Screened(kept, dropped)
