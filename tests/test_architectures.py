"""The kernel on every kind of causal LM that transformers has, against the plain code: one sequence at a time.

What each is and what is expected of it stands in architectures.py. Each is held to the plain code's values and
gradients on pairs that branch in every way, in the layout that `choose_layout` gives it and in the others it could be
given.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HEAD, LENGTH, OWN_ATTENTION, SCALED_BY_PLACE, TIES, lively, lively_model
from tiny import llama_config, plain_logps, random_ids, random_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from prefkit.encode import Sides
from prefkit.errors import InputError, ModelError
from prefkit.layouts import choose_layout
from prefkit.logps import CompletionLogps, Layout

MAX_LENGTH = 96
A_TOKEN = 1e-4  # nats
A_GRADIENT = 2e-4  # of a parameter's largest
NO_GRADIENT = 2e-6  # of the model's largest: a gradient that is 0 (a key bias) comes out as rounding


def every_kind_of_pair() -> list[Sides]:
    """Pairs that branch in every way a trie of sequences can, some longer than every window of the tiny models."""
    rng = random.Random(1)

    def ids(count: int) -> list[int]:
        return random_ids(rng, count)

    common, prompt, longer, shared = ids(22), ids(24), ids(21), ids(19)
    return [
        Sides(ids(1), ids(1), ids(1)),
        Sides(ids(1), ids(9), ids(4)),
        Sides(ids(6), common + ids(5), common + ids(9)),
        Sides(ids(5), shared, shared + ids(6)),
        Sides(ids(7), shared + ids(1), shared),
        Sides(prompt, ids(7), ids(11)),
        Sides(prompt, ids(3), ids(30)),
        Sides(longer, ids(20), ids(5)),
        Sides(longer, common, shared),
        Sides(longer, common + ids(2), ids(1)),
        Sides(longer + ids(3), ids(4), ids(4)),  # a prompt that another prompt begins
        Sides(ids(12), ids(5), ids(60)),
        Sides(ids(30), ids(60), ids(55)),  # 90 tokens
        Sides([*prompt, 5], [7, 7, 7, 8], [7, 7, 7, 7]),
        Sides(prompt, ids(7), ids(11)),
    ]


PAIRS = every_kind_of_pair()
COUNT = sum(len(pair.chosen) + len(pair.rejected) for pair in PAIRS)


def plain(model: Any, pairs: Sequence[Sides]) -> Tensor:
    """All completion tokens, pair by pair, chosen before rejected."""
    return torch.cat([plain_logps(model, p.prompt, ids) for p in pairs for ids in (p.chosen, p.rejected)])


def scored(model: Any, layout: Layout, pairs: Sequence[Sides]) -> Tensor:
    scorer = CompletionLogps(model, "float32", layout)
    found: Tensor = scorer(scorer.batch(pairs)).token_logps
    return found


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    apart = (one - other).detach().abs()
    assert bool(apart.isfinite().all())
    return float(apart.max()) if len(apart) else 0.0


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor | None]:
    """Of a weighted sum: no token's gradient can make up for another's."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    weights = torch.linspace(-1, 1, len(logps)) * torch.linspace(0.3, 2, len(logps)).cos()
    found = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


class Case(NamedTuple):
    """A model, what the plain code says, and the layout it is given."""

    name: str
    model: Any
    own: str  # attention
    plain: Tensor
    gradients: dict[str, Tensor | None]
    layout: Layout


def _case(name: str) -> Case:
    model = lively_model(name)
    own = model.config._attn_implementation
    expected = plain(model, PAIRS)
    slopes = gradients(model, expected)
    return Case(name, model, own, expected.detach(), slopes, choose_layout(model, "float32", MAX_LENGTH))


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if a.quick else [pytest.mark.slow]) for n, a in ARCHITECTURES.items()],
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with torch.random.fork_rng(devices=[]):
        yield _case(request.param)


@torch.no_grad()
def test_the_oracle_is_causal_the_same_again_and_far_from_flat(case: Case) -> None:
    model = case.model
    model.set_attn_implementation(case.own)
    longest = torch.tensor([PAIRS[12].prompt + PAIRS[12].chosen])
    whole = model(input_ids=longest, use_cache=False).logits[0]
    assert torch.equal(whole, model(input_ids=longest, use_cache=False).logits[0])
    if "longrope" not in case.name:  # there a longer text has other factors
        begun = model(input_ids=longest[:, :40], use_cache=False).logits[0]
        assert largest(begun, whole[:40]) <= A_TOKEN
    assert case.plain.std() > 0.2


