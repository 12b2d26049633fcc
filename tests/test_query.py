"""Fourteen views that are always there, over one dataset and nothing else."""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from finished import add_audit, add_reference

from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.dataset import open_dataset
from prefkit.errors import DatasetError, InputError, PrefkitError
from prefkit.format import FORMAT_VERSION, TABLES, Kind, schema
from prefkit.query import connect_dataset, list_views, query_dataset
from prefkit.reference_table import open_reference
from prefkit.results import Form, write_result
from prefkit.store import read_json, write_views
from prefkit.tables import write_parquet, write_table
from prefkit.verification import verify_dataset
from prefkit.views import VIEW_NAMES as VIEWS
from prefkit.views import sql_type

EXTRA = {view: ["key"] for view in ("reference", "reference_dropped")}
EXTRA |= {view: ["run"] for view in ("steps", "perf", "pair_dynamics", "learning")}
EXTRA |= {"sweeps": ["sweep"]}
EXTRA |= {view: ["run", "evaluation"] for view in ("evaluations", "evaluation_prompts")}
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]) -> Build:
    """Build a small dataset in a directory of that name."""

    def make(name: str = "dataset", rows: int = 3, kind: Kind = "text") -> Path:
        lines = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(rows)]
        lines = lines or [{"prompt": "p", "chosen": "same", "rejected": "same"}]  # read and dropped: no pairs
        source = {"path": str(write_jsonl("rows.jsonl", lines)), "format": "pairs"}
        pipeline = pipeline_of(source, kind=kind).model_copy(update={"dataset": str(tmp_path / name)})
        build_dataset(pipeline)
        return tmp_path / name

    return make


def columns(dataset: Path, view: str) -> dict[str, str]:
    return {row[0]: row[1] for row in query_dataset(dataset, f"describe {view}").fetchall()}


def count(dataset: Path, view: str) -> int:
    return int(query_dataset(dataset, f"select count(*) from {view}").fetchall()[0][0])


def add_references_and_run(dataset: Path) -> list[str]:
    """What the steps behind the torch line would leave: two references, whose keys are returned, and one run."""
    kind: Kind = read_json(dataset / "manifest.json")["kind"]
    keys = [add_reference(dataset, {"pair_id": [name, "x"]}, kind, name) for name in ("one", "another")]
    run = dataset / "runs" / "7"
    steps = pl.DataFrame({"step": [0, 1, 2], "rewards/margins": [0.0, 0.1, 0.2]})
    nulls = [
        pl.lit(None, dtype).alias(name) for name, dtype in schema("steps", "text").items() if name not in steps.columns
    ]
    write_parquet(run / "steps.parquet", steps.with_columns(nulls).select(list(schema("steps", "text"))))
    write_table(run / "pair_dynamics", "pair_dynamics", pl.DataFrame({"step": [0], "pair_id": ["x"]}), "text")
    return keys


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_all_views_are_there_with_the_columns_of_the_format_and_empty_without_data(kind: Kind, build: Build) -> None:
    dataset = build(rows=0, kind=kind)
    for view in VIEWS:
        assert list(columns(dataset, view)) == EXTRA.get(view, []) + list(schema(view, kind))
        assert count(dataset, view) == (view == "dropped")
    tables = query_dataset(dataset, "select view_name from duckdb_views() where not internal").fetchall()
    assert sorted(name for (name,) in tables) == sorted(VIEWS)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_an_empty_view_has_the_types_that_the_full_one_will_have(kind: Kind, build: Build) -> None:
    dataset = build(kind=kind)
    empty = {view: columns(dataset, view) for view in VIEWS}
    add_references_and_run(dataset)
    add_audit(dataset, {"tokens": pl.DataFrame(schema=schema("tokens", kind))})
    assert {view: columns(dataset, view) for view in VIEWS} == empty
    assert [count(dataset, view) for view in ("pairs", "reference", "steps", "pair_dynamics")] == [3, 4, 3, 1]


