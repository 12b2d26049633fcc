"""The policy in one process: loaded in its reference's regime, made ready to be trained, and whole again at the end."""

from collections.abc import Mapping
from typing import Any

import torch

from prefkit.config import Pipeline, TrainConfig
from prefkit.errors import InputError, located
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps, Layout
from prefkit.losses import Objective
from prefkit.models import check_fits, checkpoint_activations, load_model, load_tokenizer, pick_device
from prefkit.optimizers import make_optimizer
from prefkit.processes import Team
from prefkit.run import Final
from prefkit.sharding import is_shared_out, shared_out, whole, whole_in_each
from prefkit.updates import Trainee


def agreed_policy(pipeline: Pipeline, folder: str, identity: Mapping[str, Any], team: Team) -> CompletionLogps:
    """The policy in this process, in the layout that process 0 found right."""
    found: list[CompletionLogps] = []

    def load() -> Layout:
        found.append(load_policy(pipeline, folder, identity, pick_device()))
        return found[0].layout

    layouts = team.on_each(load)
    found[0].use(layouts[0])
    return found[0]


def load_policy(pipeline: Pipeline, folder: str, identity: Mapping[str, Any], device: torch.device) -> CompletionLogps:
    """The policy in the reference's regime, in the layout that it can be shown right in.

    Raises:
        ModelError: it does not load or fit.
        InputError: the attention that was asked for is not right for it, or has no backward here.
    """
    attention, max_length = pipeline.precompute.attention, identity["max_length"]
    model = load_model(folder, identity["dtype"], device, attention)
    with located(folder):
        check_fits(model, load_tokenizer(folder), max_length, folder)
        layout = choose_layout(model, identity["dtype"], max_length, attention, backward=True)
    if layout.attention == "flex" and device.type == "cpu":
        raise InputError(
            "flex attention has no backward on a CPU",
            where="precompute.attention",
            hint="--set precompute.attention=auto",
        )
    return CompletionLogps(model, identity["dtype"], layout)


def make_trainee(scorer: CompletionLogps, settings: TrainConfig, folder: str, team: Team, *, shards: bool) -> Trainee:
    """The policy ready to be trained: shared out or joined to the other processes', with its optimiser."""
    if settings.gradient_checkpointing:
        with located(folder):
            checkpoint_activations(scorer.model)
    torch.manual_seed(settings.seed)
    policy: torch.nn.Module = scorer
    with team.together():
        if shards:
            policy = shared_out(scorer, team.size)
        elif team.size > 1:
            policy = whole_in_each(scorer)
    objective = Objective(settings.loss, settings.label_smoothing, settings.dpop_lambda, settings.sft_weight)
    return Trainee(scorer, policy, make_optimizer(scorer, settings), objective, settings.max_grad_norm, team)


def final_model(scorer: CompletionLogps, team: Team) -> Final:
    """The trained model as it is saved; every process must ask."""
    state: dict[str, Any] = {}
    if not is_shared_out(scorer):
        return Final(scorer.model, None)
    with team.together():
        for name, value in scorer.model.state_dict().items():
            gathered = whole(value)  # one at a time: a device may not hold them all
            if team.is_main:
                state[name] = gathered.cpu()
    return Final(scorer.model, state)
