"""No format and no selection ever yields equal sides, an empty side, or a pair the wrong way round.

A strategy a format writes rows in its own layout, with values that go wrong elsewhere: ties, NaN, infinities, numbers
as text, nothing at all. What each row says is worked out here, in plain Python, from the direction that the publishers
document; the pairs that come out of a whole build are held against it. The accounts are kept once more as well.
"""

import json
import math
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefkit.build import build_dataset, make_tables
from prefkit.config import Pipeline
from prefkit.formats import FORMATS
from prefkit.resolving import resolve_kind

HOSTILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
LONG = settings(HOSTILE, max_examples=100)
# the characters with the Unicode property White_Space
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
WHITE += "\u2028\u2029\u202f\u205f\u3000"
MOST = Fraction(1e30)  # a score above it is no score

Row = dict[str, Any]
Value = Fraction | None


class Verdict(NamedTuple):
    """What a row of two sides says; `whole`: the texts hold the prompt as well."""

    better: str
    worse: str
    whole: bool = False


class Opinion(NamedTuple):
    """One score of one response, as the file has it (`raw`) and as a number for which higher is better (`value`)."""

    prompt: Any
    text: Any
    raw: Any
    value: Value
    scorer: str | None = None
    rater: str | None = None


class Line(NamedTuple):
    """A row, and what it says: of a pair (None: there must be no pair of it), or of candidates."""

    row: Row
    verdict: Verdict | None = None
    opinions: tuple[Opinion, ...] = ()


class File(NamedTuple):
    source: Row
    lines: list[Line]
    pairs: Mapping[str, Any] = MappingProxyType({})


# the second reading of numbers and texts


def number(raw: Any, *, booleans: bool = True, most: Fraction | None = MOST) -> Value:
    """A finite number, or one written as text."""
    if isinstance(raw, bool) and not booleans:
        return None
    if isinstance(raw, str):
        try:
            raw = float(raw.strip()) if "_" not in raw else None
        except ValueError:
            return None
    if not isinstance(raw, int | float) or (isinstance(raw, float) and not math.isfinite(raw)):
        return None
    found = Fraction(raw)
    return None if most is not None and abs(found) > most else found


def folded(text: str) -> str:
    """NFC, runs of white space one space, none at the ends."""
    return " ".join(re.split(f"[{WHITE}]+", unicodedata.normalize("NFC", text))).strip(" ")


def contents(side: Any) -> list[str]:
    return [side] if isinstance(side, str) else [turn["content"] for turn in side]


def plain(side: Any) -> str:
    return "".join(contents(side))


def said_by(side: Any, role: str) -> str:
    return side if isinstance(side, str) else "".join(turn["content"] for turn in side if turn["role"] == role)


def shape(side: Any) -> list[tuple[str, str]]:
    """A side as nobody should have it twice."""
    return [("", folded(side))] if isinstance(side, str) else [(t["role"], folded(t["content"])) for t in side]


# what goes into the rows


class Gone:
    """A field that is not there."""


def present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: present(inner) for name, inner in value.items() if not isinstance(inner, Gone)}
    return [present(inner) for inner in value] if isinstance(value, list) else value


GONE = Gone()
NAN, INF = math.nan, math.inf
FEW: list[Any] = [0, 1, 2, 3, 4, 1.5, 2.5]
ODD: list[Any] = [
    NAN,
    INF,
    -INF,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    0.1,
    0.3,
    0.30000000000000004,
    1e30,
    1.1e30,
    -1,
    10,
    10**400,
]
ODD += [True, False, "3", " 4.5 ", "2", "10", "9", "nan", "inf", "-Infinity", "N/A", "", "x", "1_0", "1e1", "１"]
ODD += [None, GONE, [], {}, [3], {"score": 3}]


def mostly(usual: st.SearchStrategy[Any], *others: st.SearchStrategy[Any], times: int = 7) -> st.SearchStrategy[Any]:
    """`usual` so many times as often as each of the others; one_of takes a strategy that comes twice for one."""
    return st.sampled_from([usual] * times + [*others]).flatmap(lambda one: one)


SCORES = mostly(st.sampled_from(FEW), st.sampled_from(ODD), st.floats(), st.integers(-5, 12))
NO_TEXTS: list[Any] = [None, 5, True, {}, NAN, GONE]
BLANK = ["", " ", "\n\t", "\u3000", "\u2028 ", "\u00a0"]


def answers(about: int, *, spoilt: bool = True) -> st.SearchStrategy[Any]:
    """Answers of few words, so that they meet again, exactly or after folding."""
    usual = [f"answer {k} to question {about}, réponse" for k in range(4)]
    alike = [f" answer {k}\u00a0to  question {about}, re\u0301ponse\n" for k in range(2)]
    long = [f"answer {k} to question {about}, at {'great ' * 10}length" for k in range(2)]
    rare = [st.sampled_from(alike), st.sampled_from(BLANK), *([st.sampled_from(NO_TEXTS)] if spoilt else [])]
    return mostly(st.sampled_from([*usual, *long]), *rare, times=15)


def question(about: int) -> str:
    return f"What is {about}?"


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


# what a row of two sides says


def ready(better: Any, worse: Any, scores: Iterable[Value] = (), *, whole: bool = False) -> Verdict | None:
    """A pair that the row calls so; `scores`: higher is better, and they must agree."""
    if not isinstance(better, str) or not isinstance(worse, str):
        return None
    given = [*scores]
    if any(one is None or other is None or one <= other for one, other in zip(given[::2], given[1::2], strict=True)):
        return None
    return Verdict(better, worse, whole)


