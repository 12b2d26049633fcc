"""A source becomes draft pairs, and a build that was stopped does not read that source again.

Comes in: one source of the pipeline. Goes out: its pairs, drops and rejects, before anything compares them with those
of other sources. Each draft is kept in DATASET/.drafts/<key>/ until the dataset is finished; the key hashes the
source's settings and the bytes of its files, so a changed file is read anew.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.config import SourceConfig
from prefkit.errors import DatasetError, SourceError
from prefkit.format import Kind, canonical_json, schema
from prefkit.formats import FORMATS
from prefkit.pairs import best_versus_worst, corrected_pairs, ready_pairs
from prefkit.sources import SourceFile, expand, load_source, source_sha256
from prefkit.store import DRAFTS, folder_beside, read_json, write_json, write_parquet
from prefkit.text import printable

MAX_KEYS, MAX_KEY_CHARS = 12, 40  # of a row, named in a message
DESCRIPTION = "check format: and columns: of this source, or prefkit formats"
ENCODING = "save the file as UTF-8: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE, if it is Latin-1"
FRAMES = ("pairs", "dropped", "rejects")


class Selection(NamedTuple):
    """What became of the candidates of a source."""

    num_prompts: int
    num_used: int
    unused: dict[str, int]


class Drafted(NamedTuple):
    """What one source gave. `num_records`: rows that became a record; `selection`: None but for candidates."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    rejects: pl.DataFrame
    num_records: int
    files: list[SourceFile]
    selection: Selection | None


def draft_source(source: SourceConfig, kind: Kind, min_margin: float, max_reject_share: float) -> Drafted:
    """Read a source and make its pairs.

    Raises:
        SourceError: it cannot be read, holds no row, or too many of its rows are rejects.
    """
    loaded = load_source(source, kind)
    _stop_at_rejects(source, loaded.rejects, loaded.records.height, max_reject_share)
    nothing = pl.DataFrame(schema={name: t for name, t in schema("dropped", kind).items() if name != "split"})
    rest = loaded.rejects, loaded.records.height, loaded.files
    family = FORMATS[source.format].family
    if family == "candidates":
        chosen = best_versus_worst(loaded.records, kind, source.direction, min_margin)
        pairs = chosen.pairs.with_columns(pl.lit(source.annotator, pl.String).alias("annotator"))
        return Drafted(
            pairs, chosen.dropped, *rest, Selection(chosen.num_prompts, chosen.num_used, dict(chosen.unused))
        )
    if family == "corrections":
        return Drafted(corrected_pairs(loaded.records), nothing, *rest, None)
    return Drafted(ready_pairs(loaded.records, source.direction), nothing, *rest, None)


def _stop_at_rejects(source: SourceConfig, rejects: pl.DataFrame, num_records: int, limit: float) -> None:
    """Too many rejects mean that the source was described wrongly: stop before anything is written."""
    bad = rejects.height
    total = num_records + bad
    if not total:
        raise SourceError("holds no row", where=source.path, expected=FORMATS[source.format].fields)
    if bad <= limit * total:
        return
    rows = rejects.to_dicts()
    reasons = Counter(f"{row['reason']} ({row['field'] or 'whole line'})" for row in rows)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    several = len(expand(source.path)) > 1
    first = ", ".join(f"{row['source']}:{row['line']}" if several else str(row["line"]) for row in rows[:10])
    found = next(filter(None, (_keys_found(row["raw"]) for row in rows[:10])), "")
    raise SourceError(
        f"{bad} of {total} rows could not become a record: {listed}; first lines: {first}{found}",
        where=source.path,
        expected=f"{FORMATS[source.format].fields}; at most a share of {limit:g} rejects (validate.max_reject_share)",
        hint=ENCODING if reasons.most_common(1)[0][0].startswith("not_utf8") else DESCRIPTION,
    )


def _keys_found(raw: str) -> str:
    """The keys of a rejected row, and of its first message if it has any: they say what the file really holds."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(row, dict) or not row:
        return ""
    items = next((v[0] for v in row.values() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    within = f" (items of a list: {_named(items)})" if items else ""
    return f"; a row has the keys {_named(row)}{within}"


def _named(row: dict[str, Any]) -> str:
    return ", ".join(printable(key[:MAX_KEY_CHARS]) for key in [*row][:MAX_KEYS])


def draft_key(source: SourceConfig, kind: Kind, min_margin: float, digests: list[tuple[str, str]]) -> str:
    """All that decides a draft: the source's settings and the path and sha256 of each of its files."""
    settings = source.model_dump(mode="json")
    return hashlib.sha256(canonical_json([__version__, settings, kind, min_margin, digests]).encode()).hexdigest()[:16]


def keep_draft(dataset: Path, source: SourceConfig, kind: Kind, min_margin: float, drafted: Drafted) -> None:
    """Write a draft for the case that the build is stopped."""
    key = draft_key(source, kind, min_margin, [(file.path, file.sha256) for file in drafted.files])
    with folder_beside(dataset / DRAFTS / key) as beside:
        for name in FRAMES:
            write_parquet(beside / f"{name}.parquet", getattr(drafted, name))
        selection = drafted.selection and drafted.selection._asdict()
        files = [file._asdict() for file in drafted.files]
        write_json(beside / "draft.json", {"num_records": drafted.num_records, "files": files, "selection": selection})


def kept_draft(
    dataset: Path, source: SourceConfig, kind: Kind, min_margin: float, max_reject_share: float
) -> Drafted | None:
    """The draft that a stopped build left of this very source, if it left a whole one.

    Raises:
        SourceError: the source cannot be read, or too many of its rows are rejects.
    """
    if not (dataset / DRAFTS).exists():
        return None
    digests = [(path, source_sha256(path)) for path in expand(source.path)]
    drafted = _read_draft(dataset / DRAFTS / draft_key(source, kind, min_margin, digests))
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
        return Drafted(pairs, dropped, rejects, told["num_records"], files, selection)
    except (DatasetError, OSError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
