"""Items made ahead are the same items, errors come where they would have, and nobody goes on in secret."""

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from prefkit.ahead import ahead


def test_the_items_are_the_same_in_the_same_order() -> None:
    assert [*ahead(range(1000), depth=3)] == [*range(1000)]
    assert [*ahead([])] == []
    assert [*ahead([None, None])] == [None, None]


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        list(ahead(items()))
    taken = ahead(items())
    assert (next(taken), next(taken)) == (1, 2)
    with pytest.raises(KeyError, match="here"):
        next(taken)


def test_no_more_than_depth_items_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    taken = ahead(items(), depth=2)
    assert next(taken) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 2 + 1  # handed over, waiting in the box, and the one that waits for room
    taken.close()  # type: ignore[attr-defined]


def test_who_stops_early_stops_the_thread_and_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    before, interval = threading.active_count(), sys.getswitchinterval()
    for number in ahead(items()):
        if number == 5:
            break
    del number
    assert closed.wait(5)
    assert threading.active_count() == before
    assert sys.getswitchinterval() == interval