def own_scores(raws: tuple[Any, Any], sign: int, absent: tuple[Any, ...]) -> list[Value]:
    """Scores of chosen and rejected that must agree: none where one is not given; None where one is no number."""
    values = [number(raw) for raw in raws if not any(raw is one or raw == one for one in absent)]
    if any(value is None for value in values):
        return [None, None]
    return [sign * value for value in values if value is not None] if len(values) == 2 else []


def decided(a: Any, b: Any, winner: str | None, scores: Iterable[Value] = (), *, whole: bool = False) -> Verdict | None:
    """The side that the row says is better, a or b."""
    if winner not in ("a", "b"):
        return None
    given = [*scores]
    return ready(a, b, given, whole=whole) if winner == "a" else ready(b, a, given[::-1], whole=whole)


def most_votes(raw: Any, meaning: Mapping[str, str]) -> str | None:
    """A label means the same in upper and lower case, with white space around it, and as 1, 1.0, "1" and "1.0"."""
    votes = [vote for vote in (raw if isinstance(raw, list) else [raw]) if vote is not None]
    found = Counter[str | None]()
    for vote in votes:
        if isinstance(vote, float) and math.isfinite(vote) and vote == int(vote):
            vote = int(vote)  # noqa: PLW2901
        label = re.sub(r"^(-?\d+)\.0+$", r"\1", str(vote).strip().lower())
        found[None if isinstance(vote, list | dict) else meaning.get(label)] += 1
    if not votes or None in found:
        return None
    (first, num), *others = [*found.most_common(), (None, 0)]
    return first if all(num > other for _, other in others) else None


# rows, by format

Draw = st.DrawFn
Write = Callable[[Draw, int, Row], Line]
WRITE: dict[str, Write] = {}
SOURCES: dict[str, st.SearchStrategy[Row]] = {}


def of(form: str, source: st.SearchStrategy[Row] | None = None) -> Callable[[Write], Write]:
    """Name the function that writes a line of a format; `source`: what the pipeline may say of such a file."""

    def name(write: Write) -> Write:
        WRITE[form] = write
        SOURCES[form] = st.just({}) if source is None else source
        return write

    return name


DIRECTIONS = st.sampled_from(["higher_is_better", "lower_is_better"])
DIRECTED = st.fixed_dictionaries({"direction": DIRECTIONS})


def sign_of(source: Row) -> int:
    return -1 if source.get("direction") == "lower_is_better" else 1


def two(draw: Draw, about: int, *, spoilt: bool = True) -> tuple[Any, Any]:
    return draw(answers(about, spoilt=spoilt)), draw(answers(about, spoilt=spoilt))


@of("pairs", DIRECTED)
def pairs_line(draw: Draw, about: int, source: Row) -> Line:
    (better, worse), scores = two(draw, about), (draw(SCORES), draw(SCORES))
    row = {"prompt": question(about), "chosen": better, "rejected": worse}
    if draw(st.booleans()):
        return Line(row, ready(better, worse))
    if draw(st.booleans()):
        row |= {"chosen": [assistant(better)], "rejected": [assistant(worse)]}
    row |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return Line(row, ready(better, worse, own_scores(scores, sign_of(source), (None, GONE, ""))))


def opinion(draw: Draw, about: int, sign: int) -> Opinion:
    raw = draw(SCORES)
    value = number(raw)
    return Opinion(question(about), draw(answers(about)), raw, None if value is None else sign * value)


def several(draw: Draw, about: int, sign: int = 1) -> tuple[Opinion, ...]:
    return tuple(opinion(draw, about, sign) for _ in range(draw(st.integers(1, 5))))


@of("candidates", DIRECTED)
def candidates_line(draw: Draw, about: int, source: Row) -> Line:
    given = several(draw, about, sign_of(source))
    if draw(st.booleans()):
        one = given[0]
        return Line({"prompt": one.prompt, "response": one.text, "score": one.raw}, None, given[:1])
    none = [one._replace(text=None if one.text is GONE else one.text) for one in given]
    none = [one._replace(raw=None if one.raw is GONE else one.raw) for one in none]
    row = {"prompt": question(about), "responses": [one.text for one in none], "scores": [one.raw for one in none]}
    return Line(row, None, tuple(none))


@of("corrections")
def corrections_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    return Line({"prompt": question(about), "response": worse, "correction": better}, ready(better, worse))


LABELS = st.sampled_from([None, {"a": [1], "b": [2], "tie": [0]}, {"a": ["left"], "b": [True, "2"], "tie": [0.5]}])
OWN_LABELS: list[Any] = [0, 1, 2, 1.0, 2.0, "1", " 2.0 ", "left", "Left ", 0.5, "0.5", "true", "TRUE", -0.0, "+1"]
WINNERS: list[Any] = [
    "a",
    "b",
    "A",
    " b ",
    "model_a",
    "Model_B",
    "response_a",
    "response_b",
    "tie",
    "equal",
    "c",
    "both",
]
WINNERS += [*OWN_LABELS, "1.0", "0.0", "2.00", "01.0", " 2 "]
WINNERS += [True, False, NAN, INF, None, GONE, "", {}, [[]]]


