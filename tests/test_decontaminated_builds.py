"""Evaluation items in a whole build: what holds one goes before anything is compared with it. Settings that decide."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from command import Prefkit

from prefkit.build import Built, build_dataset
from prefkit.build_settings import NearDuplicatesConfig
from prefkit.config import Pipeline
from prefkit.errors import ConfigError, SourceError
from prefkit.sources import source_sha256
from prefkit.store import read_manifest

Row = dict[str, Any]
WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]
SPLIT = {"test_share": 0.0}


def table(built: Built, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{built.dataset}/{name}/*.parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def text(name: str, length: int = 30) -> str:
    return " ".join(f"{name}{i}" for i in range(length))


def changed(original: str, num_changes: int = 1, tag: str = "x") -> str:
    words = original.split()
    return " ".join([*words[: len(words) - num_changes], *(f"{tag}{i}" for i in range(num_changes))])


P, Q, C, R, A, B, D, E = (text(name) for name in ("p", "q", "c", "r", "a", "b", "d", "e"))
ITEM = text("item", 20)


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def made(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Callable[..., Pipeline]:
    """A pipeline over rows of one file, against the evaluation items of another."""

    def make(*rows: Row | str, items: list[Row], form: str = "pairs", **sections: Any) -> Pipeline:
        evals = write_jsonl("evals.jsonl", items)
        source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": form}
        against = {"against": [str(evals)], **sections.pop("decontaminate", {})}
        return pipeline_of(source, decontaminate=against, **{"split": SPLIT, **sections})

    return make


Made = Callable[..., Pipeline]


# what goes


def test_a_pair_that_holds_an_item_goes_and_says_which_how_much_and_where(made: Made) -> None:
    rows = [
        pair(f"Before. {ITEM.upper()} After.", A, B),
        pair(P, f"So: {changed(ITEM, 5)}.", R),
        pair(Q, C, changed(ITEM, 11)),
        pair(D, E, f"{A} {ITEM}"),
        pair("short", "one", "two"),
    ]
    built = build_dataset(made(*rows, items=[{"question": text("other")}, {"question": ITEM}]))
    dropped = table(built, "dropped").sort("source_row")
    item = f"{Path(built.dataset).parent}/evals.jsonl:2"
    assert dropped.select("source_row", "stage", "reason", "eval_item", "eval_overlap", "eval_side").rows() == [
        (1, "decontaminate", "contaminated", item, 1.0, "prompt"),
        (2, "decontaminate", "contaminated", item, 0.75, "chosen"),
        (4, "decontaminate", "contaminated", item, 1.0, "rejected"),
    ]
    assert dropped.select("duplicate_of", "contradicts", "jaccard", "cluster_id").null_count().row(0) == (3,) * 4
    assert dropped["chosen"].to_list() == [rows[number]["chosen"] for number in (0, 1, 3)]
    assert (built.reasons, built.counts["pairs"], built.counts["rows"]) == ({"contaminated": 3}, 2, 5)


def test_no_other_drop_names_an_item(made: Made) -> None:
    rows = [pair(P, C, R), pair(P, C, R), pair(Q, A, A), pair(D, ITEM, B)]
    built = build_dataset(made(*rows, items=[{"question": ITEM}]))
    assert built.reasons == {"contaminated": 1, "duplicate": 1, "identical": 1}
    other = table(built, "dropped").filter(pl.col("reason") != "contaminated")
    assert other.select("eval_item", "eval_overlap", "eval_side").null_count().row(0) == (2, 2, 2)


def test_an_invalid_pair_goes_for_what_is_wrong_with_it(made: Made) -> None:
    built = build_dataset(made(pair(ITEM, A, A), pair(ITEM, A, ""), items=[{"question": ITEM}]))
    assert built.reasons == {"empty_rejected": 1, "identical": 1}


def test_the_equations_hold_for_every_family(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    given: dict[str, list[Any]] = {
        "pairs": [pair(P, C, R), pair(ITEM, C, R), "oops"],
        "candidates": [
            {"prompt": ITEM, "responses": ["a", "b", "c"], "scores": [1, 2, 3]},
            {"prompt": "k1", "responses": ["a", "b"], "scores": [1, 2]},
            {"prompt": "k2", "responses": ["a", ITEM, "b"], "scores": [1, 2, 3]},
        ],
        "comparisons": [{"prompt": Q, "response_a": ITEM, "response_b": "b", "winner": "b"}],
        "corrections": [{"prompt": D, "response": f"{ITEM} were", "correction": f"{ITEM} was"}],
    }
    evals = write_jsonl("evals.jsonl", [{"question": ITEM}])
    sources = [{"path": str(write_jsonl(f"{form}.jsonl", rows)), "format": form} for form, rows in given.items()]
    built = build_dataset(
        pipeline_of(*sources, decontaminate={"against": [str(evals)]}, validate={"max_reject_share": 0.5}, split=SPLIT)
    )
    c = built.counts
    assert built.reasons == {"contaminated": 4, "not_json": 1}
    assert (c["rows"], c["pairs"] - c["candidate_pairs"], c["dropped"] - c["candidate_dropped"]) == (5, 1, 3)
    assert (c["candidates"], c["used"], c["unused"]) == (8, 6, 2)
    assert (c["prompts"], c["prompts_with_pair"], c["prompts_dropped"]) == (3, 2, 1)
    assert table(built, "pairs")["prompt"].to_list() == [P, "k1", "k2"]


def test_every_message_of_a_conversation_is_looked_at(made: Made) -> None:
    turns = [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": ITEM},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]
    rows = [
        pair(turns, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]),
        pair([turns[3]], [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]),
    ]
    built = build_dataset(made(*rows, items=[{"question": ITEM}]))
    assert (built.kind, built.reasons, built.counts["pairs"]) == ("chat", {"contaminated": 1}, 1)


# beside deduplication


def test_a_contaminated_copy_never_stands_for_a_clean_pair(made: Made) -> None:
    """Its claim is the best of all: were it compared, the clean pair would go as its near-duplicate."""
    long = text("p", 40)
    prompts = [long, f"{long} {ITEM}"]
    near = [changed(C), f"{C} {ITEM}"]
    scores = {"chosen_score": 9, "rejected_score": 0, "annotator": "human"}
    built = build_dataset(
        made(
            pair(prompts[1], C, R, **scores),
            pair(prompts[0], C, R, annotator="model"),
            pair(Q, near[1], R, **scores),
            pair(Q, C, R, annotator="model"),
            pair(D, f"{A} {ITEM}", B, **scores),  # against the next one, but for the item
            pair(D, B, A, annotator="model"),
            items=[{"question": ITEM}],
            dedupe={"near_duplicates": {"threshold": 0.3}},
        )
    )
    assert built.reasons == {"contaminated": 3}
    assert set(table(built, "pairs")["annotator"]) == {"model"}


def test_without_evaluation_files_the_same_rows_are_near_duplicates(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = [pair(Q, f"{C} {ITEM}", R, annotator="human"), pair(Q, C, R, annotator="model")]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    built = build_dataset(pipeline_of(source, dedupe={"near_duplicates": {"threshold": 0.3}}))
    assert built.reasons == {"near_duplicate": 1}


def test_a_contaminated_pair_counts_neither_as_a_copy_nor_among_those_of_its_prompt(made: Made) -> None:
    rows = [
        pair(P, C, R),
        pair(P, R, C),
        pair(P, C, f"{R} {ITEM}"),  # would make the majority
        pair(Q, ITEM, A, chosen_score=9, rejected_score=1),
        pair(Q, C, D),
    ]
    sections = {"dedupe": {"contradictions": "majority", "near_duplicates": {"threshold": 0.5}}}
    built = build_dataset(made(*rows, items=[{"question": ITEM}], pairs={"max_pairs_per_prompt": 1}, **sections))
    assert built.reasons == {"contaminated": 2, "contradiction": 2}
    assert table(built, "pairs")["chosen"].to_list() == [C]


# what is told and recorded


def test_the_manifest_names_every_evaluation_file_and_the_screen_says_what_was_looked_for(
    write_jsonl: WriteJsonl, prefkit: Prefkit, tmp_path: Path
) -> None:
    write_jsonl("rows.jsonl", [pair(P, C, R), pair(ITEM, C, R), pair(Q, A, text("named"))])
    write_jsonl("evals-1.jsonl", [{"question": ITEM}, {"question": None}])
    write_jsonl("evals-2.jsonl", [{"q": {"a": text("named")}, "name": "n7", "prompt": "x"}])
    settings = {
        "dataset": "dataset",
        "sources": [{"path": "rows.jsonl", "format": "pairs"}],
        "decontaminate": {"against": ["evals-1.jsonl", {"path": "evals-2*", "columns": ["q.a"], "id": "name"}]},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    checked = prefkit("build", "pipeline.yaml", "--check")
    assert (checked.code, (tmp_path / "dataset").exists()) == (0, False)
    done = prefkit("build", "pipeline.yaml")
    for ended in (checked, done):
        lines = ended.out.splitlines()
        said = "(columns: of this evaluation set says otherwise)"
        assert f"evals-1.jsonl: 1 evaluation texts of 2 rows, from question {said}" in lines
        assert "evals-1.jsonl: 1 of 2 rows hold no text and are not looked for" in lines
        assert "evals-2.jsonl: 1 evaluation texts of 1 rows, from q.a" in lines
        assert "  rows:       3 = 1 pairs + 2 dropped + 0 rejects" in lines
        assert f"  {2:>9} contaminated" in lines
    dropped = pl.read_parquet("dataset/dropped/*.parquet").sort("source_row")
    assert dropped["eval_item"].to_list() == ["evals-1.jsonl:1", "evals-2.jsonl:n7"]
    manifest = read_manifest(tmp_path / "dataset")
    assert manifest["evals"] == [
        {"path": name, "sha256": source_sha256(name), "rows": rows}
        for name, rows in (("evals-1.jsonl", 2), ("evals-2.jsonl", 1))
    ]
    assert manifest["pipeline"]["decontaminate"]["against"] == [
        {"path": "evals-1.jsonl", "columns": [], "id": None},
        {"path": "evals-2*", "columns": ["q.a"], "id": "name"},
    ]
    again = prefkit("build", "pipeline.yaml")
    assert "is up to date" in again.out
    (tmp_path / "evals-2-more.jsonl").write_text('{"q": {"a": "z"}, "name": 1}\n', encoding="utf-8")
    assert "written" in prefkit("build", "pipeline.yaml").out


def test_an_evaluation_file_that_does_not_exist_stops_the_build_before_anything(made: Made) -> None:
    pipeline = made(pair(P, C, R), items=[{"question": ITEM}])
    Path(pipeline.decontaminate.against[0].path).unlink()
    for check in (True, False):
        with pytest.raises(SourceError, match="no such file") as stopped:
            build_dataset(pipeline, check=check)
        assert stopped.value.where == pipeline.decontaminate.against[0].path
        assert not Path(pipeline.dataset).exists()


def test_a_changed_evaluation_file_builds_anew_and_an_unchanged_one_does_not(made: Made) -> None:
    pipeline = made(pair(P, C, R), pair(Q, A, ITEM), items=[{"question": "something else"}])
    assert build_dataset(pipeline).counts["pairs"] == 2
    assert build_dataset(pipeline).unchanged
    path = Path(pipeline.decontaminate.against[0].path)
    path.write_text(json.dumps({"question": ITEM}) + "\n", encoding="utf-8")
    built = build_dataset(pipeline)
    assert (built.unchanged, built.added, built.reasons) == (False, None, {"contaminated": 1})
    path.unlink()
    before = contents(Path(pipeline.dataset))
    with pytest.raises(SourceError, match="no such file"):
        build_dataset(pipeline)
    assert contents(Path(pipeline.dataset)) == before


def test_new_sources_are_added_under_the_same_evaluation_files_only(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    evals = write_jsonl("evals.jsonl", [{"question": ITEM}])
    sources = [
        {"path": str(write_jsonl(f"{n}.jsonl", rows)), "format": "pairs"}
        for n, rows in enumerate(([pair(P, C, R), pair(Q, A, ITEM)], [pair(D, E, ITEM), pair(D, E, B)]))
    ]
    against = {"against": [str(evals)]}
    build_dataset(pipeline_of(sources[0], decontaminate=against))
    built = build_dataset(pipeline_of(*sources, decontaminate=against), check=True)
    assert built.added is not None
    assert (built.added["pairs"], built.reasons) == (1, {"contaminated": 2})
    assert build_dataset(pipeline_of(*sources), check=True).added is None
    with evals.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": text("new")}) + "\n")
    anew = build_dataset(pipeline_of(*sources, decontaminate=against))
    assert (anew.added, anew.unchanged, anew.counts["pairs"]) == (None, False, 2)
    assert read_manifest(Path(anew.dataset))["evals"][0]["rows"] == 2


# each setting decides something


@pytest.mark.parametrize(
    ("near", "num_kept"),
    [
        ({}, 3),  # R with its last three words changed is no longer like R: 23/31
        ({"threshold": 0.7}, 2),
        ({"threshold": 0.95}, 4),
        ({"threshold": 1}, 4),
        (None, 4),
        ({"ngram": 1}, 2),  # 27/33
        ({"prompt_ngram": 30}, 4),  # the prompt with a word changed is another one
        ({"ngram": 31}, 4),  # all words are one n-gram
    ],
)
def test_each_setting_of_near_duplicates_decides(
    near: Any, num_kept: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = [pair(P, C, R), pair(changed(P), changed(C), R), pair(P, C, changed(R, 3)), pair(P, A, B)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    built = build_dataset(pipeline_of(source, dedupe={"near_duplicates": near}))
    assert built.counts["pairs"] == num_kept
    assert built.reasons == ({"near_duplicate": 4 - num_kept} if num_kept < 4 else {})


@pytest.mark.parametrize(("name", "value"), [("num_perm", 16), ("weights", [0.9, 0.1])])
def test_the_settings_of_the_search_decide_what_is_found_near_the_threshold(name: str, value: Any) -> None:
    from prefkit.minhash import choose_bands

    usual, other = (NearDuplicatesConfig.model_validate(given) for given in ({}, {name: value}))
    found = [choose_bands(one.threshold, one.num_perm, one.weights) for one in (usual, other)]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("settings", "num_dropped"),
    [({}, 1), ({"max_overlap": 0.8}, 0), ({"max_overlap": 0.2}, 2), ({"ngram": 4}, 2), ({"ngram": 16}, 0)],
)
def test_each_setting_of_decontamination_decides(settings: Row, num_dropped: int, made: Made) -> None:
    """One text has the first 15 words of 20, the other every fifth word changed but the first nine: 9 of 20."""
    words = ITEM.split()
    broken = " ".join([*words[:9], "x", *words[10:14], "y", *words[15:17], "z", *words[18:]])
    rows = [pair(P, changed(ITEM, 5), R), pair(Q, broken, R)]
    built = build_dataset(made(*rows, items=[{"question": ITEM}], decontaminate=settings))
    assert built.reasons == ({"contaminated": num_dropped} if num_dropped else {})


def test_columns_and_id_of_an_evaluation_set_decide(made: Made, tmp_path: Path) -> None:
    items = [{"question": "something else", "answer": ITEM, "key": 12}]
    assert build_dataset(made(pair(P, C, ITEM), items=items), check=True).counts["pairs"] == 1
    against = [{"path": str(tmp_path / "evals.jsonl"), "columns": ["answer"], "id": "key"}]
    built = build_dataset(made(pair(P, C, ITEM), items=items, decontaminate={"against": against}))
    assert table(built, "dropped")["eval_item"].to_list() == [f"{tmp_path}/evals.jsonl:12"]


# how settings are written


@pytest.fixture
def load(write_jsonl: WriteJsonl, tmp_path: Path) -> Callable[..., Pipeline]:
    from prefkit.config import load_pipeline

    write_jsonl("rows.jsonl", [])

    def make(sections: Row | None = None, *changes: str) -> Pipeline:
        settings = {"dataset": "d", "sources": [{"path": "rows.jsonl", "format": "pairs"}], **(sections or {})}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return load_pipeline(tmp_path / "p.yaml", changes)

    return make


def test_near_matching_is_on_by_default_and_off_by_null(load: Callable[..., Pipeline]) -> None:
    near = load().dedupe.near_duplicates
    assert near == NearDuplicatesConfig(threshold=0.8, ngram=5, prompt_ngram=3, num_perm=128, weights=(0.05, 0.95))
    assert load({"dedupe": {"near_duplicates": None}}).dedupe.near_duplicates is None
    assert load({}, "dedupe.near_duplicates=null").dedupe.near_duplicates is None
    assert load({"dedupe": {"near_duplicates": {}}}).dedupe.near_duplicates == near
    for given in ({}, {"dedupe": {"near_duplicates": {"ngram": 4}}}):
        changed_ = load(given, "dedupe.near_duplicates.threshold=.9").dedupe.near_duplicates
        assert changed_ is not None
        assert (changed_.threshold, changed_.prompt_ngram) == (0.9, 3)


def test_evaluation_files_may_be_named_by_their_paths_alone(load: Callable[..., Pipeline]) -> None:
    against = load({"decontaminate": {"against": ["a.jsonl", {"path": "b/*.json", "id": "k"}]}}).decontaminate.against
    assert [(one.path, one.columns, one.id) for one in against] == [("a.jsonl", [], None), ("b/*.json", [], "k")]
    changed_ = load({}, "decontaminate.against=[c.jsonl]").decontaminate
    assert [one.path for one in changed_.against] == ["c.jsonl"]
    assert (changed_.ngram, changed_.max_overlap) == (8, 0.5)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"dedupe": {"near_duplicates": {"threshold": 0}}}, "dedupe.near_duplicates.threshold"),
        ({"dedupe": {"near_duplicates": {"threshold": 1.01}}}, "dedupe.near_duplicates.threshold"),
        ({"dedupe": {"near_duplicates": {"threshold": "most"}}}, "dedupe.near_duplicates.threshold"),
        ({"dedupe": {"near_duplicates": {"ngram": 0}}}, "dedupe.near_duplicates.ngram"),
        ({"dedupe": {"near_duplicates": {"prompt_ngram": 33}}}, "dedupe.near_duplicates.prompt_ngram"),
        ({"dedupe": {"near_duplicates": {"num_perm": 8}}}, "dedupe.near_duplicates.num_perm"),
        ({"dedupe": {"near_duplicates": {"weights": [0.5]}}}, "key dedupe.near_duplicates.weights[1] is missing"),
        (
            {"dedupe": {"near_duplicates": {"weights": [0.5, 0.6]}}},
            "dedupe.near_duplicates.weights must sum to 1",
        ),
        ({"dedupe": {"near_duplicates": {"treshold": 0.9}}}, "did you mean dedupe.near_duplicates.threshold?"),
        ({"dedupe": {"near_duplicates": 0.9}}, "dedupe.near_duplicates"),
        ({"dedupe": {"near": None}}, "dedupe.near"),
        ({"validate": {"score_scale": [1]}}, "key validate.score_scale[1] is missing"),
        ({"decontaminate": {"ngram": 1}}, "decontaminate.ngram"),
        ({"decontaminate": {"max_overlap": 1.5}}, "decontaminate.max_overlap"),
        ({"decontaminate": {"against": "a.jsonl"}}, "decontaminate.against"),
        ({"decontaminate": {"against": [{"columns": ["a"]}]}}, "decontaminate.against"),
        (
            {"decontaminate": {"against": [{"path": "a", "colums": []}]}},
            "did you mean decontaminate.against[0].columns?",
        ),
        ({"decontaminate": {"against": [{"path": "a", "columns": [[]]}]}}, "decontaminate.against"),
        ({"build": {"processes": 0}}, "build.processes"),
        ({"build": {"processes": True}}, "build.processes"),
        ({"build": {"memory": "1GB"}}, "build.memory"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_its_name(
    section: Row, said: str, load: Callable[..., Pipeline]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(section)
    assert said in str(refused.value)


def test_a_build_uses_as_many_processes_as_it_is_told_or_as_there_are_cores(load: Callable[..., Pipeline]) -> None:
    import os

    assert load({}, "build.processes=3").build.num_processes() == 3
    assert load().build.num_processes() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("key", "value"), [("ngram", 9), ("max_overlap", 0.4)])
def test_a_setting_of_decontamination_without_evaluations_is_refused(
    key: str, value: Any, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    with pytest.raises(ConfigError) as raised:
        build_dataset(pipeline_of(source, decontaminate={key: value}))
    assert raised.value.as_dict() == {
        "kind": "ConfigError",
        "message": "has no effect: there is nothing to compare with",
        "where": f"decontaminate.{key}",
        "expected": "evaluation files in decontaminate.against",
        "hint": "name some, or leave the key out",
    }
