"""Whether a model has forgotten what it could say: the perplexity of held-out texts under it and its reference.

Comes in: prompts with a reference (the text) each. Goes out: a row a text: its tokens, and minus its log-prob under
each model. A text is encoded as a completion of its prompt is, by the policy's own tokenizer; both models score the
very same ids.
"""

import math
from typing import Any

import numpy as np
import polars as pl

from prefkit.completions import Tell, Watch, completion_logps
from prefkit.encode import common_prefix, encode_prompts, encode_responses
from prefkit.format import Kind
from prefkit.intervals import CONFIDENCE, Measured, ratio_by_prompt
from prefkit.logps import CompletionLogps

ENCODED: dict[str, Any] = {
    "prompt_id": pl.String,
    "prompt_ids": pl.List(pl.Int32),
    "response_ids": pl.List(pl.Int32),
}
TEXTS: dict[str, Any] = {
    "prompt_id": pl.String,
    "num_tokens": pl.Int32,
    "policy_nll": pl.Float64,
    "reference_nll": pl.Float64,
}


def text_nlls(texts: pl.DataFrame, scorers: dict[str, CompletionLogps], tell: Tell, watch: Watch) -> pl.DataFrame:
    """Minus the log-prob of each text, in nats, under each model.

    Args:
        texts: prompt_id, prompt_ids, response_ids.
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
            "prompt_id": texts["prompt_id"],
            "num_tokens": [len(some) for some in ids],
            "policy_nll": nlls["policy"],
            "reference_nll": nlls.get("reference", [None] * len(ids)),
        },
        schema=TEXTS,
    )


def perplexities(rows: pl.DataFrame, confidence: float = CONFIDENCE) -> list[tuple[str, str, Measured]]:
    """The perplexity of all texts under each model, and the policy's over the reference's.

    exp of nats a token: sums over sums, with an interval by prompt; of the ratio the difference a token, in pairs.

    Args:
        rows: of `text_nlls`.
        confidence: of the intervals.

    Returns:
        role, metric, figure.

    Example: 10 tokens of 20 nats have a perplexity of e^2 = 7.39.
    """
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


def encode_texts(texts: pl.DataFrame, tokenizer: Any, kind: Kind, template: str | None) -> pl.DataFrame:
    """Texts as completions of their prompts: prompt_ids and response_ids; what cannot be encoded is left out.

    Args:
        texts: prompt_id, prompt, reference (the text; null is left out), tools.
        tokenizer: of the policy.
        kind: of the prompts.
        template: the chat template's text; None for text.
    """
    some = texts.drop_nulls("reference")
    encoded = encode_prompts(some, tokenizer, kind, template).prompts
    found = some.join(encoded, on="prompt_id", how="inner", maintain_order="left")
    asked, said, tools = (found[name].to_list() for name in ("prompt", "reference", "tools"))
    whole = encode_responses(asked, said, tools, tokenizer, template)
    rows = []
    for prompt_id, prompt_ids, ids in zip(found["prompt_id"], found["prompt_ids"].to_list(), whole, strict=True):
        if not isinstance(ids, str) and len(ids) > 1:
            cut = min(max(1, common_prefix(prompt_ids, ids)), len(ids) - 1)
            rows.append((prompt_id, ids[:cut], ids[cut:]))
    return pl.DataFrame(rows, schema=ENCODED, orient="row")
