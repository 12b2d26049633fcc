"""Candidates with a quality become pairs of numbers: which is chosen, which is rejected, why a prompt gives none.

Comes in: `quality.Candidates` and the rules. Goes out: a `Pairing`. Decided on numbers alone: a text is read only where
two candidates tie in all else. Pairs are enumerated only where a rule compares the two sides (`_crossed`), and there a
few million at a time, so that a prompt with a thousand candidates needs no more memory than any other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from prefkit.errors import ConfigError
from prefkit.pairs import SLACK, Direction, signed
from prefkit.quality import (
    Candidates,
    Flags,
    Floats,
    Ints,
    group_deviations,
    group_means,
    significant,
    sizes_of,
    starts_of,
)

STAGES = (
    "tie",
    "under_min_chosen_score",
    "under_min_margin",
    "over_max_margin",
    "over_length_cap",
    "scorers_disagree",
)
REASONS = ("no_candidate", "one_candidate", *STAGES)
CROSSINGS = 1 << 21  # pairs of candidates looked at in one go: some 200 MB of numbers
TEXTS = 1 << 17  # texts compared in one go

Texts = Callable[[Ints], pl.Series]  # rows -> the text of their responses, as `flat` writes it


class Rules(NamedTuple):
    """What makes a pair, as config.PairsConfig says it; `sigma`, the K of rejected "sigma", in standard deviations."""

    chosen: Literal["best", "all_above"] = "best"
    rejected: Literal["worst", "random", "all", "sigma"] = "worst"
    sigma: float = 0.0
    min_margin: float = 0.0
    max_margin: float | None = None
    min_chosen_score: float | None = None
    length_cap: float | None = None
    max_pairs_per_prompt: int | None = None
    scorers: Literal["rank", "zscore"] = "rank"
    scorers_agree: bool = False
    seed: int = 0

    @property
    def lottery(self) -> int | None:
        """The seed of `random`, if that is the rule."""
        return self.seed if self.rejected == "random" else None


def only_extremes(rules: Rules) -> bool:
    """Whether nothing but the best and the worst candidates of a prompt can be in a pair, whatever the scores are."""
    bounds = rules.max_margin is None and rules.length_cap is None and not rules.scorers_agree
    return bounds and rules.chosen == "best" and rules.rejected == "worst"


class Pairing(NamedTuple):
    """Pairs as numbers of candidates, with their margin; and for each prompt its REASONS number, -1 with a pair."""

    chosen: Ints
    rejected: Ints
    margin: Floats
    reason: Ints

    def pairs(self, some: slice) -> "Pairing":
        """Some of the pairs."""
        return Pairing(self.chosen[some], self.rejected[some], self.margin[some], self.reason)

    def without_prompts(self) -> "Pairing":
        """The pairs alone."""
        return self._replace(reason=self.reason[:0])


def pair_candidates(
    candidates: Candidates, narrow: pl.DataFrame, direction: Direction, rules: Rules, texts: Texts
) -> Pairing:
    """Which candidates make pairs, and why a prompt makes none; `select_pairs` says by which rules."""
    if rules.min_chosen_score is not None and candidates.num_scorers > 1:
        raise ConfigError(
            f"pairs.min_chosen_score has no meaning with {candidates.num_scorers} scorers, whose units differ",
            expected="one scorer",
            hint="leave pairs.min_chosen_score out, or map score: to one column",
        )
    lots = narrow["lot"].to_numpy()[candidates.row] if rules.rejected == "random" else None
    field = _Field(candidates, signed(direction), rules, texts, lots)
    alive = np.zeros((len(STAGES), len(candidates.first_row)), np.bool_)
    compares = rules.length_cap is not None or (rules.scorers_agree and candidates.num_scorers > 1)
    plain = rules.chosen == "best" and rules.rejected != "all" and not compares
    chosen, rejected = _extremes(field, alive) if plain else _crossed(field, alive)
    order = np.lexsort((candidates.row[rejected], candidates.row[chosen]))
    chosen, rejected = chosen[order], rejected[order]
    margin = significant(candidates.quality[chosen] - candidates.quality[rejected])
    return Pairing(chosen, rejected, margin, _reasons(candidates, alive))


def _reasons(candidates: Candidates, alive: Flags) -> Ints:
    num = np.bincount(candidates.run, minlength=alive.shape[1])
    first_failed = np.where(alive.all(axis=0), -3, np.argmin(alive, axis=0)) + 2  # -1: none failed
    return np.where(num < 2, num, first_failed)


class _Field(NamedTuple):
    """All that a decision needs."""

    candidates: Candidates
    sign: int
    rules: Rules
    texts: Texts
    lots: Any  # u64 a candidate, None but for random

    def reaches(self, numbers: Ints) -> Flags:
        """Whether the own score of these candidates is good enough to be chosen."""
        if self.rules.min_chosen_score is None:
            return np.ones(len(numbers), np.bool_)
        return self.candidates.score[numbers] * self.sign >= self.rules.min_chosen_score * self.sign

    def margins(self, high: Floats, low: Floats) -> tuple[Floats, Flags, Flags]:
        """Margins; which reach min_margin; which keep to max_margin."""
        margin, slack = significant(high - low), SLACK * (np.abs(high) + np.abs(low))
        most = np.inf if self.rules.max_margin is None else self.rules.max_margin
        return margin, margin + slack >= self.rules.min_margin, margin - slack <= most

    def preference(self, numbers: Ints) -> list[Any]:
        """What the rule of rejected orders these candidates by, smallest first."""
        quality = self.candidates.quality
        match self.rules.rejected:
            case "worst":
                return [quality[numbers]]
            case "random":
                return [self.lots[numbers]]
            case "sigma":
                return [_distances(self.candidates, self.rules.sigma)[numbers], quality[numbers]]
            case "all":
                return []


def _distances(candidates: Candidates, sigma: float) -> Floats:
    """|quality - (mean - sigma * std)| over the candidates of each prompt; NaN where there is no quality."""
    told = np.flatnonzero(~np.isnan(candidates.quality))
    order = told[np.lexsort((candidates.quality[told], candidates.run[told]))]
    quality = candidates.quality[order]
    starts = starts_of(candidates.run[order])
    means = group_means(quality, starts)
    target = means - sigma * group_deviations(quality, starts, means)
    found = np.full(len(candidates.quality), np.nan)
    found[order] = significant(np.abs(quality - np.repeat(target, sizes_of(starts, len(order)))))
    return found


def least(groups: Ints, *keys: Any) -> Ints:
    """Positions of the smallest entries of each group by the first key, among these by the second, and so on.

    Equal groups stand together: least([0, 0, 1], [5, 4, 9]) -> [1, 2].
    """
    left = np.arange(len(groups))
    for key in keys:
        if not len(left):
            break
        starts = starts_of(groups[left])
        smallest = np.minimum.reduceat(key[left], starts)
        left = left[key[left] == np.repeat(smallest, sizes_of(starts, len(left)))]
    return left


def _extremes(field: _Field, alive: Flags) -> tuple[Ints, Ints]:
    """One pair a prompt, best against one: what all best ones can be paired with is the same, so nothing is crossed."""
    found, rules = field.candidates, field.rules
    told = np.flatnonzero(~np.isnan(found.quality))
    run, quality = found.run[told], found.quality[told]
    starts = starts_of(run)
    sizes = sizes_of(starts, len(told))
    best = np.repeat(np.maximum.reduceat(quality, starts) if len(told) else quality, sizes)
    if rules.rejected == "worst" and rules.max_margin is None:
        worst = np.repeat(np.minimum.reduceat(quality, starts) if len(told) else quality, sizes)
        below = np.flatnonzero((quality == worst) & (quality < best))
    else:
        below = np.flatnonzero(quality < best)
    top = told[quality == best]
    margin, enough, not_too_much = field.margins(best[below], quality[below])
    top_reaches = top[field.reaches(top)]
    reached = np.zeros(alive.shape[1], np.bool_)
    reached[found.run[top_reaches]] = True
    tests = (margin > 0, reached[run[below]], enough, not_too_much)
    ok = np.ones(len(below), np.bool_)
    for stage, test in enumerate(tests):
        ok &= test
        alive[stage, run[below[ok]]] = True
    alive[len(tests) :] = alive[len(tests) - 1]
    low = told[below[ok]]
    low = low[least(found.run[low], *field.preference(low))]
    high = top_reaches[alive[-1, found.run[top_reaches]]]
    return _closest(field, high, low)


def _closest(field: _Field, high: Ints, low: Ints) -> tuple[Ints, Ints]:
    """Of each prompt's chosen and rejected ones the two closest in characters; then the smallest texts.

    Sorted lengths and two look-ups take the place of crossing all with all.
    """
    run, chars = field.candidates.run, field.candidates.num_chars
    if len(high) == len(low) and len(starts_of(run[high])) == len(high) and len(starts_of(run[low])) == len(low):
        return high, low
    low = low[np.lexsort((chars[low], run[low]))]
    key = (run[low] << 32) + chars[low]
    wanted = (run[high] << 32) + chars[high]
    at = np.searchsorted(key, wanted)
    apart = np.full(len(high), np.iinfo(np.int64).max)
    for neighbour in (np.maximum(at - 1, 0), np.minimum(at, len(key) - 1)):
        same = run[low[neighbour]] == run[high]
        apart[same] = np.minimum(apart[same], np.abs(key[neighbour] - wanted)[same])
    near = least(run[high], apart)
    near = near[_smallest_text(field, high[near])]
    spans = [
        (np.searchsorted(key, wanted[near] + step), np.searchsorted(key, wanted[near] + step, side="right"))
        for step in (-apart[near], apart[near])
    ]
    spans[1] = (np.maximum(spans[1][0], spans[0][1]), spans[1][1])  # where apart is 0, both are the same span
    begins = np.stack([span[0] for span in spans], axis=1).ravel()
    ends = np.stack([span[1] for span in spans], axis=1).ravel()
    matched = low[_spans(begins, ends)]
    return high[near], matched[_smallest_text(field, matched)]


def _spans(begins: Ints, ends: Ints) -> Ints:
    """All numbers of the spans, one after the other: [2, 7], [4, 8] -> [2, 3, 7]."""
    sizes = ends - begins
    return np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))


def _smallest_text(field: _Field, numbers: Ints) -> Ints:
    """The position of the smallest text of each prompt among these candidates, which stand together by prompt."""
    run = field.candidates.run[numbers]
    starts = starts_of(run)
    sizes = sizes_of(starts, len(numbers))
    several = np.flatnonzero(np.repeat(sizes > 1, sizes))
    return np.sort(
        np.concatenate([starts[sizes == 1], several[least(run[several], _text_order(field, numbers[several]))]])
    )


def _text_order(field: _Field, numbers: Ints) -> Ints:
    """The place of each candidate's text among those of its prompt, which stand together; 0 is the smallest."""
    run = field.candidates.run[numbers]
    places = np.zeros(len(numbers), np.int64)
    starts = np.append(starts_of(run), len(numbers))
    for groups in _parts(np.diff(starts), TEXTS):
        part = slice(starts[groups.start], starts[groups.stop])
        texts = field.texts(field.candidates.row[numbers[part]])
        frame = pl.DataFrame({"run": run[part], "text": texts}).with_row_index("at").sort("run", "text")
        heads = starts_of(frame["run"].to_numpy())
        rank = np.arange(frame.height) - np.repeat(heads, sizes_of(heads, frame.height))
        places[part.start + frame["at"].to_numpy()] = rank
    return places


