"""What is written in another trainer's format comes back as it was, keeps that trainer's rules, or is left out by name.

The rows and texts are made up; the rules are the consumers' own, as their documentation and readers state them.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.detection import fitting
from prefkit.formats import FORMATS, WRITERS, Unreadable
from prefkit.formats.writing import Messages, Unwritable, Written, unpacked
from prefkit.records import RECORDS, Pair

TEXT_WRITERS = {name: writer for name, writer in WRITERS.items() if writer.reference != "ids"}
PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
Row = dict[str, Any]


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
]
SYSTEM, ASK, MORE = turn("system", "Be brief."), turn("user", "Hello?"), turn("user", "And now?")
YES, NO = turn("assistant", "Yes, of course."), turn("assistant", "No.")
CALLS = turn("assistant", "", tool_calls=[call("weather", {"city": "Köln"}), call("weather", {"city": "Rom"})])
ANSWERS = [turn("tool", '{"sky": "grey"}'), turn("tool", "sunny")]


def pair(
    prompt: str | Messages = "Hello?",
    chosen: str | Messages = "Yes, of course.",
    rejected: str | Messages = "No.",
    tools: list[dict[str, Any]] | None = None,
    **row: Any,
) -> Written:
    return Written(prompt, chosen, rejected, tools, {"pair_id": "f" * 64, "prompt_id": "e" * 64, "weight": 1.0, **row})


def chat(prompt: Messages, chosen: Any = YES, rejected: Any = NO, **more: Any) -> Written:
    """A pair of messages; a side may be one turn."""
    sides = [side if isinstance(side, list) else [side] for side in (chosen, rejected)]
    return pair(prompt, sides[0], sides[1], **more)


def wire(row: Row) -> Row:
    """A row as a file gives it back."""
    back: Row = json.loads(json.dumps(row, ensure_ascii=False))
    return back


def read_back(form: str, row: Row) -> Written:
    """What a reader and the record's own checks make of a row."""
    (fields,) = FORMATS[form].read(wire(row), {})
    record = RECORDS["pairs"].model_validate(fields)
    assert isinstance(record, Pair)
    dumped = record.model_dump()
    prompt, chosen, rejected = (unpacked(dumped.pop(name)) for name in ("prompt", "chosen", "rejected"))
    tools = json.loads(record.tools) if record.tools else None
    return Written(prompt, chosen, rejected, tools, dumped)


def written(form: str, given: Written) -> Row:
    (row,) = TEXT_WRITERS[form].write(given)
    return wire(row)


def as_chat(text: str | Messages, role: str) -> Messages:
    return [turn(role, text)] if isinstance(text, str) else text


def texts(given: Written) -> list[Messages]:
    """Prompt and sides as messages, whatever the kind of the dataset."""
    return [
        as_chat(text, role)
        for text, role in ((given.prompt, "user"), (given.chosen, "assistant"), (given.rejected, "assistant"))
    ]


HARD = [
    "Grüße, 世界 \U0001f600 e\u0301",
    '{"role": "user", "content": "[1, 2]"}',
    " leading and trailing \n\n",
    'line\u2028separator\tand \\n and "quotes" and null',
    "[]",
]
TEXT_PAIRS = {
    "plain": pair(),
    **{f"hard text {n}": pair(text, f"{text}!", f"{text}?") for n, text in enumerate(HARD)},
}
CHAT_PAIRS = {
    "one turn": chat([ASK]),
    "a system turn": chat([SYSTEM, ASK]),
    "several turns": chat([SYSTEM, ASK, NO, MORE]),
    **{
        f"hard turns {n}": chat([turn("system", text), turn("user", text), turn("assistant", text), ASK], YES, NO)
        for n, text in enumerate(HARD)
    },
}
TOOL_PAIRS = {
    "a call is chosen": chat([ASK], turn("assistant", "", tool_calls=CALLS["tool_calls"][:1]), NO),
    "a call is rejected": chat([SYSTEM, ASK], YES, CALLS),
    "a call was answered": chat([ASK, turn("assistant", "", tool_calls=CALLS["tool_calls"][:1]), ANSWERS[0]], YES, NO),
}
SCORES: Row = {"chosen_score": 4.5, "rejected_score": -1.0, "chosen_model": "big", "rejected_model": "small"}
SCORED = {
    "pairs": SCORES,
    "ultrafeedback_binarized": {name: SCORES[name] for name in ("chosen_score", "rejected_score")},
    "distilabel_pairs": SCORES,
}
BOTH_WAYS = [name for name in TEXT_WRITERS if name in FORMATS]
KEEPS_TOOL_CALLS = {"pairs", "trl", "openrlhf", "nemo_rl", "ms_swift", "llamafactory_sharegpt", "openai_preference"}
KEEPS_TOOLS = {"pairs", "trl", "ms_swift", "llamafactory_sharegpt", "openai_preference"}


# round trips


def test_every_format_but_those_for_one_way_is_read_as_well() -> None:
    assert set(TEXT_WRITERS) - set(BOTH_WAYS) == {"trl_unpaired", "axolotl"}
    assert all(name == writer.name for name, writer in WRITERS.items())


@pytest.mark.parametrize("name", [*TEXT_PAIRS, *CHAT_PAIRS])
@pytest.mark.parametrize("form", BOTH_WAYS)
def test_a_pair_comes_back_as_it_was(form: str, name: str) -> None:
    given = {**TEXT_PAIRS, **CHAT_PAIRS}[name]
    back = read_back(form, written(form, given))
    assert texts(back) == texts(given)
    assert back.tools is None


@pytest.mark.parametrize("form", ["pairs", "trl", "openrlhf", "llamafactory_alpaca"])
@pytest.mark.parametrize("name", TEXT_PAIRS)
def test_strings_stay_strings_in_formats_of_strings(form: str, name: str) -> None:
    given = TEXT_PAIRS[name]
    back = read_back(form, written(form, given))
    assert (back.prompt, back.chosen, back.rejected) == (given.prompt, given.chosen, given.rejected)
    if form != "llamafactory_alpaca":  # any row of which may have a history
        assert not FORMATS[form].is_chat(written(form, given), {})


