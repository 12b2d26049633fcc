"""The key-value cache of many responses at once: a place a row, every layer in one buffer, aligned on the right.

Comes in: the cache of prompts as transformers made it. Goes out: what transformers takes for one more token a row. Rows
come and leave at any step; what is moved is said where it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Arena:
    """The cache of the rows at work: keys and values of every layer, in one buffer each, aligned on the right.

    A row is a place in the buffers; `lo` and `hi` bound the columns that are used. Rows are taken out by moving the
    last ones into their places, so that nothing else is copied.
    """

    def __init__(self, capacity: int, columns: int) -> None:
        self.capacity, self.columns = capacity, columns
        self.rows = self.lo = self.hi = 0
        self.layers: list[_ArenaLayer] = []
        self.starts: list[int] = []  # the first column of each row

    def cache(self) -> Cache:
        """What the model takes."""
        return Cache(layers=[*self.layers])

    def join(self, cache: Any, lengths: Sequence[int], repeats: int) -> None:
        """Add `repeats` rows for each prompt of a cache, which is padded on the left."""
        longest, count = max(lengths), len(lengths) * repeats
        if not self.layers:
            self.layers = [_ArenaLayer(self, layer.keys, layer.values) for layer in cache.layers]
        if not self.rows:
            self.lo = self.hi = longest
        elif longest > self.hi:
            self._move(longest - self.hi)
        for layer, new in zip(self.layers, cache.layers, strict=True):
            layer.put(slice(self.rows, self.rows + count), new.keys, new.values, repeats)
        self.starts += [self.hi - length for length in lengths for _ in range(repeats)]
        self.rows += count
        self.lo = min(self.starts)

    def take_out(self, places: Sequence[int]) -> list[int]:
        """Remove rows; returns which row is at each place now."""
        gone = set(places)
        left = self.rows - len(gone)
        holes = [place for place in range(left) if place in gone]
        movers = [place for place in range(left, self.rows) if place not in gone]
        for layer in self.layers:
            layer.move_rows(movers, holes)
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.starts = [self.starts[place] for place in order]
        self.rows = left
        self.lo = min(self.starts, default=self.hi)
        return order

    def step(self) -> None:
        """A token was added to every row."""
        self.hi += 1

    def make_room(self) -> None:
        """See to it that another column fits."""
        if self.hi == self.columns:
            self._move(-self.lo)

    def _move(self, by: int) -> None:
        for layer in self.layers:
            layer.move_columns(by)
        self.lo, self.hi = self.lo + by, self.hi + by
        self.starts = [start + by for start in self.starts]

    def mask(self, device: torch.device) -> Tensor | None:
        """(rows, columns) of ones where a row has tokens, for a step that adds one; None where all have."""
        if all(start == self.lo for start in self.starts):
            return None
        starts = torch.tensor(self.starts, device=device)
        return (torch.arange(self.lo, self.hi + 1, device=device) >= starts[:, None]).long()

    def positions(self, device: torch.device) -> Tensor:
        """(rows, 1): the position of the token that a step adds."""
        return torch.tensor([[self.hi - start] for start in self.starts], device=device)


class _ArenaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of an arena, as transformers asks for it. Windows are the mask's: all keys are kept."""

    is_sliding = False

    def __init__(self, arena: Arena, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arena = arena
        self.buffers = [
            torch.empty(
                arena.capacity, part.shape[1], arena.columns, part.shape[3], dtype=part.dtype, device=part.device
            )
            for part in (keys, values)
        ]
        self.is_initialized = True

    def put(self, rows: slice, keys: Tensor, values: Tensor, repeats: int) -> None:
        """Copy a prompt's cache to its rows; padding on its left stays out of what the mask lets through."""
        hi, width = self.arena.hi, keys.shape[2]
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[rows, :, : hi - width] = 0  # masked, but what is not finite would not stay there
            buffer[rows, :, hi - width : hi] = part.repeat_interleave(repeats, 0)

    def move_rows(self, sources: Sequence[int], places: Sequence[int]) -> None:
        """Copy rows to other places."""
        lo, hi = self.arena.lo, self.arena.hi
        for buffer in self.buffers:
            for source, place in zip(sources, places, strict=True):
                buffer[place, :, lo:hi] = buffer[source, :, lo:hi]

    def move_columns(self, by: int) -> None:
        """Move what is used to the left or right."""
        arena = self.arena
        for buffer in self.buffers:
            used = buffer[: arena.rows, :, arena.lo : arena.hi].clone()
            buffer[: arena.rows, :, arena.lo + by : arena.hi + by] = used

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: an arena begins with a prompt's cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        """Write the newest column; all that are used."""
        arena = self.arena
        seen = []
        for buffer, part in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: arena.rows, :, arena.hi : arena.hi + 1] = part
            seen.append(buffer[: arena.rows, :, arena.lo : arena.hi + 1])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns with those that a step adds, from 0 on."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns that are used."""
        return self.arena.hi - self.arena.lo

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1
