"""The best evaluation, and how long there has been no better one."""

from typing import Any

import pytest

from prefkit.best import best_of


def rows(metric: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"step": 10 * number, metric: value, "loss": 1.0} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "step", "since"),
    [
        ("eval_loss", [None, 0.6, 0.5, 0.55, None, 0.7], 20, 2),
        ("eval_rewards/accuracies", [0.5, 0.7, 0.6], 10, 1),
        ("eval_rewards/margins", [-1.0, -0.5], 10, 0),
        ("eval_loss", [0.5, 0.5, 0.5], 0, 2),  # of equal ones the first
    ],
)
def test_the_best_by_hand(metric: str, values: list[Any], step: int, since: int) -> None:
    best = best_of(metric, rows(metric, values), range(100))
    assert (best.step, best.since) == (step, since)
    assert best.told() == {"metric": metric, "value": values[step // 10], "step": step}
    assert best.evaluated == {metric: values[step // 10]}  # and nothing of the update


def test_before_the_first_evaluation_there_is_none() -> None:
    assert best_of("eval_loss", [{"step": 0, "loss": 1.0}], range(9)).step is None


def test_an_evaluation_whose_weights_are_gone_is_not_the_best() -> None:
    """Better, but made before anybody asked for the best one; the later ones still wait for a better."""
    best = best_of("eval_loss", rows("eval_loss", [0.1, 0.6, 0.5, 0.2, 0.3]), {20})
    assert (best.step, best.since) == (20, 2)
    assert best_of("eval_loss", rows("eval_loss", [0.1, 0.6]), ()).step is None
