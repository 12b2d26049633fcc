"""One pair once, and no pair against another: what goes, why, and on which side of the split the rest stands.

Comes in: the keys of all pairs (keys.py), which prompts are one (near.py, or equality), and which pairs are nearly the
same or nearly reversed. Goes out: a verdict a pair. Numbers only: a text is never read here.

In this order: pairs equal after folding are a group and the best of them stands for it; A over B and B over A under one
prompt is a contradiction; A over B over C over A is a cycle; of a cluster of near-duplicates the best stays; of a
prompt only so many stay. What repeats a pair that went goes for the same reason, so `duplicate_of` names a pair that is
there. Better is the human's over a rule's over a model's, then the larger margin, then the smaller pair_id, then the
first in the sources; what a dataset held before is better than anything new, and none of it goes.
"""

from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from prefkit.buckets import components
from prefkit.cycles import on_cycle
from prefkit.grams import Array
from prefkit.keys import mixed

Contradictions = Literal["drop_both", "majority", "higher_margin", "keep"]
REASONS = (
    "",  # kept
    "duplicate",
    "near_duplicate",
    "contradiction",
    "cycle",
    "over_max_pairs_per_prompt",
    "split_conflict",
)
KEPT, DUPLICATE, NEAR_DUPLICATE, CONTRADICTION, CYCLE, OVER_MAX, SPLIT_CONFLICT = range(len(REASONS))
SURE = 2.0  # an agreement above all shares: of pairs that are there to stay


class Relations(NamedTuple):
    """Pairs of rows of one prompt cluster and setting that are nearly the same, or nearly reversed; each once.

    `direct`: the smaller similarity of chosen to chosen and rejected to rejected, `cross`: of chosen to rejected and
    rejected to chosen; 0..1, and -1 where they do not match. `short`: (rows of all pairs, 2), whether chosen and
    rejected are too short to be told from others by their n-grams.
    """

    left: Array
    right: Array
    direct: Array
    cross: Array
    short: Array


class Rules(NamedTuple):
    """What counts as the same, and what becomes of contradictions."""

    exact: bool = True
    contradictions: Contradictions = "drop_both"
    cycles: Literal["drop", "keep"] = "drop"
    max_pairs_per_prompt: int | None = None


class Verdicts(NamedTuple):
    """What becomes of each row.

    `reason`: its number in REASONS; `other`: the row it repeats or contradicts, -1 for none; `similarity`: to the row
    it repeats, NaN where the two were not compared; `cluster`: of near-duplicates, -1 for none; `test`: it is held out.
    """

    reason: Array
    other: Array
    similarity: Array
    cluster: Array
    test: Array


def exact_groups(keys: pl.DataFrame, better: Array, *, exact: bool = True) -> Array:
    """The row that stands for each row: the best of those equal after folding, or of one pair_id. int64."""
    names = ("key_prompt", "key_chosen", "key_rejected") if exact else ("pair",)
    whole = mixed(*(keys[name].to_numpy() for name in names))
    order = np.argsort(whole, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], whole[order][1:] != whole[order][:-1]])) if len(order) else order
    sizes = np.diff(np.append(starts, len(order)))
    stands = np.arange(len(order))
    several = np.repeat(sizes > 1, sizes)
    rows, groups = order[several], np.repeat(np.arange(len(sizes)), sizes)[several]
    by_claim = np.lexsort([better[rows], groups])
    rows, groups = rows[by_claim], groups[by_claim]
    heads = np.concatenate([[True], groups[1:] != groups[:-1]]) if len(groups) else np.empty(0, np.bool_)
    stands[rows] = rows[np.maximum.accumulate(np.where(heads, np.arange(len(rows)), 0))]
    return stands


def claims(keys: pl.DataFrame, old: Array) -> Array:
    """The place of each row among all by its claim to be kept, 0 for the best: int64."""
    margin = keys["margin"].fill_null(float("-inf")).to_numpy()
    order = np.lexsort([keys["pair"].to_numpy(), -margin, keys["trust"].to_numpy(), ~old])
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order))
    return found


