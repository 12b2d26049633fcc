"""The run directory: checkpoints that a kill cannot tear, and the step and pair tables cut back to them.

    runs/<n>/checkpoints/step-000020/   model.safetensors, optimizer.pt, checkpoint.json (last)
    runs/<n>/best/step-000015/          model.safetensors: of the evaluation that was best so far

A checkpoint is written into a folder beside its place and renamed. What is logged after it (steps.jsonl, perf.jsonl,
pair_dynamics) is cut back to it on resume, so a resumed run leaves what an unbroken one would. Weights and their
optimiser state go by name, whole, and only those that are trained: any number of processes goes on with them.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefkit.errors import DatasetError, first_line, is_out_of_memory
from prefkit.format import (
    BEST,
    CHECKPOINTS,
    DYNAMICS,
    PERF,
    STEPS,
    part_name,
    schema,
)
from prefkit.optimizers import load_state
from prefkit.processes import ALONE, Team
from prefkit.sharding import share_of, whole
from prefkit.sources import file_sha256
from prefkit.store import folder_beside, read_json, write_json, write_text, written
from prefkit.tables import write_parquet

DYNAMICS_ROWS = 50_000  # pairs seen before they are written as a part: what memory holds of them
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "checkpoint.json"


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    team: Team = ALONE,
    history: Mapping[str, int] | None = None,
) -> None:
    """Write checkpoints/step-<step>/ whole or not at all; every process of the team must call.

    Args:
        run: its directory.
        step: updates made.
        model: what is trained of it is written.
        optimizer: of these weights.
        team: of the processes that train it.
        history: how much has been logged by then, by name; in process 0.
    """
    with team.together():
        weights, state = whole_weights(model, team), _whole_state(model, optimizer, team)
    team.on_main(lambda: _write_checkpoint(run, step, weights, state, history or {}))


def _whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, team: Team) -> dict[str, dict[str, Any]]:
    """What the optimiser knows of each weight, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained_weights(model).items()}
    state: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        state[names[parameter]] = {
            key: _kept(value, team) if isinstance(value, Tensor) else value for key, value in values.items()
        }
    return state


def _write_checkpoint(
    run: Path, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], history: Mapping[str, int]
) -> None:
    with folder_beside(run / CHECKPOINTS / f"step-{step:06d}") as beside:
        save_file(dict(weights), str(beside / WEIGHTS))
        with (beside / OPTIMIZER).open("wb") as file:  # a file of Python's: its OSError is the cause of torch's error
            torch.save({"optimizer": state, "random": _random_states()}, file)
        hashes = {name: file_sha256(beside / name) for name in (WEIGHTS, OPTIMIZER)}
        write_json(beside / STATE, {"step": step, "sha256": hashes, "history": dict(history)})


def whole_weights(model: nn.Module, team: Team = ALONE) -> dict[str, Tensor]:
    """The weights that are trained, whole, in process 0; nothing elsewhere. Every process must ask."""
    kept = {name: _kept(parameter.detach(), team) for name, parameter in trained_weights(model).items()}
    return {name: value.contiguous() for name, value in kept.items()} if team.is_main else {}


def _kept(value: Tensor, team: Team) -> Tensor:
    """A tensor with all shares of it, which only process 0 keeps, and off the device where that has but a share."""
    gathered = whole(value)
    if gathered is value:
        return value
    return gathered.cpu() if team.is_main else gathered.new_empty(0)


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def save_best(run: Path, step: int, model: nn.Module, team: Team = ALONE) -> None:
    """Write best/step-<step>/; every process of the team must call."""
    with team.together():
        weights = whole_weights(model, team)

    def write() -> None:
        with folder_beside(run / BEST / f"step-{step:06d}") as beside:
            save_file(weights, str(beside / WEIGHTS))

    team.on_main(write)


def prune_best(run: Path, keep: int | None) -> None:
    """Remove all of best/ but the one of that step; the folder too where none is kept."""
    for path in (run / BEST).glob("*"):
        if keep is None or path.name != f"step-{keep:06d}":
            shutil.rmtree(path)
    if keep is None:
        shutil.rmtree(run / BEST, ignore_errors=True)


def list_best(run: Path) -> set[int]:
    """The steps whose weights best/ holds."""
    return {_step(path) for path in (run / BEST).glob("step-*") if (path / WEIGHTS).exists()}


