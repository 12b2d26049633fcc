"""Candidates on disk, part by part, and what scorers made of them: the tables and documents of sample_format.py.

Comes in: a folder that `prefkit sample` wrote, or any file of responses. Goes out: frames of candidates, and scored
tables whose parts are named as those of the candidates. Each part is renamed into place, its scored table last, and is
known to be current by the candidates in it, so a kill costs one part at most.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pydantic import ValidationError

from prefkit.candidate_folder import read_part, read_sample
from prefkit.checked import as_kind, canonical_json_or_repr, reject_frame
from prefkit.documents import Scorer
from prefkit.errors import DatasetError, InputError, SourceError
from prefkit.format import LOCK, MESSAGES, PLAIN_MESSAGES, Kind, part_name
from prefkit.formats.reading import Unreadable, read_fields
from prefkit.records import Response
from prefkit.rows import RawRow, read_rows
from prefkit.sample_format import (
    INCONSISTENT,
    SAMPLE_JSON,
    SAMPLER_JSON,
    SAMPLES,
    SCORED,
    SCORERS,
    UNSCORED,
    VERDICTS,
    sample_schema,
)
from prefkit.sources import expand, file_sha256
from prefkit.store import dataset_around, read_document, read_json
from prefkit.tables import Part, write_parquet
from prefkit.text import content_hash, with_prompt_ids

REJECTS = "rejects"
TABLES = (VERDICTS, INCONSISTENT, UNSCORED, SCORED)
ROWS_PER_PART = 1024  # candidates of a file, and those of the last one's prompt
PART_OF_SCORER = re.compile(r"(.+)-[0-9]{5,}\.parquet")
BEGUN = ".begun"  # of a scorer that has not come to its end: its identity, and what it scores
REDO = "delete it and type prefkit score again: what it scored is scored anew"
GIVEN = ("model", "reference", "tools")
# what a part of a scorer's tables is known by
SAME = ("candidate_id", "prompt_id", "response", "reference")


class CandidateParts(NamedTuple):
    """Candidates in parts: `read` gives the frame of a part by its number.

    A frame has prompt_id, prompt, reference, tools, candidate_id, number, response, model, place (where a person finds
    the row) and response_ids where the sampler left them; all responses of a prompt are in one part.
    """

    path: str
    kind: Kind
    numbers: list[int]
    sizes: list[int]  # rows of each part
    read: Callable[[int], pl.DataFrame]
    rejects: pl.DataFrame | None  # of files: rows that are no response


def open_candidates(path: str) -> CandidateParts:
    """The candidates of a folder, or of a file or glob.

    Raises:
        DatasetError: sampling has not come to its end, or a part is damaged.
        SourceError: a file cannot be read, or none of its rows is a response.
    """
    return _sampled(Path(path)) if is_sampled(path) else _from_files(path)


def is_sampled(path: str) -> bool:
    """Whether a path names a folder that `prefkit sample` wrote or began."""
    return any((Path(path) / name).exists() for name in (SAMPLE_JSON, SAMPLER_JSON))


def _sampled(folder: Path) -> CandidateParts:
    document = read_sample(folder)
    kind: Kind = document["kind"]
    parts = {_number_of(part["file"]): part for part in document["parts"][SAMPLES] if part["rows"]}

    def read(number: int) -> pl.DataFrame:
        return _sampled_part(folder / SAMPLES, parts[number], kind)

    return CandidateParts(str(folder), kind, list(parts), [part["rows"] for part in parts.values()], read, None)


def _number_of(file: str) -> int:
    """Of `part-00007.parquet` 7."""
    return int(file.removesuffix(".parquet").rpartition("-")[2])


def _sampled_part(folder: Path, part: Mapping[str, Any], kind: Kind) -> pl.DataFrame:
    columns = [name for name in sample_schema(SCORED, kind) if name not in ("score", "scorer")]
    frame = read_part(folder, part, [*columns, "response_ids"]).cast({PLAIN_MESSAGES: MESSAGES})
    places = pl.format("{}:{}", pl.lit(str(folder / part["file"])), pl.int_range(1, pl.len() + 1))
    return frame.with_columns(places.alias("place"))


# -- responses of other engines


def _from_files(path: str) -> CandidateParts:
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    kind: Kind | None = None
    for file in expand(path):
        for row in read_rows(file):
            if kind is None and row.reason is None:
                kind = "chat" if isinstance(row.value.get("prompt"), list) else "text"
            _take(row, file, kind or "text", rows, rejects)
    if not rows:
        where = f"{rejects[0]['source']}:{rejects[0]['line']}" if rejects else path
        reason = f": {rejects[0]['field'] or 'the row'}: {rejects[0]['reason']}" if rejects else ""
        message = f"{len(rejects)} of {len(rejects)} rows are no response{reason}" if rejects else "holds no response"
        expected = "prompt, response [, reference, model, tools] in each"
        raise SourceError(message, where=where, expected=expected)
    kind = kind or "text"
    frame = _with_ids(rows, kind)
    starts = [0]
    groups = frame["prompt_id"].rle_id().to_list()
    for at, group in enumerate(groups):
        if at - starts[-1] >= ROWS_PER_PART and group != groups[at - 1]:
            starts.append(at)
    ends = [*starts[1:], frame.height]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return CandidateParts(
        path, kind, list(range(len(starts))), sizes, lambda n: frame.slice(starts[n], sizes[n]), reject_frame(rejects)
    )


def _take(row: RawRow, file: str, kind: Kind, rows: list[dict[str, Any]], rejects: list[dict[str, Any]]) -> None:
    """One row of a file: a response, or a reject."""

    def reject(field: str | None, reason: str) -> None:
        raw = row.raw or canonical_json_or_repr(row.value)
        rejects.append({"source": file, "line": row.line, "field": field, "reason": reason, "raw": raw})

    if row.reason is not None:
        return reject(None, row.reason)
    try:
        fields = read_fields(row.value, {}, ("prompt", "response"), GIVEN)
        reference = fields.pop("reference", None)
        if reference is not None and not isinstance(reference, (str, int, float)):
            raise Unreadable("reference", "wrong_type")
        record = Response.model_validate(fields).model_dump()
        prompt, response = as_kind(record["prompt"], "prompt", kind), record["response"]
        if kind == "text" and record["tools"] is not None:
            raise Unreadable("tools", "tools_in_text_dataset")
        if isinstance(response, list):
            if len(response) != 1 or response[0]["role"] != "assistant" or response[0]["extra"]:
                raise Unreadable("response", "not_one_reply")
            response = response[0]["content"]
    except Unreadable as error:
        return reject(error.field, error.reason)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        return reject(str(problem["loc"][0]) if problem["loc"] else None, "wrong_type")
    rows.append(
        {
            "prompt": prompt,
            "reference": None if reference is None else str(reference),
            "tools": record["tools"],
            "response": response,
            "model": record["model"],
            "place": f"{file}:{row.line}",
        }
    )
    return None


def _with_ids(rows: Sequence[Mapping[str, Any]], kind: Kind) -> pl.DataFrame:
    """The responses of each prompt together, prompts in the order of their first, with ids and numbers."""
    columns: dict[str, Any] = {**sample_schema(SCORED, kind), "place": pl.String}
    names = ("prompt", "reference", "tools", "response", "model", "place")
    frame = pl.DataFrame({name: pl.Series([row[name] for row in rows], dtype=columns[name]) for name in names})
    frame = with_prompt_ids(frame, kind).with_row_index("at")
    frame = frame.with_columns(pl.col("at").min().over("prompt_id").alias("first")).sort("first", "at")
    frame = frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int32).over("prompt_id").alias("number"))
    ids = [content_hash(*row) for row in frame.select("prompt_id", "response", "model", "number").iter_rows()]
    ordered = [name for name in columns if name not in ("score", "scorer")]
    return frame.with_columns(pl.Series("candidate_id", ids, pl.String)).select(ordered)


# -- what scorers made of them


def scored_file(out: Path, table: str, label: str, number: int) -> Path:
    """The file of one part of a scorer's table."""
    return out / table / f"{label}-{number:05d}.parquet"


