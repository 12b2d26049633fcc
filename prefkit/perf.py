"""What an update costs: the operations that its pairs ask of the model, the time it took, and the most memory so far.

The operations are the model's (arXiv 2204.02311, appendix B): what the mathematics asks for, each distinct token once,
whatever an implementation does twice (gradient checkpointing, padding) or beside it (norms, softmax, optimiser). So
`mfu` compares runs and machines, and is 1 for none of them.
"""

import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import nn

FORWARD = 2  # a weight and a token: a multiplication and an addition
BACKWARD_INPUT, BACKWARD_WEIGHT = 2, 2  # likewise, of the gradient of the layer's input, and of its weight


class Work(NamedTuple):
    """What pairs ask of a model: its distinct tokens, those that are predicted, and who attends to whom."""

    num_tokens: int  # prompt + chosen + rejected of each pair, the prompt once
    num_predicted: int  # chosen + rejected
    attended: int  # pairs of a token and one that it sees, itself included, in one layer

    def __add__(self, other: Any) -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work_of(rows: pl.DataFrame) -> Work:
    """The work of reference rows, from their num_prompt_tokens, num_chosen_tokens and num_rejected_tokens.

    Prompt and chosen, P and C tokens, see (P + C)(P + C + 1) / 2 pairs; the R tokens of rejected R P + R (R + 1) / 2.

    Example: P 2, C 1, R 2 is Work(5, 3, 13): 6 of the first three, and 4 + 3.
    """
    prompt, chosen, rejected = (
        pl.col(f"num_{side}_tokens").cast(pl.Int64) for side in ("prompt", "chosen", "rejected")
    )
    first = prompt + chosen
    seen = first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2
    parts = {"num_tokens": first + rejected, "num_predicted": chosen + rejected, "attended": seen}
    return Work(**rows.select(value.sum().alias(name) for name, value in parts.items()).row(0, named=True))


def update_flops(model: nn.Module, num_tokens: int, num_predicted: int, attended: int) -> float:
    """Floating-point operations of a forward and a backward pass; a multiplication and an addition are two.

        sum over matrices of (2 + 2 + 2 [trained]) * size * share * tokens  +  3 * 2 * (K + V) * attended  a layer

    A weight takes part in 2 operations a token forward, 2 for the gradient of its layer's input, and 2 for its own,
    which a frozen weight (of a model below an adapter) has not. Embeddings are looked up: none. The output matrix, tied
    or not, meets only the tokens that are predicted. Of a mixture each token meets the share of the experts it is sent
    to. Attention multiplies a query with a key of K numbers and a weight with a value of V, over all heads of a layer,
    and twice as much backward; a sliding window is not taken off.

    Args:
        model: a causal LM of transformers, or peft's around it.
        num_tokens: T, as in Work.
        num_predicted: U, likewise.
        attended: likewise.

    Returns:
        operations of one update over all of these tokens.
    """
    body, head = 0.0, 0.0
    for size, share, is_head, trained in _matrices(model):
        times = FORWARD + BACKWARD_INPUT + (BACKWARD_WEIGHT if trained else 0)
        if is_head:
            head += times * size
        else:
            body += times * size * share
    return body * num_tokens + head * num_predicted + 3 * FORWARD * _attention_width(model) * attended


def _matrices(model: Any) -> Iterator[tuple[int, float, bool, bool]]:
    """Of each matrix that is multiplied with: size, the share of tokens it meets, is it the head, is it trained."""
    config = model.config.get_text_config()
    experts, active = _experts(config)
    output = model.get_output_embeddings()
    head: Any = getattr(output, "weight", None)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():  # a tied one once
        if parameter.ndim < 2:
            continue
        if head is not None and parameter is head:
            yield parameter.numel(), 1.0, True, parameter.requires_grad
        elif id(parameter) not in looked_up:
            # the experts of a layer are one tensor with a row an expert, or a list of modules
            of_experts = experts and (
                (parameter.ndim == 3 and parameter.shape[0] == experts) or re.search(r"\bexperts\.\d+\.", name)
            )
            yield parameter.numel(), active / experts if of_experts else 1.0, False, parameter.requires_grad


