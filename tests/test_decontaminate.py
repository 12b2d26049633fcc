"""Pairs that hold evaluation items: judged by a plain oracle of sets and loops, and measured on real files."""

import gzip
import itertools
import json
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefkit import decontaminate
from prefkit.build_settings import EvalSetConfig
from prefkit.decontaminate import Index, contaminated, decontaminate_pairs, index_of
from prefkit.evals import read_evals
from prefkit.format import MESSAGES, Kind
from prefkit.grams import words_in

PROPERTY = settings(deadline=None, max_examples=120, derandomize=True, database=None)
SIDES = ("prompt", "chosen", "rejected")
Hit = tuple[str, float, str] | None
Message = tuple[str, str]  # role and content


def items_of(*items: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(list(items), schema={"item": pl.String, "text": pl.String}, orient="row")


def index(*texts: str, ngram: int = 3) -> Index:
    return index_of(items_of(*((f"e:{line}", text) for line, text in enumerate(texts, 1))), ngram)


def text_pairs(rows: Sequence[Sequence[str]]) -> pl.DataFrame:
    return pl.DataFrame([list(row) for row in rows], schema=dict.fromkeys(SIDES, pl.String), orient="row")


def messages(turns: Sequence[Message]) -> list[dict[str, str | None]]:
    return [{"role": role, "content": content, "extra": None} for role, content in turns]


def chat_pairs(rows: Sequence[Sequence[Sequence[Message]]]) -> pl.DataFrame:
    columns = {side: [messages(row[place]) for row in rows] for place, side in enumerate(SIDES)}
    return pl.DataFrame(columns, schema=dict.fromkeys(SIDES, MESSAGES))


def hits(pairs: pl.DataFrame, kind: Kind, found_by: Index, max_overlap: float) -> list[Hit]:
    found = contaminated(pairs, kind, found_by, max_overlap)
    assert found.schema == {"eval_item": pl.String, "eval_overlap": pl.Float64, "eval_side": pl.String}
    return [row if row[0] is not None else None for row in found.iter_rows()]


def hit(found_by: Index, prompt: str, chosen: str = "", rejected: str = "", max_overlap: float = 0.5) -> Hit:
    return hits(text_pairs([(prompt, chosen, rejected)]), "text", found_by, max_overlap)[0]


# the oracle


def overlap(item: str, text: str, n: int, *, whole_only: bool = False) -> float:
    of, held = (words_in(part, marks=False, unspaced=True) for part in (item, text))
    if len(of) < n:
        return float(len(of) > 0 and of == held)
    if whole_only:
        return 0.0
    grams = {tuple(held[at : at + n]) for at in range(len(held) - n + 1)}
    covered = {at + k for at in range(len(of) - n + 1) if tuple(of[at : at + n]) in grams for k in range(n)}
    return len(covered) / len(of)


def judged(items: Sequence[tuple[str, str]], sides: Sequence[tuple[str, str, bool]], n: int, most: float) -> Hit:
    """The hit of one pair, by its training texts: side, text, and whether it counts as a whole only."""
    best: tuple[float, str, int, str] | None = None
    for name, item in items:
        for side, text, whole_only in sides:
            share = overlap(item, text, n, whole_only=whole_only)
            if share > most or share == 1:
                claim = (-share, name, SIDES.index(side), side)
                best = claim if best is None else min(best, claim)
    return None if best is None else (best[1], -best[0], best[3])


def of_texts(row: Sequence[str]) -> list[tuple[str, str, bool]]:
    return [(side, text, False) for side, text in zip(SIDES, row, strict=True)]


def of_chat(row: Sequence[Sequence[Message]]) -> list[tuple[str, str, bool]]:
    sides = [(side, "\n".join(content for _, content in turns), False) for side, turns in zip(SIDES, row, strict=True)]
    asked = [content for role, content in row[0] if role == "user"]
    return [*sides, *(("prompt", content, True) for content in asked[-1:])]


PARTS = ["a", "b", "A", "b", "a", "c", "!", "語", "語に", "e\u0301", "\u00e9", "ß", "ss", "x_1", "\u200b", "a-b", ","]
TEXT = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([" ", " ", " ", "\n", ""])), max_size=9).map(
    lambda parts: "".join(part + space for part, space in parts)
)
LETTERS = st.text("ab", max_size=10).map(" ".join)
ANY = st.one_of(LETTERS, LETTERS, TEXT)
ITEMS = st.lists(st.tuples(st.sampled_from(["e:1", "e:2", "e:10", "f:é", "f:1"]), ANY), max_size=6)
ROWS = st.lists(st.tuples(ANY, ANY, ANY), max_size=5)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), ANY), min_size=1, max_size=3)
CHATS = st.lists(st.tuples(TURNS, TURNS, TURNS), max_size=3)
MOST = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.5, 0.5, 0.6, 2 / 3, 0.75, 1.0])
AT_ONCE = st.sampled_from([1, 5, 2**20])