@of("comparisons", LABELS.map(lambda labels: {"labels": labels} if labels else {}))
def comparisons_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    words = {name: name[-1] for name in ("a", "b", "model_a", "model_b", "response_a", "response_b")}
    words |= {"tie": "tie", "equal": "tie"}
    if "labels" in source:
        named = {side: [str(label).lower() for label in labels] for side, labels in source["labels"].items()}
        words = {label: side for side, labels in named.items() for label in labels}
    likely = st.sampled_from([*OWN_LABELS[:7], "left"] if "labels" in source else WINNERS[:10])
    vote = mostly(likely, st.sampled_from(WINNERS))
    votes = st.lists(vote.filter(lambda one: one is not GONE), max_size=5)
    winner = draw(mostly(vote, votes, times=2))
    scores = (draw(SCORES), draw(SCORES)) if draw(st.integers(0, 2)) == 0 else (GONE, GONE)
    row = {"prompt": question(about), "response_a": a, "response_b": b, "winner": winner}
    row |= {"score_a": scores[0], "score_b": scores[1]}
    given = own_scores(scores, 1, (None, GONE, ""))
    return Line(row, None if winner is GONE else decided(a, b, most_votes(winner, words), given))


RULES = [{"pattern": "answer 0|answer 1", "replace": "reply 0"}, {"pattern": "  ", "replace": " "}]
RULES += [{"pattern": "^answer 2.*", "replace": ""}]


@of("rewrite", st.just({"rules": RULES}))
def rewrite_line(draw: Draw, about: int, source: Row) -> Line:
    worse = draw(answers(about))
    better = worse
    if isinstance(worse, str):
        better = worse.replace("answer 0", "reply 0").replace("answer 1", "reply 0").replace("  ", " ")
        better = "" if better.startswith("answer 2") else better
    return Line({"prompt": question(about), "response": worse}, None if better == worse else ready(better, worse))


@of("hh")
def hh_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about, spoilt=False)
    asked = [f"\n\nHuman: {question(one)}\n\nAssistant: " for one in (about, draw(st.sampled_from([about] * 5 + [9])))]
    verdict = ready(better, worse) if asked[0] == asked[1] else None
    return Line({"chosen": asked[0] + better, "rejected": asked[1] + worse}, verdict)


def conversations(about: int, better: Any, worse: Any) -> tuple[list[Row], list[Row], Verdict | None]:
    """Both sides whole."""
    told = ready(better, worse)
    asked = question(about)
    whole = None if told is None else Verdict(asked + better, asked + worse, whole=True)
    return [user(asked), assistant(better)], [user(asked), assistant(worse)], whole


def trl_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    asked = question(about)
    match draw(st.sampled_from(["texts", "texts alone", "turns", "turns alone", "turns beside text"])):
        case "texts":
            return Line({"prompt": asked, "chosen": better, "rejected": worse}, ready(better, worse))
        case "turns":
            row = {"prompt": [user(asked)], "chosen": [assistant(better)], "rejected": [assistant(worse)]}
            return Line(row, ready(better, worse))
        case "texts alone":
            if not isinstance(better, str) or not isinstance(worse, str):
                return Line({"chosen": better, "rejected": worse})
            sides = f"{asked} {better}", f"{asked} {worse}"
            return Line({"chosen": sides[0], "rejected": sides[1]}, Verdict(*sides, whole=True))
        case form:
            chosen, rejected, verdict = conversations(about, better, worse)
            prompt = {"prompt": asked} if form == "turns beside text" else {}
            return Line({**prompt, "chosen": chosen, "rejected": rejected}, verdict)


of("trl")(trl_line)
of("openrlhf")(trl_line)


def denied_ten(overall: Any, fine: Any, ratings: list[Any]) -> Value:
    """The publishers' repair of a 10 that is none; without them to ask, the aspects, doubled."""
    score = number(overall)
    if isinstance(overall, bool) or score != 10:
        return score
    published = number(fine, booleans=False, most=None)
    given = [value for value in (number(r, booleans=False, most=None) for r in ratings) if value is not None]
    aspects = published if published is not None else sum(given) / len(given) if given else None
    if aspects is None or aspects > 4:
        return score
    return Fraction(1) if aspects <= 2 else 2 * Fraction(aspects)


@of("ultrafeedback")
def ultrafeedback_line(draw: Draw, about: int, source: Row) -> Line:
    given, completions = [], []
    for _ in range(draw(st.integers(1, 4))):
        text, overall = draw(answers(about)), draw(SCORES | st.sampled_from([10, 10.0, "10", 9, 7.5]))
        fine, ratings = draw(SCORES), draw(st.lists(SCORES.map(lambda r: None if r is GONE else r), max_size=3))
        if overall is GONE and text is GONE:
            text = None
        annotations = {f"aspect {at}": {"Rating": rating} for at, rating in enumerate(ratings)}
        given.append(Opinion(question(about), text, overall, denied_ten(overall, fine, ratings)))
        completions.append(
            {"response": text, "overall_score": overall, "fine-grained_score": fine, "annotations": annotations}
        )
    return Line({"instruction": question(about), "completions": completions}, None, tuple(given))


def rated_sides(draw: Draw, about: int, names: tuple[str, str], absent: tuple[Any, ...]) -> Line:
    better, worse = two(draw, about)
    scores = draw(SCORES), draw(SCORES)
    chosen, rejected, verdict = conversations(about, better, worse)
    row = {"prompt": question(about), "chosen": chosen, "rejected": rejected}
    agree = ready("", "", own_scores(scores, 1, absent)) is not None
    return Line(row | dict(zip(names, scores, strict=True)), verdict if agree else None)


@of("argilla_cleaned")
def argilla_line(draw: Draw, about: int, source: Row) -> Line:
    return rated_sides(draw, about, ("chosen-rating", "rejected-rating"), (None, GONE))


