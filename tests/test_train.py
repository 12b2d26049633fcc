"""The trainer against plain DPO written out below, and against itself after a kill."""

import functools
import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import (
    Row,
    built,
    chat_rows,
    gemma2_config,
    gpt2_config,
    llama_config,
    mistral_config,
    plain_logps,
    random_model,
    save_model,
    snapshot,
    text_rows,
    tiny_llama,
    tiny_tokenizer,
)
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from prefkit import job as job_module
from prefkit import updates as updates_module
from prefkit.config import Pipeline, TrainConfig
from prefkit.documents import Run
from prefkit.encode import TRANSCRIPT
from prefkit.errors import CheckError, DatasetError, InputError, Interrupted, MachineError
from prefkit.job import Data, load_data
from prefkit.locks import locked
from prefkit.logps import Layout
from prefkit.losses import Objective
from prefkit.metrics import summarise
from prefkit.reference import precompute_reference
from prefkit.run import Trained
from prefkit.schedule import Limits, dealt
from prefkit.scoring import load_scorer
from prefkit.train import train_dpo
from prefkit.updates import Trainee, evaluate, update

CONFIGS: dict[str, Callable[..., Any]] = {"llama": llama_config, "gpt2": gpt2_config, "gemma2": gemma2_config}
SPLIT = {"test_share": 0.3, "seed": 1}
SIDES = ("prompt", "chosen", "rejected")


