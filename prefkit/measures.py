"""What an evaluation measures, from responses and scores to the rows of its two tables and to what they tell at once.

Comes in: frames with a row a response. Goes out: rows of format.EVALUATION_COLUMNS and EVALUATION_PROMPT_COLUMNS, every
interval by prompt (intervals.py), and warnings in words.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from prefkit.diversity import distinct_n, diversity_by_prompt
from prefkit.format import Kind, schema
from prefkit.intervals import (
    FEW_PROMPTS,
    Measured,
    gain_by_prompt,
    mean_by_prompt,
    prompt_means,
    ratio_by_prompt,
    share_by_prompt,
)

POLICY, REFERENCE, OTHER, CHOSEN, DIFFERENCE, RATIO = "policy", "reference", "other", "chosen", "difference", "ratio"
REWARD, WIN_RATE, INCONSISTENT = "reward", "win_rate", "inconsistent"
MUCH_CUT_OFF = 0.1  # share of responses; above it length and reward are those of the limit
MUCH_LONGER = 1.2  # times the reference's tokens
MUCH_INCONSISTENT = 0.3  # share of a judge's verdicts
MUCH_UNSCORED = 0.05  # share of responses
Row = dict[str, Any]
Scores = Mapping[str, pl.DataFrame]  # role -> prompt_id, score


def summary_row(
    role: str, metric: str, measured: Measured, *, temperature: float | None = None, scorer: str | None = None
) -> Row:
    """One row of the summary."""
    return {"role": role, "temperature": temperature, "scorer": scorer, "metric": metric, **measured._asdict()}


def summary_frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Rows as the table `evaluations`; what could not be measured (no value) is left out."""
    return pl.DataFrame([row for row in rows if row["value"] is not None], schema=schema("evaluations", "text"))


def response_rows(role: str, temperature: float, rows: pl.DataFrame, confidence: float) -> list[Row]:
    """Length, diversity and cut-off share of one model's responses at one temperature.

    Args:
        role: whose.
        temperature: that they were sampled at.
        rows: prompt_id, response, num_tokens, finish_reason.
        confidence: of the intervals.
    """
    plain = with_lengths(rows)
    varied = diversity_by_prompt(rows)
    texts = rows.sort("prompt_id")["response"].to_list()
    counts = rows["prompt_id"].n_unique(), rows.height
    found = {
        "tokens": mean_by_prompt(plain, "tokens", confidence),
        "characters": mean_by_prompt(plain, "characters", confidence),
        "cut_off": share_by_prompt(plain, "cut_off", confidence),
        "distinct_1": Measured(distinct_n(texts, 1), None, None, *counts),
        "distinct_2": Measured(distinct_n(texts, 2), None, None, *counts),
        "distinct_responses": _of_responses(mean_by_prompt(varied, "distinct_responses", confidence), rows),
        "self_similarity": _of_responses(mean_by_prompt(varied, "self_similarity", confidence), rows),
    }
    return [summary_row(role, metric, measured, temperature=temperature) for metric, measured in found.items()]


def with_lengths(rows: pl.DataFrame) -> pl.DataFrame:
    """Responses as numbers: prompt_id, tokens, characters, cut_off."""
    return rows.select(
        "prompt_id",
        tokens=pl.col("num_tokens").cast(pl.Float64),
        characters=pl.col("response").str.len_chars().cast(pl.Float64),
        cut_off=(pl.col("finish_reason") == "length").cast(pl.Float64),
    )


def _of_responses(measured: Measured, rows: pl.DataFrame) -> Measured:
    """A measure by prompt, with the responses that are behind it."""
    return measured._replace(num_responses=rows.height) if measured.value is not None else measured


def length_rows(temperature: float, rows: pl.DataFrame, others: pl.DataFrame, confidence: float) -> list[Row]:
    """How much longer the policy's responses are than the reference's, by prompt."""
    one, other = with_lengths(rows), with_lengths(others)
    gains = {name: gain_by_prompt(one, other, name, confidence) for name in ("tokens", "characters")}
    return [summary_row(DIFFERENCE, name, gain, temperature=temperature) for name, gain in gains.items()]


