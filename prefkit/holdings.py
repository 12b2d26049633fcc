"""What a dataset holds beside its pairs: the audit, a reference, a run, as objects whose tables are Polars LazyFrames.

Comes in: a folder of the dataset. Goes out: documents as plain dicts and tables as LazyFrames over the parts that a
document lists, compared with the recorded sha256 on first access. Messages have role, content and extra, whether or
not the parts have `extra`. Price: a table that is verified is read once more; its footers are always read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from prefkit.audit.verdict import Finding, Level
from prefkit.curves import Curves, read_curves
from prefkit.documents import Run
from prefkit.errors import DatasetError, first_line
from prefkit.format import (
    DYNAMICS,
    MANIFEST,
    MESSAGES,
    PLAIN_MESSAGES,
    REFERENCE_PLAN,
    RUN_JSON,
    Kind,
    differing,
    schema,
)
from prefkit.query import query_dataset
from prefkit.reference_table import open_reference, read_reference
from prefkit.run_facts import state_of
from prefkit.store import REMAKE, read_document
from prefkit.tables import check_parts
from prefkit.text import printable
from prefkit.views import quoted

Value = TypeVar("Value")
Parts = Sequence[Mapping[str, Any]]
SHOWN = 10  # findings in a repr


class Named(dict[str, Value]):
    """A dict whose missing keys are errors of prefkit, which name the keys there are; `in` and `get` ask without one.

    A framework's hook is the reason for the inheritance: `dict` calls `__missing__`.
    """

    def __init__(self, values: Mapping[str, Value], find: Callable[[str], str]) -> None:
        super().__init__(values)
        self._find = find

    def __missing__(self, key: str) -> Value:
        return self[self._find(key)]


@dataclass(frozen=True)
class Verifier:
    """What compares parts with their recorded hashes: each once, and again where its file is another since."""

    on: bool
    seen: set[tuple[str, int, int, int]] = field(default_factory=set)

    def check(self, folder: Path, parts: Parts, hint: str | None = None) -> None:
        """Compare the parts that were not yet; without `on`, only that they are there.

        Raises:
            DatasetError: a part is missing or was changed, by name.
        """
        if not self.on:
            parts = [part for part in parts if not (folder / part["file"]).exists()]
        left = [part for part in parts if _stamp(folder / part["file"]) not in self.seen]
        try:
            check_parts(folder, [dict(part) for part in left])
        except DatasetError as error:
            error.hint = hint or error.hint
            raise
        self.seen.update(_stamp(folder / part["file"]) for part in left)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What another file of the same name has different; zeros where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return str(path), 0, 0, 0
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns


def scan_table(table: str, kind: Kind, files: Sequence[Path], hint: str = REMAKE) -> pl.LazyFrame:
    """The rows of these files in their order, or none, with the columns of the format; a message has all fields.

    Raises:
        DatasetError: a file is missing, is no Parquet, or has other columns.
    """
    columns = schema(table, kind)
    for file in files:
        _check_columns(file, table, kind, hint)
    if not files:
        return pl.LazyFrame(schema=columns)
    if table == "plan":  # those of earlier releases lack a column
        return pl.scan_parquet(list(files), glob=False, schema=columns, missing_columns="insert")
    rows = pl.scan_parquet(list(files), glob=False)
    return rows.cast({PLAIN_MESSAGES: MESSAGES}) if MESSAGES in columns.values() else rows


def _check_columns(file: Path, table: str, kind: Kind, hint: str) -> None:
    try:
        there = pl.scan_parquet(file, glob=False).collect_schema()
    except FileNotFoundError:
        raise DatasetError("part is missing", where=str(file), hint=hint) from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(f"cannot be read: {first_line(error)}", where=str(file), hint=hint) from None
    wanted = schema(table, kind)
    known = [wanted, schema(table, kind, plain=True)]
    known += [pl.Schema({n: t for n, t in wanted.items() if n != "max_batch_tokens"})] if table == "plan" else []
    if there not in known:
        lines = differing({n: str(t) for n, t in there.items()}, {n: str(t) for n, t in wanted.items()})
        what = "columns that are not the table's (found and expected): " + "; ".join(lines or ["another order"])
        raise DatasetError(what, where=str(file), hint=hint)


@dataclass(frozen=True, repr=False)
class DatasetAudit:
    """The audit of a dataset: its verdict, its findings, its tables.

    Attributes:
        path: audit/ of the dataset.
        document: what audit.json holds.
    """

    path: Path
    document: dict[str, Any]
    verifier: Verifier

    def __repr__(self) -> str:
        head = f"audit of {self.path.parent}: {self.summary()}"
        lines = [f"  {one.level:<5} {one.reason}" for one in self.findings[:SHOWN]]
        more = [f"  ... and {len(self.findings) - SHOWN} more in .findings"] if len(self.findings) > SHOWN else []
        return printable("\n".join([head, *lines, *more]))

    def summary(self) -> str:
        """The verdict and its reason, in a line."""
        return f"{self.verdict}: {self.document['reason']}"

    @property
    def verdict(self) -> Level:
        """The worst level there is: pass | not enough data | note | warn | fail."""
        verdict: Level = self.document["verdict"]
        return verdict

    @property
    def findings(self) -> list[Finding]:
        """What gives chosen away, worst first."""
        return [Finding(**told) for told in self.document["findings"]]

    @property
    def tokens(self) -> pl.LazyFrame:
        """A row a word or n-gram: in how many pairs it is in chosen only, in rejected only, in both."""
        return self._table("tokens")

    @property
    def structure(self) -> pl.LazyFrame:
        """A row a feature of structure (or a value of one): which side has more of it."""
        return self._table("structure")

    @property
    def probe(self) -> pl.LazyFrame:
        """A row a probe: how far shallow features alone predict chosen, on held-out prompts."""
        return self._table("probe")

    @property
    def pair_scores(self) -> pl.LazyFrame:
        """A row a pair: how much of it shallow features give away, in log-odds."""
        return self._table("pair_scores")

    def _table(self, name: str) -> pl.LazyFrame:
        file = f"{name}.parquet"
        parts = [part for part in self.document.get("parts", []) if part["file"] == file]
        hint = f"prefkit audit {self.path.parent} makes it again"
        self.verifier.check(self.path, parts, hint)
        return scan_table(name, "text", [self.path / part["file"] for part in parts], hint)


@dataclass(frozen=True, repr=False)
class DatasetReference:
    """One reference of a dataset: what one model scores each pair.

    Attributes:
        path: reference/<key>/ of the dataset.
    """

    path: Path
    verifier: Verifier

    def __repr__(self) -> str:
        return printable(f"reference {self.key}: {self.summary()}")

    def summary(self) -> str:
        """What it is, in a line."""
        recorded = self.document
        rows, identity = sum(part["rows"] for part in recorded["parts"]), recorded["identity"]
        return f"{rows} pairs, max_length {identity['max_length']}, {identity['dtype']}"

    @property
    def key(self) -> str:
        """The hash of `identity` that it is named by."""
        return self.path.name

    @property
    def document(self) -> dict[str, Any]:
        """What reference.json holds.

        Raises:
            DatasetError: it is damaged.
            GateError: its identity is not the one that its key was made from.
        """
        return read_reference(self._dataset, self.key)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its numbers: weights, config, tokenizer, template, max_length, truncation, dtype."""
        identity: dict[str, Any] = self.document["identity"]
        return identity

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made, which decides nothing: attention, layout, device, versions."""
        provenance: dict[str, Any] = self.document["provenance"]
        return provenance

    @property
    def table(self) -> pl.LazyFrame:
        """A row a scored pair: token ids, log-probs in nats (summed, and a token), truncations.

        A row of a pair that is gone from the dataset stays: join on pair_id.

        Raises:
            DatasetError: a part of the pairs is missing or was changed.
            GateError: a part of the reference is missing or was changed, a pair is not scored, or a value cannot be
                what a reference pass has written; with `verify=False` none of this is looked at.
        """
        recorded = self.document
        files = [*recorded["parts"], recorded["dropped"]]
        stamps = {_stamp(self.path / part["file"]) for part in files} | {_stamp(self._dataset / MANIFEST)}
        if not self.verifier.on:
            self.verifier.check(self.path, files)
        elif not stamps <= self.verifier.seen:
            open_reference(self._dataset, self.key)
            self.verifier.seen.update(stamps)
        return scan_table("reference", "text", [self.path / part["file"] for part in recorded["parts"]])

    @property
    def plan(self) -> pl.LazyFrame:
        """A row a scored pair: its batch, its part, its tokens. No hash of it is recorded."""
        return scan_table("plan", "text", [self.path / REFERENCE_PLAN])

    @property
    def dropped(self) -> pl.LazyFrame:
        """pair_id and reason of the pairs that encoding left out."""
        part = self.document["dropped"]
        self.verifier.check(self.path, [part])
        return scan_table("reference_dropped", "text", [self.path / part["file"]])

    @property
    def _dataset(self) -> Path:
        return self.path.parent.parent


@dataclass(frozen=True, repr=False)
class DatasetRun:
    """One training run, finished or not. No hashes of its files are recorded: damaged ones are refused, others read.

    Attributes:
        path: runs/<n>/ of the dataset.
    """

    path: Path

    def __repr__(self) -> str:
        return printable(f"run {self.name}: {self.summary()}")

    def summary(self) -> str:
        """What it is and how it ended, in a line."""
        curves = self._curves
        loss, evaluated = curves.document.get("loss"), curves.document.get("eval") or {}
        accuracy = evaluated.get("rewards/accuracies")
        of_loss = [] if loss is None else [f"loss {loss:.4f}"]
        return ", ".join([state_of(curves), *of_loss, *([] if accuracy is None else [f"test accuracy {accuracy:.3f}"])])

    @property
    def name(self) -> str:
        """The directory's."""
        return self.path.name

    @property
    def document(self) -> dict[str, Any]:
        """What run.json holds: model, reference, settings, the metrics of the final model on the test split."""
        return read_document(self.path / RUN_JSON, Run)

    @property
    def steps(self) -> pl.LazyFrame:
        """A row an update, and the last evaluation: loss, rewards, log-probs; of a live run as far as it is."""
        return self._curves.steps.lazy()

    @property
    def perf(self) -> pl.LazyFrame:
        """A row an update: seconds, tokens, MFU, memory."""
        return self._curves.perf.lazy()

    @property
    def pair_dynamics(self) -> pl.LazyFrame:
        """A row a pair and time it was seen: its rewards and margin before the update that it was part of."""
        parts = sorted((self.path / DYNAMICS).glob("part-*.parquet"), key=lambda part: (len(part.name), part.name))
        return scan_table("pair_dynamics", "text", parts)

    @property
    def learning(self) -> pl.LazyFrame:
        """A row a pair: when it was learned and forgotten; the view of that name, which is computed when collected."""
        sql = f"SELECT * EXCLUDE (run) FROM learning WHERE run = {quoted(self.name)} ORDER BY pair_id"
        dataset = self.path.parent.parent
        return pl.defer(lambda: query_dataset(dataset, sql).pl(), schema=schema("learning", "text"))

    @property
    def _curves(self) -> Curves:
        return read_curves(self.path)
