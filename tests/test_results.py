"""A query's rows on their way out: as csv, json and parquet, block by block; and Ctrl-C and memory on that way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
from command import Prefkit

from prefkit.errors import InputError, MachineError
from prefkit.results import BLOCK_ROWS, GROUP_ROWS, Form, first_rows, result_form, write_result

FORMS: tuple[Form, ...] = ("csv", "json", "parquet")
Ask = Callable[[str], Any]
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def asked() -> Ask:
    connection = duckdb.connect()
    return connection.sql


@pytest.fixture
def text(asked: Ask) -> Callable[[str, Any], str]:
    """A result as the text of one form."""

    def write(sql: str, form: Any) -> str:
        pieces: list[str] = []
        write_result(asked(sql), form, None, pieces.append)
        return "".join(pieces)

    return write


def test_a_result_of_many_blocks_is_written_whole_and_in_order(asked: Ask, tmp_path: Path) -> None:
    rows = 3 * BLOCK_ROWS + 7
    sql = f"select range as i, 'row ' || range as t from range({rows})"
    wanted = [(i, f"row {i}") for i in range(rows)]
    for form in FORMS:
        path = tmp_path / f"out.{form}"
        assert write_result(asked(sql), form, str(path), print) == rows
        readers: dict[str, Any] = {"csv": pl.read_csv, "json": pl.read_ndjson, "parquet": pl.read_parquet}
        read = readers[form]
        assert read(path).rows() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.parquet"]


def test_row_groups_of_a_parquet_file_are_of_the_houses_size(asked: Ask, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    write_result(asked(f"from range({2 * GROUP_ROWS + BLOCK_ROWS})"), "parquet", str(path), print)
    sizes = [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(pq.ParquetFile(path).num_row_groups)]
    assert sum(sizes) == 2 * GROUP_ROWS + BLOCK_ROWS
    assert all(10_000 <= size <= GROUP_ROWS + BLOCK_ROWS for size in sizes[:-1])
    write_result(asked("select repeat('x', 100000) || range as t from range(4096)"), "parquet", str(path), print)
    assert pq.ParquetFile(path).num_row_groups > 1  # 400 MB of text are not held at once


def test_a_result_without_rows_has_its_columns_all_the_same(
    text: Callable[[str, Any], str], asked: Ask, tmp_path: Path
) -> None:
    sql = "select 1 as a, 'x' as b, [1] as c where false"
    assert (text(sql, "csv"), text(sql, "json")) == ("a,b,c\n", "")
    assert write_result(asked(sql), "parquet", str(tmp_path / "out.parquet"), print) == 0
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert (found.height, found.columns) == (0, ["a", "b", "c"])


def test_lists_and_structs_are_json_within_a_csv(text: Callable[[str, Any], str]) -> None:
    sql = """select [{'role': 'user', 'content': 'say "a,b"'}] as m, null::int[] as n, {'a': [1, null]} as s,
        map {'k': date '2020-01-31'} as d, [1, 2]::int[2] as f"""
    header, line = text(sql, "csv").splitlines()
    assert header == "m,n,s,d,f"
    (row,) = pl.read_csv(f"{header}\n{line}\n".encode()).rows()
    assert json.loads(row[0]) == [{"role": "user", "content": 'say "a,b"'}]
    assert row[1] is None
    assert [json.loads(cell) for cell in row[2:]] == [{"a": [1, None]}, {"k": "2020-01-31"}, [1, 2]]


def test_sums_and_decimals_are_numbers(text: Callable[[str, Any], str], asked: Ask, tmp_path: Path) -> None:
    sql = 'select sum(range) as "a ""sum""", count_if(range > 1) as n, 1.5 as d, 7::uhugeint as u from range(4)'
    assert text(sql, "json") == '{"a \\"sum\\"":6,"n":2,"d":1.5,"u":7}\n'
    assert text(sql, "csv") == '"a ""sum""",n,d,u\n6,2,1.5,7\n'
    write_result(asked(sql), "parquet", str(tmp_path / "out.parquet"), print)
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert [str(dtype) for dtype in found.dtypes] == ["Int64", "Int64", "Decimal(precision=2, scale=1)", "Int64"]
    with pytest.raises(InputError, match="out of range for the destination type INT64"):
        text("select 170141183460469231731687303715884105727 as n", "csv")


