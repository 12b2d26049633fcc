"""Read and write what format.py describes: atomic files, one writer at a time, the manifest last.

Comes in: frames and settings. Goes out: a dataset directory that any Parquet reader opens. A file is written beside its
place and renamed, so a kill leaves either the old one or the new one, never half of one.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prefkit.documents import Manifest
from prefkit.errors import DatasetError, PrefkitError, no_room
from prefkit.format import (
    AUDIT_JSON,
    CARD,
    FORMAT_VERSION,
    LOCK,
    MANIFEST,
    REFERENCE_JSON,
    REFERENCES,
    RUNS,
    SAMPLED,
    SWEEPS,
    VIEWS,
)
from prefkit.views import AUDIT_VIEWS, MANIFEST_VIEWS, REFERENCE_VIEWS, VIEW_FILES, views_sql

OWN_NAMES = {MANIFEST, CARD, VIEWS, LOCK, "pairs", "dropped", "rejects", "changes", "audit"}
OWN_NAMES |= {REFERENCES, RUNS, SAMPLED, SWEEPS}
BUILDING, DRAFTS = ".building", ".drafts"  # what a build makes before it is finished
SCRATCH = ".candidates-"  # how folders in DRAFTS begin that only one process uses
NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT)


REMAKE = "prefkit build, or prefkit precompute, makes it again"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed over it when the block ends well, removed when it does not.

    A symlink stays one: what it names is written.

    Raises:
        MachineError: the disk is full.
        DatasetError: the folder cannot be written to; or a device or a pipe is there, which a rename would replace.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file() and not path.is_dir():
                expected = "a file, or a name that is free"
                raise DatasetError("a device or a pipe, which cannot be replaced", where=str(path), expected=expected)
            yield beside
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def as_write_error(error: Exception, path: Path) -> Exception:
    """What a failed write means: the disk is full, the folder may not be written to, or the error as it is."""
    if (full := no_room(error, str(path))) is not None:
        return full
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        hint = "make it writable, or choose another directory (dataset:, --out)"
        return DatasetError(f"cannot be written: {error.strerror}", where=str(path), hint=hint)
    return error


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Whatever fails to be written in the block is an error that names `path`.

    Raises:
        MachineError: the disk is full.
        DatasetError: the place cannot be written to.
    """
    try:
        yield
    except PrefkitError:
        raise
    except Exception as error:
        meant = as_write_error(error, path)
        if meant is error:
            raise
        raise meant from None


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; renamed over it when the block ends well, removed when it fails.

    Raises:
        MachineError: the disk is full.
        DatasetError: the folder cannot be written to.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with written(path):
            shutil.rmtree(beside, ignore_errors=True)  # of an earlier kill
            beside.mkdir(parents=True)
            yield beside
            shutil.rmtree(path, ignore_errors=True)
            beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, readable and with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, hint: str = REMAKE) -> dict[str, Any]:
    """Read a JSON object that prefkit wrote; `hint` says how it is made again.

    Raises:
        DatasetError: it is missing, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError("is missing", where=str(path), hint=hint) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot be read: {error}", where=str(path), hint=hint) from None
    if not isinstance(value, dict):
        raise DatasetError("is no JSON object", where=str(path), hint=hint)
    return value


def newer_format(dataset: Path) -> bool:
    """Whether a newer prefkit wrote this dataset, or what no prefkit has: nothing is read, let alone written over."""
    try:
        version = json.loads((dataset / MANIFEST).read_text(encoding="utf-8"))["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return type(version) is not int or version > FORMAT_VERSION  # true is an int to Python


def read_document(path: Path, document: type[BaseModel], hint: str = REMAKE) -> dict[str, Any]:
    """One of the JSON documents of documents.py, checked against its model, as a plain dict.

    Raises:
        DatasetError: it is missing, no JSON, or not what it should be, by field.
    """
    value = read_json(path, hint)
    try:
        document.model_validate(value)
    except ValidationError as error:
        field = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise DatasetError(f"is damaged at {field}", where=str(path), hint=hint) from None
    return value


def read_manifest(dataset: Path) -> dict[str, Any]:
    """The manifest of a finished dataset of a format version this prefkit knows.

    Raises:
        DatasetError: no directory, no manifest (an unfinished build), or another format version.
    """
    if dataset.is_file():
        hint = "the directory that a pipeline file names under dataset:"
        raise DatasetError("is a file", where=str(dataset), expected="a dataset directory", hint=hint)
    if not dataset.is_dir():
        raise DatasetError("no such dataset", where=str(dataset), hint="prefkit build PIPELINE.yaml")
    if not (dataset / MANIFEST).exists():
        what = "an unfinished build" if (dataset / LOCK).exists() else "not a prefkit dataset"
        raise DatasetError(
            f"{what}: there is no {MANIFEST}",
            where=str(dataset),
            hint="prefkit build PIPELINE.yaml finishes or makes it",
        )
    manifest = read_json(dataset / MANIFEST)
    version = manifest.get("format_version")
    if "format_version" in manifest and type(version) is not int:
        raise DatasetError(
            f"format_version is no whole number: {json.dumps(version)[:40]}",
            where=str(dataset / MANIFEST),
            expected=str(FORMAT_VERSION),
            hint="have it copied or downloaded anew: no prefkit writes that",
        )
    if newer_format(dataset):
        raise DatasetError(
            f"format_version is {version}",
            where=str(dataset / MANIFEST),
            expected=f"at most {FORMAT_VERSION}: use a newer prefkit",
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise DatasetError(
            f"format_version is {version}, of an older prefkit",
            where=str(dataset / MANIFEST),
            expected=str(FORMAT_VERSION),
            hint="prefkit build PIPELINE.yaml makes it again; its reference and runs stay",
        )
    return read_document(dataset / MANIFEST, Manifest)


def dataset_around(path: Path) -> Path | None:
    """The dataset that a path is, or lies in."""
    here = path.resolve()
    return next((at for at in (here, *here.parents) if (at / MANIFEST).is_file() and (at / "pairs").is_dir()), None)


def claim_directory(dataset: Path) -> None:
    """Make sure that a build may write here: an absent, empty or own directory.

    Raises:
        DatasetError: a file, or a directory that holds something that is not ours.
    """
    if dataset.exists() and not dataset.is_dir():
        raise DatasetError("is a file", where=str(dataset), expected="a directory that prefkit may write")
    left_by_a_kill = {BUILDING, DRAFTS, *(f".{name}.tmp" for name in (MANIFEST, CARD, VIEWS))}
    foreign = sorted({path.name for path in dataset.glob("*")} - OWN_NAMES - left_by_a_kill) if dataset.exists() else []
    own = (
        not dataset.exists() or (dataset / MANIFEST).exists() or (dataset / LOCK).exists() or not any(dataset.iterdir())
    )
    if foreign or not own:
        named = ", ".join(foreign[:3]) or "files that no build wrote"
        raise DatasetError(
            f"is not a dataset of prefkit: it holds {named}", where=str(dataset), hint="choose another --out"
        )


@contextlib.contextmanager
def built_beside(dataset: Path) -> Iterator[Path]:
    """A folder to build in, swapped in when the block ends well; until then the old dataset stays as it is.

    The old manifest goes first and the new one comes last: in between the dataset is unfinished. audit/ derives from
    the pairs and goes; reference/ and runs/ stay.
    """
    beside = dataset / BUILDING
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:  # Ctrl-C too
        shutil.rmtree(beside, ignore_errors=True)  # nobody uses half of it, and it takes room
        raise
    (dataset / MANIFEST).unlink(missing_ok=True)
    swap_in(dataset)


def half_swapped(dataset: Path) -> bool:
    """Whether a kill came after the old manifest went and before the new one came: the new dataset lies there whole."""
    return (dataset / BUILDING / MANIFEST).exists() and not (dataset / MANIFEST).exists()


def swap_in(dataset: Path) -> None:
    """Put what was built beside a dataset in its place, or the rest of it; the manifest, written last, comes last."""
    beside = dataset / BUILDING
    shutil.rmtree(dataset / "audit", ignore_errors=True)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.is_dir():
            shutil.rmtree(dataset / path.name, ignore_errors=True)
        path.replace(dataset / path.name)
    clear_left_behind(dataset)


def left_behind(dataset: Path) -> bool:
    """Whether a build that was killed after its manifest left something that only an unfinished one needs."""
    lock = dataset / LOCK
    return any((dataset / name).exists() for name in (BUILDING, DRAFTS)) or (lock.exists() and lock.stat().st_size > 0)


def clear_left_behind(dataset: Path) -> None:
    """Remove it; whoever holds the lock empties its file."""
    for name in (BUILDING, DRAFTS):
        shutil.rmtree(dataset / name, ignore_errors=True)


def clear_scratch(dataset: Path) -> None:
    """Remove what a build that was killed had no time to; for the one that holds the lock. Finished drafts stay."""
    for folder in (dataset / DRAFTS).glob(f"{SCRATCH}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_views(dataset: Path, manifest: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> None:
    """Write views.sql for the files there are by now, and for those of a reference.json that is about to be written."""
    write_text(dataset / VIEWS, views_sql(manifest["kind"], view_files(dataset, manifest, reference)))


def view_files(
    dataset: Path, manifest: Mapping[str, Any], reference: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """The files of each view, below the dataset: those that the manifest, the audit or a finished reference lists.

    Of runs: those there are.
    """
    listed = {key: _read_or_nothing(dataset / REFERENCES / key / REFERENCE_JSON) for key in list_references(dataset)}
    listed |= {reference["key"]: reference} if reference else {}
    references = {key: _reference_files(recorded) for key, recorded in sorted(listed.items())}
    audited = _audit_files(_read_or_nothing(dataset / AUDIT_JSON))
    found: dict[str, list[str]] = {}
    for view, (table, pattern, _) in VIEW_FILES.items():
        if view in MANIFEST_VIEWS:
            found[view] = [f"{table}/{part['file']}" for part in manifest["parts"].get(table, [])]
        elif view in REFERENCE_VIEWS:
            found[view] = [f"{REFERENCES}/{key}/{file}" for key, files in references.items() for file in files[view]]
        elif view in AUDIT_VIEWS:
            found[view] = [file for file in audited if file == pattern]
        else:
            found[view] = sorted(str(path.relative_to(dataset)) for path in dataset.glob(pattern))
    return found


def list_references(dataset: Path) -> list[str]:
    """The keys of the finished references of a dataset, sorted."""
    return sorted(path.parent.name for path in (dataset / REFERENCES).glob(f"*/{REFERENCE_JSON}"))


def _read_or_nothing(path: Path) -> dict[str, Any]:
    """An audit.json or reference.json, nothing of one that is damaged: whoever reads its tables refuses it by name."""
    try:
        return read_json(path)
    except DatasetError:
        return {}


def _audit_files(document: Mapping[str, Any]) -> list[str]:
    """The tables that an audit lists; none where its audit.json is not there or does not say which.

    A kill leaves tables without it: they may be of other pairs.
    """
    try:
        return [f"audit/{part['file']}" for part in document["parts"]]
    except (KeyError, TypeError):
        return []


def _reference_files(recorded: Mapping[str, Any]) -> dict[str, list[str]]:
    """The files of a reference by view; none where its reference.json does not say which."""
    try:
        files = [part["file"] for part in recorded["parts"]], [recorded["dropped"]["file"]]
    except (KeyError, TypeError):
        files = [], []
    return dict(zip(REFERENCE_VIEWS, files, strict=True))
