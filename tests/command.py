"""How a command ended, for tests that run `prefkit` in their own process (the fixture `prefkit` of conftest.py)."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def last_json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])

    def error(self) -> Any:
        """The error object of --json, alone on the last line."""
        last = self.last_json()
        assert set(last) == {"error"}
        return last["error"]


Prefkit = Callable[..., Ended]
