"""Sources that are added to a dataset: only they are read, what lies there stays, and new rows give way to it."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import oracle
import polars as pl
import pytest
import yaml
from command import Prefkit
from dying import Killed, die_at_rename
from polars.testing import assert_frame_equal

from prefkit import drafts
from prefkit.additions import base_of
from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline, SourceConfig, pipeline_from_manifest
from prefkit.errors import DatasetError, MachineError, PrefkitError, SourceError
from prefkit.format import Kind
from prefkit.repairs import repair_dataset
from prefkit.sources import Block, read_source
from prefkit.store import read_manifest
from prefkit.tables import read_table

Row = dict[str, Any]
Frames = dict[str, pl.DataFrame]
WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]
Grow = Callable[..., list[Built]]
TABLES = ("pairs", "dropped", "rejects")


def tables(built: Built | Pipeline) -> Frames:
    manifest = read_manifest(Path(built.dataset))
    return {name: read_table(Path(built.dataset), name, manifest) for name in TABLES}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in [folder, *sorted(folder.rglob("*"))]}


def check_account(built: Built, found: Frames) -> None:
    """Both equations of the format, and the counts and reasons of the tables as they lie there."""
    c = built.counts
    paired, dropped = c["pairs"] - c["candidate_pairs"], c["dropped"] - c["candidate_dropped"]
    assert c["rows"] == paired + dropped + c["rejects"] - c["candidate_rejects"]
    assert c["candidates"] == c["used"] + c["unused"] + c["candidate_rejects"]
    assert c["prompts"] == c["prompts_with_pair"] + c["prompts_dropped"]
    assert {name: frame.height for name, frame in found.items()} == {name: c[name] for name in TABLES}
    assert c["test"] == found["pairs"].filter(pl.col("split") == "test").height
    reasons = pl.concat([found["dropped"]["reason"], found["rejects"]["reason"]]).value_counts().rows()
    assert dict(reasons) == built.reasons
    assert found["pairs"]["pair_id"].n_unique() == c["pairs"]
    repeated = found["dropped"]["duplicate_of"].drop_nulls()
    assert set(repeated) <= set(found["pairs"]["pair_id"])
    manifest = read_manifest(Path(built.dataset))
    assert (manifest["counts"], manifest["reasons"], manifest["unused"]) == (c, built.reasons, built.unused)
    assert sum(file["rows"] for file in manifest["sources"]) >= c["rows"]


def check_added(before: Frames, after: Frames) -> Frames:
    """What lay there lies there still, in its place (among the pairs of its split); returns what came to it."""
    new = {}
    for name in TABLES:
        splits = [pl.col("split") == split for split in ("train", "test")] if name == "pairs" else [pl.lit(True)]
        came = []
        for split in splits:
            old, now = before[name].filter(split), after[name].filter(split)
            assert_frame_equal(now.head(old.height), old)
            came.append(now.slice(old.height))
        new[name] = pl.concat(came)
    return new


@pytest.fixture
def grow(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Grow:
    """Build a dataset of the first file, then add one file after the other; each step is checked."""

    def make(*files: Sequence[Row | str], forms: Sequence[str] = (), **sections: Any) -> list[Built]:
        forms = forms or ["pairs"] * len(files)
        sources = [
            {"path": str(write_jsonl(f"{number}.jsonl", rows)), "format": form}
            for number, (rows, form) in enumerate(zip(files, forms, strict=True))
        ]
        found: list[Built] = []
        for number in range(1, len(files) + 1):
            pipeline = pipeline_of(*sources[:number], **sections)
            before = tables(pipeline) if found else {}
            found.append(build_dataset(pipeline))
            after = tables(pipeline)
            check_account(found[-1], after)
            if before:
                new = check_added(before, after)
                told = found[-1].added
                assert told is not None
                assert (told["pairs"], told["pairs_before"]) == (new["pairs"].height, before["pairs"].height)
        return found

    return make


def added(built: Built) -> Frames:
    """The rows of the last source."""
    last = read_manifest(Path(built.dataset))["pipeline"]["sources"][-1]["path"]
    return {name: frame.filter(pl.col("source") == last) for name, frame in tables(built).items()}


def reasons_of(built: Built) -> dict[int, str]:
    """Why rows of the last source went, by line from 0."""
    return {line - 1: reason for line, reason in added(built)["dropped"].select("source_row", "reason").rows()}


# texts: a name is thirty words of its own, and a changed one nearly the same


def text(name: str, length: int = 30) -> str:
    return " ".join(f"{name}{i}" for i in range(length))


def changed(original: str, num_changes: int = 1, tag: str = "x") -> str:
    words = original.split()
    return " ".join([*words[: len(words) - num_changes], *(f"{tag}{i}" for i in range(num_changes))])


def begun(original: str, num_changes: int = 1, tag: str = "y") -> str:
    """The first words replaced."""
    return " ".join([*(f"{tag}{i}" for i in range(num_changes)), *original.split()[num_changes:]])


P, Q, C, R, A, B, D, E = (text(name) for name in ("p", "q", "c", "r", "a", "b", "d", "e"))


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def scored(prompt: str, chosen: str, rejected: str, margin: float, **more: Any) -> Row:
    return pair(prompt, chosen, rejected, chosen_score=margin, rejected_score=0.0, **more)


def numbered(*numbers: int) -> list[Row]:
    return [pair(f"p{number}", f"good {number}", f"bad {number}") for number in numbers]


# what is read


def test_only_the_new_file_is_read(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def watching(source: SourceConfig, kind: Kind) -> Iterator[Block]:
        paths.append(Path(source.path).name)
        yield from read_source(source, kind)

    monkeypatch.setattr(drafts, "read_source", watching)
    built = grow(numbered(1, 2), numbered(3), numbered(4))
    assert paths == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert [one.counts["pairs"] for one in built] == [2, 3, 4]


def test_an_addition_says_what_is_added_to_what(write_jsonl: WriteJsonl, prefkit: Prefkit, tmp_path: Path) -> None:
    for name, numbers in (("a", (1, 2, 3)), ("b", (3, 4, 5))):
        write_jsonl(f"{name}.jsonl", numbered(*numbers))
    sources = [{"path": f"{name}.jsonl", "format": "pairs"} for name in "ab"]
    for number in (1, 2):
        settings = {"dataset": "dataset", "sources": sources[:number]}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    first = prefkit("build", "1.yaml", "--json")
    assert (first.code, first.last_json()["added"]) == (0, None)
    told = {"sources": ["b.jsonl"], "pairs": 2, "pairs_before": 3, "split_conflicts": 0}
    before = stamps(tmp_path)
    checked, checked_json = prefkit("build", "2.yaml", "--check"), prefkit("build", "2.yaml", "--check", "--json")
    assert stamps(tmp_path) == before
    assert (checked.code, checked_json.last_json()["added"]) == (0, told)
    done = prefkit("build", "2.yaml")
    assert "adding b.jsonl to the 3 pairs of dataset, which stay as they are" in done.out
    assert "2 pairs from b.jsonl added to 3 that stay as they were\n" in done.out
    assert "dataset (text) written: 5 pairs" in done.out
    assert "rows:       6 = 5 pairs + 1 dropped + 0 rejects" in done.out
    assert done.out.replace(" written: ", " checked, nothing written: ") == checked.out
    manifest = read_manifest(tmp_path / "dataset")
    assert manifest["additions"] == [{"sources": ["b.jsonl"], "pairs": 2}]
    assert [file["path"] for file in manifest["sources"]] == ["a.jsonl", "b.jsonl"]
    assert "| `b.jsonl` | pairs | 3 |" in (tmp_path / "dataset" / "README.md").read_text(encoding="utf-8")
    again = prefkit("build", "2.yaml", "--json")
    assert again.last_json()["added"] is None
    assert "is up to date" in prefkit("build", "2.yaml").out


def test_a_split_conflict_is_told(prefkit: Prefkit, conflict: list[list[Row]], write_jsonl: WriteJsonl) -> None:
    for name, rows in zip("ab", conflict, strict=True):
        write_jsonl(f"{name}.jsonl", rows)
    sources = [{"path": f"{name}.jsonl", "format": "pairs"} for name in "ab"]
    for number in (1, 2):
        write_jsonl(f"{number}.yaml", [{"dataset": "dataset", "sources": sources[:number], "split": SPLIT}])
        done = prefkit("build", f"{number}.yaml")
    assert "0 pairs from b.jsonl added to 2 that stay as they were, 1 new pairs dropped as split_conflict\n" in done.out


# what is there stays, what is new gives way


def test_a_copy_of_an_old_pair_goes_however_good_its_claim(grow: Grow) -> None:
    _, built = grow([scored(P, C, R, 1, annotator="model")], [scored(P, f" {C}", R, 5, annotator="human")])
    (row,) = added(built)["dropped"].to_dicts()
    old = tables(built)["pairs"]["pair_id"][0]
    assert (row["reason"], row["duplicate_of"], row["jaccard"], row["stage"]) == ("duplicate", old, 1.0, "dedupe")


def test_a_near_duplicate_of_an_old_pair_goes(grow: Grow) -> None:
    _, built = grow(
        [scored(P, C, R, 1), pair(Q, A, B)],
        [scored(P, changed(C), R, 5, annotator="human"), pair(changed(P), C, changed(R)), pair(Q, C, R)],
    )
    assert reasons_of(built) == {0: "near_duplicate", 1: "near_duplicate"}
    old = tables(built)["pairs"].filter(pl.col("prompt") == P)["pair_id"][0]
    rows = added(built)["dropped"].sort("source_row").select("duplicate_of", "jaccard").rows()
    assert rows == [(old, pytest.approx(25 / 27)), (old, pytest.approx(25 / 27))]


@pytest.mark.parametrize("policy", ["drop_both", "majority", "higher_margin", "keep"])
def test_of_a_contradiction_the_old_pair_stays_and_the_new_one_goes(policy: str, grow: Grow) -> None:
    """Also where three copies speak for the new one, and a larger margin."""
    new = [scored(P, R, C, 5), scored(P, R + " ", C, 6), scored(P, changed(R), changed(C), 7), scored(Q, B, A, 9)]
    _, built = grow([scored(P, C, R, 1), scored(Q, A, B, 1)], new, dedupe={"contradictions": policy})
    if policy == "keep":
        # of the copies and near-copies among the new ones the best stays
        assert sorted(reasons_of(built).values()) == ["near_duplicate", "near_duplicate"]
        return
    assert reasons_of(built) == dict.fromkeys(range(4), "contradiction")
    old = dict(tables(built)["pairs"].select("prompt", "pair_id").rows())
    assert added(built)["dropped"].sort("source_row")["contradicts"].to_list() == [old[P], old[P], old[P], old[Q]]


def test_new_pairs_that_contradict_each_other_are_judged_as_always(grow: Grow) -> None:
    new = [pair(P, C, R), pair(P, R, C), pair(Q, C, R)]
    _, built = grow([pair(P, A, B)], new)
    assert reasons_of(built) == {0: "contradiction", 1: "contradiction"}


def test_a_new_pair_that_closes_a_circle_goes(grow: Grow) -> None:
    _, built = grow([scored(P, A, B, 0.1), scored(P, B, C, 0.1)], [scored(P, C, A, 9), scored(P, A, C, 9)][:1])
    assert reasons_of(built) == {0: "cycle"}
    _, built = grow([scored(P, A, B, 0.1)], [scored(P, B, C, 0.1), scored(P, C, A, 9)])
    assert reasons_of(built) == {0: "cycle"}  # of the new ones the surer stays


def test_old_pairs_count_among_those_that_a_prompt_may_have(grow: Grow) -> None:
    old = [scored(P, A, B, 1), scored(Q, A, B, 1), scored(Q, C, D, 1)]
    new = [scored(changed(P), C, D, 3), scored(P, E, R, 4), scored(Q, E, R, 9)]
    _, built = grow(old, new, pairs={"max_pairs_per_prompt": 2})
    assert reasons_of(built) == {0: "over_max_pairs_per_prompt", 2: "over_max_pairs_per_prompt"}


def test_old_pairs_that_a_new_one_is_like_both_count_among_those_of_their_prompt(grow: Grow) -> None:
    """The new pair is nearly the same as two old ones that are not so to each other."""
    old = [pair(P, changed(C, 2), R), pair(P, begun(C, 2), R)]
    _, built = grow(old, [pair(P, C, R), pair(P, A, B)], pairs={"max_pairs_per_prompt": 2})
    assert reasons_of(built) == {0: "near_duplicate", 1: "over_max_pairs_per_prompt"}


# the split


SPLIT = {"test_share": 0.5}


def is_test(prompt: str) -> bool:
    return oracle.is_test(oracle.prompt_id({"prompt": prompt}), 0.5, 0)


def prompts_of(*held_out: bool) -> Iterator[str]:
    """Prompts of words of their own, held out or not by themselves as asked."""
    names = (text(f"w{number}") for number in range(1000))
    for wanted in held_out:
        yield next(name for name in names if is_test(name) == wanted)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_new_pair_follows_the_split_of_the_old_prompt_it_is_like(held_out: bool, grow: Grow) -> None:
    (old,) = prompts_of(held_out)
    near = [changed(old, 1, f"t{number}") for number in range(40)]
    new = next(name for name in near if is_test(name) != held_out and oracle.prompt_id({"prompt": name}) < "5")
    further = changed(new, 3, "u")  # like the new prompt only
    _, built = grow([pair(old, A, B)], [pair(new, C, D), pair(further, D, E)], split=SPLIT)
    assert set(tables(built)["pairs"]["split"]) == {"test" if held_out else "train"}
    assert built.counts["pairs"] == 3


@pytest.fixture
def conflict() -> list[list[Row]]:
    """An old pair that is held out, one that is not, and a new one between them: its prompt is like both."""
    for number in range(1000):
        between = text(f"w{number}")
        left, right = changed(between, 2), begun(between, 2)
        if is_test(left) and not is_test(right):
            return [[pair(left, A, B), pair(right, C, D)], [pair(between, E, R)]]
    raise AssertionError


def test_what_links_a_train_and_a_test_prompt_is_dropped_by_name(grow: Grow, conflict: list[list[Row]]) -> None:
    old, (linking,) = conflict
    new = [linking, linking | {"chosen": f" {E}"}, linking | {"chosen": changed(E)}, pair(old[0]["prompt"], A, f" {B}")]
    _, built = grow(old, new, split=SPLIT)
    assert reasons_of(built) == dict.fromkeys(range(3), "split_conflict") | {3: "duplicate"}
    assert built.added is not None
    assert built.added["split_conflicts"] == 3
    rows = added(built)["dropped"].filter(pl.col("reason") == "split_conflict")
    assert rows["duplicate_of"].null_count() == 3
    assert set(rows["stage"]) == {"dedupe"}


def test_what_is_built_at_once_has_no_split_conflict(grow: Grow, conflict: list[list[Row]]) -> None:
    (built,) = grow([*conflict[0], *conflict[1]], split=SPLIT)
    assert (built.counts["pairs"], built.reasons) == (3, {})
    assert len(set(tables(built)["pairs"]["split"])) == 1


# an oracle: whatever came when, the rules hold for what is there


VOCABULARY = [f"w{number}" for number in range(12)]


def some_text(rng: random.Random, known: list[str]) -> str:
    """Words of its own, or a text that was there before, at times with a word changed."""
    if known and rng.random() < 0.7:
        words = rng.choice(known).split()
        if rng.random() < 0.5:
            words[rng.choice([0, -1])] = rng.choice(VOCABULARY)
        return " ".join(words)
    known.append(" ".join(rng.choice(VOCABULARY) for _ in range(rng.choice([3, 18, 30]))))
    return known[-1]


def check_random_additions(seed: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    rng, prompts, sides = random.Random(seed), list[str](), list[str]()
    rows = [
        scored(some_text(rng, prompts), some_text(rng, sides), some_text(rng, sides), rng.choice([0.5, 1, 2]))
        for _ in range(60)
    ]
    rows = [row for row in rows if oracle.fold(row["chosen"]) != oracle.fold(row["rejected"])]
    most = rng.choice([None, 2])
    files = [rows[:20], rows[20:35], rows[35:]]
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", part)), "format": "pairs"} for n, part in enumerate(files)]
    rules = oracle.Rules(max_pairs_per_prompt=most, test_share=0.5)
    known: dict[str, Row] = {}
    for number, part in enumerate(files, 1):
        pipeline = pipeline_of(*sources[:number], pairs={"max_pairs_per_prompt": most}, split=SPLIT)
        before = tables(pipeline) if number > 1 else {}
        built = build_dataset(pipeline)
        after = tables(pipeline)
        check_account(built, after)
        if before:
            check_added(before, after)
        known |= {oracle.pair_id(row): row for row in part}
        check_rules(after, known, rules, before)


def check_rules(
    found: Frames, known: Mapping[str, Row], rules: oracle.Rules, before: Mapping[str, pl.DataFrame]
) -> None:
    """No two pairs that stay repeat or contradict each other, but through what is linked by a pair that went."""
    pairs = found["pairs"].to_dicts()
    old = set(before["pairs"]["pair_id"]) if before else set()
    everything = [*pairs, *(row for row in found["dropped"].to_dicts())]
    limit = rules.threshold or Fraction(1)
    for one, other in combinations(pairs, 2):
        if oracle.jaccard(one["prompt"], other["prompt"], 3) >= limit:
            like = oracle.likeness(one, other, rules)
            assert (like.is_near, like.is_against) == (False, False)
            assert one["split"] == other["split"]
    clusters = oracle.prompt_clusters(everything, rules)
    sizes: dict[int, list[str]] = {}
    for row, cluster in zip(pairs, clusters, strict=False):
        sizes.setdefault(cluster, []).append(row["pair_id"])
    if rules.max_pairs_per_prompt is not None:
        for ids in sizes.values():
            assert len(ids) <= rules.max_pairs_per_prompt or set(ids) <= old
    for row in found["dropped"].to_dicts():
        if row["reason"] == "near_duplicate":
            like = oracle.likeness(row, known[row["duplicate_of"]], rules)
            assert row["jaccard"] == pytest.approx(float(like.direct), abs=1e-12)
        if row["reason"] == "contradiction":
            assert oracle.likeness(row, known[row["contradicts"]], rules).is_against


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_added_the_rules_hold_for_all_pairs(
    seed: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    check_random_additions(seed, write_jsonl, pipeline_of)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 60))
def test_whatever_is_added_the_rules_hold_for_all_pairs_again_and_again(
    seed: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    check_random_additions(seed, write_jsonl, pipeline_of)


def test_a_cluster_of_an_addition_has_a_number_of_its_own(grow: Grow) -> None:
    first = [pair(P, C, R), pair(P, changed(C), R)]
    _, _, built = grow(first, [pair(Q, A, B), pair(Q, changed(A), B)], [pair(D, C, R), pair(D, changed(C), R)])
    assert sorted(tables(built)["dropped"]["cluster_id"]) == [0, 1, 2]


# kinds of sources


def test_sources_of_every_family_are_added_one_after_the_other(grow: Grow) -> None:
    candidates = [
        {"prompt": "k1", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 1.5, None]},
        {"prompt": "k2", "responses": ["a", "b"], "scores": [3, 3]},
    ]
    more = [{"prompt": "k1", "responses": ["b", "a"], "scores": [5, 0]}, {"prompt": "k3", "response": "x", "score": 1}]
    comparisons = [
        {"prompt": "m1", "response_a": "a", "response_b": "b", "winner": "a"},
        {"prompt": "m2", "response_a": "a", "response_b": "b", "winner": "tie"},
        {"prompt": "k1", "response_a": "a", "response_b": "b", "winner": "a"},
    ]
    corrections = [
        {"prompt": "c1", "response": "it were wrong", "correction": "it was wrong"},
        {"prompt": "c2", "response": "same", "correction": "same"},
        {"prompt": "c3", "response": "wrong"},
    ]
    built = grow(
        numbered(1, 2, 1),
        candidates,
        comparisons,
        corrections,
        more,
        corrections[:1],
        forms=["pairs", "candidates", "comparisons", "corrections", "candidates", "corrections"],
        validate={"max_reject_share": 0.5},
    )
    counts = [one.counts for one in built]
    assert [c["pairs"] for c in counts] == [2, 3, 4, 5, 5, 5]
    assert [c["rows"] for c in counts] == [3, 3, 6, 9, 9, 10]
    assert [c["candidates"] for c in counts] == [0, 6, 6, 6, 9, 9]
    assert [(c["used"], c["unused"]) for c in counts[3:]] == [(2, 3), (4, 4), (4, 4)]
    assert [(c["prompts"], c["prompts_with_pair"]) for c in counts[3:]] == [(2, 1), (3, 1), (3, 1)]
    last = built[-1]
    assert last.reasons["contradiction"] == 1  # of the comparison and the candidates before it
    assert [sorted(one) for one in last.report] == [
        ["candidates", "source"],
        ["candidates", "source"],
        ["corrections"],
        ["prompts"],
    ]
    manifest = read_manifest(Path(last.dataset))
    assert [one["pairs"] for one in manifest["additions"]] == [1, 1, 1, 0, 0]
    methods = tables(last)["pairs"]["method"].to_list()
    assert methods == ["paired", "paired", "best_of_n", "comparison", "correction"]


def chat(prompt: str, chosen: str, rejected: str, **more: Any) -> Row:
    def turn(role: str, content: str) -> list[Row]:
        return [{"role": role, "content": content}]

    return {
        "prompt": turn("user", prompt),
        "chosen": turn("assistant", chosen),
        "rejected": turn("assistant", rejected),
    } | more


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def calling(row: Row) -> Row:
    """With a tool call, and the tools: messages with `extra`."""
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    return row | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": TOOLS}


def test_conversations_are_added_with_and_without_tools(grow: Grow) -> None:
    plain, with_call = chat(P, C, R), calling(chat(P, C, R))
    _, second, third, built = grow(
        [plain, chat(Q, A, B)],
        [with_call, chat(Q, changed(A), B)],  # other tools: nothing in common with the first one
        [with_call, chat("new", D, E)],
        [chat(P, C, R, tools=TOOLS)],
    )
    assert (second.counts["pairs"], third.counts["pairs"], built.counts["pairs"]) == (3, 4, 5)
    assert built.reasons == {"near_duplicate": 1, "duplicate": 1}
    pairs = tables(built)["pairs"]
    assert pairs["tools"].null_count() == 3
    extra = [bool(row[0]["extra"]) for row in pairs["chosen"]]
    assert extra == [False, False, True, False, False]


@pytest.mark.parametrize("first", ["pairs", "nothing but drops"])
def test_plain_conversations_are_added_to_some_with_tool_calls(first: str, grow: Grow) -> None:
    dropped = calling(chat(P, C, R))
    dropped |= {"rejected": dropped["chosen"]}
    old = [dropped] if first == "nothing but drops" else [dropped, calling(chat(Q, A, B))]
    _, built = grow(old, [chat("new", D, E)])
    row = tables(built)["dropped"].row(0, named=True)
    assert "tool_calls" in row["chosen"][0]["extra"]


# the place of a source in the pipeline, and the same source twice


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_new_source_may_stand_anywhere(place: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    old = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n, n + 10))), "format": "pairs"} for n in (1, 2)]
    new = {"path": str(write_jsonl("new.jsonl", numbered(1, 30))), "format": "pairs"}
    before = tables(build_dataset(pipeline_of(*old)))
    pipeline = pipeline_of(*old[:place], new, *old[place:])
    built = build_dataset(pipeline)
    check_added(before, tables(built))
    check_account(built, tables(built))
    assert reasons_of(built) == {0: "duplicate"}
    manifest = read_manifest(Path(built.dataset))
    wanted = [*(source["path"] for source in old), new["path"]]
    assert [file["path"] for file in manifest["sources"]] == wanted
    assert [source["path"] for source in manifest["pipeline"]["sources"]] == wanted
    kept = stamps(Path(built.dataset))
    assert build_dataset(pipeline).unchanged
    assert build_dataset(pipeline_of(*old, new)).unchanged  # the order of sources decides nothing
    assert build_dataset(pipeline_from_manifest(manifest["pipeline"], built.dataset)).unchanged
    assert stamps(Path(built.dataset)) == kept


@pytest.mark.parametrize("form", ["pairs", "candidates"])
def test_the_same_source_twice_is_read_once_and_counts_twice(
    form: str, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = numbered(1, 2) if form == "pairs" else [{"prompt": "k", "responses": ["a", "b"], "scores": [1, 2]}]
    source = {"path": str(write_jsonl("a.jsonl", rows)), "format": form}
    told: list[str] = []
    twice = build_dataset(pipeline_of(source, source), tell=told.append)
    check_account(twice, tables(twice))
    assert (twice.counts["pairs"], twice.reasons) == (len(rows), {"duplicate": len(rows)})
    assert twice.counts["rows"] + twice.counts["candidates"] == 4
    assert not any("stopped" in line for line in told)
    assert build_dataset(pipeline_of(source, source)).unchanged
    assert not build_dataset(pipeline_of(source)).unchanged  # one is taken away
    again = build_dataset(pipeline_of(source, source))
    assert again.added is not None
    assert (again.counts, again.added["pairs"]) == (twice.counts, 0)
    check_account(again, tables(again))
    assert build_dataset(pipeline_of(source, source)).unchanged
    third = build_dataset(pipeline_of(source, source, source, source))
    assert third.added is not None
    assert third.added["sources"] == [source["path"]] * 2
    assert third.counts["dropped"] == 3 * len(rows)


# what an addition keeps, and what is built anew


def test_an_audit_goes_and_references_and_runs_stay(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    folder = Path(build_dataset(pipeline_of(sources[0])).dataset)
    for name in ("audit/audit.json", "reference/key/reference.json", "runs/1/run.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}", encoding="utf-8")
    build_dataset(pipeline_of(*sources))
    assert not (folder / "audit").exists()
    assert (folder / "reference" / "key" / "reference.json").exists()
    assert (folder / "runs" / "1" / "run.json").exists()
    assert not (folder / ".drafts").exists()
    assert not (folder / ".building").exists()


def test_the_same_command_again_writes_nothing_and_rebuild_builds_all_of_it(
    grow: Grow, pipeline_of: PipelineOf
) -> None:
    first, built = grow([pair(P, C, R), *numbered(1, 2)], [scored(P, changed(C), R, 9), *numbered(2, 3)])
    folder = Path(built.dataset)
    settings = read_manifest(folder)["pipeline"]
    pipeline = pipeline_from_manifest(settings, built.dataset)
    before = stamps(folder)
    again = build_dataset(pipeline)
    assert (again.unchanged, again.added, again.seconds) == (True, None, {})
    assert (again.counts, again.reasons, again.report) == (built.counts, built.reasons, built.report)
    assert stamps(folder) == before
    whole = build_dataset(pipeline, rebuild=True)
    assert (whole.unchanged, whole.added) == (False, None)
    assert read_manifest(folder)["additions"] == []
    # the better claim is the new one's now
    assert changed(C) in tables(whole)["pairs"]["chosen"].to_list()
    assert changed(C) not in tables(first)["dropped"]["chosen"].to_list()
    assert (whole.counts["rows"], whole.counts["pairs"]) == (built.counts["rows"], built.counts["pairs"])
    kept = contents(folder)
    assert build_dataset(pipeline).unchanged
    assert contents(folder) == kept


def test_an_addition_of_nothing_like_it_gives_the_pairs_of_a_whole_build(
    grow: Grow, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    built = grow(numbered(*range(9), 3), numbered(*range(20, 29)), [*numbered(40, 40), pair("p41", "a", "a")])[-1]
    pipeline = pipeline_from_manifest(read_manifest(Path(built.dataset))["pipeline"], str(tmp_path / "whole"))
    whole = build_dataset(pipeline)
    assert (built.counts, built.reasons, built.unused) == (whole.counts, whole.reasons, whole.unused)
    for name in TABLES:
        order = ["source", "source_row"] if name != "rejects" else ["source", "line"]
        assert_frame_equal(tables(built)[name].sort(order), tables(whole)[name].sort(order))
    assert contents(Path(built.dataset) / "pairs") == contents(tmp_path / "whole" / "pairs")


def break_part(dataset: Path) -> None:
    part = next((dataset / "pairs").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"?")


def remove_part(dataset: Path) -> None:
    next((dataset / "dropped").iterdir()).unlink()


def tear_manifest(dataset: Path) -> None:
    (dataset / "manifest.json").write_text("{", encoding="utf-8")


def older_version(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    (dataset / "manifest.json").write_text(json.dumps(manifest | {"prefkit_version": "0.0.1"}), encoding="utf-8")


@pytest.mark.parametrize("harm", [break_part, remove_part, tear_manifest, older_version])
def test_what_is_damaged_or_of_another_version_is_built_anew(
    harm: Callable[[Path], None], write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    harm(Path(build_dataset(pipeline_of(sources[0])).dataset))
    built = build_dataset(pipeline_of(*sources))
    assert (built.added, built.unchanged, built.counts["pairs"]) == (None, False, 2)
    assert read_manifest(Path(built.dataset))["additions"] == []


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"split": {"seed": 1}}, "split.seed"),
        ({"split": {"test_share": 0.2}}, "split.test_share"),
        ({"dedupe": {"contradictions": "keep"}}, "dedupe.contradictions"),
        ({"dedupe": {"near_duplicates": None}}, "dedupe.near_duplicates"),
        ({"dedupe": {"near_duplicates": {"threshold": 0.9}}}, "dedupe.near_duplicates"),
        ({"validate": {"max_chars": 50}}, "validate.max_chars"),
        ({"pairs": {"max_pairs_per_prompt": 3}}, "pairs.max_pairs_per_prompt"),
        ({"kind": "chat"}, "kind"),
    ],
)
def test_under_other_settings_of_the_data_all_is_built_anew(
    sections: dict[str, Any], name: str, write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    dataset = build_dataset(pipeline_of(sources[0])).dataset
    said: list[str] = []
    built = build_dataset(pipeline_of(*sources, **sections), check=True, tell=said.append)
    assert (built.added, built.unchanged, built.counts["pairs"]) == (None, False, 2)
    assert said[0] == f"building {dataset} anew, nothing is added to what it holds: {name} changed"


def test_what_another_build_wrote_meanwhile_is_what_is_added_to(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset is looked at before it is locked, and hashing it may take minutes."""
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2, 3)]
    build_dataset(pipeline_of(sources[0]))
    look, others = base_of, [pipeline_of(*sources[:2])]

    def slow(*given: Any) -> Any:
        found = look(*given)
        if others:
            build_dataset(others.pop())
        return found

    monkeypatch.setattr("prefkit.build.base_of", slow)
    built = build_dataset(pipeline_of(*sources))
    assert built.added == {"sources": [sources[2]["path"]], "pairs": 1, "pairs_before": 2, "split_conflicts": 0}
    assert built.counts["pairs"] == 3


