"""The command line: what it prints, what it imports, how it ends. A message and an exit code, never a traceback."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from command import Prefkit

from prefkit import errors
from prefkit.errors import (
    AuditError,
    CheckError,
    ConfigError,
    DatasetError,
    GateError,
    InputError,
    MachineError,
    ModelError,
    PrefkitError,
    SourceError,
)

HEAVY = ("torch", "transformers", "accelerate", "polars", "pyarrow", "duckdb", "pydantic", "scipy", "datasketch")


@pytest.fixture
def pipeline(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Path:
    """A pipeline of six pairs, a duplicate, a reject and candidates; every chosen side says `indeed`."""
    rows: list[Any] = [{"prompt": f"p{i}", "chosen": f"indeed good {i}", "rejected": f"bad {i}"} for i in range(30)]
    candidates = {"prompt": "k", "responses": ["[red]x[/red]", "indeed [/y]"], "scores": [1, 2]}
    settings = {
        "dataset": "data",
        "sources": [
            {"path": str(write_jsonl("rows.jsonl", [*rows, rows[0], "oops"])), "format": "pairs"},
            {"path": str(write_jsonl("candidates.jsonl", [candidates])), "format": "candidates"},
        ],
        "split": {"test_share": 0.2},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def dataset(prefkit: Prefkit, pipeline: Path) -> str:
    assert prefkit("build", str(pipeline)).code == 0
    return "data"


# the tree of exceptions


@pytest.mark.parametrize(
    ("kind", "parent", "code"),
    [
        (ConfigError, InputError, 2),
        (SourceError, InputError, 2),
        (DatasetError, InputError, 2),
        (ModelError, InputError, 2),
        (GateError, CheckError, 1),
        (AuditError, CheckError, 1),
        (MachineError, PrefkitError, 3),
    ],
)
def test_every_error_has_its_place_in_the_tree_and_its_exit_code(
    kind: type[PrefkitError], parent: type[PrefkitError], code: int
) -> None:
    assert issubclass(kind, parent)
    assert issubclass(parent, PrefkitError)
    assert kind("x").exit_code == code
    assert kind.__name__ in str(errors.__doc__)


def test_a_message_says_where_what_was_expected_and_the_next_command() -> None:
    error = SourceError("no such file", where="a.jsonl:3", expected="a file", hint="prefkit formats")
    assert str(error) == "a.jsonl:3: no such file\n  expected: a file\n  next: prefkit formats"
    assert str(InputError("too bad")) == "too bad"
    assert error.as_dict() == {
        "kind": "SourceError",
        "message": "no such file",
        "where": "a.jsonl:3",
        "expected": "a file",
        "hint": "prefkit formats",
    }
    assert InputError("too bad").as_dict() == {"kind": "InputError", "message": "too bad"}


# build


def test_build_says_both_accounting_equations_and_every_reason(prefkit: Prefkit, pipeline: Path) -> None:
    ended = prefkit("build", str(pipeline))
    shown = " ".join(ended.out.split())
    assert ended.code == 0
    assert "rows: 32 = 30 pairs + 1 dropped + 1 rejects" in shown
    assert "candidates: 2 = 2 used + 0 unused + 0 rejects" in shown
    assert "prompts: 1 = 1 with a pair + 0 dropped" in shown
    assert "1 duplicate" in shown
    assert "1 not_json" in shown


def test_build_out_and_set_win_over_the_file(prefkit: Prefkit, pipeline: Path, tmp_path: Path) -> None:
    ended = prefkit("build", str(pipeline), "--out", "else where", "--set", "split.test_share=1", "--json")
    assert ended.last_json()["dataset"] == "else where"
    assert ended.last_json()["counts"]["train"] == 0
    assert (tmp_path / "else where" / "manifest.json").exists()
    assert not (tmp_path / "data").exists()


def test_build_check_writes_nothing(prefkit: Prefkit, pipeline: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = prefkit("build", str(pipeline), "--check", "--json")
    assert (ended.code, ended.last_json()["counts"]["pairs"]) == (0, 31)
    assert sorted(tmp_path.rglob("*")) == before


def test_building_again_says_that_nothing_was_to_do(prefkit: Prefkit, pipeline: Path, dataset: str) -> None:
    ended = prefkit("build", str(pipeline))
    assert "up to date" in ended.out


# json


def test_json_is_one_object_on_stdout_and_all_else_on_stderr(prefkit: Prefkit, pipeline: Path) -> None:
    commands = {
        ("build", str(pipeline)): {"dataset", "kind", "counts", "reasons"},
        ("audit", "data"): {"verdict", "findings"},
        ("info", "data"): {"dataset", "kind", "counts"},
        ("formats",): {"hh", "trl", "pairs", "candidates", "corrections"},
    }
    for arguments, keys in commands.items():
        ended = prefkit(*arguments, "--json")
        assert (ended.code, ended.out.count("\n")) == (0, 1), arguments
        assert keys <= set(ended.last_json()), arguments
        assert ended.err.strip(), arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("build", "nowhere.yaml"), "ConfigError", 2),
        (("audit", "nowhere"), "ConfigError", 2),
        (("info", "nowhere"), "DatasetError", 2),
        (("build",), "UsageError", 2),
        (("build", "x.yaml", "--nonsense"), "UsageError", 2),
        (("nonsense",), "UsageError", 2),
    ],
)
def test_json_is_an_error_object_where_a_command_fails(
    arguments: tuple[str, ...], kind: str, code: int, prefkit: Prefkit
) -> None:
    ended = prefkit(*arguments, "--json")
    assert (ended.code, ended.out.count("\n")) == (code, 1)
    assert set(ended.last_json()) == {"error"}
    assert ended.last_json()["error"]["kind"] == kind
    assert ended.last_json()["error"]["message"]


def test_a_strict_audit_that_fails_exits_1_and_still_gives_its_verdict_as_the_only_object(
    prefkit: Prefkit, dataset: str
) -> None:
    ended = prefkit("audit", dataset, "--strict", "--json")
    assert (ended.code, ended.out.count("\n")) == (1, 1)
    assert ended.last_json()["verdict"] == "fail"
    assert "error: the verdict is fail" in ended.err


# exit codes and messages


def test_a_strict_audit_passes_where_the_words_are_allowed(prefkit: Prefkit, dataset: str) -> None:
    assert prefkit("audit", dataset).code == 0
    failed = prefkit("audit", dataset, "--strict")
    assert failed.code == 1
    assert "indeed" in failed.out
    assert "error: the verdict is fail" in failed.err
    allowing = ("--set", "audit.allow=[indeed, good, bad]", "--set", "audit.limits.strict=fail")
    allowed = prefkit("audit", dataset, "--strict", *allowing, "--set", "audit.allow_features=[words, characters]")
    assert allowed.code == 0
    assert prefkit("audit", dataset, "--strict", "--set", "audit.limits.strict=note").code == 1


def test_an_audit_takes_a_pipeline_file_as_well_as_a_dataset(prefkit: Prefkit, pipeline: Path, dataset: str) -> None:
    verdicts = [prefkit("audit", target, "--json").last_json()["verdict"] for target in (str(pipeline), dataset)]
    assert verdicts == ["fail", "fail"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["dataset: d", "sources: [{path: rows.jsonl, format: pears}]"],
            ["pipeline.yaml:2", "format: pears is not known", "did you mean pairs?"],
        ),
        (
            ["dataset: d", "sourcs: []", "sources: [{path: a, format: hh}]"],
            ["pipeline.yaml:2", "sourcs", "did you mean sources?"],
        ),
        (["dataset: d", "sources: [{path: gone.jsonl, format: pairs}]"], ["gone.jsonl", "no such file"]),
        (["dataset: d", "sources: [{path: pipeline.yaml, format: pairs}]"], ["pipeline.yaml", ".jsonl", ".parquet"]),
        (
            ["dataset: d", "sources: [{path: rows.jsonl, format: hh}]"],
            ["rows.jsonl", "32 of 32", "format:", "prefkit formats"],
        ),
        (["dataset: pipeline.yaml", "sources: [{path: rows.jsonl, format: pairs}]"], ["pipeline.yaml", "is a file"]),
        (["dataset: .", "sources: [{path: rows.jsonl, format: pairs}]"], ["is not a dataset of prefkit", "--out"]),
        (["dataset: [", ""], ["pipeline.yaml:", "YAML"]),
    ],
)
def test_a_pipeline_that_cannot_be_followed_ends_with_2_and_says_what_and_where(
    lines: list[str], said: list[str], prefkit: Prefkit, pipeline: Path
) -> None:
    pipeline.write_text("\n".join(lines) + "\n")
    ended = prefkit("build", "pipeline.yaml")
    assert ended.code == 2
    assert ended.err.startswith("error: ") or "error: " in ended.err
    assert [part for part in said if part not in ended.err] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "."),
        ("query", ".", "select 1"),
        ("query", "nowhere", "select 1"),
        ("info", "pipeline.yaml"),
        ("precompute", "data"),
        ("precompute", "data", "--model", "nowhere"),
        ("train", "data"),
        ("train", "data", "--model", "nowhere"),
        ("train", "data", "--reference", "nowhere"),
        ("build", "pipeline.yaml", "--set", "nonsense"),
        ("build", "pipeline.yaml", "--set", "split.test_share=2"),
        ("query", "data", "select * from nowhere"),
        ("query", "data", "select cast(prompt as int) from pairs"),
        ("query", "data", "select cast(prompt as int) from pairs", "--format", "json"),
        ("query", "data", "select 1", "--format", "parquet"),
        ("query", "data", "select 1", "--format", "xml"),
        ("query", "data", "select 1", "--format", "csv", "--out", "rows.jsonl/below"),
    ],
)
def test_bad_input_ends_with_2_and_a_message(arguments: tuple[str, ...], prefkit: Prefkit, dataset: str) -> None:
    ended = prefkit(*arguments)
    assert ended.code == 2
    assert len(ended.err.strip()) > 10
    assert ended.out == ""


def test_a_damaged_dataset_ends_with_2_and_names_the_part(prefkit: Prefkit, dataset: str, tmp_path: Path) -> None:
    (tmp_path / dataset / "pairs" / "part-train-00000.parquet").write_bytes(b"PAR1")
    ended = prefkit("audit", dataset)
    assert ended.code == 2
    assert "data/pairs/part-train-00000.parquet" in ended.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MachineError("the disk is full", where="x", hint="make room"), 3, "error: x: the disk is full"),
        (MemoryError(), 3, "out of memory"),
    ],
)
def test_what_stops_a_command_from_outside_has_its_own_exit_code(
    error: BaseException, code: int, said: str, prefkit: Prefkit, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("prefkit.build.build_dataset", stop)
    ended = prefkit("build", str(pipeline))
    assert ended.code == code
    assert said in ended.err


# query and info


def test_query_prints_data_as_data_and_never_as_markup(prefkit: Prefkit, dataset: str) -> None:
    ended = prefkit("query", dataset, "select chosen, rejected from pairs where prompt = 'k'")
    assert ended.code == 0
    assert "[red]x[/red]" in ended.out
    assert "indeed [/y]" in ended.out


def test_query_writes_every_form_to_stdout_or_a_file(prefkit: Prefkit, dataset: str, tmp_path: Path) -> None:
    sql = "select prompt from pairs order by prompt limit 2"
    assert prefkit("query", dataset, sql, "--format", "csv").out == "prompt\nk\np0\n"
    assert prefkit("query", dataset, sql, "--format", "json").out == '{"prompt":"k"}\n{"prompt":"p0"}\n'
    for form in ("csv", "json", "parquet"):
        assert prefkit("query", dataset, sql, "--format", form, "--out", f"out.{form}").code == 0
    assert (tmp_path / "out.csv").read_text() == "prompt\nk\np0\n"
    assert (tmp_path / "out.json").read_text() == '{"prompt":"k"}\n{"prompt":"p0"}\n'
    assert pl.read_parquet(tmp_path / "out.parquet")["prompt"].to_list() == ["k", "p0"]


def test_query_as_a_table_says_where_it_stops(prefkit: Prefkit, dataset: str) -> None:
    ended = prefkit("query", dataset, "select 'row ' || range as r from range(150)")
    assert ended.code == 0
    assert "row 99" in ended.out
    assert "row 149" not in ended.out
    assert "first 100 rows" in ended.out


def test_query_of_messages_as_csv_is_no_traceback(prefkit: Prefkit, pipeline: Path) -> None:
    assert prefkit("build", str(pipeline), "--set", "kind=chat").code == 0
    assert prefkit("query", "data", "select * from pairs", "--format", "csv").code in (0, 2)


def test_info_says_what_a_dataset_holds(prefkit: Prefkit, dataset: str) -> None:
    ended = prefkit("info", dataset)
    assert ended.code == 0
    for shown in ("kind: text", "pairs: 31", "duplicate: 1", "audit: None", "runs: 0"):
        assert shown in ended.out
    prefkit("audit", dataset)
    assert prefkit("info", dataset, "--json").last_json()["audit"] == "fail"


def test_formats_lists_every_format_with_its_fields(prefkit: Prefkit) -> None:
    ended = prefkit("formats")
    assert ended.code == 0
    for shown in ("hh", "trl", "candidates", "prompt, response, correction"):
        assert shown in ended.out


@pytest.mark.parametrize("command", ["build", "audit", "precompute", "train", "query", "info", "formats", "demo"])
def test_every_command_has_help(command: str, prefkit: Prefkit) -> None:
    ended = prefkit(command, "--help")
    assert ended.code == 0
    assert "Usage" in ended.out


# what a process of its own shows


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


RUN = """
import json, sys
from prefkit.cli import main

