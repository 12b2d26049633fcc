"""`prefkit show`: the pairs that were asked for, where their sides differ, and how that looks."""

import io
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from finished import add_audit
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.documents import Audit
from prefkit.errors import DatasetError, InputError
from prefkit.format import schema
from prefkit.grams import words_in
from prefkit.show import Shown, Turn, as_dict, show_pairs
from prefkit.sides import NARROW, SIDE, Look, print_pairs, shortened
from prefkit.spans import MAX_WORDS, Flag, changes, differences, flag_places, placed_words, side_words
from prefkit.store import read_json, read_manifest, write_json

Build = Callable[..., Path]
Row = Mapping[str, Any]
settled = settings(deadline=None, derandomize=True, database=None)
ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]


@pytest.fixture
def build(tmp_path: Path, write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]) -> Build:
    def make(rows: Sequence[Row] = ROWS, kind: str = "text", form: str = "pairs", **sections: Any) -> Path:
        source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": form}
        build_dataset(pipeline_of(source, kind=kind, split={"test_share": 0}, **sections))
        return tmp_path / "dataset"

    return make


def ids_of(dataset: Path) -> list[str]:
    return pl.read_parquet(dataset / "pairs" / "part-train-00000.parquet")["pair_id"].to_list()


def score(dataset: Path, scores: Sequence[float | None]) -> None:
    """audit/pair_scores.parquet with these shortcut scores, in the order of the pairs."""
    frame = pl.DataFrame({"pair_id": ids_of(dataset), "shortcut_score": pl.Series(scores, dtype=pl.Float64)})
    nulls = [pl.lit(None, t).alias(n) for n, t in schema("pair_scores", "text").items() if n not in frame.columns]
    columns = frame.with_columns(nulls).select(list(schema("pair_scores", "text")))
    path = dataset / "audit" / "audit.json"
    found = read_json(path) if path.exists() else None
    add_audit(dataset, {"pair_scores": columns})
    if found is not None:
        write_json(path, found | {"parts": read_json(path)["parts"]})


def find(dataset: Path, *findings: tuple[str, str], also: Sequence[str] = ()) -> None:
    """audit/audit.json with findings of that family and name."""
    empty = dict.fromkeys(
        ("side", "alphabet", "n", "num_pairs", "coverage", "win_rate", "win_rate_low", "win_rate_high", "p", "q")
    ) | dict.fromkeys(("p_permutation", "z_length"))
    listed = [
        {**empty, "level": "warn", "family": family, "name": name, "reason": "r", "advice": "a", "also": list(also)}
        | {"pair_ids": [], "sources": {}}
        for family, name in findings
    ]
    audit: dict[str, Any] = {
        name: {} for name in ("tokens", "features", "lengths", "similarity", "sources", "limits", "settings")
    }
    power = {"win_rate": 1.0, "one_sided_coverage": 1.0, "num_tests": 1, "enough": False}
    whole = {**audit, "verdict": "warn", "reason": "r", "strict": False, "pairs": 1, "prompts": 1, "findings": listed}
    whole |= {"allowed": [], "allow_unused": [], "power": power, "probes": [], "cover": [], "boundaries": None}
    Audit.model_validate(whole)
    path = dataset / "audit" / "audit.json"
    write_json(path, whole | {"parts": read_json(path)["parts"] if path.exists() else []})


def prompts(shown: Shown) -> list[str]:
    return [pair.prompt[-1].text for pair in shown.pairs]


def printed(shown: Shown, width: int = 100, *, full: bool = False, **console: Any) -> str:
    file = io.StringIO()
    print_pairs(shown, Console(file=file, width=80, **console), width=width, full=full)
    return file.getvalue()


