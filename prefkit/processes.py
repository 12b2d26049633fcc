"""Several processes that do one job: who does what, and one outcome for all of them.

`accelerate launch` and torchrun start the same command N times. Process 0 reads and writes files and speaks; what
happens to one happens to all: a failure anywhere is raised everywhere, so that nobody waits for a process that is gone.
Alone (the usual case) all of this is a plain function call, and torch.distributed is never touched.
"""

import contextlib
import datetime as dt
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from prefkit.errors import MachineError, PrefkitError, is_out_of_memory, no_room

T = TypeVar("T")
PATIENCE = dt.timedelta(days=7)


def process_rank() -> int:
    """The number of this process among those that were started together; 0 alone."""
    return int(os.environ.get("RANK") or 0) if num_processes() > 1 else 0


def num_processes() -> int:
    """How many processes were started together; 1 alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


class Team(NamedTuple):
    """The processes of one command: this one's number, and how many there are."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in process 0 only; every process gets its result, or its failure."""
        if self.size == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [_outcome(work) if self.is_main else None]
        broadcast_object_list(outcome)
        return _unpacked(outcome)[0]  # type: ignore[no-any-return]

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process; every process gets all results by rank, or the first failure."""
        if self.size == 1:
            return [work()]
        from accelerate.utils import gather_object

        return _unpacked(gather_object([_outcome(work)]))


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except PrefkitError as error:
        return None, error
    except Exception as error:  # it must reach the others, and not every exception can be pickled
        if is_out_of_memory(error):
            return None, MachineError(
                "out of memory", hint="a smaller batch_size or max_length, or another dtype, needs less"
            )
        if (full := no_room(error)) is not None:
            return None, full
        return None, RuntimeError("".join(traceback.format_exception(error)))


def _unpacked(outcomes: list[tuple[Any, Exception | None]]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


@contextlib.contextmanager
def join_team() -> Iterator[Team]:
    """The team of this process, for as long as the block runs."""
    if num_processes() == 1:
        yield Team(0, 1)
        return
    import torch
    from accelerate import PartialState

    ours = not torch.distributed.is_initialized()
    # the others wait while process 0 hashes and encodes, which may take hours: the default gives up after minutes
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    try:
        yield Team(state.process_index, state.num_processes)
    finally:
        if ours:
            state.destroy_process_group()  # left to the end of the process, gloo's threads abort it now and then
            PartialState._reset_state()  # so that the next team can be joined
