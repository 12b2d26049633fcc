"""`prefkit audit`: run the audit over a dataset, keep it in audit/, and say it on the terminal."""

from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.audit.tokens import token_table
from prefkit.audit.verdict import LEVELS, example_pairs, judge
from prefkit.config import Pipeline
from prefkit.errors import AuditError
from prefkit.format import AUDIT_JSON, AUDIT_TOKENS
from prefkit.locks import locked
from prefkit.store import read_manifest, read_table, write_json, write_parquet, write_views
from prefkit.text import printable

COLOURS = {"pass": "green", "note": "cyan", "not enough data": "yellow", "warn": "yellow", "fail": "red"}
SHOWN_FINDINGS, SHOWN_TOKENS = 10, 8


class Audited(NamedTuple):
    """What `audit_dataset` returns; `allowed` are the findings that audit.allow set aside, `top` the surest tokens."""

    verdict: str
    reason: str
    findings: list[dict[str, Any]]
    allowed: list[str]
    pairs: int
    tokens: int
    top: pl.DataFrame


def audit_dataset(pipeline: Pipeline) -> Audited:
    """Count every word on both sides of every pair, test it, judge it, and write audit/tokens.parquet and audit.json.

    Raises:
        DatasetError: the dataset is unfinished or damaged.
    """
    dataset, limits = Path(pipeline.dataset), pipeline.audit.limits
    manifest = read_manifest(dataset)
    pairs = read_table(dataset, "pairs", manifest)
    kind = manifest["kind"]
    table = token_table(pairs, kind, pipeline.audit.allow)
    verdict = judge(table, pairs.height, limits.q, limits.min_coverage, limits.win_rate)
    findings = [
        {**f, "pair_ids": example_pairs(pairs, kind, f)} if i < SHOWN_FINDINGS else f
        for i, f in enumerate(verdict.findings)
    ]
    allowed = table.filter(pl.col("allowed") & (pl.col("q") <= limits.q))["token"].to_list()
    with locked(dataset):
        write_parquet(dataset / AUDIT_TOKENS, table)
        write_json(
            dataset / AUDIT_JSON,
            {
                "verdict": verdict.level,
                "reason": verdict.reason,
                "pairs": pairs.height,
                "tokens": table.height,
                "findings": findings,
                "allowed": allowed,
                "limits": limits.model_dump(mode="json"),
            },
        )
        write_views(dataset, kind)
    return Audited(
        verdict.level, verdict.reason, findings, allowed, pairs.height, table.height, table.head(SHOWN_TOKENS)
    )


def enforce(audited: Audited, limit: str) -> None:
    """`--strict`: fail where the verdict is at the limit or worse.

    Raises:
        AuditError: it is.
    """
    if LEVELS.index(audited.verdict) >= LEVELS.index(limit):
        raise AuditError(
            f"the verdict is {audited.verdict}: {audited.reason}",
            expected=f"better than {limit} (audit.limits.strict)",
            hint="prefkit audit TARGET lists the findings",
        )


def print_audit(audited: Audited, console: Console) -> None:
    """The verdict first, then each finding with what to do, then the surest tokens. Data text is never markup."""
    console.print(
        Text.assemble("verdict: ", (audited.verdict, f"bold {COLOURS[audited.verdict]}"), f"  {audited.reason}")
    )
    for finding in audited.findings[:SHOWN_FINDINGS]:
        console.print(Text.assemble("  ", (finding["level"], COLOURS[finding["level"]]), f"  {finding['reason']}"))
    if len(audited.findings) > SHOWN_FINDINGS:
        console.print(f"  and {len(audited.findings) - SHOWN_FINDINGS} more: all in audit/audit.json")
    if audited.findings:
        console.print(f"  what to do: {audited.findings[0]['advice']}", markup=False)
    if audited.allowed:
        console.print("  allowed by the pipeline: " + printable(", ".join(audited.allowed)), markup=False)
    table = Table(
        "token",
        "chosen only",
        "rejected only",
        "both",
        "win rate",
        "q",
        title=f"surest of {audited.tokens} words",
        title_justify="left",
    )
    for row in audited.top.iter_rows(named=True):
        shares = (
            f"{row['win_rate']:.2f}" if row["win_rate"] is not None else "",
            f"{row['q']:.1e}" if row["q"] is not None else "",
        )
        counts = (str(row[name]) for name in ("num_chosen_only", "num_rejected_only", "num_both"))
        table.add_row(Text(printable(row["token"])), *counts, *shares)
    console.print(table)
