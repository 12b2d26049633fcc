"""Sources that are added to a dataset: what lies there stays as it is, and only they are read.

Comes in: a pipeline and the directory it writes. Goes out: the dataset that lies there, if it was built of some of the
pipeline's sources, byte for byte, and otherwise alike; and the sources that it does not hold.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit import __version__
from prefkit.assembly import Base
from prefkit.config import Pipeline, SourceConfig
from prefkit.drafts import files_of
from prefkit.errors import DatasetError
from prefkit.format import FORMAT_VERSION, MANIFEST, Kind
from prefkit.sources import expand, source_sha256
from prefkit.store import newer_format, read_manifest
from prefkit.tables import check_parts


def base_of(dataset: Path, pipeline: Pipeline, kind: Kind, tell: Callable[[str], None]) -> Base | None:
    """The finished dataset that lies there, if it is of the same settings and of some or all of the same sources.

    Where it is not, a person is told why all is built anew.
    """
    if not (dataset / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(dataset)
        for name, parts in manifest["parts"].items():
            check_parts(dataset / name, parts)
    except DatasetError as error:
        if newer_format(dataset):
            raise
        tell(f"building {dataset} anew: {error.where} {error.message}")
        return None
    why = _why_anew(manifest, {**pipeline.as_manifest(), "kind": kind}, pipeline)
    if why is None:
        return Base(dataset, manifest)
    tell(f"building {dataset} anew, nothing is added to what it holds: {why}")
    return None


def _why_anew(manifest: Mapping[str, Any], wanted: Mapping[str, Any], pipeline: Pipeline) -> str | None:
    """What keeps a dataset from being added to; None where nothing does."""
    if (manifest["format_version"], manifest["prefkit_version"]) != (FORMAT_VERSION, __version__):
        return f"it is of prefkit {manifest['prefkit_version']}"
    if changed := _changed(manifest["pipeline"], wanted):
        return f"{changed} changed"
    earlier, named = ([_read_with(source) for source in of["sources"]] for of in (manifest["pipeline"], wanted))
    for source in earlier:
        if named.count(source) < earlier.count(source):
            return f"the source {source['path']} changed or is gone"
    files = [path for source in earlier_sources(manifest, pipeline) for path in files_of(source)]
    evals = [path for one in pipeline.decontaminate.against for path in expand(one.path)]
    return _changed_file(manifest["sources"], files) or _changed_file(manifest["evals"], evals)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting that makes other tables of the same sources: later steps, memory and the card do not."""
    others = ("sources", "build", "card", "audit", "precompute", "train", "sample", "score", "evaluate")
    for key in sorted({*old, *new} - {*others}):
        one, other = old.get(key), new.get(key)
        if one != other:
            inner = (
                [k for k in one if one[k] != other.get(k)] if isinstance(one, dict) and isinstance(other, dict) else []
            )
            return ".".join([key, *inner[:1]])
    return None


def _changed_file(recorded: Sequence[Mapping[str, Any]], files: Sequence[str]) -> str | None:
    """The first file that is not as a manifest has it, byte for byte, or that it does not have at all."""
    known = {file["path"]: file["sha256"] for file in recorded}
    for path in files:
        if path not in known:
            return f"{path} is a new file of a source that it holds"
        if known[path] != source_sha256(path):
            return f"{path} changed"
    gone = sorted({*known} - {*files})
    return f"{gone[0]} is gone" if gone or len(recorded) != len(files) else None


def earlier_sources(manifest: Mapping[str, Any], pipeline: Pipeline) -> list[SourceConfig]:
    """The sources of the pipeline that a dataset was built of, in its order."""
    return _sorted_out(manifest, pipeline)[0]


def added_sources(base: Base, pipeline: Pipeline) -> list[SourceConfig]:
    """The sources of the pipeline that the base does not hold."""
    return _sorted_out(base.manifest, pipeline)[1]


def licensed(base: Base, pipeline: Pipeline) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the manifest holds of the base's sources, settings and files, with the licenses that the pipeline names."""
    sources = earlier_sources(base.manifest, pipeline)
    licenses = {path: source.license for source in reversed(sources) for path in files_of(source)}
    files = [file | {"license": licenses[file["path"]]} for file in base.manifest["sources"]]
    return [source.model_dump(mode="json") for source in sources], files


def _sorted_out(manifest: Mapping[str, Any], pipeline: Pipeline) -> tuple[list[SourceConfig], list[SourceConfig]]:
    left, earlier = [*pipeline.sources], []
    for settings in manifest["pipeline"]["sources"]:
        source = next(source for source in left if _read_with(source.model_dump(mode="json")) == _read_with(settings))
        left.remove(source)
        earlier.append(source)
    return earlier, left


def _read_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a source that decide its rows: all but its license."""
    return {key: value for key, value in settings.items() if key != "license"}
