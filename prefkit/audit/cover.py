"""Which few tokens decide how many pairs: "k tokens decide X% of the pairs at Y% precision".

Comes in: the discordant pairs of tokens. Goes out: tokens taken one at a time by wins minus losses on the pairs that
none before them separates. Chosen on one half of the prompts, measured on the other, so that the best of many tokens is
not praised for its luck.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from prefkit.audit.significance import Floats, Ints, Signs, sign_test

ALPHA = 0.05  # of the sign test, Bonferroni over all tokens: the best of many that win by chance is none


class Covered(NamedTuple):
    """A token of the cover, and the cover up to it: share of the pairs it separates, and of these it decides right."""

    gram: int
    side: str
    share: float
    precision: float | None


def greedy_cover(
    gram: Ints, pair: Ints, sign: Signs, num_grams: int, clusters: Ints, *, max_tokens: int = 10, seed: int = 0
) -> list[Covered]:
    """The cover of N pairs, at most max_tokens, fewer where no other token wins beyond chance.

    Args:
        gram: of each discordant (token, pair): the token, 0..num_grams-1.
        pair: likewise the pair, 0..N-1.
        sign: likewise +1 chosen only, -1 rejected only.
        num_grams: tokens.
        clusters: (N,) the prompt of each pair; no prompt is in both halves.
        max_tokens: of the cover.
        seed: of the halves.
    """
    entries = (sign.astype(np.float64), (gram, pair))
    signs = sparse.coo_array(entries, shape=(num_grams, len(clusters))).tocsr()
    names, cluster = np.unique(clusters, return_inverse=True)
    chosen_on = np.random.default_rng(seed).permutation(len(names))[cluster] % 2 == 0
    tokens = _choose(signs[:, chosen_on], max_tokens)
    return _measure(signs[:, ~chosen_on], tokens)


def _choose(signs: sparse.csr_array, max_tokens: int) -> list[tuple[int, int]]:
    """(token, which side it stands for), best first."""
    found: list[tuple[int, int]] = []
    present, left = abs(signs), np.ones(signs.shape[1])
    while len(found) < max_tokens:
        net: Floats = signs @ left
        num: Floats = present @ left
        beyond = sign_test((num + net) / 2, num) <= ALPHA / max(1, len(net))  # no test where no pair is left: NaN
        if not beyond.any():
            break
        best = int(np.argmax(np.where(beyond, np.abs(net), -1.0)))
        found.append((best, int(np.sign(net[best]))))
        left[signs[[best]].indices] = 0.0
    return found


def _measure(signs: sparse.csr_array, tokens: list[tuple[int, int]]) -> list[Covered]:
    """A pair is decided by the first token that separates it."""
    rows: list[Covered] = []
    decided = np.zeros(signs.shape[1])
    for token, side in tokens:
        here = signs[[token]].toarray()[0] * side
        decided = np.where(decided == 0, here, decided)
        num = int(np.count_nonzero(decided))
        precision = float((decided > 0).sum() / num) if num else None
        rows.append(Covered(token, "chosen" if side > 0 else "rejected", num / max(1, len(decided)), precision))
    return rows
