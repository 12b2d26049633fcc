"""`prefkit demo` shows what it promises, from planted flaws to a policy that prefers chosen on held-out pairs."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from pydantic import BaseModel
from rich.console import Console

from prefkit.demo.walk import pipeline_text, run_demo
from prefkit.documents import Audit, Manifest, Reference, Run
from prefkit.errors import InputError
from prefkit.query import query_dataset


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something that is not the demo's"):
        run_demo(str(tmp_path), Console(file=StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_demo_pipeline_names_its_own_folder_only(tmp_path: Path) -> None:
    text = pipeline_text(tmp_path / "here")
    assert str(tmp_path / "here" / "dataset") in text
    assert text.count(str(tmp_path)) == 5  # dataset, three sources, model


@pytest.mark.slow
def test_the_demo_walks_the_whole_road(demo_walked: tuple[Path, str]) -> None:
    folder, said = demo_walked
    planted = re.findall(r"^  (\w+) +planted +(\d+) +found +(\d+)$", said, re.MULTILINE)
    assert len(planted) == 11
    assert all(int(count) > 0 and count == found for _, count, found in planted), planted
    assert "the audit fails: 'certainly'\n" in said
    (first,) = re.findall(r"loss at step 0: ([\d.]+)", said)
    (before,) = re.findall(r"per token prefer chosen in ([\d.]+)% before", said)
    (after,) = re.findall(r"reward margin prefers chosen in ([\d.]+)% after", said)
    assert abs(float(first) - 0.693147) <= 2e-5
    assert 35 <= float(before) <= 65  # a base model without a preference, on some 80 pairs
    assert float(after) >= 90

    dataset = folder / "dataset"
    documents: dict[str, type[BaseModel]] = {
        "manifest.json": Manifest,
        "audit/audit.json": Audit,
        "reference/*/reference.json": Reference,
        "runs/1/run.json": Run,
    }
    for pattern, document in documents.items():
        (path,) = dataset.glob(pattern)
        document.model_validate(json.loads(path.read_text(encoding="utf-8")))
    for view in ("pairs", "dropped", "rejects", "tokens", "reference", "steps", "pair_dynamics"):
        assert query_dataset(dataset, f"select count(*) from {view}").fetchall()[0][0] > 0, view
