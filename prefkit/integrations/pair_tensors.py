"""Scored pairs as tensors: lists lie flat, one after another, so that a batch is gathered and not walked through.

Comes in: blocks of rows of a reference with their weight. Goes out: items, by their numbers. Tensors, so that workers
share their memory, forked or spawned; nothing is there twice, but for a block while it is copied. No Polars here: its
threads do not live on in a forked worker, which would wait for them for ever.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

Item: TypeAlias = dict[str, Any]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SUMS = ("ref_chosen_logps", "ref_rejected_logps")
TOKEN_LOGPS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
LENGTHS = ("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")
# the column that says how long a row's list is
LENGTH_OF = dict(zip((*IDS, *TOKEN_LOGPS), (*LENGTHS, *LENGTHS[1:]), strict=True))
ITEMS_AT_ONCE = 256  # where nobody says how many


class Ragged(NamedTuple):
    """A column of lists: all values one after another, and (N + 1,) where each row begins."""

    values: Tensor
    offsets: Tensor

    def take(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The lists of some rows, (n,) each."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        shifts = starts - lengths.cumsum(0) + lengths
        places = torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)
        return torch.split(self.values[places].to(dtype), lengths.tolist())


class PairTensors:
    """Rows, to be filled block by block; `order` says which row is which item.

    Args:
        lengths: pair_id and LENGTHS of every row, in the order in which they will come.
        names: of the list columns.
    """

    def __init__(self, lengths: pa.Table, names: Sequence[str]) -> None:
        sizes = {name: _offsets(lengths[name]) for name in LENGTHS}
        texts = _offsets(pc.binary_length(lengths["pair_id"]))
        dtypes = dict.fromkeys(IDS, torch.int32) | dict.fromkeys(TOKEN_LOGPS, torch.float32)
        self.lists = {"pair_id": Ragged(torch.empty(int(texts[-1]), dtype=torch.uint8), texts)}
        for name in names:
            offsets = sizes[LENGTH_OF[name]]
            self.lists[name] = Ragged(torch.empty(int(offsets[-1]), dtype=dtypes[name]), offsets)
        self.values = {name: torch.empty(lengths.num_rows, dtype=torch.float32) for name in (*SUMS, "weight")}
        self.order = torch.arange(lengths.num_rows)
        self.rows = 0

    def __len__(self) -> int:
        return len(self.order)

    def add(self, block: pa.Table) -> None:
        """Copy the next rows."""
        end = self.rows + block.num_rows
        for name, (values, offsets) in self.lists.items():
            values.numpy()[int(offsets[self.rows]) : int(offsets[end])] = _flat(block[name])
        for name, column in self.values.items():
            column.numpy()[self.rows : end] = block[name].to_numpy()
        self.rows = end

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Some items; each column is gathered at once."""
        rows = self.order[torch.tensor(numbers, dtype=torch.int64)]
        columns: dict[str, Sequence[Any]] = {}
        for name, ragged in self.lists.items():
            dtype = torch.int64 if name in IDS else ragged.values.dtype
            columns[name] = ragged.take(rows, dtype)
        columns["pair_id"] = [text.numpy().tobytes().decode() for text in columns["pair_id"]]
        columns |= {name: values[rows].unbind() for name, values in self.values.items()}
        return [dict(zip(columns, item, strict=True)) for item in zip(*columns.values(), strict=True)]


def list_columns(*, token_logps: bool) -> tuple[str, ...]:
    """The list columns that items have."""
    return IDS + (TOKEN_LOGPS if token_logps else ())


def _offsets(lengths: Any) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)]))


def _flat(column: Any) -> Any:
    """All values of a column of lists, or all bytes of one of texts, (n,)."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.combine_chunks().flatten().to_numpy()
    return np.frombuffer("".join(column.to_pylist()).encode(), np.uint8)
