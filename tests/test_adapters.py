"""Folders of peft: whose adapter it is, what is refused and how, and what makes it another reference."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import base_of, rewrite, sft_adapter
from safetensors.torch import load_file, save_file
from tiny import llama_config, tiny_tokenizer

from prefkit.adapters import base_folder, is_adapter, saved_as
from prefkit.config import TrainConfig
from prefkit.errors import InputError, ModelError
from prefkit.identity import identity_sha256, policy_identity
from prefkit.models import load_model, load_tokenizer

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MERGE = "fold it into its base with peft: merge_and_unload(), then save_pretrained(FOLDER)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    sft_adapter(folder / "sft", base_of(folder / "base", llama_config()))
    return folder


@pytest.fixture
def both(made: Path, tmp_path: Path) -> Path:
    """A base and its adapter, `base` and `sft`, to be spoilt; the adapter names its base by ../base."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "sft", base_model_name_or_path="../base")
    return tmp_path


def identity_of(folder: Path) -> str:
    return identity_sha256(policy_identity(folder, tiny_tokenizer()))


def test_a_folder_is_an_adapters_by_its_config(both: Path) -> None:
    assert is_adapter(both / "sft")
    assert is_adapter(str(both / "sft"))
    assert not is_adapter(both / "base")
    assert not is_adapter(both / "gone")


def test_the_base_is_found_absolute_beside_the_adapter_or_where_one_works(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base_folder(both / "base") == both / "base"
    assert base_folder(both / "sft").resolve() == both / "base"
    rewrite(both / "sft", base_model_name_or_path=str(both / "base"))
    assert base_folder(both / "sft") == both / "base"
    rewrite(both / "sft", base_model_name_or_path="base")
    monkeypatch.chdir(both)
    assert base_folder(Path("sft")).resolve() == both / "base"
    shutil.move(both / "base", both / "sft" / "base")
    assert base_folder(both / "sft") == both / "sft" / "base"


@pytest.mark.parametrize("name", ["someone/some-model", "", None])
def test_a_base_that_is_not_here_is_named_with_the_way_out(both: Path, name: str | None) -> None:
    rewrite(both / "sft", base_model_name_or_path=name)
    with pytest.raises(ModelError) as caught:
        load_model(both / "sft", "float32", torch.device("cpu"))
    assert str(caught.value) == (
        f"{both / 'sft' / CONFIG}: its base model {name or ''!r} is no model folder here\n"
        "  expected: base_model_name_or_path: absolute, or relative to the adapter's folder or the working directory\n"
        "  next: write the base model's folder into adapter_config.json"
    )


def test_an_adapter_on_an_adapter_is_refused(both: Path) -> None:
    sft_adapter(both / "second", both / "base")
    rewrite(both / "second", base_model_name_or_path=str(both / "sft"))
    shutil.copy(both / "base" / "config.json", both / "sft" / "config.json")
    with pytest.raises(ModelError, match=r"its base model .* is an adapter too") as caught:
        base_folder(both / "second")
    assert caught.value.hint == MERGE


@pytest.mark.parametrize(
    ("changes", "message", "expected"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "an adapter of the kind PROMPT_TUNING", "LORA"),
        ({"peft_type": "IA3"}, "an adapter of the kind IA3", "LORA"),
        ({"task_type": "SEQ_CLS"}, "an adapter for SEQ_CLS", "CAUSAL_LM"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights pissa_niter_4 changed the base itself, which is not in the folder",
            "an adapter saved with path_initial_model_for_weight_conversion",
        ),
        (
            {"alora_invocation_tokens": [3], "layer_replication": [[0, 2]]},
            "has alora_invocation_tokens, layer_replication, of which nothing shows that it is scored right",
            "LoRA, with or without rslora and DoRA",
        ),
        (
            {"of_a_later_peft": True},
            "has of_a_later_peft, of which nothing shows that it is scored right",
            "LoRA, with or without rslora and DoRA",
        ),
    ],
)
def test_what_is_not_known_to_be_right_is_refused_by_name(
    both: Path, changes: dict[str, Any], message: str, expected: str
) -> None:
    rewrite(both / "sft", **changes)
    with pytest.raises(ModelError) as caught:
        identity_of(both / "sft")
    assert (caught.value.message, caught.value.expected) == (message, expected)
    assert caught.value.where == str(both / "sft" / CONFIG)
    assert caught.value.hint in (MERGE, "")
    with pytest.raises(ModelError, match=re.escape(message)):
        load_model(both / "sft", "float32", torch.device("cpu"))


def test_what_a_later_peft_leaves_at_nothing_is_taken(both: Path) -> None:
    rewrite(both / "sft", of_a_later_peft=None, another=False, a_third={})
    load_model(both / "sft", "float32", torch.device("cpu"))


