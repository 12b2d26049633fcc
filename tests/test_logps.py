"""The kernel against the plain code: float32 log_softmax of the model's own logits, one sequence at a time."""

import functools
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import LONGROPE
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
from prefkit.errors import InputError, ModelError
from prefkit.layouts import PLAIN, SPAN, _candidates, attention_reaches, choose_layout
from prefkit.logps import CompletionLogps, Layout, Scored, length_normalised_ches

A_TOKEN = 1e-4  # nats: what float32 may lose on one token
CONFIGS: dict[str, Callable[..., Any]] = {"llama": llama_config, "gpt2": gpt2_config, "gemma2": gemma2_config}
LAYOUTS = {
    "packed": Layout("packed", "packed"),
    "packed, own head": Layout("packed", "packed", fused_head=False),
    "tree": Layout("tree", "eager"),
    "separate": Layout("separate", "eager"),
    "separate, own head": Layout("separate", "eager", fused_head=False),
    "alone": Layout("alone", "eager"),
    "plain": PLAIN._replace(attention="eager"),
}
SHARING = ["packed", "packed, own head", "tree"]


def random_pairs(*lengths: tuple[int, int, int], seed: int = 1) -> list[Sides]:
    rng = random.Random(seed)
    return [Sides(*(random_ids(rng, count) for count in three)) for three in lengths]


PAIRS = random_pairs((12, 9, 20), (1, 1, 5), (25, 14, 11), (3, 7, 1))
# one prompt twice, responses that begin alike, and one that the other begins with
PAIRS += [PAIRS[2]._replace(chosen=PAIRS[0].rejected), PAIRS[2]._replace(rejected=[*PAIRS[2].chosen[:5], 7, 8, 9])]
PAIRS += [PAIRS[2]._replace(rejected=PAIRS[2].chosen[:6])]


def score(model: Any, pairs: Sequence[Sides], layout: Layout, dtype: str = "float32") -> Scored:
    scorer = CompletionLogps(model, dtype, layout)
    found: Scored = scorer(scorer.batch(pairs))
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
def test_both_kinds_of_the_models_own_attention_take_the_mask(attention: str) -> None:
    model = random_model(llama_config(), attn_implementation=attention)
    found = score(model, PAIRS, Layout("tree", attention)).token_logps
    assert model.config._attn_implementation == attention
    assert largest(found, plain(model, PAIRS)) <= A_TOKEN


@torch.no_grad()
def test_a_layout_brings_its_attention_and_may_be_changed() -> None:
    model = random_model(llama_config())
    scorer = CompletionLogps(model, "float32", LAYOUTS["packed"])
    assert model.config._attn_implementation == "prefkit_packed"
    before = scorer(scorer.batch(PAIRS)).token_logps
    scorer.use(Layout("tree", "sdpa"))
    assert model.config._attn_implementation == "sdpa"
    assert 0 < largest(scorer(scorer.batch(PAIRS)).token_logps, before) <= A_TOKEN


@torch.no_grad()
def test_a_model_in_packed_rows_still_generates() -> None:
    """Ordinary rows under our attention are causal: whoever is handed the model may use it."""
    model = random_model(llama_config())
    ids = torch.tensor([PAIRS[2].prompt])
    expected = model(input_ids=ids).logits
    CompletionLogps(model, "float32", LAYOUTS["packed"])
    assert largest(model(input_ids=ids).logits, expected) <= A_TOKEN


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_neither_completion_sees_the_other(name: str, layout: str) -> None:
    model = random_model(CONFIGS[name]())
    pair, other = random_pairs((8, 6, 7), (8, 6, 7), seed=3)
    before = score(model, [pair], LAYOUTS[layout]).token_logps
    new_rejected = score(model, [pair._replace(rejected=other.rejected)], LAYOUTS[layout]).token_logps
    new_chosen = score(model, [pair._replace(chosen=other.chosen)], LAYOUTS[layout]).token_logps
    longer = score(model, [pair._replace(rejected=other.rejected * 3)], LAYOUTS[layout]).token_logps
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


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_weights"])
@torch.no_grad()
def test_low_precision_is_as_far_from_float32_as_the_plain_code_in_it(dtype: str) -> None:
    model = random_model(llama_config())
    exact = plain(model, PAIRS)
    if dtype == "bfloat16_weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        rough = plain(model, PAIRS)
    found = score(model, PAIRS, LAYOUTS["packed"], dtype).token_logps
    assert found.dtype == torch.float32
    assert largest(rough, exact) > A_TOKEN  # low precision was used, there and here
    assert largest(found, exact) > A_TOKEN
    assert float((found - exact).square().mean().sqrt()) <= 2 * float((rough - exact).square().mean().sqrt())


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
    found = score(model, PAIRS, LAYOUTS["packed"]).ln_ches
    assert found is not None

    def mean_state(prompt: list[int], ids: list[int]) -> Tensor:
        out = model(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True, use_cache=False)
        states: Tensor = out.hidden_states[-1][0, len(prompt) - 1 : -1]
        return states.mean(0)

    for pair, value in zip(PAIRS, found, strict=True):
        plus, minus = mean_state(pair.prompt, pair.chosen), mean_state(pair.prompt, pair.rejected)
        expected = plus @ minus - plus @ plus
        assert abs(float(value - expected)) <= 1e-4 * max(1.0, float(plus @ plus))


