"""What a command says, and where: to a person on stdout or stderr, and with --json one object as stdout's last line."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(*, as_json: bool = False) -> "Console":
    """Where a person reads: stdout, or stderr beside --json. Data and paths are never markup."""
    from rich.console import Console

    from prefkit.text import printable

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would end the command; whoever reads its words does not decide that
            close_stdout()

        def print(self, *objects: Any, **options: Any) -> None:  # names of files are data: no escape sequences
            super().print(*(self.shown(o) if isinstance(o, str) else o for o in objects), **options)

        def shown(self, text: str) -> str:  # a screen that has not every character shows the rest
            return printable(text).encode(self.encoding, "replace").decode(self.encoding)

    return Screen(stderr=as_json, quiet=not speaks(), markup=False, highlight=False, soft_wrap=True)


class ReaderGone(Exception):  # noqa: N818 - nothing went wrong
    """Whoever reads stdout has seen enough. No OSError: typer would end with 1 at that."""


def put(text: str) -> None:
    """Write to stdout, whole."""
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        raise ReaderGone from None


def speaks(error: Exception | None = None) -> bool:
    """Whether this process is the one that prints: the first of several, and any with an error of its own."""
    from prefkit.processes import ALONE_WITH, process_rank

    return process_rank() == 0 or hasattr(error, ALONE_WITH)


def emit(value: dict[str, Any], *, as_json: bool, error: Exception | None = None) -> None:
    """The one JSON line of a command, or of the error that ended it."""
    if as_json and speaks(error):
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # a file name that is no UTF-8
            text = json.dumps(value, allow_nan=False)
        put(text + "\n")


def close_stdout() -> None:
    """Nothing more can be written there, not even what Python still holds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