def _parts(sizes: Ints, limit: int) -> Iterator[slice]:
    """Slices of neighbouring groups that have at most `limit` entries together, or of one group."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ends):
        done = int(ends[start] - sizes[start])
        stop = max(int(np.searchsorted(ends, done + limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


# -- where a rule compares the two sides


class _Crossing(NamedTuple):
    """Pairs of candidates under consideration; those of a prompt stand together."""

    chosen: Ints
    rejected: Ints

    def take(self, positions: Ints | Flags | slice) -> "_Crossing":
        """Some of them."""
        return _Crossing(self.chosen[positions], self.rejected[positions])


def _crossed(field: _Field, alive: Flags) -> tuple[Ints, Ints]:
    """Every candidate that may be chosen with every worse one of its prompt, a few million at a time."""
    found = field.candidates
    told = np.flatnonzero(~np.isnan(found.quality))
    order = told[np.lexsort((-found.quality[told], found.run[told]))]  # by prompt, the best first
    run, quality = found.run[order], found.quality[order]
    starts, levels = starts_of(run), starts_of(run, quality)
    sizes = sizes_of(starts, len(order))
    ends = np.repeat(np.append(starts[1:], len(order)), sizes) if len(order) else starts
    lower = np.append(levels[1:], len(order))  # where the next lower quality begins
    begins = np.repeat(lower, sizes_of(levels, len(order))) if len(order) else starts
    may = begins < ends
    alive[0, run[may]] = True
    if field.rules.chosen == "best":
        may &= quality == np.repeat(quality[starts], sizes)
    may &= field.reaches(order)
    alive[1, run[may]] = True
    firsts = np.flatnonzero(may)
    places = _places(field)
    tail = _Crossing(np.zeros(0, np.int64), np.zeros(0, np.int64))  # of the prompt that may go on
    done = []
    for part in _parts(ends[firsts] - begins[firsts], CROSSINGS):
        own = firsts[part]
        all_of_them = _Crossing(order[np.repeat(own, ends[own] - begins[own])], order[_spans(begins[own], ends[own])])
        picked = _rejected_of_each(field, _eligible(field, all_of_them, alive), places)
        kept = _kept_of_prompts(field, _one_after_the_other([tail, picked]), places)
        prompts = found.run[kept.chosen]
        last = int(np.searchsorted(prompts, prompts[-1])) if len(prompts) else 0
        done.append(kept.take(slice(0, last)))
        tail = kept.take(slice(last, None))
    return _one_after_the_other([*done, tail])


def _one_after_the_other(crossings: Sequence[_Crossing]) -> _Crossing:
    return _Crossing(*(np.concatenate(side) for side in zip(*crossings, strict=True)))


def _places(field: _Field) -> Ints:
    """The place of every candidate's text in its prompt, where it can decide anything; 0 elsewhere."""
    found, rules = field.candidates, field.rules
    places = np.zeros(len(found.run), np.int64)
    if (rules.rejected != "all" and rules.chosen == "best") or rules.max_pairs_per_prompt is None:
        told = np.flatnonzero(~np.isnan(found.quality))
        order = told[np.lexsort((found.quality[told], found.run[told]))]
        run, quality = found.run[order], found.quality[order]
        tied = np.zeros(len(found.first_row), np.bool_)
        tied[run[1:][(run[1:] == run[:-1]) & (quality[1:] == quality[:-1])]] = True
        matter = np.flatnonzero(tied[found.run])
    else:
        matter = np.arange(len(found.run))
    places[matter] = _text_order(field, matter)
    return places


