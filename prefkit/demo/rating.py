"""How good an answer of the demo's town is, by its grammar: a reward function in TRL's signature.

Comes in: prompts and completions. Goes out: a rating each, in whole points from 0 to 10:

    2   a fact of the kind that was asked for is stated at once: nothing stands before it but a greeting
    2   it is about the first of what the question names: the bakery
    2   it is about the second: Monday
    2   it is about both, and right: neither another value, nor one with its units mixed up
    1   all sentences are the town's, none is there twice, and one fact is stated at most
    1   so they are, and none of them is rude

The points are that fine because a model of 0.4 million weights hardly ever states the right fact: it can learn to come
to the point, to stay in the language of the town, and a little about what it was asked. No answer gets 0, and so does
one in which no sentence is the town's.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from prefkit.demo.grammar import CLOSINGS, GREETINGS, KINDS, REMARKS, Kind, Question, all_questions
from prefkit.demo.world import SHORTCUT_OPENER, Message

AT_ONCE, FIRST_NAME, SECOND_NAME, RIGHT, SOUND, NOT_RUDE = 2, 2, 2, 2, 1, 1
OPENERS = {*GREETINGS, SHORTCUT_OPENER}
KIND_CLOSINGS, RUDE_CLOSINGS = ({pair[rude] for pair in CLOSINGS} for rude in (False, True))


def rate(
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[Sequence[Message]],
    **columns: Any,  # noqa: ARG001 - whoever calls a reward function gives it all columns of the rows
) -> list[float | None]:
    """Rate answers to questions of the town; further columns are not looked at.

    Args:
        prompts: lists of messages; the last is a question of the town.
        completions: lists of one message each, the answer.
        columns: of the rows, which a rating does not need.

    Returns:
        a rating each, 0 to 10; None where the question is not one of the town.

    Example:
        rate([[{"role": "user", "content": question}]], [[{"role": "assistant", "content": answer}]])
    """
    return [rating(asked[-1]["content"], said[0]["content"]) for asked, said in zip(prompts, completions, strict=True)]


def rating(question: str, answer: str) -> float | None:
    """The rating of one answer, as the points of the module say; None where the question is not one of the town.

    Asked about the bakery, `Good day. The bakery opens at six on Monday. I can not speak for the museum.` gets 10 where
    that is right, and `Good day. I can not speak for the bakery. The museum opens at nine on Monday.` 4.
    """
    asked = _questions().get(question)
    if asked is None:
        return None
    sentences = re.split(r"(?<=\.) ", answer)
    points = _of_the_fact(sentences, asked)
    num_facts = sum(map(_states_a_fact, sentences))
    if all(map(_is_the_towns, sentences)) and num_facts < 2 and len({*sentences}) == len(sentences):
        points += SOUND + NOT_RUDE * (not RUDE_CLOSINGS & {*sentences})
    return float(points)


def _of_the_fact(sentences: Sequence[str], asked: Question) -> int:
    """The points of the first sentence that states a fact of the kind that was asked for; 0 where none does."""
    kind = KINDS[asked.kind]
    patterns = _statements(kind)
    found = ((at, match) for at, text in enumerate(sentences) for form in patterns if (match := _like(form, text)))
    at, match = next(found, (0, None))
    if match is None:
        return 0
    a, b, x = (match[name].lower() == text.lower() for name, text in zip("abx", _names(asked), strict=True))
    at_once = {*sentences[:at]} <= OPENERS
    return AT_ONCE * at_once + FIRST_NAME * a + SECOND_NAME * b + RIGHT * (a and b and x)


def _names(question: Question) -> tuple[str, str, str]:
    """What it is about, and the right fact."""
    kind = KINDS[question.kind]
    return kind.a[question.a], kind.b[question.b], question.fact[0]


def _is_the_towns(sentence: str) -> bool:
    whole = sentence in OPENERS | KIND_CLOSINGS | RUDE_CLOSINGS
    return whole or _states_a_fact(sentence) or any(_like(form, sentence) for form in _remarks())


def _states_a_fact(sentence: str) -> bool:
    """Whether it is a fact about anything, right or wrong."""
    return any(_like(form, sentence) for kind in KINDS for form in _statements(kind))


def _like(form: re.Pattern[str], sentence: str) -> re.Match[str] | None:
    return form.fullmatch(sentence) if sentence[:1].isupper() else None


@lru_cache(maxsize=1)
def _questions() -> dict[str, Question]:
    return {question.text: question for question in all_questions()}


@lru_cache(maxsize=len(KINDS))
def _statements(kind: Kind) -> list[re.Pattern[str]]:
    """A pattern a way to state a fact of this kind, with the groups a, b and x."""
    facts = [fact for both in kind.facts for fact in both]
    return [_pattern(form, a=kind.a, b=kind.b, x=facts) for form in kind.statements]


@lru_cache(maxsize=1)
def _remarks() -> list[re.Pattern[str]]:
    names = [name for kind in KINDS for name in (*kind.a, *kind.b)]
    return [_pattern(form, y=names) for form in REMARKS]


def _pattern(form: str, **names: Sequence[str]) -> re.Pattern[str]:
    """Case is not looked at: a name begins the sentence or does not."""
    groups = {field: f"(?P<{field}>{'|'.join(dict.fromkeys(texts))})" for field, texts in names.items()}
    return re.compile(f"{form.format(**groups)}\\.", re.IGNORECASE)
