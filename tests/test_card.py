"""The card of a dataset: its YAML for the hub, its Markdown for a person, and that no text of the data is either."""

import html
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from command import Prefkit
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from prefkit.additions import added_sources, earlier_sources
from prefkit.assembly import Base
from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.card import as_code, as_text, shown_path
from prefkit.config import Pipeline, load_pipeline
from prefkit.errors import ConfigError
from prefkit.front_matter import PLAIN, front_matter, hub_license, license_of
from prefkit.repairs import repair_dataset
from prefkit.store import read_manifest, write_json
from prefkit.text import visible

WriteJsonl = Callable[..., Path]
PipelineOf = Callable[..., Pipeline]
MARKDOWN = MarkdownIt("commonmark").enable("table")
HOSTILE = [
    "a|b",
    "a\\|b",
    "`code` `` and ``` more",
    "`",
    "\\",
    "line\nbreak\r\nand\ttab",
    "---",
    "# no heading",
    "[a](http://evil.example) ![b](x.png)",
    "<script>alert(1)</script> <img src=x onerror=y>",
    "&lt;b&gt; &#60;",
    "*a* _b_ ~~c~~ $x$",
    "http://evil.example www.evil.example a@evil.example",
    "right\u202eto left\u2028line\u0085next\ufeff\x1b[31m\x00",
    "  spaces  ",
    "- item\n- item",
    "| --- |",
    "'; drop table pairs; --",
    "{{ jinja }} {% x %}",
    ': "yaml" # no comment',
    "12345678e9012345",
    "no",
    "\u96ea \U0001f600 e\u0301",
]


def card_of(dataset: str | Path) -> str:
    return (Path(dataset) / "README.md").read_text(encoding="utf-8")


def told_of(dataset: str | Path) -> dict[str, Any]:
    """The YAML as the hub's own reader gives it."""
    data: dict[str, Any] = DatasetCard.load(Path(dataset) / "README.md").data.to_dict()
    return data


def rows(count: int = 4, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"p{n} {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(first, first + count)]


@pytest.fixture
def pairs(write_jsonl: WriteJsonl, pipeline_of: PipelineOf) -> Callable[..., Pipeline]:
    """A pipeline over files of four pairs each, with the settings of each source."""

    def make(*sources: Mapping[str, Any], **sections: Any) -> Pipeline:
        files = [
            {"path": str(write_jsonl(f"{n}.jsonl", rows(first=10 * n))), "format": "pairs", **source}
            for n, source in enumerate(sources or [{}])
        ]
        return pipeline_of(*files, **{"split": {"test_share": 0}} | sections)

    return make


# for programs


def test_the_yaml_says_what_the_hub_asks_for(pairs: Callable[..., Pipeline]) -> None:
    pipeline = pairs(card={"pretty_name": "Our pairs: v1", "language": ["en", "no"], "license": "CC BY 4.0"})
    build_dataset(pipeline)
    told = told_of(pipeline.dataset)
    configs, infos = told.pop("configs"), told.pop("dataset_info")
    assert told == {
        "pretty_name": "Our pairs: v1",
        "language": ["en", "no"],
        "license": "cc-by-4.0",
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "prefkit"],
        "size_categories": ["n<1K"],
    }
    train = {"split": "train", "path": ["pairs/part-train-00000.parquet"]}
    assert configs == [{"config_name": "pairs", "default": True, "data_files": [train]}]
    splits = [{"name": "train", "num_bytes": 0, "num_examples": 4}]
    assert infos == {"config_name": "pairs", "splits": splits} or infos == [{"config_name": "pairs", "splits": splits}]
    assert card_of(pipeline.dataset).splitlines()[0] == "---"


@pytest.mark.parametrize("text", [*HOSTILE, "", "y", "off", "~", "=", "0x1f", "1:30", "1e3", "2024-01-01", "deadbeef"])
def test_a_text_in_the_yaml_is_read_back_as_that_text_by_every_yaml(text: str) -> None:
    written = front_matter({"key": text, "list": [text]})
    lines = written.splitlines()
    assert (lines[0], lines[-1]) == ("---", "---")
    assert "---" not in lines[1:-1]
    assert len(lines) == 5
    assert yaml.safe_load("\n".join(lines[1:-1])) == {"key": text, "list": [text]}
    scalar = lines[1].removeprefix("key: ")
    # what is not quoted is a plain word in YAML 1.1 and 1.2 alike: it begins with a letter and is no word of theirs
    assert scalar[0] == scalar[-1] == '"' or re.fullmatch(r"[a-z][a-z0-9_./-]*", scalar)