def test_rows_come_back_as_they_were_built(build: Build) -> None:
    found = query_dataset(build(), "select prompt, chosen, rejected from pairs order by prompt").fetchall()
    assert found == [(f"p{i}", f"good {i}", f"bad {i}") for i in range(3)]


def test_messages_can_be_taken_apart(build: Build) -> None:
    sql = "select prompt[1].role, chosen[1].content from pairs order by 2"
    assert query_dataset(build(kind="chat"), sql).fetchall() == [("user", f"good {i}") for i in range(3)]


def test_tokens_are_there_after_an_audit(build: Build, pipeline_of: Callable[..., Pipeline]) -> None:
    dataset = build(rows=12)
    pipeline = pipeline_of({"path": "x", "format": "pairs"}).model_copy(update={"dataset": str(dataset)})
    audit_dataset(pipeline)
    sql = "select num_chosen_only, exclusive from tokens where token = 'good'"
    assert query_dataset(dataset, sql).fetchall() == [(12, False)]
    sql = "select num_chosen_words from pair_scores join pairs using (pair_id) where chosen = 'good 7'"
    assert query_dataset(dataset, sql).fetchall() == [(2,)]
    assert query_dataset(dataset, "select count(*) from structure where feature = 'words'").fetchall() == [(1,)]
    assert query_dataset(dataset, "select count(*) from probe where source is null").fetchall() == [(4,)]


@pytest.mark.parametrize("name", ["dataset", "reference", "runs"])
def test_references_have_their_key_and_runs_their_name_whatever_the_dataset_is_called(name: str, build: Build) -> None:
    dataset = build(name)
    keys = add_references_and_run(dataset)
    found = query_dataset(dataset, "select key, count(*) from reference group by all order by all").fetchall()
    assert found == [(key, 2) for key in sorted(keys)]
    assert query_dataset(dataset, "select distinct run from steps").fetchall() == [("7",)]
    assert query_dataset(dataset, "select distinct run from pair_dynamics").fetchall() == [("7",)]
    assert query_dataset(dataset, 'select "rewards/margins" from steps where step = 2').fetchall() == [(0.2,)]


@pytest.mark.parametrize(
    "name", ["it's here", "a[1]", 'say "x"', "a;b", "{a,b}", "sp ace/雪", "'); drop view pairs; --"]
)
def test_any_name_of_a_directory_is_safe(name: str, build: Build) -> None:
    assert count(build(name), "pairs") == 3


@pytest.mark.parametrize("name", ["g/d[1]", "g/d?", "g/d*", "g/d[!2]"])
def test_a_name_like_a_pattern_is_no_pattern(name: str, build: Build) -> None:
    dataset = build(name, rows=2)
    other = build("g/d1", rows=3)
    (key,) = [add_reference(folder, {"pair_id": [folder.name]}, "text", "m") for folder in (dataset, other)][:1]
    add_audit(dataset, {"tokens": pl.DataFrame(schema=schema("tokens", "text")).clear(1)})
    assert [count(folder, "pairs") for folder in (dataset, other)] == [2, 3]
    assert query_dataset(dataset, "select key, pair_id from reference").fetchall() == [(key, dataset.name)]
    assert count(dataset, "tokens") == 1
    assert len(query_dataset(dataset, "from pairs", external=True).fetchall()) == 2


def test_tables_that_no_audit_lists_are_not_served(build: Build) -> None:
    dataset = build()
    audit_dataset(str(dataset))
    there = count(dataset, "structure")
    (dataset / "audit" / "stray.parquet").write_bytes((dataset / "audit" / "structure.parquet").read_bytes())
    assert count(dataset, "structure") == there > 0
    (dataset / "audit" / "audit.json").unlink()  # what a kill leaves
    assert [count(dataset, view) for view in ("tokens", "structure", "probe", "pair_scores")] == [0] * 4
    write_views(dataset, read_json(dataset / "manifest.json"))
    assert "audit/" not in (dataset / "views.sql").read_text(encoding="utf-8")
    verify_dataset(dataset)


