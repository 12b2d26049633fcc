"""The JSON documents of a dataset as pydantic models: what they hold, for readers in any language. No input or output.

`schemas/*.schema.json` is generated from here; store.py refuses a manifest that does not fit.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefkit.format import Kind


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartEntry(_Document):
    """One Parquet file of a table."""

    file: str = Field(description="name inside the table's directory", pattern=r"^[A-Za-z0-9_-]+\.parquet$")
    rows: int
    sha256: str = Field(description="hex, over the file's bytes")


class SourceEntry(_Document):
    """One source file, as it was when the dataset was built."""

    path: str = Field(description="as the pipeline names it")
    sha256: str = Field(description="hex, over the file's bytes")
    rows: int
    format: str
    license: str | None = Field(None, description="as the pipeline says, null where it does not")


class EvalEntry(_Document):
    """One evaluation file, as it was when the dataset was built."""

    path: str = Field(description="as the pipeline names it")
    sha256: str = Field(description="hex, over the file's bytes")
    rows: int


class AdditionEntry(_Document):
    """Sources that a later build added: the pairs before them stayed as they were."""

    sources: list[str] = Field(description="as the pipeline names them")
    pairs: int = Field(description="pairs that they brought")


class CountsEntry(_Document):
    """What became of everything that was read.

    rows = (pairs - candidate_pairs) + (dropped - candidate_dropped) + (rejects - candidate_rejects);
    candidates = used + unused + candidate_rejects; prompts = prompts_with_pair + prompts_dropped; pairs = train + test.
    """

    rows: int = Field(description="rows of pair and correction sources")
    pairs: int
    dropped: int = Field(description="rows of the dropped table")
    rejects: int = Field(description="rows of the rejects table")
    candidates: int = Field(description="candidates read, a list-form row counted once each")
    candidate_rejects: int
    used: int = Field(description="candidates that became a side of a pair")
    unused: int
    candidate_pairs: int = Field(description="pairs made of candidates")
    candidate_dropped: int = Field(description="dropped rows that stem from candidates: pairs, or prompts without one")
    prompts: int = Field(description="distinct prompts of candidate sources")
    prompts_with_pair: int
    prompts_dropped: int
    train: int
    test: int


class RepairEntry(_Document):
    """What a repaired dataset was made of, and how; `changes` has a row a pair."""

    dataset: str = Field(description="as it was named on the command line")
    manifest_sha256: str = Field(description="hex, over its manifest.json")
    steps: list[dict[str, Any]] = Field(
        description="in order: repair, its setting, pairs dropped, edited, and of these dropped_later by another step"
    )


class Manifest(_Document):
    """manifest.json: written last, so a directory without one is an unfinished build."""

    format_version: int
    prefkit_version: str
    kind: Kind
    pipeline: dict[str, Any] = Field(description="the resolved pipeline, all but `dataset`")
    sources: list[SourceEntry]
    evals: list[EvalEntry] = Field(description="files of decontaminate.against")
    additions: list[AdditionEntry] = Field(
        description="in order, after the first build; a dataset built in one go has none"
    )
    counts: CountsEntry
    reasons: dict[str, int] = Field(description="dropped and rejected rows by reason")
    unused: dict[str, int] = Field(description="unused candidates by reason")
    report: list[dict[str, Any]] = Field(
        description="by source: what selection or rules did; of all corrections: how far apart their sides are"
    )
    parts: dict[Literal["pairs", "dropped", "rejects", "changes"], list[PartEntry]]
    repair: RepairEntry | None = Field(None, description="of a dataset that prefkit repair wrote")

    @field_validator("parts")
    @classmethod
    def _has_pairs(cls, parts: dict[str, list[PartEntry]]) -> dict[str, list[PartEntry]]:
        """A table of pairs has one part at least, and no part is listed twice."""
        if not parts.get("pairs") or any(
            len({part.file for part in listed}) < len(listed) for listed in parts.values()
        ):
            raise ValueError("no pairs, or a part that is listed twice")
        return parts


class ReferenceIdentity(_Document):
    """All that decides a reference's numbers; its canonical JSON is hashed into the key."""

    weights_sha256: str = Field(description="over the tensors sorted by name: name, dtype, shape, bytes")
    config: dict[str, Any] = Field(description="config.json without transformers_version, _name_or_path and dtype")
    tokenizer_sha256: str
    chat_template_sha256: str | None
    kind: Kind
    max_length: int
    truncation: dict[str, Any]
    dtype: Literal["float32", "bfloat16", "bfloat16_weights"]


class Reference(_Document):
    """reference/<key>/reference.json: written when all parts are there."""

    key: str
    identity: ReferenceIdentity
    provenance: dict[str, Any] = Field(
        description="attention, layout, device, template setting, versions, the name of the model's folder: recorded, "
        "never refused"
    )
    counts: dict[str, int] = Field(description="tokens, truncations, boundaries, missing ends")
    boundary: dict[str, int] = Field({}, description="pairs by the number of prompt tokens lost to the completion")
    parts: list[PartEntry]
    dropped: PartEntry = Field(description="dropped.parquet: the pairs that encoding left out")
    plan: PartEntry | None = Field(None, description="plan.parquet; null in a reference of an earlier release")


