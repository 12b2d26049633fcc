"""Who else is told every logged step: tensorboard, wandb or trackio, through accelerate's trackers, without a network.

What they write lies in the run's trackers/. A tracker that fails loses no update: it is told once, and left out.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.errors import InputError, first_line
from prefkit.format import TRACKERS
from prefkit.work import Tell


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before anything is loaded.

    Raises:
        InputError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed", where="train.trackers", hint=f"pip install {name}")


class Trackers:
    """The trackers of a run, in the process that writes its log."""

    def __init__(
        self, names: Sequence[str], run: Path, start: int, settings: Mapping[str, Any], tell: Tell = lambda _text: None
    ) -> None:
        """Begin, or go on from the update `start`, which tensorboard then forgets what came after."""
        self.tell = tell
        self.open: dict[str, Any] = {}
        folder = run / TRACKERS
        for name in names:
            with self._survived(name):
                folder.mkdir(exist_ok=True)
                self.open[name] = _started(name, folder, run.name, start)
                if not start:
                    self.open[name].store_init_configuration(_flat(settings))

    def log(self, row: Mapping[str, Any], perf: Mapping[str, Any] | None = None) -> None:
        """Tell a logged row; speed under perf/."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name in ("tokens_per_second", "mfu", "peak_memory"):
            if perf is not None and perf[name] is not None:
                values[f"perf/{name}"] = perf[name]
        for name, tracker in list(self.open.items()):
            with self._survived(name):
                tracker.log(values, step=row["step"])

    def close(self) -> None:
        """No more rows come."""
        for name, tracker in list(self.open.items()):
            with self._survived(name):
                tracker.finish()
        self.open = {}

    @contextlib.contextmanager
    def _survived(self, name: str) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is ours
                yield
        except Exception as error:  # whatever it raises is no reason to lose a run
            self.open.pop(name, None)
            self.tell(f"{name} is told no more: {first_line(error)}")


def _started(name: str, folder: Path, run: str, start: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its methods ask for it
    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = make(name, str(folder), purge_step=start)
    elif name == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        tracker = make("prefkit", dir=str(folder), name=run)
    else:
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / name))
        tracker = make("prefkit", name=run)
    tracker.start()
    return tracker


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings as trackers take them: one level, numbers, texts and truth values."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        elif value is not None:
            flat[above + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
