"""The stages of the road as one table: what each is called, whether it is wanted, done already, and what does it.

Comes in: a pipeline. Goes out: an `Outcome` a stage. A stage is the public function of its command, called as the
command calls it, so its files are the same as by hand; here stands only what tells that it is done, and why it is done
again where it is. What needs a model is imported where it is needed: to look ahead takes no torch before there is data.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefkit.additions import added_sources, base_of
from prefkit.audits import audit_dataset, why_audit
from prefkit.build import build_dataset
from prefkit.config import Pipeline, require_model
from prefkit.documents import Audit, Reference
from prefkit.errors import InputError
from prefkit.format import AUDIT_JSON, EVALUATION_JSON, LOCK, MANIFEST, REFERENCE_JSON, REFERENCES, differing
from prefkit.locks import give_lock, take_lock
from prefkit.papers import mend_papers
from prefkit.processes import num_processes
from prefkit.resolving import resolve_formats, resolve_kind
from prefkit.sample_format import SAMPLER_JSON
from prefkit.sample_settings import EvaluateConfig
from prefkit.store import list_references, read_document

Tell = Callable[[str], None]
Stop = Callable[[], bool]
StageName = Literal["sample", "score", "build", "audit", "precompute", "train", "evaluate"]
STAGES: tuple[StageName, ...] = ("sample", "score", "build", "audit", "precompute", "train", "evaluate")
# of a reference's identity, the setting that decides it
DECIDED_BY: Mapping[str, str] = {
    "weights_sha256": "precompute.model",
    "config": "precompute.model",
    "tokenizer_sha256": "the tokenizer of precompute.model",
    "chat_template_sha256": "precompute.chat_template",
    "kind": "kind",
    "max_length": "precompute.max_length",
    "truncation": "precompute.long_prompt or min_completion_tokens",
    "dtype": "precompute.dtype",
}
NEW = "there was none"
UNMEASURED = "this run was not measured so"


class Following(NamedTuple):
    """How one stage is followed: told lines, shown how far it is (as its function's own `watch`), asked to stop."""

    tell: Tell
    watch: Any
    stop: Stop


class Spectator:
    """Who follows the road: told lines, shown each stage that is done, asked whether to stop; by itself silent."""

    def __init__(self, tell: Tell = lambda _text: None, stop: Stop = lambda: False) -> None:
        self.tell, self.stop = tell, stop

    @contextlib.contextmanager
    def follow(self, stage: StageName) -> Iterator[Following]:
        """While the block runs, a stage is at work."""
        watch = None if stage == "build" else (lambda *_: None)
        yield Following(self.tell, watch, self.stop)

    def show(self, outcome: "Outcome") -> None:
        """A stage is done."""


class Outcome(NamedTuple):
    """What became of one stage."""

    stage: StageName
    done: bool  # it was done already: nothing was written
    why: str  # why it was done (again); empty where it was done already
    said: str  # what it came to, in a few words
    result: Any  # what the function of its command returned; None where that was not called
    facts: dict[str, Any]  # plain values, for --json


def stages_of(pipeline: Pipeline, until: str | None = None) -> list[StageName]:
    """The stages that a pipeline has sections for, in their order, up to one of them.

    Raises:
        InputError: `until` is no stage, or one that the pipeline has no section for.
    """
    absent = {name for name in ("sample", "score", "evaluate") if getattr(pipeline, name) is None}
    stages = [name for name in STAGES if name not in absent]
    if until is None:
        return stages
    if until not in STAGES:
        raise InputError(f"{until} is no stage of the road", where="--until", expected="one of " + ", ".join(STAGES))
    if until not in stages:
        what = f"the pipeline has no {until}: section, so there is no such stage"
        raise InputError(what, where="--until", expected="one of " + ", ".join(stages))
    return stages[: stages.index(until) + 1]


def refuse_several(command: str) -> None:
    """Refuse to work in several processes at once: only some of the stages can.

    Raises:
        InputError: this process was started with others.
    """
    if num_processes() > 1:
        raise InputError(
            f"{command} works in one process",
            where="WORLD_SIZE",
            expected="prefkit precompute and prefkit train by a launcher, in several; the rest without one",
        )


def make_stage(
    name: StageName, pipeline: Pipeline, before: Mapping[str, Outcome], spectator: Spectator, *, strict: bool = False
) -> Outcome:
    """Do a stage, or find that it is done.

    Args:
        name: of the stage.
        pipeline: all of it.
        before: the outcomes of earlier stages.
        spectator: who follows.
        strict: of the audit.
    """
    if name == "build":
        return _build(pipeline, spectator)
    if name == "audit":
        return _audit(pipeline, spectator, strict=strict)
    if name == "precompute":
        return _precompute(pipeline, spectator)
    if name == "train":
        return train_stage(pipeline, spectator)
    if name == "evaluate":
        return evaluate_stage(pipeline, before["train"].facts["run"], spectator)
    return _sample(pipeline, spectator) if name == "sample" else _score(pipeline, spectator)


def foresee_stage(
    name: StageName, pipeline: Pipeline, before: Mapping[str, Outcome], *, strict: bool = False
) -> Outcome:
    """Whether a stage is done, as an `Outcome` without a result; nothing is written.

    What follows a stage that is not done is not looked at.
    """
    for earlier in before.values():
        if not earlier.done and earlier.stage != "audit":  # nothing reads what an audit leaves
            return Outcome(name, False, f"follows {earlier.stage}", "to do", None, {})
    if name == "audit":
        why, said = _foreseen_audit(pipeline, strict=strict)
    elif name == "evaluate":
        why, said = _foreseen_evaluation(pipeline, before["train"].facts["run"])
    else:
        why, said = FORESEEN[name](pipeline)
    facts = {"run": said} if name == "train" and why is None else {}
    return Outcome(name, why is None, why or "", said if why is None else "to do", None, facts)


def _foreseen_samples(pipeline: Pipeline) -> tuple[str | None, str]:
    """Why there is something to sample, None where there is not; and what is there."""
    from prefkit.candidate_folder import is_finished, read_sample
    from prefkit.sample_work import prepare_sampling

    assert pipeline.sample is not None  # whoever asks has looked
    out = Path(pipeline.sample.out)
    if not is_finished(out):
        return ("it is not finished" if (out / SAMPLER_JSON).exists() else NEW), ""
    model = Path(require_model(pipeline.sample.model or pipeline.precompute.model, "sample.model"))
    template, quiet = pipeline.precompute.chat_template, lambda _text: None
    with contextlib.ExitStack() as held:
        work = prepare_sampling(pipeline.sample, model, pipeline.kind, template, quiet, held)
    counts = read_sample(out)["counts"]
    said = f"{counts['samples']} responses to {counts['prompts']} prompts in {out}"
    return (None if work.current else "prompts are new, or responses are missing"), said


def _foreseen_scores(pipeline: Pipeline) -> tuple[str | None, str]:
    """Why there is something to score, None where there is not; and what is there."""
    from prefkit.score import foresee_scores

    left, counts = foresee_scores(pipeline)
    said = ", ".join(f"{name}: {count} scored" for name, count in counts.items())
    return (f"{', '.join(left)} had not scored all of it" if left else None), said


def _foreseen_evaluation(pipeline: Pipeline, run: str) -> tuple[str | None, str]:
    from prefkit.evaluation_plan import make_plan
    from prefkit.evaluation_tables import read_evaluation

    settings, told = _evaluation_of(pipeline)
    plan = make_plan(run, settings, out=None, kind=None, **told)
    if not (plan.folder / EVALUATION_JSON).exists():
        return UNMEASURED, ""
    return None, _headline(plan.folder, read_evaluation(plan.folder).document)


def _foreseen_build(pipeline: Pipeline) -> tuple[str | None, str]:
    dataset, told = Path(pipeline.dataset), list[str]()
    if not (dataset / MANIFEST).exists():
        return NEW, ""
    pipeline = resolve_formats(pipeline, lambda _: None)
    base = base_of(dataset, pipeline, resolve_kind(pipeline), told.append)
    if base is None:
        return told[-1].partition(": ")[2], ""
    added = [source.path for source in added_sources(base, pipeline)]
    return (f"{', '.join(added)} is added" if added else None), f"{base.rows} pairs"


def _foreseen_audit(pipeline: Pipeline, *, strict: bool) -> tuple[str | None, str]:
    why = why_audit(pipeline, strict=strict)
    document = read_document(Path(pipeline.dataset) / AUDIT_JSON, Audit) if why is None else {}
    return why, f"verdict {document.get('verdict')}"


def _foreseen_reference(pipeline: Pipeline) -> tuple[str | None, str]:
    if not list_references(Path(pipeline.dataset)):
        return NEW, ""
    from prefkit.work import prepare_work

    work = prepare_work(pipeline, lambda _: None, lambda longest: longest)
    left = len(work.missing_parts)
    why = f"{left} parts are not scored" if left else None if work.current else "it is not finished"
    return why, f"reference {work.key}"


def _foreseen_run(pipeline: Pipeline) -> tuple[str | None, str]:
    from prefkit.job import prepare_training
    from prefkit.run import find_run, why_no_run

    claim = prepare_training(pipeline).claim
    found = find_run(Path(pipeline.dataset), claim, finished=True)
    return (why_no_run(Path(pipeline.dataset), claim) if found is None else None), str(found)


FORESEEN: Mapping[StageName, Callable[[Pipeline], tuple[str | None, str]]] = {
    "sample": _foreseen_samples,
    "score": _foreseen_scores,
    "build": _foreseen_build,
    "precompute": _foreseen_reference,
    "train": _foreseen_run,
}


def _sample(pipeline: Pipeline, spectator: Spectator) -> Outcome:
    with spectator.follow("sample") as (tell, watch, stop):
        made = load_sample()(pipeline, tell=tell, watch=watch, stop=stop)
    said = f"{made.samples} responses to {made.prompts} prompts in {made.out}"
    facts = {"out": made.out, "prompts": made.prompts, "samples": made.samples, "new": made.new}
    why = "" if made.unchanged else f"{made.new} responses were not there yet"
    return Outcome("sample", made.unchanged, why, said, made, facts)


def _score(pipeline: Pipeline, spectator: Spectator) -> Outcome:
    with spectator.follow("score") as (tell, watch, stop):
        made = load_score()(pipeline, tell=tell, watch=watch, stop=stop)
    again = [one.scorer for one in made if not one.unchanged]
    said = ", ".join(f"{one.scorer}: {one.scored} scored" for one in made)
    why = f"{', '.join(again)} had not scored all of it" if again else ""
    return Outcome("score", not again, why, said, made, {one.scorer: one.scored for one in made})


def _build(pipeline: Pipeline, spectator: Spectator) -> Outcome:
    dataset, told = Path(pipeline.dataset), list[str]()
    there = (dataset / MANIFEST).exists()

    def tell(text: str) -> None:
        told.append(text)
        spectator.tell(text)

    with spectator.follow("build") as (_, watch, _stop):
        built = build_dataset(pipeline, tell=tell, watch=watch)
    counts = built.counts
    said = f"{counts['pairs']} pairs, {counts['train']} train and {counts['test']} test"
    facts = {"dataset": built.dataset, "counts": counts, "added": built.added}
    if built.unchanged:
        return Outcome("build", True, "", said, built, facts)
    anew = [text.partition(": ")[2] for text in told if text.startswith(f"building {dataset} anew")]
    added = f"{', '.join(built.added['sources'])} is added" if built.added else ""
    return Outcome("build", False, *(added or (anew[0] if there and anew else NEW), said), built, facts)


def _audit(pipeline: Pipeline, spectator: Spectator, *, strict: bool) -> Outcome:
    dataset = Path(pipeline.dataset)
    why = why_audit(pipeline, strict=strict)
    if why is None:
        document = read_document(dataset / AUDIT_JSON, Audit)
        return Outcome("audit", True, "", f"verdict {document['verdict']}", None, _verdict(document))
    with spectator.follow("audit") as (tell, watch, _):
        audited = audit_dataset(pipeline, strict=strict, tell=tell, watch=watch)
    return Outcome("audit", False, why, f"verdict {audited.verdict}", audited, _verdict(audited.document))


def _verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: document[name] for name in ("verdict", "reason")}