SAID = {HEAD: "our head", LENGTH: "rotary factors change", TIES: "keys that may be equal"}
SAID[SCALED_BY_PLACE] = "scaled by their place"  # how a layout says it; else that it differed when tried


def test_the_layout_is_what_the_architecture_allows(case: Case) -> None:
    expected, layout = ARCHITECTURES[case.name], case.layout
    assert layout.fast == expected.fast, (layout.name, expected.because)
    if expected.fast:
        assert layout.rows == ("tree" if case.name in OWN_ATTENTION else "packed"), layout.name
        assert bool(layout.reason) == (layout.rows == "tree")
    else:
        assert re.search(
            SAID.get(expected.because, "differs from one|does not take it|scaled by their place"), layout.reason
        )


@torch.no_grad()
def test_tokens_score_as_the_plain_code(case: Case) -> None:
    assert largest(scored(case.model, case.layout, PAIRS), case.plain) <= A_TOKEN, case.layout.name


@torch.no_grad()
def test_tokens_score_the_same_one_by_one_and_in_another_order(case: Case) -> None:
    one_by_one = [scored(case.model, case.layout, [pair]) for pair in PAIRS]
    assert largest(torch.cat(one_by_one), case.plain) <= A_TOKEN, case.layout.name
    order = random.Random(2).sample(range(len(PAIRS)), len(PAIRS))
    again = scored(case.model, case.layout, [PAIRS[i] for i in order])
    assert largest(again, torch.cat([one_by_one[i] for i in order])) <= A_TOKEN, case.layout.name


def test_gradients_are_those_of_the_plain_code(case: Case) -> None:
    found = gradients(case.model, scored(case.model, case.layout, PAIRS))
    top = max(float(slope.abs().max()) for slope in case.gradients.values() if slope is not None)
    assert top > 0
    for parameter, expected in case.gradients.items():
        one = found[parameter]
        if expected is None:  # unused: no gradient, or nothing but zeros
            assert one is None or not bool(one.any()), parameter
            continue
        assert one is not None, parameter
        bound = A_GRADIENT * float(expected.abs().max()) + NO_GRADIENT * top
        assert largest(one, expected) <= bound, (parameter, case.layout.name)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@torch.no_grad()
def test_an_attention_that_is_asked_for_is_right_or_refused(case: Case, attention: str) -> None:
    """sdpa and eager are asked for when the model is loaded: they are the class's own then."""
    model = case.model
    try:
        model.set_attn_implementation(case.own if attention == "packed" else attention)
    except ValueError:
        pytest.skip("the class does not have it")
    expected = case.plain if attention == "packed" else plain(model, PAIRS)
    own = model.config._attn_implementation
    try:
        layout = choose_layout(model, "float32", MAX_LENGTH, attention)
    except InputError as refused:
        assert attention != own and attention in str(refused), refused  # noqa: PT017, PT018 - either is right
        return
    assert layout.attention == attention or not layout.fast
    assert largest(scored(model, layout, PAIRS), expected) <= A_TOKEN, layout.name


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["our head", "own head"])
@pytest.mark.parametrize("rows", ["separate", "alone"])
@torch.no_grad()
def test_ordinary_rows_are_right_where_the_head_is_ours_and_where_it_is_not(case: Case, rows: Any, fused: bool) -> None:
    if rows == "separate" and ARCHITECTURES[case.name].because in (LENGTH, TIES):
        pytest.skip("the longest row decides over the others: they are never laid out so")
    if fused and not case.layout.fused_head:
        pytest.skip("our head is not this model's")
    assert largest(scored(case.model, Layout(rows, case.own, fused), PAIRS), case.plain) <= A_TOKEN


@torch.no_grad()
def test_shared_rows_are_right_with_the_models_own_head(case: Case) -> None:
    if not case.layout.fast:
        pytest.skip("its prompts are not shared")
    assert largest(scored(case.model, case.layout._replace(fused_head=False), PAIRS), case.plain) <= A_TOKEN


# --- the tests above can fail: a kernel that forgot the feature would be far away


