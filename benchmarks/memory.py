"""What training holds in memory, part by part: one model, its gradients, the optimiser's state, and activations.

    python benchmarks/memory.py [--updates 3] [--pairs 24] [--kinds full checkpointing] [--peer PYTHON] [--out FILE]

A Llama of 100 million random weights (float32) and a tokenizer of 2,048 tokens made from the texts, real pairs, a
reference by `precompute`, and then `train_dpo` itself in a fresh process, AdamW, 8 pairs an update, at most 2,048
tokens a pass. The process reads its own resident set: before the model, with it, before the optimiser's first step (the
gradients are there), after it (its state is there), and the highest of all. `said` is what arithmetic says: 4 bytes a
weight, 4 a gradient, 8 of AdamW, and the tensors that autograd keeps of the largest pass, each storage counted once
(torch.autograd.graph.saved_tensors_hooks); with checkpointing the inputs of the layers and one layer's own. What the
libraries hold is taken off. Freed memory that malloc still keeps is given back before each reading but the highest; for
that one --malloc returning has it hand back each block above 1 MB (MALLOC_MMAP_THRESHOLD_), as it does not by default.

With a `trl` in this environment, or in that of --peer, TRL's DPOTrainer trains the same model on the same pairs as
tokens beside it, with the same pairs in a pass: as it comes, with the reference model in memory, and with a reference
that is there already.
"""

import argparse
import ctypes
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
from contest import Figures, Report, Settings, as_job, is_installed, peak_memory, run_job
from workload import DATA, SIDES, TURN, Size, frame_of, random_model

SIZE = Size("llama", 2_048, 768, 2_560, 12, 12, 12, positions=1_024)
A_STEP = 8  # pairs
MAX_LENGTH = 512
END = "<end>"
KINDS = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": {"r": 16}},
}
MALLOC = {"default": {}, "returning": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}


