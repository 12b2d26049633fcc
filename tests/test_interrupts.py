"""Ctrl-C, SIGTERM and two commands at once, with real processes: what is done stays, and the same command goes on.

No test waits for a fixed time: a process is signalled when something that it wrote (or a library that it loaded) says
where it is, and one that has to wait for another is stopped (SIGSTOP) for as long.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tiny import snapshot, text_rows, tiny_llama, write_rows

from prefkit.stopping import stop_on_signals

PATIENCE = 240.0  # seconds: a busy machine is no failure
DATASET = "my data/set 1"


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> Any:
        last = json.loads(self.out.splitlines()[-1])
        assert set(last) == {"error"}
        return last["error"]


class Process:
    """`python -m prefkit WORDS` in a folder, its output in files."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.words = folder, words
        number = len(list(folder.parent.glob("*.err")))
        self.files = [folder.parent / f"{number}.{kind}" for kind in ("out", "err")]
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefkit", *words], cwd=folder, stdout=out, stderr=err, stdin=subprocess.DEVNULL
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def err(self) -> str:
        return self.files[1].read_text(encoding="utf-8")

    def until(self, condition: Callable[[], object], what: str) -> "Process":
        """Wait until something is so; the process must not have ended by then."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.err()}"
            assert time.monotonic() < deadline, f"waited in vain for: {what}"
            time.sleep(0.002)
        return self

    def signal(self, number: int) -> "Process":
        self.process.send_signal(number)
        return self

    def ended(self) -> Ended:
        code = self.process.wait(PATIENCE)
        out, err = (file.read_text(encoding="utf-8") for file in self.files)
        assert "Traceback" not in out + err, err
        return Ended(code, out, err)

    def loaded(self, library: str) -> bool:
        """Whether a library is mapped into the process."""
        with contextlib.suppress(OSError):
            return library in Path(f"/proc/{self.pid}/maps").read_text()
        return False


Prefkit = Callable[..., Process]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of all processes."""
    made = tmp_path / "work"
    made.mkdir()
    return made


