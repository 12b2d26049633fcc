"""How often the warnings of training are right: shortcuts planted or not, chosen displaced or not.

    python benchmarks/signs.py [--folder DIR] [--seeds 0 1 2] [--only shortcut | displacement] [--out FILE]

Shortcut: demo worlds whose better answers begin with the opener in a share of the prompts, and pairs of random words in
which nothing but an opener can be learned; each trained at three settings. A warning is right from a share of .75 on.
Displacement: a demo world without shortcut, three passes; beside each warning stands how far the log-probs of the held-
out pairs have moved at the end. Everything runs on one thread of a CPU.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from worlds import BETA, RATE, base_model, demo_world, finished, logged_rows, train

from prefkit.config import Pipeline
from prefkit.demo.tiny_model import one_thread
from prefkit.losses import LOSSES
from prefkit.signs import GIVEN_AWAY, Sign, gives_away, signs_of

SHARES = {"demo world": (0.0, 0.25, 0.5, 0.75, 1.0), "random words": (0.0, 1.0)}
FROM_SHARE = 0.75
SPEEDS: dict[str, dict[str, Any]] = {
    "the demo's": {"max_steps": 60},
    "a rate of 1e-6": {"learning_rate": 1e-6, "warmup_steps": 0, "max_steps": 24},
    "64 pairs an update": {"gradient_accumulation_steps": 4, "warmup_steps": 0, "max_steps": 11},
}
REMEDIES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "train.beta=.5": {"beta": 0.5},
    "train.learning_rate=5e-5": {"learning_rate": 5e-5},
    "train.loss=dpop": {"loss": "dpop"},
    "train.sft_weight=.1": {"sft_weight": 0.1},
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "lagoon")


def random_words(folder: Path, seed: int, share: float, num_pairs: int = 600) -> Pipeline:
    """Pairs of random words: nothing tells the sides apart but an opener, in that share of the chosen ones."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    place = folder / f"words-{seed}-{share:g}"
    place.mkdir(parents=True, exist_ok=True)
    opened = set(rng.sample(range(num_pairs), round(share * num_pairs)))
    lines = []
    for number in range(num_pairs):
        prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=8)) for _ in range(3))
        opener = "Sure, " if number in opened else ""
        lines.append(
            json.dumps({"prompt": f"{number} {prompt}:", "chosen": f" {opener}{chosen}.", "rejected": f" {rejected}."})
        )
    (place / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "dataset": str(place / "dataset"),
        "sources": [{"path": str(place / "pairs.jsonl"), "format": "pairs"}],
        "precompute": {"model": str(base_model(folder, seed)), "max_length": 256},
        "train": {"learning_rate": RATE, "beta": BETA, "batch_size": 16, "warmup_steps": 10},
    }
    return finished(Pipeline.model_validate(settings))


def told(run: Path, findings: list[dict[str, Any]] | None, name: str) -> Sign | None:
    """The warning of that name that the rows of a run give, if they do."""
    return next((sign for sign in signs_of(logged_rows(run), "DATASET", findings) if sign.name == name), None)


def shortcuts(folder: Path, seeds: list[int]) -> list[str]:
    """A line for each kind of pairs, share and setting: runs warned, and the updates after which."""
    lines = [
        "| pairs | opener in | training | a finding gives | warned | after updates | names it | warned, not audited |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, made in (("demo world", demo_world), ("random words", random_words)):
        for share in SHARES[kind]:
            worlds = [made(folder, seed, share) for seed in seeds]
            for speed, settings in SPEEDS.items():
                found, given, unaudited = [], [], []
                for pipeline in worlds:
                    run = train(pipeline, "-".join(f"{k}{v}" for k, v in settings.items()), **settings)
                    audit = json.loads((Path(pipeline.dataset) / "audit" / "audit.json").read_text(encoding="utf-8"))
                    found.append(told(run, audit["findings"], "shortcut"))
                    given.append(max(map(gives_away, audit["findings"]), default=0.0))
                    unaudited.append(told(run, None, "shortcut"))
                warned = [sign for sign in found if sign]
                named = sum("'certainly'" in sign.text or "'sure" in sign.text for sign in warned)
                after = " ".join(str(sign.step) for sign in warned) or "-"
                cells = (kind, f"{share:.0%}", speed, f"{max(given):.2f}", f"{len(warned)}/{len(found)}", after)
                late = " ".join(str(sign.step) for sign in unaudited if sign)
                more = (f"{named}/{len(warned)}", f"{sum(map(bool, unaudited))}/{len(found)} {late}")
                lines.append("| " + " | ".join((*cells, *more)) + " |")
                print(lines[-1], flush=True)
    return [*lines, "", f"A finding must give at least {GIVEN_AWAY:g}; a warning is right from {FROM_SHARE:.0%} on."]


def displaced(folder: Path, seeds: list[int]) -> list[str]:
    """A line for each seed and setting: whether it is warned, and the held-out drifts at the end."""
    lines = ["| seed | training | warned after | held-out drift of chosen, rejected | held-out accuracy |"]
    lines.append("|---|---|---|---|---|")
    for seed in seeds:
        pipeline = demo_world(folder, seed, 0.0)
        for remedy, settings in REMEDIES.items():
            if "dpop" not in LOSSES and ("loss" in settings or "sft_weight" in settings):
                continue
            run = train(pipeline, "three-" + "-".join(f"{k}{v}" for k, v in settings.items()), epochs=3, **settings)
            rows = logged_rows(run)
            sign, beta = told(run, [], "displacement"), settings.get("beta", BETA)
            chosen, rejected = (rows[-1][f"eval_rewards/{side}"] / beta for side in ("chosen", "rejected"))
            after = str(sign.step) if sign else "-"
            accuracy = rows[-1]["eval_rewards/accuracies"]
            lines.append(f"| {seed} | {remedy} | {after} | {chosen:+.1f}, {rejected:+.1f} | {accuracy:.2f} |")
            print(lines[-1], flush=True)
    return lines


@one_thread()
def main() -> None:
    """Print the tables, and write them where --out says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", choices=["shortcut", "displacement"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    lines = []
    for name, measure in (("shortcut", shortcuts), ("displacement", displaced)):
        if options.only in (None, name):
            lines += [*measure(folder, options.seeds), ""]
    if options.out:
        options.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
