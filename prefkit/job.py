"""What training needs of a dataset: the pairs and their reference, checked, and a run directory of its own.

Process 0 reads and writes for all (`Claimed`); the others know a `Job`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.adapters import saved_as
from prefkit.batches import NUM_TOKENS
from prefkit.budget import CPU_BATCH_TOKENS
from prefkit.checkpoint import list_checkpoints
from prefkit.config import Pipeline, require_model
from prefkit.documents import Audit
from prefkit.errors import DatasetError
from prefkit.format import AUDIT_JSON, REFERENCES, RUNS
from prefkit.gate import GateFigures, check_policy, find_reference, policy_of
from prefkit.identity import identity_sha256
from prefkit.locks import give_lock, take_lock
from prefkit.logps import CompletionLogps, Layout
from prefkit.lora import peft_module
from prefkit.models import load_tokenizer, pick_device
from prefkit.optimizers import check_optimizer
from prefkit.processes import Team
from prefkit.reference_table import reference_rows
from prefkit.run import End, Final, Trained, begin_run, claimed_run, data_sha256, finish_run, micro_batch_tokens
from prefkit.schedule import Limits, limits_of
from prefkit.store import read_document, read_manifest, write_views
from prefkit.tables import read_table
from prefkit.trackers import check_trackers


class Job(NamedTuple):
    """What every process knows of a run.

    `lengths`: prompt + chosen + rejected tokens of the training rows; `test`: the rows to evaluate on; `resume`: the
    checkpoint to go on from; `changed`: settings that are others since.
    """

    run: str
    folder: str
    identity: dict[str, Any]
    lengths: list[int]
    test: pl.DataFrame
    limits: Limits
    resume: str | None
    changed: list[str]


class Data(NamedTuple):
    """The reference rows of both splits with `weight`, sorted by pair_id: the order on disk has no say in training."""

    train: pl.DataFrame
    test: pl.DataFrame


@dataclass
class Claimed:
    """What process 0 holds besides: the data, and what its run directory is told of them."""

    job: Job
    dataset: Path
    manifest: dict[str, Any]
    claim: dict[str, Any]
    data: Data
    pairs: pl.DataFrame
    tokenizer: Any
    same_model: bool

    def gate(self, scorer: CompletionLogps, seed: int) -> GateFigures:
        """The second half of the gate; the texts of the pairs are of no more use then."""
        place, pairs = self.dataset / REFERENCES / self.claim["reference"], self.pairs
        self.pairs = pairs.clear()
        both = pl.concat(self.data)
        identity = self.job.identity
        return check_policy(scorer, self.tokenizer, place, identity, both, pairs, seed, same_model=self.same_model)

    def findings(self) -> list[dict[str, Any]] | None:
        """The audit's, worst first; None where there was none, or it cannot be read."""
        try:
            return read_document(self.dataset / AUDIT_JSON, Audit)["findings"]  # type: ignore[no-any-return]
        except DatasetError:
            return None

    def begin(self, layout: Layout, team: Team, figures: GateFigures | None, start: int) -> None:
        """Say what the run is before its first step."""
        told = self.claim | {
            "micro_batch_tokens": self.job.limits.tokens,
            "layout": layout.name,
            "num_processes": team.size,
        }
        num_pairs = self.data.train.height + self.data.test.height
        begin_run(Path(self.job.run), self.dataset, num_pairs, told, figures, start, self.job.changed)

    def finish(self, final: Final, end: End) -> Trained:
        """Save the final model and mark the run finished."""
        run = Path(self.job.run)
        if run.resolve().parent == (self.dataset / RUNS).resolve() and (lock := take_lock(self.dataset)) is not None:
            write_views(self.dataset, self.manifest)  # whoever else holds the lock writes them in the end
            give_lock(self.dataset, lock)
        return finish_run(run, self.dataset, self.manifest, self.tokenizer, final, end)


