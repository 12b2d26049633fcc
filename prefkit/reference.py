"""`prefkit precompute`: every pair scored once by the reference model, into reference/<key>/.

Comes in: a built dataset and a model folder. Goes out: parts with token ids and log-probs, keyed by pair_id. The key
hashes everything that decides a number, so a second call with the same settings has nothing to do, and new pairs are
the only ones scored. The plan is written before anything is scored and each part is renamed into place, so a kill
costs one part at most. Several processes (accelerate launch, torchrun) share the batches of each part.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from prefkit import __version__
from prefkit.batches import largest_batch, planned_budget
from prefkit.budget import CPU_BATCH_TOKENS, measure_budget
from prefkit.config import Changes, Pipeline
from prefkit.errors import Interrupted, located
from prefkit.format import REFERENCE_DROPPED, REFERENCE_JSON, REFERENCE_PLAN, part_name, schema
from prefkit.locks import locked
from prefkit.logps import KERNEL_VERSION, CompletionLogps, Layout
from prefkit.models import pick_device
from prefkit.papers import renew_papers
from prefkit.processes import Team, join_team
from prefkit.scoring import assemble_part, load_scorer, score_batches, score_planned
from prefkit.sources import file_sha256
from prefkit.store import read_manifest, write_json
from prefkit.tables import write_parquet
from prefkit.target import Target, pipeline_of
from prefkit.work import Tell, Work, drop_reasons, prepare_work, write_plan

Watch = Callable[[int, int, int], None]  # tokens done, tokens in all, pairs done


class Precomputed(NamedTuple):
    """What `precompute_reference` returns."""

    key: str  # of the reference
    pairs: int  # of the dataset that it scores
    dropped: int  # all that encoding dropped
    scored: int  # pairs of this call
    reasons: dict[str, int]  # dropped pairs by reason
    counts: dict[str, int]  # tokens, truncations, missing ends, texts that spell control tokens
    boundary: dict[str, int]  # how many prompts lose how many of their last tokens to the completion, "0" for none
    seconds: float


class Estimated(NamedTuple):
    """What `estimate_reference` foretells; nothing was written."""

    key: str  # of the reference
    pairs: int  # that it will have scored
    dropped: dict[str, int]  # pairs that encoding drops, by reason
    counts: dict[str, int]  # tokens, truncations, missing ends, texts that spell control tokens
    boundary: dict[str, int]  # how many prompts lose how many of their last tokens to the completion, "0" for none
    tokens: int  # prompt + chosen + rejected of all pairs
    batches: int
    max_batch_tokens: int | None  # what the last batch was planned with; None in a plan of an earlier release
    to_score: int  # pairs that are not scored yet
    disk_bytes: int  # of these, within a factor of two
    layout: str  # how pairs are laid out and attended to
    seconds: float  # of these, from the time of one batch


def precompute_reference(
    target: Target,
    *,
    changes: Changes = (),
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _pairs: None,
    stop: Callable[[], bool] = lambda: False,
) -> Precomputed:
    """Score every pair of a dataset with the reference model, precompute.model, once.

    The same settings again: nothing is scored but pairs that are new. Killed or stopped, the next call goes on.

    Args:
        target: a dataset directory, a pipeline file or a loaded Pipeline; its precompute section decides.
        changes: settings by their dotted keys, as in `load_pipeline`.
        tell: called with lines for a person.
        watch: called after every batch with the tokens that are done, all tokens, and the pairs that are done.
        stop: asked after every part; True ends the pass there, and the next call goes on.

    Returns:
        the key of the reference, and what was scored and dropped.

    Raises:
        DatasetError: the dataset is unfinished, damaged, or being written by another prefkit.
        ModelError: the model or its tokenizer does not load or does not fit.
        CheckError: too many prompts are no token prefix of prompt + completion.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.

    Example:
        done = prefkit.precompute_reference("demo/dataset")
        print(done.key, done.pairs, done.scored)
    """
    pipeline, started = pipeline_of(target, changes), time.monotonic()
    with join_team() as team, contextlib.ExitStack() as held:
        own: list[Work] = []  # of process 0, with the ids of all pairs: the others get them a part at a time
        reference = _Reference(pipeline, tell if team.is_main else lambda _text: None)

        def prepare() -> Work:
            own.append(_claimed_work(reference, held))
            return own[0]._replace(encoded=own[0].encoded.clear(), present=[])

        work = team.on_main(prepare)
        work = own[0] if own else work
        scored = 0
        if work.missing_parts or not work.current:
            scored = _score(reference, work, team, watch, stop)
        return team.on_main(lambda: _precomputed(work, scored, time.monotonic() - started))


class _Reference:
    """The reference model of this process, loaded when it is first needed.

    That is after planning, but in process 0 where the plan needs a budget that only the model's own memory can tell.
    """

    def __init__(self, pipeline: Pipeline, tell: Tell) -> None:
        self.pipeline, self.tell = pipeline, tell
        self._scorer: CompletionLogps | None = None

    def scorer(self) -> CompletionLogps:
        """The model in the layout that it can be shown right in."""
        if self._scorer is None:
            self._scorer = load_scorer(self.pipeline, self.tell)
        return self._scorer

    def budget(self, longest: int) -> int:
        """Tokens of a batch on this machine, where the longest pair has so many."""
        if pick_device().type == "cpu":
            return CPU_BATCH_TOKENS
        budget = measure_budget(self.scorer(), longest)
        self.tell(f"batches of {budget} tokens, as much as the free memory holds")
        return budget


def _claimed_work(reference: _Reference, held: contextlib.ExitStack) -> Work:
    """The work, and the dataset's lock; where nothing can be written, nothing may be to do."""
    pipeline, tell = reference.pipeline, reference.tell
    dataset = Path(pipeline.dataset)
    read_manifest(dataset)
    if not os.access(dataset, os.W_OK):
        work = prepare_work(pipeline, tell, reference.budget)
        if work.current and not work.missing_parts:
            return work
    held.enter_context(locked(dataset))
    return prepare_work(pipeline, tell, reference.budget)


