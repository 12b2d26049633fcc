"""Near-duplicates beside datasketch, rensa, gaoya and text-dedup, and exact duplicates beside a plain scan and write.

    python benchmarks/dedupe.py FOLDER [--peers PYTHON] [--parts near scale unspaced real exact] [--rounds 3]
        [--rows 10000 100000] [--scale 10000 100000 1000000] [--exact 1000000 4000000]

Every measurement is a process of its own, on one core unless it says otherwise; peers run under the interpreter of
--peers, and one that is not installed there is left out and named. Data and truth are those of duplicates.py.

    near      from texts in Parquet to the set of rows to remove, in turns; whose precision and recall against exact
              Jaccard (word 5-grams, .8) stand beside the time. ours checks every pair exactly; rensa's deduplicator and
              gaoya check estimates, the others nothing. datasketch and rensa have no tokenizer: they get the same word
              5-grams as strings, made by a regular expression, whose share of the time is told.
    scale     ours in parts, bounded memory: one process at every size, two at the largest
    unspaced  rows of which half are Chinese
    real      texts nobody planted copies in: transcripts, arguments, the turns of a dialogue
    exact     pairs of some 1.4 kB with planted copies and reversals, Parquet in, Parquet out (zstd 3)

CPU seconds are user + system of the process and its workers, after the imports; anon is the largest RssAnon of the
process, imports and all, sampled every 20 ms. Needs some 6 GB in FOLDER for 4,000,000 pairs, 2 GB for 1,000,000 texts.
Prints what is required of each figure and whether it holds; exits 1 where it does not.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duplicates
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from build import Watch
from duplicates import THRESHOLD, Array, Quality

NUM_PERM = 128
BANDS, BAND = 16, 8  # of peers that are told them: the bands that ours takes
BLOCK = 16_384
BESIDE_DATASKETCH, BESIDE_FASTEST, TWO_PROCESSES = 10.0, 2.0, 1.6
PRECISION, RECALL = 1.0, 0.985
FOUND = 0.9  # the least removal recall of a peer that does the same work
EXPONENT, ANON_A_WORKER = 1.05, 500e6
EXACT, REVERSALS, GROWTH, BYTES_A_ROW = 1.35, 0.3, 1.5, 32

Settings = dict[str, Any]
Figures = dict[str, Any]


class Found(NamedTuple):
    """What a contestant says: which rows go, and the pairs that it comes from if it tells."""

    removed: Array  # bool (N,)
    pairs: tuple[Array, Array] | None = None


# -- near-duplicates: what is measured, each in a process of its own


def _texts(settings: Settings) -> pl.Series:
    return duplicates.read_texts(Path(path) for path in settings["files"])


def _grams(texts: pl.Series) -> Iterator[list[str]]:
    """The word 5-grams of each text as strings, in order: repeats are few, and finding them costs more than they do."""
    n = duplicates.NGRAM
    for text in texts:
        words = duplicates.words_in(text)
        yield [" ".join(words[place : place + n]) for place in range(max(1, len(words) - n + 1))]


def _of_neighbours(neighbours: Iterator[Sequence[int]], num_rows: int) -> Found:
    """What goes if every row is told its neighbours."""
    pairs = sorted({(min(i, j), max(i, j)) for i, found in enumerate(neighbours) for j in found if i != j})
    left, right = (np.array(side, dtype=np.int64) for side in (zip(*pairs, strict=True) if pairs else ([], [])))
    edges = duplicates.Edges(left, right, np.ones(len(left)))
    return Found(duplicates.removed_by(edges, num_rows), (left, right))


def ours(settings: Settings) -> Found:
    """The engine of `prefkit build`, in memory: every pair checked exactly."""
    from prefkit.near import kept_of, near_texts

    texts = _texts(settings)
    near = near_texts(texts)
    return Found(kept_of(len(texts), near) != np.arange(len(texts)), (near.left, near.right))


def ours_in_parts(settings: Settings) -> Found:
    """The same from files, in bounded memory."""
    from prefkit.near import kept_of, near_in_parts

    scratch = Path(settings["scratch"])
    scratch.mkdir(exist_ok=True)
    files = [Path(path) for path in settings["files"]]
    near = near_in_parts(files, "text", processes=settings["processes"], scratch=scratch)
    num_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    return Found(kept_of(num_rows, near) != np.arange(num_rows), (near.left, near.right))


def _by_datasketch(settings: Settings, **hashing: Any) -> Found:
    from datasketch import MinHash, MinHashLSH

    texts = _texts(settings)
    sets = [[gram.encode() for gram in grams] for grams in _grams(texts)]
    minhashes = MinHash.bulk(sets, num_perm=NUM_PERM, **hashing)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERM)
    with index.insertion_session() as session:
        for number, minhash in enumerate(minhashes):
            session.insert(number, minhash)
    return _of_neighbours((index.query(minhash) for minhash in minhashes), len(texts))


def datasketch(settings: Settings) -> Found:
    """MinHash.bulk and MinHashLSH, as its documentation has it for many documents."""
    return _by_datasketch(settings)


def datasketch_xxhash(settings: Settings) -> Found:
    """The same with xxhash in place of SHA1, which its documentation proposes."""
    import xxhash

    return _by_datasketch(settings, hashfunc=xxhash.xxh32_intdigest)


def datasketch_loop(settings: Settings) -> Found:
    """A MinHash a document, an update a gram: the first example of its documentation."""
    from datasketch import MinHash, MinHashLSH

    index, minhashes = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERM), []
    for number, grams in enumerate(_grams(_texts(settings))):
        minhash = MinHash(num_perm=NUM_PERM)
        for gram in grams:
            minhash.update(gram.encode("utf8"))
        index.insert(number, minhash)
        minhashes.append(minhash)
    return _of_neighbours((index.query(minhash) for minhash in minhashes), len(minhashes))


def rensa(settings: Settings) -> Found:
    """RMinHashDeduplicator, as its README has it: a text goes if it is like one that stays."""
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=NUM_PERM, use_lsh=True)
    stays = index.add_pairs((str(number), grams) for number, grams in enumerate(_grams(_texts(settings))))
    return Found(~np.array(stays, dtype=bool))


def rensa_lsh(settings: Settings) -> Found:
    """RMinHash of all texts at once, RMinHashLSH.query_all."""
    from rensa import RMinHash, RMinHashLSH

    texts = _texts(settings)
    minhashes = RMinHash.from_token_sets(_grams(texts), num_perm=NUM_PERM, seed=42)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERM, num_bands=BANDS)
    index.insert_many(minhashes)
    return _of_neighbours(iter(index.query_all(minhashes)), len(texts))


def rensa_rho(settings: Settings) -> Found:
    """The digest matrix of sampled grams of its own benchmark: flags of all texts that have a neighbour."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets_rho(list(_grams(_texts(settings))), num_perm=NUM_PERM, seed=42)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERM, num_bands=BANDS)
    return Found(np.array(index.query_duplicate_flags_matrix_one_shot(matrix), dtype=bool))


