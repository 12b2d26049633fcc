"""An export keeps the pairs and their order, writes whole files or none, and lists what a format cannot hold."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit

from prefkit import export_dataset, row_files
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.errors import DatasetError, InputError, SourceError
from prefkit.export import Exported
from prefkit.formats import WRITERS

TEXT_WRITERS = [name for name, writer in WRITERS.items() if writer.reference != "ids"]
Write = Callable[..., Path]
Build = Callable[..., Path]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
OTHER_CALL = {"type": "function", "function": {"name": "sum", "arguments": {"numbers": [1, 2.5]}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}]


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": f"gut {i} \u2028", "rejected": f"bad {i}"} for i in range(count)]


def chat_row(number: int, **answer: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"q{number}"}],
        "chosen": [{"role": "assistant", "content": f"good {number}", **answer}],
        "rejected": [{"role": "assistant", "content": f"bad {number}"}],
    }


def tool_rows() -> list[dict[str, Any]]:
    """Three pairs, two of which call a tool."""
    called = chat_row(1, content="", tool_calls=[CALL])
    return [chat_row(0), {**called, "tools": TOOLS}, chat_row(2, content="", tool_calls=[OTHER_CALL])]


@pytest.fixture
def build(tmp_path: Path, write_jsonl: Write, pipeline_of: Callable[..., Pipeline]) -> Build:
    """Build a dataset of rows of the format pairs, half of them held out unless told otherwise."""

    def make(rows: list[dict[str, Any]], test_share: float = 0.5) -> Path:
        source = {"path": str(write_jsonl("built.jsonl", rows)), "format": "pairs"}
        build_dataset(pipeline_of(source, split={"test_share": test_share}, dedupe={"exact": False}))
        return tmp_path / "dataset"

    return make


def pairs_of(dataset: Path) -> pl.DataFrame:
    parts = [*sorted((dataset / "pairs").glob("part-train-*")), *sorted((dataset / "pairs").glob("part-test-*"))]
    return pl.concat([pl.read_parquet(part) for part in parts])


def lines(path: Path | str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def export(target: Path, to: str, out: Path, **options: Any) -> Exported:
    return export_dataset(str(target), to, str(out), **{"overwrite": True, **options})


# what is written


def test_a_directory_gets_a_file_a_split_with_the_pairs_in_their_order(build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(40))
    done = export(dataset, "trl", tmp_path / "out")
    kept = pairs_of(dataset)
    for split in ("train", "test"):
        expected = kept.filter(pl.col("split") == split).select("prompt", "chosen", "rejected").to_dicts()
        assert expected
        assert lines(tmp_path / "out" / f"{split}.jsonl") == expected
        assert done.files[str(tmp_path / "out" / f"{split}.jsonl")] == len(expected)
    assert list(done.files) == [str(tmp_path / "out" / "train.jsonl"), str(tmp_path / "out" / "test.jsonl")]
    assert done == Exported(done.files, [], {}, None, both_splits=False, reference=None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_one_file_holds_all_pairs_or_one_split_and_says_when_it_holds_both(build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(40))
    kept, out = pairs_of(dataset), tmp_path / "all.jsonl"
    assert export(dataset, "trl", out).both_splits
    assert [row["prompt"] for row in lines(out)] == kept["prompt"].to_list()
    assert not export(dataset, "trl", out, split="test").both_splits
    assert [row["prompt"] for row in lines(out)] == kept.filter(pl.col("split") == "test")["prompt"].to_list()


def test_every_kind_of_file_holds_the_same_rows(build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(5))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        assert export(dataset, "trl", tmp_path / name).files == {str(tmp_path / name): 5}
    expected = pairs_of(dataset).select("prompt", "chosen", "rejected").to_dicts()
    assert lines(tmp_path / "a.jsonl") == expected
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected
    unpacked = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())
    assert unpacked == (tmp_path / "a.jsonl").read_bytes()
    assert pl.read_parquet(tmp_path / "a.parquet").to_dicts() == expected


def test_the_same_pairs_give_the_same_bytes(build: Build, tmp_path: Path) -> None:
    dataset = build(tool_rows())
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        export(dataset, "pairs", tmp_path / name)
        first = (tmp_path / name).read_bytes()
        export(dataset, "pairs", tmp_path / name)
        assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize("name", ["again.jsonl", "again.json", "again.jsonl.gz", "again.parquet"])
@pytest.mark.parametrize("to", ["pairs", "trl", "ms_swift"])
def test_an_export_can_be_built_again_into_the_same_pairs(
    to: str, name: str, build: Build, tmp_path: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    dataset = build(tool_rows(), test_share=0)
    export(dataset, to, tmp_path / name)
    again = pipeline_of({"path": str(tmp_path / name), "format": to}, split={"test_share": 0})
    build_dataset(again.model_copy(update={"dataset": str(tmp_path / "again")}))
    one, other = pairs_of(dataset), pairs_of(tmp_path / "again")
    if name.endswith("parquet") and to != "ms_swift":  # arguments became text, as columns have fixed fields
        assert [row[0]["content"] for row in one["rejected"]] == [row[0]["content"] for row in other["rejected"]]
        called = json.loads(other["chosen"][1][0]["extra"])["tool_calls"][0]["function"]
        assert json.loads(called["arguments"]) == {"city": "Köln"}
    else:
        assert other["pair_id"].to_list() == one["pair_id"].to_list()
    assert other["tools"].to_list() == one["tools"].to_list()


def test_parquet_gives_no_tool_call_the_arguments_of_another(build: Build, tmp_path: Path) -> None:
    export(build(tool_rows()), "pairs", tmp_path / "a.parquet")
    rows = pl.read_parquet(tmp_path / "a.parquet").to_dicts()
    calls = {
        row["chosen"][0]["tool_calls"][0]["function"]["arguments"] for row in rows if row["chosen"][0]["tool_calls"]
    }
    assert {json.dumps(json.loads(call), sort_keys=True) for call in calls} == {
        json.dumps({"city": "Köln"}),
        json.dumps({"numbers": [1, 2.5]}),
    }


def test_rows_without_one_schema_are_refused_for_parquet_and_leave_no_file(build: Build, tmp_path: Path) -> None:
    dataset = build([chat_row(0, tool_calls="said in words"), chat_row(1, tool_calls=[CALL])])
    with pytest.raises(InputError, match="the rows fit no one schema: ") as refused:
        export(dataset, "trl", tmp_path / "a.parquet")
    assert (refused.value.where, refused.value.hint) == (str(tmp_path / "a.parquet"), "--out FILE.jsonl")
    assert not (tmp_path / "a.parquet").exists()
    export(dataset, "trl", tmp_path / "a.jsonl")


def test_every_format_is_written_from_a_dataset_of_text_and_of_messages(build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(4))
    for to in TEXT_WRITERS:
        rows = 8 if to == "trl_unpaired" else 4
        assert sum(export(dataset, to, tmp_path / f"text_{to}").files.values()) == rows
    dataset = build([chat_row(i) for i in range(4)])
    for to in TEXT_WRITERS:
        rows = 8 if to == "trl_unpaired" else 4
        assert sum(export(dataset, to, tmp_path / f"chat_{to}").files.values()) == rows


def test_a_format_gets_the_files_it_wants_beside_the_exported_ones(build: Build, tmp_path: Path) -> None:
    dataset, out = build(text_rows(20)), tmp_path / "out"
    done = export(dataset, "llamafactory_sharegpt", out)
    assert done.beside == [str(out / "dataset_info.json")]
    info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert {name: stanza["file_name"] for name, stanza in info.items()} == {
        "prefkit_train": "train.jsonl",
        "prefkit_test": "test.jsonl",
    }
    assert export(dataset, "llamafactory_sharegpt", out) == done
    assert export(dataset, "llamafactory_sharegpt", tmp_path / "one.jsonl").beside == []


def test_a_file_beside_that_says_something_else_is_not_written_over(build: Build, tmp_path: Path) -> None:
    dataset, out = build(text_rows(4)), tmp_path / "data"
    out.mkdir()
    (out / "dataset_info.json").write_text('{"mine": {}}')
    with pytest.raises(InputError, match="is there already, and says something else") as refused:
        export(dataset, "llamafactory_alpaca", out)
    assert refused.value.hint == "--out elsewhere, and copy its entries by hand"
    assert [path.name for path in out.iterdir()] == ["dataset_info.json"]
    assert (out / "dataset_info.json").read_text() == '{"mine": {}}'


# what is left out


def test_pairs_that_a_format_cannot_hold_are_listed_and_counted(build: Build, tmp_path: Path) -> None:
    dataset, out = build(tool_rows()), tmp_path / "out.jsonl"
    done = export(dataset, "axolotl", out)
    assert (done.files, done.left_out) == ({str(out): 1}, {"tool_calls": 1, "tools": 1})
    assert done.left_out_list == f"{out}.left_out.jsonl"
    kept = {row["source_row"]: row["pair_id"] for row in pairs_of(dataset).to_dicts()}
    listed = {row["line"]: (row["pair_id"], row["reason"]) for row in lines(f"{out}.left_out.jsonl")}
    assert listed == {2: (kept[2], "tools"), 3: (kept[3], "tool_calls")}
    assert export(dataset, "trl", out).left_out_list is None
    assert not Path(f"{out}.left_out.jsonl").exists()  # what an earlier export left out is no longer true


def test_an_export_of_nothing_is_an_error_that_names_the_reasons(build: Build, tmp_path: Path) -> None:
    dataset, out = build(tool_rows()[2:]), tmp_path / "out"
    with pytest.raises(InputError, match="axolotl can hold none of the pairs: 1 tool_calls") as refused:
        export(dataset, "axolotl", out)
    assert (refused.value.where, refused.value.hint) == (str(dataset), "another --to")
    assert not out.exists()
    with pytest.raises(InputError, match="there are no pairs to export"):
        export(build(text_rows(2), test_share=0), "trl", out, split="test")
    assert not out.exists()


def test_pairs_of_a_source_whose_lower_scores_are_better_come_back_as_pairs(
    write_jsonl: Write, tmp_path: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    rows = [{**row, "chosen_score": 1, "rejected_score": 4} for row in text_rows(3)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs", "direction": "lower_is_better"}
    built = build_dataset(pipeline_of(source))
    assert built.counts["pairs"] == 3
    for to in ("pairs", "ultrafeedback_binarized", "distilabel_pairs"):
        export(tmp_path / "dataset", to, tmp_path / f"{to}.jsonl")
        again = pipeline_of({"path": str(tmp_path / f"{to}.jsonl"), "format": to})
        again = again.model_copy(update={"dataset": str(tmp_path / f"again_{to}")})
        assert build_dataset(again).counts["pairs"] == 3
        found = pairs_of(tmp_path / f"again_{to}")
        texts = [side if isinstance(side, str) else side[0]["content"] for side in found["chosen"]]
        assert sorted(texts) == sorted(row["chosen"] for row in rows)
        assert found["chosen_score"].to_list() == [None] * 3


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet"])
@pytest.mark.parametrize("to", TEXT_WRITERS)
def test_a_number_without_a_word_in_json_is_left_out_by_name_and_no_file_holds_it(
    to: str, name: str, tmp_path: Path
) -> None:
    odd = {"type": "function", "function": {"name": "f", "arguments": {"a": float("nan")}}}
    rows = [chat_row(0), chat_row(1, content="", tool_calls=[odd]), {**chat_row(2), "tools": [{"a": float("inf")}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = export(tmp_path / "rows.jsonl", to, tmp_path / name, source_format="pairs")
    assert done.left_out == {"not_finite": 2}
    assert [row["line"] for row in lines(f"{tmp_path / name}.left_out.jsonl")] == [2, 3]


# a source file


def test_a_file_of_pairs_is_translated_as_it_is(write_jsonl: Write, tmp_path: Path) -> None:
    rows = [*text_rows(3), text_rows(1)[0], {"prompt": "p", "chosen": "same", "rejected": "same"}]
    source = write_jsonl("rows.jsonl", [*rows, '{"broken', {"prompt": "p", "chosen": 1, "rejected": "r"}])
    done = export(source, "openai_preference", tmp_path / "out.jsonl", source_format="trl")
    assert [row["preferred_output"][0]["content"] for row in lines(tmp_path / "out.jsonl")] == [
        row["chosen"] for row in rows
    ]
    assert done.files == {str(tmp_path / "out.jsonl"): 5}
    assert done.left_out == {"not_json": 1, "wrong_type": 1} == dict(sorted(done.left_out.items()))
    listed = [(row["line"], row["reason"]) for row in lines(f"{tmp_path}/out.jsonl.left_out.jsonl")]
    assert sorted(listed) == [(6, "not_json"), (7, "wrong_type")]


def test_the_scores_of_a_file_give_the_margin(write_jsonl: Write, tmp_path: Path) -> None:
    source = write_jsonl("rows.jsonl", [{**row, "chosen_score": 3, "rejected_score": 2.5} for row in text_rows(2)])
    export(source, "openrlhf", tmp_path / "out")
    assert [row["margin"] for row in lines(tmp_path / "out" / "train.jsonl")] == [0.5, 0.5]


def test_a_file_whose_rows_are_no_pairs_is_refused(write_jsonl: Write, tmp_path: Path) -> None:
    source = write_jsonl("rows.jsonl", [{"prompt": "p", "response": "r", "score": 1}])
    with pytest.raises(InputError) as refused:
        export(source, "trl", tmp_path / "out.jsonl")
    assert str(refused.value) == (
        f"{source}: rows of format candidates are candidates, and only pairs are exported\n"
        "  next: prefkit build makes pairs of them; export its dataset"
    )


# what is refused


def test_an_unknown_format_is_an_error_that_names_the_nearest(build: Build, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--to ms-swift: there is no such format to write") as refused:
        export(build(text_rows(2)), "ms-swift", tmp_path / "out")
    assert refused.value.hint == "did you mean ms_swift?"
    assert refused.value.expected.split(", ") == list(WRITERS)
    with pytest.raises(InputError, match="--from trll: there is no such format to read") as refused:
        export(tmp_path / "built.jsonl", "trl", tmp_path / "out", source_format="trll")
    assert refused.value.hint == "did you mean trl?"
    with pytest.raises(InputError) as refused:
        export(tmp_path / "built.jsonl", "trl", tmp_path / "out", source_format="zzz")
    assert refused.value.hint == "prefkit formats lists them"


@pytest.mark.parametrize("out", ["dataset/out.jsonl", "dataset/pairs", "dataset", "dataset/../dataset/new/x"])
def test_an_export_into_the_dataset_is_refused(out: str, build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(2))
    before = sorted(dataset.rglob("*"))
    with pytest.raises(InputError, match="an export cannot be written into a dataset") as refused:
        export(dataset, "trl", tmp_path / out)
    assert refused.value.hint == "--out elsewhere"
    assert sorted(dataset.rglob("*")) == before


def test_an_export_into_any_other_dataset_is_refused(build: Build, write_jsonl: Write, tmp_path: Path) -> None:
    dataset, source = build(text_rows(2)), write_jsonl("rows.jsonl", text_rows(2))
    with pytest.raises(InputError, match="an export cannot be written into a dataset"):
        export(source, "trl", dataset / "pairs" / "part-train-00001.parquet")


@pytest.mark.parametrize("out", ["mine.jsonl", "folder"])
def test_a_file_that_is_there_is_replaced_only_where_asked_for(out: str, build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(20))
    written = tmp_path / (out if "." in out else f"{out}/train.jsonl")
    written.parent.mkdir(exist_ok=True)
    written.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is there already") as refused:
        export(dataset, "trl", tmp_path / out, overwrite=False)
    assert (refused.value.where, refused.value.expected) == (str(written), "a new file")
    assert refused.value.hint == "--overwrite replaces it, --out elsewhere leaves it"
    assert written.read_text(encoding="utf-8") == "mine"
    export(dataset, "trl", tmp_path / out)
    assert len(lines(written)) > 1


def test_an_export_over_what_it_reads_is_refused(write_jsonl: Write, tmp_path: Path) -> None:
    rows = text_rows(2)
    (tmp_path / "rows").mkdir()
    for name in ("rows.jsonl", "rows/train.jsonl", "other.jsonl.left_out.jsonl"):
        source = write_jsonl(name, rows)
        out = {"rows.jsonl": source, "rows/train.jsonl": tmp_path / "rows"}.get(name, tmp_path / "other.jsonl")
        with pytest.raises(InputError, match="an export cannot be written over what it reads"):
            export(source, "trl", out)
        assert lines(source) == rows
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="an export cannot be written over what it reads"):
        export(tmp_path / "link.jsonl", "trl", tmp_path / "rows.jsonl")


def test_options_that_would_have_no_effect_are_refused(build: Build, tmp_path: Path) -> None:
    dataset, out = build(text_rows(2)), tmp_path / "out"
    with pytest.raises(InputError, match="--from is for a source file, and this is a directory") as refused:
        export(dataset, "trl", out, source_format="pairs")
    assert refused.value.hint == "leave --from out"
    with pytest.raises(InputError, match="--split is for a dataset, and this is a file") as refused:
        export(tmp_path / "built.jsonl", "trl", out, split="train")
    assert refused.value.hint == "leave --split out"
    with pytest.raises(InputError, match="--split dev: there is no such split") as refused:
        export(dataset, "trl", out, split="dev")
    assert refused.value.expected == "train or test"


def test_what_cannot_be_written_is_refused(build: Build, tmp_path: Path) -> None:
    dataset = build(text_rows(2))
    expected = "a file (.jsonl, .jsonl.gz, .json, .parquet), or a name without an ending for a directory"
    for name in ("out.csv", "out.json.gz", "out.txt"):
        with pytest.raises(InputError, match="this kind of file is not written") as refused:
            export(dataset, "trl", tmp_path / name)
        assert refused.value.expected == expected
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="is a file whose name does not say what to write") as refused:
        export(dataset, "trl", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    with pytest.raises(DatasetError, match="cannot be written"):
        export(dataset, "trl", tmp_path / "taken" / "out.jsonl")


def test_a_target_that_is_nothing_of_the_kind_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetError, match="not a prefkit dataset"):
        export(tmp_path / "folder", "trl", tmp_path / "out")
    with pytest.raises(SourceError, match="no such file"):
        export(tmp_path / "nowhere.jsonl", "trl", tmp_path / "out")
    dataset = build(text_rows(2))
    part = next((dataset / "pairs").glob("*.parquet"))
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(DatasetError, match="part was changed"):
        export(dataset, "trl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_half_way_leaves_the_old_files_as_they_were(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, out = build(text_rows(20)), tmp_path / "out"
    export(dataset, "trl", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written = iter(range(15))
    as_line = row_files.as_line

    def fail(row: Any) -> str:
        if next(written, None) is None:
            raise RuntimeError("half way")
        return as_line(row)

    monkeypatch.setattr(row_files, "as_line", fail)
    with pytest.raises(RuntimeError, match="half way"):
        export(dataset, "pairs", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# the command


def test_the_command_says_what_it_wrote_and_left_out(prefkit: Prefkit, build: Build, tmp_path: Path) -> None:
    build(tool_rows(), test_share=0)
    ended = prefkit("export", "dataset", "--to", "axolotl", "--out", "out.jsonl")
    assert ended.code == 0
    assert [line.strip() for line in ended.out.splitlines()] == [
        "out.jsonl: 1 rows",
        "1 left out: tools",
        "1 left out: tool_calls",
        "listed in out.jsonl.left_out.jsonl",
    ]
    ended = prefkit("export", "dataset", "--to", "trl", "--out", "out", "--json")
    assert ended.last_json() == {
        "files": {"out/train.jsonl": 3},
        "beside": [],
        "left_out": {},
        "left_out_list": None,
        "both_splits": False,
        "reference": None,
    }


def test_the_command_warns_of_held_out_pairs_in_the_same_file(prefkit: Prefkit, build: Build) -> None:
    build(text_rows(20))
    told = "train and test pairs in one file: --split train leaves the held-out pairs out"
    assert told in prefkit("export", "dataset", "--to", "trl", "--out", "out.jsonl").out
    assert told not in prefkit("export", "dataset", "--to", "trl", "--out", "out.jsonl", "--split", "train").out
    ended = prefkit("export", "dataset", "--to", "llamafactory_alpaca", "--out", "out")
    assert "out/dataset_info.json: goes with them" in ended.out.splitlines()


def test_the_command_ends_with_2_on_a_wrong_name(prefkit: Prefkit, write_jsonl: Write) -> None:
    write_jsonl("rows.jsonl", text_rows(2))
    ended = prefkit("export", "rows.jsonl", "--to", "trls", "--out", "out.jsonl", "--json")
    assert (ended.code, ended.error()["hint"]) == (2, "did you mean trl?")
    assert prefkit("export", "rows.jsonl", "--from", "trl", "--to", "trl", "--out", "out.jsonl").code == 0


# what an earlier export left


def test_a_folder_that_is_written_over_keeps_no_split_of_the_earlier_export(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    source = write_jsonl("rows.jsonl", rows)
    made = pipeline_of({"path": str(source), "format": "trl"}, kind="text", split={"test_share": 0.3})
    build_dataset(made)
    out = tmp_path / "out"
    both = export(Path(made.dataset), "trl", out)
    assert sorted(Path(name).name for name in both.files) == ["test.jsonl", "train.jsonl"]
    export(source, "trl", out)  # a file has no splits: all of it is train
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl"]


def test_one_split_after_the_other_goes_into_one_folder(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    made = pipeline_of(
        {"path": str(write_jsonl("rows.jsonl", rows)), "format": "trl"}, kind="text", split={"test_share": 0.3}
    )
    build_dataset(made)
    for split in ("train", "test"):
        export(Path(made.dataset), "trl", tmp_path / "out", split=split, overwrite=False)
    sizes = [len((tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "test")]
    assert sum(sizes) == 40
    assert min(sizes) > 0
