"""A row becomes checked records, or a reject that says which field is at fault and why.

Comes in: a row as it was read, and the format that reads it. Goes out: records with their texts in the dataset's kind,
and rejects, as frames. Every row may pass here, one by one through pydantic; ingest.py does the same for many at once.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl
from pydantic import ValidationError

from prefkit.format import REJECTS, Kind, canonical_json, text_dtype
from prefkit.formats import Format, Unreadable
from prefkit.formats.reading import Columns
from prefkit.records import RECORDS
from prefkit.rows import RawRow

# columns of the record frames, by family; the text columns take the dtype of the dataset's kind
RECORD_TEXTS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "candidates": ("prompt", "response"),
    "corrections": ("prompt", "response", "correction"),
    "responses": ("prompt", "response"),
    "comparisons": ("prompt", "response_a", "response_b"),
    "prompts": ("prompt",),
}
RECORD_VALUES: Mapping[str, Mapping[str, pl.DataType | type[pl.DataType]]] = {
    "pairs": {
        "chosen_score": pl.Float64,
        "rejected_score": pl.Float64,
        "chosen_model": pl.String,
        "rejected_model": pl.String,
        "annotator": pl.String,
        "weight": pl.Float64,
    },
    "candidates": {"score": pl.Float64, "scorer": pl.String, "rater": pl.String, "model": pl.String},
    "corrections": {"model": pl.String, "annotator": pl.String},
    "responses": {"model": pl.String},
    "comparisons": {
        "votes": pl.List(pl.String),
        "model_a": pl.String,
        "model_b": pl.String,
        "score_a": pl.Float64,
        "score_b": pl.Float64,
        "annotator": pl.String,
    },
    "prompts": {"reference": pl.String},
}
ROLE_OF = {"prompt": "user"}  # every other text is the assistant's
# names that records.py gives to what is wrong with a value
OWN_PROBLEMS = {"not_a_number", "not_finite", "out_of_range", "not_text_content", "not_tools", "not_json"}
OWN_PROBLEMS |= {"lone_surrogate", "function_call"}


def check_row(
    row: RawRow,
    form: Format,
    columns: Columns,
    kind: Kind,
    path: str,
    records: list[dict[str, Any]],
    rejects: list[dict[str, Any]],
) -> None:
    """Add what a row gives to the records or to the rejects of the file `path`; a row may give several."""

    def reject(field: str | None, reason: str) -> None:
        raw = row.raw or canonical_json_or_repr(row.value)
        rejects.append({"source": path, "line": row.line, "field": field, "reason": reason, "raw": raw})

    if row.reason is not None:
        return reject(None, row.reason)
    try:
        found = form.read(row.value, columns)
    except Unreadable as error:
        return reject(error.field, error.reason)
    for index, fields in enumerate(found):
        try:
            record = RECORDS[form.family].model_validate(fields).model_dump()
            texts = {name: as_kind(record[name], name, kind) for name in RECORD_TEXTS[form.family]}
            if kind == "text" and record["tools"] is not None:
                raise Unreadable("tools", "tools_in_text_dataset")
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reject(_field(problem["loc"], index, len(found)), _reason(problem["loc"], problem["type"]))
        except Unreadable as error:
            reject(error.field, error.reason)
        else:
            records.append(record | texts | {"source": path, "source_row": row.line})
    return None


def canonical_json_or_repr(value: Any) -> str:
    """The raw form of a row that never was text (Parquet)."""
    try:
        return canonical_json(value)
    except (TypeError, ValueError):
        return repr(value)


def _field(loc: tuple[int | str, ...], index: int, count: int) -> str:
    """The field at fault, as the record names it; with its place in the list where one row holds several candidates."""
    name = str(loc[0]) if loc else "row"
    return f"{name}[{index}]" if count > 1 else name


def _reason(loc: tuple[int | str, ...], problem: str) -> str:
    """The rule's name for a problem of pydantic's; what a message lacks makes its text the wrong type."""
    if problem in OWN_PROBLEMS:
        return problem
    if problem == "missing" and len(loc) == 1:
        return "missing_field"
    return "out_of_range" if problem == "greater_than" else "wrong_type"


def as_kind(text: Any, field: str, kind: Kind) -> Any:
    """A record's text in the dataset's kind: in chat a plain string is one turn; messages do not fit a text dataset."""
    if kind == "chat":
        turn = {"role": ROLE_OF.get(field, "assistant"), "content": text, "extra": None}
        return text if isinstance(text, list) else [turn]
    if isinstance(text, list):
        raise Unreadable(field, "messages_in_text_dataset")
    return text


def record_frame(records: list[dict[str, Any]], family: str, kind: Kind, annotator: str | None) -> pl.DataFrame:
    """Checked records as a frame: RECORD_TEXTS, tools, RECORD_VALUES, source, source_row, in this order."""
    schema: dict[str, Any] = dict.fromkeys(RECORD_TEXTS[family], text_dtype(kind))
    schema |= {"tools": pl.String, **RECORD_VALUES[family], "source": pl.String, "source_row": pl.Int64}
    columns = {name: pl.Series(name, [r[name] for r in records], dtype, strict=True) for name, dtype in schema.items()}
    frame = pl.DataFrame(columns)
    return (
        frame.with_columns(pl.col("annotator").fill_null(pl.lit(annotator, pl.String)))
        if "annotator" in schema
        else frame
    )


def reject_frame(rejects: list[dict[str, Any]]) -> pl.DataFrame:
    """Rejects as the table of format.REJECTS."""
    return pl.DataFrame(rejects, schema={c.name: c.dtype for c in REJECTS}, orient="row")