def gaoya(settings: Settings) -> Found:
    """MinHashStringIndex with its own tokenizer, all texts at once."""
    from gaoya.minhash import MinHashStringIndex

    texts = _texts(settings).to_list()
    index = MinHashStringIndex(
        hash_size=32,
        jaccard_threshold=THRESHOLD,
        num_bands=BANDS,
        band_size=BAND,
        analyzer="word",
        lowercase=True,
        ngram_range=(5, 5),
    )
    index.par_bulk_insert_docs(list(range(len(texts))), texts)
    return _of_neighbours(iter(index.par_bulk_query(texts)), len(texts))


def text_dedup(settings: Settings) -> Found:
    """Its script: `python -m text_dedup.minhash`, one process, xxh3. Of its clusters the first row stays, not any."""
    from text_dedup import minhash

    files, scratch = settings["files"], Path(settings["scratch"])
    given = {
        "path": "parquet",
        "data_files": files[0] if len(files) == 1 else str(Path(files[0]).with_name("part-*.parquet")),
        "split": "train",
        "cache_dir": str(scratch / "cache"),
        "output": str(scratch / "out"),
        "column": "text",
        "threshold": THRESHOLD,
        "num_perm": NUM_PERM,
        "ngram": duplicates.NGRAM,
        "hash_func": "xxh3",
        "num_proc": 1,
    }
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    minhash.main.main(arguments, standalone_mode=False)
    clusters = ([minhash.uf.find(row)] for row in range(settings["rows"]))
    return Found(_of_neighbours(clusters, settings["rows"]).removed)


