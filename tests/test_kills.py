"""A hundred times kill -9 at a random moment, each followed by the same command: the bytes of an unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from killer import COMMANDS
from tiny import text_rows, tiny_llama, write_rows

from prefkit.build import build_dataset
from prefkit.config import load_pipeline
from prefkit.reference import precompute_reference

SEED, KILLS = 20261121, 20
FEWER = {"run": 6, "sweep": 6}  # of what is several commands in one
ROWS = {"build": 3000, "add": 3000, "audit": 500, "repair": 200, "run": 30, "sweep": 15}  # a source
KILLER = Path(__file__).parent / "killer.py"


def prepare_scoring(start: Path) -> None:
    """Three parts of responses: every 60th prompt has two that a judge can compare."""
    rows = [
        {"prompt": f"note {n}", "response": text}
        for n in range(3000)
        for text in (["river", "stone and lantern"] if n % 60 == 0 else ["river"])
    ]
    write_rows(start / "r.jsonl", rows)
    (start / "scoring.py").write_text("def size(completions):\n    return [len(c) for c in completions]\n")
    tiny_llama(start / "model", max_position_embeddings=2048)


def prepare(folder: Path, command: str) -> None:
    """FOLDER/start with all that the command needs, in relative paths."""
    start = folder / "start"
    start.mkdir(parents=True)
    if command == "score":
        return prepare_scoring(start)
    sources = []
    for number in range(4):
        rows = text_rows(ROWS.get(command, 60), seed=number)
        write_rows(start / f"pairs-{number}.jsonl", rows)
        sources.append({"path": f"pairs-{number}.jsonl", "format": "pairs"})
    settings: dict[str, Any] = {
        "dataset": "dataset",
        "kind": "text",
        "sources": sources,
        "precompute": {"model": "model", "max_length": 128, "min_completion_tokens": 4, "max_batch_tokens": 120},
        "split": {"test_share": 0.1},
        "sample": {
            "prompts": "pairs-0.jsonl",
            "out": "candidates",
            "n": 2,
            "max_new_tokens": 30,
            "max_batch_tokens": 80,
        },
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 40,
            "save_steps": 4,
            "eval_steps": 15,
        },
    }
    if command in FEWER:
        settings["train"] |= {"max_steps": 6, "save_steps": 2, "eval_steps": 4}
    if command == "add":  # two sources to a dataset of two
        (start / "longer.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        settings["sources"] = sources[:2]
    (start / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    tiny_llama(start / "model")
    here = Path.cwd()
    os.chdir(start)
    try:
        pipeline = load_pipeline("pipeline.yaml")
        if command not in ("build", "sample", "run"):
            build_dataset(pipeline)
        if command == "train":
            precompute_reference(pipeline)
    finally:
        os.chdir(here)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_kills_and_the_same_command_leave_the_bytes_of_an_unbroken_run(command: str, tmp_path: Path) -> None:
    prepare(tmp_path, command)
    kills = FEWER.get(command, KILLS)
    killer = [sys.executable, str(KILLER), command, str(SEED), str(kills), str(tmp_path)]
    done = subprocess.run(killer, capture_output=True, text=True, check=False)
    output = tmp_path / "output.txt"
    assert done.returncode == 0, done.stderr[-2000:] + (output.read_text()[-2000:] if output.exists() else "")
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["moments"]) >= kills
    assert found["different"] == []
    assert found["kills"] >= kills // 2, found  # a moment may come after the end of the work
    assert found["unfinished"] >= 3, found  # and some kills must have left work behind
