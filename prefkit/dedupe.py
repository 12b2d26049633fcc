"""One pair once, and no pair against another: exact duplicates, direct reversals, and cycles of preferences.

Duplicate keys are the folded prompt, chosen and rejected (NFC, white space), never the metadata. Of equal pairs the one
kept is the human's over the model's, then the larger margin, then the smaller pair_id, then the first in the sources.
A reversal is A over B and B over A for one folded prompt; a cycle is A over B, B over C and C over A, or a longer one.
A middle candidate that is chosen in one pair and rejected in another is legitimate and stays.
"""

from typing import Literal

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from prefkit.format import Kind
from prefkit.screen import Screened
from prefkit.text import folded

Contradictions = Literal["drop_both", "majority", "higher_margin", "keep"]
KEYS = ("key_prompt", "key_chosen", "key_rejected")
TRUST = {"human": 0, "rule": 1, "model": 2}  # no annotator at all comes last


def _with_keys(pairs: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    keyed = pairs.with_columns(folded(key.removeprefix("key_"), kind).alias(key) for key in KEYS).with_row_index("row")
    if "tools" not in pairs.columns:
        return keyed
    offered = pl.concat_str(pl.col("key_prompt"), pl.lit("\x1e\x1e"), pl.col("tools"))  # no message is without its \x1f
    return keyed.with_columns(pl.coalesce(offered, "key_prompt").alias("key_prompt"))


def _ranked(pairs: pl.DataFrame) -> pl.DataFrame:
    """Best claim to be kept first."""
    trust = pl.col("annotator").replace_strict(TRUST, default=3, return_dtype=pl.Int8)
    return pairs.sort(trust, -pl.col("margin").fill_null(float("-inf")), "pair_id", "row", nulls_last=True)


def _as_dropped(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    return rows.sort("row").with_columns(
        pl.lit("dedupe").alias("stage"),
        pl.lit(reason).alias("reason"),
        pl.lit(None, pl.Float64).alias("jaccard"),
    )


def dedupe_pairs(
    pairs: pl.DataFrame,
    kind: Kind,
    *,
    exact: bool = True,
    contradictions: Contradictions = "drop_both",
    cycles: Literal["drop", "keep"] = "drop",
) -> Screened:
    """Drop exact duplicates (reason `duplicate`, jaccard 1), then reversals (`contradiction`), then cycles (`cycle`).

    Args:
        pairs: with pair_id, prompt_id, texts, annotator, margin.
        kind: of the dataset.
        exact: whether duplicates are dropped.
        contradictions: drop_both; majority: the direction with more copies before deduplication stays; higher_margin:
            the larger margin stays; in both a draw drops both; keep: reversals stay.
        cycles: drop: of what is left, pairs go that close a cycle with surer ones (`on_cycle`).

    Returns:
        kept in the order of `pairs`; dropped with stage, reason, duplicate_of and jaccard.
    """
    ranked = _ranked(_with_keys(pairs, kind))
    first = pl.col("pair_id").first().over(KEYS)
    marked = ranked.with_columns(
        first.alias("duplicate_of"),
        pl.len().over(KEYS).alias("num_copies"),
        pl.int_range(pl.len()).over(KEYS).alias("copy"),
    )
    repeated = pl.int_range(pl.len()).over("pair_id") > 0  # a pair_id names one row, whatever the settings
    is_copy = (pl.col("copy") > 0) if exact else repeated
    copies = _as_dropped(marked.filter(is_copy), "duplicate").with_columns(pl.lit(1.0).alias("jaccard"))
    kept, lost = _judge_reversals(marked.filter(~is_copy), contradictions)
    circular = on_cycle(kept) if cycles == "drop" else pl.repeat(False, kept.height, eager=True)
    kept, round_about = kept.filter(~circular), _as_dropped(kept.filter(circular), "cycle")
    scratch = [*KEYS, "row", "copy", "num_copies"]
    dropped = pl.concat([frame.drop(scratch) for frame in (copies, lost, round_about)], how="diagonal")
    return Screened(kept.sort("row").drop(*scratch, "duplicate_of"), dropped)


def _judge_reversals(pairs: pl.DataFrame, policy: Contradictions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs that stay, and those whose claim is not larger than that of the opposite direction."""
    claim = {
        "majority": pl.col("num_copies").cast(pl.Float64),
        "higher_margin": pl.col("margin").fill_null(0.0),
    }
    keyed = pairs.drop("duplicate_of").with_columns(
        pl.min_horizontal("key_chosen", "key_rejected").alias("low"),
        pl.max_horizontal("key_chosen", "key_rejected").alias("high"),
        (pl.col("key_chosen") < pl.col("key_rejected")).alias("ahead"),
        claim.get(policy, pl.lit(0.0)).alias("claim"),
    )
    direction = ["key_prompt", "low", "high", "ahead"]
    opposite = keyed.group_by(direction).agg(
        pl.col("pair_id").min().alias("duplicate_of"), pl.col("claim").max().alias("rival")
    )
    judged = keyed.join(opposite.with_columns(~pl.col("ahead")), on=direction, how="left")
    loses = (pl.col("claim") <= pl.col("rival")).fill_null(False) if policy != "keep" else pl.lit(False)
    scratch = ["low", "high", "ahead", "claim", "rival"]
    lost = judged.filter(loses).drop(scratch)
    return judged.filter(~loses).drop(scratch), _as_dropped(lost, "contradiction")


def on_cycle(pairs: pl.DataFrame) -> pl.Series:
    """Which pairs must go so that no cycle of three or more responses to one folded prompt is left.

    The surest come first: the highest agreement, then the largest margin. A pair goes if it closes a cycle with surer
    ones that stay, or with others that are just as sure; so of A over B over C over A without votes and scores all
    three go, and the result does not depend on the order of the rows. A reversal is no cycle and neither of its pairs
    counts here: where contradictions are kept, a cycle that goes through one of them stays, as both ways are wanted.
    """
    gone = np.zeros(pairs.height, dtype=bool)
    edges = _between(pairs.select(*KEYS, "agreement", "margin").with_row_index("at"))
    if edges.height:
        sure = pl.struct(pl.col("agreement").fill_null(1.0), pl.col("margin").fill_null(0.0))
        level = edges.select(sure.rank("dense", descending=True)).to_series().to_numpy()
        nodes = pl.concat([edges.select("key_prompt", text=f"key_{side}") for side in ("chosen", "rejected")])
        ids = nodes.select(pl.struct("key_prompt", "text").rank("dense") - 1).to_series().to_numpy().astype(np.int64)
        closing = _closing(ids[: edges.height], ids[edges.height :], level)
        gone[edges["at"].to_numpy()[closing]] = True
    return pl.Series(gone)


def _between(keys: pl.DataFrame) -> pl.DataFrame:
    """The pairs that may be on a cycle: chosen is rejected somewhere, rejected is chosen somewhere, no reversals."""
    back = keys.select("key_prompt", key_chosen="key_rejected", key_rejected="key_chosen")
    edges = keys
    for side in ("chosen", "rejected"):
        edges = edges.join(back, on=["key_prompt", f"key_{side}"], how="semi", maintain_order="left")
    return edges.join(back, on=[*KEYS], how="anti", maintain_order="left")


def _closing(start: np.ndarray, end: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Indices of the edges that close a cycle when levels are added one after the other, 1 first.

    Edges that are on no cycle of all that are left never close one. The others are halved by level, in all components
    at once, until those of a component are of one level: then they close. So the number of passes over the edges is
    that of the levels within a component at most, and not that of all levels.
    """
    gone = np.zeros(len(start), dtype=bool)

    def settle(sure: np.ndarray, new: np.ndarray) -> None:
        """Mark which of `new` go, in the presence of `sure`, which stay and come before them."""
        both = np.concatenate([sure, new])
        component = _components(start[both], end[both])
        at_risk, in_component = new[component[len(sure) :] >= 0], component[len(sure) :]
        if not len(at_risk):
            return
        sure = sure[component[: len(sure)] >= 0]
        ranked = pl.DataFrame({"component": in_component[in_component >= 0], "level": level[at_risk]}).select(
            rank=pl.col("level").rank("dense").over("component"),
            last=pl.col("level").n_unique().over("component"),
        )
        rank, last = ranked["rank"].to_numpy(), ranked["last"].to_numpy()
        gone[at_risk[last == 1]] = True
        first, second = (at_risk[(last > 1) & half] for half in (2 * rank <= last, 2 * rank > last))
        if len(first):
            settle(sure, first)
            settle(np.concatenate([sure, first[~gone[first]]]), second)

    settle(np.empty(0, dtype=np.int64), np.arange(len(start)))
    return np.flatnonzero(gone)


def _components(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The strongly connected component that each edge lies inside, -1 for none: exactly then it is on no cycle."""
    nodes, ends = np.unique(np.concatenate([start, end]), return_inverse=True)
    start, end = ends[: len(start)], ends[len(start) :]
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(len(nodes), len(nodes)))
    component = connected_components(graph.tocsr(), connection="strong")[1]
    return np.where(component[start] == component[end], component[start], -1)
