"""From sources to a dataset: every row is accounted for, the bytes are reproducible, nothing is written in vain."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dying import Killed, die_at_rename

from prefkit import __version__, candidates, drafts
from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline
from prefkit.errors import ConfigError, DatasetError, SourceError
from prefkit.format import FORMAT_VERSION, Kind, schema
from prefkit.locks import locked
from prefkit.sources import read_source
from prefkit.store import read_manifest

WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]


def table(built: Built | Path | str, name: str) -> pl.DataFrame:
    dataset = built.dataset if isinstance(built, Built) else built
    return pl.read_parquet(f"{dataset}/{name}/*.parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in [folder, *sorted(folder.rglob("*"))]}


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


@pytest.fixture
def mixed(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Pipeline:
    """Three families of sources with every way for a row to leave the road; the counts below are by hand."""
    pairs = [
        pair(1),
        pair(1, annotator="model"),  # a duplicate
        "",  # no row
        pair(2) | {"rejected": "good 2"},  # identical
        '{"prompt": ',  # a reject
        pair(3),  # contradicts the next one
        {"prompt": "p3", "chosen": "bad 3", "rejected": "good 3"},
    ]
    corrections = [
        {"prompt": "c1", "response": "wrong", "correction": "right"},
        {"prompt": "c2", "response": "same", "correction": "same"},  # unedited
        {"prompt": "c3", "response": "wrong"},  # a reject
    ]
    candidates = [
        *(
            {"prompt": "k1", "response": text, "score": score}
            for text, score in (("a", 1), ("b", 2), ("c", 1.5), ("d", "?"))
        ),
        *({"prompt": "k2", "response": text, "score": 3} for text in ("a", "b")),  # a tie
        {"prompt": "k3", "response": "a", "score": 3},  # alone
        {"prompt": "k4", "responses": ["u", "v", "w"], "scores": [3, 1, None]},
    ]
    return pipeline_of(
        {"path": str(write_jsonl("pairs.jsonl", pairs)), "format": "pairs"},
        {"path": str(write_jsonl("corrections.jsonl", corrections)), "format": "corrections"},
        {"path": str(write_jsonl("candidates.jsonl", candidates)), "format": "candidates", "annotator": "model"},
        validate={"max_reject_share": 0.5},
        split={"test_share": 0.0},
    )


@pytest.fixture
def small(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Pipeline:
    path = write_jsonl("small.jsonl", [pair(i) for i in range(8)])
    return pipeline_of({"path": str(path), "format": "pairs"}, split={"test_share": 0.5})


# accounting


def test_every_row_of_mixed_sources_is_accounted_for(mixed: Pipeline) -> None:
    built = build_dataset(mixed)
    counts = built.counts
    assert (counts["rows"], counts["rejects"] - counts["candidate_rejects"]) == (6 + 3, 1 + 1)
    assert (counts["pairs"] - counts["prompts_with_pair"], counts["dropped"] - counts["prompts_dropped"]) == (2, 5)
    assert (counts["candidates"], counts["used"], counts["unused"], counts["candidate_rejects"]) == (10, 4, 4, 2)
    assert (counts["prompts"], counts["prompts_with_pair"], counts["prompts_dropped"]) == (4, 2, 2)
    assert (counts["train"], counts["test"]) == (4, 0)
    assert built.reasons == {
        "contradiction": 2,
        "identical": 2,
        "not_a_number": 2,
        "duplicate": 1,
        "missing_field": 1,
        "not_json": 1,
        "one_candidate": 1,
        "tie": 1,
    }


def test_the_tables_on_disk_hold_what_the_counts_say(mixed: Pipeline) -> None:
    built = build_dataset(mixed)
    heights = {name: table(built, name).height for name in ("pairs", "dropped", "rejects")}
    assert heights == {name: built.counts[name] for name in heights}
    found = Counter(table(built, "dropped")["reason"]) + Counter(table(built, "rejects")["reason"])
    assert dict(found) == built.reasons
    for name in heights:
        assert table(built, name).schema == schema(name, "text")


def test_pairs_say_by_which_method_from_where_and_by_whom(mixed: Pipeline) -> None:
    found = table(build_dataset(mixed), "pairs").select("prompt", "method", "source", "source_row", "annotator").rows()
    names = [Path(source.path) for source in mixed.sources]
    assert sorted(found) == [
        ("c1", "correction", str(names[1]), 1, None),
        ("k1", "best_of_n", str(names[2]), 2, "model"),
        ("k4", "best_of_n", str(names[2]), 8, "model"),
        ("p1", "paired", str(names[0]), 2, "model"),
    ]


def test_ids_on_disk_can_be_recomputed_by_hand(mixed: Pipeline) -> None:
    for row in table(build_dataset(mixed), "pairs").iter_rows(named=True):
        texts = [json.dumps(row[name], ensure_ascii=False) for name in ("prompt", "chosen", "rejected")]
        assert row["pair_id"] == hashlib.sha256(f'["text",{",".join(texts)}]'.encode()).hexdigest()
        assert row["prompt_id"] == hashlib.sha256(f'["text",{texts[0]}]'.encode()).hexdigest()


def test_a_dropped_row_keeps_its_own_columns_and_says_which_row_it_lost_to(mixed: Pipeline) -> None:
    built = build_dataset(mixed)
    dropped = {(row["prompt"], row["source_row"]): row for row in table(built, "dropped").iter_rows(named=True)}
    kept = table(built, "pairs").filter(pl.col("prompt") == "p1").row(0, named=True)
    duplicate = dropped[("p1", 1)]
    assert (duplicate["stage"], duplicate["duplicate_of"]) == ("dedupe", kept["pair_id"])
    assert (duplicate["chosen"], duplicate["rejected"]) == ("good 1", "bad 1")
    one, other = dropped[("p3", 6)], dropped[("p3", 7)]
    assert (one["contradicts"], other["contradicts"]) == (other["pair_id"], one["pair_id"])
    assert (one["duplicate_of"], other["duplicate_of"]) == (None, None)
    assert (dropped[("p2", 4)]["stage"], dropped[("p2", 4)]["reason"]) == ("validate", "identical")
    for prompt in ("k2", "k3"):
        (row,) = (row for (name, _), row in dropped.items() if name == prompt)
        assert (row["stage"], row["pair_id"], row["chosen"], row["rejected"]) == ("pairs", None, None, None)


def test_a_pair_of_candidates_that_a_rule_drops_still_accounts_for_its_prompt(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = [{"prompt": "p", "responses": ["a b", "a  b"], "scores": [2, 1]}]
    path = write_jsonl("rows.jsonl", rows)
    built = build_dataset(pipeline_of({"path": str(path), "format": "candidates"}))
    assert (built.counts["prompts"], built.counts["prompts_with_pair"], built.counts["prompts_dropped"]) == (1, 0, 1)
    assert built.reasons == {"identical_after_folding": 1}


def test_a_row_of_empty_lists_is_accounted_for(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]}, {"prompt": "q", "responses": [], "scores": []}]
    path = write_jsonl("rows.jsonl", rows)
    built = build_dataset(pipeline_of({"path": str(path), "format": "candidates"}, validate={"max_reject_share": 0.9}))
    assert sum(built.reasons.values()) == 1


def test_one_pair_in_two_sources_is_one_pair(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    one, other = (str(write_jsonl(f"{name}.jsonl", [pair(1)])) for name in "ab")
    built = build_dataset(
        pipeline_of(
            {"path": one, "format": "pairs", "annotator": "model"},
            {"path": other, "format": "trl", "annotator": "human"},
        )
    )
    assert table(built, "pairs").select("source", "annotator").rows() == [(other, "human")]
    assert built.reasons == {"duplicate": 1}


# kinds


def test_a_chat_dataset_takes_texts_messages_and_transcripts_alike(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    messages = {
        "prompt": [{"role": "user", "content": "q2"}],
        "chosen": [{"role": "assistant", "content": "g"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    transcript = {side: f"\n\nHuman: q3\n\nAssistant: {reply}" for side, reply in (("chosen", "g"), ("rejected", "b"))}
    built = build_dataset(
        pipeline_of(
            {"path": str(write_jsonl("a.jsonl", [pair(1), messages])), "format": "pairs"},
            {"path": str(write_jsonl("b.jsonl", [transcript])), "format": "hh"},
            kind="chat",
        )
    )
    rows = table(built, "pairs").sort("source", "source_row").to_dicts()
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in ("p1", "q2", "q3")]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "good 1"}]
    assert table(built, "pairs").schema == schema("pairs", "chat", plain=True)
    assert read_manifest(Path(built.dataset))["kind"] == "chat"


def test_messages_in_a_text_dataset_are_rejects(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    turn = [{"role": "assistant", "content": "x"}]
    rows = [pair(1), {"prompt": "p", "chosen": turn, "rejected": turn}]
    path = write_jsonl("rows.jsonl", rows)
    source = {"path": str(path), "format": "pairs"}
    built = build_dataset(pipeline_of(source, kind="text", validate={"max_reject_share": 0.5}))
    assert (built.kind, built.counts["pairs"], built.counts["rejects"]) == ("text", 1, 1)
    reject = table(built, "rejects").row(0, named=True)
    assert (reject["line"], reject["field"], json.loads(reject["raw"])) == (2, "chosen", rows[1])


@pytest.mark.parametrize("form", ["pairs", "candidates", "corrections"])
def test_a_source_without_rows_is_refused_before_a_manifest(
    form: str, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", [])), "format": form})
    with pytest.raises(SourceError, match=r"rows\.jsonl: holds no row"):
        build_dataset(pipeline)
    assert not (Path(pipeline.dataset) / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_where_every_row_is_dropped_the_other_tables_are_empty_and_have_their_columns(
    kind: Kind, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "a"}
    built = build_dataset(pipeline_of({"path": str(write_jsonl("rows.jsonl", [row])), "format": "pairs"}, kind=kind))
    assert table(built, "dropped").height == 1
    for name in ("pairs", "rejects"):
        assert table(built, name).is_empty()
        assert table(built, name).schema == schema(name, kind, plain=True)


# too many rejects


def test_too_many_rejects_stop_the_build_before_a_manifest_and_say_what_is_wrong(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows: list[Any] = [pair(i) for i in range(20)]
    rows[2], rows[4], rows[11] = {"prompt": "p"}, "oops", {"prompt": "p", "chosen": 3, "rejected": "r"}
    path = write_jsonl("rows.jsonl", rows)
    pipeline = pipeline_of({"path": str(path), "format": "pairs"}, validate={"max_reject_share": 0.1})
    with pytest.raises(SourceError) as stopped:
        build_dataset(pipeline)
    message = str(stopped.value)
    assert "3 of 20 rows" in message
    for part in (
        "1 missing_field (chosen)",
        "1 not_json",
        "1 wrong_type (chosen)",
        "3, 5, 12",
        str(path),
        "max_reject_share",
    ):
        assert part in message
    assert not (Path(pipeline.dataset) / "manifest.json").exists()


def test_only_the_first_ten_bad_lines_are_listed(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    path = write_jsonl("rows.jsonl", ["oops"] * 30)
    with pytest.raises(SourceError) as stopped:
        build_dataset(pipeline_of({"path": str(path), "format": "pairs"}))
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in stopped.value.message
    assert "11" not in stopped.value.message


def test_as_many_rejects_as_allowed_do_not_stop_the_build(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    path = write_jsonl("rows.jsonl", ["oops", *(pair(i) for i in range(9))])
    built = build_dataset(pipeline_of({"path": str(path), "format": "pairs"}, validate={"max_reject_share": 0.1}))
    assert (built.counts["pairs"], built.counts["rejects"]) == (9, 1)


def test_bad_lines_of_one_source_do_not_hide_behind_the_good_ones_of_another(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    good = write_jsonl("good.jsonl", [pair(i) for i in range(100)])
    bad = write_jsonl("bad.jsonl", ["oops", "oops", pair(1)])
    sources = ({"path": str(path), "format": "pairs"} for path in (good, bad))
    with pytest.raises(SourceError, match="2 of 3 rows") as stopped:
        build_dataset(pipeline_of(*sources))
    assert stopped.value.where == str(bad)


def test_the_bad_lines_of_a_glob_are_listed_with_their_file(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    write_jsonl("a.jsonl", [pair(1)])
    bad = write_jsonl("b.jsonl", ["oops"])
    with pytest.raises(SourceError) as stopped:
        build_dataset(pipeline_of({"path": str(bad.parent / "*.jsonl"), "format": "pairs"}))
    assert str(bad) in str(stopped.value)


def test_a_stopped_rebuild_leaves_the_finished_dataset_as_it_was(small: Pipeline) -> None:
    build_dataset(small)
    before = contents(Path(small.dataset))
    Path(small.sources[0].path).write_text("oops\n")
    with pytest.raises(SourceError):
        build_dataset(small)
    assert contents(Path(small.dataset)) == before


# the directory


def test_a_dataset_is_the_files_of_the_format_and_nothing_else(mixed: Pipeline) -> None:
    build_dataset(mixed)
    parts = {"pairs/part-train-00000.parquet", "dropped/part-00000.parquet", "rejects/part-00000.parquet"}
    assert set(contents(Path(mixed.dataset))) == parts | {"manifest.json", "README.md", "views.sql", ".lock"}


def test_the_manifest_holds_settings_sources_counts_and_the_hash_of_every_part(mixed: Pipeline) -> None:
    built = build_dataset(mixed)
    dataset = Path(built.dataset)
    manifest = json.loads((dataset / "manifest.json").read_text("utf-8"))
    assert (manifest["format_version"], manifest["prefkit_version"]) == (FORMAT_VERSION, __version__)
    assert (manifest["kind"], manifest["counts"], manifest["reasons"]) == ("text", built.counts, built.reasons)
    assert manifest["pipeline"]["validate"]["max_reject_share"] == 0.5
    assert manifest["pipeline"]["kind"] == "text"
    assert "dataset" not in manifest["pipeline"]
    for source, recorded, rows in zip(mixed.sources, manifest["sources"], (6, 3, 8), strict=True):
        assert (recorded["path"], recorded["rows"]) == (source.path, rows)
        assert recorded["sha256"] == hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    for name, parts in manifest["parts"].items():
        for part in parts:
            path = dataset / name / part["file"]
            assert part["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert part["rows"] == pl.read_parquet(path).height
    assert set(manifest["parts"]) == {"pairs", "dropped", "rejects"}


def test_the_card_shows_counts_reasons_and_sources(mixed: Pipeline) -> None:
    built = build_dataset(mixed)
    card = (Path(built.dataset) / "README.md").read_text("utf-8")
    assert "4 pairs" in card
    for shown in [*built.reasons, *(Path(source.path).name for source in mixed.sources)]:
        assert f"| `{shown}` |" in card


# again and again


def test_the_same_pipeline_writes_the_same_bytes_wherever_it_writes_them(mixed: Pipeline, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "somewhere" / "other"
    for dataset in (one, other):
        build_dataset(mixed.model_copy(update={"dataset": str(dataset)}))
    assert contents(one) == contents(other)
    assert len(contents(one)) == 7


def test_the_order_of_the_sources_changes_no_pair(mixed: Pipeline, tmp_path: Path) -> None:
    turned = mixed.model_copy(update={"dataset": str(tmp_path / "turned"), "sources": mixed.sources[::-1]})
    one, other = (table(build_dataset(pipeline), "pairs").sort("pair_id") for pipeline in (mixed, turned))
    assert one.equals(other)


def test_a_build_that_would_change_nothing_writes_nothing(small: Pipeline) -> None:
    first = build_dataset(small)
    before = stamps(Path(small.dataset))
    again = build_dataset(small)
    assert stamps(Path(small.dataset)) == before
    assert (first.unchanged, again.unchanged) == (False, True)
    assert (again.counts, again.reasons, again.kind) == (first.counts, first.reasons, first.kind)


def test_a_changed_source_is_built_again_and_keeps_references_and_runs(small: Pipeline) -> None:
    build_dataset(small)
    dataset = Path(small.dataset)
    kept = [dataset / "reference" / "key" / "reference.json", dataset / "runs" / "1" / "run.json"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    with Path(small.sources[0].path).open("a") as file:
        file.write(json.dumps(pair(100)) + "\n")
    again = build_dataset(small)
    assert (again.unchanged, again.counts["pairs"]) == (False, 9)
    assert table(again, "pairs").height == 9
    assert all(path.exists() for path in kept)


def test_adding_rows_moves_no_pair_to_the_other_split(small: Pipeline) -> None:
    before = dict(table(build_dataset(small), "pairs").select("pair_id", "split").rows())
    assert set(before.values()) == {"train", "test"}
    with Path(small.sources[0].path).open("a") as file:
        file.writelines(json.dumps(pair(i)) + "\n" for i in range(100, 140))
    after = dict(table(build_dataset(small), "pairs").select("pair_id", "split").rows())
    assert {name: after[name] for name in before} == before


def test_changed_settings_of_the_data_are_built_again(small: Pipeline) -> None:
    build_dataset(small)
    split = small.split.model_copy(update={"test_share": 1.0})
    again = build_dataset(small.model_copy(update={"split": split}))
    assert (again.unchanged, again.counts["test"]) == (False, 8)
    assert set(table(again, "pairs")["split"]) == {"test"}


def test_changed_settings_of_a_later_step_leave_the_tables_alone(small: Pipeline) -> None:
    build_dataset(small)
    before = stamps(Path(small.dataset) / "pairs")
    train = small.train.model_copy(update={"beta": 0.5})
    assert build_dataset(small.model_copy(update={"train": train})).unchanged
    assert stamps(Path(small.dataset) / "pairs") == before
    assert read_manifest(Path(small.dataset))["pipeline"]["train"]["beta"] == 0.5


def test_a_check_counts_what_a_build_would_and_writes_nothing(mixed: Pipeline, tmp_path: Path) -> None:
    before = contents(tmp_path)
    checked = build_dataset(mixed, check=True)
    assert contents(tmp_path) == before
    assert not Path(mixed.dataset).exists()
    built = build_dataset(mixed)
    assert (checked.counts, checked.reasons, checked.kind) == (built.counts, built.reasons, built.kind)
    assert (checked.checked_only, built.checked_only) == (True, False)
    before_again = stamps(Path(mixed.dataset))
    build_dataset(mixed, check=True)
    assert stamps(Path(mixed.dataset)) == before_again


def test_a_check_finds_what_would_stop_a_build(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="no such file"):
        build_dataset(pipeline_of({"path": str(tmp_path / "nowhere.jsonl"), "format": "pairs"}), check=True)
    path = write_jsonl("rows.jsonl", ["oops"])
    with pytest.raises(SourceError, match="1 of 1 rows"):
        build_dataset(pipeline_of({"path": str(path), "format": "pairs"}), check=True)


def test_a_dataset_that_another_process_writes_is_left_alone(small: Pipeline) -> None:
    with locked(Path(small.dataset)), pytest.raises(DatasetError, match=f"process {os.getpid()}"):
        build_dataset(small)
    assert build_dataset(small).counts["pairs"] == 8


def test_a_directory_of_somebody_else_is_left_alone(small: Pipeline) -> None:
    folder = Path(small.dataset)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(DatasetError, match=r"thesis\.tex"):
        build_dataset(small)
    assert contents(folder) == {"thesis.tex": b"mine"}


@pytest.fixture
def kill_at() -> Iterator[Callable[[int], pytest.MonkeyPatch]]:
    """Die when the n-th file is about to be renamed into its place."""
    patch = pytest.MonkeyPatch()

    def arm(number: int) -> pytest.MonkeyPatch:
        die_at_rename(number, patch)
        return patch

    yield arm
    patch.undo()


# a draft of each source: its facts, the folder itself; then two files of verdicts and their folder; then three tables,
# the card, the views and the manifest; then these, all but the manifest, in their places
@pytest.mark.parametrize("number", range(1, 3 * 2 + 3 + 6 + 5 + 1))
def test_a_build_that_was_killed_at_any_file_is_finished_by_the_next_one(
    number: int, mixed: Pipeline, tmp_path: Path, kill_at: Callable[[int], pytest.MonkeyPatch]
) -> None:
    patch = kill_at(number)
    with pytest.raises(Killed):
        build_dataset(mixed)
    patch.undo()
    assert not (Path(mixed.dataset) / "manifest.json").exists()
    assert build_dataset(mixed).counts["pairs"] == 4
    unbroken = tmp_path / "unbroken"
    build_dataset(mixed.model_copy(update={"dataset": str(unbroken)}))
    assert contents(Path(mixed.dataset)) == contents(unbroken)


def test_a_build_that_was_stopped_does_not_read_a_source_again_unless_it_changed(
    mixed: Pipeline, tmp_path: Path, kill_at: Callable[[int], pytest.MonkeyPatch]
) -> None:
    patch = kill_at(3 * 2 + 1)
    with pytest.raises(Killed):
        build_dataset(mixed)
    patch.undo()
    last = Path(mixed.sources[2].path)
    last.write_text(last.read_text(encoding="utf-8") + "\n", encoding="utf-8")  # a blank line: the same rows
    told: list[str] = []
    build_dataset(mixed, tell=told.append)
    before = [f"{source.path} was read before the build was stopped" for source in mixed.sources[:2]]
    assert told[:3] == [*before, f"reading {last}"]
    unbroken = mixed.model_copy(update={"dataset": str(tmp_path / "unbroken")})
    build_dataset(unbroken)
    assert contents(Path(mixed.dataset)) == contents(tmp_path / "unbroken")


def test_what_a_kill_left_behind_after_the_manifest_goes_with_the_next_call(small: Pipeline) -> None:
    build_dataset(small)
    before = contents(Path(small.dataset))
    (Path(small.dataset) / ".drafts" / "0123").mkdir(parents=True)
    (Path(small.dataset) / ".lock").write_text("process 7 on elsewhere")
    assert build_dataset(small).unchanged
    assert contents(Path(small.dataset)) == before
    assert (Path(small.dataset) / ".lock").read_bytes() == b""


def test_a_build_that_fails_before_it_has_anything_leaves_no_directory(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", ["no json"])), "format": "pairs"})
    with pytest.raises(SourceError):
        build_dataset(pipeline)
    assert not Path(pipeline.dataset).exists()
    Path(pipeline.dataset).mkdir()  # one that somebody made is not ours to remove
    with pytest.raises(SourceError):
        build_dataset(pipeline)
    assert Path(pipeline.dataset).exists()


# what pairs: says


@pytest.mark.parametrize(
    ("form", "rows", "reason"),
    [
        (
            "comparisons",
            [
                {"prompt": f"p{n}", "response_a": "a", "response_b": "b", "winner": "a", "score_a": n, "score_b": 0}
                for n in (1, 2)
            ],
            "under_min_margin",
        ),
        ("pairs", [pair(n, chosen_score=n, rejected_score=0) for n in (1, 2)], "under_min_margin"),
    ],
)
def test_the_margin_of_a_pipeline_holds_for_every_source_with_scores(
    form: str, rows: list[dict[str, Any]], reason: str, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    path = str(write_jsonl("rows.jsonl", rows))
    built = build_dataset(pipeline_of({"path": path, "format": form}, pairs={"min_margin": 1.5}))
    assert built.reasons == {reason: 1}
    assert table(built, "pairs")["prompt"].to_list() == ["p2"]
    assert table(built, "dropped").select("stage", "source_row", "margin").rows() == [("pairs", 1, 1.0)]


def test_a_length_cap_holds_for_corrections(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    rows = [{"prompt": "p", "response": "ab", "correction": text} for text in ("abc", "abcdefg")]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "corrections"}
    assert build_dataset(pipeline_of(source, pairs={"length_cap": 0.7})).reasons == {"over_length_cap": 1}


SOURCES: dict[str, dict[str, Any]] = {
    "pairs": pair(1),
    "candidates": {"prompt": "p", "response": "a", "score": 1},
    "comparisons": {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"},
    "corrections": {"prompt": "p", "response": "a", "correction": "b"},
}
SCORED = ("candidates", "comparisons", "pairs")


@pytest.mark.parametrize(
    ("key", "value", "families"),
    [
        ("min_agreement", 0.5, ("comparisons",)),
        ("chosen", "all_above", ("candidates",)),
        ("rejected", "random", ("candidates",)),
        ("scorers", "zscore", ("candidates",)),
        ("scorers_agree", True, ("candidates",)),
        ("seed", 3, ("candidates",)),
        ("min_margin", 0.5, SCORED),
        ("max_margin", 0.5, SCORED),
        ("min_chosen_score", 0.5, SCORED),
        ("length_cap", 0.5, tuple(SOURCES)),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_setting_of_pairs_that_no_source_can_use_is_refused_by_name(
    key: str, value: Any, families: tuple[str, ...], *, named: bool, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    for family, row in SOURCES.items():
        source = {"path": str(write_jsonl(f"{family}.jsonl", [row]))} | ({"format": family} if named else {})
        made = pipeline_of(source, pairs={key: value})
        if family in families:
            build_dataset(made, check=True)
            continue
        with pytest.raises(ConfigError) as raised:
            build_dataset(made)
        error, wanted = raised.value, " or ".join(families)
        assert (error.where, error.message) == (f"pairs.{key}", f"has no effect: no source holds {wanted}")
        assert error.expected == f"a source of {wanted}"
        assert error.hint == "leave the key out; prefkit formats says what each format holds"
        assert not Path(made.dataset).exists()


def test_what_no_source_can_use_may_be_said_as_it_is_by_default(small: Pipeline, pipeline_of: PipelineOf) -> None:
    """As a manifest does, which says everything."""
    source = {"path": small.sources[0].path, "format": "pairs"}
    build_dataset(pipeline_of(source, pairs=small.as_manifest()["pairs"]))


def test_one_source_that_can_use_a_setting_is_enough(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    sources = [{"path": str(write_jsonl(f"{family}.jsonl", [SOURCES[family]])), "format": family} for family in SOURCES]
    assert not build_dataset(pipeline_of(*sources, pairs={"seed": 1, "min_agreement": 0.5})).unchanged


# what is lost


def test_a_row_that_a_reader_loses_breaks_the_equation(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(*given: Any) -> Any:
        for block in read_source(*given):
            yield block._replace(records=block.records.slice(1))

    monkeypatch.setattr(drafts, "read_source", losing)
    with pytest.raises(AssertionError):
        build_dataset(small)


def test_what_a_killed_build_left_on_disk_is_removed_by_the_next_one_and_its_drafts_stay(
    small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "dataset" / ".drafts"
    held = candidates._Held(0, left)
    held.add(pl.DataFrame({"a": [1]}))
    (left / "0123456789abcdef").mkdir()
    (tmp_path / "dataset" / ".lock").touch()
    assert len([*left.glob(".candidates-*/records.arrow")]) == 1

    def fails(*_: Any) -> Any:
        raise SourceError("x")

    monkeypatch.setattr(drafts, "read_source", fails)
    with pytest.raises(SourceError):
        build_dataset(small)
    assert [path.name for path in left.iterdir()] == ["0123456789abcdef"]
