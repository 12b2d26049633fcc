"""A base model for the demo: a byte-level tokenizer and a Llama of 0.4 million weights, made in seconds on a CPU.

Comes in: conversations. Goes out: a folder that AutoTokenizer and AutoModelForCausalLM load. The price is some 20
seconds of one core. The same conversations and seed give the same weights on a machine, however many cores it has;
the caller's random state and number of threads are left as they were.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from prefkit.demo.world import Message

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
PAD_ID = 0  # the first of the special tokens, which come first in the vocabulary
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
    steps: int = 450,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
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
    model, losses = _new_model(tokenizer, seed), []
    batches = islice(_batches(rows, batch_size, seed), steps)
    with one_thread():
        for loss in _train(model, batches, steps, learning_rate):
            losses.append(loss)
            if progress is not None:
                progress(len(losses), steps, loss)
    _save(model, tokenizer, folder)
    loss = statistics.fmean(losses[-10:])
    return {"loss": loss, "num_parameters": model.num_parameters(), "seconds": time.perf_counter() - start}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: for matrices this small more gain little, and sums would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    model: LlamaForCausalLM, batches: Iterable[torch.Tensor], steps: int, learning_rate: float
) -> Iterator[float]:
    """Update the model on padded ids (batch, length); gives the loss of each update as it is made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for ids in batches:
        # Padding stands on the right, where causal attention never looks back at it: no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,  # 0.02, the default, suits wider models and starts this one slowly
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


def _batches(rows: Sequence[torch.Tensor], batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Padded batches (batch, length) without end: rows of like length together, batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order.sort(key=lambda row: len(rows[row]) // 8)  # stable: rows of one length stay shuffled
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            members = [rows[row] for row in batches[batch]]
            yield torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=PAD_ID)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both; a progress bar for two megabytes would only disturb the caller's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: a folder with weights is a whole one
    if shown:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
