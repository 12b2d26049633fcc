"""`prefkit score`: sampled responses get scores from functions, reward models, judges and verifiers.

Comes in: a folder of `prefkit sample`, or files of responses. Goes out: scored tables that are a `candidates` source of
a build, one row a response and scorer; what got no score in the scorer's scale stands in `unscored`, with the reason.
What a scorer is (weights, template, the files of a function, settings) is hashed beside its tables: the same one has
nothing to do but new responses, another one under the same name is refused.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from prefkit import __version__
from prefkit.config import Changes, Pipeline
from prefkit.errors import DatasetError, InputError, Interrupted, SourceError
from prefkit.format import Kind
from prefkit.functions import AGAIN
from prefkit.locks import leave_no_empty_directory, locked
from prefkit.models import pick_device
from prefkit.sample_format import INCONSISTENT, SCORED, UNSCORED, VERDICTS
from prefkit.sample_settings import ScorerConfig
from prefkit.scored_folder import (
    CandidateParts,
    begun_file,
    document_file,
    has_parts,
    is_part_current,
    known_identity,
    name_in,
    open_candidates,
    output_folder,
    read_scorer,
    refuse_foreign,
    refuse_others,
    removal,
    remove_other_parts,
    scored_file,
    tables_of,
    write_part,
    write_rejects,
)
from prefkit.scorer_options import SPECS, parse_scorer
from prefkit.scorers import Answers, OpenScorer, Watch, as_result, open_scorer, score_rows
from prefkit.sources import file_sha256
from prefkit.store import write_json
from prefkit.target import path_of, pipeline_of
from prefkit.work import Tell

__all__ = ["ScoredBy", "score_candidates", "score_rows"]


class ScoredBy(NamedTuple):
    """What one scorer made of the candidates."""

    scorer: str  # its name
    kind: str  # function | reward_model | judge | verifier
    out: str  # the folder of its tables
    candidates: int
    scored: int
    unscored: dict[str, int]  # by reason
    mean: float | None  # of the scores
    judge: dict[str, Any] | None  # of a judge: comparisons, consistent, first_share, ...
    advice: list[str]  # in plain words: why nothing was scored, and the like
    new: int  # responses that this call scored, or tried to
    unchanged: bool  # nothing was to do


def score_candidates(
    candidates: str | Path | Pipeline,
    scorers: Sequence[ScorerConfig | str] = (),
    *,
    out: str | Path | None = None,
    changes: Changes = (),
    tell: Tell = lambda _text: None,
    watch: Watch = lambda _done, _total: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[ScoredBy]:
    """Score every response of some candidates by each of some scorers.

    The same scorer again: only responses that are new are scored. Killed or stopped, the next call goes on.

    Args:
        candidates: a folder of `prefkit sample`; a file or glob of responses (prompt, response [, reference, model,
            tools]); a pipeline file, or a Pipeline, with a sample and a score section.
        scorers: settings, or their short form: module:function, reward:FOLDER, judge:FOLDER, verifier:number. Of a
            pipeline those of its score section.
        out: folder of the scored tables; a folder of `prefkit sample` holds its own.
        changes: settings of a pipeline by their dotted keys, as in `load_pipeline`.
        tell: called with lines for a person.
        watch: called after every batch with the responses that are done and all of the scorer's.
        stop: asked after every part; True ends the call there, and the next one goes on.

    Returns:
        what each scorer made of them, in the order of the scorers.

    Raises:
        InputError: no scorer, two of one name, or nowhere to write to.
        ConfigError: a scorer is no scorer, or a function cannot be found.
        SourceError: a file cannot be read, or a function fails.
        DatasetError: the folder is unfinished or held by another prefkit, a scorer of this name is another one, it
            holds scores of a scorer that the score section does not name, or something else than scores of these.
        ModelError: a model does not load.
        MachineError: out of disk or memory.
        Interrupted: `stop` said so.

    Example:
        import pathlib

        pathlib.Path("sums.jsonl").write_text('{"prompt": "6 * 7?", "response": "It is 42.", "reference": "42"}')
        done = prefkit.score_candidates("sums.jsonl", ["verifier:number"], out="sums")
        print(done[0].scored, done[0].unscored, done[0].mean)
    """
    path, configs, are_all = _target(candidates, scorers, changes)
    if not configs:
        raise InputError("no scorer is given", where=path, expected=SPECS, hint="--scorer module:function")
    labels = [config.label for config in configs]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"two scorers are called {twice}", where=path, expected="a name for each", hint="--name NAME")
    folder = output_folder(path, out)
    if are_all:
        refuse_others(folder, labels)
    refuse_foreign(folder, path)
    found = open_candidates(path)
    opened = [open_scorer(config, found.kind, tell) for config in configs]  # before anything is written
    try:
        with locked(folder):
            if found.rejects is not None:
                write_rejects(folder, found.rejects)
                if found.rejects.height:
                    tell(f"{found.rejects.height} rows are no response: see {folder}/rejects")
            return [_score_all(scorer, found, folder, watch, stop) for scorer in opened]
    finally:
        leave_no_empty_directory(folder)


def _target(
    target: str | Path | Pipeline, scorers: Sequence[ScorerConfig | str], changes: Changes
) -> tuple[str, list[ScorerConfig], bool]:
    """The candidates' path; the scorers, a pipeline's own where none are given; and whether those are all there are."""
    given = [parse_scorer(one) if isinstance(one, str) else one for one in scorers]
    if not isinstance(target, Pipeline):
        path = path_of(target, "a folder of prefkit sample, a file of responses, or a pipeline file")
        if path.suffix.lower() not in (".yaml", ".yml"):
            return _without(changes, str(target)), given, False
    target = pipeline_of(target, changes)
    if target.sample is None:
        message, hint = "the pipeline has no sample section", "add sample:, or name the candidates' folder"
        raise InputError(message, where="sample", expected="sample.out, the candidates", hint=hint)
    if not given and target.score is None:
        message, hint = "the pipeline has no score section", "add score: {scorers: [...]}, or --scorer"
        raise InputError(message, where="score", expected="score.scorers", hint=hint)
    if target.score is None or given:
        return target.sample.out, given, False
    return target.sample.out, list(target.score.scorers), True


def _without(changes: Changes, path: str) -> str:
    if changes:
        message = "--set changes a pipeline, and these are candidates"
        raise InputError(message, where=path, expected="a pipeline file", hint="--scorer, --name and --scale")
    return path


def foresee_scores(pipeline: Pipeline) -> tuple[list[str], dict[str, int]]:
    """The names of a pipeline's scorers that have something to do, and the responses that each has scored; no writing.

    Raises:
        whatever `score_candidates` would begin with.
    """
    path, configs, _ = _target(pipeline, (), ())
    folder = output_folder(path, None)
    refuse_others(folder, [config.label for config in configs])
    found = open_candidates(path)
    left, counts = [], {}
    for config in configs:
        scorer = open_scorer(config, found.kind, lambda _text: None)
        document, current = _what_is_there(scorer, found, folder)
        if document is None or not _is_whole(config, found, folder, document, current):
            left.append(config.label)
        else:
            counts[config.label] = int(document["counts"]["scored"])
    return left, counts


# -- one scorer, all parts


def _score_all(
    scorer: OpenScorer, found: CandidateParts, out: Path, watch: Watch, stop: Callable[[], bool]
) -> ScoredBy:
    label = scorer.config.label
    is_known = known_identity(out, label) is not None
    document, before = _what_is_there(scorer, found, out)
    total, done, new = sum(found.sizes), 0, 0
    unchanged = document is not None and _is_whole(scorer.config, found, out, document, before)
    if not unchanged:
        for size, (number, is_current) in zip(found.sizes, before.items(), strict=True):
            if not is_current:
                rows, base = found.read(number), done
                with _told_to_remove(out, label):
                    answers = scorer.ask(rows, _from(base, total, watch))
                if not is_known and not new:
                    remove_other_parts(out, label, ())
                # not before it has answered: one that fails at once may be mended, or be another one
                write_json(begun_file(out, label), {"candidates": found.path, "identity": scorer.identity})
                _write(scorer, rows, answers, out, number, found.kind)
                new += size
            done += size
            watch(done, total)
            if not is_current and stop() and done < total:
                raise Interrupted(f"stopped: {new} responses scored by {label}", where=str(out))
        remove_other_parts(out, label, found.numbers)
        document = _document(scorer, found, out)
        write_json(document_file(out, label), document)
    begun_file(out, label).unlink(missing_ok=True)
    assert document is not None
    return _scored_by(document, out, new, unchanged=unchanged)


def _what_is_there(
    scorer: OpenScorer, found: CandidateParts, out: Path
) -> tuple[dict[str, Any] | None, dict[int, bool]]:
    """The document of a scorer that has come to its end, and of each part whether it is scored as it is now."""
    label, kind = scorer.config.label, scorer.config.kind
    document = _checked_identity(out, label, scorer.identity)
    files = {part["file"]: part["sha256"] for part in (document or {}).get("parts", [])}
    is_known = known_identity(out, label) is not None  # else tables are of who knows which scorer
    return document, {n: is_known and is_part_current(out, label, kind, n, found.read(n), files) for n in found.numbers}


def _is_whole(
    config: ScorerConfig, found: CandidateParts, out: Path, document: Mapping[str, Any], current: Mapping[int, bool]
) -> bool:
    """Whether nothing is to do: all parts are current, and the document names these and no others."""
    wanted = {name_in(out, scored_file(out, t, config.label, n)) for t in tables_of(config.kind) for n in found.numbers}
    return all(current.values()) and wanted == {part["file"] for part in document["parts"]}


@contextlib.contextmanager
def _told_to_remove(out: Path, label: str) -> Iterator[None]:
    """Where a function fails and has scored here before: mending it makes it another one, so its scores must go."""
    try:
        yield
    except (InputError, SourceError) as error:
        if error.hint == AGAIN and has_parts(out, label):
            error.hint = f"mend it, {removal(out, label)}, and type the same command"
        raise


def _checked_identity(out: Path, label: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document of a scorer that was here before.

    Raises:
        DatasetError: it is another scorer.
    """
    known = known_identity(out, label)
    if known is not None and known != identity:
        names = sorted(name for name in {*known, *identity} if known.get(name, _ABSENT) != identity.get(name, _ABSENT))
        raise DatasetError(
            f"the scorer {label} has scored here and is another one now: {', '.join(names)} differ",
            where=str(document_file(out, label)),
            expected="the same scorer under the same name",
            hint=f"{removal(out, label)}, or choose another folder; under another name (--name, name:) the old scores "
            "stay beside the new ones, and a build takes both",
        )
    return read_scorer(out, label)


