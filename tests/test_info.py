"""`prefkit info` of a dataset: what later builds added to it, and what is nearly the same in it."""

import json
from pathlib import Path

import yaml
from command import Prefkit

LONG = "the quick brown fox jumps over the lazy dog near the old river bank while children watch from a"


def write_pairs(path: Path, prompts: list[str]) -> None:
    rows = [{"prompt": p, "chosen": f"good {i} {p}", "rejected": f"bad {i}"} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pipeline(folder: Path, *names: str) -> None:
    sources = [{"path": name, "format": "pairs"} for name in names]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"dataset": "data", "sources": sources}))


def test_additions_and_near_duplicates_are_told(prefkit: Prefkit, tmp_path: Path) -> None:
    twins = [f"{LONG} bridge", f"{LONG} tower"]
    write_pairs(tmp_path / "a.jsonl", [*twins, "what is rust?", "how do bees dance?"])
    write_pipeline(tmp_path, "a.jsonl")
    assert prefkit("build", "pipeline.yaml").code == 0
    first = prefkit("info", "data", "--json").last_json()
    assert "additions" not in first
    assert first["near_duplicates"]["num_prompt_clusters"] == 3
    assert first["near_duplicates"]["largest_prompt_cluster"] == 2

    write_pairs(tmp_path / "b.jsonl", ["why is the sky blue?", "who wrote this?"])
    write_pipeline(tmp_path, "a.jsonl", "b.jsonl")
    assert prefkit("build", "pipeline.yaml").code == 0
    second = prefkit("info", "data", "--json").last_json()
    assert second["additions"] == [{"sources": ["b.jsonl"], "pairs": 2}]
    assert set(second) - set(first) == {"additions"}
    lines = prefkit("info", "data").out.splitlines()
    at = lines.index("additions: 1")
    assert lines[at + 1] == "  2 pairs from b.jsonl"
    assert lines[at + 2].startswith("near-duplicates: 0 clusters; prompts are in 5 clusters, the largest has 2 pairs")


def test_a_dataset_without_near_duplicates_setting_or_pairs_says_nothing_of_them(
    prefkit: Prefkit, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "a.jsonl", ["one", "two"])
    write_pipeline(tmp_path, "a.jsonl")
    assert prefkit("build", "pipeline.yaml", "--set", "dedupe.near_duplicates=null").code == 0
    found = prefkit("info", "data", "--json").last_json()
    assert "near_duplicates" not in found
    assert "additions" not in found
    assert "near-duplicates" not in prefkit("info", "data").out


def test_a_candidates_folder_is_told_from_a_build_that_is_not_finished(prefkit: Prefkit, tmp_path: Path) -> None:
    folder = tmp_path / "my samples"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "sampler.json").write_text("{}")
    ended = prefkit("info", "my samples")
    assert ended.code == 2
    assert ended.err == (
        "error: my samples: holds samples of a model, and is neither a dataset nor a run\n"
        "  expected: a directory with manifest.json or run.json\n"
        "  next: prefkit score 'my samples' --scorer SPEC, or name it as a source of a pipeline\n"
    )