def tables_of(kind: str) -> tuple[str, ...]:
    """The tables of a kind of scorer, in the order in which a part of each is written."""
    return TABLES if kind == "judge" else (UNSCORED, SCORED)


def document_file(out: Path, label: str) -> Path:
    """The JSON document of a scorer, written last."""
    return out / SCORERS / f"{label}.json"


def read_scorer(out: Path, label: str) -> dict[str, Any] | None:
    """The document of a scorer that has come to its end; None where there is none.

    Raises:
        DatasetError: it is damaged.
    """
    path = document_file(out, label)
    return read_document(path, Scorer, REDO) if path.exists() else None


def begun_file(out: Path, label: str) -> Path:
    """What is there of a scorer from its first part to its end: its identity, and the path of the candidates."""
    return out / SCORERS / f"{label}{BEGUN}"


def known_identity(out: Path, label: str) -> dict[str, Any] | None:
    """The identity of the scorer of this name that has scored here; None where none has, even if one was about to."""
    document = read_scorer(out, label)
    begun = begun_file(out, label)
    if document is None and begun.exists() and has_parts(out, label):
        document = read_json(begun, REDO)
    return None if document is None else dict(document.get("identity", {}))


def has_parts(out: Path, label: str) -> bool:
    """Whether there are tables of a scorer."""
    return any(_number_in(file, label) is not None for table in TABLES for file in (out / table).glob("*.parquet"))


def _number_in(file: Path, label: str) -> int | None:
    """The part of a scorer that a file of a table is; None for one of another scorer."""
    found = re.fullmatch(re.escape(label) + r"-([0-9]{5,})\.parquet", file.name)
    return int(found[1]) if found else None