_ABSENT = object()


def _from(base: int, total: int, watch: Watch) -> Watch:
    """What to tell of a part that begins after `base` responses."""
    return lambda done, _all: watch(base + done, total)


def _write(scorer: OpenScorer, rows: pl.DataFrame, answers: Answers, out: Path, number: int, kind: Kind) -> None:
    """The tables of one part, the scored one last: it says that the others are there."""
    label = scorer.config.label
    result = as_result(answers.given, scorer.config.scale)
    named = rows.hstack(result).with_columns(pl.lit(label).alias("scorer"))
    if answers.comparisons is not None:
        compared = answers.comparisons.with_columns(pl.lit(label).alias("scorer"))
        write_part(out, VERDICTS, label, number, compared.filter(pl.col("reason").is_null()), kind)
        write_part(out, INCONSISTENT, label, number, compared.filter(pl.col("reason").is_not_null()), kind)
    write_part(out, UNSCORED, label, number, named.filter(pl.col("reason").is_not_null()), kind)
    write_part(out, SCORED, label, number, named.filter(pl.col("reason").is_null()), kind)


def _document(scorer: OpenScorer, found: CandidateParts, out: Path) -> dict[str, Any]:
    """What a scorer is and did, all of it read off its finished parts."""
    config, label = scorer.config, scorer.config.label
    files = {t: [scored_file(out, t, label, n) for n in found.numbers] for t in tables_of(config.kind)}
    scores = _columns(files[SCORED], ["score"])["score"]
    reasons = (
        _columns(files[UNSCORED], ["reason"])["reason"].value_counts().sort("count", "reason", descending=[True, False])
    )
    unscored = {reason: int(count) for reason, count in reasons.iter_rows()}
    judge = _judge_figures(files) if config.kind == "judge" else None
    mean = math.fsum(scores) / len(scores) if len(scores) else None
    advice = _advice(label, len(scores), unscored, judge)
    return {
        "scorer": label,
        "kind": config.kind,
        "candidates": found.path,
        "identity": scorer.identity,
        "provenance": {
            "settings": config.model_dump(mode="json", exclude_none=True),
            "device": pick_device().type if config.kind in ("reward_model", "judge") else None,
            "versions": _versions(),
        },
        "counts": {"candidates": sum(found.sizes), "scored": len(scores), "unscored": sum(unscored.values())},
        "unscored": unscored,
        "mean": mean,
        "judge": judge,
        "advice": advice,
        "parts": [
            {
                "file": name_in(out, file),
                "rows": int(pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()),
                "sha256": file_sha256(file),
            }
            for table in files.values()
            for file in table
        ],
    }


