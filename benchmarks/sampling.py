"""Responses a second: prefkit's engine beside `model.generate`, over the same prompts with equal settings.

    python benchmarks/sampling.py [--size 22m] [--prompts 32] [-n 4] [--max-new-tokens 96] [--rounds 2] [--out FILE]

A model with random weights, prompts of the HH harmless test part with GPT-2's tokens folded into its vocabulary. One id
in 48 ends a response, so lengths are those of a coin thrown at every token. Temperature 1, nothing left out. Contenders
have as many responses at work at once; each is a process of its own, one after another in every round:

    prefkit     generation.py: prompts computed once, rows that end leave, the next prompts take their places
    generate    prompts in the order of the file, `width / n` at a time, padded on the left, num_return_sequences=n
    one by one  a prompt at a time, num_return_sequences=n
    continuous  transformers' own continuous batching (`generate_batch`), where it is asked for: it is made for a GPU

Tokens a second are those of responses, the one that ended each included, and nothing behind it. Lost slots are token
slots of padding and of rows that had ended; the same prompt computed again counts apart. CPU time is the steadier
figure where other work shares the cores.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from contest import Figures, Report, Settings, as_job, gigabytes, median_of, peak_memory, run_job, timed
from workload import DATA, SIZES, random_model, real_pairs

END_EVERY = 48
CONTENDERS = ("prefkit", "generate", "one by one", "continuous")


def prompts_of(settings: Settings) -> list[list[int]]:
    """The prompts' ids, in a random order."""
    found = real_pairs(Path(settings["data"]), settings["prompts"], SIZES[settings["size"]].vocabulary, 512)
    ids: list[list[int]] = found["prompt_ids"].to_list()
    random.Random(0).shuffle(ids)  # noqa: S311
    return ids


def ends_of(settings: Settings) -> list[int]:
    """The ids that end a response."""
    return list(range(0, SIZES[settings["size"]].vocabulary, END_EVERY))


def common(settings: Settings) -> dict[str, Any]:
    """The settings of transformers' own ways."""
    return {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": settings["new"],
        "eos_token_id": ends_of(settings),
        "pad_token_id": 0,
        "num_return_sequences": settings["n"],
    }


def ours(settings: Settings) -> Figures:
    """Prefkit's engine."""
    from prefkit.engines import Decoding, Request
    from prefkit.generation import Generator, answer
    from prefkit.stops import Ending, StopTexts

    size = SIZES[settings["size"]]
    model = random_model(size, settings["dtype"], settings["device"])
    asked = [Request(f"prompt {i}", ids, "") for i, ids in enumerate(prompts_of(settings))]
    asked.sort(key=lambda request: -len(request.prompt_ids))
    ends = tuple(ends_of(settings))
    how = Decoding("", settings["n"], 1.0, 1.0, None, settings["new"], 0, ends, (), settings["dtype"], size.vocabulary)
    stops = StopTexts(None, Ending((), (), "", frozenset()))
    generator = Generator(model, settings["dtype"], "batched")
    before = peak_memory(settings["device"])
    figures: Figures = {}
    with timed(figures, settings["device"]):
        found = answer(generator, asked, how, settings["width"], stops, print)
    tokens = sum(len(response.ids) for responses in found for response in responses)
    slots = generator.slots
    peak = peak_memory(settings["device"]) - before
    return figures | {"tokens": tokens, "lost": slots.share_lost, "again": 0.0, "peak": peak}


def theirs(settings: Settings) -> Figures:
    """`model.generate` in padded batches."""
    import torch
    from transformers import GenerationConfig

    model = random_model(SIZES[settings["size"]], settings["dtype"], settings["device"])
    prompts, n = prompts_of(settings), settings["n"]
    config = GenerationConfig(**common(settings))
    at_once = max(1, settings["width"] // n) if settings["batched"] else 1
    ended = set(ends_of(settings))
    tokens = useful = computed = again = 0
    before = peak_memory(settings["device"])
    figures: Figures = {}
    torch.manual_seed(0)
    with timed(figures, settings["device"]):
        for at in range(0, len(prompts), at_once):
            some = prompts[at : at + at_once]
            longest = max(map(len, some))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in some], device=settings["device"])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=settings["device"])
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
            rows = out.tolist()
            lengths = [next((i + 1 for i, token in enumerate(row) if token in ended), len(row)) for row in rows]
            tokens += sum(lengths)
            # the last token of a row is picked and never computed
            useful += sum(map(len, some)) + sum(length - 1 for length in lengths)
            again += (n - 1) * sum(map(len, some))
            computed += len(rows) * (longest + out.shape[1] - 1)
    peak = peak_memory(settings["device"]) - before
    lost = (computed - useful - again) / computed
    return figures | {"tokens": tokens, "lost": lost, "again": again / computed, "peak": peak}


def continuous(settings: Settings) -> Figures:
    """Transformers' continuous batching."""
    from transformers import GenerationConfig

    model = random_model(SIZES[settings["size"]], settings["dtype"], settings["device"])
    prompts = prompts_of(settings)
    config = GenerationConfig(**common(settings))
    before = peak_memory(settings["device"])
    figures: Figures = {}
    with timed(figures, settings["device"]):
        found: Any = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    tokens = sum(len(output.generated_tokens) for output in found.values())
    peak = peak_memory(settings["device"]) - before
    return figures | {"tokens": tokens, "lost": float("nan"), "again": float("nan"), "peak": peak, "all": len(found)}


def row_of(name: str, runs: list[Figures], base: list[Figures]) -> list[str]:
    """A contender's row."""
    for run in (*runs, *base):
        run["rate"] = run["tokens"] / run["seconds"]
        run["CPU rate"] = run["tokens"] / run["CPU seconds"]
    return [
        name,
        f"{median_of(runs, 'rate'):,.0f}",
        f"{median_of(runs, 'CPU rate'):,.0f}",
        f"{median_of(runs, 'rate') / median_of(base, 'rate'):.2f}",
        f"{median_of(runs, 'CPU rate') / median_of(base, 'CPU rate'):.2f}",
        f"{runs[0]['lost']:.1%}",
        f"{runs[0]['again']:.1%}",
        gigabytes(median_of(runs, "peak")),
    ]


def main() -> None:
    """Measure and print the table."""
    if as_job({"prefkit": ours, "generate": theirs, "one by one": theirs, "continuous": continuous}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="22m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--width", type=int, default=32, help="responses at work at once")
    parser.add_argument("--max-new-tokens", dest="new", type=int, default=96)
    parser.add_argument("--dtype", choices=["float32"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:3])
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--out", type=Path, help="write the table there as well")
    options = parser.parse_args()
    report = Report(options.out)
    report.begin("Sampling beside model.generate", options.device)
    report.say(
        f"{options.size}, {options.dtype}, {options.threads} threads: {options.n} responses to each of "
        f"{options.prompts} prompts, at most {options.new} tokens, {options.width} at once; {options.rounds} rounds.\n"
    )
    found: dict[str, list[Figures]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, runs in found.items():
                more = {"out": None, "folder": folder, "batched": name == "generate"}
                runs.append(run_job(__file__, name, vars(options) | more))
    head = ("", "tokens/s", "tokens/CPU s", "as generate", "by CPU time", "lost slots", "prompts again", "peak GB")
    report.table(head, [row_of(name, runs, found["generate"]) for name, runs in found.items()])


if __name__ == "__main__":
    main()
