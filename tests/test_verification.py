"""`prefkit info --verify`: a dataset that was handed around is what it was, or the first file that is not is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit
from tiny import built, text_rows, tiny_llama, write_rows

from prefkit.audits import audit_dataset
from prefkit.errors import DatasetError
from prefkit.info import dataset_info
from prefkit.reference import precompute_reference
from prefkit.sources import file_sha256
from prefkit.verification import _check_template, verify_dataset

ROWS = 12


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    pipeline = built(folder, text_rows(ROWS), tiny_llama(folder / "model"), split={"test_share": 0.3})
    audit_dataset(pipeline)
    precompute_reference(pipeline)
    return Path(pipeline.dataset)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def reference_of(dataset: Path) -> Path:
    (folder,) = (dataset / "reference").iterdir()
    return folder


def test_what_is_as_it_was_written_is_counted(copy: Path) -> None:
    found, name = verify_dataset(copy), f"reference/{reference_of(copy).name}"
    assert found.manifest_sha256 == file_sha256(copy / "manifest.json")
    assert found.parts == {"pairs": 2, "dropped": 1, "rejects": 1, "audit": 4, name: 2}
    assert (found.rows["pairs"], found.rows["dropped"], found.rows[name]) == (ROWS, 0, ROWS)
    assert found.card
    for table, rows in found.rows.items():  # pairs of a reference: one file is its plan, which is not counted
        files = [file for file in (copy / table).glob("*.parquet") if file.name != "plan.parquet"]
        assert (len(files), sum(pl.read_parquet(file).height for file in files)) == (found.parts[table], rows)


def test_a_dataset_without_audit_and_reference_is_verified(copy: Path) -> None:
    shutil.rmtree(copy / "audit")
    shutil.rmtree(copy / "reference")
    found = verify_dataset(copy)
    assert list(found.parts) == ["dropped", "pairs", "rejects"]
    assert not found.card  # it tells of both


def edit(path: Path) -> None:
    """One text of one row, the file otherwise sound."""
    table = pl.read_parquet(path)
    name = table.columns[0]
    table.with_columns(pl.col(name).shuffle(seed=1)).write_parquet(path)


CHANGED = "part was changed: its sha256 is not the recorded one"
SPOILED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an edited pair": (lambda d: edit(d / "pairs/part-test-00000.parquet"), "pairs/part-test-00000.parquet", CHANGED),
    "a lost part": (
        lambda d: (d / "dropped/part-00000.parquet").unlink(),
        "dropped/part-00000.parquet",
        "part is missing",
    ),
    "a part too many": (
        lambda d: shutil.copy(d / "pairs/part-test-00000.parquet", d / "pairs/part-train-00001.parquet"),
        "pairs/part-train-00001.parquet",
        "no part of the dataset",
    ),
    "an edited table of the audit": (lambda d: edit(d / "audit/tokens.parquet"), "audit/tokens.parquet", CHANGED),
    "an audit of other keys": (
        lambda d: (d / "audit/audit.json").write_text('{"verdict": "pass"}', encoding="utf-8"),
        "audit/audit.json",
        "is damaged at reason",
    ),
    "an edited log-prob": (
        lambda d: edit(reference_of(d) / "part-00000.parquet"),
        "reference/KEY/part-00000.parquet",
        CHANGED,
    ),
    "an edited plan of a reference": (
        lambda d: edit(reference_of(d) / "plan.parquet"),
        "reference/KEY/plan.parquet",
        CHANGED,
    ),
    "a part too many of a reference": (
        lambda d: shutil.copy(reference_of(d) / "part-00000.parquet", reference_of(d) / "part-00001.parquet"),
        "reference/KEY/part-00001.parquet",
        "no part of the dataset",
    ),
    "a reference of another model": (
        lambda d: (reference_of(d) / "reference.json").write_text(
            (reference_of(d) / "reference.json").read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'),
            encoding="utf-8",
        ),
        "reference/KEY/reference.json",
        "its identity is not the one that its key was made from: it was changed",
    ),
    "a newer format": (
        lambda d: (d / "manifest.json").write_text('{"format_version": 999}', encoding="utf-8"),
        "manifest.json",
        "format_version is 999",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_as_it_was_written_ends_with_2_by_its_name(name: str, copy: Path, prefkit: Prefkit) -> None:
    spoil, where, message = SPOILED[name]
    key = reference_of(copy).name
    spoil(copy)
    ended = prefkit("info", str(copy), "--verify", "--json")
    assert ended.code == 2
    said = ended.error()
    assert (said["kind"], said["message"]) == ("DatasetError", message)
    assert said["where"] == str(copy / where.replace("KEY", key))


def rewrite(dataset: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest changed, and nothing else."""
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (dataset / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def moved(dataset: Path) -> None:
    """A pair of train as one of test, in its old part, with the hash of what lies there now."""
    path = dataset / "pairs/part-train-00000.parquet"
    table = pl.read_parquet(path)
    first = pl.int_range(pl.len()) == 0
    table.with_columns(split=pl.when(first).then(pl.lit("test")).otherwise("split")).write_parquet(path)
    rewrite(dataset, lambda m: m["parts"]["pairs"][0].update(sha256=file_sha256(path)))


def counted(dataset: Path) -> dict[str, int]:
    counts: dict[str, int] = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))["counts"]
    return counts


