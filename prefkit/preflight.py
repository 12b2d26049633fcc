"""What later stages of the road name, looked at before the first one begins: prompts, functions, folders of models.

Comes in: a pipeline. Goes out: nothing, a line to tell, or the error that would come after hours of training. Nothing
is read in full, and no model is loaded; what an earlier stage makes is not looked for.
"""

from collections.abc import Collection
from pathlib import Path

from prefkit.config import Pipeline
from prefkit.errors import ModelError, SourceError
from prefkit.format import MANIFEST
from prefkit.functions import load_functions
from prefkit.sample_settings import PromptsConfig, ScorerConfig
from prefkit.sources import expand

EXPECTED = "a folder in the Hugging Face layout"


def check_ahead(pipeline: Pipeline, stages: Collection[str]) -> None:
    """Refuse what the score and evaluate stages could not begin with.

    Args:
        pipeline: all of it.
        stages: those that are wanted.

    Raises:
        SourceError: a file of prompts, or of a judge's instructions, is not there.
        ConfigError: a function cannot be found.
        ModelError: a folder is not there.
    """
    scorers: dict[str, list[ScorerConfig]] = {}
    if pipeline.score is not None and "score" in stages:
        scorers["score"] = list(pipeline.score.scorers)
    if pipeline.evaluate is not None and "evaluate" in stages:
        evaluate = pipeline.evaluate
        scorers["evaluate"] = evaluate.scorers or (list(pipeline.score.scorers) if pipeline.score is not None else [])
        for name, prompts in (("prompts", evaluate.prompts), ("texts", evaluate.texts)):
            if prompts is not None:
                _check_prompts(f"evaluate.{name}", prompts, pipeline)
        _check_folder("evaluate.reference", evaluate.reference)
        _check_folder("evaluate.against", None if evaluate.against in ("reference", "chosen") else evaluate.against)
    for section, listed in scorers.items():
        for scorer in listed:
            _check_scorer(section, scorer)


def unread_samples(pipeline: Pipeline) -> str | None:
    """What to say where no source reads what the sample section makes; None where one does, or there is none."""
    if pipeline.sample is None:
        return None
    out = Path(pipeline.sample.out)
    if any(Path(source.path).absolute().is_relative_to(out.absolute()) for source in pipeline.sources):
        return None
    return f"no source reads what is sampled: sources has no path in {out} (sample.out)"


def _check_prompts(setting: str, prompts: PromptsConfig, pipeline: Pipeline) -> None:
    path = Path(prompts.path)
    made = [Path(pipeline.dataset), *([Path(pipeline.sample.out)] if pipeline.sample is not None else [])]
    if (path / MANIFEST).exists() or any(path.absolute().is_relative_to(folder.absolute()) for folder in made):
        return
    try:
        expand(prompts.path)
    except SourceError as error:
        error.message = f"{setting}: {error.message}"
        raise


def _check_scorer(section: str, scorer: ScorerConfig) -> None:
    if scorer.function is not None:
        load_functions([scorer.function], "scorers.function")
    _check_folder(f"{section}.scorers.reward_model", scorer.reward_model)
    _check_folder(f"{section}.scorers.judge", scorer.judge)
    if scorer.instructions is not None and not Path(scorer.instructions).is_file():
        message = f"{section}.scorers.instructions: no such file"
        raise SourceError(message, where=scorer.instructions, expected="a jinja file")


def _check_folder(setting: str, folder: str | None) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise ModelError(f"{setting}: no such folder", where=folder, expected=EXPECTED)
