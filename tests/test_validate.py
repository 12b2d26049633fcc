"""Each rule has a row that trips it and a near neighbour that does not; of several reasons the first is given."""

from typing import Any

import polars as pl
import pytest

from prefkit.format import MESSAGES, Kind
from prefkit.screen import Screened
from prefkit.validate import rules, validate_pairs

TEXT = {
    "prompt": "p",
    "chosen": "good",
    "rejected": "bad",
    "chosen_score": None,
    "rejected_score": None,
    "margin": None,
}
LIMIT = 40


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


CHAT = TEXT | {"prompt": [user("p")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}


def screened(kind: Kind, *rows: dict[str, Any], scale: tuple[float, float] | None = None) -> Screened:
    side = MESSAGES if kind == "chat" else pl.String()
    schema: dict[str, Any] = dict.fromkeys(("prompt", "chosen", "rejected"), side)
    schema |= dict.fromkeys(("chosen_score", "rejected_score", "margin"), pl.Float64)
    base = CHAT if kind == "chat" else TEXT
    return validate_pairs(pl.DataFrame([base | row for row in rows], schema=schema), kind, LIMIT, scale)


def reason(kind: Kind, row: dict[str, Any], scale: tuple[float, float] | None = None) -> str | None:
    found = screened(kind, row, scale=scale)
    assert found.kept.height + found.dropped.height == 1
    return None if found.kept.height else str(found.dropped["reason"].item())


TEXT_RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("empty_prompt", {"prompt": " \n"}, {"prompt": " . "}),
    ("empty_chosen", {"chosen": ""}, {"chosen": "0"}),
    ("empty_rejected", {"rejected": "\t\u00a0 "}, {"rejected": "-"}),
    ("empty_chosen", {"chosen": "\u200b\ufeff "}, {"chosen": "\u200b."}),  # nothing that can be seen
    ("identical", {"chosen": "bad"}, {"chosen": "Bad"}),
    ("identical_after_folding", {"chosen": " bad\n"}, {"chosen": "b ad"}),
    (
        "identical_after_folding",
        {"chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        {"chosen": "cafe", "rejected": "caf\u00e9"},
    ),
    ("nul_byte", {"rejected": "b\0ad"}, {"rejected": "b\\0ad"}),
    ("nul_byte", {"prompt": "\0"}, {"prompt": "0"}),
    ("too_long", {"prompt": "p" * (LIMIT + 1)}, {"prompt": "p" * LIMIT}),
    ("too_long", {"chosen": "雪" * (LIMIT + 1)}, {"chosen": "雪" * LIMIT}),
    ("too_long", {"rejected": "r" * (LIMIT + 1)}, {"rejected": "r" * LIMIT}),
    ("tied_scores", {"margin": 0.0}, {"margin": 1e-6}),
    ("scores_against_order", {"margin": -1e-6}, {"margin": None}),
]

CHAT_RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("empty_prompt", {"prompt": []}, {"prompt": [user("?")]}),
    ("empty_prompt", {"prompt": [user(" ")]}, {"prompt": [system(" "), user("?")]}),
    ("empty_chosen", {"chosen": [assistant("\n")]}, {"chosen": [assistant(".")]}),
    ("empty_rejected", {"rejected": []}, {"rejected": [assistant(".")]}),
    (  # the last answer counts, and a name is none
        "empty_chosen",
        {"chosen": [assistant("a"), user("q"), assistant(" ")]},
        {"chosen": [assistant(""), user("q"), assistant("a")]},
    ),
    (
        "empty_chosen",
        {"chosen": [{**assistant(""), "extra": '{"name": "x"}'}]},
        {"chosen": [{**assistant(""), "extra": '{"tool_calls": [{}]}'}]},
    ),
    (
        "prompt_ends_without_user_turn",
        {"prompt": [user("q"), assistant("a")]},
        {"prompt": [user("q"), assistant("a"), user("q")]},
    ),
    ("prompt_ends_without_user_turn", {"prompt": [system("s")]}, {"prompt": [system("s"), user("q")]}),
    ("side_ends_without_assistant_turn", {"chosen": [user("q")]}, {"chosen": [assistant("a")]}),
    (
        "side_ends_without_assistant_turn",
        {"rejected": [assistant("a"), user("q")]},
        {"rejected": [assistant("a"), user("q"), assistant("b")]},
    ),
    ("roles_out_of_order", {"prompt": [user("q"), user("q")]}, {"prompt": [user("q"), assistant("a"), user("q")]}),
    ("roles_out_of_order", {"prompt": [user("q"), system("s"), user("q")]}, {"prompt": [system("s"), user("q")]}),
    ("roles_out_of_order", {"prompt": [{"role": "robot", "content": "x"}, user("q")]}, {"prompt": [user("q")]}),
    ("roles_out_of_order", {"chosen": [assistant("a"), assistant("b")]}, {"chosen": [assistant("ab")]}),
    ("identical", {"chosen": [assistant("bad")]}, {"chosen": [assistant("bad.")]}),
    ("identical_after_folding", {"chosen": [assistant("bad ")]}, {"chosen": [assistant("b ad")]}),
    ("identical_after_folding", {"chosen": [assistant("  bad")]}, {"chosen": [assistant("bad?")]}),
    (
        "nul_byte",
        {"prompt": [user("a\0"), assistant("b"), user("c")]},
        {"prompt": [user("a"), assistant("b"), user("c")]},
    ),
    ("too_long", {"chosen": [assistant("c" * (LIMIT + 1))]}, {"chosen": [assistant("c" * LIMIT)]}),
]


