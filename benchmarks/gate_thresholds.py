"""What the gate's limits are measured against: how far apart two evaluations of one model are, and how far wrong ones.

    python benchmarks/gate_thresholds.py MODEL DATASET [--pairs 64] [--dtype bfloat16 ...]

MODEL is a model folder, DATASET a dataset with a reference of that tokenizer. Prints nats a token: the same model in
other batches and layouts (what the gate must let pass), then wrong references (what it must refuse). Every figure comes
from this process, on the device that is there.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from prefkit.encode import Sides
from prefkit.gate import MAX_ABS, MAX_MEAN, MAX_RMS
from prefkit.logps import CompletionLogps, Layout
from prefkit.models import load_model, pick_device

Pairs = list[Sides]
PACKED, SEPARATE = Layout("packed", "packed"), Layout("separate", "sdpa", fused_head=False)


def scores(model: torch.nn.Module, dtype: str, pairs: Pairs, *, shared: bool, size: int) -> npt.NDArray[np.float64]:
    """Token log-probs of all pairs, in their order, `size` pairs a batch."""
    scorer = CompletionLogps(model, dtype, PACKED if shared else SEPARATE)
    batches = (pairs[at : at + size] for at in range(0, len(pairs), size))
    with torch.no_grad():
        found = [scorer(scorer.batch(batch)).token_logps.double().cpu() for batch in batches]
    whole: npt.NDArray[np.float64] = torch.cat(found).numpy()
    return whole


def line(name: str, apart: npt.NDArray[np.float64], dtype: str) -> None:
    """One row of the table, and what the gate says of such differences."""
    rms, mean, most = float(np.sqrt((apart**2).mean())), float(apart.mean()), float(np.abs(apart).max())
    passes = most <= MAX_ABS if dtype == "float32" else rms <= MAX_RMS and abs(mean) <= MAX_MEAN
    print(f"| {dtype} | {name} | {rms:.2g} | {mean:+.2g} | {most:.2g} | {'passes' if passes else 'refused'} |")


def trained(model: torch.nn.Module, pairs: Pairs, rate: float, steps: int) -> None:
    """Move the weights by a few AdamW steps on chosen: what a policy saved over its reference looks like."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scorer = CompletionLogps(model, "float32", PACKED)
    for step in range(steps):
        batch = scorer.batch([pairs[(4 * step + i) % len(pairs)] for i in range(4)])
        (-scorer(batch).token_logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Print the table for the model and the dataset of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16", "bfloat16_weights"])
    options = parser.parse_args()
    device = pick_device()
    parts = sorted(options.dataset.glob("reference/*/part-*.parquet"))
    rows = pl.concat([pl.read_parquet(part) for part in parts]).unique("pair_id").sort("pair_id").head(options.pairs)
    columns = (rows[f"{side}_ids"].to_list() for side in Sides._fields)
    pairs = [Sides(*ids) for ids in zip(*columns, strict=True)]
    print(f"{len(pairs)} pairs on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| regime | compared with the table | RMS | mean | largest | the gate |\n|---|---|---|---|---|---|")
    for dtype in options.dtype:
        model = load_model(options.model, dtype, device)
        table = scores(model, dtype, pairs, shared=True, size=8)
        line("the same, one pair at a time", scores(model, dtype, pairs, shared=True, size=1) - table, dtype)
        line("the same, separate rows", scores(model, dtype, pairs, shared=False, size=8) - table, dtype)
        line("the same, separate, one at a time", scores(model, dtype, pairs, shared=False, size=1) - table, dtype)
        if dtype != "float32":
            exact = load_model(options.model, "float32", device)
            line("the same in float32", scores(exact, "float32", pairs, shared=True, size=8) - table, dtype)
        swapped = np.concatenate([table[1:], table[:1]])
        line("log-probs one token off", swapped - table, dtype)
        for rate, steps in ((1e-6, 1), (1e-6, 30), (1e-5, 30), (1e-4, 30)):
            moved = load_model(options.model, "float32", device)
            trained(moved, pairs, rate, steps)
            moved = moved.to(next(model.parameters()).dtype)
            line(f"{steps} AdamW steps at {rate:g}", scores(moved, dtype, pairs, shared=True, size=8) - table, dtype)


if __name__ == "__main__":
    main()
