"""Which pairs to drop until shallow features no longer tell chosen: the fewest that a search finds.

Comes in: what the probes see of the pairs. Goes out: rows in the order in which they go. The pairs with the highest
shortcut_score go first, and after every batch the probes are fitted anew on what is left: dropping only what one fit
gets right would leave pairs that say the opposite, and a new fit would learn that instead.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from prefkit.audit.allow import allows
from prefkit.audit.counting import Texts, count_grams, of_words
from prefkit.audit.evidence import gather, numbered
from prefkit.audit.postings import names_of, postings
from prefkit.audit.probe import cross_fit, measure, shallow, word_matrix
from prefkit.audit.significance import Floats, Ints
from prefkit.audit.tokens import MIN_DISCORDANT_TESTED

PROBES = ("both", "words", "structure", "length")  # `both` first: it is the highest one mostly
STEP = 0.01  # of the pairs: the least that goes before the probes are fitted again
EXACT = 0.001  # of the pairs: how exactly the fewest are found, as a fit of many pairs takes seconds


class Seen(NamedTuple):
    """What the probes see of N pairs: `length` (N,), `structure` (N, F), `words` (N, W), and their prompts (N,).

    `length_allowed`: the length is told here, and kept from the probes.
    """

    length: Floats
    structure: Floats
    words: sparse.csr_array
    clusters: Ints
    length_allowed: bool = False


class Fit(NamedTuple):
    """The highest held-out accuracy of the probes (0 where none is measured), which one has it, and the scores.

    `scores`: shortcut_score of every pair (N,), of the probe `both` always; NaN where it has none.
    """

    probe: str
    accuracy: float
    scores: Floats


class Search(NamedTuple):
    """`rows`: to drop, in order; `scores`: shortcut_score of each when it went; what the probes reach without them."""

    rows: Ints
    scores: Floats
    probe: str
    accuracy: float


def see_pairs(texts: Texts, allow: Sequence[str] = (), allow_features: Sequence[str] = ()) -> Seen:
    """What the probes of the audit see of pairs.

    Args:
        texts: the pairs.
        allow: audit.allow; no probe is given these words.
        allow_features: audit.allow_features; no probe is given these features.
    """
    evidence, allowed = gather(texts), allows(allow)
    counts = count_grams(texts, of_words, (1,), min_discordant=MIN_DISCORDANT_TESTED)
    if allow:
        counts = counts.filter(pl.Series([not allowed(name) for name in names_of(texts, counts)], dtype=pl.Boolean))
    places = postings(texts, of_words, counts.select("hash", "n"))
    words = word_matrix(*places, counts.height, evidence.pairs.height)
    structure = evidence.difference(allow_features)
    return Seen(evidence.length.basis[:, 0], structure, words, evidence.clusters, "words" in allow_features)


def fit_probes(seen: Seen, rows: Ints, enough: float, *, seed: int, max_fit: int) -> Fit:
    """Fit the probes on some of the pairs, as an audit of them would.

    Args:
        seen: all pairs.
        rows: of the pairs that are left, in order.
        enough: no further probe is fitted once one is above it.
        seed: of the folds.
        max_fit: pairs that a fit sees at most.
    """
    words = seen.words[rows]
    words = words[:, np.flatnonzero(np.asarray(abs(words).sum(axis=0)) >= MIN_DISCORDANT_TESTED)]
    clusters = numbered(pl.Series(seen.clusters[rows])).to_numpy()  # as an audit of these pairs alone numbers them
    length = np.zeros(len(rows)) if seen.length_allowed else seen.length[rows]
    dense = shallow(length, seen.structure[rows])
    inputs = {
        "both": (sparse.hstack([sparse.csr_array(dense), words]).tocsr(), dense.shape[1]),
        "words": (words, 0),
        "structure": (dense, None),
        "length": (length[:, None], None),
    }
    worst = Fit("both", 0.0, np.full(len(rows), np.nan))
    for name in PROBES:
        x, scaled = inputs[name]
        margins = cross_fit(x, clusters, seed=seed, max_fit=max_fit, scaled=scaled)
        worst = worst._replace(scores=margins) if name == "both" else worst
        accuracy = measure(margins, clusters).accuracy or 0.0
        if accuracy > worst.accuracy:
            worst = worst._replace(probe=name, accuracy=accuracy)
        if accuracy > enough:
            break
    return worst


def find_shortcuts(
    seen: Seen,
    pair_ids: pl.Series,
    target: float,
    budget: int,
    *,
    seed: int,
    max_fit: int,
    tell: Callable[[str], None] = lambda _text: None,
) -> Search:
    """The pairs without which no probe of PROBES is above `target`; `budget` of them, where that is not enough.

    The audit's probe of generators is none of PROBES: who wrote a side is no feature of its text, and dropping pairs of
    a generator that always wins would leave the others as they are.

    Args:
        seen: all pairs.
        pair_ids: of them, in ties.
        target: held-out accuracy, .5 to 1.
        budget: most pairs that may go.
        seed: of the folds.
        max_fit: pairs that a fit sees at most.
        tell: called with lines for a person.

    Each batch is half of what would have to go at least if the fit kept what it knows, and at least STEP of the pairs;
    of the last one only as many go as are needed, found by bisection to EXACT of the pairs.
    """
    scored = pair_ids.to_numpy().astype(np.str_)

    def fitted(gone: Ints) -> Fit:
        rows = np.setdiff1d(np.arange(len(scored)), gone)
        return fit_probes(seen, rows, target, seed=seed, max_fit=max_fit)

    gone, scores, batch = np.empty(0, dtype=np.int64), np.empty(0), 0
    found = fitted(gone)
    while found.accuracy > target and len(gone) < budget:
        tell(f"{len(gone)} pairs dropped: {found.probe} tells chosen in {found.accuracy:.1%}")
        rows = np.setdiff1d(np.arange(len(scored)), gone)
        needed = (found.accuracy - target) / (1 - target) * len(rows) / 2 if target < 1 else 0
        batch = min(max(int(needed), int(np.ceil(STEP * len(scored)))), budget - len(gone))
        order = np.lexsort((scored[rows], -found.scores))[:batch]  # pairs without a score last
        gone, scores = np.append(gone, rows[order]), np.append(scores, found.scores[order])
        found = fitted(gone)
    if found.accuracy > target:
        return Search(gone, scores, found.probe, found.accuracy)
    low, high = len(gone) - batch, len(gone)  # with `low` gone a probe is above the target, with `high` none is
    while high - low > max(1, int(EXACT * len(scored))):
        middle = (low + high) // 2
        tried = fitted(gone[:middle])
        if tried.accuracy > target:
            low = middle
        else:
            high, found = middle, tried
    return Search(gone[:high], scores[:high], found.probe, found.accuracy)
