"""What the pipeline allows: tokens that are the point of the data, such as an identity's name or a house style."""

import re
from collections.abc import Callable, Sequence

from prefkit.grams import words_in

PATTERN = "re:"  # how an entry begins that is a regular expression


def allows(entries: Sequence[str]) -> Callable[[str], bool]:
    r"""Whether a token is allowed by a list: it has the words of an entry in a row, or matches a pattern as a whole.

    Example: `Certainly` allows `certainly` and `certainly !`; `re:\d+` allows `42` and no `42 %`.
    """
    patterns = [re.compile(entry.removeprefix(PATTERN)) for entry in entries if entry.startswith(PATTERN)]
    named = [f" {' '.join(words_in(entry))} " for entry in entries if not entry.startswith(PATTERN)]

    def allowed(token: str) -> bool:
        text = f" {' '.join(words_in(token))} "
        return any(name in text for name in named) or any(pattern.fullmatch(token) for pattern in patterns)

    return allowed