def marked(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def both(one: str, other: str) -> tuple[list[str], list[str]]:
    """What differs in two texts."""
    (mine,), (theirs,) = differences([one], [other])
    return marked(one, mine), marked(other, theirs)


# which pairs


def test_without_an_audit_pairs_are_spaced_evenly_in_their_order(build: Build) -> None:
    dataset = build()
    shown = show_pairs(dataset, count=3)
    assert prompts(shown) == ["p1", "p3", "p5"]  # the middle of 0 1, of 2 3, of 4 5
    assert (shown.matching, shown.total, shown.by_score, shown.audited) == (6, 6, False, False)
    said = printed(shown)
    assert f"{dataset}: 3 of 6 pairs, evenly spaced\n" in printed(shown, 300)
    assert "not audited yet: prefkit audit" in said
    told = printed(shown._replace(dataset="it's mine"), 300)
    assert "not audited yet: prefkit audit 'it'\"'\"'s mine' finds what gives chosen away" in told
    assert prompts(show_pairs(dataset, count=100)) == [f"p{i}" for i in range(6)]
    assert prompts(show_pairs(dataset)) == ["p0", "p1", "p3", "p4", "p5"]  # 6 i / 10 for i = 1, 3, 5, 7, 9


def test_after_an_audit_the_highest_score_comes_first_ties_in_their_order_and_nulls_last(build: Build) -> None:
    dataset = build()
    score(dataset, [0.5, None, 2.0, 2.0, -1.0, 0.1])
    shown = show_pairs(dataset, count=6)
    assert prompts(shown) == ["p2", "p3", "p0", "p5", "p4", "p1"]
    assert (shown.by_score, shown.audited) == (True, True)
    said = printed(shown, 300)
    assert "6 of 6 pairs, the highest shortcut_score first" in said
    assert "shortcut_score 2\n" in said
    assert "not audited" not in said


def test_scores_that_are_all_null_order_nothing(build: Build) -> None:
    dataset = build()
    score(dataset, [None] * 6)
    shown = show_pairs(dataset, count=1)
    assert (shown.by_score, shown.audited, prompts(shown)) == (False, True, ["p3"])


def test_a_condition_sees_all_columns_of_pairs_and_scores_and_the_other_views(build: Build) -> None:
    dataset = build()
    score(dataset, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    conditions = {
        "source_row = 2": ["p1"],
        "prompt = 'p1' or chosen = 'good 0'": ["p1", "p0"],
        "shortcut_score > 3.5 -- and nothing else": ["p5", "p4"],
        "pairs.source_row > (select avg(source_row) from pairs)": ["p5", "p4", "p3"],
        "pair_id in (select pair_id from dropped)": [],
        "split = 'test'": [],
        "null": [],
    }
    for condition, wanted in conditions.items():
        shown = show_pairs(dataset, where=condition)
        assert (prompts(shown), shown.matching, shown.total) == (wanted, len(wanted), 6), condition


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("true; select 1", "several statements"),
        ("nothing > 1", 'Binder Error: Referenced column "nothing" not found in FROM clause!'),
        ("pair_id in (select x from nowhere)", "Catalog Error: Table with name nowhere does not exist!"),
        ("true) or (true", 'Parser Error: syntax error at or near ")"'),
        ("true) union all select 'x', 1 --", 'Parser Error: syntax error at or near ")"'),
        ("true limit 1", 'Parser Error: syntax error at or near "limit"'),
        ("true order by random()", 'Parser Error: syntax error at or near "order"'),
        ("true;", 'Parser Error: syntax error at or near ";"'),
        ("count(*) > 1", "Binder Error: WHERE clause cannot contain aggregates!"),
        ("cast(prompt as int) = 1", "Conversion Error: Could not convert string 'p"),
        (
            "exists (from read_text('/etc/hostname'))",
            "read_text() is not allowed: a query reads no file but the dataset's",
        ),
        ("", "Parser Error: "),
    ],
)
def test_what_is_no_condition_is_refused_in_duckdbs_words(build: Build, condition: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        show_pairs(build(), where=condition)
    error = raised.value
    assert error.message.startswith(message)
    assert error.where == "--where"
    assert error.expected.startswith("one condition over pair_id, prompt_id, prompt, chosen, rejected, tools, split, ")
    assert error.expected.endswith(", length_margin, structure_margin, words_margin, shortcut_score")


def test_a_token_picks_pairs_that_have_it_on_one_side_only(build: Build) -> None:
    sides = [
        ("Of COURSE yes", "no"),
        ("no", "of course"),
        ("of course", "Of course not"),
        ("course of", "of the course"),
    ]
    rows = [{"prompt": f"p{i}", "chosen": c, "rejected": r} for i, (c, r) in enumerate(sides)]
    dataset = build(rows)
    shown = show_pairs(dataset, token="of  Course")
    assert prompts(shown) == ["p0", "p1"]
    assert shown.token is not None
    assert tuple(shown.token) == ("of course", 1, 1, 1)
    assert [marked(t.text, t.flagged) for p in shown.pairs for t in (*p.chosen, *p.rejected)] == [
        ["Of COURSE"],
        [],
        [],
        ["of course"],
    ]
    assert "'of course' is in chosen only in 1 pairs, in rejected only in 1, in both in 1" in printed(shown)
    score(dataset, [1.0, 2.0, 3.0, 4.0])
    assert prompts(show_pairs(dataset, token="of course")) == ["p1", "p0"]
    assert prompts(show_pairs(dataset, token="of course", where="source_row > 1")) == ["p1"]
    only_both = show_pairs(dataset, token="of course", where="source_row > 2")
    assert prompts(only_both) == ["p2"]
    assert [marked(t.text, t.flagged) for p in only_both.pairs for t in (*p.chosen, *p.rejected)] == [
        ["of course"],
        ["Of course"],
    ]


def test_a_token_is_found_in_whatever_block_and_spelling(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefkit.show.ROWS", 2)
    words = ["Straße", "STRASSE", "x", "strasse!", "Strassen", "caf\u00e9", "cafe\u0301"]
    rows = [{"prompt": f"p{i}", "chosen": f"a {word}", "rejected": f"b {i}"} for i, word in enumerate(words)]
    dataset = build(rows)
    assert prompts(show_pairs(dataset, token="strasse", count=9)) == ["p0", "p1", "p3"]
    assert prompts(show_pairs(dataset, token="CAFÉ", count=9)) == ["p5", "p6"]
    assert prompts(show_pairs(dataset, token="strasse", where="source_row in (2, 3)")) == ["p1"]


def test_a_token_without_a_word_is_refused(build: Build) -> None:
    for token in ("", "  \n"):
        with pytest.raises(InputError) as raised:
            show_pairs(build(), token=token)
        assert str(raised.value) == (
            "--token: there is no word in it\n  expected: a word or several, such as 'of course'"
        )


def test_no_pair_that_fits_is_a_sentence(build: Build) -> None:
    dataset = build()
    for shown in (show_pairs(dataset, where="false"), show_pairs(dataset, token="absent")):
        assert (shown.pairs, shown.matching) == ([], 0)
        assert printed(shown, 300).splitlines()[0] == f"{dataset}: none of its 6 pairs fits"


def test_a_dataset_without_pairs_shows_none(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "same", "rejected": "same"}])
    for shown in (show_pairs(dataset), show_pairs(dataset, token="x"), show_pairs(dataset, where="true")):
        assert (shown.pairs, shown.matching, shown.total) == ([], 0, 0)
    assert "none of its 0 pairs fits" in printed(shown, 300)


