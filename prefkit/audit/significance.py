"""How sure one can be that something goes with one side: exact tests, intervals, corrections, and what length explains.

Comes in: counts (b pairs have it in chosen only, c in rejected only) or the signs behind them: +1 chosen only, -1
rejected only, 0 both or neither. Goes out: one number a token, for all tokens at once. Reads no text.

Length: P(chosen) = sigmoid(gamma . basis) of the two lengths is fitted once, and a token is tested beside it with a
score test, which needs sums over its pairs only, and exists where a Wald test does not (c = 0).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse, special, stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]

PAIRS_A_COLUMN = 50  # a length model with fewer pairs for each of its columns fits chance
MIN_INFORMATION = 1.0  # V of four pairs at even odds: with less, length decides the pairs and leaves nothing to test
RIDGE = 1e-6  # keeps gamma finite where length separates the sides; moves no estimate otherwise
FLIPS_AT_ONCE = 64


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: Floats
    high: Floats


class Odds(NamedTuple):
    """Conditional odds ratios, and the standard errors of their logarithms."""

    ratio: Floats
    log_se: Floats


class LengthModel(NamedTuple):
    """What length alone says of each pair: P(chosen) = sigmoid(basis @ gamma).

    `gamma`: (K,); `basis`: (N, K), each column changes its sign with the sides; `p`: (N,) P(chosen); `q`: p (1 - p);
    `m`: (K, K) the information, sum of q basis basis^T.
    """

    gamma: Floats
    basis: Floats
    p: Floats
    q: Floats
    m: Floats


class PairWeights(NamedTuple):
    """What the sums of the score test add up, by pair.

    `signed`: (N, 1 + K), times the sign of a token: 1 - p, then q basis. `unsigned`: (N, 1), of discordant pairs: q.
    """

    signed: Floats
    unsigned: Floats


def sign_test(num_chosen_only: npt.ArrayLike, num_discordant: npt.ArrayLike) -> Floats:
    """Exact two-sided sign test (McNemar): p = min(1, 2 P(Binomial(d, 1/2) <= min(b, d - b))); NaN where d = 0.

    Example: b = 5, d = 5 gives 2 * (1/2)^5 = .0625.
    """
    b, d = np.asarray(num_chosen_only), np.asarray(num_discordant)
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(b, d - b), d, 0.5))
    return np.where(d > 0, p, np.nan)


def wilson(wins: npt.ArrayLike, total: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); NaN where total = 0. Totals need not be whole.

    Example: 8 of 10 gives .490 to .943.
    """
    won, n = np.asarray(wins, dtype=np.float64), np.asarray(total, dtype=np.float64)
    n = np.where(n > 0, n, np.nan)
    return score_interval(won / n, n, float(stats.norm.isf((1 - level) / 2)))


def score_interval(share: npt.ArrayLike, draws: npt.ArrayLike, quantile: float) -> Interval:
    """The shares that a test at a quantile of the normal, or of t, does not refuse (Wilson 1927).

    Args:
        share: 0..1.
        draws: how many independent ones it is worth; need not be whole.
        quantile: of both sides, such as 1.96.
    """
    p, n, z = np.asarray(share, dtype=np.float64), np.asarray(draws, dtype=np.float64), quantile
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # rounding must not put a share outside of its own interval
    return Interval(np.clip(middle - half, 0.0, p), np.clip(middle + half, p, 1.0))


def benjamini_hochberg(p: Floats) -> Floats:
    """The q of each test: its false discovery rate with all smaller ones (Benjamini and Hochberg 1995)."""
    return np.asarray(stats.false_discovery_control(p, method="bh")) if len(p) else p


def benjamini_yekutieli(p: Floats) -> Floats:
    """The same under any dependence of the tests (Benjamini and Yekutieli 2001): q times the sum of 1/i, at most 1."""
    return np.asarray(stats.false_discovery_control(p, method="by")) if len(p) else p


