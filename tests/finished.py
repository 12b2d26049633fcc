"""What the steps behind the torch line leave in a dataset, written by hand: references and tables with planted rows."""

from pathlib import Path
from typing import Any

import polars as pl

from prefkit.format import Kind, reference_key, schema
from prefkit.store import read_json, write_json
from prefkit.tables import Part, write_parquet, write_table


def with_nulls(table: str, rows: dict[str, list[Any]], kind: Kind = "chat") -> pl.DataFrame:
    """A frame of the table's schema; columns that are left out are null."""
    length = len(next(iter(rows.values())))
    columns = schema(table, kind)
    return pl.DataFrame(
        {name: pl.Series(name, rows.get(name, [None] * length), dtype) for name, dtype in columns.items()}
    )


def add_reference(
    dataset: Path,
    rows: dict[str, list[Any]],
    kind: Kind = "chat",
    name: str = "model",
    dropped: dict[str, list[Any]] | None = None,
) -> str:
    """A finished reference with these rows, and the key that its identity gives it; `name` tells several apart."""
    identity: dict[str, Any] = {
        "weights_sha256": name,
        "config": {},
        "tokenizer_sha256": "t",
        "chat_template_sha256": None,
        "kind": kind,
        "max_length": 64,
        "truncation": {},
        "dtype": "float32",
    }
    key = reference_key(identity)
    folder = dataset / "reference" / key
    parts = write_table(folder, "reference", with_nulls("reference", rows, kind), kind)
    left_out = with_nulls("reference_dropped", dropped or {"pair_id": []}, kind)
    beside = write_parquet(folder / "dropped.parquet", left_out)
    recorded = {"key": key, "identity": identity, "provenance": {}, "counts": {}}
    listed = [part._asdict() for part in parts]
    write_json(folder / "reference.json", recorded | {"parts": listed, "dropped": beside._asdict()})
    return key


def add_audit(dataset: Path, tables: dict[str, pl.DataFrame]) -> None:
    """A finished audit that found nothing, with these tables."""
    parts = [write_parquet(dataset / "audit" / f"{name}.parquet", table)._asdict() for name, table in tables.items()]
    document: dict[str, Any] = {"verdict": "pass", "reason": "nothing is found", "strict": False, "boundaries": None}
    document |= dict.fromkeys(("pairs", "prompts"), 0)
    document |= {name: [] for name in ("findings", "allowed", "allow_unused", "probes", "cover")}
    named = ("tokens", "features", "lengths", "similarity", "sources", "limits", "settings")
    document |= {name: dict[str, Any]() for name in named}
    document["power"] = {"win_rate": 0.5, "one_sided_coverage": 0.5, "num_tests": 0, "enough": True}
    write_json(dataset / "audit" / "audit.json", document | {"parts": parts})


def add_table(dataset: Path, table: str, rows: dict[str, list[Any]], kind: Kind = "chat") -> None:
    """A table of the manifest, and its parts there."""
    parts: list[Part] = write_table(dataset / table, table, with_nulls(table, rows, kind), kind)
    manifest = read_json(dataset / "manifest.json")
    manifest["parts"][table] = [part._asdict() for part in parts]
    write_json(dataset / "manifest.json", manifest)