def _without(name: str, **changes: Any) -> tuple[Any, Any]:
    """A model, and the same weights in one whose config lacks a feature."""
    model = lively_model(name)
    config = ARCHITECTURES[name].config()
    for key, value in changes.items():
        setattr(config, key, value)
    other = random_model(config)
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2, soft caps and windows", {"attn_logit_softcapping": None}),
        ("gemma2, soft caps and windows", {"final_logit_softcapping": None}),
        ("gemma2, soft caps and windows", {"sliding_window": 512}),
        ("gemma2, soft caps and windows", {"sliding_window": 9}),
        ("gemma3, windows", {"sliding_window": 512}),
        ("cohere, logit_scale", {"logit_scale": 1.0}),
        ("cohere2, logit_scale and windows", {"sliding_window": 512}),
        ("granite, logits_scaling", {"logits_scaling": 1.0}),
        ("granite, logits_scaling", {"attention_multiplier": 8**-0.5}),
        ("hyperclova x, logits_scaling multiplies", {"logits_scaling": 1 / 3}),
        ("minicpm3, states scaled before the head", {"dim_model_base": 32}),
        ("falcon-h1, lm_head_multiplier", {"lm_head_multiplier": 1.0}),
        ("mistral, window 8", {"sliding_window": None}),
        ("mistral, window 8", {"sliding_window": 7}),
        ("mistral, window 8", {"sliding_window": 9}),
        ("qwen2, window in some layers", {"sliding_window": 512}),
        ("gpt-oss, sinks and windows", {"sliding_window": 512}),
        ("llama4, chunks of 8", {"attention_chunk_size": 512}),
        ("deepseek-v3.2, the 8 best keys", {"index_topk": 512}),
        ("recurrent-gemma", {"attention_window_size": 512}),
        ("phi-3, longrope", {"original_max_position_embeddings": 512}),
        ("smollm3, layers without rotary", {"no_rope_layers": [1, 1]}),
    ],
)
@torch.no_grad()
def test_each_feature_matters_in_these_tests(name: str, changes: dict[str, Any]) -> None:
    model, other = _without(name, **changes)
    assert largest(plain(model, PAIRS), plain(other, PAIRS)) > 100 * A_TOKEN


@torch.no_grad()
def test_the_sinks_of_gpt_oss_matter_in_these_tests() -> None:
    model, other = _without("gpt-oss, sinks and windows")
    for layer in other.model.layers:
        layer.self_attn.sinks.fill_(-1e9)
    assert largest(plain(model, PAIRS), plain(other, PAIRS)) > 100 * A_TOKEN


@pytest.mark.parametrize("name", ["gpt-j, bias in the head", "llama, biases everywhere", "gpt2"])
@torch.no_grad()
def test_each_bias_matters_in_these_tests(name: str) -> None:
    model, other = _without(name)
    for parameter, values in other.named_parameters():
        if parameter.endswith("bias"):
            values.zero_()
    assert largest(plain(model, PAIRS), plain(other, PAIRS)) > 100 * A_TOKEN


# --- features that show themselves only beyond a length


def _long_pairs(length: int) -> list[Sides]:
    rng = random.Random(4)
    prompt = random_ids(rng, length - 65)
    return [Sides(prompt, random_ids(rng, 65), random_ids(rng, 37)), Sides(prompt[:9], random_ids(rng, 3), prompt)]


LATE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral, window 8", {"sliding_window": 300}),
    "gemma2": ("gemma2, soft caps and windows", {"sliding_window": 300}),
    "gpt-neo": ("gpt-neo, local attention", {"window_size": 300}),
    "llama4": ("llama4, chunks of 8", {"attention_chunk_size": 300}),
    "llama4, temperature": ("llama4, chunks that are never full", {"attention_chunk_size": 700, "floor_scale": 300}),
    "recurrent-gemma": ("recurrent-gemma", {"attention_window_size": 300}),
    "deepseek-v3.2": ("deepseek-v3.2, the 8 best keys", {"index_topk": 300}),
    "doge": ("doge, the 8 best keys", {"keep_window_size": 300}),
    "minimax-m3": ("minimax-m3, the best blocks of keys", {"index_block_size": 16, "index_topk_blocks": 19}),
    "modernbert-decoder": ("modernbert-decoder", {"sliding_window": 300}),
}


