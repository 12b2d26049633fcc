"""Sweeps: which combinations there are, that all share one reference pass, and what one table says of them."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from command import Prefkit
from rich.console import Console
from tiny import built, snapshot, text_rows, tiny_llama, write_rows

from prefkit import stages, sweep
from prefkit.build import build_dataset
from prefkit.combinations import combinations_of, read_grid, split_values
from prefkit.config import Pipeline
from prefkit.errors import CheckError, ConfigError, DatasetError, GateError, InputError, Interrupted, MachineError
from prefkit.evaluate import evaluate_model
from prefkit.info import dataset_info
from prefkit.query import query_dataset
from prefkit.reference import precompute_reference
from prefkit.road import run_pipeline
from prefkit.road_view import print_sweep
from prefkit.stages import Outcome, Spectator
from prefkit.sweep import Swept, sweep_pipeline
from prefkit.train import train_dpo

TRAIN = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipeline(tmp_path: Path, model: Path) -> Pipeline:
    return built(tmp_path, text_rows(24), model, split={"test_share": 0.2}, train=TRAIN)


def runs_of(pipeline: Pipeline) -> list[str]:
    return sorted(path.name for path in Path(pipeline.dataset).glob("runs/*"))


# what is asked for


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.05,0.1", ["0.05", "0.1"]),
        ("1", ["1"]),
        ("{r: 8, alpha: 16},null", ["{r: 8, alpha: 16}", "null"]),
        ("[0.9, 0.95]", ["[0.9, 0.95]"]),
        ("{betas: [0.9, 0.95], eps: 1e-6},{}", ["{betas: [0.9, 0.95], eps: 1e-6}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('{a: "x,}", b: 1},2', ['{a: "x,}", b: 1}', "2"]),
        ("it's,b", ["it's", "b"]),
        ("", [""]),
    ],
)
def test_commas_part_values_but_not_in_brackets_or_quotes(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_values_are_yaml_and_keep_their_order() -> None:
    grid = read_grid(["train.beta=0.05,1", "train.lora=null,{r: 8, alpha: 16}", "train.loss=ipo"])
    assert [*grid] == ["train.beta", "train.lora", "train.loss"]
    assert grid["train.lora"] == [None, {"r": 8, "alpha": 16}]
    assert read_grid("train.seed=0,1") == {"train.seed": [0, 1]}
    assert read_grid({"train.beta": (0.1, 1), "train.loss": "ipo"}) == {"train.beta": [0.1, 1], "train.loss": ["ipo"]}


@pytest.mark.parametrize(
    ("grid", "message", "expected"),
    [
        (["train.beta"], "--set train.beta is not a change", "section.key=value,value"),
        (["train.=1,2"], "--set train.=1,2 is not a change", "section.key=value,value"),
        (
            ["train.beta=1,,2"],
            "--set train.beta: a value between two commas is empty",
            "values of train settings, separated by commas",
        ),
        (["train.beta=[1,2"], "--set train.beta: a value is no YAML", "section.key=value,value"),
        (["train.beta=1,2", "train.beta=3"], "--set train.beta is given twice", "values of train settings"),
    ],
)
def test_what_cannot_be_read_is_named(grid: list[str], message: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_grid(grid)
    assert raised.value.message == message
    assert expected in raised.value.expected


def test_all_combinations_are_made_and_the_last_key_varies_fastest(pipeline: Pipeline) -> None:
    found = combinations_of(pipeline, ["train.beta=0.1,1", "train.loss=ipo", "train.seed=0,1"])
    assert [one.settings for one in found] == [
        {"train.beta": beta, "train.seed": seed} for beta in (0.1, 1.0) for seed in (0, 1)
    ]
    assert [one.pipeline.train.loss for one in found] == ["ipo"] * 4
    assert [one.number for one in found] == [1, 2, 3, 4]
    assert found[1].name == "train.beta=0.1, train.seed=1"


def test_what_is_recorded_is_what_the_checked_settings_hold(pipeline: Pipeline) -> None:
    (one, other) = combinations_of(pipeline, ["train.learning_rate=1e-4,2e-4"])  # YAML takes 1e-4 for a text
    assert (one.settings, other.settings) == ({"train.learning_rate": 1e-4}, {"train.learning_rate": 2e-4})
    (one, other) = combinations_of(pipeline, {"train.lora.r": [4, 8]})
    assert (one.settings, one.pipeline.train.lora and one.pipeline.train.lora.r) == ({"train.lora.r": 4}, 4)


def test_one_value_is_a_sweep_of_one(pipeline: Pipeline) -> None:
    (one,) = combinations_of(pipeline, ["train.beta=0.5"])
    assert one.settings == {"train.beta": 0.5}


@pytest.mark.parametrize("grid", [[], ["precompute.max_length=64"]])
def test_nothing_to_sweep_over_is_said(grid: list[str], pipeline: Pipeline) -> None:
    with pytest.raises(InputError) as raised:
        combinations_of(pipeline, grid)
    assert raised.value.message == "nothing to sweep over"
    assert raised.value.hint == "--set train.beta=0.05,0.1,1,5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "precompute.max_length=64,128",
            "precompute.max_length has 2 values, and each would need a reference of its own",
        ),
        ("split.seed=0,1,2", "split.seed has 3 values, and each would need a dataset of its own"),
        ("audit.seed=0,1", "audit.seed has 2 values, and each would need an audit of its own"),
        (
            "evaluate.seed=0,1",
            "evaluate.seed has 2 values, and each would need measurements that are not of the same kind",
        ),
        ("train={},{beta: 1}", "train has 2 values, and each would need a dataset of its own"),
    ],
)
def test_what_needs_more_than_another_run_is_refused_by_name(change: str, message: str, pipeline: Pipeline) -> None:
    with pytest.raises(InputError) as raised:
        combinations_of(pipeline, ["train.beta=1,2", change])
    assert raised.value.message == message
    assert raised.value.expected == "several values of train settings alone"
    assert raised.value.hint.startswith("one sweep a value of ")
    assert raised.value.hint.endswith(", which then is in --set by itself")


def test_several_policies_are_refused_but_where_the_reference_is_another_model_on_purpose(pipeline: Pipeline) -> None:
    with pytest.raises(InputError) as raised:
        combinations_of(pipeline, ["train.model=a,b"])
    assert raised.value.message == "train.model has 2 values, and a reference is of one model"
    assert raised.value.expected == "one, or --set train.other_reference=true beside them"
    assert len(combinations_of(pipeline, ["train.model=a,b", "train.other_reference=true"])) == 2


def test_two_combinations_that_are_the_same_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError) as raised:
        combinations_of(pipeline, ["train.beta=0.1,1e-1"])
    assert raised.value.message == "two combinations are the same: train.beta=0.1 and train.beta=1e-1"
    assert raised.value.expected == "values that differ"


def test_all_combinations_are_checked_before_the_first_one_begins(pipeline: Pipeline) -> None:
    before = snapshot(Path(pipeline.dataset))
    with pytest.raises(ConfigError) as raised:
        sweep_pipeline(pipeline, ["train.loss=sigmoid,hinge", "train.label_smoothing=0.1"])
    what = "combination 2 (train.loss=hinge): train.label_smoothing has no effect on train.loss hinge"
    assert raised.value.message.startswith(what)
    with pytest.raises(InputError) as refused:
        sweep_pipeline(pipeline, ["train.optimizer=adamw,adamx"])
    assert refused.value.message.startswith("combination 2 (train.optimizer=adamx): ")
    assert snapshot(Path(pipeline.dataset)) == before


def test_a_sweep_needs_a_dataset(tmp_path: Path, pipeline: Pipeline) -> None:
    with pytest.raises(DatasetError, match="no such dataset"):
        sweep_pipeline(pipeline.model_copy(update={"dataset": str(tmp_path / "none")}), ["train.beta=1,2"])


def test_several_processes_are_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as raised:
        sweep_pipeline(pipeline, ["train.beta=1,2"])
    assert raised.value.message == "prefkit sweep works in one process"
    assert raised.value.expected.startswith("prefkit precompute and prefkit train by a launcher, in several; the rest")


# what is done


def test_all_runs_share_one_reference_pass(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    class Counting(Spectator):
        def show(self, outcome: Outcome) -> None:
            if outcome.stage == "precompute":
                scored.append(outcome.result.scored)

    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1", "train.seed=0,1"], spectator=Counting())
    assert scored == [24]  # all pairs, once
    assert (swept.trained, swept.failed, runs_of(pipeline)) == (4, 0, ["1", "2", "3", "4"])
    (reference,) = Path(pipeline.dataset).glob("reference/*")
    assert reference.name == swept.reference
    stamps = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    again = sweep_pipeline(pipeline, ["train.beta=0.1,1,5", "train.seed=0,1"])
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == stamps
    assert again.trained == 2  # the others are those of the smaller sweep
    documents = [json.loads(path.read_text()) for path in Path(pipeline.dataset).glob("runs/*/run.json")]
    assert {document["reference"] for document in documents} == {swept.reference}


def test_a_row_says_what_run_json_and_the_settings_say(pipeline: Pipeline) -> None:
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1"])
    for row, beta in zip(swept.table.to_dicts(), (0.1, 1.0), strict=True):
        recorded = json.loads((Path(pipeline.dataset) / "runs" / row["run"] / "run.json").read_text())
        assert recorded["train"]["beta"] == beta == row["beta"]
        assert json.loads(row["settings"]) == {"train.beta": beta}
        assert (row["steps"], row["loss"]) == (2, recorded["loss"])
        assert row["eval_rewards/margins"] == recorded["eval"]["rewards/margins"]
        assert (row["state"], row["reason"], row["reward"]) == ("done", None, None)
    stored = pl.read_parquet(Path(swept.sweep or "") / "table.parquet")
    assert stored.equals(swept.table)
    sql = "select sweep, settings->>'$.\"train.beta\"' as beta, run from sweeps order by number"
    key = Path(swept.sweep or "").name
    assert query_dataset(pipeline.dataset, sql).fetchall() == [(key, "0.1", "1"), (key, "1.0", "2")]
    assert "sweeps/*/table.parquet" in (Path(pipeline.dataset) / "views.sql").read_text()
    (told,) = dataset_info(pipeline.dataset)["sweeps"]
    assert told == {"sweep": key, "train.beta": [0.1, 1.0], "combinations": 2, "done": 2, "failed": 0}


def test_a_damaged_sweep_is_named_and_hides_nothing(pipeline: Pipeline) -> None:
    swept = sweep_pipeline(pipeline, ["train.beta=0.1"])
    (Path(swept.sweep or "") / "sweep.json").write_text("{}")
    (told,) = dataset_info(pipeline.dataset)["sweeps"]
    assert told == {"sweep": Path(swept.sweep or "").name, "damaged": "is damaged at key"}


def test_the_same_sweep_again_writes_nothing(pipeline: Pipeline) -> None:
    sweep_pipeline(pipeline, ["train.beta=0.1,1"])
    before = {path: path.stat().st_mtime_ns for path in Path(pipeline.dataset).rglob("*.*") if path.name != ".lock"}
    assert sweep_pipeline(pipeline, ["train.beta=0.1,1"]).trained == 0
    after = {path: path.stat().st_mtime_ns for path in Path(pipeline.dataset).rglob("*.*") if path.name != ".lock"}
    assert after == before


def test_a_run_of_prefkit_train_counts(pipeline: Pipeline) -> None:
    precompute_reference(pipeline)
    train_dpo(pipeline, changes={"train.beta": 1.0})
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1"])
    assert swept.trained == 1
    assert swept.table["run"].to_list() == ["2", "1"]


def test_an_unfinished_run_of_other_settings_is_left_alone(pipeline: Pipeline) -> None:
    precompute_reference(pipeline)
    settings = {"train.beta": 7.0, "train.save_steps": 1}
    with pytest.raises(Interrupted):
        train_dpo(pipeline, changes=settings, stop=after_calls(2))
    before = snapshot(Path(pipeline.dataset) / "runs" / "1")
    assert any("checkpoint" in name for name in before)
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1"])
    assert swept.table["run"].to_list() == ["2", "3"]
    assert snapshot(Path(pipeline.dataset) / "runs" / "1") == before


def after_calls(number: int) -> Any:
    """A `stop` that says so from its n-th call on."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= number


