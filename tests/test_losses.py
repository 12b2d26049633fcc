"""Losses and gradients against values derived by hand; what they equal in TRL is in test_losses_trl.py."""

import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from prefkit.config import TrainConfig
from prefkit.losses import (
    LOSSES,
    Objective,
    apo_down_loss,
    apo_zero_loss,
    dpop_loss,
    hinge_loss,
    ipo_loss,
    pair_losses,
    robust_loss,
    sigmoid_loss,
    weighted_mean,
)


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


# s(1) = 1 / (1 + 1/e) = .7310585786300049, s(-1) = .2689414213699951, s s' = s(1) s(-1) = .19661193324148185
# l(1) = ln(1 + 1/e) = .3132616875182228, l(-1) = ln(1 + e) = 1.3132616875182228


def test_robust_takes_the_flipped_loss_away_and_scales_what_is_left() -> None:
    # beta .5, c 3, r 1: x = 1. e .1: (.9 * .3132616875 - .1 * 1.3132616875) / .8 = .1506093500 / .8
    chosen, rejected = ratios(3.0, 1.0), ratios(1.0, 3.0)
    loss = robust_loss(chosen, rejected, 0.5, 0.1)
    # and of the flipped pair, x = -1: (.9 * 1.3132616875 - .1 * .3132616875) / .8 = 1.1506093500 / .8
    assert loss.tolist() == pytest.approx([0.1882616875182228, 1.4382616875182228])
    # d/dx of l is -s(-x): beta (-s(-1) - e / (1 - 2e)) = .5 (-.2689414214 - .125), .5 (-.7310585786 - .125)
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([-0.19697071068499755, -0.42802928931500245])
    assert push == pytest.approx([0.19697071068499755, 0.42802928931500245])


def test_robust_on_flipped_labels_is_on_average_sigmoid_on_the_true_ones() -> None:
    """The property it is made for (arXiv 2403.00409): (1 - e) of the pair and e of its reverse make the clean loss."""
    chosen, rejected = ratios(2.0, -4.0, 0.0, 50.0), ratios(-1.0, 6.0, 0.0, -50.0)
    for flipped in (0.05, 0.3, 0.45):
        there = robust_loss(chosen, rejected, 0.3, flipped)
        reverse = robust_loss(rejected, chosen, 0.3, flipped)
        expected = sigmoid_loss(chosen, rejected, 0.3).tolist()
        assert ((1 - flipped) * there + flipped * reverse).tolist() == pytest.approx(expected, abs=1e-12)


def test_robust_without_flips_is_sigmoid() -> None:
    chosen, rejected = ratios(2.0, -4.0), ratios(-1.0, 6.0)
    assert robust_loss(chosen, rejected, 0.1, 0.0).tolist() == sigmoid_loss(chosen, rejected, 0.1).tolist()


def test_apo_zero_holds_chosen_and_rejected_apart_from_zero_each_by_itself() -> None:
    # beta .5: c 2 gives 1 - s(1), r -2 gives s(-1): .2689414214 twice; c -2, r 2: s(1) twice; all at zero: 1/2 + 1/2
    chosen, rejected = ratios(2.0, -2.0, 0.0), ratios(-2.0, 2.0, 0.0)
    loss = apo_zero_loss(chosen, rejected, 0.5)
    assert loss.tolist() == pytest.approx([0.5378828427399902, 1.4621171572600098, 1.0])
    # d/dc = -beta s(1) s(-1), d/dr = +beta s(1) s(-1); at zero beta / 4
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([-0.09830596662074093, -0.09830596662074093, -0.125])
    assert push == pytest.approx([0.09830596662074093, 0.09830596662074093, 0.125])