@pytest.mark.parametrize("form", BOTH_WAYS)
def test_a_pair_of_messages_is_read_as_a_chat_dataset(form: str) -> None:
    assert FORMATS[form].is_chat(written(form, CHAT_PAIRS["several turns"]), {})


@pytest.mark.parametrize("form", sorted(KEEPS_TOOL_CALLS - {"openai_preference"}))
@pytest.mark.parametrize("name", TOOL_PAIRS)
def test_tool_calls_come_back_as_they_were(form: str, name: str) -> None:
    given = TOOL_PAIRS[name]
    assert texts(read_back(form, written(form, given))) == texts(given)


@pytest.mark.parametrize("form", sorted(KEEPS_TOOLS))
def test_tools_come_back_as_they_were(form: str) -> None:
    assert read_back(form, written(form, chat([ASK], tools=TOOLS))).tools == TOOLS


@pytest.mark.parametrize("form", SCORED)
def test_scores_and_models_come_back_where_the_format_has_them(form: str) -> None:
    back = read_back(form, written(form, chat([ASK], **SCORES))).row
    assert {name: back[name] for name in SCORED[form]} == SCORED[form]
    without = read_back(form, written(form, chat([ASK], **dict.fromkeys(SCORES)))).row
    assert {without[name] for name in SCORES} == {None}


def test_pairs_carry_all_that_a_build_reads() -> None:
    given = pair(**SCORES, annotator="human", weight=2.5)
    row = written("pairs", given)
    assert row == {
        "prompt": "Hello?",
        "chosen": "Yes, of course.",
        "rejected": "No.",
        **SCORES,
        "annotator": "human",
        "weight": 2.5,
    }
    back = read_back("pairs", row).row
    assert {name: back[name] for name in (*SCORES, "annotator", "weight")} == {
        **SCORES,
        "annotator": "human",
        "weight": 2.5,
    }


@PROPERTY
@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
@pytest.mark.parametrize("form", BOTH_WAYS)
def test_any_text_comes_back_as_it_was(form: str, asked: str, said: str, good: str, bad: str) -> None:
    given = chat([turn("user", asked), turn("assistant", said), MORE], turn("assistant", good), turn("assistant", bad))
    assert texts(read_back(form, written(form, given))) == texts(given)
    plain = pair(asked, good, bad)
    assert texts(read_back(form, written(form, plain))) == texts(plain)


# what a format cannot hold


def refused(form: str, given: Written) -> str:
    with pytest.raises(Unwritable) as left_out:
        TEXT_WRITERS[form].write(given)
    return left_out.value.reason


@pytest.mark.parametrize("form", sorted(set(TEXT_WRITERS) - KEEPS_TOOL_CALLS - {"trl_unpaired"}))
@pytest.mark.parametrize("name", TOOL_PAIRS)
def test_tool_calls_are_left_out_by_name_where_they_would_be_lost(form: str, name: str) -> None:
    assert refused(form, TOOL_PAIRS[name]) == "tool_calls"


@pytest.mark.parametrize("form", sorted(set(TEXT_WRITERS) - KEEPS_TOOLS - {"trl_unpaired"}))
def test_a_prompt_with_tools_is_left_out_by_name_where_they_would_be_lost(form: str) -> None:
    assert refused(form, chat([ASK], tools=TOOLS)) == "tools"


@pytest.mark.parametrize(
    ("form", "given", "reason"),
    [
        ("axolotl", chat([turn("developer", "x"), ASK]), "unknown_role"),
        ("openai_preference", chat([turn("critic", "x"), ASK]), "unknown_role"),
        ("llamafactory_sharegpt", chat([turn("developer", "x"), ASK]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK, MORE]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK, NO]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK, NO, SYSTEM]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK, SYSTEM, ASK]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK, CALLS, *ANSWERS]), "turns_out_of_order"),
        ("llamafactory_sharegpt", chat([ASK], [YES, MORE, YES]), "more_than_one_turn"),
        (
            "llamafactory_sharegpt",
            chat([ASK], turn("assistant", "Let me see.", tool_calls=CALLS["tool_calls"])),
            "text_beside_tool_calls",
        ),
        ("llamafactory_sharegpt", chat([ASK], turn("assistant", "", tool_calls=["?"])), "tool_calls"),
        ("llamafactory_sharegpt", chat([ASK], turn("assistant", "", tool_calls=[call("f", "{no")])), "tool_calls"),
        ("llamafactory_sharegpt", chat([ASK], turn("assistant", "x", thinking="hm")), "thinking"),
        ("llamafactory_alpaca", chat([ASK, MORE]), "turns_out_of_order"),
        ("llamafactory_alpaca", chat([turn("system", ""), ASK]), "turns_out_of_order"),
        ("llamafactory_alpaca", chat([ASK], [YES, MORE, YES]), "more_than_one_turn"),
        ("ultrafeedback_binarized", chat([ASK], [YES, MORE, YES]), "more_than_one_turn"),
        ("ultrafeedback_binarized", chat([ASK, NO]), "prompt_would_move"),
        ("ultrafeedback_binarized", chat([ASK], turn("assistant", "x", name="Bo")), "name"),
        ("distilabel_pairs", chat([SYSTEM]), "prompt_would_move"),
        ("distilabel_pairs", chat([ASK], turn("assistant", "x", reasoning_content="hm")), "reasoning_content"),
        ("ms_swift", chat([ASK], [YES, MORE, YES], [YES, MORE, NO]), "prompt_would_move"),
        ("ms_swift", chat([ASK], [YES, YES]), "two_assistant_turns"),
        ("ms_swift", chat([ASK], turn("assistant", "x", thinking="hm")), "thinking"),
        ("openai_preference", chat([ASK], [YES, MORE, YES]), "more_than_one_turn"),
        ("openai_preference", chat([ASK], turn("assistant", "x", reasoning_content="hm")), "reasoning_content"),
        ("openai_preference", chat([ASK, ANSWERS[0]]), "tool_call_order"),
        ("axolotl", chat([ASK], [YES, MORE, YES]), "more_than_one_turn"),
        ("axolotl", chat([ASK], turn("user", "x")), "more_than_one_turn"),
    ],
)
def test_what_a_consumer_would_drop_or_misread_is_left_out_by_name(form: str, given: Written, reason: str) -> None:
    assert refused(form, given) == reason


