"""The curves of a run: read from whatever a run has left, thinned without losing what stands out."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import write_run, write_table

from prefkit.config import TrainConfig
from prefkit.curves import (
    Ends,
    Progress,
    ends,
    is_run,
    num_infinite,
    points,
    progress,
    read_curves,
    stretch_means,
    thinned,
)
from prefkit.errors import DatasetError
from prefkit.format import schema
from prefkit.schedule import epochs_made, num_updates

NEW = [
    name for name in schema("steps", "text") if name.removeprefix("eval_").startswith(("drift", "kl", "nll", "beta"))
]


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "num_pairs": 16, "loss": 0.7 - step / 10, **values}


def drawn(*values: float) -> pl.DataFrame:
    return pl.DataFrame({"step": range(len(values)), "value": values}, schema={"step": pl.Int64, "value": pl.Float64})


# reading


def test_a_finished_run_is_read_from_its_parquet_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0), row(1)], [{"step": 0, "seconds": 2.0}])
    (run / "steps.jsonl").write_text(json.dumps(row(7)) + "\n")
    found = read_curves(run)
    assert found.path == str(run)
    assert found.steps["loss"].to_list() == [0.7, 0.6]
    assert found.perf.select("step", "seconds").rows() == [(0, 2.0)]
    assert found.steps.schema == schema("steps", "text")
    assert found.perf.schema == schema("perf", "text")


def test_a_run_at_work_is_read_from_its_live_files_which_know_more_than_its_last_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0), row(1), row(2)], [{"step": 0, "seconds": 2.0}], finished=False)
    write_table(run / "steps.parquet", "steps", [row(0)])
    found = read_curves(run)
    assert found.steps["step"].to_list() == [0, 1, 2]
    assert found.perf["seconds"].to_list() == [2.0]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', '{"step": 2', "{", "\x00\x00", '{"step": 2, "loss": 1}\n{"st'])
def test_a_torn_last_line_is_left_out_and_no_fault(tail: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0), row(1)], finished=False, tail=tail)
    assert read_curves(run).steps["step"].to_list() == [0, 1, 2][: 2 + tail.count("\n")]


def test_what_follows_a_torn_line_is_left_out_as_a_resumed_run_leaves_it_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0)], finished=False, tail='{"step": 1, "lo' + json.dumps(row(2)) + "\n")
    assert read_curves(run).steps["step"].to_list() == [0]


def test_a_live_file_that_is_torn_at_any_byte_gives_the_rows_that_are_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0), row(1), row(2)], finished=False)
    whole = (run / "steps.jsonl").read_bytes()
    ends_of_lines = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        (run / "steps.jsonl").write_bytes(whole[:cut])
        assert read_curves(run).steps.height == sum(end <= cut for end in ends_of_lines), cut


def test_a_run_without_any_step_has_empty_frames(tmp_path: Path) -> None:
    found = read_curves(write_run(tmp_path / "r", finished=False))
    assert (found.steps.height, found.perf.height) == (0, 0)
    assert progress(found) == Progress(0, None)
    assert points(found, "loss").is_empty()
    assert ends(points(found, "loss")) is None


def test_an_old_run_lacks_columns_and_perf_and_is_read_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_table(run / "steps.parquet", "steps", [row(0), row(1)], without=NEW)
    found = read_curves(run)
    assert found.steps.columns == list(schema("steps", "text"))
    assert points(found, "loss").height == 2
    assert points(found, "kl/chosen").is_empty()
    assert points(found, "tokens_per_second").is_empty()


def test_a_column_of_a_newer_prefkit_is_not_in_the_way(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0, novel=1)], finished=False)
    assert read_curves(run).steps.height == 1
    pl.DataFrame({"step": [0], "novel": [1]}).write_parquet(run / "steps.parquet")
    document = json.loads((run / "run.json").read_text()) | {"finished": True}
    (run / "run.json").write_text(json.dumps(document))
    assert read_curves(run).steps.height == 1


@pytest.mark.parametrize("line", ["[1]", '"x"', "1", '{"loss": 1}', '{"step": "x"}', "null"])
def test_a_line_that_is_no_row_is_an_error_with_its_number(line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0)], finished=False, tail=line + "\n")
    with pytest.raises(DatasetError) as raised:
        read_curves(run)
    assert raised.value.message == "is no row of a step"
    assert raised.value.where == f"{run / 'steps.jsonl'}:2"
    assert raised.value.hint == "prefkit train logs it anew in another --out"


def test_a_value_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0, loss="low")], finished=False)
    with pytest.raises(DatasetError, match="holds a value that is no number"):
        read_curves(run)


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [row(0)])
    (run / "steps.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DatasetError, match="the steps cannot be read: "):
        read_curves(run)
    pl.DataFrame({"loss": ["low"]}).write_parquet(run / "steps.parquet")
    with pytest.raises(DatasetError, match="the steps cannot be read: "):
        read_curves(run)


def test_a_live_file_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", finished=False)
    (run / "steps.jsonl").mkdir()
    with pytest.raises(DatasetError, match="the steps cannot be read: "):
        read_curves(run)


def test_a_run_is_a_directory_with_a_run_json(tmp_path: Path) -> None:
    assert is_run(write_run(tmp_path / "r"))
    assert not is_run(tmp_path)
    assert not is_run(tmp_path / "nowhere")


# how far


def test_a_row_with_pairs_is_logged_after_its_update_and_the_last_row_without_one(tmp_path: Path) -> None:
    at_work = write_run(tmp_path / "a", [row(0), row(1)], finished=False, train={"max_steps": 10})
    assert progress(read_curves(at_work)) == Progress(2, 10)
    evaluated = write_run(
        tmp_path / "b", [row(0), row(1), row(2, num_pairs=None)], finished=False, train={"max_steps": 2}
    )
    assert progress(read_curves(evaluated)) == Progress(2, 2)
    finished = write_run(tmp_path / "c", [row(0)], steps=8, train={"max_steps": 8})
    assert progress(read_curves(finished)) == Progress(8, 8)
    early = write_run(tmp_path / "d", [row(0)], steps=5, stopped_early=True, train={"max_steps": 8})
    assert progress(read_curves(early)) == Progress(5, 8)


@pytest.mark.parametrize("num_pairs", [3, 16, 17, 760, 100_003])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
def test_without_max_steps_the_total_is_what_the_trainer_will_make(
    num_pairs: int, epochs: float, tmp_path: Path
) -> None:
    settings = TrainConfig(batch_size=8, gradient_accumulation_steps=2, epochs=epochs)
    total = num_updates(num_pairs, settings)
    rows = [row(step, epoch=epochs_made(step, num_pairs, settings)) for step in range(min(3, total))]
    run = write_run(tmp_path / "r", rows, finished=False, train=settings.model_dump(mode="json"))
    told = any(0 < one["epoch"] < 1 for one in rows)
    assert progress(read_curves(run)) == Progress(len(rows), total if told else None)


# points


def test_what_is_no_finite_number_is_counted_and_not_drawn(tmp_path: Path) -> None:
    values = [1.0, None, math.inf, math.nan, 2.0]
    run = write_run(tmp_path / "r", [row(i, **{"kl/chosen": v}) for i, v in enumerate(values)], finished=False)
    found = read_curves(run)
    assert points(found, "kl/chosen").rows() == [(0, 1.0), (4, 2.0)]
    assert num_infinite(found, "kl/chosen") == 2
    assert num_infinite(found, "loss") == 0
    assert num_infinite(found, "mfu") == 0


def test_the_figures_of_a_curve() -> None:
    assert ends(drawn(3, 1, 5, 2)) == Ends(first=3, last=2, min=1, max=5)


def test_thinned_by_hand() -> None:
    values = [0, 9, 1, 2, 3, -9, 4, 5]
    # (6 - 2) // 2 = 2 stretches: 0 9 1 2 has its ends at rows 0 and 1, 3 -9 4 5 at rows 5 and 7
    assert thinned(drawn(*values), 6).rows() == [(0, 0), (1, 9), (5, -9), (7, 5)]
    assert thinned(drawn(*values), 8).height == 8


numbers = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300)


@given(numbers, st.integers(4, 60))
def test_thinned_points_were_logged_and_none_that_stands_out_is_lost(values: list[float], most: int) -> None:
    all_of_them = drawn(*values)
    few = thinned(all_of_them, most)
    assert few.height <= max(most, 1)
    assert set(few.rows()) <= set(all_of_them.rows())
    assert few["step"].is_sorted()
    assert ends(few) == ends(all_of_them)


def test_means_of_stretches_by_hand() -> None:
    assert stretch_means(drawn(1, 3, 5, 9), 2).rows() == [(0.5, 2.0), (2.5, 7.0)]
    assert stretch_means(drawn(1, 3), 5).rows() == [(0.0, 1.0), (1.0, 3.0)]
    assert stretch_means(drawn(1, 2, 3, 4, 5), 2).rows() == [(0.5, 1.5), (3.0, 4.0)]
    assert stretch_means(drawn(), 5).rows() == []


@given(numbers, st.integers(1, 60))
def test_stretches_hold_every_row_once(values: list[float], most: int) -> None:
    means = stretch_means(drawn(*values), most)
    assert means.height == min(most, len(values))
    whole = len(values) / means.height
    assert abs(sum(means["step"]) / means.height - (len(values) - 1) / 2) <= whole
