"""Trackers are told every logged step; one that is missing or fails is said, and no run is lost."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from prefkit.errors import InputError
from prefkit.trackers import Trackers, check_trackers

ROW = {"step": 3, "loss": 0.5, "eval_loss": None, "rewards/margins": 0.25}
PERF = {"step": 3, "tokens_per_second": 100.0, "mfu": None, "peak_memory": 7}


def test_a_tracker_that_is_not_installed_is_refused_with_the_command() -> None:
    with pytest.raises(InputError) as caught:
        check_trackers(["tensorboard", "wandb_of_nowhere"])
    assert (
        str(caught.value) == "train.trackers: wandb_of_nowhere is not installed\n  next: pip install wandb_of_nowhere"
    )


def test_tensorboard_reads_what_was_logged_and_forgets_what_a_resumed_run_makes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged(start: int, steps: range, shift: float) -> None:
        trackers = Trackers(["tensorboard"], tmp_path, start, {"beta": 0.1, "lora": {"r": 8}, "model": None})
        for step in steps:
            trackers.log(ROW | {"step": step, "loss": step + shift}, PERF)
        trackers.close()

    logged(0, range(6), 0.0)
    logged(4, range(4, 8), 0.5)
    found = EventAccumulator(str(tmp_path / "trackers" / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "rewards/margins", "perf/tokens_per_second", "perf/peak_memory"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        *((step, float(step)) for step in range(4)),
        *((step, step + 0.5) for step in range(4, 8)),
    ]


def test_a_tracker_that_fails_is_told_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb as it is used here, without wandb: it speaks on stdout, and its server dies."""
    calls: list[Any] = []

    class Run:
        def log(self, values: Any, step: int) -> None:
            print("a word of its own")
            calls.append((step, values))
            if step == 4:
                raise OSError("the service is gone\nand more")

        def finish(self) -> None:
            calls.append("finish")

    def init(**given: Any) -> Run:
        calls.append(given)
        return Run()

    module: Any = types.ModuleType("wandb")
    module.init, module.config = init, types.SimpleNamespace(update=lambda values, **_more: calls.append(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    trackers = Trackers(["wandb"], tmp_path, 0, {"beta": 0.1, "lora": {"r": 8}, "trackers": ["wandb"]}, said.append)
    for step in (3, 4, 5):
        trackers.log(ROW | {"step": step}, PERF)
    trackers.close()
    values = {"loss": 0.5, "rewards/margins": 0.25, "perf/tokens_per_second": 100.0, "perf/peak_memory": 7}
    assert calls[0]["dir"] == str(tmp_path / "trackers")
    assert calls[0]["project"] == "prefkit"
    assert calls[1] == {"beta": 0.1, "lora.r": 8, "trackers": "['wandb']"}
    assert calls[2:] == [(3, values), (4, values)]
    assert said == ["wandb is told no more: the service is gone"]
    assert capsys.readouterr().out == ""
