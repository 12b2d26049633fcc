"""The README and the pages in docs/: each block of code runs where its reader would run it, and prints what is shown.

A reader has walked `prefkit demo`: the commands of all pages run in order, README.md first, in one folder that holds
demo/ without its dataset, which they make again. YAML is a whole pipeline and is built, or some sections of one and is
checked; Python runs in a process of its own a block, SQL over demo/dataset. What cannot run is listed with the reason.
"""

import gzip
import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Prefkit
from documented import PROGRAMS, Block, Command, blocks_of, commands_of, untrue
from readers import REPOSITORY, Reader, failure_of, in_a_process, own_programs

from prefkit.config import load_pipeline
from prefkit.demo.walk import pipeline_text
from prefkit.demo.world import write_world
from prefkit.errors import PrefkitError
from prefkit.query import query_dataset
from prefkit.settings import AUDITED, AuditLimits

# pages whose blocks another test runs: they go on from one another, or keep `datasets` off the user's cache
OF_ANOTHER_TEST = {
    "docs/api.md": "test_docs.py",
    "docs/python.md": "test_docs.py",
    "docs/huggingface.md": "test_huggingface.py",
}
DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = ["README.md", *(page for page in DOCS if page not in OF_ANOTHER_TEST)]
# of demo/model/model.safetensors: where it is another one, float rounding is another, and numbers may only be near
WEIGHTS = "632556f7167814e750c6d8159e70afa1ceddd12803d337dd3c5d5ba3590eac0c"
NEEDS_A_MODEL = re.compile(  # a column that is called reference needs none
    r"\b(precompute|train|train_dpo|reference(?!\")|steps|perf|pair_dynamics|learning|runs|torch|run|sample|sweep|judge|on_policy)\b"
)
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)  # the line that a line of Python prints
DRAWING = "a drawing"
INSTALLS = "it fetches prefkit and what it needs; .ci/run goes this way on a clean clone"
SEVERAL = "several processes: tests/test_processes.py, test_train_processes.py and test_sharding.py start them"
ADAPTERS = "an adapter of the reader's own: tests/test_lora.py and test_lora_training.py make some"
# page and first line of a block of text, or of a command, that is not run -> why
NOT_RUN = {
    (
        "README.md",
        "prompts -> sample -> score -> sources",
    ): DRAWING,
    ("README.md", "git clone <this repository> prefkit && cd prefkit"): INSTALLS,
    (
        "README.md",
        "accelerate launch --multi_gpu --num_processes 2 -m prefkit precompute demo/dataset    # or torchrun",
    ): SEVERAL + "; this one asks for two GPUs",
    ("README.md", "prefkit run demo/on_policy.yaml"): "docs/on_policy.md runs it; its lines are compared below",
    (
        "docs/audit.md",
        "words, characters, lines, sentences, model_tokens, bold, list_items, headers, table_rows, code_fences,",
    ): "a list of names, compared below with those there are",
    (
        "docs/evaluation.md",
        "RUN/evaluations/<key>/   evaluation.json   written last: identity, settings, headline, warnings",
    ): DRAWING,
    ("docs/kernel.md", "[prompt | chosen | rejected]        P + C + R tokens in place of 2P + C + R"): DRAWING,
    (
        "docs/kernel.md",
        "scoring on cpu in float32, packed rows, prompts shared (packed attention)",
    ): "what is said of two models; tests/test_architectures.py has who gets which rows",
    (
        "docs/sampling.md",
        "CANDIDATES/   sampler.json   first: all that decides the samples (identity), the key made of it, and how the "
        "model is run",
    ): DRAWING,
    (
        "docs/sql.md",
        'cd demo/dataset && duckdb -init views.sql -csv -c "SELECT split, count(*) FROM pairs GROUP BY ALL"',
    ): "DuckDB's own client, which tests/test_sql_queries.py runs",
    ("docs/training.md", "runs/<n>/   run.json         settings, policy, reference, gate, warnings, result"): DRAWING,
    ("docs/training.md", "torchrun --nproc_per_node 4 -m prefkit train DATASET"): SEVERAL,
    ("docs/training.md", "error: process 1 (4242 on node3) of 2 is gone"): SEVERAL,
    ("docs/training.md", "prefkit precompute DATA --model sft-adapter/"): ADAPTERS,
    ("docs/trl.md", "trainer = DPOTrainer("): "of an old trl: tests/test_integration_old_trl.py runs it",
    (
        "docs/training.md",
        'AutoPeftModelForCausalLM.from_pretrained("sft-adapter").merge_and_unload().save_pretrained("sft-model")',
    ): ADAPTERS,
}
# files that the pages speak of as the reader's own -> what stands for them
OWN_FILES = {"hh.jsonl.gz": "pipelines/data/transcripts.jsonl"}
# page and first line of what a block shows of the demo
DEMO_ENDS = ("README.md", "what was planted, and what became of it")
# blocks and commands that are not true yet, and a part of what is wrong: whoever mends one takes it out here
UNTRUE: dict[tuple[str, str], str] = {}


