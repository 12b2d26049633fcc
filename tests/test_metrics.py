"""The means that steps.parquet holds, by hand, and KL against a distribution that is known whole."""

import math

import pytest
import torch

from prefkit.format import SIDE_METRICS
from prefkit.metrics import MAX_DRIFT, Metrics, joined, picked, summarise, token_kl


def metrics(**changes: list[float]) -> Metrics:
    values = {
        "losses": [0.5, 1.0, 0.25],
        "chosen_logratios": [2.0, -1.0, -3.0],
        "rejected_logratios": [-1.0, -4.0, -2.0],
        "chosen_logps": [-10.0, -20.0, -30.0],
        "rejected_logps": [-12.0, -24.0, -36.0],
        "chosen_kl": [0.3, 0.6, 0.9],
        "rejected_kl": [0.5, 0.5, 1.0],
        "num_chosen": [5.0, 4.0, 10.0],
        "num_rejected": [4.0, 4.0, 2.0],
        "weights": [1.0, 2.0, 1.0],
    }
    return Metrics(**{name: torch.tensor(value, dtype=torch.float64) for name, value in (values | changes).items()})


def test_every_mean_by_hand() -> None:
    assert summarise(metrics(), 0.5, "eval_") == pytest.approx(
        {
            "eval_loss": (0.5 + 2 * 1.0 + 0.25) / 4,
            "eval_rewards/chosen": 0.5 * -2 / 3,
            "eval_rewards/rejected": 0.5 * -7 / 3,
            "eval_rewards/accuracies": 2 / 3,  # margins 3, 3, -1
            "eval_rewards/margins": 0.5 * 5 / 3,
            "eval_logps/chosen": -20,
            "eval_logps/rejected": -24,
            "eval_nll/chosen": (2 + 5 + 3) / 3,
            "eval_drift/chosen": -2 / 3,
            "eval_drift/rejected": -7 / 3,
            "eval_drift/displaced": 1 / 3,  # the second alone: right, and less likely than it was
            "eval_kl/chosen": 1.8 / 19,  # by token, not by pair
            "eval_kl/rejected": 2 / 10,
        }
    )


def test_the_means_are_those_of_the_format() -> None:
    assert list(summarise(metrics(), 0.1)) == list(SIDE_METRICS)


def test_kl_of_tokens_by_hand() -> None:
    ln2 = math.log(2)
    found = token_kl(
        torch.tensor([-1.0, ln2 - 3, -ln2 - 3, -1.0]), torch.tensor([-1.0, -3.0, -3.0, -1.0 - 2 * MAX_DRIFT])
    )
    # 0; twice as likely: 2 - 1 - ln 2; half as likely: 1/2 - 1 + ln 2; as if no more than e^20 times as likely
    expected = [0, 1 - ln2, ln2 - 0.5, math.exp(MAX_DRIFT) - 1 - MAX_DRIFT]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_its_mean_over_the_references_own_tokens_is_the_kl_divergence() -> None:
    """sum p (q / p - 1 - ln(q / p)) = sum q - sum p + KL(p || q) = KL(p || q), over the whole vocabulary."""
    draw = torch.Generator().manual_seed(0)
    reference, policy = (torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    mean = (reference.exp() * token_kl(policy, reference)).sum()
    assert float(mean) == pytest.approx(float((reference.exp() * (reference - policy)).sum()), rel=1e-12)


def test_no_graph_is_kept_for_it() -> None:
    assert not token_kl(torch.zeros(2, requires_grad=True), torch.zeros(2)).requires_grad


def test_batches_are_joined_and_put_in_order() -> None:
    one, other = metrics(), metrics(losses=[7.0, 8.0, 9.0])
    both = joined([one, other])
    assert both.losses.tolist() == [0.5, 1.0, 0.25, 7.0, 8.0, 9.0]
    assert picked(both, [5, 0]).losses.tolist() == [9.0, 0.5]
    assert picked(both, [5, 0]).num_chosen.tolist() == [10.0, 5.0]
