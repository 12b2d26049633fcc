"""A hash in every row of what a reference has scored, and who asks for it: rows that were changed are not trained on.

Between load and batch lie the methods of `datasets`, which keep rows or change them, and say nothing. The hash is over
what a trainer reads: the ids with their lengths, both sums as float32, the pair and the key. It is made where rows are
loaded, and asked for twice: of all rows of a table before the first step, and of each row as its batch is put together,
which is all there is of a stream. Whoever changes a row and its hash has done it on purpose: it is no signature.
"""

import struct
from array import array
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefkit.errors import DatasetError
from prefkit.scored_rows import IDS, SUMS

ORIGIN = ("pair_id", "reference", "row_hash")
SCHEMA = pa.schema(
    {"pair_id": pa.large_string(), **dict.fromkeys(IDS, pa.large_list(pa.int32())), **dict.fromkeys(SUMS, pa.float32())}
)
HEAD = np.dtype([*((name, "<u4") for name in IDS), *((name, "<f4") for name in SUMS)])  # lengths and sums
LOADED = "the rows of prefkit.integrations.trl.load_reference(DATASET): columns may be added, none changed"
HASH_ROWS = 8_192  # at once


def row_hashes(rows: pa.Table, key: str) -> pa.Array:
    """The hash of each row, as a signed whole number of 64 bits.

    Raises:
        ValueError: a column is absent, holds a null, or values of another type that do not fit.
    """
    parts = [rows.slice(start, HASH_ROWS) for start in range(0, rows.num_rows, HASH_ROWS)]
    return pa.array(np.concatenate([np.empty(0, np.int64), *(_hashes(part, key) for part in parts)]))


def _hashes(rows: pa.Table, key: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if absent := set(SCHEMA.names) - set(rows.column_names):
        raise ValueError(f"no column {min(absent)}")
    columns = {name: rows[name].cast(SCHEMA.field(name).type).combine_chunks() for name in SCHEMA.names}
    flat = {name: columns[name].flatten() for name in IDS}
    if any(column.null_count for column in [*columns.values(), *flat.values()]):
        raise ValueError("a null")
    head = np.empty(rows.num_rows, HEAD)
    ids, ends = [], []
    for name in IDS:
        head[name] = np.asarray(pc.list_value_length(columns[name]))
        ids.append(memoryview(np.asarray(flat[name]).astype("<i4").tobytes()))
        ends.append([0, *(4 * np.cumsum(head[name], dtype=np.int64)).tolist()])
    for name in SUMS:
        head[name] = np.asarray(columns[name])
    heads, size, told = head.tobytes(), HEAD.itemsize, key.encode()
    found = bytearray()
    for i, pair in enumerate(columns["pair_id"].to_pylist()):
        lists = [held[end[i] : end[i + 1]] for held, end in zip(ids, ends, strict=True)]
        found += sha256(b"".join([heads[size * i : size * (i + 1)], *lists, told, pair.encode()])).digest()[:8]
    return np.frombuffer(bytes(found), "<i8").astype(np.int64)


def row_hash(row: Mapping[str, Any], key: str) -> int | None:
    """The hash of a row as plain values, as in row_hashes; None where it cannot have any."""
    lists, sums = [row.get(name) for name in IDS], [row.get(name) for name in SUMS]
    if not (all(type(one) is list for one in lists) and all(type(one) is float for one in sums)):
        return None
    try:
        head = struct.pack("<3I2f", *(len(one) for one in lists), *sums)  # type: ignore[arg-type]
        ids = np.array(array("i", [token for one in lists for token in one]), "<i4")  # type: ignore[union-attr]
        text = (key + row["pair_id"]).encode()
    except (TypeError, OverflowError, KeyError, UnicodeError):
        return None
    return int.from_bytes(sha256(head + ids.tobytes() + text).digest()[:8], "little", signed=True)


def check_first(row: Mapping[str, Any], name: str) -> None:
    """A row is of plain lists and floats, as a collator takes them; by type, before anything is hashed.

    Raises:
        DatasetError: it is not.
    """
    wrong = [f"{_kind(row[column])} in {column}" for column in IDS if _kind(row[column]) != "list of int"]
    wrong += [f"{_kind(row[column])} in {column}" for column in SUMS if _kind(row[column]) != "float"]
    if wrong:
        raise DatasetError(
            f"the first row has a {wrong[0]}",
            where=name,
            expected="lists of whole numbers as ids, a float as each sum",
            hint="dataset.with_format(None), or load it again",
        )


def _kind(value: Any) -> str:
    """The type of a value by name; of a list that of what it holds."""
    inner = sorted({type(each).__name__ for each in value}) if isinstance(value, list) else []
    return type(value).__name__ + (f" of {' and '.join(inner)}" if inner else "")


def check_table(blocks: Iterable[pa.Table], key: str, name: str) -> None:
    """All rows of a dataset are as they were loaded.

    Args:
        blocks: of its rows.
        key: of the reference that they are to be of.
        name: of the dataset, for the message.

    Raises:
        DatasetError: some are not; with their number and the first of them.
    """
    changed: list[Any] = []
    for block in blocks:
        try:
            same = np.asarray(pc.fill_null(pc.equal(block["row_hash"], row_hashes(block, key)), fill_value=False))
        except (ValueError, pa.ArrowException):  # row by row: which of them
            same = np.array([row_hash(row, key) == row["row_hash"] for row in block.to_pylist()])
        changed += block["pair_id"].filter(pa.array(~same.astype(np.bool_))).to_pylist()
    if changed:
        raise DatasetError(
            f"rows were changed since they were loaded: {len(changed)}, the first of pair {changed[0]}",
            where=name,
            expected=LOADED,
        )


class CheckedCollator(NamedTuple):
    """A collator behind the check of each row that it is handed: one that was changed, or is of another reference.

    `inner` puts the batch together; `whole`: it is handed all columns, not those alone that a trainer reads.
    """

    inner: Callable[[list[dict[str, Any]]], Any]
    key: str
    whole: bool

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch.

        Raises:
            DatasetError: a row is not as it was loaded.
        """
        for row in rows:
            found = row_hash(row, self.key)
            if found is None or found != row.get("row_hash"):
                other = row.get("reference")
                what = "was changed since it was loaded" if other == self.key else f"is of another reference, {other}"
                place = f"a row of pair {row.get('pair_id')}, reference {self.key}"
                raise DatasetError(what, where=place, expected=LOADED)
        names = (*IDS, *SUMS)
        return self.inner(rows if self.whole else [{name: row[name] for name in names} for row in rows])
