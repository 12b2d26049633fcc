"""TRL trains from our dataset as it does from its own reference pass, and what would be silently wrong is refused."""

import hashlib
import importlib
import json
import logging
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("trl")

import datasets
import peft
import transformers
from adapted import by_transformers, quiet, sft_adapter
from safetensors.torch import load_file, save_file
from tiny import built, llama_config, random_model, save_model, text_rows, tiny_llama, tiny_tokenizer
from trl.trainer.dpo_trainer import DPOTrainer
from trl_world import (
    World,
    config,
    counting,
    edit_reference,
    losses_of,
    make_world,
    marks,
    stock,
    texts_of,
)

from prefkit.errors import DatasetError, GateError, InputError, ModelError
from prefkit.integrations import trl as ours
from prefkit.integrations.trl import PrecomputedDPOTrainer, load_reference
from prefkit.reference import precompute_reference

pytestmark = marks
LN2 = math.log(2)
COLUMNS = ["pair_id", "reference", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
COLUMNS += ["row_hash"]
CHANGED = "the rows of prefkit.integrations.trl.load_reference(DATASET): columns may be added, none changed"
ALL_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
ALL_LOSSES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
OF_THE_DIFFERENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


@pytest.fixture(autouse=True)
def _nothing_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_told: None)


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with quiet():
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A text dataset with a test split; 72 pairs or so to train on."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("chat"), "chat", 30)


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A copy of the world that a test may spoil."""
    dataset = Path(shutil.copytree(world.dataset, tmp_path / "dataset"))
    return World(tmp_path, dataset, Path(shutil.copytree(world.model, tmp_path / "model")), world.key)


def trainer(world: World, out: Path, data: Any = None, model: Any = None, **options: Any) -> Any:
    named = ("processing_class", "peft_config", "eval_dataset", "other_reference", "check_scores", "ref_model")
    given = {name: options.pop(name) for name in (*named, "data_collator") if name in options}
    return PrecomputedDPOTrainer(
        str(world.model) if model is None else model,
        args=config(out, **options),
        train_dataset=load_reference(world.dataset) if data is None else data,
        **given,
    )


def hash_of(row: dict[str, Any], key: str) -> int:
    """By hand: three lengths, two sums, the ids, the key and the pair, little-endian; 8 bytes of their SHA-256."""
    ids = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
    data = b"".join(len(one).to_bytes(4, "little") for one in ids)
    data += struct.pack("<f", row["ref_chosen_logps"]) + struct.pack("<f", row["ref_rejected_logps"])
    data += b"".join(token.to_bytes(4, "little") for one in ids for token in one)
    (found,) = struct.unpack("<q", hashlib.sha256(data + f"{key}{row['pair_id']}".encode()).digest()[:8])
    return int(found)


# --- the dataset


def test_the_dataset_has_what_trl_reads_sorted_by_pair_id(world: World) -> None:
    table = pl.read_parquet(world.dataset / "reference" / world.key / "part-*.parquet")
    pairs = pl.read_parquet(world.dataset / "pairs" / "*.parquet")
    for split in ("train", "test", None):
        data = load_reference(world.dataset, split=split)
        wanted = pairs if split is None else pairs.filter(pl.col("split") == split)
        rows = table.filter(pl.col("pair_id").is_in(wanted["pair_id"].to_list())).sort("pair_id")
        assert data.column_names == COLUMNS
        assert rows.height == wanted.height > 5
        assert [*data] == [
            {**row, "reference": world.key, "row_hash": hash_of(row, world.key)}
            for row in rows.select(set(COLUMNS) - {"reference", "row_hash"}).to_dicts()
        ]
        assert isinstance(data[0]["ref_chosen_logps"], float)
        assert data.format["type"] is None
        told = json.loads(data.info.description)
        recorded = json.loads((world.dataset / "reference" / world.key / "reference.json").read_text())
        assert told == {"prefkit_reference": world.key, "identity": recorded["identity"], "template": None}


def test_a_key_a_beginning_of_it_and_a_path_as_text_name_the_reference(world: World) -> None:
    assert load_reference(str(world.dataset), world.key)[0] == load_reference(world.dataset)[0]


def test_a_stream_has_the_same_rows_in_the_same_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (ours.STREAM_ROWS, 7):
        monkeypatch.setattr(ours, "STREAM_ROWS", block)
        for split in ("train", "test"):
            stream = load_reference(world.dataset, split=split, streaming=True)
            assert isinstance(stream, datasets.IterableDataset)
            assert stream.num_shards == 1  # a second process would otherwise run out of batches at another time
            assert [*stream] == [*load_reference(world.dataset, split=split)]
            assert [*stream] == [*stream]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_without_pairs_and_one_that_there_is_not_are_refused(tmp_path: Path, streaming: bool) -> None:
    pipeline = built(tmp_path, text_rows(6), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    assert len([*load_reference(tmp_path / "dataset", streaming=streaming)]) == 6
    with pytest.raises(DatasetError, match="no scored pair in the split test") as refused:
        load_reference(tmp_path / "dataset", split="test", streaming=streaming)
    assert refused.value.hint == "split.test_share at prefkit build says how many pairs each has"
    with pytest.raises(InputError, match="there is no split 'validation'") as refused_name:
        load_reference(tmp_path / "dataset", split="validation", streaming=streaming)
    assert refused_name.value.expected == "train, test, or None for both"


def test_who_a_dataset_is_survives_what_datasets_does_to_it(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    data.save_to_disk(tmp_path / "saved")
    halves = data.train_test_split(test_size=0.3, seed=0)
    stream = load_reference(world.dataset, streaming=True)
    for one in (
        data.map(lambda row: {"length": len(row["prompt_ids"])}),
        data.filter(lambda row: len(row["prompt_ids"]) > 3),
        data.select(range(5)),
        data.shuffle(seed=3),
        data.sort("ref_chosen_logps"),
        halves["train"],
        halves["test"],
        data.remove_columns("pair_id").add_column("pair_id", data["pair_id"]),
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.concatenate_datasets([data, load_reference(world.dataset, split="test")]),
        datasets.interleave_datasets([data, load_reference(world.dataset, split="test")]),
        data.with_format("torch").with_format(None),
        stream.shuffle(seed=1, buffer_size=10),
        stream.map(lambda row: {"length": len(row["prompt_ids"])}),
        stream.filter(lambda row: len(row["prompt_ids"]) > 3),
        stream.skip(2).take(5),
    ):
        assert ours.carried(one, "it").key == world.key


def test_a_dataset_that_has_lost_who_it_is_is_refused(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    data.to_parquet(tmp_path / "rows.parquet")
    other = datasets.Dataset.from_list([dict(row) for row in data])
    folder = world.dataset / "reference" / world.key
    loaded: Any = datasets.load_dataset
    changed = load_reference(world.dataset)
    told = json.loads(changed.info.description)
    changed.info.description = json.dumps(told | {"identity": told["identity"] | {"max_length": 4096}})
    for one in (
        loaded("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "a")),
        loaded("parquet", data_files=str(folder / "part-*.parquet"), split="train", cache_dir=str(tmp_path / "b")),
        data.to_iterable_dataset(),
        other,
        changed,
        texts_of(world),
    ):
        with pytest.raises(DatasetError, match="does not say whose reference it has") as refused:
            trainer(world, tmp_path / "out", one)
        assert refused.value.message == (
            "does not say whose reference it has: it is not of load_reference, or of two, or was saved in a way that "
            "loses it"
        )
        assert refused.value.where == "train_dataset"
        assert refused.value.expected == "dataset.info.description as load_reference writes it"
        assert "load_reference(DATASET), and save_to_disk to keep it" in refused.value.hint
    with pytest.raises(DatasetError, match="is a list") as no_dataset:
        trainer(world, tmp_path / "out", [*data])
    assert no_dataset.value.expected == "a dataset of prefkit.integrations.trl.load_reference(DATASET)"


def test_rows_of_another_origin_among_ours_are_refused(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    row = {**data[0], "reference": "0123456789abcdef"}
    foreign = datasets.Dataset.from_list([row], features=data.features)
    mixed = datasets.concatenate_datasets([data, foreign]).shuffle(seed=0)
    assert json.loads(mixed.info.description)["prefkit_reference"] == world.key
    with pytest.raises(DatasetError, match="has rows of another origin: reference 0123456789abcdef") as refused:
        trainer(world, tmp_path / "out", mixed)
    assert refused.value.expected == world.key
    without = foreign.remove_columns("reference")
    with pytest.raises(DatasetError, match="has rows of another origin: reference None"):
        trainer(world, tmp_path / "out", datasets.concatenate_datasets([data, without]))


def test_rows_that_are_not_what_the_collator_takes_are_refused(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    for one, told in (
        (data.with_format("torch"), "Tensor in prompt_ids"),
        (data.with_format("numpy"), "ndarray in prompt_ids"),
        (load_reference(world.dataset, streaming=True).with_format("torch"), "Tensor in prompt_ids"),
        (data.map(lambda row: {"ref_chosen_logps": [row["ref_chosen_logps"]]}), "list of float in ref_chosen_logps"),
        (data.map(lambda row: {"chosen_ids": [row["chosen_ids"]]}), "list of list in chosen_ids"),
    ):
        with pytest.raises(DatasetError, match=f"the first row has a {told}") as refused:
            trainer(world, tmp_path / "out", one)
        assert refused.value.expected == "lists of whole numbers as ids, a float as each sum"
        assert refused.value.hint == "dataset.with_format(None), or load it again"
    with pytest.raises(DatasetError, match="has no column ref_chosen_logps") as refused:
        trainer(world, tmp_path / "out", data.remove_columns("ref_chosen_logps"))
    assert refused.value.expected == ", ".join(COLUMNS)
    with pytest.raises(DatasetError, match="has no rows"):
        trainer(world, tmp_path / "out", data.select([]))


EDITS: dict[str, Any] = {
    "mean": lambda row: {"ref_chosen_logps": row["ref_chosen_logps"] / len(row["chosen_ids"])},
    "cut": lambda row: {"chosen_ids": row["chosen_ids"][:-1]},
    "moved": lambda row: {
        "prompt_ids": row["prompt_ids"][:-1],
        "chosen_ids": row["prompt_ids"][-1:] + row["chosen_ids"],
    },
    "swapped": lambda row: {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]},
    "nan": lambda row: {"ref_rejected_logps": float("nan")},
    "null": lambda row: {"ref_rejected_logps": None},
    "null id": lambda row: {"rejected_ids": [None, *row["rejected_ids"][1:]]},
    "no ids": lambda row: {"rejected_ids": None},
    "other pair": lambda row: {"pair_id": "0" * 64},
    "no pair": lambda row: {"pair_id": None},
    "no hash": lambda row: {"row_hash": None},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_one_changed_row_is_refused_a_tables_at_once_a_streams_as_it_comes(
    world: World, tmp_path: Path, name: str, streaming: bool
) -> None:
    last = 66  # outside the 64 that a stream's sample has; check_scores=False asks for nothing else
    data = load_reference(world.dataset, streaming=streaming)

    def edit(row: dict[str, Any], place: int) -> dict[str, Any]:
        return {**row, **(EDITS[name](row) if place == last else {})}

    changed = data.map(edit, with_indices=True, features=data.features)
    pair = {"other pair": "0" * 64, "no pair": None}.get(name, load_reference(world.dataset)[last]["pair_id"])
    if not streaming:
        with pytest.raises(DatasetError, match="rows were changed since they were loaded") as refused:
            trainer(world, tmp_path / "out", changed, check_scores=False)
        assert refused.value.message == f"rows were changed since they were loaded: 1, the first of pair {pair}"
        assert refused.value.where == "train_dataset"
        assert refused.value.expected == CHANGED
        with pytest.raises(DatasetError, match="rows were changed since they were loaded"):
            trainer(world, tmp_path / "out", check_scores=False).evaluate(changed)
        return
    one = trainer(world, tmp_path / "out", changed, check_scores=False, per_device_train_batch_size=33, max_steps=3)
    with pytest.raises(DatasetError, match="was changed since it was loaded") as refused:
        one.train()
    assert refused.value.message == "was changed since it was loaded"
    assert refused.value.where == f"a row of pair {pair}, reference {world.key}"
    assert refused.value.expected == CHANGED
    assert one.state.global_step == 1  # the third batch is put together before the second is trained on


def test_a_later_row_of_another_reference_in_a_stream_is_refused_in_workers_too(world: World, tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(6), world.model, precompute={"max_length": 64})
    precompute_reference(pipeline)
    stream = load_reference(world.dataset, streaming=True)
    mixed = datasets.concatenate_datasets([stream.take(66), load_reference(tmp_path / "dataset", streaming=True)])
    mixed.info.description = stream.info.description
    other = load_reference(tmp_path / "dataset")[0]["reference"]
    for workers in (0, 1):
        one = trainer(world, tmp_path / "out", mixed, max_steps=17, dataloader_num_workers=workers)
        with pytest.raises(DatasetError, match=f"is of another reference, {other}"):
            one.train()
    renamed = mixed.map(lambda row: {"reference": world.key})
    with pytest.raises(DatasetError, match="was changed since it was loaded"):
        trainer(world, tmp_path / "out", renamed, max_steps=17).train()


def test_rows_that_a_transform_changes_on_the_way_are_refused(world: World, tmp_path: Path) -> None:
    def cut(rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "chosen_ids": [ids[:2] for ids in rows["chosen_ids"]]}

    one = trainer(world, tmp_path / "out", load_reference(world.dataset).with_transform(cut), check_scores=False)
    with pytest.raises(DatasetError, match="was changed since it was loaded"):
        one.train()


def test_columns_of_ones_own_and_wider_types_change_no_row(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset).map(lambda row: {**row, "length": len(row["prompt_ids"]), "x": None})
    wide = {name: datasets.List(datasets.Value("int64")) for name in COLUMNS[2:5]}
    wide |= {name: datasets.Value("float64") for name in COLUMNS[5:7]}
    one = data.cast(datasets.Features({**data.features, **wide}))
    plain = losses_of(trainer(world, tmp_path / "a"))
    for whole in (True, False):
        found = losses_of(trainer(world, tmp_path / "b", one, remove_unused_columns=whole))
        assert found == pytest.approx(plain, abs=1e-6)


def test_a_collator_of_ones_own_gets_the_columns_that_trl_gives_it(world: World, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    seen = []

    class Noting(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            seen.append(sorted(examples[0]))
            return super().torch_call(examples)

    for whole, columns in ((True, COLUMNS), (False, COLUMNS[2:7])):
        seen.clear()
        for streaming in (False, True):
            data = load_reference(world.dataset, streaming=streaming)
            options = {"remove_unused_columns": not whole, "max_steps": 1}
            losses_of(trainer(world, tmp_path / "out", data, data_collator=Noting(pad_token_id=0), **options))
        assert {tuple(names) for names in seen} == {tuple(sorted(columns))}


def test_pairs_that_are_trained_on_and_evaluated_on_are_counted(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_reference(world.dataset)
    test = load_reference(world.dataset, split="test")
    trainer(world, tmp_path / "out", data, eval_dataset=test, check_scores=False)
    assert [line for line in caplog.messages if "train_dataset" in line] == []
    both = datasets.concatenate_datasets([test, data.select([3, 4])])
    trainer(world, tmp_path / "out", data, eval_dataset={"both": both, "test": test}, check_scores=False)
    told = [(line.levelno, line.getMessage()) for line in caplog.records if line.name == ours.__name__]
    assert told == [
        (logging.WARNING, f"eval_dataset both: 2 of its {test.num_rows + 2} pairs are in train_dataset too")
    ]


def test_arguments_of_another_type_are_refused_by_name(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a path cannot be a value of type int") as no_path:
        load_reference(3)  # type: ignore[arg-type]
    assert no_path.value.expected == "a dataset directory"
    for key, kind in ((3, "int"), (["x"], "list")):
        with pytest.raises(InputError, match=f"a key is a text, not a {kind}") as no_key:
            load_reference(world.dataset, key)  # type: ignore[arg-type]
        assert (no_key.value.where, no_key.value.expected) == ("key", "a str, or None")
    data: Any = load_reference(world.dataset)
    with pytest.raises(InputError, match="model is a NoneType") as no_model:
        PrecomputedDPOTrainer(None, args=config(tmp_path), train_dataset=data)
    assert (no_model.value.where, no_model.value.expected) == ("model", "a model folder, a name on a hub, or a model")
    with pytest.raises(InputError, match="args is a dict") as no_args:
        PrecomputedDPOTrainer(str(world.model), args={}, train_dataset=data)
    assert (no_args.value.where, no_args.value.expected) == ("args", "a DPOConfig, or None")


def test_a_tampered_dataset_is_not_loaded(own: World) -> None:
    parts = own.dataset / "reference" / own.key
    with pytest.raises(DatasetError, match="no reference 0123456789abcdef"):
        load_reference(own.dataset, "0123456789abcdef")
    manifest = json.loads((own.dataset / "manifest.json").read_text())
    (own.dataset / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DatasetError, match="format_version is 99"):
        load_reference(own.dataset)
    (own.dataset / "manifest.json").write_text(json.dumps(manifest))
    part = parts / "part-00000.parquet"
    whole = part.read_bytes()
    pl.read_parquet(part).with_columns(ref_chosen_logps=pl.col("ref_chosen_logps") + 1).write_parquet(part)
    with pytest.raises(GateError, match="part was changed: its sha256 is not the recorded one"):
        load_reference(own.dataset)
    part.unlink()
    with pytest.raises(GateError, match=r"part-00000\.parquet: .*missing"):
        load_reference(own.dataset)
    part.write_bytes(whole)
    assert load_reference(own.dataset).num_rows


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pl.lit(None, pl.Float32), "with a null in ref_chosen_logps"),
        (pl.lit(0.0, pl.Float32), "where ref_chosen_logps is not the sum of ref_chosen_token_logps"),
        (pl.col("ref_chosen_logps") / pl.col("num_chosen_tokens"), "where ref_chosen_logps is not the sum of"),
        (pl.lit(float("-inf"), pl.Float32), "with a value in ref_chosen_logps or ref_chosen_token_logps that is not f"),
    ],
)
def test_an_edited_table_with_a_mended_hash_is_not_loaded(own: World, column: pl.Expr, told: str) -> None:
    edit_reference(own, ref_chosen_logps=column.cast(pl.Float32))
    for streaming in (False, True):
        with pytest.raises(GateError, match=told):
            load_reference(own.dataset, streaming=streaming)


# --- training


@pytest.mark.parametrize("name", ["world", "chat"])
def test_twenty_steps_are_those_of_trls_own_reference_pass_on_the_same_ids(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    where: World = request.getfixturevalue(name)
    mine = trainer(where, tmp_path / "mine", max_steps=20)
    theirs = stock(where, tmp_path / "theirs", max_steps=20)
    for column in COLUMNS[2:5]:
        assert [*theirs.train_dataset[column]] == [*mine.train_dataset[column]]
    for column in COLUMNS[5:7]:
        assert [*theirs.train_dataset[column]] == pytest.approx([*mine.train_dataset[column]], abs=2e-4)
    losses = losses_of(mine)
    assert losses[0] == pytest.approx(LN2, abs=1e-5)
    assert losses == pytest.approx(losses_of(theirs), abs=1e-5)
    assert losses[-1] < 0.6  # it learns: else this test shows little
    first = mine.state.log_history[0]
    assert abs(first["rewards/margins"]) <= 1e-5


def test_the_default_arguments_of_trl_train_in_bfloat16_from_the_first_step_at_ln_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = make_world(tmp_path, count=20, precompute={"dtype": "bfloat16"})
    args = config(tmp_path / "out", bf16=None, max_length=1024)
    assert args.bf16
    one = PrecomputedDPOTrainer(str(where.model), args=args, train_dataset=load_reference(where.dataset))
    assert args.max_length == 1024  # the user's own stays as it is
    assert not args.precompute_ref_log_probs
    assert losses_of(one)[0] == pytest.approx(LN2, abs=0.02)
    assert one.agreement["train"].rms < 0.05
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    bare = PrecomputedDPOTrainer(str(where.model), train_dataset=load_reference(where.dataset))
    assert bare.args.output_dir == "model-DPO"
    assert vars(bare.args)["max_length"] is None


def test_no_second_model_is_built_and_no_reference_pass_is_run(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    assert data.num_rows > 64
    with counting() as mine:
        one = trainer(world, tmp_path / "a", data)
    assert (len(mine.models), len(mine.no_grad)) == (1, 64)  # the sample that is scored
    assert one.ref_model is None
    with counting() as unscored:
        trainer(world, tmp_path / "b", data, check_scores=False)
    assert (len(unscored.models), len(unscored.no_grad)) == (1, 0)
    with counting() as during:
        one.train()
    assert (len(during.models), len(during.no_grad)) == (0, 0)
    with counting() as theirs:  # the counts see what they are to see
        stock(world, tmp_path / "c", precompute_ref_log_probs=False)
    assert len(theirs.models) == 2
    with counting() as theirs:
        stock(world, tmp_path / "d")
    assert (len(theirs.models), len(theirs.no_grad)) == (1, math.ceil(data.num_rows / 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": ALL_LOSSES, "label_smoothing": 0.1, "loss_weights": [1 + 0.1 * i for i in range(15)]},
        {"loss_type": OF_THE_DIFFERENCE, "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
        {"loss_type": ["ipo"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["sigmoid"], "use_weighting": True},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": False, "remove_unused_columns": False},
        {"dataloader_num_workers": 1, "seed": 7},
    ],
    ids=["all losses", "js", "alpha", "forward kl", "weighted", "accumulation", "all columns", "worker"],
)
def test_whatever_trl_computes_of_sums_it_computes_of_ours(
    world: World, tmp_path: Path, changes: dict[str, Any]
) -> None:
    mine = losses_of(trainer(world, tmp_path / "mine", **changes))
    theirs = losses_of(stock(world, tmp_path / "theirs", **changes))
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert max(mine) > 1.01 * min(mine)


def test_it_evaluates_on_other_splits_at_any_time(world: World, tmp_path: Path) -> None:
    test = load_reference(world.dataset, split="test")
    both = {"test": test, "half": test.select(range(test.num_rows // 2))}
    one = trainer(world, tmp_path / "out", eval_dataset=both, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert sorted(one.agreement) == ["eval half", "eval test", "train"]
    one.train()
    found = [row["eval_test_loss"] for row in one.state.log_history if "eval_test_loss" in row]
    assert found[0] == pytest.approx(LN2, abs=1e-5)
    assert found[-1] < found[0]
    assert [row for row in one.state.log_history if "eval_half_loss" in row]
    later = one.evaluate(test)  # a dataset that comes after training: stock TRL has no reference for it any more
    assert later["eval_loss"] == pytest.approx(found[-1], abs=1e-6)
    assert set(one.evaluate(both)) >= {"eval_test_loss", "eval_half_loss"}
    assert one.evaluate()["eval_test_loss"] == pytest.approx(found[-1], abs=1e-6)
    assert one.evaluate("test")["eval_loss"] == pytest.approx(found[-1], abs=1e-6)
    with pytest.raises(DatasetError, match="does not say whose reference it has"):
        one.evaluate(texts_of(world, "test"))
    single = trainer(world, tmp_path / "single", eval_dataset=test)
    assert sorted(single.agreement) == ["eval", "train"]
    assert single.evaluate()["eval_loss"] == pytest.approx(LN2, abs=1e-5)


def test_an_eval_dataset_of_another_reference_is_refused(world: World, tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(6), world.model, precompute={"max_length": 64})
    precompute_reference(pipeline)
    other = load_reference(tmp_path / "dataset")
    with pytest.raises(
        DatasetError, match="has another reference than train_dataset: max_length: 128 and 64"
    ) as refused:
        trainer(world, tmp_path / "out", eval_dataset={"mine": load_reference(world.dataset), "other": other})
    assert refused.value.where == "eval_dataset other"
    assert refused.value.expected == f"reference {world.key}"


def test_a_stream_is_trained_on_as_the_table_is_in_its_order(world: World, tmp_path: Path) -> None:
    in_order: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 8}
    table = losses_of(trainer(world, tmp_path / "table", **in_order))
    for workers in (0, 2):
        stream = load_reference(world.dataset, streaming=True)
        test = load_reference(world.dataset, split="test", streaming=True)
        one = trainer(world, tmp_path / "s", stream, max_steps=8, eval_dataset=test, dataloader_num_workers=workers)
        assert losses_of(one) == pytest.approx(table, abs=1e-6)
        assert one.evaluate()["eval_loss"] < LN2
    assert table[0] == pytest.approx(LN2, abs=1e-5)
    shuffled = load_reference(world.dataset, streaming=True).shuffle(seed=1, buffer_size=50)
    assert losses_of(trainer(world, tmp_path / "shuffled", shuffled))[0] == pytest.approx(LN2, abs=1e-5)


def test_a_resumed_run_goes_on_with_the_same_reference_and_scores_nothing_anew(world: World, tmp_path: Path) -> None:
    saves = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    unbroken = trainer(world, tmp_path / "out", **saves)
    losses = losses_of(unbroken)
    again = trainer(world, tmp_path / "out", **saves)
    assert again.agreement == unbroken.agreement  # of the initial policy, before the checkpoint is loaded
    with counting() as during:
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert during.no_grad == []
    found = [row["loss"] for row in again.state.log_history if "loss" in row]
    assert found == pytest.approx(losses, abs=1e-6)
    with pytest.raises(GateError, match="not the model that was scored") as refused:
        trainer(world, tmp_path / "out", model=str(tmp_path / "out" / "checkpoint-3"))
    assert refused.value.expected == "the reference's own model; to go on with a run, the model that it began with"


def test_a_checkpoint_of_another_reference_or_of_none_is_not_gone_on_from(world: World, tmp_path: Path) -> None:
    saves = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    losses_of(trainer(world, tmp_path / "out", **saves))
    last = tmp_path / "out" / "checkpoint-2"
    assert json.loads((last / "prefkit.json").read_text()) == {"prefkit_reference": world.key}
    pipeline = built(tmp_path, text_rows(12), world.model, precompute={"max_length": 64})
    key = precompute_reference(pipeline).key
    other = trainer(world, tmp_path / "out", load_reference(tmp_path / "dataset"), **(saves | {"max_steps": 3}))
    for given in (str(last), True):
        with pytest.raises(GateError, match=f"a checkpoint of a run with another reference: {world.key}") as refused:
            other.train(resume_from_checkpoint=given)
        assert refused.value.where == str(last / "prefkit.json")
        assert refused.value.expected == f"reference {key}"
        assert refused.value.hint == (
            "go on from a checkpoint of PrecomputedDPOTrainer on the same dataset, or begin anew"
        )
    for text in (None, "[]", "{"):
        (last / "prefkit.json").unlink() if text is None else (last / "prefkit.json").write_text(text)
        with pytest.raises(GateError, match="a checkpoint of a run with another reference: it names none"):
            trainer(world, tmp_path / "out", **saves).train(resume_from_checkpoint=str(last))


# --- adapters


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM", **changes)


def test_an_adapter_is_trained_on_top_of_the_base_and_never_switched_off(world: World, tmp_path: Path) -> None:
    with counting() as mine:
        one = trainer(world, tmp_path / "mine", peft_config=lora(), learning_rate=1e-2)
        losses = losses_of(one)
    assert (len(mine.models), len(mine.no_grad)) == (1, 64)
    assert losses[0] == pytest.approx(LN2, abs=1e-5)
    args = config(tmp_path / "theirs", precompute_ref_log_probs=True, learning_rate=1e-2)
    theirs = DPOTrainer(str(world.model), args=args, train_dataset=texts_of(world), peft_config=lora())
    assert losses == pytest.approx(losses_of(theirs), abs=1e-5)
    assert losses[-1] < 0.69


def test_an_sft_adapter_is_trained_against_its_own_reference(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "model")
    sft = sft_adapter(tmp_path / "sft", base)
    pipeline = built(tmp_path, text_rows(20), sft)
    key = precompute_reference(pipeline).key
    where = World(tmp_path, tmp_path / "dataset", sft, key)
    with pytest.raises(ModelError, match="holds an adapter, which this trainer does not load by itself") as refused:
        trainer(where, tmp_path / "out")
    assert refused.value.expected == "a model folder, or a PeftModel"
    assert refused.value.hint == "peft.PeftModel.from_pretrained(BASE, ADAPTER, is_trainable=True)"

    def adapted(folder: Path) -> Any:
        return peft.PeftModel.from_pretrained(by_transformers(base), str(folder), is_trainable=True)

    one = trainer(where, tmp_path / "out", model=adapted(sft), processing_class=tiny_tokenizer())
    assert losses_of(one)[0] == pytest.approx(LN2, abs=1e-5)
    other = sft_adapter(tmp_path / "other", base, seed=9)
    for wrong in (by_transformers(base), adapted(other)):
        with pytest.raises(GateError, match="the model's own scores are not the dataset's"):
            trainer(where, tmp_path / "out", model=wrong, processing_class=tiny_tokenizer())


# --- refused


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("max_length", 64, "None or 128: the ids were cut at the reference's max_length"),
        ("max_length", 512, "None or 128: the ids were cut at the reference's max_length"),
        ("ld_alpha", 0.5, "None: the reference's sums weigh every token alike"),
        ("sync_ref_model", True, "False: the reference is on disk and stays as it is"),
        ("padding_free", True, "False: this TRL has switched it off"),
        ("disable_dropout", False, "True: the reference was scored without dropout"),
        ("precompute_ref_batch_size", 8, "None: nothing is precomputed or tokenised"),
        ("dataset_num_proc", 2, "None: nothing is precomputed or tokenised"),
        ("truncation_mode", "keep_end", "keep_start, as the reference has it"),
        ("fsdp", "full_shard", "neither FSDP (TRL builds a second model under it) nor DeepSpeed (untested)"),
    ],
)
def test_a_setting_that_would_be_silently_wrong_is_refused_before_a_model_is_loaded(
    world: World, tmp_path: Path, setting: str, value: Any, expected: str
) -> None:
    if setting == "truncation_mode":
        with pytest.warns(FutureWarning, match="keep_end"):
            config(tmp_path, truncation_mode=value)
    args = config(tmp_path / "out")
    setattr(args, setting, value)
    with counting() as built_models, pytest.raises(InputError) as refused:
        PrecomputedDPOTrainer(str(world.model), args=args, train_dataset=load_reference(world.dataset))
    assert refused.value.message == f"{setting} is {value!r}"
    assert refused.value.where == f"DPOConfig.{setting}"
    assert refused.value.expected == expected
    assert built_models.models == []


def test_a_max_length_of_none_of_the_reference_and_trls_own_above_it_are_one(world: World, tmp_path: Path) -> None:
    for length in (None, 128, 1024):
        assert trainer(world, tmp_path / "out", max_length=length).args.max_length is None


def test_trls_own_max_length_below_the_references_is_refused(tmp_path: Path) -> None:
    where = make_world(tmp_path, count=10, positions=2048, precompute={"max_length": 1500})
    with pytest.raises(InputError, match="max_length is 1024") as refused:
        trainer(where, tmp_path / "out", max_length=1024)
    assert refused.value.expected == "None or 1500: the ids were cut at the reference's max_length"


def test_engines_that_the_environment_names_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, data = config(tmp_path / "out"), load_reference(world.dataset)
    for engine in ("fsdp", "deepspeed"):
        with monkeypatch.context() as patched:
            patched.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
            with pytest.raises(InputError, match=f"{engine} is True"):
                PrecomputedDPOTrainer(str(world.model), args=args, train_dataset=data)


def test_a_reference_model_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ref_model is a LlamaForCausalLM") as refused:
        trainer(world, tmp_path / "out", ref_model=by_transformers(world.model))
    assert refused.value.expected == "None: the reference is on disk"


def changed_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_changed_model_is_refused_by_its_hash_in_memory_by_what_it_scores(own: World, tmp_path: Path) -> None:
    model = by_transformers(own.model)
    tokenizer = tiny_tokenizer()
    assert trainer(own, tmp_path / "out", model=model, processing_class=tokenizer).agreement["train"].sides == 128
    changed_weights(own.model)
    with pytest.raises(GateError, match=r"not the model that was scored .*weights_sha256: ") as refused:
        trainer(own, tmp_path / "out")
    assert refused.value.where == str(own.model)
    assert refused.value.hint == (
        f"prefkit precompute DATASET --model {own.model}; other_reference=True if the reference is another model on "
        "purpose"
    )
    with pytest.raises(
        GateError, match=r"the model's own scores are not the dataset's: .* nats a token at most"
    ) as told:
        trainer(own, tmp_path / "out", model=by_transformers(own.model), processing_class=tokenizer)
    assert told.value.expected == "at most 0.0001"
    assert re.fullmatch(rf"train dataset, reference {own.key}, pair [0-9a-f]{{12}} worst", told.value.where)
    assert "prefkit precompute DATASET --model M, and load the dataset again" in told.value.hint
    allowed = trainer(own, tmp_path / "out", other_reference=True)
    assert allowed.agreement["train"].max_abs > 1e-4
    assert losses_of(allowed)[0] != pytest.approx(LN2, abs=1e-5)


def test_a_changed_config_is_named_with_both_values(own: World, tmp_path: Path) -> None:
    path = own.model / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    with pytest.raises(GateError, match=r"config\.rms_norm_eps: 1e-06 and 0\.001"):
        trainer(own, tmp_path / "out")


def test_scores_of_another_pair_are_refused_by_the_scoring_alone(own: World, tmp_path: Path) -> None:
    shifted = {n: pl.col(n).reverse() for n in ("ref_chosen_logps", "ref_chosen_token_logps")}
    # lists must be as long as their ids, so only pairs of equal length change places
    order = pl.int_range(pl.len()).reverse().over("num_chosen_tokens")
    moved = {name: pl.col(name).gather(order).over("num_chosen_tokens") for name in shifted}
    edit_reference(own, **moved)
    data = load_reference(own.dataset)  # nothing in the table itself is wrong
    with pytest.raises(GateError, match="the model's own scores are not the dataset's"):
        trainer(own, tmp_path / "out", data)
    assert losses_of(trainer(own, tmp_path / "out", data, check_scores=False))[0] != pytest.approx(LN2, abs=1e-3)


def test_a_collator_that_cuts_is_refused_by_name_or_by_the_scoring(world: World, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    with pytest.raises(InputError, match="the collator's max_length is 12") as refused:
        trainer(world, tmp_path / "out", data_collator=DataCollatorForPreference(pad_token_id=0, max_length=12))
    assert refused.value.where == "data_collator.max_length"
    assert refused.value.expected == "None: the reference's sums are of whole rows"

    def cuts(rows: list[dict[str, Any]]) -> Any:
        return DataCollatorForPreference(pad_token_id=0)([{**row, "chosen_ids": row["chosen_ids"][:2]} for row in rows])

    with pytest.raises(GateError, match="the model's own scores are not the dataset's"):
        trainer(world, tmp_path / "out", data_collator=cuts)


def test_an_eval_dataset_is_scored_too(own: World, tmp_path: Path) -> None:
    of_test = pl.col("pair_id").is_in(load_reference(own.dataset, split="test")["pair_id"][:])
    tokens = pl.col("ref_chosen_token_logps")
    lower = pl.when(of_test).then(tokens.list.eval(pl.element() - 0.01)).otherwise(tokens)
    edit_reference(own, ref_chosen_token_logps=lower, ref_chosen_logps=lower.list.sum())
    test = load_reference(own.dataset, split="test")
    assert trainer(own, tmp_path / "out").agreement["train"].max_abs < 1e-4
    with pytest.raises(GateError, match="the model's own scores are not the dataset's") as refused:
        trainer(own, tmp_path / "out", eval_dataset={"test": test})
    assert refused.value.where.startswith("eval test dataset, reference")


def test_without_scoring_only_a_folder_says_what_a_model_is(world: World, tmp_path: Path) -> None:
    for options in (
        {"model": by_transformers(world.model), "processing_class": tiny_tokenizer()},
        {"model_init_kwargs": {"quantization_config": object()}},
    ):
        told = "check_scores is False, and nothing else shows that this model is the reference's"
        with pytest.raises(InputError, match=told) as no:
            trainer(world, tmp_path / "out", check_scores=False, **options)
        assert no.value.expected == "a model folder by its name, and no quantization_config"
    assert trainer(world, tmp_path / "out", model=world.model, check_scores=False).agreement == {}


def test_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    with pytest.raises(GateError, match=r"another tokenizer than the reference's .*: tokenizer_sha256: ") as refused:
        trainer(world, tmp_path / "out", processing_class=other)
    assert refused.value.expected == "the tokenizer of the model that was scored, without tokens added since"
    assert refused.value.where == "processing_class"


def test_the_padding_token_is_the_users_affair(world: World, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    padded = losses_of(trainer(world, tmp_path / "a", processing_class=tokenizer))
    assert padded == pytest.approx(losses_of(trainer(world, tmp_path / "b")), abs=1e-6)


def test_another_chat_template_is_refused_and_a_missing_one_is_put_in(chat: World, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"another chat template than the reference's .*chat_template_sha256: "
    ) as refused:
        trainer(chat, tmp_path / "out", processing_class=tiny_tokenizer("{{ messages }}"))
    assert refused.value.expected == "the one that the pairs were rendered with: the trained model's tokenizer keeps it"
    assert refused.value.hint == (
        f"processing_class.chat_template = the text of reference/{chat.key}/chat_template.jinja"
    )
    bare = tiny_tokenizer(None)
    assert not bare.chat_template
    one = trainer(chat, tmp_path / "out", processing_class=bare)
    assert one.processing_class.chat_template == tiny_tokenizer().chat_template
    one.save_model(str(tmp_path / "saved"))
    saved: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == tiny_tokenizer().chat_template


def test_a_processor_of_images_is_refused(world: World, tmp_path: Path) -> None:
    class Looks(transformers.ProcessorMixin):
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    with pytest.raises(InputError, match="processing_class is a Looks, of a model of images") as refused:
        trainer(world, tmp_path / "out", processing_class=Looks(tiny_tokenizer()))
    assert refused.value.expected == "a tokenizer: references are of text"


def test_dropout_is_off_in_attention_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = random_model(llama_config(len(tokenizer), attention_dropout=0.5))
    save_model(tmp_path / "model", model, tokenizer)
    pipeline = built(tmp_path, text_rows(12), tmp_path / "model")
    where = World(tmp_path, tmp_path / "dataset", tmp_path / "model", precompute_reference(pipeline).key)
    args: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 2}
    assert losses_of(trainer(where, tmp_path / "mine", **args)) == pytest.approx([LN2, LN2], abs=1e-5)
    theirs = losses_of(stock(where, tmp_path / "theirs", **args))  # its own disable_dropout does not see it
    assert max(abs(loss - LN2) for loss in theirs) > 0.01


# --- without TRL


def test_without_trl_or_with_another_one_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "prefkit.integrations.trl"
    for absent in ("trl", "datasets"):
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, name)
            patched.setitem(sys.modules, absent, None)
            with pytest.raises(InputError, match=f"needs trl and datasets: .*{absent}") as refused:
                importlib.import_module(name)
            assert refused.value.where == name
            assert refused.value.hint == "pip install 'prefkit[trl]'"
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, name)
        patched.setattr("trl.__version__", "0.24.0")
        with pytest.raises(InputError, match=r"trl 0\.24\.0 is another than this is made for") as other:
            importlib.import_module(name)
        assert other.value.expected == "1.16 or later, below 2"
        assert other.value.hint == (
            "pip install 'prefkit[trl]'; for trl 0.13 to 0.28, prefkit export DATASET --to trl --with-reference"
        )


def test_importing_prefkit_imports_no_trl(tmp_path: Path) -> None:
    code = "import prefkit, prefkit.integrations, sys; print('trl' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