def test_numbers_within_lists_and_structs_are_numbers_in_json(text: Callable[[str, Any], str]) -> None:
    sql = """select [10::hugeint] a, {'x "y"': 1.5::decimal(4, 1), 'n': [3::uhugeint, null]} b, map {'k': 7::hugeint} c,
        [1.25::decimal(5, 2)]::decimal(5, 2)[1] d, [{'s': '10'}] e"""
    found = json.loads(text(sql, "json"))
    assert found == {
        "a": [10],
        "b": {'x "y"': 1.5, "n": [3, None]},
        "c": {"k": 7},
        "d": [1.25],
        "e": [{"s": "10"}],
    }


@pytest.mark.parametrize("value", ["['a'::blob]", "{'x': ['a'::blob]}", "map {'k': 'a'::blob}"])
def test_bytes_within_a_column_are_refused_by_its_name(value: str, text: Callable[[str, Any], str]) -> None:
    for form in ("json", "csv"):
        with pytest.raises(InputError, match=f"{form} holds no bytes: deep"):
            text(f"select 1 as a, {value} as deep", form)


@pytest.mark.parametrize(
    "value",
    ["date '290000-01-01'", "timestamp '290000-01-01'", "timestamp_s '290000-01-01'", "timestamptz '290000-01-01'"],
)
def test_a_year_that_is_too_late_is_refused_by_its_column_and_nothing_else_is_said(
    value: str, text: Callable[[str, Any], str], capfd: pytest.CaptureFixture[str]
) -> None:
    for sql in (value, f"[{value}]", f"{{'x': [{value}]}}", f"map {{'k': {value}}}", f"[{value}]::{'DATE'}[1]"):
        with pytest.raises(InputError) as refused:
            text(f"select 1 as a, {sql} as late", "json")
        assert refused.value.message == "the result cannot be written: late has a year beyond 260,000"
    assert "".join(capfd.readouterr()) == ""


def test_what_is_no_number_is_null_in_json_and_named_in_csv(text: Callable[[str, Any], str]) -> None:
    sql = "select 'nan'::double as a, 'inf'::double as b, date '9999-12-31' as c, null::date as d"
    assert text(sql, "json") == '{"a":null,"b":null,"c":"9999-12-31","d":null}\n'
    assert text(sql, "csv") == "a,b,c,d\nNaN,inf,9999-12-31,\n"


def test_what_fails_in_a_later_block_leaves_no_file_and_the_old_one_as_it_was(asked: Ask, tmp_path: Path) -> None:
    sql = f"select case when i < {5 * BLOCK_ROWS} then i else cast('x' || i as int) end as n from range(10000000) t(i)"
    for form in FORMS:
        (tmp_path / "out").write_text("old")
        with pytest.raises(InputError, match="Conversion Error: Could not convert string 'x"):
            write_result(asked(sql), form, str(tmp_path / "out"), print)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "old")]


def test_memory_that_runs_out_is_the_machines_fault_and_leaves_no_file(tmp_path: Path) -> None:
    connection = duckdb.connect(config={"memory_limit": "50MB", "temp_directory": str(tmp_path / "spill")})
    sql = "select list(md5(i::varchar)) as l from range(100000000) t(i)"
    for form in FORMS:
        with pytest.raises(MachineError, match="the query runs out of memory: Out of Memory Error") as failed:
            write_result(connection.sql(sql), form, str(tmp_path / "out"), print)
        assert failed.value.exit_code == 3
    with pytest.raises(MachineError):
        first_rows(connection.sql(sql), 3)
    assert not (tmp_path / "out").exists()


def test_the_first_rows_are_there_without_the_rest() -> None:
    relation = duckdb.connect().sql("select i, md5(i::varchar) as m from range(1000000000000) t(i)")
    found = first_rows(relation, 3)
    assert ([row[0] for row in found.rows], found.columns, found.more) == ([0, 1, 2], ["i", "m"], True)
    assert first_rows(duckdb.connect().sql("from range(3)"), 3).more is False


