"""TARGET of a command: a dataset directory (its manifest holds the settings) or a pipeline file."""

from pathlib import Path
from typing import TypeAlias

from prefkit.config import (
    Changes,
    Pipeline,
    Sections,
    change_pipeline,
    load_pipeline,
    load_sections,
    pipeline_from_manifest,
    read_changes,
)
from prefkit.errors import ConfigError, InputError
from prefkit.store import read_manifest

Target: TypeAlias = str | Path | Pipeline


def pipeline_of(target: Target, changes: Changes = ()) -> Pipeline:
    """The settings of a target, changed.

    Args:
        target: a dataset directory, a pipeline file, or a pipeline that is loaded already.
        changes: settings by their dotted keys, as in `load_pipeline`.

    Returns:
        all settings. Of a dataset, those that it was built with; paths in them are relative to the working directory.

    Raises:
        ConfigError: there is nothing of that name, or a setting does not fit.
        DatasetError: the directory holds no finished dataset.

    Example:
        pipeline = prefkit.pipeline_of("demo/dataset", {"audit.ngrams": 2})
        print(prefkit.audit_dataset(pipeline).verdict)
    """
    if isinstance(target, Pipeline):
        return change_pipeline(target, changes) if changes else target
    path = path_of(target, "a dataset directory, a pipeline file, or a Pipeline")
    if path.is_dir():
        return pipeline_from_manifest(read_manifest(path)["pipeline"], str(target), changes)
    if not path.exists():
        known = "a dataset directory, or a pipeline file"
        raise ConfigError("no such dataset and no such pipeline file", where=str(target), expected=known)
    return load_pipeline(path, changes)


def sampling_of(target: str | Path, changes: Changes = ()) -> Pipeline | Sections:
    """The settings of `prefkit sample`: of a pipeline, or of a file of prompts and its options.

    Args:
        target: a pipeline file, a file or glob of prompts, or a dataset: its own settings, or where sample.out is among
            the changes, its prompts.
        changes: settings by their dotted keys.

    Raises:
        ConfigError: a setting is missing or does not fit.
        DatasetError: the directory holds no finished dataset.
        InputError: a dataset's prompts are to be answered, and nothing says where.
    """
    path = path_of(target, "a pipeline file, or a file of prompts")
    has_out = any(key == "sample.out" for key, _ in read_changes(changes))
    if path.is_dir() and not has_out and read_manifest(path)["pipeline"].get("sample") is None:
        raise InputError("nothing says where its responses go", where=str(target), expected="--out DIR")
    if path.suffix.lower() in (".yaml", ".yml") or (path.is_dir() and not has_out):
        return pipeline_of(path, changes)
    return load_sections({"sample": {"prompts": {"path": str(target)}}}, changes)


def evaluating_of(target: str | Path, changes: Changes = ()) -> Pipeline | Sections:
    """The settings of `prefkit evaluate`: of a pipeline, or of a model or run and the command's options.

    Args:
        target: a pipeline file, or the folder of a model or of a run.
        changes: settings by their dotted keys.

    Raises:
        ConfigError: a setting is missing or does not fit.
    """
    path = path_of(target, "a model, a run, or a pipeline file")
    if path.suffix.lower() in (".yaml", ".yml"):
        return load_pipeline(path, changes)
    return load_sections({"evaluate": {}}, changes)


def path_of(value: object, expected: str) -> Path:
    """A path that was handed in.

    Raises:
        InputError: it is of another type, or holds a null character, which no system lets a path hold.
    """
    if isinstance(value, (str, Path)):
        if "\0" in str(value):
            raise InputError("a path cannot hold a null character", where=repr(str(value)), expected=expected)
        return Path(value)
    raise InputError(f"a path cannot be a value of type {type(value).__name__}", expected=expected)