def test_an_unfinished_run_of_a_combination_goes_on(pipeline: Pipeline) -> None:
    precompute_reference(pipeline)
    with pytest.raises(Interrupted):
        train_dpo(pipeline, changes={"train.beta": 1.0, "train.save_steps": 1}, stop=after_calls(2))
    foreseen = sweep_pipeline(pipeline, ["train.beta=0.1,1", "train.save_steps=1"], dry_run=True)
    assert foreseen.table["state"].to_list() == ["to do", "unfinished"]
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1", "train.save_steps=1"])
    assert swept.table["run"].to_list() == ["2", "1"]
    assert runs_of(pipeline) == ["1", "2"]


def test_a_run_that_was_changed_on_its_way_is_of_no_combination(pipeline: Pipeline) -> None:
    precompute_reference(pipeline)
    with pytest.raises(Interrupted):
        train_dpo(pipeline, changes={"train.beta": 5.0, "train.save_steps": 1}, stop=after_calls(2))
    train_dpo(pipeline, changes={"train.beta": 1.0, "train.save_steps": 1}, go_on=True)
    swept = sweep_pipeline(pipeline, ["train.beta=1", "train.save_steps=1"])
    assert (swept.trained, swept.table["run"].to_list()) == (1, ["2"])


def test_a_combination_that_fails_is_noted_and_the_rest_goes_on(pipeline: Pipeline) -> None:
    told: list[str] = []
    grid = ["train.learning_rate=1e-3,1e30,1e-4", "train.max_grad_norm=null", "train.optimizer=sgd"]
    swept = sweep_pipeline(pipeline, grid, spectator=Spectator(told.append))
    assert swept.table["state"].to_list() == ["done", "failed", "done"]
    reason = swept.table["reason"].to_list()[1]
    assert reason in {f"the {what} is not finite at step 1" for what in ("loss", "gradient")}
    assert f"combination 2 failed: {reason}" in told
    assert swept.failed == 1
    document = json.loads((Path(swept.sweep or "") / "sweep.json").read_text())
    assert [one["state"] for one in document["combinations"]] == ["done", "failed", "done"]
    assert sweep_pipeline(pipeline, grid).trained == 0  # it is tried again, in its own run
    assert runs_of(pipeline) == ["1", "2", "3"]


