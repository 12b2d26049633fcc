"""How results look on a terminal: plain lines and small tables, and progress with a rate and an ETA on stderr."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from prefkit.format import CARD, MANIFEST
from prefkit.processes import process_rank

if TYPE_CHECKING:
    import duckdb

    from prefkit.build import Built, Watch
    from prefkit.export import Exported
    from prefkit.reference import Estimated, Precomputed
    from prefkit.run import Trained
    from prefkit.sample import Sampled
    from prefkit.score import ScoredBy

QUANTILES = ("min", "p10", "median", "p90", "max")  # in this order, whatever order a manifest has


def print_build(built: "Built", console: Console) -> None:
    """The counts of a build, both accounting equations, and the reasons."""
    c = built.counts
    state = "is up to date" if built.unchanged else "checked, nothing written" if built.checked_only else "written"
    if built.added:
        conflicts = built.added["split_conflicts"]
        clash = f", {conflicts} new pairs dropped as split_conflict" if conflicts else ""
        console.print(
            f"{built.added['pairs']} pairs from {', '.join(built.added['sources'])} added to "
            f"{built.added['pairs_before']} that stay as they were{clash}"
        )
    console.print(
        f"{built.dataset} ({built.kind}) {state}: {c['pairs']} pairs, {c['train']} train and {c['test']} test"
    )
    if c["rows"]:
        pairs, dropped = c["pairs"] - c["candidate_pairs"], c["dropped"] - c["candidate_dropped"]
        rejects = c["rejects"] - c["candidate_rejects"]
        console.print(f"  rows:       {c['rows']} = {pairs} pairs + {dropped} dropped + {rejects} rejects")
    if c["candidates"]:
        unused = ", ".join(f"{count} {reason}" for reason, count in built.unused.items())
        console.print(
            f"  candidates: {c['candidates']} = {c['used']} used + {c['unused']} unused"
            f" + {c['candidate_rejects']} rejects" + (f" (unused: {unused})" if unused else "")
        )
        console.print(
            f"  prompts:    {c['prompts']} = {c['prompts_with_pair']} with a pair + {c['prompts_dropped']} dropped"
        )
    for reason, count in built.reasons.items():
        console.print(f"  {count:>9} {reason}")
    for told in built.report:
        _print_report(told, console)


def _print_report(told: Mapping[str, Any], console: Console) -> None:
    """What selection or rules did with one source, or how far apart the corrections are."""
    selection = told.get("candidates")
    if selection and selection["num_candidates"]["max"] is not None:
        of, margins = selection["num_candidates"], selection["margins"]
        console.print(f"  selection in {told['source']}: {of['median']:g} candidates a prompt (at most {of['max']})")
        if margins["max"] is not None:
            console.print("    margin: " + ", ".join(f"{name} {margins[name]:g}" for name in QUANTILES))
        if without := selection["prompts_without_pair"]:
            console.print("    no pair: " + ", ".join(f"{count} {reason}" for reason, count in without.items()))
    if rules := told.get("rules"):
        console.print(f"  rules on {rules['num_responses']} responses of {told['source']}")
        for name, count in rules["touched"].items():
            console.print(f"    {count / max(1, rules['num_responses']):>7.1%} changed by {name}")
    if (prompts := told.get("prompts")) and prompts["num_near_duplicate_clusters"]:
        console.print(f"  {prompts['num_near_duplicate_clusters']} clusters of near-duplicates")
    if corrections := told.get("corrections"):
        distance = ", ".join(f"{name} {corrections['edit_distance'][name]:.2f}" for name in QUANTILES[1:4])
        shared = corrections["shared_prefix"]["median"]
        console.print(f"  corrections: edit distance {distance} of the words; median shared prefix {shared:.2f}")
    for section in told.values():
        for advice in section.get("advice", []) if isinstance(section, Mapping) else []:
            console.print(f"    advice: {advice}")


def print_scored(done: "Sequence[ScoredBy]", console: Console) -> None:
    """What each scorer made of the candidates, and in plain words why nothing was left."""
    for one in done:
        mean = "" if one.mean is None else f", mean {one.mean:.4f}"
        state = "nothing to do" if one.unchanged else f"{one.new} done now"
        console.print(f"{one.scorer} ({one.kind}): {one.scored} of {one.candidates} responses scored{mean}; {state}")
        for reason, count in one.unscored.items():
            console.print(f"  {count:>9} {reason}")
        if one.judge is not None and one.judge["comparisons"]:
            kept, first = one.judge["consistent_share"], one.judge["first_share"]
            place = "" if first is None else f"; {first:.0%} of all verdicts are for the response shown first"
            console.print(
                f"  {one.judge['comparisons']} comparisons, {kept:.0%} with the same verdict in both orders{place}"
            )
        for advice in one.advice:
            console.print(f"  advice: {advice}")


def print_dry_run(foretold: "Estimated", console: Console) -> None:
    """What a reference pass would do."""
    most = foretold.max_batch_tokens
    held = "" if most is None else f" of at most {most}, what pairs share counted once"
    console.print(
        f"reference {foretold.key}: {foretold.pairs} pairs, {foretold.tokens} tokens in {foretold.batches} batches"
        f"{held}; {foretold.layout}"
    )
    for reason, count in {**foretold.dropped, **_worth_saying(foretold.counts)}.items():
        console.print(f"  {count:>9} {reason}")
    for tokens, count in foretold.boundary.items():
        if tokens != "0":
            console.print(f"  {count:>9} prompts whose last {tokens} tokens merge with the completion")
    if not foretold.to_score:
        console.print("  all of them are scored: nothing to do, and nothing written")
        return
    console.print(
        f"  {foretold.to_score} pairs to score: about {foretold.disk_bytes / 1e6:.1f} MB on disk and "
        f"{foretold.seconds:.0f} s here (one batch timed); nothing written"
    )


def print_precomputed(done: "Precomputed", console: Console) -> None:
    """What a reference pass did."""
    state = f"{done.scored} scored now" if done.scored else "nothing to do"
    console.print(f"reference {done.key}: {done.pairs} pairs, {done.dropped} dropped by encoding; {state}")
    for name, count in {**done.reasons, **_worth_saying(done.counts)}.items():
        console.print(f"  {count:>9} {name}")


def _worth_saying(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count and name != "tokens"}


def print_sampled(done: "Sampled", console: Console) -> None:
    """What was sampled, why responses ended, and how fast."""
    state = "nothing to do" if done.unchanged else f"{done.new} sampled now"
    console.print(f"{done.out}: {done.samples} responses to {done.prompts} prompts, {done.tokens} tokens; {state}")
    ends = ", ".join(f"{reason} {count / max(1, done.samples):.1%}" for reason, count in done.finish_reasons.items())
    console.print(f"  ended by: {ends}")
    if done.rejects:
        console.print(f"  {done.rejects:>9} lines that are no prompt, in rejects/")
    for reason, count in done.dropped.items():
        console.print(f"  {count:>9} {reason}")
    if done.new:
        console.print(
            f"  {done.tokens_per_second:,.0f} tokens/s, {done.padding_share:.1%} of the token slots lost to padding"
        )


def print_trained(trained: "Trained", console: Console) -> None:
    """Loss at both ends, and the test split."""
    console.print(f"{trained.run}: {trained.steps} updates, loss {trained.first_loss:.4f} -> {trained.loss:.4f}")
    if trained.eval is None:
        console.print("  no test split: nothing held out to evaluate on")
        return
    accuracy, margin = trained.eval["rewards/accuracies"], trained.eval["rewards/margins"]
    which = ""
    if trained.best is not None:
        early = "stopped early; " if trained.stopped_early else ""
        console.print(
            f"  {early}the final model is that of step {trained.best['step']}, best by {trained.best['metric']}"
        )
        which = f" (step {trained.best['step']})"
    console.print(f"  test{which}: accuracy {accuracy:.3f}, margin {margin:.4f}, loss {trained.eval['loss']:.4f}")


def print_exported(exported: "Exported", console: Console) -> None:
    """What an export wrote, and what it left out."""
    for name, rows in exported.files.items():
        console.print(f"{name}: {rows} rows")
    for name in exported.beside:
        console.print(f"{name}: goes with them")
    for reason, count in exported.left_out.items():
        console.print(f"  {count:>9} left out: {reason}")
    if exported.left_out_list is not None:
        console.print(f"  listed in {exported.left_out_list}")
    if exported.both_splits:
        console.print("  train and test pairs in one file: --split train leaves the held-out pairs out")


def print_info(found: Mapping[str, Any], console: Console) -> None:
    """A dataset's or run's facts, one a line; nested ones indented."""
    for name, value in found.items():
        if name == "additions":
            console.print(f"additions: {len(value)}")
            for added in value:
                console.print(f"  {added['pairs']} pairs from {', '.join(added['sources'])}")
        elif name == "near_duplicates":
            console.print(
                f"near-duplicates: {value['num_near_duplicate_clusters']} clusters; prompts are in "
                f"{value['num_prompt_clusters']} clusters, the largest has {value['largest_prompt_cluster']} pairs"
            )
            for advice in value["advice"]:
                console.print(f"  advice: {advice}")
        elif name == "verified":
            console.print(
                f"verified: {sum(value['parts'].values())} files are as they were written; {MANIFEST} has sha256 "
                f"{value['manifest_sha256']}"
            )
            if not value["card"]:
                console.print(f"  {CARD} is not the one that prefkit writes")
        elif isinstance(value, Mapping):
            console.print(f"{name}:")
            for key, inner in value.items():
                console.print(f"  {key}: {inner}")
        elif isinstance(value, list):
            console.print(f"{name}: {len(value)}")
            for item in value:
                console.print(
                    "  " + ", ".join(f"{k} {v}" for k, v in item.items() if v is not None)
                    if isinstance(item, Mapping)
                    else f"  {item}"
                )
        else:
            console.print(f"{name}: {value}")


def print_formats(listed: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The formats as a table: what is read (R) and written (W), found by its rows (*), and which side is the better."""
    table = Table("format", "", "records", "fields", "")
    for name, told in listed.items():
        marks = "".join(
            mark if told[key] else " "
            for mark, key in (("R", "read"), ("W", "written"), ("L", "reference"), ("*", "detected"))
        )
        note = told["note"] + (f"; better: {told['direction']}" if told["direction"] else "")
        table.add_row(Text(name), Text(marks), Text(told["records"] or ""), Text(told["fields"]), Text(note))
    console.print(table, soft_wrap=False)
    console.print(
        "R: a source may have it; W: prefkit export writes it; L: with a reference's log-probs, where asked for; "
        "*: found by the rows where format: is left out"
    )


