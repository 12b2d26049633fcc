"""Every rule of selection equals plain Python loops in exact decimals, in memory, streamed and spilled alike."""

import errno
import gzip
import hashlib
import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit import candidates, pairing, quality
from prefkit.build import build_dataset
from prefkit.candidates import select_candidates, select_parts
from prefkit.config import PairsConfig, Pipeline
from prefkit.drafts import selection_rules
from prefkit.errors import ConfigError, MachineError
from prefkit.format import MESSAGES
from prefkit.pairing import Rules
from prefkit.pairs import Direction
from prefkit.selection import Selected, select_pairs

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
TEXTS = ["a", "bb", "cc", "dddd", "eeeeeee", "fffffff", "雪雪", "", " \n"]


class Row(NamedTuple):
    prompt: str
    response: str
    tenths: int
    scorer: str | None = None
    rater: str | None = None
    model: str | None = None


def records(rows: Sequence[Row | tuple[Any, ...]]) -> pl.DataFrame:
    listed = [Row(*row) for row in rows]
    texts = {
        name: [getattr(row, name) for row in listed] for name in ("prompt", "response", "scorer", "rater", "model")
    }
    frame = pl.DataFrame(texts, schema=dict.fromkeys(texts, pl.String))
    return frame.with_columns(
        pl.Series("score", [row.tenths / 10 for row in listed], pl.Float64),
        pl.Series("source", ["rows.jsonl"] * len(listed), pl.String),
        pl.Series("source_row", range(1, len(listed) + 1), pl.Int64),
    )


def select(rows: Sequence[Row | tuple[Any, ...]], direction: Direction = "higher_is_better", **rules: Any) -> Selected:
    return select_pairs(records(rows), "text", direction, Rules(**rules))


def sides(selected: Selected) -> set[tuple[str, str, str]]:
    found = selected.pairs.select("prompt", "chosen", "rejected").rows()
    assert len(found) == len(set(found))
    return set(found)


def reasons(selected: Selected) -> dict[str, str]:
    return dict(selected.dropped.select("prompt", "reason").rows())


# -- the oracle: dict loops, decimals of 50 digits


Values = dict[str, Decimal]  # by text


def mean(values: Sequence[Decimal]) -> Decimal:
    return sum(values, Decimal()) / len(values)


def deviation(values: Sequence[Decimal]) -> Decimal:
    middle = mean(values)
    return mean([(value - middle) ** 2 for value in values]).sqrt()


def rounded(value: Decimal, places: int) -> Decimal:
    return value.quantize(Decimal(1).scaleb(-places))


class Judged(NamedTuple):
    """One prompt: its texts, their quality (of those that have one), their own score, and each scorer's opinion."""

    texts: list[str]
    quality: Values
    score: Values
    opinions: list[Values]


def judge(rows: Sequence[Row], sign: int, scorers: str) -> dict[str, Judged]:
    given: dict[tuple[str, str, str | None, str | None], list[Decimal]] = defaultdict(list)
    for row in rows:
        if row.response.strip():
            given[row.prompt, row.response, row.scorer, row.rater].append(Decimal(row.tenths) / 10)
    merged = {key: mean(values) for key, values in given.items()}
    rated = any(row.rater is not None for row in rows)
    names = {key[2] for key in merged}
    opinions: dict[tuple[str, str, str | None], list[Decimal]] = defaultdict(list)
    own: dict[tuple[str, str], list[Decimal]] = defaultdict(list)
    for (prompt, text, scorer, rater), value in merged.items():
        own[prompt, text].append(value)
        if not rated:
            opinions[prompt, text, scorer].append(sign * value)
            continue
        theirs = [sign * v for (_, _, s, r), v in merged.items() if (s, r) == (scorer, rater)]
        if deviation(theirs) >= Decimal("1e-9"):
            z = (sign * value - mean(theirs)) / deviation(theirs)
            opinions[prompt, text, scorer].append(rounded(z, 12))
    found = {}
    for prompt in {row.prompt for row in rows}:
        texts = sorted({text for p, text in own if p == prompt})
        thought = [
            {text: mean(opinions[prompt, text, name]) for text in texts if opinions.get((prompt, text, name))}
            for name in names
        ]
        if len(names) <= 1:
            values = thought[0] if thought else {}
        else:
            values = combined([told for told in thought if told], texts, scorers)
        found[prompt] = Judged(texts, values, {text: mean(own[prompt, text]) for text in texts}, thought)
    return found


def combined(thought: list[Values], texts: list[str], scorers: str) -> Values:
    told: dict[str, list[Decimal]] = defaultdict(list)
    for values in thought:
        numbers = list(values.values())
        spread = deviation(numbers)
        if spread < Decimal("1e-9"):
            continue
        for text, value in values.items():
            below, same = sum(n < value for n in numbers), sum(n == value for n in numbers)
            rank = (below + (Decimal(same) - 1) / 2) / (len(numbers) - 1)
            told[text].append(rank if scorers == "rank" else (value - mean(numbers)) / spread)
    return {text: rounded(mean(told[text]), 9) for text in texts if told[text]}


