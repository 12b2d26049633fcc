"""Adapters for tests, made by peft itself on tiny models: what a user's SFT would have left."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny import SIZES, random_model, save_model, tiny_tokenizer
from torch import Tensor
from transformers.utils import logging

IDS = torch.tensor([[1, 17, 200, 33, 45, 260, 9, 9, 301, 12, 77, 150]])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without peft's warnings and transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if shown:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def mixtral_config(**changes: Any) -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralConfig(vocab_size=380, **(SIZES | experts | changes))


def shaken(model: Any, seed: int = 3) -> None:
    """Move all that an adapter trains, so that it does something: B begins as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def sft_adapter(folder: Path, base: Path, seed: int = 3, *, tokenizer: bool = True, **settings: Any) -> Path:
    """A trained adapter of a base folder, written by peft; r 4, alpha 8, all linear layers, unless settings say so."""
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**(chosen | settings)))
        shaken(adapted, seed)
        adapted.save_pretrained(str(folder))
        if tokenizer:
            tiny_tokenizer().save_pretrained(folder)
    return folder


def base_of(folder: Path, config: Any, seed: int = 0) -> Path:
    return save_model(folder, random_model(config, seed), tiny_tokenizer())


def by_peft(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The oracle: peft's own way to load an adapter folder."""
    with quiet():
        return peft.AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
