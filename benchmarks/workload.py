"""What the model benchmarks work on: models with random weights, pairs as tokens, and the arithmetic both ask for.

Everything here is a function of its arguments and a seed: each contender, in its own process, builds the same model
and reads the same pairs. No model is downloaded; `PREFKIT_TEST_DATA` (or --data) names the folder of real pairs.
"""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

DATA = Path(os.environ.get("PREFKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TURN = "\n\nAssistant:"
DTYPES = ("float32", "bfloat16_weights")
SIDES = ("prompt", "chosen", "rejected")


class Size(NamedTuple):
    """A decoder with random weights: gated MLP, rotary positions, no dropout; `family` is the class it is built of."""

    family: str  # llama | qwen2
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool = True
    positions: int = 8192


# 22m: hidden 384, 6 layers, 22.9 M parameters of which 12.3 M are the embedding; 110m: 24.6 M of 109.5 M. The last
# three have the shape of Qwen2.5 0.5B, 1.5B and 7B
SIZES = {
    "tiny": Size("qwen2", 512, 64, 128, 2, 4, 2),
    "1m": Size("llama", 2_048, 128, 384, 4, 4, 4),
    "22m": Size("llama", 32_000, 384, 1_024, 6, 6, 6),
    "110m": Size("llama", 32_000, 768, 2_048, 12, 12, 12),
    "0.5b": Size("qwen2", 151_936, 896, 4_864, 24, 14, 2),
    "1.5b": Size("qwen2", 151_936, 1_536, 8_960, 28, 12, 2),
    "7b": Size("qwen2", 152_064, 3_584, 18_944, 28, 28, 4, tied=False),
}


def random_model(size: Size, dtype: str, device: str, seed: int = 0) -> Any:
    """A causal LM of that size on the device, in eval mode, its weights drawn there from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from prefkit.models import REGIMES, steady_sums

    steady_sums()  # as load_model does, and for both contenders
    family: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[size.family]
    config = family(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        return make(config, dtype=REGIMES[dtype].weights).eval()


# -- pairs


def real_pairs(data: Path, count: int, vocabulary: int, max_length: int = 1024) -> pl.DataFrame:
    """The first `count` pairs of the HH harmless test part, as GPT-2's tokens folded into the vocabulary (id modulo V).

    Folding changes which tokens they are, not how many: the work is that of the real texts. Sides are tokenised by
    themselves and end in the end token; pairs longer than `max_length` on either side are left out.
    """
    from transformers import GPT2Tokenizer

    if not (data / "hh").is_dir():
        raise SystemExit(f"{data}: no real data there; give its folder as --data or PREFKIT_TEST_DATA")
    tokenizer: Any = GPT2Tokenizer.from_pretrained(data / "tokenizers" / "gpt2")

    def ids(text: str) -> list[int]:
        return [int(i) % vocabulary for i in tokenizer(text)["input_ids"]]

    found: list[tuple[list[int], ...]] = []
    with gzip.open(data / "hh" / "harmless_base_test_part.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            (prompt, _, chosen), (same, _, rejected) = (row[side].rpartition(TURN) for side in ("chosen", "rejected"))
            if len(found) == count or prompt != same or chosen == rejected:
                continue
            sides = ids(prompt + TURN), *(ids(text + tokenizer.eos_token) for text in (chosen, rejected))
            if min(map(len, sides)) > 1 and len(sides[0]) + max(map(len, sides[1:])) <= max_length:
                found.append(sides)
    if len(found) < count:
        raise SystemExit(f"only {len(found)} of {count} pairs within {max_length} tokens in {data}")
    return frame_of(found)


def random_pairs(lengths: Sequence[tuple[int, int, int]], vocabulary: int, seed: int = 0) -> pl.DataFrame:
    """Pairs of random ids with these prompt, chosen and rejected lengths; no two share more than by chance."""
    rng = np.random.default_rng(seed)
    return frame_of([tuple(rng.integers(0, vocabulary, n).tolist() for n in three) for three in lengths])


def frame_of(pairs: Sequence[tuple[list[int], ...]]) -> pl.DataFrame:
    """The columns that planning, scoring and training read, as encode.py writes them."""
    ids = pl.DataFrame(
        pairs, schema={f"{side}_ids": pl.List(pl.Int32) for side in SIDES}, orient="row", strict=False
    ).with_row_index("number")
    return ids.select(
        pl.col("number").cast(pl.String).str.zfill(8).alias("pair_id"),
        *(f"{side}_ids" for side in SIDES),
        *(pl.col(f"{side}_ids").list.len().cast(pl.Int32).alias(f"num_{side}_tokens") for side in SIDES),
        *(pl.lit(0, pl.Int32).alias(name) for name in ("num_boundary_tokens", "num_unended")),
        *(pl.lit(value=False).alias(name) for name in ("spells_control_token", "prompt_cut")),
        *(pl.lit(value=False).alias(f"{side}_truncated") for side in SIDES[1:]),
    )


def num_tokens(pairs: pl.DataFrame) -> int:
    """Distinct tokens: prompt + chosen + rejected of every pair, the prompt once."""
    return int(pairs.select(pl.sum_horizontal(f"num_{side}_tokens" for side in SIDES).sum()).item())


# -- arithmetic


def num_parameters(size: Size) -> tuple[int, int]:
    """Parameters outside the embeddings, and of one embedding matrix; without norms and biases, some thousandths."""
    head_dim = size.hidden // size.heads
    attention = 2 * size.hidden * head_dim * (size.heads + size.key_value_heads)
    return size.layers * (attention + 3 * size.hidden * size.intermediate), size.vocabulary * size.hidden


def forward_flops(size: Size, pairs: pl.DataFrame) -> float:
    """Floating-point operations that scoring these pairs asks for, whatever is done beyond it.

    A multiplication and an addition are 2. Of P prompt, C chosen and R rejected tokens:

    * every matrix outside the embeddings meets each distinct token once: 2 * parameters * (P + C + R);
    * the output matrix meets each position that predicts a completion token: 2 * V * H * (C + R). The last prompt token
      predicts the first of either side, so one position a pair is counted twice;
    * attention: H multiply-adds for the score and H for the value, a layer and a visible pair of positions:
      4 * H * layers * visible, where prompt + chosen see (P + C)(P + C + 1) / 2 and rejected R * P + R (R + 1) / 2.

    Norms, rotary positions and softmax are not counted.
    """
    body, embedding = num_parameters(size)
    prompt, chosen, rejected = (pairs[f"num_{side}_tokens"].to_numpy().astype(np.float64) for side in SIDES)
    linear = 2 * body * (prompt + chosen + rejected) + 2 * embedding * (chosen + rejected)
    first = prompt + chosen
    visible = first * (first + 1) / 2 + rejected * prompt + rejected * (rejected + 1) / 2
    return float((linear + 4 * size.hidden * size.layers * visible).sum())


def linear_flops(size: Size, pairs: pl.DataFrame) -> float:
    """`forward_flops` without attention: what grows with the tokens alone."""
    body, embedding = num_parameters(size)
    completion = int(pairs.select(pl.col("num_chosen_tokens") + pl.col("num_rejected_tokens")).sum().item())
    return float(2 * body * num_tokens(pairs) + 2 * embedding * completion)
