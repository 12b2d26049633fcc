"""Any lines at all, under any settings: no crash, every row accounted for, every pair fit to train on.

The accounts are kept a second time here, in plain Python over the bytes of the file.
"""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefkit.build import Tables, build_dataset, make_tables
from prefkit.config import Pipeline
from prefkit.errors import SourceError
from prefkit.resolving import resolve_kind

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
FORMS = ("pairs", "candidates", "corrections", "hh", "trl")
MARK = b"\xef\xbb\xbf"
# the characters with the Unicode property White_Space
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
WHITE += "\u2028\u2029\u202f\u205f\u3000"


class Case(NamedTuple):
    """A file of lines, and the settings that it is built with."""

    content: bytes
    pipeline: dict[str, Any]


# what is written: JSON as text, so that keys can come twice and numbers be of any size

PLAIN = ["a", "b", "c", "a b", "a  b", " a", "", " ", "\n"]
ODD = ["\0", "\u202eabc", "e\u0301", "\u00e9", "\u2028", "\x85", "\U0001f600", "\x1d\x1e\x1f", "\x1f", "\ufeff", "\\"]
COMMON = st.sampled_from(["a", "b", "c d"])  # few enough to meet again
WORDS = st.one_of(
    COMMON, COMMON, COMMON, COMMON, COMMON, *(st.sampled_from(w) for w in (PLAIN, ODD)), st.text(max_size=6)
)
NUMBERS = ["0", "1", "2", "-1", "0.1", "0.3", "0.30000000000000004", "1e308", "-1e308", "1.7976931348623157e308"]
NUMBERS += ["5e-324", "1e-310", "1e-400", "1e400", "NaN", "Infinity", "-Infinity", "true", "false", '"3"', '" 2 "']
NUMBERS += ["9" * 400, '"nan"', '"x"', '""', "null", "[]", "-0.0", "1e22", "4e-308"]
JUNK = ["null", "5", "-1.5", "true", "{}", "[]", '"x"', "[[]]", "[null]", '{"role": "user", "content": "a"}', "1e999"]
JUNK += [
    '["a", 5]',
    '[{"role": "user"}]',
    '[{"role": 1, "content": []}]',
    '"\\ud800"',
    '"\\u0000"',
    "[" * 30 + "]" * 30,
]
JUNK += ['{"a": 1, "a": 2}', '{"": {"": ""}}', '"\\ud83d\\ude00"', "[1, 2]", '["\\udfff"]']


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=len(text) % 2 == 0)


def listed(items: list[str]) -> str:
    return "[" + ", ".join(items) + "]"


def written(fields: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{quoted(name)}: {value}" for name, value in fields) + "}"


def turn(role: str, content: str) -> str:
    return written([("role", quoted(role)), ("content", quoted(content))])


FEW = st.sampled_from(["0", "1", "1.1", "2"])
SCORES = st.one_of(FEW, FEW, FEW, st.sampled_from(NUMBERS), st.floats().map(json.dumps), st.integers(-3, 3).map(str))
NAMES = st.sampled_from(['"m"', "null", '""', '"n\\u0000"'])
ANNOTATORS = st.sampled_from(['"human"', '"model"', '"rule"', "null", '""'])
TEXTS = WORDS.map(quoted)
REPLIES = WORDS.map(lambda text: listed([turn("assistant", text)]))
QUESTIONS = WORDS.map(lambda text: listed([turn("user", text)]))
TALKS = st.lists(st.builds(turn, st.sampled_from(["user", "assistant", "system", "x"]), WORDS), max_size=4).map(listed)
# by whether messages are meant to be there; the other sort comes too
PROMPTS = {True: st.one_of(QUESTIONS, QUESTIONS, TEXTS, TALKS), False: st.one_of(*[TEXTS] * 9, QUESTIONS)}
SIDES = {True: st.one_of(REPLIES, REPLIES, TEXTS, TALKS), False: st.one_of(*[TEXTS] * 9, REPLIES)}


def record(optional: dict[str, st.SearchStrategy[str]], **fields: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(fields, optional=optional).map(lambda found: [*found.items()])


def transcript(turns: list[str]) -> str:
    return quoted("".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns)))


@st.composite
def transcripts(draw: st.DrawFn) -> list[tuple[str, str]]:
    shared = draw(st.lists(WORDS, min_size=1, max_size=3))
    return [(side, transcript([*shared, draw(WORDS)])) for side in ("chosen", "rejected")]


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, str]]:
    """TRL without a prompt of its own, as messages or as texts that begin alike."""
    if draw(st.booleans()):
        shared = draw(st.sampled_from(["q ", "a b ", "", " ", "q\n\n"]))
        return [(side, quoted(shared + draw(WORDS))) for side in ("chosen", "rejected")]
    question = draw(WORDS)
    return [(side, listed([turn("user", question), turn("assistant", draw(WORDS))])) for side in ("chosen", "rejected")]


