"""The kernel against the plain code: float32 log_softmax of the model's own logits, one sequence at a time."""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    SIZES,
    TOKENIZERS,
    gemma2_config,
    gpt2_config,
    llama_config,
    mamba_config,
    mistral_config,
    plain_logps,
    random_ids,
    random_model,
)
from torch import Tensor

from prefkit.encode import Sides
from prefkit.logps import (
    CompletionLogps,
    Layout,
    Scored,
    choose_layout,
    chunked_logps,
    length_normalised_ches,
    make_batch,
    shared_prefix_mask,
)

A_TOKEN = 1e-4  # nats: what float32 may lose on one token
CONFIGS: dict[str, Callable[..., Any]] = {"llama": llama_config, "gpt2": gpt2_config, "gemma2": gemma2_config}
LAYOUTS = {"shared": Layout(True, ""), "separate": Layout(False, "for the test")}


def random_pairs(*lengths: tuple[int, int, int], seed: int = 1) -> list[Sides]:
    rng = random.Random(seed)
    return [Sides(*(random_ids(rng, count) for count in three)) for three in lengths]


PAIRS = random_pairs((12, 9, 20), (1, 1, 5), (25, 14, 11), (3, 7, 1))


def score(model: Any, pairs: Sequence[Sides], layout: Layout, dtype: str = "float32") -> Scored:
    found: Scored = CompletionLogps(model, dtype, layout)(make_batch(pairs, shared=layout.shared))
    return found


def plain(model: Any, pairs: Sequence[Sides]) -> Tensor:
    """All completion tokens, pair by pair, chosen before rejected."""
    return torch.cat([plain_logps(model, p.prompt, ids) for p in pairs for ids in (p.chosen, p.rejected)])


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).detach().abs().max())