def reward_rows(temperature: float, scorer: str, scores: Scores, confidence: float) -> list[Row]:
    """Mean reward of each role, and the policy's paired gain over the reference.

    Args:
        temperature: that responses were sampled at.
        scorer: who gave the scores.
        scores: of each role prompt_id and score; null where a response got none.
        confidence: of the intervals.
    """
    found = [
        summary_row(role, REWARD, mean_by_prompt(rows, "score", confidence), temperature=temperature, scorer=scorer)
        for role, rows in scores.items()
    ]
    if REFERENCE in scores:
        gain = gain_by_prompt(scores[POLICY], scores[REFERENCE], "score", confidence)
        found.append(summary_row(DIFFERENCE, REWARD, gain, temperature=temperature, scorer=scorer))
    return found


def win_rows(temperature: float, scorer: str, wins: pl.DataFrame, confidence: float) -> list[Row]:
    """The policy's win rate, and of a judge the share of verdicts that changed with the order.

    Args:
        temperature: that responses were sampled at.
        scorer: who scored or judged.
        wins: as win_rates makes them.
        confidence: of the intervals.
    """
    compared, changed = int(wins["num_compared"].sum()), int(wins["num_inconsistent"].sum())
    rate = share_by_prompt(wins, "win", confidence)._replace(num_responses=compared)
    found = [summary_row(POLICY, WIN_RATE, rate, temperature=temperature, scorer=scorer)]
    if changed:
        asked = pl.col("num_compared") + pl.col("num_inconsistent")
        by_prompt = wins.with_columns(inconsistent=pl.col("num_inconsistent") / asked)
        share = share_by_prompt(by_prompt, "inconsistent", confidence)._replace(num_responses=compared + changed)
        found.append(summary_row(POLICY, INCONSISTENT, share, temperature=temperature, scorer=scorer))
    return found


def kl_rows(temperature: float, rows: pl.DataFrame, confidence: float) -> list[Row]:
    """KL(policy || reference) over the policy's own responses, in nats: a response, and a token.

    Two estimates of the same: the mean of log p(y) - log q(y), and (`kl_exact`) that of the sum over the tokens of the
    KL of the next-token distributions where y has led, which has the same mean and less variance (Rao-Blackwell;
    Amini, Vieira and Cotterell 2025, arXiv 2504.10637).

    Args:
        temperature: that responses were sampled at: 1.
        rows: prompt_id, num_tokens, logps, ref_logps, kl_exact: sums over the response.
        confidence: of the intervals.
    """
    with_kl = rows.with_columns(kl=pl.col("logps") - pl.col("ref_logps"))
    found = []
    for name in ("kl", "kl_exact"):
        found.append((name, mean_by_prompt(with_kl, name, confidence)))
        found.append((f"{name}_token", ratio_by_prompt(with_kl, name, "num_tokens", confidence)))
    return [summary_row(POLICY, name, measured, temperature=temperature) for name, measured in found]


