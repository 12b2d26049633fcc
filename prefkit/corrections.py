"""Corrections become pairs: the model's own response is rejected, the corrected one chosen (CLAIR, arXiv 2408.06266).

The correction is in the data, or a source's rules make it from the response. Goes out: drafts with three columns that
say how far the sides are apart. Minimal edits are the point of the method and the danger of the plain DPO loss, which
may lower the log-probability of both sides where they share most of their words (Smaug, arXiv 2402.13228).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import polars as pl
from rapidfuzz.distance import Levenshtein, Prefix

from prefkit.errors import located
from prefkit.format import Kind, text_dtype
from prefkit.pairs import as_drafts, as_dropped
from prefkit.text import WORD, words_of

MAX_WORDS = 20_000  # of a side: the time of a distance grows with the product of both, 20 ms here
CLOSE = 0.2  # ours: below it more than four of five words are common to both sides


class Rule(NamedTuple):
    """One step from a response to its correction.

    `name`: what it is called in a report; `apply`: from text to text; `gone`: texts that no correction may hold,
    compared casefolded, anywhere in it.
    """

    name: str
    apply: Callable[[str], str]
    gone: Sequence[str] = ()


class Rewritten(NamedTuple):
    """What rules made of responses: records of corrections, drops (`untouched`, `old_text_remains`), rows touched."""

    corrections: pl.DataFrame
    dropped: pl.DataFrame
    touched: dict[str, int]


def corrected_pairs(records: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Drafts of corrections: prompt, response, correction, model, annotator, source, source_row."""
    renamed = records.rename({"response": "rejected", "correction": "chosen", "model": "rejected_model"})
    apart = distances(*(renamed.select(words_of(side, kind)).to_series() for side in ("chosen", "rejected")))
    return as_drafts(renamed.hstack(apart), method=pl.lit("correction"), weight=pl.lit(1.0))


def distances(chosen: pl.Series, rejected: pl.Series) -> pl.DataFrame:
    r"""The columns edit_distance, shared_prefix and first_divergence of two columns of text, over words.

    A word is \w+|[^\w\s] as it is written: white space does not count, case does. Two texts without any word are 0
    apart, and the edit_distance of a side of more than MAX_WORDS is null. Example: "a b c" and "a x c" give 1/3, 1/3
    and 1.
    """
    rows = [_distance(WORD.findall(one), WORD.findall(other)) for one, other in zip(chosen, rejected, strict=True)]
    names = {"edit_distance": pl.Float64, "shared_prefix": pl.Float64, "first_divergence": pl.Int64}
    return pl.DataFrame(rows, schema=names, orient="row")


def _distance(chosen: list[str], rejected: list[str]) -> tuple[float | None, float, int]:
    shared = Prefix.similarity(chosen, rejected)
    shorter = min(len(chosen), len(rejected))
    short_enough = max(len(chosen), len(rejected)) <= MAX_WORDS
    distance = Levenshtein.normalized_distance(chosen, rejected) if short_enough else None
    return distance, shared / shorter if shorter else 0.0, int(shared)


def rewrite_responses(records: pl.DataFrame, rules: Sequence[Rule], kind: Kind) -> Rewritten:
    """Make the correction of every response, the rules one after the other, each on what the one before it left.

    Args:
        records: prompt, response, tools, model, source, source_row.
        rules: at least one. In a chat dataset they apply to each assistant turn of the response.
        kind: of the dataset.

    A response that no rule changes is dropped (`untouched`), and so is one whose correction still holds a text that had
    to go (`old_text_remains`). An error that a rule raises gets the file and row.
    """
    touched = dict.fromkeys([rule.name for rule in rules], 0)
    texts = []
    for text, source, row in records.select("response", "source", "source_row").iter_rows():
        with located(f"{source}:{row}"):
            texts.append(_rewritten(text, rules, touched))
    made = records.with_columns(pl.Series("correction", texts, text_dtype(kind)))
    folded = made.select(words_of("correction", kind)).to_series().to_list()
    gone = [text.casefold() for rule in rules for text in rule.gone]
    reasons = pl.Series(
        "reason",
        [
            "untouched" if after == before else "old_text_remains" if any(t in seen.casefold() for t in gone) else None
            for before, after, seen in zip(records["response"].to_list(), texts, folded, strict=True)
        ],
        pl.String,
    )
    judged = made.hstack([reasons])
    lost = judged.filter(pl.col("reason").is_not_null()).rename({"response": "rejected", "model": "rejected_model"})
    lost = lost.with_columns(
        chosen=pl.when(pl.col("reason") != "untouched").then(pl.col("correction")), method=pl.lit("correction")
    )
    kept = judged.filter(pl.col("reason").is_null()).drop("reason")
    return Rewritten(kept.with_columns(annotator=pl.lit(None, pl.String)), as_dropped(lost, kind), touched)


def _rewritten(text: Any, rules: Sequence[Rule], touched: dict[str, int]) -> Any:
    """A response after all rules; each that changed it is counted once."""
    for rule in rules:
        if isinstance(text, str):
            after: Any = rule.apply(text)
        else:
            after = [{**m, "content": rule.apply(m["content"])} if m["role"] == "assistant" else m for m in text]
        touched[rule.name] += after != text
        text = after
    return text


def correction_report(pairs: pl.DataFrame) -> dict[str, Any]:
    """How far apart the sides of the corrections in a frame of pairs are; empty without corrections.

    Returns:
        num_pairs, the median and the 10th and 90th percentile of edit_distance, the median shared_prefix, the share of
        pairs closer than CLOSE, and advice where they are more than half.
    """
    apart = pairs.filter(pl.col("edit_distance").is_not_null())
    if not apart.height:
        return {}
    distance = apart["edit_distance"]
    close = float((distance < CLOSE).mean())  # type: ignore[arg-type]
    quantiles = {name: distance.quantile(q, "linear") for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    advice = (
        f"{close:.0%} of the corrections change fewer than {CLOSE:.0%} of the words: the plain DPO loss may lower the "
        "log-probability of both sides there (Smaug, arXiv 2402.13228); a loss that holds chosen up (dpop, "
        "apo_zero, or an SFT term beside DPO) is safer"
    )
    return {
        "num_pairs": apart.height,
        "edit_distance": quantiles,
        "shared_prefix": {"median": apart["shared_prefix"].median()},
        "close": close,
        "advice": [advice] if close > 0.5 else [],
    }
