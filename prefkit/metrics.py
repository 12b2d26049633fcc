"""What an update or an evaluation measures, a value a pair, and the means that steps.parquet holds of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefkit.losses import weighted_mean

MAX_DRIFT = 20.0  # nats a token: exp of more would leave nothing else to be seen in a mean


class Metrics(NamedTuple):
    """One value a pair, (B,) each, on the CPU in float64; log-probs and log-ratios of whole completions, in nats."""

    losses: Tensor
    chosen_logratios: Tensor
    rejected_logratios: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_kl: Tensor  # summed over the tokens
    rejected_kl: Tensor
    num_chosen: Tensor
    num_rejected: Tensor
    weights: Tensor


def token_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - 1 - d of every token's log-ratio d, >= 0, d up to MAX_DRIFT.

    Its mean over texts that the reference has written is KL(reference || policy), without bias and, other than the mean
    of -d, of low variance and never below 0 (J. Schulman, Approximating KL divergence, 2020, his k3). On other texts it
    is a distance in the same unit.

    Args:
        logps: (T,) of the policy.
        reference: (T,) of the reference.
    """
    drift = (logps.detach() - reference).clamp(max=MAX_DRIFT)
    return torch.expm1(drift) - drift


def joined(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of several batches as those of one."""
    return Metrics._make(torch.cat(values) for values in zip(*parts, strict=True))


def picked(metrics: Metrics, places: Sequence[int]) -> Metrics:
    """The pairs at some places, in that order."""
    index = torch.tensor(places, dtype=torch.int64)
    return Metrics._make(value[index] for value in metrics)


def summarise(metrics: Metrics, beta: float, prefix: str = "") -> dict[str, float]:
    """The metrics of format.SIDE_METRICS: means over the pairs; the loss weighted as it is trained on, KL by token."""
    chosen, rejected = metrics.chosen_logratios, metrics.rejected_logratios
    right = chosen > rejected
    values = {
        "loss": weighted_mean(metrics.losses, metrics.weights, float(metrics.weights.sum())),
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/accuracies": right.double().mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "logps/chosen": metrics.chosen_logps.mean(),
        "logps/rejected": metrics.rejected_logps.mean(),
        "nll/chosen": -(metrics.chosen_logps / metrics.num_chosen).mean(),
        "drift/chosen": chosen.mean(),
        "drift/rejected": rejected.mean(),
        "drift/displaced": (right & (chosen < 0)).double().mean(),
        "kl/chosen": metrics.chosen_kl.sum() / metrics.num_chosen.sum(),
        "kl/rejected": metrics.rejected_kl.sum() / metrics.num_rejected.sum(),
    }
    return {prefix + name: float(value) for name, value in values.items()}
