"""Every reader finds where the prompt ends and which side is better; what it cannot read, it says by field."""

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import test_formats_outside
import test_formats_written
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.formats import FORMATS, Unreadable
from prefkit.formats.comparisons import label_key, with_labels

PROPERTY = settings(deadline=None, max_examples=200, derandomize=True, database=None)
GOOD, BAD = "Water boils at 100 degrees Celsius.", "Water boils at 7 degrees Celsius."


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(form: str, row: dict[str, Any], **columns: Any) -> list[dict[str, Any]]:
    return FORMATS[form].read(row, columns)


def read_one(form: str, row: dict[str, Any], **columns: Any) -> tuple[Any, Any, Any]:
    (record,) = read(form, row, **columns)
    return record["prompt"], record["chosen"], record["rejected"]


def hh(*turns: str) -> str:
    """A transcript: the turns are Human, Assistant, Human ... in this order."""
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


# Anthropic HH


def test_hh_splits_at_the_last_assistant_turn() -> None:
    sides = {"chosen": hh("Q1", "A1", "Q2", "good"), "rejected": hh("Q1", "A1", "Q2", "bad")}
    prompt = [user("Q1"), assistant("A1"), user("Q2")]
    assert read_one("hh", sides) == (prompt, [assistant("good")], [assistant("bad")])


def test_hh_keeps_a_prefix_that_both_replies_share_on_both_sides() -> None:
    sides = {"chosen": hh("Q", "I think you can stop."), "rejected": hh("Q", "I think you can't.")}
    assert read_one("hh", sides) == (
        [user("Q")],
        [assistant("I think you can stop.")],
        [assistant("I think you can't.")],
    )


def test_hh_sides_with_different_prompts_are_refused() -> None:
    changed = {"chosen": hh("Q1", "good"), "rejected": hh("Q2", "bad")}
    longer = {"chosen": hh("Q1", "A1", "Q2", "good"), "rejected": hh("Q1", "bad")}
    for sides in (changed, longer):
        with pytest.raises(Unreadable) as refused:
            read("hh", sides)
        assert (refused.value.field, refused.value.reason) == ("rejected", "different_prompts")


def test_hh_markers_are_turns_only_after_a_blank_line() -> None:
    reply = "One says\nHuman: hello\n\nand the other Assistant: hi\n\n  Human: too"
    sides = {"chosen": hh("Q", reply), "rejected": hh("Q", "no")}
    assert read_one("hh", sides)[1] == [assistant(reply)]


def test_hh_keeps_the_white_space_of_a_turn_exactly() -> None:
    sides = {"chosen": hh("Q \n", "  Yes. \n\nReally."), "rejected": hh("Q \n", "no")}
    assert read_one("hh", sides)[:2] == ([user("Q \n")], [assistant("  Yes. \n\nReally.")])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"chosen": hh("Q", "A")}, "rejected"),
        ({"chosen": "no turns at all", "rejected": hh("Q", "A")}, "chosen"),
        ({"chosen": hh("Q", "A"), "rejected": ""}, "rejected"),
        ({"chosen": hh("Q", "A"), "rejected": None}, "rejected"),
        ({"chosen": hh("Q"), "rejected": hh("Q")}, "chosen"),
        ({"chosen": "Preface" + hh("Q", "A"), "rejected": hh("Q", "B")}, "chosen"),
    ],
)
def test_hh_rows_that_are_no_two_transcripts_are_refused_by_field(row: dict[str, Any], field: str) -> None:
    with pytest.raises(Unreadable) as refused:
        read("hh", row)
    assert refused.value.field == field


@PROPERTY
@given(
    st.lists(st.text("ab \n", min_size=1, max_size=6), min_size=1, max_size=5).filter(
        lambda turns: len(turns) % 2 == 1
    ),
    st.text("ab\n :", max_size=8),
    st.text("ab\n :", max_size=8),
)
def test_hh_turns_put_together_again_are_the_transcript(turns: list[str], good: str, bad: str) -> None:
    sides = {"chosen": hh(*turns, good), "rejected": hh(*turns, bad)}
    prompt, chosen, rejected = read_one("hh", sides)
    for side, reply in (("chosen", chosen), ("rejected", rejected)):
        assert hh(*(turn["content"] for turn in [*prompt, *reply])) == sides[side]
    assert (chosen, rejected) == ([assistant(good)], [assistant(bad)])


# TRL


