"""Drafts of all sources, and the pairs that a dataset holds already, become the rows of its tables.

Comes in: drafts on disk (drafts.py). Goes out: verdicts, kept beside the drafts for the case that the build is stopped,
and then the rows of pairs, dropped and rejects, part by part. What is held is a part and some hundred bytes a pair.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from prefkit.comparing import Compared, Comparing, compare_pairs, told
from prefkit.config import Pipeline
from prefkit.dedupe import KEPT, Rules, Verdicts
from prefkit.drafts import PART_ROWS, Draft
from prefkit.errors import DatasetError, MachineError
from prefkit.format import Kind, canonical_json, schema
from prefkit.grams import Array
from prefkit.keys import narrow_pairs
from prefkit.minhash import Nearness
from prefkit.store import folder_beside, read_json, write_json
from prefkit.tables import compact, table_blocks

IDS, TEXTS = ("pair_id", "prompt_id"), ("prompt", "chosen", "rejected", "tools")
CLAIMS = ("annotator", "margin", "agreement")
BYTES_A_PAIR = 600  # what comparing holds for each pair at most, measured (benchmarks/build.py)
LUMP = 0.2  # ours: a prompt cluster with more of the pairs makes the split uneven


class Base(NamedTuple):
    """The dataset that sources are added to."""

    dataset: Path
    manifest: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Its pairs."""
        return sum(part["rows"] for part in self.manifest["parts"]["pairs"])

    def num_lost(self) -> int:
        """Its drops and rejects."""
        return sum(part["rows"] for table in ("dropped", "rejects") for part in self.manifest["parts"][table])

    def files(self) -> list[Path]:
        """The files of its pairs."""
        return [self.dataset / "pairs" / part["file"] for part in self.manifest["parts"]["pairs"] if part["rows"]]

    def is_plain(self) -> bool:
        """Whether its messages have no `extra` on disk; a table of no rows has its columns, too."""
        files = [self.dataset / "pairs" / part["file"] for part in self.manifest["parts"]["pairs"]]
        return not any("extra" in str(pq.read_schema(file).field("prompt").type) for file in files)

    def blocks(self, table: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """The rows of a table."""
        yield from table_blocks(self.dataset, table, self.manifest, columns, PART_ROWS)


class Gathered(NamedTuple):
    """All pairs of a build before their verdicts: those of the base first, then the drafts in order."""

    drafts: list[Draft]
    base: Base | None
    kind: Kind

    def files(self) -> list[Path]:
        """The files of all pairs."""
        return [*(self.base.files() if self.base else []), *(file for d in self.drafts for file in d.parts("pairs"))]

    def num_old(self) -> int:
        """How many pairs the base holds."""
        return self.base.rows if self.base else 0

    def rows(self) -> int:
        """How many there are."""
        return self.num_old() + sum(sum(draft.rows) for draft in self.drafts)

    def keys(self) -> pl.DataFrame:
        """What they are compared by."""
        frames = []
        if self.base is not None:
            frames += [
                narrow_pairs(block, self.kind).with_columns(held_out=block["split"] == "test")
                for block in self.base.blocks("pairs", (*IDS, *TEXTS, "split", *CLAIMS))
            ]
        frames += [pl.read_parquet(file, glob=False) for draft in self.drafts for file in draft.parts("keys")]
        return pl.concat(frames) if frames else _no_keys(self.kind)

    def pair_ids(self, rows: Array) -> pl.Series:
        """The pair_id of some of them (ascending)."""
        found, first = [pl.Series("pair_id", [], pl.String)], 0
        for file in self.files():
            ids = pl.read_parquet(file, columns=["pair_id"], glob=False).to_series()
            begin, end = np.searchsorted(rows, (first, first + len(ids)))
            found.append(ids.gather(rows[begin:end] - first))
            first += len(ids)
        return pl.concat(found)


def _no_keys(kind: Kind) -> pl.DataFrame:
    return narrow_pairs(pl.DataFrame(schema=schema("pairs", kind)), kind).with_columns(
        held_out=pl.lit(None, pl.Boolean)
    )


def how_to_compare(pipeline: Pipeline, scratch: Path | None, processes: int) -> Comparing:
    """The settings as the values that decide."""
    dedupe, near = pipeline.dedupe, pipeline.dedupe.near_duplicates
    rules = Rules(dedupe.exact, dedupe.contradictions, dedupe.cycles, pipeline.pairs.max_pairs_per_prompt)
    if near is None:
        return Comparing(None, None, rules, processes, scratch)
    prompts, sides = (
        Nearness(near.threshold, ngram, near.num_perm, near.weights) for ngram in (near.prompt_ngram, near.ngram)
    )
    return Comparing(prompts, sides, rules, processes, scratch)


def compared(gathered: Gathered, how: Comparing, keep_in: Path, memory_limit: int) -> Compared:
    """The verdicts on all pairs; those that a stopped build left of these very drafts, if it left them.

    Raises:
        MachineError: build.memory_limit is too small for so many pairs, or the disk is full.
    """
    folder = keep_in / f"verdicts-{_verdicts_key(gathered, how)}"
    if (kept := _read_verdicts(folder, gathered.rows())) is not None:
        return kept
    needed = gathered.rows() * BYTES_A_PAIR
    if needed > memory_limit:
        raise MachineError(
            f"{gathered.rows()} pairs cannot be compared within build.memory_limit",
            where="build.memory_limit",
            expected=f"at least {needed / 1e6:.0f}MB: {BYTES_A_PAIR} bytes a pair",
            hint=f"--set build.memory_limit={needed / 1e6 + 1:.0f}MB",
        )
    old = np.zeros(gathered.rows(), np.bool_)
    old[: gathered.num_old()] = True
    found = compare_pairs(gathered.files(), gathered.keys(), old, gathered.kind, how)
    with folder_beside(folder) as beside:
        columns = {name: pl.Series(values) for name, values in found.verdicts._asdict().items()}
        pl.DataFrame({**columns, "prompts": found.prompts, "asked": found.asked}).write_parquet(
            beside / "verdicts.parquet"
        )
        write_json(beside / "verdicts.json", {"rows": gathered.rows(), "crowded": found.crowded})
    return found


def _verdicts_key(gathered: Gathered, how: Comparing) -> str:
    """All that decides the verdicts, and not how they are come by."""
    base = gathered.base and gathered.base.manifest["parts"]["pairs"]
    drafts = [draft.folder.name for draft in gathered.drafts]
    said = [how.prompts and [*how.prompts], how.sides and [*how.sides], [*how.rules], base, drafts]
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()[:16]


def _read_verdicts(folder: Path, rows: int) -> Compared | None:
    try:
        facts = read_json(folder / "verdicts.json")
        if facts["rows"] != rows:
            return None
        found = pl.read_parquet(folder / "verdicts.parquet", glob=False)
    except (DatasetError, OSError, KeyError, pl.exceptions.PolarsError):
        return None
    columns = [found[name].to_numpy() for name in Verdicts._fields]
    return Compared(Verdicts(*columns), found["prompts"].to_numpy(), found["asked"].to_numpy(), facts["crowded"])


def assembled(gathered: Gathered, found: Compared) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of the tables in their order, each with the name of its table."""
    base, verdicts, num_clusters = gathered.base, found.verdicts, 0
    if base is not None:
        for table in ("pairs", "dropped", "rejects"):
            for block in base.blocks(table, _columns(base, table)):
                if table == "dropped" and block["cluster_id"].count():
                    num_clusters = max(num_clusters, 1 + int(block["cluster_id"].drop_nulls().to_numpy().max()))
                yield table, block
    named = np.unique(verdicts.other[verdicts.other >= 0])
    ids = gathered.pair_ids(named)

    def pair_ids(rows: Array) -> pl.Series:
        return ids.gather(np.searchsorted(named, rows))

    first = gathered.num_old()
    for draft in gathered.drafts:
        for file in draft.parts("rejects"):
            yield "rejects", pl.read_parquet(file, glob=False)
        for file in draft.parts("dropped"):
            yield "dropped", pl.read_parquet(file, glob=False)
        for file in draft.parts("pairs"):
            pairs = pl.read_parquet(file, glob=False)
            judged = pairs.hstack(told(verdicts, pair_ids, slice(first, first + pairs.height)))
            judged = judged.with_columns(pl.col("cluster_id") + num_clusters)
            first += pairs.height
            yield "pairs", judged.filter(pl.col("reason").is_null())
            yield "dropped", compact(judged.filter(pl.col("reason").is_not_null()))  # they wait for many others


def _columns(base: Base, table: str) -> list[str]:
    return [*schema(table, base.manifest["kind"])]


def prompt_report(found: Compared, how: Comparing, test_share: float, num_clusters: int) -> dict[str, Any]:
    """How the pairs lie in prompt clusters, and advice where one of them holds too many; empty without any pair."""
    kept = found.verdicts.reason == KEPT
    if not kept.any() or how.prompts is None:
        return {}
    sizes = np.bincount(found.prompts[kept])
    largest = int(sizes.argmax())
    share = int(sizes[largest]) / int(kept.sum())
    num_prompts = len(np.unique(found.asked[kept & (found.prompts == largest)]))
    advice = []
    if share > LUMP and num_prompts > 1:
        advice.append(
            f"{num_prompts} prompts that are nearly the same hold {share:.0%} of the pairs, so all of these are train "
            "or all are test. If they are different questions in one frame, set dedupe.near_duplicates.threshold "
            "higher, or dedupe.near_duplicates to null"
        )
    elif share > LUMP and len(sizes) > 1:
        advice.append(f"one prompt holds {share:.0%} of the pairs, so all of these are train or all are test")
    if test_share > 0 and not found.verdicts.test[kept].any():
        advice.append(
            f"no pair is held out: none of the {int((sizes > 0).sum())} clusters of prompts fell to test; a larger "
            "split.test_share or another split.seed holds some out"
        )
    if found.crowded:
        advice.append(
            "hundreds of texts are so alike that not all were compared with all: near-duplicates at the threshold may "
            "be left"
        )
    return {
        "num_prompt_clusters": int((sizes > 0).sum()),
        "largest_prompt_cluster": int(sizes[largest]),
        "num_near_duplicate_clusters": num_clusters,
        "advice": advice,
    }
