"""A dataset as a Python object shows what lies on disk, and refuses what was changed, by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from runs import run_document
from tiny import built, chat_rows, text_rows, tiny_llama

from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.dataset import open_dataset
from prefkit.errors import DatasetError, GateError, InputError
from prefkit.format import MESSAGES, schema
from prefkit.query import query_dataset
from prefkit.reference import precompute_reference
from prefkit.repairs import repair_dataset
from prefkit.results import write_query
from prefkit.store import write_json
from prefkit.tables import check_parts, write_parquet
from prefkit.train import train_dpo

ROWS = text_rows(40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text dataset of 40 pairs and one duplicate, with an audit, a reference and a run of 4 updates."""
    folder = tmp_path_factory.mktemp("whole")
    train = {"batch_size": 10, "max_steps": 4}
    pipeline = built(folder, [*ROWS, ROWS[0]], tiny_llama(folder / "model"), train=train, split={"test_share": 0.2})
    audit_dataset(pipeline)
    precompute_reference(pipeline)
    train_dpo(pipeline)
    return folder / "dataset"


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "dataset"))


def edited(file: Path) -> Path:
    """Its rows in other bytes, and another letter in its first text."""
    table = pl.read_parquet(file)
    column = next(name for name, dtype in table.schema.items() if dtype == pl.String)
    table.with_columns(pl.col(column) + "x").write_parquet(file)
    return file


def part_of(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("part-*.parquet"))))


# what is shown


