"""`prefkit train`: DPO (arXiv 2305.18290) on pairs whose reference is already on disk. One model in memory, ever.

Comes in: a dataset with a finished reference of this very policy (gate.py sees to it). Goes out: a run directory with
the metrics of every step, each pair's margin each time it was seen, checkpoints, and the final model. Nothing is
tokenised and no reference model is loaded here.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from prefkit.batches import NUM_TOKENS
from prefkit.budget import CPU_BATCH_TOKENS
from prefkit.checkpoint import (
    DYNAMICS_ROWS,
    append_step,
    cut_dynamics,
    cut_steps,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    write_dynamics,
    write_steps,
)
from prefkit.config import Pipeline, TrainConfig, require_model
from prefkit.encode import Sides
from prefkit.errors import CheckError, DatasetError, InputError, Interrupted, located
from prefkit.format import REFERENCES, RUNS
from prefkit.gate import check_policy, check_table, find_reference, policy_of
from prefkit.identity import identity_sha256
from prefkit.layouts import choose_layout
from prefkit.locks import give_lock, take_lock
from prefkit.logps import CompletionLogps
from prefkit.losses import Objective, pair_losses, weighted_mean
from prefkit.models import check_fits, checkpoint_activations, load_model, load_tokenizer, pick_device
from prefkit.optimizers import make_optimizer
from prefkit.processes import num_processes
from prefkit.run import Trained, begin_run, claimed_run, data_sha256, finish_run, micro_batch_tokens
from prefkit.schedule import (
    Limits,
    epochs_made,
    learning_rate_at,
    limits_of,
    micro_batches,
    num_updates,
    step_batches,
)
from prefkit.store import read_manifest, write_views
from prefkit.tables import read_table
from prefkit.work import Tell

Watch = Callable[[int, int, Mapping[str, Any]], None]  # updates made, updates in all, the row just logged


class Metrics(NamedTuple):
    """One value a pair, (B,) each, on the CPU in float64."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    weights: Tensor


