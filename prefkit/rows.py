"""A file becomes rows: JSON lines, a JSON list, CSV or Parquet, plain, gzip or zstd; damaged rows keep their raw text.

Comes in: the name of a file. Goes out: one `RawRow` after another, with its line. A row that cannot be decoded says why
and is no error; a file that cannot be read at all is a `SourceError` with file and line.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.errors import SourceError

MAX_DIGITS = 4_000
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
JSON_SPACE = re.compile(r"[ \t\n\r]*")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
READABLE = ".jsonl, .ndjson, .json, .csv or .parquet, plain, .gz or .zst"


class RawRow(NamedTuple):
    """One row as it was read: its 1-based line, its value, its raw text, and why it is unreadable (None: it is not)."""

    line: int
    value: Any
    raw: str
    reason: str | None = None


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
            if reader is not _parquet and file.peek(4).startswith(UTF32_MARKS):
                raise SourceError("is UTF-32", where=f"{path}:1", expected="UTF-8")
            if reader is not _parquet and file.peek(2).startswith(UTF16_MARKS):
                hint = "iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
                raise SourceError("is UTF-16", where=f"{path}:1", expected="UTF-8", hint=hint)
            for row in reader(file, path):
                line = row.line
                yield row
    except SourceError:
        raise
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"cannot be read: {reason}", where=f"{path}:{line + 1}", expected="a whole file") from None


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
