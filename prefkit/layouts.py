"""In which layout a model is scored: the fastest that this very model is shown to score right.

The plain code is one sequence at a time through the model, log_softmax of its own logits. A layout is how pairs become
rows, which attention runs over them, and whose head: ours (head.py) or the model's own. Each is tried on a few rows of
fixed pseudo-random tokens, as long as the model's windows ask for, and taken only where every token agrees with the
plain code. What rows cannot show is read from the config: rotary factors that change with the longest sequence.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.encode import Sides
from prefkit.errors import InputError, ModelError, is_out_of_memory
from prefkit.head import unknown_head
from prefkit.logps import CompletionLogps, Layout
from prefkit.models import muted_transformers
from prefkit.packing import MIN_SHARED, Rows

PROBE_TOKENS = 256  # of the longest probe, a side, where no window asks for more
BEYOND_REACH = 64  # tokens by which a probe is longer than what an attention layer reaches
ROW_TOKENS, MOST_PROBES = 1024, 12  # of a packed row in the probe
REACH = re.compile(r"window(?!_layers|_pattern)|chunk_size|topk$|local_attention")
SPAN = 32  # tokens
# what a layout may differ by from the plain code on one token, in nats: rounding in float32 (bfloat16 is probed in it);
# where the weights themselves are bfloat16, the root mean square of any span, twice what the gate allows a sample
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4, "bfloat16_weights": 0.1}


PLAIN = Layout("alone", "", fused_head=False)


def choose_layout(
    model: nn.Module, dtype: str, max_length: int, attention: str = "auto", *, backward: bool = False
) -> Layout:
    """The fastest layout in which this model's log-probs are those of the plain code.

    Args:
        model: a causal LM in eval mode, with its own attention.
        dtype: its regime.
        max_length: of prompt + completion.
        attention: auto, or the one kind that may be used: packed, flex, sdpa, eager.
        backward: gradients are wanted: auto leaves flex out, whose backward no probe has seen.

    Raises:
        ModelError: not even the plain code gives finite numbers.
        InputError: the attention that was asked for cannot be shown right.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    own = str(config._attn_implementation)
    limit = rotary_limit(config) or max_length
    if limit < max_length and _has_rotary(config, "dynamic"):
        raise ModelError(
            f"its dynamic rotary factors above {limit} tokens depend on what was scored before",
            expected=f"precompute.max_length of at most {limit}",
            hint=f"--set precompute.max_length={limit}",
        )
    vocabulary = num_predicted(model)
    probe = _Probe(model, dtype, _probe_pairs(vocabulary, max_length, attention_reaches(config)), own)
    no_head = unknown_head(model.get_output_embeddings(), vocabulary) or probe.tried(Layout("alone", own))  # type: ignore[operator]
    fused = not no_head
    if limit < max_length:
        reason = f"its rotary factors change above {limit} tokens, max_length is {max_length}"
        return Layout("alone", own, fused_head=fused, reason=reason)
    reasons: list[str] = []
    for rows, kind in _candidates(next(model.parameters()).device.type, attention, own, backward=backward):
        layout = Layout(rows, kind, fused_head=fused)
        if layout == PLAIN._replace(attention=own):
            break  # what all others are held to
        reason = _unseen(config, layout, dtype, max_length) or probe.tried(layout)
        if not reason:
            return layout._replace(reason="; ".join([*reasons, *([f"our head: {no_head}"] if no_head else [])]))
        reasons.append(f"{'a row a pair' if rows == 'tree' else kind if rows == 'packed' else rows}: {reason}")
    if attention not in ("auto", own):
        raise InputError(
            f"{attention} attention is not right for this model: {'; '.join(reasons) or 'its class has none'}",
            where="precompute.attention",
            hint="--set precompute.attention=auto",
        )
    return PLAIN._replace(attention=own, reason="; ".join(reasons))


def _candidates(device: str, attention: str, own: str, *, backward: bool) -> Iterator[tuple[Rows, str]]:
    """Rows and attention, the fastest first; what all are held to comes last."""
    if attention == "flex" or (attention == "auto" and device == "cuda" and not backward):
        yield "packed", "flex"
    if attention in ("auto", "packed"):
        yield "packed", "packed"
    if attention in ("auto", own):
        yield "tree", own
        yield "separate", own
        yield "alone", own


