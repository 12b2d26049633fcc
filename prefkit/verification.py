"""Whether a dataset is what its manifest, its audit and its references say: other readers compare none of their hashes.

Comes in: a finished dataset. Goes out: what was checked, or an error that names the first file that is not as it was
written. Checked are the tables, the audit's tables and the references; runs hold no hashes. Price: every part is read,
one at a time. Whoever changes manifest.json too is not found out by this: compare its sha256 with one that you were
told.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow.parquet as pq

from prefkit.card import dataset_card
from prefkit.documents import Audit
from prefkit.errors import DatasetError, GateError
from prefkit.format import AUDIT_JSON, CARD, MANIFEST, REFERENCE_PLAN, REFERENCES, part_split
from prefkit.papers import card_facts
from prefkit.reference_table import AGAIN, check_reference, read_reference
from prefkit.sources import file_sha256
from prefkit.store import REMAKE, list_references, read_document, read_manifest
from prefkit.tables import check_parts, table_blocks
from prefkit.target import path_of

BLOCK_ROWS = 50_000


class Verified(NamedTuple):
    """What was found to be as it was written.

    `manifest_sha256`: hex, to compare with what somebody else has; `parts`: Parquet files by table, of references by
    `reference/<key>`; `rows`: likewise; `card`: whether README.md is the one that prefkit writes.
    """

    manifest_sha256: str
    parts: dict[str, int]
    rows: dict[str, int]
    card: bool


def verify_dataset(dataset: str | Path) -> Verified:
    """Read all of a dataset and compare it with what is recorded of it.

    Args:
        dataset: the directory.

    Raises:
        DatasetError: it is no finished dataset; a part is missing, changed or one too many; or a reference is not what
            a reference pass writes, or lacks pairs.
    """
    root = path_of(dataset, "a dataset directory")
    manifest = read_manifest(root)
    listed: dict[str, Sequence[Mapping[str, Any]]] = {**manifest["parts"]}
    for table, parts in listed.items():
        _check(root / table, parts)
    _check_counts(root, manifest)
    if (root / AUDIT_JSON).exists():
        listed["audit"] = read_document(root / AUDIT_JSON, Audit).get("parts", [])
        _check(root / "audit", listed["audit"])
    blocks = table_blocks(root, "pairs", manifest, ["pair_id"], BLOCK_ROWS)
    pair_ids = pl.concat([pl.DataFrame(schema={"pair_id": pl.String}), *blocks])["pair_id"].to_list()
    for key in list_references(root):
        name = f"{REFERENCES}/{key}"
        listed[name] = _checked_reference(root, key, pair_ids)
    return Verified(
        file_sha256(root / MANIFEST),
        {name: len(parts) for name, parts in listed.items()},
        {name: sum(part["rows"] for part in parts) for name, parts in listed.items()},
        _is_own_card(root, manifest),
    )


def _check(folder: Path, parts: Sequence[Mapping[str, Any]], beside: Collection[str] = ()) -> None:
    """The parts that are listed, and no other Parquet file but those `beside`.

    Raises:
        DatasetError: by the name of the first one that is not so.
    """
    check_parts(folder, [*parts])
    known = {*beside, *(part["file"] for part in parts)}
    strange = sorted({path.name for path in folder.glob("*.parquet")} - known)
    if strange:
        hint = "remove it: whoever reads the folder as a whole reads it too"
        raise DatasetError("no part of the dataset", where=str(folder / strange[0]), hint=hint)


def _check_counts(root: Path, manifest: Mapping[str, Any]) -> None:
    """The rows of each table as they are counted, and in each part of the pairs those of its split.

    Raises:
        DatasetError: by the name of the manifest or of the first part that is not so.
    """
    for table, parts in manifest["parts"].items():
        for part in parts:
            path = root / table / part["file"]
            with pq.ParquetFile(path) as file:
                found = file.metadata.num_rows
            if found != part["rows"]:
                what = f"the manifest says {part['rows']} rows"
                raise DatasetError(what, where=str(path), expected=f"{found}, as there are", hint=REMAKE)
    counts, pairs = manifest["counts"], manifest["parts"]["pairs"]
    for name, split in (("pairs", None), ("train", "train"), ("test", "test")):
        found = sum(part["rows"] for part in pairs if split in (None, part_split(part["file"])))
        if counts[name] != found:
            where, what = str(root / MANIFEST), f"counts.{name} is {counts[name]}"
            raise DatasetError(what, where=where, expected=f"{found}, the rows of its parts", hint=REMAKE)
    for part in pairs:
        path = root / "pairs" / part["file"]
        strange = set(pl.read_parquet(path, columns=["split"], glob=False)["split"]) - {part_split(part["file"])}
        if strange:
            what = f"holds pairs of the split {', '.join(sorted(map(str, strange)))}, which its name does not say"
            raise DatasetError(what, where=str(path), hint=REMAKE)


def _checked_reference(root: Path, key: str, pair_ids: list[str]) -> Sequence[Mapping[str, Any]]:
    try:
        recorded = read_reference(root, key)
        check_reference(root, key, recorded, pair_ids)
    except GateError as error:
        raise DatasetError(error.message, where=error.where, hint=error.hint) from None
    folder, parts = root / REFERENCES / key, [*recorded["parts"], recorded["dropped"]]
    _check(folder, parts, beside=[REFERENCE_PLAN])
    if recorded.get("plan") is not None:  # one of an earlier release has no hash of it
        check_parts(folder, [recorded["plan"]])
    _check_template(folder / "chat_template.jinja", recorded["identity"]["chat_template_sha256"])
    return parts


def _check_template(path: Path, wanted: str | None) -> None:
    """The template that lies beside a reference is the one that it was made with.

    Raises:
        DatasetError: it is missing, or another.
    """
    if wanted is None:
        return
    if not path.exists():
        raise DatasetError("is missing", where=str(path), hint=AGAIN)
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise DatasetError("was changed: its sha256 is not that of the identity", where=str(path), hint=AGAIN)


def _is_own_card(root: Path, manifest: Mapping[str, Any]) -> bool:
    try:
        return (root / CARD).read_text(encoding="utf-8") == dataset_card(card_facts(root, manifest))
    except (OSError, UnicodeDecodeError):
        return False
