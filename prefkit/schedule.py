"""When and how fast: the order of the pairs, the updates, their learning rate and their beta.

All of it is a function of the settings, the pairs' lengths and the step alone, so a resumed run needs no more than its
step to go on. Which pairs an update sees has nothing to do with their lengths; how they are passed through the model
has, and changes an update no more than float rounding does.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from prefkit.config import TrainConfig


def learning_rate_at(step: int, total: int, settings: TrainConfig) -> float:
    """The rate of the update made after `step` updates: linear warm-up to the peak, then linear, cosine or constant.

    Example: peak 1, warmup_steps 1, linear, total 3 gives 1/2, 1, 1/2.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if settings.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return (
        peak * (1 - progress)
        if settings.lr_scheduler_type == "linear"
        else peak * (1 + math.cos(math.pi * progress)) / 2
    )


def beta_at(step: int, total: int, settings: TrainConfig) -> float:
    """Beta of the update made after `step` updates: beta at the first, beta_end at the last, linear or cosine between.

    The rewards of an evaluation after `step` updates are in the same beta; after the last update it stays beta_end, and
    a run of one update makes it with beta.

    Example: beta .1, beta_end .5, linear, total 3 gives .1, .3, .5.
    """
    if settings.beta_end is None:
        return settings.beta
    progress = min(1.0, step / max(1, total - 1))
    if settings.beta_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return settings.beta * (1 - progress) + settings.beta_end * progress


def num_updates(num_pairs: int, settings: TrainConfig) -> int:
    """max_steps, or the updates of `epochs` passes, the last batch of a pass being smaller if need be."""
    an_epoch = math.ceil(num_pairs / (settings.batch_size * settings.gradient_accumulation_steps))
    return settings.max_steps or max(1, math.ceil(settings.epochs * an_epoch))


def pair_order(num_pairs: int, seed: int) -> Iterator[list[int]]:
    """One permutation of the training pairs a pass, a function of seed and pass alone."""
    epoch = 0
    while True:
        yield np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
        epoch += 1


class Limits(NamedTuple):
    """What a micro-batch holds at most; None: as many as there are. A pair above `tokens` is alone."""

    pairs: int | None
    tokens: int | None


def limits_of(settings: TrainConfig, max_tokens: int | None) -> Limits:
    """The limits as set, where train.max_batch_tokens takes the place of batch_size.

    Args:
        settings: of the run.
        max_tokens: where train.max_batch_tokens is left out, the tokens beside batch_size; None for no such limit.
    """
    if settings.max_batch_tokens is not None:
        return Limits(None, settings.max_batch_tokens)
    return Limits(settings.batch_size, max_tokens)


def micro_batches(numbers: Iterable[int], lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Row numbers as micro-batches of pairs of like length: the longest first, by row number where they are equal.

    Args:
        numbers: rows.
        lengths: prompt + chosen + rejected tokens of every row.
        limits: of a micro-batch.

    Example: `micro_batches([0, 1, 2], [3, 9, 5], Limits(2, 10))` is `[[1], [2, 0]]`.
    """
    batches: list[list[int]] = []
    held = 0
    for number in longest_first(numbers, lengths):
        tokens = held + lengths[number]
        over = limits.tokens is not None and tokens > limits.tokens
        if not batches or over or len(batches[-1]) == limits.pairs:
            batches.append([])
            tokens = lengths[number]
        batches[-1].append(number)
        held = tokens
    return batches


def dealt(numbers: Iterable[int], lengths: Sequence[int], limits: Limits, processes: int = 1) -> list[list[list[int]]]:
    """Rows dealt out among processes, of every process as its micro-batches.

    The longest row first, each to whoever has the fewest tokens so far, so that nobody waits long for the others.

    Args:
        numbers: rows.
        lengths: prompt + chosen + rejected tokens of every row.
        limits: of a micro-batch.
        processes: how many there are; one that is left without a row has no micro-batch.

    Example: `dealt([0, 1, 2], [3, 9, 5], Limits(2, None), 2)` is `[[[1]], [[2, 0]]]`.
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    held = [0] * processes
    for number in longest_first(numbers, lengths):
        least = held.index(min(held))
        hands[least].append(number)
        held[least] += lengths[number]
    return [micro_batches(hand, lengths, limits) for hand in hands]


def longest_first(numbers: Iterable[int], lengths: Sequence[int]) -> list[int]:
    """Rows by length, by row number where they are equal."""
    return sorted(numbers, key=lambda row: (-lengths[row], row))


def step_rows(num_pairs: int, settings: TrainConfig) -> Iterator[tuple[float, list[int]]]:
    """For every update: passes already made, and the numbers of its rows. Endless.

    They are the next ones of the permutation, whatever their lengths and however many processes share them.
    """
    size = settings.batch_size * settings.gradient_accumulation_steps
    for epoch, order in enumerate(pair_order(num_pairs, settings.seed)):
        for start in range(0, num_pairs, size):
            yield epoch + start / num_pairs, order[start : start + size]


def epochs_made(updates: int, num_pairs: int, settings: TrainConfig) -> float:
    """Passes over the pairs after so many updates; the last update of a pass may be smaller."""
    size = settings.batch_size * settings.gradient_accumulation_steps
    an_epoch = math.ceil(num_pairs / size)
    return updates // an_epoch + min(1.0, updates % an_epoch * size / num_pairs)
