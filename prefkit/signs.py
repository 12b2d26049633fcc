"""What training tells about the data: plain warnings, read off the logged rows of a run. No input or output.

Comes in: the rows of steps, one by one in their order, and the audit's findings. Goes out: a `Sign` where a rule holds,
each told once a run. All that is remembered is a function of the rows, so a resumed run that is shown its rows again
has told what an unbroken one has. The rules and how often they are wrong: docs/training.md.
"""

import math
import shlex
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prefkit.text import printable

WINDOW_PAIRS = 64  # pairs that a share or a mean is taken over at least: 64 right of 64 are 95% sure of 95% of all
UNAUDITED_PAIRS = 200  # right without a miss, where no finding says what they share: 95% sure of 98.5% of all
SOON = 100  # updates within which a shortcut is learned: later, accuracy may have been earned
GIVEN_AWAY = 0.8  # accuracy that a finding alone must give before it may be all that was learned
DISPLACED_NATS = 1.0  # chosen, as a whole, is less likely than under the reference by a factor of e
DISPLACED_SHARE = 0.5  # of the pairs: most of them, not a few that fell far
NAMED = 3  # findings that a warning names at most
WARNED = ("fail", "warn")
MOST_ALIKE = "select pair_id, ln_ches from reference order by ln_ches desc limit 20"
MEASURED = ("drift/chosen", "drift/rejected", "drift/displaced")


class Sign(NamedTuple):
    """A warning. `step`: of the row it was read off; `name`: displacement | shortcut."""

    step: int
    name: str
    text: str


class Rows(NamedTuple):
    """One row or several: their pairs, and means over these of what was measured."""

    num_pairs: int
    means: tuple[float, ...]


class Signs:
    """The rules, and what they remember of the rows they have been shown.

    Example: `for row in logged: warnings += signs.look(row)`. On resume, show the rows that stayed to a new one.

    Args:
        dataset: as the user names it, for the commands in the texts.
        findings: of audit.json (documents.FindingEntry), worst first; None where the dataset has not been audited.
    """

    def __init__(self, dataset: str, findings: Sequence[Mapping[str, Any]] | None) -> None:
        self.dataset = printable(dataset)
        self.findings = findings
        best = max(map(gives_away, findings or ()), default=0.0)
        self.enough = 1.0 if findings is None else best if best >= GIVEN_AWAY else math.inf  # accuracy that is told
        self.told: set[str] = set()
        self.unseen: deque[Rows] = deque()  # accuracy, newest last
        self.drifts: deque[Rows] = deque()  # MEASURED, newest last

    def look(self, row: Mapping[str, Any]) -> list[Sign]:
        """The warnings that this row is the first to give; every logged row once, in order.

        Args:
            row: keys of format.STEPS_COLUMNS. One without pairs (the last) and that of step 0, where policy and
                reference are one model, tell nothing.
        """
        if not row.get("num_pairs") or row["step"] < 1:
            return []
        rules = {"shortcut": self._shortcut, "displacement": self._displacement}
        found = [(name, rule(row)) for name, rule in rules.items() if name not in self.told]
        new = [Sign(row["step"], name, text) for name, text in found if text is not None]
        self.told |= {sign.name for sign in new}
        return new

    def _shortcut(self, row: Mapping[str, Any]) -> str | None:
        """Nearly all pairs right that were never trained on, at once, and no more than what a finding gives away."""
        if row["epoch"] >= 1 or row["step"] > SOON:
            return None
        self.unseen.append(Rows(row["num_pairs"], (row["rewards/accuracies"],)))
        newest, older = split_newest(self.unseen, UNAUDITED_PAIRS if self.findings is None else WINDOW_PAIRS)
        if newest is None:
            return None
        drop_oldest(self.unseen, len(older))
        right = round(newest.num_pairs * newest.means[0])
        if right < self.enough * newest.num_pairs:
            return None
        seen = f"after {row['step']} updates {right} of {newest.num_pairs} pairs that it had not seen are right"
        return seen + (self._unaudited() if self.findings is None else self._named(self.findings))

    def _unaudited(self) -> str:
        command = shlex.join(["prefkit", "audit", self.dataset])
        return f": data this easy often has a shortcut in it, and this dataset has not been audited. Next: {command}"

    def _named(self, findings: Sequence[Mapping[str, Any]]) -> str:
        named = named_findings(findings)
        names = ", ".join(f"{name_of(finding)} (alone {gives_away(finding):.0%})" for finding in named)
        return (
            f", as many as a shortcut that the audit names would give: {names}. Training may collapse to it. "
            f"Next: {printable(named[0]['advice'])}"
        )

    def _displacement(self, row: Mapping[str, Any]) -> str | None:
        """Both log-probs below the reference's and falling while the margin grows: arXiv 2410.08847, section 3."""
        if any(row.get(name) is None for name in MEASURED):
            return None
        self.drifts.append(Rows(row["num_pairs"], tuple(row[name] for name in MEASURED)))
        newest, older = split_newest(self.drifts, WINDOW_PAIRS)
        before, oldest = split_newest(older, WINDOW_PAIRS)
        if newest is None or before is None:
            return None
        drop_oldest(self.drifts, len(oldest))
        (chosen, rejected, displaced), (chosen_before, rejected_before, _) = newest.means, before.means
        falls = chosen < chosen_before and rejected < min(rejected_before, 0.0)
        grows = chosen - rejected > chosen_before - rejected_before
        if not (falls and grows and chosen <= -DISPLACED_NATS and displaced >= DISPLACED_SHARE):
            return None
        return (
            f"likelihood displacement: after {row['step']} updates chosen is {-chosen:.1f} nats less likely than under "
            f"the reference and rejected {-rejected:.1f}, and both still fall while the margin grows; so it is in "
            f"{displaced:.0%} of the pairs. What may hold chosen up: a larger train.beta, train.sft_weight, "
            "train.loss=dpop, a smaller train.learning_rate, or leaving out the pairs whose sides are most alike to "
            f"the model. Next: {shlex.join(['prefkit', 'query', self.dataset, MOST_ALIKE])}"
        )