def lot(seed: int, prompt: str, text: str) -> int:
    content = json.dumps([seed, prompt, None, text], ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def expected(judged: Judged, prompt: str, rules: Rules, sign: int) -> list[tuple[str, str]] | str:
    """The pairs of a prompt, or why it has none."""
    if len(judged.texts) < 2:
        return ["no_candidate", "one_candidate"][len(judged.texts)]
    value, least = judged.quality, rules.min_chosen_score
    left = [(a, b) for a in value for b in value if value[a] > value[b]]
    best = max(value.values(), default=Decimal())
    if rules.chosen == "best":
        left = [(a, b) for a, b in left if value[a] == best]

    def agreed(a: str, b: str) -> bool:
        return not any(a in v and b in v and v[b] > v[a] for v in judged.opinions)

    tests: list[tuple[str, Callable[[str, str], bool]]] = [
        ("tie", lambda a, b: True),
        ("under_min_chosen_score", lambda a, _b: least is None or sign * judged.score[a] >= sign * Decimal(str(least))),
        ("under_min_margin", lambda a, b: value[a] - value[b] >= Decimal(str(rules.min_margin))),
        (
            "over_max_margin",
            lambda a, b: rules.max_margin is None or value[a] - value[b] <= Decimal(str(rules.max_margin)),
        ),
        (
            "over_length_cap",
            lambda a, b: rules.length_cap is None or abs(math.log(len(a) / len(b))) <= rules.length_cap,
        ),
        ("scorers_disagree", lambda a, b: not rules.scorers_agree or agreed(a, b)),
    ]
    for reason, test in tests:
        left = [(a, b) for a, b in left if test(a, b)]
        if not left:
            return reason
    return picked(left, judged, prompt, rules)


def picked(left: list[tuple[str, str]], judged: Judged, prompt: str, rules: Rules) -> list[tuple[str, str]]:
    value = judged.quality
    numbers = list(value.values())
    target = mean(numbers) - Decimal(str(rules.sigma)) * deviation(numbers)

    def preference(b: str) -> tuple[Any, ...]:
        if rules.rejected == "random":
            return (lot(rules.seed, prompt, b),)
        away = rounded(abs(value[b] - target), 11)
        return (value[b],) if rules.rejected == "worst" else (away, value[b])

    def tie(pair: tuple[str, str]) -> tuple[Any, ...]:
        return abs(len(pair[0]) - len(pair[1])), *pair

    if rules.rejected == "all":
        if rules.chosen == "best":
            one = min(a for a, _ in left)
            left = [pair for pair in left if pair[0] == one]
    else:
        left = [
            min((pair for pair in left if pair[0] == a), key=lambda pair: (preference(pair[1]), tie(pair)))
            for a in {a for a, _ in left}
        ]
        if rules.chosen == "best":
            left = [min(left, key=lambda pair: (preference(pair[1]), tie(pair)))]
    left.sort(key=lambda pair: (value[pair[1]] - value[pair[0]], tie(pair)))
    return left[: rules.max_pairs_per_prompt]


def check_against_oracle(rows: Sequence[Row], direction: Direction, rules: Rules) -> None:
    sign = 1 if direction == "higher_is_better" else -1
    selected = select_pairs(records(rows), "text", direction, rules)
    with localcontext() as context:
        context.prec = 50
        judged = judge(rows, sign, rules.scorers)
        wanted = {prompt: expected(one, prompt, rules, sign) for prompt, one in judged.items()}
    assert reasons(selected) == {prompt: found for prompt, found in wanted.items() if isinstance(found, str)}
    pairs = {(p, *pair) for p, found in wanted.items() if not isinstance(found, str) for pair in found}
    assert sides(selected) == pairs
    several = len({row.scorer for row in rows if row.response.strip()}) > 1
    for pair in selected.pairs.iter_rows(named=True):
        one = judged[pair["prompt"]]
        high, low = (one.quality[pair[side]] for side in ("chosen", "rejected"))
        assert pair["margin"] == pytest.approx(float(high - low), abs=1e-9)
        assert pair["num_candidates"] == len(one.texts)
        for side in ("chosen", "rejected"):
            own = None if several else pytest.approx(float(one.score[pair[side]]), abs=1e-9)
            assert pair[f"{side}_score"] == own
    check_account(rows, selected)


def check_account(rows: Sequence[Row], selected: Selected) -> None:
    """Every row is used or unused, every prompt paired or dropped, and each number is what it says."""
    assert selected.num_used + sum(selected.unused.values()) == len(rows)
    assert selected.num_prompts == len({row.prompt for row in rows})
    assert selected.num_prompts == selected.num_paired_prompts + selected.dropped.height
    assert selected.num_paired_prompts == selected.pairs["prompt"].n_unique()
    used = {(p, text) for p, *both in sides(selected) for text in both}
    assert selected.num_used == len(used)
    filled = [row for row in rows if row.response.strip()]
    distinct = {(row.prompt, row.response) for row in filled}
    scores = {(row.prompt, row.response, row.scorer, row.rater) for row in filled}
    counts = {
        "empty_response": len(rows) - len(filled),
        "identical_response": len(filled) - len(scores),
        "merged_score": len(scores) - len(distinct),
        "not_selected": len(distinct) - len(used),
    }
    assert selected.unused == {reason: count for reason, count in counts.items() if count}
    assert selected.report["prompts_without_pair"] == dict(Counter(selected.dropped["reason"]))
    assert json.loads(json.dumps(selected.report)) == selected.report


# -- rules and rows, drawn


def rows_of(
    scorers: Sequence[str | None] = (None,), raters: Sequence[str | None] = (None,)
) -> st.SearchStrategy[list[Row]]:
    row = st.builds(
        Row,
        st.sampled_from("pq"),
        st.sampled_from(TEXTS),
        st.integers(-3, 6),
        st.sampled_from(scorers),
        st.sampled_from(raters),
        st.sampled_from([None, "m", "n"]),
    )
    return st.lists(row, max_size=14)


RULES = st.builds(
    Rules,
    chosen=st.sampled_from(["best", "all_above"]),
    rejected=st.sampled_from(["worst", "random", "all", "sigma"]),
    sigma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    min_margin=st.sampled_from([0.0, 0.0, 0.2, 0.5]),
    max_margin=st.sampled_from([None, None, 0.5, 0.7]),
    min_chosen_score=st.none(),
    length_cap=st.sampled_from([None, None, 0.5, 1.5]),
    max_pairs_per_prompt=st.sampled_from([None, None, 1, 2, 4]),
    scorers=st.sampled_from(["rank", "zscore"]),
    scorers_agree=st.booleans(),
    seed=st.integers(0, 3),
)
DIRECTIONS = st.sampled_from(get_args(Direction))
SEVERAL = (None, "helpful", "short")
RATERS = (None, "ann", "bob")


@PROPERTY
@given(rows_of(), DIRECTIONS, RULES, st.sampled_from([None, None, 0.0, 0.3]))
def test_one_scorer_is_as_in_plain_loops(
    rows: list[Row], direction: Direction, rules: Rules, least: float | None
) -> None:
    check_against_oracle(rows, direction, rules._replace(min_chosen_score=least))


@PROPERTY
@given(rows_of(SEVERAL), DIRECTIONS, RULES)
def test_several_scorers_are_as_in_plain_loops(rows: list[Row], direction: Direction, rules: Rules) -> None:
    check_against_oracle(rows, direction, rules)


@PROPERTY
@given(rows_of(raters=RATERS), DIRECTIONS, RULES)
def test_raters_are_as_in_plain_loops(rows: list[Row], direction: Direction, rules: Rules) -> None:
    check_against_oracle(rows, direction, rules)


@PROPERTY
@given(rows_of(SEVERAL, RATERS), DIRECTIONS, RULES)
def test_raters_of_several_scorers_are_as_in_plain_loops(rows: list[Row], direction: Direction, rules: Rules) -> None:
    check_against_oracle(rows, direction, rules)


@PROPERTY
@given(rows_of(SEVERAL, RATERS), DIRECTIONS, RULES, st.randoms(use_true_random=False))
def test_shuffled_rows_give_the_same_pairs_to_the_last_bit(
    rows: list[Row], direction: Direction, rules: Rules, shuffler: random.Random
) -> None:
    shuffled = rows.copy()
    shuffler.shuffle(shuffled)
    first, second = (select_pairs(records(order), "text", direction, rules) for order in (rows, shuffled))
    columns = [name for name in first.pairs.columns if name != "source_row"]
    assert sorted(first.pairs.select(columns).rows(), key=str) == sorted(second.pairs.select(columns).rows(), key=str)
    assert reasons(first) == reasons(second)
    assert first[2:] == second[2:]


@PROPERTY
@given(
    st.lists(
        st.tuples(
            st.sampled_from("pq"),
            st.text(max_size=3),
            st.floats(-1e30, 1e30, allow_nan=False, allow_infinity=False),
            st.sampled_from(SEVERAL),
            st.sampled_from(RATERS),
        ),
        max_size=12,
    ),
    DIRECTIONS,
    RULES,
    st.booleans(),
)
def test_whatever_the_floats_no_pair_is_identical_empty_or_inverted(
    drawn: list[tuple[str, str, float, str | None, str | None]], direction: Direction, rules: Rules, plain: bool
) -> None:
    rows = [Row(p, text, 0, *((None, None) if plain else rest)) for p, text, _, *rest in drawn]
    frame = records(rows).with_columns(pl.Series("score", [row[2] for row in drawn], pl.Float64))
    selected = select_pairs(frame, "text", direction, rules)
    for pair in selected.pairs.iter_rows(named=True):
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"].strip()
        assert pair["rejected"].strip()
        assert pair["margin"] > 0
        if plain:
            apart = pair["chosen_score"] - pair["rejected_score"]
            assert apart > 0 if direction == "higher_is_better" else apart < 0
    check_account(rows, selected)


# -- streamed, in memory, spilled


def same(first: Selected, second: Selected) -> bool:
    frames = all(
        a.equals(b, null_equal=True) and a.schema == b.schema for a, b in zip(first[:2], second[:2], strict=True)
    )
    return frames and first[2:] == second[2:]


@pytest.mark.slow
@PROPERTY
@given(rows_of(SEVERAL, RATERS), st.booleans(), st.booleans(), DIRECTIONS, RULES, st.integers(1, 5), st.data())
def test_streamed_held_and_spilled_are_the_same_to_the_last_bit(
    rows: list[Row],
    together: bool,
    plain: bool,
    direction: Direction,
    rules: Rules,
    height: int,
    data: st.DataObject,
) -> None:
    rows = [row._replace(scorer=None, rater=None) for row in rows] if plain else rows
    rows = sorted(rows, key=lambda row: row.prompt) if together else rows
    frame = records(rows)
    wanted = select_pairs(frame, "text", direction, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "BATCH_ROWS", data.draw(st.sampled_from([1, 3, 100])))
        patch.setattr(candidates, "PAIRS", data.draw(st.sampled_from([1, 2, 100])))
        patch.setattr(pairing, "CROSSINGS", data.draw(st.sampled_from([1, 4, 1000])))
        patch.setattr(pairing, "TEXTS", data.draw(st.sampled_from([1, 4, 1000])))
        for memory_limit in (1, 200, 10**9):
            found = select_candidates(
                lambda: frame.iter_slices(height), "text", direction, rules, memory_limit=memory_limit
            )
            assert same(found, wanted)


@PROPERTY
@given(rows_of(), DIRECTIONS, RULES)
def test_what_needs_no_crossing_gives_what_crossing_all_gives(
    rows: list[Row], direction: Direction, rules: Rules
) -> None:
    rules = rules._replace(chosen="best", length_cap=None)
    without = select_pairs(records(rows), "text", direction, rules)
    crossed = select_pairs(records(rows), "text", direction, rules._replace(length_cap=100.0))
    assert same(without, crossed)


def long_records(num_prompts: int, per_prompt: int, *, shuffled: bool) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    numbers = np.arange(num_prompts * per_prompt)
    if shuffled:
        rng.shuffle(numbers)
    rows = [Row(f"prompt {n // per_prompt}", f"response {n} " + "x" * (n * 7 % 13), int(n * 31 % 100)) for n in numbers]
    return records(rows)


@pytest.mark.parametrize(
    ("shuffled", "memory_limit", "rules", "readings"),
    [
        (False, 10**9, Rules(min_margin=0.5), 1),
        (True, 10**9, Rules(min_margin=0.5), 3),  # in vain, for the numbers, for the best and the worst
        (True, 10_000, Rules(min_margin=0.5), 3),
        (True, 10**9, Rules(rejected="all"), 2),  # in vain, and to hold all
        (True, 10_000, Rules(rejected="all"), 2),
    ],
)
def test_prompts_that_stand_together_are_read_once_and_others_as_often_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, shuffled: bool, memory_limit: int, rules: Rules, readings: int
) -> None:
    monkeypatch.setattr(candidates, "BATCH_ROWS", 256)
    frame = long_records(500, 8, shuffled=shuffled)
    seen = []

    def read() -> Iterator[pl.DataFrame]:
        seen.append(len(list(tmp_path.iterdir())))
        yield from frame.iter_slices(100)

    found = select_candidates(read, "text", "higher_is_better", rules, memory_limit, tmp_path)
    assert same(found, select_pairs(frame, "text", "higher_is_better", rules))
    assert len(seen) == readings
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_said_so_and_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(candidates, "_one_batch", full)
    frame = long_records(50, 8, shuffled=True)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        select_candidates(lambda: [frame], "text", "higher_is_better", Rules(), 1000, tmp_path)
    assert caught.value.where == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_comes_back_at_the_very_end_voids_all_that_was_decided() -> None:
    rows = [Row(f"p{n // 2}", f"text {n}", n) for n in range(20)]
    frame = records([*rows, Row("p0", "better", 99)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "BATCH_ROWS", 4)
        parts = [*select_parts(lambda: frame.iter_slices(3), "text", "higher_is_better", Rules(), 10**9, None)]
        assert None in parts
        assert parts.index(None) > 1
        found = select_candidates(lambda: frame.iter_slices(3), "text", "higher_is_better", Rules())
    assert ("p0", "better", "text 0") in sides(found)


def test_one_prompt_larger_than_a_batch_is_carried_on() -> None:
    rows = [Row("a", "x", 1), Row("a", "y", 2), *(Row("long", f"text {n}", n) for n in range(50)), Row("z", "x", 1)]
    frame = records(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "BATCH_ROWS", 4)
        found = select_candidates(lambda: frame.iter_slices(5), "text", "higher_is_better", Rules())
    assert sides(found) == {("a", "y", "x"), ("long", "text 49", "text 0")}
    assert reasons(found) == {"z": "one_candidate"}


def test_pairs_do_not_keep_the_texts_of_all_candidates_in_memory() -> None:
    frame = records([Row(f"p{n // 8}", f"{n} " + "x" * 1000, n) for n in range(8000)])
    parts = [*select_parts(lambda: frame.iter_slices(1000), "text", "higher_is_better", Rules(), 10**9, None)]
    for part in parts:
        assert part is not None
        buffers = {address: size for address, _, size in _buffers(part.pairs["chosen"])}
        assert sum(buffers.values()) < 2 * part.pairs["chosen"].str.len_bytes().sum() + 100_000


def _buffers(series: pl.Series) -> Iterator[tuple[int, int, int]]:
    for chunk in (
        series.to_arrow(compat_level=pl.CompatLevel.newest()).chunks
        if series.n_chunks() > 1
        else [series.to_arrow(compat_level=pl.CompatLevel.newest())]
    ):
        for buffer in chunk.buffers():
            if buffer is not None:
                yield buffer.address, 0, buffer.size


@pytest.mark.parametrize("memory_limit", [1, 10**9])
@pytest.mark.parametrize("both", [False, True])
def test_prompts_of_one_hash_are_not_mixed_up(
    monkeypatch: pytest.MonkeyPatch, memory_limit: int, *, both: bool
) -> None:
    """With seed 0, the hashes of all prompts are made the same, and the check too; the next seed is as it is."""
    rows = [Row("p", "a", 1), Row("p", "b", 2), Row("q", "c", 9), Row("q", "d", 7)]
    frame = records(rows)
    narrow_rows = quality.narrow_rows

    def colliding(*arguments: Any, hash_seed: int = 0, **rest: Any) -> pl.DataFrame:
        narrow = narrow_rows(*arguments, hash_seed=hash_seed, **rest)
        same_key = pl.lit(7, pl.UInt64).alias("prompt_key")
        return narrow if hash_seed else narrow.with_columns(same_key, *([same_key.alias("prompt_check")] * both))

    wanted = select_pairs(frame, "text", "higher_is_better", Rules())
    monkeypatch.setattr("prefkit.selection.narrow_rows", colliding)
    monkeypatch.setattr("prefkit.candidates.narrow_rows", colliding)
    assert same(select_pairs(frame, "text", "higher_is_better", Rules()), wanted)
    found = select_candidates(lambda: [frame], "text", "higher_is_better", Rules(), memory_limit)
    assert same(found, wanted)
    assert sides(wanted) == {("p", "b", "a"), ("q", "c", "d")}


def test_no_frame_at_all_is_an_empty_selection() -> None:
    found = select_candidates(list, "chat", "higher_is_better", Rules())
    assert (found.pairs.height, found.dropped.height, found.num_prompts) == (0, 0, 0)
    assert found.report["num_candidates"] == {"median": None, "max": None}


def test_binary_scores_of_a_thousand_candidates_are_not_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("p", f"{n:04d}" + "x" * (n % 97), n % 2) for n in range(2000)]
    monkeypatch.setattr(pairing, "_crossed", None)
    (pair,) = select(rows).pairs.to_dicts()
    high, low = ([row.response for row in rows if row.tenths == value] for value in (1, 0))
    closest = min((abs(len(a) - len(b)), a, b) for a in high for b in low)
    assert (pair["chosen"], pair["rejected"]) == closest[1:]