def weighted(rows: list[Row]) -> list[Row]:
    return [row | {"weight": 0.25 + number % 5} for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A tiny Llama and its reference of 24 text pairs of different weights, in both splits."""
    folder = tmp_path_factory.mktemp("ready")
    pipeline = built(folder, weighted(text_rows(24)), tiny_llama(folder / "model"), split=SPLIT)
    precompute_reference(pipeline)
    return pipeline


def with_train(pipeline: Pipeline, **changes: Any) -> Pipeline:
    settings = TrainConfig.model_validate(pipeline.train.model_dump() | changes)
    return pipeline.model_copy(update={"train": settings})


def train(pipeline: Pipeline, out: Path | None, watch: Any = None, **changes: Any) -> Trained:
    heard = {} if watch is None else {"watch": watch}
    return train_dpo(with_train(pipeline, **changes), out=None if out is None else str(out), **heard)


def steps_of(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "steps.parquet")


def dynamics_of(run: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((run / "pair_dynamics").iterdir())])


def pairs_of(pipeline: Pipeline) -> pl.DataFrame:
    return pl.read_parquet(Path(pipeline.dataset) / "pairs" / "part-*.parquet")


def table_of(pipeline: Pipeline) -> dict[str, Row]:
    """The reference rows with split and weight, by pair_id."""
    parts = sorted((Path(pipeline.dataset) / "reference").glob("*/part-*.parquet"))
    rows = pl.concat([pl.read_parquet(part) for part in parts]).join(pairs_of(pipeline), on="pair_id")
    return {row["pair_id"]: row for row in rows.to_dicts()}


def model_of(run: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(run / "model")


def killed_at(step: int) -> Callable[[int, int, Any], None]:
    def watch(done: int, _total: int, _row: Any) -> None:
        if done == step:
            raise KeyboardInterrupt

    return watch


# --- step 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_row_has_loss_ln_2_and_no_rewards(tmp_path: Path, name: str) -> None:
    tokenizer = tiny_tokenizer()
    model = save_model(tmp_path / "model", random_model(CONFIGS[name](len(tokenizer))), tokenizer)
    rows = text_rows(12, low=20, high=185)
    pipeline = built(tmp_path, rows, model, precompute={"max_length": 512, "max_batch_tokens": 2048})
    precompute_reference(pipeline)
    longest = max(row[f"num_{side}_tokens"] for row in table_of(pipeline).values() for side in ("chosen", "rejected"))
    assert 200 < longest <= 256
    run = Path(train(pipeline, tmp_path / "run", batch_size=4, max_steps=1, beta=0.1).run)
    first = steps_of(run).row(0, named=True)
    assert first["step"] == 0
    assert first["num_pairs"] == 4
    assert abs(first["loss"] - math.log(2)) <= 2e-5
    assert all(abs(first[f"rewards/{name}"]) <= 1e-4 for name in ("chosen", "rejected", "margins"))
    seen = dynamics_of(run)
    assert seen.select(pl.max_horizontal(pl.col("rewards_chosen", "rewards_rejected").abs()).max()).item() <= 1e-4


# --- plain DPO


def plain_dpo(pipeline: Pipeline, order: list[list[str]], settings: TrainConfig) -> Iterator[tuple[Row, Any]]:
    """arXiv 2305.18290, one pair at a time with the plain code, the reference scored anew: a row a step, the model."""
    table, folder = table_of(pipeline), str(pipeline.precompute.model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[settings.optimizer]
    optimizer = kind(policy.parameters(), weight_decay=0.0)
    smooth, beta = settings.label_smoothing, settings.beta
    for number, ids in enumerate(order):
        losses, rewards = [], []
        for row in (table[pair] for pair in ids):
            ratios = []
            for side in ("chosen", "rejected"):
                with torch.no_grad():
                    before = plain_logps(reference, row["prompt_ids"], row[f"{side}_ids"]).sum()
                ratios.append(plain_logps(policy, row["prompt_ids"], row[f"{side}_ids"]).sum() - before)
            margin = beta * (ratios[0] - ratios[1])
            mean_ratios = [
                r / row[f"num_{side}_tokens"] for r, side in zip(ratios, ("chosen", "rejected"), strict=True)
            ]
            loss = {
                "sigmoid": -logsigmoid(margin) * (1 - smooth) - logsigmoid(-margin) * smooth,
                "hinge": torch.clamp(1 - margin, min=0),
                "ipo_sum": (margin / beta - 1 / (2 * beta)) ** 2,
                "ipo": (mean_ratios[0] - mean_ratios[1] - 1 / (2 * beta)) ** 2,
            }[settings.loss]
            losses.append(loss * row["weight"])
            rewards.append([beta * ratio.item() for ratio in ratios])
        loss = sum(losses, torch.zeros(())) / sum(table[pair]["weight"] for pair in ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - number / len(order))
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = (sum(reward[i] for reward in rewards) / len(rewards) for i in (0, 1))
        accuracy = sum(a > b for a, b in rewards) / len(rewards)
        yield (
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": accuracy,
            },
            policy,
        )


def closest(one: Any, other: Any) -> tuple[float, float]:
    """Largest and mean absolute difference of the weights of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    apart = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs])
    return float(apart.max()), float(apart.mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4},
        {"batch_size": 2, "gradient_accumulation_steps": 3, "beta": 0.5, "label_smoothing": 0.1},
        {"batch_size": 8, "max_grad_norm": None},
        {"batch_size": 4, "loss": "ipo", "beta": 0.5},
        {"batch_size": 2, "gradient_accumulation_steps": 2, "loss": "ipo_sum", "beta": 0.5},
        # the first step of RMSprop is as large for a gradient that is rounding as for any other: hence a small rate
        {"batch_size": 4, "loss": "hinge", "optimizer": "rmsprop", "learning_rate": 2e-5},
    ],
    ids=["one batch a step", "accumulation, smoothing", "no clipping, an uneven last batch", "ipo", "ipo_sum", "hinge"],
)
def test_every_step_is_that_of_plain_dpo(ready: Pipeline, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"learning_rate": 1e-3, "max_steps": 5} | changes
    run = Path(train(ready, tmp_path / "run", **settings).run)
    seen = dynamics_of(run)
    order = [rows["pair_id"].to_list() for _, rows in seen.group_by("step", maintain_order=True)]
    assert len(order) == 5
    expected = list(plain_dpo(ready, order, TrainConfig.model_validate(settings)))
    for found, (wanted, _) in zip(steps_of(run).to_dicts()[:5], expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5, rel=2e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert found[name] == pytest.approx(wanted[name], abs=2e-4)
        if found["step"]:  # at step 0 all margins are 0 but for rounding
            assert found["rewards/accuracies"] == wanted["rewards/accuracies"]
    largest, mean = closest(model_of(run), expected[-1][1])
    # five updates of about 1e-3 a weight; where a gradient is nothing but rounding, so is Adam's direction
    assert mean <= 1e-6
    assert largest <= 1e-3


def test_a_model_of_separate_sequences_trains_as_plain_dpo(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = save_model(tmp_path / "model", random_model(mistral_config(len(tokenizer))), tokenizer)
    pipeline = built(tmp_path, weighted(text_rows(6)), model)
    precompute_reference(pipeline)
    settings = {"learning_rate": 1e-3, "max_steps": 3, "batch_size": 3}
    run = Path(train(pipeline, tmp_path / "run", **settings).run)
    order = [rows["pair_id"].to_list() for _, rows in dynamics_of(run).group_by("step", maintain_order=True)]
    expected = list(plain_dpo(pipeline, order, TrainConfig.model_validate(settings)))
    for found, (wanted, _) in zip(steps_of(run).to_dicts()[:3], expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5, rel=2e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)


def test_the_loss_falls(ready: Pipeline, tmp_path: Path) -> None:
    done = train(ready, tmp_path / "run", learning_rate=3e-3, max_steps=20, batch_size=8)
    losses = steps_of(tmp_path / "run")["loss"].drop_nulls().to_list()
    assert len(losses) == 20
    assert done.first_loss == losses[0] == pytest.approx(math.log(2), abs=2e-5)
    assert done.loss == losses[-1] < 0.2
    assert steps_of(tmp_path / "run")["rewards/margins"].drop_nulls().to_list()[-1] > 1


def test_accumulation_is_the_large_batch_to_float_rounding(ready: Pipeline, tmp_path: Path) -> None:
    shapes = [(8, 1), (4, 2), (2, 4), (1, 8)]
    runs = []
    for size, times in shapes:
        out = tmp_path / f"{size}x{times}"
        changes = {
            "batch_size": size,
            "gradient_accumulation_steps": times,
            "learning_rate": 1e-3,
            "max_steps": 5,
        }
        runs.append(Path(train(ready, out, **changes).run))
    whole = steps_of(runs[0])
    for run in runs[1:]:
        steps = steps_of(run)
        assert steps["num_pairs"].to_list() == whole["num_pairs"].to_list()
        for name in ("loss", "rewards/margins", "eval_loss"):
            assert steps[name].to_list() == pytest.approx(whole[name].to_list(), abs=2e-5)
        norms, whole_norms = (frame["grad_norm"].drop_nulls().to_list() for frame in (steps, whole))
        assert norms == pytest.approx(whole_norms, rel=1e-4)
        largest, mean = closest(model_of(run), model_of(runs[0]))
        assert mean <= 1e-6
        assert largest <= 1e-3
        assert dynamics_of(run)["pair_id"].equals(dynamics_of(runs[0])["pair_id"])


class Gradients:
    """An optimiser that takes no step: it keeps the gradient that it is given."""

    def __init__(self, policy: torch.nn.Module) -> None:
        self.policy, self.param_groups = policy, [{"lr": 0.0}]

    def step(self) -> None:
        self.found = torch.cat([p.grad.flatten().double() for p in self.policy.parameters() if p.grad is not None])

    def zero_grad(self) -> None:
        self.policy.zero_grad()


def data_of(pipeline: Pipeline) -> Data:
    dataset = Path(pipeline.dataset)
    (folder,) = (dataset / "reference").iterdir()
    recorded = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return load_data(dataset, pairs_of(pipeline), folder.name, recorded)


ARRANGEMENTS = [Limits(4, None), Limits(1, None), Limits(None, 90), Limits(None, 1), Limits(3, 70)]


def test_loss_and_gradient_of_an_update_are_those_of_one_large_batch_however_it_is_arranged(ready: Pipeline) -> None:
    data = data_of(ready).train.head(12)
    lengths = data.select(pl.sum_horizontal("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens"))
    policy = load_scorer(ready, lambda _line: None)
    with torch.no_grad():  # away from the reference, where the gradients of all pairs are alike
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)

    def updated(limits: Limits) -> tuple[Row, torch.Tensor, int, list[float]]:
        shares = dealt(range(12), lengths.to_series().to_list(), limits)
        optimizer: Any = Gradients(policy)
        made = update(Trainee(policy, policy, optimizer, Objective()), data, shares, 0, 0.0, 0.1)
        return summarise(made.metrics, 0.1), optimizer.found, len(shares[0]), made.metrics.losses.tolist()

    whole, gradient, count, losses = updated(Limits(None, None))
    assert count == 1
    assert whole["loss"] != pytest.approx(sum(losses) / 12, abs=1e-4)  # the weights have their effect
    counts = set()
    for limits in ARRANGEMENTS:
        row, found, count, _ = updated(limits)
        counts.add(count)
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert row["rewards/margins"] == pytest.approx(whole["rewards/margins"], rel=1e-5)
        assert float((found - gradient).norm() / gradient.norm()) <= 1e-6
    assert len(counts) >= 4


def test_an_evaluation_is_the_same_however_it_is_arranged(ready: Pipeline) -> None:
    test, policy = data_of(ready).test, load_scorer(ready, lambda _line: None)
    trainee = Trainee(policy, policy, Gradients(policy), Objective())  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    whole = evaluate(trainee, test, 0.1, Limits(None, None))
    assert abs(whole["eval_loss"] - math.log(2)) > 1e-3
    for limits in ARRANGEMENTS:
        assert evaluate(trainee, test, 0.1, limits) == pytest.approx(whole, abs=1e-4, rel=1e-6)
    assert evaluate(trainee, test.clear(), 0.1, Limits(2, None)) == {}


def test_evaluation_is_that_of_the_saved_model_on_the_test_split(ready: Pipeline, tmp_path: Path) -> None:
    done = train(ready, tmp_path / "run", learning_rate=1e-3, max_steps=6, batch_size=3)
    model, test = (
        model_of(tmp_path / "run"),
        [row for row in table_of(ready).values() if row["split"] == "test"],
    )
    assert 3 < len(test) < 12
    margins, weights = [], [row["weight"] for row in test]
    with torch.no_grad():
        for row in test:
            ratio = [
                plain_logps(model, row["prompt_ids"], row[f"{side}_ids"]).sum().item() - row[f"ref_{side}_logps"]
                for side in ("chosen", "rejected")
            ]
            margins.append(0.1 * (ratio[0] - ratio[1]))
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert done.eval is not None
    assert done.eval["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert done.eval["rewards/accuracies"] == sum(margin > 0 for margin in margins) / len(margins)
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert done.eval["loss"] == pytest.approx(expected, abs=1e-4)


def test_pairs_without_a_test_split_are_not_evaluated(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    done = train(pipeline, tmp_path / "run", max_steps=1)
    assert done.eval is None
    assert steps_of(tmp_path / "run")["eval_loss"].null_count() == 2


def test_a_dataset_without_a_train_split_is_refused(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"), split={"test_share": 1.0})
    precompute_reference(pipeline)
    with pytest.raises(DatasetError, match="no pair to train on"):
        train(pipeline, tmp_path / "run", max_steps=1)


def test_no_model_is_an_error_that_names_the_key(ready: Pipeline) -> None:
    without = ready.model_copy(update={"precompute": ready.precompute.model_copy(update={"model": None})})
    with pytest.raises(InputError, match=r"train\.model is not set"):
        train(without, None)


# --- order


def test_the_order_of_rows_on_disk_has_no_say(tmp_path: Path) -> None:
    model, rows = tiny_llama(tmp_path / "model"), text_rows(10)
    runs = []
    for name, ordered in (("one", rows), ("two", rows[::-1])):
        pipeline = built(tmp_path / name, ordered, model)
        precompute_reference(pipeline)
        runs.append(Path(train(pipeline, tmp_path / name / "run", batch_size=4, learning_rate=1e-3).run))
    assert steps_of(runs[0]).equals(steps_of(runs[1]))
    assert dynamics_of(runs[0]).equals(dynamics_of(runs[1]))


# --- what is recorded


def test_every_step_has_a_row_and_the_last_row_is_the_evaluation(ready: Pipeline, tmp_path: Path) -> None:
    done = train(ready, tmp_path / "run", max_steps=5, batch_size=8, learning_rate=1e-3, eval_steps=2)
    steps = steps_of(tmp_path / "run")
    num_train = pairs_of(ready).filter(pl.col("split") == "train").height
    assert 16 < num_train < 24  # three steps a pass
    assert steps["step"].to_list() == [0, 1, 2, 3, 4, 5]
    left = num_train - 16
    assert steps["num_pairs"].to_list() == [8, 8, left, 8, 8, None]
    share = 8 / num_train
    assert steps["epoch"].to_list() == pytest.approx([0, share, 2 * share, 1, 1 + share, 1 + 2 * share])
    assert steps["learning_rate"].to_list()[:5] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert [value is not None for value in steps["eval_loss"]] == [False, False, True, False, True, True]
    assert steps["loss"][5] is None
    assert (done.steps, done.run) == (5, str(tmp_path / "run"))
    live = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: row.get(name) for name in steps.columns} for row in live] == steps.to_dicts()


def test_rows_may_be_logged_sparsely_but_pairs_are_not(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=5, batch_size=2, logging_steps=2)
    assert steps_of(tmp_path / "run")["step"].to_list() == [0, 2, 4, 5]
    assert dynamics_of(tmp_path / "run")["step"].unique().sort().to_list() == [0, 1, 2, 3, 4]


def test_pair_dynamics_has_every_pair_of_every_step(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", epochs=2, batch_size=5, learning_rate=1e-3, save_steps=3)
    seen, steps = dynamics_of(tmp_path / "run"), steps_of(tmp_path / "run")
    trained = pairs_of(ready).filter(pl.col("split") == "train")["pair_id"].to_list()
    an_epoch = math.ceil(len(trained) / 5)
    for epoch in (0, 1):
        ids = seen.filter(pl.col("step") // an_epoch == epoch)["pair_id"].to_list()
        assert sorted(ids) == sorted(trained)
    margins = seen.group_by("step").agg(pl.col("margin").mean()).sort("step")["margin"].to_list()
    assert margins == pytest.approx(steps["rewards/margins"].drop_nulls().to_list(), abs=1e-6)
    apart = seen["rewards_chosen"] - seen["rewards_rejected"] - seen["margin"]
    assert apart.abs().max() <= 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"batch_size": 6, "max_batch_tokens": 70}], ids=str)
def test_the_pairs_of_a_step_are_logged_longest_first(ready: Pipeline, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(ready, tmp_path / "run", max_steps=3, **{"gradient_accumulation_steps": 2} | changes)
    table = table_of(ready)
    for _, rows in dynamics_of(tmp_path / "run").group_by("step", maintain_order=True):
        order = [(-sum(table[pair][f"num_{side}_tokens"] for side in SIDES), pair) for pair in rows["pair_id"]]
        assert len(order) > 4
        assert order == sorted(order)


def test_pairs_that_encoding_dropped_are_not_missed(tmp_path: Path) -> None:
    rows = [{"prompt": "river " * 150, "chosen": " yes", "rejected": " no"}, *text_rows(4)]
    pipeline = built(tmp_path, rows, tiny_llama(tmp_path / "model"))
    assert precompute_reference(pipeline).dropped == 1
    train(pipeline, tmp_path / "run", epochs=1)
    dropped = next(row["pair_id"] for row in pairs_of(pipeline).to_dicts() if row["prompt"] == rows[0]["prompt"])
    seen = dynamics_of(tmp_path / "run")["pair_id"].to_list()
    assert sorted([*seen, dropped]) == sorted(pairs_of(pipeline)["pair_id"].to_list())


def test_the_run_says_what_it_was(ready: Pipeline, tmp_path: Path) -> None:
    done = train(ready, tmp_path / "run", max_steps=2)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    Run.model_validate(recorded)
    assert recorded["finished"] is True
    assert (recorded["steps"], recorded["loss"], recorded["eval"]) == (2, done.loss, done.eval)
    assert recorded["train"]["max_steps"] == 2
    assert recorded["micro_batch_tokens"] == 2048  # what is usual on a CPU
    assert recorded["layout"] == "packed rows, prompts shared (packed attention)"
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert recorded["reference"] in card
    assert "not audited" in card


# --- one model


def living_parameters() -> list[torch.nn.Parameter]:
    # type() and not isinstance(), which imports what stands behind other libraries' lazy objects
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)]