def resident() -> int:
    """Bytes that this process holds now, without what malloc has kept of what was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    with Path("/proc/self/status").open(encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def load_libraries() -> None:
    """Have torch and transformers load what they load with a first model and a first backward."""
    model = random_model(SIZE._replace(hidden=12, intermediate=8, layers=1), "float32", "cpu")
    import torch

    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    torch.optim.AdamW(model.parameters()).step()


def pipeline_of(settings: Settings, kind: str = "full") -> Any:
    """The pipeline of one run."""
    from prefkit.config import load_pipeline

    folder = Path(settings["folder"])
    sections = {
        "dataset": str(folder / "data"),
        "kind": "text",
        "sources": [{"path": str(folder / "pairs.jsonl"), "format": "pairs"}],
        "split": {"test_share": 0.0},
        "precompute": {"model": str(folder / "model"), "max_length": MAX_LENGTH, "min_completion_tokens": 4},
        "train": {"batch_size": A_STEP, "max_steps": settings["updates"], **KINDS[kind]},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return load_pipeline(path)


def prepare(settings: Settings) -> Figures:
    """Write pairs, model, dataset and reference, and the pairs as tokens for TRL."""
    from contenders import be_quiet
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from prefkit.build import build_dataset
    from prefkit.reference import precompute_reference

    be_quiet()
    folder, rows = Path(settings["folder"]), []
    with gzip.open(Path(settings["data"]) / "hh" / "harmless_base_test_part.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            (prompt, _, chosen), (same, _, rejected) = (row[side].rpartition(TURN) for side in ("chosen", "rejected"))
            if (
                prompt == same
                and chosen != rejected
                and 400 < len(row["chosen"]) < 1200
                and len(rows) < settings["pairs"]
            ):
                rows.append({"prompt": prompt + TURN, "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator((text for row in rows for text in row.values()), trainer)
    make: Any = PreTrainedTokenizerFast
    ends = dict.fromkeys(("eos_token", "pad_token"), END)
    make(tokenizer_object=words, **ends).save_pretrained(folder / "model")
    model = random_model(SIZE, "float32", "cpu")
    model.save_pretrained(folder / "model")
    pipeline = pipeline_of(settings)
    build_dataset(pipeline)
    precompute_reference(pipeline)
    part = next((folder / "data" / "reference").glob("*/part-*.parquet")).parent
    scored = pl.read_parquet(part / "part-*.parquet")
    ids = [tuple(scored[f"{side}_ids"][n].to_list() for side in SIDES) for n in range(scored.height)]
    sums = scored.select("ref_chosen_logps", "ref_rejected_logps")
    frame_of(ids).hstack(sums).write_parquet(folder / "rows.parquet")
    return {"weights": sum(p.numel() for p in model.parameters()), "tokens": int(scored["num_prompt_tokens"].sum())}


def train(settings: Settings) -> Figures:
    """Run train_dpo, and read the resident set where each part has just appeared."""
    from contenders import be_quiet
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    import prefkit.train

    be_quiet()
    load_libraries()
    pipeline = pipeline_of(settings, settings["kind"])
    found: Figures = {"libraries": resident()}

    def note(name: str) -> None:
        found.setdefault(name, resident())

    def step(optimizer: Any, *_rest: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        found["trained"] = sum(p.numel() for p in trained)
        found["state"] = sum(v.numel() * v.element_size() for held in optimizer.state.values() for v in held.values())

    register_optimizer_step_pre_hook(lambda *_: note("gradients"))
    register_optimizer_step_post_hook(lambda optimizer, *_: (note("optimizer"), step(optimizer))[1])
    out = str(Path(settings["folder"]) / f"run-{settings['kind']}")
    prefkit.train.train_dpo(
        pipeline, out=out, tell=lambda text: note("model") if text.startswith("training on") else None
    )
    return found | {"peak": peak_memory("cpu")}


def activations(settings: Settings) -> Figures:
    """The most bytes that autograd keeps of a pass of the first updates: distinct storages, weights aside."""
    import torch
    from contenders import be_quiet

    from prefkit.batches import NUM_TOKENS
    from prefkit.budget import CPU_BATCH_TOKENS
    from prefkit.encode import Sides
    from prefkit.layouts import choose_layout
    from prefkit.logps import CompletionLogps
    from prefkit.models import checkpoint_activations, load_model
    from prefkit.schedule import limits_of, micro_batches, step_rows

    be_quiet()
    run = pipeline_of(settings, settings["kind"]).train
    model: Any = load_model(Path(settings["folder"]) / "model", "float32", torch.device("cpu"))
    layout = choose_layout(model, "float32", MAX_LENGTH, "auto", backward=True)
    scorer = CompletionLogps(model, "float32", layout)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rows = pl.read_parquet(Path(settings["folder"]) / "rows.parquet").sort("pair_id")
    lengths, limits = rows.select(NUM_TOKENS).to_series().to_list(), limits_of(run, CPU_BATCH_TOKENS)
    updates = itertools.islice(step_rows(len(lengths), run), settings["updates"])
    batches = [numbers for _, drawn in updates for numbers in micro_batches(drawn, lengths, limits)]
    largest = max(batches, key=lambda numbers: sum(lengths[n] for n in numbers))
    pairs = [Sides(*(rows[f"{side}_ids"][n].to_list() for side in SIDES)) for n in largest]

    def kept() -> int:
        held: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scored = scorer(scorer.batch(pairs))
        assert scored.chosen_logps.requires_grad
        return sum(held.values())

    batch = scorer.batch(pairs)
    size = kept()
    if run.gradient_checkpointing:
        checkpoint_activations(model)
        outside = kept()
        inputs = SIZE.layers * batch.input_ids.numel() * SIZE.hidden * 4  # kept by the function that runs a layer again
        size = outside + inputs + (size - outside) // SIZE.layers
    logits = 4 * len(batch.predictors) * SIZE.vocabulary  # kept by the head, below its bound
    return {"bytes": size + logits, "tokens": batch.input_ids.numel()}


def trl(settings: Settings) -> Figures:
    """TRL's DPOTrainer on the same pairs: with its reference model in memory, or with the sums as columns."""
    from contenders import be_quiet, load_trl, our_settings, trl_trainer

    be_quiet()
    load_trl()
    load_libraries()
    folder = Path(settings["folder"])
    from transformers import AutoModelForCausalLM

    base = resident()
    make: Any = AutoModelForCausalLM.from_pretrained
    model = make(folder / "model", dtype="float32")
    run = our_settings(A_STEP, A_STEP, 1e-6)
    rows = pl.read_parquet(folder / "rows.parquet")
    with_reference = settings["kind"] == "reference model"
    trainer = trl_trainer(
        model,
        rows,
        "cpu",
        str(folder / "trl"),
        extra=() if with_reference else ("ref_chosen_logps", "ref_rejected_logps"),
        precompute_ref_log_probs=not with_reference,
        gradient_checkpointing=settings["checkpointing"],
        per_device_train_batch_size=settings["micro"],
        gradient_accumulation_steps=run.batch_size // settings["micro"],
        learning_rate=run.learning_rate,
        max_steps=settings["updates"],
        train_sampling_strategy="sequential",
    )
    trainer.train()
    return {"libraries": base, "peak": peak_memory("cpu")}


