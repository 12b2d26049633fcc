"""Evaluation files become items: which texts, under which name, what a person is told, and what is refused."""

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from prefkit.build_settings import EvalSetConfig
from prefkit.errors import SourceError
from prefkit.evals import Evals, read_evals
from prefkit.rows import read_rows
from prefkit.sources import SourceFile

Write = Callable[..., Path]


def read(path: Path | str, **config: Any) -> Evals:
    return read_evals([EvalSetConfig(path=str(path), **config)])


def texts(found: Evals) -> list[str]:
    return found.items["text"].to_list()


def names(found: Evals, path: Path) -> list[str]:
    return [item.removeprefix(f"{path}:") for item in found.items["item"]]


def refused(path: Path | str, **config: Any) -> str:
    with pytest.raises(SourceError) as error:
        read(path, **config)
    return str(error.value)


def test_items_are_named_by_file_and_line_or_by_the_column_that_says_so(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one", "n": {"id": "HumanEval/0"}}, "", {"q": "two", "n": {"id": 7}}])
    found = read(path, columns=["q"])
    assert found.items.schema == {"item": pl.String, "text": pl.String}
    assert found.items.rows() == [(f"{path}:1", "one"), (f"{path}:3", "two")]
    assert names(read(path, columns=["q"], id="n.id"), path) == ["HumanEval/0", "7"]


def test_the_manifest_learns_path_hash_and_rows(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one"}, {"q": ""}])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path, columns=["q"]).files == [SourceFile(str(path), digest, 2)]


def test_columns_are_texts_by_themselves_and_a_list_of_paths_is_one_text(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"a": "A", "b": "B", "c": [{"d": "D"}]}])
    assert texts(read(path, columns=["a", "b"])) == ["A", "B"]
    assert texts(read(path, columns=[["a", "b", "c.0.d"], "b"])) == ["A\nB\nD", "B"]


@pytest.mark.parametrize("nothing", ["", " \n", "<noinput>", " <noinput>\n", None, []])
def test_a_path_without_a_text_adds_nothing(write_jsonl: Write, nothing: object) -> None:
    path = write_jsonl("e.jsonl", [{"a": "A", "b": nothing}, {"a": "A", "b": "B"}])
    assert texts(read(path, columns=[["a", "b"]])) == ["A", "A\nB"]
    assert texts(read(path, columns=["b", "a"])) == ["A", "B", "A"]


def test_words_that_are_like_a_placeholder_are_words(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"a": "None", "b": "noinput"}])
    assert texts(read(path, columns=[["a", "b"]])) == ["None\nnoinput"]


def test_a_path_may_be_missing_in_some_rows_but_not_in_all(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"a": "A", "c": []}, {"a": "A", "c": ["C"]}])
    assert texts(read(path, columns=[["a", "c.0"]])) == ["A", "A\nC"]
    told = refused(path, columns=["a", ["a", "c.1"]])
    assert told.startswith(f"{path}: no row has c.1; the first has the keys a, c\n  expected: paths that rows have\n")
    assert "columns: [...] of this evaluation set, dotted paths allowed; a list of paths is joined to one text" in told


def test_each_turn_is_a_text_of_the_same_item(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"turns": ["First?", "Second?", ""]}])
    found = read(path)
    assert (texts(found), names(found, path)) == (["First?", "Second?"], ["1", "1"])
    assert texts(read(path, columns=[["turns", "turns"]])) == ["First?\nSecond?\nFirst?\nSecond?"]


def test_of_messages_what_the_user_says_is_read(write_jsonl: Write) -> None:
    said = [("system", "You help."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    path = write_jsonl("e.jsonl", [{"prompt": [{"role": role, "content": content} for role, content in said]}])
    assert texts(read(path)) == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("row", "expected", "shown"),
    [
        ({"answer": "a", "question": "q", "prompt": "p"}, ["q"], "question"),
        ({"task_id": "x", "prompt": "p", "test": "t"}, ["p"], "prompt"),
        ({"instruction": "do", "input": "this", "output": "o"}, ["do\nthis"], "instruction + input"),
        ({"instruction": "do", "input": "", "output": "o"}, ["do"], "instruction"),
        ({"problem": "p", "solution": "s"}, ["p"], "problem"),
        ({"text": "t", "code": "c"}, ["t"], "text"),
        ({"Question": "q", "Best Answer": "a"}, ["q"], "Question"),
        ({"query": "q", "input": "i"}, ["q"], "query"),
        ({"input": "i", "target": "t"}, ["i"], "input"),
        ({"question": None, "turns": [], "goal": "g"}, ["g"], "goal"),
        ({"sentence": "s"}, ["s"], "sentence"),
    ],
)
def test_columns_left_out_are_the_usual_ones_and_it_is_said_which(
    write_jsonl: Write, row: dict[str, Any], expected: list[str], shown: str
) -> None:
    path = write_jsonl("e.jsonl", [row])
    found = read(path)
    assert texts(found) == expected
    guessed = f"from {shown} (columns: of this evaluation set says otherwise)"
    assert found.told == [f"{path}: {len(expected)} evaluation texts of 1 rows, {guessed}"]


def test_what_later_rows_have_counts_for_the_usual_columns(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"instruction": "do"}, {"instruction": "do", "input": "this"}])
    assert texts(read(path)) == ["do", "do\nthis"]


