"""LoRA layers in a model (arXiv 2106.09685): put in, loaded, saved and folded in, by peft.

The class of transformers stays the model, its layers are replaced in place: y = W x + alpha / r * B A x, where W stays
as it is and A, B are trained. So nothing that scores a model knows of adapters. Adapter weights are float32 in every
regime. peft is an optional extra and imported only here; files are local, safetensors, and nothing asks a hub.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prefkit.adapters import ADAPTER_WEIGHTS, adapter_config, adapter_weights
from prefkit.errors import InputError, ModelError, is_out_of_memory
from prefkit.train_settings import LoraSettings

NAME = "default"  # peft's own name for the only adapter
PREFIX = "base_model.model."  # of every tensor in peft's files
TUNER, CARRIED = "peft_tuner", "peft_carried"  # where a model keeps who put the layers in, and base tensors of a file
PROBED = 16  # tokens of a forward pass that shows which layers are called


def peft_module(where: str) -> Any:
    """The peft package.

    Args:
        where: what asks for it, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        with _quiet():
            import peft
    except ImportError:
        raise InputError(
            "adapters need peft, which is not installed", where=where, hint="pip install 'prefkit[lora]'"
        ) from None
    return peft


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings: what of them could go wrong is refused or mended here, and tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layer_names(model: nn.Module) -> list[str]:
    """Last names of the layers that can have an adapter (linear ones and embeddings), in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def add_adapter(model: Any, settings: LoraSettings, seed: int) -> None:
    """Put a new adapter into a model, in place: it changes nothing yet (B = 0), and it alone is trained.

    Args:
        model: as load_model gives it.
        settings: its rank, scale and layers.
        seed: of A; the random state of the caller stays as it was.

    Raises:
        InputError: peft is missing, a name is no layer's, or the class does not call such a layer.
    """
    where = "train.lora.target_modules"
    peft = peft_module("train.lora")
    targets, known = settings.target_modules, layer_names(model)
    if targets != "all-linear":
        full = [name for name, _ in model.named_modules()]
        matched = {t: {n.rpartition(".")[2] for n in full if n == t or n.endswith(f".{t}")} for t in targets}
        if unknown := [target for target, found in matched.items() if not found or not found <= set(known)]:
            raise InputError(
                f"no linear layer is called {', '.join(unknown)}",
                where=where,
                expected=f"all-linear, or names among {', '.join(known)}",
            )
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model is
        torch.default_generator.manual_seed(seed)
        try:
            _inject(peft, model, config)
        except ValueError as error:
            raise InputError(
                f"peft takes no such layer: {_line(error)}", where=where, expected=f"names among {', '.join(known)}"
            ) from None
    if unused := _never_called(model):
        raise InputError(
            f"{type(model).__name__} reads the weights of {', '.join(unused)} past their layers, so an adapter there "
            "is never used",
            where=where,
            expected=f"names among {', '.join(name for name in known if name not in unused)}",
        )


def load_adapter(model: Any, folder: str | Path) -> None:
    """Put the adapter of a folder into its base, in place; it alone would be trained. Dropout is off.

    Args:
        model: the base, on any device.
        folder: as peft's save_pretrained writes it.

    Raises:
        InputError: peft is missing.
        ModelError: an adapter that is refused (adapters.py), or one of another model.
    """
    adapter_config(folder)
    path = adapter_weights(folder)
    peft = peft_module(str(folder))
    try:
        with _quiet():
            config = peft.LoraConfig.from_pretrained(str(folder))
        config.lora_dropout, config.inference_mode, config.init_lora_weights = 0.0, False, True
        with torch.random.fork_rng(devices=[]):
            _inject(peft, model, config)
        # the model is no PeftModel: its names are without the prefix
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
        with _quiet():
            result = peft.set_peft_model_state_dict(model, tensors, adapter_name=NAME)
            own = peft.get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    except Exception as error:  # whatever peft raises, the user needs the folder and the reason
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the adapter does not load: {_line(error)}", where=str(folder)) from None
    missing = sorted(set(result.missing_keys) & set(trainable_names(model)))
    if apart := [*missing, *result.unexpected_keys]:
        raise ModelError(
            f"{len(apart)} tensors are missing in the adapter, or are of another model: {', '.join(apart[:5])}",
            where=str(path),
            expected="all that its adapter_config.json names, and no others",
        )
    # tensors of the base that were saved with the adapter (enlarged or trained embeddings) belong to it
    vars(model)[CARRIED] = sorted((tensors.keys() - own.keys()) & model.state_dict().keys())


def _inject(peft: Any, model: Any, config: Any) -> None:
    """Replace the layers; the adapter in float32, trained, and nothing else."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    training = model.training
    with _quiet():
        # as inject_adapter_in_model does it, which throws away what can fold the adapter in
        vars(model)[TUNER] = peft.LoraModel(model, config, NAME)
        cast_adapter_dtype(model, NAME, autocast_adapter_dtype=True)
    model.train(training)


def _never_called(model: Any) -> list[str]:
    """Last names of adapted layers of which not one is called in a forward pass.

    Some classes (Mamba's fused kernels) read a layer's weight and never call the layer. An expert that no token chose
    is no such case: others of its name are called.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name.rpartition(".")[2]))
        for name, module in layers.items()
    ]
    device = next(model.parameters()).device
    ids = (torch.arange(PROBED, device=device) % model.get_input_embeddings().weight.shape[0])[None]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(last for name in layers if (last := name.rpartition(".")[2]) not in called))


def trainable_names(model: nn.Module) -> list[str]:
    """The parameters that training changes, by name, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does; the same adapter gives the same bytes.

    Args:
        model: with an adapter in it, of add_adapter or load_adapter.
        folder: where to; it is made.
        base: base_model_name_or_path: the folder of the model it belongs to.
    """
    peft = peft_module(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode, config.task_type = base, True, "CAUSAL_LM"
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))  # a set is written in the order of this process
    state = model.state_dict()
    with _quiet():
        found = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=NAME, save_embedding_layers=False)
        config.save_pretrained(str(folder))
    found |= {name: state[name] for name in vars(model).get(CARRIED, [])}
    saved = {PREFIX + name: found[name].detach().cpu().contiguous().clone() for name in sorted(found)}
    save_file(saved, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merged(model: Any) -> Any:
    """Fold the adapter into the weights, in place and in their dtype: the same model, without peft's layers.

    Where input and output embeddings are one matrix and one of them has an adapter, they are two from here on.
    """
    tuner = vars(model).pop(TUNER)
    vars(model).pop(CARRIED, None)
    _untie(model)
    with _quiet():
        tuner.merge_and_unload()
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not source.weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model.requires_grad_(True)


def _untie(model: Any) -> None:
    """Give the head a matrix of its own where it shares one with the embeddings, and only one of both is adapted."""
    from peft.tuners.lora import LoraLayer

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(layer, LoraLayer) for layer in layers):
        plain: list[Any] = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
        if plain[0].weight is plain[1].weight:
            plain[1].weight = nn.Parameter(plain[1].weight.detach().clone())


def save_merged(model: Any, folder: Path) -> None:
    """Fold the adapter in (`merged`) and write the whole model in the Hugging Face layout: it loads without peft."""
    merged(model).save_pretrained(folder)


def _line(error: Exception) -> str:
    """What an error says; torch says what does not fit in the last line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if "Error(s) in loading" in lines[0] else 0].strip()
