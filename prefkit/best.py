"""The best evaluation so far, and when there has been no better one for too long."""

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

LOWER_IS_BETTER = ("eval_loss",)


class Best(NamedTuple):
    """The best evaluation of a run by one metric.

    `step`: None before the first; `evaluated`: its eval_ metrics; `since`: evaluations after it.
    """

    metric: str
    step: int | None = None
    evaluated: Mapping[str, Any] = {}
    since: int = 0

    def after(self, step: int, evaluated: Mapping[str, Any]) -> "Best":
        """The best one when another evaluation is known; of equal ones the first."""
        if self.step is None or self._value(evaluated) > self._value(self.evaluated):
            return Best(self.metric, step, {k: v for k, v in evaluated.items() if k.startswith("eval_")})
        return self._replace(since=self.since + 1)

    def _value(self, evaluated: Mapping[str, Any]) -> float:
        value = float(evaluated[self.metric])
        return -value if self.metric in LOWER_IS_BETTER else value

    def told(self) -> dict[str, Any]:
        """As run.json has it."""
        return {"metric": self.metric, "value": self.evaluated[self.metric], "step": self.step}


def best_of(metric: str, rows: Iterable[Mapping[str, Any]], kept: Container[int]) -> Best:
    """The best of the logged rows whose weights are there; rows without an evaluation are passed over.

    An evaluation that was better has no weights where train.best_metric was set, or changed, after it.

    Args:
        metric: as logged.
        rows: of steps, in order.
        kept: the steps whose weights there are.
    """
    best = Best(metric)
    for row in rows:
        if row.get(metric) is not None:
            found = best.after(int(row["step"]), row)
            best = found if found.step == best.step or found.step in kept else best._replace(since=best.since + 1)
    return best
