"""A file becomes rows: JSON lines, a JSON list, CSV, Parquet or Arrow, plain, gzip or zstd; damaged rows stay as text.

Comes in: the name of a file. Goes out: one `RawRow` after another, with its line, or `read_chunks`: many rows at once
as they lie in the file, for who can check them together. A row that cannot be decoded says why and is no error; a file
that cannot be read at all is a `SourceError` with file and line.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.errors import SourceError
from prefkit.records import LONE_SURROGATE

MAX_DIGITS = 4_000
CHUNK_BYTES = (
    1_000_000  # of JSON lines: at 4 MB, one row in a thousand that has to be looked at alone costs a third more
)
ROWS_PER_BATCH = 4_096
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
UNIFIED = ("tool_calls", "tools")  # their members differ from row to row, which columns do not know
JSON_SPACE = re.compile(r"[ \t\n\r]*")
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow, plain, .gz or .zst"
RENAME_LINES = "one object a line is .jsonl: rename the file"
RENAME_LIST = "one list of objects is .json: rename the file"
UNREADABLE = (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError)


class RawRow(NamedTuple):
    """One row as it was read: its 1-based line, its value, its raw text, and why it is unreadable (None: it is not)."""

    line: int
    value: Any
    raw: str
    reason: str | None = None


class Lines(NamedTuple):
    """Whole lines of a file of JSON lines, the number of the first, and how many; the last one may lack its end."""

    first: int
    content: bytes
    height: int

    def rows(self) -> Iterator[RawRow]:
        """Each line that is not blank, decoded."""
        decoder = Decoder()
        for line, raw in enumerate(self.content.split(b"\n"), start=self.first):
            if raw.strip():
                yield decode_line(line, raw, decoder)

    def last(self) -> int:
        """The number of the last line that is not blank, or of the one before the first."""
        kept = self.content.rstrip()
        return self.first + kept.count(b"\n") if kept else self.first - 1


class Batch(NamedTuple):
    """Rows of a file of columns, all of types that Python has values for; `first` is the number of the first."""

    first: int
    columns: Any

    def rows(self) -> Iterator[RawRow]:
        """Each row as Python values."""
        unified = any(name in str(self.columns.schema) for name in UNIFIED)
        for line, value in enumerate(_python_rows(self.columns), start=self.first):
            yield RawRow(line, _without_nulls(value) if unified else value, "")

    def last(self) -> int:
        """The number of the last row."""
        return self.first + int(self.columns.num_rows) - 1


Chunk: TypeAlias = Lines | Batch | RawRow


def read_rows(path: str) -> Iterator[RawRow]:
    """Every row of a file with its line; blank lines are no rows.

    Raises:
        SourceError: the file cannot be read, or its end is missing (a cut-off .gz names the last good line).
    """
    for chunk in read_chunks(path):
        if isinstance(chunk, RawRow):
            yield chunk
        else:
            yield from chunk.rows()


class Position:
    """How far a file has been read. `share`: of its bytes, 0..1; None where a reader does not go from front to end."""

    def __init__(self) -> None:
        self.share: float | None = None

    def look(self, file: Any, size: int) -> None:
        """Take in where a file stands."""
        raw = getattr(file, "fileobj", file)  # of gzip: the packed file
        try:
            self.share = min(raw.tell() / size, 1.0) if size else None
        except (OSError, ValueError, AttributeError):
            self.share = None


def read_chunks(path: str, position: Position | None = None) -> Iterator[Chunk]:
    """The same rows, as many at once as lie together; see `read_rows`. `position` is kept up to date."""
    name = Path(path)
    suffixes = [s.lower() for s in name.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    suffix = suffixes[-1] if suffixes else ""
    reader = READERS.get(suffix)
    if reader is None:
        raise SourceError("this kind of file is not read", where=path, expected=READABLE)
    chunk: Chunk | None = None
    try:
        with _opened(name, packed) as file:
            if suffix not in (".parquet", ".arrow"):
                _refuse_wide(file.peek(4), path)
            size = name.stat().st_size
            for chunk in reader(file, path):
                if position is not None and suffix in (".jsonl", ".csv", ".tsv") and packed != ".zst":
                    position.look(file, size)
                yield chunk
    except SourceError:
        raise
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        line = 0 if chunk is None else chunk.line if isinstance(chunk, RawRow) else chunk.last()
        raise SourceError(f"cannot be read: {reason}", where=f"{path}:{line + 1}", expected="a whole file") from None


def _refuse_wide(begin: bytes, path: str) -> None:
    if begin.startswith(UTF32_MARKS):
        raise SourceError("is UTF-32", where=f"{path}:1", expected="UTF-8")
    if begin.startswith(UTF16_MARKS):
        hint = "iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
        raise SourceError("is UTF-16", where=f"{path}:1", expected="UTF-8", hint=hint)


def _opened(name: Path, packed: str) -> Any:
    if packed == ".gz":
        return gzip.open(name, "rb")
    if packed == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(name)), "zstd"))
    return name.open("rb")


def _is_packed(path: str) -> bool:
    return Path(path).suffix.lower() in (".gz", ".zst")


def _integer(text: str) -> int | float:
    """Python refuses integers of more than 4,300 digits; as a float such a number is infinite, and a reject by name."""
    return int(text) if len(text) <= MAX_DIGITS else float(text)


class Decoder:
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


def _json_lines(file: Any, path: str) -> Iterator[Lines]:
    """Chunks that end where a line does. What was read before an error comes out before the error."""
    first, held, size = 1, [], 0
    step = io.DEFAULT_BUFFER_SIZE if _is_packed(path) else CHUNK_BYTES
    try:
        while piece := file.read1(step):
            held.append(piece)
            size += len(piece)
            if size >= CHUNK_BYTES and b"\n" in piece:
                content = b"".join(held)
                end = content.rindex(b"\n") + 1
                held, size = [content[end:]], len(content) - end
                yield (lines := _lines(first, content[:end], path))
                first += lines.height
    except UNREADABLE:
        content = b"".join(held)
        yield _lines(first, content[: content.rfind(b"\n") + 1], path)
        raise
    yield _lines(first, b"".join(held), path)


def _lines(first: int, content: bytes, path: str) -> Lines:
    if first == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
        _refuse_list(content.strip(), path)
    ends = int(
        np.count_nonzero(np.frombuffer(content, np.uint8) == ord("\n"))
    )  # `bytes.count` takes five times as long
    return Lines(first, content, ends + (0 if content.endswith(b"\n") else 1))


def _refuse_list(content: bytes, path: str) -> None:
    """A file that is one JSON list would be nothing but rejects. A line that is a list is one reject."""
    line, _, more = content.partition(b"\n")
    inside = line[1:].strip()
    begins = (not inside and more) or (inside.startswith(b"{") and (not more or inside.endswith((b"{", b","))))
    if line.startswith(b"[") and begins:
        raise SourceError("is a JSON list", where=path, expected="one object a line", hint=RENAME_LIST)


def decode_line(line: int, raw: bytes, decoder: Decoder) -> RawRow:
    """A line of JSON as a row, or why it is none."""
    content = raw.rstrip(b"\r\n")
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
        lines = error.msg == "Extra data" and text.lstrip().startswith("{")
        raise SourceError(
            f"no JSON: {error.msg}",
            where=f"{path}:{error.lineno}",
            expected="a list of objects",
            hint=RENAME_LINES if lines else "",
        ) from None


def _elements(text: str, path: str) -> Iterator[RawRow]:
    """The elements of a JSON list one by one, each with its own text."""
    decoder = Decoder()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        decoder.whole(text)  # what is no JSON at all says so first
        hint = f"{RENAME_LINES}; rows in a list inside an object: write that list" if text[at : at + 1] == "{" else ""
        raise SourceError("not a list", where=path, expected="a list of objects", hint=hint)
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
    """Rows with the line of the file that they begin in; .csv has commas, .tsv tabs."""
    comma = "\t" if Path(path.lower().removesuffix(".gz").removesuffix(".zst")).suffix == ".tsv" else ","
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    line = 1
    try:
        rows = csv.reader(text, delimiter=comma, strict=True)
        names = next(rows, None)
        if names is None:
            raise SourceError("empty", where=path, expected="a header line")
        _refuse_twice(names, path)
        _refuse_other_commas(names, comma, path)
        csv.field_size_limit(2**31 - 1)  # the default of 128 kB would end the build at one long text
        line = rows.line_num + 1
        for cells in rows:
            if cells:
                yield _csv_row(line, names, cells)
            line = rows.line_num + 1
    except csv.Error as error:
        raise SourceError(f"cannot be read: {error}", where=f"{path}:{line}", expected="a whole file") from None
    finally:
        text.detach()


def _csv_row(line: int, names: Sequence[str], cells: Sequence[str]) -> RawRow:
    value: dict[str | None, Any] = {name: cells[i] if i < len(cells) else None for i, name in enumerate(names)}
    if len(cells) > len(names):
        value[None] = cells[len(names) :]
    raw = json.dumps(value, ensure_ascii=False)
    reason = "wrong_number_of_fields" if len(cells) != len(names) else None
    if LONE_SURROGATE.search(raw):
        raw = raw.encode(errors="surrogateescape").decode(errors="backslashreplace")
        reason = "not_utf8"
    return RawRow(line, None if reason else value, raw, reason)


def _refuse_other_commas(names: Sequence[str], comma: str, path: str) -> None:
    """A header of one column that holds what others separate columns with."""
    if len(names) == 1 and (found := next((c for c in ",;\t" if c in names[0] and c != comma), None)):
        said = {",": "commas", ";": "semicolons", "\t": "tabs"}
        hint = "name it .tsv" if found == "\t" else "name it .csv" if found == "," else "save it with commas"
        raise SourceError(
            f"the columns are separated by {said[found]}", where=f"{path}:1", expected=said[comma], hint=hint
        )


def _refuse_twice(names: Sequence[str], path: str) -> None:
    """A name given to two columns; columns without a name (commas at the end of a header) are no columns."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise SourceError(f"column {twice[0]!r} is there twice", where=f"{path}:1", expected="one name a column")


