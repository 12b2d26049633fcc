"""`prefkit build`: sources -> pairs -> validate -> dedupe -> split -> dataset, top to bottom in that order.

Every row read is accounted for. Pairs and corrections: rows = pairs + dropped + rejects. Candidates: candidates = used
+ unused + rejects, and prompts = prompts with a pair + prompts in dropped. Two builds of one pipeline write the same
bytes.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.config import PairsConfig, Pipeline, SourceConfig
from prefkit.corrections import correction_report
from prefkit.dedupe import dedupe_pairs
from prefkit.detection import with_formats
from prefkit.drafts import Drafted, draft_source, files_of, keep_draft, kept_draft
from prefkit.errors import ConfigError, DatasetError, PrefkitError
from prefkit.format import CARD, FORMAT_VERSION, MANIFEST, VIEWS, Kind
from prefkit.formats import FORMATS
from prefkit.formats.reading import Family
from prefkit.locks import give_lock, leave_no_empty_directory, locked, take_lock
from prefkit.sources import SourceFile, is_chat_source, source_sha256
from prefkit.split import split_pairs
from prefkit.store import (
    DRAFTS,
    are_plain,
    built_beside,
    check_parts,
    claim_directory,
    clear_left_behind,
    clear_scratch,
    left_behind,
    newer_format,
    read_manifest,
    write_json,
    write_table,
    write_text,
    write_views,
)
from prefkit.text import with_pair_ids
from prefkit.validate import validate_pairs
from prefkit.views import views_sql

Tell = Callable[[str], None]
# who can use what a pipeline says of pairs; length_cap is for all
SCORED: Sequence[Family] = ("candidates", "comparisons", "pairs")
OF_CANDIDATES = ("chosen", "rejected", "max_pairs_per_prompt", "scorers", "scorers_agree", "seed")
USED_BY: Mapping[str, Sequence[Family]] = {
    **dict.fromkeys(OF_CANDIDATES, SCORED[:1]),
    **dict.fromkeys(("min_margin", "max_margin", "min_chosen_score"), SCORED),
    "min_agreement": ("comparisons",),
}


class Counts(NamedTuple):
    """What became of everything that was read; `check` holds the accounting equations."""

    rows: int  # rows of pair, comparison and correction sources, as their files were read: each becomes one record
    pairs: int
    dropped: int  # rows of the dropped table
    rejects: int
    candidates: int  # candidates of candidate sources, a list-form row counted once each
    candidate_rejects: int
    used: int
    unused: int
    candidate_pairs: int  # pairs made of candidates
    candidate_dropped: int  # rows of the dropped table that stem from candidates: pairs, or prompts without one
    prompts: int  # distinct prompts of candidate sources
    prompts_with_pair: int
    prompts_dropped: int
    train: int
    test: int

    def check(self) -> None:
        """The equations of the format: nothing is lost."""
        paired = self.pairs - self.candidate_pairs
        dropped = self.dropped - self.candidate_dropped
        assert self.rows == paired + dropped + (self.rejects - self.candidate_rejects), self
        assert self.candidates == self.used + self.unused + self.candidate_rejects, self
        assert self.prompts == self.prompts_with_pair + self.prompts_dropped, self
        assert self.pairs == self.train + self.test, self


class Tables(NamedTuple):
    """All that a build makes, before anything is written."""

    kind: Kind
    pairs: pl.DataFrame
    dropped: pl.DataFrame
    rejects: pl.DataFrame
    files: list[dict[str, Any]]
    counts: Counts
    reasons: dict[str, int]
    unused: dict[str, int]
    report: list[dict[str, Any]]  # by source: what selection or rules did, and advice


class Built(NamedTuple):
    """What `build_dataset` returns. `unchanged`: the dataset was already there, nothing was written."""

    dataset: str
    kind: Kind
    counts: dict[str, int]
    reasons: dict[str, int]
    unused: dict[str, int]
    report: list[dict[str, Any]]
    unchanged: bool
    checked_only: bool


def build_dataset(pipeline: Pipeline, *, check: bool = False, tell: Tell = lambda _text: None) -> Built:
    """Build the dataset of a pipeline, or with `check` only say what would be built.

    Raises:
        ConfigError: a setting of pairs that no source can use.
        SourceError: a source cannot be read, or too many of its lines are rejects.
        DatasetError: the dataset directory is not ours, or another prefkit is writing to it.
        MachineError: the disk is full.
    """
    dataset = Path(pipeline.dataset)
    claim_directory(dataset)
    refuse_repaired(dataset)
    pipeline = resolve_formats(pipeline, tell)
    refuse_without_effect(pipeline)
    kind = resolve_kind(pipeline)
    if check:
        return _built(pipeline, make_tables(pipeline, kind, tell), checked_only=True)
    if (finished := _same_build(dataset, pipeline, kind)) is not None:
        return finished
    for source in pipeline.sources:
        files_of(source)  # a path that names nothing is found before anything is made or read
    existed = dataset.exists()
    try:
        with locked(dataset):
            clear_scratch(dataset)
            tables = make_tables(pipeline, kind, tell, dataset)
            write_dataset(dataset, pipeline, tables)
    except PrefkitError:
        if not existed:
            leave_no_empty_directory(dataset)
        raise
    return _built(pipeline, tables)


def _built(pipeline: Pipeline, tables: Tables, *, checked_only: bool = False) -> Built:
    counts = tables.counts._asdict()
    return Built(
        pipeline.dataset, tables.kind, counts, tables.reasons, tables.unused, tables.report, False, checked_only
    )


def resolve_formats(pipeline: Pipeline, tell: Tell = lambda _text: None) -> Pipeline:
    """The pipeline with the format of every source; one that it leaves out is found by the first rows, and told.

    Raises:
        SourceError: none or several fit.
    """
    found = with_formats(pipeline.sources, pipeline.validate_.max_reject_share)
    for source, why in found:
        if why:
            tell(f"{source.path}: format {source.format}, as {why}")
    return pipeline.model_copy(update={"sources": [source for source, _ in found]})


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


def refuse_without_effect(pipeline: Pipeline) -> None:
    """Refuse what a pipeline says of pairs where none of its sources, whose formats are known, can use it.

    What is said as it is by default does no harm, and stands in every manifest.

    Raises:
        ConfigError: by the name of the key.
    """
    families = {FORMATS[str(source.format)].family for source in pipeline.sources}
    defaults = PairsConfig()
    for key in USED_BY:
        if getattr(pipeline.pairs, key) != getattr(defaults, key) and not families & set(USED_BY[key]):
            what = " or ".join(USED_BY[key])
            raise ConfigError(
                f"has no effect: no source holds {what}",
                where=f"pairs.{key}",
                expected=f"a source of {what}",
                hint="leave the key out; prefkit formats says what each format holds",
            )


def resolve_kind(pipeline: Pipeline) -> Kind:
    """The pipeline's own kind, or what its sources hold: chat if one begins with messages or transcripts, else text."""
    return pipeline.kind or ("chat" if any(is_chat_source(source) for source in pipeline.sources) else "text")


