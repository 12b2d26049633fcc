"""An audit on the terminal: the verdict first, then each finding with what to do, then the probes and the cover.

Comes in: an `Audited`. Text of the data is never markup, and never an escape sequence.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.audit.verdict import FAMILIES, LEVELS, Finding, one_line
from prefkit.judgement import Audited
from prefkit.text import printable

COLOURS = {
    "pass": "green",
    "fine": "green",
    "note": "cyan",
    "not enough data": "yellow",
    "warn": "yellow",
    "fail": "red",
}
SHOWN_FINDINGS, SHOWN_ALSO, SHOWN_TOKENS = 5, 5, 8  # findings of a family, tokens that go with one, tokens at all
WORTH_SAYING = 0.6  # precision of the cover; below it decides little
TOO_FEW = "too few pairs"  # the band of a probe that could say nothing
BAR = 30  # characters from chance to certainty


def print_audit(audited: Audited, console: Console) -> None:
    """The whole of it, short."""
    reason = Text(f"  {printable(audited.reason)}")
    console.print(Text.assemble("verdict: ", (audited.verdict, f"bold {COLOURS[audited.verdict]}")) + reason)
    shown = [f for family in FAMILIES for f in [f for f in audited.findings if f.family == family][:SHOWN_FINDINGS]]
    for finding in sorted(shown, key=lambda found: -LEVELS.index(found.level)):
        _print_finding(finding, console)
    if len(audited.findings) > len(shown):
        console.print(f"  and {len(audited.findings) - len(shown)} more: all in audit/audit.json")
    for family in FAMILIES:
        for finding in [f for f in shown if f.family == family][:1]:
            console.print(f"  what to do: {printable(finding.advice)}", markup=False)
    if audited.allowed:
        console.print("  allowed by the pipeline: " + printable(", ".join(audited.allowed)), markup=False)
    if unused := audited.document["allow_unused"]:
        console.print("  audit.allow names what is in no token: " + printable(", ".join(unused)), markup=False)
    _print_lengths(audited, console)
    _print_probes(audited, console)
    _print_cover(audited, console)
    if not audited.findings:
        _print_surest(audited, console)


def _print_finding(finding: Finding, console: Console) -> None:
    console.print(Text.assemble("  ", (finding.level, COLOURS[finding.level]), f"  {printable(finding.reason)}"))
    if finding.also:
        named = ", ".join(f"'{one_line(token)}'" for token in finding.also[:SHOWN_ALSO])
        more = f" and {len(finding.also) - SHOWN_ALSO} more" if len(finding.also) > SHOWN_ALSO else ""
        console.print(f"        with it: {named}{more}", markup=False)


def _print_lengths(audited: Audited, console: Console) -> None:
    lengths = audited.document["lengths"]
    if lengths["chosen"]["median"] is not None:
        sides = ", ".join(f"{name} {of['median']:g} ({of['p10']:g} to {of['p90']:g})" for name, of in lengths.items())
        console.print(f"words a side, median (10% to 90%): {sides}")


def _print_probes(audited: Audited, console: Console) -> None:
    """Bars from chance (.5) to certainty, held out by prompt."""
    rows: Sequence[dict[str, object]] = [row for row in audited.document["probes"] if row["accuracy"] is not None]
    if rows:
        console.print("chosen, told by these alone (held-out pairs; .500 is chance):")
    for row in rows:
        accuracy, low, high = (float(str(row[name])) for name in ("accuracy", "accuracy_low", "accuracy_high"))
        filled = round(max(0.0, accuracy - 0.5) * 2 * BAR)
        bar = ("#" * filled).ljust(BAR, ".")
        line = f"  {row['probe']:<10} {bar} {accuracy:.3f} ({low:.3f} to {high:.3f})  "
        band = str(row["band"] or TOO_FEW)
        console.print(Text.assemble(line, (band, COLOURS.get(band, ""))))


def _print_cover(audited: Audited, console: Console) -> None:
    cover = audited.document["cover"]
    if cover and (cover[-1]["precision"] or 0) >= WORTH_SAYING:
        last, tokens = cover[-1], ", ".join(f"'{one_line(step['token'])}'" for step in cover)
        precision = f" at {last['precision']:.0%} precision" if last["precision"] is not None else ""
        words = f"{len(cover)} words decide" if len(cover) > 1 else "1 word decides"
        console.print(f"{words} {last['covered']:.0%} of the pairs{precision}: {tokens}", markup=False)


def _print_surest(audited: Audited, console: Console) -> None:
    """Without a finding: the tokens that come nearest to one."""
    names = ("token", "chosen only", "rejected only", "both", "win rate", "q", "z beside length")
    tokens = audited.tables["audit/tokens.parquet"]
    if tokens.is_empty():
        return
    table = Table(*names, title=f"surest of {tokens.height} tokens", title_justify="left")
    for row in tokens.head(SHOWN_TOKENS).iter_rows(named=True):
        counts = (str(row[name]) for name in ("num_chosen_only", "num_rejected_only", "num_both"))
        q = f"{row['q']:.1e}" if row["q"] is not None else ""
        z = f"{row['z_length']:+.1f}" if row["z_length"] is not None else ""
        table.add_row(Text(one_line(row["token"])), *counts, f"{row['win_rate']:.2f}", q, z)
    console.print(table)
