"""Rejects of a source: kept count of, and the reason to stop where they are too many.

Comes in: frames of rejects. Goes out: an error that names lines, reasons, keys and a better format, or nothing.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from prefkit.config import SourceConfig
from prefkit.detection import fitting, keys_found
from prefkit.errors import SourceError
from prefkit.sources import expand, format_of, scorers_say
from prefkit.text import printable

DESCRIPTION = "check format: and columns: of this source, or prefkit formats"
LABELS = "labels: {a: [1], b: [2], tie: [0]} of this source says which label stands for which response"
MANY_LABELS, MAX_LABELS = 1_000, 8  # rejects that are looked at, labels that are named
ENCODING = "save the file as UTF-8: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE, if it is Latin-1"


class Rejected:
    """How many rejects there are for which reason, and the first of them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.reasons: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, rejects: pl.DataFrame) -> None:
        """Take rejects into account."""
        if rejects.height:
            named = rejects.select(pl.format("{} ({})", "reason", pl.col("field").fill_null("whole line")))
            self.reasons.update(named.to_series().to_list())
            self.first += rejects.head(MANY_LABELS - len(self.first)).to_dicts()

    def stop_at(self, source: SourceConfig, num_records: int, limit: float) -> None:
        """Too many rejects mean that the source was described wrongly: stop before anything is written.

        Raises:
            SourceError: their share is above the limit, or there is no row at all.
        """
        bad = self.reasons.total()
        total = num_records + bad
        if not total:
            fields = format_of(source).fields
            raise SourceError("holds no row", where=source.path, expected=fields, hint=scorers_say(source.path))
        if bad <= limit * total:
            return
        listed = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        several = len(expand(source.path)) > 1
        first = ", ".join(f"{row['source']}:{row['line']}" if several else str(row["line"]) for row in self.first[:10])
        found, better = _look_at([row["raw"] for row in self.first[:10]])
        found += _labels_found(self.first)
        most = self.reasons.most_common(1)[0][0].partition(" ")[0]
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
