"""What a user reads when a file, a setting or a query cannot be used: the whole text, provoked through the command.

Each expected text is written by hand and is all that stands on stderr. `{d}` stands for the folder of the test.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from command import Prefkit
from tiny import snapshot

from prefkit import cli
from prefkit.errors import PrefkitError
from prefkit.query import as_query_error, scratch_root

ROW = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
GOOD = "dataset: data\nkind: text\nsources: [{path: rows.jsonl, format: pairs}]\n"
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow, plain, .gz or .zst"
VIEWS = (
    "views: pairs, dropped, rejects, changes, tokens, structure, probe, pair_scores, reference, "
    "reference_dropped, steps, perf, pair_dynamics, evaluations, evaluation_prompts, sweeps, "
    "learning"
)
QUOTES = 'columns with a slash need double quotes: select "rewards/margins" from steps'


@pytest.fixture
def refuses(prefkit: Prefkit, tmp_path: Path) -> Callable[..., None]:
    """A command ends with the code and with this text alone, and writes no file; its --json object says the same."""

    def check(arguments: tuple[str, ...], text: str, kind: str, code: int = 2) -> None:
        before = snapshot(tmp_path)
        ended = prefkit(*arguments)
        assert (ended.code, ended.err) == (code, f"error: {text}\n")
        assert snapshot(tmp_path) == before
        if arguments[0] not in ("query", "demo"):
            told = prefkit(*arguments, "--json")
            said = json.loads(told.out.splitlines()[-1])["error"]
            where = f"{said['where']}: " if "where" in said else ""
            expected = f"\n  expected: {said['expected']}" if "expected" in said else ""
            hint = f"\n  next: {said['hint']}" if "hint" in said else ""
            assert (told.code, said["kind"]) == (code, kind)
            assert f"{where}{said['message']}{expected}{hint}" == text

    return check


Refuses = Callable[..., None]


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def dataset(prefkit: Prefkit, tmp_path: Path) -> str:
    """A small finished dataset of forty pairs; every chosen side says `indeed`."""
    rows = [{"prompt": f"p{i}", "chosen": f"indeed good {i}", "rejected": f"bad {i}"} for i in range(40)]
    write(tmp_path, rows__jsonl="".join(json.dumps(row) + "\n" for row in rows), pipeline__yaml=GOOD)
    assert prefkit("build", "pipeline.yaml").code == 0
    return "data"


# the pipeline file and --set


SOURCE = "sources: [{path: rows.jsonl, format: pairs}]\n"
PIPELINES: dict[str, tuple[str | bytes, str]] = {
    "not UTF-8": (b"dataset: caf\xe9\n", "pipeline.yaml: cannot read the pipeline file: it is not UTF-8"),
    "a list": ("- a\n- b\n", "pipeline.yaml: no pipeline\n  expected: keys dataset, sources, ..."),
    "empty": ("", "pipeline.yaml: no pipeline\n  expected: keys dataset, sources, ..."),
    "nested": ("[" * 4000 + "]" * 4000, "pipeline.yaml: nested without end"),
    "an alias of itself": ("dataset: d\nsources: &s [*s]\n", "pipeline.yaml: an alias contains itself"),
    "a key twice": (
        f"dataset: d\n{SOURCE}split: {{seed: 1}}\nsplit: {{seed: 2}}\n",
        "pipeline.yaml:4: key split is given twice",
    ),
    "a misspelt section": (
        f"dataset: d\n{SOURCE}splitt: {{seed: 1}}\n",
        "pipeline.yaml:3: unknown key splitt\n"
        "  expected: one of dataset, kind, sources, pairs, validate, dedupe, decontaminate, split, build, card, audit, "
        "precompute, train, sample, score, evaluate\n"
        "  next: did you mean split?",
    ),
    "a misspelt key": (
        f"dataset: d\n{SOURCE}split:\n  test_shar: 0.1\n",
        "pipeline.yaml:4: unknown key split.test_shar\n"
        "  expected: one of test_share, seed\n  next: did you mean split.test_share?",
    ),
    "no dataset": (
        SOURCE,
        "pipeline.yaml: key dataset is missing\n  expected: the dataset directory that build writes",
    ),
    "a value too large": (
        f"dataset: d\n{SOURCE}split:\n  seed: 1\n  test_share: 2\n",
        "pipeline.yaml:5: split.test_share = 2 does not fit\n  expected: less than or equal to 1",
    ),
    "an unknown format": (
        "dataset: d\nsources:\n  - path: rows.jsonl\n    format: pears\n",
        "pipeline.yaml:4: format: pears is not known; did you mean pairs? prefkit formats lists them",
    ),
    "a direction without scores": (
        "dataset: d\nsources:\n  - {path: rows.jsonl, format: hh, direction: lower_is_better}\n",
        "pipeline.yaml:3: direction: lower_is_better has no effect on hh, which has no scores",
    ),
    "a column like another": (
        "dataset: d\nsources:\n  - {path: r.jsonl, format: corrections, columns: {promt: q}}\n",
        "pipeline.yaml:3: columns.promt: corrections has the fields prompt, response, correction, model, annotator, "
        "tools, system; did you mean prompt?",
    ),
    "a column like no other": (
        "dataset: d\nsources:\n  - {path: r.jsonl, format: hh, columns: {xyz: q}}\n",
        "pipeline.yaml:3: columns.xyz: hh has the fields chosen, rejected",
    ),
    "a scale from high to low": (
        f"dataset: d\n{SOURCE}validate: {{score_scale: [2, 1]}}\n",
        "pipeline.yaml:3: validate.score_scale must be given from low to high",
    ),
    "smoothing of another loss": (
        f"dataset: d\n{SOURCE}train: {{loss: ipo, label_smoothing: 0.1}}\n",
        "pipeline.yaml:3: train.label_smoothing has no effect on train.loss ipo: it is sigmoid's, sigmoid_norm's and "
        "robust's",
    ),
    "no room for a completion": (
        f"dataset: d\n{SOURCE}precompute: {{max_length: 16, min_completion_tokens: 16}}\n",
        "pipeline.yaml: precompute.min_completion_tokens must be smaller than precompute.max_length",
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_cannot_be_followed_is_answered_in_full(name: str, refuses: Refuses, tmp_path: Path) -> None:
    content, text = PIPELINES[name]
    write(tmp_path, pipeline__yaml=content, rows__jsonl=ROW)
    refuses(("build", "pipeline.yaml"), text, "ConfigError")


def test_broken_yaml_is_answered_with_its_line_and_the_words_of_the_yaml_reader(
    prefkit: Prefkit, tmp_path: Path
) -> None:
    write(tmp_path, pipeline__yaml="dataset: d\nsources: [\n  {path: 'rows.jsonl}\n")
    ended = prefkit("build", "pipeline.yaml")
    assert ended.code == 2
    assert re.fullmatch(r"error: pipeline\.yaml:\d: no YAML: [a-z][^\n]+\n", ended.err)


def test_a_pipeline_file_that_cannot_be_read_is_answered_with_the_reason(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    missing = "cannot read the pipeline file: No such file or directory"
    refuses(("build", "gone.yaml"), f"gone.yaml: {missing}", "ConfigError")
    refuses(("build", "folder"), "folder: cannot read the pipeline file: Is a directory", "ConfigError")
    refuses(("build", "file/x"), "file/x: cannot read the pipeline file: Not a directory", "ConfigError")


@pytest.mark.parametrize("command", ["audit", "precompute", "train"])
def test_a_target_that_is_not_there_may_have_been_meant_as_a_dataset(command: str, prefkit: Prefkit) -> None:
    """The commands take a dataset directory first of all: a misspelt one is no pipeline file that cannot be read."""
    ended = prefkit(command, "demo/datset")
    text = "error: demo/datset: no such dataset and no such pipeline file\n"
    assert (ended.code, ended.err) == (2, f"{text}  expected: a dataset directory, or a pipeline file\n")
    assert "pipeline" in ended.err


CHANGES = {
    "nonsense": "--set nonsense is not a change\n  expected: section.key=value\n  next: --set train.beta=0.05",
    "train.=1": "--set train.=1 is not a change\n  expected: section.key=value\n  next: --set train.beta=0.05",
    "dataset.x=1": "--set dataset.x: dataset is not a section\n  expected: section.key=value",
    "sources.0.path=x": "--set sources.0.path: sources is not a section\n  expected: section.key=value",
    "train.beta=[": "--set train.beta: the value is no YAML\n  expected: section.key=value",
    "train.beta=0": "--set: train.beta = 0 does not fit\n  expected: greater than 0",
    "split.share=0": "--set: unknown key split.share\n  expected: one of test_share, seed\n"
    "  next: did you mean split.test_share?",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_cannot_be_followed_is_answered_in_full(change: str, refuses: Refuses, tmp_path: Path) -> None:
    write(tmp_path, pipeline__yaml=GOOD, rows__jsonl=ROW)
    refuses(("build", "pipeline.yaml", "--set", change), CHANGES[change], "ConfigError")


def test_two_settings_that_do_not_go_together_are_laid_to_the_change_that_brought_them(
    refuses: Refuses, tmp_path: Path
) -> None:
    write(tmp_path, pipeline__yaml=GOOD, rows__jsonl=ROW)
    text = "--set: precompute.min_completion_tokens must be smaller than precompute.max_length"
    refuses(("build", "pipeline.yaml", "--set", "precompute.max_length=8"), text, "ConfigError")


def test_a_setting_that_is_missing_is_named_with_the_option_for_it(refuses: Refuses, dataset: str) -> None:
    for command in ("precompute", "train"):
        refuses(
            (command, dataset),
            f"{command}.model is not set\n  expected: the folder of a model\n"
            f"  next: --model FOLDER, or {command}.model in the pipeline",
            "InputError",
        )


# the files of a source


def source(path: str, form: str = "pairs", more: str = "") -> str:
    return f"dataset: data\nkind: text\nsources: [{{path: {json.dumps(path)}, format: {form}}}]\n{more}"


SOURCES: dict[str, tuple[str, str, str | bytes | None, str]] = {
    "missing": (
        "gone.jsonl",
        "",
        None,
        "gone.jsonl: no such file\n  expected: a file, relative to the working directory",
    ),
    "a name too long": (
        "x" * 300 + ".jsonl",
        "",
        None,
        "x" * 300 + f".jsonl: cannot be read: File name too long\n  expected: {READABLE}",
    ),
    "nothing like it": ("gone-*.jsonl", "", None, f"gone-*.jsonl: no file matches\n  expected: {READABLE}"),
    "another kind of file": (
        "rows.txt",
        "rows.txt",
        ROW,
        f"rows.txt: this kind of file is not read\n  expected: {READABLE}",
    ),
    "UTF-16": (
        "rows.jsonl",
        "rows.jsonl",
        ROW.encode("utf-16"),
        "rows.jsonl:1: is UTF-16\n  expected: UTF-8\n  next: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE",
    ),
    "latin-1": ("rows.json", "rows.json", b'[\n{"a": "\xe9"}]', "rows.json:2: is not UTF-8\n  expected: UTF-8"),
    "no JSON": (
        "rows.json",
        "rows.json",
        '[\n{"prompt": }]',
        "rows.json:2: no JSON: Expecting value\n  expected: a list of objects",
    ),
    "an object": (
        "rows.json",
        "rows.json",
        ROW,
        "rows.json: not a list\n  expected: a list of objects\n  next: one object a line is .jsonl: rename the file; "
        "rows in a list inside an object: write that list",
    ),
    "an empty csv": ("rows.csv", "rows.csv", b"", "rows.csv: empty\n  expected: a header line"),
    "a column twice": (
        "rows.csv",
        "rows.csv",
        "prompt,chosen,prompt\n1,2,3\n",
        "rows.csv:1: column 'prompt' is there twice\n  expected: one name a column",
    ),
    "a cut-off gz": (
        "rows.jsonl.gz",
        "rows.jsonl.gz",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        "rows.jsonl.gz:1: cannot be read: Compressed file ended before the end-of-stream marker was reached\n"
        "  expected: a whole file",
    ),
    "no row": (
        "rows.jsonl",
        "rows.jsonl",
        "\n\n",
        "rows.jsonl: holds no row\n  expected: prompt, chosen, rejected [, chosen_score, rejected_score, chosen_model, "
        "rejected_model, annotator, weight, tools]",
    ),
    "other columns": (
        "rows.jsonl",
        "rows.jsonl",
        '{"question": "q", "answer": "a"}\n' * 2,
        "rows.jsonl: 2 of 2 rows could not become a record: 2 missing_field (prompt); first lines: 1, 2; "
        "a row has the keys question, answer\n"
        "  expected: prompt, chosen, rejected [, chosen_score, rejected_score, chosen_model, rejected_model, "
        "annotator, weight, tools]; at most a share of 0.1 rejects (validate.max_reject_share)\n"
        "  next: check format: and columns: of this source, or prefkit formats",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_cannot_be_used_is_answered_in_full(name: str, refuses: Refuses, tmp_path: Path) -> None:
    path, file, content, text = SOURCES[name]
    if content is not None:
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    write(tmp_path, pipeline__yaml=source(path))
    refuses(("build", "pipeline.yaml"), text, "SourceError")
    refuses(("build", "pipeline.yaml", "--check"), text, "SourceError")


def test_a_source_that_is_no_regular_file_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path, pipeline__yaml=source("folder"))
    text = f"folder: a directory, not a file\n  expected: {READABLE}\n  next: name its files: folder/*.jsonl"
    refuses(("build", "pipeline.yaml"), text, "SourceError")
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path, pipeline__yaml=source("pipe.jsonl"))
    text = f"pipe.jsonl: not a regular file\n  expected: {READABLE}\n  next: write it to a file first"
    refuses(("build", "pipeline.yaml"), text, "SourceError")


def test_a_source_whose_name_is_no_text_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/rows-\xff.jsonl")).write_text(ROW)
    write(tmp_path, pipeline__yaml=source("rows-*.jsonl"))
    text = "rows-\\xff.jsonl: the file's name is not UTF-8\n  expected: a name that text can hold"
    refuses(("build", "pipeline.yaml"), text, "SourceError")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_source_whose_bytes_cannot_be_read_is_answered_in_full(prefkit: Prefkit, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    write(tmp_path, pipeline__yaml=source("rows.jsonl"))
    ended = prefkit("build", "pipeline.yaml")
    text = f"error: rows.jsonl: cannot be read: Input/output error\n  expected: {READABLE}\n"
    assert (ended.code, ended.err) == (2, text)
    assert not (tmp_path / "data").exists()
    write(tmp_path, pipeline__yaml=source("rows.jsonl").replace("kind: text\n", ""))
    ended = prefkit("build", "pipeline.yaml")
    text = "error: rows.jsonl:1: cannot be read: Input/output error\n  expected: a whole file\n"
    assert (ended.code, ended.err) == (2, text)


def test_a_source_that_changes_while_it_is_read_is_answered_in_full(
    prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefkit import sources

    read = sources.file_sha256

    def read_and_append(path: str | Path) -> str:
        digest = read(path)
        with Path(path).open("a") as file:
            file.write(ROW)
        return digest

    monkeypatch.setattr(sources, "file_sha256", read_and_append)
    write(tmp_path, pipeline__yaml=source("rows.jsonl"), rows__jsonl=ROW)
    ended = prefkit("build", "pipeline.yaml")
    text = "error: rows.jsonl: changed while it was read\n  next: run the same command again\n"
    assert (ended.code, ended.err) == (2, text)
    assert not (tmp_path / "data").exists()


# the dataset directory


def test_a_place_that_is_no_dataset_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    write(tmp_path, pipeline__yaml=GOOD, rows__jsonl=ROW)
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", a__txt="", b__txt="", c__txt="", d__txt="")
    (tmp_path / "emptied" / "pairs").mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    write(tmp_path / "begun", __lock="")
    build = ("build", "pipeline.yaml", "--out")
    text = "mine: is not a dataset of prefkit: it holds a.txt, b.txt, c.txt\n  next: choose another --out"
    refuses((*build, "mine"), text, "DatasetError")
    text = "emptied: is not a dataset of prefkit: it holds files that no build wrote\n  next: choose another --out"
    refuses((*build, "emptied"), text, "DatasetError")
    text = "rows.jsonl: is a file\n  expected: a directory that prefkit may write"
    refuses((*build, "rows.jsonl"), text, "DatasetError")
    text = (
        "rows.jsonl/x: cannot be written: Not a directory\n"
        "  next: make it writable, or choose another directory (dataset:, --out)"
    )
    refuses((*build, "rows.jsonl/x"), text, "DatasetError")
    text = "nowhere: no such dataset\n  next: prefkit build PIPELINE.yaml"
    refuses(("query", "nowhere", "select 1"), text, "DatasetError")
    makes_it = "\n  next: prefkit build PIPELINE.yaml finishes or makes it"
    text = f"mine: not a prefkit dataset: there is no manifest.json{makes_it}"
    refuses(("audit", "mine"), text, "DatasetError")
    text = f"begun: an unfinished build: there is no manifest.json{makes_it}"
    refuses(("audit", "begun"), text, "DatasetError")
    text = "mine: neither a dataset nor a run\n  expected: a directory with manifest.json or run.json"
    refuses(("info", "mine"), text, "DatasetError")


def test_a_dataset_of_a_newer_prefkit_is_answered_in_full(refuses: Refuses, dataset: str, tmp_path: Path) -> None:
    path = tmp_path / dataset / "manifest.json"
    manifest = json.loads(path.read_text())
    version = manifest["format_version"]
    path.write_text(json.dumps(manifest | {"format_version": version + 1}))
    text = f"data/manifest.json: format_version is {version + 1}\n  expected: at most {version}: use a newer prefkit"
    for arguments in (("info", dataset), ("audit", dataset), ("build", "pipeline.yaml")):
        refuses(arguments, text, "DatasetError")


def test_a_dataset_of_an_older_prefkit_is_answered_in_full_and_built_again(
    refuses: Refuses, prefkit: Prefkit, dataset: str, tmp_path: Path
) -> None:
    path = tmp_path / dataset / "manifest.json"
    manifest = json.loads(path.read_text())
    version = manifest["format_version"]
    path.write_text(json.dumps(manifest | {"format_version": version - 1}))
    text = (
        f"data/manifest.json: format_version is {version - 1}, of an older prefkit\n  expected: {version}\n"
        "  next: prefkit build PIPELINE.yaml makes it again; its reference and runs stay"
    )
    for arguments in (("info", dataset), ("audit", dataset)):
        refuses(arguments, text, "DatasetError")
    assert prefkit("build", "pipeline.yaml").code == 0
    assert json.loads(path.read_text()) == manifest


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON object": (
        lambda data: (data / "manifest.json").write_text("[1]"),
        "data/manifest.json: is no JSON object",
    ),
    "no JSON": (lambda data: (data / "manifest.json").write_text("{"), "data/manifest.json: cannot be read: "),
    "a field lost": (lambda data: (data / "manifest.json").write_text("{}"), "data/manifest.json: is damaged at "),
    "a part lost": (
        lambda data: (data / "pairs" / "part-train-00000.parquet").unlink(),
        "data/pairs/part-train-00000.parquet: part is missing",
    ),
    "a part changed": (
        lambda data: (data / "pairs" / "part-train-00000.parquet").write_bytes(b"PAR1"),
        "data/pairs/part-train-00000.parquet: part was changed: its sha256 is not the recorded one",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_dataset_is_answered_with_the_file_and_with_what_to_type(
    name: str, prefkit: Prefkit, dataset: str, tmp_path: Path
) -> None:
    spoil, text = BROKEN[name]
    spoil(tmp_path / dataset)
    before = snapshot(tmp_path)
    ended = prefkit("audit", dataset)
    assert (ended.code, ended.err.startswith(f"error: {text}")) == (2, True), ended.err
    assert snapshot(tmp_path) == before
    assert "\n  next: " in ended.err
    assert "prefkit build" in ended.err.partition("\n  next: ")[2]


PART = "part-train-00000.parquet"


def test_a_part_that_a_query_misses_is_answered_in_full(refuses: Refuses, dataset: str, tmp_path: Path) -> None:
    (tmp_path / dataset / "pairs" / PART).unlink()
    hint = "prefkit build, or prefkit precompute, makes it again"
    text = f"{tmp_path}/data/pairs/{PART}: part is missing\n  next: {hint}"
    refuses(("query", dataset, "from pairs"), text, "DatasetError")
    refuses(("query", dataset, "from pairs", "--no-verify"), text, "DatasetError")


def test_a_part_that_was_changed_is_refused_by_a_query_that_reads_it(
    refuses: Refuses, dataset: str, tmp_path: Path, prefkit: Prefkit
) -> None:
    part = tmp_path / dataset / "pairs" / PART
    part.write_bytes(part.read_bytes() + b" ")
    hint = "prefkit build, or prefkit precompute, makes it again"
    text = f"{part}: part was changed: its sha256 is not the recorded one\n  next: {hint}"
    refuses(("query", dataset, "select 1 from dropped, PAIRS"), text, "DatasetError")
    assert prefkit("query", dataset, "from dropped").code == 0


def test_a_part_that_a_query_cannot_read_is_answered_with_the_view(
    prefkit: Prefkit, dataset: str, tmp_path: Path
) -> None:
    (tmp_path / dataset / "pairs" / PART).write_bytes(b"PAR1")
    ended = prefkit("query", dataset, "from pairs", "--no-verify")
    assert ended.code == 2
    assert re.match("error: data: the files of pairs cannot be read: [A-Z]", ended.err)
    assert PART in ended.err
    assert "\n  next: " in ended.err


def test_a_table_that_a_finished_audit_lacks_is_answered_in_full(
    refuses: Refuses, dataset: str, tmp_path: Path, prefkit: Prefkit
) -> None:
    assert prefkit("audit", dataset).code == 0
    (tmp_path / dataset / "audit" / "tokens.parquet").unlink()
    text = f"{tmp_path}/data/audit/tokens.parquet: part is missing\n  next: prefkit audit {dataset}"
    refuses(("query", dataset, "from tokens"), text, "DatasetError")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "a limit on the size of files is reached (ulimit -f)"),
    ],
)
def test_a_machine_without_room_ends_a_build_with_3_and_says_which_file(
    number: int, said: str, prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, pipeline__yaml=GOOD, rows__jsonl=ROW)
    monkeypatch.setattr("prefkit.store.os.fsync", lambda _file: (_ for _ in ()).throw(OSError(number, "x")))
    ended = prefkit("build", "pipeline.yaml", "--json")
    told = json.loads(ended.out)["error"]
    assert (ended.code, told["kind"], told["message"]) == (3, "MachineError", said)
    assert told["where"].startswith("data/")
    hint = "raise it and type the same command" if "ulimit" in said else "make room and type the same command"
    assert told["hint"] == hint
    assert ended.err.endswith(f"error: {told['where']}: {said}\n  next: {hint}\n")
    assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full", "some/file"), "some/file: the disk is full"),
        (OSError(errno.EDQUOT, "full"), "the disk quota is used up"),
        (OSError(errno.EFBIG, "large", "some/file"), "some/file: a limit on the size of files is reached (ulimit -f)"),
        (RuntimeError("file in archive: No space left on device"), "the disk is full"),
        (
            RuntimeError("I/O error: File too large (os error 27)"),
            "a limit on the size of files is reached (ulimit -f)",
        ),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_a_machine_failure_of_a_library_is_told_like_one_of_ours(
    error: Exception, message: str, prefkit: Prefkit, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("prefkit.audit.alphabets.token_table", fail)
    ended = prefkit("audit", dataset, "--json")
    hint = "make room and type the same command"
    if "ulimit" in message:
        hint = "raise it and type the same command"
    elif "memory" in message:
        hint = "a smaller batch_size or max_length, or another dtype, needs less"
    assert (ended.code, ended.err) == (3, f"error: {message}\n  next: {hint}\n")
    place, _, said = message.rpartition(": ")
    where = {"where": place} if place else {}
    assert json.loads(ended.out) == {"error": {"kind": "MachineError", "message": said, "hint": hint, **where}}


def test_a_bug_of_our_own_says_so_and_ends_with_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise ValueError("odd [red]thing[/red]")

    monkeypatch.setattr("prefkit.audit.alphabets.token_table", fail)
    monkeypatch.setattr(sys, "argv", ["prefkit", "audit", dataset, "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    message = "a bug in prefkit: ValueError: odd [red]thing[/red]"
    assert ended.value.code == 70
    assert err.endswith(f"error: {message}\n  next: report it with the lines above\n")
    assert json.loads(out) == {"error": {"kind": "Bug", "message": message}}


@pytest.mark.parametrize("arguments", [("build", "pipeline.yaml"), ("audit", "data"), ("query", "data", "from pairs")])
def test_an_interruption_says_what_is_kept_and_how_to_go_on(
    arguments: tuple[str, ...], prefkit: Prefkit, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    for entry in ("prefkit.build.build_dataset", "prefkit.audits.audit_dataset", "prefkit.query.query_dataset"):
        monkeypatch.setattr(entry, interrupt)
    ended = prefkit(*arguments)
    command = f"prefkit {' '.join(arguments[:2])}" + (" 'from pairs'" if len(arguments) > 2 else "")
    text = f"error: interrupted; what is finished is on disk\n  next: {command}\n"
    assert (ended.code, ended.out, ended.err) == (130, "", text)


# the audit, the demo


def test_a_strict_audit_that_fails_is_answered_in_full(prefkit: Prefkit, dataset: str) -> None:
    ended = prefkit("audit", dataset, "--strict")
    assert ended.code == 1
    head, expected, hint = ended.err.splitlines()
    assert head.startswith("error: the verdict is fail: ")
    assert expected == "  expected: better than warn (audit.limits.strict)"
    assert hint == "  next: prefkit audit TARGET lists the findings"


def test_a_folder_that_is_not_the_demos_is_answered_in_full(refuses: Refuses, tmp_path: Path) -> None:
    write(tmp_path, notes__txt="mine")
    text = ".: holds something that is not the demo's\n  next: prefkit demo --out DIR"
    refuses(("demo", "--out", "."), text, "InputError")
    text = "notes.txt: holds something that is not the demo's\n  next: prefkit demo --out DIR"
    refuses(("demo", "--out", "notes.txt"), text, "InputError")


def test_a_world_of_a_size_that_it_cannot_have_is_answered_in_full(tmp_path: Path) -> None:
    from prefkit.demo.grammar import all_questions
    from prefkit.demo.world import write_world

    most = len(all_questions())
    for number in (0, most + 1):
        with pytest.raises(PrefkitError) as refused:
            write_world(tmp_path / "world", num_prompts=number)
        text = rf"num_prompts: the demo world cannot have {number} prompts\n  expected: \d+ to {most}"
        assert re.fullmatch(text, str(refused.value))
    assert not (tmp_path / "world").exists()


# queries


ONE = f"one SELECT (or FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN) over the {VIEWS}"
OTHERS = "--format csv, json or parquet"
QUERIES: dict[str, tuple[tuple[str, ...], str]] = {
    "no select": (
        ("drop view pairs",),
        f"SQL: DROP is not allowed: a query changes nothing\n  expected: {ONE}",
    ),
    "nothing": (("/* a comment */",), f"SQL: there is no statement\n  expected: {ONE}"),
    "no sql": (("selec 1",), f'SQL: Parser Error: syntax error at or near "selec"\n  expected: {ONE}'),
    "parquet without a file": (
        ("from pairs", "--format", "parquet"),
        "--format parquet needs a file\n  next: --out FILE.parquet",
    ),
    "two columns of a name": (
        ("select 1 as a, 2 as b, 3 as a", "--format", "csv"),
        "SQL: several columns are called a\n  next: select ... as another_name",
    ),
    "bytes as csv": (
        ("select 'x'::blob as some, 1 as two", "--format", "csv"),
        "SQL: csv holds no bytes: some\n  next: cast the column in the query",
    ),
    "into the dataset": (
        ("from pairs", "--format", "csv", "--out", "data/pairs.csv"),
        "data/pairs.csv: a result cannot be written into the dataset\n  next: --out elsewhere",
    ),
    "a table in a file": (
        ("from pairs", "--format", "table", "--out", "pairs.txt"),
        f"pairs.txt: --format table is for a screen\n  next: {OTHERS}",
    ),
    "a file of no form": (
        ("from pairs", "--out", "pairs.txt"),
        "pairs.txt: the name does not say the form\n  expected: .csv .json .jsonl .ndjson .parquet\n"
        "  next: --format csv",
    ),
    "no file": (
        ("@nowhere.sql",),
        "nowhere.sql: cannot be read as SQL: [Errno 2] No such file or directory: 'nowhere.sql'\n"
        "  expected: a text in UTF-8",
    ),
    "no column": (
        ("select rewards/margins from steps",),
        'SQL: Binder Error: Referenced column "rewards" not found in FROM clause! Candidate bindings: '
        '"rewards/chosen", "rewards/margins", "rewards/rejected", "rewards/accuracies", "eval_rewards/chosen"'
        f"\n  expected: {VIEWS}\n  next: {QUOTES}",
    ),
    "no view": (
        ("from pears",),
        f'SQL: Catalog Error: Table with name pears does not exist! Did you mean "pairs"?\n  expected: {VIEWS}\n'
        "  next: prefkit query DATASET lists the views and their columns",
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_that_cannot_be_answered_is_answered_in_full(name: str, refuses: Refuses, dataset: str) -> None:
    arguments, text = QUERIES[name]
    kind = "InputError"
    refuses(("query", dataset, *arguments), text, kind)


def test_an_error_of_duckdb_without_a_word_is_answered_all_the_same() -> None:
    assert str(as_query_error(duckdb.Error(""))) == f"SQL: the query fails\n  expected: {VIEWS}"


def test_what_duckdb_may_not_open_is_answered_with_the_option_that_lifts_it() -> None:
    error = as_query_error(duckdb.PermissionException("Permission Error: Cannot access file"))
    assert str(error).endswith("  next: --external, in Python external=True, lets a query read other files")


def test_a_query_that_runs_out_of_memory_or_of_disk_is_the_machines_fault() -> None:
    memory = as_query_error(duckdb.OutOfMemoryException("Out of Memory Error: failed to allocate\n\nSolutions: ..."))
    hint = "ask for fewer rows or columns at a time, or close what else needs memory"
    said = "DuckDB: the query runs out of memory: Out of Memory Error: failed to allocate"
    assert (type(memory).__name__, memory.exit_code, str(memory)) == ("MachineError", 3, f"{said}\n  next: {hint}")
    disk = as_query_error(OSError("IO Error: Could not write file: No space left on device"))
    assert (type(disk).__name__, disk.message) == ("MachineError", "the disk is full")
    assert disk.where.endswith(" (what outgrows memory)")
    text = as_query_error(duckdb.ConversionException("Conversion Error: Could not convert 'No space left on device'"))
    assert (type(text).__name__, text.exit_code) == ("InputError", 2)


def test_no_folder_for_temporary_files_is_answered_in_full(
    dataset: str, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(**_options: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    scratch_root.cache_clear()
    monkeypatch.setattr("tempfile.mkdtemp", nowhere)
    ended = prefkit("query", dataset, "from pairs")
    said = "no folder for temporary files: [Errno 2] No usable temporary directory found"
    text = f"error: TMPDIR: {said}\n  next: TMPDIR=FOLDER prefkit query ...\n"
    assert (ended.code, ended.err) == (3, text)
    scratch_root.cache_clear()


# columns that a form cannot hold; some end polars with a panic, which is no Exception
UNWRITABLE = [
    ("select interval 1 day as span", "json"),
    ("select interval 1 day as span", "parquet"),
    ("select {'a': interval 1 day} as span", "json"),
    ("select union_value(a := 1) as either", "parquet"),
    ("select 'x'::blob as bytes", "csv"),
    ("select 'x'::blob as bytes", "json"),
    ("select '1'::bit as bits", "json"),
    ("select date '290000-01-01' as far", "csv"),
    ("select 'infinity'::timestamp as never", "json"),
]


@pytest.mark.parametrize(("sql", "form"), UNWRITABLE)
def test_a_result_that_a_form_cannot_hold_is_an_error_with_the_way_out_and_no_file(
    sql: str, form: str, prefkit: Prefkit, dataset: str, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    try:
        ended = prefkit("query", dataset, sql, "--format", form, "--out", f"out.{form}")
    except BaseException as error:
        if not isinstance(error, AssertionError) and type(error).__name__ == "PanicException":
            pytest.fail(f"a panic of polars ends the command with a traceback: {error}")
        raise
    assert (ended.code, ended.out) == (2, "")
    assert re.match(r"error: SQL: (the result cannot be written: |(csv|json) holds no bytes: )", ended.err), ended.err
    assert "\n  next: cast the column in the query\n" in ended.err
    assert snapshot(tmp_path) == before