def test_trl_takes_an_explicit_prompt_as_it_is() -> None:
    assert read_one("trl", {"prompt": "p ", "chosen": "a b", "rejected": "a c"}) == ("p ", "a b", "a c")
    row = {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert read_one("trl", row) == ([user("p")], [assistant("a")], [assistant("b")])


def test_trl_finds_an_implicit_prompt_in_conversations_by_turns() -> None:
    shared = [{"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q2")]
    row = {"chosen": [*shared, assistant("Yes, sure")], "rejected": [*shared, assistant("Yes, no")]}
    assert read_one("trl", row) == (shared, [assistant("Yes, sure")], [assistant("Yes, no")])


def test_trl_never_moves_a_shared_reply_into_the_prompt() -> None:
    row = {
        "chosen": [user("q"), assistant("same"), user("more?"), assistant("x")],
        "rejected": [user("q"), assistant("same")],
    }
    prompt, chosen, rejected = read_one("trl", row)
    assert prompt == [user("q")]
    assert (chosen, rejected) == (row["chosen"][1:], row["rejected"][1:])


def test_trl_reads_a_string_prompt_beside_conversations_as_an_implicit_prompt() -> None:
    row = {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert read_one("trl", row) == ([user("q")], [assistant("a")], [assistant("b")])


def test_trl_refuses_sides_that_share_no_prompt() -> None:
    conversations = {"chosen": [user("q1"), assistant("a")], "rejected": [user("q2"), assistant("a")]}
    texts = {"chosen": "Yes, sure", "rejected": "No way"}
    for row in (conversations, texts):
        with pytest.raises(Unreadable) as refused:
            read("trl", row)
        assert (refused.value.field, refused.value.reason) == ("prompt", "no_shared_prompt")


def test_trl_cuts_an_implicit_text_prompt_before_the_word_that_differs() -> None:
    row = {"chosen": "Capital of France? It is Paris.", "rejected": "Capital of France? It is Parma."}
    prompt, chosen, rejected = read_one("trl", row)
    assert (prompt.strip(), chosen.strip(), rejected.strip()) == ("Capital of France? It is", "Paris.", "Parma.")


@PROPERTY
@given(st.text("ab \n\t", max_size=8), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_trl_never_cuts_a_text_inside_a_word_and_loses_no_character(shared: str, good: str, bad: str) -> None:
    row = {"chosen": shared + good, "rejected": shared + bad}
    same = takewhile(lambda both: both[0] == both[1], zip(*row.values(), strict=False))
    if not re.search(r"\S\s", "".join(character for character, _ in same)):
        with pytest.raises(Unreadable, match="no_shared_prompt"):
            read_one("trl", row)
        return
    prompt, chosen, rejected = read_one("trl", row)
    assert (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"])
    for side in (chosen, rejected):
        assert side[0].isspace()  # the space goes with the word that follows
        assert not prompt[-1].isspace()


@pytest.mark.parametrize("form", ["trl", "openrlhf"])
def test_trl_a_prompt_under_another_name_is_never_made_of_what_the_answers_share(form: str) -> None:
    row = {"question": "Why?", "chosen": "It is so.", "rejected": "It is not."}
    with pytest.raises(Unreadable) as refused:
        read(form, row)
    assert (refused.value.field, refused.value.reason) == ("question", "prompt_elsewhere")
    assert read_one(form, row, prompt="question") == ("Why?", "It is so.", "It is not.")
    assert read_one(form, row, prompt="") == ("It is", " so.", " not.")  # prompt: null says that there is none
    assert read_one(form, row | {"question": 5}) == ("It is", " so.", " not.")  # a number was not asked
    turns = {"question": "Why?", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert read_one(form, turns) == ([user("q")], [assistant("a")], [assistant("b")])


@pytest.mark.parametrize("form", ["trl", "openrlhf"])
def test_trl_a_prompt_of_several_columns_is_a_line_each(form: str) -> None:
    row = {"a": "Translate.", "b": "Hallo", "chosen": "Hello", "rejected": "Bye"}
    assert read_one(form, row, prompt=["a", "b"]) == ("Translate.\nHallo", "Hello", "Bye")
    with pytest.raises(Unreadable) as refused:
        read(form, row, prompt=["a", "c"])
    assert (refused.value.field, refused.value.reason) == ("c", "missing_field")


# pairs, candidates, corrections


def test_columns_name_the_fields_of_the_file_with_dotted_paths_and_places_in_lists() -> None:
    row = {"q": {"text": "p"}, "answers": [{"t": "c"}, {"t": "r"}], "by": "human"}
    columns = {"prompt": "q.text", "chosen": "answers.0.t", "rejected": "answers.1.t", "annotator": "by"}
    assert read("pairs", row, **columns) == [{"prompt": "p", "chosen": "c", "rejected": "r", "annotator": "human"}]


def test_a_column_whose_own_name_has_a_dot_wins_over_the_path() -> None:
    row = {"a.b": "exact", "a": {"b": "nested"}, "chosen": "c", "rejected": "r"}
    assert read_one("pairs", row, prompt="a.b")[0] == "exact"


@pytest.mark.parametrize("path", ["nowhere", "answers.2", "answers.x", "text.0", "answers.0.t.0"])
def test_a_path_that_leads_nowhere_is_a_missing_field(path: str) -> None:
    row = {"text": "p", "answers": [{"t": "c"}, {"t": "r"}], "chosen": "c", "rejected": "r"}
    with pytest.raises(Unreadable) as refused:
        read("pairs", row, prompt=path)
    assert (refused.value.field, refused.value.reason) == (path, "missing_field")


def test_an_optional_column_that_the_pipeline_names_must_be_there_but_may_be_null() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "s": None}
    assert read("pairs", row, chosen_score="s")[0].get("chosen_score") is None
    with pytest.raises(Unreadable) as refused:
        read("pairs", row, chosen_score="t")
    assert (refused.value.field, refused.value.reason) == ("t", "missing_field")


def test_candidates_in_long_form_are_one_a_row() -> None:
    row = {"session": "p", "answer": "r", "score": "7", "model": "m"}
    expected = {"prompt": "p", "response": "r", "score": "7", "model": "m"}
    assert read("candidates", row, prompt="session", response="answer") == [expected]


def test_candidates_in_list_form_are_one_an_element() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, True], "models": ["x", "y"]}
    assert read("candidates", row) == [
        {"prompt": "p", "response": "a", "score": 1, "model": "x"},
        {"prompt": "p", "response": "b", "score": True, "model": "y"},
    ]


def test_candidates_can_be_gathered_from_a_list_of_paths() -> None:
    row = {"q": "p", "big": {"solution": "a", "ok": True}, "small": {"solution": "b", "ok": False}}
    found = read(
        "candidates", row, prompt="q", responses=["big.solution", "small.solution"], scores=["big.ok", "small.ok"]
    )
    assert [(c["prompt"], c["response"], c["score"]) for c in found] == [("p", "a", True), ("p", "b", False)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "length_mismatch"),
        ({"prompt": "p", "responses": ["a"], "scores": [1], "models": ["x", "y"]}, "length_mismatch"),
        ({"prompt": "p", "responses": "a", "scores": [1]}, "not_a_list"),
        ({"prompt": "p", "responses": ["a"], "scores": 1}, "not_a_list"),
        ({"prompt": "p", "responses": ["a"]}, "missing_field"),
        ({"responses": ["a"], "scores": [1]}, "missing_field"),
    ],
)
def test_lists_of_candidates_that_do_not_fit_together_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unreadable) as refused:
        read("candidates", row)
    assert refused.value.reason == reason


