"""Load a model and its tokenizer the way the reference pass, the gate and the trainer all need it.

safetensors only, no remote code, nothing from a network. Dropout is off for good: the log-probs of policy and reference
must be functions of the weights. `dtype` names one of three regimes, built here and nowhere else.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from prefkit.adapters import base_folder, is_adapter
from prefkit.errors import ModelError, first_line
from prefkit.identity import model_config, weight_files
from prefkit.lora import load_adapter

CPU = torch.device("cpu")


class Regime(NamedTuple):
    """How numbers are held and multiplied: the dtype of the weights, and of autocast where there is one."""

    weights: torch.dtype
    autocast: torch.dtype | None


REGIMES = {
    "float32": Regime(torch.float32, None),
    "bfloat16": Regime(torch.float32, torch.bfloat16),
    "bfloat16_weights": Regime(torch.bfloat16, None),
}


def pick_device() -> torch.device:
    """A CUDA device where there is one (of several processes each has its own), else the CPU."""
    if not torch.cuda.is_available():
        return CPU
    local = int(os.environ.get("LOCAL_RANK") or 0)
    return torch.device("cuda", local % torch.cuda.device_count())  # some launchers show each process one device


def autocast(regime: Regime, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a regime, or none."""
    if regime.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=regime.autocast)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars: loading and saving a model is one line of ours, or none."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def muted_transformers() -> Iterator[None]:
    """Without transformers' warnings: what it says of an attention that is only tried is no fault of the model."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder; of an adapter that has none, its base's.

    Raises:
        ModelError: there is none that loads.
    """
    if not Path(folder).is_dir():
        raise ModelError(
            "no such model folder",
            where=str(folder),
            expected="a folder of save_pretrained, with its tokenizer",
        )
    if not _has_tokenizer(folder) and is_adapter(folder):
        folder = base_folder(folder)
    if not _has_tokenizer(folder):
        raise ModelError(
            "no tokenizer in it", where=str(folder), expected="tokenizer.json, as written by save_pretrained"
        )
    if (Path(folder) / "config.json").exists():
        model_config(Path(folder))  # a damaged one would be laid to the tokenizer
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, the user needs the folder and the reason
        raise ModelError(f"its tokenizer does not load: {first_line(error)}", where=str(folder)) from None
    # texts of any length are encoded, to see which are too long: no word of transformers' about the first of them
    found.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return found


def _has_tokenizer(folder: str | Path) -> bool:
    names = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "spiece.*", "tokenizer_config.json")
    return any(any(Path(folder).glob(name)) for name in names)


def steady_sums() -> None:
    """Ask MKL for matrix products whose bits do not depend on the number of threads.

    Without it one token in some 100,000 differs in its last bit between one thread and two, and a reference scored by
    several processes would not have the bytes of one (same rate of work with it: measured). MKL reads this at its first
    product in a process.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def load_model(
    folder: str | Path, dtype: str, device: torch.device, attention: str = "auto", *, auto: Any = AutoModelForCausalLM
) -> nn.Module:
    """A causal LM in one regime, in eval mode and without dropout. With an adapter in it, that alone would be trained.

    Args:
        folder: as written by save_pretrained, an adapter's too; weights are safetensors. Adapter weights are float32.
        dtype: float32 | bfloat16 | bfloat16_weights.
        device: where it goes.
        attention: sdpa | eager; with any other kind the class's own choice: packed and flex come with a layout.
        auto: the transformers class that knows its architecture; AutoModelForSequenceClassification of a reward model.

    Raises:
        ModelError: it does not load, or the class does not support that attention.
        InputError: an adapter without peft.
    """
    steady_sums()
    path = base_folder(folder)
    weight_files(path)
    model_config(path)
    chosen = {"attn_implementation": attention} if attention in ("sdpa", "eager") else {}
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with quiet_transformers():
            both: Any = auto.from_pretrained(
                path,
                config=config,
                dtype=REGIMES[dtype].weights,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **chosen,
            )
    except Exception as error:  # as above
        raise ModelError(f"the model does not load: {first_line(error)}", where=str(folder)) from None
    model, loaded = both
    if absent := sorted([*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])]):
        named = ", ".join(absent[:5])
        raise ModelError(
            f"{len(absent)} of its weights are missing or of another shape: {named}", where=str(folder), expected="all"
        )
    if is_adapter(folder):
        load_adapter(model, folder)
    disable_dropout(model)
    module: nn.Module = model.to(device).eval()
    return module


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to zero, modules and rates kept as attributes alike (attention, layer drop)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward instead of keeping them (gradient checkpointing).

    transformers does so in train mode only; dropout is off for good, so nothing else changes.
    """
    model.train()
    # its name now, and its name in earlier releases of transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"{type(model).__name__} has no gradient checkpointing", hint="--set train.gradient_checkpointing=false"
        ) from None
    device = next(model.parameters()).device
    ids = (torch.arange(16, device=device) % model.get_input_embeddings().weight.shape[0])[None]
    with torch.no_grad():
        once, again = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    if not torch.equal(once, again):
        raise ModelError(
            f"{type(model).__name__} takes its dropout from its config in train mode",
            expected="one that is a function of its weights",
            hint="--set train.gradient_checkpointing=false, or dropout 0 in config.json",
        )


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The list of a model's layers, known by their number in its config; None where it keeps none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model has positions for, by its config.json; None where it says of no last one."""
    inner = config.get("text_config")
    told = inner if isinstance(inner, dict) else config
    found = [told.get(name) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return next((one for one in found if isinstance(one, int) and one > 0), None)


def check_fits(model: nn.Module, tokenizer: Any, max_length: int, where: str) -> None:
    """The model has a row for every token id, and a position for every token of precompute.max_length.

    Whoever has another limit asks `positions_of` first.

    Raises:
        ModelError: it has not.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings", where=where)
    if not _is_causal(model):
        raise ModelError("not a causal language model: what comes later changes what it says before", where=where)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"precompute.max_length is {max_length}, the model has {positions} positions (max_position_embeddings)",
            where=where,
            hint=f"--set precompute.max_length={positions}",
        )


def _is_causal(model: Any) -> bool:
    """Whether the logits of a position do not depend on the tokens after it: the last one is changed to see."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=device) % vocabulary).repeat(2, 1)
    ids[1, -1] = vocabulary - 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    apart = (logits[0] - logits[1]).abs().amax(-1)
    return not bool(apart[:-1].max() > 1e-3 * apart[-1])  # not finite is for the log-probs to find
