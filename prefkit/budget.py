"""How many tokens a forward pass holds where nobody says: a constant on a CPU, measured once on a GPU.

Comes in: how much memory a pass of so many tokens takes, and how much is free. Goes out: a number, which the plan of a
reference pass keeps (`batches.py`) and a run records (`run.py`): what is measured decides nothing twice.
"""

import math
from collections.abc import Callable

import torch

from prefkit.encode import Sides
from prefkit.errors import is_out_of_memory
from prefkit.layouts import num_predicted
from prefkit.logps import CompletionLogps

# Larger passes leave a CPU's cache and smaller ones gain nothing: `benchmarks/reference_vs_trl.py --budget N` shows it.
CPU_BATCH_TOKENS = 2048
STEP = 1024  # a measured budget is a multiple of it
MAX_BATCH_TOKENS = 65_536  # more are taken to keep no GPU busier: not measured
SHARE = 0.85  # of the free memory: a pass of real pairs, and what the allocator cannot use, must find room too
FEW, MANY = STEP, 8 * STEP  # tokens of the first two measurements


def probe_budget(peak_bytes: Callable[[int], int], free_bytes: int, longest: int) -> int:
    """The tokens of a pass that takes at most 85 % of the free memory.

    Memory is taken for a line through two token counts. A third measurement, where that line ends, sees to it that it
    is no curve: where it shows more than the line, the chord to it lies above the curve and is followed instead.

    Args:
        peak_bytes: the memory that a pass of so many tokens takes; it may run out of memory.
        free_bytes: what there is.
        longest: tokens of the longest pair.

    Returns:
        a multiple of 1,024, at most 65,536; `longest` where that is more, for a pair is never cut, and where even the
        first count takes too much.

    Example: 1,000 bytes a token and 10 MB free make 8,192 (8,500 fit).
    """
    if longest >= MAX_BATCH_TOKENS:
        return longest
    room = SHARE * free_bytes
    few = max(FEW, _up(longest))
    low = (few, _measured(peak_bytes, few))
    if low[1] > room:
        return longest
    high = _that_fits_at_all(peak_bytes, low, min(MAX_BATCH_TOKENS, max(MANY, 4 * few)))
    target = min(MAX_BATCH_TOKENS, _reaching(room, low, high))
    if target > high[0]:
        third = _that_fits_at_all(peak_bytes, high, target)
        target = third[0] if third[1] <= room else _reaching(room, high, third)
    return max(longest, target)


def _measured(peak_bytes: Callable[[int], int], tokens: int) -> float:
    try:
        return peak_bytes(tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return math.inf


def _that_fits_at_all(peak_bytes: Callable[[int], int], known: tuple[int, float], tokens: int) -> tuple[int, float]:
    """Tokens and bytes at the count, or nearer to the known one, halving the way, where memory runs out."""
    while tokens > known[0]:
        if math.isfinite(taken := _measured(peak_bytes, tokens)):
            return tokens, taken
        tokens = _down((known[0] + tokens) / 2)
    return known


def _reaching(room: float, low: tuple[int, float], high: tuple[int, float]) -> int:
    """The tokens at which the line through two measurements reaches `room`, in whole steps."""
    (few, less), (many, more) = low, high
    if more <= less:  # nothing grows, or there is one measurement only
        return MAX_BATCH_TOKENS if many > few else few
    return _down(min(few + (room - less) * (many - few) / (more - less), MAX_BATCH_TOKENS))


def _down(tokens: float) -> int:
    return int(tokens // STEP) * STEP


def _up(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def measure_budget(scorer: CompletionLogps, longest: int) -> int:
    """`probe_budget` on the CUDA device that a scorer is on, with pairs as long as the longest.

    Args:
        scorer: the reference model, which stays as it is.
        longest: prompt + chosen + rejected tokens of the longest pair.
    """
    device = scorer.device
    vocabulary = num_predicted(scorer.model)

    def peak_bytes(tokens: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        pairs = pairs_of_tokens(tokens, longest, vocabulary)
        with torch.inference_mode():
            scorer(scorer.batch(pairs))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    torch.cuda.empty_cache()
    budget = probe_budget(peak_bytes, torch.cuda.mem_get_info(device)[0], longest)
    torch.cuda.empty_cache()  # what the probes leave is for the batches
    return budget


def pairs_of_tokens(tokens: int, longest: int, vocabulary: int) -> list[Sides]:
    """Pairs of so many tokens in all, of equal length and none above `longest`, of fixed pseudo-random ids.

    Prompts are of one token: completions take more memory, and nothing is shared.
    """
    draw = torch.Generator().manual_seed(0)
    longest = max(3, longest)
    count = -(-tokens // longest)
    pairs = []
    for number in range(count):
        length = max(3, (number + 1) * tokens // count - number * tokens // count)
        ids = torch.randint(0, vocabulary, (length,), generator=draw).tolist()
        half = (length + 1) // 2
        pairs.append(Sides(ids[:1], ids[1:half], ids[half:]))
    return pairs