def test_split_conflicts_of_an_earlier_addition_are_not_told_again(
    conflict: list[list[Row]], write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    rows = [*conflict, numbered(77)]
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", some)), "format": "pairs"} for n, some in enumerate(rows)]
    for number in range(1, len(sources) + 1):
        built = build_dataset(pipeline_of(*sources[:number], split=SPLIT))
    assert built.reasons["split_conflict"] > 0
    assert built.added is not None
    assert built.added["split_conflicts"] == 0


def test_a_changed_a_removed_or_a_rewritten_source_is_built_anew(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    one, two, three = ({"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2, 3))
    build_dataset(pipeline_of(one, two))
    for sources in ((one, three), (one,), (three,), (one | {"annotator": "human"}, two, three)):
        built = build_dataset(pipeline_of(*sources), check=True)
        assert (built.added, built.unchanged, built.counts["pairs"]) == (None, False, len(sources))
    write_jsonl("1.jsonl", numbered(7, 8))
    built = build_dataset(pipeline_of(one, two, three))
    assert (built.added, built.unchanged, built.counts["pairs"]) == (None, False, 4)


def test_a_glob_that_finds_another_file_is_another_source(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    source = {"path": str(write_jsonl("a1.jsonl", numbered(1)).with_name("a*.jsonl")), "format": "pairs"}
    build_dataset(pipeline_of(source))
    write_jsonl("a2.jsonl", numbered(2))
    built = build_dataset(pipeline_of(source))
    assert (built.added, built.counts["pairs"]) == (None, 2)
    new = {"path": str(write_jsonl("b.jsonl", numbered(3))), "format": "pairs"}
    assert build_dataset(pipeline_of(source, new)).added is not None


def test_a_source_that_makes_the_dataset_one_of_conversations_is_no_addition(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    one = {"path": str(write_jsonl("1.jsonl", numbered(1))), "format": "pairs"}
    two = {"path": str(write_jsonl("2.jsonl", [chat(P, C, R)])), "format": "pairs"}
    build_dataset(pipeline_of(one))
    built = build_dataset(pipeline_of(two, one))
    assert (built.kind, built.added, built.counts["pairs"]) == ("chat", None, 2)


def test_other_settings_of_the_build_leave_nothing_to_do(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    source = {"path": str(write_jsonl("a.jsonl", numbered(1, 2))), "format": "pairs"}
    folder = Path(build_dataset(pipeline_of(source)).dataset)
    before = stamps(folder / "pairs")
    built = build_dataset(pipeline_of(source, build={"memory_limit": "2GB", "processes": 1}))
    assert built.unchanged
    assert stamps(folder / "pairs") == before
    assert read_manifest(folder)["pipeline"]["build"] == {"memory_limit": "2GB", "processes": 1}


def test_a_check_of_what_is_up_to_date_writes_nothing_whatever_else_changed(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    source = {"path": str(write_jsonl("a.jsonl", numbered(1, 2))), "format": "pairs"}
    folder = Path(build_dataset(pipeline_of(source)).dataset)
    (folder / ".drafts" / "0123").mkdir(parents=True)
    before = stamps(folder)
    checked = build_dataset(pipeline_of(source, train={"beta": 0.7}), check=True)
    assert (checked.unchanged, checked.counts["pairs"]) == (True, 2)
    assert stamps(folder) == before


def test_a_repaired_dataset_is_added_to_as_little_as_it_is_built_over(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [pair(f"p{n}", f"Sure! good {n}", f"bad {n}") for n in range(4)]
    sources = [
        {"path": str(write_jsonl(f"{n}.jsonl", part)), "format": "pairs"} for n, part in enumerate((rows, numbered(9)))
    ]
    built = build_dataset(pipeline_of(sources[0]))
    mended = repair_dataset(built.dataset, str(tmp_path / "mended"), strip_openers=["sure!"])
    before = contents(Path(mended.out))
    with pytest.raises(DatasetError) as refused:
        build_dataset(pipeline_of(*sources, dataset=mended.out))
    assert str(refused.value) == (
        f"{mended.out}: is a repaired dataset (of {built.dataset})\n"
        "  expected: a directory that no repair has written\n"
        "  next: choose another --out, or remove it"
    )
    assert contents(Path(mended.out)) == before


# additions that fail


def finished(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".drafts/")}


@pytest.mark.parametrize("check", [False, True])
def test_an_addition_that_fails_leaves_the_dataset_byte_for_byte(
    check: bool, write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    old = {"path": str(write_jsonl("a.jsonl", numbered(1, 2))), "format": "pairs"}
    good = {"path": str(write_jsonl("b.jsonl", numbered(3))), "format": "pairs"}
    bad = {"path": str(write_jsonl("bad.jsonl", ["oops", *numbered(4)])), "format": "pairs"}
    empty = {"path": str(write_jsonl("empty.jsonl", [])), "format": "pairs"}
    gone = {"path": str(tmp_path / "gone.jsonl"), "format": "pairs"}
    folder = Path(build_dataset(pipeline_of(old)).dataset)
    before = contents(folder)
    for new, said in (
        ([bad], "1 of 2 rows could not become a record"),
        ([gone], "no such file"),
        ([empty], "holds no row"),
        ([good, bad], "1 of 2 rows could not become a record"),
    ):
        with pytest.raises(SourceError, match=said):
            build_dataset(pipeline_of(old, *new), check=check)
        assert finished(folder) == before
    assert build_dataset(pipeline_of(old)).unchanged
    assert contents(folder) == before


def test_an_addition_without_room_leaves_the_dataset_and_goes_on_with_its_drafts(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    folder = Path(build_dataset(pipeline_of(sources[0])).dataset)
    before = contents(folder)
    monkeypatch.setattr("prefkit.assembly.BYTES_A_PAIR", 10**6)
    with pytest.raises(MachineError, match="2 pairs cannot be compared"):
        build_dataset(pipeline_of(*sources, build={"memory_limit": "1MB"}))
    monkeypatch.undo()
    assert finished(folder) == before
    told: list[str] = []
    built = build_dataset(pipeline_of(*sources), tell=told.append)
    assert told[1:] == [f"{sources[1]['path']} was read before the build was stopped"]
    assert (built.added is not None, built.counts["pairs"]) == (True, 2)


def test_an_addition_to_a_dataset_that_another_process_writes_is_refused(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf
) -> None:
    from prefkit.locks import locked

    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    folder = Path(build_dataset(pipeline_of(sources[0])).dataset)
    before = contents(folder)
    with locked(folder), pytest.raises(PrefkitError, match="process"):
        build_dataset(pipeline_of(*sources))
    assert contents(folder) == before


# additions that are killed


# a draft: its facts and its folder; verdicts: their facts and their folder; three tables, the card, the views, the
# manifest; then these six in their places
@pytest.mark.parametrize("number", range(1, 2 + 2 + 6 + 6 + 1))
def test_an_addition_that_was_killed_at_any_file_is_finished_by_the_same_command(
    number: int, write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no whole build then: an old pair stays although a new one has the better claim."""
    files = [[scored(P, C, R, 1), *numbered(1, 2)], [scored(P, changed(C), R, 9), *numbered(2, 3)]]
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", rows)), "format": "pairs"} for n, rows in enumerate(files)]
    found = []
    for name in ("unbroken", "killed"):
        folder = tmp_path / name
        build_dataset(pipeline_of(sources[0], dataset=str(folder)))
        pipeline = pipeline_of(*sources, dataset=str(folder))
        if name == "killed":
            with monkeypatch.context() as patch:
                die_at_rename(number, patch)
                with pytest.raises(Killed):
                    build_dataset(pipeline)
        build_dataset(pipeline)
        found.append(contents(folder))
    assert found[0] == found[1]
    assert len(found[0]) == 7


def test_a_check_after_a_kill_writes_nothing(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", numbered(n))), "format": "pairs"} for n in (1, 2)]
    folder = Path(build_dataset(pipeline_of(sources[0])).dataset)
    with monkeypatch.context() as patch:
        die_at_rename(14, patch)
        with pytest.raises(Killed):
            build_dataset(pipeline_of(*sources))
    before = stamps(folder)
    assert build_dataset(pipeline_of(*sources), check=True).counts["pairs"] == 2
    assert stamps(folder) == before
