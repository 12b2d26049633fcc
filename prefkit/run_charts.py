"""Which charts a page of runs has, and the points that each of them draws. Pure.

Comes in: `Curves`. Goes out: charts as plain dicts, ready for JSON. A curve of more rows than are drawn is thinned to
the lowest and the highest of each stretch: real values at their real steps, so that no peak is lost, and the chart says
so. Nothing is smoothed; the trend that a reader can switch on is a second line, of plain means.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from prefkit.curves import Curves, ends, num_infinite, points, stretch_means, thinned

# of middle brightness: each has a contrast of 3 or more both on white and on the dark page (WCAG 2.2, 1.4.11)
COLOURS = (
    "#2f7fd6",
    "#d9622b",
    "#1d9a6c",
    "#b650b8",
    "#b8860b",
    "#0f9bb0",
    "#d64570",
    "#7c6fe0",
    "#6b8e23",
    "#8a8f98",
)
# points of a curve, of the same curve of all runs, and of a curve however many runs there are
MOST_POINTS, ALL_POINTS, FEWEST_POINTS = 1000, 6000, 50
TREND_POINTS, TREND_ROWS = 80, 5  # means in a trend at most, and the rows that each of them has at least
DIGITS = 6  # more than a chart can show
GIB = 1 << 30


class Line(NamedTuple):
    """One line of a chart: a column, what it is called there, and how it is drawn."""

    column: str
    label: str
    dash: str = "solid"
    dots: bool = False


class Chart(NamedTuple):
    """One chart: its title, what it shows in a sentence, and its lines."""

    id: str
    title: str
    about: str
    lines: tuple[Line, ...]
    unit: float = 1.0  # values are divided by it
    always: bool = True  # False: only where a value changes
    instead: str = ""  # a column: only where a run lacks it


def _both(name: str) -> tuple[Line, ...]:
    return Line(name, "train"), Line(f"eval_{name}", "test", "dash", dots=True)


def _sides(name: str) -> tuple[Line, ...]:
    return (
        Line(f"{name}/chosen", "chosen"),
        Line(f"{name}/rejected", "rejected", "dot"),
        Line(f"eval_{name}/chosen", "chosen, test", "dash", dots=True),
        Line(f"eval_{name}/rejected", "rejected, test", "dashdot", dots=True),
    )


SECTIONS: Mapping[str, tuple[Chart, ...]] = {
    "What it learns": (
        Chart("loss", "Loss", "of each batch before its update; sigmoid begins at ln 2 = 0.693", _both("loss")),
        Chart(
            "accuracy",
            "Accuracy",
            "share of pairs whose margin is above 0; 1.0 within a few steps hints at a shortcut in the data",
            _both("rewards/accuracies"),
        ),
        Chart("margin", "Margin", "reward of chosen minus reward of rejected", _both("rewards/margins")),
        Chart("rewards", "Rewards", "beta times the log-ratio of policy and reference", _sides("rewards")),
    ),
    "How far it moves": (
        Chart(
            "drift",
            "Drift of the log-probs",
            "against the reference, in nats; both sides below 0 while the margin grows is likelihood displacement",
            _sides("drift"),
        ),
        Chart(
            "displaced",
            "Displaced pairs",
            "share of pairs whose margin is above 0 while chosen has become less likely",
            _both("drift/displaced"),
        ),
        Chart(
            "logps",
            "Log-probs",
            "of whole completions, in nats: they also change with what a batch holds",
            _sides("logps"),
            instead="drift/chosen",
        ),
        Chart("kl", "KL to the reference", "estimated on the pairs' own texts, nats a token", _sides("kl")),
        Chart("nll", "Likelihood of chosen", "negative log-likelihood, nats a token", _both("nll/chosen")),
    ),
    "How it is steered": (
        Chart("grad_norm", "Gradient norm", "before clipping", (Line("grad_norm", "train"),)),
        Chart("learning_rate", "Learning rate", "of each update", (Line("learning_rate", "train"),)),
        Chart("beta", "Beta", "of the loss and the rewards", (Line("beta", "train"),), always=False),
    ),
    "What it costs": (
        Chart(
            "throughput",
            "Throughput",
            "tokens of prompt, chosen and rejected a second, without evaluations and checkpoints",
            (Line("tokens_per_second", "tokens/s"),),
        ),
        Chart("mfu", "Use of the hardware", "model FLOPs over what the devices can do (MFU)", (Line("mfu", "MFU"),)),
        Chart(
            "memory", "Peak memory", "of the process that needed most so far, GiB", (Line("peak_memory", "GiB"),), GIB
        ),
        Chart("seconds", "Time of an update", "seconds", (Line("seconds", "seconds"),)),
    ),
}


def most_points(num_runs: int) -> int:
    """How many points a curve may have, so that a page of many runs stays small enough to open."""
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, num_runs)))


def sections_of(runs: Sequence[Curves]) -> dict[str, list[dict[str, Any]]]:
    """The charts with anything to draw, by section.

    Returns:
        a chart: `id`, `title`, `about`, `notes` (what was thinned or left out), `key` (label, dash and dots of its
        lines), `traces` (run, label, dash, dots, x, y, and for longer curves `trend`: x, y, rows of a mean).
    """
    sections = {name: [_drawn(chart, runs) for chart in charts] for name, charts in SECTIONS.items()}
    shown = {name: [chart for chart in charts if chart["traces"]] for name, charts in sections.items()}
    return {name: charts for name, charts in shown.items() if charts}


def _drawn(chart: Chart, runs: Sequence[Curves]) -> dict[str, Any]:
    most, traces, infinite, thin = most_points(len(runs)), [], 0, 0
    drawn_runs = [] if chart.instead and all(_has(run, chart.instead) for run in runs) else runs
    for number, run in enumerate(drawn_runs):
        for line in chart.lines:
            drawn = points(run, line.column)
            found = ends(drawn)
            infinite += num_infinite(run, line.column)
            if found is None or not (chart.always or found.min < found.max):
                continue
            thin = max(thin, drawn.height if drawn.height > most else 0)
            traces.append({"run": number, **_trace(drawn, line, chart.unit, most)})
    traces.sort(key=lambda trace: trace["dots"])  # what is evaluated lies above the batches
    labels = {trace["label"] for trace in traces}
    return {
        "id": chart.id,
        "title": chart.title,
        "about": chart.about,
        "notes": _notes(thin, most, infinite),
        "key": [line._asdict() for line in chart.lines if line.label in labels] if len(chart.lines) > 1 else [],
        "traces": traces,
    }


def _has(run: Curves, column: str) -> bool:
    return run.steps.is_empty() or not points(run, column).is_empty()


def _trace(drawn: pl.DataFrame, line: Line, unit: float, most: int) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "label": line.label,
        "dash": line.dash,
        "dots": line.dots,
        **_xy(thinned(drawn, most), unit),
    }
    if not line.dots and drawn.height >= TREND_ROWS * 4:
        means = stretch_means(drawn, min(TREND_POINTS, most // TREND_ROWS, drawn.height // TREND_ROWS))
        trace["trend"] = {**_xy(means, unit), "rows": round(drawn.height / means.height)}
    return trace


def _xy(drawn: pl.DataFrame, unit: float) -> dict[str, list[Any]]:
    values = (drawn["value"] / unit).round_sig_figs(DIGITS)
    return {"x": drawn["step"].to_list(), "y": values.to_list()}


def _notes(thin: int, most: int, infinite: int) -> list[str]:
    notes = []
    if thin:
        notes.append(f"{thin:,} rows, at most {most:,} of them drawn: the lowest and the highest of each stretch")
    if infinite:
        notes.append(f"{infinite:,} values that are no finite number are left out")
    return notes