def make_tables(pipeline: Pipeline, kind: Kind, tell: Tell = lambda _text: None, keep_in: Path | None = None) -> Tables:
    """The whole road: everything that a build writes, and its accounting.

    Args:
        pipeline: what to build.
        kind: of the dataset.
        tell: called with lines for a person.
        keep_in: a dataset directory that keeps each source's draft, so that a build that is stopped goes on from there.
    """
    drafted = [_drafted(source, pipeline, kind, tell, keep_in) for source in pipeline.sources]
    tell("validating, deduplicating and splitting")
    drafts = with_pair_ids(pl.concat([d.pairs for d in drafted]), kind)
    limits, dedupe = pipeline.validate_, pipeline.dedupe
    valid = validate_pairs(
        drafts, kind, limits.max_chars, limits.score_scale, meta_phrases=limits.meta_phrases == "drop"
    )
    unique = dedupe_pairs(
        valid.kept, kind, exact=dedupe.exact, contradictions=dedupe.contradictions, cycles=dedupe.cycles
    )
    pairs = split_pairs(unique.kept, kind, pipeline.split.test_share, pipeline.split.seed)
    without = [d.dropped for d in drafted]
    dropped = pl.concat([*without, valid.dropped, unique.dropped], how="diagonal")
    rejects = pl.concat([d.rejects for d in drafted])
    counts = _count(drafted, drafts, pairs, dropped, rejects)
    counts.check()
    reasons = Counter(dropped["reason"].to_list()) + Counter(rejects["reason"].to_list())
    unused = sum((Counter(d.selection.unused) for d in drafted if d.selection), Counter[str]())
    files = [
        _manifest_file(file, source) for d, source in zip(drafted, pipeline.sources, strict=True) for file in d.files
    ]
    told = [
        {"source": source.path, **d.report} for d, source in zip(drafted, pipeline.sources, strict=True) if d.report
    ]
    if corrections := correction_report(pairs):
        told.append({"corrections": corrections})
    return Tables(kind, pairs, dropped, rejects, files, counts, _most_first(reasons), _most_first(unused), told)


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _drafted(source: SourceConfig, pipeline: Pipeline, kind: Kind, tell: Tell, keep_in: Path | None) -> Drafted:
    settings, share = pipeline.pairs, pipeline.validate_.max_reject_share
    if keep_in is not None and (kept := kept_draft(keep_in, source, kind, settings, share)) is not None:
        tell(f"{source.path} was read before the build was stopped")
        return kept
    tell(f"reading {source.path}")
    drafted = draft_source(source, kind, settings, share, pipeline.build.num_bytes(), keep_in and keep_in / DRAFTS)
    if keep_in is not None:
        keep_draft(keep_in, source, kind, settings, drafted)
    return drafted


