"""Several processes train one policy: the losses of one, whoever holds the weights; a process that dies is named."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny import built, text_rows, tiny_llama
from transformers import AutoModelForCausalLM

from prefkit.config import Pipeline
from prefkit.reference import precompute_reference

pytestmark = pytest.mark.slow
SPLIT = {"test_share": 0.2, "seed": 1}
TRAIN = ["learning_rate=0.001", "batch_size=8", "max_steps=8", "eval_steps=3"]
SAVES = [*TRAIN, "save_steps=2"]
PATIENCE = 300.0


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ready")
    rows = [row | {"weight": 0.5 + number % 3} for number, row in enumerate(text_rows(45, low=2, high=30))]
    pipeline = built(folder, rows, tiny_llama(folder / "model"), split=SPLIT)
    precompute_reference(pipeline)
    return pipeline


def launched(count: int, *, by: str = "accelerate") -> list[str]:
    if count == 1:
        return [sys.executable, "-m", "prefkit"]
    if by == "torchrun":
        module = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    else:
        module = ["accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
        module += ["--dynamo_backend", "no", "--num_processes", str(count), "--main_process_port", "0", "--multi_gpu"]
        module.remove("--cpu")
    return [sys.executable, "-m", *module, "-m", "prefkit"]


def train(pipeline: Pipeline, run: Path, settings: Sequence[str]) -> list[str]:
    changes = [word for change in settings for word in ("--set", f"train.{change}")]
    return ["train", pipeline.dataset, "--model", str(pipeline.precompute.model), "--out", str(run), *changes, "--json"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def done(words: Sequence[str], **more: str) -> Any:
    ended = subprocess.run(
        words, env=environment() | more, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('{"run"') == 1  # one of them speaks
    return ended


def curve(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "steps.parquet")


def same_curve(one: Path, other: Path) -> None:
    """The same steps, to float rounding; the same pairs in the same order, and the same final model."""
    left, right = curve(one), curve(other)
    assert left["step"].equals(right["step"])
    for name in left.columns[1:]:
        # of margins that are nothing but rounding, at step 0, even the sign is
        first = 1 if name in ("rewards/accuracies", "drift/displaced") else 0
        values = [frame[name].slice(first) for frame in (left, right)]
        assert values[0].is_null().equals(values[1].is_null()), name
        assert values[0].drop_nulls().to_list() == pytest.approx(
            values[1].drop_nulls().to_list(), abs=2e-4, rel=2e-4
        ), name
    seen = [
        pl.concat([pl.read_parquet(path) for path in sorted((run / "pair_dynamics").iterdir())]) for run in (one, other)
    ]
    assert seen[0].select("step", "pair_id").equals(seen[1].select("step", "pair_id"))
    assert seen[0]["margin"].to_list() == pytest.approx(seen[1]["margin"].to_list(), abs=2e-4)
    models = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (one, other)]
    assert models[0].keys() == models[1].keys()
    apart = torch.cat([(models[0][name] - models[1][name]).abs().flatten() for name in models[0]])
    # a few updates of about 1e-3 a weight; where a gradient is nothing but rounding, so is Adam's direction
    assert float(apart.mean()) <= 2e-6
    assert float(apart.max()) <= 1e-2


@pytest.fixture(scope="module")
def alone(ready: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    done([*launched(1), *train(ready, run, SAVES)])
    assert curve(run)["loss"].drop_nulls().to_list()[-1] < 0.69
    return run


@pytest.mark.parametrize(
    ("count", "by", "settings"),
    [
        (2, "accelerate", SAVES),
        (3, "torchrun", SAVES),
        (2, "torchrun", [*TRAIN, "batch_size=2", "gradient_accumulation_steps=4"]),
        (2, "torchrun", [*SAVES, "shard_weights=true"]),
        (3, "torchrun", [*TRAIN, "shard_weights=true", "max_batch_tokens=60", "gradient_checkpointing=true"]),
    ],
    ids=["2 launched", "3", "2 accumulate", "2 shares", "3 shares, small micro-batches, recomputed"],
)
def test_the_loss_curve_is_that_of_one_process(
    count: int, by: str, settings: list[str], ready: Pipeline, alone: Path, tmp_path: Path
) -> None:
    ended = done([*launched(count, by=by), *train(ready, tmp_path / "run", settings)])
    assert f"training on {count} processes (cpu)" in ended.stderr
    same_curve(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == count


def test_what_accelerate_config_says_of_fsdp_means_shares(ready: Pipeline, alone: Path, tmp_path: Path) -> None:
    ended = done([*launched(2, by="torchrun"), *train(ready, tmp_path / "run", SAVES)], ACCELERATE_USE_FSDP="true")
    assert "each with a share of the weights" in ended.stderr
    same_curve(tmp_path / "run", alone)


class Processes:
    """A launcher and the processes that it started, for as long as a test runs."""

    def __init__(self, words: Sequence[str]) -> None:
        self.launcher = subprocess.Popen(
            words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def workers(self) -> dict[int, int]:
        """Rank to process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                told = (path / "environ").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
            except (OSError, ValueError):
                continue
            ranks = [int(word[5:]) for word in told if word.startswith(b"RANK=")]
            if ranks and parent == self.launcher.pid:
                found[ranks[0]] = int(path.name)
        return found

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.launcher.poll() is None, self.launcher.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ended(self) -> tuple[int, str]:
        _, err = self.launcher.communicate(timeout=PATIENCE)
        return self.launcher.returncode, err


