"""What a TRL user pays before the first update: TRL's own reference pass beside a reference that is on disk.

    python benchmarks/trl_start.py [--pairs 200] [--rounds 2] [--size 22m] [--out FILE]

Real HH pairs become a dataset once; prefkit scores it once (`reference, once`, a process of its own, with the hash of
the weights and the probe of the model). Then, each in a fresh process, until the first update would begin:

* `trl`: DPOTrainer with precompute_ref_log_probs on the exported text: it tokenises, loads a reference model, scores;
* `trl, same again`: the same settings a second time, TRL's cache being there;
* `trl, another beta`: a second time with another beta, as in any sweep;
* `ours`, `ours, another beta`: load_reference and PrecomputedDPOTrainer, which checks the parts, hashes the weights and
  lets the policy score 64 rows.

Reported are the seconds from the first line after the imports to the first update, the peak memory of the process, the
models that were loaded, and the pairs that were scored.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import Figures, Report, Settings, as_job, best_of, gigabytes, median_of, peak_memory, run_job
from workload import DATA, SIZES, random_model

ROWS = ("trl", "trl, same again", "trl, another beta", "ours", "ours, another beta")


def prepare(settings: Settings) -> Figures:
    """Write the model folder, build the dataset and export its text."""
    import prefkit
    from prefkit.encode import resolve_template

    folder, data = Path(settings["folder"]), Path(settings["data"])
    tokenizer = gpt2(data)
    model = random_model(SIZES[settings["size"]]._replace(vocabulary=len(tokenizer)), "float32", "cpu")
    model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.chat_template = resolve_template("chat", "transcript", tokenizer)
    tokenizer.save_pretrained(folder / "model")
    rows = next(iter(sorted((data / "hh").rglob("*harmless*test*.jsonl*"))))
    (folder / "pipeline.yaml").write_text(
        f"dataset: {folder}/dataset\nkind: chat\nsplit: {{test_share: 0}}\n"
        f"sources: [{{path: '{first_lines(rows, settings['pairs'], folder)}', format: hh}}]\n"
        f"precompute: {{model: {folder}/model, max_length: 512}}\n",
        encoding="utf-8",
    )
    prefkit.build_dataset(prefkit.load_pipeline(folder / "pipeline.yaml"))
    prefkit.export_dataset(f"{folder}/dataset", "trl", f"{folder}/pairs.jsonl")
    return {}


def first_lines(source: Path, count: int, folder: Path) -> Path:
    """A file with the first lines of a packed one."""
    import gzip
    import itertools

    path = folder / "hh.jsonl"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, count)), encoding="utf-8")
    return path


def gpt2(data: Path) -> Any:
    """GPT-2's tokenizer, from the folder of real data."""
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(data / "tokenizers" / "gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def score_once(settings: Settings) -> Figures:
    """The reference pass of prefkit, as the command makes it."""
    import prefkit

    pipeline = prefkit.load_pipeline(Path(settings["folder"]) / "pipeline.yaml")
    began = time.perf_counter()
    done = prefkit.precompute_reference(pipeline)
    return {
        "seconds": time.perf_counter() - began,
        "peak": peak_memory("cpu"),
        "models": 1,
        "scored": done.pairs - done.dropped,
    }


def stock(settings: Settings) -> Figures:
    """TRL by itself."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    def make(args: Any, folder: str) -> Any:
        text = datasets.load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train")
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
        return DPOTrainer(f"{folder}/model", args=args, train_dataset=text, processing_class=tokenizer)

    return until_first_update(settings, make, max_length=512)


def ours(settings: Settings) -> Figures:
    """TRL with prefkit's dataset."""
    from prefkit.integrations.trl import PrecomputedDPOTrainer, load_reference

    def make(args: Any, folder: str) -> Any:
        return PrecomputedDPOTrainer(f"{folder}/model", args=args, train_dataset=load_reference(f"{folder}/dataset"))

    return until_first_update(settings, make)


def until_first_update(settings: Settings, make: Any, **more: Any) -> Figures:
    """Seconds, peak memory, models and scored pairs until the trainer would make its first update."""
    from transformers import PreTrainedModel, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    figures: Figures = {"models": 0, "scored": 0}
    load, score = PreTrainedModel.from_pretrained.__func__, DPOTrainer._precompute_ref_logps

    def counted(cls: Any, *arguments: Any, **named: Any) -> Any:
        figures["models"] += 1
        return load(cls, *arguments, **named)

    def watched(self: Any, dataset: Any, *arguments: Any) -> Any:
        figures["scored"] = len(dataset)
        return score(self, dataset, *arguments)

    PreTrainedModel.from_pretrained = classmethod(counted)  # type: ignore[assignment]
    DPOTrainer._precompute_ref_logps = watched

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_arguments: Any, **_named: Any) -> None:
            figures.update(seconds=time.perf_counter() - began, peak=peak_memory("cpu"))
            raise StopIteration

    args = DPOConfig(
        f"{settings['folder']}/out",
        beta=settings["beta"],
        per_device_train_batch_size=settings["batch"],
        precompute_ref_log_probs=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    began = time.perf_counter()
    trainer = make(args, settings["folder"])
    trainer.add_callback(Stop())
    try:
        trainer.train()
    except StopIteration:
        return figures
    raise SystemExit("training did not begin")


def main() -> None:
    """Measure, and print a table."""
    if as_job({"prepare": prepare, "score_once": score_once, "stock": stock, "ours": ours}):
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="22m")
    parser.add_argument("--batch", type=int, default=8, help="TRL's batch in its reference pass, too")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    report = Report(asked.out)
    report.begin("Until TRL's first update", "cpu")
    runs: dict[str, list[Figures]] = {name: [] for name in ("reference, once", *ROWS)}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings: Settings = vars(asked) | {"folder": folder, "threads": 1, "device": "cpu", "beta": 0.1, "out": ""}
            settings["data"] = str(asked.data)
            run_job(__file__, "prepare", settings)
            runs["reference, once"].append(run_job(__file__, "score_once", settings))
            for name in ROWS:
                beta = 0.3 if "another" in name else 0.1
                job = "stock" if name.startswith("trl") else "ours"
                runs[name].append(run_job(__file__, job, settings | {"beta": beta}))
    best = {name: best_of(found) for name, found in runs.items()}
    scored = best["ours"]["seconds"]
    rows = [
        [
            name,
            f"{best[name]['seconds']:.2f}",
            f"{median_of(found):.2f}",
            f"{best[name]['seconds'] / scored:.1f}",
            gigabytes(best[name]["peak"]),
            str(best[name]["models"]),
            str(best[name]["scored"]),
        ]
        for name, found in runs.items()
    ]
    report.say(f"{asked.pairs} lines of HH, a {asked.size} Llama with GPT-2's tokens, float32, one thread.\n")
    report.table(("", "best s", "median s", "times ours", "peak GB", "models loaded", "pairs scored"), rows)


if __name__ == "__main__":
    main()
