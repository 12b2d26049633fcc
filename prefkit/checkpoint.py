"""The run directory: checkpoints that a kill cannot tear, and the step and pair tables cut back to them.

    runs/<n>/checkpoints/step-000020/   model.safetensors, optimizer.pt, checkpoint.json (last)

A checkpoint is written into a folder beside its place and renamed. What is logged after it (steps.jsonl, pair_dynamics)
is cut back to it on resume, so a resumed run leaves what an unbroken one would.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn

from prefkit.format import CHECKPOINTS, DYNAMICS, STEPS, STEPS_LIVE, part_name, schema
from prefkit.store import read_json, write_json, write_parquet, write_text

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "checkpoint.json"


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, limit: int) -> None:
    """Write checkpoints/step-<step>/ and remove the oldest above `limit`."""
    place = run / CHECKPOINTS / f"step-{step:06d}"
    beside = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_tensors(model, str(beside / WEIGHTS))
    torch.save(optimizer.state_dict(), beside / OPTIMIZER)
    write_json(beside / STATE, {"step": step})
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    for old in list_checkpoints(run)[:-limit]:
        shutil.rmtree(old)


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("step-*") if (path / STATE).exists())


def load_checkpoint(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights and optimiser state back; returns its step."""
    device = str(next(model.parameters()).device)
    load_tensors(model, str(place / WEIGHTS), device=device)
    optimizer.load_state_dict(torch.load(place / OPTIMIZER, map_location=device, weights_only=True))
    return int(read_json(place / STATE)["step"])


def append_step(run: Path, row: Mapping[str, Any]) -> None:
    """Add a line to steps.jsonl, for whoever watches the run."""
    with (run / STEPS_LIVE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_steps(run: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps.jsonl at and after `step` (and a torn last one); returns what stays."""
    path = run / STEPS_LIVE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] < step:
            rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_steps(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write steps.parquet: one row a logged step, the columns of format.STEPS_COLUMNS."""
    columns = schema("steps", "text")
    write_parquet(run / STEPS, pl.DataFrame({n: pl.Series(n, [r.get(n) for r in rows], t) for n, t in columns.items()}))


def write_dynamics(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a part to pair_dynamics, numbered by the first step in it."""
    if rows:
        columns = schema("pair_dynamics", "text")
        frame = pl.DataFrame({n: pl.Series(n, [r[n] for r in rows], t) for n, t in columns.items()})
        write_parquet(run / DYNAMICS / part_name(int(rows[0]["step"])), frame)


def cut_dynamics(run: Path, step: int) -> None:
    """Remove the parts of pair_dynamics that begin at or after `step`; a part never reaches over a checkpoint."""
    for path in (run / DYNAMICS).glob("part-*.parquet"):
        if int(path.stem.removeprefix("part-")) >= step:
            path.unlink()
