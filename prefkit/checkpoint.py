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

from prefkit.errors import DatasetError, is_out_of_memory
from prefkit.format import CHECKPOINTS, DYNAMICS, STEPS, STEPS_LIVE, part_name, schema
from prefkit.store import folder_beside, read_json, write_json, write_text, written
from prefkit.tables import write_parquet

DYNAMICS_ROWS = 50_000  # pairs seen before they are written as a part: what memory holds of them
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "checkpoint.json"


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints/step-<step>/ whole or not at all."""
    with folder_beside(run / CHECKPOINTS / f"step-{step:06d}") as beside:
        save_tensors(model, str(beside / WEIGHTS))
        with (beside / OPTIMIZER).open("wb") as file:  # a file of Python's: its OSError is the cause of torch's error
            torch.save({"optimizer": optimizer.state_dict(), "random": _random_states()}, file)
        write_json(beside / STATE, {"step": step})


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def prune_checkpoints(run: Path, every: int | None, limit: int, *, finished: bool = False) -> None:
    """Keep the newest `limit` checkpoints of those due, each `every` updates.

    One that an interruption left between two due ones is kept until a newer one is there, or the run is finished: so
    an interrupted run ends with the files of an unbroken one.
    """
    there = list_checkpoints(run)
    due = [path for path in there if every and _step(path) % every == 0]
    kept = {*due[-limit:], *([] if finished else there[-1:])}
    for torn in (run / CHECKPOINTS).glob(".step-*.tmp"):  # of a kill
        shutil.rmtree(torn)
    for path in there:
        if path not in kept:  # under the name of what is torn first: a kill halfway leaves no half checkpoint
            shutil.rmtree(path.replace(path.with_name(f".{path.name}.tmp")))
    if finished and not kept:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((path for path in (run / CHECKPOINTS).glob("step-*") if (path / STATE).exists()), key=_step)


def load_checkpoint(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights, optimiser state and random state back; returns its step.

    Rates and decay stay those of the optimiser as it was made: they are settings, not state.

    Raises:
        DatasetError: the checkpoint cannot be read, or is one of another model or optimiser.
    """
    device = str(next(model.parameters()).device)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        load_tensors(model, str(place / WEIGHTS), device=device)
        state = torch.load(place / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # whatever else safetensors and torch raise, the user needs the folder and a way out
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"delete {place} to go on from the checkpoint before it"
        raise DatasetError(f"the checkpoint cannot be read: {reason}", where=str(place), hint=hint) from None
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return int(read_json(place / STATE)["step"])


def append_step(run: Path, row: Mapping[str, Any]) -> None:
    """Add a line to steps.jsonl, for whoever watches the run."""
    with written(run / STEPS_LIVE), (run / STEPS_LIVE).open("a", encoding="utf-8") as file:
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


def cut_dynamics(run: Path, step: int, *, closed: bool) -> list[dict[str, Any]]:
    """Cut pair_dynamics back to the checkpoint of `step`.

    Args:
        run: its directory.
        step: of the checkpoint, 0 for none.
        closed: whether a part ends at this checkpoint; where it does not (an interruption), the last part is open.

    Returns:
        the rows of the open part, to go on with. Its file stays until it is written again, with them in it.
    """
    parts = sorted((run / DYNAMICS).glob("part-*.parquet"), key=_begin)
    begins = [_begin(path) for path in parts]
    for path, begin in zip(parts, begins, strict=True):
        if begin >= step:
            path.unlink()
    earlier = [path for path, begin in zip(parts, begins, strict=True) if begin < step]
    if not earlier:
        return []
    last = pl.read_parquet(earlier[-1], glob=False)
    ends_here = (closed or last.height >= DYNAMICS_ROWS) and last["step"][-1] < step
    return [] if ends_here else last.filter(pl.col("step") < step).to_dicts()


def _begin(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))