@PROPERTY
@given(ITEMS, ROWS, st.integers(2, 4), MOST, AT_ONCE, st.sampled_from([2, 4096]))
@example([("e:1", "a b a b a b a"), ("e:2", "")], [("a b", "b a b", "a b a b")], 2, 0.5, 1, 4096)
@example([("e:2", "a b a a"), ("e:10", "a b a c")], [("a b a", "x a b a", "")], 3, 0.5, 1, 2)
def test_what_is_found_is_what_plain_sets_find(
    items: list[tuple[str, str]], rows: list[tuple[str, str, str]], n: int, most: float, at_once: int, block: int
) -> None:
    expected = [judged(items, of_texts(row), n, most) for row in rows]
    with mock.patch.multiple(decontaminate, AT_ONCE=at_once, BLOCK=block):
        assert hits(text_pairs(rows), "text", index_of(items_of(*items), n), most) == expected


@PROPERTY
@given(ITEMS, CHATS, st.integers(2, 4), MOST)
def test_of_conversations_all_messages_are_read_and_the_last_question_by_itself(
    items: list[tuple[str, str]], rows: list[tuple[list[Message], ...]], n: int, most: float
) -> None:
    expected = [judged(items, of_chat(row), n, most) for row in rows]
    assert hits(chat_pairs(rows), "chat", index_of(items_of(*items), n), most) == expected


@settings(PROPERTY, max_examples=75)
@given(ITEMS, ROWS, st.randoms(use_true_random=False))
def test_no_order_of_items_or_of_pairs_changes_a_hit(
    items: list[tuple[str, str]], rows: list[tuple[str, str, str]], random: Any
) -> None:
    before = dict(zip(rows, hits(text_pairs(rows), "text", index_of(items_of(*items), 2), 0.5), strict=True))
    mixed, shuffled = random.sample(items, len(items)), random.sample(rows, len(rows))
    after = hits(text_pairs(shuffled), "text", index_of(items_of(*mixed), 2), 0.5)
    assert after == [before[row] for row in shuffled]


# by hand


def test_the_share_is_that_of_the_words_which_common_ngrams_cover() -> None:
    found_by = index("one two three four five six seven eight nine ten")
    assert hit(found_by, "say: one TWO three, four five six... and no more") == ("e:1", 0.6, "prompt")
    assert hit(found_by, "", "two three four x seven eight nine y nine ten") == ("e:1", 0.6, "chosen")
    assert hit(found_by, "", "", "ten nine eight seven six five four three two one") is None


def test_a_share_of_exactly_max_overlap_stays() -> None:
    found_by = index("one two three four five six seven eight")
    assert hit(found_by, "one two three four") is None
    assert hit(found_by, "one two three four", max_overlap=0.49) == ("e:1", 0.5, "prompt")
    assert hit(found_by, "one two three four five") == ("e:1", 0.625, "prompt")
    three_tenths = index("a b c d e f g h i j")  # 3 / 10 as a number is what 0.3 is
    assert hit(three_tenths, "a b c", max_overlap=0.3) is None


