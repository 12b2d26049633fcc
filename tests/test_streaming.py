"""A build streams: its bytes depend on no size of anything, and what a stopped build had done is not done again."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from command import Prefkit
from dying import Killed

from prefkit import assembly, candidates, comparing, drafts, ingest, near, rows, tables
from prefkit.accounts import Account, Counts, OfSources
from prefkit.build import Built, Watch, build_dataset
from prefkit.build_settings import BuildConfig
from prefkit.config import Pipeline
from prefkit.errors import MachineError, SourceError
from prefkit.format import Kind, schema
from prefkit.rejecting import Rejected
from prefkit.sources import read_source
from prefkit.store import read_manifest
from prefkit.tables import TableWriter

Row = dict[str, Any]
WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]
Patch = pytest.MonkeyPatch
VOCABULARY = [f"w{number}" for number in range(40)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(built: Built) -> dict[str, Any]:
    """All that a build writes, but for what it was allowed to use."""
    found: dict[str, Any] = dict(contents(Path(built.dataset)))
    found["manifest.json"] = json.loads(found["manifest.json"])
    del found["manifest.json"]["pipeline"]["build"]
    return found


# a world with a bit of everything


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(length))


def some_rows(count: int, kind: Kind, seed: int) -> list[Row | str]:
    """Pairs under a few prompts: copies, near-copies, contradictions, empty sides, and lines that are no rows."""
    rng = random.Random(seed)
    prompts = [sentence(rng, 12) for _ in range(count // 4)]
    sides = [sentence(rng, 14) for _ in range(count // 3)]
    found: list[Row | str] = []
    for _ in range(count):
        chosen, rejected = rng.choice(sides), rng.choice(sides)
        row: Row = {"prompt": rng.choice(prompts), "chosen": chosen, "rejected": rejected}
        if kind == "chat" and rng.random() < 0.5:
            row["prompt"] = [{"role": "system", "content": "Be."}, {"role": "user", "content": row["prompt"]}]
        if kind == "chat" and isinstance(row["prompt"], list):
            row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        found.append(row)
        if isinstance(row["chosen"], str) and rng.random() < 0.3:
            found.append(row | {"chosen": f"{chosen} {rng.choice(VOCABULARY)}"})
        if rng.random() < 0.4:
            found.append(row if rng.random() < 0.5 else row | {"chosen": row["rejected"], "rejected": row["chosen"]})
        if rng.random() < 0.05:
            found.append(rng.choice(["oops", '{"prompt": 3}']))
    return found


def some_candidates(count: int, seed: int, *, together: bool) -> list[Row | str]:
    rng = random.Random(seed)
    found: list[Row | str] = []
    for number in range(count):
        prompt = f"{number} {sentence(rng, 10)}"
        found += [
            {"prompt": prompt, "response": sentence(rng, 10), "score": rng.choice([1, 2, 3])}
            for _ in range(rng.randint(1, 4))
        ]
        if rng.random() < 0.1:
            found.append({"prompt": prompt, "response": "?", "score": "none"})
    if not together:
        rng.shuffle(found)
    return found


@pytest.fixture
def world(write_jsonl: WriteJsonl, pipeline_of: PipelineOf, tmp_path: Path) -> Callable[..., Built]:
    """Build the same sources again, each time elsewhere."""
    numbers = iter(range(100))

    def build(kind: Kind, count: int = 60, **sections: Any) -> Built:
        sources = []
        for name, given, form in (
            ("pairs", some_rows(count, kind, 1), "pairs"),
            ("together", some_candidates(count // 3, 2, together=True), "candidates"),
            ("apart", some_candidates(count // 3, 3, together=False), "candidates"),
        ):
            sources.append({"path": str(write_jsonl(f"{name}.jsonl", given)), "format": form})
        pipeline = pipeline_of(
            *sources,
            kind=kind,
            dataset=str(tmp_path / f"dataset-{next(numbers)}"),
            validate={"max_reject_share": 0.5},
            split={"test_share": 0.3},
            **sections,
        )
        return build_dataset(pipeline)

    return build


SIZES: list[tuple[Any, str, int]] = [
    (drafts, "PART_ROWS", 7),
    (near, "BATCH_ROWS", 5),
    (near, "TEXTS", 3),
    (near, "COMPARED_BY_ONE", 4),
    (ingest, "ROWS_PER_BLOCK", 11),
    (rows, "CHUNK_BYTES", 2000),
    (candidates, "BATCH_ROWS", 9),
    (candidates, "PAIRS", 5),
]


def make_small(patch: Patch) -> None:
    for module, name, value in SIZES:
        patch.setattr(module, name, value)


def parts_of_drafts(patch: Patch) -> list[int]:
    """How many parts of pairs each draft has, as they are made."""
    found: list[int] = []
    drafted = drafts.draft_source

    def watching(*given: Any) -> drafts.Draft:
        draft = drafted(*given)
        found.append(len(draft.parts("pairs")))
        return draft

    patch.setattr(drafts, "draft_source", watching)
    return found


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_bytes_depend_on_no_size_of_blocks_and_parts(
    kind: Kind, world: Callable[..., Built], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 10)
    monkeypatch.setattr(tables, "ROWS_PER_PART", 35)
    whole = world(kind)
    assert {"near_duplicate", "duplicate", "contradiction"} <= set(whole.reasons)
    assert len(read_manifest(Path(whole.dataset))["parts"]["pairs"]) > 1
    with monkeypatch.context() as patch:
        make_small(patch)
        parts = parts_of_drafts(patch)
        assert results(world(kind)) == results(whole)
    assert min(parts) > 1
    with monkeypatch.context() as patch:  # candidates on disk, read twice; a part as soon as there is a kilobyte
        patch.setattr(BuildConfig, "num_bytes", lambda _: 20_000)
        patch.setattr(assembly, "BYTES_A_PAIR", 1)
        parts = parts_of_drafts(patch)
        assert results(world(kind)) == results(whole)
    assert max(parts) > 1


def test_bytes_depend_on_neither_memory_nor_processes(world: Callable[..., Built], monkeypatch: Patch) -> None:
    monkeypatch.setattr(comparing, "FEW", 0)
    built = [
        world("text", build=settings) for settings in ({"processes": 1}, {"memory_limit": "1MB"}, {"processes": 2})
    ]
    assert results(built[0]) == results(built[1]) == results(built[2])
    manifest = json.loads((Path(built[1].dataset) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["pipeline"]["build"]["memory_limit"] == "1MB"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_bytes_of_more_rows_depend_on_neither_sizes_memory_nor_processes(
    kind: Kind, world: Callable[..., Built], monkeypatch: Patch
) -> None:
    whole = world(kind, 3000)
    monkeypatch.setattr(comparing, "FEW", 0)
    assert results(world(kind, 3000, build={"processes": 2})) == results(whole)
    for module, name, value in SIZES:
        monkeypatch.setattr(module, name, value * 20)
    assert results(world(kind, 3000, build={"processes": 2, "memory_limit": "8MB"})) == results(whole)


def test_rejects_that_are_read_while_a_part_is_written_are_not_lost(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, monkeypatch: Patch
) -> None:
    """Candidates are read in one thread and decided in another."""
    before = threading.active_count()
    given = [
        row
        for number in range(60)
        for row in (
            {"prompt": f"k{number}", "responses": ["a", "b"], "scores": [1, 2]},
            {"prompt": f"k{number}", "response": "c", "score": "?"},
        )
    ]
    source = {"path": str(write_jsonl("rows.jsonl", given)), "format": "candidates"}
    make_small(monkeypatch)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(drafts, "PART_ROWS", 1)
    write = pq.write_table

    def slow(table: Any, path: Path, *given: Any, **options: Any) -> None:
        time.sleep(0.01 if path.name.startswith("rejects") else 0)
        write(table, path, *given, **options)

    def slow_too(*given: Any) -> Iterator[Any]:
        for block in read_source(*given):
            time.sleep(0.004)
            yield block

    monkeypatch.setattr(pq, "write_table", slow)
    monkeypatch.setattr(drafts, "read_source", slow_too)
    built = build_dataset(pipeline_of(source, validate={"max_reject_share": 0.6}))
    assert (built.counts["pairs"], built.counts["rejects"], built.counts["candidates"]) == (60, 60, 180)
    assert threading.active_count() <= before


# what a stopped build had done


def killed_in(patch: Patch, module: Any, name: str, build: Callable[[], Built]) -> None:
    """Build, and die where a function is called."""

    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    with patch.context() as inner:
        inner.setattr(module, name, dies)
        with pytest.raises(Killed):
            build()


@pytest.fixture
def stopped(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Callable[..., Pipeline]:
    """A pipeline of two sources and an evaluation file."""

    def make(**sections: Any) -> Pipeline:
        sources = [
            {"path": str(write_jsonl(f"{n}.jsonl", some_rows(20, "text", n))), "format": "pairs"} for n in (1, 2)
        ]
        evals = write_jsonl("evals.jsonl", [{"question": sentence(random.Random(9), 12)}])
        settings: dict[str, Any] = {"validate": {"max_reject_share": 0.5}, "decontaminate": {"against": [str(evals)]}}
        return pipeline_of(*sources, **settings | sections)

    return make


def watched_reads(patch: Patch) -> list[str]:
    found: list[str] = []

    def watching(source: Any, kind: Kind) -> Iterator[Any]:
        found.append(Path(source.path).name)
        yield from read_source(source, kind)

    patch.setattr(drafts, "read_source", watching)
    return found


def watched_comparisons(patch: Patch) -> list[int]:
    found: list[int] = []

    def watching(files: Sequence[Path], keys: pl.DataFrame, *given: Any) -> Any:
        found.append(keys.height)
        return comparing.compare_pairs(files, keys, *given)

    patch.setattr(assembly, "compare_pairs", watching)
    return found


def test_drafts_of_a_stopped_build_are_used_again(stopped: Callable[..., Pipeline], monkeypatch: Patch) -> None:
    pipeline = stopped()
    killed_in(monkeypatch, assembly, "compare_pairs", lambda: build_dataset(pipeline))
    reads, comparisons = watched_reads(monkeypatch), watched_comparisons(monkeypatch)
    built = build_dataset(pipeline)
    assert (reads, len(comparisons)) == ([], 1)
    assert not (Path(built.dataset) / ".drafts").exists()
    assert sorted(path.name for path in Path(built.dataset).iterdir()) == [
        ".lock",
        "README.md",
        "dropped",
        "manifest.json",
        "pairs",
        "rejects",
        "views.sql",
    ]


def test_verdicts_of_a_stopped_build_are_used_again(
    stopped: Callable[..., Pipeline], monkeypatch: Patch, tmp_path: Path
) -> None:
    pipeline = stopped()
    killed_in(monkeypatch, TableWriter, "add", lambda: build_dataset(pipeline))
    with monkeypatch.context() as patch:
        reads, comparisons = watched_reads(patch), watched_comparisons(patch)
        again = pipeline.model_copy(update={"build": BuildConfig(processes=1, memory_limit="2GB")})
        built = build_dataset(again)  # what a build may use does not decide verdicts
    assert (reads, comparisons) == ([], [])
    unbroken = build_dataset(pipeline.model_copy(update={"dataset": str(tmp_path / "unbroken")}))
    assert results(built) == results(unbroken)


@pytest.mark.parametrize(
    ("sections", "num_reads"),
    [
        ({"dedupe": {"near_duplicates": {"threshold": 0.7}}}, 0),
        ({"dedupe": {"near_duplicates": {"num_perm": 64}}}, 0),
        ({"dedupe": {"near_duplicates": {"ngram": 4}}}, 0),
        ({"dedupe": {"near_duplicates": None}}, 0),
        ({"dedupe": {"contradictions": "keep"}}, 0),
        ({"dedupe": {"cycles": "keep"}}, 0),
        ({"dedupe": {"exact": False}}, 0),
        ({"pairs": {"max_pairs_per_prompt": 2}}, 2),
        ({"pairs": {"length_cap": 0.5}}, 2),
        ({"split": {"seed": 7}}, 2),
        ({"split": {"test_share": 0.5}}, 2),
        ({"validate": {"max_reject_share": 0.5, "max_chars": 90}}, 2),
        ({"decontaminate": {"against": []}}, 2),
        ({"kind": "chat"}, 2),
    ],
)
def test_what_other_settings_decide_is_done_again(
    sections: Any, num_reads: int, stopped: Callable[..., Pipeline], monkeypatch: Patch, tmp_path: Path
) -> None:
    before = stopped()
    killed_in(monkeypatch, TableWriter, "add", lambda: build_dataset(before))
    pipeline = stopped(**sections)
    with monkeypatch.context() as patch:
        reads, comparisons = watched_reads(patch), watched_comparisons(patch)
        built = build_dataset(pipeline)
    assert (len(reads), len(comparisons)) == (num_reads, 1)
    unbroken = build_dataset(pipeline.model_copy(update={"dataset": str(tmp_path / "unbroken")}))
    assert results(built) == results(unbroken)


def test_a_changed_evaluation_file_or_source_is_read_again(
    stopped: Callable[..., Pipeline], monkeypatch: Patch, tmp_path: Path
) -> None:
    pipeline = stopped()
    killed_in(monkeypatch, TableWriter, "add", lambda: build_dataset(pipeline))
    reads, comparisons = watched_reads(monkeypatch), watched_comparisons(monkeypatch)
    source = tmp_path / "2.jsonl"
    source.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    killed_in(monkeypatch, TableWriter, "add", lambda: build_dataset(pipeline))
    assert (reads, len(comparisons)) == (["2.jsonl"], 1)
    evals = tmp_path / "evals.jsonl"
    evals.write_text(evals.read_text(encoding="utf-8") + '{"question": "w1 w2"}\n', encoding="utf-8")
    build_dataset(pipeline)
    assert (reads, len(comparisons)) == (["2.jsonl", "1.jsonl", "2.jsonl"], 2)


@pytest.mark.parametrize("harm", ["verdicts.json", "verdicts.parquet"])
def test_torn_verdicts_are_made_again(harm: str, stopped: Callable[..., Pipeline], monkeypatch: Patch) -> None:
    pipeline = stopped()
    killed_in(monkeypatch, TableWriter, "add", lambda: build_dataset(pipeline))
    (found,) = Path(pipeline.dataset).glob(f".drafts/verdicts-*/{harm}")
    found.write_text("{", encoding="utf-8")
    reads, comparisons = watched_reads(monkeypatch), watched_comparisons(monkeypatch)
    build_dataset(pipeline)
    assert (reads, len(comparisons)) == ([], 1)


@pytest.mark.parametrize("harm", ["draft.json", "pairs-00000.parquet"])
def test_torn_drafts_are_made_again(harm: str, stopped: Callable[..., Pipeline], monkeypatch: Patch) -> None:
    pipeline = stopped()
    killed_in(monkeypatch, assembly, "compare_pairs", lambda: build_dataset(pipeline))
    torn = sorted(Path(pipeline.dataset).glob(f".drafts/*/{harm}"))[0]
    torn.write_text("{", encoding="utf-8")
    reads = watched_reads(monkeypatch)
    build_dataset(pipeline)
    assert len(reads) == 1


# too little memory


def test_a_memory_limit_that_is_too_small_says_what_would_do(
    write_jsonl: WriteJsonl, prefkit: Prefkit, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assembly, "BYTES_A_PAIR", 400_000)
    path = write_jsonl("rows.jsonl", [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(5)])
    settings = {"dataset": "dataset", "sources": [{"path": path.name, "format": "pairs"}]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    small = ("--set", "build.memory_limit=1999KB")
    for more in ((), ("--check",)):
        ended = prefkit("build", "pipeline.yaml", *small, *more)
        assert ended.code == 3
        assert ended.err == (
            "error: build.memory_limit: 5 pairs cannot be compared within build.memory_limit\n"
            "  expected: at least 2MB: 400000 bytes a pair\n"
            "  next: --set build.memory_limit=3MB\n"
        )
    assert prefkit("build", "pipeline.yaml", *small, "--json").error() == {
        "kind": "MachineError",
        "message": "5 pairs cannot be compared within build.memory_limit",
        "where": "build.memory_limit",
        "expected": "at least 2MB: 400000 bytes a pair",
        "hint": "--set build.memory_limit=3MB",
    }
    assert prefkit("build", "pipeline.yaml", "--set", "build.memory_limit=3MB").code == 0


def test_the_bytes_that_are_asked_for_a_pair_are_those_of_the_settings() -> None:
    assert f"{assembly.BYTES_A_PAIR} bytes a pair" in str(BuildConfig.model_fields["memory_limit"].description)


# tables in parts


def frame(sizes: Sequence[int]) -> pl.DataFrame:
    """Rows of the rejects table, of so many bytes of text each."""
    rng = random.Random(0)
    texts = [f"{rng.getrandbits(4 * size):0{size}x}" if size else "" for size in sizes]
    return pl.DataFrame({"raw": texts, "line": range(len(sizes))}, schema_overrides={"line": pl.Int64})


def written_table(folder: Path, rows_: pl.DataFrame, cuts: Sequence[int]) -> list[tuple[str, int, str]]:
    with TableWriter(folder, "rejects", "text") as writer:
        for begin, end in zip((0, *cuts), (*cuts, rows_.height), strict=True):
            writer.add(rows_.slice(begin, end - begin))
    return [(part.file, part.rows, part.sha256) for part in writer.parts]


def groups(folder: Path) -> list[list[int]]:
    found = [pq.read_metadata(path) for path in sorted(folder.iterdir())]
    return [[one.row_group(number).num_rows for number in range(one.num_row_groups)] for one in found]


@pytest.mark.parametrize(
    ("sizes", "limits", "wanted"),
    [
        ([1] * 10, {"ROWS_PER_GROUP": 3}, [[3, 3, 3, 1]]),
        ([1] * 9, {"ROWS_PER_GROUP": 3}, [[3, 3, 3]]),
        ([1] * 10, {"ROWS_PER_GROUP": 3, "ROWS_PER_PART": 5}, [[3, 2], [3, 2]]),
        ([1] * 11, {"ROWS_PER_PART": 5}, [[5], [5], [1]]),
        ([4, 6, 5, 5, 10, 11, 1], {"GROUP_BYTES": 10}, [[2, 2, 1, 1, 1]]),
        ([0, 0, 30, 0, 9, 1], {"GROUP_BYTES": 10}, [[3, 3]]),
        ([4, 6, 5, 5, 10, 11, 1], {"GROUP_BYTES": 10, "ROWS_PER_GROUP": 1}, [[1] * 7]),
        ([4, 6, 5, 5, 10, 11, 1], {"GROUP_BYTES": 10, "PART_BYTES": 20}, [[2, 2], [1, 1], [1]]),
        ([1] * 4, {}, [[4]]),
        ([], {}, [[0]]),
    ],
)
def test_row_groups_end_where_they_should_whatever_the_pieces(
    sizes: list[int], limits: dict[str, int], wanted: list[list[int]], monkeypatch: Patch, tmp_path: Path
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(tables, name, value)
    rows_ = frame(sizes)
    found = []
    for number, cuts in enumerate(([], [*range(1, len(sizes))], [*range(2, len(sizes), 2)], [0, 0, len(sizes)])):
        folder = tmp_path / str(number)
        found.append(written_table(folder, rows_, cuts))
        assert [[rows for rows in part if rows] or [0] for part in groups(folder)] == wanted
        lines = pl.concat([pl.read_parquet(path) for path in sorted(folder.iterdir())])
        assert lines["raw"].to_list() == rows_["raw"].to_list()
        assert lines.schema == schema("rejects", "text")
    assert found[0] == found[1] == found[2] == found[3]
    assert [name for name, *_ in found[0]] == [f"part-{number:05d}.parquet" for number in range(len(wanted))]
    assert [rows for _, rows, _ in found[0]] == [sum(part) for part in wanted]


def test_the_bytes_of_a_table_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    """A column of several pages: a page must not end where a piece does."""
    rows_ = frame([400] * 6000)
    ways = [[], [*range(100, 6000, 100)], [1, 2, 3, 2500], [777, 1554, 5000]]
    parts = [written_table(tmp_path / str(number), rows_, cuts) for number, cuts in enumerate(ways)]
    assert all(part == parts[0] for part in parts)


def test_an_error_leaves_nothing_of_the_part_that_was_begun(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(tables, "ROWS_PER_PART", 4)

    def fails(count: int) -> None:
        with TableWriter(tmp_path / str(count), "rejects", "text") as writer:
            writer.add(frame([3] * count))
            raise SourceError("x")

    for count, left in ((1, 0), (3, 0), (4, 1), (7, 1)):
        with pytest.raises(SourceError):
            fails(count)
        folder = tmp_path / str(count)
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        assert names == [f"part-{number:05d}.parquet" for number in range(left)]


def test_a_table_that_cannot_be_finished_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: Patch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = TableWriter(tmp_path / "t", "rejects", "text")
    writer.add(frame([3]))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(MachineError, match="disk"), writer:
        pass
    assert list((tmp_path / "t").iterdir()) == []


def test_parts_of_an_earlier_table_go(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_PART", 2)
    written_table(tmp_path, frame([1] * 5), [])
    written_table(tmp_path, frame([1] * 2), [])
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]


# the account


def pairs_of(kind: Kind, **columns: list[Any]) -> pl.DataFrame:
    height = len(next(iter(columns.values())))
    given = pl.DataFrame(columns)
    return given.select(
        given[name].cast(dtype) if name in columns else pl.Series(name, [None] * height, dtype)
        for name, dtype in schema("dropped", kind).items()
    ).with_columns(pl.Series("split", columns.get("split", ["train"] * height)))


def test_an_account_adds_up_whatever_the_pieces() -> None:
    ids = [f"{number:016x}{'0' * 48}" for number in range(6)]
    pairs = pairs_of(
        "text",
        method=["paired", "best_of_n", "best_of_n", "correction"],
        prompt_id=[ids[0], ids[1], ids[1], ids[2]],
        split=["train", "test", "test", "train"],
        edit_distance=[None, None, None, 0.25],
        shared_prefix=[None, None, None, 0.5],
    )
    dropped = pairs_of(
        "text",
        method=["best_of_n", "best_of_n", "paired", "best_of_n"],
        prompt_id=[ids[1], ids[3], ids[0], ids[4]],
        reason=["duplicate", "tie", "duplicate", "tie"],
    )
    rejects = pl.DataFrame({"reason": ["not_json", "not_json", "tie"]})
    of = OfSources(5, 9, 1, 6, {"middle": 1, "tie": 1}, [3])
    found = []
    for size in (1, 2, 10):
        account = Account()
        for name, rows_ in (("pairs", pairs), ("dropped", dropped), ("rejects", rejects)):
            for begin in range(0, rows_.height, size):
                account.add(name, rows_.slice(begin, size))
        found.append((account.counts(of), dict(account.reasons), account.correction_report()))
    assert found[0] == found[1] == found[2]
    counts, reasons, report = found[0]
    assert counts == Counts(
        rows=5,
        pairs=4,
        dropped=4,
        rejects=3,
        candidates=9,
        candidate_rejects=1,
        used=6,
        unused=2,
        candidate_pairs=2,
        candidate_dropped=3,
        prompts=3,
        prompts_with_pair=1,
        prompts_dropped=2,
        train=2,
        test=2,
    )
    counts.check()
    assert reasons == {"duplicate": 2, "tie": 3, "not_json": 2}
    assert report["shared_prefix"]["median"] == 0.5


@pytest.mark.parametrize("name", ["rows", "used", "prompts_dropped", "test"])
def test_an_account_that_does_not_add_up_is_a_bug(name: str) -> None:
    counts = Counts(*[0] * len(Counts._fields))
    counts.check()
    with pytest.raises(AssertionError):
        counts._replace(**{name: 1}).check()


def test_prompts_of_candidates_that_nobody_accounts_for_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Account().counts(OfSources(0, 0, 0, 0, {}, [1]))
    assert Account().counts(OfSources(0, 0, 0, 0, {}, [])).prompts == 0
    assert Account().correction_report() == {}


# rejects


def rejects_of(*reasons: str, first: int = 1) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"source": "a.jsonl", "line": first + number, "field": None, "reason": reason, "raw": "?"}
            for number, reason in enumerate(reasons)
        ],
        schema=schema("rejects", "text"),
    )


def test_rejects_are_counted_whatever_the_pieces(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    source = pipeline_of({"path": str(write_jsonl("a.jsonl", ["x"])), "format": "pairs"}).sources[0]
    errors = []
    for size in (1, 3, 40):
        rejected = Rejected()
        rejected.add(rejects_of("empty"))
        rejected.forget()
        for begin in range(0, 12, size):
            rejected.add(rejects_of(*(["not_json"] * 12)[begin : begin + size], first=begin + 1))
        rejected.add(rejects_of())
        rejected.stop_at(source, 12, 0.5)
        with pytest.raises(SourceError) as stopped:
            rejected.stop_at(source, 11, 0.5)
        errors.append(str(stopped.value))
    assert errors[0] == errors[1] == errors[2]
    assert "12 of 23 rows could not become a record: 12 not_json (whole line)" in errors[0]
    assert "first lines: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10\n" in errors[0]
    assert "at most a share of 0.5 rejects (validate.max_reject_share)" in errors[0]


def test_only_some_rejects_are_held(write_jsonl: WriteJsonl) -> None:
    rejected = Rejected()
    for begin in range(0, 3000, 300):
        rejected.add(rejects_of(*["not_json"] * 300, first=begin + 1))
    assert (len(rejected.first), rejected.first[-1]["line"], rejected.reasons.total()) == (1000, 1000, 3000)


def test_a_source_without_any_row_says_what_it_should_hold(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    source = pipeline_of({"path": str(write_jsonl("a.jsonl", [])), "format": "pairs"}).sources[0]
    with pytest.raises(SourceError) as stopped:
        Rejected().stop_at(source, 0, 1.0)
    assert (stopped.value.message, stopped.value.where) == ("holds no row", source.path)
    assert stopped.value.expected


# progress


class Told(Watch):
    """All that a build tells while it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Any] = []

    def stage(self, name: str) -> None:
        self.said.append(name)

    def look(self, done: int, total: float | None) -> None:
        self.said.append((done, total))

    def looks(self) -> dict[str, list[tuple[int, float | None]]]:
        found: dict[str, list[tuple[int, float | None]]] = {}
        for one in self.said:
            if isinstance(one, str):
                looks = found.setdefault(one, [])
            else:
                looks.append(one)
        return found


