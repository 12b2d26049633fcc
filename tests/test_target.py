"""What a call takes: a dataset directory, a pipeline file or a loaded pipeline, and changes in either form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Prefkit
from tiny import built, text_rows, tiny_llama

import prefkit as api
from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline, change_pipeline, load_pipeline
from prefkit.errors import ConfigError, DatasetError, GateError, InputError
from prefkit.reference import estimate_reference, precompute_reference
from prefkit.target import pipeline_of
from prefkit.train import train_dpo


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pipeline.yaml, a built dataset of 24 pairs, a model and its reference."""
    folder = tmp_path_factory.mktemp("target")
    train = {"batch_size": 8, "max_steps": 1}
    pipeline = built(folder, text_rows(24), tiny_llama(folder / "model"), train=train)
    precompute_reference(pipeline)
    return folder


def test_a_target_is_a_directory_a_file_or_a_pipeline_by_any_name(ready: Path) -> None:
    by_file, by_directory = pipeline_of(str(ready / "pipeline.yaml")), pipeline_of(ready / "dataset")
    assert by_file.dataset == by_directory.dataset == str(ready / "dataset")
    assert pipeline_of(by_file) is by_file
    assert pipeline_of(ready / "pipeline.yaml") == by_file
    assert by_file.train == by_directory.train
    with pytest.raises(ConfigError, match="no such dataset and no such pipeline file"):
        pipeline_of(ready / "nowhere")


@pytest.mark.parametrize("value", [3, None, {"dataset": "x"}])
def test_what_is_no_target_is_refused_as_such(value: Any) -> None:
    with pytest.raises(InputError) as refused:
        audit_dataset(value)
    assert str(refused.value) == (
        f"a path cannot be a value of type {type(value).__name__}\n"
        "  expected: a dataset directory, a pipeline file, or a Pipeline"
    )


def test_changes_are_a_mapping_a_list_of_lines_or_one_line(ready: Path) -> None:
    file = ready / "pipeline.yaml"
    forms: list[Any] = [
        {"train.beta": 0.05, "precompute.model": Path("a b/m")},
        ["train.beta=0.05", "precompute.model=a b/m"],
    ]
    for target in (file, ready / "dataset", load_pipeline(file)):
        for changes in forms:
            pipeline = pipeline_of(target, changes)
            assert (pipeline.train.beta, pipeline.precompute.model) == (0.05, "a b/m")
        assert pipeline_of(target, "train.beta=0.05").train.beta == 0.05
    assert load_pipeline(file).train.beta != 0.05


@pytest.mark.parametrize("value", ["\U0001f600 \x7f", "a: b", "null", "'", "1e-05", "- x"])
def test_a_text_of_a_mapping_is_taken_as_it_is(ready: Path, value: str) -> None:
    assert pipeline_of(ready / "pipeline.yaml", {"precompute.model": value}).precompute.model == value


def test_numbers_and_lists_of_a_mapping_are_taken_as_they_are(ready: Path) -> None:
    changes = {"train.learning_rate": 1e-05, "audit.allow": ["a: b", "- c"]}
    pipeline = pipeline_of(ready / "pipeline.yaml", changes)
    assert (pipeline.train.learning_rate, pipeline.audit.allow) == (1e-05, ["a: b", "- c"])
    with pytest.raises(ConfigError, match="does not fit"):
        pipeline_of(ready / "pipeline.yaml", {"train.beta": {"a": 1}})


def test_later_changes_win_over_earlier_ones_and_a_whole_section_over_the_file(ready: Path) -> None:
    file = ready / "pipeline.yaml"
    assert pipeline_of(file, ["train.beta=0.5", "train={max_steps: 3}", "train.seed=7"]).train.model_dump(
        include={"beta", "max_steps", "seed", "batch_size"}
    ) == {"beta": 0.1, "max_steps": 3, "seed": 7, "batch_size": type(load_pipeline(file).train)().batch_size}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.bta": 1}, "--set: unknown key train.bta"),
        ({"train.beta": "hot"}, "--set: train.beta = 'hot' does not fit"),
        ({"dataset.x": 1}, "--set dataset.x: dataset is not a section"),
        ({3: 1}, "unknown key 3"),
        ([3], "--set 3 is not a change"),
        (["train.beta"], "--set train.beta is not a change"),
        ({"audit.model": "\ud83d"}, "audit.model holds half a character"),
    ],
)
def test_a_change_that_does_not_fit_is_named_whatever_the_target(ready: Path, changes: Any, said: str) -> None:
    for target in (ready / "pipeline.yaml", ready / "dataset", load_pipeline(ready / "pipeline.yaml")):
        with pytest.raises(ConfigError) as refused:
            pipeline_of(target, changes)
        assert said in str(refused.value)


