"""The values of a sweep's `--set` become its combinations, each a checked pipeline.

Comes in: a pipeline and values of settings by dotted key. Goes out: every combination of them, in order. Only train
settings may vary: all else would need another dataset or another reference.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from prefkit.config import Pipeline
from prefkit.errors import ConfigError, InputError
from prefkit.format import canonical_json
from prefkit.target import Target, pipeline_of

VALUES = "values of train settings, separated by commas"
EXAMPLE = "--set train.beta=0.05,0.1,1,5"
OPEN, CLOSE, QUOTES = "[{(", "]})", "\"'"
# sections whose settings decide more than a run
DECIDES: Mapping[str, str] = {
    "precompute": "a reference of its own",
    "audit": "an audit of its own",
    "evaluate": "measurements that are not of the same kind",
}


class Combination(NamedTuple):
    """One run of a sweep: its settings, and the pipeline with them."""

    number: int  # from 1 on
    settings: dict[str, Any]  # what varies, as the checked settings have it
    pipeline: Pipeline

    @property
    def name(self) -> str:
        """Its settings in a line."""
        return ", ".join(f"{key}={_short(value)}" for key, value in self.settings.items())


def combinations_of(target: Target, grid: Mapping[str, Any] | Sequence[str]) -> list[Combination]:
    """All combinations, each as a checked pipeline.

    Raises:
        ConfigError: one is not sound; or two are the same.
        InputError: nothing varies, or what must not.
    """
    values = read_grid(grid)
    varied = [key for key, listed in values.items() if len(listed) > 1]
    varied = varied or [key for key in values if key.startswith("train.")]
    if not varied:
        raise InputError("nothing to sweep over", where="--set", expected=VALUES, hint=EXAMPLE)
    for key in varied:
        _refuse_key(key, values)
    found: list[Combination] = []
    known: dict[str, str] = {}
    for number, chosen in enumerate(itertools.product(*values.values()), 1):
        changes = dict(zip(values, chosen, strict=True))
        named = ", ".join(f"{key}={_short(changes[key])}" for key in varied)
        try:
            pipeline = pipeline_of(target, changes)
        except ConfigError as error:
            if len(varied) < len(values) or len(values) > 1 or any(len(one) > 1 for one in values.values()):
                error.message = f"combination {number} ({named}): {error.message}"
            raise
        train = pipeline.train.model_dump(mode="json")
        told = canonical_json(train)
        if told in known:
            what = f"two combinations are the same: {known[told]} and {named}"
            raise ConfigError(what, where="--set", expected="values that differ")
        known[told] = named
        found.append(Combination(number, {key: _value_of(train, key) for key in varied}, pipeline))
    return found


def read_grid(grid: Mapping[str, Any] | Sequence[str]) -> dict[str, list[Any]]:
    """Values by dotted key, in the order they were given.

    Example: `["train.beta=0.05,1", "train.lora={r: 8, alpha: 16},null"]` gives two of each.

    Raises:
        ConfigError: one is no `section.key=value`, a value is no YAML or is empty, or a key is given twice.
    """
    if isinstance(grid, str):
        grid = [grid]
    if isinstance(grid, Mapping):
        return {str(key): [*value] if isinstance(value, (list, tuple)) else [value] for key, value in grid.items()}
    found: dict[str, list[Any]] = {}
    for text in grid:
        key, values = _read_values(str(text))
        if key in found:
            raise ConfigError(f"--set {key} is given twice", expected=VALUES, hint=EXAMPLE)
        found[key] = values
    return found


def _read_values(text: str) -> tuple[str, list[Any]]:
    key, equals, listed = text.partition("=")
    key = key.strip()
    if not equals or key.rpartition(".")[2] == "":
        raise ConfigError(f"--set {text} is not a change", expected="section.key=value,value", hint=EXAMPLE)
    parts = split_values(listed)
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ConfigError(f"--set {key}: a value between two commas is empty", expected=VALUES, hint=EXAMPLE)
    try:
        return key, [yaml.safe_load(part) for part in parts]
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: a value is no YAML", expected="section.key=value,value") from None


def split_values(text: str) -> list[str]:
    """The texts between commas that stand in no bracket and in no quotes.

    Example: `{r: 8, alpha: 16},null` gives `{r: 8, alpha: 16}` and `null`.
    """
    parts, depth, quote, begun = [], 0, "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif (sign in QUOTES and not text[begun:place].strip(" \t" + OPEN)) or (sign in QUOTES and depth):
            quote = sign
        elif sign in OPEN:
            depth += 1
        elif sign in CLOSE:
            depth = max(0, depth - 1)
        elif sign == "," and not depth:
            parts.append(text[begun:place])
            begun = place + 1
    return [*parts, text[begun:]]


def _refuse_key(key: str, values: Mapping[str, list[Any]]) -> None:
    """Refuse a key that may not vary.

    Raises:
        InputError: its values would need more than another run.
    """
    section, _, inner = key.partition(".")
    hint = f"one sweep a value of {key}, which then is in --set by itself"
    if section != "train" or not inner:
        needs = DECIDES.get(section, "a dataset of its own")
        what = f"{key} has {len(values[key])} values, and each would need {needs}"
        raise InputError(what, where="--set", expected="several values of train settings alone", hint=hint)
    if inner == "model" and values.get("train.other_reference") != [True]:
        what = f"{key} has {len(values[key])} values, and a reference is of one model"
        raise InputError(
            what, where="--set", expected="one, or --set train.other_reference=true beside them", hint=hint
        )


def _value_of(train: Mapping[str, Any], key: str) -> Any:
    """What the checked train section holds under a dotted key."""
    value: Any = train
    for step in key.split(".")[1:]:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) or value is None else str(value)
