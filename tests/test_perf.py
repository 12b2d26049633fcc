"""What an update costs, counted by hand on a tiny Llama and by torch's own counter, and the figures of a machine."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny import SIZES, gpt2_config, llama_config, mamba_config, random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from prefkit import perf
from prefkit.format import schema
from prefkit.perf import Clock, Work, known_peak, peak_flops, peak_memory, perf_row, update_flops, work_of

CPU = torch.device("cpu")
# hidden 32, 4 heads of 8, 2 key heads, intermediate 48: q 32 x 32, k and v 32 x 16, o 32 x 32, three of 32 x 48
LAYER = 1024 + 512 + 512 + 1024 + 3 * 1536
HEAD = 380 * 32
WIDTH = 2 * (32 + 32)  # two layers, keys and values of all heads


def test_the_work_of_pairs_by_hand() -> None:
    rows = pl.DataFrame(
        {"num_prompt_tokens": [2, 3], "num_chosen_tokens": [1, 2], "num_rejected_tokens": [2, 1]},
        schema_overrides=dict.fromkeys(("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens"), pl.Int32),
    )
    # 1 + 2 + 3 and 3 + 4; 1 + ... + 5 and 4
    assert work_of(rows[:1]) == Work(5, 3, 13)
    assert work_of(rows[1:]) == Work(6, 3, 19)
    assert work_of(rows) == work_of(rows[:1]) + work_of(rows[1:]) == Work(11, 6, 32)
    assert work_of(rows[:0]) == Work(0, 0, 0)


def test_the_work_is_counted_in_more_than_32_bits() -> None:
    rows = pl.DataFrame({f"num_{s}_tokens": [100_000] * 2 for s in ("prompt", "chosen", "rejected")})
    rows = rows.cast(pl.Int32)
    assert work_of(rows).attended == 2 * (200_000 * 200_001 // 2 + 100_000**2 + 100_000 * 100_001 // 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_by_hand(tied: bool) -> None:
    model = random_model(llama_config(tie_word_embeddings=tied))
    expected = 6 * 2 * LAYER * 100 + 6 * HEAD * 40 + 6 * WIDTH * 2500
    assert update_flops(model, 100, 40, 2500) == expected


def test_a_frozen_weight_has_no_gradient_of_its_own() -> None:
    model = random_model(llama_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    expected = (4 * 2 * LAYER + 2 * 2 * 1024) * 100 + 4 * HEAD * 40 + 6 * WIDTH * 2500
    assert update_flops(model, 100, 40, 2500) == expected


def test_a_mixture_by_the_experts_that_a_token_meets() -> None:
    sizes = SIZES | {"num_local_experts": 6, "num_experts_per_tok": 2}
    model = random_model(MixtralConfig(vocab_size=380, **sizes))
    # the experts' three matrices twice instead of six times, and the router 6 x 32
    layer = LAYER + 3 * 1536 + 6 * 32
    assert update_flops(model, 100, 40, 2500) == 6 * 2 * layer * 100 + 6 * HEAD * 40 + 6 * WIDTH * 2500


def test_a_gpt2_by_hand_positions_are_looked_up() -> None:
    model = random_model(gpt2_config())
    # 32 x 96 and 32 x 32, then 32 x 128 and back
    layer = 3072 + 1024 + 2 * 4096
    assert update_flops(model, 100, 40, 2500) == 6 * 2 * layer * 100 + 6 * HEAD * 40 + 6 * WIDTH * 2500


def test_a_model_without_attention_has_none_to_count() -> None:
    model = random_model(mamba_config())
    assert update_flops(model, 100, 0, 10**9) == update_flops(model, 100, 0, 0) > 0


def counted(model: Any, ids: torch.Tensor) -> int:
    """The operations of torch's counter."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return int(counter.get_total_flops())


