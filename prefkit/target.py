"""TARGET of a command: a dataset directory (its manifest holds the settings) or a pipeline file."""

from collections.abc import Sequence
from pathlib import Path

from prefkit.config import Pipeline, load_pipeline, pipeline_from_manifest
from prefkit.errors import ConfigError
from prefkit.store import read_manifest


def pipeline_of(target: str, changes: Sequence[str] = ()) -> Pipeline:
    """The settings of a TARGET, changed by `--set`.

    Raises:
        ConfigError: there is nothing of that name, or a setting does not fit.
        DatasetError: the directory holds no finished dataset.
    """
    if Path(target).is_dir():
        return pipeline_from_manifest(read_manifest(Path(target))["pipeline"], target, changes)
    if not Path(target).exists():
        known = "a dataset directory, or a pipeline file"
        raise ConfigError("no such dataset and no such pipeline file", where=target, expected=known)
    return load_pipeline(target, changes)
