"""`prefkit precompute`: every pair scored once by the reference model, into reference/<key>/.

Comes in: a built dataset and a model folder. Goes out: parts with token ids and log-probs, keyed by pair_id. The key
hashes everything that decides a number, so a second call with the same settings has nothing to do, and new pairs are
the only ones scored. The plan is written before anything is scored and each part is renamed into place, so a kill
costs one part at most. Several processes (accelerate launch, torchrun) share the batches of each part.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from prefkit import __version__
from prefkit.batches import extend_plan, largest_batch, read_plan
from prefkit.config import Pipeline, require_model
from prefkit.documents import Reference
from prefkit.encode import EncodeSettings, check_boundary, encode_pairs, resolve_template
from prefkit.errors import CheckError, DatasetError, Interrupted
from prefkit.format import (
    REFERENCE_DROPPED,
    REFERENCE_JSON,
    REFERENCE_PLAN,
    REFERENCES,
    part_name,
    reference_key,
    schema,
)
from prefkit.identity import policy_identity, reference_identity
from prefkit.logps import KERNEL_VERSION, CompletionLogps, Layout
from prefkit.models import load_tokenizer
from prefkit.processes import Team, join_team
from prefkit.scoring import assemble_part, layout_name, load_scorer, score_batches, score_pairs_of
from prefkit.sources import file_sha256
from prefkit.store import (
    check_parts,
    locked,
    read_document,
    read_manifest,
    read_table,
    write_json,
    write_parquet,
    write_text,
    write_views,
)

Tell = Callable[[str], None]
Watch = Callable[[int, int, int], None]  # tokens done, tokens in all, pairs done
TEMPLATE_FILE = "chat_template.jinja"


class Precomputed(NamedTuple):
    """What `precompute_reference` returns; `scored`: pairs of this call; `dropped`: all that encoding dropped."""

    key: str
    pairs: int
    dropped: int
    scored: int
    reasons: dict[str, int]
    counts: dict[str, int]
    boundary: dict[str, int]
    seconds: float


class DryRun(NamedTuple):
    """What `precompute --dry-run` foretells; nothing was written.

    `boundary`: how many prompts lose how many of their last tokens to the completion, "0" for none.
    """

    key: str
    pairs: int
    dropped: dict[str, int]
    counts: dict[str, int]
    boundary: dict[str, int]
    tokens: int
    batches: int
    disk_bytes: int
    layout: str
    seconds: float


class _Work(NamedTuple):
    """Everything about a reference pass that is known before the model runs."""

    key: str
    folder: Path
    identity: dict[str, Any]
    template: str | None
    plan: pl.DataFrame
    dropped: pl.DataFrame
    encoded: pl.DataFrame
    missing_parts: list[int]
    present: list[str]
    current: bool


def precompute_reference(
    pipeline: Pipeline,
    *,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total, _pairs: None,
    stop: Callable[[], bool] = lambda: False,
) -> Precomputed:
    """Score every pair of the pipeline's dataset with precompute.model, once.

    Args:
        pipeline: its precompute section decides.
        tell: called with lines for a person.
        watch: called after every batch.
        stop: asked after every part; True ends the pass there, and the next call goes on.

    Raises:
        DatasetError: the dataset is unfinished, damaged, or being written by another prefkit.
        ModelError: the model or its tokenizer does not load or does not fit.
        CheckError: too many prompts are no token prefix of prompt + completion.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.
    """
    started = time.monotonic()
    dataset = Path(pipeline.dataset)
    with join_team() as team, contextlib.ExitStack() as held:

        def prepare() -> _Work:
            read_manifest(dataset)
            held.enter_context(locked(dataset))
            return _prepare(pipeline, tell)

        work = team.on_main(prepare)
        scored = 0
        if work.missing_parts or not work.current:
            scored = _score(pipeline, work, team, tell if team.is_main else lambda _text: None, watch, stop)
        return team.on_main(lambda: _precomputed(work, scored, time.monotonic() - started))


def _score(pipeline: Pipeline, work: _Work, team: Team, tell: Tell, watch: Watch, stop: Callable[[], bool]) -> int:
    """Score and write the missing parts, then reference.json; returns the pairs scored."""
    dataset, scored = Path(pipeline.dataset), 0
    scorer = _scorer(pipeline, team, tell)  # before anything is written: a model that does not fit leaves nothing
    team.on_main(lambda: write_plan(work))
    for number in work.missing_parts:
        rows = work.plan.filter(pl.col("part") == number)
        seen = _watched(work.plan, watch)

        def share(rows: pl.DataFrame = rows, seen: Callable[[int], None] = seen) -> tuple[pl.DataFrame, bool]:
            return score_batches(scorer, rows, work.encoded, team, seen, tell), stop()

        shares = team.on_each(share)
        part = assemble_part(rows, work.encoded, [scores for scores, _ in shares])
        team.on_main(lambda part=part, number=number: write_parquet(work.folder / part_name(number), part))  # type: ignore[misc]
        scored += part.height
        if any(stopped for _, stopped in shares) and number != work.missing_parts[-1]:
            left = sum(1 for missing in work.missing_parts if missing > number)
            raise Interrupted(f"stopped: {scored} pairs scored and written, {left} parts left", where=str(work.folder))
    team.on_main(lambda: write_reference_json(work, scorer, pipeline.precompute.chat_template))
    team.on_main(lambda: write_views(dataset, work.identity["kind"]))
    return scored


def _scorer(pipeline: Pipeline, team: Team, tell: Tell) -> CompletionLogps:
    """The reference model in this process, in the layout that process 0 found right."""
    own: list[CompletionLogps] = []

    def load() -> Layout:
        own.append(load_scorer(pipeline, tell))
        return own[0].layout

    layouts = team.on_each(load)
    own[0].layout = layouts[0]
    return own[0]


def _watched(plan: pl.DataFrame, watch: Watch) -> Callable[[int], None]:
    """From the number of a batch to what is done with it, counted in plan order."""
    sums = plan.group_by("batch", maintain_order=True).agg(pl.col("num_tokens").sum(), pl.len().alias("pairs"))
    tokens, pairs = (dict(zip(sums["batch"], sums[name].cum_sum(), strict=True)) for name in ("num_tokens", "pairs"))
    total = int(plan["num_tokens"].sum())
    return lambda batch: watch(tokens[batch], total, pairs[batch])


def _precomputed(work: _Work, scored: int, seconds: float) -> Precomputed:
    here = pl.col("pair_id").is_in(work.present)
    plan, rows = work.plan.filter(here), read_parts(work.folder).filter(here)
    reasons = drop_reasons(work.dropped.filter(here))
    counts = encode_counts(plan, rows)
    return Precomputed(
        work.key, plan.height, sum(reasons.values()), scored, reasons, counts, boundary_table(plan), seconds
    )


def drop_reasons(dropped: pl.DataFrame) -> dict[str, int]:
    """How many pairs encoding dropped, by reason."""
    return {row["reason"]: row["len"] for row in dropped.group_by("reason").len().sort("reason").to_dicts()}


def dry_run(pipeline: Pipeline, *, tell: Tell = lambda _text: None) -> DryRun:
    """Encode, plan, time the middle batch, and write nothing."""
    read_manifest(Path(pipeline.dataset))
    work = _prepare(pipeline, tell)
    scorer = load_scorer(pipeline, tell)
    todo = work.plan.filter(pl.col("part").is_in(work.missing_parts))
    estimate = 0.0
    if todo.height:
        batches = todo["batch"].unique().sort()
        batch = todo.filter(pl.col("batch") == batches[len(batches) // 2])
        started = time.monotonic()
        score_pairs_of(scorer, work.encoded, batch["pair_id"].to_list(), tell)
        estimate = (time.monotonic() - started) / int(batch["num_tokens"].sum()) * int(todo["num_tokens"].sum())
    completion = work.encoded.select(pl.col("num_chosen_tokens") + pl.col("num_rejected_tokens")).sum().item() or 0
    # 4 bytes an id, 4 a log-prob, and the rows' own columns; measured files are within a factor of two
    disk = 4 * int(todo["num_tokens"].sum()) + 4 * int(completion) + 120 * todo.height
    here = pl.col("pair_id").is_in(work.present)
    scored = read_parts(work.folder)
    plan, rows = work.plan.filter(here), pl.concat([scored, work.encoded.select(scored.columns)]).filter(here)
    return DryRun(
        work.key,
        plan.height,
        drop_reasons(work.dropped.filter(here)),
        encode_counts(plan, rows),
        boundary_table(plan),
        int(plan["num_tokens"].sum()),
        plan["batch"].n_unique(),
        disk,
        layout_name(scorer.layout),
        estimate,
    )


def _prepare(pipeline: Pipeline, tell: Tell) -> _Work:
    """Hash the model, find what is there, encode what is not, and plan it."""
    settings = pipeline.precompute
    dataset, model = Path(pipeline.dataset), Path(require_model(settings.model, "precompute.model"))
    manifest = read_manifest(dataset)
    tokenizer = load_tokenizer(model)
    kind = manifest["kind"]
    encoding = EncodeSettings(
        kind,
        settings.max_length,
        settings.min_completion_tokens,
        settings.long_prompt,
        resolve_template(kind, settings.chat_template, tokenizer),
    )
    tell(f"hashing the weights of {model}")
    identity = reference_identity(policy_identity(model, tokenizer), encoding, settings.dtype)
    key = reference_key(identity)
    folder = dataset / REFERENCES / key
    pairs = read_table(dataset, "pairs", manifest)
    plan, dropped = read_plan(folder, set(pairs["pair_id"]))
    new = pairs.filter(~pl.col("pair_id").is_in(plan["pair_id"].to_list() + dropped["pair_id"].to_list()))
    check_written(folder, plan)
    unwritten = [part for part in plan["part"].unique().sort() if not (folder / part_name(part)).exists()]
    waiting = plan.filter(pl.col("part").is_in(unwritten))["pair_id"].to_list()
    tell(f"encoding {new.height + len(waiting)} pairs")
    encoded = encode_pairs(
        pairs.filter(pl.col("pair_id").is_in(waiting + new["pair_id"].to_list())), tokenizer, encoding
    )
    plan, dropped = extend_plan(plan, dropped, encoded, set(new["pair_id"]), settings.max_batch_tokens)
    if pairs.height and plan.is_empty():
        raise CheckError(
            f"encoding drops every pair: {', '.join(f'{n} {r}' for r, n in drop_reasons(dropped).items())}",
            where=str(dataset),
            hint="another precompute.max_length or chat template",
        )
    check_boundary(plan.filter(pl.col("num_boundary_tokens") > 0).height, plan.height, settings.max_boundary_share)
    missing = [part for part in plan["part"].unique().sort() if not (folder / part_name(part)).exists()]
    return _Work(
        key,
        folder,
        identity,
        encoding.chat_template,
        plan,
        dropped,
        encoded.pairs,
        missing,
        pairs["pair_id"].to_list(),
        is_current(folder, plan, dropped),
    )


def write_plan(work: _Work) -> None:
    """Put the plan, the drops and the template on disk before anything is scored."""
    (work.folder / REFERENCE_JSON).unlink(missing_ok=True)  # its hashes will not be those of the new parts
    if work.template is not None and not (work.folder / TEMPLATE_FILE).exists():
        write_text(work.folder / TEMPLATE_FILE, work.template)
    for name, frame in ((REFERENCE_DROPPED, work.dropped), (REFERENCE_PLAN, work.plan)):
        path = work.folder / name
        if not path.exists() or not pl.read_parquet(path, glob=False).equals(frame):
            write_parquet(path, frame)


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


def check_written(folder: Path, plan: pl.DataFrame) -> None:
    """Check what an earlier call left: parts hold the pairs of the plan, and are those that reference.json lists.

    Raises:
        DatasetError: a part is changed, unreadable, or does not hold what was planned for it.
    """
    hint = f"delete {folder} and type prefkit precompute again"
    try:
        if (folder / REFERENCE_JSON).exists():
            recorded = read_document(folder / REFERENCE_JSON, Reference)["parts"]
            check_parts(folder, [part for part in recorded if (folder / part["file"]).exists()])
        for path in sorted(folder.glob("part-*.parquet")):
            planned = plan.filter(pl.col("part") == int(path.stem.removeprefix("part-")))
            if not planned["pair_id"].equals(pl.read_parquet(path, columns=["pair_id"], glob=False)["pair_id"]):
                raise DatasetError("holds other pairs than plan.parquet says", where=str(path))
    except DatasetError as error:
        raise DatasetError(error.message, where=error.where, hint=hint) from None
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise DatasetError(f"cannot be read: {error}", where=str(folder), hint=hint) from None


def is_current(folder: Path, plan: pl.DataFrame, dropped: pl.DataFrame) -> bool:
    """Whether reference.json is there and says what plan and drops say: a kill may have come just before it."""
    drops = folder / REFERENCE_DROPPED
    if not (folder / REFERENCE_JSON).exists() or not drops.exists():
        return False
    recorded = read_document(folder / REFERENCE_JSON, Reference)
    listed = [part["file"] for part in recorded["parts"]]
    known = file_sha256(drops) == recorded["dropped"]["sha256"] and dropped.equals(pl.read_parquet(drops, glob=False))
    return known and listed == [part_name(number) for number in plan["part"].unique().sort()]


def write_reference_json(work: _Work, scorer: CompletionLogps, template: str | None) -> None:
    """Write what the reference is and the hash of every part; its being there and complete is what readers trust."""
    files = [work.folder / part_name(number) for number in work.plan["part"].unique().sort()]
    write_json(
        work.folder / REFERENCE_JSON,
        {
            "key": work.key,
            "identity": work.identity,
            "provenance": _provenance(scorer, work.plan) | {"chat_template": template},
            "counts": encode_counts(work.plan, read_parts(work.folder)),
            "boundary": boundary_table(work.plan),
            "parts": list(_parts(files)),
            "dropped": next(_parts([work.folder / REFERENCE_DROPPED])),
        },
    )


def _parts(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        rows = pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()
        yield {"file": file.name, "rows": rows, "sha256": file_sha256(file)}


def _provenance(scorer: CompletionLogps, plan: pl.DataFrame) -> dict[str, Any]:
    import transformers

    return {
        "attention": scorer.model.config._attn_implementation,  # type: ignore[union-attr]
        "layout": layout_name(scorer.layout),
        "device": str(next(scorer.parameters()).device.type),
        "kernel_version": KERNEL_VERSION,
        "largest_batch": largest_batch(plan),
        "versions": {
            "prefkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def read_reference(dataset: Path, key: str) -> dict[str, Any]:
    """reference.json of one reference of a dataset."""
    return read_document(dataset / REFERENCES / key / REFERENCE_JSON, Reference)
