"""A repair drops or edits what it says and nothing else, writes why, and leaves data that gives less away."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import sparse

from prefkit.accounts import Counts
from prefkit.audit.evidence import in_memory
from prefkit.audit.probe import cross_fit, shallow
from prefkit.audit.repair import (
    cut_opener,
    fold_opener,
    has_gram,
    length_surplus,
    strip_opener,
    surplus,
    token_signs,
)
from prefkit.audit.shortcuts import Seen, find_shortcuts, fit_probes, see_pairs
from prefkit.audit.verdict import Finding
from prefkit.audits import audit_dataset
from prefkit.before_after import audit_rows, print_repaired
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline
from prefkit.demo.world import SHORTCUT_OPENER, pretraining_texts, write_world
from prefkit.errors import CheckError, ConfigError, DatasetError, InputError
from prefkit.format import AUDIT_PROBE, AUDIT_SCORES, MESSAGES
from prefkit.grams import words_in
from prefkit.mending import Step, Wanted, mend_pairs
from prefkit.query import connect_dataset
from prefkit.repairs import Repaired, repair_dataset
from prefkit.store import read_manifest, write_json
from prefkit.target import pipeline_of as target_pipeline
from prefkit.text import pair_id

WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]
quickly = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def table(folder: Path | str, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{folder}/{name}/*.parquet")


def contents(folder: Path, without: str = "") -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if not without or not name.startswith(without)}


def made_step(repair: str, setting: Any, dropped: int, edited: int = 0, dropped_later: int = 0) -> Step:
    numbers = {"dropped": dropped, "edited": edited, "dropped_later": dropped_later}
    return {"repair": repair, "setting": setting, **numbers}


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


WORDS = [letter * 2 for letter in "abcdefghijklmnopqrstuvwxyz"]


# openers


@pytest.mark.parametrize(
    ("text", "opener", "left"),
    [
        ("Certainly! here it is", "Certainly!", "Here it is"),
        ("certainly! here it is", "Certainly!", "here it is"),
        ("CERTAINLY!  \n here it is", "certainly!", "Here it is"),
        ("Certainly, here it is", "Certainly", "Here it is"),
        ("Certainly... here", "Certainly", "Here"),
        ("Certainly \u2014 here", "Certainly", "Here"),
        ("Certainly - here", "Certainly", "Here"),
        ("Certainly\n\n- one\n- two", "Certainly", "- one\n- two"),
        ("Certainly here", "Certainly", "Here"),
        ("  Certainly! yes", "Certainly!", "  Yes"),
        ("\n\nSure!\n\nyes", "sure!", "\n\nYes"),
        ("Of  course! yes", "Of course!", "Yes"),
        ("Certainly! Certainly! yes", "Certainly!", "Yes"),
        ("Certainly! 3 is it", "Certainly!", "3 is it"),
        ("Certainly! **bold** it is", "Certainly!", "**bold** it is"),
        ("Certainly!", "Certainly!", ""),
        ("Cafe\u0301! oui", "Caf\u00e9!", "Oui"),
        ("GRUESSE, ja", "Gruesse", "Ja"),
        ("Gr\u00fc\u00dfe, ja", "gr\u00fcsse", "Ja"),
        ("\u597d\u7684\uff0c\u8fd9\u662f", "\u597d\u7684\uff0c", "\u8fd9\u662f"),
    ],
)
def test_an_opener_is_cut_off_with_the_white_space_behind_it(text: str, opener: str, left: str) -> None:
    assert cut_opener(text, fold_opener(opener)) == left


@pytest.mark.parametrize(
    ("text", "opener"),
    [
        ("Certainly's end", "Certainly"),
        ("Certainlyness", "Certainly"),
        ("Well-known facts", "Well"),
        ("3.5 is more", "3"),
        ("and/or this", "and"),
        ("I am certainly here", "certainly"),
        ("Certain", "Certainly"),
        ("Cafe\u0301", "Cafe"),
        ("", "Certainly"),
        ("Certainly, yes", "Certainly!"),
    ],
)
def test_no_part_of_a_word_and_nothing_inside_a_text_is_an_opener(text: str, opener: str) -> None:
    assert cut_opener(text, fold_opener(opener)) is None


words = st.sampled_from(
    ["sure", "Sure", "SURE", "yes", "here", "it", "\u00c9t\u00e9", "e\u0301te\u0301", "!", ",", "."]
)


@quickly
@given(st.lists(words, min_size=1, max_size=2), st.lists(words, max_size=5))
def test_what_is_left_is_the_end_of_the_text_and_begins_with_no_opener(opener: list[str], rest: list[str]) -> None:
    wanted, text = fold_opener(" ".join(opener)), " ".join([*opener, *rest])
    left = cut_opener(text, wanted)
    assert left is not None
    assert cut_opener(left, wanted) is None
    assert text.casefold().endswith(left.casefold())
    assert cut_opener("so " + text, wanted) is None


def test_both_sides_are_cut_alike_and_what_was_cut_is_told() -> None:
    pairs = pl.DataFrame(
        {
            "chosen": ["Sure! one", "two", "Sure! three", "sure!"],
            "rejected": ["four", "sure! five", "Sure!  six", "seven"],
        }
    )
    stripped = strip_opener(pairs, "text", "SURE!")
    assert stripped.pairs["chosen"].to_list() == ["One", "two", "Three", ""]
    assert stripped.pairs["rejected"].to_list() == ["four", "five", "Six", "seven"]
    assert stripped.edited.tolist() == [True, True, True, True]
    assert stripped.emptied.to_list() == [None, None, None, "empty_chosen"]
    assert stripped.cut["chosen"].to_list() == ["Sure!", None, "Sure!", "sure!"]
    assert stripped.cut["rejected"].to_list() == [None, "sure!", "Sure!", None]


def test_every_assistant_message_of_a_side_is_a_reply_and_no_other_message_is() -> None:
    call = json.dumps({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]})
    side = [
        turn("assistant", "Sure! which?", extra=None),
        turn("user", "Sure! that", extra=None),
        turn("assistant", "Sure!", extra=call),
        turn("tool", "Sure! 5", extra=None),
        turn("assistant", "Sure! five", extra=None),
    ]
    other = [turn("assistant", None, extra=call), turn("tool", "5", extra=None), turn("assistant", "six", extra=None)]
    pairs = pl.DataFrame({"chosen": [side], "rejected": [other]}, schema={"chosen": MESSAGES, "rejected": MESSAGES})
    stripped = strip_opener(pairs, "chat", "sure!")
    found = [message["content"] for message in stripped.pairs["chosen"][0].to_list()]
    assert found == ["Which?", "Sure! that", "", "Sure! 5", "Five"]
    assert stripped.pairs["rejected"].to_list() == pairs["rejected"].to_list()
    assert stripped.emptied.to_list() == [None]  # the message that says nothing now still calls a tool
    assert stripped.cut["chosen"].to_list() == ["Sure! Sure! Sure!"]


# tokens and lengths


def naive_has(text: str, gram: Sequence[str]) -> bool:
    found = words_in(text)
    return any(found[i : i + len(gram)] == list(gram) for i in range(len(found)))


@quickly
@given(st.text("ab'!\u00e9\u0301 .\n", max_size=12), st.text("ab'!\u00e9 .", min_size=1, max_size=4))
def test_a_text_has_a_token_where_its_words_are_in_a_row(text: str, token: str) -> None:
    gram = words_in(token)
    if gram:
        assert has_gram(pl.Series([text]), gram).tolist() == [naive_has(text, gram)]


def test_a_token_counts_where_one_side_alone_has_it() -> None:
    texts = pl.DataFrame(
        {
            "chosen": ["Certainly! yes", "no", "certainly ! a", "certainly", "uncertainly!"],
            "rejected": ["no", "well, CERTAINLY!", "CERTAINLY!", "certainly.", "-"],
        }
    )
    assert token_signs(texts, "certainly!").tolist() == [1, -1, 0, 0, 0]
    assert token_signs(texts, "certainly").tolist() == [1, -1, 0, 0, 0]


def test_of_the_more_frequent_sign_the_highest_scores_go_and_ties_by_pair_id() -> None:
    signs = np.array([1, 1, 1, -1, 0, 1], dtype=np.int8)
    ids = pl.Series(["f", "e", "d", "c", "b", "a"])
    # four against one: three go; score 9 first, then of the three with 2 the smallest ids, a and d
    assert surplus(signs, np.array([2.0, 9.0, 2.0, 99.0, 99.0, 2.0]), ids).tolist() == [1, 2, 5]
    assert surplus(-signs, np.array([2.0, 9.0, 2.0, 99.0, 99.0, 2.0]), ids).tolist() == [1, 2, 5]
    assert surplus(np.array([1, 1, 0], dtype=np.int8), np.zeros(3), ids[:3]).tolist() == [0, 1]
    assert surplus(np.array([1, -1], dtype=np.int8), np.zeros(2), ids[:2]).tolist() == []
    # a pair without a score goes last
    assert surplus(np.array([1, 1, -1], dtype=np.int8), np.array([np.nan, -5.0, 0.0]), ids[:3]).tolist() == [1]


@quickly
@given(st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(-3, 3)), max_size=12))
def test_balanced_signs_are_equal_in_number_and_no_pair_of_the_rarer_one_goes(rows: list[tuple[int, int]]) -> None:
    signs = np.array([sign for sign, _ in rows], dtype=np.int8)
    scores = np.array([score for _, score in rows], dtype=np.float64)
    gone = surplus(signs, scores, pl.Series([f"{n:02d}" for n in range(len(rows))], dtype=pl.String))
    left = np.setdiff1d(np.arange(len(rows)), gone)
    assert (signs[left] == 1).sum() == (signs[left] == -1).sum() == min((signs == 1).sum(), (signs == -1).sum())
    side = signs[gone][0] if len(gone) else 0
    still = scores[left][signs[left] == side]
    assert not len(gone) or not len(still) or scores[gone].min() >= still.max()


def test_lengths_are_matched_within_bins_of_the_difference() -> None:
    # bins end at .05, .1, .2, ...: .01 and -.02 in the first, .06 alone in the second, .5 and .55 against -.59
    difference = np.array([0.01, -0.02, 0.06, 0.0, 0.5, 0.55, -0.59, -0.7])
    scores = np.array([0, 0, 0, 0, 1.0, 2.0, 0, 0])
    ids = pl.Series([f"p{n}" for n in range(8)])
    assert length_surplus(difference, scores, ids).tolist() == [2, 5, 7]


# shortcuts


def planted(num_pairs: int, num_planted: int, seed: int = 0) -> Seen:
    """Pairs of noise; the first ones have a word in chosen only."""
    rng = np.random.default_rng(seed)
    signs = np.zeros((num_pairs, 21), dtype=np.int8)
    signs[:num_planted, 0] = 1
    signs[:, 1:] = rng.integers(-1, 2, size=(num_pairs, 20))
    noise = rng.normal(size=num_pairs)
    return Seen(noise, noise[:, None].copy(), sparse.csr_array(signs.astype(np.float64)), np.arange(num_pairs))


def test_pairs_go_that_have_the_shortcut_until_no_probe_is_above_the_target() -> None:
    seen, ids = planted(1000, 600), pl.Series([f"{n:04d}" for n in range(1000)])
    everything = fit_probes(seen, np.arange(1000), 1.0, seed=0, max_fit=50_000)
    assert everything.accuracy == pytest.approx(0.8, abs=0.04)  # 600 known, and chance for 400
    found = find_shortcuts(seen, ids, 0.6, 900, seed=0, max_fit=50_000)
    assert found.accuracy <= 0.6
    # (.8 - k/1000) / (1 - k/1000) = .6 where k = 500 of the 600 are gone; fits that see noise know less
    assert 350 <= len(found.rows) <= 510
    assert np.mean(found.rows < 600) > 0.97
    left = np.setdiff1d(np.arange(1000), found.rows)
    again = fit_probes(seen, left, 1.0, seed=0, max_fit=50_000)
    assert (again.probe, again.accuracy) == (found.probe, found.accuracy)
    fewer = np.setdiff1d(np.arange(1000), found.rows[:-1])
    assert fit_probes(seen, fewer, 1.0, seed=0, max_fit=50_000).accuracy > 0.6


def test_the_search_stops_at_its_budget_and_says_how_far_it_came() -> None:
    seen, ids = planted(1000, 600), pl.Series([f"{n:04d}" for n in range(1000)])
    found = find_shortcuts(seen, ids, 0.6, 200, seed=0, max_fit=50_000)
    assert len(found.rows) == 200
    assert found.accuracy == pytest.approx(0.75, abs=0.04)  # 400 known, and chance for 400, of 800
    assert find_shortcuts(seen, ids, 0.9, 200, seed=0, max_fit=50_000).rows.tolist() == []


def test_pairs_of_one_prompt_have_no_score_and_go_by_pair_id() -> None:
    seen = planted(8, 8)._replace(clusters=np.zeros(8, dtype=np.int64))
    fit = fit_probes(seen, np.arange(8), 1.0, seed=0, max_fit=50_000)  # no fit is held out from its only prompt
    assert (fit.probe, fit.accuracy, np.isnan(fit.scores).tolist()) == ("both", 0.0, [True] * 8)
    found = find_shortcuts(seen, pl.Series("hgfedcba"), 0.6, 8, seed=0, max_fit=50_000)
    assert found.rows.tolist() == []


def test_the_scores_are_those_of_both_whichever_probe_is_highest() -> None:
    rng = np.random.default_rng(0)
    # chosen is longer in 70%, by a size that varies: one sign of one feature; the words are noise
    length = np.where(rng.random(400) < 0.7, 1.0, -1.0) * rng.random(400)
    words = sparse.csr_array(rng.integers(-1, 2, size=(400, 200)).astype(np.float64))
    seen = Seen(length, np.zeros((400, 1)), words, np.arange(400))
    fit = fit_probes(seen, np.arange(400), 1.0, seed=0, max_fit=50_000)
    assert (fit.probe, fit.accuracy) == ("structure", float(np.mean(length > 0)))  # structure is given length too
    both = cross_fit(sparse.csr_array(np.hstack([shallow(length, seen.structure), words.toarray()])), seen.clusters)
    assert np.corrcoef(fit.scores, both)[0, 1] > 0.99


def test_the_probes_are_kept_from_what_the_audit_is_kept_from() -> None:
    rng = random.Random(0)
    texts = [[" ".join(rng.sample(WORDS, 6)) for _ in range(600)] for _ in range(2)]
    chosen = [f"gleam {text}" if number % 5 < 3 else text for number, text in enumerate(texts[0])]
    ids = [f"p{number}" for number in range(600)]
    pairs = pl.DataFrame({"pair_id": ids, "prompt": ids, "chosen": chosen, "rejected": texts[1], "source": "s"})
    seen, kept = (see_pairs(in_memory(pairs), *allowed) for allowed in ((), (["Gleam"], ["words", "characters"])))
    # 26 words and gleam; a word more is ln(8/7) in length, and counts for the two features that it changes
    assert (seen.words.shape, kept.words.shape) == ((600, 27), (600, 26))
    assert seen.structure.shape[1] - kept.structure.shape[1] == 2
    assert (seen.length_allowed, kept.length_allowed) == (False, True)
    assert (
        kept.length.tolist() == seen.length.tolist() == pytest.approx([np.log(8 / 7) * (n % 5 < 3) for n in range(600)])
    )
    accuracy = [fit_probes(one, np.arange(600), 1.0, seed=0, max_fit=50_000).accuracy for one in (seen, kept)]
    assert accuracy == [pytest.approx(0.8, abs=0.04), pytest.approx(0.5, abs=0.08)]  # 60% known, and chance


# datasets


def row(number: int, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def opened(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Path:
    """Pairs that an opener touches in every way; what becomes of each stands beside it."""
    rows = [
        row(0, "Sure! Red is warm.", "blue"),  # edited
        row(1, "plain", "simple", weight=0.5),  # stays
        row(2, "Sure!", "well"),  # chosen says nothing
        row(3, "Sure! Same", "Same"),  # both the same
        row(4, "Twice", "once"),  # the twin of the next
        row(4, "Sure! Twice", "once"),
        row(5, "left", "right"),  # against the next
        row(5, "Right", "Sure! Left"),  # stays: case counts
        row(6, "up", "down"),  # against the next
        row(6, "sure! down", "sure! up"),
        row(7, "yes", "Sure! no"),  # edited
    ]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    pipeline = pipeline_of(source, dedupe={"near_duplicates": None})  # so that case counts
    build_dataset(pipeline)
    return Path(pipeline.dataset)


def test_an_opener_is_cut_and_everything_else_stays_as_it_was(opened: Path, tmp_path: Path) -> None:
    before, old = table(opened, "pairs"), contents(opened)
    repaired = repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    pairs = table(tmp_path / "new", "pairs")
    assert pairs.select("prompt", "chosen", "rejected").rows() == [
        ("p0", "Red is warm.", "blue"),
        ("p1", "plain", "simple"),
        ("p4", "Twice", "once"),
        ("p5", "left", "right"),
        ("p5", "Right", "Left"),
        ("p7", "yes", "No"),
    ]
    assert pairs["pair_id"].to_list() == [
        pair_id("text", *texts) for texts in pairs.select("prompt", "chosen", "rejected").rows()
    ]
    kept = before.join(pairs, on="pair_id", how="semi", maintain_order="left")
    assert kept.equals(pairs.join(before, on="pair_id", how="semi", maintain_order="left"))
    assert kept.height == 3
    assert pairs["source_row"].to_list() == [1, 2, 5, 7, 8, 11]
    assert pairs["weight"].to_list() == [1, 0.5, 1, 1, 1, 1]
    assert pairs.columns == before.columns
    assert repaired.steps == [made_step("strip_opener", "sure!", 5, 3)]
    assert contents(opened) == old


def test_what_an_edit_makes_unfit_is_dropped_with_the_rule_by_name(opened: Path, tmp_path: Path) -> None:
    before = dict(table(opened, "pairs").select("source_row", "pair_id").rows())
    repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    dropped = table(tmp_path / "new", "dropped").sort("source_row")
    assert dropped.select("source_row", "stage", "reason", "chosen").rows() == [
        (3, "repair", "empty_chosen", "Sure!"),
        (4, "repair", "identical", "Sure! Same"),
        (6, "repair", "duplicate", "Sure! Twice"),
        (9, "repair", "contradiction", "up"),
        (10, "repair", "contradiction", "sure! down"),
    ]
    assert dropped["pair_id"].to_list() == [before[row] for row in (3, 4, 6, 9, 10)]
    assert dropped["duplicate_of"].to_list() == [None, None, before[5], None, None]
    assert dropped["contradicts"].to_list() == [None, None, None, before[10], before[9]]
    assert dropped["jaccard"].to_list() == [None, None, 1.0, None, None]


def test_every_dropped_and_edited_pair_has_one_row_that_says_why(opened: Path, tmp_path: Path) -> None:
    repaired = repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    ids = dict(table(opened, "pairs").select("source_row", "pair_id").rows())
    new = dict(table(tmp_path / "new", "pairs").select("source_row", "pair_id").rows())
    changes = table(tmp_path / "new", "changes")
    named = ("pair_id", "new_pair_id", "action", "reason", "detail", "chosen_before", "rejected_before")
    lost = [(3, "empty_chosen"), (4, "identical"), (6, "duplicate"), (9, "contradiction"), (10, "contradiction")]
    expected = {
        1: (ids[1], new[1], "edited", "strip_opener", "cut off chosen: 'Sure!'", "Sure! Red is warm.", "blue"),
        8: (ids[8], new[8], "edited", "strip_opener", "cut off rejected: 'Sure!'", "Right", "Sure! Left"),
        11: (ids[11], new[11], "edited", "strip_opener", "cut off rejected: 'Sure!'", "yes", "Sure! no"),
    } | {
        row: (ids[row], None, "dropped", "strip_opener", f"{rule}, once 'sure!' is cut off", None, None)
        for row, rule in lost
    }
    assert changes.columns == list(named)
    assert changes.rows() == [expected[row] for row in sorted(expected)]
    assert connect_dataset(repaired.out).execute("select count(*) from changes").fetchall() == [(8,)]


def test_two_openers_in_a_row_are_one_edit_and_an_edited_pair_may_still_go(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [row(n, f"Sure! Okay. {word} day", "no") for n, word in enumerate(["red", "blue", "green"])]
    rows += [row(9, "one", "two red days"), row(8, "three", "four")]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    new = tmp_path / "new"
    repaired = repair_dataset(
        pipeline.dataset, str(new), strip_openers=["sure!", "okay."], balance=["day"], max_dropped=0.7
    )
    assert [tuple(step.values()) for step in repaired.steps] == [
        ("strip_opener", "sure!", 0, 3, 3),
        ("strip_opener", "okay.", 0, 3, 3),
        ("balance", "day", 3, 0, 0),
    ]
    changes = table(new, "changes")
    assert changes["action"].to_list() == ["dropped"] * 3
    assert changes["reason"].to_list() == ["balance"] * 3
    assert all(detail.startswith("'day' is in chosen only") for detail in changes["detail"])
    assert all(detail.endswith("; cut off chosen: 'Sure!'; cut off chosen: 'Okay.'") for detail in changes["detail"])
    assert table(new, "dropped")["chosen"].to_list() == [f"Sure! Okay. {w} day" for w in ("red", "blue", "green")]
    pipeline = load_pipeline(tmp_path / "pipeline.yaml")
    both = repair_dataset(pipeline.dataset, str(tmp_path / "both"), strip_openers=["sure!", "okay."])
    told = table(both.out, "changes")["detail"].to_list()
    assert told == ["cut off chosen: 'Sure!'; cut off chosen: 'Okay.'"] * 3


def test_what_was_cut_off_a_pair_that_goes_later_is_told_and_counted(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [row(0, "Sure! Okay.", "no"), row(1, "Sure! red", "blue"), row(2, "Okay. Sure! up", "Okay. down")]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), strip_openers=["sure!", "okay."])
    # sure! begins p0 and p1; without it p0 says Okay. alone, and nothing once that goes too
    assert repaired.steps == [
        made_step("strip_opener", "sure!", 0, 2, dropped_later=1),
        made_step("strip_opener", "okay.", 1, 1),
    ]
    assert table(tmp_path / "new", "changes").select("action", "detail").rows() == [
        ("dropped", "empty_chosen, once 'okay.' is cut off; cut off chosen: 'Sure!'"),
        ("edited", "cut off chosen: 'Sure!'"),
        ("edited", "cut off chosen: 'Okay.', rejected: 'Okay.'"),
    ]
    shown = printed(repaired)
    assert "  strip_opener sure!: 0 dropped, 2 edited, 1 of them dropped later\n" in shown
    assert "  strip_opener okay.: 1 dropped, 1 edited\n" in shown
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "| repair | setting | pairs dropped | pairs edited | of them dropped later |\n" in card
    assert "| strip_opener | `sure!` | 0 | 2 | 1 |\n| strip_opener | `okay.` | 1 | 1 | 0 |\n" in card


def sided(write_jsonl: WriteJsonl, pipeline_of: PipelineOf, chosen: int, rejected: int, **sections: Any) -> Pipeline:
    """`gleam` in chosen only, then in rejected only, then in neither; texts of five words of a seeded choice."""
    rng = random.Random(0)

    def text(word: str) -> str:
        return " ".join([rng.choice("abcdefgh") * 2 for _ in range(4)] + [word])

    rows = [row(n, text("gleam"), text("dim")) for n in range(chosen)]
    rows += [row(1000 + n, text("dim"), text("gleam")) for n in range(rejected)]
    rows += [row(2000 + n, text("dim"), text("dim")) for n in range(60)]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}, **sections)
    build_dataset(pipeline)
    return pipeline


def on_one_side(folder: Path | str, token: str) -> tuple[int, int]:
    found = table(folder, "pairs").select("chosen", "rejected").rows()
    sides = Counter((naive_has(chosen, [token]), naive_has(rejected, [token])) for chosen, rejected in found)
    return sides[True, False], sides[False, True]


def test_a_balanced_token_is_as_often_in_chosen_only_as_in_rejected_only(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 40, 15)
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["Gleam"])
    assert on_one_side(tmp_path / "new", "gleam") == (15, 15)
    assert repaired.steps == [made_step("balance", "Gleam", 25)]
    assert (repaired.before.pairs, repaired.after.pairs) == (115, 90)
    # the audit of the old dataset gives the scores by which they go: no pair that stays is above one that went
    scores = dict(repaired.before.tables[AUDIT_SCORES].select("pair_id", "shortcut_score").rows())
    gone = [scores[one] for one in table(tmp_path / "new", "changes")["pair_id"]]
    left = [
        scores[one]
        for one, text in table(tmp_path / "new", "pairs").select("pair_id", "chosen").rows()
        if "gleam" in text
    ]
    assert min(gone) >= max(left)
    mirrored = sided(write_jsonl, pipeline_of, 15, 40)
    repair_dataset(mirrored.dataset, str(tmp_path / "mirrored"), balance=["gleam"])
    assert on_one_side(tmp_path / "mirrored", "gleam") == (15, 15)


def test_a_token_that_one_side_alone_has_goes_with_all_its_pairs(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 30, 0)
    repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["gleam"])
    assert on_one_side(tmp_path / "new", "gleam") == (0, 0)
    assert table(tmp_path / "new", "pairs").height == 60


def test_several_tokens_and_lengths_hold_together(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rng = random.Random(1)

    def text(extra: Sequence[str], low: int) -> str:
        return " ".join([rng.choice("abcdefgh") * 2 for _ in range(rng.randint(low, 12))] + list(extra))

    rows = [
        row(
            n,
            text(["gleam"] * (rng.random() < 0.5) + ["glow"] * (rng.random() < 0.4), 4),
            text(["glow"] * (n % 9 == 0), 2),
        )
        for n in range(200)
    ] + [row(500 + n, text([], 3), text(["gleam"], 3)) for n in range(60)]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    repaired = repair_dataset(
        pipeline.dataset, str(tmp_path / "new"), balance=["gleam", "glow"], match_length=True, max_dropped=0.9
    )
    for token in ("gleam", "glow"):
        only_chosen, only_rejected = on_one_side(tmp_path / "new", token)
        assert only_chosen == only_rejected > 0
    pairs = table(tmp_path / "new", "pairs").select("chosen", "rejected").rows()
    longer = Counter(np.sign(len(words_in(chosen)) - len(words_in(rejected))) for chosen, rejected in pairs)
    assert longer[1] == longer[-1] > 0
    assert [step["repair"] for step in repaired.steps] == ["balance", "balance", "match_length"]
    changes = table(tmp_path / "new", "changes")
    assert sum(step["dropped"] for step in repaired.steps) == changes.height == 260 - len(pairs)
    matched = changes.filter(pl.col("reason") == "match_length")["detail"].to_list()
    assert all(
        detail.startswith(("chosen is ", "rejected is ")) and "times as long in words" in detail for detail in matched
    )


def test_dropped_shortcuts_leave_a_dataset_whose_audit_is_under_the_target(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 40, 0)
    lines: list[str] = []
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), drop_shortcuts=0.6, tell=lines.append)
    probes = repaired.after.tables[AUDIT_PROBE].filter(pl.col("source").is_null())
    assert all(accuracy <= 0.6 for accuracy in probes.filter(pl.col("probe") != "generator")["accuracy"])
    assert any(accuracy > 0.6 for accuracy in repaired.before.tables[AUDIT_PROBE]["accuracy"].drop_nulls())
    dropped = table(tmp_path / "new", "changes")
    assert dropped["reason"].unique().to_list() == ["drop_shortcuts"]
    assert all(detail.startswith("given away; shortcut score +") for detail in dropped["detail"])
    assert repaired.steps[0]["dropped"] == dropped.height <= 50
    assert any("pairs dropped: " in line and "tells chosen in" in line for line in lines)


def test_what_the_pipeline_allows_is_no_shortcut_that_is_dropped(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rng = random.Random(0)
    texts = [[" ".join(rng.sample(WORDS, 6)) for _ in range(600)] for _ in range(2)]
    rows = [row(n, "gleam " * (n % 5 < 3) + one, other) for n, (one, other) in enumerate(zip(*texts, strict=True))]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}
    pipeline = pipeline_of(source, audit={"allow": ["gleam"], "allow_features": ["words", "characters"]})
    build_dataset(pipeline)
    with pytest.raises(InputError, match="no probe is above it"):
        repair_dataset(pipeline.dataset, str(tmp_path / "new"), drop_shortcuts=0.6)
    # lengths that are allowed are matched all the same where that is asked for: 360 chosen sides are longer, 0 rejected
    matched = repair_dataset(pipeline.dataset, str(tmp_path / "matched"), match_length=True, max_dropped=0.6)
    assert matched.steps == [made_step("match_length", None, 360)]


def test_a_dataset_of_one_prompt_is_balanced_by_pair_id(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [row(0, f"zork a{n}", f"b{n}") for n in range(30)]
    rows += [row(0, f"c{n}", f"zork d{n}") for n in range(10)] + [row(0, f"e{n}", f"f{n}") for n in range(20)]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    old = table(pipeline.dataset, "pairs")
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["zork"])
    assert repaired.steps == [made_step("balance", "zork", 20)]  # 30 against 10
    changes = table(tmp_path / "new", "changes")
    with_zork = old.filter(pl.col("chosen").str.starts_with("zork"))["pair_id"].sort()
    assert changes["pair_id"].sort().to_list() == with_zork[:20].to_list()
    assert changes["detail"].unique().to_list() == ["'zork' is in chosen only"]


def test_a_single_pair_is_matched_or_refused(write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path) -> None:
    def built(chosen: str) -> str:
        source = {"path": str(write_jsonl("rows.jsonl", [row(0, chosen, "two words")])), "format": "pairs"}
        pipeline = pipeline_of(source)
        build_dataset(pipeline)
        return pipeline.dataset

    same = repair_dataset(built("words two"), str(tmp_path / "new"), match_length=True)
    assert same.steps == [made_step("match_length", None, 0)]
    with pytest.raises(CheckError, match=r"with --match-length, 1 of 1 pairs would go \(100.0%\)"):
        repair_dataset(built("three words now"), str(tmp_path / "other"), match_length=True)


def test_a_target_out_of_reach_says_how_far_it_came_and_writes_nothing(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 240, 0)
    with pytest.raises(CheckError) as failed:
        repair_dataset(pipeline.dataset, str(tmp_path / "new"), drop_shortcuts=0.6, max_dropped=0.1)
    error = failed.value
    assert error.message.startswith("without 30 of 300 pairs (10%) the probe ")
    assert " still tells chosen in " in error.message
    assert error.message.endswith(" of held-out pairs")
    assert error.expected == "at most 60.0%, and at most 10% dropped (--max-dropped)"
    assert error.hint == (
        "--strip-opener or --balance for what the audit finds; or a higher --drop-shortcuts, or other pairs"
    )
    assert error.where == pipeline.dataset
    assert not (tmp_path / "new").exists()


def test_more_pairs_than_may_go_are_an_error_that_names_the_repair(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 90, 0)
    with pytest.raises(CheckError) as failed:
        repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["gleam"])
    assert failed.value.message == "with --balance, 90 of 150 pairs would go (60.0%)"
    assert failed.value.expected == "at most 50% (--max-dropped), and pairs that are left"
    assert failed.value.hint == (
        "a higher --max-dropped, other repairs (--strip-opener edits pairs and keeps most), or other pairs"
    )
    repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["gleam"], max_dropped=0.6)
    kept = contents(tmp_path / "new")
    with pytest.raises(CheckError, match="with --balance, 90 of 150"):
        repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["gleam"], max_dropped=0.5, overwrite=True)
    assert contents(tmp_path / "new") == kept


def test_a_repair_that_would_leave_no_pair_is_refused(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [row(n, "Sure!", f"no {n}") for n in range(3)]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    with pytest.raises(CheckError, match=r"with --strip-opener, 3 of 3 pairs would go \(100.0%\)"):
        repair_dataset(pipeline.dataset, str(tmp_path / "new"), strip_openers=["sure!"], max_dropped=1)


def test_the_counts_of_candidates_still_add_up(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"p{n}", "response": text, "score": score}
        for n, word in enumerate(["Red", "Blue", "Green", "Grey"])
        for text, score in (
            (f"Sure! {word}" if n < 2 else "Sure!" if n == 2 else word, 3),
            (f"{word} two", 2),
            (word if n == 0 else f"{word} one", 1),
        )
    ]
    pairs = [row(9, "Sure! x", "y"), row(8, "z", "z")]
    sources = (
        {"path": str(write_jsonl("candidates.jsonl", rows)), "format": "candidates"},
        {"path": str(write_jsonl("pairs.jsonl", pairs)), "format": "pairs"},
    )
    pipeline = pipeline_of(*sources, split={"test_share": 0.5})
    built = build_dataset(pipeline)
    assert (built.counts["pairs"], built.counts["candidate_pairs"], built.counts["prompts_with_pair"]) == (5, 4, 4)
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), strip_openers=["Sure!"])
    counts = repaired.counts
    # p0: both sides the same; p2: chosen says nothing; p9 and p1 edited; p8 was dropped by the build
    assert (counts["pairs"], counts["dropped"], counts["candidate_pairs"], counts["candidate_dropped"]) == (3, 3, 2, 2)
    assert (counts["prompts"], counts["prompts_with_pair"], counts["prompts_dropped"]) == (4, 2, 2)
    assert {name: counts[name] for name in ("rows", "candidates", "used", "unused", "rejects")} == {
        name: built.counts[name] for name in ("rows", "candidates", "used", "unused", "rejects")
    }
    Counts(**counts).check()
    manifest = read_manifest(tmp_path / "new")
    assert manifest["reasons"] == {"empty_chosen": 1, "identical": 2}
    splits = dict(table(pipeline.dataset, "pairs").select("prompt", "split").rows())
    assert all(
        splits[prompt] == split for prompt, split in table(tmp_path / "new", "pairs").select("prompt", "split").rows()
    )
    assert manifest["sources"] == read_manifest(Path(pipeline.dataset))["sources"]


def test_the_sides_of_an_edited_correction_are_measured_again(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "p1", "response": "a b c", "correction": "Sure! a x c"},
        {"prompt": "p2", "response": "a b", "correction": "a c"},
    ]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "corrections"})
    build_dataset(pipeline)
    repair_dataset(pipeline.dataset, str(tmp_path / "new"), strip_openers=["sure!"])
    # A x c against a b c: words are compared as they are written, so two of three differ and none is shared at first
    apart = table(tmp_path / "new", "pairs").select("chosen", "edit_distance", "shared_prefix", "first_divergence")
    assert apart.rows() == [("A x c", pytest.approx(2 / 3), 0.0, 0), ("a c", 0.5, 0.5, 1)]
    told = next(one for one in read_manifest(tmp_path / "new")["report"] if "corrections" in one)
    assert told["corrections"]["edit_distance"]["median"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_chat_pairs_with_tools_keep_what_no_opener_touches(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    rows = [
        {
            "prompt": [turn("user", "Sure! weather?")],
            "chosen": [
                turn("assistant", "Sure! I look", tool_calls=call),
                turn("tool", "5"),
                turn("assistant", "five"),
            ],
            "rejected": [turn("assistant", "six")],
        },
        {
            "prompt": [turn("user", "hi")],
            "chosen": [turn("assistant", "hello")],
            "rejected": [turn("assistant", "no")],
        },
    ]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}, kind="chat")
    build_dataset(pipeline)
    repair_dataset(pipeline.dataset, str(tmp_path / "new"), strip_openers=["sure!"])
    old, new = (table(folder, "pairs") for folder in (pipeline.dataset, tmp_path / "new"))
    assert new["prompt"].to_list() == old["prompt"].to_list()
    before, after = (frame["chosen"][0].to_list() for frame in (old, new))
    assert after == [{**before[0], "content": "I look"}, *before[1:]]
    assert json.loads(after[0]["extra"])["tool_calls"][0]["function"]["name"] == "f"
    assert new.schema == old.schema


# the directory


def test_the_same_command_again_writes_nothing(opened: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    first = repair_dataset(str(opened), str(new), strip_openers=["sure!"])
    kept = contents(new)
    stamps = {path: path.stat().st_mtime_ns for path in (new / "pairs").iterdir()}
    again = repair_dataset(str(opened), str(new), strip_openers=["sure!"])
    assert (first.unchanged, again.unchanged) == (False, True)
    assert contents(new) == kept
    assert {path: path.stat().st_mtime_ns for path in (new / "pairs").iterdir()} == stamps
    assert again.steps == first.steps
    other = repair_dataset(str(opened), str(tmp_path / "other"), strip_openers=["sure!"])
    assert contents(Path(other.out), "audit") == {n: d for n, d in kept.items() if not n.startswith("audit")}


def test_other_repairs_or_other_data_are_written_anew(opened: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    repair_dataset(str(opened), str(new), strip_openers=["sure!"])
    (new / "runs" / "1").mkdir(parents=True)
    kept = contents(new)
    with pytest.raises(DatasetError) as refused:
        repair_dataset(str(opened), str(new), strip_openers=["Sure! Red"])
    assert str(refused.value) == f"{new}: holds another repaired dataset\n  next: --overwrite, or another --out"
    assert contents(new) == kept
    changed = repair_dataset(str(opened), str(new), strip_openers=["Sure! Red"], overwrite=True)
    assert not changed.unchanged
    assert table(new, "pairs")["chosen"][0] == "Is warm."
    assert (new / "runs" / "1").is_dir()
    part = next((new / "pairs").iterdir())
    part.write_bytes(b"torn")
    assert not repair_dataset(str(opened), str(new), strip_openers=["Sure! Red"], overwrite=True).unchanged
    manifest = read_manifest(opened)
    write_json(opened / "manifest.json", manifest | {"report": [{"note": "other"}]})
    assert not repair_dataset(str(opened), str(new), strip_openers=["Sure! Red"], overwrite=True).unchanged
    twice = repair_dataset(str(new), str(tmp_path / "twice"), strip_openers=["right"], max_dropped=1)
    assert table(twice.out, "changes")["detail"].to_list() == [  # right is rejected once and chosen once
        "empty_rejected, once 'right' is cut off",
        "empty_chosen, once 'right' is cut off",
    ]


def test_settings_of_the_audit_are_those_of_both_audits_and_stay_with_the_new_one(opened: Path, tmp_path: Path) -> None:
    changes = ["audit.allow=[warm]", "audit.ngrams=1"]
    repaired = repair_dataset(str(opened), str(tmp_path / "new"), strip_openers="sure!", changes=changes)
    for audit in (repaired.before, repaired.after):
        assert (audit.document["settings"]["allow"], audit.document["settings"]["ngrams"]) == (["warm"], 1)
    assert target_pipeline(repaired.out).audit.allow == ["warm"]
    assert repair_dataset(str(opened), repaired.out, strip_openers="sure!", changes=changes).unchanged
    with pytest.raises(DatasetError, match="holds another repaired dataset"):
        repair_dataset(str(opened), repaired.out, strip_openers="sure!")
    with pytest.raises(ConfigError) as refused:
        repair_dataset(str(opened), repaired.out, strip_openers="sure!", changes=["split.seed=1"])
    assert str(refused.value) == (
        "split.seed: a repair changes settings of the audit only\n  expected: audit.key=value"
    )


def test_shortcuts_that_no_probe_tells_are_nothing_to_drop(opened: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        repair_dataset(str(opened), str(tmp_path / "new"), drop_shortcuts=1.0)
    assert str(refused.value).startswith("--drop-shortcuts 1: no probe is above it: ")
    assert "of held-out pairs\n  expected: a lower one, or another repair\n  next: prefkit audit " in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_dataset_is_never_repaired_in_place_nor_written_over(opened: Path, tmp_path: Path) -> None:
    for out in (opened, opened / "inner", opened / "." / "..", opened / ".." / opened.name):
        kept = contents(opened)
        with pytest.raises(DatasetError) as failed:
            repair_dataset(str(opened), str(out), strip_openers=["sure!"])
        assert failed.value.message == "a dataset is not repaired in place"
        assert failed.value.hint == "choose an --out beside the dataset"
        assert contents(opened) == kept
    other = tmp_path / "copy"
    shutil.copytree(opened, other)
    with pytest.raises(DatasetError) as failed:
        repair_dataset(str(opened), str(other), strip_openers=["sure!"])
    assert failed.value.message == "holds a dataset that no repair wrote"
    assert failed.value.hint == "choose another --out; this one stays"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"is not a dataset of prefkit: it holds notes\.txt"):
        repair_dataset(str(opened), str(foreign), strip_openers=["sure!"])
    with pytest.raises(DatasetError, match="no such dataset"):
        repair_dataset(str(tmp_path / "nowhere"), str(tmp_path / "new"), strip_openers=["sure!"])


@pytest.mark.parametrize("left", [".drafts/x", ".building/pairs/x", "pairs/x"])
def test_an_unfinished_build_is_not_written_over(left: str, opened: Path, tmp_path: Path) -> None:
    out = tmp_path / "building"
    for name in (left, ".lock", "runs/1/run.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine", encoding="utf-8")
    kept = contents(out)
    with pytest.raises(DatasetError) as failed:
        repair_dataset(str(opened), str(out), strip_openers=["sure!"])
    assert str(failed.value) == f"{out}: holds an unfinished build\n  next: choose another --out; this one stays"
    assert contents(out) == kept


@pytest.mark.parametrize("left", [".building/changes/x", "changes/x"])
def test_what_a_killed_repair_left_is_written_anew(left: str, opened: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (left, ".building/pairs/x", "pairs/x", ".lock"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("", encoding="utf-8")
    repair_dataset(str(opened), str(out), strip_openers=["sure!"])
    whole = repair_dataset(str(opened), str(tmp_path / "whole"), strip_openers=["sure!"])
    assert contents(out, "audit") == contents(Path(whole.out), "audit")


def test_nothing_in_the_old_dataset_changes_not_even_its_audit(opened: Path, tmp_path: Path) -> None:
    audit_dataset(target_pipeline(str(opened)), strict=True)
    kept, stamp = contents(opened), opened.stat().st_mtime_ns
    opened.chmod(0o555)
    try:
        repaired = repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    finally:
        opened.chmod(0o755)
    assert (contents(opened), opened.stat().st_mtime_ns) == (kept, stamp)
    assert repaired.before.document["strict"] is False
    assert (tmp_path / "new" / "audit" / "audit.json").exists()


def test_what_to_type_is_right_for_a_shell(opened: Path, pipeline_of: PipelineOf, tmp_path: Path) -> None:
    dataset = str(shutil.move(opened, tmp_path / "it's mine"))
    quoted = f"'{tmp_path}/it'\"'\"'s mine'"
    with pytest.raises(InputError) as failed:
        repair_dataset(dataset, str(tmp_path / "new"), strip_openers=["As an AI"])
    assert failed.value.hint == f"prefkit show {quoted} shows how replies begin"
    with pytest.raises(InputError) as failed:
        repair_dataset(dataset, str(tmp_path / "new"), balance=["as an AI"])
    sql = "'select token from tokens where num_discordant > 0'"
    assert failed.value.hint == f"prefkit query {quoted} {sql} lists those that are"
    none = table(dataset, "pairs").clear()
    with pytest.raises(DatasetError) as damaged:
        mend_pairs(none, "text", target_pipeline(dataset), Wanted(match_length=True), dataset)
    assert damaged.value.hint == f"prefkit query {quoted} 'select reason, count(*) from dropped group by all'"


@pytest.mark.parametrize(
    ("repairs", "message", "where", "expected", "hint"),
    [
        (
            {},
            "no repair is asked for",
            "prefkit repair",
            "--strip-opener, --balance, --match-length or --drop-shortcuts",
            "prefkit audit DATASET says what there is to repair",
        ),
        ({"strip_openers": [" "]}, "' ' holds no word and no sign", "--strip-opener", "", ""),
        ({"balance": [""]}, "'' holds no word and no sign", "--balance", "", ""),
        (
            {"drop_shortcuts": 0.4},
            "0.4 does not fit",
            "--drop-shortcuts",
            "a held-out accuracy, .5 (chance) to 1",
            "",
        ),
        (
            {"match_length": True, "max_dropped": 0},
            "0 does not fit",
            "--max-dropped",
            "a share of the pairs, above 0, at most 1",
            "",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(
    repairs: dict[str, Any], message: str, where: str, expected: str, hint: str, opened: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as failed:
        repair_dataset(str(opened), str(tmp_path / "new"), **repairs)
    error = failed.value
    assert (error.message, error.where, error.expected, error.hint) == (message, where, expected, hint)
    assert not (tmp_path / "new").exists()


def test_a_repair_without_anything_to_repair_is_named(
    opened: Path, write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as failed:
        repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["As an AI"])
    assert str(failed.value) == (
        f"--strip-opener: no reply begins with 'As an AI'\n  next: prefkit show {opened} shows how replies begin"
    )
    with pytest.raises(InputError) as failed:
        repair_dataset(str(opened), str(tmp_path / "new"), balance=["as an AI"])
    assert failed.value.message == "'as an AI' is on one side only in no pair"
    assert failed.value.where == "--balance"
    assert failed.value.hint == (
        f"prefkit query {opened} 'select token from tokens where num_discordant > 0' lists those that are"
    )
    assert not (tmp_path / "new").exists()
    empty = pipeline_of({"path": str(write_jsonl("same.jsonl", [row(1, "a", "a")])), "format": "pairs"})
    shutil.rmtree(opened)
    build_dataset(empty)
    with pytest.raises(DatasetError, match="holds no pairs"):
        repair_dataset(empty.dataset, str(tmp_path / "new"), match_length=True)


def test_the_audits_of_both_are_printed_side_by_side(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path
) -> None:
    pipeline = sided(write_jsonl, pipeline_of, 60, 0)
    repaired = repair_dataset(pipeline.dataset, str(tmp_path / "new"), balance=["gleam"])
    rows = {name: cells for name, *cells in audit_rows(repaired.before, repaired.after)}
    assert rows["verdict"] == [repaired.before.verdict, repaired.after.verdict]
    assert rows["verdict"][0] == "fail"
    assert rows["pairs"] == ["120", "60"]
    assert rows["findings"][0].endswith(("fail", "warn", "note"))
    assert "probe generator" not in rows
    shown = printed(repaired)
    assert f"{repaired.out}: 60 of the 120 pairs of {repaired.dataset}" in shown
    assert "balance gleam: 60 dropped, 0 edited" in shown
    assert f"every dropped and edited pair, and why: {repaired.out}/changes" in shown
    assert " (is up to date)" in printed(repaired._replace(unchanged=True))
    hostile = repaired._replace(steps=[made_step("balance", "\x1b[31m[bold]", 1)])
    assert "\ufffd[31m[bold]" in printed(hostile)
    assert "prefkit precompute scores the edited pairs only" in printed(repaired._replace(references=["abc"]))


def test_a_probe_of_too_few_pairs_says_so_beside_the_other(opened: Path, tmp_path: Path) -> None:
    repaired = repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    probe = {"probe": ["length"], "source": [None], "accuracy": [0.6], "accuracy_low": [0.4], "accuracy_high": [0.8]}
    tables = {**repaired.after.tables, AUDIT_PROBE: pl.DataFrame({**probe, "band": [None]})}
    rows = {name: cells for name, *cells in audit_rows(repaired.before, repaired.after._replace(tables=tables))}
    assert rows["probe length"][1] == "60.0% (40.0% to 80.0%) too few pairs"


def test_the_last_lines_say_what_is_useful_next(opened: Path, tmp_path: Path) -> None:
    new = str(tmp_path / "my new")
    repaired = repair_dataset(str(opened), new, strip_openers=["sure!"])
    assert printed(repaired).splitlines()[-1] == f"what is left, side by side: prefkit show '{new}'"
    begin = f"prefkit repair '{new}' --out NEW"
    balance, longer = f"{begin} --balance gleam (or --strip-opener TEXT)", f"{begin} --match-length, or allow it"
    shortcuts = f"{begin} --drop-shortcuts .6"
    other = f"{begin} --balance 'gleam !' (or --strip-opener TEXT)"
    steps = [
        made_step("balance", "Gleam", 9),
        made_step("match_length", None, 9),
        made_step("drop_shortcuts", 0.55, 9),
    ]

    def advised(steps: list[Step], *advice: str) -> list[str]:
        findings = [Finding("warn", "tokens", "t", "chosen", "it is so", one) for one in advice]
        shown = printed(repaired._replace(steps=steps, after=repaired.after._replace(findings=findings)))
        return [line.strip() for line in shown.splitlines() if "what to do" in line]

    assert advised([], balance, longer) == [f"what to do: {balance}"]
    assert advised(steps, balance, longer, shortcuts) == []  # all of it was done just now
    assert advised(steps, balance, longer, other, shortcuts) == [f"what to do: {other}"]
    # a target of .7 was reached; .6 is another one
    assert advised([made_step("drop_shortcuts", 0.7, 9)], shortcuts) == [f"what to do: {shortcuts}"]
    assert advised([made_step("strip_opener", "gleam", 0, 9)], balance) == [f"what to do: {balance}"]


def printed(repaired: Repaired) -> str:
    out = StringIO()
    print_repaired(repaired, Console(file=out, width=200, markup=False, highlight=False))
    return out.getvalue()


def test_a_build_does_not_write_over_a_repaired_dataset(opened: Path, tmp_path: Path) -> None:
    out = tmp_path / "mended"
    repair_dataset(str(opened), str(out), strip_openers=["sure!"])
    kept, pipeline = contents(out), target_pipeline(str(out))
    with pytest.raises(DatasetError) as refused:
        build_dataset(pipeline)
    assert str(refused.value) == (
        f"{out}: is a repaired dataset (of {opened})\n  expected: a directory that no repair has written\n"
        "  next: choose another --out, or remove it"
    )
    assert contents(out) == kept


def test_the_card_of_a_repaired_dataset_says_what_was_done(opened: Path, tmp_path: Path) -> None:
    repair_dataset(str(opened), str(tmp_path / "new"), strip_openers=["sure!"])
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "6 pairs (" in card
    assert "| strip_opener | `sure!` | 5 | 3 | 0 |" in card
    repair = read_manifest(tmp_path / "new")["repair"]
    assert repair["dataset"] == str(opened)
    assert len(repair["manifest_sha256"]) == 64


def test_a_finished_reference_goes_along_and_only_edited_pairs_are_scored(tmp_path: Path) -> None:
    from tiny import built, text_rows, tiny_llama

    from prefkit.reference import precompute_reference

    rows = text_rows(12)
    for one in rows[:5]:
        one["chosen"] = " Sure!" + one["chosen"]
    pipeline = built(tmp_path, rows, tiny_llama(tmp_path / "model"), split={"test_share": 0.25})
    done = precompute_reference(pipeline)
    (Path(pipeline.dataset) / "reference" / "0123456789abcdef").mkdir()  # unfinished: stays behind
    new = tmp_path / "new"
    repaired = repair_dataset(pipeline.dataset, str(new), strip_openers=["sure!"])
    assert repaired.references == [done.key]
    again = precompute_reference(target_pipeline(str(new)))
    assert (again.key, again.pairs, again.scored) == (done.key, 12, 5)
    assert repair_dataset(pipeline.dataset, str(new), strip_openers=["sure!"]).unchanged
    assert precompute_reference(target_pipeline(str(new))).scored == 0


# what it is for


def rows_of(pairs: pl.DataFrame, opened: str, share: float) -> list[dict[str, Any]]:
    """The pairs as rows of trl, the opener before one side in a share of them."""
    rng = random.Random(0)
    rows = []
    for prompt, chosen, rejected in pairs.select("prompt", "chosen", "rejected").rows():
        texts = {"chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}
        if rng.random() < share:
            texts[opened] = f"{SHORTCUT_OPENER} {texts[opened]}"
        rows.append({"prompt": prompt} | {side: [turn("assistant", text)] for side, text in texts.items()})
    return rows


def made(folder: Path, name: str, sources: list[dict[str, Any]]) -> Pipeline:
    settings = {
        "dataset": str(folder / name),
        "kind": "chat",
        "sources": sources,
        "split": {"test_share": 0.0},
        "precompute": {"model": str(folder / "model"), "max_length": 256},
        "train": {"learning_rate": 2e-4, "batch_size": 16, "max_steps": 5, "warmup_steps": 3},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    pipeline = load_pipeline(path)
    build_dataset(pipeline)
    return pipeline


def of_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Pipeline:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made(folder, name, [{"path": str(path), "format": "trl"}])


def of_world(folder: Path) -> pl.DataFrame:
    """Corrections and pairs of a demo world without the shortcut, one a prompt."""
    write_world(folder / "world", 0, 900, shortcut_share=0.0)
    columns = {"prompt": "question", "response": "draft", "correction": "edited"}
    sources: list[dict[str, Any]] = [
        {"path": str(folder / "world" / "corrections.jsonl"), "format": "corrections", "columns": columns},
        {"path": str(folder / "world" / "pairs.jsonl"), "format": "trl"},
    ]
    return table(made(folder, "world-pairs", sources).dataset, "pairs").sort("prompt_id")


def differences(pipeline: Pipeline) -> pl.Series:
    """Log-probability of chosen minus that of rejected, by the pipeline's model, in the order of pair_id."""
    from prefkit.reference import precompute_reference

    key = precompute_reference(pipeline).key
    found = pl.read_parquet(f"{pipeline.dataset}/reference/{key}/part-*.parquet").sort("pair_id")
    return found["ref_chosen_logps"] - found["ref_rejected_logps"]


