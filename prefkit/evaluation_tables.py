"""An evaluation as it lies on disk, beside its run: where, and how it is read.

    RUN/evaluations/<key>/     evaluation.json   written last: what was evaluated, with which settings, the findings
                               summary.parquet   a row a model, temperature, scorer and metric
                               prompts.parquet   a row a prompt, temperature and scorer
                               kl.parquet, texts.parquet, verdicts-*.parquet: what took a model's time, as it is done

`key`: the first 16 hex digits of sha256 over the JSON of `identity` in evaluation.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.documents import Evaluation
from prefkit.errors import DatasetError
from prefkit.format import EVALUATION_JSON, EVALUATION_PROMPTS, EVALUATION_SUMMARY, EVALUATIONS
from prefkit.store import read_document
from prefkit.tables import check_parts, write_parquet

AGAIN = "prefkit evaluate makes it again once its folder is deleted"


class EvaluationTables(NamedTuple):
    """A finished evaluation."""

    folder: Path
    document: dict[str, Any]  # evaluation.json
    summary: pl.DataFrame
    prompts: pl.DataFrame


def kept(path: Path, rows: pl.DataFrame, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """A table that takes a model's time: read where the file is of these very rows, else made and written.

    Args:
        path: of the file, whose name says what else decides it.
        rows: the columns that tell the table's rows apart, in their order.
        make: called for the table; it has the columns of `rows`, and more.
    """
    if path.exists():
        try:
            found = pl.read_parquet(path, glob=False)
        except (pl.exceptions.PolarsError, OSError):
            found = pl.DataFrame()
        if set(rows.columns) <= set(found.columns) and found.select(rows.columns).equals(rows):
            return found
    made = make()
    assert made.select(rows.columns).equals(rows), path
    write_parquet(path, made)
    return made


def list_evaluations(home: str | Path) -> list[Path]:
    """The finished evaluations of a run (or of an --out directory), in the order of their keys."""
    return sorted(path.parent for path in (Path(home) / EVALUATIONS).glob(f"*/{EVALUATION_JSON}"))


def read_evaluation(folder: str | Path) -> EvaluationTables:
    """A finished evaluation, its tables as they were written.

    Raises:
        DatasetError: it is missing, damaged, or one of its tables was changed.
    """
    path = Path(folder)
    document = read_document(path / EVALUATION_JSON, Evaluation)
    try:
        check_parts(path, document["parts"])
    except DatasetError as error:
        error.hint = AGAIN
        raise
    summary, prompts = (pl.read_parquet(path / name, glob=False) for name in (EVALUATION_SUMMARY, EVALUATION_PROMPTS))
    return EvaluationTables(path, document, summary, prompts)


def evaluation_lines(home: str | Path) -> list[dict[str, Any]]:
    """Each finished evaluation of a run in a few words: its key, model, headline and number of warnings."""
    found = []
    for folder in list_evaluations(home):
        try:
            document = read_document(folder / EVALUATION_JSON, Evaluation)
        except DatasetError as error:
            found.append({"evaluation": folder.name, "damaged": error.message})
            continue
        told = document["headline"]
        gain: dict[str, Any] = {} if told is None else {"gain": told["value"], "low": told["low"], "high": told["high"]}
        if told is not None:
            gain["scorer"] = told["scorer"]
        entry: dict[str, Any] = {"evaluation": folder.name, **gain, "warnings": len(document["warnings"])}
        found.append(entry)
    return found
