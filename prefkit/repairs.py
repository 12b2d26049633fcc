"""`prefkit repair`: a new dataset without what gave the answer away, and the audits of both side by side.

Comes in: a finished dataset and the repairs to make. Goes out: another dataset directory, in which every pair that was
dropped or edited has a row in changes/ that says why. Nothing is repaired in place, and what a repair has no reason to
touch keeps its pair_id, split, weight and place. References are copied: they are keyed by pair_id, so that
`prefkit precompute` scores edited pairs only. The same command again writes nothing.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit import __version__
from prefkit.accounts import Counts
from prefkit.audits import audit_dataset
from prefkit.config import Changes, Pipeline, pipeline_from_manifest, read_changes
from prefkit.corrections import correction_report
from prefkit.errors import ConfigError, DatasetError, PrefkitError
from prefkit.format import (
    CHANGES_TABLE,
    FORMAT_VERSION,
    MANIFEST,
    REFERENCE_JSON,
    REFERENCES,
    Kind,
)
from prefkit.judgement import Audited
from prefkit.locks import leave_no_empty_directory, locked
from prefkit.mending import Mended, Step, Wanted, mend_pairs
from prefkit.papers import renew_papers, write_papers
from prefkit.sources import file_sha256
from prefkit.store import (
    BUILDING,
    DRAFTS,
    built_beside,
    claim_directory,
    folder_beside,
    newer_format,
    read_manifest,
)
from prefkit.tables import are_plain, check_parts, read_table, write_table

Tell = Callable[[str], None]
MAX_DROPPED = 0.5


class Repaired(NamedTuple):
    """What `repair_dataset` returns."""

    dataset: str  # the one that stayed as it is
    out: str  # the new one
    steps: list[Step]  # in order: repair, its setting, pairs dropped, edited, and of these dropped_later
    counts: dict[str, int]  # of the new one, as in its manifest
    before: Audited  # of the old one
    after: Audited  # of the new one
    references: list[str]  # keys that lie in `out`
    unchanged: bool  # the repaired dataset was there already, nothing was written


def repair_dataset(
    dataset: str | Path,
    out: str | Path,
    *,
    strip_openers: Sequence[str] = (),
    balance: Sequence[str] = (),
    match_length: bool = False,
    drop_shortcuts: float | None = None,
    max_dropped: float = MAX_DROPPED,
    overwrite: bool = False,
    changes: Changes = (),
    tell: Tell = lambda _text: None,
) -> Repaired:
    """Write a new dataset without what gives the answer away, and audit both with the settings of its manifest.

    The repairs are made in the order of the arguments.

    Args:
        dataset: a finished dataset; nothing in it changes, so that it need not be writable.
        out: the new one: a path that is free, or holds a repaired dataset.
        strip_openers: texts that are cut from the beginning of both sides alike.
        balance: tokens (words or n-grams): pairs go until as many have each in chosen only as in rejected only.
        match_length: pairs go until, among pairs of like length difference, chosen is as often longer as rejected.
        drop_shortcuts: pairs go, highest shortcut_score first, until none of the probes length, structure, words and
            both is above this held-out accuracy; the probe of generators is not looked at.
        max_dropped: share of the pairs that may go in all, above 0.
        overwrite: another repaired dataset in `out` is replaced; its runs stay.
        changes: settings of the audit by their dotted keys, as in `load_pipeline`: what both audits and the probes of
            the repair are made with; kept in the new one.
        tell: called with lines for a person.

    Returns:
        what each step dropped and edited, the new counts, and both audits.

    Raises:
        InputError: no repair is asked for, one has a setting that does not fit, or has nothing to repair.
        CheckError: more pairs would have to go than `max_dropped` allows; nothing is written.
        DatasetError: the dataset is unfinished or damaged, or `out` holds something else.
        MachineError: the disk is full.

    Example:
        repaired = prefkit.repair_dataset("demo/dataset", "mended", balance=["certainly"])
        print(repaired.counts["pairs"], repaired.before.verdict, repaired.after.verdict)
    """
    dataset, out = str(dataset), str(out)
    source, target = Path(dataset), Path(out)
    openers, tokens = ((one,) if isinstance(one, str) else tuple(one) for one in (strip_openers, balance))
    wanted = Wanted(openers, tokens, match_length, drop_shortcuts, max_dropped).checked()
    manifest = read_manifest(source)
    pipeline = pipeline_of_audit(manifest["pipeline"], str(dataset), changes)
    manifest["pipeline"] = manifest["pipeline"] | {"audit": pipeline.as_manifest()["audit"]}
    claim_beside(source, target)
    digest = file_sha256(source / MANIFEST)
    steps, existed = same_repair(target, digest, wanted, manifest["pipeline"]["audit"]), target.exists()
    if steps is None and not overwrite and holds_repair(target):
        raise DatasetError("holds another repaired dataset", where=out, hint="--overwrite, or another --out")
    unchanged = steps is not None
    try:
        with locked(target):
            if steps is None:
                pairs = read_table(source, "pairs", manifest)
                mended = mend_pairs(pairs, manifest["kind"], pipeline, wanted, dataset, tell)
                steps = mended.steps
                tell(f"writing {out}")
                write_repaired(source, target, manifest, mended, {"dataset": dataset, "manifest_sha256": digest})
            keys = copy_references(source, target)
            renew_papers(target)
    except PrefkitError:
        if not existed:
            leave_no_empty_directory(target)
        raise
    before = _audited(dataset, manifest["pipeline"], tell, keep=False)  # its audit/ may be one of other settings
    after = _audited(out, manifest["pipeline"], tell, keep=True)
    return Repaired(dataset, out, steps, read_manifest(target)["counts"], before, after, keys, unchanged)


def _audited(dataset: str, settings: dict[str, Any], tell: Tell, *, keep: bool) -> Audited:
    tell(f"auditing {dataset}")
    pipeline: Pipeline = pipeline_from_manifest(settings, dataset)
    return audit_dataset(pipeline, keep=keep)


def pipeline_of_audit(settings: dict[str, Any], dataset: str, changes: Changes) -> Pipeline:
    """The pipeline of a dataset, with other settings of its audit.

    Raises:
        ConfigError: a change is of another section, or does not fit.
    """
    for key, _ in read_changes(changes):
        if not key.startswith("audit."):
            raise ConfigError("a repair changes settings of the audit only", where=key, expected="audit.key=value")
    return pipeline_from_manifest(settings, dataset, changes)


def holds_repair(target: Path) -> bool:
    """Whether a whole repaired dataset lies there, which nobody wants to lose by accident."""
    try:
        return read_manifest(target).get("repair") is not None
    except DatasetError:
        return False  # nothing, or damaged: written anew


def claim_beside(source: Path, target: Path) -> None:
    """Make sure that a repair of `source` may be written to `target`.

    Raises:
        DatasetError: they are one directory, one lies in the other, or `target` holds what no repair wrote, finished
            or not.
    """
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise DatasetError(
            "a dataset is not repaired in place", where=str(target), hint="choose an --out beside the dataset"
        )
    claim_directory(target)
    if newer_format(target) or ((target / MANIFEST).exists() and not _is_repaired(target)):
        raise DatasetError(
            "holds a dataset that no repair wrote", where=str(target), hint="choose another --out; this one stays"
        )
    if not (target / MANIFEST).exists() and _is_half_built(target):
        raise DatasetError("holds an unfinished build", where=str(target), hint="choose another --out; this one stays")


def _is_repaired(target: Path) -> bool:
    try:
        return read_manifest(target).get("repair") is not None
    except DatasetError:
        return (target / CHANGES_TABLE).is_dir()  # damaged, or of an older format: written anew


def _is_half_built(target: Path) -> bool:
    """Whether a build that has not ended, or was killed, left something here. A repair writes changes/ first."""
    if (target / DRAFTS).exists():
        return True
    repaired = any((folder / CHANGES_TABLE).is_dir() for folder in (target, target / BUILDING))
    return not repaired and ((target / "pairs").exists() or any((target / BUILDING).glob("*")))


def same_repair(target: Path, digest: str, wanted: Wanted, audit: dict[str, Any]) -> list[Step] | None:
    """The steps that made the repaired dataset in `target`, if it is whole and the one that is asked for."""
    try:
        manifest = read_manifest(target)
        for name, parts in manifest["parts"].items():
            check_parts(target / name, parts)
    except DatasetError:
        return None
    repair: dict[str, Any] = manifest["repair"]
    asked = [{"repair": name, "setting": setting} for name, setting in wanted.steps()]
    made = [{"repair": step["repair"], "setting": step["setting"]} for step in repair["steps"]]
    built_by = (manifest["format_version"], manifest["prefkit_version"], repair["manifest_sha256"])
    if built_by != (FORMAT_VERSION, __version__, digest) or asked != made or manifest["pipeline"]["audit"] != audit:
        return None
    steps: list[Step] = repair["steps"]
    dropped = sum(step["dropped"] for step in steps)
    return steps if dropped <= wanted.max_dropped * (manifest["counts"]["pairs"] + dropped) else None


def copy_references(source: Path, target: Path) -> list[str]:
    """Copy the finished references that are not there yet; returns the keys of all.

    A reference says for each pair_id what one model scores it: pairs that are gone stay in it unused, as after a
    build of fewer pairs, and pairs that are edited have another pair_id.
    """
    for path in sorted((source / REFERENCES).glob(f"*/{REFERENCE_JSON}")):
        copy = target / REFERENCES / path.parent.name
        if not (copy / REFERENCE_JSON).exists():
            with folder_beside(copy) as beside:
                shutil.copytree(path.parent, beside, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return sorted(path.parent.name for path in (target / REFERENCES).glob(f"*/{REFERENCE_JSON}"))


def write_repaired(
    source: Path, target: Path, manifest: dict[str, Any], mended: Mended, repair: dict[str, Any]
) -> None:
    """Write all tables and, last, the manifest; `manifest` is that of `source`."""
    kind: Kind = manifest["kind"]
    earlier, rejects = (read_table(source, name, manifest) for name in ("dropped", "rejects"))
    dropped = pl.concat([earlier, mended.dropped], how="diagonal")
    pairs = mended.pairs
    counts = _counts(manifest["counts"], pairs, dropped)
    reasons = Counter(dropped["reason"].to_list()) + Counter(rejects["reason"].to_list())
    in_order = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    report = [told for told in manifest["report"] if "corrections" not in told]
    if corrections := correction_report(pairs):
        report.append({"corrections": corrections})
    # changes first: by it `claim_beside` knows what a killed repair has left
    named = {CHANGES_TABLE: mended.changes, "pairs": pairs, "dropped": dropped, "rejects": rejects}
    plain = are_plain([pairs, dropped])
    with built_beside(target) as beside:
        parts = {name: write_table(beside / name, name, frame, kind, plain=plain) for name, frame in named.items()}
        made = {
            "format_version": FORMAT_VERSION,
            "prefkit_version": __version__,
            "counts": counts._asdict(),
            "reasons": in_order,
            "report": report,
            "parts": {name: [part._asdict() for part in listed] for name, listed in parts.items()},
            "repair": {**repair, "steps": mended.steps},
        }
        write_papers(beside, manifest | made)


def _counts(before: dict[str, int], pairs: pl.DataFrame, dropped: pl.DataFrame) -> Counts:
    """The counts of a build whose pairs are these; its equations hold."""
    of_candidates = pl.col("method") == "best_of_n"
    paired = pairs.filter(of_candidates)
    test = pairs.filter(pl.col("split") == "test").height
    with_pair = paired["prompt_id"].n_unique()
    changed = {
        "pairs": pairs.height,
        "dropped": dropped.height,
        "candidate_pairs": paired.height,
        "candidate_dropped": dropped.filter(of_candidates).height,
        "prompts_with_pair": with_pair,
        "prompts_dropped": before["prompts"] - with_pair,
        "train": pairs.height - test,
        "test": test,
    }
    counts = Counts(**before | changed)
    counts.check()
    return counts
