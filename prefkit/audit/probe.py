"""How far shallow features alone predict chosen: what a policy could learn in place of the preference.

Comes in: differences chosen - rejected of N pairs. Goes out: rows of format.PROBE, and for each pair the log-odds of
chosen by a fit that saw no pair of its prompt. An antisymmetric logistic regression without intercept: P(chosen) =
sigmoid(w . x), and swapped sides give the opposite answer. Maximising sum ln sigmoid(w . x) needs no second class: a
row flipped with its label has the same likelihood, so that a logistic regression on rows flipped at random has the same
optimum (a test holds it to scikit-learn's).

Chosen by held-out log loss on HH, LLMBar, UA-GEC, WildBench and PandaLM together: words unweighted (weighting by rarity
hides an opener that most chosen sides have: .69 for .95 at 90%), features as signed logarithms and signs, C = .03.
160,000 pairs with 50,000 words take 20 s on one core.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import optimize, sparse, special

from prefkit.audit.significance import Floats, Ints, Signs, wilson
from prefkit.format import schema

Matrix: TypeAlias = "Floats | sparse.csr_array"

STRENGTH = 0.03  # C: the likelihood beside |w|^2 / 2, see above
FEW_STRENGTH = 1.0  # of length and generator: few weights need no more restraint (WildBench: log loss .22 for .48)
FOLDS = 5
MAX_FIT = 50_000  # pairs; more of them move no accuracy by more than its interval
MAX_WORDS = 50_000
NUM_PROBES = 5  # the best of so many is told


class _Input(NamedTuple):
    x: Matrix
    num_features: int
    c: float
    scaled: int


class Measured(NamedTuple):
    """Held-out accuracy (a draw counts one half) with its 95% interval, and log loss in nats; None without a margin."""

    accuracy: float | None
    low: float | None
    high: float | None
    log_loss: float | None
    num_pairs: int
    num_prompts: int
    sure_low: float | None  # lower end of an interval that holds for all probes at once (Bonferroni)


class Bands(NamedTuple):
    """Accuracies above which a probe is worth a note, a warning, a failure."""

    note: float = 0.60
    warn: float = 0.75
    fail: float = 0.90


class Probes(NamedTuple):
    """`table`: format.PROBE; `margins`: by probe, the log-odds of chosen of each pair (N,), NaN where not measured."""

    table: pl.DataFrame
    margins: dict[str, Floats]


def run_probes(
    length: Floats,
    structure: Floats,
    words: sparse.csr_array,
    clusters: Ints,
    *,
    generators: tuple[Sequence[str | None], Sequence[str | None]] | None = None,
    sources: Sequence[str] | None = None,
    bands: Bands | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    max_fit: int = MAX_FIT,
) -> Probes:
    """The probes length, structure, words, both and generator, over all pairs and by source.

    Args:
        length: (N,) difference of log(1 + words).
        structure: (N, F) differences of the numeric features.
        words: (N, W) of `word_matrix`.
        clusters: (N,) the prompt of each pair.
        generators: of chosen and of rejected, None where unknown; a pair without both is not measured.
        sources: (N,) rows by source are added where there are several.
        bands: by accuracy; the default of each unless given.
        folds: parts of the prompts, each scored by the fit on the others.
        seed: of the parts.
        max_fit: pairs that a fit sees at most; all are scored.
    """
    dense = shallow(length, structure)
    both = sparse.hstack([sparse.csr_array(dense), words]).tocsr()
    inputs = {
        "length": _Input(length[:, None], 1, FEW_STRENGTH, 1),
        "structure": _Input(dense, structure.shape[1], STRENGTH, dense.shape[1]),
        "words": _Input(words, words.shape[1], STRENGTH, 0),
        "both": _Input(both, structure.shape[1] + words.shape[1], STRENGTH, dense.shape[1]),
    }
    margins = {
        name: cross_fit(of.x, clusters, folds=folds, seed=seed, c=of.c, max_fit=max_fit, scaled=of.scaled)
        for name, of in inputs.items()
    }
    features = {name: of.num_features for name, of in inputs.items()}
    if generators is not None:
        margins["generator"], features["generator"] = _by_generator(generators, clusters, folds, seed, max_fit)
    return Probes(_table(margins, features, clusters, sources, bands or Bands()), margins)


def shallow(length: Floats, structure: Floats) -> Floats:
    """(N, 2F + 1): signed logarithm and sign of each difference, and the length difference. Heavy tails decide less."""
    known = np.nan_to_num(structure.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    signs = np.sign(known)
    return np.column_stack([signs * np.log1p(np.abs(known)), signs, length])


def word_matrix(
    gram: Ints, pair: Ints, sign: Signs, num_grams: int, num_pairs: int, max_words: int = MAX_WORDS
) -> sparse.csr_array:
    """Presence differences (N, W) of words by their discordant pairs, the W <= max_words that separate most pairs."""
    discordant = np.bincount(gram, minlength=num_grams)
    kept = np.sort(np.argsort(-discordant, kind="stable")[:max_words])
    column = np.full(num_grams, -1, dtype=np.int64)
    column[kept] = np.arange(len(kept))
    inside = column[gram] >= 0
    entries = (sign[inside].astype(np.float64), (pair[inside], column[gram[inside]]))
    return sparse.coo_array(entries, shape=(num_pairs, len(kept))).tocsr()


def cross_fit(
    x: Matrix,
    clusters: Ints,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    c: float = STRENGTH,
    max_fit: int = MAX_FIT,
    scaled: int | None = None,
) -> Floats:
    """Log-odds of chosen (N,), each by a fit on pairs of other prompts only; NaN of a single prompt or no feature.

    Args:
        x: (N, F) features of chosen minus those of rejected.
        clusters: (N,) the prompt of each pair.
        folds: parts of the prompts, as many as prompts at most.
        seed: of the parts.
        c: strength of the data beside |w|^2 / 2.
        max_fit: pairs of a fit, whole prompts in a random order.
        scaled: so many columns, from the first, are divided by their root mean square among the pairs of the fit (never
            centred, which would tell the sides apart); all unless given.
    """
    margins = np.full(x.shape[0], np.nan)
    names, cluster = np.unique(clusters, return_inverse=True)
    if len(names) < 2 or x.shape[1] == 0:
        return margins
    place = np.random.default_rng(seed).permutation(len(names))[cluster]
    fold = place % min(folds, len(names))
    for number in range(int(fold.max()) + 1):
        fitted, out = x[_at_most(place, fold != number, max_fit)], fold == number
        margins[out] = x[out] @ fit(fitted, c, x.shape[1] if scaled is None else scaled)
    return margins


def fit(x: Matrix, c: float, scaled: int) -> Floats:
    """The weights (F,) of largest C sum ln sigmoid(x w) - |w * scale|^2 / 2, by L-BFGS from 0."""
    scale = np.ones(x.shape[1])
    power = np.asarray((x * x).sum(axis=0))[:scaled] if not sparse.issparse(x) else _power(x, scaled)
    scale[:scaled] = np.where(power > 0, np.sqrt(power / max(1, x.shape[0])), 1.0)

    def loss(v: Floats) -> tuple[float, Floats]:
        margin = x @ (v / scale)
        slope = c * (x.T @ special.expit(-margin)) / scale
        return float(-c * special.log_expit(margin).sum() + v @ v / 2), v - slope

    options = {"maxiter": 300, "ftol": 1e-9, "gtol": 1e-5}
    found = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x / scale)


def _power(x: sparse.csr_array, scaled: int) -> Floats:
    """Sums of squares of the first columns."""
    return np.asarray(np.bincount(x.indices, weights=x.data**2, minlength=x.shape[1])[:scaled], dtype=np.float64)


def _at_most(place: Ints, wanted: npt.NDArray[np.bool_], max_fit: int) -> npt.NDArray[np.bool_]:
    """The wanted pairs of the first prompts, until there would be more than max_fit; always those of one prompt."""
    if wanted.sum() <= max_fit:
        return wanted
    sizes = np.bincount(place[wanted], minlength=int(place.max()) + 1)
    first = int(np.flatnonzero(sizes)[0])
    last = max(first, int(np.searchsorted(np.cumsum(sizes), max_fit, side="right")) - 1)
    return np.asarray(wanted & (place <= last))


def measure(margins: Floats, clusters: Ints) -> Measured:
    """Accuracy and log loss of the pairs that have a margin.

    The interval is Wilson's, with the number of independent pairs of the same variance: accuracy (1 - accuracy) /
    the variance by prompt (sums of residuals a prompt, squared; Liang and Zeger 1986), never more than the pairs.
    """
    known = ~np.isnan(margins)
    m, cluster = margins[known], np.unique(clusters[known], return_inverse=True)[1]
    if not len(m):
        return Measured(None, None, None, None, 0, 0, None)
    prompts = int(cluster.max()) + 1
    right = np.where(m == 0, 0.5, m > 0)
    accuracy = float(right.mean())
    residuals = np.bincount(cluster, weights=right - accuracy)
    variance = float(residuals @ residuals) / len(m) ** 2 * prompts / max(1, prompts - 1)
    # without variance nothing tells how pairs of a prompt go together: a prompt counts as one pair
    effective = min(float(len(m)), accuracy * (1 - accuracy) / variance) if variance > 1e-12 else float(prompts)
    interval = wilson(accuracy * effective, effective)
    sure = wilson(accuracy * effective, effective, level=1 - 0.05 / NUM_PROBES)
    loss = float(-special.log_expit(m).mean())
    return Measured(accuracy, float(interval.low), float(interval.high), loss, len(m), prompts, float(sure.low))


def band(measured: Measured, bands: Bands) -> str | None:
    """Fine | note | warn | fail; None where it is above fine and not surely above one half: too few pairs to say."""
    if measured.accuracy is None or measured.sure_low is None:
        return None
    reached = [name for name, limit in bands._asdict().items() if measured.accuracy >= limit]
    if reached and measured.sure_low <= 0.5:
        return None
    return reached[-1] if reached else "fine"


def _by_generator(
    generators: tuple[Sequence[str | None], Sequence[str | None]], clusters: Ints, folds: int, seed: int, max_fit: int
) -> tuple[Floats, int]:
    """Bradley-Terry: margins by who wrote which side, and the number of generators; NaN where one is unknown."""
    sides = [pl.Series(side, dtype=pl.String) for side in generators]
    names = pl.concat(sides).drop_nulls().unique().sort()
    margins = np.full(len(clusters), np.nan)
    known = (sides[0].is_not_null() & sides[1].is_not_null()).to_numpy()
    if len(names) < 2 or not known.any():
        return margins, len(names)
    rows = np.arange(int(known.sum()))
    won, lost = (
        side.filter(pl.Series(known)).replace_strict(names, np.arange(len(names))).to_numpy() for side in sides
    )
    entries = (np.repeat([1.0, -1.0], len(rows)), (np.tile(rows, 2), np.concatenate([won, lost])))
    x = sparse.coo_array(entries, shape=(len(rows), len(names))).tocsr()
    fitted = cross_fit(x, clusters[known], folds=folds, seed=seed, c=FEW_STRENGTH, max_fit=max_fit, scaled=0)
    margins[known] = fitted
    return margins, len(names)


def _table(
    margins: Mapping[str, Floats],
    features: Mapping[str, int],
    clusters: Ints,
    sources: Sequence[str] | None,
    bands: Bands,
) -> pl.DataFrame:
    """A row for each probe over all pairs, then for each source of several."""
    source = np.asarray(sources if sources is not None else [], dtype=np.str_)
    parts: list[tuple[str | None, npt.NDArray[np.bool_]]] = [(None, np.ones(len(clusters), dtype=np.bool_))]
    if len(np.unique(source)) > 1:
        parts += [(str(name), source == name) for name in np.unique(source)]
    rows = []
    for name, values in margins.items():
        for part, inside in parts:
            found = measure(values[inside], clusters[inside])
            row = {"probe": name, "source": part, "num_features": features[name], "band": band(found, bands)}
            numbers = {"accuracy": found.accuracy, "accuracy_low": found.low, "accuracy_high": found.high}
            rows.append(row | numbers | {n: getattr(found, n) for n in ("log_loss", "num_pairs", "num_prompts")})
    return pl.DataFrame(rows, schema=schema("probe", "text"))
