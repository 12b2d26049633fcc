"""Open the files a source names and turn every row into a record or a reject; nothing is lost in between.

Comes in: a source of the pipeline. Goes out: one frame of checked records and one of rejects, each with file and line.
One bad line never ends a build; a file that cannot be read at all does (`SourceError` with file and line). Price: every
row passes through json and pydantic, some 10 microseconds a row, and a source's records are held in memory.
"""

import contextlib
import errno
import glob
import hashlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pydantic import ValidationError

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.format import REJECTS, Kind, canonical_json, text_dtype
from prefkit.formats import FORMATS, Format, Unreadable
from prefkit.records import RECORDS
from prefkit.rows import LONE_SURROGATE, READABLE, RawRow, read_rows

NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

# columns of the record frames, by family; the text columns take the dtype of the dataset's kind
RECORD_TEXTS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "candidates": ("prompt", "response"),
    "corrections": ("prompt", "response", "correction"),
}
RECORD_VALUES: Mapping[str, Mapping[str, type[pl.DataType]]] = {
    "pairs": {
        "chosen_score": pl.Float64,
        "rejected_score": pl.Float64,
        "chosen_model": pl.String,
        "rejected_model": pl.String,
        "annotator": pl.String,
        "weight": pl.Float64,
    },
    "candidates": {"score": pl.Float64, "model": pl.String},
    "corrections": {"model": pl.String, "annotator": pl.String},
}
ROLE_OF = {"prompt": "user"}  # every other text is the assistant's


class SourceFile(NamedTuple):
    """One file of a source, as the manifest records it."""

    path: str
    sha256: str
    rows: int


class Loaded(NamedTuple):
    """The records and rejects of one source, and the files they came from."""

    records: pl.DataFrame
    rejects: pl.DataFrame
    files: list[SourceFile]


def expand(path: str) -> list[str]:
    """The files that a path or glob names, sorted; none is an error."""
    try:
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else [path]
        modes = [(name, Path(name).stat().st_mode) for name in found]
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in NOTHING_THERE:
            hint = "a file, relative to the working directory"
            raise SourceError("no such file", where=str(error.filename), expected=hint) from None  # type: ignore[union-attr]
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"cannot be read: {reason}", where=path, expected=READABLE) from None
    if not found:
        raise SourceError("no file matches", where=path, expected=READABLE)
    for name, mode in modes:
        if stat.S_ISDIR(mode):
            hint = f"name its files: {name}/*.jsonl"
            raise SourceError("a directory, not a file", where=name, expected=READABLE, hint=hint)
        if not stat.S_ISREG(mode):  # it is read twice, and a pipe may never end
            raise SourceError("not a regular file", where=name, expected=READABLE, hint="write it to a file first")
        if LONE_SURROGATE.search(name):
            shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise SourceError("the file's name is not UTF-8", where=shown, expected="a name that text can hold")
    return found


def source_sha256(path: str) -> str:
    """`file_sha256` of a source.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=path, expected=READABLE) from None


def file_sha256(path: str | Path) -> str:
    """Sha256 hex of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_chat_source(source: SourceConfig) -> bool:
    """Whether the first readable row of a source holds messages; decides `kind` where the pipeline leaves it out."""
    form = FORMATS[source.format]
    rows = (row.value for path in expand(source.path) for row in read_rows(path) if row.reason is None)
    first = next(rows, None)
    return first is not None and form.is_chat(first, source.columns)


def load_source(source: SourceConfig, kind: Kind) -> Loaded:
    """Read all files of a source.

    Returns:
        records with their text columns in the dataset's kind, `source`, `source_row`; rejects as in format.REJECTS.

    Raises:
        SourceError: a file is missing, unreadable, or changed while it was read.
    """
    form = FORMATS[source.format]
    records: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    files = []
    for path in expand(source.path):
        with _unchanged(path):
            digest, rows = source_sha256(path), 0
            for row in read_rows(path):
                rows += 1
                _read_row(row, form, source, kind, path, records, rejects)
        files.append(SourceFile(path, digest, rows))
    return Loaded(_record_frame(records, form.family, kind, source.annotator), _reject_frame(rejects), files)


@contextlib.contextmanager
def _unchanged(path: str) -> Iterator[None]:
    """A file that changes meanwhile is an error, and the reason for any other error in it."""
    before = _state(path)
    failed: SourceError | None = None
    try:
        yield
    except SourceError as error:
        failed = error
    if _state(path) != before:
        raise SourceError("changed while it was read", where=path, hint="run the same command again")
    if failed is not None:
        raise failed


def _state(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where it is gone."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_row(
    row: RawRow,
    form: Format,
    source: SourceConfig,
    kind: Kind,
    path: str,
    records: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
) -> None:
    def reject(field: str | None, reason: str) -> None:
        raw = row.raw or canonical_json_or_repr(row.value)
        rejects.append({"source": path, "line": row.line, "field": field, "reason": reason, "raw": raw})

    if row.reason is not None:
        return reject(None, row.reason)
    try:
        found = form.read(row.value, source.columns)
    except Unreadable as error:
        return reject(error.field, error.reason)
    for index, fields in enumerate(found):
        try:
            record = RECORDS[form.family].model_validate(fields).model_dump()
            texts = {name: as_kind(record[name], name, kind) for name in RECORD_TEXTS[form.family]}
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reject(_field(problem["loc"], index, len(found)), _reason(problem["type"]))
        except Unreadable as error:
            reject(error.field, error.reason)
        else:
            records.append(record | texts | {"source": path, "source_row": row.line})
    return None


def canonical_json_or_repr(value: Any) -> str:
    """The raw form of a row that never was text (Parquet)."""
    try:
        return canonical_json(value)
    except (TypeError, ValueError):
        return repr(value)


def _field(loc: tuple[int | str, ...], index: int, count: int) -> str:
    """The field at fault, as the record names it; with its place in the list where one row holds several candidates."""
    name = str(loc[0]) if loc else "row"
    return f"{name}[{index}]" if count > 1 else name


def _reason(problem: str) -> str:
    own = ("not_a_number", "not_finite", "out_of_range")
    return (
        problem
        if problem in own
        else {"missing": "missing_field", "greater_than": "out_of_range"}.get(problem, "wrong_type")
    )


def as_kind(text: Any, field: str, kind: Kind) -> Any:
    """A record's text in the dataset's kind: in chat a plain string is one turn; messages do not fit a text dataset."""
    if kind == "chat":
        return text if isinstance(text, list) else [{"role": ROLE_OF.get(field, "assistant"), "content": text}]
    if isinstance(text, list):
        raise Unreadable(field, "messages_in_text_dataset")
    return text


def _record_frame(records: list[dict[str, Any]], family: str, kind: Kind, annotator: str | None) -> pl.DataFrame:
    schema: dict[str, Any] = dict.fromkeys(RECORD_TEXTS[family], text_dtype(kind))
    schema |= dict(RECORD_VALUES[family]) | {"source": pl.String, "source_row": pl.Int64}
    columns = {name: pl.Series(name, [r[name] for r in records], dtype, strict=True) for name, dtype in schema.items()}
    frame = pl.DataFrame(columns)
    return (
        frame.with_columns(pl.col("annotator").fill_null(pl.lit(annotator, pl.String)))
        if "annotator" in schema
        else frame
    )


def _reject_frame(rejects: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rejects, schema={c.name: c.dtype for c in REJECTS}, orient="row")