@of("ultrafeedback_binarized")
def binarized_line(draw: Draw, about: int, source: Row) -> Line:
    line = rated_sides(draw, about, ("score_chosen", "score_rejected"), (None,))
    return line if {"score_chosen", "score_rejected"} <= set(present(line.row)) else line._replace(verdict=None)


@of("distilabel_pairs")
def distilabel_pairs_line(draw: Draw, about: int, source: Row) -> Line:
    line = rated_sides(draw, about, ("chosen_rating", "rejected_rating"), (None,))
    return line if {"chosen_rating", "rejected_rating"} <= set(present(line.row)) else line._replace(verdict=None)


WEIGHTS = {"helpfulness": "0.65", "correctness": "0.8", "coherence": "0.45", "complexity": "0.55", "verbosity": "-0.4"}


def on_scale(raw: Any, low: int, high: int) -> Value:
    value = number(raw, booleans=False)
    return None if value is None or not low <= value <= high else value


@of("helpsteer2")
def helpsteer2_line(draw: Draw, about: int, source: Row) -> Line:
    usual = st.sampled_from([0, 1, 2, 3, 4, 1, 2])
    ratings = {name: draw(usual) for name in WEIGHTS}
    if draw(st.integers(0, 3)) == 0:
        ratings[draw(st.sampled_from([*WEIGHTS]))] = draw(SCORES)
    values = {name: on_scale(raw, 0, 4) for name, raw in ratings.items()}
    score = sum((Fraction(WEIGHTS[name]) * (value or 0) for name, value in values.items()), Fraction(0))
    text = draw(answers(about))
    told = Opinion(question(about), text, ratings, None if None in values.values() else score)
    return Line({"prompt": question(about), "response": text, **ratings}, None, (told,))


@of("helpsteer3")
def helpsteer3_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    raw = draw(mostly(st.sampled_from([-3, -2, -1, 0, 1, 2, 3, "-1", "2", -1e-300]), SCORES, times=5))
    value = on_scale(raw, -3, 3)
    winner = None if not value else "a" if value < 0 else "b"
    row = {"context": [user(question(about))], "response1": a, "response2": b, "overall_preference": raw}
    return Line(row, decided(a, b, winner))


CHOICES = mostly(st.sampled_from([0, 1, "0", "1", 0.0, 1.0]), st.sampled_from(["a", " 1 ", "tie", 2]), SCORES)


def zero_or_one(raw: Any) -> Value:
    return number(raw, booleans=False) if not isinstance(raw, list | dict) else None


@of("openai_summarize")
def summarize_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    choice = draw(CHOICES)
    row = {
        "info": {"post": question(about), "title": "t", "subreddit": "s"},
        "summaries": [{"text": a}, {"text": b}],
        "choice": choice,
    }
    return Line(row, decided(a, b, {0: "a", 1: "b"}.get(zero_or_one(choice))))  # type: ignore[call-overload]


@of("shp")
def shp_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    label, scores = draw(CHOICES), (draw(SCORES), draw(SCORES))
    scores = scores if draw(st.booleans()) else (GONE, GONE)
    row = {"history": question(about), "human_ref_A": a, "human_ref_B": b, "labels": label}
    row |= {"score_A": scores[0], "score_B": scores[1]}
    winner = {1: "a", 0: "b"}.get(zero_or_one(label))  # type: ignore[call-overload]
    return Line(row, decided(a, b, winner, own_scores(scores, 1, (None, GONE))))


@of("nectar")
def nectar_line(draw: Draw, about: int, source: Row) -> Line:
    given = []
    for one in several(draw, about):
        rank = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 1.0, 2.0])) if draw(st.integers(0, 5)) else one.raw
        value = number(rank, booleans=False)
        given.append(one._replace(raw=rank, value=None if value is None else -value))
    listed = [{"answer": one.text, "rank": one.raw} for one in given]
    return Line({"prompt": f"\n\nHuman: {question(about)}\n\nAssistant: ", "answers": listed}, None, tuple(given))


@of("stackexchange_paired")
def paired_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    return Line({"question": question(about), "response_j": better, "response_k": worse}, ready(better, worse))


@of("stackexchange")
def stackexchange_line(draw: Draw, about: int, source: Row) -> Line:
    given = several(draw, about)
    listed = [{"text": one.text, "pm_score": one.raw} for one in given]
    return Line({"question": question(about), "answers": listed}, None, given)


@of("lmarena")
def lmarena_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    asked = [question(about), question(draw(st.sampled_from([about] * 6 + [9])))]
    talks = [[user(asked[0]), assistant(a)], [user(asked[1]), assistant(b)]]
    texts = [[asked[0], a], [asked[1], b]]
    if draw(st.booleans()):  # the same question about both
        later = two(draw, about)
        for talk, text, reply in zip(talks, texts, later, strict=True):
            talk += [user("And then?"), assistant(reply)]
            text += ["And then?", reply]
    ties = st.sampled_from(["tie", "tie (bothbad)", "both_bad", "Tie"])
    sides = st.sampled_from(["model_a", "model_b", " Model_A", "MODEL_B"])
    winner = draw(mostly(sides, ties, st.sampled_from(["a", 0, 1, True, None, GONE, NAN, "", "other", []])))
    named = {"model_a": "a", "model_b": "b"}.get(winner.strip().lower()) if isinstance(winner, str) else None
    row = {"conversation_a": talks[0], "conversation_b": talks[1], "winner": winner}
    if asked[0] != asked[1] or not all(isinstance(part, str) for text in texts for part in text):
        return Line(row)
    one, other = ("".join(text) for text in texts)
    return Line(row, decided(one, other, named, whole=True))


