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

from prefkit.audit.tokens import benjamini_hochberg, sign_test, token_table, words
from prefkit.audit.verdict import Verdict, judge, smallest_detectable_win_rate
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.errors import AuditError, DatasetError
from prefkit.format import MESSAGES, schema
from prefkit.report import audit_dataset, enforce
from prefkit.store import write_parquet

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
Q, COVERAGE, WIN_RATE = 0.05, 0.01, 0.7


def table(pairs: Sequence[tuple[str, str]], allow: Sequence[str] = ()) -> pl.DataFrame:
    frame = pl.DataFrame(pairs, schema={"chosen": pl.String, "rejected": pl.String}, orient="row")
    return token_table(frame, "text", allow)


def row_of(found: pl.DataFrame, token: str) -> dict[str, Any]:
    return found.row(by_predicate=pl.col("token") == token, named=True)


def counted(b: int, c: int, both: int = 0, neither: int = 0) -> list[tuple[str, str]]:
    """Pairs in which the word `zeta` is in chosen only b times, in rejected only c times, and so on."""
    has, lacks = "say zeta now", "say now"
    return [(has, lacks)] * b + [(lacks, has)] * c + [(has, has)] * both + [(lacks, lacks)] * neither


def judged(pairs: Sequence[tuple[str, str]], allow: Sequence[str] = ()) -> Verdict:
    return judge(table(pairs, allow), len(pairs), Q, COVERAGE, WIN_RATE)


# counting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, don't!", {"don", "'", "t", "stop", ",", "!"}),
        ("Stra\u00dfe STRASSE", {"strasse"}),
        ("cafe\u0301 CAF\u00c9", {"caf\u00e9"}),
        ("a_b 3.5 **bold**", {"a_b", "3", ".", "5", "*", "bold"}),
        (" \n\t", set()),
    ],
)
def test_a_word_is_letters_and_digits_or_one_sign_in_casefolded_composed_text(text: str, expected: set[str]) -> None:
    assert words(text) == expected


TEXTS = st.text("abAB\u00e9e\u0301 .!\n", max_size=12)


@PROPERTY
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=25))
def test_counts_are_those_of_a_naive_recount(pairs: list[tuple[str, str]]) -> None:
    def tokens(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text).casefold())

    sides = [(tokens(chosen), tokens(rejected)) for chosen, rejected in pairs]
    found = table(pairs)
    assert sorted(found["token"]) == sorted({token for chosen, rejected in sides for token in chosen + rejected})
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


def test_roles_of_messages_are_no_words() -> None:
    sides = [[{"role": "assistant", "content": text}] for text in ("zeta", "eta")]
    frame = pl.DataFrame(
        {name: pl.Series([side], dtype=MESSAGES) for name, side in zip(("chosen", "rejected"), sides, strict=True)}
    )
    assert sorted(token_table(frame, "chat")["token"]) == ["eta", "zeta"]


def test_the_table_has_the_columns_of_the_format_and_the_surest_words_first() -> None:
    found = table(counted(30, 2, 5, 5))
    assert found.schema == schema("tokens", "text")
    assert found["token"][0] == "zeta"
    assert table([]).schema == found.schema


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
        (0, 0, 50, False, False),
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
        (counted(260, 240, neither=100), "pass"),  # nothing found, and 500 pairs would have shown .7
        (counted(5, 4, neither=20), "not enough data"),
        (counted(12, 9), "not enough data"),
        ([], "not enough data"),
    ],
)
def test_the_level_of_a_verdict(pairs: list[tuple[str, str]], level: str) -> None:
    verdict = judged(pairs)
    assert verdict.level == level
    assert [finding["token"] for finding in verdict.findings] == (
        [] if level in ("pass", "not enough data") else ["zeta"]
    )
    assert verdict.reason


def test_significance_without_effect_is_no_finding() -> None:
    pairs = counted(650, 350)
    assert row_of(table(pairs), "zeta")["q"] < 1e-10
    assert judged(pairs).findings == []


def test_effect_without_coverage_is_no_finding() -> None:
    assert judged(counted(30, 0, neither=2969)).findings[0]["token"] == "zeta"  # 30 of 2,999: just above 1%
    assert judged(counted(30, 0, neither=2971)).findings == []


def test_effect_without_significance_is_no_finding() -> None:
    assert judged(counted(8, 2, neither=20)).findings == []


def test_a_significant_word_is_found_however_few_the_pairs() -> None:
    assert judged(counted(14, 0, neither=5)).findings[0]["token"] == "zeta"


