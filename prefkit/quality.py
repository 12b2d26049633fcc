"""Scored rows become candidates: one a distinct text of a prompt, with one number that says how good it is.

Comes in: narrow rows (`narrow_rows`: hashes, lengths and scores; texts are hashed here and gathered again at the end).
Goes out: `Candidates`, arrays in which the candidates of a prompt stand together, in the order of their rows. Every sum
is taken over sorted numbers, so that no result depends on the order of the rows or on the number of threads.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from prefkit.format import Kind, canonical_json
from prefkit.pairs import SIGNIFICANT, Direction, signed
from prefkit.text import bare, flat, says_nothing, words_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

CHECK = 1000  # added to a hash seed for the second hash of a prompt
SAYS_NOTHING = 1e-9  # a scorer or rater whose scores have a smaller standard deviation tells nothing apart
PLACES = 12  # decimals of a z-score that count; 9 of a mean over scorers: numbers of order 1, their noise is 1e-15
MEAN_PLACES = 9


class Candidates(NamedTuple):
    """The distinct candidates of `num_prompts` prompts; arrays of one entry a candidate unless said otherwise.

    `mixed`: two prompts have one hash, and all has to be done again with another seed;
    `run`: number of its prompt, ascending, 0..num_prompts-1; `row`: its first row; `num_chars`: of its words, >= 1;
    `quality`: higher is better, NaN where no scorer tells it apart; `score`: the source's own mean score, NaN with
    several scorers; `first_row`: of each prompt, its first row; `merged`: (candidate, row) of every row of a candidate
    that has several; `opinions`: a `value` array a scorer, where there are several; `num_scorers`, `num_raters` (0
    without raters); `unused`: rows that are no candidate of their own, by reason.
    """

    mixed: bool
    run: Ints
    row: Ints
    num_chars: Ints
    quality: Floats
    score: Floats
    first_row: Ints
    merged: tuple[Ints, Ints]
    opinions: list[Floats]
    num_scorers: int
    num_raters: int
    unused: dict[str, int]


def narrow_rows(
    records: pl.DataFrame, kind: Kind, *, hash_seed: int = 0, random_seed: int | None = None
) -> pl.DataFrame:
    """The columns that decide, one row a record, in order.

    Args:
        records: prompt, response, score and, where the source has them, tools, scorer, rater.
        kind: of the dataset.
        hash_seed: of the 64-bit keys, which hold within one process only.
        random_seed: of the `lot` column, a hash that is the same on every machine; left out without a seed.

    Returns:
        prompt_key (of prompt and tools), prompt_check (the same with another seed), text_key, num_chars (0:
        it says nothing), score rounded to 12 significant digits, scorer, rater, lot.
    """
    words = words_of("response", kind)
    frame = records.select(
        flat("prompt", kind).hash(hash_seed).alias("prompt_key"),
        flat("prompt", kind).hash(hash_seed + CHECK).alias("prompt_check"),
        flat("response", kind).hash(hash_seed).alias("text_key"),
        pl.when(says_nothing("response", kind)).then(0).otherwise(words.str.len_chars()).alias("num_chars"),
        pl.col("score").round_sig_figs(SIGNIFICANT),
        *(_told(records, name) for name in ("scorer", "rater")),
    )
    if "tools" in records.columns and records["tools"].null_count() < records.height:
        tools = records["tools"]
        frame = frame.with_columns(
            pl.when(tools.is_null()).then(pl.col(name)).otherwise(pl.struct(name, tools).hash(seed)).alias(name)
            for name, seed in (("prompt_key", hash_seed), ("prompt_check", hash_seed + CHECK))
        )
    return frame if random_seed is None else frame.with_columns(_lots(records, random_seed))


def _told(records: pl.DataFrame, name: str) -> pl.Expr:
    """A column, without a dtype (and without memory) where it says nothing."""
    if name in records.columns and records[name].null_count() < records.height:
        return pl.col(name)
    return pl.lit(pl.Series(name, [None], pl.Null).new_from_index(0, records.height))


def _lots(records: pl.DataFrame, seed: int) -> pl.Series:
    """64 bits of blake2b over (seed, prompt, tools, text): uniform, and the same on every machine."""
    tools = records["tools"].to_list() if "tools" in records.columns else [None] * records.height
    rows = zip(records["prompt"].to_list(), tools, records["response"].to_list(), strict=True)
    texts = (canonical_json([seed, bare(prompt), tool, bare(text)]).encode() for prompt, tool, text in rows)
    lots = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]
    return pl.Series("lot", lots, pl.UInt64)


def starts_of(*keys: npt.NDArray[np.generic]) -> Ints:
    """Where a new group begins in arrays whose equal keys stand together: [5, 5, 7] -> [0, 2]."""
    if not len(keys[0]):
        return np.zeros(0, np.int64)
    new = np.zeros(len(keys[0]), np.bool_)
    new[0] = True
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(new)


def sizes_of(starts: Ints, length: int) -> Ints:
    """The length of each group: starts [0, 2], length 3 -> [2, 1]."""
    return np.diff(starts, append=length)


def group_numbers(starts: Ints, length: int) -> Ints:
    """The number of each entry's group: starts [0, 2], length 3 -> [0, 0, 1]."""
    return np.repeat(np.arange(len(starts)), sizes_of(starts, length))


