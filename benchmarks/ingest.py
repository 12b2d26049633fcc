"""What reading a file of pairs with every check costs beside a plain read and write of the same file.

    python benchmarks/ingest.py [--rows 1000000] [--rounds 3] [--folder /tmp] [--skip-peers]

Writes a file of JSON lines of 1.4 kB each, with 99 planted faults of 9 kinds, and the same file without them for the
floor, which stops at the first. Ours (what `read_source` gives, written block by block) and the floor (polars
scan_ndjson -> sink_parquet, zstd 3) run in turns, each in a process of its own, then the peers: json and pydantic line
by line, and `datasets` if it is there.
Prints wall and CPU time, their ratios, the largest anonymous memory, and whether the rejects are those of pydantic.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("not_json", "not_an_object", "not_utf8", "duplicate", "missing", "number", "null", "score", "annotator")
FAULTS_A_KIND = 11
LIMIT, MAX_ANON = 1.6, 400_000_000


def sentence(words: list[str], number: int, draw: random.Random) -> str:
    """That many words, by chance."""
    return " ".join(draw.choices(words, k=number))


def fields_of(words: list[str], number: int, draw: random.Random) -> dict[str, Any]:
    """One pair of some 1.4 kB."""
    return {
        "prompt": sentence(words, 50, draw) + " \u2013 \u00fc?",
        "chosen": sentence(words, 80, draw),
        "rejected": sentence(words, 80, draw),
        "chosen_score": round(draw.uniform(0, 10), 2),
        "rejected_score": round(draw.uniform(-10, 0), 2),
        "chosen_model": f"model-{number % 7}",
        "annotator": "human",
        "id": number,
    }


def faulty(kind: str, fields: dict[str, Any]) -> bytes:
    """A line with one fault."""
    line = json.dumps(fields, ensure_ascii=False)
    match kind:
        case "not_json":
            return line.encode()[:-20]
        case "not_an_object":
            return f"[{line}]".encode()
        case "not_utf8":
            return line.encode().replace("\u00fc".encode(), b"\xfc")
        case "duplicate":
            return (line[:-1] + ', "chosen": "another"}').encode()
        case "missing":
            del fields["rejected"]
        case "score":
            fields["chosen_score"] = "high"
        case "annotator":
            fields["annotator"] = "crowd"
        case _:
            fields["chosen"] = 5 if kind == "number" else None
    return json.dumps(fields, ensure_ascii=False).encode()


def write_files(folder: Path, num_rows: int) -> None:
    """The file with faults and the one without."""
    draw = random.Random(7)  # noqa: S311 - test data
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    places = draw.sample(range(1, num_rows), len(KINDS) * FAULTS_A_KIND)
    faults = {place: KINDS[number % len(KINDS)] for number, place in enumerate(places)}
    with (folder / "faults.jsonl").open("wb") as bad, (folder / "clean.jsonl").open("wb") as clean:
        for number in range(num_rows):
            fields = fields_of(words, number, draw)
            good = json.dumps(fields, ensure_ascii=False).encode()
            clean.write(good + b"\n")
            bad.write((faulty(faults[number], fields) if number in faults else good) + b"\n")


# what is measured, each in a process of its own


def ours(folder: Path) -> Any:
    """The package: every row checked, records and rejects written block by block."""
    import pyarrow.parquet as pq

    from prefkit.config import SourceConfig
    from prefkit.sources import read_source

    source = SourceConfig.model_validate({"path": str(folder / "faults.jsonl"), "format": "pairs"})
    (folder / "ours").mkdir(exist_ok=True)
    counts = dict.fromkeys(("records", "rejects"), 0)
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}
        for block in read_source(source, "text"):
            for name in counts:
                table = getattr(block, name).to_arrow()
                if name not in writers:
                    out = pq.ParquetWriter(
                        folder / "ours" / f"{name}.parquet", table.schema, compression="zstd", compression_level=3
                    )
                    writers[name] = stack.enter_context(out)
                writers[name].write_table(table)
                counts[name] += table.num_rows
    return [*counts.values()]


def floor(folder: Path) -> Any:
    """A plain read and write, without any check."""
    import polars as pl

    out = folder / "floor.parquet"
    pl.scan_ndjson(folder / "clean.jsonl").sink_parquet(out, compression="zstd", compression_level=3)
    return None


def by_pydantic(folder: Path) -> Any:
    """Json and pydantic, line by line, and the same writing."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pydantic import ValidationError

    from prefkit.records import Pair

    errors: list[tuple[int, str | None, str]] = []
    held: list[dict[str, Any]] = []
    schema = pa.Table.from_pylist([Pair(prompt="", chosen="", rejected="").model_dump()]).schema
    floats = {name: pa.float64() for name in ("chosen_score", "rejected_score", "weight")}
    schema = pa.schema([pa.field(field.name, floats.get(field.name, pa.string())) for field in schema])
    with pq.ParquetWriter(folder / "peer.parquet", schema, compression="zstd", compression_level=3) as out:
        for line, raw in enumerate((folder / "faults.jsonl").open("rb"), start=1):
            twice: list[str] = []

            def once(pairs: list[tuple[str, Any]], twice: list[str] = twice) -> dict[str, Any]:
                found = dict(pairs)
                twice += ["twice"] if len(found) != len(pairs) else []
                return found

            try:
                value = json.loads(raw.decode(), object_pairs_hook=once)
                if not isinstance(value, dict) or twice:
                    errors.append((line, None, "duplicate_key" if twice else "not_an_object"))
                    continue
                held.append(Pair.model_validate(value).model_dump())
            except UnicodeDecodeError:
                errors.append((line, None, "not_utf8"))
            except ValidationError as error:
                first = error.errors()[0]
                named = {"missing": "missing_field", "not_a_number": "not_a_number"}.get(first["type"], "wrong_type")
                errors.append((line, str(first["loc"][0]), named))
            except ValueError:
                errors.append((line, None, "not_json"))
            if len(held) == 20_000:
                out.write_table(pa.Table.from_pylist(held, schema=schema))
                held.clear()
        out.write_table(pa.Table.from_pylist(held, schema=schema))
    (folder / "peer.errors.json").write_text(json.dumps(errors))
    return len(errors)


