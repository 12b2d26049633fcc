"""Every format prefkit reads, by the name a pipeline file gives it. One module per outside family."""

from collections.abc import Mapping

from prefkit.formats.generic import CANDIDATES, CORRECTIONS, PAIRS
from prefkit.formats.hh import HH
from prefkit.formats.reading import Family, Format, Unreadable
from prefkit.formats.trl import TRL

FORMATS: Mapping[str, Format] = {f.name: f for f in (PAIRS, CANDIDATES, CORRECTIONS, HH, TRL)}

__all__ = ["FORMATS", "Family", "Format", "Unreadable"]
