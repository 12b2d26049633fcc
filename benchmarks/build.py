"""A whole build of generated JSON lines: time, memory and disk against the number of pairs.

    python benchmarks/build.py FOLDER [--rows 10000 100000 1000000 5000000] [--memory-limit 4GB] [--set KEY=VALUE ...]

Makes FOLDER/ROWS/pairs.jsonl, some 1.1 kB a pair: two pairs a prompt, sentences of made-up words with the frequencies
of a language, each row with words of its own. Planted, of a hundred rows: 4 exact copies, 2 copies with other white
space, 4 with some words put behind both sides, 2 with the sides swapped, and .1 that hold one of the 500 items of
FOLDER/ROWS/eval.jsonl. Then `prefkit build` of it, with decontamination, in a process of its own, and before it a plain
scan and write (polars scan_ndjson -> sink_parquet, zstd 3): what the build and its stages are multiples of.

Memory is the anonymous memory of the build and its workers together, sampled every 50 ms; disk is the most that lay in
the dataset's folder and in the temporary one beyond what lies there in the end. Exits 1 where more than 8 GiB are held,
time grows with the pairs to a power above 1.05, or a planted kind is not found. 5,000,000 pairs need some 15 GB in
FOLDER, which are removed again.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

CHUNK = 100_000
SENTENCES = 200_000
ITEMS = 500
MOST_ANON = 8 * 2**30
EXPONENT = 1.05
ORIGINAL, EXACT, SPACED, NEAR, SWAPPED, HOLDING = range(6)
PLANTED = {EXACT: 0.04, SPACED: 0.02, NEAR: 0.04, SWAPPED: 0.02, HOLDING: 0.001}
REASONS = {"duplicate": (EXACT, SPACED), "near_duplicate": (NEAR,), "contradiction": (SWAPPED,)}
MISSED = 0.1  # the largest share of a kind that may be missed, or found too often

Array = np.ndarray[Any, np.dtype[Any]]


# -- what a process and its workers hold and use


class Watch(threading.Thread):
    """Anonymous memory and CPU seconds of a process and all that it starts, and the disk that some folders take.

    Attributes:
        anon: most bytes of all processes together.
        anon_of: most bytes of each, by process id.
        cpu_of: CPU seconds of each, up to when it was last seen.
        disk: most bytes in the folders.
    """

    def __init__(self, pid: int, every: float = 0.02, folders: Iterable[Path] = ()) -> None:
        super().__init__(daemon=True)
        self.pid, self.every, self.folders = pid, every, tuple(folders)
        self.ended = threading.Event()
        self.anon = self.disk = 0
        self.anon_of: dict[int, int] = {}
        self.cpu_of: dict[int, float] = {}

    def run(self) -> None:
        """Look until `stop`."""
        looks = 0
        while not self.ended.wait(self.every):
            held = {pid: anon for pid in family_of(self.pid) if (anon := self._look(pid)) is not None}
            self.anon = max(self.anon, sum(held.values()))
            for pid, anon in held.items():
                self.anon_of[pid] = max(self.anon_of.get(pid, 0), anon)
            if self.folders and looks % 10 == 0:
                self.disk = max(self.disk, sum(size_of(folder) for folder in self.folders))
            looks += 1

    def stop(self) -> None:
        """End it."""
        self.ended.set()
        self.join()

    def _look(self, pid: int) -> int | None:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            times = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None  # it ended
        self.cpu_of[pid] = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        anon = next((line for line in status.splitlines() if line.startswith("RssAnon")), None)
        return None if anon is None else int(anon.split()[1]) * 1024

    @property
    def anon_of_a_worker(self) -> int:
        """Most bytes of one of the processes that it started, or its own where it started none."""
        workers = [anon for pid, anon in self.anon_of.items() if pid != self.pid]
        return max(workers or self.anon_of.values(), default=0)

    @property
    def cpu_of_workers(self) -> float:
        """CPU seconds of the processes that it started."""
        return sum(cpu for pid, cpu in self.cpu_of.items() if pid != self.pid)


def family_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it ended
    return found


def size_of(folder: Path) -> int:
    """Bytes that a folder's files take on disk."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512  # noqa: PTH118 - called for each of many
            except OSError:
                continue  # it was removed
    return total


# -- data


def _mixed(numbers: Array, salt: int) -> Array:
    """A hash of row numbers, so that a row is the same wherever it stands."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt * 0x9E3779B9)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(29))


def make_sentences(count: int = SENTENCES, words_each: int = 10) -> pl.Series:
    """Sentences of made-up words, some 60 bytes each."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = pl.Series(["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 50_000)])
    places = np.minimum(rng.zipf(1.25, (count, words_each)) - 1, len(words) - 1)
    columns = [words.gather(places[:, column]).alias(str(column)) for column in range(words_each)]
    return pl.DataFrame(columns).select(pl.concat_str(pl.all(), separator=" ") + ".").to_series()