def significant(values: Floats) -> Floats:
    """Rounded to 12 significant digits: what floats lose in a sum or a difference is no reason to prefer anybody."""
    return pl.Series(values).round_sig_figs(SIGNIFICANT).to_numpy(writable=True)


def group_means(values: Floats, starts: Ints) -> Floats:
    """Mean of each group; of a group of one, the number itself. Each group's values have to be in sorted order.

    Rounded to 12 significant digits of its largest value, so that [.1, .2, -.3] has the mean 0.
    """
    if not len(starts):
        return np.zeros(0)
    sizes = sizes_of(starts, len(values))
    largest = np.maximum(np.abs(values[starts]), np.abs(values[starts + sizes - 1]))
    means = significant(np.add.reduceat(values, starts) / sizes)
    for at in np.flatnonzero(np.abs(means) < largest / 2):  # few: where most of the digits cancel out
        means[at] = round(float(means[at]), SIGNIFICANT - 1 - int(np.floor(np.log10(largest[at]))))
    return np.where(sizes == 1, values[starts], means)


def group_deviations(values: Floats, starts: Ints, means: Floats) -> Floats:
    """Population standard deviation of each group."""
    sizes = sizes_of(starts, len(values))
    if not len(starts):
        return np.zeros(0)
    return np.sqrt(np.add.reduceat((values - np.repeat(means, sizes)) ** 2, starts) / sizes)


def candidates_of(narrow: pl.DataFrame, direction: Direction, scorers: str) -> Candidates:
    """Find the distinct candidates of each prompt and their quality.

    Args:
        narrow: rows as of `narrow_rows`, in any order.
        direction: which way the scores count.
        scorers: `rank` or `zscore`: what makes one number of several scorers.

    Rows of one prompt with equal text are one candidate; scores that one scorer and one rater gave it several times
    count as their mean. One scorer and no rater: quality is that score, times -1 where lower is better. With raters,
    each rater's scores (of one scorer, over the whole frame) become z-scores first, a rater who gives everything the
    same score is left out, and a candidate has the mean over its raters. With several scorers, each scorer's numbers
    become ranks within the prompt (average of ties, scaled to 0..1) or z-scores within it, a scorer that gives the
    prompt's candidates the same number is skipped, and a candidate has the mean over the scorers that scored it.
    """
    key = narrow["prompt_key"].to_numpy()
    order = _together(narrow["prompt_key"], key)
    key = key[order]
    starts = starts_of(key)
    first_row = order[starts]
    chars = narrow["num_chars"].to_numpy()[order].astype(np.int64)
    filled = chars > 0
    run = group_numbers(starts, len(order))[filled]
    rows = order[filled]
    plain = narrow["scorer"].n_unique() <= 1 and narrow["rater"].null_count() == narrow.height
    unused = {"empty_response": len(order) - len(rows)}
    make = _plain if plain else _judged
    found = make(narrow, run, rows, chars[filled], first_row, signed(direction), scorers, unused)
    return found._replace(mixed=len(starts_of(key, narrow["prompt_check"].to_numpy()[order])) > len(starts))