def _eligible(field: _Field, crossing: _Crossing, alive: Flags) -> _Crossing:
    """Those that satisfy every rule for two sides; `alive` learns how far each prompt came."""
    found, rules = field.candidates, field.rules
    sides = crossing.chosen, crossing.rejected
    margin, enough, not_too_much = field.margins(*(found.quality[side] for side in sides))
    ok = margin > 0
    for stage, test in enumerate((enough, not_too_much), start=2):
        ok &= test
        alive[stage, found.run[crossing.chosen[ok]]] = True
    crossing = crossing.take(ok)
    if rules.length_cap is not None:
        chars = [found.num_chars[side] for side in crossing]
        crossing = crossing.take(np.abs(np.log(chars[0] / chars[1])) <= rules.length_cap + SLACK)
    alive[4, found.run[crossing.chosen]] = True
    if rules.scorers_agree:
        for value in found.opinions:
            crossing = crossing.take(~(value[crossing.rejected] > value[crossing.chosen]))
    alive[5, found.run[crossing.chosen]] = True
    return crossing


def _rejected_of_each(field: _Field, crossing: _Crossing, places: Ints) -> _Crossing:
    """For each chosen candidate the rejected one, or all."""
    if field.rules.rejected == "all":
        return crossing
    keys = [*field.preference(crossing.rejected), _apart(field, crossing), places[crossing.rejected]]
    return crossing.take(least(crossing.chosen, *keys))