@pytest.mark.parametrize(("name", "bad", "good"), TEXT_RULES)
def test_a_text_rule_drops_what_breaks_it_and_nothing_beside_it(
    name: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    assert (reason("text", bad), reason("text", good)) == (name, None)


@pytest.mark.parametrize(("name", "bad", "good"), CHAT_RULES)
def test_a_chat_rule_drops_what_breaks_it_and_nothing_beside_it(
    name: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    assert (reason("chat", bad), reason("chat", good)) == (name, None)


@pytest.mark.parametrize("side", ["chosen_score", "rejected_score"])
def test_a_score_outside_the_scale_is_dropped_and_both_ends_belong_to_it(side: str) -> None:
    scale = (1.0, 10.0)
    for score, wanted in ((0.99, "score_out_of_scale"), (1.0, None), (10.0, None), (10.01, "score_out_of_scale")):
        assert reason("text", {side: score}, scale) == wanted, score
    assert reason("text", {side: None}, scale) is None
    assert reason("text", {side: 1e9}) is None


def test_every_rule_has_a_row_that_trips_it() -> None:
    tripped = {name for name, _, _ in TEXT_RULES} | {"score_out_of_scale"}
    assert set(rules("text", LIMIT)) == tripped
    assert set(rules("chat", LIMIT)) == tripped | {name for name, _, _ in CHAT_RULES}


def test_dropped_rows_say_stage_and_reason_and_the_order_of_rows_is_kept() -> None:
    found = screened("text", {"prompt": "1"}, {"prompt": ""}, {"prompt": "3"}, {"chosen": "bad", "prompt": "4"})
    assert found.kept["prompt"].to_list() == ["1", "3"]
    assert found.dropped.select("prompt", "stage", "reason").rows() == [
        ("", "validate", "empty_prompt"),
        ("4", "validate", "identical"),
    ]
    assert "reason" not in found.kept.columns


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ({"prompt": "", "chosen": "", "rejected": ""}, "empty_prompt"),
        ({"chosen": "", "rejected": ""}, "empty_chosen"),
        ({"chosen": "bad", "margin": 0.0}, "identical"),
        ({"chosen": "\0", "rejected": "\0 ", "margin": -1.0}, "identical_after_folding"),
        ({"chosen": "\0" * (LIMIT + 1)}, "nul_byte"),
        ({"chosen": "c" * (LIMIT + 1), "chosen_score": 11.0, "margin": 0.0}, "too_long"),
        ({"chosen_score": 11.0, "rejected_score": 11.0, "margin": 0.0}, "score_out_of_scale"),
    ],
)
def test_of_several_reasons_the_first_rule_is_named(row: dict[str, Any], first: str) -> None:
    assert reason("text", row, (1.0, 10.0)) == first


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_no_rows_are_no_drops(kind: Kind) -> None:
    found = screened(kind)
    assert (found.kept.height, found.dropped.height) == (0, 0)


@pytest.mark.parametrize(
    ("chosen", "speaks"),
    [
        ("Here is the revised version: x", True),
        ("Sure! Here's a corrected answer: x", True),
        ("Certainly, here is my improved response", True),
        ("Sure! The revised text: x", True),
        ("Here is the corrected and improved version of your essay: x", True),
        ("Here are the polished sentences: x", True),
        ("Below is my edited draft.", True),
        ("Here's the updated translation", True),
        ("Here is the correction: x", True),
        ("Here is a rewrite", True),
        ("Of course! This is the revision: x", True),
        ("Here is the correction fluid that you asked for.", False),
        ("I have updated the calendar invite for Friday.", False),
        ("I've corrected the typo in line 3 and re-ran the tests.", False),
        ("This is a revised edition of the 1954 novel.", False),
        ("I have edited three anthologies.", False),
        ("Here are the updated opening hours: 9-5.", False),
        ("Here are the updated response times: 9 ms.", False),
        ("Here's the polished granite sample list", False),
        ("**Revised answer:** x", True),
        ("The revised law came in 1920", False),
        ("Here is the answer", False),
        ("This is how I revised for exams", False),
        ("A tale. Here is the revised version", False),  # not at the start
    ],
)
def test_a_correction_that_speaks_of_being_one_is_dropped_where_asked_for(chosen: str, speaks: bool) -> None:
    for method, meta_phrases, rejected in (
        ("correction", True, "bad"),
        ("paired", True, "bad"),
        ("correction", False, "bad"),
        ("correction", True, f"{chosen} "),  # the response said it too, so it is no addition
    ):
        frame = pl.DataFrame([TEXT | {"chosen": chosen, "rejected": rejected, "method": method}]).cast(
            dict.fromkeys(("chosen_score", "rejected_score", "margin"), pl.Float64)
        )
        found = validate_pairs(frame, "text", 100, meta_phrases=meta_phrases)
        wanted = speaks and meta_phrases and method == "correction" and rejected == "bad"
        assert (found.dropped["reason"].to_list() == ["meta_phrase"]) == wanted
