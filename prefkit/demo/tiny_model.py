"""A language model small enough for a demo: a byte-level tokenizer and a tiny Llama, trained in seconds on a CPU."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Conversation = Sequence[dict[str, str]]
BOS, SYSTEM, USER, ASSISTANT, END, PAD = (
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role must be system, user or assistant, not ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts, vocab_size=800):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def train_tiny_model(
    folder,
    conversations,
    seed=0,
    steps=400,
    batch_size=32,
    lr=3e-3,
    hidden=128,
    layers=4,
    heads=4,
    inter=344,
    vocab_size=800,
    progress=None,
    tie=True,
):
    start = time.perf_counter()
    tok = train_tokenizer([m["content"] for c in conversations for m in c], vocab_size)
    rows = [
        tok(t, add_special_tokens=False)["input_ids"]
        for t in tok.apply_chat_template(conversations, tokenize=False)
    ]
    print(
        "tok",
        time.perf_counter() - start,
        len(tok),
        len(rows),
        sum(map(len, rows)) / len(rows),
        max(map(len, rows)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cfg = LlamaConfig(
            vocab_size=len(tok),
            hidden_size=hidden,
            intermediate_size=inter,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=256,
            tie_word_embeddings=tie,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
        model = LlamaForCausalLM(cfg)
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    print(sum(p.numel() for p in model.parameters()))
    order = []
    model.train()
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(rows), generator=g).tolist()
        batch = [rows[order.pop()] for _ in range(batch_size)]
        ids = torch.full((len(batch), max(map(len, batch))), tok.pad_token_id)
        for i, b in enumerate(batch):
            ids[i, : len(b)] = torch.tensor(b)
        f = min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for gr in opt.param_groups:
            gr["lr"] = lr * f
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tok.pad_token_id
        )
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 25 == 0:
            print(step, round(loss.item(), 3), round(time.perf_counter() - start, 1), flush=True)
    model.eval()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return {"loss": loss.item(), "s": time.perf_counter() - start}
