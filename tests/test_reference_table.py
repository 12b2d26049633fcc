"""A reference on disk is found by its key, or by being the only one, and refused where no pass can have written it."""

import shutil
from pathlib import Path

import polars as pl
import pytest
from tiny import built, text_rows, tiny_llama

from prefkit.errors import DatasetError, GateError
from prefkit.format import REFERENCE_JSON, REFERENCES, part_name
from prefkit.reference import precompute_reference
from prefkit.reference_table import (
    check_reference,
    open_reference,
    pick_reference,
    reference_keys,
    reference_rows,
    scored_blocks,
)
from prefkit.store import list_references, write_json
from prefkit.tables import write_parquet


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with two references, one of max_length 48 and one of 64."""
    folder = tmp_path_factory.mktemp("table")
    model = tiny_llama(folder / "model")
    for max_length in (48, 64):
        pipeline = built(folder, text_rows(12), model, precompute={"max_length": max_length})
        precompute_reference(pipeline)
    return folder / "dataset"


def key_of(dataset: Path, max_length: int) -> str:
    found = {pick_reference(dataset, key)[1]["identity"]["max_length"]: key for key in list_references(dataset)}
    return found[max_length]


def test_several_references_are_listed_and_one_is_asked_for(two: Path) -> None:
    with pytest.raises(GateError, match="there are several references:") as refused:
        pick_reference(two, None)
    assert "max_length 48" in str(refused.value)
    assert "max_length 64" in str(refused.value)
    assert refused.value.hint == "name one by its key"
    assert pick_reference(two, key_of(two, 64))[1]["identity"]["max_length"] == 64


def test_the_only_reference_needs_no_name_and_another_name_is_unknown(two: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(two, tmp_path / "dataset"))
    shutil.rmtree(dataset / REFERENCES / key_of(two, 48))
    assert pick_reference(dataset, None)[0] == key_of(two, 64)
    with pytest.raises(DatasetError, match="no reference 0123456789abcdef") as refused:
        pick_reference(dataset, "0123456789abcdef")
    assert refused.value.expected == f"one of {key_of(two, 64)}"
    shutil.rmtree(dataset / REFERENCES)
    with pytest.raises(DatasetError, match="no finished reference"):
        pick_reference(dataset, None)


def test_as_much_of_a_key_as_no_other_has_names_it(tmp_path: Path) -> None:
    keys = ["0011223344556677", "0011aabbccddeeff", "f000000000000000"]
    for key in keys:
        write_json(tmp_path / REFERENCES / key / REFERENCE_JSON, {})
    assert reference_keys(tmp_path, "f") == keys[2:]
    assert reference_keys(tmp_path, "00112") == keys[:1]
    assert reference_keys(tmp_path, keys[1]) == keys[1:2]
    with pytest.raises(DatasetError, match="no reference "):
        reference_keys(tmp_path, "")
    with pytest.raises(DatasetError, match="several references begin with 0011") as refused:
        reference_keys(tmp_path, "0011")
    assert refused.value.expected == "one of 0011223344556677, 0011aabbccddeeff"


def test_rows_come_in_the_order_that_is_asked_for_whatever_part_they_lie_in(two: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(two, tmp_path / "dataset"))
    key = key_of(two, 64)
    folder, recorded = dataset / REFERENCES / key, pick_reference(dataset, key)[1]
    table = pl.read_parquet(folder / part_name(0))
    parts = [write_parquet(folder / part_name(i), table[i * 4 : i * 4 + 4])._asdict() for i in range(3)]
    write_json(folder / "reference.json", recorded | {"parts": parts})
    wanted = table["pair_id"].reverse().to_list()
    rows = reference_rows(dataset, key, pick_reference(dataset, key)[1], wanted)
    assert rows["pair_id"].to_list() == wanted
    assert rows["ref_chosen_logps"].to_list() == table["ref_chosen_logps"].reverse().to_list()


def test_an_opened_reference_gives_the_rows_of_a_split_in_blocks(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(20), tiny_llama(tmp_path / "model"), split={"test_share": 0.3})
    done = precompute_reference(pipeline)
    opened = open_reference(tmp_path / "dataset")
    assert opened.folder.name == done.key
    pairs = pl.read_parquet(tmp_path / "dataset" / "pairs" / "*.parquet")
    table = pl.read_parquet(opened.folder / part_name(0))
    for split in ("train", "test", None):
        wanted = pairs if split is None else pairs.filter(pl.col("split") == split)
        assert wanted.height > 2
        blocks = [*scored_blocks(opened, split, rows=3)]
        assert max(block.height for block in blocks) <= 3
        rows = pl.concat(blocks)
        expected = table.join(wanted.select("pair_id", "split", "weight"), on="pair_id", how="inner")
        assert rows.sort("pair_id").equals(expected.sort("pair_id").select(rows.columns))
        assert rows["pair_id"].to_list() == [pair for pair in table["pair_id"] if pair in set(wanted["pair_id"])]


def test_a_dataset_whose_pairs_were_changed_is_not_opened(two: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(two, tmp_path / "dataset"))
    (part,) = (dataset / "pairs").iterdir()
    pl.read_parquet(part).with_columns(weight=2.0).write_parquet(part)
    with pytest.raises(DatasetError, match="part was changed: its sha256 is not the recorded one"):
        open_reference(dataset, key_of(two, 64))


def test_broken_rows_of_all_parts_are_counted_together_and_those_of_other_pairs_are_not(
    two: Path, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(two, tmp_path / "dataset"))
    key = key_of(two, 64)
    folder, recorded = dataset / REFERENCES / key, pick_reference(dataset, key)[1]
    table = pl.read_parquet(folder / part_name(0)).with_columns(ref_chosen_logps=pl.lit(None, pl.Float32))
    parts = [write_parquet(folder / part_name(i), table[i * 6 : i * 6 + 6])._asdict() for i in range(2)]
    ids = table["pair_id"].to_list()
    with pytest.raises(GateError, match="12 pairs with a null in ref_chosen_logps") as refused:
        check_reference(dataset, key, recorded | {"parts": parts}, ids[::-1])
    assert ", ".join(pair[:12] for pair in ids[::-1][:10]) in str(refused.value)
    with pytest.raises(GateError, match="3 pairs with a null in ref_chosen_logps"):
        check_reference(dataset, key, recorded | {"parts": parts}, ids[4:7])
    with pytest.raises(GateError, match="1 pairs missing: someone-else"):
        check_reference(dataset, key, recorded | {"parts": parts}, [ids[0], "someone-else"])