def _unseen(config: Any, layout: Layout, dtype: str, max_length: int) -> str:
    """What no probe is long enough, or unlucky enough, to show."""
    if layout.rows in ("packed", "tree") and getattr(config, "attn_temperature_tuning", None):  # Llama 4
        return "its queries are scaled by their place in the row"
    if layout.rows != "alone" and (getattr(config, "keep_window_size", None) or max_length) < max_length:  # Doge
        return "it chooses among keys that may be equal, which rounding decides"
    # what reaches less far than a sequence is no part of a mask made from the trie, and bfloat16 could hide that
    masked = layout.attention == "flex" or (layout.rows == "tree" and dtype == "bfloat16_weights")
    reaches = [reach for reach in attention_reaches(config) if reach < max_length]
    return f"its layers may reach no further than {reaches[0]} tokens" if masked and reaches else ""


class _Probe:
    """A model's plain log-probs of some pairs, and what a layout has against them."""

    def __init__(self, model: nn.Module, dtype: str, pairs: list[Sides], own: str) -> None:
        self.model, self.pairs = model, pairs
        self.dtype = "float32" if dtype == "bfloat16" else dtype  # its weights are float32: nothing to be lost
        self.plain = self._scored(PLAIN._replace(attention=own))
        self.tolerance = PROBE_TOLERANCE[dtype]
        if not bool(self.plain.isfinite().all()):
            raise ModelError(
                "the model's log-probs are not finite", expected="numbers: look for NaN or infinite weights"
            )

    def _scored(self, layout: Layout) -> Tensor:
        with torch.no_grad(), muted_transformers():
            scorer = CompletionLogps(self.model, self.dtype, layout)
            found: Tensor = scorer(scorer.batch(self.pairs)).token_logps
        return found

    def _worst(self, apart: Tensor) -> float:
        """The largest difference of a token, or in bfloat16 weights the largest root mean square of some SPAN tokens.

        By spans, so that a fault in few tokens is not lost among many.
        """
        if self.dtype != "bfloat16_weights":
            return float(apart.abs().max())
        return max(float(some.square().mean().sqrt()) for some in torch.split(apart, SPAN))

    def tried(self, layout: Layout) -> str:
        """Why a layout is not right for the model, "" if it is."""
        try:
            found = self._scored(layout)
        except Exception as error:  # a model that cannot take the rows is no error, it is a reason
            if is_out_of_memory(error):  # the layout must not depend on free memory
                raise
            reason = f"the class does not take it ({type(error).__name__})"
        else:
            worst = self._worst(found - self.plain)
            reason = "" if worst <= self.tolerance else f"differs from one sequence at a time by {worst:.2g} nats"
        return reason


def num_predicted(model: Any) -> int:
    """How many ids the model both takes and predicts: some classes have more embeddings than logits, or fewer."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return int(min(model.get_input_embeddings().weight.shape[0], logits.shape[-1]))


def _probe_pairs(vocabulary: int, max_length: int, reaches: list[int]) -> list[Sides]:
    """Pairs of fixed pseudo-random ids, within max_length, that make every kind of branch, and a row of ROW_TOKENS.

    A shortest pair; a pair as long as the probe (beyond every reach that is shorter than max_length); two pairs with
    one prompt, of whose responses two begin alike; and as many more as fill the row.
    """
    draw = torch.Generator().manual_seed(0)
    beyond = max((reach + BEYOND_REACH for reach in reaches if reach < max_length), default=0)
    longest, usual = min(max(PROBE_TOKENS, beyond), max_length), min(PROBE_TOKENS, max_length)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (max(1, count),), generator=draw).tolist()

    third, some = usual // 3, usual // 4
    prompt, common = ids(some), ids(MIN_SHARED)
    pairs = [
        Sides(ids(1), ids(1), ids(1)),
        Sides(ids(longest - third), ids(third), ids(third // 2)),  # a long prompt: completions cost logits
        Sides(prompt, common + ids(some), common + ids(1)),
        Sides(prompt, ids(some), ids(some + 3)),
    ]
    pairs = [Sides(p, c[: longest - len(p)], r[: longest - len(p)]) for p, c, r in pairs]
    while len(pairs) < MOST_PROBES and sum(len(ids) for pair in pairs for ids in pair) < ROW_TOKENS:
        pairs.append(Sides(ids(some), ids(some), ids(third)))
    return pairs


def attention_reaches(config: Any) -> list[int]:
    """Lengths at which a class may begin to attend otherwise: windows, chunks, numbers of chosen keys.

    Read from every whole number of the config whose name says so, since a probe below it would show nothing.
    """
    values = {name: value for name, value in config.to_dict().items() if type(value) is int and value > 0}
    if not getattr(config, "use_sliding_window", True):  # Qwen2 has the number and does not use it
        values.pop("sliding_window", None)
    reaches = {value for name, value in values.items() if REACH.search(name)}
    if "index_topk_blocks" in values and "index_block_size" in values:  # MiniMax-M3 chooses blocks of keys
        reaches.add(values["index_topk_blocks"] * values["index_block_size"])
    return sorted(reaches)


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
