"""Each loss that TRL has too: TRL's own _compute_loss on random token log-probs, values and gradients.

Where TRL is not followed, and why, is tested as well: it takes label_smoothing beside sigmoid and does not use it, and
its sft term averages over the tokens of the batch, ours over pairs.
"""

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prefkit.losses import LOSSES, Objective, pair_losses

pytest.importorskip("trl")

PROMPT = 3  # tokens before each completion
SMOOTHED = {"robust"}  # the only one of ours whose label_smoothing TRL looks at
BOTH = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down"]


class Drawn(NamedTuple):
    """Token log-probs of both sides one after the other (2B, L - 1), 0 outside completions, and what goes with them."""

    token_logps: Tensor
    mask: Tensor  # (2B, L) of the completions' tokens
    references: Tensor  # (2B,) sums

    @property
    def counts(self) -> Tensor:
        return self.mask.sum(1)


def drawn(seed: int, pairs: int, width: int = 12) -> Drawn:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (2 * pairs,), generator=draw)
    place = torch.arange(PROMPT + width)
    mask = (place >= PROMPT) & (place < PROMPT + lengths[:, None])
    logps = -3 * torch.rand(2 * pairs, PROMPT + width - 1, generator=draw) * mask[:, 1:]
    references = logps.sum(1) + 2 * torch.randn(2 * pairs, generator=draw)
    return Drawn(logps.requires_grad_(), mask.long(), references)


def theirs(inputs: Drawn, loss: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss that DPOTrainer computes of a batch: its method, with a trainer and a model that hold no more."""
    trainer_of: Any = importlib.import_module("trl").DPOTrainer
    logps, pairs = inputs.token_logps, len(inputs.references) // 2
    rest = {name: torch.zeros(logps.shape) for name in ("entropy", "mean_logits")}
    outputs = SimpleNamespace(log_probs=logps, is_top1=torch.zeros(logps.shape, dtype=torch.bool), **rest)
    alone = SimpleNamespace(device=torch.device("cpu"), gather=lambda v: v, gather_for_metrics=lambda v: v)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=alone,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "input_ids": torch.ones(inputs.mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(inputs.mask.shape, dtype=torch.long),
        "completion_mask": inputs.mask,
        "ref_chosen_logps": inputs.references[:pairs],
        "ref_rejected_logps": inputs.references[pairs:],
    }
    found: Tensor = trainer_of._compute_loss(trainer, lambda **_inputs: outputs, batch, False)
    return found


def ours(inputs: Drawn, objective: Objective, beta: float) -> Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected), (num_chosen, num_rejected) = (
        values.chunk(2) for values in (inputs.token_logps.sum(1), inputs.references, inputs.counts)
    )
    return pair_losses(chosen, rejected, ref_chosen, ref_rejected, num_chosen, num_rejected, beta, objective)


def agree(found: Tensor, expected: Tensor, inputs: Drawn) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted = inputs.mask[:, 1:].bool()  # outside completions the log-probs of a real model are constants
    one, other = (torch.autograd.grad(v, inputs.token_logps, retain_graph=True)[0][wanted] for v in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("pairs", [1, 8])
@pytest.mark.parametrize("name", BOTH)
def test_values_and_gradients_are_those_of_trl(name: str, pairs: int, beta: float) -> None:
    smoothing = 0.2 if name in SMOOTHED else 0.0
    for seed in range(5):
        inputs = drawn(seed, pairs)
        found = ours(inputs, Objective(name, smoothing), beta).mean()
        agree(found, theirs(inputs, name, beta, smoothing), inputs)


def test_what_trl_has_not_is_known() -> None:
    for name in set(LOSSES) - set(BOTH):
        with pytest.raises(ValueError, match="Unknown loss type"):
            theirs(drawn(0, 2), name, 0.1)
    assert set(LOSSES) - set(BOTH) == {"ipo_sum", "dpop"}


def test_trl_takes_label_smoothing_beside_sigmoid_and_does_not_use_it() -> None:
    inputs = drawn(0, 4)
    plain = theirs(inputs, "sigmoid", 0.1)
    assert theirs(inputs, "sigmoid", 0.1, 0.2).item() == plain.item()
    # ours is the conservative loss: .8 of the pair's and .2 of the flipped pair's, each of which TRL has
    chosen, rejected = inputs.token_logps.detach().chunk(2)
    turned = Drawn(torch.cat([rejected, chosen]), inputs.mask.roll(4, 0), inputs.references.roll(4, 0))
    expected = 0.8 * plain + 0.2 * theirs(turned, "sigmoid", 0.1)
    torch.testing.assert_close(ours(inputs, Objective("sigmoid", 0.2), 0.1).mean(), expected, rtol=1e-6, atol=1e-6)


def test_the_sft_term_is_that_of_trl_where_all_completions_are_as_long() -> None:
    inputs = drawn(3, 6)
    mask = torch.ones_like(inputs.mask) * (torch.arange(inputs.mask.shape[1]) >= PROMPT)
    logps = -torch.rand(inputs.token_logps.shape, generator=torch.Generator().manual_seed(0)) * mask[:, 1:]
    even = Drawn(logps.requires_grad_(), mask, inputs.references)
    expected = theirs(even, "sigmoid", 0.1) + 0.5 * theirs(even, "sft", 0.1)
    agree(ours(even, Objective("sigmoid", sft_weight=0.5), 0.1).mean(), expected, even)


def test_trl_weighs_the_tokens_of_a_batch_alike_and_ours_its_pairs() -> None:
    inputs = drawn(3, 6)
    chosen, counts = inputs.token_logps.detach().chunk(2)[0].sum(1), inputs.counts.chunk(2)[0]
    assert len(set(counts.tolist())) > 1
    assert theirs(inputs, "sft", 0.1).item() == pytest.approx(float(-chosen.sum() / counts.sum()), rel=1e-6)
    term = ours(inputs, Objective(sft_weight=1.0), 0.1) - ours(inputs, Objective(), 0.1)
    assert term.mean().item() == pytest.approx(float(-(chosen / counts).mean()), rel=1e-5)
