"""Counts equal a naive recount, tests equal scipy's, the verdict needs significance, effect and coverage."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prefkit.audit.allow import allows
from prefkit.audit.alphabets import Alphabet, count_alphabet
from prefkit.audit.counting import of_words
from prefkit.audit.evidence import gather, in_memory
from prefkit.audit.postings import names_of
from prefkit.audit.significance import benjamini_hochberg, sign_test, smallest_detectable_win_rate
from prefkit.audit.verdict import LEVELS, Finding, Limits, find_tokens, judge, power_of, token_finding
from prefkit.audits import audit_dataset, enforce_audit
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.documents import Audit
from prefkit.errors import AuditError, DatasetError
from prefkit.format import schema
from prefkit.settings import AuditLimits
from prefkit.store import read_document
from prefkit.tables import write_parquet

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
LIMITS = Limits(**AuditLimits().model_dump(exclude={"strict"}))


def counted_words(pairs: Sequence[tuple[str, str]], allow: Sequence[str] = (), ngrams: int = 1) -> Alphabet:
    frame = pl.DataFrame(pairs, schema={"chosen": pl.String, "rejected": pl.String}, orient="row")
    numbered = frame.with_row_index("prompt").with_columns(pl.col("prompt").cast(pl.String))
    texts = in_memory(numbered.with_columns(pl.col("prompt").alias("pair_id"), pl.lit("file").alias("source")))
    return count_alphabet(
        "word",
        texts,
        of_words,
        lambda counts: (names_of(texts, counts), None),
        gather(texts),
        allows(allow),
        ngrams=ngrams,
        min_discordant=1,
        memory_limit=10**9,
        scratch=None,
    )


def table(pairs: Sequence[tuple[str, str]], allow: Sequence[str] = (), ngrams: int = 1) -> pl.DataFrame:
    return counted_words(pairs, allow, ngrams).table.sort("p", "num_discordant", "token", nulls_last=True)


def row_of(found: pl.DataFrame, token: str) -> dict[str, Any]:
    return found.row(by_predicate=pl.col("token") == token, named=True)


def counted(b: int, c: int, both: int = 0, neither: int = 0) -> list[tuple[str, str]]:
    """Pairs in which the word `zeta` is in chosen only b times, in rejected only c times, and so on.

    All sides are of one length, and no other word is in two pairs on one side only.
    """
    kinds = [(True, False)] * b + [(False, True)] * c + [(True, True)] * both + [(False, False)] * neither
    return [(side(i, "a", one), side(i, "b", other)) for i, (one, other) in enumerate(kinds)]


def side(number: int, name: str, has: bool) -> str:
    return f"say {'zeta' if has else f'filler{number}{name}'} now"


def found_in(pairs: Sequence[tuple[str, str]], allow: Sequence[str] = ()) -> list[Finding]:
    found = find_tokens(table(pairs, allow), LIMITS)
    return [token_finding(row, "data") for row in found.iter_rows(named=True)]


def level_of(pairs: Sequence[tuple[str, str]]) -> str:
    rows = table(pairs)
    tests = rows["q"].drop_nulls().len()
    return judge(found_in(pairs), power_of(len(pairs), tests, LIMITS), len(pairs), LIMITS).level


# counting


TEXTS = st.text("abAB\u00e9e\u0301 .!\n", max_size=12)


@PROPERTY
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=25))
def test_counts_are_those_of_a_naive_recount(pairs: list[tuple[str, str]]) -> None:
    def tokens(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text).casefold())

    sides = [(tokens(chosen), tokens(rejected)) for chosen, rejected in pairs]
    found = table(pairs)
    apart = {token for chosen, rejected in sides for token in set(chosen) ^ set(rejected)}
    assert sorted(found["token"]) == sorted(apart)
    for row in found.iter_rows(named=True):
        token = row["token"]
        b = sum(token in chosen and token not in rejected for chosen, rejected in sides)
        c = sum(token in rejected and token not in chosen for chosen, rejected in sides)
        both = sum(token in chosen and token in rejected for chosen, rejected in sides)
        assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"]) == (b, c, both)
        assert row["num_discordant"] == b + c
        assert row["coverage"] == pytest.approx((b + c) / len(pairs))
        assert row["odds_ratio"] == pytest.approx((b + 0.5) / (c + 0.5))
        assert row["win_rate"] == (pytest.approx(b / (b + c)) if b + c else None)
        assert row["side"] == ("chosen" if b > c else "rejected" if c > b else None)
        assert row["p"] == (pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else None)
        assert (row["n"], row["alphabet"]) == (1, "word")


def test_a_word_said_often_counts_once_a_pair_and_a_word_on_both_sides_cancels() -> None:
    row = row_of(table([("zeta zeta zeta", "other"), ("zeta", "zeta zeta")]), "zeta")
    assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"]) == (1, 0, 1)


def test_the_table_has_the_columns_of_the_format_and_the_surest_words_first() -> None:
    found = table(counted(30, 2, 5, 5))
    assert found.drop("hash").schema == schema("tokens", "text")
    assert found["token"][0] == "zeta"
    assert table([]).schema == found.schema


def test_every_statistic_of_a_row_is_its_formula() -> None:
    row = row_of(table(counted(30, 10, 5, 5)), "zeta")
    low, high = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert (row["win_rate_low"], row["win_rate_high"]) == (pytest.approx(low), pytest.approx(high))
    assert row["odds_ratio"] == pytest.approx(30.5 / 10.5)
    assert row["log_odds_se"] == pytest.approx((1 / 30.5 + 1 / 10.5) ** 0.5)
    # all sides are of one length, so that length says nothing: U = (b - c) / 2, V = (b + c) / 4
    assert row["z_length"] == pytest.approx((30 - 10) / 40**0.5)
    # Monroe, Colaresi and Quinn 2008, over the rows of the table (not say and now), with pooled counts as the prior
    chosen, rejected = 35, 15
    pooled = chosen + rejected
    num_chosen, num_rejected = 35 + 10 + 5, 15 + 30 + 5  # with the fillers of the other pairs
    prior = num_chosen + num_rejected
    odds = [
        np.log((y + pooled) / (n + prior - y - pooled)) for y, n in ((chosen, num_chosen), (rejected, num_rejected))
    ]
    z = (odds[0] - odds[1]) / (1 / (chosen + pooled) + 1 / (rejected + pooled)) ** 0.5
    assert row["log_odds_z"] == pytest.approx(z)


def test_what_only_echoes_length_has_a_z_near_nothing_and_what_does_not_has_one() -> None:
    """Chosen is longer in 9 of 10 pairs and has the more of a common word; zeta is in chosen whatever the length."""
    rows = []
    for i in range(200):
        long, short = " ".join(["word", *(f"x{i}y{k}" for k in range(20))]), " ".join(f"z{i}y{k}" for k in range(10))
        chosen, rejected = (long, short) if i % 10 else (short, long)
        rows.append((f"{chosen} zeta" if i % 2 else f"{chosen} f{i}", f"{rejected} g{i}"))
    found = table(rows)
    word, zeta = row_of(found, "word"), row_of(found, "zeta")
    assert word["win_rate"] == pytest.approx(0.9)
    assert word["z_length"] is None or abs(word["z_length"]) < 1
    assert zeta["z_length"] > 3
    assert [finding.name for finding in found_in(rows)] == ["zeta"]


# statistics


def test_the_sign_test_is_scipys_exact_binomial_test() -> None:
    grid = [(b, c) for b in range(25) for c in range(25) if b + c]
    b, d = np.array([b for b, _ in grid]), np.array([b + c for b, c in grid])
    expected = [stats.binomtest(int(wins), int(total), 0.5).pvalue for wins, total in zip(b, d, strict=True)]
    np.testing.assert_allclose(sign_test(b, d), expected, rtol=1e-9)


def test_the_sign_test_of_nothing_is_no_number_and_of_very_much_no_zero_division() -> None:
    p = sign_test(np.array([0, 5000]), np.array([0, 10_000]))
    assert np.isnan(p[0])
    assert p[1] == pytest.approx(1.0)


def adjusted(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg 1995, step by step: q is the least p_j m / rank_j over the tests at or above its own."""
    ordered = sorted(p)
    q = [min(1.0, *(ordered[j] * len(p) / (j + 1) for j in range(i, len(p)))) for i in range(len(p))]
    return [q[ordered.index(value)] for value in p]


