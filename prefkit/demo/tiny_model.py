"""A base model for the demo: a byte-level tokenizer and a Llama of half a million weights, made in seconds on a CPU.

Comes in: conversations. Goes out: a folder that AutoTokenizer and AutoModelForCausalLM load. The price is some 20
seconds on two cores. The same conversations, seed and number of threads give the same weights; the random state of
the caller is left as it was.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from prefkit.demo.world import Message

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MAX_LENGTH = 256  # tokens; a question and an answer of the demo world take 45, at most 80

# The rendered prompt is a prefix of prompt + completion, in characters and in tokens: the generation prompt is the
# special token that opens an assistant turn anyway, and byte-level merges never reach across a special token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role must be system, user or assistant, not ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 800) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`, with special tokens and chat template; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


def train_tiny_model(
    folder: Path,
    conversations: Sequence[Sequence[Message]],
    seed: int = 0,
    steps: int = 250,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Train tokenizer and model on whole conversations by next-token cross-entropy, and save both into `folder`.

    Args:
        folder: made if it is not there.
        conversations: turns of system, user and assistant, each conversation within MAX_LENGTH tokens.
        seed: of the initial weights and of the order of the conversations.
        steps: updates, with a linear warm-up over the first tenth and a cosine down to 0.
        batch_size: conversations an update.
        learning_rate: the largest of the schedule.
        progress: called after each update with the number of updates made, `steps`, and the loss in nats a token.

    Returns:
        `loss` (nats a token, mean of the last ten updates), `num_parameters` and `seconds`; none is written to disk.
    """
    start = time.perf_counter()
    tokenizer = train_tokenizer(turn["content"] for turns in conversations for turn in turns)
    rendered = [str(tokenizer.apply_chat_template(list(turns), tokenize=False)) for turns in conversations]
    rows = [torch.tensor(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    model, pad_id = _new_model(tokenizer, seed), int(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    losses = []
    for step, ids in zip(range(1, steps + 1), _batches(rows, batch_size, pad_id, seed), strict=False):
        # Padding stands on the right, where causal attention never looks back at it: no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step, steps, losses[-1])
    _save(model, tokenizer, folder)
    last = losses[-10:]
    return {
        "loss": sum(last) / len(last),
        "num_parameters": model.num_parameters(),
        "seconds": time.perf_counter() - start,
    }


def _new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        dtype="float32",  # whatever torch's default is at the moment
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _schedule(step: int, steps: int) -> float:
    """The learning rate's factor: up in a straight line over the first tenth, then down a cosine to 0."""
    warm_up = max(1, steps // 10)
    return (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * step / steps)


def _batches(rows: Sequence[torch.Tensor], batch_size: int, pad_id: int, seed: int) -> Iterator[torch.Tensor]:
    """Padded batches (batch, length) without end: rows of like length together, batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order.sort(key=lambda row: len(rows[row]) // 8)  # stable: rows of one length stay shuffled
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            members = [rows[row] for row in batches[batch]]
            yield torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=pad_id)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both; a progress bar for two megabytes would only disturb the caller's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
