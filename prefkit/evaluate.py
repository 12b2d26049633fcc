"""`prefkit evaluate`: what a trained model is worth on fresh responses, beside the model it came from.

Comes in: a model or a run, and an evaluate section. Goes out: RUN/evaluations/<key>/ with a figure and its interval for
each question that can be asked: mean reward and its paired gain over the reference (the headline), win rate, KL,
length, diversity, held-out accuracy, perplexity of texts that should not be forgotten. What cannot be measured is left
out by name, with the reason. evaluation_plan.py says what is to do, evaluation_work.py does it.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pydantic import ValidationError

from prefkit.config import Pipeline, Sections, load_pipeline
from prefkit.errors import ConfigError
from prefkit.evaluation_plan import (
    Plan,
    make_plan,
    pipeline_wants,
)
from prefkit.evaluation_tables import read_evaluation
from prefkit.evaluation_work import Evaluation, Stop, Tell, Watch
from prefkit.format import EVALUATION_JSON, Kind
from prefkit.locks import give_lock, locked, take_lock
from prefkit.sample_settings import EvaluateConfig
from prefkit.store import write_views


class Evaluated(NamedTuple):
    """What `evaluate_model` returns."""

    folder: str  # of the evaluation
    document: dict[str, Any]  # evaluation.json: headline, warnings, left_out and all settings
    summary: pl.DataFrame  # the table `evaluations`
    unchanged: bool  # it was there already
    seconds: float


def evaluate_model(
    model: str | Path | Pipeline,
    settings: EvaluateConfig | Mapping[str, Any] | None = None,
    *,
    reference: str | Path | None = None,
    dataset: str | Path | None = None,
    against: str | None = None,
    out: str | Path | None = None,
    kind: Kind | None = None,
    chat_template: str | None = None,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
    stop: Stop = lambda: False,
) -> Evaluated:
    """Sample a model, score its responses, and compare it with its reference on the same prompts.

    The same model, prompts, scorers and settings again: nothing is done. Killed or stopped, the next call goes on.

    Args:
        model: folder of a model or an adapter, or of a finished run; or a pipeline (file), whose evaluate section and
            newest finished run are meant.
        settings: an evaluate section: `prompts`, and what of the rest is not as usual; left out: the pipeline's.
        reference: folder of the model to compare with; left out: evaluate.reference, the dataset's precompute.model, or
            the model that the run began with.
        dataset: whose held-out pairs it is measured on; left out: the run's.
        against: of the win rate: reference, chosen, or the folder of another model; left out: evaluate.against.
        out: a directory for it; left out: the run's own.
        kind: chat | text; left out: the dataset's, or by what the prompts are.
        chat_template: as precompute.chat_template; left out: that of the dataset's reference, or the tokenizer's own.
        tell: called with what is done now.
        watch: called with how much of it is done, and how much there is.
        stop: asked now and then; True ends it, and the next call goes on.

    Returns:
        where it lies, what it found, and whether it was there already.

    Raises:
        ConfigError: the settings do not fit.
        ModelError: a model or its tokenizer does not load or does not fit.
        DatasetError: a run or dataset is not finished, or damaged.
        InputError: nothing says where the evaluation goes; a scorer or the prompts cannot be used.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.

    Example:
        asked = {"prompts": "demo/world/heldout.jsonl", "n": 1, "max_new_tokens": 48}
        evaluated = prefkit.evaluate_model("demo/dataset/runs/1", asked)
        print(evaluated.document["headline"], evaluated.summary)
    """
    started = time.monotonic()
    usual: str | None = None
    if isinstance(model, Pipeline) or str(model).endswith((".yaml", ".yml")):
        pipeline = model if isinstance(model, Pipeline) else load_pipeline(model)
        wanted = pipeline_wants(pipeline)
        model, settings = wanted.run, wanted.settings if settings is None else settings
        usual = wanted.reference
        dataset, chat_template = dataset or pipeline.dataset, chat_template or wanted.chat_template
    if settings is None:
        raise ConfigError("nothing says how to evaluate", where="evaluate", expected="prompts, and scorers")
    config = _settings(settings, against)
    tell("hashing the weights")
    plan = make_plan(
        model,
        config,
        reference=reference,
        usual=usual,
        dataset=dataset,
        out=out,
        kind=kind,
        chat_template=chat_template,
    )
    if (plan.folder / EVALUATION_JSON).exists():
        there = read_evaluation(plan.folder)
        return Evaluated(str(plan.folder), there.document, there.summary, True, time.monotonic() - started)
    with locked(plan.folder):
        done = Evaluation(plan, tell, watch, stop).run()
    _renew_views(plan)
    return Evaluated(str(plan.folder), done.document, done.summary, False, time.monotonic() - started)


def evaluate_target(
    target: str | Path,
    settings: Pipeline | Sections,
    *,
    dataset: str | Path | None = None,
    out: str | Path | None = None,
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
    stop: Stop = lambda: False,
) -> Evaluated:
    """`evaluate_model` as the command line asks for it: a pipeline and its newest run, or a folder and sections."""
    shared: Any = {"dataset": dataset, "out": out, "tell": tell, "watch": watch, "stop": stop}
    if isinstance(settings, Pipeline):
        return evaluate_model(settings, **shared)
    template = settings.precompute.chat_template
    return evaluate_model(target, settings.evaluate, kind=settings.kind, chat_template=template, **shared)


def _settings(settings: EvaluateConfig | Mapping[str, Any], against: str | None) -> EvaluateConfig:
    told = settings if isinstance(settings, Mapping) else settings.model_dump(mode="json", exclude_unset=True)
    told = {**told, **({} if against is None else {"against": str(against)})}
    try:
        return EvaluateConfig.model_validate(told)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(["evaluate", *(str(step) for step in problem["loc"])])
        raise ConfigError(f"{name} does not fit: {problem['msg']}", where="evaluate") from None


def _renew_views(plan: Plan) -> None:
    """Let views.sql know of a run's first evaluation; whoever else holds the lock writes it in the end."""
    held = plan.held
    if held is None or plan.home.resolve().parent.parent != held.folder.resolve():
        return
    if (lock := take_lock(held.folder)) is not None:
        write_views(held.folder, held.manifest)
        give_lock(held.folder, lock)
