"""Which pairs are scored together: length-sorted batches under a token budget, decided before anything is scored.

A plan depends on lengths and the budget alone, never on process count, clock or free memory, so that any machine writes
the same parts.
"""

from pathlib import Path

import polars as pl

from prefkit.encode import Encoded
from prefkit.errors import DatasetError
from prefkit.format import PLAN, REFERENCE_DROPPED, REFERENCE_PLAN, part_name, schema

BATCHES_PER_PART = 32  # what a kill may cost: at 8,192 tokens a batch, some 260,000 tokens


def plan_batches(
    encoded: pl.DataFrame, max_batch_tokens: int, first_batch: int = 0, first_part: int = 0
) -> pl.DataFrame:
    """Assign every pair a batch and every batch a part; the longest pairs come first, so memory shows at once.

    Args:
        encoded: pair_id and num_prompt_tokens, num_chosen_tokens, num_rejected_tokens, and the counting columns.
        max_batch_tokens: pairs in a batch times the longest pair's prompt + chosen + rejected tokens stays within it; a
            single pair above it is a batch of its own.
        first_batch: number of the first batch, above those of an earlier plan.
        first_part: likewise.

    Returns:
        the columns of format.PLAN, in scoring order.
    """
    total = pl.sum_horizontal(f"num_{side}_tokens" for side in ("prompt", "chosen", "rejected")).cast(pl.Int32)
    ordered = encoded.with_columns(total.alias("num_tokens")).sort("num_tokens", "pair_id", descending=[True, False])
    batches: list[int] = []
    batch, size, longest = first_batch, 0, 0
    for tokens in ordered["num_tokens"]:
        if size and (size + 1) * longest > max_batch_tokens:
            batch, size = batch + 1, 0
        longest = tokens if size == 0 else longest
        size += 1
        batches.append(batch)
    numbered = ordered.with_columns(pl.Series("batch", batches, pl.Int32))
    part = ((pl.col("batch") - first_batch) // BATCHES_PER_PART + first_part).cast(pl.Int32)
    return numbered.with_columns(part.alias("part")).select(column.name for column in PLAN)


def largest_batch(plan: pl.DataFrame) -> int:
    """The padded tokens of the largest batch: its pairs times the longest one's prompt + chosen + rejected tokens."""
    sizes = plan.group_by("batch").agg(pl.len() * pl.col("num_tokens").max())
    return int(sizes["len"].max() or 0)  # type: ignore[arg-type]


def read_plan(folder: Path, present: set[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The plan and the drops of an earlier call; pairs that left the dataset before they were scored leave the plan."""
    plan = _read_or_empty(folder / REFERENCE_PLAN, "plan")
    dropped = _read_or_empty(folder / REFERENCE_DROPPED, "reference_dropped")
    written = [part for part in plan["part"].unique() if (folder / part_name(part)).exists()]
    return plan.filter(pl.col("part").is_in(written) | pl.col("pair_id").is_in(list(present))), dropped


def _read_or_empty(path: Path, table: str) -> pl.DataFrame:
    empty = pl.DataFrame(schema=schema(table, "text"))
    if not path.exists():
        return empty
    try:
        return pl.read_parquet(path, glob=False).match_to_schema(empty.schema)
    except pl.exceptions.PolarsError as error:
        hint = f"delete {path.parent} and type prefkit precompute again"
        raise DatasetError(f"cannot be read: {error}", where=str(path), hint=hint) from None


def extend_plan(
    plan: pl.DataFrame, dropped: pl.DataFrame, encoded: Encoded, new: set[str], max_batch_tokens: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Plan the new pairs behind the old plan, and note the new drops."""
    fresh = encoded.pairs.filter(pl.col("pair_id").is_in(list(new)))
    first_batch = 0 if plan.is_empty() else int(plan["batch"].max()) + 1  # type: ignore[arg-type]
    first_part = 0 if plan.is_empty() else int(plan["part"].max()) + 1  # type: ignore[arg-type]
    added = plan_batches(fresh, max_batch_tokens, first_batch, first_part)
    lost = encoded.dropped.filter(pl.col("pair_id").is_in(list(new))).sort("pair_id")
    return pl.concat([plan, added]), pl.concat([dropped, lost])