def load_best(run: Path, step: int, model: nn.Module, team: Team = ALONE) -> None:
    """Put the weights of best/step-<step>/ into the model; every process of the team must call.

    Raises:
        DatasetError: they are not there, or of another model.
    """
    place = run / BEST / f"step-{step:06d}"
    (weights,) = _read_on_each(team, lambda: (load_file(place / WEIGHTS),), "the best model cannot be read", place)
    with team.together():
        _put(lambda: put_weights(weights, model), place)


def _read_on_each(team: Team, read: Callable[[], tuple[Any, ...]], message: str, place: Path, hint: str = "") -> Any:
    """Read files in every process, each for itself; what one cannot read, all are told."""
    own: list[Any] = []

    def work() -> None:
        try:
            own.append(read())
        except Exception as error:  # whatever safetensors and torch raise, the user needs the folder and a way out
            if is_out_of_memory(error):
                raise
            raise DatasetError(f"{message}: {first_line(error)}", where=str(place), hint=hint) from None

    team.on_each(work)
    return own[0]


def _put(work: Callable[[], None], place: Path) -> None:
    """Put what was read into model or optimiser; one of other settings is no damage."""
    try:
        work()
    except (ValueError, KeyError) as error:
        message = f"is of another model, adapter or optimiser: {first_line(error)}"
        raise DatasetError(
            message, where=str(place), hint="run.json has the settings that the run began with"
        ) from None


def history_of(place: Path) -> dict[str, int]:
    """How much had been logged when a checkpoint was written, by name; empty where it does not say."""
    return dict(read_json(place / STATE).get("history", {}))


def num_seen(run: Path, step: int) -> int:
    """The rows of pair_dynamics before an update."""
    parts = sorted((run / DYNAMICS).glob("part-*.parquet"))
    return sum(pl.read_parquet(p, columns=["step"], glob=False).filter(pl.col("step") < step).height for p in parts)


def put_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Whole weights into a model, of which each process may have but shares.

    Raises:
        ValueError: they are not those that the model trains, by name or by shape.
    """
    own = trained_weights(model)
    if own.keys() != weights.keys():
        apart = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"it is of other weights: {', '.join(apart[:3])}")
    with torch.no_grad():
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name} is of shape {list(weights[name].shape)}, not {list(parameter.shape)}")
            parameter.copy_(share_of(weights[name], parameter))


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


def load_checkpoint(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, team: Team = ALONE) -> int:
    """Put a checkpoint's weights, optimiser state and random state back; every process of the team must call.

    Rates and decay stay those of the optimiser as it was made: they are settings, not state.

    Returns:
        its step.

    Raises:
        DatasetError: the checkpoint cannot be read, or is one of another model or optimiser.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def check() -> None:
        for name, known in read_json(place / STATE).get("sha256", {}).items():
            if file_sha256(place / name) != known:
                message = f"the checkpoint cannot be read: {name} is not as it was written"
                raise DatasetError(message, where=str(place), hint=hint)

    def read() -> tuple[Any, ...]:
        state = torch.load(place / OPTIMIZER, map_location="cpu", weights_only=True)
        return load_file(place / WEIGHTS), state["optimizer"], state["random"], int(read_json(place / STATE)["step"])

    hint = f"delete {place} to go on from the checkpoint before it"
    team.on_main(check)
    step: int
    weights, state, random, step = _read_on_each(team, read, "the checkpoint cannot be read", place, hint)
    with team.together():
        _put(lambda: put_weights(weights, model), place)
        _put(lambda: _put_state(state, model, optimizer), place)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and len(random["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(random["cuda"])
    return step


def _put_state(named: Mapping[str, Mapping[str, Any]], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """State by name into an optimiser, whose own way of loading decides about dtypes and devices."""
    parameters = trained_weights(model)
    numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {}
    for name, values in named.items():
        parameter = parameters[name]
        state[numbers[id(parameter)]] = {
            key: share_of(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
            for key, value in values.items()
        }
    load_state(optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to steps.jsonl or perf.jsonl, for whoever watches the run."""
    with written(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps.jsonl or perf.jsonl at and after `step` (and a torn last one); returns what stays."""
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


def write_rows(run: Path, steps: Sequence[Mapping[str, Any]], perf: Sequence[Mapping[str, Any]]) -> None:
    """Write steps.parquet and perf.parquet: one row a logged step, the columns of the format."""
    for file, table, rows in ((STEPS, "steps", steps), (PERF, "perf", perf)):
        columns = schema(table, "text")
        frame = pl.DataFrame({n: pl.Series(n, [r.get(n) for r in rows], t) for n, t in columns.items()})
        write_parquet(run / file, frame)


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
