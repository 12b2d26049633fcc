"""The tokens that are findings, looked at in their pairs: confirmed by prompt, grouped, with examples and sources.

Comes in: candidate rows of a token table and where each is (counting.Postings). Goes out: `Finding`s. Only here is a
token held against the pairs one by one, so only candidates are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from prefkit.audit.allow import words_in
from prefkit.audit.evidence import Evidence
from prefkit.audit.significance import cluster_sign_test, firth_log_odds, sign_test
from prefkit.audit.values import CATEGORICAL
from prefkit.audit.verdict import SHOWN_PAIRS, Finding, structure_finding, token_finding, worst_first

Ints = npt.NDArray[np.int64]
SAME_PAIRS = 0.9  # of a token's pairs are another's too: it is named with that one
NOTHING_LEFT = 0.05  # p of length in the other pairs, above which it tells nothing there
FEW_REPLIES = 20  # sides a distinct text, from which on replies are labels
MAX_FINDINGS = 200  # tokens that get a finding of their own; the table has all
NOT_CONFIRMED = "not confirmed by --strict (Benjamini-Yekutieli, and sign flips by prompt)"


class Found(NamedTuple):
    """Candidate tokens, worst first; `matrix` (candidates, pairs): +1 in chosen only, -1 in rejected only."""

    table: pl.DataFrame
    matrix: sparse.csr_array

    def pairs_of(self, row: int) -> tuple[Ints, npt.NDArray[np.int8]]:
        """The positions of the pairs that one separates, ascending, and which side of each has it."""
        start, end = self.matrix.indptr[row : row + 2]
        return self.matrix.indices[start:end].astype(np.int64), self.matrix.data[start:end]

    def keep(self, rows: Ints) -> "Found":
        """Some of them, in order."""
        return Found(self.table[rows], self.matrix[rows])


def placed(table: pl.DataFrame, gram: Ints, pair: Ints, sign: npt.NDArray[np.int8], num_pairs: int) -> Found:
    """Candidates with their places; `gram` numbers the rows of the table."""
    matrix = sparse.csr_array((sign, (gram, pair)), shape=(table.height, num_pairs), dtype=np.int8)
    matrix.sort_indices()
    return Found(table, matrix)


def confirmed(found: Found, clusters: Ints, largest_p: float) -> Found:
    """Those that also hold when a prompt counts once, however many pairs it has; adds `p_prompts`.

    Several pairs of one prompt share responses and are not independent. Where every prompt has one pair it is the test
    that was made, and nothing changes.

    Args:
        found: the candidates.
        clusters: the prompt of each pair.
        largest_p: the largest p that the correction for many tests accepted.
    """
    if len(np.unique(clusters)) == len(clusters):
        return found
    coo = found.matrix.tocoo()
    p = cluster_sign_test(coo.row.astype(np.int64), coo.col.astype(np.int64), coo.data, found.table.height, clusters)
    table = found.table.with_columns(pl.Series("p_prompts", p, pl.Float64))
    return Found(table, found.matrix).keep(np.flatnonzero(p <= largest_p))


def echoed_by_length(found: Found, difference: npt.NDArray[np.float64]) -> Found:
    """Those without which length would say nothing: in the pairs that they do not separate it does not tell chosen.

    Args:
        found: the candidates.
        difference: (N,) of length, chosen - rejected.
    """
    longer, shorter = difference > 0, difference < 0
    kept = []
    for row in range(found.table.height):
        pairs, _ = found.pairs_of(row)
        b, c = (int(side.sum() - side[pairs].sum()) for side in (longer, shorter))
        if b + c == 0 or sign_test(b, b + c) > NOTHING_LEFT:
            kept.append(row)
    return found.keep(np.array(kept, dtype=np.int64))


def together(found: Sequence[Found]) -> Found:
    """The candidates of several alphabets, worst first; words before the model's tokens where they are alike."""
    table = pl.concat([one.table for one in found], how="diagonal")
    order = worst_first(table.with_row_index("row"), "token")["row"].to_numpy()
    matrix = sparse.csr_array(sparse.vstack([one.matrix for one in found], format="csr", dtype=np.int8))
    return Found(table, matrix).keep(order)


def with_effects(found: Found, basis: npt.NDArray[np.float64]) -> Found:
    """Fill in `log_odds_length` of the first MAX_FINDINGS: Firth's log-odds of each beside length."""
    effects: list[float | None] = [None] * found.table.height
    for row in range(min(MAX_FINDINGS, found.table.height)):
        signs = np.zeros(found.matrix.shape[1], dtype=np.int8)
        pairs, sides = found.pairs_of(row)
        signs[pairs] = sides
        effects[row] = firth_log_odds(signs, basis)
    return found._replace(
        table=found.table.with_columns(pl.Series("log_odds_length", effects, pl.Float64).fill_nan(None))
    )


