"""A source becomes draft pairs on disk, block by block, and a build that was stopped does not read that source again.

Comes in: one source of the pipeline. Goes out: a folder with its pairs, drops and rejects in parts, before anything
compares them with those of other sources: each pair has its ids, satisfies the rules of validate.py, holds no
evaluation item, and has its keys beside it. Drafts lie in DATASET/.drafts/<key>/ until the dataset is finished; the key
hashes all settings that decide them and the bytes of the files, so a changed file is read anew.
"""

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow.parquet as pq

from prefkit import __version__
from prefkit.candidates import select_parts
from prefkit.comparing import with_held_out
from prefkit.comparisons import compared_pairs
from prefkit.config import PairsConfig, Pipeline, SourceConfig
from prefkit.corrections import Rule, corrected_pairs, rewrite_responses
from prefkit.decontaminate import Index, decontaminate_pairs
from prefkit.errors import DatasetError, SourceError, located
from prefkit.format import Kind, canonical_json
from prefkit.keys import narrow_pairs
from prefkit.pairing import Rules
from prefkit.pairs import Bounds, as_dropped, bounded_pairs, ready_pairs
from prefkit.rejecting import Rejected
from prefkit.rewriting import make_rules, module_files
from prefkit.selection import Tally, selected_of
from prefkit.sources import CHANGED, SourceFile, expand, format_of, read_source, source_sha256
from prefkit.store import SCRATCH, read_json, write_json, written
from prefkit.tables import are_plain
from prefkit.text import with_pair_ids
from prefkit.validate import validate_pairs

TABLES = ("pairs", "keys", "dropped", "rejects")
PARQUET: Mapping[str, Any] = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
PART_ROWS = 1 << 15  # pairs of a part: what is held at once, and what a process takes from the others
Seen = Callable[[int, float | None], None]  # rows, and the share of the source that they are, None if unknown


class Draft(NamedTuple):
    """What one source gave; the tables lie in `folder`, pairs and keys in as many parts of the same rows.

    `rows`: of each part of pairs; `num_records`: rows that became a record; `selection`: None but for candidates;
    `report`: what a person wants to know of the source beyond counts, by topic; `plain`: no message has any `extra`.
    """

    folder: Path
    rows: list[int]
    num_dropped: int
    num_rejects: int
    num_records: int
    files: list[SourceFile]
    selection: dict[str, Any] | None
    report: dict[str, Any]
    plain: bool

    def parts(self, table: str) -> list[Path]:
        """The files of a table, in order."""
        return sorted(self.folder.glob(f"{table}-*.parquet"))


class Drafting(NamedTuple):
    """What decides the drafts of a source, beyond the source itself."""

    pipeline: Pipeline
    kind: Kind
    evals: Index | None
    eval_files: list[SourceFile]
    memory_limit: int


