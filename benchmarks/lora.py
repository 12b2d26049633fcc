"""What training an adapter holds and costs beside training all weights: the same model, pairs and optimiser.

    python benchmarks/lora.py [--size 110m] [--steps 1] [--rank 16] [--dtype float32] [--threads 1] [--out FILE]

A Llama with random weights, 4 random pairs of 32 + 48 + 48 tokens an update in one forward and backward pass, the
sigmoid loss against its own first scores, AdamW. Every contender in a process of its own: all weights, and an adapter
on all linear layers; both with gradient checkpointing too. Timed are --steps updates after one that is not.

`weights`, `gradients` and `optimiser` are the bytes of those tensors, counted; `peak` is the highest resident set of
the process (on CUDA what torch allocated), `before` what it held before there was a model, and `rest` what remains of
the peak: activations and logits, less gradients that are not there yet when those are most. `saved` is what a run would
save.

On a CPU, glibc keeps blocks that are freed between others, and blocks of activations are many: by default every block
above 256 kB is mapped by itself (MALLOC_MMAP_THRESHOLD_), and `--malloc glibc` shows what it holds left to itself.
"""

import argparse
import os
import tempfile
from pathlib import Path

from contest import Figures, Report, Settings, as_job, gigabytes, peak_memory, run_job, timed
from workload import DTYPES, SIZES, forward_flops, random_model, random_pairs

PAIRS = [(32, 48, 48)] * 4  # prompt, chosen, rejected tokens
BETA = 0.1
KINDS = ("all weights", "adapter")
HEAD = ("", "s a step", "CPU s", "trained M", "weights", "gradients", "optimiser", "rest", "peak", "before", "saved")


def train(settings: Settings) -> Figures:
    """One contender's updates: time, and what it holds at most, by what it is."""
    import torch
    from contenders import be_quiet, our_scorer

    from prefkit.encode import Sides
    from prefkit.lora import add_adapter, save_adapter
    from prefkit.models import checkpoint_activations
    from prefkit.train_settings import LoraSettings

    be_quiet()
    size, device = SIZES[settings["size"]], settings["device"]
    rows = random_pairs(PAIRS, size.vocabulary)
    pairs = [Sides(*ids) for ids in zip(*(rows[f"{side}_ids"].to_list() for side in Sides._fields), strict=True)]
    before = peak_memory(device)
    model = random_model(size, settings["dtype"], device)
    if settings["kind"] == "adapter":
        add_adapter(model, LoraSettings(r=settings["rank"]), 0)
    scorer = our_scorer(model, settings["dtype"], 80)
    if settings["checkpointing"]:
        checkpoint_activations(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    batch = scorer.batch(pairs)
    with torch.no_grad():
        reference = scorer(batch)
    losses: list[float] = []
    gradients = 0

    def update() -> None:
        nonlocal gradients
        scored = scorer(batch)
        ratios = scored.chosen_logps - reference.chosen_logps - scored.rejected_logps + reference.rejected_logps
        loss = -torch.nn.functional.logsigmoid(BETA * ratios).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    update()
    figures: Figures = {}
    with timed(figures, device):
        for _ in range(settings["steps"]):
            update()
    peak = peak_memory(device)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    folder = Path(settings["folder"]) / "saved"
    if settings["kind"] == "adapter":
        save_adapter(model, folder, "base")
    else:
        model.save_pretrained(folder)
    return figures | {
        "peak": peak,
        "before": before,
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": gradients,
        "optimiser": held,
        "trained": sum(p.numel() for p in trained),
        "saved": sum(path.stat().st_size for path in folder.iterdir()),
        "losses": losses,
    }


def row_of(name: str, figures: Figures, steps: int) -> list[str]:
    """A contender's row of HEAD, in GB where nothing else is said."""
    known = sum(figures[part] for part in ("weights", "gradients", "optimiser", "before"))
    return [
        name,
        f"{figures['seconds'] / steps:.2f}",
        f"{figures['CPU seconds'] / steps:.2f}",
        f"{figures['trained'] / 1e6:.1f}",
        *(gigabytes(figures[part]) for part in ("weights", "gradients", "optimiser")),
        gigabytes(figures["peak"] - known),
        *(gigabytes(figures[part]) for part in ("peak", "before", "saved")),
    ]


def main() -> None:
    """Measure and print the table."""
    if as_job({"train": train}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="110m")
    parser.add_argument("--steps", type=int, default=1, help="timed updates")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--malloc", choices=["mapped", "glibc"], default="mapped")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    options = parser.parse_args()
    if options.malloc == "mapped":
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    report = Report(options.out)
    report.begin("An adapter beside all weights", options.device)
    operations = forward_flops(SIZES[options.size], random_pairs(PAIRS, SIZES[options.size].vocabulary)) / 1e9
    report.say(
        f"{options.size}, {options.dtype}, rank {options.rank}, {options.threads} threads; {operations:,.0f} GF a "
        "forward pass over the distinct tokens. GB but where the column says otherwise.\n"
    )
    rows = []
    found: dict[str, Figures] = {}
    for kind in KINDS:
        for checkpointing in (False, True):
            name = kind + (", checkpointing" if checkpointing else "")
            with tempfile.TemporaryDirectory() as folder:
                settings = vars(options) | {"out": None, "kind": kind, "checkpointing": checkpointing, "folder": folder}
                found[name] = run_job(__file__, "train", settings)
            rows.append(row_of(name, found[name], options.steps))
    report.table(HEAD, rows)
    for name in ("adapter", "adapter, checkpointing"):
        one, other = found[name], found[name.replace("adapter", "all weights")]
        share = (one["peak"] - one["before"]) / (other["peak"] - other["before"])
        time = one["CPU seconds"] / other["CPU seconds"]
        report.say(f"* {name}: {share:.0%} of the memory of training all weights so, {time:.0%} of its CPU time.")


if __name__ == "__main__":
    main()