def grams_alone(settings: Settings) -> Found:
    """What datasketch and rensa are given, and nothing done with it."""
    return Found(np.array([len(grams) for grams in _grams(_texts(settings))]) < 0)


class Contestant(NamedTuple):
    """A way from texts to the rows that go."""

    run: Callable[[Settings], Found]
    packages: tuple[str, ...]  # that it needs, under --peers
    most: int = 10**9  # rows that it is asked to do
    imports: tuple[str, ...] = ()  # before its time begins


CONTESTANTS = {
    "grams alone": Contestant(grams_alone, ()),
    "ours": Contestant(ours, (), imports=("prefkit.near",)),
    "ours, in parts": Contestant(ours_in_parts, (), imports=("prefkit.near",)),
    "datasketch bulk": Contestant(datasketch, ("datasketch",), imports=("datasketch",)),
    "datasketch bulk, xxhash": Contestant(
        datasketch_xxhash, ("datasketch", "xxhash"), imports=("datasketch", "xxhash")
    ),
    "datasketch loop": Contestant(datasketch_loop, ("datasketch",), most=10_000, imports=("datasketch",)),
    "rensa deduplicator": Contestant(rensa, ("rensa",), imports=("rensa",)),
    "rensa LSH": Contestant(rensa_lsh, ("rensa",), imports=("rensa",)),
    "rensa rho matrix": Contestant(rensa_rho, ("rensa",), imports=("rensa",)),
    "gaoya": Contestant(gaoya, ("gaoya",), imports=("gaoya.minhash",)),
    "text-dedup script": Contestant(text_dedup, ("text-dedup",), imports=("text_dedup.minhash",)),
}
BULK, GRAMS = "datasketch bulk", "grams alone"
OURS = ("ours", "ours, in parts")
OTHERS = ("rensa deduplicator", "rensa LSH", "rensa rho matrix", "gaoya", "text-dedup script")


# -- exact duplicates: what is measured, each in a process of its own


def _blocks(source: str) -> Iterator[pl.DataFrame]:
    for batch in pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20).iter_batches(BLOCK, use_threads=False):
        frame = pl.from_arrow(pa.Table.from_batches([batch]))
        assert isinstance(frame, pl.DataFrame)
        yield frame


def _write(rows: pl.LazyFrame, settings: Settings) -> None:
    rows.sink_parquet(settings["out"], compression="zstd", compression_level=3)


def _write_kept(kept: np.ndarray[Any, Any], settings: Settings) -> Figures:
    """The rows of a mask, block by block, as a build writes its tables."""
    first, writer = 0, None
    whole = pq.ParquetFile(settings["source"], pre_buffer=False, buffer_size=1 << 20)
    for batch in whole.iter_batches(BLOCK, use_threads=False):
        writer = writer or pq.ParquetWriter(settings["out"], batch.schema, compression="zstd", compression_level=3)
        some = batch.filter(pa.array(kept[first : first + batch.num_rows]))
        writer.write_table(pa.Table.from_batches([some]))
        first += batch.num_rows
    assert writer is not None
    writer.close()
    return {"kept": int(kept.sum())}


def exact_floor(settings: Settings) -> Figures:
    """Scan and write."""
    _write(pl.scan_parquet(settings["source"]), settings)
    return {}


def _keys(settings: Settings) -> pl.DataFrame:
    """The keys of all rows: folded prompt, chosen and rejected, as three numbers a row."""
    from prefkit.keys import fold_keys

    sides = ("prompt", "chosen", "rejected")
    keys = [
        pl.DataFrame({f"key_{side}": fold_keys(frame[side]) for side in sides}) for frame in _blocks(settings["source"])
    ]
    return pl.concat(keys, rechunk=True)