def _manifest_file(file: SourceFile, source: SourceConfig) -> dict[str, Any]:
    return {**file._asdict(), "format": source.format}


def _count(
    drafted: list[Drafted], drafts: pl.DataFrame, pairs: pl.DataFrame, dropped: pl.DataFrame, rejects: pl.DataFrame
) -> Counts:
    chosen_from = [d.selection for d in drafted if d.selection is not None]
    of_candidates = [d for d in drafted if d.selection is not None]
    candidate_rejects = sum(d.rejects.height for d in of_candidates)
    best_of_n = pl.col("method") == "best_of_n"
    prompts = set(drafts.filter(best_of_n)["prompt_id"]).union(
        *(set(d.dropped.filter(best_of_n)["prompt_id"]) for d in of_candidates)
    )
    with_pair = set(pairs.filter(best_of_n)["prompt_id"])
    without = set(dropped.filter(best_of_n)["prompt_id"]) - with_pair
    test = pairs.filter(pl.col("split") == "test").height
    return Counts(
        rows=sum(file.rows for d in drafted if d.selection is None for file in d.files),
        pairs=pairs.height,
        dropped=dropped.height,
        rejects=rejects.height,
        candidates=sum(d.num_records for d in of_candidates) + candidate_rejects,
        candidate_rejects=candidate_rejects,
        used=sum(s.num_used for s in chosen_from),
        unused=sum(sum(s.unused.values()) for s in chosen_from),
        candidate_pairs=pairs.filter(best_of_n).height,
        candidate_dropped=dropped.filter(best_of_n).height,
        prompts=len(prompts),
        prompts_with_pair=len(with_pair),
        prompts_dropped=len(without),
        train=pairs.height - test,
        test=test,
    )


