"""What became of everything that was read: counts that add up, reasons, and what a person wants to know of the pairs.

Comes in: the rows of the tables as they are written, and what is known of the sources. Goes out: `Counts`, which
`check` holds to the accounting equations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.corrections import correction_report
from prefkit.grams import Array


class Counts(NamedTuple):
    """What became of everything that was read; `check` holds the accounting equations."""

    rows: int  # rows of pair, comparison and correction sources, as their files were read: each becomes one record
    pairs: int
    dropped: int  # rows of the dropped table
    rejects: int
    candidates: int  # candidates of candidate sources, a list-form row counted once each
    candidate_rejects: int
    used: int
    unused: int
    candidate_pairs: int  # pairs made of candidates
    candidate_dropped: int  # rows of the dropped table that stem from candidates: pairs, or prompts without one
    prompts: int  # distinct prompts of candidate sources
    prompts_with_pair: int
    prompts_dropped: int
    train: int
    test: int

    def check(self) -> None:
        """The equations of the format: nothing is lost."""
        paired = self.pairs - self.candidate_pairs
        dropped = self.dropped - self.candidate_dropped
        assert self.rows == paired + dropped + (self.rejects - self.candidate_rejects), self
        assert self.candidates == self.used + self.unused + self.candidate_rejects, self
        assert self.prompts == self.prompts_with_pair + self.prompts_dropped, self
        assert self.pairs == self.train + self.test, self


class OfSources(NamedTuple):
    """What is known of sources before their rows are written: as in Counts; `num_prompts`: of candidates, by source."""

    rows: int
    candidates: int
    candidate_rejects: int
    used: int
    unused: Mapping[str, int]
    num_prompts: Sequence[int]


class Account:
    """Counts of the rows of the tables, as they pass."""

    def __init__(self) -> None:
        self.heights: Counter[str] = Counter()
        self.of_candidates: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.test = 0
        self.prompts: dict[str, list[Array]] = {"pairs": [], "dropped": []}
        self.corrections: list[pl.DataFrame] = []
        self.clusters: set[int] = set()  # of near-duplicates

    def add(self, table: str, rows: pl.DataFrame) -> None:
        """Take rows of pairs, dropped or rejects into account."""
        self.heights[table] += rows.height
        if table != "pairs":
            self.reasons.update(dict(rows["reason"].value_counts().rows()))
        if table == "rejects" or not rows.height:
            return
        candidates = rows.filter(pl.col("method") == "best_of_n")
        self.of_candidates[table] += candidates.height
        self.prompts[table].append(_numbers(candidates["prompt_id"]))
        if table == "dropped":
            self.clusters.update(rows.filter(reason="near_duplicate")["cluster_id"].drop_nulls().unique())
        if table == "pairs":
            self.test += rows.filter(pl.col("split") == "test").height
            apart = rows.filter(pl.col("edit_distance").is_not_null())
            self.corrections.append(apart.select("edit_distance", "shared_prefix"))

    def counts(self, of: OfSources) -> Counts:
        """The whole account."""
        paired = np.unique(np.concatenate([np.empty(0, np.uint64), *self.prompts["pairs"]]))
        lost = np.unique(np.concatenate([np.empty(0, np.uint64), *self.prompts["dropped"]]))
        prompts = len(np.union1d(paired, lost))
        # every prompt of candidates gave a pair or a drop; two sources may share prompts
        assert prompts <= sum(of.num_prompts), (prompts, of.num_prompts)
        assert len(of.num_prompts) > 1 or prompts == sum(of.num_prompts), (prompts, of.num_prompts)
        pairs = self.heights["pairs"]
        return Counts(
            rows=of.rows,
            pairs=pairs,
            dropped=self.heights["dropped"],
            rejects=self.heights["rejects"],
            candidates=of.candidates,
            candidate_rejects=of.candidate_rejects,
            used=of.used,
            unused=sum(of.unused.values()),
            candidate_pairs=self.of_candidates["pairs"],
            candidate_dropped=self.of_candidates["dropped"],
            prompts=prompts,
            prompts_with_pair=len(paired),
            prompts_dropped=len(np.setdiff1d(lost, paired)),
            train=pairs - self.test,
            test=self.test,
        )

    def correction_report(self) -> dict[str, Any]:
        """How far apart the sides of the corrections among the pairs are; empty without corrections."""
        return correction_report(pl.concat(self.corrections)) if self.corrections else {}


def _numbers(ids: pl.Series) -> Array:
    """The first 16 digits of hex ids, which no two of ten million share by chance."""
    found: Array = ids.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64).unique().to_numpy()
    return found
