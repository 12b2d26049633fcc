"""The sections of a pipeline file that a build reads: sources, pairs, validation, dedupe, decontamination, split."""

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prefkit.formats import FORMATS
from prefkit.formats.comparisons import label_key
from prefkit.sections import Line, Section, Share, check_size, num_bytes

REJECTED = re.compile(r"worst|random|all|sigma:\d+(\.\d+)?")
FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
SEVERAL_PATHS = {"prompt", "responses", "scores", "models", "score", "winner"}
NEED_FORMAT = {"columns", "direction", "labels", "rules"}


class Labels(Section):
    """What the winner column of comparisons says: which labels stand for the first side, the second, and neither."""

    a: Annotated[list[str | int | float | bool], Field(min_length=1)]
    b: Annotated[list[str | int | float | bool], Field(min_length=1)]
    tie: list[str | int | float | bool] = Field([])

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
            if self.replace or self.ignore_case:  # a manifest says all defaults
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
    license: Line | None = Field(
        None, description="of the file, for the card: an id of the hub or SPDX (cc-by-4.0), or another name"
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


class CardConfig(Section):
    """What the dataset's card says of it besides; what is left out follows from the data."""

    pretty_name: Line | None = Field(None, description="title")
    language: list[Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]] = Field(
        [], description="ISO 639 codes: [en, fr]"
    )
    license: Line | None = Field(
        None, description="of the whole; left out: that of the sources where they all have one, else other"
    )


class SplitConfig(Section):
    """Which prompts are held out."""

    test_share: Share = Field(0.05, description="share of prompts held out for evaluation")
    seed: int = 0
