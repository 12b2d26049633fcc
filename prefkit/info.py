"""`prefkit info`: what a dataset or a run holds, as one plain dict and as a few lines for a person."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from prefkit.curves import CURVES, PERF_CURVES, Curves, ends, is_run, points, progress, read_curves
from prefkit.documents import Audit, Reference, Run, Sweep
from prefkit.errors import DatasetError, InputError
from prefkit.evaluation_tables import evaluation_lines
from prefkit.format import AUDIT_JSON, MANIFEST, REFERENCE_JSON, REFERENCES, RUN_JSON, RUNS, SWEEP_JSON, SWEEPS
from prefkit.sample_format import SAMPLER_JSON
from prefkit.store import read_document, read_manifest
from prefkit.verification import verify_dataset


def dataset_info(target: str | Path, *more: str | Path, verify: bool = False) -> dict[str, Any]:
    """What lies in a dataset or run directory, or in several runs.

    Args:
        target: a dataset directory, or a run's.
        more: further run directories.
        verify: read all of a dataset and compare it with the recorded hashes; see `verify_dataset`.

    Returns:
        a run: its run.json, how far it is, of each curve the first and last value, the smallest and largest, and the
        last one of the test split, and its evaluations; several: these under `runs`; a dataset: kind, what a repair
        did, additions, near-duplicates, counts, reasons, sources, audit verdict, references, runs, sweeps; with
        `verify` what was verified.

    Raises:
        DatasetError: it is neither, or damaged.
        InputError: several, and one of them is no run; or a run is to be verified.

    Example:
        print(prefkit.dataset_info("demo/dataset")["counts"]["pairs"])
        print(prefkit.dataset_info("demo/dataset/runs/1")["curves"]["loss"]["last"])
    """
    path = Path(target)
    if verify and (more or is_run(path)):
        raise InputError("--verify is for a dataset: a run holds no hashes", where=str(path))
    if more:
        return {"runs": [_run_info(run) for run in read_runs([target, *more])]}
    if is_run(path):
        return _run_info(read_curves(path))
    if (path / SAMPLER_JSON).exists() and not (path / MANIFEST).exists():
        raise DatasetError(
            "holds samples of a model, and is neither a dataset nor a run",
            where=str(path),
            expected=f"a directory with {MANIFEST} or {RUN_JSON}",
            hint=f"prefkit score {quote(str(path))} --scorer SPEC, or name it as a source of a pipeline",
        )
    if not path.is_dir() or (not (path / MANIFEST).exists() and not (path / ".lock").exists()):
        raise DatasetError(
            "neither a dataset nor a run",
            where=str(path),
            expected=f"a directory with {MANIFEST} or {RUN_JSON}",
        )
    manifest = read_manifest(path)
    references = [
        _reference(read_document(found, Reference)) for found in sorted((path / REFERENCES).glob(f"*/{REFERENCE_JSON}"))
    ]
    runs = [_run(found) for found in sorted((path / RUNS).glob(f"*/{RUN_JSON}"))]
    audit = read_document(path / AUDIT_JSON, Audit)["verdict"] if (path / AUDIT_JSON).exists() else None
    return {
        "dataset": str(path),
        "kind": manifest["kind"],
        **({"repair": manifest["repair"]} if manifest.get("repair") else {}),
        "counts": manifest["counts"],
        "reasons": manifest["reasons"],
        "sources": manifest["sources"],
        **({"additions": manifest["additions"]} if manifest["additions"] else {}),
        **_near_duplicates(manifest["report"]),
        "audit": audit,
        "references": references,
        "runs": runs,
        **({"sweeps": sweeps} if (sweeps := _sweeps(path)) else {}),
        **({"verified": verify_dataset(path)._asdict()} if verify else {}),
    }


def read_runs(targets: Sequence[str | Path]) -> list[Curves]:
    """The runs of several directories as they are now, wherever they lie.

    Args:
        targets: run directories, finished or not.

    Returns:
        run.json and the rows of steps and perf of each, in the order of the targets, each run once.

    Raises:
        DatasetError: one is damaged.
        InputError: one is no run.

    Example:
        for run in prefkit.read_runs(["demo/dataset/runs/1"]):
            print(run.path, run.document["train"]["beta"], run.steps["loss"].min())
    """
    once: dict[Path, str | Path] = {}
    for target in targets:
        if not is_run(target):
            hint = f"prefkit info {quote(str(target))} alone says what a dataset holds"
            raise InputError("is no run", where=str(target), expected=f"a directory with {RUN_JSON}", hint=hint)
        once.setdefault(Path(target).resolve(), target)
    return [read_curves(target) for target in once.values()]


def _run_info(run: Curves) -> dict[str, Any]:
    curves: dict[str, dict[str, float | None]] = {}
    for name in (*CURVES, *PERF_CURVES):
        if (found := ends(points(run, name))) is not None:
            tested = ends(points(run, f"eval_{name}")) if f"eval_{name}" in run.steps.columns else None
            curves[name] = {**found._asdict(), "eval": tested.last if tested else None}
    return {"run": str(Path(run.path)), **run.document, "progress": progress(run)._asdict(), "curves": curves} | (
        {"evaluations": evaluated} if (evaluated := evaluation_lines(run.path)) else {}
    )


def _near_duplicates(report: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What deduplication says of prompts that are nearly the same, if the build recorded any of it."""
    told = [section["prompts"] for section in report if section.get("prompts")]  # empty without any pair
    return {"near_duplicates": told[0]} if told else {}


def _reference(recorded: dict[str, Any]) -> dict[str, Any]:
    identity = recorded["identity"]
    rows = sum(part["rows"] for part in recorded["parts"])
    return {
        "key": recorded["key"],
        "pairs": rows,
        "max_length": identity["max_length"],
        "dtype": identity["dtype"],
    }


def _sweeps(dataset: Path) -> list[dict[str, Any]]:
    """A line a sweep: what varies, and how many combinations are done; a damaged one says so."""
    found: list[dict[str, Any]] = []
    for path in sorted((dataset / SWEEPS).glob(f"*/{SWEEP_JSON}")):
        try:
            told = read_document(path, Sweep)
        except DatasetError as error:
            found.append({"sweep": path.parent.name, "damaged": error.message})
            continue
        states = [one["state"] for one in told["combinations"]]
        values = {one["setting"]: one["values"] for one in told["grid"]}
        counts = {"combinations": len(states), "done": states.count("done"), "failed": states.count("failed")}
        found.append({"sweep": path.parent.name, **values, **counts})
    return found


def _run(path: Path) -> dict[str, Any]:
    """One line of a run; a damaged run.json says so, and hides no other run."""
    try:
        recorded = read_document(path, Run)
    except DatasetError as error:
        return {"run": path.parent.name, "damaged": error.message}
    evaluated = recorded.get("eval") or {}
    return {
        "run": path.parent.name,
        "finished": recorded["finished"],
        "steps": recorded.get("steps"),
        "loss": recorded.get("loss"),
        "test_accuracy": evaluated.get("rewards/accuracies"),
    }
