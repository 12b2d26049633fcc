"""A pipeline file is read and checked. What does not fit is an error that names the line.

Comes in: a YAML file, and changes: `section.key=value` as `--set` takes them, or a mapping from key to value. Goes out:
a `Pipeline` (settings.py), or a `ConfigError` that names file, line, key, what was expected and the nearest known key.
Config stops at the entry functions; all below take values.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import yaml
from pydantic import BaseModel, ValidationError

from prefkit.build_settings import DecontaminateConfig, PairsConfig, RewriteRule, SourceConfig
from prefkit.errors import ConfigError, InputError
from prefkit.format import MANIFEST, Kind
from prefkit.records import LONE_SURROGATE
from prefkit.sample_settings import EvaluateConfig, PromptsConfig, SampleConfig, ScoreConfig
from prefkit.sections import Section
from prefkit.settings import Pipeline
from prefkit.train_settings import PrecomputeConfig, TrainConfig

__all__ = [
    "Changes",
    "DecontaminateConfig",
    "PairsConfig",
    "Pipeline",
    "PrecomputeConfig",
    "RewriteRule",
    "Sections",
    "SourceConfig",
    "TrainConfig",
    "change_pipeline",
    "load_pipeline",
    "load_sections",
    "pipeline_from_manifest",
    "require_model",
]

Path_ = tuple[str | int, ...]
Changes: TypeAlias = Sequence[str] | Mapping[str, Any]


class Sections(Section):
    """The sections that a command without a pipeline file can have."""

    kind: Kind | None = None
    precompute: PrecomputeConfig = PrecomputeConfig()
    sample: SampleConfig | None = None
    score: ScoreConfig | None = None
    evaluate: EvaluateConfig | None = None


class Change(NamedTuple):
    """One setting that is changed: its dotted key, and the new value."""

    key: str
    value: Any


def load_pipeline(path: str | Path, changes: Changes = (), **overrides: Any) -> Pipeline:
    """Read a pipeline file, change settings of it, and check all of it.

    Args:
        path: the YAML file.
        changes: settings by their dotted keys: `{"train.beta": 0.05}`, or as the command line takes them,
            `["train.beta=0.05"]`, where values are read as YAML. A whole section replaces what the file says of it.
        overrides: top-level keys that a command's own option replaces, None for "not given".

    Returns:
        all settings, frozen, with their defaults.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value does not fit; file, line and key are named.

    Example:
        pipeline = prefkit.load_pipeline("demo/pipeline.yaml", {"train.beta": 0.05})
        print(pipeline.dataset, pipeline.train.beta)
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the pipeline file: {reason}", where=str(path)) from None
    settings, lines = _parse(text, str(path))
    settings |= {key: value for key, value in overrides.items() if value is not None}
    return _checked(settings, read_changes(changes), str(path), lines)


def read_changes(changes: Changes) -> list[Change]:
    """Changes in one form, in their order.

    Raises:
        ConfigError: one is no `section.key=value`, or its value no YAML.
    """
    if isinstance(changes, str):
        changes = [changes]
    if not isinstance(changes, Mapping):
        return [_read_change(change) for change in changes]
    values = (os.fspath(value) if isinstance(value, os.PathLike) else value for value in changes.values())
    return [Change(str(key).strip(), value) for key, value in zip(changes, values, strict=True)]


