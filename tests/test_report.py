"""How an audit reads on the terminal: the verdict first, text of the data as data, nothing that is not there."""

import io
from typing import Any

import polars as pl
from rich.console import Console

from prefkit.audit.verdict import Finding, Level, Power
from prefkit.format import AUDIT_TOKENS, schema
from prefkit.judgement import Audited
from prefkit.report import print_audit

NOTHING: dict[str, Any] = {
    "lengths": {side: dict.fromkeys(("min", "p10", "median", "p90", "max")) for side in ("chosen", "rejected")},
    "probes": [],
    "cover": [],
    "allow_unused": [],
}


def token(name: str, level: Level = "warn", **changes: Any) -> Finding:
    return Finding(level, "tokens", name, "chosen", f"'{name}' is there", f"take {name} out", **changes)


def printed(findings: list[Finding], allowed: list[str] | None = None, **document: Any) -> str:
    tables = {AUDIT_TOKENS: pl.DataFrame(schema=schema("tokens", "text"))}
    level = findings[0].level if findings else "pass"
    power = Power(0.6, 0.01, 100, True)
    audited = Audited(level, "the reason", findings, allowed or [], 10, power, tables, NOTHING | document)
    out = io.StringIO()
    print_audit(audited, Console(file=out, markup=False, highlight=False, soft_wrap=True, width=200))
    return out.getvalue()


def test_the_verdict_comes_first_then_findings_then_what_to_do() -> None:
    lines = printed([token("a", "fail"), token("b")]).splitlines()
    assert lines == [
        "verdict: fail  the reason",
        "  fail  'a' is there",
        "  warn  'b' is there",
        "  what to do: take a out",
    ]


def test_five_findings_a_family_are_shown_and_the_others_counted() -> None:
    tokens = [token(f"t{i}") for i in range(7)]
    structure = [Finding("note", "structure", "words", "chosen", "longer", "match lengths")]
    lines = printed([*tokens, *structure]).splitlines()
    assert sum("is there" in line for line in lines) == 5
    assert "  note  longer" in lines
    assert "  and 2 more: all in audit/audit.json" in lines
    assert [line for line in lines if "what to do" in line] == [
        "  what to do: take t0 out",
        "  what to do: match lengths",
    ]


def test_tokens_that_go_with_one_are_named_and_those_beyond_five_counted() -> None:
    text = printed([token("a", also=tuple("bcdefgh"))])
    assert "        with it: 'b', 'c', 'd', 'e', 'f' and 2 more" in text


def test_text_of_the_data_is_neither_markup_nor_an_escape_sequence() -> None:
    text = printed([token("[red]x[/red]\x1b[31m")], allowed=["[b]\x07"])
    assert "[red]x[/red]\ufffd[31m" in text
    assert "  allowed by the pipeline: [b]\ufffd" in text
    assert "\x1b" not in text


def test_probes_are_bars_from_chance_to_certainty() -> None:
    row = {"accuracy_low": 0.7, "accuracy_high": 0.8, "band": "warn"}
    probes = [{"probe": "length", "accuracy": 0.75, **row}, {"probe": "words", "accuracy": 0.4, **row}]
    probes += [{"probe": "generator", "accuracy": None, **row}]
    lines = printed([], probes=probes).splitlines()
    assert "  length     ###############............... 0.750 (0.700 to 0.800)  warn" in lines
    assert "  words      .............................. 0.400 (0.700 to 0.800)  warn" in lines
    assert not [line for line in lines if "generator" in line]


def test_the_cover_says_how_many_words_decide_how_much() -> None:
    step = {"token": "a", "side": "chosen", "covered": 0.2, "precision": 0.9}
    assert "1 word decides 20% of the pairs at 90% precision: 'a'" in printed([], cover=[step])
    assert "2 words decide 20% of the pairs at 60% precision: 'a', 'a'" in printed(
        [], cover=[step, step | {"precision": 0.6}]
    )
    for nothing in (0.59, None):
        assert "decide" not in printed([], cover=[step | {"precision": nothing}])


def test_an_entry_of_the_allow_list_that_is_in_no_token_is_said() -> None:
    assert "  audit.allow names what is in no token: zebra, [b]" in printed([], allow_unused=["zebra", "[b]"])


def test_a_probe_of_too_few_pairs_says_so() -> None:
    row = {"probe": "length", "accuracy": 1.0, "accuracy_low": 0.5, "accuracy_high": 1.0, "band": None}
    assert "1.000 (0.500 to 1.000)  too few pairs" in printed([], probes=[row])


def test_findings_are_told_worst_first_whatever_their_family() -> None:
    structure = Finding("fail", "structure", "emoji", "chosen", "emoji are there", "look")
    lines = printed([token("a", "warn"), structure]).splitlines()
    assert lines[1:3] == ["  fail  emoji are there", "  warn  'a' is there"]


def test_a_token_with_a_line_break_stays_on_its_line() -> None:
    assert "with it: '\\n5'" in printed([token("a", also=("\n5",))])


def test_lengths_are_said_where_there_are_any() -> None:
    side = {"min": 1.0, "p10": 2.0, "median": 30.0, "p90": 40.5, "max": 99.0}
    text = printed([], lengths={"chosen": side, "rejected": side})
    assert "words a side, median (10% to 90%): chosen 30 (2 to 40.5), rejected 30 (2 to 40.5)" in text
    assert "words a side" not in printed([])
