"""Several processes score one reference: the bytes of one process, one voice, one outcome."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from tiny import built, snapshot, text_rows, tiny_llama

from prefkit import processes
from prefkit.config import Pipeline
from prefkit.errors import DatasetError, MachineError
from prefkit.processes import Team, join_team, num_processes, process_rank

ONE = [sys.executable, "-m", "prefkit"]


def launcher(count: int) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    return [
        *launch,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_processes",
        str(count),
        "-m",
        "prefkit",
    ]


def torchrun(count: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        "-m",
        "prefkit",
    ]


def command(words: Sequence[str], **environment: str) -> Any:
    told = os.environ | {"PYTHONWARNINGS": "default"} | environment
    return subprocess.run(words, env=told, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ready")
    rows = text_rows(400, low=2, high=30)
    settings = {"max_batch_tokens": 300, "max_length": 100}
    return built(folder, rows, tiny_llama(folder / "model"), precompute=settings)


def copied(pipeline: Pipeline, folder: Path) -> str:
    import shutil

    shutil.copytree(pipeline.dataset, folder)
    return str(folder)


@pytest.mark.slow
def test_two_and_three_processes_write_the_bytes_of_one(ready: Pipeline, tmp_path: Path) -> None:
    model = ["--model", str(ready.precompute.model)]
    alone = copied(ready, tmp_path / "alone")
    done = command([*ONE, "precompute", alone, *model], OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    expected = snapshot(tmp_path / "alone")
    assert sum("part-" in name and "reference" in name for name in expected) >= 3
    for name, words in {"2": launcher(2), "3": launcher(3), "torchrun": torchrun(2)}.items():
        dataset = copied(ready, tmp_path / name)
        done = command([*words, "precompute", dataset, *model, "--json"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"key"') == 1  # one of them speaks
        assert done.stderr.count("scored now") == 1
        found = snapshot(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [file for file in found if found[file] != expected[file]] == []


@pytest.mark.slow
def test_a_failure_of_all_is_told_once_and_nobody_waits_for_it(ready: Pipeline, tmp_path: Path) -> None:
    dataset = copied(ready, tmp_path / "dataset")
    done = command([*torchrun(2), "precompute", dataset, "--model", str(tmp_path / "none")])
    assert done.returncode != 0
    assert done.stderr.count("no such model folder") == 1
    assert not (tmp_path / "dataset" / "reference").exists()
    done = command([*torchrun(2), "train", dataset, "--model", str(ready.precompute.model)])
    assert done.stderr.count("no finished reference") == 1
    assert "gone" not in done.stderr


@pytest.mark.slow
def test_the_first_process_measures_the_budget_for_all(ready: Pipeline, tmp_path: Path) -> None:
    """Two GPUs with more and less free memory, in all but the measurement: one plan, and it is process 0's."""
    dataset = copied(ready, tmp_path / "dataset")
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from prefkit import reference\n"
        "from prefkit.config import load_pipeline\n"
        "from prefkit.processes import process_rank\n"
        "def measure(scorer, longest):\n"
        "    Path(f'{__file__}.{process_rank()}').touch()\n"
        "    return 700 + 100 * process_rank()\n"
        "reference.measure_budget = measure\n"
        "reference.pick_device = lambda: torch.device('cuda')\n"
        f"reference.precompute_reference(load_pipeline({str(tmp_path / 'pipeline.yaml')!r}))\n",
        encoding="utf-8",
    )
    precompute = ready.precompute.model_dump(exclude={"max_batch_tokens"})
    sources = [{"path": ready.sources[0].path, "format": "pairs"}]
    settings = {"dataset": dataset, "kind": "text", "sources": sources, "precompute": precompute}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = command([*torchrun(2)[:-2], str(script)])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("script.py.*")] == ["script.py.0"]
    (plan,) = (tmp_path / "dataset" / "reference").glob("*/plan.parquet")
    assert set(pl.read_parquet(plan)["max_batch_tokens"]) == {700}
    assert sum(pl.read_parquet(part).height for part in plan.parent.glob("part-*.parquet")) == 400


def test_the_first_process_of_one_speaks_whatever_is_left_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size in (("1", "1"), ("", ""), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert (process_rank(), num_processes()) == (0, 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (OSError(28, "No space left on device"), "the disk is full"),
    ],
    ids=["memory", "disk"],
)
def test_what_a_machine_lacks_keeps_its_kind_on_the_way_to_the_others(error: Exception, message: str) -> None:
    _, carried = processes._outcome(lambda: fail(error))
    assert isinstance(carried, MachineError)
    assert carried.message == message


