"""A reference in plain PyTorch: every pair once whoever reads it, as it was scored, and never what was changed."""

import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from tiny import built, plain_logps, text_rows, tiny_llama
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import prefkit
from prefkit.config import load_pipeline
from prefkit.errors import DatasetError, GateError, InputError
from prefkit.format import part_name
from prefkit.integrations import pair_stream, pytorch
from prefkit.integrations.pair_stream import PairStream
from prefkit.integrations.pytorch import PairCollator, PairDataset, torch_dataset, torch_stream
from prefkit.reference import precompute_reference
from prefkit.store import list_references, read_json, write_json
from prefkit.tables import write_parquet

DOCS = Path(__file__).parent.parent / "docs"
ROWS = 62
PART_ROWS = (7, 1, 20, 13, 21)
# workers are fewer than the machine's cores here or not, and Python 3.12 warns of any fork beside threads
WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*multi-threaded.*fork")
Item = dict[str, Any]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo/dataset and demo/model: 62 pairs of different weights, some held out, the reference in parts of any size."""
    folder = tmp_path_factory.mktemp("torch") / "demo"
    rows = [{**row, "weight": 1 + number / 64} for number, row in enumerate(text_rows(ROWS))]
    pipeline = built(folder, rows, tiny_llama(folder / "model"), split={"test_share": 0.25})
    precompute_reference(pipeline)
    reparted(folder / "dataset", PART_ROWS)
    return folder / "dataset"


def reparted(dataset: Path, sizes: tuple[int, ...]) -> None:
    """The only reference of a dataset, in parts of these sizes."""
    (key,) = list_references(dataset)
    folder = dataset / "reference" / key
    table = table_of(dataset)
    starts = np.cumsum([0, *sizes])
    cut = [table[int(start) : int(start) + size] for start, size in zip(starts, sizes, strict=False)]
    assert sum(part.height for part in cut) == table.height
    parts = [write_parquet(folder / part_name(number), part)._asdict() for number, part in enumerate(cut)]
    write_json(folder / "reference.json", read_json(folder / "reference.json") | {"parts": parts})


def table_of(dataset: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(dataset.glob("reference/*/part-*.parquet"))])


def expected(dataset: Path, split: str | None = "train") -> dict[str, Item]:
    """pair_id -> the row of the reference with its weight, of a split, in the order of the parts."""
    pairs = pl.concat([pl.read_parquet(path) for path in (dataset / "pairs").glob("*.parquet")])
    split_of = {row["pair_id"]: row for row in pairs.to_dicts()}
    rows = table_of(dataset).to_dicts()
    return {
        row["pair_id"]: row | {"weight": split_of[row["pair_id"]]["weight"]}
        for row in rows
        if split in (None, split_of[row["pair_id"]]["split"])
    }


def ids_of(items: Any) -> list[str]:
    return [item["pair_id"] for item in items]


def assert_same(item: Item, row: Item) -> None:
    """An item is the row that was scored, in the promised types."""
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert item[name].dtype == torch.int64
        assert item[name].tolist() == row[name]
    for name in ("ref_chosen_token_logps", "ref_rejected_token_logps"):
        assert item[name].dtype == torch.float32
        assert item[name].tolist() == row[name]
    for name in ("ref_chosen_logps", "ref_rejected_logps", "weight"):
        assert (item[name].dtype, item[name].shape) == (torch.float32, ())
        assert item[name].item() == row[name]


# in memory


@pytest.mark.parametrize("split", ["train", "test", None])
def test_items_are_the_rows_that_were_scored_sorted_by_pair_id(split: str | None, scored: Path) -> None:
    pairs, rows = torch_dataset(scored, split=split), expected(scored, split)
    assert len(pairs) == len(rows) > 8
    assert ids_of(pairs) == sorted(rows)
    for item in pairs:
        assert_same(item, rows[item["pair_id"]])
    assert [*pairs[0]] == [
        *("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_token_logps", "ref_rejected_token_logps"),
        *("ref_chosen_logps", "ref_rejected_logps", "weight"),
    ]
    assert pairs.reference["key"] == list_references(scored)[0]


def test_a_dataset_is_asked_like_a_list(scored: Path) -> None:
    pairs = torch_dataset(scored)
    wanted = sorted(expected(scored))
    assert pairs[-1]["pair_id"] == wanted[-1]
    assert pairs[np.int64(2)]["pair_id"] == wanted[2]
    assert ids_of(pairs[3:9:2]) == wanted[3:9:2]
    assert pairs[5:5] == []
    assert ids_of(pairs.__getitems__([4, 0, -1, 4])) == [wanted[4], wanted[0], wanted[-1], wanted[4]]
    for number in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError):
            pairs[number]
        with pytest.raises(IndexError):
            pairs.__getitems__([number])


def test_an_item_is_its_own_and_what_is_done_to_it_reaches_no_other(scored: Path) -> None:
    pairs = torch_dataset(scored)
    pairs[0]["chosen_ids"].zero_()
    pairs[0]["ref_chosen_logps"].zero_()
    first = pairs[0]
    assert_same(first, expected(scored)[first["pair_id"]])


def test_log_probs_a_token_are_left_out_on_request(scored: Path) -> None:
    for pairs in (torch_dataset(scored, token_logps=False), torch_stream(scored, token_logps=False)):
        (first, *_) = pairs
        assert not {name for name in first if "token_logps" in name}
        row = expected(scored)[first["pair_id"]]
        assert first["chosen_ids"].tolist() == row["chosen_ids"]
        assert first["ref_chosen_logps"].item() == row["ref_chosen_logps"]


def test_a_dataset_holds_four_bytes_a_prompt_token_and_eight_a_completion_token(scored: Path) -> None:
    rows = expected(scored).values()
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    completions = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    for token_logps, a_completion in ((True, 8), (False, 4)):
        held = torch_dataset(scored, token_logps=token_logps).rows.lists
        lists = [values.nbytes for name, (values, _) in held.items() if name != "pair_id"]
        assert sum(lists) == 4 * prompts + a_completion * completions


@WORKERS
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_need_nothing_on_disk_and_verify_nothing_again(start: str, scored: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(scored, tmp_path / "dataset"))
    pairs = torch_dataset(dataset)
    shutil.rmtree(dataset)
    loader = DataLoader(
        pairs, batch_size=5, collate_fn=PairCollator(), num_workers=2, multiprocessing_context=start, timeout=200
    )
    assert [pair for batch in loader for pair in batch["pair_id"]] == sorted(expected(scored))
    assert ids_of(pickle.loads(pickle.dumps(pairs))) == sorted(expected(scored))


# the collator


def item(number: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Item:
    found: Item = {"pair_id": f"pair {number}"}
    for name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        found[f"{name}_ids"] = torch.tensor(ids)
    for side, ids in (("chosen", chosen), ("rejected", rejected)):
        found[f"ref_{side}_token_logps"] = -torch.tensor(ids, dtype=torch.float32)
        found[f"ref_{side}_logps"] = -torch.tensor(float(sum(ids)))
    return found | {"weight": torch.tensor(number + 0.5)}


def test_a_batch_is_chosen_then_rejected_padded_on_the_right() -> None:
    batch = PairCollator(pad_token_id=9)([item(0, [1, 2], [3], [4, 5]), item(1, [6], [7, 8, 9], [10])])
    assert batch["pair_id"] == ["pair 0", "pair 1"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [6, 7, 8, 9], [1, 2, 4, 5], [6, 10, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [
        [False, False, True, False],
        [False, True, True, True],
        [False, False, True, True],
        [False, True, False, False],
    ]
    assert batch["ref_token_logps"].tolist() == [[0, 0, -3, 0], [0, -7, -8, -9], [0, 0, -4, -5], [0, -10, 0, 0]]
    assert batch["ref_chosen_logps"].tolist() == [-3, -24]
    assert batch["ref_rejected_logps"].tolist() == [-9, -10]
    assert batch["weight"].tolist() == [0.5, 1.5]
    dtypes = {name: value.dtype for name, value in batch.items() if name != "pair_id"}
    assert dtypes == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "completion_mask": torch.bool,
        **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps", "weight", "ref_token_logps"), torch.float32),
    }


def test_a_batch_of_items_without_log_probs_a_token_has_none() -> None:
    one = {name: value for name, value in item(0, [1], [2], [3]).items() if "token_logps" not in name}
    assert set(PairCollator()([one])) == {
        *("pair_id", "input_ids", "attention_mask", "completion_mask"),
        *("ref_chosen_logps", "ref_rejected_logps", "weight"),
    }


def test_the_log_probs_of_a_batch_are_those_of_the_model_whatever_fills_it_up(scored: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(scored.parent / "model")
    for pad in (0, 7):
        batch = PairCollator(pad)(torch_dataset(scored)[:6])
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        mask = batch["completion_mask"][:, 1:]
        torch.testing.assert_close(logps * mask, batch["ref_token_logps"][:, 1:], atol=1e-4, rtol=0)
        chosen, rejected = (logps * mask).sum(-1).chunk(2)
        torch.testing.assert_close(chosen, batch["ref_chosen_logps"], atol=1e-3, rtol=0)
        torch.testing.assert_close(rejected, batch["ref_rejected_logps"], atol=1e-3, rtol=0)


# a stream


def of_workers(stream: PairStream, workers: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Item]]:
    """What each of so many workers makes of a stream."""
    found = []
    for worker in range(workers):
        info = type("Info", (), {"id": worker, "num_workers": workers})()
        monkeypatch.setattr(pair_stream, "get_worker_info", lambda info=info: info)
        found.append([*stream])
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window_rows", [1, 5, 1000])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (2, 3), (3, 1), (5, 4), (70, 1), (1, 70)])
def test_every_row_is_read_once_by_one_of_all_workers_and_ranks(
    ranks: int, workers: int, window_rows: int, shuffle: bool, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, each, made = expected(scored), [], []
    for rank in range(ranks):
        stream = torch_stream(
            scored, shuffle=shuffle, window_rows=window_rows, uneven="keep", rank=rank, world_size=ranks
        )
        stream.set_epoch(3)
        shares = of_workers(stream, workers, monkeypatch)
        assert stream.num_pairs == sum(map(len, shares))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        each.append(stream.num_pairs)
        made += [one for share in shares for one in share]
    assert max(each) - min(each) <= 1
    assert sorted(ids_of(made)) == sorted(rows)
    for one in made:
        assert_same(one, rows[one["pair_id"]])
    if not shuffle:
        assert ids_of(made) == [*rows]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_all_ranks_make_as_many_items_where_rows_are_dropped_or_repeated(ranks: int, scored: Path) -> None:
    rows = expected(scored)
    over = len(rows) % ranks
    uneven: Any
    for uneven in ("drop", "repeat"):
        left = []
        streams = [torch_stream(scored, uneven=uneven, rank=rank, world_size=ranks) for rank in range(ranks)]
        for epoch in range(4):
            shares = []
            for stream in streams:
                stream.set_epoch(epoch)
                shares.append(ids_of(stream))
            assert {len(share) for share in shares} == {stream.num_pairs for stream in streams}
            assert len({len(share) for share in shares}) == 1
            times = Counter(pair for share in shares for pair in share)
            if uneven == "drop":
                assert set(times.values()) == {1}
                assert len(rows) - len(times) == over
                left.append(frozenset(rows) - set(times))
            else:
                assert set(times) == set(rows)
                assert sum(times.values()) - len(rows) == (ranks - over) % ranks
        if over and uneven == "drop":
            assert len(set(left)) > 1  # not the same ones in every epoch


def test_more_ranks_than_rows_are_refused_or_read_some_again(scored: Path) -> None:
    rows = expected(scored)
    with pytest.raises(DatasetError) as refused:
        torch_stream(scored, rank=0, world_size=100)
    assert refused.value.message == f"{len(rows)} scored pairs for 100 ranks in the split train"
    times = Counter(
        pair for rank in range(100) for pair in ids_of(torch_stream(scored, uneven="repeat", rank=rank, world_size=100))
    )
    assert set(times) == set(rows)
    assert sum(times.values()) == 100


def test_the_order_is_of_chance_by_seed_and_epoch_and_the_same_again(scored: Path) -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[str]:
        stream = torch_stream(scored, seed=seed, **options)
        stream.set_epoch(epoch)
        return ids_of(stream)

    assert order(0, 0) == order(0, 0)
    found = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(found) == 9
    assert {frozenset(one) for one in found} == {frozenset(expected(scored))}
    assert order(0, 0, window_rows=1) != [*expected(scored)]  # whole parts change places


def test_rows_are_mixed_within_a_window_of_parts(scored: Path) -> None:
    """Of 400 orders each pair stands about as often in the first half as in the second, and beside any other."""
    rows = [*expected(scored)]
    stream, firsts, neighbours = torch_stream(scored), Counter[str](), set[tuple[str, str]]()
    for epoch in range(400):
        stream.set_epoch(epoch)
        order = ids_of(stream)
        firsts.update(order[: len(order) // 2])
        neighbours.update(itertools.pairwise(order))
    share = len(rows) // 2 / len(rows)
    off = 5 * (400 * share * (1 - share)) ** 0.5  # five standard deviations of a fair coin
    assert all(abs(firsts[pair] - 400 * share) < off for pair in rows)
    assert len(neighbours) > 0.99 * len(rows) * (len(rows) - 1)


@pytest.mark.parametrize("window_rows", [3, 1000])
def test_a_stretch_reads_each_of_its_parts_once(
    window_rows: int, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = pq.ParquetFile

    def counted(path: str, **options: Any) -> Any:
        opened.append(path)
        return real(path, **options)

    stream = torch_stream(scored, window_rows=window_rows)
    monkeypatch.setattr(pq, "ParquetFile", counted)
    assert len([*stream]) == len(expected(scored))
    assert sorted(opened) == sorted(str(path) for path in scored.glob("reference/*/part-*.parquet"))


@WORKERS
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_stream_verify_nothing_again_and_see_the_next_epoch(
    start: str, scored: Path, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(scored, tmp_path / "dataset"))
    stream = torch_stream(dataset, window_rows=9)
    (dataset / "manifest.json").unlink()  # whoever verifies needs it
    shutil.rmtree(dataset / "pairs")
    loader = DataLoader(
        stream, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=start, timeout=200
    )
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append(ids_of(loader))
        alone = torch_stream(scored, window_rows=9)
        alone.set_epoch(epoch)
        assert sorted(orders[-1]) == sorted(ids_of(alone)) == sorted(expected(scored))
    assert orders[0] != orders[1]


# going on


@pytest.mark.parametrize("window_rows", [4, 1000])
@pytest.mark.parametrize("made", [0, 1, 4, 9, 20])
def test_a_stream_goes_on_where_another_stood_and_the_next_pass_is_whole(
    made: int, window_rows: int, scored: Path
) -> None:
    def make() -> PairStream:
        return torch_stream(scored, seed=2, window_rows=window_rows, rank=1, world_size=2)

    whole = make()
    whole.set_epoch(5)
    order = ids_of(whole)
    first = make()
    first.set_epoch(5)
    reading = iter(first)
    for _ in range(made):
        next(reading)
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    assert ids_of(second) == order[made:]
    assert ids_of(second) == order


def test_a_stream_that_was_read_to_its_end_has_nothing_left_of_its_epoch(scored: Path) -> None:
    first, second = torch_stream(scored), torch_stream(scored)
    count = len([*first])
    second.load_state_dict(first.state_dict())
    assert [*second] == []
    assert len([*second]) == count


def test_the_state_of_another_stream_is_refused(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch_stream(scored).state_dict()
    others = [
        torch_stream(scored, seed=1),
        torch_stream(scored, window_rows=5),
        torch_stream(scored, split="test"),
        torch_stream(scored, shuffle=False),
        torch_stream(scored, rank=0, world_size=2),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"the state is that of another stream \(state and stream\):") as refused:
            other.load_state_dict(state)
        assert refused.value.expected == "the same rows, seed, ranks and workers"
    with pytest.raises(InputError, match=r"(?m)seed: 0 and 1$"):
        others[0].load_state_dict(state)
    monkeypatch.setattr(pair_stream, "get_worker_info", type("Info", (), {"id": 1, "num_workers": 2}))
    with pytest.raises(InputError, match=r"(?m)\(state and stream\): num_workers: 1 and 2; worker: 0 and 1$"):
        torch_stream(scored).load_state_dict(state)


# ranks


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let torch.distributed say that this is a rank of so many."""

    def join(rank: int, world_size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)

    return join


