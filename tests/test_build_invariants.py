"""Whatever the rows: what a build drops is what a plain oracle drops, each row is accounted for, and order is nothing.

Texts are made of a few pieces, so that copies, near-copies, reversals, chains and cycles come about by themselves. Real
data is counted and never shown.
"""

import gzip
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline, load_pipeline

Given = dict[str, Any]


def property_of(num_examples: int) -> settings:
    """Few examples are not made smaller where they fail: that takes minutes, and the slow tests do."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if num_examples > 100 else [])]
    return settings(
        phases=phases,
        deadline=None,
        max_examples=num_examples,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


# rows


def words(name: str, length: int) -> str:
    return " ".join(f"{name}{at}" for at in range(length))


BODIES = [words("a", 36), words("b", 36), "雪が降る静かな夜に猫は窓辺で眠る。" * 2]
ENDS = ["", "", "", "x0", "x0 x1", "x0 x1 x2 x3", "y0 y1 y2", "y0 y1 y2 y3", "caf\u00e9", "cafe\u0301", "CAF\u00c9"]
WINDOW = words("w", 60)  # pieces of it are a chain
SHORT = ["Yes", "yes", "Yes ", "No", "no", "No.", "not at all", "caf\u00e9", "cafe\u0301"]
TALKS = ["Be kind.", "Be  kind. ", "Be brief."]


@st.composite
def long_texts(draw: st.DrawFn, bodies: Sequence[str] = BODIES) -> str:
    parts = [draw(st.sampled_from(ENDS[:6])), draw(st.sampled_from(bodies)), draw(st.sampled_from(ENDS))]
    text = draw(st.sampled_from([" ", " ", "  "])).join(part for part in parts if part)
    return text.upper() if draw(st.integers(0, 9)) == 9 else text


LINKS = st.integers(0, 4).map(lambda at: " ".join(WINDOW.split()[3 * at : 3 * at + 40]))
REPLIES = st.one_of(long_texts(), long_texts(BODIES[:1]), LINKS, st.sampled_from([*BODIES, *SHORT]))
PROMPTS = st.one_of(long_texts(BODIES[:1]), long_texts(BODIES[:1]), LINKS, st.sampled_from(["Hi", "hi", "Hi ", "Why?"]))
ROW = st.tuples(
    PROMPTS,
    REPLIES,
    REPLIES,
    st.sampled_from([None, None, "human", "model", "rule"]),
    st.sampled_from([None, 1.0, 1.0, 2.0, 3.0]),
    st.sampled_from([None, None, None, None, *TALKS]),
).filter(lambda row: oracle.fold(row[1]) != oracle.fold(row[2]))
RINGS = st.sampled_from([(BODIES[at], BODIES[(at + 1) % 3]) for at in range(3)])
HOW = ["new", "copy", "prompt", "prompt", "chosen", "rejected", "both", "swap", "turn", "link", "link", "ring", "ring"]


@st.composite
def rows_of(draw: st.DrawFn) -> list[Given]:
    """Pairs, some of them made from others: copied, swapped, or with one part changed."""
    made: list[tuple[Any, ...]] = []
    for _ in range(draw(st.integers(1, 10))):
        row = draw(ROW)
        if made and (how := draw(st.sampled_from(HOW))) != "new":
            prompt, chosen, rejected, annotator, margin, system = draw(st.sampled_from(made))
            near = draw(st.sampled_from(["x9", "y9", "", "x0 x1", " "]))
            mixed = {
                "copy": (prompt, f"{chosen} ", rejected, row[3], row[4], system),
                "prompt": (row[0], chosen, rejected, row[3], row[4], system),
                "chosen": (prompt, f"{chosen} {near}", rejected, annotator, row[4], system),
                "rejected": (prompt, chosen, f"{near} {rejected}", row[3], margin, system),
                "both": (f"{prompt} {near}", f"{chosen} {near}", f"{rejected} {near}", annotator, row[4], system),
                "swap": (prompt, rejected, f"{chosen} {near}", row[3], row[4], system),
                "turn": (prompt, rejected, row[2], annotator, margin, system),
                "link": (made[0][0], draw(LINKS), BODIES[1], row[3], row[4], None),
                "ring": (f"{made[0][0]} {near}", *draw(RINGS), annotator, margin, None),
            }[how]
            row = mixed if oracle.fold(mixed[1]) != oracle.fold(mixed[2]) else row
        made.append(row)
    is_chat = draw(st.booleans())
    return [written(row, is_chat) for row in made]


def written(row: tuple[Any, ...], is_chat: bool) -> Given:
    prompt, chosen, rejected, annotator, margin, system = row
    made: Given = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": annotator}
    if is_chat:
        head = [] if system is None else [{"role": "system", "content": system}]
        made |= {side: [{"role": "assistant", "content": made[side]}] for side in ("chosen", "rejected")}
        made["prompt"] = [*head, {"role": "user", "content": prompt}]
    if margin is not None:
        made |= {"chosen_score": margin, "rejected_score": 0.0}
    return made


# settings

SURE: Given = {"num_perm": 512, "weights": [0.001, 0.999]}
FOG = {
    True: Fraction(2, 100),
    False: Fraction(1, 10),
}  # above the threshold: by such sure bands, and by the default ones
SETTINGS = st.fixed_dictionaries(
    {
        "near": st.sampled_from([SURE, SURE, SURE, {}, {**SURE, "threshold": 0.6}, {**SURE, "ngram": 2}, None]),
        "contradictions": st.sampled_from(["drop_both", "drop_both", "majority", "higher_margin", "keep"]),
        "cycles": st.sampled_from(["drop", "drop", "keep"]),
        "cap": st.sampled_from([None, None, 1, 2]),
    }
)


class Outcome(NamedTuple):
    """A finished build, read back. Rows by line from 0."""

    built: Built
    kept: dict[int, Given]
    dropped: dict[int, Given]
    rules: oracle.Rules
    fog: Fraction

    def all_rows(self) -> list[Given]:
        every = {**self.kept, **self.dropped}
        return [every[number] for number in range(len(every))]

    def is_foggy(self) -> bool:
        """Whether a similarity is so little above the threshold that it may not be found."""
        limit = self.rules.threshold
        return limit is not None and any(
            limit <= share < limit + self.fog for share in oracle.closest_calls(self.all_rows(), self.rules)
        )


def build(folder: str | Path, rows: Sequence[Given], chosen: Given, name: str = "d") -> Outcome:
    path = Path(folder) / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split = {"test_share": 0.5, "seed": 3}
    dedupe = {"contradictions": chosen["contradictions"], "cycles": chosen["cycles"], "near_duplicates": chosen["near"]}
    pairs = {} if chosen["cap"] is None else {"max_pairs_per_prompt": chosen["cap"]}
    source = {"path": str(path), "format": "pairs"}
    pipeline = checked(folder, name, {"sources": [source], "dedupe": dedupe, "pairs": pairs, "split": split})
    built = build_dataset(pipeline)
    kept, dropped = (by_line(table(built, part)) for part in ("pairs", "dropped"))
    near = chosen["near"]
    rules = oracle.Rules(
        None if near is None else Fraction(str(near.get("threshold", 0.8))),
        5 if near is None else near.get("ngram", 5),
        3,
        chosen["contradictions"],
        chosen["cycles"],
        chosen["cap"],
        split["test_share"],
        int(split["seed"]),
    )
    return Outcome(built, kept, dropped, rules, FOG[bool(near)])


def checked(folder: str | Path, name: str, sections: Given) -> Pipeline:
    path = Path(folder) / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(Path(folder) / name), **sections}), encoding="utf-8")
    return load_pipeline(path)


def table(built: Built, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{built.dataset}/{name}/*.parquet")


def by_line(frame: pl.DataFrame) -> dict[int, Given]:
    return {row["source_row"] - 1: row for row in frame.iter_rows(named=True)}


# what must hold of every outcome


def check_accounts(found: Outcome, num_rows: int) -> None:
    counts = found.built.counts
    assert counts["rows"] == num_rows == len(found.kept) + len(found.dropped) + counts["rejects"]
    assert counts["pairs"] == counts["train"] + counts["test"] == len(found.kept)
    assert counts["dropped"] == len(found.dropped)
    assert Counter(row["reason"] for row in found.dropped.values()) == found.built.reasons
    ids = [row["pair_id"] for row in found.kept.values()]
    assert len(set(ids)) == len(ids)


def check_what_drops_say(found: Outcome) -> None:
    kept = {row["pair_id"] for row in found.kept.values()}
    every = kept | {row["pair_id"] for row in found.dropped.values()}
    clusters: dict[int, set[str]] = defaultdict(set)
    for row in found.dropped.values():
        is_copy = row["reason"] in ("duplicate", "near_duplicate")
        assert (row["duplicate_of"] in kept) == is_copy
        assert (row["duplicate_of"] is None) != is_copy
        assert (row["jaccard"] is None) != is_copy
        assert (row["contradicts"] is not None) == (row["reason"] == "contradiction")
        assert row["contradicts"] is None or row["contradicts"] in every - {row["pair_id"]}
        if row["reason"] == "duplicate":
            assert row["jaccard"] == 1.0
        if row["reason"] == "near_duplicate":
            clusters[row["cluster_id"]].add(row["duplicate_of"])
    near = [row for row in found.dropped.values() if row["reason"] == "near_duplicate"]
    assert all(row["cluster_id"] is not None for row in near)
    assert all(len(keepers) == 1 for keepers in clusters.values())
    assert len(clusters) == len({row["duplicate_of"] for row in near})


def check_similarities(found: Outcome) -> None:
    rows = found.all_rows()
    by_id = {row["pair_id"]: row for row in found.kept.values()}
    for row in rows:
        if row.get("reason") == "near_duplicate":
            wanted = oracle.likeness(row, by_id[row["duplicate_of"]], found.rules).direct
            assert row["jaccard"] == pytest.approx(float(wanted), abs=1e-12)


def check_split(found: Outcome) -> None:
    """No prompt cluster lies on both sides."""
    clusters = oracle.prompt_clusters(found.all_rows(), found.rules)
    sides: dict[int, set[str]] = defaultdict(set)
    for number, row in found.kept.items():
        sides[clusters[number]].add(row["split"])
    assert all(len(both) == 1 for both in sides.values())


def check_against_oracle(found: Outcome) -> None:
    wanted = oracle.dedupe(found.all_rows(), found.rules)
    assert {number: row["reason"] for number, row in found.dropped.items()} == {
        number: drop.reason for number, drop in wanted.dropped.items()
    }
    for number, drop in wanted.dropped.items():
        row = found.dropped[number]
        assert row["duplicate_of"] == drop.duplicate_of
        assert drop.reason != "contradiction" or row["contradicts"] in drop.contradicts
    assert {number: row["split"] for number, row in found.kept.items()} == wanted.split


def check(found: Outcome, num_rows: int) -> None:
    check_accounts(found, num_rows)
    check_what_drops_say(found)
    check_similarities(found)
    if not found.is_foggy():
        check_split(found)
        check_against_oracle(found)


def invariants(rows: list[Given], chosen: Given) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(build(folder, rows, chosen), len(rows))


@property_of(22)
@given(rows_of(), SETTINGS)
def test_what_a_build_drops_is_what_the_oracle_drops(rows: list[Given], chosen: Given) -> None:
    invariants(rows, chosen)


@pytest.mark.slow
@property_of(600)
@given(rows_of(), SETTINGS)
def test_what_a_build_drops_is_what_the_oracle_drops_many_times(rows: list[Given], chosen: Given) -> None:
    invariants(rows, chosen)


def as_given(row: Given) -> Given:
    """A row of the pairs table as a row of a source."""
    names = ("prompt", "chosen", "rejected", "annotator", "chosen_score", "rejected_score")
    return {name: row[name] for name in names if row[name] is not None}


def rebuilt(rows: list[Given], chosen: Given) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = build(folder, rows, chosen)
        again = [as_given(row) for row in first.kept.values()]
        if again:
            second = build(folder, again, chosen, "again")
            assert second.dropped == {}
            assert {row["pair_id"] for row in second.kept.values()} == {row["pair_id"] for row in first.kept.values()}


@property_of(7)
@given(rows_of(), SETTINGS.filter(lambda chosen: chosen["contradictions"] != "keep"))
def test_a_second_build_drops_nothing(rows: list[Given], chosen: Given) -> None:
    rebuilt(rows, chosen)


@pytest.mark.slow
@property_of(300)
@given(rows_of(), SETTINGS.filter(lambda chosen: chosen["contradictions"] != "keep"))
def test_a_second_build_drops_nothing_many_times(rows: list[Given], chosen: Given) -> None:
    rebuilt(rows, chosen)


def reordered(rows: list[Given], chosen: Given, order: list[int]) -> None:
    def said(found: Outcome) -> Any:
        kept = {row["pair_id"]: row["split"] for row in found.kept.values()}
        names = ("pair_id", "reason", "duplicate_of", "jaccard", "contradicts")
        return kept, Counter(tuple(row[name] for name in names) for row in found.dropped.values())

    with tempfile.TemporaryDirectory() as folder:
        shuffled = [rows[place] for place in order]
        assert said(build(folder, shuffled, chosen, "other")) == said(build(folder, rows, chosen))


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[Given], list[int]]:
    rows = draw(rows_of())
    return rows, draw(st.permutations(range(len(rows))))


@property_of(7)
@given(orders(), SETTINGS)
def test_the_order_of_rows_changes_no_id_no_drop_and_no_split(
    drawn: tuple[list[Given], list[int]], chosen: Given
) -> None:
    reordered(drawn[0], chosen, drawn[1])


@pytest.mark.slow
@property_of(300)
@given(orders(), SETTINGS)
def test_the_order_of_rows_changes_nothing_many_times(drawn: tuple[list[Given], list[int]], chosen: Given) -> None:
    reordered(drawn[0], chosen, drawn[1])


# many pairs of one prompt that share most of their words


def crowd(number: int, num_changes: int, seed: int) -> list[Given]:
    """Pairs whose sides are two texts with up to so many of sixty words replaced; one in thirty is swapped."""
    random_ = random.Random(seed)

    def side(name: str) -> str:
        text = words(name, 60).split()
        for _ in range(random_.randrange(num_changes + 1)):
            text[random_.randrange(60)] = f"z{random_.randrange(40)}"
        return " ".join(text)

    prompt = words("p", 40)
    rows = []
    for place in range(number):
        sides = ("c", "d") if random_.random() < 29 / 30 else ("d", "c")
        asked = prompt if place % 2 else f"{prompt} {random_.choice(['now', 'then', 'please'])}"
        rows.append(written((asked, side(sides[0]), side(sides[1]), None, float(random_.randrange(1, 5)), None), False))
    return rows


CROWDED: Given = {"near": {}, "contradictions": "drop_both", "cycles": "drop", "cap": None}


@pytest.mark.parametrize(("num_changes", "contradictions"), [(2, "drop_both"), (4, "majority")])
def test_a_crowd_loses_what_the_oracle_says_or_nearly_and_a_second_build_nothing(
    num_changes: int, contradictions: str, tmp_path: Path
) -> None:
    """Here much is near the threshold, so a few may be missed; nothing that goes is a mistake."""
    chosen = CROWDED | {"contradictions": contradictions}
    rows = crowd(100, num_changes, seed=1)
    found = build(tmp_path, rows, chosen)
    check_accounts(found, len(rows))
    check_what_drops_say(found)
    check_similarities(found)
    wanted = oracle.dedupe(found.all_rows(), found.rules)
    lost = Counter(drop.reason for drop in wanted.dropped.values())
    assert len(found.dropped) >= 0.8 * len(wanted.dropped)
    left = [found.kept[number] for number in sorted(found.kept)]
    strict = found.rules._replace(threshold=Fraction(9, 10))
    between = [oracle.likeness(one, two, strict) for at, two in enumerate(left) for one in left[:at]]
    assert not any(like.is_near or (like.is_against and contradictions != "keep") for like in between)
    assert found.built.reasons.get("contradiction", 0) <= lost["contradiction"]
    assert found.built.reasons.get("contradiction", 0) >= 0.9 * lost["contradiction"]
    again = build(tmp_path, [as_given(row) for row in found.kept.values()], chosen, "again")
    assert again.dropped == {}
    other = build(tmp_path, random.Random(2).sample(rows, len(rows)), chosen, "other")
    assert {row["pair_id"]: row["split"] for row in other.kept.values()} == {
        row["pair_id"]: row["split"] for row in found.kept.values()
    }


# several sources, and candidates among them


@st.composite
def candidate_rows(draw: st.DrawFn) -> list[Given]:
    texts = st.lists(REPLIES, min_size=1, max_size=4)
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        responses = draw(texts)
        rows.append(
            {"prompt": draw(PROMPTS), "responses": responses, "scores": [draw(st.integers(1, 3)) for _ in responses]}
        )
    return rows


@property_of(8)
@given(rows_of(), rows_of(), candidate_rows(), SETTINGS)
def test_both_equations_hold_for_several_sources(
    one: list[Given], other: list[Given], candidates: list[Given], chosen: Given
) -> None:
    cap = {} if chosen["cap"] is None else {"max_pairs_per_prompt": chosen["cap"]}
    dedupe = {"contradictions": chosen["contradictions"], "cycles": chosen["cycles"], "near_duplicates": chosen["near"]}
    with tempfile.TemporaryDirectory() as folder:
        sources: list[Given] = []
        for name, rows in (("pairs", one), ("pairs", other), ("candidates", candidates)):
            if rows:
                path = Path(folder) / f"{len(sources)}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                sources.append({"path": str(path), "format": name})
        built = build_dataset(
            checked(folder, "d", {"sources": sources, "kind": "chat", "dedupe": dedupe, "pairs": cap})
        )
        kept, dropped = table(built, "pairs"), table(built, "dropped")
    counts, best = built.counts, pl.col("method") == "best_of_n"
    ready = kept.filter(~best).height + dropped.filter(~best).height
    assert counts["rows"] == len(one) + len(other) == ready
    assert counts["candidates"] == sum(len(row["responses"]) for row in candidates)
    assert counts["candidates"] == counts["used"] + counts["unused"] + counts["candidate_rejects"]
    prompts = {row["prompt"] for row in candidates}
    assert counts["prompts"] == len(prompts) == counts["prompts_with_pair"] + counts["prompts_dropped"]
    assert counts["prompts_with_pair"] == kept.filter(best)["prompt_id"].n_unique()
    assert set(dropped["duplicate_of"].drop_nulls()) <= set(kept["pair_id"])
    assert set(dropped.filter(pl.col("stage") == "dedupe")["pair_id"].is_null()) <= {False}
    assert kept["pair_id"].n_unique() == kept.height


# real data


def deduplicated(built: Built) -> tuple[list[Given], list[Given | None]]:
    """The rows that came to deduplication, and what it said of each; in the order of their files."""
    dropped = table(built, "dropped").filter(pl.col("stage") == "dedupe")
    said: list[tuple[Given, Given | None]] = [(row, None) for row in table(built, "pairs").iter_rows(named=True)]
    said += [(row, row) for row in dropped.iter_rows(named=True)]
    said.sort(key=lambda both: (both[0]["source"], both[0]["source_row"]))
    return [row for row, _ in said], [drop for _, drop in said]


def exact_key(row: Given) -> tuple[Any, ...]:
    return tuple(oracle.folded(row[name]) for name in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize(("language", "num_copies"), [("en", 5), ("zh", 11)])
def test_the_demos_of_llama_factory_lose_their_exact_copies(
    language: str, num_copies: int, test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    path = test_data / "llamafactory" / f"dpo_{language}_demo.json"
    built = build_dataset(pipeline_of({"path": str(path)}))
    rows, drops = deduplicated(built)
    assert built.counts["rows"] == len(rows) == 300
    assert len(rows) - len({exact_key(row) for row in rows}) == num_copies
    assert built.reasons.get("duplicate", 0) == num_copies
    wanted = oracle.dedupe(rows, oracle.Rules())
    found = {number: drop["reason"] for number, drop in enumerate(drops) if drop is not None}
    assert built.reasons == {"duplicate": num_copies}  # and nothing that is nearly the same
    assert found == {number: drop.reason for number, drop in wanted.dropped.items()}
    for number, drop in wanted.dropped.items():
        said = drops[number]
        assert said is not None
        assert said["duplicate_of"] == drop.duplicate_of


VOTES = {
    "format": "comparisons",
    "columns": {"response_a": "arg1", "response_b": "arg2", "winner": "votes"},
    "labels": {"a": ["a1"], "b": ["a2"], "tie": ["equal"]},
    "annotator": "human",
}
POLICIES = ["drop_both", "majority", "higher_margin", "keep"]


def votes_of(test_data: Path) -> list[Given]:
    with gzip.open(test_data / "ukpconvarg" / "votes.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def counted(rows: Sequence[Given]) -> dict[tuple[str, str, str], int]:
    """Prompt, winner and loser of every comparison that somebody wins, and how often it was won."""
    won: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        votes: Counter[str] = Counter(row["votes"])
        (best, count), *others = votes.most_common()
        if best != "equal" and all(other < count for _, other in others):
            sides = (row["arg1"], row["arg2"]) if best == "a1" else (row["arg2"], row["arg1"])
            if oracle.fold(sides[0]) != oracle.fold(sides[1]):
                won[oracle.fold(row["prompt"]), oracle.fold(sides[0]), oracle.fold(sides[1])] += 1
    return won


def contradicted(won: dict[tuple[str, str, str], int], policy: str) -> int:
    """How many distinct comparisons a policy drops, of exact reversals."""
    num = 0
    for (prompt, winner, loser), count in won.items():
        back = won.get((prompt, loser, winner))
        if back is not None and policy != "keep":
            num += policy != "majority" or count <= back
    return num


@pytest.mark.parametrize("policy", POLICIES)
def test_votes_that_speak_against_each_other_are_counted_in_plain_python(
    policy: str, test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    """Without near-matching every contradiction is a reversal; a fifth of the votes are added the other way round."""
    rows = votes_of(test_data)[::4]
    turned = [row | {"arg1": row["arg2"], "arg2": row["arg1"]} for row in rows[::5]]
    repeated = [row for number, row in enumerate(rows) if number % 15 == 0]
    won = counted([*rows, *turned, *repeated])
    path = Path(pipeline_of({"path": "x", "format": "pairs"}).dataset).parent / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *turned, *repeated]), encoding="utf-8")
    dedupe = {"contradictions": policy, "cycles": "keep", "near_duplicates": None}
    built = build_dataset(pipeline_of({"path": str(path), **VOTES}, kind="chat", dedupe=dedupe))
    lost = table(built, "dropped").filter(pl.col("reason") == "contradiction")
    num = contradicted(won, policy)
    assert {exact_key(row) for row in lost.iter_rows(named=True)} == (set() if num == 0 else lost_keys(won, policy))
    assert built.counts["pairs"] == len(won) - num
    assert policy == "keep" or num > 100


def lost_keys(won: dict[tuple[str, str, str], int], policy: str) -> set[tuple[Any, ...]]:
    def key(prompt: str, winner: str, loser: str) -> tuple[Any, ...]:
        return ((("user", prompt, None),), (("assistant", winner, None),), (("assistant", loser, None),))

    return {
        key(prompt, winner, loser)
        for (prompt, winner, loser), count in won.items()
        if (prompt, loser, winner) in won and (policy != "majority" or count <= won[prompt, loser, winner])
    }


def votes_by_oracle(
    policy: str, num_prompts: int, test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> tuple[Counter[str], Counter[str]]:
    """How often each reason was given for the votes on some prompts: by the build, and by the oracle."""
    rows = votes_of(test_data)
    prompts = sorted({row["prompt"] for row in rows})[:num_prompts]
    path = Path(pipeline_of({"path": "x", "format": "pairs"}).dataset).parent / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] in prompts), encoding="utf-8")
    built = build_dataset(pipeline_of({"path": str(path), **VOTES}, kind="chat", dedupe={"contradictions": policy}))
    left, drops = deduplicated(built)
    wanted = oracle.dedupe(left, oracle.Rules(contradictions=policy))
    found = Counter(str(drop["reason"]) for drop in drops if drop is not None)
    different = [
        number
        for number, drop in enumerate(drops)
        if (drop and drop["reason"]) != (wanted.dropped[number].reason if number in wanted.dropped else None)
    ]
    assert different == []
    return found, Counter(drop.reason for drop in wanted.dropped.values())


def test_the_votes_on_one_prompt_are_dropped_as_the_oracle_drops_them(
    test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    found, wanted = votes_by_oracle("drop_both", 1, test_data, pipeline_of)
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_votes_on_six_prompts_are_dropped_as_the_oracle_drops_them(
    policy: str, test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    found, wanted = votes_by_oracle(policy, 6, test_data, pipeline_of)
    assert found == wanted