@pytest.mark.parametrize("form", ["ms_swift", "llamafactory_sharegpt"])
def test_answers_out_of_order_are_left_out_where_calls_have_no_ids(form: str) -> None:
    one = turn("assistant", "", tool_calls=[call("f", {}, id="a")])
    assert refused(form, chat([ASK, one, turn("tool", "x", tool_call_id="b")])) == "tool_call_order"
    assert refused(form, chat([ASK, one, turn("tool", "x", name="g")])) == "tool_call_order"
    row = written(form, chat([ASK, one, turn("tool", "x", tool_call_id="a", name="f")]))
    assert read_back(form, row).prompt == [ASK, turn("assistant", "", tool_calls=[call("f", {})]), turn("tool", "x")]


@pytest.mark.parametrize("form", ["ms_swift", "llamafactory_sharegpt"])
def test_a_name_is_kept_by_no_turn_but_that_of_a_tool_and_so_left_out_by_name(form: str) -> None:
    assert refused(form, chat([turn("user", "Hello?", name="Bo")])) == "name"
    assert refused(form, chat([ASK], turn("assistant", "Yes.", name="Bo"))) == "name"
    assert refused(form, chat([ASK], YES, turn("assistant", "No.", name="Bo"))) == "name"
    assert refused(form, chat([turn("user", "Hello?", tool_calls=CALLS["tool_calls"])])) == "tool_calls"


HOSTILE_CALLS: list[Any] = [5, "abc", {"a": 1}, ["x"], [5], True, [{"function": "f"}], [None], [[]]]
HOSTILE_CALLS += [
    [call("f", {}, id=[1])],
    [call("f", {}, id={"a": 1})],
    [call("f", {}, id=5)],
    [{"function": {"name": ["f"], "arguments": {}}}],
]
HOSTILE_CALLS += [[call("f", "{")], [call("f", '{"a": NaN}')], [call("f", {"a": float("inf")})]]


@pytest.mark.parametrize("calls", HOSTILE_CALLS)
def test_calls_that_are_none_crash_no_writer(calls: Any) -> None:
    bad = turn("assistant", "", tool_calls=calls)
    for form, writer in TEXT_WRITERS.items():
        for one in (chat([ASK], bad), chat([ASK], YES, bad), chat([ASK, bad, ANSWERS[0]])):
            try:
                rows = writer.write(one)
            except Unwritable as left_out:
                assert left_out.reason in ("tool_calls", "tool_call_order", "turns_out_of_order", "not_finite")  # noqa: PT017
            else:
                assert rows
                assert form != "openai_preference" or openai_complaints(wire(rows[0])) == []


def test_a_number_without_a_word_in_json_is_left_out_by_name() -> None:
    odd = turn("assistant", "", tool_calls=[call("f", {"a": float("nan")})])
    in_text = turn("assistant", "", tool_calls=[call("f", '{"a": 1e999}')])
    for form in ("ms_swift", "llamafactory_sharegpt", "openai_preference"):
        assert refused(form, chat([ASK], odd)) == "not_finite"
        assert refused(form, chat([ASK], in_text)) == "not_finite"
    for form in ("pairs", "trl", "trl_unpaired", "ms_swift", "llamafactory_sharegpt"):
        assert refused(form, chat([ASK], tools=[{"a": float("-inf")}])) == "not_finite"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [('{"name": NaN}', "not_finite"), ('{"name": 1e999}', "not_finite"), ("{", "extra"), ("[1]", "extra")],
)
def test_what_a_message_of_ours_holds_besides_is_an_object_of_finite_numbers(extra: str, reason: str) -> None:
    with pytest.raises(Unwritable) as left_out:
        unpacked([{"role": "user", "content": "x", "extra": extra}])
    assert left_out.value.reason == reason
    held = '{"name": "Bo", "role": "system"}'
    assert unpacked([{"role": "user", "content": "x", "extra": held}]) == [turn("user", "x", name="Bo")]


@pytest.mark.parametrize("form", SCORED)
def test_scores_that_speak_against_the_order_are_not_written(form: str) -> None:
    against = chat([ASK], **SCORES | {"chosen_score": 1.0, "rejected_score": 4.0, "margin": 3.0})  # lower was better
    back = read_back(form, written(form, against)).row
    assert (back["chosen_score"], back["rejected_score"]) == (None, None)
    for margin in (5.5, None):
        back = read_back(form, written(form, chat([ASK], **SCORES, margin=margin))).row
        assert (back["chosen_score"], back["rejected_score"]) == (4.5, -1.0)
    one = chat([ASK], chosen_score=1.0, rejected_score=None, margin=None)
    assert read_back(form, written(form, one)).row["chosen_score"] == 1.0


def test_an_empty_prompt_crashes_no_writer() -> None:
    for writer in TEXT_WRITERS.values():
        try:
            rows = writer.write(chat([]))
        except Unwritable as left_out:
            assert left_out.reason in ("prompt_would_move", "turns_out_of_order")  # noqa: PT017 - either way is right
        else:
            assert rows


# the consumers' own rules


def test_trl_unpaired_gives_a_row_a_side_with_its_label() -> None:
    assert TEXT_WRITERS["trl_unpaired"].write(pair()) == [
        {"prompt": "Hello?", "completion": "Yes, of course.", "label": True},
        {"prompt": "Hello?", "completion": "No.", "label": False},
    ]
    rows = TEXT_WRITERS["trl_unpaired"].write(chat([ASK], CALLS, tools=TOOLS))
    assert [row["completion"] for row in rows] == [[CALLS], [NO]]
    assert [json.loads(row["tools"]) for row in rows] == [TOOLS, TOOLS]