def judge(
    keys: pl.DataFrame, better: Array, stands: Array, prompts: Array, near: Relations | None, rules: Rules, old: Array
) -> Verdicts:
    """A verdict for every pair.

    Args:
        keys: `keys.narrow_pairs`, with `held_out` (bool): whether its own prompt would be.
        better: `claims` of the rows.
        stands: `exact_groups` of the rows.
        prompts: the number of the prompt cluster of each row.
        near: relations of rows that stand for others; None where only equality counts.
        rules: as said.
        old: bool, rows that a dataset holds already.
    """
    num = keys.height
    first = stands == np.arange(num)
    copies = np.bincount(stands, minlength=num)
    reversed_left, reversed_right, direct = _sorted_out(keys, first, near)
    reason, other = np.zeros(num, np.int8), np.full(num, -1, np.int64)
    similarity, cluster = np.full(num, np.nan), np.full(num, -1, np.int64)

    if rules.contradictions != "keep":
        sizes = copies
        if rules.contradictions == "majority":
            together = components(num, direct.left, direct.right)
            sizes = np.bincount(together, weights=copies, minlength=num)[together]
        claim = {"majority": sizes.astype(np.float64), "higher_margin": keys["margin"].fill_null(0.0).to_numpy()}
        _judge_reversals(
            reversed_left, reversed_right, claim.get(rules.contradictions, np.zeros(num)), keys, old, reason, other
        )
    if rules.cycles == "drop":
        _judge_cycles(keys, np.flatnonzero(first & (reason == KEPT)), prompts, near, old, reason)

    stays = first & (reason == KEPT)
    both = stays[direct.left] & stays[direct.right]
    together = components(num, direct.left[both], direct.right[both])
    head = _best(together, better, stays)  # of each row that stays the best of its cluster
    heads = stays & ((head == np.arange(num)) | old)
    _cap(prompts, better, heads, rules.max_pairs_per_prompt, old, reason)
    test = _split(keys, prompts, old, reason, heads)

    final = np.where(stays, head, stands)
    final = final[stands]  # copies go where the row that stands for them goes
    repeats = (final != np.arange(num)) & (reason[final] == KEPT) & ~old
    reason[repeats] = np.where(final == stands, DUPLICATE, NEAR_DUPLICATE)[repeats]
    other[repeats] = final[repeats]
    similarity[reason == DUPLICATE] = 1.0
    inherits = (final != np.arange(num)) & ~repeats & ~old & (reason == KEPT)
    reason[inherits], other[inherits] = reason[final[inherits]], other[final[inherits]]
    _similarities(direct, final, stands, reason, similarity)
    clustered = (np.bincount(together[stays], minlength=num) > 1)[together[stands]]
    near_ones = clustered & (reason != KEPT)
    cluster[near_ones] = _numbered(keys["pair"].to_numpy()[head[stands]], near_ones)
    return Verdicts(reason, other, similarity, cluster, test)


class _Direct(NamedTuple):
    left: Array
    right: Array
    similarity: Array


def _sorted_out(keys: pl.DataFrame, first: Array, near: Relations | None) -> tuple[Array, Array, _Direct]:
    """The pairs of rows that contradict each other, and those that are nearly the same."""
    rows = np.flatnonzero(first)
    parts = [keys[name].to_numpy()[rows] for name in ("key_prompt", "key_chosen", "key_rejected")]
    there, back = mixed(*parts), mixed(parts[0], parts[2], parts[1])
    order = np.argsort(there, kind="stable")
    at = np.minimum(np.searchsorted(there[order], back), max(len(order) - 1, 0))
    found = np.flatnonzero(there[order][at] == back) if len(rows) else rows
    one, two = rows[found], rows[order[at[found]]]  # the first of several equal ones: each has an edge to one of them
    left, right = np.unique(np.sort(np.stack([one, two]), axis=0), axis=1) if len(one) else (one, two)
    nothing = np.empty(0, np.int64)
    if near is None:
        return left, right, _Direct(nothing, nothing, np.empty(0))
    num = np.uint64(keys.height)
    exactly = np.isin(near.left.astype(np.uint64) * num + near.right, left.astype(np.uint64) * num + right)
    chosen, rejected = (keys[f"key_{side}"].to_numpy() for side in ("chosen", "rejected"))
    mirrored = (chosen[near.left] == rejected[near.right]) & (rejected[near.left] == chosen[near.right])
    swapped = (near.cross >= 0) & ((near.cross > near.direct) | mirrored) & ~exactly
    same = (near.direct >= 0) & ~swapped & ~exactly
    left, right = np.concatenate([left, near.left[swapped]]), np.concatenate([right, near.right[swapped]])
    return left, right, _Direct(near.left[same], near.right[same], near.direct[same])


