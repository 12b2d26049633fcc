"""Every format prefkit reads or writes, by the name a pipeline file gives it. One module per outside family."""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.alpaca_eval import ALPACA_EVAL
from prefkit.formats.argilla import ARGILLA_CLEANED
from prefkit.formats.axolotl import AXOLOTL_WRITER
from prefkit.formats.comparisons import COMPARISONS
from prefkit.formats.distilabel import DISTILABEL, DISTILABEL_PAIRS, DISTILABEL_PAIRS_WRITER
from prefkit.formats.generic import CANDIDATES, CORRECTIONS, PAIRS, PAIRS_WRITER
from prefkit.formats.helpsteer import HELPSTEER2, HELPSTEER3
from prefkit.formats.hh import HH
from prefkit.formats.llamafactory import (
    LLAMAFACTORY_ALPACA,
    LLAMAFACTORY_ALPACA_WRITER,
    LLAMAFACTORY_MESSAGES,
    LLAMAFACTORY_SHAREGPT,
    LLAMAFACTORY_SHAREGPT_WRITER,
)
from prefkit.formats.lmarena import LMARENA
from prefkit.formats.ms_swift import MS_SWIFT, MS_SWIFT_WRITER
from prefkit.formats.nectar import NECTAR
from prefkit.formats.nemo_rl import NEMO_RL, NEMO_RL_WRITER
from prefkit.formats.openai import OPENAI_PREFERENCE, OPENAI_PREFERENCE_WRITER
from prefkit.formats.openrlhf import OPENRLHF, OPENRLHF_WRITER
from prefkit.formats.reading import Family, Format, Unreadable
from prefkit.formats.rewrite import REWRITE
from prefkit.formats.shp import SHP
from prefkit.formats.stackexchange import STACKEXCHANGE, STACKEXCHANGE_PAIRED
from prefkit.formats.summarize import OPENAI_SUMMARIZE
from prefkit.formats.trl import TRL, TRL_TOKENIZED_WRITER, TRL_UNPAIRED_WRITER, TRL_WRITER
from prefkit.formats.ultrafeedback import ULTRAFEEDBACK
from prefkit.formats.ultrafeedback_binarized import ULTRAFEEDBACK_BINARIZED, ULTRAFEEDBACK_BINARIZED_WRITER
from prefkit.formats.writing import Writer

_ALL = (
    *(PAIRS, CANDIDATES, CORRECTIONS, COMPARISONS, REWRITE, HH, TRL),
    *(ULTRAFEEDBACK, ARGILLA_CLEANED, HELPSTEER2, HELPSTEER3, OPENAI_SUMMARIZE, SHP, NECTAR),
    *(STACKEXCHANGE_PAIRED, STACKEXCHANGE, LMARENA, ALPACA_EVAL),
    *(ULTRAFEEDBACK_BINARIZED, DISTILABEL, DISTILABEL_PAIRS, OPENRLHF, NEMO_RL, MS_SWIFT, OPENAI_PREFERENCE),
    *(LLAMAFACTORY_ALPACA, LLAMAFACTORY_SHAREGPT, LLAMAFACTORY_MESSAGES),
)
FORMATS: Mapping[str, Format] = {f.name: f for f in _ALL}
_ALL_WRITERS = (
    *(PAIRS_WRITER, TRL_WRITER, TRL_UNPAIRED_WRITER, TRL_TOKENIZED_WRITER),
    *(ULTRAFEEDBACK_BINARIZED_WRITER, DISTILABEL_PAIRS_WRITER),
    *(LLAMAFACTORY_ALPACA_WRITER, LLAMAFACTORY_SHAREGPT_WRITER, OPENRLHF_WRITER, AXOLOTL_WRITER, NEMO_RL_WRITER),
    *(MS_SWIFT_WRITER, OPENAI_PREFERENCE_WRITER),
)
WRITERS: Mapping[str, Writer] = {w.name: w for w in _ALL_WRITERS}


def list_formats() -> dict[str, dict[str, Any]]:
    """Every format that sources can have and that pairs are exported to.

    Returns:
        by name: its fields, the ones that `columns:` may map, whether it is read, written, and found by its rows
        (`detected`), which side is better (`direction`), and its trap (`note`).

    Example:
        print([name for name, told in prefkit.list_formats().items() if told["written"]])
    """
    return {name: _told(FORMATS.get(name), WRITERS.get(name)) for name in {**FORMATS, **WRITERS}}


def _told(form: Format | None, writer: Writer | None) -> dict[str, Any]:
    one: Any = form or writer
    return {
        "fields": one.fields,
        "columns": [*form.columns] if form else [],
        "records": form.family if form else None,
        "note": one.note,
        "read": form is not None,
        "written": writer is not None,
        "detected": form is not None and form.detect is not None,
        "direction": form.direction if form else "",
        "reference": writer.reference if writer else "",
    }


__all__ = ["FORMATS", "WRITERS", "Family", "Format", "Unreadable", "Writer", "list_formats"]
