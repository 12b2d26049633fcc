"""Files as they come in the wild: refused by name, or every row accounted for, and no good dataset suffers."""

import csv
import datetime as dt
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prefkit import rows, sources
from prefkit.build import Built, build_dataset
from prefkit.config import Pipeline
from prefkit.errors import SourceError
from prefkit.rows import Chunk, Position, read_chunks

PipelineOf = Callable[..., Pipeline]
ALL = {"max_reject_share": 1.0}  # any share of rejects: what becomes of a row is what is tested
HUGE = 50_000_000
TURN = [{"role": "assistant", "content": "c"}]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def last_json(self) -> Any:
        return json.loads(self.out.rstrip("\n").split("\n")[-1])  # U+2028 ends no line of JSON


def prefkit(folder: Path, *arguments: str, timeout: float = 120) -> Ended:
    """The real command in a process of its own; whatever it is fed, it never ends with a traceback."""
    command = [sys.executable, "-m", "prefkit", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, timeout=timeout, check=False)
    out, err = ended.stdout.decode(), ended.stderr.decode()
    assert "Traceback" not in out + err, err
    return Ended(ended.returncode, out, err)


def row(prompt: object = "p", chosen: object = "c", rejected: object = "r", **more: object) -> str:
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}, ensure_ascii=False)


def lines(*rows: str | bytes) -> bytes:
    return b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in rows)


def distinct(number: int) -> bytes:
    return lines(*(row(f"p{i}", f"good {i * i * 7919}", f"bad {i}") for i in range(number)))


