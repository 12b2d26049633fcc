"""One update of the policy, and one evaluation: the same whatever the micro-batches and however many processes.

An update's pairs are dealt out among the processes, each passes its own through the policy in micro-batches, and the
gradient is that of the weighted mean of all losses. What is measured comes back to all of them.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from prefkit.batches import NUM_TOKENS
from prefkit.encode import Sides
from prefkit.errors import CheckError, MachineError, is_out_of_memory
from prefkit.logps import CompletionLogps
from prefkit.losses import Objective, pair_losses, weighted_mean
from prefkit.metrics import Metrics, joined, picked, summarise, token_kl
from prefkit.perf import peak_memory
from prefkit.processes import ALONE, Team
from prefkit.schedule import Limits, dealt
from prefkit.sharding import whole

SMALLER_STEP = "a smaller train.learning_rate"


class Trainee(NamedTuple):
    """The policy and what changes it, in one process of a team.

    `scorer`: the policy; `policy`: what is called in an update, the scorer itself or DDP around it; `shared`: each
    process has but a share of the weights, so all of them must make the same number of passes.
    """

    scorer: CompletionLogps
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    max_grad_norm: float | None = None
    team: Team = ALONE
    shared: bool = False


class Made(NamedTuple):
    """What an update measured before it was made, in the order of its pairs."""

    metrics: Metrics
    grad_norm: float
    memory: int  # bytes, the most that any process has held so far


def update(
    trainee: Trainee,
    rows: pl.DataFrame,
    shares: Sequence[Sequence[Sequence[int]]],
    step: int,
    learning_rate: float,
    beta: float,
) -> Made:
    """One optimiser update over all rows.

    Args:
        trainee: the policy, in this process.
        rows: the update's rows of the reference, with `weight`.
        shares: of every process its micro-batches, as row numbers; `schedule.dealt` makes them.
        step: updates made before, for the message.
        learning_rate: of this update.
        beta: of this update.

    Raises:
        CheckError: a loss or the gradient is not a finite number; no weight has changed.
    """
    with trainee.team.together():
        found = accumulate(trainee, rows, shares, beta)
    each = trainee.team.on_each(lambda: (found, peak_memory(trainee.scorer.device)))
    metrics = in_order(shares, [own for own, _ in each])
    if not bool(metrics.losses.isfinite().all()):
        raise CheckError(f"the loss is not finite at step {step}", expected="a number", hint=SMALLER_STEP)
    norm = apply_gradient(trainee, step, learning_rate)
    return Made(metrics, norm, max(memory for _, memory in each))


def accumulate(
    trainee: Trainee, rows: pl.DataFrame, shares: Sequence[Sequence[Sequence[int]]], beta: float
) -> Metrics | None:
    """Forward and backward of this process's micro-batches: gradients as of all rows' weighted mean loss.

    Returns:
        what was measured on them, None where this process has none.
    """
    own, total = shares[trainee.team.rank], float(rows["weight"].sum())
    passes = [rows[list(batch)] for batch in own]
    found = []
    # in a collective a process takes part even where it has nothing to add: a pair of weight 0
    most = max(len(share) for share in shares) if trainee.shared else max(1, len(own))
    passes += [rows[-1:].with_columns(weight=pl.lit(0.0))] * (most - len(own))
    for number, part in enumerate(passes):
        with _silent(trainee.policy) if number < most - 1 else contextlib.nullcontext():
            losses, metrics = score_pairs(trainee.policy, part, trainee.objective, beta)
            weights = metrics.weights.to(losses.device, losses.dtype)
            # the processes' gradients are averaged, ours are parts of a sum
            torch.autograd.backward(weighted_mean(losses, weights, total) * trainee.team.size)
        if number < len(own):
            found.append(metrics)
    return joined(found) if found else None


def _silent(policy: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A backward that tells the other processes nothing yet; shared weights give their gradient away at once."""
    no_sync = getattr(policy, "no_sync", contextlib.nullcontext)
    return no_sync()