@st.composite
def lists_of_candidates(draw: st.DrawFn, *, chat: bool) -> list[tuple[str, str]]:
    number = draw(st.integers(0, 4))
    columns = {"responses": SIDES[chat], "scores": SCORES} | ({"models": NAMES} if draw(st.booleans()) else {})
    lists = [
        (name, listed(draw(st.lists(values, min_size=number, max_size=number)))) for name, values in columns.items()
    ]
    return [("prompt", draw(PROMPTS[chat])), *lists]


def records_of(form: str, *, chat: bool) -> st.SearchStrategy[Any]:
    prompts, sides = PROMPTS[chat], SIDES[chat]
    if form == "pairs":
        values = dict.fromkeys(("chosen_score", "rejected_score", "weight"), SCORES)
        values |= {"annotator": ANNOTATORS, "chosen_model": NAMES, "other": st.sampled_from(JUNK)}
        return record(values, prompt=prompts, chosen=sides, rejected=sides)
    if form == "candidates":
        return record({"model": NAMES}, prompt=prompts, response=sides, score=SCORES) | lists_of_candidates(chat=chat)
    if form == "corrections":
        values = {"model": NAMES, "annotator": ANNOTATORS}
        return record(values, prompt=prompts, response=sides, correction=sides)
    if form == "hh":
        return transcripts()
    return conversations() | record({"prompt": prompts}, chosen=sides, rejected=sides)


RECORDS = {(form, chat): records_of(form, chat=chat) for form in FORMS for chat in (True, False)}
REVERSED = {"chosen": "rejected", "rejected": "chosen", "response": "correction", "correction": "response"}
DAMAGE = (
    ["none"] * 16 + ["reversed", "twin"] * 4 + ["drop", "junk", "twice", "cut", "behind", "bytes", "blank", "binary"]
)


@st.composite
def lines(draw: st.DrawFn, form: str, *, chat: bool) -> bytes:
    """A line or two: mostly records of the format, else of another one, or a damaged one, or no record at all."""
    other = draw(st.integers(0, 11)) == 7
    fields = draw(RECORDS[draw(st.sampled_from(FORMS)) if other else form, chat])
    damage = draw(st.sampled_from(DAMAGE))
    place = draw(st.integers(0, 30))
    if damage == "drop":
        fields = [field for number, field in enumerate(fields) if number != place % len(fields)]
    elif damage == "junk":
        fields[place % len(fields)] = (fields[place % len(fields)][0], draw(st.sampled_from(JUNK)))
    elif damage == "twice":
        fields = [*fields, fields[place % len(fields)]]
    text = written(fields).encode()
    if damage == "reversed":  # the same prompt, the other way round
        return text + b"\n" + written([(REVERSED.get(name, name), value) for name, value in fields]).encode()
    if damage == "twin":  # another row of the same prompt
        prompt = [field for field in fields if field[0] == "prompt"]
        second = [field for field in draw(RECORDS[form, chat]) if field[0] != "prompt"]
        return text + b"\n" + written([*prompt, *second]).encode()
    if damage == "cut":
        return text[: -1 - place]
    if damage == "behind":
        return text + draw(st.sampled_from([b"}", b",", b" ", b"\r", b"\0", b"\xff", text, b"//", b"\x0c"]))
    if damage == "bytes":
        return text[:place] + draw(st.binary(min_size=1, max_size=3)) + text[place + 1 :]
    if damage == "blank":
        return draw(st.sampled_from([b"", b" ", b"\t\r", b"\x0c", b"\xc2\xa0", b"\xe2\x80\xa8", MARK]))
    return draw(st.binary(max_size=12)) if damage == "binary" else text