def exact_keys(settings: Settings) -> Figures:
    """Reading and the keys, and nothing else."""
    return {"kept": _keys(settings).height}


def exact_ours(settings: Settings) -> Figures:
    """Keys of folded texts, the first row of each kept."""
    from prefkit.dedupe import exact_groups

    keys = _keys(settings)
    places = np.arange(keys.height)
    return _write_kept(exact_groups(keys, places) == places, settings)


def exact_reversals(settings: Settings) -> Figures:
    """From the keys on: which pairs stand both ways; how many of those that are not copies."""
    from prefkit.dedupe import CONTRADICTION, Rules, exact_groups, judge

    keys = _keys(settings)
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    places = np.arange(keys.height)
    stands = exact_groups(keys, places)
    prompts = exact_groups(keys.select(pair="key_prompt"), places, exact=False)
    nothing = {"agreement": pl.lit(None, pl.Float64), "margin": pl.lit(None, pl.Float64), "held_out": pl.lit(False)}
    whole = keys.with_columns(pair="key_chosen", prompt="key_prompt", key_setting=pl.lit(0, pl.UInt64), **nothing)
    rules, old = Rules(contradictions="drop_both", cycles="keep"), np.zeros(keys.height, np.bool_)
    reason = judge(whole, places, stands, prompts, None, rules, old).reason
    both_ways = int(((reason == CONTRADICTION) & (stands == places)).sum())
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {"kept": both_ways, "wall": wall, "cpu": _cpu_of(now) - _cpu_of(used)}


def exact_hashes(settings: Settings) -> Figures:
    """Polars: two hashes a row, unique of them; copies byte by byte only."""
    sides = ("prompt", "chosen", "rejected")
    hashes = [pl.struct(sides).hash(seed).alias(f"h{seed}") for seed in (1, 2)]
    keys = pl.scan_parquet(settings["source"]).select(hashes).collect(engine="streaming")
    return _write_kept(keys.select(pl.struct("h1", "h2").is_first_distinct()).to_series(), settings)


def exact_unique(settings: Settings) -> Figures:
    """Polars: unique over the strings, streaming."""
    rows = pl.scan_parquet(settings["source"]).unique(
        ["prompt", "chosen", "rejected"], keep="first", maintain_order=True
    )
    _write(rows, settings)
    return {"kept": pq.ParquetFile(settings["out"]).metadata.num_rows}


def exact_duckdb(settings: Settings) -> Figures:
    """Duckdb: QUALIFY row_number, at most 8 GB."""
    import duckdb

    limits = {"memory_limit": "8GB", "threads": settings["threads"], "temp_directory": settings["scratch"]}
    duckdb.connect(config=limits).execute(
        f"""COPY (SELECT prompt, chosen, rejected FROM (SELECT *, file_row_number FROM
                  read_parquet('{settings["source"]}', file_row_number=true))
                  QUALIFY row_number() OVER (PARTITION BY prompt, chosen, rejected ORDER BY file_row_number) = 1)
            TO '{settings["out"]}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 3)"""
    )
    return {"kept": pq.ParquetFile(settings["out"]).metadata.num_rows}


def exact_loop(settings: Settings) -> Figures:
    """A Python set of blake2b digests over folded texts, a row at a time."""
    import hashlib
    import unicodedata

    seen: set[bytes] = set()
    kept = 0
    writer = None
    for frame in _blocks(settings["source"]):
        mask = []
        for row in frame.iter_rows():
            text = "\x1f".join(" ".join(unicodedata.normalize("NFC", side).split()) for side in row)
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            mask.append(digest not in seen)
            seen.add(digest)
        table = frame.filter(pl.Series(mask)).to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(settings["out"], table.schema, compression="zstd", compression_level=3)
        writer.write_table(table)
        kept += table.num_rows
    assert writer is not None
    writer.close()
    return {"kept": kept}