def test_where_sides_are_compared_only_some_are_looked_at_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("p", f"{n:04d}" + "x" * (n % 97), n % 2) for n in range(400)]
    whole = select(rows, chosen="all_above", length_cap=0.1)
    monkeypatch.setattr(pairing, "CROSSINGS", 500)
    looked: list[int] = []
    eligible = pairing._eligible

    def watched(field: Any, crossing: Any, alive: Any) -> Any:
        looked.append(len(crossing.chosen))
        return eligible(field, crossing, alive)

    monkeypatch.setattr(pairing, "_eligible", watched)
    assert same(select(rows, chosen="all_above", length_cap=0.1), whole)
    assert max(looked) <= 500
    assert sum(looked) == 200 * 200


# -- single cases, for people


FIVE = [("p", "best", 50), ("p", "good", 40), ("p", "middle", 30), ("p", "poor", 20), ("p", "bad", 10)]


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, [("best", "bad")]),
        ({"rejected": "sigma", "sigma": 0.0}, [("best", "middle")]),
        ({"rejected": "sigma", "sigma": 1.0}, [("best", "poor")]),
        ({"rejected": "sigma", "sigma": 2.0}, [("best", "bad")]),
        ({"rejected": "all"}, [("best", other) for other in ("good", "middle", "poor", "bad")]),
        ({"chosen": "all_above"}, [(other, "bad") for other in ("best", "good", "middle", "poor")]),
        (
            {"chosen": "all_above", "rejected": "all", "min_margin": 3.0},
            [("best", "poor"), ("best", "bad"), ("good", "bad")],
        ),
        ({"chosen": "all_above", "rejected": "all", "max_pairs_per_prompt": 1}, [("best", "bad")]),
        ({"max_margin": 2.0}, [("best", "middle")]),
        ({"max_margin": 2.0, "chosen": "all_above", "max_pairs_per_prompt": 2}, [("good", "poor"), ("best", "middle")]),
        ({"length_cap": 0.01}, [("best", "poor")]),
    ],
)
def test_what_each_rule_picks_of_five(rules: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert sides(select(FIVE, **rules)) == {("p", *pair) for pair in wanted}


def test_a_mean_that_is_as_near_to_two_qualities_takes_the_worse() -> None:
    rows = [("p", "a", 0), ("p", "b", 10), ("p", "c", 30), ("p", "d", 40)]  # mean 2, as far from 1 as from 3
    assert sides(select(rows, rejected="sigma", sigma=0.0)) == {("p", "d", "b")}


def test_random_is_uniform_and_another_with_another_seed() -> None:
    rows = [(f"p{n}", text, {"best": 50}.get(text, 10)) for n in range(600) for text in ("best", "a", "b", "c")]
    drawn = [select(rows, rejected="random", seed=seed).pairs["rejected"].to_list() for seed in (0, 1)]
    for one in drawn:
        assert all(150 < count < 250 for count in Counter(one).values())
    assert 0.25 < np.mean([a == b for a, b in zip(*drawn, strict=True)]) < 0.42
    assert drawn[0] == select(rows, rejected="random", seed=0).pairs["rejected"].to_list()


def test_the_lots_of_random_are_the_same_on_every_machine() -> None:
    frame = records([("p", "雪", 1)])
    assert quality.narrow_rows(frame, "text", random_seed=7)["lot"].to_list() == [lot(7, "p", "雪")]


def test_a_scorer_that_tells_nothing_apart_is_skipped() -> None:
    rows = [("p", "a", 9, "s"), ("p", "b", 1, "s"), ("p", "a", 5, "t"), ("p", "b", 5, "t"), ("p", "c", 5, "t")]
    selected = select(rows)
    assert selected.pairs.select("chosen", "rejected", "margin").rows() == [("a", "b", 1.0)]
    assert selected.pairs.select("chosen_score", "rejected_score", "num_candidates").rows() == [(None, None, 3)]


def test_a_prompt_of_which_no_scorer_tells_anything_is_a_tie() -> None:
    rows = [("p", "a", 5, "s"), ("p", "b", 5, "s"), ("p", "a", 1, "t"), ("q", "a", 1, "t"), ("q", "b", 2, "t")]
    selected = select(rows)
    assert reasons(selected) == {"p": "tie"}
    assert sides(selected) == {("q", "b", "a")}


def test_a_rater_who_gives_everything_the_same_is_left_out_and_scales_do_not_matter() -> None:
    harsh = [("p", "a", 10, None, "harsh"), ("p", "b", 20, None, "harsh"), ("p", "c", 30, None, "harsh")]
    kind = [("p", "a", 900, None, "kind"), ("p", "b", 700, None, "kind"), ("p", "c", 800, None, "kind")]
    flat = [("p", text, 50, None, "flat") for text in "abc"]
    selected = select([*harsh, *kind, *flat])
    assert sides(selected) == {("p", "c", "b")}  # z-scores a -1.22 + 1.22, b 0 - 1.22, c 1.22 + 0
    assert selected.report["num_raters"] == 3
    assert selected.unused == {"merged_score": 6, "not_selected": 1}


@pytest.mark.parametrize(("agree", "wanted"), [(False, {"p": ("b", "a")}), (True, {})])
def test_scorers_agree_keeps_only_pairs_that_no_scorer_would_turn(agree: bool, wanted: dict[str, Any]) -> None:
    by = {"s": {"a": 9, "b": 5, "c": 4}, "t": {"a": 8, "b": 9, "c": 8}, "u": {"a": 1, "b": 2, "c": 3}}
    rows = [("p", text, value, scorer) for scorer, values in by.items() for text, value in values.items()]
    selected = select(rows, scorers_agree=agree)
    assert {row[0]: row[1:] for row in sides(selected)} == wanted
    if agree:
        assert reasons(selected) == {"p": "scorers_disagree"}


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"min_chosen_score": 6.0}, "under_min_chosen_score"),
        ({"min_chosen_score": 6.0, "min_margin": 9.0}, "under_min_chosen_score"),
        ({"min_margin": 9.0}, "under_min_margin"),
        ({"max_margin": 0.5}, "over_max_margin"),
        ({"rejected": "all", "max_margin": 0.5, "length_cap": 0.1}, "over_max_margin"),
        ({"min_margin": 4.0, "length_cap": 0.2}, "over_length_cap"),
    ],
)
def test_the_first_rule_after_which_no_pair_is_left_is_the_reason(rules: dict[str, Any], reason: str) -> None:
    selected = select(FIVE, **rules)
    (dropped,) = selected.dropped.to_dicts()
    assert (dropped["reason"], dropped["stage"], dropped["method"]) == (reason, "pairs", "best_of_n")
    assert (dropped["margin"], dropped["num_candidates"]) == (4.0, 5)


