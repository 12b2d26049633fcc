"""What a run may be asked besides: the best model, an early end, another beta, loss or optimiser, smaller passes."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny import built, snapshot, text_rows, tiny_llama
from transformers import AutoModelForCausalLM

from prefkit import train as train_module
from prefkit import updates as updates_module
from prefkit.config import Pipeline, TrainConfig
from prefkit.errors import CheckError, DatasetError, InputError, MachineError
from prefkit.optimizers import check_optimizer
from prefkit.reference import precompute_reference
from prefkit.run import Trained
from prefkit.train import train_dpo

SPLIT = {"test_share": 0.3, "seed": 1}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ready")
    pipeline = built(folder, text_rows(24), tiny_llama(folder / "model"), split=SPLIT)
    precompute_reference(pipeline)
    return pipeline


def train(pipeline: Pipeline, out: Path, watch: Any = None, **changes: Any) -> Trained:
    settings = TrainConfig.model_validate(pipeline.train.model_dump() | {"learning_rate": 1e-3} | changes)
    heard = {} if watch is None else {"watch": watch}
    return train_dpo(pipeline.model_copy(update={"train": settings}), out=str(out), **heard)


def steps_of(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "steps.parquet")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the best model, and an early end

Scripted = Callable[[Sequence[float]], None]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Evaluations that say what the test wants, one after the other."""

    def script(values: Sequence[float]) -> None:
        left = iter(values)
        monkeypatch.setattr(
            train_module, "evaluate", lambda *_: {"eval_loss": next(left), "eval_rewards/accuracies": 0.5}
        )

    return script


def test_the_final_model_is_the_one_that_was_best(ready: Pipeline, tmp_path: Path, scripted: Scripted) -> None:
    """Evaluated after 2, 4, 6 and 8 updates; after 4 it was best. Its weights are those of a run of 4 updates."""
    settings = {"eval_steps": 2, "batch_size": 4, "lr_scheduler_type": "constant"}
    scripted([0.6, 0.4, 0.5, 0.45])
    done = train(ready, tmp_path / "run", max_steps=8, best_metric="eval_loss", **settings)
    assert done.best == {"metric": "eval_loss", "value": 0.4, "step": 4}
    assert (done.steps, done.stopped_early) == (8, False)
    assert done.eval == {"loss": 0.4, "rewards/accuracies": 0.5}
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (recorded["best"], recorded["eval"]) == (done.best, done.eval)
    assert steps_of(tmp_path / "run")["eval_loss"].drop_nulls().to_list() == [0.6, 0.4, 0.5, 0.45]
    assert not (tmp_path / "run" / "best").exists()  # it is the model now
    scripted([0.6, 0.4])
    train(ready, tmp_path / "short", max_steps=4, **settings)
    assert same(weights(tmp_path / "run" / "model"), weights(tmp_path / "short" / "model"))
    scripted([0.6, 0.4, 0.5, 0.45])
    train(ready, tmp_path / "last", max_steps=8, **settings)
    assert not same(weights(tmp_path / "run" / "model"), weights(tmp_path / "last" / "model"))


@pytest.mark.parametrize(
    ("values", "patience", "steps", "best"),
    [
        ([0.6, 0.5, 0.55, 0.52, 0.1], 2, 8, 4),  # two evaluations after the best one
        ([0.6, 0.6, 0.6, 0.6, 0.6], 1, 4, 2),
        ([0.6, 0.5, 0.4, 0.3, 0.2], 1, 10, 10),  # never early
    ],
)
def test_a_run_that_gets_no_better_ends_early(
    values: list[float], patience: int, steps: int, best: int, ready: Pipeline, tmp_path: Path, scripted: Scripted
) -> None:
    scripted(values)
    settings = {"eval_steps": 2, "max_steps": 10, "best_metric": "eval_loss", "early_stopping_patience": patience}
    done = train(ready, tmp_path / "run", **settings)
    assert (done.steps, done.stopped_early) == (steps, steps < 10)
    assert done.best is not None
    assert done.best["step"] == best
    assert steps_of(tmp_path / "run")["step"].to_list() == [*range(steps + 1)]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped_early"] == (steps < 10)