def test_out_of_memory_is_of_one_combination_and_a_full_disk_of_all(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Exception] = [MemoryError(), MachineError("the disk is full")]

    def fail(*_: Any, **__: Any) -> Outcome:
        raise raised.pop(0)

    monkeypatch.setattr(sweep, "train_stage", fail)
    with pytest.raises(MachineError, match="the disk is full"):
        sweep_pipeline(pipeline, ["train.batch_size=4,8"])
    (path,) = Path(pipeline.dataset).glob("sweeps/*/sweep.json")
    states = [(one["state"], one["reason"]) for one in json.loads(path.read_text())["combinations"]]
    assert states == [("failed", "out of memory"), ("to do", None)]


def test_a_reference_of_another_model_ends_the_sweep(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Outcome:
        raise GateError("no reference is this policy's")

    monkeypatch.setattr(sweep, "train_stage", fail)
    with pytest.raises(GateError):
        sweep_pipeline(pipeline, ["train.beta=1,2"])


def test_a_dry_run_lists_and_writes_nothing(pipeline: Pipeline) -> None:
    before = snapshot(Path(pipeline.dataset))
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1"], dry_run=True)
    assert (swept.sweep, swept.reference, swept.table["state"].to_list()) == (None, None, ["to do"] * 2)
    assert snapshot(Path(pipeline.dataset)) == before
    done = sweep_pipeline(pipeline, ["train.beta=0.1"])
    before = snapshot(Path(pipeline.dataset))
    swept = sweep_pipeline(pipeline, ["train.beta=0.1,1"], dry_run=True)
    assert (swept.reference, swept.table["state"].to_list()) == (done.reference, ["done", "to do"])
    assert swept.table["run"].to_list() == ["1", None]
    assert snapshot(Path(pipeline.dataset)) == before


def test_new_pairs_make_another_sweep(pipeline: Pipeline, tmp_path: Path) -> None:
    first = sweep_pipeline(pipeline, ["train.beta=0.1"])
    write_rows(tmp_path / "more.jsonl", text_rows(6, seed=5))
    more = [*pipeline.model_dump(mode="json")["sources"], {"path": str(tmp_path / "more.jsonl"), "format": "pairs"}]
    build_dataset(pipeline, changes={"sources": more})
    second = sweep_pipeline(pipeline, ["train.beta=0.1"])
    assert second.trained == 1
    assert second.sweep != first.sweep
    assert query_dataset(pipeline.dataset, "select count(distinct sweep) from sweeps").fetchall() == [(2,)]


def test_after_a_sweep_and_an_evaluation_a_changed_source_is_built_anew(pipeline: Pipeline, tmp_path: Path) -> None:
    sweep_pipeline(pipeline, ["train.beta=0.1"])
    (run,) = Path(pipeline.dataset).glob("runs/*")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "one two"}, {"prompt": "three"}])
    evaluate_model(run, {"prompts": str(prompts), "n": 1, "max_new_tokens": 2}, reference=pipeline.precompute.model)
    assert {"runs", "samples", "sweeps"} <= {path.name for path in Path(pipeline.dataset).iterdir()}
    write_rows(tmp_path / "pairs.jsonl", text_rows(20, seed=9))
    assert build_dataset(pipeline).counts["pairs"] == 20


