"""An export with a reference: sums beside the very pairs they are of; what cannot have them is left out by name."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from command import Prefkit
from tiny import built, chat_rows, text_rows, tiny_llama, write_rows

from prefkit import export_dataset, scored_rows
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.detection import detect_format
from prefkit.errors import DatasetError, GateError, InputError
from prefkit.export import Exported
from prefkit.reference import precompute_reference
from prefkit.store import list_references, read_json
from prefkit.tables import write_parquet

SUMS = ["ref_chosen_logps", "ref_rejected_logps"]
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
FILES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"]
ODD = [
    # of 128 tokens at most: both sides, and so the pair, are cut
    {"prompt": "Note: long", "chosen": " river stone" * 90, "rejected": " quiet morning" * 90},
    {"prompt": "Note: </s> here", "chosen": " one", "rejected": " two"},  # spells the end token
    {"prompt": "Note: riv", "chosen": "er", "rejected": "al"},  # `river` is one token
    {"prompt": " ".join(["winter"] * 200), "chosen": " three", "rejected": " four"},  # no room for a completion
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets of text (with the odd pairs) and of messages, a third of their pairs held out, each with a reference."""
    found = {}
    for kind, rows in (("text", [*text_rows(30), *ODD]), ("chat", chat_rows(30))):
        folder = tmp_path_factory.mktemp(kind)
        more = {"split": {"test_share": 0.3}, "precompute": {"max_boundary_share": 1.0}}
        precompute_reference(built(folder, rows, tiny_llama(folder / "model"), kind, **more))
        found[kind] = folder / "dataset"
    return found


def export(target: Path, to: str, out: Path, **options: Any) -> Exported:
    return export_dataset(str(target), to, str(out), **{"overwrite": True, **options})


def pairs_of(dataset: Path) -> pl.DataFrame:
    parts = read_json(dataset / "manifest.json")["parts"]["pairs"]
    return pl.concat([pl.read_parquet(dataset / "pairs" / part["file"]) for part in parts])


def reference_of(dataset: Path) -> dict[str, dict[str, Any]]:
    rows = pl.concat([pl.read_parquet(path) for path in dataset.glob("reference/*/part-*.parquet")])
    return {row["pair_id"]: row for row in rows.to_dicts()}


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pl.read_parquet(path).to_dicts()
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    found: list[dict[str, Any]] = json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
    return found


def listed(out: Path) -> dict[str, list[str]]:
    """Reason -> pair_ids of what was left out."""
    found: dict[str, list[str]] = {}
    for row in read(out.with_name(f"{out.name}.left_out.jsonl")):
        found.setdefault(row["reason"], []).append(row["pair_id"])
    return found


def odd_pairs(dataset: Path) -> dict[str, str]:
    """Beginning of the prompt -> pair_id of the odd pairs."""
    prompts = {row["prompt"][:10]: "" for row in ODD}
    rows = pairs_of(dataset).select("prompt", "pair_id").rows()
    return {prompt[:10]: pair for prompt, pair in rows if prompt[:10] in prompts}