def test_axolotl_gets_one_message_a_side_with_role_and_content_alone() -> None:
    row = written("axolotl", CHAT_PAIRS["several turns"])
    assert row == {"messages": [SYSTEM, ASK, NO, MORE], "chosen": YES, "rejected": NO}
    assert written("axolotl", pair()) == {"messages": [ASK], "chosen": YES, "rejected": NO}


def test_the_lower_rank_is_the_chosen_one_in_nemo_rl() -> None:
    row = written("nemo_rl", chat([SYSTEM, ASK]))
    assert row == {
        "context": [SYSTEM, ASK],
        "completions": [{"rank": 0, "completion": [YES]}, {"rank": 1, "completion": [NO]}],
    }
    for ranks in ((1, 2), (0, 7), (-1, 0)):
        best, worst = ({"rank": rank, "completion": [side]} for rank, side in zip(ranks, (YES, NO), strict=True))
        back = read_back("nemo_rl", {"context": [ASK], "completions": [worst, best]})
        assert (back.chosen, back.rejected) == ([YES], [NO])


def test_openrlhf_gets_the_margin_where_scores_gave_one() -> None:
    assert written("openrlhf", pair(margin=5.5))["margin"] == 5.5
    assert "margin" not in written("openrlhf", pair(margin=None))


def test_uf_and_distilabel_rows_have_the_names_and_the_repeated_prompt_of_the_originals() -> None:
    given = chat([SYSTEM, ASK, NO, MORE], **SCORES)
    whole = {"chosen": [SYSTEM, ASK, NO, MORE, YES], "rejected": [SYSTEM, ASK, NO, MORE, NO]}
    assert written("ultrafeedback_binarized", given) == {
        "prompt": "Hello?",
        "prompt_id": "e" * 64,
        **whole,
        "messages": whole["chosen"],
        "score_chosen": 4.5,
        "score_rejected": -1.0,
    }
    # sha256 of the text, as in distilabel's documented example
    asked = written("distilabel_pairs", chat([turn("user", "What's 2+2?")], **SCORES))
    assert asked["prompt_id"] == "7762ecf17ad41479767061a8f4a7bfa3b63d371672af5180872f9b82b4cd4e29"
    assert asked["prompt"] == "What's 2+2?"
    assert (asked["chosen_rating"], asked["rejected_rating"]) == (4.5, -1.0)
    assert (asked["chosen_model"], asked["rejected_model"]) == ("big", "small")


def openai_complaints(row: Mapping[str, Any]) -> list[str]:
    """What OpenAI's rules for preference data find wrong with a row."""
    found = [] if set(row) == {"input", "preferred_output", "non_preferred_output"} else ["fields"]
    found += [] if set(row["input"]) <= {"messages", "tools", "parallel_tool_calls"} else ["input"]
    for name in ("preferred_output", "non_preferred_output"):
        found += [] if [m["role"] for m in row[name]] == ["assistant"] else [name]
    for message in [*row["input"]["messages"], *row["preferred_output"], *row["non_preferred_output"]]:
        known = {"tool": {"tool_call_id"}, "assistant": {"tool_calls", "name"}}.get(message["role"], {"name"})
        found += [] if set(message) <= {"role", "content", *known} else ["message"]
        found += [] if isinstance(message["content"], str) or message.get("tool_calls") else ["content"]
        found += [] if message["role"] != "tool" or isinstance(message["tool_call_id"], str) else ["tool_call_id"]
        for called in message.get("tool_calls", []):
            found += [] if set(called) == {"id", "type", "function"} and called["type"] == "function" else ["call"]
            function = called["function"]
            fits = set(function) == {"name", "arguments"} and isinstance(json.loads(function["arguments"]), dict)
            found += [] if fits else ["function"]
    return found


OPENAI_CALL = call("weather", '{"city": "Köln"}', id="call_7")
OPENAI_PAIRS = {
    **TEXT_PAIRS,
    **CHAT_PAIRS,
    **TOOL_PAIRS,
    "two answered calls": chat([ASK, CALLS, *ANSWERS], tools=TOOLS),
    "ids of its own": chat(
        [ASK, turn("assistant", "", tool_calls=[OPENAI_CALL]), turn("tool", "grey", tool_call_id="call_7")], tools=TOOLS
    ),
}


@pytest.mark.parametrize("name", OPENAI_PAIRS)
def test_openai_rows_keep_openais_rules(name: str) -> None:
    assert openai_complaints(written("openai_preference", OPENAI_PAIRS[name])) == []


def test_openai_calls_with_ids_come_back_and_missing_ids_are_made_in_order() -> None:
    given = OPENAI_PAIRS["ids of its own"]
    row = written("openai_preference", given)
    assert row["input"]["messages"][1]["content"] is None
    assert texts(read_back("openai_preference", row)) == texts(given)
    made = written("openai_preference", OPENAI_PAIRS["two answered calls"])["input"]
    assert [c["id"] for c in made["messages"][1]["tool_calls"]] == ["call_0", "call_1"]
    assert [m["tool_call_id"] for m in made["messages"][2:]] == ["call_0", "call_1"]
    assert (made["tools"], made["parallel_tool_calls"]) == (TOOLS, True)
    taken = chat([ASK, turn("assistant", "", tool_calls=[call("f", {}), call("f", {}, id="call_0")])])
    ids = [c["id"] for c in written("openai_preference", taken)["input"]["messages"][1]["tool_calls"]]
    assert ids == ["call_1", "call_0"]


def test_openai_ids_that_are_made_are_those_of_no_other_call_of_the_pair() -> None:
    asked = turn("assistant", "", tool_calls=[call("f", {})])
    given = turn("assistant", "", tool_calls=[call("g", {}, id="call_0")])
    for one, other in ((given, asked), (asked, given)):
        row = written("openai_preference", chat([ASK, asked, turn("tool", "x")], one, other))
        answered = row["input"]["messages"]
        ids = [answered[1]["tool_calls"][0]["id"]]
        ids += [row[name][0]["tool_calls"][0]["id"] for name in ("preferred_output", "non_preferred_output")]
        assert ids == (["call_1", "call_0", "call_2"] if one is given else ["call_1", "call_2", "call_0"])
        assert answered[2] == {"role": "tool", "tool_call_id": "call_1", "content": "x"}


