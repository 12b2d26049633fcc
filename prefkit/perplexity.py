"""Whether a model has forgotten what it could say: the perplexity of held-out texts under it and its reference.

Comes in: rows with a prompt and a reference (the text) each. Goes out: a row a text: its tokens, and minus its log-prob
under each model. A text is encoded as a completion of its prompt is, by the policy's own tokenizer; both models score
the very same ids. What was drawn is the text, whatever its prompt: so a text is known by its row, and intervals are by
text.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.completions import Tell, Watch, completion_logps
from prefkit.encode import common_prefix, encode_prompts, encode_responses
from prefkit.format import Kind
from prefkit.intervals import CONFIDENCE, Measured, ratio_by_prompt
from prefkit.logps import CompletionLogps

ENCODED: dict[str, Any] = {
    "text": pl.String,
    "prompt_ids": pl.List(pl.Int32),
    "response_ids": pl.List(pl.Int32),
}
TEXTS: dict[str, Any] = {
    "text": pl.String,
    "num_tokens": pl.Int32,
    "policy_nll": pl.Float64,
    "reference_nll": pl.Float64,
}


class EncodedTexts(NamedTuple):
    """`texts`: the columns of ENCODED, `text` being source:row; `dropped`: how many are not in it, by reason."""

    texts: pl.DataFrame
    dropped: dict[str, int]


def text_nlls(texts: pl.DataFrame, scorers: dict[str, CompletionLogps], tell: Tell, watch: Watch) -> pl.DataFrame:
    """Minus the log-prob of each text, in nats, under each model.

    Args:
        texts: text, prompt_ids, response_ids.
        scorers: policy, and reference where there is one.
        tell: called with lines for a person.
        watch: called with the tokens that are done, and all.

    Returns:
        the columns of TEXTS, in the order of the texts; reference_nll is null without a reference.
    """
    prompts, ids = texts["prompt_ids"].to_list(), texts["response_ids"].to_list()
    nlls = {
        name: [-float(tokens.sum(dtype=np.float64)) for tokens in completion_logps(scorer, prompts, ids, tell, watch)]
        for name, scorer in scorers.items()
    }
    return pl.DataFrame(
        {
            "text": texts["text"],
            "num_tokens": [len(some) for some in ids],
            "policy_nll": nlls["policy"],
            "reference_nll": nlls.get("reference", [None] * len(ids)),
        },
        schema=TEXTS,
    )


def perplexities(rows: pl.DataFrame, confidence: float = CONFIDENCE) -> list[tuple[str, str, Measured]]:
    """The perplexity of all texts under each model, and the policy's over the reference's.

    exp of nats a token: sums over sums, with an interval by text; of the ratio the difference a token, in pairs.

    Args:
        rows: of `text_nlls`.
        confidence: of the intervals.

    Returns:
        role, metric, figure.

    Example: 10 tokens of 20 nats have a perplexity of e^2 = 7.39.
    """
    rows = rows.rename({"text": "prompt_id"})  # what counts once
    found: list[tuple[str, str, Measured]] = []
    for role in ("policy", "reference"):
        nll = ratio_by_prompt(rows, f"{role}_nll", "num_tokens", confidence)
        if nll.value is not None:
            found += [(role, "nll", nll), (role, "perplexity", _exp(nll))]
    apart = rows.with_columns(apart=pl.col("policy_nll") - pl.col("reference_nll"))
    difference = ratio_by_prompt(apart, "apart", "num_tokens", confidence)
    if difference.value is not None:
        found += [("difference", "nll", difference), ("ratio", "perplexity", _exp(difference))]
    return found


def _exp(measured: Measured) -> Measured:
    value, low, high = (None if some is None else math.exp(min(some, 700.0)) for some in measured[:3])
    return measured._replace(value=value, low=low, high=high)


def encode_texts(
    texts: pl.DataFrame, tokenizer: Any, kind: Kind, template: str | None, most: int | None
) -> EncodedTexts:
    """Texts as completions of their prompts, whole; what cannot be one is counted by its reason.

    Args:
        texts: prompt, reference (the text), tools, source, source_row.
        tokenizer: of the policy.
        kind: of the prompts.
        template: the chat template's text; None for text.
        most: tokens of prompt and text that the models have positions for; None: no limit.

    Returns:
        texts, and the counts of no_reference, too_long, empty, and of the reasons that encoding has.
    """
    named = texts.with_columns(prompt_id=pl.format("{}:{}", "source", "source_row"))
    some = named.drop_nulls("reference")
    encoded = encode_prompts(some, tokenizer, kind, template)
    reasons = Counter({"no_reference": named.height - some.height}) + Counter(encoded.dropped["reason"].to_list())
    found = some.join(encoded.prompts, on="prompt_id", how="inner", maintain_order="left")
    asked, said, tools = (found[name].to_list() for name in ("prompt", "reference", "tools"))
    whole = encode_responses(asked, said, tools, tokenizer, template)
    rows = []
    for name, prompt_ids, ids in zip(found["prompt_id"], found["prompt_ids"].to_list(), whole, strict=True):
        if isinstance(ids, str):
            reasons[ids] += 1
        elif len(ids) < 2:
            reasons["empty"] += 1  # not a token to predict
        elif most is not None and len(ids) > most:
            reasons["too_long"] += 1
        else:
            cut = min(max(1, common_prefix(prompt_ids, ids)), len(ids) - 1)
            rows.append((name, ids[:cut], ids[cut:]))
    return EncodedTexts(pl.DataFrame(rows, schema=ENCODED, orient="row"), dict(reasons))
