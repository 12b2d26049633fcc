"""Open the files a source names and turn every row into a record or a reject; nothing is lost in between.

Comes in: a source of the pipeline. Goes out: one frame of checked records and one of rejects, each with file and line.
One bad line never ends a build; a file that cannot be read at all does (`SourceError` with file and line). Price: every
row passes through json and pydantic, some 10 microseconds a row, and a source's records are held in memory.
"""

import codecs
import contextlib
import csv
import errno
import glob
import gzip
import hashlib
import io
import json
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.format import REJECTS, Kind, canonical_json, text_dtype
from prefkit.formats import FORMATS, Format, Unreadable
from prefkit.records import RECORDS

MAX_DIGITS = 4_000
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
JSON_SPACE = re.compile(r"[ \t\n\r]*")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
READABLE = ".jsonl, .ndjson, .json, .csv or .parquet, plain, .gz or .zst"

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


class RawRow(NamedTuple):
    """One row as it was read: its 1-based line, its value, its raw text, and why it is unreadable (None: it is not)."""

    line: int
    value: Any
    raw: str
    reason: str | None = None


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


def read_rows(path: str) -> Iterator[RawRow]:
    """Every row of a file with its line; blank lines are no rows.

    Raises:
        SourceError: the file cannot be read, or its end is missing (a cut-off .gz names the last good line).
    """
    name = Path(path)
    suffixes = [s.lower() for s in name.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    reader = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise SourceError("this kind of file is not read", where=path, expected=READABLE)
    line = 0
    try:
        with _opened(name, packed) as file:
            if reader is not _parquet and file.peek(2).startswith(UTF16_MARKS):
                hint = "iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
                raise SourceError("is UTF-16", where=f"{path}:1", expected="UTF-8", hint=hint)
            for row in reader(file, path):
                line = row.line
                yield row
    except SourceError:
        raise
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        raise SourceError(f"cannot be read: {error}", where=f"{path}:{line + 1}", expected="a whole file") from None


def _opened(name: Path, packed: str) -> Any:
    if packed == ".gz":
        return gzip.open(name, "rb")
    if packed == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(name)), "zstd"))
    return name.open("rb")


def _integer(text: str) -> int | float:
    """Python refuses integers of more than 4,300 digits; as a float such a number is infinite, and a reject by name."""
    return int(text) if len(text) <= MAX_DIGITS else float(text)


class _Decoder:
    """JSON to Python. `twice`: in the last value an object gave a key twice, and nobody can say which one is meant."""

    def __init__(self) -> None:
        self.twice = False
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_integer)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self.twice = self.twice or len(found) != len(pairs)
        return found

    def whole(self, text: str) -> Any:
        """The value that a text is."""
        self.twice = False
        return self._json.decode(text)

    def one(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at a place, and where it ends."""
        self.twice = False
        return self._json.raw_decode(text, at)


def _json_lines(file: Any, _path: str) -> Iterator[RawRow]:
    decoder = _Decoder()
    for line, raw in enumerate(file, start=1):
        content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
        if content.strip():
            yield _json_line(line, content.rstrip(b"\r\n"), decoder)


def _json_line(line: int, content: bytes, decoder: _Decoder) -> RawRow:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return RawRow(line, None, content.decode(errors="backslashreplace"), "not_utf8")
    try:
        value = decoder.whole(text)
    except (ValueError, RecursionError):
        return RawRow(line, None, text, "not_json")
    return _checked(line, value, text, twice=decoder.twice)


def _checked(line: int, value: Any, text: str, *, twice: bool) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(line, None, text, "not_an_object")
    if twice:
        return RawRow(line, None, text, "duplicate_key")
    try:
        if "\\u" in text and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            return RawRow(line, None, text, "lone_surrogate")
    except RecursionError:  # what could just be read is too deep to be written again
        return RawRow(line, None, text, "not_json")
    return RawRow(line, value, text)


def _json(file: Any, path: str) -> Iterator[RawRow]:
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SourceError("is not UTF-8", where=f"{path}:{line}", expected="UTF-8") from None
    try:
        yield from _elements(text, path)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"no JSON: {error.msg}", where=f"{path}:{error.lineno}", expected="a list of objects"
        ) from None


def _elements(text: str, path: str) -> Iterator[RawRow]:
    """The elements of a JSON list one by one, each with its own text."""
    decoder = _Decoder()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        decoder.whole(text)  # what is no JSON at all says so first
        raise SourceError("not a list", where=path, expected="a list of objects (one object a line is .jsonl)")
    row, at = 0, _skip_space(text, at + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        value, end = decoder.one(text, at)
        row += 1
        yield _checked(row, value, text[at:end], twice=decoder.twice)
        at = _skip_space(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        closed = text[at] == "]"
        at = at if closed else _skip_space(text, at + 1)
    at = _skip_space(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _skip_space(text: str, at: int) -> int:
    found = JSON_SPACE.match(text, at)
    return at if found is None else found.end()


def _csv(file: Any, path: str) -> Iterator[RawRow]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.DictReader(text, strict=True)
        if rows.fieldnames is None:
            raise SourceError("empty", where=path, expected="a header line")
        _refuse_twice(rows.fieldnames, path)
        csv.field_size_limit(2**31 - 1)  # the default of 128 kB would end the build at one long text
        for line, value in enumerate(rows, start=1):
            raw = json.dumps(value, ensure_ascii=False)
            reason = "wrong_number_of_fields" if None in value or None in value.values() else None
            if LONE_SURROGATE.search(raw):
                raw = raw.encode(errors="surrogateescape").decode(errors="backslashreplace")
                reason = "not_utf8"
            yield RawRow(line, None if reason else value, raw, reason)
    finally:
        text.detach()


def _refuse_twice(names: Sequence[str], path: str) -> None:
    """A name given to two columns; columns without a name (commas at the end of a header) are no columns."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise SourceError(f"column {twice[0]!r} is there twice", where=f"{path}:1", expected="one name a column")


def _parquet(file: Any, path: str) -> Iterator[RawRow]:
    if not (hasattr(file, "fileno") and Path(path).suffix == ".parquet"):
        file = io.BytesIO(file.read())
    line = 0
    opened = pq.ParquetFile(file, pre_buffer=False)  # the default keeps the whole compressed file in memory
    _refuse_twice(opened.schema_arrow.names, path)
    for batch in opened.iter_batches(batch_size=4096):
        for value in _python_rows(batch):
            line += 1
            yield RawRow(line, value, "")


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; of a column that Python has no values for (years above 9999), what is stored."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        columns = {name: _python_values(batch.column(name)) for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _python_values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [{str(column.type): value} for value in column.cast(pa.int64()).to_pylist()]


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
