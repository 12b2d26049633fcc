"""Every published layout is read in its own direction, is known by its own fields, and no row of it is ever a crash.

The rows are made up by the documentation of each format; none is from its data.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.formats import FORMATS, Unreadable
from prefkit.records import RECORDS

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True, database=None)
ASKED = "At what temperature does water boil at sea level?"
GOOD, BAD = "Water boils at 100 degrees Celsius.", "Water boils at 7 degrees Celsius."

Row = dict[str, Any]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def completion(response: str, overall: Any, fine: Any, ratings: list[str]) -> Row:
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {n: {"Rating": r, "Rationale": "made up"} for n, r in zip(names, ratings, strict=True)}
    scores = {"overall_score": overall, "fine-grained_score": fine, "annotations": annotations}
    return {
        "model": f"model of {overall}",
        "response": response,
        "critique": "made up",
        "principle": "honesty",
    } | scores


def rated(response: str, *ratings: float) -> Row:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": ASKED, "response": response, **dict(zip(names, ratings, strict=True))}


POST = {
    "id": "t3_x",
    "post": "The kettle sings.",
    "title": "Tea",
    "subreddit": "cooking",
    "site": None,
    "article": None,
}
# every row prefers GOOD to BAD
ROWS: dict[str, Row] = {
    "ultrafeedback": {
        "source": "made_up",
        "instruction": ASKED,
        "models": ["one", "two"],
        "completions": [
            completion(BAD, 3.0, 2.25, ["2", "3", "2", "2"]),
            completion(GOOD, 8.5, 4.75, ["5", "5", "4", "5"]),
        ],
    },
    "argilla_cleaned": {
        "source": "made_up",
        "prompt": ASKED,
        "chosen": [user(ASKED), assistant(GOOD)],
        "chosen-rating": 4.75,
        "chosen-model": "one",
        "rejected": [user(ASKED), assistant(BAD)],
        "rejected-rating": 2.25,
        "rejected-model": "two",
    },
    "helpsteer2": rated(GOOD, 4, 4, 4, 1, 1),
    "helpsteer3": {
        "domain": "general",
        "language": "english",
        "context": [user("Hello."), assistant("Hello, what is it?"), user(ASKED)],
        "response1": GOOD,
        "response2": BAD,
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": "made up"}],
    },
    "openai_summarize": {
        "info": POST,
        "summaries": [{"text": " " + BAD, "policy": "one"}, {"text": " " + GOOD, "policy": "two"}],
        "choice": 1,
        "worker": "w",
        "split": "train",
    },
    "shp": {
        "post_id": "p",
        "history": ASKED,
        "human_ref_A": GOOD,
        "human_ref_B": BAD,
        "labels": 1,
        "score_A": 30,
        "score_B": 12,
        "score_ratio": 2.5,
    },
    "nectar": {
        "prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ",
        "answers": [{"answer": GOOD, "model": "one", "rank": 1.0}, {"answer": BAD, "model": "two", "rank": 7.0}],
        "turns": 1,
        "num_responses": 2,
        "source": ["made_up"],
        "good_natured": True,
    },
    "stackexchange_paired": {
        "qid": 1,
        "question": ASKED,
        "date": "2020/01/01",
        "metadata": ["made up"],
        "response_j": GOOD,
        "response_k": BAD,
    },
    "stackexchange": {
        "qid": 1,
        "question": ASKED,
        "answers": [
            {"answer_id": 2, "text": BAD, "pm_score": -1, "selected": False},
            {"answer_id": 3, "text": GOOD, "pm_score": 4, "selected": True},
        ],
    },
    "lmarena": {
        "question_id": "q",
        "model_a": "one",
        "model_b": "two",
        "winner": "model_b",
        "conversation_a": [user(ASKED), assistant(BAD)],
        "conversation_b": [user(ASKED), assistant(GOOD)],
        "turn": 1,
        "language": "English",
    },
    "alpaca_eval": {
        "dataset": "made_up",
        "instruction": ASKED,
        "output_1": BAD,
        "output_2": GOOD,
        "generator_1": "one",
        "generator_2": "two",
        "annotator": "a judge",
        "preference": 2.0,
    },
}
OUTSIDE = list(ROWS)


def change(form: str, **values: Any) -> Row:
    return copy.deepcopy(ROWS[form]) | values


def read(form: str, row: Row) -> list[Row]:
    return FORMATS[form].read(row, {})


def read_one(form: str, row: Row) -> Row:
    (record,) = read(form, row)
    return record


def refused(form: str, row: Row) -> tuple[str | None, str]:
    with pytest.raises(Unreadable) as error:
        read(form, row)
    return error.value.field, error.value.reason


# direction


FAVOUR_OF_GOOD: list[tuple[str, list[Row]]] = [
    *((form, [row]) for form, row in ROWS.items() if form != "helpsteer2"),
    # the same two sides, the other way round
    ("ultrafeedback", [change("ultrafeedback", completions=ROWS["ultrafeedback"]["completions"][::-1])]),
    ("helpsteer2", [rated(BAD, 1, 0, 3, 1, 1), rated(GOOD, 4, 4, 4, 1, 1)]),
    ("helpsteer2", [rated(GOOD, 3, 3, 3, 1, 1), rated(BAD, 3, 3, 3, 1, 4)]),  # the same, said at more length
    ("helpsteer3", [change("helpsteer3", response1=BAD, response2=GOOD, overall_preference=1)]),
    ("openai_summarize", [change("openai_summarize", summaries=[{"text": GOOD}, {"text": BAD}], choice=0)]),
    ("shp", [change("shp", human_ref_A=BAD, human_ref_B=GOOD, labels=0, score_A=12, score_B=30)]),
    ("nectar", [change("nectar", answers=ROWS["nectar"]["answers"][::-1])]),
    ("stackexchange", [change("stackexchange", answers=ROWS["stackexchange"]["answers"][::-1])]),
    (
        "lmarena",
        [
            change(
                "lmarena",
                conversation_a=[user(ASKED), assistant(GOOD)],
                conversation_b=[user(ASKED), assistant(BAD)],
                winner="model_a",
            )
        ],
    ),
    ("alpaca_eval", [change("alpaca_eval", output_1=GOOD, output_2=BAD, preference=1)]),
    ("alpaca_eval", [change("alpaca_eval", preference=1.51)]),
    ("alpaca_eval", [change("alpaca_eval", output_1=GOOD, output_2=BAD, preference="1.49")]),
]


def texts(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def best_and_worst(form: str, rows: list[Row]) -> tuple[Any, Any]:
    """Which response the records of the rows prefer to which, read off by hand."""
    records = [record for row in rows for record in read(form, row)]
    if FORMATS[form].family == "candidates":
        ranked = sorted(records, key=lambda record: float(record["score"]))
        assert ranked[0]["score"] < ranked[-1]["score"]
        return ranked[-1]["response"], ranked[0]["response"]
    (record,) = records
    if FORMATS[form].family == "pairs":
        return record["chosen"], record["rejected"]
    assert record["votes"] in (["a"], ["b"])
    sides = (record["response_a"], record["response_b"])
    return sides if record["votes"] == ["a"] else sides[::-1]


@pytest.mark.parametrize(("form", "rows"), FAVOUR_OF_GOOD)
def test_the_record_prefers_the_answer_that_the_row_prefers(form: str, rows: list[Row]) -> None:
    best, worst = best_and_worst(form, rows)
    assert texts(best).strip() == GOOD
    assert texts(worst).strip() == BAD


@pytest.mark.parametrize(("form", "rows"), FAVOUR_OF_GOOD)
def test_the_better_answer_is_chosen_in_the_dataset(
    form: str, rows: list[Row], write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    built = build_dataset(pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": form}))
    assert built.counts["rejects"] == 0
    pair = pl.read_parquet(f"{built.dataset}/pairs/*.parquet").row(0, named=True)
    assert texts(pair["chosen"]).strip() == GOOD
    assert texts(pair["rejected"]).strip() == BAD
    assert pair["margin"] is None or pair["margin"] > 0


def test_every_outside_format_has_a_row_that_says_which_answer_is_better() -> None:
    assert {form for form, _ in FAVOUR_OF_GOOD} == set(OUTSIDE)


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_format_says_its_direction_and_what_it_can_be_known_by(form: str) -> None:
    said = FORMATS[form]
    assert said.name == form
    assert said.direction
    assert said.detect is not None
    assert not said.columns


def test_formats_of_conversations_make_a_chat_dataset_and_formats_of_texts_a_text_dataset() -> None:
    chat = {form for form, row in ROWS.items() if FORMATS[form].is_chat(row, {})}
    assert chat == {"argilla_cleaned", "helpsteer2", "helpsteer3", "nectar", "lmarena"}


# ties


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        ("helpsteer3", {"overall_preference": 0}),
        ("lmarena", {"winner": "tie"}),
        ("lmarena", {"winner": "tie (bothbad)"}),
        ("lmarena", {"winner": "both_bad"}),
        ("alpaca_eval", {"preference": 1.5}),
        ("alpaca_eval", {"preference": 0}),
    ],
)
def test_a_tie_is_a_win_for_neither_side(form: str, changed: Row) -> None:
    assert read_one(form, change(form, **changed))["votes"] == ["tie"]


# what each reader makes of its row


def test_ultrafeedback_gives_a_candidate_for_each_completion() -> None:
    assert read("ultrafeedback", ROWS["ultrafeedback"]) == [
        {"prompt": ASKED, "response": BAD, "score": 3.0, "model": "model of 3.0"},
        {"prompt": ASKED, "response": GOOD, "score": 8.5, "model": "model of 8.5"},
    ]


@pytest.mark.parametrize(
    ("overall", "fine", "ratings", "score"),
    [
        (10, 1.0, ["1", "1", "1", "1"], 1),  # the known fault: a 1 that was read as 10
        (10, 2.0, ["2", "2", "2", "2"], 1),
        ("10", "1.25", ["1", "1", "1", "2"], 1),
        (10.0, None, ["1", "N/A", "2", "1"], 1),  # no fine-grained score: the mean of the ratings that are numbers
        (10.0, None, ["5", "N/A", "5", "5"], 10),
        (10.0, 3.5, ["3", "4", "3", "4"], 7),  # neither here nor there: the aspects, doubled
        (10.0, 4.0, ["4", "4", "4", "4"], 8),
        (10.0, 4.25, ["4", "4", "4", "5"], 10),
        (10.0, 5.0, ["5", "5", "5", "5"], 10),
        (10.0, None, ["N/A", "N/A", "N/A", "N/A"], 10),  # nothing denies it
        (9.0, 1.0, ["1", "1", "1", "1"], 9),  # the fault is known of 10 alone
    ],
)
def test_ultrafeedback_believes_the_aspects_where_they_deny_a_ten(
    overall: Any, fine: Any, ratings: list[str], score: float
) -> None:
    row = change("ultrafeedback", completions=[completion(BAD, overall, fine, ratings)])
    assert read_one("ultrafeedback", row)["score"] == score


def test_ultrafeedback_a_faulty_ten_is_not_the_best_of_its_row() -> None:
    faulty = completion(BAD, 10, 1.0, ["1", "1", "1", "1"])
    row = change("ultrafeedback", completions=[faulty, completion(GOOD, 7, 4.5, ["4", "5", "4", "5"])])
    assert best_and_worst("ultrafeedback", [row]) == (GOOD, BAD)


def test_ultrafeedback_a_ten_without_annotations_stays() -> None:
    bare = {"response": GOOD, "overall_score": 10, "annotations": None}
    assert read_one("ultrafeedback", {"instruction": ASKED, "completions": [bare]})["score"] == 10


def test_argilla_splits_the_prompt_off_both_sides_and_keeps_ratings_and_models() -> None:
    assert read_one("argilla_cleaned", ROWS["argilla_cleaned"]) == {
        "prompt": [user(ASKED)],
        "chosen": [assistant(GOOD)],
        "rejected": [assistant(BAD)],
        "chosen_score": 4.75,
        "rejected_score": 2.25,
        "chosen_model": "one",
        "rejected_model": "two",
    }


@pytest.mark.parametrize(
    ("rejected", "fault"),
    [
        ([user("Another question."), assistant(BAD)], ("rejected", "different_prompts")),
        ([user(ASKED), assistant(BAD), user("And then?")], ("rejected", "no_assistant_turn")),
        ([assistant(BAD)], ("rejected", "no_shared_prompt")),
        ([], ("rejected", "no_assistant_turn")),
        ("text", ("rejected", "not_a_list")),
        ([user(ASKED), BAD], ("rejected.1", "wrong_type")),
        ([{"content": ASKED}, assistant(BAD)], ("rejected.0.role", "missing_field")),
        ([{"role": 1, "content": ASKED}, assistant(BAD)], ("rejected.0.role", "wrong_type")),
    ],
)
def test_argilla_sides_that_are_not_two_answers_to_one_prompt_are_refused(
    rejected: Any, fault: tuple[str, str]
) -> None:
    assert refused("argilla_cleaned", change("argilla_cleaned", rejected=rejected)) == fault


CALLED = [assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": n}}}]} for n in (1, 2)]


def test_prompts_that_differ_in_their_tool_calls_alone_are_different_prompts() -> None:
    talks = [
        [user(ASKED), called, user("And?"), assistant(text)] for called, text in zip(CALLED, (GOOD, BAD), strict=True)
    ]
    row = change("argilla_cleaned", chosen=talks[0], rejected=talks[1])
    assert refused("argilla_cleaned", row) == ("rejected", "different_prompts")
    record = read_one("lmarena", arena(*talks))
    assert (record["prompt"], record["response_a"], record["response_b"]) == ([user(ASKED)], talks[0][1:], talks[1][1:])
    named = [[user(ASKED) | {"name": name}, assistant(text)] for name, text in (("Bo", GOOD), ("Al", BAD))]
    assert refused("lmarena", arena(*named)) == ("conversation_b", "different_prompts")


def test_prompts_that_differ_in_what_records_ignore_are_the_same() -> None:
    one, other = ([user(ASKED) | {"id": n, "name": None}, assistant(text)] for n, text in ((1, GOOD), (2, BAD)))
    record = read_one("argilla_cleaned", change("argilla_cleaned", chosen=one, rejected=other))
    assert (record["prompt"], record["rejected"]) == (one[:1], other[1:])
    assert read_one("lmarena", arena(one, other))["prompt"] == one[:1]


@pytest.mark.parametrize(
    ("ratings", "score"),
    [
        ((4, 0, 0, 0, 0), 2.6),
        ((0, 4, 0, 0, 0), 3.2),
        ((0, 0, 4, 0, 0), 1.8),
        ((0, 0, 0, 4, 0), 2.2),
        ((0, 0, 0, 0, 4), -1.6),
        ((3, 4, 4, 2, 1), 7.65),  # 1.95 + 3.2 + 1.8 + 1.1 - .4
        (("3", "4", "4", "2", "1"), 7.65),
    ],
)
def test_helpsteer2_scores_by_the_published_weights_with_verbosity_against(ratings: Any, score: float) -> None:
    assert read_one("helpsteer2", rated(GOOD, *ratings)) == {"prompt": ASKED, "response": GOOD, "score": score}


def test_helpsteer2_prompts_of_several_turns_become_messages() -> None:
    prompt = "One\nmore\n<extra_id_1>Assistant\n Two \n<extra_id_1>User\nThree"
    row = rated(GOOD, 1, 1, 1, 1, 1) | {"prompt": prompt}
    assert read_one("helpsteer2", row)["prompt"] == [user("One\nmore"), assistant(" Two "), user("Three")]


@pytest.mark.parametrize(("rating", "reason"), [(5, "out_of_range"), (-1, "out_of_range"), ("N/A", "not_a_number")])
def test_helpsteer2_ratings_outside_the_scale_are_refused(rating: Any, reason: str) -> None:
    assert refused("helpsteer2", change("helpsteer2", verbosity=rating)) == ("verbosity", reason)


def test_helpsteer3_keeps_the_context_and_puts_response1_first() -> None:
    assert read_one("helpsteer3", ROWS["helpsteer3"]) == {
        "prompt": [user("Hello."), assistant("Hello, what is it?"), user(ASKED)],
        "response_a": GOOD,
        "response_b": BAD,
        "votes": ["a"],
    }


@pytest.mark.parametrize(
    ("preference", "votes"), [(-3, "a"), (-2, "a"), (-1, "a"), (0, "tie"), (1, "b"), (2, "b"), (3, "b"), ("-1", "a")]
)
def test_helpsteer3_below_zero_response1_is_better(preference: Any, votes: str) -> None:
    assert read_one("helpsteer3", change("helpsteer3", overall_preference=preference))["votes"] == [votes]


@pytest.mark.parametrize(
    ("preference", "reason"),
    [(4, "out_of_range"), (-100, "out_of_range"), (None, "not_a_number"), (True, "not_a_number"), ("", "not_a_number")],
)
def test_helpsteer3_preferences_outside_the_scale_are_refused(preference: Any, reason: str) -> None:
    row = change("helpsteer3", overall_preference=preference)
    assert refused("helpsteer3", row) == ("overall_preference", reason)


def test_summarize_lays_the_post_out_as_the_paper_does_and_keeps_the_space_of_the_summary() -> None:
    assert read_one("openai_summarize", ROWS["openai_summarize"]) == {
        "prompt": "SUBREDDIT: r/cooking\n\nTITLE: Tea\n\nPOST: The kettle sings.\n\nTL;DR:",
        "response_a": " " + BAD,
        "response_b": " " + GOOD,
        "votes": ["b"],
        "model_a": "one",
        "model_b": "two",
    }


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"info": POST | {"post": None, "article": "News."}}, ("info.post", "wrong_type")),
        ({"info": None}, ("info.subreddit", "missing_field")),
        ({"summaries": [{"text": "one"}]}, ("summaries", "length_mismatch")),
        ({"summaries": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}, ("summaries", "length_mismatch")),
        ({"summaries": []}, ("summaries", "no_responses")),
        ({"summaries": "ab"}, ("summaries", "not_a_list")),
        ({"summaries": ["a", "b"]}, ("summaries.0", "wrong_type")),
        ({"summaries": [{"text": "a"}, {}]}, ("summaries.1.text", "missing_field")),
        ({"choice": 2}, ("choice", "unknown_label")),
        ({"choice": True}, ("choice", "unknown_label")),
        ({"choice": [1]}, ("choice", "wrong_type")),
        ({"choice": None}, ("choice", "no_verdict")),
    ],
)
def test_summarize_rows_that_hold_no_choice_between_two_summaries_are_refused(
    changed: Row, fault: tuple[str, str]
) -> None:
    assert refused("openai_summarize", change("openai_summarize", **changed)) == fault


def test_shp_label_one_is_a_and_the_scores_stay_with_their_sides() -> None:
    assert read_one("shp", ROWS["shp"]) == {
        "prompt": ASKED,
        "response_a": GOOD,
        "response_b": BAD,
        "votes": ["a"],
        "score_a": 30,
        "score_b": 12,
    }
    labels = (0, 1, 0.0, "1", "1.0", "0.0")
    votes = [read_one("shp", change("shp", labels=label))["votes"] for label in labels]
    assert votes == [["b"], ["a"], ["b"], ["a"], ["a"], ["b"]]
    assert refused("shp", change("shp", labels=2)) == ("labels", "unknown_label")


def test_nectar_rank_one_has_the_highest_score_and_the_empty_last_turn_goes() -> None:
    assert read("nectar", ROWS["nectar"]) == [
        {"prompt": [user(ASKED)], "response": GOOD, "score": -1.0, "model": "one"},
        {"prompt": [user(ASKED)], "response": BAD, "score": -7.0, "model": "two"},
    ]


def test_nectar_keeps_the_earlier_turns_of_a_transcript() -> None:
    row = change("nectar", prompt="\n\nHuman: Hello.\n\nAssistant: Hello.\n\nHuman: Go on.\n\nAssistant:")
    assert read("nectar", row)[0]["prompt"] == [user("Hello."), assistant("Hello."), user("Go on.")]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"prompt": ASKED}, ("prompt", "not_a_transcript")),
        ({"prompt": "\n\nAssistant: "}, ("prompt", "not_a_transcript")),
        ({"prompt": None}, ("prompt", "wrong_type")),
        ({"answers": []}, ("answers", "no_responses")),
        ({"answers": [{"answer": GOOD, "rank": "first"}]}, ("answers.0.rank", "not_a_number")),
        ({"answers": [{"answer": GOOD}]}, ("answers.0.rank", "missing_field")),
        ({"answers": [{"rank": 1}]}, ("answers.0.answer", "missing_field")),
    ],
)
def test_nectar_rows_without_ranked_answers_are_refused(changed: Row, fault: tuple[str, str]) -> None:
    assert refused("nectar", change("nectar", **changed)) == fault


def test_stackexchange_reads_its_pairs_and_its_scored_answers() -> None:
    assert read_one("stackexchange_paired", ROWS["stackexchange_paired"]) == {
        "prompt": ASKED,
        "chosen": GOOD,
        "rejected": BAD,
    }
    assert read("stackexchange", ROWS["stackexchange"]) == [
        {"prompt": ASKED, "response": BAD, "score": -1},
        {"prompt": ASKED, "response": GOOD, "score": 4},
    ]


def arena(a: list[Row], b: list[Row]) -> Row:
    return change("lmarena", conversation_a=a, conversation_b=b)


def test_lmarena_splits_after_the_user_turn_and_names_the_models() -> None:
    assert read_one("lmarena", ROWS["lmarena"]) == {
        "prompt": [user(ASKED)],
        "response_a": [assistant(BAD)],
        "response_b": [assistant(GOOD)],
        "votes": ["b"],
        "model_a": "one",
        "model_b": "two",
    }


def test_lmarena_earlier_answers_that_are_equal_belong_to_the_prompt() -> None:
    shared = [{"role": "system", "content": "s"}, user("1"), assistant("same"), user("2")]
    record = read_one("lmarena", arena([*shared, assistant("x")], [*shared, assistant("y")]))
    assert record["prompt"] == shared
    assert (record["response_a"], record["response_b"]) == ([assistant("x")], [assistant("y")])


def test_lmarena_earlier_answers_that_differ_belong_to_the_sides_with_all_that_follows() -> None:
    a = [user("1"), assistant("x1"), user("2"), assistant("x2")]
    b = [user("1"), assistant("y1"), user("2"), assistant("y2")]
    record = read_one("lmarena", arena(a, b))
    assert (record["prompt"], record["response_a"], record["response_b"]) == ([user("1")], a[1:], b[1:])


def test_lmarena_an_answer_that_both_sides_share_is_never_moved_into_the_prompt() -> None:
    same = [user("1"), assistant("x")]
    for b in (same, [*same, assistant("and more")]):
        record = read_one("lmarena", arena(same, b))
        assert (record["prompt"], record["response_a"], record["response_b"]) == ([user("1")], same[1:], b[1:])


def test_lmarena_contents_may_be_lists_of_text_parts() -> None:
    def parts(said: str) -> list[Row]:
        return [{"type": "text", "text": said, "image": None, "mimeType": None}]

    a, b = ([user(parts(ASKED)), assistant(parts(answer))] for answer in (BAD, GOOD))
    record = RECORDS["comparisons"].model_validate(read_one("lmarena", arena(a, b))).model_dump()
    assert [texts(record[name]) for name in ("prompt", "response_a", "response_b")] == [ASKED, BAD, GOOD]


@pytest.mark.parametrize(
    ("a", "b", "fault"),
    [
        ([user("1"), assistant("x")], [user("2"), assistant("y")], ("conversation_b", "different_prompts")),
        (
            [user("1"), assistant("x"), user("2"), assistant("x")],
            [user("1"), assistant("x")],
            ("conversation_b", "different_prompts"),
        ),
        ([assistant("x")], [assistant("y")], ("conversation_a", "no_shared_prompt")),
        ([], [], ("conversation_a", "no_shared_prompt")),
        ([user("1"), assistant("x")], [user("1")], ("conversation_b", "no_assistant_turn")),
        ([user("1")], [user("1"), assistant("x")], ("conversation_a", "no_assistant_turn")),
    ],
)
def test_lmarena_conversations_that_are_not_answers_to_the_same_turns_are_refused(
    a: list[Row], b: list[Row], fault: tuple[str, str]
) -> None:
    assert refused("lmarena", arena(a, b)) == fault


@pytest.mark.parametrize("winner", ["one", "a", "model_c", "", 1])
def test_lmarena_a_winner_that_is_no_side_is_refused(winner: Any) -> None:
    assert refused("lmarena", change("lmarena", winner=winner)) == ("winner", "unknown_label")


def test_alpaca_eval_keeps_both_probabilities_as_scores() -> None:
    assert read_one("alpaca_eval", change("alpaca_eval", preference=1.25)) == {
        "prompt": ASKED,
        "response_a": BAD,
        "response_b": GOOD,
        "votes": ["a"],
        "score_a": 0.75,
        "score_b": 0.25,
        "model_a": "one",
        "model_b": "two",
    }


def test_alpaca_eval_an_input_apart_from_the_instruction_is_part_of_the_prompt() -> None:
    row = change("alpaca_eval", instruction="Translate.", input="Wasser")
    assert read_one("alpaca_eval", row)["prompt"] == "Translate.\n\nWasser"
    for nothing in ("", None):
        assert read_one("alpaca_eval", change("alpaca_eval", input=nothing))["prompt"] == ASKED


@pytest.mark.parametrize(
    ("preference", "reason"),
    [(3, "out_of_range"), (0.5, "out_of_range"), (-1, "out_of_range"), (None, "not_a_number"), (True, "not_a_number")],
)
def test_alpaca_eval_preferences_outside_the_scale_are_refused(preference: Any, reason: str) -> None:
    row = change("alpaca_eval", preference=preference)
    assert refused("alpaca_eval", row) == ("preference", reason)


# what is missing


NEEDED: dict[str, tuple[str, ...]] = {
    "ultrafeedback": ("instruction", "completions"),
    "argilla_cleaned": ("chosen", "rejected"),
    "helpsteer2": ("prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),
    "helpsteer3": ("context", "response1", "response2", "overall_preference"),
    "openai_summarize": ("summaries", "choice"),
    "shp": ("history", "human_ref_A", "human_ref_B", "labels"),
    "nectar": ("prompt", "answers"),
    "stackexchange_paired": ("question", "response_j", "response_k"),
    "stackexchange": ("question", "answers"),
    "lmarena": ("conversation_a", "conversation_b", "winner"),
    "alpaca_eval": ("instruction", "output_1", "output_2", "preference"),
}
EACH_NEEDED = [(form, field) for form in OUTSIDE for field in NEEDED[form]]


@pytest.mark.parametrize(("form", "field"), EACH_NEEDED)
def test_a_row_without_a_field_that_the_format_needs_is_refused_by_its_name(form: str, field: str) -> None:
    row = change(form)
    del row[field]
    assert refused(form, row) == (field, "missing_field")


@pytest.mark.parametrize(
    ("form", "field"),
    [("ultrafeedback", "completions"), ("nectar", "answers"), ("stackexchange", "answers")],
)
def test_a_row_without_any_response_is_refused(form: str, field: str) -> None:
    assert refused(form, change(form, **{field: []})) == (field, "no_responses")
    assert refused(form, change(form, **{field: None})) == (field, "not_a_list")
    assert refused(form, change(form, **{field: [5]})) == (f"{field}.0", "wrong_type")


@pytest.mark.parametrize(
    ("form", "where", "field"),
    [
        ("ultrafeedback", "completions", "response"),
        ("ultrafeedback", "completions", "overall_score"),
        ("stackexchange", "answers", "text"),
        ("stackexchange", "answers", "pm_score"),
    ],
)
def test_a_response_without_its_text_or_score_is_refused_by_its_place(form: str, where: str, field: str) -> None:
    row = change(form)
    del row[where][1][field]
    assert refused(form, row) == (f"{where}.1.{field}", "missing_field")


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ("helpsteer2", "prompt"),
        ("helpsteer2", "response"),
        ("helpsteer3", "response1"),
        ("shp", "history"),
        ("shp", "human_ref_A"),
        ("stackexchange_paired", "response_j"),
        ("stackexchange", "question"),
        ("alpaca_eval", "instruction"),
        ("alpaca_eval", "output_2"),
        ("alpaca_eval", "input"),
    ],
)
@pytest.mark.parametrize("value", [5, ["a"], {"a": "b"}])
def test_a_text_that_is_no_text_is_refused_by_its_name(form: str, field: str, value: Any) -> None:
    assert refused(form, change(form, **{field: value})) == (field, "wrong_type")


# detection


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_row_is_taken_for_its_own_format_and_for_no_other(form: str) -> None:
    fits = {name for name, known in FORMATS.items() if known.detect is not None and known.detect(ROWS[form])}
    assert fits == {form}


@pytest.mark.parametrize(("form", "field"), EACH_NEEDED)
def test_a_row_that_lacks_a_field_of_the_format_is_not_taken_for_it(form: str, field: str) -> None:
    row = change(form)
    del row[field]
    detect = FORMATS[form].detect
    assert detect is not None
    assert detect(row) is None


# whatever the row holds


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-4, 11),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(
            ["10", "N/A", "1_0", "nan", "model_a", "tie", "user", "assistant", "\n\nHuman: x", "\n\nAssistant:"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.fixed_dictionaries({}, optional={"role": inner, "content": inner, "text": inner, "rank": inner}),
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inside for found in ((*path, key), *places(one, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, form: str) -> Row:
    """A row of a format in which up to three values, at any depth, are something else or gone."""
    row = copy.deepcopy(ROWS[form])
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(row)))
        holder: Any = row
        for key in path:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(JSON)
        else:
            del holder[last]
        if not row:
            break
    return row


def check_is_read_or_refused(form: str, row: Row) -> None:
    known = FORMATS[form]
    before = copy.deepcopy(row)
    try:
        records = known.read(row, {})
    except Unreadable:
        return
    finally:
        assert repr(row) == repr(before)
    assert records
    for record in records:
        assert set(record) <= set(RECORDS[known.family].model_fields)
        assert known.family != "comparisons" or record["votes"] in (["a"], ["b"], ["tie"])
        with contextlib.suppress(ValidationError):
            RECORDS[known.family].model_validate(record)


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_damaged_row_is_read_or_refused_and_left_as_it_was(form: str) -> None:
    @PROPERTY
    @given(damaged(form))
    def check(row: Row) -> None:
        check_is_read_or_refused(form, row)
        assert isinstance(FORMATS[form].is_chat(row, {}), bool)

    check()


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_row_of_any_values_under_the_right_names_is_read_or_refused(form: str) -> None:
    fields: Mapping[str, Any] = dict.fromkeys(ROWS[form], JSON)

    @PROPERTY
    @given(st.fixed_dictionaries({}, optional=fields))
    def check(row: Row) -> None:
        check_is_read_or_refused(form, row)
        for known in FORMATS.values():
            assert known.detect is None or isinstance(known.detect(row), str | None)

    check()
