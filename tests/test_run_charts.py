"""Which charts a page has, and that what they draw is what was logged."""

import math
from pathlib import Path
from typing import Any

import pytest
from runs import write_run

from prefkit.curves import CURVES, PERF_CURVES, Curves, read_curves
from prefkit.run_charts import COLOURS, SECTIONS, most_points, sections_of

ROWS = [
    {"step": i, "num_pairs": 8, "loss": 0.7 - i / 10, "logps/chosen": -9.0, "grad_norm": 1.0, "beta": 0.1}
    for i in range(4)
]


def charts_of(*runs: Curves) -> dict[str, dict[str, Any]]:
    return {chart["id"]: chart for charts in sections_of(runs).values() for chart in charts}


def read(run: Path, rows: list[dict[str, Any]], perf: list[dict[str, Any]] | None = None) -> Curves:
    return read_curves(write_run(run, rows, perf or [], finished=False))


def test_only_what_has_values_is_drawn(tmp_path: Path) -> None:
    charts = charts_of(read(tmp_path / "r", ROWS))
    assert list(charts) == ["loss", "logps", "grad_norm"]
    assert sections_of([read(tmp_path / "empty", [])]) == {}


def test_the_points_are_those_that_were_logged(tmp_path: Path) -> None:
    rows = [row | {"eval_loss": 0.5} if row["step"] == 2 else row for row in ROWS]
    loss = charts_of(read(tmp_path / "r", rows))["loss"]
    assert loss["traces"] == [
        {"run": 0, "label": "train", "dash": "solid", "dots": False, "x": [0, 1, 2, 3], "y": [0.7, 0.6, 0.5, 0.4]},
        {"run": 0, "label": "test", "dash": "dash", "dots": True, "x": [2], "y": [0.5]},
    ]
    assert [line["label"] for line in loss["key"]] == ["train", "test"]
    assert loss["notes"] == []


def test_runs_are_overlaid_and_evaluations_lie_on_top(tmp_path: Path) -> None:
    first = read(tmp_path / "a", [ROWS[0], ROWS[1] | {"eval_loss": 0.5}])
    second = read(tmp_path / "b", ROWS)
    traces = charts_of(first, second)["loss"]["traces"]
    assert [(trace["run"], trace["label"]) for trace in traces] == [(0, "train"), (1, "train"), (0, "test")]


def test_memory_is_told_in_gib_and_beta_where_it_moves(tmp_path: Path) -> None:
    moving = [row | {"beta": 0.1 + row["step"]} for row in ROWS]
    charts = charts_of(read(tmp_path / "r", moving, [{"step": 0, "peak_memory": 3 << 30}]))
    assert charts["memory"]["traces"][0]["y"] == [3.0]
    assert charts["beta"]["traces"][0]["y"] == [0.1, 1.1, 2.1, 3.1]


def test_log_probs_are_drawn_where_a_run_has_no_drift(tmp_path: Path) -> None:
    new = read(tmp_path / "new", [row | {"drift/chosen": -1.0} for row in ROWS])
    old, begun = read(tmp_path / "old", ROWS), read(tmp_path / "begun", [])
    assert "logps" not in charts_of(new)
    assert "logps" not in charts_of(new, begun)
    assert {trace["run"] for trace in charts_of(new, old)["logps"]["traces"]} == {0, 1}


def test_a_long_run_is_thinned_and_the_chart_says_so(tmp_path: Path) -> None:
    rows = [{"step": i, "num_pairs": 1, "loss": math.sin(i), "grad_norm": 1.0} for i in range(5000)]
    rows[3333]["loss"] = 7.5  # a spike of one step
    loss = charts_of(read(tmp_path / "r", rows))["loss"]
    (trace,) = loss["traces"]
    assert len(trace["x"]) == len(trace["y"]) <= 1000
    assert (3333, 7.5) in zip(trace["x"], trace["y"], strict=True)
    assert loss["notes"] == ["5,000 rows, at most 1,000 of them drawn: the lowest and the highest of each stretch"]


def test_what_is_not_finite_is_told(tmp_path: Path) -> None:
    rows = [row | {"kl/chosen": math.inf if row["step"] else 0.1} for row in ROWS]
    assert charts_of(read(tmp_path / "r", rows))["kl"]["notes"] == ["3 values that are no finite number are left out"]


def test_the_trend_is_the_mean_of_each_stretch_of_longer_curves_only(tmp_path: Path) -> None:
    rows = [{"step": i, "num_pairs": 1, "loss": float(i)} for i in range(400)]
    (trace,) = charts_of(read(tmp_path / "long", rows))["loss"]["traces"]
    assert trace["trend"]["rows"] == 5
    assert trace["trend"]["x"][:2] == trace["trend"]["y"][:2] == [2.0, 7.0]
    assert len(trace["trend"]["x"]) == 80
    (trace,) = charts_of(read(tmp_path / "short", rows[:19]))["loss"]["traces"]
    assert "trend" not in trace


@pytest.mark.parametrize(("runs", "most"), [(1, 1000), (6, 1000), (10, 600), (100, 60), (1000, 50)])
def test_many_runs_get_fewer_points_each(runs: int, most: int) -> None:
    assert most_points(runs) == most


def test_every_curve_of_a_run_has_its_chart() -> None:
    drawn = {line.column for charts in SECTIONS.values() for chart in charts for line in chart.lines}
    assert {*CURVES, *PERF_CURVES} == {column for column in drawn if not column.startswith("eval_")}
    ids = [chart.id for charts in SECTIONS.values() for chart in charts]
    assert len(ids) == len(set(ids))


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#f7f8fa", "#15181d", "#1c2027"])
def test_every_colour_can_be_seen_on_light_and_dark(colour: str, page: str) -> None:
    low, high = sorted([luminance(colour), luminance(page)])
    assert (high + 0.05) / (low + 0.05) >= 3
    assert page in (Path(__file__).parent.parent / "prefkit" / "page" / "page.css").read_text()
