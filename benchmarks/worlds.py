"""Demo worlds to plant something in and to train on: what mislabelled.py, signs.py and their tests work with.

A base model is pretrained once a seed and kept in the folder, and so is every dataset and run: a script that was
interrupted goes on. All is a function of the seed.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml

from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.demo.tiny_model import train_tiny_model
from prefkit.demo.walk import pipeline_text
from prefkit.demo.world import pretraining_texts, write_world
from prefkit.query import query_dataset
from prefkit.reference import precompute_reference
from prefkit.train import train_dpo

BETA = 0.1
RATE = 2e-4  # the demo's


def base_model(folder: Path, seed: int) -> Path:
    """The demo's base model of that seed, pretrained unless it is there."""
    place = folder / f"model-{seed}"
    if not (place / "model.safetensors").exists():
        train_tiny_model(place, pretraining_texts(seed), seed)
    return place


def demo_world(folder: Path, seed: int, shortcut_share: float) -> Pipeline:
    """The demo's dataset with the shortcut in that share of its prompts, built, audited and scored."""
    place = folder / f"world-{seed}-{shortcut_share:g}"
    write_world(place / "world", seed, shortcut_share=shortcut_share)
    settings = yaml.safe_load(pipeline_text(place))
    settings["precompute"]["model"] = str(base_model(folder, seed))
    settings["train"] = {"learning_rate": RATE, "beta": BETA, "batch_size": 16, "warmup_steps": 10}
    return finished(Pipeline.model_validate(settings))


def finished(pipeline: Pipeline) -> Pipeline:
    """Build, audit and score a dataset, unless it is there."""
    if not (Path(pipeline.dataset) / "manifest.json").exists():
        build_dataset(pipeline)
        audit_dataset(pipeline)
    precompute_reference(pipeline)
    return pipeline


class Planted(NamedTuple):
    """A world in which some pairs are the wrong way round; `wrong`: the pair_ids of these."""

    pipeline: Pipeline
    wrong: frozenset[str]


def mislabelled_world(folder: Path, seed: int, share: float) -> Planted:
    """The pairs of a world without shortcut, chosen and rejected exchanged in that share of the train split."""
    clean = demo_world(folder, seed, 0.0)
    pairs = query_dataset(clean.dataset, "select pair_id, split, prompt, chosen, rejected from pairs order by 1").pl()
    train = pairs.filter(pl.col("split") == "train")["pair_id"].to_list()
    swapped = set(random.Random(seed).sample(train, round(share * len(train))))  # noqa: S311 - reproducible
    place = folder / f"mislabelled-{seed}-{share:g}"
    place.mkdir(exist_ok=True)
    source = place / "pairs.jsonl"
    source.write_text("".join(_line(row, swapped) for row in pairs.iter_rows(named=True)), encoding="utf-8")
    settings: dict[str, Any] = {
        "dataset": str(place / "dataset"),
        "sources": [{"path": str(source), "format": "trl"}],
        "split": clean.split.model_dump(),
        "precompute": clean.precompute.model_dump(),
        "train": clean.train.model_dump(),
    }
    pipeline = finished(Pipeline.model_validate(settings))
    lines = [number for number, pair in enumerate(pairs["pair_id"], 1) if pair in swapped]
    listed = ", ".join(map(str, lines))
    wrong = query_dataset(
        pipeline.dataset, f"select pair_id from pairs where split = 'train' and source_row in ({listed})"
    ).fetchall()
    return Planted(pipeline, frozenset(pair for (pair,) in wrong))


def _line(row: Mapping[str, Any], swapped: set[str]) -> str:
    sides = {name: [{k: turn[k] for k in ("role", "content")} for turn in row[name]] for name in ("chosen", "rejected")}
    if row["pair_id"] in swapped:
        sides = {"chosen": sides["rejected"], "rejected": sides["chosen"]}
    prompt = [{k: turn[k] for k in ("role", "content")} for turn in row["prompt"]]
    return json.dumps({"prompt": prompt, **sides}) + "\n"


def train(pipeline: Pipeline, name: str, **settings: Any) -> Path:
    """Train a run of that name, unless it is there and finished; returns its directory."""
    run = Path(pipeline.dataset) / "runs" / name
    if not (run / "model").exists():
        if "epochs" in settings:
            settings["max_steps"] = None
        changed = Pipeline.model_validate(
            pipeline.model_dump(by_alias=True) | {"train": pipeline.train.model_dump() | settings}
        )
        train_dpo(changed, out=str(run))
    return run


def logged_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of steps with the drifts that a run without them has in its rewards and pair_dynamics."""
    steps = pl.read_parquet(run / "steps.parquet").sort("step")
    parts = sorted((run / "pair_dynamics").glob("part-*.parquet"))
    seen = pl.concat([pl.read_parquet(part, glob=False) for part in parts])
    displaced = seen.group_by("step").agg(
        ((pl.col("margin") > 0) & (pl.col("rewards_chosen") < 0)).mean().alias("drift/displaced")
    )
    beta = json.loads((run / "run.json").read_text(encoding="utf-8"))["train"]["beta"]
    drifts = [pl.col(f"rewards/{side}") / pl.col("beta").fill_null(beta) for side in ("chosen", "rejected")]
    known = steps.with_columns(drifts[0].alias("drift/chosen"), drifts[1].alias("drift/rejected"))
    return known.drop("drift/displaced").join(displaced, on="step", how="left").sort("step").to_dicts()
