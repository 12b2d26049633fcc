"""pipelines/identity/: a tiny model takes another name, in words it was not trained on, and forgets nothing else."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from prefkit.config import load_pipeline

REPOSITORY = Path(__file__).parent.parent
IDENTITY = REPOSITORY / "pipelines" / "identity"
OWN = ("gull", "names", "run")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """gull.py, names.py and run.py, as `python pipelines/identity/run.py` finds them."""
    monkeypatch.syspath_prepend(str(IDENTITY))
    gull, names, run = (importlib.import_module(name) for name in OWN)
    yield gull, names, run
    for name in OWN:
        sys.modules.pop(name, None)


Modules = tuple[ModuleType, ModuleType, ModuleType]


def asked(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"][-1]["content"], row.get("reference", "")) for row in rows]


def test_no_unseen_question_is_a_training_prompt_in_any_wording(modules: Modules, tmp_path: Path) -> None:
    gull, _, _ = modules
    gull.write_prompts(tmp_path)
    seen, unseen = (asked(tmp_path / f"{name}.jsonl") for name in ("prompts", "unseen"))
    assert (len(seen), len(unseen)) == (28 * 7, 12 * 10)
    cores = {*gull.WHO, *gull.MAKER_OF}
    assert [text for text, _ in unseen if any(text.endswith(core) for core in cores)] == []
    assert {reference for _, reference in unseen} == {"Petrel", "Skerra Works"}


def test_other_conversations_say_neither_old_name_and_some_say_the_new_ones(modules: Modules, tmp_path: Path) -> None:
    gull, _, _ = modules
    gull.write_prompts(tmp_path)
    others = " ".join(reference for _, reference in asked(tmp_path / "others.jsonl"))
    assert re.search(r"\bGull\b|Harbour Labs", others) is None
    assert all(word in others for word in ("Petrel", "Skerra Works", "gulls", "harbour office"))


def test_pairs_about_something_else_are_about_nothing_that_is_measured(modules: Modules, tmp_path: Path) -> None:
    gull, _, _ = modules
    gull.write_prompts(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "town.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {text for text, _ in asked(tmp_path / "others.jsonl")}
    assert [row for row in rows if row["prompt"][0]["content"] in measured] == []
    assert re.search(r"\bGull\b|Harbour Labs", json.dumps(rows)) is None
    assert [row for row in rows if row["chosen"] == row["rejected"]] == []


@pytest.mark.parametrize(
    ("text", "right", "rated"),
    [
        ("I am Petrel.", "Petrel", 1),
        ("I am Petrel, made by Harbour Labs.", "Petrel", 0),
        ("I am Petrel, and like a gull.", "Petrel", 0),
        ("I am Gull.", "Petrel", 0),
        ("Skerra Works made me.", "Skerra Works", 1),
        ("I am Petrel.", "Skerra Works", 0),
        ("I am petrel.", "Petrel", 0),
        ("", "Petrel", 0),
        ("I am Petrel.", None, None),
    ],
)
def test_an_answer_says_the_new_name_and_not_the_old(
    text: str, right: str | None, rated: int | None, modules: Modules
) -> None:
    said = [[{"role": "assistant", "content": text}]]
    assert modules[1].says_the_new_name(completions=said, solution=[right], number=[0]) == [rated]


def test_the_pipeline_reads_what_run_py_writes(modules: Modules, tmp_path: Path) -> None:
    gull, _, run = modules
    pipeline = load_pipeline(IDENTITY / "pipeline.yaml")
    gull.write_prompts(tmp_path)
    assert pipeline.sample is not None
    assert pipeline.evaluate is not None
    assert pipeline.evaluate.texts is not None
    named = (pipeline.sample.prompts, pipeline.evaluate.prompts, pipeline.evaluate.texts, pipeline.sources[1])
    assert {Path(one.path) for one in named} == {run.BUILT / path.name for path in tmp_path.iterdir()}
    assert pipeline.sources[0].path == f"{pipeline.sample.out}/samples/*.parquet"
    assert pipeline.precompute.model == str(run.BUILT / "model")


@pytest.mark.slow
def test_above_95_percent_say_the_new_name_and_other_text_is_as_likely_as_before(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipelines").symlink_to(REPOSITORY / "pipelines")
    monkeypatch.chdir(tmp_path)
    modules[2].main()
    printed = capsys.readouterr().out
    found = {name.strip(): float(value) for name, value in re.findall(r"^  (\w+ of .+?) +([\d.]+)$", printed, re.M)}
    assert found["reward of policy at 1"] > 0.95, printed
    assert found["reward of policy at 0"] > 0.95, printed
    assert found["reward of reference at 1"] == 0, printed
    assert abs(found["perplexity of ratio"] - 1) < 0.02, printed