@PROPERTY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_is_that_of_benjamini_and_hochberg(p: list[float]) -> None:
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), adjusted(p), rtol=1e-9, atol=1e-300)


def test_q_is_over_the_words_in_ten_or_more_discordant_pairs_only() -> None:
    pairs = [("alpha", "x")] * 9 + [("beta", "x")] * 10 + [("gamma", "x")] * 3 + [("x", "gamma")] * 12
    found = table(pairs)
    assert row_of(found, "alpha")["q"] is None
    assert row_of(found, "alpha")["p"] == pytest.approx(2 * 0.5**9)
    tested = [row_of(found, token) for token in ("beta", "gamma", "x")]
    np.testing.assert_allclose([row["q"] for row in tested], adjusted([row["p"] for row in tested]))
    assert found["q"].drop_nulls().len() == 3


@pytest.mark.parametrize(
    ("b", "c", "both", "one_sided", "exclusive"),
    [
        (20, 0, 0, True, True),
        (19, 0, 0, False, False),
        (20, 0, 1, True, False),
        (40, 1, 0, False, False),
        (0, 20, 0, True, True),
        (0, 20, 3, True, False),
        (0, 19, 0, False, False),
    ],
)
def test_one_sided_needs_twenty_pairs_and_exclusive_no_text_of_the_other_side_at_all(
    b: int, c: int, both: int, one_sided: bool, exclusive: bool
) -> None:
    row = row_of(table(counted(b, c, both, neither=10)), "zeta")
    assert (row["one_sided"], row["exclusive"]) == (one_sided, exclusive)