def test_a_build_tells_its_stages_and_how_far_each_is(
    write_jsonl: WriteJsonl, pipeline_of: PipelineOf, monkeypatch: Patch
) -> None:
    make_small(monkeypatch)
    sources = [
        {"path": str(write_jsonl("a.jsonl", some_rows(80, "text", 1))), "format": "pairs"},
        {"path": str(write_jsonl("b.jsonl", some_candidates(30, 2, together=True))), "format": "candidates"},
    ]
    pipeline = pipeline_of(*sources, validate={"max_reject_share": 0.5})
    watch = Told()
    built = build_dataset(pipeline, watch=watch)
    reading = [f"reading {source['path']}" for source in sources]
    stages = list(watch.looks())
    assert stages == [*reading, "comparing pairs", "comparing prompts", "writing the tables"]
    assert set(built.seconds) == {"reading", "comparing", "writing"}
    assert all(seconds >= 0 for seconds in built.seconds.values())
    for stage, looks in watch.looks().items():
        assert looks, stage
        done = [one for one, _ in looks]
        assert all(total is not None and total >= done for done, total in looks), stage
        if stage.startswith("comparing"):
            continue  # sides may be compared several times
        assert done == sorted(done)
        assert looks[-1][1] == pytest.approx(done[-1])
    rows_written = sum(built.counts[name] for name in ("pairs", "dropped", "rejects"))
    assert watch.looks()["writing the tables"][-1] == (rows_written, rows_written)
    assert build_dataset(pipeline, watch=Told()).seconds == {}


