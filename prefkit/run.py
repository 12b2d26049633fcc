"""The run directory: who may use it, what it says of itself before the first step and after the last.

    runs/<n>/   run.json, steps.parquet, perf.parquet (live: .jsonl), pair_dynamics/, checkpoints/, best/, trackers/,
                model/

A run goes on only with the settings, the reference and the very pairs it was started with.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
from filelock import FileLock

from prefkit import __version__
from prefkit.checkpoint import list_checkpoints, prune_best, prune_checkpoints
from prefkit.config import TrainConfig
from prefkit.documents import Audit, Run
from prefkit.errors import DatasetError, PrefkitError
from prefkit.format import AUDIT_JSON, LOCK, MODEL, REFERENCES, RUN_JSON, RUNS, STEPS_LIVE, canonical_json, differing
from prefkit.gate import GateFigures
from prefkit.locks import give_lock, leave_no_empty_directory, locked, take_lock
from prefkit.lora import save_adapter, save_merged
from prefkit.models import quiet_transformers
from prefkit.store import folder_beside, read_document, write_json, write_text, written
from prefkit.work import TEMPLATE_FILE

LOOK_AGAIN = 0.2  # seconds between two looks at a run that another process is beginning
HISTORY = "history"  # the name of a warning: something is gone of what was logged
FIXED = (
    "reference:",
    "policy_sha256:",
    "train.optimizer",
    "train.other_reference:",
    "train.lora",
)  # a run never changes these


class Trained(NamedTuple):
    """What `train_dpo` returns."""

    run: str  # its directory
    steps: int  # updates made
    loss: float  # of the last logged step
    eval: dict[str, float] | None  # the final model on the test split, None if there is no test split
    first_loss: float  # of step 0, before any update
    best: dict[str, Any] | None = None  # of train.best_metric: metric, value, step
    stopped_early: bool = False  # by train.early_stopping_patience


class End(NamedTuple):
    """How a loop ended: updates made, first and last logged loss, and the eval_ metrics of the final model."""

    steps: int
    first_loss: float
    loss: float
    evaluated: Mapping[str, float]
    best: dict[str, Any] | None
    stopped_early: bool


class Final(NamedTuple):
    """The trained model, whole, and how it is to be saved; `base`: the folder that an adapter belongs to."""

    model: Any
    saved: Literal["model", "adapter", "merged"]
    base: str


def data_sha256(rows: pl.DataFrame) -> str:
    """Sha256 hex over pair_id, split and weight of all rows, in their order."""
    listed = [rows[name].to_list() for name in ("pair_id", "split", "weight")]
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()


@contextlib.contextmanager
def claimed_run(
    dataset: Path, out: str | None, settings: Mapping[str, Any], *, go_on: bool = False, beside: bool = False
) -> Iterator[tuple[Path, list[str]]]:
    """The run directory, locked while the block runs: a new one, or an unfinished one of the same settings.

    Args:
        dataset: whose runs/ it lies in where `out` is None.
        out: the directory, or None for the newest unfinished run that nobody is at work on, or the next free number.
        settings: what a run that is gone on with must agree in.
        go_on: other train settings and other pairs are wanted; reference, policy and optimiser never change.
        beside: an unfinished run of other settings is left alone, and a new one begins beside it. One of these very
            settings that somebody is at work on is refused, so that nothing is trained twice; one that is just being
            begun is waited for until it says what it is.

    Returns:
        the directory, and the settings that are not those it was started with (empty without `go_on`).

    Raises:
        DatasetError: the run is finished, is being written, or was started with other settings, named one by one; or
            `go_on` finds none. A directory that was made for nothing is removed.
    """
    with contextlib.ExitStack() as held:
        run = _unfinished_run(dataset, settings, held, beside=beside) if out is None else Path(out)
        existed = run is not None and run.exists()
        if out is not None:
            _refuse_foreign(Path(out))
            held.enter_context(locked(Path(out)))
            _refuse_foreign(Path(out))  # it may have been finished just now
        changed: list[str] = []
        if run is None or not (run / RUN_JSON).exists():
            if go_on:
                _leave(held, run if not existed else None)
                raise DatasetError("no unfinished run to go on with", where=str(run or dataset / RUNS))
        else:
            changed = _changed(run, dataset, out, settings, go_on=go_on)
            if changed and not go_on:  # nothing would be lost
                run = None
        run = run or _new_run(dataset, held)
        try:
            yield run, changed if go_on else []
        except PrefkitError:
            if not existed:
                _leave(held, run)
            raise


def _leave(held: contextlib.ExitStack, run: Path | None) -> None:
    held.close()
    if run is not None:
        leave_no_empty_directory(run)


def _changed(run: Path, dataset: Path, out: str | None, settings: Mapping[str, Any], *, go_on: bool) -> list[str]:
    """The settings that an unfinished run was not started with, if it may be gone on with or left behind."""
    apart = _apart(run, settings)
    if apart and out is None and not go_on and not list_checkpoints(run):
        return apart
    fixed = [line for line in apart if line.startswith(FIXED)]
    if fixed or (apart and not go_on):
        elsewhere = f"--out {_next_run(dataset) if out is None else 'RUN'} starts another run"
        what = "is unfinished and was started with other settings"
        if fixed:
            what += ", which a run never changes"
        raise DatasetError(
            f"{what} (then and now): " + "; ".join(fixed or apart),
            where=str(run),
            hint=elsewhere if fixed else f"--go-on goes on with it under the new settings; {elsewhere}",
        )
    return apart


def _refuse_foreign(run: Path) -> None:
    if not run.is_dir():
        return
    if not (run / RUN_JSON).exists() and any(path.name not in (LOCK, f".{RUN_JSON}.tmp") for path in run.iterdir()):
        if (run / STEPS_LIVE).exists():
            message = f"is a run without its {RUN_JSON}, which says what it was started with"
            raise DatasetError(message, where=str(run), hint="choose another --out")
        raise DatasetError("holds something that is no run", where=str(run), hint="choose another --out")
    if not _unfinished(run):
        raise DatasetError("is a finished run", where=str(run), hint="choose another --out")


def _numbered(dataset: Path) -> list[int]:
    return sorted(int(path.name) for path in (dataset / RUNS).glob("*") if path.name.isdigit())


def _next_run(dataset: Path) -> Path:
    return dataset / RUNS / str(max(_numbered(dataset), default=0) + 1)


def _unfinished_run(
    dataset: Path, settings: Mapping[str, Any], held: contextlib.ExitStack, *, beside: bool
) -> Path | None:
    """The newest run that is unfinished and that nobody is at work on, of these settings if there is one; locked."""
    free = [run for number in reversed(_numbered(dataset)) if _is_free(run := dataset / RUNS / str(number))]
    same = [run for run in free if not (run / RUN_JSON).exists() or not _apart(run, settings)]
    if beside:
        free, same = [], [run for run in same if not (run / RUN_JSON).exists() or not _was_changed(run)]
    for run in [*same, *free]:
        if (lock := _taken_or_told(run) if beside else take_lock(run)) is not None:
            held.callback(give_lock, run, lock)
            if _is_free(run):  # it may have been finished just now
                return run
        elif beside and not _apart(run, settings):
            holder = (run / LOCK).read_text(encoding="utf-8").strip() or "unknown"
            message = f"is a run of these very settings that another prefkit is at work on ({holder})"
            raise DatasetError(message, where=str(run), hint="wait for it to end; the same command then goes on")
    return None


def _taken_or_told(run: Path) -> FileLock | None:
    """The lock of a run; None once whoever holds it has said of which settings it is."""
    while (lock := take_lock(run)) is None and not (run / RUN_JSON).exists():
        time.sleep(LOOK_AGAIN)
    return lock


def find_run(dataset: Path, settings: Mapping[str, Any], *, finished: bool) -> Path | None:
    """The first run below runs/ that was made with these very settings from its first step to its last.

    Args:
        dataset: whose runs/ it lies in.
        settings: as in `claimed_run`; all of them must agree.
        finished: a finished one; otherwise one that can be gone on with.
    """
    for number in _numbered(dataset):
        run = dataset / RUNS / str(number)
        with contextlib.suppress(DatasetError):  # a damaged one is of no settings
            recorded = read_document(run / RUN_JSON, Run)
            if recorded["finished"] == finished and not _apart(run, settings) and not _was_changed(run):
                return run
    return None


def why_no_run(dataset: Path, settings: Mapping[str, Any]) -> str:
    """What keeps the newest finished run from being the one of these settings, in a few words."""
    for number in reversed(_numbered(dataset)):
        run = dataset / RUNS / str(number)
        with contextlib.suppress(DatasetError):
            if not read_document(run / RUN_JSON, Run)["finished"]:
                continue
            apart = [line.partition(":")[0] for line in _apart(run, settings)]
            of_data = {"data_sha256": "the pairs", "policy_sha256": "the policy", "reference": "the reference"}
            named = [of_data.get(name, name) for name in apart]
            return f"{', '.join(named)} changed since {run}" if named else f"{run} was changed on its way"
    return "there was none"


def _was_changed(run: Path) -> bool:
    """Whether settings of a run were changed on its way, by --go-on; another layout on another machine is none."""
    changes = read_document(run / RUN_JSON, Run).get("changes", [])
    return any(not line.startswith("layout:") for change in changes for line in change["settings"])


def _is_free(run: Path) -> bool:
    """Whether a run is unfinished; a damaged one is nobody's to go on with."""
    try:
        return _unfinished(run)
    except DatasetError:
        return False