def prompt_rows(
    temperature: float,
    kind: Kind,
    samples: Scores,
    scores: Mapping[str, Scores],
    wins: Mapping[str, pl.DataFrame],
    kl: pl.DataFrame | None,
) -> pl.DataFrame:
    """The table `evaluation_prompts` at one temperature: a row a prompt and scorer, in the order of the prompts.

    Args:
        temperature: that responses were sampled at.
        kind: of the prompts.
        samples: of each role prompt_id, prompt, response, num_tokens, finish_reason.
        scores: scorer -> role -> prompt_id, score.
        wins: scorer -> as win_rates makes them.
        kl: as `kl_rows` takes it; None where it was left out.
    """
    policy = samples[POLICY]
    found = policy.group_by("prompt_id", maintain_order=True).agg(
        pl.col("prompt").first(), num_responses=pl.len().cast(pl.Int64)
    )
    for role in (POLICY, REFERENCE):
        if role in samples:
            lengths = with_lengths(samples[role]).group_by("prompt_id").agg(pl.col("tokens", "cut_off").mean())
            both = lengths.join(diversity_by_prompt(samples[role]), on="prompt_id")
            named = both.select(
                "prompt_id",
                pl.col("tokens").alias(f"{role}_tokens"),
                pl.col("cut_off").alias(f"{role}_cut_off"),
                pl.col("distinct_responses").alias(f"{role}_distinct"),
            )
            found = _beside(found, named)
    if kl is not None:
        by_prompt = prompt_means(kl.with_columns(kl=pl.col("logps") - pl.col("ref_logps")), "kl")
        found = _beside(found, by_prompt.select("prompt_id", kl="mean"))
    scorers = list(dict.fromkeys([*scores, *wins]))
    pieces = [_scored(found, name, scores.get(name, {}), wins.get(name)) for name in scorers] or [found]
    wanted = schema("evaluation_prompts", kind)
    return pl.concat(
        piece.with_columns(temperature=pl.lit(temperature)).select(
            pl.col(name).cast(dtype)
            if name in piece.columns or name == "temperature"
            else pl.lit(None, dtype).alias(name)
            for name, dtype in wanted.items()
        )
        for piece in pieces
    )


def _scored(found: pl.DataFrame, scorer: str, scores: Scores, wins: pl.DataFrame | None) -> pl.DataFrame:
    for role in (POLICY, REFERENCE):
        if role in scores:
            means = prompt_means(scores[role], "score")
            found = _beside(found, means.select("prompt_id", pl.col("mean").alias(f"{role}_reward")))
    if POLICY in scores and REFERENCE in scores:
        found = found.with_columns(gain=pl.col("policy_reward") - pl.col("reference_reward"))
    if wins is not None:
        found = _beside(found, wins)
    return found.with_columns(scorer=pl.lit(scorer))


def _beside(found: pl.DataFrame, more: pl.DataFrame) -> pl.DataFrame:
    return found.join(more, on="prompt_id", how="left", maintain_order="left")


class Summary:
    """Look-ups in the table `evaluations`."""

    def __init__(self, table: pl.DataFrame) -> None:
        self.table = table
        self.rows = {
            (row["role"], row["metric"], row["temperature"], row["scorer"]): Measured(
                *(row[name] for name in Measured._fields)
            )
            for row in table.to_dicts()
        }

    def get(
        self, role: str, metric: str, temperature: float | None = None, scorer: str | None = None
    ) -> Measured | None:
        """A figure with its interval, None where it was not measured."""
        return self.rows.get((role, metric, temperature, scorer))

    @property
    def temperatures(self) -> list[float]:
        """Those that responses were sampled at, in order."""
        return self.table["temperature"].drop_nulls().unique(maintain_order=True).to_list()

    def scorers(self, metric: str) -> list[str]:
        """Who has given some metric, in order."""
        of = self.table.filter(pl.col("metric") == metric)
        return of["scorer"].drop_nulls().unique(maintain_order=True).to_list()


def headline(summary: Summary, temperatures: Sequence[float]) -> Row | None:
    """The gain in mean reward by the first scorer at the first temperature, if there is one."""
    for scorer in summary.scorers(REWARD):
        for temperature in temperatures:
            gain = summary.get(DIFFERENCE, REWARD, temperature, scorer)
            if gain is not None:
                told = {name: getattr(gain, name) for name in ("value", "low", "high", "num_prompts")}
                return {"scorer": scorer, "temperature": temperature, **told}
    return None


class Unscored(NamedTuple):
    """What a scorer left out of one model's responses at one temperature."""

    responses: int  # without a score
    all_responses: int
    prompts: int  # none of whose responses has a score
    all_prompts: int


