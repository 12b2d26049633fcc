"""Hostile SQL: each statement is refused by name before it runs, and where nobody looks DuckDB itself does nothing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from command import Prefkit

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.errors import InputError
from prefkit.guard import check_statement
from prefkit.query import connect_dataset, query_dataset
from prefkit.views import VIEW_NAMES

SECRET = "plumage"
VIEWS = "views: " + ", ".join(VIEW_NAMES)
ONE = f"one SELECT (or FROM, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN) over the {VIEWS}"
FUNCTIONS = (
    "functions: duckdb_columns, duckdb_functions, duckdb_tables, duckdb_types, duckdb_views, generate_series, "
    "json_each, json_tree, pragma_table_info, pragma_version, range, repeat, repeat_row, unnest"
)
OUT = "--out FILE.parquet writes the result of a SELECT"
EXTERNAL = "--external, in Python external=True, lets a query read other files"

CHANGES = "a query changes nothing"
FILES = "a query reads no file but the dataset's, and writes none"
WRITES = "a query writes no file and opens no database"
LOADS = "a query loads no extension"
SETS = "a query changes no setting"
SELECTS = "a query is one SELECT"
HIDES = "a statement within a text cannot be checked"
MACHINE = "it tells of this machine or session, not of the dataset"
NO_ROWS = "it does not make rows of its arguments alone"

# {d}: the dataset, {o}: the folder beside it that holds secret.csv, {u}: `o` as it is from the working directory
# statements: what is named, why, and the next step
STATEMENTS: dict[str, tuple[str, str, str]] = {
    "copy pairs to '{o}/stolen.csv'": ("COPY", WRITES, OUT),
    "copy (select 1) to '{d}/new.parquet' (format parquet)": ("COPY", WRITES, OUT),
    "copy (select 1 as a) to '{d}/pairs/{part}' (format parquet, use_tmp_file false)": ("COPY", WRITES, OUT),
    "COPY pairs FROM '{o}/secret.csv'": ("COPY", WRITES, OUT),
    "explain analyze copy pairs to '{o}/stolen.csv'": ("EXPLAIN COPY", WRITES, OUT),
    "explain (format json) copy pairs to '{o}/stolen.csv'": ("EXPLAIN COPY", WRITES, OUT),
    "explain /* select 1 */ analyze -- it\n copy pairs to '{o}/stolen.csv'": ("EXPLAIN COPY", WRITES, OUT),
    "attach '{o}/new.db'": ("ATTACH", WRITES, ""),
    "attach '{o}/new.db' as other (read_only)": ("ATTACH", WRITES, ""),
    "detach memory": ("DETACH", WRITES, ""),
    "export database '{o}/stolen'": ("EXPORT", WRITES, OUT),
    "import database '{o}/stolen'": ("IMPORT", WRITES, ""),
    "install httpfs": ("INSTALL", LOADS, ""),
    "force install httpfs from '{o}'": ("LOAD", LOADS, ""),
    "load '{o}/evil.duckdb_extension'": ("LOAD", LOADS, ""),
    "update extensions": ("UPDATE", CHANGES, ""),
    "pragma database_list": ("PRAGMA", SETS, ""),
    "pragma enable_profiling='json'": ("PRAGMA", SETS, ""),
    "set threads = 1": ("SET", SETS, ""),
    "set enable_external_access = true": ("SET", SETS, ""),
    "set variable a = 1": ("SET", SETS, ""),
    "reset memory_limit": ("RESET", SETS, ""),
    "use memory": ("USE", SETS, ""),
    "call enable_logging(storage = 'file')": ("CALL", SELECTS, ""),
    "checkpoint": ("CHECKPOINT", CHANGES, ""),
    "create table t (i int)": ("CREATE", CHANGES, ""),
    "create temp table t as select 1": ("CREATE", CHANGES, ""),
    "create macro f() as 1": ("CREATE", CHANGES, ""),
    "create or replace view pairs as select 1": ("CREATE", CHANGES, ""),
    "create persistent secret s (type http, bearer_token 'x')": ("CREATE", CHANGES, ""),
    "insert into pairs values (1)": ("INSERT", CHANGES, ""),
    "update pairs set margin = 1": ("UPDATE", CHANGES, ""),
    "delete from pairs": ("DELETE", CHANGES, ""),
    "truncate pairs": ("TRUNCATE", CHANGES, ""),
    "merge into pairs using dropped using (pair_id) when matched then delete": ("MERGE", CHANGES, ""),
    "drop view pairs": ("DROP", CHANGES, ""),
    "alter view pairs rename to p": ("ALTER", CHANGES, ""),
    "comment on view pairs is 'x'": ("COMMENT", CHANGES, ""),
    "vacuum": ("VACUUM", CHANGES, ""),
    "analyze": ("ANALYZE", CHANGES, ""),
    "prepare p as select 1": ("PREPARE", SELECTS, ""),
    "execute p": ("EXECUTE", SELECTS, ""),
    "deallocate p": ("DROP", CHANGES, ""),
    "begin": ("TRANSACTION", SELECTS, ""),
    "with a as (select 1) insert into pairs from a": ("INSERT", CHANGES, ""),
    "with a as (insert into pairs values (1) returning *) from a": ("INSERT", CHANGES, ""),
    "with a as (delete from pairs returning *) from a": ("DELETE", CHANGES, ""),
    "select * from (with a as (update pairs set margin = 1 returning *) from a)": ("UPDATE", CHANGES, ""),
    "/* select */ copy pairs to '{o}/stolen.csv' -- select 1": ("COPY", WRITES, OUT),
    "select 1; select 2": ("more than one statement", SELECTS, "ask one by one"),
    "select 1; copy pairs to '{o}/stolen.csv'": ("more than one statement", SELECTS, "ask one by one"),
    "select 1 -- ;\n; drop view pairs": ("more than one statement", SELECTS, "ask one by one"),
    "select 1 /* ; */; drop view pairs": ("more than one statement", SELECTS, "ask one by one"),
    "select ';' ; drop view pairs": ("more than one statement", SELECTS, "ask one by one"),
    "select $$;$$; drop view pairs": ("more than one statement", SELECTS, "ask one by one"),
    "select $a$ ' $a$; drop view pairs --'": ("more than one statement", SELECTS, "ask one by one"),
    "select E'\\''; drop view pairs --'": ("more than one statement", SELECTS, "ask one by one"),
    'select 1 as "a;b"; drop view pairs': ("more than one statement", SELECTS, "ask one by one"),
    "select 'a\u2019;\u00a0b' ;\u00a0drop view pairs": ("more than one statement", SELECTS, "ask one by one"),
    "pivot pairs on split": (
        "PIVOT without its values",
        SELECTS,
        "name the values: PIVOT pairs ON split IN ('train', 'test') USING count(*)",
    ),
}
# selects that read what is not the dataset's: what is named, why, what there is, and the next step
SELECTS_OF_OTHERS: dict[str, tuple[str, str, str, str]] = {
    **{
        sql: (f"{name}()", FILES, f"{VIEWS}; {FUNCTIONS}", EXTERNAL)
        for name, sql in {
            "read_csv": "select * from read_csv('{o}/secret.csv')",
            "read_csv_auto": "from read_csv_auto('{u}/secret.csv')",
            "read_text": "select content from read_text('{d}/../outside/secret.csv')",
            "read_blob": "select (select content from read_blob('{d}/link.csv'))",
            "read_json": "from pairs where prompt in (select secret from read_json('{o}/secret.csv'))",
            "read_ndjson": "with a as materialized (from read_ndjson('file://{o}/secret.csv')) from a",
            "read_parquet": "select 1 from pairs, lateral (from read_parquet('{d}/pairs/{part}'))",
            "parquet_metadata": "from parquet_metadata('{d}/pairs/{part}')",
            "parquet_schema": "from parquet_schema('https://127.0.0.1:9/x.parquet')",
            "parquet_scan": "from parquet_scan('{d}/pairs/{part}')",
            "sniff_csv": "from sniff_csv('{o}/secret.csv')",
            "glob": "from glob('{o}/*')",
            "read_duckdb": "from read_duckdb('{o}/secret.csv')",
            "pandas_scan": "select * from pandas_scan(140000000)",
            "seq_scan": "from seq_scan('pairs')",
        }.items()
    },
    **{
        sql: (f"{name}()", NO_ROWS, f"{VIEWS}; {FUNCTIONS}", "")
        for name, sql in {
            "enable_logging": "from enable_logging(storage = 'file', storage_config = {{'path': '{o}/log'}})",
            "enable_profiling": "from enable_profiling(save_location = '{o}/profile')",
            "force_checkpoint": "from force_checkpoint()",
            "create_external_resource": "from create_external_resource('x')",
        }.items()
    },
    **{
        sql: (f"{name}()", MACHINE, f"{VIEWS}; {FUNCTIONS}", "")
        for name, sql in {
            "duckdb_settings": "select value from duckdb_settings() where name like '%dir%'",
            "duckdb_secrets": "from duckdb_secrets()",
            "which_secret": "from which_secret('s3://x', 's3')",
            "duckdb_temporary_files": "from duckdb_temporary_files()",
        }.items()
    },
    **{
        sql: (f"{name}()", MACHINE, ONE, "")
        for name, sql in {
            "current_setting": "select current_setting('secret_directory')",
            "getenv": "select getenv('HOME')",
            "write_log": "select write_log('x') from pairs",
        }.items()
    },
    "select * from pg_settings": ("pg_settings", MACHINE, VIEWS, ""),
    "from pg_catalog.pg_settings": ("pg_settings", MACHINE, VIEWS, ""),
    "from (with pg_settings as (select 1) from pg_settings), pg_settings": ("pg_settings", MACHINE, VIEWS, ""),
    "from duckdb_databases": ("duckdb_databases", MACHINE, VIEWS, ""),
    "from sqlite_master": ("sqlite_master", MACHINE, VIEWS, ""),
    "show databases": ("SHOW databases", MACHINE, ONE, ""),
    "show secret_directory": ("SHOW secret_directory", MACHINE, ONE, ""),
    "from query('select 1')": ("query()", HIDES, ONE, "write it out"),
    "from query_table('pairs')": ("query_table()", HIDES, ONE, "write it out"),
    "from json_execute_serialized_sql(json_serialize_sql('select 1'))": (
        "json_execute_serialized_sql()",
        HIDES,
        ONE,
        "write it out",
    ),
    **{
        sql: (repr(name), FILES, VIEWS, EXTERNAL)
        for name, sql in {
            "{o}/secret.csv": "from '{o}/secret.csv'",
            "{u}/secret.csv": 'select * from "{u}/secret.csv"',
            "{d}/link.csv": "describe '{d}/link.csv'",
            "/etc/passwd": "select count(*) from '/etc/passwd'",
            "secret.csv": "summarize 'secret.csv'",
            "file:///etc/hostname": "from 'file:///etc/hostname'",
            "https://127.0.0.1:9/x.csv": "from pairs semi join 'https://127.0.0.1:9/x.csv' using (pair_id)",
            "s3://bucket/x.parquet": "explain analyze from 's3://bucket/x.parquet'",
        }.items()
    },
}
# names of tables are told in lower case
assert all(name == name.lower() for name, *_ in SELECTS_OF_OTHERS.values() if name.startswith("'"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset, with a link out of it, and beside it a folder with a secret; for the places in a statement."""
    folder = tmp_path_factory.mktemp("world")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{i}", "chosen": "good {i}", "rejected": "bad {i}"}}\n' for i in range(3)))
    source = {"path": str(rows), "format": "pairs"}
    build_dataset(Pipeline.model_validate({"dataset": str(folder / "dataset"), "kind": "text", "sources": [source]}))
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text(f"secret\n{SECRET}\n")
    (folder / "dataset" / "link.csv").symlink_to(outside / "secret.csv")
    (part,) = sorted((folder / "dataset" / "pairs").glob("part-*.parquet"))[:1]
    unlike = os.path.relpath(outside)
    return {"d": str(folder / "dataset"), "o": str(outside), "u": unlike, "part": part.name}