def _new_run(dataset: Path, held: contextlib.ExitStack) -> Path:
    """The next free number, made and locked: trainings that start at once get one each."""
    while True:
        run = _next_run(dataset)
        with written(run):
            run.parent.mkdir(parents=True, exist_ok=True)
            try:
                run.mkdir()
            except FileExistsError:
                continue
        if (lock := take_lock(run)) is not None:
            held.callback(give_lock, run, lock)
            return run


def _unfinished(run: Path) -> bool:
    return not (run / RUN_JSON).exists() or not read_document(run / RUN_JSON, Run)["finished"]


def _apart(run: Path, settings: Mapping[str, Any]) -> list[str]:
    recorded = read_document(run / RUN_JSON, Run)
    compared = {name: value for name, value in settings.items() if name != "model"}  # a path; policy_sha256 decides
    return differing({name: recorded.get(name) for name in compared}, compared)


def micro_batch_tokens(run: Path, settings: TrainConfig, usual: int | None) -> int | None:
    """The tokens of a micro-batch at most: as set; else as the run began with, wherever that was; else `usual`.

    Args:
        run: its directory.
        settings: of this call.
        usual: on this device, None for no limit.
    """
    if settings.max_batch_tokens is not None:
        return settings.max_batch_tokens
    there = read_document(run / RUN_JSON, Run) if (run / RUN_JSON).exists() else None
    began = there is not None and there["train"].get("max_batch_tokens") is None
    return there.get("micro_batch_tokens") if there is not None and began else usual