EXACT_JOBS: dict[str, Callable[[Settings], Figures]] = {
    "floor": exact_floor,
    "ours, exact": exact_ours,
    "ours, reversals alone": exact_reversals,
    "ours, keys alone": exact_keys,
    "polars hashes": exact_hashes,
    "polars unique": exact_unique,
    "duckdb qualify": exact_duckdb,
    "blake2b set": exact_loop,
}

OURS_EXACT = ("ours, exact", "ours, reversals alone", "ours, keys alone")


# -- one measurement


def work(job: str, settings: Settings) -> None:
    """Do a job in this process: a line of JSON."""
    if settings["threads"] == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for name in settings["imports"]:
        importlib.import_module(name)
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if job in CONTESTANTS:
        found = CONTESTANTS[job].run(settings)
    else:
        figures = EXACT_JOBS[job](settings)
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    if job in CONTESTANTS:
        left, right = found.pairs or (np.zeros(0), np.zeros(0))
        np.savez(settings["result"], removed=found.removed, left=left, right=right)
        figures = {"told_pairs": found.pairs is not None}
    print(json.dumps({"wall": wall, "cpu": _cpu_of(now) - _cpu_of(used)} | figures))


def _cpu_of(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


def measure(job: str, settings: Settings, python: str = sys.executable) -> Figures:
    """Run a job in a fresh process, watched."""
    threads = str(settings["threads"])
    names = ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, threads if job in EXACT_JOBS else "1")
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": settings["scratch"], "TMPDIR": settings["scratch"]}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [python, __file__, "--job", job, json.dumps(settings)]
    shutil.rmtree(settings["scratch"], ignore_errors=True)
    Path(settings["scratch"]).mkdir(parents=True)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True)  # noqa: S603
        watch = Watch(process.pid)
        watch.start()
        told, _ = process.communicate()
        watch.stop()
        if process.returncode:
            said.seek(0)
            sys.exit(f"{job}: exit status {process.returncode}\n{said.read()[-2000:]}")
    shutil.rmtree(settings["scratch"])
    figures = json.loads(told.splitlines()[-1])
    figures["cpu"] += watch.cpu_of_workers
    return figures | {"anon": watch.anon, "anon_of_a_worker": watch.anon_of_a_worker}


def measure_near(job: str, files: list[Path], rows: int, options: argparse.Namespace, processes: int = 1) -> Figures:
    """One contestant on some files; with `removed` and `pairs`."""
    home = options.folder / "work"
    settings = {
        "files": [str(path) for path in files],
        "rows": rows,
        "scratch": str(home),
        "result": str(options.folder / "result.npz"),
        "processes": processes,
        "threads": processes,
        "imports": CONTESTANTS[job].imports,
    }
    figures = measure(job, settings, sys.executable if job in OURS else options.peers)
    with np.load(settings["result"]) as found:
        pairs = (found["left"], found["right"]) if figures["told_pairs"] else None
        return figures | {"removed": found["removed"], "pairs": pairs}