# what is written


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("to", ["trl", "pairs"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_sums_stand_beside_the_texts_that_they_are_of_in_the_order_of_the_pairs(
    kind: str, to: str, name: str, scored: dict[str, Path], tmp_path: Path
) -> None:
    dataset, out = scored[kind], tmp_path / name
    done = export(dataset, to, out, with_reference=True)
    reference, rows = reference_of(dataset), read(out)
    odd = {*odd_pairs(dataset).values()} if kind == "text" else set()
    kept = [row for row in pairs_of(dataset).to_dicts() if row["pair_id"] not in odd]
    assert len(rows) == len(kept) == done.files[str(out)] == 30
    for row, pair in zip(rows, kept, strict=True):
        assert (row["prompt"], row["chosen"], row["rejected"]) == (pair["prompt"], pair["chosen"], pair["rejected"])
        expected = reference[pair["pair_id"]]
        assert [np.float32(row[side]) for side in SUMS] == [np.float32(expected[side]) for side in SUMS]
        assert [row[side] for side in SUMS] == [expected[side] for side in SUMS]  # not a digit is lost
    if name.endswith("parquet"):
        assert [pl.read_parquet(out).schema[side] for side in SUMS] == [pl.Float32, pl.Float32]


@pytest.mark.parametrize("name", FILES)
def test_a_tokenized_export_holds_the_scored_tokens_of_every_scored_pair_in_the_order_of_the_pairs(
    name: str, scored: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored_rows, "TOKEN_ROWS", 7)  # more partitions than one
    dataset, out = scored["text"], tmp_path / name
    done = export(dataset, "trl_tokenized", out, split="train")
    reference = reference_of(dataset)
    train = pairs_of(dataset).filter(pl.col("split") == "train")["pair_id"]
    expected = [{name: reference[pair][name] for name in [*IDS, *SUMS]} for pair in train if pair in reference]
    assert read(out) == expected
    assert done.files == {str(out): len(expected)}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if name.endswith("parquet"):
        dtypes = [*[pl.List(pl.Int32)] * 3, *[pl.Float32] * 2]
        assert pl.read_parquet(out).schema == dict(zip([*IDS, *SUMS], dtypes, strict=True))


def test_a_directory_gets_a_file_a_split(scored: dict[str, Path], tmp_path: Path) -> None:
    dataset, out = scored["chat"], tmp_path / "out"
    for to in ("trl", "trl_tokenized"):
        done = export(dataset, to, out, with_reference=True)
        reference = reference_of(dataset)
        for split in ("train", "test"):
            kept = pairs_of(dataset).filter(pl.col("split") == split)["pair_id"].to_list()
            assert [row[SUMS[0]] for row in read(out / f"{split}.jsonl")] == [reference[pair][SUMS[0]] for pair in kept]
            assert done.files[str(out / f"{split}.jsonl")] == len(kept) > 3
        assert done.beside == [str(tmp_path / "out.reference.json")]


def test_what_lies_beside_says_whose_log_probs_they_are_and_goes_with_the_next_export(
    scored: dict[str, Path], tmp_path: Path
) -> None:
    dataset, out = scored["text"], tmp_path / "a.parquet"
    done = export(dataset, "trl", out, with_reference=True)
    (key,) = list_references(dataset)
    assert (done.reference, done.beside) == (key, [f"{out}.reference.json"])
    told = read_json(tmp_path / "a.parquet.reference.json")
    assert told["key"] == key
    assert told["identity"] == read_json(dataset / "reference" / key / "reference.json")["identity"]
    assert told["files"] == {"a.parquet": 30}
    assert "the SUM over its tokens, in nats" in told["columns"]["ref_chosen_logps"]
    done = export(dataset, "trl", out)
    assert (done.reference, done.beside, done.files) == (None, [], {str(out): 34})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


# what is left out


@pytest.mark.parametrize("to", ["trl", "pairs"])
def test_a_pair_whose_scored_tokens_are_not_its_text_has_no_sums_beside_its_text(
    to: str, scored: dict[str, Path], tmp_path: Path
) -> None:
    dataset, out = scored["text"], tmp_path / "a.jsonl"
    odd = odd_pairs(dataset)
    assert len(odd) == 4
    done = export(dataset, to, out, with_reference=True)
    assert listed(out) == {
        "truncated": [odd["Note: long"]],
        "control_tokens": [odd["Note: </s>"]],
        "prompt_boundary": [odd["Note: riv"]],
        "not_in_reference": [odd["winter win"]],
    }
    assert done.left_out == dict.fromkeys(("truncated", "control_tokens", "prompt_boundary", "not_in_reference"), 1)
    export(dataset, "trl_tokenized", out)
    assert listed(out) == {"not_in_reference": [odd["winter win"]]}
    listed_line = read(tmp_path / "a.jsonl.left_out.jsonl")[0]
    assert listed_line["line"] == 34
    assert listed_line["source"].endswith("pairs.jsonl")


def test_nothing_of_another_split_is_listed(scored: dict[str, Path], tmp_path: Path) -> None:
    dataset, odd = scored["text"], odd_pairs(scored["text"])
    split_of = dict(pairs_of(dataset).select("pair_id", "split").rows())
    found = []
    for split in ("train", "test"):
        for to in ("trl", "trl_tokenized"):
            out = tmp_path / f"{split}.{to}.jsonl"
            if export(dataset, to, out, split=split, with_reference=True).left_out_list:
                found += [pair for pairs in listed(out).values() for pair in pairs]
                assert {split_of[pair] for pairs in listed(out).values() for pair in pairs} == {split}
    assert sorted(found) == sorted([*odd.values(), odd["winter win"]])


# which reference, and whether it is one


def test_one_of_several_references_is_named_by_its_key(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    for max_length in (64, 128):
        precompute_reference(built(tmp_path, text_rows(6), model, precompute={"max_length": max_length}))
    dataset, out = tmp_path / "dataset", tmp_path / "a.jsonl"
    with pytest.raises(GateError, match="there are several references:"):
        export(dataset, "trl", out, with_reference=True)
    with pytest.raises(GateError, match="there are several references:"):
        export(dataset, "trl_tokenized", out)
    with pytest.raises(DatasetError, match="no reference 0123"):
        export(dataset, "trl", out, reference="0123")
    assert not out.exists()
    for key in list_references(dataset):
        assert export(dataset, "trl", out, reference=key).reference == key
        assert read_json(tmp_path / "a.jsonl.reference.json")["key"] == key


def test_an_export_without_a_reference_does_not_ask_for_one(tmp_path: Path) -> None:
    built(tmp_path, text_rows(6), tiny_llama(tmp_path / "model"))
    dataset, out = tmp_path / "dataset", tmp_path / "a.jsonl"
    assert export(dataset, "trl", out).files == {str(out): 6}
    for to in ("trl", "trl_tokenized"):
        with pytest.raises(DatasetError, match="no finished reference"):
            export(dataset, to, tmp_path / "b.jsonl", with_reference=True)
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize("to", ["trl", "trl_tokenized"])
def test_a_reference_that_was_changed_is_not_exported(to: str, scored: dict[str, Path], tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(scored["text"], tmp_path / "dataset"))
    part = next(dataset.glob("reference/*/part-*.parquet"))
    write_parquet(part, pl.read_parquet(part).with_columns(pl.col("ref_chosen_logps") + 1))
    with pytest.raises(GateError, match="part was changed: its sha256 is not the recorded one"):
        export(dataset, to, tmp_path / "out.jsonl", with_reference=True)
    part.unlink()
    with pytest.raises(GateError, match="part is missing"):
        export(dataset, to, tmp_path / "out.jsonl", with_reference=True)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_plan_that_does_not_tell_of_a_pair_is_refused(scored: dict[str, Path], tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(scored["text"], tmp_path / "dataset"))
    path = next(dataset.glob("reference/*/plan.parquet"))
    plan = pl.read_parquet(path)
    write_parquet(path, plan[2:])
    with pytest.raises(GateError, match="2 pairs not in the plan: " + plan["pair_id"][0][:12]):
        export(dataset, "trl", tmp_path / "out.jsonl", with_reference=True)
    path.write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="cannot be read: ") as refused:
        export(dataset, "trl", tmp_path / "out.jsonl", with_reference=True)
    assert refused.value.where == str(path)
    assert refused.value.hint == "delete the reference and type prefkit precompute again"


def test_a_format_without_a_place_for_log_probs_is_refused(scored: dict[str, Path], tmp_path: Path) -> None:
    for to in ("openrlhf", "trl_unpaired", "llamafactory_sharegpt", "axolotl"):
        with pytest.raises(InputError) as refused:
            export(scored["text"], to, tmp_path / "out.jsonl", with_reference=True)
        assert refused.value.message == f"--with-reference: the format {to} has no place for reference log-probs"
        assert refused.value.expected == "--to pairs, trl, trl_tokenized"
        assert refused.value.where == str(scored["text"])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_has_no_reference(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", text_rows(2))
    for to, options in (("trl", {"with_reference": True}), ("trl", {"reference": "k"}), ("trl_tokenized", {})):
        with pytest.raises(InputError, match="a file has no reference: log-probs are exported from a dataset") as no:
            export(source, to, tmp_path / "out.jsonl", **options)
        assert no.value.hint == "prefkit build, and prefkit precompute"


def test_what_lies_beside_is_not_written_over_what_is_read(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "out.jsonl.reference.json", text_rows(2))
    with pytest.raises(InputError, match="an export cannot be written over what it reads"):
        export(source, "trl", tmp_path / "out.jsonl", source_format="trl")


# read again


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("to", ["trl", "pairs"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_sums_do_not_disturb_a_build_of_what_was_exported(
    kind: str, to: str, name: str, scored: dict[str, Path], tmp_path: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    out = tmp_path / name
    export(scored[kind], to, out, with_reference=True)
    assert detect_format(str(out)).format == to
    pipeline = pipeline_of({"path": str(out)}, kind=kind, split={"test_share": 0})
    assert build_dataset(pipeline).counts["pairs"] == 30
    odd = {*odd_pairs(scored[kind]).values()} if kind == "text" else set()
    again = set(pairs_of(tmp_path / "dataset")["pair_id"])
    assert again == set(pairs_of(scored[kind])["pair_id"]) - odd


@pytest.mark.parametrize("to", ["trl", "trl_tokenized"])
@pytest.mark.parametrize("name", FILES)
def test_datasets_reads_every_kind_of_file(name: str, to: str, scored: dict[str, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / name
    export(scored["chat"], to, out, with_reference=True)
    form = "parquet" if name.endswith("parquet") else "json"
    loaded = datasets.load_dataset(form, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    reference = reference_of(scored["chat"])
    expected = [reference[pair] for pair in pairs_of(scored["chat"])["pair_id"]]
    for side in SUMS:
        assert np.array(loaded[side], np.float32).tolist() == [row[side] for row in expected]
        assert loaded.features[side].dtype == ("float32" if form == "parquet" else "float64")
    if to == "trl_tokenized":
        for side in IDS:
            assert [list(ids) for ids in loaded[side]] == [row[side] for row in expected]
            assert loaded.features[side].feature.dtype == ("int32" if form == "parquet" else "int64")


# the command


def test_the_command_says_what_lies_beside_and_what_is_left_out(
    prefkit: Prefkit, scored: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(scored["text"], tmp_path / "dataset")
    (key,) = list_references(tmp_path / "dataset")
    ended = prefkit("export", "dataset", "--to", "trl", "--out", "a.parquet", "--with-reference")
    told = [line.strip() for line in ended.out.splitlines()]
    assert told[:2] == ["a.parquet: 30 rows", "a.parquet.reference.json: goes with them"]
    reasons = ("control_tokens", "not_in_reference", "prompt_boundary", "truncated")
    assert sorted(told[2:6]) == [f"1 left out: {reason}" for reason in reasons]
    assert told[6:] == [
        "listed in a.parquet.left_out.jsonl",
        "train and test pairs in one file: --split train leaves the held-out pairs out",
    ]
    ended = prefkit("export", "dataset", "--to", "trl", "--out", "b.jsonl", "--reference", key, "--json")
    assert ended.last_json()["reference"] == key
    ended = prefkit("export", "dataset", "--to", "trl", "--out", "c.jsonl", "--reference", "none", "--json")
    assert (ended.code, ended.error()["message"]) == (2, "no reference none")


def test_what_is_told_of_a_folder_is_told_of_both_splits_however_they_were_written(
    scored: dict[str, Path], tmp_path: Path
) -> None:
    whole = export(scored["chat"], "trl", tmp_path / "whole", with_reference=True)
    for split in ("train", "test"):
        export(scored["chat"], "trl", tmp_path / "split", split=split, with_reference=True)
    told = [read_json(tmp_path / f"{name}.reference.json") for name in ("whole", "split")]
    assert told[0]["files"] == {Path(name).name: rows for name, rows in whole.files.items()}
    assert told[0]["files"].keys() == {"train.jsonl", "test.jsonl"}
    assert told[1] == told[0]