def test_in_list_form_scorer_rater_and_model_are_those_of_the_row_or_one_a_response() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "judge": "j", "by": ["x", "y"]}
    one, two = {"prompt": "p", "response": "a", "score": 1}, {"prompt": "p", "response": "b", "score": 2}
    assert read("candidates", row) == [one, two]
    assert read("candidates", row, scorer="judge", rater="by", model="judge") == [
        {**one, "scorer": "j", "rater": "x", "model": "j"},
        {**two, "scorer": "j", "rater": "y", "model": "j"},
    ]
    assert [found["model"] for found in read("candidates", row, model="judge", models="by")] == ["x", "y"]
    assert [found["scorer"] for found in read("candidates", row | {"scorer": "own"})] == ["own", "own"]
    for columns, field, reason in (
        ({"scorer": "nowhere"}, "nowhere", "missing_field"),
        ({"rater": "nowhere"}, "nowhere", "missing_field"),
        ({"model": "nowhere"}, "nowhere", "missing_field"),
        ({"score": "nowhere"}, "score", "not_in_list_form"),
        ({"responses": "responses", "response": "nowhere"}, "response", "not_in_list_form"),
        ({"response": "judge", "score": "judge", "models": "by"}, "models", "not_in_long_form"),
    ):
        with pytest.raises(Unreadable) as refused:
            read("candidates", row, **columns)
        assert (refused.value.field, refused.value.reason) == (field, reason)
    with pytest.raises(Unreadable) as refused:
        read("candidates", row | {"by": ["x"]}, rater="by")
    assert (refused.value.field, refused.value.reason) == ("rater", "length_mismatch")