@pytest.mark.parametrize("kills", [[3], [5], [7], [4, 6, 9]], ids=str)
def test_a_resumed_run_keeps_the_best_model_of_the_unbroken_one(
    kills: list[int], ready: Pipeline, tmp_path: Path
) -> None:
    """The rate is so high that the loss on the test split goes up and down."""
    settings: dict[str, Any] = {"max_steps": 10, "batch_size": 3, "learning_rate": 0.1, "eval_steps": 1, "seed": 0}
    settings |= {"best_metric": "eval_loss", "save_steps": 2}
    whole = train(ready, tmp_path / "unbroken", **settings)
    losses = steps_of(tmp_path / "unbroken")["eval_loss"].to_list()
    assert whole.best is not None
    assert losses.index(min(losses[1:])) == whole.best["step"] == 7
    for kill in kills:

        def killed(done: int, _total: int, _row: Any, kill: int = kill) -> None:
            if done == kill:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(ready, tmp_path / "run", killed, **settings)
    done = train(ready, tmp_path / "run", **settings)
    assert done.best == whole.best
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "unbroken")


def killed_at(step: int) -> Callable[[int, int, Any], None]:
    def watch(done: int, _total: int, _row: Any) -> None:
        if done == step:
            raise KeyboardInterrupt

    return watch


def test_the_best_is_one_whose_weights_were_kept(ready: Pipeline, tmp_path: Path, scripted: Scripted) -> None:
    """The best metric is asked for after four updates: what was better before that is gone."""
    settings = {"max_steps": 8, "eval_steps": 2, "save_steps": 4, "batch_size": 4}
    scripted([0.1, 0.5])
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(5), **settings)
    scripted([0.5, 0.4, 0.45])
    asked = TrainConfig.model_validate(
        ready.train.model_dump() | {"learning_rate": 1e-3, "best_metric": "eval_loss"} | settings
    )
    done = train_dpo(ready.model_copy(update={"train": asked}), out=str(tmp_path / "run"), go_on=True)
    assert done.best == {"metric": "eval_loss", "value": 0.4, "step": 6}


def test_a_best_model_that_is_damaged_is_named(ready: Pipeline, tmp_path: Path, scripted: Scripted) -> None:
    settings = {"max_steps": 6, "eval_steps": 2, "save_steps": 3, "best_metric": "eval_loss", "batch_size": 4}
    scripted([0.1, 0.5])
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(5), **settings)
    (tmp_path / "run" / "best" / "step-000002" / "model.safetensors").write_bytes(b"no tensors")
    scripted([0.5, 0.6])
    with pytest.raises(DatasetError, match="the best model cannot be read: ") as caught:
        train(ready, tmp_path / "run", **settings)
    assert caught.value.where == str(tmp_path / "run" / "best" / "step-000002")


def test_an_evaluation_that_is_not_finite_ends_the_run_before_anything_is_saved(
    ready: Pipeline, tmp_path: Path, scripted: Scripted
) -> None:
    scripted([math.nan])
    with pytest.raises(CheckError) as caught:
        train(ready, tmp_path / "run", max_steps=2)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: the evaluation at step 2 is not finite\n  expected: numbers\n"
        "  next: a smaller train.learning_rate"
    )
    assert not (tmp_path / "run" / "model").exists()


