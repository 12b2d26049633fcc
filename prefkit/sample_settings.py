"""The sections of a pipeline file for the on-policy half: prompts, sampling, scorers, evaluation."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from prefkit.build_settings import FUNCTION
from prefkit.sections import Section

SCORER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
KINDS_OF_SCORERS = ("function", "reward_model", "judge", "verifier")
Dtype = Literal["float32", "bfloat16", "bfloat16_weights"]


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class PromptsConfig(Section):
    """Prompts to sample from; a path alone is short for {path: ...}."""

    path: str = Field(description="file or glob, relative to the working directory; the pairs of a dataset serve too")
    columns: dict[Literal["prompt", "reference", "tools"], str] = Field(
        {}, description="our field name: the file's, dotted paths allowed; reference: the right answer, for scorers"
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="only so many, the first of the file")
    split: Literal["train", "test"] | None = Field(
        None, description="of a dataset: whose prompts; train where it is left out, and test in the evaluate section"
    )


PROMPTS_DOC = "a file of prompts or a dataset, or path: with columns:, limit: and split:"
Prompts = Annotated[PromptsConfig, BeforeValidator(_path_alone)]


class SampleConfig(Section):
    """N responses of a model to each prompt."""

    prompts: Prompts = Field(description=PROMPTS_DOC)
    out: str = Field(description="the candidates directory that is written")
    model: str | None = Field(None, description="folder of a model, or of a run; precompute.model if left out")
    n: Annotated[int, Field(gt=0)] = Field(4, description="responses a prompt; left out at temperature 0: one")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0: always the likeliest token, so n is 1")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="only the likeliest tokens, as few as hold this share of the probability (arXiv 1904.09751)"
    )
    top_k: Annotated[int, Field(gt=0)] | None = Field(None, description="only so many of the likeliest tokens")
    max_new_tokens: Annotated[int, Field(gt=0)] = Field(256, description="longest response, in tokens")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="texts that end a response, which is cut before them; its end tokens always do"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Dtype = "float32"
    max_batch_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None, description="prompt + response tokens of the sequences that are made at once; left out: as memory allows"
    )
    engine: str | None = Field(None, description="module:function that samples in place of prefkit's own engine")

    @model_validator(mode="before")
    @classmethod
    def _one_where_all_are_the_same(cls, given: Any) -> Any:
        return {"n": 1, **given} if isinstance(given, dict) and given.get("temperature") == 0 else given

    @model_validator(mode="after")
    def _sound(self) -> "SampleConfig":
        if self.temperature == 0 and self.n > 1:
            raise ValueError("sample.n must be 1 at sample.temperature 0: all responses would be the same")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ValueError("sample.top_p and sample.top_k have no effect at sample.temperature 0")
        if self.engine is not None and not FUNCTION.fullmatch(self.engine):
            raise ValueError(f"sample.engine: {self.engine} is not module:function")
        return self


class ScorerConfig(Section):
    """One way to score responses: exactly one of function, reward_model, judge and verifier."""

    name: Annotated[str, Field(pattern=rf"^{SCORER_NAME.pattern}$")] | None = Field(
        None, description="in the scorer column; left out: from what it is"
    )
    function: str | None = Field(
        None, description="module:function, from prompts and completions to floats; from the working directory"
    )
    reward_model: str | None = Field(None, description="folder of a sequence classifier with one output")
    judge: str | None = Field(None, description="folder of a causal model that says which of two responses is better")
    verifier: Literal["number", "exact"] | None = Field(
        None, description="1 where the answer at the end of a response is the reference's, else 0"
    )
    scale: tuple[float, float] | None = Field(None, description="lowest and highest score; others are rejects")
    instructions: str | None = Field(None, description="of a judge: a jinja file with what it is asked")
    min_log_odds: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of a judge: a verdict of smaller log-odds is a tie; left out: 0"
    )
    chat_template: str | None = Field(None, description="of a reward model or judge: as precompute.chat_template")
    max_length: Annotated[int, Field(gt=1)] | None = Field(
        None, description="of a reward model or judge: longest input in tokens; left out: what the model holds"
    )
    dtype: Dtype | None = Field(None, description="of a reward model or judge; left out: float32")

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(kind for kind in KINDS_OF_SCORERS if getattr(self, kind) is not None)

    @property
    def label(self) -> str:
        """Its name: the one given, else the function's, the folder's or the verifier's."""
        if self.name is not None:
            return self.name
        last = re.split(r"[:/\\]", str(getattr(self, self.kind)).rstrip("/\\"))[-1]
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-._")[:64] or self.kind

    @model_validator(mode="after")
    def _one_of_four(self) -> "ScorerConfig":
        if sum(getattr(self, kind) is not None for kind in KINDS_OF_SCORERS) != 1:
            raise ValueError("a scorer has exactly one of " + ", ".join(KINDS_OF_SCORERS))
        if self.function is not None and not FUNCTION.fullmatch(self.function):
            raise ValueError(f"scorers.function: {self.function} is not module:function")
        for_models = {"chat_template", "max_length", "dtype"}
        effective = {
            "function": {"scale"},
            "verifier": {"scale"},
            "reward_model": {"scale", *for_models},
            "judge": {"instructions", "min_log_odds", *for_models},
        }[self.kind]
        for key in {"scale", "instructions", "min_log_odds", *for_models} - effective:
            if getattr(self, key) is not None:
                raise ValueError(f"scorers.{key} has no effect on a scorer with {self.kind}:")
        if self.scale is not None and not self.scale[0] <= self.scale[1]:
            raise ValueError("scorers.scale must be given from low to high")
        return self


class ScoreConfig(Section):
    """Who scores the candidates of the sample section."""

    scorers: Annotated[list[ScorerConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_once(self) -> "ScoreConfig":
        _refuse_twice(self.scorers)
        return self


class EvaluateConfig(Section):
    """What a trained model is measured by: fresh samples, their scores, and texts it should not have forgotten."""

    prompts: Prompts = Field(description=PROMPTS_DOC)
    scorers: list[ScorerConfig] = Field([], description="left out: those of the score section")
    temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = Field(
        [1.0], description="responses are sampled at each; the KL is the model's own at 1"
    )
    n: Annotated[int, Field(gt=0)] = Field(4, description="responses a prompt; at temperature 0 always one")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], description="as sample.stop")
    seed: Annotated[int, Field(ge=0)] = 0
    reference: str | None = Field(
        None, description="folder of the model that it is compared with; precompute.model if left out"
    )
    against: str = Field(
        "reference", description="of the win rate: reference, chosen (of the dataset's pairs), or the folder of a model"
    )
    dtype: Dtype = Field("float32", description="that both models sample and score in; held-out pairs keep to theirs")
    texts: Prompts | None = Field(
        None, description="prompts with a reference each, whose perplexity under both models is compared"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="of the intervals")

    @model_validator(mode="after")
    def _sound(self) -> "EvaluateConfig":
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("evaluate.temperatures: one is given twice")
        _refuse_twice(self.scorers)
        return self


def _refuse_twice(scorers: list[ScorerConfig]) -> None:
    labels = [scorer.label for scorer in scorers]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"scorers: {twice} names two of them; give them name:")
