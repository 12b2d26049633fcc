"""Which pairs are scored together: batches of a number of tokens, decided before anything is scored.

A plan depends on the pairs' tokens and the budget alone, never on process count, clock or free memory, so that any
machine writes the same parts. The budget stands beside each batch: a pass that goes on later or elsewhere keeps to it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from prefkit.encode import Encoded
from prefkit.errors import DatasetError
from prefkit.format import PLAN, REFERENCE_DROPPED, REFERENCE_PLAN, part_name, schema

BATCHES_PER_PART = 32  # what a kill may cost, and what several processes share: 65,536 tokens at 2,048 a batch
NUM_TOKENS = pl.sum_horizontal(f"num_{side}_tokens" for side in ("prompt", "chosen", "rejected")).cast(pl.Int32)


def plan_batches(
    encoded: pl.DataFrame, max_batch_tokens: int, first_batch: int = 0, first_part: int = 0
) -> pl.DataFrame:
    """Assign every pair a batch and every batch a part.

    Pairs that have the same prompt lie side by side, so that a batch computes it once. Prompts come in the order of
    their longest pair, the longest first, so that memory shows at once; so do the pairs of a prompt. Where lengths are
    equal, pair_id decides.

    Args:
        encoded: pair_id, the ids of prompt, chosen and rejected and their numbers, and the counting columns.
        max_batch_tokens: the tokens of a batch stay within it, a prompt and a response of it that several of its pairs
            have counted once; a single pair above it is a batch of its own.
        first_batch: number of the first batch, above those of an earlier plan.
        first_part: likewise.

    Returns:
        the columns of format.PLAN, in scoring order.
    """
    longest_first = encoded.with_columns(NUM_TOKENS.alias("num_tokens")).sort(
        "num_tokens", "pair_id", descending=[True, False]
    )
    # the first pair of each prompt, by which all of its pairs are sorted
    leader = (pl.col(name).first().over("prompt_ids").alias(f"leader_{name}") for name in ("num_tokens", "pair_id"))
    ordered = longest_first.with_columns(*leader).sort(
        "leader_num_tokens", "leader_pair_id", descending=[True, False], maintain_order=True
    )
    batches = [first_batch + batch for batch in _filled(_texts(ordered), max_batch_tokens)]
    numbered = ordered.with_columns(
        pl.Series("batch", batches, pl.Int32), pl.lit(max_batch_tokens, pl.Int64).alias("max_batch_tokens")
    )
    part = ((pl.col("batch") - first_batch) // BATCHES_PER_PART + first_part).cast(pl.Int32)
    return numbered.with_columns(part.alias("part")).select(column.name for column in PLAN)


def _texts(ordered: pl.DataFrame) -> Iterator[list[tuple[Any, int]]]:
    """Of every pair its prompt, chosen and rejected: what tells each from others, and its tokens."""
    rows = ordered.height
    both = pl.concat([ordered.select("leader_pair_id", ids=f"{side}_ids") for side in ("chosen", "rejected")])
    # the row of the first response of the prompt that is the same
    same = both.with_row_index().select(pl.col("index").first().over("leader_pair_id", "ids"))["index"].to_list()
    numbers = ordered.select(f"num_{side}_tokens" for side in ("prompt", "chosen", "rejected")).rows()
    for row, (leader, counts) in enumerate(zip(ordered["leader_pair_id"], numbers, strict=True)):
        yield list(zip((leader, same[row], same[rows + row]), counts, strict=True))


def _filled(pairs: Iterable[list[tuple[Any, int]]], budget: int) -> Iterator[int]:
    """The batch of every pair, filled in order: what a batch holds is its distinct texts."""
    batch, held = 0, 0
    seen: set[Any] = set()
    for texts in pairs:
        more = sum(count for text, count in dict(texts).items() if text not in seen)
        if seen and held + more > budget:
            batch, held, seen = batch + 1, 0, set()
            more = sum(dict(texts).values())
        held += more
        seen.update(text for text, _ in texts)
        yield batch


def slices(lengths: Sequence[tuple[int, int, int]], budget: int | None, rows: str) -> list[slice]:
    """Cut a planned batch into consecutive slices whose rows, padded to the longest, stay within the budget.

    Args:
        lengths: prompt, chosen and rejected tokens of each pair, in the order of the batch.
        budget: tokens; a single pair above it is a slice of its own. None: of a plan of an earlier release, which was
            made with the padding counted in.
        rows: tree (a pair is a row of prompt + chosen + rejected) | separate (two rows, each as long as the longest
            prompt + completion) | packed and alone, which pad nothing: one slice.

    Example: `slices([(1, 2, 2), (1, 1, 1), (1, 1, 1)], 10, "tree")` is `[slice(0, 2), slice(2, 3)]`: 2 rows of 5, then
    1 of 3.
    """
    padded = {
        "tree": [prompt + chosen + rejected for prompt, chosen, rejected in lengths],
        "separate": [2 * (prompt + max(chosen, rejected)) for prompt, chosen, rejected in lengths],
    }.get(rows)
    if padded is None or budget is None:
        return [slice(0, len(lengths))]
    starts, longest = [0], 0
    for number, tokens in enumerate(padded):
        longest = max(longest, tokens)
        if number > starts[-1] and (number + 1 - starts[-1]) * longest > budget:
            starts.append(number)
            longest = tokens
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def largest_batch(plan: pl.DataFrame) -> int:
    """The tokens of the largest batch: prompt + chosen + rejected of all its pairs, shared or not."""
    return int(plan.group_by("batch").agg(pl.col("num_tokens").sum())["num_tokens"].max() or 0)  # type: ignore[arg-type]


def planned_budget(plan: pl.DataFrame) -> int | None:
    """The budget that the last batch was planned with; None where there is none, or of an earlier release."""
    budgets = plan["max_batch_tokens"].drop_nulls()
    return None if budgets.is_empty() else int(budgets[-1])


def read_plan(folder: Path, present: set[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The plan and the drops of an earlier call; pairs that left the dataset before they were scored leave the plan."""
    plan = _read_or_empty(folder / REFERENCE_PLAN, "plan")
    dropped = _read_or_empty(folder / REFERENCE_DROPPED, "reference_dropped")
    written = [part for part in plan["part"].unique() if (folder / part_name(part)).exists()]
    return plan.filter(pl.col("part").is_in(written) | pl.col("pair_id").is_in(list(present))), dropped


