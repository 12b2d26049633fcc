"""`prefkit run`: the whole road from one pipeline file, each stage skipped when it is done.

Comes in: a pipeline. Goes out: all that its commands leave, the same files as by hand. A stage that fails stops the
road; whatever happened, the same call goes on from there.
"""

from typing import NamedTuple

from prefkit.audit.verdict import LEVELS
from prefkit.config import Changes, Pipeline
from prefkit.errors import AuditError, Interrupted, MachineError, PrefkitError
from prefkit.preflight import check_ahead, unread_samples
from prefkit.stages import Outcome, Spectator, foresee_stage, make_stage, refuse_several, stages_of
from prefkit.target import Target, pipeline_of


class RunThrough(NamedTuple):
    """What `run_pipeline` returns."""

    dataset: str
    stages: list[Outcome]  # in their order; of a dry run, what each would do
    run: str | None  # the run's directory, None where the road ends before it


def run_pipeline(
    target: Target,
    *,
    changes: Changes = (),
    until: str | None = None,
    dry_run: bool = False,
    strict: bool = False,
    spectator: Spectator | None = None,
) -> RunThrough:
    """Go the whole road of a pipeline: sample, score, build, audit, precompute, train, evaluate.

    Sampling, scoring and evaluating are stages where the pipeline has their sections. A stage that is done already is
    skipped; killed or stopped anywhere, the next call goes on.

    Args:
        target: a pipeline file or a loaded Pipeline.
        changes: settings by their dotted keys, as in `load_pipeline`.
        until: the last stage, by name.
        dry_run: do nothing, and say of each stage whether it is done.
        strict: audit as `prefkit audit --strict` does, and stop where the verdict is at audit.limits.strict or worse;
            without it the verdict is told, and the road goes on.
        spectator: a `prefkit.stages.Spectator`, told of each stage and of how far it is.

    Returns:
        what became of each stage.

    Raises:
        InputError: `until` is no stage, or what a later stage names is not there: nothing was begun; or whatever a
            stage raises.
        AuditError: the audit is worse than `strict` allows.

    Example:
        gone = prefkit.run_pipeline("demo/pipeline.yaml", until="audit")
        print([(outcome.stage, outcome.done, outcome.said) for outcome in gone.stages])
    """
    refuse_several("prefkit run")
    spectator = spectator or Spectator()
    pipeline = pipeline_of(target, changes)
    before: dict[str, Outcome] = {}
    stages = stages_of(pipeline, until)
    check_ahead(pipeline, stages)
    if "sample" in stages and "build" in stages and (told := unread_samples(pipeline)) is not None:
        spectator.tell(told)
    for name in stages:
        if dry_run:
            before[name] = foresee_stage(name, pipeline, before, strict=strict)
            spectator.show(before[name])
            continue
        try:
            outcome = make_stage(name, pipeline, before, spectator, strict=strict)
            before[name] = outcome
            spectator.show(outcome)
            if name == "audit":
                _judge(pipeline, outcome, spectator, strict=strict)
        except PrefkitError as error:
            mended = "" if isinstance(error, (Interrupted, MachineError)) else "once that is mended "
            spectator.tell(
                f"stopped at {name}; what is done is on disk, and {mended}the same command goes on from there"
            )
            raise
    run = before["train"].facts.get("run") if "train" in before else None
    return RunThrough(pipeline.dataset, [*before.values()], run)


def _judge(pipeline: Pipeline, audited: Outcome, spectator: Spectator, *, strict: bool) -> None:
    """Tell, or with `strict` refuse, a verdict at audit.limits.strict or worse."""
    limit = pipeline.audit.limits.strict
    verdict, reason = audited.facts["verdict"], audited.facts["reason"]
    if LEVELS.index(verdict) < LEVELS.index(limit):
        return
    if strict:
        raise AuditError(
            f"the verdict is {verdict}: {reason}",
            where=pipeline.dataset,
            expected=f"better than {limit} (audit.limits.strict)",
            hint="prefkit audit TARGET lists the findings",
        )
    spectator.tell(f"the audit's verdict is {verdict}: {reason}; the road goes on (--strict stops here)")
