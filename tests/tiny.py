"""Tiny random models, a tiny tokenizer, small datasets, and the plain code that is the log-prob kernel's oracle."""

import functools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline

Ids: TypeAlias = list[int]
Row: TypeAlias = dict[str, Any]

WORDS = ["river", "stone", "quiet", "morning", "letter", "garden", "window", "copper", "bridge", "seven", "lantern"]
WORDS += ["winter", "basket", "honest", "paper", "orange", "carry", "follow", "gather", "listen", "answer", "question"]
WORDS += ["measure", "border", "simple", "narrow", "silver", "thread", "cloud", "harvest", "engine"]
PAD, BOS, END, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def text_rows(count: int, seed: int = 0, low: int = 2, high: int = 12) -> list[Row]:
    """Pairs of a text dataset, all different, of different lengths; completions begin with a space."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"Note {number}: {sentence(rng, low, high)}",
            "chosen": f" {sentence(rng, low, high)}.",
            "rejected": f" {sentence(rng, low, high)}!",
        }
        for number in range(count)
    ]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat_row(prompt: str, chosen: str, rejected: str) -> Row:
    return {
        "prompt": [turn("user", prompt)],
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
    }


def chat_rows(count: int, seed: int = 0, low: int = 2, high: int = 12) -> list[Row]:
    """Pairs of a chat dataset, all different, every third with an earlier exchange."""
    rows = [
        chat_row(*(text.strip() for text in (r["prompt"], r["chosen"], r["rejected"])))
        for r in text_rows(count, seed, low, high)
    ]
    for row in rows[::3]:
        row["prompt"] = [turn("user", "hello"), turn("assistant", "good morning"), *row["prompt"]]
    return rows


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([sentence(rng, 5, 30) for _ in range(200)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = CHAT_TEMPLATE, more_controls: Sequence[str] = ()) -> Any:
    """A byte-level BPE of some 380 tokens; by default it puts BOS, and no EOS, around a text."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, *more_controls],
        chat_template=template,
    )


@functools.cache
def gpt2_tokenizer(data: Path) -> Any:
    return GPT2Tokenizer.from_pretrained(data / "tokenizers" / "gpt2")


@functools.cache
def gpt_neox_tokenizer(data: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "gpt-neox")
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


TOKENIZERS = {"gpt2": gpt2_tokenizer, "gpt-neox": gpt_neox_tokenizer}


def random_model(config: PreTrainedConfig, seed: int = 0, **chosen: Any) -> Any:
    """A model with random weights in eval mode, in float32. The random state of the caller stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=torch.float32, **chosen)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # biases begin as zeros: a kernel that forgot them would look right
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# std .3 a weight: at the usual .02 all log-probs are about -ln V, and hardly any mistake would show
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_config(vocab_size: int = 380, **changes: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocab_size, **(SIZES | changes))


def gpt2_config(vocab_size: int = 380, **changes: Any) -> GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
    return GPT2Config(vocab_size=vocab_size, **(sizes | {"bos_token_id": 1, "eos_token_id": 2} | changes))


def gemma2_config(vocab_size: int = 380, **changes: Any) -> Gemma2Config:
    """Soft caps so low that leaving out either changes most log-probs."""
    caps = {
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 8,
        "head_dim": 8,
    }
    return Gemma2Config(vocab_size=vocab_size, **(SIZES | caps | changes))


def mistral_config(vocab_size: int = 380, window: int | None = 8, **changes: Any) -> MistralConfig:
    return MistralConfig(vocab_size=vocab_size, sliding_window=window, **(SIZES | changes))


def mamba_config(vocab_size: int = 380, **changes: Any) -> MambaConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return MambaConfig(vocab_size=vocab_size, **(sizes | changes))


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return folder


def tiny_llama(folder: Path, seed: int = 0, template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """A folder with a tiny Llama and the tiny tokenizer, as a user would hand it in."""
    tokenizer = tiny_tokenizer(template)
    return save_model(folder, random_model(llama_config(len(tokenizer), **changes), seed), tokenizer)


def plain_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """THE oracle: one sequence through the model, log_softmax of its own logits in float32, gathered. (len,)"""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    wanted = torch.tensor(list(completion))
    found: Tensor = logps[len(prompt) - 1 : -1].gather(1, wanted[:, None])[:, 0]
    return found


def random_ids(rng: random.Random, count: int, vocab_size: int = 380) -> Ids:
    return [rng.randrange(vocab_size) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def built(
    folder: Path, rows: Iterable[Mapping[str, Any]], model: Path, kind: str = "text", **sections: Any
) -> Pipeline:
    """Write rows and a pipeline below `folder`, build folder/dataset, and return the pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_rows(folder / "pairs.jsonl", rows)
    precompute = {"model": str(model), "max_length": 128, "min_completion_tokens": 4} | sections.pop("precompute", {})
    settings = {
        "dataset": str(folder / "dataset"),
        "kind": kind,
        "sources": [{"path": str(source), "format": "pairs"}],
        "precompute": precompute,
        "split": {"test_share": 0.0},
        **sections,
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    pipeline = load_pipeline(path)
    build_dataset(pipeline)
    return pipeline


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path; but not how long things took."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("perf."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
