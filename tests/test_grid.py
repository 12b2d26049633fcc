"""A query's rows on a terminal: ids whole, long texts cut and said to be, a cell a line where a table has no room."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Prefkit
from rich.console import Console

from prefkit.grid import cell_text, column_widths, print_rows
from prefkit.results import Rows

ID = "0123456789abcdef" * 4
CUT = "long texts end in ...; --format csv or json gives them whole"


def shown(rows: list[tuple[Any, ...]], names: list[str], width: int, *, more: bool = False) -> list[str]:
    """The lines that a terminal of this width is shown."""
    console = Console(width=width, force_terminal=False, markup=False, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        print_rows(Rows(names, ["varchar"] * len(names), rows, more), console)
    return captured.get().splitlines()


def test_a_table_that_fits_is_a_table_and_nothing_is_cut() -> None:
    lines = shown([(ID, "train", 0.123456789), (ID, None, 2)], ["pair_id", "split", "margin"], 100)
    assert lines[1].split("┃")[1:-1] == [f" pair_id{' ' * 57} ", " split ", " margin   "]
    assert [line.split("│")[1:-1] for line in lines[3:5]] == [
        [f" {ID} ", " train ", " 0.123457 "],
        [f" {ID} ", "       ", " 2        "],
    ]
    assert len(lines) == 6


def test_no_rows_are_told_with_the_columns_there_are_however_many() -> None:
    assert shown([], ["pair_id", "split"], 100) == ["0 rows: pair_id, split"]
    assert shown([], [f"column_{n}" for n in range(9)], 40) == ["0 rows: " + ", ".join(f"column_{n}" for n in range(9))]


def test_numbers_stand_to_the_right() -> None:
    console = Console(width=40, markup=False)
    with console.capture() as captured:
        print_rows(Rows(["n", "t"], ["bigint", "varchar"], [(7, "x"), (1000, "y")], more=False), console)
    assert [line.split("│")[1] for line in captured.get().splitlines()[3:5]] == ["    7 ", " 1000 "]


def test_a_long_text_is_cut_beside_an_id_that_is_not() -> None:
    lines = shown([(ID, "word " * 50)], ["pair_id", "prompt"], 100)
    cells = [cell.strip() for cell in lines[3].split("│")[1:-1]]
    assert cells == [ID, ("word " * 50)[:26] + "..."]  # 100 columns: 64, 29 and seven for lines and spaces
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1] == CUT


def test_where_a_table_would_cut_ids_each_cell_has_a_line() -> None:
    lines = shown([(ID, ID, "a\nb", "w" * 200), (ID, None, "", "x")], ["pair_id", "prompt_id", "t", "long"], 80)
    assert lines == [
        "row 1",
        f"  pair_id    {ID}",
        f"  prompt_id  {ID}",
        "  t          a b",
        f"  long       {'w' * 64}...",
        "row 2",
        f"  pair_id    {ID}",
        "  prompt_id",
        "  t",
        "  long       x",
        CUT,
    ]


def test_columns_share_what_room_there_is() -> None:
    cells = [["x" * 8, "y" * 200], ["x", "z"]]
    # 40 columns: three a column and one more leave 33; the id is whole and the text has the rest
    assert column_widths(["id", "text"], cells, 40) == [8, 25]
    assert column_widths(["id", "text"], cells, 300) == [8, 200]
    assert column_widths(["id", "text"], cells, 38) is None  # a text of less than 24 columns says nothing
    # two texts: the shorter one first, then the longer one the rest
    assert column_widths(["a", "b"], [["x" * 70, "y" * 400]], 157) == [70, 80]


def test_what_is_wide_on_a_screen_is_measured_as_wide() -> None:
    lines = shown([("雪" * 60, 1)], ["t", "n"], 60)
    assert lines[3].split("│")[1].strip() == "雪" * 24 + "..."  # 52 columns, two a character
    assert CUT in lines


def test_rows_of_several_lines_keep_them_in_a_table() -> None:
    lines = shown([("one\ntwo", 3)], ["plan", "n"], 40)
    assert [line.split("│")[1].strip() for line in lines[3:5]] == ["one", "two"]


def test_cells_are_data_and_messages_are_json() -> None:
    assert cell_text([{"role": "user", "content": 'a"b'}]) == '[{"role": "user", "content": "a\\"b"}]'
    assert cell_text({"d": __import__("datetime").date(2020, 1, 31)}) == '{"d": "2020-01-31"}'
    assert (cell_text(None), cell_text(1 / 3), cell_text(7), cell_text("\x1b[2J")) == ("", "0.333333", "7", "\ufffd[2J")
    assert "[red]x[/red]" in shown([("[red]x[/red]",)], ["[bold]name"], 40)[3]
    assert "[bold]name" in shown([("x",)], ["[bold]name"], 40)[1]


def test_where_it_stops_is_said() -> None:
    lines = shown([(1,), (2,)], ["n"], 40, more=True)
    assert lines[-1] == "the first 2 rows; --format csv, json or parquet gives all"


@pytest.fixture
def dataset(write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Any]) -> str:
    from prefkit.build import build_dataset

    rows = [{"prompt": f"p{i} " + "word " * 40, "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    return build_dataset(pipeline_of(source, kind="text", split={"test_share": 0})).dataset


def test_pair_ids_can_be_copied_from_every_terminal(
    dataset: str, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prefkit("query", dataset, "select pair_id from pairs", "--format", "csv").out.split()[1:]
    assert len(ids) == 3
    for width in (40, 80, 120, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        for sql in ("from pairs", "select prompt, pair_id, source, split from pairs", "select pair_id from pairs"):
            out = prefkit("query", dataset, sql).out
            assert all(one in out for one in ids), (width, sql)


def test_without_sql_the_views_are_listed_with_rows_and_columns(dataset: str, prefkit: Prefkit) -> None:
    ended = prefkit("query", dataset)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "pairs                       3 rows  the pairs that are fit to train on"
    assert lines[1].startswith("    pair_id, prompt_id, prompt, chosen, rejected, tools, split, method, source, ")
    assert '"rewards/margins"' in ended.out
    assert lines[-1] == 'prefkit query DATASET "from pairs limit 5"; "describe pairs" lists columns with their types'
    listed = prefkit("query", dataset, "--format", "csv").out.splitlines()
    assert listed[0] == "view,num_rows,about,columns"
    assert [line.split(",")[:2] for line in listed[1:4]] == [["pairs", "3"], ["dropped", "0"], ["rejects", "0"]]
    assert len(listed) == 18


# progress


def on_a_terminal(*arguments: str) -> str:
    """What a command writes to stderr where that is a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "prefkit", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    found = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        found += piece
    os.close(ours)
    assert process.wait() == 0, found
    return found.decode()


def test_a_query_of_more_than_a_second_shows_how_far_it_is_and_a_quick_one_nothing(dataset: str) -> None:
    slow = "select count(*) as n from range(25) t(i), lateral (select sleep_ms(100 + i * 0)) s(x)"
    written = on_a_terminal("query", dataset, slow, "--format", "csv")
    assert "querying" in written
    assert "left" in written
    assert on_a_terminal("query", dataset, "select count(*) from pairs", "--format", "csv") == ""


def test_progress_is_for_terminals_only(dataset: str) -> None:
    command = [sys.executable, "-m", "prefkit", "query", dataset, "select sleep_ms(1500) as n", "--format", "json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stderr == ""