def tree(world: dict[str, str]) -> dict[str, bytes]:
    folder = Path(world["d"]).parent
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told(what: str, why: str, expected: str, hint: str, world: dict[str, str]) -> str:
    text = f"SQL: {what.format(**world)} is not allowed: {why}\n  expected: {expected}"
    return text + (f"\n  next: {hint}" if hint else "")


EVERY = {sql: (what, why, ONE, hint) for sql, (what, why, hint) in STATEMENTS.items()} | SELECTS_OF_OTHERS


@pytest.mark.parametrize("sql", EVERY)
def test_a_hostile_statement_is_refused_by_name_and_neither_reads_nor_writes(sql: str, world: dict[str, str]) -> None:
    before = tree(world)
    with pytest.raises(InputError) as refused:
        query_dataset(world["d"], sql.format(**world)).fetchall()
    assert str(refused.value) == told(*EVERY[sql], world)
    assert SECRET not in str(refused.value)
    assert tree(world) == before


OVER_A_PART = "copy (select 1 as a) to '{d}/pairs/{part}' (format parquet, use_tmp_file false)"


@pytest.mark.parametrize("sql", [sql for sql in EVERY if sql != OVER_A_PART])
def test_where_nobody_looks_duckdb_neither_reads_the_secret_nor_writes_a_file(sql: str, world: dict[str, str]) -> None:
    """But for OVER_A_PART: what DuckDB may read it may write, so that no statement but a SELECT may reach it."""
    before, connection = tree(world), connect_dataset(world["d"])
    try:
        rows = str(connection.execute(sql.format(**world)).fetchall())
    except (duckdb.Error, RuntimeError, ValueError) as error:
        rows = str(error)
    assert SECRET not in rows
    assert tree(world) == before
    assert not (Path.home() / ".duckdb" / "stored_secrets" / "s.duckdb_secret").exists()