@st.composite
def cases(draw: st.DrawFn) -> Case:
    form = draw(st.sampled_from(FORMS))
    kind = draw(st.sampled_from(["text", "chat", None] if form != "hh" else ["chat", "chat", None, "text"]))
    chat = draw(st.booleans()) if kind is None else kind == "chat"
    rows = draw(st.lists(lines(form, chat=chat), min_size=1, max_size=8))
    if draw(st.booleans()) and len(rows) <= 4:
        rows = [row for row in rows for _ in range(draw(st.integers(1, 2)))]  # the same line twice
    content = draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join(rows) + draw(st.sampled_from([b"\n", b""]))
    source = {"format": form}
    if form in {"pairs", "candidates"}:
        source["direction"] = draw(st.sampled_from(["higher_is_better", "lower_is_better"]))
    pipeline = {
        "sources": [source],
        "kind": kind,
        "pairs": {"min_margin": draw(st.sampled_from([0, 0, 0.2, 1.5] if form != "corrections" else [0]))},
        "dedupe": {
            "exact": draw(st.sampled_from([True, True, False])),
            "contradictions": draw(st.sampled_from(["drop_both", "majority", "higher_margin", "keep"])),
        },
        "validate": {
            "max_reject_share": 1.0,
            "max_chars": draw(st.sampled_from([200_000, 200_000, 4])),
            "score_scale": draw(st.sampled_from([None, None, [0, 2]])),
        },
        "split": {"test_share": draw(st.sampled_from([0.0, 0.5, 1.0]))},
    }
    return Case((MARK if draw(st.integers(0, 9)) == 0 else b"") + content, pipeline)


# the second account


def rows_of(content: bytes) -> dict[int, bytes]:
    """The lines that are not blank, by number."""
    numbered = enumerate(content.removeprefix(MARK).split(b"\n"), start=1)
    return {number: line for number, line in numbered if line.strip()}


def value_of(line: bytes) -> dict[str, Any] | None:
    """The object that a line is, if it is one, with every key once and no half of a surrogate pair."""
    twice: list[str] = []

    def once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in fields]
        twice.extend(name for name in names if names.count(name) > 1)
        return dict(fields)

    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=once)
    except ValueError:
        return None
    half = re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
    return value if isinstance(value, dict) and not twice and not half else None


def is_text(value: Any, kind: str) -> bool:
    def is_message(turn: Any) -> bool:
        return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))

    return isinstance(value, str) or (kind == "chat" and isinstance(value, list) and all(map(is_message, value)))


def is_score(value: Any) -> bool:
    try:
        return isinstance(value, bool | int | float | str) and abs(float(value)) <= 1e30  # and no NaN
    except (ValueError, OverflowError):
        return False


def candidates_of(line: bytes, kind: str) -> list[str | None]:
    """The candidates of a line: of each its prompt, None for one that must be a reject."""
    value = value_of(line)
    if value is None or "prompt" not in value:
        return [None]
    found = [(value.get("response"), value.get("score"), value.get("model"))]
    if "responses" in value:
        names = ["responses", "scores", *(["models"] if "models" in value else [])]
        lists: list[Any] = [value.get(name) for name in names]
        if not all(isinstance(items, list) and items for items in lists) or len({len(items) for items in lists}) > 1:
            return [None]
        models = lists[2] if len(lists) == 3 else [None] * len(lists[0])
        found = [*zip(lists[0], lists[1], models, strict=True)]
    prompt = value["prompt"]
    if isinstance(prompt, str) and kind == "chat":
        prompt = [{"role": "user", "content": prompt}]
    if not is_text(prompt, kind):
        return [None] * len(found)
    name = json.dumps([(turn["role"], turn["content"]) for turn in prompt] if kind == "chat" else prompt)
    fit = [is_text(r, kind) and is_score(s) and isinstance(m, str | None) for r, s, m in found]
    return [name if good else None for good in fit]


def check_candidates(tables: Tables, rows: dict[int, bytes]) -> None:
    """candidates = used + unused + rejects; prompts = prompts with a pair + prompts dropped."""
    found = {number: candidates_of(line, tables.made.kind) for number, line in rows.items()}
    rejected = [number for number, prompts in found.items() for prompt in prompts if prompt is None]
    accepted = [prompt for prompts in found.values() for prompt in prompts if prompt is not None]
    assert sorted(tables.rejects["line"].to_list()) == rejected
    drafted = tables.pairs.height + tables.dropped.filter(pl.col("stage") != "pairs").height
    assert 2 * drafted + sum(tables.made.unused.values()) == len(accepted)
    assert tables.pairs.height + tables.dropped.height == len(set(accepted))
    told = tables.counts
    assert (told.candidates, told.candidate_rejects) == (len(accepted) + len(rejected), len(rejected))
    assert (told.used, told.prompts, told.rows) == (2 * drafted, len(set(accepted)), 0)
    ids = tables.pairs["prompt_id"].to_list() + tables.dropped["prompt_id"].to_list()
    assert len(set(ids)) == len(ids)


