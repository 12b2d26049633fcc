"""Open the files a source names and turn every row into a record or a reject; nothing is lost in between.

Comes in: a source of the pipeline. Goes out: frames of checked records and of rejects, each with file and line, block
by block. One bad line never ends a build; a file that cannot be read at all does (`SourceError` with file and line).
"""

import contextlib
import errno
import glob
import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.format import Kind
from prefkit.formats import FORMATS, Format
from prefkit.formats.comparisons import with_labels
from prefkit.ingest import Reading, check_chunks
from prefkit.records import LONE_SURROGATE
from prefkit.rows import READABLE, Position, read_chunks, read_rows
from prefkit.sample_format import SCORED, SCORERS, VERDICTS

CHANGED = "changed while it was read"
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class SourceFile(NamedTuple):
    """One file of a source, as the manifest records it."""

    path: str
    sha256: str
    rows: int


class Block(NamedTuple):
    """Some rows of one file: their records and rejects; `file`: the whole file, with the last of its blocks.

    `share`: of the bytes of all files of the source, how much has been read; None where nobody can tell.
    """

    records: pl.DataFrame
    rejects: pl.DataFrame
    file: SourceFile | None
    share: float | None = None


class Loaded(NamedTuple):
    """The records and rejects of one source, and the files they came from."""

    records: pl.DataFrame
    rejects: pl.DataFrame
    files: list[SourceFile]


def expand(path: str) -> list[str]:
    """The files that a path or glob names, sorted; none is an error.

    A folder that `datasets` saved stands for its Arrow files, in its own order.
    """
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
    return [file for name, mode in modes for file in _files_at(name, mode)]


def _files_at(name: str, mode: int) -> list[str]:
    if stat.S_ISDIR(mode):
        return [_checked_file(str(file), file.stat().st_mode) for file in _saved_dataset(Path(name))]
    return [_checked_file(name, mode)]


def _checked_file(name: str, mode: int) -> str:
    if not stat.S_ISREG(mode):  # it is read twice, and a pipe may never end
        raise SourceError("not a regular file", where=name, expected=READABLE, hint="write it to a file first")
    if LONE_SURROGATE.search(name):
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise SourceError("the file's name is not UTF-8", where=shown, expected="a name that text can hold")
    return name


def _saved_dataset(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote."""
    splits = _json_of(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list) and splits:
        hint = " or ".join(f"path: {folder / str(split)}" for split in splits)
        raise SourceError("a dataset of several splits", where=str(folder), expected="one split", hint=hint)
    state = _json_of(folder / "state.json")
    parts = state.get("_data_files")
    if not isinstance(parts, list) or not parts:
        hint = f"name its files: {folder}/*.jsonl"
        raise SourceError("a directory, not a file", where=str(folder), expected=READABLE, hint=hint)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        hint = "load it, and save what flatten_indices() gives"
        raise SourceError("a selection of rows that are not in order", where=str(folder), expected="rows", hint=hint)
    files = [folder / str(part.get("filename")) for part in parts if isinstance(part, dict)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise SourceError("no such file", where=str(missing), expected="what state.json names")
    return files


def _json_of(path: Path) -> dict[str, Any]:
    """An object in a file; without entries where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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


def scorers_say(path: str) -> str:
    """What scorers say of tables of theirs in which nothing is: "" where a path or glob names others."""
    folder = Path(path).parent
    if folder.name not in (SCORED, VERDICTS):
        return ""
    documents = [_json_of(file) for file in sorted((folder.parent / SCORERS).glob("*.json"))]
    said = [str(line) for document in documents for line in document.get("advice", [])]
    return "; ".join(said)


def is_chat_source(source: SourceConfig) -> bool:
    """Whether the first readable row of a source holds messages."""
    form = format_of(source)
    rows = (row.value for path in expand(source.path) for row in read_rows(path) if row.reason is None)
    first = next(rows, None)
    return first is not None and form.is_chat(first, source.columns)


def format_of(source: SourceConfig) -> Format:
    """The format of a source that names one, reading labels as the source says."""
    assert source.format is not None, "with_formats has filled it in"
    form = FORMATS[source.format]
    if source.labels is None:
        return form
    return form._replace(read=with_labels(source.labels.a, source.labels.b, source.labels.tie))


def load_source(source: SourceConfig, kind: Kind) -> Loaded:
    """All of a source in memory; what `read_source` says of it holds here."""
    blocks = [*read_source(source, kind)]
    records, rejects = (pl.concat([getattr(block, name) for block in blocks]) for name in ("records", "rejects"))
    return Loaded(records, rejects, [block.file for block in blocks if block.file is not None])


def read_source(source: SourceConfig, kind: Kind) -> Iterator[Block]:
    """Read all files of a source, block by block.

    Returns:
        records with their text columns in the dataset's kind, `source`, `source_row`; rejects as in format.REJECTS;
        each file ends with a block that has its `file`.

    Raises:
        SourceError: a file is missing, unreadable, or changed while it was read.
    """
    paths = expand(source.path)
    sizes = [Path(path).stat().st_size for path in paths]
    done = 0
    for path, size in zip(paths, sizes, strict=True):
        with unchanged(path):
            for block in _read_file(path, source, kind):
                here = None if block.share is None else (done + size * block.share) / max(sum(sizes), 1)
                yield block._replace(share=here)
        done += size


def _read_file(path: str, source: SourceConfig, kind: Kind, *, fast: bool = True) -> Iterator[Block]:
    reading = Reading(format_of(source), source.columns, kind, source.annotator)
    digest, rows = source_sha256(path), 0
    last: Block | None = None
    position = Position()
    for found in check_chunks(path, read_chunks(path, position), reading, fast=fast):
        if last is not None:
            yield last
        rows += found.rows
        last = Block(found.records, found.rejects, None, position.share)
    assert last is not None, "a file without rows gives an empty block"
    yield last._replace(file=SourceFile(path, digest, rows))


@contextlib.contextmanager
def unchanged(path: str) -> Iterator[None]:
    """A file that changes meanwhile is an error, and the reason for any other error in it."""
    before = _state(path)
    failed: SourceError | None = None
    try:
        yield
    except SourceError as error:
        failed = error
    if _state(path) != before:
        raise SourceError(CHANGED, where=path, hint="run the same command again")
    if failed is not None:
        raise failed


def _state(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where it is gone."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