def test_an_addition_tells_how_far_it_is_with_what_was_there(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> None:
    sources = [{"path": str(write_jsonl(f"{n}.jsonl", some_rows(40, "text", n))), "format": "pairs"} for n in (1, 2)]
    build_dataset(pipeline_of(sources[0], validate={"max_reject_share": 0.5}))
    watch = Told()
    built = build_dataset(pipeline_of(*sources, validate={"max_reject_share": 0.5}), watch=watch)
    looks = watch.looks()
    assert next(iter(looks)) == f"reading {sources[1]['path']}"
    rows_written = sum(built.counts[name] for name in ("pairs", "dropped", "rejects"))
    assert {total for _, total in looks["writing the tables"]} == {rows_written}
    assert looks["writing the tables"][-1][0] == rows_written


def test_a_log_says_the_stage_and_rows_a_second(
    write_jsonl: WriteJsonl, prefkit: Prefkit, monkeypatch: Patch, tmp_path: Path
) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr("prefkit.terminal.time.monotonic", lambda: float(next(clock)) * 20)
    make_small(monkeypatch)
    write_jsonl("rows.jsonl", some_rows(80, "text", 1))
    settings = {
        "dataset": "dataset",
        "sources": [{"path": "rows.jsonl", "format": "pairs"}],
        "validate": {"max_reject_share": 0.5},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ended = prefkit("build", "pipeline.yaml", "--json")
    assert ended.code == 0
    assert set(ended.last_json()["seconds"]) == {"reading", "comparing", "writing"}
    lines = ended.err.splitlines()
    assert any(line.startswith("reading rows.jsonl ") and line.endswith(" rows/s") for line in lines)
    assert any(line.startswith("writing the tables ") for line in lines)
    assert any("min left" in line for line in lines)
