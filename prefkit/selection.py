"""The candidates of a prompt become pairs: which is chosen, which is rejected, and why a prompt gives none.

Comes in: records of one source with scores (quality.py makes candidates of them). Goes out: draft pairs, a drop with a
reason for every prompt without a pair, and an account of every row. Decided on numbers alone: a text is read where two
candidates tie in all else, and for the pairs themselves. Pairs of candidates are enumerated only where a rule compares
the two sides (pairing.py), and there a few million at a time.

Max/min pairs get worse as N grows: the best rejected response sits near mean - 2 standard deviations
(arXiv 2502.16825), which `rejected: sigma:2` picks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.format import Kind
from prefkit.pairing import REASONS, Pairing, Rules, Texts, pair_candidates
from prefkit.pairs import Direction, as_drafts, as_dropped
from prefkit.quality import Candidates, Floats, Ints, candidates_of, narrow_rows, significant, starts_of
from prefkit.text import flat, with_prompt_ids

HASH_SEEDS = range(8)  # the second is needed once in 10^7 sources of a million prompts
UNUSED = ("empty_response", "identical_response", "merged_score", "not_selected")
RECORD = ("prompt", "response", "tools", "score", "scorer", "rater", "model", "source", "source_row")
MANY = 8  # candidates a prompt (median) above which the worst is advised against

Gather = Callable[[Ints, Sequence[str]], pl.DataFrame]  # rows, columns -> these columns of the records


class Selected(NamedTuple):
    """What became of the candidates of a source.

    `pairs`: drafts, by the row of chosen, then of rejected; `dropped`: one row a prompt that gave no pair, by first
    appearance; `num_prompts` = `num_paired_prompts` + rows of dropped; `num_used`: distinct candidates in pairs, which
    stand for a row each; `unused`: all other rows, by reason (empty_response, identical_response: the same text again
    from the same scorer and rater, merged_score: from another one, not_selected); `report`: for a person, JSON-able.
    """

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    num_prompts: int
    num_paired_prompts: int
    num_used: int
    unused: dict[str, int]
    report: dict[str, Any]


class Tally(NamedTuple):
    """The account of some prompts: what `Selected` says of them, but for the texts. `num_candidates`: by prompt."""

    num_candidates: Ints
    margins: Floats
    reasons: Mapping[str, int]
    num_used: int
    unused: Mapping[str, int]
    num_scorers: int
    num_raters: int


def select_pairs(records: pl.DataFrame, kind: Kind, direction: Direction, rules: Rules = Rules()) -> Selected:  # noqa: B008  immutable
    """The pairs of a source whose records are in memory: the plain function that candidates.py equals in every part.

    A build goes through `candidates.select_parts`, which needs no more memory than it is given.

    Args:
        records: prompt, response, score, model, source, source_row and, where there are any, tools, scorer, rater; one
            row a candidate and score, in any order, of one source. Scores are finite.
        kind: of the dataset.
        direction: which way the scores count.
        rules: what makes a pair.

    A response that is empty after stripping is no candidate, equal texts are one, and `quality.candidates_of` says how
    scores become quality. (a, b) can be a pair where quality(a) - quality(b), the margin, rounded to 12 significant
    digits, is above 0 and within min_margin..max_margin, |ln(characters of a / of b)| <= length_cap, the source's own
    score of a reaches min_chosen_score, and, with `scorers_agree`, no scorer puts b above a. Then:

    * chosen `best`: only candidates of the prompt's highest quality; `all_above`: every candidate.
    * rejected, for each chosen one, among those it can be paired with: `worst`: the lowest quality; `sigma`: the
      quality nearest to mean - K * std (population, over the prompt's candidates), the lower one of two as near;
      `random`: the smallest hash of (seed, prompt, text); `all`: every one.
    * Ties: the smallest difference in characters, then the smallest text of chosen, then of rejected. `best` with
      worst, sigma or random makes one pair a prompt: where several are best, the one whose rejected side comes first by
      its rule, then by these ties. `best` with `all`: where several are best, the smallest text that has a partner.
    * max_pairs_per_prompt keeps the largest margins, then by these ties.

    A prompt without a pair has the first of REASONS after which none is left. chosen_score and rejected_score are the
    source's own (mean) scores, null where there are several scorers, whose units differ.

    Raises:
        ConfigError: min_chosen_score with several scorers: it is in the units of one.
    """
    complete = as_complete(records)
    gather = gather_from(complete)
    for hash_seed in HASH_SEEDS:
        narrow = narrow_rows(complete, kind, hash_seed=hash_seed, random_seed=rules.lottery)
        candidates = candidates_of(narrow, direction, rules.scorers)
        pairing = pair_candidates(candidates, narrow, direction, rules, texts_from(gather, kind))
        sides = sides_of(pairing, candidates, gather)
        if not candidates.mixed and sides.share_prompts(kind):
            break
    pairs = pairs_frame(sides, pairing, candidates, gather)
    dropped = dropped_frame(pairing, candidates, gather, kind)
    return selected_of(pairs, dropped, [tally(pairing, candidates)], rules)


def as_complete(records: pl.DataFrame) -> pl.DataFrame:
    """Records with the columns that are needed, in one order; null in the optional ones that they do not have."""
    missing = [name for name in ("tools", "scorer", "rater") if name not in records.columns]
    return records.with_columns(pl.lit(None, pl.String).alias(name) for name in missing).select(RECORD)


def gather_from(records: pl.DataFrame) -> Gather:
    """Rows of a frame in memory."""
    return lambda rows, columns: records.select(columns)[rows]


def texts_from(gather: Gather, kind: Kind) -> Texts:
    """The texts of responses, as they are compared."""
    return lambda rows: gather(rows, ["response"]).select(flat("response", kind)).to_series()


# -- frames of what was decided


SIDE = ("prompt", "tools", "response", "model")


class PairSides(NamedTuple):
    """The records of both sides, a row a pair."""

    chosen: pl.DataFrame
    rejected: pl.DataFrame

    def share_prompts(self, kind: Kind) -> bool:
        """False where two prompts have one hash: then all has to be decided again, with other hashes."""
        prompts = [frame.select(flat("prompt", kind), "tools") for frame in self]
        return prompts[0].equals(prompts[1])


def sides_of(pairing: Pairing, candidates: Candidates, gather: Gather) -> PairSides:
    """Gather what pairs are made of."""
    chosen, rejected = (candidates.row[numbers] for numbers in (pairing.chosen, pairing.rejected))
    return PairSides(gather(chosen, [*SIDE, "source", "source_row"]), gather(rejected, SIDE))


def pairs_frame(sides: PairSides, pairing: Pairing, candidates: Candidates, gather: Gather) -> pl.DataFrame:
    """Drafts of all pairs."""
    chosen, rejected = sides
    models = [
        _models(side["model"], numbers, candidates, gather)
        for side, numbers in ((chosen, pairing.chosen), (rejected, pairing.rejected))
    ]
    num_candidates = np.bincount(candidates.run, minlength=len(candidates.first_row))
    made = chosen.select("prompt", "tools", "source", "source_row", chosen="response").with_columns(
        rejected["response"].alias("rejected"),
        models[0].alias("chosen_model"),
        models[1].alias("rejected_model"),
        pl.Series("margin", pairing.margin, pl.Float64),
        pl.Series("chosen_score", candidates.score[pairing.chosen], pl.Float64).fill_nan(None),
        pl.Series("rejected_score", candidates.score[pairing.rejected], pl.Float64).fill_nan(None),
        pl.Series("num_candidates", num_candidates[candidates.run[pairing.chosen]], pl.Int64),
    )
    return as_drafts(made, method=pl.lit("best_of_n"), weight=pl.lit(1.0))


def _models(first: pl.Series, numbers: Ints, candidates: Candidates, gather: Gather) -> pl.Series:
    """The models of these candidates; of a text that several rows have, the smallest name."""
    owner, row = candidates.merged
    sought = np.zeros(len(candidates.row), np.bool_)
    sought[numbers] = True
    wanted = sought[owner]
    if not wanted.any():
        return first
    models = gather(row[wanted], ["model"]).to_series()
    smallest = pl.DataFrame({"number": owner[wanted], "merged": models}).group_by("number").min()
    found = pl.DataFrame({"number": numbers, "model": first}).join(
        smallest, on="number", how="left", maintain_order="left"
    )
    return found.select(pl.coalesce("merged", "model")).to_series()


def dropped_frame(pairing: Pairing, candidates: Candidates, gather: Gather, kind: Kind) -> pl.DataFrame:
    """One row of the dropped table a prompt without a pair, by first appearance; its margin is best - worst."""
    without = np.flatnonzero(pairing.reason >= 0)
    without = without[np.argsort(candidates.first_row[without])]
    num_candidates = np.bincount(candidates.run, minlength=len(candidates.first_row))[without]
    prompts = gather(candidates.first_row[without], ["prompt", "tools", "source", "source_row"]).with_columns(
        pl.Series("reason", REASONS)[pairing.reason[without]].alias("reason"),
        pl.Series("margin", _ranges(candidates)[without], pl.Float64).fill_nan(None),
        pl.when(pl.lit(pl.Series(num_candidates)) > 0).then(pl.lit(pl.Series(num_candidates))).alias("num_candidates"),
        pl.lit("best_of_n").alias("method"),
    )
    return as_dropped(with_prompt_ids(prompts, kind), kind)


def _ranges(candidates: Candidates) -> Floats:
    """Best - worst quality of each prompt, NaN without any."""
    told = ~np.isnan(candidates.quality)
    run, quality = candidates.run[told], candidates.quality[told]
    starts = starts_of(run)
    found = np.full(len(candidates.first_row), np.nan)
    if len(starts):
        found[run[starts]] = significant(np.maximum.reduceat(quality, starts) - np.minimum.reduceat(quality, starts))
    return found


def tally(pairing: Pairing, candidates: Candidates) -> Tally:
    """The account of these prompts."""
    used = np.zeros(len(candidates.row), np.bool_)
    used[pairing.chosen] = used[pairing.rejected] = True
    num_used = int(used.sum())
    counts = np.bincount(pairing.reason[pairing.reason >= 0], minlength=len(REASONS))
    reasons = dict(zip(REASONS, counts.tolist(), strict=True))
    return Tally(
        np.bincount(candidates.run, minlength=len(candidates.first_row)),
        pairing.margin,
        reasons,
        num_used,
        candidates.unused | {"not_selected": len(candidates.row) - num_used},
        candidates.num_scorers,
        candidates.num_raters,
    )


def selected_of(pairs: pl.DataFrame, dropped: pl.DataFrame, tallies: Iterable[Tally], rules: Rules) -> Selected:
    """All that is said of a source whose prompts were decided in several goes."""
    parts = [*tallies]
    sizes = np.concatenate([part.num_candidates for part in parts]) if parts else np.zeros(0, np.int64)
    margins = np.concatenate([part.margins for part in parts]) if parts else np.zeros(0)
    reasons = sum((Counter(part.reasons) for part in parts), Counter[str]())
    unused = sum((Counter(part.unused) for part in parts), Counter[str]())
    num_dropped = reasons.total()
    median = float(np.median(sizes)) if len(sizes) else None
    report = {
        "num_candidates": {"median": median, "max": int(sizes.max()) if len(sizes) else None},
        "margins": _quantiles(margins),
        "prompts_without_pair": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "num_scorers": max((part.num_scorers for part in parts), default=0),
        "num_raters": max((part.num_raters for part in parts), default=0),
        "advice": _advice(median, rules),
    }
    told = {reason: unused[reason] for reason in UNUSED if unused[reason]}
    num_used = sum(part.num_used for part in parts)
    return Selected(pairs, dropped, len(sizes), len(sizes) - num_dropped, num_used, told, report)


def _quantiles(margins: Floats) -> dict[str, float | None]:
    """Nearest-rank quantiles: margins that there are."""
    names = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    if not len(margins):
        return dict.fromkeys(names)
    values = np.quantile(margins, list(names.values()), method="inverted_cdf")
    return dict(zip(names, values.tolist(), strict=True))


def _advice(median: float | None, rules: Rules) -> list[str]:
    if median is None or median <= MANY or rules.rejected != "worst":
        return []
    return [
        f"{median:g} candidates a prompt (median): pairs of the best and the worst get less useful as their number "
        "grows, and the best rejected response lies near mean - 2 standard deviations (arXiv 2502.16825): "
        "pairs.rejected: sigma:2"
    ]
