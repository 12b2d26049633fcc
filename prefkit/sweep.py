"""`prefkit sweep`: runs of several settings over one dataset and one reference pass, and one table of them.

Comes in: a pipeline and values of train settings. Goes out: a run a combination below runs/, and sweeps/<key>/ with
sweep.json (which combination is which run, written as it goes) and table.parquet. A run that was made before with the
same settings, by whatever command, counts; an unfinished one goes on. So a kill costs what train's own costs, and the
same command goes on. Only train settings vary: all else would need another dataset or another reference.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.combinations import Combination, combinations_of
from prefkit.documents import Run, Sweep
from prefkit.errors import CheckError, GateError, InputError, is_out_of_memory
from prefkit.format import RUN_JSON, RUNS, SWEEP_JSON, SWEEP_TABLE, SWEEPS, canonical_json, schema
from prefkit.job import check_settings, prepare_training
from prefkit.locks import locked
from prefkit.papers import mend_papers
from prefkit.preflight import check_ahead
from prefkit.reference import precompute_reference
from prefkit.run import find_run
from prefkit.stages import Outcome, Spectator, evaluate_stage, refuse_several, train_stage
from prefkit.store import list_references, read_document, read_manifest, write_json
from prefkit.tables import write_parquet
from prefkit.target import Target


class Swept(NamedTuple):
    """What `sweep_pipeline` returns."""

    dataset: str
    sweep: str | None  # its directory; None of a dry run without a reference
    reference: str | None  # key of the one reference that all runs share, None before it is there
    settings: list[str]  # what varies, by dotted key
    table: pl.DataFrame  # a row a combination, as the view sweeps has them
    trained: int  # runs that this call made or finished
    failed: int  # combinations without a finished run


def sweep_pipeline(
    target: Target,
    grid: Mapping[str, Any] | Sequence[str],
    *,
    dry_run: bool = False,
    spectator: Spectator | None = None,
) -> Swept:
    """Train a run a combination of values, all on one dataset and one reference, and make one table of them.

    Args:
        target: a pipeline file, a dataset directory or a loaded Pipeline. The dataset must be built; the reference is
            computed once if it is missing. With an evaluate section each run is evaluated.
        grid: values by dotted key, `{"train.beta": [0.05, 0.1], "train.seed": [0, 1]}`, or as the command line takes
            them, `["train.beta=0.05,0.1"]`. All combinations are made, the last key varies fastest. Only train
            settings may have several values; a key with one value is changed in all runs.
        dry_run: check all combinations and say which are done; nothing is written.
        spectator: a `prefkit.stages.Spectator`, told of each stage and of how far it is.

    Returns:
        the sweep's directory, and the table.

    Raises:
        ConfigError: a combination is not sound, by its settings; nothing was begun.
        InputError: nothing varies, or what would need another dataset or reference.
        DatasetError: the dataset is missing or damaged.
        GateError: the reference is not the policy's.
        MachineError: out of disk; the same call goes on.
        Interrupted: somebody asked to stop; likewise.

    Example:
        swept = prefkit.sweep_pipeline("demo/pipeline.yaml", {"train.beta": [0.05, 0.5], "train.max_steps": [2]})
        print(swept.sweep, swept.table.select("beta", "loss", "eval_rewards/accuracies"))
    """
    refuse_several("prefkit sweep")
    spectator = spectator or Spectator()
    combinations = combinations_of(target, grid)
    pipeline = combinations[0].pipeline
    dataset = Path(pipeline.dataset)
    read_manifest(dataset)
    for combination in combinations:
        _checked(combination)
    check_ahead(pipeline, ("evaluate",))
    if dry_run and not list_references(dataset):
        rows = [_row(one, "to do", None, None, None) for one in combinations]
        return Swept(str(dataset), None, None, [*combinations[0].settings], _frame(rows), 0, len(rows))
    if not dry_run:
        with spectator.follow("precompute") as (tell, watch, stop):
            made = precompute_reference(pipeline, tell=tell, watch=watch, stop=stop)
        said = f"{made.pairs} pairs under reference {made.key}"
        why = f"{made.scored} pairs were not scored yet" if made.scored else ""
        spectator.show(Outcome("precompute", not made.scored, why, said, made, {}))
    claims = _claims(combinations)
    folder = dataset / SWEEPS / _key(claims)
    if dry_run:
        return _foreseen(dataset, folder, combinations, claims)
    with locked(folder):
        return _Sweeping(dataset, folder, combinations, claims, spectator).go()


# what is asked for


def _checked(combination: Combination) -> None:
    """Refuse what no dataset and no model could make sound, by the combination's settings."""
    try:
        check_settings(combination.pipeline)
    except InputError as error:
        error.message = f"combination {combination.number} ({combination.name}): {error.message}"
        raise


