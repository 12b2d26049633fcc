"""A curve in one line: the ends, what is flat, what is no number, and screens without blocks."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.sparklines import BLOCKS, SIGNS, levels_for, sparkline


def test_eight_values_are_the_eight_levels() -> None:
    assert sparkline(list(range(8))) == BLOCKS == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0]) == "█▁"
    assert sparkline([0, 1, 2], "_.-~+*%#") == "_+#"  # the middle of seven steps is 3.5, rounded to the even 4


def test_equal_values_are_all_low() -> None:
    assert sparkline([5, 5, 5]) == "▁▁▁"
    assert sparkline([0, 0]) == "▁▁"


def test_what_is_no_number_is_a_blank() -> None:
    assert sparkline([0, math.nan, 1, math.inf]) == "▁ █ "
    assert sparkline([math.nan]) == " "
    assert sparkline([]) == ""


@given(st.lists(st.floats(-sys.float_info.max, sys.float_info.max), max_size=50))
def test_the_largest_is_highest_and_the_smallest_lowest_however_large_they_are(values: list[float]) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    if len(set(values)) > 1 and max(values) - min(values) > max(map(abs, values)) * 1e-9:
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"


@pytest.mark.parametrize(
    ("encoding", "levels"),
    [
        ("utf-8", BLOCKS),
        ("utf-16", BLOCKS),
        ("ascii", SIGNS),
        ("latin-1", SIGNS),
        ("cp1252", SIGNS),
        ("nonsense", SIGNS),
    ],
)
def test_a_screen_without_blocks_has_signs(encoding: str, levels: str) -> None:
    assert levels_for(encoding) == levels


def test_the_signs_are_ascii_and_as_many_as_the_blocks() -> None:
    assert SIGNS.isascii()
    assert len(SIGNS) == len(BLOCKS) == 8
