"""How the road and a sweep look on a terminal: a line a stage, what its command prints, progress; a sweep's table."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prefkit.errors import Interrupted
from prefkit.evaluation_view import print_evaluated
from prefkit.grid import cell_text
from prefkit.report import print_audit
from prefkit.stages import Following, Outcome, Spectator, StageName, Stop
from prefkit.stopping import stop_on_signals
from prefkit.terminal import (
    build_progress,
    pass_progress,
    print_build,
    print_precomputed,
    print_sampled,
    print_scored,
    print_trained,
    sample_progress,
    step_progress,
    token_progress,
)

if TYPE_CHECKING:
    from prefkit.sweep import Swept

# what a stage finishes when it is asked to stop; the others stop at once
FINISHING: dict[StageName, str] = {
    "sample": "this part",
    "score": "this part",
    "precompute": "this part",
    "train": "this step and a checkpoint",
    "evaluate": "this part",
}
PRINTERS: Mapping[StageName, Callable[[Any, Console], None]] = {
    "sample": print_sampled,
    "score": print_scored,
    "build": print_build,
    "audit": print_audit,
    "precompute": print_precomputed,
    "train": print_trained,
    "evaluate": print_evaluated,
}
# of a sweep's table, what is shown where there is any of it, and by what name
SHOWN = {
    "steps": "steps",
    "loss": "loss",
    "eval_loss": "eval loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/margins": "margin",
    "reward_gain": "reward gain",
    "kl": "KL",
    "win_rate": "win rate",
    "run": "run",
    "state": "",
}

# what gives way on a narrow terminal, first to last; the view sweeps has all of it
SPARED = ("steps", "loss", "eval_loss", "eval_rewards/margins", "win_rate")


class RoadScreen(Spectator):
    """Draws a progress line a stage on stderr, and prints what its command prints."""

    def __init__(self, console: Console, *, results: bool = True) -> None:
        super().__init__(console.print)
        self.console, self.results = console, results

    @contextlib.contextmanager
    def follow(self, stage: StageName) -> Iterator[Following]:
        """The stage's progress line; the first Ctrl-C asks for an end, where the stage can be asked."""
        with contextlib.ExitStack() as held:
            stop: Stop = lambda: False  # noqa: E731 - what the others have is a function too
            if stage in FINISHING:
                stop = held.enter_context(stop_on_signals(FINISHING[stage]))
            if stage == "build":
                yield Following(self.tell, held.enter_context(build_progress()), stop)
            elif stage == "precompute":
                yield Following(self.tell, held.enter_context(token_progress()), stop)
            elif stage == "sample":
                yield Following(self.tell, held.enter_context(sample_progress()), stop)
            elif stage == "train":
                yield Following(self.tell, held.enter_context(step_progress()), stop)
            elif stage == "score":
                name, watch = held.enter_context(pass_progress("responses"))
                name("scoring")
                yield Following(self.tell, watch, stop)
            else:
                yield Following(*held.enter_context(pass_progress("" if stage == "evaluate" else "pairs")), stop)
            asked = stop()
        if asked:  # a stage that was at its end anyway must not let the next one begin
            raise Interrupted("stopped at its end", where=stage)

    def show(self, outcome: Outcome) -> None:
        """A line: done already, or why it was done; then what the command prints of it."""
        if not self.results:
            self.console.print(f"  {outcome.said}" + (", done already" if outcome.done else ""))
            return
        self.console.print(f"{outcome.stage}: {'done already' if outcome.done else outcome.why}; {outcome.said}")
        printer = PRINTERS.get(outcome.stage)
        if outcome.result is not None and not outcome.done and printer is not None:
            printer(outcome.result, self.console)


def print_sweep(swept: "Swept", console: Console) -> None:
    """One table: what varies, and what it came to; of what failed, why."""
    rows = swept.table.to_dicts()
    shown = [name for name in SHOWN if any(row[name] not in (None, "done") for row in rows)]
    table = _table(swept, rows, shown)
    for name in SPARED:  # a cut figure is worth less than none
        if Measurement.get(console, console.options, table).minimum <= console.width:
            break
        shown = [one for one in shown if one != name]
        table = _table(swept, rows, shown)
    console.print(table, soft_wrap=False)
    for row in rows:
        if row["reason"] is not None:
            console.print(f"  {row['settings']} failed: {row['reason']}")
    if swept.reference is not None:
        console.print(f"{len(rows)} combinations, {swept.trained} trained now; all on reference {swept.reference}")
        console.print(f'prefkit query {swept.dataset} "from sweeps" has them again; {swept.sweep}')


def _table(swept: "Swept", rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in [*(key.removeprefix("train.") for key in swept.settings), *(SHOWN[name] for name in shown)]:
        table.add_column(Text(name), overflow="fold")
    for row, settings in zip(rows, settings_of(swept), strict=True):
        table.add_row(*(Text(text) for text in settings), *(Text(_short(row[name])) for name in shown))
    return table


def settings_of(swept: "Swept") -> list[list[str]]:
    """What varies, a list of texts a combination."""
    return [[_short(value) for value in json.loads(text).values()] for text in swept.table["settings"]]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell_text(value)