def test_apo_down_lets_both_fall_and_rejected_faster() -> None:
    # beta .5, c 2, r 0: s(1) + 1 - s(1) = 1. c 0, r -2: 1/2 + 1 - s(1). All at zero: 1/2 + 1/2
    chosen, rejected = ratios(2.0, 0.0, 0.0), ratios(0.0, -2.0, 0.0)
    loss = apo_down_loss(chosen, rejected, 0.5)
    assert loss.tolist() == pytest.approx([1.0, 0.7689414213699951, 1.0])
    # d/dc = beta (s' (beta c) - s' (beta (c - r))): .5 (s'(1) - s'(1)) = 0; .5 (1/4 - s'(1)); 0
    # d/dr = beta s' (beta (c - r)): .5 s'(1), .5 s'(1), .5 / 4
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([0.0, 0.5 * (0.25 - 0.19661193324148185), 0.0])
    assert push == pytest.approx([0.09830596662074093, 0.09830596662074093, 0.125])


def test_dpop_is_sigmoid_until_chosen_falls_below_the_reference() -> None:
    chosen, rejected = ratios(2.0, 0.5, 0.0), ratios(-1.0, 6.0, 0.0)
    loss, plain = dpop_loss(chosen, rejected, 0.1, 50.0), sigmoid_loss(chosen, rejected, 0.1)
    assert loss.tolist() == plain.tolist()
    assert gradients(chosen, rejected, loss) == gradients(chosen, rejected, plain)


def test_dpop_pays_for_a_chosen_that_fell() -> None:
    # beta .5, lambda 3, c -.5, r -4: .5 (-.5 + 4 - 3 * .5) = 1; c -1, r -1: .5 (0 - 3) = -1.5
    chosen, rejected = ratios(-0.5, -1.0), ratios(-4.0, -1.0)
    loss = dpop_loss(chosen, rejected, 0.5, 3.0)
    # ln(1 + e^1.5) = 1.5 + ln(1 + e^-1.5) = 1.5 + .2014132779827524
    assert loss.tolist() == pytest.approx([0.3132616875182228, 1.7014132779827524])
    # d/dc = -s(-x) beta (1 + lambda), d/dr = s(-x) beta: s(-1) = .2689414214, s(1.5) = .8175744762
    pull, push = gradients(chosen, rejected, loss)
    assert pull == pytest.approx([-0.2689414213699951 * 0.5 * 4, -0.8175744761936437 * 0.5 * 4])
    assert push == pytest.approx([0.2689414213699951 * 0.5, 0.8175744761936437 * 0.5])


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


REFERENCES = torch.tensor([-10.0, -6.0]), torch.tensor([-9.0, -8.0])
COUNTS = torch.tensor([4, 2]), torch.tensor([2, 5])


def test_sums_become_log_ratios_and_averages_where_a_loss_asks_for_them() -> None:
    # c = -8 + 10, -8 + 6 = 2, -2; r = -11 + 9, -13 + 8 = -2, -5; c a token 2/4, -2/2; r a token -2/2, -5/5
    chosen, rejected = logps(-8.0, -8.0), logps(-11.0, -13.0)

    def found(loss: str) -> torch.Tensor:
        return pair_losses(chosen, rejected, *REFERENCES, *COUNTS, 0.25, Objective(loss))

    # margins 4 and 3, target 2: 4, 1; a token 1.5 and 0: .25, 4
    assert found("ipo_sum").tolist() == pytest.approx([4.0, 1.0])
    assert found("ipo").tolist() == pytest.approx([0.25, 4.0])
    # d/dchosen = 2 (margin - 2): 4, 2; a token 2 (1.5 - 2) / 4, 2 (0 - 2) / 2; d/drejected -2 (1.5 - 2) / 2, 4 / 5
    assert gradients(chosen, rejected, found("ipo_sum")) == ([4.0, 2.0], [-4.0, -2.0])
    pull, push = gradients(chosen, rejected, found("ipo"))
    assert pull == pytest.approx([-0.25, -2.0])
    assert push == pytest.approx([0.5, 0.8])
    # ln(1 + e^(-.25 * 1.5)), ln 2; d/dchosen = -beta s(-x) / tokens
    assert found("sigmoid_norm").tolist() == pytest.approx([math.log1p(math.exp(-0.375)), math.log(2)])
    pull, push = gradients(chosen, rejected, found("sigmoid_norm"))
    down = 0.25 / (1 + math.exp(0.375))
    assert pull == pytest.approx([-down / 4, -0.125 / 2])
    assert push == pytest.approx([down / 2, 0.125 / 5])


