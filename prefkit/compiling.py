"""torch.compile for the decoder layers of a model: train.compile.

Each layer is compiled in place, so its weights keep their names, and all layers of one shape share what is compiled,
for rows of any length. Packed attention (attention.py) is left as it is: its calls follow the branches of each batch,
which no compiled code could be for. What is outside the layers, the vocabulary matrix above all, stays as it is too.

Values and gradients differ from uncompiled ones in float rounding, so a run is resumed with the setting it began with.
benchmarks/results/compile.md says what it gains.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefkit.attention import PACKED, packed_attention
from prefkit.errors import InputError, ModelError, first_line
from prefkit.models import decoder_layers

OFF = "--set train.compile=false"


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers of a model where they stand; the first batches take up to a minute longer.

    Args:
        model: a causal LM of transformers, on the device that it is trained on, without gradient checkpointing.

    Raises:
        InputError: torch.compile does not work on this machine: no C++ compiler, mostly.
        ModelError: the model keeps no list of its layers.
    """
    layers = decoder_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} has no list of its layers to compile", where="train.compile", hint=OFF
        )
    _try_out(next(model.parameters()).device)
    AttentionInterface.register(PACKED, _left_as_it_is())
    for layer in layers:
        layer.compile(dynamic=True)


@functools.cache
def _left_as_it_is() -> Any:
    """Packed attention, which no compiled code is to be made of; elsewhere it works as ever."""
    return torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]


def _try_out(device: torch.device) -> None:
    """Compile a line: what is missing shows before a model's first batch, and in words."""

    def line(values: Tensor) -> Tensor:
        return values * 2 + 1

    try:
        torch.compile(line)(torch.ones(8, device=device))
    except Exception as error:  # inductor and triton have a dozen kinds
        reason = first_line(error)
        raise InputError(
            f"train.compile: torch.compile does not work here: {reason}",
            expected="a C++ compiler (g++ or clang++) and Python's headers",
            hint=OFF,
        ) from None