def _together(series: pl.Series, key: npt.NDArray[np.uint64]) -> Ints:
    """An order of the rows in which those of one prompt stand together: as they are, if they do, else by key."""
    heads = pl.Series(key[starts_of(key)])
    if heads.n_unique() == len(heads):
        return np.arange(len(key))
    sort = pl.DataFrame({"key": series}).with_row_index("row").sort("key", maintain_order=True)
    return sort["row"].to_numpy().astype(np.int64)


def extreme_rows(candidates: Candidates, num_rows: int) -> Ints:
    """Rows, ascending, of candidates with the best or worst quality of their prompt, and each prompt's first row."""
    told = np.flatnonzero(~np.isnan(candidates.quality))
    quality = candidates.quality[told]
    starts = starts_of(candidates.run[told])
    sizes = sizes_of(starts, len(told))
    extreme = np.zeros(len(candidates.row), np.bool_)
    for ends in (np.maximum, np.minimum):
        extreme[told] |= quality == (np.repeat(ends.reduceat(quality, starts), sizes) if len(told) else quality)
    owner, row = candidates.merged
    found = np.zeros(num_rows, np.bool_)
    for rows in (candidates.row[extreme], row[extreme[owner]], candidates.first_row):
        found[rows] = True
    return np.flatnonzero(found)


def _twins(run: Ints, text: npt.NDArray[np.uint64]) -> Ints:
    """Positions of the rows whose text another row of the prompt has too (and, once in 2^40, of others)."""
    if len(run) < 2:
        return np.zeros(0, np.int64)
    bits = np.uint64(int(run[-1]).bit_length())
    tag = text >> bits
    if bits:
        tag |= run.astype(np.uint64) << (np.uint64(64) - bits)
    ordered = pl.Series(tag).sort().to_numpy()
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.flatnonzero(np.isin(tag, several)) if len(several) else np.zeros(0, np.int64)


def _plain(
    narrow: pl.DataFrame,
    run: Ints,
    rows: Ints,
    chars: Ints,
    first_row: Ints,
    sign: int,
    _scorers: str,
    unused: dict[str, int],
) -> Candidates:
    """One scorer, no rater."""
    score = narrow["score"].to_numpy()[rows]
    text = narrow["text_key"].to_numpy()[rows]
    twins = _twins(run, text)
    merged = np.zeros(0, np.int64), np.zeros(0, np.int64)
    num_rows = len(rows)
    if len(twins):
        twins = twins[np.lexsort((score[twins], text[twins], run[twins]))]
        starts = starts_of(run[twins], text[twins])
        firsts = np.minimum.reduceat(twins, starts)
        score = score.copy()
        score[firsts] = group_means(score[twins], starts)
        keep = np.ones(num_rows, np.bool_)
        keep[twins] = False
        keep[firsts] = True
        new = np.cumsum(keep) - 1
        owner = np.repeat(new[firsts], sizes_of(starts, len(twins)))
        merged = owner, rows[twins]
        run, rows, chars, score = run[keep], rows[keep], chars[keep], score[keep]
    unused = unused | {"identical_response": num_rows - len(rows)}
    quality = score * sign
    return Candidates(False, run, rows, chars, quality, score, first_row, merged, [], min(1, len(rows)), 0, unused)


def _codes(names: pl.Series) -> Ints:
    """Each name's place among the sorted names; null is a name of its own and comes first."""
    return names.cast(pl.String).rank("dense").cast(pl.Int64).fill_null(0).to_numpy()


