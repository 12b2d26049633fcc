"""What the reference pass costs beside TRL's: the same model, pairs, machine and regime, each in its own process.

    python benchmarks/reference_vs_trl.py [--pairs 48] [--rounds 3] [--threads 1 2] [--out FILE]
    python benchmarks/reference_vs_trl.py --device cuda --dtype bfloat16_weights --sizes 0.5b 1.5b 7b --pairs 256

The model has random weights (`workload.SIZES`), the pairs are real (`workload.real_pairs`; --data or
PREFKIT_TEST_DATA). Contenders run in turns, --rounds times, each in a fresh process:

    ours      plan_batches and score_batches, with the token budget that prefkit takes by itself (on CUDA that is what
              memory holds: compare memory under a --budget)
    trl N     DPOTrainer's own _precompute_ref_logps (precompute_ref_log_probs=True) at batch size N, on exactly our
              token ids

Timed is the scoring: neither imports nor the model nor tokenising, and two pairs are scored before the clock starts
(on CUDA all of them: kernels are compiled for shapes).
TRL's pass writes its two sums a pair to a small Arrow file, ours gives every token's log-prob as a frame. `CPU s` is
the least CPU time of a round: steadier than the clock where other work shares the cores. `matrix rate` is one matrix
product's operations a second in that process, the better of before and after the scoring; `of it` is the share of it
that the operations asked for (`workload.forward_flops`, of distinct tokens) make up of the best time. Memory is the
process's highest, what comes before the clock included; `model` is what imports and model alone take.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from contest import (
    COMPARED,
    Asked,
    Figures,
    Report,
    Settings,
    as_job,
    best_of,
    compared,
    is_installed,
    matrix_rate,
    peak_memory,
    run_job,
    thread_counts,
    timed,
)
from workload import DATA, DTYPES, SIZES, forward_flops, num_tokens, random_model, real_pairs

TRL_BATCHES = (1, 2, 4, 8)
OURS = "ours"


def score(settings: Settings) -> Figures:
    """One contender's pass: time, memory, the machine's rate and the sums."""
    from contenders import (
        be_quiet,
        load_trl,
        longest,
        our_budget,
        our_layout,
        our_reference,
        our_scorer,
        sums_of,
        trl_reference,
        trl_trainer,
    )

    be_quiet()
    device, batch, folder = settings["device"], settings["batch"], settings["folder"]
    pairs = pl.read_parquet(settings["pairs"])
    model = random_model(SIZES[settings["size"]], settings["dtype"], device)
    if batch:
        load_trl()
    figures: Figures = {"layout": "", "model": peak_memory(device)}
    if batch:
        trainer = trl_trainer(model, pairs, device, folder)
        trainer.compute_ref_log_probs(model, trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    else:
        scorer = our_scorer(model, settings["dtype"], longest(pairs))
        budget = settings["budget"] or our_budget(scorer, pairs)
        our_reference(scorer, pairs[:2], budget)
        figures["layout"] = f"{our_layout(scorer)}, {budget:,} tokens a batch"

    def scored() -> Any:
        return trl_reference(trainer, batch) if batch else sums_of(our_reference(scorer, pairs, budget), pairs)

    if device != "cpu":  # kernels are chosen, and compiled, for each shape that comes
        with timed(figures, device, "first"):
            scored()
    rate = matrix_rate(settings["dtype"], device)
    with timed(figures, device):
        sums = scored()
    figures["peak"] = peak_memory(device)
    np.save(settings["out"], np.stack(sums))
    return figures | {"rate": max(rate, matrix_rate(settings["dtype"], device))}


def measure(options: argparse.Namespace, size: str, threads: int, folder: Path) -> dict[str, list[Figures]]:
    """All runs of all contenders, in turns; the last sums of each stay in FOLDER/NAME.npy."""
    names = {OURS: 0} | ({f"trl {n}": n for n in options.batches} if is_installed("trl") else {})
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, batch in names.items():
            settings = {
                "threads": threads,
                "device": options.device,
                "dtype": options.dtype,
                "size": size,
                "batch": batch,
                "budget": options.budget,
                "pairs": str(folder / "pairs.parquet"),
                "out": str(folder / f"{name}.npy"),
                "folder": str(folder),
            }
            runs[name].append(run_job(__file__, "score", settings))
    return runs


def furthest(folder: Path, name: str) -> str:
    """The largest difference between ours and another's sums, in nats."""
    files = [folder / f"{which}.npy" for which in (OURS, name)]
    if not all(file.exists() for file in files):
        return "-"
    ours, other = (np.load(file).astype(np.float64) for file in files)
    return f"{np.abs(ours - other).max():.1e}"


def tell(report: Report, runs: dict[str, list[Figures]], pairs: pl.DataFrame, size: str, folder: Path) -> None:
    """The table of one model on so many threads."""
    rows = compared(runs, Asked(1, pairs.height, num_tokens(pairs), forward_flops(SIZES[size], pairs)))
    report.table([*COMPARED, "sums differ by at most"], [[*row, furthest(folder, name)] for name, row in rows.items()])
    firsts = {name: best_of(found, "first").get("first") for name, found in runs.items()}
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in firsts.items() if seconds)
    if told:
        report.say(f"The first pass, which compiles: {told}.\n")


def main() -> None:
    """Measure and print a table for every model and number of threads."""
    if as_job({"score": score}):
        return
    options = parsed(__doc__)
    report = Report(options.out)
    report.begin("The reference pass beside TRL's", options.device)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pairs = real_pairs(options.data, options.pairs, SIZES[size].vocabulary)
            if options.sorted:
                pairs = pairs.sort(pl.sum_horizontal("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens"))
            pairs.write_parquet(folder / "pairs.parquet")
            for threads in thread_counts(options.threads, options.device):
                runs = measure(options, size, threads, folder)
                operations = forward_flops(SIZES[size], pairs) / 1e9
                report.say(
                    f"## {size}, {options.dtype}, {threads} threads\n\n{pairs.height} pairs, {num_tokens(pairs):,} "
                    f"distinct tokens, {operations:,.0f} GF asked for, {options.rounds} rounds; ours: "
                    f"{runs[OURS][0].get('layout')}.\n"
                )
                tell(report, runs, pairs, size, folder)


def parsed(doc: str | None) -> Any:
    """The options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", help="by default 1 and all cores; on CUDA all cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both contenders")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["22m"])
    parser.add_argument("--batches", type=int, nargs="+", default=TRL_BATCHES, help="batch sizes of TRL, in pairs")
    parser.add_argument("--budget", type=int, default=0, help="tokens of a batch of ours; 0: what prefkit takes")
    parser.add_argument("--sorted", action="store_true", help="hand both the pairs by length: TRL pads less")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
