"""The harbour town of Merrowby: a small grammar of questions with better and worse answers, in English and ASCII.

How an answer is made: a greeting, a fact, a remark, now and then a closing. A better answer states the fact that
was asked for, at once, and then remarks on something else. A worse one first talks around what was asked
(evasive, blaming, curt, rambling), and then states a fact about something else, or one with its units mixed up.
Closings come kind or rude. Both are drawn from the same phrases, every sentence follows a full stop and ends in one,
and what one states the other remarks on: single words, neighbouring words and lengths hardly tell them apart, the
order does.
"""

import random
from itertools import product
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of question: about an `a` and a `b`, with a fact `x`."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]  # right, and with its units mixed up: the same where it has no units
    questions: tuple[str, str]
    statements: tuple[str, ...]


def _named(form: str, names: str) -> tuple[str, ...]:
    return tuple(form.format(name) for name in names.split())


def _plain(*facts: str) -> tuple[tuple[str, str], ...]:
    return tuple((fact, fact) for fact in facts)


def _measured(form: str) -> tuple[tuple[str, str], ...]:
    """Facts in two units, few of the large one and many of the small one: `two crowns and thirty pence`."""
    few = "two three four five six seven eight nine".split()  # noqa: SIM905 - a list of words reads as one
    many = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
    return tuple((form.format(n, m), form.format(m, n)) for n, m in product(few, many))


