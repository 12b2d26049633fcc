"""Scorers as functions of rows: a function of the user's, a verifier, a reward model, a judge.

Comes in: settings, and rows with prompt and response. Goes out: a number a row, or the reason why there is none; and an
identity, the settings and hashes that decide these numbers.
"""

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from prefkit.errors import SourceError
from prefkit.format import MESSAGES, Kind
from prefkit.functions import AGAIN, calling, installed_versions, load_functions, module_hashes
from prefkit.judge import Judge, judge_candidates, judge_identity, load_judge
from prefkit.reward_models import RewardModel, load_reward_model, reward_identity, reward_responses
from prefkit.sample_settings import ScorerConfig
from prefkit.text import with_prompt_ids
from prefkit.verifiers import VERIFIER_VERSION, verify_answers
from prefkit.work import Tell

FUNCTION_BATCH = 256  # responses that a function is handed at once
EVERY = "a list with a number or None for every completion"
Watch = Callable[[int, int], None]  # responses done, of all
RESULT: dict[str, Any] = {"score": pl.Float64, "reason": pl.String, "value": pl.Float64}


class OpenScorer(NamedTuple):
    """A scorer that can be asked several times, what decides its scores, and how to ask it.

    Its model is loaded when it is first needed. `ask` takes rows, and a function that is told how many are done.
    """

    config: ScorerConfig
    kind: Kind
    identity: dict[str, Any]
    ask: Callable[[pl.DataFrame, Watch], "Answers"]


class Answers(NamedTuple):
    """What a scorer says of some rows: a number, or the reason why there is none, a row; of a judge its comparisons."""

    given: list[float | str]
    comparisons: pl.DataFrame | None = None


def score_rows(
    rows: pl.DataFrame,
    scorer: ScorerConfig | OpenScorer,
    *,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
) -> pl.DataFrame:
    """The rows with `score`, `reason` (why there is none, else null) and `value` (what the scorer gave, if finite).

    Args:
        rows: with prompt (messages or text) and response (text); reference, tools, model, number, candidate_id and
            prompt_id where there are some. A judge compares the responses to a prompt.
        scorer: settings, or a scorer that is open (`open_scorer`), for several calls.
        tell: called with lines for a person.
        watch: called after every batch with rows done and all.
    """
    kind: Kind = "chat" if rows.schema["prompt"] == MESSAGES else "text"
    opened = open_scorer(scorer, kind, tell) if isinstance(scorer, ScorerConfig) else scorer
    answers = opened.ask(completed(rows, kind), watch)
    return rows.hstack(as_result(answers.given, opened.config.scale))


def as_result(given: Sequence[float | str], scale: tuple[float, float] | None) -> pl.DataFrame:
    """RESULT of what a scorer gave: a score in its scale, or a reason and what it gave."""
    rows: list[tuple[float | None, str | None, float | None]] = []
    for one in given:
        if isinstance(one, str):
            rows.append((None, one, None))
        elif not math.isfinite(one):
            rows.append((None, "not_finite", None))
        elif scale is not None and not scale[0] <= one <= scale[1]:
            rows.append((None, "out_of_scale", one))
        else:
            rows.append((one, None, one))
    return pl.DataFrame(rows, schema=RESULT, orient="row")


