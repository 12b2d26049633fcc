"""The on-disk format of sampled and scored candidates: names, columns, dtypes. No input or output here.

    CANDIDATES/
      sample.json                      written last: what was sampled, with which model and settings
      sampler.json                     written first: what decides the samples
      prompts/part-00000.parquet       the prompts, in the order of their file
      rejects/part-00000.parquet       lines that could not become a prompt, raw
      dropped/part-00000.parquet       prompts that were not sampled from, and why
      plan.parquet                     first: which prompt is in which batch and part
      samples/part-00000.parquet       N responses a prompt, with ids and log-probs
      scored/<scorer>-00000.parquet    a row a response and scorer: all files together are a `candidates` source
      unscored/<scorer>-00000.parquet  responses that a scorer gave no score in its scale, and why
      verdicts/<scorer>-00000.parquet  of a judge: which of two responses it prefers, a `comparisons` source
      inconsistent/<scorer>-00000.parquet  of a judge: comparisons without a verdict, and why
      scores/<scorer>.json             written last of a scorer: what it is, and what it did
      .lock                            one writer at a time

`scored/*.parquet` of several scorers are one table, with the scorer in its column.
"""

from typing import Any

import polars as pl

from prefkit.format import MESSAGES, Column, Kind

SAMPLE_VERSION = 1

SAMPLE_JSON = "sample.json"
SAMPLER_JSON = "sampler.json"
SAMPLE_PLAN = "plan.parquet"
PROMPTS = "prompts"
PLAN = "plan"  # in one file, SAMPLE_PLAN
SAMPLES = "samples"
SCORED = "scored"
UNSCORED = "unscored"
VERDICTS = "verdicts"
INCONSISTENT = "inconsistent"
SCORERS = "scores"  # a JSON document a scorer

_PROMPT = (
    Column("prompt_id", pl.String, "as in pairs: sha256 over kind and prompt"),
    Column("prompt", None, "what is answered; in a chat dataset it ends with a user turn"),
    Column("reference", pl.String, "the right answer, for scorers; null without"),
    Column("tools", pl.String, "JSON list of the tools that the prompt offers, null without; chat only"),
)
_RESPONSE = (
    Column("candidate_id", pl.String, "sha256 over prompt_id, the sampler's identity and `number`"),
    Column("number", pl.Int32, "of the response among those of its prompt, from 0 on"),
    Column("response", pl.String, "without the tokens that ended it"),
    Column("model", pl.String, "the folder it was sampled from, as it was named"),
)

_VERDICT = (
    *_PROMPT,
    Column("candidate_a", pl.String, "candidate_id of response_a"),
    Column("candidate_b", pl.String, "candidate_id of response_b"),
    Column("response_a", pl.String, "the response of the smaller number"),
    Column("response_b", pl.String, "the other one"),
    Column("winner", pl.String, "a | b | tie; null where there is no verdict"),
    Column("log_odds_ab", pl.Float32, "of a being better, a shown first, in nats"),
    Column("log_odds_ba", pl.Float32, "of a being better, b shown first, in nats"),
    Column("scorer", pl.String, "the judge's name"),
)

# name -> columns
SAMPLE_TABLES: dict[str, tuple[Column, ...]] = {
    PROMPTS: (
        *_PROMPT,
        Column("source", pl.String, "the file it came from"),
        Column("source_row", pl.Int64, "1-based line (or row) in that file"),
    ),
    "dropped": (
        *_PROMPT,
        Column("source", pl.String, "the file it came from"),
        Column("source_row", pl.Int64, "1-based line (or row) in that file"),
        Column(
            "reason",
            pl.String,
            "duplicate | empty_prompt | no_user_turn_last | prompt_too_long | template_refused | ...",
        ),
    ),
    PLAN: (
        Column("prompt_id", pl.String, "as in prompts"),
        Column("num_prompt_tokens", pl.Int32, "of the prompt as it is tokenised"),
        Column("batch", pl.Int32, "prompts of a batch are sampled together, in this order"),
        Column("part", pl.Int32, "of samples/ that the batch is in"),
        Column("width", pl.Int32, "responses that are made at once"),
    ),
    SAMPLES: (
        *_PROMPT,
        *_RESPONSE,
        Column("temperature", pl.Float64, "of the softmax that was sampled from; 0: the likeliest token"),
        Column("finish_reason", pl.String, "stop: an end token or a stop text; length: sample.max_new_tokens"),
        Column("num_tokens", pl.Int32, "of the response, the token that ended it included"),
        Column("logps", pl.Float32, "sum of token_logps, null without"),
        Column("prompt_ids", pl.List(pl.Int32), "the prompt as it was tokenised"),
        Column("response_ids", pl.List(pl.Int32), "num_tokens ids, the token that ended it included"),
        Column(
            "token_logps",
            pl.List(pl.Float32),
            "log-prob of each token under the model itself, at temperature 1 and without top_p or top_k, in nats; null "
            "where another engine gave none",
        ),
    ),
    SCORED: (
        *_PROMPT,
        *_RESPONSE,
        Column("score", pl.Float64, "higher is better"),
        Column("scorer", pl.String, "its name"),
    ),
    UNSCORED: (
        *_PROMPT,
        *_RESPONSE,
        Column("scorer", pl.String, "its name"),
        Column(
            "reason",
            pl.String,
            "no_score | not_finite | out_of_scale | too_long | no_reference | inconsistent | one_response (a judge had "
            "nothing to compare it with) | template_refused | control_token_in_text",
        ),
        Column("value", pl.Float64, "what the scorer gave, null where it gave none or none that is finite"),
    ),
    VERDICTS: _VERDICT,
    INCONSISTENT: (
        *_VERDICT,
        Column(
            "reason",
            pl.String,
            "inconsistent: the verdict changes with the order | too_long | template_refused | control_token_in_text",
        ),
    ),
}


def sample_schema(table: str, kind: Kind) -> pl.Schema:
    """The columns of a table, with the dtypes of a chat or text dataset."""
    text: Any = MESSAGES if kind == "chat" else pl.String
    return pl.Schema({column.name: text if column.dtype is None else column.dtype for column in SAMPLE_TABLES[table]})
