"""What every format module is made of: a row of a file in, the fields of one or more records out.

A reader is a pure function from a decoded row to plain dicts whose keys are the fields of a model in `records.py`. It
decides where the prompt ends and which side is the better one, and nothing else; types are checked afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = Mapping[str, str | list[str]]  # an empty path: the file says nothing of it
Reader: TypeAlias = Callable[[Row, Columns], list[dict[str, Any]]]
Family: TypeAlias = Literal["pairs", "candidates", "corrections", "responses", "comparisons"]


class Unreadable(Exception):  # noqa: N818 - it becomes a reject, not an error that anyone sees
    """A row that cannot become a record: `field` is at fault (None: the whole row), `reason` is the rule's name."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class Format(NamedTuple):
    """One outside format: its name in a pipeline, the kind of record it gives, its fields, and its reader.

    `columns`: our names that a pipeline's `columns:` may map; `scored`: whether the source may set `direction:`;
    `direction`: which score, rank or label is the better one, in words, where the format itself says so; `detect`: why
    a row has this layout, in words, or None where it has not (no `detect`: it is never guessed).
    """

    name: str
    family: Family
    columns: tuple[str, ...]
    scored: bool
    fields: str
    note: str
    read: Reader
    is_chat: Callable[[Row, Columns], bool]
    direction: str = ""
    detect: Callable[[Row], str | None] | None = None


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


def read_fields(row: Row, columns: Columns, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """The fields of a record under our names; optional ones where the row says something.

    A prompt of several paths is their texts, a line each, without those that are empty. An optional field whose path is
    empty is left out.
    """
    record = {name: _field(row, columns, name) for name in required}
    for name in optional:
        value = (
            (None if columns[name] == "" else require(row, str(columns[name]))) if name in columns else row.get(name)
        )
        if value is not None and value != "":  # an empty cell of a .csv says nothing
            record[name] = value
    return record


def _field(row: Row, columns: Columns, name: str) -> Any:
    where = columns.get(name, name)
    return require(row, str(where)) if name != "prompt" or isinstance(where, str) else prompt_of(row, columns)


def prompt_of(row: Row, columns: Columns) -> Any:
    """The prompt at its path, or the texts at its paths, a line each (Alpaca's instruction and input)."""
    where = columns.get("prompt", "prompt")
    if not isinstance(where, list):
        return require(row, where)
    parts = [require(row, path) for path in where]
    if wrong := next((path for path, part in zip(where, parts, strict=True) if not isinstance(part, str | None)), None):
        raise Unreadable(wrong, "wrong_type")
    return "\n".join(part for part in parts if part)


def is_chat_field(row: Row, columns: Columns, name: str, *, of_list: bool = False) -> bool:
    """Whether a field (of a list of values: its first) holds messages."""
    where = columns.get(name, name)
    try:
        value = dig(row, where if isinstance(where, str) else where[0])
    except KeyError:
        return False
    if of_list and isinstance(where, str):
        value = value[0] if isinstance(value, list) and value else None
    return isinstance(value, list)
