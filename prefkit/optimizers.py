"""The optimiser of a run: a class of torch.optim by its name, with the arguments that class takes.

What cannot train here is refused before a model is loaded: unknown names, classes that ask for a closure or for sparse
gradients, arguments that the class does not take or refuses. Nothing here knows a schedule: the rate of each update is
put into the groups by its caller.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prefkit.config import TrainConfig
from prefkit.errors import InputError, first_line

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    name.lower(): found
    for name, found in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
}
SPARSE = ("sparseadam",)  # its gradients must be sparse; no layer of a causal LM gives such
WHOLE_ONLY = ("adafactor", "rprop")  # operations that torch has not for shares (DTensor)
MATRICES = "it takes matrices only: train.lora, or another optimizer"
# what a name of ours sets already
OURS = {"params": "the model", "lr": "train.learning_rate", "weight_decay": "train.weight_decay"}


def make_optimizer(policy: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of all trained weights of a policy, in two groups: matrices, then vectors.

    Weight decay is on matrices only, as is usual: norms and biases are vectors. Both groups are there even where one is
    empty (an adapter has no vectors), so a state fits whatever is trained. rmsprop is the DPO paper's (torch's own
    smoothing of .99); muon takes matrices only, so it trains adapters but no whole model.

    Args:
        policy: the module as it is trained; what requires no gradient is left out.
        settings: optimizer, optimizer_args, learning_rate, weight_decay.

    Raises:
        InputError: torch.optim has no such class, or it cannot train this policy with these arguments.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
    return _made(groups, settings)


def check_optimizer(settings: TrainConfig, *, shards: bool = False) -> None:
    """Refuse what make_optimizer would refuse of any model, before there is one.

    Args:
        settings: as of make_optimizer.
        shards: each process is to have a share of each weight.

    Raises:
        InputError: as of make_optimizer.
    """
    _made([[nn.Parameter(torch.zeros(2, 2))], []], settings)
    if shards and settings.optimizer.lower() in WHOLE_ONLY:
        raise InputError(
            f"train.optimizer: torch's {settings.optimizer} cannot work on shares of a weight",
            hint="--set train.shard_weights=false, or another optimizer",
        )


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a state_dict back as it was saved, to the bit.

    torch's own load_state_dict turns every number of a state but `step` into the dtype of its weight: in bfloat16 a run
    of nadam (its product of momenta) or asgd (its rate) would not go on as it stopped.

    Args:
        optimizer: over the same weights in the same order.
        state: of its state_dict, by the number of each weight.

    Raises:
        ValueError: torch's, where it is of other groups.
    """
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        own = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device, copy=True)


def _made(groups: list[list[nn.Parameter]], settings: TrainConfig) -> torch.optim.Optimizer:
    make = _find(settings.optimizer)
    takes = [name for name in inspect.signature(make).parameters if name not in OURS]
    given = {name: _as_number(value) for name, value in settings.optimizer_args.items()}
    for name in given:
        if name in OURS:
            raise InputError(f"train.optimizer_args: {name} is set by {OURS[name]}")
        if name not in takes:
            raise InputError(
                f"train.optimizer_args: {make.__name__} takes no {name}", expected=f"some of {', '.join(takes)}"
            )
    decays = "weight_decay" in inspect.signature(make).parameters
    if settings.weight_decay and not decays:
        raise InputError(
            f"train.weight_decay: {make.__name__} has none", hint="--set train.weight_decay=0, or another optimizer"
        )
    shares = (settings.weight_decay, 0.0)
    told: list[dict[str, Any]] = [
        {"params": params} | ({"weight_decay": share} if decays else {})
        for params, share in zip(groups, shares, strict=True)
    ]
    build: Any = make
    try:
        optimizer: torch.optim.Optimizer = build(told, lr=settings.learning_rate, **given)
    except Exception as error:  # the classes of torch.optim take their arguments apart in many ways
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"train.optimizer: {make.__name__}({said}) cannot train this: {first_line(error)}",
            hint=MATRICES if make.__name__ == "Muon" else "",
        ) from None
    return optimizer


def _find(name: str) -> type[torch.optim.Optimizer]:
    """The class of that name, in whatever case."""
    usable = [known for known, found in OPTIMIZERS.items() if known not in SPARSE and not _asks_for_closure(found)]
    wanted = name.lower()
    if wanted not in OPTIMIZERS:
        near = difflib.get_close_matches(wanted, usable, n=5, cutoff=0.7)
        raise InputError(f"train.optimizer: torch.optim has no {name}", expected=f"one of {', '.join(near or usable)}")
    if wanted not in usable:
        reason = "sparse gradients, and these are dense" if wanted in SPARSE else "a closure that it calls many times"
        raise InputError(f"train.optimizer: {name} asks for {reason}", expected=f"one of {', '.join(usable)}")
    return OPTIMIZERS[wanted]


def _asks_for_closure(found: type[torch.optim.Optimizer]) -> bool:
    """Whether its step computes the loss itself, again and again, instead of taking the gradients that are there."""
    return inspect.signature(found.step).parameters["closure"].default is inspect.Parameter.empty


def _as_number(value: Any) -> Any:
    """A value of a pipeline file as torch takes it: YAML reads 1e-8 as a text and has no tuples."""
    if isinstance(value, list):
        return tuple(_as_number(inner) for inner in value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
