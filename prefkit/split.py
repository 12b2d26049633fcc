"""Train and test by prompt, never by row: pairs of one prompt lie on one side.

Prompts that are equal after folding count as one prompt: the decision is a hash of the smallest prompt_id among them
and of the seed, so that it depends on nothing but the content.
"""

import hashlib

import polars as pl

from prefkit.format import Kind
from prefkit.text import folded


def is_test(prompt_id: str, test_share: float, seed: int) -> bool:
    """Whether a prompt is held out: the first 8 bytes of sha256("seed:prompt_id") below test_share of their range."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test_share * 2**64


def split_pairs(pairs: pl.DataFrame, kind: Kind, test_share: float, seed: int) -> pl.DataFrame:
    """Add `split`: train | test. `test_share` is a share of prompts, 0..1."""
    smallest = pairs.select(pl.col("prompt_id").min().over(folded("prompt", kind))).to_series()
    splits = ["test" if is_test(prompt, test_share, seed) else "train" for prompt in smallest]
    return pairs.with_columns(pl.Series("split", splits, pl.String))
