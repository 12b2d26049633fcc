"""A repair on the terminal: what it did, and the audits before and after it side by side."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.audit.verdict import repair_command
from prefkit.format import AUDIT_PROBE, AUDIT_STRUCTURE
from prefkit.grams import words_in
from prefkit.judgement import Audited
from prefkit.mending import Step
from prefkit.repairs import Repaired
from prefkit.report import COLOURS, TOO_FEW
from prefkit.text import printable

PROBES = ("length", "structure", "words", "both", "generator")
SHOWN_FINDINGS = 5
ADVISED_SHORTCUTS = ("--drop-shortcuts", ".6")  # as verdict.py advises
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
        console.print(f"  {step['repair']}{setting}: {step['dropped']} dropped, {_edited(step)}")
    table = Table("", "before", "after")
    for name, *cells in audit_rows(before, after):
        table.add_row(name, *(Text(cell, style=COLOURS.get(cell, "")) for cell in cells))
    console.print(table)
    _print_left(repaired, console)
    console.print(f"every dropped and edited pair, and why: {repaired.out}/changes")
    if repaired.references:
        keys = ", ".join(repaired.references)
        console.print(f"its references ({keys}) are copies; prefkit precompute scores the edited pairs only")
    console.print(f"what is left, side by side: prefkit show {printable(shlex.quote(repaired.out))}")


def _edited(step: Step) -> str:
    """`49 edited`, and how many of them are no longer there."""
    later = f", {step['dropped_later']} of them dropped later" if step["dropped_later"] else ""
    return f"{step['edited']} edited{later}"


def _print_left(repaired: Repaired, console: Console) -> None:
    """The worst findings that are left, and the first advice that is not to repair again what was repaired just now."""
    after, made = repaired.after, _made(repaired.out, repaired.steps)
    for finding in after.findings[:SHOWN_FINDINGS]:
        console.print(Text.assemble("  ", (finding.level, COLOURS[finding.level]), f"  {printable(finding.reason)}"))
    if len(after.findings) > SHOWN_FINDINGS:
        console.print(f"  and {len(after.findings) - SHOWN_FINDINGS} more")
    new = [finding.advice for finding in after.findings if not f"{finding.advice} ".startswith(made)]
    if new:
        console.print(f"  what to do: {printable(new[0])}")


def _made(out: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """How an advice begins that says to make one of these repairs once more."""
    options: list[tuple[str, ...]] = []
    for step in steps:
        if step["repair"] == "balance":
            options.append(("--balance", " ".join(words_in(step["setting"]))))
        elif step["repair"] == "match_length":
            options.append(("--match-length",))
        elif step["repair"] == "drop_shortcuts" and step["setting"] <= float(ADVISED_SHORTCUTS[1]):
            options.append(ADVISED_SHORTCUTS)
    commands = [repair_command(str(Path(out)), *option) for option in options]
    return tuple(command + end for command in commands for end in (" ", ","))


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
    return f"{row['accuracy']:.1%} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}) {row['band'] or TOO_FEW}"


def _longer(audited: Audited) -> str:
    """Of the pairs whose sides differ in words, the share in which chosen has more."""
    rows = audited.tables[AUDIT_STRUCTURE].filter(pl.col("feature") == "words")
    return NOTHING if not rows.height or rows["win_rate"][0] is None else f"{rows['win_rate'][0]:.1%}"