def test_at_max_overlap_1_only_what_is_covered_whole_is_found() -> None:
    found_by = index("one two three four five", "six seven")
    assert hit(found_by, "one two three four", max_overlap=1) is None
    assert hit(found_by, "zero one two three four five", max_overlap=1) == ("e:1", 1.0, "prompt")
    assert hit(found_by, "Six, seven!", max_overlap=1) == ("e:2", 1.0, "prompt")


def test_an_ngram_covers_every_place_where_the_item_has_it() -> None:
    assert hit(index("a b c x a b c y z"), "a b c") == ("e:1", 6 / 9, "prompt")


def test_two_texts_of_a_pair_do_not_add_up() -> None:
    found_by = index("one two three four five six seven eight nine")
    assert hit(found_by, "one two three", "four five six", "seven eight nine") is None
    assert hit(found_by, "one two three four", "five six seven eight nine") == ("e:1", 5 / 9, "chosen")
    assert hit(found_by, "one two three four five", "five six seven eight nine") == ("e:1", 5 / 9, "prompt")


def test_a_short_item_is_found_only_where_a_text_has_the_same_words() -> None:
    found_by = index("What is 2 + 2?", "Why?", ngram=8)
    assert hit(found_by, "what is 2 2") == ("e:1", 1.0, "prompt")
    assert hit(found_by, "What is 2 + 2? Explain.") is None
    assert hit(found_by, "What is 22?") is None
    assert hit(found_by, "x", "y", " why ") == ("e:2", 1.0, "rejected")
    assert hit(found_by, "2 2 is what") is None


def test_a_short_question_at_the_end_of_a_conversation_is_found() -> None:
    found_by = index("Why is that?", ngram=8)
    talk = [("system", "Be brief."), ("user", "It rains."), ("assistant", "Yes."), ("user", "why is that")]
    reply = [("assistant", "Clouds.")]
    cases = {
        "last": (talk, reply, reply),
        "before": ([*talk, ("assistant", "Hm?"), ("user", "Well?")], reply, reply),
        "system": ([("system", "Why is that?"), ("user", "Well?")], reply, reply),
        "reply": (talk[:2], [("assistant", "Why is that?")], reply),
        "after a tool": ([*talk, ("assistant", "calls"), ("tool", "42")], reply, reply),
        "both": (talk, [("assistant", "Why is that?")], reply),
        "of a reply": (talk[:2], [("assistant", "So."), ("user", "Why is that?"), ("assistant", "Hm.")], reply),
    }
    found = hits(chat_pairs(list(cases.values())), "chat", found_by, 0.5)
    sides = {name: None if one is None else one[2] for name, one in zip(cases, found, strict=True)}
    assert sides == {
        "last": "prompt",
        "before": None,
        "system": None,
        "reply": "chosen",
        "after a tool": "prompt",
        "both": "prompt",
        "of a reply": None,
    }


def test_what_a_call_of_a_tool_says_is_read_too() -> None:
    calls = json.dumps({"tool_calls": [{"function": {"name": "find", "arguments": "one two three four five"}}]})
    pairs = chat_pairs([([("user", "Look.")], [("assistant", "")], [("assistant", "No.")])])
    called = pl.Series("chosen", [[{"role": "assistant", "content": "", "extra": calls}]], MESSAGES)
    assert hits(pairs.with_columns(called), "chat", index("one two three four five"), 0.5) == [("e:1", 1.0, "chosen")]


def test_an_item_without_a_word_and_no_item_at_all_find_nothing() -> None:
    for found_by in (index("???", "", " \n", ngram=2), index()):
        assert hit(found_by, "???", "", "Anything at all?") is None
        assert hits(text_pairs([]), "text", found_by, 0.5) == []
        assert hits(chat_pairs([]), "chat", found_by, 0.5) == []


def test_letters_and_scripts_are_read_as_words_in_reads_them() -> None:
    assert hit(index("Die STRASSE ist na\u0308chtlich still"), "die Straße ist nächtlich laut") == (
        "e:1",
        0.8,
        "prompt",
    )
    assert hit(index("東京は日本の首都です"), "昔から東京は日本の一部") == ("e:1", 0.6, "prompt")


