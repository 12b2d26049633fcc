"""A model is loaded one way: the regime's dtype, no dropout, exact attention, and a message where it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    gemma2_config,
    gpt2_config,
    llama_config,
    mamba_config,
    random_model,
    save_model,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import BertConfig, OPTConfig, tokenization_utils_base

from prefkit.errors import ModelError
from prefkit.models import REGIMES, autocast, check_fits, load_model, load_tokenizer, positions_of

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 17, 200, 33, 45, 260, 9, 9, 301]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("dtype", "weights", "products"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("bfloat16_weights", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_regime_is_the_dtype_of_weights_and_products(
    tmp_path: Path, dtype: str, weights: torch.dtype, products: torch.dtype
) -> None:
    model: Any = load_model(tiny_llama(tmp_path), dtype, CPU)
    assert {p.dtype for p in model.parameters()} == {weights}
    assert not model.training
    with torch.no_grad(), autocast(REGIMES[dtype], CPU):
        assert model.lm_head(torch.ones(1, 32, dtype=weights)).dtype == products


def test_a_checkpoint_in_bfloat16_is_raised_to_the_regime(tmp_path: Path) -> None:
    model = random_model(llama_config()).to(torch.bfloat16)
    loaded: Any = load_model(save_model(tmp_path, model, tiny_tokenizer()), "float32", CPU)
    assert loaded.lm_head.weight.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_loaded_weights_are_the_saved_ones(tmp_path: Path) -> None:
    model = random_model(llama_config())
    loaded = load_model(save_model(tmp_path, model, tiny_tokenizer()), "float32", CPU)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    "config",
    [
        gpt2_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        llama_config(attention_dropout=0.5),
        OPTConfig(
            vocab_size=380,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.5,
        ),
    ],
    ids=["gpt2", "llama", "opt"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_dropout_is_left_even_in_train_mode(tmp_path: Path, config: Any, attention: str) -> None:
    model = load_model(save_model(tmp_path, random_model(config), tiny_tokenizer()), "float32", CPU, attention)
    resting = logits_of(model)
    model.train()
    assert torch.equal(logits_of(model), resting)
    assert torch.equal(logits_of(model), resting)


def test_gemma2_keeps_the_soft_cap_of_its_attention(tmp_path: Path) -> None:
    capped = random_model(gemma2_config(), attn_implementation="eager")
    free = random_model(gemma2_config(attn_logit_softcapping=None), attn_implementation="eager")
    assert (logits_of(capped) - logits_of(free)).abs().max() > 0.01  # else this test shows nothing
    loaded = load_model(save_model(tmp_path, capped, tiny_tokenizer()), "float32", CPU)
    assert torch.allclose(logits_of(loaded), logits_of(capped), atol=1e-6)


def test_an_attention_that_the_class_has_not_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gemma", random_model(gemma2_config()), tiny_tokenizer())
    with pytest.raises(ModelError, match="the model does not load: Gemma2ForCausalLM does not support") as caught:
        load_model(folder, "float32", CPU, "sdpa")
    assert caught.value.where == str(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for load in (lambda f: load_model(f, "float32", CPU), load_tokenizer):
        with pytest.raises(ModelError, match="no such model folder") as caught:
            load(tmp_path / "nowhere")
        assert caught.value.where == str(tmp_path / "nowhere")


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(random_model(llama_config()).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        load_model(folder, "float32", CPU)
    assert "save_pretrained" in caught.value.hint


def test_a_long_text_is_encoded_without_a_word_from_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: said.append(text))
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "model"))
    tokenizer.model_max_length = 8
    assert len(tokenizer("river " * 20)["input_ids"]) > 8
    assert said == []


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    random_model(llama_config()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer in it") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in caught.value.message


def test_more_tokens_than_embeddings_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_fits(random_model(llama_config(len(tokenizer))), tokenizer, 512, "folder")
    check_fits(random_model(llama_config(len(tokenizer) + 4)), tokenizer, 512, "folder")
    with pytest.raises(ModelError, match=f"the tokenizer has {len(tokenizer)} tokens, the model 100 embeddings"):
        check_fits(random_model(llama_config(100)), tokenizer, 512, "folder")


@pytest.mark.parametrize("config", [llama_config(), gpt2_config()], ids=["llama", "gpt2"])
def test_more_tokens_than_positions_are_refused_with_the_setting_to_change(config: Any) -> None:
    model = random_model(config)
    check_fits(model, tiny_tokenizer(), 512, "folder")
    with pytest.raises(ModelError) as caught:
        check_fits(model, tiny_tokenizer(), 513, "folder")
    assert caught.value.message.startswith("precompute.max_length is 513, the model has 512 positions")
    assert caught.value.hint == "--set precompute.max_length=512"


def test_a_model_without_positions_takes_any_length() -> None:
    check_fits(random_model(mamba_config()), tiny_tokenizer(), 100_000, "folder")


def test_a_model_that_sees_what_comes_later_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    random_model(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, "float32", CPU)
    with pytest.raises(ModelError, match="not a causal language model"):
        check_fits(model, tiny_tokenizer(), 64, "here")


def test_a_model_without_all_its_weights_is_refused_by_their_names(tmp_path: Path) -> None:
    random_model(llama_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights are missing .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, "float32", CPU)


def test_positions_are_read_from_a_config() -> None:
    assert positions_of({"max_position_embeddings": 64}) == 64
    assert positions_of({"n_positions": 1024}) == 1024
    assert positions_of({"max_position_embeddings": 8, "text_config": {"max_position_embeddings": 32}}) == 32
    assert positions_of({"hidden_size": 4}) is None