def signs_of(
    rows: Iterable[Mapping[str, Any]], dataset: str, findings: Sequence[Mapping[str, Any]] | None
) -> list[Sign]:
    """All warnings of the logged rows of a run, in order."""
    signs = Signs(dataset, findings)
    return [sign for row in rows for sign in signs.look(row)]


def gives_away(finding: Mapping[str, Any]) -> float:
    """Accuracy of whoever knows this finding alone and guesses where it says nothing: .5 + coverage |win_rate - .5|.

    Of findings that are no warning, of what the texts do not show (who wrote them) and of what is no share: 0.

    Example: a token in chosen only of 60% of the pairs gives .5 + .6 * .5 = .8.
    """
    who = finding["family"] != "tokens" and finding["name"].startswith("generator")
    if who or finding["level"] not in WARNED or finding["coverage"] is None or finding["win_rate"] is None:
        return 0.0
    return 0.5 + float(finding["coverage"]) * abs(float(finding["win_rate"]) - 0.5)


def named_findings(findings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that a warning names: what gives most away first, of these tokens and features before probes.

    A probe has no word for what it has found, so it is named only where no token or feature gives as much away.
    """
    far = [finding for finding in findings if gives_away(finding) >= GIVEN_AWAY]
    worded = [finding for finding in far if finding["family"] != "probe"]
    if not worded:  # several that are each too small: the largest of them, and what they give together
        small = (finding for finding in findings if finding["family"] != "probe" and gives_away(finding) > 0)
        worded = [*far[:1], *sorted(small, key=gives_away, reverse=True)]
        return worded[:NAMED]
    return sorted(worded, key=gives_away, reverse=True)[:NAMED]


def name_of(finding: Mapping[str, Any]) -> str:
    """A token in quotes, a feature or a probe by its name, in one line."""
    name = printable(finding["name"]).replace("\n", "\\n").replace("\t", "\\t")
    return {"tokens": f"'{name}'", "probe": f"the probe of {name}"}.get(finding["family"], name)


def split_newest(rows: Sequence[Rows], num_pairs: int) -> tuple[Rows | None, list[Rows]]:
    """The newest rows that hold so many pairs, taken together, and those before them; None for too few.

    Example: `split_newest([Rows(2, (0.0,)), Rows(1, (1.0,)), Rows(3, (0.0,))], 4)` is `(Rows(4, (0.25,)), [first])`.
    """
    taken: list[Rows] = []
    older, total = list(rows), 0
    while older and total < num_pairs:
        taken.append(older.pop())
        total += taken[-1].num_pairs
    if total < num_pairs:
        return None, older
    columns = zip(*(row.means for row in taken), strict=True)
    means = (sum(row.num_pairs * value for row, value in zip(taken, column, strict=True)) / total for column in columns)
    return Rows(total, tuple(means)), older


def drop_oldest(rows: deque[Rows], number: int) -> None:
    """Forget so many rows. What no window needs now, none needs later: as rows come, windows only move on."""
    for _ in range(number):
        rows.popleft()