def _claims(combinations: Sequence[Combination]) -> list[dict[str, Any]]:
    """What the run of each combination must agree in; weights are hashed and tables read once a policy."""
    known: dict[str | None, dict[str, Any]] = {}
    claims = []
    for one in combinations:
        settings = one.pipeline.train
        model = settings.model
        if model not in known:
            known[model] = prepare_training(one.pipeline).claim
        claims.append(known[model] | {"train": settings.model_dump(mode="json")})
    return claims


def _key(claims: Sequence[Mapping[str, Any]]) -> str:
    """What a sweep is: its runs, in their order."""
    runs = [{name: value for name, value in claim.items() if name != "model"} for claim in claims]
    return hashlib.sha256(canonical_json(runs).encode()).hexdigest()[:16]


def _foreseen(
    dataset: Path, folder: Path, combinations: Sequence[Combination], claims: Sequence[Mapping[str, Any]]
) -> Swept:
    """What a sweep would find done, from what lies there."""
    rows = []
    for one, claim in zip(combinations, claims, strict=True):
        done, begun = (find_run(dataset, claim, finished=finished) for finished in (True, False))
        state = "done" if done else "unfinished" if begun else "to do"
        rows.append(_row(one, state, done or begun, None, None))
    left = sum(row["state"] != "done" for row in rows)
    settings, reference = [*combinations[0].settings], claims[0]["reference"]
    return Swept(str(dataset), str(folder), reference, settings, _frame(rows), 0, left)


# what is done


class _Sweeping:
    """A sweep at work: its combinations, and what has become of them so far."""

    def __init__(
        self,
        dataset: Path,
        folder: Path,
        combinations: Sequence[Combination],
        claims: Sequence[Mapping[str, Any]],
        spectator: Spectator,
    ) -> None:
        self.dataset, self.folder, self.spectator = dataset, folder, spectator
        self.combinations, self.claims = combinations, claims
        self.entries: list[dict[str, Any]] = [
            {"settings": one.settings, "state": "to do", "run": None, "reason": None} for one in combinations
        ]
        self.trained = 0
        self.evaluated: list[Any] = [None] * len(combinations)

    def go(self) -> Swept:
        """One combination after the other; one that fails is noted, and the rest goes on."""
        self._recall()
        for place, one in enumerate(self.combinations):
            self.spectator.tell(f"{one.number} of {len(self.combinations)}: {one.name}")
            self._do(place, one)
            self._write(finished=False)
        rows = [
            _row(one, entry["state"], self._run_of(entry), self.evaluated[place], entry["reason"])
            for place, (one, entry) in enumerate(zip(self.combinations, self.entries, strict=True))
        ]
        table = _frame(rows)
        path = self.folder / SWEEP_TABLE
        if not path.exists() or not pl.read_parquet(path, glob=False).equals(table):
            write_parquet(path, table)
        self._write(finished=True)
        mend_papers(self.dataset)
        failed = sum(entry["state"] == "failed" for entry in self.entries)
        settings, reference = [*self.combinations[0].settings], self.claims[0]["reference"]
        return Swept(str(self.dataset), str(self.folder), reference, settings, table, self.trained, failed)

    def _recall(self) -> None:
        """Take up what an earlier call has noted; each entry is found again by its own run anyway."""
        path = self.folder / SWEEP_JSON
        if path.exists():
            self.entries = read_document(path, Sweep)["combinations"]

    def _run_of(self, entry: Mapping[str, Any]) -> Path | None:
        return None if entry["run"] is None else self.dataset / RUNS / entry["run"]

    def _do(self, place: int, one: Combination) -> None:
        try:
            trained = train_stage(one.pipeline, self.spectator, self.claims[place])
            self.spectator.show(trained)
            self.trained += not trained.done
            run = trained.facts["run"]
            if one.pipeline.evaluate is not None:
                evaluated = evaluate_stage(one.pipeline, run, self.spectator)
                self.spectator.show(evaluated)
                self.evaluated[place] = evaluated.result
            self.entries[place] |= {"state": "done", "run": Path(run).name, "reason": None}
        except GateError:  # of all combinations, not of this one
            raise
        except Exception as error:
            if not (isinstance(error, (CheckError, InputError)) or is_out_of_memory(error)):
                raise
            reason = str(getattr(error, "message", "") or "out of memory")
            self.spectator.tell(f"combination {one.number} failed: {reason}")
            begun = find_run(self.dataset, self.claims[place], finished=False)
            self.entries[place] |= {"state": "failed", "run": begun and begun.name, "reason": reason}

    def _write(self, *, finished: bool) -> None:
        grid: dict[str, list[Any]] = {}
        for one in self.combinations:
            for key, value in one.settings.items():
                listed = grid.setdefault(key, [])
                listed += [] if value in listed else [value]
        document = {
            "key": self.folder.name,
            "reference": self.claims[0]["reference"],
            "data_sha256": self.claims[0]["data_sha256"],
            "grid": [{"setting": key, "values": values} for key, values in grid.items()],
            "combinations": self.entries,
            "finished": finished,
            "prefkit_version": __version__,
        }
        path = self.folder / SWEEP_JSON
        there = read_document(path, Sweep) if path.exists() else {}
        if there != document and (finished or {**there, "finished": False} != document):
            write_json(path, document)


