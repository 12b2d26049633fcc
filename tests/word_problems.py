"""Word problems with four graded solutions each: what wrote pipelines/data/samples.jsonl, and its independent account.

Nothing is taken from anywhere: the sentences are made of the lists below, by a seed. A solution is worded without
regard to whether it is right, so that no word, length or form gives the better one away: what is left is the sum.
"""

import json
import random
from typing import Any, NamedTuple

SEED, NUM_PROBLEMS = 7, 270
NAMES = ["Maya", "Jonas", "Ilse", "Tariq", "Nina", "Oskar", "Leyla", "Piet", "Rosa", "Emil", "Hana", "Viktor", "Amara"]
THINGS = ["marbles", "stamps", "lemons", "postcards", "candles", "walnuts", "buttons", "tickets", "pears", "ribbons"]
PLACES = ["at the market", "in the attic", "at school", "on the ferry", "in the shed", "at the fair", "in the kitchen"]
DAYS = ["On Monday", "On Tuesday", "One morning", "After lunch", "In May", "Before the holidays", "Last winter"]
WORKINGS = [
    "First I write down what is given, then {sum}. So the answer is {end}.",
    "We have {sum}, which makes {end}.",
    "Step by step: {sum}. The answer is {end}.",
    "Let me work it out. {sum}, so it is {end}.",
    "Because {sum}, the result must be {end}.",
    "I get {end}, as {sum}.",
]
NOTHING = ["That is hard to say.", "The answer depends on more than the question tells."]


class Problem(NamedTuple):
    """A question, its two numbers, what is right to do with them, and what one may do in its place."""

    question: str
    one: int
    other: int
    right: str
    wrong: str


def problem(rng: random.Random) -> Problem:
    """Six kinds, so that each sign is as often right as it is wrong."""
    name, friend = rng.sample(NAMES, 2)
    thing, place, day = rng.choice(THINGS), rng.choice(PLACES), rng.choice(DAYS)
    one, other = rng.randint(21, 89), rng.randint(3, 19)
    kinds = [
        (
            f"{day} {name} finds {one} {thing} {place} and {friend} brings {other} more. How many {thing} is that?",
            "+*",
        ),
        (f"{day} {name} has {one} {thing} {place} and gives {other} of them to {friend}. How many are left?", "-*"),
        (f"{day} {friend} carries {one} boxes {place}, with {other} {thing} in each. How many {thing} is that?", "*-"),
        (f"{name} counts {one} {thing} {place}, {other} more than {friend}. How many does {friend} have?", "-2"),
        (f"{day} {one} {thing} lie {place}; {name} adds {other} and then another {other}. How many are there?", "2+"),
        (
            f"{name} packs {thing} {place}: {other} in a row, {one} rows in all. How many {thing} does {name} pack?",
            "*-",
        ),
    ]
    question, signs = rng.choice(kinds)
    return Problem(question, one, other, signs[0], signs[1])


def value(one: int, other: int, sign: str) -> int:
    """What a sign makes of two numbers; 2 adds the second one twice."""
    return {"+": one + other, "-": one - other, "*": one * other, "2": one + 2 * other}[sign]


def solution(rng: random.Random, asked: Problem, points: int) -> str:
    """10: right; 5: the right sum with a slip; 1: another sum; 0: no answer."""
    if points == 0:
        return rng.choice(NOTHING)
    sign = asked.wrong if points == 1 else asked.right
    end = value(asked.one, asked.other, sign) + (rng.choice([-10, -2, -1, 1, 2, 10]) if points == 5 else 0)
    how = f"{asked.one} + {asked.other} + {asked.other}" if sign == "2" else f"{asked.one} {sign} {asked.other}"
    return rng.choice(WORKINGS).format(sum=f"{how} = {end}", end=end)


def sample_lines() -> list[str]:
    """The lines of samples.jsonl, the flawed ones among them."""
    rng = random.Random(SEED)
    lines = []
    for number in range(NUM_PROBLEMS):
        asked = problem(rng)
        points = rng.choices([10, 5, 1, 0], weights=[45, 25, 20, 10], k=4)
        if number % 37 == 5:  # nothing to choose from: all are graded alike
            points = [rng.choice([10, 5])] * 4
        if number % 73 == 9:  # one sample only
            points = points[:1]
        if number == 60:
            points = [10, 5, 5, 1]
        samples = [solution(rng, asked, point) for point in points]
        if number % 55 == 20:  # the model stopped before its first word
            samples[rng.randrange(len(samples))] = ""
        row: dict[str, Any] = {"question": asked.question, "samples": samples, "points": points}
        if number == 60:  # a grade that the scale does not have
            row["points"] = [12, *points[1:]]
        if number == 130:  # a grade is missing
            row["points"] = points[:3]
        if number == 170:
            row["points"] = ["ten", *points[1:]]
        line = json.dumps(row, ensure_ascii=False)
        lines.append(line if number != 101 else line[: len(line) // 2])
    return lines
