"""Adapter folders, as peft's save_pretrained writes them: whose adapter it is, and what of it decides a number.

A folder with adapter_config.json and adapter_model.safetensors stands for a model: its base with the adapter in it. It
may be handed in wherever a model folder may. Only LoRA (arXiv 2106.09685) is taken, with the settings named here; what
is not known here is refused by its name, since nothing shows that it is scored right. No torch, no peft: files only.
"""

import json
from pathlib import Path
from typing import Any, Literal

from prefkit.config import TrainConfig
from prefkit.errors import InputError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
MERGE = "fold it into its base with peft: merge_and_unload(), then save_pretrained(FOLDER)"

# settings that decide what the tensors mean, with the values that leaving them out stands for
DECIDING: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": None,
    "exclude_modules": None,
    "target_parameters": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
}
# settings that decide no number of an adapter that is trained already: paths, how it began, what it was trained with
PASSING = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "eva_config",
    "megatron_core",  # a name; megatron_config would use it
    "qalora_group_size",  # use_qalora would use it
    "runtime_config",
}
# ways to begin that leave the base as it is; all others (pissa, olora, corda, loftq...) begin by changing it
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def is_adapter(folder: str | Path) -> bool:
    """Whether a model folder holds an adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json, of an adapter that can be shown right.

    Raises:
        ModelError: it cannot be read, is of another kind than LoRA, or has a setting that is not known here.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError("cannot be read as JSON", where=str(path), expected="as peft's save_pretrained") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelError("says no peft_type", where=str(path), expected="as peft's save_pretrained")
    if config["peft_type"] != "LORA":
        raise ModelError(f"an adapter of the kind {config['peft_type']}", where=str(path), expected="LORA", hint=MERGE)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(f"an adapter for {config['task_type']}", where=str(path), expected="CAUSAL_LM")
    begun = config.get("init_lora_weights", True)
    if begun not in BEGINNINGS:
        raise ModelError(
            f"init_lora_weights {begun} changed the base itself, which is not in the folder",
            where=str(path),
            expected="an adapter saved with path_initial_model_for_weight_conversion",
            hint=MERGE,
        )
    if unknown := sorted(name for name in config.keys() - DECIDING.keys() - PASSING if config[name]):
        raise ModelError(
            f"has {', '.join(unknown)}, of which nothing shows that it is scored right",
            where=str(path),
            expected="LoRA, with or without rslora and DoRA",
            hint=MERGE,
        )
    for weights in MODEL_WEIGHTS:
        if (Path(folder) / weights).exists():
            raise ModelError(
                f"holds both a model ({weights}) and an adapter ({ADAPTER_CONFIG})",
                where=str(folder),
                expected="one of them",
            )
    return config


def adapter_weights(folder: str | Path) -> Path:
    """The safetensors file of an adapter.

    Raises:
        ModelError: there is none.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.exists():
        raise ModelError(
            "no safetensors weights", where=str(path), hint="save the adapter with save_pretrained(FOLDER)"
        )
    return path


def base_folder(folder: str | Path) -> Path:
    """The folder of the model that an adapter belongs to; of a folder that is no adapter, the folder itself.

    base_model_name_or_path is absolute, or relative to the adapter's folder, or to the working directory: the first of
    these that is there. A name on a hub is not looked up.

    Raises:
        ModelError: no such folder, or it holds an adapter too.
    """
    if not is_adapter(folder):
        return Path(folder)
    name = adapter_config(folder).get("base_model_name_or_path") or ""
    places = [place for place in (Path(folder) / name, Path(name)) if name and (place / "config.json").is_file()]
    if not places:
        raise ModelError(
            f"its base model {name!r} is no model folder here",
            where=str(Path(folder) / ADAPTER_CONFIG),
            expected="base_model_name_or_path: absolute, or relative to the adapter's folder or the working directory",
            hint=f"write the base model's folder into {ADAPTER_CONFIG}",
        )
    if is_adapter(places[0]):
        raise ModelError(
            f"its base model {name!r} is an adapter too", where=str(Path(folder) / ADAPTER_CONFIG), hint=MERGE
        )
    return places[0]


def deciding_settings(folder: str | Path) -> dict[str, Any]:
    """What of adapter_config.json decides numbers: part of a reference's identity; lists of names in order."""
    config = adapter_config(folder)
    found = {name: config.get(name, usual) for name, usual in DECIDING.items()}
    return {name: _settled(value) for name, value in found.items()}


def _settled(value: Any) -> Any:
    """Names in one order (peft writes sets), nothing as None, whole numbers as such."""
    if isinstance(value, list):
        return sorted(value, key=str) or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value != {} else None


def saved_as(settings: TrainConfig, folder: str | Path) -> Literal["model", "adapter", "merged"]:
    """What the run's model/ will hold, from what is trained.

    Args:
        settings: of the run.
        folder: the policy's.

    Raises:
        InputError: settings that the policy leaves without an effect.
    """
    there = is_adapter(folder)
    if there and settings.lora is not None:
        raise InputError(
            f"train.lora would be a second adapter: {folder} is one, and goes on being trained",
            where="train.lora",
            hint="leave train.lora out, or fold the adapter into its base with peft's merge_and_unload() first",
        )
    if not there and settings.lora is None:
        if settings.merge_adapter:
            raise InputError(
                "train.merge_adapter has no effect: there is no adapter",
                where="train.merge_adapter",
                hint="--set train.lora='{r: 16}', or leave train.merge_adapter out",
            )
        return "model"
    return "merged" if settings.merge_adapter else "adapter"