def train_dpo(
    pipeline: Pipeline,
    *,
    reference: str | None = None,
    out: str | None = None,
    go_on: bool = False,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _row: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a policy on the train split of the pipeline's dataset.

    Args:
        pipeline: its train section decides; max_length, dtype and template are the reference's, and where the pipeline
            says them too, it must say the same.
        reference: key of the reference; None takes the only one that is this policy's.
        out: run directory; None takes DATASET/runs/<n>, the next free number, or the newest unfinished run.
        go_on: go on with an unfinished run although settings were changed; they are noted in its run.json.
        tell: called with lines for a person.
        watch: called after every update.
        stop: asked after every update; True writes a checkpoint and ends the call, and the next one goes on.

    Raises:
        DatasetError: dataset or reference is missing or damaged, or `out` holds another run.
        GateError: the reference is not this policy's.
        ModelError: the model does not load.
        Interrupted: `stop` said so.
    """
    settings, dataset = pipeline.train, Path(pipeline.dataset)
    folder = require_model(settings.model or pipeline.precompute.model, "train.model")
    if num_processes() > 1:
        raise InputError("training runs in one process so far", hint="prefkit train, without accelerate launch")
    manifest = read_manifest(dataset)
    # precision and accumulation are this pipeline's: what `accelerate config` left in the environment has no say
    plugin = GradientAccumulationPlugin(num_steps=1)
    cpu = pick_device().type == "cpu"
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=plugin, cpu=cpu)

    tokenizer = load_tokenizer(folder)
    policy = policy_of(Path(folder), tokenizer, pipeline.precompute, manifest["kind"])
    key, recorded = find_reference(dataset, policy, reference, other=settings.other_reference)
    identity = recorded["identity"]
    same = all(identity[name] == policy.identity[name] for name in ("weights_sha256", "config"))
    pairs = read_table(dataset, "pairs", manifest)
    data = load_data(dataset, pairs, key, recorded)
    claim = {
        "reference": key,
        "model": folder,
        "policy_sha256": identity_sha256(policy.identity),
        "train": settings.model_dump(mode="json"),
        "data_sha256": data_sha256(pl.concat([data.train, data.test])),
    }
    with claimed_run(dataset, out, claim, go_on=go_on) as (run, changed):
        scorer = load_policy(pipeline, folder, tokenizer, identity, accelerator.device)
        model, layout = scorer.model, scorer.layout
        tell(f"training on {accelerator.device.type} in {identity['dtype']}, {layout.name}")
        resume = list_checkpoints(run)
        figures = None
        if stop():
            raise Interrupted("stopped before the first step", where=str(run))
        if not resume:
            place, both = dataset / REFERENCES / key, pl.concat([data.train, data.test])
            figures = check_policy(scorer, tokenizer, place, identity, both, pairs, settings.seed, same_model=same)
        del pairs
        data = Data(*(rows.drop("ref_chosen_token_logps", "ref_rejected_token_logps") for rows in data))
        if settings.gradient_checkpointing:
            with located(folder):
                checkpoint_activations(model)
        torch.manual_seed(settings.seed)
        optimizer = make_optimizer(scorer, settings)
        start = load_checkpoint(resume[-1], scorer, optimizer) if resume else 0
        _refuse_fewer(run, start, num_updates(data.train.height, settings))
        if resume:
            tell(f"going on from step {start} of {run}" + "".join(f"\n  changed: {line}" for line in changed))
        limits = limits_of(settings, micro_batch_tokens(run, settings, CPU_BATCH_TOKENS if cpu else None))
        told = claim | {"micro_batch_tokens": limits.tokens, "layout": layout.name}
        begin_run(run, dataset, manifest["counts"]["pairs"], told, figures, start, changed)
        wrapped, optimizer = accelerator.prepare(scorer, optimizer)
        with located(str(run)):
            rows = _loop(accelerator, wrapped, optimizer, data, settings, limits, run, start, watch, stop)
        if run.resolve().parent == (dataset / RUNS).resolve() and (lock := take_lock(dataset)) is not None:
            write_views(dataset, manifest["kind"])  # whoever else holds the lock writes them in the end
            give_lock(dataset, lock)
        return finish_run(run, dataset, manifest, model, tokenizer, rows, key)


def load_policy(
    pipeline: Pipeline, folder: str, tokenizer: Any, identity: Mapping[str, Any], device: torch.device
) -> CompletionLogps:
    """The policy in the reference's regime, in the layout that it can be shown right in.

    Raises:
        ModelError: it does not load or fit.
        InputError: the attention that was asked for is not right for it, or has no backward here.
    """
    attention, max_length = pipeline.precompute.attention, identity["max_length"]
    model = load_model(folder, identity["dtype"], device, attention)
    with located(folder):
        check_fits(model, tokenizer, max_length, folder)
        layout = choose_layout(model, identity["dtype"], max_length, attention, backward=True)
    if layout.attention == "flex" and device.type == "cpu":
        raise InputError(
            "flex attention has no backward on a CPU",
            where="precompute.attention",
            hint="--set precompute.attention=auto",
        )
    return CompletionLogps(model, identity["dtype"], layout)


def _refuse_fewer(run: Path, start: int, total: int) -> None:
    """A run that has made more updates than it is asked for cannot be made shorter."""
    if start > total:
        message = f"has made {start} updates, more than the {total} that are asked for"
        raise DatasetError(message, where=str(run), hint="a larger train.max_steps or train.epochs")


class Data(NamedTuple):
    """The reference rows of both splits with `weight`, sorted by pair_id: the order on disk has no say in training."""

    train: pl.DataFrame
    test: pl.DataFrame


def load_data(dataset: Path, pairs: pl.DataFrame, key: str, recorded: Mapping[str, Any]) -> Data:
    """The scored pairs of both splits, checked as a table (the first half of the gate)."""
    pairs = pairs.select("pair_id", "split", "weight").sort("pair_id")
    rows = check_table(dataset, key, recorded, pairs["pair_id"].to_list())
    joined = rows.join(pairs, on="pair_id", how="left", maintain_order="left")
    train, test = (joined.filter(pl.col("split") == split) for split in ("train", "test"))
    if train.is_empty():
        raise DatasetError("no pair to train on", where=str(dataset), hint="prefkit query DATASET 'from dropped'")
    return Data(train, test)


def _loop(
    accelerator: Accelerator,
    policy: Any,
    optimizer: Any,
    data: Data,
    settings: TrainConfig,
    limits: Limits,
    run: Path,
    start: int,
    watch: Watch,
    stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    total, every = num_updates(data.train.height, settings), settings.save_steps
    rows = cut_steps(run, start)
    seen = cut_dynamics(run, start, closed=every is not None and start % every == 0)

    def save(step: int) -> None:
        write_dynamics(run, seen)
        write_steps(run, rows)
        save_checkpoint(run, step, accelerator.unwrap_model(policy), optimizer.optimizer)
        prune_checkpoints(run, every, settings.save_total_limit)

    for step, (epoch, numbers) in enumerate(step_batches(_lengths(data.train), settings, limits)):
        if step == total:
            break
        if step < start:
            continue
        row: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "learning_rate": learning_rate_at(step, total, settings),
        }
        if settings.eval_steps and step and step % settings.eval_steps == 0:
            row |= evaluate(policy, data.test, settings, limits)
        metrics = update(accelerator, policy, optimizer, data.train, numbers, settings, row)
        seen += _dynamics(step, data.train, numbers, metrics)
        if len(seen) >= DYNAMICS_ROWS:
            write_dynamics(run, seen)
            seen = []
        if step % settings.logging_steps == 0 or "eval_loss" in row:
            rows.append(row)
            append_step(run, row)
        made = step + 1
        due = every is not None and made % every == 0 and made < total
        if due:
            save(made)
            seen = []
        watch(made, total, row)
        if made < total and stop():
            if not due:
                save(made)
            raise Interrupted(f"stopped after {made} of {total} updates; a checkpoint is written", where=str(run))
    last = {
        "step": total,
        "epoch": epochs_made(total, data.train.height, settings),
        **evaluate(policy, data.test, settings, limits),
    }
    append_step(run, last)
    write_dynamics(run, seen)
    write_steps(run, [*rows, last])
    return [*rows, last]


def update(
    accelerator: Accelerator,
    policy: Any,
    optimizer: Any,
    rows: pl.DataFrame,
    numbers: Sequence[Sequence[int]],
    settings: TrainConfig,
    row: dict[str, Any],
) -> Metrics:
    """One optimiser update over the rows of all micro-batches; fills `row` with its metrics, measured before it.

    The metrics are in the order of `numbers`.
    """
    parts = [rows[list(batch)] for batch in numbers]
    total_weight = float(sum(part["weight"].sum() for part in parts))
    found = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy):
            losses, metrics = score_pairs(policy, part, settings)
            weights = metrics.weights.to(losses.device, losses.dtype)
            accelerator.backward(weighted_mean(losses, weights, total_weight))
        found.append(metrics)
    if not all(bool(part.losses.isfinite().all()) for part in found):
        raise CheckError(
            f"the loss is not finite at step {row['step']}", expected="a number", hint="a smaller train.learning_rate"
        )
    limit = settings.max_grad_norm if settings.max_grad_norm is not None else math.inf
    norm = accelerator.clip_grad_norm_(policy.parameters(), limit)
    if not math.isfinite(float(norm)):
        raise CheckError(
            f"the gradient is not finite at step {row['step']}",
            expected="a number",
            hint="a smaller train.learning_rate",
        )
    for group in optimizer.param_groups:
        group["lr"] = row["learning_rate"]
    optimizer.step()
    optimizer.zero_grad()
    metrics = joined(found)
    row |= {"num_pairs": len(metrics.losses), "grad_norm": float(norm), **summarise(metrics)}
    return metrics


def score_pairs(policy: Any, rows: pl.DataFrame, settings: TrainConfig) -> tuple[Tensor, Metrics]:
    """Losses of some pairs, with their graph, and the detached metrics."""
    columns = (rows[f"{side}_ids"].to_list() for side in Sides._fields)
    pairs = [Sides(*ids) for ids in zip(*columns, strict=True)]
    scorer = getattr(policy, "module", policy)
    device = scorer.device
    scored = policy(scorer.batch(pairs))
    reference = rows.select("ref_chosen_logps", "ref_rejected_logps").to_torch(dtype=pl.Float32).to(device)
    chosen_logratios = scored.chosen_logps - reference[:, 0]
    rejected_logratios = scored.rejected_logps - reference[:, 1]
    counts = rows.select("num_chosen_tokens", "num_rejected_tokens").to_torch(dtype=pl.Float32).to(device)
    objective = Objective(settings.loss, settings.label_smoothing, settings.dpop_lambda, settings.sft_weight)
    losses = pair_losses(
        scored.chosen_logps,
        scored.rejected_logps,
        reference[:, 0],
        reference[:, 1],
        counts[:, 0],
        counts[:, 1],
        settings.beta,
        objective,
    )
    metrics = Metrics(
        losses,
        settings.beta * chosen_logratios,
        settings.beta * rejected_logratios,
        scored.chosen_logps,
        scored.rejected_logps,
        torch.tensor(rows["weight"].to_list()),
    )
    return losses, Metrics._make(value.detach().cpu().double() for value in metrics)


def joined(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of several batches as those of one."""
    return Metrics._make(torch.cat([getattr(part, name) for part in parts]) for name in Metrics._fields)


def summarise(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """The metrics with TRL's names, means over the pairs; the loss is weighted as it is trained on."""
    margins = metrics.chosen_rewards - metrics.rejected_rewards
    values = {
        "loss": weighted_mean(metrics.losses, metrics.weights, float(metrics.weights.sum())),
        "rewards/chosen": metrics.chosen_rewards.mean(),
        "rewards/rejected": metrics.rejected_rewards.mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": metrics.chosen_logps.mean(),
        "logps/rejected": metrics.rejected_logps.mean(),
    }
    return {prefix + name: float(value) for name, value in values.items()}


def _lengths(rows: pl.DataFrame) -> list[int]:
    """Prompt + chosen + rejected tokens of every row."""
    return rows.select(NUM_TOKENS).to_series().to_list()


def evaluate(policy: Any, rows: pl.DataFrame, settings: TrainConfig, limits: Limits) -> dict[str, float]:
    """The eval_ metrics over a split, in batches as in training; empty if there are no rows."""
    batches = micro_batches(range(rows.height), _lengths(rows), limits)
    with torch.no_grad():
        found = [score_pairs(policy, rows[batch], settings)[1] for batch in batches]
    if not found:
        return {}
    return summarise(joined(found), "eval_")


def _dynamics(
    step: int, rows: pl.DataFrame, numbers: Sequence[Sequence[int]], metrics: Metrics
) -> list[dict[str, Any]]:
    """A row a pair: within an update the longest pair first, by pair_id where they are equal."""
    ids = rows["pair_id"][[number for batch in numbers for number in batch]].to_list()
    rewards = zip(ids, metrics.chosen_rewards.tolist(), metrics.rejected_rewards.tolist(), strict=True)
    return [
        {
            "step": step,
            "pair_id": pair,
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
        }
        for pair, chosen, rejected in rewards
    ]