def test_a_pair_is_shown_once_whatever_a_build_keeps(build: Build) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    shown = show_pairs(build([row, row, *ROWS], dedupe={"exact": False}), count=9)
    assert (shown.total, prompts(shown)) == (7, ["p", *(f"p{i}" for i in range(6))])


def test_what_is_no_finished_dataset_is_said(build: Build, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such dataset"):
        show_pairs(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="not a prefkit dataset"):
        show_pairs(tmp_path)
    dataset = build()
    (dataset / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="an unfinished build"):
        show_pairs(dataset)


def test_a_damaged_audit_is_said(build: Build) -> None:
    dataset = build()
    find(dataset)
    (dataset / "audit" / "audit.json").write_text('{"verdict": "pass"}')
    with pytest.raises(DatasetError, match="is damaged at"):
        show_pairs(dataset)


def test_the_same_question_has_the_same_answer(build: Build) -> None:
    dataset = build()
    score(dataset, [1.0] * 6)
    find(dataset, ("tokens", "good"))
    answers = {printed(show_pairs(dataset, token="good")) for _ in range(3)}
    assert len(answers) == 1


# what is flagged


def test_findings_are_flagged_where_one_side_has_them_and_the_other_does_not(build: Build) -> None:
    rows = [
        {"prompt": "p0", "chosen": "Sure, I'm sorry. Sorry!", "rejected": "sure thing, not that"},
        {"prompt": "p1", "chosen": "fine", "rejected": "i ' M in"},
    ]
    dataset = build(rows)
    find(dataset, ("tokens", "sorry"), ("tokens", "sure"), ("structure", "list_items"), also=["i ' m", ""])
    shown = show_pairs(dataset)
    assert shown.flagged == ["sorry", "i ' m", "sure"]
    one, other = shown.pairs
    assert marked(one.chosen[0].text, one.chosen[0].flagged) == ["I'm", "sorry", "Sorry"]
    assert (one.rejected[0].flagged, one.flagged) == ([], [("sorry", "chosen"), ("i ' m", "chosen")])
    assert marked(other.rejected[0].text, other.rejected[0].flagged) == ["i ' M"]
    assert "named by the audit: 'sorry' in chosen, 'i ' m' in chosen\n" in printed(shown)
    assert "<<sorry>>" in printed(shown)


def test_first_and_last_words_are_flagged_at_the_ends_alone() -> None:
    words = side_words(["Certainly! It is", "certainly."])
    first, last = Flag("first", ("certainly", "!"), "first"), Flag("last", ("certainly", "."), "last")
    absent = [Flag("x", ("it",), "first"), Flag("y", ("certainly",), "last"), Flag("z", ("no",), "anywhere")]
    assert flag_places(words, [first, last, *absent]) == {first: [(0, 2)], last: [(4, 6)]}


def test_a_finding_about_first_words_marks_them(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "Certainly! Certainly.", "rejected": "Well, certainly!"}])
    find(dataset, ("structure", "first_words: certainly !"), ("structure", "last_words: !"))
    (pair,) = show_pairs(dataset).pairs
    assert marked(pair.chosen[0].text, pair.chosen[0].flagged) == ["Certainly!"]
    assert marked(pair.rejected[0].text, pair.rejected[0].flagged) == ["!"]


