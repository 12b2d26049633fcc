"""Who sees whom in a row of tries (packing.py), for each kind of attention.

* packed: our own attention function, which transformers calls for every class that looks its attention up by name. Each
  branch of the trie attends to its path by one call of scaled_dot_product_attention, so nothing that is masked is
  computed and no mask is larger than BLOCK queries by the path. What a class asks for beside (scaling, soft cap,
  sliding window, sinks, grouped heads) comes with the call, as it does for its flash attention.
* flex: a BlockMask for flex_attention, made from `ends` block by block: no length x length mask, and what is masked is
  skipped.
* sdpa, eager: the class's own attention with a 4-D mask, a row a pair.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from transformers import AttentionInterface

from prefkit.errors import ModelError
from prefkit.packing import Batch

PACKED = "prefkit_packed"  # the name under which transformers finds our function
NAMES = {"packed": PACKED, "flex": "flex_attention", "sdpa": "sdpa", "eager": "eager"}
BLOCK = 512  # queries at once where a mask is needed
FLEX_BLOCK = 128  # tokens of a block of the BlockMask
IGNORED = ("position_ids",)  # tensors that classes hand to every kind of attention, and that change nothing in ours


def set_attention(model: Any, kind: str) -> None:
    """Have a model attend in one of the kinds of NAMES, or by a name of transformers' own.

    Raises:
        whatever transformers raises where the class does not support it.
    """
    model.set_attn_implementation(NAMES.get(kind, kind))


def attention_mask(model: Any, batch: Batch, kind: str) -> Any:
    """What to hand to the model as attention_mask for rows of tries: 4-D in every kind, so that it is left alone."""
    if kind == "packed":
        return batch.branches
    if kind == "flex":
        return block_mask(batch.ends)
    allowed = visible(batch.ends)
    if model.config._attn_implementation != "eager":
        return allowed
    weights = model.get_input_embeddings().weight.dtype
    mask = torch.zeros(allowed.shape, dtype=weights, device=allowed.device)  # eager adds its mask to the scores
    return mask.masked_fill(~allowed, torch.finfo(weights).min)


def visible(ends: Tensor) -> Tensor:
    """The rule itself: (R, L) ends to (R, 1, L, L) booleans, True = query may see key. Padding sees itself only."""
    place = torch.arange(ends.shape[1], device=ends.device)
    return ((place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < ends[:, None, :]))[:, None]


def block_mask(ends: Tensor) -> Any:
    """The rule as flex_attention's BlockMask, from (R, L) ends; L a multiple of FLEX_BLOCK.

    A block of queries needs a block of keys where some key's subtree reaches into it (a superset: the rule is applied
    inside), and needs no rule inside where every key of an earlier block covers all its queries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = ends.shape
    blocks = length // FLEX_BLOCK
    tiled = ends.view(rows, blocks, FLEX_BLOCK)
    start = torch.arange(blocks, device=ends.device) * FLEX_BLOCK
    earlier = start[None, :, None] >= start[None, None, :]  # (1, queries, keys)
    needed = earlier & (tiled.amax(-1)[:, None, :] > start[None, :, None])
    full = (start[None, :, None] > start[None, None, :]) & (
        tiled.amin(-1)[:, None, :] >= start[None, :, None] + FLEX_BLOCK
    )

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def may_see(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[row, key])

    partial_count, partial = listed(needed & ~full)
    full_count, fully = listed(full)
    return BlockMask.from_kv_blocks(
        partial_count, partial, full_count, fully, BLOCK_SIZE=FLEX_BLOCK, mask_mod=may_see, seq_lengths=(length, length)
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention along the branches of a trie; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (1, heads, N, head size).
        key: (1, key heads, N, head size); heads is a multiple of key heads.
        value: (1, key heads, N, value size).
        attention_mask: the branch table of packing.Batch; None for ordinary rows, each of which is one branch.
        scaling: of the scores; 1 / sqrt(head size) if None.
        dropout: must be 0.
        softcap: c in c * tanh(score / c), Gemma 2.
        sliding_window: a token sees itself and the sliding_window - 1 before it.
        kwargs: whatever else a class hands over; tensors that are not known are refused.
        s_aux: (heads,) sinks: a score beside those of the keys whose share of the softmax goes nowhere (gpt-oss).

    Returns:
        (1, N, heads, value size), and no weights.
    """
    if dropout or (attention_mask is not None and attention_mask.dtype != torch.int64):
        raise ModelError(
            "packed attention takes the branch table of its batch, and no dropout", where=str(type(module))
        )
    if unknown := [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in IGNORED]:
        raise ModelError(f"packed attention does not know {', '.join(unknown)}", where=str(type(module)))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if attention_mask is None:
        found = [_branch(query, key, value, scale, softcap, sliding_window, s_aux, {})]
        return found[0].transpose(1, 2).contiguous(), None
    tables = list(_tables(attention_mask))
    # all layers have the same masks, and a backward keeps them: they are made once for a batch, beside its table
    masks: dict[Any, Tensor] = vars(attention_mask).setdefault("prefkit_masks", {})
    at_query, at_key, at_value = (_cut(states, tables) for states in (query, key, value))
    found = []
    for start, stop, ranges in tables:
        some, keys, values = at_query([(start, stop)]), at_key(ranges), at_value(ranges)
        found.append(_branch(some, keys, values, scale, softcap, sliding_window, s_aux, masks))
    # classes reshape it by view
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


Ranges = list[tuple[int, int]]


def _cut(states: Tensor, tables: list[tuple[int, int, Ranges]]) -> Callable[[Ranges], Tensor]:
    """From ranges of a row to its states there, one after the other.

    Where there is a backward the row is split once, at every border: the gradient of a slice is as long as the row, so
    slices would make it quadratic in the branches.
    """
    if not torch.is_grad_enabled():
        return lambda ranges: _joined([states[:, :, first:end] for first, end in ranges])
    borders = sorted({0, states.shape[2]}.union(*(edge for _, _, ranges in tables for edge in ranges)))
    pieces = torch.split(states, [after - before for before, after in itertools.pairwise(borders)], dim=2)
    number = {border: place for place, border in enumerate(borders)}
    return lambda ranges: _joined([piece for a, b in ranges for piece in pieces[number[a] : number[b]]])


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


def _tables(branches: Tensor) -> Iterator[tuple[int, int, Ranges]]:
    """The branch table by branch: first query, end, and the ranges of keys on its path."""
    here: tuple[int, int] | None = None
    ranges: Ranges = []
    for start, stop, first, end in branches[0, 0].tolist():
        if here is not None and here != (start, stop):
            yield *here, ranges
            ranges = []
        here = (start, stop)
        ranges.append((first, end))
    if here is not None:
        yield *here, ranges


def _branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    masks: dict[Any, Tensor],
) -> Tensor:
    """The last n tokens of a path attend to the path: (1, heads, n, D) and (1, heads, m, D) to (1, heads, n, D)."""
    count, length = query.shape[2], key.shape[2]
    before = length - count
    plain = softcap is None and sinks is None
    if plain and before == 0 and (window is None or window >= length):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    found = []
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        first = 0 if window is None else max(0, before + start - window + 1)
        asked = (first, before + start, before + stop, window, query.dtype, query.device)
        if asked not in masks:
            masks[asked] = _mask(*asked)
        some, keys, values = (
            query[:, :, start:stop],
            key[:, :, first : before + stop],
            value[:, :, first : before + stop],
        )
        if plain:
            found.append(F.scaled_dot_product_attention(some, keys, values, attn_mask=masks[asked], scale=scale))
        else:
            found.append(_by_hand(some, keys, values, masks[asked], scale, softcap, sinks))
    return _joined(found)


def _mask(first: int, start: int, stop: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores of places start to stop of a path over its places first to stop: 0, or minus infinity.

    scaled_dot_product_attention would make as much of booleans, and keep it for the backward, in each call.
    """
    places = torch.arange(start, stop, device=device)[:, None]
    seen = torch.arange(first, stop, device=device)[None, :]
    allowed = seen <= places if window is None else (seen <= places) & (seen > places - window)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


def _by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What scaled_dot_product_attention has no argument for, with the softmax in float32."""
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float() + mask
    if sinks is not None:
        aside = sinks.float().view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, aside], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


AttentionInterface.register(PACKED, packed_attention)
