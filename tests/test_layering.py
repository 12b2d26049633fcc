"""The order of the rooms: a module imports only what stands above it, and nothing above the torch line crosses it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prefkit"
HEAVY = {"torch", "transformers", "accelerate", "tokenizers", "safetensors", "peft"}
FRAMES = [
    "errors",
    "format",
    "sample_format",
    "records",
    "text",
    "screen",
    "formats.reading",
    "formats.writing",
    "formats.turns",
    "formats.generic",
    "formats.comparisons",
    "formats.rewrite",
    "formats.fields",
    "formats.hh",
    "formats.alpaca_eval",
    "formats.argilla",
    "formats.helpsteer",
    "formats.lmarena",
    "formats.nectar",
    "formats.shp",
    "formats.stackexchange",
    "formats.summarize",
    "formats.ultrafeedback",
    "formats.trl",
    "formats.axolotl",
    "formats.llamafactory",
    "formats.ms_swift",
    "formats.nemo_rl",
    "formats.openai",
    "formats.openrlhf",
    "formats.ultrafeedback_binarized",
    "formats.distilabel",
    "formats",
    "pairs",
    "corrections",
    "comparisons",
    "quality",
    "pairing",
    "selection",
    "grams",
    "minhash",
    "buckets",
    "decontaminate",
    "keys",
    "validate",
    "cycles",
    "dedupe",
    "split",
    "audit",
    "audit.allow",
    "audit.counting",
    "audit.postings",
    "audit.significance",
    "audit.features",
    "audit.values",
    "audit.tokens",
    "audit.structure",
    "audit.probe",
    "audit.cover",
    "audit.evidence",
    "audit.shortcuts",
    "audit.repair",
    "audit.verdict",
    "audit.findings",
    "audit.alphabets",
    "intervals",
    "diversity",
    "win_rates",
    "measures",
    "verifiers",
]
FILES = [
    "documents",
    "sections",
    "build_settings",
    "train_settings",
    "sample_settings",
    "settings",
    "config",
    "rows",
    "checked",
    "shapes",
    "plans",
    "ingest",
    "sources",
    "detection",
    "evals",
    "views",
    "store",
    "target",
    "combinations",
    "tables",
    "reference_table",
    "evaluation_tables",
    "locks",
    "prompts",
    "candidate_folder",
    "scorer_options",
    "scored_folder",
    "spill",
    "ahead",
    "workers",
    "near",
    "comparing",
    "candidates",
    "functions",
    "preflight",
    "rewriting",
    "rejecting",
    "drafts",
    "accounts",
    "assembly",
    "additions",
    "front_matter",
    "card",
    "papers",
    "verification",
    "resolving",
    "build",
    "guard",
    "query",
    "results",
    "spans",
    "show",
    "row_files",
    "scored_rows",
    "export",
    "curves",
    "info",
    "run_facts",
    "holdings",
    "dataset",
    "run_charts",
    "run_page",
    "schemas",
]
BELOW = [
    "conversations",
    "controls",
    "encode",
    "adapters",
    "identity",
    "lora",
    "models",
    "boundaries",
    "judgement",
    "audits",
    "report",
    "openers",
    "mending",
    "repairs",
    "packing",
    "attention",
    "head",
    "logps",
    "layouts",
    "batches",
    "budget",
    "work",
    "processes",
    "scoring",
    "reference",
    "stops",
    "picking",
    "arena",
    "engines",
    "generation",
    "sample_work",
    "sample",
    "reward_models",
    "judge",
    "scorers",
    "score",
    "losses",
    "metrics",
    "optimizers",
    "schedule",
    "completions",
    "perf",
    "compiling",
    "signs",
    "gate",
    "sharding",
    "checkpoint",
    "best",
    "run",
    "trackers",
    "run_log",
    "updates",
    "policy",
    "job",
    "train",
    "perplexity",
    "held_out",
    "evaluation_plan",
    "evaluation_work",
    "evaluate",
    "stages",
    "sweep",
    "road",
    "integrations",
    "integrations.agreement",
    "integrations.row_hashes",
    "integrations.trl_settings",
    "integrations.trl",
    "integrations.pair_tensors",
    "integrations.pair_stream",
    "integrations.pytorch",
]
EDGE = [
    "terminal",
    "grid",
    "evaluation_view",
    "sides",
    "before_after",
    "sparklines",
    "run_view",
    "stopping",
    "road_view",
]
EDGE += ["demo", "demo.grammar", "demo.world", "demo.rating", "demo.tiny_model", "demo.walk"]
COMMANDS = ["output", "options", "data_commands", "model_commands", "cli"]
EDGE += [*COMMANDS, "__main__"]
ORDER = ["__init__", *FRAMES, *FILES, *BELOW, *EDGE]
# without torch in them, though they serve what stands below the line: bytes on disk, strings and ids
LIGHT_BELOW = {
    "conversations",
    "controls",
    "encode",
    "adapters",
    "identity",
    "batches",
    "boundaries",
    "judgement",
    "audits",
    "report",
    "repairs",
    "signs",
}
NO_FILES = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "read_parquet", "write_parquet"}


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def top_imports(tree: ast.Module) -> set[str]:
    """What importing the module imports: whole names, from the top level only (not under TYPE_CHECKING)."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere in it, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prefkit":
            base = node.module.removeprefix("prefkit").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base or "__init__")
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", [name for name in ORDER if name != "__init__"])
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert own_imports(MODULES[name]) <= above | {name}


@pytest.mark.parametrize("name", [*FRAMES, *FILES, *sorted(LIGHT_BELOW), "terminal", *COMMANDS])
def test_nothing_above_the_torch_line_imports_torch(name: str) -> None:
    imported = {whole.split(".")[0] for whole in top_imports(ast.parse(MODULES[name].read_text(encoding="utf-8")))}
    assert not imported & HEAVY


@pytest.mark.parametrize("name", FRAMES)
def test_frames_touch_no_files(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert not called & NO_FILES


def test_the_command_line_imports_nothing_heavy_before_a_handler_runs() -> None:
    wholes = [whole for name in COMMANDS for whole in top_imports(ast.parse(MODULES[name].read_text(encoding="utf-8")))]
    imported = {whole.split(".")[0] for whole in wholes}
    assert imported <= {"io", "json", "os", "shlex", "signal", "sys", "traceback", "typing", "typer", "prefkit"}
    own = {whole.split(".")[1] for whole in wholes if whole.startswith("prefkit.")}
    assert own <= set(COMMANDS)


def test_trl_and_datasets_are_imported_by_one_module_alone() -> None:
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if {whole.split(".")[0] for whole in modules} & {"trl", "datasets"}:
                found.add(name)
    assert found == {"integrations.trl"}