def test_words_that_mean_something_in_yaml_are_quoted_and_paths_are_not() -> None:
    quoted = [
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
        "true",
        "false",
        "null",
        "nan",
        "inf",
        "1a",
        "9e9",
        "e 3",
        "A",
        ".inf",
    ]
    assert [text for text in quoted if PLAIN.fullmatch(text)] == []
    plain = ["pairs", "pairs/part-train-00000.parquet", "reference/9c38e9b8932a5972/part-00000.parquet", "cc-by-4.0"]
    assert [text for text in plain if not PLAIN.fullmatch(text)] == []


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**7, "n>10M")],
)
def test_the_size_is_that_of_the_pairs(size: int, wanted: str, pairs: Callable[..., Pipeline]) -> None:
    from prefkit.front_matter import CardFacts, metadata

    pipeline = pairs()
    build_dataset(pipeline)
    manifest = read_manifest(Path(pipeline.dataset))
    told = metadata(CardFacts(manifest | {"counts": manifest["counts"] | {"pairs": size}}, None, []))
    assert told["size_categories"] == [wanted]


# licenses


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mit", "mit"),
        ("MIT", "mit"),
        ("Apache-2.0", "apache-2.0"),
        ("CC BY-SA 4.0", "cc-by-sa-4.0"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("LGPL-2.1-only", "lgpl-2.1"),
        ("openrail++", "openrail++"),
        ("aphache-2.0", None),
        ("ours", None),
    ],
)
def test_a_license_is_the_hubs_id_where_it_has_one(name: str, wanted: str | None) -> None:
    assert hub_license(name) == wanted


@pytest.mark.parametrize(
    ("told", "of_sources", "wanted"),
    [
        (None, [None, None], {}),
        (None, ["MIT", "mit"], {"license": "mit"}),
        (None, ["mit", "cc-by-4.0"], {"license": "other", "license_name": "mixed"}),
        (None, ["mit", None], {"license": "other", "license_name": "mixed"}),
        (None, ["Our Terms (2026)", "Our Terms (2026)"], {"license": "other", "license_name": "our-terms-2026"}),
        (None, ["\u6761\u6b3e"], {"license": "other", "license_name": "see-below"}),
        (None, ["", ""], {}),
        (None, ["", None], {}),
        ("", ["mit"], {"license": "mit"}),
        (None, ["mit", ""], {"license": "other", "license_name": "mixed"}),
        ("odc-by", ["mit", None], {"license": "odc-by"}),
        ("Our Terms", ["mit"], {"license": "other", "license_name": "our-terms"}),
    ],
)
def test_the_license_of_the_whole(told: str | None, of_sources: list[str | None], wanted: dict[str, str]) -> None:
    assert license_of(told, of_sources) == wanted


def test_two_names_that_the_hub_does_not_know_are_mixed() -> None:
    assert license_of(None, ["one thing", "another"]) == {"license": "other", "license_name": "mixed"}


def test_each_source_is_shown_with_its_license_and_hash(pairs: Callable[..., Pipeline]) -> None:
    pipeline = pairs({"license": "MIT"}, {"license": "Terms | of <ours>"}, {})
    build_dataset(pipeline)
    hashes = [file["sha256"] for file in read_manifest(Path(pipeline.dataset))["sources"]]
    found = [cells for cells in tables_of(card_of(pipeline.dataset)) if cells[0].endswith(".jsonl")]
    assert found == [
        ["0.jsonl", "pairs", "4", "MIT", hashes[0]],
        ["1.jsonl", "pairs", "4", "Terms | of <ours>", hashes[1]],
        ["2.jsonl", "pairs", "4", "not told", hashes[2]],
    ]
    told = told_of(pipeline.dataset)
    assert (told["license"], told["license_name"]) == ("other", "mixed")


def test_a_license_or_a_title_alone_changes_the_card_and_nothing_else(pairs: Callable[..., Pipeline]) -> None:
    first = pairs({}, {})
    build_dataset(first)
    audit_dataset(first)
    folder = Path(first.dataset)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    changed = pairs({"license": "mit"}, {"license": "MIT"}, card={"pretty_name": "New"})
    assert build_dataset(changed).unchanged
    after = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} == {"manifest.json", "README.md"}
    assert set(before) == set(after)
    manifest = read_manifest(folder)
    assert [file["license"] for file in manifest["sources"]] == ["mit", "MIT"]
    assert [source["license"] for source in manifest["pipeline"]["sources"]] == ["mit", "MIT"]
    assert (told_of(folder)["license"], told_of(folder)["pretty_name"]) == ("mit", "New")
    assert "Verdict: " in card_of(folder)
    assert build_dataset(changed).unchanged
    assert {path: path.read_bytes() for path in after} == after


