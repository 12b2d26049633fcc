"""Sources that are added to a dataset: what lies there stays as it is, and only they are read.

Comes in: a pipeline and the directory it writes. Goes out: the dataset that lies there, if it was built of some of the
pipeline's sources, byte for byte, and otherwise alike; and the sources that it does not hold.
"""

from collections.abc import Mapping, Sequence
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


def base_of(dataset: Path, pipeline: Pipeline, kind: Kind) -> Base | None:
    """The finished dataset that lies there, if it is of the same settings and of some or all of the same sources."""
    if not (dataset / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(dataset)
        for name, parts in manifest["parts"].items():
            check_parts(dataset / name, parts)
    except DatasetError:
        if newer_format(dataset):
            raise
        return None  # torn or damaged: it is built anew
    wanted = {**pipeline.as_manifest(), "kind": kind}
    built_by = (manifest.get("format_version"), manifest.get("prefkit_version"))
    if built_by != (FORMAT_VERSION, __version__) or not _same_data_settings(manifest["pipeline"], wanted):
        return None
    earlier = manifest["pipeline"]["sources"]
    if not all(wanted["sources"].count(source) >= earlier.count(source) for source in earlier):
        return None
    base = Base(dataset, manifest)
    files = [path for source in earlier_sources(base, pipeline) for path in files_of(source)]
    evals = [path for one in pipeline.decontaminate.against for path in expand(one.path)]
    same = _unchanged(manifest["sources"], files) and _unchanged(manifest["evals"], evals)
    return base if same else None


def _unchanged(recorded: Sequence[Mapping[str, Any]], files: Sequence[str]) -> bool:
    """Whether files are those that a manifest names, byte for byte."""
    return [(file["path"], file["sha256"]) for file in recorded] == [(path, source_sha256(path)) for path in files]


def earlier_sources(base: Base, pipeline: Pipeline) -> list[SourceConfig]:
    """The sources of the pipeline that the base was built of, in its order."""
    by_settings = [(source.model_dump(mode="json"), source) for source in pipeline.sources]
    return [
        next(source for settings, source in by_settings if settings == one)
        for one in base.manifest["pipeline"]["sources"]
    ]


def added_sources(base: Base, pipeline: Pipeline) -> list[SourceConfig]:
    """The sources of the pipeline that the base does not hold."""
    left = [*base.manifest["pipeline"]["sources"]]
    new = []
    for source in pipeline.sources:
        if (settings := source.model_dump(mode="json")) in left:
            left.remove(settings)
        else:
            new.append(source)
    return new


def _same_data_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two pipelines build the same tables of the same sources: later steps and memory do not touch them."""
    others = ("sources", "build", "audit", "precompute", "train")
    return {k: v for k, v in old.items() if k not in others} == {k: v for k, v in new.items() if k not in others}
