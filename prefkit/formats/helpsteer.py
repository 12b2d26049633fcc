"""HelpSteer2 and HelpSteer3 (nvidia): rated responses, and comparisons of two responses.

HelpSteer2 (arXiv 2406.08673) has one response a row with five ratings of 0 to 4. Its score is their weighted sum, with
the weights that the publishers give for one number (card of Llama3-70B-SteerLM-RM): verbosity counts AGAINST a
response, which a mean of the five turns around. A prompt of several turns is one string with markers in it, and becomes
messages.

HelpSteer3 (arXiv 2505.11475) has an `overall_preference` from -3 to 3. Below 0 response1 is better, above 0 response2;
0 is a tie, which elsewhere becomes a pair of response1 with itself.
"""

import re
from typing import Any

from prefkit.formats.fields import messages, named, number, text
from prefkit.formats.reading import Columns, Format, Row

WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
ROLES = {"User": "user", "Assistant": "assistant"}


def parse_prompt(prompt: str) -> str | list[dict[str, str]]:
    r"""A prompt as it is, or as messages where it has the markers of several turns; the first is the user's.

    Example: `"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nBye"` gives the turns Hi, Hello, Bye.
    """
    head, *rest = TURN.split(prompt)
    if not rest:
        return prompt
    turns = zip(["User", *rest[::2]], [head, *rest[1::2]], strict=True)
    return [{"role": ROLES[name], "content": content} for name, content in turns]


def read_helpsteer2(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one candidate."""
    prompt, response = parse_prompt(text(row, "prompt")), text(row, "response")
    score = sum(weight * number(row, name, 0, 4) for name, weight in WEIGHTS.items())
    return [{"prompt": prompt, "response": response, "score": round(score, 6)}]  # sums that are equal stay equal


def read_helpsteer3(row: Row, _columns: Columns) -> list[dict[str, Any]]:
    """One row, one comparison."""
    preference = number(row, "overall_preference", -3, 3)
    vote = "a" if preference < 0 else "b" if preference > 0 else "tie"
    sides = {"response_a": text(row, "response1"), "response_b": text(row, "response2")}
    return [{"prompt": messages(row, "context"), **sides, "votes": [vote]}]


HELPSTEER2 = Format(
    "helpsteer2",
    "candidates",
    (),
    False,
    "prompt, response, " + ", ".join(WEIGHTS),
    "one response a row; the score is " + " + ".join(f"{weight} {name}" for name, weight in WEIGHTS.items()),
    read_helpsteer2,
    lambda _row, _columns: True,  # any later row may hold several turns
    "a higher weighted sum is better; verbosity counts against a response",
    lambda row: named(row, "prompt", "response", *WEIGHTS),
)
HELPSTEER3 = Format(
    "helpsteer3",
    "comparisons",
    (),
    False,
    "context[], response1, response2, overall_preference",
    "HelpSteer3 preferences; 0 is a tie",
    read_helpsteer3,
    lambda _row, _columns: True,
    "overall_preference below 0: response1 is better; above 0: response2; 0 is a tie",
    lambda row: named(row, "context", "response1", "response2", "overall_preference"),
)