@pytest.mark.slow
@pytest.mark.parametrize("late", LATE)
@torch.no_grad()
def test_what_shows_beyond_300_tokens_only_is_not_overlooked(late: str) -> None:
    name, changes = LATE[late]
    config = ARCHITECTURES[name].config()
    for key, value in (changes | {"max_position_embeddings": 1024}).items():
        assert hasattr(config, key)
        setattr(config, key, value)
    model = lively(random_model(config))
    pairs = _long_pairs(600)
    expected = plain(model, pairs)
    layout = choose_layout(model, "float32", 600)
    assert largest(scored(model, layout, pairs), expected) <= A_TOKEN, layout.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_rows_may_be_longer_than_the_model_has_positions(name: str) -> None:
    """A row of two sides has more tokens than either sequence: what counts is that each sequence fits.

    Longer than any probe, at that: what goes wrong there must not wait for the data.
    """
    config = ARCHITECTURES[name].config()
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, 300)
    model = lively(random_model(config))
    rng = random.Random(5)
    prompt = random_ids(rng, 20)
    pairs = [Sides(prompt, random_ids(rng, 280), random_ids(rng, 270)), Sides(prompt, prompt, random_ids(rng, 260))]
    expected = plain(model, pairs)
    layout = choose_layout(model, "float32", 300)
    assert largest(scored(model, layout, pairs), expected) <= A_TOKEN, layout.name


FAR_DOWN_THE_ROW: dict[str, tuple[str, dict[str, Any]]] = {
    "queries scaled by their place in the row, in steps": (
        "llama4, chunks that are never full",
        {"floor_scale": 700, "attn_scale": 1.0},
    ),
    "the best blocks of a row": (
        "minimax-m3, the best blocks of keys",
        {"index_block_size": 16, "index_topk_blocks": 44},
    ),
}


@pytest.mark.parametrize("what", FAR_DOWN_THE_ROW)
@torch.no_grad()
def test_a_row_of_many_pairs_may_reach_what_no_sequence_reaches(what: str) -> None:
    """Both begin at 704 tokens of a row, with sequences of 96 tokens at most."""
    name, changes = FAR_DOWN_THE_ROW[what]
    config = ARCHITECTURES[name].config()
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    model = lively(random_model(config))
    rng = random.Random(6)
    pairs = [*PAIRS, *(Sides(random_ids(rng, 30), random_ids(rng, 60), random_ids(rng, 66)) for _ in range(10))]
    layout = choose_layout(model, "float32", MAX_LENGTH)
    assert largest(scored(model, layout, pairs), plain(model, pairs)) <= A_TOKEN, layout.name


@torch.no_grad()
def test_a_model_with_more_embeddings_than_logits_has_a_layout() -> None:
    """Moshi, and a model whose input was grown: no completion has such a token, a prompt may."""
    model = lively_model("llama")
    model.model.embed_tokens = nn.Embedding(420, 32)
    nn.init.normal_(model.model.embed_tokens.weight, generator=torch.Generator().manual_seed(0))
    expected = plain(model, PAIRS)
    layout = choose_layout(model, "float32", MAX_LENGTH)
    assert layout.fast
    assert largest(scored(model, layout, PAIRS), expected) <= A_TOKEN


def test_dynamic_rotary_factors_are_refused_where_they_would_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = random_model(llama_config(rope_parameters=rope, max_position_embeddings=64))
    with pytest.raises(ModelError, match="dynamic rotary factors above 64"):
        choose_layout(model, "float32", MAX_LENGTH)


@pytest.mark.parametrize("short", [20, 24, 25, 60])
@torch.no_grad()
def test_longrope_scores_each_side_by_its_own_length(short: int) -> None:
    """The factors change above 24 tokens, so a prompt has one state with a short side and another with a long one."""
    model = lively_model("phi-3, longrope")
    rng = random.Random(0)
    pairs = [Sides(random_ids(rng, 16), random_ids(rng, short - 16), random_ids(rng, 40))]
    expected = plain(model, pairs)
    assert largest(scored(model, choose_layout(model, "float32", MAX_LENGTH), pairs), expected) <= A_TOKEN


# --- classes that do what no kernel could know