@of("alpaca_eval")
def alpaca_eval_line(draw: Draw, about: int, source: Row) -> Line:
    a, b = two(draw, about)
    usual = [1, 2, 1.0, 2.0, 1.5, 0, 1.2, 1.8, "1.49", "1.51", 1.4999999999999998, 1.5000000000000002, -0.0, 0.5, 2.1]
    raw = draw(mostly(st.sampled_from(usual), SCORES))
    value = on_scale(raw, 1, 2)
    winner = None if value is None or value == Fraction(3, 2) else "a" if value < Fraction(3, 2) else "b"
    row = {"instruction": question(about), "output_1": a, "output_2": b, "preference": raw}
    return Line(row, decided(a, b, winner))


@of("distilabel")
def distilabel_line(draw: Draw, about: int, source: Row) -> Line:
    given = several(draw, about)
    given = tuple(one._replace(text=None if one.text is GONE else one.text) for one in given)
    given = tuple(one._replace(raw=None if one.raw is GONE else one.raw) for one in given)
    lists = {"generations": [one.text for one in given], "ratings": [one.raw for one in given]}
    match draw(st.sampled_from(["instruction", "system", "messages"])):
        case "instruction":
            return Line({"instruction": question(about), **lists}, None, given)
        case "system":
            row = {"instruction": question(about), "system_prompt": "Be kind. ", **lists}
            return Line(row, None, tuple(one._replace(prompt="Be kind. " + question(about)) for one in given))
    return Line({"messages": [user(question(about))], **lists}, None, given)


@of("nemo_rl")
def nemo_rl_line(draw: Draw, about: int, source: Row) -> Line:
    num = draw(st.sampled_from([2] * 8 + [1, 3]))
    usual = st.sampled_from([0, 1, 2, "1", 0.0])
    ranks = [draw(mostly(usual, SCORES, times=4)) for _ in range(num)]
    texts = [draw(answers(about)) for _ in range(num)]
    listed = [{"rank": rank, "completion": [assistant(text)]} for rank, text in zip(ranks, texts, strict=True)]
    row = {"context": [user(question(about))], "completions": listed}
    values = [number(rank, booleans=False, most=None) for rank in ranks]
    if num != 2 or values[0] is None or values[1] is None or values[0] == values[1]:
        return Line(row)
    return Line(row, decided(texts[0], texts[1], "a" if values[0] < values[1] else "b"))


@of("ms_swift")
def ms_swift_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    chosen, rejected, verdict = conversations(about, better, worse)
    match draw(st.sampled_from(["response", "messages", "both"])):
        case "response":
            return Line({"messages": chosen, "rejected_response": worse}, verdict)
        case "messages":
            return Line({"messages": chosen, "rejected_messages": rejected}, verdict)
    return Line({"messages": chosen, "rejected_response": worse, "rejected_messages": None}, verdict)


@of("openai_preference")
def openai_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    outputs = {"preferred_output": [assistant(better)], "non_preferred_output": [assistant(worse)]}
    return Line({"input": {"messages": [user(question(about))]}, **outputs}, ready(better, worse))


@of("llamafactory_alpaca")
def alpaca_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    given: list[Row] = [{}, {}, {"system": "Be kind."}, {"history": [["One?", "Two."]]}, {"system": ""}]
    before = draw(st.sampled_from(given))
    return Line({"instruction": question(about), "chosen": better, "rejected": worse, **before}, ready(better, worse))


@of("llamafactory_sharegpt")
def sharegpt_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    sides = {"chosen": {"from": "gpt", "value": better}, "rejected": {"from": "gpt", "value": worse}}
    return Line({"conversations": [{"from": "human", "value": question(about)}], **sides}, ready(better, worse))


@of("llamafactory_messages")
def llamafactory_messages_line(draw: Draw, about: int, source: Row) -> Line:
    better, worse = two(draw, about)
    *_, verdict = conversations(about, better, worse)

    def turn(role: str, text: Any) -> Row:
        return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 1.0}

    sides = [[turn("user", question(about)), turn("assistant", text)] for text in (better, worse)]
    return Line({"chosen_messages": sides[0], "rejected_messages": sides[1]}, verdict)


# the judge


class Tables(NamedTuple):
    pairs: list[Row]
    dropped: list[Row]
    rejects: list[Row]
    counts: Mapping[str, int]


def built(file: File, folder: Path) -> Tables:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(present(line.row)) + "\n" for line in file.lines), encoding="utf-8")
    pipeline = {
        "dataset": str(folder / "dataset"),
        "sources": [{"path": str(path), **file.source}],
        "pairs": dict(file.pairs),
        "validate": {"max_reject_share": 1},
    }
    checked = Pipeline.model_validate(pipeline)
    if len(file.lines) % 8 != 5:
        made = make_tables(checked, resolve_kind(checked))
        return Tables(made.pairs.to_dicts(), made.dropped.to_dicts(), made.rejects.to_dicts(), made.counts._asdict())
    found = build_dataset(checked)  # in one file of many: what it writes costs as much as all that was before
    tables = (sorted((Path(found.dataset) / name).iterdir()) for name in ("pairs", "dropped", "rejects"))
    pairs, dropped, rejects = (
        pl.concat([pl.read_parquet(p, glob=False) for p in parts]).to_dicts() for parts in tables
    )
    return Tables(pairs, dropped, rejects, found.counts)


