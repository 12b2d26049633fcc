"""Whether a model and its tokenizer, about to be trained by somebody else's trainer, are those of a reference.

The gate's questions where there is no pipeline: a folder by its hash, a tokenizer by its own, and a model in memory by
what it scores. Other trainers are handed sums alone, so sums are compared: a side of n tokens that is off by d counts
as |d| / n against the gate's limit of one token, and as d / sqrt(n) against its root mean square, which is that of
single tokens where their errors are independent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefkit.adapters import is_adapter
from prefkit.encode import resolve_template
from prefkit.errors import GateError, ModelError
from prefkit.format import differing
from prefkit.gate import MAX_ABS, MAX_MEAN, MAX_RMS
from prefkit.identity import model_config, template_sha256, tokenizer_sha256, weights_sha256
from prefkit.store import write_json
from prefkit.work import TEMPLATE_FILE

CHECKPOINT_FILE = "prefkit.json"  # beside the trainer's own files in a checkpoint
ON_PURPOSE = "other_reference=True if the reference is another model on purpose"


class Carried(NamedTuple):
    """Whose reference a dataset has: its key, its identity, and the text of the chat template, if one was used."""

    key: str
    identity: dict[str, Any]
    template: str | None


class Agreement(NamedTuple):
    """How close a model's own sums came to a dataset's, in nats a token, over so many sides and their tokens."""

    sides: int
    tokens: int
    max_abs: float
    rms: float
    mean: float

    @classmethod
    def of(cls, apart: Sequence[float], counts: Sequence[int]) -> "Agreement":
        """From the difference of each side's sum and its number of tokens.

        >>> Agreement.of([0.02, -0.01], [4, 1])
        Agreement(sides=2, tokens=5, max_abs=0.01, rms=0.01, mean=0.002)
        """
        d, n = np.array(apart, dtype=np.float64), np.maximum(np.array(counts), 1)
        rms = math.sqrt(float((d * d / n).mean()))
        return cls(len(d), int(n.sum()), float((np.abs(d) / n).max()), rms, float(d.sum() / n.sum()))


def judge(figures: Agreement, *, exact: bool, where: str) -> None:
    """Refuse a model that does not score what the dataset says.

    Args:
        figures: of a sample.
        exact: model and reference both compute in plain float32.
        where: the dataset and its reference, for the message.

    Raises:
        GateError: they are further apart than two evaluations of one model.
    """
    good = figures.max_abs <= MAX_ABS if exact else figures.rms <= MAX_RMS and abs(figures.mean) <= MAX_MEAN
    if not good:  # also where a figure is no number
        raise GateError(
            f"the model's own scores are not the dataset's: {figures.max_abs:.3g} nats a token at most, RMS "
            f"{figures.rms:.3g}, mean {figures.mean:.3g}, over {figures.tokens} tokens",
            where=where,
            expected=f"at most {MAX_ABS:g}" if exact else f"RMS at most {MAX_RMS:g}, mean at most {MAX_MEAN:g}",
            hint=f"prefkit precompute DATASET --model M, and load the dataset again; {ON_PURPOSE}",
        )


def check_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """The weights and the config of a model folder are those that were scored.

    Raises:
        ModelError: it is no model folder, or holds an adapter alone.
        GateError: they are others.
    """
    if is_adapter(folder):
        raise ModelError(
            "holds an adapter, which this trainer does not load by itself",
            where=str(folder),
            expected="a model folder, or a PeftModel",
            hint="peft.PeftModel.from_pretrained(BASE, ADAPTER, is_trainable=True)",
        )
    mine = {"weights_sha256": weights_sha256(folder), "config": model_config(folder)}
    if lines := differing({name: identity[name] for name in mine}, mine):
        raise GateError(
            "not the model that was scored (reference and model): " + "; ".join(reversed(lines)),
            where=str(folder),
            expected="the reference's own model; to go on with a run, the model that it began with",
            hint=f"prefkit precompute DATASET --model {folder}; {ON_PURPOSE}",
        )


def check_tokenizer(tokenizer: Any, found: Carried) -> None:
    """The tokenizer and its chat template are the reference's; one without a template gets the reference's.

    Raises:
        GateError: they are others.
    """
    identity, where = found.identity, f"processing_class {tokenizer.name_or_path}".strip()
    theirs = {name: identity[name] for name in ("tokenizer_sha256", "chat_template_sha256")}
    if lines := differing(theirs, theirs | {"tokenizer_sha256": tokenizer_sha256(tokenizer)}):
        raise GateError(
            f"another tokenizer than the reference's (reference and processing_class): {lines[0]}",
            where=where,
            expected="the tokenizer of the model that was scored, without tokens added since",
        )
    if identity["kind"] != "chat":
        return
    if not tokenizer.chat_template:
        tokenizer.chat_template = found.template
    own = template_sha256(resolve_template("chat", None, tokenizer))
    if lines := differing(theirs, theirs | {"chat_template_sha256": own}):
        raise GateError(
            f"another chat template than the reference's (reference and processing_class): {lines[0]}",
            where=where,
            expected="the one that the pairs were rendered with: the trained model's tokenizer keeps it",
            hint=f"processing_class.chat_template = the text of reference/{found.key}/{TEMPLATE_FILE}",
        )


def mark_checkpoint(folder: Path, key: str) -> None:
    """Write down in a checkpoint, which may have no other file yet, what reference its run has."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CHECKPOINT_FILE, {"prefkit_reference": key})


def check_checkpoint(folder: Path, found: Carried) -> None:
    """A checkpoint is one of a run with this reference.

    Raises:
        GateError: it is of a run with another one, or does not say so.
    """
    try:
        told = json.loads((folder / CHECKPOINT_FILE).read_text(encoding="utf-8"))["prefkit_reference"]
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    if told != found.key:
        raise GateError(
            f"a checkpoint of a run with another reference: {told or 'it names none'}",
            where=str(folder / CHECKPOINT_FILE),
            expected=f"reference {found.key}",
            hint="go on from a checkpoint of PrecomputedDPOTrainer on the same dataset, or begin anew",
        )
