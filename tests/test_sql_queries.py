"""The queries of docs/sql.md, as they stand there, over a dataset whose answers are worked out by hand.

Each is asked three times: through `prefkit query`, of plain DuckDB in the dataset's directory with nothing but
views.sql, and of DuckDB's own command line where there is one.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from command import Prefkit
from finished import add_audit, add_reference, with_nulls

from prefkit.build import build_dataset
from prefkit.config import load_pipeline
from prefkit.query import query_dataset
from prefkit.store import read_json, write_views
from prefkit.tables import write_parquet
from prefkit.views import VIEW_NAMES

PAGE = Path(__file__).parent.parent / "docs" / "sql.md"
# a near-duplicate: 44 words, all different, so 40 5-grams; another last word leaves 39 of them, of 41 in all
LONG = [f"word{number}" for number in range(44)]
NEAR, REWORDED = " ".join(LONG), " ".join([*LONG[:-1], "other"])


class Seen(NamedTuple):
    """A pair that is kept, and what the steps behind the build are made to say of it."""

    source: str
    chosen: str
    rejected: str
    score: float | None  # the source's own margin
    words: tuple[int, int]  # of chosen and rejected, as the audit's table says
    shortcut: float
    logps: tuple[float, float] | None  # of chosen and rejected; None: left out by encoding
    tokens: tuple[int, int]
    cut: tuple[bool, bool]
    one: tuple[float, ...]  # margins of run 1 at steps 10, 20, 30
    two: tuple[float, ...]


KEPT = (
    Seen(
        "a", "Certainly. One", "not one", 4.0, (25, 5), 2.0, (-4.0, -2.0), (4, 1), (False, False), (1, 1, 2), (-1, -1)
    ),
    Seen("a", "two", "it is CERTAINLY not", 2.0, (8, 5), -1.0, (-1.0, -8.0), (1, 4), (True, False), (-1, 3), (1, 1)),
    Seen(
        "a", "three, certainly", "certainly not", 3.0, (7, 5), 1.0, (-9.0, -3.0), (3, 3), (True, True), (1, 2), (3, 3)
    ),
    Seen("b", "Certainly. Four", "not four", 1.0, (5, 6), 3.0, (-2.0, -4.0), (2, 2), (False, False), (-1, -3), (2, 5)),
    Seen("b", "five", "not five", None, (5, 14), -2.0, (-6.0, -5.0), (3, 1), (False, True), (-1, -1), (-2, -2)),
    Seen("c", NEAR, "no", None, (5, 15), 0.0, None, (44, 1), (False, False), (0,), (1,)),
)
TOKENS: dict[str, list[Any]] = {
    "token": ["certainly", "perhaps", "echo", "certainly .", "wanted", "rare"],
    "n": [1, 1, 1, 2, 1, 1],
    "alphabet": ["word"] * 6,
    "side": ["chosen", "rejected", "chosen", "chosen", "chosen", "chosen"],
    "num_chosen_only": [3, 1, 9, 2, 9, 2],
    "num_rejected_only": [1, 9, 1, 0, 1, 0],
    "num_both": [1, 0, 0, 0, 0, 0],
    "num_discordant": [4, 10, 10, 2, 10, 2],
    "win_rate": [0.8, 0.1, 0.9, 1.0, 0.9, 1.0],
    "q": [0.01, 0.02, 0.01, 0.01, 0.01, 0.9],
    "z_length": [4.5, -3.5, 1.0, 5.0, 5.0, 5.0],
    "one_sided": [True, False, False, True, False, False],
    "allowed": [False, False, False, False, True, False],
}
CONTRADICTIONS = "Which sources produce contradictions?"
GIVEN = "Which tokens give the answer away, and in which pairs?"
REJECTED = "Pairs whose reference already prefers rejected"
NEVER = "Which pairs did a run never learn?"
RUNS = "Two runs side by side"
# heading and number below it -> rows. A pair stands as its number in KEPT, a source by its name, the key as "key"
ANSWERS: dict[tuple[str, int], list[tuple[Any, ...]]] = {
    ("SQL", 0): [
        ("first_step", "BIGINT", "step at which it was first seen"),
        ("learned_step", "BIGINT", "step from which on it was right each time, null where it ended wrong"),
    ],
    # a lost 3 of 6 pairs, b 1 of 4: two are kept and one was identical
    (CONTRADICTIONS, 0): [("a", 3, 6, 0.5), ("b", 1, 4, 0.25)],
    (CONTRADICTIONS, 1): [("a", "a", 2), ("a", "b", 1), ("b", "a", 1)],
    (GIVEN, 0): [("perhaps", "rejected", 1, 9, 0, 0.1, -3.5), ("certainly", "chosen", 3, 1, 1, 0.8, 4.5)],
    (GIVEN, 1): [("certainly", "chosen", "train", name, pair) for name, pair in (("a", 0), ("a", 1), ("b", 3))],
    (GIVEN, 2): [("a", 3, 0.666667, 0.666667), ("b", 2, 0.5, 0.5), ("c", 1, 0.0, 0.0)],
    ("What was dropped and why, by source?", 0): [
        ("a", "dedupe", "contradiction", 3),
        ("b", "dedupe", "contradiction", 1),
        ("b", "validate", "identical", 1),
        ("c", "read", "missing_field", 1),
        ("c", "dedupe", "near_duplicate", 1),
        ("c", "read", "not_json", 1),
    ],
    ("Near-duplicates beside the pair that was kept", 0): [(39 / 41, "c", "c", "How?", REWORDED, NEAR, 5)],
    # by sum: 0, 2 and 4 of five; by token -1 -2, -1 -2, -3 -1, -1 -2, -2 -5: 2 alone
    (REJECTED, 0): [("key", "train", 5, 0.6, 0.2)],
    (REJECTED, 1): [(2, "train", "a", 2.0)],
    ("Truncated pairs, by source", 0): [
        ("key", "a", 3, 2, 1, 0, 14),
        ("key", "b", 2, 0, 1, 0, 13),
        ("key", "c", 1, 0, 0, 1, None),
    ],
    # longer by 20, 3, 2, -1, -9 and -10
    ("Length against margin", 0): [
        (-10, 3, 1.0, 0.333333, -4 / 3),
        (0, 2, 2.5, 0.0, 2.5),
        (20, 1, 4.0, 2.0, 2.0),
    ],
    (NEVER, 0): [(3, 2, -3.0, "b", 1.0, None, 3.0), (4, 2, -1.0, "b", None, None, -2.0)],
    (NEVER, 1): [(0, 2.0, 1.0, "a"), (2, 1.0, 1.0, "a")],
    (NEVER, 2): [(1, -1.0, "01", "a")],
    (RUNS, 0): [("2", 20, 0.25, 0.9, 1.5), ("1", 30, 0.5, 0.8, 1.0)],
    (RUNS, 1): [(3, -3.0, 5.0, "b"), (0, 2.0, -1.0, "a"), (5, 0.0, 1.0, "c")],
}


def documented() -> dict[tuple[str, int], str]:
    """Each block of SQL of the page by its heading and its number below it."""
    found: dict[tuple[str, int], str] = {}
    heading, number = "", 0
    for title, block in re.findall(
        r"^#+ ([^\n]*)$|^```sql\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        if title:
            heading, number = title, 0
        else:
            found[heading, number] = block
            number += 1
    return found


def said(prompt: str, chosen: str, rejected: str, score: float | None = None) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_score": score,
        "rejected_score": None if score is None else 0.0,
    }


def written(folder: Path) -> list[dict[str, str]]:
    """The sources: KEPT, and what is dropped from among them."""
    rows: dict[str, list[Any]] = {"a": [], "b": [], "c": []}
    for number, pair in enumerate(KEPT):
        prompt = "How?" if pair.chosen == NEAR else f"Which is number {number}?"
        rows[pair.source].append(said(prompt, pair.chosen, pair.rejected, pair.score))
    rows["a"] += [said("Which way?", "left", "right"), said("Up?", "yes", "no"), said("Up?", "no", "yes")]
    rows["b"] += [said("Which way?", "right", "left"), said("Same?", "same", "same")]
    rows["c"] += [said("How?", REWORDED, "no"), "{", {"prompt": "p"}]
    for name, lines in rows.items():
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return [{"path": f"{folder}/{name}.jsonl", "format": "pairs"} for name in rows]


class World(NamedTuple):
    """The dataset, and what stands in the answers for its long names."""

    dataset: Path
    short: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("sql")
    settings: dict[str, Any] = {"dataset": str(folder / "dataset"), "kind": "chat", "sources": written(folder)}
    settings |= {"split": {"test_share": 0}, "validate": {"max_reject_share": 0.6}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    dataset = Path(build_dataset(load_pipeline(folder / "pipeline.yaml")).dataset)
    by_reply = dict(query_dataset(dataset, "select chosen[1].content, pair_id from pairs").fetchall())
    ids = [by_reply[pair.chosen] for pair in KEPT]
    assert len(by_reply) == len(ids)
    add_findings(dataset, ids)
    key = add_scores(dataset, ids)
    add_runs(dataset, ids)
    write_views(dataset, read_json(dataset / "manifest.json"))
    names = {f"{folder}/{name}.jsonl": name for name in ("a", "b", "c")}
    return World(dataset, names | {pair: number for number, pair in enumerate(ids)} | {key: "key"})


def add_findings(dataset: Path, ids: list[str]) -> None:
    scores: dict[str, list[Any]] = {"pair_id": ids, "shortcut_score": [pair.shortcut for pair in KEPT]}
    scores["num_chosen_words"], scores["num_rejected_words"] = map(list, zip(*(p.words for p in KEPT), strict=True))
    add_audit(dataset, {"pair_scores": with_nulls("pair_scores", scores), "tokens": with_nulls("tokens", TOKENS)})


def add_scores(dataset: Path, ids: list[str]) -> str:
    scored = [(pair, seen) for pair, seen in zip(ids, KEPT, strict=True) if seen.logps is not None]
    rows: dict[str, list[Any]] = {"pair_id": [pair for pair, _ in scored], "num_prompt_tokens": [10] * len(scored)}
    for place, side in enumerate(("chosen", "rejected")):
        rows[f"ref_{side}_logps"] = [seen.logps[place] for _, seen in scored if seen.logps]
        rows[f"num_{side}_tokens"] = [seen.tokens[place] for _, seen in scored]
        rows[f"{side}_truncated"] = [seen.cut[place] for _, seen in scored]
    left_out = [pair for pair, seen in zip(ids, KEPT, strict=True) if seen.logps is None]
    return add_reference(dataset, rows, dropped={"pair_id": left_out, "reason": ["prompt_too_long"] * len(left_out)})


def add_runs(dataset: Path, ids: list[str]) -> None:
    for run in ("one", "two"):
        rows = [(0, pair, 9.0) for pair in ids]  # the first update counts for nothing
        for pair, seen in zip(ids, KEPT, strict=True):
            rows += [(10 * at, pair, float(margin)) for at, margin in enumerate(getattr(seen, run), 1)]
        columns = dict(zip(("step", "pair_id", "margin"), map(list, zip(*rows, strict=True)), strict=True))
        number = {"one": "1", "two": "2"}[run]
        frame = with_nulls("pair_dynamics", columns)
        write_parquet(dataset / "runs" / number / "pair_dynamics" / "part-00000.parquet", frame)
    evaluated = {"1": ([10, 30], [0.125, 0.5], [0.7, 0.8], [0.5, 1.0]), "2": ([20], [0.25], [0.9], [1.5])}
    for number, (steps, losses, accuracies, margins) in evaluated.items():
        names = ("step", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        values: tuple[list[Any], ...] = ([*steps, 40], [*losses, None], [*accuracies, None], [*margins, None])
        frame = with_nulls("steps", dict(zip(names, values, strict=True)))
        write_parquet(dataset / "runs" / number / "steps.parquet", frame)


def check(place: tuple[str, int], rows: list[list[Any]], short: dict[str, Any]) -> None:
    """Rows as they were answered, long names by their short ones, against those of ANSWERS."""
    told = [tuple(short.get(cell, cell) if isinstance(cell, str) else cell for cell in row) for row in rows]
    assert [len(row) for row in told] == [len(row) for row in ANSWERS[place]], told
    for row, expected in zip(told, ANSWERS[place], strict=True):
        assert row == tuple(pytest.approx(c, abs=1e-6) if isinstance(c, float) else c for c in expected)


def test_each_query_of_the_page_has_an_answer_here() -> None:
    assert sorted(documented()) == sorted(ANSWERS)


@pytest.mark.parametrize("place", ANSWERS, ids=lambda place: f"{place[0]} {place[1]}")
def test_prefkit_query_answers_what_was_worked_out_by_hand(
    place: tuple[str, int], world: World, prefkit: Prefkit
) -> None:
    (Path.cwd() / "question.sql").write_text(documented()[place])
    ended = prefkit("query", str(world.dataset), "@question.sql", "--format", "json")
    assert ended.code == 0, ended.err
    check(place, [list(json.loads(line).values()) for line in ended.out.splitlines()], world.short)


PLAIN = """
import duckdb, json, sys
assert "prefkit" not in sys.modules
connection = duckdb.connect()
connection.execute(open("views.sql").read())
answers = [connection.sql(sql).fetchall() for sql in json.load(sys.stdin)]
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def plain(world: World) -> dict[tuple[str, int], list[list[Any]]]:
    """What plain DuckDB answers in the dataset's directory, in a process that cannot see prefkit's folder."""
    asked = json.dumps([documented()[place] for place in ANSWERS])
    command = [sys.executable, "-I", "-c", PLAIN]
    ended = subprocess.run(command, input=asked, cwd=world.dataset, capture_output=True, text=True, check=True)
    return dict(zip(ANSWERS, json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("place", ANSWERS, ids=lambda place: f"{place[0]} {place[1]}")
def test_plain_duckdb_answers_the_same_from_the_views_file(
    place: tuple[str, int], world: World, plain: dict[tuple[str, int], list[list[Any]]]
) -> None:
    check(place, plain[place], world.short)


@pytest.fixture(scope="module")
def duckdb_cli() -> str:
    """DuckDB's command line: that of the pip package duckdb-cli, or any on the path."""
    beside = shutil.which("duckdb", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("duckdb")
    if found is None:
        pytest.skip("no duckdb command: pip install duckdb-cli")
    return found


@pytest.mark.parametrize("place", ANSWERS, ids=lambda place: f"{place[0]} {place[1]}")
def test_the_duckdb_command_answers_the_same_from_the_views_file(
    place: tuple[str, int], world: World, duckdb_cli: str
) -> None:
    command = [duckdb_cli, "-init", "views.sql", "-json", "-c", documented()[place]]
    ended = subprocess.run(command, cwd=world.dataset, capture_output=True, text=True, check=True)
    answered = json.loads(ended.stdout[ended.stdout.index("[{") :])
    check(place, [list(row.values()) for row in answered], world.short)


def test_a_part_that_is_gone_is_an_error_of_plain_duckdb_too_and_never_fewer_rows(
    world: World, tmp_path: Path, duckdb_cli: str
) -> None:
    dataset = Path(shutil.copytree(world.dataset, tmp_path / "dataset"))
    for view, part in (("pairs", "pairs/part-train-00000.parquet"), ("reference", "reference/*/part-*.parquet")):
        (path,) = dataset.glob(part)
        kept = path.read_bytes()
        path.unlink()
        command = [duckdb_cli, "-init", "views.sql", "-c", f"SELECT count(*) FROM {view}"]
        ended = subprocess.run(command, cwd=dataset, capture_output=True, text=True, check=False)
        assert ended.returncode != 0
        assert path.name in ended.stderr
        assert ended.stdout.strip() == ""
        path.write_bytes(kept)


def test_the_python_of_the_page_runs_and_says_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "dataset").symlink_to(world.dataset)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(ours, names)
    assert "contradiction" in capsys.readouterr().out
    assert names["asked"].filter("n > 1").fetchall() == [("contradiction", 4)]
    exec(theirs + "\ncounted = connection.sql('select count(*) from pairs').fetchall()", names)
    assert names["counted"] == [(6,)]


def test_a_client_that_has_another_working_directory_is_told_where_to_look(world: World, tmp_path: Path) -> None:
    code = PLAIN.replace(
        'connection.execute(open("views.sql").read())',
        f'connection.execute("SET file_search_path = {str(world.dataset)!r}")\n'
        f'connection.execute(open("{world.dataset}/views.sql").read())',
    )
    asked = json.dumps(
        ["SELECT count(*) FROM pairs", "SELECT count(*) FROM learning", "SELECT count(*) FROM reference"]
    )
    command = [sys.executable, "-I", "-c", code]
    ended = subprocess.run(command, input=asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [[[6]], [[12]], [[5]]]


def test_the_page_names_every_view() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert listed == list(VIEW_NAMES)
