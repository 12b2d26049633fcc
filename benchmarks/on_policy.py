"""What one round of on-policy training is worth on the demo world: mean reward and KL on held-out questions.

    python benchmarks/on_policy.py [--demo DIR] [--folder DIR] [--seeds 0 1 2] [--out FILE]

Each seed samples, trains and is measured with random numbers of its own, from the demo's base model and the pipeline
that `prefkit demo` writes: one `run_pipeline` each, which goes on where it was interrupted. DIR is where a demo was
walked; without it the model is pretrained first. Gain and KL come from evaluation.json and its summary: the reward of
fresh responses less the reference's on the same questions, with an interval by question. One thread of a CPU.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml
from rich.console import Console

from prefkit.config import Pipeline
from prefkit.demo.tiny_model import one_thread
from prefkit.demo.walk import SEED, make_model, on_policy_text
from prefkit.demo.world import write_prompts
from prefkit.road import run_pipeline


class Gained(NamedTuple):
    """What a seed came to; rewards from 0 to 10, KL in nats a response."""

    seed: int
    verdict: str
    before: float
    after: float
    gain: float
    low: float
    high: float
    kl: float
    kl_low: float
    kl_high: float
    win_rate: float
    accuracy: float  # of the reward margin, on held-out pairs


def demo_of(folder: Path) -> Path:
    """A folder with the demo's model and prompts, made unless they are there."""
    (folder / "world").mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "world", SEED)
    make_model(folder / "model", Console())
    return folder


def pipeline_of_seed(demo: Path, folder: Path, seed: int) -> Pipeline:
    """The demo's on-policy pipeline with its own files below `folder`, and one seed for all that is random."""
    settings: dict[str, Any] = yaml.safe_load(on_policy_text(demo))
    own = folder / f"seed-{seed}"
    settings["dataset"] = str(own / "dataset")
    settings["sample"] |= {"out": str(own / "candidates"), "seed": seed}
    settings["sources"][0]["path"] = str(own / "candidates" / "scored" / "*.parquet")
    settings["train"]["seed"] = settings["evaluate"]["seed"] = seed
    return Pipeline.model_validate(settings)


def gained(demo: Path, folder: Path, seed: int) -> Gained:
    """Go the whole road with one seed, and read what it came to."""
    gone = run_pipeline(pipeline_of_seed(demo, folder, seed))
    assert gone.run is not None
    (place,) = (Path(gone.run) / "evaluations").iterdir()
    summary = pl.read_parquet(place / "summary.parquet")

    def row(role: str, metric: str) -> dict[str, Any]:
        return summary.row(by_predicate=(pl.col("role") == role) & (pl.col("metric") == metric), named=True)

    gain, kl = row("difference", "reward"), row("policy", "kl_exact")
    return Gained(
        seed=seed,
        verdict=next(outcome.facts["verdict"] for outcome in gone.stages if outcome.stage == "audit"),
        before=row("reference", "reward")["value"],
        after=row("policy", "reward")["value"],
        gain=gain["value"],
        low=gain["low"],
        high=gain["high"],
        kl=kl["value"],
        kl_low=kl["low"],
        kl_high=kl["high"],
        win_rate=row("policy", "win_rate")["value"],
        accuracy=row("policy", "rewards/accuracies")["value"],
    )


def line_of(one: Gained) -> str:
    """A row of the table."""
    cells = [str(one.seed), one.verdict, f"{one.before:.2f}", f"{one.after:.2f}"]
    cells += [
        f"{one.gain:+.2f} ({one.low:+.2f} to {one.high:+.2f})",
        f"{one.kl:.2f} ({one.kl_low:.2f} to {one.kl_high:.2f})",
    ]
    return "| " + " | ".join([*cells, f"{one.win_rate:.1%}", f"{one.accuracy:.1%}"]) + " |"


@one_thread()
def main() -> None:
    """Print the table, and write it where --out says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    demo = options.demo or demo_of(folder / "demo")
    lines = ["| seed | audit | reward before | after | gain (95%) | KL in nats (95%) | win rate | held-out pairs |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    for seed in options.seeds:
        lines.append(line_of(gained(demo, folder, seed)))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
