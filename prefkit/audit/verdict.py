"""From the audit's tables to a verdict: what is a finding, how bad it is, and what to do.

A finding needs significance AND effect AND coverage: at scale everything is significant (Gardner et al., arXiv
2104.08646), and under 1% of biased pairs already biases a reward model (arXiv 2409.11704). A token must also hold
beside the length of the sides. Where nothing is found, the verdict says whether the data could have shown it.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from prefkit.audit.significance import smallest_detectable_win_rate
from prefkit.audit.tokens import MIN_ONE_SIDED
from prefkit.text import printable

Level = Literal["pass", "not enough data", "note", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("pass", "not enough data", "note", "warn", "fail")
FAMILIES = ("tokens", "structure", "probe", "boundaries")
DENSE = 0.5  # a feature in which at least half of the pairs differ is a probe of its own, and has a probe's limits
POWER_COVERAGE = 0.5  # "pass" claims that a token that separates half of the prompts could have been found
MIN_TESTS = 1000  # as many tests as any vocabulary makes; few tested tokens are themselves a lack of data
MOST = 0.5  # of the pairs, what repair drops at most unless --max-dropped says otherwise
SOURCES_DECIDE = ("generator", "language", "script")  # what no repair mends: it is how the pairs were made
SHOWN_PAIRS = 3
WORST_FIRST = pl.col("level").replace_strict({"fail": 0, "warn": 1, "note": 2}, return_dtype=pl.Int8)


class Limits(NamedTuple):
    """Of audit.limits, by the same names: shares and win rates 0..1, z in standard deviations."""

    q: float
    min_coverage: float
    win_rate: float
    warn_win_rate: float
    fail_coverage: float
    z_length: float
    structure_z_length: float
    structure_win_rate: float
    warn_structure_win_rate: float
    probe_note: float
    probe_warn: float
    probe_fail: float


class Finding(NamedTuple):
    """One thing that gives chosen away. What does not apply to its family is None."""

    level: Level
    family: str  # tokens | structure | probe | boundaries
    name: str  # the token, the feature (`first_words: certainly` with a value), the probe
    side: str | None  # chosen | rejected: where there is more of it
    reason: str  # what was found, in a sentence
    advice: str  # what to do, a command where there is one
    alphabet: str | None = None  # of a token: word | model
    n: int | None = None  # of a token: words in it
    num_pairs: int | None = None  # pairs that it separates
    coverage: float | None = None  # their share of all pairs, 0..1
    win_rate: float | None = None  # of chosen among them, 0..1; of a probe, its held-out accuracy
    win_rate_low: float | None = None  # 95% interval of it
    win_rate_high: float | None = None  # likewise
    p: float | None = None  # exact two-sided sign test over prompts
    q: float | None = None  # false discovery rate
    p_permutation: float | None = None  # family-wise, by sign flips; of strict audits
    z_length: float | None = None  # score test beside the length difference
    also: tuple[str, ...] = ()  # tokens that go with it: n-grams that hold it, or tokens of the same pairs
    pair_ids: tuple[str, ...] = ()  # examples
    sources: Mapping[str, int] = {}  # the pairs that it separates, by source


class Verdict(NamedTuple):
    """The overall level, its reason in a sentence, and the findings, worst first."""

    level: Level
    reason: str
    findings: list[Finding]


class Power(NamedTuple):
    """What the data could have shown.

    `win_rate`: the smallest one of a token that separates half of the prompts, found as likely as not;
    `one_sided_coverage`: the share of prompts from which on a token is found that is on one side only.
    """

    win_rate: float
    one_sided_coverage: float
    num_tests: int
    enough: bool


def find_tokens(table: pl.DataFrame, limits: Limits) -> pl.DataFrame:
    """The rows of a token table that are findings, with their `level`, worst first; allowed tokens never are.

    exclusive (in no text of the other side) in at least fail_coverage of the pairs: fail. One-sided, or at least
    warn_win_rate won by one side: warn. Else a note; so is what a false discovery rate lets through and Bonferroni over
    all tests does not. The z beside length must point to the same side.
    """
    won = pl.max_horizontal("win_rate", 1 - pl.col("win_rate"))
    found = table.filter(
        (pl.col("q") <= limits.q)
        & (pl.col("coverage") >= limits.min_coverage)
        & (won >= limits.win_rate)
        & _beside_length(limits.z_length)
        & ~pl.col("allowed")
    )
    level = _token_level(limits.warn_win_rate, limits.fail_coverage, _sure(table, limits.q))
    return worst_first(found.with_columns(level.alias("level")), "token")


def find_exclusive(table: pl.DataFrame, limits: Limits) -> pl.DataFrame:
    """Rows that are exclusive and findings but for the z beside length: perhaps length only echoes them, worst first.

    An opener that alone makes a side longer cannot be told from length by a test of both at once.
    """
    found = table.filter(
        pl.col("exclusive")
        & (pl.col("q") <= limits.q)
        & (pl.col("coverage") >= limits.min_coverage)
        & ~_beside_length(limits.z_length).fill_null(False)
        & ~pl.col("allowed")
    )
    return worst_first(
        found.with_columns(_token_level(1.0, limits.fail_coverage, _sure(table, limits.q)).alias("level")), "token"
    )


def _sure(table: pl.DataFrame, q: float) -> pl.Expr:
    """Whether a row's p holds among all tests of its table, not only as one of many discoveries (Bonferroni)."""
    return pl.col("p") * table["q"].drop_nulls().len() <= q