# where sides differ


def test_words_that_differ_are_marked_and_white_space_between_equal_ones() -> None:
    assert both("He go to school.", "He goes to the school.") == (["go"], ["goes", "the"])
    assert both("a b c", "a b c") == ([], [])
    assert both("a b", "a  b") == ([" "], ["  "])
    assert both("a , b", "a, b") == ([" "], [])
    assert both("a\n", "a") == (["\n"], [])
    assert both("  a", "a") == (["  "], [])
    assert both("", "some words") == ([], ["some words"])
    assert both("Word", "word") == (["Word"], ["word"])
    assert both("caf\u00e9", "cafe\u0301") == (["caf\u00e9"], ["cafe\u0301"])


def test_what_agrees_by_chance_parts_no_change() -> None:
    assert both("one two three the four five six", "uno dos tres the quatro cinco seis") == (
        ["one two three the four five six"],
        ["uno dos tres the quatro cinco seis"],
    )
    assert changes(["a", "x", "b"], ["c", "x", "d"]) == [(0, 3, 0, 3)]  # one word of three in common
    same = ["k", "l", "m", "n"]
    assert changes(["a", *same, "b"], ["c", *same, "d"]) == [(0, 1, 0, 1), (5, 6, 5, 6)]


def test_sides_of_several_messages_are_marked_message_by_message() -> None:
    mine, theirs = differences(["same words here", "then this ends it"], ["same words here", "then that ends it"])
    assert (mine, theirs) == ([[], [(5, 9)]], [[], [(5, 9)]])
    mine, theirs = differences(["one and only message"], ["one and only message", "another"])
    assert (mine, theirs) == ([[]], [[], [(0, 7)]])


