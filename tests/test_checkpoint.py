"""A checkpoint is whole or not there, and what a resumed run finds is cut back to it."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny import llama_config, random_model

from prefkit.checkpoint import (
    append_row,
    cut_dynamics,
    cut_rows,
    history_of,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    write_dynamics,
    write_rows,
)
from prefkit.errors import DatasetError

IDS = torch.tensor([[1, 17, 200, 33, 45]])


def model_and_optimizer(seed: int = 0, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = random_model(llama_config(**changes), seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: Any, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path, tied: bool) -> None:
    model, optimizer = model_and_optimizer(tie_word_embeddings=tied)
    step(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer)
    saved = weights(model)
    step(model, optimizer, 2)
    other, other_optimizer = model_and_optimizer(seed=7, tie_word_embeddings=tied)
    (place,) = list_checkpoints(tmp_path)
    assert load_checkpoint(place, other, other_optimizer) == 3
    assert same(weights(other), saved)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    step(other, other_optimizer, 2)
    assert same(weights(other), weights(model))


def test_a_checkpoint_has_its_files_and_leaves_none_beside_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 20, *model_and_optimizer())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]
    files = sorted(path.name for path in (tmp_path / "checkpoints" / "step-000020").iterdir())
    assert files == ["checkpoint.json", "model.safetensors", "optimizer.pt"]


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def test_only_the_newest_are_kept_in_order(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    for number in (5, 10, 100, 20, 1_000_000):
        save_checkpoint(tmp_path, number, model, optimizer)
        prune_checkpoints(tmp_path, 5, 2)
    assert names(tmp_path) == ["step-000100", "step-1000000"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_the_checkpoint_of_an_interruption_goes_when_a_newer_one_is_there_or_the_run_is_finished(
    tmp_path: Path,
) -> None:
    model, optimizer = model_and_optimizer()
    for number, left in [
        (10, ["step-000010"]),
        (13, ["step-000010", "step-000013"]),
        (17, ["step-000010", "step-000017"]),
        (20, ["step-000010", "step-000020"]),
        (24, ["step-000010", "step-000020", "step-000024"]),
    ]:
        save_checkpoint(tmp_path, number, model, optimizer)
        prune_checkpoints(tmp_path, 10, 2)
        assert names(tmp_path) == left
    prune_checkpoints(tmp_path, 10, 2, finished=True)
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = model_and_optimizer()
    for number in (5, 10):
        save_checkpoint(tmp_path, number, model, optimizer)

    def killed(folder: Path) -> None:
        for path in sorted(folder.iterdir())[:-1]:  # its state file among them, whatever the order
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("prefkit.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 5, 1)
    prune_checkpoints(tmp_path, 5, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def test_a_run_that_keeps_no_checkpoints_ends_without_their_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, *model_and_optimizer())
    prune_checkpoints(tmp_path, None, 2)
    assert names(tmp_path) == ["step-000004"]
    prune_checkpoints(tmp_path, None, 2, finished=True)
    assert not (tmp_path / "checkpoints").exists()


def test_settings_are_no_state_but_the_random_state_is(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    torch.manual_seed(5)
    save_checkpoint(tmp_path, 1, model, optimizer)
    drawn = torch.rand(3)
    other, _ = model_and_optimizer(seed=1)
    changed = torch.optim.AdamW(other.parameters(), lr=0.5, weight_decay=0.25)
    load_checkpoint(list_checkpoints(tmp_path)[0], other, changed)
    assert (changed.param_groups[0]["lr"], changed.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, file: str) -> None:
    save_checkpoint(tmp_path, 3, *model_and_optimizer())
    (place,) = list_checkpoints(tmp_path)
    (place / file).write_bytes((place / file).read_bytes()[:100])
    with pytest.raises(DatasetError, match="the checkpoint cannot be read: ") as caught:
        load_checkpoint(place, *model_and_optimizer(seed=1))
    assert caught.value.where == str(place)
    assert caught.value.hint == f"delete {place} to go on from the checkpoint before it"


def test_a_checkpoint_that_a_kill_tore_is_none_and_is_written_over(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 5, model, optimizer)
    torn, half = tmp_path / "checkpoints" / ".step-000010.tmp", tmp_path / "checkpoints" / "step-000015"
    for folder in (torn, half):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000005"]
    save_checkpoint(tmp_path, 10, model, optimizer)
    save_checkpoint(tmp_path, 15, model, optimizer)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000005", "step-000010", "step-000015"]
    assert not torn.exists()
    for place in list_checkpoints(tmp_path):
        load_checkpoint(place, *model_and_optimizer(seed=1))


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []


def test_logged_steps_are_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path: Path) -> None:
    for number in range(6):
        append_row(tmp_path / "steps.jsonl", {"step": number, "loss": 0.1 + number})
    assert [row["step"] for row in cut_rows(tmp_path / "steps.jsonl", 4)] == [0, 1, 2, 3]
    lines = (tmp_path / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    with (tmp_path / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    rows = cut_rows(tmp_path / "steps.jsonl", 9)
    assert rows == [{"step": number, "loss": 0.1 + number} for number in range(4)]
    append_row(tmp_path / "steps.jsonl", {"step": 4, "loss": 4.1})
    assert [row["step"] for row in cut_rows(tmp_path / "steps.jsonl", 9)] == [0, 1, 2, 3, 4]


def test_a_run_that_logged_nothing_has_no_steps(tmp_path: Path) -> None:
    assert cut_rows(tmp_path / "steps.jsonl", 0) == []


def test_floats_come_back_from_the_log_to_the_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    append_row(tmp_path / "steps.jsonl", {"step": 0, "loss": value})
    assert cut_rows(tmp_path / "steps.jsonl", 1)[0]["loss"] == value


def test_steps_are_written_with_null_where_a_row_has_no_value(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": 0, "loss": 0.5}, {"step": 1, "eval_loss": 0.25}], [])
    steps = pl.read_parquet(tmp_path / "steps.parquet")
    assert steps.select("step", "loss", "eval_loss").rows() == [(0, 0.5, None), (1, None, 0.25)]
    assert steps.columns[:5] == ["step", "epoch", "num_pairs", "learning_rate", "grad_norm"]
    for name in ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]:
        assert steps.schema[name] == steps.schema[f"eval_{name}"] == pl.Float64


def test_pair_dynamics_are_cut_by_whole_parts(tmp_path: Path) -> None:
    def rows(*steps: int) -> list[dict[str, Any]]:
        values = {"rewards_chosen": 1.5, "rewards_rejected": 0.5, "margin": 1.0}
        return [{"step": number, "pair_id": f"p{number}", **values} for number in steps]

    write_dynamics(tmp_path, rows(0, 1, 2))
    write_dynamics(tmp_path, rows(3, 4))
    write_dynamics(tmp_path, [])
    assert cut_dynamics(tmp_path, 3, closed=True) == []
    assert [path.name for path in (tmp_path / "pair_dynamics").iterdir()] == ["part-00000.parquet"]
    table = pl.read_parquet(tmp_path / "pair_dynamics" / "part-00000.parquet")
    assert table.rows() == [(number, f"p{number}", 1.5, 0.5, 1.0) for number in (0, 1, 2)]
    assert table.schema == {
        "step": pl.Int64,
        "pair_id": pl.String,
        "rewards_chosen": pl.Float32,
        "rewards_rejected": pl.Float32,
        "margin": pl.Float32,
    }
    assert cut_dynamics(tmp_path, 0, closed=False) == []
    assert list((tmp_path / "pair_dynamics").iterdir()) == []


def test_the_open_part_of_an_interruption_is_gone_on_with_and_stays_on_disk_until_then(tmp_path: Path) -> None:
    values = {"rewards_chosen": 1.5, "rewards_rejected": 0.5, "margin": 1.0}
    rows = [{"step": number, "pair_id": f"p{number}", **values} for number in range(6)]
    write_dynamics(tmp_path, rows[:2])
    write_dynamics(tmp_path, rows[2:6])
    assert cut_dynamics(tmp_path, 4, closed=False) == rows[2:4]
    part = tmp_path / "pair_dynamics" / "part-00002.parquet"
    assert part.exists()
    write_dynamics(tmp_path, [*rows[2:4], {"step": 4, "pair_id": "p4", **values}])
    assert pl.read_parquet(part)["step"].to_list() == [2, 3, 4]


def test_a_full_part_is_closed_wherever_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefkit.checkpoint.DYNAMICS_ROWS", 2)
    values = {"rewards_chosen": 1.5, "rewards_rejected": 0.5, "margin": 1.0}
    write_dynamics(tmp_path, [{"step": number, "pair_id": f"p{number}", **values} for number in (0, 1)])
    assert cut_dynamics(tmp_path, 2, closed=False) == []
    assert [row["step"] for row in cut_dynamics(tmp_path, 1, closed=False)] == [0]


def test_a_checkpoint_of_another_model_is_no_damage_to_be_deleted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, *model_and_optimizer())
    (place,) = list_checkpoints(tmp_path)
    for changes, named in (
        ({"hidden_size": 48}, "is of shape"),
        ({"num_hidden_layers": 1}, "it is of other weights: "),
    ):
        with pytest.raises(DatasetError) as caught:
            load_checkpoint(place, *model_and_optimizer(**changes))
        assert caught.value.message.startswith("is of another model, adapter or optimiser: ")
        assert named in caught.value.message
        assert caught.value.hint == "run.json has the settings that the run began with"


def test_only_what_is_trained_is_in_a_checkpoint(tmp_path: Path) -> None:
    model, _ = model_and_optimizer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    save_checkpoint(tmp_path, 1, model, optimizer)
    (place,) = list_checkpoints(tmp_path)
    held = load_file(place / "model.safetensors")
    assert sorted(held) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]


def test_a_checkpoint_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    save_checkpoint(tmp_path, 3, model, optimizer, history={"rows of steps": 3})
    (place,) = list_checkpoints(tmp_path)
    assert history_of(place) == {"rows of steps": 3}
    content = bytearray((place / "optimizer.pt").read_bytes())
    content[-5000] ^= 1
    (place / "optimizer.pt").write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        load_checkpoint(place, *model_and_optimizer())
    assert caught.value.message == "the checkpoint cannot be read: optimizer.pt is not as it was written"
    assert caught.value.hint == f"delete {place} to go on from the checkpoint before it"
