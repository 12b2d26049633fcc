"""Real comparisons, corrections and ready pairs under their own column names, against plain Python counts.

Rows are never printed: some are offensive. What is compared are row numbers, counts and booleans.
"""

import gzip
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline

PIPELINES = Path(__file__).parent.parent / "pipelines"
AS_IT_IS = {"exact": False, "near_duplicates": None, "contradictions": "keep", "cycles": "keep"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    file = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")  # noqa: SIM115
    with file:
        return [json.loads(line) for line in file]


@pytest.fixture
def worked_case(test_data: Path, pipeline_of: Callable[..., Pipeline]) -> Callable[..., Built]:
    """Build one of pipelines/real/*.yaml over the real data, with its sections changed."""

    def build(name: str, **sections: Any) -> Built:
        settings = yaml.safe_load((PIPELINES / "real" / f"{name}.yaml").read_text(encoding="utf-8"))
        sources = [s | {"path": s["path"].replace("data/", f"{test_data}/", 1)} for s in settings["sources"]]
        rest = {k: v for k, v in settings.items() if k not in ("dataset", "sources")}
        return build_dataset(pipeline_of(*sources, **rest | sections))

    return build


def table(built: Built, name: str) -> pl.DataFrame:
    return pl.read_parquet(f"{built.dataset}/{name}/*.parquet")


def dropped(built: Built, *reasons: str) -> list[int]:
    return sorted(table(built, "dropped").filter(pl.col("reason").is_in(reasons))["source_row"].to_list())


def said(message: Any) -> str:
    return str(message[0]["content"])


def texts_of(pair: dict[str, Any]) -> tuple[str, ...]:
    return tuple(said(pair[name]) for name in ("prompt", "chosen", "rejected"))


def fold(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def test_the_better_output_of_llmbar_is_chosen_in_all_of_its_239_rows(
    worked_case: Callable[..., Built], test_data: Path
) -> None:
    rows = lines_of(test_data / "llmbar" / "llmbar.jsonl")
    pairs = table(worked_case("llmbar"), "pairs").sort("source_row")
    assert pairs["source_row"].to_list() == [*range(1, 240)]
    wrong = []
    for row, pair in zip(rows, pairs.iter_rows(named=True), strict=True):
        better, worse = (1, 2) if row["label"] == 1 else (2, 1)
        if texts_of(pair) != (row["input"], row[f"output_{better}"], row[f"output_{worse}"]):
            wrong.append(pair["source_row"])
    assert wrong == []


def test_pandalm_loses_ties_empty_sides_and_responses_that_are_no_text_and_nothing_else(
    worked_case: Callable[..., Built], test_data: Path
) -> None:
    rows = json.loads((test_data / "pandalm" / "testset-v1.json").read_text(encoding="utf-8"))
    no_text, ties, empty, unsure = set(), set(), set(), set()
    winner: dict[int, int] = {}
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(rows, start=1):
        sides = {1: row["response1"], 2: row["response2"]}
        if not all(isinstance(side, str) for side in sides.values()):
            no_text.add(number)
            continue
        votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
        (label, count), *others = votes.most_common()
        if label == 0 or any(other == count for _, other in others):
            ties.add(number)
        elif count / 3 < 0.6:
            unsure.add(number)
        elif not all(side.strip() for side in sides.values()):
            empty.add(number)
        else:
            prompt = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
            key = (prompt, sides[label], sides[3 - label])
            seen.add(key)
            winner[number] = label
    assert (len(rows), len(no_text)) == (999, 6)
    built = worked_case("pandalm", dedupe=AS_IT_IS)
    assert sorted(table(built, "rejects")["line"].to_list()) == sorted(no_text)
    assert dropped(built, "tie") == sorted(ties)
    assert dropped(built, "under_min_agreement") == sorted(unsure)
    assert dropped(built, "empty_chosen", "empty_rejected") == sorted(empty)
    assert built.counts["pairs"] + len(dropped(built, "duplicate")) == len(winner)
    assert built.counts["pairs"] == len(seen)
    wrong = []
    for pair in table(built, "pairs").iter_rows(named=True):
        row, label = rows[pair["source_row"] - 1], winner[pair["source_row"]]
        if texts_of(pair)[1:] != (row[f"response{label}"], row[f"response{3 - label}"]):
            wrong.append(pair["source_row"])
        assert pair["agreement"] == pytest.approx([row[f"annotator{i}"] for i in (1, 2, 3)].count(label) / 3)
    assert wrong == []


def test_the_most_of_five_votes_decide_in_ukpconvarg_and_ties_are_no_pairs(
    worked_case: Callable[..., Built], test_data: Path
) -> None:
    rows = lines_of(test_data / "ukpconvarg" / "votes.jsonl.gz")
    winners: dict[int, str] = {}
    for number, row in enumerate(rows, start=1):
        votes = Counter(row["votes"])
        best = [label for label, count in votes.items() if count == max(votes.values())]
        if best in (["a1"], ["a2"]):
            winners[number] = best[0]
    built = worked_case("ukpconvarg_votes", dedupe=AS_IT_IS)
    assert dropped(built, "tie") == [n for n in range(1, len(rows) + 1) if n not in winners]
    pairs = table(built, "pairs")
    left = sorted(
        [*pairs["source_row"], *dropped(built, "identical", "identical_after_folding", "duplicate", "too_long")]
    )
    assert left == sorted(winners)
    wrong = []
    for pair in pairs.iter_rows(named=True):
        row, label = rows[pair["source_row"] - 1], winners[pair["source_row"]]
        better, worse = ("arg1", "arg2") if label == "a1" else ("arg2", "arg1")
        if texts_of(pair) != (row["prompt"], row[better], row[worse]):
            wrong.append(pair["source_row"])
        assert pair["agreement"] == pytest.approx(row["votes"].count(label) / len(row["votes"]))
    assert wrong == []


def test_what_is_left_of_ukpconvarg_has_no_cycle(worked_case: Callable[..., Built]) -> None:
    pairs = table(worked_case("ukpconvarg_votes"), "pairs")
    for _, group in pairs.group_by("prompt_id"):
        beats: dict[str, set[str]] = {}
        for chosen, rejected in group.select("chosen", "rejected").iter_rows():
            beats.setdefault(fold(said(chosen)), set()).add(fold(said(rejected)))
        while beats:  # take away, again and again, what beats nothing that is left
            last = {text for text, others in beats.items() if not others & beats.keys()}
            assert last, "a cycle is left"
            beats = {text: others for text, others in beats.items() if text not in last}


def test_ua_gec_gives_a_pair_for_every_sentence_that_was_corrected(
    worked_case: Callable[..., Built], test_data: Path
) -> None:
    rows = lines_of(test_data / "ua_gec" / "gec_only_test.jsonl.gz")
    same = [n for n, row in enumerate(rows, start=1) if row["original"] == row["corrected"]]
    alike = [
        n
        for n, row in enumerate(rows, start=1)
        if n not in set(same) and fold(row["original"]) == fold(row["corrected"])
    ]
    empty = [n for n, row in enumerate(rows, start=1) if not row["corrected"].strip() or not row["original"].strip()]
    different = {
        (fold(row["original"]), fold(row["corrected"]))
        for n, row in enumerate(rows, start=1)
        if n not in {*same, *alike, *empty}
    }
    built = worked_case("ua_gec", dedupe={"near_duplicates": None})
    assert dropped(built, "identical") == [n for n in same if n not in empty]
    assert dropped(built, "identical_after_folding") == alike
    assert built.counts["pairs"] + len(dropped(built, "meta_phrase", "contradiction", "cycle")) == len(different)
    assert set(table(built, "pairs")["method"]) == {"correction"}
    assert table(built, "pairs")["edit_distance"].null_count() == 0


def test_each_row_of_the_anthropic_evals_is_a_pair_with_the_unwanted_answer_rejected(
    worked_case: Callable[..., Built], test_data: Path
) -> None:
    built = worked_case("anthropic_evals")
    files = sorted((test_data / "anthropic_evals").glob("*.jsonl"))
    rows = {(str(path), n): row for path in files for n, row in enumerate(lines_of(path), start=1)}
    different = {(row["question"], row["answer_not_matching_behavior"]) for row in rows.values()}
    assert built.counts["pairs"] == len(different)
    wrong = []
    for pair in table(built, "pairs").iter_rows(named=True):
        row = rows[pair["source"], pair["source_row"]]
        answers = row["answer_not_matching_behavior"], row["answer_matching_behavior"]
        if texts_of(pair) != (row["question"], *answers):
            wrong.append(pair["source_row"])
    assert wrong == []
