r"""Answers at the end of responses, compared with the right one: no model, no scale, 1 or 0.

Comes in: responses and references as texts. Goes out: 1.0, 0.0, or None where there is no right answer to compare with.

* number, as in GSM8K (arXiv 2110.14168): what stands after the last `####`, else in the last `\boxed{}`, else the last
  number of the text; of response and reference by the same rule. Numbers are exact rationals, so that 1/2, 0.5, .50 and
  50% are one answer, and 0.3333 and 1/3 are two. Left out of a number: separators of thousands, currency, units.
* exact: equal texts after NFC, case folding and white space.

It reads answers, it does not do algebra: 2x is no number, and of `3 or 4` the last is the answer.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

VERIFIER_VERSION = 1  # part of a scorer's identity: another rule is another scorer

MARK = "####"
BOXED = "\\boxed"
# digits with or without separators of thousands; a decimal part; a fraction; percent
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(
    rf"(?P<minus>[-\u2212\u2013]\s?)?[$\u20ac\u00a3\u00a5]?\s?(?P<sign>[-\u2212])?"
    rf"(?P<whole>{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:\s?/\s?(?P<below>{DIGITS}(?:\.[0-9]+)?))?(?P<percent>\s?\\?%)?"
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
LATEX_NOISE = re.compile(r"\\(?:text|mathrm|mbox|left|right|!|,|;|:| )|\\(?=\$)|[{}]|(?<=[0-9])\{,\}(?=[0-9])")
MOST_DIGITS = 400  # of one number: longer ones are no answers, and Python refuses to read them at 4,300


def last_number(text: str) -> Fraction | None:
    r"""The answer of a response or a reference as an exact number; None where there is none.

    Example: `last_number("so 3 * 4 = 12.\n#### 1,200.00")` is `Fraction(1200)`.
    """
    return _last_of(_answer_part(text))


def _answer_part(text: str) -> str:
    """What stands after the last mark, on its line; else in the last box; else everything."""
    _, mark, after = text.rpartition(MARK)
    if mark and (line := after.strip().partition("\n")[0]):
        return line
    boxed = _last_box(text)
    return text if boxed is None else boxed


def _last_box(text: str) -> str | None:
    r"""The inside of the last whole `\boxed{...}`, braces inside it counted."""
    at = text.rfind(BOXED)
    while at >= 0:
        inside, depth, start = text[at + len(BOXED) :].lstrip(), 0, 1
        for place, character in enumerate(inside):
            depth += (character == "{") - (character == "}")
            if not inside.startswith("{"):
                break
            if depth == 0:
                return inside[start:place]
        at = text.rfind(BOXED, 0, at)
    return None


def _last_of(text: str) -> Fraction | None:
    plain = LATEX_NOISE.sub("", LATEX_FRACTION.sub(r"\1/\2", text))
    found = None
    for match in NUMBER.finditer(plain):
        found = match
    return None if found is None else _as_fraction(found, plain)


def _as_fraction(found: re.Match[str], text: str) -> Fraction | None:
    whole, below = found["whole"].replace(",", ""), (found["below"] or "1").replace(",", "")
    if len(whole) > MOST_DIGITS or len(below) > MOST_DIGITS or not Fraction(below):
        return None
    # `10-5` and `10 - 5` hold no negative number, `= -5`, `is -5` and `-$5` do
    minus, before = found["minus"] or "", text[: found.start()]
    before = (before.rstrip() if len(minus) > 1 else before)[-1:]
    is_negative = bool(found["sign"]) or bool(minus and not (before.isalnum() or (before and before in ")]}%")))
    value = Fraction(whole) / Fraction(below)
    return (-value if is_negative else value) / (100 if found["percent"] else 1)


def same_number(response: str, reference: str) -> float | None:
    """1 where both end in the same number, else 0; None where the reference has none."""
    right = last_number(reference)
    return None if right is None else float(last_number(response) == right)


def same_text(response: str, reference: str) -> float:
    """1 where both are the same text but for case, white space and the way characters are composed; else 0."""
    return float(_folded(response) == _folded(reference))


def _folded(text: str) -> str:
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(composed.split())


VERIFIERS: Mapping[str, Callable[[str, str], float | None]] = {"number": same_number, "exact": same_text}


def verify_answers(rule: str, responses: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    """A score a response by one of VERIFIERS; None where there is no reference, or none that the rule can read."""
    verifier = VERIFIERS[rule]
    return [
        None if reference is None else verifier(response, reference)
        for response, reference in zip(responses, references, strict=True)
    ]
