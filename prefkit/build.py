"""`prefkit build`: sources -> pairs -> validate -> decontaminate -> dedupe -> split -> dataset, in that order.

Every row read is accounted for. Pairs and corrections: rows = pairs + dropped + rejects. Candidates: candidates = used
+ unused + rejects, and prompts = prompts with a pair + prompts in dropped. Two builds of one pipeline write the same
bytes, whatever memory they are given and however many processes. Rows stream: each source is drafted to disk, what is
compared is some hundred bytes a pair, and the tables are written as they are read back. A build that was killed goes on
after the last source it had read, or after the comparison.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.accounts import Account, Counts, OfSources
from prefkit.additions import added_sources, base_of, licensed
from prefkit.assembly import Base, Gathered, assembled, compared, how_to_compare, prompt_report
from prefkit.config import Changes, Pipeline, SourceConfig
from prefkit.decontaminate import index_of
from prefkit.drafts import Draft, Drafting, drafted_source, files_of, kept_draft
from prefkit.errors import DatasetError, PrefkitError
from prefkit.evals import read_evals
from prefkit.format import MANIFEST, SPLITS, Kind, schema
from prefkit.locks import give_lock, leave_no_empty_directory, locked, take_lock
from prefkit.papers import Made, manifest_of, renew_papers, write_papers
from prefkit.resolving import refuse_without_effect, resolve_formats, resolve_kind
from prefkit.sources import SourceFile
from prefkit.store import (
    BUILDING,
    DRAFTS,
    built_beside,
    claim_directory,
    clear_left_behind,
    clear_scratch,
    half_swapped,
    left_behind,
    read_json,
    read_manifest,
    swap_in,
    write_json,
)
from prefkit.tables import TableWriter
from prefkit.target import Target, pipeline_of

Tell = Callable[[str], None]
TABLES = ("pairs", "dropped", "rejects")


class Watch:
    """Who is told how a build goes on, and how long each of its stages took. By itself it tells nobody."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """A stage begins."""

    def look(self, done: int, total: float | None) -> None:
        """Rows done in this stage, and about how many there are."""

    @contextmanager
    def staged(self, name: str) -> Iterator[None]:
        """Time a stage."""
        self.stage(name)
        started = time.monotonic()
        try:
            yield
        finally:
            kind = name.partition(" ")[0]
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - started


class Tables(NamedTuple):
    """All that a build makes, in memory."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    rejects: pl.DataFrame
    made: Made

    @property
    def counts(self) -> Counts:
        """What became of everything that was read."""
        return self.made.counts


class Built(NamedTuple):
    """What `build_dataset` returns."""

    dataset: str  # its directory
    kind: Kind
    counts: dict[str, int]  # what became of everything that was read, as in the manifest
    reasons: dict[str, int]  # dropped and rejected rows by reason, most first
    unused: dict[str, int]  # unused candidates by reason, most first
    report: list[dict[str, Any]]  # by source: what selection or rules did
    unchanged: bool  # the dataset was there already, nothing was written
    checked_only: bool  # `check` was asked for, nothing was written
    added: dict[str, Any] | None  # the sources that were added and the pairs they brought; None where built as a whole
    seconds: dict[str, float]  # by stage


def build_dataset(
    target: Target,
    *,
    changes: Changes = (),
    check: bool = False,
    rebuild: bool = False,
    tell: Tell = lambda _text: None,
    watch: Watch | None = None,
) -> Built:
    """Build the dataset of a pipeline, or with `check` only say what would be built.

    A dataset that was built of some of the pipeline's sources and otherwise alike is added to: what it holds stays, in
    its split, and new pairs are compared with it. The same pipeline and sources again: nothing is written.

    Args:
        target: a pipeline file or a loaded Pipeline; of a dataset directory, the pipeline that it was built with.
        changes: settings by their dotted keys, as in `load_pipeline`.
        check: read and check everything, write nothing.
        rebuild: build all of it anew, also where new sources could be added to what is there.
        tell: called with lines for a person.
        watch: a `prefkit.build.Watch`, told of each stage and of the rows done in it.

    Returns:
        counts of what became of every row that was read, and the reasons.

    Raises:
        ConfigError: a setting of pairs that no source can use.
        SourceError: a source or evaluation file cannot be read, or too many of its lines are rejects.
        DatasetError: the dataset directory is not ours, or another prefkit is writing to it.
        MachineError: the disk is full, or build.memory_limit too small.

    Example:
        built = prefkit.build_dataset("demo/pipeline.yaml")
        print(built.counts["pairs"], built.reasons)
    """
    pipeline = pipeline_of(target, changes)
    watch = watch or Watch()
    dataset = Path(pipeline.dataset)
    claim_directory(dataset)
    refuse_repaired(dataset)
    if not check:
        finish_swap(dataset)
    pipeline = resolve_formats(pipeline, tell)
    refuse_without_effect(pipeline)
    kind = resolve_kind(pipeline)
    seen = _stamp(dataset)
    base = None if rebuild else base_of(dataset, pipeline, kind, tell)
    if base is not None and not added_sources(base, pipeline):
        return _unchanged(base, pipeline, kind, check=check)
    if base is not None:
        names = ", ".join(source.path for source in added_sources(base, pipeline))
        tell(f"adding {names} to the {base.rows} pairs of {dataset}, which stay as they are")
    if check:
        with tempfile.TemporaryDirectory(prefix="prefkit-") as scratch:
            made = _make(pipeline, kind, base, Path(scratch), None, tell, watch)
        return _built(pipeline, made, base, watch, checked_only=True)
    for source in pipeline.sources:
        files_of(source)  # a path that names nothing is found before anything is made or read
    existed = dataset.exists()
    try:
        with locked(dataset):
            if as_before := _stamp(dataset) == seen:
                clear_scratch(dataset)
                with built_beside(dataset) as beside:
                    made = _make(pipeline, kind, base, dataset / DRAFTS, beside, tell, watch)
                renew_papers(dataset)
    except PrefkitError:
        if not existed:
            leave_no_empty_directory(dataset)
        raise
    if not as_before:  # another prefkit has written it since
        return build_dataset(pipeline, rebuild=rebuild, tell=tell, watch=watch)
    return _built(pipeline, made, base, watch)