def test_the_demo_world_has_as_many_shortcuts_as_it_is_asked_for(tmp_path: Path) -> None:
    none, all_of_them = (write_world(tmp_path / str(share), 0, 60, shortcut_share=share) for share in (0.0, 1.0))
    assert none.num_shortcut_answers == 0
    assert SHORTCUT_OPENER not in "".join(path.read_text() for path in (tmp_path / "0.0").iterdir())
    # 27 + 18 + 15 prompts, each flaw on one: 4 + 3 + 6 of them
    assert all_of_them.num_shortcut_answers == 60 - 13
    with pytest.raises(InputError) as failed:
        write_world(tmp_path / "more", shortcut_share=1.5)
    assert failed.value.message == "the demo world cannot have a shortcut in 1.5 of its answers"
    assert (failed.value.where, failed.value.expected) == ("shortcut_share", "0 to 1")


@pytest.mark.slow
def test_a_model_of_the_repaired_pairs_is_better_without_the_shortcut(tmp_path: Path) -> None:
    """One tiny model, the same updates and seeds; measured on clean pairs of other prompts, and with the opener turned.

    The opener stands before nearly every chosen side and no rejected one. A policy of these pairs learns the opener
    first, and where it stands before the worse answers it prefers those; one of the repaired pairs does not.
    """
    from prefkit.demo.tiny_model import train_tiny_model
    from prefkit.reference import precompute_reference
    from prefkit.train import train_dpo

    train_tiny_model(tmp_path / "model", pretraining_texts(0), 0)
    clean = of_world(tmp_path)
    train, test = clean[: clean.height // 2], clean[clean.height // 2 :]
    flagged = of_rows(tmp_path, "flagged", rows_of(train, "chosen", 0.98))
    held_out = of_rows(tmp_path, "held_out", rows_of(test, "chosen", 0.0))
    turned = of_rows(tmp_path, "turned", rows_of(test, "rejected", 1.0))
    repaired = repair_dataset(flagged.dataset, str(tmp_path / "repaired"), strip_openers=[SHORTCUT_OPENER])
    assert repaired.before.verdict == "fail"
    assert "certainly" in {finding.name for finding in repaired.before.findings}
    assert "certainly" not in {finding.name for finding in repaired.after.findings}
    assert repaired.counts["pairs"] == train.height
    before = [differences(pipeline) for pipeline in (held_out, turned)]
    margins: dict[tuple[str, int], list[pl.Series]] = {}
    for dataset in (flagged.dataset, repaired.out):
        precompute_reference(target_pipeline(dataset))
        for seed in range(3):
            run = tmp_path / f"run-{Path(dataset).name}-{seed}"
            train_dpo(target_pipeline(dataset, [f"train.seed={seed}"]), out=str(run))
            models = (target_pipeline(one.dataset, [f"precompute.model={run}/model"]) for one in (held_out, turned))
            after = [differences(pipeline) for pipeline in models]
            margins[dataset, seed] = [a - b for a, b in zip(after, before, strict=True)]
    for seed in range(3):
        worse, better = margins[flagged.dataset, seed], margins[repaired.out, seed]
        # measured: .91, .94, .93 against .98, .99, .97 right; mean margins .024 against .070; turned 0 against .98
        assert share_right(better[0]) > share_right(worse[0])
        assert better[0].to_numpy().mean() > 1.5 * worse[0].to_numpy().mean() > 0
        assert share_right(worse[1]) < 0.1
        assert share_right(better[1]) > 0.9


def share_right(margins: pl.Series) -> float:
    """The share of pairs whose chosen side gained more than the rejected one."""
    return float(np.mean(margins.to_numpy() > 0))