def test_the_sft_term_is_chosen_s_negative_log_likelihood_a_token() -> None:
    # 8 / 4 and 8 / 2, half of each on top; its gradient is -.5 / tokens, and none on rejected
    chosen, rejected = logps(-8.0, -8.0), logps(-11.0, -13.0)
    without, term = (
        pair_losses(chosen, rejected, *REFERENCES, *COUNTS, 0.1, Objective("hinge", sft_weight=weight))
        for weight in (0.0, 0.5)
    )
    assert (term - without).tolist() == pytest.approx([1.0, 2.0])
    pull, push = gradients(chosen, rejected, term - without)
    assert pull == pytest.approx([-0.125, -0.25])
    assert push == [0.0, 0.0]


def test_the_numbers_of_an_objective_reach_the_loss_that_takes_them() -> None:
    chosen, rejected = logps(-12.0, -8.0), logps(-11.0, -13.0)
    asked = Objective("dpop", 0.3, 7.0)
    ratio = chosen - REFERENCES[0], rejected - REFERENCES[1]
    for name, expected in (
        ("dpop", dpop_loss(*ratio, 0.1, 7.0)),
        ("robust", robust_loss(*ratio, 0.1, 0.3)),
        ("sigmoid", sigmoid_loss(*ratio, 0.1, 0.3)),
    ):
        found = pair_losses(chosen, rejected, *REFERENCES, *COUNTS, 0.1, asked._replace(loss=name))
        assert found.tolist() == expected.tolist()


def test_settings_and_losses_know_the_same_names_and_numbers() -> None:
    assert set(LOSSES) == set(get_args(TrainConfig.model_fields["loss"].annotation))
    assert {name for name, loss in LOSSES.items() if loss.token_averaged} == {"ipo", "sigmoid_norm"}
    assert Objective() == Objective(*(TrainConfig.model_fields[name].default for name in Objective._fields))
    for name, loss in LOSSES.items():
        for number, value in (("label_smoothing", 0.1), ("dpop_lambda", 3.0)):
            more = {"label_smoothing": 0.1} if name == "robust" else {}
            if number in loss.takes:
                TrainConfig.model_validate({"loss": name, number: value})
            else:
                with pytest.raises(ValidationError, match=f"{number} has no effect on train.loss {name}"):
                    TrainConfig.model_validate({"loss": name, number: value, **more})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            "train.label_smoothing has no effect on train.loss ipo: it is sigmoid's, sigmoid_norm's and robust's",
        ),
        ({"loss": "robust"}, "train.loss robust is sigmoid without train.label_smoothing: set it above 0"),
        ({"dpop_lambda": 3.0}, "train.dpop_lambda has no effect on train.loss sigmoid: it is dpop's"),
    ],
)
def test_a_number_that_a_loss_does_not_take_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig.model_validate(values)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_finite_however_far_the_policy_has_gone(name: str, size: float) -> None:
    far = torch.tensor([size, -size, size, -size, 0.0])
    for reference in (torch.zeros(5), -far, far):
        chosen = (far + reference).requires_grad_()
        rejected = (torch.tensor([-size, size, size, -size, 0.0]) + reference).requires_grad_()
        asked = Objective(name, label_smoothing=0.1, sft_weight=1.0)
        loss = pair_losses(chosen, rejected, reference, reference, torch.ones(5), torch.ones(5), 0.1, asked)
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), (chosen, rejected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_one_a_pair_in_float32(name: str, dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, dtype=dtype)
    loss = pair_losses(
        zeros, zeros, zeros, zeros, torch.ones(3), torch.ones(3), 0.1, Objective(name, label_smoothing=0.1)
    )
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
