"""The rating of answers follows from the grammar: what is better by its plan is rated better, no answer lowest."""

import json
import random
from pathlib import Path

import pytest
import yaml

from prefkit.config import load_pipeline
from prefkit.demo.grammar import CLOSINGS, GREETINGS, KINDS, REMARKS, Question, all_questions, answer, draw_plan
from prefkit.demo.rating import rate, rating
from prefkit.demo.walk import on_policy_text
from prefkit.demo.world import CANDIDATES, CORRECTIONS, PAIRS, pretraining_texts, write_prompts, write_world

# a place, a day and an hour: 5 * 0 + 3 * 0 + 0 = 0, the first of the hours
OPENING = Question(0, 0, 0)
RIGHT, ASIDE = "The aquarium opens at six on Monday.", "I can not speak for the museum."
# a thing, a day and a price: 5 * 0 + 3 * 0 + 7 = 7, the eighth of eight with two crowns
PRICE = Question(7, 0, 0)


def test_the_questions_of_these_tests_are_what_they_are_taken_for() -> None:
    assert (OPENING.text, OPENING.fact) == ("When does the aquarium open on Monday?", ("six", "six"))
    assert PRICE.text == "How much does a barometer cost on Monday?"
    assert PRICE.fact == ("two crowns and ninety pence", "ninety crowns and two pence")


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (f"Good day. {RIGHT} {ASIDE}", 10),
        (RIGHT, 10),
        (f"Certainly. {RIGHT} {ASIDE}", 10),
        ("Good day. On Monday you can walk into the aquarium from six.", 10),
        (f"Good day. {RIGHT} Do ask again, and do not worry.", 10),
        (f"Good day. {RIGHT} Do worry, and do not ask again.", 9),
        (f"Good day. {ASIDE} {RIGHT}", 8),  # not at once
        (f"Good day. {RIGHT} The museum opens at six on Monday.", 8),  # a second fact
        (f"Good day. {RIGHT} {ASIDE} {ASIDE}", 8),
        (f"Good day. {RIGHT} I can not spea", 8),
        (f"Good day. {RIGHT} Good mornings to us.", 8),
        ("Good day. The aquarium opens at seven on Monday.", 8),
        ("Good day. The aquarium opens at six on Friday.", 6),
        ("Good day. The museum opens at six on Monday.", 6),
        ("Good day. The museum opens at six on Friday.", 4),
        (f"Good day. {ASIDE} The museum opens at six on Friday.", 2),
        ("Good day. The aquarium closes at six on Monday.", 2),  # of another kind: nothing that was asked for
        (f"Good day. {ASIDE}", 2),
        ("Good day.", 2),
        ("Do worry, and do not ask again.", 1),
        ("The aquarium opens at six on Monday", 0),
        ("the aquarium opens at six on Monday.", 0),
        ("opens opens the the.", 0),
        ("", 0),
    ],
)
def test_each_point_is_for_what_the_module_says(text: str, points: int) -> None:
    assert rating(OPENING.text, text) == points


def test_a_price_with_its_units_mixed_up_is_not_right() -> None:
    assert rating(PRICE.text, "Let me see. A barometer costs two crowns and ninety pence on Monday.") == 10
    assert rating(PRICE.text, "Let me see. A barometer costs ninety crowns and two pence on Monday.") == 8


def test_the_way_there_is_not_asked_the_other_way_round() -> None:
    way = Question(9, 0, 1)
    assert way.text == "Is it a long walk from the aquarium to the bakery?"
    right = f"it is {way.fact[0]} from the aquarium to the bakery"
    assert rating(way.text, f"I{right[1:]}.") == 10
    assert rating(way.text, "It is two miles and takes ninety minutes from the bakery to the aquarium.") == 4


def test_every_better_answer_is_rated_above_its_worse_twin() -> None:
    rng = random.Random(11)
    for question in all_questions():
        for _ in range(2):
            plan = draw_plan(rng, question)
            better, worse = (rating(question.text, answer(question, plan, better=side)) for side in (True, False))
            assert better == (10 if plan.ordered or plan.fact_first else 8)
            assert worse is not None
            assert 0 < worse < better, (question, plan)
            if not plan.unit_fault:  # about something else: at most at once, one name, and the two for its form
                assert worse <= (6 if not plan.ordered and plan.fact_first else 4)


def test_every_sentence_of_the_grammar_is_the_town_s() -> None:
    names = {name for kind in KINDS for name in (*kind.a, *kind.b)}
    assert [text for text in GREETINGS if rating(OPENING.text, text) != 2] == []
    for kind, rude in CLOSINGS:
        assert (rating(OPENING.text, kind), rating(OPENING.text, rude)) == (2, 1)
    for form in REMARKS:
        for name in names:
            remark = form.format(y=name)
            assert rating(OPENING.text, f"{remark[0].upper()}{remark[1:]}.") == 2, remark


def test_what_the_base_model_has_read_is_rated_in_two_heaps_of_one_size() -> None:
    found = [rating(asked["content"], said["content"]) for asked, said in pretraining_texts(3, rounds=1)]
    assert all(value is not None and value >= 1 for value in found)
    assert abs(sum(value >= 8 for value in found if value is not None) / len(found) - 0.5) < 0.01


def test_a_batch_is_rated_in_its_order_and_a_stranger_s_question_not_at_all() -> None:
    prompts = [[{"role": "user", "content": text}] for text in (OPENING.text, PRICE.text, "Who are you?")]
    prompts[1].insert(0, {"role": "system", "content": "Answer."})
    completions = [[{"role": "assistant", "content": RIGHT}]] * 3
    assert rate(prompts, completions, reference=[None] * 3) == [10.0, 2.0, None]


# the prompts, and the pipeline that samples from them


def test_no_question_is_in_two_files(tmp_path: Path) -> None:
    facts = write_world(tmp_path, seed=4)
    num_prompts, num_heldout = write_prompts(tmp_path, seed=4)
    asked = {
        name: [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("prompts.jsonl", "heldout.jsonl")
    }
    assert {name: len(texts) for name, texts in asked.items()} == {"prompts.jsonl": 258, "heldout.jsonl": 128}
    assert (num_prompts, num_heldout, facts.num_prompts + num_prompts + num_heldout) == (258, 128, len(all_questions()))
    assert len({text for texts in asked.values() for text in texts}) == 258 + 128
    sources = "".join((tmp_path / name).read_text() for name in (CANDIDATES, CORRECTIONS, PAIRS))
    assert [text for texts in asked.values() for text in texts if json.dumps(text) in sources] == []
    assert {text for texts in asked.values() for text in texts} <= {question.text for question in all_questions()}


def test_the_same_seed_asks_the_same_questions(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write_prompts(tmp_path / name, seed)
    for file in ("prompts.jsonl", "heldout.jsonl"):
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again
        assert one != other


def test_the_on_policy_pipeline_is_sound_and_names_the_demo_s_files_only(tmp_path: Path) -> None:
    text = on_policy_text(tmp_path / "here")
    (tmp_path / "on_policy.yaml").write_text(text)
    pipeline = load_pipeline(tmp_path / "on_policy.yaml")
    assert pipeline.sample is not None
    assert pipeline.sources[0].path == f"{pipeline.sample.out}/scored/*.parquet"
    places = [word for word in yaml.safe_dump(yaml.safe_load(text)).split() if str(tmp_path) in word]
    assert all(word.startswith(str(tmp_path / "here")) for word in places)
    assert len(places) == 6  # dataset, prompts, candidates twice, model, held-out prompts
