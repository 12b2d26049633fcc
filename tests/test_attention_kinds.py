"""Each kind of attention that precompute.attention names, held to the plain code: values, and who sees whom."""

import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, lively, lively_model
from test_architectures import A_TOKEN, MAX_LENGTH, PAIRS, largest, plain, scored
from tiny import random_ids, random_model

from prefkit.attention import FLEX_BLOCK, block_mask, visible
from prefkit.encode import Sides
from prefkit.errors import InputError
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps, Layout
from prefkit.packing import make_batch

MODELS = ["llama", "qwen3", "gemma2, soft caps and windows", "gpt2"]
WINDOWED = "gemma2, soft caps and windows"


def test_the_models_are_four_kinds_of_attention() -> None:
    heads = [lively_model(name).config for name in MODELS]
    assert len({type(config) for config in heads}) == len(MODELS)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_attention_is_the_plain_code(name: str) -> None:
    model = lively_model(name)
    expected = plain(model, PAIRS)
    layout = choose_layout(model, "float32", MAX_LENGTH, "packed")
    assert (layout.rows, layout.attention, layout.fast) == ("packed", "packed", True)
    assert largest(scored(model, layout, PAIRS), expected) <= A_TOKEN


OWN_KINDS = [(name, kind) for name in MODELS for kind in ("sdpa", "eager")]
OWN_KINDS.remove((WINDOWED, "sdpa"))  # the class itself refuses it: sdpa has no soft cap


@pytest.mark.parametrize(("name", "kind"), OWN_KINDS)
@torch.no_grad()
def test_the_classes_own_attention_is_the_plain_code(name: str, kind: str) -> None:
    model = lively_model(name, attn_implementation=kind)
    expected = plain(model, PAIRS)
    layout = choose_layout(model, "float32", MAX_LENGTH, kind)
    assert layout.attention == kind
    # a mask of ours says nothing of windows: no shared rows where they are shorter than max_length
    assert layout.rows == ("separate" if name == WINDOWED else "tree"), layout.name
    assert largest(scored(model, layout, PAIRS), expected) <= A_TOKEN, layout.name


@pytest.mark.parametrize("kind", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_no_kind_lets_one_branch_see_another(name: str, kind: str) -> None:
    model = lively_model(name)
    layout = Layout("packed" if kind == "packed" else "tree", kind)
    rng = random.Random(0)
    prompt, chosen, rejected, other = (random_ids(rng, count) for count in (20, 9, 12, 12))
    before = scored(model, layout, [Sides(prompt, chosen, rejected)])
    after = scored(model, layout, [Sides(prompt, chosen, other)])
    assert largest(after[:9], before[:9]) <= 1e-5
    assert largest(after[9:], before[9:]) > 0.1  # the change itself is seen


# --- flex_attention: compiled, forward only on a CPU

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention on a CPU is compiled by g++")


def unwindowed_gemma2() -> Any:
    config = ARCHITECTURES[WINDOWED].config()
    config.sliding_window = 512
    return lively(random_model(config))


FLEX: dict[str, Callable[[], Any]] = {
    "llama": lambda: lively_model("llama"),
    "qwen3": lambda: lively_model("qwen3"),
    "gemma2, soft caps": unwindowed_gemma2,
}


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", FLEX)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, whatever they are
@torch.no_grad()
def test_flex_attention_is_the_plain_code(name: str) -> None:
    torch._dynamo.reset()
    model = FLEX[name]()
    expected = plain(model, PAIRS)
    layout = choose_layout(model, "float32", MAX_LENGTH, "flex")
    assert (layout.rows, layout.attention, layout.fast) == ("packed", "flex", True)
    assert largest(scored(model, layout, PAIRS), expected) <= A_TOKEN


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", WINDOWED])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_flex_attention_is_refused_where_it_would_be_wrong(name: str) -> None:
    """GPT-2's class does not have it, and our block mask says nothing of windows."""
    torch._dynamo.reset()
    with pytest.raises(InputError, match="flex attention is not right"):
        choose_layout(lively_model(name), "float32", MAX_LENGTH, "flex")


@pytest.mark.parametrize("rows", ["packed", "tree"])
def test_the_block_mask_is_the_rule(rows: Any) -> None:
    """Every block that holds a visible pair is listed, as full where all of it is, and no other pair is let in."""
    rng = random.Random(0)
    prompt = random_ids(rng, 150)
    long = Sides(random_ids(rng, 300), random_ids(rng, 40), random_ids(rng, 290))
    pairs = [
        *PAIRS,
        Sides(prompt, random_ids(rng, 140), random_ids(rng, 3)),
        Sides(prompt, random_ids(rng, 9), [4]),
        long,
    ]
    batch = make_batch(pairs, rows=rows, multiple=FLEX_BLOCK)
    length = batch.input_ids.shape[1]
    assert length % FLEX_BLOCK == 0
    wanted = visible(batch.ends)[:, 0]
    mask = block_mask(batch.ends)
    found = torch.zeros_like(wanted)
    blocks = length // FLEX_BLOCK
    place = torch.arange(length)
    for row in range(len(wanted)):
        rule = torch.stack([mask.mask_mod(torch.tensor(row), torch.tensor(0), q, place) for q in place])
        for query in range(blocks):
            here = slice(query * FLEX_BLOCK, (query + 1) * FLEX_BLOCK)
            for count, listed, whole in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                for key in listed[row, 0, query, : int(count[row, 0, query])].tolist():
                    there = slice(key * FLEX_BLOCK, (key + 1) * FLEX_BLOCK)
                    assert not bool(found[row, here, there].any())  # listed once
                    found[row, here, there] = True if whole else rule[here, there]
    assert torch.equal(found, wanted)


def test_who_sees_whom_in_a_row_by_hand() -> None:
    """Sides of one prompt, the second a strict beginning of the first; another prompt beside them."""
    prompt = list(range(16))
    pairs = [Sides(prompt, [90, 91], [90]), Sides([50], [51], [52])]
    batch = make_batch(pairs, rows="packed")
    allowed = visible(batch.ends)[0, 0]
    ids = batch.input_ids[0].tolist()
    for query, row in enumerate(allowed.tolist()):
        seen = [ids[key] for key, sees in enumerate(row) if sees]
        position = int(batch.position_ids[0, query])
        assert len(seen) == position + 1  # a path from its root to itself
        assert seen[-1] == ids[query]
        assert seen in ([*prompt, 90, 91][: position + 1], [50, 51][: position + 1], [50, 52][: position + 1])


@torch.no_grad()
def test_a_scorer_changes_its_attention_when_it_is_told_to() -> None:
    model = lively_model("llama")
    expected = plain(model, PAIRS)
    scorer = CompletionLogps(model, "float32", Layout("packed", "packed"))
    for layout in (
        Layout("tree", "sdpa"),
        Layout("packed", "packed"),
        Layout("separate", "eager"),
        Layout("tree", "eager"),
    ):
        scorer.use(layout)
        assert largest(scorer(scorer.batch(PAIRS)).token_logps, expected) <= A_TOKEN, layout.name