def _read_change(change: str) -> Change:
    key, equals, value = str(change).partition("=")
    if not equals or key.strip().rpartition(".")[2] == "":
        raise ConfigError(f"--set {change} is not a change", expected="section.key=value", hint="--set train.beta=0.05")
    try:
        return Change(key.strip(), yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is no YAML", expected="section.key=value") from None


def change_pipeline(pipeline: Pipeline, changes: Changes) -> Pipeline:
    """Another pipeline, of the same settings but for some.

    Args:
        pipeline: stays as it is.
        changes: as in `load_pipeline`.

    Raises:
        ConfigError: a key or value does not fit.
    """
    made = read_changes(changes)
    # what was left out stays so, which some settings ask for; but for precompute, where `_saying` tells the two apart
    settings = pipeline.model_dump(mode="json", by_alias=True, exclude_unset=True)
    settings["precompute"] = pipeline.precompute.model_dump(mode="json")
    return _saying(_checked(settings, made, "the pipeline", {}), pipeline.precompute.model_fields_set | _told(made))


def pipeline_from_manifest(settings: Mapping[str, Any], dataset: str, changes: Changes = ()) -> Pipeline:
    """The pipeline that a dataset was built with, changed by `--set`.

    The manifest resolves every default, so only what `changes` say of precompute counts as said on purpose there
    (`model_fields_set`): the gate compares that with the reference.
    """
    made = read_changes(changes)
    return _saying(_checked(dict(settings) | {"dataset": dataset}, made, f"{dataset}/{MANIFEST}", {}), _told(made))


def load_sections(settings: Mapping[str, Any], changes: Changes = ()) -> Sections:
    """Settings of a command that needs no pipeline file, from its options and `--set`.

    Args:
        settings: sections by name, as a pipeline file has them.
        changes: as in `load_pipeline`.

    Raises:
        ConfigError: a key or value does not fit.
    """
    values = json.loads(json.dumps(settings))
    made = read_changes(changes)
    for change in made:
        _apply(values, change)
    if (key := _half_a_character(values)) is not None:
        raise ConfigError(f"{_dotted(key)} holds half a character (a lone surrogate)", where="--set")
    try:
        return Sections.model_validate(values)
    except ValidationError as error:
        raise _explain(error, "the settings", {}, made) from None


def _told(changes: Sequence[Change]) -> set[str]:
    """The keys of the precompute section that are changed."""
    told: set[str] = set()
    for key, value in changes:
        section, *inner = key.split(".")
        if section == "precompute":
            told |= set(inner or (value or {}))
    return told


def _saying(pipeline: Pipeline, told: set[str]) -> Pipeline:
    """The same pipeline, with only these keys of the precompute section said on purpose."""
    precompute = PrecomputeConfig.model_construct(told, **dict(pipeline.precompute))
    return pipeline.model_copy(update={"precompute": precompute})


def _checked(settings: dict[str, Any], changes: Sequence[Change], name: str, lines: Mapping[Path_, int]) -> Pipeline:
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


def _apply(settings: dict[str, Any], change: Change) -> None:
    *sections, last = change.key.split(".")
    target: Any = settings
    for depth, section in enumerate(sections, start=1):
        if target.get(section) is None:
            target[section] = {}
        elif isinstance(target[section], str) and _is_prompts(sections[:depth]):
            target[section] = {"path": target[section]}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {change.key}: {section} is not a section", expected="section.key=value")
    target[last] = change.value


def _is_prompts(path: Sequence[str]) -> bool:
    """Whether a key is one of prompts, where a path alone is short for {path: ...}."""
    try:
        return _section(tuple(path)) is PromptsConfig and _section(tuple(path[:-1])) is not PromptsConfig
    except KeyError:  # no key at all, which is refused elsewhere
        return False


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


def _explain(error: ValidationError, name: str, lines: Mapping[Path_, int], changes: Sequence[Change]) -> ConfigError:
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
        hint = f"--set {_dotted(loc)}=FILE" if _is_prompts([str(step) for step in loc]) else ""
        return ConfigError(f"key {_dotted(loc)} is missing", where=where, expected=_doc_of(loc), hint=hint)
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        named = any(change.key in message for change in changes)  # of two keys that do not agree
        return ConfigError(message, where="--set" if named else where)
    got = f"{_dotted(loc)} = {problem['input']!r}"
    return ConfigError(f"{got} does not fit", where=where, expected=_plain(problem["msg"]))


def _from_change(path: Path_, changes: Iterable[Change]) -> bool:
    changed = {change.key for change in changes}
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
