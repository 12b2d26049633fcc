"""How the reference pass grows: time and memory against pairs, against length, against the vocabulary, a long prompt.

    python benchmarks/growth.py [--pairs 20000] [--rounds 1] [--threads 1] [--sweeps pairs length ...] [--out FILE]

Pairs of random ids, models of random weights (`workload.SIZES`), a fresh process for every row. A row is the whole
loop of a pass: plan, then part by part score, assemble and write. Memory is the process's highest: with imports and
model only (`model`), after the layout was found (`ready`), and in the end (`peak`).

    pairs       a doubling number of pairs of some 150 tokens: an exponent of time over distinct tokens near 1, and
                memory that grows by no more than the ids themselves (4 bytes a token)
    length      the same number of tokens in ever longer pairs: only attention may grow
    vocabulary  the same pairs, an ever larger vocabulary: memory may grow by the embedding only
    prompt      a prompt of 4,096 tokens with two answers of 64, beside a plain forward pass over those 4,096 tokens
                (logits of the last one only), in turns in one process
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from contest import (
    Figures,
    Report,
    Settings,
    as_job,
    best_of,
    gigabytes,
    matrix_rate,
    median_of,
    peak_memory,
    run_job,
    timed,
)
from workload import DTYPES, SIZES, Size, forward_flops, linear_flops, num_tokens, random_model, random_pairs

SWEEPS = ("pairs", "length", "vocabulary", "prompt")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (1_024, 4_096, 16_384, 65_536, 262_144)
FEW = 256  # pairs of the vocabulary's rows
LONG_PROMPT, ANSWER = 4096, 64
ASKED = 1.2  # of a plain forward pass over the long prompt


def some_lengths(count: int) -> list[tuple[int, int, int]]:
    """Prompts of 20 to 150 tokens, sides of 5 to 60: some 150 a pair."""
    rng = np.random.default_rng(1)
    prompts, chosen, rejected = (rng.integers(low, high, count).tolist() for low, high in ((20, 150), (5, 60), (5, 60)))
    return list(zip(prompts, chosen, rejected, strict=True))


def scored(settings: Settings) -> Figures:
    """A reference pass over pairs of a file, its parts written."""
    from contenders import be_quiet, longest, our_budget, our_layout, our_parts, our_reference, our_scorer

    be_quiet()
    device = settings["device"]
    pairs = pl.read_parquet(settings["pairs"])
    model = random_model(Size(*settings["size"]), settings["dtype"], device)
    figures: Figures = {"model": peak_memory(device)}
    scorer = our_scorer(model, settings["dtype"], longest(pairs))
    budget = our_budget(scorer, pairs)
    our_reference(scorer, pairs[:2], budget)
    if device != "cpu":  # kernels are compiled for each shape that comes
        our_parts(scorer, pairs, budget, Path(settings["folder"]) / "first.parquet")
    rate = matrix_rate(settings["dtype"], device)
    figures["ready"] = peak_memory(device)
    with timed(figures, device):
        figures["rows"] = our_parts(scorer, pairs, budget, Path(settings["folder"]) / "part.parquet")
    figures["peak"] = peak_memory(device)
    figures["rate"] = max(rate, matrix_rate(settings["dtype"], device))
    assert figures["rows"] == pairs.height
    return figures | {"layout": our_layout(scorer)}


def prompt(settings: Settings) -> Figures:
    """A pair with a long prompt, and a plain forward pass over the prompt, in turns."""
    import torch
    from contenders import be_quiet, our_budget, our_reference, our_scorer

    be_quiet()
    device, size = settings["device"], Size(*settings["size"])
    pairs = random_pairs([(LONG_PROMPT, ANSWER, ANSWER)], size.vocabulary)
    plain = random_model(size, settings["dtype"], device)
    scorer = our_scorer(random_model(size, settings["dtype"], device), settings["dtype"], LONG_PROMPT + ANSWER)
    budget = our_budget(scorer, pairs)
    ids = torch.tensor([pairs["prompt_ids"][0].to_list()], device=device)
    runs: list[Figures] = []
    for _ in range(settings["rounds"] + 1):
        figures: Figures = {}
        with timed(figures, device, "plain"), torch.inference_mode():
            plain(input_ids=ids, logits_to_keep=1, use_cache=False)
        with timed(figures, device, "ours"):
            our_reference(scorer, pairs, budget)
        runs.append(figures)
    warm = runs[1:]
    found = {name: best_of(warm, name)[name] for name in ("plain", "ours")}
    return found | {f"median {name}": median_of(warm, name) for name in found}


class Row(NamedTuple):
    """One row of a table: the figures of its fastest run, and what was asked of it."""

    label: str
    run: Figures
    tokens: int  # distinct
    linear: float  # operations of the matrices
    flops: float  # those of attention as well

    @property
    def seconds(self) -> float:
        """Of the pass."""
        return float(self.run["seconds"])


class Sweep:
    """Rows of one table: a pass each, and what they have in common."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.rows: list[Row] = []

    def add(self, label: str, lengths: Sequence[tuple[int, int, int]], size: Size) -> None:
        """Measure one row, in a fresh process each time."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.parquet"
            pairs = random_pairs(lengths, size.vocabulary)
            pairs.write_parquet(path)
            settings = {**common(self.options), "size": size, "pairs": str(path), "folder": folder}
            figures = best_of([run_job(__file__, "scored", settings) for _ in range(self.options.rounds)])
        row = Row(label, figures, num_tokens(pairs), linear_flops(size, pairs), forward_flops(size, pairs))
        self.rows.append(row)

    def tell(self, name: str) -> None:
        """The table, and the exponents of time."""
        self.report.say(f"## {name}\n\n{self.rows[0].run['layout']}.\n")
        head = [name, "distinct tokens", "s", "tokens/s", "GF asked for", "of the matrix rate"]
        table = []
        for row in self.rows:
            rates = [f"{row.tokens / row.seconds:,.0f}", f"{row.flops / 1e9:,.1f}"]
            rates += [f"{row.flops / row.seconds / row.run['rate']:.2f}"]
            memory = [gigabytes(row.run[which]) for which in ("model", "ready", "peak")]
            table.append([row.label, f"{row.tokens:,}", f"{row.seconds:.2f}", *rates, *memory])
        self.report.table([*head, "model GB", "ready GB", "peak GB"], table)

    def exponent(self, what: Callable[[Row], float]) -> float:
        """The slope of log time over the log of something."""
        return float(np.polyfit(np.log([what(row) for row in self.rows]), np.log(self.seconds), 1)[0])

    @property
    def seconds(self) -> list[float]:
        """Of every row."""
        return [row.seconds for row in self.rows]


def common(options: argparse.Namespace) -> Settings:
    """What all jobs are told."""
    return {
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "rounds": options.rounds,
    }


def against_pairs(options: argparse.Namespace, report: Report) -> None:
    """A doubling number of pairs up to --pairs."""
    sweep = Sweep(options, report)
    for halvings in range(4, -1, -1):
        count = max(2, options.pairs >> halvings)
        sweep.add(f"{count:,}", some_lengths(count), SIZES[options.size])
    sweep.tell("pairs")
    tokens, linear = sweep.exponent(lambda row: row.tokens), sweep.exponent(lambda row: row.linear)
    report.say(
        f"Time grows with distinct tokens to the power of {tokens:.3f}, with the operations of the matrices to "
        f"{linear:.3f}.\n"
    )


def against_length(options: argparse.Namespace, report: Report) -> None:
    """The same tokens in ever longer pairs: half prompt, a quarter each side."""
    sweep = Sweep(options, report)
    for length in LENGTHS:
        lengths = [(length // 2, length // 4, length // 4)] * (options.tokens // length)
        sweep.add(f"{length:,}", lengths, SIZES[options.size])
    sweep.tell("length")
    first, last = sweep.rows[0], sweep.rows[-1]
    report.say(
        f"From {first.label} to {last.label} tokens a pair the operations grow to {last.flops / first.flops:.2f} times "
        f"and the time to {last.seconds / first.seconds:.2f} times; time grows with the operations to the power of "
        f"{sweep.exponent(lambda row: row.flops):.2f}.\n"
    )


def against_vocabulary(options: argparse.Namespace, report: Report) -> None:
    """The same pairs under ever larger vocabularies."""
    sweep = Sweep(options, report)
    for vocabulary in VOCABULARIES:
        sweep.add(f"{vocabulary:,}", some_lengths(FEW), SIZES[options.size]._replace(vocabulary=vocabulary))
    sweep.tell("vocabulary")
    grown = [(row.run["peak"] - row.run["model"]) / 1e9 for row in sweep.rows]
    report.say(
        f"Beyond imports and model the pass takes {grown[0]:.2f} GB at the smallest vocabulary and {grown[-1]:.2f} GB "
        f"at the largest; time grows with the operations to the power of {sweep.exponent(lambda row: row.flops):.2f}.\n"
    )


def long_prompt(options: argparse.Namespace, report: Report) -> None:
    """The pair with the long prompt beside a plain pass over the prompt."""
    settings = common(options) | {"size": SIZES[options.prompt_size], "rounds": max(5, options.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        found = run_job(__file__, "prompt", settings | {"folder": folder})
    report.say(f"## prompt\n\n{LONG_PROMPT:,} tokens and two answers of {ANSWER}, {options.prompt_size}.\n")
    rows = [
        [name, f"{found[key]:.3f}", f"{found[f'median {key}']:.3f}"]
        for name, key in (("plain forward pass over the prompt", "plain"), ("reference pass over the pair", "ours"))
    ]
    report.table(["", "best s", "median s"], rows)
    times = found["ours"] / found["plain"]
    assert math.isfinite(times)
    report.say(f"The pair takes {times:.2f} times the plain pass (asked for: at most {ASKED}).\n")


def main() -> None:
    """Measure and print what was asked for."""
    if as_job({"scored": scored, "prompt": prompt}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--pairs", type=int, default=20_000, help="most pairs")
    parser.add_argument("--tokens", type=int, default=65_536, help="distinct tokens of the rows of length")
    parser.add_argument("--size", choices=SIZES, default="1m", help="of the model of all but the long prompt")
    parser.add_argument("--prompt-size", choices=SIZES, default="22m", help="of the model of the long prompt")
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many; of the long prompt at least 5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    options = parser.parse_args()
    report = Report(options.out)
    report.begin("How the reference pass grows", options.device)
    report.say(f"{options.size}, {options.dtype}, {options.threads} threads, best of {options.rounds}.\n")
    sweeps = dict(zip(SWEEPS, (against_pairs, against_length, against_vocabulary, long_prompt), strict=True))
    for name in options.sweeps:
        sweeps[name](options, report)


if __name__ == "__main__":
    main()
