"""The sections sample, score and evaluate of a pipeline: what does not fit together is refused in words."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prefkit.sample_settings import EvaluateConfig, PromptsConfig, SampleConfig, ScoreConfig, ScorerConfig

SAMPLE = {"prompts": "p.jsonl", "out": "c"}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            SampleConfig,
            {**SAMPLE, "temperature": 0, "n": 2},
            "sample.n must be 1 at sample.temperature 0: all responses would be the same",
        ),
        (
            SampleConfig,
            {**SAMPLE, "temperature": 0, "n": 1, "top_k": 3},
            "sample.top_p and sample.top_k have no effect at sample.temperature 0",
        ),
        (SampleConfig, {**SAMPLE, "engine": "mine"}, "sample.engine: mine is not module:function"),
        (ScorerConfig, {}, "a scorer has exactly one of function, reward_model, judge, verifier"),
        (ScorerConfig, {"function": "rate"}, "scorers.function: rate is not module:function"),
        (
            ScorerConfig,
            {"verifier": "number", "dtype": "bfloat16"},
            "scorers.dtype has no effect on a scorer with verifier:",
        ),
        (ScorerConfig, {"function": "a:b", "scale": [1, 0]}, "scorers.scale must be given from low to high"),
        (
            EvaluateConfig,
            {"prompts": "p.jsonl", "temperatures": [1, 1.0]},
            "evaluate.temperatures: one is given twice",
        ),
        (
            ScoreConfig,
            {"scorers": [{"function": "a:rate"}, {"function": "b:rate"}]},
            "scorers: rate names two of them; give them name:",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(settings)
    assert raised.value.errors()[0]["msg"] == f"Value error, {message}"


def test_at_temperature_0_there_is_one_response_where_nobody_says_how_many() -> None:
    assert SampleConfig(**SAMPLE, temperature=0).n == 1
    assert SampleConfig(**SAMPLE, temperature=0.5).n == 4
    again = SampleConfig(**SAMPLE, temperature=0).model_dump(mode="json", exclude_unset=True)
    assert SampleConfig(**again | {"temperature": 1}).n == 1


@pytest.mark.parametrize("kind", [SampleConfig, EvaluateConfig])
def test_an_empty_text_ends_no_response(kind: Any) -> None:
    with pytest.raises(ValidationError, match="at least 1 character"):
        kind.model_validate({**(SAMPLE if kind is SampleConfig else {"prompts": "p"}), "stop": [""]})


def test_a_path_alone_stands_for_prompts() -> None:
    assert SampleConfig(**SAMPLE).prompts == PromptsConfig(path="p.jsonl")


@pytest.mark.parametrize(
    ("settings", "kind", "label"),
    [
        ({"function": "my.rules:polite"}, "function", "polite"),
        ({"reward_model": "models/reward one/"}, "reward_model", "reward-one"),
        ({"judge": "judge", "name": "strict"}, "judge", "strict"),
        ({"verifier": "number"}, "verifier", "number"),
        ({"reward_model": "/"}, "reward_model", "reward_model"),
    ],
)
def test_a_scorer_is_called_by_what_it_is(settings: dict[str, Any], kind: str, label: str) -> None:
    scorer = TypeAdapter(ScorerConfig).validate_python(settings)
    assert (scorer.kind, scorer.label) == (kind, label)
