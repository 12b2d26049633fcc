"""Kill `prefkit evaluate` at random moments and type it again: run as a program by test_evaluate.py.

    python evaluation_killer.py SEED COUNT FOLDER

FOLDER/start holds a dataset with a finished run, prompts and pipeline.yaml. As killer.py does it: the command runs in a
forked child. The last line of output is a JSON object: how many kills hit, how many left work behind, and the names of
files that differ from those of an unbroken evaluation.
"""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 - what the child would spend its first seconds on
from killer import fresh, snapshot, spawn, wait

import prefkit.evaluate  # noqa: F401 - likewise

WORDS = ["evaluate", "pipeline.yaml"]


def results(work: Path) -> dict[str, bytes]:
    """All but locks, which hold the id of a process that was killed until the next one takes them."""
    found = snapshot(work / "dataset")
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


def main() -> None:
    seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    for _ in range(2):  # the first one warms the disk cache
        work, started = fresh(folder), time.monotonic()
        wait(spawn(WORDS, work))
        duration = time.monotonic() - started
    unbroken, rng = results(work), random.Random(seed)
    kills = unfinished = 0
    different: list[str] = []
    for _ in range(count):
        work = fresh(folder)
        before = results(work)
        kills += wait(spawn(WORDS, work), rng.random() * duration)
        left = results(work)
        unfinished += left != before and {*left} != {*unbroken}
        wait(spawn(WORDS, work))
        after = results(work)
        different += [n for n in {*unbroken, *after} if unbroken.get(n) != after.get(n)]
        shutil.rmtree(work)
    print(json.dumps({"kills": kills, "unfinished": unfinished, "different": sorted(set(different))}))


if __name__ == "__main__":
    main()
