"""The commands that need no model: build, audit, query and so on. A handler parses, calls one function, prints."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefkit.options import Changes, Json, Target, changed
from prefkit.output import console, emit, put

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

    from prefkit.results import Form
    from prefkit.terminal import QueryLine

app = typer.Typer()


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