def test_a_damaged_folder_is_answered_by_file(both: Path) -> None:
    config, weights = both / "sft" / CONFIG, both / "sft" / WEIGHTS
    whole, bytes_of = config.read_text(), weights.read_bytes()
    for text, message in (("{", "cannot be read as JSON"), ("{}", "says no peft_type"), ("[]", "says no peft_type")):
        config.write_text(text)
        with pytest.raises(ModelError, match=message) as caught:
            identity_of(both / "sft")
        assert (caught.value.where, caught.value.expected) == (str(config), "as peft's save_pretrained")
    config.write_text(whole)
    weights.write_bytes(bytes_of[:-9])
    with pytest.raises(ModelError, match="the file is cut off"):
        identity_of(both / "sft")
    weights.rename(weights.with_suffix(".bin"))
    for look in (identity_of, lambda folder: load_model(folder, "float32", torch.device("cpu"))):
        with pytest.raises(ModelError, match="no safetensors weights") as caught:
            look(both / "sft")
        assert caught.value.where == str(weights)
        assert caught.value.hint == "save the adapter with save_pretrained(FOLDER)"


def test_a_model_and_an_adapter_in_one_folder_are_refused(both: Path) -> None:
    """transformers takes such a folder for the adapter, whatever its weights are."""
    shutil.copy(both / "sft" / CONFIG, both / "base" / CONFIG)
    with pytest.raises(ModelError) as caught:
        load_model(both / "base", "float32", torch.device("cpu"))
    assert caught.value.message == "holds both a model (model.safetensors) and an adapter (adapter_config.json)"
    assert (caught.value.where, caught.value.expected) == (str(both / "base"), "one of them")


def test_the_tokenizer_is_the_adapters_or_else_its_bases(both: Path) -> None:
    longer = tiny_tokenizer()
    longer.add_tokens(["zebra"])
    longer.save_pretrained(both / "sft")
    assert len(load_tokenizer(both / "sft")) == len(tiny_tokenizer()) + 1
    for path in (both / "sft").iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    assert len(load_tokenizer(both / "sft")) == len(tiny_tokenizer())


# --- identity


def test_an_adapter_is_another_model_than_its_base(both: Path) -> None:
    base, sft = (policy_identity(both / name, tiny_tokenizer()) for name in ("base", "sft"))
    assert base["weights_sha256"] != sft["weights_sha256"]
    assert sft["config"] == base["config"] | {"adapter": sft["config"]["adapter"]}
    assert sft["config"]["adapter"]["r"] == 4
    assert sft["config"]["adapter"]["lora_alpha"] == 8
    assert len(sft["config"]["adapter"]["target_modules"]) == 2 * 7  # of each layer


def changed(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda f: changed(f / "base" / "model.safetensors", "model.norm.weight"),
        lambda f: changed(f / "sft" / WEIGHTS, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
        lambda f: rewrite(f / "sft", lora_alpha=16),
        lambda f: rewrite(f / "sft", use_rslora=True),
        lambda f: rewrite(f / "sft", alpha_pattern={"q_proj": 2}),
        lambda f: rewrite(f / "sft", use_dora=True),
    ],
    ids=["base", "adapter", "alpha", "rslora", "pattern", "dora"],
)
def test_the_identity_changes_with_what_decides_a_number(both: Path, change: Any) -> None:
    before = identity_of(both / "sft")
    change(both)
    assert identity_of(both / "sft") != before


def test_the_identity_is_the_same_elsewhere_and_with_another_dropout(both: Path) -> None:
    before = identity_of(both / "sft")
    rewrite(both / "sft", lora_dropout=0.5, inference_mode=False, revision="main", peft_version="9", megatron_core="x")
    config = (both / "sft" / CONFIG).read_text()
    names = re.findall(r'"([\w.]+_proj)"', config)
    assert len(names) == 14
    rewrite(both / "sft", target_modules=sorted(set(names), reverse=True), lora_alpha=8.0, rank_pattern=None)
    assert identity_of(both / "sft") == before
    (both / "other").mkdir()
    shutil.move(both / "sft", both / "other" / "place")
    shutil.move(both / "base", both / "moved")
    rewrite(both / "other" / "place", base_model_name_or_path=str(both / "moved"))
    assert identity_of(both / "other" / "place") == before


# --- what a run saves


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(changes)


def test_what_a_run_saves_follows_from_what_it_trains(both: Path) -> None:
    assert saved_as(settings(), both / "base") == "model"
    assert saved_as(settings(lora={}), both / "base") == "adapter"
    assert saved_as(settings(lora={}, merge_adapter=True), both / "base") == "merged"
    assert saved_as(settings(), both / "sft") == "adapter"
    assert saved_as(settings(merge_adapter=True), both / "sft") == "merged"


def test_two_adapters_and_none_to_merge_are_refused_with_the_way_out(both: Path) -> None:
    with pytest.raises(InputError) as caught:
        saved_as(settings(lora={"r": 4}), both / "sft")
    assert str(caught.value) == (
        f"train.lora: train.lora would be a second adapter: {both / 'sft'} is one, and goes on being trained\n"
        "  next: leave train.lora out, or fold the adapter into its base with peft's merge_and_unload() first"
    )
    with pytest.raises(InputError) as caught:
        saved_as(settings(merge_adapter=True), both / "base")
    assert str(caught.value) == (
        "train.merge_adapter: train.merge_adapter has no effect: there is no adapter\n"
        "  next: --set train.lora='{r: 16}', or leave train.merge_adapter out"
    )
