"""A dataset as a Python object: tables as Polars LazyFrames, references by their keys, runs by their names. Reads only.

Comes in: a dataset directory. Goes out: a `Dataset`, whose tables are looked at when they are asked for, over the parts
that the manifest lists, compared with their sha256 on first access. No lock is taken: a build that puts another dataset
in its place is noticed at the next access, but not by a LazyFrame that somebody holds already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prefkit.documents import Audit
from prefkit.errors import DatasetError, PrefkitError
from prefkit.format import AUDIT_JSON, REFERENCES, RUN_JSON, RUNS, Kind
from prefkit.holdings import DatasetAudit, DatasetReference, DatasetRun, Named, Verifier, scan_table
from prefkit.reference_table import pick_reference, reference_keys
from prefkit.store import list_references, read_document, read_manifest
from prefkit.target import path_of
from prefkit.text import printable


@dataclass(frozen=True, repr=False)
class Dataset:
    """A finished dataset, opened to be read. Every table is a Polars LazyFrame with the columns of schemas/FORMAT.md.

    Attributes:
        path: its directory.
        manifest: what manifest.json holds, as it was when the dataset was opened.
    """

    path: Path
    manifest: dict[str, Any]
    verifier: Verifier

    def __repr__(self) -> str:
        return printable("\n".join(_told(self)))

    @property
    def kind(self) -> Kind:
        """chat: prompt, chosen and rejected are lists of messages; text: they are strings."""
        kind: Kind = self.manifest["kind"]
        return kind

    @property
    def counts(self) -> dict[str, int]:
        """What became of everything that was read: pairs, train, test, dropped, rejects, and the rest."""
        counts: dict[str, int] = self.manifest["counts"]
        return counts

    @property
    def pairs(self) -> pl.LazyFrame:
        """The pairs that are fit to train on, both splits."""
        return self._table("pairs")

    @property
    def dropped(self) -> pl.LazyFrame:
        """What a named rule removed, and why."""
        return self._table("dropped")

    @property
    def rejects(self) -> pl.LazyFrame:
        """Lines that could not become a record, raw."""
        return self._table("rejects")

    @property
    def changes(self) -> pl.LazyFrame:
        """Of a repaired dataset, what was done to which pair; otherwise empty."""
        return self._table("changes")

    @property
    def is_audited(self) -> bool:
        """Whether there is an audit of these pairs."""
        return (self.path / AUDIT_JSON).exists()

    @property
    def audit(self) -> DatasetAudit:
        """The audit, as it is now.

        Raises:
            DatasetError: none was made (`is_audited`), or it is damaged.
        """
        self._refuse_another()
        if not self.is_audited:
            raise DatasetError("has no audit", where=str(self.path), hint=f"prefkit audit {self.path}")
        document = read_document(self.path / AUDIT_JSON, Audit)
        return DatasetAudit((self.path / AUDIT_JSON).parent, document, self.verifier)

    @property
    def references(self) -> Named[DatasetReference]:
        """The finished references there are now, by key, as a dict; as much of a key as no other has finds it.

        Raises:
            DatasetError: on access, there is none of that key.
        """
        found = {
            key: DatasetReference(self.path / REFERENCES / key, self.verifier) for key in list_references(self.path)
        }
        return Named(found, lambda key: reference_keys(self.path, key)[0])

    def reference(self, key: str | None = None) -> DatasetReference:
        """The reference of that key, or the only one there is.

        Args:
            key: as much of it as no other has; None where there is one only.

        Raises:
            DatasetError: there is none, or not the wanted one.
            GateError: there are several and none is named, or it was changed.
        """
        return self.references[pick_reference(self.path, key)[0]]

    @property
    def runs(self) -> Named[DatasetRun]:
        """The runs there are now, by name, in order, as a dict.

        Raises:
            DatasetError: on access, there is none of that name.
        """
        folders = [path.parent for path in (self.path / RUNS).glob(f"*/{RUN_JSON}")]
        in_order = sorted(folders, key=lambda folder: (len(folder.name), folder.name))
        return Named({folder.name: DatasetRun(folder) for folder in in_order}, self._no_run)

    def _no_run(self, name: str) -> str:
        there = ", ".join(self.runs)
        expected, hint = (f"one of {there}", "") if there else ("", f"prefkit train {self.path} makes one")
        raise DatasetError(f"no run {name}", where=str(self.path), expected=expected, hint=hint)

    def _table(self, name: str) -> pl.LazyFrame:
        self._refuse_another()
        parts = self.manifest["parts"].get(name, [])
        self.verifier.check(self.path / name, parts)
        return scan_table(name, self.kind, [self.path / name / part["file"] for part in parts])

    def _refuse_another(self) -> None:
        """Refuse to mix the tables of two builds."""
        if read_manifest(self.path)["parts"] != self.manifest["parts"]:
            raise DatasetError(
                "was built anew since it was opened", where=str(self.path), hint="prefkit.open_dataset opens it again"
            )


def open_dataset(dataset: str | Path, *, verify: bool = True) -> Dataset:
    """Open a dataset to read its tables as Polars LazyFrames.

    Args:
        dataset: its directory.
        verify: compare each table, when it is first asked for, with the sha256 that was recorded when it was written,
            and check a reference's rows and that it is complete. Without it only missing files are noticed.

    Returns:
        its tables, audit, references and runs. Nothing is read before it is asked for, and no rows before a frame is
        collected.

    Raises:
        DatasetError: there is no finished dataset, or it is of another format version.
        InputError: the argument is no path.

    Example:
        ds = prefkit.open_dataset("demo/dataset")
        print(ds)
        print(ds.pairs.filter(split="test").select("pair_id", "margin").collect())
        print(ds.audit.verdict, ds.reference().table.select("ref_chosen_logps").head().collect())
    """
    path = path_of(dataset, "a dataset directory")
    return Dataset(path, read_manifest(path), Verifier(verify))


def _told(dataset: Dataset) -> list[str]:
    """The lines of its repr; a part that is damaged says so in its place, so that a notebook shows the rest."""
    counts, reasons = dataset.counts, dataset.manifest["reasons"]
    named = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda one: -one[1]))
    lines = [
        f"Dataset {dataset.path} ({dataset.kind})",
        f"  pairs       {counts['pairs']}: {counts['train']} train, {counts['test']} test",
        f"  dropped     {counts['dropped']}",
        f"  rejects     {counts['rejects']}",
    ]
    lines += [f"  reasons     {named}"] if named else []
    if dataset.manifest.get("repair"):
        lines.append(f"  repaired    from {dataset.manifest['repair']['dataset']}: see changes")

    def audit() -> str:
        return dataset.audit.summary() if dataset.is_audited else f"none: prefkit audit {dataset.path}"

    lines.append(f"  audit       {_or_error(audit)}")
    references = [f"{key}  {_or_error(one.summary)}" for key, one in dataset.references.items()]
    runs = [f"{name}  {_or_error(one.summary)}" for name, one in dataset.runs.items()]
    for title, told in (("references", references), ("runs", runs)):
        lines += [f"  {'' if number else title:<11} {text}" for number, text in enumerate(told or ["none"])]
    return lines


def _or_error(tell: Callable[[], str]) -> str:
    try:
        return tell()
    except PrefkitError as error:
        return f"cannot be read: {error.message}"