def unscored(scores: pl.DataFrame, samples: pl.DataFrame) -> Unscored:
    """What of the samples has no score.

    Args:
        scores: prompt_id and score.
        samples: prompt_id, a row a response.
    """
    some = scores.drop_nulls("score")
    prompts = samples["prompt_id"].n_unique()
    return Unscored(samples.height - some.height, samples.height, prompts - some["prompt_id"].n_unique(), prompts)


def warnings_of(summary: Summary, unscored: Mapping[str, Sequence[Unscored]]) -> list[dict[str, str]]:
    """What the figures tell at once, as name and text.

    Args:
        summary: of the evaluation.
        unscored: scorer -> what it left out, of each model and temperature.
    """
    found: list[tuple[str, str]] = []
    for temperature in summary.temperatures:
        found += _of_temperature(summary, temperature)
    for scorer, left in unscored.items():
        none, total = sum(one.responses for one in left), sum(one.all_responses for one in left)
        worst = max(left, key=lambda one: one.prompts)
        if none > MUCH_UNSCORED * total or worst.prompts:
            text = f"{scorer} gave {none} of {total} responses no score: means are over the rest"
            said = f"; {worst.prompts} of {worst.all_prompts} prompts {'has' if worst.prompts == 1 else 'have'} none"
            found.append(("unscored", text + (said if worst.prompts else "")))
    tokens = summary.get(POLICY, "tokens", next(iter(summary.temperatures), None))
    if tokens is not None and tokens.num_prompts < FEW_PROMPTS:
        found.append(
            ("few_prompts", f"{tokens.num_prompts} prompts are few: intervals are wide, and their ends are rough")
        )
    return [{"name": name, "text": text} for name, text in found]


def _of_temperature(summary: Summary, temperature: float) -> list[tuple[str, str]]:
    at = f"at temperature {temperature:g}"
    found = []
    tokens, before = (summary.get(role, "tokens", temperature) for role in (POLICY, REFERENCE))
    longer = summary.get(DIFFERENCE, "tokens", temperature)
    for scorer in summary.scorers(REWARD):
        gain = summary.get(DIFFERENCE, REWARD, temperature, scorer)
        if gain is None:
            continue
        if not gain.excludes_zero:
            found.append(
                ("gain_unsure", f"{at} the gain by {scorer} may be none: its interval holds 0; more prompts narrow it")
            )
        elif gain.value is not None and gain.value < 0:
            found.append(("reward_fell", f"{at} the mean reward by {scorer} fell"))
        elif (
            tokens is not None
            and before is not None
            and longer is not None
            and longer.excludes_zero
            and (tokens.value or 0) > MUCH_LONGER * (before.value or 0)
        ):
            text = (
                f"{at} responses grew from {before.value:.0f} to {tokens.value:.0f} tokens along with the reward by "
                f"{scorer}: it may be paid for length"
            )
            found.append(("length", text))
    for scorer in summary.scorers(INCONSISTENT):
        share = summary.get(POLICY, INCONSISTENT, temperature, scorer)
        if share is not None and (share.value or 0) > MUCH_INCONSISTENT:
            text = f"{at} {scorer} changed its mind with the order in {share.value:.0%} of the comparisons"
            found.append(("inconsistent", text))
    cut = summary.get(POLICY, "cut_off", temperature)
    if cut is not None and (cut.value or 0) > MUCH_CUT_OFF:
        text = f"{at} {cut.value:.0%} of the responses were cut off: a larger evaluate.max_new_tokens lets them end"
        found.append(("cut_off", text))
    for name in ("distinct_2", "distinct_responses"):
        now, then = (summary.get(role, name, temperature) for role in (POLICY, REFERENCE))
        if now is not None and then is not None and (now.value or 0) < 0.5 * (then.value or 0):
            found.append(("diversity", f"{at} {name} fell from {then.value:.2f} to {now.value:.2f}: less than half"))
    return found