def _precompute(pipeline: Pipeline, spectator: Spectator) -> Outcome:
    from prefkit.reference import precompute_reference

    dataset = Path(pipeline.dataset)
    before = list_references(dataset)
    with spectator.follow("precompute") as (tell, watch, stop):
        made = precompute_reference(pipeline, tell=tell, watch=watch, stop=stop)
    said = f"{made.pairs} pairs under reference {made.key}"
    facts = {"key": made.key, "pairs": made.pairs, "dropped": made.dropped, "scored": made.scored}
    why = "" if not made.scored else _why_scored(dataset, made.key, made.scored, before)
    return Outcome("precompute", not made.scored, why, said, made, facts)


def _why_scored(dataset: Path, key: str, scored: int, before: list[str]) -> str:
    """Why pairs were scored: no reference was there, or only others, or not all of this one."""
    if not before:
        return NEW
    if key in before:
        return f"{scored} pairs were not scored yet"
    identities = [read_document(dataset / REFERENCES / k / REFERENCE_JSON, Reference)["identity"] for k in [*before]]
    now = read_document(dataset / REFERENCES / key / REFERENCE_JSON, Reference)["identity"]
    nearest = min((differing(one, now) for one in identities), key=len)
    names = [re.split(r"[:.]", line, maxsplit=1)[0] for line in nearest]
    return f"{', '.join(dict.fromkeys(DECIDED_BY[name] for name in names))} changed"