def megabytes(size: float) -> str:
    """10^6 bytes."""
    return f"{size / 1e6:,.0f}"


def ours(report: Report, base: Settings, kinds: list[str], weights: int, malloc: str) -> None:
    """A table a kind of run: what each part should hold and what the process held more."""
    for kind in kinds:
        told = run_job(__file__, "train", base | {"kind": kind}, MALLOC[malloc])
        kept = run_job(__file__, "activations", base | {"kind": kind}) if kind != "lora" else None
        said = {
            "model": 4 * weights,
            "gradients": 4 * told["trained"],
            "optimiser": told["state"],
            "activations": kept["bytes"] if kept else None,
        }
        peak = told["peak"] - told["libraries"]
        model = told["model"] - told["libraries"]
        gradients = told["gradients"] - told["model"]
        state = told["optimizer"] - told["gradients"]
        seen = {"model": model, "gradients": gradients, "optimiser": state}
        seen["activations"] = peak - said["model"] - said["gradients"] - said["optimiser"]
        report.say(f"## prefkit, {kind}: {told['trained']:,} of {weights:,} weights trained\n")
        rows = [[p, "-" if said[p] is None else megabytes(said[p] or 0), megabytes(seen[p])] for p in said]
        total = sum(size or 0 for size in said.values())
        rows.append(["together", megabytes(total), f"{megabytes(peak)} (the peak)"])
        report.table(["part", "said MB", "seen MB"], rows)
        if kept:
            report.say(
                f"Activations are of the largest pass, {kept['tokens']:,} tokens; seen: the peak without the other "
                f"three as said. The peak is {peak / total:.2f} of what is said.\n"
            )


def theirs(report: Report, base: Settings, python: str, weights: int) -> None:
    """A row a way in which TRL trains."""
    rows = []
    for kind in ("reference model", "reference there"):
        for micro, checkpointing in ((A_STEP, True), (A_STEP, False), (1, False)):
            job = base | {"kind": kind, "micro": micro, "checkpointing": checkpointing}
            told = run_job(__file__, "trl", job, python=python)
            if "peak" not in told:
                rows.append([kind, str(micro), "yes" if checkpointing else "no", "out of memory", "-"])
                continue
            peak = told["peak"] - told["libraries"]
            rows.append(
                [kind, str(micro), "yes" if checkpointing else "no", megabytes(peak), f"{peak / weights / 4:.1f}"]
            )
    report.say("## TRL's DPOTrainer\n")
    report.table(["", "pairs in a pass", "checkpointing", "peak MB", "in models"], rows)


def has_trl(python: str) -> bool:
    """Whether the peer's environment has it."""
    if not python:
        return is_installed("trl")
    return subprocess.run([python, "-c", "import trl"], check=False, capture_output=True).returncode == 0  # noqa: S603


def main() -> None:
    """Measure and print the tables."""
    if as_job({"prepare": prepare, "train": train, "activations": activations, "trl": trl}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["full", "checkpointing"])
    parser.add_argument("--malloc", choices=MALLOC, default="default", help="how freed memory is kept: see above")
    parser.add_argument("--peer", default="", help="a Python that has trl, and what prefkit needs; by default this one")
    parser.add_argument("--no-peer", action="store_true", help="prefkit alone")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    options = parser.parse_args()
    report = Report(options.out)
    report.begin("Peak memory of training", "cpu")
    with tempfile.TemporaryDirectory() as name:
        base = {"threads": 1, "device": "cpu", "folder": name, "updates": options.updates}
        made = run_job(__file__, "prepare", base | {"pairs": options.pairs, "data": str(options.data)})
        ours(report, base, options.kinds, made["weights"], options.malloc)
        if not options.no_peer and has_trl(options.peer):
            theirs(report, base, options.peer or sys.executable, made["weights"])


if __name__ == "__main__":
    main()
