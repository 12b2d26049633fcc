"""THE log-prob kernel: used by the reference pass, the gate and the trainer alike.

The plain code it equals: run the model on prompt + completion, take log_softmax of the model's own logits in float32,
and gather at the completion's tokens, one value a token. Two layouts compute it:

* shared: one row [prompt | chosen | rejected] a pair. Both completions start at position len(prompt), both see the
  prompt, neither sees the other (a 4-D mask); the first token of either is predicted at the last prompt position. P +
  C + R tokens instead of 2P + C + R, and the vocabulary matrix only at the predicting positions, in chunks, recomputed
  in the backward.
* separate: two ordinary rows a pair and the model's own logits: the plain code itself, batched.

`choose_layout` scores a few rows both ways and takes the shared layout only where they agree; otherwise it says why
not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefkit.encode import Sides
from prefkit.errors import ModelError, is_out_of_memory
from prefkit.models import REGIMES, autocast

KERNEL_VERSION = 1
PROBE_TOKENS = 256  # of the longer probe, a side
CHUNK_LOGITS = 1 << 24  # float32 logits held at once: 64 MiB
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1
# what the two layouts may differ by on one token, in nats: rounding in float32, what plain bfloat16 loses in the others
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4, "bfloat16_weights": 0.25}


class Batch(NamedTuple):
    """B pairs as R rows of at most L tokens (R = B shared, 2B separate), T completion tokens in all.

    predictors and targets go pair by pair, chosen before rejected: the flat position whose state predicts each
    completion token, and that token's id.
    """

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64
    segments: Tensor  # (R, L) int8: PROMPT, CHOSEN, REJECTED, PADDING
    predictors: Tensor  # (T,) int64, into R * L
    targets: Tensor  # (T,) int64
    sides: Tensor  # (T,) int64: 2 * pair for chosen, 2 * pair + 1 for rejected

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Scored(NamedTuple):
    """Log-probs of a batch, in nats, float32."""

    token_logps: Tensor  # (T,)
    chosen_logps: Tensor  # (B,) sums
    rejected_logps: Tensor  # (B,)
    ln_ches: Tensor | None  # (B,) None in the separate layout


class Layout(NamedTuple):
    """Which layout a model is scored in, and why the shared one is not used where it is not.

    `alone`: a row's numbers depend on the longest row beside it, so each row runs by itself.
    """

    shared: bool
    reason: str
    alone: bool = False


class _Row(NamedTuple):
    """One row of a batch before padding."""

    ids: list[int]
    positions: list[int]
    segments: list[int]


def _shared_row(prompt: list[int], chosen: list[int], rejected: list[int]) -> _Row:
    start = len(prompt)
    positions = [*range(start + len(chosen)), *range(start, start + len(rejected))]
    segments = [PROMPT] * start + [CHOSEN] * len(chosen) + [REJECTED] * len(rejected)
    return _Row(prompt + chosen + rejected, positions, segments)


def _separate_row(prompt: list[int], completion: list[int], segment: int) -> _Row:
    ids = prompt + completion
    return _Row(ids, [*range(len(ids))], [PROMPT] * len(prompt) + [segment] * len(completion))


def _padded(lists: list[list[int]], length: int, filler: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([values + [filler] * (length - len(values)) for values in lists], dtype=dtype)


def make_batch(pairs: Sequence[Sides], *, shared: bool, pad_id: int = 0) -> Batch:
    """Lay out pairs as rows, padded on the right to the longest."""
    rows: list[_Row] = []
    firsts: list[tuple[int, int]] = []  # row and column of each side's first token
    for prompt, chosen, rejected in pairs:
        start, here = len(prompt), len(rows)
        if shared:
            rows.append(_shared_row(prompt, chosen, rejected))
            firsts += [(here, start), (here, start + len(chosen))]
        else:
            rows += [_separate_row(prompt, chosen, CHOSEN), _separate_row(prompt, rejected, REJECTED)]
            firsts += [(here, start), (here + 1, start)]
    length = max(len(row.ids) for row in rows)
    predictors, targets, sides = _completions(pairs, firsts, length)
    return Batch(
        _padded([row.ids for row in rows], length, pad_id, torch.int64),
        _padded([row.positions for row in rows], length, 0, torch.int64),
        _padded([row.segments for row in rows], length, PADDING, torch.int8),
        torch.tensor(predictors, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(sides, dtype=torch.int64),
    )


def _completions(
    pairs: Sequence[Sides], firsts: Sequence[tuple[int, int]], length: int
) -> tuple[list[int], list[int], list[int]]:
    """Flat predicting position, token and side of every completion token."""
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    completions = [(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    for side, ((prompt, ids), (row, first)) in enumerate(zip(completions, firsts, strict=True)):
        # the first token of either side is predicted by the last prompt token, each later one by its predecessor
        base = row * length
        predictors += [base + len(prompt) - 1, *range(base + first, base + first + len(ids) - 1)]
        targets += ids
        sides += [side] * len(ids)
    return predictors, targets, sides


def shared_prefix_mask(segments: Tensor) -> Tensor:
    """Who may attend to whom: (R, L) segments to (R, 1, L, L) booleans, True = query may see key.

    Causal, to the prompt and to one's own segment. Padding sees what comes before it, so that no row is empty; nothing
    sees padding but padding.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    return (causal & ((key == PROMPT) | (key == query)))[:, None]


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits from last states (n, H) to (n, V): the output matrix and what the architecture does after it."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and 3
        logits = torch.tanh(logits / cap) * cap
    return logits