# the command


def test_the_command_prints_one_table_and_one_json_object(pipeline: Pipeline, prefkit: Prefkit, tmp_path: Path) -> None:
    words = ("sweep", str(tmp_path / "pipeline.yaml"), "--set", "train.beta=0.1,1")
    ended = prefkit(*words)
    assert ended.code == 0
    assert "1 of 2: train.beta=0.1" in ended.out
    assert f"  {pipeline.dataset}/runs/2: 2 updates" in ended.out
    assert "2 combinations, 2 trained now; all on reference " in ended.out
    ended = prefkit(*words, "--json")
    told = ended.last_json()
    assert (told["settings"], told["trained"], told["failed"]) == (["train.beta"], 0, 0)
    assert [one["run"] for one in told["combinations"]] == ["1", "2"]
    assert f"  {pipeline.dataset}/runs/1, done already" in ended.err
    ended = prefkit(*words, "--dry-run")
    assert ended.code == 0
    assert "2 combinations, 0 trained now" in ended.out


def test_the_command_ends_with_1_where_a_combination_failed(
    pipeline: Pipeline, prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Outcome:
        raise CheckError("the loss is not finite at step 3")

    monkeypatch.setattr(sweep, "train_stage", fail)
    ended = prefkit("sweep", str(tmp_path / "pipeline.yaml"), "--set", "train.beta=0.1,1")
    assert ended.code == 1
    assert '{"train.beta": 0.1} failed: the loss is not finite at step 3' in ended.out


# evaluations


class Evaluations:
    """Stands for what measures a run: fixed figures, counted calls."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, run: str, settings: Any, **_: Any) -> Any:
        unchanged = run in self.done
        self.done += [] if unchanged else [run]
        number = float(Path(run).name)
        rows = [
            ("policy", 0.5, "rating", "reward", 10 * number, None, None),
            ("policy", 1.0, "rating", "reward", number, None, None),
            ("difference", 1.0, "rating", "reward", number / 2, 0.1, 0.9),
            ("difference", 0.5, "rating", "reward", 5.0, 4.0, 6.0),
            ("policy", 1.0, None, "kl", number + 9.0, 0.2, 0.4),
            ("policy", 1.0, None, "kl_exact", number + 0.25, 0.3, 0.5),
            ("policy", 0.5, "rating", "win_rate", 0.75, None, None),
        ]
        names = ["role", "temperature", "scorer", "metric", "value", "low", "high"]
        summary = pl.DataFrame(rows, schema=names, orient="row")
        headline = {"scorer": "rating", "temperature": 0.5, "value": 5.0, "low": 4.0, "high": 6.0}
        document = {"headline": headline, "settings": {"temperatures": [0.5, 1.0]}}
        return SimpleNamespace(folder=run, document=document, summary=summary, unchanged=unchanged)


def test_an_evaluation_of_one_prompt_has_no_interval_and_ends_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = [{"prompt": "one two", "reference": "2"}, {"prompt": "three", "reference": "none"}]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = {"prompts": str(prompts), "n": 1, "max_new_tokens": 2, "scorers": [{"verifier": "number"}]}
    for number in (1, 2):  # one prompt; two, of which one can be scored
        asked = {"evaluate": settings | {"prompts": {"path": str(prompts), "limit": number}}}
        gone = run_pipeline(pipeline, changes=asked)
        said = gone.stages[-1].said
        assert said.startswith("mean reward by number +0 over the reference; ")
        swept = sweep_pipeline(pipeline, {"train.beta": [0.1, 1.0], **asked})
        assert swept.table["state"].to_list() == ["done", "done"]
        assert (
            swept.table.select("reward_gain", "reward_gain_low", "reward_gain_high").rows() == [(0.0, None, None)] * 2
        )


def test_reward_and_kl_stand_beside_beta(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = Evaluations()
    prompts = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "one"}]))
    monkeypatch.setattr(stages, "load_evaluate", lambda: evaluations)
    grid = {"train.beta": [0.1, 1.0], "evaluate": [{"prompts": prompts, "temperatures": [0.5, 1.0]}]}
    swept = sweep_pipeline(pipeline, grid)
    first, second = swept.table.to_dicts()
    assert (first["temperature"], first["scorer"]) == (0.5, "rating")
    assert (first["reward"], second["reward"]) == (10.0, 20.0)  # at the first temperature
    assert (first["reward_gain"], first["reward_gain_low"], first["reward_gain_high"]) == (5.0, 4.0, 6.0)
    assert (first["kl"], second["kl"]) == (1.25, 2.25)  # the model's own, at temperature 1
    assert (first["kl_low"], first["kl_high"]) == (0.3, 0.5)  # kl_exact, as prefkit evaluate prints it
    assert first["win_rate"] == 0.75
    again = sweep_pipeline(pipeline, grid)
    assert len(evaluations.done) == 2
    shown = printed(again, 80)
    assert "…" not in shown
    words = {"0.1", "1", "5", "1.25", "2.25", "0.75", "beta", "steps", "accuracy", "reward", "gain", "KL"}
    assert words <= {*shown.split()}
    assert "steps" not in printed(again, 60)  # the view sweeps has them
    assert "2.25" in printed(again, 60)


def printed(swept: Swept, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    print_sweep(swept, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines()[:5])) <= width
    return str(text)
