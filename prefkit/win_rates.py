"""How often one model's response is better than another's, from scores or from a judge's verdicts.

Comes in: frames by prompt_id. Goes out: a row a prompt with `win`, the share of comparisons that the first side won, a
tie counting a half. A judge is asked in both orders; where it changes its mind with the order there is no verdict, and
such a comparison is counted apart: it is no tie, and says nothing of the responses.
"""

import polars as pl

WINS = {"a": 1.0, "tie": 0.5, "b": 0.0}
BY_PROMPT = pl.Schema(
    {"prompt_id": pl.String, "win": pl.Float64, "num_compared": pl.Int64, "num_inconsistent": pl.Int64}
)


def wins_by_score(rows: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """Every response of one side against every response of the other to the same prompt: the higher score wins.

    Args:
        rows: prompt_id and score; rows without a score are left out.
        others: likewise.

    Returns:
        BY_PROMPT, of the prompts that both have, sorted by prompt_id.

    Example: scores 1 and 3 against 1 and 2 win 0 + .5 + 1 + 1 of 4, so .625.
    """
    one, other = (frame.select("prompt_id", "score").drop_nulls("score") for frame in (rows, others))
    met = one.join(other, on="prompt_id", how="inner")
    ahead, behind = pl.col("score") > pl.col("score_right"), pl.col("score") < pl.col("score_right")
    won = pl.when(ahead).then(1.0).when(behind).then(0.0).otherwise(0.5)
    by_prompt = (
        met.with_columns(won.alias("win"))
        .group_by("prompt_id")
        .agg(pl.col("win").mean(), num_compared=pl.len().cast(pl.Int64), num_inconsistent=pl.lit(0, pl.Int64))
    )
    return by_prompt.select(BY_PROMPT.names()).cast(BY_PROMPT).sort("prompt_id")


def wins_by_verdict(verdicts: pl.DataFrame) -> pl.DataFrame:
    """What a judge said of each prompt's comparisons: the first side is `a`.

    Args:
        verdicts: prompt_id and winner: a | b | tie, null where the judge changed its mind with the order.

    Returns:
        BY_PROMPT, sorted by prompt_id; `win` is over the consistent verdicts, null where a prompt has none.
    """
    won = pl.col("winner").replace_strict(WINS, default=None, return_dtype=pl.Float64)
    by_prompt = (
        verdicts.with_columns(won.alias("win"))
        .group_by("prompt_id")
        .agg(
            pl.col("win").mean(),
            num_compared=pl.col("win").count().cast(pl.Int64),
            num_inconsistent=pl.col("win").null_count().cast(pl.Int64),
        )
    )
    return by_prompt.select(BY_PROMPT.names()).cast(BY_PROMPT).sort("prompt_id")


def matched(rows: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """What a judge is shown: the responses of a number to a prompt, the policy's as a; of one other, it meets all."""
    one = rows.select("prompt_id", "number", "prompt", "tools", response_a="response")
    if "number" in others.columns:
        other = others.select("prompt_id", "number", response_b="response")
        return one.join(other, on=["prompt_id", "number"], how="inner", maintain_order="left")
    first = others.unique("prompt_id", keep="first", maintain_order=True)
    return one.join(first.select("prompt_id", response_b="response"), on="prompt_id", maintain_order="left")
