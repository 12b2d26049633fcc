"""`prefkit info`: what a dataset or a run holds, as one plain dict and as a few lines for a person."""

from pathlib import Path
from typing import Any

from prefkit.documents import Audit, Reference, Run
from prefkit.errors import DatasetError
from prefkit.format import AUDIT_JSON, MANIFEST, REFERENCE_JSON, REFERENCES, RUN_JSON, RUNS
from prefkit.store import read_document, read_manifest


def dataset_info(target: str | Path) -> dict[str, Any]:
    """What lies in a dataset or run directory.

    Returns:
        a run: its run.json; a dataset: kind, what a repair did, counts, reasons, sources, audit verdict, references,
        runs.

    Raises:
        DatasetError: it is neither.
    """
    path = Path(target)
    if (path / RUN_JSON).exists():
        return {"run": str(path), **read_document(path / RUN_JSON, Run)}
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
        "audit": audit,
        "references": references,
        "runs": runs,
    }


def _reference(recorded: dict[str, Any]) -> dict[str, Any]:
    identity = recorded["identity"]
    rows = sum(part["rows"] for part in recorded["parts"])
    return {
        "key": recorded["key"],
        "pairs": rows,
        "max_length": identity["max_length"],
        "dtype": identity["dtype"],
    }


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