def logps_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax in float32 at the targets: (n, V) and (n,) to (n,)."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def chunked_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`logps_from_logits(head(hidden), targets)` without ever holding more than `chunk` rows of logits.

    In the backward each chunk's logits are computed again.
    """

    def one(states: Tensor, ids: Tensor) -> Tensor:
        return logps_from_logits(head(states), ids)

    pieces = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([one(states, ids) for states, ids in pieces])
    # no dropout runs in the head, so no RNG state is worth keeping
    return torch.cat([checkpoint(one, s, ids, use_reentrant=False, preserve_rng_state=False) for s, ids in pieces])


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
        self.model, self.dtype, self.layout = model, dtype, layout

    def forward(self, batch: Batch) -> Scored:
        """Score a batch laid out as `self.layout` says."""
        with autocast(REGIMES[self.dtype], batch.input_ids.device):
            states, logps = self._shared(batch) if self.layout.shared else self._separate(batch)
        sums = logps.new_zeros(int(batch.sides[-1]) + 1).index_add(0, batch.sides, logps)
        ches = None if states is None else length_normalised_ches(states.detach(), batch.sides)
        return Scored(logps, sums[0::2], sums[1::2], ches)

    def _shared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        allowed = shared_prefix_mask(batch.segments)
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            weights = REGIMES[self.dtype].weights
            mask = torch.zeros(allowed.shape, dtype=weights, device=allowed.device)
            mask = mask.masked_fill(~allowed, torch.finfo(weights).min)
        else:
            mask = allowed
        out = model.base_model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        )
        states = out.last_hidden_state.flatten(0, 1)[batch.predictors]
        vocabulary = model.get_output_embeddings().weight.shape[0]
        chunk = max(16, CHUNK_LOGITS // vocabulary)
        return states, chunked_logps(lambda hidden: head_logits(model, hidden), states, batch.targets, chunk)

    def _separate(self, batch: Batch) -> tuple[None, Tensor]:
        model: Any = self.model
        attends = (batch.segments != PADDING).long()
        if not self.layout.alone:
            logits = model(input_ids=batch.input_ids, attention_mask=attends, use_cache=False).logits
            return None, logps_from_logits(logits.flatten(0, 1)[batch.predictors], batch.targets)
        length, pieces = batch.input_ids.shape[1], []
        for row, count in enumerate(attends.sum(-1).tolist()):
            mine = (batch.predictors >= row * length) & (batch.predictors < (row + 1) * length)
            logits = model(input_ids=batch.input_ids[row : row + 1, :count], use_cache=False).logits[0]
            pieces.append(logps_from_logits(logits[batch.predictors[mine] - row * length], batch.targets[mine]))
        return None, torch.cat(pieces)


def choose_layout(model: nn.Module, dtype: str, max_length: int) -> Layout:
    """The shared layout where it can be shown equal to the plain code on this very model, else the separate one.

    Two pairs of fixed pseudo-random tokens, one short and one long, are scored both ways, in float32 wherever the
    weights are. What two pairs cannot show is read from the config: attention windows shorter than max_length, and
    rotary factors that change with the longest sequence of a batch.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    if (window := attention_window(config)) is not None and window < max_length:
        return Layout(False, f"its sliding window ({window}) is shorter than max_length ({max_length})")
    if (limit := rotary_limit(config)) is not None and limit < max_length:
        if _has_rotary(config, "dynamic"):
            raise ModelError(
                f"its dynamic rotary factors above {limit} tokens depend on what was scored before",
                expected=f"precompute.max_length of at most {limit}",
                hint=f"--set precompute.max_length={limit}",
            )
        reason = f"its rotary factors change above {limit} tokens, max_length is {max_length}: one row at a time"
        return Layout(False, reason, alone=True)
    plain_dtype = "float32" if dtype == "bfloat16" else dtype
    device = next(model.parameters()).device
    pairs = _probe_pairs(int(model.get_input_embeddings().weight.shape[0]), max_length)  # type: ignore[operator]
    found = []
    for shared in (False, True):
        scorer = CompletionLogps(model, plain_dtype, Layout(shared, ""))
        try:
            with torch.no_grad():
                found.append(scorer(make_batch(pairs, shared=shared).to(device)).token_logps)
        except Exception as error:  # a model that cannot take the mask is no error, it is a reason
            if not shared or is_out_of_memory(error):  # the layout must not depend on free memory
                raise
            return Layout(False, f"it does not take the shared-prefix mask ({type(error).__name__})")
    if not bool(found[0].isfinite().all()):
        raise ModelError("the model's log-probs are not finite", expected="numbers: look for NaN or infinite weights")
    apart = float((found[0] - found[1]).abs().max())
    if not apart <= PROBE_TOLERANCE[dtype]:
        return Layout(False, f"shared and separate rows differ by {apart:.2g} nats a token")
    return Layout(True, "")


