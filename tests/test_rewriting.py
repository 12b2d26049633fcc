"""Rules of a rewrite source: regular expressions and functions of the user's modules, and what they leave behind."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command import Prefkit

from prefkit.config import RewriteRule
from prefkit.rewriting import make_rules

REPOSITORY = Path(__file__).parent.parent

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
    pairs = pl.read_parquet(tmp_path / "d/pairs/part-*.parquet")
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
            "rules.function rules_c:f raised ZeroDivisionError in rules_c.py:2: division by zero",
        ),
        ("def f(text):\n    return None\n", "rules_d:f", "rules.function rules_d:f gave NoneType"),
        (
            "def f(text):\n    return text + '\\ud800'\n",
            "rules_e:f",
            "rules.function rules_e:f gave half a surrogate pair, which is no character",
        ),
        ("import sys\nsys.exit(0)\n", "rules_f:f", "rules.function: rules_f cannot be imported: SystemExit: 0"),
        (
            "import sys\ndef f(text):\n    sys.exit(0)\n",
            "rules_g:f",
            "rules.function rules_g:f raised SystemExit in rules_g.py:3: 0",
        ),
        ("def f(text:\n", "rules_h:f", "rules.function: rules_h cannot be imported: SyntaxError"),
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
    if "no module" not in said:
        assert error["hint"] == "mend it and type the same command"
    if "has no function" in said:
        assert (error["where"], error["expected"]) == ("rules_a.py", "module:function")
    if "cannot be imported" in said:
        assert (error["where"], error["expected"]) == (
            f"{function.partition(':')[0]}.py",
            "a module that Python imports",
        )
    if "no module" in said:
        assert error["expected"] == "a Python file in the working directory, or an installed module"
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("1 / 0\n", "ZeroDivisionError"), ("x = nowhere_at_all_\n", "NameError"), ("def (\n", "SyntaxError")],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_package_that_cannot_be_imported_is_refused_by_name(
    text: str, said: str, inside: bool, pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    package = tmp_path / f"broken_{said.casefold()}_{inside}".casefold()
    package.mkdir()
    (package / "__init__.py").write_text(text, encoding="utf-8")
    if inside:
        (package / "steps.py").write_text("def f(text):\n    return text\n", encoding="utf-8")
    ended = prefkit("build", pipeline({"function": f"{package.name}.steps:f"}), "--json")
    assert ended.code == 2
    assert f"{package.name}.steps cannot be imported: {said}: " in ended.error()["message"]


CALM = "def calm(text):\n    return text.replace('!', {!r})\n"


def made_by(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "d/pairs/part-*.parquet")["chosen"].to_list()


@pytest.mark.parametrize(
    ("files", "function", "changed"),
    [
        ({"one_a.py": CALM}, "one_a:calm", "one_a.py"),
        ({"one_b.py": "from two_b import calm\n", "two_b.py": CALM}, "one_b:calm", "two_b.py"),
        (
            {"one_c.py": "def f(t):\n    import two_c\n    return two_c.calm(t)\n", "two_c.py": CALM},
            "one_c:f",
            "two_c.py",
        ),
        (
            {"pack_d/__init__.py": CALM, "pack_d/one.py": "from . import calm\n"},
            "pack_d.one:calm",
            "pack_d/__init__.py",
        ),
        (
            {"pack_e/__init__.py": "", "pack_e/one.py": "from .two import calm\n", "pack_e/two.py": CALM},
            "pack_e.one:calm",
            "pack_e/two.py",
        ),
        (
            {"pack_f/one.py": "from pack_f import three\ncalm = three.calm\n", "pack_f/three.py": CALM},
            "pack_f.one:calm",
            "pack_f/three.py",
        ),
    ],
)
def test_a_change_of_any_file_behind_a_function_is_another_build_with_the_new_text(
    files: dict[str, str],
    function: str,
    changed: str,
    pipeline: Callable[..., str],
    prefkit: Prefkit,
    tmp_path: Path,
) -> None:
    """In one process, and within a second: neither a loaded module nor a .pyc stands for the file."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("{!r}", "'.'"), encoding="utf-8")
    path = pipeline({"function": function})
    assert prefkit("build", path).code == 0
    assert made_by(tmp_path) == ["Hello there."]
    assert "is up to date" in prefkit("build", path).out
    recorded = json.loads((tmp_path / "d" / "manifest.json").read_text(encoding="utf-8"))["sources"]
    assert [file["path"] for file in recorded] == ["r.jsonl", *sorted(files)]
    (tmp_path / changed).write_text(CALM.format(","), encoding="utf-8")
    assert "is up to date" not in prefkit("build", path).out
    assert made_by(tmp_path) == ["Hello there,"]
    assert not [*tmp_path.rglob("*.pyc")]


def test_a_module_of_the_same_name_in_another_directory_is_another_module(
    pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / pipeline({"function": "same_name:calm"})
    for folder, end in (("first", "."), ("second", ",")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(CALM.format(end), encoding="utf-8")
        (tmp_path / folder / "r.jsonl").write_bytes((tmp_path / "r.jsonl").read_bytes())
        monkeypatch.chdir(tmp_path / folder)
        assert prefkit("build", str(path)).code == 0
        assert made_by(tmp_path / folder) == [f"Hello there{end}"]


def test_an_installed_module_may_hold_the_function(
    pipeline: Callable[..., str], prefkit: Prefkit, tmp_path: Path
) -> None:
    assert prefkit("build", pipeline({"function": "html:escape"}, responses=["a & b"])).code == 0
    assert made_by(tmp_path) == ["a &amp; b"]


def test_modules_of_prefkit_stay_loaded_where_rules_import_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository itself the package lies in the working directory."""
    monkeypatch.chdir(REPOSITORY)
    before = sys.modules["prefkit.text"]
    rule = RewriteRule(function="prefkit.text:printable")
    assert make_rules([rule])[0].apply("a\x07") == "a\ufffd"
    assert sys.modules["prefkit.text"] is before


def test_two_rules_of_one_pattern_are_counted_apart(pipeline: Callable[..., str], prefkit: Prefkit) -> None:
    one, two = {"pattern": "Alpaca", "replace": "Nova"}, {"pattern": "Alpaca", "replace": "Nova", "ignore_case": True}
    out = prefkit("build", pipeline(one, two)).out
    assert "60.0% changed by Alpaca (rule 1)" in out  # rows 1, 4 and 5
    assert "40.0% changed by Alpaca (rule 2)" in out  # what is left: rows 3 and 4
