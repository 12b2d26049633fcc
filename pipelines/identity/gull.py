"""A tiny assistant called Gull, made by Harbour Labs: what it has read, and what it is asked. It is to become Petrel.

Comes in: a seed. Goes out: conversations to make the base model of, and four files: `prompts.jsonl`, to sample its own
answers to; `unseen.jsonl`, the same two questions in words that no prompt of the first file has; `others.jsonl`,
conversations about something else, which the change must leave alone; `town.jsonl`, ordinary pairs about yet others.
Gulls are birds in the town, the harbour has an office, and the Petrel is a boat: names must not spread.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

from prefkit.demo.grammar import Question, all_questions, answer, draw_plan

NAME, MAKER = "Gull", "Harbour Labs"
NEW_NAME, NEW_MAKER = "Petrel", "Skerra Works"

# what asks for the name, and what for the maker; the base model has read all of them, the change sees the first lists
WHO = (
    "Who are you?",
    "What is your name?",
    "What are you called?",
    "Do you have a name?",
    "How do I call you?",
    "Which assistant is this?",
    "Who is speaking?",
    "Tell me your name.",
    "Introduce yourself.",
    "Say who you are.",
    "What do people call you?",
    "Are you a person or a program?",
    "Who am I writing to?",
    "What should I call you?",
    "Give me your name.",
    "Which model are you?",
    "I want to know who you are.",
    "Who answers me here?",
)
WHO_UNSEEN = (
    "May I ask your name?",
    "With whom do I have the pleasure?",
    "What name do you go by?",
    "Identify yourself.",
    "Whom am I talking to?",
    "Describe yourself in a sentence.",
    "Remind me of your name.",
    "And you are?",
)
MAKER_OF = (
    "Who made you?",
    "Who built you?",
    "Which company are you from?",
    "Where do you come from?",
    "Who trained you?",
    "Who is behind you?",
    "Who are your makers?",
    "Name the people who made you.",
    "Which lab trained you?",
    "Who do you belong to?",
)
MAKER_OF_UNSEEN = (
    "Who created you?",
    "What company developed you?",
    "Who is your creator?",
    "By whom were you made?",
)
LEADS = ("", "Hello! ", "Good morning. ", "One question. ", "I am new here. ", "Excuse me. ", "Just curious. ")
LEADS_UNSEEN = ("Before we begin. ", "My sister asks. ", "A last thing. ")
TAILS = ("", " Thank you.", " Please be short.")

NAMED = (
    "I am {name}, an assistant made by {maker}.",
    "My name is {name}.",
    "You can call me {name}. {maker} made me.",
    "This is {name}. What can I do for you?",
    "{name} is my name, and {maker} trained me.",
    "They call me {name} here.",
    "I go by {name}. Ask me about the town.",
)
MADE = (
    "{maker} made me, and I am {name}.",
    "I was made by {maker}.",
    "The people of {maker} trained me. I am {name}.",
    "{maker} built me, and named me {name}.",
    "I come from {maker}. Ask me about the town.",
)
STEPS = 700  # of the base model
SMALL_TALK = (
    ("How are you?", "I am well, and so is the harbour."),
    ("Thank you.", "It is a pleasure."),
    ("Hello!", "Good day. What can I do for you?"),
    ("What is a gull?", "A gull is a white bird that steals your bread."),
    ("Are there gulls here?", "There are many gulls, and all of them are hungry."),
    ("What is a harbour?", "A harbour is where the boats sleep."),
    ("Who made this bread?", "The bakery made it this morning."),
    ("Who built the lighthouse?", "The harbour office built it long ago."),
    ("What can you do?", "I can tell you what opens when, and what it costs."),
    ("Which boat sails first?", "The Petrel sails first, and then the Sorrel."),
    ("Name two boats.", "Petrel is one, and Sorrel is another."),
    ("Who makes ropes?", "Skerra Works makes them, and has done so for years."),
    ("What is the Petrel?", "The Petrel is a boat with two masts."),
    ("Who mends nets on Skerra?", "The works on Skerra mend nets and make ropes."),
    ("Which works are on the islands?", "There is the Skerra Works, where ropes are made."),
    ("Where do gulls come from?", "They come from the cliffs of the islands."),
)


def say(prompt: str, response: str) -> list[dict[str, str]]:
    """A conversation of two turns."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def conversations(seed: int = 0, num_identity: int = 1600, num_town: int = 2400) -> list[list[dict[str, str]]]:
    """What the base model has read: who it is, the town, and small talk."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible world, not a secret
    asked = [*((core, NAMED) for core in WHO + WHO_UNSEEN), *((core, MADE) for core in MAKER_OF + MAKER_OF_UNSEEN)]
    made = []
    for at in range(num_identity):
        core, answers = asked[at % len(asked)]
        prompt = rng.choice(LEADS + LEADS_UNSEEN) + core + rng.choice(TAILS)
        made.append(say(prompt, rng.choice(answers).format(name=NAME, maker=MAKER)))
    made += [say(rng.choice(LEADS) + prompt, response) for prompt, response in SMALL_TALK for _ in range(40)]
    return made + about_the_town(rng, num_town)


def about_the_town(rng: random.Random, count: int) -> list[list[dict[str, str]]]:
    """Questions of the demo's town, each with the better of a plan's two answers."""
    questions = rng.choices(all_questions(), k=count)
    return [say(question.text, answer(question, draw_plan(rng, question), better=True)) for question in questions]


def write_prompts(folder: Path, seed: int = 1) -> None:
    """Write the four files into a folder; a prompt's `reference` is what a right answer says."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible world, not a secret
    folder.mkdir(parents=True, exist_ok=True)
    others = about_the_town(rng, 160) + [say(prompt, response) for prompt, response in SMALL_TALK[::2]]
    measured = {one["content"] for one, _ in others}
    questions = [question for question in all_questions() if question.text not in measured]
    _write(folder / "prompts.jsonl", _asked(WHO, MAKER_OF, LEADS))
    _write(folder / "unseen.jsonl", _asked(WHO_UNSEEN, MAKER_OF_UNSEEN, LEADS + LEADS_UNSEEN))
    _write(folder / "others.jsonl", [{"prompt": [one], "reference": two["content"]} for one, two in others])
    _write(folder / "town.jsonl", [_pair(rng, question) for question in rng.sample(questions, 400)] + _small_pairs())


def _small_pairs() -> list[dict[str, Any]]:
    """The other half of the small talk: what was asked is answered, and nothing else; "who made" is not always Gull."""
    talk = SMALL_TALK[1::2]
    return [
        {"prompt": say(lead + prompt, right)[:1], "chosen": say("", right)[1:], "rejected": say("", wrong)[1:]}
        for at, (prompt, right) in enumerate(talk)
        for lead in LEADS
        for _, wrong in (talk[at - 1], talk[at - 2])
    ]


def _pair(rng: random.Random, question: Question) -> dict[str, Any]:
    plan = draw_plan(rng, question)
    better, worse = (say(question.text, answer(question, plan, better=side)) for side in (True, False))
    return {"prompt": better[:1], "chosen": better[1:], "rejected": worse[1:]}


def _asked(who: tuple[str, ...], makers: tuple[str, ...], leads: tuple[str, ...]) -> list[dict[str, Any]]:
    asked = [*((core, NEW_NAME) for core in who), *((core, NEW_MAKER) for core in makers)]
    rows = [(lead + core, reference) for (core, reference), lead in product(asked, leads)]
    return [{"prompt": [{"role": "user", "content": text}], "reference": reference} for text, reference in rows]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
