"""Everything prefkit raises on purpose, and the exit code that each kind ends a command with.

    PrefkitError
    +-- InputError      2   what the user handed in cannot be used
    |   +-- ConfigError     a pipeline file or a --set
    |   +-- SourceError     a file that a source names
    |   +-- DatasetError    a dataset, reference or run directory
    |   +-- ModelError      a model or tokenizer folder
    +-- CheckError      1   the input is readable, and a check says no
    |   +-- GateError       the reference on disk is not this policy's
    |   +-- AuditError      the audit is worse than --strict allows
    +-- MachineError    3   disk or memory ran out, or another process of several is gone
    +-- Interrupted   130   somebody asked to stop; what is done is on disk

A message says what is wrong; `where` names file, line, row or field; `expected` what would have been right; `hint` the
next command to type. Own invariants use assert, never these.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple


class PrefkitError(Exception):
    """The root: a message for a person, and the parts it is made of."""

    exit_code = 2

    def __init__(self, message: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.message, self.where, self.expected, self.hint = message, where, expected, hint
        super().__init__(message)

    def __str__(self) -> str:
        where = self.where.replace("\n", "\\n")  # a name with a line break must not pass for a line of ours
        head = f"{where}: {self.message}" if where else self.message
        tail = f"\n  expected: {self.expected}" if self.expected else ""
        return head + tail + (f"\n  next: {self.hint}" if self.hint else "")

    def as_dict(self) -> dict[str, str]:
        """The error as `--json` prints it: kind, message and whichever parts are there."""
        parts = {"where": self.where, "expected": self.expected, "hint": self.hint}
        return {"kind": type(self).__name__, "message": self.message} | {k: v for k, v in parts.items() if v}


class InputError(PrefkitError):
    """What the user handed in cannot be used."""


class ConfigError(InputError):
    """A pipeline file, or a `--set`, that cannot be followed."""


class SourceError(InputError):
    """A source file that cannot be read at all (a single bad line is a reject, not an error)."""


class DatasetError(InputError):
    """A dataset, reference or run directory that is missing, foreign, unfinished or damaged."""


class ModelError(InputError):
    """A model or tokenizer that cannot be loaded or does not fit the data."""


class CheckError(PrefkitError):
    """The input is readable, and a check says no."""

    exit_code = 1


class GateError(CheckError):
    """The reference on disk is not this policy's: training on it would be silently wrong."""


class AuditError(CheckError):
    """The audit's verdict is worse than `--strict` allows."""


class MachineError(PrefkitError):
    """The machine ran out of disk or memory, or lost a process; nothing is half-written: the same command goes on."""

    exit_code = 3


class Interrupted(PrefkitError):  # noqa: N818 - nothing went wrong
    """Somebody asked to stop, and a long piece of work stopped where it loses nothing."""

    exit_code = 130


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Give an error that does not say where it happened the place that the caller knows."""
    try:
        yield
    except PrefkitError as error:
        error.where = error.where or where
        raise


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a kind of its own, and on a CPU a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(word in str(error) for word in words)


class _Room(NamedTuple):
    """A way to run out of room: what it is called, and what makes room."""

    message: str
    hint: str


_MAKE_ROOM = "make room and type the same command"
NO_ROOM = {
    errno.ENOSPC: _Room("the disk is full", _MAKE_ROOM),
    errno.EDQUOT: _Room("the disk quota is used up", _MAKE_ROOM),
    errno.EFBIG: _Room("a limit on the size of files is reached (ulimit -f)", "raise it and type the same command"),
}


def no_room(error: BaseException, where: str = "") -> MachineError | None:
    """The error of a disk that is full, if that is what an error says, by its number, its words or its cause.

    Libraries have their own ways: safetensors and Polars put the number into a text, torch hides the cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        for known, room in NO_ROOM.items():
            words = (f"os error {known})", f"[Errno {known}]", os.strerror(known))
            if number == known or any(word in str(seen) for word in words):
                place = where or str(getattr(seen, "filename", None) or "")
                return MachineError(room.message, where=place, hint=room.hint)
        seen = seen.__cause__ or seen.__context__
    return None
