"""Best against worst of ten million candidates in Parquet, beside a plain scan and write of the same bytes.

    python benchmarks/selection.py FOLDER [--rows 10000000] [--rounds 3] [--memory-limit 4000000000]

Makes FOLDER/sorted.parquet (the rows of a prompt stand together) and FOLDER/shuffled.parquet, 8 candidates a prompt,
.3 kB a row, 1 % of the scores null, scores on a grid of .1, and measures in fresh processes, in turns:

    floor     pl.scan_parquet(...).sink_parquet(..., zstd 3): all rows in, all rows out
    ours      blocks of pyarrow -> candidates.select_parts -> Parquet, zstd 3 (min_margin .5), in three threads
    duckdb    arg_max and arg_min by prompt, COPY to Parquet, zstd 3; whose row wins a tie is chance
    polars    group_by with get(arg_max) and get(arg_min); likewise
    loop      a dict of lists of Python rows, max and min of each

and that the pairs are the same with one and with two threads. CPU seconds are user + system of the process; anon is the
largest RssAnon, sampled every 20 ms. Needs some 8 GB in FOLDER.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.ahead import ahead
from prefkit.candidates import select_parts
from prefkit.pairing import Rules

PER_PROMPT = 8
PIECES = 200_000
CHUNK = 200_000
MIN_MARGIN = 0.5
BLOCK = 65_536


def pieces(rng: np.random.Generator) -> pl.Series:
    """Half sentences of words with the frequencies of a language: some 60 characters each."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    lengths = rng.integers(2, 11, 30_000)
    words = ["".join(rng.choice(letters, n)) for n in lengths]
    places = np.minimum(rng.zipf(1.3, (PIECES, 9)) - 1, len(words) - 1)
    return pl.Series("piece", [" ".join(words[i] for i in row) for row in places])


def write_data(folder: Path, rows: int) -> None:
    """Both files, if they are not there; `shuffled` holds the rows of `sorted` in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "shuffled.parquet").exists():
        return
    rng = np.random.default_rng(0)
    pool = pieces(rng)
    order = rng.permutation(rows)
    for name, numbers in (("sorted", np.arange(rows)), ("shuffled", order)):
        writer = None
        for start in range(0, rows, CHUNK):
            some = numbers[start : start + CHUNK]
            table = _rows(some, pool).to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(
                folder / f".{name}.tmp", table.schema, compression="zstd", compression_level=3
            )
            writer.write_table(table, row_group_size=50_000)
        assert writer is not None
        writer.close()
        (folder / f".{name}.tmp").rename(folder / f"{name}.parquet")


def _mixed(numbers: np.ndarray[Any, Any], salt: int) -> np.ndarray[Any, Any]:
    """A hash of row numbers, so that a row is the same wherever it stands."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt * 0x9E3779B9)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(29))


def _rows(numbers: np.ndarray[Any, Any], pool: pl.Series) -> pl.DataFrame:
    prompts = numbers // PER_PROMPT

    def text(of: np.ndarray[Any, Any], count: int, salt: int) -> pl.Expr:
        parts = [pl.lit(pool[(_mixed(of, salt + i) % PIECES).astype(np.int64)]) for i in range(count)]
        return pl.concat_str(pl.lit(pl.Series(of)).cast(pl.String), *parts, separator=" ")

    score = (_mixed(numbers, 90) % 100) / 10
    return pl.select(
        prompt=text(prompts, 2, 10),
        response=text(numbers, 4, 20),
        score=pl.Series(np.where(_mixed(numbers, 91) % 100 == 0, np.nan, score)).fill_nan(None),
        model=pl.lit("model-") + pl.lit(pl.Series(numbers % PER_PROMPT)).cast(pl.String),
    )


# -- what is measured, each in a process of its own


def floor(source: Path, out: Path, _limit: int) -> None:
    """Scan and write."""
    pl.scan_parquet(source).sink_parquet(out, compression="zstd", compression_level=3)


def read_blocks(source: Path) -> Iterator[pl.DataFrame]:
    """Records as a source gives them; rows without a score are rejects and not among them."""
    first = 1
    for batch in pq.ParquetFile(source, pre_buffer=False).iter_batches(BLOCK):
        frame = pl.from_arrow(pa.Table.from_batches([batch]))
        assert isinstance(frame, pl.DataFrame)
        numbered = frame.with_columns(
            pl.lit(str(source)).alias("source"),
            pl.int_range(first, first + frame.height, dtype=pl.Int64).alias("source_row"),
        )
        first += frame.height
        yield numbered.filter(pl.col("score").is_not_null())


def ours(source: Path, out: Path, limit: int) -> None:
    """The pairs to Parquet."""
    rules = Rules(min_margin=MIN_MARGIN)
    writer = None
    parts = select_parts(lambda: read_blocks(source), "text", "higher_is_better", rules, limit, out.parent)
    for part in ahead(parts):  # decided in one thread, read in another, written in this one
        if part is None:
            if writer is not None:
                writer.close()
            writer = None
            continue
        table = part.pairs.to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd", compression_level=3)
        writer.write_table(table, row_group_size=50_000)
    assert writer is not None
    writer.close()


def duckdb_arg_max(source: Path, out: Path, limit: int) -> None:
    """One pair a prompt, in SQL."""
    import duckdb

    connection = duckdb.connect(config={"memory_limit": f"{limit}B", "temp_directory": str(out.parent)})
    connection.execute(
        f"""COPY (SELECT prompt, arg_max(response, score) chosen, arg_min(response, score) rejected,
                 max(score) chosen_score, min(score) rejected_score
                 FROM '{source}' WHERE score IS NOT NULL GROUP BY prompt HAVING max(score) - min(score) >= {MIN_MARGIN})
            TO '{out}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 3)"""
    )