class Prepared(NamedTuple):
    """What a training has of its dataset, read and checked, before it has a run directory.

    `claim`: what a run that is gone on with must agree in; `same_model`: policy and reference are one.
    """

    folder: str
    manifest: dict[str, Any]
    identity: dict[str, Any]
    pairs: pl.DataFrame
    data: Data
    tokenizer: Any
    claim: dict[str, Any]
    same_model: bool


def check_settings(pipeline: Pipeline, *, shards: bool = False) -> str:
    """Refuse what cannot train whatever the dataset holds; returns the folder of the policy.

    Raises:
        InputError: no model is named, or an optimiser, tracker or adapter cannot be used here.
    """
    settings = pipeline.train
    folder = require_model(settings.model or pipeline.precompute.model, "train.model")
    if saved_as(settings, folder) != "model":
        peft_module("train.lora" if settings.lora is not None else folder)
    check_optimizer(settings, shards=shards)
    check_trackers(settings.trackers)
    return folder


def prepare_training(pipeline: Pipeline, reference: str | None = None, *, shards: bool = False) -> Prepared:
    """Read and check all of a training that needs no model."""
    settings, dataset = pipeline.train, Path(pipeline.dataset)
    folder = check_settings(pipeline, shards=shards)
    manifest = read_manifest(dataset)
    tokenizer = load_tokenizer(folder)
    policy = policy_of(Path(folder), tokenizer, pipeline.precompute, manifest["kind"])
    key, recorded = find_reference(dataset, policy, reference, other=settings.other_reference)
    identity = recorded["identity"]
    pairs = read_table(dataset, "pairs", manifest)
    data = load_data(dataset, pairs, key, recorded)
    if settings.best_metric is not None and data.test.is_empty():
        raise DatasetError(
            "train.best_metric needs pairs to evaluate on, and there is no test split",
            where=str(dataset),
            hint="--set split.test_share=0.05 at prefkit build, or leave train.best_metric out",
        )
    claim = {
        "reference": key,
        "model": folder,
        "policy_sha256": identity_sha256(policy.identity),
        "train": settings.model_dump(mode="json"),
        "data_sha256": data_sha256(pl.concat(data)),
    }
    same = all(identity[name] == policy.identity[name] for name in ("weights_sha256", "config"))
    return Prepared(folder, manifest, identity, pairs, data, tokenizer, claim, same)


def claim_job(
    pipeline: Pipeline,
    reference: str | None,
    out: str | None,
    held: contextlib.ExitStack,
    *,
    go_on: bool,
    beside: bool,
    shards: bool,
) -> Claimed:
    """Read and check all that needs no model, and claim the run directory."""
    settings, dataset = pipeline.train, Path(pipeline.dataset)
    ready = prepare_training(pipeline, reference, shards=shards)
    run, changed = held.enter_context(claimed_run(dataset, out, ready.claim, go_on=go_on, beside=beside))
    checkpoints = list_checkpoints(run)
    usual = CPU_BATCH_TOKENS if pick_device().type == "cpu" else None
    job = Job(
        str(run),
        ready.folder,
        ready.identity,
        ready.data.train.select(NUM_TOKENS).to_series().to_list(),
        ready.data.test,
        limits_of(settings, micro_batch_tokens(run, settings, usual)),
        str(checkpoints[-1]) if checkpoints else None,
        changed,
    )
    _, manifest, _, pairs, data, tokenizer, claim, same = ready
    return Claimed(job, dataset, manifest, claim, data, pairs, tokenizer, same)


def load_data(dataset: Path, pairs: pl.DataFrame, key: str, recorded: Mapping[str, Any]) -> Data:
    """The scored pairs of both splits, checked as a table (the first half of the gate)."""
    pairs = pairs.select("pair_id", "split", "weight").sort("pair_id")
    rows = reference_rows(dataset, key, recorded, pairs["pair_id"].to_list())
    joined = rows.join(pairs, on="pair_id", how="left", maintain_order="left")
    train, test = (joined.filter(pl.col("split") == split) for split in ("train", "test"))
    if train.is_empty():
        raise DatasetError("no pair to train on", where=str(dataset), hint="prefkit query DATASET 'from dropped'")
    return Data(train, test)
