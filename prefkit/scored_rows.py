"""The pairs of a dataset with what a reference says of them, in the order of the pairs: for exports.

Beside texts stand the two sums of log-probs. They are right for a reader whose tokens are those that were scored, so a
pair whose scored tokens are not its text as any tokenizer would cut it is left out by name: `truncated` (a side or the
prompt was cut), `control_tokens` (its text spells one, and was scored as text), `prompt_boundary` (its prompt is no
token prefix of prompt + completion). The tokens themselves hold all pairs. What encoding dropped is `not_in_reference`
either way. Price: ids and sums of all pairs in memory; tokens go through a folder on disk, as parts have another order.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from prefkit import __version__
from prefkit.errors import DatasetError, first_line
from prefkit.format import PAIRS, REFERENCE, REFERENCE_PLAN
from prefkit.reference_table import AGAIN, Opened, looked_up, refuse_pairs, scored_blocks
from prefkit.row_files import Rows
from prefkit.spill import Spill
from prefkit.store import read_manifest
from prefkit.tables import table_blocks

SUMS = ("ref_chosen_logps", "ref_rejected_logps")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
CUT = ("chosen_truncated", "rejected_truncated")
FLAGS = ("num_boundary_tokens", "spells_control_token", "prompt_cut")  # of the plan
COLUMN_TYPES = {name: pa.float32() for name in SUMS} | {name: pa.list_(pa.int32()) for name in IDS}
ORIGIN = ("pair_id", "split", "source", "source_row")
TEXT_ROWS, TOKEN_ROWS = 4_096, 32_768  # at once


def scored_texts(dataset: Path, opened: Opened, split: str | None) -> Iterator[tuple[pl.DataFrame, Rows]]:
    """Blocks of the pairs table with `ref_chosen_logps` and `ref_rejected_logps`, and what is left out of each.

    Raises:
        GateError: the reference's plan does not name a pair that it has scored.
        DatasetError: the plan cannot be read.
    """
    found = _sums(opened, split)
    names = [column.name for column in PAIRS]
    for block in table_blocks(dataset, "pairs", read_manifest(dataset), names, TEXT_ROWS):
        wanted = block if split is None else block.filter(pl.col("split") == split)
        joined = looked_up(wanted, found)
        reason = pl.when(pl.col(SUMS[0]).is_null()).then(pl.lit("not_in_reference")).otherwise(pl.col("reason"))
        told = joined.with_columns(reason=reason)
        yield told.filter(pl.col("reason").is_null()), left_out(told.filter(pl.col("reason").is_not_null()))


def _sums(opened: Opened, split: str | None) -> pl.DataFrame:
    """pair_id, both sums, and why a text cannot have them (null: it can) of every scored pair, sorted."""
    blocks = scored_blocks(opened, split, columns=["pair_id", *SUMS, *CUT])
    empty = pl.DataFrame(schema={"pair_id": pl.String, **dict.fromkeys(SUMS, pl.Float32)})
    scored = pl.concat([empty, *(block.drop("split", "weight") for block in blocks)], how="diagonal")
    path = opened.folder / REFERENCE_PLAN
    try:
        plan = pl.read_parquet(path, columns=["pair_id", *FLAGS], glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(f"cannot be read: {first_line(error)}", where=str(path), hint=AGAIN) from None
    refuse_pairs(opened.folder, "not in the plan", scored.join(plan, on="pair_id", how="anti")["pair_id"].to_list())
    reason = (
        pl.when(pl.any_horizontal(*CUT, "prompt_cut"))
        .then(pl.lit("truncated"))
        .when("spells_control_token")
        .then(pl.lit("control_tokens"))
        .when(pl.col("num_boundary_tokens") > 0)
        .then(pl.lit("prompt_boundary"))
    )
    return scored.join(plan, on="pair_id", how="left").select("pair_id", *SUMS, reason=reason).sort("pair_id")


def scored_tokens(
    dataset: Path, opened: Opened, split: str | None, scratch: Path
) -> Iterator[tuple[pl.DataFrame, Rows]]:
    """Blocks of ORIGIN, IDS and SUMS in the order of the pairs, and what is left out; they pass through `scratch`."""
    blocks = table_blocks(dataset, "pairs", read_manifest(dataset), ORIGIN, TOKEN_ROWS)
    order = pl.concat([block if split is None else block.filter(pl.col("split") == split) for block in blocks])
    places = order.select("pair_id", place=pl.int_range(pl.len())).sort("pair_id")
    is_there = np.zeros(order.height, np.bool_)
    with Spill(scratch) as spill:
        for block in _gathered(scored_blocks(opened, split, TOKEN_ROWS, ["pair_id", *IDS, *SUMS]), TOKEN_ROWS):
            placed = looked_up(block.drop("split", "weight"), places)
            is_there[placed["place"].to_numpy()] = True
            by = placed.with_columns(partition=pl.col("place") // TOKEN_ROWS).partition_by("partition", as_dict=True)
            for (number,), rows in by.items():
                spill.append(int(number), rows.drop("partition"))
        for _, rows in spill.partitions():
            yield rows.sort("place").hstack(order[rows["place"].sort()].drop("pair_id")), []
    missing = order.filter(~pl.Series(is_there))
    yield order.clear(), left_out(missing.with_columns(reason=pl.lit("not_in_reference")))


def _gathered(blocks: Iterator[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """Blocks of about so many rows: parts may be small, and a spill makes a file a block and partition."""
    held: list[pl.DataFrame] = []
    for block in blocks:
        held.append(block)
        if sum(one.height for one in held) >= rows:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


def left_out(pairs: pl.DataFrame) -> Rows:
    """Pairs as lines of the list of what was left out."""
    return pairs.select("pair_id", "source", pl.col("source_row").alias("line"), "reason").to_dicts()


def about(opened: Opened, files: Mapping[str, int]) -> dict[str, Any]:
    """What goes beside an export, for whoever reads it later: whose log-probs these are, and of what tokens."""
    docs = {column.name: column.doc for column in REFERENCE if column.name in (*IDS, *SUMS)}
    return {
        "prefkit_version": __version__,
        "files": dict(files),
        "key": opened.recorded["key"],
        "identity": opened.recorded["identity"],
        "columns": docs,
    }
