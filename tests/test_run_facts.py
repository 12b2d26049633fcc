"""What is said of a run, against run.json files written by hand."""

from pathlib import Path
from typing import Any

import pytest
from runs import write_run

from prefkit.curves import Ends, read_curves
from prefkit.run_facts import Fact, Setting, facts_of, figures_of, run_names, settings_of, state_of, warnings_of

ROWS = [{"step": 0, "epoch": 0.0, "num_pairs": 8}, {"step": 1, "epoch": 0.25, "num_pairs": 8}]


def facts(tmp_path: Path, **fields: Any) -> dict[str, str]:
    return {fact.name: fact.text for fact in facts_of(read_curves(write_run(tmp_path / "r", ROWS, **fields)))}


def test_a_run_of_an_older_prefkit_says_what_it_recorded_and_nothing_else(tmp_path: Path) -> None:
    assert facts_of(read_curves(write_run(tmp_path / "r", ROWS, steps=2))) == [
        Fact("state", "finished: 2 updates"),
        Fact("model", "model"),
        Fact("reference", "9c38e9b8932a5972 of data (843 pairs)"),
        Fact("loss", "sigmoid, beta 0.1"),
        Fact("optimiser", "adamw, rate 1e-06 linear, 8 pairs an update"),
        Fact(
            "gate",
            "64 pairs, 4,408 tokens scored again: off by 3e-06 nats a token at most, 1e-07 rms, 2e-08 on average",
        ),
    ]


def test_a_run_with_everything_says_it(tmp_path: Path) -> None:
    train = {
        "loss": "dpop",
        "beta": 0.2,
        "beta_end": 0.05,
        "beta_schedule": "cosine",
        "sft_weight": 0.5,
        "optimizer": "rmsprop",
        "learning_rate": 5e-7,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 150,
        "batch_size": 16,
        "gradient_accumulation_steps": 4,
        "shard_weights": True,
        "lora": {"r": 8, "alpha": 16.0, "target_modules": ["q", "v"], "use_rslora": True},
    }
    told = facts(
        tmp_path,
        train=train,
        num_processes=4,
        saved="adapter",
        layout="packed rows",
        best={"metric": "eval_loss", "value": 0.30512, "step": 1550},
        eval={"loss": 0.31, "rewards/accuracies": 0.871, "rewards/margins": 1.42, "logps/chosen": -5.0},
        changes=[{"step": 1200, "settings": ["train.max_steps: 5 and 9", "pairs: 1 and 2"]}],
        gate={"rows": 3},
    )
    assert told["loss"] == "dpop, beta 0.2 to 0.05 (cosine), sft_weight 0.5, dpop_lambda 50"
    assert told["optimiser"] == "rmsprop, rate 5e-07 cosine after 150 of warm-up, 64 pairs an update (16 x 4)"
    assert told["adapter"] == "r 8, alpha 16.0, target_modules q, v, use_rslora yes"
    assert told["processes"] == "4, each keeps a share of the weights"
    assert told["layout"] == "packed rows"
    assert told["model/ holds"] == "an adapter: the model it started from is needed beside it"
    assert told["best"] == "eval_loss 0.3051 at step 1,550"
    assert told["test split of step 1,550"] == "loss 0.31, accuracy 0.871, margin 1.42"
    assert told["changed"] == "at step 1,200: train.max_steps: 5 and 9; pairs: 1 and 2"
    assert told["gate"] == "rows 3"


@pytest.mark.parametrize(
    ("saved", "text"),
    [("model", "the whole model"), ("merged", "the whole model, its adapter folded in")],
)
def test_what_the_model_folder_holds(saved: str, text: str, tmp_path: Path) -> None:
    assert facts(tmp_path, saved=saved)["model/ holds"] == text


def test_smoothing_is_told_and_a_gate_that_scored_nothing_is_not(tmp_path: Path) -> None:
    told = facts(tmp_path, train={"label_smoothing": 0.1}, gate={})
    assert told["loss"] == "sigmoid, beta 0.1, label_smoothing 0.1"
    assert "gate" not in told