def test_of_equal_shares_the_smallest_item_is_named_and_the_first_side() -> None:
    items = items_of(("b:1", "one two three"), ("a:2", "one two three"), ("a:10", "one two three"), ("a:1", "one two"))
    assert hit(index_of(items, 3), "", "one two three", "one two three") == ("a:10", 1.0, "chosen")
    assert hit(index_of(items, 3), "one two three four", "one two") == ("a:1", 1.0, "chosen")


def test_the_contaminated_leave_with_stage_reason_and_item() -> None:
    rows = [("p", "c", "r"), ("one two three four", "c", "r"), ("p", "x", "r"), ("p", "c", "five six")]
    pairs = text_pairs(rows).with_row_index("row")
    kept, dropped = decontaminate_pairs(pairs, "text", index("one two three", "Five, six."), 0.5)
    assert kept.equals(pairs[[0, 2]])
    assert dropped.drop(SIDES).to_dicts() == [
        {"row": 1, "eval_item": "e:1", "eval_overlap": 1.0, "eval_side": "prompt"}
        | {"stage": "decontaminate", "reason": "contaminated"},
        {"row": 3, "eval_item": "e:2", "eval_overlap": 1.0, "eval_side": "rejected"}
        | {"stage": "decontaminate", "reason": "contaminated"},
    ]


def test_an_index_can_be_pickled() -> None:
    found_by = pickle.loads(pickle.dumps(index("one two three four", "five six")))
    assert hit(found_by, "one two three four") == ("e:1", 1.0, "prompt")
    assert hit(found_by, "five six") == ("e:2", 1.0, "prompt")


# what is common to many items


def own_words(number: int, count: int) -> str:
    return " ".join(f"w{number}x{place}" for place in range(count))


def test_the_words_that_all_items_begin_with_lead_to_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = own_words(1000, 20)
    found_by = index(*(f"{frame} {own_words(number, 21)}" for number in range(300)), ngram=8)
    copied = f"{frame} {own_words(7, 21)}"
    assert hit(found_by, copied) == ("e:8", 1.0, "prompt")
    looked_at: list[int] = []
    plain = decontaminate._words_covered

    def counted(text: Any, *rest: Any) -> Any:
        looked_at.append(len(text))
        return plain(text, *rest)

    monkeypatch.setattr(decontaminate, "_words_covered", counted)
    assert hit(found_by, f"{frame} {own_words(2000, 30)}") is None
    assert looked_at == []
    assert hit(found_by, copied) == ("e:8", 1.0, "prompt")
    assert looked_at == [1]
    assert hit(found_by, frame, max_overlap=0.4) == ("e:1", 20 / 41, "prompt")


@pytest.mark.parametrize(
    ("num_common", "num_own", "max_overlap", "num"),
    [
        (40, 1, 0.5, 400),
        (8, 400, 0.0, 100),
    ],  # most of each item is common to all; and little of long items, where any counts
)
def test_memory_is_bounded_where_every_text_holds_every_item(
    monkeypatch: pytest.MonkeyPatch, num_common: int, num_own: int, max_overlap: float, num: int
) -> None:
    monkeypatch.setattr(decontaminate, "AT_ONCE", 2**14)
    frame = own_words(1000, num_common)
    found_by = index(*(f"{frame} {own_words(number, num_own)}" for number in range(num)), ngram=8)
    pairs = text_pairs([(f"{frame} and {number}", "c", "r") for number in range(num)])
    tracemalloc.start()
    try:
        found = hits(pairs, "text", found_by, max_overlap)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [("e:1", num_common / (num_common + num_own), "prompt")] * num
    assert peak < num * num * (num_common + num_own)  # bytes: one for each word of each item, for each text


# real files; counts and names of items only