def test_a_damaged_audit_is_refused_by_name_verified_or_not(build: Build) -> None:
    dataset = build()
    audit_dataset(str(dataset))
    for damage in ("{", "{}", '{"parts": 3}'):
        (dataset / "audit" / "audit.json").write_text(damage)
        for verify in (True, False):
            with pytest.raises(DatasetError) as refused:
                query_dataset(dataset, "from tokens", verify=verify)
            assert refused.value.where == str(dataset / "audit" / "audit.json")


@pytest.mark.parametrize("dataset", [None, 3, ["x"], "a\0b"])
def test_what_is_no_path_is_refused(dataset: Any) -> None:
    null = isinstance(dataset, str)
    what = "a path cannot hold a null character" if null else "a path cannot be a value of type"
    for ask in (query_dataset, open_reference, open_dataset):
        more = ["select 1"] if ask is query_dataset else []
        with pytest.raises(InputError, match=what) as refused:
            ask(dataset, *more)
        assert (refused.value.expected, refused.value.where) == ("a dataset directory", "'a\\x00b'" if null else "")


@pytest.mark.parametrize("key", [3, ["x"], b"x"])
def test_a_key_that_is_no_text_is_refused(key: Any, build: Build) -> None:
    dataset = build()
    add_reference(dataset, {"pair_id": ["x"]}, "text")
    for ask in (lambda: open_reference(dataset, key), lambda: open_dataset(dataset).reference(key)):
        with pytest.raises(InputError) as refused:
            ask()
        what = f"{dataset}: a key of a reference cannot be a value of type {type(key).__name__}"
        assert str(refused.value) == f"{what}\n  expected: a text, or None where there is one reference only"


def test_no_extension_is_fetched_or_loaded_on_the_quiet(build: Build) -> None:
    dataset = build()
    names = "'autoinstall_known_extensions', 'autoload_known_extensions'"
    sql = f"select value from duckdb_settings() where name in ({names})"
    assert connect_dataset(dataset).execute(sql).fetchall() == [("false",), ("false",)]
    usual = duckdb.connect().execute(sql).fetchall()
    assert connect_dataset(dataset, external=True).execute(sql).fetchall() == usual


def test_a_relative_path_is_as_good_as_an_absolute_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build()
    monkeypatch.chdir(dataset.parent)
    assert query_dataset("dataset", "select count(*) from pairs").fetchall() == [(3,)]


# learning


def add_seen(dataset: Path, run: str, margins: dict[str, list[float | None]]) -> None:
    """pair_dynamics of a run in two parts: pair -> its margin at steps 0, 10, 20..., None where it was not seen."""
    rows = [
        {"step": 10 * at, "pair_id": pair, "rewards_chosen": 0.0, "rewards_rejected": 0.0, "margin": margin}
        for pair, row in margins.items()
        for at, margin in enumerate(row)
        if margin is not None
    ]
    parts = [rows[1::2], rows[::2]]  # neither is in the order of steps
    for number, part in enumerate(parts):
        frame = pl.DataFrame(part, schema=schema("pair_dynamics", "text"))
        write_parquet(dataset / "runs" / run / "pair_dynamics" / f"part-{number:05d}.parquet", frame)


SEEN: dict[str, list[float | None]] = {
    "always": [0.0, 1.0, 2.0, 4.0],
    "never": [0.5, -1.0, -2.0, 0.0],  # 0 is no preference: wrong
    "late": [0.0, -1.0, -2.0, 6.0],
    "forgotten": [0.0, 3.0, -1.0, -2.0],
    "to and fro": [0.0, -1.0, 2.0, -3.0, 4.0],
    "once": [0.0, None, 5.0],
    "only at the first update": [7.0],
}
LEARNING = """
select pair_id, num_seen, num_right, num_flips, num_forgotten, history, first_step, learned_step, first_margin,
    early_margin, last_margin, mean_margin
from learning where run = '3' order by pair_id
"""


