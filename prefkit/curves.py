"""The curves of a run: run.json and the logged steps as frames, of a run that is finished, at work or broken off.

Comes in: a run directory. Goes out: its document, the rows of steps and perf with all columns of the format (null where
an older prefkit logged none), and pure functions that make such rows few enough to be drawn. A run that is not finished
is read from its live files, where a torn last line is no fault: its process is writing it, or was killed at it.
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.documents import Run
from prefkit.errors import DatasetError, first_line
from prefkit.format import PERF, PERF_LIVE, RUN_JSON, STEPS, STEPS_LIVE, schema
from prefkit.store import read_document

DAMAGED = "prefkit train logs it anew in another --out"
# how the columns of a run are named together: of the training batches, and the same of the test split
CURVES = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "drift/chosen",
    "drift/rejected",
    "drift/displaced",
    "kl/chosen",
    "kl/rejected",
    "nll/chosen",
    "grad_norm",
    "learning_rate",
    "beta",
)
PERF_CURVES = ("tokens_per_second", "mfu", "peak_memory", "seconds")


class Curves(NamedTuple):
    """One run as it is now."""

    path: str  # its directory as it was named
    document: dict[str, Any]  # run.json
    steps: pl.DataFrame  # a row an update, and the last evaluation, by step
    perf: pl.DataFrame  # a row an update, by step


class Progress(NamedTuple):
    """Updates made, and of how many; None where nothing says how many there will be."""

    made: int
    total: int | None


class Ends(NamedTuple):
    """The figures of one curve: its first and last value, its smallest and largest."""

    first: float
    last: float
    min: float
    max: float


def is_run(target: str | Path) -> bool:
    """Whether a directory is a run's."""
    return (Path(target) / RUN_JSON).exists()


def read_curves(target: str | Path) -> Curves:
    """Read a run as it is now.

    Raises:
        DatasetError: its run.json, or a file of its steps, is missing or damaged.
    """
    run = Path(target)
    document = read_document(run / RUN_JSON, Run)
    finished = bool(document["finished"])
    steps = _rows(run, "steps", STEPS, STEPS_LIVE, finished=finished)
    perf = _rows(run, "perf", PERF, PERF_LIVE, finished=finished)
    return Curves(str(target), document, steps, perf)


def _rows(run: Path, table: str, parquet: str, live: str, *, finished: bool) -> pl.DataFrame:
    """The table of a finished run; of another its live file, which knows more than what its last checkpoint wrote."""
    order = [(parquet, _read_parquet), (live, _read_lines)]
    for name, read in order if finished else order[::-1]:
        if (run / name).exists():
            return read(run / name, table)
    return pl.DataFrame(schema=schema(table, "text"))


def _read_parquet(path: Path, table: str) -> pl.DataFrame:
    columns = schema(table, "text")
    try:
        frame = pl.read_parquet(path, glob=False)
        there = [pl.col(name).cast(dtype) for name, dtype in columns.items() if name in frame.columns]
        lacking = [pl.lit(None, dtype).alias(name) for name, dtype in columns.items() if name not in frame.columns]
        return frame.select(there).with_columns(lacking).select(columns.names()).sort("step", maintain_order=True)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = first_line(error)
        raise DatasetError(f"the steps cannot be read: {reason}", where=str(path), hint=DAMAGED) from None


def _read_lines(path: Path, table: str) -> pl.DataFrame:
    """A row a line, up to a torn one, as a resumed run goes on from there."""
    columns = schema(table, "text")
    values: dict[str, list[Any]] = {name: [] for name in columns}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DatasetError(f"the steps cannot be read: {error}", where=str(path), hint=DAMAGED) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DatasetError("is no row of a step", where=f"{path}:{number}", hint=DAMAGED)
        for name, column in values.items():
            column.append(row.get(name))
    try:
        frame = pl.DataFrame({name: pl.Series(name, values[name], dtype) for name, dtype in columns.items()})
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        raise DatasetError("holds a value that is no number", where=str(path), hint=DAMAGED) from None
    return frame.sort("step", maintain_order=True)


