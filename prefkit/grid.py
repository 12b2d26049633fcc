"""How a query's rows look on a terminal: a table where it fits, else a line a cell; ids whole, long texts cut.

Comes in: rows as DuckDB gives them. Goes out: plain lines; cells are data, never markup. What is cut says so.
"""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.results import Rows
from prefkit.text import printable

MAX_ROWS = 100
WHOLE = 64  # columns: a cell of so many is never cut, as an id is that long
LEAST = 24  # columns that are left of a longer one
BESIDE = 3  # columns that a table takes a column, and one more
NUMBERS = {"tinyint", "smallint", "integer", "bigint", "hugeint", "utinyint", "usmallint", "uinteger", "ubigint"}
NUMBERS |= {"uhugeint", "float", "double", "decimal"}


def print_rows(found: Rows, console: Console) -> None:
    """The first rows of a result: as a table where all its cells find room, else one cell a line."""
    if not found.rows:
        return console.print(f"0 rows: {', '.join(found.columns)}")
    cells = [[cell_text(value) for value in row] for row in found.rows]
    widths = column_widths(found.columns, cells, console.width)
    lines = widths is None
    cut = _print_lines(found.columns, cells, console) if lines else _print_table(found, cells, widths or [], console)
    if found.more:
        console.print(f"the first {len(found.rows)} rows; --format csv, json or parquet gives all")
    if cut:
        console.print("long texts end in ...; --format csv or json gives them whole")
    return None


def cell_text(value: object) -> str:
    """A value as a person reads it: six digits of a float, messages as JSON, nothing for null."""
    if isinstance(value, float):
        return f"{value:.6g}"  # csv, json and parquet keep every digit
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else printable(str(value))


def column_widths(names: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Columns that each column of a table gets, None where a table of this width would have to cut ids or names.

    Example: with 40 columns for an id of 8 and a text of 200, the id gets 8 and the text 25 of the 33 that are left
    beside it and the lines between.
    """
    whole = [
        max(_width(text) for text in (name, *column))
        for name, column in zip(names, _columns(names, cells), strict=True)
    ]
    room = width - BESIDE * len(names) - 1
    least = [min(size, LEAST) if size > WHOLE else size for size in whole]
    if sum(least) > room:
        return None
    left = room - sum(least)
    given = list(least)
    for place in sorted(range(len(names)), key=lambda place: whole[place]):  # the shorter ones first: they need less
        wanting = sum(one < most for one, most in zip(given, whole, strict=True))
        more = min(whole[place] - given[place], left // max(1, wanting))
        given[place], left = given[place] + more, left - more
    return given


def _columns(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[row[place] for row in cells] for place in range(len(names))]


def _width(text: str) -> int:
    return max((cell_len(line) for line in text.split("\n")), default=0)


def _print_table(found: Rows, cells: Sequence[Sequence[str]], widths: Sequence[int], console: Console) -> bool:
    table = Table()
    for name, kind, width in zip(found.columns, found.types, widths, strict=True):
        justify: Any = "right" if kind in NUMBERS else "left"
        table.add_column(Text(name), width=width, no_wrap=True, justify=justify)
    cut = False
    for row in cells:
        shown = [_cut(text, width) for text, width in zip(row, widths, strict=True)]
        cut = cut or list(row) != shown
        table.add_row(*(Text(text) for text in shown))
    console.print(table, soft_wrap=False)
    return cut


def _print_lines(names: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> bool:
    """A cell a line, a row a paragraph."""
    label = max(map(cell_len, names))
    width, cut = max(WHOLE, console.width - label - 4), False
    for number, row in enumerate(cells, 1):
        console.print(f"row {number}")
        for name, text in zip(names, row, strict=True):
            shown = _cut(text.replace("\n", " "), width)
            cut = cut or shown != text
            console.print(f"  {name}{' ' * (label - cell_len(name))}  {shown}".rstrip())
    return cut


def _cut(text: str, width: int) -> str:
    """Each line of a text at most so wide; what is cut ends in three dots."""
    return "\n".join(_cut_line(line, width) for line in text.split("\n"))


def _cut_line(line: str, width: int) -> str:
    if cell_len(line) <= width:
        return line
    kept = line[: width - 3]
    while cell_len(kept) > width - 3:
        kept = kept[:-1]
    return kept + "..."


def print_views(found: Rows, console: Console) -> None:
    """What can be asked: each view with its rows, what it is about, and its columns."""
    label = max(len(str(row[0])) for row in found.rows)
    for view, num_rows, about, columns in found.rows:
        console.print(f"{view:<{label}}  {num_rows:>9} rows  {about}")
        names = ", ".join(f'"{name}"' if "/" in name else name for name in columns)
        console.print(textwrap.indent(textwrap.fill(names, max(40, console.width - 4)), "    "))
    console.print('prefkit query DATASET "from pairs limit 5"; "describe pairs" lists columns with their types')
