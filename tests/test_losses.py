"""Losses and gradients against values derived by hand: arXiv 2305.18290 (eq. 7), 2310.12036 (eq. 17), 2305.10425."""

import math

import pytest
import torch

from prefkit.losses import LOSSES, hinge_loss, ipo_loss, sigmoid_loss, weighted_mean


def ratios(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients(chosen: torch.Tensor, rejected: torch.Tensor, loss: torch.Tensor) -> tuple[list[float], list[float]]:
    a, b = torch.autograd.grad(loss.sum(), (chosen, rejected))
    return a.tolist(), b.tolist()


@pytest.mark.parametrize("both", [0.0, -3.5, 120.0])
def test_equal_ratios_cost_ln_2_and_pull_by_half_of_beta(both: float) -> None:
    chosen, rejected = ratios(both), ratios(both)
    loss = sigmoid_loss(chosen, rejected, 0.1)
    assert loss.tolist() == pytest.approx([math.log(2)])
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([-0.05])
    assert push == pytest.approx([0.05])


def test_the_loss_is_minus_log_sigmoid_of_beta_times_the_margin() -> None:
    # beta (2 - -1) = .3 and beta (-4 - 6) = -1: ln(1 + e^-.3) and ln(1 + e)
    chosen, rejected = ratios(2.0, -4.0), ratios(-1.0, 6.0)
    loss = sigmoid_loss(chosen, rejected, 0.1)
    assert loss.tolist() == pytest.approx([0.5543552444685271, 1.3132616875182228])
    # d/dchosen = -beta sigma(-x): sigma(-.3) = .42555748318834, sigma(1) = .7310585786300049
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([-0.042555748318834, -0.07310585786300049])
    assert push == pytest.approx([0.042555748318834, 0.07310585786300049])


def test_label_smoothing_mixes_in_the_loss_of_the_flipped_pair() -> None:
    # x = .5 (3 - 1) = 1: .9 ln(1 + 1/e) + .1 ln(1 + e) = .9 * .3132616875 + .1 * 1.3132616875
    chosen, rejected = ratios(3.0), ratios(1.0)
    loss = sigmoid_loss(chosen, rejected, 0.5, 0.1)
    assert loss.tolist() == pytest.approx([0.4132616875182228])
    # d/dchosen = beta (-.9 sigma(-1) + .1 sigma(1)) = .5 (-.9 * .2689414214 + .1 * .7310585786)
    assert gradients(chosen, rejected, loss)[0] == pytest.approx([-0.0844707106849976])


def test_label_smoothing_leaves_ln_2_and_weakens_the_pull_at_equal_ratios() -> None:
    chosen, rejected = ratios(0.0), ratios(0.0)
    loss = sigmoid_loss(chosen, rejected, 0.1, 0.2)
    assert loss.tolist() == pytest.approx([math.log(2)])
    assert gradients(chosen, rejected, loss)[0] == pytest.approx([-0.05 * (1 - 2 * 0.2)])


def test_extreme_ratios_stay_finite() -> None:
    chosen, rejected = ratios(1e4, -1e4), ratios(-1e4, 1e4)
    loss = sigmoid_loss(chosen, rejected, 0.1)
    assert loss.tolist() == pytest.approx([0.0, 2000.0])
    assert gradients(chosen, rejected, loss)[0] == pytest.approx([0.0, -0.1])


def test_ipo_is_the_squared_distance_from_half_the_inverse_of_beta() -> None:
    # beta .25: target 2. (3 - 1 - 2)^2 = 0; (-1 - 4 - 2)^2 = 49; equal ratios cost 2^2
    chosen, rejected = ratios(3.0, -1.0, 0.5), ratios(1.0, 4.0, 0.5)
    loss = ipo_loss(chosen, rejected, 0.25)
    assert loss.tolist() == pytest.approx([0.0, 49.0, 4.0])
    # d/dchosen = 2 (margin - 2)
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([0.0, -14.0, -4.0])
    assert push == pytest.approx([0.0, 14.0, 4.0])


def test_hinge_is_flat_above_the_inverse_of_beta_and_pulls_by_beta_below_it() -> None:
    # beta .5: margins 4, 1.5, -2, 0 give max(0, 1 - 2), 1 - .75, 1 + 1, 1
    chosen, rejected = ratios(5.0, 1.0, -1.0, 0.0), ratios(1.0, -0.5, 1.0, 0.0)
    loss = hinge_loss(chosen, rejected, 0.5)
    assert loss.tolist() == pytest.approx([0.0, 0.25, 2.0, 1.0])
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([0.0, -0.5, -0.5, -0.5])
    assert push == pytest.approx([0.0, 0.5, 0.5, 0.5])


def test_only_the_token_averaged_ipo_asks_for_averages() -> None:
    assert {name for name, loss in LOSSES.items() if loss.token_averaged} == {"ipo"}
    assert LOSSES["ipo"].function is LOSSES["ipo_sum"].function


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_one_a_pair_in_float32(name: str) -> None:
    loss = LOSSES[name].function(torch.zeros(3), torch.zeros(3), 0.1, 0.0)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32


def test_a_weighted_mean_by_hand() -> None:
    # (1 * 2 + 3 * 4) / (2 + 4)
    values, weights = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
    assert weighted_mean(values, weights, 6.0).item() == pytest.approx(14 / 6)


def test_micro_batches_of_unequal_weight_add_up_to_the_mean_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    values, weights = torch.rand(8, generator=draw), torch.rand(8, generator=draw) + 0.1
    whole = float((values * weights).sum() / weights.sum())
    for size in (1, 3, 8):
        parts = zip(torch.split(values, size), torch.split(weights, size), strict=True)
        assert sum(float(weighted_mean(v, w, float(weights.sum()))) for v, w in parts) == pytest.approx(whole)