def by_datasets(folder: Path) -> Any:
    """`load_dataset("json")` and to_parquet; it stops at a fault, so of the file without."""
    from datasets import load_dataset  # type: ignore[import-not-found]

    data = load_dataset("json", data_files=str(folder / "clean.jsonl"), split="train", cache_dir=str(folder / "cache"))
    data.to_parquet(str(folder / "datasets.parquet"))
    return None


WAYS: dict[str, Callable[[Path], Any]] = {
    "ours": ours,
    "floor": floor,
    "json + pydantic": by_pydantic,
    "datasets": by_datasets,
}


def watch_anon(largest: list[int], ended: threading.Event) -> None:
    """Keep the largest anonymous memory of this process, in bytes."""
    while not ended.wait(0.02):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        anon = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        largest[0] = max(largest[0], int(anon.split()[1]) * 1024)


def measure(way: str, folder: Path) -> None:
    """Run one way in this process and print its figures as JSON."""
    largest, ended = [0], threading.Event()
    watcher = threading.Thread(target=watch_anon, args=(largest, ended), daemon=True)
    watcher.start()
    for name in ("polars", "pyarrow.parquet", *(["prefkit.sources"] if way == "ours" else [])):
        importlib.import_module(name)
    began, used = time.perf_counter(), time.process_time()
    told = WAYS[way](folder)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    ended.set()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "anon": largest[0], "rss": rss, "told": told}))


def run(way: str, folder: Path) -> dict[str, Any]:
    """One way in a fresh process, on one thread."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    one = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS"), "1")
    ended = subprocess.run(  # noqa: S603 - this script
        command, capture_output=True, check=True, env=os.environ | one, text=True
    )
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def line_of(way: str, found: list[dict[str, Any]], num_rows: int, base: list[dict[str, Any]]) -> str:
    """A row of the table: medians, and the ratios to the floor of the same round."""

    def middle(name: str) -> float:
        return statistics.median(one[name] for one in found)

    def ratio(name: str) -> float:
        return statistics.median(one[name] / other[name] for one, other in zip(found, base, strict=False))

    micro = 1e6 / num_rows
    anon, rss = middle("anon") / 1e6, middle("rss") / 1e6
    times = f"{middle('wall') * micro:.1f} | {middle('cpu') * micro:.1f} | {ratio('wall'):.2f} | {ratio('cpu'):.2f}"
    return f"| {way} | {times} | {anon:.0f} | {rss:.0f} |"


def compare(folder: Path, num_rows: int, rounds: int, *, peers: bool) -> dict[str, list[dict[str, Any]]]:
    """The table for a file of so many rows."""
    write_files(folder, num_rows)
    size = (folder / "faults.jsonl").stat().st_size
    print(
        f"\n{num_rows} rows of {size / num_rows:.0f} bytes, {len(KINDS) * FAULTS_A_KIND} faults of {len(KINDS)} kinds\n"
    )
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "floor": []}
    for _ in range(rounds):
        for way, ones in found.items():
            ones.append(run(way, folder))
    if peers:
        found["json + pydantic"] = [run("json + pydantic", folder)]
        if importlib.util.find_spec("datasets"):
            found["datasets"] = [run("datasets", folder)]
    print("| | wall us/row | CPU us/row | wall ratio | CPU ratio | anon MB | RSS MB |\n|---|---|---|---|---|---|---|")
    for way, ones in found.items():
        print(line_of(way, ones, num_rows, found["floor"]))
    return found


def same_errors(folder: Path) -> bool:
    """Whether the rejects are line by line those of json and pydantic."""
    import polars as pl

    mine = pl.read_parquet(folder / "ours" / "rejects.parquet").select("line", "field", "reason").rows()
    return [list(error) for error in mine] == json.loads((folder / "peer.errors.json").read_text())


def main() -> None:
    """Print the tables and the verdict."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        small = compare(Path(name), options.rows // 4, 1, peers=False)
        large = compare(Path(name), options.rows, options.rounds, peers=not options.skip_peers)
        anon = [max(one["anon"] for one in found["ours"]) for found in (small, large)]
        ratios = [
            statistics.median(one[kind] / other[kind] for one, other in zip(large["ours"], large["floor"], strict=True))
            for kind in ("wall", "cpu")
        ]
        print(f"\nratio to the floor: wall {ratios[0]:.2f}, CPU {ratios[1]:.2f} (at most {LIMIT})")
        print(f"anon: {anon[0] / 1e6:.0f} MB for a quarter of the rows, {anon[1] / 1e6:.0f} MB for all")
        print(f"records, rejects: {large['ours'][0]['told']}")
        if not options.skip_peers:
            print(f"rejects as by json + pydantic: {'the same' if same_errors(Path(name)) else 'NOT THE SAME'}")
        missed = min(ratios) > LIMIT or anon[1] > min(MAX_ANON, anon[0] * 1.15)
        sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
