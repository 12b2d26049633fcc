"""The commands that run a model: sample, train, evaluate and so on. A handler parses, calls one function, prints."""

from typing import Annotated, Any

import typer

from prefkit.options import Changes, Json, Model, Target, changed
from prefkit.output import console, emit

app = typer.Typer()


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
def evaluate(
    target: Annotated[str, typer.Argument(help="Folder of a model or run, or a pipeline file.")],
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts, or a dataset: its test split."),
    ] = None,
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
def demo(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the demo's files go.")] = "demo",
) -> None:
    """Walk the whole road on a small authored world, in under three minutes on two cores."""
    from prefkit.demo.walk import run_demo

    run_demo(out, console())
