"""`prefkit info RUN` on the terminal, at every width and on screens without blocks."""

import json
import math
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from command import Prefkit
from rich.console import Console
from runs import write_run, write_table

from prefkit.curves import read_curves
from prefkit.run_view import print_runs

ROWS = [
    {"step": i, "epoch": i / 10, "num_pairs": 8, "loss": 0.75 - i / 8, "rewards/accuracies": 0.5, "learning_rate": 1e-6}
    for i in range(5)
]
ROWS[4] |= {"eval_loss": 0.41}
PERF = [{"step": i, "tokens_per_second": 12345.6, "peak_memory": 3 << 30} for i in range(5)]


def shown(*runs: Path, width: int = 100) -> list[str]:
    screen = StringIO()
    print_runs([read_curves(run) for run in runs], Console(file=screen, width=width, soft_wrap=True))
    return screen.getvalue().splitlines()


def test_a_run_and_its_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", ROWS, PERF, steps=5, warnings=[{"step": 3, "name": "x", "text": "look here"}])
    lines = shown(run)
    assert lines[0] == f"run {run}"
    assert "  state         finished: 5 updates" in lines
    assert "  warning       step 3: look here" in lines
    heading = next(i for i, line in enumerate(lines) if "first -> last" in line)
    assert lines[heading].split() == ["first", "->", "last", "min", "..", "max", "test"]
    curves = lines[heading + 1 :]
    assert [" ".join(line.split()) for line in curves] == [
        "loss █▆▅▃▁ 0.75 -> 0.25 0.25 .. 0.75 0.41",
        "accuracy ▁▁▁▁▁ 0.5 -> 0.5 0.5 .. 0.5",
        "learning rate ▁▁▁▁▁ 1e-06 -> 1e-06 1e-06 .. 1e-06",
        "tokens/s ▁▁▁▁▁ 12,346 -> 12,346 12,346 .. 12,346",
        "peak memory GiB ▁▁▁▁▁ 3 -> 3 3 .. 3",
    ]
    # the figures stand below their headings
    assert {line.index("->") for line in curves[:2]} != set()
    assert lines[heading].index("first") == curves[0].index("0.75 ->")
    assert lines[heading].index("min") == curves[0].index("0.25 ..")
    assert lines[heading].index("test") == curves[0].index("0.41")


@pytest.mark.parametrize("width", [60, 72, 80, 100, 132, 200, 400])
def test_curves_keep_within_the_width_and_use_it(width: int, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "step": i, "loss": math.sin(i / 30)} for i in range(1000)]
    lines = shown(write_run(tmp_path / "r", rows, train={"max_steps": 1000}), width=width)
    heading = next(i for i, line in enumerate(lines) if "first -> last" in line)
    assert max(len(line) for line in lines[heading:]) <= width
    blocks = max(sum(c in "▁▂▃▄▅▆▇█" for c in line) for line in lines[heading:])
    assert min(blocks, 120) >= min(120, width - 60)


def test_a_narrow_screen_gives_each_curve_a_line_of_its_own(tmp_path: Path) -> None:
    lines = shown(write_run(tmp_path / "r", ROWS), width=40)
    assert "    █▆▅▃▁" in lines
    told = next(line for line in lines if "0.75 ->" in line)
    assert " ".join(told.split()) == "loss 0.75 -> 0.25 0.25 .. 0.75 0.41"


