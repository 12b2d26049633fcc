"""Preference losses: pure functions of log-ratio tensors. Nothing here knows a model, a batch or a trainer.

A log-ratio is log pi(y|x) - log pi_ref(y|x) of one side, in nats, shape (B,): of the whole completion, or a token where
the loss is token-averaged. Below c and r are those of chosen and rejected, s the logistic function. Values and
gradients are finite for log-ratios up to 1e15 in size; those of a completion lie within some 1e4.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from prefkit.train_settings import DPOP_LAMBDA


class Objective(NamedTuple):
    """What is minimised but for beta, which may change from update to update: fields of settings.TrainConfig."""

    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    dpop_lambda: float = DPOP_LAMBDA
    sft_weight: float = 0.0


class Loss(NamedTuple):
    """A loss and what it wants of its caller.

    `function`: (chosen_logratios, rejected_logratios, beta) to (B,) losses; `token_averaged`: each log-ratio is divided
    by its side's number of tokens first; `takes`: the fields of Objective that it is given by name beside. the
    settings refuse the others.
    """

    function: Callable[..., Tensor]
    token_averaged: bool = False
    takes: tuple[str, ...] = ()


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """The DPO loss: arXiv 2305.18290, equation 7; with label_smoothing the conservative form of Mitchell (2023), eq. 3.

    Of log-ratios a token it is Tulu 3's length-normalised DPO (arXiv 2411.15124), `sigmoid_norm`.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: strength of the KL constraint, > 0; some 50 times as large where log-ratios are a token's (Tulu 3: 5).
        label_smoothing: assumed share of flipped preferences, 0 <= label_smoothing < .5.

    Returns:
        (B,) losses; ln 2 where both ratios are equal.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


def robust_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409, section 3): on flipped labels its mean is that of sigmoid_loss on the true ones.

    With e for label_smoothing and x = beta (c - r) it is ((1 - e) l(x) - e l(-x)) / (1 - 2 e), l(x) = -ln s(x). Because
    l(-x) = l(x) + x that is l(x) - e x / (1 - 2 e), which is what is computed: two large terms never cancel.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: as of sigmoid_loss, > 0.
        label_smoothing: share of flipped preferences, 0 <= label_smoothing < .5.

    Returns:
        (B,) losses; ln 2 where both ratios are equal. There is no lowest one: the pull never falls below
        beta e / (1 - 2 e).
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(logits) - label_smoothing / (1 - 2 * label_smoothing) * logits


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: arXiv 2310.12036, equation 17, with tau = beta.

    Args:
        chosen_logratios: (B,) in nats, of whole completions (`ipo_sum`) or per token (`ipo`).
        rejected_logratios: (B,) likewise.
        beta: the margin of the log-ratios is pulled to 1 / (2 beta), > 0.

    Returns:
        (B,) losses; 1 / (4 beta^2) where both ratios are equal.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """The hinge of SLiC-HF (arXiv 2305.10425) on likelihoods normalised by the reference (RSO, arXiv 2309.06657).

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: 1 / beta is the margin of the log-ratios above which a pair has no gradient, > 0.

    Returns:
        (B,) losses, >= 0; 1 where both ratios are equal.
    """
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, zero (arXiv 2408.06266, equation 7), plus 1: chosen rises and rejected falls.

    For chosen sides that are better than what the model writes by itself. 1 - s(x) is computed as s(-x), which keeps
    its digits where x is large.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: scale of the rewards, > 0.

    Returns:
        (B,) losses 1 - s(beta c) + s(beta r), in 0..2; 1 where both ratios are 0.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, down (arXiv 2408.06266, equation 8), plus 1: both fall, rejected faster.

    For chosen sides that are worse than what the model writes by itself.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: scale of the rewards, > 0.

    Returns:
        (B,) losses s(beta c) + 1 - s(beta (c - r)), in 0..2; 1 where both ratios are 0.
    """
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(beta * (rejected_logratios - chosen_logratios))


def dpop_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-positive: arXiv 2402.13228, equation 3. A chosen side that becomes less likely than it was is paid for.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: as of sigmoid_loss, > 0.
        dpop_lambda: weight of the penalty, > 0 (the paper's experiments: 50).

    Returns:
        (B,) losses; sigmoid_loss where chosen has not become less likely. There the slope has a step: at the first
        update, where c is 0 but for float rounding, a pair pulls chosen by beta / 2 or by 1 + dpop_lambda times that.
    """
    fallen = F.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * fallen))


SMOOTHED = ("label_smoothing",)
LOSSES: Mapping[str, Loss] = {
    "sigmoid": Loss(sigmoid_loss, takes=SMOOTHED),
    "sigmoid_norm": Loss(sigmoid_loss, token_averaged=True, takes=SMOOTHED),
    "hinge": Loss(hinge_loss),
    "ipo": Loss(ipo_loss, token_averaged=True),
    "ipo_sum": Loss(ipo_loss),
    "robust": Loss(robust_loss, takes=SMOOTHED),
    "apo_zero": Loss(apo_zero_loss),
    "apo_down": Loss(apo_down_loss),
    "dpop": Loss(dpop_loss, takes=("dpop_lambda",)),
}


def pair_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    num_chosen: Tensor,
    num_rejected: Tensor,
    beta: float,
    objective: Objective,
) -> Tensor:
    """The loss of each pair, the SFT term included: arXiv 2404.19733, equation 1, where sft_weight is its alpha.

    That term is -log pi(chosen) / num_chosen of every pair by itself, so a long completion weighs no more than a short
    one. (The paper's completions are a chain of thought and its answer, and it divides by the tokens of both.)

    Args:
        chosen_logps: (B,) sums over whole completions under the policy, in nats, with a graph.
        rejected_logps: (B,) likewise.
        ref_chosen_logps: (B,) likewise under the reference.
        ref_rejected_logps: (B,) likewise.
        num_chosen: (B,) tokens of chosen.
        num_rejected: (B,) tokens of rejected.
        beta: of this update, > 0.
        objective: the loss by name, and its numbers.

    Returns:
        (B,) float32.
    """
    loss = LOSSES[objective.loss]
    chosen_logps, rejected_logps = chosen_logps.float(), rejected_logps.float()
    chosen_logratios = chosen_logps - ref_chosen_logps.float()
    rejected_logratios = rejected_logps - ref_rejected_logps.float()
    if loss.token_averaged:
        chosen_logratios, rejected_logratios = chosen_logratios / num_chosen, rejected_logratios / num_rejected
    more = {name: getattr(objective, name) for name in loss.takes}
    losses: Tensor = loss.function(chosen_logratios, rejected_logratios, beta, **more)
    if objective.sft_weight:
        losses = losses - objective.sft_weight * (chosen_logps / num_chosen)
    return losses


def weighted_mean(values: Tensor, weights: Tensor, total: float) -> Tensor:
    """sum(w * v) / total. With the total weight of an optimiser step, micro-batches add up to the mean of all."""
    return (values * weights).sum() / total
