"""Warnings of training: each rule at its edges by hand, each told once, and the same from a resumed run's rows."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prefkit.signs import Rows, Sign, Signs, gives_away, name_of, named_findings, signs_of, split_newest

Row = dict[str, Any]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def finding(name: str = "certainly", coverage: float | None = 0.96, win_rate: float | None = 1.0, **more: Any) -> Row:
    """An entry of audit.json; what a rule does not read is left out."""
    usual = {"level": "fail", "family": "tokens", "name": name, "coverage": coverage, "win_rate": win_rate}
    return usual | {"advice": f"mend {name}"} | more


def row(step: int, accuracy: float = 0.5, pairs: int | None = 16, **more: Any) -> Row:
    """A logged row of a first pass that moves nowhere."""
    still = {"drift/chosen": 0.0, "drift/rejected": 0.0, "drift/displaced": 0.0}
    return {"step": step, "epoch": step / 1000, "num_pairs": pairs, "rewards/accuracies": accuracy} | still | more


def steps_of(signs: list[Sign]) -> list[tuple[int, str]]:
    return [(sign.step, sign.name) for sign in signs]


# what a finding alone gives


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (finding(coverage=0.6, win_rate=1.0), 0.8),
        (finding(coverage=0.6, win_rate=0.0), 0.8),  # in rejected only: as good
        (finding(coverage=0.5, win_rate=0.9), 0.7),
        (finding(coverage=1.0, win_rate=0.85, family="probe", name="both"), 0.85),
        (finding(coverage=0.3, win_rate=0.5), 0.5),
        (finding(level="note"), 0.0),
        (finding(coverage=None), 0.0),
        (finding(win_rate=None), 0.0),
        (finding(family="probe", name="generator"), 0.0),
        (finding(family="structure", name="generator: gull-1"), 0.0),
        (finding(name="generator", coverage=0.6), 0.8),  # the word
    ],
)
def test_what_a_finding_gives_is_its_share_won_and_half_of_the_rest(entry: Row, expected: float) -> None:
    assert gives_away(entry) == pytest.approx(expected)


def test_a_warning_names_what_gives_most_away_and_a_probe_only_where_no_word_does() -> None:
    probe = finding("both", 1.0, 0.97, family="probe")
    words = [
        finding(name, coverage) for name, coverage in (("a", 0.7), ("b", 0.9), ("c", 0.8), ("d", 0.95), ("e", 0.1))
    ]
    assert [one["name"] for one in named_findings([probe, *words])] == ["d", "b", "c"]
    small = [finding(name, coverage) for name, coverage in (("a", 0.3), ("b", 0.4), ("c", 0.2))]
    assert [one["name"] for one in named_findings([probe, *small])] == ["both", "b", "a"]


def test_names_are_told_in_one_line_that_a_terminal_can_be_shown() -> None:
    assert name_of(finding("a\nb\x1b[31m")) == "'a\\nb\ufffd[31m'"
    assert name_of(finding("first_words: sure", family="structure")) == "first_words: sure"
    assert name_of(finding("both", family="probe")) == "the probe of both"


# rows taken together


def test_the_newest_rows_are_taken_until_they_hold_so_many_pairs_and_weigh_by_them() -> None:
    rows = [Rows(2, (0.0,)), Rows(1, (1.0,)), Rows(3, (0.0,))]
    assert split_newest(rows, 4) == (Rows(4, (0.25,)), rows[:1])
    assert split_newest(rows, 6) == (Rows(6, (1 / 6,)), [])
    assert split_newest(rows, 7) == (None, [])
    assert split_newest([], 1) == (None, [])


# a shortcut


def test_a_shortcut_that_the_audit_names_is_told_as_soon_as_enough_unseen_pairs_are_right() -> None:
    rows = [row(step, accuracy=float(step > 0)) for step in range(20)]
    (sign,) = signs_of(rows, "DATASET", [finding(), finding("words", 0.9, 0.9, family="structure")])
    assert sign == Sign(
        4,
        "shortcut",
        "after 4 updates 64 of 64 pairs that it had not seen are right, as many as a shortcut that the audit names "
        "would give: 'certainly' (alone 98%), words (alone 86%). Training may collapse to it. Next: mend certainly",
    )


@pytest.mark.parametrize(
    ("accuracy", "coverage", "warned"),
    [
        (1.0, 0.62, True),  # gives .81
        (1.0, 0.59, False),  # gives .795, below .8: it cannot be all that was learned
        (0.8125, 0.6, True),  # 13 of 16, and it gives .8
        (0.75, 0.6, False),  # fewer are right than it alone would give
    ],
)
def test_a_finding_must_give_much_away_and_as_many_pairs_be_right(
    accuracy: float, coverage: float, warned: bool
) -> None:
    rows = [row(step, accuracy) for step in range(1, 20)]
    assert steps_of(signs_of(rows, "D", [finding(coverage=coverage)])) == [(4, "shortcut")] * warned


def test_right_pairs_are_the_task_where_the_audit_found_nothing() -> None:
    assert signs_of([row(step, 1.0) for step in range(90)], "D", []) == []
    assert signs_of([row(step, 1.0) for step in range(90)], "D", [finding(coverage=0.1)]) == []


def test_a_dataset_that_was_not_audited_is_told_to_be_after_more_pairs_and_no_miss() -> None:
    rows = [row(step, 1.0 if step != 2 else 0.9375) for step in range(40)]
    (sign,) = signs_of(rows, "my data", None)
    # rows 3 to 15 are the first 13 in a row without a miss: 208 pairs, and 12 would be 192
    assert sign == Sign(
        15,
        "shortcut",
        "after 15 updates 208 of 208 pairs that it had not seen are right: data this easy often has a shortcut in it, "
        "and this dataset has not been audited. Next: prefkit audit 'my data'",
    )


def test_only_pairs_that_were_never_trained_on_count_and_only_the_first_hundred_updates() -> None:
    audit = [finding()]
    assert signs_of([row(step, 1.0, epoch=1 + step / 100) for step in range(1, 40)], "D", audit) == []
    assert signs_of([row(step, 1.0) for step in range(98, 140)], "D", audit) == []
    assert steps_of(signs_of([row(step, 1.0) for step in range(97, 140)], "D", audit)) == [(100, "shortcut")]


def test_the_first_update_and_the_last_row_tell_nothing() -> None:
    nothing = [row(0, 1.0, pairs=64), {"step": 1, "epoch": 0.5, "num_pairs": None, "eval_loss": 0.1}, {"step": 2}]
    assert signs_of(nothing, "D", [finding()]) == []
    assert steps_of(signs_of([row(1, 1.0, pairs=64)], "D", [finding()])) == [(1, "shortcut")]


# displacement


def falling(step: int, chosen: float, rejected: float, share: float = 0.6, **more: Any) -> Row:
    drifts = {"drift/chosen": chosen, "drift/rejected": rejected, "drift/displaced": share}
    return row(step, 0.9, pairs=32, **(drifts | more))


def test_both_log_probs_falling_while_the_margin_grows_is_told_in_nats() -> None:
    rows = [falling(step, -0.5 * step, -1.5 * step) for step in range(12)]
    (sign,) = signs_of(rows, "my data", [])
    # windows of two rows each; the first two whole ones are of steps 1, 2 and 3, 4: means -0.75, -2.25 and -1.75, -5.25
    assert sign == Sign(
        4,
        "displacement",
        "likelihood displacement: after 4 updates chosen is 1.8 nats less likely than under the reference and rejected "
        "5.2, and both still fall while the margin grows; so it is in 60% of the pairs. What may hold chosen up: a "
        "larger train.beta, train.sft_weight, train.loss=dpop, a smaller train.learning_rate, or leaving out the pairs "
        "whose sides are most alike to the model. Next: prefkit query 'my data' 'select pair_id, ln_ches from "
        "reference order by ln_ches desc limit 20'",
    )


@pytest.mark.parametrize(
    "rows",
    [
        [falling(step, 0.5 * step, -1.5 * step) for step in range(12)],  # chosen rises
        [falling(step, -0.08 * step, -1.5 * step) for step in range(13)],  # less than a nat
        [falling(step, -3.0, -1.5 * step) for step in range(12)],  # chosen has fallen, and stays
        [falling(step, -0.5 * step, -9.0) for step in range(12)],  # rejected stays
        [falling(step, -1.5 * step, -0.5 * step) for step in range(12)],  # the margin shrinks
        [falling(step, -0.5 * step, 1.5 * step) for step in range(12)],  # rejected rises
        [falling(step, -0.5 * step, -1.5 * step, share=0.4) for step in range(12)],  # few pairs, far
        [falling(step, -0.5 * step, -1.5 * step) for step in range(4)],  # fewer than two windows
        [
            falling(step, -0.5 * step, -1.5 * step) | {"drift/chosen": None} for step in range(12)
        ],  # an earlier release's
    ],
)
def test_no_displacement_where_a_condition_does_not_hold(rows: list[Row]) -> None:
    assert signs_of(rows, "D", []) == []


# once a run, whatever becomes of it


def both() -> list[Row]:
    return [falling(step, -0.5 * step, -1.5 * step, **{"rewards/accuracies": 1.0}) for step in range(60)]


def test_each_warning_is_told_once() -> None:
    assert steps_of(signs_of(both(), "D", [finding()])) == [(2, "shortcut"), (4, "displacement")]


@pytest.mark.parametrize("cut", range(8))
def test_a_resumed_run_has_told_and_tells_what_an_unbroken_one_does(cut: int) -> None:
    audit = [finding()]
    before, again = Signs("D", audit), Signs("D", audit)
    told = [sign for one in both()[: cut + 2] for sign in before.look(one)]  # two rows that the kill takes back
    replayed = [sign for one in both()[:cut] for sign in again.look(one)]
    assert replayed == told[: len(replayed)]
    assert replayed + [sign for one in both()[cut:] for sign in again.look(one)] == signs_of(both(), "D", audit)


@pytest.mark.parametrize("every", [3, 10])
def test_rows_logged_sparsely_are_read_as_they_are(every: int) -> None:
    rows = [one for one in both() if one["step"] % every == 0]
    # the first two logged rows after step 0 are 64 pairs, the first four two windows
    assert steps_of(signs_of(rows, "D", [finding()])) == [(2 * every, "shortcut"), (4 * every, "displacement")]


def test_rows_read_back_from_json_tell_the_same() -> None:
    audit = [finding()]
    assert signs_of(json.loads(json.dumps(both())), "D", audit) == signs_of(both(), "D", audit)


def test_what_is_remembered_is_bounded() -> None:
    signs = Signs("D", [])
    for step in range(1, 2000):
        signs.look(row(step, math.sin(step) ** 2, epoch=0.5) | {"step": step % 100 + 1})
    assert (len(signs.unseen), len(signs.drifts)) == (4, 8)  # a window of 64 pairs, and two


@pytest.mark.parametrize("pairs", [1, 7, 63, 64, 65, 100, 1000])
def test_updates_of_any_size_are_warned_of(pairs: int) -> None:
    rows = [one | {"num_pairs": pairs, "epoch": 0.5} for one in both()] + [
        falling(step, -0.5 * step, -1.5 * step, num_pairs=pairs, epoch=1.5) for step in range(60, 400)
    ]
    window = -(-64 // pairs)  # rows
    # the newest window must be whole and a nat down, so step 2 * window at least, and its mean is that of its steps
    down = next(step for step in range(2 * window, 400) if -0.5 * (step - (window - 1) / 2) <= -1)
    told = {sign.name: sign.step for sign in signs_of(rows, "D", [finding()])}
    assert told["displacement"] == down
    assert told.get("shortcut") == (window if window < 60 else None)


# on the demo world


@pytest.fixture(scope="module")
def worlds() -> Iterator[ModuleType]:
    """The benchmark's own worlds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("worlds")


