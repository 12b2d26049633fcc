"""Real pairs with something planted in them, audited in memory; and plain Python that counts what was planted.

What is planted stands in positions drawn from a seed, an exact number of pairs each time. Nothing here is taken from
the audit's own code but `audited`, the code under test.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import polars as pl

from prefkit.audit.evidence import gather, in_memory
from prefkit.audit.structure import pair_similarity
from prefkit.audit.verdict import Finding
from prefkit.audits import count_words, texts_of
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.judgement import Audited, Counted, judge_evidence
from prefkit.settings import AuditConfig
from prefkit.store import read_manifest

Edit = Callable[[str, random.Random], str]
TOKENS, STRUCTURE, PROBE = "audit/tokens.parquet", "audit/structure.parquet", "audit/probe.parquet"
SIDES = {"chosen": "rejected", "rejected": "chosen", "chosen_model": "rejected_model", "rejected_model": "chosen_model"}
MARK = re.compile(r"[^\w\s]")


def built_pairs(pipeline: Pipeline) -> pl.DataFrame:
    """Build a dataset and give its pairs as plain texts, all in one frame."""
    build_dataset(pipeline)
    dataset = Path(pipeline.dataset)
    return pl.concat(list(texts_of(dataset, read_manifest(dataset))()))


def audited(pairs: pl.DataFrame, **settings: object) -> Audited:
    """The whole audit of pairs in memory, as `audit_dataset` makes it, without files and without a tokenizer."""
    config, texts = AuditConfig.model_validate(settings), in_memory(pairs)
    evidence = gather(texts)
    words = count_words(texts, evidence, config, None)
    counted = Counted(evidence, pair_similarity(texts, pairs.height), words, None, None)
    return judge_evidence(counted, config, "DATASET", strict=False, tell=lambda _text: None)


# planting


def some(num: int, share: float, seed: int = 0) -> set[int]:
    """round(share * num) positions of 0..num-1."""
    return set(random.Random(seed).sample(range(num), round(num * share)))


def edited(pairs: pl.DataFrame, side: str, edit: Edit, where: set[int]) -> pl.DataFrame:
    """One side of some pairs as `edit` makes it of its text and a random state of its own."""
    texts = [edit(text, random.Random(i)) if i in where else text for i, text in enumerate(pairs[side])]
    return pairs.with_columns(pl.Series(side, texts, pl.String))


def opened(opener: str) -> Edit:
    return lambda text, _rng: opener + text


def cut_anywhere(text: str, rng: random.Random) -> str:
    """Without its last words, at least one and not all."""
    ends = [found.end() for found in re.finditer(r"\S+", text)]
    return text[: ends[rng.randrange(len(ends) - 1)]] if len(ends) > 1 else text


def thinned(text: str, rng: random.Random) -> str:
    """As much shorter as `cut_anywhere` makes it, but no place of the text goes rather than another."""
    words = text.split()
    if len(words) < 2:
        return text
    start, gone = rng.randrange(len(words)), rng.randrange(1, len(words))
    left_out = {(start + step) % len(words) for step in range(gone)}
    return " ".join(word for place, word in enumerate(words) if place not in left_out)


def bulleted(text: str, _rng: random.Random) -> str:
    """Each sentence a list item."""
    return "\n".join(f"- {sentence}" for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence)


def endless(text: str, _rng: random.Random) -> str:
    """Without the marks at its end."""
    return re.sub(r"[^\w\s]+\s*$", "", text)


def exchanged(pairs: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Sides exchanged at random, for all pairs of a prompt alike: no side has any claim to be chosen any more."""
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(folded, pairs["prompt"])))}
    rng = random.Random(seed)
    flips = [rng.random() < 0.5 for _ in prompts]
    flip = pl.Series("flip", [flips[prompts[folded(prompt)]] for prompt in pairs["prompt"]], pl.Boolean)
    sides = [pl.when("flip").then(other).otherwise(side).alias(side) for side, other in SIDES.items()]
    return pairs.with_columns(flip).with_columns(sides).drop("flip")


# counting, by the definitions of the format


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text).casefold())


def grams_of(words: Sequence[object], longest: int = 3) -> set[tuple[object, ...]]:
    return {tuple(words[at : at + n]) for n in range(1, longest + 1) for at in range(len(words) - n + 1)}


def presence(pairs: pl.DataFrame, token: str) -> tuple[int, int, int]:
    """Pairs with a token in chosen only, in rejected only, and in both."""
    gram = tuple(token.split())
    has = [[gram in grams_of(words_of(text), len(gram)) for text in pairs[side]] for side in ("chosen", "rejected")]
    one, other = (sum(a > b for a, b in zip(*sides, strict=True)) for sides in (has, has[::-1]))
    return one, other, sum(a and b for a, b in zip(*has, strict=True))


# reading an audit


def named(found: Iterable[Finding], family: str, name: str) -> list[Finding]:
    """Findings of a family that name something, themselves or with others."""
    return [f for f in found if f.family == family and name in (f.name, *f.also)]


def tokens_named(found: Audited) -> set[tuple[str, str | None]]:
    """Every token that a finding names, with its side."""
    return {(token, f.side) for f in found.findings if f.family == "tokens" for token in (f.name, *f.also)}


def structure_named(found: Audited) -> set[tuple[str, str | None]]:
    """Every feature that a finding names, with its side; values of a feature as one."""
    return {(f.name.partition(": ")[0], f.side) for f in found.findings if f.family == "structure"}


def row_of(found: Audited, token: str) -> dict[str, object]:
    return found.tables[TOKENS].filter((pl.col("token") == token) & (pl.col("alphabet") == "word")).row(0, named=True)


def probe_accuracy(found: Audited) -> dict[str, float]:
    whole = found.tables[PROBE].filter(pl.col("source").is_null())
    return dict(whole.select("probe", "accuracy").iter_rows())