def test_openai_a_tool_turn_that_names_another_function_than_its_call_is_left_out() -> None:
    called = turn("assistant", "", tool_calls=[call("f", {}, id="a")])
    assert refused("openai_preference", chat([ASK, called, turn("tool", "x", name="g")])) == "tool_call_order"
    assert refused("openai_preference", chat([ASK, called, turn("tool", "x", tool_call_id=[1])])) == "tool_call_order"
    row = written("openai_preference", chat([ASK, called, turn("tool", "x", name="f")]))
    assert row["input"]["messages"][2] == {"role": "tool", "tool_call_id": "a", "content": "x"}


def llamafactory_keeps(row: Mapping[str, Any]) -> bool:
    """Whether LLaMA-Factory's sharegpt converter would keep a ranking row."""
    turns = [t["from"] for t in row["conversations"]]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    asks, answers = ("human", "observation"), ("gpt", "function_call")
    in_order = all(tag in (answers if place % 2 else asks) for place, tag in enumerate(turns))
    for one in (*row["conversations"], row["chosen"], row["rejected"]):
        if one["from"] == "function_call":
            value = json.loads(one["value"])
            if not all(set(c) == {"name", "arguments"} for c in (value if isinstance(value, list) else [value])):
                return False
    return in_order and len(turns) % 2 == 1 and {row["chosen"]["from"], row["rejected"]["from"]} <= set(answers)


@pytest.mark.parametrize("name", [*TEXT_PAIRS, *CHAT_PAIRS, *TOOL_PAIRS])
def test_llamafactory_would_keep_every_row_that_is_written_for_it(name: str) -> None:
    assert llamafactory_keeps(written("llamafactory_sharegpt", {**TEXT_PAIRS, **CHAT_PAIRS, **TOOL_PAIRS}[name]))


def test_llamafactory_writes_calls_and_answers_under_its_own_tags() -> None:
    row = written("llamafactory_sharegpt", TOOL_PAIRS["a call was answered"]._replace(tools=TOOLS))
    assert [t["from"] for t in row["conversations"]] == ["human", "function_call", "observation"]
    assert json.loads(row["conversations"][1]["value"]) == {"name": "weather", "arguments": {"city": "Köln"}}
    assert json.loads(row["tools"]) == TOOLS
    several = written("llamafactory_sharegpt", TOOL_PAIRS["a call is rejected"])
    assert [c["arguments"]["city"] for c in json.loads(several["rejected"]["value"])] == ["Köln", "Rom"]


def test_dataset_info_says_ranking_and_names_every_column_that_is_written() -> None:
    for form in ("llamafactory_alpaca", "llamafactory_sharegpt"):
        beside = TEXT_WRITERS[form].beside
        assert beside is not None
        (name, text), *others = beside({"train": "train.jsonl", "test": "test.jsonl"}).items()
        assert (name, others) == ("dataset_info.json", [])
        info = json.loads(text)
        assert [info[f"prefkit_{split}"]["file_name"] for split in ("train", "test")] == ["train.jsonl", "test.jsonl"]
        for stanza in info.values():
            assert stanza["ranking"] is True
            assert form == f"llamafactory_{stanza['formatting']}"
            assert set(stanza["columns"].values()) == set(written(form, CHAT_PAIRS["several turns"]))
    assert stanza["tags"]["system_tag"] == "system"


def test_ms_swift_gets_a_turn_a_call_and_a_whole_conversation_where_an_answer_is_no_text() -> None:
    row = written("ms_swift", chat([ASK, CALLS, *ANSWERS], tools=TOOLS))
    assert [m["role"] for m in row["messages"]] == ["user", "tool_call", "tool_call", "tool", "tool", "assistant"]
    assert json.loads(row["messages"][2]["content"]) == {"name": "weather", "arguments": {"city": "Rom"}}
    assert row["rejected_response"] == "No."
    assert json.loads(row["tools"]) == TOOLS
    call_rejected = written("ms_swift", TOOL_PAIRS["a call is rejected"])
    assert "rejected_response" not in call_rejected
    assert [m["role"] for m in call_rejected["rejected_messages"]] == ["system", "user", "tool_call", "tool_call"]


def test_trl_itself_reads_what_is_written_for_it(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    given = [*CHAT_PAIRS.values(), *(p._replace(tools=TOOLS) for p in TOOL_PAIRS.values())]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(written("trl", one)) + "\n" for one in given), encoding="utf-8")
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for one, row in zip(given, loaded, strict=True):
        assert trl.is_conversational(row)
        assert trl.maybe_extract_prompt(row) is row  # the prompt is explicit
        assert [row["prompt"], row["chosen"], row["rejected"]] == texts(one)
        assert (json.loads(row["tools"]) if row["tools"] else None) == one.tools


# readers


def test_distilabel_gives_a_candidate_a_generation() -> None:
    row = {"instruction": "q", "generations": ["a", "b"], "ratings": [4, None], "generation_models": ["x", "y"]}
    assert FORMATS["distilabel"].read(row, {}) == [
        {"prompt": "q", "response": "a", "score": 4, "model": "x"},
        {"prompt": "q", "response": "b", "score": None, "model": "y"},
    ]
    (first, _) = FORMATS["distilabel"].read({**row, "system_prompt": "Be brief.", "generation_models": None}, {})
    assert first == {"prompt": [SYSTEM, turn("user", "q")], "response": "a", "score": 4, "model": None}
    (first, _) = FORMATS["distilabel"].read({"messages": [ASK], "generations": ["a", "b"], "ratings": [1, 2]}, {})
    assert first["prompt"] == [ASK]
    (first, _) = FORMATS["distilabel"].read({**row, "messages": [ASK], "system_prompt": "Be brief."}, {})
    assert first["prompt"] == [SYSTEM, ASK]


