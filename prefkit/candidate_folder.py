"""A candidates directory on disk: who may write to it, whether it is finished, and what is in it.

Comes in: a folder that `prefkit sample` writes. Goes out: its documents, and its tables with their hashes checked. No
model and no tokenizer: what scores or reads candidates needs nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.documents import Sample, Sampler
from prefkit.errors import DatasetError
from prefkit.format import LOCK, differing, part_name
from prefkit.sample_format import (
    PLAN,
    PROMPTS,
    SAMPLE_JSON,
    SAMPLE_PLAN,
    SAMPLE_VERSION,
    SAMPLER_JSON,
    SAMPLES,
    sample_schema,
)
from prefkit.sources import file_sha256
from prefkit.store import read_document
from prefkit.tables import Part, PartsWriter

AGAIN = "prefkit sample, with the settings that began it, finishes it"


class Candidates(NamedTuple):
    """What was sampled: sample.json, the prompts, and a row a response."""

    folder: Path
    document: dict[str, Any]
    prompts: pl.DataFrame
    samples: pl.DataFrame

    @property
    def kind(self) -> str:
        """Chat or text."""
        return str(self.document["kind"])


def is_finished(folder: str | Path) -> bool:
    """Whether all that was planned has been sampled."""
    return (Path(folder) / SAMPLE_JSON).exists()


def read_sample(folder: str | Path) -> dict[str, Any]:
    """sample.json of a finished candidates directory.

    Raises:
        DatasetError: there is none, it is unfinished, damaged, or of a newer prefkit.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DatasetError("no such candidates directory", where=str(path), hint="prefkit sample PROMPTS --out FOLDER")
    if not is_finished(path):
        begun = (path / SAMPLER_JSON).exists()
        what = "sampling is unfinished" if begun else "not a candidates directory"
        raise DatasetError(
            f"{what}: there is no {SAMPLE_JSON}",
            where=str(path),
            hint=AGAIN if begun else "prefkit sample PROMPTS --out FOLDER",
        )
    document = read_document(path / SAMPLE_JSON, Sample)
    if document["sample_version"] > SAMPLE_VERSION:
        raise DatasetError(
            f"sample_version is {document['sample_version']}",
            where=str(path / SAMPLE_JSON),
            expected=f"at most {SAMPLE_VERSION}: use a newer prefkit",
        )
    return document


def read_candidates(folder: str | Path) -> Candidates:
    """All that was sampled, every file compared with its recorded hash.

    Raises:
        DatasetError: it is unfinished, or a file is missing or was changed.
    """
    document = read_sample(folder)
    prompts, samples = (read_listed(Path(folder), name, document) for name in (PROMPTS, SAMPLES))
    return Candidates(Path(folder), document, prompts, samples)


def read_listed(folder: Path, table: str, document: Mapping[str, Any]) -> pl.DataFrame:
    """A table that sample.json lists, its parts compared with their hashes."""
    parts = [read_part(folder / table, part) for part in document["parts"][table]]
    return pl.concat([pl.DataFrame(schema=table_schema(table, document)), *parts])


def read_part(folder: Path, part: Mapping[str, Any], columns: Sequence[str] | None = None) -> pl.DataFrame:
    """One part that a document lists, compared with its hash; some of its columns, or all.

    Raises:
        DatasetError: it is missing or was changed.
    """
    check_files(folder, [part])
    return pl.read_parquet(folder / part["file"], columns=None if columns is None else list(columns), glob=False)


def table_schema(table: str, document: Mapping[str, Any]) -> pl.Schema:
    """Its columns in the kind of the candidates."""
    return sample_schema(table, document["kind"])


def check_files(folder: Path, parts: list[Mapping[str, Any]]) -> None:
    """Compare files with their recorded hashes.

    Raises:
        DatasetError: one is missing or was changed, by name.
    """
    for part in parts:
        path = folder / part["file"]
        if not path.exists():
            raise DatasetError("part is missing", where=str(path), hint=REDO)
        if file_sha256(path) != part["sha256"]:
            raise DatasetError("part was changed: its sha256 is not the recorded one", where=str(path), hint=REDO)


REDO = "delete the directory and type prefkit sample again"


