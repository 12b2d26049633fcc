"""What a run writes while it goes on: a row an update, each pair's margin, speed; cut back where it goes on.

Process 0 has one. Rows are on disk as JSON lines when `add` returns; the tables come with every checkpoint and at the
end.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.checkpoint import (
    DYNAMICS_ROWS,
    append_row,
    cut_dynamics,
    cut_rows,
    num_seen,
    write_dynamics,
    write_rows,
)
from prefkit.documents import Run
from prefkit.format import PERF_LIVE, RUN_JSON, STEPS_LIVE
from prefkit.metrics import Metrics
from prefkit.run import HISTORY
from prefkit.signs import Sign, Signs
from prefkit.store import read_document, write_json
from prefkit.trackers import Trackers
from prefkit.work import Tell


class RunLog:
    """The rows of a run so far."""

    def __init__(
        self,
        run: Path,
        start: int,
        signs: Signs,
        trackers: Trackers,
        tell: Tell = lambda _text: None,
        *,
        closed: bool,
        history: Mapping[str, int] | None = None,
    ) -> None:
        """Cut what is there back to the updates before `start`.

        Args:
            run: its directory.
            start: updates made.
            signs: what reads warnings off the rows.
            trackers: who else is told.
            tell: called with lines for a person.
            closed: see cut_dynamics.
            history: of the checkpoint that is gone on from: what there must be.
        """
        self.run, self.signs, self.trackers, self.tell = run, signs, trackers, tell
        self.num_seen = num_seen(run, start)
        self.rows = cut_rows(run / STEPS_LIVE, start)
        self.perf = cut_rows(run / PERF_LIVE, start)
        self._seen = cut_dynamics(run, start, closed=closed)
        self.warnings = [Sign(**told) for told in read_document(run / RUN_JSON, Run).get("warnings", [])]
        if lost := self._lost(history or {}):
            text = f"of what was logged before step {start} {lost} are gone: figures and views of this run lack them"
            for sign in self._warn([Sign(start, HISTORY, text)]):
                tell(f"warning: {sign.text}")
        self._warn([sign for row in self.rows for sign in signs.look(row)])  # told before, and kept as they were

    def add(self, row: Mapping[str, Any], perf: Mapping[str, Any] | None = None) -> None:
        """Log an update, or the last evaluation."""
        self.rows.append(dict(row))
        append_row(self.run / STEPS_LIVE, row)
        if perf is not None:
            self.perf.append(dict(perf))
            append_row(self.run / PERF_LIVE, perf)
        for sign in self._warn(self.signs.look(row)):
            self.tell(f"warning: {sign.text}")
        self.trackers.log(row, perf)

    @property
    def history(self) -> dict[str, int]:
        """How much is logged so far, as a checkpoint keeps it."""
        return {"rows of steps": len(self.rows), "rows of pair_dynamics": self.num_seen}

    def _lost(self, known: Mapping[str, int]) -> str:
        counts = {name: known.get(name, 0) - there for name, there in self.history.items()}
        return " and ".join(f"{lost} {name}" for name, lost in counts.items() if lost > 0)

    def _warn(self, signs: list[Sign]) -> list[Sign]:
        """Keep warnings where whoever looks at a run that goes on finds them."""
        if signs:
            self.warnings += signs
            told = [sign._asdict() for sign in self.warnings]
            write_json(self.run / RUN_JSON, read_document(self.run / RUN_JSON, Run) | {"warnings": told})
        return signs

    def saw(self, step: int, pair_ids: Sequence[str], metrics: Metrics, beta: float) -> None:
        """Keep the margins of an update's pairs, in the order of `metrics`."""
        rewards = (beta * metrics.chosen_logratios).tolist(), (beta * metrics.rejected_logratios).tolist()
        self.num_seen += len(pair_ids)
        self._seen += [
            {"step": step, "pair_id": pair, "rewards_chosen": c, "rewards_rejected": r, "margin": c - r}
            for pair, c, r in zip(pair_ids, *rewards, strict=True)
        ]
        if len(self._seen) >= DYNAMICS_ROWS:
            self._write_seen()

    def _write_seen(self) -> None:
        write_dynamics(self.run, self._seen)
        self._seen = []

    def write(self, *, close: bool) -> None:
        """Write the tables; `close`: a part of pair_dynamics ends here, as at every checkpoint that is due."""
        write_dynamics(self.run, self._seen)
        if close:
            self._seen = []
        write_rows(self.run, self.rows, self.perf)
