"""Exact duplicates and direct reversals, judged by a plain oracle: one row a group stays, and the better claim wins."""

import re
import unicodedata
from collections import defaultdict
from typing import Any, Literal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from prefkit.comparing import Comparing, dedupe_pairs
from prefkit.dedupe import Contradictions, Rules
from prefkit.format import MESSAGES
from prefkit.screen import Screened
from prefkit.text import pair_id, with_pair_ids

PROPERTY = settings(deadline=None, max_examples=200, derandomize=True, database=None)

EXACT = Comparing(None, None, Rules())
SCHEMA = {
    "prompt": pl.String,
    "chosen": pl.String,
    "rejected": pl.String,
    "annotator": pl.String,
    "margin": pl.Float64,
    "source_row": pl.Int64,
    "agreement": pl.Float64,
}
Row = tuple[str, str, str, str | None, float | None]


def dedupe(
    *rows: tuple[Any, ...],
    policy: Contradictions = "drop_both",
    exact: bool = True,
    cycles: Literal["drop", "keep"] = "drop",
) -> Screened:
    full = [(*row, *(None,) * (5 - len(row)), number, None) for number, row in enumerate(rows)]
    frame = with_pair_ids(pl.DataFrame(full, schema=SCHEMA, orient="row"), "text")
    return dedupe_pairs(frame, "text", Comparing(None, None, Rules(exact, policy, cycles)))


def kept(found: Screened) -> list[int]:
    return found.kept["source_row"].to_list()


def dropped(found: Screened) -> dict[int, tuple[str, str]]:
    """source_row -> reason, and the pair_id that it repeats or contradicts."""
    rows = found.dropped.iter_rows(named=True)
    return {row["source_row"]: (row["reason"], row["duplicate_of"] or row["contradicts"]) for row in rows}


def fold(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        ([("p", "c", "r", "model", 9.0), ("p", "c", "r", "human", 1.0)], 1),
        ([("p", "c", "r", None, 9.0), ("p", "c", "r", "human", None)], 1),
        ([("p", "c", "r", "human", 1.0), ("p", "c", "r", "human", 2.0)], 1),
        ([("p", "c", "r", "human", None), ("p", "c", "r", "human", 0.5)], 1),
        ([("p", "c", "r", "model", 1.0), ("p", "c", "r", "model", 1.0)], 0),
    ],
)
def test_of_copies_the_human_one_is_kept_then_the_larger_margin_then_the_first(rows: list[Row], winner: int) -> None:
    found = dedupe(*rows)
    assert kept(found) == [winner]
    assert dropped(found) == {1 - winner: ("duplicate", pair_id("text", "p", "c", "r"))}
    assert found.dropped["stage"].to_list() == ["dedupe"]
    assert found.dropped["jaccard"].to_list() == [1.0]


def test_of_copies_with_equal_claims_the_smallest_pair_id_is_kept() -> None:
    variants = ["caf\u00e9", "cafe\u0301", " caf\u00e9", "caf\u00e9\n"]
    found = dedupe(*[("p", text, "r") for text in variants])
    smallest = min(pair_id("text", "p", text, "r") for text in variants)
    assert found.kept["pair_id"].to_list() == [smallest]
    assert found.dropped["duplicate_of"].to_list() == [smallest] * 3


def test_composed_characters_and_white_space_make_no_different_pair() -> None:
    found = dedupe(("a  b", "caf\u00e9", "r"), (" a\tb\n", "cafe\u0301", "r\u00a0"), ("a b", "Caf\u00e9", "r"))
    assert len(kept(found)) == 2
    assert 2 in kept(found)
    assert next(iter(dropped(found).values()))[1] in found.kept["pair_id"].to_list()


