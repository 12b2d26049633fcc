"""`datasets` and the other readers of Parquet folders on a dataset as every step leaves it, without the network."""

import logging
import math
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import duckdb
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow.dataset as pad
import pytest
from command import Prefkit
from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard, DatasetCardData
from tiny import built, chat_rows, text_rows, tiny_llama

from prefkit import batches, card, front_matter, tables
from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline
from prefkit.papers import renew_papers
from prefkit.reference import precompute_reference
from prefkit.repairs import repair_dataset
from prefkit.train import train_dpo

ROWS = 24
CALL = {
    "prompt": [{"role": "user", "content": "what time is it?"}],
    "chosen": [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}],
        },
        {"role": "tool", "content": "12:00", "name": "clock"},
        {"role": "assistant", "content": "noon"},
    ],
    "rejected": [{"role": "assistant", "content": "no idea"}],
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, a cache of the test's own, no bar, and no word of warning."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("asked the network")

    class Said(logging.Handler):
        def __init__(self) -> None:
            super().__init__(logging.WARNING)
            self.lines: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())

    said = Said()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    datasets.disable_progress_bars()
    logging.getLogger("datasets").addHandler(said)
    yield
    logging.getLogger("datasets").removeHandler(said)
    assert said.lines == []


def one_of(path: Path, *names: str, **options: Any) -> Dataset:
    found = load_dataset(str(path), *names, **options)
    assert isinstance(found, Dataset)
    return found


def all_of(path: Path, *names: str) -> dict[str, Dataset]:
    found = load_dataset(str(path), *names)
    assert isinstance(found, DatasetDict)
    return dict(found)


def read(parts: Path | Sequence[Path]) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(part, glob=False) for part in ([parts] if isinstance(parts, Path) else parts)])


def whole(folder: Path, kind: str) -> Path:
    """A dataset with every table: two parts a split, drops, rejects, an audit, a reference, a run; new/ is repaired."""
    rows: list[Any] = (text_rows if kind == "text" else chat_rows)(ROWS)
    said = rows[2]["chosen"]
    rows[2]["chosen"] = f" Sure!{said}" if kind == "text" else [{"role": "assistant", "content": "Sure! yes"}]
    pipeline = built(
        folder,
        [*rows, rows[0], {"prompt": "p"}],
        tiny_llama(folder / "model"),
        kind,
        split={"test_share": 0.4},
        validate={"max_reject_share": 1},
        audit={"min_discordant": 1},
        precompute={"max_length": 64, "max_batch_tokens": 200},
        train={"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3},
    )
    audit_dataset(pipeline)
    precompute_reference(pipeline)
    train_dpo(pipeline)
    repair_dataset(pipeline.dataset, str(folder / "new"), strip_openers=["sure!"], max_dropped=1)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS_PER_PART", 5)
        patch.setattr(batches, "BATCHES_PER_PART", 2)
        return {kind: whole(tmp_path_factory.mktemp(kind), kind) for kind in ("text", "chat")}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Build small things: make(rows, kind=..., **sections) -> the dataset's folder."""

    def build(rows: Sequence[Any], kind: str = "text", **sections: Any) -> Path:
        return Path(built(tmp_path, rows, tmp_path / "no model", kind, **sections).dataset)

    return build


TABLES = {
    "pairs": "dataset/pairs/part-*.parquet",
    "dropped": "dataset/dropped/part-*.parquet",
    "rejects": "dataset/rejects/part-*.parquet",
    "changes": "new/changes/part-*.parquet",
    "tokens": "dataset/audit/tokens.parquet",
    "structure": "dataset/audit/structure.parquet",
    "probe": "dataset/audit/probe.parquet",
    "pair_scores": "dataset/audit/pair_scores.parquet",
    "reference": "dataset/reference/*/part-*.parquet",
    "plan": "dataset/reference/*/plan.parquet",
    "steps": "dataset/runs/1/steps.parquet",
    "perf": "dataset/runs/1/perf.parquet",
    "pair_dynamics": "dataset/runs/1/pair_dynamics/part-*.parquet",
}


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("table", TABLES)
def test_every_table_loads_by_its_files_with_the_values_of_another_reader(
    table: str, kind: str, full: dict[str, Path]
) -> None:
    files = sorted(full[kind].glob(TABLES[table]))
    expected = read(files)
    assert expected.height
    found = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    assert found.to_list() == expected.to_dicts()
    assert found.column_names == expected.columns
    streamed = load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=True)
    assert list(streamed) == expected.to_dicts()