def test_a_name_says_the_form_and_an_option_overrides_it(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    named = {"a.csv": "csv", "a.jsonl": "json", "a.json": "json", "a.ndjson": "json", "A.PARQUET": "parquet"}
    assert {name: result_form(None, str(tmp_path / name), dataset) for name in named} == named
    assert result_form("csv", str(tmp_path / "a.txt"), dataset) == "csv"
    assert (result_form(None, None, dataset), result_form("json", None, dataset)) == ("table", "json")


def test_the_command_writes_what_the_name_says(prefkit: Prefkit, built: str, tmp_path: Path) -> None:
    ended = prefkit("query", built, "select prompt from pairs order by 1", "--out", "out.parquet")
    assert (ended.code, ended.out) == (0, "3 rows in out.parquet\n")
    assert pl.read_parquet(tmp_path / "out.parquet")["prompt"].to_list() == ["p0", "p1", "p2"]


def test_sql_comes_from_a_file_or_from_stdin(
    prefkit: Prefkit, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ask.sql").write_bytes(b"\xef\xbb\xbf-- how many\r\nselect count(*) as n\r\nfrom pairs;\r\n")
    assert prefkit("query", built, "@ask.sql", "--format", "csv").out == "n\n3\n"
    command = [sys.executable, "-m", "prefkit", "query", built, "-", "--format", "csv"]
    piped = subprocess.run(
        command,
        input=(tmp_path / "ask.sql").read_bytes(),
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert (piped.stdout, piped.stderr) == (b"n\n3\n", b"")
    (tmp_path / "latin.sql").write_bytes(b"select 'caf\xe9'")
    ended = prefkit("query", built, "@latin.sql")
    assert (ended.code, "error: latin.sql: cannot be read as SQL: 'utf-8' codec" in ended.err) == (2, True)


@pytest.fixture
def built(write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Any]) -> str:
    from prefkit.build import build_dataset

    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    return build_dataset(pipeline_of(source, kind="text")).dataset


# Ctrl-C


ENDLESS = {
    "that counts": "select count(*) as n from range(1000000000000) t(i) where i % 7 = 3",
    "that finds nothing": "select i from range(1000000000000) t(i) where hash(i) = 3",
    "that streams": "select md5(i::varchar) as m from range(1000000000000) t(i)",
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("form", ["table", "csv", "parquet"])
def test_ctrl_c_stops_a_query_at_once_with_130_and_leaves_nothing(
    form: str, name: str, built: str, tmp_path: Path
) -> None:
    if (form, name) == ("table", "that streams"):
        pytest.skip("it ends by itself: a hundred rows are enough")
    out = ["--out", "out.parquet"] if form == "parquet" else ["--format", form]
    asked = ["prefkit", "query", built, ENDLESS[name], *out]
    # a shell may start its jobs deaf to Ctrl-C, and so the tests with what they start
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from prefkit.cli import main; "
    )
    command = [sys.executable, "-c", code + f"sys.argv = {asked!r}; main()"]
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with (tmp_path / "stdout").open("wb") as out_file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=out_file,
            stderr=subprocess.PIPE,
            env=settings,
        )
        deadline = time.monotonic() + 60
        while not any((tmp_path / "scratch").iterdir()) and time.monotonic() < deadline:  # it has connected
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, b"Traceback" in err) == (130, False), err
    assert err.startswith(b"error: interrupted; what is finished is on disk\n  next: prefkit query ")
    assert {path.name for path in tmp_path.iterdir()} - {"stdout"} == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_interruption_that_comes_before_duckdb_has_begun_is_told_until_it_is_heard() -> None:
    """The thread that computes is slow to begin; whoever waits for it is interrupted first."""
    connection, told = duckdb.connect(), []

    class Slow:
        columns: tuple[str, ...] = ()
        types: tuple[str, ...] = ()

        def limit(self, _number: int) -> "Slow":
            return self

        def fetchall(self) -> Any:
            time.sleep(0.4)
            return connection.sql("select count(*) from range(1000000000000) t(i) where i % 7 = 3").fetchall()

    def interrupt() -> None:
        told.append(time.monotonic())
        connection.interrupt()

    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        first_rows(Slow(), 3, interrupt)  # type: ignore[arg-type]
    assert len(told) > 3


# memory


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "csv", "json"])
def test_five_million_rows_are_written_in_flat_memory(form: str, built: str, tmp_path: Path) -> None:
    """1.5 GB of rows; all at once they took 1,879 MB (parquet) to 4,810 MB (json)."""
    code = f"""
from pathlib import Path
from prefkit.query import query_dataset
from prefkit.results import write_result
sql = '''select range as i, md5(range::varchar) || md5((range + 1)::varchar) as id, repeat('word ', 40) as t,
    [range, range + 1] as l from range(5000000)'''
print(write_result(query_dataset({built!r}, sql), {form!r}, {str(tmp_path / form)!r}, print))
print([int(line.split()[1]) // 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM")][0])
"""
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings)
    rows, megabytes = map(int, ended.stdout.split())
    assert rows == 5_000_000
    assert megabytes < 500
