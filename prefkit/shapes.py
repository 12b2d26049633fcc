"""What the rows of a file look like: the names and types that were seen in them, as a tree, and as an Arrow schema.

A shape is None (nothing but null was seen), "text", "number", "bool", "other", a list of the one shape of its items, or
a dict of the shapes of its fields. Arrow reads JSON by such a schema strictly: another type, a name that is not in it
or a name that comes twice is an error, whatever the row is wanted for.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import pyarrow as pa

Shape: TypeAlias = str | list[Any] | dict[str, Any] | None

MAX_FIELDS = 300  # of all objects in a row together; names that are data (ids as keys) would fill the schema
MAX_DEPTH = 12
MAX_ITEMS = 64  # of a list, looked at in one row


def learn(shape: dict[str, Shape], row: Mapping[str, Any], never: Collection[str]) -> None:
    """Add what a row shows to the shape of its file; where the two contradict each other, what was seen first stays.

    Args:
        shape: of the rows so far; changed in place.
        row: decoded.
        never: names that stay unknown at the top.
    """
    room = [MAX_FIELDS - num_fields(shape)]
    _learn_object(shape, {name: value for name, value in row.items() if name not in never}, MAX_DEPTH, room)


def _learn_object(shape: dict[str, Shape], value: Mapping[str, Any], depth: int, room: list[int]) -> None:
    for name, inner in value.items():
        if name in shape or room[0] > 0:
            room[0] -= name not in shape
            shape[name] = _learned(shape.get(name), inner, depth - 1, room)


def _learned(shape: Shape, value: Any, depth: int, room: list[int]) -> Shape:
    match value:
        case bool():
            return "bool" if shape is None else shape
        case int() | float():
            return "number" if shape is None else shape
        case str():
            return "text" if shape is None else shape
        case dict() if depth and isinstance(shape, dict | None):
            known: dict[str, Shape] = {} if shape is None else shape
            _learn_object(known, value, depth, room)
            return known
        case list() if depth and isinstance(shape, list | None):
            item = shape[0] if shape else None
            for inner in value[:MAX_ITEMS]:
                item = _learned(item, inner, depth - 1, room)
            return [item]
        case _:
            return shape


def num_fields(shape: Shape) -> int:
    """How many names a shape holds, at all depths."""
    if isinstance(shape, dict):
        return len(shape) + sum(num_fields(inner) for inner in shape.values())
    return num_fields(shape[0]) if isinstance(shape, list) else 0


def arrow_type(shape: Shape) -> Any:
    """The Arrow type by which JSON of that shape is read."""
    if isinstance(shape, dict):
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in shape.items()])
    if isinstance(shape, list):
        return pa.list_(arrow_type(shape[0]))
    return {None: pa.null(), "text": pa.string(), "number": pa.float64(), "bool": pa.bool_()}[shape]


def shape_of(kind: Any) -> Shape:
    """The shape of an Arrow type; "other" where a value of it is nothing that a vectorised check knows."""
    t = pa.types
    if t.is_struct(kind):
        return {field.name: shape_of(field.type) for field in kind}
    if t.is_list(kind) or t.is_large_list(kind):
        return [shape_of(kind.value_type)]
    if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return "text"
    if t.is_integer(kind) or t.is_float32(kind) or t.is_float64(kind):  # Python has no float16: numpy's is no number
        return "number"
    if t.is_boolean(kind):
        return "bool"
    return None if t.is_null(kind) else "other"
