"""From what was counted to what is said: the tables of audit/, the findings, the verdict, and audit.json.

Comes in: `Counted`. Goes out: `Audited`, nothing on disk. The rules of a finding are audit/verdict.py's; here they are
brought together, over all families.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from prefkit.audit.allow import allows
from prefkit.audit.alphabets import Alphabet, candidates, probe_words, surest_first
from prefkit.audit.cover import greedy_cover
from prefkit.audit.evidence import Evidence
from prefkit.audit.features import FEATURES
from prefkit.audit.findings import (
    by_source,
    counted_once,
    few_replies,
    grouped,
    strict_structure,
    structure_findings,
    together,
    token_findings,
    with_effects,
    with_log_odds,
)
from prefkit.audit.postings import Postings
from prefkit.audit.probe import Bands, Probes, run_probes, word_matrix
from prefkit.audit.structure import QUANTILES, beside_length, structure_table
from prefkit.audit.values import CATEGORICAL
from prefkit.audit.verdict import (
    SHOWN_PAIRS,
    Finding,
    Level,
    Limits,
    Power,
    feature_name,
    find_exclusive,
    find_probes,
    find_structure,
    find_tokens,
    judge,
    power_of,
)
from prefkit.boundaries import Tokenised, find_boundaries
from prefkit.documents import ProbeEntry
from prefkit.format import AUDIT_PROBE, AUDIT_SCORES, AUDIT_STRUCTURE, AUDIT_TOKENS, schema
from prefkit.settings import AuditConfig

Tell = Callable[[str], None]


class Audited(NamedTuple):
    """What `audit_dataset` returns."""

    verdict: Level
    reason: str  # of the verdict, in a sentence
    findings: list[Finding]  # worst first
    allowed: list[str]  # what would be findings but for audit.allow and audit.allow_features
    pairs: int
    power: Power  # what the data could have shown
    tables: dict[str, pl.DataFrame]  # those of audit/, by name
    document: dict[str, Any]  # what audit.json holds


class Counted(NamedTuple):
    """All that was read off the pairs, before anything is judged."""

    evidence: Evidence
    similarity: dict[str, Any]
    words: Alphabet
    model: Alphabet | None
    tokenised: Tokenised | None


class Judged(NamedTuple):
    """What was found, before it is written down: tables as they are kept, and the words of the probes."""

    tables: dict[str, pl.DataFrame]
    findings: list[Finding]
    cover: list[dict[str, Any]]


def judge_evidence(counted: Counted, settings: AuditConfig, dataset: str, *, strict: bool, tell: Tell) -> Audited:
    """Tables, findings and verdict from what was counted; `dataset` is how advice names it."""
    evidence = counted.evidence
    limits = Limits(**settings.limits.model_dump(exclude={"strict"}))
    alphabets = [alphabet for alphabet in (counted.words, counted.model) if alphabet is not None]
    judged = _judged(counted, alphabets, settings, limits, dataset, strict=strict, tell=tell)
    tested = sum(alphabet.table["q"].drop_nulls().len() for alphabet in alphabets)
    num_prompts = len(np.unique(evidence.clusters))
    power = power_of(num_prompts, tested, limits, settings.min_discordant)
    verdict = judge(judged.findings, power, num_prompts, limits)
    structure, probes = judged.tables[AUDIT_STRUCTURE], judged.tables[AUDIT_PROBE]
    allowed = _allowed(alphabets, structure, limits)
    document = {
        "verdict": verdict.level,
        "reason": verdict.reason,
        "strict": strict,
        "pairs": evidence.pairs.height,
        "prompts": num_prompts,
        "tokens": {alphabet.name: alphabet.table.height for alphabet in alphabets},
        "findings": [finding._asdict() for finding in verdict.findings],
        "allowed": allowed,
        "allow_unused": _unused(settings.allow, alphabets, structure),
        "power": power._asdict(),
        "probes": probes.filter(pl.col("source").is_null()).select(*ProbeEntry.model_fields).to_dicts(),
        "cover": judged.cover,
        "features": {name: _doc(name) for name in structure["feature"].unique(maintain_order=True)},
        "lengths": _lengths(evidence),
        "similarity": counted.similarity,
        "boundaries": counted.tokenised and counted.tokenised.counts,
        "sources": by_source(evidence.pairs["source"], np.arange(evidence.pairs.height)),
        "limits": settings.limits.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude={"limits"}),
    }
    pairs, findings = evidence.pairs.height, verdict.findings
    return Audited(verdict.level, verdict.reason, findings, allowed, pairs, power, judged.tables, document)


def _judged(
    counted: Counted,
    alphabets: Sequence[Alphabet],
    settings: AuditConfig,
    limits: Limits,
    dataset: str,
    *,
    strict: bool,
    tell: Tell,
) -> Judged:
    """Every family of findings, and the tables that they come from."""
    evidence, num_pairs = counted.evidence, counted.evidence.pairs.height
    structure = _structure(evidence, settings)
    tell("fitting the probes")
    words, places = probe_words(counted.words)
    probes = _probes(evidence, word_matrix(*places, words.height, num_pairs), settings)
    tell("looking at the pairs of what was found")
    found = together([candidates(alphabet, evidence, limits) for alphabet in alphabets])
    found = counted_once(found, [alphabet.table for alphabet in alphabets], limits.q)
    groups = grouped(found)
    found = with_effects(found, groups, evidence.length.basis)
    of_tokens = token_findings(found, groups, evidence, dataset, limits.q if strict else None)
    of_structure = structure_findings(find_structure(structure, limits), evidence, _doc, dataset, of_tokens)
    findings = [
        *of_tokens,
        *(strict_structure(of_structure, structure, limits.q) if strict else of_structure),
        *([] if "distinct_replies" in settings.allow_features else few_replies(evidence)),
        *_with_hardest(find_probes(probes.table, dataset), evidence, probes),
        *(find_boundaries(counted.tokenised, num_pairs, limits) if counted.tokenised else []),
    ]
    tokens = surest_first(pl.concat([with_log_odds(alphabet.table, found.table) for alphabet in alphabets]))
    tables = {
        AUDIT_TOKENS: tokens.select(schema("tokens", "text").names()),
        AUDIT_STRUCTURE: structure,
        AUDIT_PROBE: probes.table,
        AUDIT_SCORES: _scores(evidence, probes),
    }
    return Judged(tables, findings, _cover(words, places, evidence, settings.seed))


def _structure(evidence: Evidence, settings: AuditConfig) -> pl.DataFrame:
    return structure_table(
        *evidence.features,
        evidence.values,
        clusters=evidence.clusters,
        z_of=beside_length(evidence.length),
        allow=settings.allow,
        allow_features=settings.allow_features,
    )


def _probes(evidence: Evidence, words: sparse.csr_array, settings: AuditConfig) -> Probes:
    """Fitted on what is no allowed word and no allowed feature."""
    limits, (won, lost) = settings.limits, (side["generator"].to_list() for side in evidence.values)
    difference = evidence.difference(settings.allow_features)
    length = evidence.length.basis[:, 0]
    return run_probes(
        np.zeros_like(length) if "words" in settings.allow_features else length,
        difference,
        words,
        evidence.clusters,
        generators=(won, lost) if any(won) and any(lost) and "generator" not in settings.allow_features else None,
        sources=evidence.pairs["source"].to_list(),
        bands=Bands(limits.probe_note, limits.probe_warn, limits.probe_fail),
        seed=settings.seed,
        max_fit=settings.probe_pairs,
    )


def _with_hardest(findings: list[Finding], evidence: Evidence, probes: Probes) -> list[Finding]:
    """The findings of probes, with the pairs that each is surest of as examples."""
    ids, found = evidence.pairs["pair_id"], []
    for finding in findings:
        surest = np.argsort(-np.nan_to_num(probes.margins[finding.name], nan=-np.inf), kind="stable")[:SHOWN_PAIRS]
        found.append(finding._replace(pair_ids=tuple(ids.gather(surest))))
    return found


def _doc(feature: str) -> str:
    named = {of.feature: of.doc for of in CATEGORICAL.values()}
    return FEATURES[feature].doc if feature in FEATURES else named[feature]


def _allowed(alphabets: Sequence[Alphabet], structure: pl.DataFrame, limits: Limits) -> list[str]:
    """What would be findings, were it not for audit.allow and audit.allow_features."""

    def told(table: pl.DataFrame) -> pl.DataFrame:
        return table.filter("allowed").with_columns(pl.lit(False).alias("allowed"))

    rows = [told(one.table) for one in alphabets]
    tokens = [name for row in rows for find in (find_tokens, find_exclusive) for name in find(row, limits)["token"]]
    rows_of = find_structure(told(structure), limits).select("feature", "value").iter_rows()
    return list(dict.fromkeys([*tokens, *(feature_name(*row) for row in rows_of)]))


def _unused(allow: Sequence[str], alphabets: Sequence[Alphabet], structure: pl.DataFrame) -> list[str]:
    """Entries of audit.allow that allow no token of the tables and no value."""
    named = [*(name for one in alphabets for name in one.table["token"]), *structure["value"].drop_nulls()]
    return [entry for entry in allow if not any(map(allows([entry]), named))]


def _cover(words: pl.DataFrame, places: Postings, evidence: Evidence, seed: int) -> list[dict[str, Any]]:
    steps = greedy_cover(*places, words.height, evidence.clusters, seed=seed)
    tokens = words["token"].to_list()
    return [
        {"token": tokens[gram], "side": side, "covered": covered, "precision": precision}
        for gram, side, covered, precision in steps
    ]


def _lengths(evidence: Evidence) -> dict[str, dict[str, float | None]]:
    """Words a side, by quantile."""
    return {
        name: {q: side["words"].quantile(share, "nearest") for q, share in QUANTILES.items()}
        for name, side in evidence.features._asdict().items()
    }


def _scores(evidence: Evidence, probes: Probes) -> pl.DataFrame:
    """format.PAIR_SCORES."""
    margins = {f"{name}_margin": probes.margins[name] for name in ("length", "structure", "words")}
    columns = {
        "pair_id": evidence.pairs["pair_id"],
        **{f"num_{name}_words": side["words"].cast(pl.Int64) for name, side in evidence.features._asdict().items()},
        **margins,
        "shortcut_score": probes.margins["both"],
    }
    return pl.DataFrame(columns, schema=schema("pair_scores", "text")).with_columns(pl.col(pl.Float64).fill_nan(None))
