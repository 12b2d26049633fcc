"""Scores of a reward model: a sequence classifier with one output, as TRL's RewardTrainer and others leave it.

Comes in: prompts and responses. Goes out: one float32 a response, equal to what the model gives of each sequence alone,
or the reason why there is none: a sequence that is too long is never cut, because its end is what is scored.

Sequences are batched by length with padding on the right. Classes that score the last token look for it by the config's
pad_token_id, in ways of their own, so padding is tried on fixed pseudo-random sequences first; where it does not give
what each sequence alone gives, every sequence is scored by itself.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from prefkit.adapters import is_adapter
from prefkit.budget import CPU_BATCH_TOKENS
from prefkit.encode import encode_responses, resolve_template
from prefkit.errors import MachineError, ModelError, is_out_of_memory, located
from prefkit.format import Kind
from prefkit.identity import model_config, tokenizer_sha256, weights_sha256
from prefkit.models import REGIMES, autocast, load_model, load_tokenizer, muted_transformers, pick_device
from prefkit.work import Tell

GPU_BATCH_TOKENS = 32_768
NO_LIMIT = 1_000_000  # what tokenizers without a longest input say is far above
# what padding may change of a score, relative to its size from 1 on: rounding, of float32 and of bfloat16 (8 bits)
PADDING_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "bfloat16_weights": 2e-2}
Watch = Callable[[int, int], None]  # done, of all


class RewardModel(NamedTuple):
    """A reward model that is ready: `padded`: whether sequences of different lengths may be scored together."""

    model: nn.Module
    tokenizer: Any
    template: str | None
    dtype: str
    max_length: int | None
    padded: bool
    folder: str


def reward_identity(folder: str, kind: Kind, chat_template: str | None) -> dict[str, Any]:
    """What decides a reward model's scores besides dtype and max_length, without loading its weights.

    Raises:
        ModelError: there is no model that could be used.
    """
    path = Path(folder)
    if is_adapter(path):
        raise ModelError(
            "an adapter, not a whole reward model",
            where=folder,
            expected="a sequence classifier with its own weights",
            hint="merge it: merge_and_unload() of peft, then save_pretrained",
        )
    tokenizer = load_tokenizer(path)
    with located(folder):
        template = resolve_template(kind, chat_template, tokenizer, "scorers.chat_template")
    return {
        "weights_sha256": weights_sha256(path),
        "config": model_config(path),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template": template,
    }


def load_reward_model(
    folder: str, kind: Kind, *, dtype: str, max_length: int | None, chat_template: str | None, tell: Tell
) -> RewardModel:
    """A reward model, ready to score.

    Args:
        folder: as written by save_pretrained; weights are safetensors, the class is transformers' own.
        kind: of the candidates.
        dtype: float32 | bfloat16 | bfloat16_weights.
        max_length: longest input in tokens; None: what the model holds.
        chat_template: a jinja file, or one of our own; None: the tokenizer's.
        tell: called with lines for a person.

    Raises:
        ModelError: it does not load, or has not exactly one output.
    """
    tokenizer = load_tokenizer(folder)
    with located(folder):
        template = resolve_template(kind, chat_template, tokenizer, "scorers.chat_template")
    device = pick_device()
    model: Any = load_model(folder, dtype, device, auto=AutoModelForSequenceClassification)
    if model.config.num_labels != 1:
        raise ModelError(
            f"a classifier with {model.config.num_labels} outputs", where=folder, expected="one output, the reward"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings", where=folder)
    longest = longest_input(model, tokenizer)
    if max_length is not None and longest is not None and max_length > longest:
        raise ModelError(f"scorers.max_length is {max_length}, the model holds {longest} tokens", where=folder)
    limit = longest if max_length is None else max_length
    loaded = RewardModel(model, tokenizer, template, dtype, limit, True, folder)
    why = _against_padding(loaded)
    tell(f"rewards by {folder} on {device} in {dtype}, " + (f"one sequence at a time: {why}" if why else "in batches"))
    return loaded._replace(padded=not why)


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model takes, by its config, its position embeddings and its tokenizer; None: no limit."""
    found = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa counts from the padding's place on
        offsets = (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        )
        found.append(positions - next(offsets, 0))
    stated = getattr(tokenizer, "model_max_length", None)
    if isinstance(stated, int) and 0 < stated < NO_LIMIT:
        found.append(stated)
    return min(found, default=None)