@pytest.mark.slow
def test_a_planted_shortcut_is_told_by_the_audits_name_and_a_clean_world_and_the_demos_are_not(
    worlds: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("worlds")
    told: dict[float, list[Sign]] = {}
    for share in (0.0, 0.25, 1.0):
        pipeline = worlds.demo_world(folder, 1, share)
        audit = json.loads((Path(pipeline.dataset) / "audit" / "audit.json").read_text(encoding="utf-8"))
        run = worlds.train(pipeline, "few", max_steps=12)
        told[share] = signs_of(worlds.logged_rows(run), "DATASET", audit["findings"])
    assert told[0.0] == told[0.25] == []
    (sign,) = told[1.0]
    assert (sign.name, "'certainly' (alone 98%)" in sign.text) == ("shortcut", True)
    assert sign.step <= 10  # measured: 4


@pytest.mark.slow
def test_never_learned_finds_mislabelled_pairs_better_than_the_end_does(
    worlds: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mislabelled = importlib.import_module("mislabelled")
    planted = worlds.mislabelled_world(tmp_path_factory.mktemp("worlds"), 0, 0.05)
    run = worlds.train(planted.pipeline, "memorised", learning_rate=1e-3, epochs=3)
    early, never, end = (
        mislabelled.measured(planted, run.name, rule)
        for rule in ("wrong the first two times", "never right", "wrong at the end")
    )
    assert len(planted.wrong) == 38
    assert min(early.precision, early.recall) > 0.75  # measured: .90 and .92
    assert early.f1 > end.f1  # .91 and .83
    assert early.top > end.top  # .89 and .84
    assert never.precision > 0.75  # .91
