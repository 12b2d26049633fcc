"""What may be asked of a dataset in SQL: one SELECT over its views. What is not allowed is refused by name, unrun.

Comes in: the text of a statement. Goes out: the views it names. It is read as DuckDB itself parses it, on a connection
that can reach no file. This is the door with the names on it; behind it DuckDB's own lock (query.connect_dataset) opens
no file but the views' own, whatever a statement says.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import duckdb

from prefkit.errors import InputError, first_line
from prefkit.views import VIEW_NAMES

SQL = "SQL"  # where it is wrong
VIEWS_THERE = "views: " + ", ".join(VIEW_NAMES)
ONE_SELECT = "one SELECT (or FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN) over the " + VIEWS_THERE
EXTERNAL = "--external, in Python external=True, lets a query read other files"
OUT = "--out FILE.parquet writes the result of a SELECT"

CHANGES = "a query changes nothing"
FILES = "a query reads no file but the dataset's, and writes none"
WRITES = "a query writes no file and opens no database"
LOADS = "a query loads no extension"
SETS = "a query changes no setting"
SELECTS = "a query is one SELECT"
HIDES = "a statement within a text cannot be checked"
NO_ROWS = "it does not make rows of its arguments alone"
MACHINE = "it tells of this machine or session, not of the dataset"

STATEMENTS: Mapping[str, str] = {
    **dict.fromkeys(("copy", "export", "import", "attach", "detach"), WRITES),
    **dict.fromkeys(("install", "load"), LOADS),
    **dict.fromkeys(("create", "insert", "update", "delete", "merge", "drop", "alter", "truncate", "comment"), CHANGES),
    **dict.fromkeys(("vacuum", "analyze", "checkpoint"), CHANGES),
    **dict.fromkeys(("set", "reset", "pragma", "use"), SETS),
}
# functions that make rows of their arguments alone, or tell of the views
ROW_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"}
ROW_FUNCTIONS |= {"duckdb_views", "duckdb_columns", "duckdb_tables", "duckdb_functions", "duckdb_types"}
ROW_FUNCTIONS |= {"pragma_table_info", "pragma_version"}
HIDING = {"query", "query_table", "json_execute_serialized_sql"}  # they would hide which views are read
TELLING = {
    "current_setting",
    "getenv",
    "write_log",
    "json_serialize_plan",
}  # a plan has settings in place of their names
CATALOGUE = {"duckdb_views", "duckdb_columns", "duckdb_tables", "duckdb_types"}  # as tables, without brackets
INTERNAL = ("duckdb_", "pg_", "pragma_", "sqlite_")
QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
READS = re.compile("^(read_|parquet_|sniff_|glob$)|_scan$")  # names of functions that read files
SHOWN = {"tables", "__show_tables_expanded"}
SILENT = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"  # white space and comments
NOT_SAID = re.compile(SILENT, re.DOTALL)
EXPLAINED_IN_BRACKETS = re.compile(rf"explain\b{SILENT}(?:analyze\b{SILENT})?", re.IGNORECASE | re.DOTALL)
EXPLAINED = re.compile(
    rf"{EXPLAINED_IN_BRACKETS.pattern}(?:\({SILENT}[a-z_]+(?:{SILENT}[\w']+)?(?:{SILENT},[^()]*)?{SILENT}\){SILENT})?",
    re.IGNORECASE | re.DOTALL,
)


class Asked(NamedTuple):
    """A statement that may be run: its text, and the views it names; `catalogue`: it asks for other tables too."""

    text: str
    views: frozenset[str]
    catalogue: bool


def check_statement(sql: str, *, external: bool = False) -> Asked:
    """One SELECT that names what a query may read.

    Args:
        sql: as it was typed.
        external: other files, URLs and settings may be read too; it is one SELECT all the same.

    Raises:
        InputError: it is no SQL, several statements or none, or something that is not allowed, by name.
    """
    _check_text(sql)
    parser = _parser()
    nodes = list(_nodes(_tree(parser, _select_of(parser, sql))))
    for node in nodes:
        _check_node(node, external=external)
    named_here = {str(entry["key"]).lower() for node in nodes for entry in _map(node.get("cte_map"))}
    tables = {str(node["table_name"]).lower() for node in nodes if node.get("type") == "BASE_TABLE"}
    for name in sorted(tables) if not external else []:
        _check_table(name, named_here)
    shows = any(node.get("type") == "SHOW_REF" and node.get("query") is None for node in nodes)
    functions = {_function(node) for node in nodes if node.get("type") == "TABLE_FUNCTION"}
    others = tables - named_here - set(VIEW_NAMES)
    catalogue = shows or bool(others) or bool(functions & {*CATALOGUE, "pragma_table_info"})
    return Asked(sql, frozenset(tables & set(VIEW_NAMES)), catalogue)


def _check_text(sql: object) -> None:
    """What is no text, or none that can be written down, is no SQL.

    Raises:
        InputError: it is so.
    """
    if not isinstance(sql, str):
        raise InputError(f"SQL cannot be a value of type {type(sql).__name__}", where=SQL, expected=ONE_SELECT)
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        what = f"the text has half a character at {error.start}: it is no Unicode"
        raise InputError(what, where=SQL, expected=ONE_SELECT) from None


def not_allowed(what: str, reason: str, *, expected: str = ONE_SELECT, hint: str = "") -> InputError:
    """The error that names what may not be asked, why, and what may."""
    return InputError(f"{what} is not allowed: {reason}", where=SQL, expected=expected, hint=hint)


def _parser() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _select_of(parser: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The one SELECT in a text, or the one that it wants explained."""
    try:
        statements = parser.extract_statements(sql)
    except duckdb.Error as error:
        raise InputError(first_line(error), where=SQL, expected=ONE_SELECT) from None
    if not statements:
        raise InputError("there is no statement", where=SQL, expected=ONE_SELECT)
    if len(statements) > 1:
        raise not_allowed("more than one statement", SELECTS, hint="ask one by one")
    kind, text = _kind(statements[0]), statements[0].query
    if kind == "EXPLAIN":
        return _explained(parser, text)
    if kind == "MULTI":  # DuckDB makes several of a PIVOT that has to look up its values
        hint = "name the values: PIVOT pairs ON split IN ('train', 'test') USING count(*)"
        raise not_allowed("PIVOT without its values", SELECTS, hint=hint)
    if kind != "SELECT":
        word = _first_word(text)
        raise _refused_statement(word if kind == "" or word.lower() in STATEMENTS else kind.replace("_", " "), kind)
    return text