@pytest.fixture
def start() -> Iterator[Callable[..., Processes]]:
    started: list[Processes] = []

    def make(words: Sequence[str]) -> Processes:
        started.append(Processes(words))
        return started[-1]

    yield make
    for one in started:
        if one.launcher.poll() is None:
            for pid in [*one.workers().values(), one.launcher.pid]:
                os.kill(pid, signal.SIGKILL)
            one.launcher.wait()


def made(run: Path) -> int:
    try:
        return len((run / "steps.jsonl").read_text().splitlines())
    except OSError:
        return 0


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_process_that_dies_is_named_and_a_rerun_with_other_processes_ends_as_the_unbroken_run(
    victim: int, then: int, ready: Pipeline, alone: Path, tmp_path: Path, start: Callable[..., Processes]
) -> None:
    run = tmp_path / "run"
    processes = start([*launched(2, by="torchrun"), *train(ready, run, SAVES)])
    processes.until(lambda: made(run) >= 3)
    pid = processes.workers()[victim]
    os.kill(pid, signal.SIGKILL)
    code, err = processes.ended()
    assert code != 0
    assert f"process {victim} ({pid} on " in err
    assert "of 2 is gone\n  next: the same command goes on from the last checkpoint or part" in err
    ended = done([*launched(then, by="torchrun"), *train(ready, run, SAVES)])
    assert "going on from step " in ended.stderr
    same_curve(run, alone)


@pytest.mark.parametrize("shares", [[], ["shard_weights=true"]], ids=["whole", "shares"])
def test_an_interrupt_of_all_leaves_a_checkpoint_that_any_number_goes_on_with(
    shares: list[str], ready: Pipeline, alone: Path, tmp_path: Path, start: Callable[..., Processes]
) -> None:
    run, settings = tmp_path / "run", [*SAVES, *shares]
    processes = start([*launched(2, by="torchrun"), *train(ready, run, settings)])
    processes.until(lambda: made(run) >= 3)
    for pid in processes.workers().values():
        os.kill(pid, signal.SIGINT)
    code, err = processes.ended()
    assert code != 0
    assert "updates; a checkpoint is written" in err
    assert err.count("error: ") == 1
    done([*launched(1 if shares else 3, by="torchrun"), *train(ready, run, settings)])
    same_curve(run, alone)


@pytest.mark.parametrize("settings", [[], ["merge_adapter=true"]], ids=["adapter", "merged"])
def test_an_adapter_of_several_processes_is_that_of_one(settings: list[str], ready: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    told = [*SAVES, "lora={r: 4}", *settings]
    done([*launched(1), *train(ready, tmp_path / "alone", told)])
    done([*launched(2, by="torchrun"), *train(ready, tmp_path / "shares", [*told, "shard_weights=true"])])
    left, right = (curve(tmp_path / name)["loss"].drop_nulls().to_list() for name in ("alone", "shares"))
    assert left == pytest.approx(right, abs=2e-5)
    (held,) = (tmp_path / "shares" / "checkpoints").glob("step-000006/model.safetensors")
    assert all("lora_" in name for name in load_file(held))
    name = "model.safetensors" if settings else "adapter_model.safetensors"
    saved = [load_file(tmp_path / run / "model" / name) for run in ("alone", "shares")]
    assert saved[0].keys() == saved[1].keys()
    assert max(float((saved[0][name] - saved[1][name]).abs().max()) for name in saved[0]) <= 1e-4
    assert json.loads((tmp_path / "shares" / "run.json").read_text())["saved"] == ("merged" if settings else "adapter")
