"""The end of a process at a chosen moment, played inside a test."""

from pathlib import Path

import pytest


class Killed(BaseException):
    """Stands for the end of the process: nothing is tidied up."""


def die_at_rename(number: int, patch: pytest.MonkeyPatch) -> None:
    """Die when the n-th file is about to be renamed into its place."""
    calls = iter(range(1, 100))
    rename = Path.replace

    def replace(path: Path, target: Path | str) -> Path:
        if next(calls) == number:
            patch.setattr(Path, "unlink", lambda *_args, **_options: None)
            raise Killed
        return rename(path, target)

    patch.setattr(Path, "replace", replace)
