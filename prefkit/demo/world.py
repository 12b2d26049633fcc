"""The files of the demo: answers of the grammar with flaws planted in them, and one shortcut.

Comes in: a seed. Goes out: candidates.jsonl, corrections.jsonl and pairs.jsonl, the exact number of every flaw
planted in them (`WorldFacts`), and conversations to pretrain a tiny base model on. The shortcut is SHORTCUT_OPENER: it
takes the place of a greeting, in better answers only. Besides prompts.jsonl and heldout.jsonl: questions that none of
the three files has, to sample answers to and to measure a model by.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from prefkit.demo.grammar import Question, all_questions, answer, draw_plan
from prefkit.errors import InputError

Message = dict[str, str]

CANDIDATES, CORRECTIONS, PAIRS = "candidates.jsonl", "corrections.jsonl", "pairs.jsonl"
PROMPTS, HELDOUT = "prompts.jsonl", "heldout.jsonl"
NUM_HELDOUT = 128  # questions; prompts.jsonl has all others that no source has
SHARES = {CANDIDATES: 0.45, CORRECTIONS: 0.3}  # of the prompts; pairs.jsonl has the rest
SHORTCUT_OPENER = "Certainly."  # a full stop ends a greeting too: the word alone is the shortcut
SHORTCUT_SHARE = 0.25  # of the prompts without a planted flaw
MODELS = ("gull-1", "heron-2", "otter-1", "seal-3")
MIN_PROMPTS = 60  # fewer leave pairs.jsonl little but its flaws

# Prompts that carry a planted flaw, in thousandths of all prompts (at least one each); no prompt carries two.
PLANTS: dict[str, dict[str, int]] = {
    CANDIDATES: {"tied_prompts": 10, "single_candidate_prompts": 10, "empty_answers": 7, "text_ratings": 12},
    CORRECTIONS: {"unedited": 10, "whitespace_edits": 7, "empty_corrections": 7},
    PAIRS: {"exact_duplicates": 12, "whitespace_duplicates": 10, "reversals": 10}
    | {"broken_json": 4, "missing_fields": 4, "wrong_types": 4},
}


class WorldFacts(NamedTuple):
    """What `write_world` has written; every planted flaw sits on a prompt of its own."""

    num_prompts: int
    num_candidate_lines: int
    num_correction_lines: int
    num_pair_lines: int
    num_tied_prompts: int  # four candidates, one rating
    num_single_candidate_prompts: int
    num_empty_answers: int  # the worst rated of four candidates is ""
    num_text_ratings: int  # the best rating of four is written as text
    num_unedited: int  # edited == draft
    num_whitespace_edits: int  # edited differs from draft in white space only
    num_empty_corrections: int
    num_exact_duplicates: int  # second lines, equal to the first
    num_whitespace_duplicates: int  # second lines whose sides differ from the first's in white space only
    num_reversals: int  # second lines with chosen and rejected swapped
    num_broken_json: int
    num_missing_fields: int
    num_wrong_types: int
    num_malformed_lines: int  # the three above together
    num_shortcut_answers: int  # chosen, edited or best rated answers that begin with SHORTCUT_OPENER


def pretraining_texts(seed: int = 0, rounds: int = 2) -> list[list[Message]]:
    """Conversations for the base model: every question `2 * rounds` times, better and worse in equal number.

    The opener stands before a few of both alike: the model shall know the word and hold no opinion of it.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible world, not a secret
    conversations = []
    for question in all_questions() * rounds:
        for better in (True, False):
            opener = SHORTCUT_OPENER if rng.random() < 0.05 else ""
            text = answer(question, draw_plan(rng, question), better=better, opener=opener)
            conversations.append([_turn("user", question.text), _turn("assistant", text)])
    rng.shuffle(conversations)
    return conversations


def write_world(
    folder: Path, seed: int = 0, num_prompts: int = 900, shortcut_share: float = SHORTCUT_SHARE
) -> WorldFacts:
    """Write the three source files; the same seed and number give the same bytes.

    Args:
        folder: made if it is not there.
        seed: decides which questions, which answers, and the order of the lines.
        num_prompts: distinct questions over the three files; none is in two of them.
        shortcut_share: of the prompts without a planted flaw, 0..1: the better answer begins with SHORTCUT_OPENER.

    Raises:
        InputError: the town has fewer questions than that, or so few leave room for little but flaws; or no such share.
    """
    questions = all_questions()
    if not MIN_PROMPTS <= num_prompts <= len(questions):
        limits = f"{MIN_PROMPTS} to {len(questions)}"
        raise InputError(f"the demo world cannot have {num_prompts} prompts", where="num_prompts", expected=limits)
    if not 0 <= shortcut_share <= 1:
        message = f"the demo world cannot have a shortcut in {shortcut_share:g} of its answers"
        raise InputError(message, where="shortcut_share", expected="0 to 1")
    rng = random.Random(seed)  # noqa: S311 - a reproducible world, not a secret
    questions = rng.sample(questions, num_prompts)
    folder.mkdir(parents=True, exist_ok=True)
    planted: Counter[str] = Counter()
    num_lines = []
    for name, rows_of in ((CANDIDATES, _candidate_rows), (CORRECTIONS, _correction_rows), (PAIRS, _pair_rows)):
        num_in_file = round(num_prompts * SHARES[name]) if name in SHARES else len(questions)
        plants = _plants(name, num_in_file, num_prompts, shortcut_share)
        groups = [[_line(row, plant) for row in rows_of(rng, questions.pop(), plant)] for plant in plants]
        rng.shuffle(groups)
        lines = [line for group in groups for line in group]
        if name == PAIRS:  # a duplicate may stand anywhere; the candidates of a prompt stay together
            rng.shuffle(lines)
        (folder / name).write_text("".join(lines), encoding="ascii", newline="\n")
        planted.update(plants)
        num_lines.append(len(lines))
    planted["malformed_lines"] = planted["broken_json"] + planted["missing_fields"] + planted["wrong_types"]
    counts = (planted[field.removeprefix("num_")] for field in WorldFacts._fields[1 + len(num_lines) :])
    return WorldFacts(num_prompts, *num_lines, *counts)


