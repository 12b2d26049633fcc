"""`prefkit precompute`: every pair scored once by the reference model, into reference/<key>/.

Comes in: a built dataset and a model folder. Goes out: parts with token ids and log-probs, keyed by pair_id. The key
hashes everything that decides a number, so a second call with the same settings has nothing to do, and new pairs are
the only ones scored. The plan is written before anything is scored and each part is renamed into place, so a kill
costs one part at most.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from prefkit import __version__
from prefkit.batches import extend_plan, read_plan
from prefkit.config import Pipeline, require_model
from prefkit.documents import Reference
from prefkit.encode import EncodeSettings, Sides, check_boundary, encode_pairs, resolve_template
from prefkit.errors import CheckError, DatasetError, MachineError, ModelError, is_out_of_memory
from prefkit.format import (
    REFERENCE,
    REFERENCE_DROPPED,
    REFERENCE_JSON,
    REFERENCE_PLAN,
    REFERENCES,
    part_name,
    reference_key,
    schema,
)
from prefkit.identity import policy_identity, reference_identity
from prefkit.logps import KERNEL_VERSION, CompletionLogps, Layout, choose_layout, make_batch
from prefkit.models import check_fits, load_model, load_tokenizer, pick_device
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
    seconds: float


class DryRun(NamedTuple):
    """What `precompute --dry-run` foretells; nothing was written."""

    key: str
    pairs: int
    dropped: dict[str, int]
    counts: dict[str, int]
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


def precompute_reference(
    pipeline: Pipeline, *, tell: Tell = lambda _text: None, watch: Watch = lambda _done, _total, _pairs: None
) -> Precomputed:
    """Score every pair of the pipeline's dataset with precompute.model, once.

    Raises:
        DatasetError: the dataset is unfinished, damaged, or being written by another prefkit.
        ModelError: the model or its tokenizer does not load or does not fit.
        CheckError: too many prompts are no token prefix of prompt + completion.
        MachineError: out of disk or memory.
    """
    started = time.monotonic()
    dataset = Path(pipeline.dataset)
    read_manifest(dataset)
    with locked(dataset):
        work = _prepare(pipeline, tell)
        scored = 0
        if work.missing_parts or not is_current(work):
            scorer = load_scorer(pipeline, tell)  # before anything is written: a model that does not fit leaves nothing
            (work.folder / REFERENCE_JSON).unlink(missing_ok=True)  # its hashes will not be those of the new parts
            write_plan(work)
            for number in work.missing_parts:
                part = score_part(scorer, work, number, watch, tell)
                write_parquet(work.folder / part_name(number), part)
                scored += part.height
            write_reference_json(work, scorer, pipeline.precompute.max_batch_tokens)
            write_views(dataset, work.identity["kind"])
    here = pl.col("pair_id").is_in(work.present)
    plan, rows = work.plan.filter(here), read_parts(work.folder).filter(here)
    reasons = drop_reasons(work.dropped.filter(here))
    seconds = time.monotonic() - started
    return Precomputed(
        work.key, plan.height, sum(reasons.values()), scored, reasons, encode_counts(plan, rows), seconds
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
    scored = read_parts(work.folder)
    estimate = 0.0
    if todo.height:
        batches = todo["batch"].unique().sort()
        batch = todo.filter(pl.col("batch") == batches[len(batches) // 2])
        started = time.monotonic()
        _score_rows(scorer, _sides(work.encoded, batch["pair_id"].to_list()), tell)
        estimate = (time.monotonic() - started) / int(batch["num_tokens"].sum()) * int(todo["num_tokens"].sum())
    completion = work.encoded.select(pl.col("num_chosen_tokens") + pl.col("num_rejected_tokens")).sum().item() or 0
    # 4 bytes an id, 4 a log-prob, and the rows' own columns; measured files are within a factor of two
    disk = 4 * int(todo["num_tokens"].sum()) + 4 * int(completion) + 120 * todo.height
    return DryRun(
        work.key,
        work.plan.height,
        drop_reasons(work.dropped),
        encode_counts(work.plan, pl.concat([scored, work.encoded.select(scored.columns)])),
        int(work.plan["num_tokens"].sum()),
        work.plan["batch"].n_unique(),
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
        key, folder, identity, encoding.chat_template, plan, dropped, encoded.pairs, missing, pairs["pair_id"].to_list()
    )


def write_plan(work: _Work) -> None:
    """Put the plan, the drops and the template on disk before anything is scored."""
    if work.template is not None and not (work.folder / TEMPLATE_FILE).exists():
        write_text(work.folder / TEMPLATE_FILE, work.template)
    for name, frame in ((REFERENCE_DROPPED, work.dropped), (REFERENCE_PLAN, work.plan)):
        path = work.folder / name
        if not path.exists() or not pl.read_parquet(path, glob=False).equals(frame):
            write_parquet(path, frame)


def load_scorer(pipeline: Pipeline, tell: Tell) -> CompletionLogps:
    """The reference model, ready to score, in the layout it can be shown right in."""
    settings = pipeline.precompute
    folder = require_model(settings.model, "precompute.model")
    device = pick_device()
    model = load_model(folder, settings.dtype, device, settings.attention)
    check_fits(model, load_tokenizer(folder), settings.max_length, folder)
    layout = choose_layout(model, settings.dtype, settings.max_length)
    tell(f"scoring on {device} in {settings.dtype}, {layout_name(layout)}")
    return CompletionLogps(model, settings.dtype, layout)


def layout_name(layout: Layout) -> str:
    """The layout in words, with the reason where it is the plain one."""
    return "shared prefix" if layout.shared else f"separate sequences: {layout.reason}"


def score_part(scorer: CompletionLogps, work: _Work, number: int, watch: Watch, tell: Tell) -> pl.DataFrame:
    """Score the batches of one part, in plan order, into the columns of format.REFERENCE."""
    rows = work.plan.filter(pl.col("part") == number)
    joined = rows.select("pair_id").join(work.encoded, on="pair_id", how="left", maintain_order="left")
    total = int(work.plan["num_tokens"].sum())
    before = work.plan.filter(pl.col("part") < number)
    done, pairs_done = int(before["num_tokens"].sum()), before.height
    pieces = []
    for _, batch in rows.group_by("batch", maintain_order=True):
        ids = batch["pair_id"].to_list()
        pieces.append(_score_rows(scorer, _sides(joined, ids), tell).with_columns(pl.Series("pair_id", ids)))
        done, pairs_done = done + int(batch["num_tokens"].sum()), pairs_done + len(ids)
        watch(done, total, pairs_done)
    scores = pl.concat(pieces)
    wanted = schema("reference", "text")
    return joined.join(scores, on="pair_id", how="left", maintain_order="left").select(
        pl.col(c.name).cast(wanted[c.name]) for c in REFERENCE
    )


def _sides(encoded: pl.DataFrame, pair_ids: Sequence[str]) -> list[Sides]:
    order = pl.DataFrame({"pair_id": pair_ids})
    rows = order.join(encoded, on="pair_id", how="left", maintain_order="left")
    columns = (rows[f"{side}_ids"].to_list() for side in Sides._fields)
    return [Sides(*ids) for ids in zip(*columns, strict=True)]


def _score_rows(scorer: CompletionLogps, pairs: list[Sides], tell: Tell) -> pl.DataFrame:
    """One forward pass; out of memory computes the same batch in halves."""
    device = next(scorer.parameters()).device
    try:
        with torch.inference_mode():
            scored = scorer(make_batch(pairs, shared=scorer.layout.shared).to(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(pairs) == 1:
            raise MachineError(
                "out of memory on a single pair", hint="a smaller precompute.max_length, or another dtype"
            ) from None
        half = len(pairs) // 2
        tell(f"out of memory with {len(pairs)} pairs in a batch: computing it in two slices")
        return pl.concat([_score_rows(scorer, part, tell) for part in (pairs[:half], pairs[half:])])
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


def is_current(work: _Work) -> bool:
    """Whether reference.json is there and says what the plan and the drops say (a kill may have come just before it).

    Raises:
        DatasetError: a part is not the one that was written.
    """
    path = work.folder / REFERENCE_JSON
    if not path.exists():
        return False
    recorded = read_document(path, Reference)
    try:
        check_parts(work.folder, recorded["parts"])
    except DatasetError as error:
        hint = f"delete {work.folder} and type prefkit precompute again"
        raise DatasetError(error.message, where=error.where, hint=hint) from None
    listed = [part["file"] for part in recorded["parts"]]
    drops = work.folder / REFERENCE_DROPPED
    known = (
        drops.exists()
        and file_sha256(drops) == recorded["dropped"]["sha256"]
        and work.dropped.equals(pl.read_parquet(drops, glob=False))
    )
    return known and listed == [part_name(number) for number in work.plan["part"].unique().sort()]


def write_reference_json(work: _Work, scorer: CompletionLogps, max_batch_tokens: int) -> None:
    """Write what the reference is and the hash of every part; its being there and complete is what readers trust."""
    files = [work.folder / part_name(number) for number in work.plan["part"].unique().sort()]
    write_json(
        work.folder / REFERENCE_JSON,
        {
            "key": work.key,
            "identity": work.identity,
            "provenance": _provenance(scorer, max_batch_tokens),
            "counts": encode_counts(work.plan, read_parts(work.folder)),
            "parts": list(_parts(files)),
            "dropped": next(_parts([work.folder / REFERENCE_DROPPED])),
        },
    )


def _parts(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        rows = pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()
        yield {"file": file.name, "rows": rows, "sha256": file_sha256(file)}


def _provenance(scorer: CompletionLogps, max_batch_tokens: int) -> dict[str, Any]:
    import transformers

    return {
        "attention": scorer.model.config._attn_implementation,  # type: ignore[union-attr]
        "layout": layout_name(scorer.layout),
        "device": str(next(scorer.parameters()).device.type),
        "kernel_version": KERNEL_VERSION,
        "max_batch_tokens": max_batch_tokens,
        "versions": {
            "prefkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def read_reference(dataset: Path, key: str) -> dict[str, Any]:
    """reference.json of one reference of a dataset."""
    return read_document(dataset / REFERENCES / key / REFERENCE_JSON, Reference)