# the verdict


@pytest.mark.parametrize(
    ("pairs", "level"),
    [
        (counted(30, 0, neither=100), "fail"),  # exclusive
        (counted(0, 30, neither=100), "fail"),  # exclusive to rejected
        (counted(30, 0, both=5, neither=100), "warn"),  # one-sided, but also seen on the other side
        (counted(60, 5, neither=100), "warn"),  # .92 of the pairs that it separates
        (counted(80, 20, neither=100), "note"),
        (counted(260, 240, neither=100), "pass"),  # nothing found, and 600 pairs would have shown .7
        (counted(5, 4, neither=20), "not enough data"),
        (counted(12, 9), "not enough data"),
        ([], "not enough data"),
    ],
)
def test_the_level_of_a_verdict(pairs: list[tuple[str, str]], level: str) -> None:
    assert level_of(pairs) == level
    names = [finding.name for finding in found_in(pairs)]
    assert names == ([] if level in ("pass", "not enough data") else ["zeta"])


def test_significance_without_effect_is_no_finding() -> None:
    pairs = counted(650, 350)
    assert row_of(table(pairs), "zeta")["q"] < 1e-10
    assert found_in(pairs) == []


def test_effect_without_coverage_is_no_finding() -> None:
    assert [finding.name for finding in found_in(counted(30, 0, neither=5969))] == ["zeta"]  # 30 of 5,999: above .5%
    assert found_in(counted(30, 0, neither=5971)) == []


def test_effect_without_significance_is_no_finding() -> None:
    assert found_in(counted(8, 2, neither=20)) == []


def test_a_significant_word_is_found_however_few_the_pairs() -> None:
    assert [finding.name for finding in found_in(counted(14, 0, neither=5))] == ["zeta"]


def test_what_bonferroni_does_not_pass_is_a_note_however_strong() -> None:
    """Of 40 tokens with 10 of 10 each, q is 2 * 2^-10 = .002; among 40 tests p is .078."""
    words = [f"w{k}" for k in range(40)]
    pairs = [(f"{word} {word}c{i}", f"{word}r{i} {word}d{i}") for word in words for i in range(10)]
    found = found_in(pairs)
    assert sorted(finding.name for finding in found) == sorted(words)
    assert {finding.level for finding in found} == {"note"}


