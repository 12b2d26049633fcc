"""Preferences that go round in a circle: A over B, B over C and C over A, or longer ones, within a prompt.

A middle response that is chosen in one pair and rejected in another is legitimate and stays.
"""

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def on_cycle(pairs: pl.DataFrame) -> pl.Series:
    """Which pairs must go so that no cycle of three or more responses to one prompt is left.

    Comes in: chosen and rejected, each the key of a response and of what it responds to; agreement and margin.

    The surest come first: the highest agreement, then the largest margin. A pair goes if it closes a cycle with surer
    ones that stay, or with others that are just as sure; so of A over B over C over A without votes and scores all
    three go, and the result does not depend on the order of the rows. A reversal is no cycle and neither of its pairs
    counts here: where contradictions are kept, a cycle that goes through one of them stays, as both ways are wanted.
    """
    gone = np.zeros(pairs.height, dtype=bool)
    edges = _between(pairs.select("chosen", "rejected", "agreement", "margin").with_row_index("at"))
    if edges.height:
        sure = pl.struct(pl.col("agreement").fill_null(1.0), pl.col("margin").fill_null(0.0))
        level = edges.select(sure.rank("dense", descending=True)).to_series().to_numpy()
        nodes = pl.concat([edges["chosen"], edges["rejected"]])
        ids = nodes.rank("dense").to_numpy().astype(np.int64)
        closing = _closing(ids[: edges.height], ids[edges.height :], level)
        gone[edges["at"].to_numpy()[closing]] = True
    return pl.Series(gone)


def _between(keys: pl.DataFrame) -> pl.DataFrame:
    """The pairs that may be on a cycle: chosen is rejected somewhere, rejected is chosen somewhere, no reversals."""
    back = keys.select(chosen="rejected", rejected="chosen")
    edges = keys
    for side in ("chosen", "rejected"):
        edges = edges.join(back.select(side).unique(), on=side, how="semi", maintain_order="left")
    return edges.join(back, on=["chosen", "rejected"], how="anti", maintain_order="left")


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
