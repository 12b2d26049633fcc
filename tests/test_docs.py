"""docs/api.md is what the docstrings say, and every block of Python in the docs of the API runs beside the demo."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefkit

REPOSITORY = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SIGNATURE = re.compile(r"prefkit\.\w+\([^\n]*\) -> .*\n|prefkit\.\w+\(\n(    .*\n)+\) -> .*\n")
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def blocks(page: str) -> list[str]:
    """Those that can run: no signatures."""
    found = BLOCK.findall((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))
    return [block for block in found if not SIGNATURE.fullmatch(block)]


def test_the_page_of_the_api_is_current() -> None:
    pytest.importorskip("griffe")
    command = [sys.executable, "tools/api_page.py"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    assert (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8") == made.stdout, "run `make docs`"


def test_the_page_of_the_api_has_every_public_name_once() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    listed = re.findall(r"^\* `(\w+)`: ", text.split("\n## Errors\n")[1], re.MULTILINE)
    assert sorted([*named, *listed, "__version__"]) == sorted(prefkit.__all__)
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= {
        re.sub(r"[^\w-]", "-", heading.lower()) for heading in re.findall(r"^##+ (.+)$", text, re.MULTILINE)
    }


def test_the_table_of_calls_names_calls() -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `prefkit .* \| (.*) \|$", text, re.MULTILINE)
    called = {name for row in rows for name in re.findall(r"`(\w+)\(", row)}
    assert called == {name for name in prefkit.__all__ if name.islower()} - {
        "__version__",
        "open_dataset",
        "pipeline_of",
        "torch_dataset",
        "torch_stream",
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder beside the demo's, as working directory."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            prefkit.run_demo()
        yield folder
    finally:
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["python.md", "api.md"])
def test_every_block_of_the_docs_runs_in_its_order_and_prints_what_it_says(demo: Path, page: str) -> None:
    space: dict[str, Any] = {"prefkit": prefkit}
    assert len(blocks(page)) >= 9
    for block in blocks(page):
        if page == "api.md":  # each example stands alone
            space = {"prefkit": prefkit}
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, page, "exec"), space)
        said = PRINTED.findall(block)
        lines = out.getvalue().splitlines()
        for expected in said if page == "python.md" else []:
            assert expected in lines, (block, lines)