def _judged(
    narrow: pl.DataFrame,
    run: Ints,
    rows: Ints,
    chars: Ints,
    first_row: Ints,
    sign: int,
    scorers: str,
    unused: dict[str, int],
) -> Candidates:
    """Several scorers, or raters, or both."""
    text = narrow["text_key"].to_numpy()[rows]
    scorer, rater = (_codes(narrow[name])[rows] for name in ("scorer", "rater"))
    rated = narrow["rater"].null_count() < narrow.height
    score = narrow["score"].to_numpy()[rows]

    order = np.lexsort((score, rater, scorer, text, run))  # by candidate, then scorer, then rater, then number
    texts = starts_of(run[order], text[order])
    number = group_numbers(texts, len(order))
    first = np.minimum.reduceat(order, texts) if len(texts) else texts
    place = np.argsort(np.argsort(first))  # candidates in the order of their first rows
    candidate = place[number]
    owners = candidate[np.flatnonzero(np.repeat(sizes_of(texts, len(order)) > 1, sizes_of(texts, len(order))))]
    merged = owners, rows[order][np.repeat(sizes_of(texts, len(order)) > 1, sizes_of(texts, len(order)))]
    first = np.sort(first)

    given = starts_of(candidate, scorer[order], rater[order])
    score = group_means(score[order], given)
    candidate, scorer, rater = candidate[given], scorer[order][given], rater[order][given]
    num_scorers = len(np.unique(scorer))
    unused = unused | {"identical_response": len(rows) - len(given), "merged_score": len(given) - len(first)}

    values = score * sign
    whose, means = candidate, values
    if rated:
        tells, values = _normalised(values, scorer, rater)
        whose, by, means = _mean_of(candidate[tells], scorer[tells], values)
        means = np.round(means, PLACES)
    else:
        by = scorer
    own = np.full(len(first), np.nan)
    if num_scorers == 1:
        owner, _, mean = _mean_of(candidate, scorer, score)
        own[owner] = mean
    opinions = []
    for code in np.unique(scorer):
        value = np.full(len(first), np.nan)
        value[whose[by == code]] = means[by == code]
        opinions.append(value)
    quality = opinions[0] if num_scorers == 1 else _over_scorers(run[first], opinions, scorers)
    num_raters = len(np.unique(rater)) if rated else 0
    return Candidates(
        False,
        run[first],
        rows[first],
        chars[first],
        quality,
        own,
        first_row,
        merged,
        opinions if num_scorers > 1 else [],
        num_scorers,
        num_raters,
        unused,
    )


def _normalised(values: Floats, scorer: Ints, rater: Ints) -> tuple[Ints, Floats]:
    """Positions whose rater tells things apart, and their z-scores over all that this rater gave for this scorer."""
    order = np.lexsort((values, rater, scorer))
    starts = starts_of(scorer[order], rater[order])
    sizes = sizes_of(starts, len(order))
    means = group_means(values[order], starts)
    deviations = group_deviations(values[order], starts, means)
    tells = np.repeat(deviations >= SAYS_NOTHING, sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (values[order] - np.repeat(means, sizes)) / np.repeat(deviations, sizes)
    return order[tells], np.round(z[tells], PLACES)


def _mean_of(candidate: Ints, scorer: Ints, values: Floats) -> tuple[Ints, Ints, Floats]:
    """Candidate, scorer and mean over raters."""
    order = np.lexsort((values, scorer, candidate))
    starts = starts_of(candidate[order], scorer[order])
    return candidate[order][starts], scorer[order][starts], group_means(values[order], starts)


def _over_scorers(run: Ints, opinions: list[Floats], scorers: str) -> Floats:
    """Mean over scorers of the rank or z-score within the prompt; NaN where none tells the candidate apart."""
    total, count = np.zeros(len(run)), np.zeros(len(run))
    for value in opinions:
        there = np.flatnonzero(~np.isnan(value))
        order = there[np.lexsort((value[there], run[there]))]
        starts = starts_of(run[order])
        sizes = sizes_of(starts, len(order))
        means = group_means(value[order], starts)
        deviations = group_deviations(value[order], starts, means)
        if scorers == "rank":
            numbers = _ranks(run[order], value[order], starts, sizes)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                z = (value[order] - np.repeat(means, sizes)) / np.repeat(deviations, sizes)
            numbers = np.round(z, PLACES)
        tells = np.repeat(deviations >= SAYS_NOTHING, sizes)
        total[order[tells]] += numbers[tells]
        count[order[tells]] += 1
    with np.errstate(invalid="ignore"):
        return np.round(total / count, MEAN_PLACES)


def _ranks(run: Ints, value: Floats, starts: Ints, sizes: Ints) -> Floats:
    """Ranks within each run, equal values their average, scaled to 0 (worst) .. 1 (best); values are sorted."""
    ties = starts_of(run, value)
    same = sizes_of(ties, len(value))
    middle = np.repeat(ties + (same - 1) / 2, same)  # average position of equal values
    return (middle - np.repeat(starts, sizes)) / np.maximum(np.repeat(sizes, sizes) - 1, 1)
