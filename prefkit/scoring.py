"""A reference model scores the planned batches of a part.

Comes in: encoded pairs and their plan. Goes out: rows with the columns of format.REFERENCE. A batch is computed as it
was planned, by whichever process takes it, so the numbers do not depend on how many processes there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from prefkit.batches import slices
from prefkit.config import Pipeline, require_model
from prefkit.encode import Sides
from prefkit.errors import MachineError, ModelError, is_out_of_memory, located
from prefkit.format import REFERENCE, schema
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps
from prefkit.models import check_fits, load_model, load_tokenizer, pick_device
from prefkit.processes import Team
from prefkit.work import Tell

SCORED = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_token_logps", "ref_rejected_token_logps", "ln_ches")
SCORES: dict[str, Any] = {name: schema("reference", "text")[name] for name in SCORED}


def load_scorer(pipeline: Pipeline, tell: Tell) -> CompletionLogps:
    """The reference model, ready to score, in the layout it can be shown right in."""
    settings = pipeline.precompute
    folder = require_model(settings.model, "precompute.model")
    device = pick_device()
    model = load_model(folder, settings.dtype, device, settings.attention)
    with located(folder):
        check_fits(model, load_tokenizer(folder), settings.max_length, folder)
        layout = choose_layout(model, settings.dtype, settings.max_length, settings.attention)
    tell(f"scoring on {device} in {settings.dtype}, {layout.name}")
    return CompletionLogps(model, settings.dtype, layout)


def score_batches(
    scorer: CompletionLogps,
    rows: pl.DataFrame,
    encoded: pl.DataFrame,
    team: Team,
    watch: Callable[[int], None],
    tell: Tell,
) -> pl.DataFrame:
    """Score this process's share of the batches of a part: every size-th batch, beginning with its rank.

    Args:
        scorer: the reference model.
        rows: the part's rows of the plan.
        encoded: the ids of its pairs.
        team: who else takes batches.
        watch: called with the number of the batch just scored.
        tell: called with lines for a person.

    Returns:
        pair_id and SCORES, one row a pair.
    """
    pieces = [pl.DataFrame(schema={"pair_id": pl.String, **SCORES})]
    for number, ((batch,), planned) in enumerate(rows.group_by("batch", maintain_order=True)):
        if number % team.size == team.rank:
            pieces.append(score_planned(scorer, encoded, planned, tell))
            watch(int(batch))
    return pl.concat(pieces)


def score_planned(scorer: CompletionLogps, encoded: pl.DataFrame, planned: pl.DataFrame, tell: Tell) -> pl.DataFrame:
    """One planned batch: pair_id and SCORES of its pairs. Where the layout pads, in slices that keep to the budget."""
    pairs = sides_of(encoded, planned["pair_id"].to_list())
    lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    cut = slices(lengths, planned["max_batch_tokens"][0], scorer.layout.rows)
    scores = pl.concat([score_sides(scorer, pairs[some], tell) for some in cut])
    return scores.select(planned["pair_id"], *SCORES)


def assemble_part(rows: pl.DataFrame, encoded: pl.DataFrame, scores: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The rows of a part, in the order of the plan, in the columns of format.REFERENCE."""
    joined = rows.select("pair_id").join(encoded, on="pair_id", how="left", maintain_order="left")
    wanted = schema("reference", "text")
    return joined.join(pl.concat(scores), on="pair_id", how="left", maintain_order="left").select(
        pl.col(c.name).cast(wanted[c.name]) for c in REFERENCE
    )


def sides_of(encoded: pl.DataFrame, pair_ids: Sequence[str]) -> list[Sides]:
    """The ids of some pairs, in the order of pair_ids."""
    order = pl.DataFrame({"pair_id": pair_ids})
    rows = order.join(encoded, on="pair_id", how="left", maintain_order="left")
    columns = (rows[f"{side}_ids"].to_list() for side in Sides._fields)
    return [Sides(*ids) for ids in zip(*columns, strict=True)]


def score_sides(scorer: CompletionLogps, pairs: list[Sides], tell: Tell) -> pl.DataFrame:
    """SCORES of some pairs by one forward pass; out of memory computes the same batch in halves."""
    scored = None
    try:
        with torch.inference_mode():
            scored = scorer(scorer.batch(pairs))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(pairs) == 1:
            raise MachineError(
                "out of memory on a single pair", hint="a smaller precompute.max_length, or another dtype"
            ) from None
    if scored is None:  # only here: inside the except block the error would keep what the failed pass holds
        if scorer.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(pairs) // 2
        tell(f"out of memory with {len(pairs)} pairs in a batch: computing it in two slices")
        return pl.concat([score_sides(scorer, part, tell) for part in (pairs[:half], pairs[half:])])
    tokens = scored.token_logps.float().cpu().numpy()
    if not np.isfinite(tokens).all():
        raise ModelError(
            "the model's log-probs are not finite", expected="numbers: look for NaN or infinite weights, or try float32"
        )
    ches = [None] * len(pairs) if scored.ln_ches is None else scored.ln_ches.float().cpu().tolist()
    return _as_columns(pairs, tokens, ches)


def _as_columns(pairs: list[Sides], tokens: "np.ndarray[Any, np.dtype[np.float32]]", ches: list[Any]) -> pl.DataFrame:
    ends = np.cumsum([len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)])
    lists = np.split(tokens, ends[:-1])
    # summed in float64, rounded once
    sums = np.array([piece.sum(dtype=np.float64) for piece in lists], dtype=np.float32)
    return pl.DataFrame(
        {
            "ref_chosen_logps": sums[0::2],
            "ref_rejected_logps": sums[1::2],
            "ref_chosen_token_logps": pl.Series([piece.tolist() for piece in lists[0::2]], dtype=pl.List(pl.Float32)),
            "ref_rejected_token_logps": pl.Series([piece.tolist() for piece in lists[1::2]], dtype=pl.List(pl.Float32)),
            "ln_ches": pl.Series(ches, dtype=pl.Float32),
        }
    )
