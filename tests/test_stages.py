"""The whole road from one call: which stages there are, when one is done, why it is done again, and what stops it."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command import Prefkit
from rich.console import Console
from tiny import snapshot, text_rows, tiny_llama, write_rows

from prefkit import stages
from prefkit.audits import audit_dataset, why_audit
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline
from prefkit.errors import AuditError, DatasetError, InputError, Interrupted, SourceError
from prefkit.job import prepare_training
from prefkit.locks import locked
from prefkit.reference import precompute_reference
from prefkit.road import run_pipeline
from prefkit.road_view import RoadScreen
from prefkit.stages import Following, Outcome, Spectator, stages_of
from prefkit.store import write_json
from prefkit.train import train_dpo

MINIMAL = {"dataset": "d", "sources": [{"path": "p", "format": "pairs"}]}
SAMPLING = {
    "sample": {"prompts": "p.jsonl", "out": "c"},
    "score": {"scorers": [{"verifier": "number"}]},
    "evaluate": {"prompts": "p.jsonl"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipeline(tmp_path: Path, model: Path) -> Pipeline:
    """Not built yet."""
    source = write_rows(tmp_path / "pairs.jsonl", text_rows(24))
    settings = {
        "dataset": str(tmp_path / "dataset"),
        "kind": "text",
        "sources": [{"path": str(source), "format": "pairs"}],
        "split": {"test_share": 0.2},
        "precompute": {"model": str(model), "max_length": 128, "min_completion_tokens": 4},
        "train": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_pipeline(tmp_path / "pipeline.yaml")


def told(outcomes: list[Outcome]) -> dict[str, str]:
    """Why each stage was done; done already is nothing."""
    return {one.stage: one.why for one in outcomes if not one.done}


# which stages there are


def test_stages_without_a_section_are_absent() -> None:
    plain = Pipeline.model_validate(MINIMAL)
    assert stages_of(plain) == ["build", "audit", "precompute", "train"]
    assert stages_of(plain, "audit") == ["build", "audit"]
    whole = Pipeline.model_validate({**MINIMAL, **SAMPLING})
    assert stages_of(whole) == ["sample", "score", "build", "audit", "precompute", "train", "evaluate"]
    assert stages_of(whole, "sample") == ["sample"]


def test_a_stage_that_is_none_or_absent_is_refused_by_name() -> None:
    pipeline = Pipeline.model_validate(MINIMAL)
    with pytest.raises(InputError) as raised:
        stages_of(pipeline, "trian")
    assert raised.value.message == "trian is no stage of the road"
    assert raised.value.expected == "one of sample, score, build, audit, precompute, train, evaluate"
    with pytest.raises(InputError) as raised:
        stages_of(pipeline, "evaluate")
    assert raised.value.message == "the pipeline has no evaluate: section, so there is no such stage"
    assert raised.value.expected == "one of build, audit, precompute, train"


# the road


def test_the_road_leaves_the_files_that_the_commands_leave(pipeline: Pipeline, tmp_path: Path) -> None:
    gone = run_pipeline(pipeline)
    found = snapshot(tmp_path / "dataset")
    assert gone.run == str(tmp_path / "dataset" / "runs" / "1")
    (tmp_path / "dataset").rename(tmp_path / "gone")
    build_dataset(pipeline)
    audit_dataset(pipeline)
    precompute_reference(pipeline)
    train_dpo(pipeline)
    assert snapshot(tmp_path / "dataset") == found


def test_what_is_done_is_skipped_and_nothing_is_written(pipeline: Pipeline, tmp_path: Path) -> None:
    assert told(run_pipeline(pipeline).stages) == dict.fromkeys(stages_of(pipeline), "there was none")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"}
    gone = run_pipeline(pipeline)
    assert told(gone.stages) == {}
    assert gone.run == str(tmp_path / "dataset" / "runs" / "1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"} == before


def test_until_ends_the_road_early(pipeline: Pipeline, tmp_path: Path) -> None:
    gone = run_pipeline(pipeline, until="audit")
    assert [one.stage for one in gone.stages] == ["build", "audit"]
    assert gone.run is None
    assert not (tmp_path / "dataset" / "reference").exists()


def test_each_change_does_again_what_it_decides_and_no_more(pipeline: Pipeline, tmp_path: Path) -> None:
    run_pipeline(pipeline)
    runs = tmp_path / "dataset" / "runs"
    gone = run_pipeline(pipeline, changes={"train.beta": 0.5})
    assert told(gone.stages) == {"train": f"train.beta changed since {runs / '1'}"}
    gone = run_pipeline(pipeline, changes={"audit.ngrams": 2})
    assert told(gone.stages) == {"audit": "audit.ngrams changed"}
    assert gone.run == str(runs / "1")  # which is of these settings still
    gone = run_pipeline(pipeline, changes={"precompute.max_length": 100, "audit.ngrams": 2})
    assert told(gone.stages) == {
        "precompute": "precompute.max_length changed",
        "train": f"the reference, train.beta changed since {runs / '2'}",
    }
    other = tiny_llama(tmp_path / "other", seed=1)
    gone = run_pipeline(pipeline, changes={"precompute.model": str(other), "audit.ngrams": 2})
    assert told(gone.stages) == {
        "precompute": "precompute.model changed",
        "train": f"the policy, the reference changed since {runs / '3'}",
    }
    assert sorted(path.name for path in runs.iterdir()) == ["1", "2", "3", "4"]


def test_a_setting_of_the_build_does_all_again(pipeline: Pipeline, tmp_path: Path) -> None:
    run_pipeline(pipeline)
    gone = run_pipeline(pipeline, changes={"split.test_share": 0.4})
    assert told(gone.stages) == {
        "build": "split.test_share changed",
        "audit": "there was none",  # a build takes the audit of other pairs away
        "train": f"the pairs changed since {tmp_path / 'dataset' / 'runs' / '1'}",
    }


def test_a_source_that_changed_or_was_added_is_read(pipeline: Pipeline, tmp_path: Path) -> None:
    run_pipeline(pipeline)
    more = write_rows(tmp_path / "more.jsonl", text_rows(3, seed=7))
    sources = [*pipeline.model_dump(mode="json")["sources"], {"path": str(more), "format": "pairs"}]
    gone = run_pipeline(pipeline, changes={"sources": sources})
    assert told(gone.stages) == {
        "build": f"{more} is added",
        "audit": "there was none",
        "precompute": "3 pairs were not scored yet",
        "train": f"the pairs changed since {tmp_path / 'dataset' / 'runs' / '1'}",
    }
    write_rows(more, text_rows(4, seed=8))
    gone = run_pipeline(pipeline, changes={"sources": sources})
    assert told(gone.stages)["build"] == f"{more} changed"
    assert told(gone.stages)["precompute"] == "4 pairs were not scored yet"


def test_an_unfinished_run_of_these_settings_goes_on_and_one_of_others_is_left_alone(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    run_pipeline(pipeline, until="precompute")
    for beta in (3.0, 0.1):
        with pytest.raises(Interrupted):
            train_dpo(
                pipeline,
                changes={"train.save_steps": 1, "train.beta": beta},
                out=str(tmp_path / "dataset" / "runs" / ("1" if beta > 1 else "2")),
                stop=after(2),
            )
    before = snapshot(tmp_path / "dataset" / "runs" / "1")
    gone = run_pipeline(pipeline, changes={"train.save_steps": 1})
    runs = tmp_path / "dataset" / "runs"
    assert told(gone.stages) == {"train": f"{runs / '2'} was not finished"}
    assert (gone.run, snapshot(runs / "1")) == (str(runs / "2"), before)
    gone = run_pipeline(pipeline, changes={"train.beta": 9.0, "train.save_steps": 1})
    assert gone.run == str(runs / "3")
    assert snapshot(runs / "1") == before


def test_a_run_of_these_settings_that_somebody_is_at_work_on_is_not_trained_twice(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run_pipeline(pipeline, changes={"train.save_steps": 1}, spectator=Stopping("train", after(2)))
    run = tmp_path / "dataset" / "runs" / "1"
    with locked(run):
        held = (run / ".lock").read_text()
        with pytest.raises(DatasetError) as raised:
            run_pipeline(pipeline, changes={"train.save_steps": 1})
        assert held.startswith("process ")
        assert raised.value.where == str(run)
        what = f"is a run of these very settings that another prefkit is at work on ({held})"
        assert raised.value.message == what
        assert raised.value.hint == "wait for it to end; the same command then goes on"
        gone = run_pipeline(pipeline, changes={"train.save_steps": 1, "train.beta": 3.0})  # which is another run
        assert gone.run == str(run.with_name("2"))
    assert run_pipeline(pipeline, changes={"train.save_steps": 1}).run == str(run)


def test_a_run_that_somebody_is_just_beginning_is_waited_for_until_it_says_what_it_is(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = run_pipeline(pipeline, until="precompute")
    assert gone.run is None
    begun = tmp_path / "dataset" / "runs" / "1"
    waited: list[float] = []

    def say(seconds: float) -> None:
        """What the other process writes meanwhile."""
        waited.append(seconds)
        if len(waited) > 1:
            more = {"dataset": "d", "pairs": 24, "gate": {}, "prefkit_version": "1", "finished": False}
            write_json(begun / "run.json", prepare_training(pipeline).claim | more)

    monkeypatch.setattr("prefkit.run.time.sleep", say)
    with locked(begun), pytest.raises(DatasetError, match="another prefkit is at work on"):
        run_pipeline(pipeline)
    assert waited == [0.2, 0.2]


class Stopping(Spectator):
    """Asks one stage to stop."""

    def __init__(self, stage: str, stop: Any) -> None:
        super().__init__()
        self.stage, self.asked = stage, stop

    @contextlib.contextmanager
    def follow(self, stage: Any) -> Iterator[Following]:
        with super().follow(stage) as following:
            yield following._replace(stop=self.asked) if stage == self.stage else following


def after(number: int) -> Any:
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= number


def test_several_processes_are_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as raised:
        run_pipeline(pipeline)
    assert raised.value.message == "prefkit run works in one process"
    others = "prefkit precompute and prefkit train by a launcher, in several; the rest without one"
    assert raised.value.expected == others


def test_a_failure_stops_there_and_the_same_call_goes_on(pipeline: Pipeline, tmp_path: Path) -> None:
    lines: list[str] = []
    source = tmp_path / "pairs.jsonl"
    text = source.read_text()
    source.unlink()
    with pytest.raises(SourceError):
        run_pipeline(pipeline, spectator=Spectator(lines.append))
    said = "stopped at build; what is done is on disk, and once that is mended the same command goes on from there"
    assert lines[-1] == said
    source.write_text(text)
    lines.clear()
    with pytest.raises(Interrupted):
        run_pipeline(pipeline, spectator=Spectator(lines.append, stop=lambda: True))
    assert lines[-1] == "stopped at precompute; what is done is on disk, and the same command goes on from there"
    assert [one.stage for one in run_pipeline(pipeline).stages if one.done] == ["build", "audit"]


# the audit


def test_a_bad_verdict_is_told_and_stops_only_who_asked_for_that(pipeline: Pipeline) -> None:
    lines: list[str] = []
    run_pipeline(pipeline, until="precompute", spectator=Spectator(lines.append))
    (line,) = [line for line in lines if line.startswith("the audit's verdict is fail: ")]
    assert line.endswith("; the road goes on (--strict stops here)")
    for _ in range(2):  # the second time it is done already
        with pytest.raises(AuditError) as raised:
            run_pipeline(pipeline, strict=True)
        assert raised.value.message.startswith("the verdict is fail: ")
        assert raised.value.expected == "better than warn (audit.limits.strict)"
        assert raised.value.hint == "prefkit audit TARGET lists the findings"


def test_an_audit_says_what_it_was_made_of(pipeline: Pipeline, tmp_path: Path, model: Path) -> None:
    build_dataset(pipeline)
    path = tmp_path / "dataset" / "audit" / "audit.json"
    assert why_audit(pipeline) == "there was none"
    audit_dataset(pipeline)
    document = json.loads(path.read_text())
    assert why_audit(pipeline) is None
    assert why_audit(pipeline, strict=True) == "it was made without --strict"
    assert why_audit(with_audit(pipeline, memory_limit="2GB")) is None  # it changes no figure
    assert why_audit(with_audit(pipeline, limits={"z_length": 1.0})) == "audit.limits.z_length changed"
    what = "the tokenizer of audit.model, or how pairs become its tokens, changed"
    assert why_audit(with_audit(pipeline, model=str(model))) == what
    for name, why in (
        ("pairs_sha256", "the pairs changed"),
        ("prefkit_version", "prefkit itself changed"),
    ):
        path.write_text(json.dumps(document | {"made_of": document["made_of"] | {name: "x"}}))
        assert why_audit(pipeline) == why
    path.write_text(json.dumps({name: value for name, value in document.items() if name != "made_of"}))
    assert why_audit(pipeline) == "it does not say what it was made of"
    path.write_text("{}")
    assert why_audit(pipeline) == f"{path} is damaged at verdict"
    path.write_text(json.dumps(document))
    (path.parent / "tokens.parquet").unlink()
    assert why_audit(pipeline) == f"{path.parent / 'tokens.parquet'} part is missing"


def with_audit(pipeline: Pipeline, **settings: Any) -> Pipeline:
    section = type(pipeline.audit).model_validate({**pipeline.audit.model_dump(), **settings})
    return pipeline.model_copy(update={"audit": section})


def test_an_audit_with_a_tokenizer_is_done_until_the_tokenizer_or_the_encoding_changes(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    build_dataset(pipeline)
    tokens = with_audit(pipeline, model=str(tiny_llama(tmp_path / "own")))
    audit_dataset(tokens)
    assert why_audit(tokens) is None
    (tmp_path / "own" / "model.safetensors").write_bytes(b"")  # weights have no say
    assert why_audit(tokens) is None
    longer = tokens.precompute.model_copy(update={"max_length": 64})
    what = "the tokenizer of audit.model, or how pairs become its tokens, changed"
    assert why_audit(tokens.model_copy(update={"precompute": longer})) == what
    (tmp_path / "own" / "tokenizer_config.json").write_text("{}")
    assert why_audit(tokens) == what


# looking ahead


def test_a_dry_run_says_what_is_done_and_writes_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    def foreseen(**options: Any) -> dict[str, str]:
        before = snapshot(tmp_path)
        gone = run_pipeline(pipeline, dry_run=True, **options)
        assert snapshot(tmp_path) == before
        return told(gone.stages)

    later = dict.fromkeys(("audit", "precompute", "train"), "follows build")
    assert foreseen() == {"build": "there was none"} | later
    run_pipeline(pipeline, until="build")
    assert foreseen() == {
        "audit": "there was none",
        "precompute": "there was none",
        "train": "follows precompute",
    }
    run_pipeline(pipeline)
    assert foreseen() == {}
    assert run_pipeline(pipeline, dry_run=True).run == str(tmp_path / "dataset" / "runs" / "1")
    assert foreseen(strict=True) == {"audit": "it was made without --strict"}
    runs = tmp_path / "dataset" / "runs"
    assert foreseen(changes={"train.beta": 2.0}) == {"train": f"train.beta changed since {runs / '1'}"}
    assert foreseen(changes={"split.seed": 2}) == {"build": "split.seed changed"} | later
    changed = foreseen(changes={"precompute.max_length": 64})
    assert changed == {"precompute": "1 parts are not scored", "train": "follows precompute"}


def test_looking_ahead_needs_no_torch_before_there_is_data(pipeline: Pipeline, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom prefkit.road import run_pipeline\n"
        "run_pipeline(sys.argv[1], dry_run=True)\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipeline.yaml")], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["False", "False"]


# the command


def test_the_command_has_a_line_a_stage(pipeline: Pipeline, prefkit: Prefkit, tmp_path: Path) -> None:
    path = str(tmp_path / "pipeline.yaml")
    ended = prefkit("run", path)
    assert ended.code == 0
    assert "build: there was none; 24 pairs, " in ended.out
    assert "audit: there was none; verdict fail" in ended.out
    assert "24 scored now" in ended.out  # as prefkit precompute says it
    ended = prefkit("run", path)
    assert "audit: done already; verdict fail" in ended.out
    assert f"train: done already; {pipeline.dataset}/runs/1" in ended.out
    ended = prefkit("run", path, "--json", "--set", "train.beta=2")
    found = ended.last_json()
    assert (found["dataset"], found["run"]) == (pipeline.dataset, f"{pipeline.dataset}/runs/2")
    assert [(one["stage"], one["done"]) for one in found["stages"]] == [
        ("build", True),
        ("audit", True),
        ("precompute", True),
        ("train", False),
    ]
    assert found["stages"][3]["facts"]["steps"] == 2
    ended = prefkit("run", path, "--dry-run", "--until", "build")
    assert ended.out == "build: done already; 24 pairs\n"
    ended = prefkit("run", path, "--strict", "--json")
    assert (ended.code, ended.error()["kind"]) == (1, "AuditError")
    ended = prefkit("run", path, "--until", "nowhere")
    assert ended.code == 2
    assert "nowhere is no stage of the road" in ended.err


# sampling, scoring, evaluating: stand-ins, whose own tests are elsewhere


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was called; sampling writes a file, scoring makes a source of it."""
    called: list[str] = []
    raw, scored = tmp_path / "raw.txt", tmp_path / "scored.jsonl"

    def sample(pipeline: Pipeline, **_: Any) -> Any:
        called.append("sample")
        unchanged = raw.exists()
        raw.write_text("sampled")
        new = 0 if unchanged else 96
        return SimpleNamespace(unchanged=unchanged, samples=96, prompts=24, new=new, out=str(tmp_path))

    def score(pipeline: Pipeline, **_: Any) -> Any:
        called.append("score")
        assert raw.exists()
        unchanged = scored.exists()
        if not unchanged:
            write_rows(scored, text_rows(24))
        return [SimpleNamespace(scorer="number", scored=96, unchanged=unchanged)]

    def evaluate(run: str, settings: Any, **told: Any) -> Any:
        called.append("evaluate")
        assert [one.label for one in settings.scorers] == ["number"]  # those of the score section
        mark = Path(run) / "evaluated"
        unchanged = mark.exists()
        mark.touch()
        headline = {"scorer": "number", "temperature": 1.0, "value": 0.25, "low": 0.125, "high": 0.375}
        document = {"headline": headline if told["dataset"] else None, "settings": {"temperatures": [1.0]}}
        return SimpleNamespace(folder=str(mark), document=document, summary=None, unchanged=unchanged)

    monkeypatch.setattr(stages, "load_sample", lambda: sample)
    monkeypatch.setattr(stages, "load_score", lambda: score)
    monkeypatch.setattr(stages, "load_evaluate", lambda: evaluate)
    return called