def test_a_changed_pipeline_is_another_one_and_keeps_what_was_said_of_the_reference(ready: Path) -> None:
    pipeline = load_pipeline(ready / "pipeline.yaml")
    changed = change_pipeline(pipeline, {"train.beta": 0.3})
    assert (pipeline.train.beta, changed.train.beta) == (0.1, 0.3)
    assert changed.precompute.model_fields_set == pipeline.precompute.model_fields_set
    assert change_pipeline(changed, {"train.beta": 0.1}) == pipeline
    more = change_pipeline(
        pipeline_of(ready / "dataset"), {"precompute.max_length": 99, "precompute": {"dtype": "float32"}}
    )
    assert more.precompute.model_fields_set == {"max_length", "dtype"}
    with pytest.raises(GateError, match="max_length"):  # said on purpose, so the gate compares it
        train_dpo(changed, changes={"precompute.max_length": 99})


def test_what_was_left_out_of_a_pipeline_stays_left_out_in_a_changed_one(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    source = {"path": str(write_jsonl("rows.jsonl", text_rows(4)))}  # its format is found by its rows
    rules = [{"function": "mine:shorten"}]
    for sources in ([source], [source | {"format": "rewrite", "rules": rules}]):
        pipeline = pipeline_of(*sources)
        changed = change_pipeline(pipeline, {"train.beta": 0.3, "validate.max_reject_share": 0.5})
        assert changed.sources == pipeline.sources
        assert (changed.train.beta, changed.validate_.max_reject_share) == (0.3, 0.5)
        assert change_pipeline(changed, {"audit.ngrams": 1}).train.beta == 0.3


def test_a_dataset_of_a_rewriting_function_is_a_target(
    tmp_path: Path,
    pipeline_of: Callable[..., Pipeline],
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cutting.py").write_text("def shorten(text):\n    return text[:-4]\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "response": f"hello there {i} xyz"} for i in range(9)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "rewrite"}
    pipeline = pipeline_of(source | {"rules": [{"function": "cutting:shorten"}]})
    assert build_dataset(pipeline).counts["pairs"] == 9
    assert audit_dataset(pipeline.dataset, keep=False).pairs == 9
    assert build_dataset(pipeline.dataset).unchanged


# every call takes them


def test_a_dataset_is_built_of_a_file_a_pipeline_or_what_it_was_built_with(
    tmp_path: Path, pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    rows = text_rows(12)
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    file, dataset = tmp_path / "pipeline.yaml", tmp_path / "dataset"
    built_ = build_dataset(file)
    assert (built_.counts["pairs"], built_.unchanged) == (12, False)
    assert build_dataset(str(file)).unchanged
    assert build_dataset(pipeline).unchanged
    assert build_dataset(dataset).unchanged
    assert build_dataset(file, changes={"dataset": tmp_path / "other", "split.test_share": 0.5}).counts["test"] > 0
    write_jsonl("rows.jsonl", rows[:5])
    assert build_dataset(dataset).counts["pairs"] == 5
    with pytest.raises(DatasetError, match="not a prefkit dataset"):
        build_dataset(tmp_path)


def test_an_audit_is_the_same_whatever_names_the_dataset(ready: Path) -> None:
    changes: dict[str, Any] = {"audit.ngrams": 1}
    audited = [
        audit_dataset(target, changes=changes, keep=False).document
        for target in (ready / "dataset", str(ready / "pipeline.yaml"), load_pipeline(ready / "pipeline.yaml"))
    ]
    assert audited[0]["settings"]["ngrams"] == 1
    assert audited[0] == audited[1] == audited[2]


def test_a_reference_is_foretold_and_computed_of_a_directory(ready: Path) -> None:
    dataset = ready / "dataset"
    assert (estimate_reference(dataset).to_score, precompute_reference(dataset).scored) == (0, 0)
    told = estimate_reference(dataset, changes={"precompute.max_length": 64})
    assert (told.to_score, told.pairs) == (24, 24)
    assert len(api.open_dataset(dataset).references) == 1


def test_a_run_takes_changes(ready: Path, tmp_path: Path) -> None:
    trained = train_dpo(ready / "dataset", changes={"train.max_steps": 2, "train.beta": 0.2}, out=str(tmp_path / "run"))
    assert trained.steps == 2
    (run,) = api.read_runs([tmp_path / "run"])
    assert (run.document["train"]["beta"], run.steps["beta"].to_list()) == (0.2, [0.2] * run.steps.height)


def test_an_option_of_a_command_may_hold_any_character(prefkit: Prefkit, ready: Path, tmp_path: Path) -> None:
    ended = prefkit("audit", str(ready / "dataset"), "--model", "\U0001f600 model", "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["error"]["where"].startswith("\U0001f600 model")


def test_an_audit_is_enforced_at_its_own_limit_or_at_another(ready: Path) -> None:
    audited = audit_dataset(ready / "dataset", changes={"audit.limits.strict": "fail"}, keep=False)
    api.enforce_audit(audited._replace(verdict="warn"))
    with pytest.raises(api.AuditError, match="the verdict is fail"):
        api.enforce_audit(audited._replace(verdict="fail"))
    with pytest.raises(api.AuditError, match="the verdict is note"):
        api.enforce_audit(audited._replace(verdict="note"), "note")