def test_learning_has_a_row_a_run_and_pair_and_leaves_out_the_first_update(build: Build) -> None:
    dataset = build()
    add_seen(dataset, "3", SEEN)
    add_seen(dataset, "4", {"always": [0.0, -1.0]})
    assert query_dataset(dataset, LEARNING).fetchall() == [
        ("always", 3, 3, 0, 0, "111", 10, 10, 1.0, 1.5, 4.0, pytest.approx(7 / 3)),
        ("forgotten", 3, 1, 1, 1, "100", 10, None, 3.0, 1.0, -2.0, 0.0),
        ("late", 3, 1, 1, 0, "001", 10, 30, -1.0, -1.5, 6.0, 1.0),
        ("never", 3, 0, 0, 0, "000", 10, None, -1.0, -1.5, 0.0, -1.0),
        ("once", 1, 1, 0, 0, "1", 20, 20, 5.0, 5.0, 5.0, 5.0),
        ("to and fro", 4, 2, 3, 1, "0101", 10, 40, -1.0, 0.5, 4.0, 0.5),
    ]
    assert query_dataset(dataset, "select pair_id, history from learning where run = '4'").fetchall() == [
        ("always", "0")
    ]


def test_learning_says_of_random_margins_what_plain_python_does(build: Build) -> None:
    rng = random.Random(0)
    seen: dict[str, list[float | None]] = {
        f"pair {i}": [None if rng.random() < 0.3 else rng.choice([-1.5, -0.25, 0.0, 0.5, 2.0]) for _ in range(7)]
        for i in range(200)
    }
    dataset = build()
    add_seen(dataset, "3", seen)
    expected = []
    for pair, row in sorted(seen.items()):
        there = [(10 * at, margin) for at, margin in enumerate(row) if at > 0 and margin is not None]
        if not there:
            continue
        right = [margin > 0 for _, margin in there]
        changes = list(itertools.pairwise(right))
        learned = next((step for at, (step, _) in enumerate(there) if all(right[at:])), None)
        margins = [margin for _, margin in there]
        facts = (len(there), sum(right), sum(a != b for a, b in changes), sum(a and not b for a, b in changes))
        history = "".join("01"[one] for one in right)
        early, mean = sum(margins[:2]) / len(margins[:2]), pytest.approx(sum(margins) / len(margins))
        expected.append((pair, *facts, history, there[0][0], learned, margins[0], early, margins[-1], mean))
    assert query_dataset(dataset, LEARNING).fetchall() == expected


def test_learning_has_the_types_of_the_format(build: Build) -> None:
    found = columns(build(), "learning")
    assert found == {"run": "VARCHAR"} | {c: sql_type(dtype) for c, dtype in schema("learning", "text").items()}


def test_the_views_file_of_a_dataset_with_a_run_gives_learning_too(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build()
    add_seen(dataset, "3", SEEN)
    write_views(dataset, read_json(dataset / "manifest.json"))
    expected = query_dataset(dataset, LEARNING).fetchall()
    monkeypatch.chdir(dataset)
    connection = duckdb.connect()
    connection.execute(Path("views.sql").read_text("utf-8"))
    assert connection.sql(LEARNING).fetchall() == expected
    assert len(expected) == 6


# nothing outside, nothing changed


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.csv"
    path.write_text("secret\nplumage\n")
    return path


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('{outside}')",
        "select * from '{outside}'",
        "select * from read_text('{dataset}/../outside.csv')",
        "select * from glob('{folder}/*')",
        "copy pairs to '{folder}/stolen.csv'",
        "copy (select 1) to '{dataset}-copy.csv'",
        "export database '{folder}/stolen'",
        "attach '{folder}/new.db'",
        "install httpfs",
        "load httpfs",
        "select * from 'https://127.0.0.1:9/x.csv'",
        "set enable_external_access = true",
        "set allowed_directories = ['/']",
    ],
)
def test_a_query_reads_and_writes_nothing_outside_the_dataset(sql: str, build: Build, outside: Path) -> None:
    dataset = build()
    before = sorted(outside.parent.iterdir())
    with pytest.raises(InputError) as refused:
        query_dataset(dataset, sql.format(outside=outside, dataset=dataset, folder=outside.parent)).fetchall()
    assert "plumage" not in str(refused.value)
    assert sorted(outside.parent.iterdir()) == before


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "sql",
    [
        "copy (select 1 as a) to '{dataset}/pairs/part-train-00000.parquet'",
        "copy (select 1 as a) to '{dataset}/new.csv'",
        "attach '{dataset}/new.db'",
        "export database '{dataset}/export'",
    ],
)
def test_a_query_changes_nothing_inside_the_dataset(sql: str, build: Build) -> None:
    dataset = build()
    before = tree(dataset)
    with pytest.raises(InputError):
        query_dataset(dataset, sql.format(dataset=dataset)).fetchall()
    assert tree(dataset) == before


