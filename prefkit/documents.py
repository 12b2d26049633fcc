"""The JSON documents of a dataset as pydantic models: what they hold, for readers in any language. No input or output.

`schemas/*.schema.json` is generated from here; store.py refuses a manifest that does not fit.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefkit.format import Kind


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartEntry(_Document):
    """One Parquet file of a table."""

    file: str = Field(description="name inside the table's directory")
    rows: int
    sha256: str = Field(description="hex, over the file's bytes")


class SourceEntry(_Document):
    """One source file, as it was when the dataset was built."""

    path: str = Field(description="as the pipeline names it")
    sha256: str = Field(description="hex, over the file's bytes")
    rows: int
    format: str


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


class Manifest(_Document):
    """manifest.json: written last, so a directory without one is an unfinished build."""

    format_version: int
    prefkit_version: str
    kind: Kind
    pipeline: dict[str, Any] = Field(description="the resolved pipeline, all but `dataset`")
    sources: list[SourceEntry]
    counts: CountsEntry
    reasons: dict[str, int] = Field(description="dropped and rejected rows by reason")
    unused: dict[str, int] = Field(description="unused candidates by reason")
    report: list[dict[str, Any]] = Field(
        description="by source: what selection or rules did; of all corrections: how far apart their sides are"
    )
    parts: dict[Literal["pairs", "dropped", "rejects"], list[PartEntry]]


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
        description="attention, layout, device, template setting, versions: recorded, never refused"
    )
    counts: dict[str, int] = Field(description="tokens, truncations, boundaries, missing ends")
    boundary: dict[str, int] = Field({}, description="pairs by the number of prompt tokens lost to the completion")
    parts: list[PartEntry]
    dropped: PartEntry = Field(description="dropped.parquet: the pairs that encoding left out")


class Run(_Document):
    """runs/<n>/run.json."""

    dataset: str
    pairs: int
    reference: str
    model: str
    train: dict[str, Any] = Field(description="the resolved train section")
    policy_sha256: str | None = Field(None, description="over weights, config and tokenizer of the initial policy")
    data_sha256: str = Field(description="over pair_id, split and weight of the pairs it trains and evaluates on")
    gate: dict[str, float] = Field(description="how close the policy's scores came to the table before the first step")
    prefkit_version: str
    finished: bool
    changes: list[dict[str, Any]] = Field([], description="of settings, by --go-on: step, settings (before and after)")
    steps: int | None = None
    loss: float | None = Field(None, description="of the last logged step")
    eval: dict[str, float] | None = None


class Audit(_Document):
    """audit/audit.json."""

    verdict: Literal["pass", "not enough data", "note", "warn", "fail"]
    reason: str
    pairs: int
    tokens: int
    findings: list[dict[str, Any]]
    allowed: list[str]
    limits: dict[str, Any]


DOCUMENTS: dict[str, type[_Document]] = {"manifest": Manifest, "reference": Reference, "run": Run, "audit": Audit}
