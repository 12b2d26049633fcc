"""Run directories written by hand, as prefkit train leaves them: for what reads runs, without training any."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from prefkit.format import schema
from prefkit.train_settings import TrainConfig

GATE = {"rows": 64, "tokens": 4408, "max_abs": 3e-6, "rms": 1e-7, "mean": 2e-8}


def run_document(train: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A run.json: a finished run on 843 pairs, without what only newer runs record."""
    return {
        "dataset": "data",
        "pairs": 843,
        "reference": "9c38e9b8932a5972",
        "model": "model",
        "train": {**TrainConfig().model_dump(mode="json"), **(train or {})},
        "policy_sha256": "8a" * 32,
        "data_sha256": "d0" * 32,
        "gate": GATE,
        "prefkit_version": "0.1.0",
        "finished": True,
        "steps": 4,
        "loss": 0.5,
        "eval": None,
        **fields,
    }


def write_run(
    run: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    perf: Sequence[Mapping[str, Any]] = (),
    *,
    train: Mapping[str, Any] | None = None,
    tail: str = "",
    **fields: Any,
) -> Path:
    """A run directory: Parquet of a finished run, otherwise live lines, the last one followed by `tail`."""
    run.mkdir(parents=True)
    document = run_document(train, **fields)
    (run / "run.json").write_text(json.dumps(document), encoding="utf-8")
    for table, logged in (("steps", rows), ("perf", perf)):
        if document["finished"] and logged:
            write_table(run / f"{table}.parquet", table, logged)
        if logged:
            lines = "".join(json.dumps(row) + "\n" for row in logged)
            (run / f"{table}.jsonl").write_text(lines + (tail if table == "steps" else ""), encoding="utf-8")
    return run


def write_table(path: Path, table: str, rows: Iterable[Mapping[str, Any]], *, without: Sequence[str] = ()) -> None:
    """Rows as Parquet with the columns of the format, but for those that an older prefkit did not have."""
    rows = list(rows)
    columns = {name: dtype for name, dtype in schema(table, "text").items() if name not in without}
    pl.DataFrame({n: pl.Series(n, [row.get(n) for row in rows], t) for n, t in columns.items()}).write_parquet(path)
