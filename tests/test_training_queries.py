"""The queries of docs/training.md, as they stand there, over a run whose answers are worked out by hand."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from finished import add_audit, add_reference, add_table, with_nulls

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.query import query_dataset
from prefkit.tables import write_parquet

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


class Seen(NamedTuple):
    """A pair of the run: its reply, source, scores' margin, margins at steps 1, 2, 3..., and what other tables have."""

    reply: str
    source: str
    margin: float | None
    margins: tuple[float, ...]
    reward: float  # of chosen, when it was last seen
    shortcut_score: float
    ln_ches: float


# all are in update 1, where the mean margin is .5: ahead of it by 2.5, -1.5, -1.5, 1.5, -1.5, .5; half of the scores
PAIRS = (
    Seen("Certainly. One", "a", 5.0, (3, 4, 5), -1.0, 5.0, 0.2),
    Seen("two", "a", 1.0, (-1, -2, -3), -3.0, -3.0, 0.8),
    Seen("three", "a", 1.0, (-1, -1, 2), 1.0, -3.0, 0.1),
    Seen("Certainly. Four", "a", 5.0, (2, 2, 2), -2.0, 3.0, 0.9),
    Seen("five", "b", None, (-1, 1, -1, 1), 2.0, -3.0, 0.3),
    Seen("six", "b", None, (1, -1, 1), 2.0, 1.0, 0.4),
)
# heading and number below it -> rows, a pair by its number in PAIRS; fractions to six digits
ANSWERS: dict[tuple[str, int], list[tuple[Any, ...]]] = {
    ("Never learned: are they mislabelled?", 0): [
        (1, "000", -1.5, "a", 1.0, None, -3.0),
        (2, "001", -1.0, "a", 1.0, None, -3.0),
    ],
    ("Never learned: are they mislabelled?", 1): [("a", 4, 0.5, None, 0.25), ("b", 2, 0.0, None, 2.5)],
    ("Learned at once: is it a shortcut?", 0): [(False, 4, -1.0, 0.0), (True, 2, 2.0, 1.0)],
    ("Learned at once: is it a shortcut?", 1): [(1.0, 6)],
    ("Learned at once: is it a shortcut?", 2): [(0, 5.0, 3.0, "a"), (3, 3.0, 2.0, "a")],
    ("Flips: hard, or told two ways?", 0): [
        (4, "0101", 3, 1, 0.0, "b", None, None),
        (5, "101", 2, 1, 0.333333, "b", None, None),
    ],
    ("Flips: hard, or told two ways?", 1): [(1.0, 2, 1.0, 0.5), (5.0, 2, 0.0, 0.0)],
    ("Of a repaired dataset: are the edited pairs still learned?", 0): [
        ("as it was", 5, 0.2, 0.066667),  # of -2, 0, 2, 0 and 1/3
        ("strip_opener", 1, 1.0, 4.0),
    ],
    ("Displaced pairs", 0): [(3, -2.0, 2.0, 0.9), (0, -1.0, 5.0, 0.2)],
    ("Displaced pairs", 1): [("1", 0, 0.0, 0.0, 0.0, 0.0), ("1", 20, 0.5, -1.5, -2.0, 0.75)],
}


def documented() -> dict[tuple[str, int], str]:
    """The SQL of each `prefkit query` in the headings of ANSWERS, read as a shell reads it."""
    found: dict[tuple[str, int], str] = {}
    heading, number = "", 0
    for title, block in re.findall(
        r"^#+ ([^\n]*)$|^```\w*\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        if title:
            heading, number = title, 0
        elif block.startswith("prefkit query ") and any(heading == known for known, _ in ANSWERS):
            program, command, _, sql = shlex.split(block)
            assert (program, command) == ("prefkit", "query")
            found[heading, number] = sql
            number += 1
    return found


@pytest.fixture
def trained(
    tmp_path: Path, write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> tuple[Path, list[str]]:
    """The dataset of PAIRS with a run `1`, and a run `2` that learned nothing; and the ids of PAIRS in their order."""
    sources = []
    for source in ("a", "b"):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Which number? {seen.reply}"}],
                "chosen": [{"role": "assistant", "content": seen.reply}],
                "rejected": [{"role": "assistant", "content": f"not {seen.reply}"}],
                "chosen_score": seen.margin,
                "rejected_score": None if seen.margin is None else 0.0,
            }
            for seen in PAIRS
            if seen.source == source
        ]
        sources.append({"path": str(write_jsonl(f"{source}.jsonl", rows)), "format": "pairs"})
    dataset = Path(build_dataset(pipeline_of(*sources, kind="chat", split={"test_share": 0})).dataset)
    by_reply = dict(query_dataset(dataset, "select chosen[1].content, pair_id from pairs").fetchall())
    ids = [by_reply[seen.reply] for seen in PAIRS]
    for run, sign in (("1", 1), ("2", -1)):
        seen_rows = [(0, pair, 0.0, 0.0) for pair in ids]
        for pair, seen in zip(ids, PAIRS, strict=True):
            seen_rows += [(at, pair, seen.reward, sign * margin) for at, margin in enumerate(seen.margins, 1)]
        names = ("step", "pair_id", "rewards_chosen", "margin")
        frame = with_nulls("pair_dynamics", dict(zip(names, map(list, zip(*seen_rows, strict=True)), strict=True)))
        write_parquet(dataset / "runs" / run / "pair_dynamics" / "part-00000.parquet", frame)
    steps: dict[str, list[Any]] = {
        "step": [0, 1, 20],
        "rewards/margins": [0.0, 0.1, 0.5],
        "drift/chosen": [0.0, -0.1, -1.5],
    }
    steps |= {"drift/rejected": [0.0, -0.2, -2.0], "drift/displaced": [0.0, 0.5, 0.75]}
    write_parquet(dataset / "runs" / "1" / "steps.parquet", with_nulls("steps", steps))
    scores: dict[str, list[Any]] = {"pair_id": ids, "shortcut_score": [seen.shortcut_score for seen in PAIRS]}
    add_audit(dataset, {"pair_scores": with_nulls("pair_scores", scores)})
    changes = {"pair_id": ["old"], "new_pair_id": ids[:1], "action": ["edited"], "reason": ["strip_opener"]}
    add_table(dataset, "changes", changes)
    add_reference(dataset, {"pair_id": ids, "ln_ches": [seen.ln_ches for seen in PAIRS]})
    return dataset, ids


def test_each_query_of_the_page_has_an_answer_here() -> None:
    assert sorted(documented()) == sorted(ANSWERS)


@pytest.mark.parametrize("place", ANSWERS, ids=lambda place: f"{place[0]} {place[1]}")
def test_a_query_of_the_page_answers_what_was_worked_out_by_hand(
    place: tuple[str, int], trained: tuple[Path, list[str]]
) -> None:
    dataset, ids = trained
    rows = query_dataset(dataset, documented()[place]).fetchall()
    numbers = {pair: number for number, pair in enumerate(ids)}
    files = {str(dataset.parent / f"{name}.jsonl"): name for name in ("a", "b")}
    told = [tuple(numbers.get(cell, files.get(cell, cell)) for cell in row) for row in rows]
    assert [len(row) for row in told] == [len(row) for row in ANSWERS[place]]
    for row, expected in zip(told, ANSWERS[place], strict=True):
        assert row == tuple(pytest.approx(c, abs=1e-6) if isinstance(c, float) else c for c in expected)