def apply_gradient(trainee: Trainee, step: int, learning_rate: float) -> float:
    """Clip the gradient, make the step, forget the gradient; returns the norm before clipping.

    Raises:
        CheckError: it is not finite.
    """
    limit = trainee.max_grad_norm if trainee.max_grad_norm is not None else math.inf
    with trainee.team.together():
        norm = float(whole(nn.utils.clip_grad_norm_(trainee.policy.parameters(), limit)))
    if not math.isfinite(norm):
        raise CheckError(f"the gradient is not finite at step {step}", expected="a number", hint=SMALLER_STEP)
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate
    try:
        trainee.optimizer.step()
    except (RuntimeError, MemoryError) as error:  # some weights may have changed: smaller passes would not help
        if not is_out_of_memory(error):
            raise
        message = f"out of memory in the optimiser at step {step}"
        raise MachineError(message, hint="train.lora, another train.optimizer, or train.shard_weights") from None
    trainee.optimizer.zero_grad()
    return norm


def in_order(shares: Sequence[Sequence[Sequence[int]]], found: Sequence[Metrics | None]) -> Metrics:
    """What every process measured on its share, by row number."""
    numbers = [number for share in shares for batch in share for number in batch]
    places = sorted(range(len(numbers)), key=numbers.__getitem__)
    return picked(joined([metrics for metrics in found if metrics is not None]), places)


def score_pairs(policy: nn.Module, rows: pl.DataFrame, objective: Objective, beta: float) -> tuple[Tensor, Metrics]:
    """Losses of some pairs, with their graph, and the detached metrics."""
    columns = (rows[f"{side}_ids"].to_list() for side in Sides._fields)
    pairs = [Sides(*ids) for ids in zip(*columns, strict=True)]
    scorer: Any = getattr(policy, "module", policy)
    batch = scorer.batch(pairs)
    scored = policy(batch)
    table = _values(rows, scorer.device)
    losses = pair_losses(
        scored.chosen_logps,
        scored.rejected_logps,
        table["ref_chosen_logps"],
        table["ref_rejected_logps"],
        table["num_chosen_tokens"],
        table["num_rejected_tokens"],
        beta,
        objective,
    )
    distances = token_kl(scored.token_logps, _token_logps(rows).to(scorer.device))
    by_side = distances.new_zeros(2 * len(pairs)).index_add(0, batch.sides, distances)
    metrics = Metrics(
        losses,
        scored.chosen_logps - table["ref_chosen_logps"],
        scored.rejected_logps - table["ref_rejected_logps"],
        scored.chosen_logps,
        scored.rejected_logps,
        by_side[0::2],
        by_side[1::2],
        table["num_chosen_tokens"],
        table["num_rejected_tokens"],
        torch.tensor(rows["weight"].to_list(), dtype=torch.float64),
    )
    return losses, Metrics._make(value.detach().cpu().double() for value in metrics)


def _values(rows: pl.DataFrame, device: torch.device) -> Mapping[str, Tensor]:
    names = ["ref_chosen_logps", "ref_rejected_logps", "num_chosen_tokens", "num_rejected_tokens"]
    table = rows.select(names).to_torch(dtype=pl.Float32).to(device)
    return dict(zip(names, table.unbind(1), strict=True))


def _token_logps(rows: pl.DataFrame) -> Tensor:
    """The reference's log-probs of all tokens, as a batch has them: pair by pair, chosen before rejected."""
    both = pl.concat_list("ref_chosen_token_logps", "ref_rejected_token_logps")
    return rows.select(both.explode()).to_series().to_torch()


def evaluate(trainee: Trainee, rows: pl.DataFrame, beta: float, limits: Limits) -> dict[str, float]:
    """The eval_ metrics over some rows, which the processes share out; empty if there are no rows."""
    if rows.is_empty():
        return {}
    lengths = rows.select(NUM_TOKENS).to_series().to_list()
    shares = dealt(range(rows.height), lengths, limits, trainee.team.size)
    own = shares[trainee.team.rank]
    most = max(len(share) for share in shares) if trainee.shared else len(own)
    with torch.no_grad(), trainee.team.together():
        found = [
            score_pairs(trainee.scorer, rows[list(batch)], trainee.objective, beta)[1]
            for batch in [*own, *[[0]] * (most - len(own))]
        ][: len(own)]
    each = trainee.team.on_each(lambda: joined(found) if found else None)
    return summarise(in_order(shares, each), beta, "eval_")
