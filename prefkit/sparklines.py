"""A curve in one line of text: blocks of eight heights, or signs where the screen has no blocks. Pure."""

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
SIGNS = "_.-~+*%#"  # eight heights in ASCII


def levels_for(encoding: str) -> str:
    """The eight characters that an encoding can show: blocks where it has them, otherwise ASCII."""
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return SIGNS
    return BLOCKS


def sparkline(values: Sequence[float], levels: str = BLOCKS) -> str:
    """One character a value, from the lowest level for the smallest to the highest for the largest.

    Equal values are all on the lowest level; what is no finite number is a blank.

    Example: 0, 1, 2, 3, 4, 5, 6, 7 give the eight levels in their order.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    # a power of two, which rounds nothing: the difference of the largest floats is no float
    scale = math.ldexp(1.0, math.frexp(max(abs(low), abs(high)))[1] - 1)
    span = high / scale - low / scale
    steps = len(levels) - 1
    return "".join(
        levels[round((value / scale - low / scale) / span * steps) if span else 0] if math.isfinite(value) else " "
        for value in values
    )