def _probe_pairs(vocabulary: int, max_length: int) -> list[Sides]:
    """A short pair, and one of up to 256 tokens a side, of fixed pseudo-random ids."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=draw).tolist()

    third = max(1, min(max_length, PROBE_TOKENS) // 3)
    return [Sides(ids(1), ids(1), ids(1)), Sides(ids(third), ids(2 * third), ids(third))]


def attention_window(config: Any) -> int | None:
    """The shortest reach of an attention layer in tokens, None where every layer sees all: names as in transformers."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if not getattr(config, "use_sliding_window", True):  # Qwen2 has the number and does not use it
        windows[0] = None
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min((window for window in windows if window is not None), default=None)


def _rotary_kinds(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a config: one dict, or one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _has_rotary(config: Any, name: str) -> bool:
    return any(kind.get("rope_type") == name for kind in _rotary_kinds(config))


def rotary_limit(config: Any) -> int | None:
    """The length above which rotary factors depend on the longest sequence (dynamic and longrope), None if never."""
    if not (_has_rotary(config, "dynamic") or _has_rotary(config, "longrope")):
        return None
    limits = [kind.get("original_max_position_embeddings") for kind in _rotary_kinds(config)]
    limits.append(getattr(config, "original_max_position_embeddings", None))
    return int(min((limit for limit in limits if limit), default=config.max_position_embeddings))
