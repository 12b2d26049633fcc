"""Evaluation files become items, each with the texts that no pair may hold.

Comes in: the files that `decontaminate.against` names. Goes out: a frame of `item` (file:id) and `text`, the files as
the manifest records them, and what a person is told of them. A row that cannot be read is an error here, not a reject:
an item that is lost without a word is one that pairs may hold.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from prefkit.build_settings import EvalSetConfig
from prefkit.detection import keys_found
from prefkit.errors import SourceError
from prefkit.formats.reading import dig
from prefkit.rows import RawRow, read_rows
from prefkit.sources import CHANGED, SourceFile, expand, source_sha256

# where evaluation sets keep what is asked, the first that a file has: GSM8K, ARC, MMLU, TruthfulQA (question), MATH
# (problem), HumanEval, IFEval, Arena-Hard (prompt), AlpacaEval (instruction), MT-Bench (turns), MBPP (text), BBH
# (input), PIQA (goal), WinoGrande (sentence)
USUAL = ("question", "problem", "prompt", "instruction", "turns", "query", "text", "input", "goal", "sentence")
BESIDE = {"instruction": "input"}  # one text of two columns
NOTHING = ("", "<noinput>")  # what Alpaca and its kin write where an instruction has no input
WORD = re.compile(r"\w")
COLUMNS_HINT = "columns: [...] of this evaluation set, dotted paths allowed; a list of paths is joined to one text"

Paths = Sequence[Sequence[str]]  # of each text: what is joined to it


class Evals(NamedTuple):
    """All evaluation sets: `items` with item and text, and what the manifest and a person learn of them."""

    items: pl.DataFrame
    files: list[SourceFile]
    told: list[str]


def read_evals(sets: Sequence[EvalSetConfig]) -> Evals:
    """The items of all evaluation sets, in the order of sets, files and rows.

    Raises:
        SourceError: a file or a row of it cannot be read, has no such column, or holds no text at all.
    """
    parts = [_read_file(path, config) for config in sets for path in expand(config.path)]
    schema = {"item": pl.String, "text": pl.String}
    items = pl.concat([pl.DataFrame(schema=schema), *(part.items for part in parts)])
    return Evals(items, [file for part in parts for file in part.files], [line for part in parts for line in part.told])


def _read_file(path: str, config: EvalSetConfig) -> Evals:
    digest = source_sha256(path)
    rows = [_readable(row, path) for row in read_rows(path)]
    if source_sha256(path) != digest:
        raise SourceError(CHANGED, where=path, hint="run the same command again")
    columns = _named_columns(config, rows, path) if config.columns else _usual_columns(rows, path)
    found, without = [], 0
    for row in rows:
        where = f"{path}:{row.line}"
        texts = [text for paths in columns for text in _texts(row.value, paths, where) if WORD.search(text)]
        name = f"{path}:{_id(row, config.id, where)}"
        found += [(name, text) for text in texts]
        without += not texts
    if not found:
        raise SourceError("no row has a text", where=path, expected=f"words in {_shown(columns)}", hint=COLUMNS_HINT)
    items = pl.DataFrame(found, schema={"item": pl.String, "text": pl.String}, orient="row")
    guessed = "" if config.columns else " (columns: of this evaluation set says otherwise)"
    told = [f"{path}: {len(found)} evaluation texts of {len(rows)} rows, from {_shown(columns)}{guessed}"]
    if without:
        told.append(f"{path}: {without} of {len(rows)} rows hold no text and are not looked for")
    return Evals(items, [SourceFile(path, digest, len(rows))], told)


def _readable(row: RawRow, path: str) -> RawRow:
    if row.reason is not None:
        where = f"{path}:{row.line}"
        hint = "mend or remove this row"
        raise SourceError(f"no evaluation item: {row.reason}", where=where, expected="an object with texts", hint=hint)
    return row


def _named_columns(config: EvalSetConfig, rows: Sequence[RawRow], path: str) -> Paths:
    """The columns that the pipeline names, each of them in some row: in others it may be missing, as `null` may."""
    columns = [[entry] if isinstance(entry, str) else entry for entry in config.columns]
    for name in (name for paths in columns for name in paths):
        if rows and not any(_is_there(row.value, name) for row in rows):
            raise SourceError(
                f"no row has {name}; the first has {keys_found(rows[0].value)}",
                where=path,
                expected="paths that rows have",
                hint=COLUMNS_HINT,
            )
    return columns


def _usual_columns(rows: Sequence[RawRow], path: str) -> Paths:
    """The first of the usual names that some row has a text under, in upper or lower case; and what belongs to it."""
    names: dict[str, str] = {}
    for row in rows:
        for key, value in row.value.items():
            if value not in (None, "", []):
                names.setdefault(key.casefold(), key)
    usual = next((name for name in USUAL if name in names), None)
    if usual is None:
        keys = keys_found(rows[0].value) if rows else "no rows"
        raise SourceError(
            f"none of the columns that evaluation sets usually have; it has {keys}",
            where=path,
            expected=", ".join(USUAL),
            hint=COLUMNS_HINT,
        )
    beside = names.get(BESIDE.get(usual, ""))
    return [[names[usual]] if beside is None else [names[usual], beside]]


def _is_there(row: Mapping[str, Any], path: str) -> bool:
    try:
        dig(row, path)
    except KeyError:
        return False
    return True


def _texts(row: Mapping[str, Any], paths: Sequence[str], where: str) -> list[str]:
    """The texts at one path, each by itself, or those at several as one, a line each."""
    parts = [list(_parts(row, path, where)) for path in paths]
    return parts[0] if len(paths) == 1 else ["\n".join(part for several in parts for part in several)]


def _parts(row: Mapping[str, Any], path: str, where: str) -> Iterator[str]:
    """The texts of a value: a string, a list of them, or what the user says in a list of messages."""
    try:
        value = dig(row, path)
    except KeyError:
        return
    for part in map(_said, value if isinstance(value, list) else [value]):
        if not isinstance(part, str | None):
            kind = type(part).__name__
            expected = "a text, a list of texts, or messages of role and content"
            raise SourceError(f"{path} is no text: {kind}", where=where, expected=expected, hint=COLUMNS_HINT)
        if part is not None and part.strip() not in NOTHING:
            yield part


def _said(value: Any) -> Any:
    """Of a message what the user says: the system's and the assistant's words are nobody's question."""
    if not isinstance(value, Mapping) or "role" not in value:
        return value
    return value.get("content") if value["role"] == "user" else None


def _id(row: RawRow, path: str | None, where: str) -> str:
    if path is None:
        return str(row.line)
    value = dig(row.value, path) if _is_there(row.value, path) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        hint = "id: a column of this evaluation set; left out: the line names the item"
        raise SourceError(f"{path} names no item", where=where, expected="a text or a whole number", hint=hint)
    return str(value)


def _shown(columns: Paths) -> str:
    return ", ".join(" + ".join(paths) for paths in columns)