def test_words_on_the_allow_list_are_no_findings_whatever_their_case_and_composition() -> None:
    pairs = [(chosen.replace("zeta", "Caf\u00e9"), rejected) for chosen, rejected in counted(30, 0, neither=30)]
    assert judged(pairs).level == "fail"
    for word in ("caf\u00e9", "CAF\u00c9", "cafe\u0301"):
        assert judged(pairs, [word]).findings == [], word
        assert row_of(table(pairs, [word]), "caf\u00e9")["allowed"]


def test_the_worst_finding_comes_first_and_names_counts_and_what_to_do() -> None:
    pairs = [
        (f"{chosen} fine" if i % 3 else chosen, rejected)
        for i, (chosen, rejected) in enumerate(counted(60, 5, neither=60))
    ]
    verdict = judged(pairs)
    assert [(finding["token"], finding["level"]) for finding in verdict.findings] == [
        ("fine", "fail"),
        ("zeta", "warn"),
    ]
    number = sum("fine" in chosen for chosen, _ in pairs)
    assert f"'fine' is in chosen of {number} pairs" in verdict.findings[0]["reason"]
    assert "audit.allow" in verdict.findings[0]["advice"]
    assert verdict.level == "fail"


def test_the_smallest_detectable_effect_is_that_of_the_design() -> None:
    assert smallest_detectable_win_rate(139, 20_000, 0.05) == pytest.approx(0.7, abs=0.001)
    assert smallest_detectable_win_rate(22, 20_000, 0.05) == pytest.approx(1.0, abs=0.01)


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
    finding = {found["token"]: found for found in audited.findings}["certainly"]
    assert (finding["level"], finding["side"]) == ("fail", "chosen")
    dataset = Path(opened.dataset)
    row = row_of(pl.read_parquet(dataset / "audit" / "tokens.parquet"), "certainly")
    assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"], row["exclusive"]) == (80, 0, 0, True)
    kept = json.loads((dataset / "audit" / "audit.json").read_text("utf-8"))
    assert (kept["verdict"], kept["pairs"]) == ("fail", 240)
    pairs = pl.read_parquet(dataset / "pairs" / "*.parquet")
    shown = pairs.filter(pl.col("pair_id").is_in(finding["pair_ids"]))
    assert shown.height == len(finding["pair_ids"]) > 0
    assert shown["chosen"].str.starts_with("Certainly").all()


def test_an_allowed_opener_is_reported_apart_and_fails_nothing(opened: Pipeline) -> None:
    allowing = opened.audit.model_copy(update={"allow": ["Certainly", "!"]})
    audited = audit_dataset(opened.model_copy(update={"audit": allowing}))
    assert sorted(audited.allowed) == ["!", "certainly"]
    assert not {"certainly", "!"} & {found["token"] for found in audited.findings}


def test_two_audits_write_the_same_bytes_and_no_pair(opened: Pipeline) -> None:
    dataset = Path(opened.dataset)
    pairs = (dataset / "pairs" / "part-00000.parquet").read_bytes()
    written = []
    for _ in range(2):
        audit_dataset(opened)
        written.append([(dataset / "audit" / name).read_bytes() for name in ("tokens.parquet", "audit.json")])
    assert written[0] == written[1]
    assert (dataset / "pairs" / "part-00000.parquet").read_bytes() == pairs


def test_a_dataset_without_pairs_gives_not_enough_data(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    pipeline = pipeline_of(
        {"path": str(write_jsonl("rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])), "format": "pairs"}
    )
    build_dataset(pipeline)
    audited = audit_dataset(pipeline)
    assert (audited.verdict, audited.pairs, audited.tokens) == ("not enough data", 0, 0)


def test_a_damaged_dataset_is_not_audited(opened: Pipeline) -> None:
    part = Path(opened.dataset) / "pairs" / "part-00000.parquet"
    write_parquet(part, pl.read_parquet(part).head(3))
    with pytest.raises(DatasetError, match="sha256") as refused:
        audit_dataset(opened)
    assert refused.value.where == str(part)


def test_strict_fails_at_the_limit_and_above_it(opened: Pipeline) -> None:
    audited = audit_dataset(opened)
    for limit in ("note", "warn", "fail"):
        with pytest.raises(AuditError, match="the verdict is fail") as failed:
            enforce(audited, limit)
        assert failed.value.exit_code == 1
    for level in ("pass", "not enough data", "note"):
        enforce(audited._replace(verdict=level), "warn")
