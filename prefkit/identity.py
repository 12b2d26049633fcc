"""What a reference is: the settings that decide its numbers, hashed into its key, so that nothing stale is ever used.

Weights are hashed from the safetensors files by tensor (name, dtype, shape, bytes), so re-sharding keeps the hash; the
tokenizer by what it does, not by how its files are laid out. An adapter is its base's tensors and its own, and what of
its settings decides numbers. No torch here: bytes on disk are enough.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prefkit.adapters import adapter_weights, base_folder, deciding_settings, is_adapter
from prefkit.encode import EncodeSettings
from prefkit.errors import ModelError
from prefkit.format import canonical_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
BLOCK = 1 << 22


class TensorPlace(NamedTuple):
    """Where the bytes of a tensor lie in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ModelError: there are none, or the folder does not exist.
    """
    if not folder.is_dir():
        raise ModelError(
            "no such model folder",
            where=str(folder),
            expected="a folder with config.json and model.safetensors",
        )
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():  # where both are, the single file is loaded
        try:
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(names))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(
                "no index of safetensors files", where=str(folder / INDEX), expected="a weight_map"
            ) from None
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.exists():
            raise ModelError(
                "no safetensors weights", where=str(file), hint="save the model with save_pretrained(FOLDER)"
            )
    return files


def model_folder(folder: str | Path) -> Path:
    """The folder of a model: that of a run's final model where the folder is a run.

    Raises:
        ModelError: the run has no final model yet.
    """
    path = Path(folder)
    if (path / "run.json").exists() and not (path / "config.json").exists():
        if not (path / "model").is_dir():
            hint = "the command that began the run goes on with it"
            raise ModelError("the run has no final model yet", where=str(path), expected="a finished run", hint=hint)
        return path / "model"
    return path


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Name to place for every tensor of a safetensors file (8 bytes header length, JSON header, then the bytes)."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _place(path, 8 + length, entry) for name, entry in header.items()}
        except (struct.error, ValueError, MemoryError, OverflowError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError("no safetensors file", where=str(path)) from None


def _place(path: Path, base: int, entry: Mapping[str, Any]) -> TensorPlace:
    start, end = entry["data_offsets"]
    return TensorPlace(path, str(entry["dtype"]), tuple(entry["shape"]), base + start, base + end)


def weights_sha256(folder: Path) -> str:
    """Sha256 over the tensors sorted by name: name, dtype, shape and bytes of each; of an adapter its base's too."""
    places: dict[str, TensorPlace] = {}
    for path in weight_files(base_folder(folder)):
        places |= tensor_places(path)
    if is_adapter(folder):  # no tensor of a model has a space in its name
        places |= {f"adapter {name}": place for name, place in tensor_places(adapter_weights(folder)).items()}
    digest = hashlib.sha256()
    opened: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(places):
            place = places[name]
            digest.update(canonical_json([name, place.dtype, list(place.shape)]).encode())
            file = (
                opened.setdefault(place.path, place.path.open("rb")) if place.path not in opened else opened[place.path]
            )
            _update(digest, file, place)
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def _update(digest: Any, file: BinaryIO, place: TensorPlace) -> None:
    file.seek(place.start)
    left = place.end - place.start
    while left:
        block = file.read(min(BLOCK, left))
        if not block:
            raise ModelError("the file is cut off", where=str(place.path))
        digest.update(block)
        left -= len(block)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json without what does not change a number; of an adapter its base's, and `adapter`: its own settings."""
    if is_adapter(folder):
        return model_config(base_folder(folder)) | {"adapter": deciding_settings(folder)}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "there is no config.json", where=str(folder), expected="a model folder of save_pretrained"
        ) from None
    except ValueError:
        raise ModelError("config.json is no JSON", where=str(folder)) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is no JSON object", where=str(folder))
    return {key: value for key, value in config.items() if key not in CONFIG_NOISE}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Sha256 over what decides the ids: the tokenizer's serialisation (no padding, no truncation), BOS and EOS."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for passing in ("padding", "truncation"):
            state.pop(passing, None)
    else:
        added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(canonical_json([state, ends]).encode()).hexdigest()


def policy_identity(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The part of an identity that a model folder brings: weights, config, tokenizer."""
    return {
        "weights_sha256": weights_sha256(folder),
        "config": model_config(folder),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def reference_identity(policy: Mapping[str, Any], settings: EncodeSettings, dtype: str) -> dict[str, Any]:
    """All settings that decide a reference's numbers; hashed into its key by format.reference_key."""
    return {
        **policy,
        "chat_template_sha256": template_sha256(settings.chat_template),
        "kind": settings.kind,
        "max_length": settings.max_length,
        "truncation": {
            "keep": "start",
            "long_prompt": settings.long_prompt,
            "min_completion_tokens": settings.min_completion_tokens,
        },
        "dtype": dtype,
    }


def identity_sha256(identity: Mapping[str, Any]) -> str:
    """Sha256 hex over an identity: one name for all of it."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def template_sha256(template: str | None) -> str | None:
    """Sha256 hex of a chat template's text, None for none."""
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()
