"""Records become pairs: by correction, by best versus worst of N, or ready made. One function a rule; pure frames.

Comes in: a frame of records (sources.py). Goes out: a frame of draft pairs with the columns of `format.ORIGIN`, not yet
validated, and for candidates a drop with a reason for every prompt that gave none.
"""

from typing import Literal, NamedTuple

import polars as pl

from prefkit.format import DROPPED, ORIGIN, Kind
from prefkit.text import flat, with_prompt_ids, words_of

Direction = Literal["higher_is_better", "lower_is_better"]
SIGNIFICANT = 12  # digits of a score that count: .3 - .1 is a margin of .2, and a mean has no order of its terms
SLACK = 1e-12  # of the scores themselves: what subtracting two of them may lose

DRAFT = ("prompt", "chosen", "rejected", *(column.name for column in ORIGIN))
ORIGIN_DTYPES = {column.name: column.dtype for column in ORIGIN}


class Selected(NamedTuple):
    """What best-versus-worst made of candidates.

    `pairs`: one draft a prompt that gave one; `dropped`: one row a prompt that gave none, with its reason;
    `num_prompts`; `num_used`: candidates in pairs (two each); `unused`: the others, counted by reason.
    """

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    num_prompts: int
    num_used: int
    unused: dict[str, int]


def _drafts(frame: pl.DataFrame, **columns: pl.Expr) -> pl.DataFrame:
    """Fill up to the draft columns, in order, with nulls where the method has nothing to say."""
    have = frame.with_columns(**columns)
    missing = [pl.lit(None, ORIGIN_DTYPES[name]).alias(name) for name in DRAFT if name not in have.columns]
    return have.with_columns(missing).select(DRAFT)


def signed(direction: Direction) -> Literal[1, -1]:
    """The factor that turns the source's score into "higher is better"."""
    return 1 if direction == "higher_is_better" else -1


def ready_pairs(records: pl.DataFrame, direction: Direction) -> pl.DataFrame:
    """Pairs as they were handed in. The margin is above 0 where the scores agree with the order."""
    margin = ((pl.col("chosen_score") - pl.col("rejected_score")) * signed(direction)).round_sig_figs(SIGNIFICANT)
    return _drafts(records, method=pl.lit("paired"), margin=margin)


def corrected_pairs(records: pl.DataFrame) -> pl.DataFrame:
    """Corrections (CLAIR, arXiv 2408.06266): the model's response is rejected, its correction chosen."""
    renamed = records.rename({"response": "rejected", "correction": "chosen", "model": "rejected_model"})
    return _drafts(renamed, method=pl.lit("correction"), weight=pl.lit(1.0))


def best_versus_worst(candidates: pl.DataFrame, kind: Kind, direction: Direction, min_margin: float = 0.0) -> Selected:
    """One pair a prompt: its best candidate against its worst.

    Args:
        candidates: prompt, response, score, model, source, source_row; in any order, of one source.
        kind: of the dataset.
        direction: which way the scores count.
        min_margin: smallest score difference that makes a pair, in the source's units, >= 0.

    A response that is empty after stripping is no candidate. Equal texts are one candidate with their mean score. A
    pair needs a margin > 0 and >= min_margin. Among equally good best and equally bad worst ones, the two closest in
    characters are taken, then the smallest content: the result does not depend on the order of the rows.
    """
    keyed = with_prompt_ids(candidates, kind).with_columns(
        flat("response", kind).alias("text"), (pl.col("score") * signed(direction)).alias("quality")
    )
    filled = keyed.filter(words_of("response", kind).str.strip_chars() != "")
    distinct = filled.group_by("prompt_id", "text", maintain_order=True).agg(
        pl.when(pl.len() > 1)
        .then(pl.col("quality", "score").mean().round_sig_figs(SIGNIFICANT))
        .otherwise(pl.col("quality", "score").first()),
        pl.col("model").min(),
        pl.col("response", "source", "source_row").first(),
    )
    ranges = _judge_prompts(keyed, distinct, min_margin)
    pairs = _closest_extremes(distinct, ranges.filter(pl.col("reason").is_null())).join(
        keyed.group_by("prompt_id").agg(pl.col("prompt").first()), on="prompt_id"
    )
    drafts = _drafts(
        pairs.sort("source", "source_row"),
        method=pl.lit("best_of_n"),
        weight=pl.lit(1.0),
        margin=pl.col("margin"),
    )
    return Selected(
        drafts,
        _prompts_without_pair(ranges.filter(pl.col("reason").is_not_null())),
        ranges.height,
        2 * drafts.height,
        _count_unused(keyed.height, filled.height, distinct.height, drafts.height),
    )


