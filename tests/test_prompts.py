"""Prompts: from files of all kinds and from datasets, each once and with the id that its pairs have."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny import built, chat_rows, text_rows, tiny_llama, write_rows

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.errors import DatasetError, SourceError
from prefkit.format import Kind
from prefkit.identity import model_folder
from prefkit.prompts import Prompts, prompts_kind, read_prompts
from prefkit.sample_settings import PromptsConfig
from prefkit.store import read_manifest
from prefkit.tables import read_table

Write = Callable[..., Path]


def read(path: Path | str, kind: Kind = "text", **more: Any) -> Prompts:
    return read_prompts(PromptsConfig(path=str(path), **more), kind)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_prompts_keep_their_order_answer_and_line(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": "one", "reference": "1"}, "", {"prompt": "two", "answer": 5}])
    found = read(path)
    assert found.kept.select("prompt", "reference", "tools", "source", "source_row").rows() == [
        ("one", "1", None, str(path), 1),
        ("two", None, None, str(path), 3),
    ]
    assert [(file.path, file.rows) for file in found.files] == [(str(path), 2)]
    assert found.rejects.height == found.dropped.height == 0


def test_columns_may_have_any_name_and_depth_and_answers_may_be_numbers(write_jsonl: Write) -> None:
    rows: list[Any] = [{"data": {"q": "one"}, "a": {"n": 12}}, {"data": {"q": "two"}, "a": {"n": 1.5}}]
    rows += [{"data": {}, "a": {"n": 1}}]
    rows += [{"data": {"q": "three"}, "a": {"n": True}}, {"data": {"q": "four"}, "a": {"n": None}}]
    found = read(write_jsonl("p.jsonl", rows), columns={"prompt": "data.q", "reference": "a.n"})
    assert found.kept.select("prompt", "reference").rows() == [("one", "12"), ("two", "1.5"), ("four", None)]
    assert found.rejects.select("line", "field", "reason").rows() == [
        (3, "data.q", "missing_field"),
        (4, "reference", "wrong_type"),
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet", "p.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "reference": "a"}, {"prompt": "two, with a comma", "reference": "b"}]
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "p.csv":
        pl.DataFrame(rows).write_csv(path)
    elif name == "p.parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        text = json.dumps(rows) if name == "p.json" else lines
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    kept = read(path).kept
    assert kept.select("prompt", "reference").rows() == [("one", "a"), ("two, with a comma", "b")]


def test_a_prompt_has_the_id_that_its_pairs_have(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    for kind, rows in (("text", text_rows(5)), ("chat", chat_rows(5))):
        pipeline = built(tmp_path / kind, rows, model, kind)
        pairs = read_table(Path(pipeline.dataset), "pairs", read_manifest(Path(pipeline.dataset)))
        path = write_rows(tmp_path / f"{kind}.jsonl", [{"prompt": row["prompt"]} for row in rows])
        assert sorted(read(path, kind).kept["prompt_id"]) == sorted(pairs["prompt_id"])  # type: ignore[arg-type]


def test_a_dataset_gives_the_prompts_of_its_training_pairs_once(
    write_jsonl: Write, pipeline_of: Callable[..., Pipeline]
) -> None:
    rows = text_rows(40)
    rows += [{**row, "chosen": row["chosen"] + " again"} for row in rows]
    path = write_jsonl("pairs.jsonl", rows)
    pipeline = pipeline_of({"path": str(path), "format": "pairs"}, kind="text", split={"test_share": 0.3})
    build_dataset(pipeline)
    pairs = read_table(Path(pipeline.dataset), "pairs", read_manifest(Path(pipeline.dataset)))
    settings = PromptsConfig(path=pipeline.dataset)
    assert prompts_kind(settings, None, has_template=True) == "text"
    kept = read_prompts(settings, "text").kept
    train = pairs.filter(pl.col("split") == "train")
    assert set(kept["prompt_id"]) == set(train["prompt_id"]) != set(pairs["prompt_id"])
    assert kept["prompt_id"].is_unique().all()
    assert set(kept["source"]) == {str(path)}
    assert read(pipeline.dataset, limit=3).kept["prompt_id"].to_list() == kept["prompt_id"][:3].to_list()
    with pytest.raises(SourceError, match="a dataset has columns and a kind of its own") as error:
        read(pipeline.dataset, "chat")
    assert error.value.expected == "kind text, and no columns:"
    other = read(pipeline.dataset, split="test").kept["prompt_id"].to_list()
    assert other
    assert set(other) == set(pairs.filter(pl.col("split") == "test")["prompt_id"])
    with pytest.raises(SourceError, match="split is of a dataset, and this is none") as error:
        read(path, split="test")
    assert error.value.expected == "the folder of a dataset, or no split:"


def test_an_unfinished_dataset_is_refused_as_one(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    (Path(pipeline.dataset) / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="manifest"):
        read(pipeline.dataset)


def test_a_dataset_without_pairs_of_the_split_says_what_it_takes(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    with pytest.raises(SourceError, match="holds no test pairs to take prompts of") as error:
        read(pipeline.dataset, split="test")
    assert error.value.expected == "a split: section with test_share, or a file of prompts"


def test_what_cannot_be_answered_is_dropped_with_a_reason(write_jsonl: Write) -> None:
    rows: list[Any] = [{"prompt": turns("a")}, {"prompt": "a"}, {"prompt": turns("a", "b")}, {"prompt": "  \u200b"}]
    rows += [{"prompt": []}, {"prompt": [{"role": "system", "content": "be brief"}]}]
    rows += [{"prompt": [*turns("x", "y"), {"role": "tool", "content": "4"}]}, {"prompt": 5}, "nonsense"]
    found = read(write_jsonl("p.jsonl", rows), "chat")
    assert found.kept["source_row"].to_list() == [1, 7]
    assert found.dropped.select("source_row", "reason").rows() == [
        (2, "duplicate"),
        (3, "no_user_turn_last"),
        (4, "empty_prompt"),
        (5, "empty_prompt"),
        (6, "no_user_turn_last"),
    ]
    assert found.rejects.select("line", "reason").rows() == [(8, "wrong_type"), (9, "not_json")]


def test_tools_are_part_of_a_prompt(write_jsonl: Write) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": "a", "tools": tools}, {"prompt": "a"}, {"prompt": "a", "tools": []}, {"prompt": "b", "tools": 3}]
    found = read(write_jsonl("p.jsonl", rows), "chat")
    assert [json.loads(t) if t else None for t in found.kept["tools"]] == [tools, None]
    assert found.dropped["reason"].to_list() == ["duplicate"]
    assert found.rejects["field"].to_list() == ["tools"]


def test_the_kind_is_said_or_that_of_messages_or_of_a_template(write_jsonl: Write) -> None:
    text, chat = write_jsonl("t.jsonl", ["{", {"prompt": "a"}]), write_jsonl("c.jsonl", [{"prompt": turns("a")}])
    cases: list[Any] = [(text, None, False, "text"), (text, None, True, "chat"), (chat, None, False, "chat")]
    cases += [(text, "chat", False, "chat"), (chat, "text", True, "text")]
    for path, said, has_template, kind in cases:
        assert prompts_kind(PromptsConfig(path=str(path)), said, has_template=has_template) == kind
    with pytest.raises(SourceError) as error:
        read(chat, "text")
    assert "1 messages_in_text_dataset" in str(error.value)


def test_a_limit_takes_the_first_of_the_file(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", ["x", *({"prompt": f"p {i}"} for i in range(9))])
    found = read(path, limit=4)
    assert found.kept["prompt"].to_list() == ["p 0", "p 1", "p 2", "p 3"]
    assert found.rejects.height == 1


def test_files_of_a_glob_are_read_in_order(write_jsonl: Write, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(f"{name}.jsonl", [{"prompt": name}, {"prompt": "both"}])
    found = read(f"{tmp_path}/*.jsonl")
    assert found.kept["prompt"].to_list() == ["a", "both", "b"]
    assert [Path(file.path).name for file in found.files] == ["a.jsonl", "b.jsonl"]


def test_a_file_without_a_prompt_says_what_is_in_it(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"question": "a"}, {"question": "b"}, {"prompt": " "}])
    with pytest.raises(SourceError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}: none of its 3 rows is a prompt that can be answered: 1 empty_prompt, 2 missing_field; "
        "no prompt: a row has the keys question\n"
        "  expected: a prompt a row: text, or messages whose last turn is the user's\n"
        "  next: --set sample.prompts.columns.prompt=NAME says in which column it is"
    )
    with pytest.raises(SourceError, match="holds no prompt") as error:
        read(write_jsonl("empty.jsonl", []))
    assert error.value.hint == ""
    with pytest.raises(SourceError) as error:
        read(write_jsonl("blank.jsonl", [{"prompt": " "}]))
    assert (error.value.message[-27:], error.value.hint) == ("be answered: 1 empty_prompt", "")
    with pytest.raises(SourceError, match="no such file"):
        read("nowhere.jsonl")


def test_the_column_that_is_missing_is_named_and_the_setting_to_mend(write_jsonl: Write) -> None:
    path = write_jsonl("p.jsonl", [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    settings = PromptsConfig(path=str(path), columns={"prompt": "question", "reference": "anser"})
    with pytest.raises(SourceError) as error:
        read_prompts(settings, "text", "evaluate.prompts")
    assert error.value.message == (
        "none of its 2 rows is a prompt that can be answered: 2 missing_field; "
        "no anser: a row has the keys question, answer"
    )
    assert error.value.hint == "--set evaluate.prompts.columns.reference=NAME says in which column it is"


def test_text_that_looks_like_sql_markup_or_a_path_stays_text(write_jsonl: Write) -> None:
    hostile = ["'; drop table x; --", "[bold]x[/bold]", "../../etc/passwd", "{{ 7*7 }}", "\x1b[31m", "a\x00b", "\u202e"]
    kept = read(write_jsonl("p.jsonl", [{"prompt": text, "reference": text} for text in hostile])).kept
    assert kept["prompt"].to_list() == kept["reference"].to_list() == hostile[: len(kept)]


def test_a_run_is_its_final_model(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "run" / "model")
    assert model_folder(model) == model
    (tmp_path / "run" / "run.json").write_text("{}")
    assert model_folder(tmp_path / "run") == model
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(Exception, match="the run has no final model yet") as error:
        model_folder(str(tmp_path / "begun"))
    assert error.value.expected == "a finished run"  # type: ignore[attr-defined]
    assert error.value.hint == "the command that began the run goes on with it"  # type: ignore[attr-defined]