def test_the_state_of_a_run(tmp_path: Path) -> None:
    def state(name: str, **fields: Any) -> str:
        return state_of(read_curves(write_run(tmp_path / name, ROWS, **fields)))

    assert state("a", finished=False, train={"max_steps": 1000}) == "unfinished: 2 of 1,000 updates"
    assert state("b", finished=False, train={"epochs": 2.0}) == "unfinished: 2 of 8 updates"
    assert state("c", finished=False, train={"batch_size": 0}) == "unfinished: 2 updates so far"
    early = {"max_steps": 9, "best_metric": "eval_loss"}
    told = "stopped early after 2 of 9 updates: no better eval_loss"
    assert state("d", steps=2, stopped_early=True, train=early) == told
    assert state("e", steps=9, stopped_early=True, train=early) == "stopped early after 9 updates: no better eval_loss"


def test_warnings_are_told_with_their_step(tmp_path: Path) -> None:
    told = [{"step": 1200, "name": "displacement", "text": "both fall"}, {"name": "shortcut", "text": "too easy"}]
    run = read_curves(write_run(tmp_path / "r", ROWS, warnings=told))
    assert warnings_of(run) == ["step 1,200: both fall", "too easy"]
    assert warnings_of(read_curves(write_run(tmp_path / "old", ROWS))) == []


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["d/runs/1"], ["d/runs/1"]),
        (["d/runs/1", "d/runs/2"], ["1", "2"]),
        (["/a/x/runs/1", "/a/y/runs/1"], ["x/runs/1", "y/runs/1"]),
        (["/a", "/a/b"], ["a", "a/b"]),
        (["1", "2"], ["1", "2"]),
        (["d/runs/1/", "d/runs/10"], ["1", "10"]),
        (["/x/1", "y/1"], ["/x/1", "y/1"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert run_names(paths) == names


def test_settings_that_differ_between_runs_come_first(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", train={"beta": 0.1, "lora": None, "trackers": []}, num_processes=2)
    second = write_run(tmp_path / "b", train={"beta": 0.3, "lora": {"r": 8}, "trackers": []})
    found = settings_of([read_curves(first), read_curves(second)])
    differing = [setting for setting in found if setting.differs]
    assert found[: len(differing)] == differing
    assert differing == [
        Setting("num_processes", ["2", "-"], True),
        Setting("train.beta", ["0.1", "0.3"], True),
        Setting("train.lora", ["none", "-"], True),
        Setting("train.lora.r", ["-", "8"], True),
    ]
    assert Setting("train.trackers", ["none", "none"], False) in found
    assert Setting("train.other_reference", ["no", "no"], False) in found
    assert Setting("pairs", ["843", "843"], False) in found


def test_of_a_single_run_what_is_not_the_default_comes_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", train={"beta": 0.3, "lora": {"r": 8}, "gone": 1})
    found = [setting for setting in settings_of([read_curves(run)]) if setting.differs]
    assert found == [
        Setting("train.beta", ["0.3"], True),
        Setting("train.lora.r", ["8"], True),
        Setting("train.gone", ["1"], True),
    ]


def test_figures_are_short_and_rounding_is_no_figure() -> None:
    assert figures_of(Ends(6.6e-8, 0.71834, -0.1, 0.8147), 1, digits=3) == ["0", "0.718", "-0.1", "0.815"]
    assert figures_of(Ends(-0.0, 12345.6, -0.0, 99999), 1, digits=4) == ["0", "12,346", "0", "99,999"]
    assert figures_of(Ends(1.8e-8, 9e-7, 1.8e-8, 9e-7), 1, digits=3) == ["1.8e-08", "9e-07", "1.8e-08", "9e-07"]
    gib = 1 << 30
    assert figures_of(Ends(gib, 3 * gib, gib, 4 * gib), gib, digits=3) == ["1", "3", "1", "4"]