def _same_build(dataset: Path, pipeline: Pipeline, kind: Kind) -> Built | None:
    """The finished dataset of the very same settings and source bytes, if that is what lies there."""
    if not (dataset / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(dataset)
    except DatasetError:
        if newer_format(dataset):
            raise
        return None  # torn or damaged: it is built anew
    wanted = {**pipeline.as_manifest(), "kind": kind}
    built_by = (manifest.get("format_version"), manifest.get("prefkit_version"))
    if built_by != (FORMAT_VERSION, __version__) or not _same_data_settings(manifest["pipeline"], wanted):
        return None
    try:
        for name, parts in manifest["parts"].items():
            check_parts(dataset / name, parts)
    except DatasetError:
        return None  # a damaged dataset is built anew
    recorded = [(file["path"], file["sha256"]) for file in manifest["sources"]]
    if recorded != [(path, source_sha256(path)) for source in pipeline.sources for path in files_of(source)]:
        return None
    later = manifest["pipeline"] != wanted  # settings of later steps only: the data stays, the manifest learns them
    if later:
        with locked(dataset):
            write_json(dataset / MANIFEST, manifest | {"pipeline": wanted})
    if left_behind(dataset) and (lock := take_lock(dataset)) is not None:  # of a kill, not of somebody at work
        clear_left_behind(dataset)
        write_views(dataset, kind)
        give_lock(dataset, lock)
    counts, reasons, unused, report = (manifest[name] for name in ("counts", "reasons", "unused", "report"))
    return Built(pipeline.dataset, kind, counts, _most_first(reasons), _most_first(unused), report, True, False)


def _same_data_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two pipelines build the same tables: audit, precompute and train do not touch them."""
    later = ("audit", "precompute", "train")
    return {k: v for k, v in old.items() if k not in later} == {k: v for k, v in new.items() if k not in later}


def write_dataset(dataset: Path, pipeline: Pipeline, tables: Tables) -> None:
    """Write all tables and, last, the manifest. reference/ and runs/ of an earlier build stay."""
    with built_beside(dataset) as beside:
        _write_tables(beside, pipeline, tables)
    write_views(dataset, tables.kind)


def _write_tables(folder: Path, pipeline: Pipeline, tables: Tables) -> None:
    named = {"pairs": tables.pairs, "dropped": tables.dropped, "rejects": tables.rejects}
    plain = are_plain([tables.pairs, tables.dropped])
    parts = {name: write_table(folder / name, name, frame, tables.kind, plain=plain) for name, frame in named.items()}
    write_text(folder / CARD, dataset_card(tables))
    write_text(folder / VIEWS, views_sql(tables.kind, named.keys()))
    manifest = {
        "format_version": FORMAT_VERSION,
        "prefkit_version": __version__,
        "kind": tables.kind,
        "pipeline": {**pipeline.as_manifest(), "kind": tables.kind},
        "sources": tables.files,
        "counts": tables.counts._asdict(),
        "reasons": tables.reasons,
        "unused": tables.unused,
        "report": tables.report,
        "parts": {name: [part._asdict() for part in listed] for name, listed in parts.items()},
    }
    write_json(folder / MANIFEST, manifest)


def dataset_card(tables: Tables) -> str:
    """The README.md inside the dataset: what it holds, in counts, and where it came from."""
    counts = tables.counts
    sources = "".join(f"| {file['path']} | {file['format']} | {file['rows']} |\n" for file in tables.files)
    reasons = "".join(f"| {reason} | {count} |\n" for reason, count in tables.reasons.items())
    return (
        f"# Preference pairs ({tables.kind})\n\n"
        f"{counts.pairs} pairs ({counts.train} train, {counts.test} test), built by prefkit {__version__}.\n\n"
        f"| source | format | rows |\n|---|---|---|\n{sources}\n"
        f"| dropped or rejected because | rows |\n|---|---|\n{reasons}\n"
        "`pairs/` holds the pairs, `dropped/` and `rejects/` everything that was left out and why, `manifest.json`\n"
        "the settings and the hash of every file. `views.sql` gives DuckDB a view a table, run from this directory.\n"
    )