def _parquet(file: Any, path: str) -> Iterator[Batch | RawRow]:
    source = io.BytesIO(file.read()) if _is_packed(path) else file
    opened = pq.ParquetFile(source, pre_buffer=False)  # the default keeps the whole compressed file in memory
    _refuse_twice(opened.schema_arrow.names, path)
    yield from _batches(opened.iter_batches(batch_size=ROWS_PER_BATCH))


def _arrow(file: Any, path: str) -> Iterator[Batch | RawRow]:
    """A stream of Arrow, as `datasets` saves it, or an Arrow file."""
    source = io.BytesIO(file.read()) if _is_packed(path) else file
    if source.read(6) == b"ARROW1":
        opened = pa.ipc.open_file(source)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
    else:
        source.seek(-len(ARROW_END), io.SEEK_END)
        if source.read() != ARROW_END:  # Arrow takes a stream that breaks off between two batches for a whole one
            raise SourceError("cannot be read: its end is missing", where=f"{path}:1", expected="a whole file")
        source.seek(0)
        batches = opened = pa.ipc.open_stream(source)
    _refuse_twice(opened.schema.names, path)
    parts = (whole.slice(at, ROWS_PER_BATCH) for whole in batches for at in range(0, whole.num_rows, ROWS_PER_BATCH))
    yield from _batches(parts)


