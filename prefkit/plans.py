"""Which field of a record lies where in a row, for formats that only rename fields, and the checks as expressions.

Comes in: a format, the `columns:` of its source and the shape of the rows. Goes out: Polars expressions that give each
field of the record, and whether a row is certain to be a record with just these values. What is not certain is not
judged here: such rows go through `check_row` one by one. The checks are those of records.py, which is the oracle.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import polars as pl

from prefkit.checked import RECORD_TEXTS, RECORD_VALUES, ROLE_OF
from prefkit.format import EXTRA_KEYS, Kind, text_dtype
from prefkit.formats import Format
from prefkit.formats.reading import Columns
from prefkit.records import MAX_SCORE, RECORDS, Annotator
from prefkit.shapes import Shape

# the fields that each such format cannot do without; the others of its fields are optional
PLAIN: Mapping[str, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "trl": ("prompt", "chosen", "rejected"),
    "candidates": ("prompt", "response", "score"),
    "corrections": ("prompt", "response", "correction"),
    "rewrite": ("prompt", "response"),
}
SEVERAL = ("responses", "scores", "models")  # one candidate a row has none of them
NUMBER = r"^[+-]?[0-9]{1,300}(\.[0-9]{0,300})?([eE][+-]?[0-9]{1,3})?$"  # a part of what Python takes for a number


class Field(NamedTuple):
    """A field of the record and its path in the row; `required`: it must say something; `named`: it must be there."""

    name: str
    path: str
    required: bool
    named: bool


class Plan(NamedTuple):
    """Where the fields of a record are, and the names that make a row something else where it has them at its top."""

    fields: tuple[Field, ...]
    never: frozenset[str]


class Value(NamedTuple):
    """A field as expressions: its value, and whether a row is certain to have it."""

    value: pl.Expr
    sure: pl.Expr


def plan_of(form: Format, columns: Columns) -> Plan | None:
    """The plan of a format that gives one record a row and only renames fields; None of any other."""
    several = any(isinstance(path, list) for path in columns.values()) or any(name in columns for name in SEVERAL)
    if form.name not in PLAIN or several or columns.get("system"):
        return None
    taken = (*PLAIN[form.name], *SEVERAL, "system")  # a system prompt makes messages of a prompt: it is no mere name
    optional = [name for name in form.columns if name not in taken and columns.get(name) != ""]
    fields = [Field(name, str(columns.get(name, name)), True, True) for name in PLAIN[form.name]]
    fields += [Field(name, str(columns.get(name, name)), False, name in columns) for name in optional]
    if not all(step and step[0] not in "*^" for field in fields for step in field.path.split(".")):
        return None  # Polars reads such names as patterns
    dotted = {field.path for field in fields if "." in field.path}
    lists = {"responses"} if form.name == "candidates" and "response" not in columns else set()
    return Plan(tuple(fields), frozenset(dotted | lists))


def expressions(
    plan: Plan, form: Format, shape: Mapping[str, Shape], kind: Kind, *, nulls_are_there: bool
) -> dict[str, Value] | None:
    """Every field of the record as expressions over the rows' columns; None where no row of that shape is certain.

    Args:
        plan: of the format.
        form: the format.
        shape: of the rows; a column of the frame for each name at its top.
        kind: of the dataset.
        nulls_are_there: a null at the top of a row was given; else it may also be missing.
    """
    if plan.never & set(shape):
        return None
    found: dict[str, Value] = {}
    shapes: dict[str, Shape] = {}
    for field in plan.fields:
        at = _at(field.path, shape)
        if at is None:
            if field.named:
                return None
            continue
        column, shapes[field.name] = at
        value = _value(field, column, shapes[field.name], form.family, kind)
        if value is None or shapes[field.name] == "other":
            return None
        told = nulls_are_there and field.path in shape
        found[field.name] = value if told or not field.named else Value(value.value, value.sure & column.is_not_null())
    if form.name == "trl" and not isinstance(shapes["prompt"], list) and isinstance(shapes["chosen"], list):
        return None  # the whole conversation on both sides
    return found


def defaults(family: str) -> dict[str, Any]:
    """What a record of a family has where the row says nothing."""
    fields = RECORDS[family].model_fields
    return {name: fields[name].default for name in ("tools", *RECORD_VALUES[family]) if not fields[name].is_required()}


def _at(path: str, shape: Mapping[str, Shape]) -> tuple[pl.Expr, Shape] | None:
    """The column at a path and its shape; None if no row that was seen has it. See `formats.reading.dig`."""
    first, *steps = [path] if path in shape else path.split(".")
    if first not in shape:
        return None
    column, inner = pl.col(first), shape[first]
    for step in steps:
        if isinstance(inner, dict) and step in inner:
            column, inner = column.struct.field(step), inner[step]
        elif isinstance(inner, list) and step.isascii() and step.isdecimal():
            column, inner = column.list.get(int(step), null_on_oob=True), inner[0]
        else:
            return None
    return column, inner


def _value(field: Field, column: pl.Expr, shape: Shape, family: str, kind: Kind) -> Value | None:
    if field.name in RECORD_TEXTS[family]:
        return _text(field.name, column, shape, kind)
    if RECORD_VALUES[family].get(field.name) == pl.Float64:
        return _score(field, column, shape, family)
    return _name(field.name, column, shape)


def _text(name: str, column: pl.Expr, shape: Shape, kind: Kind) -> Value | None:
    if shape == "text":
        turn = pl.struct(
            pl.lit(ROLE_OF.get(name, "assistant")).alias("role"),
            column.alias("content"),
            pl.lit(None, pl.String).alias("extra"),
        )
        return Value(column if kind == "text" else pl.concat_list(turn), column.is_not_null())
    message = shape[0] if isinstance(shape, list) else None
    if kind == "text" or not isinstance(message, dict) or any(message.get(k) != "text" for k in ("role", "content")):
        return None
    item = pl.element().struct
    whole = pl.struct(item.field("role"), item.field("content"), pl.lit(None, pl.String).alias("extra"))
    sure = [item.field(key).is_not_null() for key in ("role", "content")]
    more = (*EXTRA_KEYS, "extra", "function_call")  # what records.Message looks at besides
    sure += [_says_nothing(item.field(key), message[key]) for key in more if message.get(key) is not None]
    all_sure = column.list.eval(pl.all_horizontal(pl.element().is_not_null(), *sure).fill_null(False)).list.all()
    return Value(column.list.eval(whole).cast(text_dtype(kind)), column.is_not_null() & all_sure)


def _says_nothing(column: pl.Expr, shape: Shape) -> pl.Expr:
    """Null, an empty text or an empty list."""
    if shape == "text":
        return column.is_null() | (column == "")
    return column.is_null() | (column.list.len() == 0) if isinstance(shape, list) else column.is_null()


def _score(field: Field, column: pl.Expr, shape: Shape, family: str) -> Value | None:
    if shape == "text":
        number = column.str.contains(NUMBER)
        value = pl.when(number).then(column).otherwise(None).cast(pl.Float64, strict=False)
        says_nothing = pl.lit(False) if field.required else column.is_null() | (column == "")
    elif shape in ("number", "bool"):
        value, says_nothing = column.cast(pl.Float64), pl.lit(False) if field.required else column.is_null()
    else:
        return None if field.required else Value(_default(field, family), column.is_null())
    sure = value.is_finite() & (value.abs() <= MAX_SCORE) & (1 / value != -float("inf"))  # -0 is an integer to Python
    sure = sure & (value > 0) if field.name == "weight" else sure
    return Value(pl.when(says_nothing).then(_default(field, family)).otherwise(value), says_nothing | sure)


def _default(field: Field, family: str) -> pl.Expr:
    return pl.lit(None if field.required else RECORDS[family].model_fields[field.name].default, pl.Float64)


def _name(name: str, column: pl.Expr, shape: Shape) -> Value | None:
    if shape != "text":
        return Value(pl.lit(None, pl.String), column.is_null())
    said = pl.when(column == "").then(None).otherwise(column)
    if name == "annotator":
        return Value(said, said.is_null() | said.is_in(get_args(Annotator)))
    if name == "tools":
        return Value(pl.lit(None, pl.String), said.is_null() | (said == "[]"))
    return Value(said, pl.lit(True))
