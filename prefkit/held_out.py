"""Held-out preference accuracy: how often a policy's reward puts chosen above rejected in pairs it was not trained on.

Comes in: a dataset, a reference in it, and the policy. Goes out: a row a test pair. The reference is the table that a
reference pass has written, so no reference model is loaded; the figures are those of a run's own last evaluation.
"""

from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from prefkit.batches import NUM_TOKENS
from prefkit.completions import Watch
from prefkit.config import TrainConfig
from prefkit.intervals import CONFIDENCE, Measured, pooled_share, ratio_by_prompt
from prefkit.logps import CompletionLogps
from prefkit.losses import Objective
from prefkit.metrics import joined, picked, summarise
from prefkit.reference_table import reference_rows
from prefkit.schedule import Limits, beta_at, micro_batches
from prefkit.store import read_manifest
from prefkit.tables import read_table
from prefkit.updates import score_pairs

PAIRS: dict[str, Any] = {
    "pair_id": pl.String,
    "prompt_id": pl.String,
    "rewards_chosen": pl.Float64,
    "rewards_rejected": pl.Float64,
    "right": pl.Float64,
    "margin": pl.Float64,
}


class HeldOut(NamedTuple):
    """`pairs`: a row a pair (PAIRS), sorted by pair_id; `metrics`: means of format.SIDE_METRICS, as a run has them."""

    pairs: pl.DataFrame
    metrics: dict[str, float]


def test_rows(dataset: Path, manifest: dict[str, Any], key: str, recorded: dict[str, Any]) -> pl.DataFrame:
    """The scored pairs of the test split with prompt_id and weight, sorted by pair_id; none where there is no such.

    Raises:
        DatasetError, GateError: a part was changed, or the reference is not complete for these pairs.
    """
    pairs = read_table(dataset, "pairs", manifest).filter(pl.col("split") == "test")
    pairs = pairs.select("pair_id", "prompt_id", "weight").sort("pair_id")
    rows = reference_rows(dataset, key, recorded, pairs["pair_id"].to_list())
    return rows.join(pairs, on="pair_id", how="left", maintain_order="left")


def num_trained(prompt_ids: pl.Series, dataset: Path) -> int:
    """How many of these prompts, each counted once, a run on the dataset was trained on."""
    pairs = read_table(dataset, "pairs", read_manifest(dataset)).filter(pl.col("split") == "train")
    return len({*pairs["prompt_id"]} & {*prompt_ids})


def held_out_metrics(
    scorer: CompletionLogps,
    rows: pl.DataFrame,
    settings: TrainConfig,
    limits: Limits,
    watch: Watch = lambda _done, _total: None,
    steps: int | None = None,
) -> HeldOut:
    """Reward accuracy and margin of the policy against the reference table.

    Args:
        scorer: the policy, in the reference's regime.
        rows: of `test_rows`, at least one.
        settings: of training: loss and beta.
        limits: of a pass.
        watch: called with the pairs that are done, and all.
        steps: updates of the run, where its beta changed with them.
    """
    objective = Objective(settings.loss, settings.label_smoothing, settings.dpop_lambda, settings.sft_weight)
    beta = beta_at(steps, steps, settings) if steps else settings.beta
    lengths = rows.select(NUM_TOKENS).to_series().to_list()
    batches, found, order = micro_batches(range(rows.height), lengths, limits), [], []
    with torch.no_grad():
        for batch in batches:
            found.append(score_pairs(scorer, rows[list(batch)], objective, beta)[1])
            order += batch
            watch(len(order), rows.height)
    places = sorted(range(len(order)), key=order.__getitem__)
    metrics = picked(joined(found), places)
    chosen, rejected = (beta * some.numpy() for some in (metrics.chosen_logratios, metrics.rejected_logratios))
    pairs = rows.select("pair_id", "prompt_id").with_columns(
        pl.Series("rewards_chosen", chosen, pl.Float64),
        pl.Series("rewards_rejected", rejected, pl.Float64),
        pl.Series("right", (metrics.chosen_logratios > metrics.rejected_logratios).numpy()).cast(pl.Float64),
        pl.Series("margin", chosen - rejected, pl.Float64),
    )
    return HeldOut(pairs, summarise(metrics, beta))


def accuracies(pairs: pl.DataFrame, confidence: float = CONFIDENCE) -> list[tuple[str, Measured]]:
    """Accuracy and margin over the pairs, as a run's own evaluation has them, with intervals by prompt.

    Args:
        pairs: of a HeldOut.
        confidence: of the intervals.
    """
    margins = pairs.with_columns(one=pl.lit(1.0))
    return [
        ("rewards/accuracies", pooled_share(pairs, "right", confidence)),
        ("rewards/margins", ratio_by_prompt(margins, "margin", "one", confidence)),
    ]
