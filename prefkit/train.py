"""`prefkit train`: DPO (arXiv 2305.18290) on pairs whose reference is already on disk. One model in memory, ever.

Comes in: a dataset with a finished reference of this very policy (gate.py sees to it). Goes out: a run directory with
the metrics of every step, each pair's margin each time it was seen, checkpoints, and the final model. Nothing is
tokenised and no reference model is loaded here. Several processes (accelerate launch, torchrun) share each update.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from prefkit.best import Best, best_of
from prefkit.checkpoint import (
    load_best,
    load_checkpoint,
    prune_best,
    prune_checkpoints,
    save_best,
    save_checkpoint,
)
from prefkit.config import Pipeline, TrainConfig
from prefkit.errors import DatasetError, Interrupted, is_out_of_memory, located
from prefkit.job import Claimed, Job, claim_job
from prefkit.logps import CompletionLogps
from prefkit.metrics import summarise
from prefkit.policy import agreed_policy, final_model, make_trainee
from prefkit.processes import Team, join_team
from prefkit.run import End, Trained
from prefkit.run_log import RunLog
from prefkit.schedule import (
    Limits,
    beta_at,
    dealt,
    epochs_made,
    learning_rate_at,
    longest_first,
    num_updates,
    step_rows,
)
from prefkit.sharding import wants_shards
from prefkit.updates import Made, Trainee, evaluate, update
from prefkit.work import Tell

Watch = Callable[[int, int, Mapping[str, Any]], None]  # updates made, updates in all, the row just logged


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
        MachineError: out of disk or memory, or another process of several is gone.
    """
    settings = pipeline.train
    with join_team() as team, contextlib.ExitStack() as held:
        tell = tell if team.is_main else lambda _text: None
        shards = team.size > 1 and (settings.shard_weights or wants_shards())
        own: list[Claimed] = []  # of process 0, which reads and writes for all

        def claim() -> Job:
            own.append(claim_job(pipeline, reference, out, held, go_on=go_on))
            return own[0].job

        job = team.on_main(claim)
        scorer = agreed_policy(pipeline, job.folder, job.identity, team)
        tell(f"training on {_where(scorer, team, shards=shards)} in {job.identity['dtype']}, {scorer.layout.name}")
        if any(team.on_each(stop)):
            raise Interrupted("stopped before the first step", where=job.run)
        figures = team.on_main(lambda: None if job.resume else own[0].gate(scorer, settings.seed))
        trainee = make_trainee(scorer, settings, job.folder, team, shards=shards)
        start = load_checkpoint(Path(job.resume), scorer.model, trainee.optimizer) if job.resume else 0
        _refuse_fewer(job, start, settings)
        if job.resume:
            tell(f"going on from step {start} of {job.run}" + "".join(f"\n  changed: {line}" for line in job.changed))
        team.on_main(lambda: own[0].begin(scorer.layout, team, figures, start))
        with located(job.run):
            end = _loop(trainee, job, own[0].data.train if own else None, settings, start, tell, watch, stop)
            final = final_model(scorer, team)
            return team.on_main(lambda: own[0].finish(final, end))


def _where(scorer: CompletionLogps, team: Team, *, shards: bool) -> str:
    device = scorer.device.type
    if team.size == 1:
        return device
    return f"{team.size} processes ({device}), " + ("each with a share of the weights" if shards else "each a whole")


def _refuse_fewer(job: Job, start: int, settings: TrainConfig) -> None:
    """A run that has made more updates than it is asked for cannot be made shorter."""
    if start > (total := num_updates(len(job.lengths), settings)):
        message = f"has made {start} updates, more than the {total} that are asked for"
        raise DatasetError(message, where=job.run, hint="a larger train.max_steps or train.epochs")


