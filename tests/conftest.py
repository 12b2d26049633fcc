"""What tests share: the folder of real data (skipped without it), tiny random models, and a pipeline writer."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefkit.config import Pipeline, load_pipeline

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: two test workers share two cores
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run two at a time: a thread each keeps them fast, and sums in one order."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data: PREFKIT_TEST_DATA, or a sibling folder shared/data of the repository."""
    folder = Path(os.environ.get("PREFKIT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "MANIFEST.json").exists():
        pytest.skip("no real data: set PREFKIT_TEST_DATA to its folder")
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines; a string is written as it is, so that a line can be broken on purpose."""

    def write(name: str, rows: Iterable[Mapping[str, Any] | str]) -> Path:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pipeline_of(tmp_path: Path) -> Callable[..., Pipeline]:
    """A checked pipeline over sources, written to and read from a file: pipeline_of(source, kind=..., split={...})."""

    def make(*sources: Mapping[str, Any], **sections: Any) -> Pipeline:
        settings = {"dataset": str(tmp_path / "dataset"), "sources": [dict(s) for s in sources], **sections}
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return load_pipeline(path)

    return make
