"""THE on-disk format of a dataset: names, columns, dtypes, and the key of a reference. No input or output here.

    DATASET/
      manifest.json                    written last: a directory without one is an unfinished build
      README.md                        dataset card: YAML for the Hugging Face hub and `datasets`, then for a person
      views.sql                        the DuckDB views, relative paths
      .lock                            one writer at a time; .building/ and .drafts/: of a build that is not finished
      pairs/part-train-00000.parquet   only pairs fit to train on; a part holds one split, here of train
      pairs/part-test-00000.parquet    those held out
      dropped/part-00000.parquet       what a named rule removed, and why
      rejects/part-00000.parquet       lines that could not become a record, raw
      changes/part-00000.parquet       of a repaired dataset: what was done to which pair, and why
      audit/tokens.parquet             how often each word or n-gram is in chosen only, in rejected only, in both
      audit/structure.parquet          length, markup, openers, endings, generators: which side has more
      audit/probe.parquet              how far shallow features alone predict chosen
      audit/pair_scores.parquet        by pair: how much of it they give away
      audit/audit.json                 the verdict, the findings, what to do
      reference/<key>/                 reference.json (last), plan.parquet (first), part-00000.parquet, dropped.parquet,
                                       chat_template.jinja in a chat dataset
      runs/<n>/                        run.json, steps.parquet and perf.parquet (live: .jsonl), pair_dynamics/,
                                       checkpoints/, best/, trackers/, model/
      sweeps/<key>/                    sweep.json (which settings are which run), table.parquet
      runs/<n>/evaluations/<key>/      evaluation.json (last), summary.parquet, prompts.parquet
      samples/<key>/                   responses of a model that evaluations of several runs share (sample_format.py)

`schemas/FORMAT.md` and `schemas/*.json` are generated from this module and from `records.py`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import polars as pl

FORMAT_VERSION = 5

Kind: TypeAlias = Literal["chat", "text"]
Split: TypeAlias = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")  # in the order of their parts

MANIFEST = "manifest.json"
CARD = "README.md"
VIEWS = "views.sql"
LOCK = ".lock"
AUDIT_TOKENS = "audit/tokens.parquet"
AUDIT_STRUCTURE = "audit/structure.parquet"
AUDIT_PROBE = "audit/probe.parquet"
AUDIT_SCORES = "audit/pair_scores.parquet"
CHANGES_TABLE = "changes"
AUDIT_JSON = "audit/audit.json"
REFERENCES = "reference"
REFERENCE_JSON = "reference.json"
REFERENCE_PLAN = "plan.parquet"
REFERENCE_DROPPED = "dropped.parquet"
RUNS = "runs"
RUN_JSON = "run.json"
STEPS = "steps.parquet"
STEPS_LIVE = "steps.jsonl"
PERF = "perf.parquet"
PERF_LIVE = "perf.jsonl"
DYNAMICS = "pair_dynamics"
CHECKPOINTS = "checkpoints"
BEST = "best"
TRACKERS = "trackers"
MODEL = "model"
SWEEPS = "sweeps"
SWEEP_JSON = "sweep.json"
SWEEP_TABLE = "table.parquet"
EVALUATIONS = "evaluations"
EVALUATION_JSON = "evaluation.json"
EVALUATION_SUMMARY = "summary.parquet"
EVALUATION_PROMPTS = "prompts.parquet"
SAMPLED = "samples"  # folders of sampled responses

ROWS_PER_GROUP = 50_000  # 10k-50k: a filtered DuckDB scan is 8 ms against 124 ms, and the file is no larger
ROWS_PER_PART = 500_000

# in memory a message always has all three; on disk `extra` is left out of a dataset in which no message has any
MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String, "extra": pl.String}))
PLAIN_MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
TEXT_OR_MESSAGES = "string | list<struct<role, content[, extra]>>"
# what a message may hold besides role and content: a JSON object in `extra`, null where it holds none of them
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


class Column(NamedTuple):
    """One column of a table: `dtype` None stands for text in a text dataset and messages in a chat dataset."""

    name: str
    dtype: pl.DataType | type[pl.DataType] | None
    doc: str


TEXTS = (
    Column("prompt", None, "what both sides answer; in a chat dataset it ends with a user turn"),
    Column("chosen", None, "the preferred reply"),
    Column("rejected", None, "the other reply"),
    Column("tools", pl.String, "JSON list of the tools that the prompt offers, null without; chat only"),
)

ORIGIN = (
    Column("method", pl.String, "correction | best_of_n | comparison | paired"),
    Column("source", pl.String, "the file it came from, as the pipeline names it"),
    Column(
        "source_row",
        pl.Int64,
        "1-based line (or row) in that file; of the chosen side where two rows made the pair",
    ),
    Column("annotator", pl.String, "who preferred: human | model | rule | null"),
    Column("chosen_score", pl.Float64, "the source's own score, null if it gives none"),
    Column("rejected_score", pl.Float64, "likewise"),
    Column(
        "margin",
        pl.Float64,
        "how much better chosen scored, above 0 whichever direction the source counts in",
    ),
    Column("agreement", pl.Float64, "share of votes for chosen, 0..1, null without votes"),
    Column("chosen_model", pl.String, "generator of chosen, null if unknown"),
    Column("rejected_model", pl.String, "generator of rejected, null if unknown"),
    Column("num_candidates", pl.Int64, "distinct scored candidates of the prompt, null but for best_of_n"),
    Column(
        "edit_distance",
        pl.Float64,
        "words to insert, delete or replace between the sides / words of the longer one, 0..1; corrections only, and "
        "null where a side has more than 20,000 words",
    ),
    Column(
        "shared_prefix",
        pl.Float64,
        "words that both sides begin with / words of the shorter one, 0..1; corrections only",
    ),
    Column("first_divergence", pl.Int64, "0-based word at which the sides part; corrections only"),
    Column("weight", pl.Float64, "weight of the pair in the loss, 1 unless the source says otherwise"),
)

PAIRS = (
    Column("pair_id", pl.String, "sha256 hex over kind, prompt, chosen and rejected, exactly as they are"),
    Column("prompt_id", pl.String, "sha256 hex over kind and prompt"),
    *TEXTS,
    Column("split", pl.String, "train | test, by prompt"),
    *ORIGIN,
)

DROPPED = (
    Column("stage", pl.String, "pairs | validate | decontaminate | dedupe | repair"),
    Column("reason", pl.String, "the rule's name"),
    Column("duplicate_of", pl.String, "pair_id of the pair in `pairs` that a (near-)duplicate repeats, else null"),
    Column("contradicts", pl.String, "pair_id of a pair that prefers the other way round, of contradictions only"),
    Column(
        "jaccard",
        pl.Float64,
        "the smaller of the two sides' similarities to duplicate_of, 0..1; in a chain it may be below the threshold",
    ),
    Column("cluster_id", pl.Int64, "number of the near-duplicate cluster that a near-duplicate is of, else null"),
    Column("eval_item", pl.String, "file:id of the evaluation item that a contaminated pair holds, else null"),
    Column("eval_overlap", pl.Float64, "share of the item's words that are covered, 0..1"),
    Column("eval_side", pl.String, "prompt | chosen | rejected: where"),
    *(column for column in PAIRS if column.name != "split"),
)

REJECTS = (
    Column("source", pl.String, "the file, as the pipeline names it"),
    Column("line", pl.Int64, "1-based line (or row) in that file"),
    Column("field", pl.String, "the field at fault, null where the whole line is"),
    Column("reason", pl.String, "the rule's name"),
    Column("raw", pl.String, "the line as it was read; bytes that are no UTF-8 are escaped"),
)

TOKENS = (
    Column(
        "token", pl.String, r"\w+|[^\w\s] over casefolded NFC text, n of them joined by spaces; or decoded token ids"
    ),
    Column("n", pl.Int32, "length of the n-gram, 1..3"),
    Column("alphabet", pl.String, "word | model: the tokens that DPO sees"),
    Column("token_ids", pl.List(pl.Int32), "of the model alphabet, null for words"),
    Column("num_chosen_only", pl.Int64, "pairs with it in chosen and not in rejected: b"),
    Column("num_rejected_only", pl.Int64, "pairs with it in rejected and not in chosen: c"),
    Column("num_both", pl.Int64, "pairs with it on both sides"),
    Column("num_discordant", pl.Int64, "b + c; the table begins at audit.min_discordant"),
    Column("num_prompts", pl.Int64, "prompts with more such pairs on one side; b + c where each prompt has one pair"),
    Column("coverage", pl.Float64, "(b + c) / pairs, 0..1"),
    Column("win_rate", pl.Float64, "b / (b + c), 0..1"),
    Column("win_rate_low", pl.Float64, "95% Wilson interval of it"),
    Column("win_rate_high", pl.Float64, "likewise"),
    Column("odds_ratio", pl.Float64, "conditional: (b + .5) / (c + .5), which is Firth's estimate without length"),
    Column("log_odds_se", pl.Float64, "standard error of its logarithm: sqrt(1 / (b + .5) + 1 / (c + .5))"),
    Column(
        "p", pl.Float64, "exact two-sided sign test over prompts, each counted once (McNemar where each has one pair)"
    ),
    Column("q", pl.Float64, "Benjamini-Hochberg over the alphabet's n-grams with num_prompts >= 10, null below"),
    Column("q_by", pl.Float64, "Benjamini-Yekutieli over the same: holds under any dependence"),
    Column("p_permutation", pl.Float64, "sign flips by prompt, maximum statistic: family-wise; null but for --strict"),
    Column(
        "z_length", pl.Float64, "score test of the token beside the length difference; near 0: it only echoes length"
    ),
    Column(
        "log_odds_length",
        pl.Float64,
        "Firth's log-odds beside the length difference, of tokens that are findings by name; else null",
    ),
    Column(
        "log_odds_z", pl.Float64, "Monroe's log-odds with an informative Dirichlet prior, as z: to rank, not to test"
    ),
    Column("side", pl.String, "chosen | rejected: where it is more frequent; null where b = c"),
    Column("one_sided", pl.Boolean, "the other side has it in no discordant pair, and num_prompts >= 20"),
    Column("exclusive", pl.Boolean, "one_sided, and in no text of the other side at all"),
    Column("allowed", pl.Boolean, "on the pipeline's audit.allow list: reported, never a finding"),
)

STRUCTURE = (
    Column("feature", pl.String, "words | list_items | refusal | ... | generator; audit.json says what each measures"),
    Column(
        "value", pl.String, "of a categorical feature, the value the row is about (first_words: certainly); else null"
    ),
    Column("family", pl.String, "length | markup | opener | wording | prompt | ending | text | generator"),
    Column("num_chosen_more", pl.Int64, "pairs whose chosen side has more of it: b"),
    Column("num_rejected_more", pl.Int64, "pairs whose rejected side has more of it: c"),
    Column("num_both", pl.Int64, "pairs with some of it on both sides"),
    Column("num_discordant", pl.Int64, "b + c"),
    Column("num_prompts", pl.Int64, "prompts with more such pairs on one side; b + c where each prompt has one pair"),
    Column("coverage", pl.Float64, "(b + c) / pairs, 0..1"),
    Column("mean_chosen", pl.Float64, "mean over chosen sides; of a value, the share that has it"),
    Column("mean_rejected", pl.Float64, "likewise"),
    Column(
        "effect",
        pl.Float64,
        "standardised paired effect: mean difference / its standard deviation; null where constant",
    ),
    Column("effect_low", pl.Float64, "95% interval of it"),
    Column("effect_high", pl.Float64, "likewise"),
    Column("win_rate", pl.Float64, "b / (b + c), null where b + c = 0"),
    Column("win_rate_low", pl.Float64, "95% Wilson interval of it"),
    Column("win_rate_high", pl.Float64, "likewise"),
    Column("p", pl.Float64, "exact two-sided sign test over prompts, each counted once; null where there is none"),
    Column("q", pl.Float64, "Benjamini-Hochberg over the rows with num_prompts >= 10, null below"),
    Column("z_length", pl.Float64, "score test of the difference's sign beside the length difference; null for words"),
    Column("side", pl.String, "chosen | rejected: which has more; null where b = c"),
    Column("one_sided", pl.Boolean, "as in tokens"),
    Column("exclusive", pl.Boolean, "one_sided, and no side of the other kind has any at all"),
    Column("allowed", pl.Boolean, "on the pipeline's audit.allow list: reported, never a finding"),
)

PROBE = (
    Column("probe", pl.String, "length | structure | words | both (structure and words) | generator"),
    Column("source", pl.String, "the pairs of one source only (the same probe), null: all"),
    Column("num_pairs", pl.Int64, "pairs it is measured on, each by a fit that saw no pair of its prompt"),
    Column("num_prompts", pl.Int64, "distinct prompts among them"),
    Column("num_features", pl.Int64, "features it was given"),
    Column("accuracy", pl.Float64, "share of pairs whose chosen side it prefers, 0..1; a draw counts one half"),
    Column("accuracy_low", pl.Float64, "95% interval of it, by prompt"),
    Column("accuracy_high", pl.Float64, "likewise"),
    Column("log_loss", pl.Float64, "mean of -ln P(chosen), in nats; ln 2 = .6931 knows nothing"),
    Column("band", pl.String, "fine | note | warn | fail, by audit.limits; null: too few pairs to say"),
)

PAIR_SCORES = (
    Column("pair_id", pl.String, "pair"),
    Column("num_chosen_words", pl.Int64, "words of the chosen side"),
    Column("num_rejected_words", pl.Int64, "likewise"),
    Column("length_margin", pl.Float64, "log-odds of chosen by the probe that sees length, not fitted on this prompt"),
    Column("structure_margin", pl.Float64, "likewise, structure"),
    Column("words_margin", pl.Float64, "likewise, words"),
    Column("shortcut_score", pl.Float64, "likewise, both: the higher, the more of the pair shallow features give away"),
)

CHANGES = (
    Column("pair_id", pl.String, "of the dataset that was repaired"),
    Column("new_pair_id", pl.String, "of the edited pair, null where it was dropped"),
    Column("action", pl.String, "dropped | edited"),
    Column("reason", pl.String, "the repair, by name: drop_shortcuts | balance | match_length | strip_opener | ..."),
    Column("detail", pl.String, "what was balanced or cut off, and why this pair"),
    Column("chosen_before", None, "of an edited pair, null where it was dropped"),
    Column("rejected_before", None, "likewise"),
)

PLAN = (
    Column("pair_id", pl.String, "pair"),
    Column("batch", pl.Int32, "batch it is scored in"),
    Column("part", pl.Int32, "part-NNNNN.parquet that the batch is written to"),
    Column("num_tokens", pl.Int32, "prompt + chosen + rejected tokens of the pair"),
    Column(
        "max_batch_tokens",
        pl.Int64,
        "tokens that the batch's pairs were to have at most, a longer pair alone; null in a plan of an earlier release",
    ),
    Column(
        "num_boundary_tokens",
        pl.Int32,
        "last tokens of the tokenised prompt that are no prefix of prompt + completion",
    ),
    Column("num_unended", pl.Int32, "sides whose completion ends without any end token, 0..2"),
    Column(
        "spells_control_token",
        pl.Boolean,
        "its text spells a special token of the tokenizer; it was encoded as text",
    ),
    Column("prompt_cut", pl.Boolean, "the prompt was cut from its left (long_prompt: cut)"),
)

TOKEN_IDS = pl.List(pl.Int32)

REFERENCE = (
    Column("pair_id", pl.String, "pair"),
    Column("prompt_ids", TOKEN_IDS, "exactly the tokens that were scored against, after template and truncation"),
    Column("chosen_ids", TOKEN_IDS, "likewise, the completion only"),
    Column("rejected_ids", TOKEN_IDS, "likewise"),
    Column("num_prompt_tokens", pl.Int32, "length of prompt_ids"),
    Column("num_chosen_tokens", pl.Int32, "length of chosen_ids"),
    Column("num_rejected_tokens", pl.Int32, "length of rejected_ids"),
    Column(
        "ref_chosen_logps",
        pl.Float32,
        "log-probability of chosen given prompt: the SUM over its tokens, in nats",
    ),
    Column("ref_rejected_logps", pl.Float32, "likewise"),
    Column("ref_chosen_token_logps", pl.List(pl.Float32), "one log-probability a completion token, in nats"),
    Column("ref_rejected_token_logps", pl.List(pl.Float32), "likewise"),
    Column("chosen_truncated", pl.Boolean, "chosen was cut off at max_length"),
    Column("rejected_truncated", pl.Boolean, "likewise"),
    Column(
        "ln_ches", pl.Float32, "length-normalised CHES (arXiv 2410.08847); null where the model's own head was used"
    ),
)

REFERENCE_DROPPED_COLUMNS = (
    Column("pair_id", pl.String, "pair"),
    Column("reason", pl.String, "why encoding dropped it: prompt_too_long | identical_after_truncation | ..."),
)

# with TRL's names where TRL has one; log-probs and log-ratios (policy - reference) are of whole completions, in nats
SIDE_METRICS: Mapping[str, str] = {
    "loss": "weighted mean of the losses",
    "rewards/chosen": "beta * log-ratio of chosen",
    "rewards/rejected": "likewise",
    "rewards/accuracies": "share of pairs whose margin is above 0",
    "rewards/margins": "rewards/chosen - rewards/rejected",
    "logps/chosen": "log-prob under the policy",
    "logps/rejected": "likewise",
    "nll/chosen": "negative log-likelihood of chosen, a token: what sft_weight weighs",
    "drift/chosen": "log-ratio of chosen: below 0 it has become less likely than under the reference",
    "drift/rejected": "likewise",
    "drift/displaced": "share of pairs whose margin is above 0 while chosen has become less likely",
    "kl/chosen": "exp(d) - 1 - d of a token's log-ratio d, a token of chosen: an estimate of KL(reference || policy), "
    "unbiased where the reference has written the text",
    "kl/rejected": "likewise",
}

STEPS_COLUMNS = (
    Column("step", pl.Int64, "optimiser updates already made, so the first row is 0"),
    Column("epoch", pl.Float64, "passes over the training pairs already made"),
    Column("num_pairs", pl.Int64, "pairs in this step's batch, null on the last row"),
    Column("learning_rate", pl.Float64, "rate of this step's update, null on the last row"),
    Column("grad_norm", pl.Float64, "gradient norm before clipping, null on the last row"),
    Column("beta", pl.Float64, "beta of this step's loss and rewards"),
    *(
        Column(name, pl.Float64, f"{doc}; mean over this step's batch, before its update")
        for name, doc in SIDE_METRICS.items()
    ),
    *(
        Column(f"eval_{name}", pl.Float64, "the same over the test split, null where not evaluated")
        for name in SIDE_METRICS
    ),
)

PERF_COLUMNS = (
    Column("step", pl.Int64, "the update that was measured, as in steps"),
    Column("seconds", pl.Float64, "wall-clock time of the update, without evaluations and checkpoints"),
    Column("num_tokens", pl.Int64, "prompt + chosen + rejected tokens of its pairs, all processes"),
    Column("tokens_per_second", pl.Float64, "num_tokens / seconds"),
    Column("mfu", pl.Float64, "model FLOPs / (seconds x peak of all devices), 0..1; null where the peak is not known"),
    Column("peak_memory", pl.Int64, "bytes, of the process that has needed most so far: device memory, or RAM"),
)

DYNAMICS_COLUMNS = (
    Column("step", pl.Int64, "optimiser updates already made when the pair was seen"),
    Column("pair_id", pl.String, "pair; of a step the longest first, by pair_id where they are equal"),
    Column("rewards_chosen", pl.Float32, "beta * (policy - reference) of chosen, in nats"),
    Column("rewards_rejected", pl.Float32, "likewise"),
    Column("margin", pl.Float32, "rewards_chosen - rewards_rejected"),
)

# a view over pair_dynamics, without files of its own. Of a run's first update nothing counts: it is scored before the
# policy has moved, and where policy and reference are one model its margins are float noise around 0
LEARNING_COLUMNS = (
    Column("pair_id", pl.String, "pair that was seen after the first update"),
    Column("num_seen", pl.Int64, "times it was, each before the update that it was part of"),
    Column("num_right", pl.Int64, "of these, times its margin was above 0"),
    Column("num_flips", pl.Int64, "changes between right and wrong from one time to the next"),
    Column("num_forgotten", pl.Int64, "changes from right to wrong"),
    Column("history", pl.String, "a character a time, in order: 1 right, 0 wrong"),
    Column("first_step", pl.Int64, "step at which it was first seen"),
    Column("learned_step", pl.Int64, "step from which on it was right each time, null where it ended wrong"),
    Column("first_margin", pl.Float32, "margin when it was first seen; of the first pass: before it was trained on"),
    Column("early_margin", pl.Float32, "mean of the first two: before it was trained on, and after one pass"),
    Column("last_margin", pl.Float32, "margin when it was last seen, all earlier passes having trained on it"),
    Column("mean_margin", pl.Float64, "mean over all times"),
)

# the run's last row of steps and its run.json, beside what its evaluation measured on fresh samples
SWEEP_COLUMNS = (
    Column("number", pl.Int32, "of the combination, from 1 on: the last setting varies fastest"),
    Column("settings", pl.String, "what varies, a JSON object from dotted key to value"),
    Column("state", pl.String, "done | failed"),
    Column("run", pl.String, "its directory below runs/, null where none was begun"),
    Column("loss_type", pl.String, "train.loss"),
    Column("beta", pl.Float64, "train.beta"),
    Column("learning_rate", pl.Float64, "train.learning_rate"),
    Column("seed", pl.Int64, "train.seed"),
    Column("steps", pl.Int64, "updates made"),
    Column("loss", pl.Float64, "of the last logged step"),
    Column("eval_loss", pl.Float64, "of the final model on the test split, null without one"),
    Column("eval_rewards/accuracies", pl.Float64, "likewise"),
    Column("eval_rewards/margins", pl.Float64, "likewise"),
    Column("temperature", pl.Float64, "at which the run was sampled from: the first of evaluate.temperatures"),
    Column("scorer", pl.String, "who scored the samples: the first of the scorers, null without"),
    Column("reward", pl.Float64, "mean score of the run's samples"),
    Column("reward_gain", pl.Float64, "its mean score less the reference's, over the same prompts"),
    Column("reward_gain_low", pl.Float64, "interval of it, of evaluate.confidence"),
    Column("reward_gain_high", pl.Float64, "likewise"),
    Column("kl", pl.Float64, "KL(run || reference) of a whole response at temperature 1, in nats"),
    Column("kl_low", pl.Float64, "interval of it"),
    Column("kl_high", pl.Float64, "likewise"),
    Column("win_rate", pl.Float64, "share of comparisons that the run's samples win, a tie counts one half"),
    Column("reason", pl.String, "why it failed, null where it is done"),
)

EVALUATION_COLUMNS = (
    Column(
        "role",
        pl.String,
        "policy | reference | other (the model of --against) | chosen | difference: policy minus reference | ratio: "
        "policy over reference",
    ),
    Column("temperature", pl.Float64, "that responses were sampled at; null of what needs none"),
    Column("scorer", pl.String, "who gave the score or the verdict, else null"),
    Column("metric", pl.String, "what is measured: docs/evaluation.md has all"),
    Column("value", pl.Float64, "of it"),
    Column("low", pl.Float64, "interval by prompt (evaluate.confidence), null where there is none"),
    Column("high", pl.Float64, "likewise"),
    Column("num_prompts", pl.Int64, "prompts behind it; of held-out pairs their prompts, of texts the texts' prompts"),
    Column("num_responses", pl.Int64, "responses, comparisons, pairs or texts behind it"),
)

EVALUATION_PROMPT_COLUMNS = (
    Column("prompt_id", pl.String, "as in pairs: sha256 over kind and prompt"),
    Column("prompt", None, "what was answered"),
    Column("temperature", pl.Float64, "that responses were sampled at"),
    Column("scorer", pl.String, "a row each; null where there is none"),
    Column("policy_reward", pl.Float64, "mean score of the policy's responses, null of a judge"),
    Column("reference_reward", pl.Float64, "likewise, of the reference"),
    Column("gain", pl.Float64, "policy_reward - reference_reward"),
    Column("win", pl.Float64, "share of comparisons that the policy wins, a tie a half"),
    Column("num_compared", pl.Int64, "comparisons behind it; a judge's inconsistent ones are not among them"),
    Column("num_inconsistent", pl.Int64, "of a judge: verdicts that changed with the order"),
    Column("kl", pl.Float64, "nats a response from the reference; at temperature 1 only"),
    Column("policy_tokens", pl.Float64, "mean tokens of a response"),
    Column("reference_tokens", pl.Float64, "likewise"),
    Column("policy_cut_off", pl.Float64, "share of responses that max_new_tokens ended"),
    Column("reference_cut_off", pl.Float64, "likewise"),
    Column("policy_distinct", pl.Float64, "different responses over responses, null of one"),
    Column("reference_distinct", pl.Float64, "likewise"),
    Column("num_responses", pl.Int64, "of the policy"),
)

# every table a reader may meet: name, columns, and where its files lie below the dataset
TABLES: Mapping[str, tuple[Column, ...]] = {
    "pairs": PAIRS,
    "dropped": DROPPED,
    "rejects": REJECTS,
    "tokens": TOKENS,
    "structure": STRUCTURE,
    "probe": PROBE,
    "pair_scores": PAIR_SCORES,
    "changes": CHANGES,
    "reference": REFERENCE,
    "plan": PLAN,
    "reference_dropped": REFERENCE_DROPPED_COLUMNS,
    "steps": STEPS_COLUMNS,
    "perf": PERF_COLUMNS,
    "pair_dynamics": DYNAMICS_COLUMNS,
    "learning": LEARNING_COLUMNS,
    "sweeps": SWEEP_COLUMNS,
    "evaluations": EVALUATION_COLUMNS,
    "evaluation_prompts": EVALUATION_PROMPT_COLUMNS,
}


def text_dtype(kind: Kind, *, plain: bool = False) -> pl.DataType | type[pl.DataType]:
    """The dtype of prompt, chosen and rejected in a dataset of that kind; `plain`: without `extra`."""
    return pl.String if kind == "text" else PLAIN_MESSAGES if plain else MESSAGES


def schema(table: str, kind: Kind, *, plain: bool = False) -> pl.Schema:
    """The Polars schema of one table in a dataset of that kind, columns in their order on disk.

    `plain`: as on disk where no message of the dataset has any `extra`.
    """
    texts = text_dtype(kind, plain=plain)
    return pl.Schema({c.name: texts if c.dtype is None else c.dtype for c in TABLES[table]})


def part_name(number: int, split: Split | None = None) -> str:
    """`part-00007.parquet` for 7; of a table whose parts hold one split each `part-test-00007.parquet`."""
    return f"part-{split}-{number:05d}.parquet" if split else f"part-{number:05d}.parquet"


def part_split(file: str) -> Split | None:
    """The split whose pairs a part holds, by its name; None for a part of a table without splits."""
    return next((split for split in SPLITS if file.startswith(f"part-{split}-")), None)


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, no escapes. What is hashed is always this."""
    return _ENCODER.encode(value)


def reference_key(identity: Mapping[str, object]) -> str:
    """The directory name of a reference: the first 16 hex digits of sha256 over its identity settings."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two identities differ, each with both values, long ones cut."""
    lines = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{name}.{line}" for line in differing(a, b)]
        else:
            lines.append(f"{name}: {_short(a)} and {_short(b)}")
    return lines


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "..."
