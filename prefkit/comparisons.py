"""Two responses and the votes on them become a pair: the side with the most votes is chosen.

Ties are not a win for anybody: they are dropped and counted. The share of votes for chosen is kept as agreement.
"""

import polars as pl

from prefkit.format import Kind
from prefkit.pairs import SIGNIFICANT, as_drafts, as_dropped
from prefkit.screen import Screened, screen


def compared_pairs(records: pl.DataFrame, kind: Kind, min_agreement: float = 0.0) -> Screened:
    """Drafts of comparisons, and drops: `tie` and `under_min_agreement`.

    Args:
        records: prompt, response_a, response_b, votes (lists of a | b | tie, not empty), models, scores, source,
            source_row.
        kind: of the dataset.
        min_agreement: smallest share of all votes, ties among them, that chosen must have, 0..1.

    The label with strictly more votes than each other one wins: a 2, b 2, tie 1 is a tie, and so is a 1, b 2, tie 2.
    In a dropped tie chosen stands for the first response and rejected for the second.
    """
    num = {label: pl.col("votes").list.count_matches(label) for label in ("a", "b", "tie")}
    b_wins = (num["b"] > num["a"]) & (num["b"] > num["tie"])
    a_wins = (num["a"] > num["b"]) & (num["a"] > num["tie"])
    best = pl.max_horizontal(num["a"], num["b"])

    def pick(name: str, *, winner: bool) -> pl.Expr:
        sides = (f"{name}_b", f"{name}_a") if winner else (f"{name}_a", f"{name}_b")
        return pl.when(b_wins).then(pl.col(sides[0])).otherwise(pl.col(sides[1]))

    sided = records.with_columns(
        pick("response", winner=True).alias("chosen"),
        pick("response", winner=False).alias("rejected"),
        pick("model", winner=True).alias("chosen_model"),
        pick("model", winner=False).alias("rejected_model"),
        pick("score", winner=True).alias("chosen_score"),
        pick("score", winner=False).alias("rejected_score"),
        agreement=best / pl.col("votes").list.len(),
        method=pl.lit("comparison"),
        weight=pl.lit(1.0),
        tied=~(a_wins | b_wins),
    )
    judged = screen(
        sided.with_columns(
            margin=(pl.col("chosen_score") - pl.col("rejected_score")).round_sig_figs(SIGNIFICANT),
        ),
        "pairs",
        {"tie": pl.col("tied"), "under_min_agreement": pl.col("agreement") < min_agreement},
    )
    return Screened(as_drafts(judged.kept), as_dropped(judged.dropped, kind))