def _score(reference: _Reference, work: Work, team: Team, watch: Watch, stop: Callable[[], bool]) -> int:
    """Score and write the missing parts, then reference.json; returns the pairs scored."""
    dataset, scored = Path(reference.pipeline.dataset), 0
    if any(team.on_each(stop)):
        raise Interrupted("stopped before anything was scored", where=str(work.folder))
    scorer = _scorer(reference, team)  # before anything is written: a model that does not fit leaves nothing
    team.on_main(lambda: write_plan(work))
    seen = _watched(work.plan, watch)
    for number in work.missing_parts:
        pairs, stopped = _score_part(work, number, scorer, team, seen, reference.tell, stop)
        scored += pairs
        if stopped and number != work.missing_parts[-1]:
            left = sum(missing > number for missing in work.missing_parts)
            raise Interrupted(f"stopped: {scored} pairs scored and written, {left} parts left", where=str(work.folder))
    team.on_main(lambda: write_reference_json(work, scorer, dataset, reference.pipeline.precompute.chat_template))
    return scored


def _score_part(
    work: Work,
    number: int,
    scorer: CompletionLogps,
    team: Team,
    seen: Callable[[int], None],
    tell: Tell,
    stop: Callable[[], bool],
) -> tuple[int, bool]:
    """Score and write one part, all processes together; its pairs, and whether any of them was asked to stop."""
    rows = work.plan.filter(pl.col("part") == number)
    # the ids of this part only: they lie in process 0, and a batch is looked up in a part, not in all pairs
    encoded = team.on_main(lambda: work.encoded.filter(pl.col("pair_id").is_in(rows["pair_id"].to_list())))

    def share() -> tuple[pl.DataFrame, bool]:
        with located(work.model):
            return score_batches(scorer, rows, encoded, team, seen, tell), stop()

    shares = team.on_each(share)
    scores = [scored for scored, _ in shares]
    team.on_main(lambda: write_parquet(work.folder / part_name(number), assemble_part(rows, encoded, scores)))
    return rows.height, any(stopped for _, stopped in shares)


def _scorer(reference: _Reference, team: Team) -> CompletionLogps:
    """The reference model in this process, in the layout that process 0 found right."""
    layouts: list[Layout] = team.on_each(lambda: reference.scorer().layout)
    scorer = reference.scorer()
    scorer.use(layouts[0])
    return scorer


def _watched(plan: pl.DataFrame, watch: Watch) -> Callable[[int], None]:
    """From the number of a batch to what is done with it, counted in plan order."""
    sums = plan.group_by("batch", maintain_order=True).agg(pl.col("num_tokens").sum(), pl.len().alias("pairs"))
    tokens, pairs = (dict(zip(sums["batch"], sums[name].cum_sum(), strict=True)) for name in ("num_tokens", "pairs"))
    total = int(plan["num_tokens"].sum())
    return lambda batch: watch(tokens[batch], total, pairs[batch])


def _precomputed(work: Work, scored: int, seconds: float) -> Precomputed:
    here = pl.col("pair_id").is_in(work.present)
    plan, rows = work.plan.filter(here), read_parts(work.folder).filter(here)
    reasons = drop_reasons(work.dropped.filter(here))
    counts = encode_counts(plan, rows)
    return Precomputed(
        work.key, plan.height, sum(reasons.values()), scored, reasons, counts, boundary_table(plan), seconds
    )