def with_log_odds(table: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """A token table with the `log_odds_length` that its findings have."""
    if found.is_empty():
        return table
    effects = found.select("alphabet", "hash", "n", "log_odds_length")
    without = table.drop("log_odds_length")
    joined = without.join(effects, on=["alphabet", "hash", "n"], how="left", maintain_order="left")
    return joined.select(table.columns)


def grouped(found: Found) -> list[tuple[int, list[int]]]:
    """Rows that stand for themselves, each with those that hold it or are in the same pairs."""
    heads: list[tuple[int, list[int]]] = []
    words = [_spaced(token) for token in found.table["token"]]
    sides = found.table["side"].to_list()
    ones = abs(found.matrix).astype(np.int64)
    same = np.asarray((ones @ ones.T).toarray(), dtype=np.float64) / np.maximum(1, ones.sum(axis=1))[:, None]
    for row in range(found.table.height):
        for head, also in heads:
            inside = words[head].strip() and words[head] in words[row]
            if sides[head] == sides[row] and (inside or same[row, head] >= SAME_PAIRS):
                also.append(row)
                break
        else:
            heads.append((row, []))
    return heads


def token_findings(found: Found, evidence: Evidence, dataset: str, strict_q: float | None = None) -> list[Finding]:
    """A finding for each group; under --strict one that its tests do not confirm is a note."""
    tokens, ids, sources = found.table["token"].to_list(), evidence.pairs["pair_id"], evidence.pairs["source"]
    findings = []
    for head, also in grouped(found)[:MAX_FINDINGS]:
        row = found.table.row(head, named=True)
        pairs, _ = found.pairs_of(head)
        finding = token_finding(row, dataset, [tokens[other] for other in also])
        finding = finding._replace(pair_ids=tuple(ids.gather(pairs[:SHOWN_PAIRS])), sources=by_source(sources, pairs))
        if strict_q is not None and not _holds(row, strict_q):
            finding = finding._replace(level="note", reason=f"{finding.reason}; {NOT_CONFIRMED}")
        findings.append(finding)
    return findings


def _holds(row: Mapping[str, Any], q: float) -> bool:
    return bool(row["q_by"] <= q and (row["p_permutation"] is None or row["p_permutation"] <= q))


def by_source(sources: pl.Series, pairs: Ints) -> dict[str, int]:
    """How many of some pairs each source has, most first."""
    counted = sources.gather(pairs).value_counts().sort(["count", sources.name], descending=[True, False])
    return dict(counted.iter_rows())


def structure_findings(
    rows: pl.DataFrame, evidence: Evidence, doc_of: Callable[[str], str], dataset: str, tokens: Sequence[Finding]
) -> list[Finding]:
    """A finding for each group of rows, with examples.

    Openers and endings that a token finding names already are left to it; one that holds another (`sure ,` and `sure`)
    goes with it, and so does what only measures length in another unit.
    """
    named = [(_spaced(finding.name), finding.side) for finding in tokens]
    heads: list[tuple[dict[str, Any], list[str]]] = []
    for row in rows.iter_rows(named=True):
        value = row["value"] and _spaced(row["value"])
        if value and any(side == row["side"] and name.strip() and name in value for name, side in named):
            continue
        for head, also in heads:
            if head["side"] == row["side"] and _goes_with(row, head):
                also.append(row["feature"] if row["value"] is None else row["value"])
                break
        else:
            heads.append((row, []))
    return [
        _with_pairs(structure_finding(row, dataset, doc_of(row["feature"])), row, also, evidence) for row, also in heads
    ]


def few_replies(evidence: Evidence) -> list[Finding]:
    """A note where the sides are but a handful of texts: labels rather than answers."""
    sides, distinct = 2 * evidence.pairs.height, evidence.num_replies
    if not distinct or sides < FEW_REPLIES * distinct:
        return []
    words = float(np.median(pl.concat([side["words"] for side in evidence.features]).to_numpy()))
    reason = f"the {sides} sides are {distinct} distinct texts, of {words:g} words by the median: the pairs teach which"
    advice = "make pairs of whole answers, or audit.allow_features: [distinct_replies] if a label is the point"
    return [
        Finding("note", "structure", "distinct_replies", None, f"{reason} to give, not how to answer", advice)._replace(
            pair_ids=tuple(evidence.pairs["pair_id"].head(SHOWN_PAIRS))
        )
    ]


def _spaced(token: str) -> str:
    return f" {' '.join(words_in(token))} "


def _goes_with(row: Mapping[str, Any], head: Mapping[str, Any]) -> bool:
    if row["value"] is None or head["value"] is None:
        return bool(row["family"] == "length" and head["feature"] == "words")
    words = _spaced(head["value"])
    return bool(row["feature"] == head["feature"] and words.strip() and words in _spaced(row["value"]))


def _with_pairs(finding: Finding, row: Mapping[str, Any], also: Sequence[str], evidence: Evidence) -> Finding:
    pairs = _separated(row, evidence)
    ids = tuple(evidence.pairs["pair_id"].gather(pairs[:SHOWN_PAIRS]))
    return finding._replace(also=tuple(also), pair_ids=ids, sources=by_source(evidence.pairs["source"], pairs))


def _separated(row: Mapping[str, Any], evidence: Evidence) -> Ints:
    """The pairs in which the sides differ in a feature, or in whether they have a value."""
    if row["value"] is None:
        chosen, rejected = (side[row["feature"]] for side in evidence.features)
        return np.flatnonzero((chosen != rejected).fill_null(False).to_numpy())
    apart = np.zeros(evidence.pairs.height, dtype=bool)
    for name in evidence.values.chosen.columns:
        if CATEGORICAL[name].feature == row["feature"]:
            has = [(side[name] == row["value"]).fill_null(False).to_numpy() for side in evidence.values]
            apart |= has[0] != has[1]
    return np.flatnonzero(apart)