def test_counts_that_are_not_those_of_the_parts_are_refused(copy: Path) -> None:
    counts = counted(copy)
    rewrite(copy, lambda m: m["counts"].update(pairs=999))
    with pytest.raises(DatasetError) as refused:
        verify_dataset(copy)
    place = f"{copy / 'manifest.json'}: counts"
    assert str(refused.value).startswith(f"{place}.pairs is 999\n  expected: {ROWS}, the rows of its parts\n")
    rewrite(copy, lambda m: m["counts"].update(pairs=ROWS, train=0, test=ROWS))
    with pytest.raises(DatasetError) as refused:
        verify_dataset(copy)
    told = f"{place}.train is 0\n  expected: {counts['train']}, the rows of its parts\n"
    assert str(refused.value).startswith(told)


def test_a_part_with_other_rows_than_the_manifest_says_is_refused(copy: Path) -> None:
    rows = counted(copy)["train"]
    rewrite(copy, lambda m: m["parts"]["pairs"][0].update(rows=rows + 1))
    with pytest.raises(DatasetError) as refused:
        verify_dataset(copy)
    where = copy / "pairs/part-train-00000.parquet"
    told = f"{where}: the manifest says {rows + 1} rows\n  expected: {rows}, as there are\n"
    assert str(refused.value).startswith(told)


def test_a_pair_of_another_split_than_its_part_is_refused(copy: Path) -> None:
    moved(copy)
    with pytest.raises(DatasetError) as refused:
        verify_dataset(copy)
    assert refused.value.where == str(copy / "pairs/part-train-00000.parquet")
    assert refused.value.message == "holds pairs of the split test, which its name does not say"


def test_the_template_of_a_reference_is_the_one_of_its_identity(tmp_path: Path) -> None:
    template, wanted = tmp_path / "chat_template.jinja", hashlib.sha256("{{ m }}\r\n\u96ea".encode()).hexdigest()
    template.write_bytes("{{ m }}\r\n\u96ea".encode())
    _check_template(template, wanted)
    _check_template(tmp_path / "none", None)
    template.write_text("{{ n }}")
    with pytest.raises(DatasetError) as refused:
        _check_template(template, wanted)
    assert refused.value.where == str(template)
    assert refused.value.message == "was changed: its sha256 is not that of the identity"
    template.unlink()
    with pytest.raises(DatasetError, match="is missing"):
        _check_template(template, wanted)


def test_a_reference_that_lacks_pairs_is_not_whole(tmp_path: Path, original: Path) -> None:
    rows = text_rows(ROWS + 3)
    pipeline = built(tmp_path, rows[:ROWS], tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    write_rows(tmp_path / "pairs.jsonl", rows)
    from prefkit.build import build_dataset

    build_dataset(pipeline)
    with pytest.raises(DatasetError, match="3 pairs missing: ") as refused:
        verify_dataset(pipeline.dataset)
    assert refused.value.hint == "prefkit precompute TARGET scores them"


def test_a_card_that_somebody_edited_is_told_and_no_error(copy: Path, prefkit: Prefkit) -> None:
    assert "is not the one that prefkit writes" not in prefkit("info", str(copy), "--verify").out
    with (copy / "README.md").open("a", encoding="utf-8") as card:
        card.write("our own words\n")
    ended = prefkit("info", str(copy), "--verify")
    assert ended.code == 0
    assert "  README.md is not the one that prefkit writes\n" in ended.out
    (copy / "README.md").unlink()
    assert not verify_dataset(copy).card


def test_what_was_verified_is_said_in_both_ways(copy: Path, prefkit: Prefkit) -> None:
    digest = file_sha256(copy / "manifest.json")
    shown = prefkit("info", str(copy), "--verify").out
    assert f"verified: 10 files are as they were written; manifest.json has sha256 {digest}\n" in shown
    told = prefkit("info", str(copy), "--verify", "--json").last_json()
    assert told["verified"] == json.loads(json.dumps(verify_dataset(copy)._asdict()))
    assert "verified" not in dataset_info(copy)


def test_runs_are_not_verified(prefkit: Prefkit, tmp_path: Path, original: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")
    for words in (("run",), (str(original), "run")):
        ended = prefkit("info", *words, "--verify", "--json")
        assert (ended.code, ended.error()["message"]) == (2, "--verify is for a dataset: a run holds no hashes")
    ended = prefkit("info", "run", "--verify", "--html", "page.html", "--json")
    assert (ended.code, ended.error()["message"]) == (2, "--verify is for a dataset, and --html for runs")


def test_the_hint_of_a_strange_part_says_what_to_do(copy: Path) -> None:
    shutil.copy(copy / "pairs/part-test-00000.parquet", copy / "pairs/mine.parquet")
    with pytest.raises(DatasetError) as refused:
        verify_dataset(copy)
    assert refused.value.hint == "remove it: whoever reads the folder as a whole reads it too"
