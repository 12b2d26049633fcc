"""The papers of a dataset: its card, its views and, last, the manifest that says that the rest is complete.

Comes in: what a build made and the parts of its tables, or a dataset in which a step wrote something. Goes out: three
files, or the first two of them anew: they follow from the manifest, the audit and the references and are in no hash.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefkit import __version__
from prefkit.accounts import Counts
from prefkit.card import dataset_card
from prefkit.config import Pipeline
from prefkit.documents import Audit
from prefkit.errors import DatasetError, GateError
from prefkit.format import AUDIT_JSON, CARD, FORMAT_VERSION, MANIFEST, VIEWS, Kind
from prefkit.front_matter import CardFacts
from prefkit.locks import give_lock, take_lock
from prefkit.reference_table import read_reference
from prefkit.store import list_references, read_document, read_manifest, view_files, write_json, write_text, write_views
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


def manifest_of(pipeline: Pipeline, made: Made, parts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The manifest of what a build made."""
    return {
        "format_version": FORMAT_VERSION,
        "prefkit_version": __version__,
        "kind": made.kind,
        "pipeline": {**pipeline.as_manifest(), "kind": made.kind, "sources": made.sources},
        "sources": made.files,
        "evals": made.evals,
        "additions": made.additions,
        "counts": made.counts._asdict(),
        "reasons": made.reasons,
        "unused": made.unused,
        "report": made.told,
        "parts": {name: [part._asdict() for part in listed] for name, listed in parts.items()},
    }


def write_papers(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Card, views and, last, the manifest of a dataset that is made; what it is swapped in for is renewed then."""
    write_text(folder / CARD, dataset_card(CardFacts(manifest, None, [])))
    write_text(folder / VIEWS, views_sql(manifest["kind"], view_files(folder, manifest)))
    write_json(folder / MANIFEST, manifest)


def renew_papers(dataset: Path, reference: Mapping[str, Any] | None = None) -> None:
    """Write card and views anew for what is there by now; for the one that holds the lock.

    Args:
        dataset: a finished dataset.
        reference: a reference.json that is about to be written.
    """
    manifest = read_manifest(dataset)
    write_text(dataset / CARD, dataset_card(card_facts(dataset, manifest, reference)))
    write_views(dataset, manifest, reference)


def mend_papers(dataset: Path) -> None:
    """`renew_papers`, where card or views are not as they should be by now and nobody else is at work there."""
    manifest = read_manifest(dataset)
    wanted = {
        CARD: dataset_card(card_facts(dataset, manifest)),
        VIEWS: views_sql(manifest["kind"], view_files(dataset, manifest)),
    }
    if all((dataset / name).exists() and (dataset / name).read_text("utf-8") == wanted[name] for name in wanted):
        return
    if (lock := take_lock(dataset)) is not None:  # whoever else holds it writes them in the end
        renew_papers(dataset)
        give_lock(dataset, lock)


def card_facts(dataset: Path, manifest: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> CardFacts:
    """What is there for a card; an audit or a reference that cannot be read is not: whoever needs it is told."""
    audit, references = None, {reference["key"]: reference} if reference else {}
    with contextlib.suppress(DatasetError):
        audit = read_document(dataset / AUDIT_JSON, Audit)
    for key in list_references(dataset):
        with contextlib.suppress(DatasetError, GateError):
            references.setdefault(key, read_reference(dataset, key))
    return CardFacts(manifest, audit, [references[key] for key in sorted(references)])
