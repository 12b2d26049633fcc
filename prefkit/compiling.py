"""torch.compile for the decoder layers of a model: train.compile.

Each layer is compiled in place, so its weights keep their names, and all layers of one shape share what is compiled,
for rows of any length. Packed attention (attention.py) is left as it is: its calls follow the branches of each batch,
which no compiled code could be for. What is outside the layers, the vocabulary matrix above all, stays as it is too.

Values and gradients differ from uncompiled ones in float rounding, so a run is resumed with the setting it began with.
benchmarks/results/compile.md says what it gains.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefkit.attention import PACKED, packed_attention
from prefkit.errors import InputError, ModelError

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
    _try_out(next(model.parameters()).device)
    left: Any = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, left)
    for layer in layers:
        layer.compile(dynamic=True)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's layers, by their number in its config.

    Raises:
        ModelError: there is none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of {count} layers to compile", where="train.compile", hint=OFF
    )


def _try_out(device: torch.device) -> None:
    """Compile a line: what is missing shows before a model's first batch, and in words."""

    def line(values: Tensor) -> Tensor:
        return values * 2 + 1

    try:
        torch.compile(line)(torch.ones(8, device=device))
    except Exception as error:  # inductor and triton have a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"train.compile: torch.compile does not work here: {reason}",
            expected="a C++ compiler (g++ or clang++) and Python's headers",
            hint=OFF,
        ) from None