def claim(folder: Path, sampler: Mapping[str, Any]) -> None:
    """Make sure that samples of this sampler may be written here.

    Raises:
        DatasetError: a file, a directory that holds something else, or samples that another sampler began.
    """
    if folder.exists() and not folder.is_dir():
        raise DatasetError("is a file", where=str(folder), expected="a directory that prefkit may write")
    if (folder / SAMPLER_JSON).exists():
        begun = read_document(folder / SAMPLER_JSON, Sampler)
        if begun["identity"] != sampler["identity"]:
            apart = "; ".join(differing(begun["identity"], sampler["identity"]))
            raise DatasetError(
                f"its samples are of another sampler: {apart}",
                where=str(folder),
                expected="the settings that began it (there and now)",
                hint="choose another --out",
            )
    elif folder.exists() and (foreign := sorted({p.name for p in folder.iterdir()} - {LOCK, f".{SAMPLER_JSON}.tmp"})):
        raise DatasetError(
            f"is no candidates directory: it holds {', '.join(foreign[:3])}",
            where=str(folder),
            hint="choose another --out",
        )


def read_plan(folder: Path) -> pl.DataFrame:
    """The plan of an earlier call, empty where there is none.

    Raises:
        DatasetError: it cannot be read.
    """
    path, empty = folder / SAMPLE_PLAN, pl.DataFrame(schema=sample_schema(PLAN, "text"))
    if not path.exists():
        return empty
    try:
        return pl.read_parquet(path, glob=False).match_to_schema(empty.schema)
    except pl.exceptions.PolarsError as error:
        raise DatasetError(f"cannot be read: {error}", where=str(path), hint=REDO) from None


def write_whole(folder: Path, schema: pl.Schema, frame: pl.DataFrame) -> list[Part]:
    """Write a table that is in memory, its parts anew; those of an earlier call that are no more are removed."""
    writer = PartsWriter(folder, schema, None)
    try:
        writer.add(frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items()))
        writer.finish()
        if not writer.parts:
            writer.write_empty()
    except BaseException as error:
        writer.abandon(error)
        raise
    for stale in set(folder.glob("part-*.parquet")) - {folder / part.file for part in writer.parts}:
        stale.unlink()
    return writer.parts


def check_answers(folder: Path, prompts: pl.DataFrame) -> None:
    """Make sure that prompts that are there already have the right answer they had: it stands beside their samples.

    Raises:
        DatasetError: one has another.
    """
    files = sorted((folder / PROMPTS).glob("part-*.parquet"))
    if not files:
        return
    try:
        before = pl.concat([pl.read_parquet(f, columns=["prompt_id", "reference"], glob=False) for f in files])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DatasetError(f"cannot be read: {error}", where=str(folder / PROMPTS), hint=REDO) from None
    both = prompts.join(before, on="prompt_id", suffix="_before")
    changed = both.filter(pl.col("reference").ne_missing(pl.col("reference_before")))
    if changed.height:
        first = changed.row(0, named=True)
        raise DatasetError(
            f"{changed.height} of its prompts have another reference now",
            where=f"{first['source']}:{first['source_row']}",
            expected=f"that of {folder}",
            hint="choose another --out",
        )


def check_written(folder: Path, plan: pl.DataFrame, n: int) -> None:
    """Check what an earlier call left: parts hold n responses to each prompt of the plan, and are those recorded.

    Raises:
        DatasetError: a part is changed, unreadable, or does not hold what was planned for it.
    """
    if is_finished(folder):
        recorded = read_sample(folder)["parts"][SAMPLES]
        check_files(folder / SAMPLES, [part for part in recorded if (folder / SAMPLES / part["file"]).exists()])
    for number in plan["part"].unique().sort():
        path = folder / SAMPLES / part_name(number)
        if not path.exists():
            continue
        planned = plan.filter(pl.col("part") == number)["prompt_id"].repeat_by(n).explode()
        try:
            found = pl.read_parquet(path, columns=["prompt_id"], glob=False)["prompt_id"]
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DatasetError(f"cannot be read: {error}", where=str(path), hint=REDO) from None
        if not planned.equals(found, check_names=False):
            raise DatasetError(f"holds other prompts than {SAMPLE_PLAN} says", where=str(path), hint=REDO)
