"""Rows in files: Parquet grows group by group, and its schema with it, to what one look at all rows would give."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefkit import row_files
from prefkit.errors import InputError
from prefkit.row_files import row_file

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(row_files, "ROWS_PER_GROUP", 4)


def write(path: Path, rows: list[Row], at_once: int = 1, **types: pa.DataType) -> Path:
    with row_file(path, types) as put:
        for start in range(0, len(rows), at_once):
            put(rows[start : start + at_once])
    return path


def message(**more: Any) -> list[Row]:
    return [{"role": "assistant", "content": "text", **more}]


GROWING: dict[str, list[Row]] = {
    "a column that comes later": [*[{"a": "x"}] * 9, {"a": "y", "b": 1}],
    "a type where nulls stood": [*[{"a": None, "b": "x"}] * 9, {"a": 2.5, "b": None}],
    "a field of a message": [*[{"m": message()}] * 6, {"m": message(name="N")}, *[{"m": message(x=1)}] * 6],
    "a number that is not whole": [*[{"a": 1}] * 5, {"a": 1.5}, {"a": 2}],
    "an empty list": [*[{"a": []}] * 5, {"a": ["text"]}],
    "one group": [{"a": 1}, {"b": 2}],
}


@pytest.mark.parametrize("name", GROWING)
def test_the_schema_is_that_of_all_rows_and_every_row_keeps_its_values(name: str, tmp_path: Path) -> None:
    rows = GROWING[name]
    table = pq.read_table(write(tmp_path / "a.parquet", rows))
    names = dict.fromkeys(name for row in rows for name in row)
    whole = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    assert table.equals(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_file_is_a_group_after_another_whatever_pieces_the_rows_come_in(tmp_path: Path) -> None:
    rows: list[Row] = [{"a": str(number), "b": None if number < 7 else 1} for number in range(11)]
    first = write(tmp_path / "1.parquet", rows)
    groups = [pq.ParquetFile(first).metadata.row_group(i).num_rows for i in range(3)]
    assert groups == [4, 4, 3]
    for at_once in (2, 3, 11):
        assert write(tmp_path / f"{at_once}.parquet", rows, at_once).read_bytes() == first.read_bytes()


def test_a_given_type_is_kept_through_nulls_and_growth(tmp_path: Path) -> None:
    rows = [{"f": None}] * 5 + [{"f": 0.1, "more": 1}]
    table = pq.read_table(write(tmp_path / "a.parquet", rows, f=pa.float32()))
    assert table.schema.field("f").type == pa.float32()
    assert table["f"].to_pylist() == [*[None] * 5, pa.scalar(0.1, pa.float32()).as_py()]


@pytest.mark.parametrize("late", [1, 3, 9])
def test_rows_without_one_schema_are_refused_wherever_they_stand(late: int, tmp_path: Path) -> None:
    rows: list[Row] = [*[{"a": "text"}] * late, {"a": 1}]
    with pytest.raises(InputError, match="the rows fit no one schema: ") as refused:
        write(tmp_path / "a.parquet", rows)
    assert refused.value.where == str(tmp_path / "a.parquet")
    assert refused.value.hint == "--out FILE.jsonl"
    assert [*tmp_path.iterdir()] == []


def test_a_float_has_as_many_digits_as_give_it_back(tmp_path: Path) -> None:
    value = 1 + 2**-23  # the float32 after 1
    text = write(tmp_path / "a.jsonl", [{"a": value}]).read_text()
    assert text == '{"a": 1.0000001192092896}\n'
    assert float(text[6:-2]) == value
