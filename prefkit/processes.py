"""Several processes that do one job: who does what, and one outcome for all of them.

`accelerate launch` and torchrun start the same command N times. Process 0 reads and writes files and speaks; what
happens to one happens to all: a failure anywhere is raised everywhere, so that nobody waits for a process that is gone.
One that dies without a word is found out by the others, who say which it was. Alone (the usual case) all of this is a
plain function call, and torch.distributed is never touched.
"""

import contextlib
import datetime as dt
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prefkit.errors import MachineError, PrefkitError, is_out_of_memory, no_room

T = TypeVar("T")
PATIENCE = dt.timedelta(days=7)
# how torch says that another process is no longer there: gloo's words, and NCCL's
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)

ALONE_WITH = (
    "alone_with"  # attribute of an error that only one process has: its rank, or None where that does not matter
)


def process_rank() -> int:
    """The number of this process among those that were started together; 0 alone."""
    return int(os.environ.get("RANK") or 0) if num_processes() > 1 else 0


def num_processes() -> int:
    """How many processes were started together; 1 alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


class Member(NamedTuple):
    """Where a process of a team runs."""

    host: str
    pid: int


class Team(NamedTuple):
    """The processes of one command: this one's number, how many there are, and where each of them runs."""

    rank: int
    size: int
    members: tuple[Member, ...] = ()

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
        with self.together():
            broadcast_object_list(outcome)
        return _unpacked(outcome)[0]  # type: ignore[no-any-return]

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process; every process gets all results by rank, or the first failure."""
        if self.size == 1:
            return [work()]
        from accelerate.utils import gather_object

        own = [_outcome(work)]
        with self.together():
            outcomes = gather_object(own)
        return _unpacked(outcomes)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block in which the processes wait for each other.

        A failure in it is this process's alone: the others cannot be told, and it speaks for itself.

        Raises:
            MachineError: another process is gone; it is named.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            if not is_gone(error):
                setattr(error, ALONE_WITH, self.rank)
                raise
            lost = self.lost()
            named = " and ".join(
                f"process {rank} ({self.members[rank].pid} on {self.members[rank].host})" for rank in lost
            )
            gone = MachineError(
                f"{named or 'another process'} of {self.size} is gone",
                hint="the same command goes on from the last checkpoint or part; the lines above may say why it ended",
            )
            if self.rank == min(set(range(self.size)) - set(lost), default=self.rank):
                setattr(gone, ALONE_WITH, None)  # of those that are left the first one speaks
            raise gone from None

    def lost(self) -> list[int]:
        """The processes on this machine that have ended; the first to end may still be about to."""
        here, deadline = socket.gethostname(), time.monotonic() + 2.0
        while time.monotonic() < deadline:
            if found := self._ended(here):
                return found
            time.sleep(0.05)
        return []

    def _ended(self, here: str) -> list[int]:
        return [rank for rank, member in enumerate(self.members) if member.host == here and not _lives(member.pid)]


ALONE = Team(0, 1)


def is_gone(error: BaseException) -> bool:
    """Whether an error says that another process of the team is no longer there."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in GONE)


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie, which waits only for its launcher to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][:1] not in ("Z", "X")
    except OSError:
        return not Path("/proc/self").exists()  # no /proc here: nobody can say


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
        yield ALONE
        return
    import torch
    from accelerate import PartialState

    ours = not torch.distributed.is_initialized()
    # the others wait while process 0 hashes and encodes, which may take hours: the default gives up after minutes
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    try:
        team = Team(state.process_index, state.num_processes)
        yield team._replace(members=tuple(team.on_each(lambda: Member(socket.gethostname(), os.getpid()))))
    except BaseException as error:
        # with NCCL parting is collective itself, and one of the others may never come: this process just ends (cli)
        ours = ours and torch.distributed.get_backend() != "nccl"
        # DDP waits in vain when it ends after the processes have parted, and a traceback keeps it alive
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        raise
    finally:
        gc.collect()  # DDP and shared layers hold themselves in cycles
        if ours:
            state.destroy_process_group()  # left to the end of the process, gloo's threads abort it now and then
            PartialState._reset_state()  # so that the next team can be joined