def check_rows(tables: Tables, rows: dict[int, bytes]) -> None:
    """Every line that is not blank is in exactly one of the tables."""
    places = [tables.pairs["source_row"], tables.dropped["source_row"], tables.rejects["line"]]
    assert sorted(number for place in places for number in place) == [*rows]
    assert (tables.counts.rows, tables.counts.candidates, tables.counts.prompts) == (len(rows), 0, 0)


def plain(side: Any) -> str:
    return side if isinstance(side, str) else "\n".join(turn["content"] for turn in side)


def check_pairs(tables: Tables, direction: str) -> None:
    """No pair with an empty or an equal side, none against its scores, none twice."""
    sign = 1 if direction == "higher_is_better" else -1
    for pair in tables.pairs.iter_rows(named=True):
        assert pair["chosen"] != pair["rejected"]
        assert all(plain(pair[name]).strip(WHITE) for name in ("prompt", "chosen", "rejected"))
        assert not any("\0" in plain(pair[name]) for name in ("prompt", "chosen", "rejected"))
        scores = pair["chosen_score"], pair["rejected_score"]
        assert all(score is None or math.isfinite(score) for score in scores)
        if None not in scores:
            assert sign * scores[0] > sign * scores[1]
            assert pair["margin"] > 0
        assert pair["weight"] > 0
    assert tables.pairs["pair_id"].n_unique() == tables.pairs.height
    by_prompt = tables.pairs.group_by("prompt_id").agg(pl.col("split").n_unique())
    assert set(by_prompt["split"]) <= {1}


def check_counts(tables: Tables) -> None:
    counts = tables.counts
    heights = tables.pairs.height, tables.dropped.height, tables.rejects.height
    assert (counts.pairs, counts.dropped, counts.rejects) == heights
    assert counts.train + counts.test == counts.pairs
    reasons = tables.dropped["reason"].to_list() + tables.rejects["reason"].to_list()
    assert tables.made.reasons == {reason: reasons.count(reason) for reason in set(reasons)}
    assert all(reasons)


def pipeline_for(case: Case, folder: Path) -> Pipeline:
    path = folder / "rows.jsonl"
    path.write_bytes(case.content)
    source = case.pipeline["sources"][0] | {"path": str(path)}
    return Pipeline.model_validate(case.pipeline | {"dataset": str(folder / "dataset"), "sources": [source]})


def frames_of(tables: Tables) -> tuple[pl.DataFrame, ...]:
    return tables.pairs, tables.dropped, tables.rejects


def tables_of(pipeline: Pipeline, content: bytes) -> Tables | None:
    """The tables; None where there is nothing to read, which is the one thing that may be said instead."""
    try:
        return make_tables(pipeline, resolve_kind(pipeline))
    except SourceError:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        assert utf16 or not rows_of(content)
        return None


def check(case: Case, folder: Path) -> None:
    pipeline = pipeline_for(case, folder)
    tables = tables_of(pipeline, case.content)
    if tables is None:
        return
    (source,), rows = pipeline.sources, rows_of(case.content)
    (check_candidates if source.format == "candidates" else check_rows)(tables, rows)
    check_counts(tables)
    check_pairs(tables, source.direction)
    if len(case.content) % 4:  # a second build of one file in four: it costs as much as the first
        return
    again = tables_of(pipeline, case.content)
    assert again is not None
    assert all(one.equals(other) for one, other in zip(frames_of(tables), frames_of(again), strict=True))
    assert tables.made == again.made


@settings(FUZZ, max_examples=60)
@given(cases())
def test_a_few_files_of_any_lines_are_accounted_for_to_the_last_row(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(case, Path(folder))


@pytest.mark.slow
@settings(FUZZ, max_examples=2000)
@given(cases())
def test_any_file_of_any_lines_is_accounted_for_to_the_last_row(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(case, Path(folder))


@pytest.mark.slow
@settings(FUZZ, max_examples=50)
@given(cases())
def test_what_is_built_of_any_lines_is_on_disk_as_it_was_made_and_stays(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipeline = pipeline_for(case, Path(folder))
        tables = tables_of(pipeline, case.content)
        if tables is None:
            return
        built = build_dataset(pipeline)
        assert (built.counts, built.reasons) == (tables.counts._asdict(), tables.made.reasons)
        for name, frame in zip(("pairs", "dropped", "rejects"), frames_of(tables), strict=True):
            found = pl.concat(
                pl.read_parquet(path, glob=False)
                for path in sorted((Path(built.dataset) / name).iterdir(), reverse=True)
            )
            assert found.select(frame.columns).equals(frame)
        assert build_dataset(pipeline).unchanged