def _loop(
    trainee: Trainee,
    job: Job,
    train: pl.DataFrame | None,
    settings: TrainConfig,
    start: int,
    tell: Tell,
    watch: Watch,
    stop: Callable[[], bool],
) -> End:
    """Update after update, an evaluation now and then; process 0 has the rows (`train`) and writes the log."""
    team, run, every = trainee.team, Path(job.run), settings.save_steps
    total, model, limits = num_updates(len(job.lengths), settings), trainee.scorer.model, job.limits
    logs: list[RunLog] = []  # of process 0
    team.on_main(lambda: logs.append(RunLog(run, start, closed=every is not None and start % every == 0)))
    metric = settings.best_metric
    best = None if metric is None else team.on_main(lambda: best_of(metric, logs[0].rows))

    def save(made: int, *, due: bool) -> None:
        team.on_main(lambda: logs[0].write(close=due))
        save_checkpoint(run, made, model, trainee.optimizer, team)
        team.on_main(lambda: prune_checkpoints(run, every, settings.save_total_limit))
        if best is not None and best.step is not None:
            kept = best.step
            team.on_main(lambda: prune_best(run, kept))  # a resume from here needs no other

    for step, (epoch, numbers) in enumerate(
        itertools.islice(step_rows(len(job.lengths), settings), start, None), start
    ):
        beta, evaluated = beta_at(step, total, settings), {}
        if step == total or (settings.eval_steps and step and step % settings.eval_steps == 0):
            evaluated = evaluate(trainee, job.test, beta, limits)
            best = _judged(best, step, evaluated, trainee, run)
        if step == total or _waited(best, settings):
            break
        order = longest_first(numbers, job.lengths)
        rows = team.on_main(lambda order=order: train[order])  # type: ignore[index,misc]
        lengths = [job.lengths[number] for number in order]
        rate = learning_rate_at(step, total, settings)
        made, limits = _updated(trainee, rows, lengths, limits, step, rate, beta, tell)
        row = {
            "step": step,
            "epoch": epoch,
            "learning_rate": rate,
            "num_pairs": len(numbers),
            "grad_norm": made.grad_norm,
            "beta": beta,
            **summarise(made.metrics, beta),
            **evaluated,
        }
        logged = step % settings.logging_steps == 0 or bool(evaluated)

        team.on_main(functools.partial(_log, logs, row, rows, made, kept=logged))
        due = every is not None and (step + 1) % every == 0 and step + 1 < total
        if due:
            save(step + 1, due=True)
        watch(step + 1, total, row)
        if any(team.on_each(stop)) and step + 1 < total:
            if not due:
                save(step + 1, due=False)
            raise Interrupted(f"stopped after {step + 1} of {total} updates; a checkpoint is written", where=str(run))

    epoch = epochs_made(step, len(job.lengths), settings)
    last = {"step": step, "epoch": epoch, "beta": beta, **evaluated}

    def close() -> End:
        logs[0].add(last)
        logs[0].write(close=True)
        losses = [row["loss"] for row in logs[0].rows if "loss" in row]
        return End(step, losses[0], losses[-1], evaluated, None, step < total)

    end = team.on_main(close)
    if best is None or best.step is None:
        return end
    if best.step != step:
        load_best(run, best.step, model)
    return end._replace(evaluated=best.evaluated, best=best.told())


def _log(logs: list[RunLog], row: Mapping[str, Any], rows: pl.DataFrame, made: Made, *, kept: bool) -> None:
    logs[0].saw(row["step"], rows["pair_id"].to_list(), made.metrics, row["beta"])
    if kept:
        logs[0].add(row)


def _judged(best: Best | None, step: int, evaluated: Mapping[str, Any], trainee: Trainee, run: Path) -> Best | None:
    """The best evaluation with this one; its weights are kept where it is the best."""
    if best is None:
        return None
    best = best.after(step, evaluated)
    if best.step == step:
        save_best(run, step, trainee.scorer.model, trainee.team)
    return best


def _waited(best: Best | None, settings: TrainConfig) -> bool:
    patience = settings.early_stopping_patience
    return best is not None and patience is not None and best.since >= patience


def _updated(
    trainee: Trainee,
    rows: pl.DataFrame,
    lengths: list[int],
    limits: Limits,
    step: int,
    rate: float,
    beta: float,
    tell: Tell,
) -> tuple[Made, Limits]:
    """An update, and the limits it fitted into memory with: where it does not fit, micro-batches are halved.

    Nothing has changed by then: weights change when all gradients are there. Of several processes one cannot do so by
    itself, the others wait for it: there the run ends.
    """
    while True:
        shares = dealt(range(len(lengths)), lengths, limits, trainee.team.size)
        try:
            return update(trainee, rows, shares, step, rate, beta), limits
        except (RuntimeError, MemoryError) as error:
            largest = max((batch for share in shares for batch in share), key=len)
            if not is_out_of_memory(error) or trainee.team.size > 1 or len(largest) == 1:
                raise
        # only here: inside the except block the error would keep what the failed pass holds
        trainee.optimizer.zero_grad()
        limits = limits._replace(tokens=max(1, sum(lengths[number] for number in largest) // 2))
        if trainee.scorer.device.type == "cuda":
            torch.cuda.empty_cache()
        tell(f"out of memory at step {step}: from here on {limits.tokens} tokens a micro-batch")
