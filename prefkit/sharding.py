"""A policy in several processes: whole in each of them (DDP), or each with a share of every weight (FSDP).

Either way the module that is called is the scorer itself, so that its forward and backward are all that the processes
have to agree about; checkpoints and the final model are always of whole weights, whoever holds them.
"""

import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from prefkit.encode import Sides
from prefkit.errors import InputError
from prefkit.logps import CompletionLogps
from prefkit.models import decoder_layers


def wants_shards() -> bool:
    """Whether `accelerate config` asks for FSDP: that is train.shard_weights.

    Raises:
        InputError: it asks for DeepSpeed, which is not what trains here.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError(
            "training does not run under DeepSpeed",
            where="accelerate config",
            hint="accelerate launch --multi_gpu; train.shard_weights=true shares weights, gradients and optimiser",
        )
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def whole_in_each(scorer: CompletionLogps) -> DistributedDataParallel:
    """The scorer in every process; gradients are averaged at the end of a backward.

    What lies on process 0 is taken over by all. The batch is not moved: it lies where the weights do, and a part of it
    is meant to stay on the CPU.
    """
    return DistributedDataParallel(
        scorer,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=bool(unused_parameters(scorer)) or has_experts(scorer),
    )


def unused_parameters(scorer: CompletionLogps) -> list[str]:
    """Trainable weights that a pair's log-probs do not depend on: experts nobody chose, parts for other inputs."""
    named = [(name, p) for name, p in scorer.named_parameters() if p.requires_grad]
    scored = scorer(scorer.batch([Sides([0, 1], [0], [1])]))
    total = scored.chosen_logps.sum() + scored.rejected_logps.sum()
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def has_experts(module: nn.Module) -> bool:
    """Whether experts are modules of their own, some of which a batch may leave out."""
    return any(re.search(r"experts\.\d+\.", name) for name, _ in module.named_parameters())


def shared_out(scorer: CompletionLogps, processes: int) -> CompletionLogps:
    """Leave each process its share of every weight, in place (torch's fully_shard, that is FSDP2).

    A layer's weights are whole while it is computed. What lies outside the layers (embeddings, last norm, output
    matrix) belongs to the scorer, whose forward and backward hold it whole throughout, because our head reads the
    matrix itself. Between passes all are shares, whatever the last pass was.
    """
    mesh = init_device_mesh(scorer.device.type, (processes,))
    for layer in decoder_layers(scorer.model) or []:
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh, reshard_after_forward=True)
    return scorer


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all shares of it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter lies: this process's share, or all of it."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    mesh: Any = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
