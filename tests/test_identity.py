"""A reference's key changes with everything that decides a number, and with nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import END, llama_config, random_model, save_model, tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer

from prefkit.encode import EncodeSettings
from prefkit.errors import ModelError
from prefkit.format import differing, reference_key
from prefkit.identity import (
    model_config,
    policy_identity,
    reference_identity,
    tokenizer_sha256,
    weights_sha256,
)
from prefkit.models import load_model

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


def one_tensor(folder: Path, tensor: torch.Tensor, name: str = "w") -> str:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor, "other": torch.ones(2)}, folder / WEIGHTS)
    return weights_sha256(folder)


def test_the_weights_hash_survives_resharding(tmp_path: Path) -> None:
    model = random_model(llama_config())
    whole = save_model(tmp_path / "whole", model, tiny_tokenizer())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert weights_sha256(tmp_path / "sharded") == weights_sha256(whole)


def test_the_weights_hash_survives_other_metadata(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    before = weights_sha256(folder)
    save_file(
        load_file(folder / WEIGHTS),
        folder / WEIGHTS,
        metadata={"format": "pt", "written_by": "somebody else"},
    )
    assert weights_sha256(folder) == before


def test_the_weights_hash_changes_with_one_value(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    before = weights_sha256(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / WEIGHTS)
    assert weights_sha256(folder) != before


def test_the_weights_hash_knows_name_shape_and_dtype_of_the_same_bytes(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 6)
    hashes = {
        one_tensor(tmp_path / "1", zeros),
        one_tensor(tmp_path / "2", zeros, name="v"),
        one_tensor(tmp_path / "3", zeros.reshape(3, 4)),
        one_tensor(tmp_path / "4", zeros.to(torch.int32)),
    }
    assert len(hashes) == 4
    assert one_tensor(tmp_path / "5", zeros.clone()) in hashes


def test_the_weights_hashed_are_the_weights_that_load(tmp_path: Path) -> None:
    """Of a single file and the index of an older sharded save in one folder, transformers takes the single file."""
    old, new = random_model(llama_config(), seed=0), random_model(llama_config(), seed=1)
    both = tmp_path / "both"
    old.save_pretrained(both, max_shard_size="30KB")
    single = save_model(tmp_path / "single", new, tiny_tokenizer())
    shutil.copy(single / WEIGHTS, both / WEIGHTS)
    loaded: Any = load_model(both, "float32", CPU)
    assert torch.equal(loaded.lm_head.weight, new.lm_head.weight)
    assert weights_sha256(both) == weights_sha256(single)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such model folder"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no safetensors weights"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "no safetensors file"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
            "the file is cut off",
        ),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = tiny_llama(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        policy_identity(folder, tokenizer)
    assert str(folder) in caught.value.where


def test_a_config_changes_the_identity_only_where_it_changes_a_number(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    before = model_config(folder)
    config = json.loads((folder / "config.json").read_text())
    noise = {
        "transformers_version": "0.0",
        "_name_or_path": "/elsewhere",
        "dtype": "bfloat16",
        "torch_dtype": "half",
    }
    (folder / "config.json").write_text(json.dumps(config | noise))
    assert model_config(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_config(folder) == before | {"rms_norm_eps": 1e-3}


def test_the_tokenizer_hash_does_not_see_padding_truncation_use_or_reloading(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_sha256(tokenizer)
    tokenizer("</s>", split_special_tokens=True)
    tokenizer(["river", "stone river letter"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding is not None  # the state that must not show
    tokenizer.padding_side = "left"
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_the_tokenizer_hash_changes_with_a_token_or_an_end() -> None:
    plain, longer, other_end, other_start = (tiny_tokenizer() for _ in range(4))
    longer.add_tokens(["zebra"])
    other_end.eos_token = "<|assistant|>"
    other_start.bos_token = END
    assert len({tokenizer_sha256(t) for t in (plain, longer, other_end, other_start)}) == 4


def test_the_tokenizer_hash_does_not_see_the_chat_template_which_has_its_own() -> None:
    assert tokenizer_sha256(tiny_tokenizer()) == tokenizer_sha256(tiny_tokenizer(template="{{ 1 }}"))


POLICY: dict[str, Any] = {"weights_sha256": "w", "config": {"a": 1}, "tokenizer_sha256": "t"}
SETTINGS = EncodeSettings("chat", 512, 16, "drop", "{{ messages }}")


@pytest.mark.parametrize(
    ("policy", "settings", "dtype"),
    [
        (POLICY | {"weights_sha256": "v"}, SETTINGS, "float32"),
        (POLICY | {"config": {"a": 2}}, SETTINGS, "float32"),
        (POLICY | {"tokenizer_sha256": "s"}, SETTINGS, "float32"),
        (POLICY, SETTINGS._replace(kind="text", chat_template=None), "float32"),
        (POLICY, SETTINGS._replace(max_length=513), "float32"),
        (POLICY, SETTINGS._replace(min_completion_tokens=17), "float32"),
        (POLICY, SETTINGS._replace(long_prompt="cut"), "float32"),
        (POLICY, SETTINGS._replace(chat_template="{{ messages }} "), "float32"),
        (POLICY, SETTINGS, "bfloat16"),
    ],
    ids=["weights", "config", "tokenizer", "kind", "length", "room", "long prompt", "template", "dtype"],
)
def test_the_key_changes_with_each_setting(policy: dict[str, Any], settings: EncodeSettings, dtype: str) -> None:
    key = reference_key(reference_identity(POLICY, SETTINGS, "float32"))
    assert key == reference_key(reference_identity(dict(POLICY), SETTINGS._replace(), "float32"))
    assert reference_key(reference_identity(policy, settings, dtype)) != key


def test_differences_are_named_with_both_values_down_to_the_config_key() -> None:
    other = {"weights_sha256": "v" * 64, "config": {"a": 1, "b": 2}, "tokenizer_sha256": "t"}
    assert differing(POLICY, POLICY) == []
    assert differing(POLICY, other) == ["config.b: None and 2", "weights_sha256: w and vvvvvvvvvvvvvvvv..."]
