"""What a training step costs beside TRL's: the same model, pairs, order, reference and optimiser, each by itself.

    python benchmarks/train_vs_trl.py [--steps 6] [--rounds 2] [--curve 20] [--threads 1 2] [--out FILE]
    python benchmarks/train_vs_trl.py --device cuda --dtype bfloat16_weights --sizes 0.5b 1.5b 7b --steps 32 --warm-up 8

Both train on the same groups of 8 pairs a step in the same order, with AdamW, a constant rate, no warm-up, no weight
decay and clipping at 1, from the same random weights, beside a reference that is already there (prefkit scored it; TRL
gets its sums as columns). `trl N` and `ours N` make a step of 8 / N passes over N pairs each; ours is
prefkit.updates itself, with prefkit's micro-batches: the pairs of a step sorted by length, on a CPU at most 2,048
tokens a pass. TRL runs without activation checkpointing (its default, and slower) and with the optimiser that
transformers picks.

Timed are --steps updates after --warm-up that are not; every contender runs --rounds times in turns, each in a fresh
process. `of it` is 3 times the operations of a forward pass over the distinct tokens (`workload.forward_flops`; the
backward asks for twice the forward) over the machine's matrix rate; the other columns are those of reference_vs_trl.py,
seconds a step.
The losses of --curve steps of ours and of TRL, each at its fastest, stand side by side, both of before the update.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

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
    finished,
    is_installed,
    matrix_rate,
    peak_memory,
    run_job,
    synchronize,
    thread_counts,
)
from workload import DATA, DTYPES, SIZES, forward_flops, num_tokens, random_model, real_pairs

A_STEP = 8  # pairs
MICRO_BATCHES = (8, 4, 2, 1)


def reference(settings: Settings) -> Figures:
    """Write the sums of the untrained model beside the pairs."""
    from contenders import be_quiet, beside_reference, longest, our_budget, our_layout, our_reference, our_scorer

    be_quiet()
    pairs = pl.read_parquet(settings["pairs"])
    model = random_model(SIZES[settings["size"]], settings["dtype"], settings["device"])
    scorer = our_scorer(model, settings["dtype"], longest(pairs))
    scores = our_reference(scorer, pairs, our_budget(scorer, pairs))
    beside_reference(scores, pairs).write_parquet(settings["rows"])
    return {"layout": our_layout(scorer)}


def train(settings: Settings) -> Figures:
    """One contender's steps: time of all but the first, memory, the machine's rate and the losses."""
    from contenders import be_quiet, load_trl, longest, our_scorer, our_settings, our_training, trl_training

    be_quiet()
    if settings["who"] == "trl":
        load_trl()
    device, dtype = settings["device"], settings["dtype"]
    rows = pl.read_parquet(settings["rows"])[: settings["steps"] * A_STEP]
    run = our_settings(settings["micro"], A_STEP, settings["learning_rate"])
    model = random_model(SIZES[settings["size"]], dtype, device)
    before, rate = peak_memory(device), matrix_rate(dtype, device)
    clock: list[tuple[float, float]] = []
    losses: list[float] = []

    def watch(_step: int, loss: float) -> None:
        synchronize(device)
        clock.append((time.perf_counter(), time.process_time()))
        losses.append(loss)

    if settings["who"] == "ours":
        our_training(our_scorer(model, dtype, longest(rows)), rows, run, device, watch)
    else:
        trl_training(model, rows, run, device, settings["folder"], watch)
    assert len(clock) == settings["steps"]
    begin, end = clock[settings["warm_up"] - 1], clock[-1]
    return {
        "seconds": end[0] - begin[0],
        "CPU seconds": end[1] - begin[1],
        "peak": peak_memory(device),
        "model": before,
        "rate": max(rate, matrix_rate(dtype, device)),
        "losses": losses,
    }


def tell(report: Report, runs: dict[str, list[Figures]], rows: pl.DataFrame, size: str) -> None:
    """The table of one model on so many threads, times a step; `rows` are the pairs of the timed steps."""
    flops = 3 * forward_flops(SIZES[size], rows)
    table = compared(runs, Asked(rows.height // A_STEP, rows.height, num_tokens(rows), flops))
    done = finished(runs)
    first = {name: f"{found[0]['losses'][0] - math.log(2):+.1e}" for name, found in done.items()}
    report.table([*COMPARED, "step-0 loss - ln 2"], [[*row, first.get(name, "-")] for name, row in table.items()])


def tell_curve(report: Report, losses: dict[str, list[float]]) -> None:
    """The losses of two runs, step by step."""
    (one, ours), (other, theirs) = losses.items()
    apart = np.abs(np.array(ours) - np.array(theirs))
    report.say(f"Losses over {len(ours)} steps differ by at most {apart.max():.1e} (step {int(apart.argmax())}).\n")
    rows = [[str(step), f"{a:.6f}", f"{b:.6f}"] for step, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    report.table(["step", one, other], rows)


def compare(report: Report, options: argparse.Namespace, size: str, threads: int, folder: Path) -> None:
    """All contenders in turns on one model, their table, and the curves."""
    base = {
        "threads": threads,
        "device": options.device,
        "dtype": options.dtype,
        "size": size,
        "learning_rate": options.learning_rate,
        "pairs": str(folder / "pairs.parquet"),
        "rows": str(folder / "rows.parquet"),
        "folder": str(folder),
    }
    made = run_job(__file__, "reference", base)
    peers = ["trl"] if is_installed("trl") else []
    names = {f"{who} {n}": (who, n) for who in ["ours", *peers] for n in options.micro_batches}

    def run(name: str, steps: int) -> Figures:
        who, micro = names[name]
        more = {"who": who, "micro": micro, "steps": steps, "warm_up": min(options.warm_up, steps)}
        return run_job(__file__, "train", base | more)

    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(run(name, options.steps + options.warm_up))
    rows = pl.read_parquet(folder / "rows.parquet")[options.warm_up * A_STEP :][: options.steps * A_STEP]
    operations = 3 * forward_flops(SIZES[size], rows) / options.steps / 1e9
    report.say(
        f"## {size}, {options.dtype}, {threads} threads\n\n{options.steps} steps of {A_STEP} pairs, "
        f"{num_tokens(rows):,} distinct tokens, {operations:,.0f} GF a step asked for, {options.rounds} rounds, "
        f"learning rate {options.learning_rate:g}; ours: {made['layout']}.\n"
    )
    tell(report, runs, rows, size)
    done = finished(runs)
    fastest = {
        who: min((n for n in done if n.startswith(who)), key=lambda n: best_of(runs[n])["seconds"], default=None)
        for who in ("ours", "trl")
    }
    if options.curve and None not in fastest.values():
        tell_curve(report, {name: run(name, options.curve)["losses"] for name in fastest.values() if name})


def main() -> None:
    """Measure and print the tables of every model and number of threads."""
    if as_job({"reference": reference, "train": train}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed updates of 8 pairs")
    parser.add_argument("--warm-up", type=int, default=1, help="updates before them; more where kernels are compiled")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--curve", type=int, default=20, help="steps of the loss curves; 0: none")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, nargs="*", help="by default 1 and all cores; on CUDA all cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both contenders")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["22m"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES, help="pairs in a pass")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    options = parser.parse_args()
    if any(A_STEP % n for n in options.micro_batches):
        parser.error(f"--micro-batches must divide the {A_STEP} pairs of a step")
    if options.warm_up < 1:
        parser.error("--warm-up must be at least 1: the clock starts behind an update")
    report = Report(options.out)
    report.begin("Training steps beside TRL's", options.device)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = max(options.steps + options.warm_up, options.curve) * A_STEP
            pairs = real_pairs(options.data, count, SIZES[size].vocabulary)
            pairs.write_parquet(folder / "pairs.parquet")
            for threads in thread_counts(options.threads, options.device):
                compare(report, options, size, threads, folder)


if __name__ == "__main__":
    main()
