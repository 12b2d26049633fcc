"""Processes that take calls off this one: they start clean, run no script again, and end when this one does.

Comes in: functions of this package and their values. Goes out: the results in the order of the calls.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any

from prefkit.errors import MachineError


@contextlib.contextmanager
def processes_of(number: int) -> Iterator[ProcessPoolExecutor | None]:
    """Some processes that end with the block; None where one is enough. They start when there is work for them."""
    if number < 2:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def done_by(pool: ProcessPoolExecutor | None, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of calls (a function and its values) in their order; without a pool they are done here.

    Raises:
        MachineError: a process was ended from outside.
    """
    if pool is None:
        yield from (function(*values) for function, *values in calls)
        return
    with _nothing_to_import():
        waiting = [pool.submit(function, *values) for function, *values in calls]
    try:
        yield from (future.result() for future in waiting)
    except BrokenProcessPool:
        raise MachineError(
            "a process that compares texts was ended from outside, most likely as memory ran out",
            where="build.processes",
            hint="--set build.processes=1, or make room and type the same command",
        ) from None


@contextlib.contextmanager
def _nothing_to_import() -> Iterator[None]:
    """Processes that start in the block do not run the script again that started them, guarded by __main__ or not."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def end_with_parent() -> None:
    """Whoever waits for work in vain, as the process that gave it was killed, ends too."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
