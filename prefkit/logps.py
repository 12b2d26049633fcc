"""THE log-prob kernel: used by the reference pass, the gate and the trainer alike.

The plain code it equals: run the model on prompt + completion, take log_softmax of the model's own logits in float32,
and gather at the completion's tokens, one value a token. How pairs become rows is packing.py, who sees whom
attention.py, the vocabulary matrix head.py; in which of the ways a model may be scored is found out in layouts.py.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefkit.attention import FLEX_BLOCK, attention_mask, set_attention
from prefkit.encode import Sides
from prefkit.head import after_head, completion_logps
from prefkit.models import REGIMES, autocast
from prefkit.packing import Batch, Rows, make_batch

KERNEL_VERSION = 2


class Scored(NamedTuple):
    """Log-probs of a batch, in nats, float32."""

    token_logps: Tensor  # (T,)
    chosen_logps: Tensor  # (B,) sums
    rejected_logps: Tensor  # (B,)
    ln_ches: Tensor | None  # (B,) None where the model's own head was used, or there will be a backward


class Layout(NamedTuple):
    """How a model is scored, and why not faster.

    `rows`: packed, tree, separate or alone (packing.py); `attention`: packed, flex, sdpa, eager, or "" for the class's
    own choice; `fused_head`: our head, else the model's own logits; `reason`: what stood against each faster way.
    """

    rows: Rows
    attention: str = ""
    fused_head: bool = True
    reason: str = ""

    @property
    def fast(self) -> bool:
        """Whether prompts are shared and only completions meet the vocabulary matrix."""
        return self.rows in ("packed", "tree") and self.fused_head

    @property
    def name(self) -> str:
        """In words, with the reason where there is a faster one."""
        rows = {
            "packed": "packed rows, prompts shared",
            "tree": "a row a pair, prompts shared",
            "separate": "separate sequences",
            "alone": "one sequence at a time",
        }[self.rows]
        head = "" if self.fused_head else ", the model's own logits"
        kind = f" ({self.attention} attention)" if self.attention else ""
        return f"{rows}{kind}{head}" + (f": {self.reason}" if self.reason else "")


def logps_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax in float32 at the targets: (n, V) and (n,) to (n,)."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def length_normalised_ches(states: Tensor, sides: Tensor) -> Tensor:
    """Ln-CHES (arXiv 2410.08847): <S+, S->/(n+ n-) - |S+|^2 / n+^2 a pair, S the sum of a side's predicting states.

    Args:
        states: (T, H) last-layer states after the final norm, one a completion token.
        sides: (T,) as in Batch.

    Returns:
        (B,) float32. Large means that lowering rejected drags chosen down with it.
    """
    count = int(sides.max()) + 1
    sums = states.new_zeros(count, states.shape[1], dtype=torch.float32).index_add_(0, sides, states.float())
    means = sums / torch.bincount(sides, minlength=count)[:, None]
    chosen, rejected = means[0::2], means[1::2]
    return (chosen * rejected).sum(-1) - (chosen * chosen).sum(-1)


class CompletionLogps(nn.Module):
    """A causal LM whose forward gives completion log-probs: the module that accelerate wraps.

    Nothing outside calls the base model or reads the output matrix: DDP and FSDP see every use of every weight.
    """

    def __init__(self, model: nn.Module, dtype: str, layout: Layout) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.use(layout)

    def use(self, layout: Layout) -> None:
        """Score in this layout from now on."""
        self.layout = layout
        if layout.attention:
            set_attention(self.model, layout.attention)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def batch(self, pairs: Sequence[Sides]) -> Batch:
        """Pairs laid out as `self.layout` says, on the model's device."""
        multiple = FLEX_BLOCK if self.layout.attention == "flex" else 1
        return make_batch(pairs, rows=self.layout.rows, multiple=multiple).to(self.device)

    def forward(self, batch: Batch) -> Scored:
        """Score a batch that `batch` made."""
        with autocast(REGIMES[self.dtype], batch.input_ids.device):
            states, logps = self._fused(batch) if self.layout.fused_head else (None, self._own(batch))
        sums = logps.new_zeros(int(batch.sides[-1]) + 1).index_add(0, batch.sides, logps)
        # the reference wants it, an update does not
        ches = None
        if states is not None and not torch.is_grad_enabled():
            ches = length_normalised_ches(states[batch.sources], batch.sides)
        # copies: fully_shard hangs its hooks on what a forward returns, and warns of views
        return Scored(logps, sums[0::2].clone(), sums[1::2].clone(), ches)

    def _fused(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The base model's last states where something is predicted, and our head."""
        model: Any = self.model
        base = model.get_decoder() if model.base_model is model else model.base_model

        def last_states(**inputs: Any) -> Tensor:
            states: Tensor = base(use_cache=False, **inputs).last_hidden_state
            return states

        if self.layout.rows == "alone":
            states = torch.cat([last_states(input_ids=row)[0, places] for row, places, _ in self._each(batch)])
        else:
            states = last_states(**self._rows(batch)).flatten(0, 1)[batch.predictors]
        head, after = model.get_output_embeddings(), after_head(model.config.get_text_config())
        return states, completion_logps(head, after, states, batch.sources, batch.targets)

    def _own(self, batch: Batch) -> Tensor:
        """The log-probs from the model's own logits."""
        return torch.cat([logps_from_logits(logits, batch.targets[mine]) for logits, mine in self.own_logits(batch)])

    def own_logits(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | slice]]:
        """The model's own logits, (n, V), at n completion tokens at a time, and which of the batch's tokens these are.

        Of rows that share something they are computed only where something is predicted.
        """
        model: Any = self.model

        def logits_of(**inputs: Any) -> Tensor:
            logits: Tensor = model(use_cache=False, **inputs).logits
            return logits

        if self.layout.rows == "alone":  # a row is a side: what is made of its logits before the logits of the next
            few = "logits_to_keep" in inspect.signature(model.forward).parameters
            for row, places, mine in self._each(batch):
                whole = logits_of(input_ids=row, logits_to_keep=places) if few else logits_of(input_ids=row)[:, places]
                yield whole[0], mine
        elif self.layout.rows == "packed":
            yield logits_of(logits_to_keep=batch.predictors, **self._rows(batch))[0][batch.sources], slice(None)
        else:
            yield logits_of(**self._rows(batch)).flatten(0, 1)[batch.predictors][batch.sources], slice(None)

    def _each(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each sequence by itself: (1, n) ids without padding, its predicting places, and which tokens are its own."""
        length = batch.input_ids.shape[1]
        for row, count in enumerate(batch.lengths.tolist()):
            mine = batch.sides == row
            yield batch.input_ids[row : row + 1, :count], batch.predictors[batch.sources[mine]] - row * length, mine

    def _rows(self, batch: Batch) -> dict[str, Any]:
        """What the model takes for these rows."""
        if self.layout.rows == "separate":
            place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            return {"input_ids": batch.input_ids, "attention_mask": (place < batch.lengths[:, None]).long()}
        mask = attention_mask(self.model, batch, self.layout.attention)
        return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}