def test_the_least_chosen_score_counts_in_the_direction_of_the_source() -> None:
    ranks = [("p", "first", 10), ("p", "second", 20), ("q", "first", 30), ("q", "second", 40)]
    selected = select(ranks, "lower_is_better", min_chosen_score=2.0)
    assert sides(selected) == {("p", "first", "second")}
    assert reasons(selected) == {"q": "under_min_chosen_score"}


def test_a_least_chosen_score_needs_one_scorer() -> None:
    rows = [("p", "a", 1, "s"), ("p", "b", 2, "t")]
    with pytest.raises(
        ConfigError, match=r"pairs.min_chosen_score has no meaning with 2 scorers, whose units differ"
    ) as caught:
        select(rows, min_chosen_score=1.0)
    assert (caught.value.expected, caught.value.hint) == (
        "one scorer",
        "leave pairs.min_chosen_score out, or map score: to one column",
    )


def test_other_tools_make_another_prompt() -> None:
    turn, reply = (
        [[{"role": role, "content": text}] for text in texts]
        for role, texts in (("user", "qqqq"), ("assistant", "abab"))
    )
    frame = pl.DataFrame(
        {
            "prompt": pl.Series(turn, dtype=MESSAGES),
            "response": pl.Series(reply, dtype=MESSAGES),
            "tools": [None, '[{"name": "f"}]', '[{"name": "f"}]', None],
            "score": [1.0, 1.0, 2.0, 2.0],
            "model": pl.Series([None] * 4, dtype=pl.String),
            "source": ["f"] * 4,
            "source_row": [1, 2, 3, 4],
        }
    )
    selected = select_pairs(frame, "chat", "higher_is_better")
    assert selected.pairs.select("tools", "source_row").rows() == [('[{"name": "f"}]', 3), (None, 4)]