def test_no_table_is_left_out_above(full: dict[str, Path]) -> None:
    listed = {file for pattern in TABLES.values() for file in full["text"].glob(pattern)}
    dataset = full["text"] / "dataset"
    left = {str(path.relative_to(dataset)) for path in dataset.rglob("*.parquet")} - {
        str(path.relative_to(dataset)) for path in listed if dataset in path.parents
    }
    assert {re.sub(r"[0-9a-f]{16}", "KEY", path) for path in left} == {"reference/KEY/dropped.parquet"}


def test_a_table_without_rows_streams_and_has_its_columns(full: dict[str, Path]) -> None:
    (path,) = full["text"].glob("dataset/reference/*/dropped.parquet")
    assert read(path).is_empty()
    streamed = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    assert list(streamed) == []
    assert list(streamed.features) == ["pair_id", "reason"]
    with pytest.raises(ValueError, match="corresponds to no data"):  # why a card lists no table without rows
        load_dataset("parquet", data_files=str(path), split="train")


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_folder_loads_as_its_card_says(kind: str, full: dict[str, Path]) -> None:
    folder = full[kind] / "dataset"
    (key,) = [path.name for path in (folder / "reference").iterdir()]
    plain = ["pairs", "dropped", "rejects", "tokens", "structure", "probe", "pair_scores", "reference"]
    assert get_dataset_config_names(str(folder)) == plain
    pairs = all_of(folder)
    assert list(pairs) == ["train", "test"]
    for split, found in pairs.items():
        files = sorted((folder / "pairs").glob(f"part-{split}-*.parquet"))
        assert len(files) > 1
        assert found.to_list() == read(files).to_dicts()
        assert set(found["split"]) == {split}
        assert one_of(folder, "pairs", split=split).to_list() == found.to_list()
        assert list(load_dataset(str(folder), "pairs", split=split, streaming=True)) == found.to_list()
    for name, pattern in (("dropped", "dropped/*.parquet"), ("tokens", "audit/tokens.parquet")):
        assert one_of(folder, name, split=name).to_list() == read(sorted(folder.glob(pattern))).to_dicts()
    reference = one_of(folder, "reference", split=key)
    parts = sorted((folder / "reference" / key).glob("part-*.parquet"))
    assert len(parts) > 1
    assert reference.to_list() == read(parts).to_dicts()
    with pytest.raises(ValueError, match="Unknown split"):
        load_dataset(str(folder), "dropped", split="train")
    assert get_dataset_config_names(str(full[kind] / "new"))[3] == "changes"
    assert one_of(full[kind] / "new", "changes", split="changes").num_rows == 1


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_types_are_those_of_other_preference_datasets(kind: str, full: dict[str, Path]) -> None:
    folder = full[kind] / "dataset"
    found = one_of(folder, split="train").select_columns(["prompt", "chosen", "rejected"])
    turn: Any = [{"role": "user", "content": "x"}]
    other = Dataset.from_dict({name: [turn if kind == "chat" else "x"] for name in found.column_names})
    assert found.features == other.features
    assert datasets.concatenate_datasets([found, other]).num_rows == found.num_rows + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # of trl and transformers between them
def test_trl_trains_on_the_pairs_as_they_come(kind: str, full: dict[str, Path], tmp_path: Path) -> None:
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    pairs, folder = all_of(full[kind] / "dataset"), full[kind] / "model"
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [], "use_cpu": True}
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), bf16=False, activation_checkpointing=False, disable_tqdm=True, **settings
    )
    trainer = trl.DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # logged with four digits
    assert len(trainer.train_dataset) == pairs["train"].num_rows


def test_tensors_come_out_of_a_reference(full: dict[str, Path]) -> None:
    import torch

    folder = full["text"] / "dataset"
    (key,) = [path.name for path in (folder / "reference").iterdir()]
    row = one_of(folder, "reference", split=key).with_format("torch")[0]
    assert (row["prompt_ids"].dtype, row["ref_chosen_token_logps"].dtype) == (torch.int64, torch.float32)
    assert row["ref_chosen_token_logps"].sum() == pytest.approx(float(row["ref_chosen_logps"]), rel=1e-6)


@pytest.mark.parametrize("extra", [False, True])
def test_messages_load_with_and_without_more_than_role_and_content(extra: bool, make: Any) -> None:
    folder = make([*chat_rows(3), *([CALL] if extra else [])], "chat")
    (part,) = (folder / "pairs").glob("*.parquet")
    found = one_of(folder, split="train")
    assert found.to_list() == read(part).to_dicts()
    keys = {"role", "content", "extra"} if extra else {"role", "content"}
    assert {
        key for row in found for side in ("prompt", "chosen", "rejected") for turn in row[side] for key in turn
    } == keys


