"""Preference losses: pure functions of log-ratio tensors. Nothing here knows a model, a batch or a trainer.

A log-ratio is log pi(y|x) - log pi_ref(y|x) of one side, in nats, shape (B,).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


class Loss(NamedTuple):
    """A loss and what it wants of its caller.

    `function`: (chosen_logratios, rejected_logratios, beta, label_smoothing) to (B,) losses; `token_averaged`: the
    caller divides each log-ratio by its side's number of tokens. Only sigmoid smooths labels: settings.py refuses
    label_smoothing beside the others.
    """

    function: Callable[[Tensor, Tensor, float, float], Tensor]
    token_averaged: bool = False


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """The DPO loss: arXiv 2305.18290, equation 7; with label_smoothing the conservative form of Mitchell (2023), eq. 3.

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: strength of the KL constraint, > 0.
        label_smoothing: assumed share of flipped preferences, 0 <= label_smoothing < .5.

    Returns:
        (B,) losses; ln 2 where both ratios are equal.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


def ipo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, _label_smoothing: float = 0.0
) -> Tensor:
    """Identity preference optimisation: arXiv 2310.12036, equation 17, with tau = beta.

    Args:
        chosen_logratios: (B,) in nats, of whole completions (`ipo_sum`) or per token (`ipo`).
        rejected_logratios: (B,) likewise.
        beta: the margin of the log-ratios is pulled to 1 / (2 beta), > 0.

    Returns:
        (B,) losses; 1 / (4 beta^2) where both ratios are equal.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, _label_smoothing: float = 0.0
) -> Tensor:
    """The hinge of SLiC-HF (arXiv 2305.10425) on likelihoods normalised by the reference (RSO, arXiv 2309.06657).

    Args:
        chosen_logratios: (B,) in nats.
        rejected_logratios: (B,) in nats.
        beta: 1 / beta is the margin of the log-ratios above which a pair has no gradient, > 0.

    Returns:
        (B,) losses, >= 0; 1 where both ratios are equal.
    """
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


LOSSES: Mapping[str, Loss] = {
    "sigmoid": Loss(sigmoid_loss),
    "hinge": Loss(hinge_loss),
    "ipo": Loss(ipo_loss, token_averaged=True),
    "ipo_sum": Loss(ipo_loss),
}


def weighted_mean(values: Tensor, weights: Tensor, total: float) -> Tensor:
    """sum(w * v) / total. With the total weight of an optimiser step, micro-batches add up to the mean of all."""
    return (values * weights).sum() / total