def test_the_rank_is_told_or_that_of_torch_distributed_or_of_the_environment(
    scored: Path, monkeypatch: pytest.MonkeyPatch, joined: Callable[[int, int], None]
) -> None:
    assert torch_stream(scored).place == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert torch_stream(scored).place == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert torch_stream(scored).place == (1, 3)
    joined(2, 4)
    assert torch_stream(scored).place == (2, 4)
    assert torch_stream(scored, rank=0, world_size=2).place == (0, 2)


def test_a_rank_without_a_world_and_numbers_that_cannot_be_are_refused(scored: Path) -> None:
    for place in ({"rank": 0}, {"world_size": 2}):
        with pytest.raises(InputError, match="rank and world_size belong together") as refused:
            torch_stream(scored, **place)  # type: ignore[arg-type]
        assert refused.value.expected == "both, or neither"
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"rank {rank} of {size}") as refused:
            torch_stream(scored, rank=rank, world_size=size)
        assert refused.value.expected == "0 <= rank < world_size"


def test_a_stream_that_was_made_too_early_is_refused_when_it_is_read_or_handed_to_workers(
    scored: Path, joined: Callable[[int, int], None]
) -> None:
    early, told = torch_stream(scored), torch_stream(scored, rank=0, world_size=1)
    joined(1, 2)
    for use in (lambda: [*early], lambda: pickle.dumps(early)):
        with pytest.raises(InputError, match="was made for rank 0 of 1, and this is rank 1 of 2") as refused:
            use()
        hint = "make it after torch.distributed.init_process_group, or say rank= and world_size="
        assert refused.value.hint == hint
    assert len([*told]) == len(expected(scored))


