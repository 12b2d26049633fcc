"""`prefkit train`: DPO (arXiv 2305.18290) on pairs whose reference is already on disk. One model in memory, ever.

Comes in: a dataset with a finished reference of this very policy (gate.py sees to it). Goes out: a run directory with
the metrics of every step, each pair's margin each time it was seen, checkpoints, and the final model. Nothing is
tokenised and no reference model is loaded here. Several processes (accelerate launch, torchrun) share each update.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from prefkit.best import best_of
from prefkit.checkpoint import (
    history_of,
    list_best,
    load_best,
    load_checkpoint,
    prune_best,
    prune_checkpoints,
    save_best,
    save_checkpoint,
)
from prefkit.config import Changes, Pipeline, TrainConfig
from prefkit.errors import CheckError, DatasetError, Interrupted, is_out_of_memory, located
from prefkit.job import Claimed, Job, claim_job
from prefkit.logps import CompletionLogps
from prefkit.metrics import summarise
from prefkit.perf import Clock, peak_flops, perf_row, update_flops, work_of
from prefkit.policy import agreed_policy, final_model, make_trainee
from prefkit.processes import Team, join_team
from prefkit.run import End, Trained
from prefkit.run_log import RunLog
from prefkit.schedule import (
    beta_at,
    dealt,
    epochs_made,
    learning_rate_at,
    longest_first,
    num_updates,
    step_rows,
)
from prefkit.sharding import wants_shards
from prefkit.signs import Signs
from prefkit.target import Target, pipeline_of
from prefkit.trackers import Trackers
from prefkit.updates import SMALLER_STEP, Made, Trainee, evaluate, update
from prefkit.work import Tell

Watch = Callable[[int, int, Mapping[str, Any]], None]  # updates made, updates in all, the row just logged


def train_dpo(
    target: Target,
    *,
    changes: Changes = (),
    reference: str | None = None,
    out: str | None = None,
    go_on: bool = False,
    beside: bool = False,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _row: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a policy with DPO on the train split of a dataset, against a reference that is on disk.

    Args:
        target: a dataset directory, a pipeline file or a loaded Pipeline. Its train section decides; max_length, dtype
            and template are the reference's, and where the pipeline says them too, it must say the same.
        changes: settings by their dotted keys, as in `load_pipeline`.
        reference: key of the reference; None takes the only one that is this policy's.
        out: run directory; None takes DATASET/runs/<n>, the next free number, or the newest unfinished run.
        go_on: go on with an unfinished run although settings were changed; they are noted in its run.json.
        beside: leave unfinished runs of other settings alone and begin a new one, where that would be refused.
        tell: called with lines for a person.
        watch: called after every update with the updates that are made, all updates, and the row of steps just logged.
        stop: asked after every update; True writes a checkpoint and ends the call, and the next one goes on.

    Returns:
        the run directory, its losses, and the metrics of the final model on the test split.

    Raises:
        DatasetError: dataset or reference is missing or damaged, or `out` holds another run.
        GateError: the reference is not this policy's.
        ModelError: the model does not load.
        Interrupted: `stop` said so.
        MachineError: out of disk or memory, or another process of several is gone.

    Example:
        trained = prefkit.train_dpo("demo/dataset", changes={"train.beta": 0.05, "train.max_steps": 5})
        print(trained.run, trained.first_loss, trained.loss, trained.eval)
    """
    pipeline = pipeline_of(target, changes)
    shards = wants_shards() or pipeline.train.shard_weights
    with join_team() as team, contextlib.ExitStack() as held:
        own: list[Claimed] = []  # of process 0, which reads and writes for all

        def claim() -> Job:
            several = shards and team.size > 1
            own.append(claim_job(pipeline, reference, out, held, go_on=go_on, beside=beside, shards=several))
            return own[0].job

        job = team.on_main(claim)
        told = tell if team.is_main else lambda _text: None
        if shards and team.size == 1:
            told("train.shard_weights has no effect in one process")
        if pipeline.train.eval_steps is not None and job.test.is_empty():
            told("train.eval_steps has no effect: there is no test split")
        return _trained(
            pipeline, job, own[0] if own else None, team, told, watch, stop, shards=shards and team.size > 1
        )


