"""Scorers in their short form, as `--scorer` takes them: module:function, reward:FOLDER and so on."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from prefkit.errors import ConfigError
from prefkit.sample_settings import ScorerConfig

KINDS = {"reward": "reward_model", "judge": "judge", "verifier": "verifier", "function": "function"}
SPECS = "module:function, reward:FOLDER, judge:FOLDER, verifier:number or verifier:exact"


def read_scorers(specs: Sequence[str], name: str | None, scale: str | None) -> list[ScorerConfig]:
    """The scorers of a command line; a name and a scale are for a single one.

    Args:
        specs: `parse_scorer` says which.
        name: `--name`.
        scale: `--scale`, LO,HI.

    Raises:
        ConfigError: one is none, or a name or scale is given beside several, or beside none.
    """
    for option, value in (("--name", name), ("--scale", scale)):
        if value is not None and len(specs) != 1:
            message = f"{option} is for one scorer, {len(specs)} are given"
            raise ConfigError(message, where=option, expected="one --scorer", hint="a pipeline names each of several")
    return [parse_scorer(spec, name, None if scale is None else _scale_of(scale)) for spec in specs]


def _scale_of(text: str) -> tuple[float, float]:
    try:
        low, high = (float(piece) for piece in text.split(","))
    except ValueError:
        message = f"--scale {text} is no scale"
        raise ConfigError(message, where="--scale", expected="lowest and highest score", hint="--scale 0,1") from None
    return low, high


def parse_scorer(spec: str, name: str | None = None, scale: tuple[float, float] | None = None) -> ScorerConfig:
    """A scorer in its short form: module:function, reward:FOLDER, judge:FOLDER, verifier:number.

    Args:
        spec: the short form; function:module:function where a module is called reward, judge or verifier.
        name: in the scorer column; None: from what it is.
        scale: lowest and highest score.

    Raises:
        ConfigError: it is none, or the scale does not fit it.
    """
    head, colon, rest = spec.partition(":")
    kind = KINDS.get(head, "function")
    value = rest if head in KINDS else spec
    if not colon or not value:
        raise ConfigError(f"--scorer {spec} is no scorer", where="--scorer", expected=SPECS)
    given: dict[str, Any] = {kind: value} | ({"name": name} if name else {}) | ({"scale": scale} if scale else {})
    try:
        return ScorerConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
        raise ConfigError(f"--scorer {spec}: {reason}", where="--scorer", expected=SPECS) from None
