"""From the token table to a verdict: which tokens are findings, how bad, and what to do.

A finding needs significance AND effect AND coverage: at scale everything is significant (Gardner et al., arXiv
2104.08646), and under 1% of biased pairs already biases a reward model (arXiv 2409.11704). Where nothing is found, the
verdict says whether the data could have shown it.
"""

import math
from typing import Any, NamedTuple

import polars as pl
from scipy import stats

from prefkit.text import printable, words_of

LEVELS = ("pass", "not enough data", "note", "warn", "fail")
WARN_WIN_RATE = 0.9  # nine of ten pairs that the token separates are won by one side


class Verdict(NamedTuple):
    """The overall level, its reason in a sentence, and the findings, worst first."""

    level: str
    reason: str
    findings: list[dict[str, Any]]


def smallest_detectable_win_rate(num_discordant: int, num_tests: int, alpha: float) -> float:
    """The win rate that a token separating so many pairs needs to be found among so many tests: .5 + z / (2 sqrt d)."""
    return 0.5 + float(stats.norm.isf(alpha / (2 * max(1, num_tests)))) / (2 * math.sqrt(max(1, num_discordant)))


def find_tokens(table: pl.DataFrame, q: float, min_coverage: float, win_rate: float) -> pl.DataFrame:
    """The rows of a token table that are findings, with their `level`, worst first; allowed tokens never are.

    exclusive (in no text of the other side): fail. One-sided, or at least .9 won by one side: warn. Else: note.
    """
    won = pl.max_horizontal("win_rate", 1 - pl.col("win_rate"))
    found = table.filter(
        (pl.col("q") <= q) & (pl.col("coverage") >= min_coverage) & (won >= win_rate) & ~pl.col("allowed")
    )
    strong = pl.col("one_sided") | (won >= WARN_WIN_RATE)
    level = pl.when("exclusive").then(pl.lit("fail")).when(strong).then(pl.lit("warn")).otherwise(pl.lit("note"))
    rank = pl.col("level").replace_strict({"fail": 0, "warn": 1, "note": 2}, return_dtype=pl.Int8)
    return found.with_columns(level.alias("level")).sort(rank, -pl.col("coverage"), "token")


def judge(table: pl.DataFrame, num_pairs: int, q: float, min_coverage: float, win_rate: float) -> Verdict:
    """The verdict over a token table.

    Args:
        table: columns of format.TOKENS.
        num_pairs: pairs that it counts.
        q: largest false discovery rate of a finding.
        min_coverage: smallest share of pairs that a finding separates.
        win_rate: smallest share of these that one side wins.
    """
    found = find_tokens(table, q, min_coverage, win_rate)
    findings = [_finding(row) for row in found.iter_rows(named=True)]
    if findings:
        level = findings[0]["level"]
        same = sum(finding["level"] == level for finding in findings)
        return Verdict(level, f"{same} token{'s' * (same > 1)} at level {level}; {findings[0]['reason']}", findings)
    tested = table.filter(pl.col("q").is_not_null())
    most = int(tested["num_discordant"].max() or 0)  # type: ignore[arg-type]
    detectable = smallest_detectable_win_rate(most, tested.height, q)
    if tested.is_empty() or detectable > win_rate:
        return Verdict(
            "not enough data",
            f"{num_pairs} pairs could only show a win rate above {min(detectable, 1):.2f}; the limit is {win_rate:g}",
            [],
        )
    return Verdict("pass", f"no token separates {min_coverage:.1%} of the pairs with a win rate of {win_rate:g}", [])


def _finding(row: dict[str, Any]) -> dict[str, Any]:
    side, other = ("chosen", "rejected") if row["side"] == "chosen" else ("rejected", "chosen")
    wins, token = max(row["num_chosen_only"], row["num_rejected_only"]), printable(row["token"])
    if row["exclusive"]:
        reason = f"'{token}' is in {side} of {wins} pairs ({row['coverage']:.1%}) and in no {other} text at all"
    else:
        share = f"is in {side} in {wins} of {row['num_discordant']}"
        reason = f"'{token}' separates {row['coverage']:.1%} of the pairs, and {share}"
    advice = "take it out of both sides, balance it, or put it on audit.allow if it is the point of the data"
    numbers = ("num_chosen_only", "num_rejected_only", "num_both", "coverage", "win_rate", "q")
    return {
        "level": row["level"],
        "token": row["token"],
        "side": side,
        "reason": reason,
        "advice": advice,
    } | {name: row[name] for name in numbers}


def example_pairs(pairs: pl.DataFrame, kind: Any, finding: dict[str, Any], count: int = 3) -> list[str]:
    """The pair_ids of the first pairs that a token separates, in the order of pair_id."""
    from prefkit.audit.tokens import words

    side, other = ("chosen", "rejected") if finding["side"] == "chosen" else ("rejected", "chosen")
    texts = pairs.select("pair_id", words_of(side, kind).alias("has"), words_of(other, kind).alias("lacks")).sort(
        "pair_id"
    )
    found: list[str] = []
    for row in texts.iter_rows(named=True):
        if finding["token"] in words(row["has"]) and finding["token"] not in words(row["lacks"]):
            found.append(row["pair_id"])
        if len(found) == count:
            break
    return found