class Run(_Document):
    """runs/<n>/run.json."""

    dataset: str
    pairs: int = Field(description="that it trains and evaluates on")
    reference: str
    model: str
    train: dict[str, Any] = Field(description="the resolved train section")
    policy_sha256: str | None = Field(None, description="over weights, config and tokenizer of the initial policy")
    data_sha256: str = Field(description="over pair_id, split and weight of the pairs it trains and evaluates on")
    micro_batch_tokens: int | None = Field(
        None, description="tokens of a forward and backward pass at most, as set or as usual where the run began"
    )
    layout: str | None = Field(None, description="how pairs were laid out and attended to, and why not faster")
    gate: dict[str, float] = Field(description="how close the policy's scores came to the table before the first step")
    prefkit_version: str
    finished: bool
    changes: list[dict[str, Any]] = Field([], description="of settings, by --go-on: step, settings (before and after)")
    steps: int | None = None
    loss: float | None = Field(None, description="of the last logged step")
    eval: dict[str, float] | None = Field(None, description="of the final model, on the test split")
    num_processes: int | None = Field(None, description="at its last start")
    saved: Literal["model", "adapter", "merged"] | None = Field(None, description="what model/ holds")
    best: dict[str, Any] | None = Field(None, description="of train.best_metric: metric, value, step")
    stopped_early: bool = Field(False, description="by train.early_stopping_patience")
    warnings: list[dict[str, Any]] = Field([], description="what training told about the data: step, name, text")


class FindingEntry(_Document):
    """One thing that gives chosen away; null where a key does not apply to its family."""

    level: Literal["note", "warn", "fail"]
    family: Literal["tokens", "structure", "probe", "boundaries"]
    name: str = Field(description="the token, the feature (`first_words: certainly` with a value), the probe")
    side: Literal["chosen", "rejected"] | None = Field(description="where there is more of it")
    reason: str
    advice: str = Field(description="what to do, a command where there is one")
    alphabet: Literal["word", "model"] | None
    n: int | None
    num_pairs: int | None = Field(description="pairs that it separates")
    coverage: float | None = Field(description="their share of all pairs, 0..1")
    win_rate: float | None = Field(description="share of them that chosen wins, 0..1; of a probe, held-out accuracy")
    win_rate_low: float | None = Field(description="95% interval of it")
    win_rate_high: float | None
    p: float | None
    q: float | None
    p_permutation: float | None = Field(description="family-wise, by sign flips; null but for --strict")
    z_length: float | None
    also: list[str] = Field(description="tokens that go with it: n-grams that hold it, or tokens of the same pairs")
    pair_ids: list[str] = Field(description="examples")
    sources: dict[str, int] = Field(description="the pairs that it separates, by source")


class PowerEntry(_Document):
    """What the data could have shown."""

    win_rate: float = Field(description="smallest one of a token that separates half of the pairs")
    one_sided_coverage: float = Field(description="share of pairs from which on a token of one side only is found")
    num_tests: int
    enough: bool = Field(description="false: no finding would mean nothing")


class ProbeEntry(_Document):
    """One row of audit/probe.parquet over all pairs."""

    probe: Literal["length", "structure", "words", "both", "generator"]
    accuracy: float | None = Field(description="held-out, 0..1")
    accuracy_low: float | None
    accuracy_high: float | None
    log_loss: float | None
    band: Literal["fine", "note", "warn", "fail"] | None
    num_pairs: int
    num_features: int


class CoverEntry(_Document):
    """One step of the greedy cover, measured on prompts that did not choose it."""

    token: str
    side: Literal["chosen", "rejected"]
    covered: float = Field(description="share of pairs that the tokens so far decide, 0..1")
    precision: float | None = Field(description="share of these that they decide rightly")


class Audit(_Document):
    """audit/audit.json."""

    verdict: Literal["pass", "not enough data", "note", "warn", "fail"]
    reason: str
    strict: bool = Field(description="whether findings had to hold under Benjamini-Yekutieli and sign flips by prompt")
    pairs: int
    prompts: int = Field(description="distinct prompts, folded")
    tokens: dict[str, int] = Field(description="rows of the tokens table by alphabet")
    findings: list[FindingEntry] = Field(description="worst first")
    allowed: list[str] = Field(description="findings but for audit.allow and audit.allow_features")
    allow_unused: list[str] = Field(description="entries of audit.allow that are in no token: misspelt, perhaps")
    power: PowerEntry
    probes: list[ProbeEntry]
    cover: list[CoverEntry]
    features: dict[str, str] = Field(description="what each feature of the structure table measures")
    lengths: dict[str, dict[str, float | None]] = Field(description="words a side: min, p10, median, p90, max")
    similarity: dict[str, Any] = Field(
        description="of the two sides: shared_prefix and edit_distance, shares of words, 0..1, by quantile; num_pairs"
    )
    boundaries: dict[str, Any] | None = Field(
        description="of the model's tokenizer: pairs by what encoding does to them"
    )
    sources: dict[str, int] = Field(description="pairs by source")
    limits: dict[str, Any]
    settings: dict[str, Any] = Field(description="the rest of the audit section")
    made_of: dict[str, str | None] | None = Field(
        None,
        description="pairs_sha256: over the parts of the pairs; encoding_sha256: how they became the tokens of "
        "audit.model, null without; prefkit_version; null of an earlier release and of a repair",
    )
    parts: list[PartEntry] = Field([], description="the tables beside it; none of an audit that was not kept")


