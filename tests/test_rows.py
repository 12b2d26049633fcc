"""A name that promises another kind of file is answered with what to do; csv lines are true; saved folders are read."""

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.rows import RawRow, read_chunks, read_rows
from prefkit.sources import Loaded, expand, load_source

TABLE = {"prompt": ["p", "q"], "chosen": ["c", "d"], "rejected": ["r", "s"]}


def load(path: Path | str, form: str = "pairs") -> Loaded:
    return load_source(SourceConfig.model_validate({"path": str(path), "format": form}), "text")


def refused(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError) as error:
        [*read_rows(str(folder / name))]
    return str(error.value).replace(f"{folder}/", "")


def found(folder: Path, name: str, content: str | bytes) -> list[tuple[int, str | None]]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.line, row.reason) for row in read_rows(str(folder / name))]


def row(prompt: str = "p") -> str:
    return json.dumps({"prompt": prompt, "chosen": "c", "rejected": "r"})


# names that promise another kind of file


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_json_lines_in_a_json_file_are_answered_with_the_name_they_need(name: str, tmp_path: Path) -> None:
    def text(content: str) -> str | bytes:
        return gzip.compress(content.encode()) if name.endswith(".gz") else content

    hint = "  next: one object a line is .jsonl: rename the file"
    wanted = f"{name}:2: no JSON: Extra data\n  expected: a list of objects\n{hint}"
    assert refused(tmp_path, name, text(f"{row()}\n{row()}\n")) == wanted
    wanted = (
        f"{name}: not a list\n  expected: a list of objects\n{hint}; rows in a list inside an object: write that list"
    )
    assert refused(tmp_path, name, text(f"\n{row()}\n")) == wanted
    assert "next:" not in refused(tmp_path, name, text("[] []"))
    assert "next:" not in refused(tmp_path, name, text("3"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"a": 1}, {"a": 2}]),
        json.dumps([{"a": 1}, {"a": 2}]) + "\n\n",
        json.dumps([{"a": 1}, {"a": 2}], indent=2),
        f"[{row()},\n{row()}]\n",
        f"\ufeff\n [\n{row()}\n]",
        "[ {\n}]",
    ],
)
def test_one_json_list_in_a_file_of_lines_is_answered_with_the_name_it_needs(
    content: str, name: str, tmp_path: Path
) -> None:
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    wanted = f"{name}: is a JSON list\n  expected: one object a line\n"
    assert refused(tmp_path, name, packed) == wanted + "  next: one list of objects is .json: rename the file"


@pytest.mark.parametrize("first", ['["p", "c"]', "[]", '[{"role": "user"}]', "[", '[{"a": 1}', "[[", '[{"a": 1}]x'])
def test_a_line_that_is_a_list_is_one_reject(first: str, tmp_path: Path) -> None:
    lines = [first, row(), row()] if first != "[" else [row(), first, row()]
    assert [line for line, reason in found(tmp_path, "rows.jsonl", "\n".join(lines)) if reason] == [
        lines.index(first) + 1
    ]


def test_other_commas_than_the_name_promises_are_answered_with_what_to_do(tmp_path: Path) -> None:
    names = ["prompt", "chosen", "rejected"]
    wanted = "rows.csv:1: the columns are separated by semicolons\n  expected: commas\n  next: save it with commas"
    assert refused(tmp_path, "rows.csv", ";".join(names) + "\np;c;r\n") == wanted
    wanted = "rows.csv:1: the columns are separated by tabs\n  expected: commas\n  next: name it .tsv"
    assert refused(tmp_path, "rows.csv", "\t".join(names) + "\np\tc\tr\n") == wanted
    wanted = "rows.tsv:1: the columns are separated by commas\n  expected: tabs\n  next: name it .csv"
    assert refused(tmp_path, "rows.tsv", ",".join(names) + "\np,c,r\n") == wanted
    assert found(tmp_path, "rows.csv", "a;b,c\n1,2\n") == [(2, None)]
    assert found(tmp_path, "rows.csv", "a\n1\n") == [(2, None)]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.tsv.gz"])
def test_columns_may_be_separated_by_tabs(name: str, tmp_path: Path) -> None:
    content = b'prompt\tchosen\trejected\np, q\tc\t"r\ts"\nt\tu\tv\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = load(tmp_path / name).records
    assert records.select("prompt", "chosen", "rejected").rows() == [("p, q", "c", "r\ts"), ("t", "u", "v")]


# the line that a row of csv begins in


def test_a_row_of_csv_has_the_line_of_the_file_that_it_begins_in(tmp_path: Path) -> None:
    content = 'prompt,chosen,"rejec\nted"\n\na,"x\ny\n",1\r\n\n\nb,c\nd,"\n\n",2\ne,f,3'
    lines = found(tmp_path, "rows.csv", content)
    assert lines == [(4, None), (9, "wrong_number_of_fields"), (10, None), (13, None)]
    for line, begin in ((4, "a"), (9, "b"), (10, "d"), (13, "e")):
        assert content.split("\n")[line - 1].startswith(begin)