def reward_responses(
    loaded: RewardModel,
    prompts: Sequence[Any],
    responses: Sequence[str],
    tools: Sequence[str | None],
    watch: Watch = lambda _done, _total: None,
) -> list[float | str]:
    """A score a response, or the reason why it has none: too_long | template_refused | control_token_in_text | ...

    Args:
        loaded: the model.
        prompts: messages each in a chat dataset, else texts.
        responses: texts.
        tools: that each prompt offers, as JSON; None: none.
        watch: called after every batch with responses done and all.
    """
    encoded = encode_responses(prompts, responses, tools, loaded.tokenizer, loaded.template)
    found: list[float | str] = []
    for ids in encoded:
        if isinstance(ids, str):
            found.append(ids)
        elif not ids:
            found.append("empty")
        else:
            found.append("too_long" if loaded.max_length is not None and len(ids) > loaded.max_length else 0.0)
    todo = [number for number, reason in enumerate(found) if not isinstance(reason, str)]
    done = len(found) - len(todo)
    sequences: list[list[int]] = [ids if isinstance(ids, list) else [] for ids in encoded]
    for batch in _batches(todo, sequences, loaded):
        for number, score in zip(batch, _scores(loaded, [sequences[n] for n in batch]), strict=True):
            found[number] = score
        done += len(batch)
        watch(done, len(found))
    return found


def _batches(todo: Sequence[int], sequences: Sequence[list[int]], loaded: RewardModel) -> Iterator[list[int]]:
    """The longest first, so that memory shows at once; what a batch holds with its padding stays within the budget."""
    device = next(loaded.model.parameters()).device.type
    budget = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS
    held: list[int] = []
    for number in sorted(todo, key=lambda n: (-len(sequences[n]), sequences[n], n)):
        if held and (not loaded.padded or (len(held) + 1) * len(sequences[held[0]]) > budget):
            yield held
            held = []
        held.append(number)
    if held:
        yield held


def _scores(loaded: RewardModel, sequences: list[list[int]]) -> list[float]:
    """One forward pass; out of memory computes the same batch in halves."""
    scores = None
    try:
        scores = _forward(loaded, sequences)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(sequences) == 1:
            message = "out of memory on a single response"
            hint = "a smaller scorers.max_length, or another dtype"
            raise MachineError(message, where=loaded.folder, hint=hint) from None
    if scores is None:  # only here: inside the except block the error would keep what the failed pass holds
        if next(loaded.model.parameters()).device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(sequences) // 2
        return [score for part in (sequences[:half], sequences[half:]) for score in _scores(loaded, part)]
    return scores


def _forward(loaded: RewardModel, sequences: Sequence[list[int]]) -> list[float]:
    """Scores of sequences padded on the right.

    A class that scores the last token finds it as the last one that is not config.pad_token_id. Where the config names
    none, a sequence alone is scored at its end: any id that none of them ends with does the same for a batch.
    """
    model: Any = loaded.model
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    named = getattr(config, "pad_token_id", None)
    ends = {ids[-1] for ids in sequences}
    pad = named if isinstance(named, int) and named >= 0 else next(i for i in range(len(ends) + 1) if i not in ends)
    longest = max(len(ids) for ids in sequences)
    rows = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences], device=device)
    try:
        if named is None and len(sequences) > 1:
            config.pad_token_id = pad
        with torch.inference_mode(), autocast(REGIMES[loaded.dtype], device):
            logits = model(input_ids=rows, attention_mask=mask).logits
    finally:
        if named is None and len(sequences) > 1:
            config.pad_token_id = None
    scores: list[float] = logits.float().reshape(len(sequences)).cpu().tolist()
    return scores


def _against_padding(loaded: RewardModel) -> str:
    """What stands against scoring sequences of several lengths together; "" where nothing does."""
    vocabulary, end = len(loaded.tokenizer), loaded.tokenizer.eos_token_id
    rng = random.Random(0)  # noqa: S311 - fixed, nothing secret
    words = [i for i in range(vocabulary) if i != end]  # classes that score their end token want one, and only one
    most = 24 if loaded.max_length is None else min(24, loaded.max_length)
    lengths = [length for length in (most, most // 2, 3, most) if 1 < length <= most]
    sequences = [[rng.choice(words) for _ in range(length - 1)] for length in lengths]
    sequences = [[*ids, rng.choice(words) if end is None else end] for ids in sequences]
    try:
        alone = [score for ids in sequences for score in _forward(loaded, [ids])]
    except (ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"it cannot score a sequence: {error}", where=loaded.folder) from None
    try:
        with muted_transformers():
            together = _forward(loaded, sequences)
    except (ValueError, IndexError, RuntimeError) as error:
        return f"its class takes no padding ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    tolerance = PADDING_TOLERANCE[loaded.dtype]
    apart = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(alone, together, strict=True))
    return "" if apart <= tolerance else f"padding changes its scores by {apart:.1g}"