def lines_of(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def eval_index(path: Path, **config: Any) -> Index:
    return index_of(read_evals([EvalSetConfig(path=str(path), **config)]).items, 8)


def prompts_of(texts: Sequence[str]) -> pl.DataFrame:
    return text_pairs([(text, "", "") for text in texts])


@pytest.fixture
def pandalm(test_data: Path) -> pl.DataFrame:
    """The pairs of PandaLM's test set: three annotators, the side that more of them are for, ties left out."""
    rows = []
    for row in json.loads((test_data / "pandalm" / "testset-v1.json").read_bytes()):
        votes = Counter(row[f"annotator{number}"] for number in (1, 2, 3))
        best = max((1, 2), key=lambda side: votes[side])
        texts = isinstance(row["response1"], str) and isinstance(row["response2"], str)  # six rows hold booleans
        if votes[best] <= max(votes[0], votes[3 - best]) or not texts:
            continue
        prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        rows.append((prompt, row[f"response{best}"], row[f"response{3 - best}"]))
    return text_pairs(rows)


def test_of_158_prompts_of_pandalm_157_are_items_of_self_instruct(test_data: Path, pandalm: pl.DataFrame) -> None:
    """The one that is left has lost its instruction: the last of the 13 words of an item is all it holds."""
    path = test_data / "decontam" / "self_instruct_user_oriented.jsonl"
    found_by = eval_index(path, columns=[["instruction", "instances.0.input"]], id="id")
    prompts = prompts_of(pandalm["prompt"].unique(maintain_order=True).to_list())
    assert prompts.height == 158
    found = contaminated(prompts, "text", found_by, 0.5)
    assert found.filter(pl.col("eval_item").is_not_null())["eval_overlap"].to_list() == [1.0] * 157
    left = words_in(prompts.filter(found["eval_item"].is_null())["prompt"].item(), marks=False, unspaced=True)
    item = next(row for row in lines_of(path) if row["id"] == "user_oriented_task_206")
    whole = words_in(f"{item['instruction']}\n{item['instances'][0]['input']}", marks=False, unspaced=True)
    assert (len(left), len(whole), left == whole[-1:]) == (1, 13, True)


def test_of_the_pairs_of_pandalm_one_is_kept(test_data: Path, pandalm: pl.DataFrame) -> None:
    path = test_data / "decontam" / "self_instruct_user_oriented.jsonl"
    found_by = eval_index(path, columns=[["instruction", "instances.0.input"]], id="id")
    kept, dropped = decontaminate_pairs(pandalm, "text", found_by, 0.5)
    assert (kept.height, dropped.height) == (1, 887)
    assert dropped["eval_side"].unique().to_list() == ["prompt"]


def test_each_question_of_gsm8k_is_found_under_its_line(test_data: Path) -> None:
    path = test_data / "gsm8k" / "test.jsonl"
    first = {row["question"]: line for line, row in reversed([*enumerate(lines_of(path), 1)])}
    rows = lines_of(test_data / "gsm8k" / "example_model_solutions.jsonl.gz")
    solutions = [(row["question"], row["175b_verification"]["solution"], row["ground_truth"]) for row in rows]
    expected: list[Hit] = [(f"{path}:{first[question]}", 1.0, "prompt") for question, _, _ in solutions]
    assert len(expected) == 900
    assert hits(text_pairs(solutions), "text", eval_index(path), 0.5) == expected


@pytest.mark.parametrize(
    ("rephrased", "original", "num_found", "num_with_any_ngram", "num_rows"),
    [
        ("rephrase_gsm8k.jsonl.gz", "gsm8k/test.jsonl", 0, 61, 900),
        ("humaneval_python_rephrased.jsonl", "decontam/HumanEval.jsonl.gz", 1, 14, 164),
    ],
)
def test_items_in_other_words_are_not_found(
    test_data: Path, rephrased: str, original: str, num_found: int, num_with_any_ngram: int, num_rows: int
) -> None:
    """What n-grams cannot do, as counts: lmsys's rephrased items share next to no 8-gram with the originals."""
    found_by = eval_index(test_data / original)
    rows = prompts_of([row["text"] for row in lines_of(test_data / "decontam" / rephrased)])
    counts = [contaminated(rows, "text", found_by, most)["eval_item"].count() for most in (0.5, 0.0)]
    assert (rows.height, counts) == (num_rows, [num_found, num_with_any_ngram])


EVALS: list[dict[str, Any]] = [
    {"path": "gsm8k/test.jsonl"},
    {"path": "decontam/HumanEval.jsonl.gz", "id": "task_id"},
    {"path": "decontam/mt_bench_question.jsonl", "columns": ["turns"], "id": "question_id"},
    {"path": "decontam/arena_hard_v0.1_question.jsonl", "id": "uid"},
]


@pytest.fixture
def benchmarks(test_data: Path) -> Index:
    sets = [EvalSetConfig(**(one | {"path": str(test_data / one["path"])})) for one in EVALS]
    return index_of(read_evals(sets).items, 8)


def test_transcripts_of_hh_hold_no_item(test_data: Path, benchmarks: Index) -> None:
    rows = lines_of(test_data / "hh" / "harmless_base_test_part.jsonl.gz")
    pairs = text_pairs([("", row["chosen"], row["rejected"]) for row in rows])
    assert pairs.height == 1800
    assert contaminated(pairs, "text", benchmarks, 0.5)["eval_item"].count() == 0


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_conversations_of_llamafactory_hold_no_item(test_data: Path, benchmarks: Index, name: str) -> None:
    roles = {"human": "user", "gpt": "assistant"}
    rows = [
        [[(roles.get(m["from"], m["from"]), m["value"]) for m in turns] for turns in (talk, [good], [bad])]
        for talk, good, bad in (
            (row["conversations"], row["chosen"], row["rejected"])
            for row in json.loads((test_data / "llamafactory" / name).read_bytes())
        )
    ]
    assert len(rows) == 300
    assert hits(chat_pairs(rows), "chat", benchmarks, 0.5) == [None] * 300


def test_replies_of_wildbench_hold_no_item(test_data: Path, benchmarks: Index) -> None:
    replies = pl.read_parquet(test_data / "wildbench" / "candidates.parquet")["model_output"]
    assert contaminated(prompts_of(replies.to_list()), "text", benchmarks, 0.5)["eval_item"].count() == 0


def test_llmbar_holds_questions_of_mt_bench_and_one_that_mt_bench_shares_with_gsm8k(
    test_data: Path, benchmarks: Index
) -> None:
    rows = [(row["input"], row["output_1"], row["output_2"]) for row in lines_of(test_data / "llmbar" / "llmbar.jsonl")]
    mt_bench = test_data / "decontam" / "mt_bench_question.jsonl"
    found = {at: one for at, one in enumerate(hits(text_pairs(rows), "text", benchmarks, 0.5)) if one}
    assert sorted(found.values()) == [(f"{mt_bench}:{number}", 1.0, "prompt") for number in (115, 117, 134)]
    gsm8k = test_data / "gsm8k" / "test.jsonl"
    again = {at: one[0] for at, one in enumerate(hits(text_pairs(rows), "text", eval_index(gsm8k), 0.5)) if one}
    assert again == {at: f"{gsm8k}:327" for at, one in found.items() if one[0] == f"{mt_bench}:115"}


def test_the_plain_rule_finds_the_same_on_real_texts(test_data: Path) -> None:
    """Some replies of WildBench against items that were cut out of replies, so that there is something to find."""
    replies = pl.read_parquet(test_data / "wildbench" / "candidates.parquet")["model_output"].to_list()[::90]
    pieces = [" ".join(reply.split()[start : start + 40]) for start, reply in enumerate(replies)]
    items = [(f"e:{number}", piece) for number, piece in enumerate(pieces)]
    rows = [(reply, later, "") for reply, later in itertools.pairwise(replies)]
    expected = [judged(items, of_texts(row), 8, 0.5) for row in rows]
    assert sum(one is not None for one in expected) > 10
    assert hits(text_pairs(rows), "text", index_of(items_of(*items), 8), 0.5) == expected
