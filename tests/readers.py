"""A reader of a page: a folder to work in, where the commands of the page run and what they print is compared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from command import Prefkit
from documented import Command, untrue

REPOSITORY = Path(__file__).parent.parent
SECONDS = 300  # of a process: far above what any block takes
WIDTH = 120
# pages of figures that come from samples: a last bit decides which token is sampled, and MKL settles its bits at the
# first product of a process. So their commands run in processes of their own
SAMPLED = {"docs/on_policy.md"}


class Reader(NamedTuple):
    """Where commands run, `prefkit` in this process, and whether numbers that a model gives must be the very same."""

    folder: Path
    prefkit: Prefkit
    exact: bool = True


def own_programs(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """For processes: `prefkit` and `python` are those of the tests, modules those of the repository and of `folder`."""
    programs = folder / ".programs"
    programs.mkdir()
    for name, words in (("prefkit", "-m prefkit"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    patch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    patch.setenv("PYTHONPATH", f"{REPOSITORY}:{folder}")
    patch.setenv("COLUMNS", str(WIDTH))


def in_a_process(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of a process, and what it printed: stdout, then stderr."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.returncode, done.stdout + done.stderr


def failure_of(command: Command, reader: Reader) -> str | None:
    """What is untrue of a command on a page: its exit code, or a line that is shown below it."""
    sampled = command.page in SAMPLED
    if command.words[0] == "prefkit" and not command.needs_a_shell and not sampled:
        ended = reader.prefkit(*command.words[1:])
        code, printed = ended.code, ended.out + ended.err
    else:
        code, printed = in_a_process(reader.folder, "bash", "-c", command.text)
    if code != command.code:
        return f"exits with {code} and not {command.code}:\n{printed}"
    if sampled and not reader.exact:
        return None  # other weights, other samples: nothing that is counted in them is near
    return untrue(command.shown, printed, exact=reader.exact)
