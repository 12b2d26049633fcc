"""What the sections of a pipeline file have in common: their base, shares, and sizes in memory."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]B)", re.IGNORECASE)
MIN_MEMORY, MAX_MEMORY = 1e6, 1e15  # bytes
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\S([^\n\r]*\S)?$")]  # a name, for a person
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """What every section is: frozen, without unknown keys, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _bytes(size: str) -> float:
    number, unit = SIZE.fullmatch(size).groups()  # type: ignore[union-attr]
    return float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()]


def num_bytes(size: str) -> int:
    """`500MB` as a number; of a text that `check_size` has passed."""
    return int(_bytes(size))


def check_size(size: str, key: str) -> None:
    """Refuse what is no size, or one out of range, by the name of its key."""
    if not SIZE.fullmatch(size):
        raise ValueError(f"{key}: {size} is not a size such as 500MB or 4GB")
    if not MIN_MEMORY <= _bytes(size) <= MAX_MEMORY:
        raise ValueError(f"{key}: {size} is not between 1MB and 1000000GB")