LINE_EVERY = 30.0  # seconds between lines of progress where stderr is no terminal: a log of a batch system


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty() or process_rank() > 0,
    )


class _Pace:
    """How fast work goes, counted from its first report, and when to say so in a log."""

    def __init__(self, what: str) -> None:
        self.what, self.started, self.said = what, time.monotonic(), time.monotonic()
        self.first: tuple[int, ...] | None = None

    def rates(self, *done: int) -> list[float] | None:
        """Units a second since the first report, None while that is too short to tell."""
        if self.first is None:
            self.first, self.started = done, time.monotonic()
        elapsed = time.monotonic() - self.started
        return [(now - first) / elapsed for now, first in zip(done, self.first, strict=True)] if elapsed > 0.5 else None

    def log(self, done: int, total: int, per_second: float, text: str) -> None:
        """A line on stderr now and then, if nobody watches a bar there."""
        now = time.monotonic()
        if now - self.said < LINE_EVERY or sys.stderr.isatty() or process_rank() > 0:
            return
        self.said = now
        left = f"{(total - done) / per_second / 60:.0f} min left" if per_second and total else ""
        share = f"{done / total:.0%}" if total else f"{done:,}"
        sys.stderr.write(f"{self.what} {share}  {left}  {text}\n")


@contextlib.contextmanager
def _rated(what: str, said: Callable[[int, int, list[float]], str]) -> Iterator[Callable[[int, int, int], None]]:
    """A progress line whose words are of what is done, of all, and of the rates of what is done and of what else is."""
    with _progress() as progress:
        task, pace = progress.add_task(what, total=None, rate=""), _Pace(what)

        def watch(done: int, total: int, beside: int) -> None:
            rates = pace.rates(done, beside)
            text = said(done, total, rates) if rates else ""
            progress.update(task, total=total, completed=done, rate=text)
            pace.log(done, total, rates[0] if rates else 0.0, text)

        yield watch