def completed(rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Rows with every column that a scorer may read."""
    absent = [name for name in ("reference", "tools", "model") if name not in rows.columns]
    rows = rows.with_columns(pl.lit(None, pl.String).alias(name) for name in absent)
    if "prompt_id" not in rows.columns:
        rows = with_prompt_ids(rows, kind)
    if "number" not in rows.columns:
        rows = rows.with_columns(pl.int_range(pl.len(), dtype=pl.Int32).over("prompt_id").alias("number"))
    if "candidate_id" not in rows.columns:
        rows = rows.with_columns(pl.format("{}-{}", "prompt_id", "number").alias("candidate_id"))
    if "place" not in rows.columns:
        rows = rows.with_columns(pl.format("row {}", pl.int_range(1, pl.len() + 1)).alias("place"))
    return rows


def open_scorer(config: ScorerConfig, kind: Kind, tell: Tell = lambda _text: None) -> OpenScorer:
    """A scorer, what it is, and a way to ask it; a model is loaded at the first question.

    Raises:
        ConfigError: a function or the instructions cannot be used.
        ModelError: there is no model that could be used.
    """
    opener = {"function": _function, "verifier": _verifier, "reward_model": _reward_model, "judge": _judge}[config.kind]
    identity, ask = opener(config, kind, tell)
    scale = None if config.scale is None else list(config.scale)
    return OpenScorer(config, kind, {"kind": config.kind, "scale": scale, **identity}, ask)


Ask = Callable[[pl.DataFrame, Watch], Answers]


def _verifier(config: ScorerConfig, _kind: Kind, _tell: Tell) -> tuple[dict[str, Any], Ask]:
    rule = str(config.verifier)

    def ask(rows: pl.DataFrame, watch: Watch) -> Answers:
        found = verify_answers(rule, rows["response"].to_list(), rows["reference"].to_list())
        watch(rows.height, rows.height)
        return Answers(["no_reference" if one is None else one for one in found])

    return {"verifier": rule, "version": VERIFIER_VERSION}, ask


def _reward_model(config: ScorerConfig, kind: Kind, tell: Tell) -> tuple[dict[str, Any], Ask]:
    folder, dtype = str(config.reward_model), config.dtype or "float32"
    identity = reward_identity(folder, kind, config.chat_template) | {"dtype": dtype, "max_length": config.max_length}
    held: list[RewardModel] = []

    def ask(rows: pl.DataFrame, watch: Watch) -> Answers:
        if not held:
            held.append(
                load_reward_model(
                    folder,
                    kind,
                    dtype=dtype,
                    max_length=config.max_length,
                    chat_template=config.chat_template,
                    tell=tell,
                )
            )
        prompts, responses, tools = (rows[name].to_list() for name in ("prompt", "response", "tools"))
        return Answers(reward_responses(held[0], prompts, responses, tools, watch))

    return identity, ask


def _judge(config: ScorerConfig, _kind: Kind, tell: Tell) -> tuple[dict[str, Any], Ask]:
    identity = judge_identity(config) | {"dtype": config.dtype or "float32", "max_length": config.max_length}
    held: list[Judge] = []

    def ask(rows: pl.DataFrame, watch: Watch) -> Answers:
        if not held:
            held.append(load_judge(config, tell))
        judged = judge_candidates(
            held[0], rows, tell=tell, watch=lambda done, total: watch(rows.height * done // max(total, 1), rows.height)
        )
        return Answers(judged.scores, judged.comparisons)

    return identity, ask


# -- functions, as TRL's GRPOTrainer calls them


def _function(config: ScorerConfig, kind: Kind, _tell: Tell) -> tuple[dict[str, Any], Ask]:
    name = str(config.function)
    hashes = module_hashes([name], "scorers.function")
    versions = installed_versions([name])
    (function,) = load_functions([name], "scorers.function")

    def ask(rows: pl.DataFrame, watch: Watch) -> Answers:
        found: list[float | str] = []
        for start in range(0, rows.height, FUNCTION_BATCH):
            some = rows.slice(start, FUNCTION_BATCH)
            found += _called(name, function, some, kind)
            watch(start + some.height, rows.height)
        return Answers(found)

    return {"function": name, "modules": hashes} | ({"versions": versions} if versions else {}), ask


def function_arguments(rows: pl.DataFrame, kind: Kind) -> dict[str, Any]:
    """What TRL hands a reward function: prompts, completions, completion_ids, and every other column as a list.

    In a chat dataset prompts are lists of messages, and completions a list with the one message of the assistant each.
    `solution` is the reference under the name that TRL's own functions have for it.
    """
    responses = rows["response"].to_list()
    prompts: Any = rows["prompt"].to_list()
    completions: Any = responses
    if kind == "chat":
        prompts = [[{k: v for k, v in m.items() if k != "extra" or v is not None} for m in p] for p in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in responses]
    columns = {n: rows[n].to_list() for n in rows.columns if n not in ("prompt", "response", "response_ids", "place")}
    ids = {"completion_ids": rows["response_ids"].to_list()} if "response_ids" in rows.columns else {}
    said = {"solution": rows["reference"].to_list(), "log_extra": _nothing, "log_metric": _nothing}
    return {**said, **columns, **ids, "prompts": prompts, "completions": completions}


def _nothing(*_arguments: Any) -> None:
    """TRL's functions may log; here nobody listens."""


def _called(name: str, function: Callable[..., Any], rows: pl.DataFrame, kind: Kind) -> list[float | str]:
    """What the function gives of one batch.

    Raises:
        InputError: it fails, or gives something else than a number or None a completion.
    """
    place = rows["place"][0]
    with calling(name, function, "scorers.function", where=place, expected=EVERY):
        result = function(**_accepted(function, function_arguments(rows, kind)))
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    if isinstance(result, (str, bytes, Mapping)) or not hasattr(result, "__len__"):
        message = f"scorers.function {name} gave {type(result).__name__}"
        raise SourceError(message, where=place, expected=EVERY, hint=AGAIN)
    listed = list(result)
    if len(listed) != rows.height:
        message = f"scorers.function {name} gave {len(listed)} results for {rows.height} completions"
        raise SourceError(message, where=place, expected=EVERY, hint=AGAIN)
    found: list[float | str] = []
    for one, here in zip(listed, rows["place"], strict=True):
        value = _as_number(one)
        if value is None:
            message = f"scorers.function {name} gave {type(one).__name__}"
            raise SourceError(message, where=here, expected="a number or None for every completion", hint=AGAIN)
        found.append(value)
    return found


async def _awaited(result: Any) -> Any:
    return await result


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function names, all of them where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {name: value for name, value in arguments.items() if name in {p.name for p in parameters}}


def _as_number(value: Any) -> float | str | None:
    """A result as a float; `no_score` for None; None for what is no number."""
    if value is None:
        return "no_score"
    if isinstance(value, numbers.Real) or (hasattr(value, "item") and not isinstance(value, str)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            return None
        except OverflowError:
            return math.inf
    return None
