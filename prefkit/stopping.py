"""Ctrl-C and SIGTERM as a request: long work stops where it loses nothing; asked again, it stops at once."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from prefkit.processes import process_rank

# a terminal, and accelerate's launcher after it, may both pass on one Ctrl-C: that is one request
SAME_REQUEST = 1.0  # seconds


@contextlib.contextmanager
def stop_on_signals(until: str) -> Iterator[Callable[[], bool]]:
    """While the block runs, the first signal only makes the given function return True.

    Args:
        until: what will be finished first, for the line on stderr: `this part`.

    Raises:
        KeyboardInterrupt: a second signal, more than a second after the first.
    """
    asked: list[float] = []

    def ask(_number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not asked:
            asked.append(now)
            if process_rank() == 0:
                sys.stderr.write(f"\nfinishing {until}, then stopping; press Ctrl-C again to stop at once\n")
        elif now - asked[0] > SAME_REQUEST:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
