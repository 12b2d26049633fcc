"""Log-probs from last states: the vocabulary matrix in tiles, only where something is predicted.

Never more than TILE_LOGITS logits at once, whatever the vocabulary and the number of tokens. For the backward, logits
are kept up to KEPT_LOGITS in all and computed again beyond, tile by tile; both bounds are constants, so memory grows
with neither. Everything after the matrix product is float32.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

TILE_LOGITS = 1 << 21  # 8 MiB of float32: stays in a CPU's cache
TILE_LOGITS_CUDA = 1 << 26  # 256 MiB
KEPT_LOGITS = 1 << 26  # 256 MiB
TILE_WIDTH = 4096  # vocabulary entries of a tile
TILE_WIDTH_CUDA = 32768


class After(NamedTuple):
    """What an architecture does to its logits after the matrix: cap * tanh(scale * z / cap), or scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """In place, float32."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def slope_(self, gradient: Tensor, after: Tensor) -> Tensor:
        """The gradient of z from that of the logits, in place: `after` are the logits."""
        if self.cap is not None:
            gradient.mul_(1 - (after / self.cap) ** 2)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


def after_head(config: Any) -> After:
    """What a config says is done to the logits: names and their meaning as in transformers and its classes.

    Whether that is all, and whether it is so, is for `choose_layout` to find out on the model itself.
    """
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1
        if (factor := getattr(config, name, None)) is not None:
            scale *= float(factor)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite divides, HyperCLOVA X multiplies
        scale = scale * scaling if getattr(config, "model_type", "") == "hyperclovax" else scale / scaling
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM
    cap = next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)
    return After(scale, None if cap is None else float(cap))


def unknown_head(head: Any, vocabulary: int) -> str:
    """Why this head must be called and not be read, "" if it may: an adapter that begins at nothing looks plain.

    Args:
        head: the output embeddings of a model.
        vocabulary: how many logits the model gives.
    """
    if type(head) is not nn.Linear:
        return f"it is a {type(head).__name__}"
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head) or nn.utils.parametrize.is_parametrized(head):
        return "something is hooked onto it"
    if head.out_features != vocabulary:
        return f"it has {head.out_features} rows for {vocabulary} logits"
    return ""


def completion_logps(head: nn.Linear, after: After, states: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """log_softmax of after(head(states[sources])) in float32, at the targets.

    Args:
        head: the output matrix (V, H), with or without a bias.
        after: what follows it.
        states: (U, H) last states.
        sources: (T,) which state predicts each token; one state may predict several.
        targets: (T,) token ids.

    Returns:
        (T,) float32, in nats, with gradients to states and to the head.
    """
    order = sources.argsort(stable=True)
    dtype = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else None
    dtype = dtype or head.weight.dtype
    keep = torch.is_grad_enabled()  # off inside the function
    found: Tensor = _HeadLogps.apply(  # type: ignore[no-untyped-call]
        states, head.weight, head.bias, sources[order], targets[order], after, dtype, keep
    )
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return found[back]


class _Tiling(NamedTuple):
    """How U states x V vocabulary entries are cut: (first state, end, first token, end), and the width of a tile."""

    rows: list[tuple[int, int, int, int]]
    width: int


def _tiling(count: int, vocabulary: int, sources: Tensor) -> _Tiling:
    on_cuda = sources.device.type == "cuda"
    width = min(vocabulary, TILE_WIDTH_CUDA if on_cuda else TILE_WIDTH)
    height = max(1, (TILE_LOGITS_CUDA if on_cuda else TILE_LOGITS) // width)
    edges = [*range(0, count, height), count]
    places = torch.searchsorted(sources, torch.tensor(edges, device=sources.device)).tolist()
    cuts = zip(itertools.pairwise(edges), itertools.pairwise(places), strict=True)
    return _Tiling([(*states, *tokens) for states, tokens in cuts], width)


class _Tile(NamedTuple):
    """For the tokens of some rows: row within the rows, column within the tile, and whether the target lies in it.

    Nothing is picked out, for a GPU would have to say how many first; a token elsewhere stands at some column.
    """

    rows: Tensor
    columns: Tensor
    inside: Tensor


def _places(sources: Tensor, targets: Tensor, row: tuple[int, int, int, int], start: int, stop: int) -> _Tile:
    first, _, begin, end = row
    columns = targets[begin:end] - start
    inside = (columns >= 0) & (columns < stop - start)
    return _Tile(sources[begin:end] - first, columns.clamp(0, stop - start - 1), inside)


class _HeadLogps(torch.autograd.Function):
    """sources and targets sorted by source. The gradient of log_softmax is onehot - softmax, times that of the token.

    Tokens predicted by one state share its softmax, so their gradients are summed first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sources: Tensor,
        targets: Tensor,
        after: After,
        dtype: torch.dtype,
        keep: bool,  # noqa: FBT001 - as above
    ) -> Tensor:
        count, vocabulary = len(states), weight.shape[0]
        tiling = _tiling(count, vocabulary, sources)
        # a target that no tile holds, of a head smaller than the tokenizer, must not pass for a number
        found = torch.full((len(targets),), math.nan, dtype=torch.float32, device=states.device)
        totals = torch.empty(count, dtype=torch.float32, device=states.device)  # log of the sum of exponentials
        kept: dict[tuple[int, int], Tensor] = {}
        room = KEPT_LOGITS
        hidden, matrix = states.to(dtype), weight.to(dtype)
        for number, row in enumerate(tiling.rows):
            total = torch.empty(0)
            for start in range(0, vocabulary, tiling.width):
                stop = min(start + tiling.width, vocabulary)
                logits = _logits(hidden[row[0] : row[1]], matrix[start:stop], _slice(bias, start, stop), after)
                # log_softmax is the fused pass over a tile: what it takes off the largest is the log of the sum
                part = logits.amax(-1) - torch.log_softmax(logits, -1).amax(-1)
                total = part if start == 0 else torch.logaddexp(total, part)
                tile = _places(sources, targets, row, start, stop)
                some = found[row[2] : row[3]]
                some.copy_(torch.where(tile.inside, logits[tile.rows, tile.columns], some))
                if keep and room >= logits.numel():
                    room -= logits.numel()
                    kept[number, start] = logits
            totals[row[0] : row[1]] = total
        found -= totals[sources]
        ctx.save_for_backward(hidden, matrix, bias, sources, targets, totals)
        ctx.kept, ctx.after, ctx.tiling = kept, after, tiling
        ctx.dtypes = states.dtype, weight.dtype
        return found.clamp_(max=0)  # its two halves are rounded apart

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, matrix, bias, sources, targets, totals = ctx.saved_tensors
        after, tiling = ctx.after, ctx.tiling
        of_states = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        of_weight = (
            torch.zeros(matrix.shape, dtype=torch.float32, device=hidden.device) if ctx.needs_input_grad[1] else None
        )
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        pulls = totals.new_zeros(len(totals)).index_add_(0, sources, gradient)
        for number, row in enumerate(tiling.rows):
            some, pull = hidden[row[0] : row[1]], pulls[row[0] : row[1], None]
            for start in range(0, matrix.shape[0], tiling.width):
                stop = min(start + tiling.width, matrix.shape[0])
                logits = ctx.kept.pop((number, start), None)
                if logits is None:
                    logits = _logits(some, matrix[start:stop], _slice(bias, start, stop), after)
                capped = logits.clone() if after.cap is not None else logits
                slope = logits.sub_(totals[row[0] : row[1], None]).exp_().mul_(-pull)
                tile = _places(sources, targets, row, start, stop)
                slope.index_put_((tile.rows, tile.columns), gradient[row[2] : row[3]] * tile.inside, accumulate=True)
                slope = after.slope_(slope, capped)
                if of_bias is not None:
                    of_bias[start:stop] += slope.sum(0)
                slope = slope.to(matrix.dtype)
                _add_product(of_states[row[0] : row[1]], slope, matrix[start:stop])
                if of_weight is not None:
                    _add_product(of_weight[start:stop], slope.T, some)
        to_states, to_weight = ctx.dtypes
        weight_gradient = None if of_weight is None else of_weight.to(to_weight)
        bias_gradient = None if of_bias is None else of_bias.to(bias.dtype)
        return of_states.to(to_states), weight_gradient, bias_gradient, None, None, None, None, None


def _slice(bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if bias is None else bias[start:stop]


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None, after: After) -> Tensor:
    """One tile of float32 logits, the caller's own."""
    logits = (states @ matrix.T).float()
    if bias is not None:
        logits += bias.float()
    return after(logits)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one @ other to a float32 total."""
    if one.dtype == torch.float32:
        total.addmm_(one, other)
    else:
        total += one @ other