ALLOWED = [
    "select 1",
    "from pairs",
    "table pairs",
    "values (1), (2)",
    "with a as (from pairs) select count(*) from a join a as b using (pair_id)",
    "with recursive r(i) as (select 1 union all select i + 1 from r where i < 5) from r",
    "from pairs select prompt union all by name from dropped select prompt",
    "select * from pairs p, lateral (select p.margin)",
    "select unnest(range(3)), list_transform([1, 2], lambda x: x + 1)",
    "from range(3) t(i), generate_series(1, 2) s(j)",
    'with "a.b" as (select 1) from "a.b"',
    "select $$ ; drop view pairs $$, ';', '--'; -- ; drop view pairs",
    "  -- first\n /* ; */ select 1 /* second */ ;;",
    "describe pairs",
    "show tables",
    "show pairs",
    "summarize pairs",
    "explain from pairs",
    "explain analyze select count(*) from pairs",
    "explain (format json) from pairs",
    "explain (from pairs)",
    "/* how */ explain -- it\n from pairs",
    "EXPLAIN /*a*/ ANALYZE SELECT 1",
    "explain -- it\n analyze /* so */ (/* b */ format /* c */ json /* d */) -- now\n from pairs",
    "explain/*a*/analyze/*b*/from pairs",
    "explain /*a*/ (from pairs)",
    "pivot pairs on split in ('train', 'test') using count(*)",
    "from main.pairs",
    "select column_name, comment from duckdb_columns()",
    "select view_name from duckdb_views",
    "select table_name from information_schema.tables",
    "from pragma_table_info('pairs')",
    "select split, count(*) filter (margin is null) over (partition by split order by pair_id) from pairs",
    "select * exclude (prompt) replace (1 as margin) from pairs using sample 2 rows",
]


