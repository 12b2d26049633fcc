"""Every row of a file becomes a record or a reject with its line; a file that cannot be read stops with its name."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.rows import read_rows
from prefkit.sources import Loaded, load_source

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
ROWS = [
    {"prompt": "p1", "chosen": "Gr\u00fc\u00dfe, 雪", "rejected": 'a,"b"\nc', "chosen_score": "2"},
    {"prompt": "p2", "chosen": "x", "rejected": "y", "chosen_score": "1.5"},
]


def as_bytes(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def packed(packing: str, content: bytes) -> bytes:
    if packing == ".gz":
        return gzip.compress(content, mtime=0)
    return zstandard.compress(content) if packing == ".zst" else content


def load(path: Path | str, form: str = "pairs", kind: Any = "text", **settings: Any) -> Loaded:
    return load_source(SourceConfig.model_validate({"path": str(path), "format": form, **settings}), kind)


def load_bytes(folder: Path, name: str, content: bytes, form: str = "pairs", **settings: Any) -> Loaded:
    (folder / name).write_bytes(content)
    return load(folder / name, form, **settings)


def pair(prompt: str) -> str:
    return json.dumps({"prompt": prompt, "chosen": "c", "rejected": "r"})


def rejected(loaded: Loaded) -> list[tuple[int, str | None, str]]:
    return [(row["line"], row["field"], row["reason"]) for row in loaded.rejects.iter_rows(named=True)]


# what is read


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_records(suffix: str, packing: str, tmp_path: Path) -> None:
    content = packed(packing, as_bytes(suffix, ROWS))
    loaded = load_bytes(tmp_path, f"rows{suffix}{packing}", content)
    wanted = [{**row, "chosen_score": float(row["chosen_score"])} for row in ROWS]
    assert loaded.records.select(list(ROWS[0])).to_dicts() == wanted
    assert loaded.records["source_row"].to_list() == ([2, 4] if suffix == ".csv" else [1, 2])  # a cell has a line break
    assert loaded.rejects.is_empty()
    (file,) = loaded.files
    assert (file.path, file.rows) == (str(tmp_path / f"rows{suffix}{packing}"), 2)
    assert file.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_that_were_put_one_after_another_are_read_to_their_end(packing: str, tmp_path: Path) -> None:
    content = b"".join(packed(packing, f"{pair(name)}\n".encode()) for name in ("a", "b", "c"))
    assert load_bytes(tmp_path, f"rows.jsonl{packing}", content).records["prompt"].to_list() == ["a", "b", "c"]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_part_of_a_row(tmp_path: Path) -> None:
    content = codecs.BOM_UTF8 + f"\r\n{pair('a')}\r\n  \r\n\r\n{pair('b')}".encode()
    loaded = load_bytes(tmp_path, "rows.jsonl", content)
    assert loaded.records.select("prompt", "source_row").rows() == [("a", 2), ("b", 5)]
    assert (loaded.rejects.height, loaded.files[0].rows) == (0, 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_belongs_to_no_field(suffix: str, tmp_path: Path) -> None:
    loaded = load_bytes(tmp_path, f"rows{suffix}", codecs.BOM_UTF8 + as_bytes(suffix, ROWS))
    assert loaded.records["prompt"].to_list() == ["p1", "p2"]


@PROPERTY
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=6))
def test_no_character_of_a_json_text_ends_a_line_or_gets_lost(prompts: list[str]) -> None:
    rows = [{"prompt": text, "chosen": "c", "rejected": "r"} for text in prompts]
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_bytes(Path(folder), "rows.jsonl", as_bytes(".jsonl", rows))
    assert loaded.records["prompt"].to_list() == prompts


def test_a_glob_reads_its_files_in_the_order_of_their_names_and_each_row_knows_its_file(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(pair(name) + "\n")
    (tmp_path / "a.txt").write_text("no")
    loaded = load(tmp_path / "*.jsonl")
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    assert loaded.records.select("prompt", "source", "source_row").rows() == [
        (name, file, 1) for name, file in zip("abc", files, strict=True)
    ]
    assert [file.path for file in loaded.files] == files


def test_a_file_whose_name_looks_like_a_glob_is_read_as_a_file(tmp_path: Path) -> None:
    assert load_bytes(tmp_path, "rows[1].jsonl", pair("a").encode()).records.height == 1


def test_a_csv_cell_may_hold_line_breaks_and_very_long_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p\nq", "chosen": "c" * 200_000, "rejected": "r"},
        {"prompt": "z", "chosen": "c", "rejected": "r"},
    ]
    loaded = load_bytes(tmp_path, "rows.csv", as_bytes(".csv", rows))
    assert loaded.records["prompt"].to_list() == ["p\nq", "z"]
    assert loaded.records["chosen"].str.len_chars().to_list() == [200_000, 1]


def test_parquet_scores_may_be_decimals_integers_or_booleans(tmp_path: Path) -> None:
    scores: list[Any] = [Decimal("2.50"), 3, True]
    for number, score in enumerate(scores):
        rows = [{"prompt": "p", "response": "r", "score": score}]
        loaded = load_bytes(tmp_path, f"{number}.parquet", as_bytes(".parquet", rows), "candidates")
        assert loaded.records["score"].to_list() == [float(score)], score


def test_an_empty_file_of_lines_holds_no_rows(tmp_path: Path) -> None:
    loaded = load_bytes(tmp_path, "rows.jsonl", b"")
    assert (loaded.records.height, loaded.rejects.height, loaded.files[0].rows) == (0, 0, 0)


# what the dataset's kind makes of a text


def test_in_chat_a_plain_prompt_is_a_user_turn_and_a_plain_side_an_assistant_turn(tmp_path: Path) -> None:
    row = load_bytes(tmp_path, "rows.jsonl", pair("p").encode(), kind="chat").records.row(0, named=True)
    assert row["prompt"] == [{"role": "user", "content": "p", "extra": None}]
    assert row["chosen"] == [{"role": "assistant", "content": "c", "extra": None}]
    assert row["rejected"] == [{"role": "assistant", "content": "r", "extra": None}]


def test_in_a_text_dataset_messages_are_rejects_that_name_the_field(write_jsonl: Callable[..., Path]) -> None:
    turn = [{"role": "assistant", "content": "c"}]
    path = write_jsonl("rows.jsonl", [pair("p"), {"prompt": "p", "chosen": turn, "rejected": turn}])
    loaded = load(path)
    assert loaded.records.height == 1
    assert [(line, field) for line, field, _ in rejected(loaded)] == [(2, "chosen")]


def test_the_annotator_of_the_source_holds_where_the_row_names_none(write_jsonl: Callable[..., Path]) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "annotator": name} for name in ("human", None)]
    path = write_jsonl("rows.jsonl", [*rows, pair("q")])
    assert load(path, annotator="model").records["annotator"].to_list() == ["human", "model", "model"]
    assert load(path).records["annotator"].to_list() == ["human", None, None]


def test_a_weight_that_a_row_leaves_null_is_one(write_jsonl: Callable[..., Path]) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "weight": weight} for weight in (None, 2)]
    loaded = load(write_jsonl("rows.jsonl", rows), columns={"weight": "weight"})
    assert loaded.records["weight"].to_list() == [1.0, 2.0]


def test_an_empty_csv_cell_of_an_optional_column_says_nothing(tmp_path: Path) -> None:
    content = b"prompt,chosen,rejected,chosen_score,annotator\np,c,r,,\nq,c,r,3,human\n"
    records = load_bytes(tmp_path, "rows.csv", content).records
    assert records.select("chosen_score", "annotator").rows() == [(None, None), (3.0, "human")]


# lines that cannot become a record


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"prompt": "p", "chosen": "c"', None),
        ("[" * 100_000, None),
        ('["p", "c", "r"]', None),
        ("17", None),
        ("null", None),
        ('{"chosen": "c", "rejected": "r"}', "prompt"),
        ('{"prompt": "p", "chosen": 5, "rejected": "r"}', "chosen"),
        ('{"prompt": "p", "chosen": "c", "rejected": null}', "rejected"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": "high"}', "chosen_score"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": NaN}', "chosen_score"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 1e999}', "chosen_score"),
        (f'{{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 1{"0" * 400}}}', "chosen_score"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "weight": -1}', "weight"),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "annotator": "crowd"}', "annotator"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_one_bad_line_is_a_reject_with_line_field_reason_and_raw_text(
    line: str, field: str | None, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl("rows.jsonl", [pair("a"), line, pair("b")])
    loaded = load(path)
    assert loaded.records.select("prompt", "source_row").rows() == [("a", 1), ("b", 3)]
    (reject,) = loaded.rejects.to_dicts()
    assert (reject["source"], reject["line"], reject["field"]) == (str(path), 2, field)
    assert reject["raw"] == line
    assert reject["reason"]


def test_different_faults_have_different_reasons(write_jsonl: Callable[..., Path]) -> None:
    faults = {
        "not_json": "{",
        "not_an_object": "[]",
        "missing_field": '{"prompt": "p", "response": "r"}',
        "wrong_type": '{"prompt": 1, "response": "r", "score": 1}',
        "not_a_number": '{"prompt": "p", "response": "r", "score": "x"}',
        "not_finite": '{"prompt": "p", "response": "r", "score": Infinity}',
        "lone_surrogate": '{"prompt": "p\\ud83d", "response": "r", "score": 1}',
    }
    loaded = load(write_jsonl("rows.jsonl", faults.values()), "candidates")
    assert loaded.rejects["reason"].to_list() == list(faults)


def test_a_line_that_is_no_utf8_is_a_reject_with_its_bytes_escaped(tmp_path: Path) -> None:
    line = b'{"prompt": "caf\xe9", "chosen": "c", "rejected": "r"}'
    loaded = load_bytes(tmp_path, "rows.jsonl", line + b"\n" + pair("b").encode())
    assert rejected(loaded) == [(1, None, "not_utf8")]
    assert loaded.rejects["raw"].item() == line.decode(errors="backslashreplace")
    assert loaded.records["prompt"].to_list() == ["b"]


def test_half_a_surrogate_pair_is_a_reject_and_a_whole_one_is_a_character(write_jsonl: Callable[..., Path]) -> None:
    lines = [
        f'{{"prompt": "{text}", "chosen": "c", "rejected": "r"}}' for text in ("\\ud83d", "\\ud83d\\ude00", "\\ude00")
    ]
    loaded = load(write_jsonl("rows.jsonl", lines))
    assert rejected(loaded) == [(1, None, "lone_surrogate"), (3, None, "lone_surrogate")]
    assert loaded.rejects["raw"].to_list() == [lines[0], lines[2]]
    assert loaded.records["prompt"].to_list() == ["\U0001f600"]


def test_half_a_surrogate_pair_in_a_list_of_objects_is_a_reject_too(tmp_path: Path) -> None:
    content = b'[{"prompt": "\\ud83d", "chosen": "c", "rejected": "r"}, 3]'
    assert [(line, reason) for line, _, reason in rejected(load_bytes(tmp_path, "rows.json", content))] == [
        (1, "lone_surrogate"),
        (2, "not_an_object"),
    ]


def test_one_bad_score_of_a_list_is_one_reject_that_names_its_place(write_jsonl: Callable[..., Path]) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 2, "none", None]}
    loaded = load(write_jsonl("rows.jsonl", [row]), "candidates")
    assert loaded.records.select("response", "score").rows() == [("a", 1.0), ("b", 2.0)]
    assert [(line, field) for line, field, _ in rejected(loaded)] == [(1, "score[2]"), (1, "score[3]")]


def test_a_row_with_empty_lists_of_candidates_is_not_lost(write_jsonl: Callable[..., Path]) -> None:
    loaded = load(write_jsonl("rows.jsonl", [{"prompt": "p", "responses": [], "scores": []}]), "candidates")
    assert [line for line, _, _ in rejected(loaded)] == [1]


def test_a_csv_row_with_too_many_or_too_few_cells_is_a_reject(tmp_path: Path) -> None:
    content = b"prompt,chosen,rejected\np,c,r\np,c\np,c,r,x\nq,c,r\n"
    loaded = load_bytes(tmp_path, "rows.csv", content)
    assert loaded.records["prompt"].to_list() == ["p", "q"]
    assert [(field, reason) for _, field, reason in rejected(loaded)] == [(None, "wrong_number_of_fields")] * 2


def test_one_csv_row_that_is_no_utf8_does_not_end_the_build(tmp_path: Path) -> None:
    content = b"prompt,chosen,rejected\np,c,r\ncaf\xe9,c,r\nq,c,r\n"
    loaded = load_bytes(tmp_path, "rows.csv", content)
    assert loaded.records["prompt"].to_list() == ["p", "q"]
    assert loaded.rejects["reason"].to_list() == ["not_utf8"]


def test_a_parquet_reject_keeps_its_row_as_json(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "é", "score": "1"}, {"prompt": "p", "response": "s", "score": "?"}]
    loaded = load_bytes(tmp_path, "rows.parquet", as_bytes(".parquet", rows), "candidates")
    (reject,) = loaded.rejects.to_dicts()
    assert (reject["line"], reject["field"], reject["reason"]) == (2, "score", "not_a_number")
    assert json.loads(reject["raw"]) == rows[1]


# files that cannot be read at all


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("missing*.jsonl", "no file matches"),
        ("folder", "a directory"),
        ("rows.txt", "this kind of file is not read"),
        ("rows", "this kind of file is not read"),
        ("rows.jsonl.bz2", "this kind of file is not read"),
        ("rows.gz", "this kind of file is not read"),
    ],
)
def test_a_source_that_is_no_readable_file_is_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for present in ("rows.txt", "rows", "rows.jsonl.bz2", "rows.gz"):
        (tmp_path / present).write_text(pair("a"))
    with pytest.raises(SourceError, match=message) as refused:
        load(tmp_path / name)
    assert refused.value.where == str(tmp_path / name)
    assert refused.value.expected


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz.zst", "rows.json.gz"])
def test_an_empty_file_that_should_have_a_beginning_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, name, b"")
    assert refused.value.where.startswith(str(tmp_path / name))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("missing", [0.5, 0.001])
def test_a_packed_file_whose_end_is_missing_is_refused_and_names_the_first_line_that_was_not_read(
    packing: str, missing: float, tmp_path: Path
) -> None:
    lines = [pair(hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()) for i in range(1000)]
    content = packed(packing, "\n".join(lines).encode())
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(content[: int(len(content) * (1 - missing)) - 1])
    seen: list[int] = []
    with pytest.raises(SourceError) as refused:
        seen.extend(row.line for row in read_rows(str(path)))
    assert refused.value.where == f"{path}:{len(seen) + 1}"


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_with_damaged_bytes_is_refused_by_name(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{packing}"
    content = bytearray(packed(packing, pair("a").encode() * 50))
    content[10:14] = b"\x07\x00\xff\xff"  # right behind the header of a .gz: a block type that does not exist
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, path.name, bytes(content))
    assert refused.value.where.startswith(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, name, (pair("a") + "\n").encode())
    assert refused.value.where.startswith(str(tmp_path / name))


def test_broken_json_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, "rows.json", f"[{pair('a')},\n{pair('b')},\n oops]".encode())
    assert refused.value.where == f"{tmp_path / 'rows.json'}:3"


@pytest.mark.parametrize("content", [b'{"prompt": "p"}', b"3", b"[" * 100_000, b'["\xff"]'])
def test_a_json_file_that_is_no_list_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, "rows.json", content)
    assert refused.value.where.startswith(str(tmp_path / "rows.json"))


def test_an_unfinished_quote_in_a_csv_file_is_refused_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load_bytes(tmp_path, "rows.csv", b'prompt,chosen,rejected\np,c,r\nq,"c,r\n')
    file, _, line = refused.value.where.rpartition(":")
    assert (file, line) in [(str(tmp_path / "rows.csv"), number) for number in ("2", "3")]  # row 2, on line 3


def test_records_have_the_dtypes_of_the_format_even_when_there_are_none(tmp_path: Path) -> None:
    messages = pl.List(pl.Struct({"role": pl.String, "content": pl.String, "extra": pl.String}))
    for kind, dtype in (("text", pl.String), ("chat", messages)):
        records = load_bytes(tmp_path, "rows.jsonl", b"", kind=kind).records
        assert [records.schema[name] for name in ("prompt", "chosen", "rejected")] == [dtype] * 3
