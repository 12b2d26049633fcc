"""The names of the package: each command is a call, light to import, the same to a type checker and at run time."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import prefkit
from prefkit import cli, errors

PACKAGE = Path(prefkit.__file__).parent
HEAVY = {"torch", "transformers", "accelerate", "polars", "pyarrow", "duckdb", "pydantic", "scipy", "yaml", "rich"}
# what each command does, as calls
COMMANDS = {
    "sample": {"sample_candidates"},
    "score": {"score_candidates"},
    "evaluate": {"evaluate_model"},
    "build": {"load_pipeline", "build_dataset"},
    "audit": {"pipeline_of", "audit_dataset", "enforce_audit"},
    "show": {"show_pairs"},
    "repair": {"repair_dataset"},
    "precompute": {"precompute_reference", "estimate_reference"},
    "train": {"train_dpo"},
    "run": {"run_pipeline"},
    "sweep": {"sweep_pipeline"},
    "query": {"query_dataset", "write_query", "list_views"},
    "export": {"export_dataset"},
    "info": {"dataset_info", "read_runs", "write_run_page"},
    "formats": {"list_formats"},
    "demo": {"run_demo"},
}
BESIDE = {"open_dataset", "torch_dataset", "torch_stream"}  # calls without a command
FUNCTIONS = sorted(set().union(*COMMANDS.values()) | BESIDE)


def python(code: str) -> Any:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_every_command_has_its_calls_and_every_call_its_place() -> None:
    commands = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert commands == set(COMMANDS)
    public = {name for name in prefkit.__all__ if inspect.isfunction(getattr(prefkit, name))}
    assert public == set(FUNCTIONS)


def test_a_type_checker_sees_the_names_that_there_are_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == prefkit._HOMES


def test_every_name_resolves_and_stands_in_dir() -> None:
    assert set(prefkit.__all__) == {*prefkit._HOMES, "__version__"}
    for name in prefkit.__all__:
        assert getattr(prefkit, name) is not None
    assert set(prefkit.__all__) <= set(dir(prefkit))
    with pytest.raises(AttributeError, match="module 'prefkit' has no attribute 'trian_dpo'"):
        _ = prefkit.trian_dpo  # type: ignore[attr-defined]


def test_no_name_hides_a_module() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules & set(prefkit._HOMES) == set()


def test_all_errors_of_the_tree_are_names_of_the_package() -> None:
    tree = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.PrefkitError)
    }
    assert tree <= set(prefkit.__all__)
    assert prefkit.GateError is errors.GateError


def test_importing_the_package_listing_its_names_and_its_errors_import_nothing_heavy() -> None:
    code = "import sys, json, prefkit; dir(prefkit); prefkit.PrefkitError; print(json.dumps(sorted(sys.modules)))"
    assert set(python(code)) & HEAVY == set()


def test_a_star_import_gives_every_name() -> None:
    assert set(python("import json\nfrom prefkit import *\nprint(json.dumps(sorted(globals())))")) >= set(
        prefkit.__all__
    )


# what a new user reads


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_a_call_tells_arguments_result_errors_and_an_example(name: str) -> None:
    function = getattr(prefkit, name)
    said, parameters = inspect.getdoc(function) or "", inspect.signature(function).parameters
    told = dict(re.findall(r"^    (\w+): (.+)", section(said, "Args"), re.MULTILINE))
    assert list(told) == list(parameters), name
    returns = inspect.signature(function).return_annotation not in (None, "None")
    assert bool(section(said, "Returns")) == returns, name
    raised = section(said, "Raises")
    assert all(re.match(r"    \w+: |        ", line) for line in raised.splitlines()), name
    for error in re.findall(r"^    (\w+): ", raised, re.MULTILINE):
        assert issubclass(getattr(prefkit, error), errors.PrefkitError)
    assert "prefkit." in section(said, "Example"), name


def section(docstring: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:    .*\n|\n(?=    ))+)", docstring + "\n", re.MULTILINE)
    return found[1].rstrip("\n") if found else ""


@pytest.mark.parametrize("name", sorted(set(prefkit.__all__) - set(FUNCTIONS) - {"__version__"}))
def test_a_public_type_says_what_it_is_and_so_do_its_properties(name: str) -> None:
    kind = getattr(prefkit, name)
    assert (inspect.getdoc(kind) or "").endswith(".") or "\n" in (inspect.getdoc(kind) or "")
    for member, value in vars(kind).items():
        if isinstance(value, property) and not member.startswith("_"):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_the_marker_of_typed_packages_is_there() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""