def test_a_mean_of_each_stretch_is_drawn_where_there_are_more_steps_than_columns(tmp_path: Path) -> None:
    rows = [{"step": i, "num_pairs": 1, "loss": [0.0, 2.0, 7.0, 7.0][i * 4 // 400]} for i in range(400)]
    (line,) = [line for line in shown(write_run(tmp_path / "r", rows), width=100) if "loss  " in line and "->" in line]
    blocks = [c for c in line if c in "▁▂▃▄▅▆▇█"]
    assert blocks == sorted(blocks)
    assert {"▁", "▃", "█"} <= set(blocks)  # 0, 2 and 7 of 7
    assert blocks.count("█") >= len(blocks) // 2 - 1


def test_drift_takes_the_place_of_log_probs_and_beta_is_told_where_it_moves(tmp_path: Path) -> None:
    old = [{"step": i, "num_pairs": 1, "loss": 0.5, "logps/chosen": -9.0 - i, "beta": 0.1} for i in range(3)]
    told = "\n".join(shown(write_run(tmp_path / "old", old)))
    assert "logps chosen" in told
    assert "beta  " not in told
    new = [row | {"drift/chosen": -1.0 * i, "beta": 0.1 + i} for i, row in enumerate(old)]
    told = "\n".join(shown(write_run(tmp_path / "new", new)))
    assert "drift chosen" in told
    assert "logps chosen" not in told
    assert "beta  " in told


def test_nothing_is_said_of_what_an_old_run_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=5)
    write_table(run / "steps.parquet", "steps", ROWS, without=["eval_loss", "beta", "kl/chosen"])
    told = "\n".join(shown(run)[1:])
    assert "loss" in told
    for word in ("KL", "drift", "tokens/s", "processes", "model/ holds", "best", "test", "None", "nan"):
        assert word not in told


def test_a_run_that_has_not_begun_says_so(tmp_path: Path) -> None:
    assert shown(write_run(tmp_path / "r", finished=False))[-1] == "  no step is logged yet"


def test_several_runs_stand_one_after_the_other(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, ROWS) for name in ("a", "b"))
    lines = shown(first, second)
    assert [line for line in lines if line.startswith("run ")] == [f"run {first}", f"run {second}"]
    assert lines[lines.index(f"run {second}") - 1] == ""


# the command


def command(folder: Path, encoding: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    settings = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"} | environment
    words = [sys.executable, "-m", "prefkit", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, env=settings, timeout=120, check=True)


def test_a_screen_without_blocks_gets_ascii(tmp_path: Path) -> None:
    write_run(tmp_path / "r", ROWS)
    ended = command(tmp_path, "ascii", "info", "r")
    assert " #*+-_ " in ended.stdout.decode("ascii")
    assert " █▆▅▃▁ " in command(tmp_path, "utf-8", "info", "r").stdout.decode()


def test_a_name_that_a_screen_cannot_show_does_not_hide_the_rest(tmp_path: Path) -> None:
    write_run(tmp_path / "café", ROWS)
    lines = command(tmp_path, "ascii", "info", "café").stdout.decode("ascii").splitlines()
    assert lines[0] == "run caf?"
    assert len(lines) > 8


def test_info_of_one_run_is_its_document_with_progress_and_curves(prefkit: Prefkit, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", ROWS, PERF, finished=False, train={"max_steps": 9})
    told = prefkit("info", "r", "--json").last_json()
    assert told["run"] == "r"
    document: dict[str, Any] = json.loads((run / "run.json").read_text())
    assert {name: told[name] for name in document} == document
    assert told["progress"] == {"made": 5, "total": 9}
    loss = {"first": 0.75, "last": 0.25, "min": 0.25, "max": 0.75, "eval": 0.41}
    assert told["curves"]["loss"] == loss
    assert told["curves"]["peak_memory"]["last"] == 3 << 30
    assert set(told["curves"]) == {"loss", "rewards/accuracies", "learning_rate", "tokens_per_second", "peak_memory"}


def test_info_of_several_runs_is_a_list_each_run_once(prefkit: Prefkit, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, ROWS)
    told = prefkit("info", "b", "a", "./b", "--json").last_json()
    assert [run["run"] for run in told["runs"]] == ["b", "a"]
    ended = prefkit("info", "b", "a")
    assert [line for line in ended.out.splitlines() if line.startswith("run ")] == ["run b", "run a"]


def test_infinite_values_are_valid_json(prefkit: Prefkit, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "kl/chosen": math.inf}, {**ROWS[1], "kl/chosen": 1.5}]
    write_run(tmp_path / "r", rows, finished=False)
    assert prefkit("info", "r", "--json").last_json()["curves"]["kl/chosen"]["max"] == 1.5
    assert prefkit("info", "r").code == 0


def test_several_targets_must_be_runs(prefkit: Prefkit, tmp_path: Path) -> None:
    write_run(tmp_path / "r", ROWS)
    (tmp_path / "data set").mkdir()
    error = prefkit("info", "r", "data set", "--json").error()
    assert error == {
        "kind": "InputError",
        "message": "is no run",
        "where": "data set",
        "expected": "a directory with run.json",
        "hint": "prefkit info 'data set' alone says what a dataset holds",
    }


def test_escape_sequences_of_a_run_reach_no_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07"
    warnings = [{"step": 1, "name": evil, "text": f"text {evil}"}]
    write_run(tmp_path / f"r{evil}", ROWS, model=f"m{evil}", train={"optimizer": evil}, warnings=warnings)
    out = command(tmp_path, "utf-8", "info", f"r{evil}").stdout.decode()
    assert [c for c in out if not c.isprintable() and c != "\n"] == []
    assert out.count("owned") >= 4
