"""`prefkit demo`: the whole road on the authored world, from flawed source files to an aligned tiny model.

Comes in: a folder to work in. Goes out: the source files, a tiny base model, a pipeline file, the dataset with its
reference and run, and on the terminal what was planted beside what was found. Every step is the public function of its
command, so what the demo shows is what a user gets.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from rich.console import Console

from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import load_pipeline
from prefkit.demo.tiny_model import one_thread, train_tiny_model
from prefkit.demo.world import (
    HELDOUT,
    PROMPTS,
    SHORTCUT_OPENER,
    WorldFacts,
    pretraining_texts,
    write_prompts,
    write_world,
)
from prefkit.errors import InputError
from prefkit.identity import SINGLE
from prefkit.query import connect_dataset
from prefkit.reference import precompute_reference
from prefkit.report import print_audit
from prefkit.terminal import print_build, print_precomputed, print_trained, step_progress, token_progress
from prefkit.train import train_dpo

SEED = 0
ON_POLICY = "on_policy.yaml"
# before training: does the reference already prefer chosen, a token? after: the sign of the reward margin
BEFORE = """
select avg(cast(ref_chosen_logps / num_chosen_tokens > ref_rejected_logps / num_rejected_tokens as double))
from reference join pairs using (pair_id) where split = 'test'
"""


def pipeline_text(folder: Path) -> str:
    """The pipeline file of the demo, with its paths below `folder`."""
    settings = {
        "dataset": str(folder / "dataset"),
        "kind": "chat",
        "sources": [
            {
                "path": str(folder / "world" / "candidates.jsonl"),
                "format": "candidates",
                "columns": {"prompt": "question", "response": "answer", "score": "rating", "model": "model"},
                "annotator": "model",
            },
            {
                "path": str(folder / "world" / "corrections.jsonl"),
                "format": "corrections",
                "columns": {"prompt": "question", "response": "draft", "correction": "edited"},
                "annotator": "human",
            },
            {"path": str(folder / "world" / "pairs.jsonl"), "format": "trl"},
        ],
        "split": {"test_share": 0.1},
        "precompute": {"model": str(folder / "model"), "max_length": 256},
        "train": {"learning_rate": 2e-4, "batch_size": 16, "max_steps": 60, "warmup_steps": 10, "eval_steps": 20},
    }
    return yaml.safe_dump(settings, sort_keys=False)


def on_policy_text(folder: Path) -> str:
    """The pipeline file of the demo's second road: the model's own answers, rated by the grammar."""
    own = folder / "on_policy"
    settings = {
        "dataset": str(own / "dataset"),
        "sample": {
            "prompts": str(folder / "world" / PROMPTS),
            "out": str(own / "candidates"),
            "n": 8,
            "max_new_tokens": 64,
        },
        "score": {"scorers": [{"function": "prefkit.demo.rating:rate", "scale": [0, 10]}]},
        "sources": [{"path": str(own / "candidates" / "scored" / "*.parquet"), "format": "candidates"}],
        "pairs": {"rejected": "all", "max_pairs_per_prompt": 4},
        "precompute": {"model": str(folder / "model"), "max_length": 256},
        "train": {"learning_rate": 1e-4, "batch_size": 16, "max_steps": 100, "warmup_steps": 10},
        "evaluate": {"prompts": str(folder / "world" / HELDOUT), "max_new_tokens": 64},
    }
    return yaml.safe_dump(settings, sort_keys=False)


@one_thread()
def run_demo(out: str | Path = "demo", console: Console | None = None) -> None:
    """Walk the whole road on a small authored world; a second call goes on where the first stopped.

    Args:
        out: the folder for its files: source files, a tiny model, a pipeline file and the dataset.
        console: where its words go; stdout by default.

    Raises:
        InputError: `out` is a folder that holds something else.

    Example:
        prefkit.run_demo("demo")
    """
    started, folder = time.monotonic(), Path(out)
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    own = {"world", "model", "dataset", "pipeline.yaml", ON_POLICY, "on_policy"}
    if folder.exists() and (not folder.is_dir() or any(path.name not in own for path in folder.iterdir())):
        raise InputError("holds something that is not the demo's", where=str(out), hint="prefkit demo --out DIR")
    console.print(f"1. a small world, with flaws planted in its files: {folder / 'world'}")
    facts = write_world(folder / "world", SEED)
    pipeline_file = folder / "pipeline.yaml"
    pipeline_file.write_text(pipeline_text(folder), encoding="utf-8")
    write_prompts(folder / "world", SEED)
    (folder / ON_POLICY).write_text(on_policy_text(folder), encoding="utf-8")
    make_model(folder / "model", console)
    pipeline = load_pipeline(pipeline_file)

    console.print(f"\n3. prefkit build {pipeline_file}")
    built = build_dataset(pipeline)
    print_build(built, console)
    console.print(f"\n4. prefkit audit {pipeline_file}")
    audited = audit_dataset(pipeline)
    print_audit(audited, console)
    console.print(f"\n5. prefkit precompute {pipeline_file}")
    with token_progress() as watch:
        print_precomputed(precompute_reference(pipeline, watch=watch), console)
    console.print(f"\n6. prefkit train {pipeline_file}")
    with step_progress() as watch_steps:
        trained = train_dpo(pipeline, watch=watch_steps)
    print_trained(trained, console)

    console.print("\nwhat was planted, and what became of it")
    print_planted(facts, {**built.reasons, **built.unused}, console)
    caught = [finding.name for finding in audited.findings if (finding.level, finding.family) == ("fail", "tokens")]
    console.print(
        f"  shortcut planted: {SHORTCUT_OPENER!r}; the audit fails: {', '.join(map(repr, caught)) or 'nothing'}"
    )
    console.print(f"  loss at step 0: {trained.first_loss:.6f} (ln 2 = 0.693147: policy and reference are one model)")
    before = connect_dataset(pipeline.dataset).execute(BEFORE).fetchall()[0][0]
    after = trained.eval["rewards/accuracies"] if trained.eval else float("nan")
    console.print(f"  held-out pairs: log-probs per token prefer chosen in {before:.1%} before training,")
    console.print(f"                  the reward margin prefers chosen in {after:.1%} after it")
    console.print(f"\n{time.monotonic() - started:.0f} s. Look around:")
    console.print(f"  prefkit info {pipeline.dataset}")
    console.print(f"  prefkit show {pipeline.dataset} --token certainly -n 2")
    console.print(f"  prefkit run {folder / ON_POLICY}")
    console.print(
        f'  prefkit query {pipeline.dataset} "select reason, count(*) from dropped group by all order by 2 desc"'
    )


def make_model(folder: Path, console: Console) -> None:
    """Pretrain the tiny base model, unless an earlier call has."""
    if (folder / SINGLE).exists():
        console.print(f"\n2. the tiny base model is there: {folder}")
        return
    console.print(f"\n2. a tiny base model that knows the town and has no preference: {folder}")
    with step_progress("pretraining") as watch:
        made = train_tiny_model(
            folder, pretraining_texts(SEED), SEED, progress=lambda done, total, loss: watch(done, total, {"loss": loss})
        )
    console.print(f"  {made['num_parameters']:,} parameters, loss {made['loss']:.3f}")


def planted_reasons(facts: WorldFacts) -> dict[str, int]:
    """How many rows each reason must count, from what was planted."""
    return {
        "tie": facts.num_tied_prompts,
        "one_candidate": facts.num_single_candidate_prompts,
        "empty_response": facts.num_empty_answers,
        "identical": facts.num_unedited,
        "identical_after_folding": facts.num_whitespace_edits,
        "empty_chosen": facts.num_empty_corrections,
        "duplicate": facts.num_exact_duplicates + facts.num_whitespace_duplicates,
        "contradiction": 2 * facts.num_reversals,
        "not_json": facts.num_broken_json,
        "missing_field": facts.num_missing_fields,
        "wrong_type": facts.num_wrong_types,
    }


def print_planted(facts: WorldFacts, found: Mapping[str, int], console: Console) -> None:
    """One line a reason: planted and found."""
    for reason, count in planted_reasons(facts).items():
        console.print(f"  {reason:<24} planted {count:>3}   found {found.get(reason, 0):>3}")
