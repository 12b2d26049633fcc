"""Rows that are checked many at once become the very records and rejects that they become one by one."""

import codecs
import datetime as dt
import gzip
import io
import json
import re
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefkit import ingest, rows
from prefkit.checked import RECORD_VALUES, check_row
from prefkit.config import SourceConfig
from prefkit.errors import SourceError
from prefkit.format import EXTRA_KEYS, Kind
from prefkit.formats import FORMATS, Format
from prefkit.ingest import Checked, Reading, check_chunks
from prefkit.plans import PLAIN, plan_of
from prefkit.records import MAX_SCORE, RECORDS
from prefkit.rows import Batch, Lines, RawRow, read_chunks
from prefkit.sources import format_of, load_source, read_source

PROPERTY = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


class Ways(dict[bool, Checked]):
    """A file read both ways: True fast, False row by row."""


def both_ways(path: Path, form: str, kind: Kind, **settings: Any) -> Ways:
    source = SourceConfig.model_validate({"path": str(path), "format": form, **settings})
    reading = Reading(format_of(source), source.columns, kind, source.annotator)
    found = Ways()
    for fast in (True, False):
        parts = [*check_chunks(str(path), read_chunks(str(path)), reading, fast=fast)]
        records, rejects = (pl.concat([getattr(part, name) for part in parts]) for name in ("records", "rejects"))
        found[fast] = Checked(records, rejects, sum(part.rows for part in parts))
    return found


def exact(frame: pl.DataFrame) -> list[tuple[Any, ...]]:
    """Rows as they are: floats by their digits, so that -0 is not 0 and NaN is NaN."""
    return [tuple(repr(value) if isinstance(value, float) else value for value in row) for row in frame.rows()]


def same(path: Path, form: str = "pairs", kind: Any = "text", **settings: Any) -> Checked:
    """Both ways give the same, value by value and in the same order."""
    found = both_ways(path, form, kind, **settings)
    assert found[True].records.schema == found[False].records.schema
    assert exact(found[True].records) == exact(found[False].records)
    assert exact(found[True].rejects) == exact(found[False].rejects)
    assert found[True].rows == found[False].rows
    return found[True]


