"""Which token comes next: temperature, top-k, top-p, and a pick by a random number that is this response's alone.

Comes in: logits. Goes out: ids, and their log-probs under the model itself: at temperature 1, nothing left out. The
random number of a token depends on seed, prompt, number of the response and position and on nothing else, so a sample
does not depend on what else is in the batch. The plain code it equals: transformers' own warpers, softmax, and the
first token at which the cumulative probability exceeds the number.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefkit.format import canonical_json

LIKELIEST = 256  # tokens that are sorted first where top_p is asked for; mostly they hold that share


class Warping(NamedTuple):
    """What is done to the probabilities; temperature 0: always the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are picked by the model's own probabilities."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k is None


class Picked(NamedTuple):
    """A token a row, and its log-prob under the model at temperature 1."""

    ids: Tensor  # (B,) int64
    logps: Tensor  # (B,) float32


def uniforms(seed: int, prompt_id: str, number: int, count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The numbers in [0, 1) of a response, one a position: 53 random bits each.

    Philox (Salmon et al. 2011) counts; its key is the hash of who asks. numpy keeps the raw bits of a bit generator
    the same across releases (NEP 19), which it does not promise of its distributions.
    """
    digest = hashlib.sha256(canonical_json(["sample", seed, prompt_id, number]).encode()).digest()
    key = np.frombuffer(digest[:16], np.uint64)
    raw = np.random.Philox(key=key).random_raw(count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)


def warp(logits: Tensor, warping: Warping) -> Tensor:
    """Probabilities, (B, V) float32: softmax at the temperature, what top-k and then top-p leave out at 0.

    Tokens that are as likely as the last one of top-k all stay, as in transformers. They need not sum to 1.
    """
    scaled = logits.float() / warping.temperature
    if warping.top_k is not None and warping.top_k < scaled.shape[-1]:
        least = scaled.topk(warping.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    return _nucleus(probs, warping.top_p) if warping.top_p < 1 else probs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all tokens but the likeliest ones, as few as hold `top_p` (arXiv 1904.09751); at least one stays."""
    values, places = probs.topk(min(LIKELIEST, probs.shape[-1]), dim=-1)
    if values.shape[-1] < probs.shape[-1] and bool((values.sum(-1) < top_p).any()):
        values, places = probs.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    return torch.zeros_like(probs).scatter(-1, places, values.masked_fill(before >= top_p, 0.0))


def pick(logits: Tensor, numbers: Tensor, warping: Warping, num_ids: int | None = None) -> Picked:
    """Pick a token a row.

    Args:
        logits: (B, V), the model's own.
        numbers: (B,) float64 in [0, 1): `uniforms`.
        warping: as it is asked for.
        num_ids: ids from here on are never picked: rows of the vocabulary that no token has.
    """
    logps = logits.float().log_softmax(-1)
    allowed = logps if num_ids is None or num_ids >= logps.shape[-1] else logps[:, :num_ids]
    if warping.temperature == 0:
        ids = allowed.argmax(-1)
    else:
        ids = _first_above((allowed.exp() if warping.is_plain else warp(allowed, warping)), numbers)
    return Picked(ids, logps.gather(-1, ids[:, None])[:, 0])


def _first_above(probs: Tensor, numbers: Tensor) -> Tensor:
    """The first id at which the cumulative probability exceeds its row's number: never one of probability 0."""
    sums = probs.cumsum(-1)
    total = sums[:, -1:].contiguous()
    wanted = (numbers[:, None] * total.double()).float()
    found = torch.searchsorted(sums, wanted, right=True)
    last = torch.searchsorted(sums, total)  # where rounding made of a number below 1 the whole
    # sums that are not numbers are above nothing: some id, whose log-prob tells whoever checks it
    return torch.minimum(found, last).clamp(max=probs.shape[-1] - 1)[:, 0]