def _judge_reversals(
    left: Array, right: Array, claim: Array, keys: pl.DataFrame, old: Array, reason: Array, other: Array
) -> None:
    """Whose claim is not larger than that of every row against it goes, and names the smallest pair_id of these."""
    one, against = np.concatenate([left, right]), np.concatenate([right, left])
    loses = np.zeros(len(reason), np.bool_)
    loses[one[(claim[one] <= claim[against]) & ~old[one] | (old[against] & ~old[one])]] = True
    order = np.lexsort([against, keys["pair"].to_numpy()[against], one])
    one, against = one[order], against[order]
    heads = np.flatnonzero(np.concatenate([[True], one[1:] != one[:-1]])) if len(one) else one
    reason[loses] = CONTRADICTION
    named = heads[loses[one[heads]]]
    other[one[named]] = against[named]


def _judge_cycles(
    keys: pl.DataFrame, rows: Array, prompts: Array, near: Relations | None, old: Array, reason: Array
) -> None:
    """A response is what it says, and what it responds to: a short one its very prompt, a longer one the cluster."""
    exactly = keys["key_prompt"].to_numpy()[rows]
    loosely = mixed(prompts[rows].astype(np.uint64), keys["key_setting"].to_numpy()[rows])
    nodes = {}
    for number, side in enumerate(("chosen", "rejected")):
        scope = exactly if near is None else np.where(near.short[rows, number], exactly, loosely)
        nodes[side] = pl.Series(mixed(scope, keys[f"key_{side}"].to_numpy()[rows]))
    sure = pl.when(pl.Series(old[rows])).then(SURE).otherwise(keys["agreement"].gather(rows))
    edges = pl.DataFrame({**nodes, "margin": keys["margin"].gather(rows)}).with_columns(agreement=sure)
    gone = rows[on_cycle(edges).to_numpy()]
    reason[gone[~old[gone]]] = CYCLE


def _best(group: Array, better: Array, among: Array) -> Array:
    """For each row the best row of its group among some; itself where it is not one of them."""
    found = np.arange(len(group))
    rows = np.flatnonzero(among)
    order = rows[np.lexsort([better[rows], group[rows]])]
    heads = np.concatenate([[True], group[order][1:] != group[order][:-1]]) if len(order) else np.empty(0, np.bool_)
    found[order] = order[np.maximum.accumulate(np.where(heads, np.arange(len(order)), 0))]
    return found


def _cap(prompts: Array, better: Array, among: Array, most: int | None, old: Array, reason: Array) -> None:
    """Of each prompt cluster the best stay, as many as may."""
    if most is None:
        return
    rows = np.flatnonzero(among)
    order = rows[np.lexsort([better[rows], prompts[rows]])]
    if len(order):
        starts = np.flatnonzero(np.concatenate([[True], prompts[order][1:] != prompts[order][:-1]]))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        over = order[rank >= most]
        reason[over[~old[over]]] = OVER_MAX


def _split(keys: pl.DataFrame, prompts: Array, old: Array, reason: Array, among: Array) -> Array:
    """Whether each row is held out: as what is there already, else as the smallest prompt_id of its cluster says."""
    num = len(prompts)
    held_out = keys["held_out"].to_numpy()
    order = np.lexsort([keys["prompt"].to_numpy(), prompts])
    heads = np.concatenate([[True], prompts[order][1:] != prompts[order][:-1]]) if num else np.empty(0, np.bool_)
    found = np.empty(num, np.bool_)
    found[order] = held_out[order][np.maximum.accumulate(np.where(heads, np.arange(num), 0))]
    if old.any():
        in_test, in_train = (np.zeros(num, np.bool_) for _ in range(2))
        in_test[prompts[old & held_out]] = True
        in_train[prompts[old & ~held_out]] = True
        known = (in_test | in_train)[prompts]
        found[known] = in_test[prompts[known]]
        reason[(in_test & in_train)[prompts] & among & ~old & (reason == KEPT)] = SPLIT_CONFLICT
        found[old] = held_out[old]
    return found


def _similarities(direct: _Direct, final: Array, stands: Array, reason: Array, similarity: Array) -> None:
    """What near-duplicates have in common with the row that stays, where the two were compared."""
    known = np.full(len(final), np.nan)
    for one, two in ((direct.left, direct.right), (direct.right, direct.left)):
        to_kept = final[one] == two
        known[one[to_kept]] = direct.similarity[to_kept]
    near = reason == NEAR_DUPLICATE
    similarity[near] = known[stands[near]]


def _numbered(pairs: Array, some: Array) -> Array:
    """Numbers of clusters from 0 on, in the order of the pair_id that heads them."""
    return np.unique(pairs[some], return_inverse=True)[1].astype(np.int64)