def _stamp(dataset: Path) -> bytes | None:
    """The manifest as it is, None where there is none."""
    try:
        return (dataset / MANIFEST).read_bytes()
    except OSError:
        return None


def _built(pipeline: Pipeline, made: Made, base: Base | None, watch: Watch, *, checked_only: bool = False) -> Built:
    counts = made.counts._asdict()
    added = None
    if base is not None:
        added = {
            **made.additions[-1],
            "pairs_before": base.rows,
            "split_conflicts": made.reasons.get("split_conflict", 0)
            - base.manifest["reasons"].get("split_conflict", 0),
        }
    return Built(
        pipeline.dataset,
        made.kind,
        counts,
        made.reasons,
        made.unused,
        made.told,
        False,
        checked_only,
        added,
        {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
    )


def refuse_repaired(dataset: Path) -> None:
    """Refuse to build over a repaired dataset: its repair would be lost without a word.

    Raises:
        DatasetError: it is one.
    """
    try:
        repaired = read_manifest(dataset).get("repair") if (dataset / MANIFEST).exists() else None
    except DatasetError:
        return  # torn, damaged or of another version: built anew, or refused where that is said
    if repaired is not None:
        raise DatasetError(
            f"is a repaired dataset (of {repaired['dataset']})",
            where=str(dataset),
            expected="a directory that no repair has written",
            hint="choose another --out, or remove it",
        )


def finish_swap(dataset: Path) -> None:
    """Finish a build that was killed when all was made: its additions would else be lost, and the old split with them.

    Raises:
        DatasetError: another prefkit is writing to it.
    """
    if not half_swapped(dataset) or "repair" in read_json(dataset / BUILDING / MANIFEST):
        return
    with locked(dataset):
        if half_swapped(dataset):
            swap_in(dataset)
            renew_papers(dataset)


def make_tables(pipeline: Pipeline, kind: Kind) -> Tables:
    """What a build of this pipeline makes, in memory, the rows in the order of the parts."""
    rows: dict[str, list[pl.DataFrame]] = {name: [pl.DataFrame(schema=schema(name, kind))] for name in TABLES}

    def keep(table: str, frame: pl.DataFrame) -> None:
        rows[table].append(frame.select(name for name in rows[table][0].columns if name in frame.columns))

    with tempfile.TemporaryDirectory(prefix="prefkit-") as scratch:
        made = _make(pipeline, kind, None, Path(scratch), None, lambda _text: None, Watch(), keep)
    pairs, dropped, rejects = (pl.concat(rows[name], how="diagonal") for name in TABLES)
    pairs = pl.concat([pairs.filter(pl.col("split") == split) for split in SPLITS])
    return Tables(pairs, dropped, rejects, made)


def _make(
    pipeline: Pipeline,
    kind: Kind,
    base: Base | None,
    work: Path,
    target: Path | None,
    tell: Tell,
    watch: Watch,
    keep: Callable[[str, pl.DataFrame], None] = lambda _table, _rows: None,
) -> Made:
    """The whole road: drafts of all sources in `work`, verdicts, the tables, written to `target` if there is one."""
    sources = pipeline.sources if base is None else added_sources(base, pipeline)
    memory_limit = pipeline.build.num_bytes()
    evals = read_evals(pipeline.decontaminate.against)
    for line in evals.told:
        tell(line)
    index = index_of(evals.items, pipeline.decontaminate.ngram) if pipeline.decontaminate.against else None
    how = Drafting(pipeline, kind, index, evals.files, memory_limit)
    drafts: list[Draft] = []
    for number, source in enumerate(sources):
        first = sources.index(source)  # a source that is named twice is read once
        drafts.append(drafts[first] if first < number else _drafted(source, how, work, tell, watch))
    gathered = Gathered(drafts, base, kind)
    comparing = how_to_compare(pipeline, work, pipeline.build.num_processes())
    with watch.staged("comparing pairs"):
        comparing = comparing._replace(tell=watch.stage, watch=watch.look)
        found = compared(gathered, comparing, work, memory_limit)
    account = Account()
    with watch.staged("writing the tables"):
        plain = all(draft.plain for draft in drafts) and (base is None or base.is_plain())
        done, total = 0, gathered.rows() + sum(draft.num_dropped + draft.num_rejects for draft in drafts)
        total += base.num_lost() if base else 0
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(TableWriter(target / name, name, kind, plain=plain))
                for name in TABLES
                if target is not None
            }
            for table, rows in assembled(gathered, found):
                if table in writers:
                    writers[table].add(rows)
                account.add(table, rows)
                keep(table, rows)
                done += rows.height
                watch.look(done, total)
    made = _account(gathered, pipeline, sources, account, evals.files)
    made.counts.check()
    share = pipeline.split.test_share
    report = [
        *made.told,
        *([{"prompts": told}] if (told := prompt_report(found, comparing, share, len(account.clusters))) else []),
    ]
    made = made._replace(told=report)
    if target is not None:
        write_papers(target, manifest_of(pipeline, made, {name: writer.parts for name, writer in writers.items()}))
    return made