def polars_arg_max(source: Path, out: Path, _limit: int) -> None:
    """One pair a prompt, in Polars."""
    best, worst = pl.col("score").arg_max(), pl.col("score").arg_min()
    (
        pl.scan_parquet(source)
        .filter(pl.col("score").is_not_null())
        .group_by("prompt")
        .agg(
            chosen=pl.col("response").get(best),
            rejected=pl.col("response").get(worst),
            margin=pl.col("score").max() - pl.col("score").min(),
        )
        .filter(pl.col("margin") >= MIN_MARGIN)
        .sink_parquet(out, compression="zstd", compression_level=3)
    )


def loop(source: Path, out: Path, _limit: int) -> None:
    """Python rows in a dict of lists, as scripts that binarize preference data do it."""
    prompts: dict[str, list[tuple[float, str]]] = {}
    for batch in pq.ParquetFile(source, pre_buffer=False).iter_batches(BLOCK):
        for row in batch.to_pylist():
            if row["score"] is not None:
                prompts.setdefault(row["prompt"], []).append((row["score"], row["response"]))
    pairs = []
    for prompt, found in prompts.items():
        best, worst = max(found, key=lambda item: item[0]), min(found, key=lambda item: item[0])
        if best[0] - worst[0] >= MIN_MARGIN:
            pairs.append({"prompt": prompt, "chosen": best[1], "rejected": worst[1]})
    pq.write_table(pa.Table.from_pylist(pairs), out, compression="zstd", compression_level=3)


JOBS: dict[str, Callable[[Path, Path, int], None]] = {
    "floor": floor,
    "ours": ours,
    "duckdb": duckdb_arg_max,
    "polars": polars_arg_max,
    "loop": loop,
}


class Anon(threading.Thread):
    """The largest RssAnon of this process, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        """Look every 20 ms."""
        while True:
            with Path("/proc/self/status").open() as file:
                found = next(line for line in file if line.startswith("RssAnon"))
            self.most = max(self.most, int(found.split()[1]) / 1024)
            time.sleep(0.02)


def work(job: str, source: Path, out: Path, limit: int) -> None:
    """One measurement: a line of JSON."""
    anon = Anon()
    anon.start()
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    JOBS[job](source, out, limit)
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    wall = time.perf_counter() - began
    print(
        json.dumps(
            {
                "wall": wall,
                "cpu": cpu,
                "system": now.ru_stime - used.ru_stime,
                "anon": anon.most,
                "rss": now.ru_maxrss / 1024,
            }
        )
    )


def measure(job: str, source: Path, folder: Path, limit: int, threads: int | None = None) -> dict[str, float]:
    """Run a job in a fresh process; its result stays in FOLDER/JOB.parquet."""
    environment = os.environ | ({} if threads is None else {"POLARS_MAX_THREADS": str(threads)})
    command = [sys.executable, __file__, "--job", job, str(source), str(folder / f"{job}.parquet"), str(limit)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603  this file
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def digest_of(path: Path) -> str:
    """A hash of the rows of a Parquet file."""
    digest = hashlib.sha256()
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(BLOCK):
        digest.update(str(batch.to_pydict()).encode())
    return digest.hexdigest()[:16]


def row(name: str, runs: list[dict[str, float]], floors: list[dict[str, float]]) -> str:
    """A row of the table: medians, and the median ratios to the floor that ran in the same turn."""

    def of(key: str) -> float:
        return float(np.median([run[key] for run in runs]))

    ratios = [
        float(np.median([run[key] / base[key] for run, base in zip(runs, floors, strict=True)]))
        for key in ("wall", "cpu")
    ]
    return (
        f"| {name} | {of('wall'):.1f} | {of('cpu'):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
        f"| {of('anon'):,.0f} | {of('rss'):,.0f} |"
    )


def main() -> None:
    """Measure and print tables."""
    if sys.argv[1:2] == ["--job"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-limit", type=int, default=4_000_000_000)
    parser.add_argument("--jobs", nargs="*", default=["ours"], choices=[*JOBS])
    parser.add_argument("--threads", action="store_true", help="also compare one thread with two")
    options = parser.parse_args()
    folder, limit = options.folder / str(options.rows), options.memory_limit
    write_data(folder, options.rows)
    load = os.getloadavg()[0]
    print(f"{options.rows:,} rows, memory limit {limit / 1e9:g} GB, polars {pl.__version__}, load {load:.1f}")
    print("| rows | wall s | CPU s | x floor wall | x floor CPU | anon MB | RSS MB |\n|---|---|---|---|---|---|---|")
    for name in ("sorted", "shuffled"):
        source = folder / f"{name}.parquet"
        turns = [
            {job: measure(job, source, folder, limit) for job in ("floor", *options.jobs)}
            for _ in range(options.rounds)
        ]
        for job in ("floor", *options.jobs):
            print(row(f"{name}: {job}", [turn[job] for turn in turns], [turn["floor"] for turn in turns]), flush=True)
        if options.threads:
            digests = {}
            for threads in (1, 2):
                measure("ours", source, folder, limit, threads)
                digests[threads] = digest_of(folder / "ours.parquet")
            print(
                f"{name}: pairs with 1 and with 2 threads: {'the same' if len(set(digests.values())) == 1 else digests}"
            )


if __name__ == "__main__":
    main()