def run(*arguments):
    sys.argv = ["prefkit", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)

"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = RUN + "run('--help')\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    ended = python(code, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "build" in ended.stdout
    assert set(json.loads(ended.stderr)) & set(HEAVY) == set()


def test_build_audit_query_and_info_never_import_torch(pipeline: Path, tmp_path: Path) -> None:
    commands = (
        "run('build', 'pipeline.yaml')\nrun('audit', 'data')\nrun('query', 'data', 'from pairs')\nrun('info', 'data')\n"
    )
    code = RUN + commands + "open('modules.json', 'w').write(json.dumps(sorted(sys.modules)))"
    ended = python(code, tmp_path)
    assert ended.returncode == 0, ended.stderr
    loaded = set(json.loads((tmp_path / "modules.json").read_text()))
    assert loaded & {"torch", "transformers", "accelerate"} == set()
    assert {"polars", "duckdb"} <= loaded


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    ended = python("import sys, json, prefkit; print(json.dumps(sorted(sys.modules)))", tmp_path)
    assert set(json.loads(ended.stdout)) & set(HEAVY) == set()


def test_the_module_is_the_command_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prefkit", "build", "nowhere.yaml", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert json.loads(ended.stdout)["error"]["where"] == "nowhere.yaml"
    assert ended.stderr.startswith("error: nowhere.yaml: cannot read the pipeline file")
    assert "Traceback" not in ended.stderr


def test_a_reader_that_stops_early_sees_no_traceback(dataset: str, tmp_path: Path) -> None:
    sql = "select repeat('x', 1000) from range(5000)"
    command = [sys.executable, "-m", "prefkit", "query", dataset, sql, "--format", "csv"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_reader_that_has_seen_enough_is_no_failure(form: str, dataset: str) -> None:
    asked = shlex.join([sys.executable, "-m", "prefkit", "query", dataset, "from range(200000)", "--format", form])
    if form == "table":
        asked = asked.replace("from range(200000)", "select repeat($$word $$, 500) from range(200)")
    piped = subprocess.run(
        ["bash", "-c", f"{asked} | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (piped.returncode, piped.stderr) == (0, "")


def test_a_build_whose_words_nobody_reads_is_built_all_the_same(prefkit: Prefkit, dataset: str, tmp_path: Path) -> None:
    assert prefkit("info", dataset).code == 0  # it is there, beside its pipeline
    for reader, name in (("true", "one"), ("head -1", "two")):
        asked = shlex.join([sys.executable, "-m", "prefkit", "build", "pipeline.yaml", "--out", name])
        command = ["bash", "-c", f"{asked} | {reader} > /dev/null; exit ${{PIPESTATUS[0]}}"]
        piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (piped.returncode, piped.stderr) == (0, "")
        assert (tmp_path / name / "manifest.json").exists()


def test_info_names_a_damaged_reference_and_its_field(prefkit: Prefkit, dataset: str, tmp_path: Path) -> None:
    folder = tmp_path / dataset / "reference" / "k"
    folder.mkdir(parents=True)
    (folder / "reference.json").write_text("{}", encoding="utf-8")
    done = prefkit("info", dataset)
    assert done.code == 2
    assert "reference.json: is damaged at key" in done.err


def test_an_interrupted_query_is_no_bug(prefkit: Prefkit, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("Query interrupted")  # what DuckDB makes of Ctrl-C

    monkeypatch.setattr("prefkit.query.query_dataset", interrupt)
    ended = prefkit("query", dataset, "from pairs")
    assert ended.code == 130
    assert "interrupted; what is finished is on disk" in ended.err