def test_what_torch_counts_is_what_is_said() -> None:
    """Eagerly it computes the logits of all tokens, and every pair of them in attention, also those that are masked."""
    model = random_model(llama_config(), attn_implementation="eager")
    assert counted(model, torch.arange(24)[None]) == update_flops(model, 24, 24, 24**2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by the old name
def test_what_torch_counts_of_an_adapter_is_what_is_said() -> None:
    peft = pytest.importorskip("peft")
    model = random_model(llama_config(), attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    # nothing before the first layer is trained: its q, k and v (and their adapters' first matrices) hand no gradient on
    first = 2 * (1024 + 512 + 512 + 3 * 4 * 32) * 24
    assert counted(model, torch.arange(24)[None]) == update_flops(model, 24, 24, 24**2) - first


# --- the machine


@pytest.mark.parametrize(
    ("name", "float32", "tf32", "bfloat16"),
    [
        ("NVIDIA H200", 67, 494.5, 989),
        ("NVIDIA H100 80GB HBM3", 67, 494.5, 989),
        ("NVIDIA H100 PCIe", 51, 378, 756),
        ("NVIDIA H100 NVL", 60, 417.5, 835),
        ("NVIDIA A100-SXM4-80GB", 19.5, 156, 312),
        ("NVIDIA A100 80GB PCIe", 19.5, 156, 312),
        ("NVIDIA L4", 30.3, 60, 121),
        ("NVIDIA L40S", 91.6, 183, 362),
        ("NVIDIA B200", 75, 1125, 2250),
        ("NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2),
    ],
)
def test_the_peak_of_a_gpu_is_its_datasheet_s(name: str, float32: float, tf32: float, bfloat16: float) -> None:
    assert known_peak(name, "float32", tf32=False) == float32 * 1e12
    assert known_peak(name, "float32", tf32=True) == tf32 * 1e12
    for dtype in ("bfloat16", "bfloat16_weights"):
        assert known_peak(name, dtype, tf32=False) == bfloat16 * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GB200", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "Tesla T4"])
def test_a_gpu_of_a_name_that_only_resembles_another_s_is_not_known(name: str) -> None:
    assert known_peak(name, "bfloat16", tf32=False) is None


def test_what_is_said_comes_first_and_a_cpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, "float32", None) is None
    assert peak_flops(CPU, "float32", 0.1) == 1e11
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), "bfloat16", None) == 989e12
    assert peak_flops(torch.device("cuda"), "float32", None) == 67e12
    assert peak_flops(torch.device("cuda"), "bfloat16", 500.0) == 500e12


def test_the_memory_of_a_process_is_the_most_it_has_held() -> None:
    before = peak_memory(CPU)
    held = torch.ones(16 << 20)  # 64 MiB, written to
    with_it = peak_memory(CPU)
    del held
    assert with_it >= torch.ones(1).element_size() * (16 << 20)
    assert with_it >= 0.99 * before  # the kernel counts pages by the dozen
    assert peak_memory(CPU) >= 0.99 * with_it


def test_the_memory_of_a_process_without_proc_is_the_system_s_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    there = peak_memory(CPU)
    monkeypatch.setattr(perf, "Path", lambda _name: Path("/nowhere/status"))
    assert peak_memory(CPU) >= 0.9 * there  # ru_maxrss may begin at that of the parent


def test_a_row_has_the_columns_of_the_format() -> None:
    row = perf_row(3, 2.0, Work(100, 40, 2500), 6e9, 1e10, 12345)
    assert list(row) == list(schema("perf", "text"))
    assert row == {
        "step": 3,
        "seconds": 2.0,
        "num_tokens": 100,
        "tokens_per_second": 50.0,
        "mfu": 0.3,
        "peak_memory": 12345,
    }
    assert perf_row(3, 2.0, Work(100, 40, 2500), 6e9, None, 12345)["mfu"] is None


def test_a_clock_tells_the_time_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr("prefkit.perf.time.perf_counter", lambda: next(times))
    clock = Clock(CPU)
    clock.begin()
    assert [clock.seconds(), clock.seconds()] == [2.5, 3.0]
