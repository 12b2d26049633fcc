"""How the model benchmarks measure: each contender in a process of its own, in turns, beside the machine's own rate.

A script has jobs: functions from a dict of settings to a dict of figures. `run_job` starts the script again with
`--job NAME SETTINGS`, and `as_job`, first in its main, answers there. The memory of a process is its own highest
resident set (VmHWM: unlike ru_maxrss it does not begin at that of the process that started it); on CUDA it is what
torch allocated there.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Settings = dict[str, Any]
Figures = dict[str, Any]
OOM = {"out_of_memory": True}


def as_job(jobs: Mapping[str, Callable[[Settings], Figures]]) -> bool:
    """Where this process was started by `run_job`: do the job, print its figures, and say so."""
    if sys.argv[1:2] != ["--job"]:
        return False
    settings: Settings = json.loads(sys.argv[3])
    import torch

    from prefkit.errors import is_out_of_memory

    torch.set_num_threads(settings["threads"])
    try:
        figures = jobs[sys.argv[2]](settings)
    except Exception as error:
        if not is_out_of_memory(error) and "out of memory" not in str(error):
            raise
        figures = OOM
    print("figures:" + json.dumps(figures))
    return True


def run_job(script: str, job: str, settings: Settings, more: Mapping[str, str] = {}, python: str = "") -> Figures:
    """The figures of a job, from a fresh process with that many threads and no network.

    Args:
        script: whose main asks `as_job`.
        job: its name.
        settings: handed over as JSON; threads, device and folder are needed here.
        more: environment variables beside.
        python: of another environment; by default this one.
    """
    threads = str(settings["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": settings["folder"],
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        **more,
    }
    if settings["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [python or sys.executable, script, "--job", job, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  this file
    lines = [line for line in done.stdout.splitlines() if line.startswith("figures:")]
    if not lines:
        raise SystemExit(f"{job} {settings} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: Figures = json.loads(lines[-1].removeprefix("figures:"))
    return figures


def thread_counts(given: Sequence[int] | None, device: str) -> list[int]:
    """Those given; else one thread and all cores on a CPU, all cores beside another device."""
    cores = len(os.sched_getaffinity(0))
    return list(given) if given else sorted({1, cores}) if device == "cpu" else [cores]


# -- inside a job


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far."""
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    with Path("/proc/self/status").open(encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


@contextlib.contextmanager
def timed(figures: Figures, device: str, name: str = "seconds") -> Iterator[None]:
    """Wall time of a block into figures[name], with the device's work in it, and CPU time into figures[CPU name].

    CPU time is of all threads, idle ones that spin included; where other work shares the cores it is the steadier one.
    """
    synchronize(device)
    began, used = time.perf_counter(), time.process_time()
    yield
    synchronize(device)
    figures[name], figures[f"CPU {name}"] = time.perf_counter() - began, time.process_time() - used


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def matrix_rate(dtype: str, device: str, tries: int = 12) -> float:
    """Floating-point operations a second of one matrix product here: the best of several.

    2048 x 1024 x 1024 in the dtype of the weights on a CPU, 8192 cubed on CUDA.
    """
    import torch

    from prefkit.models import REGIMES

    rows, inner, columns = (2048, 1024, 1024) if device == "cpu" else (8192, 8192, 8192)
    left = torch.randn(rows, inner, device=device, dtype=REGIMES[dtype].weights)
    right = torch.randn(inner, columns, device=device, dtype=REGIMES[dtype].weights)
    torch.mm(left, right)
    fastest = float("inf")
    for _ in range(tries):
        figures: Figures = {}
        with timed(figures, device):
            torch.mm(left, right)
        fastest = min(fastest, float(figures["seconds"]))
    return 2 * rows * inner * columns / fastest


# -- what is printed


class Report:
    """Lines for the terminal and, with --out, for a Markdown file."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.lines = out, [""]

    def say(self, line: str = "") -> None:
        """Print a line, and keep it; the file is whole after each."""
        print(line, flush=True)
        self.lines.append(line)
        if self.out is not None:
            self.out.write_text("\n".join(self.lines).strip() + "\n", encoding="utf-8")

    def begin(self, title: str, device: str) -> None:
        """What the figures are of: command, machine, versions."""
        command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if is_installed(name))
        self.say(f"# {title}\n\n`{command}`\n\n{machine(device)}. Python {platform.python_version()}, {versions}.\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A Markdown table."""
        self.say("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for row in rows:
            self.say("| " + " | ".join(row) + " |")
        self.say()


PACKAGES = ("torch", "transformers", "accelerate", "trl")


def is_installed(name: str) -> bool:
    """Whether a package is there; it is not imported."""
    return importlib.util.find_spec(name) is not None


def machine(device: str) -> str:
    """The processor, and the accelerator where that is what is measured."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        names = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    text = f"{platform.system()}, {', '.join(sorted(names))}, {len(os.sched_getaffinity(0))} cores"
    if device != "cpu":
        import torch

        text += f", {torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return text


def best_of(runs: Sequence[Figures], key: str = "seconds") -> Figures:
    """The fastest of several runs; the first where none finished."""
    return min(runs, key=lambda run: run.get(key, float("inf")))


def median_of(runs: Sequence[Figures], key: str = "seconds") -> float:
    """The median of a figure."""
    return float(statistics.median(run[key] for run in runs))


def gigabytes(size: float) -> str:
    """10^9 bytes, two places."""
    return f"{size / 1e9:.2f}"


class Asked(NamedTuple):
    """What every contender did between the clock's two readings; `times`: in how many equal steps."""

    times: int
    pairs: int
    tokens: int  # distinct
    flops: float


COMPARED = (
    "",
    "best s",
    "median s",
    "CPU s",
    "pairs/s",
    "distinct tokens/s",
    "times as fast as TRL's best",
    "as TRL at 8",
    "as TRL's best by CPU time",
    "peak GB",
    "model GB",
    "matrix rate GF/s",
    "of it",
)


def finished(runs: Mapping[str, Sequence[Figures]]) -> dict[str, Sequence[Figures]]:
    """The contenders all of whose runs came to their end: the others ran out of memory."""
    return {name: found for name, found in runs.items() if all("seconds" in run for run in found)}


def compared(runs: Mapping[str, Sequence[Figures]], asked: Asked) -> dict[str, list[str]]:
    """A row of COMPARED for every contender: `trl N`, and ours by any other name."""
    done = finished(runs)
    wall = {name: float(best_of(found)["seconds"]) for name, found in done.items()}
    used = {name: float(best_of(found, "CPU seconds")["CPU seconds"]) for name, found in done.items()}
    peers = [name for name in done if name.startswith("trl")]
    fastest, least = (min((of[name] for name in peers), default=math.nan) for of in (wall, used))
    eight = wall.get("trl 8", math.nan)
    rows = {}
    for name, found in runs.items():
        if name not in done:
            rows[name] = [name, "out of memory", *["-"] * (len(COMPARED) - 2)]
            continue
        best, seconds = best_of(found), wall[name]
        figures = [seconds / asked.times, median_of(found) / asked.times, used[name] / asked.times]
        figures += [asked.pairs / seconds]
        ratios = [fastest / seconds, eight / seconds, least / used[name]]
        rows[name] = [
            name,
            *(f"{figure:.2f}" for figure in figures),
            f"{asked.tokens / seconds:,.0f}",
            *("-" if math.isnan(figure) else f"{figure:.2f}" for figure in ratios),
            *(gigabytes(best[which]) for which in ("peak", "model")),
            f"{best['rate'] / 1e9:,.1f}",
            f"{asked.flops / seconds / best['rate']:.2f}",
        ]
    return rows