def estimate_reference(target: Target, *, changes: Changes = (), tell: Tell = lambda _text: None) -> Estimated:
    """Foretell what `precompute_reference` would do: encode, plan, time the middle batch, and write nothing.

    Args:
        target: a dataset directory, a pipeline file or a loaded Pipeline; its precompute section decides.
        changes: settings by their dotted keys, as in `load_pipeline`.
        tell: called with lines for a person.

    Returns:
        tokens, batches, truncations, bytes on disk and seconds of the pairs that are not scored yet.

    Raises:
        DatasetError: the dataset is unfinished or damaged.
        ModelError: the model or its tokenizer does not load or does not fit.
        CheckError: too many prompts are no token prefix of prompt + completion.
        MachineError: out of memory.

    Example:
        told = prefkit.estimate_reference("demo/dataset", changes={"precompute.max_length": 128})
        print(told.tokens, told.counts["chosen_truncated"], told.disk_bytes)
    """
    pipeline = pipeline_of(target, changes)
    read_manifest(Path(pipeline.dataset))
    reference = _Reference(pipeline, tell)
    work = prepare_work(pipeline, tell, reference.budget)
    scorer = reference.scorer()
    todo = work.plan.filter(pl.col("part").is_in(work.missing_parts))
    estimate = 0.0
    if todo.height:
        batches = todo["batch"].unique().sort()
        batch = todo.filter(pl.col("batch") == batches[len(batches) // 2])
        started = time.monotonic()
        with located(work.model):
            score_planned(scorer, work.encoded, batch, tell)
        estimate = (time.monotonic() - started) / int(batch["num_tokens"].sum()) * int(todo["num_tokens"].sum())
    completion = work.encoded.select(pl.col("num_chosen_tokens") + pl.col("num_rejected_tokens")).sum().item() or 0
    # 4 bytes an id, 4 a log-prob, and the rows' own columns; measured files are within a factor of two
    disk = 4 * int(todo["num_tokens"].sum()) + 4 * int(completion) + 120 * todo.height
    here = pl.col("pair_id").is_in(work.present)
    scored = read_parts(work.folder)
    plan, rows = work.plan.filter(here), pl.concat([scored, work.encoded.select(scored.columns)]).filter(here)
    return Estimated(
        work.key,
        plan.height,
        drop_reasons(work.dropped.filter(here)),
        encode_counts(plan, rows),
        boundary_table(plan),
        int(plan["num_tokens"].sum()),
        plan["batch"].n_unique(),
        planned_budget(work.plan),
        todo.height,
        disk,
        scorer.layout.name,
        estimate,
    )


def read_parts(folder: Path) -> pl.DataFrame:
    """The small columns of all parts of a reference."""
    files = sorted(folder.glob("part-*.parquet"))
    columns = [
        "pair_id",
        "num_prompt_tokens",
        "num_chosen_tokens",
        "num_rejected_tokens",
        "chosen_truncated",
        "rejected_truncated",
    ]
    if not files:
        return pl.DataFrame(schema={name: schema("reference", "text")[name] for name in columns})
    return pl.concat([pl.read_parquet(file, columns=columns, glob=False) for file in files])


def encode_counts(plan: pl.DataFrame, rows: pl.DataFrame) -> dict[str, int]:
    """What encoding did, in counts: tokens, truncations, boundaries, missing ends, control tokens in the text."""
    one = rows.filter(pl.col("chosen_truncated") != pl.col("rejected_truncated")).height
    return {
        "tokens": int(plan["num_tokens"].sum()),
        "chosen_truncated": int(rows["chosen_truncated"].sum()),
        "rejected_truncated": int(rows["rejected_truncated"].sum()),
        "one_side_truncated": one,
        "prompts_no_prefix": plan.filter(pl.col("num_boundary_tokens") > 0).height,
        "completions_without_end": int(plan["num_unended"].sum()),
        "prompts_cut": int(plan["prompt_cut"].sum()),
        "spells_control_token": int(plan["spells_control_token"].sum()),
    }


def boundary_table(plan: pl.DataFrame) -> dict[str, int]:
    """How many prompts lose how many of their last tokens to the completion: `{"0": 98, "1": 2}`."""
    counted = plan.group_by("num_boundary_tokens").len().sort("num_boundary_tokens")
    return {str(tokens): count for tokens, count in counted.iter_rows()}


def write_reference_json(work: Work, scorer: CompletionLogps, dataset: Path, template: str | None) -> None:
    """Write what the reference is and the hash of every part; its being there and complete is what readers trust."""
    files = [work.folder / part_name(number) for number in work.plan["part"].unique().sort()]
    document = {
        "key": work.key,
        "identity": work.identity,
        "provenance": _provenance(scorer, work) | {"chat_template": template},
        "counts": encode_counts(work.plan, read_parts(work.folder)),
        "boundary": boundary_table(work.plan),
        "parts": list(_parts(files)),
        "dropped": next(_parts([work.folder / REFERENCE_DROPPED])),
        "plan": next(_parts([work.folder / REFERENCE_PLAN])),
    }
    renew_papers(dataset, document)
    write_json(work.folder / REFERENCE_JSON, document)


def _parts(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        rows = pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()
        yield {"file": file.name, "rows": rows, "sha256": file_sha256(file)}


def _provenance(scorer: CompletionLogps, work: Work) -> dict[str, Any]:
    import transformers

    return {
        "attention": scorer.layout.attention,
        "layout": scorer.layout.name,
        "device": str(next(scorer.parameters()).device.type),
        "kernel_version": KERNEL_VERSION,
        "largest_batch": largest_batch(work.plan),
        "model": Path(os.path.normpath(Path(work.model).absolute())).name,  # of the folder; the identity has its hash
        "versions": {
            "prefkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