def test_one_model_in_the_process_ever(ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    loaded: list[str] = []
    make, load = LlamaForCausalLM.__init__, PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(make)
    def counting_make(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(type(self).__name__)
        make(self, *args, **kwargs)

    def counting_load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(cls.__name__)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counting_make)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting_load))
    gc.collect()
    old = {id(parameter) for parameter in living_parameters()}
    counted: list[int] = []

    def count_parameters(*_args: Any) -> None:
        counted.append(sum(p.numel() for p in living_parameters() if id(p) not in old))

    pipeline = built(tmp_path, text_rows(6), Path(str(ready.precompute.model)))
    precompute_reference(pipeline, watch=count_parameters)
    assert (made, loaded) == (["LlamaForCausalLM"], ["LlamaForCausalLM"])
    gc.collect()
    train(pipeline, tmp_path / "run", watch=count_parameters, max_steps=3, batch_size=2, save_steps=1)
    assert (made, loaded) == (["LlamaForCausalLM"] * 2, ["LlamaForCausalLM"] * 2)
    monkeypatch.undo()
    assert counted == [sum(p.numel() for p in model_of(tmp_path / "run").parameters())] * 4


# --- kills and resumes

BUSY = {
    "learning_rate": 1e-3,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "save_steps": 3,
    "eval_steps": 4,
    "logging_steps": 2,
}