def test_alone_a_team_is_a_plain_call() -> None:
    with join_team() as team:
        assert (team.rank, team.size, team.is_main) == (0, 1, True)
        assert team.on_main(lambda: 5) == 5
        assert team.on_each(lambda: 5) == [5]
        with pytest.raises(DatasetError, match="gone"):
            team.on_each(lambda: fail(DatasetError("gone")))
    assert (process_rank(), num_processes()) == (0, 1)


def fail(error: Exception) -> None:
    raise error


def test_only_the_first_process_is_main() -> None:
    assert [Team(rank, 3).is_main for rank in range(3)] == [True, False, False]


@pytest.mark.slow
def test_what_one_process_cannot_do_fails_all_of_them_by_name(tmp_path: Path) -> None:
    """Process 1 runs out of memory, then meets a bug; process 0 is told, and none is left waiting."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from prefkit.errors import MachineError\n"
        "from prefkit.processes import join_team\n"
        "def work():\n"
        "    if team.rank == 1:\n"
        "        raise error\n"
        "    return team.rank\n"
        "with join_team() as team, Path(f'{__file__}.{team.rank}').open('w') as out:\n"
        "    for error in (MachineError('no memory', where='here', hint='less'), KeyError('a bug')):\n"
        "        try:\n"
        "            team.on_each(work)\n"
        "        except Exception as caught:\n"
        "            text = str(caught).splitlines()[0]\n"
        "            print(type(caught).__name__, text, getattr(caught, 'hint', ''), file=out)\n"
        "    print(team.on_main(lambda: team.rank + 10), team.on_each(lambda: team.rank), file=out)\n",
        encoding="utf-8",
    )
    done = command([*torchrun(2)[:-2], str(script)])
    assert done.returncode == 0, done.stderr
    expected = "MachineError here: no memory less\nRuntimeError Traceback (most recent call last): \n10 [0, 1]\n"
    for rank in (0, 1):
        assert Path(f"{script}.{rank}").read_text(encoding="utf-8") == expected


@pytest.mark.slow
def test_an_error_that_only_one_process_has_is_its_own_to_tell(ready: Pipeline, tmp_path: Path) -> None:
    """Inside a step the others wait in a collective: process 1 speaks for itself, and they say that it is gone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from prefkit import cli, processes\n"
        "from prefkit.processes import join_team\n"
        "def work():\n"
        "    import torch\n"
        "    with join_team() as team, team.together():\n"
        "        if team.rank == 1:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "        torch.distributed.all_reduce(torch.zeros(1))\n"
        "cli.app = lambda **_: work()\n"
        "cli.main()\n",
        encoding="utf-8",
    )
    done = command([*torchrun(2)[:-2], str(script)])
    assert done.returncode != 0
    assert done.stderr.count("error: process 1: out of memory") == 1
    assert done.stderr.count("of 2 is gone") <= 1  # unless the launcher was quicker to end it
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


def test_of_those_that_are_left_the_first_one_names_the_lost_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.gethostname()
    members = tuple(processes.Member(here, pid) for pid in (11, 22, 33))
    monkeypatch.setattr(processes, "_lives", lambda pid: pid != 11)
    for rank, speaks in ((1, True), (2, False)):
        with pytest.raises(MachineError) as caught, Team(rank, 3, members).together():
            raise RuntimeError("[..] Connection closed by peer [127.0.0.1]:1234")
        assert caught.value.message == f"process 0 (11 on {here}) of 3 is gone"
        hint = "the same command goes on from the last checkpoint or part; the lines above may say why it ended"
        assert caught.value.hint == hint
        assert hasattr(caught.value, processes.ALONE_WITH) == speaks
    monkeypatch.setattr(processes, "_lives", lambda _pid: True)
    monkeypatch.setattr("time.monotonic", iter([0.0, 9.0]).__next__)
    with pytest.raises(MachineError, match="another process of 3 is gone"), Team(0, 3, members).together():
        raise RuntimeError("Connection reset by peer")


def test_a_bug_of_one_process_is_not_taken_for_a_lost_one() -> None:
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError), Team(1, 2).together():
        raise error
    assert getattr(error, processes.ALONE_WITH) == 1
    with pytest.raises(RuntimeError, match="alone"), Team(0, 1).together():
        raise RuntimeError("alone: Connection closed by peer")