def num_slow(monkeypatch: pytest.MonkeyPatch, path: Path, form: str = "pairs", kind: Any = "text", **more: Any) -> int:
    """How many rows went one by one."""
    passed = [0]

    def counted(*arguments: Any) -> None:
        passed[0] += 1
        check_row(*arguments)

    source = SourceConfig.model_validate({"path": str(path), "format": form, **more})
    reading = Reading(format_of(source), source.columns, kind, source.annotator)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "check_row", counted)
        for _ in check_chunks(str(path), read_chunks(str(path)), reading):
            pass
    return passed[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few lines, that teach little at a time, so that short files take every turn that long ones do."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 600)
    monkeypatch.setattr(rows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(ingest, "LEARN_FROM", 1)
    monkeypatch.setattr(ingest, "FEW", 0)
    monkeypatch.setattr(ingest, "ROWS_PER_BLOCK", 7)


# JSON lines: any text that may be a row


def quoted(text: str, *, escaped: bool) -> str:
    return json.dumps(text, ensure_ascii=escaped)


CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ODD = [
    "",
    " ",
    "\0",
    "\x1f",
    "\x7f",
    "\u2028",
    "\x85",
    "\U0001f600",
    "\ufeff",
    "Inf",
    ": NaN",
    "}\n{",
    '"',
    "\\",
    "\\ud83d",
]
STRINGS = st.one_of(CHARACTERS, st.sampled_from(["a", "b", *ODD]))
TEXTS = st.builds(quoted, STRINGS, escaped=st.booleans())
BAD_TEXTS = [
    '"\\ud83d"',
    '"\\ude00"',
    '"\\ud83d\\ude00"',
    '"\\\\ud83d\\ude00"',
    '"\\x"',
    '"\t"',
    '"\\u12"',
    '"\\ud83dx"',
]
NUMBERS = ["0", "-0", "-0.0", "1", "1.5", "-1e-400", "1e30", "1.0000000000000002e30", "1e31", "1e308", "1e309", "1E2"]
NUMBERS += ["9007199254740993", "9" * 19, "9" * 30, "9" * 400, "9" * 5000, "0.1", "0.30000000000000004", "5e-324"]
NUMBERS += ["NaN", "Infinity", "-Infinity", "-NaN", "Inf", "-Inf", "01", "1.", ".5", "+1", "1e", "0x1", "1_0", "-"]
NUMBERS += ["123456789012345678.5", "2.2250738585072011e-308", "true", "false", "null", "True", "nul"]
AS_TEXT = [
    "1",
    " 1 ",
    "1.5",
    "1_0",
    "",
    "nan",
    "inf",
    "-0",
    "1e400",
    "1e-400",
    "+1",
    ".5",
    "5.",
    "１",
    "1e31",
    "x",
    "0.1",
]
JUNK = ["{}", "[]", "[1]", "[null]", '{"a": 1, "a": 2}', '{"a": {"b": [{"c": 1, "c": 1}]}}', '{"a": {"b": [{"c": 1}]}}']
JUNK += [
    "[" * 30 + "]" * 30,
    '[{"x": 1}, {"x": 2}]',
    '[{"x": 1}, {"y": "z"}]',
    '{"": 0}',
    "[Inf]",
    '{"k": [-NaN]}',
    "[NaN]",
]
VALUES = st.one_of(TEXTS, st.sampled_from([*NUMBERS, *BAD_TEXTS, *JUNK]), st.floats().map(json.dumps))
SCORES = st.one_of(
    st.floats(-10, 10).map(json.dumps),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from([*NUMBERS, *map(json.dumps, AS_TEXT)]),
)
NAMES = st.one_of(st.sampled_from(['"m"', '""', "null"]), VALUES)


def written(fields: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"


@st.composite
def messages(draw: st.DrawFn) -> str:
    """A list of messages, with what else they may hold."""
    turns = []
    for _ in range(draw(st.integers(0, 3))):
        fields = [("role", draw(st.sampled_from(['"user"', '"assistant"']))), ("content", draw(TEXTS))]
        if draw(st.integers(0, 5)) == 0:
            more = st.sampled_from(["null", '""', "[]", '"x"', '[{"function": {"name": "f"}}]'])
            fields.append((draw(st.sampled_from([*EXTRA_KEYS, "extra", "weight", "role"])), draw(more)))
        if draw(st.integers(0, 11)) == 0:
            fields[draw(st.integers(0, len(fields) - 1))] = (fields[0][0], draw(VALUES))
        turns.append(written(fields))
    return "[" + ", ".join(turns) + "]"


OTHERS = ["other", "id", "meta", "answer.text", "who", "responses", "tools", "p\u0072ompt", ""]


@st.composite
def lines(draw: st.DrawFn, form: Format) -> bytes:
    """A line: mostly a row of the format, or one with a fault, or no row at all."""
    texts = messages() if draw(st.booleans()) else TEXTS
    fields = [(name, draw(SCORES if name == "score" else texts)) for name in PLAIN[form.name]]
    for name in draw(st.lists(st.sampled_from(form.columns), max_size=3)):
        values = SCORES if name in ("weight", "score") or name.endswith("_score") else NAMES
        fields.append((name, '"human"' if name == "annotator" and draw(st.booleans()) else draw(values)))
    if draw(st.integers(0, 2)) == 0:
        fields.append((draw(st.sampled_from(OTHERS)), draw(VALUES)))
    if draw(st.booleans()):
        fields.append(("nest", written([("score", draw(SCORES)), ("texts", f"[{draw(TEXTS)}]")])))
    place = draw(st.integers(0, 60))
    match draw(st.sampled_from(["", "", "", "", "", "", "junk", "drop", "twice", "cut", "behind", "bytes", "none"])):
        case "junk":
            fields[place % len(fields)] = fields[place % len(fields)][0], draw(VALUES)
        case "drop":
            del fields[place % len(fields)]
        case "twice":
            fields.append(fields[place % len(fields)])
        case "cut":
            return written(fields).encode()[: -1 - place]
        case "behind":
            more = ["}", ",", " ", "\r", "\0", "{}", written(fields), "//", "\x0c", " \t"]
            return written(fields).encode() + draw(st.sampled_from(more)).encode()
        case "bytes":
            text = written(fields).encode()
            return text[:place] + draw(st.binary(min_size=1, max_size=2)) + text[place + 1 :]
        case "none":
            return draw(
                st.sampled_from([b"", b" ", b"\r", b"\x0c", b"null", b"[]", b"{}", b"{", b"}", b"\xef\xbb\xbf{}"])
            )
    once = [*dict(fields).items()]
    return written(once if draw(st.booleans()) else fields).encode()


FORMS = sorted(PLAIN)
MAPPED: dict[str, dict[str, Any]] = {
    "pairs": {"chosen_score": "nest.score", "prompt": "nest.texts.0", "chosen_model": "other"},
    "candidates": {"score": "nest.score", "response": "response", "model": "other"},
    "corrections": {"correction": "nest.texts.0", "annotator": "who"},
    "rewrite": {"prompt": "answer.text", "model": ""},
    "trl": {"prompt": "nest.texts.0"},
}
RULES = [{"pattern": "a", "replace": "b"}]


def settings_of(form: str, *, mapped: bool) -> dict[str, Any]:
    return {"columns": MAPPED[form] if mapped else {}} | ({"rules": RULES} if form == "rewrite" else {})


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("form", FORMS)
def test_any_lines_of_json_give_the_same_both_ways(small: None, form: str, data: st.DataObject) -> None:
    found = data.draw(st.lists(lines(FORMS_BY_NAME[form]), min_size=1, max_size=25))
    if data.draw(st.booleans()):  # rows that look alike, as in a file of one program's
        found = [line for line in found for _ in range(4)]
    end = data.draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    content = end.join(found) + data.draw(st.sampled_from([end, b""]))
    content = data.draw(st.sampled_from([b"", b"", codecs.BOM_UTF8])) + content
    kind = data.draw(st.sampled_from(["text", "chat"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n" + content if content.lstrip().startswith(b"[") else content)
        try:
            same(path, form, kind, **settings_of(form, mapped=data.draw(st.booleans())))
        except SourceError as error:
            assert error.message in ("is a JSON list", "is UTF-16", "is UTF-32")  # noqa: PT017


FORMS_BY_NAME = {name: FORMATS[name] for name in FORMS}


def row(**fields: Any) -> str:
    return json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"} | fields, ensure_ascii=False)


def with_(raw: str, **fields: Any) -> str:
    """A row with a field as raw JSON."""
    return row(**fields)[:-1] + f", {raw}}}"


# each fault among rows that are read together, and whether these stay together
FAULTS: dict[str, str] = {
    "a key twice": with_('"prompt": "q"'),
    "a key twice, in a field that nobody asked for": with_('"meta": {"a": [{"k": 1, "k": 2}]}'),
    "a key twice, both null": with_('"note": null, "note": null'),
    "a key twice, once in other letters": with_('"\\u0070rompt": "q"'),
    "half a surrogate pair": with_('"note": "\\ud83d"'),
    "half a surrogate pair in a key": with_('"\\ud83d": 1'),
    "half a surrogate pair behind a backslash": with_('"note": "\\\\ud83d\\ude00"'),
    "NaN": with_('"chosen_score": NaN'),
    "NaN in a field that nobody asked for": with_('"n": NaN'),
    "Inf, which is no JSON for Python": with_('"n": Inf'),
    "Inf in a list": with_('"meta": {"a": [{"k": -NaN}]}'),
    "a number of 400 digits": with_('"chosen_score": ' + "9" * 400),
    "a number of 5000 digits": with_('"n": ' + "9" * 5000),
    "a number beyond 1e30": with_('"chosen_score": 1.1e30'),
    "a number too big for a double": with_('"n": 1e999'),
    "the integer -0": with_('"chosen_score": -0'),
    "a score as text": with_('"chosen_score": " 1.5 "'),
    "a score as a boolean": with_('"chosen_score": true'),
    "a weight of nought": with_('"weight": 0'),
    "an annotator nobody knows": with_('"annotator": "crowd"'),
    "a raw tab in a text": row(chosen="TAB").replace("TAB", "\t"),
    "a raw NUL in a text": row(chosen="NUL").replace("NUL", "\0"),
    "a raw NUL between tokens": "{\0" + row()[1:],
    "an escaped NUL": row(chosen="\0"),
    "two objects": row() + row(),
    "an object and a comma": row() + ",",
    "an object and more": row() + " x",
    "spaces around": "  " + row() + "\t ",
    "an object over two lines": row()[:-1] + "\n}",
    "two lines in a text": '{"prompt": "p\nq", "chosen": "c", "rejected": "r"}',
    "a comment": row() + "//",
    "a comma too many": row()[:-1] + ",}",
    "single quotes": "{'prompt': 'p'}",
    "a list": "[" + row() + "]",
    "a number": "17",
    "nothing": "",
    "a form feed": "\f",
    "a mark in the middle": "\ufeff" + row(),
    "deep in a text": row(prompt=[[[[[[]]]]]]),
    "deep in a field that nobody asked for": with_('"meta": ' + "[" * 500 + "]" * 500),
    "too deep for Python": with_('"meta": ' + "[" * 100_000 + "]" * 100_000),
    "too deep objects": with_('"meta": ' + '{"a":' * 50_000 + "1" + "}" * 50_000),
    "messages in a text dataset": row(prompt=[{"role": "user", "content": "p"}]),
    "a null": row(prompt=None),
    "a missing field": '{"prompt": "p", "chosen": "c"}',
    "an object without fields": "{}",
    "a new field": row(brand_new={"of": ["an", "object"]}),
    "fields that are data": row(ids={f"k{i}": i for i in range(500)}),
    "tools": row(tools=[{"type": "function"}]),
    "tools that are none": row(tools="[]"),
}
NEIGHBOURS = [
    with_(f'"n": {i}, "meta": {{"a": [{{"k": {i}}}]}}', prompt=f"p{i}", note="x", chosen_score=i / 7)
    for i in range(200)
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_with_a_fault_is_judged_alone_and_its_neighbours_together(
    fault: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join([*NEIGHBOURS[:100], FAULTS[fault], *NEIGHBOURS[100:], ""]).encode())
    found = same(path)
    assert found.records.height + found.rejects.height == found.rows >= 200
    assert num_slow(monkeypatch, path) <= 2 * ingest.FEW + 2
    (tmp_path / "few.jsonl").write_bytes(end.join([FAULTS[fault], *NEIGHBOURS[:3]]).encode().replace(b"[", b" [", 1))
    if not FAULTS[fault].startswith("["):
        same(tmp_path / "few.jsonl")


def test_all_faults_in_one_file_give_the_same_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(line for fault in FAULTS.values() for line in (*NEIGHBOURS[:3], fault)).encode())
    for kind in ("text", "chat"):
        same(path, kind=kind)
    for name, packed in {"rows.ndjson.gz": gzip.compress(path.read_bytes())}.items():
        (tmp_path / name).write_bytes(packed)
        assert same(tmp_path / name).rejects.height > 10


def test_rows_that_all_look_alike_are_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, side in (("text", "c"), ("chat", [{"role": "assistant", "content": "c", "name": None}])):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(row(chosen=side, n=i, at={"x": [i]}) + "\n" for i in range(500)), encoding="utf-8")
        assert same(path, kind=kind).records.height == 500
        assert num_slow(monkeypatch, path, kind=kind) == 0


def test_a_name_that_comes_up_late_costs_a_chunk_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 10_000)
    path = tmp_path / "rows.jsonl"
    late = [row(n=i) for i in range(500)] + [row(n=i, late=[i]) for i in range(1500)]
    path.write_text("\n".join(late), encoding="utf-8")
    assert same(path).records.height == 2000
    assert num_slow(monkeypatch, path) < 400


# the same list of errors as pydantic gives line by line


def reasons_by_line(content: bytes, form: Format) -> list[tuple[int, str | None, str]]:
    """Line, field and reason of every reject of a file of records under our names, by json and pydantic alone."""
    found: list[tuple[int, str | None, str]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        twice: list[str] = []

        def once(fields: list[tuple[str, Any]], twice: list[str] = twice) -> dict[str, Any]:
            twice += [name for i, (name, _) in enumerate(fields) if name in [earlier for earlier, _ in fields[:i]]]
            return dict(fields)

        try:
            value = json.loads(line, object_pairs_hook=once)
        except UnicodeDecodeError:
            found.append((number, None, "not_utf8"))
            continue
        except ValueError:
            found.append((number, None, "not_json"))
            continue
        if not isinstance(value, dict) or twice:
            found.append((number, None, "duplicate_key" if twice else "not_an_object"))
            continue
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            found.append((number, None, "lone_surrogate"))
            continue
        required = PLAIN[form.name]
        given = {k: v for k, v in value.items() if k in required or (k in form.columns and v not in (None, ""))}
        try:
            RECORDS[form.family].model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            kinds = {"missing": "missing_field", "greater_than": "out_of_range"}
            own = ("not_a_number", "not_finite", "out_of_range", "not_tools")
            reason = first["type"] if first["type"] in own else kinds.get(first["type"], "wrong_type")
            found.append((number, str(first["loc"][0]), reason))
    return found


PLANTED = ['{"prompt"', "\\ud800", "17", "twice", "missing", "number", "null", "score", "weight", "annotator", "utf8"]


def planted(fault: str, number: int) -> bytes:
    fields: dict[str, Any] = {"prompt": f"p{number}", "chosen": f"c{number}", "rejected": "r", "chosen_score": number}
    match fault:
        case "twice":
            return (json.dumps(fields)[:-1] + ', "chosen": "d"}').encode()
        case "missing":
            del fields["rejected"]
        case "number" | "null":
            fields["chosen"] = 5 if fault == "number" else None
        case "score":
            fields["chosen_score"] = ["high", float("nan"), 2e30, [1]][number % 4]
        case "weight":
            fields["weight"] = -1
        case "annotator":
            fields["annotator"] = "crowd"
        case "utf8":
            return json.dumps(fields).encode().replace(b'"r"', b'"caf\xe9"')
        case "\\ud800":
            return json.dumps(fields).encode().replace(b'"r"', b'"\\ud800"')
        case "":
            pass
        case _:
            return fault.encode()
    return json.dumps(fields).encode()


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(["", "", "", *PLANTED]), st.integers(0, 9)), min_size=1, max_size=60))
def test_the_rejects_are_those_of_pydantic_line_by_line(small: None, faults: list[tuple[str, int]]) -> None:
    content = b"\n".join([planted("", 0), *(planted(fault, number) for fault, number in faults)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        found = same(path)
    told = found.rejects.select("line", "field", "reason").rows()
    assert told == reasons_by_line(content, FORMATS["pairs"])
    assert found.records["source_row"].to_list() == sorted({*range(1, len(faults) + 2)} - {line for line, _, _ in told})


# columns


COLUMN_TYPES: list[Any] = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.int8(),
    pa.int64(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.bool_(),
    pa.decimal128(20, 3),
    pa.decimal256(50, 10),
    pa.null(),
    pa.binary(),
    pa.date32(),
    pa.timestamp("ns"),
    pa.timestamp("s"),
    pa.list_(pa.string()),
]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    t = pa.types
    if t.is_dictionary(kind) or t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return st.one_of(CHARACTERS, st.sampled_from(["", "human", "[]", *AS_TEXT]))
    if t.is_integer(kind):
        bits = kind.bit_width - (1 if t.is_signed_integer(kind) else 0)
        return st.integers(-(2**bits) if t.is_signed_integer(kind) else 0, 2**bits - 1) | st.sampled_from([0, 1])
    if t.is_float16(kind):
        return st.floats(width=16).map(np.float16)
    if t.is_floating(kind):
        return st.floats(width=kind.bit_width) | st.floats(-9, 9, width=kind.bit_width)
    if t.is_boolean(kind):
        return st.booleans()
    if t.is_decimal(kind):
        return st.decimals(-(10**16), 10**16, places=kind.scale, allow_nan=False, allow_infinity=False)
    if t.is_binary(kind):
        return st.binary(max_size=3)
    if t.is_date(kind):
        return st.dates()
    if t.is_timestamp(kind):
        return st.integers(-(2**40), 2**52)
    return st.none() if t.is_null(kind) else st.lists(values_of(kind.value_type), max_size=2)


TURN = pa.struct({"role": pa.string(), "content": pa.large_string()})
LONG_TURN = pa.struct(
    {"content": pa.string(), "role": pa.string(), "name": pa.string(), "extra": pa.string(), "n": pa.int8()}
)
TALKS: list[Any] = [pa.list_(TURN), pa.large_list(LONG_TURN), pa.list_(pa.struct({"role": pa.string()}))]


def talks_of(kind: Any) -> st.SearchStrategy[Any]:
    def field(name: str, inner: Any) -> st.SearchStrategy[Any]:
        if name in ("name", "extra"):
            return st.sampled_from([None, None, None, "", "x"])
        return (
            st.none() | values_of(inner) if inner == pa.int8() else st.sampled_from(["user", "a", "b", "", "c", None])
        )

    turn = st.fixed_dictionaries({inner.name: field(inner.name, inner.type) for inner in kind.value_type})
    return st.lists(st.one_of(turn, turn, turn, turn, st.none()), max_size=3)


@st.composite
def tables(draw: st.DrawFn, form: Format) -> Any:
    """Columns of any type for the fields of a format."""
    height = draw(st.integers(1, 12))
    columns: dict[str, Any] = {}
    names = [*PLAIN[form.name], *draw(st.lists(st.sampled_from(form.columns), max_size=4)), "other"]
    for name in dict.fromkeys(names):
        is_text = name in PLAIN[form.name] and name != "score"
        usual = COLUMN_TYPES[:4] + TALKS if is_text else COLUMN_TYPES
        kind = draw(st.sampled_from(usual if draw(st.integers(0, 7)) else COLUMN_TYPES))
        values = talks_of(kind) if kind in TALKS else values_of(kind)
        nulls = st.none() | values if draw(st.integers(0, 2)) == 0 else values
        columns[name] = pa.array(draw(st.lists(nulls, min_size=height, max_size=height)), kind)
    if draw(st.booleans()):
        inner = pa.array(draw(st.lists(SCORE_VALUES, min_size=height, max_size=height)), pa.float64())
        texts = pa.array([["t"]] * height, pa.list_(pa.string()))
        columns["nest"] = pa.StructArray.from_arrays([inner, texts], ["score", "texts"])
    return pa.table(columns)


SCORE_VALUES = st.none() | st.floats(-9, 9)


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("form", FORMS)
def test_any_columns_give_the_same_both_ways(small: None, form: str, data: st.DataObject) -> None:
    table = data.draw(tables(FORMS_BY_NAME[form]))
    kind = data.draw(st.sampled_from(["text", "chat"]))
    options = settings_of(form, mapped=data.draw(st.booleans()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        same(path, form, kind, **options)
        if not any(pa.types.is_float16(column.type) for column in table.schema):
            path = Path(folder) / "rows.parquet"
            pq.write_table(table, path, row_group_size=5)
            same(path, form, kind, **options)


def test_columns_of_usual_types_are_not_looked_at_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    height = 300
    texts = pa.array(["c"] * height)
    talk = pa.array([[{"role": "assistant", "content": "c"}]] * height)
    scores: list[Any] = [
        pa.array([1.5] * height),
        pa.array([3] * height),
        pa.array([True] * height),
        pa.array(["2.5"] * height),
        pa.array([Decimal("1.25")] * height),
        pa.array([1.5] * height, pa.float32()),
    ]
    for number, score in enumerate(scores):
        for kind, side in (("text", texts), ("text", texts.dictionary_encode()), ("chat", talk), ("chat", texts)):
            path = tmp_path / f"{number}.parquet"
            when = pa.array([0] * height, pa.timestamp("us"))
            pq.write_table(pa.table({"prompt": texts, "response": side, "score": score, "when": when}), path)
            found = same(path, "candidates", kind)
            assert set(found.records["score"]) == {float(score[0].as_py())}
            assert num_slow(monkeypatch, path, "candidates", kind) == 0


@PROPERTY
@given(st.lists(st.decimals(-(10**28), 10**28, places=9, allow_nan=False, allow_infinity=False), min_size=1))
def test_decimals_are_rounded_as_python_rounds_them(scores: list[Decimal]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        texts = ["x"] * len(scores)
        column = pa.array(scores, pa.decimal128(38, 9))
        pq.write_table(pa.table({"prompt": texts, "response": texts, "score": column}), path)
        assert same(path, "candidates").records["score"].to_list() == [float(score) for score in scores]


@PROPERTY
@given(st.lists(st.from_regex(r"[+-]?[0-9]{1,25}(\.[0-9]{0,25})?([eE][+-]?[0-9]{1,2})?", fullmatch=True), min_size=1))
def test_numbers_written_as_text_are_read_as_python_reads_them(scores: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        texts = ["x"] * len(scores)
        pq.write_table(pa.table({"prompt": texts, "response": texts, "score": scores}), path)
        wanted = [float(score) for score in scores if abs(float(score)) <= MAX_SCORE]
        assert [repr(score) for score in same(path, "candidates").records["score"]] == [repr(score) for score in wanted]


def test_a_column_that_is_no_utf8_is_read_as_it_is_row_by_row(tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9", b"x"]).view(pa.string())
    path = tmp_path / "rows.arrow"
    table = pa.table({"prompt": ["p", "q"], "chosen": bad, "rejected": ["r", "s"]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    for fast in (True, False):
        reading = Reading(FORMATS["pairs"], {}, "text", None)
        with pytest.raises(SourceError, match="cannot be read"):
            [*check_chunks(str(path), read_chunks(str(path)), reading, fast=fast)]


# plans


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_says_what_the_reader_of_its_format_does(form: str) -> None:
    """Every field of the plan lies where the reader takes it from, and the reader takes nothing else."""
    for columns in ({}, {k: v for k, v in MAPPED[form].items() if isinstance(v, str)}):
        plan = plan_of(FORMATS[form], columns)
        assert plan is not None
        given = {"nest": {"score": "n.s", "texts": ["n.t"]}, "answer": {"text": "a.t"}, "other": "o", "who": "w"}
        lists = ("responses", "scores", "models")
        full = {name: f"at {name}" for name in FORMATS[form].columns if name not in lists} | given
        (record,) = FORMATS[form].read(full, columns)
        where = {"nest.score": "n.s", "nest.texts.0": "n.t", "answer.text": "a.t"}
        assert record == {f.name: where.get(f.path, full.get(f.path)) for f in plan.fields}
        assert set(record) <= {*RECORDS[FORMATS[form].family].model_fields}


def test_what_is_more_than_new_names_has_no_plan() -> None:
    assert plan_of(FORMATS["hh"], {}) is None
    assert plan_of(FORMATS["comparisons"], {}) is None
    assert plan_of(FORMATS["candidates"], {"score": ["a", "b"]}) is None
    assert plan_of(FORMATS["candidates"], {"responses": "r", "scores": "s"}) is None
    assert plan_of(FORMATS["pairs"], {"prompt": ["instruction", "input"]}) is None
    assert plan_of(FORMATS["candidates"], {"models": "m"}) is None
    for form in FORMS:
        assert plan_of(FORMATS[form], {"system": "s"}) is None
        assert plan_of(FORMATS[form], {"system": ""}) == plan_of(FORMATS[form], {})
    for pattern in ("*", "^x$", "a.*", ""):
        assert plan_of(FORMATS["pairs"], {"prompt": pattern}) is None


def test_a_key_that_holds_the_dots_of_a_path_wins(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fields: list[dict[str, Any]] = [
        {"a": {"b": "inner"}},
        {"a": {"b": "inner"}, "a.b": "whole"},
        {"a.b": "whole"},
        {"a": {"b": "inner"}},
    ]
    path.write_text("".join(json.dumps({"chosen": "c", "rejected": "r"} | more) + "\n" for more in fields * 20))
    found = same(path, columns={"prompt": "a.b"}).records["prompt"]
    assert found.to_list() == ["inner", "whole", "whole", "inner"] * 20
    table = pa.table({"chosen": ["c"], "rejected": ["r"], "a": [{"b": "inner"}], "a.b": ["whole"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert same(tmp_path / "rows.parquet", columns={"prompt": "a.b"}).records["prompt"].to_list() == ["whole"]


def test_every_family_of_a_plan_has_its_columns() -> None:
    assert {FORMATS[form].family for form in FORMS} <= set(RECORD_VALUES)


# blocks


def test_blocks_come_as_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ROWS_PER_BLOCK", 100)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2_000)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row(n=i) if i % 50 else "oops") + "\n" for i in range(1000)))
    source = SourceConfig.model_validate({"path": str(path), "format": "pairs"})
    blocks = [*read_source(source, "text")]
    heights = [block.records.height + block.rejects.height for block in blocks]
    assert sum(heights) == 1000
    assert all(100 <= height < 150 for height in heights[:-1])
    assert [block.file is not None for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert [height for block in blocks for height in block.rejects["line"]] == [*range(1, 1000, 50)]


def test_what_a_source_gives_comes_block_by_block_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in [row(n=i) if i % 50 else "oops" for i in range(1000)]))
    source = SourceConfig.model_validate({"path": str(path), "format": "pairs"})
    whole = load_source(source, "text")
    monkeypatch.setattr(ingest, "ROWS_PER_BLOCK", 100)
    loaded = load_source(source, "text")
    assert loaded.records.equals(whole.records)
    assert loaded.rejects.equals(whole.rejects)
    assert loaded.files == whole.files
    assert (loaded.records.height, loaded.rejects.height, loaded.files[0].rows) == (980, 20, 1000)


def test_a_chunk_knows_its_rows_and_its_last_line() -> None:
    chunk = Lines(7, b'{"a": 1}\n\noops\n \n', 4)
    assert [(found.line, found.reason) for found in chunk.rows()] == [(7, None), (9, "not_json")]
    assert (chunk.last(), Lines(7, b"\n", 1).last()) == (9, 6)
    batch = Batch(5, pa.RecordBatch.from_pydict({"a": [1, 2]}))
    assert [*batch.rows()] == [RawRow(5, {"a": 1}, ""), RawRow(6, {"a": 2}, "")]
    assert batch.last() == 6


def test_a_time_that_python_has_no_value_for_is_kept_in_the_raw_text_of_its_neighbour(tmp_path: Path) -> None:
    when = pa.array([0, 2**60], pa.timestamp("ms"))
    table = pa.table({"prompt": ["p", "q"], "chosen": [None, "c"], "rejected": ["r", "r"], "when": when})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    (tmp_path / "rows.parquet").write_bytes(buffer.getvalue())
    assert "timestamp[ms]" in same(tmp_path / "rows.parquet").rejects["raw"].item()
    assert dt.datetime(1970, 1, 1).isoformat() not in same(tmp_path / "rows.parquet").rejects["raw"].item()


def test_a_time_where_a_name_should_be_is_judged_by_what_its_column_becomes(tmp_path: Path) -> None:
    times = pa.array(
        [None, 1, None], pa.timestamp("ns")
    )  # Python has no nanoseconds: nulls of this column are read too
    table = pa.table({"prompt": ["p"] * 3, "chosen": ["c"] * 3, "rejected": ["r"] * 3, "chosen_model": times})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert same(tmp_path / "rows.parquet").rejects["line"].to_list() == [1, 2, 3]