def test_very_long_sides_are_compared_at_their_ends_only() -> None:
    one, other = ([*"ab", *[f"{side}{i}" for i in range(MAX_WORDS + 1)], "z"] for side in ("x", "y"))
    assert changes(one, other) == [(2, MAX_WORDS + 3, 2, MAX_WORDS + 3)]


@settled
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_what_stands_between_the_changes_is_equal(one: list[str], other: list[str]) -> None:
    found = changes(one, other)
    left, right = list(one), list(other)
    for change in reversed(found):
        del left[change.start : change.end], right[change.other_start : change.other_end]
    assert left == right
    assert (found == []) == (one == other)


@settled
@given(st.text(st.sampled_from("aßŉİǰ e\u0301\u0327\u1100\u1161\u11a8\u09c7\u09be_!\n\u200b\U0001f600K"), max_size=14))
def test_words_are_those_of_the_audit_and_stand_where_they_say(text: str) -> None:
    words = list(placed_words(text))
    assert [word.folded for word in words] == words_in(text)
    for word in words:
        assert text[word.start : word.end] == word.raw
        assert word.folded in words_in(word.raw)


@settled
@given(st.text("ab \n.", max_size=20), st.text("ab \n.", max_size=20))
def test_without_what_is_marked_two_texts_are_the_same(one: str, other: str) -> None:
    left, right = (
        "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in spans[0]))
        for text, spans in zip((one, other), differences([one], [other]), strict=True)
    )
    assert left.split() == right.split() or left.replace(" ", "").replace("\n", "") == "".join(right.split())
    assert (differences([one], [other]) == ([[]], [[]])) == (one == other)


# chat


def chat(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_earlier_turns_are_counted_and_shortened_and_the_last_one_is_shown(build: Build) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} {'word ' * 60}"} for i in range(6)]
    prompt = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "And\nnow?"}]
    reply = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    shown = show_pairs(build([chat(prompt, *reply)], "chat", "trl"))
    said = printed(shown)
    assert "  7 earlier turns\n  system: Be brief.\n    [... 4 turns ...]\n  user: turn 4 word" in said
    assert "  assistant: turn 5 word" in said
    assert "  user: And\n  now?\n" in said
    assert "turn 3" not in said
    # "turn 5" and 60 times " word" are 306 characters; the last space among the first 100 ends 96 of them
    assert "assistant: turn 5" + " word" * 18 + " [... 210 characters ...]\n" in printed(shown, 300)
    whole = printed(shown, full=True)
    assert "[..." not in whole
    assert "turn 3" in whole


def test_tools_calls_thoughts_and_empty_extras_are_shown(build: Build) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Київ", "a": 1}}}
    tools = [{"type": "function", "function": {"name": "weather"}}, {"name": "search"}]
    prompt = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "8 mm", "tool_call_id": "c1", "name": "weather"},
    ]
    chosen = [{"role": "assistant", "content": "Yes.", "reasoning_content": "8 is rain"}]
    odd = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
    shown = show_pairs(build([chat(prompt, chosen, [odd], tools=tools)], "chat", "trl"))
    (pair,) = shown.pairs
    assert pair.tools == ["weather", "search"]
    assert [turn.role for turn in pair.prompt] == ["user", "assistant", "tool weather c1"]
    assert pair.prompt[1].text == 'call weather {"city": "Київ", "a": 1}'
    assert pair.chosen[0].text == "(reasoning_content) 8 is rain\nYes."
    assert pair.rejected[0].text == "call weather {}"
    said = printed(shown)
    assert "tools: weather, search" in said
    assert "tool weather c1: 8 mm" in said


