"""Presence of n-grams counted over preference pairs, beside a plain scan and write of the same file, and beside sets.

    taskset -c 0 python benchmarks/audit.py FOLDER [--rows 160000] [--rounds 3] [--jobs ours_1 ours_12 counter_1 ...]

Makes FOLDER/ROWS/ROWS.parquet: prompts and replies of shared/data/hh (some 480, 170 and 170 characters), again and
again, where 15 in 100 words are drawn anew from a vocabulary with the frequencies of a language, real words first and
300,000 made-up ones behind them. So words and n-grams go on growing with the rows. Measures in fresh processes with one
thread, in turns:

    floor        pl.scan_parquet(...).sink_parquet(..., zstd 3): all columns in, all columns out
    read         the blocks that are counted, and nothing else
    ours_N       counting.count_grams for all n of N (ours_12: n = 1 and 2) with a Spill; keeps what has b + c >= 10
    weights_N    likewise, with five sums: what a length model of three columns takes
    names        ours_123, then names_of its n-grams; postings: ours_123, then all their discordant pairs
    counter_N    a set a side and three Counters: the plain code

and compares the counts of ours_12 with those of counter_12 number by number. CPU seconds are user + system of the
process; anon is the largest RssAnon beyond that of the imports, sampled every 10 ms.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from prefkit.audit.counting import Texts, Weights, count_grams, of_words
from prefkit.audit.postings import names_of, postings
from prefkit.grams import gram_hash
from prefkit.spill import Spill

BLOCK = 4096
CHUNK = 20_000
CHANGED = 0.15
MADE_UP = 300_000
MIN_DISCORDANT = 10
DATA = Path(os.environ.get("PREFKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
COLUMNS = ("prompt", "chosen", "rejected")


# -- data


def real_pairs() -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of the real transcripts."""
    with gzip.open(DATA / "hh" / "harmless_base_test_part.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    turn = "\n\nAssistant:"
    cut = [(row["chosen"].rsplit(turn, 1), row["rejected"].rsplit(turn, 1)) for row in rows]
    return [(chosen[0], chosen[-1], rejected[-1]) for chosen, rejected in cut]


def vocabulary(texts: list[str], rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Words, the most frequent first, and their cumulative frequencies: 1 / (rank + 2.7)^1.07 (Mandelbrot)."""
    counts = Counter(word for text in texts for word in re.findall(r"\w+", text))
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    made_up = ["".join(rng.choice(letters, size)) for size in rng.integers(4, 12, MADE_UP)]
    words = np.array([word for word, _ in counts.most_common()] + made_up)
    frequency = (np.arange(len(words)) + 2.7) ** -1.07
    return words, np.cumsum(frequency) / frequency.sum()


def write_data(folder: Path, rows: int) -> Path:
    """The file, if it is not there. A smaller file is the beginning of a larger one."""
    path = folder / f"{rows}.parquet"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pairs = real_pairs()
    words, cumulated = vocabulary([text for pair in pairs for text in pair], rng)
    parts = [[re.split(r"(\w+)", text) for text in pair] for pair in pairs]

    def changed(some: list[str]) -> str:
        new = np.flatnonzero(rng.random(len(some) // 2) < CHANGED)
        drawn = words[np.searchsorted(cumulated, rng.random(len(new)))].tolist()
        some = some.copy()
        for at, word in zip(new.tolist(), drawn, strict=True):
            some[2 * at + 1] = word
        return "".join(some)

    writer = None
    for start in range(0, rows, CHUNK):
        numbers = range(start, min(start + CHUNK, rows))
        made = [(f"{i:016x}", *(changed(some) for some in parts[i % len(parts)])) for i in numbers]
        table = pl.DataFrame(made, schema=["pair_id", *COLUMNS], orient="row").to_arrow()
        writer = writer or pq.ParquetWriter(folder / ".tmp", table.schema, compression="zstd", compression_level=3)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    (folder / ".tmp").rename(path)
    return path


# -- what is measured, each in a process of its own


def texts_of(source: Path) -> Texts:
    """The blocks of pairs of a file, all columns of them."""

    def blocks() -> Iterator[pl.DataFrame]:
        for batch in pq.ParquetFile(source, pre_buffer=False).iter_batches(BLOCK):
            frame = pl.from_arrow(batch)
            assert isinstance(frame, pl.DataFrame)
            yield frame

    return blocks


def floor(source: Path, out: Path, _limit: int) -> dict[str, Any]:
    """Scan and write."""
    pl.scan_parquet(source).sink_parquet(out, compression="zstd", compression_level=3)
    return {}


def read(source: Path, _out: Path, _limit: int) -> dict[str, Any]:
    """Only what every count reads."""
    return {"rows": sum(frame.height for frame in texts_of(source)())}


def ours(n: tuple[int, ...], columns: int | None = None, further: str = "") -> Callable[..., dict[str, Any]]:
    """The count, with sums over so many columns, and what comes after it."""

    def run(source: Path, out: Path, limit: int) -> dict[str, Any]:
        weights = None if columns is None else _weights(pq.ParquetFile(source).metadata.num_rows, columns)
        texts = texts_of(source)
        with Spill(out.parent) as scratch:
            options = {"weights": weights, "memory_limit": limit, "scratch": scratch}
            counts = count_grams(texts, of_words, n, min_discordant=MIN_DISCORDANT, **options)  # type: ignore[arg-type]
            found = {"rows": counts.height, "spilled": scratch.folder is not None}
        if further == "names":
            found["names"] = len(names_of(texts, counts))
        if further == "postings":
            found["postings"] = len(postings(texts, of_words, counts).gram)
        counts.write_parquet(out)
        return found

    return run


def _weights(num_pairs: int, columns: int) -> Weights:
    numbers = np.random.default_rng(1).integers(-(2**30), 2**30, (num_pairs, 2 + columns))
    return Weights(numbers[:, :1], numbers[:, 1:])


def counter(n: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
    """A set a side, three Counters: what `count_grams` has to equal."""
    word = re.compile(r"\w+|[^\w\s]")

    def grams(text: str) -> set[str | tuple[str, str]]:
        words = word.findall(unicodedata.normalize("NFC", text).casefold())
        return {*(words if 1 in n else ()), *(itertools.pairwise(words) if 2 in n else ())}

    def run(source: Path, out: Path, _limit: int) -> dict[str, Any]:
        chosen_only, rejected_only, both = (Counter[Any]() for _ in range(3))
        for frame in texts_of(source)():
            for chosen, rejected in frame.select("chosen", "rejected").iter_rows():
                one, other = grams(chosen), grams(rejected)
                chosen_only.update(one - other)
                rejected_only.update(other - one)
                both.update(one & other)
        distinct = Counter(1 if isinstance(gram, str) else 2 for gram in {*chosen_only, *rejected_only, *both})
        kept = [g for g in {*chosen_only, *rejected_only} if chosen_only[g] + rejected_only[g] >= MIN_DISCORDANT]
        names = [(g,) if isinstance(g, str) else g for g in kept]
        table = {
            "hash": pl.Series([gram_hash(name) for name in names], dtype=pl.UInt64),
            "n": pl.Series([len(name) for name in names], dtype=pl.Int32),
            "num_chosen_only": [chosen_only[g] for g in kept],
            "num_rejected_only": [rejected_only[g] for g in kept],
            "num_both": [both[g] for g in kept],
        }
        pl.DataFrame(table).sort("n", "hash").write_parquet(out)
        return {"rows": len(kept), "distinct": dict(sorted(distinct.items()))}

    return run


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "floor": floor,
    "read": read,
    "ours_1": ours((1,)),
    "ours_12": ours((1, 2)),
    "ours_123": ours((1, 2, 3)),
    "weights_1": ours((1,), 4),
    "weights_12": ours((1, 2), 4),
    "weights_123": ours((1, 2, 3), 4),
    "names": ours((1, 2, 3), None, "names"),
    "postings": ours((1, 2, 3), None, "postings"),
    "counter_1": counter((1,)),
    "counter_12": counter((1, 2)),
}


def rss_anon() -> float:
    """RssAnon of this process in MB."""
    with Path("/proc/self/status").open() as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) / 1024


class Anon(threading.Thread):
    """The largest RssAnon of this process beyond what it had, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = rss_anon()

    def run(self) -> None:
        """Look every 10 ms."""
        while True:
            self.most = max(self.most, rss_anon())
            time.sleep(0.01)


def work(job: str, source: Path, out: Path, limit: int) -> None:
    """One measurement: a line of JSON."""
    anon = Anon()
    anon.start()
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = JOBS[job](source, out, limit)
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    found |= {"wall": time.perf_counter() - began, "cpu": cpu, "anon": anon.most - anon.before}
    print(json.dumps(found))


def measure(job: str, source: Path, limit: int) -> dict[str, Any]:
    """Run a job in a fresh process with one thread; its result stays beside the source."""
    threads = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--job", job, str(source), str(source.parent / f"{job}.out"), str(limit)]
    done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603  this file
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(job: str, runs: list[dict[str, Any]], floors: list[dict[str, Any]], pairs: int) -> str:
    """A row of the table: medians, and the ratios to the floor that ran in the same turn."""
    wall, cpu, anon = (float(np.median([run[key] for run in runs])) for key in ("wall", "cpu", "anon"))
    ratios = sorted(run["cpu"] / base["cpu"] for run, base in zip(runs, floors, strict=True))
    rest = ", ".join(f"{key} {value}" for key, value in runs[0].items() if key not in ("wall", "cpu", "anon"))
    spread = f"{np.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"| {job} | {wall:.2f} | {cpu:.2f} | {cpu / pairs * 1e6:.1f} | {spread} | {anon:,.0f} | {rest} |"


def compare(folder: Path) -> str:
    """Whether the counts of ours_12 and counter_12 are the same numbers."""
    files = [folder / f"{job}.out" for job in ("ours_12", "counter_12")]
    if not all(path.exists() for path in files):
        return ""
    one, other = (pl.read_parquet(path).select("hash", "n", pl.col("^num_.*$")) for path in files)
    return f"ours_12 and counter_12: {'the same' if one.equals(other) else 'DIFFERENT'} {one.height:,} rows"


def main() -> None:
    """Measure and print tables."""
    if sys.argv[1:2] == ["--job"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-limit", type=int, default=10**9)
    parser.add_argument("--jobs", nargs="*", default=[job for job in JOBS if job != "floor"], choices=[*JOBS])
    options = parser.parse_args()
    source = write_data(options.folder / str(options.rows), options.rows)
    jobs = ["floor", *options.jobs]
    limit = options.memory_limit
    print(
        f"{options.rows:,} pairs, {source.stat().st_size / 1e6:,.0f} MB, memory limit {limit / 1e6:,.0f} MB, "
        f"polars {pl.__version__}, load {os.getloadavg()[0]:.1f}\n\n"
        "| job | wall s | CPU s | us a pair | x floor | anon MB | found |\n|---|---|---|---|---|---|---|"
    )
    turns = [{job: measure(job, source, limit) for job in jobs} for _ in range(options.rounds)]
    for job in jobs:
        print(row(job, [turn[job] for turn in turns], [turn["floor"] for turn in turns], options.rows), flush=True)
    print(f"\n{compare(source.parent)}")


if __name__ == "__main__":
    main()