def test_a_quote_that_never_ends_is_named_with_the_line_it_began_in(tmp_path: Path) -> None:
    text = refused(tmp_path, "rows.csv", 'a,b\n1,"2\n3"\n4,"5\n6\n7\n')
    assert text == "rows.csv:4: cannot be read: unexpected end of data\n  expected: a whole file"


# chunks


def test_chunks_end_where_lines_do_and_hold_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b'{"n": %d}\n' % i for i in range(1000)) + b'{"n": 1000}'
    (tmp_path / "rows.jsonl").write_bytes(content)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    for size in (1, 10, 333, 100_000):
        monkeypatch.setattr("prefkit.rows.CHUNK_BYTES", size)
        for name in ("rows.jsonl", "rows.jsonl.gz"):
            chunks: list[Any] = [*read_chunks(str(tmp_path / name))]
            assert b"".join(chunk.content for chunk in chunks) == content
            assert all(chunk.content.endswith(b"\n") for chunk in chunks[:-1])
            assert [row.value["n"] for row in read_rows(str(tmp_path / name))] == [*range(1001)]
            assert [row.line for row in read_rows(str(tmp_path / name))] == [*range(1, 1002)]


# Arrow, and folders that `datasets` saved


def stream(path: Path, table: Any) -> bytes:
    with pa.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=1)
    return path.read_bytes()


def test_streams_and_files_of_arrow_are_read(tmp_path: Path) -> None:
    table = pa.table(TABLE)
    content = stream(tmp_path / "stream.arrow", table)
    (tmp_path / "packed.arrow.gz").write_bytes(gzip.compress(content))
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("stream.arrow", "packed.arrow.gz", "file.arrow"):
        assert [*read_rows(str(tmp_path / name))] == [
            RawRow(i + 1, value, "") for i, value in enumerate(table.to_pylist())
        ]
        assert load(tmp_path / name).records["prompt"].to_list() == ["p", "q"]


@pytest.mark.parametrize("cut", [1, 8, 20, 300])
def test_a_stream_of_arrow_that_breaks_off_is_refused(cut: int, tmp_path: Path) -> None:
    content = stream(tmp_path / "rows.arrow", pa.table(TABLE))
    assert refused(tmp_path, "rows.arrow", content[:-cut]).startswith(
        "rows.arrow:1: cannot be read: its end is missing"
    )
    assert "cannot be read" in refused(tmp_path, "rows.arrow", b"")
    twice = io.BytesIO()
    names = pa.table([["a"], ["b"]], names=["x", "x"])
    with pa.ipc.new_stream(twice, names.schema) as out:
        out.write_table(names)
    assert "column 'x' is there twice" in refused(tmp_path, "rows.arrow", twice.getvalue())


def saved(folder: Path, *tables: Any, **state: Any) -> Path:
    """A folder as `Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        stream(folder / name, table)
    told = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_format_type": None,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(told | state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_a_folder_that_datasets_saved_is_its_files_in_the_order_of_its_state(tmp_path: Path) -> None:
    tables = [pa.table({**TABLE, "prompt": [f"{i}a", f"{i}b"]}) for i in range(3)]
    folder = saved(tmp_path / "saved", *tables)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    loaded = load(folder)
    assert loaded.records["prompt"].to_list() == ["2a", "2b", "1a", "1b", "0a", "0b"]
    names = [str(folder / file["filename"]) for file in state["_data_files"]]
    assert expand(str(folder)) == [file.path for file in loaded.files] == names
    assert [file.sha256 for file in loaded.files] == [hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in names]
    assert [file.rows for file in loaded.files] == [2, 2, 2]
    assert loaded.records["source_row"].to_list() == [1, 2] * 3


def test_a_folder_of_several_splits_is_answered_with_their_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "saved" / split, pa.table(TABLE))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(SourceError) as error:
        load(tmp_path / "saved")
    folder = tmp_path / "saved"
    wanted = f"{folder}: a dataset of several splits\n  expected: one split\n"
    assert str(error.value) == wanted + f"  next: path: {folder}/train or path: {folder}/test"
    assert load(folder / "train").records.height == 2


def test_a_saved_selection_of_rows_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", pa.table(TABLE), _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(SourceError) as error:
        load(folder)
    wanted = f"{folder}: a selection of rows that are not in order\n  expected: rows\n"
    assert str(error.value) == wanted + "  next: load it, and save what flatten_indices() gives"


def test_a_saved_folder_with_a_file_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", pa.table(TABLE))
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SourceError) as error:
        load(folder)
    assert str(error.value) == f"{folder}/data-00000-of-00001.arrow: no such file\n  expected: what state.json names"


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": []}', "\xff"])
def test_any_other_folder_is_no_file(state: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state, encoding="latin-1")
    with pytest.raises(SourceError, match="a directory, not a file"):
        load(tmp_path)
