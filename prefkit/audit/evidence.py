"""What one pass over the pairs reads off both sides: the evidence that structure, probes and repairs are judged by.

Comes in: `Texts`. Goes out: `Evidence`, columns of one entry a pair. Price: some 400 bytes a pair in memory; no text.
"""

from collections.abc import Container
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from prefkit.audit.counting import Texts
from prefkit.audit.features import Sides, side_features
from prefkit.audit.significance import LengthModel, fit_length
from prefkit.audit.values import side_values
from prefkit.text import canonical

# a pair as plain text (text.words_of), with what is known of its origin; the models may be null
TEXTS = ("pair_id", "prompt", "chosen", "rejected", "source", "chosen_model", "rejected_model")


class Evidence(NamedTuple):
    """Of N pairs, in their order.

    `pairs`: pair_id, source, cluster (0..C-1; pairs whose prompts are equal after folding share one: they are not
    independent); `features`, `values`: of both sides, numeric and categorical; `length`: what length alone says;
    `num_replies`: distinct texts among the 2 N sides.
    """

    pairs: pl.DataFrame
    features: Sides
    values: Sides
    length: LengthModel
    num_replies: int

    @property
    def clusters(self) -> npt.NDArray[np.int64]:
        """The prompt of each pair, as a number."""
        return self.pairs["cluster"].to_numpy()

    def difference(self, leave_out: Container[str] = ()) -> npt.NDArray[np.float64]:
        """Chosen - rejected (N, F), a column a numeric feature."""
        chosen, rejected = self.features
        names = [name for name in chosen.columns if name not in leave_out]
        columns = [(chosen[name] - rejected[name]).to_numpy().astype(np.float64) for name in names]
        return np.stack(columns, axis=1) if columns else np.zeros((chosen.height, 0))


def gather(texts: Texts, extra: Sides | None = None) -> Evidence:
    """Read all pairs once.

    Args:
        texts: the pairs.
        extra: numeric features that no text shows, of the same pairs: model tokens, cuts.
    """
    known, features, values = [], [], []
    replies = [pl.Series(dtype=pl.UInt64)]
    for block in texts():
        prompt = canonical(pl.col("prompt")).hash(0).alias("cluster")  # an in-run key: ranked below
        known.append(block.select("pair_id", "source", prompt))
        replies += [block[side].hash(0) for side in ("chosen", "rejected")]
        features.append(side_features(block))
        values.append(_with_generators(side_values(block), block))
    pairs = pl.concat(known)
    pairs = pairs.with_columns(numbered(pairs["cluster"]))
    sides = _joined(features)
    if extra is not None:
        sides = Sides(*(pl.concat(two, how="horizontal") for two in zip(sides, extra, strict=True)))
    length = fit_length(*(side["words"].to_numpy() for side in sides))
    return Evidence(pairs, sides, _joined(values), length, pl.concat(replies).n_unique())


def _with_generators(values: Sides, block: pl.DataFrame) -> Sides:
    models = (block[name].alias("generator") for name in ("chosen_model", "rejected_model"))
    return Sides(*(side.with_columns(model) for side, model in zip(values, models, strict=True)))


def numbered(keys: pl.Series) -> pl.Series:
    """Numbers 0.. in the order of first appearance, whatever the keys are."""
    _, first, cluster = np.unique(keys.to_numpy(), return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return pl.Series(keys.name, number[cluster], pl.Int64)


def _joined(blocks: list[Sides]) -> Sides:
    return Sides(pl.concat([block.chosen for block in blocks]), pl.concat([block.rejected for block in blocks]))


def in_memory(frame: pl.DataFrame, rows: int = 4096) -> Texts:
    """Pairs that are in memory as `Texts`."""
    wanted = frame.select(name if name in frame.columns else pl.lit(None, pl.String).alias(name) for name in TEXTS)
    # a frame without rows is one block without rows: every column keeps its type
    return lambda: iter([wanted]) if wanted.is_empty() else wanted.iter_slices(rows)