def _row(one: Combination, state: str, run: Path | None, evaluated: Any, reason: str | None) -> dict[str, Any]:
    """One row of the table."""
    train = one.pipeline.train
    row: dict[str, Any] = {
        "number": one.number,
        "settings": json.dumps(one.settings, ensure_ascii=False),
        "state": state,
        "run": run and run.name,
        "loss_type": train.loss,
        "beta": train.beta,
        "learning_rate": train.learning_rate,
        "seed": train.seed,
        "reason": reason,
    }
    if run is not None and state == "done":
        recorded = read_document(run / RUN_JSON, Run)
        row |= {"steps": recorded.get("steps"), "loss": recorded.get("loss")}
        tested = recorded.get("eval") or {}
        row |= {f"eval_{name}": tested.get(name) for name in ("loss", "rewards/accuracies", "rewards/margins")}
    return row | _measured(evaluated)


def _measured(evaluated: Any) -> dict[str, Any]:
    """What an evaluation says, in a row: at its first temperature, by its first scorer."""
    if evaluated is None:
        return {}
    summary: pl.DataFrame = evaluated.summary
    temperature = evaluated.document["settings"]["temperatures"][0]
    scored = summary.filter((pl.col("metric") == "reward") & (pl.col("temperature") == temperature))
    scorer = next(iter(scored["scorer"]), None)

    def of(role: str, metric: str, *, at: float = temperature, by: str | None = None) -> tuple[Any, Any, Any]:
        same = pl.col("scorer").eq_missing(pl.lit(by, pl.String)) & (pl.col("temperature") == at)
        found = summary.filter(same & (pl.col("role") == role) & (pl.col("metric") == metric))
        return next(found.select("value", "low", "high").iter_rows(), (None, None, None))

    gain, low, high = of("difference", "reward", by=scorer)
    kl, kl_low, kl_high = of("policy", "kl_exact", at=1.0)
    return {
        "temperature": temperature,
        "scorer": scorer,
        "reward": of("policy", "reward", by=scorer)[0],
        "reward_gain": gain,
        "reward_gain_low": low,
        "reward_gain_high": high,
        "kl": kl,
        "kl_low": kl_low,
        "kl_high": kl_high,
        "win_rate": of("policy", "win_rate", by=scorer)[0],
    }


def _frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    columns = schema("sweeps", "text")
    return pl.DataFrame(
        {name: pl.Series(name, [row.get(name) for row in rows], dtype) for name, dtype in columns.items()}
    )