def is_part_current(
    out: Path, label: str, kind: str, number: int, rows: pl.DataFrame, recorded: Mapping[str, str]
) -> bool:
    """Whether a scorer has scored these very candidates in this part.

    Args:
        out: the folder of the tables.
        label: of the scorer.
        kind: of scorer.
        number: of the part.
        rows: its candidates.
        recorded: sha256 by file, as the scorer's document has them; a file that it does not know passes.
    """
    files = [scored_file(out, table, label, number) for table in tables_of(kind)]
    if not all(file.exists() for file in files):
        return False
    if any(recorded.get(name_in(out, file)) not in (None, file_sha256(file)) for file in files):
        return False
    try:
        frames = [pl.read_parquet(file, columns=list(SAME), glob=False) for file in files[-2:]]
    except pl.exceptions.PolarsError:
        return False
    found = pl.concat(frames).sort("candidate_id")
    return found.equals(rows.select(SAME).sort("candidate_id"))


def name_in(out: Path, file: Path) -> str:
    """A file as documents name it: relative to the folder."""
    return file.relative_to(out).as_posix()


def write_part(out: Path, table: str, label: str, number: int, frame: pl.DataFrame, kind: Kind) -> Part:
    """Write one part of a table, atomically, with the columns of sample_format.py."""
    wanted = sample_schema(table, kind)
    columns = [
        pl.col(name).cast(dtype) if name in frame.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in wanted.items()
    ]
    return write_parquet(scored_file(out, table, label, number), frame.select(columns))


def remove_other_parts(out: Path, label: str, numbers: Sequence[int]) -> None:
    """Remove the parts of a scorer whose candidates are not there any more."""
    for table in TABLES:
        for file in (out / table).glob("*.parquet"):
            number = _number_in(file, label)
            if number is not None and number not in numbers:
                file.unlink()


def refuse_others(out: Path, labels: Sequence[str]) -> None:
    """Refuse tables of scorers that are none of these: a build would make pairs of their scores, too.

    Raises:
        DatasetError: there are some.
    """
    files = [file for table in (SCORED, VERDICTS) for file in (out / table).glob("*.parquet")]
    found = {match[1] for file in files if (match := PART_OF_SCORER.fullmatch(file.name))}
    if others := sorted(found - {*labels}):
        raise DatasetError(
            f"holds scores of {', '.join(others)}, which score.scorers does not name: a build would rank by them, too",
            where=str(out),
            expected=f"those of {', '.join(labels)} alone",
            hint=f"name them in score.scorers, choose another sample.out, or {removal(out, others[0])}",
        )


def refuse_foreign(out: Path, path: str) -> None:
    """Refuse a folder that holds something, and no scores of these candidates: a build would take both for one.

    Args:
        out: the folder of the tables.
        path: of the candidates, as it was typed; the folder itself where they were sampled into it.

    Raises:
        DatasetError: it holds something else.
    """
    if not out.is_dir() or (is_sampled(path) and Path(path).resolve() == out.resolve()):
        return
    hint = "choose another --out"
    if is_sampled(str(out)):
        message, expected = "holds samples, and the scores of these alone", "a folder that is new or empty"
        raise DatasetError(message, where=str(out), expected=expected, hint=hint)
    documents = [file for file in (out / SCORERS).glob("*") if file.suffix in (".json", BEGUN)]
    for scored in sorted({str(read_json(file, REDO).get("candidates", path)) for file in documents}):
        if Path(scored).resolve() != Path(path).resolve():
            message, expected = f"holds scores of {scored}", f"those of {path}, or nothing yet"
            raise DatasetError(message, where=str(out), expected=expected, hint=hint)
    there = {entry.name for entry in out.iterdir()} - {LOCK, REJECTS, SCORERS, *TABLES}
    if there and not documents:  # a dataset may lie among the scores that it is built from
        message, expected = f"holds {', '.join(sorted(there)[:3])}", "a folder of scores, or one that is new or empty"
        raise DatasetError(message, where=str(out), expected=expected, hint=hint)


def removal(out: Path, label: str) -> str:
    """How a scorer's tables are deleted, in words for a person."""
    return f"delete {out}/*/{label}-?????.parquet and {out}/{SCORERS}/{label}.*"


def write_rejects(out: Path, rejects: pl.DataFrame) -> None:
    """Write the rows of files that are no response; nothing where there are none and never were."""
    path = out / REJECTS / part_name(0)
    if rejects.height or path.exists():
        write_parquet(path, rejects)


def output_folder(path: str, out: str | Path | None) -> Path:
    """Where scored tables go.

    Raises:
        InputError: a file of responses, and no folder to write to; or one in a dataset, where no build would have it.
        SourceError: there is no such file or folder.
    """
    if out is not None:
        if dataset_around(Path(out)) is not None:
            raise InputError("scores cannot be written into a dataset", where=str(out), hint="--out elsewhere")
        return Path(out)
    if is_sampled(path):
        return Path(path)
    expand(path)
    raise InputError(
        "is no folder of prefkit sample, so the scored tables need one",
        where=path,
        expected="a folder with sample.json, or a file with --out DIR",
        hint="add --out DIR",
    )