def test_llamafactory_alpaca_joins_instruction_and_input_and_puts_history_before_them() -> None:
    row: Row = {"instruction": "Translate.", "input": "Hallo", "chosen": "Hello", "rejected": "Bye"}
    assert read_back("llamafactory_alpaca", row).prompt == "Translate.\nHallo"
    row |= {"system": "Be brief.", "history": [["Hello?", "No."]]}
    assert read_back("llamafactory_alpaca", row).prompt == [SYSTEM, ASK, NO, turn("user", "Translate.\nHallo")]


@pytest.mark.parametrize("form", ["llamafactory_alpaca", "distilabel"])
def test_rows_of_which_some_have_turns_before_their_question_are_a_chat_dataset_whatever_the_first_has(
    form: str, write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    rows: list[Row] = []
    for n in range(60):
        if form == "distilabel":
            row: Row = {"instruction": f"q{n}", "generations": ["a", "b"], "ratings": [1, 2]}
            rows.append(row | ({"system_prompt": "Be brief."} if n % 20 == 19 else {}))
        else:
            row = {"instruction": f"q{n}", "chosen": "b", "rejected": "a"}
            rows.append(row | ({"history": [["Hello?", "No."]]} if n % 20 == 19 else {}))
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": form}
    built = build_dataset(pipeline_of(source, dedupe={"exact": False}))
    assert (built.kind, built.counts["pairs"], built.counts["rejects"]) == ("chat", 60, 0)
    prompts = pl.read_parquet(f"{built.dataset}/pairs/*.parquet")["prompt"].to_list()
    assert Counter(map(len, prompts)) == {1: 57, 2 if form == "distilabel" else 3: 3}


def test_llamafactory_sharegpt_takes_a_system_column_where_no_turn_says_it() -> None:
    sides = {"chosen": {"from": "gpt", "value": "Yes, of course."}, "rejected": {"from": "gpt", "value": "No."}}
    asked = [{"from": "human", "value": "Hello?"}]
    row = {"conversations": asked, **sides, "system": "Be brief."}
    assert read_back("llamafactory_sharegpt", row).prompt == [SYSTEM, ASK]
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *asked], **sides, "system": "Be long."}
    assert read_back("llamafactory_sharegpt", row).prompt == [SYSTEM, ASK]


def parts(role: str, *content: tuple[str, str]) -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "value": value} for kind, value in content], "loss_weight": 0.0}


def test_llamafactory_v1_parts_become_text_reasoning_calls_and_tools() -> None:
    shared = [parts("system", ("tools", json.dumps(TOOLS))), parts("system", ("text", "Be "), ("text", "brief."))]
    shared.append(parts("user", ("text", "Hello?")))
    called = parts("assistant", ("reasoning", "hm"), ("tool_call", '{"name": "f", "arguments": {"a": 1}}'))
    row = {"chosen_messages": [*shared, called], "rejected_messages": [*shared, parts("assistant", ("text", "No."))]}
    back = read_back("llamafactory_messages", row)
    assert back.prompt == [SYSTEM, ASK]
    assert back.chosen == [turn("assistant", "", tool_calls=[call("f", {"a": 1})], reasoning_content="hm")]
    assert (back.rejected, back.tools) == ([NO], TOOLS)


def test_ms_swift_reads_both_names_of_answers_and_joins_a_call_to_the_turn_before_it() -> None:
    called = turn("tool_call", '{"name": "f", "arguments": {}}')
    row = {
        "messages": [ASK, turn("assistant", "Let me see."), called, turn("tool_response", "x"), YES],
        "rejected_response": "No.",
    }
    back = read_back("ms_swift", row)
    assert back.prompt == [ASK, turn("assistant", "Let me see.", tool_calls=[call("f", {})]), turn("tool", "x")]
    assert (back.chosen, back.rejected) == ([YES], [NO])


def test_ms_swift_a_system_column_is_the_first_turn_where_the_messages_have_none() -> None:
    row: Row = {"system": "Be brief.", "messages": [ASK, YES], "rejected_response": "No."}
    assert read_back("ms_swift", row).prompt == [SYSTEM, ASK]
    assert read_back("ms_swift", {**row, "rejected_messages": [ASK, NO]}).prompt == [SYSTEM, ASK]
    for nothing in ("", None):
        assert read_back("ms_swift", {**row, "system": nothing}).prompt == [ASK]
    own = {**row, "messages": [SYSTEM, ASK, YES], "system": "Be long."}
    assert read_back("ms_swift", own).prompt == [SYSTEM, ASK]


@pytest.mark.parametrize("key", ["id", "weight", "loss", "name_of_turn"])
def test_what_records_ignore_does_not_end_the_prompt_that_sides_share(key: str) -> None:
    first, second = ([{**one, key: n + at} for at, one in enumerate([SYSTEM, ASK, NO, MORE])] for n in (0, 9))
    row: Row = {"chosen": [*first, YES], "rejected": [*second, NO], "score_chosen": 2, "score_rejected": 1}
    assert read_back("trl", row).prompt == [SYSTEM, ASK, NO, MORE]
    assert read_back("ultrafeedback_binarized", row).prompt == [SYSTEM, ASK, NO, MORE]
    swift = {"messages": row["chosen"], "rejected_messages": row["rejected"]}
    assert read_back("ms_swift", swift).prompt == [SYSTEM, ASK, NO, MORE]


def test_tool_calls_that_differ_end_the_prompt_that_sides_share() -> None:
    calls = [turn("assistant", "", tool_calls=[call("f", {"a": number})]) for number in (1, 2)]
    first, second = ([ASK, one, MORE, YES] for one in calls)
    back = read_back("trl", {"chosen": first, "rejected": second})
    assert (back.prompt, back.chosen, back.rejected) == ([ASK], first[1:], second[1:])
    same = read_back("trl", {"chosen": first, "rejected": [ASK, {**calls[0], "name": None}, MORE, NO]})
    assert same.prompt == [ASK, calls[0], MORE]


