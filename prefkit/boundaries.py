"""The pairs as the model's tokens, for the audit: what DPO will see, and what encoding does to pairs.

Comes in: blocks of pairs and a tokenizer. Goes out: token ids on disk (a pass over them reads blocks again), what a
side has of tokens, cuts and ends, and how many pairs encoding splits, cuts or drops. No model is loaded.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from prefkit.audit.verdict import SHOWN_PAIRS, Finding, Limits
from prefkit.controls import control_tokens
from prefkit.encode import END_WINDOW, EncodeSettings, encode_pairs
from prefkit.tables import write_parquet

IDS = ("chosen_ids", "rejected_ids")
MODEL_FEATURES = ("model_tokens", "truncated", "no_end_token")
WORTH_A_NOTE = 0.01  # share of the pairs
WORTH_A_WARNING = 0.05  # likewise: precompute.max_boundary_share's default, above which a reference pass stops


class Tokenised(NamedTuple):
    """All pairs as tokens, in their order; a pair that encoding drops has none.

    `blocks`: begins anew at each call, frames of chosen_ids and rejected_ids; `chosen`, `rejected`: MODEL_FEATURES a
    side; `counts`: pairs by what encoding does to them; `pair_ids`: three examples of each of these.
    """

    blocks: Callable[[], Iterator[pl.DataFrame]]
    chosen: pl.DataFrame
    rejected: pl.DataFrame
    counts: dict[str, int]
    pair_ids: dict[str, list[str]]


def tokenise_pairs(pairs: Iterable[pl.DataFrame], tokenizer: Any, settings: EncodeSettings, folder: Path) -> Tokenised:
    """Encode every block as `precompute` will, and keep the ids in files below `folder`.

    Raises:
        ModelError: the tokenizer has no end token for a text dataset.
    """
    ends = set(control_tokens(tokenizer))
    files: list[Path] = []
    nothing = pl.DataFrame(schema=dict.fromkeys(MODEL_FEATURES, pl.Float32))
    sides = {"chosen": [nothing], "rejected": [nothing]}
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for block in pairs:
        encoded = encode_pairs(block, tokenizer, settings)
        whole = block.select("pair_id").join(encoded.pairs, on="pair_id", how="left", maintain_order="left")
        whole = whole.with_columns(pl.col(name).fill_null([]) for name in IDS)
        files.append(folder / f"ids-{len(files):05d}.parquet")
        write_parquet(files[-1], whole.select(IDS))
        for side, features in sides.items():
            features.append(_of_side(whole, side, ends))
        for reason, found in _events(whole, encoded.dropped):
            counts[reason] += len(found)
            examples[reason] = (examples.get(reason, []) + found)[:SHOWN_PAIRS]
    chosen, rejected = (pl.concat(features) for features in sides.values())

    def blocks() -> Iterator[pl.DataFrame]:
        for file in files:
            yield pl.read_parquet(file)
        if not files:
            yield pl.DataFrame(schema=dict.fromkeys(IDS, pl.List(pl.Int32)))

    return Tokenised(blocks, chosen, rejected, dict(sorted(counts.items())), examples)


def _of_side(whole: pl.DataFrame, side: str, ends: set[int]) -> pl.DataFrame:
    ids = pl.col(f"{side}_ids")
    last = ids.list.tail(END_WINDOW).list.eval(pl.element().is_in(sorted(ends))).list.any().fill_null(False)
    return whole.select(
        ids.list.len().alias("model_tokens"),
        pl.col(f"{side}_truncated").fill_null(False).alias("truncated"),
        (~last & (ids.list.len() > 0)).alias("no_end_token"),
    ).cast(pl.Float32)


def _events(whole: pl.DataFrame, dropped: pl.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """What happened to pairs, with their ids."""
    rules = {
        "prompt_split": pl.col("num_boundary_tokens") > 0,
        "both_cut_off": pl.col("chosen_truncated") & pl.col("rejected_truncated"),
        "one_cut_off": pl.col("chosen_truncated") != pl.col("rejected_truncated"),
        "no_end_token": pl.col("num_unended") == 2,
        "spells_control_token": pl.col("spells_control_token"),
        "prompt_cut": pl.col("prompt_cut"),
    }
    for name, rule in rules.items():
        yield name, whole.filter(rule)["pair_id"].to_list()
    for reason in dropped["reason"].unique().sort():
        yield f"dropped_{reason}", dropped.filter(pl.col("reason") == reason)["pair_id"].to_list()


REASONS = {
    "prompt_split": (
        "the prompt's tokens are no prefix of those of prompt + completion",
        "end prompts at a token boundary (text), or fix the chat template",
    ),
    "one_cut_off": ("one side is cut off at max_length and the other is not", "raise precompute.max_length"),
    "both_cut_off": ("both sides are cut off at max_length", "raise precompute.max_length"),
    "no_end_token": ("neither completion ends with an end token", "a chat template that ends replies"),
    "spells_control_token": ("the text spells a control token, and is encoded as text", "clean the sources"),
    "prompt_cut": ("the prompt is cut from its left", "raise precompute.max_length"),
}


def find_boundaries(tokenised: Tokenised, num_pairs: int, limits: Limits) -> list[Finding]:
    """A finding for each thing that encoding does to at least 1% of the pairs; from 5% on a warning."""
    found = []
    for name, count in tokenised.counts.items():
        share = count / max(1, num_pairs)
        if share < max(WORTH_A_NOTE, limits.min_coverage):
            continue
        what, advice = REASONS.get(name, (f"encoding drops the pair ({name.removeprefix('dropped_')})", ""))
        level = "warn" if share >= WORTH_A_WARNING else "note"
        found.append(
            Finding(
                level,  # type: ignore[arg-type] # one of two literals
                "boundaries",
                name,
                None,
                f"in {count} pairs ({share:.1%}) {what}",
                advice or "another precompute.max_length or chat template, or leave these pairs out",
                num_pairs=count,
                coverage=share,
                pair_ids=tuple(tokenised.pair_ids[name]),
            )
        )
    return found
