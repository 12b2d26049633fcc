"""The identity change from one command: `python pipelines/identity/run.py`, in the folder of the clone.

Makes what is needed once, in built/gull: a tiny base model that calls itself Gull (gull.py has what it has read), and
the files of prompts. Then goes the whole road of pipeline.yaml, as `prefkit run pipelines/identity/pipeline.yaml` does,
and prints what became of the names and of all other text. Some minutes on one core; a second call goes on, or says that
it is done.
"""

from pathlib import Path

import gull
import polars as pl
from rich.console import Console

import prefkit
from prefkit.demo.tiny_model import one_thread, train_tiny_model
from prefkit.road_view import RoadScreen
from prefkit.terminal import step_progress

HERE, BUILT = Path(__file__).parent, Path("built/gull")


def make_base(folder: Path) -> None:
    """Write the prompts, and pretrain the base model unless it is there."""
    gull.write_prompts(folder)
    if not (folder / "model" / "model.safetensors").exists():
        with step_progress("pretraining") as watch:
            train_tiny_model(
                folder / "model",
                gull.conversations(),
                steps=gull.STEPS,
                progress=lambda done, total, loss: watch(done, total, {"loss": loss}),
            )


def figures(run: Path) -> dict[str, float]:
    """What the run's evaluation found of names, of the way from the reference, and of other text's perplexity."""
    (place,) = (run / "evaluations").iterdir()
    summary = pl.read_parquet(place / "summary.parquet")
    rows = summary.filter(pl.col("metric").is_in(["reward", "perplexity", "kl"]) & (pl.col("role") != "difference"))
    found = {}
    for row in rows.iter_rows(named=True):
        at = "" if row["temperature"] is None else f" at {row['temperature']:g}"
        found[f"{row['metric']} of {row['role']}{at}"] = row["value"]
    return found


@one_thread()
def main() -> None:
    """Make the base model, go the road, print the figures."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    make_base(BUILT)
    gone = prefkit.run_pipeline(HERE / "pipeline.yaml", spectator=RoadScreen(console))
    assert gone.run is not None
    console.print("\nwhat became of the names, and of the rest")
    for name, value in figures(Path(gone.run)).items():
        console.print(f"  {name:<36} {value:.4f}")


if __name__ == "__main__":
    main()
