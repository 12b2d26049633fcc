"""The tokens that are findings, looked at in their pairs: held beside length by prompt, grouped, with examples.

Comes in: candidate rows of a token table and where each is (counting.Postings). Goes out: `Finding`s. Only here is a
token held against the pairs one by one, so only candidates are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from prefkit.audit.evidence import Evidence
from prefkit.audit.significance import benjamini_hochberg, benjamini_yekutieli, firth_log_odds, sign_test, z_by_prompt
from prefkit.audit.values import CATEGORICAL
from prefkit.audit.verdict import SHOWN_PAIRS, Finding, structure_finding, token_finding, worst_first
from prefkit.grams import words_in

Ints = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]
Group: TypeAlias = tuple[int, list[int]]  # a row that stands for itself, and those that go with it
SAME_PAIRS = 0.8  # two tokens are named together that share so many of the pairs that either is in
NOTHING_LEFT = 0.05  # p in the other pairs, above which they tell nothing
FEWEST_LEFT = 6  # pairs, below which no p is under it: 2 * 2^-6 < .05 < 2 * 2^-5
FEW_REPLIES = 20  # sides a distinct text, from which on replies are labels
MAX_FINDINGS = 200  # tokens that get a finding of their own; the table has all
NOT_CONFIRMED = "not confirmed by --strict (Benjamini-Yekutieli; of tokens also sign flips by prompt)"


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
        if _tells_nothing(b, c):
            kept.append(row)
    return found.keep(np.array(kept, dtype=np.int64))


def _tells_nothing(b: int, c: int) -> bool:
    """Whether so many pairs on either side are as good as even; too few to test must not all point one way."""
    return min(b, c) > 0 or b + c == 0 if b + c < FEWEST_LEFT else bool(sign_test(b, b + c) > NOTHING_LEFT)


def together(found: Sequence[Found]) -> Found:
    """The candidates of several alphabets, worst first; words before the model's tokens where they are alike."""
    table = pl.concat([one.table for one in found], how="diagonal")
    order = worst_first(table.with_row_index("row"), "token")["row"].to_numpy()
    matrix = sparse.csr_array(sparse.vstack([one.matrix for one in found], format="csr", dtype=np.int8))
    return Found(table, matrix).keep(order)


def with_effects(found: Found, groups: Sequence[Group], basis: npt.NDArray[np.float64]) -> Found:
    """Fill in `log_odds_length` of those that are findings by name: Firth's log-odds of each beside length."""
    effects: list[float | None] = [None] * found.table.height
    for row, _ in groups[:MAX_FINDINGS]:
        effects[row] = firth_log_odds(_row_signs(found, row), basis)
    return found._replace(
        table=found.table.with_columns(pl.Series("log_odds_length", effects, pl.Float64).fill_nan(None))
    )


def _row_signs(found: Found, row: int) -> Signs:
    signs = np.zeros(found.matrix.shape[1], dtype=np.int8)
    pairs, sides = found.pairs_of(row)
    signs[pairs] = sides
    return signs


def beside_length_by_prompt(found: Found, evidence: Evidence, least: float) -> Found:
    """Those whose z beside length also reaches `least` when pairs of a prompt are not taken for independent."""
    clusters = evidence.clusters
    if len(np.unique(clusters)) == len(clusters):
        return found
    z = [z_by_prompt(_row_signs(found, row), evidence.length, clusters) for row in range(found.table.height)]
    sides = np.where((found.table["side"] == "chosen").to_numpy(), 1.0, -1.0)
    return found.keep(np.flatnonzero(np.array(z) * sides >= least))