def _trained(
    pipeline: Pipeline,
    job: Job,
    own: Claimed | None,
    team: Team,
    tell: Tell,
    watch: Watch,
    stop: Callable[[], bool],
    *,
    shards: bool,
) -> Trained:
    """Load the policy, gate, train, save. What holds on to the other processes (DDP) ends with this call."""
    settings = pipeline.train
    scorer = agreed_policy(pipeline, job.folder, job.identity, team)
    tell(f"training on {_where(scorer, team, shards=shards)} in {job.identity['dtype']}, {scorer.layout.name}")
    if any(team.on_each(stop)):
        raise Interrupted("stopped before the first step", where=job.run)
    figures = team.on_main(lambda: None if own is None or job.resume else own.gate(scorer, settings.seed))
    trainee = make_trainee(scorer, settings, job.folder, team, shards=shards)
    start = load_checkpoint(Path(job.resume), scorer.model, trainee.optimizer, team) if job.resume else 0
    _refuse_fewer(job, start, settings)
    if job.resume:
        tell(f"going on from step {start} of {job.run}" + "".join(f"\n  changed: {line}" for line in job.changed))
    team.on_main(lambda: None if own is None else own.begin(scorer.layout, team, figures, start))
    with located(job.run):
        loop = _Loop(trainee, job, own, settings, start, tell)
        end = loop.go(watch, stop)
        final = final_model(trainee, pipeline, job.folder, job.identity["dtype"])
        return team.on_main(lambda: own.finish(final, end))  # type: ignore[union-attr]


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


