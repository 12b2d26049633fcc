"""Preference losses: pure functions of log-ratio tensors. Nothing here knows a model, a batch or a trainer.

A log-ratio is log pi(y|x) - log pi_ref(y|x) of one side, in nats, shape (B,).
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor, float, float], Tensor]


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


LOSSES: Mapping[str, Loss] = {"sigmoid": sigmoid_loss}


def weighted_mean(values: Tensor, weights: Tensor, total: float) -> Tensor:
    """sum(w * v) / total. With the total weight of an optimiser step, micro-batches add up to the mean of all."""
    return (values * weights).sum() / total