def test_a_split_without_pairs_is_none_of_the_datasets(make: Any) -> None:
    folder = make(text_rows(5), split={"test_share": 1.0})
    assert list(all_of(folder)) == ["test"]
    with pytest.raises(ValueError, match="Unknown split"):
        load_dataset(str(folder), split="train")
    assert 'split="test"' in (folder / "README.md").read_text(encoding="utf-8")


def test_a_dataset_without_pairs_says_so_and_its_other_tables_load(make: Any) -> None:
    folder = make([{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(ValueError, match="corresponds to no data"):
        load_dataset(str(folder))
    assert one_of(folder, "dropped", split="dropped")["reason"] == ["identical"]


@pytest.mark.parametrize("name", ["with space", "caf\u00e9", "{a,b}", "a#b", "a%20b", "-x"])
def test_the_name_of_the_folder_does_not_matter(name: str, make: Any, tmp_path: Path) -> None:
    folder = make(text_rows(4))
    moved = folder.rename(tmp_path / name)
    assert one_of(moved, split="train").num_rows == 4


def test_datasets_takes_brackets_in_the_name_of_a_folder_for_a_pattern(make: Any, tmp_path: Path) -> None:
    moved = make(text_rows(4)).rename(tmp_path / "data[1]")
    with pytest.raises(FileNotFoundError):  # theirs: docs/huggingface.md says so
        load_dataset(str(moved))


def test_a_card_with_windows_line_ends_is_read_alike(make: Any) -> None:
    folder = make(text_rows(4))
    card = folder / "README.md"
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    assert list(all_of(folder)) == ["train"]


def test_a_part_that_is_missing_is_named(full: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full["text"] / "dataset", tmp_path / "copy"))
    (folder / "pairs" / "part-train-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs/part-train-00001\.parquet"):
        load_dataset(str(folder))


@pytest.mark.parametrize("name", ["pairs", "reference", "dropped"])
def test_a_part_that_lost_rows_is_refused_by_their_number(name: str, full: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full["text"] / "dataset", tmp_path / "copy"))
    part = sorted(folder.glob({"reference": "reference/*/part-*.parquet"}.get(name, f"{name}/part-*.parquet")))[0]
    table = pl.read_parquet(part)
    pl.concat([table, table.head(1)]).write_parquet(part)
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        load_dataset(str(folder), name)


def test_a_file_that_no_table_lists_is_not_loaded(full: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full["text"] / "dataset", tmp_path / "copy"))
    before = one_of(folder, split="train").num_rows
    shutil.copyfile(folder / "pairs" / "part-test-00000.parquet", folder / "pairs" / "part-train-00009.parquet")
    assert one_of(folder, split="train").num_rows == before