def test_ln_ches_is_left_out_where_there_will_be_a_backward() -> None:
    assert score(random_model(llama_config()), PAIRS, LAYOUTS["packed"]).ln_ches is None


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_ln_ches_is_the_same_in_every_layout_and_left_out_with_the_models_own_head(layout: str) -> None:
    model = random_model(llama_config())
    expected, found = (score(model, PAIRS, LAYOUTS[name]).ln_ches for name in ("packed", layout))
    assert expected is not None
    if not LAYOUTS[layout].fused_head:
        assert found is None
    else:
        assert found is not None
        assert largest(found, expected) <= 1e-4 * float(expected.abs().max())


# --- which layout


@pytest.mark.parametrize("name", CONFIGS)
def test_ordinary_attention_is_packed(name: str) -> None:
    layout = choose_layout(random_model(CONFIGS[name]()), "float32", 512)
    assert layout == LAYOUTS["packed"]
    assert layout.fast
    assert layout.name == "packed rows, prompts shared (packed attention)"


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_an_attention_that_is_asked_for(attention: str) -> None:
    model = random_model(llama_config(), attn_implementation="sdpa" if attention == "packed" else attention)
    layout = choose_layout(model, "float32", 128, attention)
    assert layout == Layout("packed" if attention == "packed" else "tree", attention)


def test_a_window_is_probed_beyond_its_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention that forgets the window, rows longer than it are wrong, and only those."""
    from prefkit import attention

    plain_function = attention.packed_attention
    monkeypatch.setitem(
        transformers.AttentionInterface._global_mapping,
        attention.PACKED,
        lambda *args, **kwargs: plain_function(*args, **(kwargs | {"sliding_window": None})),
    )
    model = random_model(mistral_config(window=300))
    assert choose_layout(model, "float32", 300).rows == "packed"
    model = random_model(mistral_config(window=300))
    layout = choose_layout(model, "float32", 400)
    assert layout.rows == "separate"
    assert "packed: differs from one sequence at a time by" in layout.reason
    assert "a row a pair: differs from one sequence at a time by" in layout.reason


def test_a_window_that_a_mask_does_not_know_is_never_left_to_bfloat16_to_show() -> None:
    """With the window forgotten the float32 model is far off; in bfloat16 weights it would pass for rounding."""
    config = mistral_config(window=100, initializer_range=0.1, max_position_embeddings=512)
    model = random_model(config, attn_implementation="sdpa").to(torch.bfloat16)
    assert choose_layout(model, "bfloat16_weights", 200, "sdpa").rows == "separate"
    layout = choose_layout(model, "bfloat16_weights", 200)
    assert layout.rows == "packed"  # our attention is told the window
    with pytest.raises(InputError, match="its layers may reach no further than 100 tokens"):
        choose_layout(model, "bfloat16_weights", 200, "flex")


def test_a_fault_in_few_tokens_is_not_lost_among_many_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CompletionLogps.forward

    def wrong_at_the_end(self: CompletionLogps, batch: Any) -> Scored:
        found = forward(self, batch)
        if self.layout.rows == "packed":
            found.token_logps[-SPAN:] += 0.2
        return found

    model, other = (random_model(llama_config(initializer_range=0.1)).to(torch.bfloat16) for _ in range(2))
    assert choose_layout(model, "bfloat16_weights", 200).rows == "packed"
    monkeypatch.setattr(CompletionLogps, "forward", wrong_at_the_end)
    layout = choose_layout(other, "bfloat16_weights", 200)
    assert layout.rows == "tree"
    assert "packed: differs from one sequence at a time by 0.2" in layout.reason


def test_gradients_are_not_left_to_a_kernel_whose_backward_no_probe_has_seen() -> None:
    assert [kind for _, kind in _candidates("cuda", "auto", "sdpa", backward=False)][:2] == ["flex", "packed"]
    assert "flex" not in [kind for _, kind in _candidates("cuda", "auto", "sdpa", backward=True)]
    assert [kind for _, kind in _candidates("cuda", "flex", "sdpa", backward=True)] == ["flex"]
    assert "flex" not in [kind for _, kind in _candidates("cpu", "auto", "sdpa", backward=False)]


def test_loading_asks_for_no_more_logits_than_a_completion_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window makes the probe long: its prompt, not its completions."""
    model = random_model(mistral_config(window=600, max_position_embeddings=2048))
    forward, seen = transformers.MistralForCausalLM.forward, []

    @functools.wraps(forward)
    def watched(self: Any, *args: Any, **inputs: Any) -> Any:
        found = forward(self, *args, **inputs)
        seen.append((inputs["input_ids"].shape[1], found.logits.shape[1]))
        return found

    monkeypatch.setattr(transformers.MistralForCausalLM, "forward", watched)
    assert choose_layout(model, "float32", 1024).rows == "packed"
    assert max(length for length, _ in seen) > 600
    assert max(logits for _, logits in seen) < 100