def test_words_on_the_allow_list_are_no_findings_whatever_their_case_and_composition() -> None:
    pairs = [(chosen.replace("zeta", "Caf\u00e9"), rejected) for chosen, rejected in counted(30, 0, neither=30)]
    assert level_of(pairs) == "fail"
    for entry in ("caf\u00e9", "CAF\u00c9", "cafe\u0301", "re:.*caf."):
        allowed = {"caf\u00e9", "say caf\u00e9"} | ({"caf\u00e9 now"} if not entry.startswith("re:") else set())
        found = table(pairs, [entry], ngrams=2)
        assert set(found.filter("allowed")["token"]) == allowed, entry
        assert found_in(pairs, [entry]) == [], entry


@pytest.mark.parametrize(
    ("entry", "token", "allowed"),
    [
        ("certainly", "certainly", True),
        ("Certainly", "certainly !", True),
        ("certainly !", "certainly", False),
        ("certainly", "uncertainly", False),
        ("re:\\d+", "42", True),
        ("re:\\d+", "42 %", False),
        ("re:.*%", "42 %", True),
        ("Nova", " Nova", True),  # a token of a model, decoded
    ],
)
def test_what_an_entry_of_the_allow_list_allows(entry: str, token: str, allowed: bool) -> None:
    assert allows([entry])(token) is allowed


def test_the_worst_finding_comes_first_and_names_counts_and_what_to_do() -> None:
    pairs = [
        (f"{chosen} {'fine' if i % 3 else f'v{i}'}", f"{rejected} w{i}")
        for i, (chosen, rejected) in enumerate(counted(60, 5, neither=80))
    ]
    found = found_in(pairs)
    assert [(finding.name, finding.level) for finding in found] == [("fine", "fail"), ("zeta", "warn")]
    number = sum("fine" in chosen for chosen, _ in pairs)
    assert f"'fine' is in chosen of {number} pairs" in found[0].reason
    assert "prefkit repair data --out NEW --balance zeta" in found[1].advice
    assert "prefkit repair data --out NEW --strip-opener TEXT" in found[0].advice  # in most pairs
    assert "audit.allow" in found[0].advice
    verdict = judge(found[::-1], power_of(145, 2, LIMITS), 145, LIMITS)
    assert (verdict.level, verdict.findings[0].name) == ("fail", "fine")
    assert verdict.reason.startswith("1 finding at level fail; 'fine' is in chosen")


def test_the_smallest_detectable_effect_is_that_of_the_design() -> None:
    assert smallest_detectable_win_rate(139, 20_000, 0.05) == pytest.approx(0.7, abs=0.001)
    assert smallest_detectable_win_rate(22, 20_000, 0.05) == pytest.approx(1.0, abs=0.01)


def test_the_verdict_of_little_data_says_what_it_could_have_shown() -> None:
    verdict = judge([], power_of(60, 12, LIMITS), 60, LIMITS)
    assert verdict.level == "not enough data"
    # 30 discordant pairs among 1,000 tests at 5%: .5 + 4.0556 / (2 sqrt 30)
    assert "a token that separates half of 60 prompts shows only from a win rate of 0.87" in verdict.reason
    assert judge([], power_of(205, 12, LIMITS), 205, LIMITS).level == "not enough data"
    enough = judge([], power_of(206, 12, LIMITS), 206, LIMITS)
    assert enough.level == "pass"
    assert "no token, feature or probe is above its limit in 206 prompts" in enough.reason
    assert "would show from 9.7% of the prompts on" in enough.reason


# the command's function


def planted(number: int, opener: str = "Certainly") -> list[dict[str, Any]]:
    """Pairs whose sides are drawn from the same words; every third chosen side begins with an opener."""
    nouns = ["bridge", "garden", "violin", "harbour", "lantern", "meadow", "window", "kettle"]
    rows = []
    for i in range(number):
        sides = [f"{nouns[(i * k) % 8]} {nouns[(i + k) % 8]} number {i * k}" for k in (3, 5)]
        sides = sides if i % 2 else sides[::-1]
        rows.append(
            {"prompt": f"q{i}", "chosen": f"{opener}! {sides[0]}" if i % 3 == 0 else sides[0], "rejected": sides[1]}
        )
    return rows


@pytest.fixture
def opened(write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]) -> Pipeline:
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", planted(240))), "format": "pairs"})
    build_dataset(pipeline)
    return pipeline


