"""The sections of a pipeline file as frozen pydantic models, each setting documented where it stands.

Comes in: plain settings. Goes out: a `Pipeline`, or what pydantic says of the first key that does not fit; config.py
makes a sentence of it.
"""

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefkit.audit.features import FEATURES
from prefkit.audit.values import CATEGORICAL
from prefkit.format import Kind
from prefkit.formats import FORMATS
from prefkit.formats.comparisons import label_key
from prefkit.text import WORD

REJECTED = re.compile(r"worst|random|all|sigma:\d+(\.\d+)?")
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]B)", re.IGNORECASE)
MIN_MEMORY, MAX_MEMORY = 1e6, 1e15  # bytes
FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
SEVERAL_PATHS = {"prompt", "responses", "scores", "models", "score", "winner"}
NEED_FORMAT = {"columns", "direction", "labels", "rules"}
AUDITED = list(dict.fromkeys([*FEATURES, *(of.feature for of in CATEGORICAL.values()), "distinct_replies"]))
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """What every section is: frozen, without unknown keys, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _bytes(size: str) -> float:
    number, unit = SIZE.fullmatch(size).groups()  # type: ignore[union-attr]
    return float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()]


def num_bytes(size: str) -> int:
    """`500MB` as a number; of a text that `check_size` has passed."""
    return int(_bytes(size))


def check_size(size: str, key: str) -> None:
    """Refuse what is no size, or one out of range, by the name of its key."""
    if not SIZE.fullmatch(size):
        raise ValueError(f"{key}: {size} is not a size such as 500MB or 4GB")
    if not MIN_MEMORY <= _bytes(size) <= MAX_MEMORY:
        raise ValueError(f"{key}: {size} is not between 1MB and 1000000GB")


class Labels(Section):
    """What the winner column of comparisons says: which labels stand for the first side, the second, and neither."""

    a: Annotated[list[str | int | float | bool], Field(min_length=1)]
    b: Annotated[list[str | int | float | bool], Field(min_length=1)]
    tie: list[str | int | float | bool] = []

    @model_validator(mode="after")
    def _one_meaning(self) -> "Labels":
        named = [label_key(label) for labels in (self.a, self.b, self.tie) for label in labels]
        if twice := next((label for label in named if named.count(label) > 1), None):
            raise ValueError(f"labels: {twice} is given twice")
        return self


class RewriteRule(Section):
    """One step from a response to its correction: a regular expression, or a Python function."""

    pattern: str | None = Field(None, description="regular expression (Python); every match is replaced")
    replace: str = Field("", description=r"what takes its place; \1 or \g<name> for groups")
    ignore_case: bool = False
    function: str | None = Field(None, description="module:function, from text to text; from the working directory")
    gone: list[str] = Field([], description="texts that no correction may hold, in upper or lower case: an old name")

    @model_validator(mode="after")
    def _one_of_two(self) -> "RewriteRule":
        if (self.pattern is None) == (self.function is None):
            raise ValueError("a rewrite rule has either pattern: or function:")
        if self.function is not None:
            if not FUNCTION.fullmatch(self.function):
                raise ValueError(f"rules.function: {self.function} is not module:function")
            if self.model_fields_set & {"replace", "ignore_case"}:
                raise ValueError("replace: and ignore_case: have no effect on a rule with function:")
        else:
            self._check_pattern(self.pattern or "", self.replace)
        return self

    @staticmethod
    def _check_pattern(pattern: str, replace: str) -> None:
        if not pattern:
            raise ValueError("rules.pattern: an empty one matches everywhere")
        try:
            re.compile(f"(?:{pattern})?").sub(replace, "")  # matches the empty text, so that the template is read
        except (re.error, IndexError) as error:
            raise ValueError(f"rules.pattern {pattern!r} with replace {replace!r}: {error}") from None


class SourceConfig(Section):
    """One source: a file, or a glob of files in the same format."""

    path: str = Field(description="file or glob, relative to the working directory")
    format: Annotated[str, Field(json_schema_extra={"enum": sorted(FORMATS)})] | None = Field(
        None, description="prefkit formats lists them; left out: found by the first rows"
    )
    columns: dict[str, str | Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="our field name: the file's, dotted paths allowed; null: leave out what the file has under it"
    )
    direction: Literal["higher_is_better", "lower_is_better"] = "higher_is_better"
    labels: Labels | None = Field(None, description="of comparisons: what their winner column says")
    rules: list[RewriteRule] = Field([], description="of format rewrite: what makes the correction, in order")
    annotator: Literal["human", "model", "rule"] | None = Field(
        None, description="who preferred, where the rows do not say"
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _null_is_no_path(cls, value: Any) -> Any:
        return {k: "" if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is not None and value not in FORMATS:
            near = difflib.get_close_matches(value, FORMATS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"format: {value} is not known; {hint}prefkit formats lists them")
        return value

    @model_validator(mode="after")
    def _what_needs_a_format(self) -> "SourceConfig":
        if self.format is None and (given := sorted(self.model_fields_set & NEED_FORMAT)):
            raise ValueError(f"{given[0]}: needs format:, as it is the format that says what they mean")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "SourceConfig":
        if self.format is None:
            return self
        form = FORMATS[self.format]
        if self.direction == "lower_is_better" and not form.scored:
            own = f": {form.direction}" if form.direction else ", which has no scores"
            raise ValueError(f"direction: lower_is_better has no effect on {self.format}{own}")
        if self.labels is not None and "winner" not in form.columns:
            raise ValueError(f"labels: has no effect on {self.format}: it is for comparisons")
        if bool(self.rules) != (form.family == "responses"):
            what = "needs rules:" if form.family == "responses" else "takes no rules:, format: rewrite does"
            raise ValueError(f"format: {self.format} {what}")
        return self

    @model_validator(mode="after")
    def _known_columns(self) -> "SourceConfig":
        if self.format is None:
            return self
        form = FORMATS[self.format]
        known = form.columns
        for name, where in self.columns.items():
            if where == "" and name in form.required:
                raise ValueError(f"columns.{name}: {self.format} cannot do without it")
            if isinstance(where, list) and name in known and name not in SEVERAL_PATHS:
                raise ValueError(f"columns.{name}: takes one path; several are for {', '.join(sorted(SEVERAL_PATHS))}")
            if not known:
                raise ValueError(f"columns.{name}: {self.format} has its own names, which are not mapped")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"columns.{name}: {self.format} has the fields {', '.join(known)}{hint}")
        return self


class PairsConfig(Section):
    """How candidates and comparisons become pairs, and the bounds that every pair keeps to.

    A key that no source of the pipeline can use is refused by the build.
    """

    chosen: Literal["best", "all_above"] = Field(
        "best", description="of candidates. best: the best one; all_above: each that scores above the rejected one"
    )
    rejected: Annotated[str, Field(json_schema_extra={"pattern": REJECTED.pattern})] = Field(
        "worst",
        description="of candidates. worst | random | all | sigma:K, the one nearest to mean - K standard deviations",
    )
    min_margin: Annotated[float, Field(ge=0)] = Field(
        0.0, description="smallest score difference of a pair, from whatever source; a pair without scores stays"
    )
    max_margin: Annotated[float, Field(gt=0)] | None = Field(None, description="largest one, likewise")
    min_chosen_score: float | None = Field(
        None, description="what chosen must reach, in the source's own scores and direction; likewise"
    )
    length_cap: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest |ln(characters of chosen / of rejected)|, of pairs from any source; .69 allows twice"
    )
    max_pairs_per_prompt: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="of candidates, those of the largest margins are made; then, from all sources together, as many "
        "pairs of a prompt (and of those nearly the same) are kept: a human's first, then the largest margins",
    )
    scorers: Literal["rank", "zscore"] = Field(
        "rank",
        description="several scorers of candidates: mean rank within the prompt, or mean z-score within the prompt",
    )
    scorers_agree: bool = Field(
        False, description="only pairs of candidates on which no scorer prefers the rejected side"
    )
    min_agreement: Share = Field(0.0, description="smallest share of a comparison's votes for chosen")
    seed: int = Field(0, description="of rejected: random")

    @model_validator(mode="after")
    def _sound(self) -> "PairsConfig":
        if not REJECTED.fullmatch(self.rejected):
            raise ValueError(f"pairs.rejected: {self.rejected} is not worst, random, all or sigma:K (sigma:2)")
        if self.max_margin is not None and self.max_margin < self.min_margin:
            raise ValueError("pairs.max_margin must not be below pairs.min_margin")
        return self


class ValidateConfig(Section):
    """What a pair must satisfy."""

    max_reject_share: Share = Field(0.1, description="the build stops when more of a source's lines are rejects")
    max_chars: Annotated[int, Field(gt=0)] = Field(200_000, description="longest prompt or side, in characters")
    score_scale: tuple[float, float] | None = Field(None, description="lowest and highest score that a source may give")
    meta_phrases: Literal["drop", "keep"] = Field(
        "drop", description="corrections that speak of being one (here is the revised version)"
    )

    @model_validator(mode="after")
    def _low_to_high(self) -> "ValidateConfig":
        if self.score_scale is not None and not self.score_scale[0] <= self.score_scale[1]:
            raise ValueError("validate.score_scale must be given from low to high")
        return self


class NearDuplicatesConfig(Section):
    """Which pairs are nearly the same, by the Jaccard similarity of the n-grams of words that they hold."""

    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="smallest similarity of prompts of one cluster, and of both sides of near-duplicates"
    )
    ngram: Annotated[int, Field(ge=1, le=32)] = Field(5, description="words of an n-gram of chosen and rejected")
    prompt_ngram: Annotated[int, Field(ge=1, le=32)] = Field(3, description="likewise, of prompts")
    num_perm: Annotated[int, Field(ge=16, le=1024)] = Field(
        128, description="permutations of a MinHash signature, at most; more find more of what is near the threshold"
    )
    weights: tuple[Share, Share] = Field(
        (0.05, 0.95), description="what a look in vain and what a miss costs, sum 1: they choose the bands"
    )

    @model_validator(mode="after")
    def _weights_are_shares(self) -> "NearDuplicatesConfig":
        if abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError("dedupe.near_duplicates.weights must sum to 1")
        return self


class DedupeConfig(Section):
    """What counts as the same pair twice, and what happens to pairs that contradict each other."""

    exact: bool = Field(
        True,
        description="drop pairs equal after folding Unicode (NFC) and white space; false: near_duplicates drops them, "
        "under its own name",
    )
    near_duplicates: NearDuplicatesConfig | None = Field(
        NearDuplicatesConfig(),
        description="drop pairs that are nearly the same, and hold prompts that are on one side of the split; null: "
        "only prompts equal after folding are one",
    )
    contradictions: Literal["drop_both", "majority", "higher_margin", "keep"] = Field(
        "drop_both", description="A over B and B over A for one prompt"
    )
    cycles: Literal["drop", "keep"] = Field(
        "drop", description="A over B, B over C and C over A for one prompt: the least sure go"
    )


class EvalSetConfig(Section):
    """A file of evaluation items that no pair may hold."""

    path: str = Field(description="file or glob, relative to the working directory")
    columns: list[str | Annotated[list[str], Field(min_length=1)]] = Field(
        [],
        description="the texts of an item, dotted paths allowed; a list of paths is joined to one text; left out: the "
        "columns that evaluation sets usually have, and the build says which",
    )
    id: str | None = Field(None, description="column of the item's name; left out: its line")


class DecontaminateConfig(Section):
    """Pairs that hold evaluation items are dropped."""

    against: list[EvalSetConfig] = Field([], description="evaluation files; a path alone is short for {path: ...}")
    ngram: Annotated[int, Field(ge=2, le=32)] = Field(8, description="words of an n-gram that counts as copied")
    max_overlap: Share = Field(
        0.5, description="largest share of an item's words that n-grams of one text may cover; shorter items: equality"
    )

    @field_validator("against", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return [{"path": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class BuildConfig(Section):
    """What a build may use."""

    memory_limit: str = Field(
        "4GB",
        description="what a build holds at once (500MB, 4GB): texts, and some 600 bytes a pair; the rest lies on disk; "
        "Python itself needs some 250MB more, and each further process 200MB",
    )
    processes: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None, description="that compare texts; left out: as many as there are cores; they write the same bytes"
    )

    @model_validator(mode="after")
    def _a_size(self) -> "BuildConfig":
        check_size(self.memory_limit, "build.memory_limit")
        return self

    def num_bytes(self) -> int:
        """The limit as a number."""
        return num_bytes(self.memory_limit)

    def num_processes(self) -> int:
        """How many processes compare texts."""
        return self.processes or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


class SplitConfig(Section):
    """Which prompts are held out."""

    test_share: Share = Field(0.05, description="share of prompts held out for evaluation")
    seed: int = 0


class AuditLimits(Section):
    """When something is a finding, and how bad one is. The sources of the numbers are in docs/audit.md."""

    q: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="largest false discovery rate of a finding")
    min_coverage: Share = Field(0.005, description="smallest share of pairs that a finding separates")
    win_rate: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.7, description="smallest share of them that one side wins: a note"
    )
    warn_win_rate: Annotated[float, Field(ge=0.5, le=1)] = Field(0.9, description="likewise, a warning")
    fail_coverage: Share = Field(
        0.05, description="share of pairs from which on a token of one side only is a failure; below, a warning"
    )
    z_length: Annotated[float, Field(ge=0)] = Field(
        3.0, description="smallest |z| beside the length difference; below it a token only echoes length"
    )
    structure_z_length: Annotated[float, Field(ge=0)] = Field(
        2.5, description="likewise, of a feature: there are dozens of them, not thousands"
    )
    structure_win_rate: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.6, description="of a count that most texts have (words, lines), whose win rate is a probe of its own: a note"
    )
    warn_structure_win_rate: Annotated[float, Field(ge=0.5, le=1)] = Field(0.75, description="likewise, a warning")
    probe_note: Annotated[float, Field(ge=0.5, le=1)] = Field(0.6, description="held-out accuracy of a probe: a note")
    probe_warn: Annotated[float, Field(ge=0.5, le=1)] = Field(0.75, description="likewise, a warning")
    probe_fail: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.9, description="likewise, a failure: training will likely collapse to the shortcut"
    )
    strict: Literal["not enough data", "note", "warn", "fail"] = Field(
        "warn", description="--strict exits 1 at this verdict or worse"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "AuditLimits":
        for names in (
            ("win_rate", "warn_win_rate"),
            ("structure_win_rate", "warn_structure_win_rate"),
            ("probe_note", "probe_warn", "probe_fail"),
        ):
            values = [getattr(self, name) for name in names]
            if values != sorted(values):
                raise ValueError(f"audit.limits: {', '.join(names)} must not fall")
        return self


class AuditConfig(Section):
    """What the audit counts, what it may overlook, and its limits."""

    allow: list[str] = Field(
        [],
        description="words or n-grams that are the point of the data, or re:PATTERN: reported, never a finding",
    )
    allow_features: list[str] = Field([], description="likewise, features of the structure table, by name")
    model: str | None = Field(None, description="folder of a tokenizer: its tokens are counted too (--model)")
    ngrams: Annotated[int, Field(ge=1, le=3)] = Field(3, description="longest n-gram that is counted")
    min_discordant: Annotated[int, Field(ge=1)] = Field(
        10, description="fewest pairs that a row of the tokens table separates; from 10 on it is tested"
    )
    num_flips: Annotated[int, Field(ge=100)] = Field(1000, description="sign flips of --strict's permutation test")
    probe_pairs: Annotated[int, Field(ge=100)] = Field(50_000, description="most pairs that a probe is fitted on")
    memory_limit: str = Field("1GB", description="what the counters of tokens hold at once; the rest on disk")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of folds and flips")
    limits: AuditLimits = AuditLimits()

    @model_validator(mode="after")
    def _sound(self) -> "AuditConfig":
        check_size(self.memory_limit, "audit.memory_limit")
        if self.limits.q * (self.num_flips + 1) < 1:
            raise ValueError("audit.num_flips: too few for audit.limits.q: nothing could be confirmed")
        for entry in self.allow:
            if entry.startswith("re:"):
                if entry == "re:":
                    raise ValueError("audit.allow: re: without a pattern matches no token")
                try:
                    re.compile(entry[3:])
                except re.error as error:
                    raise ValueError(f"audit.allow {entry!r}: {error}") from None
            elif not WORD.search(entry):
                raise ValueError(f"audit.allow: {entry!r} holds no word and no sign")
        for name in self.allow_features:
            if name not in AUDITED:
                near = difflib.get_close_matches(name, AUDITED, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(AUDITED)}"
                raise ValueError(f"audit.allow_features: {name} is no feature of the structure table; {hint}")
        return self


class PrecomputeConfig(Section):
    """The reference pass: which model, and how pairs become tokens."""

    model: str | None = Field(None, description="folder of the reference model and its tokenizer")
    max_length: Annotated[int, Field(gt=1)] = Field(1024, description="longest prompt + completion, in tokens")
    min_completion_tokens: Annotated[int, Field(gt=0)] = Field(
        16, description="room a long prompt must leave for the completion"
    )
    long_prompt: Literal["drop", "cut"] = Field(
        "drop", description="a prompt that leaves less: drop the pair, or cut its left"
    )
    max_boundary_share: Share = Field(
        0.05, description="the pass stops when more prompts are no token prefix of prompt + completion"
    )
    chat_template: str | None = Field(
        None, description="a jinja file, or `transcript`, where the tokenizer has no template"
    )
    dtype: Literal["float32", "bfloat16", "bfloat16_weights"] = "float32"
    max_batch_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None,
        description="prompt + chosen + rejected tokens that a batch holds, a longer pair alone; left out: 2048 on a "
        "CPU; on a GPU what its free memory holds, measured once and kept in the plan",
    )
    attention: Literal["auto", "packed", "flex", "sdpa", "eager"] = Field(
        "auto",
        description="of the reference pass and of training; auto: the fastest that scores this very model right; flex "
        "is compiled, for CUDA",
    )


DPOP_LAMBDA = 50.0  # the paper's (arXiv 2402.13228)


class LoraSettings(Section):
    """A low-rank adapter (arXiv 2106.09685), trained by itself while the model stays as it is."""

    r: Annotated[int, Field(gt=0)] = Field(16, description="its rank")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="its product is scaled by alpha / r")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get one; all-linear: all but the output matrix"
    )
    use_rslora: bool = Field(False, description="scaled by alpha / sqrt(r) (arXiv 2312.03732)")


class TrainConfig(Section):
    """DPO training. max_length, dtype and template are the reference's and stand in its reference.json."""

    model: str | None = Field(None, description="the policy to start from; precompute.model if left out")
    other_reference: bool = Field(
        False, description="the reference is another model on purpose; only its tokenizer must be the policy's"
    )
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "robust", "apo_zero", "apo_down", "dpop"] = (
        Field(
            "sigmoid",
            description="sigmoid_norm and ipo average log-ratios over tokens, as TRL does; ipo_sum is the paper's",
        )
    )
    beta: Annotated[float, Field(gt=0)] = 0.1
    beta_end: Annotated[float, Field(gt=0)] | None = Field(
        None, description="beta of the last update, reached as beta_schedule says; left out: beta throughout"
    )
    beta_schedule: Literal["linear", "cosine"] = "linear"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed share of flipped preferences; sigmoid, sigmoid_norm and robust only"
    )
    dpop_lambda: Annotated[float, Field(gt=0)] = Field(
        DPOP_LAMBDA, description="weight of the penalty on a chosen log-prob below the reference's; dpop only"
    )
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of chosen's negative log-likelihood, a token, that is added to the loss"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: str = Field("adamw", description="rmsprop is the DPO paper's; or any class of torch.optim, by name")
    optimizer_args: dict[str, Any] = Field({}, description="further arguments of its class: betas, eps, momentum...")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lora: LoraSettings | None = Field(None, description="train an adapter; left out: all weights")
    merge_adapter: bool = Field(False, description="the final model is the whole model, the adapter folded into it")
    batch_size: Annotated[int, Field(gt=0)] = Field(8, description="most pairs in a forward and backward pass")
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = Field(
        1, description="batch_size times this are the pairs of an update, in however many processes"
    )
    max_batch_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None,
        description="prompt + chosen + rejected tokens that a pass holds, a longer pair alone, in place of batch_size; "
        "left out: batch_size pairs, and on a CPU no more than 2048 tokens",
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the layers: docs/training.md says what it gains where")
    shard_weights: bool = Field(
        False, description="of several processes each keeps a share of weights, gradients and optimiser (FSDP)"
    )
    max_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="updates; epochs decides if left out")
    epochs: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    eval_steps: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluate every so many updates; the end always is"
    )
    best_metric: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] | None = Field(
        None, description="the final model is the one that was best by it, of all evaluations; left out: the last one"
    )
    early_stopping_patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="stop after so many evaluations without a better best_metric"
    )
    logging_steps: Annotated[int, Field(gt=0)] = Field(1, description="keep every so-manieth row in steps.parquet")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="who else is told every logged step, through accelerate"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one device in this dtype, for perf.mfu, where prefkit does not know its own"
    )
    save_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="checkpoint every so many updates")
    save_total_limit: Annotated[int, Field(gt=0)] = Field(2, description="newest checkpoints kept")
    seed: int = 0

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> "TrainConfig":
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid_norm", "robust"):
            raise ValueError(
                f"train.label_smoothing has no effect on train.loss {self.loss}: it is sigmoid's, sigmoid_norm's and "
                "robust's"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("train.loss robust is sigmoid without train.label_smoothing: set it above 0")
        if self.dpop_lambda != DPOP_LAMBDA and self.loss != "dpop":
            raise ValueError(f"train.dpop_lambda has no effect on train.loss {self.loss}: it is dpop's")
        if self.beta_schedule != "linear" and self.beta_end is None:
            raise ValueError("train.beta_schedule has no effect without train.beta_end")
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise ValueError("train.early_stopping_patience has no effect without train.best_metric")
        if self.best_metric is not None and self.eval_steps is None:
            raise ValueError("train.best_metric has no effect without train.eval_steps")
        if self.compile and self.gradient_checkpointing:
            raise ValueError("train.compile and train.gradient_checkpointing exclude each other")
        return self


class Pipeline(Section):
    """A whole pipeline file; paths are relative to the working directory."""

    dataset: str = Field(description="the dataset directory that build writes")
    kind: Kind | None = Field(None, description="chat | text; left out: chat for message formats and hh, else text")
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    pairs: PairsConfig = PairsConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    dedupe: DedupeConfig = DedupeConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    split: SplitConfig = SplitConfig()
    build: BuildConfig = BuildConfig()
    audit: AuditConfig = AuditConfig()
    precompute: PrecomputeConfig = PrecomputeConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _room_for_completions(self) -> "Pipeline":
        if self.precompute.min_completion_tokens >= self.precompute.max_length:
            raise ValueError("precompute.min_completion_tokens must be smaller than precompute.max_length")
        return self

    def as_manifest(self) -> dict[str, Any]:
        """The resolved settings as the manifest keeps them: all but the place where the dataset lies."""
        return self.model_dump(mode="json", by_alias=True, exclude={"dataset"})