def judge(file: File) -> int:
    """Hold a build against what its rows say; the number of its pairs."""
    with tempfile.TemporaryDirectory() as folder:
        tables = built(file, Path(folder))
    check_sides(tables)
    if FORMATS[file.source["format"]].family == "candidates":
        check_candidates(file, tables)
    else:
        check_rows(file, tables)
    return len(tables.pairs)


def check_sides(tables: Tables) -> None:
    """Neither empty nor equal, and none of them is a pair the other way round."""
    seen = set()
    for pair in tables.pairs:
        for side in ("prompt", "chosen", "rejected"):
            assert said_by(pair[side], "user" if side == "prompt" else "assistant").strip(WHITE), pair
        assert pair["chosen"] != pair["rejected"]
        assert shape(pair["chosen"]) != shape(pair["rejected"])
        assert folded(plain(pair["chosen"])) != folded(plain(pair["rejected"]))
        assert pair["margin"] is None or pair["margin"] > 0
        key = [json.dumps(shape(pair[side])) for side in ("prompt", "chosen", "rejected")]
        assert (*key,) not in seen
        assert (key[0], key[2], key[1]) not in seen
        seen.add((*key,))


def check_rows(file: File, tables: Tables) -> None:
    """Every row is in one place, and a pair says what its row says."""
    places = [row["source_row"] for row in (*tables.pairs, *tables.dropped)]
    places += [row["line"] for row in tables.rejects]
    assert sorted(places) == [*range(1, len(file.lines) + 1)]
    counts = tables.counts
    assert counts["rows"] == len(file.lines) == counts["pairs"] + counts["dropped"] + counts["rejects"]
    heights = len(tables.pairs), len(tables.dropped), len(tables.rejects)
    assert (counts["pairs"], counts["dropped"], counts["rejects"]) == heights
    for pair in tables.pairs:
        line = file.lines[pair["source_row"] - 1]
        assert line.verdict is not None, line.row
        head = plain(pair["prompt"]) if line.verdict.whole else ""
        assert (head + plain(pair["chosen"]), head + plain(pair["rejected"])) == line.verdict[:2], line.row


Scores = dict[tuple[str | None, str | None], list[Fraction]]  # by scorer and rater


def accepted(file: File, tables: Tables) -> list[Opinion]:
    """The opinions that no reject names, all of which must be sound."""
    whole, places = set(), set()
    for reject in tables.rejects:
        place = re.search(r"\[(\d+)\]$", reject["field"] or "")
        if place:
            places.add((reject["line"], int(place[1])))
        else:
            whole.add(reject["line"])
    found = [
        one
        for at, line in enumerate(file.lines, start=1)
        if at not in whole
        for place, one in enumerate(line.opinions)
        if (at, place) not in places
    ]
    for one in found:
        assert one.value is not None, one
        assert isinstance(one.text, str), one
    return found