class Plan(NamedTuple):
    """What each row is."""

    kinds: Array  # int8
    sources: Array  # int64: the original that it is, or is a copy of


def plan_rows(rows: int) -> Plan:
    """Originals, and copies of originals anywhere; no original is the source of two kinds of copies."""
    rng = np.random.default_rng(1)
    drawn = rng.random(rows)
    edges = np.cumsum([*PLANTED.values()])
    kinds = np.array([*PLANTED, ORIGINAL], dtype=np.int8)[np.searchsorted(edges, drawn, side="right")]
    originals = rng.permutation(np.flatnonzero(kinds == ORIGINAL))
    copies = np.flatnonzero((kinds != ORIGINAL) & (kinds != HOLDING))
    sources = np.arange(rows)
    sources[copies] = originals[: len(copies)]
    return Plan(kinds, sources)


def _told(sentences: pl.Series, numbers: Array, count: int, salt: int) -> pl.Expr:
    """So many sentences with two words in each that no other row has."""
    parts: list[pl.Expr] = []
    for place in range(count):
        drawn = _mixed(numbers, salt + place)
        mark = pl.lit(pl.Series(drawn % np.uint64(10**9))).cast(pl.String)
        parts += [pl.lit(sentences.gather((drawn % len(sentences)).astype(np.int64))), mark]
    return pl.concat_str(parts, separator=" ")


def make_rows(sentences: pl.Series, plan: Plan, rows: Array) -> pl.DataFrame:
    """Some rows: prompt, chosen, rejected, chosen_score, rejected_score."""
    kinds, sources = plan.kinds[rows], plan.sources[rows]
    prompts = sources // 2
    kind, more = pl.lit(pl.Series(kinds)), _told(sentences, rows, 1, 900)
    items = pl.lit(_items(sentences).gather((_mixed(rows, 901) % ITEMS).astype(np.int64)))
    prompt = pl.concat_str(_told(sentences, prompts, 3, 10), pl.when(kind == HOLDING).then(items).otherwise(pl.lit("")))
    one, other = _told(sentences, sources, 6, 100), _told(sentences, sources, 6, 200)

    def side(text: pl.Expr, else_text: pl.Expr) -> pl.Expr:
        spaced = text.str.replace_all(". ", ".\n\n", literal=True)
        return (
            pl.when(kind == SWAPPED)
            .then(else_text)
            .when(kind == SPACED)
            .then(spaced)
            .when(kind == NEAR)
            .then(pl.concat_str(text, more.str.slice(0, 40), separator=" "))
            .otherwise(text)
        )

    return pl.select(
        prompt=prompt,
        chosen=side(one, other),
        rejected=side(other, one),
        chosen_score=pl.lit(pl.Series(sources % 7)) + 2.5,
        rejected_score=pl.lit(pl.Series(sources % 5)) / 2,
    )


def _items(sentences: pl.Series) -> pl.Series:
    numbers = np.arange(ITEMS)
    return pl.select(pl.concat_str(pl.lit(" "), _told(sentences, numbers, 3, 500))).to_series()


def write_data(folder: Path, rows: int) -> dict[str, int]:
    """FOLDER/ROWS/pairs.jsonl and eval.jsonl, if they are not there; how many rows are of each planted reason."""
    home, plan = folder / str(rows), plan_rows(rows)
    if not (home / "done").exists():
        home.mkdir(parents=True, exist_ok=True)
        sentences = make_sentences()
        with (home / "pairs.jsonl").open("wb") as out:
            for start in range(0, rows, CHUNK):
                make_rows(sentences, plan, np.arange(start, min(start + CHUNK, rows))).write_ndjson(out)
        items = _items(sentences).str.strip_chars().alias("question").to_frame()
        items.with_row_index("id").write_ndjson(home / "eval.jsonl")
        (home / "done").touch()
    found = {reason: int(np.isin(plan.kinds, kinds).sum()) for reason, kinds in REASONS.items()}
    found["contradiction"] *= 2  # both go
    return found | {"contaminated": int((plan.kinds == HOLDING).sum())}


# -- one build


class Run(NamedTuple):
    """What a build took."""

    rows: int
    floor: float  # wall seconds of a plain scan and write
    wall: float
    cpu: float
    anon: int  # bytes, all processes together
    disk: int  # bytes, beside the dataset
    dataset: int
    told: dict[str, Any]  # of --json
    planted: dict[str, int]


def floor_of(source: Path) -> float:
    """Wall seconds of a plain scan and write, in a process of its own."""
    code = (
        "import sys, time, polars as pl\n"
        "began = time.perf_counter()\n"
        "pl.scan_ndjson(sys.argv[1]).sink_parquet(sys.argv[2], compression='zstd', compression_level=3)\n"
        "print(time.perf_counter() - began)"
    )
    out = source.with_name("floor.parquet")
    done = subprocess.run(  # noqa: S603 - the code above
        [sys.executable, "-c", code, str(source), str(out)], capture_output=True, check=True, text=True
    )
    out.unlink()
    return float(done.stdout)