def test_reaches_by_the_names_of_transformers() -> None:
    local = transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=2000)
    assert attention_reaches(local) == [2000]
    assert attention_reaches(mistral_config(window=32)) == [32]
    assert attention_reaches(transformers.Qwen2Config(sliding_window=8, use_sliding_window=False)) == []
    assert attention_reaches(llama_config()) == []
    assert attention_reaches(llama_config(keep_window_size=9, index_topk=11)) == [9, 11]
    assert attention_reaches(llama_config(index_topk_blocks=3, index_block_size=50)) == [150]
    assert attention_reaches(llama_config(attention_chunk_size=77)) == [77]


def test_a_recurrent_model_is_scored_in_separate_sequences_with_a_reason() -> None:
    layout = choose_layout(random_model(mamba_config()), "float32", 512)
    assert not layout.fast
    assert layout.name.startswith("separate sequences (eager attention): packed: the class does not take it (")


def test_rotary_factors_that_depend_on_the_length_are_scored_one_sequence_at_a_time() -> None:
    config = transformers.Phi3Config(vocab_size=380, **(SIZES | LONGROPE))
    layout = choose_layout(random_model(config), "float32", 64)
    assert layout.rows == "alone"
    assert layout.fused_head
    assert layout.name.endswith("its rotary factors change above 24 tokens, max_length is 64")
    assert choose_layout(random_model(config), "float32", 24).fast


def test_a_dynamic_rotary_model_longer_than_its_factors_is_refused() -> None:
    config = llama_config(
        max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    )
    with pytest.raises(ModelError, match="dynamic rotary factors above 32 tokens depend on what was scored") as caught:
        choose_layout(random_model(config), "float32", 64)
    assert caught.value.expected == "precompute.max_length of at most 32"
    assert caught.value.hint == "--set precompute.max_length=32"


def test_an_attention_that_scores_wrong_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(InputError, match="packed attention is not right for this model: packed: the class") as caught:
        choose_layout(random_model(mamba_config()), "float32", 64, "packed")
    assert caught.value.hint == "--set precompute.attention=auto"


def test_an_attention_that_the_class_has_none_of_is_refused_where_it_was_asked_for() -> None:
    model = random_model(transformers.GPTJConfig(vocab_size=380, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    text = "sdpa attention is not right for this model: its class has none"
    with pytest.raises(InputError, match=text) as caught:
        choose_layout(model, "float32", 64, "sdpa")
    assert caught.value.where == "precompute.attention"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_longest_row_is_no_longer_than_max_length(name: str) -> None:
    """Learned positions end somewhere: a probe beyond them would be an error of ours."""
    for length in (2, 7, 40):
        config = gpt2_config(n_positions=length) if name == "gpt2" else CONFIGS[name](max_position_embeddings=length)
        assert choose_layout(random_model(config), "float32", length).fast
