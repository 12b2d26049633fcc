"""A source becomes draft pairs, and a build that was stopped does not read that source again.

Comes in: one source of the pipeline. Goes out: its pairs, drops and rejects, before anything compares them with those
of other sources. Each draft is kept in DATASET/.drafts/<key>/ until the dataset is finished; the key hashes the
source's settings and the bytes of its files, so a changed file is read anew.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.candidates import MEMORY_LIMIT, select_candidates
from prefkit.comparisons import compared_pairs
from prefkit.config import PairsConfig, SourceConfig
from prefkit.corrections import Rule, corrected_pairs, rewrite_responses
from prefkit.detection import fitting, keys_found
from prefkit.errors import DatasetError, SourceError, located
from prefkit.format import Kind, canonical_json
from prefkit.pairing import Rules
from prefkit.pairs import Bounds, as_dropped, bounded_pairs, ready_pairs
from prefkit.rewriting import make_rules, module_files
from prefkit.sources import CHANGED, SourceFile, expand, format_of, load_source, read_source, source_sha256
from prefkit.store import DRAFTS, folder_beside, read_json, write_json, write_parquet
from prefkit.text import printable

DESCRIPTION = "check format: and columns: of this source, or prefkit formats"
LABELS = "labels: {a: [1], b: [2], tie: [0]} of this source says which label stands for which response"
MANY_LABELS, MAX_LABELS = 1_000, 8  # rejects that are looked at, labels that are named
ENCODING = "save the file as UTF-8: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE, if it is Latin-1"
FRAMES = ("pairs", "dropped", "rejects")


class Selection(NamedTuple):
    """What became of the candidates of a source."""

    num_prompts: int
    num_paired_prompts: int
    num_used: int
    unused: dict[str, int]


class Drafted(NamedTuple):
    """What one source gave.

    `num_records`: rows that became a record; `selection`: None but for candidates; `report`: what a person wants to
    know of the source beyond counts, by topic.
    """

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    rejects: pl.DataFrame
    num_records: int
    files: list[SourceFile]
    selection: Selection | None
    report: dict[str, Any]


class Made(NamedTuple):
    """What a family's records became."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    report: Mapping[str, Any] = MappingProxyType({})


def draft_source(
    source: SourceConfig,
    kind: Kind,
    settings: PairsConfig,
    max_reject_share: float,
    memory_limit: int = MEMORY_LIMIT,
    scratch: Path | None = None,
) -> Drafted:
    """Read a source and make its pairs.

    Args:
        source: what to read.
        kind: of the dataset.
        settings: how candidates and comparisons become pairs, and the bounds that all pairs keep to.
        max_reject_share: of its rows, above which it was described wrongly.
        memory_limit: bytes of candidates held in memory; the rest lies in temporary files.
        scratch: folder for these; the system's own if None.

    Raises:
        SourceError: it cannot be read, holds no row, or too many of its rows are rejects.
        ConfigError: a function of its rules cannot be found, or a rule of pairs does not fit its scores.
        MachineError: the disk is full.
    """
    if format_of(source).family == "candidates":
        return _draft_candidates(source, kind, settings, max_reject_share, memory_limit, scratch)
    modules = [SourceFile(path, source_sha256(path), 0) for path in module_files(source.rules)]
    rules = make_rules(source.rules)  # after the hashes: what changes in between is another build, never the same one
    loaded = load_source(source, kind)
    _stop_at_rejects(source, loaded.rejects, loaded.records.height, max_reject_share)
    made = _made(loaded.records, source, kind, settings, rules)
    bounds = Bounds(**{name: getattr(settings, name) for name in Bounds._fields})
    pairs, out_of_bounds = bounded_pairs(made.pairs, kind, source.direction, bounds)
    dropped = pl.concat([made.dropped, out_of_bounds])
    files = [*loaded.files, *modules]
    return Drafted(pairs, dropped, loaded.rejects, loaded.records.height, files, None, dict(made.report))


def _made(
    records: pl.DataFrame, source: SourceConfig, kind: Kind, settings: PairsConfig, rules: Sequence[Rule]
) -> Made:
    nothing = as_dropped(records.clear(), kind)
    match format_of(source).family:
        case "corrections":
            return Made(corrected_pairs(records, kind), nothing)
        case "comparisons":
            return Made(*compared_pairs(records, kind, settings.min_agreement))
        case "responses":
            rewritten = rewrite_responses(records, rules, kind)
            annotator = pl.lit(source.annotator or "rule").alias("annotator")
            pairs = corrected_pairs(rewritten.corrections.with_columns(annotator), kind)
            told = {"num_responses": records.height, "touched": rewritten.touched}
            return Made(pairs, rewritten.dropped, report={"rules": told})
        case family:
            assert family == "pairs"
            return Made(ready_pairs(records, source.direction), nothing)


def _draft_candidates(
    source: SourceConfig, kind: Kind, settings: PairsConfig, limit: float, memory_limit: int, scratch: Path | None
) -> Drafted:
    """Candidates are decided while they are read: a source may be larger than memory."""
    rejects: list[pl.DataFrame] = []
    files: list[SourceFile] = []
    heights: list[int] = []

    def read() -> Iterator[pl.DataFrame]:
        before = {file.path: file for file in files}
        for told in (rejects, files, heights):  # of an earlier reading
            told.clear()
        for block in read_source(source, kind):
            rejects.append(block.rejects)
            heights.append(block.records.height)
            if block.file is not None:
                files.append(block.file)
                if before.get(block.file.path, block.file) != block.file:
                    raise SourceError(CHANGED, where=block.file.path, hint="run the same command again")
            yield block.records

    with located(source.path):
        rules = selection_rules(settings)
        found = select_candidates(read, kind, source.direction, rules, memory_limit, scratch)
    all_rejects = pl.concat(rejects)
    _stop_at_rejects(source, all_rejects, sum(heights), limit)
    pairs = found.pairs.with_columns(pl.lit(source.annotator, pl.String).alias("annotator"))
    selection = Selection(found.num_prompts, found.num_paired_prompts, found.num_used, found.unused)
    report = {"candidates": found.report}
    return Drafted(pairs, found.dropped, all_rejects, sum(heights), files, selection, report)