class _Writer:
    """The tables of a draft as they grow; a part is written when there are enough rows or bytes for it."""

    def __init__(self, folder: Path, how: Drafting) -> None:
        self.folder, self.how = folder, how
        self.rejected = Rejected()
        self.lock = threading.Lock()  # candidates are read in one thread and decided in another
        self.restart()

    def restart(self) -> None:
        """Forget what was put in so far."""
        for path in self.folder.glob("*.parquet"):
            path.unlink()
        self.waiting: dict[str, list[pl.DataFrame]] = {name: [] for name in TABLES}
        self.parts = dict.fromkeys(TABLES, 0)
        self.counts = dict.fromkeys(TABLES, 0)
        self.rows: list[int] = []
        self.num_waiting = self.size = self.num_records = 0
        self.plain = True
        self.rejected.forget()

    def add(self, pairs: pl.DataFrame, dropped: list[pl.DataFrame]) -> None:
        """Put drafts and drops in: what is left of the drafts gets ids and keys."""
        how, limits = self.how, self.how.pipeline.validate_
        identified = with_pair_ids(pairs, how.kind)
        valid = validate_pairs(
            identified, how.kind, limits.max_chars, limits.score_scale, meta_phrases=limits.meta_phrases == "drop"
        )
        kept, lost = valid.kept, [*dropped, as_dropped(valid.dropped, how.kind, "validate")]
        if how.evals is not None:
            clean = decontaminate_pairs(kept, how.kind, how.evals, how.pipeline.decontaminate.max_overlap)
            kept, lost = clean.kept, [*lost, as_dropped(clean.dropped, how.kind, "decontaminate")]
        split = how.pipeline.split
        keys = with_held_out(narrow_pairs(kept, how.kind), kept["prompt_id"], split.test_share, split.seed)
        with self.lock:
            self._put("pairs", kept)
            self._put("keys", keys)
            for frame in lost:
                self._put("dropped", frame)
            self._write_if(PART_ROWS, how.memory_limit // 16)

    def reject(self, rejects: pl.DataFrame, num_records: int) -> None:
        """Put rejects in, and how many rows beside them became records."""
        self.num_records += num_records
        self.rejected.add(rejects)
        if rejects.height:
            with self.lock:
                self._put("rejects", rejects)
                self._write_if(PART_ROWS, self.how.memory_limit // 16)

    def forget_rejects(self) -> None:
        """Another reading of the source begins; its pairs are not there before it ends."""
        with self.lock:
            self.rejected.forget()
            self.num_records = 0
            self.waiting["rejects"].clear()
            for path in self.folder.glob("rejects-*.parquet"):
                path.unlink()
            self.parts["rejects"] = self.counts["rejects"] = 0

    def finish(self) -> None:
        """Write what is left."""
        self._write_if(0, 0)

    def _put(self, name: str, frame: pl.DataFrame) -> None:
        if frame.height:
            self.waiting[name].append(frame)
            self.counts[name] += frame.height
            self.num_waiting += frame.height if name != "keys" else 0
            self.size += int(frame.estimated_size())

    def _write_if(self, rows: int, size: int) -> None:
        if self.num_waiting < rows and self.size < size:
            return
        for name, frames in self.waiting.items():
            if not frames:
                continue
            whole = pl.concat(frames, how="vertical_relaxed" if name == "keys" else "vertical")
            if name in ("pairs", "dropped"):
                self.plain = self.plain and are_plain([whole])
            if name == "pairs":
                self.rows.append(whole.height)
            path = self.folder / f"{name}-{self.parts[name]:05d}.parquet"
            table = whole.to_arrow(compat_level=pl.CompatLevel.oldest())
            with written(path):
                pq.write_table(table, path, max(table.num_rows, 1), **PARQUET)
            self.parts[name] += 1
            frames.clear()
        self.num_waiting = self.size = 0


def draft_source(
    source: SourceConfig, how: Drafting, folder: Path, scratch: Path | None = None, seen: Seen = lambda *_: None
) -> Draft:
    """Read a source and write its drafts.

    Args:
        source: what to read.
        how: all else that decides them.
        folder: an empty one, for the tables.
        scratch: a folder for temporary files; the system's own if None.
        seen: told how far it is.

    Raises:
        SourceError: it cannot be read, holds no row, or too many of its rows are rejects.
        ConfigError: a function of its rules cannot be found, or a rule of pairs does not fit its scores.
        MachineError: the disk is full.
    """
    writer = _Writer(folder, how)
    files: list[SourceFile] = []
    share = how.pipeline.validate_.max_reject_share

    def read() -> Iterator[pl.DataFrame]:
        before, rows = {file.path: file for file in files}, 0
        files.clear()
        for block in read_source(source, how.kind):
            writer.reject(block.rejects, block.records.height)
            if block.file is not None:
                files.append(block.file)
                if before.get(block.file.path, block.file) != block.file:
                    raise SourceError(CHANGED, where=block.file.path, hint="run the same command again")
            rows += block.records.height
            seen(rows, block.share)
            yield block.records

    modules = [SourceFile(path, source_sha256(path), 0) for path in module_files(source.rules)]
    rules = make_rules(source.rules)  # after the hashes: what changes in between is another build, never the same one
    selection: dict[str, Any] | None = None
    if format_of(source).family == "candidates":
        with located(source.path):
            selection, report = _write_candidates(source, how, writer, read, scratch)
    else:
        report = _write_records(source, how, writer, read(), rules)
    writer.rejected.stop_at(source, writer.num_records, share)
    writer.finish()
    counts = writer.counts
    return Draft(
        folder,
        writer.rows,
        counts["dropped"],
        counts["rejects"],
        writer.num_records,
        [*files, *modules],
        selection,
        report,
        writer.plain,
    )


def _write_records(
    source: SourceConfig, how: Drafting, writer: _Writer, blocks: Iterator[pl.DataFrame], rules: list[Rule]
) -> dict[str, Any]:
    """Drafts of all but candidates; what is told of them."""
    settings, num_responses = how.pipeline.pairs, 0
    bounds = Bounds(**{name: getattr(settings, name) for name in Bounds._fields})
    touched: Counter[str] = Counter()
    for records in blocks:
        lost = []
        match format_of(source).family:
            case "corrections":
                pairs = corrected_pairs(records, how.kind)
            case "comparisons":
                pairs, undecided = compared_pairs(records, how.kind, settings.min_agreement)
                lost.append(undecided)
            case "responses":
                rewritten = rewrite_responses(records, rules, how.kind)
                annotator = pl.lit(source.annotator or "rule").alias("annotator")
                pairs = corrected_pairs(rewritten.corrections.with_columns(annotator), how.kind)
                lost.append(rewritten.dropped)
                touched.update(rewritten.touched)
                num_responses += records.height
            case family:
                assert family == "pairs"
                pairs = ready_pairs(records, source.direction)
        bounded = bounded_pairs(pairs, how.kind, source.direction, bounds)
        writer.add(bounded.kept, [*lost, bounded.dropped])
    return {"rules": {"num_responses": num_responses, "touched": dict(touched)}} if rules else {}


def _write_candidates(
    source: SourceConfig,
    how: Drafting,
    writer: _Writer,
    read: Callable[[], Iterator[pl.DataFrame]],
    scratch: Path | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Candidates are decided while they are read: a source may be larger than memory."""
    rules = selection_rules(how.pipeline.pairs)
    tallies: list[Tally] = []

    def afresh() -> Iterator[pl.DataFrame]:
        writer.forget_rejects()
        yield from read()

    for part in select_parts(afresh, how.kind, source.direction, rules, how.memory_limit, scratch):
        if part is None:
            writer.restart()
            tallies.clear()
            continue
        pairs = part.pairs.with_columns(pl.lit(source.annotator, pl.String).alias("annotator"))
        writer.add(pairs, [part.dropped])
        tallies += [part.tally] if part.tally else []
    nothing = pl.DataFrame()
    found = selected_of(nothing, nothing, tallies, rules)
    names = ("num_prompts", "num_paired_prompts", "num_used", "unused")
    return {name: getattr(found, name) for name in names}, {"candidates": found.report}


def selection_rules(settings: PairsConfig) -> Rules:
    """The settings of candidates as the values that decide."""
    rule, _, sigma = settings.rejected.partition(":")
    shared = {name: getattr(settings, name) for name in Rules._fields if name in PairsConfig.model_fields}
    return Rules(**shared | {"rejected": rule, "sigma": float(sigma or 0)})


# -- what a stopped build leaves


def files_of(source: SourceConfig) -> list[str]:
    """Every file that decides what a source gives: its data, and the modules of its rules."""
    return [*expand(source.path), *module_files(source.rules)]


def draft_key(source: SourceConfig, how: Drafting, digests: list[tuple[str, str]]) -> str:
    """All that decides a draft: settings, and the path and sha256 of each of its files and of the evaluation files."""
    settings = how.pipeline.model_dump(mode="json", by_alias=True)
    sections = [settings[name] for name in ("pairs", "validate", "decontaminate", "split")]
    evals = [[file.path, file.sha256] for file in how.eval_files]
    told = [__version__, pl.__version__, source.model_dump(mode="json"), how.kind, sections, evals, digests]
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:16]


def kept_draft(drafts: Path, source: SourceConfig, how: Drafting) -> Draft | None:
    """The draft that a stopped build left of this very source, if it left a whole one.

    Raises:
        SourceError: the source cannot be read, or too many of its rows are rejects.
    """
    if not any(drafts.glob("*/draft.json")):
        return None
    digests = [(path, source_sha256(path)) for path in files_of(source)]
    folder = drafts / draft_key(source, how, digests)
    try:
        told = read_json(folder / "draft.json")
        files = [SourceFile(**file) for file in told.pop("files")]
        draft = Draft(folder=folder, files=files, **told)
        heights = [pl.scan_parquet(path).select(pl.len()).collect().item() for path in draft.parts("pairs")]
    except (DatasetError, OSError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
    return draft if heights == draft.rows else None


def drafted_source(drafts: Path, source: SourceConfig, how: Drafting, seen: Seen = lambda *_: None) -> Draft:
    """Write the draft of a source for good: another build may go on with it. See `draft_source`."""
    with written(drafts):
        drafts.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=drafts))
    try:
        draft = draft_source(source, how, beside, drafts, seen)
        told = draft._asdict()
        del told["folder"]
        told["files"] = [file._asdict() for file in draft.files]
        write_json(beside / "draft.json", told)
        folder = drafts / draft_key(source, how, [(file.path, file.sha256) for file in draft.files])
        with written(folder):
            shutil.rmtree(folder, ignore_errors=True)
            beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            drafts.rmdir()  # of a build that fails before it has anything
    return draft._replace(folder=folder)