def _explained(parser: duckdb.DuckDBPyConnection, text: str) -> str:
    """The SELECT that an EXPLAIN is about: what is left when its own words are taken away."""
    said = text[_silence(text) :]
    for own in (EXPLAINED, EXPLAINED_IN_BRACKETS):
        inner = own.sub("", said, count=1)
        with contextlib.suppress(duckdb.Error):
            if inner != said and [_kind(one) for one in parser.extract_statements(inner)] == ["SELECT"]:
                return inner
    word = _first_word(EXPLAINED.sub("", said, count=1))
    raise _refused_statement(f"EXPLAIN {word}", word)


def _kind(statement: duckdb.Statement) -> str:
    """SELECT, COPY...; empty for a kind that the Python client has no name for."""
    try:
        return str(statement.type.name)
    except ValueError:
        return ""


def _refused_statement(name: str, kind: str) -> InputError:
    words = [name.partition(" ")[0].lower(), *kind.lower().split("_")]
    reason = next((STATEMENTS[word] for word in words if word in STATEMENTS), SELECTS)
    return not_allowed(name.upper(), reason, hint=OUT if {"copy", "export"} & set(words) else "")


def _silence(text: str) -> int:
    """How long a text says nothing: white space and comments."""
    found = NOT_SAID.match(text)
    return found.end() if found else 0


def _first_word(text: str) -> str:
    found = re.match(r"[A-Za-z_]+", text[_silence(text) :])
    return found[0] if found else "this"


def _tree(parser: duckdb.DuckDBPyConnection, select: str) -> Any:
    """The statement as DuckDB parses it; names in it stand by themselves, texts are constants."""
    try:
        (told,) = parser.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchone() or ("{}",)
        tree = json.loads(told)
    except RecursionError:
        raise not_allowed("so deep a statement", "it has too many levels to be checked") from None
    if tree.get("error"):  # such as an expression of more than a thousand levels
        raise InputError(str(tree.get("error_message")), where=SQL, expected=ONE_SELECT)
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of the tree."""
    left = [tree]
    while left:
        at = left.pop()
        if isinstance(at, dict):
            yield at
            left.extend(at.values())
        elif isinstance(at, list):
            left.extend(at)


def _map(value: Any) -> list[dict[str, Any]]:
    return value.get("map", []) if isinstance(value, dict) else []


def _function(node: Mapping[str, Any]) -> str:
    return str(node["function"].get("function_name", "")).lower()


def _check_node(node: Mapping[str, Any], *, external: bool) -> None:
    """One object of the tree: what changes something, hides something, or reads what is not the dataset's."""
    kind = str(node.get("type", ""))
    if "cte_map" in node and kind not in QUERY_NODES:  # WITH x AS (INSERT ...)
        raise not_allowed(kind.partition("_")[0], CHANGES)
    if kind == "TABLE_FUNCTION" and _function(node) in HIDING:
        raise not_allowed(f"{_function(node)}()", HIDES, hint="write it out")
    if external:
        return
    if kind == "TABLE_FUNCTION" and _function(node) not in ROW_FUNCTIONS:
        raise _refused_function(_function(node))
    if node.get("class") == "FUNCTION" and str(node.get("function_name")).lower() in TELLING:
        raise not_allowed(f"{node['function_name']}()", MACHINE)
    if kind == "SHOW_REF" and node.get("query") is None and node.get("show_type") != "SHOW_FROM":
        name = str(node.get("table_name", "")).strip('"')
        if name.lower() not in (*SHOWN, *VIEW_NAMES):
            raise not_allowed(f"SHOW {name}", MACHINE)


def _refused_function(name: str) -> InputError:
    reason = MACHINE if name.startswith(INTERNAL) or "secret" in name else FILES if READS.search(name) else NO_ROWS
    expected = f"{VIEWS_THERE}; functions: {', '.join(sorted(ROW_FUNCTIONS))}"
    return not_allowed(f"{name}()", reason, expected=expected, hint=EXTERNAL if reason == FILES else "")


def _check_table(name: str, named_here: Collection[str]) -> None:
    """A table's name: none of DuckDB's own that tell of the machine, and no file or URL, which DuckDB would read."""
    if name.startswith(INTERNAL) and name not in CATALOGUE:
        raise not_allowed(name, MACHINE, expected=VIEWS_THERE)
    if re.search(r"[/\\.:*?\[]", name) and name not in named_here:
        raise not_allowed(repr(name), FILES, expected=VIEWS_THERE, hint=EXTERNAL)
