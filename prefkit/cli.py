"""The commands. A handler parses, calls one public function and prints; nothing heavy is imported before it runs.

Human output goes to stdout, progress to stderr; with --json everything but one JSON object (the last line) goes to
stderr. Exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine ran out of something, 70 a bug of prefkit's
own, 130 interrupted. Of several processes started together the first one speaks.
"""

import io
import json
import os
import shlex
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation
    from rich.console import Console

    from prefkit.errors import MachineError
    from prefkit.results import Form
    from prefkit.terminal import QueryLine

app = typer.Typer(
    name="prefkit",
    help="Build preference pairs, audit them, score the reference once, train with DPO. Offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Target = Annotated[str, typer.Argument(help="A dataset directory, or a pipeline file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="section.key=value", help="Change a setting; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Model = Annotated[str | None, typer.Option("--model", help="Model folder; otherwise the pipeline's.")]


def console(*, as_json: bool = False) -> "Console":
    """Where a person reads: stdout, or stderr beside --json. Data and paths are never markup."""
    from rich.console import Console

    from prefkit.text import printable

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would end the command; whoever reads its words does not decide that
            close_stdout()

        def print(self, *objects: Any, **options: Any) -> None:  # names of files are data: no escape sequences
            super().print(*(self.shown(o) if isinstance(o, str) else o for o in objects), **options)

        def shown(self, text: str) -> str:  # a screen that has not every character shows the rest
            return printable(text).encode(self.encoding, "replace").decode(self.encoding)

    return Screen(stderr=as_json, quiet=not speaks(), markup=False, highlight=False, soft_wrap=True)


class ReaderGone(Exception):  # noqa: N818 - nothing went wrong
    """Whoever reads stdout has seen enough. No OSError: typer would end with 1 at that."""


def put(text: str) -> None:
    """Write to stdout, whole."""
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        raise ReaderGone from None


def speaks(error: Exception | None = None) -> bool:
    """Whether this process is the one that prints: the first of several, and any with an error of its own."""
    from prefkit.processes import ALONE_WITH, process_rank

    return process_rank() == 0 or hasattr(error, ALONE_WITH)


def emit(value: dict[str, Any], *, as_json: bool, error: Exception | None = None) -> None:
    """The one JSON line of a command, or of the error that ended it."""
    if as_json and speaks(error):
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # a file name that is no UTF-8
            text = json.dumps(value, allow_nan=False)
        put(text + "\n")


def changed(changes: list[str] | None, **options: object) -> list[str]:
    """`--set` changes, with options that are short for one."""
    named = [
        f"{key.replace('__', '.')}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    return [*(changes or []), *named]


@app.command()
def build(
    pipeline: Annotated[str, typer.Argument(help="The pipeline file (YAML).")],
    out: Annotated[
        str | None, typer.Option("--out", help="Dataset directory; otherwise the pipeline's dataset:.")
    ] = None,
    changes: Changes = None,
    check: Annotated[bool, typer.Option("--check", help="Read and check everything, write nothing.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build all anew, also where new sources could be added to what is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a dataset of preference pairs from the sources of a pipeline, or add its new sources to one."""
    from prefkit.build import build_dataset
    from prefkit.config import load_pipeline
    from prefkit.terminal import build_progress, print_build

    screen = console(as_json=as_json)
    settings = load_pipeline(pipeline, changes or [], dataset=out)
    with build_progress() as watch:
        built = build_dataset(settings, check=check, rebuild=rebuild, tell=screen.print, watch=watch)
    print_build(built, screen)
    emit(
        {
            "dataset": built.dataset,
            "kind": built.kind,
            "counts": built.counts,
            "reasons": built.reasons,
            "unused": built.unused,
            "report": built.report,
            "added": built.added,
            "seconds": built.seconds,
        },
        as_json=as_json,
    )


@app.command()
def score(
    candidates: Annotated[
        str, typer.Argument(help="A folder of prefkit sample, a file of responses, or a pipeline file.")
    ],
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="SPEC",
            help="module:function, reward:FOLDER, judge:FOLDER, verifier:number; repeatable. Or the pipeline's.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the one scorer, in the scorer column.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="LO,HI", help="Of the one scorer: other scores are rejects.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the scored tables of a file go.")
    ] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Score sampled responses: functions, reward models, judges, verifiers."""
    from prefkit.scorer_options import read_scorers

    scorers = read_scorers(scorer or [], name, scale)
    from prefkit.score import score_candidates
    from prefkit.stopping import stop_on_signals
    from prefkit.terminal import pass_progress, print_scored

    screen = console(as_json=as_json)
    with pass_progress("responses") as (line, watch), stop_on_signals("this part") as stop:
        line("scoring")
        done = score_candidates(
            candidates, scorers, out=out, changes=changes or [], tell=screen.print, watch=watch, stop=stop
        )
    print_scored(done, screen)
    emit({"scorers": [one._asdict() for one in done]}, as_json=as_json)


@app.command()
def audit(
    target: Target,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Findings must hold under stricter tests; exit 1 at audit.limits.strict (warn) or worse.",
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of a tokenizer: count the tokens that DPO will see, too.")
    ] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Find what gives the answer away: words, length, structure, generators."""
    from prefkit.target import pipeline_of

    pipeline = pipeline_of(target, changed(changes, audit__model=model))
    from prefkit.audits import audit_dataset, enforce_audit
    from prefkit.errors import AuditError
    from prefkit.report import print_audit
    from prefkit.terminal import pass_progress

    with pass_progress() as (tell, watch):
        audited = audit_dataset(pipeline, strict=strict, tell=tell, watch=watch)
    print_audit(audited, console(as_json=as_json))
    emit(audited.document, as_json=as_json)
    if strict:
        try:
            enforce_audit(audited, pipeline.audit.limits.strict)
        except AuditError as error:  # the JSON line is out already, and stays the last one
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(error.exit_code) from None


@app.command()
def precompute(
    target: Target,
    model: Model = None,
    changes: Changes = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Count tokens and truncations, estimate time and disk, write nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score every pair once with the reference model."""
    from prefkit.target import pipeline_of

    pipeline = pipeline_of(target, changed(changes, precompute__model=model))
    from prefkit import reference
    from prefkit.stopping import stop_on_signals
    from prefkit.terminal import print_dry_run, print_precomputed, token_progress

    screen = console(as_json=as_json)
    if dry_run:
        foretold = reference.estimate_reference(pipeline, tell=screen.print)
        print_dry_run(foretold, screen)
        return emit(foretold._asdict(), as_json=as_json)
    with token_progress() as watch, stop_on_signals("this part") as stop:
        done = reference.precompute_reference(pipeline, tell=screen.print, watch=watch, stop=stop)
    print_precomputed(done, screen)
    return emit(
        {"key": done.key, "pairs": done.pairs, "dropped": done.dropped, "seconds": done.seconds},
        as_json=as_json,
    )


@app.command()
def train(
    target: Target,
    model: Model = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="KEY", help="Which reference, where several fit.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="RUN", help="Run directory; otherwise DATASET/runs/<n>.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Go on with an unfinished run although settings were changed.")
    ] = False,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Train a policy with DPO against the precomputed reference."""
    from prefkit.target import pipeline_of

    pipeline = pipeline_of(target, changed(changes, train__model=model))
    from prefkit.stopping import stop_on_signals
    from prefkit.terminal import print_trained, step_progress
    from prefkit.train import train_dpo

    screen = console(as_json=as_json)
    with step_progress() as watch, stop_on_signals("this step and a checkpoint") as stop:
        trained = train_dpo(
            pipeline, reference=reference, out=out, go_on=go_on, tell=screen.print, watch=watch, stop=stop
        )
    print_trained(trained, screen)
    emit(
        {"run": trained.run, "steps": trained.steps, "loss": trained.loss, "eval": trained.eval},
        as_json=as_json,
    )


@app.command()
def sample(
    target: Annotated[str, typer.Argument(help="A file of prompts, a dataset for its prompts, or a pipeline file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of a model or run; otherwise the pipeline's.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", metavar="N", min=1, help="Responses a prompt.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="CANDIDATES", help="The directory that is written.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0: always the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Only the likeliest tokens.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest response.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed, the same samples.")] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Sample N responses of a model to each prompt, with its own log-probs."""
    given = {"model": model, "n": n, "out": out, "temperature": temperature, "top_p": top_p}
    given |= {"max_new_tokens": max_new_tokens, "seed": seed}
    from prefkit.target import sampling_of

    pipeline = sampling_of(target, changed(changes, **{f"sample__{key}": value for key, value in given.items()}))
    from prefkit.sample import sample_candidates
    from prefkit.stopping import stop_on_signals
    from prefkit.terminal import print_sampled, sample_progress

    screen = console(as_json=as_json)
    with sample_progress() as watch, stop_on_signals("this part") as stop:
        done = sample_candidates(pipeline, tell=screen.print, watch=watch, stop=stop)
    print_sampled(done, screen)
    emit(done._asdict(), as_json=as_json)


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="The pipeline file (YAML).")],
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", help="sample, score, build, audit, precompute, train or evaluate."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is done and what is not, do nothing.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Audit strictly; exit 1 at audit.limits.strict (warn) or worse.")
    ] = False,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Go the whole road of a pipeline, from samples to an evaluated model; a stage that is done is skipped."""
    from prefkit.road import run_pipeline
    from prefkit.road_view import RoadScreen

    gone = run_pipeline(
        pipeline,
        changes=changes or [],
        until=until,
        dry_run=dry_run,
        strict=strict,
        spectator=RoadScreen(console(as_json=as_json)),
    )
    stages = [{name: getattr(one, name) for name in ("stage", "done", "why", "said", "facts")} for one in gone.stages]
    emit({"dataset": gone.dataset, "run": gone.run, "stages": stages}, as_json=as_json)


@app.command()
def sweep(
    target: Target,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="train.key=value,value", help="A setting and its values, or a change of any; repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the combinations and which are done.")] = False,
    as_json: Json = False,
) -> None:
    """Train a run a combination of settings, all on one reference pass, and make one table of them."""
    from prefkit.road_view import RoadScreen, print_sweep
    from prefkit.sweep import sweep_pipeline

    screen = console(as_json=as_json)
    swept = sweep_pipeline(target, values or [], dry_run=dry_run, spectator=RoadScreen(screen, results=False))
    print_sweep(swept, screen)
    told = {name: getattr(swept, name) for name in ("dataset", "sweep", "reference", "settings", "trained", "failed")}
    emit(told | {"combinations": swept.table.to_dicts()}, as_json=as_json)
    if swept.failed and not dry_run:
        raise typer.Exit(1)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="Folder of a model or run, or a pipeline file.")],
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="Prompts that are answered.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="Folder of the model to compare with.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="DATASET", help="Of held-out pairs; otherwise the run's.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option("--scorer", metavar="SPEC", help="As of prefkit score; repeatable."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", min=0, help="Sampled at; repeatable. 1 if left out.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", metavar="N", min=1, help="Responses a prompt.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest response.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="WHOM", help="Of the win rate: reference, chosen, or a model's folder."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where it goes; otherwise into the run.")
    ] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Measure a model on fresh responses: reward, win rate, KL, length, diversity, held-out pairs, perplexity."""
    from prefkit.scorer_options import read_scorers

    scorers = [one.model_dump(mode="json", exclude_unset=True) for one in read_scorers(scorer or [], None, None)]
    given: dict[str, Any] = {
        "prompts__path": prompts,
        "temperatures": temperature or None,
        "n": n,
        "max_new_tokens": max_new_tokens,
    }
    given |= {"scorers": scorers or None, "against": against, "reference": reference}
    from prefkit.target import evaluating_of

    # --prompts is in place of the pipeline's, with their columns and limit; those of --set are for these
    named = [*changed(None, evaluate__prompts=prompts), *(changes or [])]
    settings = evaluating_of(target, changed(named, **{f"evaluate__{key}": value for key, value in given.items()}))
    from prefkit.evaluate import evaluate_target
    from prefkit.evaluation_view import print_evaluated
    from prefkit.stopping import stop_on_signals
    from prefkit.terminal import pass_progress

    with pass_progress("") as (tell, watch), stop_on_signals("this part") as stop:
        done = evaluate_target(target, settings, dataset=dataset, out=out, tell=tell, watch=watch, stop=stop)
    print_evaluated(done, console(as_json=as_json))
    summary = done.summary.to_dicts()
    emit({"folder": done.folder, **done.document, "summary": summary, "seconds": done.seconds}, as_json=as_json)


@app.command()
def query(
    dataset: Annotated[str, typer.Argument(help="A dataset directory.")],
    sql: Annotated[
        str | None,
        typer.Argument(help="One SELECT, @FILE.sql or - for stdin; left out: the views that there are."),
    ] = None,
    form: Annotated[
        Literal["table", "csv", "json", "parquet"] | None,
        typer.Option("--format", help="How rows are written: otherwise a table, or as FILE is named."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write to a file instead of stdout.")] = None,
    external: Annotated[
        bool, typer.Option("--external", help="Let the SELECT read other files and URLs too, as DuckDB does.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare files with their hashes.")] = False,
) -> None:
    """Ask a dataset in SQL (DuckDB)."""
    from prefkit import query as asking
    from prefkit.results import result_form
    from prefkit.terminal import query_progress

    written = result_form(form, out, dataset)
    with query_progress() as line:
        if sql is None:
            return show_result(asking.list_views(dataset), written, out, line, views=True)
        text, verify = asking.read_sql(sql), not no_verify
        relation = asking.query_dataset(
            dataset, text, external=external, verify=verify, tell=line.tell, watch=line.watch
        )
        return show_result(relation, written, out, line)


def show_result(
    relation: "DuckDBPyRelation", form: "Form", out: str | None, line: "QueryLine", *, views: bool = False
) -> None:
    """Print the first rows of a result as a table, or write all of it; the progress line goes before rows appear."""
    from prefkit.grid import MAX_ROWS, print_rows, print_views
    from prefkit.results import first_rows, write_result

    def shown(text: str) -> None:
        if sys.stdout.isatty():
            line.end()
        put(text)

    if form == "table":
        found = first_rows(relation, MAX_ROWS, line.interrupt)
        line.end()
        return (print_views if views else print_rows)(found, console())
    rows = write_result(relation, form, out, shown, line.interrupt)
    line.end()
    return console().print(f"{rows} rows in {out}") if out is not None else None


@app.command()
def repair(
    dataset: Annotated[str, typer.Argument(help="A dataset directory; it stays as it is.")],
    out: Annotated[str, typer.Option("--out", metavar="NEW", help="Directory of the repaired dataset.")],
    strip_opener: Annotated[
        list[str] | None,
        typer.Option("--strip-opener", metavar="TEXT", help="Cut it off both sides; repeatable."),
    ] = None,
    balance: Annotated[
        list[str] | None,
        typer.Option("--balance", metavar="TOKEN", help="As often in chosen only as in rejected only; repeatable."),
    ] = None,
    match_length: Annotated[
        bool, typer.Option("--match-length", help="As many longer chosen sides as longer rejected ones.")
    ] = False,
    drop_shortcuts: Annotated[
        float | None,
        typer.Option(
            "--drop-shortcuts",
            metavar="ACCURACY",
            min=0.5,
            max=1,
            help="No probe of length, structure or words above it (.5 to 1).",
        ),
    ] = None,
    max_dropped: Annotated[
        float, typer.Option("--max-dropped", metavar="SHARE", min=0, max=1, help="Of the pairs, at most.")
    ] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another repaired dataset in NEW.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="audit.key=value", help="Change a setting of the audits; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a new dataset without the shortcuts, and audit both."""
    from prefkit.before_after import print_repaired
    from prefkit.repairs import repair_dataset

    screen = console(as_json=as_json)
    repaired = repair_dataset(
        dataset,
        out,
        strip_openers=strip_opener or [],
        balance=balance or [],
        match_length=match_length,
        drop_shortcuts=drop_shortcuts,
        max_dropped=max_dropped,
        overwrite=overwrite,
        changes=changes or [],
        tell=screen.print,
    )
    print_repaired(repaired, screen)
    told = {name: getattr(repaired, name) for name in ("dataset", "out", "steps", "counts", "references")}
    emit(told | {"before": repaired.before.verdict, "after": repaired.after.verdict}, as_json=as_json)


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="A dataset directory.")],
    where: Annotated[
        str | None, typer.Option("--where", metavar="SQL", help="A condition over pairs and pair_scores.")
    ] = None,
    token: Annotated[str | None, typer.Option("--token", metavar="T", help="Word or n-gram on one side only.")] = None,
    count: Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many pairs.")] = 5,
    width: Annotated[int | None, typer.Option("--width", metavar="W", min=20, help="Columns.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Shorten nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Look at pairs side by side: what differs, and what gives chosen away."""
    from prefkit.show import as_dict, show_pairs
    from prefkit.sides import print_pairs

    shown = show_pairs(dataset, where=where, token=token, count=count)
    print_pairs(shown, console(as_json=as_json), width=width, full=full)
    emit(as_dict(shown), as_json=as_json)


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="A dataset directory, or a file of ready-made pairs.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Another trainer's format, such as trl.")],
    out: Annotated[
        str, typer.Option("--out", metavar="PATH", help="FILE.jsonl, .jsonl.gz, .json or .parquet; or a directory.")
    ],
    split: Annotated[
        Literal["train", "test"] | None, typer.Option("--split", help="Only these pairs of a dataset.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Of a file; otherwise found by its rows.")
    ] = None,
    with_reference: Annotated[
        bool, typer.Option("--with-reference", help="Add ref_chosen_logps and ref_rejected_logps of the reference.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="KEY", help="Of which, where there are several.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Write pairs as another trainer reads them."""
    from prefkit.export import export_dataset
    from prefkit.terminal import print_exported

    exported = export_dataset(
        target,
        to,
        out,
        split,
        source_format,
        with_reference=with_reference,
        reference=reference,
        overwrite=overwrite,
    )
    print_exported(exported, console(as_json=as_json))
    emit(exported._asdict(), as_json=as_json)


@app.command()
def info(
    targets: Annotated[list[str], typer.Argument(help="A dataset or run directory, or several runs.")],
    html: Annotated[
        str | None, typer.Option("--html", metavar="PAGE.html", help="Write one page with the runs' curves.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace PAGE.html although it is no such page.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of a dataset, and fail where a file is not as it was written.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a dataset or a run holds; verify a dataset; draw the curves of runs."""
    from prefkit.info import dataset_info, read_runs
    from prefkit.run_view import print_runs
    from prefkit.terminal import print_info

    screen = console(as_json=as_json)
    if html is not None and verify:
        from prefkit.errors import InputError

        raise InputError("--verify is for a dataset, and --html for runs", where="--verify")
    if html is not None:
        from prefkit.run_page import write_run_page

        written = write_run_page(targets, html, overwrite=overwrite)
        screen.print(f"{written.page}: {written.runs} run{'s' * (written.runs > 1)}, {written.bytes / 1e6:.1f} MB")
        return emit(written._asdict(), as_json=as_json)
    found = dataset_info(*targets, verify=verify)
    if "dataset" in found and "run" not in found:
        print_info(found, screen)
    else:
        print_runs(read_runs(targets), screen)
    return emit(found, as_json=as_json)


@app.command()
def formats(as_json: Json = False) -> None:
    """List the formats that sources can have and that pairs are exported to."""
    from prefkit.formats import list_formats
    from prefkit.terminal import print_formats

    listed = list_formats()
    print_formats(listed, console(as_json=as_json))
    emit(listed, as_json=as_json)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the demo's files go.")] = "demo",
) -> None:
    """Walk the whole road on a small authored world, in under three minutes on two cores."""
    from prefkit.demo.walk import run_demo

    run_demo(out, console())


def main() -> None:
    """The entry point: every failure is a message and an exit code; only a bug of our own shows a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop is asked to stop
    as_json = "--json" in sys.argv
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED: a short write would be lost
        sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer turns an interrupt into this exit code, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()  # here a full disk, or a reader that is gone, is still ours to answer
    except (ReaderGone, BrokenPipeError):  # `prefkit query ... | head`
        close_stdout()
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        leave(answer(None, as_json=as_json))
    except Exception as error:
        leave(answer(error, as_json=as_json))
    sys.exit(code if isinstance(code, int) else 0)


def leave(code: int) -> None:
    """End with an exit code; at once where this process could not part from others, which might keep it for ever."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def close_stdout() -> None:
    """Nothing more can be written there, not even what Python still holds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def answer(error: Exception | None, *, as_json: bool) -> int:
    """Say what went wrong (None: somebody interrupted); returns the exit code."""
    from prefkit.errors import Interrupted, PrefkitError
    from prefkit.processes import ALONE_WITH, num_processes

    if error is None or (type(error) is RuntimeError and "Query interrupted" in str(error)):  # as DuckDB says it
        error = Interrupted("interrupted; what is finished is on disk")
    known = error if isinstance(error, PrefkitError) else machine_failure(error)
    if known is not None:
        if (rank := getattr(error, ALONE_WITH, None)) is not None:
            known.message = f"process {rank}: {known.message}"
            setattr(known, ALONE_WITH, rank)
        if isinstance(known, Interrupted):  # without the launcher of several processes, which nobody can know
            known.hint = shlex.join(["prefkit", *sys.argv[1:]])
            if num_processes() > 1:
                known.hint += ", by a launcher of any number of processes"
        fail(known.as_dict(), str(known), known, as_json=as_json)
        return known.exit_code
    show = getattr(error, "show", None)  # a usage error knows how to show itself
    if show is not None:
        show()
        fail({"kind": "UsageError", "message": str(error)}, "", error, as_json=as_json)
        return 2
    if speaks(error):
        traceback.print_exception(error)
    message = f"a bug in prefkit: {type(error).__name__}: {error}"
    told = f"{message}\n  next: report it with the lines above"
    fail({"kind": "Bug", "message": message}, told, error, as_json=as_json)
    return 70


def machine_failure(error: Exception) -> "MachineError | None":
    """What the machine ran out of, if that is what an error says."""
    from prefkit.errors import MachineError, is_out_of_memory, no_room

    if is_out_of_memory(error):
        return MachineError("out of memory", hint="a smaller batch_size or max_length, or another dtype, needs less")
    return no_room(error)


def fail(value: dict[str, Any], message: str, error: Exception, *, as_json: bool) -> None:
    """The message on stderr, and with --json the error object as the last line of stdout."""
    if message and speaks(error):
        from prefkit.text import printable

        sys.stderr.write(f"error: {printable(message)}\n")
    try:
        emit({"error": value}, as_json=as_json, error=error)
        sys.stdout.flush()
    except (ReaderGone, OSError):  # stdout itself may be what has no room
        close_stdout()