def test_responses_null_reads_the_long_form_whatever_else_the_row_has() -> None:
    row = {"prompt": "p", "responses": ["all"], "response": "a", "score": 1}
    assert read("candidates", row, responses="") == [{"prompt": "p", "response": "a", "score": 1}]


SYSTEM_ROWS: dict[str, dict[str, Any]] = {
    "pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "trl": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "openrlhf": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "candidates": {"prompt": "q", "response": "a", "score": 1},
    "corrections": {"prompt": "q", "response": "a", "correction": "b"},
    "comparisons": {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"},
    "rewrite": {"prompt": "q", "response": "a"},
}


def test_every_format_whose_system_prompt_columns_can_name_is_tried_here() -> None:
    own = {"llamafactory_alpaca", "llamafactory_sharegpt"}  # they have a column of that name
    assert {name for name, form in FORMATS.items() if "system" in form.columns} - own == set(SYSTEM_ROWS)


@pytest.mark.parametrize("form", SYSTEM_ROWS)
def test_a_system_prompt_that_columns_name_is_the_first_turn_of_the_prompt(form: str) -> None:
    brief = {"role": "system", "content": "Be brief."}
    row = SYSTEM_ROWS[form] | {"system": "Be brief.", "sys": {"text": "Be brief."}}
    for path in ("system", "sys.text"):
        (found,) = read(form, row, system=path)
        assert found["prompt"] == [brief, user("q")]
        assert "system" not in found
        assert FORMATS[form].is_chat(row, {"system": path})
        assert FORMATS[form].is_chat(row | {"system": "", "sys": {"text": ""}}, {"system": path})
    assert read(form, row)[0]["prompt"] == "q"  # a column is not taken for one by its name
    assert not FORMATS[form].is_chat(row, {})
    for nothing in ("", None):
        assert read(form, row | {"system": nothing}, system="system")[0]["prompt"] == "q"
    turns = [user("q"), assistant("a"), user("more")]
    assert read(form, row | {"prompt": turns}, system="system")[0]["prompt"] == [brief, *turns]
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be long."}, user("q")]
        assert read(form, row | {"prompt": own}, system="system")[0]["prompt"] == own
    for system, field, reason in ((5, "system", "wrong_type"), (["x"], "system", "wrong_type")):
        with pytest.raises(Unreadable) as refused:
            read(form, row | {"system": system}, system="system")
        assert (refused.value.field, refused.value.reason) == (field, reason)
    with pytest.raises(Unreadable) as refused:
        read(form, row, system="nowhere")
    assert (refused.value.field, refused.value.reason) == ("nowhere", "missing_field")


def test_a_system_prompt_goes_before_a_prompt_of_several_columns_of_several_responses_or_that_is_implicit() -> None:
    brief = {"role": "system", "content": "Be brief."}
    row = {"s": "Be brief.", "a": "q", "b": "r", "prompt": "q", "responses": ["x", "y"], "scores": [1, 2]}
    joined = [brief, user("q\nr")]
    assert [found["prompt"] for found in read("candidates", row, system="s", prompt=["a", "b"])] == [joined] * 2
    sides = {"s": "Be brief.", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert read_one("trl", sides, system="s") == ([brief, user("q")], [assistant("a")], [assistant("b")])


def test_a_system_prompt_makes_a_chat_dataset_though_the_first_row_has_none(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "system": "Be brief." if n else ""} for n in range(40)]
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs", "columns": {"system": "system"}}
    built = build_dataset(pipeline_of(source, dedupe={"exact": False}))
    assert (built.kind, built.counts["pairs"], built.counts["rejects"]) == ("chat", 40, 0)
    found = pl.read_parquet(f"{built.dataset}/pairs/*.parquet").sort("source_row")["prompt"].to_list()
    assert found[0] == [user("q0")]
    assert found[1] == [{"role": "system", "content": "Be brief."}, user("q1")]


def test_a_format_knows_which_columns_it_cannot_do_without() -> None:
    assert {name: form.required for name, form in FORMATS.items() if form.columns} == {
        "pairs": ("prompt", "chosen", "rejected"),
        "candidates": ("prompt", "response", "score", "scores"),
        "corrections": ("prompt", "response", "correction"),
        "comparisons": ("prompt", "response_a", "response_b", "winner"),
        "rewrite": ("prompt", "response"),
        "hh": ("chosen", "rejected"),
        "trl": ("chosen", "rejected"),
        "openrlhf": ("chosen", "rejected"),
        "llamafactory_alpaca": ("instruction", "chosen", "rejected"),
        "llamafactory_sharegpt": ("conversations", "chosen", "rejected"),
    }
    assert all(set(form.required) <= set(form.columns) for form in FORMATS.values())


ALL_ROWS = {
    **SYSTEM_ROWS,
    "hh": {"chosen": hh("q", "a"), "rejected": hh("q", "b")},
    "llamafactory_alpaca": {"instruction": "i", "input": "q", "chosen": "a", "rejected": "b", "history": [["x", "y"]]},
    "llamafactory_sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
        "system": "s",
    },
}


