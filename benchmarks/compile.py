"""What train.compile gains: the same training steps with compiled layers and without, each by itself.

    python benchmarks/compile.py [--steps 12] [--rounds 2] [--threads 1] [--size 22m] [--out FILE]
    python benchmarks/compile.py --device cuda --dtype bfloat16_weights --size 0.5b --steps 32

Both train on the same groups of 8 pairs a step, from the same weights, beside the same reference (the sums of the
untrained model), by prefkit.updates itself; TorchInductor begins with an empty cache. `begin s` is the time until
the first --warm-up updates are done, compilation included; `s a step` is of the --steps after them; the gain in it over
the plain run says after how many steps compilation has paid for itself, if ever.

Then what of it is the same: losses of all steps beside the plain run's, and the bits of the trained weights: of a
second compiled run, and of one that went on from the middle of the first, as a resumed run does, whose first batch is
another.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import polars as pl
from contest import (
    Figures,
    Report,
    Settings,
    as_job,
    best_of,
    gigabytes,
    median_of,
    peak_memory,
    run_job,
    synchronize,
    thread_counts,
)
from workload import DATA, DTYPES, SIZES, random_model, real_pairs

A_STEP = 8  # pairs


def train(settings: Settings) -> Figures:
    """One run: its times, losses, and a hash of the weights it ends with; `resume` makes the second half alone."""
    import torch
    from contenders import (
        be_quiet,
        beside_reference,
        longest,
        our_budget,
        our_reference,
        our_scorer,
        our_settings,
        our_training,
    )

    from prefkit.compiling import compile_layers

    be_quiet()
    device, dtype = settings["device"], settings["dtype"]
    pairs = pl.read_parquet(settings["pairs"])
    model = random_model(SIZES[settings["size"]], dtype, device)
    scorer = our_scorer(model, dtype, longest(pairs))
    rows = beside_reference(our_reference(scorer, pairs, our_budget(scorer, pairs)), pairs)
    half = Path(settings["folder"]) / "half.pt"
    if settings["resume"]:
        model.load_state_dict(torch.load(half, weights_only=True))
        rows = rows[rows.height // 2 :]
    synchronize(device)
    began, ended = time.perf_counter(), []
    if settings["compiled"]:
        compile_layers(model)
    losses: list[float] = []

    def watch(step: int, loss: float) -> None:
        synchronize(device)
        ended.append((time.perf_counter(), time.process_time()))
        losses.append(loss)
        if settings["keep"] and step == rows.height // A_STEP // 2:
            torch.save(model.state_dict(), half)

    # without state: the second half goes on from weights alone
    our_training(scorer, rows, our_settings(A_STEP, A_STEP, 1e-5, "sgd"), device, watch)
    first = ended[settings["warm_up"] - 1]
    weights = b"".join(p.detach().cpu().float().numpy().tobytes() for p in model.parameters())
    return {
        "begin": first[0] - began,
        "seconds": ended[-1][0] - first[0],
        "CPU seconds": ended[-1][1] - first[1],
        "peak": peak_memory(device),
        "losses": losses,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def compare(report: Report, options: argparse.Namespace, threads: int, folder: Path) -> None:
    """Both in turns, their table, and what is the same."""
    total = options.steps + options.warm_up
    pairs = real_pairs(options.data, total * A_STEP, SIZES[options.size].vocabulary)
    pairs.write_parquet(folder / "pairs.parquet")
    number = 0

    def run(*, compiled: bool, keep: bool = False, resume: bool = False) -> Figures:
        nonlocal number
        number += 1
        cache = folder / f"cache-{number}"
        with_cache = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        settings = {
            "threads": threads,
            "device": options.device,
            "dtype": options.dtype,
            "size": options.size,
            "warm_up": 1 if resume else options.warm_up,
            "pairs": str(folder / "pairs.parquet"),
            "folder": str(folder),
            "compiled": compiled,
            "keep": keep,
            "resume": resume,
        }
        return run_job(__file__, "train", settings, with_cache)

    plain, compiled = [], []
    for turn in range(options.rounds):
        plain.append(run(compiled=False))
        compiled.append(run(compiled=True, keep=turn == 0))
    report.say(
        f"## {options.size}, {options.dtype}, {threads} threads\n\n{options.steps} steps of {A_STEP} pairs after "
        f"{options.warm_up}, {options.rounds} rounds.\n"
    )
    best = {name: best_of(runs) for name, runs in (("plain", plain), ("compiled", compiled))}
    rows = []
    for name, runs in (("plain", plain), ("compiled", compiled)):
        times = [best[name]["seconds"], median_of(runs), best_of(runs, "CPU seconds")["CPU seconds"]]
        ratio = best["plain"]["seconds"] / best[name]["seconds"]
        used = best_of(plain, "CPU seconds")["CPU seconds"] / times[2]
        rows.append(
            [name, f"{best_of(runs, 'begin')['begin']:.1f}"]
            + [f"{seconds / options.steps:.3f}" for seconds in times]
            + [f"{ratio:.3f}", f"{used:.3f}", gigabytes(best[name]["peak"])]
        )
    report.table(
        ["", "begin s", "s a step", "median", "CPU s a step", "times as fast", "by CPU time", "peak GB"],
        rows,
    )
    apart = max(abs(a - b) for a, b in zip(plain[0]["losses"], compiled[0]["losses"], strict=True))
    report.say(f"* Losses of {total} steps: at most {apart:.1e} from the plain run's.")
    alike = {True: "the same bits", False: "other bits"}
    if options.rounds > 1:
        report.say(f"* Weights of two plain runs: {alike[len({run['sha256'] for run in plain}) == 1]}.")
        report.say(f"* Weights of two compiled runs: {alike[len({run['sha256'] for run in compiled}) == 1]}.")
    whole, half = compiled[0], run(compiled=True, resume=True)
    report.say(f"* Weights of a compiled run that went on from its middle: {alike[whole['sha256'] == half['sha256']]}.")


def main() -> None:
    """Measure and print the table."""
    if as_job({"train": train}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed updates of 8 pairs")
    parser.add_argument(
        "--warm-up", type=int, default=2, help="updates before them: shapes are compiled for in the first"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", help="by default 1 and all cores; on CUDA all cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--size", choices=SIZES, default="22m")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    options = parser.parse_args()
    if (options.steps + options.warm_up) % 2 or options.warm_up < 1:
        parser.error("--warm-up must be at least 1, and --steps + --warm-up even: a run is resumed in its middle")
    report = Report(options.out)
    report.begin("Compiled layers", options.device)
    with tempfile.TemporaryDirectory() as name:
        for threads in thread_counts(options.threads, options.device):
            compare(report, options, threads, Path(name))


if __name__ == "__main__":
    main()