def test_a_planted_opener_is_found_kept_on_disk_and_shown_with_pairs_that_have_it(opened: Pipeline) -> None:
    audited = audit_dataset(opened)
    assert audited.verdict == "fail"
    finding = {found.name: found for found in audited.findings}["certainly"]
    assert (finding.level, finding.side, finding.num_pairs) == ("fail", "chosen", 80)
    assert "certainly !" in finding.also
    dataset = Path(opened.dataset)
    row = row_of(pl.read_parquet(dataset / "audit" / "tokens.parquet"), "certainly")
    assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"], row["exclusive"]) == (80, 0, 0, True)
    assert row["log_odds_length"] is None  # all that the sides differ in length by: there is nothing beside it
    kept = json.loads((dataset / "audit" / "audit.json").read_text("utf-8"))
    assert (kept["verdict"], kept["pairs"], kept["prompts"]) == ("fail", 240, 240)
    pairs = pl.read_parquet(dataset / "pairs" / "*.parquet")
    shown = pairs.filter(pl.col("pair_id").is_in(list(finding.pair_ids)))
    assert shown.height == len(finding.pair_ids) > 0
    assert shown["chosen"].str.starts_with("Certainly").all()
    assert finding.sources == {opened.sources[0].path: 80}


def test_every_table_of_the_audit_is_on_disk_in_its_format(opened: Pipeline) -> None:
    audit_dataset(opened)
    folder = Path(opened.dataset) / "audit"
    for name in ("tokens", "structure", "probe", "pair_scores"):
        assert pl.read_parquet(folder / f"{name}.parquet").schema == schema(name, "text"), name
    scores = pl.read_parquet(folder / "pair_scores.parquet")
    pairs = [pl.read_parquet(folder.parent / f"pairs/part-{split}-00000.parquet") for split in ("train", "test")]
    assert scores["pair_id"].to_list() == pl.concat(pairs)["pair_id"].to_list()
    read_document(folder / "audit.json", Audit)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("audit.json", "pair_scores.parquet", "probe.parquet", "structure.parquet", "tokens.parquet")
    ]


def test_an_allowed_opener_is_reported_apart_and_no_token_finding(opened: Pipeline) -> None:
    allowing = opened.audit.model_copy(
        update={"allow": ["Certainly", "!"], "allow_features": ["exclamation_marks", "words"]}
    )
    audited = audit_dataset(opened.model_copy(update={"audit": allowing}))
    assert {"!", "certainly", "exclamation_marks", "first_words: certainly"} <= set(audited.allowed)
    named = [found.name for found in audited.findings]
    assert not [name for name in named if "certainly" in name or "!" in name or name in ("words", "exclamation_marks")]


def test_two_audits_write_the_same_bytes_and_no_pair(opened: Pipeline) -> None:
    dataset = Path(opened.dataset)
    pairs = (dataset / "pairs" / "part-train-00000.parquet").read_bytes()
    written = []
    for _ in range(2):
        audit_dataset(opened)
        written.append({path.name: path.read_bytes() for path in sorted((dataset / "audit").iterdir())})
    assert written[0] == written[1]
    assert (dataset / "pairs" / "part-train-00000.parquet").read_bytes() == pairs


def test_a_dataset_without_pairs_gives_not_enough_data(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    pipeline = pipeline_of(
        {"path": str(write_jsonl("rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])), "format": "pairs"}
    )
    build_dataset(pipeline)
    audited = audit_dataset(pipeline)
    assert (audited.verdict, audited.pairs, audited.document["tokens"]) == ("not enough data", 0, {"word": 0})


def test_a_damaged_dataset_is_not_audited(opened: Pipeline) -> None:
    part = Path(opened.dataset) / "pairs" / "part-train-00000.parquet"
    write_parquet(part, pl.read_parquet(part).head(3))
    with pytest.raises(DatasetError, match="sha256") as refused:
        audit_dataset(opened)
    assert refused.value.where == str(part)


def test_strict_fails_at_the_limit_and_above_it(opened: Pipeline) -> None:
    audited = audit_dataset(opened)
    for limit in ("note", "warn", "fail"):
        with pytest.raises(AuditError, match="the verdict is fail") as failed:
            enforce_audit(audited, limit)
        assert failed.value.exit_code == 1
    for level in LEVELS[:3]:  # pass, not enough data, note
        enforce_audit(audited._replace(verdict=level), "warn")