class _Loop:
    """Update after update, an evaluation now and then; process 0 has the rows (`own`) and writes the log."""

    def __init__(
        self, trainee: Trainee, job: Job, own: Claimed | None, settings: TrainConfig, start: int, tell: Tell
    ) -> None:
        self.trainee, self.job, self.own, self.settings, self.tell = trainee, job, own, settings, tell
        self.team, self.run, self.start = trainee.team, Path(job.run), start
        self.model, self.limits = trainee.scorer.model, job.limits
        self.total, self.every = num_updates(len(job.lengths), settings), settings.save_steps
        device = trainee.scorer.device
        self.clock, peak = Clock(device), peak_flops(device, trainee.scorer.dtype, settings.peak_tflops)
        self.peak = None if peak is None else peak * self.team.size
        closed = self.every is not None and start % self.every == 0
        self.logs: list[RunLog] = []  # of process 0

        def open_log() -> None:
            trackers = Trackers(settings.trackers, self.run, start, settings.model_dump(mode="json"), tell)
            signs = Signs(str(own.dataset), own.findings())  # type: ignore[union-attr]
            history = history_of(Path(job.resume)) if job.resume else {}
            self.logs.append(RunLog(self.run, start, signs, trackers, tell, closed=closed, history=history))

        self.team.on_main(open_log)
        metric = settings.best_metric
        self.best = (
            None
            if metric is None
            else self.team.on_main(lambda: best_of(metric, self.logs[0].rows, list_best(self.run)))
        )

    def go(self, watch: Watch, stop: Callable[[], bool]) -> End:
        """All updates from `start` on, and the last evaluation."""
        updates = itertools.islice(step_rows(len(self.job.lengths), self.settings), self.start, None)
        step = self.start
        while True:
            beta = beta_at(step, self.total, self.settings)
            evaluated = self.evaluated(step, beta)
            if step == self.total or self.waited:
                return self.end(step, beta, evaluated)
            row = self.update(step, *next(updates), beta, evaluated)
            step += 1
            due = self.every is not None and step % self.every == 0 and step < self.total
            if due:
                self.save(step, due=True)
            if any(self.team.on_each(functools.partial(self.asked, watch, stop, step, row))) and step < self.total:
                if not due:
                    self.save(step, due=False)
                message = f"stopped after {step} of {self.total} updates; a checkpoint is written"
                raise Interrupted(message, where=str(self.run))

    def asked(self, watch: Watch, stop: Callable[[], bool], made: int, row: Mapping[str, Any]) -> bool:
        """Show the update in process 0; whether this process was asked to stop."""
        if self.team.is_main:
            watch(made, self.total, row)
        return stop()

    def evaluated(self, step: int, beta: float) -> dict[str, float]:
        """The eval_ metrics where an evaluation is due; the weights are kept where it is the best."""
        every = self.settings.eval_steps
        if step < self.total and not (every and step and step % every == 0):
            return {}
        found = evaluate(self.trainee, self.job.test, beta, self.limits)
        if not all(map(math.isfinite, found.values())):
            message = f"the evaluation at step {step} is not finite"
            raise CheckError(message, expected="numbers", hint=SMALLER_STEP)
        if self.best is not None:
            self.best = self.best.after(step, found)
            if self.best.step == step:
                save_best(self.run, step, self.model, self.team)
        return found

    @property
    def waited(self) -> bool:
        """Whether there has been no better evaluation for as long as train.early_stopping_patience."""
        patience = self.settings.early_stopping_patience
        return self.best is not None and patience is not None and self.best.since >= patience

    def update(
        self, step: int, epoch: float, numbers: list[int], beta: float, evaluated: Mapping[str, float]
    ) -> dict[str, Any]:
        """Make one update and log it; returns its row."""
        order = longest_first(numbers, self.job.lengths)
        rows: pl.DataFrame = self.team.on_main(lambda: self.own.data.train[order])  # type: ignore[union-attr]
        rate = learning_rate_at(step, self.total, self.settings)
        self.clock.begin()
        made = self.made(rows, [self.job.lengths[number] for number in order], step, rate, beta)
        seconds, work = self.clock.seconds(), work_of(rows)
        perf = perf_row(step, seconds, work, update_flops(self.model, *work), self.peak, made.memory)
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

        def log() -> None:
            self.logs[0].saw(step, rows["pair_id"].to_list(), made.metrics, beta)
            if step % self.settings.logging_steps == 0 or evaluated:
                self.logs[0].add(row, perf)

        self.team.on_main(log)
        return row

    def made(self, rows: pl.DataFrame, lengths: list[int], step: int, rate: float, beta: float) -> Made:
        """An update; where it does not fit into memory, with micro-batches of half as much.

        Nothing has changed by then: weights change when all gradients are there, and an optimiser that does not fit
        says so itself. Of several processes one cannot do so
        by itself, the others wait for it: there the run ends.
        """
        while True:
            shares = dealt(range(len(lengths)), lengths, self.limits, self.team.size)
            try:
                return update(self.trainee, rows, shares, step, rate, beta)
            except (RuntimeError, MemoryError) as error:
                largest = max((batch for share in shares for batch in share), key=len)
                if not is_out_of_memory(error) or self.team.size > 1 or len(largest) == 1:
                    raise
            # only here: inside the except block the error would keep what the failed pass holds
            self.trainee.optimizer.zero_grad()
            self.limits = self.limits._replace(tokens=max(1, sum(lengths[number] for number in largest) // 2))
            if self.trainee.scorer.device.type == "cuda":
                torch.cuda.empty_cache()
            self.tell(f"out of memory at step {step}: from here on {self.limits.tokens} tokens a micro-batch")

    def save(self, made: int, *, due: bool) -> None:
        """A checkpoint after so many updates."""
        self.team.on_main(lambda: self.logs[0].write(close=due))
        history = self.logs[0].history if self.logs else None
        save_checkpoint(self.run, made, self.model, self.trainee.optimizer, self.team, history)

        def prune() -> None:
            prune_checkpoints(self.run, self.every, self.settings.save_total_limit)
            if self.best is not None and self.best.step is not None:
                prune_best(self.run, self.best.step)  # a resume from here needs no other

        self.team.on_main(prune)

    def end(self, step: int, beta: float, evaluated: Mapping[str, float]) -> End:
        """Log the last evaluation, and take the best weights where they are wanted."""
        epoch = epochs_made(step, len(self.job.lengths), self.settings)

        def close() -> End:
            log = self.logs[0]
            log.add({"step": step, "epoch": epoch, "beta": beta, **evaluated})
            log.write(close=True)
            log.trackers.close()
            losses = [row["loss"] for row in log.rows if "loss" in row]
            if not losses:
                raise DatasetError("all that was logged is gone", where=str(self.run), hint="choose another --out")
            return End(step, losses[0], losses[-1], evaluated, None, step < self.total)

        end = self.team.on_main(close)
        if self.best is None or self.best.step is None:
            return end
        if self.best.step != step:
            load_best(self.run, self.best.step, self.model, self.team)
        return end._replace(evaluated=self.best.evaluated, best=self.best.told())