def test_the_whole_road_samples_first_and_measures_last(
    pipeline: Pipeline, stand_ins: list[str], tmp_path: Path
) -> None:
    source = {"path": str(tmp_path / "scored.jsonl"), "format": "pairs"}
    prompts = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "one"}]))
    changes = {
        **SAMPLING,
        "evaluate": {"prompts": prompts},
        "sources": [source],
        "sample.out": str(tmp_path / "candidates"),
    }
    gone = run_pipeline(pipeline, changes=changes)
    assert stand_ins == ["sample", "score", "evaluate"]
    assert told(gone.stages) == {
        "sample": "96 responses were not there yet",
        "score": "number had not scored all of it",
        **dict.fromkeys(("build", "audit", "precompute", "train"), "there was none"),
        "evaluate": "this run was not measured so",
    }
    said = {one.stage: one.said for one in gone.stages}
    assert said["sample"] == f"96 responses to 24 prompts in {tmp_path}"
    assert said["score"] == "number: 96 scored"
    assert said["evaluate"].startswith("mean reward by number +0.25 (0.125 to 0.375) over the reference; ")
    assert told(run_pipeline(pipeline, changes=changes).stages) == {}


def test_a_dry_run_of_a_road_that_is_done_says_so_of_every_stage(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"river {n} is", "reference": str(n)} for n in range(8)]
    prompts = str(write_rows(tmp_path / "p.jsonl", rows))
    (tmp_path / "own.py").write_text("def size(completions):\n    return [len(text) for text in completions]\n")
    out = tmp_path / "c"
    changes: dict[str, Any] = {
        "sample": {"prompts": prompts, "out": str(out), "n": 4, "max_new_tokens": 8},
        "score": {"scorers": [{"verifier": "exact"}, {"function": "own:size"}]},
        "evaluate": {"prompts": prompts, "n": 1, "max_new_tokens": 2},
        "sources": [{"path": str(out / "scored" / "*.parquet"), "format": "candidates"}],
        "split.test_share": 0.0,
    }
    assert told(foreseen_road(pipeline, changes)) == {
        "sample": "there was none",
        **dict.fromkeys(("score", "build", "audit", "precompute", "train", "evaluate"), "follows sample"),
    }
    run_pipeline(pipeline, changes=changes)
    before = snapshot(tmp_path)
    gone = foreseen_road(pipeline, changes)
    assert told(gone) == {}
    said = {one.stage: one.said for one in gone}
    assert said["sample"] == f"32 responses to 8 prompts in {out}"
    assert said["score"] == "exact: 32 scored, size: 32 scored"
    assert said["evaluate"].startswith("mean reward by exact ")
    again = foreseen_road(pipeline, changes | {"evaluate.n": 2})
    assert told(again) == {"evaluate": "this run was not measured so"}
    assert snapshot(tmp_path) == before
    (out / "scored" / "size-00000.parquet").unlink()
    assert told(foreseen_road(pipeline, changes))["score"] == "size had not scored all of it"
    write_rows(tmp_path / "p.jsonl", [*rows, {"prompt": "one more", "reference": "1"}])
    assert told(foreseen_road(pipeline, changes))["sample"] == "prompts are new, or responses are missing"
    (out / "sample.json").unlink()
    assert told(foreseen_road(pipeline, changes))["sample"] == "it is not finished"


def foreseen_road(pipeline: Pipeline, changes: dict[str, Any]) -> list[Outcome]:
    return run_pipeline(pipeline, changes=changes, dry_run=True).stages


def test_whoever_asks_at_the_end_of_a_stage_stops_the_road_all_the_same() -> None:
    screen = RoadScreen(Console(quiet=True))

    def follow() -> None:
        with screen.follow("train") as following:
            signal.raise_signal(signal.SIGINT)
            assert following.stop()

    with pytest.raises(Interrupted) as raised:
        follow()
    assert (raised.value.message, raised.value.where) == ("stopped at its end", "train")
