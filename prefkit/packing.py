"""Pairs as rows of tokens, with what a row shares computed once.

The sequences prompt + chosen and prompt + rejected of a row, sorted by their ids, are a token trie walked depth first:
where a sequence begins like the one before it, that beginning is there already. So a prompt, the common beginning of
two responses, a second pair with the same prompt and a system prompt that all share are each in the row once. A token
may see its ancestors and itself; with `ends[k]` the index after the last descendant of token k that is

    k <= q < ends[k]        (query q may see key k)

and the attention kinds are made from that one rule: see attention.py.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefkit.encode import Sides

Rows = Literal["packed", "tree", "separate", "alone"]
MIN_SHARED = 16  # a shorter common beginning costs more as a branch of its own than it saves


class Batch(NamedTuple):
    """B pairs as R rows of at most L tokens, padded on the right; T completion tokens, predicted at U positions.

    targets and sides go pair by pair, chosen before rejected.
    """

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64: depth in the trie
    ends: Tensor  # (R, L) int64: index in the row after the last descendant; of padding the index after itself
    lengths: Tensor  # (R,) int64: tokens that are no padding
    branches: Tensor  # (1, 1, K, 4) int64 on the CPU: see `_branches`; K = 0 where there are several rows
    predictors: Tensor  # (U,) int64, into R * L, ascending: whose state predicts a completion token, each once
    sources: Tensor  # (T,) int64, into U: where each completion token is predicted
    targets: Tensor  # (T,) int64: its id
    sides: Tensor  # (T,) int64: 2 * pair for chosen, 2 * pair + 1 for rejected

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; the branch table, which decides what is launched, stays on the CPU."""
        moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in self))
        return moved._replace(branches=self.branches)


class _Row(NamedTuple):
    """One row before padding; `paths`: for every sequence that was put in, the index of each of its tokens."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    paths: list[list[int]]


def _grow(sequences: Sequence[list[int]]) -> _Row:
    """The trie of some sequences, depth first; beginnings shorter than MIN_SHARED are not shared."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    paths: list[list[int]] = [[]] * len(sequences)
    before: list[int] = []
    path: list[int] = []
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        # sorted: no earlier sequence has more in common with this one than the last
        common = _num_common(before, sequence)
        common = common if common >= min(MIN_SHARED, len(before)) else 0
        here = len(ids)
        for node in path[common:]:
            ends[node] = here
        path = [*path[:common], *range(here, here + len(sequence) - common)]
        ids += sequence[common:]
        positions += range(common, len(sequence))
        ends += [0] * (len(sequence) - common)
        paths[number] = path
        before = sequence
    for node in path:
        ends[node] = len(ids)
    return _Row(ids, positions, ends, paths)


def _num_common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    apart = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(apart, min(len(one), len(other)))


def _line(sequence: list[int]) -> _Row:
    """A row of one sequence."""
    places = [*range(len(sequence))]
    return _Row(sequence, places, [len(sequence)] * len(sequence), [places])


def make_batch(pairs: Sequence[Sides], *, rows: Rows, pad_id: int = 0, multiple: int = 1) -> Batch:
    """Lay out pairs as rows.

    Args:
        pairs: at least one.
        rows: packed: all pairs in one row; tree: a row a pair; separate and alone: two ordinary sequences a pair.
        pad_id: what fills a row up.
        multiple: the length of the rows is a multiple of it (few distinct shapes, for what is compiled).
    """
    sequences = [pair.prompt + ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    if rows == "packed":
        made = [_grow(sequences)]
    elif rows == "tree":
        made = [_grow(sequences[i : i + 2]) for i in range(0, len(sequences), 2)]
    else:
        made = [_line(sequence) for sequence in sequences]
    longest = max(len(row.ids) for row in made)
    length = -(-longest // multiple) * multiple
    paths = [(base * length, path) for base, row in enumerate(made) for path in row.paths]
    predictors, targets, sides = _completions(pairs, paths)
    unique, sources = np.unique(predictors, return_inverse=True)
    fill = range(length)
    return Batch(
        torch.tensor([row.ids + [pad_id] * (length - len(row.ids)) for row in made]),
        torch.tensor([row.positions + [0] * (length - len(row.ids)) for row in made]),
        torch.tensor([row.ends + [i + 1 for i in fill[len(row.ids) :]] for row in made]),
        torch.tensor([len(row.ids) for row in made]),
        torch.tensor(list(_branches(made[0], length)) if rows == "packed" else [], dtype=torch.int64).view(1, 1, -1, 4),
        torch.from_numpy(unique),
        torch.from_numpy(sources.reshape(-1)),
        torch.tensor(targets),
        torch.tensor(sides),
    )


def _completions(
    pairs: Sequence[Sides], paths: Sequence[tuple[int, list[int]]]
) -> tuple["np.ndarray[tuple[int], np.dtype[np.int64]]", list[int], list[int]]:
    """Flat predicting position, token and side of every completion token: each is predicted by the token before it."""
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    completions = [(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    for side, ((prompt, ids), (base, path)) in enumerate(zip(completions, paths, strict=True)):
        predictors += [base + node for node in path[len(prompt) - 1 : -1]]
        targets += ids
        sides += [side] * len(ids)
    return np.array(predictors, dtype=np.int64), targets, sides


def _branches(row: _Row, length: int) -> Iterator[tuple[int, int, int, int]]:
    """The row cut into branches, and what each sees: (first query, end of queries, first key, end of keys) a range.

    A branch is a run of tokens each of which is the parent of the next. Its ranges, one after the other, are the path
    from the root to its last token, so a token's place among the keys is its position; the last range is the branch
    itself. Padding is one branch that sees itself.
    """
    ends = np.array(row.ends)
    count = len(ends)
    leaves = np.flatnonzero(ends == np.arange(1, count + 1))  # a leaf ends a branch
    start = 0
    for stop in (leaves + 1).tolist():
        ancestors = np.flatnonzero(ends[:start] > start)
        runs = np.split(ancestors, np.flatnonzero(np.diff(ancestors) != 1) + 1) if len(ancestors) else []
        for run in runs:
            yield start, stop, int(run[0]), int(run[-1]) + 1
        yield start, stop, start, stop
        start = stop
    if start < length:
        yield start, length, start, length
