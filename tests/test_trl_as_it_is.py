"""What TRL 1.16 does by itself with a reference that it did not make: the table of docs/trl.md, row by row."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets
from adapted import quiet
from trl.trainer.dpo_trainer import DPOTrainer
from trl_world import World, config, counting, losses_of, make_world, marks, texts_of

from prefkit.integrations.trl import load_reference

pytestmark = marks
LN2 = math.log(2)
SUMS = ["ref_chosen_logps", "ref_rejected_logps"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_told: None)
    with quiet():
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), count=30)


class Naive(DPOTrainer):
    """The shortest way to hand the ids and sums through, with nothing checked."""

    def _prepare_dataset(self, dataset: Any, *_rest: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_rest: Any) -> Any:
        return dataset


def run(kind: Any, world: World, out: Path, data: Any, **changes: Any) -> tuple[list[float], int, int]:
    """The losses, how many models were built, and how many passes without a gradient came before the first step."""
    with counting() as found:
        trainer = kind(str(world.model), args=config(out, **changes), train_dataset=data)
        before = len(found.no_grad)
        losses = losses_of(trainer)
    return losses, len(found.models), before


def with_sums(world: World) -> Any:
    both = [texts_of(world), load_reference(world.dataset).select_columns(SUMS)]
    return datasets.concatenate_datasets(both, axis=1)


def test_it_takes_no_ids(world: World, tmp_path: Path) -> None:
    for flag in (True, False):
        with pytest.raises(KeyError, match="chosen"):
            run(DPOTrainer, world, tmp_path, load_reference(world.dataset), precompute_ref_log_probs=flag)


def test_beside_text_it_runs_its_pass_and_fails_or_ignores_the_columns(world: World, tmp_path: Path) -> None:
    data = with_sums(world)
    with counting() as found, pytest.raises(ValueError, match="duplicated columns"):
        run(DPOTrainer, world, tmp_path, data, precompute_ref_log_probs=True)
    assert len(found.no_grad) == math.ceil(data.num_rows / 4)
    nonsense = data.map(lambda row: {"ref_chosen_logps": 0.0, "ref_rejected_logps": -500.0})
    losses, models, _ = run(DPOTrainer, world, tmp_path, nonsense)
    assert losses[0] == pytest.approx(LN2, abs=1e-5)  # it did not look
    assert models == 2


def test_handed_through_they_train_from_ln_2_and_nobody_asks_whether_they_fit(world: World, tmp_path: Path) -> None:
    data = load_reference(world.dataset)
    flag = {"precompute_ref_log_probs": True}
    losses, models, before = run(Naive, world, tmp_path, data, **flag)
    assert losses[0] == pytest.approx(LN2, abs=1e-5)
    assert (models, before) == (1, 0)
    lists = data.map(lambda row: {name: [row[name]] for name in SUMS})
    for wrong, changes in ((lists, {}), (data, {"max_length": 20}), (data, {"ld_alpha": 0.5})):
        assert run(Naive, world, tmp_path, wrong, **flag, **changes)[0][0] > 1  # a silently wrong loss
    for form, kind in (("torch", RuntimeError), ("numpy", ValueError)):
        with pytest.raises(kind, match=r"size of tensor|could not be broadcast"):
            run(Naive, world, tmp_path, data.with_format(form), **flag)
    assert run(Naive, world, tmp_path, data)[1] == 2  # without the flag the columns are ignored


def test_its_own_cache_hits_where_it_must_not_and_misses_where_it_could(world: World, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts_of(world)))

    def again(**changes: Any) -> tuple[float, int]:
        data: Any = datasets.load_dataset(
            "json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
        )
        losses, _, before = run(DPOTrainer, world, tmp_path, data, precompute_ref_log_probs=True, **changes)
        return losses[0], before

    passes = again()[1]
    assert passes > 0
    loss, before = again()
    assert before == 0
    assert loss == pytest.approx(LN2, abs=1e-5)
    loss, before = again(ld_alpha=0.5)
    assert before == 0
    assert loss > 1  # the sums of another setting
    assert again(max_length=100)[1] == passes
    assert again(max_length=100, learning_rate=2e-3)[1] == passes  # the sums are the same, and are made again
