"""Tiny models of transformers' own causal LM classes, each with the feature that could go wrong in the kernel.

`ARCHITECTURES` says of each whether pairs can be laid out as branches of one row with the kernel's own head. That is
written down from what the architecture is: a model whose tokens meet in attention only, by a mask and by positions that
are handed to it, and whose logits are a linear map of the last state (scaled, capped, with a bias or without), can;
recurrence, convolutions, positions counted inside the model and a head of several layers cannot.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from tiny import SIZES, random_model


class Architecture(NamedTuple):
    """How to make a tiny one, and what the layout should be."""

    config: Callable[[], Any]
    fast: bool
    because: str  # why it is not fast, in our words: "" where it is
    quick: bool  # in the quick part of the tests


def _config(name: str, changes: Mapping[str, Any]) -> Any:
    return getattr(transformers, name)(vocab_size=380, **(SIZES | dict(changes)))


def _entry(name: str, because: str, quick: bool, changes: Mapping[str, Any]) -> Architecture:
    return Architecture(functools.partial(_config, name, changes), not because, because, quick)


def fast(name: str, **changes: Any) -> Architecture:
    return _entry(name, "", False, changes)


def slower(name: str, because: str, **changes: Any) -> Architecture:
    return _entry(name, because, False, changes)


def quick(one: Architecture) -> Architecture:
    return one._replace(quick=True)


FULL_AND_WINDOW = ["full_attention", "sliding_attention"]
MULTI_HEAD = {"num_key_value_heads": 4}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
HEADS = {"head_dim": 8}
WINDOWS = {"sliding_window": 8, "layer_types": FULL_AND_WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
LATENT |= {"num_key_value_heads": 4}
INDEXED = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_n_groups": 1}
MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
LONGROPE = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 512 / 24,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 5.0],
    },
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
BY_KIND = {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 500.0}}
ALL_OF_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

RECURRENT = "a recurrent state"
CONVOLVES = "a convolution over neighbours"
SCALED_BY_PLACE = "queries scaled by their place in the row"
COUNTS = "positions counted inside the model"
CHOOSES_KEYS = "which keys are seen depends on the others in the row"
TIES = "a token that occurs twice weighs the same twice, and which is kept is not said"
LENGTH = "rotary factors that depend on the length"
HEAD = "a head of several layers"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": quick(fast("LlamaConfig")),
    "llama, tied": quick(fast("LlamaConfig", tie_word_embeddings=True)),
    "llama, biases everywhere": fast("LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama, dynamic rotary factors above 512": fast(
        "LlamaConfig", rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}
    ),
    "llama, yarn": fast(
        "LlamaConfig",
        rope_parameters=ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    ),
    "mistral, window 8": quick(fast("MistralConfig", sliding_window=8)),
    "mistral, window 64, shorter than the longest only": fast("MistralConfig", sliding_window=64),
    "mixtral, experts": quick(fast("MixtralConfig", num_local_experts=4, sliding_window=None)),
    "qwen2, window in no layer": quick(fast("Qwen2Config", sliding_window=8, use_sliding_window=False)),
    "qwen2, window in some layers": quick(
        fast("Qwen2Config", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    ),
    "qwen2-moe": fast("Qwen2MoeConfig", **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": fast("Qwen3Config", **HEADS),
    "qwen3-moe": quick(fast("Qwen3MoeConfig", **HEADS, **EXPERTS)),
    "gemma": fast("GemmaConfig", **HEADS),
    "gemma2, soft caps and windows": quick(
        fast(
            "Gemma2Config",
            **HEADS,
            attn_logit_softcapping=0.5,
            final_logit_softcapping=1.5,
            query_pre_attn_scalar=8,
            sliding_window=8,
        )
    ),
    "gemma3, windows": quick(fast("Gemma3TextConfig", **HEADS, **WINDOWS, final_logit_softcapping=2.0)),
    "gemma3n": fast(
        "Gemma3nTextConfig",
        **HEADS,
        sliding_window=8,
        num_hidden_layers=4,
        layer_types=FULL_AND_WINDOW * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=380,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4": fast(
        "Gemma4TextConfig",
        **HEADS,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=380,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=2.0,
    ),
    "vaultgemma": fast("VaultGemmaConfig", **HEADS, **WINDOWS, attn_logit_softcapping=0.5, final_logit_softcapping=1.5),
    "gpt2": quick(fast("GPT2Config", **GPT_SIZES)),
    "gpt2, scaled by layer": fast("GPT2Config", **GPT_SIZES, scale_attn_by_inverse_layer_idx=True),
    "gpt-bigcode, one key head": fast("GPTBigCodeConfig", **GPT_SIZES),
    "gpt-neox": quick(fast("GPTNeoXConfig", **MULTI_HEAD)),
    "gpt-neox-japanese": fast("GPTNeoXJapaneseConfig", **MULTI_HEAD),
    "gpt-j, bias in the head": quick(fast("GPTJConfig", **GPT_SIZES, rotary_dim=4)),
    "codegen": fast("CodeGenConfig", **GPT_SIZES, rotary_dim=4),
    "gpt-neo, local attention": quick(
        slower(
            "GPTNeoConfig",
            "a window counted along the row",
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        )
    ),
    "openai-gpt": slower("OpenAIGPTConfig", "no mask of our own", **GPT_SIZES),
    "ctrl": fast("CTRLConfig", **GPT_SIZES, dff=48),
    "opt, learned positions": quick(
        fast("OPTConfig", ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, activation_function="relu")
    ),
    "opt, projected embeddings": fast("OPTConfig", ffn_dim=48, word_embed_proj_dim=16, init_std=0.3),
    "xglm": fast("XGLMConfig", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, init_std=0.3, pad_token_id=1),
    "biogpt": fast("BioGptConfig"),
    "phi, bias in the head": fast("PhiConfig", **MULTI_HEAD),
    "phi-3": fast("Phi3Config"),
    "phi-3, window 8": fast("Phi3Config", sliding_window=8),
    "phi-3, longrope": quick(slower("Phi3Config", LENGTH, **LONGROPE)),
    "phi-moe, bias in the head": fast("PhimoeConfig", num_local_experts=4, lm_head_bias=True),
    "phi-moe, window 8": slower(
        "PhimoeConfig", "a window that stands in the class's own mask only", num_local_experts=4, sliding_window=8
    ),
    "falcon, one key head": fast("FalconConfig"),
    "falcon, new decoder": fast("FalconConfig", new_decoder_architecture=True, num_kv_heads=2),
    "falcon, alibi": quick(slower("FalconConfig", COUNTS, alibi=True, multi_query=False)),
    "cohere, logit_scale": quick(fast("CohereConfig", logit_scale=0.25)),
    "cohere2, logit_scale and windows": quick(fast("Cohere2Config", **HEADS, **WINDOWS, logit_scale=0.25)),
    "cohere2-moe": fast("Cohere2MoeConfig", **HEADS, **WINDOWS, logit_scale=0.25),
    "cohere-compass": fast(
        "CohereCompassTextConfig",
        **HEADS,
        **WINDOWS,
        logit_scale=0.25,
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
    ),
    "granite, logits_scaling": quick(fast("GraniteConfig", logits_scaling=3.0, **MULTIPLIERS)),
    "granite, windows and sinks": fast("GraniteSWAConfig", logits_scaling=3.0, **MULTIPLIERS, **WINDOWS),
    "granite-moe": fast("GraniteMoeConfig", logits_scaling=3.0, num_local_experts=4, **MULTIPLIERS),
    "granite-moe-shared": fast(
        "GraniteMoeSharedConfig", logits_scaling=3.0, num_local_experts=4, shared_intermediate_size=16, **MULTIPLIERS
    ),
    "granite-moe-hybrid": slower(
        "GraniteMoeHybridConfig",
        RECURRENT,
        logits_scaling=3.0,
        num_local_experts=4,
        shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
        **MAMBA_2,
        **MULTIPLIERS,
    ),
    "hyperclova x, logits_scaling multiplies": quick(fast("HyperCLOVAXConfig", logits_scaling=3.0, **MULTIPLIERS)),
    "minicpm3, states scaled before the head": quick(
        fast("MiniCPM3Config", **LATENT, head_dim=4, dim_model_base=8, scale_emb=2, scale_depth=1.4)
    ),
    "olmo, clipped": fast("OlmoConfig", clip_qkv=0.5),
    "olmo2": fast("Olmo2Config"),
    "olmo3, windows": fast("Olmo3Config", **WINDOWS),
    "olmoe": fast("OlmoeConfig", **EXPERTS),
    "flex-olmo": fast("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "olmo-hybrid": slower("OlmoHybridConfig", RECURRENT, **DELTA),
    "stablelm": fast("StableLmConfig", use_qkv_bias=True),
    "stablelm, parallel residual": fast("StableLmConfig", use_parallel_residual=True, qk_layernorm=True),
    "starcoder2, window 8": fast("Starcoder2Config", sliding_window=8),
    "persimmon": fast("PersimmonConfig", **MULTI_HEAD),
    "fuyu": fast("FuyuConfig", text_config={"model_type": "persimmon"} | SIZES | MULTI_HEAD | {"vocab_size": 380}),
    "bloom, alibi": quick(slower("BloomConfig", COUNTS, n_layer=2, n_head=4)),
    "mpt, alibi": slower("MptConfig", COUNTS, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "mamba": slower("MambaConfig", RECURRENT, state_size=4),
    "mamba 2": slower(
        "Mamba2Config", RECURRENT, state_size=4, head_dim=8, num_heads=8, n_groups=1, chunk_size=8, expand=2
    ),
    "falcon-mamba": slower("FalconMambaConfig", RECURRENT, state_size=4),
    "jamba, attention and state": quick(
        slower(
            "JambaConfig",
            RECURRENT,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            num_experts=4,
        )
    ),
    "bamba": slower("BambaConfig", RECURRENT, attn_layer_indices=[1], **MAMBA_2),
    "falcon-h1, lm_head_multiplier": slower(
        "FalconH1Config", RECURRENT, lm_head_multiplier=0.5, mamba_d_ssm=64, **MAMBA_2
    ),
    "zamba": slower(
        "ZambaConfig",
        RECURRENT,
        initializer_range=0.1,  # at .3 the plain code itself is 5e-4 from float64
        **MULTI_HEAD,
        attention_head_dim=16,
        attention_hidden_size=64,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
    ),
    "zamba2": slower(
        "Zamba2Config",
        RECURRENT,
        **MULTI_HEAD,
        mamba_d_state=4,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        use_mamba_kernels=False,
        layers_block_type=["linear_attention", "hybrid"],
    ),
    "nemotron-h": slower(
        "NemotronHConfig",
        RECURRENT,
        **HEADS,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        ssm_state_size=4,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
    ),
    "recurrent-gemma": quick(
        slower("RecurrentGemmaConfig", RECURRENT, block_types=["recurrent", "attention"], attention_window_size=8)
    ),
    "rwkv": slower("RwkvConfig", RECURRENT, attention_hidden_size=32, context_length=512),
    "xlstm": slower("xLSTMConfig", RECURRENT, num_heads=4, chunk_size=16),
    "deepseek-v2, latent attention": fast(
        "DeepseekV2Config", **LATENT, **ROUTED, first_k_dense_replace=1, n_shared_experts=1
    ),
    "deepseek-v3, latent attention": quick(
        fast(
            "DeepseekV3Config",
            **LATENT,
            **ROUTED,
            first_k_dense_replace=1,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
        )
    ),
    "deepseek-v3.2, the 8 best keys": quick(
        fast("DeepseekV32Config", **LATENT, **ROUTED, **INDEXED, **DENSE_SPARSE, n_group=2, topk_group=1)
    ),
    "deepseek-v4, compressed keys": slower(
        "DeepseekV4Config",
        CHOOSES_KEYS,
        head_dim=8,
        q_lora_rank=12,
        **ROUTED,
        **INDEXED,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe"],
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        partial_rotary_factor=0.5,
        num_key_value_heads=1,
    ),
    "glm-moe-dsa, the 8 best keys": fast("GlmMoeDsaConfig", **LATENT, **ROUTED, **INDEXED, **DENSE_SPARSE),
    "hy-v4, the 8 best keys and sinks": fast(
        "HYV4Config",
        **LATENT,
        **ROUTED,
        **INDEXED,
        **DENSE_SPARSE,
        hc_mult=2,
        indexer_types=["full", "shared"],
    ),
    "axk1": fast("AXK1Config", **LATENT, **ROUTED, **DENSE_SPARSE, n_group=2, topk_group=1),
    "axk2, the 8 best keys": fast("AXK2Config", **LATENT, **ROUTED, **INDEXED, **DENSE_SPARSE),
    "youtu": fast("YoutuConfig", **LATENT),
    "longcat-flash": fast(
        "LongcatFlashConfig",
        **LATENT,
        head_dim=4,
        num_layers=1,
        ffn_hidden_size=48,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=16,
    ),
    "gpt-oss, sinks and windows": quick(
        fast("GptOssConfig", **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "mimo-v2-flash, sinks and windows": fast(
        "MiMoV2FlashConfig", **ROUTED, **WINDOWS, **DENSE_SPARSE, head_dim=12, v_head_dim=8
    ),
    "flint, sinks and windows": fast(
        "FlintConfig", **HEADS, **EXPERTS, **WINDOWS, shared_expert_intermediate_size=16, mlp_only_layers=[0]
    ),
    "kolibri1": fast(
        "Kolibri1Config",
        **HEADS,
        **WINDOWS,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "beam": fast(
        "BeamConfig",
        **HEADS,
        **EXPERTS,
        **WINDOWS,
        **DENSE_SPARSE,
        n_group=2,
        topk_group=1,
        final_logit_softcapping=2.0,
        rope_parameters={"sliding_attention": ROPE, "full_attention": None},
    ),
    "laguna, gated": fast(
        "LagunaConfig",
        **HEADS,
        **EXPERTS,
        **WINDOWS,
        **DENSE_SPARSE,
        shared_expert_intermediate_size=16,
        num_attention_heads_per_layer=[4, 4],
        rope_parameters=BY_KIND,
    ),
    "mellum": fast(
        "MellumConfig",
        **HEADS,
        **WINDOWS,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        rope_parameters=BY_KIND,
    ),
    "afmoe, gated": fast("AfmoeConfig", **HEADS, **EXPERTS, **WINDOWS, num_dense_layers=1),
    "llama4, chunks of 8": quick(
        slower(
            "Llama4TextConfig",
            "chunks counted along the row",
            **HEADS,
            num_local_experts=4,
            intermediate_size_mlp=48,
            attention_chunk_size=8,
            no_rope_layers=[1, 0],
            floor_scale=8,
        )
    ),
    "llama4, chunks that are never full": slower(
        "Llama4TextConfig",
        SCALED_BY_PLACE,
        **HEADS,
        num_local_experts=4,
        intermediate_size_mlp=48,
        attention_chunk_size=512,
        no_rope_layers=[1, 0],
    ),
    "llama4, queries scaled by the place in the row": slower(
        "Llama4TextConfig",
        COUNTS,
        **HEADS,
        num_local_experts=4,
        intermediate_size_mlp=48,
        attention_chunk_size=512,
        no_rope_layers=[1, 0],
        floor_scale=8,
    ),
    "qwen3-next": quick(
        slower("Qwen3NextConfig", RECURRENT, **HEADS, **EXPERTS, **DELTA, shared_expert_intermediate_size=16)
    ),
    "qwen3.5": slower("Qwen3_5TextConfig", RECURRENT, **HEADS, **DELTA),
    "kimi-linear": slower(
        "KimiLinearConfig",
        RECURRENT,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
        **DENSE_SPARSE,
    ),
    "minimax, lightning attention": slower(
        "MiniMaxConfig",
        RECURRENT,
        num_local_experts=4,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "minimax-m2": fast(
        "MiniMaxM2Config", head_dim=16, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE
    ),
    "minimax-m3, the best blocks of keys": slower(
        "MiniMaxM3VLTextConfig",
        CHOOSES_KEYS,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=48,
        shared_intermediate_size=16,
        **DENSE_SPARSE,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "lfm2, short convolutions": slower("Lfm2Config", CONVOLVES, layer_types=["conv", "full_attention"]),
    "lfm3, short convolutions": slower("Lfm3Config", CONVOLVES, layer_types=["conv", "full_attention"], **HEADS),
    "zaya, convolved keys": slower(
        "ZayaConfig", CONVOLVES, head_dim=8, num_experts=4, moe_intermediate_size=16, router_hidden_size=16
    ),
    "smollm3, layers without rotary": fast("SmolLM3Config", no_rope_layers=[1, 0]),
    "nemotron": fast("NemotronConfig"),
    "ernie4.5": fast("Ernie4_5Config", **HEADS),
    "ernie4.5-moe": fast(
        "Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1
    ),
    "hunyuan": fast("HunYuanDenseV1Config", **HEADS),
    "hunyuan-moe": fast("HunYuanMoEV1Config", **HEADS, num_experts=4, moe_topk=2),
    "hy-v3": fast(
        "HYV3Config", **HEADS, **DENSE_SPARSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "exaone4, windows": fast("Exaone4Config", **WINDOWS),
    "exaone-moe": fast("ExaoneMoeConfig", **EXPERTS, **WINDOWS, **DENSE_SPARSE),
    "glm": fast("GlmConfig", **HEADS),
    "glm4": quick(fast("Glm4Config", **HEADS)),
    "glm4-moe": fast("Glm4MoeConfig", **ROUTED),
    "glm4-moe-lite": fast("Glm4MoeLiteConfig", **LATENT, **ROUTED, **DENSE_SPARSE),
    "helium": fast("HeliumConfig", **HEADS),
    "dots1, windows": fast("Dots1Config", **HEADS, **ROUTED, **WINDOWS, n_shared_experts=1, first_k_dense_replace=1),
    "solar-open": fast("SolarOpenConfig", **HEADS, **ROUTED),
    "seed-oss": fast("SeedOssConfig", **HEADS),
    "dbrx": fast(
        "DbrxConfig",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10_000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "jetmoe, experts in attention": fast("JetMoeConfig", kv_channels=8, num_key_value_heads=2, num_local_experts=4),
    "aria": fast("AriaTextConfig", moe_num_experts=4, moe_topk=2),
    "apertus": fast("ApertusConfig"),
    "arcee": fast("ArceeConfig"),
    "bitnet": fast("BitNetConfig"),
    "cwm, windows": fast("CwmConfig", **WINDOWS),
    "ministral, windows": fast("MinistralConfig", **HEADS, **WINDOWS),
    "ministral3, queries scaled by position": fast(
        "Ministral3Config",
        **HEADS,
        rope_parameters=ROPE
        | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5},
    ),
    "nanochat, soft cap": fast("NanoChatConfig", final_logit_softcapping=2.0),
    "jais2": fast("Jais2Config"),
    "diffllama, differential attention": fast("DiffLlamaConfig", **HEADS),
    "doge, keys kept by weight": fast("DogeConfig"),
    "doge, the 8 best keys": slower("DogeConfig", TIES, keep_window_size=8),
    "hrm, cycles": fast("HrmTextConfig", **HEADS, num_layers_per_stack=1),
    "moshi": fast("MoshiConfig", **HEADS, sliding_window=8, ffn_dim=48),
    "modernbert-decoder": slower("ModernBertDecoderConfig", HEAD, local_attention=16, global_attn_every_n_layers=2),
    "bert, as a decoder": slower("BertConfig", HEAD, is_decoder=True),
    "roberta, as a decoder": slower("RobertaConfig", COUNTS, is_decoder=True),
    "bart's decoder": slower(
        "BartConfig", COUNTS, is_encoder_decoder=False, is_decoder=True, init_std=0.3, **ALL_OF_BART
    ),
    "trocr's decoder": slower("TrOCRConfig", COUNTS, init_std=0.3, **ALL_OF_BART),
}


# fast, but with an attention that is not looked up by name, or that looks at its mask: a row a pair
OWN_ATTENTION = {
    name for name in ARCHITECTURES if name.startswith(("gpt-j", "codegen", "gpt-neox-j", "xglm", "falcon,"))
}
OWN_ATTENTION |= {name for name in ARCHITECTURES if name.endswith(("8 best keys", "8 best keys and sinks"))}
OWN_ATTENTION |= {"doge, keys kept by weight"}


def lively_model(architecture: str, **chosen: Any) -> Any:
    """The tiny model of that name, made lively."""
    return lively(random_model(ARCHITECTURES[architecture].config(), **chosen))


def lively(model: Any) -> Any:
    """Shake what begins as a constant: a forgotten factor of one, or a row of zeros, would look right."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] += 0.3 * torch.randn(module.embedding_dim, generator=draw)
    return model