def hh_pairs(data: Path, tokenizer: Any, count: int, limit: int) -> list[Sides]:
    """The first HH pairs of at most `limit` tokens in all, split at the last assistant turn."""
    found: list[Sides] = []
    with gzip.open(data / "hh" / "harmless_base_test_part.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            mark = "\n\nAssistant:"
            prompts, sides = zip(*(row[s].rpartition(mark)[::2] for s in ("chosen", "rejected")), strict=True)
            pair = Sides(*(tokenizer(text)["input_ids"] for text in (prompts[0] + mark, *sides)))
            if prompts[0] == prompts[1] and all(pair) and sum(map(len, pair)) <= limit:
                found.append(pair)
            if len(found) == count:
                break
    assert len(found) == count
    return found


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_real_text_scores_as_the_plain_code_in_either_layout(test_data: Path, tokenizer_name: str, name: str) -> None:
    tokenizer = TOKENIZERS[tokenizer_name](test_data)
    model = random_model(CONFIGS[name](len(tokenizer)))
    pairs = hh_pairs(test_data, tokenizer, 3, 150)
    expected = plain(model, pairs)
    assert expected.std() > 0.5
    for layout in LAYOUTS.values():
        assert largest(score(model, pairs, layout).token_logps, expected) <= A_TOKEN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sums_are_those_of_the_plain_tokens(layout: str, name: str) -> None:
    model = random_model(CONFIGS[name]())
    found = score(model, PAIRS, LAYOUTS[layout])
    chosen = torch.stack([plain_logps(model, p.prompt, p.chosen).sum() for p in PAIRS])
    rejected = torch.stack([plain_logps(model, p.prompt, p.rejected).sum() for p in PAIRS])
    assert largest(found.chosen_logps, chosen) <= 20 * A_TOKEN
    assert largest(found.rejected_logps, rejected) <= 20 * A_TOKEN
    assert found.token_logps.dtype == found.chosen_logps.dtype == torch.float32


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
@torch.no_grad()
def test_either_soft_cap_matters_in_the_tests_of_gemma2(cap: str) -> None:
    """Guards the tests above and below: a kernel without that cap would be far off."""
    capped, free = random_model(gemma2_config()), random_model(gemma2_config(380, **{cap: None}))
    assert largest(plain(capped, PAIRS), plain(free, PAIRS)) > 100 * A_TOKEN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_both_kinds_of_attention_take_the_mask(attention: str) -> None:
    model = random_model(llama_config(), attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert largest(score(model, PAIRS, LAYOUTS["shared"]).token_logps, plain(model, PAIRS)) <= A_TOKEN


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_neither_completion_sees_the_other(name: str) -> None:
    model = random_model(CONFIGS[name]())
    pair, other = random_pairs((8, 6, 7), (8, 6, 7), seed=3)
    before = score(model, [pair], LAYOUTS["shared"]).token_logps
    new_rejected = score(model, [pair._replace(rejected=other.rejected)], LAYOUTS["shared"]).token_logps
    new_chosen = score(model, [pair._replace(chosen=other.chosen)], LAYOUTS["shared"]).token_logps
    longer = score(model, [pair._replace(rejected=other.rejected * 3)], LAYOUTS["shared"]).token_logps
    assert largest(new_rejected[:6], before[:6]) <= 1e-6
    assert largest(longer[:6], before[:6]) <= 1e-5
    assert largest(new_chosen[6:], before[6:]) <= 1e-6
    assert largest(new_rejected[6:], before[6:]) > 0.1  # the change itself is seen
    assert largest(new_chosen[:6], before[:6]) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_padding_and_neighbours_do_not_change_a_pair(layout: str) -> None:
    model = random_model(llama_config())
    alone = torch.cat([score(model, [pair], LAYOUTS[layout]).token_logps for pair in PAIRS])
    assert largest(score(model, PAIRS, LAYOUTS[layout]).token_logps, alone) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_plain_code(layout: str, name: str) -> None:
    model = random_model(CONFIGS[name]())
    weights = torch.linspace(-1, 1, sum(len(p.chosen) + len(p.rejected) for p in PAIRS))
    found = torch.autograd.grad((score(model, PAIRS, LAYOUTS[layout]).token_logps * weights).sum(), model.parameters())
    expected = torch.autograd.grad((plain(model, PAIRS) * weights).sum(), model.parameters())
    for (parameter, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        assert largest(one, other) <= 1e-4 * float(other.abs().max()), parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_in_chunks_gives_the_same_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefkit.logps.CHUNK_LOGITS", 1)  # the least: 16 rows a chunk
    model = random_model(CONFIGS[name]())
    found, expected = score(model, PAIRS, LAYOUTS["shared"]).token_logps, plain(model, PAIRS)
    assert len(expected) > 3 * 16
    assert largest(found, expected) <= A_TOKEN
    head = model.get_output_embeddings().weight
    one, other = (torch.autograd.grad(values.sum(), head)[0] for values in (found, expected))
    assert largest(one, other) <= 1e-4 * float(other.abs().max())


@pytest.mark.parametrize("chunk", [1, 3, 11])
def test_chunks_of_any_size_equal_the_whole(chunk: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=draw, requires_grad=True)
    matrix = torch.randn(8, 50, generator=draw, requires_grad=True)
    targets = torch.randint(0, 50, (11,), generator=draw)
    pull = torch.randn(11, generator=draw)
    whole = (hidden @ matrix).log_softmax(-1)[torch.arange(11), targets]
    rows: list[int] = []

    def head(states: Tensor) -> Tensor:
        rows.append(len(states))
        return states @ matrix

    pieces = chunked_logps(head, hidden, targets, chunk)
    assert torch.allclose(pieces, whole, atol=1e-6)
    assert max(rows) == chunk
    assert sum(rows) == 11
    expected = torch.autograd.grad((whole * pull).sum(), (hidden, matrix))
    found = torch.autograd.grad((pieces * pull).sum(), (hidden, matrix))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.allclose(chunked_logps(head, hidden, targets, chunk), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_weights"])
@torch.no_grad()
def test_low_precision_is_as_far_from_float32_as_the_plain_code_in_it(dtype: str) -> None:
    model = random_model(llama_config())
    exact = plain(model, PAIRS)
    if dtype == "bfloat16_weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        rough = plain(model, PAIRS)
    found = score(model, PAIRS, LAYOUTS["shared"], dtype).token_logps
    assert found.dtype == torch.float32
    assert largest(rough, exact) > A_TOKEN  # low precision was used, there and here
    assert largest(found, exact) > A_TOKEN
    assert float((found - exact).square().mean().sqrt()) <= 2 * float((rough - exact).square().mean().sqrt())


# --- the rows of a batch, by hand


def test_a_shared_row_by_hand() -> None:
    batch = make_batch([Sides([7, 8], [9, 10], [11]), Sides([5], [6], [4])], shared=True, pad_id=3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 10, 11], [5, 6, 4, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]]
    assert batch.predictors.tolist() == [1, 2, 1, 5, 5]
    assert batch.targets.tolist() == [9, 10, 11, 6, 4]
    assert batch.sides.tolist() == [0, 0, 1, 2, 3]


def test_separate_rows_by_hand() -> None:
    batch = make_batch([Sides([7, 8], [9, 10], [11])], shared=False, pad_id=3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 10], [7, 8, 11, 3]]
    assert batch.predictors.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [9, 10, 11]


def test_who_sees_whom_by_hand() -> None:
    # prompt, prompt, chosen, chosen, rejected, rejected
    mask = shared_prefix_mask(torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int8))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


# --- ln-CHES


def test_ln_ches_by_hand() -> None:
    # S+ = (1, 0) + (3, 2) = (4, 2), n+ = 2; S- = (2, -1), n- = 1
    # <S+, S->/2 - |S+|^2/4 = (8 - 2)/2 - (16 + 4)/4 = -2
    states = torch.tensor([[1.0, 0.0], [3.0, 2.0], [2.0, -1.0]])
    assert length_normalised_ches(states, torch.tensor([0, 0, 1])).tolist() == [-2.0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_ln_ches_is_that_of_the_models_own_last_states(name: str) -> None:
    model = random_model(CONFIGS[name]())
    found = score(model, PAIRS, LAYOUTS["shared"]).ln_ches
    assert found is not None

    def mean_state(prompt: list[int], ids: list[int]) -> Tensor:
        out = model(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True, use_cache=False)
        states: Tensor = out.hidden_states[-1][0, len(prompt) - 1 : -1]
        return states.mean(0)

    for pair, value in zip(PAIRS, found, strict=True):
        plus, minus = mean_state(pair.prompt, pair.chosen), mean_state(pair.prompt, pair.rejected)
        expected = plus @ minus - plus @ plus
        assert abs(float(value - expected)) <= 1e-4 * max(1.0, float(plus @ plus))


@torch.no_grad()
def test_ln_ches_is_left_out_of_separate_sequences() -> None:
    assert score(random_model(llama_config()), PAIRS, LAYOUTS["separate"]).ln_ches is None


# --- which layout


@pytest.mark.parametrize("name", CONFIGS)
def test_ordinary_attention_shares_the_prefix(name: str) -> None:
    assert choose_layout(random_model(CONFIGS[name]()), "float32", 512) == Layout(True, "")


def test_a_sliding_window_shares_the_prefix_only_where_it_is_never_reached() -> None:
    model = random_model(mistral_config(window=32))
    assert choose_layout(model, "float32", 32).shared
    layout = choose_layout(model, "float32", 33)
    assert not layout.shared
    assert "sliding window (32)" in layout.reason
    assert "max_length (33)" in layout.reason


def test_local_attention_longer_than_any_probe_is_read_from_the_config() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=380,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=4096,
        attention_types=[[["global", "local"], 1]],
        window_size=2000,
    )
    assert choose_layout(random_model(config), "float32", 2000).shared
    assert not choose_layout(random_model(config), "float32", 2001).shared


def test_a_recurrent_model_is_scored_in_separate_sequences_with_a_reason() -> None:
    layout = choose_layout(random_model(mamba_config()), "float32", 512)
    assert not layout.shared
    assert layout.reason


def sized(name: str, **changes: Any) -> Callable[[], Any]:
    """A config class of transformers with the sizes of `SIZES` that it knows."""

    def make() -> Any:
        return getattr(transformers, name)(vocab_size=380, **(SIZES | changes))

    return make


MULTI_HEAD = {"num_key_value_heads": 4}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "tied llama": lambda: llama_config(tie_word_embeddings=True),
    "mistral, window 8": mistral_config,
    "gemma3, windows 8 and none": sized(
        "Gemma3TextConfig", head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen2, window in no layer": sized("Qwen2Config", sliding_window=8, use_sliding_window=False),
    "gpt-neo, local attention of 32": sized(
        "GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=32
    ),
    "gpt-neox": sized("GPTNeoXConfig", **MULTI_HEAD),
    "gpt-j, bias in the head": sized("GPTJConfig", **GPT_SIZES, rotary_dim=4),
    "phi, bias in the head": sized("PhiConfig"),
    "phi-3, rotary factors that depend on the length": sized(
        "Phi3Config",
        original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 512 / 24,
            "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0, 3.0, 2.0, 5.0],
        },
    ),
    "opt, learned positions": sized(
        "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, activation_function="relu"
    ),
    "bloom, alibi": sized("BloomConfig", n_layer=2, n_head=4),
    "mpt, alibi": sized("MptConfig", d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "falcon, one key head": sized("FalconConfig"),
    "cohere, logit_scale": sized("CohereConfig", logit_scale=0.25),
    "granite, logits_scaling": sized(
        "GraniteConfig", logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "mixtral, experts": sized("MixtralConfig", num_local_experts=4, sliding_window=None),
    "mamba": mamba_config,
    "mamba 2": sized("Mamba2Config", state_size=4, head_dim=8, num_heads=8, n_groups=1, chunk_size=8),
    "jamba, attention and state": sized(
        "JambaConfig", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_scores_as_its_plain_code_in_the_layout_it_is_given(name: str) -> None:
    model = random_model(ARCHITECTURES[name]())
    pairs = [*PAIRS, *random_pairs((20, 30, 17), seed=5)]
    expected = plain(model, pairs)
    assert expected.std() > 0.1
    layout = choose_layout(model, "float32", 64)
    apart = largest(score(model, pairs, layout).token_logps, expected)
    assert apart <= A_TOKEN, layout


SHARING = ["tied llama", "qwen2, window in no layer", "gpt-neox", "gpt-j, bias in the head", "phi, bias in the head"]
SHARING += ["opt, learned positions", "falcon, one key head", "cohere, logit_scale", "granite, logits_scaling"]
SHARING += ["mixtral, experts"]


@pytest.mark.parametrize("name", SHARING)
def test_what_follows_the_head_is_no_reason_to_give_up_the_shared_prefix(name: str) -> None:
    assert choose_layout(random_model(ARCHITECTURES[name]()), "float32", 512) == Layout(True, "")


@pytest.mark.parametrize("config", [mamba_config(), mistral_config()], ids=["mamba", "mistral, window 8"])
def test_separate_sequences_have_the_gradients_of_the_plain_code(config: Any) -> None:
    model = random_model(config)
    found = torch.autograd.grad(score(model, PAIRS, LAYOUTS["separate"]).chosen_logps.sum(), model.parameters())
    chosen = torch.cat([plain_logps(model, p.prompt, p.chosen) for p in PAIRS]).sum()
    expected = torch.autograd.grad(chosen, model.parameters())
    for (parameter, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        assert largest(one, other) <= 1e-4 * float(other.abs().max()) + 1e-7, parameter
