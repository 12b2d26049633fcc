"""Which format a source has where the pipeline does not say: what the first rows fit, and why; never a guess among two.

Comes in: a source without `format:`. Goes out: the format's name and the reason in words, or an error that lists what
was found. A format takes part only if it says of itself how its rows can be told from all others (`Format.detect`).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.formats import FORMATS
from prefkit.rows import read_rows
from prefkit.sources import expand, scorers_say
from prefkit.text import printable

SAMPLE = 50  # rows
MOST_STRAYS = 0.5  # of them, whatever share of rejects the pipeline allows
MAX_KEYS, MAX_KEY_CHARS = 12, 40  # of a row, named in a message
EXAMPLE = "format: candidates, columns: {prompt: question, response: answer, score: rating}"


class Detected(NamedTuple):
    """A format's name, and what of the rows says so."""

    format: str
    why: str


def fitting(rows: Iterable[Mapping[str, Any]], strays: float = 0.0) -> list[Detected]:
    """The formats that the rows fit, all but a share of `strays` at most; none for no rows."""
    reasons: dict[str, list[str]] = {}
    total = 0
    for row in rows:
        total += 1
        for name, form in FORMATS.items():
            if form.detect is not None and (why := form.detect(row)):
                reasons.setdefault(name, []).append(why)
    return [Detected(name, given[0]) for name, given in reasons.items() if total - len(given) <= strays * total]


def detect_format(path: str, max_reject_share: float = 0.1) -> Detected:
    """The one format that the first rows of a file or glob fit.

    Args:
        path: file or glob.
        max_reject_share: of them that need not fit, as they may be rejects later; above MOST_STRAYS it counts as that.

    Raises:
        SourceError: none or several fit, or there is no row to look at.
    """
    every = (row.value for file in expand(path) for row in read_rows(file) if row.reason is None)
    rows = [*islice(every, SAMPLE)]
    if not rows:
        hint = scorers_say(path) or "check the file"
        raise SourceError("holds no row that could say what format it has", where=path, hint=hint)
    fits = fitting(rows, min(max_reject_share, MOST_STRAYS))
    if not fits:
        raise SourceError(
            f"no format is known by its rows; they have {keys_found(rows[0])}",
            where=path,
            expected="format: and columns: of this source",
            hint=f"prefkit formats lists them; for example {EXAMPLE}",
        )
    if len(fits) > 1:
        listed = "; ".join(f"{found.format}, as {found.why}" for found in fits)
        raise SourceError(
            f"{len(fits)} formats fit: {listed}", where=path, expected="format:, which says what is meant"
        )
    return fits[0]


def with_formats(sources: Sequence[SourceConfig], max_reject_share: float) -> list[tuple[SourceConfig, str]]:
    """Each source with its format filled in, and why it is that one (empty where the pipeline says it)."""
    found = [
        (source, None if source.format is not None else detect_format(source.path, max_reject_share))
        for source in sources
    ]
    return [
        (source, "") if seen is None else (source.model_copy(update={"format": seen.format}), seen.why)
        for source, seen in found
    ]


def keys_found(row: Mapping[str, Any]) -> str:
    """The keys of a row, and of the first item of its first list of objects: what the file really holds."""
    items = next((v[0] for v in row.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)), None)
    within = f" (items of a list: {_named(items)})" if items else ""
    return f"the keys {_named(row)}{within}"


def _named(row: Mapping[str, Any]) -> str:
    return ", ".join(printable(str(key)[:MAX_KEY_CHARS]) for key in [*row][:MAX_KEYS])
