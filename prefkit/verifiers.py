r"""Answers at the end of responses, compared with the right one: no model, no scale, 1 or 0.

Comes in: responses and references as texts. Goes out: 1.0, 0.0, or None where there is no right answer to compare with.

* number, as in GSM8K (arXiv 2110.14168): the first number after the last `####`, on its line; else the last in the last
  `\boxed{}`, else the last of the text; of response and reference by the same rule. Numbers are exact rationals: 1/2,
  0.5, .50 and 50% are one answer, and 0.3333 and 1/3 are two; 2 1/2 is 5/2, 1e5 and 10^5 are 100,000. A percentage is
  also the number before its sign, as references leave that out. Left out of a number: separators of thousands,
  currency, units and their powers, subscripts.
* exact: equal texts after NFC, case folding and white space.

It reads answers, it does not do algebra: 2x is no number, and of `3 or 4` the last is the answer.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

VERIFIER_VERSION = 2  # part of a scorer's identity: another rule is another scorer

MARK = "####"
BOXED = "\\boxed"
# digits with or without separators of thousands; powers; a decimal part; a fraction, mixed or not; percent
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
SPACED = r"[1-9][0-9]{0,2}(?:[ \u00a0\u2009\u202f_][0-9]{3})+(?![0-9])"
EXPONENT = r"\s?\^\s?\(?(?P<{name}>[-\u2212]?[0-9]{{1,3}}(?![0-9]))\)?"
NUMBER = re.compile(
    rf"(?P<minus>[-\u2212\u2013]\s?)?[$\u20ac\u00a3\u00a5]?\s?(?P<sign>[-\u2212])?"
    rf"(?:(?P<units>[0-9]{{1,3}})\s(?=[0-9]+\s?/\s?[0-9]))?"
    rf"(?P<whole>(?:{SPACED}|{DIGITS})(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?:[eE](?P<exp>[-+]?[0-9]{{1,3}})(?![0-9A-Za-z])"
    rf"|\s?(?:\\times|\\cdot|[x*\u00d7\u00b7])\s?10{EXPONENT.format(name='ten')}|{EXPONENT.format(name='power')})?"
    rf"(?:\s?/\s?(?P<below>{DIGITS}(?:\.[0-9]+)?))?(?P<percent>\s?\\?%)?"
)
NO_NUMBER = re.compile(r"(?<=[A-Za-z)\]])\s?\^\s?[-\u2212+]?[0-9]+|(?<![0-9\s])_\s?[0-9]+")  # cm^2, x_1
MIXED = re.compile(r"(?<=[0-9])\s*(?=\\[dt]?frac)")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
LATEX_NOISE = re.compile(r"\\(?:text|mathrm|mbox|left|right|!|,|;|:| )|\\(?=\$)|[{}]|(?<=[0-9])\{,\}(?=[0-9])")
MOST_DIGITS = 400  # of one number: longer ones are no answers, and Python refuses to read them at 4,300


class Answer(NamedTuple):
    """A number that a text ends in, and whether it was said in percent."""

    value: Fraction
    is_percent: bool


def last_number(text: str) -> Fraction | None:
    r"""The answer of a response or a reference as an exact number; None where there is none.

    Example: `last_number("so 3 * 4 = 12.\n#### 1,200.00")` is `Fraction(1200)`.
    """
    answer = read_answer(text)
    return None if answer is None else answer.value


def read_answer(text: str) -> Answer | None:
    """The answer of a response or a reference; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    if mark and (line := after.strip().partition("\n")[0]):
        return _number_of(line, first=True)
    boxed = _last_box(text)
    return _number_of(text if boxed is None else boxed, first=False)


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


def _number_of(text: str, *, first: bool) -> Answer | None:
    """The first or the last number of a text."""
    plain = LATEX_NOISE.sub("", LATEX_FRACTION.sub(r"\1/\2", MIXED.sub(" ", text)))
    plain = NO_NUMBER.sub("", plain)
    found = None
    for match in NUMBER.finditer(plain):
        found = match
        if first:
            break
    return None if found is None else _as_answer(found, plain)


def _as_answer(found: re.Match[str], text: str) -> Answer | None:
    whole, below = re.sub(r"[,\s_]", "", found["whole"]), (found["below"] or "1").replace(",", "")
    if len(whole) > MOST_DIGITS or len(below) > MOST_DIGITS or not Fraction(below):
        return None
    value = _raised(Fraction(whole), found)
    if value is None:
        return None
    value /= Fraction(below)
    if found["units"] is not None and value < 1:  # 2 1/2; not 2 3/2
        value += Fraction(found["units"])
    # `10-5` and `10 - 5` hold no negative number, `= -5`, `is -5` and `-$5` do
    minus, before = found["minus"] or "", text[: found.start()]
    before = (before.rstrip() if len(minus) > 1 else before)[-1:]
    is_negative = bool(found["sign"]) or bool(minus and not (before.isalnum() or (before and before in ")]}%")))
    value = -value if is_negative else value
    return Answer(value / 100, True) if found["percent"] else Answer(value, False)


def _raised(value: Fraction, found: re.Match[str]) -> Fraction | None:
    """A number with its power: 1e5, 3 x 10^5, 2^10; None where there is none, or no end to its digits."""
    tens, power = (
        int(one.replace("\u2212", "-")) for one in (found["exp"] or found["ten"] or "0", found["power"] or "1")
    )
    if abs(tens) > MOST_DIGITS or len(str(value)) * abs(power) > MOST_DIGITS or (not value and power < 0):
        return None
    return Fraction(value**power) * Fraction(10) ** tens


def same_number(response: str, reference: str) -> float | None:
    """1 where both end in the same number, else 0; None where the reference has none.

    Where only one of them is in percent, 70% is 0.7 and 70 alike.
    """
    right, said = read_answer(reference), read_answer(response)
    if right is None or said is None:
        return None if right is None else 0.0
    if right.is_percent != said.is_percent:
        low, high = (right, said) if right.is_percent else (said, right)
        return float(high.value in (low.value, 100 * low.value))
    return float(said.value == right.value)


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