def test_accelerate_with_several_processes_is_asked_for_a_rank(
    scored: Path, joined: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    processes = 1
    monkeypatch.setattr(accelerate.state, "is_initialized", lambda: True)
    monkeypatch.setattr(accelerate.state, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    assert torch_stream(scored).place == (0, 1)
    joined(1, 2)
    assert torch_stream(scored).place == (1, 2), "accelerate that knows of one process deals nothing out"
    processes = 2
    with pytest.raises(InputError) as refused:
        torch_stream(scored)
    what = "accelerate has several processes, and deals out the rows of a prepared DataLoader once more"
    assert refused.value.message == what
    hint = "torch_dataset in a prepared DataLoader; or rank=, world_size= and a DataLoader that is not prepared"
    assert refused.value.hint == hint
    assert torch_stream(scored, rank=1, world_size=2).place == (1, 2)


# refused

BOTH = [torch_dataset, torch_stream]


@pytest.fixture
def copied(scored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "copied"))


@pytest.mark.parametrize("make", BOTH)
def test_what_was_changed_is_refused_by_its_name(make: Callable[..., Any], copied: Path) -> None:
    part = sorted(copied.glob("reference/*/part-*.parquet"))[2]
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(GateError, match="part is missing") as refused:
        make(copied)
    assert refused.value.where == str(part)
    rows = pl.read_parquet(kept)
    write_parquet(part, rows.with_columns(pl.col("ref_chosen_logps") * 0.5))
    with pytest.raises(GateError, match="part was changed: its sha256 is not the recorded one") as refused:
        make(copied)
    assert refused.value.where == str(part)
    part.write_bytes(kept)
    pairs = next((copied / "pairs").glob("*.parquet"))
    kept = pairs.read_bytes()
    write_parquet(pairs, pl.read_parquet(pairs).with_columns(weight=2.0))
    with pytest.raises(DatasetError, match="part was changed: its sha256 is not the recorded one") as other:
        make(copied)
    assert other.value.where == str(pairs)
    pairs.write_bytes(kept)
    manifest = read_json(copied / "manifest.json")
    write_json(copied / "manifest.json", manifest | {"format_version": 99})
    with pytest.raises(DatasetError, match="format_version is 99"):
        make(copied)
    write_json(copied / "manifest.json", manifest)
    assert make(copied)


@pytest.mark.parametrize("make", BOTH)
def test_a_row_that_no_reference_pass_writes_is_refused_though_its_part_has_the_recorded_hash(
    make: Callable[..., Any], copied: Path
) -> None:
    part = sorted(copied.glob("reference/*/part-*.parquet"))[0]
    edited = write_parquet(part, pl.read_parquet(part).with_columns(pl.col("ref_chosen_logps") + 1))._asdict()
    path = part.with_name("reference.json")
    recorded = read_json(path)
    write_json(path, recorded | {"parts": [edited, *recorded["parts"][1:]]})
    with pytest.raises(GateError, match="where ref_chosen_logps is not the sum of ref_chosen_token_logps"):
        make(copied)


@pytest.mark.parametrize("make", BOTH)
def test_a_wrong_key_split_or_number_is_refused(make: Callable[..., Any], scored: Path) -> None:
    with pytest.raises(DatasetError, match="no reference abc"):
        make(scored, "abc")
    with pytest.raises(InputError, match="there is no split 'dev'") as refused:
        make(scored, split="dev")
    assert refused.value.expected == "train, test, or None for both"
    assert make(scored, list_references(scored)[0]).reference["key"] == list_references(scored)[0]
    with pytest.raises(InputError, match="a path cannot be a value of type Linear") as refused:
        make(scored, model=torch.nn.Linear(1, 1))
    assert refused.value.expected == "the folder of the model; leave model out to have nothing compared"
    for odd, told in (({"window_rows": 0}, "0 and uneven 'drop'"), ({"uneven": "pad"}, "10000 and uneven 'pad'")):
        with pytest.raises(InputError, match="window_rows is ") as refused:
            torch_stream(scored, **odd)
        assert refused.value.message == f"window_rows is {told}"
        assert refused.value.expected == "window_rows >= 1, and uneven drop, repeat or keep"
        assert next(iter(odd)) in refused.value.message


@pytest.mark.parametrize("make", BOTH)
def test_a_split_without_pairs_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    precompute_reference(built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model")))
    with pytest.raises(DatasetError, match="no scored pair in the split test") as refused:
        make(tmp_path / "dataset", split="test")
    assert refused.value.hint == "split.test_share at prefkit build says how many pairs each has"


@pytest.mark.parametrize("make", BOTH)
def test_the_reference_of_another_model_is_refused_and_of_several_the_models_own_is_taken(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    models = [tiny_llama(tmp_path / f"model{seed}", seed) for seed in range(3)]
    keys = [precompute_reference(built(tmp_path, text_rows(4), model)).key for model in models[:2]]
    dataset = tmp_path / "dataset"
    with pytest.raises(GateError, match="there are several references"):
        make(dataset)
    assert [make(dataset, model=model).reference["key"] for model in models[:2]] == keys
    with pytest.raises(GateError, match=r"no reference is this policy's:(?s:.*)weights_sha256"):
        make(dataset, model=models[2])
    with pytest.raises(GateError, match=r"no reference is this policy's:(?s:.*)weights_sha256"):
        make(dataset, keys[0], model=models[1])


# loops


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[list[str]]]:
    """Every loss that is passed back from, and the pair_ids of every batch that is read from a dataset in memory."""
    losses: list[float] = []
    batches: list[list[str]] = []
    backward, read = torch.Tensor.backward, PairDataset.__getitems__

    def watch(loss: torch.Tensor, *given: Any, **options: Any) -> None:
        losses.append(loss.item())
        backward(loss, *given, **options)  # type: ignore[no-untyped-call]

    def note(self: PairDataset, numbers: list[int]) -> list[Item]:
        found = read(self, numbers)
        batches.append(ids_of(found))
        return found

    monkeypatch.setattr(torch.Tensor, "backward", watch)
    monkeypatch.setattr(PairDataset, "__getitems__", note)
    return losses, batches


def plain_losses(dataset: Path, batches: list[list[str]], learning_rate: float, beta: float) -> list[float]:
    """DPO by its definition, a sequence at a time, on these batches: the loss of every update."""
    model = AutoModelForCausalLM.from_pretrained(dataset.parent / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    rows, losses = expected(dataset), []
    for batch in batches:
        each = []
        for row in map(rows.__getitem__, batch):
            chosen, rejected = (
                plain_logps(model, row["prompt_ids"], row[f"{side}_ids"]).sum() - row[f"ref_{side}_logps"]
                for side in ("chosen", "rejected")
            )
            each.append(-torch.log(torch.sigmoid(beta * (chosen - rejected))))
        loss = torch.stack(each).sum() / len(each)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return losses


@pytest.mark.parametrize("number", [0, 1])
def test_the_loops_of_the_docs_train_as_dpo_does_from_ln_2_on(
    number: int,
    scored: Path,
    watched: tuple[list[float], list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses, batches = watched
    monkeypatch.chdir(scored.parent.parent)  # where demo/dataset and demo/model are
    block = blocks_of("pytorch.md")[number]
    torch.manual_seed(0)  # of the shuffling
    exec(compile(block, "docs/pytorch.md", "exec"), {})
    assert sorted(pair for batch in batches for pair in batch) == sorted(expected(scored))
    assert len(losses) == len(batches) == -(-len(expected(scored)) // 16)
    assert abs(losses[0] - np.log(2)) < 1e-5
    assert losses[-1] < losses[0] - 1e-3
    shown = [float(line) for line in capsys.readouterr().out.split()]
    assert shown == pytest.approx(losses, abs=5.1e-5)
    assert losses == pytest.approx(plain_losses(scored, batches, 2e-4, 0.1), abs=1e-5)


def test_a_loop_of_ones_own_gives_the_losses_of_prefkit_train(scored: Path, tmp_path: Path) -> None:
    """The same pairs in the same batches, weighted; the learning rate constant, nothing clipped."""
    changes = ["train.learning_rate=1e-3", "train.batch_size=8", "train.max_steps=12", "train.max_grad_norm=null"]
    changes += ["train.lr_scheduler_type=constant", "train.beta=0.3"]
    pipeline = load_pipeline(scored.parent / "pipeline.yaml", changes)
    trained = prefkit.train_dpo(pipeline, out=str(tmp_path / "run"))
    assert trained.steps == 12
    steps = pl.read_parquet(tmp_path / "run" / "steps.parquet").filter(pl.col("loss").is_not_null())
    seen = pl.read_parquet(tmp_path / "run" / "pair_dynamics" / "*.parquet")
    pairs = torch_dataset(scored, model=scored.parent / "model")
    place = {pair: number for number, pair in enumerate(ids_of(pairs))}
    batches = [[place[pair] for pair in seen.filter(pl.col("step") == step)["pair_id"]] for step in range(12)]
    model = AutoModelForCausalLM.from_pretrained(scored.parent / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for batch in DataLoader(pairs, batch_sampler=batches, collate_fn=PairCollator()):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        chosen, rejected = (logps * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
        margins = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
        weights = batch["weight"] / batch["weight"].sum()
        loss = (weights * -torch.nn.functional.logsigmoid(0.3 * margins)).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert losses == pytest.approx(steps["loss"].to_list(), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "accelerate"])
def test_two_processes_share_the_pairs_make_as_many_batches_and_train_one_model(
    kind: str, scored: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).parent / "loops.py"), kind, str(scored.parent), str(tmp_path)]
    ended = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    one, other = (read_json(tmp_path / f"{rank}.json") for rank in range(2))
    assert one["weight"] == pytest.approx(other["weight"], abs=1e-5)
    assert [len(batch) for batch in one["read"]] == [len(batch) for batch in other["read"]]
    assert (one["losses"][0] + other["losses"][0]) / 2 == pytest.approx(np.log(2), abs=1e-5)
    times = Counter(pair for each in (one, other) for batch in each["read"] for pair in batch)
    rows = set(expected(scored))
    assert len(rows) % 2 == 1
    assert set(times) <= rows
    if kind == "ddp":
        assert sum(times.values()) == len(times) == len(rows) - 1  # the odd one is left out of this epoch
    else:
        assert set(times) == rows  # accelerate fills its last batches up


def test_the_names_are_found_in_prefkit() -> None:
    assert prefkit.torch_dataset is pytorch.torch_dataset
    assert prefkit.torch_stream is pytorch.torch_stream
    assert prefkit.PairCollator is pytorch.PairCollator
    assert prefkit.PairStream is pair_stream.PairStream