def parquet(*rows: dict[str, Any], **columns: Any) -> bytes:
    """A Parquet file of rows, or of columns that are made of a prompt, a chosen and a rejected side where not given."""
    buffer = io.BytesIO()
    height = len(next(iter(columns.values()))) if columns else 0
    names = [name for name in ("prompt", "chosen", "rejected") if name not in columns]
    texts = {name: [f"{name} {i}" for i in range(height)] for name in names}
    pq.write_table(pa.table(texts | columns) if columns else pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def twice() -> bytes:
    """A Parquet file with two columns of one name."""
    buffer = io.BytesIO()
    names = ["prompt", "chosen", "chosen", "rejected"]
    pq.write_table(pa.table([["p"], ["c"], ["d"], ["r"]], names=names), buffer)
    return buffer.getvalue()


def table(built: Built | Path, name: str) -> pl.DataFrame:
    dataset = Path(built.dataset) if isinstance(built, Built) else built
    return pl.concat([pl.read_parquet(part, glob=False) for part in sorted((dataset / name).glob("part-*.parquet"))])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for what a stopped build keeps of the sources that it could read."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if ".drafts" not in path.parts}


def rejects_of(built: Built | Path) -> list[tuple[int, str | None, str]]:
    return table(built, "rejects").select("line", "field", "reason").rows()


def refused(pipeline: Pipeline) -> SourceError:
    """The error that stops the build; nothing that looks like a dataset is left behind."""
    with pytest.raises(SourceError) as stopped:
        build_dataset(pipeline)
    assert not (Path(pipeline.dataset) / "manifest.json").exists()
    return stopped.value


def refused_by_command(folder: Path) -> dict[str, str]:
    """The same through the command line, with the pipeline that was written to `folder`."""
    ended = prefkit(folder, "build", "pipeline.yaml", "--json")
    assert ended.code == 2
    (error,) = ended.last_json().values()
    assert ended.err.split("error: ", 1)[1].startswith(f"{error['where']}: {error['message']}")
    assert error["kind"] == "SourceError"
    assert not (folder / "dataset" / "manifest.json").exists()
    return dict(error)


# files that cannot be read at all


class Broken(NamedTuple):
    """A file that stops the build: its name and bytes, the place that is named (a pattern after the path), the words.

    `command`: it goes through the command line too.
    """

    name: str
    content: bytes
    place: str
    message: str
    form: str = "pairs"
    command: bool = False


GZ, ZST = gzip.compress(distinct(2000), mtime=0), zstandard.compress(distinct(2000))
PARQUET = parquet(*({"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(2000)))
TWO = f"[{row('a')},\n{row('b')}"
NO_ROW, NO_FILE = "holds no row", "cannot be read"
FAR_AWAY = pa.array([0, 2**60], pa.timestamp("ms"))

BROKEN = {
    "gz cut off": Broken("rows.jsonl.gz", GZ[: len(GZ) // 2], r":\d+", NO_FILE, command=True),
    "gz cut off in its header": Broken("rows.jsonl.gz", GZ[:5], ":1", NO_FILE),
    "gz cut off before its checksum": Broken("rows.jsonl.gz", GZ[:-4], ":2001", NO_FILE),
    "gz with a wrong checksum": Broken("rows.jsonl.gz", GZ[:-8] + b"\0\1\2\3" + GZ[-4:], ":2001", NO_FILE),
    "gz followed by rubbish": Broken("rows.jsonl.gz", GZ + b"rubbish", ":2001", NO_FILE),
    "zst cut off": Broken("rows.jsonl.zst", ZST[: len(ZST) // 2], r":\d+", NO_FILE),
    "zst cut off in its header": Broken("rows.jsonl.zst", ZST[:3], ":1", NO_FILE),
    "csv in a gz cut off": Broken("rows.csv.gz", gzip.compress(b"prompt,chosen,rejected\n" * 9)[:20], ":1", NO_FILE),
    "json in a zst cut off": Broken("rows.json.zst", zstandard.compress(f"{TWO}]".encode())[:-2], ":1", NO_FILE),
    "parquet in a gz cut off": Broken("rows.parquet.gz", gzip.compress(PARQUET)[:-30], ":1", NO_FILE),
    "no byte": Broken("rows.jsonl", b"", "", NO_ROW, command=True),
    "no byte of csv": Broken("rows.csv", b"", "", "empty"),
    "no byte of json": Broken("rows.json", b"", ":1", "no JSON"),
    "only a byte order mark": Broken("rows.jsonl", b"\xef\xbb\xbf", "", NO_ROW),
    "blank lines": Broken("rows.jsonl", b"\n \r\n\t\n\n", "", NO_ROW),
    "blank lines of csv": Broken("rows.csv", b"\n\n\r\n", "", ""),
    "blank lines of json": Broken("rows.json", b"\n\n", r":\d", "no JSON"),
    "a csv header alone": Broken("rows.csv", b"prompt,chosen,rejected\n", "", NO_ROW),
    "an empty list": Broken("rows.json", b" [ ] \n", "", NO_ROW),
    "a parquet of no rows": Broken("rows.parquet", parquet(prompt=pa.array([], pa.string())), "", NO_ROW),
    "utf-16 little": Broken("rows.jsonl", f"\ufeff{row()}\n".encode("utf-16-le"), ":1", "UTF-16"),
    "utf-16 big": Broken("rows.jsonl", f"\ufeff{row()}\n".encode("utf-16-be"), ":1", "UTF-16"),
    "utf-16 csv": Broken("rows.csv", "prompt,chosen,rejected\np,c,r\n".encode("utf-16"), ":1", "UTF-16", command=True),
    "utf-16 json": Broken("rows.json", f"[{row()}]".encode("utf-16"), ":1", "UTF-16"),
    "utf-16 in a gz": Broken("rows.jsonl.gz", gzip.compress(row().encode("utf-16")), ":1", "UTF-16"),
    "utf-16 in a zst": Broken("rows.jsonl.zst", zstandard.compress(row().encode("utf-16")), ":1", "UTF-16"),
    "json is one object": Broken("rows.json", row().encode(), "", "not a list", command=True),
    "json is one object in lines": Broken("rows.json", lines(row(), row()), ":2", "no JSON"),
    "json cut off between two": Broken("rows.json", f"{TWO},\n".encode(), r":[23]", "no JSON"),
    "json cut off inside one": Broken("rows.json", TWO[:-9].encode(), ":2", "no JSON"),
    "json with a missing comma": Broken("rows.json", f"[{row('a')}\n{row('b')}]".encode(), ":2", "no JSON"),
    "json with a comma too many": Broken("rows.json", f"{TWO},]".encode(), ":2", "no JSON"),
    "json with rubbish behind": Broken("rows.json", f"{TWO}]\n\noops".encode(), ":4", "no JSON", command=True),
    "json list behind a list": Broken("rows.json", b"[]\n[]", ":2", "no JSON"),
    "json in latin-1": Broken("rows.json", f"{TWO},\n{row('café')}]".encode("latin-1"), ":3", ""),
    "json nested without end": Broken("rows.json", b"[" * 100_000 + b"]" * 100_000, ":1", ""),
    "csv with a quote that never ends": Broken(
        "rows.csv", b'prompt,chosen,rejected\np,c,r\nq,"c,r\ns,c,r\n', ":[234]", NO_FILE, command=True
    ),
    "csv with text behind a quote": Broken("rows.csv", b'prompt,chosen,rejected\np,"c"x,r\n', ":[12]", NO_FILE),
    "csv with a column twice": Broken(
        "rows.csv", b"prompt,chosen,rejected,chosen\np,c,r,d\n", ":1", "column 'chosen' is there twice"
    ),
    "parquet cut off": Broken("rows.parquet", PARQUET[: len(PARQUET) // 2], ":1", NO_FILE, command=True),
    "parquet cut off in its middle": Broken("rows.parquet", PARQUET[:2000] + PARQUET[-4000:], r":\d+", NO_FILE),
    "parquet with a wrong magic": Broken("rows.parquet", b"PAR0" + PARQUET[4:-4] + b"PAR0", ":1", NO_FILE),
    "parquet that is json": Broken("rows.parquet", distinct(3), ":1", NO_FILE),
    "parquet with a column twice": Broken(
        "rows.parquet",
        twice(),
        ":1",
        "column 'chosen' is there twice",
        command=True,
    ),
    "rejects beyond the limit": Broken(
        "rows.jsonl", lines(row("a"), "oops"), "", "1 of 2 rows could not become a record: 1 not_json (whole line)"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_stops_the_build_by_name(name: str, tmp_path: Path, pipeline_of: PipelineOf) -> None:
    broken, path = BROKEN[name], tmp_path / BROKEN[name].name
    path.write_bytes(broken.content)
    for kind in ("text", None):  # left out: the first row is looked at before anything else
        error = refused(pipeline_of({"path": str(path), "format": broken.form}, kind=kind))
        assert re.fullmatch(re.escape(str(path)) + broken.place, error.where), error
        assert broken.message in error.message


@pytest.mark.parametrize("name", [name for name, broken in BROKEN.items() if broken.command])
def test_the_command_says_the_same_of_a_file_that_cannot_be_read(
    name: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    broken, path = BROKEN[name], tmp_path / BROKEN[name].name
    path.write_bytes(broken.content)
    pipeline_of({"path": str(path), "format": broken.form}, kind="text")
    error = refused_by_command(tmp_path)
    assert re.fullmatch(re.escape(str(path)) + broken.place, error["where"])
    assert broken.message in error["message"]


def test_utf16_is_asked_for_as_utf8(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row().encode("utf-16"))
    error = refused(pipeline_of({"path": str(path), "format": "pairs"}))
    assert "UTF-16" in error.message
    assert "UTF-8" in str(error)


# paths that name no file


@pytest.mark.parametrize("kind", ["text", None])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("missing*.jsonl", "no file matches"),
        ("folder.jsonl", "a directory, not a file"),
        ("dangling.jsonl", "no such file"),
        ("dangling*.jsonl", "no such file"),
        ("loop.jsonl", "no such file"),
        ("plain.jsonl/rows.jsonl", "no such file"),
        ("x" * 300 + ".jsonl", ""),
        ("unreadable.jsonl", ""),
    ],
    ids=lambda value: value[:30],
)
def test_a_path_that_names_no_readable_file_is_refused(
    name: str, message: str, kind: str | None, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    (tmp_path / "plain.jsonl").write_bytes(distinct(2))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "unreadable.jsonl").symlink_to("/proc/self/mem")  # opens, and the first read fails like a bad disk
    if name == "unreadable.jsonl" and not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    error = refused(pipeline_of({"path": str(tmp_path / name), "format": "pairs"}, kind=kind))
    assert error.where.startswith(str(tmp_path / name.partition("*")[0]))
    assert message in error.message


@pytest.mark.parametrize("name", ["missing.jsonl", "none*.jsonl", "folder.jsonl", "dangling.jsonl"])
def test_the_command_says_the_same_of_a_path_that_names_no_file(
    name: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    pipeline_of({"path": str(tmp_path / name), "format": "pairs"})
    assert refused_by_command(tmp_path)["where"] == str(tmp_path / name)


@pytest.mark.parametrize("target", ["a pipe", "/dev/null", "/dev/zero"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    target: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    path = tmp_path / "rows.jsonl"
    if target == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    pipeline_of({"path": str(path), "format": "pairs"}, kind="text")
    try:
        ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json", timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail("the command waits for ever")
    assert ended.code == 2
    assert ended.last_json()["error"]["where"] == str(path)
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_a_link_to_a_file_is_read_as_that_file(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    (tmp_path / "real.jsonl").write_bytes(lines(row("a"), row("b")))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    built = build_dataset(pipeline_of({"path": str(tmp_path / "link.jsonl"), "format": "pairs"}))
    assert table(built, "pairs")["source"].to_list() == [str(tmp_path / "link.jsonl")] * 2


def test_a_glob_with_one_file_that_cannot_be_read_names_that_file(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(row("a")))
    pipeline = pipeline_of({"path": str(tmp_path / "*.jsonl*"), "format": "pairs"}, validate=ALL)
    assert build_dataset(pipeline, check=True).counts["pairs"] == 1
    (tmp_path / "b.jsonl.gz").write_bytes(GZ[:-4])
    (tmp_path / "c.jsonl").write_bytes(lines(row("c")))
    assert refused(pipeline).where == f"{tmp_path / 'b.jsonl.gz'}:2001"
    assert refused_by_command(tmp_path)["where"] == f"{tmp_path / 'b.jsonl.gz'}:2001"


def test_a_glob_with_one_bad_line_names_its_file_in_the_rejects(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    for name, content in {"a": lines(row("a")), "b": lines(row("b"), "oops"), "c": lines(row("c"))}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    built = build_dataset(pipeline_of({"path": str(tmp_path / "?.jsonl"), "format": "pairs"}, validate=ALL))
    assert (built.counts["rows"], built.counts["pairs"], built.counts["rejects"]) == (4, 3, 1)
    found = table(built, "rejects").select("source", "line", "reason").rows()
    assert found == [(str(tmp_path / "b.jsonl"), 2, "not_json")]


def test_an_empty_file_among_others_of_a_glob_costs_nothing(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(lines(row("b")))
    pipeline = pipeline_of({"path": str(tmp_path / "?.jsonl"), "format": "pairs"})
    assert build_dataset(pipeline).counts["pairs"] == 1


# names


NAMES = [
    "with spaces .jsonl",
    'it\'s "quoted".jsonl',
    "[red]x[/red].jsonl",
    "[1].jsonl",
    "a*?.jsonl",
    "two\nlines.jsonl",
    "100%s %(x)d {0} $HOME.jsonl",
    "'; drop view pairs; --.jsonl",
    "back\\slash`tick`|pipe.jsonl",
    "\u202egnp.jsonl",
    "-rf.jsonl",
    "雪 \U0001f600.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_character_of_a_file_name_means_anything(name: str, tmp_path: Path, pipeline_of: PipelineOf) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lines(row("a"), "oops"))
    (tmp_path / "ab.jsonl").write_bytes(lines(row("never read")))
    built = build_dataset(pipeline_of({"path": str(path), "format": "pairs"}, validate=ALL))
    assert table(built, "pairs").select("prompt", "source").rows() == [("a", str(path))]
    assert table(built, "rejects").select("source", "line").rows() == [(str(path), 2)]
    manifest = json.loads((Path(built.dataset) / "manifest.json").read_bytes())
    assert [file["path"] for file in manifest["sources"]] == [str(path)]
    assert build_dataset(pipeline_of({"path": str(path), "format": "pairs"}, validate=ALL)).unchanged


def test_the_command_prints_a_file_name_as_it_is(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    name = 'it\'s "[red]x[/red]" 100%s.jsonl'
    pipeline_of({"path": name, "format": "pairs"})
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert (ended.code, ended.last_json()["error"]["where"]) == (2, name)
    assert ended.err.startswith(f"error: {name}: no ")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(lines(row("a")))
    assert prefkit(tmp_path, "build", "pipeline.yaml").out.startswith(f"reading {name}\n")
    asked = prefkit(tmp_path, "query", "dataset", "select source from pairs", "--format", "json")
    assert (asked.code, asked.last_json()) == (0, {"source": name})
    shown = prefkit(tmp_path, "info", "dataset")
    assert (shown.code, name in shown.out) == (0, True)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_name_that_is_no_utf8_is_refused(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/rows\xff.jsonl")).write_bytes(lines(row("a")))
    refused(pipeline_of({"path": str(tmp_path / "rows*.jsonl"), "format": "pairs"}, kind="text"))
    assert refused_by_command(tmp_path)["where"].startswith(str(tmp_path / "rows"))


# rows that are pairs, drops or rejects


class Damaged(NamedTuple):
    """A file that is read: the rows that become pairs, those that are dropped, and those that are rejects.

    `command`: it goes through the command line too.
    """

    name: str
    content: bytes
    pairs: list[int]
    rejects: list[tuple[int, str | None, str]] = []  # noqa: RUF012 - a NamedTuple has no other defaults
    dropped: list[tuple[int, str]] = []  # noqa: RUF012
    form: str = "pairs"
    kind: str = "text"
    columns: dict[str, str] = {}  # noqa: RUF012
    command: bool = False


MESSAGES = row([{"role": "user", "content": "m"}], TURN, [{"role": "assistant", "content": "r"}])
HALF = row("s", TURN, [{"role": "assistant", "content": "r"}])
TRANSCRIPT = row(None, "\n\nHuman: q\n\nAssistant: c", "\n\nHuman: q\n\nAssistant: r")
# of the wrong type for a text, in a chat dataset
NO_TEXTS: list[Any] = [5, True, None, 1.5, {}, {"role": "user", "content": "x"}, ["x"], [None], [[]], [{}]]
NO_TEXTS += [[{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": None}]]
NO_PARTS = [{"role": "user", "content": ["part"]}]
NO_TEXTS += [NO_PARTS, [*TURN, "x"]]
WRONG_TEXTS = [(name, {name: value}) for name in ("prompt", "chosen", "rejected") for value in NO_TEXTS]
NO_NAMES: list[Any] = [5, False, [], {}, ["m"]]
NO_ANNOTATORS: list[Any] = ["crowd", 5, ["human"], "Human", {}]
NO_NUMBERS: list[Any] = ["high", [1], {}, "1,5", "0x10", [None]]
NO_WEIGHTS: list[Any] = [0, -1, False, "0"]
WRONG_VALUES: list[tuple[str, Any, str]] = [
    *((name, value, "wrong_type") for name in ("chosen_model", "rejected_model") for value in NO_NAMES),
    *(("annotator", value, "wrong_type") for value in NO_ANNOTATORS),
    *((n, value, "not_a_number") for n in ("chosen_score", "rejected_score", "weight") for value in NO_NUMBERS),
    *(("weight", value, "out_of_range") for value in NO_WEIGHTS),
]
WRONG_CORRECTIONS: list[dict[str, Any]] = [
    {"prompt": 1},
    {"response": None},
    {"correction": []},
    {"model": 1},
    {"annotator": 1},
]
NOT_FINITE = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "9" * 400,
    "9" * 5000,
    '"nan"',
    '"inf"',
    '" -Infinity "',
]
NUMBERS = ["true", '"7.5"', '" 3 "', "0", "-0.0", "1e-400", "12345678901234567890", '"1e3"']
DEPTHS = [*range(50, 900, 50), *range(900, 1010), 2_000, 9_999, 100_000]


def scored(number: str) -> str:
    return (
        f'{{"prompt": "{number[:9].replace(chr(34), "")}", "chosen": "c", "rejected": "r", "chosen_score": {number}}}'
    )


def nested(depth: int, more: str = "") -> str:
    return f'{{"prompt": {"[" * depth}{"]" * depth}, "chosen": "c\\u0041", "rejected": "r"{more}}}'


DAMAGED = {
    "nul bytes": Damaged(
        "rows.jsonl",
        lines(row("a"), b'{"prompt": "p\0", "chosen": "c", "rejected": "r"}', b"\0\0\0", row("b")),
        [1, 4],
        [(2, None, "not_json"), (3, None, "not_json")],
    ),
    "escaped nul": Damaged(
        "rows.jsonl",
        lines(row("a"), row("p\0q"), row(chosen="\0"), row("b", chosen_model="m\0n"), row("c", junk="\0")),
        [1, 4, 5],
        dropped=[(2, "nul_byte"), (3, "nul_byte")],
        command=True,
    ),
    "lone surrogates": Damaged(
        "rows.jsonl",
        lines(
            row("a"),
            '{"prompt": "\\ud83d", "chosen": "c", "rejected": "r"}',
            '{"prompt": "\\ude00\\ud83d", "chosen": "c", "rejected": "r"}',
            '{"prompt": "\\ud83d\\ude00", "chosen": "c", "rejected": "r"}',
            '{"prompt": "b", "chosen": "c", "rejected": "r", "\\udfff": 1}',
            '{"prompt": "c", "chosen": "\\\\ud83d", "rejected": "r"}',
        ),
        [1, 4, 6],
        [(2, None, "lone_surrogate"), (3, None, "lone_surrogate"), (5, None, "lone_surrogate")],
        command=True,
    ),
    "surrogates written as bytes": Damaged(
        "rows.jsonl",
        lines(row("a"), b'{"prompt": "\xed\xa0\xbd", "chosen": "c", "rejected": "r"}'),
        [1],
        [(2, None, "not_utf8")],
    ),
    "characters that other tools end lines at": Damaged(
        "rows.jsonl",
        lines(row("a\u2028b\u2029c\x85d"), row("\u202eb\u0301\u200d\ufeff")),
        [1, 2],
    ),
    "latin-1": Damaged(
        "rows.jsonl",
        lines(row("a"), row("café").encode("latin-1"), row("b"), b"\xff\xfe\xfd"),
        [1, 3],
        [(2, None, "not_utf8"), (4, None, "not_utf8")],
        command=True,
    ),
    "crlf": Damaged("rows.jsonl", (row("a") + "\r\n\r\n" + row("b") + "\r\n" + row("c")).encode(), [1, 3, 4]),
    "a mark and crlf": Damaged("rows.jsonl", ("\ufeff" + row("a") + "\r\n" + row("b") + "\r\n").encode(), [1, 2]),
    "a mark in the middle": Damaged(
        "rows.jsonl", lines(row("a"), "\ufeff" + row("b"), row("c")), [1, 3], [(2, None, "not_json")]
    ),
    "wrong types of texts": Damaged(
        "rows.jsonl",
        lines(row("a"), *(json.dumps({**json.loads(row("x")), **wrong}) for _, wrong in WRONG_TEXTS), row("b")),
        [1, len(WRONG_TEXTS) + 2],
        [
            (number, field, "not_text_content" if wrong[field] == NO_PARTS else "wrong_type")
            for number, (field, wrong) in enumerate(WRONG_TEXTS, start=2)
        ],
        kind="chat",
        command=True,
    ),
    "wrong types of values": Damaged(
        "rows.jsonl",
        lines(row("a"), *(row("x", **{name: value}) for name, value, _ in WRONG_VALUES), row("b")),
        [1, len(WRONG_VALUES) + 2],
        [(number, field, reason) for number, (field, _, reason) in enumerate(WRONG_VALUES, start=2)],
    ),
    "wrong types of corrections": Damaged(
        "rows.jsonl",
        lines(
            *(
                json.dumps({"prompt": "p", "response": "r", "correction": "c", **wrong})
                for wrong in ({}, *WRONG_CORRECTIONS)
            ),
            '{"prompt": "p", "response": "r"}',
        ),
        [1],
        [
            (2, "prompt", "wrong_type"),
            (3, "response", "wrong_type"),
            (4, "correction", "messages_in_text_dataset"),
            (5, "model", "wrong_type"),
            (6, "annotator", "wrong_type"),
            (7, "correction", "missing_field"),
        ],
        form="corrections",
    ),
    "wrong types of transcripts": Damaged(
        "rows.jsonl",
        lines(
            TRANSCRIPT,
            row(None, 5, "\n\nHuman: q\n\nAssistant: r"),
            row(None, "\n\nHuman: q\n\nAssistant: r", None),
            row(None, "text", "\n\nHuman: q\n\nAssistant: r"),
            row(None, "\n\nHuman: q", "\n\nHuman: q\n\nAssistant: r"),
            row(None, "\n\nHuman: a\n\nAssistant: r", "\n\nHuman: b\n\nAssistant: r"),
        ),
        [1],
        [
            (2, "chosen", "wrong_type"),
            (3, "rejected", "wrong_type"),
            (4, "chosen", "not_a_transcript"),
            (5, "chosen", "no_assistant_turn"),
            (6, "rejected", "different_prompts"),
        ],
        form="hh",
        kind="chat",
    ),
    "wrong types of trl": Damaged(
        "rows.jsonl",
        lines(
            row("a", "x", "y"),
            row("p", 5, "y"),
            row("p", "x", {}),
            row(None, "one two", "one three"),
            row(None, "nothing", "shared"),
            row(None, [], []),
            row("p", [5], [5]),
        ),
        [1, 4],
        [
            (2, "chosen", "wrong_type"),
            (3, "rejected", "wrong_type"),
            (5, "prompt", "no_shared_prompt"),
            (6, "prompt", "no_shared_prompt"),
            (7, "prompt", "no_shared_prompt"),
        ],
        form="trl",
    ),
    "chat and text in a chat dataset": Damaged("rows.jsonl", lines(row("a"), MESSAGES, HALF), [1, 2, 3], kind="chat"),
    "chat and text in a text dataset": Damaged(
        "rows.jsonl",
        lines(row("a"), MESSAGES, HALF, row("b")),
        [1, 4],
        [(2, "prompt", "messages_in_text_dataset"), (3, "chosen", "messages_in_text_dataset")],
        command=True,
    ),
    "transcripts in a text dataset": Damaged(
        "rows.jsonl", lines(TRANSCRIPT), [], [(1, "prompt", "messages_in_text_dataset")], form="hh"
    ),
    "empty lists of messages": Damaged(
        "rows.jsonl",
        lines(row("a"), row([]), row("b", []), row("c", "c", [])),
        [1],
        dropped=[(2, "empty_prompt"), (3, "empty_chosen"), (4, "empty_rejected")],
        kind="chat",
    ),
    "a column that no row has": Damaged(
        "rows.jsonl",
        lines(row("a"), row("b")),
        [],
        [(1, "question", "missing_field"), (2, "question", "missing_field")],
        columns={"prompt": "question"},
    ),
    "an optional column that no row has": Damaged(
        "rows.jsonl", lines(row("a")), [], [(1, "who.name", "missing_field")], columns={"chosen_model": "who.name"}
    ),
    "a column that some rows lack": Damaged(
        "rows.jsonl",
        lines(row("a", rating=1), row("b"), row("c", rating=None), row("d", rating="")),
        [1, 3, 4],
        [(2, "rating", "missing_field")],
        columns={"chosen_score": "rating"},
        command=True,
    ),
    "nested columns that are something else": Damaged(
        "rows.jsonl",
        lines(*(row("x", turns=turns) for turns in (["a"], [], {}, "a", 5, None, {"0": "b"}))),
        [1, 7],
        [(number, "turns.0", "missing_field") for number in range(2, 7)],
        columns={"prompt": "turns.0"},
    ),
    "duplicate keys": Damaged(
        "rows.jsonl",
        lines(
            row("a"),
            '{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}',
            '{"prompt": "p", "prompt": "p", "chosen": "c", "rejected": "r"}',
            '{"prompt": "p", "chosen": "c", "rejected": "r", "extra": [{"x": {"k": 1, "k": 2}}]}',
            '{"prompt": "p", "\\u0070rompt": "q", "chosen": "c", "rejected": "r"}',
            '{"prompt": "p", "chosen": "c", "rejected": "r", "": 1, "": 2}',
            '{"prompt": "b", "chosen": "c", "rejected": "r", "extra": [{"k": 1}, {"k": 1}]}',
            row("c"),
        ),
        [1, 7, 8],
        [(number, None, "duplicate_key") for number in (2, 3, 4, 5, 6)],
        command=True,
    ),
    "duplicate keys of a message": Damaged(
        "rows.jsonl",
        lines(MESSAGES, MESSAGES.replace('"role": "user"', '"role": "user", "role": "system"')),
        [1],
        [(2, None, "duplicate_key")],
        kind="chat",
    ),
    "duplicate keys in a list": Damaged(
        "rows.json",
        f'[{row("a")},\n {{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}},\n{row("b")}, 7,'
        f' {{"prompt": "p", "chosen": "c", "rejected": "r", "x": {{"k": 1, "k": 1}}}}]'.encode(),
        [1, 3],
        [(2, None, "duplicate_key"), (4, None, "not_an_object"), (5, None, "duplicate_key")],
        command=True,
    ),
    "numbers that are not finite": Damaged(
        "rows.jsonl",
        lines(row("a"), *map(scored, NOT_FINITE), row("b")),
        [1, len(NOT_FINITE) + 2],
        [(number, "chosen_score", "not_finite") for number in range(2, len(NOT_FINITE) + 2)],
        command=True,
    ),
    "numbers that are not finite in a list": Damaged(
        "rows.json",
        f"[{row('a')}, {', '.join(map(scored, NOT_FINITE))}]".encode(),
        [1],
        [(number, "chosen_score", "not_finite") for number in range(2, len(NOT_FINITE) + 2)],
    ),
    "numbers of all kinds": Damaged("rows.jsonl", lines(*map(scored, NUMBERS)), [*range(1, len(NUMBERS) + 1)]),
    "a number of 5000 digits that nobody asked for": Damaged(
        "rows.jsonl", lines(row("a").replace("}", f', "id": {"7" * 5000}}}')), [1]
    ),
    "nested 100,000 deep": Damaged(
        "rows.jsonl",
        lines(row("a"), nested(100_000), "[" * 100_000, '{"x":' * 100_000 + "1" + "}" * 100_000, row("b")),
        [1, 5],
        [(number, None, "not_json") for number in (2, 3, 4)],
        command=True,
    ),
    "empty and unknown keys": Damaged(
        "rows.jsonl", lines('{"": 1, "prompt": "a", "chosen": "c", "rejected": "r", " ": {"": []}, "Prompt": 3}'), [1]
    ),
    "too few and too many cells of csv": Damaged(
        "rows.csv",
        b"prompt,chosen,rejected\na,c,r\n\nq\nq,c\nq,c,r,x\nb,c,r\n",
        [2, 7],
        [(4, None, "wrong_number_of_fields"), (5, None, "wrong_number_of_fields"), (6, None, "wrong_number_of_fields")],
        command=True,
    ),
    "latin-1 in csv": Damaged(
        "rows.csv",
        "prompt,chosen,rejected\na,c,r\ncafé,c,r\nb,c,r\n".encode("latin-1"),
        [2, 4],
        [(3, None, "not_utf8")],
    ),
    "nul bytes in csv": Damaged(
        "rows.csv", b"prompt,chosen,rejected\na,c,r\np\0,c,r\nb,c,r\n", [2, 4], dropped=[(3, "nul_byte")]
    ),
    "huge cells of csv": Damaged(
        "rows.csv",
        b"prompt,chosen,rejected\na,c,r\np," + b"x" * 3_000_000 + b",r\nb," + b"y" * 150_000 + b",r\n",
        [2, 4],
        dropped=[(3, "too_long")],
    ),
    "crlf, a mark and line ends in cells of csv": Damaged(
        "rows.csv",
        b'\xef\xbb\xbfprompt,chosen,rejected\r\na,"c\r\nd\r\r",r\r\nb,"","r"\r\n',
        [2],
        [],
        [(6, "empty_chosen")],
    ),
    "a nameless and an unknown column of csv": Damaged("rows.csv", b",prompt,chosen,rejected,Prompt\n0,a,c,r,x\n", [2]),
    "scores of csv": Damaged(
        "rows.csv",
        b"prompt,chosen,rejected,chosen_score\na,c,r,\nb,c,r, 7.5 \nc,c,r,nan\nd,c,r,-\n",
        [2, 3],
        [(4, "chosen_score", "not_finite"), (5, "chosen_score", "not_a_number")],
    ),
    "binary in parquet": Damaged(
        "rows.parquet", parquet(chosen=[b"c", b"\xff"]), [], [(1, "chosen", "wrong_type"), (2, "chosen", "wrong_type")]
    ),
    "dates in parquet": Damaged(
        "rows.parquet", parquet(prompt=[dt.date(2020, 1, 1)]), [], [(1, "prompt", "wrong_type")]
    ),
    "times in parquet": Damaged(
        "rows.parquet",
        parquet(rejected=[dt.datetime(2020, 1, 1, tzinfo=dt.UTC), None]),
        [],
        [(1, "rejected", "wrong_type"), (2, "rejected", "wrong_type")],
    ),
    "nanoseconds in parquet": Damaged(
        "rows.parquet", parquet(when=pa.array([1_600_000_000_123_456_789, 0], pa.timestamp("ns"))), [1, 2]
    ),
    "times beyond the calendar in parquet": Damaged("rows.parquet", parquet(when=FAR_AWAY), [1, 2], command=True),
    "a time zone that nobody knows in parquet": Damaged(
        "rows.parquet", parquet(when=pa.array([0, 1], pa.timestamp("us", tz="Nowhere/At_All"))), [1, 2]
    ),
    "decimals in parquet": Damaged(
        "rows.parquet",
        parquet(chosen=[Decimal("1.50"), None], chosen_score=[Decimal("1.50")] * 2),
        [],
        [(1, "chosen", "wrong_type"), (2, "chosen", "wrong_type")],
    ),
    "dates as scores in parquet": Damaged(
        "rows.parquet", parquet(chosen_score=[dt.date(2020, 1, 1)]), [], [(1, "chosen_score", "not_a_number")]
    ),
    "scores in parquet that are not finite": Damaged(
        "rows.parquet",
        parquet(chosen_score=[1.0, float("nan"), float("-inf"), None]),
        [1, 4],
        [(2, "chosen_score", "not_finite"), (3, "chosen_score", "not_finite")],
    ),
    "dictionaries in parquet": Damaged(
        "rows.parquet", parquet(chosen=pa.array(["c", "d", "c"]).dictionary_encode()), [1, 2, 3]
    ),
    "nulls everywhere in parquet": Damaged(
        "rows.parquet",
        parquet(
            prompt=["a", None, "c", "d", "e", "f", "g"],
            chosen=pa.array(
                [TURN, TURN, None, [], [None], [{"role": None, "content": "c"}], [{"role": "assistant"}]],
                pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            ),
        ),
        [1],
        [
            (2, "prompt", "wrong_type"),
            (3, "chosen", "wrong_type"),
            (5, "chosen", "wrong_type"),
            (6, "chosen", "wrong_type"),
            (7, "chosen", "wrong_type"),
        ],
        [(4, "empty_chosen")],
        kind="chat",
        command=True,
    ),
    "a column of nothing but null in parquet": Damaged(
        "rows.parquet", parquet(chosen=pa.nulls(2)), [], [(1, "chosen", "wrong_type"), (2, "chosen", "wrong_type")]
    ),
    "maps and structs in parquet": Damaged(
        "rows.parquet",
        parquet(
            prompt=pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
            extra=pa.array([{"a": [{"b": None}]}]),
        ),
        [],
        [(1, "prompt", "wrong_type")],
    ),
    "large strings and views in parquet": Damaged(
        "rows.parquet", parquet(prompt=pa.array(["a"], pa.large_string()), chosen=pa.array(["c"], pa.string())), [1]
    ),
}


def check_accounts(dataset: Path, counts: dict[str, int], damaged: Damaged) -> None:
    """Every row of a source of pairs or corrections is where it should be, and nowhere else."""
    assert sorted(table(dataset, "pairs")["source_row"].to_list()) == damaged.pairs
    assert rejects_of(dataset) == damaged.rejects
    assert sorted(table(dataset, "dropped").select("source_row", "reason").rows()) == damaged.dropped
    parts = [len(part) for part in (damaged.pairs, damaged.dropped, damaged.rejects)]
    assert [counts[name] for name in ("pairs", "dropped", "rejects")] == parts
    assert counts["rows"] == sum(parts)


@pytest.mark.parametrize("name", DAMAGED)
def test_every_row_of_a_damaged_file_is_a_pair_a_drop_or_a_reject(
    name: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    damaged = DAMAGED[name]
    path = tmp_path / damaged.name
    path.write_bytes(damaged.content)
    source = {"path": str(path), "format": damaged.form, "columns": damaged.columns}
    built = build_dataset(pipeline_of(source, kind=damaged.kind, validate=ALL, dedupe={"exact": True}))
    check_accounts(Path(built.dataset), built.counts, damaged)


@pytest.mark.parametrize("name", [name for name, damaged in DAMAGED.items() if damaged.command])
def test_the_command_accounts_for_every_row_of_a_damaged_file(
    name: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    damaged = DAMAGED[name]
    (tmp_path / damaged.name).write_bytes(damaged.content)
    source = {"path": damaged.name, "format": damaged.form, "columns": damaged.columns}
    pipeline_of(source, kind=damaged.kind, validate=ALL)
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert ended.code == 0, ended.err
    check_accounts(tmp_path / "dataset", ended.last_json()["counts"], damaged)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_raw_text_of_a_reject_is_the_row_as_it_was_written(
    name: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    raws = ['{"chosen":1, "a" :2,"chosen": "é" }', '{ "prompt": "\\ud83d",  "chosen": 1e400}', "[ 1,\t2 ]", "1.50"]
    text = "[" + " ,\n ".join(raws) + "]" if name.endswith(".json") else "\n".join(raws)
    (tmp_path / name).write_text(text, encoding="utf-8")
    built = build_dataset(pipeline_of({"path": str(tmp_path / name), "format": "pairs"}, validate=ALL))
    assert table(built, "rejects")["raw"].to_list() == raws
    assert rejects_of(built) == [
        (1, None, "duplicate_key"),
        (2, None, "lone_surrogate"),
        (3, None, "not_an_object"),
        (4, None, "not_an_object"),
    ]


@pytest.mark.parametrize("form", ["pairs", "trl"])
@pytest.mark.parametrize("suffix", ["", ', "x": "\\u0042"'])
def test_one_row_nested_to_any_depth_ends_no_build(
    form: str, suffix: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    deep = [("[" * depth, "]" * depth) for depth in DEPTHS]
    rows = [f'{{"prompt": null, "chosen": {a}{z}, "rejected": {a}{z}{suffix}}}' for a, z in deep]
    rows += [f'{{"prompt": "p", "chosen": "c", "rejected": "r", "n": {a}"\\u0043"{z}, "prompt": 1}}' for a, z in deep]
    (tmp_path / "rows.jsonl").write_bytes(lines(row("a"), *rows, row("b")))
    built = build_dataset(
        pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": form}, kind="text", validate=ALL)
    )
    assert table(built, "pairs")["prompt"].to_list() == ["a", "b"]
    assert table(built, "rejects")["line"].to_list() == [*range(2, len(rows) + 2)]
    assert set(table(built, "rejects")["reason"]) <= {"not_json", "duplicate_key", "wrong_type", "no_shared_prompt"}


def test_one_row_with_an_extra_field_nested_to_any_depth_ends_no_build(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    rows = [row(f"p{depth}", "cé\\").replace("}", f', "x": {"[" * depth}{"]" * depth}}}') for depth in DEPTHS]
    rows = [text.replace("é", "\\u00e9") for text in rows]
    (tmp_path / "rows.jsonl").write_bytes(lines(row("a"), *rows, row("b")))
    built = build_dataset(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "pairs"}, validate=ALL))
    assert built.counts["pairs"] + built.counts["rejects"] == built.counts["rows"] == len(rows) + 2
    assert {"a", "b", "p50"} <= set(table(built, "pairs")["prompt"])
    assert set(table(built, "rejects")["reason"]) <= {"not_json"}


# candidates


def test_every_candidate_of_a_damaged_file_is_used_unused_or_a_reject(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    rows = [
        '{"prompt": "k", "response": "a", "score": 1}',
        '{"prompt": "k", "response": "b", "score": "2"}',
        '{"prompt": "k", "response": "c", "score": NaN}',
        '{"prompt": "k", "response": "d", "score": null}',
        '{"prompt": "k", "response": "e", "score": ""}',
        '{"prompt": "k", "response": "f"}',
        '{"prompt": "k", "response": 7, "score": 1}',
        '{"prompt": "k", "response": "g", "score": 3, "score": 4}',
        '{"prompt": "k", "response": " ", "score": 3}',
        '{"prompt": "l", "responses": ["u", "v", null, "w"], "scores": [3, 1, 2, [5]]}',
        '{"prompt": "m", "responses": "abc", "scores": [1, 2, 3]}',
        '{"prompt": "m", "responses": ["a", "b"], "scores": [1]}',
        '{"prompt": "m", "responses": ["a", "b"], "scores": {"a": 1, "b": 2}}',
        '{"prompt": "m", "responses": ["a", "b"]}',
        '{"prompt": "m", "responses": [], "scores": []}',
        '{"prompt": "m", "responses": null, "scores": null}',
        '{"responses": ["a", "b"], "scores": [1, 2]}',
        '{"prompt": 5, "responses": ["a", "b"], "scores": [1, 2]}',
        '{"prompt": "n", "response": "alone", "score": 1}',
        "oops",
    ]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    pipeline_of({"path": "rows.jsonl", "format": "candidates"}, kind="text", validate=ALL)
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert ended.code == 0
    assert rejects_of(tmp_path / "dataset") == [
        (3, "score", "not_finite"),
        (4, "score", "not_a_number"),
        (5, "score", "not_a_number"),
        (6, "score", "missing_field"),
        (7, "response", "wrong_type"),
        (8, None, "duplicate_key"),
        (10, "response[2]", "wrong_type"),
        (10, "score[3]", "not_a_number"),
        (11, "responses", "not_a_list"),
        (12, "scores", "length_mismatch"),
        (13, "scores", "not_a_list"),
        (14, "scores", "missing_field"),
        (15, "responses", "no_responses"),
        (16, "responses", "not_a_list"),
        (17, "prompt", "missing_field"),
        (18, "prompt[0]", "wrong_type"),
        (18, "prompt[1]", "wrong_type"),
        (20, None, "not_json"),
    ]
    counts = ended.last_json()["counts"]
    # lines 1 to 9 are one each, line 10 is four, 11 to 17 are one each, 18 is two, 19 and 20 are one each
    assert counts["candidates"] == 9 + 4 + 7 + 2 + 2
    assert (counts["used"], counts["unused"], counts["candidate_rejects"]) == (4, 2, 18)
    assert (counts["prompts"], counts["prompts_with_pair"], counts["prompts_dropped"]) == (3, 2, 1)
    found = table(tmp_path / "dataset", "pairs").sort("prompt").select("prompt", "chosen", "rejected").rows()
    assert found == [("k", "b", "a"), ("l", "u", "v")]


def test_scores_so_large_that_sums_overflow_are_rejects_and_those_below_make_finite_pairs(
    tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    given = [("a", 1e30), ("a", 1e30), ("b", -1e30), ("c", 1.7e308), ("d", -1.01e30)]
    rows = [json.dumps({"prompt": "p", "response": text, "score": score}) for text, score in given]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    built = build_dataset(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "candidates"}, validate=ALL))
    assert table(built, "pairs").select("chosen_score", "rejected_score", "margin").rows() == [(1e30, -1e30, 2e30)]
    rejects = table(built, "rejects").select("line", "field", "reason").rows()
    assert rejects == [(4, "score", "out_of_range"), (5, "score", "out_of_range")]


@pytest.mark.parametrize("responses", ["5", "true", '"text"', "null", "{}", '{"a": 1}', "[]", "[[]]", "[null]", "1.5"])
def test_where_the_kind_is_left_out_a_first_row_of_any_shape_ends_no_build(
    responses: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    first = f'{{"prompt": "p", "responses": {responses}, "scores": {responses}}}'
    good = '{"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}'
    (tmp_path / "rows.jsonl").write_bytes(lines(first, good))
    built = build_dataset(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "candidates"}, validate=ALL))
    assert table(built, "rejects")["line"].to_list() == [1]
    assert table(built, "pairs")["source_row"].to_list() == [2]


@pytest.mark.parametrize("form", ["pairs", "corrections", "trl", "hh"])
def test_where_the_kind_is_left_out_and_no_row_is_readable_nothing_is_guessed_wrongly(
    form: str, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    junk = ["oops", "[]", "{}", '{"prompt": {}, "chosen": 5, "response": [1], "rejected": [[]], "correction": {}}']
    (tmp_path / "rows.jsonl").write_bytes(lines(*junk))
    built = build_dataset(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": form}, validate=ALL))
    assert (built.counts["rows"], built.counts["rejects"]) == (4, 4)
    assert table(built, "rejects")["line"].to_list() == [1, 2, 3, 4]


# very long lines


def long_lines(folder: Path, line: str) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines([row("a") + "\n", line + "\n", row("b") + "\n"])
    return path


def test_a_row_of_50_mb_is_dropped_for_its_length_and_its_neighbours_are_kept(
    tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    long_lines(tmp_path, row("long", "x" * HUGE))
    pipeline_of({"path": "rows.jsonl", "format": "pairs"})
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert ended.code == 0
    found = pl.scan_parquet(tmp_path / "dataset" / "dropped" / "part-00000.parquet", glob=False)
    lengths = found.select("source_row", "reason", pl.col("chosen").str.len_chars()).collect().rows()
    assert lengths == [(2, "too_long", HUGE)]
    assert table(tmp_path / "dataset", "pairs")["prompt"].to_list() == ["a", "b"]
    assert [ended.last_json()["counts"][name] for name in ("rows", "pairs", "dropped", "rejects")] == [3, 2, 1, 0]


def test_a_line_of_50_mb_that_is_no_json_is_a_reject_that_is_kept_whole(
    tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    path = long_lines(tmp_path, "x" * HUGE)
    built = build_dataset(pipeline_of({"path": str(path), "format": "pairs"}, validate=ALL))
    assert rejects_of(built) == [(2, None, "not_json")]
    assert table(built, "rejects")["raw"].str.len_bytes().to_list() == [HUGE]
    assert table(built, "pairs")["prompt"].to_list() == ["a", "b"]


def test_50_mb_in_a_field_that_nobody_asked_for_cost_the_row_nothing(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    path = long_lines(tmp_path, row("long", extra="x" * HUGE))
    built = build_dataset(pipeline_of({"path": str(path), "format": "pairs"}))
    assert table(built, "pairs")["prompt"].to_list() == ["a", "long", "b"]


@pytest.mark.parametrize(
    "line",
    ["x" * 1_000_000, json.dumps({"k" * 1_000_000: 1}), json.dumps({f"k{i}": "v" * 50 for i in range(20_000)})],
    ids=["no JSON", "a long key", "many keys"],
)
def test_a_message_about_a_long_line_is_short(line: str, tmp_path: Path, pipeline_of: PipelineOf) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(line))
    error = refused(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "pairs"}))
    assert "1 of 1 rows" in error.message
    assert len(str(error)) < 5000


# what reads a dataset of strange texts


def test_strange_texts_come_out_of_every_command_as_they_went_in(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    strange = 'a,"b"\n\t\x1b[31m\x07[red]x[/red] \u202e\u2028\x85\U0001f600 e\u0301 \\N \x7f'
    rows = [row("p", strange, "r", chosen_model="m\0n"), row("q\0", "c", "r")]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    pipeline_of({"path": "rows.jsonl", "format": "pairs"})
    assert prefkit(tmp_path, "build", "pipeline.yaml").code == 0
    ask = "select prompt, chosen, chosen_model from pairs union all select prompt, chosen, null from dropped"
    wanted: list[list[str | None]] = [["p", strange, "m\0n"], ["q\0", "c", None]]
    as_json = prefkit(tmp_path, "query", "dataset", ask, "--format", "json")
    assert [list(json.loads(line).values()) for line in as_json.out.rstrip("\n").split("\n")] == wanted
    as_csv = prefkit(tmp_path, "query", "dataset", ask, "--format", "csv")
    assert [*csv.reader(io.StringIO(as_csv.out, newline=""))][1:] == [
        [cell or "" for cell in cells] for cells in wanted
    ]
    as_table = prefkit(tmp_path, "query", "dataset", ask)
    assert [as_json.code, as_csv.code, as_table.code] == [0, 0, 0]
    assert not {"\0", "\x1b", "\x07", "\u202e"} & set(as_table.out)
    assert "[red]x[/red]" in as_table.out
    assert prefkit(tmp_path, "query", "dataset", "select * from dropped").code == 0
    assert prefkit(tmp_path, "audit", "dataset", "--json").code == 0
    assert prefkit(tmp_path, "info", "dataset", "--json").code == 0
    assert " (text) is up to date: 1 pairs" in prefkit(tmp_path, "build", "pipeline.yaml").out


def test_the_keys_of_a_hostile_row_cannot_write_to_the_terminal(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    keys = {"\x1b]0;title\x07": 1, "[red]": 2, "\u202e": 3, "\ud800": 4, "": [{"\x1b[2J": 5}]}
    (tmp_path / "rows.jsonl").write_bytes(lines(json.dumps(keys)))
    pipeline_of({"path": "rows.jsonl", "format": "pairs"}, kind="text")
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert ended.code == 2
    assert not {"\x1b", "\x07", "\u202e"} & set(ended.err)
    assert "1 lone_surrogate (whole line)" in ended.last_json()["error"]["message"]


# a file that changes while it is read


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(lines(row("new")))


def replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"p1", b"q1"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def write_over(path: Path) -> None:
    with path.open("rb+") as file:
        file.write(path.read_bytes().replace(b"p1", b"q1"))


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize("change", [append, replace, write_over, truncate, Path.unlink])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], None],
    suffix: str,
    tmp_path: Path,
    pipeline_of: PipelineOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes({".jsonl": distinct(2000), ".jsonl.gz": GZ, ".parquet": PARQUET}[suffix])
    os.utime(path, (1, 1))  # so that a clock of any grain shows a write

    def read_and_change(name: str, position: Position) -> Iterator[Chunk]:
        for number, found in enumerate(read_chunks(name, position)):
            if number == 1:
                change(path)
            yield found

    monkeypatch.setattr(rows, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(rows, "ROWS_PER_BATCH", 500)
    monkeypatch.setattr(sources, "read_chunks", read_and_change)
    error = refused(pipeline_of({"path": str(path), "format": "pairs"}, kind="text", validate=ALL))
    assert error.message == "changed while it was read"
    assert error.where == str(path)


def test_a_file_that_changes_between_its_hash_and_its_rows_is_refused(
    tmp_path: Path, pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(row("a")))
    os.utime(path, (1, 1))
    file_sha256 = sources.file_sha256

    def hash_and_change(name: str | Path) -> str:
        digest = file_sha256(name)
        if Path(name) == path:
            path.write_bytes(lines(row("b")))
        return digest

    monkeypatch.setattr(sources, "file_sha256", hash_and_change)
    error = refused(pipeline_of({"path": str(path), "format": "pairs"}, kind="text"))
    assert error.message == "changed while it was read"


# a good dataset whose source breaks


GOOD = {
    ".jsonl": distinct(20),
    ".jsonl.gz": gzip.compress(distinct(20), mtime=0),
    ".json": f"[{', '.join(row(f'p{i}') for i in range(20))}]".encode(),
    ".csv": b"prompt,chosen,rejected\n" + b"".join(b"p%d,c,r\n" % i for i in range(20)),
    ".parquet": PARQUET,
}


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", None),
        (".jsonl", b""),
        (".jsonl", b"\n \n"),
        (".jsonl", b"oops\n"),
        (".jsonl", row().encode("utf-16")),
        (".jsonl.gz", GZ[:-4]),
        (".json", f"[{row('a')}, {row('b')}".encode()),
        (".json", row().encode()),
        (".csv", b'prompt,chosen,rejected\na,c,r\nb,"c,r\n'),
        (".csv", b""),
        (".parquet", PARQUET[:-100]),
        (".parquet", b"PAR1"),
    ],
)
def test_a_good_dataset_stays_as_it_is_when_its_source_breaks(
    suffix: str, content: bytes | None, tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(GOOD[suffix])
    pipeline = pipeline_of({"path": str(path), "format": "pairs"})
    build_dataset(pipeline)
    before = contents(tmp_path / "dataset")
    assert "manifest.json" in before
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError):
        build_dataset(pipeline)
    assert contents(tmp_path / "dataset") == before


def test_the_command_leaves_a_good_dataset_as_it_is_when_its_source_breaks(
    tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(GZ)
    pipeline_of({"path": str(path), "format": "pairs"})
    assert prefkit(tmp_path, "build", "pipeline.yaml", "--json").code == 0
    before = contents(tmp_path / "dataset")
    path.write_bytes(GZ[:-4])
    ended = prefkit(tmp_path, "build", "pipeline.yaml", "--json")
    assert (ended.code, ended.last_json()["error"]["where"]) == (2, f"{path}:2001")
    assert contents(tmp_path / "dataset") == before


def test_a_dataset_of_two_sources_stays_when_the_second_breaks_and_comes_right_when_it_is_mended(
    tmp_path: Path, pipeline_of: PipelineOf
) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_bytes(lines(row("a")))
    other.write_bytes(lines(row("b")))
    pipeline = pipeline_of(*({"path": str(path), "format": "pairs"} for path in (one, other)))
    build_dataset(pipeline)
    before = contents(tmp_path / "dataset")
    one.write_bytes(lines(row("a"), row("c")))
    other.write_bytes(b"oops\n")
    with pytest.raises(SourceError):
        build_dataset(pipeline)
    assert contents(tmp_path / "dataset") == before
    other.write_bytes(lines(row("d")))
    build_dataset(pipeline)
    fresh = pipeline.model_copy(update={"dataset": str(tmp_path / "fresh")})
    build_dataset(fresh)
    assert contents(tmp_path / "dataset") == contents(tmp_path / "fresh")
    assert table(tmp_path / "dataset", "pairs")["prompt"].to_list() == ["a", "c", "d"]
    assert not list((tmp_path / "dataset").rglob(".drafts/*"))


@pytest.fixture
def stopped(tmp_path: Path, pipeline_of: PipelineOf) -> Callable[..., Pipeline]:
    """A build of two sources that stopped at the second, which is mended by now; of the first one row of two is bad."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_bytes(lines(row("a"), "oops"))
    other.write_bytes(b"")

    def make(share: float) -> Pipeline:
        named = ({"path": str(path), "format": "pairs"} for path in (one, other))
        return pipeline_of(*named, kind="text", validate={"max_reject_share": share})

    assert refused(make(0.5)).where == str(other)
    other.write_bytes(lines(row("b")))
    return make


def test_a_stricter_limit_on_rejects_holds_for_what_a_stopped_build_has_read(
    stopped: Callable[..., Pipeline], tmp_path: Path
) -> None:
    error = refused(stopped(0.1))
    assert error.where == str(tmp_path / "one.jsonl")
    assert "1 of 2 rows could not become a record" in error.message


@pytest.mark.parametrize("content", [b"", b"PAR1 rubbish", b"{", b"{}", b"[]"])
def test_what_a_stopped_build_left_is_read_anew_where_it_is_damaged(
    content: bytes, stopped: Callable[..., Pipeline], tmp_path: Path
) -> None:
    for path in (tmp_path / "dataset").rglob(".drafts/*/*"):
        path.write_bytes(content)
    built = build_dataset(stopped(0.5))
    assert table(built, "pairs")["prompt"].to_list() == ["a", "b"]
    assert (built.counts["rows"], built.counts["rejects"]) == (3, 1)


def test_a_file_in_another_encoding_is_answered_with_how_to_convert_it(tmp_path: Path, pipeline_of: PipelineOf) -> None:
    text = row("café").encode("latin-1")
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([text] * 3))
    error = refused(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "pairs"}))
    assert "3 not_utf8 (whole line)" in error.message
    assert error.hint == "save the file as UTF-8: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE, if it is Latin-1"
    (tmp_path / "rows.jsonl").write_bytes(row("a").encode("utf-32"))
    assert refused(pipeline_of({"path": str(tmp_path / "rows.jsonl"), "format": "pairs"})).message == "is UTF-32"
