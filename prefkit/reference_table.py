"""A reference as it lies on disk: which there are, what one is, and whether its table can be what a pass has written.

Comes in: a dataset and a key, or none where there is one reference only. Goes out: its reference.json, its rows, part
by part or in one frame. Whoever reads a reference asks here first, with a model (gate) or without one (integrations):
every part as it was written, complete for the wanted pairs, finite, log-probs <= 0, no all-zero row, lists as long as
their ids, the sum column equal to the sum of the list column. Whose reference it is, is the gate's question. Price: the
parts are read twice (their hash, their rows), one at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow.parquet as pq

from prefkit.documents import Reference
from prefkit.errors import DatasetError, GateError, InputError
from prefkit.format import REFERENCE_DROPPED, REFERENCE_JSON, REFERENCES, differing, reference_key, schema
from prefkit.store import list_references, read_document, read_manifest
from prefkit.tables import check_parts, table_blocks
from prefkit.target import path_of

AGAIN = "delete the reference and type prefkit precompute again"
BLOCK_ROWS = 8_192
MAX_TOKEN_LOGP = 1e-6  # a float32 log_softmax may round a hair above 0


def reference_keys(dataset: Path, wanted: str | None) -> list[str]:
    """The keys to choose from: the wanted one, by as much of its beginning as no other has, or all there are.

    Raises:
        DatasetError: there is none, or not the wanted one, or what is wanted is the beginning of several.
        InputError: what is wanted is no text.
    """
    if wanted is not None and not isinstance(wanted, str):
        what = f"a key of a reference cannot be a value of type {type(wanted).__name__}"
        raise InputError(what, where=str(dataset), expected="a text, or None where there is one reference only")
    keys = list_references(dataset)
    if not keys:
        raise DatasetError("no finished reference", where=str(dataset), hint="prefkit precompute TARGET --model M")
    if wanted is None or wanted in keys:
        return keys if wanted is None else [wanted]
    begun = [key for key in keys if wanted and key.startswith(wanted)]
    if len(begun) != 1:
        what = f"several references begin with {wanted}" if begun else f"no reference {wanted}"
        raise DatasetError(what, where=str(dataset), expected="one of " + ", ".join(begun or keys))
    return begun


def read_reference(dataset: Path, key: str) -> dict[str, Any]:
    """reference.json of one reference of a dataset.

    Raises:
        DatasetError: it is damaged.
        GateError: its identity is not the one that its key was made from.
    """
    path = dataset / REFERENCES / key / REFERENCE_JSON
    try:
        recorded = read_document(path, Reference)
    except DatasetError as error:
        error.hint = f"delete {path.parent} and type prefkit precompute again"
        raise
    if not key == recorded["key"] == reference_key(recorded["identity"]):
        what = "its identity is not the one that its key was made from: it was changed"
        raise GateError(what, where=str(path), hint=AGAIN)
    return recorded


def pick_reference(dataset: Path, wanted: str | None) -> tuple[str, dict[str, Any]]:
    """The reference of that key, or the only one there is; and its reference.json.

    Raises:
        DatasetError: there is none, not the wanted one, or it is damaged.
        GateError: it was changed, or there are several and none is wanted.
    """
    keys = reference_keys(dataset, wanted)
    if len(keys) > 1:
        told = [f"{key}: " + distinction(read_reference(dataset, key)["identity"]) for key in keys]
        listed = "\n  ".join(told)
        raise GateError(f"there are several references:\n  {listed}", where=str(dataset), hint="name one by its key")
    return keys[0], read_reference(dataset, keys[0])


def distinction(identity: Mapping[str, Any]) -> str:
    """What tells references of one dataset apart, on one line."""
    names = ("max_length", "dtype", "truncation", "chat_template_sha256", "weights_sha256")
    return ", ".join(f"{name} {str(identity[name])[:16] if 'sha256' in name else identity[name]}" for name in names)


def check_reference(dataset: Path, key: str, reference: Mapping[str, Any], pair_ids: Sequence[str]) -> None:
    """Check all that can be checked of a reference without a model, part by part.

    Args:
        dataset: with reference/<key>/.
        key: of the reference.
        reference: its reference.json.
        pair_ids: the pairs that must be in it (scored, or dropped by encoding); rows of others are not looked at.

    Raises:
        GateError: by name of the first check that fails, with the number of rows and the first ten pair_ids.
    """
    folder = dataset / REFERENCES / key
    try:
        check_parts(folder, [*reference["parts"], reference["dropped"]])
    except DatasetError as error:
        raise GateError(error.message, where=error.where, hint=AGAIN) from None
    if not reference["parts"]:
        raise GateError("the reference has no rows", where=str(folder), hint=AGAIN)
    rules, place = table_rules(), {pair: number for number, pair in enumerate(pair_ids)}
    against: dict[str, list[str]] = {name: [] for name in rules}
    seen: list[pl.Series] = []
    for part in reference["parts"]:
        rows = _part(folder / part["file"])
        seen.append(rows["pair_id"])
        wanted = rows.filter(pl.Series([pair in place for pair in rows["pair_id"]], dtype=pl.Boolean))
        for name, rule in rules.items():
            against[name] += wanted.filter(rule)["pair_id"].to_list()
    scored = pl.concat(seen)
    dropped = set(pl.read_parquet(folder / REFERENCE_DROPPED, glob=False)["pair_id"])
    twice = scored.filter(scored.is_duplicated()).unique(maintain_order=True)
    refuse_pairs(folder, "scored twice", twice.to_list())
    have = set(scored)
    refuse_pairs(folder, "both scored and dropped", sorted(have & dropped))
    missing = [pair for pair in pair_ids if pair not in have and pair not in dropped]
    refuse_pairs(folder, "missing", missing, hint="prefkit precompute TARGET scores them")
    for name, found in against.items():
        refuse_pairs(folder, name, sorted(found, key=lambda pair: place[pair]))


def reference_rows(dataset: Path, key: str, reference: Mapping[str, Any], pair_ids: Sequence[str]) -> pl.DataFrame:
    """The checked rows of those pairs that were scored, in the order of pair_ids.

    Raises:
        GateError: as in check_reference.
    """
    check_reference(dataset, key, reference, pair_ids)
    folder = dataset / REFERENCES / key
    table = pl.concat([_part(folder / part["file"]) for part in reference["parts"]])
    wanted = pl.DataFrame({"pair_id": pair_ids}, schema={"pair_id": pl.String})
    return wanted.join(table, on="pair_id", how="inner", maintain_order="left")


class Opened(NamedTuple):
    """A checked reference of a checked dataset.

    `folder`: reference/<key>/; `recorded`: its reference.json; `pairs`: pair_id, split and weight of every pair of the
    dataset, sorted by pair_id.
    """

    folder: Path
    recorded: dict[str, Any]
    pairs: pl.DataFrame


def open_reference(dataset: str | Path, key: str | None = None) -> Opened:
    """A reference that may be read: the dataset's pairs and the reference's parts as they were written, and complete.

    Args:
        dataset: the directory.
        key: of the reference; None where there is one only.

    Raises:
        DatasetError: no finished dataset or reference, another format version, or a part of the pairs was changed.
        GateError: there are several references, or what this one holds cannot be what a reference pass has written.
    """
    root = path_of(dataset, "a dataset directory")
    manifest = read_manifest(root)
    key, recorded = pick_reference(root, key)
    check_parts(root / "pairs", manifest["parts"]["pairs"])
    pairs = pl.concat(table_blocks(root, "pairs", manifest, ["pair_id", "split", "weight"], BLOCK_ROWS)).sort("pair_id")
    check_reference(root, key, recorded, pairs["pair_id"].to_list())
    return Opened(root / REFERENCES / key, recorded, pairs)


def scored_blocks(
    opened: Opened, split: str | None, rows: int = BLOCK_ROWS, columns: Sequence[str] | None = None
) -> Iterator[pl.DataFrame]:
    """The scored pairs of a split (None: all), some at a time, in the order of the parts, with `split` and `weight`.

    `columns`: of the reference, `pair_id` among them; None: all.

    Nothing is checked again: the parts were when the reference was opened.
    """
    wanted = opened.pairs if split is None else opened.pairs.filter(pl.col("split") == split)
    for part in opened.recorded["parts"]:
        with pq.ParquetFile(opened.folder / part["file"], pre_buffer=False) as file:
            for batch in file.iter_batches(rows, columns=columns):
                frame = looked_up(pl.DataFrame(pl.from_arrow(batch)), wanted)
                frame = frame.filter(pl.col("split").is_not_null())
                if not frame.is_empty():
                    yield frame


def looked_up(rows: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """Rows beside what a table that is sorted by pair_id says of them, null where it lacks the pair.

    A left join, in the time that some rows take and not all of the table.
    """
    place = table["pair_id"].search_sorted(rows["pair_id"]).clip(0, max(0, table.height - 1))
    found = table[place] if table.height else table.clear(rows.height)
    same = found["pair_id"] == rows["pair_id"]
    return rows.hstack(found.drop("pair_id").select(pl.when(same).then(pl.all())))


def _part(path: Path) -> pl.DataFrame:
    """A part with the columns of the format, and no others.

    Raises:
        GateError: it has other columns or types, or is no Parquet.
    """
    wanted = schema("reference", "text")
    try:
        part = pl.read_parquet(path, glob=False)
    except pl.exceptions.PolarsError as error:
        raise GateError(f"cannot be read: {error}", where=str(path), hint=AGAIN) from None
    lines = differing({n: str(t) for n, t in part.schema.items()}, {n: str(t) for n, t in wanted.items()})
    if lines:
        raise GateError(
            "columns that no reference pass writes (found and expected): " + "; ".join(lines),
            where=str(path),
            hint=AGAIN,
        )
    return part.select(wanted.names())


def table_rules() -> dict[str, pl.Expr]:
    """Name to expression that is true for a row which no reference pass can have written."""
    prompt = pl.col("prompt_ids")
    rules: dict[str, pl.Expr] = {
        "with a null in prompt_ids": prompt.is_null() | prompt.list.eval(pl.element().is_null()).list.any(),
        "with an empty prompt_ids": prompt.list.len() == 0,
        "with num_prompt_tokens that is not the length of prompt_ids": prompt.list.len() != pl.col("num_prompt_tokens"),
    }
    for side in ("chosen", "rejected"):
        total, tokens, ids = f"ref_{side}_logps", f"ref_{side}_token_logps", f"{side}_ids"
        values = pl.col(tokens)
        flat = values.list.eval(pl.element().is_null() | ~pl.element().is_finite()).list.any()
        rules[f"with a null in {total} or {tokens}"] = (
            pl.col(total).is_null() | values.is_null() | pl.col(ids).is_null()
        )
        rules[f"with {tokens} not as long as {ids}"] = (values.list.len() != pl.col(ids).list.len()) | (
            pl.col(ids).list.len() != pl.col(f"num_{side}_tokens")
        )
        rules[f"with an empty {ids}"] = pl.col(ids).list.len() == 0
        rules[f"with a value in {total} or {tokens} that is not finite"] = ~pl.col(total).is_finite() | flat
        rules[f"with a log-prob above 0 in {tokens}"] = values.list.max() > MAX_TOKEN_LOGP
        # a single token may be certain to float rounding; two in a row are a row that nobody filled
        rules[f"with nothing but zeros in {tokens}"] = (
            (values.list.len() > 1) & (values.list.min() == 0) & (values.list.max() == 0)
        )
        summed = values.list.eval(pl.element().cast(pl.Float64)).list.sum()
        # one float32 rounding of the sum: spacing 2^-23 relative
        off = (pl.col(total).cast(pl.Float64) - summed).abs() > 1e-6 * summed.abs() + 1e-6
        rules[f"where {total} is not the sum of {tokens}"] = off
    return rules


def refuse_pairs(folder: Path, what: str, pair_ids: Sequence[str], hint: str = AGAIN) -> None:
    """Refuse a reference for these pairs, if there are any: how many, and the first ten.

    Raises:
        GateError: there are some.
    """
    if pair_ids:
        first = ", ".join(pair[:12] for pair in pair_ids[:10])
        raise GateError(f"{len(pair_ids)} pairs {what}: {first}", where=str(folder), hint=hint)
