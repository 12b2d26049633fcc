"""A whole pipeline file as frozen pydantic models, each setting documented where it stands; here: the audit, and all.

Comes in: plain settings. Goes out: a `Pipeline`, or what pydantic says of the first key that does not fit; config.py
makes a sentence of it.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefkit.audit.features import FEATURES
from prefkit.audit.values import CATEGORICAL
from prefkit.build_settings import (
    BuildConfig,
    CardConfig,
    DecontaminateConfig,
    DedupeConfig,
    PairsConfig,
    SourceConfig,
    SplitConfig,
    ValidateConfig,
)
from prefkit.format import Kind
from prefkit.sample_settings import EvaluateConfig, SampleConfig, ScoreConfig
from prefkit.sections import Section, Share, check_size
from prefkit.text import WORD
from prefkit.train_settings import PrecomputeConfig, TrainConfig

AUDITED = list(dict.fromkeys([*FEATURES, *(of.feature for of in CATEGORICAL.values()), "distinct_replies"]))


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
    card: CardConfig = CardConfig()
    audit: AuditConfig = AuditConfig()
    precompute: PrecomputeConfig = PrecomputeConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig | None = Field(None, description="left out: nothing is sampled")
    score: ScoreConfig | None = Field(None, description="left out: nothing is scored")
    evaluate: EvaluateConfig | None = Field(None, description="left out: nothing is evaluated")

    @model_validator(mode="after")
    def _room_for_completions(self) -> "Pipeline":
        if self.precompute.min_completion_tokens >= self.precompute.max_length:
            raise ValueError("precompute.min_completion_tokens must be smaller than precompute.max_length")
        return self

    def as_manifest(self) -> dict[str, Any]:
        """The resolved settings as the manifest keeps them: all but the place where the dataset lies."""
        return self.model_dump(mode="json", by_alias=True, exclude={"dataset"})