def test_white_space_at_the_ends_of_a_message_makes_no_different_pair_either() -> None:
    def conversation(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    def reply(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    prompts = [conversation("q", "a", "why?"), conversation(" q", "a ", "\nwhy?")]
    frame = pl.DataFrame(
        {
            "prompt": pl.Series(prompts, dtype=MESSAGES),
            "chosen": pl.Series([reply("c"), reply(" c")], dtype=MESSAGES),
            "rejected": pl.Series([reply("r"), reply("r ")], dtype=MESSAGES),
            "annotator": pl.Series([None, None], dtype=pl.String),
            "margin": pl.Series([None, None], dtype=pl.Float64),
            "agreement": pl.Series([None, None], dtype=pl.Float64),
        }
    )
    assert dedupe_pairs(with_pair_ids(frame, "chat"), "chat", EXACT).kept.height == 1


def test_the_roles_of_messages_are_part_of_a_pair() -> None:
    def one(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": "same"}]

    frame = pl.DataFrame(
        {
            "prompt": pl.Series([one("user"), one("system")], dtype=MESSAGES),
            "chosen": pl.Series([one("assistant")] * 2, dtype=MESSAGES),
            "rejected": pl.Series([[{"role": "assistant", "content": "r"}]] * 2, dtype=MESSAGES),
            "annotator": pl.Series([None, None], dtype=pl.String),
            "margin": pl.Series([None, None], dtype=pl.Float64),
            "agreement": pl.Series([None, None], dtype=pl.Float64),
        }
    )
    assert dedupe_pairs(with_pair_ids(frame, "chat"), "chat", EXACT).kept.height == 2


def test_metadata_makes_no_different_pair_and_another_prompt_does() -> None:
    assert len(kept(dedupe(("p", "c", "r", "human", 1.0), ("p", "c", "r", "model", 2.0)))) == 1
    assert len(kept(dedupe(("p", "c", "r"), ("q", "c", "r")))) == 2


def test_texts_that_only_join_to_the_same_are_different_pairs() -> None:
    assert kept(dedupe(("p", "ab", "c"), ("p", "a", "bc"), ("pa", "b", "c"))) == [0, 1, 2]


def test_kept_pairs_stay_in_their_order() -> None:
    assert kept(dedupe(("z", "c", "r"), ("a", "c", "r"), ("z", "c", "r"), ("m", "c", "r"))) == [0, 1, 3]


REVERSAL = [("p", "a", "b", "model", 3.0), ("p", "a", "b", "model", 1.0), ("p", "b", "a", "model", 4.0)]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [("drop_both", []), ("majority", [0]), ("higher_margin", [2]), ("keep", [0, 2])],
)
def test_a_reversal_is_judged_by_the_policy(policy: Contradictions, wanted: list[int]) -> None:
    found = dedupe(*REVERSAL, policy=policy)
    assert kept(found) == wanted
    lost = {row: why for row, why in dropped(found).items() if why[0] == "contradiction"}
    assert sorted(lost) == ([] if 0 in wanted else [0, 1]) + ([] if 2 in wanted else [2])  # a copy goes with its pair
    opposite = dict.fromkeys([0, 1], pair_id("text", "p", "b", "a")) | {2: pair_id("text", "p", "a", "b")}
    for row, (_, other) in lost.items():
        assert other == opposite[row]


@pytest.mark.parametrize("policy", ["majority", "higher_margin"])
def test_a_draw_between_two_directions_drops_both(policy: Contradictions) -> None:
    found = dedupe(("p", "a", "b", "model", 2.0), ("p", "b", "a", "human", 2.0), policy=policy)
    assert kept(found) == []
    assert [reason for reason, _ in dropped(found).values()] == ["contradiction"] * 2


def test_a_reversal_is_seen_through_white_space_and_composed_characters() -> None:
    assert kept(dedupe(("p", "caf\u00e9", "b"), (" p", "b ", "cafe\u0301"))) == []


def test_a_middle_answer_that_is_chosen_once_and_rejected_once_is_no_contradiction() -> None:
    assert kept(dedupe(("p", "a", "b"), ("p", "b", "c"), ("p", "a", "c"))) == [0, 1, 2]


def test_a_reversal_under_another_prompt_is_no_contradiction() -> None:
    assert kept(dedupe(("p", "a", "b"), ("q", "b", "a"))) == [0, 1]


def test_without_exact_the_copies_that_differ_stay_but_one_pair_id_stays_once() -> None:
    """A pair_id names one row everywhere else: a duplicate one would make a reference unusable."""
    found = dedupe(("p", "c", "r"), ("p", "c ", "r"), ("p", "c", "r"), exact=False)
    assert found.kept["pair_id"].n_unique() == found.kept.height == 2


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_without_exact_every_copy_of_a_reversal_is_one(order: list[int]) -> None:
    rows = [("p", "a", "b"), ("p", "a ", "b"), ("p", "b", "a")]
    found = dedupe(*[rows[number] for number in order], exact=False)
    assert kept(found) == []
    assert {reason for reason, _ in dropped(found).values()} == {"contradiction"}


def test_of_a_cycle_without_votes_and_scores_every_pair_goes() -> None:
    rows = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a"), ("p", "a", "d"), ("q", "b", "c")]
    found = dedupe(*rows)
    assert kept(found) == [3, 4]
    assert {row: reason for row, (reason, _) in dropped(found).items()} == dict.fromkeys([0, 1, 2], "cycle")
    assert kept(dedupe(*rows, cycles="keep")) == [0, 1, 2, 3, 4]


def test_of_a_cycle_the_pair_of_the_smallest_margin_goes_alone() -> None:
    rows = [("p", "a", "b", None, 3.0), ("p", "b", "c", None, 2.0), ("p", "c", "a", None, 1.0)]
    assert kept(dedupe(*rows)) == [0, 1]


def test_of_a_cycle_the_pair_that_fewest_agree_on_goes_whatever_its_margin() -> None:
    frame = pl.DataFrame(
        [("p", "a", "b", None, 1.0, 0, 0.8), ("p", "b", "c", None, 1.0, 1, 1.0), ("p", "c", "a", None, 9.0, 2, 0.6)],
        schema=SCHEMA,
        orient="row",
    )
    assert kept(dedupe_pairs(with_pair_ids(frame, "text"), "text", EXACT)) == [0, 1]


def test_a_reversal_is_no_cycle_and_a_cycle_across_prompts_is_none() -> None:
    assert kept(dedupe(("p", "a", "b"), ("p", "b", "a"), policy="keep")) == [0, 1]
    assert kept(dedupe(("p", "a", "b"), ("p", "b", "c"), ("q", "c", "a"))) == [0, 1, 2]


def test_a_cycle_through_a_contradiction_that_is_kept_stays() -> None:
    rows = [("p", "a", "b"), ("p", "b", "a"), ("p", "b", "c"), ("p", "c", "a")]
    assert kept(dedupe(*rows, policy="keep")) == [0, 1, 2, 3]
    assert kept(dedupe(*rows)) == [2, 3]  # both ways between a and b go, and nothing closes


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many edges each search for cycles looks at."""
    seen: list[int] = []

    def counted(graph: Any, **how: Any) -> Any:
        seen.append(graph.nnz)
        return connected_components(graph, **how)

    monkeypatch.setattr("prefkit.cycles.connected_components", counted)
    return seen


def test_cycles_of_many_prompts_are_decided_in_as_many_passes_as_one_has_levels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """500 prompts of three pairs, 1,500 margins: with a pass a margin these were 2 million edges to look at."""
    seen = passes(monkeypatch)
    rows = [
        (f"p{number}", *sides, None, 1.0 + 3 * number + step)
        for number in range(500)
        for step, sides in enumerate([("a", "b"), ("b", "c"), ("c", "a")])
    ]
    found = dedupe(*rows)
    assert kept(found) == [number for number in range(1500) if number % 3]  # the smallest margin of each goes
    assert len(seen) <= 5
    assert sum(seen) <= 5 * 1500


def test_where_no_response_is_both_chosen_and_rejected_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes(monkeypatch)
    assert kept(dedupe(("p", "a", "b"), ("p", "a", "c"), ("p", "d", "c"), ("q", "b", "a"))) == [0, 1, 2, 3]
    assert seen == []


def test_no_rows_are_no_drops() -> None:
    found = dedupe()
    assert (found.kept.height, found.dropped.height) == (0, 0)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["p", " p", "q"]),
        st.sampled_from(["a", "a ", "b", "c", "\u00e9", "e\u0301"]),
        st.sampled_from(["b", " b", "a", "c", "\u00e9"]),
        st.sampled_from(["human", "model"]),
        st.sampled_from([None, 0.5, 1.0, 2.0]),
    ).filter(lambda row: fold(row[1]) != fold(row[2])),
    max_size=14,
)
Key = tuple[str, str, str]


def oracle(rows: list[Row], policy: Contradictions) -> tuple[list[int], dict[int, str]]:
    groups: dict[Key, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[(fold(row[0]), fold(row[1]), fold(row[2]))].append(number)

    def claim(number: int) -> tuple[Any, ...]:
        prompt, chosen, rejected, annotator, margin = rows[number]
        size = float("-inf") if margin is None else margin
        return (annotator != "human", -size, pair_id("text", prompt, chosen, rejected), number)

    best = {key: min(numbers, key=claim) for key, numbers in groups.items()}
    lost = {number: "duplicate" for key, numbers in groups.items() for number in numbers if number != best[key]}
    strength = {
        "drop_both": dict.fromkeys(best, 0.0),
        "majority": {key: float(len(numbers)) for key, numbers in groups.items()},
        "higher_margin": {key: rows[number][4] or 0.0 for key, number in best.items()},
        "keep": dict.fromkeys(best, 0.0),
    }[policy]
    for (prompt, chosen, rejected), number in best.items():
        other = (prompt, rejected, chosen)
        if policy != "keep" and other in best and strength[(prompt, chosen, rejected)] <= strength[other]:
            lost[number] = "contradiction"
    left = [number for key, number in best.items() if number not in lost]
    lost |= dict.fromkeys(circular([(rows[n][0], rows[n][1], rows[n][2], rows[n][4], n) for n in left]), "cycle")
    lost |= {n: lost[best[key]] for key, numbers in groups.items() for n in numbers if best[key] in lost}
    return [number for number in range(len(rows)) if number not in lost], lost


def circular(edges: list[tuple[str, str, str, float | None, int]]) -> list[int]:
    """Plain Python: level by level, largest margin first, the edges that a path leads back from."""
    folded = {n: (fold(p), fold(c), fold(r), margin or 0.0) for p, c, r, margin, n in edges}
    directed = {n: e for n, e in folded.items() if (e[0], e[2], e[1]) not in {f[:3] for f in folded.values()}}
    kept_edges: set[int] = set()
    gone: list[int] = []
    for level in sorted({e[3] for e in directed.values()}, reverse=True):
        new = {n for n, e in directed.items() if e[3] == level}
        graph = {directed[n][:3] for n in kept_edges | new}
        closing = {n for n in new if leads(graph, directed[n][0], directed[n][2], directed[n][1])}
        gone += closing
        kept_edges |= new - closing
    return gone


def leads(graph: set[tuple[str, str, str]], prompt: str, start: str, end: str) -> bool:
    seen, ahead = {start}, [start]
    while ahead:
        here = ahead.pop()
        ahead += [r for p, c, r in graph if (p, c) == (prompt, here) and r not in seen]
        seen |= {r for p, c, r in graph if (p, c) == (prompt, here)}
    return end in seen


@PROPERTY
@given(ROWS, st.sampled_from(["drop_both", "majority", "higher_margin", "keep"]))
def test_deduplication_is_that_of_a_plain_oracle(rows: list[Row], policy: Contradictions) -> None:
    found = dedupe(*rows, policy=policy)
    wanted, lost = oracle(rows, policy)
    assert kept(found) == wanted
    assert {row: reason for row, (reason, _) in dropped(found).items()} == lost


@PROPERTY
@given(ROWS)
def test_every_group_of_duplicates_keeps_exactly_one_row(rows: list[Row]) -> None:
    found = dedupe(*rows, policy="keep", cycles="keep")
    keys = [(fold(p), fold(c), fold(r)) for p, c, r in found.kept.select("prompt", "chosen", "rejected").iter_rows()]
    assert sorted(keys) == sorted({(fold(p), fold(c), fold(r)) for p, c, r, _, _ in rows})
    ids = set(found.kept["pair_id"])
    assert all(other in ids for _, other in dropped(found).values())
    assert found.kept.height + found.dropped.height == len(rows)
