"""UltraFeedback (openbmb/UltraFeedback): a row is an instruction and the completions of several models, each scored.

`overall_score` (1 to 10) is the score; higher is better. In the first release 2,628 completions have a 10 there, many
of which were a 1; their aspect ratings (1 to 5) show it. The publishers' repair (README of OpenBMB/UltraFeedback): a
fine-grained score of at most 2 makes a 10 a 1, above 4 it stays, and what lies between was rated again. The same is
done here, but for the last: nobody can be asked again, so the aspects are taken at their word, doubled to the scale of
10. A 10 that its own aspects deny is thus never the best for being a 10; without any aspect it stays. Rows do not say
which release they are from, so a 10 that came out of the second rating is lowered as well.

Left out: the system prompt that each completion was sampled with (`custom_system_prompt`), as it differs within a row.
"""

from collections.abc import Mapping
from typing import Any

from prefkit.formats.fields import as_number, first, objects
from prefkit.formats.reading import Columns, Format, Row, Unreadable, require

TOP = 10.0
LOW, HIGH = 2.0, 4.0  # the publishers' bounds on the fine-grained score


def read_ultrafeedback(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, as many candidates as it has completions."""
    instruction = require(row, "instruction")
    found = []
    for at, completion in enumerate(objects(row, "completions")):
        for name in ("response", "overall_score"):
            if name not in completion:
                raise Unreadable(f"completions.{at}.{name}", "missing_field")
        record = {"prompt": instruction, "response": completion["response"], "score": _score(completion)}
        found.append({**record, "model": completion.get("model")})
    return found


def _score(completion: Mapping[str, Any]) -> Any:
    """The overall score; a 10 that the aspects deny gives way to them."""
    overall = completion["overall_score"]
    if as_number(overall) != TOP:
        return overall
    aspects = _fine_grained(completion)
    if aspects is None or aspects > HIGH:
        return overall
    return 1.0 if aspects <= LOW else 2 * aspects


def _fine_grained(completion: Mapping[str, Any]) -> float | None:
    """The published fine-grained score; without one the mean of the aspect ratings that are numbers ("N/A" is none)."""
    published = as_number(completion.get("fine-grained_score"))
    annotations = completion.get("annotations")
    if published is not None or not isinstance(annotations, Mapping):
        return published
    given = (as_number(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, Mapping))
    ratings = [rating for rating in given if rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def _detect(row: Row) -> str | None:
    has = isinstance(row.get("instruction"), str) and "overall_score" in first(row, "completions")
    return "it has instruction and completions[] with overall_score" if has else None


ULTRAFEEDBACK = Format(
    "ultrafeedback",
    "candidates",
    (),
    False,
    "instruction, completions[{model, response, overall_score, fine-grained_score, annotations}]",
    "a 10 that the aspect ratings deny (a known fault of the first release) gives way to them",
    read_ultrafeedback,
    lambda _row, _columns: False,
    "a higher overall_score is better",
    _detect,
)