class Evaluation(_Document):
    """evaluations/<key>/evaluation.json: written last, so a directory without one is unfinished."""

    key: str
    identity: dict[str, Any] = Field(description="all that decides a figure; its canonical JSON is hashed into the key")
    model: str = Field(description="the folder that was evaluated")
    reference: str | None = Field(description="the folder that it was compared with")
    dataset: str | None = Field(description="whose held-out pairs it was measured on")
    against: str = Field(description="of the win rate: reference, chosen, or a folder")
    settings: dict[str, Any] = Field(description="the resolved evaluate section")
    samples: list[dict[str, Any]] = Field(description="role, temperature, folder of responses, relative to this folder")
    headline: dict[str, Any] | None = Field(
        description="the gain in mean reward over the reference: scorer, temperature, value, low, high"
    )
    left_out: dict[str, str] = Field(description="what was not measured, and why")
    warnings: list[dict[str, str]] = Field(description="what the figures tell at once: name, text")
    prefkit_version: str
    parts: list[PartEntry] = Field(description="the tables beside it")


class Sampler(_Document):
    """sampler.json of a candidates directory: written before anything is sampled, and what every later call must be."""

    key: str = Field(description="the first 16 hex digits of sha256 over the JSON of identity")
    identity: dict[str, Any] = Field(
        description="all that decides the samples: weights, config, tokenizer, template, kind, n, temperature, top_p, "
        "top_k, max_new_tokens, end tokens and texts, seed, dtype, engine"
    )
    road: str | None = Field(description="how the model was run, or the engine: recorded, never refused")


class Sample(_Document):
    """sample.json of a candidates directory: written when all parts are there."""

    sample_version: int
    key: str
    kind: Kind
    identity: dict[str, Any] = Field(description="as in sampler.json")
    model: str = Field(description="the folder it was sampled from, as it was named")
    provenance: dict[str, Any] = Field(description="road, device, versions, template setting: recorded, never refused")
    files: list[EvalEntry] = Field(description="of the prompts")
    counts: dict[str, int] = Field(description="rows, prompts, dropped, rejects, samples, tokens")
    finish_reasons: dict[str, int]
    dropped_reasons: dict[str, int]
    parts: dict[str, list[PartEntry]] = Field(description="of the tables prompts, dropped, rejects and samples")
    plan: PartEntry


class ScoredPartEntry(_Document):
    """One Parquet file of a scorer."""

    file: str = Field(
        description="the table's directory and a name inside it",
        pattern=r"^(scored|unscored|verdicts|inconsistent)/[^/]+\.parquet$",
    )
    rows: int
    sha256: str = Field(description="hex, over the file's bytes")


class Scorer(_Document):
    """scores/<scorer>.json beside scored tables: written last of a scorer."""

    scorer: str = Field(description="its name")
    kind: Literal["function", "verifier", "reward_model", "judge"]
    candidates: str = Field(description="the folder or file of the responses, as it was named")
    identity: dict[str, Any] = Field(description="all that decides its scores")
    provenance: dict[str, Any] = Field(description="settings, device, versions: recorded, never refused")
    counts: dict[str, int] = Field(description="candidates, scored, unscored")
    unscored: dict[str, int] = Field(description="responses without a score by reason")
    mean: float | None = Field(description="of the scores")
    judge: dict[str, Any] | None = Field(description="comparisons, consistent ones, how often the first place won")
    advice: list[str]
    parts: list[ScoredPartEntry] = Field(description="of its tables")


class CombinationEntry(_Document):
    """One combination of a sweep's settings, and what became of it."""

    settings: dict[str, Any] = Field(description="what varies, by dotted key")
    state: Literal["to do", "done", "failed"]
    run: str | None = Field(description="its directory below runs/, null before it is done")
    reason: str | None = Field(description="why it failed")


class Sweep(_Document):
    """sweeps/<key>/sweep.json: runs that share one dataset and one reference."""

    key: str = Field(description="16 hex digits of sha256 over the reference, policy, pairs and all train sections")
    reference: str
    data_sha256: str = Field(description="as in run.json")
    grid: list[dict[str, Any]] = Field(description="what varies, in the order of the command: setting, values")
    combinations: list[CombinationEntry]
    finished: bool = Field(description="no combination is left to do; a failed one is tried again by the next call")
    prefkit_version: str


DOCUMENTS: dict[str, type[_Document]] = {
    "manifest": Manifest,
    "reference": Reference,
    "run": Run,
    "audit": Audit,
    "sweep": Sweep,
    "evaluation": Evaluation,
    "sampler": Sampler,
    "sample": Sample,
    "scorer": Scorer,
}