def _versions() -> dict[str, str]:
    import transformers

    return {"prefkit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _columns(files: Sequence[Path], names: list[str]) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file, columns=names, glob=False) for file in files])


def _judge_figures(files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """How often a judge agrees with itself, and which place it names."""
    names = ["log_odds_ab", "log_odds_ba", "winner"]
    kept, rest = (_columns(files[table], names) for table in (VERDICTS, INCONSISTENT))
    both = pl.concat([kept, rest]).drop_nulls("log_odds_ab")
    # of a being better: above 0 with a shown first, below 0 with b shown first, is a verdict for the first
    firsts = pl.concat([both["log_odds_ab"], -both["log_odds_ba"]])
    first, second = int((firsts > 0).sum()), int((firsts < 0).sum())
    return {
        "comparisons": both.height,
        "consistent": kept.height,
        "ties": int((kept["winner"] == "tie").sum()),
        "not_compared": kept.height + rest.height - both.height,
        "consistent_share": kept.height / both.height if both.height else None,
        "first_share": first / (first + second) if first + second else None,
    }


def _advice(label: str, scored: int, unscored: Mapping[str, int], judge: Mapping[str, Any] | None) -> list[str]:
    """In plain words: why nothing is left, and when little of it is worth anything."""
    if judge is not None:
        return _judge_advice(label, judge)
    if not scored and unscored:
        most = next(iter(unscored))
        return [f"{label} scored nothing: {_why(most)}. No pairs can be built from it"]
    return []


def _why(reason: str) -> str:
    return {
        "no_score": "it gave no score",
        "no_reference": "no candidate has a reference that it can read",
        "not_finite": "its scores are not finite",
        "out_of_scale": "its scores are out of the scale that was declared",
        "too_long": "every response is too long for its model",
    }.get(reason, reason)


def _judge_advice(label: str, judge: Mapping[str, Any]) -> list[str]:
    compared, consistent, first = judge["comparisons"], judge["consistent"], judge["first_share"]
    if not compared:
        return [f"{label} compared nothing: no prompt has two different responses that fit its model"]
    if not consistent:
        start = f"none of the {compared} verdicts of {label} holds when the order is changed"
        end = "no response is scored, and no pairs can be built"
        if first == 1.0:
            return [f"{start}: it always prefers the response shown first, whichever that is; {end}"]
        if first == 0.0:
            return [f"{start}: it always prefers the response shown second, whichever that is; {end}"]
        return [f"{start}; {end}"]
    share = judge["consistent_share"]
    if share < 0.6:
        message = f"only {share:.0%} of the verdicts of {label} hold when the order is changed; by chance half would"
        return [message + (f", and {first:.0%} are for the response shown first" if first is not None else "")]
    return []


def _scored_by(document: Mapping[str, Any], out: Path, new: int, *, unchanged: bool) -> ScoredBy:
    counts = document["counts"]
    return ScoredBy(
        document["scorer"],
        document["kind"],
        str(out),
        counts["candidates"],
        counts["scored"],
        document["unscored"],
        document["mean"],
        document["judge"],
        document["advice"],
        new,
        unchanged,
    )
