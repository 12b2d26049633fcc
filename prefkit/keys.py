"""What pairs are compared by, as numbers: a hash of each folded text, and what decides who is kept.

Folding is NFC and white space (`text.canonical`); keys are equal where folded texts are. Two texts of ten million share
a key by chance once in 350,000 builds. Keys are of one installation: they are never stored in a dataset.
"""

import unicodedata
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa

from prefkit.format import Kind
from prefkit.grams import Array, code_points, composing, offsets_of
from prefkit.text import SETTING_ROLES, canonical

TRUST = {"human": 0, "rule": 1, "model": 2}  # no annotator at all comes last
SOME, FEW = 8192, 1000  # texts looked at in one go, and folded: more of these leave the processor's cache
# a text that is not folded already, but for what only a look at its characters tells
_SPACED = (
    pl.col("text").str.contains(r"[\t\n\x0B\x0C\r]")
    | pl.col("text").str.contains("  ", literal=True)
    | pl.col("text").str.starts_with(" ")
    | pl.col("text").str.ends_with(" ")
).fill_null(False)
_WIDE = (pl.col("text").str.len_bytes() != pl.col("text").str.len_chars()).fill_null(False)
_ODD = np.uint64(0x9E3779B97F4A7C15)
NARROW = {
    "pair": pl.UInt64,
    "prompt": pl.UInt64,
    "key_prompt": pl.UInt64,
    "key_asked": pl.UInt64,
    "key_setting": pl.UInt64,
    "key_chosen": pl.UInt64,
    "key_rejected": pl.UInt64,
    "trust": pl.UInt8,
    "margin": pl.Float64,
    "agreement": pl.Float64,
}


def narrow_pairs(pairs: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """All that comparing needs of pairs, but for near-duplicates: the columns of NARROW, a row a pair.

    Args:
        pairs: pair_id, prompt_id, prompt, chosen, rejected, annotator, margin, agreement and, where there are, tools.
        kind: of the dataset.

    Returns:
        pair and prompt: the first 16 digits of the ids, which order as they do; key_prompt: of prompt and tools;
        key_asked: of the prompt without what sets the scene (`text.asked`); key_setting: of that and the tools.
    """
    tools = _hashes(pairs["tools"]) if "tools" in pairs.columns else np.zeros(pairs.height, np.uint64)
    tools = np.where(pairs["tools"].is_null(), np.uint64(0), tools) if "tools" in pairs.columns else tools
    if kind == "text":
        prompt = fold_keys(pairs["prompt"])
        asked, setting, whole = prompt, tools, mixed(prompt, tools)
        sides = [fold_keys(pairs[side]) for side in ("chosen", "rejected")]
    else:
        whole, asked, scene = _of_prompts(pairs["prompt"])
        setting, whole = mixed(scene, tools), mixed(whole, tools)
        sides = [_of_messages(pairs[side]) for side in ("chosen", "rejected")]
    ids = [pl.col(name).str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64) for name in ("pair_id", "prompt_id")]
    trust = pl.col("annotator").replace_strict(TRUST, default=3, return_dtype=pl.UInt8)
    return pairs.select(
        ids[0].alias("pair"),
        ids[1].alias("prompt"),
        pl.Series("key_prompt", whole),
        pl.Series("key_asked", asked),
        pl.Series("key_setting", setting),
        pl.Series("key_chosen", sides[0]),
        pl.Series("key_rejected", sides[1]),
        trust.alias("trust"),
        pl.col("margin").cast(pl.Float64),
        pl.col("agreement").cast(pl.Float64),
    )


def key_of(column: str, kind: Kind) -> pl.Expr:
    """The key of a text or of messages as an expression: uint64, equal where they are after folding."""
    keys = fold_keys if kind == "text" else _of_messages
    return pl.col(column).map_batches(lambda texts: pl.Series(keys(texts)), return_dtype=pl.UInt64)


def mixed(*parts: Array) -> Array:
    """One key of several, in their order."""
    found = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        found = (found ^ (part + _ODD)) * np.uint64(0xD6E8FEB86659FD93)
        found ^= found >> np.uint64(32)
    return found


