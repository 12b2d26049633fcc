"""The wheel: all that the package needs is in it, and whoever installs it has its types."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
USER = """
from pathlib import Path

import polars as pl

import prefkit
from prefkit import Dataset, Pipeline, PrefkitError


def best(dataset: Dataset) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, run in dataset.runs.items():
        value: float = run.steps.select("rewards/margins").collect().to_series().max()  # type: ignore[assignment]
        found[name] = value
    return found


pipeline: Pipeline = prefkit.load_pipeline("pipeline.yaml", {"train.beta": 0.05})
try:
    built: prefkit.Built = prefkit.build_dataset(pipeline)
    audited: prefkit.Audited = prefkit.audit_dataset(Path("demo/dataset"), changes=["audit.ngrams=1"])
    levels: list[str] = [finding.level for finding in audited.findings]
    told: prefkit.Estimated = prefkit.estimate_reference("demo/dataset")
    done: prefkit.Precomputed = prefkit.precompute_reference("demo/dataset", stop=lambda: False)
    trained: prefkit.Trained = prefkit.train_dpo(pipeline, watch=lambda made, total, row: print(made, total, row))
    exported: prefkit.Exported = prefkit.export_dataset("demo/dataset", "trl", Path("pairs.jsonl"))
    page: prefkit.RunPage = prefkit.write_run_page(["demo/dataset/runs/1"], "run.html")
    loss: float = prefkit.read_runs(["demo/dataset/runs/1"])[0].document["loss"]
    counts: dict[str, int] = built.counts
except PrefkitError as error:
    message: str = error.message
dataset = prefkit.open_dataset("demo/dataset")
pairs: pl.LazyFrame = dataset.pairs
table: pl.LazyFrame = dataset.reference().table
best(dataset)
"""
WRONG = {
    "prefkit.open_dataset(3)": "arg-type",
    "prefkit.train_dpo('demo/dataset', beta=0.05)": "call-arg",
    "prefkit.open_dataset('demo/dataset').pair": "attr-defined",
    "prefkit.audit_dataset('demo/dataset').verdict + 1": "operator",
    "prefkit.trian_dpo": "attr-defined",
}


def tracked(*paths: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *paths], cwd=REPOSITORY, capture_output=True, check=True)
    return listed.stdout.decode().split("\0")[:-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the repository, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked("prefkit", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it; what it depends on is that of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=settings, timeout=900)


@pytest.mark.slow
def test_everything_in_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert set(tracked("prefkit")) - names == set()
    assert {"prefkit/py.typed", "prefkit/page/page.html", "prefkit/demo/world.py"} <= names
    assert {name.split("/")[0] for name in names} == {
        "prefkit",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }


@pytest.mark.slow
def test_the_installed_package_is_the_wheels_and_its_data_is_found(installed: Path, tmp_path: Path) -> None:
    code = (
        "import prefkit, pathlib; from prefkit.run_page import _own; from prefkit.demo.world import write_world\n"
        "print(prefkit.__file__); assert '<html' in _own('page.html') and _own('page.css') and _own('page.js')\n"
        "write_world(pathlib.Path('world'), 0); assert sorted(p.name for p in pathlib.Path('world').iterdir())\n"
    )
    ended = run([installed, "-W", "error", "-c", code], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_the_script_of_a_user_passes_a_strict_type_check_and_mistakes_do_not(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text("import prefkit\n\n" + "\n".join(WRONG) + "\n")
    cache: list[str | Path] = ["--cache-dir", tmp_path / "cache", "--python-executable", installed]
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    checked = run([sys.executable, "-m", "mypy", *cache, "user.py"], tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "Success: no issues found in 1 source file\n"), checked.stderr
    failed = run([sys.executable, "-m", "mypy", *cache, "wrong.py"], tmp_path)
    for number, (line, code) in enumerate(WRONG.items(), 3):
        assert f"wrong.py:{number}: error:" in failed.stdout, line
        assert f"[{code}]" in failed.stdout, (line, failed.stdout)
