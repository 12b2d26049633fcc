"""Make the next items in a thread while the caller works on those before: reading beside deciding, on two cores."""

import contextlib
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
SWITCH = (
    5e-4  # seconds for which a thread may keep Python to itself; at its usual 5 ms the others stand still too often
)
PATIENCE = 0.05  # seconds until a thread that waits for room looks whether anybody still wants its items


class _End(NamedTuple):
    """After the last item; `error`: what ended them early."""

    error: BaseException | None


def ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items in the same order, at most `depth` of them made before they are asked for.

    An error of theirs is raised where its item would have been. When the caller stops, so does the thread, and items
    that can be closed are.
    """
    box: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH))
    thread = threading.Thread(target=_fill, args=(items, box, stop), daemon=True)
    thread.start()
    try:
        while not isinstance(item := box.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(usual)


def _fill(items: Iterable[Any], box: "queue.Queue[Any]", stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(box, item, stop):
                break
    except BaseException as raised:  # it is the caller's, in the caller's thread
        error = raised
    finally:
        with contextlib.suppress(AttributeError):
            items.close()  # type: ignore[attr-defined]
    _put(box, _End(error), stop)


def _put(box: "queue.Queue[Any]", item: Any, stop: threading.Event) -> bool:
    """Whether it could be handed over."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            box.put(item, timeout=PATIENCE)
            return True
    return False