def _beside_length(z: float) -> pl.Expr:
    signed = pl.when(pl.col("side") == "chosen").then(pl.col("z_length")).otherwise(-pl.col("z_length"))
    return signed >= z


def _token_level(warn: float, fail: float, sure: pl.Expr) -> pl.Expr:
    won = pl.max_horizontal("win_rate", 1 - pl.col("win_rate"))
    strong = pl.col("one_sided") | (won >= warn)
    failed = pl.col("exclusive") & (pl.col("coverage") >= fail)
    level = pl.when(failed).then(pl.lit("fail")).when(strong).then(pl.lit("warn")).otherwise(pl.lit("note"))
    return pl.when(sure).then(level).otherwise(pl.lit("note"))


def worst_first(found: pl.DataFrame, name: str) -> pl.DataFrame:
    """Rows with a `level` in the order in which findings are told: by level, share of pairs, words before signs."""
    signs = ~pl.col(name).str.contains(r"\w")
    order = [
        WORST_FIRST,
        -pl.col("coverage"),
        signs,
        *(c for c in ("n", "alphabet") if c in found.columns),
        pl.col(name),
    ]
    return found.sort(order, descending=[isinstance(key, str) and key == "alphabet" for key in order])


def find_structure(table: pl.DataFrame, limits: Limits) -> pl.DataFrame:
    """The rows of a structure table that are findings, with their `level`, worst first.

    A flag or a rare count is judged as a token is. A count in which at least half of the pairs differ (words, lines)
    predicts chosen as often as its win rate says, and has the limits of a probe. It must hold beside length too, but
    for length itself, and for a rare one where length leaves nothing to hold beside.
    """
    won = pl.max_horizontal("win_rate", 1 - pl.col("win_rate"))
    dense = pl.col("coverage") >= DENSE
    nothing_beside = ~dense | (pl.col("feature") == "words")
    least = pl.when(dense).then(limits.structure_win_rate).otherwise(limits.win_rate)
    found = table.filter(
        (pl.col("q") <= limits.q)
        & (pl.col("coverage") >= limits.min_coverage)
        & (won >= least)
        & (_beside_length(limits.structure_z_length) | (pl.col("z_length").is_null() & nothing_beside))
        & ~pl.col("allowed")
    )
    sure = _sure(table, limits.q)
    warn = (limits.warn_win_rate, limits.warn_structure_win_rate)
    rare, common = (_token_level(least, limits.fail_coverage, sure) for least in warn)
    return worst_first(found.with_columns(pl.when(dense).then(common).otherwise(rare).alias("level")), "feature")


def find_probes(probes: pl.DataFrame, dataset: str) -> list[Finding]:
    """A finding for the best probe of length, structure and words that is above its band, and for the generators'."""
    whole = probes.filter(pl.col("source").is_null() & pl.col("band").is_in(["note", "warn", "fail"]))
    shallow = whole.filter(pl.col("probe") != "generator").sort("accuracy", descending=True).head(1)
    found = pl.concat([shallow, whole.filter(pl.col("probe") == "generator")])
    return [_probe_finding(row, dataset) for row in found.iter_rows(named=True)]


def _probe_finding(row: Mapping[str, Any], dataset: str) -> Finding:
    share = f"{row['accuracy']:.1%} of held-out pairs ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%})"
    if row["probe"] == "generator":
        reason = f"who wrote a side tells chosen in {share}"
        advice = "compare responses of one generator, or of generators that win and lose alike"
    else:
        what = {"both": "structure and single words", "words": "single words"}.get(row["probe"], row["probe"])
        reason = f"a fit on {what} alone tells chosen in {share}"
        advice = repair_command(dataset, "--drop-shortcuts", ".6")
    return Finding(
        row["band"],
        "probe",
        row["probe"],
        None,
        reason,
        advice,
        num_pairs=row["num_pairs"],
        coverage=1.0,
        win_rate=row["accuracy"],
        win_rate_low=row["accuracy_low"],
        win_rate_high=row["accuracy_high"],
    )