@pytest.mark.parametrize("form", ALL_ROWS)
def test_each_column_that_a_format_can_do_without_may_be_null(form: str) -> None:
    row = ALL_ROWS[form] | ({"chosen": "q a", "rejected": "q b"} if form in ("trl", "openrlhf") else {})
    for name in {*FORMATS[form].columns} - {*FORMATS[form].required}:
        assert read(form, row, **{name: ""})


def test_corrections_take_dotted_columns() -> None:
    row = {"src": "p", "mt": {"out": "wrong", "system": "m"}, "pe": "right"}
    found = read("corrections", row, prompt="src", response="mt.out", correction="pe", model="mt.system")
    assert found == [{"prompt": "p", "response": "wrong", "correction": "right", "model": "m"}]


# labels of comparisons


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", " 1.00 ", "1.000"])
def test_a_whole_number_is_one_label_however_it_is_written(label: Any) -> None:
    assert label_key(label) == "1"


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("01", "01"),
        ("01.0", "01.0"),
        ("+1.0", "+1.0"),
        ("1.5", "1.5"),
        (1.5, "1.5"),
        ("1.", "1."),
        (".0", ".0"),
        ("-1.0", "-1"),
        (-1.0, "-1"),
        ("-0.0", "0"),
        (-0.0, "0"),
        ("1_0.0", "1_0.0"),
        ("١.0", "١.0"),
        ("9" * 5000 + ".0", "9" * 5000 + ".0"),
        (True, "true"),
        ("A", "a"),
        (float("nan"), "nan"),
    ],
)
def test_what_is_no_whole_number_is_the_text_that_it_is(label: Any, key: str) -> None:
    assert label_key(label) == key


def test_labels_of_a_column_of_floats_in_a_csv_are_read() -> None:
    read = with_labels([1], [2], [0])
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": winner} for winner in ("1.0", "2.0", "0.0")]
    assert [read(row, {})[0]["votes"] for row in rows] == [["a"], ["b"], ["tie"]]


# direction: a known better answer ends up chosen, in every format