def test_a_tool_call_without_words_is_no_empty_response() -> None:
    call = {"role": "assistant", "content": "", "extra": '{"tool_calls": [{"name": "f"}]}'}
    turns = [
        [call],
        [{"role": "assistant", "content": " ", "extra": None}],
        [{"role": "assistant", "content": "no", "extra": None}],
    ]
    frame = pl.DataFrame(
        {
            "prompt": pl.Series([[{"role": "user", "content": "q", "extra": None}]] * 3, dtype=MESSAGES),
            "response": pl.Series(turns, dtype=MESSAGES),
            "score": [3.0, 2.0, 1.0],
            "model": pl.Series([None] * 3, dtype=pl.String),
            "source": ["f"] * 3,
            "source_row": [1, 2, 3],
        }
    )
    selected = select_pairs(frame, "chat", "higher_is_better")
    assert selected.unused == {"empty_response": 1}
    assert selected.pairs["chosen"].to_list() == [[call]]


def test_a_merged_mean_loses_no_digits_where_they_cancel_out() -> None:
    rows = [("p", "zero", value) for value in (1, 2, -3)] + [("p", "nought", 0)]
    assert reasons(select(rows)) == {"p": "tie"}


def test_the_report_says_what_was_there_and_advises_against_the_worst_of_many() -> None:
    rows = [(f"p{n // 9}", f"t{n}", n) for n in range(27)] + [("q", "a", 1)]
    report = select(rows).report
    assert report["num_candidates"] == {"median": 9.0, "max": 9}
    assert report["margins"] == dict.fromkeys(("min", "p10", "median", "p90", "max"), 0.8)
    assert (report["num_scorers"], report["num_raters"]) == (1, 0)
    assert report["prompts_without_pair"] == {"one_candidate": 1}
    (advice,) = report["advice"]
    assert "sigma:2" in advice
    assert "2502.16825" in advice
    assert select(rows, rejected="sigma", sigma=2.0).report["advice"] == []
    assert select(FIVE).report["advice"] == []


