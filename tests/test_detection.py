"""Which format a source has is found by its rows, with the reason, and never guessed among two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit

from prefkit.config import Pipeline
from prefkit.detection import detect_format, fitting
from prefkit.errors import SourceError
from prefkit.formats import FORMATS
from prefkit.resolving import resolve_formats

ROWS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "candidates": {"prompt": "p", "response": "r", "score": 1},
    "corrections": {"prompt": "p", "response": "r", "correction": "c"},
    "comparisons": {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie"},
    "pairs": {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 2, "rejected_score": 1},
}


@pytest.mark.parametrize("name", ROWS)
def test_our_own_layouts_fit_exactly_their_own_format(name: str) -> None:
    assert [found.format for found in fitting([ROWS[name]])] == [name]


def test_all_rows_have_to_fit_but_for_the_share_that_may_stray() -> None:
    assert fitting([ROWS["trl"], ROWS["candidates"]], 0.4) == []
    damaged = {**ROWS["trl"], "chosen": 1}
    assert fitting([damaged, *[ROWS["trl"]] * 9]) == []
    assert [found.format for found in fitting([damaged, *[ROWS["trl"]] * 9], 0.1)] == ["trl"]
    assert fitting([damaged, *[ROWS["trl"]] * 8], 0.1) == []
    assert fitting([], 0.1) == []


@pytest.mark.parametrize(("share", "found"), [(0.0, False), (0.2, False), (0.25, True), (1.0, True)])
def test_as_many_rows_may_stray_as_the_pipeline_lets_be_rejects(
    share: float, *, found: bool, write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    path = str(write_jsonl("rows.jsonl", [{**ROWS["trl"], "chosen": 1}, *[ROWS["trl"]] * 3]))
    pipeline = pipeline_of({"path": path}, validate={"max_reject_share": share})
    if found:
        assert resolve_formats(pipeline).sources[0].format == "trl"
        return
    with pytest.raises(SourceError, match="no format is known by its rows"):
        resolve_formats(pipeline)


def test_a_format_that_most_rows_do_not_fit_is_not_found_whatever_the_share(write_jsonl: Callable[..., Path]) -> None:
    path = str(write_jsonl("rows.jsonl", [*[{**ROWS["trl"], "chosen": 1}] * 2, ROWS["trl"]]))
    with pytest.raises(SourceError, match="no format is known by its rows"):
        detect_format(path, 1.0)


def test_a_build_says_which_format_it_found_and_why(
    write_jsonl: Callable[..., Path], prefkit: Prefkit, tmp_path: Path
) -> None:
    write_jsonl("rows.jsonl", [ROWS["candidates"], {**ROWS["candidates"], "response": "s", "score": 2}])
    (tmp_path / "p.yaml").write_text("dataset: d\nsources: [{path: rows.jsonl}]\n", encoding="utf-8")
    ended = prefkit("build", "p.yaml")
    assert "rows.jsonl: format candidates, as it has prompt, response, score" in ended.out
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["pipeline"]["sources"][0]["format"] == "candidates"
    assert pl.read_parquet(tmp_path / "d/pairs/part-*.parquet")["chosen"].to_list() == ["s"]


def test_two_formats_that_fit_are_refused_by_name(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("rows.jsonl", [ROWS["candidates"] | ROWS["trl"]])
    with pytest.raises(SourceError) as raised:
        detect_format(str(path))
    text = str(raised.value)
    assert "2 formats fit: " in text
    assert "candidates, as it has prompt, response, score" in text
    assert "trl, as " in text
    assert "format:, which says what is meant" in text


def test_no_format_that_fits_is_refused_with_the_keys_found(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("rows.jsonl", [{"question": "q", "answers": [{"text": "t", "rank": 1}]}])
    with pytest.raises(SourceError) as raised:
        detect_format(str(path))
    text = str(raised.value)
    assert "no format is known by its rows; they have the keys question, answers (items of a list: text, rank)" in text
    assert "format: and columns: of this source" in text
    assert "prefkit formats lists them; for example" in text
    assert "format: candidates, columns: {prompt: question, response: answer, score: rating}" in text


def test_a_file_without_a_row_says_so(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(SourceError) as raised:
        detect_format(str(write_jsonl("rows.jsonl", ["", "{broken"])))
    assert "holds no row that could say what format it has" in str(raised.value)
    assert "check the file" in str(raised.value)


def test_too_many_rejects_name_the_format_that_would_fit(
    write_jsonl: Callable[..., Path], prefkit: Prefkit, tmp_path: Path
) -> None:
    write_jsonl("rows.jsonl", [ROWS["trl"]] * 3)
    (tmp_path / "p.yaml").write_text(
        "dataset: d\nsources: [{path: rows.jsonl, format: candidates}]\n", encoding="utf-8"
    )
    error = prefkit("build", "p.yaml", "--json").error()
    assert "3 missing_field (response)" in error["message"]
    assert error["hint"].startswith("format: trl fits, as ")


def test_a_detector_survives_any_value_in_any_field() -> None:
    values: list[Any] = [None, 1, "x", [], {}, [[]], [{}], [None], {"a": []}, True]
    names = {name for form in FORMATS.values() for name in form.fields.replace("[", " ").replace(",", " ").split()}
    for name in sorted(names):
        for value in values:
            fitting([dict.fromkeys((name, "prompt", "chosen", "rejected"), value)])
