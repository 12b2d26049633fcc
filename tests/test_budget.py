"""A budget takes what fits, whatever memory does, and is measured on the very model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import built, text_rows, tiny_llama

from prefkit.budget import MAX_BATCH_TOKENS, SHARE, STEP, measure_budget, pairs_of_tokens, probe_budget
from prefkit.logps import CompletionLogps
from prefkit.scoring import load_scorer

PROPERTY = settings(deadline=None, max_examples=300, derandomize=True, database=None)
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes. Error code 12"


class Measured:
    """Memory as a function of tokens, and at which counts it was asked for."""

    def __init__(self, taken: Callable[[int], float], most: int | None = None, error: Exception | None = None) -> None:
        self.taken, self.most, self.error, self.asked = taken, most, error, list[int]()

    def __call__(self, tokens: int) -> int:
        self.asked.append(tokens)
        if self.most is not None and tokens > self.most:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory.")
        return int(self.taken(tokens))


@pytest.mark.parametrize(
    ("fixed", "each", "free", "expected", "asked"),
    [
        (0, 1000, 10e6, 8192, [1024, 8192]),  # 8,500 fit
        (50e6, 1e5, 4e9, 32_768, [1024, 8192, 32_768]),  # (3.4e9 - 5e7) / 1e5 = 33,500
        (0, 1e5, 4e8, 3072, [1024, 8192]),  # 3,400: the second count is too much already
        (0, 10, 1e12, 65_536, [1024, 8192, 65_536]),  # no more, however much memory there is
    ],
)
def test_memory_that_grows_in_a_line_by_hand(
    fixed: float, each: float, free: float, expected: int, asked: list[int]
) -> None:
    peak = Measured(lambda tokens: fixed + each * tokens)
    assert probe_budget(peak, int(free), 500) == expected
    assert peak.asked == asked


def test_memory_that_does_not_grow_by_hand() -> None:
    peak = Measured(lambda _tokens: 1e6)
    assert probe_budget(peak, 10**9, 500) == MAX_BATCH_TOKENS
    assert peak.asked == [1024, 8192, MAX_BATCH_TOKENS]


def test_memory_that_grows_faster_than_a_line_by_hand() -> None:
    """1,000 n + n^2 / 20 bytes, 34 MB of room.

    1,024 tokens take 1.076 MB and 8,192 take 11.547 MB, which is a line to 34 MB at 23,562: 23,552. There it is 51.287
    MB, and the line from 8,192 to that reaches 34 MB at 16,870. So 16,384, which take 29.8 MB; 18,432 would take 35.4.
    """
    peak = Measured(lambda n: 1000 * n + n * n / 20)
    assert probe_budget(peak, int(40e6), 500) == 16_384
    assert peak.asked == [1024, 8192, 23_552]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MESSAGE), MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_a_probe_that_runs_out_of_memory_is_made_again_with_half_of_what_it_had_more(error: Exception) -> None:
    third = Measured(lambda n: 1000 * n, 20_000, error)
    assert probe_budget(third, 10**9, 500) == 15_360
    assert third.asked == [1024, 8192, 65_536, 36_864, 22_528, 15_360]
    second = Measured(lambda n: 1000 * n, 4000, error)
    assert probe_budget(second, 10**9, 500) == 3072
    assert second.asked[:4] == [1024, 8192, 4096, 2048]
    assert max(second.asked[4:]) == 65_536
    assert second.asked[-1] == 3072


def test_where_nothing_fits_it_is_the_longest_pair() -> None:
    assert probe_budget(Measured(lambda n: n, 0), 10**9, 500) == 500  # scoring says that memory ran out
    assert probe_budget(Measured(lambda n: 1e6 * n), 10**8, 500) == 500


def test_the_longest_pair_always_fits_and_is_the_first_count() -> None:
    peak = Measured(lambda n: 1000 * n)
    assert probe_budget(peak, int(6.5e6), 5500) == 5500  # 5,525 fit, 5,120 in whole steps
    peak = Measured(lambda n: 1000 * n)
    assert probe_budget(peak, 10**9, 5500) == MAX_BATCH_TOKENS
    assert peak.asked == [6144, 24_576, MAX_BATCH_TOKENS]
    never = Measured(lambda n: n)
    assert probe_budget(never, 10**12, 70_000) == 70_000
    assert never.asked == []


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        probe_budget(Measured(lambda n: n, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 10**9, 500)


@PROPERTY
@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(0, 1e6),
    square=st.floats(0, 100),
    free=st.floats(1e6, 1e11),
    most=st.integers(0, 100_000),
    longest=st.integers(3, 80_000),
)
def test_what_it_takes_was_there(
    fixed: float, each: float, square: float, free: float, most: int, longest: int
) -> None:
    peak = Measured(lambda n: fixed + each * n + square * n * n, most)
    budget = probe_budget(peak, int(free), longest)
    assert len(peak.asked) <= 16
    assert budget >= longest
    if budget > longest:
        assert budget % STEP == 0
        assert STEP <= budget <= MAX_BATCH_TOKENS
        assert budget <= most
        assert peak(budget) <= SHARE * free


# --- on a model


@PROPERTY
@given(tokens=st.integers(1, 3000), longest=st.integers(3, 400), vocabulary=st.integers(1, 100))
def test_pairs_of_so_many_tokens(tokens: int, longest: int, vocabulary: int) -> None:
    pairs = pairs_of_tokens(tokens, longest, vocabulary)
    lengths = [sum(len(ids) for ids in pair) for pair in pairs]
    assert max(lengths) <= longest
    if min(lengths) > 3:  # no pair is shorter
        assert sum(lengths) == tokens
        assert max(lengths) - min(lengths) <= 1
    for pair in pairs:
        assert len(pair.prompt) == 1
        assert 0 <= len(pair.rejected) - len(pair.chosen) <= 1
        assert all(0 <= token < vocabulary for ids in pair for token in ids)


def test_a_budget_is_measured_with_passes_of_so_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch's counters are those of memory that takes 1,000 bytes a token of the last pass."""
    scorer = load_scorer(built(tmp_path, text_rows(2), tiny_llama(tmp_path / "model")), lambda _line: None)
    forward, tokens = CompletionLogps.forward, list[int]()

    def counting(self: CompletionLogps, batch: Any) -> Any:
        tokens.append(batch.input_ids.numel())
        return forward(self, batch)

    monkeypatch.setattr(CompletionLogps, "forward", counting)
    held = 70_000_000  # by the model, before a pass and after it
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: held + 1000 * tokens[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (4_200_000, 80_000_000_000))
    assert measure_budget(scorer, 100) == 3072  # 3,570 fit
    # a layout may compute the one token of a prompt twice, or pad to the longest
    assert tokens == [pytest.approx(wanted, rel=0.02) for wanted in (1024, 8192)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_measured_budget_is_one_on_a_gpu(tmp_path: Path) -> None:
    scorer = load_scorer(built(tmp_path, text_rows(2), tiny_llama(tmp_path / "model")), lambda _line: None)
    assert measure_budget(scorer, 100) == MAX_BATCH_TOKENS  # of a tiny model