# what is refused


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("select * from nowhere", "nowhere"),
        ("selec 1", "syntax error"),
        ("select nothing from pairs", "nothing"),
        ("", "there is no statement"),
        ("   ;", "there is no statement"),
    ],
)
def test_sql_that_does_not_run_is_refused_with_the_views_that_there_are(sql: str, said: str, build: Build) -> None:
    with pytest.raises(InputError, match=said) as refused:
        query_dataset(build(), sql)
    assert refused.value.exit_code == 2
    if sql.strip(" ;"):
        assert all(view in refused.value.expected for view in VIEWS)


def test_a_query_that_fails_while_it_runs_is_refused_too(build: Build) -> None:
    with pytest.raises(InputError, match="Conversion"):
        write_result(query_dataset(build(), "select cast(prompt as int) from pairs"), "csv", None, print)


def test_only_a_finished_dataset_can_be_asked(tmp_path: Path, build: Build) -> None:
    with pytest.raises(DatasetError, match="no such dataset"):
        connect_dataset(tmp_path / "nowhere")
    dataset = build()
    (dataset / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        query_dataset(dataset, "select 1")


# results


@pytest.fixture
def text_of(build: Build) -> Callable[..., str]:
    """The text that a result is written as."""

    def write(sql: str, form: Form, kind: Kind = "text") -> str:
        written: list[str] = []
        write_result(query_dataset(build(kind=kind), sql), form, None, written.append)
        return "".join(written)

    return write


def test_csv_has_a_header_and_quotes_what_needs_it(text_of: Callable[..., str]) -> None:
    sql = "select prompt, 'a,\"b\"' as x, null as y from pairs order by prompt limit 1"
    assert text_of(sql, "csv") == 'prompt,x,y\np0,"a,""b""",\n'


def test_json_is_one_object_a_line_with_messages_as_they_are(text_of: Callable[..., str]) -> None:
    lines = text_of("select prompt, margin from pairs order by pair_id", "json", "chat").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 3
    assert all(row["prompt"][0]["role"] == "user" and row["margin"] is None for row in found)


def test_csv_holds_messages_as_text_or_points_to_json(text_of: Callable[..., str]) -> None:
    try:
        said = text_of("select prompt from pairs", "csv", "chat")
    except InputError as refused:
        said = str(refused)
    assert "json" in said or said.count("user") == 3


def test_parquet_needs_a_file_and_reads_back(build: Build, tmp_path: Path) -> None:
    sql = "select * from pairs order by pair_id"
    with pytest.raises(InputError, match="needs a file"):
        write_result(query_dataset(build(), sql), "parquet", None, print)
    number = write_result(query_dataset(build(), sql), "parquet", str(tmp_path / "out.parquet"), print)
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert (number, found.height, list(found.columns)) == (3, 3, list(schema("pairs", "text")))


def test_the_views_file_runs_in_plain_duckdb_from_inside_the_dataset(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(build(kind="chat"))
    connection = duckdb.connect()
    connection.execute(Path("views.sql").read_text("utf-8"))
    counts: list[Any] = [connection.sql(f"select count(*) from {view}").fetchall() for view in VIEWS[:3]]
    assert counts == [[(3,)], [(0,)], [(0,)]]


# what views.sql names


def plain(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> duckdb.DuckDBPyConnection:
    """Plain DuckDB with the views of the file, in the dataset's directory."""
    monkeypatch.chdir(dataset)
    connection = duckdb.connect()
    connection.execute(Path("views.sql").read_text("utf-8"))
    return connection


def test_the_views_file_names_parts_one_by_one_and_those_of_runs_by_a_pattern(build: Build) -> None:
    dataset = build()
    one, two = sorted(add_references_and_run(dataset))
    (dataset / "reference" / one / "part-00009.parquet").write_bytes(b"of a pass that was killed")
    (dataset / "pairs" / "part-train-00009.parquet").write_bytes(b"of nobody")
    write_views(dataset, read_json(dataset / "manifest.json"))
    read = re.findall(r"VIEW (\w+) AS .*read_parquet\(\[([^]]*)\]", (dataset / "views.sql").read_text("utf-8"))
    assert dict(read) == {
        "pairs": "'pairs/part-train-00000.parquet'",
        "dropped": "'dropped/part-00000.parquet'",
        "rejects": "'rejects/part-00000.parquet'",
        "reference": f"'reference/{one}/part-00000.parquet', 'reference/{two}/part-00000.parquet'",
        "reference_dropped": f"'reference/{one}/dropped.parquet', 'reference/{two}/dropped.parquet'",
        "steps": "'runs/*/steps.parquet'",
        "pair_dynamics": "'runs/*/pair_dynamics/part-*.parquet'",
    }


def test_a_run_that_comes_later_is_seen_by_a_views_file_that_knows_runs(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build()
    add_seen(dataset, "3", SEEN)
    write_views(dataset, read_json(dataset / "manifest.json"))
    add_seen(dataset, "4", {"always": [0.0, -1.0]})
    connection = plain(dataset, monkeypatch)
    assert connection.sql("select run, count(*) from learning group by all order by all").fetchall() == [
        ("3", 6),
        ("4", 1),
    ]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_view_and_column_is_explained_to_plain_duckdb_and_to_a_query(
    kind: Kind, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build(kind=kind)
    sql = "select table_name, column_name, comment from duckdb_columns() where not internal order by all"
    named = "select view_name, comment from duckdb_views() where not internal order by all"
    asked, views = query_dataset(dataset, sql).fetchall(), query_dataset(dataset, named).fetchall()
    connection = plain(dataset, monkeypatch)
    assert connection.sql(sql).fetchall() == asked
    assert connection.sql(named).fetchall() == views
    docs = {(table, column.name): column.doc for table in VIEWS for column in TABLES[table]}
    told = {(view, name): comment for view, name, comment in asked if name not in EXTRA.get(view, [])}
    assert told == docs
    assert all(comment for _, _, comment in asked)
    assert [view for view, comment in views if comment] == sorted(VIEWS)


def test_a_reference_that_is_damaged_is_in_no_views_file_and_refused_by_a_query_that_names_it(build: Build) -> None:
    dataset = build()
    one, two = sorted(add_references_and_run(dataset))
    recorded = dataset / "reference" / one / "reference.json"
    for damage in ("{", "{}", '{"parts": 3}', '{"parts": [{"rows": 1}]}', '{"parts": []}'):
        recorded.write_text(damage)
        write_views(dataset, read_json(dataset / "manifest.json"))
        text = (dataset / "views.sql").read_text("utf-8")
        assert (one in text, two in text) == (False, True)
        for sql in ("from reference", "from reference_dropped"):
            for verify in (True, False):
                with pytest.raises(DatasetError, match=r"cannot be read|is damaged at") as refused:
                    query_dataset(dataset, sql, verify=verify)
                assert refused.value.where.endswith(f"{one}/reference.json")
        assert count(dataset, "pairs") == 3


# files that are not as they were written


def spoil_reference_part(dataset: Path) -> str:
    (path,) = dataset.glob("reference/*/part-00000.parquet")
    table = pl.read_parquet(path, glob=False).with_columns(ref_chosen_logps=pl.lit(-1.0, pl.Float32))
    table.write_parquet(path)
    return str(path.relative_to(dataset))


def spoil_identity(dataset: Path) -> str:
    (path,) = dataset.glob("reference/*/reference.json")
    recorded = read_json(path)
    recorded["identity"]["max_length"] = 1024
    path.write_text(json.dumps(recorded))
    return str(path.relative_to(dataset))


def spoil_pair(dataset: Path) -> str:
    path = dataset / "pairs" / "part-train-00000.parquet"
    pl.read_parquet(path, glob=False).with_columns(chosen=pl.lit("swapped")).write_parquet(path)
    return "pairs/part-train-00000.parquet"


def lose_dropped(dataset: Path) -> str:
    (dataset / "dropped" / "part-00000.parquet").unlink()
    return "dropped/part-00000.parquet"


# what is done, which views then refuse, which still answer, and what is said
SPOILED: dict[str, tuple[Callable[[Path], str], list[str], list[str], str]] = {
    "an edited row of a reference": (
        spoil_reference_part,
        ["reference", "reference_dropped", "reference r join pairs p using (pair_id)"],
        ["pairs", "dropped", "tokens"],
        "part was changed: its sha256 is not the recorded one",
    ),
    "an edited identity": (
        spoil_identity,
        ["reference"],
        ["pairs", "learning"],
        "its identity is not the one that its key was made from: it was changed",
    ),
    "an edited pair": (
        spoil_pair,
        ["pairs", "(select 1) where exists (from pairs)"],
        ["dropped", "reference"],
        "part was changed: its sha256 is not the recorded one",
    ),
    "a missing part": (lose_dropped, ["dropped"], ["pairs", "rejects"], "part is missing"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_was_changed_or_lost_is_refused_by_the_queries_that_read_it_and_no_others(name: str, build: Build) -> None:
    spoil, refusing, answering, said = SPOILED[name]
    dataset = build()
    add_reference(dataset, {"pair_id": ["x"], "ref_chosen_logps": [-2.0]}, "text")
    place = spoil(dataset)
    for table in refusing:
        with pytest.raises(PrefkitError) as refused:
            query_dataset(dataset, f"select count(*) from {table}")
        assert refused.value.message == said
        assert refused.value.where == f"{dataset}/{place}"
    for table in answering:
        assert query_dataset(dataset, f"select count(*) from {table}").fetchall()
    with pytest.raises(PrefkitError, match=r"its identity|part"):
        query_dataset(dataset, "show tables")  # which is about all views


def test_without_verification_edited_files_are_read_and_missing_ones_are_not(build: Build) -> None:
    dataset = build()
    spoil_pair(dataset)
    found = query_dataset(dataset, "select distinct chosen from pairs", verify=False).fetchall()
    assert found == [("swapped",)]
    lose_dropped(dataset)
    with pytest.raises(DatasetError, match="part is missing"):
        query_dataset(dataset, "from dropped", verify=False)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_is_refused_by_its_version(version: int, build: Build) -> None:
    dataset = build()
    manifest = read_json(dataset / "manifest.json")
    (dataset / "manifest.json").write_text(json.dumps(manifest | {"format_version": version}))
    for verify in (True, False):
        with pytest.raises(DatasetError, match=f"format_version is {version}"):
            query_dataset(dataset, "from pairs", verify=verify)
    with pytest.raises(DatasetError, match=f"format_version is {version}"):
        list_views(dataset)


def test_only_the_views_that_a_statement_names_are_opened(build: Build) -> None:
    dataset = build()
    (dataset / "runs" / "1").mkdir(parents=True)
    (dataset / "runs" / "1" / "steps.parquet").write_bytes(b"no parquet")
    assert count(dataset, "pairs") == 3
    for sql in ("from steps", "show tables"):
        with pytest.raises(DatasetError, match="the files of steps cannot be read"):
            query_dataset(dataset, sql)


def test_what_is_done_is_told_and_the_connection_is_handed_out_before(build: Build) -> None:
    told: list[str] = []
    seen: list[float] = []
    dataset = build()
    key = add_reference(dataset, {"pair_id": ["x"]}, "text")
    sql = "select count(*) from pairs, reference, steps"
    query_dataset(dataset, sql, tell=told.append, watch=lambda one: seen.append(one.query_progress()))
    assert told == ["checking pairs", f"checking reference {key}", "querying"]
    assert len(seen) == 1
