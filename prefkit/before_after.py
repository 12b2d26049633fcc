"""A repair on the terminal: what it did, and the audits before and after it side by side."""

from collections import Counter

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.format import AUDIT_PROBE, AUDIT_STRUCTURE
from prefkit.judgement import Audited
from prefkit.repairs import Repaired
from prefkit.text import printable

COLOURS = {"pass": "green", "note": "cyan", "not enough data": "yellow", "warn": "yellow", "fail": "red"}
PROBES = ("length", "structure", "words", "both", "generator")
SHOWN_FINDINGS = 5
NOTHING = "-"


def print_repaired(repaired: Repaired, console: Console) -> None:
    """What each repair did, both audits in two columns, what is still found, and what to type next.

    Data text is never markup.
    """
    before, after = repaired.before, repaired.after
    there = " (is up to date)" if repaired.unchanged else ""
    console.print(f"{repaired.out}{there}: {after.pairs} of the {before.pairs} pairs of {repaired.dataset}")
    for step in repaired.steps:
        setting = "" if step["setting"] is None else f" {printable(str(step['setting']))}"
        console.print(f"  {step['repair']}{setting}: {step['dropped']} dropped, {step['edited']} edited")
    table = Table("", "before", "after")
    for name, *cells in audit_rows(before, after):
        table.add_row(name, *(Text(cell, style=COLOURS.get(cell, "")) for cell in cells))
    console.print(table)
    _print_left(after, console)
    console.print(f"every dropped and edited pair, and why: {repaired.out}/changes")
    if repaired.references:
        keys = ", ".join(repaired.references)
        console.print(f"its references ({keys}) are copies; prefkit precompute scores the edited pairs only")


def _print_left(after: Audited, console: Console) -> None:
    """The worst findings that are left, and what to do about the first."""
    for finding in after.findings[:SHOWN_FINDINGS]:
        console.print(Text.assemble("  ", (finding.level, COLOURS[finding.level]), f"  {printable(finding.reason)}"))
    if len(after.findings) > SHOWN_FINDINGS:
        console.print(f"  and {len(after.findings) - SHOWN_FINDINGS} more")
    if after.findings:
        console.print(f"  what to do: {printable(after.findings[0].advice)}")


def audit_rows(before: Audited, after: Audited) -> list[tuple[str, str, str]]:
    """The lines of the table: what, before, after. A probe that was not measured has none of its own."""
    rows = [
        ("verdict", before.verdict, after.verdict),
        ("pairs", str(before.pairs), str(after.pairs)),
        ("findings", _levels(before), _levels(after)),
    ]
    rows += [(f"probe {name}", _accuracy(before, name), _accuracy(after, name)) for name in PROBES]
    rows.append(("chosen is longer", _longer(before), _longer(after)))
    return [row for row in rows if row[1:] != (NOTHING, NOTHING)]


def _levels(audited: Audited) -> str:
    """`2 fail, 1 note`, or how many there are not."""
    counts = Counter(finding.level for finding in audited.findings)
    return ", ".join(f"{counts[level]} {level}" for level in ("fail", "warn", "note") if counts[level]) or "none"


def _accuracy(audited: Audited, probe: str) -> str:
    rows = audited.tables[AUDIT_PROBE].filter(pl.col("probe") == probe, pl.col("source").is_null())
    if not rows.height or rows["accuracy"][0] is None:
        return NOTHING
    row = rows.row(0, named=True)
    return f"{row['accuracy']:.1%} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}) {row['band']}"


def _longer(audited: Audited) -> str:
    """Of the pairs whose sides differ in words, the share in which chosen has more."""
    rows = audited.tables[AUDIT_STRUCTURE].filter(pl.col("feature") == "words")
    return NOTHING if not rows.height or rows["win_rate"][0] is None else f"{rows['win_rate'][0]:.1%}"
