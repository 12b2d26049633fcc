"""schemas/ is generated, and what commands write fits it."""

import json
import re
from pathlib import Path

import yaml

import prefkit
from prefkit.config import Pipeline
from prefkit.schemas import schema_files

REPOSITORY = Path(__file__).parent.parent


def test_the_files_in_schemas_are_current() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "schemas").iterdir()}
    assert on_disk == schema_files(), "run `make schemas`"


def test_every_table_column_is_documented_once() -> None:
    page = (REPOSITORY / "schemas" / "FORMAT.md").read_text(encoding="utf-8")
    section = page.split("## pairs\n")[1].split("\n## ")[0]
    columns = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert columns[:7] == ["pair_id", "prompt_id", "prompt", "chosen", "rejected", "tools", "split"]
    assert len(columns) == len(set(columns)) == 22


def test_a_schema_is_json_schema_with_the_documented_keys() -> None:
    schema = json.loads((REPOSITORY / "schemas" / "manifest.schema.json").read_text(encoding="utf-8"))
    assert set(schema["required"]) == {
        "format_version",
        "prefkit_version",
        "kind",
        "pipeline",
        "sources",
        "evals",
        "additions",
        "counts",
        "reasons",
        "unused",
        "report",
        "parts",
    }
    assert schema["additionalProperties"] is False


def test_the_pipeline_in_the_readme_is_one() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    pipeline = Pipeline.model_validate(yaml.safe_load(block.group(1)))
    assert [source.format for source in pipeline.sources] == ["candidates", "corrections", "trl"]


def test_the_names_that_the_readme_imports_are_there() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"prefkit\.(\w+)\(", readme))
    steps = {"build_dataset", "audit_dataset", "repair_dataset", "precompute_reference", "train_dpo", "query_dataset"}
    assert {*steps, "open_dataset", "torch_dataset"} <= names <= set(prefkit.__all__)
    assert all(callable(getattr(prefkit, name)) for name in prefkit.__all__ if name != "__version__")