@pytest.mark.parametrize("sql", ALLOWED)
def test_what_is_one_select_over_the_views_is_answered(sql: str, world: dict[str, str]) -> None:
    assert query_dataset(world["d"], sql).fetchall()


def test_a_plan_of_a_statement_which_holds_settings_is_not_told(world: dict[str, str]) -> None:
    sql = "select json_serialize_plan('select current_setting(''temp_directory'')', optimize := true)"
    for text in (sql, sql.replace("json_", "main.JSON_")):
        with pytest.raises(InputError) as refused:
            query_dataset(world["d"], text)
        assert "json_serialize_plan() is not allowed" in str(refused.value).lower()
        assert MACHINE in str(refused.value)


@pytest.mark.parametrize("sql", [None, 3, b"select 1", ["select 1"]])
def test_sql_that_is_no_text_is_refused(sql: Any, world: dict[str, str]) -> None:
    with pytest.raises(InputError) as refused:
        query_dataset(world["d"], sql)
    what = f"SQL cannot be a value of type {type(sql).__name__}"
    assert str(refused.value) == f"SQL: {what}\n  expected: {ONE}"


def test_sql_with_half_a_character_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        check_statement("select '\ud83d'")
    assert str(refused.value) == f"SQL: the text has half a character at 8: it is no Unicode\n  expected: {ONE}"


def test_no_statement_is_none() -> None:
    for sql in ("", "  ;; ", "-- select 1", "/* select 1 */"):
        with pytest.raises(InputError) as refused:
            check_statement(sql)
        assert str(refused.value) == f"SQL: there is no statement\n  expected: {ONE}"


def test_a_statement_that_is_too_deep_to_be_checked_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        check_statement("select * from " + "(select * from " * 900 + "(select 1)" + ")" * 900)
    why = "so deep a statement is not allowed: it has too many levels to be checked"
    assert str(refused.value) == f"SQL: {why}\n  expected: {ONE}"


def test_an_expression_that_duckdb_finds_too_deep_is_refused_in_its_words() -> None:
    with pytest.raises(InputError, match="Max expression depth limit of 1000 exceeded"):
        check_statement("select " + "+".join(["1"] * 3000))


