"""Each kind of attention over a row of tries, against softmax over what the rule lets a token see."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefkit import attention
from prefkit.attention import FLEX_BLOCK, block_mask, packed_attention, visible
from prefkit.encode import Sides
from prefkit.errors import ModelError
from prefkit.packing import Batch, make_batch

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def some_batch(seed: int = 0, scale: int = 1, multiple: int = 1) -> Batch:
    """Pairs with and without a common prompt, responses that begin alike, and a long one."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(380) for _ in range(count * scale)]

    prompt, common = ids(20), ids(18)
    pairs = [
        Sides(prompt, common + ids(3), common + ids(9)),
        Sides(prompt, ids(4), ids(30)),
        Sides(ids(40), ids(1), ids(12)),
        Sides(ids(1), ids(2), ids(1)),
    ]
    return make_batch(pairs, rows="packed", multiple=multiple)


def drawn(length: int, value_size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    sizes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, value_size))
    return tuple(torch.randn(1, heads, length, size, generator=draw) for heads, size in sizes)  # type: ignore[return-value]


def by_the_rule(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float, **asked: Any) -> Tensor:
    """Softmax over all visible keys in float64, one token and head at a time."""
    window, cap, sinks = (asked.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    rule, depth = visible(batch.ends)[0, 0], batch.position_ids[0]
    found = torch.zeros(1, query.shape[2], HEADS, value.shape[-1], dtype=torch.float64)
    for head in range(HEADS):
        keys, values = (states[0, head * KEY_HEADS // HEADS].double() for states in (key, value))
        for place in range(query.shape[2]):
            seen = rule[place] & (True if window is None else depth > depth[place] - window)
            scores = keys[seen] @ query[0, head, place].double() * scale
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            shares = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp()))
            found[0, place, head] = shares @ values[seen]
    return found


ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a window of 5": {"sliding_window": 5},
    "a window of 1": {"sliding_window": 1},
    "a window longer than all": {"sliding_window": 1000},
    "a soft cap": {"softcap": 0.5},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all": {"softcap": 0.5, "sliding_window": 7, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize("value_size", [SIZE, 5])
def test_packed_attention_is_softmax_over_the_path(
    monkeypatch: pytest.MonkeyPatch, asked: str, block: int, value_size: int
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    batch = some_batch()
    states = drawn(int(batch.lengths[0]), value_size)
    found, weights = packed_attention(nn.Module(), *states, batch.branches, scaling=0.3, **ASKED[asked])
    assert weights is None
    assert torch.allclose(found.double(), by_the_rule(*states, batch, 0.3, **ASKED[asked]), atol=1e-5)


def test_the_scale_is_that_of_the_head_size_where_none_is_given() -> None:
    batch = some_batch()
    states = drawn(int(batch.lengths[0]))
    found, _ = packed_attention(nn.Module(), *states, batch.branches)
    assert torch.allclose(found.double(), by_the_rule(*states, batch, SIZE**-0.5), atol=1e-5)


def test_ordinary_rows_are_causal() -> None:
    query, key, value = (torch.cat([part, part.flip(2)]) for part in drawn(9))
    found, _ = packed_attention(nn.Module(), query, key, value, None, sliding_window=4)
    for row in range(2):
        line = make_batch([Sides([*range(4)], [*range(5)], [*range(5)])], rows="packed")
        q, k, v = (part[row : row + 1] for part in (query, key, value))
        expected = by_the_rule(q, k, v, line, SIZE**-0.5, sliding_window=4)
        assert torch.allclose(found[row : row + 1].double(), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"attention_mask": torch.zeros(1, 1, 3, 3)}, {"dropout": 0.1}])
def test_what_it_cannot_do_it_refuses(wrong: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"attention_mask": None} | wrong
    with pytest.raises(ModelError, match="packed attention takes the branch table of its batch, and no dropout"):
        packed_attention(nn.Module(), *drawn(3), **asked)


@pytest.mark.parametrize("seed", range(5))
def test_the_block_mask_says_what_the_rule_says_and_skips_the_rest(seed: int) -> None:
    batch = some_batch(seed, scale=4, multiple=FLEX_BLOCK)
    rule, mask = visible(batch.ends)[0, 0], block_mask(batch.ends)
    blocks = batch.input_ids.shape[1] // FLEX_BLOCK
    assert blocks >= 4
    tiles = rule.view(blocks, FLEX_BLOCK, blocks, FLEX_BLOCK)
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)
    for query in range(blocks):
        partial = set(mask.kv_indices[0, 0, query, : mask.kv_num_blocks[0, 0, query]].tolist())
        full = set(mask.full_kv_indices[0, 0, query, : mask.full_kv_num_blocks[0, 0, query]].tolist())
        assert full == set(every[query].nonzero()[:, 0].tolist())
        assert partial | full >= set(some[query].nonzero()[:, 0].tolist())
        assert max(partial | full) <= query
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) <= int(some.sum()) + blocks  # a close superset
    place = torch.arange(batch.input_ids.shape[1])
    applied = mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])
    assert applied.equal(rule)


def test_a_tensor_that_is_not_known_is_refused_even_if_it_is_zero() -> None:
    text = "packed attention does not know position_bias"
    with pytest.raises(ModelError, match=text):
        packed_attention(nn.Module(), *drawn(3), None, position_bias=torch.zeros(1), position_ids=torch.arange(3))


def test_layers_share_the_masks_of_a_batch() -> None:
    batch = some_batch()
    query, key, value = (part.requires_grad_() for part in drawn(int(batch.lengths[0])))
    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        for _ in range(3):
            packed_attention(nn.Module(), query, key, value, batch.branches)
    masks = {mask.data_ptr() for mask in vars(batch.branches)["prefkit_masks"].values()}
    branches = len({(row[0], row[1]) for row in batch.branches[0, 0].tolist() if row[2] != row[0]})
    assert len(masks) == branches > 2
    assert sum(pointer in masks for pointer in kept) == 3 * branches  # the same memory, layer after layer