DIRECTIONS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"format": "pairs"}, [{"prompt": "q", "chosen": GOOD, "rejected": BAD}]),
    (
        {"format": "pairs", "direction": "lower_is_better"},
        [{"prompt": "q", "chosen": GOOD, "rejected": BAD, "chosen_score": 1, "rejected_score": 2}],
    ),
    (
        {"format": "candidates"},
        [{"prompt": "q", "response": BAD, "score": 1}, {"prompt": "q", "response": GOOD, "score": 9}],
    ),
    (
        {"format": "candidates", "direction": "lower_is_better"},
        [{"prompt": "q", "response": BAD, "score": 9}, {"prompt": "q", "response": GOOD, "score": 1}],
    ),
    ({"format": "candidates"}, [{"prompt": "q", "responses": [BAD, GOOD], "scores": [False, True]}]),
    ({"format": "candidates"}, [{"prompt": "q", "responses": [BAD, GOOD], "scores": ["9", "10"]}]),
    (
        {"format": "candidates", "direction": "lower_is_better"},
        [{"prompt": "q", "responses": [GOOD, BAD], "scores": [1, 2]}],
    ),
    ({"format": "corrections"}, [{"prompt": "q", "response": BAD, "correction": GOOD}]),
    ({"format": "comparisons"}, [{"prompt": "q", "response_a": BAD, "response_b": GOOD, "winner": "b"}]),
    (
        {"format": "comparisons", "labels": {"a": [0], "b": [1]}},
        [{"prompt": "q", "response_a": GOOD, "response_b": BAD, "winner": [0, 1, 0]}],
    ),
    (
        {"format": "rewrite", "rules": [{"pattern": " 7 ", "replace": " 100 "}]},
        [{"prompt": "q", "response": BAD}],
    ),
    ({"format": "distilabel"}, [{"instruction": "q", "generations": [BAD, GOOD], "ratings": [1, 5]}]),
    (
        {"format": "llamafactory_messages"},
        [{f"{side}_messages": [user("q"), assistant(text)] for side, text in (("chosen", GOOD), ("rejected", BAD))}],
    ),
    ({"format": "hh"}, [{"chosen": hh("q", GOOD), "rejected": hh("q", BAD)}]),
    ({"format": "trl"}, [{"prompt": "q", "chosen": GOOD, "rejected": BAD}]),
    ({"format": "trl"}, [{"chosen": f"q? {GOOD}", "rejected": f"q? {BAD}"}]),
    ({"format": "trl"}, [{"chosen": [user("q"), assistant(GOOD)], "rejected": [user("q"), assistant(BAD)]}]),
]


@pytest.mark.parametrize(("source", "rows"), DIRECTIONS)
def test_the_better_answer_ends_up_chosen(
    source: dict[str, Any],
    rows: list[dict[str, Any]],
    write_jsonl: Callable[..., Path],
    pipeline_of: Callable[..., Pipeline],
) -> None:
    built = build_dataset(pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), **source}))
    pair = pl.read_parquet(f"{built.dataset}/pairs/*.parquet").row(0, named=True)
    sides = [side if isinstance(side, str) else side[0]["content"] for side in (pair["chosen"], pair["rejected"])]
    assert "100" in sides[0]
    assert "100" not in sides[1]
    assert pair["margin"] is None or pair["margin"] > 0


def test_every_format_that_builds_pairs_has_a_test_of_its_direction() -> None:
    here = {source["format"] for source, _ in DIRECTIONS}
    outside = {form for form, _ in test_formats_outside.FAVOUR_OF_GOOD}
    written = {*test_formats_written.BOTH_WAYS}  # a pair comes back from its file with each side in its place
    assert here | outside | written == set(FORMATS)


# the kind of dataset that a format asks for where the pipeline leaves it open


@pytest.mark.parametrize(
    ("form", "row", "columns", "kind"),
    [
        ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}, {}, "text"),
        ("pairs", {"prompt": [user("p")], "chosen": "c", "rejected": "r"}, {}, "chat"),
        ("pairs", {"data": {"p": [user("p")]}, "chosen": "c", "rejected": "r"}, {"prompt": "data.p"}, "chat"),
        ("candidates", {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, {}, "text"),
        (
            "candidates",
            {"prompt": "p", "responses": [[assistant("a")], [assistant("b")]], "scores": [1, 2]},
            {},
            "chat",
        ),
        ("corrections", {"prompt": "p", "response": [assistant("a")], "correction": [assistant("b")]}, {}, "chat"),
        ("hh", {"chosen": hh("q", "a"), "rejected": hh("q", "b")}, {}, "chat"),
        ("trl", {"prompt": "p", "chosen": "c", "rejected": "r"}, {}, "text"),
        ("trl", {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, {}, "chat"),
        (
            "trl",
            {"d": {"c": [user("q"), assistant("a")], "r": [user("q"), assistant("b")]}},
            {"chosen": "d.c", "rejected": "d.r"},
            "chat",
        ),
    ],
)
def test_rows_of_messages_make_a_chat_dataset_and_rows_of_text_a_text_dataset(
    form: str,
    row: dict[str, Any],
    columns: dict[str, str],
    kind: str,
    write_jsonl: Callable[..., Path],
    pipeline_of: Callable[..., Pipeline],
) -> None:
    source = {"path": str(write_jsonl("rows.jsonl", [row])), "format": form, "columns": columns}
    built = build_dataset(pipeline_of(source))
    assert (built.kind, built.counts["pairs"]) == (kind, 1)
