"""How an evaluation looks on a terminal: the headline, a table a temperature, and what to be wary of."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.intervals import Measured
from prefkit.measures import DIFFERENCE, INCONSISTENT, OTHER, POLICY, RATIO, REFERENCE, REWARD, WIN_RATE, Summary
from prefkit.text import printable

if TYPE_CHECKING:
    from prefkit.evaluate import Evaluated

Show = Callable[[float], str]
NAMES: dict[str, str] = {
    "tokens": "tokens",
    "cut_off": "cut off",
    "distinct_2": "distinct-2",
    "distinct_responses": "distinct texts",
    "self_similarity": "self-similarity",
}
SHARES = {"cut_off", WIN_RATE, INCONSISTENT}


def number(value: float) -> str:
    """Three significant digits, as a person reads them."""
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}"


def with_interval(measured: Measured | None, show: Show = number) -> str:
    """A figure and its interval, nothing where it was not measured: `1.25 [-1.17, 3.67]`."""
    if measured is None or measured.value is None:
        return ""
    ends = "" if measured.low is None or measured.high is None else f" [{show(measured.low)}, {show(measured.high)}]"
    return show(measured.value) + ends


def print_evaluated(done: "Evaluated", console: Console) -> None:
    """The headline first, then a table a temperature, then what is measured without sampling, and warnings."""
    state = "; nothing to do" if done.unchanged else ""
    console.print(f"{done.folder}: {done.document['model']}{state}")
    if (told := done.document["headline"]) is not None:
        gain = Measured(told["value"], told["low"], told["high"], told["num_prompts"], 0)
        sense = "rose" if told["value"] >= 0 else "fell"
        size = with_interval(gain if told["value"] >= 0 else mirrored(gain))
        console.print(
            f"  mean reward by {told['scorer']} {sense} by {size} at temperature {told['temperature']:g}, over "
            f"{told['num_prompts']} prompts"
        )
    summary = Summary(done.summary)
    for temperature in summary.temperatures:
        console.print(temperature_table(summary, temperature), soft_wrap=False)
    for line in other_lines(summary):
        console.print(f"  {line}")
    for name, why in done.document["left_out"].items():
        console.print(f"  left out: {name}: {why}")
    for warning in done.document["warnings"]:
        console.print(f"  warning: {warning['text']}")


def mirrored(measured: Measured) -> Measured:
    """The same with the sign changed, ends exchanged."""
    value, low, high = (None if some is None else -some for some in measured[:3])
    return measured._replace(value=value, low=high, high=low)


def temperature_table(summary: Summary, temperature: float) -> Table:
    """A row a metric: both models, and the policy minus the reference."""
    counts = summary.get(POLICY, "tokens", temperature)
    asked = None if counts is None else counts.num_prompts
    told = "" if counts is None else f"{counts.num_responses} responses to {counts.num_prompts} prompts"
    table = Table(title=Text(f"temperature {temperature:g}: {told}"), title_justify="left")
    for name in ("", POLICY, REFERENCE, DIFFERENCE):
        table.add_column(Text(name), no_wrap=True)

    def add(label: str, metric: str, scorer: str | None = None) -> None:
        show = percent if metric in SHARES else number
        roles = (summary.get(role, metric, temperature, scorer) for role in (POLICY, REFERENCE, DIFFERENCE))
        mine, other, apart = roles
        beside = other is not None or apart is not None  # then the interval that counts is that of the difference
        mine, other = (one._replace(low=None) if one is not None and beside else one for one in (mine, other))
        cells = [with_interval(one, show) + _of_fewer(one, asked) for one in (mine, other, apart)]
        if any(cells):
            table.add_row(*(Text(printable(cell)) for cell in (label, *cells)))

    for scorer in summary.scorers(REWARD):
        add(f"reward, {scorer}", REWARD, scorer)
        if (other := summary.get(OTHER, REWARD, temperature, scorer)) is not None:
            table.add_row(
                Text(printable(f"  of the other, {scorer}")),
                Text(""),
                Text(with_interval(other) + _of_fewer(other, asked)),
                Text(""),
            )
    for scorer in summary.scorers(WIN_RATE):
        add(f"win rate, {scorer}", WIN_RATE, scorer)
    for scorer in summary.scorers(INCONSISTENT):
        add(f"inconsistent, {scorer}", INCONSISTENT, scorer)
    add("KL, nats", "kl_exact")
    add("KL a token", "kl_exact_token")
    for metric, label in NAMES.items():
        add(label, metric)
    return table


def _of_fewer(measured: Measured | None, asked: int | None) -> str:
    """Of how many prompts a figure is, where these are not all that were asked."""
    if measured is None or measured.value is None or measured.num_prompts in (0, asked):
        return ""
    return f" ({measured.num_prompts} prompts)"


def other_lines(summary: Summary) -> list[str]:
    """What needs no sampling: held-out pairs and texts."""
    lines = []
    accuracy, margin = (summary.get(POLICY, name) for name in ("rewards/accuracies", "rewards/margins"))
    if accuracy is not None:
        pairs = f"{accuracy.num_responses} held-out pairs"
        lines.append(f"{pairs}: accuracy {with_interval(accuracy)}, margin {with_interval(margin)}")
    mine, ratio = summary.get(POLICY, "perplexity"), summary.get(RATIO, "perplexity")
    if mine is not None:
        beside = "" if ratio is None else f", {with_interval(ratio)} times the reference's"
        lines.append(f"{mine.num_responses} texts: perplexity {with_interval(mine)}{beside}")
    return lines