def check_candidates(file: File, tables: Tables) -> None:
    """Nothing is lost, and chosen is better than rejected by what the rows say of both."""
    opinions = accepted(file, tables)
    counts = tables.counts
    assert counts["candidates"] == len(opinions) + len(tables.rejects)
    assert counts["candidates"] == counts["used"] + counts["unused"] + counts["candidate_rejects"]
    assert counts["prompts"] == counts["prompts_with_pair"] + counts["prompts_dropped"]
    found = [plain(row["prompt"]) for row in (*tables.pairs, *tables.dropped)]
    assert set(found) == {one.prompt for one in opinions}
    assert counts["prompts"] == len(set(found))
    said: dict[str, dict[str, Scores]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for one in opinions:
        if one.text.strip(WHITE):
            said[one.prompt][one.text][one.scorer, one.rater].append(to_12_digits(one.value or Fraction(0)))
    quality = qualities(said, file.pairs.get("scorers", "rank"))
    check_selected(file, tables, said, quality)


Said = Mapping[str, Mapping[str, Scores]]
Qualities = Mapping[str, Mapping[str, Any]]


def to_12_digits(value: Fraction) -> Fraction:
    """As many as count of a score: what floats lose in a sum prefers nobody."""
    return Fraction(f"{float(value):.12g}")


def mean_to_12_digits(values: Sequence[Fraction]) -> Fraction:
    """12 digits of the mean; of the largest value where the others take most of it away."""
    middle, largest = mean(values), max(abs(value) for value in values)
    if abs(middle) >= largest / 2:
        return to_12_digits(middle)
    digit = Fraction(10) ** (math.floor(math.log10(largest)) - 11)
    return Fraction(round(middle / digit) * digit)


def mean(values: Iterable[Any]) -> Any:
    listed = [*values]
    return sum(listed) / len(listed)


def spread(values: Iterable[Any]) -> float:
    """The population standard deviation; 0 below 1e-9, where a judge tells nothing apart."""
    listed = [*values]
    middle = mean(listed)
    found = math.sqrt(mean([(value - middle) ** 2 for value in listed]))
    return found if found >= 1e-9 else 0.0


def z_scores(values: Mapping[Any, Any]) -> dict[Any, float]:
    """(value - mean) / standard deviation, to 12 decimals; nothing where all are the same."""
    if not values or not (deviation := spread(values.values())):
        return {}
    middle = mean(values.values())
    return {key: round(float(value - middle) / deviation, 12) for key, value in values.items()}


def ranks(values: Mapping[Any, Any]) -> dict[Any, Fraction]:
    """From 0, the worst, to 1; equal ones have the average; nothing where all are the same."""
    if not values or not spread(values.values()):
        return {}
    below = {key: sum(other < value for other in values.values()) for key, value in values.items()}
    equal = {key: sum(other == value for other in values.values()) for key, value in values.items()}
    return {key: (below[key] + Fraction(equal[key] - 1, 2)) / (len(values) - 1) for key in values}


def qualities(said: Said, scorers: str) -> Qualities:
    """What the responses of each prompt are worth, higher is better; only of those that a scorer tells apart."""
    means = {
        (prompt, text, *who): mean_to_12_digits(values)
        for prompt, texts in said.items()
        for text, scores in texts.items()
        for who, values in scores.items()
    }
    judges = {(scorer, rater) for _, _, scorer, rater in means}
    if any(rater is not None for _, rater in judges):
        told: dict[Any, Any] = {}
        for who in judges:
            told |= z_scores({key: value for key, value in means.items() if key[2:] == who})
        means = told
    by_scorer: dict[str | None, dict[tuple[str, str], Any]] = defaultdict(dict)
    for prompt, text, scorer in {key[:3] for key in means}:
        own = sorted(value for key, value in means.items() if key[:3] == (prompt, text, scorer))
        by_scorer[scorer][prompt, text] = mean(own)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    if len({scorer for scorer, _ in judges}) <= 1:
        for values in by_scorer.values():
            for (prompt, text), value in values.items():
                found[prompt][text] = value
        return found
    for prompt, texts in said.items():
        placed: dict[str, list[Any]] = defaultdict(list)
        for values in by_scorer.values():
            own_values = {text: values[prompt, text] for text in texts if (prompt, text) in values}
            for text, place in (ranks(own_values) if scorers == "rank" else z_scores(own_values)).items():
                placed[text].append(place)
        found[prompt] = {text: mean(sorted(values)) for text, values in placed.items()}
    return found


NEAR = 1e-9  # of z-scores, which are no fractions


def check_selected(file: File, tables: Tables, said: Said, quality: Qualities) -> None:
    """Each pair keeps the settings, and no prompt is left out that clearly has a pair."""
    rules: Row = {"chosen": "best", "rejected": "worst", "min_margin": 0, **file.pairs}
    sign = sign_of(file.source)
    judges = {who for texts in said.values() for scores in texts.values() for who in scores}
    exact = not any(rater for _, rater in judges) and (
        len({s for s, _ in judges}) <= 1 or rules.get("scorers") != "zscore"
    )
    slack = 0 if exact else NEAR
    per_prompt = Counter(plain(pair["prompt"]) for pair in tables.pairs)
    for pair in tables.pairs:
        prompt, chosen, rejected = (plain(pair[name]) for name in ("prompt", "chosen", "rejected"))
        high, low = quality[prompt][chosen], quality[prompt][rejected]
        assert high > low - slack, pair
        assert said[prompt][chosen] != said[prompt][rejected], pair
        margin = float(high - low)
        largest = float(
            max(abs(value) for scores in said[prompt].values() for values in scores.values() for value in values)
        )
        digit = 1e-8 if slack else 1e-9 + 1e-11 * largest
        assert pair["margin"] == pytest.approx(margin, rel=1e-9, abs=digit)
        loose = 1e-8 + 1e-9 * float(abs(high) + abs(low))
        assert margin >= rules["min_margin"] - loose
        assert margin <= rules.get("max_margin", INF) + loose
        cap = rules.get("length_cap", INF)
        assert abs(math.log(len(chosen) / len(rejected))) <= cap + 1e-9
        if "min_chosen_score" in rules:
            own = mean(value for values in said[prompt][chosen].values() for value in values)
            assert own >= sign * Fraction(rules["min_chosen_score"])
        if rules["chosen"] == "best":
            assert high >= max(quality[prompt].values()) - slack
        if len(judges) == 1 and pair["chosen_score"] is not None:
            assert sign * pair["chosen_score"] > sign * pair["rejected_score"]
        if rules.get("scorers_agree"):
            scorers = {scorer for scorer, _ in judges}
            if len(scorers) > 1 and not any(rater for _, rater in judges):
                for scorer in scorers:
                    both = [said[prompt][text].get((scorer, None)) for text in (chosen, rejected)]
                    assert None in both or mean(both[0] or ()) >= mean(both[1] or ())
    most = rules.get("max_pairs_per_prompt", INF)
    assert all(num <= most for num in per_prompt.values())
    check_extremes(rules, tables, quality, slack)


def check_extremes(rules: Row, tables: Tables, quality: Qualities, slack: float) -> None:
    """Where nothing but the two choices decides: the worst is the worst, all are all, and nobody is left out."""
    if set(rules) - {"chosen", "rejected", "min_margin", "scorers", "seed"} or rules["min_margin"] or slack:
        return
    everything = [*tables.pairs, *(row for row in tables.dropped if row["stage"] != "pairs")]  # before validation
    pairs: dict[str, set[tuple[Any, Any]]] = defaultdict(set)
    for row in everything:
        pairs[plain(row["prompt"])].add((plain(row["chosen"]), plain(row["rejected"])))
    for prompt, values in quality.items():
        worse = {(a, b) for a in values for b in values if values[a] > values[b]}
        assert pairs[prompt] <= worse
        assert bool(pairs[prompt]) == bool(worse)
        if not worse:
            continue
        top, bottom = max(values.values()), min(values.values())
        if rules["rejected"] == "worst":
            assert all(values[low] == bottom for _, low in pairs[prompt])
        if rules["chosen"] == "best":
            assert all(values[high] == top for high, _ in pairs[prompt])
            one = {high for high, _ in pairs[prompt]}
            assert len(one) <= 1
            if rules["rejected"] == "all":
                assert pairs[prompt] == {(high, low) for high, low in worse if high in one}
        elif rules["rejected"] == "all":
            assert pairs[prompt] == worse
        else:
            assert {high for high, _ in pairs[prompt]} == {high for high, _ in worse}


# the tests


@st.composite
def files(draw: Draw, form: str) -> File:
    source = {"format": form, **draw(SOURCES[form])}
    most = 2 if FORMATS[form].family == "candidates" and form != "helpsteer2" else 7  # prompts
    abouts = [draw(st.integers(0, most)) for _ in range(draw(st.integers(1, 16)))]
    return File(source, [WRITE[form](draw, about, source) for about in abouts])


def held(file: st.SearchStrategy[File], how_often: settings) -> int:
    """Judge as many files as the settings say; how many pairs were made of them."""
    seen = [0]

    @how_often
    @given(file)
    def every_file(one: File) -> None:
        seen[0] += judge(one)

    every_file()
    return seen[0]


def test_every_format_that_is_read_has_rows_that_try_to_turn_it_round() -> None:
    assert set(WRITE) == set(FORMATS)


@pytest.mark.parametrize("form", [*FORMATS])
def test_no_format_yields_equal_sides_an_empty_side_or_an_inverted_pair(form: str) -> None:
    assert held(files(form), HOSTILE) >= 10  # there was something to judge


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMATS])
def test_no_format_yields_them_however_long_it_is_tried(form: str) -> None:
    assert held(files(form), LONG) >= 100


