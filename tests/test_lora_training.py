"""Training an adapter against plain DPO on peft's own model, and what it leaves: an adapter, or the whole model."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import polars as pl
import pytest
import torch
from adapted import base_of, by_peft, by_transformers, logits_of, mixtral_config, quiet, rewrite, sft_adapter
from tiny import built, gemma2_config, gpt2_config, llama_config, plain_logps, snapshot, text_rows
from torch.nn.functional import logsigmoid

from prefkit.config import Pipeline, TrainConfig
from prefkit.errors import GateError, InputError, Interrupted
from prefkit.lora import add_adapter, save_adapter
from prefkit.models import load_model
from prefkit.reference import precompute_reference
from prefkit.train import train_dpo
from prefkit.train_settings import LoraSettings

CPU = torch.device("cpu")
CONFIGS = {"llama": llama_config, "gpt2": gpt2_config, "gemma2": gemma2_config, "mixtral": mixtral_config}
STEPS = 4
RATE = 5e-3
BETA = 0.5
LORA = {"r": 4, "alpha": 8}


def ready_for(folder: Path, name: str, *, sft: bool = False) -> Pipeline:
    """A base of that architecture (or an adapter on it) and its reference of 16 pairs."""
    model = base_of(folder / "base", CONFIGS[name]())
    if sft:
        model = sft_adapter(folder / "sft", model)
    pipeline = built(folder, text_rows(16), model)
    precompute_reference(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return ready_for(tmp_path_factory.mktemp("ready"), "llama")


@pytest.fixture(scope="module")
def ready_sft(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return ready_for(tmp_path_factory.mktemp("ready_sft"), "llama", sft=True)


def trained(pipeline: Pipeline, out: Path, stop: Any = lambda: False, **changes: Any) -> Path:
    usual = {"batch_size": 4, "learning_rate": RATE, "beta": BETA, "max_steps": STEPS, "lr_scheduler_type": "constant"}
    settings = TrainConfig.model_validate(pipeline.train.model_dump() | usual | changes)
    return Path(train_dpo(pipeline.model_copy(update={"train": settings}), out=str(out), stop=stop).run)


def losses_of(run: Path) -> list[float]:
    losses: list[float] = pl.read_parquet(run / "steps.parquet")["loss"].drop_nulls().to_list()
    return losses


def plain_dpo(pipeline: Pipeline, run: Path, base: Path, adapter: Path) -> Iterator[tuple[float, Any]]:
    """arXiv 2305.18290, equation 7, on peft's model with AdamW: the pairs of the run's steps, one at a time."""
    parts = sorted(Path(pipeline.dataset).glob("reference/*/part-*.parquet"))
    table = {row["pair_id"]: row for row in pl.concat([pl.read_parquet(part) for part in parts]).to_dicts()}
    seen = pl.concat([pl.read_parquet(path) for path in sorted((run / "pair_dynamics").iterdir())])
    with quiet():
        policy: Any = peft.PeftModel.from_pretrained(by_transformers(base), str(adapter), is_trainable=True).eval()
    before: dict[str, list[float]] = {}
    with torch.no_grad():
        for pair, row in table.items():
            sides = (row["chosen_ids"], row["rejected_ids"])
            before[pair] = [plain_logps(policy, row["prompt_ids"], side).sum().item() for side in sides]
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    for _, rows in seen.group_by("step", maintain_order=True):
        losses = []
        for pair in rows["pair_id"]:
            row = table[pair]
            chosen, rejected = (
                plain_logps(policy, row["prompt_ids"], row[f"{side}_ids"]).sum() - reference
                for side, reference in zip(("chosen", "rejected"), before[pair], strict=True)
            )
            losses.append(-logsigmoid(BETA * (chosen - rejected)))
        loss = torch.stack(losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), policy


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_trained_as_by_hand_with_peft(tmp_path: Path, name: str) -> None:
    pipeline = ready_for(tmp_path, name)
    base = tmp_path / "base"
    weights = (base / "model.safetensors").read_bytes()
    run = trained(pipeline, tmp_path / "run", lora=LORA, seed=1)
    model: Any = load_model(base, "float32", CPU)
    add_adapter(model, LoraSettings.model_validate(LORA), 1)  # the seed is the run's
    save_adapter(model, tmp_path / "fresh", str(base))
    expected = list(plain_dpo(pipeline, run, base, tmp_path / "fresh"))
    found = losses_of(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(found[-1] - found[0]) > 0.05  # it learns: else this test shows little
    assert found == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert (base / "model.safetensors").read_bytes() == weights
    oracle = by_peft(run / "model")
    for where, parameter in oracle.named_parameters():
        if "lora_" not in where:
            assert torch.equal(parameter, model.get_parameter(where.removeprefix("base_model.model.")))
    assert (logits_of(oracle) - logits_of(expected[-1][1])).abs().max() <= 1e-3
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert json.loads((run / "run.json").read_text())["saved"] == "adapter"


def test_gradient_checkpointing_gives_the_same_losses(ready: Pipeline, tmp_path: Path) -> None:
    plain, again = (trained(ready, tmp_path / str(on), lora=LORA, gradient_checkpointing=on) for on in (False, True))
    assert losses_of(plain) == pytest.approx(losses_of(again), abs=1e-6)


def test_a_merged_run_is_the_adapter_run_folded_in(ready: Pipeline, tmp_path: Path) -> None:
    adapter = trained(ready, tmp_path / "adapter", lora=LORA)
    whole = trained(ready, tmp_path / "whole", lora=LORA, merge_adapter=True)
    assert losses_of(adapter) == losses_of(whole)
    assert json.loads((whole / "run.json").read_text())["saved"] == "merged"
    assert not (whole / "model" / "adapter_config.json").exists()
    merged = by_transformers(whole / "model")
    assert (logits_of(merged) - logits_of(by_peft(adapter / "model"))).abs().max() <= 2e-5
    again = built(tmp_path / "next", text_rows(4), whole / "model")
    assert precompute_reference(again).key


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_weights"])
def test_an_adapter_is_trained_in_the_regimes_of_bfloat16(tmp_path: Path, dtype: str) -> None:
    base = base_of(tmp_path / "base", llama_config())
    pipeline = built(tmp_path, text_rows(16), base, precompute={"dtype": dtype})
    precompute_reference(pipeline)
    run = trained(pipeline, tmp_path / "run", lora=LORA)
    losses = losses_of(run)
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)  # sums of some 10 tokens whose rounding is 2^-8
    assert all(math.isfinite(loss) for loss in losses)
    saved = by_peft(run / "model")
    assert any(bool(p.any()) for n, p in saved.named_parameters() if "lora_B" in n)


def test_a_resumed_adapter_run_leaves_what_an_unbroken_one_does(ready: Pipeline, tmp_path: Path) -> None:
    unbroken = trained(ready, tmp_path / "unbroken", lora=LORA, save_steps=2)
    calls = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        trained(ready, tmp_path / "broken", stop=lambda: next(calls), lora=LORA, save_steps=2)
    broken = trained(ready, tmp_path / "broken", lora=LORA, save_steps=2)
    assert losses_of(broken) == losses_of(unbroken)
    assert snapshot(broken / "model") == snapshot(unbroken / "model")


# --- an SFT adapter as the reference


@pytest.mark.parametrize("name", CONFIGS)
def test_an_sft_adapter_goes_on_being_trained_from_its_own_reference(tmp_path: Path, name: str) -> None:
    pipeline = ready_for(tmp_path, name, sft=True)
    run = trained(pipeline, tmp_path / "run")
    expected = list(plain_dpo(pipeline, run, tmp_path / "base", tmp_path / "sft"))
    found = losses_of(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert abs(found[-1] - found[0]) > 0.05
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == tmp_path / "base"
    assert config["r"] == 4
    before = by_peft(tmp_path / "sft")
    assert (logits_of(by_peft(run / "model")) - logits_of(before)).abs().max() > 0.01


def test_the_reference_of_an_adapter_is_not_that_of_its_base(ready_sft: Pipeline, tmp_path: Path) -> None:
    sft = Path(str(ready_sft.precompute.model))
    for model in (sft.parent / "base", sft_adapter(tmp_path / "other", sft.parent / "base", seed=4)):
        with pytest.raises(GateError, match="no reference is this policy's") as caught:
            trained(ready_sft, tmp_path / "run", model=str(model))
        assert "weights_sha256" in str(caught.value)


def test_a_reference_of_another_scale_is_told_by_its_setting(ready_sft: Pipeline, tmp_path: Path) -> None:
    sft = Path(str(ready_sft.precompute.model))
    shutil.copytree(sft, tmp_path / "sft")
    rewrite(tmp_path / "sft", lora_alpha=9)
    with pytest.raises(GateError, match=r"config\.adapter\.lora_alpha: 8 and 9"):
        trained(ready_sft, tmp_path / "run", model=str(tmp_path / "sft"))


def test_an_adapter_that_was_moved_is_the_same_policy(ready_sft: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(Path(str(ready_sft.precompute.model)), tmp_path / "sft")
    rewrite(tmp_path / "sft", lora_dropout=0.1)
    run = trained(ready_sft, tmp_path / "run", model=str(tmp_path / "sft"), max_steps=1)
    assert losses_of(run)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_second_adapter_and_nothing_to_merge_are_refused_before_anything_is_made(
    ready: Pipeline, ready_sft: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"train\.lora would be a second adapter"):
        trained(ready_sft, tmp_path / "run", lora=LORA)
    with pytest.raises(InputError, match=r"train\.merge_adapter has no effect"):
        trained(ready, tmp_path / "run", merge_adapter=True)
    with pytest.raises(InputError, match=r"no linear layer is called q_prj"):
        trained(ready, tmp_path / "run2", lora=LORA | {"target_modules": ["q_prj"]})
    assert not (tmp_path / "run").exists()
