"""A reference as PyTorch reads it: a map-style dataset in memory, a stream over the Parquet parts, and a collator.

Comes in: a dataset directory with a finished reference. Goes out: items, each a pair as it was scored:

    pair_id                                    str
    prompt_ids, chosen_ids, rejected_ids       (n,) int64
    ref_chosen_logps, ref_rejected_logps       () float32, sums in nats
    ref_chosen_token_logps, ref_rejected_...   (n,) float32, a value a completion token; left out on request
    weight                                     () float32

Everything is verified when a dataset is made, once: workers get what is left of it (rows, or names of parts and numbers
of rows) and verify nothing again. Whether the items are of the model that is trained no file can tell: `model` compares
its folder with the reference before anything is read. Price: a dataset holds 4 bytes a prompt token and 8 bytes a
completion token (4 without `token_logps`), a stream 8 bytes a pair and a window of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex, overload

import polars as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prefkit.errors import DatasetError, InputError
from prefkit.format import SPLITS
from prefkit.integrations.pair_stream import Order, PairStream, Uneven, find_parts, place_of
from prefkit.integrations.pair_tensors import ITEMS_AT_ONCE, LENGTHS, SUMS, Item, PairTensors, list_columns
from prefkit.reference_table import Opened, open_reference, scored_blocks

WINDOW_ROWS = 10_000


def torch_dataset(
    dataset: str | Path,
    key: str | None = None,
    split: str | None = "train",
    *,
    model: str | Path | None = None,
    token_logps: bool = True,
) -> "PairDataset":
    """The scored pairs of a split in memory, as a map-style dataset, in the order of their pair_ids.

    Args:
        dataset: the directory.
        key: of the reference, or as much of it as no other has; None: the only one there is (of that `model`).
        split: train, test, or None for both.
        model: folder of the model that is to be trained: the reference must be its own, by weights, config and
            tokenizer. None: nothing is compared.
        token_logps: items have ref_chosen_token_logps and ref_rejected_token_logps.

    Returns:
        a dataset of items with `len`, `[number]`, slices, and whole batches at once for a DataLoader.

    Raises:
        DatasetError: no finished dataset or reference, another format version, a part of the pairs was changed, or no
            pair of that split.
        GateError: the reference's table cannot be what a reference pass has written, it is not the model's, or there
            are several.
        InputError: no such split.

    Example:
        pairs = prefkit.torch_dataset("demo/dataset", model="demo/model")
        print(len(pairs), pairs[0]["chosen_ids"])
    """
    opened = _opened(dataset, key, split, model)
    return PairDataset(opened.recorded, _in_memory(opened, split, list_columns(token_logps=token_logps)))


def torch_stream(
    dataset: str | Path,
    key: str | None = None,
    split: str | None = "train",
    *,
    model: str | Path | None = None,
    token_logps: bool = True,
    shuffle: bool = True,
    seed: int = 0,
    window_rows: int = WINDOW_ROWS,
    uneven: Uneven = "drop",
    rank: int | None = None,
    world_size: int | None = None,
) -> "PairStream":
    """The scored pairs of a split as an iterable dataset that reads the parts as it goes, in flat memory.

    The rows are shared out among ranks and, within a rank, among the workers of its DataLoader: each row is read by one
    of them, whatever their numbers. Make it after torch.distributed is initialised, or say rank and world_size.

    Args:
        dataset: the directory.
        key: of the reference, or as much of it as no other has; None: the only one there is (of that `model`).
        split: train, test, or None for both.
        model: as of `torch_dataset`.
        token_logps: as of `torch_dataset`.
        shuffle: parts come in an order of chance, and rows too within `window_rows` of them; otherwise in the order on
            disk, the longest pairs first. Not every order is equally likely: a part holds pairs of like length.
        seed: of that order, with the epoch (`set_epoch`).
        window_rows: how many rows a worker holds at once, >= 1.
        uneven: where the rows do not divide among ranks. drop: the last world_size - 1 rows at most are left out of the
            epoch; repeat: the first ones are read again; either way all ranks make the same number of batches, which
            DistributedDataParallel waits for. keep: each row once, and a rank may have one more than another.
        rank: of this process, 0 <= rank < world_size; None: that of torch.distributed, or RANK, or 0.
        world_size: ranks that share the rows; None: that of torch.distributed, or WORLD_SIZE, or 1.

    Returns:
        an iterable dataset of items.

    Raises:
        DatasetError: as `torch_dataset`.
        GateError: as `torch_dataset`.
        InputError: no such split, a rank without a world_size, numbers that cannot be, or accelerate has several
            processes and neither is given.

    Example:
        stream = prefkit.torch_stream("demo/dataset", window_rows=1000)
        first = next(iter(stream))
    """
    place = place_of(rank, world_size)
    if window_rows < 1 or uneven not in ("drop", "repeat", "keep"):
        what = f"window_rows is {window_rows!r} and uneven {uneven!r}"
        raise InputError(what, where="torch_stream", expected="window_rows >= 1, and uneven drop, repeat or keep")
    opened = _opened(dataset, key, split, model)
    order = Order(shuffle, seed, window_rows, uneven)
    parts = find_parts(opened, split)
    if len(parts.rows) < (place.world_size if uneven == "drop" else 1):
        raise _too_few(opened.folder, split, len(parts.rows), place.world_size)
    columns = ("pair_id", *list_columns(token_logps=token_logps), *SUMS)
    return PairStream(opened.recorded, parts, columns, order, place, told=rank is not None)


def _opened(dataset: str | Path, key: str | None, split: str | None, model: str | Path | None) -> Opened:
    root = Path(dataset)
    if split not in (*SPLITS, None):
        raise InputError(f"there is no split {split!r}", where=str(root), expected="train, test, or None for both")
    if model is not None:  # what it takes is not for workers, which import this module to make items
        from prefkit.config import PrecomputeConfig
        from prefkit.gate import find_reference, policy_of
        from prefkit.models import load_tokenizer
        from prefkit.store import read_manifest
        from prefkit.target import path_of

        folder = path_of(model, "the folder of the model; leave model out to have nothing compared")
        policy = policy_of(folder, load_tokenizer(folder), PrecomputeConfig(), read_manifest(root)["kind"])
        key, _ = find_reference(root, policy, key)
    return open_reference(root, key)


def _in_memory(opened: Opened, split: str | None, names: Sequence[str]) -> PairTensors:
    """All scored pairs of a split, sorted by pair_id: in an order of chance, as it is a hash."""
    counted = [*scored_blocks(opened, split, columns=["pair_id", *LENGTHS])]
    if not counted:
        raise _too_few(opened.folder, split, 0, 1)
    lengths = pl.concat(counted)
    rows = PairTensors(lengths.to_arrow(), names)
    for block in scored_blocks(opened, split, columns=["pair_id", *names, *SUMS]):
        rows.add(block.to_arrow())
    rows.order = lengths["pair_id"].arg_sort().cast(pl.Int64).to_torch()
    return rows


def _too_few(folder: Path, split: str | None, count: int, world_size: int) -> DatasetError:
    what = "no scored pair" if count == 0 else f"{count} scored pairs for {world_size} ranks"
    where = "" if split is None else f" in the split {split}"
    hint = "split.test_share at prefkit build says how many pairs each has"
    return DatasetError(what + where, where=str(folder), hint=hint)


class PairDataset(Dataset[Item]):
    """The scored pairs of a split in memory. `torch_dataset` makes it.

    Attributes:
        reference: what reference.json holds: `key`, and whose reference it is under `identity`.
    """

    reference: dict[str, Any]

    def __init__(self, reference: dict[str, Any], rows: PairTensors) -> None:
        self.reference, self.rows = reference, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: SupportsIndex) -> Item: ...

    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...

    def __getitem__(self, number: SupportsIndex | slice) -> Item | list[Item]:
        found = range(len(self))[number]  # negative numbers, and what is out of range, as a list has them
        return self.rows.items(found) if isinstance(found, range) else self.rows.items([found])[0]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), ITEMS_AT_ONCE):
            yield from self[start : start + ITEMS_AT_ONCE]

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """Some items at once: what a DataLoader asks for."""
        return self.rows.items([range(len(self))[number] for number in numbers])


@dataclass(frozen=True)
class PairCollator:
    """Items as one padded batch of 2B sequences of at most L tokens: the B chosen ones, then the B rejected ones.

    A sequence is prompt + completion, filled up on the right. The batch has

        pair_id                                list of B
        input_ids                              (2B, L) int64
        attention_mask                         (2B, L) int64, 1 where a token is
        completion_mask                        (2B, L) bool, where a token of the completion is
        ref_chosen_logps, ref_rejected_logps   (B,) float32
        ref_token_logps                        (2B, L) float32, 0 but for completions; where the items have them
        weight                                 (B,) float32

    Attributes:
        pad_token_id: what fills up; any will do, as nothing that counts sees it.
    """

    pad_token_id: int = 0

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """The batch of some items, at least one."""
        sides = [(item["prompt_ids"], item[f"{side}_ids"]) for side in ("chosen", "rejected") for item in items]
        prompts, lengths = (
            torch.tensor(counts)[:, None]
            for counts in ([len(ids) for ids, _ in sides], [len(ids) + len(more) for ids, more in sides])
        )
        places = torch.arange(int(lengths.max()))
        mask = places < lengths
        completion_mask = mask & (places >= prompts)
        tokens = torch.cat([ids for both in sides for ids in both])
        batch = {
            "pair_id": [item["pair_id"] for item in items],
            "input_ids": _spread(tokens, mask, self.pad_token_id),
            "attention_mask": mask.long(),
            "completion_mask": completion_mask,
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps", "weight"):
            batch[name] = torch.stack([item[name] for item in items])
        if "ref_chosen_token_logps" in items[0]:
            logps = [item[f"ref_{side}_token_logps"] for side in ("chosen", "rejected") for item in items]
            batch["ref_token_logps"] = _spread(torch.cat(logps), completion_mask, 0)
        return batch


def _spread(values: Tensor, mask: Tensor, fill: int) -> Tensor:
    """Values at the places of a mask, row by row."""
    return values.new_full(mask.shape, fill).masked_scatter_(mask, values)
