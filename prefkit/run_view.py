"""How a run looks on a terminal: what it is, what training warned of, and its curves, a line each.

Comes in: `Curves`. Names and settings are data: no escape sequence of theirs reaches the screen (cli.console).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console

from prefkit.curves import CURVES, PERF_CURVES, Curves, ends, points, stretch_means
from prefkit.evaluation_tables import evaluation_lines
from prefkit.run_facts import facts_of, figures_of, warnings_of
from prefkit.sparklines import levels_for, sparkline

LABEL, NARROWEST, WIDEST = 15, 10, 120  # characters of a curve's name, and of the curve
GIB = 1 << 30
LABELS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward chosen",
    "rewards/rejected": "reward rejected",
    "logps/chosen": "logps chosen",
    "logps/rejected": "logps rejected",
    "drift/chosen": "drift chosen",
    "drift/rejected": "drift rejected",
    "drift/displaced": "displaced",
    "kl/chosen": "KL chosen",
    "kl/rejected": "KL rejected",
    "nll/chosen": "nll chosen",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "peak_memory": "peak memory GiB",
    "seconds": "seconds/update",
}
# drift is the same without the noise of what a batch holds, so log-probs are shown only where there is none
INSTEAD = {"logps/chosen": "drift/chosen", "logps/rejected": "drift/rejected"}


class Line(NamedTuple):
    """One curve in text: its name, its points, its figures."""

    label: str
    drawn: pl.DataFrame
    figures: list[str]


def print_runs(runs: Sequence[Curves], console: Console) -> None:
    """One run after the other."""
    for number, run in enumerate(runs):
        if number:
            console.print("")
        print_run(run, console)


def print_run(run: Curves, console: Console) -> None:
    """What a run is, its warnings, its curves."""
    console.print(f"run {run.path}")
    for name, text in facts_of(run):
        console.print(f"  {name:<13} {text}")
    for one in evaluation_lines(run.path):
        console.print(f"  {'evaluation':<13} {evaluation_text(one)}")
    for text in warnings_of(run):
        console.print(f"  {'warning':<13} {text}")
    if run.steps.is_empty():
        console.print("  no step is logged yet")
        return
    lines = curve_lines(run)
    console.print(_heading(lines, console.width))
    for text in _laid_out(lines, console.width, levels_for(console.encoding)):
        console.print(text)


def evaluation_text(one: Mapping[str, Any]) -> str:
    """An evaluation in a line: what it is called, and by how much the mean reward rose."""
    if "damaged" in one:
        return f"{one['evaluation']}: {one['damaged']}"
    warned = f"; {one['warnings']} warnings" if one["warnings"] else ""
    if "gain" not in one:
        return f"{one['evaluation']}{warned}"
    ends = "" if one["low"] is None else f" [{one['low']:.3g}, {one['high']:.3g}]"
    return f"{one['evaluation']}: reward by {one['scorer']} {one['gain']:+.3g}{ends}{warned}"


def curve_lines(run: Curves) -> list[Line]:
    """The curves that say something: with values, and of beta and the like only where they change."""
    lines = []
    for name in (*CURVES, *PERF_CURVES):
        drawn = points(run, name)
        found = ends(drawn)
        if found is None or (name == "beta" and found.min == found.max):
            continue
        if name in INSTEAD and not points(run, INSTEAD[name]).is_empty():
            continue
        unit = GIB if name == "peak_memory" else 1
        first, last, low, high = figures_of(found, unit, digits=3)
        tested = ends(points(run, f"eval_{name}")) if f"eval_{name}" in run.steps.columns else None
        test = figures_of(tested, unit, digits=3)[1] if tested else ""
        lines.append(Line(LABELS.get(name, name), drawn, [f"{first} -> {last}", f"{low} .. {high}", test]))
    return lines


def _room(lines: Sequence[Line], width: int) -> tuple[int, list[int]]:
    """The characters of a curve, and of each column of figures; 0: a curve needs a line of its own."""
    columns = [max(len(line.figures[i]) for line in lines) for i in range(3)]
    left = width - 2 - LABEL - 2 - sum(columns) - 2 * sum(1 for column in columns if column)
    return (min(left, WIDEST) if left >= NARROWEST else 0), columns


def _heading(lines: Sequence[Line], width: int) -> str:
    room, columns = _room(lines, width)
    names = ["first -> last", "min .. max", "test" if columns[2] else ""]
    figures = "  ".join(name.ljust(column) for name, column in zip(names, columns, strict=True))
    curve = " " * (room or 0)
    return f"  {'':<{LABEL}} {curve} {figures}".rstrip() if room else f"  {'':<{LABEL}} {figures}".rstrip()


def _laid_out(lines: Sequence[Line], width: int, levels: str) -> list[str]:
    """A line a curve, or two on a narrow screen."""
    room, columns = _room(lines, width)
    texts = []
    for line in lines:
        figures = "  ".join(text.ljust(column) for text, column in zip(line.figures, columns, strict=True)).rstrip()
        curve = sparkline(stretch_means(line.drawn, room or max(8, width - 4))["value"].to_list(), levels)
        if room:
            texts.append(f"  {line.label:<{LABEL}} {curve:<{room}} {figures}")
        else:
            texts += [f"  {line.label:<{LABEL}} {figures}", f"    {curve}"]
    return texts