def test_pairs_are_the_rows_that_were_built_with_the_documented_columns(whole: Path) -> None:
    ds = open_dataset(whole)
    pairs = ds.pairs.collect()
    assert pairs.schema == schema("pairs", "text")
    texts = {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs.to_dicts()}
    assert texts == {(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS}
    assert (ds.kind, ds.counts["pairs"], ds.path) == ("text", 40, whole)
    assert ds.counts["train"] == ds.pairs.filter(split="train").select(pl.len()).collect().item()


def test_rows_come_in_the_order_of_the_parts_of_the_manifest(whole: Path) -> None:
    listed = json.loads((whole / "manifest.json").read_text())["parts"]["pairs"]
    expected = [row for part in listed for row in pq.read_table(whole / "pairs" / part["file"])["pair_id"].to_pylist()]
    assert open_dataset(whole).pairs.collect()["pair_id"].to_list() == expected


def test_dropped_and_rejects_are_there_and_what_has_no_rows_is_an_empty_frame(whole: Path) -> None:
    ds = open_dataset(whole)
    assert ds.dropped.collect()["reason"].to_list() == ["duplicate"]
    for name in ("rejects", "changes"):
        frame = getattr(ds, name).collect()
        assert (frame.height, frame.schema) == (0, schema(name, "text")), name


def test_changes_of_a_repaired_dataset_say_what_was_done(whole: Path, tmp_path: Path) -> None:
    repair_dataset(whole, tmp_path / "mended", strip_openers=["river"], changes={"audit.ngrams": 1})
    ds = open_dataset(tmp_path / "mended")
    edits = ds.changes.collect()
    begins = [row for row in ROWS if any(row[side].strip().startswith("river") for side in ("chosen", "rejected"))]
    assert edits["action"].to_list() == ["edited"] * len(begins)
    assert edits.height > 0
    assert f"repaired    from {whole}" in repr(ds)


@pytest.mark.parametrize("has_extra", [False, True])
def test_a_message_has_role_content_and_extra_whether_or_not_the_parts_have_it(
    has_extra: bool, pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    rows = chat_rows(12)
    if has_extra:
        rows[0]["chosen"][0]["name"] = "ada"
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    dataset = Path(build_dataset(pipeline_of(source, kind="chat")).dataset)
    on_disk = pl.read_parquet_schema(part_of(dataset / "pairs"))["chosen"]
    assert ("extra" in str(on_disk)) is has_extra
    pairs = open_dataset(dataset).pairs
    assert pairs.collect_schema() == schema("pairs", "chat")
    last = pl.col("chosen").list.last().struct
    shown = pairs.select(last.field("content"), last.field("extra")).collect()
    assert sorted(shown["content"]) == sorted(row["chosen"][0]["content"] for row in rows)
    assert [json.loads(text) for text in shown["extra"].drop_nulls()] == ([{"name": "ada"}] if has_extra else [])
    assert MESSAGES in open_dataset(dataset).changes.collect_schema().values()


def test_the_tables_of_the_audit_are_those_that_it_returned(whole: Path) -> None:
    audit = open_dataset(whole).audit
    told = json.loads((whole / "audit" / "audit.json").read_text())
    assert (audit.verdict, audit.document["pairs"]) == (told["verdict"], 40)
    assert [one.name for one in audit.findings] == [one["name"] for one in told["findings"]]
    assert [list(one.pair_ids) for one in audit.findings] == [one["pair_ids"] for one in told["findings"]]
    for name in ("tokens", "structure", "probe", "pair_scores"):
        shown = getattr(audit, name).collect()
        assert shown.schema == schema(name, "text")
        assert shown.height == pq.read_metadata(whole / "audit" / f"{name}.parquet").num_rows
    assert audit.pair_scores.collect()["pair_id"].n_unique() == 40


def test_a_reference_is_found_by_its_key_by_the_beginning_of_it_or_by_being_the_only_one(whole: Path) -> None:
    ds = open_dataset(whole)
    (key,) = ds.references
    reference = ds.reference()
    assert reference.key == ds.references[key].key == ds.references[key[:5]].key == ds.reference(key[:5]).key == key
    told = json.loads((whole / "reference" / key / "reference.json").read_text())
    assert (reference.identity, reference.provenance) == (told["identity"], told["provenance"])
    assert "nothing" not in ds.references
    assert ds.references.get("nothing") is None
    with pytest.raises(DatasetError, match="no reference nothing") as refused:
        ds.references["nothing"]
    assert refused.value.expected == f"one of {key}"


def test_the_tables_of_a_reference_join_the_pairs(whole: Path) -> None:
    ds = open_dataset(whole)
    reference = ds.reference()
    for name, shown in (("reference", reference.table), ("plan", reference.plan)):
        assert shown.collect_schema() == schema(name, "text")
    joined = ds.pairs.join(reference.table, on="pair_id").select("pair_id", "prompt", "ref_chosen_logps").collect()
    asked = query_dataset(whole, "select pair_id, prompt, ref_chosen_logps from pairs join reference using (pair_id)")
    assert joined.sort("pair_id").equals(asked.pl().sort("pair_id"))
    assert joined.height == reference.plan.collect().height == 40
    assert reference.dropped.collect().schema == schema("reference_dropped", "text")


def test_pairs_that_encoding_dropped_are_told(tmp_path: Path) -> None:
    long = {"prompt": "river " * 200, "chosen": " stone.", "rejected": " cloud."}
    pipeline = built(tmp_path, [*ROWS[:5], long], tiny_llama(tmp_path / "model"), precompute={"max_length": 40})
    precompute_reference(pipeline, changes={"precompute.long_prompt": "drop"})
    ds = open_dataset(tmp_path / "dataset")
    (dropped,) = ds.reference().dropped.collect().to_dicts()
    assert dropped["pair_id"] == ds.pairs.filter(pl.col("chosen") == " stone.").collect()["pair_id"].item()
    assert ds.reference().table.collect().height == 5


def test_the_tables_of_a_run_are_those_of_the_views(whole: Path) -> None:
    ds = open_dataset(whole)
    run = ds.runs["1"]
    assert (run.name, run.document["train"]["max_steps"]) == ("1", 4)
    for name in ("steps", "perf", "pair_dynamics", "learning"):
        shown = getattr(run, name)
        assert shown.collect_schema() == schema(name, "text")
        asked = query_dataset(whole, f"select * exclude (run) from {name}").pl()
        keys = [key for key in ("step", "pair_id") if key in asked.columns]
        assert shown.collect().sort(keys).equals(asked.sort(keys)), name
        assert asked.height > 0
    assert run.steps.collect()["step"].to_list() == [0, 1, 2, 3, 4]
    learned = run.learning.filter(pl.col("num_seen") >= 1).select("pair_id", "history").collect()
    assert learned.height == run.pair_dynamics.filter(pl.col("step") > 0).collect()["pair_id"].n_unique()


def test_learning_is_of_one_run_only(own: Path) -> None:
    shutil.copytree(own / "runs" / "1", own / "runs" / "it's 2")
    part = part_of(own / "runs" / "it's 2" / "pair_dynamics")
    kept = pl.read_parquet(part).filter(pl.col("step") <= 1)
    write_parquet(part, kept)
    runs = open_dataset(own).runs
    second = runs["it's 2"].learning.collect()
    assert second["num_seen"].to_list() == [1] * kept.filter(pl.col("step") == 1).height
    assert runs["1"].learning.collect()["num_seen"].sum() > second["num_seen"].sum()


def test_runs_come_in_their_order_and_another_is_refused(own: Path) -> None:
    for name in ("2", "10", "11"):
        write_json(own / "runs" / name / "run.json", run_document())
    ds = open_dataset(own)
    assert list(ds.runs) == ["1", "2", "10", "11"]
    with pytest.raises(DatasetError) as refused:
        ds.runs["3"]
    assert str(refused.value) == f"{own}: no run 3\n  expected: one of 1, 2, 10, 11"
    shutil.rmtree(own / "runs")
    with pytest.raises(DatasetError) as refused:
        ds.runs["3"]
    assert str(refused.value) == f"{own}: no run 3\n  next: prefkit train {own} makes one"


def test_a_run_at_work_shows_what_it_has_logged(own: Path) -> None:
    write_json(own / "runs" / "2" / "run.json", run_document(finished=False))
    (own / "runs" / "2" / "steps.jsonl").write_text('{"step": 0, "loss": 0.5, "num_pairs": 2}\n{"step": 1, "lo')
    run = open_dataset(own).runs["2"]
    assert run.steps.select("step", "loss").collect().rows() == [(0, 0.5)]
    assert run.perf.collect().is_empty()
    assert run.pair_dynamics.collect().schema == schema("pair_dynamics", "text")
    assert run.learning.collect().is_empty()


def test_a_dataset_without_pairs_shows_empty_frames(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    same = [{"prompt": "p", "chosen": "same", "rejected": "same"}]
    built_ = build_dataset(pipeline_of({"path": str(write_jsonl("rows.jsonl", same)), "format": "pairs"}, kind="text"))
    ds = open_dataset(built_.dataset)
    assert (ds.pairs.collect().height, ds.pairs.collect_schema()) == (0, schema("pairs", "text"))
    assert (list(ds.references), list(ds.runs), ds.is_audited) == ([], [], False)
    assert "  references  none\n  runs        none" in repr(ds)


def test_a_path_may_hold_what_a_pattern_would(whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "we[i]rd *? {a,b}" / "data[1]"
    shutil.copytree(whole, place)
    ds = open_dataset(place)
    tables = [ds.pairs, ds.dropped, ds.audit.tokens, ds.reference().table, ds.reference().plan]
    tables += [ds.runs["1"].steps, ds.runs["1"].pair_dynamics, ds.runs["1"].learning]
    assert all(table.collect().height for table in tables)


def test_one_call_writes_the_result_of_a_query_in_the_form_of_its_file(whole: Path, tmp_path: Path) -> None:
    sql = "select source_row, prompt from pairs order by source_row"
    wanted = query_dataset(whole, sql).pl()
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        "a.parquet": pl.read_parquet,
        "a.csv": pl.read_csv,
        "a.jsonl": pl.read_ndjson,
    }
    for name, read in readers.items():
        assert write_query(whole, sql, tmp_path / name) == 40
        assert read(tmp_path / name).rows() == wanted.rows()
    assert write_query(str(whole), sql, str(tmp_path / "named"), form="csv") == 40
    assert pl.read_csv(tmp_path / "named").rows() == wanted.rows()
    with pytest.raises(InputError, match="the name does not say the form"):
        write_query(whole, sql, tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot be written into the dataset"):
        write_query(whole, sql, whole / "a.csv")
    with pytest.raises(InputError):
        write_query(whole, "select cast(prompt as int) from pairs", tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()


# the words of a notebook


def test_a_dataset_says_what_it_holds(whole: Path) -> None:
    (key,) = open_dataset(whole).references
    told = open_dataset(whole)
    audited = told.audit
    lines = repr(told).splitlines()
    assert lines[:6] == [
        f"Dataset {whole} (text)",
        f"  pairs       40: {told.counts['train']} train, {told.counts['test']} test",
        "  dropped     1",
        "  rejects     0",
        "  reasons     1 duplicate",
        f"  audit       {audited.verdict}: {audited.document['reason']}",
    ]
    assert lines[6] == f"  references  {key}  40 pairs, max_length 128, float32"
    assert lines[7].startswith("  runs        1  finished: 4 updates, loss 0.")
    assert repr(told.reference()) == f"reference {key}: 40 pairs, max_length 128, float32"
    assert repr(told.runs["1"]).startswith("run 1: finished: 4 updates, loss 0.")
    assert repr(audited).splitlines()[0] == f"audit of {whole}: {audited.verdict}: {audited.document['reason']}"


def test_a_long_list_of_findings_is_cut_in_a_repr(own: Path) -> None:
    path = own / "audit" / "audit.json"
    document = json.loads(path.read_text())
    finding: dict[str, Any] = {
        "level": "note",
        "family": "tokens",
        "name": "x",
        "reason": "why",
        "advice": "",
        "side": None,
    }
    empty = dict.fromkeys(("alphabet", "n", "num_pairs", "coverage", "win_rate", "win_rate_low", "win_rate_high"))
    finding |= empty | dict.fromkeys(("p", "q", "p_permutation", "z_length"))
    finding |= {"also": [], "pair_ids": [], "sources": {}}
    path.write_text(json.dumps(document | {"findings": [finding] * 12}))
    lines = repr(open_dataset(own).audit).splitlines()
    assert lines[1:] == ["  note  why"] * 10 + ["  ... and 2 more in .findings"]


def test_what_is_damaged_says_so_in_its_place_and_hides_nothing_else(own: Path) -> None:
    (own / "runs" / "1" / "run.json").write_text("{")
    (own / "audit" / "audit.json").write_text("{}")
    told = repr(open_dataset(own))
    assert "audit       cannot be read: " in told
    assert "runs        1  cannot be read: " in told
    assert "40 pairs, max_length 128" in told


def test_names_never_carry_escape_sequences_into_a_notebook(
    tmp_path: Path, pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    source = {"path": str(write_jsonl("rows.jsonl", ROWS)), "format": "pairs"}
    pipeline = pipeline_of(source).model_copy(update={"dataset": str(tmp_path / "a\x1b[2Jb")})
    told = repr(open_dataset(build_dataset(pipeline).dataset))
    assert "\x1b" not in told
    assert "a\ufffd[2Jb" in told


# what is refused


TABLES: dict[str, tuple[str, Callable[[Any], pl.LazyFrame]]] = {
    "pairs": ("pairs/part-*.parquet", lambda ds: ds.pairs),
    "dropped": ("dropped/part-*.parquet", lambda ds: ds.dropped),
    "rejects": ("rejects/part-*.parquet", lambda ds: ds.rejects),
    "tokens": ("audit/tokens.parquet", lambda ds: ds.audit.tokens),
    "structure": ("audit/structure.parquet", lambda ds: ds.audit.structure),
    "probe": ("audit/probe.parquet", lambda ds: ds.audit.probe),
    "pair_scores": ("audit/pair_scores.parquet", lambda ds: ds.audit.pair_scores),
    "table": ("reference/*/part-*.parquet", lambda ds: ds.reference().table),
    "reference_dropped": ("reference/*/dropped.parquet", lambda ds: ds.reference().dropped),
}
HASHED = (DatasetError, GateError)


@pytest.mark.parametrize("name", TABLES)
def test_an_edited_part_is_refused_by_name_at_the_first_access(own: Path, name: str) -> None:
    pattern, table = TABLES[name]
    (file, *_) = sorted(own.glob(pattern))
    edited(file)
    ds = open_dataset(own)
    with pytest.raises(HASHED, match="part was changed: its sha256 is not the recorded one") as refused:
        table(ds)
    assert refused.value.where == str(file)
    rows = sum(pq.read_metadata(part).num_rows for part in own.glob(pattern))
    assert table(open_dataset(own, verify=False)).collect().height == rows


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_part_is_refused_by_name_verified_or_not(own: Path, name: str) -> None:
    pattern, table = TABLES[name]
    (file, *_) = sorted(own.glob(pattern))
    file.unlink()
    for verify in (True, False):
        with pytest.raises(HASHED, match="part is missing") as refused:
            table(open_dataset(own, verify=verify))
        assert refused.value.where == str(file)


def test_the_hint_of_a_changed_table_of_the_audit_is_to_audit_again(own: Path) -> None:
    edited(own / "audit" / "tokens.parquet")
    with pytest.raises(DatasetError) as refused:
        _ = open_dataset(own).audit.tokens
    assert refused.value.hint == f"prefkit audit {own} makes it again"
    (own / "audit" / "tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="cannot be read: ") as refused:
        _ = open_dataset(own, verify=False).audit.tokens
    assert refused.value.hint == f"prefkit audit {own} makes it again"


def test_a_table_that_was_verified_is_verified_again_only_if_its_file_is_another(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counting(folder: Path, parts: list[Any]) -> None:
        hashed.extend(part["file"] for part in parts)
        check_parts(folder, parts)

    monkeypatch.setattr("prefkit.holdings.check_parts", counting)
    ds = open_dataset(own)
    _ = ds.pairs, ds.pairs
    number = len(list((own / "pairs").glob("part-*.parquet")))
    assert len(hashed) == number
    edited(part_of(own / "pairs"))
    with pytest.raises(DatasetError, match="part was changed"):
        _ = ds.pairs
    hashed.clear()
    unverified = open_dataset(own, verify=False)
    _ = unverified.pairs
    assert hashed == []


def test_a_reference_that_lacks_pairs_or_holds_what_no_pass_writes_is_refused(own: Path) -> None:
    ds = open_dataset(own)
    folder = ds.reference().path
    recorded = json.loads((folder / "reference.json").read_text())
    file = part_of(folder)
    rows = pl.read_parquet(file)
    for spoilt, said in (
        (rows.head(39), "1 pairs missing"),
        (rows.with_columns(ref_chosen_logps=pl.col("ref_chosen_logps") - 1), "is not the sum of"),
    ):
        part = write_parquet(file, spoilt)
        write_json(folder / "reference.json", recorded | {"parts": [part._asdict()]})
        with pytest.raises(GateError, match=said):
            _ = ds.reference().table
        assert open_dataset(own, verify=False).reference().table.collect().height == spoilt.height
    changed = recorded | {"identity": recorded["identity"] | {"max_length": 7}}
    write_json(folder / "reference.json", changed)
    with pytest.raises(GateError, match="its identity is not the one that its key was made from"):
        _ = ds.reference().identity


@pytest.mark.parametrize("name", ["plan.parquet", "pair_dynamics"])
def test_a_table_without_a_recorded_hash_must_have_its_columns(own: Path, name: str) -> None:
    file = next(iter(sorted(own.glob(f"*/*/{name}" if name.endswith("t") else f"runs/1/{name}/part-*.parquet"))))

    def table() -> pl.LazyFrame:
        ds = open_dataset(own)
        return ds.reference().plan if name == "plan.parquet" else ds.runs["1"].pair_dynamics

    rows = pl.read_parquet(file)
    write_parquet(file, rows.rename({"pair_id": "id"}))
    with pytest.raises(DatasetError, match="columns that are not the table's") as refused:
        table()
    said = "columns that are not the table's (found and expected): id: String and None; pair_id: None and String"
    assert refused.value.message == said
    write_parquet(file, rows.select(reversed(rows.columns)))
    with pytest.raises(DatasetError, match="another order"):
        table()
    file.write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="cannot be read: ") as refused:
        table()
    assert refused.value.where == str(file)


def test_a_plan_of_an_earlier_release_has_nulls_where_it_lacks_a_column(own: Path) -> None:
    file = open_dataset(own).reference().path / "plan.parquet"
    write_parquet(file, pl.read_parquet(file).drop("max_batch_tokens"))
    plan = open_dataset(own).reference().plan.collect()
    assert plan.schema == schema("plan", "text")
    assert plan["max_batch_tokens"].null_count() == plan.height == 40


def test_another_format_version_an_unfinished_build_and_no_dataset_are_refused(own: Path, tmp_path: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    for version, said in ((manifest["format_version"] + 1, "use a newer prefkit"), (1, "of an older prefkit")):
        write_json(own / "manifest.json", manifest | {"format_version": version})
        with pytest.raises(DatasetError) as refused:
            open_dataset(own)
        assert f"format_version is {version}" in str(refused.value)
        assert said in str(refused.value)
    (own / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="there is no manifest"):
        open_dataset(own)
    with pytest.raises(DatasetError, match="no such dataset"):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [3, None, b"bytes", ["demo/dataset"]])
def test_what_is_no_path_is_refused_as_such(value: Any) -> None:
    with pytest.raises(InputError) as refused:
        open_dataset(value)
    said = f"a path cannot be a value of type {type(value).__name__}\n  expected: a dataset directory"
    assert str(refused.value) == said


def test_without_an_audit_the_next_command_is_told(own: Path) -> None:
    (own / "audit" / "audit.json").unlink()
    ds = open_dataset(own)
    assert not ds.is_audited
    with pytest.raises(DatasetError) as refused:
        _ = ds.audit
    assert str(refused.value) == f"{own}: has no audit\n  next: prefkit audit {own}"
    assert f"  audit       none: prefkit audit {own}" in repr(ds)


# while others write


def rebuilt(own: Path, rows: Iterable[Any]) -> None:
    built(own.parent, rows, own.parent / "model")


def test_a_build_in_between_is_noticed_at_the_next_access(own: Path) -> None:
    ds = open_dataset(own)
    held = ds.pairs
    assert held.collect().height == 40
    rebuilt(own, ROWS[:20])
    for table in (lambda: ds.pairs, lambda: ds.dropped, lambda: ds.audit):
        with pytest.raises(DatasetError) as refused:
            table()
        said = f"{own}: was built anew since it was opened\n  next: prefkit.open_dataset opens it again"
        assert str(refused.value) == said
    assert open_dataset(own).pairs.collect().height == 20


def test_what_later_commands_add_is_seen_by_an_open_dataset(own: Path) -> None:
    shutil.move(own / "runs", own.parent / "runs")
    shutil.move(own / "audit" / "audit.json", own.parent / "audit.json")
    ds = open_dataset(own)
    assert (list(ds.runs), ds.is_audited) == ([], False)
    shutil.move(own.parent / "runs", own / "runs")
    shutil.move(own.parent / "audit.json", own / "audit" / "audit.json")
    assert (list(ds.runs), ds.is_audited) == (["1"], True)
    assert ds.audit.tokens.collect_schema() == schema("tokens", "text")


def test_reading_takes_no_lock_and_changes_nothing(own: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    own.chmod(0o555)
    try:
        ds = open_dataset(own)
        _ = ds.pairs.collect(), ds.audit.tokens.collect(), ds.reference().table.collect(), repr(ds)
        _ = ds.runs["1"].learning.collect()
    finally:
        own.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


def test_a_dataset_is_opened_and_read_without_torch(whole: Path) -> None:
    code = (
        "import sys, prefkit\n"
        f"ds = prefkit.open_dataset({str(whole)!r})\n"
        "repr(ds), ds.pairs.collect(), ds.audit.findings\n"
        "ds.reference().table.collect(), ds.runs['1'].learning.collect()\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
