"""Log-probs of single completions by THE kernel, and how far apart two models' next tokens are along them.

Comes in: prompt ids and completion ids. Goes out: a value a completion token. The kernel takes pairs, and any two
completions of one prompt are one: so they share its prompt as chosen and rejected do. One that is left over is paired
with itself, which costs nothing where rows are tries.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefkit.budget import CPU_BATCH_TOKENS, measure_budget
from prefkit.encode import Sides
from prefkit.errors import MachineError, is_out_of_memory
from prefkit.layouts import choose_layout, num_predicted
from prefkit.logps import CompletionLogps, logps_from_logits
from prefkit.models import REGIMES, autocast, check_fits, load_model, load_tokenizer, pick_device
from prefkit.schedule import Limits, micro_batches
from prefkit.scoring import score_sides

Ids: TypeAlias = Sequence[int]
Floats: TypeAlias = npt.NDArray[np.float32]
Tell = Callable[[str], None]
Watch = Callable[[int, int], None]
MOST_LOGITS = 1 << 26  # of each of two models at once: 256 MiB


class Paired(NamedTuple):
    """Completions as pairs; `places`: of each pair, which completions its two sides are."""

    pairs: list[Sides]
    places: list[tuple[int, int]]


class Apart(NamedTuple):
    """Of one completion, a value a token: both models' log-probs, and KL(policy || reference) of the next token."""

    logps: Floats
    ref_logps: Floats
    kl: Floats


def load_for_scoring(folder: str, dtype: str, longest: int, tell: Tell) -> CompletionLogps:
    """A model ready to score sequences of up to `longest` tokens, in the layout it can be shown right in.

    Raises:
        ModelError: it does not load, or does not fit.
    """
    device = pick_device()
    model = load_model(folder, dtype, device)
    check_fits(model, load_tokenizer(folder), longest, folder)
    layout = choose_layout(model, dtype, max(2, longest))
    tell(f"scoring with {folder} on {device} in {dtype}, {layout.name}")
    return CompletionLogps(model, dtype, layout)


def as_pairs(prompts: Sequence[Ids], completions: Sequence[Ids]) -> Paired:
    """Two completions of a prompt a pair, in the order they come in; empty completions are left out.

    Example: of completions 0, 1, 2 of one prompt the pairs are (0, 1) and (2, 2).
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(completion):
            by_prompt.setdefault(tuple(prompt), []).append(number)
    pairs, places = [], []
    for prompt, numbers in by_prompt.items():
        for at in range(0, len(numbers), 2):
            one, other = numbers[at], numbers[min(at + 1, len(numbers) - 1)]
            pairs.append(Sides(list(prompt), list(completions[one]), list(completions[other])))
            places.append((one, other))
    return Paired(pairs, places)


def completion_logps(
    scorer: CompletionLogps,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
) -> list[Floats]:
    """The log-prob of every token of every completion, in nats.

    Args:
        scorer: a model in its layout.
        prompts: ids before each completion, at least one.
        completions: ids to score.
        tell: called with lines for a person.
        watch: called with the tokens that are done, and all.
    """
    paired = as_pairs(prompts, completions)
    found = [np.zeros(0, np.float32)] * len(completions)
    longest = max((sum(map(len, pair)) for pair in paired.pairs), default=1)
    budget = CPU_BATCH_TOKENS if scorer.device.type == "cpu" else measure_budget(scorer, longest)
    names = ("ref_chosen_token_logps", "ref_rejected_token_logps")
    for numbers in _batches(paired.pairs, budget, watch):
        scored = score_sides(scorer, [paired.pairs[number] for number in numbers], tell)
        for place, row in zip(numbers, scored.select(names).iter_rows(), strict=True):
            for number, values in zip(paired.places[place], row, strict=True):
                found[number] = np.array(values, dtype=np.float32)
    return found


def _batches(pairs: Sequence[Sides], budget: int, watch: Watch) -> Iterable[list[int]]:
    """Numbers of pairs, as many at a time as the budget holds, the longest first."""
    lengths = [sum(map(len, pair)) for pair in pairs]
    done, total = 0, sum(lengths)
    for numbers in micro_batches(range(len(pairs)), lengths, Limits(None, budget)):
        yield numbers
        done += sum(lengths[number] for number in numbers)
        watch(done, total)


def compare_models(
    policy: CompletionLogps,
    reference: CompletionLogps,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    watch: Watch = lambda _done, _total: None,
) -> list[Apart]:
    """Along each completion what both models say: of its tokens, and of all that could have come in their place.

    Args:
        policy: a model in its layout.
        reference: another one, with the same vocabulary.
        prompts: ids before each completion, at least one.
        completions: the ids.
        watch: called with the tokens that are done, and all.
    """
    paired = as_pairs(prompts, completions)
    none = np.zeros(0, np.float32)
    found = [Apart(none, none, none)] * len(completions)
    vocabulary = max(num_predicted(policy.model), num_predicted(reference.model))
    budget = min(CPU_BATCH_TOKENS, max(1, MOST_LOGITS // vocabulary))
    for numbers in _batches(paired.pairs, budget, watch):
        values = _compare([paired.pairs[number] for number in numbers], policy, reference)
        for place, pair in zip(numbers, values, strict=True):
            for number, apart in zip(paired.places[place], pair, strict=True):
                found[number] = apart
    return found


def _compare(pairs: list[Sides], policy: CompletionLogps, reference: CompletionLogps) -> list[tuple[Apart, Apart]]:
    """One pass of both models; out of memory computes the same pairs in halves."""
    values = None
    try:
        with torch.inference_mode():
            values = _token_values(pairs, policy, reference)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(pairs) == 1:
            hint = "two models at once need room: a smaller evaluate.max_new_tokens, or evaluate.dtype bfloat16_weights"
            raise MachineError("out of memory comparing two models", where="evaluate", hint=hint) from None
    if values is None:
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(pairs) // 2
        return [*_compare(pairs[:half], policy, reference), *_compare(pairs[half:], policy, reference)]
    ends = np.cumsum([len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)])
    sides = [Apart(*three) for three in zip(*(np.split(some, ends[:-1]) for some in values), strict=True)]
    return [*zip(sides[0::2], sides[1::2], strict=True)]


def _token_values(pairs: list[Sides], policy: CompletionLogps, reference: CompletionLogps) -> list[Floats]:
    """Log-probs of both models and the KL, (T,) each."""
    targets, (p, q) = _targets(pairs, policy.device), (_all_logits(scorer, pairs) for scorer in (policy, reference))
    width = min(p.shape[1], q.shape[1])  # what one has more is padding of its matrix, of no token
    log_p, log_q = p[:, :width].log_softmax(-1), q[:, :width].log_softmax(-1)
    kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    values = [logps_from_logits(p, targets), logps_from_logits(q, targets), kl.clamp(min=0)]
    return [some.float().cpu().numpy() for some in values]


def _targets(pairs: list[Sides], device: torch.device) -> Tensor:
    return torch.tensor(
        [token for pair in pairs for ids in (pair.chosen, pair.rejected) for token in ids], device=device
    )


def _all_logits(scorer: CompletionLogps, pairs: list[Sides]) -> Tensor:
    """(T, V) float32, pair by pair, chosen before rejected."""
    batch: Any = scorer.batch(pairs)
    with autocast(REGIMES[scorer.dtype], scorer.device):
        pieces = [logits for logits, _ in scorer.own_logits(batch)]
    return torch.cat(pieces).float()