def test_evaluations_without_a_test_split_are_told_to_have_no_effect(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    said: list[str] = []
    settings = TrainConfig(max_steps=1, eval_steps=1, shard_weights=True)
    train_dpo(pipeline.model_copy(update={"train": settings}), out=str(tmp_path / "run"), tell=said.append)
    assert said[:2] == [
        "train.shard_weights has no effect in one process",
        "train.eval_steps has no effect: there is no test split",
    ]


def test_the_best_model_needs_a_test_split(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    with pytest.raises(DatasetError) as caught:
        train(pipeline, tmp_path / "run", max_steps=1, eval_steps=1, best_metric="eval_loss")
    assert caught.value.message == "train.best_metric needs pairs to evaluate on, and there is no test split"
    assert caught.value.hint == "--set split.test_share=0.05 at prefkit build, or leave train.best_metric out"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping_patience": 2}, "train.early_stopping_patience has no effect without train.best_metric"),
        ({"best_metric": "eval_loss"}, "train.best_metric has no effect without train.eval_steps"),
        (
            {"max_steps": 9, "epochs": 2},
            "train.epochs has no effect beside train.max_steps: --set train.max_steps=null",
        ),
        (
            {"beta_end": 0.5, "best_metric": "eval_loss", "eval_steps": 1},
            "train.best_metric eval_loss changes with beta, and train.beta_end changes that: take "
            "eval_rewards/accuracies",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(changes)


# --- what the rows tell


def test_rows_agree_with_each_other_and_with_the_pairs(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=6, batch_size=4, beta=0.2, beta_end=0.6)
    steps = steps_of(tmp_path / "run")
    assert steps["beta"].to_list() == pytest.approx([0.2, 0.28, 0.36, 0.44, 0.52, 0.6, 0.6])
    updates = steps.head(6)
    for side in ("chosen", "rejected"):
        rewards = updates.select(pl.col("beta") * pl.col(f"drift/{side}")).to_series()
        assert rewards.to_list() == pytest.approx(updates[f"rewards/{side}"].to_list(), rel=1e-9, abs=1e-12)
        assert updates[f"kl/{side}"].min() >= 0  # type: ignore[operator]
    assert updates["kl/chosen"][0] == pytest.approx(0, abs=1e-9)
    assert updates["kl/chosen"][5] > 1e-6
    seen = pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / "run" / "pair_dynamics").iterdir())])
    means = seen.group_by("step", maintain_order=True).agg(pl.col("rewards_chosen").mean(), pl.col("margin").mean())
    assert means["margin"].to_list() == pytest.approx(updates["rewards/margins"].to_list(), rel=1e-4, abs=1e-6)


def test_speed_is_kept_beside_the_steps(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=6, batch_size=4, logging_steps=2, peak_tflops=0.1)
    perf, steps = pl.read_parquet(tmp_path / "run" / "perf.parquet"), steps_of(tmp_path / "run")
    assert perf["step"].to_list() == [0, 2, 4]
    (reference,) = (Path(ready.dataset) / "reference").glob("*/part-*.parquet")
    sizes = pl.read_parquet(reference).select(
        "pair_id", tokens=pl.sum_horizontal(f"num_{side}_tokens" for side in ("prompt", "chosen", "rejected"))
    )
    (dynamics,) = (tmp_path / "run" / "pair_dynamics").iterdir()
    held = pl.read_parquet(dynamics).join(sizes, on="pair_id").group_by("step").agg(pl.col("tokens").sum()).sort("step")
    assert perf["num_tokens"].to_list() == held.filter(pl.col("step") % 2 == 0)["tokens"].to_list()
    for row in perf.iter_rows(named=True):
        assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["seconds"])
        assert 0 < row["mfu"] < 1
        assert row["peak_memory"] > 1 << 26
    assert steps["step"].to_list() == [0, 2, 4, 6]
    assert len((tmp_path / "run" / "perf.jsonl").read_text().splitlines()) == 3


# --- objective and optimiser


def test_the_sft_term_adds_the_mean_negative_log_likelihood_of_chosen(ready: Pipeline, tmp_path: Path) -> None:
    for name, weight in (("without", 0.0), ("with", 0.3)):
        train(ready, tmp_path / name, max_steps=1, batch_size=5, sft_weight=weight)
    plain, more = (steps_of(tmp_path / name).row(0, named=True) for name in ("without", "with"))
    assert plain["loss"] == pytest.approx(math.log(2), abs=2e-5)
    assert more["loss"] - plain["loss"] == pytest.approx(0.3 * more["nll/chosen"], rel=1e-4)


