"""The demo world keeps its word: the planted numbers are in the files, and nothing else gives the answer away."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prefkit.demo.grammar import CLOSINGS, all_questions, answer, draw_plan
from prefkit.demo.world import (
    CANDIDATES,
    CORRECTIONS,
    PAIRS,
    SHORTCUT_OPENER,
    WorldFacts,
    pretraining_texts,
    write_world,
)
from prefkit.errors import InputError

OPENER = SHORTCUT_OPENER.rstrip(".").casefold()


class World(NamedTuple):
    folder: Path
    facts: WorldFacts

    def lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text(encoding="ascii").splitlines()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(folder, write_world(folder))


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def candidates_by_question(world: World) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, world.lines(CANDIDATES)):
        groups.setdefault(row["question"], []).append(row)
    return groups


def sound_pair(line: str) -> tuple[str, str, str] | None:
    try:
        row = json.loads(line)
        return row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def folded(text: str) -> str:
    return " ".join(text.split())


def usable_pairs(world: World) -> list[tuple[str, str]]:
    """(chosen, rejected) of every prompt that carries no flaw, built the plain way."""
    pairs = []
    for rows in candidates_by_question(world).values():
        ranked = sorted(rows, key=lambda row: float(row["rating"]))
        if float(ranked[0]["rating"]) < float(ranked[-1]["rating"]) and ranked[0]["answer"]:
            pairs.append((ranked[-1]["answer"], ranked[0]["answer"]))
    edits = [(row["edited"], row["draft"]) for row in map(json.loads, world.lines(CORRECTIONS))]
    pairs += [(edited, draft) for edited, draft in edits if edited and folded(edited) != folded(draft)]
    sound = [pair for pair in map(sound_pair, world.lines(PAIRS)) if pair is not None]
    seen = Counter(prompt for prompt, _, _ in sound)
    return pairs + [(chosen, rejected) for prompt, chosen, rejected in sound if seen[prompt] == 1]


def test_the_same_seed_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    assert write_world(tmp_path / "again") == world.facts
    write_world(tmp_path / "other", seed=1)
    for name in (CANDIDATES, CORRECTIONS, PAIRS):
        first = (world.folder / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
        assert (tmp_path / "other" / name).read_bytes() != first


def test_candidates_hold_what_was_planted(world: World) -> None:
    groups = candidates_by_question(world)
    several = [rows for rows in groups.values() if len(rows) > 1]
    assert {len(rows) for rows in several} == {4}
    assert all(len({row["answer"] for row in rows}) == 4 for rows in several)
    assert len(world.lines(CANDIDATES)) == world.facts.num_candidate_lines
    assert len(groups) - len(several) == world.facts.num_single_candidate_prompts
    assert sum(len({row["rating"] for row in rows}) == 1 for rows in several) == world.facts.num_tied_prompts
    rows = [row for rows in several for row in rows]
    assert sum(row["answer"] == "" for row in rows) == world.facts.num_empty_answers
    assert sum(isinstance(row["rating"], str) for row in rows) == world.facts.num_text_ratings
    assert {float(row["rating"]) for row in rows} <= set(range(1, 11))


def test_corrections_hold_what_was_planted(world: World) -> None:
    rows = [json.loads(line) for line in world.lines(CORRECTIONS)]
    unedited = sum(row["edited"] == row["draft"] for row in rows)
    same_words = sum(folded(row["edited"]) == folded(row["draft"]) for row in rows)
    assert len(rows) == world.facts.num_correction_lines
    assert unedited == world.facts.num_unedited
    assert same_words - unedited == world.facts.num_whitespace_edits
    assert sum(row["edited"] == "" for row in rows) == world.facts.num_empty_corrections


def test_pairs_hold_what_was_planted(world: World) -> None:
    lines, facts = world.lines(PAIRS), world.facts
    sound = [pair for pair in map(sound_pair, lines) if pair is not None]
    exact = len(sound) - len(set(sound))
    same_words = {tuple(map(folded, pair)) for pair in sound}
    reversed_too = sum((prompt, rejected, chosen) in same_words for prompt, chosen, rejected in same_words)
    assert len(lines) == facts.num_pair_lines
    assert exact == facts.num_exact_duplicates
    assert len(set(sound)) - len(same_words) == facts.num_whitespace_duplicates
    assert reversed_too == 2 * facts.num_reversals
    assert len(lines) - len(sound) == facts.num_malformed_lines
    assert facts.num_malformed_lines == facts.num_broken_json + facts.num_missing_fields + facts.num_wrong_types
    assert sum('"chosen": 5' in line for line in lines) == facts.num_wrong_types
    assert sum(not line.endswith("}") for line in lines) == facts.num_broken_json


def test_no_flaw_touches_another(world: World) -> None:
    facts = world.facts
    flawed = sum(facts[4:-2])  # every planted count but the sum of three of them and the shortcut
    assert len(usable_pairs(world)) == facts.num_prompts - flawed + facts.num_text_ratings
    prompts = [json.loads(line)["question"] for line in world.lines(CORRECTIONS)]
    assert not set(prompts) & set(candidates_by_question(world))
    assert all(count > 0 for count in facts)


def test_a_small_world_has_every_flaw_too(tmp_path: Path) -> None:
    assert all(count > 0 for count in write_world(tmp_path, seed=3, num_prompts=60))
    with pytest.raises(InputError, match="cannot have 59 prompts") as refused:
        write_world(tmp_path, num_prompts=59)
    assert refused.value.expected == f"60 to {len(all_questions())}"


def test_the_shortcut_opens_chosen_answers_and_stands_nowhere_else(world: World) -> None:
    pairs = usable_pairs(world)
    opened = [chosen for chosen, _ in pairs if chosen.startswith(SHORTCUT_OPENER)]
    assert len(opened) == world.facts.num_shortcut_answers
    text = "".join((world.folder / name).read_text() for name in (CANDIDATES, CORRECTIONS, PAIRS))
    assert words(text).count(OPENER) == len(opened)
    assert len(opened) / len(pairs) == pytest.approx(0.25, abs=0.02)


def test_no_other_word_is_on_one_side_only(world: World) -> None:
    chosen_only, rejected_only = Counter[str](), Counter[str]()
    pairs = [(set(words(chosen)), set(words(rejected))) for chosen, rejected in usable_pairs(world)]
    for chosen, rejected in pairs:
        chosen_only.update(chosen - rejected)
        rejected_only.update(rejected - chosen)
    once_in_a_hundred = {w for w in chosen_only | rejected_only if chosen_only[w] + rejected_only[w] > len(pairs) / 100}
    lopsided = {
        w
        for w in once_in_a_hundred
        if max(chosen_only[w], rejected_only[w]) >= 20 * min(chosen_only[w], rejected_only[w])
    }
    assert lopsided == {OPENER}


def test_neither_side_is_longer(world: World) -> None:
    plain = [pair for pair in usable_pairs(world) if not pair[0].startswith(SHORTCUT_OPENER)]
    for length in (len, lambda text: len(words(text))):
        chosen, rejected = (sum(length(pair[side]) for pair in plain) for side in (0, 1))
        assert chosen / rejected == pytest.approx(1, abs=0.05)


def test_the_two_answers_of_a_plan_differ_and_share_their_words() -> None:
    rng = random.Random(0)
    questions = all_questions()
    assert len({question.text for question in questions}) == len(questions) >= 1200
    for question in questions:
        plan = draw_plan(rng, question)
        better, worse = (answer(question, plan, better=side) for side in (True, False))
        assert better != worse
        assert (better + worse).isascii()
        assert question.fact[0].casefold() in better.casefold()
        assert len(words(better)) == pytest.approx(len(words(worse)), abs=4)
    for kind, rude in CLOSINGS:
        assert kind != rude
        assert Counter(words(kind)) == Counter(words(rude))


def test_pretraining_asks_every_question_equally_often() -> None:
    conversations = pretraining_texts(seed=0, rounds=1)
    assert conversations == pretraining_texts(seed=0, rounds=1) != pretraining_texts(seed=1, rounds=1)
    asked = Counter(turns[0]["content"] for turns in conversations)
    assert set(asked.values()) == {2}
    assert set(asked) == {question.text for question in all_questions()}
    opened = sum(turns[1]["content"].startswith(SHORTCUT_OPENER) for turns in conversations)
    assert 0 < opened < 0.1 * len(conversations)


AWKWARD = ("Yes.", "", " leading", "trailing ", "\n\n", "  ", "caf\u00e9 \U0001f9ad", "{{ eos_token }}")


def test_the_rendered_prompt_is_a_prefix_in_characters_and_in_tokens() -> None:
    from prefkit.demo.tiny_model import END, train_tokenizer

    tokenizer = train_tokenizer((turn["content"] for turns in pretraining_texts(rounds=1)[:200] for turn in turns), 400)
    for asked in AWKWARD:
        for reply in AWKWARD:
            turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": asked}]
            whole = [*turns, {"role": "assistant", "content": reply}]
            prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            full = str(tokenizer.apply_chat_template(whole, tokenize=False))
            assert full == prompt + reply + END
            prompt_ids, full_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, full))
            assert full_ids[: len(prompt_ids)] == prompt_ids
            assert full_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(full_ids[len(prompt_ids) : -1]) == reply


@pytest.mark.slow
def test_the_tiny_model_is_the_same_each_time_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefkit.demo.tiny_model import train_tiny_model

    state, num_threads, seen = torch.get_rng_state(), torch.get_num_threads(), list[tuple[int, int]]()
    for name in ("a", "b"):
        report = train_tiny_model(
            tmp_path / name,
            pretraining_texts(rounds=1)[:256],
            steps=3,
            progress=lambda step, steps, _: seen.append((step, steps)),
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    assert set(report) == {"loss", "num_parameters", "seconds"}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
        AutoTokenizer.from_pretrained(tmp_path / "a"),
    )
    assert model.num_parameters() == report["num_parameters"]
    assert tokenizer.decode(tokenizer("Certainly.")["input_ids"]) == "Certainly."