def train_stage(pipeline: Pipeline, spectator: Spectator, claim: Mapping[str, Any] | None = None) -> Outcome:
    """Train, unless a finished run of the same settings, reference, policy and pairs is there.

    An unfinished one goes on; one of other settings is left alone.

    Args:
        pipeline: of the run.
        spectator: who follows.
        claim: what the run must agree in, where that is known; see `job.prepare_training`.
    """
    from prefkit.job import prepare_training
    from prefkit.run import find_run, why_no_run
    from prefkit.train import train_dpo

    dataset = Path(pipeline.dataset)
    claim = prepare_training(pipeline).claim if claim is None else claim
    if (found := find_run(dataset, claim, finished=True)) is not None:
        _tidy_lock(found)
        return Outcome("train", True, "", str(found), None, {"run": str(found)})
    begun = find_run(dataset, claim, finished=False)
    why = f"{begun} was not finished" if begun is not None else why_no_run(dataset, claim)
    with spectator.follow("train") as (tell, watch, stop):
        made = train_dpo(pipeline, reference=claim["reference"], beside=True, tell=tell, watch=watch, stop=stop)
    facts = {"run": made.run, "steps": made.steps, "loss": made.loss, "eval": made.eval}
    return Outcome("train", False, why, f"{made.run}: {made.steps} updates", made, facts)


