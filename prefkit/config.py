"""A pipeline file is read and checked. What does not fit is an error that names the line.

Comes in: a YAML file and `--set section.key=value` changes. Goes out: a `Pipeline` (settings.py), or a `ConfigError`
that names file, line, key, what was expected and the nearest known key. Config stops at the entry functions; all below
take values.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from prefkit.build_settings import DecontaminateConfig, PairsConfig, RewriteRule, SourceConfig
from prefkit.errors import ConfigError, InputError
from prefkit.format import MANIFEST
from prefkit.records import LONE_SURROGATE
from prefkit.settings import Pipeline
from prefkit.train_settings import PrecomputeConfig, TrainConfig

__all__ = [
    "DecontaminateConfig",
    "PairsConfig",
    "Pipeline",
    "PrecomputeConfig",
    "RewriteRule",
    "SourceConfig",
    "TrainConfig",
    "load_pipeline",
    "pipeline_from_manifest",
    "require_model",
]

Path_ = tuple[str | int, ...]


def load_pipeline(path: str | Path, changes: Sequence[str] = (), **overrides: Any) -> Pipeline:
    """Read a pipeline file, apply `section.key=value` changes, and check all of it.

    Args:
        path: the YAML file.
        changes: as given to `--set`; values are read as YAML.
        overrides: top-level keys that a command's own option replaces, None for "not given".

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value does not fit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the pipeline file: {reason}", where=str(path)) from None
    settings, lines = _parse(text, str(path))
    settings |= {key: value for key, value in overrides.items() if value is not None}
    return _checked(settings, changes, str(path), lines)


def pipeline_from_manifest(settings: Mapping[str, Any], dataset: str, changes: Sequence[str] = ()) -> Pipeline:
    """The pipeline that a dataset was built with, changed by `--set`.

    The manifest resolves every default, so only what `changes` say of precompute counts as said on purpose there
    (`model_fields_set`): the gate compares that with the reference.
    """
    pipeline = _checked(dict(settings) | {"dataset": dataset}, changes, f"{dataset}/{MANIFEST}", {})
    told: set[str] = set()
    for change in changes:
        key, _, value = change.partition("=")
        section, *inner = key.strip().split(".")
        if section == "precompute":
            told |= set(inner or (yaml.safe_load(value) or {}))
    precompute = PrecomputeConfig.model_construct(told, **dict(pipeline.precompute))
    return pipeline.model_copy(update={"precompute": precompute})


def _checked(settings: dict[str, Any], changes: Sequence[str], name: str, lines: Mapping[Path_, int]) -> Pipeline:
    for change in changes:
        _apply(settings, change)
    if (key := _half_a_character(settings)) is not None:
        raise ConfigError(f"{_dotted(key)} holds half a character (a lone surrogate)", where=_place(name, lines, key))
    try:
        return Pipeline.model_validate(settings)
    except ValidationError as error:
        raise _explain(error, name, lines, changes) from None


def _half_a_character(value: Any, path: Path_ = ()) -> Path_ | None:
    """Where a text cannot be written as UTF-8; None where there is none."""
    if isinstance(value, str):
        return path if LONE_SURROGATE.search(value) else None
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return next((at for key, one in inner if (at := _half_a_character(one, (*path, key))) is not None), None)


def _place(name: str, lines: Mapping[Path_, int], key: Path_) -> str:
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    return f"{name}:{line}" if line else name


def _apply(settings: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {change} is not a change", expected="section.key=value", hint="--set train.beta=0.05")
    target: Any = settings
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {key}: {section} is not a section", expected="section.key=value")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is no YAML", expected="section.key=value") from None


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    """The settings, and the line of every key; a key given twice is an error, not a silent winner."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        settings = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError("nested without end", where=name) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"no YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    if not isinstance(settings, dict):
        raise ConfigError("no pipeline", where=name, expected="keys dataset, sources, ...")
    lines: dict[Path_, int] = {}
    try:
        _lines_of(node, (), lines, name)
    except RecursionError:
        raise ConfigError("an alias contains itself", where=name) from None
    return settings, lines


def _lines_of(node: Any, path: Path_, lines: dict[Path_, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            if here in lines:
                raise ConfigError(f"key {_dotted(here)} is given twice", where=f"{name}:{key.start_mark.line + 1}")
            lines[here] = key.start_mark.line + 1
            _lines_of(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _lines_of(value, (*path, index), lines, name)


def _explain(error: ValidationError, name: str, lines: Mapping[Path_, int], changes: Sequence[str]) -> ConfigError:
    """The first problem as a sentence, with its line and the nearest known key."""
    problems = error.errors(include_url=False)
    # a misspelt key first: the key that is missing is then mostly the same one
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path: Path_ = tuple(problem["loc"])
    while path and path not in lines and problem["type"] != "missing" and not _from_change(path, changes):
        path = path[:-1]  # pydantic adds the union member that it tried
    loc = path or tuple(problem["loc"])
    where = "--set" if _from_change(loc, changes) else _place(name, lines, loc)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {_dotted((*loc[:-1], near[0]))}?" if near else ""
        return ConfigError(f"unknown key {_dotted(loc)}", where=where, expected="one of " + ", ".join(known), hint=hint)
    if problem["type"] == "missing":
        return ConfigError(f"key {_dotted(loc)} is missing", where=where, expected=_doc_of(loc))
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        named = any(change.partition("=")[0].strip() in message for change in changes)  # of two keys that do not agree
        return ConfigError(message, where="--set" if named else where)
    got = f"{_dotted(loc)} = {problem['input']!r}"
    return ConfigError(f"{got} does not fit", where=where, expected=_plain(problem["msg"]))


def _from_change(path: Path_, changes: Iterable[str]) -> bool:
    changed = {change.partition("=")[0].strip() for change in changes}
    return _dotted(path) in changed or any(key.startswith(f"{_dotted(path)}.") for key in changed if path)


def _plain(message: str) -> str:
    """Pydantic's message without its lead-in: `Input should be X` becomes `X`."""
    return message.removeprefix("Input should be ").removeprefix("a valid ")


def _dotted(path: Path_) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _section(path: Path_) -> type[BaseModel]:
    model: type[BaseModel] = Pipeline
    for step in path:
        if isinstance(step, str):
            fields = {field.alias or key: field for key, field in model.model_fields.items()}
            inside = [fields[step].annotation, *get_args(fields[step].annotation)]
            inner = [a for b in inside for a in (b, *get_args(b))]
            model = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return model


def _known_keys(path: Path_) -> list[str]:
    return [field.alias or key for key, field in _section(path).model_fields.items()]


def _doc_of(path: Path_) -> str:
    fields = {field.alias or key: field for key, field in _section(path[:-1]).model_fields.items()}
    return fields[str(path[-1])].description or "" if str(path[-1]) in fields else ""


def require_model(model: str | None, key: str) -> str:
    """The model folder of a setting, or an error that names the key to set."""
    if model is None:
        raise InputError(
            f"{key} is not set",
            expected="the folder of a model",
            hint=f"--model FOLDER, or {key} in the pipeline",
        )
    return model
