"""What a later stage names is looked for before the first one begins."""

from pathlib import Path
from typing import Any

import pytest
from tiny import built, snapshot, text_rows, tiny_llama, write_rows

from prefkit.config import Pipeline
from prefkit.errors import ConfigError, ModelError, PrefkitError, SourceError
from prefkit.preflight import check_ahead, unread_samples
from prefkit.road import run_pipeline
from prefkit.sweep import sweep_pipeline

ALL = ("sample", "score", "build", "evaluate")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"prompt": "one"}])


def pipeline(**evaluate: Any) -> Pipeline:
    return Pipeline.model_validate(
        {
            "dataset": "d",
            "sources": [{"path": "c/scored/*.parquet", "format": "candidates"}],
            "sample": {"prompts": "p.jsonl", "out": "c"},
            "score": {"scorers": [{"verifier": "number"}]},
            "evaluate": {"prompts": "p.jsonl"} | evaluate,
        }
    )


WRONG: list[tuple[dict[str, Any], type[PrefkitError], str, str, str]] = [
    ({"prompts": "no.jsonl"}, SourceError, "evaluate.prompts: ", "no.jsonl", ""),
    ({"texts": "no.jsonl"}, SourceError, "evaluate.texts: ", "no.jsonl", ""),
    (
        {"reference": "no"},
        ModelError,
        "evaluate.reference: no such folder",
        "no",
        "a folder in the Hugging Face layout",
    ),
    ({"against": "no"}, ModelError, "evaluate.against: no such folder", "no", "a folder in the Hugging Face layout"),
    (
        {"scorers": [{"reward_model": "no"}]},
        ModelError,
        "evaluate.scorers.reward_model: no such folder",
        "no",
        "a folder in the Hugging Face layout",
    ),
    (
        {"scorers": [{"judge": "no"}]},
        ModelError,
        "evaluate.scorers.judge: no such folder",
        "no",
        "a folder in the Hugging Face layout",
    ),
    (
        {"scorers": [{"judge": ".", "instructions": "no.jinja"}]},
        SourceError,
        "evaluate.scorers.instructions: no such file",
        "no.jinja",
        "a jinja file",
    ),
    ({"scorers": [{"function": "nowhere:f"}]}, ConfigError, "scorers.function: no module nowhere", "nowhere", ""),
]


@pytest.mark.parametrize(("settings", "kind", "message", "where", "expected"), WRONG)
def test_what_is_not_there_is_named(
    settings: dict[str, Any], kind: type[PrefkitError], message: str, where: str, expected: str
) -> None:
    with pytest.raises(kind) as raised:
        check_ahead(pipeline(**settings), ALL)
    assert raised.value.message.startswith(message)
    assert raised.value.where == where
    assert expected in raised.value.expected
    check_ahead(pipeline(**settings), ("build",))  # which needs none of it


def test_scorers_are_looked_at_before_sampling_and_what_the_road_makes_is_not_looked_for() -> None:
    wanted = pipeline().model_dump(mode="json", by_alias=True) | {"score": {"scorers": [{"reward_model": "no"}]}}
    with pytest.raises(ModelError, match=r"score\.scorers\.reward_model: no such folder"):
        check_ahead(Pipeline.model_validate(wanted), ("sample", "score"))
    check_ahead(pipeline(prompts="d", texts="c/samples/part-00000.parquet"), ALL)


def test_samples_that_no_source_reads_are_told() -> None:
    assert unread_samples(pipeline()) is None
    wanted = pipeline().model_dump(mode="json", by_alias=True)
    elsewhere = Pipeline.model_validate(wanted | {"sample": {"prompts": "p.jsonl", "out": "c2"}})
    assert unread_samples(elsewhere) == "no source reads what is sampled: sources has no path in c2 (sample.out)"
    assert unread_samples(Pipeline.model_validate(wanted | {"sample": None})) is None


def test_nothing_is_trained_for_an_evaluation_that_cannot_begin(tmp_path: Path) -> None:
    settings = built(tmp_path, text_rows(24), tiny_llama(tmp_path / "model"), train={"max_steps": 1})
    before = snapshot(tmp_path / "dataset")
    with pytest.raises(SourceError):
        run_pipeline(settings, changes={"evaluate": {"prompts": "nowhere.jsonl"}})
    with pytest.raises(SourceError):
        sweep_pipeline(settings, {"train.beta": [0.1, 1.0], "evaluate": {"prompts": "nowhere.jsonl"}})
    assert snapshot(tmp_path / "dataset") == before