def _experts(config: Any) -> tuple[int, int]:
    """How many experts a layer has and how many of them a token meets; 0, 0 where there are none."""
    count = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    active = next((n for name in ACTIVE if (n := getattr(config, name, None))), 0)
    return (int(count), int(active)) if count and active else (0, 0)


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # names in transformers' configs
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k")


def _attention_width(model: Any) -> int:
    """K + V over all heads and all layers that attend: see update_flops."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = getattr(config, "qk_head_dim", None) or size
    value = getattr(config, "v_head_dim", None) or size
    return int(layers * heads * (key + value))


class Peak(NamedTuple):
    """Dense 10^12 operations a second by the maker's own figures: float32 without and with TF32, and bfloat16."""

    float32: float
    tf32: float
    bfloat16: float


# NVIDIA's datasheets of each product (of the GeForce cards: the Ada and GA102 architecture white papers, with float32
# accumulation), without sparsity, at the largest power the product is sold with; the first pattern that is found
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bB200\b", Peak(75, 1125, 2250)),
    (r"\bH[12]00 NVL\b", Peak(60, 417.5, 835)),
    (r"\bH100 PCIe\b", Peak(51, 378, 756)),
    (r"\bH[12]00\b", Peak(67, 494.5, 989)),
    (r"\bA100\b", Peak(19.5, 156, 312)),
    (r"\bL40S\b", Peak(91.6, 183, 362)),
    (r"\bL4\b", Peak(30.3, 60, 121)),
    (r"\bA30\b", Peak(10.3, 82, 165)),
    (r"\bA40\b", Peak(37.4, 74.8, 149.7)),
    (r"\bA10\b", Peak(31.2, 62.5, 125)),
    (r"\bRTX A6000\b", Peak(38.7, 77.4, 154.8)),
    (r"\bRTX 4090$", Peak(82.6, 82.6, 165.2)),
    (r"\bRTX 3090$", Peak(35.6, 35.6, 71)),
)


def known_peak(name: str, dtype: str, *, tf32: bool) -> float | None:
    """Dense operations a second of a GPU by its name; None where it is not in the table.

    Args:
        name: as torch.cuda.get_device_name says it.
        dtype: float32 | bfloat16 | bfloat16_weights.
        tf32: whether float32 products are made in TF32.
    """
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)
    if peak is None:
        return None
    return 1e12 * (peak.bfloat16 if dtype != "float32" else peak.tf32 if tf32 else peak.float32)


def peak_flops(device: torch.device, dtype: str, said_tflops: float | None) -> float | None:
    """Dense operations a second that one device can make.

    Args:
        device: of this process.
        dtype: float32 | bfloat16 | bfloat16_weights.
        said_tflops: train.peak_tflops; it comes first.

    Returns:
        operations a second; None where nothing was said and nothing is known (a CPU, another GPU).
    """
    if said_tflops is not None:
        return said_tflops * 1e12
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return known_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: what torch allocated on CUDA, else its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM: unlike ru_maxrss it does not begin at that of the process that started this one
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes on macOS, KiB elsewhere


class Clock:
    """The wall-clock time of an update: what a CUDA device was given to do is waited for at either end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = math.nan

    def begin(self) -> None:
        """The update begins now."""
        self.began = self._now()

    def seconds(self) -> float:
        """Since the last `begin`."""
        return self._now() - self.began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def perf_row(
    step: int, seconds: float, work: Work, flops: float, peak: float | None, memory: int
) -> dict[str, int | float | None]:
    """A row of format.PERF_COLUMNS.

    Args:
        step: of the update, as in steps.
        seconds: that it took, > 0.
        work: of all its pairs, those of other processes included.
        flops: update_flops of that work.
        peak: operations a second of all devices together; None where it is not known.
        memory: bytes, the largest peak_memory of all processes.
    """
    return {
        "step": step,
        "seconds": seconds,
        "num_tokens": work.num_tokens,
        "tokens_per_second": work.num_tokens / seconds,
        "mfu": None if peak is None else flops / (seconds * peak),
        "peak_memory": memory,
    }
