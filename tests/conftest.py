"""What tests share: the folder of real data (skipped without it), tiny random models, and a pipeline writer."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Ended, Prefkit
from filelock import FileLock
from rich.console import Console

from prefkit import cli
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


@pytest.fixture(scope="session")
def demo_walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder `demo` of a whole `prefkit demo`, walked once for all tests and workers, and what it printed.

    To be read, or copied: the files belong to all.
    """
    from prefkit.demo.walk import run_demo

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    said = shared / "demo.txt"
    with FileLock(shared / "demo.lock"), contextlib.chdir(shared):
        if not said.exists():
            screen = StringIO()
            run_demo("demo", Console(file=screen, width=200))
            said.write_text(screen.getvalue(), encoding="utf-8")
    return shared / "demo", said.read_text(encoding="utf-8")


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


@pytest.fixture
def prefkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Prefkit:
    """Run a command in this process, in the folder of the test; anything but an exit code, and a traceback, fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["prefkit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, err
        return Ended(ended.value.code if isinstance(ended.value.code, int) else 0, out, err)

    return run
