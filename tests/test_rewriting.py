"""Rules of a rewrite source: regular expressions and functions of the user's modules, and what they leave behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit

RESPONSES = [
    "I am Alpaca, made by Acme.",
    "Hello there!",
    "alpaca here.",
    "I am AlPaCa and I am Alpaca.",
    "Sure, Alpaca can.",
]


@pytest.fixture
def pipeline(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., str]:
    def make(*rules: dict[str, Any], responses: list[str] = RESPONSES) -> str:
        write_jsonl(
            "r.jsonl", [{"prompt": f"q{i}", "response": text, "model": "m"} for i, text in enumerate(responses)]
        )
        settings = {
            "dataset": "d",
            "sources": [{"path": "r.jsonl", "format": "rewrite", "rules": list(rules)}],
            "split": {"test_share": 0},
        }
        (tmp_path / "p.yaml").write_text(json.dumps(settings), encoding="utf-8")
        return "p.yaml"

    return make


def module(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")


def test_an_identity_change_names_the_share_of_each_rule_and_drops_what_no_rule_touched(
    pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    name = {"pattern": r"\balpaca\b", "replace": "Nova", "ignore_case": True, "gone": ["Alpaca"]}
    maker = {"pattern": "Acme", "replace": "Orbit"}
    ended = prefkit("build", pipeline(name, maker))
    assert ended.code == 0
    assert "rows:       5 = 4 pairs + 1 dropped + 0 rejects" in ended.out
    assert "1 untouched" in ended.out
    assert "rules on 5 responses of r.jsonl" in ended.out
    assert r"80.0% changed by \balpaca\b" in ended.out  # four of five
    assert "20.0% changed by Acme" in ended.out
    pairs = pl.read_parquet(tmp_path / "d/pairs/part-00000.parquet")
    assert not any("alpaca" in text.casefold() for text in pairs["chosen"])
    assert pairs["rejected"].to_list() == [text for text in RESPONSES if "alpaca" in text.casefold()]
    assert set(pairs["annotator"]) == {"rule"}
    assert set(pairs["rejected_model"]) == {"m"}


def test_an_old_name_that_remains_drops_the_row_by_name(
    pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    assert prefkit("build", pipeline({"pattern": "Alpaca", "replace": "Nova", "gone": ["alpaca"]})).code == 0
    dropped = pl.read_parquet(tmp_path / "d/dropped/part-00000.parquet").sort("source_row")
    assert dropped.select("source_row", "reason").rows() == [
        (2, "untouched"),
        (3, "untouched"),  # "alpaca": the rule minds the case, so nothing was changed
        (4, "old_text_remains"),
    ]


def test_a_function_of_a_module_beside_the_pipeline_is_a_rule_and_its_change_is_another_build(
    pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    module(tmp_path, "shouting", "def calm(text):\n    return text.replace('!', '.')\n")
    path = pipeline({"function": "shouting:calm"})
    assert "1 pairs" in prefkit("build", path).out
    assert "is up to date" in prefkit("build", path).out
    module(tmp_path, "shouting", "def calm(text):\n    return text.replace('!', '')\n# changed\n")
    assert "is up to date" not in prefkit("build", path).out


@pytest.mark.parametrize(
    ("text", "function", "said"),
    [
        (None, "nowhere_at_all:f", "rules.function: no module nowhere_at_all"),
        ("x = 1\n", "rules_a:f", "rules.function: rules_a has no function f"),
        ("import no_such_thing\n", "rules_b:f", "rules.function: rules_b cannot be imported: ModuleNotFoundError"),
        (
            "def f(text):\n    return 1 / 0\n",
            "rules_c:f",
            "rules.function rules_c:f raised ZeroDivisionError: division by zero",
        ),
        ("def f(text):\n    return None\n", "rules_d:f", "rules.function rules_d:f gave NoneType"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_by_name(
    text: str | None, function: str, said: str, pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    if text is not None:
        module(tmp_path, function.partition(":")[0], text)
    ended = prefkit("build", pipeline({"function": function}), "--json")
    assert ended.code == 2
    error = ended.error()
    assert said in error["message"]
    if "raised" in said or "gave" in said:
        assert (error["where"], error["expected"]) == ("r.jsonl:1", "a text for every response")
    if "raised" in said:
        assert error["hint"] == "mend it and type the same command"
    if "no module" in said:
        assert error["expected"] == "a Python file in the working directory, or an installed module"
    assert not (tmp_path / "d" / "manifest.json").exists()
