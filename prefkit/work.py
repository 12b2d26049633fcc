"""What a reference pass has to do, known before a model runs: identity, plan, ids, and which parts are missing.

Comes in: a built dataset, a model folder and the precompute settings. Goes out: a `Work`. What an earlier call left on
disk is checked against its own plan and its own hashes here, and what is new is encoded and planned behind it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.batches import NUM_TOKENS, extend_plan, planned_budget, read_plan, unplanned
from prefkit.config import Pipeline, require_model
from prefkit.documents import Reference
from prefkit.encode import EncodeSettings, check_boundary, encode_pairs, resolve_template
from prefkit.errors import CheckError, DatasetError, located
from prefkit.format import REFERENCE_DROPPED, REFERENCE_JSON, REFERENCE_PLAN, REFERENCES, part_name, reference_key
from prefkit.identity import policy_identity, reference_identity
from prefkit.models import load_tokenizer
from prefkit.sources import file_sha256
from prefkit.store import read_document, read_manifest, write_text
from prefkit.tables import check_parts, read_table, write_parquet

Tell = Callable[[str], None]
TEMPLATE_FILE = "chat_template.jinja"


def drop_reasons(dropped: pl.DataFrame) -> dict[str, int]:
    """How many pairs encoding dropped, by reason."""
    return {row["reason"]: row["len"] for row in dropped.group_by("reason").len().sort("reason").to_dicts()}


class Work(NamedTuple):
    """Everything about a reference pass that is known before the model runs."""

    key: str
    model: str
    folder: Path
    identity: dict[str, Any]
    template: str | None
    plan: pl.DataFrame
    dropped: pl.DataFrame
    encoded: pl.DataFrame
    missing_parts: list[int]
    present: list[str]
    current: bool


def prepare_work(pipeline: Pipeline, tell: Tell, measure: Callable[[int], int]) -> Work:
    """Hash the model, find what is there, encode what is not, and plan it.

    Args:
        pipeline: its precompute section decides.
        tell: called with lines for a person.
        measure: from the tokens of the longest pair to the budget of a batch; asked only where there are new pairs,
            and neither precompute.max_batch_tokens nor an earlier plan says it.
    """
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
    if pairs.is_empty():
        hint = f'prefkit query {dataset} "select reason, count(*) from dropped group by all"'
        raise DatasetError("holds no pairs", where=str(dataset), hint=hint)
    plan, dropped = read_plan(folder, set(pairs["pair_id"]))
    new = pairs.filter(~pl.col("pair_id").is_in(plan["pair_id"].to_list() + dropped["pair_id"].to_list()))
    check_written(folder, plan)
    unwritten = [part for part in plan["part"].unique().sort() if not (folder / part_name(part)).exists()]
    waiting = plan.filter(pl.col("part").is_in(unwritten))["pair_id"].to_list()
    if new.height or waiting:
        tell(f"encoding {new.height + len(waiting)} pairs")
    with located(str(model)):
        encoded = encode_pairs(
            pairs.filter(pl.col("pair_id").is_in(waiting + new["pair_id"].to_list())), tokenizer, encoding
        )
    fresh, lost = unplanned(encoded, set(new["pair_id"]))
    dropped = pl.concat([dropped, lost])
    if plan.is_empty() and fresh.is_empty():
        raise CheckError(
            f"encoding drops every pair: {', '.join(f'{n} {r}' for r, n in drop_reasons(dropped).items())}",
            where=str(dataset),
            hint="another precompute.max_length or chat template",
        )
    boundaries = pl.concat([plan["num_boundary_tokens"], fresh["num_boundary_tokens"]])
    check_boundary(int((boundaries > 0).sum()), len(boundaries), settings.max_boundary_share)
    if fresh.height:
        longest = int(fresh.select(NUM_TOKENS.max()).item())
        plan = extend_plan(plan, fresh, settings.max_batch_tokens or planned_budget(plan) or measure(longest))
    missing = [part for part in plan["part"].unique().sort() if not (folder / part_name(part)).exists()]
    return Work(
        key,
        str(model),
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


def write_plan(work: Work) -> None:
    """Put the plan, the drops and the template on disk before anything is scored."""
    (work.folder / REFERENCE_JSON).unlink(missing_ok=True)  # its hashes will not be those of the new parts
    if work.template is not None and not (work.folder / TEMPLATE_FILE).exists():
        write_text(work.folder / TEMPLATE_FILE, work.template)
    for name, frame in ((REFERENCE_DROPPED, work.dropped), (REFERENCE_PLAN, work.plan)):
        path = work.folder / name
        if not path.exists() or not pl.read_parquet(path, glob=False).equals(frame):
            write_parquet(path, frame)


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
