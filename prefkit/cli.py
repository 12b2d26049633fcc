"""The entry point, and what becomes of an error. Nothing heavy is imported before a command's handler runs.

Human output goes to stdout, progress to stderr; with --json everything but one JSON object (the last line) goes to
stderr. Exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine ran out of something, 70 a bug of prefkit's
own, 130 interrupted. Of several processes started together the first one speaks.
"""

import io
import os
import shlex
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

import typer

from prefkit import data_commands, model_commands
from prefkit.output import ReaderGone, close_stdout, emit, speaks

if TYPE_CHECKING:
    from prefkit.errors import MachineError

app = typer.Typer(
    name="prefkit",
    help="Build preference pairs, audit them, score the reference once, train with DPO. Offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_commands.app)
app.add_typer(model_commands.app)


def main() -> None:
    """The entry point: every failure is a message and an exit code; only a bug of our own shows a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop is asked to stop
    as_json = "--json" in sys.argv
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED: a short write would be lost
        sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer turns an interrupt into this exit code, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()  # here a full disk, or a reader that is gone, is still ours to answer
    except (ReaderGone, BrokenPipeError):  # `prefkit query ... | head`
        close_stdout()
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        leave(answer(None, as_json=as_json))
    except Exception as error:
        leave(answer(error, as_json=as_json))
    sys.exit(code if isinstance(code, int) else 0)


def leave(code: int) -> None:
    """End with an exit code; at once where this process could not part from others, which might keep it for ever."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def answer(error: Exception | None, *, as_json: bool) -> int:
    """Say what went wrong (None: somebody interrupted); returns the exit code."""
    from prefkit.errors import Interrupted, PrefkitError
    from prefkit.processes import ALONE_WITH, num_processes

    if error is None or (type(error) is RuntimeError and "Query interrupted" in str(error)):  # as DuckDB says it
        error = Interrupted("interrupted; what is finished is on disk")
    known = error if isinstance(error, PrefkitError) else machine_failure(error)
    if known is not None:
        if (rank := getattr(error, ALONE_WITH, None)) is not None:
            known.message = f"process {rank}: {known.message}"
            setattr(known, ALONE_WITH, rank)
        if isinstance(known, Interrupted):  # without the launcher of several processes, which nobody can know
            known.hint = shlex.join(["prefkit", *sys.argv[1:]])
            if num_processes() > 1:
                known.hint += ", by a launcher of any number of processes"
        fail(known.as_dict(), str(known), known, as_json=as_json)
        return known.exit_code
    show = getattr(error, "show", None)  # a usage error knows how to show itself
    if show is not None:
        show()
        fail({"kind": "UsageError", "message": str(error)}, "", error, as_json=as_json)
        return 2
    if speaks(error):
        traceback.print_exception(error)
    message = f"a bug in prefkit: {type(error).__name__}: {error}"
    told = f"{message}\n  next: report it with the lines above"
    fail({"kind": "Bug", "message": message}, told, error, as_json=as_json)
    return 70


def machine_failure(error: Exception) -> "MachineError | None":
    """What the machine ran out of, if that is what an error says."""
    from prefkit.errors import MachineError, is_out_of_memory, no_room

    if is_out_of_memory(error):
        return MachineError("out of memory", hint="a smaller batch_size or max_length, or another dtype, needs less")
    return no_room(error)


def fail(value: dict[str, Any], message: str, error: Exception, *, as_json: bool) -> None:
    """The message on stderr, and with --json the error object as the last line of stdout."""
    if message and speaks(error):
        from prefkit.text import printable

        sys.stderr.write(f"error: {printable(message)}\n")
    try:
        emit({"error": value}, as_json=as_json, error=error)
        sys.stdout.flush()
    except (ReaderGone, OSError):  # stdout itself may be what has no room
        close_stdout()
