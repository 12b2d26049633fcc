"""The head against log_softmax of the whole, in values, gradients and memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prefkit import head
from prefkit.head import After, after_head, completion_logps, unknown_head

STATES, SIZE, VOCABULARY, TOKENS = 23, 8, 50, 31
AFTERS = {"plain": After(), "scale": After(0.25), "cap": After(1.0, 1.5), "both": After(3.0, 2.0)}


def drawn(*, bias: bool = False, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A head, states, which of them predicts each token, the tokens, and a gradient a token."""
    draw = torch.Generator().manual_seed(seed)
    linear = nn.Linear(SIZE, VOCABULARY, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=draw)
    states = torch.randn(STATES, SIZE, generator=draw, requires_grad=True)
    sources = torch.randint(0, STATES, (TOKENS,), generator=draw)  # some predict several tokens, some none
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    return linear, states, sources, targets, torch.randn(TOKENS, generator=draw)


def whole(linear: nn.Linear, after: After, states: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The oracle, differentiated by autograd."""
    logits = linear(states).float() * after.scale
    if after.cap is not None:
        logits = torch.tanh(logits / after.cap) * after.cap
    found: Tensor = logits.log_softmax(-1)[sources, targets]
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", AFTERS)
@pytest.mark.parametrize("kept", ["kept", "half", "again"])
@pytest.mark.parametrize(("width", "height"), [(7, 3), (50, 1), (64, 64)])
def test_tiles_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, bias: bool, after: str, kept: str, width: int, height: int
) -> None:
    monkeypatch.setattr(head, "TILE_WIDTH", width)
    monkeypatch.setattr(head, "TILE_LOGITS", min(width, VOCABULARY) * height)
    bounds = {"kept": 1 << 20, "half": STATES * VOCABULARY // 2, "again": 0}
    monkeypatch.setattr(head, "KEPT_LOGITS", bounds[kept])
    linear, states, sources, targets, pull = drawn(bias=bias)
    found = completion_logps(linear, AFTERS[after], states, sources, targets)
    expected = whole(linear, AFTERS[after], states, sources, targets)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=2e-6)
    inputs = (states, *linear.parameters())
    ours, theirs = (torch.autograd.grad((logps * pull).sum(), inputs) for logps in (found, expected))
    assert all(torch.allclose(one, other, atol=1e-5, rtol=1e-5) for one, other in zip(ours, theirs, strict=True))
    with torch.no_grad():
        assert torch.allclose(completion_logps(linear, AFTERS[after], states, sources, targets), expected, atol=2e-6)


def test_the_gradient_is_the_one_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_WIDTH", 16)
    linear, states, sources, targets, _ = drawn(bias=True)
    found = completion_logps(linear, AFTERS["both"], states, sources, targets).sum()
    (slope,) = torch.autograd.grad(found, states)
    step = torch.zeros_like(states)
    step[3, 2] = 1e-2
    with torch.no_grad():
        above, below = (
            whole(linear.double(), AFTERS["both"], (states + sign * step).double(), sources, targets).sum()
            for sign in (1, -1)
        )
    assert abs(float((above - below) / 2e-2) - float(slope[3, 2])) <= 1e-3 * max(1.0, abs(float(slope[3, 2])))


def test_a_frozen_head_gets_no_gradient_and_states_do() -> None:
    linear, states, sources, targets, pull = drawn()
    linear.weight.requires_grad_(False)
    torch.autograd.backward((completion_logps(linear, After(), states, sources, targets) * pull).sum())
    assert linear.weight.grad is None
    expected = torch.autograd.grad((whole(linear, After(), states, sources, targets) * pull).sum(), states)[0]
    assert states.grad is not None
    assert torch.allclose(states.grad, expected, atol=1e-5)


@pytest.mark.parametrize("regime", ["autocast", "weights"])
def test_bfloat16_is_as_far_from_float32_as_the_plain_code_in_it(regime: str) -> None:
    linear, states, sources, targets, pull = drawn()
    exact = whole(linear, After(), states, sources, targets)
    slope = torch.autograd.grad((exact * pull).sum(), linear.weight)[0]
    if regime == "weights":
        linear, states = linear.to(torch.bfloat16), states.detach().to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=regime == "autocast"):
        rough = whole(linear, After(), states, sources, targets)
        found = completion_logps(linear, After(), states, sources, targets)
    assert found.dtype == torch.float32
    error, allowed = (float((values - exact).detach().square().mean().sqrt()) for values in (found, rough))
    assert 1e-4 < error <= 1.5 * allowed
    one, other = (torch.autograd.grad((values * pull).sum(), linear.weight)[0] for values in (found, rough))
    assert one.dtype == linear.weight.dtype
    error, allowed = (float((values.float() - slope).square().mean().sqrt()) for values in (one, other))
    assert error <= 1.5 * allowed


def test_a_certain_token_has_no_log_prob_above_0() -> None:
    linear, states, sources, _, _ = drawn()
    with torch.no_grad():
        linear.weight.mul_(200.0)
        certain = linear(states).argmax(-1)[sources]
        found = completion_logps(linear, After(), states, sources, certain)
    assert float(found.max()) == 0.0
    assert float(found.min()) > -50


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("kept", [0, 1 << 12])
def test_memory_knows_neither_the_vocabulary_nor_the_length(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(head, "TILE_WIDTH", 64)
    monkeypatch.setattr(head, "TILE_LOGITS", 512)
    monkeypatch.setattr(head, "KEPT_LOGITS", kept)
    linear = nn.Linear(4, 2000, bias=False)
    states = torch.randn(1500, 4, requires_grad=True)
    sources = torch.arange(1500)
    with LargestTensor() as seen:
        found = completion_logps(linear, After(), states, sources, torch.randint(0, 2000, (1500,)))
        saved = sum(tile.numel() for tile in found.grad_fn.next_functions[0][0].kept.values())  # type: ignore[union-attr]
        torch.autograd.backward(found.sum())
    assert saved <= kept
    assert seen.elements == 4 * 2000  # the matrix itself; all logits would be 3,000,000


def test_what_configs_say_of_the_logits() -> None:
    class Config:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    assert after_head(Config()) == After()
    assert after_head(Config(logit_scale=0.25)) == After(0.25)
    assert after_head(Config(logits_scaling=8.0)) == After(0.125)
    assert after_head(Config(logits_scaling=8.0, model_type="hyperclovax")) == After(8.0)
    assert after_head(Config(lm_head_multiplier=0.5)) == After(0.5)
    assert after_head(Config(final_logit_softcapping=30.0)) == After(1.0, 30.0)
    assert after_head(Config(logits_soft_cap=30.0)) == After(1.0, 30.0)
    assert after_head(Config(output_logit_soft_cap=30.0)) == After(1.0, 30.0)
    assert after_head(Config(final_logit_softcapping=None, logit_scale=None)) == After()


def test_a_head_that_must_be_called_is_told_from_one_that_may_be_read() -> None:
    class Adapted(nn.Linear):
        pass

    assert unknown_head(nn.Linear(4, 10), 10) == ""
    assert unknown_head(Adapted(4, 10), 10) == "it is a Adapted"
    assert unknown_head(nn.Linear(4, 12), 10) == "it has 12 rows for 10 logits"
    hooked = nn.Linear(4, 10)
    hooked.register_forward_hook(lambda _module, _inputs, output: output)
    assert unknown_head(hooked, 10) == "something is hooked onto it"
    assert unknown_head(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 10)), 10) != ""


def test_a_target_that_the_head_has_no_row_for_is_no_number() -> None:
    linear, states, sources, targets, _ = drawn()
    targets[3], targets[5] = VOCABULARY, VOCABULARY + 7
    found = completion_logps(linear, After(), states, sources, targets)
    assert found.isnan().nonzero()[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("first", [-1e3, -1e6, float("-inf")])
def test_one_very_unlikely_token_does_not_spoil_the_others(first: float) -> None:
    linear = nn.Linear(SIZE, VOCABULARY)
    with torch.no_grad():
        linear.bias[0] = first
    _, states, sources, _, _ = drawn()
    targets = torch.full((TOKENS,), 7)
    found = completion_logps(linear, After(), states, sources, targets)
    assert torch.allclose(found, whole(linear, After(), states, sources, targets), atol=2e-6)