def progress(run: Curves) -> Progress:
    """How far a run is. A row is logged after its update, the last row without one.

    The total is train.max_steps; or it follows from train.epochs and the pairs of a pass, which the epoch of any row of
    the first pass tells: step * pairs an update / epoch.
    """
    document, train = run.document, run.document["train"]
    last = run.steps.tail(1).to_dicts()
    made = last[0]["step"] + (last[0]["num_pairs"] is not None) if last else 0
    if document["finished"]:
        made = document.get("steps") or made
        return Progress(made, (train.get("max_steps") or _total(run)) if document.get("stopped_early") else made)
    return Progress(made, train.get("max_steps") or _total(run))


def _total(run: Curves) -> int | None:
    train = run.document["train"]
    size = train.get("batch_size", 0) * train.get("gradient_accumulation_steps", 1)
    first_pass = run.steps.filter((pl.col("epoch") > 0) & (pl.col("epoch") < 1)).head(1).to_dicts()
    if not size or not first_pass or train.get("epochs") is None:
        return None
    num_pairs = round(first_pass[0]["step"] * size / first_pass[0]["epoch"])
    total: int = max(1, math.ceil(train["epochs"] * math.ceil(num_pairs / size)))
    return total


def points(run: Curves, column: str) -> pl.DataFrame:
    """`step` and `value` of one column of steps or perf, where it has a finite value."""
    values = pl.col(column).cast(pl.Float64).alias("value")
    return _frame_of(run, column).select("step", values).filter(pl.col("value").is_finite().fill_null(False))


def num_infinite(run: Curves, column: str) -> int:
    """How many values of a column are no finite number: they cannot be drawn."""
    infinite = ~pl.col(column).cast(pl.Float64).is_finite()
    return int(_frame_of(run, column).select(infinite.fill_null(False).sum()).item())


def _frame_of(run: Curves, column: str) -> pl.DataFrame:
    return run.steps if column in run.steps.columns else run.perf


def ends(drawn: pl.DataFrame) -> Ends | None:
    """The figures of `points`; None where there are none."""
    if drawn.is_empty():
        return None
    values = drawn["value"].to_numpy()
    return Ends(float(values[0]), float(values[-1]), float(values.min()), float(values.max()))


def thinned(drawn: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most so many of the points, each one that was logged: of stretches of equal length the lowest and the highest.

    The first and the last point stay. No peak and no trough is lost, and nothing is averaged.

    Args:
        drawn: step, value.
        most: at least 4.
    """
    count = drawn.height
    if count <= most:
        return drawn
    values, kept = drawn["value"].to_numpy(), {0, count - 1}
    for low, high in _stretches(count, (most - 2) // 2):
        kept |= {low + int(np.argmin(values[low:high])), low + int(np.argmax(values[low:high]))}
    return drawn[sorted(kept)]


def stretch_means(drawn: pl.DataFrame, most: int) -> pl.DataFrame:
    """The mean of each of at most so many stretches of equal length, at the mean of their steps.

    Example: values 1, 3, 5, 9 in 2 stretches give 2 and 7.
    """
    steps, values = drawn["step"].to_numpy(), drawn["value"].to_numpy()
    means = [(steps[low:high].mean(), values[low:high].mean()) for low, high in _stretches(drawn.height, most)]
    columns: Sequence[Sequence[Any]] = list(zip(*means, strict=True)) or [[], []]
    return pl.DataFrame({"step": columns[0], "value": columns[1]}, schema={"step": pl.Float64, "value": pl.Float64})


def _stretches(count: int, most: int) -> list[tuple[int, int]]:
    """Where at most `most` stretches of `count` rows begin and end, no two of them more than a row apart in length."""
    number = min(count, most)
    edges = [count * i // number for i in range(number + 1)] if number else [0]
    return list(itertools.pairwise(edges))
