"""Kill a command at random moments and type it again: run as a program by test_kills.py.

    python killer.py COMMAND SEED COUNT FOLDER   (COMMAND: a key of COMMANDS)

FOLDER/start holds what the command finds. The command runs in a forked child, so that the moments fall into its work
and not into imports; the child is killed with SIGKILL after a time drawn from the seed, then the command runs again
until its end. The last line of output is a JSON object: the moments in seconds, how many kills hit, how many left work
behind, and the names of files that differ from those of an unbroken run.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

COMMANDS = {
    "build": ["build", "pipeline.yaml"],
    "add": ["build", "longer.yaml"],
    "audit": ["audit", "dataset"],
    "repair": ["repair", "dataset", "--out", "mended", "--match-length", "--max-dropped", "0.9"],
    "precompute": ["precompute", "pipeline.yaml"],
    "train": ["train", "pipeline.yaml"],
    "sample": ["sample", "pipeline.yaml"],
    "score": ["score", "r.jsonl", "--scorer", "scoring:size", "--scorer", "judge:model", "--out", "candidates"],
    "run": ["run", "pipeline.yaml"],
    "sweep": ["sweep", "pipeline.yaml", "--set", "train.beta=0.1,1"],
}
KEPT = ("dataset/", "mended/", "candidates/")
SKIPPING = ("run", "sweep")  # what is finished stays so, however often they are typed


def spawn(words: list[str], folder: Path) -> int:
    """The command in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        with (folder.parent / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = ["prefkit", *words]
        from prefkit.cli import main

        main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> bool:
    """Wait for the child's end, or kill it after some seconds. Returns whether it was killed."""
    if seconds is not None:
        time.sleep(seconds)
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
    else:
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    return False


def results(work: Path) -> dict[str, bytes]:
    """What the command leaves: a dataset, of a repair a second one, or candidates."""
    return {name: data for name, data in snapshot(work).items() if name.startswith(KEPT)}


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("perf."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def finished(dataset: Path) -> bool:
    """Whether a training run says that it is finished; what the kill left of its lock is nobody's."""
    runs = [json.loads(path.read_text())["finished"] for path in dataset.glob("runs/*/run.json")]
    if any(runs):
        for lock in dataset.glob("runs/*/.lock"):
            lock.write_text("")
    return any(runs)


def fresh(folder: Path) -> Path:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "start", work)
    return work


ENOUGH = 3  # kills that have left work behind


def main() -> None:
    command, seed, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])

    if command in ("precompute", "train", "sample", "score", *SKIPPING):  # what the child spends its first seconds on
        import transformers.models.llama.modeling_llama  # noqa: F401

    durations = []
    for _ in range(2):  # the first one warms the disk cache
        work, started = fresh(folder), time.monotonic()
        wait(spawn(COMMANDS[command], work))
        durations.append(time.monotonic() - started)
    unbroken, rng = results(work), random.Random(seed)
    moments: list[float] = []
    different: list[str] = []
    kills = unfinished = 0
    # where the machine has become slower since, all kills may come while it starts: then some more, and later
    while len(moments) < count or (unfinished < ENOUGH and len(moments) < 2 * count):
        late = 1 if len(moments) < count else 2
        work, moment = fresh(folder), rng.random() * durations[-1] * late
        before = snapshot(work)
        moments.append(round(moment, 4))
        kills += wait(spawn(COMMANDS[command], work), moment)
        left = snapshot(work)
        unfinished += left != before and {*results(work)} != {*unbroken}
        # a finished run is not gone on with: the same command starts another
        if command in SKIPPING or not finished(work / "dataset"):
            wait(spawn(COMMANDS[command], work))
        after = results(work)
        different += [n for n in {*unbroken, *after} if unbroken.get(n) != after.get(n)]
    print(json.dumps({"moments": moments, "kills": kills, "unfinished": unfinished, "different": sorted(different)}))


if __name__ == "__main__":
    main()