def settings_of(home: Path, memory_limit: str) -> dict[str, Any]:
    """The pipeline of a build."""
    return {
        "dataset": str(home / "dataset"),
        "sources": [{"path": str(home / "pairs.jsonl"), "format": "pairs"}],
        "decontaminate": {"against": [{"path": str(home / "eval.jsonl"), "columns": ["question"], "id": "id"}]},
        "build": {"memory_limit": memory_limit},
    }


def build(home: Path, rows: int, planted: dict[str, int], options: argparse.Namespace) -> Run:
    """Run `prefkit build`, watched."""
    floor = floor_of(home / "pairs.jsonl")
    dataset, scratch = home / "dataset", home / "tmp"
    for folder in (dataset, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir()
    pipeline = home / "pipeline.json"  # JSON is YAML
    pipeline.write_text(json.dumps(settings_of(home, options.memory_limit)), encoding="utf-8")
    changes = [word for change in options.set for word in ("--set", change)]
    command = [sys.executable, "-m", "prefkit", "build", str(pipeline), "--json", *changes]
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    used, began = os.times(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(  # noqa: S603 - ours
            command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        )
        watch = Watch(process.pid, 0.05, [dataset, scratch])
        watch.start()
        told, _ = process.communicate()
        wall, now = time.perf_counter() - began, os.times()
        watch.stop()
        if process.returncode:
            said.seek(0)
            sys.exit(f"prefkit build of {rows:,} pairs: exit status {process.returncode}\n{said.read()[-2000:]}")
    own = now.children_user + now.children_system - used.children_user - used.children_system
    left = size_of(dataset)
    cpu = max(own, sum(watch.cpu_of.values()))  # workers are not always waited for by who started them
    run = Run(rows, floor, wall, cpu, watch.anon, max(0, watch.disk - left), left, json.loads(told), planted)
    for folder in (dataset, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    return run


# -- what is printed


def row_of(run: Run) -> str:
    """A row of the table of builds."""
    cells = [
        f"{run.rows:,}",
        f"{run.floor:.1f}",
        f"{run.wall:.1f}",
        f"{run.cpu:.1f}",
        f"{run.wall / run.floor:.2f}",
        f"{run.rows / run.wall:,.0f}",
        f"{run.anon / 1e6:,.0f}",
        f"{run.disk / 1e6:,.0f}",
        f"{run.disk / run.rows:,.0f}",
        f"{run.dataset / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def stages_of(runs: list[Run]) -> str:
    """Each stage as a multiple of the plain scan and write, by the number of pairs; empty if builds tell none."""
    names = dict.fromkeys(name for run in runs for name in run.told.get("seconds", {}))
    if not names:
        return "the build tells no seconds by stage\n"
    lines = ["| stage, x floor | " + " | ".join(f"{run.rows:,}" for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for name in names:
        cells = [f"{run.told['seconds'].get(name, 0.0) / run.floor:.2f}" for run in runs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdicts_of(runs: list[Run]) -> list[tuple[str, bool]]:
    """What is required, and whether it holds."""
    last = runs[-1]
    found = [(f"anon at {last.rows:,} pairs: {last.anon / 2**30:.2f} GiB (at most 8)", last.anon <= MOST_ANON)]
    large = [run for run in runs if run.rows >= 100_000]
    if len(large) > 1:
        sizes, times = np.log([run.rows for run in large]), np.log([run.wall for run in large])
        power = float(np.polyfit(sizes, times, 1)[0])
        text = f"time grows with the pairs, from {large[0].rows:,} on, to the power of {power:.3f} (at most {EXPONENT})"
        found.append((text, power <= EXPONENT))
    for reason, count in last.planted.items():
        dropped = last.told["reasons"].get(reason, 0)
        found.append((f"{reason}: {dropped:,} dropped, {count:,} planted", abs(dropped - count) <= MISSED * count))
    return found


def main() -> None:
    """Print the tables and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 5_000_000])
    parser.add_argument("--memory-limit", default="4GB", help="build.memory_limit")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of the build")
    parser.add_argument("--keep", action="store_true", help="leave the JSON lines in the folder")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("polars", "pyarrow", "numpy"))
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ")
    print(f"memory limit {options.memory_limit}\n")
    print("| pairs | floor s | wall s | CPU s | x floor | pairs/s | anon MB | disk MB | bytes a pair | dataset MB |")
    print("|---" * 10 + "|")
    runs = []
    for rows in sorted(options.rows):
        planted = write_data(options.folder, rows)
        runs.append(build(options.folder / str(rows), rows, planted, options))
        print(row_of(runs[-1]), flush=True)
        if not options.keep:
            shutil.rmtree(options.folder / str(rows))
    print(f"\n{stages_of(runs)}")
    verdicts = verdicts_of(runs)
    for text, holds in verdicts:
        print(f"{'PASS' if holds else 'FAIL'} {text}")
    sys.exit(0 if all(holds for _, holds in verdicts) else 1)


if __name__ == "__main__":
    main()
