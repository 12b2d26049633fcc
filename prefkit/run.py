"""The run directory: who may use it, what it says of itself before the first step and after the last.

    runs/<n>/   run.json, steps.parquet, steps.jsonl (live), pair_dynamics/, checkpoints/, model/

A run goes on only with the settings, the reference and the very pairs it was started with.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.documents import Audit, Run
from prefkit.errors import DatasetError
from prefkit.format import AUDIT_JSON, LOCK, MODEL, REFERENCES, RUN_JSON, RUNS, canonical_json
from prefkit.gate import GateFigures
from prefkit.identity import differing
from prefkit.models import quiet_transformers
from prefkit.reference import TEMPLATE_FILE
from prefkit.store import read_document, write_json, write_text


class Trained(NamedTuple):
    """What `train_dpo` returns. `eval`: the test split after the last update, None if there is no test split."""

    run: str
    steps: int
    loss: float
    eval: dict[str, float] | None
    first_loss: float


def data_sha256(rows: pl.DataFrame) -> str:
    """Sha256 hex over pair_id, split and weight of all rows, in their order."""
    listed = [rows[name].to_list() for name in ("pair_id", "split", "weight")]
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()


def claim_run(dataset: Path, out: str | None, settings: Mapping[str, Any]) -> Path:
    """The run directory: a new one, or an unfinished one of the same settings.

    Raises:
        DatasetError: `out` is finished, or was started with other settings, named one by one.
    """
    if out is None:
        numbered = sorted(int(path.name) for path in (dataset / RUNS).glob("*") if path.name.isdigit())
        newest = dataset / RUNS / str(numbered[-1]) if numbered else None
        if newest is not None and _unfinished(newest) and not _apart(newest, settings):
            return newest
        return dataset / RUNS / str(numbered[-1] + 1 if numbered else 1)
    run = Path(out)
    if run.exists() and not (run / RUN_JSON).exists() and any(p.name != LOCK for p in run.iterdir()):
        raise DatasetError("holds something that is no run", where=str(run), hint="choose another --out")
    if (run / RUN_JSON).exists():
        if not _unfinished(run):
            raise DatasetError("is a finished run", where=str(run), hint="choose another --out")
        if apart := _apart(run, settings):
            raise DatasetError(
                "was started with other settings: " + "; ".join(apart),
                where=str(run),
                hint="choose another --out",
            )
    return run


def _unfinished(run: Path) -> bool:
    return not (run / RUN_JSON).exists() or not read_document(run / RUN_JSON, Run)["finished"]


def _apart(run: Path, settings: Mapping[str, Any]) -> list[str]:
    if not (run / RUN_JSON).exists():
        return []
    recorded = read_document(run / RUN_JSON, Run)
    return differing({name: recorded.get(name) for name in settings}, settings)


def begin_run(
    run: Path, dataset: Path, num_pairs: int, settings: Mapping[str, Any], figures: GateFigures | None
) -> None:
    """Say what the run is before its first step; on resume (no figures) the gate's figures of the start stay.

    Args:
        run: its directory.
        dataset: as the user named it.
        num_pairs: of the dataset.
        settings: reference, model, train and data_sha256: what a resumed run must agree in.
        figures: of the gate's scoring.
    """
    gate = read_document(run / RUN_JSON, Run)["gate"] if figures is None else figures._asdict()
    write_json(
        run / RUN_JSON,
        {
            "dataset": str(dataset),
            "pairs": num_pairs,
            **settings,
            "gate": gate,
            "prefkit_version": __version__,
            "finished": False,
        },
    )


def finish_run(
    run: Path,
    dataset: Path,
    manifest: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    key: str,
) -> Trained:
    """Save the final model in the Hugging Face layout and mark the run finished."""
    template = dataset / REFERENCES / key / TEMPLATE_FILE
    if template.exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    with quiet_transformers():
        model.save_pretrained(run / MODEL)
    tokenizer.save_pretrained(run / MODEL)
    evaluated = {
        name.removeprefix("eval_"): value for name, value in rows[-1].items() if name.startswith("eval_")
    } or None
    recorded = read_document(run / RUN_JSON, Run)
    write_text(run / MODEL / "README.md", model_card(recorded, dataset, manifest, rows, evaluated))
    summary = {"steps": rows[-1]["step"], "loss": rows[-2]["loss"], "eval": evaluated, "finished": True}
    write_json(run / RUN_JSON, recorded | summary)
    return Trained(str(run), rows[-1]["step"], rows[-2]["loss"], evaluated, rows[0]["loss"])


def model_card(
    recorded: Mapping[str, Any],
    dataset: Path,
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluated: Mapping[str, float] | None,
) -> str:
    """The README.md beside the final model: data, audit verdict, reference and result."""
    audit = read_document(dataset / AUDIT_JSON, Audit)["verdict"] if (dataset / AUDIT_JSON).exists() else "not audited"
    accuracy = f"{evaluated['rewards/accuracies']:.3f}" if evaluated else "no test split"
    settings = recorded["train"]
    return (
        "---\nlibrary_name: transformers\ntags: [dpo, prefkit]\n---\n\n"
        "# A policy trained with DPO by prefkit\n\n"
        f"| | |\n|---|---|\n| started from | {recorded['model']} |\n"
        f"| pairs | {manifest['counts']['train']} train, {manifest['counts']['test']} test |\n"
        f"| audit verdict of the pairs | {audit} |\n| reference | {recorded['reference']} |\n"
        f"| loss, beta | {settings['loss']}, {settings['beta']} |\n| updates | {rows[-1]['step']} |\n"
        f"| accuracy of the reward margin on the test split | {accuracy} |\n"
    )
