"""One self-contained page of one or several runs: charts over steps, what differs between the runs, final figures.

Comes in: run directories. Goes out: an HTML file with plotly and all data in it, which asks the network for nothing and
says so to the browser (a content security policy that allows its own scripts by their hashes and nothing else). Names,
paths and settings are data: jinja2 escapes them, and in JSON no `<` is left. The same runs give the same bytes.
Price: 4.8 MB of plotly, and some 0.4 MB a run of many steps.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefkit.curves import Curves, ends, points
from prefkit.errors import InputError
from prefkit.format import RUN_JSON
from prefkit.info import read_runs
from prefkit.run_charts import COLOURS, SECTIONS, sections_of
from prefkit.run_facts import facts_of, figures_of, run_names, settings_of, state_of, warnings_of
from prefkit.store import dataset_around, write_text
from prefkit.text import printable

if TYPE_CHECKING:
    from jinja2 import Template

GENERATOR = '<meta name="generator" content="prefkit info --html">'  # by which a page knows another one
HEAD = 2048  # bytes in which it stands
# of the final figures: chart, and which of its lines
FIGURES = ("loss", "accuracy", "margin", "rewards", "drift", "displaced", "logps", "kl", "nll", "throughput", "memory")


class RunPage(NamedTuple):
    """What `write_run_page` returns."""

    page: str  # the file
    runs: int  # that it shows
    bytes: int


def write_run_page(targets: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> RunPage:
    """Write one self-contained page with the curves of some runs; a page that is there is replaced.

    Args:
        targets: run directories, each drawn once.
        out: an HTML file.
        overwrite: whether another file may be replaced.

    Returns:
        the page, the runs on it, its size in bytes.

    Raises:
        InputError: a target is no run, `out` must not be written, or plotly is not installed.
        DatasetError: a run is damaged, or `out` cannot be written.
        MachineError: the disk is full.

    Example:
        page = prefkit.write_run_page(["demo/dataset/runs/1"], "run.html")
        print(page.bytes)
    """
    check_out(Path(out), overwrite=overwrite)
    plotly = plotly_script()
    runs = read_runs(targets)
    text = page_of(runs, plotly)
    write_text(Path(out), text)
    return RunPage(str(out), len(runs), len(text.encode()))


def check_out(out: Path, *, overwrite: bool) -> None:
    """Whether a page may be written there.

    Raises:
        InputError: a directory, no .html, inside a dataset or run, or a file that is no such page.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError("is no name of a page", where=str(out), expected="--html PAGE.html")
    if dataset_around(out) is not None or any((folder / RUN_JSON).exists() for folder in out.resolve().parents):
        raise InputError("a page cannot be written into a dataset or a run", where=str(out), hint="--html elsewhere")
    if not overwrite and out.exists() and GENERATOR.encode() not in _head(out):
        hint = "--overwrite replaces it, --html elsewhere leaves it"
        raise InputError("is there already, and is no page of runs", where=str(out), hint=hint)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def plotly_script() -> str:
    """The JavaScript of the installed plotly.

    Raises:
        InputError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        message = "--html needs plotly, which is not installed"
        raise InputError(message, hint="pip install 'prefkit[html]'") from None
    return str(get_plotlyjs()).replace("\r\n", "\n")  # as a browser reads it, for its hash


def page_of(runs: Sequence[Curves], plotly: str) -> str:
    """The page as text.

    Args:
        runs: to draw, in this order.
        plotly: the script that draws them.
    """
    sections = sections_of(runs)
    names = [printable(name) for name in run_names([run.path for run in runs])]
    drawn = [
        {"id": chart["id"], "title": chart["title"], "traces": chart["traces"]}
        for charts in sections.values()
        for chart in charts
    ]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(runs))]
    data = {"runs": [{"name": n, "colour": c} for n, c in zip(names, colours, strict=True)], "charts": drawn}
    settings = settings_of(runs)
    script = _own("page.js")
    told = [
        {
            "name": name,
            "colour": colour,
            "path": run.path,
            "state": state_of(run),
            "facts": facts_of(run),
            "warnings": warnings_of(run),
            "empty": run.steps.is_empty(),
        }
        for run, name, colour in zip(runs, names, colours, strict=True)
    ]
    return _template().render(
        generator=GENERATOR,
        policy=_policy(plotly, script),
        style=_own("page.css"),
        plotly=plotly,
        script=script,
        data=as_script_json(data),
        runs=told,
        sections=sections,
        figures=_figures(runs),
        differing=[setting for setting in settings if setting.differs],
        alike=[setting for setting in settings if not setting.differs],
    )


def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:  # bytes of a name that are no UTF-8, marks that turn the text around
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_own("page.html"))


def as_script_json(value: Any) -> str:
    """JSON that can stand inside a <script>: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _own(name: str) -> str:
    return (resources.files("prefkit") / "page" / name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Nothing from anywhere, and no script but these; pictures are what a chart is saved as."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _figures(runs: Sequence[Curves]) -> list[dict[str, Any]]:
    """First -> last, and the range, of each line that a run has; a row a line, a cell a run."""
    charts = {chart.id: chart for charts in SECTIONS.values() for chart in charts}
    rows = []
    for name in FIGURES:
        for line in charts[name].lines:
            found = [ends(points(run, line.column)) for run in runs]
            if any(found):
                unit, label = charts[name].unit, f"{charts[name].title}, {line.label}"
                cells = [None if one is None else figures_of(one, unit, digits=4) for one in found]
                rows.append({"name": label, "cells": cells})
    return rows