def test_very_many_parts_are_one_pattern(
    full: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(full["text"] / "dataset", tmp_path / "copy"))
    (key,) = [path.name for path in (folder / "reference").iterdir()]
    before = [*all_of(folder).values(), one_of(folder, "reference", split=key)]
    monkeypatch.setattr(front_matter, "MOST_PATHS", 1)
    renew_papers(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert '- "pairs/part-train-*.parquet"' in card
    assert f'- "reference/{key}/part-*.parquet"' in card
    assert "part-00001" not in card
    after = [*all_of(folder).values(), one_of(folder, "reference", split=key)]
    assert [found.to_list() for found in after] == [found.to_list() for found in before]


def test_what_lies_beside_the_tables_does_not_matter(full: dict[str, Path], tmp_path: Path) -> None:
    """runs/ with models and JSON, hidden files and locks; all of it away is what an upload may look like."""
    folder = Path(shutil.copytree(full["text"] / "dataset", tmp_path / "copy"))
    before = {split: found.to_list() for split, found in all_of(folder).items()}
    (folder / ".building").mkdir()
    (folder / ".building" / "part-train-00000.parquet").write_bytes(b"half")
    assert {split: found.to_list() for split, found in all_of(folder).items()} == before
    for name in (".building", "runs"):
        shutil.rmtree(folder / name)
    (folder / ".lock").unlink()
    assert {split: found.to_list() for split, found in all_of(folder).items()} == before


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_other_readers_of_folders_read_the_pairs(kind: str, full: dict[str, Path]) -> None:
    folder = full[kind] / "dataset" / "pairs"
    expected = read(sorted(folder.iterdir()))
    ids = sorted(expected["pair_id"])
    assert sorted(pl.read_parquet(folder)["pair_id"]) == ids
    assert sorted(pd.read_parquet(folder)["pair_id"]) == ids
    assert sorted(pad.dataset(folder).to_table(columns=["pair_id"])["pair_id"].to_pylist()) == ids
    with duckdb.connect() as connection:
        connection.execute(f"select count(*) from '{folder}/*.parquet'")
        assert connection.fetchall() == [(len(ids),)]


def test_the_card_is_one_for_the_hub(full: dict[str, Path]) -> None:
    path = full["chat"] / "dataset" / "README.md"
    loaded = DatasetCard.load(path)
    told: dict[str, Any] = vars(loaded.data)
    assert told["configs"][0]["config_name"] == "pairs"
    assert loaded.text.lstrip().startswith("# Preference pairs\n")
    again = DatasetCardData(**told)  # takes known keys, and keeps their values
    assert vars(again) == told
    filled = {name for name, value in told.items() if value is not None}
    assert filled == {"pretty_name", "task_categories", "tags", "size_categories", "configs", "dataset_info"}


def test_the_lines_that_the_card_shows_for_datasets_run(full: dict[str, Path]) -> None:
    folder = full["text"] / "dataset"
    card = (folder / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(from datasets .*?)```", card, re.DOTALL)
    assert block is not None
    found: dict[str, Any] = {}
    exec(block[1].replace("DATASET", str(folder)), found)
    assert {len(found[name]) > 0 for name in ("pairs", "dropped", "reference")} == {True}


def test_the_card_names_the_reference_and_not_the_machine(full: dict[str, Path]) -> None:
    folder = full["text"] / "dataset"
    card = (folder / "README.md").read_text(encoding="utf-8")
    (path,) = (folder / "reference").glob("*/reference.json")
    identity = pl.read_json(path.read_bytes().replace(b"\n", b""))["identity"][0]
    assert f"| `{path.parent.name}` | `model` | 64 | float32 | {ROWS} | 0 | `{identity['weights_sha256']}` |" in card
    assert str(full["text"]) not in card


def test_an_addition_keeps_the_splits_of_a_loaded_dataset(tmp_path: Path) -> None:
    rows = text_rows(40)
    pipeline: Pipeline = built(tmp_path, rows[:20], tmp_path / "model", split={"test_share": 0.3})
    before = {split: set(found["pair_id"]) for split, found in all_of(Path(pipeline.dataset)).items()}
    import json

    import yaml

    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]), encoding="utf-8")
    settings = yaml.safe_load((tmp_path / "pipeline.yaml").read_text(encoding="utf-8"))
    settings["sources"].append({"path": str(more), "format": "pairs"})
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert build_dataset(load_pipeline(tmp_path / "longer.yaml")).added is not None
    after = {split: set(found["pair_id"]) for split, found in all_of(Path(pipeline.dataset)).items()}
    assert {split: before[split] <= after[split] for split in before} == {"train": True, "test": True}
    assert sum(map(len, after.values())) == 40


# docs/huggingface.md


def documented(language: str) -> list[str]:
    page = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_documented_lines_load_a_dataset(full: dict[str, Path]) -> None:
    folder = full["chat"] / "dataset"
    (block,) = documented("python")
    found: dict[str, Any] = {}
    exec(block.replace("DATASET", str(folder)), found)
    assert [found["key"]] == [path.name for path in (folder / "reference").iterdir()]
    assert len(found["pairs"]) + len(found["held_out"]) == len(found["reference"]) == ROWS
    assert set(found["dropped"]["reason"]) == {"duplicate"}


def test_the_documented_command_verifies(full: dict[str, Path], prefkit: Prefkit) -> None:
    (block,) = documented("sh")
    name, *words = block.split()
    assert (name, prefkit(*(str(full["chat"] / "dataset") if word == "DATASET" else word for word in words)).code) == (
        "prefkit",
        0,
    )


def test_the_documented_settings_are_a_pipelines(tmp_path: Path) -> None:
    (block,) = documented("yaml")
    (tmp_path / "pipeline.yaml").write_text(f"dataset: built\n{block}", encoding="utf-8")
    pipeline = load_pipeline(tmp_path / "pipeline.yaml")
    assert (pipeline.sources[0].license, pipeline.card.language) == ("cc-by-4.0", ["en"])


def test_the_documented_configs_are_those_of_a_card(full: dict[str, Path]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(front_matter.CONFIGS)
    there = {
        *get_dataset_config_names(str(full["text"] / "dataset")),
        *get_dataset_config_names(str(full["text"] / "new")),
    }
    assert there == named
    assert "first twenty findings" in page
    assert card.SHOWN_FINDINGS == 20
