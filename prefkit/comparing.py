"""Pairs that lie in files are compared with each other: prompts become clusters, pairs verdicts.

Comes in: Parquet files of draft pairs and their keys. Goes out: `dedupe.Verdicts`. Texts are read once for
their signatures and once for what is verified, and again where a crowd has to meet again or a chain has to be measured;
what is held is some hundred bytes a pair.
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.buckets import components
from prefkit.dedupe import KEPT, NEAR_DUPLICATE, REASONS, Relations, Rules, Verdicts, claims, exact_groups, judge
from prefkit.format import Kind
from prefkit.grams import Array
from prefkit.keys import mixed, narrow_pairs
from prefkit.minhash import Nearness
from prefkit.near import Meeting, TextFile, text_files
from prefkit.screen import Screened
from prefkit.split import is_test
from prefkit.workers import processes_of

FEW = 20_000  # pairs that are not worth a second process
Tell = Callable[[str], None]
Watch = Callable[[int, int], None]


class Comparing(NamedTuple):
    """How pairs are compared: when prompts and sides are nearly the same (both or neither), and what follows."""

    prompts: Nearness | None
    sides: Nearness | None
    rules: Rules
    processes: int = 1
    scratch: Path | None = None
    tell: Tell = lambda _text: None
    watch: Watch = lambda _done, _total: None


class Compared(NamedTuple):
    """Verdicts, the prompt cluster of each pair, and the prompt itself as a number.

    `crowded`: so many texts were so alike that not all were compared with all.
    """

    verdicts: Verdicts
    prompts: Array
    asked: Array
    crowded: bool


def with_held_out(keys: pl.DataFrame, prompt_ids: pl.Series, test_share: float, seed: int) -> pl.DataFrame:
    """Keys with `held_out`: whether a pair would be if its prompt were alone."""
    held = [is_test(prompt, test_share, seed) for prompt in prompt_ids]
    return keys.with_columns(pl.Series("held_out", held, pl.Boolean))


def compare_pairs(files: Sequence[Path], keys: pl.DataFrame, old: Array, kind: Kind, how: Comparing) -> Compared:
    """Compare all pairs of some files.

    Args:
        files: Parquet files with prompt, chosen and rejected, rows numbered through.
        keys: a row a pair, in that order (`keys.narrow_pairs`, `with_held_out`).
        old: bool a pair: it was there before, and stays.
        kind: of the dataset.
        how: see there.
    """
    better = claims(keys, old)
    stands = exact_groups(keys, better, exact=how.rules.exact)
    if how.prompts is None or how.sides is None or not keys.height:
        prompts = _numbers(keys["key_asked"].to_numpy())
        return Compared(judge(keys, better, stands, prompts, None, how.rules, old), prompts, prompts, crowded=False)
    asked = _numbers(keys["key_asked"].to_numpy())
    firsts = np.full(int(asked.max(initial=-1)) + 1, keys.height, np.int64)
    np.minimum.at(firsts, asked, np.arange(keys.height))
    one_each = np.zeros(keys.height, np.bool_)
    one_each[firsts] = True
    rank = keys["pair"].to_numpy()  # of the content alone, like the rank of prompts
    how.tell("comparing prompts")
    questions = text_files(files, ("prompt",), kind)
    sides = text_files(files, ("chosen", "rejected"), kind)
    by_content = keys["key_asked"].to_numpy()
    with (
        processes_of(min(how.processes, len(questions)) if keys.height > FEW else 1) as pool,
        Meeting(
            questions, how.prompts, rows=one_each, rank=by_content, pool=pool, scratch=how.scratch, watch=how.watch
        ) as meeting,
    ):
        links, relations = _no_links(), _no_relations(keys.height)
        kept = np.ones(keys.height, np.bool_)
        while True:
            among = np.zeros(keys.height, np.bool_)
            among[firsts[asked[kept]]] = True
            met = meeting.meet(among)
            enough = met.similar[:, 0] >= how.prompts.threshold
            links, new_links = _added(links, asked[met.left[enough]], asked[met.right[enough]])
            prompts = components(len(firsts), *links)[asked]
            how.tell("comparing pairs")
            found, side_crowded = _relations(sides, keys, stands, prompts, kept, rank, pool, how)
            relations, new = _united(relations, found, keys.height)
            verdicts = judge(keys, better, stands, prompts, relations, how.rules, old)
            now = verdicts.reason == KEPT
            # of a crowd not all have met: those that are left meet again, until they bring nothing new
            if not (met.crowded or side_crowded) or not (new_links or new) or bool((now == kept).all()):
                break
            kept = now
    return Compared(_all_measured(verdicts, sides, how), prompts, asked, met.crowded or side_crowded)


def _numbers(keys: Array) -> Array:
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _no_links() -> tuple[Array, Array]:
    return np.empty(0, np.int64), np.empty(0, np.int64)


def _added(links: tuple[Array, Array], left: Array, right: Array) -> tuple[tuple[Array, Array], bool]:
    """Links with more of them, each once; whether any is new."""
    one, two = np.concatenate([links[0], left]), np.concatenate([links[1], right])
    low, high = np.minimum(one, two), np.maximum(one, two)
    _, at = np.unique(low * (int(high.max(initial=0)) + 1) + high, return_index=True)
    return (low[at], high[at]), len(at) > len(links[0])


def _no_relations(num: int) -> Relations:
    nothing = np.empty(0, np.int64)
    return Relations(nothing, nothing, np.empty(0), np.empty(0), np.ones((num, 2), np.bool_))


def _united(known: Relations, found: Relations, num: int) -> tuple[Relations, bool]:
    """All relations, each once; whether any is new."""
    left, right = np.concatenate([known.left, found.left]), np.concatenate([known.right, found.right])
    _, at = np.unique(left * num + right, return_index=True)
    direct, cross = np.concatenate([known.direct, found.direct]), np.concatenate([known.cross, found.cross])
    return Relations(left[at], right[at], direct[at], cross[at], known.short & found.short), len(at) > len(known.left)


def _relations(
    files: Sequence[TextFile],
    keys: pl.DataFrame,
    stands: Array,
    prompts: Array,
    kept: Array,
    rank: Array,
    pool: ProcessPoolExecutor | None,
    how: Comparing,
) -> tuple[Relations, bool]:
    """Which pairs of one prompt cluster and setting match, directly or crosswise; whether a bucket was crowded."""
    assert how.sides is not None
    scope = mixed(prompts.astype(np.uint64), keys["key_setting"].to_numpy())
    rows = kept & (stands == np.arange(keys.height))
    numbers = _numbers(scope)
    rows &= np.bincount(numbers[rows], minlength=int(numbers.max(initial=-1)) + 1)[numbers] > 1
    if not rows.any():
        return _no_relations(keys.height), False
    with Meeting(
        files, how.sides, rows=rows, scope=scope, rank=rank, pool=pool, scratch=how.scratch, watch=how.watch
    ) as meeting:
        met = meeting.meet()
        short = meeting.short
    short[~rows] = True
    exact = keys["key_prompt"].to_numpy()
    one_prompt = exact[met.left] == exact[met.right]
    matches = []
    for column, (mine, theirs) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
        told_apart = ~(short[met.left, mine] | short[met.right, theirs])
        similar = met.similar[:, column]
        matches.append(np.where((similar >= how.sides.threshold) & (told_apart | one_prompt), similar, -1.0))
    direct, cross = np.minimum(matches[0], matches[1]), np.minimum(matches[2], matches[3])
    some = (direct >= 0) | (cross >= 0)
    return Relations(met.left[some], met.right[some], direct[some], cross[some], short), met.crowded


def _all_measured(verdicts: Verdicts, files: Sequence[TextFile], how: Comparing) -> Verdicts:
    """Verdicts with the similarity of each near-duplicate to the pair that stays, also where a chain joined them."""
    rows = np.flatnonzero((verdicts.reason == NEAR_DUPLICATE) & np.isnan(verdicts.similarity))
    if not len(rows):
        return verdicts
    assert how.sides is not None
    others = verdicts.other[rows]
    taking_part = np.zeros(len(verdicts.reason), np.bool_)
    with Meeting(files, how.sides, rows=taking_part, scratch=how.scratch) as meeting:
        met = meeting.compare(rows, others)
    verdicts.similarity[rows] = np.minimum(met.similar[:, 0], met.similar[:, 1])
    return verdicts


def told(verdicts: Verdicts, pair_ids: Callable[[Array], pl.Series], rows: slice | Array) -> pl.DataFrame:
    """Some verdicts as columns: stage, reason (null: kept), duplicate_of, contradicts, jaccard, cluster_id, split."""
    reason, other = verdicts.reason[rows], verdicts.other[rows]
    named = pl.Series("other", [None] * len(other), pl.String)
    at = np.flatnonzero(other >= 0)
    if len(at):
        named = named.scatter(at, pair_ids(other[at]))
    frame = pl.DataFrame(
        {
            "reason": pl.Series(np.array([*REASONS])[reason]),
            "other": named,
            "jaccard": pl.Series(verdicts.similarity[rows]).fill_nan(None),
            "cluster_id": pl.Series(verdicts.cluster[rows]),
            "test": pl.Series(verdicts.test[rows]),
        }
    )
    gone = pl.col("reason") != ""
    repeats = pl.col("reason").is_in(["duplicate", "near_duplicate"])
    return frame.select(
        pl.when(gone).then(pl.lit("dedupe")).alias("stage"),
        pl.when(gone).then("reason").alias("reason"),
        pl.when(repeats).then("other").alias("duplicate_of"),
        pl.when(~repeats).then("other").alias("contradicts"),
        pl.when(repeats).then("jaccard").alias("jaccard"),
        pl.when(pl.col("cluster_id") >= 0).then("cluster_id").alias("cluster_id"),
        pl.when("test").then(pl.lit("test")).otherwise(pl.lit("train")).alias("split"),
    )


def dedupe_pairs(pairs: pl.DataFrame, kind: Kind, how: Comparing, test_share: float = 0.0, seed: int = 0) -> Screened:
    """Compare the pairs of a frame: what a build does with files.

    Args:
        pairs: pair_id, prompt_id, texts, annotator, margin, agreement.
        kind: of the dataset.
        how: see `Comparing`.
        test_share: of prompts, 0..1.
        seed: of the split.

    Returns:
        kept in the order of `pairs`, with the split it has or gets; dropped with stage, reason, duplicate_of,
        contradicts, jaccard and cluster_id.
    """
    keys = with_held_out(narrow_pairs(pairs, kind), pairs["prompt_id"], test_share, seed)
    with tempfile.TemporaryDirectory(prefix="prefkit-") as folder:
        path = Path(folder) / "pairs.parquet"
        pairs.select("prompt", "chosen", "rejected").write_parquet(path, compression="uncompressed")
        found = compare_pairs([path], keys, np.zeros(pairs.height, np.bool_), kind, how._replace(scratch=Path(folder)))
    columns = told(found.verdicts, pairs["pair_id"].gather, slice(None))
    columns = columns.drop("split") if "split" in pairs.columns else columns
    gone = columns["reason"].is_not_null()
    whole = pairs.hstack(columns)
    kept = whole.filter(~gone).drop("stage", "reason", "duplicate_of", "contradicts", "jaccard", "cluster_id")
    return Screened(kept, whole.filter(gone))
