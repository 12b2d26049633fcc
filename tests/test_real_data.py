"""Real preference files, checked against independent plain Python. Rows are never printed: some are offensive.

So what is compared are row numbers, counts and booleans, and never a text.
"""

import gzip
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline

TURN = "\n\nAssistant:"


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table(built: Built, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{built.dataset}/{name}/*.parquet")


def fold(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def rows_with(built: Built, *reasons: str) -> list[int]:
    return sorted(table(built, "dropped").filter(pl.col("reason").is_in(reasons))["source_row"].to_list())


def where_rows_went(built: Built) -> list[int]:
    places = [table(built, name)[column] for name, column in (("pairs", "source_row"), ("dropped", "source_row"))]
    return sorted([row for place in places for row in place] + table(built, "rejects")["line"].to_list())


# Anthropic HH


@pytest.fixture
def hh(test_data: Path, pipeline_of: Callable[..., Pipeline]) -> tuple[Built, list[dict[str, Any]]]:
    path = test_data / "hh" / "harmless_base_test_part.jsonl.gz"
    return build_dataset(pipeline_of({"path": str(path), "format": "hh", "annotator": "human"})), lines_of(path)


def test_each_of_the_1800_rows_of_hh_is_a_pair_a_drop_or_a_reject_with_a_reason(
    hh: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = hh
    assert built.kind == "chat"
    assert len(rows) == built.counts["rows"] == 1800
    assert where_rows_went(built) == list(range(1, 1801))
    assert table(built, "dropped")["reason"].null_count() + table(built, "rejects")["reason"].null_count() == 0
    assert built.counts["pairs"] > 1700


def test_hh_rows_whose_sides_have_different_prompts_are_the_rejects(hh: tuple[Built, list[dict[str, Any]]]) -> None:
    built, rows = hh
    heads = [[row[side].rpartition(TURN)[0] for side in ("chosen", "rejected")] for row in rows]
    different = [number for number, (one, other) in enumerate(heads, start=1) if one != other]
    assert table(built, "rejects")["line"].to_list() == different
    assert len(different) > 0
    assert set(table(built, "rejects")["reason"]) == {"different_prompts"}


def test_hh_replies_are_whole_and_keep_the_prefix_that_both_sides_share(
    hh: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = hh
    wrong, sharing = [], 0
    for pair in table(built, "pairs").iter_rows(named=True):
        row = rows[pair["source_row"] - 1]
        replies = [row[side].rpartition(TURN)[2].removeprefix(" ") for side in ("chosen", "rejected")]
        found = [pair[side] for side in ("chosen", "rejected")]
        if found != [[{"role": "assistant", "content": reply}] for reply in replies]:
            wrong.append(pair["source_row"])
        sharing += replies[0][:1] == replies[1][:1]
    assert wrong == []
    assert sharing > 0.15 * len(rows)  # so many would a split at the first difference have moved into the prompt


def test_hh_prompts_are_the_turns_before_the_reply_and_end_with_the_user(
    hh: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = hh
    names = {"user": "Human", "assistant": "Assistant"}
    wrong = []
    for pair in table(built, "pairs").iter_rows(named=True):
        head = rows[pair["source_row"] - 1]["chosen"].rpartition(TURN)[0]
        written = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in pair["prompt"])
        if fold(written) != fold(head) or pair["prompt"][-1]["role"] != "user":
            wrong.append(pair["source_row"])
    assert wrong == []


def test_hh_drops_are_what_plain_python_would_drop(hh: tuple[Built, list[dict[str, Any]]]) -> None:
    built, rows = hh
    rejected = set(table(built, "rejects")["line"])
    same, keys = [], defaultdict(list)
    for number, row in enumerate(rows, start=1):
        sides = [row[side].rpartition(TURN)[2] for side in ("chosen", "rejected")]
        if number in rejected or not all(side.strip() for side in sides):
            continue
        if fold(sides[0]) == fold(sides[1]):
            same.append(number)
        elif not any("\n\nHuman:" in side for side in sides):
            keys[(fold(row["chosen"]), fold(row["rejected"]))].append(number)
    assert rows_with(built, "identical", "identical_after_folding") == same
    assert len(rows_with(built, "duplicate")) == sum(len(numbers) - 1 for numbers in keys.values())
    reversed_ = [key for key in keys if key[::-1] in keys]
    assert len(rows_with(built, "contradiction")) == len(reversed_)


# MLQE-PE: post-edited translations


def test_unedited_translations_are_dropped_as_identical_and_all_others_kept(
    test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    path = test_data / "mlqe_pe" / "ru-en.jsonl.gz"
    columns = {"prompt": "source", "response": "original", "correction": "corrected"}
    built = build_dataset(pipeline_of({"path": str(path), "format": "corrections", "columns": columns}))
    rows = lines_of(path)
    assert (built.kind, built.counts["rows"]) == ("text", 7000)
    assert where_rows_went(built) == list(range(1, 7001))
    unedited = [number for number, row in enumerate(rows, start=1) if row["original"] == row["corrected"]]
    assert rows_with(built, "identical") == unedited
    assert len(unedited) > 1000
    folded = [n for n, row in enumerate(rows, start=1) if fold(row["original"]) == fold(row["corrected"])]
    assert rows_with(built, "identical", "identical_after_folding") == folded
    wrong = [
        pair["source_row"]
        for pair in table(built, "pairs").iter_rows(named=True)
        if [pair[name] for name in ("prompt", "chosen", "rejected")]
        != [rows[pair["source_row"] - 1][name] for name in ("source", "corrected", "original")]
    ]
    assert wrong == []


# WildBench: nine models a session, judged 1 to 10, scores written as text


@pytest.fixture
def wildbench(test_data: Path, pipeline_of: Callable[..., Pipeline]) -> tuple[Built, list[dict[str, Any]]]:
    path = test_data / "wildbench" / "candidates.parquet"
    columns = {"prompt": "session_id", "response": "model_output"}
    source = {"path": str(path), "format": "candidates", "columns": columns, "annotator": "model"}
    return build_dataset(pipeline_of(source)), pl.read_parquet(path).to_dicts()


def qualities(rows: list[dict[str, Any]], prompt: str, text: str, score: str) -> dict[str, dict[str, Fraction]]:
    """Prompt -> distinct non-blank text -> exact mean score."""
    scores: dict[str, dict[str, list[Fraction]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[text].strip():
            scores[row[prompt]][row[text]].append(Fraction(row[score]))
    return {p: {t: sum(s, Fraction()) / len(s) for t, s in texts.items()} for p, texts in scores.items()}


def test_wildbench_sessions_give_a_pair_exactly_where_their_scores_differ(
    wildbench: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = wildbench
    sessions = qualities(rows, "session_id", "model_output", "score")
    differing = {name for name, texts in sessions.items() if len(set(texts.values())) > 1}
    dropped = table(built, "dropped")
    judged = dropped.filter(pl.col("stage") == "pairs")
    later = dropped.filter(pl.col("stage") != "pairs")  # by a rule of validation, after a pair was made
    assert (set(table(built, "pairs")["prompt"]) | set(later["prompt"])) == differing
    assert set(judged["prompt"]) == {row["session_id"] for row in rows} - differing
    tied = {name for name, texts in sessions.items() if len(texts) > 1 and name not in differing}
    assert set(judged.filter(pl.col("reason") == "tie")["prompt"]) == tied
    assert len(differing) > 100
    assert later.height < 5


def test_no_wildbench_pair_is_identical_or_empty_and_each_is_a_best_against_a_worst(
    wildbench: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = wildbench
    sessions = qualities(rows, "session_id", "model_output", "score")
    wrong = []
    for pair in table(built, "pairs").iter_rows(named=True):
        texts = sessions[pair["prompt"]]
        best, worst = max(texts.values()), min(texts.values())
        sides = pair["chosen"], pair["rejected"]
        right = all(side.strip() for side in sides) and fold(sides[0]) != fold(sides[1])
        right = right and texts[sides[0]] == best and texts[sides[1]] == worst
        right = right and abs(pair["margin"] - float(best - worst)) < 1e-9 and pair["margin"] > 0
        closest = min(
            abs(len(one) - len(other))
            for one in texts
            for other in texts
            if (texts[one], texts[other]) == (best, worst)
        )
        right = right and abs(len(sides[0]) - len(sides[1])) == closest
        if not (right and pair["num_candidates"] == len(texts)):
            wrong.append(pair["source_row"])
    assert wrong == []


def test_every_wildbench_candidate_and_session_is_accounted_for(
    wildbench: tuple[Built, list[dict[str, Any]]],
) -> None:
    built, rows = wildbench
    counts = built.counts
    assert counts["candidates"] == len(rows) == 1800
    assert counts["used"] + counts["unused"] + counts["candidate_rejects"] == 1800
    assert counts["prompts"] == len({row["session_id"] for row in rows})
    assert counts["prompts"] == counts["prompts_with_pair"] + counts["prompts_dropped"]
    empty = sum(not row["model_output"].strip() for row in rows)
    texts = Counter((row["session_id"], row["model_output"]) for row in rows if row["model_output"].strip())
    assert built.unused.get("empty_response", 0) == empty
    assert built.unused.get("identical_response", 0) == sum(texts.values()) - len(texts)


# UKPConvArg: ranked arguments, the lowest rank is the most convincing


def test_the_chosen_argument_has_the_lowest_rank_of_its_debate_and_the_rejected_one_the_highest(
    test_data: Path, pipeline_of: Callable[..., Pipeline]
) -> None:
    path = test_data / "ukpconvarg" / "ranking.jsonl.gz"
    columns = {"prompt": "debate", "response": "argument", "score": "rank"}
    source = {"path": str(path), "format": "candidates", "columns": columns, "direction": "lower_is_better"}
    built = build_dataset(pipeline_of(source))
    rows = lines_of(path)
    debates = qualities(rows, "debate", "argument", "rank")
    pairs = table(built, "pairs")
    assert built.counts["candidates"] == len(rows) == 540
    assert pairs.height == len(debates) == built.counts["prompts"]
    wrong = []
    for pair in pairs.iter_rows(named=True):
        ranks = debates[pair["prompt"]]
        lowest, highest = min(ranks.values()), max(ranks.values())
        right = (ranks[pair["chosen"]], ranks[pair["rejected"]]) == (lowest, highest)
        right = right and pair["chosen_score"] < pair["rejected_score"] and pair["margin"] > 0
        if not (right and pair["num_candidates"] == len(ranks)):
            wrong.append(pair["source_row"])
    assert wrong == []