def test_the_settings_of_a_pipeline_become_rules() -> None:
    given = PairsConfig(rejected="sigma:1.5", chosen="all_above", length_cap=0.7, max_pairs_per_prompt=3, seed=4)
    assert selection_rules(given) == Rules(
        chosen="all_above", rejected="sigma", sigma=1.5, length_cap=0.7, max_pairs_per_prompt=3, seed=4
    )
    assert selection_rules(PairsConfig()) == Rules()


# -- through a build


def test_scores_that_are_no_numbers_are_rejects_and_ranks_never_invert(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    ranks: list[Any] = [3, 1, "2", "nan", "inf", None, 1e400, -1e400]
    rows = [
        {"prompt": f"p{n}", "response": f"r{n} {i}", "score": rank} for n in range(4) for i, rank in enumerate(ranks)
    ]
    path = write_jsonl("ranks.jsonl", rows)
    source = {"path": str(path), "format": "candidates", "direction": "lower_is_better"}
    built = build_dataset(pipeline_of(source, validate={"max_reject_share": 1}, split={"test_share": 0}))
    pairs = pl.read_parquet(Path(built.dataset) / "pairs" / "*.parquet")
    assert pairs.height == 4
    assert set(pairs.select("chosen_score", "rejected_score", "margin").rows()) == {(1.0, 3.0, 2.0)}
    assert built.counts["candidate_rejects"] == 4 * 5


def test_a_source_of_several_scorers_says_which_file_min_chosen_score_does_not_fit(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    path = write_jsonl(
        "two.jsonl", [{"prompt": "p", "response": str(n), "score": n, "scorer": "st"[n]} for n in range(2)]
    )
    source = {"path": str(path), "format": "candidates"}
    with pytest.raises(ConfigError) as caught:
        build_dataset(pipeline_of(source, pairs={"min_chosen_score": 1}))
    assert caught.value.where == str(path)


MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def test_gsm8k_solutions_give_a_pair_where_some_models_were_right_and_some_wrong(
    test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    path = test_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    columns = {
        "prompt": "question",
        "responses": [f"{model}.solution" for model in MODELS],
        "scores": [f"{model}.is_correct" for model in MODELS],
    }
    source = {"path": str(path), "format": "candidates", "columns": columns, "annotator": "rule"}
    built = build_dataset(pipeline_of(source, kind="text"))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for model in MODELS:
            if row[model]["solution"].strip():
                right[row["question"]][row[model]["solution"]].append(row[model]["is_correct"])
    told = {q: {t: sum(r) / len(r) for t, r in texts.items()} for q, texts in right.items()}
    differing = {q for q, texts in told.items() if len(set(texts.values())) > 1}
    pairs = pl.read_parquet(Path(built.dataset) / "pairs" / "*.parquet")
    dropped = pl.read_parquet(Path(built.dataset) / "dropped" / "*.parquet")
    later = dropped.filter(pl.col("stage") != "pairs")["prompt"]
    assert set(pairs["prompt"]) | set(later) == differing
    assert 0 < len(differing) < len(told)
    for pair in pairs.iter_rows(named=True):
        texts = told[pair["prompt"]]
        assert texts[pair["chosen"]] == max(texts.values())
        assert texts[pair["rejected"]] == min(texts.values())
    counts = built.counts
    assert counts["candidates"] == 4 * len(rows)
    assert counts["used"] + counts["unused"] + counts["candidate_rejects"] == counts["candidates"]


def test_wildbench_margins_and_rules_are_those_of_plain_loops(test_data: Path) -> None:
    """Nine models a session, scores written as text: every rule against a loop, on real lengths and ties."""
    table = pl.read_parquet(test_data / "wildbench" / "candidates.parquet")
    rows = [
        Row(session, text, round(float(score) * 10))
        for session, text, score in table.select("session_id", "model_output", "score").iter_rows()
    ]
    for rules in (
        Rules(),
        Rules(rejected="sigma", sigma=2.0),
        Rules(chosen="all_above", max_margin=4.0),
        Rules(rejected="random", length_cap=0.5, seed=3),
        Rules(chosen="all_above", rejected="all", min_margin=1.0, max_pairs_per_prompt=5),
    ):
        check_against_oracle(rows, "higher_is_better", rules)


def test_pairs_come_in_the_order_of_their_chosen_rows() -> None:
    frame = long_records(40, 8, shuffled=True)
    selected = select_pairs(frame, "text", "higher_is_better", Rules(rejected="all", chosen="all_above"))
    assert all(a <= b for a, b in pairwise(selected.pairs["source_row"].to_list()))