def fold_keys(texts: pl.Series) -> Array:
    """A key of each text; equal where `canonical` gives equal texts: uint64.

    Most texts are folded already: the others are found first. Of these only such as hold a character that NFC may
    change are normalised, and white space is folded in the bytes of all of them at once: a microsecond a kB where one
    text in ten has to be folded, 3 where all have, and 15 by the expression.
    """
    parts = [_fold_keys(texts.slice(first, SOME)) for first in range(0, len(texts), SOME)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _fold_keys(texts: pl.Series) -> Array:
    text = pl.col("text")
    looked_at = texts.alias("text").to_frame().select(hash=text.hash(), spaced=_SPACED, wide=_WIDE)
    found = looked_at["hash"].to_numpy().copy()
    rows = looked_at["spaced"].arg_true().to_numpy()
    wide = looked_at["wide"].arg_true()
    if len(wide):
        rows = np.union1d(rows, wide.to_numpy()[_uneasy_rows(*_bytes_of(texts.gather(wide)))])
    for first in range(0, len(rows), FEW):
        some = rows[first : first + FEW]
        found[some] = _hashes(_folded(texts.gather(some)))
    return found


def _folded(texts: pl.Series) -> pl.Series:
    """What `canonical` gives of texts."""
    content, offsets = _bytes_of(texts)
    uneasy = _uneasy_rows(content, offsets)
    if len(uneasy):
        normal = texts.gather(uneasy).alias("text").to_frame().select(canonical(pl.col("text"))).to_series()
        content, offsets = _bytes_of(texts.clone().scatter(uneasy, normal))
    content = content.copy()
    np.putmask(content, content - np.uint8(9) < 5, 32)  # tab, line feeds and returns
    space = content == 32
    drop = np.zeros(len(content), np.bool_)
    np.logical_and(space[1:], space[:-1], out=drop[1:])
    heads = offsets[:-1][offsets[:-1] < offsets[1:]]
    drop[heads] = space[heads]
    content, offsets = _without(content, offsets, drop)
    tails = offsets[1:][offsets[:-1] < offsets[1:]] - 1
    if (content[tails] == 32).any():
        drop = np.zeros(len(content), np.bool_)
        drop[tails] = content[tails] == 32
        content, offsets = _without(content, offsets, drop)
    made = pl.from_arrow(pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(content)))
    assert isinstance(made, pl.Series)
    return made


def _without(content: Array, offsets: Array, drop: Array) -> tuple[Array, Array]:
    """The same texts without some of their bytes."""
    places = np.flatnonzero(drop)
    if not len(places):
        return content, offsets
    return content[~drop], offsets - np.searchsorted(places, offsets)


def _hashes(texts: pl.Series) -> Array:
    return texts.hash().to_numpy().copy()


def _bytes_of(texts: pl.Series) -> tuple[Array, Array]:
    """The UTF-8 of all texts, and where each begins and the last one ends."""
    array = texts.fill_null("").rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    _, places, data = array.buffers()
    offsets = np.frombuffer(places, np.int64)[array.offset : array.offset + len(texts) + 1]
    inside = b"" if data is None else memoryview(data)[int(offsets[0]) : int(offsets[-1])]
    return np.frombuffer(inside, np.uint8), offsets - offsets[0]


def _uneasy_rows(raw: Array, offsets: Array) -> Array:
    """The texts with a character that NFC may change, alone or by what stands beside it, or other white space."""
    if not len(raw) or raw.max() < 0xC0:
        return np.empty(0, np.int64)
    leads = np.flatnonzero(raw >= 0xC0)
    found = leads[_are_uneasy(code_points(raw, leads))]
    return np.unique(np.searchsorted(offsets, found, side="right") - 1)


def _are_uneasy(points: Array) -> Array:
    """Of code points whether each is such a character."""
    seen = np.zeros(int(points.max()) + 1, np.bool_)
    seen[points] = True
    distinct = np.flatnonzero(seen)
    seen[distinct] = [_is_uneasy(point) for point in distinct.tolist()]
    found: Array = seen[points]
    return found


@lru_cache(maxsize=100_000)
def _is_uneasy(point: int) -> bool:
    character = chr(point)
    return (
        character.isspace()
        or unicodedata.combining(character) > 0
        or not unicodedata.is_normalized("NFC", character)
        or point in composing()
    )


# -- messages


def _of_messages(column: pl.Series) -> Array:
    """A key of each list of messages: roles, folded contents and extras in their order."""
    keys, offsets, _ = _flat(column)
    return _in_order(keys, offsets)


def _of_prompts(column: pl.Series) -> tuple[Array, Array, Array]:
    """Keys of whole prompts, of what is asked in them, and of what sets the scene (0 where nothing does)."""
    keys, offsets, roles = _flat(column)
    setting = roles.is_in(SETTING_ROLES).to_numpy()
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    parts = [
        _in_order(keys[some], offsets_of(np.bincount(owner[some], minlength=len(offsets) - 1)))
        for some in (~setting, setting)
    ]
    return _in_order(keys, offsets), parts[0], parts[1]


def _flat(column: pl.Series) -> tuple[Array, Array, pl.Series]:
    """A key a message, where each list's begin, and the roles."""
    offsets = offsets_of(column.list.len().fill_null(0).to_numpy())
    messages = column.drop_nulls().explode(empty_as_null=False).struct.unnest()
    parts = [_hashes(messages["role"]), fold_keys(messages["content"]), _hashes(messages["extra"])]
    return mixed(*parts), offsets, messages["role"]


def _in_order(keys: Array, offsets: Array) -> Array:
    """One key a list: 0 of an empty one."""
    counts = np.diff(offsets)
    found = np.zeros(len(counts), np.uint64)
    for place in range(int(counts.max(initial=0))):
        longer = np.flatnonzero(counts > place)
        found[longer] = mixed(found[longer], keys[offsets[longer] + place])
    return found