@contextlib.contextmanager
def token_progress() -> Iterator[Callable[[int, int, int], None]]:
    """A progress line for a reference pass: pairs and tokens a second, time left."""
    with _rated("scoring", lambda _d, _t, rates: f"{rates[1]:,.1f} pairs/s  {rates[0]:,.0f} tokens/s") as watch:
        yield watch


@contextlib.contextmanager
def sample_progress() -> Iterator[Callable[[int, int, int], None]]:
    """A progress line for sampling: prompts done, tokens a second, time left."""
    with _rated("sampling", lambda done, total, r: f"{done:,} of {total:,} prompts  {r[1]:,.0f} tokens/s") as watch:
        yield watch


@contextlib.contextmanager
def pass_progress(unit: str = "pairs") -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """A progress line for work of several passes: the first function names one, the second tells how far it is.

    A total of 0: nobody knows yet.
    """
    with _progress() as progress:
        task, pace = progress.add_task("", total=None, rate=""), _Pace("")

        def tell(what: str) -> None:
            nonlocal pace
            said, pace = pace.said, _Pace(what)
            pace.said = said  # a log has a line now and then, however many passes there are
            progress.update(task, description=what, total=None, completed=0, rate="")

        def watch(done: int, total: int) -> None:
            rates = pace.rates(done)
            text = f"{rates[0]:,.0f} {unit}/s" if rates else ""
            progress.update(task, total=total or None, completed=done, rate=text)
            pace.log(done, total, rates[0] if rates else 0.0, text)

        yield tell, watch


