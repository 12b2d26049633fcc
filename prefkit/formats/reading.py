"""What every format module is made of: a row of a file in, the fields of one or more records out.

A reader is a pure function from a decoded row to plain dicts whose keys are the fields of a model in `records.py`. It
decides where the prompt ends and which side is the better one, and nothing else; types are checked afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = Mapping[str, str | list[str]]
Family: TypeAlias = Literal["pairs", "candidates", "corrections"]


class Unreadable(Exception):  # noqa: N818 - it becomes a reject, not an error that anyone sees
    """A row that cannot become a record: `field` is at fault (None: the whole row), `reason` is the rule's name."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class Format(NamedTuple):
    """One outside format: its name in a pipeline, the kind of record it gives, its fields, and its reader.

    `columns`: our names that a pipeline's `columns:` may map; `scored`: whether `direction:` means anything.
    """

    name: str
    family: Family
    columns: tuple[str, ...]
    scored: bool
    fields: str
    note: str
    read: Callable[[Row, Columns], list[dict[str, Any]]]
    is_chat: Callable[[Row, Columns], bool]


def dig(row: Row, path: str) -> Any:
    """The value at a dotted path (`answers.0.text`); a key that holds the dots itself wins. Missing: KeyError."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise KeyError(path)
    return value


def require(row: Row, path: str) -> Any:
    """The value at a dotted path, or the reject `missing_field`."""
    try:
        return dig(row, path)
    except KeyError:
        raise Unreadable(path, "missing_field") from None