def odds(num_chosen_only: npt.ArrayLike, num_rejected_only: npt.ArrayLike) -> Odds:
    """The conditional odds ratio (b + .5) / (c + .5), and sqrt(1 / (b + .5) + 1 / (c + .5)) of its logarithm."""
    b, c = np.asarray(num_chosen_only) + 0.5, np.asarray(num_rejected_only) + 0.5
    return Odds(b / c, np.sqrt(1 / b + 1 / c))


def log_odds_z(
    y_chosen: npt.ArrayLike,
    y_rejected: npt.ArrayLike,
    n_chosen: float | None = None,
    n_rejected: float | None = None,
    prior: npt.ArrayLike | None = None,
) -> Floats:
    """Log-odds with an informative Dirichlet prior, as z (Monroe, Colaresi and Quinn 2008, eq. 16, 19, 20, 22).

    Args:
        y_chosen: texts of the side that have each token.
        y_rejected: likewise.
        n_chosen: all of them; the sum over the tokens unless given.
        n_rejected: likewise.
        prior: pseudo-counts alpha; the pooled frequencies of both sides unless given, which pull frequent tokens to 0.
    """
    chosen, rejected = np.asarray(y_chosen, dtype=np.float64), np.asarray(y_rejected, dtype=np.float64)
    alpha = chosen + rejected if prior is None else np.asarray(prior, dtype=np.float64)
    rest = float(alpha.sum())
    with np.errstate(divide="ignore", invalid="ignore"):  # the only token of all has no odds: NaN
        logs, variance = np.zeros(len(alpha)), np.zeros(len(alpha))
        for sign, y, n in ((1, chosen, n_chosen), (-1, rejected, n_rejected)):
            total = float(y.sum()) if n is None else n
            logs += sign * np.log((y + alpha) / (total + rest - y - alpha))
            variance += 1 / (y + alpha)
        z = np.asarray(logs / np.sqrt(variance))
    return np.where(np.isfinite(z), z, np.nan)


def smallest_detectable_win_rate(num_discordant: int, num_tests: int, alpha: float) -> float:
    """The win rate that a token separating so many pairs needs to be found among so many tests: .5 + z / (2 sqrt d)."""
    return 0.5 + float(stats.norm.isf(alpha / (2 * max(1, num_tests)))) / (2 * math.sqrt(max(1, num_discordant)))


