"""One alphabet of tokens over all pairs: the words, or the tokens of a model. Counted, tested, and placed in pairs.

Comes in: pairs as texts or as token ids, and what length alone says of them. Goes out: an `Alphabet`, whose table has
the columns of format.TOKENS and the `hash` by which its tokens are found again.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from prefkit.audit.counting import Hash, Scratch, Texts, Weights, as_fixed, count_grams
from prefkit.audit.evidence import Evidence
from prefkit.audit.findings import Found, beside_length_by_prompt, echoed_by_length, placed, together
from prefkit.audit.postings import Postings, postings
from prefkit.audit.significance import FlipTest, net_signs, pair_weights
from prefkit.audit.tokens import MIN_DISCORDANT_TESTED, token_table
from prefkit.audit.verdict import Limits, find_exclusive, find_tokens

Named = Callable[[pl.DataFrame], tuple[list[str], list[list[int]] | None]]
MAX_CANDIDATES = 1_000  # tokens that are held against the pairs, the worst ones; the table has all
ROWS_AT_ONCE = 100_000  # likewise tokens: a permutation test holds 64 numbers of each
MAX_PROBE_WORDS = 50_000  # words that a probe is given, those of the most discordant pairs
PLACES_AT_ONCE = 10_000_000  # places of tokens held at once: 17 bytes each, three times that while they are found


class Alphabet(NamedTuple):
    """`name`: word | model; `texts`, `hashed`: how its tokens are read again; `table`: format.TOKENS and `hash`."""

    name: str
    texts: Texts
    hashed: Hash
    table: pl.DataFrame


def count_alphabet(
    name: str,
    texts: Texts,
    hashed: Hash,
    named: Named,
    evidence: Evidence,
    allowed: Callable[[str], bool],
    *,
    ngrams: int,
    min_discordant: int,
    memory_limit: int,
    scratch: Scratch | None,
) -> Alphabet:
    """Count the n-grams of all pairs and test each.

    Args:
        name: word | model.
        texts: the pairs, as `hashed` reads them.
        hashed: their tokens.
        named: the n-grams of a count as a person reads them, and their token ids.
        evidence: of the same pairs: their prompts, and what length alone says.
        allowed: whether a token is the point of the data.
        ngrams: longest n-gram, 1..3.
        min_discordant: fewest discordant pairs of a row.
        memory_limit: bytes that the counters may hold.
        scratch: where the rest goes.
    """
    weights = Weights(*(as_fixed(numbers) for numbers in pair_weights(evidence.length)))
    counts = count_grams(
        texts,
        hashed,
        range(1, ngrams + 1),
        weights=weights,
        memory_limit=memory_limit,
        scratch=scratch,
        min_discordant=min_discordant,
    )
    names, ids = named(counts)
    prompts = _prompts_of(texts, hashed, counts, evidence.clusters)
    table = token_table(counts, names, name, evidence.pairs.height, evidence.length, allowed, prompts, ids)
    return Alphabet(name, texts, hashed, table.with_columns(counts["hash"]))


def _prompts_of(
    texts: Texts, hashed: Hash, counts: pl.DataFrame, clusters: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each n-gram, the prompts that it wins and loses: its pairs, where each prompt has one.

    Only pairs whose prompt has several are read again.
    """
    won, lost = (counts[f"num_{side}_only"].to_numpy().copy() for side in ("chosen", "rejected"))
    several = np.bincount(clusters, minlength=1)[clusters] > 1
    if not several.any():
        return won, lost
    discordant = counts.with_columns(pl.sum_horizontal("num_chosen_only", "num_rejected_only").alias("num_discordant"))
    for some in _batches(discordant, float(several.mean())):
        gram, pair, sign = postings(_only(texts, several), hashed, some.select("hash", "n"))
        net, rows = net_signs(gram, pair, sign, some.height, clusters[several]), some["row"].to_numpy()
        for prompts, side in ((won, 1), (lost, -1)):
            there = np.bincount(gram[sign == side], minlength=some.height)
            prompts[rows] += (net * side > 0).sum(axis=1) - there
    return won, lost


def _only(texts: Texts, wanted: npt.NDArray[np.bool_]) -> Texts:
    """Some of the pairs, in their order."""

    def some() -> Iterator[pl.DataFrame]:
        start = 0
        for frame in texts():
            here = wanted[start : start + frame.height]
            start += frame.height
            if here.any():
                yield frame.filter(pl.Series(here))

    return some


def _batches(table: pl.DataFrame, share: float = 1.0, most_rows: int = 2**31) -> list[pl.DataFrame]:
    """Rows in batches of so many places as may be held at once, with their `row`; `share`: of the pairs looked at."""
    places = (pl.col("num_discordant") * share).cum_sum() // PLACES_AT_ONCE
    batch = pl.max_horizontal(places, (pl.int_range(pl.len()) // most_rows).cast(pl.Float64))
    rows = table if "row" in table.columns else table.with_row_index("row")
    return rows.with_columns(batch.alias("batch")).partition_by("batch", maintain_order=True)


def surest_first(table: pl.DataFrame) -> pl.DataFrame:
    """The order of audit/tokens.parquet."""
    order = ["p", "num_discordant", "n", "alphabet", "token", "hash"]
    return table.sort(order, descending=[False, True, False, True, False, False], nulls_last=True)


def candidates(alphabet: Alphabet, evidence: Evidence, limits: Limits) -> Found:
    """The tokens that are findings by the table, in their pairs; worst first."""
    clusters, length = evidence.clusters, evidence.length.basis[:, 0]
    sure = find_tokens(alphabet.table, limits).head(MAX_CANDIDATES)
    table = pl.concat([sure, find_exclusive(alphabet.table, limits).head(MAX_CANDIDATES)])
    both = placed(table, *_places(alphabet, table), len(clusters))
    found, rest = both.keep(np.arange(sure.height)), both.keep(np.arange(sure.height, table.height))
    found = beside_length_by_prompt(found, evidence, limits.z_length)
    return together([found, echoed_by_length(rest, length)])


def _places(alphabet: Alphabet, table: pl.DataFrame) -> Postings:
    return postings(alphabet.texts, alphabet.hashed, table.select("hash", "n"))


def probe_words(alphabet: Alphabet) -> tuple[pl.DataFrame, Postings]:
    """The words that a probe is given, and where: single ones, in enough pairs on one side only, not allowed ones."""
    enough = pl.col("num_discordant") >= MIN_DISCORDANT_TESTED
    single = alphabet.table.filter((pl.col("n") == 1) & enough & ~pl.col("allowed"))
    words = single.sort(["num_discordant", "hash"], descending=[True, False]).head(MAX_PROBE_WORDS)
    return words, _places(alphabet, words)


def with_permutation(alphabet: Alphabet, clusters: npt.NDArray[np.int64], num_flips: int, seed: int) -> Alphabet:
    """Add `p_permutation` of all tested tokens: family-wise over the alphabet, by sign flips of whole prompts."""
    numbered = alphabet.table.with_row_index("row")
    tested = numbered.filter(pl.col("q").is_not_null())
    test = FlipTest(clusters, num_flips, seed)
    for some in _batches(tested, most_rows=ROWS_AT_ONCE):
        test.add(*_places(alphabet, some), some.height)
    p = tested.select("row").with_columns(pl.Series("p_permutation", test.p(), pl.Float64))
    joined = numbered.drop("p_permutation").join(p, on="row", how="left", maintain_order="left")
    return alphabet._replace(table=joined.select(alphabet.table.columns))