def test_the_views_of_a_statement_are_those_it_names_wherever_it_names_them() -> None:
    sql = 'with a as (from Pairs) from a where pair_id in (from reference select pair_id) or exists (from "steps")'
    asked = check_statement(sql)
    assert asked.views == {"pairs", "reference", "steps"}
    assert not asked.catalogue
    assert check_statement("explain select (select count(*) from learning)").views == {"learning"}
    assert check_statement("select 'from pairs' -- from dropped").views == set()
    assert [check_statement(sql).catalogue for sql in ("show tables", "from pears", "from duckdb_views()")] == [
        True
    ] * 3


def test_a_variable_of_python_is_no_table(world: dict[str, str]) -> None:
    import polars as pl

    secret_frame = pl.DataFrame({"secret": [SECRET]})
    assert secret_frame.height == 1
    for sql in ("from secret_frame", "select * from main.secret_frame"):
        with pytest.raises(InputError, match="secret_frame"):
            query_dataset(world["d"], sql).fetchall()
    with pytest.raises(duckdb.CatalogException, match="Table with name secret_frame does not exist"):
        connect_dataset(world["d"]).sql("from secret_frame")


# with --external


def test_external_lets_a_select_read_other_files_and_stays_one_select(world: dict[str, str]) -> None:
    sql = "select secret, count(*) from '{o}/secret.csv', pairs group by all".format(**world)
    assert query_dataset(world["d"], sql, external=True).fetchall() == [(SECRET, 3)]
    assert query_dataset(world["d"], f"from read_csv('{world['o']}/secret.csv')", external=True).fetchall()
    before = tree(world)
    for statement, (what, why, hint) in STATEMENTS.items():
        with pytest.raises(InputError) as refused:
            query_dataset(world["d"], statement.format(**world), external=True)
        assert str(refused.value) == told(what, why, ONE, hint, world)
    for hidden in ("from query('select 1')", "from query_table('pairs')"):
        with pytest.raises(InputError, match="a statement within a text cannot be checked"):
            query_dataset(world["d"], hidden, external=True)
    assert tree(world) == before


def test_the_configuration_of_a_connection_is_locked_unless_it_is_external(world: dict[str, str]) -> None:
    with pytest.raises(duckdb.Error, match="configuration has been locked"):
        connect_dataset(world["d"]).execute("set threads = 1")
    connect_dataset(world["d"], external=True).execute("set threads = 1")


# through the command


@pytest.mark.parametrize(
    "sql",
    [
        "copy pairs to '{o}/stolen.csv'",
        "attach '{o}/new.db'",
        "install httpfs",
        "select 1; select 2",
        "from '{o}/secret.csv'",
        "select content from read_text('{d}/../outside/secret.csv')",
        "select current_setting('secret_directory')",
        "with a as (insert into pairs values (1) returning *) from a",
        "pragma database_list",
    ],
)
def test_the_command_refuses_it_with_2_and_the_same_words(sql: str, world: dict[str, str], prefkit: Prefkit) -> None:
    before = tree(world)
    ended = prefkit("query", world["d"], sql.format(**world), "--format", "csv")
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {told(*EVERY[sql], world)}\n")
    assert tree(world) == before


def test_the_command_reads_another_file_with_external(world: dict[str, str], prefkit: Prefkit) -> None:
    ended = prefkit("query", world["d"], f"from '{world['o']}/secret.csv'", "--external", "--format", "csv")
    assert (ended.code, ended.out) == (0, f"secret\n{SECRET}\n")


def test_a_query_from_inside_the_dataset_writes_nothing_there_though_it_outgrows_memory(
    world: dict[str, str],
) -> None:
    """DuckDB's own folder for what outgrows memory is .tmp of the working directory."""
    before = tree(world)
    code = (
        "import pathlib; from prefkit.query import connect_dataset, scratch_root\n"
        "connection = connect_dataset('.', external=True)\n"
        "connection.execute(\"set memory_limit = '60MB'\")\n"
        "sorting = connection.sql('select md5(i::varchar) as m from range(3000000) t(i) order by m')\n"
        "reader = sorting.to_arrow_reader(10)\n"
        "reader.read_next_batch()\n"
        "root = pathlib.Path(scratch_root())\n"
        "spilled = [path for path in root.rglob('*') if path.is_file()]\n"
        "print(len(spilled) > 0, oct(root.stat().st_mode & 0o777), root)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=world["d"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    spilled, mode, root = ended.stdout.split()
    assert (spilled, mode) == ("True", "0o700")
    assert not Path(root).exists()  # it goes with the process
    assert tree(world) == before
