"""LoRA layers in a model: the oracle is peft's own model, loaded and called as peft's users do."""

import json
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import base_of, by_peft, by_transformers, logits_of, mixtral_config, quiet, sft_adapter, shaken
from safetensors.torch import load_file, save_file
from tiny import (
    gemma2_config,
    gpt2_config,
    llama_config,
    mamba_config,
    plain_logps,
    random_ids,
    random_model,
)
from torch import Tensor, nn

from prefkit.encode import Sides
from prefkit.errors import InputError, ModelError
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps
from prefkit.lora import add_adapter, layer_names, merged, save_adapter, save_merged, trainable_names
from prefkit.models import checkpoint_activations, load_model
from prefkit.train_settings import LoraSettings

CPU = torch.device("cpu")
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": llama_config,
    "gpt2": gpt2_config,
    "gemma2": gemma2_config,
    "mixtral": mixtral_config,
}
EMBEDDINGS = {"gpt2": "wte"}
WHERE = "train.lora.target_modules"
# a delta of .1 a weight on weights of .3: logits of about 10, whose float32 sums are 1e-5 apart
CLOSE = 2e-5


def biased_config() -> Any:
    return llama_config(attention_bias=True)


def tied_config() -> Any:
    return llama_config(tie_word_embeddings=True)


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rslora": (llama_config, {"use_rslora": True}),
    "dora": (llama_config, {"use_dora": True}),
    "dora of Conv1D": (gpt2_config, {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "dropout": (llama_config, {"lora_dropout": 0.5}),
    "whole head": (llama_config, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole head and embeddings": (
        llama_config,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "whole tied head": (tied_config, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole tied embeddings": (tied_config, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "norms": (llama_config, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "all biases": (biased_config, {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "their biases": (biased_config, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "a bias in B": (biased_config, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "some tokens": (llama_config, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 12]}),
    "some tied tokens": (tied_config, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 12]}),
    "ranks and alphas": (
        llama_config,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "one layer": (llama_config, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "a pattern": (llama_config, {"target_modules": r".*layers\.0.*(q|v)_proj"}),
    "experts": (mixtral_config, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "embeddings and head": (llama_config, {"target_modules": ["embed_tokens", "lm_head"]}),
}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def some_pairs(count: int = 5) -> list[Sides]:
    rng = random.Random(0)
    return [Sides(random_ids(rng, 7 + i), random_ids(rng, 3 + i), random_ids(rng, 9 - i)) for i in range(count)]


def plain_of(model: Any, pairs: list[Sides]) -> Tensor:
    """What CompletionLogps gives, by the plain code: the tokens of chosen and rejected, pair by pair."""
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    return torch.cat([plain_logps(model, prompt, side) for prompt, side in sides])


# --- an adapter folder as a model


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_folder_scores_as_peft_does(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path / "base", CONFIGS[name]())
    folder = sft_adapter(tmp_path / "sft", base)
    model, pairs = load_model(folder, "float32", CPU), some_pairs()
    scorer = CompletionLogps(model, "float32", choose_layout(model, "float32", 128))
    with torch.no_grad():
        found, expected = scorer(scorer.batch(pairs)).token_logps, plain_of(by_peft(folder), pairs)
        without = plain_of(by_transformers(base), pairs)
    assert apart(found, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert apart(expected, without) > 0.5  # else this test shows nothing
    assert scorer.layout.fast


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_that_is_taken_is_that_of_peft(tmp_path: Path, name: str) -> None:
    config, settings = KINDS[name]
    base = base_of(tmp_path / "base", config())
    folder = sft_adapter(tmp_path / "sft", base, **settings)
    model: Any = load_model(folder, "float32", CPU)
    expected = logits_of(by_peft(folder))
    assert apart(expected, logits_of(by_transformers(base))) > 0.05
    assert torch.equal(logits_of(model), expected)
    model.train()
    assert torch.equal(logits_of(model), expected)  # no dropout
    model.eval()
    save_adapter(model, tmp_path / "again", str(base))
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == (
        load_file(folder / "adapter_model.safetensors").keys()
    )
    assert torch.equal(logits_of(by_peft(tmp_path / "again")), expected)
    save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    whole = by_transformers(tmp_path / "merged")
    assert not any("lora" in name or "base_layer" in name for name in whole.state_dict())
    assert apart(logits_of(whole), expected) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_in_bfloat16_weights_the_adapter_stays_float32_as_with_peft(tmp_path: Path, name: str) -> None:
    folder = sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", CONFIGS[name]()))
    model: Any = load_model(folder, "bfloat16_weights", CPU)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert torch.equal(logits_of(model), logits_of(by_peft(folder, torch.bfloat16)))
    whole = merged(model)
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}


def test_only_the_adapter_would_be_trained(tmp_path: Path) -> None:
    model = load_model(sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", llama_config())), "float32", CPU)
    names = trainable_names(model)
    assert len(names) == 2 * 2 * 7  # A and B of seven layers in each of two
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
    assert trainable_names(random_model(llama_config())) == [
        n for n, _ in random_model(llama_config()).named_parameters()
    ]


def test_tied_adapters_are_refused_by_name(tmp_path: Path) -> None:
    """Two layers with one adapter: nothing here shows that training keeps it one."""
    base = base_of(tmp_path / "base", tied_config())
    folder = sft_adapter(tmp_path / "sft", base, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ModelError, match="has ensure_weight_tying, of which nothing shows"):
        load_model(folder, "float32", CPU)


def test_nothing_asks_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path / "base", llama_config())
    folder = sft_adapter(tmp_path / "sft", base)

    def refused(*_arguments: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    model = load_model(folder, "float32", CPU)
    save_adapter(model, tmp_path / "again", "someone/some-model")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "someone/some-model"
    )
    fresh: Any = load_model(base, "float32", CPU)
    add_adapter(fresh, LoraSettings(), 0)
    save_adapter(fresh, tmp_path / "fresh", str(tmp_path / "gone"))
    save_merged(model, tmp_path / "merged")


def test_an_adapter_of_another_model_or_half_of_one_is_refused_by_its_tensors(tmp_path: Path) -> None:
    folder = sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", llama_config()))
    weights = folder / "adapter_model.safetensors"
    tensors, name = load_file(weights), "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(ModelError) as caught:
        load_model(folder, "float32", CPU)
    assert caught.value.message == (
        "1 tensors are missing in the adapter, or are of another model: "
        "model.layers.1.mlp.up_proj.lora_B.default.weight"
    )
    assert caught.value.where == str(weights)
    assert caught.value.expected == "all that its adapter_config.json names, and no others"
    save_file(tensors | {name.replace("layers.1", "layers.7"): tensors[name].clone()}, weights)
    with pytest.raises(ModelError, match=r"1 tensors are missing in the adapter, or are of another model: .*layers\.7"):
        load_model(folder, "float32", CPU)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, weights)
    with pytest.raises(
        ModelError, match=r"the adapter does not load: size mismatch for model\.layers\.1\.mlp\.up_proj"
    ) as c:
        load_model(folder, "float32", CPU)
    assert c.value.where == str(folder)


def test_without_peft_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path / "base", llama_config())
    folder = sft_adapter(tmp_path / "sft", base)
    plain = load_model(base, "float32", CPU)
    monkeypatch.setitem(sys.modules, "peft", None)
    load_model(base, "float32", CPU)
    for where, call in (
        (str(folder), lambda: load_model(folder, "float32", CPU)),
        ("train.lora", lambda: add_adapter(plain, LoraSettings(), 0)),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == (
            f"{where}: adapters need peft, which is not installed\n  next: pip install 'prefkit[lora]'"
        )


# --- a new adapter


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["all-linear", "head", "embeddings"])
def test_a_new_adapter_changes_nothing_and_then_is_pefts(tmp_path: Path, name: str, where: str) -> None:
    base = base_of(tmp_path / "base", CONFIGS[name]())
    targets: Any = {"head": ["lm_head"], "embeddings": [EMBEDDINGS.get(name, "embed_tokens")]}.get(where, where)
    model: Any = load_model(base, "float32", CPU)
    before = logits_of(model)
    add_adapter(model, LoraSettings(r=4, alpha=6, target_modules=targets), 0)
    assert torch.equal(logits_of(model), before)
    assert not model.training
    shaken(model)
    moved = logits_of(model)
    assert apart(moved, before) > 0.05
    save_adapter(model, tmp_path / "adapter", str(base))
    assert torch.equal(logits_of(by_peft(tmp_path / "adapter")), moved)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == (str(base), "CAUSAL_LM", 4)
    assert (config["lora_alpha"], config["lora_dropout"], config["inference_mode"]) == (6, 0.0, True)
    assert torch.equal(logits_of(load_model(tmp_path / "adapter", "float32", CPU)), moved)
    save_merged(model, tmp_path / "merged")
    assert apart(logits_of(model), moved) <= CLOSE
    assert apart(logits_of(by_transformers(tmp_path / "merged")), moved) <= CLOSE


def test_its_scale_is_alpha_by_r_and_by_its_root() -> None:
    """y = W x + alpha / r * B A x (arXiv 2106.09685, 4.1); alpha / sqrt(r) with rslora (arXiv 2312.03732)."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        model = random_model(llama_config())
        plain = model.model.layers[0].self_attn.q_proj(x)
        add_adapter(model, LoraSettings(r=4, alpha=6, target_modules=["q_proj"], use_rslora=rslora), 0)
        shaken(model)
        layer = model.model.layers[0].self_attn.q_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (a.shape, b.shape) == ((4, 32), (32, 4))
        assert torch.allclose(layer(x), plain + scale * (x @ a.T @ b.T), atol=1e-5)


def test_a_new_adapter_follows_from_its_seed_alone() -> None:
    found = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        model = random_model(llama_config())
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        add_adapter(model, LoraSettings(r=4), seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert bool(found[0].any())


def test_the_same_adapter_is_saved_in_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = random_model(llama_config())
        add_adapter(model, LoraSettings(r=4, target_modules=["v_proj", "q_proj", "up_proj"]), 0)
        save_adapter(model, tmp_path / name, "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    expected = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        # the fused experts are gate_up_proj (base_layer) and down_proj of `experts`, and gate is the router
        "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "experts", "base_layer"},
    }
    for name, layers in expected.items():
        model = random_model(CONFIGS[name]())
        add_adapter(model, LoraSettings(r=2), 0)
        assert {name.partition(".lora_")[0].rpartition(".")[2] for name in trainable_names(model)} == layers


@pytest.mark.parametrize("unknown", ["q_prj", "self_attn", "norm"])
def test_a_name_that_is_no_layers_is_answered_with_those_there_are(unknown: str) -> None:
    with pytest.raises(InputError) as caught:
        add_adapter(random_model(llama_config()), LoraSettings(target_modules=["q_proj", unknown]), 0)
    assert str(caught.value) == (
        f"{WHERE}: no linear layer is called {unknown}\n"
        "  expected: all-linear, or names among embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj, lm_head"
    )
    assert layer_names(random_model(gpt2_config())) == ["wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head"]


def test_a_layer_that_peft_does_not_take_is_answered_in_its_words() -> None:
    with pytest.raises(InputError, match=r"peft takes no such layer: .*Mamba") as caught:
        add_adapter(random_model(mamba_config()), LoraSettings(), 0)
    assert caught.value.where == WHERE
    assert caught.value.expected == "names among embeddings, in_proj, x_proj, dt_proj, out_proj, lm_head"


def test_a_layer_that_is_read_and_never_called_is_refused() -> None:
    """Its adapter would be trained by nothing, and folding it in would change the model."""
    model = random_model(llama_config())
    for layer in model.model.layers:
        inner = layer.mlp

        def reading(x: Tensor, inner: Any = inner) -> Tensor:
            found: Tensor = nn.functional.linear(inner.act_fn(inner.gate_proj(x)), inner.down_proj.weight)
            return found

        inner.forward = reading
    with pytest.raises(InputError) as caught:
        add_adapter(model, LoraSettings(target_modules=["gate_proj", "down_proj"]), 0)
    assert str(caught.value) == (
        f"{WHERE}: LlamaForCausalLM reads the weights of down_proj past their layers, so an adapter there is never "
        "used\n"
        "  expected: names among embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, lm_head"
    )


# --- gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_pefts_model_and_reach_the_adapter_only(tmp_path: Path, name: str) -> None:
    folder = sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", CONFIGS[name]()))
    model, pairs = load_model(folder, "float32", CPU), some_pairs()
    scorer = CompletionLogps(model, "float32", choose_layout(model, "float32", 128, backward=True))
    (-scorer(scorer.batch(pairs)).token_logps.mean()).backward()
    with quiet():
        oracle: Any = peft.PeftModel.from_pretrained(by_transformers(tmp_path / "base"), str(folder), is_trainable=True)
    (-plain_of(oracle.eval(), pairs).mean()).backward()  # type: ignore[no-untyped-call]
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in oracle.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected.keys()
    for where, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = expected[where]
            assert wanted is not None
            assert parameter.grad is not None
            assert apart(parameter.grad, wanted) <= 1e-4 * max(float(wanted.abs().max()), 1e-3), where


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, name: str) -> None:
    folder, pairs = sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", CONFIGS[name]())), some_pairs()
    found = []
    for again in (False, True):
        model = load_model(folder, "float32", CPU)
        scorer = CompletionLogps(model, "float32", choose_layout(model, "float32", 128, backward=True))
        if again:
            checkpoint_activations(model)
        loss = -scorer(scorer.batch(pairs)).token_logps.mean()
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == found[1][0]
    assert len(found[0][1]) == len(found[1][1]) > 0
    assert all(apart(one, other) <= 1e-6 for one, other in zip(found[0][1], found[1][1], strict=True))


def test_embeddings_saved_with_an_adapter_stay_with_it(tmp_path: Path) -> None:
    """peft saves the base's embeddings beside an adapter on them: where they are others than the base's, they count."""
    base = base_of(tmp_path / "base", llama_config())
    folder = sft_adapter(tmp_path / "sft", base, target_modules=["embed_tokens", "q_proj"])
    weights, name = folder / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(weights)
    save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    expected = logits_of(by_peft(folder))
    model: Any = load_model(folder, "float32", CPU)
    assert torch.equal(logits_of(model), expected)
    save_adapter(model, tmp_path / "again", str(base))
    assert torch.equal(logits_of(by_peft(tmp_path / "again")), expected)
    save_merged(model, tmp_path / "merged")
    assert apart(logits_of(by_transformers(tmp_path / "merged")), expected) <= CLOSE


def test_a_merged_model_can_be_trained_and_adapted_again(tmp_path: Path) -> None:
    model: Any = load_model(sft_adapter(tmp_path / "sft", base_of(tmp_path / "base", llama_config())), "float32", CPU)
    whole = merged(model)
    assert all(p.requires_grad for p in whole.parameters())
    before = logits_of(whole)
    add_adapter(whole, LoraSettings(r=2), 0)
    assert torch.equal(logits_of(whole), before)
