"""Compiled layers: the values and gradients of uncompiled ones, the same weights by name, and what is refused."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from prefkit.compiling import compile_layers, decoder_layers
from prefkit.config import TrainConfig
from prefkit.encode import Sides
from prefkit.errors import InputError, ModelError
from prefkit.logps import CompletionLogps, Layout
from tests.tiny import gpt2_config, llama_config, mamba_config, random_ids, random_model

LAYOUTS = [Layout("packed", "packed"), Layout("tree", "sdpa")]


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled goes to a folder of its own: a process that is killed may leave half a library behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def pairs_of(seed: int, count: int) -> list[Sides]:
    rng = random.Random(seed)
    return [Sides(*(random_ids(rng, rng.randint(2, 40)) for _ in Sides._fields)) for _ in range(count)]


def scored(model: nn.Module, layout: Layout, pairs: list[Sides]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer = CompletionLogps(model, "float32", layout)
    model.zero_grad()
    found = scorer(scorer.batch(pairs))
    (found.chosen_logps - 0.5 * found.rejected_logps).sum().backward()
    return found.token_logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch compiles its own warnings, too
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.rows)
@pytest.mark.usefixtures("own_cache")
def test_compiled_layers_give_the_values_and_gradients_of_uncompiled_ones(layout: Layout) -> None:
    torch.compiler.reset()
    plain = random_model(llama_config())
    model = copy.deepcopy(plain)
    compile_layers(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for seed, count in enumerate((3, 1, 5)):  # rows of other lengths, with the same code
        pairs = pairs_of(seed, count)
        found, gradients = scored(model, layout, pairs)
        expected, wanted = scored(plain, layout, pairs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert set(gradients) == set(wanted)
        for name, gradient in wanted.items():
            apart = float((gradients[name] - gradient).norm() / gradient.norm())
            assert apart < 1e-5, name
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("config", "name"), [(llama_config(), "layers"), (gpt2_config(), "h"), (mamba_config(), "layers")]
)
def test_the_layers_of_a_model_are_found(config: Any, name: str) -> None:
    model = random_model(config)
    assert decoder_layers(model) is getattr(model.get_decoder() if name == "layers" else model.transformer, name)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = random_model(llama_config())
    model.model.layers = nn.ModuleList(model.model.layers[:1])
    with pytest.raises(ModelError) as refused:
        compile_layers(model)
    assert str(refused.value) == (
        "train.compile: LlamaForCausalLM has no list of 2 layers to compile\n  next: --set train.compile=false"
    )


def test_a_machine_that_cannot_compile_is_told_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_function: Any) -> Any:
        def call(_values: torch.Tensor) -> None:
            raise RuntimeError("No working C++ compiler found\nin 3 places")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    model = random_model(llama_config())
    with pytest.raises(InputError) as refused:
        compile_layers(model)
    assert str(refused.value) == (
        "train.compile: torch.compile does not work here: No working C++ compiler found\n"
        "  expected: a C++ compiler (g++ or clang++) and Python's headers\n"
        "  next: --set train.compile=false"
    )
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_compiled_layers_and_checkpointed_ones_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"train.compile and train.gradient_checkpointing exclude each other"):
        TrainConfig(compile=True, gradient_checkpointing=True)