@pytest.mark.parametrize(
    ("form", "row", "field", "reason"),
    [
        ("trl", {"chosen": "a"}, "rejected", "missing_field"),
        ("trl", {"question": "q", "chosen": "It is a", "rejected": "It is b"}, "question", "prompt_elsewhere"),
        ("openrlhf", {"Messages": [ASK], "chosen": "It is a", "rejected": "It is b"}, "Messages", "prompt_elsewhere"),
        ("ms_swift", {"system": 5, "messages": [ASK, YES], "rejected_response": "x"}, "system", "wrong_type"),
        ("ultrafeedback_binarized", {"chosen": [ASK, YES], "rejected": "x"}, "rejected", "not_a_list"),
        ("ultrafeedback_binarized", {"chosen": [ASK, YES], "rejected": [ASK, NO]}, "score_chosen", "missing_field"),
        ("ultrafeedback_binarized", {"chosen": [ASK, YES], "rejected": [MORE, NO]}, "prompt", "no_shared_prompt"),
        ("distilabel", {"generations": ["a"], "ratings": [1]}, "instruction", "missing_field"),
        ("distilabel", {"instruction": "q", "generations": "a", "ratings": [1]}, "generations", "not_a_list"),
        ("distilabel", {"instruction": "q", "generations": [], "ratings": []}, "generations", "no_responses"),
        ("distilabel", {"instruction": "q", "generations": ["a"], "ratings": [1, 2]}, "ratings", "length_mismatch"),
        (
            "distilabel",
            {"instruction": "q", "generations": ["a"], "ratings": [1], "generation_models": ["x", "y"]},
            "generation_models",
            "length_mismatch",
        ),
        ("distilabel_pairs", {"chosen": [ASK, YES], "rejected": [ASK, NO]}, "chosen_rating", "missing_field"),
        ("nemo_rl", {"context": [ASK], "completions": []}, "completions", "no_responses"),
        ("nemo_rl", {"context": [ASK], "completions": [{"rank": 0}] * 3}, "completions", "not_two_completions"),
        ("nemo_rl", {"context": [ASK], "completions": [{"rank": 1}] * 2}, "completions", "tie"),
        (
            "nemo_rl",
            {"context": [ASK], "completions": [{"rank": True}, {"rank": 1}]},
            "completions.0.rank",
            "not_a_number",
        ),
        ("ms_swift", {"messages": [ASK, YES]}, "rejected_response", "missing_field"),
        ("ms_swift", {"messages": [ASK], "rejected_response": "x"}, "messages", "no_assistant_turn"),
        ("ms_swift", {"messages": [YES], "rejected_response": "x"}, "messages", "no_shared_prompt"),
        (
            "ms_swift",
            {"messages": [ASK, turn("tool_call", "{}")], "rejected_response": "x"},
            "messages",
            "not_tool_calls",
        ),
        (
            "ms_swift",
            {"messages": [ASK, turn("tool_call", "[]")], "rejected_response": "x"},
            "messages",
            "not_tool_calls",
        ),
        ("openai_preference", {"input": [ASK]}, "input.messages", "missing_field"),
        ("openai_preference", {"input": {"messages": "x"}}, "input.messages", "not_a_list"),
        ("llamafactory_alpaca", {"instruction": 1, "chosen": "a", "rejected": "b"}, "instruction", "wrong_type"),
        (
            "llamafactory_alpaca",
            {"instruction": "q", "input": [1], "chosen": "a", "rejected": "b"},
            "input",
            "wrong_type",
        ),
        (
            "llamafactory_alpaca",
            {"instruction": "q", "chosen": "a", "rejected": "b", "history": "x"},
            "history",
            "not_a_list",
        ),
        (
            "llamafactory_alpaca",
            {"instruction": "q", "chosen": "a", "rejected": "b", "history": [["x"]]},
            "history",
            "wrong_type",
        ),
        ("llamafactory_sharegpt", {"conversations": "x", "chosen": {}, "rejected": {}}, "conversations", "not_a_list"),
        (
            "llamafactory_sharegpt",
            {"conversations": ["x"], "chosen": {}, "rejected": {}},
            "conversations",
            "wrong_type",
        ),
        ("llamafactory_sharegpt", {"conversations": [], "chosen": {}, "rejected": {}}, "chosen", "missing_field"),
        (
            "llamafactory_sharegpt",
            {"conversations": [{"from": "bot", "value": "x"}], "chosen": {}, "rejected": {}},
            "conversations",
            "unknown_role",
        ),
        (
            "llamafactory_messages",
            {"chosen_messages": [parts("user", ("image_url", "x"))], "rejected_messages": []},
            "chosen_messages",
            "not_text_content",
        ),
        (
            "llamafactory_messages",
            {"chosen_messages": [{"role": "user", "content": [1]}], "rejected_messages": []},
            "chosen_messages",
            "wrong_type",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_which_field_and_why(form: str, row: Row, field: str, reason: str) -> None:
    with pytest.raises(Unreadable) as refused:
        FORMATS[form].read(row, {})
    assert (refused.value.field, refused.value.reason) == (field, reason)


# which format a row has

FIXTURES: dict[str, Row] = {
    **{form: written(form, chat([ASK], **SCORES)) for form in BOTH_WAYS if form != "openrlhf"},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "candidates": {"prompt": "q", "response": "a", "score": 1},
    "corrections": {"prompt": "q", "response": "a", "correction": "b"},
    "distilabel": {"instruction": "q", "generations": ["a", "b"], "ratings": [1, 2]},
    "llamafactory_messages": {
        "chosen_messages": [parts("user", ("text", "q")), parts("assistant", ("text", "a"))],
        "rejected_messages": [parts("user", ("text", "q")), parts("assistant", ("text", "b"))],
    },
}
VARIANTS: list[tuple[str, Row]] = [
    ("trl", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("trl", {"chosen": "q? a", "rejected": "q? b"}),
    ("trl", {"id": "x", "source": "s", "language": "en", "chosen": "q? a", "rejected": "q? b"}),
    ("trl", {"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"}),
    ("llamafactory_alpaca", {"instruction": "i", "input": "q", "system": "s", "chosen": "a", "rejected": "b"}),
    ("trl", {"chosen": [ASK, YES], "rejected": [ASK, NO]}),
    ("trl", {"prompt": "Hello?", "chosen": [ASK, YES], "rejected": [ASK, NO]}),
    ("trl", written("trl", TOOL_PAIRS["a call is chosen"]._replace(tools=TOOLS))),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": None}),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}),
    ("candidates", {"prompt": "q", "responses": ["a"], "scores": [1]}),
    ("distilabel", {"messages": [ASK], "generations": ["a", "b"], "ratings": [1, 2]}),
    (
        "distilabel_pairs",
        {
            **written("distilabel_pairs", chat([ASK], **SCORES)),
            "instruction": "q",
            "generations": ["a", "b"],
            "generation_models": ["x", "y"],
            "ratings": [1, 2],
        },
    ),
    ("ms_swift", written("ms_swift", TOOL_PAIRS["a call is rejected"])),
]


@pytest.mark.parametrize(("form", "row"), [*FIXTURES.items(), *VARIANTS])
def test_a_row_is_known_for_its_own_format_and_no_other(form: str, row: Row) -> None:
    assert [found.format for found in fitting([wire(row)])] == [form]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"chosen": "a"},
        {"prompt": "q", "chosen": 1, "rejected": 2},
        {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO], "chosen_score": 1, "rejected_score": 0},
        {"chosen": [], "rejected": []},
        {"chosen": ["a"], "rejected": ["b"]},
        {"chosen": "a", "rejected": [NO]},
        {"context": [ASK], "completions": ["a"]},
        {"conversations": [], "chosen": {}, "rejected": {}},
        {"messages": [ASK, YES], "rejected_response": None},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {"query": "q", "chosen": "a", "rejected": "b"},
        {"Trajectory": [ASK], "chosen": [YES], "rejected": [NO]},
        {"messages": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"system": "", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"system_prompt": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1},
        {"system": "s", "prompt": "q", "response": "a", "score": 1},
        {"context": "c", "prompt": "q", "responses": ["a"], "scores": [1]},
        {"system": "s", "prompt": "q", "response": "a", "correction": "b"},
        {"system": "s", "prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"},
        {"instruction": "i", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "i", "query": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_row_that_fits_nothing_well_is_not_guessed(row: Row) -> None:
    assert fitting([row]) == []


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.text(max_size=6)
WORDS = sorted({"role", "content", "from", "value", "tools", "rank", "type", "function", "name", "arguments"})
NAMES = st.sampled_from(
    [
        *WORDS,
        *(
            "user",
            "assistant",
            "tool",
            "tool_call",
            "function_call",
            "human",
            "gpt",
            "text",
            "tool_calls",
            "{}",
            "[{}]",
        ),
    ]
)
JSON = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(
    {name for row in FIXTURES.values() for name in row} | {"tools", "system", "history", "input", "messages"}
)


@PROPERTY
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8))
def test_no_row_of_json_crashes_a_reader_or_a_detection(row: Row) -> None:
    for form in FORMATS.values():
        if form.detect is not None:
            form.detect(row)
        form.is_chat(row, {})
        try:
            found = form.read(row, {})
        except Unreadable as unread:
            assert unread.reason  # noqa: PT017 - either way is right
        else:
            assert isinstance(found, list)


@PROPERTY
@given(st.sampled_from(sorted(FIXTURES)), st.data())
def test_no_change_of_a_good_row_crashes_a_reader_or_a_detection(form: str, data: st.DataObject) -> None:
    row = wire(FIXTURES[form])
    spots = list(walk(row))
    holder, key = data.draw(st.sampled_from(spots))
    holder[key] = data.draw(JSON)
    reader = FORMATS[form]
    if reader.detect is not None:
        reader.detect(row)
    reader.is_chat(row, {})
    try:
        reader.read(row, {})
    except Unreadable as unread:
        assert unread.reason  # noqa: PT017 - either way is right


def walk(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a row, as what holds it and its key."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else []
    return [spot for key in keys for spot in ((value, key), *walk(value[key]))]


# real files


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_llamafactorys_own_sharegpt_files_are_read_whole_and_written_back_as_they_are(
    test_data: Path, name: str
) -> None:
    rows = json.loads((test_data / "llamafactory" / name).read_text(encoding="utf-8"))
    assert {found.format for found in fitting(rows)} == {"llamafactory_sharegpt"}
    turns, written_back = 0, 0
    for row in rows:
        back = read_back("llamafactory_sharegpt", row)
        turns += len(back.prompt)
        assert back.chosen[0]["content"] == row["chosen"]["value"]  # type: ignore[index]
        assert back.rejected[0]["content"] == row["rejected"]["value"]  # type: ignore[index]
        written_back += written("llamafactory_sharegpt", back) == {**row, "tools": ""}
    assert len(rows) == written_back == 300
    assert turns == sum(len(row["conversations"]) for row in rows)


def test_llamafactorys_own_v1_file_is_read_whole(test_data: Path) -> None:
    text = (test_data / "llamafactory" / "v1_dpo_demo.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert {found.format for found in fitting(rows)} == {"llamafactory_messages"}
    pairs = [read_back("llamafactory_messages", row) for row in rows]
    assert len(pairs) == 10
    for row, found in zip(rows, pairs, strict=True):
        assert [m["role"] for m in found.prompt] == ["system", "user"]  # type: ignore[index]
        assert found.chosen == [turn("assistant", row["chosen_messages"][2]["content"][0]["value"])]
        assert found.rejected == [turn("assistant", row["rejected_messages"][2]["content"][0]["value"])]


def test_the_formats_say_which_side_is_better_where_it_is_not_their_name() -> None:
    assert FORMATS["nemo_rl"].direction == "the lower rank is better"
    assert FORMATS["distilabel"].direction == "the higher rating is better"
