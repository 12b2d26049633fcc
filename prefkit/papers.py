"""The papers of a dataset: its card, its views and, last, the manifest that says that the rest is complete.

Comes in: what a build made, and the parts of its tables. Goes out: three files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefkit import __version__
from prefkit.accounts import Counts
from prefkit.config import Pipeline
from prefkit.format import CARD, FORMAT_VERSION, MANIFEST, VIEWS, Kind
from prefkit.store import write_json, write_text
from prefkit.views import views_sql


class Made(NamedTuple):
    """What a build made, but for the rows.

    `sources`: settings, as the rows lie in the tables; `told`: what sources, corrections and prompts have to say.
    """

    kind: Kind
    sources: list[dict[str, Any]]
    files: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    additions: list[dict[str, Any]]
    counts: Counts
    reasons: dict[str, int]
    unused: dict[str, int]
    told: list[dict[str, Any]]


def write_papers(folder: Path, pipeline: Pipeline, made: Made, parts: Mapping[str, Sequence[Any]]) -> None:
    """Card, views and, last, the manifest."""
    write_text(folder / CARD, dataset_card(made))
    write_text(folder / VIEWS, views_sql(made.kind, parts.keys()))
    settings = {**pipeline.as_manifest(), "kind": made.kind, "sources": made.sources}
    manifest = {
        "format_version": FORMAT_VERSION,
        "prefkit_version": __version__,
        "kind": made.kind,
        "pipeline": settings,
        "sources": made.files,
        "evals": made.evals,
        "additions": made.additions,
        "counts": made.counts._asdict(),
        "reasons": made.reasons,
        "unused": made.unused,
        "report": made.told,
        "parts": {name: [part._asdict() for part in listed] for name, listed in parts.items()},
    }
    write_json(folder / MANIFEST, manifest)


def dataset_card(made: Made) -> str:
    """The README.md inside the dataset: what it holds, in counts, and where it came from."""
    counts = made.counts
    sources = "".join(f"| {file['path']} | {file['format']} | {file['rows']} |\n" for file in made.files)
    reasons = "".join(f"| {reason} | {count} |\n" for reason, count in made.reasons.items())
    return (
        f"# Preference pairs ({made.kind})\n\n"
        f"{counts.pairs} pairs ({counts.train} train, {counts.test} test), built by prefkit {__version__}.\n\n"
        f"| source | format | rows |\n|---|---|---|\n{sources}\n"
        f"| dropped or rejected because | rows |\n|---|---|\n{reasons}\n"
        "`pairs/` holds the pairs, `dropped/` and `rejects/` everything that was left out and why, `manifest.json`\n"
        "the settings and the hash of every file. `views.sql` gives DuckDB a view a table, run from this directory.\n"
    )