def one_line(text: str) -> str:
    """A text of the data within a sentence."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def repair_command(dataset: str, *options: str) -> str:
    """What to type, for a shell."""
    return shlex.join(["prefkit", "repair", dataset, "--out", "NEW", *options])


def token_finding(row: Mapping[str, Any], dataset: str, also: Sequence[str] = ()) -> Finding:
    """A row of `find_tokens` as a finding."""
    side, other = ("chosen", "rejected") if row["side"] == "chosen" else ("rejected", "chosen")
    wins, name = max(row["num_chosen_only"], row["num_rejected_only"]), one_line(row["token"])
    if row["exclusive"]:
        reason = f"'{name}' is in {side} of {wins} pairs ({row['coverage']:.1%}) and in no {other} text at all"
    else:
        share = f"{row['num_discordant']} pairs ({row['coverage']:.1%})"
        reason = f"'{name}' is on one side only in {share}, in {wins} of them in {side}"
    if row["alphabet"] == "model":
        advice = repair_command(dataset, "--drop-shortcuts", ".6")
    elif row["coverage"] > MOST:  # to balance it would take more pairs than a repair drops unless asked to
        advice = f"{repair_command(dataset, '--strip-opener', 'TEXT')} where replies begin with it"
    else:
        advice = f"{repair_command(dataset, '--balance', row['token'])} (or --strip-opener where replies begin with it)"
    advice += ", or audit.allow if it is the point of the data"
    return Finding(row["level"], "tokens", row["token"], side, reason, advice, also=tuple(also), **_numbers(row))


def feature_name(feature: str, value: str | None) -> str:
    """`words`, or with a value `first_words: certainly`."""
    return feature if value is None else f"{feature}: {value}"


def structure_finding(row: Mapping[str, Any], dataset: str, doc: str) -> Finding:
    """A row of `find_structure` as a finding; `doc` says what the feature measures."""
    side = row["side"]
    name = feature_name(row["feature"], row["value"])
    wins = max(row["num_chosen_more"], row["num_rejected_more"])
    if row["exclusive"]:
        other = "rejected" if side == "chosen" else "chosen"
        what = f"in {wins} pairs ({row['coverage']:.1%}) {side} has it, and no {other} side at all does"
    else:
        what = f"of the {row['num_discordant']} pairs that differ ({row['coverage']:.1%}), {side} has more in {wins}"
    reason = f"{one_line(name)} ({doc}): {what}"
    if row["feature"] == "words":
        reason = (
            f"length (words): {side} is the longer side in {wins} of {row['num_discordant']} pairs that differ in words"
        )
    if row["value"] is not None and row["feature"] in SOURCES_DECIDE:
        advice = f"pair responses of like {row['feature']}"
    elif row["family"] == "length":
        advice = repair_command(dataset, "--match-length")
    elif row["feature"] == "first_words":
        advice = repair_command(dataset, "--strip-opener", "TEXT")
    else:
        advice = f"look at such pairs ({shlex.join(['prefkit', 'show', dataset])}) and mend their source"
    advice += ", or audit.allow_features if it is the point of the data"
    return Finding(row["level"], "structure", name, side, reason, advice, **_numbers(row))


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("alphabet", "n", "coverage", "win_rate", "win_rate_low", "win_rate_high", "p", "q", "z_length")
    also = ("p_permutation",)
    return {"num_pairs": row["num_discordant"]} | {name: row[name] for name in (*names, *also) if name in row}


def power_of(num_prompts: int, num_tests: int, limits: Limits, min_discordant: int = MIN_ONE_SIDED) -> Power:
    """What so many prompts could have shown among so many tests, at least `MIN_TESTS`; a prompt counts once in each.

    `min_discordant`: pairs below which no token is tested.
    """
    tests, most = max(num_tests, MIN_TESTS), int(num_prompts * POWER_COVERAGE)
    win_rate = smallest_detectable_win_rate(most, tests, limits.q)
    needed = max(MIN_ONE_SIDED, min_discordant) / max(1, num_prompts)
    enough = most >= min_discordant and win_rate <= limits.win_rate
    return Power(min(1.0, win_rate), min(1.0, max(needed, limits.min_coverage)), num_tests, enough)


def judge(findings: Iterable[Finding], power: Power, num_prompts: int, limits: Limits) -> Verdict:
    """The verdict over all findings. None, in data that could not have shown any, is never a pass."""
    ordered = sorted(findings, key=lambda f: (-LEVELS.index(f.level), FAMILIES.index(f.family)))
    if ordered:
        level = ordered[0].level
        same = sum(finding.level == level for finding in ordered)
        number = f"{same} finding{'s' * (same > 1)} at level {level}"
        return Verdict(level, f"{number}; {ordered[0].reason}", ordered)
    if not power.enough:
        could = (
            f"a token that separates half of {num_prompts} prompts shows only from a win rate of {power.win_rate:.2f}"
        )
        return Verdict("not enough data", f"{could}; the limit is {limits.win_rate:g}", [])
    shown = f"a token in one side only would show from {power.one_sided_coverage:.1%} of the prompts on"
    return Verdict("pass", f"no token, feature or probe is above its limit in {num_prompts} prompts; {shown}", [])