def selection_rules(settings: PairsConfig) -> Rules:
    """The settings as the values that decide."""
    rule, _, sigma = settings.rejected.partition(":")
    shared = {name: getattr(settings, name) for name in Rules._fields if name in PairsConfig.model_fields}
    return Rules(**shared | {"rejected": rule, "sigma": float(sigma or 0)})


def _stop_at_rejects(source: SourceConfig, rejects: pl.DataFrame, num_records: int, limit: float) -> None:
    """Too many rejects mean that the source was described wrongly: stop before anything is written."""
    bad = rejects.height
    total = num_records + bad
    if not total:
        raise SourceError("holds no row", where=source.path, expected=format_of(source).fields)
    if bad <= limit * total:
        return
    rows = rejects.to_dicts()
    reasons = Counter(f"{row['reason']} ({row['field'] or 'whole line'})" for row in rows)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    several = len(expand(source.path)) > 1
    first = ", ".join(f"{row['source']}:{row['line']}" if several else str(row["line"]) for row in rows[:10])
    found, better = _look_at([row["raw"] for row in rows[:10]])
    found += _labels_found(rows)
    most = reasons.most_common(1)[0][0].partition(" ")[0]
    usual = {"not_utf8": ENCODING, "unknown_label": LABELS}.get(most, DESCRIPTION)
    raise SourceError(
        f"{bad} of {total} rows could not become a record: {listed}; first lines: {first}{found}",
        where=source.path,
        expected=f"{format_of(source).fields}; at most a share of {limit:g} rejects (validate.max_reject_share)",
        hint=usual if not better or better.startswith(f"format: {source.format} ") else better,
    )


def _labels_found(rows: Sequence[Mapping[str, Any]]) -> str:
    """The labels that the first rows have where nobody said what they mean."""
    unknown = [row for row in rows if row["reason"] == "unknown_label"][:MANY_LABELS]
    values = [_object(row["raw"]) for row in unknown]
    given = [
        v[row["field"]] for v, row in zip(values, unknown, strict=True) if isinstance(v, dict) and row["field"] in v
    ]
    labels = {printable(str(one)[:40]) for value in given for one in (value if isinstance(value, list) else [value])}
    return f"; labels: {', '.join(sorted(labels)[:MAX_LABELS])}" if labels else ""


def _look_at(raws: Sequence[str]) -> tuple[str, str]:
    """What rejected rows hold (`; a row has the keys ...`), and a format that all fit (`format: trl fits, as ...`)."""
    rows = [row for raw in raws if isinstance(row := _object(raw), dict) and row]
    if not rows:
        return "", ""
    fits = fitting(rows)
    better = (
        f"format: {fits[0].format} fits, as {fits[0].why}; prefkit formats lists all"
        if len(fits) == 1 and len(rows) == len(raws)
        else ""
    )
    return f"; a row has {keys_found(rows[0])}", better


def _object(raw: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def files_of(source: SourceConfig) -> list[str]:
    """Every file that decides what a source gives: its data, and the modules of its rules."""
    return [*expand(source.path), *module_files(source.rules)]


def draft_key(source: SourceConfig, kind: Kind, settings: PairsConfig, digests: list[tuple[str, str]]) -> str:
    """All that decides a draft: the source's settings and the path and sha256 of each of its files."""
    told = [__version__, source.model_dump(mode="json"), kind, settings.model_dump(mode="json"), digests]
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:16]


def keep_draft(dataset: Path, source: SourceConfig, kind: Kind, settings: PairsConfig, drafted: Drafted) -> None:
    """Write a draft for the case that the build is stopped."""
    key = draft_key(source, kind, settings, [(file.path, file.sha256) for file in drafted.files])
    with folder_beside(dataset / DRAFTS / key) as beside:
        for name in FRAMES:
            write_parquet(beside / f"{name}.parquet", getattr(drafted, name))
        selection = drafted.selection and drafted.selection._asdict()
        files = [file._asdict() for file in drafted.files]
        told = {"num_records": drafted.num_records, "files": files, "selection": selection, "report": drafted.report}
        write_json(beside / "draft.json", told)


def kept_draft(
    dataset: Path, source: SourceConfig, kind: Kind, settings: PairsConfig, max_reject_share: float
) -> Drafted | None:
    """The draft that a stopped build left of this very source, if it left a whole one.

    Raises:
        SourceError: the source cannot be read, or too many of its rows are rejects.
    """
    if not (dataset / DRAFTS).exists():
        return None
    digests = [(path, source_sha256(path)) for path in files_of(source)]
    drafted = _read_draft(dataset / DRAFTS / draft_key(source, kind, settings, digests))
    if drafted is not None:
        _stop_at_rejects(source, drafted.rejects, drafted.num_records, max_reject_share)
    return drafted


def _read_draft(folder: Path) -> Drafted | None:
    """A draft, or None where it is missing or damaged: then the source is read anew."""
    try:
        told = read_json(folder / "draft.json")
        pairs, dropped, rejects = (pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in FRAMES)
        selection = Selection(**told["selection"]) if told["selection"] else None
        files = [SourceFile(**file) for file in told["files"]]
        return Drafted(pairs, dropped, rejects, told["num_records"], files, selection, told["report"])
    except (DatasetError, OSError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