def _batches(batches: Iterator[Any]) -> Iterator[Batch | RawRow]:
    """Batches that are certain to become Python values stay together; of others, row by row."""
    first = 1
    for batch in batches:
        if _is_plain(batch):
            yield Batch(first, batch)
        else:
            for line, value in enumerate(_python_rows(batch), start=first):
                yield RawRow(line, value, "")
        first += batch.num_rows


def _is_plain(batch: Any) -> bool:
    try:
        batch.validate(full=True)  # texts are UTF-8
    except pa.ArrowInvalid:
        return False
    return all(pa.types.is_timestamp(column.type) or _has_values(column.type) for column in batch.schema)


def _has_values(kind: Any) -> bool:
    """Whether every value of an Arrow type is one of Python's."""
    t = pa.types
    if t.is_list(kind) or t.is_large_list(kind):
        return _has_values(kind.value_type)
    if t.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_has_values(field.type) for field in kind)
    if t.is_dictionary(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or any(
        is_one(kind) for is_one in (t.is_integer, t.is_floating, t.is_boolean, t.is_null, t.is_decimal)
    )


def _is_text(kind: Any) -> bool:
    return any(is_one(kind) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _without_nulls(value: Any, *, inside: bool = False) -> Any:
    """A value whose tools and calls have no null members: a column of structs gives each row the keys of all others."""
    if isinstance(value, list):
        return [_without_nulls(item, inside=inside) for item in value]
    if not isinstance(value, dict):
        return value
    members = value.items()
    return {k: _without_nulls(v, inside=inside or k in UNIFIED) for k, v in members if not (inside and v is None)}


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; of a column that Python has no values for (years above 9999), what is stored."""
    try:
        return _without_nanoseconds(batch).to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        columns = {name: _python_values(batch.column(name)) for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _in_nanoseconds(kind: Any) -> bool:
    return bool(pa.types.is_timestamp(kind)) and kind.unit == "ns"


def _without_nanoseconds(batch: Any) -> Any:
    """Times of nanoseconds in microseconds, which Python has; where pandas is installed, pyarrow would give its own.

    Raises:
        pyarrow.ArrowInvalid: some are no whole microseconds.
    """
    for number, column in enumerate(batch.schema):
        if _in_nanoseconds(column.type):
            whole = batch.column(number).cast(pa.timestamp("us", column.type.tz))
            batch = batch.set_column(number, column.name, whole)
    return batch


def _python_values(column: Any) -> list[Any]:
    try:
        if _in_nanoseconds(column.type):
            column = column.cast(pa.timestamp("us", column.type.tz))
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [{str(column.type): value} for value in column.cast(pa.int64()).to_pylist()]


READERS: dict[str, Callable[[Any, str], Iterator[Chunk]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
