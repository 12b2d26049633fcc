"""One writer at a time: who holds a dataset or run directory, told by process id and host.

Comes in: a folder. Goes out: a lock that ends with the process that holds it, however that ends.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from prefkit.errors import DatasetError, PrefkitError
from prefkit.format import LOCK
from prefkit.store import written

HELD = "is being written by another prefkit"


def is_held(error: DatasetError) -> bool:
    """Whether an error of `locked` says that somebody else writes to the directory: who can wait may try again."""
    return error.message.startswith(HELD)


def take_lock(folder: Path) -> FileLock | None:
    """Become the only writer of a dataset or run directory; None if somebody else is. `give_lock` ends it.

    Raises:
        DatasetError: the directory cannot be written to.
        MachineError: the disk is full.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        return None
    except PrefkitError:
        lock.release()
        raise
    return lock


def give_lock(folder: Path, lock: FileLock) -> None:
    """Let others write."""
    with contextlib.suppress(OSError):  # an empty file needs no room
        (folder / LOCK).write_text("", encoding="utf-8")
    lock.release()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of a dataset or run directory while the block runs.

    Raises:
        DatasetError: somebody else holds it, named by process id and host; or it cannot be written to.
        MachineError: the disk is full.
    """
    lock = take_lock(folder)
    if lock is None:
        holder = (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"
        message = f"{HELD} ({holder})"
        raise DatasetError(message, where=str(folder), hint="wait for it to end")
    try:
        yield
    finally:
        give_lock(folder, lock)


def leave_no_empty_directory(folder: Path) -> None:
    """Remove a dataset or run directory of a command that failed before it had anything to keep."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {LOCK}:
        return
    with contextlib.suppress(OSError):
        folder.rmdir()  # there may not even have been room for the lock
        return
    if (lock := take_lock(folder)) is not None:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        lock.release()