def test_a_token_in_a_call_is_found(build: Build) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    prompt, other = [{"role": "user", "content": "Rain?"}], [{"role": "assistant", "content": "No."}]
    shown = show_pairs(build([chat(prompt, [call], other)], "chat", "trl"), token="weather")
    assert shown.matching == 1
    assert "<<weather>>" in printed(shown)


def test_a_side_of_several_messages_names_their_roles(build: Build) -> None:
    say = [{"role": role, "content": text} for role, text in (("assistant", "A?"), ("user", "B."), ("assistant", "C."))]
    shown = show_pairs(build([chat([{"role": "user", "content": "p"}], say, say[:1])], "chat", "trl"))
    said = printed(shown)
    assert "assistant: A?" in said
    assert "user: {+B.+}" in said


# how it looks

PIPE: dict[str, Any] = {}
COLOUR: dict[str, Any] = {"force_terminal": True, "color_system": "standard"}
NO_COLOR: dict[str, Any] = {**COLOUR, "no_color": True}


def test_without_colour_signs_stand_around_what_differs(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "the cat sat here", "rejected": "the dog sat here"}])
    find(dataset, ("tokens", "cat"))
    shown = show_pairs(dataset)
    for options in (PIPE, NO_COLOR):
        lines = printed(shown, **options).splitlines()
        assert any("the {+<<cat>>+} sat here" in line and "the [-dog-] sat here" in line for line in lines)
        assert any(
            "what differs: {+chosen+} [-rejected-]; named by the audit or --token: <<flagged>>" in x for x in lines
        )


def test_with_colour_there_are_no_signs(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "the cat sat", "rejected": "the dog sat"}])
    find(dataset, ("tokens", "cat"))
    said = printed(show_pairs(dataset), **COLOUR)
    assert "\x1b[1;30;43mcat\x1b[0m" in said
    assert "\x1b[1;31mdog\x1b[0m" in said
    assert not any(sign in said for sign in ("{+", "[-", "<<", "what differs"))


def test_signs_stay_nested_where_places_overlap(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "x of course y z", "rejected": "x of horse y z"}])
    said = printed(show_pairs(dataset, token="of course"))
    assert "x <<of {+course+}>> y z" in said


def test_no_line_is_wider_than_asked_and_none_ends_in_spaces(build: Build) -> None:
    wide = "日本語のとても長い文章です。" * 9 + " " + "x" * 150 + "\tdef f():\n        return 1\n\n\n\U0001f600 end"
    rows = [{"prompt": wide, "chosen": wide + " yes", "rejected": "no " + wide}]
    shown = show_pairs(build(rows))
    for width in (20, 37, NARROW - 1, NARROW, 81, 200):
        lines = printed(shown, width, full=True).splitlines()
        assert max(map(cell_len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)


def test_a_narrow_terminal_has_one_side_under_the_other(build: Build) -> None:
    shown = show_pairs(build(ROWS[:1]))
    assert "\nchosen\n  {+good+} 0\nrejected\n  [-bad-] 0\npair_id\n" in printed(shown, NARROW - 1)
    assert "chosen" in next(line for line in printed(shown, NARROW).splitlines() if line.endswith("rejected"))


def test_texts_are_never_markup_nor_escape_sequences(build: Build) -> None:
    evil = "[bold]x[/bold] [link=http://x]y[/] \x1b]0;owned\x07\x1b[2J \r\x08 \u202e\u2028 :smile:"
    rows = [{"prompt": evil, "chosen": evil + " a", "rejected": evil + " b"}]
    dataset = build(rows)
    find(dataset, ("tokens", "[bold]\x1b[2J"))
    for options in (PIPE, COLOUR):
        said = printed(show_pairs(dataset, token="smile"), 300, **options)
        without = "".join(part.partition("m")[2] if i else part for i, part in enumerate(said.split("\x1b[")))
        assert [c for c in without if not c.isprintable() and c not in "\n\ufffd"] == []
        assert "[bold]x[/bold] [link=http://x]y[/]" in without
        assert ":" in without
        assert "owned" in without


def test_an_ascii_terminal_is_sent_ascii(build: Build) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_pairs(show_pairs(build()), Console(file=file, width=80))
    file.flush()


def test_titles_and_footer_say_where_a_pair_comes_from(build: Build, tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 4.5, "rejected_score": 2.0}
    dataset = build([{**row, "chosen_model": "big", "rejected_model": "small", "weight": 0.5}])
    score(dataset, [1.23456])
    said = printed(show_pairs(dataset), 300)
    assert "chosen, score 4.5, big " in said
    assert "rejected, score 2, small\n" in said
    (pair_id,) = ids_of(dataset)
    assert f"pair_id {pair_id}\n" in said
    rest = "rows.jsonl:1, train, paired, margin 2.5, shortcut_score 1.23, weight 0.5\n"
    assert f"{tmp_path}/{rest}" in said


def test_many_flags_are_counted(build: Build) -> None:
    words = [f"w{i}" for i in range(15)]
    dataset = build([{"prompt": "p", "chosen": " ".join(words), "rejected": "r"}])
    find(dataset, *(("tokens", word) for word in words))
    assert "'w11' in chosen and 3 more\n" in printed(show_pairs(dataset), 400)


def test_an_n_gram_that_holds_another_one_is_not_named_again(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "of course it is", "rejected": "r it"}])
    find(dataset, *(("tokens", name) for name in ("of course", "of course it", "course", "is")))
    assert "named by the audit: 'course' in chosen, 'is' in chosen\n" in printed(show_pairs(dataset))