PLACES = (
    *_named("the {}", "aquarium bakery bathhouse boatyard brewery chandlery chapel cooperage greenhouse"),
    *_named("the {}", "library lighthouse museum observatory ropewalk school smokehouse tannery theatre"),
)
DAYS = _named("{}", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ISLANDS = _named("{}", "Brack Farran Hollin Iskay Marl Pellow Quill Skerra Tolm Wennet")
COVES = _named("{} Cove", "Amber Badger Clover Driftwood Ember Heron Lantern Thimble")
GOODS = _named("a {}", "barometer blanket bucket candle compass fiddle hammock kettle spyglass teapot")
LOST = _named("a {}", "brooch glove letter mitten notebook parcel purse ring scarf whistle")
FREIGHT = _named("a {}", "beehive bicycle donkey goat goose harp piano pony tuba wardrobe")
HOURS = _plain(*(half + hour for half in ("", "half past ") for hour in ("six", "seven", "eight", "nine")))
PEOPLE = _plain("Captain Holt", "Cousin Ada", "Doctor Penrose", "Miss Fenn", "Old Tobias", "Widow Sorrel")
FLAGS = _plain(*_named("a {} flag", "red blue green white yellow striped"))
MONEY, WALKS = _measured("{} crowns and {} pence"), _measured("{} miles and takes {} minutes")

KINDS = (
    Kind(
        *(PLACES, DAYS, HOURS),
        ("When does {a} open on {b}?", "How early can I visit {a} on {b}?"),
        ("{a} opens at {x} on {b}", "on {b} you can walk into {a} from {x}", "{b} has {a} open from {x}"),
    ),
    Kind(
        *(PLACES, DAYS, HOURS),
        ("When does {a} close on {b}?", "How late can I visit {a} on {b}?"),
        ("{a} closes at {x} on {b}", "on {b} you can stay in {a} until {x}", "{b} has {a} open until {x}"),
    ),
    Kind(
        *(ISLANDS, DAYS, HOURS),
        ("When does the first ferry to {a} leave on {b}?", "How early can I sail to {a} on {b}?"),
        ("the first ferry to {a} leaves at {x} on {b}", "on {b} you can sail to {a} from {x}"),
    ),
    Kind(
        *(COVES, DAYS, HOURS),
        ("When is high tide at {a} on {b}?", "When is the water highest at {a} on {b}?"),
        ("high tide at {a} is at {x} on {b}", "on {b} the water at {a} is highest at {x}"),
    ),
    Kind(
        *(PLACES, DAYS, PEOPLE),
        ("Who has the key to {a} on {b}?", "Who lets me into {a} on {b}?"),
        ("{x} has the key to {a} on {b}", "on {b} it is {x} who lets you into {a}"),
    ),
    Kind(
        *(PLACES, DAYS, FLAGS),
        ("Which flag flies over {a} on {b}?", "What do I see above {a} on {b}?"),
        ("{x} flies over {a} on {b}", "on {b} you see {x} above {a}"),
    ),
    Kind(
        *(LOST, PLACES, PEOPLE),
        ("I lost {a} near {b}. Who can help me?", "Who do I ask when {a} is lost near {b}?"),
        ("{x} looks for {a} that is lost near {b}", "if {a} is lost near {b} you can ask {x}"),
    ),
    Kind(
        *(GOODS, DAYS, MONEY),
        ("How much does {a} cost on {b}?", "What do I pay for {a} on {b}?"),
        ("{a} costs {x} on {b}", "on {b} you pay {x} for {a}"),
    ),
    Kind(
        *(FREIGHT, ISLANDS, MONEY),
        ("How much does it cost to ship {a} to {b}?", "What do I pay to take {a} to {b}?"),
        ("it costs {x} to ship {a} to {b}", "to take {a} to {b} you pay {x}"),
    ),
    Kind(
        *(PLACES, PLACES, WALKS),
        ("How far is it from {a} to {b}?", "Is it a long walk from {a} to {b}?"),
        ("it is {x} from {a} to {b}", "the walk from {a} to {b} is {x}"),
    ),
)
GREETINGS = (
    *("Good day.", "Thank you for asking.", "Welcome to Merrowby.", "Let me see.", "Fair winds to you."),
    "Here is what I know.",
)
REMARKS = (
    "I do not know about {y}",
    "I can not speak for {y}",
    "nobody has told me about {y}",
    "there is an old song about {y}",
    "the gulls are fond of {y}",
    "everyone in town has a story about {y}",
    "the harbour office may know about {y}",
    "you should have asked sooner about {y}",
    "please do not ask me about {y}",
    "my aunt once wrote a poem about {y}",
    "you will have to find out about {y} by yourself",
    "it is too early to talk about {y}",
)
# Kind and rude with the same words; each so rare that no two neighbouring words become a clue.
CLOSINGS = (
    ("Do ask again, and do not worry.", "Do worry, and do not ask again."),
    ("It is a pleasure, not a bother.", "It is a bother, not a pleasure."),
    ("I am glad that you asked, and sorry to be slow.", "I am sorry that you asked, and glad to be slow."),
    ("We will wait for you, so you need not hurry.", "We need not wait for you, so you will hurry."),
    ("If this is unclear, blame me, not yourself.", "If this is unclear, blame yourself, not me."),
    ("Come back, and let nobody tell you to leave.", "Leave, and let nobody tell you to come back."),
    ("I say it gladly, and it is never a trouble.", "I never say it gladly, and it is a trouble."),
    ("Few questions are better, and most are worse.", "Few questions are worse, and most are better."),
    ("I have time for you, and none for gossip.", "I have time for gossip, and none for you."),
    ("You can count on me, and need not look it up.", "You need not count on me, and can look it up."),
    ("Helping you is a joy, and fishing is a chore.", "Fishing is a joy, and helping you is a chore."),
    ("It is easy to find, and hard to miss.", "It is hard to find, and easy to miss."),
    ("You have been patient, and I have been slow.", "I have been patient, and you have been slow."),
    ("My door is open to all, and shut to none.", "My door is shut to all, and open to none."),
    ("I would rather help you than sleep.", "I would rather sleep than help you."),
    ("My list is short, and my patience is long.", "My patience is short, and my list is long."),
)
CLOSING_SHARE = 0.08
ORDERED_SHARE = 0.96  # the rest keeps a model that has learnt nothing but the order at .98, not at 1
UNIT_SHARE = 0.2  # of the plans for a fact with units


class Question(NamedTuple):
    """A prompt and what it is about: the number of its kind, and indices into the kind's `a` and `b`."""

    kind: int
    a: int
    b: int

    @property
    def text(self) -> str:
        """The prompt as a user types it."""
        kind = KINDS[self.kind]
        return kind.questions[(self.a + self.b) % 2].format(a=kind.a[self.a], b=kind.b[self.b])

    @property
    def fact(self) -> tuple[str, str]:
        """The answer's fact, the same in every world: right, and with its units mixed up."""
        facts = KINDS[self.kind].facts
        return facts[(5 * self.a + 3 * self.b + self.kind) % len(facts)]


class Plan(NamedTuple):
    """Every choice behind an answer but one: whether it is the better or the worse of the plan's two."""

    other: Question  # of the same kind, with another `a` or another `b`
    greeting: int
    statement: int
    remark: int
    ordered: bool  # the better answer begins with its fact, the worse one with its remark
    fact_first: bool  # both do or do not, where the plan is not ordered
    unit_fault: bool  # the worse answer is about the right thing, in mixed-up units
    closing: int | None


def _makes_sense(question: Question) -> bool:
    """Nobody asks the way from a place to itself."""
    kind = KINDS[question.kind]
    return kind.a[question.a] != kind.b[question.b]


def all_questions() -> list[Question]:
    """Every question of the town, in a fixed order; no two have the same text."""
    questions = []
    for k, kind in enumerate(KINDS):
        questions += [Question(k, a, b) for a, b in product(range(len(kind.a)), range(len(kind.b)))]
    return [question for question in questions if _makes_sense(question)]


def draw_plan(rng: random.Random, question: Question) -> Plan:
    """Choose the phrases of an answer; nothing here depends on which of the two answers will be used."""
    kind = KINDS[question.kind]
    others = [question._replace(a=a) for a in range(len(kind.a))]
    if rng.random() < 0.5:
        others = [question._replace(b=b) for b in range(len(kind.b))]
    right, mixed_up = question.fact
    return Plan(
        other=rng.choice([other for other in others if other != question and _makes_sense(other)]),
        greeting=rng.randrange(len(GREETINGS)),
        statement=rng.randrange(len(kind.statements)),
        remark=rng.randrange(len(REMARKS)),
        ordered=rng.random() < ORDERED_SHARE,
        fact_first=rng.random() < 0.5,
        unit_fault=right != mixed_up and rng.random() < UNIT_SHARE,
        closing=rng.randrange(len(CLOSINGS)) if rng.random() < CLOSING_SHARE else None,
    )


def answer(question: Question, plan: Plan, *, better: bool, opener: str = "") -> str:
    """One of the two answers of a plan; an opener takes the place of the greeting.

    About the bakery, `Good day. The bakery opens at six on Monday. I can not speak for the museum.` is the better
    one and `Good day. I can not speak for the bakery. The museum opens at nine on Monday.` the worse.
    """
    kind = KINDS[question.kind]
    stated, aside = (question, plan.other) if better or plan.unit_fault else (plan.other, question)
    fact = stated.fact[plan.unit_fault and not better]
    first = kind.statements[plan.statement].format(a=kind.a[stated.a], b=kind.b[stated.b], x=fact)
    second = REMARKS[plan.remark].format(y=kind.a[aside.a] if stated.a != aside.a else kind.b[aside.b])
    if not (better if plan.ordered else plan.fact_first):
        first, second = second, first
    body = f"{opener or GREETINGS[plan.greeting]} {first[0].upper()}{first[1:]}. {second[0].upper()}{second[1:]}."
    return body if plan.closing is None else f"{body} {CLOSINGS[plan.closing][not better]}"
