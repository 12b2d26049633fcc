"""A field of a row with the type its format says it has, or the reject that names the field.

`require` (reading.py) asks only that a field is there; these ask what is in it as well. Numbers may be written as text,
as every number of a .csv is; true and false are no numbers here, because the labels that formats publish are not.
"""

import math
from collections.abc import Mapping
from typing import Any

from prefkit.formats.comparisons import votes_of
from prefkit.formats.reading import Row, Unreadable, require


def text(row: Row, path: str) -> str:
    """The string at a path."""
    value = require(row, path)
    if not isinstance(value, str):
        raise Unreadable(path, "wrong_type")
    return value


def as_number(value: object) -> float | None:
    """A finite number, or one written as text; None where it is neither.

    Example: `"4.5"` is 4.5, `"N/A"` and `True` are None.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and "_" in value:  # Python's own spelling of numbers
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # overflow: an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def number(row: Row, path: str, low: float = -math.inf, high: float = math.inf) -> float:
    """The number at a path, both bounds included."""
    value = as_number(require(row, path))
    if value is None:
        raise Unreadable(path, "not_a_number")
    if not low <= value <= high:
        raise Unreadable(path, "out_of_range")
    return value


def verdict(row: Row, path: str, meaning: Mapping[str, str]) -> list[str]:
    """The one vote (a | b | tie) that a label at a path stands for; `meaning` is by `label_key`."""
    value = require(row, path)
    if isinstance(value, (list, Mapping)):
        raise Unreadable(path, "wrong_type")
    return votes_of(value, meaning, path)


def objects(row: Row, path: str) -> list[Mapping[str, Any]]:
    """The objects of the list at a path, of which there is at least one."""
    found = _mappings(row, path)
    if not found:
        raise Unreadable(path, "no_responses")
    return found


def _mappings(row: Row, path: str) -> list[Mapping[str, Any]]:
    value = require(row, path)
    if not isinstance(value, list):
        raise Unreadable(path, "not_a_list")
    for at, one in enumerate(value):
        if not isinstance(one, Mapping):
            raise Unreadable(f"{path}.{at}", "wrong_type")
    return value


def messages(row: Row, path: str) -> list[Mapping[str, Any]]:
    """The messages of the list at a path, each with a role; what they say is checked with the record."""
    turns = _mappings(row, path)
    for at, turn in enumerate(turns):
        if "role" not in turn:
            raise Unreadable(f"{path}.{at}.role", "missing_field")
        if not isinstance(turn["role"], str):
            raise Unreadable(f"{path}.{at}.role", "wrong_type")
    return turns


def first(row: Row, name: str) -> Mapping[str, Any]:
    """The first object of a list of objects; an empty one where there is none."""
    value = row.get(name)
    return value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}


def named(row: Row, *names: str) -> str | None:
    """Why a row is taken for a layout that has these names: that it has them all."""
    return "it has " + ", ".join(names) if all(name in row for name in names) else None