def test_an_addition_takes_the_licenses_of_all_sources_along(pairs: Callable[..., Pipeline]) -> None:
    build_dataset(pairs({}))
    both = pairs({"license": "mit"}, {"license": "cc0-1.0"})
    built = build_dataset(both)
    assert built.added is not None
    assert [file["license"] for file in read_manifest(Path(both.dataset))["sources"]] == ["mit", "cc0-1.0"]
    base = Base(Path(both.dataset), read_manifest(Path(both.dataset)))
    swapped = both.model_copy(update={"sources": both.sources[::-1]})
    assert added_sources(base, swapped) == []
    assert [source.license for source in earlier_sources(base.manifest, swapped)] == ["mit", "cc0-1.0"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("card.license=' mit'", "card.license = ' mit' does not fit"),
        ("card.pretty_name=''", "card.pretty_name = '' does not fit"),
        ('card.pretty_name="a\\nb"', "card.pretty_name = 'a\\nb' does not fit"),
        ("card.language=[english]", "card.language = 'english' does not fit"),
        ("card.title=x", "unknown key card.title"),
    ],
)
def test_what_a_card_cannot_say_is_refused_by_name(change: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("dataset: d\nsources: [{path: x, license: mit}]\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_pipeline(tmp_path / "p.yaml", [change])
    assert refused.value.message == named


# for a person


def tables_of(card: str) -> list[list[str]]:
    """The cells of every row of every table, as a reader sees them; a tag that is not ours fails."""
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", MARKDOWN.render(card.split("---\n", 2)[2]), re.DOTALL):
        cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)
        assert not re.search(r"<(?!/?(?:code|strong)>)", "".join(cells)), cells
        found.append([html.unescape(re.sub(r"</?(?:code|strong)>", "", cell)) for cell in cells])
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_a_table_stays_one_cell_and_is_shown_as_it_is(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {as_code(text)} | end |\n"
    rendered = MARKDOWN.render(table)
    assert rendered.count("<td>") == 2
    assert f"<td><code>{html.escape(visible(text), quote=True)}</code></td>" in rendered.replace("&#x27;", "'").replace(
        "'", "&#x27;"
    )
    assert "|" not in as_code(text)  # renderers differ in what a backslash before it does


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_a_heading_is_no_markup(text: str) -> None:
    tokens = MARKDOWN.parse(f"# {as_text(visible(text))}\n\nnext\n")
    assert [token.type for token in tokens[:3]] == ["heading_open", "inline", "heading_close"]
    inline = tokens[1].children or []
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(token.content for token in inline) == visible(text).strip()


def test_what_cannot_be_seen_is_escaped_and_what_is_too_long_is_cut() -> None:
    assert visible("a\nb\u202e\u00a0\U0001f600\x00") == "a\\u000ab\\u202e\\u00a0\U0001f600\\u0000"
    assert as_code("x" * 200) == f"`{'x' * 200}`"
    assert as_code("x" * 201) == f"`{'x' * 199}\u2026`"


def test_a_path_is_shown_without_the_place_where_it_lies() -> None:
    assert [shown_path(path) for path in ("/home/someone/a.jsonl", "data/a.jsonl", "../a.jsonl")] == [
        *("`a.jsonl`", "`data/a.jsonl`", "`../a.jsonl`")
    ]


@pytest.mark.parametrize("name", [name for name in HOSTILE if "/" not in name and "\0" not in name])
def test_the_name_of_a_file_is_data(name: str, tmp_path: Path, pipeline_of: PipelineOf) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    pipeline = pipeline_of({"path": "".join(f"[{c}]" if c in "*?[" else c for c in str(path)), "format": "pairs"})
    build_dataset(pipeline)
    card = card_of(pipeline.dataset)
    assert [cells[0] for cells in tables_of(card) if len(cells) == 5] == ["source", f"{visible(name)}.jsonl"]
    assert str(tmp_path) not in card
    assert "configs" in told_of(pipeline.dataset)


def hostile_audit(pipeline: Pipeline) -> None:
    """An audit whose findings have the hostile names: a tokenizer may give tokens any text."""
    audit_dataset(pipeline)
    path = Path(pipeline.dataset) / "audit" / "audit.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    keys = ("reason", "advice", "alphabet", "n", "p", "q", "p_permutation", "z_length", "win_rate_low", "win_rate_high")
    empty = dict.fromkeys(keys) | {"reason": "", "advice": "", "also": [], "pair_ids": [], "sources": {}}
    one = {"level": "warn", "family": "tokens", "side": "chosen", "num_pairs": 3, "coverage": 0.25, "win_rate": 1.0}
    findings = [empty | one | {"name": name} for name in HOSTILE]
    write_json(path, document | {"findings": findings, "verdict": "warn"})


def test_the_names_of_findings_are_data_and_the_first_twenty_are_shown(pairs: Callable[..., Pipeline]) -> None:
    pipeline = pairs()
    build_dataset(pipeline)
    hostile_audit(pipeline)
    build_dataset(pairs(card={"pretty_name": HOSTILE[0]}))  # writes the card anew
    card = card_of(pipeline.dataset)
    found = [cells for cells in tables_of(card) if cells[0] == "warn"]
    assert found == [["warn", "tokens", visible(name), "chosen", "3", "25.0%", "100.0%"] for name in HOSTILE[:20]]
    assert f"And {len(HOSTILE) - 20} more; all of it: `audit/audit.json`." in card
    assert "Verdict: **warn**, over 4 pairs. What gives chosen away:" in card


def test_the_card_follows_every_step(pairs: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = pairs(split={"test_share": 0.4})
    folder = Path(pipeline.dataset)
    build_dataset(pipeline)
    assert "None yet: `prefkit audit DATASET`." in card_of(folder)
    assert "None yet: `prefkit precompute DATASET`." in card_of(folder)
    audit_dataset(pipeline)
    assert "Verdict: **not enough data**" in card_of(folder)
    names = [config["config_name"] for config in told_of(folder)["configs"]]
    assert names == ["pairs", "structure", "probe", "pair_scores"]  # tokens has no rows
    repair_dataset(str(folder), str(tmp_path / "new"), strip_openers=["good"], max_dropped=1)
    card = card_of(tmp_path / "new")
    assert "The pairs are those of `dataset` after these repairs, by `prefkit repair`:" in card
    assert str(tmp_path) not in card


def test_the_counts_are_those_of_the_manifest(pairs: Callable[..., Pipeline], write_jsonl: WriteJsonl) -> None:
    pipeline = pairs()
    write_jsonl("0.jsonl", [*rows(6), {"prompt": "x", "chosen": "a", "rejected": "a"}, *rows(1)])
    built = build_dataset(pipeline)
    cells = {row[0]: row[1] for row in tables_of(card_of(pipeline.dataset)) if len(row) == 2}
    assert (cells["rows"], cells["pairs"], cells["dropped"]) == ("8", "6", "2")
    assert {name: int(cells[name]) for name in built.reasons} == built.reasons == {"duplicate": 1, "identical": 1}
    kinds = [row for row in tables_of(card_of(pipeline.dataset)) if row[0] in ("pairs", "dropped") and len(row) == 3]
    assert [row[:2] for row in kinds] == [["pairs", "train 6"], ["dropped", "dropped 2"]]


def test_a_damaged_audit_or_reference_keeps_no_card_from_being_written(pairs: Callable[..., Pipeline]) -> None:
    pipeline = pairs()
    build_dataset(pipeline)
    folder = Path(pipeline.dataset)
    (folder / "audit").mkdir()
    (folder / "audit" / "audit.json").write_text("{", encoding="utf-8")
    (folder / "reference" / "0123456789abcdef").mkdir(parents=True)
    (folder / "reference" / "0123456789abcdef" / "reference.json").write_text("{}", encoding="utf-8")
    build_dataset(pairs(card={"pretty_name": "New"}))
    assert "# New\n" in card_of(folder)
    assert "0123456789abcdef" not in card_of(folder)


def test_the_same_rows_give_the_same_card_wherever_they_lie(pairs: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = pairs()
    cards = []
    for name in ("one", "deep/other"):
        build_dataset(pipeline.model_copy(update={"dataset": str(tmp_path / name)}))
        cards.append(card_of(tmp_path / name))
    assert cards[0] == cards[1]


def test_the_code_blocks_of_a_card_run(pairs: Callable[..., Pipeline], prefkit: Prefkit, tmp_path: Path) -> None:
    pipeline = pairs(split={"test_share": 0.4})
    build_dataset(pipeline)
    blocks = re.findall(r"```(\w+)\n(.*?)```", card_of(pipeline.dataset), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python", "sh"]
    found: dict[str, Any] = {}
    exec(blocks[1][1].replace("DATASET", pipeline.dataset), found)  # the first: tests/test_huggingface.py
    assert set(found["pairs"]["split"]) == {"train"}
    assert isinstance(found["pairs"], pl.DataFrame)
    commands = [line.partition(" #")[0].split() for line in blocks[2][1].splitlines()]
    assert [command[0] for command in commands] == ["prefkit", "cd"]
    assert prefkit(*(pipeline.dataset if word == "DATASET" else word for word in commands[0][1:])).code == 0