class LouderLogits(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Scales its logits after the head."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        out = super().forward(*args, **inputs)
        out.logits = out.logits * 1.1
        return out


class OneLogit(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Does something to a single token of its vocabulary."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        out = super().forward(*args, **inputs)
        change = torch.zeros_like(out.logits)
        change[..., 7] = 3.0
        out.logits = out.logits + change
        return out


class CutVocabulary(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Has fewer logits than its output matrix has rows."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        out = super().forward(*args, **inputs)
        out.logits = out.logits[..., :379]
        return out


class CoolerWithPosition(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Divides its logits by something that grows along the text."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        out = super().forward(input_ids=input_ids, **inputs)
        place = inputs.get("position_ids")
        place = torch.arange(input_ids.shape[1])[None] if place is None else place
        logits = out.logits / (1 + 0.01 * place[..., None])
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = logits[:, keep]
        return out


class _Renorming(LlamaModel):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_norm = self.norm
        self.norm: Any = nn.Identity()


class NormInTheHead(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """The last states of its base model come before the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Renorming(config)

    def forward(self, *args: Any, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        out = self.model(*args, **inputs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.last_norm(out.last_hidden_state[:, keep]))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


class _Placed(LlamaModel):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, **inputs: Any) -> Any:
        out = super().forward(*args, **inputs)
        states = out.last_hidden_state
        wave = torch.sin(torch.arange(states.shape[1])[:, None] * torch.linspace(0.1, 1, states.shape[2]))
        out.last_hidden_state = states + wave
        return out


class _Convolving(LlamaModel):  # type: ignore[no-untyped-call]
    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> Any:
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        before = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.5 * before, **inputs)


class _Counting(LlamaModel):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, position_ids: Any = None, **inputs: Any) -> Any:
        return super().forward(*args, **inputs)


class _WindowOf40(LlamaAttention):
    """Attends to 40 tokens, counted along the row, whatever the mask says beside; no config names the 40."""

    def forward(self, *_: Any, **inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        return _own_attention(self, inputs["hidden_states"], inputs["position_embeddings"], mask, window=40)


class _Maskless(LlamaAttention):
    """Causal along the row, whatever mask it is handed."""

    def forward(self, *_: Any, **inputs: Any) -> Any:
        return _own_attention(self, inputs["hidden_states"], inputs["position_embeddings"], None, window=None)


def _own_attention(layer: Any, states: Tensor, rotary: Any, mask: Any, window: int | None) -> tuple[Tensor, None]:
    shape = (*states.shape[:2], -1, layer.head_dim)
    query, key, value = (f(states).view(shape).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    rotate = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    query, key = rotate(query, key, *rotary)
    place = torch.arange(states.shape[1])
    seen = place[None, :] <= place[:, None]
    if window is not None:
        seen &= place[None, :] > place[:, None] - window
    if mask is not None and mask.dtype == torch.bool and mask.shape[-2:] == seen.shape:
        seen = seen & mask
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    return layer.o_proj(out.transpose(1, 2).reshape(*states.shape[:2], -1)), None


def _with_base(base: type[LlamaModel]) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        model = LlamaForCausalLM(config)
        model.model = base(config)
        return model

    return make


def _with_attention(attention: type[LlamaAttention]) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        model = LlamaForCausalLM(config)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn = attention(config, number)
        return model

    return make


class _Capacity(nn.Module):
    """A layer with room for the first 70 tokens of a batch; the others pass by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        room = (torch.arange(states.shape[0] * states.shape[1]) < 70).view(*states.shape[:2], 1)
        found: Tensor = self.inner(states) * room
        return found


def _with_capacity(config: Any) -> Any:
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = _Capacity(layer.mlp)
    return model


class _Squashing(nn.Linear):
    """A Linear that is none."""

    def forward(self, states: Tensor) -> Tensor:
        return 2 * torch.tanh(super().forward(states) / 2)


def _with_squashing_head(config: Any) -> Any:
    model = LlamaForCausalLM(config)
    model.lm_head = _Squashing(config.hidden_size, config.vocab_size, bias=False)
    return model


def _with_hook(config: Any) -> Any:
    model = LlamaForCausalLM(config)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 0.8)
    return model


ODD: dict[str, Callable[[Any], Any]] = {
    "logits scaled after the head": LouderLogits,
    "one logit changed after the head": OneLogit,
    "fewer logits than rows": CutVocabulary,
    "logits that depend on the position": CoolerWithPosition,
    "a norm between the last state and the head": NormInTheHead,
    "a subclass of Linear as its head": _with_squashing_head,
    "a hook on its head": _with_hook,
    "states that depend on the place in the row": _with_base(_Placed),
    "a convolution over neighbours": _with_base(_Convolving),
    "positions counted inside": _with_base(_Counting),
    "a mask that is ignored": _with_attention(_Maskless),
    "a window that no config names": _with_attention(_WindowOf40),
    "room for so many tokens of a batch": _with_capacity,
}


def _made(make: Callable[[Any], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(llama_config())
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.3)
    return lively(model.eval())


# these do what the plain code of Llama does, and only with the plain code's rows
PLAIN_IN_DISGUISE = {"a norm between the last state and the head", "positions counted inside", "a mask that is ignored"}


@pytest.mark.parametrize("odd", ODD)
@torch.no_grad()
def test_a_class_that_does_what_cannot_be_known_is_scored_right_and_not_fast(odd: str) -> None:
    model = _made(ODD[odd])
    pairs = [pair for pair in PAIRS if odd != "fewer logits than rows" or 379 not in pair.chosen + pair.rejected]
    expected = plain(model, pairs)
    if odd not in PLAIN_IN_DISGUISE:
        ordinary = _made(LlamaForCausalLM)
        assert largest(expected, plain(ordinary, pairs)) > 10 * A_TOKEN  # what it does is seen
    layout = choose_layout(model, "float32", MAX_LENGTH)
    assert not layout.fast, layout.name
    assert layout.reason
    assert largest(scored(model, layout, pairs), expected) <= A_TOKEN, layout.name


class _Adapted(nn.Linear):
    """A head with a low-rank addition that begins as nothing, as adapters do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.in_features, inner.out_features, bias=False)
        self.weight = inner.weight
        self.down = nn.Linear(inner.in_features, 4, bias=False)
        self.up = nn.Linear(4, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = super().forward(states) + self.up(self.down(states))
        return found


def test_a_head_whose_addition_begins_as_nothing_is_trained_right() -> None:
    model = _made(LlamaForCausalLM)
    model.lm_head = _Adapted(model.lm_head)
    layout = choose_layout(model, "float32", MAX_LENGTH)
    slopes = gradients(model, plain(model, PAIRS))
    found = gradients(model, scored(model, layout, PAIRS))
    first, again = slopes["lm_head.up.weight"], found["lm_head.up.weight"]
    assert first is not None
    assert bool(first.any())
    assert again is not None, layout.name
    assert largest(again, first) <= A_GRADIENT * float(first.abs().max())
    with torch.no_grad():
        model.lm_head.up.weight += 0.3
        assert largest(scored(model, layout, PAIRS), plain(model, PAIRS)) <= A_TOKEN, layout.name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("target", ["lm_head", "q_proj", "embed_tokens"])
def test_lora_is_trained_right_wherever_it_sits(target: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = peft.get_peft_model(_made(LlamaForCausalLM), settings)
    layout = choose_layout(model, "float32", MAX_LENGTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.3)
        assert largest(scored(model, layout, PAIRS), plain(model, PAIRS)) <= A_TOKEN, layout.name


def test_a_bias_of_the_head_that_begins_as_zeros_is_trained_right() -> None:
    model = lively_model("gpt-j, bias in the head")
    with torch.no_grad():
        model.lm_head.bias.zero_()
    layout = choose_layout(model, "float32", MAX_LENGTH)
    with torch.no_grad():
        model.lm_head.bias += torch.linspace(-1, 1, 380)
        assert largest(scored(model, layout, PAIRS), plain(model, PAIRS)) <= A_TOKEN


@torch.no_grad()
def test_a_model_is_left_as_it_was_found() -> None:
    """Its attention, its weights and its random state: choosing a layout is a question."""
    model = lively_model("llama")
    before = plain(model, PAIRS)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    choose_layout(model, "float32", MAX_LENGTH)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(plain(model, PAIRS), before)  # the plain code runs in it still, by its own attention


# --- memory


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any operation made: (elements, operation)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                self.found = max(self.found, (held, str(func)))
        return made


@pytest.mark.parametrize("name", ["llama", "mistral, window 8", "gpt2"])
@torch.no_grad()
def test_a_long_prompt_makes_no_mask_of_its_square(name: str) -> None:
    length = 4096
    config = ARCHITECTURES[name].config()
    config.max_position_embeddings = 8192
    model = random_model(config)
    rng = random.Random(0)
    pair = Sides(random_ids(rng, length), random_ids(rng, 64), random_ids(rng, 64))
    scorer = CompletionLogps(model, "float32", choose_layout(model, "float32", 512))
    assert scorer.layout.rows == "packed"
    with _Largest() as seen:
        found = scorer(scorer.batch([pair])).token_logps
    assert bool(found.isfinite().all())
    assert 0 < seen.found[0] < length * length // 4, seen.found


@torch.no_grad()
def test_the_hook_of_the_memory_test_sees_a_mask() -> None:
    with _Largest() as seen:
        torch.ones(64, 64, dtype=torch.bool).tril()
    assert seen.found[0] == 64 * 64