def with_log_odds(table: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """A token table with the `log_odds_length` that its findings have."""
    if found.is_empty():
        return table
    effects = found.select("alphabet", "hash", "n", "log_odds_length")
    without = table.drop("log_odds_length")
    joined = without.join(effects, on=["alphabet", "hash", "n"], how="left", maintain_order="left")
    return joined.select(table.columns)


def grouped(found: Found) -> list[Group]:
    """Rows that stand for themselves, each with those in the same pairs, and with n-grams that hold one of these."""
    heads: list[Group] = []
    words = [_spaced(token) for token in found.table["token"]]
    sides = found.table["side"].to_list()
    same = _same_pairs(found)
    for row in range(found.table.height):
        for head, also in heads:
            members = [words[member] for member in (head, *also) if words[member].strip()]
            inside = any(member in words[row] for member in members)
            if sides[head] == sides[row] and (inside or (row, head) in same):
                also.append(row)
                break
        else:
            heads.append((row, []))
    return heads


def _same_pairs(found: Found) -> set[tuple[int, int]]:
    """Rows that share at least SAME_PAIRS of the pairs that either is in."""
    ones = abs(found.matrix).astype(np.float32)
    size, shared = ones.sum(axis=1), (ones @ ones.T).tocoo()
    either = size[shared.row] + size[shared.col] - shared.data
    near = shared.data >= SAME_PAIRS * either
    return set(zip(shared.row[near].tolist(), shared.col[near].tolist(), strict=True))


def counted_once(found: Found, tables: Sequence[pl.DataFrame], q: float) -> Found:
    """Without notes that are discoveries only because one shortcut has been discovered many times.

    The n-grams of an opener are hundreds of true discoveries, and each lets Benjamini-Hochberg accept a larger p. Here
    the groups of warned tokens, and what holds one of them, are not counted as discoveries, but as tests they are.
    """
    groups = [[head, *also] for head, also in grouped(found) if found.table["level"][head] != "note"]
    known = sorted(row for rows in groups for row in rows)
    warned = [name for name in (_spaced(found.table["token"][row]) for row in known) if name.strip()]
    kept = [np.array(known, dtype=np.int64)]
    for table in tables:
        tested = table.filter(pl.col("q").is_not_null())
        if tested.is_empty():
            continue
        others = tested.join(found.table[known], on=["hash", "n", "alphabet"], how="anti")
        spaced = pl.Series([_spaced(token) for token in others["token"]], dtype=pl.String)
        alone = others.filter(~spaced.str.contains_any(warned)) if warned else others
        p = alone["p"].to_numpy()
        accepted = p[benjamini_hochberg(p) * (tested.height / max(1, len(p))) <= q]
        here = found.table["alphabet"] == tested["alphabet"][0]
        kept.append(np.flatnonzero((here & (found.table["p"] <= accepted.max(initial=-1.0))).to_numpy()))
    return found.keep(np.unique(np.concatenate(kept)))


def token_findings(
    found: Found, groups: Sequence[Group], evidence: Evidence, dataset: str, strict_q: float | None = None
) -> list[Finding]:
    """A finding for each group; under --strict one that its tests do not confirm is a note."""
    tokens, ids, sources = found.table["token"].to_list(), evidence.pairs["pair_id"], evidence.pairs["source"]
    findings = []
    for head, also in groups[:MAX_FINDINGS]:
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
    goes with it, and so do what only measures length in another unit, and values that an opener has only displaced.
    """
    named = [(_spaced(name), finding.side) for finding in tokens for name in (finding.name, *finding.also)]
    heads: list[tuple[dict[str, Any], list[str]]] = []
    told: dict[str, list[Signs]] = {}  # by feature, the signs of the values that are told already
    length = pl.col("feature") == "words"  # first, so that other units of length go with it
    for row in pl.concat([rows.filter(length), rows.filter(~length)]).iter_rows(named=True):
        value, signs = _spaced(row["value"] or ""), _signs(row, evidence)
        of_words = row["feature"] in ("first_words", "last_words")
        by_token = of_words and any(side == row["side"] and name.strip() and name in value for name, side in named)
        head = next((head for head in heads if head[0]["side"] == row["side"] and _goes_with(row, head[0])), None)
        if head is not None:
            head[1].append(row["feature"] if row["value"] is None else row["value"])
        elif not by_token and not (of_words and _displaced(signs, told.get(row["feature"], []))):
            heads.append((row, []))
        if of_words and (by_token or (heads and heads[-1][0] is row)):
            told.setdefault(row["feature"], []).append(signs)
    return [
        _with_pairs(structure_finding(row, dataset, doc_of(row["feature"])), row, also, evidence) for row, also in heads
    ]


def strict_structure(findings: Sequence[Finding], table: pl.DataFrame, q: float) -> list[Finding]:
    """Under --strict: what Benjamini-Yekutieli over the structure table does not confirm is a note."""
    tested = table.filter(pl.col("q").is_not_null())
    p = tested["p"].to_numpy()
    largest = p[benjamini_yekutieli(p) <= q].max(initial=-1.0)
    return [
        finding
        if finding.p is None or finding.p <= largest
        else finding._replace(level="note", reason=f"{finding.reason}; {NOT_CONFIRMED}")
        for finding in findings
    ]


def _displaced(signs: Signs, told: Sequence[Signs]) -> bool:
    """Whether a value is on one side only because another has taken its place: without those pairs it tells nothing."""
    for other in told:
        left = signs[(other == 0) | (other == signs)]
        b, c = int((left > 0).sum()), int((left < 0).sum())
        if len(left) < len(signs) and _tells_nothing(b, c):
            return True
    return False


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
    pairs = np.flatnonzero(_signs(row, evidence))
    ids = tuple(evidence.pairs["pair_id"].gather(pairs[:SHOWN_PAIRS]))
    return finding._replace(also=tuple(also), pair_ids=ids, sources=by_source(evidence.pairs["source"], pairs))


def _signs(row: Mapping[str, Any], evidence: Evidence) -> Signs:
    """Of each pair, which side has more of a feature, or has a value that the other has not: +1, -1, 0."""
    if row["value"] is None:
        chosen, rejected = (side[row["feature"]].to_numpy() for side in evidence.features)
        return np.asarray(np.sign(np.nan_to_num(chosen - rejected)), dtype=np.int8)
    signs = np.zeros(evidence.pairs.height, dtype=np.int8)
    for name in evidence.values.chosen.columns:
        if CATEGORICAL[name].feature == row["feature"]:
            has = [(side[name] == row["value"]).fill_null(False).to_numpy() for side in evidence.values]
            signs[has[0] & ~has[1]], signs[~has[0] & has[1]] = 1, -1
    return signs