def test_rows_without_a_text_are_counted_and_told(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one"}, {"q": "???"}, {"q": None}, {}])
    found = read(path, columns=["q"])
    assert found.told == [
        f"{path}: 1 evaluation texts of 4 rows, from q",
        f"{path}: 3 of 4 rows hold no text and are not looked for",
    ]


def test_a_file_without_any_text_is_refused(write_jsonl: Write) -> None:
    hint = "  next: columns: [...] of this evaluation set, dotted paths allowed"
    path = write_jsonl("e.jsonl", [{"q": "???"}, {"q": ""}])
    assert f"{path}: no row has a text\n  expected: words in q\n{hint}" in refused(path, columns=["q"])
    empty = write_jsonl("empty.jsonl", [])
    assert f"{empty}: no row has a text\n  expected: words in q, a + b\n" in refused(empty, columns=["q", ["a", "b"]])
    told = refused(empty)
    assert f"{empty}: none of the columns that evaluation sets usually have; it has no rows\n" in told


def test_unusual_columns_have_to_be_named(write_jsonl: Write) -> None:
    path = write_jsonl("e.jsonl", [{"stem": "s", "choices": ["a"]}])
    usual = "question, problem, prompt, instruction, turns, query, text, input, goal, sentence"
    assert refused(path) == (
        f"{path}: none of the columns that evaluation sets usually have; it has the keys stem, choices\n"
        f"  expected: {usual}\n"
        "  next: columns: [...] of this evaluation set, dotted paths allowed; a list of paths is joined to one text"
    )


@pytest.mark.parametrize(("value", "kind"), [(1, "int"), ({"a": "b"}, "dict"), ([["a"]], "list"), ([True], "bool")])
def test_what_is_no_text_is_refused_with_its_line_and_path(write_jsonl: Write, value: object, kind: str) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one"}, {"q": value}])
    assert refused(path, columns=["q"]).startswith(
        f"{path}:2: q is no text: {kind}\n  expected: a text, a list of texts, or messages of role and content\n"
    )


@pytest.mark.parametrize("value", [None, "", True, 1.5, ["x"]])
def test_an_item_without_its_name_is_refused(write_jsonl: Write, value: object) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one", "id": 0}, {"q": "two", "id": value}])
    hint = "id: a column of this evaluation set; left out: the line names the item"
    expected = f"{path}:2: id names no item\n  expected: a text or a whole number\n  next: {hint}"
    assert refused(path, columns=["q"], id="id") == expected
    missing = refused(path, columns=["q"], id="name")
    assert missing.startswith(f"{path}:1: name names no item\n")


@pytest.mark.parametrize(("line", "reason"), [("{", "not_json"), ("[1]", "not_an_object"), ('{"q": 1, "q": 2}', "dup")])
def test_a_row_that_cannot_be_read_is_refused(write_jsonl: Write, line: str, reason: str) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one"}, line])
    told = refused(path, columns=["q"])
    assert told.startswith(f"{path}:2: no evaluation item: {reason}")
    assert told.endswith("\n  expected: an object with texts\n  next: mend or remove this row")


def test_a_file_that_changes_while_it_is_read_is_refused(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl("e.jsonl", [{"q": "one"}])

    def and_change(name: str) -> Any:
        rows = list(read_rows(name))
        path.write_text('{"q": "two"}\n')
        return rows

    monkeypatch.setattr("prefkit.evals.read_rows", and_change)
    assert refused(path) == f"{path}: changed while it was read\n  next: run the same command again"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.jsonl").startswith(f"{tmp_path}/gone.jsonl: no such file")


def test_every_kind_of_file_is_read_and_a_glob_is_its_files(tmp_path: Path) -> None:
    rows = [{"question": "one", "id": "x"}, {"question": "zwei ä", "id": "y"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with (tmp_path / "b.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "id"])
        writer.writeheader()
        writer.writerows(rows)
    pl.DataFrame(rows).write_parquet(tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in rows)
    found = read(tmp_path / "*", id="id")
    assert texts(found) == ["one", "zwei ä"] * 4
    assert [Path(file.path).name for file in found.files] == ["a.json", "b.csv", "c.parquet", "d.jsonl.gz"]
    assert [file.rows for file in found.files] == [2] * 4
    assert len(found.told) == 4
    assert names(found, tmp_path / "b.csv")[2:4] == ["x", "y"]


def test_several_sets_come_in_their_order_and_none_is_none(write_jsonl: Write) -> None:
    first, second = write_jsonl("z.jsonl", [{"q": "one"}]), write_jsonl("a.jsonl", [{"text": "two"}])
    sets = [EvalSetConfig(path=str(first), columns=["q"]), EvalSetConfig(path=str(second))]
    assert texts(read_evals(sets)) == ["one", "two"]
    assert [Path(file.path).name for file in read_evals(sets).files] == ["z.jsonl", "a.jsonl"]
    none = read_evals([])
    assert (none.items.height, none.items.columns, none.files, none.told) == (0, ["item", "text"], [], [])


@pytest.mark.parametrize(
    ("path", "shown", "num_texts", "num_rows"),
    [
        ("gsm8k/test.jsonl", "question", 1319, 1319),
        ("decontam/HumanEval.jsonl.gz", "prompt", 164, 164),
        ("decontam/mt_bench_question.jsonl", "turns", 160, 80),
        ("decontam/vicuna_bench_question.jsonl", "turns", 80, 80),
        ("decontam/arena_hard_v0.1_question.jsonl", "prompt", 500, 500),
        ("decontam/rephrase_gsm8k.jsonl.gz", "text", 900, 900),
    ],
)
def test_files_of_known_benchmarks_need_no_columns(
    test_data: Path, path: str, shown: str, num_texts: int, num_rows: int
) -> None:
    found = read(test_data / path)
    assert (found.items.height, found.files[0].rows) == (num_texts, num_rows)
    assert f", from {shown} (" in found.told[0]