@pytest.fixture
def prefkit(folder: Path) -> Iterator[Prefkit]:
    """Start processes; whatever still runs at the end of a test is killed, by its own id."""
    started: list[Process] = []

    def start(*words: str, **where: Path) -> Process:
        started.append(Process(where.get("folder", folder), *words))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def write_pipeline(folder: Path, *sources: str, **sections: Any) -> None:
    settings: dict[str, Any] = {
        "dataset": DATASET,
        "kind": "text",
        "sources": [{"path": path, "format": "pairs"} for path in sources],
        "split": {"test_share": 0.1},
        **sections,
    }
    (folder / "my pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def tables(folder: Path) -> dict[str, bytes]:
    """All files but the locks."""
    return {name: data for name, data in snapshot(folder).items() if Path(name).name != ".lock"}


def different(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def done(process: Process) -> Ended:
    ended = process.ended()
    assert ended.code == 0, ended
    return ended


def assert_interrupted(ended: Ended, words: tuple[str, ...]) -> Any:
    """Exit code 130, the very command to type on stderr, and with --json an error object; returns that object."""
    typed = shlex.join(["prefkit", *words])
    assert ended.code == 130, ended
    assert f"next: {typed}" in ended.err, ended.err
    if "--json" not in words:
        assert "{" not in ended.out
        return None
    error = ended.error()
    assert (error["kind"], error["hint"]) == ("Interrupted", f"{typed}")
    return error


# precompute


@pytest.fixture
def scoring(folder: Path, prefkit: Prefkit) -> tuple[str, ...]:
    """A built dataset whose reference has 40 parts of 32 batches, and the command that makes it."""
    write_rows(folder / "pairs.jsonl", text_rows(1280))
    tiny_llama(folder / "my model", template=None)
    precompute = {"model": "my model", "max_length": 128, "min_completion_tokens": 4, "max_batch_tokens": 1}
    write_pipeline(folder, "pairs.jsonl", precompute=precompute)
    done(prefkit("build", "my pipeline.yaml"))
    return ("precompute", DATASET, "--json")


def parts(folder: Path) -> dict[str, int]:
    """The finished parts of the reference, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{DATASET}/reference/*/part-*.parquet")}


@pytest.mark.slow
def test_precompute_stops_after_a_part_when_asked_and_the_same_command_scores_only_the_rest(
    folder: Path, prefkit: Prefkit, scoring: tuple[str, ...], tmp_path: Path
) -> None:
    written: dict[str, int] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        asked = prefkit(*scoring)
        before = len(written)
        asked.until(lambda before=before: len(parts(folder)) > before, "another part").signal(number)  # type: ignore[misc]
        ended = asked.ended()
        error = assert_interrupted(ended, scoring)
        there = parts(folder)
        assert len(there) < 40
        pairs, left = 32 * (len(there) - before), 40 - len(there)
        assert error["message"] == f"stopped: {pairs} pairs scored and written, {left} parts left"
        assert f"{error['where']}: {error['message']}" in ended.err
        assert "finishing this part, then stopping; press Ctrl-C again to stop at once" in ended.err
        assert {name: there[name] for name in written} == written
        assert not list(folder.glob(f"{DATASET}/reference/*/reference.json"))
        assert not list(folder.rglob(".*.tmp"))
        written = there
        info = json.loads(done(prefkit("info", DATASET, "--json")).out.splitlines()[-1])
        assert info["references"] == []
    done(prefkit(*scoring))
    there = parts(folder)
    assert {name: there[name] for name in written} == written
    assert len(there) == 40
    assert_same_reference_as_unbroken(folder, prefkit, scoring, tmp_path)


def assert_same_reference_as_unbroken(folder: Path, prefkit: Prefkit, words: tuple[str, ...], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("pairs.jsonl", "my model", "my pipeline.yaml"):
        (other / name).symlink_to(folder / name)
    done(prefkit("build", "my pipeline.yaml", folder=other))
    done(prefkit(*words, folder=other))
    assert different(tables(folder / DATASET), tables(other / DATASET)) == []


@pytest.mark.slow
def test_precompute_that_is_interrupted_while_the_model_loads_ends_with_130_and_goes_on(
    folder: Path, prefkit: Prefkit, scoring: tuple[str, ...]
) -> None:
    asked = prefkit(*scoring)
    asked.until(lambda: "hashing the weights" in asked.err(), "the first line").signal(signal.SIGINT)
    assert_interrupted(asked.ended(), scoring)
    assert len(parts(folder)) <= 1
    done(prefkit(*scoring))
    assert len(parts(folder)) == 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["_pydantic_core", "_polars_runtime", "libtorch_cpu", "_safetensors_rust"])
def test_a_command_that_is_interrupted_while_its_libraries_load_ends_with_130_and_no_traceback(
    library: str, number: int, folder: Path, prefkit: Prefkit, scoring: tuple[str, ...]
) -> None:
    asked = prefkit(*scoring)
    asked.until(lambda: asked.loaded(library), f"{library} is loaded").signal(number)
    assert_interrupted(asked.ended(), scoring)
    assert len(parts(folder)) <= 1


@pytest.mark.slow
def test_of_two_precomputes_at_once_one_works_and_the_other_names_the_process_and_host(
    folder: Path, prefkit: Prefkit, scoring: tuple[str, ...]
) -> None:
    first = prefkit(*scoring).until(lambda: parts(folder), "a part").signal(signal.SIGSTOP)
    second = prefkit(*scoring).ended()
    assert second.code == 2
    held = f"is being written by another prefkit (process {first.pid} on {socket.gethostname()})"
    assert (second.error()["kind"], second.error()["message"]) == ("DatasetError", held)
    assert f"error: {DATASET}: {held}\n  next: wait for it to end" in second.err
    first.signal(signal.SIGCONT)
    done(first)
    assert len(parts(folder)) == 40


@pytest.mark.slow
def test_the_lock_of_a_killed_process_locks_nobody_out(
    folder: Path, prefkit: Prefkit, scoring: tuple[str, ...]
) -> None:
    killed = prefkit(*scoring).until(lambda: parts(folder), "a part").signal(signal.SIGKILL)
    assert killed.process.wait(PATIENCE) == -signal.SIGKILL
    assert str(killed.pid) in (folder / DATASET / ".lock").read_text()
    done(prefkit(*scoring))
    assert len(parts(folder)) == 40


# train


@pytest.fixture
def training(folder: Path, prefkit: Prefkit) -> Callable[..., tuple[str, ...]]:
    """A dataset with its reference; called with train settings, it gives the command."""
    write_rows(folder / "pairs.jsonl", text_rows(120))
    tiny_llama(folder / "my model", template=None)
    precompute = {"model": "my model", "max_length": 128, "min_completion_tokens": 4}
    train = {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 300}
    write_pipeline(folder, "pairs.jsonl", precompute=precompute, train=train)
    done(prefkit("build", "my pipeline.yaml"))
    done(prefkit("precompute", DATASET))

    def command(*words: str, **settings: Any) -> tuple[str, ...]:
        changes = [word for key, value in settings.items() for word in ("--set", f"train.{key}={value}")]
        return ("train", DATASET, *changes, *words, "--json")

    return command


def steps(run: Path) -> int:
    """The last step that steps.jsonl tells of, -1 for none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run / "steps.jsonl").read_text().splitlines()[-1])["step"])
    return -1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_steps": 40},
        {"save_steps": 7, "save_total_limit": 1, "eval_steps": 30, "logging_steps": 10},
        {
            "save_steps": 50,
            "eval_steps": 25,
            "gradient_accumulation_steps": 2,
            "max_steps": 200,
            "optimizer": "rmsprop",
        },
    ],
    ids=["plain", "saves", "saves_evals_logs", "accumulates"],
)
def test_training_that_is_interrupted_again_and_again_ends_with_the_bytes_of_an_unbroken_run(
    settings: dict[str, Any], folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    words = training(**settings)
    run, total, came = folder / DATASET / "runs" / "1", settings.get("max_steps", 300), 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        asked = prefkit(*words)
        asked.until(lambda came=came: steps(run) >= came + 10, "ten more steps").signal(number)  # type: ignore[misc]
        ended = asked.ended()
        error = assert_interrupted(ended, words)
        assert "finishing this step and a checkpoint, then stopping; press Ctrl-C again" in ended.err
        assert error["where"] == f"{DATASET}/runs/1"
        newest = max(path.name for path in (run / "checkpoints").iterdir())
        made = int(newest.removeprefix("step-"))
        assert error["message"] == f"stopped after {made} of {total} updates; a checkpoint is written"
        assert came < made < total
        if came:
            assert f"going on from step {came} of {DATASET}/runs/1" in ended.err
        came = made
        assert not list(run.rglob(".*.tmp"))
        told = json.loads(done(prefkit("info", f"{DATASET}/runs/1", "--json")).out.splitlines()[-1])
        assert told["finished"] is False
    done(prefkit(*words))
    broken = tables(run)
    done(prefkit(*words))  # runs/2, from its beginning to its end
    assert different(broken, tables(folder / DATASET / "runs" / "2")) == []


@pytest.mark.slow
def test_training_that_is_interrupted_while_the_model_loads_ends_with_130_and_goes_on(
    folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    words, run = training(max_steps=10), folder / DATASET / "runs" / "1"
    asked = prefkit(*words)
    asked.until(run.exists, "the run directory").signal(signal.SIGINT)
    assert_interrupted(asked.ended(), words)
    done(prefkit(*words))
    assert not (folder / DATASET / "runs" / "2").exists()
    assert json.loads((run / "run.json").read_text())["finished"] is True
    broken = tables(run)
    done(prefkit(*words))
    assert different(broken, tables(folder / DATASET / "runs" / "2")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_request_stops_at_once_but_not_one_that_comes_with_the_first(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals("this part") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a terminal and a launcher both pass on one Ctrl-C
        assert stop()
        monkeypatch.setattr("prefkit.stopping.SAME_REQUEST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert capsys.readouterr().err.count("finishing this part, then stopping; press Ctrl-C again to stop at once") == 1
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_of_two_trainings_into_one_directory_one_works_and_the_other_names_the_process_and_host(
    folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    words, run = training("--out", "my run"), folder / "my run"
    first = prefkit(*words).until(lambda: steps(run) >= 0, "the first step").signal(signal.SIGSTOP)
    second = prefkit(*words).ended()
    assert second.code == 2
    held = f"is being written by another prefkit (process {first.pid} on {socket.gethostname()})"
    assert (second.error()["kind"], second.error()["message"], second.error()["where"]) == (
        "DatasetError",
        held,
        "my run",
    )
    first.signal(signal.SIGCONT)
    done(first)
    assert steps(run) == 300


@pytest.mark.slow
def test_a_training_beside_another_one_gets_a_run_directory_of_its_own(
    folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    runs = folder / DATASET / "runs"
    words = training(max_steps=40)
    first = prefkit(*words).until(lambda: steps(runs / "1") >= 0, "the first step").signal(signal.SIGSTOP)
    second = done(prefkit(*words))
    assert json.loads(second.out.splitlines()[-1])["run"] == f"{DATASET}/runs/2"
    first.signal(signal.SIGCONT)
    assert json.loads(done(first).out.splitlines()[-1])["run"] == f"{DATASET}/runs/1"
    assert different(tables(runs / "1"), tables(runs / "2")) == []


@pytest.mark.slow
def test_two_trainings_that_start_together_get_two_run_directories(
    folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    words = training(max_steps=300)
    both = [prefkit(*words) for _ in range(2)]
    runs = [json.loads(done(one).out.splitlines()[-1])["run"] for one in both]
    assert sorted(runs) == [f"{DATASET}/runs/1", f"{DATASET}/runs/2"]


@pytest.mark.slow
def test_a_run_of_a_killed_training_is_gone_on_with(
    folder: Path, prefkit: Prefkit, training: Callable[..., tuple[str, ...]]
) -> None:
    words, run = training(save_steps=10), folder / DATASET / "runs" / "1"
    killed = prefkit(*words).until(lambda: steps(run) >= 25, "some steps").signal(signal.SIGKILL)
    assert killed.process.wait(PATIENCE) == -signal.SIGKILL
    assert str(killed.pid) in (run / ".lock").read_text()
    assert "going on from step " in done(prefkit(*words)).err
    broken = tables(run)
    done(prefkit(*words))
    assert different(broken, tables(folder / DATASET / "runs" / "2")) == []


# build

BUILD = ("build", "my pipeline.yaml", "--json")


@pytest.fixture
def sources(folder: Path) -> Path:
    """A small source, and one that takes some seconds to read."""
    write_rows(folder / "first.jsonl", text_rows(50))
    rows = ({"prompt": f"Question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(150_000))
    write_rows(folder / "second.jsonl", rows)
    write_pipeline(folder, "first.jsonl", "second.jsonl")
    return folder


def beside(sources: Path, tmp_path: Path) -> Path:
    """A folder of the same files, for a build that nobody interrupts."""
    other = tmp_path / "other"
    other.mkdir()
    for path in sources.iterdir():
        if path.is_file():
            (other / path.name).symlink_to(path)
    return other


@pytest.mark.slow
def test_a_build_that_is_interrupted_does_not_read_again_what_it_has_read(
    sources: Path, prefkit: Prefkit, tmp_path: Path
) -> None:
    dataset = sources / DATASET
    asked = prefkit(*BUILD)
    asked.until(lambda: "reading second.jsonl" in asked.err(), "the second source").signal(signal.SIGINT)
    error = assert_interrupted(asked.ended(), BUILD)
    assert error["message"] == "interrupted; what is finished is on disk"
    assert {path.name for path in dataset.iterdir()} == {".lock", ".drafts"}
    assert len(list((dataset / ".drafts").iterdir())) == 1
    info = prefkit("info", DATASET).ended()
    assert (info.code, "an unfinished build" in info.err) == (2, True)
    again = done(prefkit(*BUILD))
    assert "first.jsonl was read before the build was stopped" in again.err
    assert "reading first.jsonl" not in again.err
    assert "reading second.jsonl" in again.err
    other = beside(sources, tmp_path)
    done(prefkit(*BUILD, folder=other))
    assert different(tables(dataset), tables(other / DATASET)) == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--rebuild",)], ids=["adds", "rebuilds"])
@pytest.mark.parametrize("moment", ["comparing", "writing"])
def test_a_build_over_a_dataset_that_is_interrupted_leaves_the_old_one_or_an_unfinished_one(
    moment: str, words: tuple[str, ...], sources: Path, prefkit: Prefkit, tmp_path: Path
) -> None:
    dataset, command = sources / DATASET, (*BUILD, *words)
    write_pipeline(sources, "first.jsonl")
    done(prefkit(*BUILD))
    other = beside(sources, tmp_path)
    done(prefkit(*BUILD, folder=other))
    old = tables(dataset)
    write_pipeline(sources, "first.jsonl", "second.jsonl")
    read = ["second", "first"][: 1 + len(words)]  # what is added to is not read again
    asked = prefkit(*command)
    if moment == "comparing":
        asked.until(lambda: len(list((dataset / ".drafts").glob("[!.]*"))) == len(read), "the reading is over")
    else:
        asked.until((dataset / ".building" / "pairs").exists, "the tables are begun")
    asked.signal(signal.SIGINT)
    ended = asked.ended()
    if ended.code:  # else the signal found no more than the last lines of output to do
        assert_interrupted(ended, command)
        info = prefkit("info", DATASET, "--json").ended()
        if info.code == 0:
            there = tables(dataset)
            assert {name: there.get(name) for name in old} == old
            assert json.loads(info.out.splitlines()[-1])["counts"]["pairs"] == 50
        else:  # it came while the new tables were swapped in
            assert (moment, info.error()["kind"], "an unfinished build" in info.err) == (
                "writing",
                "DatasetError",
                True,
            )
    again = done(prefkit(*command))
    for name in read if ended.code else ():
        assert f"{name}.jsonl was read before the build was stopped" in again.err
    done(prefkit(*command, folder=other))
    assert different(tables(dataset), tables(other / DATASET)) == []


@pytest.mark.slow
def test_of_two_builds_at_once_one_works_and_the_other_names_the_process_and_host(
    sources: Path, prefkit: Prefkit
) -> None:
    first = prefkit(*BUILD)
    first.until(lambda: "reading second.jsonl" in first.err(), "the second source").signal(signal.SIGSTOP)
    second = prefkit(*BUILD).ended()
    assert second.code == 2
    held = f"is being written by another prefkit (process {first.pid} on {socket.gethostname()})"
    assert (second.error()["kind"], second.error()["message"]) == ("DatasetError", held)
    first.signal(signal.SIGCONT)
    done(first)


@pytest.mark.slow
def test_a_build_that_was_killed_locks_nobody_out(sources: Path, prefkit: Prefkit) -> None:
    killed = prefkit(*BUILD)
    killed.until(lambda: "reading second.jsonl" in killed.err(), "the second source").signal(signal.SIGKILL)
    assert killed.process.wait(PATIENCE) == -signal.SIGKILL
    assert str(killed.pid) in (sources / DATASET / ".lock").read_text()
    again = done(prefkit(*BUILD))
    assert "first.jsonl was read before the build was stopped" in again.err
    assert (sources / DATASET / ".lock").read_text() == ""


@pytest.mark.parametrize("library", ["_pydantic_core", "_polars_runtime", "pyarrow"])
def test_a_build_that_is_interrupted_while_its_libraries_load_ends_with_130_and_no_traceback(
    library: str, sources: Path, prefkit: Prefkit
) -> None:
    asked = prefkit(*BUILD)
    asked.until(lambda: asked.loaded(library), f"{library} is loaded").signal(signal.SIGINT)
    assert_interrupted(asked.ended(), BUILD)