# long texts

LOOK = Look(80, colour=False, full=False, rule="|")


def long_turn(differs: list[tuple[int, int]] = [], flagged: list[tuple[int, int]] = [], size: int = 8000) -> Turn:  # noqa: B006
    return Turn("", "word " * (size // 5), differs, flagged)


def test_a_long_text_keeps_its_ends_and_what_is_around_its_marks() -> None:
    turn = long_turn([(4000, 4004)], [(6000, 6004)])
    kept = shortened(turn, LOOK, SIDE)
    assert kept[0][0] == 0
    assert kept[-1][1] == 8000
    for start, end in ((3950, 4050), (5950, 6050)):
        assert any(a <= start and end <= b for a, b in kept)
    assert sum(b - a for a, b in kept) <= SIDE
    for start, end in kept:  # between words
        assert start == 0 or turn.text[start - 1] == " "
        assert end == 8000 or turn.text[end] == " "
    assert shortened(turn, LOOK._replace(full=True), SIDE) == [(0, 8000)]
    assert shortened(long_turn(size=SIDE), LOOK, SIDE) == [(0, SIDE)]


def test_more_marks_than_there_is_room_for_are_left_out_from_the_end_flags_last() -> None:
    turn = long_turn([(i, i + 4) for i in range(1000, 7000, 400)], [(7000, 7004)])
    kept = shortened(turn, LOOK, SIDE)
    assert sum(b - a for a, b in kept) <= SIDE
    inside = [any(a <= start < b for a, b in kept) for start, _ in [*turn.differs, *turn.flagged]]
    assert inside[0]
    assert inside[-1]
    assert not all(inside)


def test_line_breaks_take_room_too() -> None:
    turn = Turn("", "a\n" * 700, [], [])
    (start, end), *_ = shortened(turn, LOOK, SIDE)
    assert (start, turn.text.count("\n", start, end) < 60) == (0, True)


def test_a_text_without_spaces_is_cut_before_no_mark() -> None:
    turn = Turn("", "e\u0301" * 5000, [], [])
    for start, end in shortened(turn, LOOK, SIDE):
        assert not unicodedata.combining(turn.text[start])
        assert end == 10_000 or not unicodedata.combining(turn.text[end])


def test_how_much_is_left_out_is_said_and_full_leaves_nothing_out(build: Build) -> None:
    rows = [{"prompt": "p", "chosen": "word " * 3000 + "a", "rejected": "word " * 3000 + "b"}]
    shown = show_pairs(build(rows))
    said = printed(shown, 200)
    left = [int(line.split("[... ")[1].split()[0]) for line in said.splitlines() if "[... " in line]
    assert left
    assert len(said) < 4 * SIDE
    assert "{+a+}" in said
    assert "[-b-]" in said
    whole = printed(shown, 200, full=True)
    assert "[... " not in whole
    assert whole.count("word") == 6000


@settled
@given(st.text("ab \n", max_size=400), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=6))
def test_what_is_kept_is_in_order_and_inside_the_text(text: str, spans: list[tuple[int, int]]) -> None:
    text = text * 12
    inside = sorted({(a, min(a + b, len(text))) for a, b in spans if a < len(text) and b})
    kept = shortened(Turn("", text, inside, inside[:1]), LOOK, 500)
    edges = [edge for span in kept for edge in span]
    assert edges == sorted(edges)
    assert kept[0][0] == 0
    assert edges[-1] <= len(text)


# for a machine


def test_as_json_the_texts_are_whole_with_the_places_in_them(build: Build) -> None:
    dataset = build([{"prompt": "p", "chosen": "the cat " + "x " * 3000, "rejected": "the dog " + "x " * 3000}])
    score(dataset, [0.25])
    find(dataset, ("tokens", "cat"))
    told = json.loads(json.dumps(as_dict(show_pairs(dataset, token="cat")), allow_nan=False))
    (pair,) = told.pop("pairs")
    assert told == {
        "dataset": str(dataset),
        "matching": 1,
        "total": 1,
        "by_score": True,
        "audited": True,
        "flagged": ["cat"],
        "token": {"token": "cat", "chosen_only": 1, "rejected_only": 0, "both": 0},
    }
    assert pair["prompt"] == [{"role": "", "text": "p", "differs": [], "flagged": []}]
    assert pair["chosen"][0] == {
        "role": "",
        "text": "the cat " + "x " * 3000,
        "differs": [[4, 7]],
        "flagged": [[4, 7]],
    }
    assert (pair["facts"]["pair_id"], pair["facts"]["shortcut_score"]) == (ids_of(dataset)[0], 0.25)
    assert pair["flagged"] == [["cat", "chosen"]]
    assert as_dict(show_pairs(dataset))["token"] is None


def test_real_replies_are_shown_whole_and_in_width(test_data: Path, pipeline_of: Callable[..., Pipeline]) -> None:
    for name, path, form in (
        ("hh", "hh/harmless_base_test_part.jsonl.gz", {"format": "hh"}),
        ("ua_gec", "ua_gec/gec_only_test.jsonl.gz", UA_GEC),
    ):
        pipeline = pipeline_of({"path": str(test_data / path), **form}, kind="chat")
        dataset = Path(pipeline.dataset).with_name(name)
        build_dataset(pipeline.model_copy(update={"dataset": str(dataset)}))
        shown = show_pairs(dataset, count=40)
        assert len(shown.pairs) == 40
        assert shown.total == read_manifest(dataset)["counts"]["pairs"]
        ok = max(map(cell_len, printed(shown, 72).splitlines())) <= 72
        assert ok, name  # not the rows themselves: they may be offensive


UA_GEC = {
    "format": "corrections",
    "columns": {"prompt": "original", "response": "original", "correction": "corrected", "annotator": None},
}


def test_pairs_that_were_changed_since_they_were_built_are_not_shown(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    made = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "trl"}, kind="text")
    build_dataset(made)
    assert len(show_pairs(made.dataset, count=6).pairs) == 6
    (part, *_) = sorted((Path(made.dataset) / "pairs").iterdir())
    pl.read_parquet(part).head(0).write_parquet(part)
    with pytest.raises(DatasetError, match="part was changed: its sha256 is not the recorded one"):
        show_pairs(made.dataset)