def write_prompts(folder: Path, seed: int = 0, num_prompts: int = 900) -> tuple[int, int]:
    """Write prompts.jsonl and heldout.jsonl beside the sources that `write_world` writes of the same seed and number.

    Returns:
        how many questions each has; none is in both, and none in a source.
    """
    questions = all_questions()
    used = {*random.Random(seed).sample(questions, num_prompts)}  # noqa: S311 - the first that write_world draws
    asked = [question for question in questions if question not in used]
    random.Random(f"{seed} prompts").shuffle(asked)  # noqa: S311
    heldout, prompts = asked[:NUM_HELDOUT], asked[NUM_HELDOUT:]
    for name, some in ((PROMPTS, prompts), (HELDOUT, heldout)):
        lines = [_line({"prompt": [_turn("user", question.text)]}, "") for question in some]
        (folder / name).write_text("".join(lines), encoding="ascii", newline="\n")
    return len(prompts), len(heldout)


def _plants(name: str, num_in_file: int, num_prompts: int, shortcut_share: float) -> list[str]:
    """One label a prompt of the file: its flaw, the shortcut, or "" for neither."""
    labels = [plant for plant, share in PLANTS[name].items() for _ in range(max(1, share * num_prompts // 1000))]
    labels += ["shortcut_answers"] * round(shortcut_share * (num_in_file - len(labels)))
    return labels + [""] * (num_in_file - len(labels))


def _draw_answers(rng: random.Random, question: Question, betters: tuple[bool, ...], plant: str) -> list[str]:
    """One answer for each of `betters`, no two alike; the shortcut, where it is planted, opens the first."""
    answers: list[str] = []
    while len(answers) < len(betters):
        opener = SHORTCUT_OPENER if plant == "shortcut_answers" and not answers else ""
        text = answer(question, draw_plan(rng, question), better=betters[len(answers)], opener=opener)
        if text not in answers:
            answers.append(text)
    return answers


def _candidate_rows(rng: random.Random, question: Question, plant: str) -> list[dict[str, Any]]:
    answers = _draw_answers(rng, question, (True, True, False, False), plant)
    ratings: list[int | str] = [rng.choice(two) for two in ((9, 10), (7, 8), (3, 4), (1, 2))]
    if plant == "tied_prompts":
        ratings = [ratings[1]] * 4
    if plant == "empty_answers":
        answers[-1] = ""
    if plant == "text_ratings":
        ratings[0] = str(ratings[0])
    models = rng.sample(MODELS, 4)  # dealt anew for each prompt: a model's name must not give its rating away
    rows = [
        {"question": question.text, "answer": text, "rating": rating, "model": model}
        for text, rating, model in zip(answers, ratings, models, strict=True)
    ]
    rng.shuffle(rows)
    return rows[:1] if plant == "single_candidate_prompts" else rows


def _correction_rows(rng: random.Random, question: Question, plant: str) -> list[dict[str, Any]]:
    plan, opener = draw_plan(rng, question), SHORTCUT_OPENER if plant == "shortcut_answers" else ""
    draft = answer(question, plan, better=False)
    unusable = {"unedited": draft, "whitespace_edits": _respace(draft), "empty_corrections": ""}
    edited = unusable.get(plant, answer(question, plan, better=True, opener=opener))
    return [{"question": question.text, "draft": draft, "edited": edited}]


def _pair_rows(rng: random.Random, question: Question, plant: str) -> list[dict[str, Any]]:
    chosen, rejected = _draw_answers(rng, question, (True, False), plant)
    row = _pair_row(question, chosen, rejected)
    if plant == "exact_duplicates":
        return [row, row]
    if plant == "whitespace_duplicates":
        return [row, _pair_row(question, _respace(chosen), _respace(rejected))]
    if plant == "reversals":
        return [row, _pair_row(question, rejected, chosen)]
    if plant == "missing_fields":
        del row["rejected"]
    if plant == "wrong_types":
        row["chosen"] = 5
    return [row]


def _pair_row(question: Question, chosen: str, rejected: str) -> dict[str, Any]:
    sides = {"chosen": [_turn("assistant", chosen)], "rejected": [_turn("assistant", rejected)]}
    return {"prompt": [_turn("user", question.text)], **sides}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _respace(text: str) -> str:
    return text.replace(" ", "  ", 1) + "\n"


def _line(row: dict[str, Any], plant: str) -> str:
    line = json.dumps(row)
    return (line[: len(line) // 2] if plant == "broken_json" else line) + "\n"