def begin_run(
    run: Path,
    dataset: Path,
    num_pairs: int,
    settings: Mapping[str, Any],
    figures: GateFigures | None,
    start: int = 0,
    changed: Sequence[str] = (),
) -> None:
    """Say what the run is before its first step; on resume (no figures) the gate's figures of the start stay.

    Args:
        run: its directory.
        dataset: as the user named it.
        num_pairs: of the dataset.
        settings: reference, model, train, policy_sha256 and data_sha256: what a resumed run must agree in; and
            micro_batch_tokens, which it takes over, and layout.
        figures: of the gate's scoring.
        start: the step it goes on from.
        changed: settings that are others since that step.
    """
    there = read_document(run / RUN_JSON, Run) if (run / RUN_JSON).exists() else {}
    changes = there.get("changes", []) if start else []
    # what the log says once more is said again; what is gone of it is known from here alone
    warnings = [told for told in there.get("warnings", []) if told["name"] == HISTORY] if start else []
    if start and there.get("layout") not in (None, settings["layout"]):
        changed = [*changed, f"layout: {there['layout']} and {settings['layout']}"]
    if changed and start:
        changes = [*changes, {"step": start, "settings": list(changed)}]
    write_json(
        run / RUN_JSON,
        {
            "dataset": str(dataset),
            "pairs": num_pairs,
            **settings,
            "gate": there["gate"] if figures is None else figures._asdict(),
            "prefkit_version": __version__,
            "changes": changes,
            "warnings": warnings,
            "finished": False,
        },
    )