def _judge_prompts(keyed: pl.DataFrame, distinct: pl.DataFrame, min_margin: float) -> pl.DataFrame:
    """One row a prompt in order of its first appearance: best, worst, num_candidates, and why it gives no pair."""
    prompts = keyed.group_by("prompt_id", maintain_order=True).agg(pl.col("prompt", "source", "source_row").first())
    extremes = distinct.group_by("prompt_id").agg(
        best=pl.col("quality").max(), worst=pl.col("quality").min(), num_candidates=pl.len().cast(pl.Int64)
    )
    margin = (pl.col("best") - pl.col("worst")).round_sig_figs(SIGNIFICANT)
    slack = SLACK * (pl.col("best").abs() + pl.col("worst").abs())
    reason = (
        pl.when(pl.col("num_candidates").is_null())
        .then(pl.lit("no_candidate"))
        .when(pl.col("num_candidates") == 1)
        .then(pl.lit("one_candidate"))
        .when(margin <= 0)
        .then(pl.lit("tie"))
        .when(margin + slack < min_margin)
        .then(pl.lit("under_min_margin"))
    )
    judged = prompts.join(extremes, on="prompt_id", how="left", maintain_order="left")
    return judged.with_columns(margin.alias("margin"), reason.alias("reason"))


def _closest_extremes(distinct: pl.DataFrame, ranges: pl.DataFrame) -> pl.DataFrame:
    """Every best crossed with every worst of its prompt, and the one crossing that the tie rule prefers."""
    side = ["prompt_id", "text", "response", "score", "model", "source", "source_row"]
    scored = distinct.join(ranges.select("prompt_id", "best", "worst", "num_candidates"), on="prompt_id")
    best = scored.filter(pl.col("quality") == pl.col("best")).select(*side, "num_candidates")
    worst = scored.filter(pl.col("quality") == pl.col("worst")).select(side)
    crossed = best.join(worst, on="prompt_id", suffix="_rejected")
    apart = (
        pl.col("text").str.len_chars().cast(pl.Int64) - pl.col("text_rejected").str.len_chars().cast(pl.Int64)
    ).abs()
    ordered = crossed.with_columns(apart.alias("apart")).sort("prompt_id", "apart", "text", "text_rejected")
    chosen = ordered.unique("prompt_id", keep="first", maintain_order=True)
    return chosen.join(ranges.select("prompt_id", "margin"), on="prompt_id").select(
        "prompt_id",
        "margin",
        "num_candidates",
        "source",
        "source_row",
        pl.col("response").alias("chosen"),
        pl.col("response_rejected").alias("rejected"),
        pl.col("score").alias("chosen_score"),
        pl.col("score_rejected").alias("rejected_score"),
        pl.col("model").alias("chosen_model"),
        pl.col("model_rejected").alias("rejected_model"),
    )


def _prompts_without_pair(ranges: pl.DataFrame) -> pl.DataFrame:
    """Rows of the dropped table: the prompt and the reason; pair_id and both sides are null."""
    have = ranges.with_columns(stage=pl.lit("pairs"), method=pl.lit("best_of_n"))
    prompt = ranges.schema["prompt"]
    names = [column.name for column in DROPPED if column.name != "split"]
    nulls = [
        pl.lit(None, prompt if column.dtype is None else column.dtype).alias(column.name)
        for column in DROPPED
        if column.name not in have.columns
    ]
    return have.with_columns(nulls).select(names)


def _count_unused(num_all: int, num_filled: int, num_distinct: int, num_pairs: int) -> dict[str, int]:
    counts = {
        "empty_response": num_all - num_filled,
        "identical_response": num_filled - num_distinct,
        "not_selected": num_distinct - 2 * num_pairs,
    }
    return {reason: count for reason, count in counts.items() if count}