@pytest.fixture(scope="module")
def unbroken(ready: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(ready, run, **BUSY)
    return snapshot(run)


@pytest.mark.parametrize("steps", [[2], [3], [8], [4, 7, 9]], ids=str)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    ready: Pipeline, tmp_path: Path, unbroken: dict[str, bytes], steps: list[int]
) -> None:
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            train(ready, tmp_path / "run", watch=killed_at(step), **BUSY)
        assert not (tmp_path / "run" / "model").exists()
    with (tmp_path / "run" / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')  # a line that the kill tore
    told: list[str] = []
    train_dpo(with_train(ready, **BUSY), out=str(tmp_path / "run"), tell=told.append)
    start = steps[-1] // 3 * 3
    assert any(f"going on from step {start}" in line for line in told) == bool(start)
    after = snapshot(tmp_path / "run")
    assert after.keys() == unbroken.keys()
    assert [name for name in after if after[name] != unbroken[name]] == []


def test_a_resumed_run_makes_no_step_twice(ready: Pipeline, tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", watch=killed_at(8), **BUSY)
    train(ready, tmp_path / "run", watch=lambda step, _total, _row: done.append(step), **BUSY)
    assert done == [7, 8, 9, 10]


def test_a_resumed_run_is_not_scored_again_by_the_gate_and_keeps_its_figures(ready: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", watch=killed_at(5), **(BUSY | {"learning_rate": 1e-2}))
    gate = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["gate"]
    train(ready, tmp_path / "run", **(BUSY | {"learning_rate": 1e-2}))
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["gate"] == gate


def test_a_resume_of_a_policy_that_changed_on_disk_is_refused(tmp_path: Path) -> None:
    pipeline = built(tmp_path, text_rows(8), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    with pytest.raises(KeyboardInterrupt):
        train(pipeline, tmp_path / "run", watch=killed_at(5), **BUSY)
    tiny_llama(tmp_path / "model", seed=4)
    with pytest.raises(Exception, match="no reference is this policy's"):
        train(pipeline, tmp_path / "run", **BUSY)


def test_two_runs_of_the_same_settings_leave_the_same_bytes(
    ready: Pipeline, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    train(ready, tmp_path / "run", **BUSY)
    after = snapshot(tmp_path / "run")
    for name in ("model/model.safetensors", "steps.parquet", "pair_dynamics/part-00000.parquet"):
        assert after[name] == unbroken[name]
    assert after.keys() == unbroken.keys()


def test_checkpoints_are_limited_and_lie_where_the_format_says(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=9, batch_size=1, save_steps=2, save_total_limit=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006", "step-000008"]


# --- run directories


@pytest.fixture
def own(ready: Pipeline, tmp_path: Path) -> Pipeline:
    """The ready dataset in a place where runs may be left."""
    shutil.copytree(ready.dataset, tmp_path / "dataset")
    return ready.model_copy(update={"dataset": str(tmp_path / "dataset")})


def test_runs_are_numbered_and_an_unfinished_one_of_the_same_settings_is_finished_first(
    own: Pipeline,
) -> None:
    runs = Path(own.dataset) / "runs"
    assert train(own, None, max_steps=1).run == str(runs / "1")
    assert train(own, None, max_steps=1).run == str(runs / "2")
    with pytest.raises(KeyboardInterrupt):
        train(own, None, watch=killed_at(1), max_steps=2)
    assert train(own, None, max_steps=3).run == str(runs / "4")
    with pytest.raises(KeyboardInterrupt):
        train(own, None, watch=killed_at(1), max_steps=2)
    assert train(own, None, max_steps=2).run == str(runs / "3")
    (runs / "4").rename(runs / "10")
    assert train(own, None, max_steps=1).run == str(runs / "11")


def interrupted(pipeline: Pipeline, out: Path | None, at: int, **changes: Any) -> Interrupted:
    """Train until a stop is asked for after the update `at`."""
    made: list[int] = []
    with pytest.raises(Interrupted) as caught:
        train_dpo(
            with_train(pipeline, **changes),
            out=None if out is None else str(out),
            watch=lambda done, _total, _row: made.append(done),
            stop=lambda: made[-1:] == [at],
        )
    assert made[-1] == at
    return caught.value


@pytest.mark.parametrize(
    "changes",
    [{}, {"save_steps": None}, {"max_batch_tokens": 60}],
    ids=["checkpoints are due", "no checkpoints are due", "micro-batches of tokens"],
)
@pytest.mark.parametrize("stops", [[1], [3], [5], [4, 5, 8]], ids=str)
def test_an_interrupted_run_has_a_checkpoint_at_that_very_step_and_ends_as_the_unbroken_one(
    ready: Pipeline, tmp_path: Path, stops: list[int], changes: dict[str, Any]
) -> None:
    settings = BUSY | changes
    train(ready, tmp_path / "unbroken", **settings)
    for stop in stops:
        error = interrupted(ready, tmp_path / "run", stop, **settings)
        assert error.message == f"stopped after {stop} of 10 updates; a checkpoint is written"
        assert error.where == str(tmp_path / "run")
        assert (tmp_path / "run" / "checkpoints" / f"step-{stop:06d}" / "checkpoint.json").exists()
        assert steps_of(tmp_path / "run")["step"].max() < stop  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):  # and a kill after it changes nothing
        train(ready, tmp_path / "run", watch=killed_at(stops[-1] + 1), **settings)
    made: list[int] = []
    train(ready, tmp_path / "run", watch=lambda done, _total, _row: made.append(done), **settings)
    assert made[0] in (stops[-1] + 1, stops[-1] + 2)
    one, other = snapshot(tmp_path / "run"), snapshot(tmp_path / "unbroken")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_a_stop_asked_for_in_the_last_step_comes_too_late(ready: Pipeline, tmp_path: Path) -> None:
    made: list[int] = []
    done = train_dpo(
        with_train(ready, max_steps=1),
        out=str(tmp_path / "run"),
        watch=lambda step, _total, _row: made.append(step),
        stop=lambda: bool(made),
    )
    assert done.steps == 1


def test_a_stop_asked_for_before_the_first_step_leaves_nothing(own: Pipeline) -> None:
    with pytest.raises(Interrupted, match="stopped before the first step"):
        train_dpo(with_train(own, max_steps=2), stop=lambda: True)
    assert list((Path(own.dataset) / "runs").iterdir()) == []


def test_of_two_unfinished_runs_each_is_gone_on_with_by_its_own_command(own: Pipeline) -> None:
    runs = Path(own.dataset) / "runs"
    interrupted(own, None, 2, max_steps=4, beta=0.1)
    interrupted(own, runs / "2", 2, max_steps=4, beta=0.5)
    assert train(own, None, max_steps=4, beta=0.1).run == str(runs / "1")
    assert train(own, None, max_steps=4, beta=0.5).run == str(runs / "2")


def test_a_run_that_cannot_save_its_model_keeps_its_last_checkpoint(
    own: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(own, None, 3, max_steps=4)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_a, **_o: (_ for _ in ()).throw(full))
        with pytest.raises(MachineError, match="the disk is full"):
            train(own, None, max_steps=4)
    made: list[int] = []
    train(own, None, watch=lambda step, _total, _row: made.append(step), max_steps=4)
    assert made == [4]


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_the_weights(
    own: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    calls = iter(range(100))

    def spoil(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        norm = clip(parameters, *args, **kwargs)
        return norm * math.nan if next(calls) == 1 else norm

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", spoil)
    with pytest.raises(CheckError, match="the gradient is not finite at step 1") as caught:
        train(own, None, max_steps=2)
    assert caught.value.where == str(Path(own.dataset) / "runs" / "1")
    assert not (Path(own.dataset) / "runs" / "1" / "model").exists()


def test_fewer_updates_than_a_run_has_made_are_refused(own: Pipeline) -> None:
    interrupted(own, None, 3, max_steps=5)
    with pytest.raises(DatasetError, match="has made 3 updates, more than the 2 that are asked for") as caught:
        train_dpo(with_train(own, max_steps=2), go_on=True)
    assert caught.value.hint == "a larger train.max_steps or train.epochs"


def test_what_a_kill_tore_of_a_checkpoint_is_gone_when_the_run_is_finished(own: Pipeline) -> None:
    interrupted(own, None, 2, max_steps=4)
    torn = Path(own.dataset) / "runs" / "1" / "checkpoints" / ".step-000003.tmp"
    torn.mkdir()
    train(own, None, max_steps=4)
    assert not torn.parent.exists()


def test_a_damaged_run_stands_in_nobodys_way(own: Pipeline) -> None:
    train(own, None, max_steps=1)
    (Path(own.dataset) / "runs" / "1" / "run.json").write_text("{")
    assert train(own, None, max_steps=1).run == str(Path(own.dataset) / "runs" / "2")


def test_an_unfinished_run_with_other_settings_is_not_left_behind_in_silence(own: Pipeline) -> None:
    runs = Path(own.dataset) / "runs"
    interrupted(own, None, 2, max_steps=4, beta=0.1)
    with pytest.raises(DatasetError) as caught:
        train(own, None, max_steps=4, beta=0.2, learning_rate=1e-3)
    assert caught.value.message == (
        "is unfinished and was started with other settings (then and now): "
        "train.beta: 0.1 and 0.2; train.learning_rate: 1e-06 and 0.001"
    )
    assert caught.value.where == str(runs / "1")
    assert caught.value.hint == (
        f"--go-on goes on with it under the new settings; --out {runs / '2'} starts another run"
    )
    assert [path.name for path in runs.iterdir()] == ["1"]
    assert train(own, runs / "2", max_steps=4, beta=0.2).run == str(runs / "2")


def test_going_on_with_other_settings_is_noted_and_they_have_their_effect(own: Pipeline) -> None:
    run = Path(own.dataset) / "runs" / "1"
    interrupted(own, None, 2, max_steps=4, beta=0.1)
    told: list[str] = []
    changed = with_train(own, max_steps=5, beta=0.5)
    done = train_dpo(changed, go_on=True, tell=told.append)
    assert done.run == str(run)
    assert any("going on from step 2" in line and "changed: train.beta: 0.1 and 0.5" in line for line in told)
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = ["train.beta: 0.1 and 0.5", "train.max_steps: 4 and 5"]
    assert recorded["changes"] == [{"step": 2, "settings": lines}]
    assert recorded["train"]["beta"] == 0.5
    steps = steps_of(run)
    assert steps["step"].to_list() == [0, 1, 2, 3, 4, 5]
    # the learning rate follows the new length: 1e-6 (1 - step / 5)
    assert steps["learning_rate"].to_list()[2:5] == pytest.approx([6e-7, 4e-7, 2e-7])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"optimizer": "rmsprop"}, "train.optimizer: adamw and rmsprop"), ({"other_reference": True}, "other_reference")],
)
def test_what_a_run_never_changes_is_refused_even_then(own: Pipeline, changes: dict[str, Any], named: str) -> None:
    interrupted(own, None, 2, max_steps=4)
    with pytest.raises(DatasetError, match=named) as caught:
        train_dpo(with_train(own, max_steps=4, beta=0.7, **changes), go_on=True)
    assert "beta" not in caught.value.message
    assert caught.value.hint.startswith("--out ")


def counted_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pairs of every micro-batch that is scored from now on, in training and evaluation."""
    sizes: list[int] = []
    score = updates_module.score_pairs

    def counting(policy: Any, rows: pl.DataFrame, *rest: Any) -> Any:
        sizes.append(rows.height)
        return score(policy, rows, *rest)

    monkeypatch.setattr(updates_module, "score_pairs", counting)
    return sizes


def test_a_micro_batch_is_of_pairs_and_on_a_cpu_of_tokens_besides(
    own: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted_batches(monkeypatch)
    train(own, None, max_steps=1, batch_size=8)
    assert sizes[0] == 8
    sizes.clear()
    train(own, None, max_steps=1, batch_size=8, max_batch_tokens=1)
    assert set(sizes) == {1}
    monkeypatch.setattr(job_module, "CPU_BATCH_TOKENS", 1)
    sizes.clear()
    train(own, None, max_steps=1, batch_size=8)
    assert set(sizes) == {1}
    sizes.clear()
    train(own, None, max_steps=1, batch_size=4, max_batch_tokens=10**6)  # a setting is not cut short
    assert sizes[0] == 4


def test_a_run_goes_on_with_the_micro_batches_it_began_with_wherever_it_is(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BUSY | {"batch_size": 4}
    monkeypatch.setattr(job_module, "CPU_BATCH_TOKENS", 40)
    train(ready, tmp_path / "unbroken", **settings)
    interrupted(ready, tmp_path / "run", 5, **settings)
    monkeypatch.undo()
    sizes = counted_batches(monkeypatch)
    train(ready, tmp_path / "run", **settings)
    assert max(sizes) < 4
    one, other = snapshot(tmp_path / "run"), snapshot(tmp_path / "unbroken")
    assert [name for name in one if one[name] != other[name]] == []
    recorded = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert recorded["micro_batch_tokens"] == 40


def test_a_run_of_an_earlier_release_goes_on_with_its_number_of_pairs(own: Pipeline, monkeypatch: Any) -> None:
    interrupted(own, None, 2, max_steps=4, batch_size=4)
    path = Path(own.dataset) / "runs" / "1" / "run.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    del recorded["micro_batch_tokens"], recorded["train"]["max_batch_tokens"]
    path.write_text(json.dumps(recorded), encoding="utf-8")
    monkeypatch.setattr(job_module, "CPU_BATCH_TOKENS", 1)
    sizes = counted_batches(monkeypatch)
    assert train(own, None, max_steps=4, batch_size=4).steps == 4
    assert sizes[0] == 4
    assert json.loads(path.read_text(encoding="utf-8"))["micro_batch_tokens"] is None


def test_other_micro_batches_are_another_setting(own: Pipeline) -> None:
    interrupted(own, None, 2, max_steps=4, max_batch_tokens=100)
    with pytest.raises(DatasetError, match=r"then and now\): train\.max_batch_tokens: 100 and None\n"):
        train(own, None, max_steps=4)
    train_dpo(with_train(own, max_steps=4), go_on=True)
    recorded = json.loads((Path(own.dataset) / "runs" / "1" / "run.json").read_text(encoding="utf-8"))
    assert recorded["changes"] == [{"step": 2, "settings": ["train.max_batch_tokens: 100 and None"]}]
    assert recorded["micro_batch_tokens"] == 2048


def test_there_must_be_a_run_to_go_on_with(own: Pipeline, tmp_path: Path) -> None:
    for out in (None, str(tmp_path / "new")):
        with pytest.raises(DatasetError, match="no unfinished run to go on with"):
            train_dpo(with_train(own, max_steps=1), out=out, go_on=True)
    train(own, None, max_steps=1)
    with pytest.raises(DatasetError, match="no unfinished run to go on with"):
        train_dpo(with_train(own, max_steps=1), go_on=True)


def test_an_unfinished_run_that_somebody_is_at_work_on_is_left_to_them(own: Pipeline) -> None:
    interrupted(own, None, 2, max_steps=4)
    with locked(Path(own.dataset) / "runs" / "1"):
        assert train(own, None, max_steps=4).run == str(Path(own.dataset) / "runs" / "2")


def test_weight_decay_of_a_changed_setting_has_its_effect_after_a_resume(own: Pipeline) -> None:
    """Optimisers keep their settings in their state: taken from there, a changed one would be ignored."""
    decayed = []
    for decay in (0.0, 0.9):
        out = Path(own.dataset).parent / f"run {decay}"
        interrupted(own, out, 1, max_steps=3, learning_rate=0.1)
        done = train_dpo(
            with_train(own, max_steps=3, learning_rate=0.1, weight_decay=decay), out=str(out), go_on=bool(decay)
        )
        decayed.append(float(model_of(Path(done.run)).lm_head.weight.detach().square().sum()))
    assert decayed[1] < 0.95 * decayed[0]


def test_a_finished_run_is_not_written_over(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=1)
    before = snapshot(tmp_path / "run")
    with pytest.raises(DatasetError, match="is a finished run") as caught:
        train(ready, tmp_path / "run", max_steps=1)
    assert caught.value.where == str(tmp_path / "run")
    assert caught.value.hint == "choose another --out"
    assert snapshot(tmp_path / "run") == before


def test_other_settings_do_not_go_on_with_a_run_and_are_named(ready: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ready, tmp_path / "run", watch=killed_at(1), max_steps=2, beta=0.1)
    with pytest.raises(DatasetError) as caught:
        train(ready, tmp_path / "run", max_steps=2, beta=0.2)
    assert caught.value.message == (
        "is unfinished and was started with other settings (then and now): train.beta: 0.1 and 0.2"
    )
    assert caught.value.hint == "--go-on goes on with it under the new settings; --out RUN starts another run"


def test_a_folder_of_something_else_is_not_written_into(ready: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match="holds something that is no run"):
        train(ready, tmp_path, max_steps=1)
    assert snapshot(tmp_path) == {"thesis.txt": b"mine"}


def test_a_second_trainer_in_one_run_is_told_who_holds_it(ready: Pipeline, tmp_path: Path) -> None:
    def begin_again(*_step: Any) -> None:
        with pytest.raises(DatasetError, match=f"is being written by another prefkit .process {os.getpid()}."):
            train(ready, tmp_path / "run", max_steps=1)

    train(ready, tmp_path / "run", watch=begin_again, max_steps=1)


# --- the final model


def test_the_final_model_loads_and_has_moved(ready: Pipeline, tmp_path: Path) -> None:
    train(ready, tmp_path / "run", max_steps=2, learning_rate=1e-3)
    before = AutoModelForCausalLM.from_pretrained(str(ready.precompute.model))
    largest, _ = closest(model_of(tmp_path / "run"), before)
    assert 1e-4 < largest < 1e-2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("river stone")["input_ids"] == tiny_tokenizer()("river stone")["input_ids"]


@pytest.mark.parametrize("template", [None, "transcript"])
def test_the_final_tokenizer_keeps_the_template_that_was_trained_with(tmp_path: Path, template: str | None) -> None:
    own = tiny_tokenizer().chat_template
    model = tiny_llama(tmp_path / "model", template=None if template else own)
    pipeline = built(tmp_path, chat_rows(4), model, "chat", precompute={"chat_template": template})
    precompute_reference(pipeline)
    run = Path(train(pipeline, None, max_steps=1).run)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == (TRANSCRIPT if template else own)


# --- memory and precision


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")],
)
def test_what_accelerate_is_told_from_outside_changes_no_number(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """`accelerate launch` sets these: the regime is the reference's, and the loss is divided by weights alone."""
    settings = {"max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": None}
    train(ready, tmp_path / "plain", **settings)
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(ready, tmp_path / "told", **settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert steps_of(tmp_path / "told").equals(steps_of(tmp_path / "plain"))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, name: str) -> None:
    """It runs in train mode: any dropout that is left (GPT-2 has .1 by default) would show."""
    tokenizer = tiny_tokenizer()
    model = save_model(tmp_path / "model", random_model(CONFIGS[name](len(tokenizer))), tokenizer)
    pipeline = built(tmp_path, text_rows(10), model, split=SPLIT)
    precompute_reference(pipeline)
    settings = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3}
    for out, checkpointing in (("plain", False), ("sparing", True)):
        train(pipeline, tmp_path / out, gradient_checkpointing=checkpointing, **settings)
    plain, sparing = (steps_of(tmp_path / out) for out in ("plain", "sparing"))
    for name in ("loss", "eval_loss"):
        assert plain[name].null_count() < 5
        assert sparing[name].to_list() == pytest.approx(plain[name].to_list(), abs=1e-6)
    norms, plain_norms = (frame["grad_norm"].drop_nulls().to_list() for frame in (sparing, plain))
    assert norms == pytest.approx(plain_norms, rel=1e-5)


def test_gradient_checkpointing_runs_each_layer_again_in_the_backward(
    ready: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {False: 0, True: 0}
    checkpointing = False
    run: Callable[..., Any] = LlamaMLP.forward

    @functools.wraps(run)
    def counting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs[checkpointing] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counting_run)
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        train(ready, out, gradient_checkpointing=checkpointing, max_steps=5, batch_size=4)
    assert (
        runs[True] == runs[False] + 5 * 2 + 2 * 2
    )  # five updates and the two forwards of the dropout check, two layers


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_weights"])
def test_training_runs_in_the_regime_of_its_reference(tmp_path: Path, dtype: str) -> None:
    pipeline = built(tmp_path, text_rows(8), tiny_llama(tmp_path / "model"), precompute={"dtype": dtype})
    precompute_reference(pipeline)
    done = train(pipeline, tmp_path / "run", max_steps=3, learning_rate=1e-3)
    assert done.first_loss == pytest.approx(math.log(2), abs=0.02)
    assert done.loss < done.first_loss
    weights = {p.dtype for p in model_of(tmp_path / "run").parameters()}
    assert weights == {torch.float32 if dtype == "bfloat16" else torch.bfloat16}


def test_attention_without_a_backward_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = built(tmp_path, text_rows(4), tiny_llama(tmp_path / "model"))
    precompute_reference(pipeline)
    # compiling it takes half a minute: what is tested is the refusal
    monkeypatch.setattr("prefkit.policy.choose_layout", lambda *_args, **_named: Layout("packed", "flex"))
    with pytest.raises(InputError, match="flex attention has no backward on a CPU") as caught:
        train_dpo(pipeline)
    assert caught.value.where == "precompute.attention"
    assert caught.value.hint == "--set precompute.attention=auto"
    assert not list(Path(pipeline.dataset).glob("runs/*"))