def finish_run(
    run: Path, dataset: Path, manifest: Mapping[str, Any], tokenizer: Any, final: Final, end: End
) -> Trained:
    """Save the final model in the Hugging Face layout and mark the run finished."""
    recorded = read_document(run / RUN_JSON, Run)
    template = dataset / REFERENCES / recorded["reference"] / TEMPLATE_FILE
    if template.exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    evaluated = {name.removeprefix("eval_"): value for name, value in end.evaluated.items()} or None
    with folder_beside(run / MODEL) as beside, quiet_transformers():
        save_final(final, beside)
        tokenizer.save_pretrained(beside)
        write_text(beside / "README.md", model_card(recorded, dataset, manifest, end, evaluated, final))
    train = recorded["train"]
    prune_checkpoints(run, train["save_steps"], train["save_total_limit"], finished=True)  # now the model is safe
    prune_best(run, None)
    summary = {
        "saved": final.saved,
        "steps": end.steps,
        "loss": end.loss,
        "eval": evaluated,
        "best": end.best,
        "stopped_early": end.stopped_early,
        "finished": True,
    }
    write_json(run / RUN_JSON, recorded | summary)
    return Trained(str(run), end.steps, end.loss, evaluated, end.first_loss, end.best, end.stopped_early)


def save_final(final: Final, folder: Path) -> None:
    """A whole model in the Hugging Face layout, or an adapter in peft's."""
    if final.saved == "adapter":
        save_adapter(final.model, folder, final.base)
    elif final.saved == "merged":
        save_merged(final.model, folder)
    else:
        final.model.save_pretrained(folder)


def model_card(
    recorded: Mapping[str, Any],
    dataset: Path,
    manifest: Mapping[str, Any],
    end: End,
    evaluated: Mapping[str, float] | None,
    final: Final,
) -> str:
    """The README.md beside the final model: data, audit verdict, reference and result."""
    library = "library_name: transformers\n"
    if final.saved == "adapter":
        library = f"base_model: {json.dumps(final.base)}\nlibrary_name: peft\n"
    audit = read_document(dataset / AUDIT_JSON, Audit)["verdict"] if (dataset / AUDIT_JSON).exists() else "not audited"
    accuracy = f"{evaluated['rewards/accuracies']:.3f}" if evaluated else "no test split"
    settings = recorded["train"]
    return (
        f"---\n{library}tags: [dpo, prefkit]\n---\n\n"
        "# A policy trained with DPO by prefkit\n\n"
        f"| | |\n|---|---|\n| started from | {recorded['model']} |\n"
        f"| pairs | {manifest['counts']['train']} train, {manifest['counts']['test']} test |\n"
        f"| audit verdict of the pairs | {audit} |\n| reference | {recorded['reference']} |\n"
        f"| loss, beta | {settings['loss']}, {settings['beta']} |\n| updates | {end.steps} |\n"
        f"| accuracy of the reward margin on the test split | {accuracy} |\n"
    )