def versions_of(python: str, packages: set[str]) -> dict[str, str | None]:
    """The versions of packages under an interpreter, None where one is not installed."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({name: have.get(name) for name in sys.argv[1:]}))"
    )
    command = [python, "-c", code, *sorted(packages)]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout  # noqa: S603 - the code above
    return dict(json.loads(told))


# -- what is printed

Verdicts = list[tuple[str, bool]]


def median(runs: Sequence[Figures], key: str) -> float:
    """Of the rounds."""
    return float(np.median([run[key] for run in runs]))


def ratio(runs: Sequence[Figures], base: Sequence[Figures], key: str = "cpu") -> float:
    """The median of the ratios of the rounds."""
    return float(np.median([run[key] / other[key] for run, other in zip(runs, base, strict=True)]))


def near_row(name: str, runs: list[Figures], base: list[Figures], quality: Quality) -> str:
    """A row of a table of contestants."""
    wall, cpu, anon = (median(runs, key) for key in ("wall", "cpu", "anon"))
    pairs = "" if quality.pair_recall is None else f"{quality.pair_recall:.4f}"
    times = f"{wall:.2f} | {cpu:.2f} | {cpu / len(runs[0]['removed']) * 1e6:.1f} | {ratio(runs, base):.1f}"
    return f"| {name} | {times} | {anon / 1e6:,.0f} | {quality.precision:.4f} | {quality.recall:.4f} | {pairs} |"


def contest(names: Sequence[str], files: list[Path], options: argparse.Namespace) -> tuple[Any, dict[str, Quality]]:
    """Contestants in turns on some files, and a table; their runs and their quality."""
    truth = duplicates.known_edges(files)
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, figures in runs.items():
            figures.append(measure_near(name, files, rows, options))
    quality = {name: duplicates.quality_of(runs[name][0]["removed"], runs[name][0]["pairs"], truth) for name in names}
    gone = int(duplicates.removed_by(truth, rows).sum())
    print(f"\n{rows:,} texts, {len(truth.left):,} pairs of J >= {THRESHOLD}, of which {gone:,} rows go\n")
    print("| | wall s | CPU s | us a row | x ours, CPU | anon MB | precision | removal recall | pair recall |")
    print("|---" * 9 + "|")
    for name in names:
        print(near_row(name, runs[name], runs[names[0]], quality[name]), flush=True)
    alone = measure_near(GRAMS, files, rows, options)["cpu"] / rows * 1e6
    print(f"\nof which, for datasketch and rensa, the 5-grams as strings: {alone:.1f} us a row")
    return runs, quality


def near(options: argparse.Namespace, here: Sequence[str]) -> Verdicts:
    """The contest at every size; what is required is required at the largest."""
    for rows in sorted(options.rows):
        names = ["ours", *(name for name in here if name not in (GRAMS, *OURS) and CONTESTANTS[name].most >= rows)]
        runs, quality = contest(names, duplicates.write_texts(options.folder, rows), options)
    mine = runs["ours"]
    found = [
        (f"precision {quality['ours'].precision:.4f} ({PRECISION})", quality["ours"].precision == PRECISION),
        (f"removal recall {quality['ours'].recall:.4f} (at least {RECALL})", quality["ours"].recall >= RECALL),
    ]
    if BULK in runs:
        times = ratio(runs[BULK], mine)
        found.append((f"{times:.1f}x {BULK} (at least {BESIDE_DATASKETCH:g})", times >= BESIDE_DATASKETCH))
    others = {name: ratio(runs[name], mine) for name in OTHERS if name in runs and quality[name].recall >= FOUND}
    if others:
        fastest = min(others, key=lambda name: others[name])
        text = f"{others[fastest]:.1f}x {fastest}, the fastest of those with a removal recall of {FOUND}"
        found.append((f"{text} (at least {BESIDE_FASTEST:g})", others[fastest] >= BESIDE_FASTEST))
    return found


def scale(options: argparse.Namespace, _here: Sequence[str]) -> Verdicts:
    """Ours in parts against the number of rows, and with two processes at the largest."""
    print("\n| rows | processes | wall s | CPU s | us a row | rows/s | anon MB of a worker | anon MB of all |")
    print("|---" * 8 + "|")
    cpu: dict[int, float] = {}
    for rows in sorted(options.scale):
        files = duplicates.write_texts(options.folder, rows)
        ways = {1: [], 2: []} if rows == max(options.scale) else {1: []}
        runs: dict[int, list[Figures]] = ways
        for _ in range(options.rounds):
            for processes, figures in runs.items():
                figures.append(measure_near("ours, in parts", files, rows, options, processes))
        for processes, figures in runs.items():
            wall, used, one, all_ = (median(figures, key) for key in ("wall", "cpu", "anon_of_a_worker", "anon"))
            times = f"{wall:.2f} | {used:.2f} | {used / rows * 1e6:.1f} | {rows / wall:,.0f}"
            print(f"| {rows:,} | {processes} | {times} | {one / 1e6:,.0f} | {all_ / 1e6:,.0f} |", flush=True)
        cpu[rows] = median(runs[1], "cpu")
    faster = ratio(runs[1], runs[2], "wall")
    worker = max(run["anon_of_a_worker"] for figures in runs.values() for run in figures)
    found = [
        (f"two processes {faster:.2f}x one, at {rows:,} rows (at least {TWO_PROCESSES})", faster >= TWO_PROCESSES),
        (f"anon of a worker {worker / 1e6:,.0f} MB (at most {ANON_A_WORKER / 1e6:.0f})", worker <= ANON_A_WORKER),
    ]
    if len(cpu) > 1:
        power = float(np.polyfit(np.log([*cpu]), np.log([*cpu.values()]), 1)[0])
        found.append((f"CPU time grows with the rows to the power of {power:.3f} ({EXPONENT})", power <= EXPONENT))
    return found


def unspaced(options: argparse.Namespace, here: Sequence[str]) -> Verdicts:
    """Half the rows Chinese, the smallest size."""
    names = ["ours", *(name for name in (BULK,) if name in here)]
    _, quality = contest(names, duplicates.write_texts(options.folder, min(options.rows), 0.5), options)
    mine = quality["ours"]
    holds = mine.precision == PRECISION and mine.recall >= RECALL
    return [(f"half Chinese: precision {mine.precision:.4f}, removal recall {mine.recall:.4f}", holds)]


def real_families() -> dict[str, list[str]]:
    """Texts with near-duplicates that nobody planted."""
    sides = [side for pair in duplicates.hh_transcripts() for side in pair]
    turn = "\n\nHuman:"
    prompts = [side.rsplit("\n\nAssistant:", 1)[0] for side in sides[::2]]
    turns = [
        turn.join(parts[:count])
        for text in prompts
        for parts in [text.split(turn)]
        for count in range(2, len(parts) + 1)
    ]
    return {
        "HH, both transcripts": sides,
        "HH, prompts of every turn": turns,
        "LLaMA-Factory, English": duplicates.demo_transcripts("en"),
        "LLaMA-Factory, Chinese": duplicates.demo_transcripts("zh"),
        "UKPConvArg, arguments": duplicates.ukp_arguments(),
    }


def real(options: argparse.Namespace, _here: Sequence[str]) -> Verdicts:
    """Recall on texts nobody planted copies in."""
    if not duplicates.DATA.exists():
        print("\nno test data (PREFKIT_TEST_DATA): real texts left out")
        return []
    print("\n| real texts | rows | pairs of J >= .8 | rows that go | precision | removal recall | pair recall |")
    print("|---" * 7 + "|")
    gone = wanted = both = 0
    for name, texts in real_families().items():
        series = pl.Series("text", texts)
        path = options.folder / "real.parquet"
        series.to_frame().write_parquet(path)
        truth = duplicates.exact_edges(series)
        run = measure_near("ours", [path], len(texts), options)
        removed, right = run["removed"], duplicates.removed_by(truth, len(texts))
        quality = duplicates.quality_of(removed, run["pairs"], truth)
        cells = f"{len(texts):,} | {len(truth.left):,} | {right.sum():,} | {quality.precision:.4f}"
        print(f"| {name} | {cells} | {quality.recall:.4f} | {quality.pair_recall:.4f} |", flush=True)
        gone, wanted, both = gone + removed.sum(), wanted + right.sum(), both + (removed & right).sum()
    text = f"real texts: precision {both / max(1, gone):.4f}, removal recall {both / max(1, wanted):.4f}"
    return [(text, bool(both == gone and both >= RECALL * wanted))]


def exact(options: argparse.Namespace, _here: Sequence[str]) -> Verdicts:
    """Parquet in, Parquet out, in turns with the floor; what is required is required at the largest."""
    found: Verdicts = []
    anon: dict[int, float] = {}
    for rows in sorted(options.exact):
        source, planted = duplicates.write_pairs(options.folder, rows)
        runs: dict[str, list[Figures]] = {name: [] for name in EXACT_JOBS if options.keys or name not in OURS_EXACT}
        for turn in range(options.rounds):
            for name, figures in runs.items():
                if turn == 0 or name in ("floor", *OURS_EXACT):
                    figures.append(measure(name, exact_settings(source, options)))
        print(f"\n{rows:,} pairs, {source.stat().st_size / 1e6:,.0f} MB, {options.threads} thread(s)\n")
        print(
            "| | wall s | CPU s | us a row, CPU | x floor wall | x floor CPU | anon MB | rows kept |\n"
            + "|---" * 8
            + "|"
        )
        for name, figures in runs.items():
            base = runs["floor"][: len(figures)]
            times = [f"{median(figures, 'wall'):.1f}", f"{median(figures, 'cpu'):.1f}"]
            times += [f"{median(figures, 'cpu') / rows * 1e6:.1f}"]
            times += [f"{ratio(figures, base, key):.2f}" for key in ("wall", "cpu")]
            kept = f"{figures[0]['kept']:,}" if "kept" in figures[0] else ""
            print(f"| {name} | {' | '.join(times)} | {median(figures, 'anon') / 1e6:,.0f} | {kept} |", flush=True)
        anon[rows] = median(runs[OURS_EXACT[0]], "anon") if options.keys else 0
    for name, most, wanted in (
        (OURS_EXACT[0], EXACT, planted.unique),
        (OURS_EXACT[1], REVERSALS, 2 * planted.reversed),
    ):
        if name in runs:
            times = [ratio(runs[name], runs["floor"], key) for key in ("wall", "cpu")]
            text = f"{name}: {times[0]:.2f} of the floor by the clock, {times[1]:.2f} by CPU time (at most {most})"
            kept = runs[name][0]["kept"]
            found += [(text, max(times) <= most), (f"{name}: {kept:,} of {wanted:,} rows", kept == wanted)]
    if options.keys and len(anon) > 1:
        (few, less), *_, (many, more) = sorted(anon.items())
        most = GROWTH * less + BYTES_A_ROW * (many - few)
        found.append((f"anon {less / 1e6:,.0f} -> {more / 1e6:,.0f} MB (at most {most / 1e6:,.0f})", more <= most))
    return found


def exact_settings(source: Path, options: argparse.Namespace) -> Settings:
    """What a job of `exact` is told."""
    out, scratch = options.folder / "exact.out.parquet", options.folder / "work"
    imports = ["prefkit.keys", "prefkit.dedupe"] if options.keys else []
    found = {"source": str(source), "out": str(out), "scratch": str(scratch)}
    return found | {"threads": options.threads, "imports": imports}


PARTS = {"near": near, "scale": scale, "unspaced": unspaced, "real": real, "exact": exact}


def available(options: argparse.Namespace) -> list[str]:
    """The contestants whose packages are there; says which are not, and the versions."""
    versions = versions_of(options.peers, {name for one in CONTESTANTS.values() for name in one.packages})
    lacking = [name for name, version in versions.items() if version is None]
    told = [f"{name} {version}" for name, version in sorted(versions.items()) if version]
    told += [f"{name} {importlib.metadata.version(name)}" for name in ("polars", "pyarrow", "numpy", "duckdb")]
    print(f"Python {platform.python_version()}, {', '.join(told)}, load {os.getloadavg()[0]:.1f}")
    if lacking:
        print(f"not installed under --peers, left out: {', '.join(lacking)}")
    here = [name for name, one in CONTESTANTS.items() if all(versions[package] for package in one.packages)]
    options.keys = importlib.util.find_spec("prefkit.keys") is not None
    if not options.keys:
        print("prefkit.keys is not there: exact duplicates without ours")
    return here


def main() -> None:
    """Measure and print tables and verdicts."""
    if sys.argv[1:2] == ["--job"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="of near; unspaced: the least")
    parser.add_argument("--scale", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows of scale")
    parser.add_argument("--exact", type=int, nargs="+", default=[1_000_000, 4_000_000], help="rows of exact")
    parser.add_argument("--threads", type=int, default=1, help="of exact")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    here = available(options)
    verdicts = [verdict for part in options.parts for verdict in PARTS[part](options, here)]
    print()
    for text, holds in verdicts:
        print(f"{'PASS' if holds else 'FAIL'} {text}")
    sys.exit(0 if all(holds for _, holds in verdicts) else 1)


if __name__ == "__main__":
    main()