def _tidy_lock(run: Path) -> None:
    """Empty the lock file of a run that was killed after it had finished, so that its bytes are those of any other."""
    lock = run / LOCK
    if lock.exists() and lock.stat().st_size and (held := take_lock(run)) is not None:
        give_lock(run, held)


def evaluate_stage(pipeline: Pipeline, run: str, spectator: Spectator) -> Outcome:
    """Measure a run on fresh samples, unless that is done."""
    settings, told = _evaluation_of(pipeline)
    with spectator.follow("evaluate") as (tell, watch, stop):
        made = load_evaluate()(run, settings, **told, tell=tell, watch=watch, stop=stop)
    mend_papers(Path(pipeline.dataset))  # a kill may have come before its views were told
    facts = {"folder": made.folder, "headline": made.document["headline"]}
    why = "" if made.unchanged else UNMEASURED
    return Outcome("evaluate", made.unchanged, why, _headline(made.folder, made.document), made, facts)


def _evaluation_of(pipeline: Pipeline) -> tuple[EvaluateConfig, dict[str, Any]]:
    """The settings of a pipeline's evaluation, and what else it is told."""
    from prefkit.evaluation_plan import with_scorers

    assert pipeline.evaluate is not None  # whoever asks has looked
    settings = with_scorers(pipeline.evaluate, pipeline)
    told = {"reference": settings.reference, "dataset": pipeline.dataset}
    return settings, told | {"chat_template": pipeline.precompute.chat_template}


def _headline(folder: str | Path, document: Mapping[str, Any]) -> str:
    told = document["headline"]
    if told is None:
        return str(folder)
    ends = (told["low"], told["high"])
    between = "" if None in ends else f" ({ends[0]:.4g} to {ends[1]:.4g})"  # one prompt has no interval
    return f"mean reward by {told['scorer']} {told['value']:+.4g}{between} over the reference; {folder}"


def load_sample() -> Callable[..., Any]:
    """What samples; it needs torch."""
    from prefkit.sample import sample_candidates

    return sample_candidates


def load_score() -> Callable[..., Any]:
    """What scores; a model may be needed."""
    from prefkit.score import score_candidates

    return score_candidates


def load_evaluate() -> Callable[..., Any]:
    """What measures a run; it needs torch."""
    from prefkit.evaluate import evaluate_model

    return evaluate_model