def length_basis(num_chosen_words: npt.ArrayLike, num_rejected_words: npt.ArrayLike) -> Floats:
    """What the length model sees of N pairs: (N, K), K = 1 to 4, the first column dL, difference of log(1 + words).

    Then the difference in words, and the sign of dL in the smaller and in the larger half of |dL|: a preference by
    ratio, by words, or for the longer side by however little. Measured on 72,000 pairs (real HH texts, sides drawn by
    length alone), z of 440 words that echo length has a standard deviation of 1.0 by sign, 1.0 by words and 1.2 where
    too long loses; with dL alone 3.3, 2.3 and 5.0. A preference that begins at some other ratio leaves 2.2. A planted
    opener keeps its z: 4.2 for 4.2 on 1% of HH.
    """
    chosen, rejected = (np.asarray(n, dtype=np.float64) for n in (num_chosen_words, num_rejected_words))
    ratio, words = np.log1p(chosen) - np.log1p(rejected), chosen - rejected
    size = np.abs(ratio)
    small = size <= (np.median(size[size > 0]) if size.any() else 0.0)
    scale = float(np.sqrt(np.mean(words**2))) if words.any() else 1.0
    columns = [ratio, words / scale, np.sign(ratio) * small, np.sign(ratio) * ~small]
    return np.stack(columns[: max(1, len(ratio) // PAIRS_A_COLUMN)], axis=1)


def fit_length(num_chosen_words: npt.ArrayLike, num_rejected_words: npt.ArrayLike) -> LengthModel:
    """The length model of N pairs, by maximum likelihood with a ridge of 1e-6; all lengths equal give p = 1/2."""
    basis = length_basis(num_chosen_words, num_rejected_words)
    gamma = np.zeros(basis.shape[1])
    best = _penalised(basis, gamma)
    for _ in range(100):
        p = special.expit(basis @ gamma)
        slope = basis.T @ (1 - p) - RIDGE * gamma
        step = np.linalg.solve((basis.T * (p * (1 - p))) @ basis + RIDGE * np.eye(len(gamma)), slope)
        while (value := _penalised(basis, gamma + step)) < best and np.abs(step).max() > 1e-12:
            step /= 2
        if value <= best:
            break
        gamma, best = gamma + step, value
    p = special.expit(basis @ gamma)
    q = p * (1 - p)
    return LengthModel(gamma, basis, p, q, (basis.T * q) @ basis)


def _penalised(basis: Floats, gamma: Floats) -> float:
    return float(special.log_expit(basis @ gamma).sum() - RIDGE / 2 * gamma @ gamma)


def pair_weights(model: LengthModel) -> PairWeights:
    """The numbers of each pair that u, r (signed) and v (unsigned) of `z_from_sums` are sums of."""
    signed = np.column_stack([1 - model.p, model.q[:, None] * model.basis])
    return PairWeights(signed, model.q[:, None].copy())


def z_from_sums(u: Floats, v: Floats, r: Floats, m: Floats) -> Floats:
    """Score tests of T tokens beside length: z = u / sqrt(v - r m^-1 r); above 0: chosen has it more than length says.

    NaN where what length leaves of the information is under MIN_INFORMATION: the token may echo it or not, these pairs
    cannot tell. Example: length says nothing (p = 1/2), in chosen only in 16 pairs: u = 8, v = 4, z = 4.

    Args:
        u: (T,) sum of sign (1 - p).
        v: (T,) sum of q over its discordant pairs.
        r: (T, K) sum of sign q basis.
        m: (K, K) of the model.
    """
    left = v - np.einsum("tk,kl,tl->t", r, np.linalg.pinv(m, rcond=1e-10, hermitian=True), r)
    enough = left >= MIN_INFORMATION
    return np.where(enough, u / np.sqrt(np.where(enough, left, 1.0)), np.nan)


def z_of_signs(signs: Signs, model: LengthModel) -> float:
    """The score test of one token or feature beside length, from its sign in each pair (N,)."""
    weights = pair_weights(model)
    sums = signs @ weights.signed
    v = np.abs(signs) @ weights.unsigned
    return float(z_from_sums(sums[:1], v, sums[None, 1:], model.m)[0])


def z_by_prompt(signs: Signs, model: LengthModel, clusters: Ints) -> float:
    """`z_of_signs`, smaller by what the pairs of a prompt go together: the square root of the design effect.

    The score of a pair is dX (1 - p) less what length takes of it; the design effect is the sum of squared prompt sums
    over the sum of squares (Liang and Zeger 1986), 1 where each prompt has one pair.
    """
    taken = model.basis @ np.linalg.pinv(model.m) @ (model.basis.T @ (model.q * signs))
    scores = (signs - taken) * (1 - model.p)
    by_prompt = np.bincount(clusters, weights=scores)
    together, alone = float(by_prompt @ by_prompt), float(scores @ scores)
    return z_of_signs(signs, model) / math.sqrt(max(1.0, together / alone)) if alone > 0 else math.nan


def firth_log_odds(signs: Signs, basis: Floats) -> float:
    """The log-odds of a token beside a length basis (N, K), finite where one side has it always.

    The maximum of log-likelihood + 1/2 ln |information| (Firth 1993; Heinze and Schemper 2002). NaN where the token is
    a combination of the basis. Example: without a basis it is ln((b + .5) / (c + .5)).
    """
    design = np.column_stack([signs.astype(np.float64), _spanning(basis)])
    if np.linalg.matrix_rank(design.T @ design) < design.shape[1]:
        return math.nan
    theta = np.zeros(design.shape[1])
    best = _firth_likelihood(design, theta)
    for _ in range(100):
        p = special.expit(design @ theta)
        inverse = np.linalg.inv((design.T * (p * (1 - p))) @ design)
        leverage = np.einsum("nk,kl,nl->n", design, inverse, design) * p * (1 - p)
        step = inverse @ (design.T @ (1 - p + leverage * (0.5 - p)))
        step *= min(1.0, 5 / max(1e-300, float(np.abs(step).max())))
        while (value := _firth_likelihood(design, theta + step)) < best and np.abs(step).max() > 1e-12:
            step /= 2
        if value <= best:
            break
        theta, best = theta + step, value
    return float(theta[0])


def _firth_likelihood(design: Floats, theta: Floats) -> float:
    p = special.expit(design @ theta)
    determinant = np.linalg.slogdet((design.T * (p * (1 - p))) @ design)
    return float(special.log_expit(design @ theta).sum() + determinant.logabsdet / 2)


def _spanning(basis: Floats) -> Floats:
    """Independent columns with the span of a basis: equal or empty columns have no information to take the ln of."""
    if not basis.size:
        return basis.reshape(len(basis), 0)
    values, vectors = np.linalg.eigh(basis.T @ basis)
    kept = values > 1e-10 * max(values.max(), 1e-300)
    return np.asarray(basis @ (vectors[:, kept] / np.sqrt(values[kept])) * math.sqrt(len(basis)))


def net_signs(gram: Ints, pair: Ints, sign: Signs, num_grams: int, clusters: Ints) -> sparse.csr_array:
    """(num_grams, prompts): what a token wins minus what it loses among the pairs of a prompt."""
    prompts = int(clusters.max()) + 1 if len(clusters) else 0
    return sparse.coo_array((sign.astype(np.float64), (gram, clusters[pair])), shape=(num_grams, prompts)).tocsr()


def prompts_won(pairs: Ints, sign: Signs, clusters: Ints) -> tuple[int, int]:
    """Prompts in which one feature has more pairs on the chosen side, and on the rejected side.

    Args:
        pairs: the positions of its discordant pairs.
        sign: of each, +1 chosen, -1 rejected.
        clusters: (N,) the prompt of each pair.
    """
    net = np.bincount(clusters[pairs], weights=sign)
    return int((net > 0).sum()), int((net < 0).sum())


class FlipTest:
    """Sign flips by prompt, family-wise by the maximum over all tokens (Westfall and Young 1993, single step).

    Under the null the sides of a prompt could be swapped, all its pairs at once. Statistic: |sum of nets| / sqrt(sum of
    squared nets), nets by prompt. Tokens come in batches; the flips of a seed are the same for each.
    """

    def __init__(self, clusters: Ints, num_flips: int, seed: int) -> None:
        self.clusters = clusters
        self.seed = seed
        self.largest = np.zeros(num_flips)
        self.observed: list[Floats] = []

    def add(self, gram: Ints, pair: Ints, sign: Signs, num_grams: int) -> None:
        """One batch of tokens, as `net_signs` takes them, numbered from 0."""
        net = net_signs(gram, pair, sign, num_grams, self.clusters)
        size = np.sqrt(np.asarray(net.multiply(net).sum(axis=1)))
        size[size == 0] = 1.0  # its pairs cancel in each prompt: the statistic is 0
        self.observed.append(np.abs(net.sum(axis=1)) / size)
        start = 0
        for flips in self._flips(net.shape[1]):
            # sums of whole numbers are exact, so that an equal statistic is a tie
            found = np.max(np.abs(net @ flips) / size[:, None], axis=0, initial=0.0)
            self.largest[start : start + len(found)] = np.maximum(self.largest[start : start + len(found)], found)
            start += len(found)

    def p(self) -> Floats:
        """For each token, in the order they came: the share of flips whose largest statistic is at least its own."""
        observed = np.concatenate(self.observed) if self.observed else np.zeros(0)
        ordered = np.sort(self.largest)
        at_least = len(ordered) - np.searchsorted(ordered, observed, side="left")
        return np.asarray((1 + at_least) / (1 + len(ordered)))

    def _flips(self, num_prompts: int) -> Iterator[Floats]:
        for start in range(0, len(self.largest), FLIPS_AT_ONCE):
            count = min(FLIPS_AT_ONCE, len(self.largest) - start)
            rng = np.random.default_rng([self.seed, start])
            yield rng.integers(0, 2, size=(num_prompts, count), dtype=np.int8).astype(np.float64) * 2 - 1