def _account(
    gathered: Gathered, pipeline: Pipeline, sources: Sequence[SourceConfig], account: Account, evals: list[SourceFile]
) -> Made:
    """What is said of all that was read, the base's own account included."""
    drafts, base = gathered.drafts, gathered.base
    old: Mapping[str, Any] = base.manifest if base else {}
    before: Mapping[str, int] = old.get("counts", {})
    selections = [draft.selection for draft in drafts if draft.selection is not None]
    candidate_rejects = sum(draft.num_rejects for draft in drafts if draft.selection is not None)
    unused = sum((Counter(selection["unused"]) for selection in selections), Counter(old.get("unused", {})))
    of = OfSources(
        rows=before.get("rows", 0) + sum(file.rows for d in drafts if d.selection is None for file in d.files),
        candidates=before.get("candidates", 0)
        + sum(draft.num_records for draft in drafts if draft.selection is not None)
        + candidate_rejects,
        candidate_rejects=before.get("candidate_rejects", 0) + candidate_rejects,
        used=before.get("used", 0) + sum(selection["num_used"] for selection in selections),
        unused=unused,
        num_prompts=[*([before["prompts"]] if before.get("prompts") else []), *(s["num_prompts"] for s in selections)],
    )
    counts = account.counts(of)
    old_sources, old_files = licensed(base, pipeline) if base else ([], [])
    files = [_manifest_file(file, source) for d, source in zip(drafts, sources, strict=True) for file in d.files]
    told = [one for one in old.get("report", []) if "source" in one]
    told += [{"source": source.path, **d.report} for d, source in zip(drafts, sources, strict=True) if d.report]
    if corrections := account.correction_report():
        told.append({"corrections": corrections})
    additions = list(old.get("additions", []))
    if base is not None:
        additions.append({"sources": [source.path for source in sources], "pairs": counts.pairs - base.rows})
    settings = [source.model_dump(mode="json") for source in sources]
    return Made(
        gathered.kind,
        [*old_sources, *settings],
        [*old_files, *files],
        [file._asdict() for file in evals],
        additions,
        counts,
        _most_first(account.reasons),
        _most_first(unused),
        told,
    )


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _drafted(source: SourceConfig, how: Drafting, work: Path, tell: Tell, watch: Watch) -> Draft:
    if (kept := kept_draft(work, source, how)) is not None:
        tell(f"{source.path} was read before the build was stopped")
        return kept
    tell(f"reading {source.path}")
    with watch.staged(f"reading {source.path}"):
        return drafted_source(work, source, how, lambda rows, share: watch.look(rows, rows / share if share else None))


def _manifest_file(file: SourceFile, source: SourceConfig) -> dict[str, Any]:
    return {**file._asdict(), "format": source.format, "license": source.license}


def _unchanged(base: Base, pipeline: Pipeline, kind: Kind, *, check: bool) -> Built:
    """Nothing to do but what a kill left over, and settings of later steps, which the manifest learns."""
    dataset, manifest = base.dataset, base.manifest
    wanted = {**pipeline.as_manifest(), "kind": kind}
    wanted["sources"], files = licensed(base, pipeline)  # in the order of the tables
    if (manifest["pipeline"], manifest["sources"]) != (wanted, files) and not check:
        with locked(dataset):
            write_json(dataset / MANIFEST, {**manifest, "pipeline": wanted, "sources": files})
            renew_papers(dataset)
    # of a kill, not of somebody at work
    if not check and left_behind(dataset) and (lock := take_lock(dataset)) is not None:
        clear_left_behind(dataset)
        renew_papers(dataset)
        give_lock(dataset, lock)
    counts, reasons, unused, report = (manifest[name] for name in ("counts", "reasons", "unused", "report"))
    return Built(
        pipeline.dataset, kind, counts, _most_first(reasons), _most_first(unused), report, True, False, None, {}
    )