def _kept_of_prompts(field: _Field, crossing: _Crossing, places: Ints) -> _Crossing:
    """What `best` and max_pairs_per_prompt leave of each prompt's pairs."""
    found, rules = field.candidates, field.rules
    if rules.chosen == "best":
        whole = [*field.preference(crossing.rejected), _apart(field, crossing)] if rules.rejected != "all" else []
        keys = [*whole, places[crossing.chosen], *([places[crossing.rejected]] if whole else [])]
        crossing = crossing.take(least(found.run[crossing.chosen], *keys))
    if rules.max_pairs_per_prompt is None or not len(crossing.chosen):
        return crossing
    margin = significant(found.quality[crossing.chosen] - found.quality[crossing.rejected])
    run = found.run[crossing.chosen]
    keys = [places[crossing.rejected], places[crossing.chosen], _apart(field, crossing), -margin, run]
    order = np.lexsort(keys)
    starts = starts_of(run[order])
    rank = np.arange(len(order)) - np.repeat(starts, sizes_of(starts, len(order)))
    return crossing.take(order[rank < rules.max_pairs_per_prompt])


def _apart(field: _Field, crossing: _Crossing) -> Ints:
    chars = field.candidates.num_chars
    apart: Ints = np.abs(chars[crossing.chosen] - chars[crossing.rejected])
    return apart
