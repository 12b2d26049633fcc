"""The identity change of pipelines/identity/ with other random numbers than those its settings were found with.

    python benchmarks/identity.py [--seeds 1 2 3] [--out FILE]

Each seed makes a base model of its own (what it reads, its first weights), other texts to be measured on, and samples,
trains and measures with it. The questions are those of the pipeline. In a temporary folder; one thread of a CPU.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import prefkit
from prefkit.demo.tiny_model import one_thread, train_tiny_model

IDENTITY = Path(__file__).resolve().parent.parent / "pipelines" / "identity"
sys.path.insert(0, str(IDENTITY))
import gull  # noqa: E402
import run  # noqa: E402

HEAD = """# The identity change, with other seeds

`python benchmarks/identity.py`: `pipelines/identity/pipeline.yaml` with a base model, texts and random numbers of each
seed's own. New names: share of 480 fresh answers to unseen questions that say the new name and not the old, at
temperature 1; in brackets at temperature 0. Other text: its perplexity over what it was before. CPU, float32.

| seed | new names | before | other text | KL in nats a response |
|---|---|---|---|---|
"""


def line_of(seed: int, folder: Path) -> str:
    """Make a base model in a folder, go the road, and say what came of it."""
    (folder / "pipelines").symlink_to(IDENTITY.parent)
    with contextlib.chdir(folder):
        gull.write_prompts(run.BUILT, seed=seed + 10)
        train_tiny_model(run.BUILT / "model", gull.conversations(seed), seed=seed, steps=gull.STEPS)
        seeds = {f"{section}.seed": seed for section in ("sample", "train", "evaluate")}
        gone = prefkit.run_pipeline("pipelines/identity/pipeline.yaml", changes=seeds)
        found = run.figures(Path(gone.run or ""))
    names, certain = found["reward of policy at 1"], found["reward of policy at 0"]
    before, ratio = found["reward of reference at 1"], found["perplexity of ratio"]
    return f"| {seed} | {names:.1%} ({certain:.1%}) | {before:.1%} | x {ratio:.3f} | {found['kl of policy at 1']:.0f} |"


@one_thread()
def main() -> None:
    """Print a table, a seed a line; write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lines = []
    for seed in asked.seeds:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line_of(seed, Path(folder)))
        print(lines[-1], flush=True)
    if asked.out is not None:
        asked.out.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
