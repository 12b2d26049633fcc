"""What it costs to verify a dataset when it is opened from Python: beside opening without, and beside reading it.

    python benchmarks/opening.py [--pairs 200000] [--rounds 3] [--out FILE]

Pairs of random words, some 1 kB each, built with near-matching off; a reference of random values, 150 tokens a pair.
Every time is the best of the rounds, in one process, files in the page cache. `first access`: `ds.pairs`, or
`ds.reference().table`, of a dataset that was just opened; `collect`: all of its columns into memory afterwards.
"""

import argparse
import functools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import prefkit
from prefkit.format import REFERENCE_DROPPED, REFERENCE_JSON, REFERENCES, Kind, reference_key
from prefkit.store import write_json
from prefkit.tables import write_parquet, write_table

WORDS = 4096
TOKENS = (90, 30, 30)  # prompt, chosen, rejected
KIND: Kind = "text"


def build(folder: Path, pairs: int) -> Path:
    """A dataset of so many pairs."""
    rng = random.Random(0)  # noqa: S311 - words, no secrets
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(WORDS)]
    source, file = folder / "pairs.jsonl", folder / "pipeline.yaml"
    with source.open("w") as lines:
        for number in range(pairs):
            prompt, chosen, rejected = (" ".join(rng.choices(words, k=k)) for k in TOKENS)
            lines.write(json.dumps({"prompt": f"{number} {prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    settings = {"dataset": str(folder / "dataset"), "kind": KIND, "sources": [{"path": str(source), "format": "pairs"}]}
    file.write_text(json.dumps(settings | {"dedupe": {"near_duplicates": None}}))
    prefkit.build_dataset(file)
    return folder / "dataset"


def add_reference(dataset: Path) -> None:
    """A reference that holds what a pass could have written."""
    ids = prefkit.open_dataset(dataset).pairs.select("pair_id").collect()
    rng, count = np.random.default_rng(0), ids.height
    columns: dict[str, Any] = {"pair_id": ids["pair_id"]}
    for side, length in zip(("prompt", "chosen", "rejected"), TOKENS, strict=True):
        columns[f"{side}_ids"] = rng.integers(0, 50_000, (count, length)).astype(np.int32)
        columns[f"num_{side}_tokens"] = np.full(count, length, np.int32)
        if side != "prompt":
            logps = -rng.exponential(2, (count, length)).astype(np.float32)
            columns[f"ref_{side}_token_logps"] = logps
            columns[f"ref_{side}_logps"] = logps.astype(np.float64).sum(1).astype(np.float32)
            columns[f"{side}_truncated"] = np.zeros(count, bool)
    lists = [pl.col(name).cast(pl.List(pl.Int32)) for name in columns if name.endswith("_ids")]
    lists += [pl.col(name).cast(pl.List(pl.Float32)) for name in columns if name.endswith("_token_logps")]
    identity = {
        "weights_sha256": "0" * 64,
        "config": {},
        "tokenizer_sha256": "0" * 64,
        "chat_template_sha256": None,
        "kind": KIND,
        "max_length": 512,
        "truncation": {},
        "dtype": "float32",
    }
    folder = dataset / REFERENCES / reference_key(identity)
    parts = write_table(folder, "reference", pl.DataFrame(columns).with_columns(lists), KIND)
    dropped = write_parquet(
        folder / REFERENCE_DROPPED, pl.DataFrame(schema={"pair_id": pl.String, "reason": pl.String})
    )
    told = {"key": folder.name, "identity": identity, "provenance": {}, "counts": {}, "dropped": dropped._asdict()}
    write_json(folder / REFERENCE_JSON, told | {"parts": [part._asdict() for part in parts]})


def best(rounds: int, call: Callable[[], Any]) -> float:
    """Seconds, of the fastest round."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def opened(dataset: Path, table: Callable[[prefkit.Dataset], pl.LazyFrame], *, verify: bool) -> pl.LazyFrame:
    """A table at its first access."""
    return table(prefkit.open_dataset(dataset, verify=verify))


def rows(dataset: Path, rounds: int) -> list[str]:
    """The lines of the table."""
    tables: dict[str, tuple[str, Callable[[prefkit.Dataset], pl.LazyFrame]]] = {
        "pairs": ("pairs/*.parquet", lambda ds: ds.pairs),
        "reference().table": ("reference/*/part-*.parquet", lambda ds: ds.reference().table),
    }
    lines = ["| table | MB on disk | first access, verified | not verified | collect |", "|---|---|---|---|---|"]
    for name, (pattern, table) in tables.items():
        size = sum(file.stat().st_size for file in dataset.glob(pattern)) / 1e6
        on, off = (best(rounds, functools.partial(opened, dataset, table, verify=verify)) for verify in (True, False))
        frame = opened(dataset, table, verify=False)
        lines.append(f"| `{name}` | {size:.0f} | {on:.2f} s | {off:.3f} s | {best(rounds, frame.collect):.2f} s |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = build(Path(scratch), asked.pairs)
        add_reference(dataset)
        lines = rows(dataset, asked.rounds)
    head = ["# Opening a dataset from Python", "", "`python benchmarks/opening.py`, one process, best of the rounds;"]
    head += [f"{asked.pairs:,} pairs of some 1 kB, and a reference of them of 150 tokens a pair.", ""]
    text = "\n".join([*head, *lines]) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
