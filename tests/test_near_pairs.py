"""The rule for near-duplicate pairs, contradictions and prompt clusters, case by case, built as a user builds.

Every case is also held against tests/oracle.py: what is kept, each reason, each similarity, each split.
"""

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import polars as pl
import pytest

from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline

Given = dict[str, Any]
SPLIT = {"test_share": 0.4}


class Result(NamedTuple):
    """What became of the rows of a file, by line from 0."""

    built: Built
    kept: dict[int, Given]
    dropped: dict[int, Given]

    def reasons(self) -> dict[int, str]:
        return {number: row["reason"] for number, row in self.dropped.items()}


Build = Callable[..., Result]


def table(built: Built, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{built.dataset}/{name}/*.parquet")


def by_line(frame: pl.DataFrame) -> dict[int, Given]:
    return {row["source_row"] - 1: row for row in frame.iter_rows(named=True)}


def rules_of(pipeline: Pipeline) -> oracle.Rules:
    near, split = pipeline.dedupe.near_duplicates, pipeline.split
    assert pipeline.dedupe.exact
    return oracle.Rules(
        None if near is None else Fraction(str(near.threshold)),
        5 if near is None else near.ngram,
        3 if near is None else near.prompt_ngram,
        pipeline.dedupe.contradictions,
        pipeline.dedupe.cycles,
        pipeline.pairs.max_pairs_per_prompt,
        split.test_share,
        split.seed,
    )


def check_against_oracle(result: Result, rows: list[Given], rules: oracle.Rules) -> None:
    """Rows as they came out of validation: what the oracle makes of them is what the build did."""
    wanted = oracle.dedupe(rows, rules)
    assert result.reasons() == {number: drop.reason for number, drop in wanted.dropped.items()}
    assert sorted(result.kept) == wanted.kept
    for number, drop in wanted.dropped.items():
        row = result.dropped[number]
        assert row["stage"] == "dedupe"
        assert row["duplicate_of"] == drop.duplicate_of
        assert row["jaccard"] == (None if drop.jaccard is None else pytest.approx(float(drop.jaccard), abs=1e-12))
        if drop.reason == "contradiction":
            assert row["contradicts"] in drop.contradicts
        else:
            assert row["contradicts"] is None
        assert row["cluster_id"] is not None or drop.reason != "near_duplicate"
    near = {number: drop for number, drop in wanted.dropped.items() if drop.reason == "near_duplicate"}
    named = {(result.dropped[number]["cluster_id"], drop.cluster) for number, drop in near.items()}
    assert len(named) == len({name for name, _ in named}) == len({name for _, name in named})
    assert {number: row["split"] for number, row in result.kept.items()} == wanted.split


@pytest.fixture
def build(tmp_path: Path, pipeline_of: Callable[..., Pipeline]) -> Build:
    """Build rows of one file (kept and dropped by line from 0), and hold the result against the oracle."""

    def make(*rows: Given, near: Given | None = None, exact_only: bool = False, **sections: Any) -> Result:
        path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        dedupe = sections.pop("dedupe", {})
        if exact_only or near is not None:
            dedupe = {**dedupe, "near_duplicates": near}
        pipeline = pipeline_of(
            {"path": str(path), "format": "pairs"},
            dataset=str(path.with_suffix("")),
            dedupe=dedupe,
            **{"split": SPLIT, **sections},
        )
        built = build_dataset(pipeline)
        result = Result(built, by_line(table(built, "pairs")), by_line(table(built, "dropped")))
        assert built.counts["rejects"] == 0
        assert len(result.kept) + len(result.dropped) == len(rows)
        every = {**result.kept, **result.dropped}
        check_against_oracle(result, [every[number] for number in range(len(rows))], rules_of(pipeline))
        return result

    return make


# texts: a name is thirty words of its own, and a changed one nearly the same


def text(name: str, length: int = 30) -> str:
    return " ".join(f"{name}{i}" for i in range(length))


def changed(original: str, num_changes: int = 1, tag: str = "x") -> str:
    """The last words replaced: of thirty, 25 of 27 5-grams stay after one change, 24 of 28 after two."""
    words = original.split()
    return " ".join([*words[: len(words) - num_changes], *(f"{tag}{i}" for i in range(num_changes))])


P, Q, C, R, A, B, D = (text(name) for name in ("p", "q", "c", "r", "a", "b", "d"))
ONE, TWO = 25 / 27, 24 / 28  # similarity of a text to itself with one and with two words changed


def pair(prompt: Any, chosen: Any, rejected: Any, annotator: str | None = None, margin: float | None = None) -> Given:
    row: Given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if annotator:
        row["annotator"] = annotator
    if margin is not None:
        row |= {"chosen_score": margin, "rejected_score": 0.0}
    return row


def id_of(result: Result, number: int) -> str:
    return str({**result.kept, **result.dropped}[number]["pair_id"])


# near-duplicates


def test_a_pair_that_is_nearly_another_under_the_same_prompt_goes(build: Build) -> None:
    found = build(pair(P, C, R, margin=2.0), pair(P, changed(C), changed(R), margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}
    row = found.dropped[1]
    assert (row["duplicate_of"], row["jaccard"], row["contradicts"]) == (id_of(found, 0), pytest.approx(ONE), None)
    assert (row["stage"], row["chosen"]) == ("dedupe", changed(C))
    assert isinstance(row["cluster_id"], int)
    assert found.built.reasons == {"near_duplicate": 1}


def test_one_of_a_nearly_equal_prompt_goes_as_well(build: Build) -> None:
    assert build(pair(P, C, R), pair(changed(P), C, changed(R))).built.reasons == {"near_duplicate": 1}
    found = build(pair(P, C, R, margin=2.0), pair(changed(P), C, R, margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}  # not a copy: the prompt is another one
    assert found.dropped[1]["jaccard"] == 1.0


def test_under_another_prompt_nothing_is_a_near_duplicate(build: Build) -> None:
    assert build(pair(P, C, R), pair(Q, C, R), pair(changed(P, 12), C, R)).reasons() == {}


def test_both_sides_must_match(build: Build) -> None:
    found = build(pair(P, C, R), pair(P, changed(C), A), pair(P, B, changed(R)), pair(P, changed(C, 8), changed(R)))
    assert found.reasons() == {}


def test_the_similarity_of_a_pair_is_that_of_the_side_that_is_less_alike(build: Build) -> None:
    found = build(pair(P, C, R, margin=2.0), pair(P, changed(C), changed(R, 2), margin=1.0))
    assert found.dropped[1]["jaccard"] == pytest.approx(TWO)
    found = build(pair(P, C, R, margin=2.0), pair(P, changed(C, 2), R, margin=1.0))
    assert found.dropped[1]["jaccard"] == pytest.approx(TWO)


def test_a_long_prompt_makes_no_different_replies_alike(build: Build) -> None:
    long = text("p", 2000)
    found = build(pair(long, C, R), pair(long, A, B), pair(changed(long), D, text("e")))
    assert found.reasons() == {}


def test_a_long_common_beginning_does_not_make_two_prompts_of_two_questions(build: Build) -> None:
    """19 of 20 words are alike; what is asked about is not. By the rule they are one cluster: the sides decide."""
    found = build(pair(f"{P} apples", C, R), pair(f"{P} pears", A, B))
    assert found.reasons() == {}


def test_a_near_duplicate_of_equal_sets_but_other_text_has_similarity_one(build: Build) -> None:
    found = build(pair(P, C, R, margin=2.0), pair(P, C.upper(), R.title(), margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}
    assert found.dropped[1]["jaccard"] == 1.0


def test_copies_are_duplicates_and_not_near_duplicates(build: Build) -> None:
    found = build(pair(P, C, R), pair(f" {P}\n", C.replace(" ", "  "), R))
    assert list(found.reasons().values()) == ["duplicate"]
    assert next(iter(found.dropped.values()))["cluster_id"] is None


def test_a_copy_of_a_near_duplicate_goes_to_the_pair_that_is_kept(build: Build) -> None:
    found = build(
        pair(P, C, R, margin=3.0), pair(P, changed(C), R, margin=2.0), pair(P, f"{changed(C)} ", R, margin=1.0)
    )
    assert found.reasons() == {1: "near_duplicate", 2: "near_duplicate"}
    assert [row["duplicate_of"] for row in found.dropped.values()] == [id_of(found, 0)] * 2
    assert [row["jaccard"] for row in found.dropped.values()] == [pytest.approx(ONE)] * 2


def test_a_copy_of_what_is_kept_of_a_cluster_is_a_duplicate(build: Build) -> None:
    found = build(pair(P, C, R, margin=3.0), pair(P, changed(C), R, margin=2.0), pair(P, f"{C} ", R, margin=1.0))
    assert found.reasons() == {1: "near_duplicate", 2: "duplicate"}


# which one is kept


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (("model", 9.0), ("human", 1.0), 1),
        (("model", 9.0), ("rule", 1.0), 1),
        (("rule", 1.0), ("human", None), 1),
        ((None, 9.0), ("model", None), 1),
        (("human", 1.0), ("human", 2.0), 1),
        (("human", None), ("human", 0.5), 1),
        (("model", 2.0), ("model", 1.0), 0),
    ],
)
def test_a_humans_pair_is_kept_then_the_larger_margin(
    first: tuple[str | None, float | None], second: tuple[str | None, float | None], winner: int, build: Build
) -> None:
    for prompt in (P, changed(P)):
        found = build(pair(P, C, R, *first), pair(prompt, changed(C), changed(R), *second))
        assert list(found.kept) == [winner]
        assert found.reasons() == {1 - winner: "near_duplicate"}


def test_with_equal_claims_the_smaller_pair_id_is_kept_whichever_came_first(build: Build) -> None:
    rows = [pair(P, changed(C, 1, tag), R) for tag in "uvwxyz"]
    ids = [oracle.pair_id(row) for row in rows]
    for order in (rows, rows[::-1]):
        found = build(*order)
        assert [row["pair_id"] for row in found.kept.values()] == [min(ids)]


def test_of_a_chain_one_is_kept_and_says_how_alike_its_ends_are(build: Build) -> None:
    words = [f"w{i}" for i in range(60)]
    links = [" ".join(words[at : at + 40]) for at in (0, 3, 6, 9)]  # 33 of 39 grams in common with the next
    assert oracle.jaccard(links[0], links[1], 5) > 0.8 > oracle.jaccard(links[0], links[2], 5)
    found = build(*(pair(P, link, R, margin=9.0 - at) for at, link in enumerate(links)))
    assert list(found.kept) == [0]
    assert found.reasons() == dict.fromkeys([1, 2, 3], "near_duplicate")
    assert {row["cluster_id"] for row in found.dropped.values()} == {found.dropped[1]["cluster_id"]}
    assert [found.dropped[at]["jaccard"] for at in (1, 2, 3)] == [
        pytest.approx(float(oracle.jaccard(links[0], link, 5))) for link in links[1:]
    ]
    assert found.dropped[3]["jaccard"] == 0.6


def test_two_clusters_have_two_names(build: Build) -> None:
    found = build(
        *(pair(P, changed(C, 1, tag), R) for tag in "xyz"), *(pair(Q, changed(A, 1, tag), B) for tag in "xyz")
    )
    assert len(found.kept) == 2
    ids = {
        number // 3: {found.dropped[n]["cluster_id"] for n in found.dropped if n // 3 == number // 3}
        for number in (0, 3)
    }
    assert all(len(names) == 1 for names in ids.values())
    assert ids[0] != ids[1]


# short sides


def test_short_replies_under_one_prompt_are_near_duplicates_where_their_words_are_equal(build: Build) -> None:
    for prompt in (P, f"  {P}\n", P.replace(" ", "\t")):
        found = build(pair(P, "Yes, it is", "no", margin=2.0), pair(prompt, "yes, IT is", "No", margin=1.0))
        assert found.reasons() == {1: "near_duplicate"}
        assert found.dropped[1]["jaccard"] == 1.0


def test_short_replies_under_nearly_the_same_prompt_agree_by_chance_and_stay(build: Build) -> None:
    found = build(pair(P, "Yes", "No"), pair(changed(P), "Yes", "No"), pair(changed(P, 1, "z"), "yes", "no"))
    assert found.reasons() == {}


def test_one_short_side_is_enough_to_stay(build: Build) -> None:
    rows = [pair(P, "Yes", R), pair(changed(P), "Yes", R), pair(P, C, "no"), pair(changed(P), C, "no")]
    assert build(*rows).reasons() == {}
    found = build(pair(P, "Yes", R, margin=2.0), pair(P, "yes", changed(R), margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}


def test_a_side_of_exactly_n_words_is_not_short(build: Build) -> None:
    five, four = "one two three four five", "one two three four"
    assert build(pair(P, five, R, margin=2.0), pair(changed(P), five, R, margin=1.0)).reasons() == {1: "near_duplicate"}
    assert build(pair(P, four, R), pair(changed(P), four, R)).reasons() == {}
    near = {"ngram": 3}
    found = build(pair(P, four, R, margin=2.0), pair(changed(P), four, R, margin=1.0), near=near)
    assert found.reasons() == {1: "near_duplicate"}


def test_short_replies_of_other_words_are_no_near_duplicates(build: Build) -> None:
    assert build(pair(P, "yes it is", "no"), pair(P, "it is yes", "no"), pair(P, "yes it", "no")).reasons() == {}


def test_a_short_reversal_under_nearly_the_same_prompt_stays_and_under_the_same_one_goes(build: Build) -> None:
    assert build(pair(P, "Yes", "No"), pair(changed(P), "No", "Yes")).reasons() == {}
    found = build(pair(P, "Yes", "No"), pair(f"{P} ", "no", "YES"))
    assert found.reasons() == dict.fromkeys([0, 1], "contradiction")


# contradictions


def test_a_swapped_twin_is_a_contradiction_and_never_a_near_duplicate(build: Build) -> None:
    for prompt in (P, changed(P)):
        found = build(pair(P, C, R), pair(prompt, changed(R), changed(C)))
        assert found.reasons() == dict.fromkeys([0, 1], "contradiction")
        assert [found.dropped[at]["contradicts"] for at in (0, 1)] == [id_of(found, 1), id_of(found, 0)]
        assert [found.dropped[at]["duplicate_of"] for at in (0, 1)] == [None, None]


def test_a_swapped_twin_whose_sides_are_nearly_equal_is_one_too(build: Build) -> None:
    """As corrections are: chosen is like chosen', but more like rejected'."""
    right = changed(C)
    found = build(pair(P, right, C), pair(P, C, right))
    assert found.reasons() == dict.fromkeys([0, 1], "contradiction")
    found = build(pair(P, right, C), pair(changed(P), f"{C} ", right))
    assert found.reasons() == dict.fromkeys([0, 1], "contradiction")
    wrong, right = text("c", 60), changed(text("c", 60), 3)  # 53 of 59
    found = build(pair(P, right, wrong), pair(P, f"so {wrong}", right))
    assert found.reasons() == dict.fromkeys([0, 1], "contradiction")


def test_corrections_whose_sides_are_nearly_equal_are_near_duplicates_where_they_point_the_same_way(
    build: Build,
) -> None:
    wrong = text("c", 60)
    right = changed(wrong, 3)
    found = build(pair(P, right, wrong, margin=2.0), pair(P, right, f"so {wrong}", margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}
    found = build(pair(P, right, wrong, margin=2.0), pair(changed(P), f"so {right}", f"so {wrong}", margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}


def test_as_much_alike_both_ways_but_not_reversed_is_a_near_duplicate(build: Build) -> None:
    """Both sides are equal to both by their words: only which letters are large differs."""
    found = build(pair(P, f"{C} yes", f"{C} Yes", margin=2.0), pair(P, f"{C} YES", f"{C} yEs", margin=1.0))
    assert found.reasons() == {1: "near_duplicate"}


def test_a_reversal_of_texts_whose_words_are_equal_is_a_contradiction(build: Build) -> None:
    for prompt in (P, f" {P}", changed(P)):
        found = build(pair(P, C, C.upper()), pair(prompt, C.upper(), f"{C} "))
        assert found.reasons() == dict.fromkeys([0, 1], "contradiction")


def test_half_a_reversal_is_none(build: Build) -> None:
    assert build(pair(P, A, B), pair(P, B, D), pair(P, D, changed(B))).reasons() == {
        1: "contradiction",
        2: "contradiction",
    }
    assert build(pair(P, A, B), pair(P, B, D), pair(P, A, D)).reasons() == {}


def test_a_reversal_under_another_prompt_is_no_contradiction(build: Build) -> None:
    assert build(pair(P, C, R), pair(Q, R, C)).reasons() == {}


REVERSAL = [
    pair(P, C, R, "model", 1.0),
    pair(changed(P), changed(C), R, "model", 1.5),
    pair(P, changed(R, 1, "y"), C, "human", 4.0),
]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("drop_both", dict.fromkeys([0, 1, 2], "contradiction")),
        ("majority", {0: "near_duplicate", 2: "contradiction"}),
        ("higher_margin", {0: "contradiction", 1: "contradiction"}),
        ("keep", {0: "near_duplicate"}),
    ],
)
def test_a_reversal_by_near_duplicates_is_judged_by_the_policy(
    policy: str, wanted: dict[int, str], build: Build
) -> None:
    found = build(*REVERSAL, dedupe={"contradictions": policy})
    assert found.reasons() == wanted


def test_for_the_majority_exact_and_near_copies_count(build: Build) -> None:
    rows = [pair(P, C, R), pair(P, C, f"{R} "), pair(P, R, C), pair(P, changed(R), C), pair(changed(P), R, C)]
    found = build(*rows, dedupe={"contradictions": "majority"})
    assert set(found.kept) <= {2, 3, 4}
    assert [found.reasons()[at] for at in (0, 1)] == ["contradiction"] * 2
    assert found.built.reasons == {"contradiction": 2, "near_duplicate": 2}


@pytest.mark.parametrize("policy", ["majority", "higher_margin"])
def test_a_draw_drops_both_ways(policy: str, build: Build) -> None:
    rows = [pair(P, C, R, "human", 2.0), pair(changed(P), changed(R), C, "model", 2.0)]
    assert build(*rows, dedupe={"contradictions": policy}).reasons() == dict.fromkeys([0, 1], "contradiction")


def test_copies_of_a_contradicted_pair_go_as_it_does(build: Build) -> None:
    rows = [pair(P, C, R), pair(P, f"{C} ", R), pair(P, R, C), pair(P, R, f" {C}")]
    found = build(*rows)
    assert found.reasons() == dict.fromkeys(range(4), "contradiction")
    assert all(row["duplicate_of"] is None for row in found.dropped.values())
    assert all(row["contradicts"] is not None for row in found.dropped.values())


def test_contradictions_that_are_kept_are_no_near_duplicates(build: Build) -> None:
    rows = [pair(P, C, changed(C)), pair(changed(P), changed(C), C)]
    assert build(*rows, dedupe={"contradictions": "keep"}).reasons() == {}


@pytest.mark.parametrize("policy", ["drop_both", "majority", "higher_margin", "keep"])
@pytest.mark.parametrize(("num_pairs", "num_swapped"), [(30, 3), (100, 3), (60, 50)])
def test_contradictions_in_a_crowd_are_those_of_a_few(
    policy: str, num_pairs: int, num_swapped: int, build: Build
) -> None:
    """However many share their words: each speaks against each that is swapped, and the oracle says what follows."""
    rows = [pair(P, changed(C, 1, f"t{number}n"), R) for number in range(num_pairs)]
    rows += [pair(P, R, changed(C, 1, f"s{number}n")) for number in range(num_swapped)]
    found = build(*rows, dedupe={"contradictions": policy})
    num_kept = {"drop_both": 0, "majority": 1, "higher_margin": 0, "keep": 2}[policy]
    assert len(found.kept) == num_kept


# cycles


CYCLE = [(P, A, B), (changed(P), B, D), (changed(P, 1, "z"), D, A)]


def test_a_cycle_through_nearly_equal_prompts_is_one(build: Build) -> None:
    assert build(*(pair(*row) for row in CYCLE)).reasons() == dict.fromkeys([0, 1, 2], "cycle")
    weak = [pair(*row, margin=3.0 - at) for at, row in enumerate(CYCLE)]
    assert build(*weak).reasons() == {2: "cycle"}
    assert build(*weak, dedupe={"cycles": "keep"}).reasons() == {}


def test_a_cycle_through_other_prompts_is_none(build: Build) -> None:
    assert build(pair(P, A, B), pair(P, B, D), pair(Q, D, A)).reasons() == {}
    assert build(*(pair(*row) for row in CYCLE), exact_only=True).reasons() == {}


def test_short_replies_make_a_cycle_under_one_prompt_only(build: Build) -> None:
    """They agree by chance under others."""
    sides = [("Yes", "No"), ("No", "Maybe"), ("Maybe", "Yes")]
    prompts = [P, changed(P), changed(P, 1, "z")]
    assert build(*(pair(P, *both) for both in sides)).reasons() == dict.fromkeys([0, 1, 2], "cycle")
    assert build(*(pair(prompt, *both) for prompt, both in zip(prompts, sides, strict=True))).reasons() == {}
    mixed = [pair(P, "Yes", A), pair(changed(P), A, B), pair(P, B, "Yes")]
    assert build(*mixed).reasons() == dict.fromkeys([0, 1, 2], "cycle")
    assert build(*mixed[:2], pair(changed(P), B, "Yes")).reasons() == {}


def test_a_copy_of_a_pair_on_a_cycle_goes_as_it_does(build: Build) -> None:
    rows = [pair(*row) for row in CYCLE] + [pair(f"{P} ", A, B)]
    found = build(*rows)
    assert found.reasons() == dict.fromkeys(range(4), "cycle")
    assert all(row["duplicate_of"] is None for row in found.dropped.values())


# system prompts and tools


def talk(*turns: tuple[str, str]) -> list[Given]:
    return [{"role": role, "content": content} for role, content in turns]


def chat(system: str | None, prompt: str, chosen: str, rejected: str, role: str = "system", **more: Any) -> Given:
    head = [] if system is None else [(role, system)]
    row = pair(talk(*head, ("user", prompt)), talk(("assistant", chosen)), talk(("assistant", rejected)))
    return row | more


def test_messages_are_compared_by_what_they_say(build: Build) -> None:
    found = build(chat(None, P, C, R), chat(None, P, changed(C), R), chat(None, changed(P), C, changed(R)))
    assert found.built.kind == "chat"
    assert found.built.reasons == {"near_duplicate": 2}


def test_pairs_under_other_system_prompts_have_nothing_to_do_with_each_other(build: Build) -> None:
    system = text("s")
    rows = [
        chat(None, P, C, R),
        chat(system, P, changed(C), R),
        chat(changed(system), P, C, changed(R)),
        chat(system, P, C, R, role="developer"),
    ]
    assert build(*rows).reasons() == {}
    reversals = [chat(system, P, C, R), chat(changed(system), P, R, C), chat(None, P, changed(R), C)]
    assert build(*reversals).reasons() == {}
    found = build(chat(system, P, C, R), chat(f"{system}\n", changed(P), changed(C), R))
    assert found.built.reasons == {"near_duplicate": 1}
    found = build(chat(system, P, C, R), chat(f" {system}", changed(P), changed(R), C))
    assert found.built.reasons == {"contradiction": 2}


def test_a_system_prompt_says_nothing_about_how_alike_prompts_are(build: Build) -> None:
    """Not even a long one that is the same."""
    system = text("s", 500)
    assert build(chat(system, P, C, R), chat(system, Q, C, R), chat(system, Q, R, C)).built.reasons == {
        "contradiction": 2
    }


def test_pairs_with_other_tools_have_nothing_to_do_with_each_other(build: Build) -> None:
    tools = [[{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("one", "two")]
    rows = [
        chat(None, P, C, R, tools=tools[0]),
        chat(None, P, changed(C), R, tools=tools[1]),
        chat(None, P, changed(R), C),
    ]
    assert build(*rows).reasons() == {}
    same = [chat(None, P, C, R, tools=tools[0]), chat(None, changed(P), changed(C), R, tools=tools[0])]
    assert build(*same).built.reasons == {"near_duplicate": 1}


def test_earlier_turns_are_part_of_a_prompt(build: Build) -> None:
    def row(first: str, answer: str, last: str) -> Given:
        prompt = talk(("user", first), ("assistant", answer), ("user", last))
        return pair(prompt, talk(("assistant", C)), talk(("assistant", R)))

    assert build(row(P, Q, "why?"), row(P, A, "why?")).reasons() == {}
    assert build(row(P, Q, "why?"), row(P, changed(Q), "why?")).built.reasons == {"near_duplicate": 1}


@pytest.mark.parametrize("exact_only", [False, True])
def test_pairs_of_one_prompt_under_other_system_prompts_lie_on_one_side_of_the_split(
    exact_only: bool, build: Build
) -> None:
    rows = []
    for number in range(12):
        prompt = text(f"p{number}n")
        other = prompt if exact_only else changed(prompt)
        rows += [chat(None, prompt, C, R), chat("Be brief.", other, A, B), chat("Rhyme.", f" {prompt}", D, R)]
    found = build(*rows, exact_only=exact_only)
    sides = [found.kept[number]["split"] for number in range(36)]
    assert all(len(set(sides[at : at + 3])) == 1 for at in range(0, 36, 3))
    assert set(sides) == {"train", "test"}


# as many pairs as a prompt may have


def test_the_pairs_of_nearly_equal_prompts_are_capped_together(build: Build) -> None:
    rows = [
        pair(P, A, B, "model", 5.0),
        pair(changed(P), C, D, "human", 1.0),
        pair(P, R, text("e"), "model", 6.0),
        pair(Q, A, B, "model", 1.0),
    ]
    found = build(*rows, pairs={"max_pairs_per_prompt": 2})
    assert found.reasons() == {0: "over_max_pairs_per_prompt"}
    found = build(*rows, pairs={"max_pairs_per_prompt": 1})
    assert found.reasons() == dict.fromkeys([0, 2], "over_max_pairs_per_prompt")
    assert all(row["duplicate_of"] is None and row["jaccard"] is None for row in found.dropped.values())
    assert build(*rows).reasons() == {}


def test_near_duplicates_and_copies_do_not_count_and_go_with_theirs(build: Build) -> None:
    rows = [
        pair(P, A, B, margin=9.0),
        pair(P, f"{A} ", B, margin=8.0),
        pair(changed(P), changed(A), B, margin=7.0),
        pair(P, C, D, margin=3.0),
        pair(P, C, f" {D}", margin=2.0),
        pair(changed(P), C, changed(D), margin=1.0),
    ]
    two = build(*rows, pairs={"max_pairs_per_prompt": 2})
    assert two.reasons() == {1: "duplicate", 2: "near_duplicate", 4: "duplicate", 5: "near_duplicate"}
    one = build(*rows, pairs={"max_pairs_per_prompt": 1})
    over = "over_max_pairs_per_prompt"
    assert one.reasons() == {1: "duplicate", 2: "near_duplicate", 3: over, 4: over, 5: over}


def test_the_cap_holds_over_all_sources(tmp_path: Path, pipeline_of: Callable[..., Pipeline]) -> None:
    sources = []
    for number, (prompt, sides, annotator) in enumerate([(P, (A, B), "model"), (changed(P), (C, D), "human")]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(pair(prompt, *sides)) + "\n")
        sources.append({"path": str(path), "format": "pairs", "annotator": annotator})
    rows = [{"prompt": changed(P, 1, "z"), "responses": [text("e"), text("f"), R], "scores": [3, 2, 1]}]
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources.append({"path": str(path), "format": "candidates", "annotator": "model"})
    built = build_dataset(pipeline_of(*sources, pairs={"max_pairs_per_prompt": 2}, split={"test_share": 0.0}))
    assert sorted(table(built, "pairs")["source"]) == sorted([sources[1]["path"], sources[2]["path"]])
    assert built.reasons == {"over_max_pairs_per_prompt": 1}
    assert (built.counts["rows"], built.counts["prompts"], built.counts["prompts_with_pair"]) == (2, 1, 1)


@pytest.mark.parametrize("exact_only", [False, True])
def test_the_cap_counts_pairs_under_all_system_prompts_together(exact_only: bool, build: Build) -> None:
    rows = [chat(None, P, C, R), chat("Be brief.", P, A, B), chat(None, P, D, R, tools=[{"name": "t"}])]
    found = build(*rows, exact_only=exact_only, pairs={"max_pairs_per_prompt": 2})
    assert found.built.reasons == {"over_max_pairs_per_prompt": 1}


def test_without_near_matching_the_cap_is_by_folded_prompt(build: Build) -> None:
    rows = [pair(P, A, B, margin=1.0), pair(changed(P), C, D, margin=2.0), pair(f"{P} ", C, D, margin=3.0)]
    found = build(*rows, exact_only=True, pairs={"max_pairs_per_prompt": 1})
    assert found.reasons() == {0: "over_max_pairs_per_prompt"}


# the split


def test_nearly_equal_prompts_lie_on_one_side_of_the_split(build: Build) -> None:
    rows = []
    for number in range(15):
        prompt = text(f"p{number}n")
        rows += [pair(prompt, C, R), pair(changed(prompt), A, B), pair(changed(prompt, 1, "z").upper(), D, R)]
    for seed in range(2):
        found = build(*rows, split={"test_share": 0.5, "seed": seed})
        sides = [found.kept[number]["split"] for number in range(45)]
        assert all(len(set(sides[at : at + 3])) == 1 for at in range(0, 45, 3))
        assert set(sides) == {"train", "test"}


def test_a_chain_of_prompts_is_one_cluster(build: Build) -> None:
    words = [f"w{i}" for i in range(120)]
    rows = [
        pair(" ".join(words[at : at + 60]), text(f"c{at}n"), text(f"r{at}n"), margin=1.0 + at) for at in range(0, 60, 3)
    ]
    found = build(*rows)
    assert len({row["split"] for row in found.kept.values()}) == 1
    assert len(build(*rows, pairs={"max_pairs_per_prompt": 3}).kept) == 3


# settings


def test_without_near_matching_only_equal_prompts_and_sides_relate(build: Build) -> None:
    rows = [
        pair(P, C, R),
        pair(P, changed(C), R),
        pair(changed(P), C, R),
        pair(P, changed(R), changed(C)),
        pair(P, C.upper(), R),
    ]
    assert build(*rows, exact_only=True).reasons() == {}
    exact = [pair(P, C, R), pair(P, f"{C} ", R), pair(Q, C, R), pair(f"{Q} ", R, C)]
    assert build(*exact, exact_only=True).built.reasons == {"contradiction": 2, "duplicate": 1}


SURE = {"num_perm": 512, "weights": [0.001, 0.999]}  # nothing near a threshold is missed


@pytest.mark.parametrize(
    ("near", "wanted"),
    [
        ({"threshold": 0.8}, {1}),
        ({"threshold": 0.95}, set()),
        ({"threshold": 0.5, **SURE}, {1, 2, 3}),
        ({"threshold": 0.55, **SURE}, {1, 2}),
        ({"threshold": 0.55, "ngram": 1, **SURE}, {1, 2, 3}),
        ({"threshold": 0.8, "ngram": 20}, set()),
        ({"threshold": 1.0}, set()),
    ],
)
def test_threshold_and_n_gram_decide(near: Given, wanted: set[int], build: Build) -> None:
    """Similarities of 5-grams: .86, .68 and .53; of words: .88, .71 and .58."""
    rows = [pair(P, C, R, margin=9.0)]
    rows += [pair(P, changed(C, count, tag), R, margin=1.0) for count, tag in ((2, "x"), (5, "y"), (8, "z"))]
    found = build(*rows, near=near)
    assert set(found.dropped) == wanted
    assert set(found.reasons().values()) <= {"near_duplicate"}


def test_the_n_gram_of_prompts_is_a_setting_of_its_own(build: Build) -> None:
    prompt = " ".join(word for at, word in enumerate(P.split()) if at != 15)  # 25 of 30 3-grams; 11 of 30 10-grams
    rows = [pair(P, C, R), pair(prompt, changed(C), R)]
    assert build(*rows, near=SURE).built.reasons == {"near_duplicate": 1}
    assert build(*rows, near={**SURE, "prompt_ngram": 10}).reasons() == {}
    assert build(*rows, near={**SURE, "prompt_ngram": 10, "threshold": 0.3}).built.reasons == {"near_duplicate": 1}


def test_at_a_threshold_of_one_equal_sets_are_near_duplicates(build: Build) -> None:
    rows = [pair(P, C, R), pair(P.upper(), C.upper(), R), pair(P, changed(C), R)]
    assert build(*rows, near={"threshold": 1.0}).built.reasons == {"near_duplicate": 1}


# other scripts


def test_texts_of_scripts_without_spaces_are_compared_by_characters(build: Build) -> None:
    prompt = "昨日の夜に降った雪について短い詩を書いてください。"
    chosen = "静かな夜に雪が降り積もり、街の音はすべて消えて、私の足音だけが白い道に残っている。"
    rejected = "雪は冷たいので外に出るときは必ず手袋と帽子を身につけて風邪をひかないようにしましょう。"
    rows = [
        pair(prompt, chosen, rejected),
        pair(prompt, f"{chosen}ね", rejected),
        pair(f"{prompt}ね", chosen, f"{rejected}よ"),
    ]
    assert build(*rows).built.reasons == {"near_duplicate": 2}
    assert build(rows[0], pair(f"{prompt}ね", rejected, f"{chosen}よ")).built.reasons == {"contradiction": 2}
    other = [pair(prompt, chosen, rejected), pair(prompt, chosen[:20] + rejected[20:], rejected)]
    assert build(*other).reasons() == {}


def test_composed_and_large_letters_make_no_other_text(build: Build) -> None:
    def accented(name: str) -> str:
        return " ".join(f"\u00e9{name}{i} \u00fcbung \u03c3" for i in range(12))

    prompt, chosen, rejected = (accented(name) for name in ("p", "c", "r"))
    rows = [
        pair(prompt, chosen, rejected, margin=3.0),
        pair(prompt.replace("\u00e9", "e\u0301"), chosen, rejected, margin=2.0),
        pair(prompt.upper(), chosen.upper(), rejected.replace("\u00fc", "u\u0308").upper(), margin=1.0),
    ]
    found = build(*rows)
    assert found.reasons() == {1: "duplicate", 2: "near_duplicate"}
    assert found.dropped[2]["jaccard"] == 1.0


def test_signs_are_words(build: Build) -> None:
    rows = [pair(P, "! ? ! ? ! ?", R), pair(P, "! ? ! ? ! ? ! ?", changed(R)), pair(P, "\U0001f600 " * 6, R)]
    assert build(*rows).built.reasons == {"near_duplicate": 1}


# nothing depends on the order of rows


def test_the_order_of_rows_changes_nothing(build: Build) -> None:
    rows = [
        pair(P, C, R, "model", 1.0),
        pair(changed(P), changed(C), R, "human", 1.0),
        pair(P, f"{C} ", R),
        pair(changed(P), A, B),
        pair(P, changed(B), A),
        pair(Q, A, B, margin=2.0),
        pair(Q, A, D, margin=1.0),
        *(pair(*row) for row in CYCLE),
        *(pair(text("k"), text(f"{side}k"), text(f"{side}l"), margin=2.0) for side in "uvw"),
    ]

    def outcome(found: Result) -> tuple[Any, ...]:
        kept = sorted((row["pair_id"], row["split"]) for row in found.kept.values())
        dropped = Counter(
            (row["pair_id"], row["reason"], row["duplicate_of"], row["contradicts"], row["jaccard"])
            for row in found.dropped.values()
        )
        return kept, dropped

    wanted = outcome(build(*rows, pairs={"max_pairs_per_prompt": 2}))
    for order in (rows[::-1], rows[5:] + rows[:5], rows[::2] + rows[1::2]):
        assert outcome(build(*order, pairs={"max_pairs_per_prompt": 2})) == wanted