def scored(*given: tuple[str, float]) -> list[Line]:
    made = [Opinion(question(0), text, score, number(score)) for text, score in given]
    return [Line({"prompt": one.prompt, "response": one.text, "score": one.raw}, None, (one,)) for one in made]


def talk(*answers: str) -> list[Row]:
    return [turn for answer in answers for turn in (user(question(0)), assistant(answer))]


NAMED = {"prompt": [user(question(0))], "chosen": [assistant("") | {"name": "x"}], "rejected": [assistant("a")]}
NOT_AT_RANDOM = {
    "the same score twice is that score": ("candidates", scored(("a", 1 + 1e-13), ("b", 1 + 4e-13), ("b", 1 + 4e-13))),
    "large scores differ late": ("candidates", scored(("a", 1234567890123456), *[("b", 1234567890123999)] * 2)),
    "a score that is a sum, and one twice": ("candidates", scored(("a", 0.3), ("a", 0.3), ("b", 0.1 + 0.2))),
    "one side says nothing between two questions": (
        "lmarena",
        [Line({"conversation_a": talk("", " "), "conversation_b": talk("a", "b"), "winner": "model_a"})],
    ),
    "a name is no answer": ("trl", [Line(NAMED)]),
}


@pytest.mark.parametrize("name", [*NOT_AT_RANDOM])
def test_what_random_rows_hardly_ever_meet_is_no_pair_the_wrong_way_round(name: str) -> None:
    form, lines = NOT_AT_RANDOM[name]
    judge(File({"format": form}, lines))


CHOSEN = ["best", "all_above"]
REJECTED = ["worst", "random", "sigma:1", "all"]


@st.composite
def selections(draw: Draw, chosen: str, rejected: str) -> File:
    """Long rows of few prompts, of one scorer, several, or several raters, under every setting of the selection."""
    source = {"format": "candidates", "direction": draw(DIRECTIONS)}
    sign = sign_of(source)
    judges: list[tuple[list[Any], list[Any]]] = [
        ([None], [None]),
        ([None], [None]),
        (["s", "t", "u"], [None]),
        (["s"], ["r", "q"]),
        (["s", "t"], ["r", None]),
    ]
    scorers, raters = draw(st.sampled_from(judges))
    lines = []
    for _ in range(draw(st.integers(4, 20))):
        about = draw(st.integers(0, 1))
        one = opinion(draw, about, sign)
        scorer, rater = draw(st.sampled_from(scorers)), draw(st.sampled_from(raters))
        row = {"prompt": one.prompt, "response": one.text, "score": one.raw, "scorer": scorer, "rater": rater}
        lines.append(Line(row, None, (one._replace(scorer=scorer, rater=rater),)))
    optional = {
        "min_margin": st.sampled_from([0.2, 1, 1.5]),
        "max_margin": st.sampled_from([1.5, 2, 3]),
        "length_cap": st.sampled_from([0.05, 0.7]),
        "max_pairs_per_prompt": st.sampled_from([1, 2, 4]),
        "scorers": st.sampled_from(["rank", "zscore"]),
        "scorers_agree": st.just(True),
        **({"min_chosen_score": st.sampled_from([0, 1.5, 3])} if scorers == [None] else {}),
    }
    for name, where in (("min_chosen_score", [None]), ("scorers_agree", ["s", "t", "u"])):
        optional |= {f"{name} {n}": optional[name] for n in range(6) if scorers == where}  # where it has an effect
    names = draw(st.lists(st.sampled_from([*optional]), max_size=3, unique=True))
    pairs = {"chosen": chosen, "rejected": rejected, **{name.split()[0]: draw(optional[name]) for name in names}}
    return File(source, lines, pairs)


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("rejected", REJECTED)
def test_no_selection_yields_equal_sides_an_empty_side_or_an_inverted_pair(chosen: str, rejected: str) -> None:
    assert held(selections(chosen, rejected), HOSTILE) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("rejected", REJECTED)
def test_no_selection_yields_them_however_long_it_is_tried(chosen: str, rejected: str) -> None:
    assert held(selections(chosen, rejected), LONG) >= 100
