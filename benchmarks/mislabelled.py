"""How many of the pairs that are the wrong way round `learning` finds: planted in the demo world, counted.

    python benchmarks/mislabelled.py [--folder DIR] [--seeds 0 1 2] [--share .05] [--out FILE]

Chosen and rejected are exchanged in --share of the train pairs of a demo world without its shortcut. For each setting
of training a rule is held against what was planted: precision is the share of its pairs that were exchanged, recall the
share of the exchanged ones that it finds, F1 their harmonic mean; `top` is the precision of as many pairs as were
exchanged, the lowest by the score. Everything runs on one thread of a CPU.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from worlds import Planted, mislabelled_world, train

from prefkit.demo.tiny_model import one_thread
from prefkit.query import query_dataset

SETTINGS = {"2e-4, 2 passes": (2e-4, 2), "2e-4, 3 passes": (2e-4, 3), "1e-3, 3 passes": (1e-3, 3)}
SETTINGS |= {"1e-3, 5 passes": (1e-3, 5)}
RULES = {  # name -> condition, and the score by which the pairs are ordered
    "wrong the first two times": ("left(history, 2) not like '%1%'", "early_margin"),
    "never right": ("num_right = 0", "mean_margin"),
    "wrong the first time": ("first_margin <= 0", "first_margin"),
    "wrong at the end": ("last_margin <= 0", "last_margin"),
}


class Found(NamedTuple):
    """Of one rule: shares 0..1."""

    precision: float
    recall: float
    f1: float
    top: float


def measured(planted: Planted, run: str, rule: str) -> Found:
    """A rule over `learning` against what was planted."""
    condition, score = RULES[rule]
    dataset, wrong = planted.pipeline.dataset, planted.wrong
    ask = f"select pair_id, {condition} from learning where run = '{run}' order by {score}, pair_id"
    rows = query_dataset(dataset, ask).fetchall()
    hits = [pair in wrong for pair, holds in rows if holds]
    precision, recall = sum(hits) / max(1, len(hits)), sum(hits) / len(wrong)
    top = sum(pair in wrong for pair, _ in rows[: len(wrong)]) / len(wrong)
    return Found(precision, recall, 2 * precision * recall / max(1e-9, precision + recall), top)


def row(setting: str, rule: str, seeds: list[Found]) -> str:
    """A line of the table: each seed's precision and recall, the means of F1 and top."""
    each = " ".join(f"{one.precision:.2f}/{one.recall:.2f}" for one in seeds)
    means = (statistics.fmean(getattr(one, name) for one in seeds) for name in ("f1", "top"))
    return f"| {setting} | {rule} | {each} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |"


@one_thread()
def main() -> None:
    """Print the table, and write it where --out says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], list[Found]] = {}
    for seed in options.seeds:
        planted = mislabelled_world(folder, seed, options.share)
        for setting, (rate, epochs) in SETTINGS.items():
            run = train(planted.pipeline, f"{rate:g}-{epochs}", learning_rate=rate, epochs=epochs)
            for rule in RULES:
                found.setdefault((setting, rule), []).append(measured(planted, run.name, rule))
        print(f"seed {seed}: {len(planted.wrong)} pairs exchanged", flush=True)
    lines = ["| learning rate | rule | precision/recall by seed | F1 | top |", "|---|---|---|---|---|"]
    lines += [row(*key, seeds) for key, seeds in found.items()]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
