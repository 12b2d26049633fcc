"""The policy in one process: loaded in its reference's regime, made ready to be trained, and whole again at the end."""

from collections.abc import Mapping
from typing import Any

import torch

from prefkit.adapters import base_folder, saved_as
from prefkit.checkpoint import put_weights, whole_weights
from prefkit.compiling import compile_layers
from prefkit.config import Pipeline, TrainConfig
from prefkit.errors import InputError, located
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps, Layout
from prefkit.lora import add_adapter
from prefkit.losses import Objective
from prefkit.models import check_fits, checkpoint_activations, load_model, load_tokenizer, pick_device
from prefkit.optimizers import make_optimizer
from prefkit.processes import Team
from prefkit.run import Final
from prefkit.sharding import shared_out, whole_in_each
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
    model = loaded(pipeline, folder, identity["dtype"], device)
    with located(folder):
        check_fits(model, load_tokenizer(folder), max_length, folder)
        layout = choose_layout(model, identity["dtype"], max_length, attention, backward=True)
        if pipeline.train.compile:
            compile_layers(model)  # before the gate, which lets them score
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
    torch.manual_seed(settings.seed)  # checkpoints keep the random state, and are the same for the same run
    policy: torch.nn.Module = scorer
    with team.together():
        if shards:
            policy = shared_out(scorer, team.size)
        elif team.size > 1:
            policy = whole_in_each(scorer)
    objective = Objective(settings.loss, settings.label_smoothing, settings.dpop_lambda, settings.sft_weight)
    optimizer = make_optimizer(scorer, settings)
    return Trainee(scorer, policy, optimizer, objective, settings.max_grad_norm, team, shards)


def final_model(trainee: Trainee, pipeline: Pipeline, folder: str, dtype: str) -> Final:
    """The trained model as it is saved; every process must ask.

    Where it lies in shares, process 0 loads the policy once more, on the CPU, and puts what was trained into it.
    """
    saved, base = saved_as(pipeline.train, folder), str(base_folder(folder).resolve())
    model, team = trainee.scorer.model, trainee.team
    if not trainee.shared:
        return Final(model, saved, base)
    with team.together():
        weights = whole_weights(model, team)

    models: list[Any] = [None]

    def load_again() -> None:
        models[0] = loaded(pipeline, folder, dtype, torch.device("cpu"))
        put_weights(weights, models[0])

    team.on_main(load_again)
    return Final(models[0], saved, base)


def loaded(pipeline: Pipeline, folder: str, dtype: str, device: torch.device) -> Any:
    """The policy's model as it is trained, with a new adapter where one is asked for."""
    model = load_model(folder, dtype, device, pipeline.precompute.attention)
    if pipeline.train.lora is not None:
        add_adapter(model, pipeline.train.lora, pipeline.train.seed)
    return model