def page_blocks() -> list[Block]:
    pages = PAGES
    return [block for page in pages for block in blocks_of(page, (REPOSITORY / page).read_text(encoding="utf-8"))]


def commands() -> list[Command]:
    return [command for block in page_blocks() if block.kind == "commands" for command in commands_of(block)]


# what covers what


def test_a_block_of_text_is_listed_with_the_reason_why_it_does_not_run() -> None:
    texts = [block.name for block in page_blocks() if block.kind == "text"]
    assert [name for name in texts if name not in {*NOT_RUN, DEMO_ENDS}] == []


def test_a_command_of_another_program_is_listed_with_the_reason_why_it_does_not_run() -> None:
    others = [command.name for command in commands() if command.words[0] not in PROGRAMS]
    assert [name for name in others if name not in NOT_RUN] == []


def test_what_is_listed_is_there() -> None:
    there = {block.name for block in page_blocks()} | {command.name for command in commands()}
    assert [name for name in (*NOT_RUN, DEMO_ENDS, *UNTRUE) if name not in there] == []


def test_a_page_of_another_test_is_there_and_its_test_names_it() -> None:
    for page, test in OF_ANOTHER_TEST.items():
        assert page in DOCS
        assert f'"{Path(page).name}"' in (REPOSITORY / "tests" / test).read_text(encoding="utf-8")


def test_no_two_things_that_are_listed_or_run_have_one_name() -> None:
    names = [block.name for block in page_blocks() if block.kind != "commands"] + [
        command.name for command in commands()
    ]
    listed = [name for name in names if name in NOT_RUN or name in UNTRUE]
    assert len(listed) == len(set(listed))


def test_the_road_in_the_readme_is_that_of_its_page() -> None:
    told = {c.page: c for c in commands() if c.words == ["prefkit", "run", "demo/on_policy.yaml"]}
    shown = [line for line in told["README.md"].shown if line != "..."]
    assert len(shown) >= 4
    assert [line for line in shown if line not in told["docs/on_policy.md"].shown] == []


def test_the_features_that_may_be_allowed_are_those_there_are() -> None:
    (block,) = [block for block in page_blocks() if block.name[0] == "docs/audit.md" and block.kind == "text"]
    assert re.split(r",\s+", block.text) == AUDITED


def test_the_limits_of_the_audit_are_those_that_its_page_says() -> None:
    page = (REPOSITORY / "docs" / "audit.md").read_text(encoding="utf-8")
    said: dict[str, float | str] = {}
    table = page.split("| `audit.limits` |")[1].split("\n\n")[0]
    for names, values in re.findall(r"^\| ((?:`\w+`(?: / )?)+) \| ([\w. /]+) \|", table, re.MULTILINE):
        for name, value in zip(re.findall(r"\w+", names), values.split(" / "), strict=True):
            said[name] = value if value.isalpha() else float(value)
    assert said == AuditLimits().model_dump()


@pytest.mark.parametrize("page", [*PAGES, "pipelines/README.md", "CONTRIBUTING.md"])
def test_what_a_page_links_to_or_names_is_there(page: str) -> None:
    text, folder = (REPOSITORY / page).read_text(encoding="utf-8"), (REPOSITORY / page).parent
    linked = {folder / target for target in re.findall(r"\]\((?!http)([^)#]+)", text)}
    named = {
        REPOSITORY / path for path in re.findall(r"\b(?:tests|benchmarks|pipelines|schemas|docs)/[\w/.]+\.\w+", text)
    }
    assert [str(path) for path in sorted(linked | named) if not path.exists()] == []


# the walk