def test_the_first_step_of_every_loss_is_known(ready: Pipeline, tmp_path: Path) -> None:
    """Policy and reference are one model, so all log-ratios are 0."""
    ln2 = math.log(2)
    expected = {"sigmoid": ln2, "sigmoid_norm": ln2, "hinge": 1, "ipo": 25, "ipo_sum": 25, "dpop": ln2}
    expected |= {"robust": ln2, "apo_zero": 1, "apo_down": 1}
    for loss, value in expected.items():
        more = {"label_smoothing": 0.1} if loss == "robust" else {}
        done = train(ready, tmp_path / loss, max_steps=1, batch_size=2, loss=loss, **more)
        assert done.first_loss == pytest.approx(value, rel=1e-4), loss


def test_an_optimiser_that_torch_has_not_is_refused_before_anything_is_loaded(ready: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.optimizer: torch.optim has no adamx"):
        train(ready, tmp_path / "run", max_steps=1, optimizer="adamx")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [("sgd", {"momentum": 0.9}), ("nadam", {}), ("adagrad", {}), ("adafactor", {})]
)
def test_a_resumed_run_of_any_optimiser_is_the_unbroken_one(
    optimizer: str, arguments: dict[str, Any], ready: Pipeline, tmp_path: Path
) -> None:
    settings = {"max_steps": 5, "save_steps": 2, "optimizer": optimizer, "optimizer_args": arguments, "batch_size": 4}

    def killed(done: int, _total: int, _row: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    train(ready, tmp_path / "unbroken", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed, **settings)
    train(ready, tmp_path / "run", **settings)
    assert snapshot(tmp_path / "run") == snapshot(tmp_path / "unbroken")


# --- memory


def test_an_update_that_does_not_fit_is_made_in_smaller_passes(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if memory held two pairs: the same losses, from there on in passes that fit; and the weights never changed."""
    settings = {"max_steps": 4, "batch_size": 8, "max_batch_tokens": 100_000}
    train(ready, tmp_path / "roomy", **settings)
    score, held = updates_module.score_pairs, []

    def cramped(policy: Any, rows: pl.DataFrame, *rest: Any) -> Any:
        held.append(rows.height)
        if rows.height > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(policy, rows, *rest)

    monkeypatch.setattr(updates_module, "score_pairs", cramped)
    said: list[str] = []
    changes = TrainConfig.model_validate(ready.train.model_dump() | {"learning_rate": 1e-3} | settings)
    train_dpo(ready.model_copy(update={"train": changes}), out=str(tmp_path / "cramped"), tell=said.append)
    one, other = (steps_of(tmp_path / name)["loss"].drop_nulls().to_list() for name in ("roomy", "cramped"))
    assert one == pytest.approx(other, abs=2e-5)
    told = [line for line in said if line.startswith("out of memory at step 0: from here on ")]
    assert 1 <= len(told) == len([line for line in said if "out of memory" in line])
    assert max(held[-4:]) <= 2
    assert len(list(itertools.takewhile(lambda count: count > 2, held))) == len(told)


def test_a_single_pair_that_does_not_fit_ends_the_run(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(updates_module, "score_pairs", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(ready, tmp_path / "run", max_steps=1, batch_size=1)


def test_an_optimiser_that_does_not_fit_ends_the_run_and_is_not_tried_again(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights may have changed by then: the same update once more would be made twice."""
    steps = []

    def full(_optimizer: Any, closure: Any = None) -> Any:
        steps.append(closure)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(MachineError) as caught:
        train(ready, tmp_path / "run", max_steps=1, batch_size=4)
    assert caught.value.message == "out of memory in the optimiser at step 0"
    assert caught.value.hint == "train.lora, another train.optimizer, or train.shard_weights"
    assert len(steps) == 1


@pytest.mark.parametrize("name", ["adafactor", "Rprop"])
def test_an_optimiser_that_cannot_work_on_shares_is_refused_where_there_are_some(name: str) -> None:
    check_optimizer(TrainConfig(optimizer=name))
    with pytest.raises(InputError) as caught:
        check_optimizer(TrainConfig(optimizer=name), shards=True)
    assert str(caught.value) == (
        f"train.optimizer: torch's {name} cannot work on shares of a weight\n"
        "  next: --set train.shard_weights=false, or another optimizer"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer_args": {"eps": 1e-6}}, "train.optimizer_args"),
        ({"lora": {"r": 8}}, "train.lora"),
        ({"lora": {"r": 4, "alpha": 320}}, "train.lora.alpha: 32.0 and 320.0"),
        ({"lora": None}, "train.lora"),
    ],
)
def test_what_a_checkpoint_cannot_take_is_never_changed(
    changes: dict[str, Any], named: str, ready: Pipeline, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "lora": {"r": 4}, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(2), **settings)
    other = TrainConfig.model_validate(ready.train.model_dump() | {"learning_rate": 1e-3} | settings | changes)
    with pytest.raises(DatasetError, match=f", which a run never changes .*{named}"):
        train_dpo(ready.model_copy(update={"train": other}), out=str(tmp_path / "run"), go_on=True)


@pytest.mark.parametrize(
    ("gone", "lost"),
    [("steps.jsonl", "4 rows of steps"), ("pair_dynamics", "16 rows of pair_dynamics")],
)
def test_what_is_gone_of_the_log_is_told_and_kept(gone: str, lost: str, ready: Pipeline, tmp_path: Path) -> None:
    import shutil

    settings = {"max_steps": 8, "save_steps": 2, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(5), **settings)
    place = tmp_path / "run" / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    asked = TrainConfig.model_validate(ready.train.model_dump() | {"learning_rate": 1e-3} | settings)
    pipeline, out = ready.model_copy(update={"train": asked}), str(tmp_path / "run")
    text = f"of what was logged before step 4 {lost} are gone: figures and views of this run lack them"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train_dpo(pipeline, out=out, tell=said.append, watch=killed_at(7))
    assert f"warning: {text}" in said
    train_dpo(pipeline, out=out, tell=said.append)  # told once, and still known
    assert said.count(f"warning: {text}") == 1
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["warnings"] == [{"step": 4, "name": "history", "text": text}]


def test_a_run_without_its_document_is_refused(ready: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(2), max_steps=4)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(DatasetError) as caught:
        train(ready, tmp_path / "run", max_steps=4)
    assert caught.value.message == "is a run without its run.json, which says what it was started with"
    assert caught.value.hint == "choose another --out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_args": {"betas": [0.9]}}, "train.optimizer: AdamW(betas=(0.9,)) cannot train this: "),
        ({"optimizer": "lion"}, "train.optimizer: torch.optim has no lion"),
    ],
)
def test_arguments_that_no_optimiser_takes_are_no_bug(
    changes: dict[str, Any], message: str, ready: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        train(ready, tmp_path / "run", max_steps=1, **changes)
    assert caught.value.message.startswith(message)
    if "optimizer" in changes:
        assert "adamw" in caught.value.expected


def test_muon_says_what_it_trains(ready: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        train(ready, tmp_path / "run", max_steps=1, optimizer="muon")
    assert caught.value.hint == "it takes matrices only: train.lora, or another optimizer"


def test_a_run_of_which_no_row_is_left_says_so(ready: Pipeline, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 3, "batch_size": 4, "logging_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", killed_at(3), **settings)
    (tmp_path / "run" / "steps.jsonl").unlink()
    with pytest.raises(DatasetError) as caught:
        train(ready, tmp_path / "run", **settings)
    assert caught.value.message == "all that was logged is gone"
    assert caught.value.hint == "choose another --out"
