"""Optimisers by name: one update of each family against its formula, what is refused, and going on from a state."""

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from prefkit.config import TrainConfig
from prefkit.errors import InputError
from prefkit.optimizers import OPTIMIZERS, check_optimizer, load_state, make_optimizer

RATE, DECAY = 0.01, 0.5
# 'a': a matrix of 2 and -4 by turns, 'b': a vector; gradients are .5 and -.25 by turns, so that |g| tells them apart
MATRIX, VECTOR = [[2.0, -4.0], [-4.0, 2.0]], [3.0, -3.0]
SLOPES: dict[str, Any] = {"matrix": [[0.5, -0.25], [-0.25, 0.5]], "vector": [0.5, -0.25]}
USABLE = ["adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd"]
USABLE += ["muon", "nadam", "radam", "rmsprop", "rprop", "sgd"]


class Policy(nn.Module):
    def __init__(self, *, vector: bool = True) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(MATRIX, dtype=torch.float64))
        if vector:
            self.vector = nn.Parameter(torch.tensor(VECTOR, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def settings(name: str, decay: float = 0.0, **arguments: Any) -> TrainConfig:
    return TrainConfig(optimizer=name, learning_rate=RATE, weight_decay=decay, optimizer_args=arguments)


def stepped(policy: Policy, optimizer: torch.optim.Optimizer, times: int = 1, scale: float = 1.0) -> None:
    for _ in range(times):
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.grad = scale * torch.tensor(SLOPES[name], dtype=parameter.dtype)
        optimizer.step()


def change(name: str, decay: float = 0.0, **arguments: Any) -> tuple[list[float], list[float]]:
    """What one update adds to the first row of the matrix and to the vector."""
    policy = Policy(vector=name != "muon")
    stepped(policy, make_optimizer(policy, settings(name, decay, **arguments)))
    row = (policy.matrix.detach() - torch.tensor(MATRIX, dtype=torch.float64))[0].tolist()
    vector = (policy.vector.detach() - torch.tensor(VECTOR, dtype=torch.float64)).tolist() if name != "muon" else []
    return row, vector


def by(formula: Any) -> tuple[list[float], list[float]]:
    """The change that a formula of weight, gradient and decay says: matrices decay, vectors do not."""
    row = [formula(w, g, DECAY) for w, g in zip(MATRIX[0], SLOPES["matrix"][0], strict=True)]
    vector = [formula(w, g, 0.0) for w, g in zip(VECTOR, SLOPES["vector"], strict=True)]
    return row, vector


def sign(value: float) -> float:
    return math.copysign(1.0, value)


# the first update of each family, from its paper's formula with all averages at zero before it; L2 decay adds to the
# gradient (h = g + decay w), decoupled decay shrinks the weight by rate * decay
FIRST: dict[str, Any] = {
    "sgd": lambda w, g, d: -RATE * (g + d * w),
    # m / (1 - b1) = h, v / (1 - b2) = h^2
    "adam": lambda w, g, d: -RATE * sign(g + d * w),
    "adamw": lambda w, g, d: -RATE * d * w - RATE * sign(g),
    "adamax": lambda w, g, d: -RATE * sign(g + d * w),
    # v = (1 - .99) h^2, no correction: h / |.1 h|
    "rmsprop": lambda w, g, d: -RATE * sign(g + d * w) / math.sqrt(1 - 0.99),
    # the sum of squares is h^2
    "adagrad": lambda w, g, d: -RATE * sign(g + d * w),
    # sqrt(eps) / sqrt(.1 h^2 + eps) * h with eps 1e-6
    "adadelta": lambda w, g, d: -RATE * (g + d * w) * math.sqrt(1e-6 / (0.1 * (g + d * w) ** 2 + 1e-6)),
    # too few steps to know a variance (rho_1 = 1): a step of momentum alone, m / (1 - b1) = h
    "radam": lambda w, g, d: -RATE * (g + d * w),
    # mu_t = .9 (1 - .5 * .96^(.004 t)): (1 - mu_1) h / (1 - mu_1) + mu_2 m / (1 - mu_1 mu_2), m = .1 h, v = h^2
    "nadam": lambda w, g, d: (
        -RATE
        * sign(g + d * w)
        * (1 + 0.1 * (mu := [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2)])[1] / (1 - mu[0] * mu[1]))
    ),
    # eta_1 = rate, lambda 1e-4 decays the weight as well
    "asgd": lambda w, g, d: -RATE * 1e-4 * w - RATE * (g + d * w),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_update_is_the_one_of_the_formula(name: str) -> None:
    row, vector = change(name, DECAY)
    expected = by(FIRST[name])
    assert row == pytest.approx(expected[0], rel=2e-5)
    assert vector == pytest.approx(expected[1], rel=2e-5)


def test_rprop_moves_by_the_sign_alone() -> None:
    for part in change("rprop"):
        assert part == pytest.approx([-RATE, RATE], rel=1e-4)


def test_adafactor_factors_the_squares_of_a_matrix() -> None:
    # at step 1 the averages are the squares themselves (1 - 1^-.8 = 0): rows (.25 + .0625) / 2 = .15625, columns alike,
    # v = .15625^2 / .15625; g / sqrt(v), whose root mean square is 1, times max(.001, rms(w)) * min(rate, 1)
    size = math.sqrt(0.15625)
    row, vector = change("adafactor", DECAY)
    rms = math.sqrt((2.0**2 + 4.0**2) / 2)
    assert row == pytest.approx(
        [-RATE * DECAY * w - RATE * rms * g / size for w, g in zip(MATRIX[0], (0.5, -0.25), strict=True)]
    )
    # a vector keeps a square a weight: the sign, times rms(w) = 3
    assert vector == pytest.approx([-RATE * 3.0, RATE * 3.0])


def test_muon_makes_the_gradient_orthogonal() -> None:
    # the gradient [[.5, -.25], [-.25, .5]] has the singular values .75 (1, -1) and .25 (1, 1): divided by their norm,
    # each goes five times through a s + b s^3 + c s^5; the step is rate times the matrix of the same vectors. In
    # bfloat16 inside
    norm = math.hypot(0.75, 0.25)
    across, along = 0.75 / norm, 0.25 / norm
    for _ in range(5):
        across, along = (3.4445 * s - 4.775 * s**3 + 2.0315 * s**5 for s in (across, along))
    row, _ = change("muon", DECAY)
    expected = [-RATE * DECAY * 2.0 - RATE * (along + across) / 2, RATE * DECAY * 4.0 - RATE * (along - across) / 2]
    assert row == pytest.approx(expected, abs=3e-2 * RATE)


def test_arguments_reach_the_class() -> None:
    # momentum .5 without dampening: the second step is of g + .5 g
    policy = Policy()
    stepped(policy, make_optimizer(policy, settings("sgd", momentum=0.5)), times=2)
    moved = (policy.vector.detach() - torch.tensor(VECTOR, dtype=torch.float64)).tolist()
    assert moved == pytest.approx([-RATE * 0.5 * 2.5, RATE * 0.25 * 2.5], rel=1e-5)


def test_yaml_s_texts_and_lists_are_taken_as_the_numbers_they_are() -> None:
    """YAML reads 1e-8 as a text, and has no tuples."""
    group = make_optimizer(Policy(), settings("adamw", betas=[0.8, "9.5e-1"], eps="1e-4", amsgrad=True)).param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-4, True)
    policy = Policy(vector=False)
    assert make_optimizer(policy, settings("muon", adjust_lr_fn="match_rms_adamw")).param_groups[0]["ns_steps"] == 5


@pytest.mark.parametrize("name", USABLE)
def test_matrices_decay_vectors_do_not_and_frozen_weights_are_no_part_of_it(name: str) -> None:
    policy = Policy(vector=name != "muon")
    decay = 0.0 if name == "rprop" else DECAY
    matrices, vectors = make_optimizer(policy, settings(name, decay)).param_groups
    assert [id(p) for p in matrices["params"]] == [id(policy.matrix)]
    assert [id(p) for p in vectors["params"]] == ([] if name == "muon" else [id(policy.vector)])
    if name != "rprop":
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (DECAY, 0.0)


def test_all_of_torch_optim_is_known_in_any_case() -> None:
    assert sorted(OPTIMIZERS) == sorted([*USABLE, "lbfgs", "sparseadam"])
    for name in ("AdamW", "ADAMW", "adamw"):
        assert type(make_optimizer(Policy(), settings(name))) is torch.optim.AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", USABLE)
def test_an_optimizer_goes_on_from_its_state_to_the_bit(name: str, dtype: torch.dtype) -> None:
    def begun() -> tuple[Policy, torch.optim.Optimizer]:
        policy = Policy(vector=name != "muon").to(dtype)
        return policy, make_optimizer(policy, settings(name))

    policy, optimizer = begun()
    stepped(policy, optimizer, 3)
    file = io.BytesIO()
    torch.save({"weights": policy.state_dict(), "optimizer": optimizer.state_dict()}, file)
    stepped(policy, optimizer, 3, -0.5)

    other, again = begun()
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    other.load_state_dict(kept["weights"])
    load_state(again, kept["optimizer"])
    stepped(other, again, 3, -0.5)
    assert all(torch.equal(one, two) for one, two in zip(policy.parameters(), other.parameters(), strict=True))


def refused(asked: TrainConfig) -> str:
    with pytest.raises(InputError) as early:
        check_optimizer(asked)
    with pytest.raises(InputError) as late:
        make_optimizer(Policy(vector=False), asked)
    assert str(early.value) == str(late.value)
    return str(early.value)


def test_an_unknown_name_is_refused_with_those_near_it() -> None:
    said = refused(settings("adamv"))
    assert said.startswith("train.optimizer: torch.optim has no adamv\n  expected: one of adam, ")
    assert "adamw" in said
    assert "sgd" not in said
    assert refused(settings("lion8bit")).startswith("train.optimizer: torch.optim has no lion8bit\n  expected: one of ")
    assert refused(settings("zzz")).endswith(f"expected: one of {', '.join(sorted(USABLE))}")
    assert "has no Optimizer" in refused(settings("Optimizer"))


def test_a_class_that_asks_for_what_no_run_gives_is_refused() -> None:
    assert refused(settings("LBFGS")).startswith(
        "train.optimizer: LBFGS asks for a closure that it calls many times\n  expected: one of adadelta, "
    )
    assert refused(settings("sparseadam")).startswith(
        "train.optimizer: sparseadam asks for sparse gradients, and these are dense"
    )


def test_arguments_that_a_class_does_not_take_are_refused_with_those_it_takes() -> None:
    said = refused(settings("sgd", betas=[0.9, 0.99]))
    assert said.startswith(
        "train.optimizer_args: SGD takes no betas\n  expected: some of momentum, dampening, nesterov"
    )
    assert refused(settings("adamw", lr=1.0)) == "train.optimizer_args: lr is set by train.learning_rate"
    assert refused(settings("adamw", weight_decay=1.0)).endswith("weight_decay is set by train.weight_decay")
    assert refused(settings("adamw", params=[])).endswith("params is set by the model")


def test_arguments_that_a_class_refuses_are_refused_in_its_words() -> None:
    said = refused(settings("adamw", betas=[2.0, 0.9]))
    assert said == (
        "train.optimizer: AdamW(betas=(2.0, 0.9)) cannot train this: Invalid beta parameter at index 0: 2.0"
    )
    assert "SGD(nesterov=True) cannot train this: " in refused(settings("sgd", nesterov=True))
    assert "AdamW(betas=ninety) cannot train this: " in refused(settings("adamw", betas="ninety"))


def test_weight_decay_is_refused_where_the_class_has_none() -> None:
    said = refused(settings("rprop", DECAY))
    assert said.startswith("train.weight_decay: Rprop has none")
    assert said.endswith("next: --set train.weight_decay=0, or another optimizer")


def test_muon_trains_no_vectors() -> None:
    check_optimizer(settings("muon"))  # an adapter is all matrices
    with pytest.raises(InputError, match=r"train.optimizer: Muon\(\) cannot train this: .*2D"):
        make_optimizer(Policy(), settings("muon"))
