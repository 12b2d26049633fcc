"""Files are whole or absent, parts are what the manifest says, and one process writes at a time."""

import errno
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from prefkit import tables
from prefkit.errors import DatasetError, MachineError
from prefkit.format import FORMAT_VERSION, TABLES, Kind, schema
from prefkit.locks import give_lock, leave_no_empty_directory, locked, take_lock
from prefkit.store import (
    as_write_error,
    atomic_path,
    claim_directory,
    folder_beside,
    newer_format,
    read_manifest,
    write_json,
)
from prefkit.tables import TableWriter, read_table, write_parquet, write_table


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rejects(number: int) -> pl.DataFrame:
    rows = {"source": ["f"] * number, "line": list(range(number)), "field": [None] * number, "reason": ["x"] * number}
    return pl.DataFrame(rows | {"raw": [f"row {i}" for i in range(number)]}, schema=schema("rejects", "text"))


def small_dataset(folder: Path, **changes: Any) -> dict[str, Any]:
    """A finished dataset by hand, with a table of three rejects."""
    empty = pl.DataFrame(schema=schema("pairs", "text"))
    tables = {"pairs": empty, "dropped": empty, "rejects": rejects(3)}
    parts = {name: write_table(folder / name, name, frame, "text") for name, frame in tables.items()}
    counts = """
        rows pairs dropped rejects candidates candidate_rejects used unused candidate_pairs candidate_dropped
        prompts prompts_with_pair prompts_dropped train test
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "prefkit_version": "0",
        "kind": "text",
        "pipeline": {},
        "sources": [{"path": "f", "sha256": "0" * 64, "rows": 3, "format": "pairs"}],
        "evals": [],
        "additions": [],
        "counts": dict.fromkeys(counts.split(), 0) | {"rows": 3, "rejects": 3},
        "reasons": {"x": 3},
        "unused": {},
        "report": [],
        "parts": {name: [part._asdict() for part in listed] for name, listed in parts.items()},
    } | changes
    write_json(folder / "manifest.json", manifest)
    return manifest


# atomic files


def test_a_file_appears_whole_under_its_name_and_its_folder_is_made(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "deep" / "file.txt") as beside:
        beside.write_text("new")
        assert not (tmp_path / "deep" / "file.txt").exists()
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["file.txt"]


def test_what_a_symlink_names_is_written_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_path(tmp_path / "link") as beside:
        beside.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(DatasetError, match="a device or a pipe, which cannot be replaced") as refused,
        atomic_path(tmp_path / "pipe"),
    ):
        pass
    assert (refused.value.where, refused.value.expected) == (str(tmp_path / "pipe"), "a file, or a name that is free")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_writing_leaves_the_old_file_and_no_temporary(
    error: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("old")

    def fail() -> None:
        with atomic_path(tmp_path / "file.txt") as beside:
            beside.write_text("half of the new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_a_full_disk_is_a_machine_error_that_names_the_file(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "file.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineError, match="disk is full") as full:
        fail()
    assert (full.value.exit_code, full.value.where) == (3, str(tmp_path / "file.txt"))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_input_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written") as refused:
        write_json(tmp_path / "file" / "inside.json", {})
    assert refused.value.where == str(tmp_path / "file" / "inside.json")


# tables


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("name", sorted(TABLES))
def test_an_empty_table_has_one_part_with_the_columns_of_the_format(name: str, kind: Kind, tmp_path: Path) -> None:
    (part,) = write_table(tmp_path, name, pl.DataFrame(schema=schema(name, kind)), kind)
    assert (part.file, part.rows) == ("part-train-00000.parquet" if name == "pairs" else "part-00000.parquet", 0)
    assert pl.read_parquet_schema(tmp_path / part.file) == schema(name, kind)


def test_missing_columns_are_null_and_columns_of_nobody_are_left_out(tmp_path: Path) -> None:
    frame = pl.DataFrame({"reason": ["x"], "line": pl.Series([3], dtype=pl.Int32), "scratch": [1]})
    write_table(tmp_path, "rejects", frame, "text")
    found = pl.read_parquet(tmp_path / "part-00000.parquet")
    assert found.schema == schema("rejects", "text")
    assert found.row(0) == (None, 3, None, "x", None)


def test_a_long_table_is_numbered_parts_in_order_and_a_shorter_one_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_PART", 3)
    parts = write_table(tmp_path, "rejects", rejects(7), "text")
    assert [(part.file, part.rows) for part in parts] == [(f"part-0000{i}.parquet", n) for i, n in enumerate((3, 3, 1))]
    lines = [pl.read_parquet(tmp_path / part.file)["line"].to_list() for part in parts]
    assert lines == [[0, 1, 2], [3, 4, 5], [6]]
    write_table(tmp_path, "rejects", rejects(2), "text")
    assert names(tmp_path) == ["part-00000.parquet"]


def paired(splits: str) -> pl.DataFrame:
    """A pair a letter: `a` of train, `e` of test, numbered by their place."""
    names = {"a": "train", "e": "test"}
    return pl.DataFrame({"source_row": range(len(splits)), "split": [names[letter] for letter in splits]})


@pytest.mark.parametrize(
    ("splits", "wanted"),
    [
        (
            "aaeaeeeea",
            [("train-00000", [0, 1, 3]), ("train-00001", [8]), ("test-00000", [2, 4, 5]), ("test-00001", [6, 7])],
        ),
        ("aa", [("train-00000", [0, 1])]),
        ("ee", [("test-00000", [0, 1])]),
        ("ea", [("train-00000", [1]), ("test-00000", [0])]),
        ("", [("train-00000", [])]),
    ],
)
def test_a_part_of_the_pairs_holds_one_split_in_the_order_of_the_rows(
    splits: str, wanted: list[tuple[str, list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_PART", 3)
    whole = write_table(tmp_path / "whole", "pairs", paired(splits), "text")
    with TableWriter(tmp_path / "pieces", "pairs", "text") as writer:
        for row in paired(splits).iter_slices(1):
            writer.add(row)
    assert writer.parts == whole  # the hashes too: the bytes do not say in which pieces the rows came
    assert [(part.file, part.rows) for part in whole] == [(f"part-{name}.parquet", len(rows)) for name, rows in wanted]
    for part, (name, rows) in zip(whole, wanted, strict=True):
        found = pl.read_parquet(tmp_path / "whole" / part.file)
        assert found["source_row"].to_list() == rows
        assert set(found["split"]) <= {name.split("-")[0]}
    assert names(tmp_path / "whole") == names(tmp_path / "pieces") == sorted(part.file for part in whole)


def test_a_split_that_has_no_rows_any_more_leaves_no_part_behind(tmp_path: Path) -> None:
    write_table(tmp_path, "pairs", paired("ae"), "text")
    write_table(tmp_path, "pairs", paired("a"), "text")
    assert names(tmp_path) == ["part-train-00000.parquet"]


def test_pairs_that_fail_to_be_written_leave_no_half_of_either_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 2)

    def stopped(writer: TableWriter) -> None:
        with writer:
            writer.add(paired("aaee"))
            assert [name[:6] for name in names(tmp_path)] == [".part-", ".part-"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped(TableWriter(tmp_path, "pairs", "text"))
    assert names(tmp_path) == []


def test_parquet_is_zstd_in_row_groups_of_bounded_size_with_plain_floats(tmp_path: Path) -> None:
    number = 120_000
    frame = pl.DataFrame({"text": ["a", "b"] * (number // 2), "score": [i / 7 for i in range(number)]})
    part = write_parquet(tmp_path / "table.parquet", frame)
    found = pq.ParquetFile(tmp_path / "table.parquet", pre_buffer=False).metadata
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    assert sum(group.num_rows for group in groups) == number == part.rows
    assert all(10_000 <= group.num_rows <= 50_000 for group in groups)
    for group in groups:
        assert {group.column(i).compression for i in range(2)} == {"ZSTD"}
        encodings = set(group.column(1).encodings)
        assert not encodings & {"BYTE_STREAM_SPLIT", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}


def test_the_recorded_hash_is_that_of_the_file_and_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_parquet(tmp_path / name, rejects(5)) for name in ("one.parquet", "other.parquet"))
    assert one.sha256 == other.sha256 == hashlib.sha256((tmp_path / "one.parquet").read_bytes()).hexdigest()


def test_messages_survive_the_disk(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "caf\u00e9 \u0000 雪"}, {"role": "assistant", "content": ""}]
    frame = pl.DataFrame({"prompt": pl.Series([prompt], dtype=schema("dropped", "chat")["prompt"])})
    write_table(tmp_path, "dropped", frame, "chat", plain=True)
    assert pl.read_parquet(tmp_path / "part-00000.parquet")["prompt"].to_list() == [prompt]


# reading back


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = small_dataset(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert read_table(tmp_path, "rejects", manifest).equals(rejects(3))


def test_a_part_that_was_changed_is_refused_by_name(tmp_path: Path) -> None:
    manifest = small_dataset(tmp_path)
    part = tmp_path / "rejects" / "part-00000.parquet"
    write_parquet(part, rejects(4))
    with pytest.raises(DatasetError, match="sha256") as refused:
        read_table(tmp_path, "rejects", manifest)
    assert refused.value.where == str(part)


def test_a_part_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    manifest = small_dataset(tmp_path)
    part = tmp_path / "rejects" / "part-00000.parquet"
    part.unlink()
    with pytest.raises(DatasetError, match="missing") as refused:
        read_table(tmp_path, "rejects", manifest)
    assert refused.value.where == str(part)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    small_dataset(tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(DatasetError, match=f"format_version is {FORMAT_VERSION + 1}") as refused:
        read_manifest(tmp_path)
    assert str(FORMAT_VERSION) in refused.value.expected
    assert refused.value.where == str(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("version", "told"),
    [("99", '"99"'), (6.0, "6.0"), (5.0, "5.0"), ("5", '"5"'), (None, "null"), (True, "true"), ([5], "[5]")],
)
def test_a_format_that_is_no_whole_number_is_refused_and_not_written_over(
    version: Any, told: str, tmp_path: Path
) -> None:
    small_dataset(tmp_path, format_version=version)
    with pytest.raises(DatasetError) as refused:
        read_manifest(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'manifest.json'}: format_version is no whole number: {told}\n  expected: {FORMAT_VERSION}\n"
        "  next: have it copied or downloaded anew: no prefkit writes that"
    )
    assert newer_format(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\xff\xfe", "{}", '{"format_version": "1"}'])
def test_a_manifest_that_is_none_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DatasetError) as refused:
        read_manifest(tmp_path)
    assert refused.value.where == str(tmp_path / "manifest.json")


@pytest.mark.parametrize("key", ["kind", "pipeline", "sources", "counts", "reasons", "parts"])
def test_a_manifest_that_lacks_what_readers_need_is_refused_by_name(key: str, tmp_path: Path) -> None:
    manifest = small_dataset(tmp_path)
    write_json(tmp_path / "manifest.json", {name: value for name, value in manifest.items() if name != key})
    with pytest.raises(DatasetError, match=key) as refused:
        read_manifest(tmp_path)
    assert refused.value.where == str(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({}, "parts"),
        ({"pairs": []}, "parts"),
        ({"pairs": ["a.parquet", "a.parquet"]}, "parts"),
        *(({"pairs": [name]}, "parts.pairs.0.file") for name in ("../x.parquet", "/x.parquet", "a/b.parquet", "x.csv")),
        *(({"pairs": [name]}, "parts.pairs.0.file") for name in ("*.parquet", "..parquet", "a.parquet\n", ".parquet")),
    ],
)
def test_a_manifest_whose_parts_are_none_of_a_dataset_is_refused(
    parts: dict[str, list[str]], field: str, tmp_path: Path
) -> None:
    listed = {table: [{"file": f, "rows": 0, "sha256": "0" * 64} for f in files] for table, files in parts.items()}
    small_dataset(tmp_path, parts=listed)
    with pytest.raises(DatasetError) as refused:
        read_manifest(tmp_path)
    assert (refused.value.message, refused.value.where) == (f"is damaged at {field}", str(tmp_path / "manifest.json"))


def test_a_directory_without_a_manifest_says_whether_it_is_unfinished_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such dataset"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(DatasetError, match="not a prefkit dataset"):
        read_manifest(tmp_path / "foreign")
    with locked(tmp_path / "begun"):
        pass
    with pytest.raises(DatasetError, match="unfinished") as unfinished:
        read_manifest(tmp_path / "begun")
    assert "prefkit build" in unfinished.value.hint


# who may write


def test_an_absent_an_empty_and_an_own_directory_may_be_built_into(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small_dataset(tmp_path / "own")
    for name in ("absent", "empty", "own"):
        claim_directory(tmp_path / name)


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", "pairs", ".git"])
def test_a_directory_with_anything_of_somebody_else_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DatasetError, match="not a dataset of prefkit") as refused:
        claim_directory(tmp_path)
    assert refused.value.where == str(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_dataset_that_somebody_put_a_file_into_is_refused_by_that_name(tmp_path: Path) -> None:
    small_dataset(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"notes\.txt"):
        claim_directory(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="is a file"):
        claim_directory(tmp_path / "file")


def test_a_second_writer_is_refused_and_told_who_holds_the_dataset(tmp_path: Path) -> None:
    with locked(tmp_path):
        second = locked(tmp_path)
        with pytest.raises(DatasetError, match=f"process {os.getpid()}") as refused:
            second.__enter__()
    assert refused.value.where == str(tmp_path)


def test_a_lock_ends_with_its_writer_even_when_that_one_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    with locked(tmp_path):
        pass


def test_the_file_of_a_writer_that_was_killed_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("999999")
    with locked(tmp_path):
        pass


def test_json_is_written_the_same_whatever_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"b": 1, "a": {"d": "é", "c": None}})
    write_json(tmp_path / "other.json", {"a": {"c": None, "d": "é"}, "b": 1})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text("utf-8")) == {"b": 1, "a": {"d": "é", "c": None}}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half() -> None:
        with folder_beside(tmp_path / "model") as beside:
            (beside / "one").write_text("new")
            raise ValueError("stop")

    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "torn").write_text("of a kill")
    with pytest.raises(ValueError, match="stop"):
        half()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with folder_beside(tmp_path / "model") as beside:
            (beside / text).write_text(text)
        assert [path.name for path in (tmp_path / "model").iterdir()] == [text]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "a limit on the size of files is reached (ulimit -f)"),
    ],
)
def test_no_room_is_the_machines_fault_and_says_which_room(number: int, message: str, tmp_path: Path) -> None:
    error = as_write_error(OSError(number, os.strerror(number)), tmp_path)
    assert isinstance(error, MachineError)
    assert (error.message, error.where) == (message, str(tmp_path))
    hints = {errno.EFBIG: "raise it and type the same command"}
    assert error.hint == hints.get(number, "make room and type the same command")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_to_is_named_with_the_way_out(number: int, tmp_path: Path) -> None:
    error = as_write_error(OSError(number, os.strerror(number)), tmp_path)
    assert isinstance(error, DatasetError)
    assert error.message == f"cannot be written: {os.strerror(number)}"
    assert error.hint == "make it writable, or choose another directory (dataset:, --out)"


def test_any_other_failure_stays_what_it_is(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "I/O error")
    assert as_write_error(error, tmp_path) is error


def test_a_lock_is_taken_or_not_and_says_by_whom(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "new")
    assert lock is not None
    assert (tmp_path / "new" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert take_lock(tmp_path / "new") is None
    give_lock(tmp_path / "new", lock)
    assert (tmp_path / "new" / ".lock").read_bytes() == b""
    with locked(tmp_path / "new"):
        pass


def test_an_empty_directory_is_removed_unless_somebody_is_at_work_in_it(tmp_path: Path) -> None:
    with locked(tmp_path / "busy"):
        leave_no_empty_directory(tmp_path / "busy")
    assert (tmp_path / "busy").exists()
    leave_no_empty_directory(tmp_path / "busy")
    assert not (tmp_path / "busy").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    leave_no_empty_directory(tmp_path / "full")
    leave_no_empty_directory(tmp_path / "gone")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5440 vs 5332"),
    ],
    ids=["Python", "safetensors", "torch"],
)
def test_a_full_disk_is_recognised_in_the_words_and_causes_of_libraries(error: Exception, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "file"):
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError:
                raise error  # noqa: B904 - as torch does: the cause is only the context

    with pytest.raises(MachineError, match="the disk is full") as caught:
        write()
    assert caught.value.where == str(tmp_path / "file")


def test_a_file_is_no_dataset_and_a_pipeline_file_names_one(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("dataset: data\n")
    with pytest.raises(DatasetError) as refused:
        read_manifest(path)
    assert str(refused.value) == (
        f"{path}: is a file\n  expected: a dataset directory\n"
        "  next: the directory that a pipeline file names under dataset:"
    )