@contextlib.contextmanager
def build_progress() -> Iterator["Watch"]:
    """A progress line for a build: the stage, rows a second, and the time left where that can be foreseen."""
    from prefkit.build import Watch

    with pass_progress("rows") as (tell, watch):

        class Line(Watch):
            def stage(self, name: str) -> None:
                tell(name)

            def look(self, done: int, total: float | None) -> None:
                watch(done, int(total) if total else 0)

        yield Line()


@contextlib.contextmanager
def step_progress(what: str = "training") -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """A progress line for training: loss, accuracy and margin of the last step, updates a second, time left."""
    with _progress() as progress:
        task, pace = progress.add_task(what, total=None, rate=""), _Pace(what)

        def watch(done: int, total: int, row: Mapping[str, Any]) -> None:
            rates = pace.rates(done)
            names = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
            shown = [f"{name} {row[key]:.4f}" for name, key in names.items() if key in row]
            text = "  ".join([*shown, f"{rates[0]:.2f} steps/s" if rates else ""])
            progress.update(task, total=total, completed=done, rate=text)
            pace.log(done, total, rates[0] if rates else 0.0, text)

        yield watch


QUICK = 1.0  # seconds that a query may take before anybody wonders


class QueryLine:
    """A progress line of a query that takes longer than a second: what is done, and how far DuckDB says it is."""

    def __init__(self) -> None:
        self.what, self.ended = "", threading.Event()
        self.connection: duckdb.DuckDBPyConnection | None = None
        self.thread = threading.Thread(target=self._show, daemon=True)

    def tell(self, what: str) -> None:
        """Name what is done."""
        self.what = what

    def watch(self, connection: "duckdb.DuckDBPyConnection") -> None:
        """Ask this connection how far it is."""
        self.connection = connection

    def interrupt(self) -> None:
        """Stop what that connection does."""
        if self.connection is not None:
            self.connection.interrupt()

    def end(self) -> None:
        """Take the line away."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self.connection = None

    def _show(self) -> None:
        if self.ended.wait(QUICK):
            return
        with _progress() as progress:
            task = progress.add_task(self.what, total=None, rate="")
            while not self.ended.wait(0.2):
                share = self.connection.query_progress() if self.connection is not None else -1
                known = share >= 0
                progress.update(task, description=self.what, total=100 if known else None, completed=max(share, 0))


@contextlib.contextmanager
def query_progress() -> Iterator[QueryLine]:
    """A progress line for a query, on a terminal only; `end` takes it away before something is printed."""
    line = QueryLine()
    if sys.stderr.isatty() and process_rank() == 0:
        line.thread.start()
    try:
        yield line
    finally:
        line.end()