@pytest.fixture
def reader(tmp_path: Path, prefkit: Prefkit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reader]:
    """Somebody with demo/ but for its dataset: a copy of the whole one, or its files alone, without a model."""

    def begin(demo: Path | None = None) -> Reader:
        weights = WEIGHTS
        if demo is None:
            write_world(tmp_path / "demo" / "world", 0)
            (tmp_path / "demo" / "pipeline.yaml").write_text(pipeline_text(Path("demo")), encoding="utf-8")
        else:
            shutil.copytree(demo, tmp_path / "demo", ignore=shutil.ignore_patterns("dataset"))
            weights = hashlib.sha256((demo / "model" / "model.safetensors").read_bytes()).hexdigest()
        for name, data in OWN_FILES.items():
            (tmp_path / name).write_bytes(gzip.compress((REPOSITORY / data).read_bytes()))
        own_programs(tmp_path, monkeypatch)
        return Reader(tmp_path, prefkit, weights == WEIGHTS)

    return begin


def failure_of_block(block: Block, reader: Reader) -> str | None:
    if block.kind == "python":
        code, printed = in_a_process(reader.folder, sys.executable, "-c", block.text)
        missing = [line for line in PRINTED.findall(block.text) if line not in printed.splitlines()]
        return None if code == 0 and not missing else f"exits with {code}, without {missing}:\n{printed}"
    if block.kind == "yaml":
        return failure_of_yaml(block, reader)
    try:
        for statement in filter(str.strip, block.text.split(";")):
            query_dataset(reader.folder / "demo" / "dataset", statement).fetchall()
    except PrefkitError as error:
        return str(error)
    return None


def failure_of_yaml(block: Block, reader: Reader) -> str | None:
    """A whole pipeline is built, elsewhere than it says; sections are checked beside what a pipeline must have."""
    sections: dict[str, Any] = yaml.safe_load(block.text)
    path = reader.folder / "block.yaml"
    if {"dataset", "sources"} <= set(sections):
        path.write_text(block.text, encoding="utf-8")
        ended = reader.prefkit("build", str(path), "--out", f"built/{block.line}")
        return None if ended.code == 0 else ended.out + ended.err
    needed = {"dataset": "stub", "sources": [{"path": "stub.jsonl", "format": "pairs"}]}
    path.write_text(yaml.safe_dump({**needed, **sections}), encoding="utf-8")
    try:
        load_pipeline(path)
    except PrefkitError as error:
        return str(error)
    return None


def failures(reader: Reader, demo_said: str | None) -> dict[tuple[str, str], str]:
    """What is untrue on the pages, by the name of the block or command; without a demo, of those that need no model."""
    found: dict[tuple[str, str], str | None] = {}
    for block in page_blocks():
        if block.name == DEMO_ENDS and demo_said is not None:
            found[block.name] = untrue(["...", *block.text.splitlines(), "..."], demo_said, exact=reader.exact)
        if block.kind == "text" or block.name in NOT_RUN:
            continue
        items: list[Block | Command] = list(commands_of(block)) if block.kind == "commands" else [block]
        for item in items:
            needs_a_model = block.kind == "python" or (block.kind != "yaml" and NEEDS_A_MODEL.search(item.text))
            if item.name in NOT_RUN or (needs_a_model and demo_said is None):
                continue
            run = failure_of(item, reader) if isinstance(item, Command) else failure_of_block(item, reader)
            found[item.name] = run
    return {name: told for name, told in found.items() if told is not None}


def all_of(found: dict[tuple[str, str], str]) -> str:
    """What is untrue and not listed as such, for somebody to read."""
    new = {name: told for name, told in found.items() if UNTRUE.get(name, "\0") not in told}
    return "\n\n".join(f"{page}: {first}\n{told}" for (page, first), told in new.items())


def test_what_needs_no_model_runs_and_prints_what_the_pages_show(reader: Callable[..., Reader]) -> None:
    assert all_of(failures(reader(), None)) == ""


@pytest.mark.slow
def test_every_block_of_the_pages_runs_and_prints_what_they_show(
    reader: Callable[..., Reader], demo_walked: tuple[Path, str]
) -> None:
    demo, said = demo_walked
    found = failures(reader(demo), said)
    assert all_of(found) == ""
    assert set(found) == set(UNTRUE), "what is true now is still listed in UNTRUE"


@pytest.mark.slow
def test_numbers_of_the_model_are_compared_to_the_digit(
    reader: Callable[..., Reader], demo_walked: tuple[Path, str]
) -> None:
    if not reader(demo_walked[0]).exact:
        pytest.skip("this processor rounds otherwise: the demo's model is another one, its numbers need be near only")