def _read_or_empty(path: Path, table: str) -> pl.DataFrame:
    empty = pl.DataFrame(schema=schema(table, "text"))
    added: Any = {"max_batch_tokens": "insert"} if table == "plan" else "raise"  # plans of earlier releases lack it
    if not path.exists():
        return empty
    try:
        return pl.read_parquet(path, glob=False).match_to_schema(empty.schema, missing_columns=added)
    except pl.exceptions.PolarsError as error:
        hint = f"delete {path.parent} and type prefkit precompute again"
        raise DatasetError(f"cannot be read: {error}", where=str(path), hint=hint) from None


def unplanned(encoded: Encoded, new: set[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of the new pairs, those to plan, and those that encoding dropped, by pair_id."""
    is_new = pl.col("pair_id").is_in(list(new))
    return encoded.pairs.filter(is_new), encoded.dropped.filter(is_new).sort("pair_id")


def extend_plan(plan: pl.DataFrame, fresh: pl.DataFrame, max_batch_tokens: int) -> pl.DataFrame:
    """Plan new pairs behind the old plan."""
    first_batch = 0 if plan.is_empty() else int(plan["batch"].max()) + 1  # type: ignore[arg-type]
    first_part = 0 if plan.is_empty() else int(plan["part"].max()) + 1  # type: ignore[arg-type]
    return pl.concat([plan, plan_batches(fresh, max_batch_tokens, first_batch, first_part)])
