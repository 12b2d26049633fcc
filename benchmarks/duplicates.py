"""Texts with planted copies, and what exact Jaccard finds among them: the data and the truth of dedupe.py.

    python benchmarks/duplicates.py [--rows 2000] [--unspaced .3]     # the truth against comparing all with all

A row is one text of some 1.35 kB, as long as the two transcripts of a pair of HH together. 80 in 100 are originals:
sentences of one language one after the other, from the test data (PREFKIT_TEST_DATA, or a sibling shared/data; without
it made-up words), 10 in 100 words drawn anew with the frequencies of a language, so that n-grams go on growing with the
rows. 5 in 100 are Ukrainian, as many Chinese as asked for. An original depends on its number alone.

20 in 100 are copies of originals anywhere in the file, a tenth of them of one original in a thousand: exact, in other
case, with other punctuation, with words added before or behind (1 to 30 in 100), or with 1 to 30 in 100 words
substituted or deleted (most of these are below a Jaccard of .8).

The truth knows nothing of the engine: word 5-grams by a regular expression, an inverted index over each text's rarest
grams (the prefix filter: of two texts with J >= t, one of the rarest |A| - ceil(t|A|) + 1 grams of A is among as many
of B), and the intersection of every pair that is found there.
"""

import argparse
import gzip
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from build import make_sentences
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

DATA = Path(os.environ.get("PREFKIT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
THRESHOLD, NGRAM = 0.8, 5
CHUNK = 10_000
PART = 50_000  # rows of a file
MEAN_LENGTH = 1350  # bytes
CHANGED = 0.1
UKRAINIAN = 0.05  # share of rows
MADE_UP = 200_000
SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han: a word each
WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+|[^\w\s]")
ORIGINAL, EXACT, CASE, PUNCTUATION, ADDED, EDITED = range(6)

Array = np.ndarray[Any, np.dtype[Any]]


class Pool(NamedTuple):
    """Sentences as words of a vocabulary."""

    words: pl.Series  # the most frequent first
    cumulated: Array  # their frequencies, summed up
    flat: Array  # int32: the words of all sentences
    starts: Array  # int64: where each begins
    sizes: Array  # int64: how many words it has
    separator: str
    bytes_a_word: float


class Edges(NamedTuple):
    """Pairs of rows, left < right."""

    left: Array  # int64
    right: Array
    jaccard: Array  # float64


# -- sentences


def _lines(name: str) -> list[Any]:
    path = DATA / name
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def hh_transcripts() -> list[tuple[str, str]]:
    """Chosen and rejected, prompts included."""
    return [(row["chosen"], row["rejected"]) for row in _lines("hh/harmless_base_test_part.jsonl.gz")]


def demo_transcripts(language: str) -> list[str]:
    """Both sides of LLaMA-Factory's demo pairs, prompts included."""
    rows = json.loads((DATA / f"llamafactory/dpo_{language}_demo.json").read_text(encoding="utf-8"))
    return [
        "\n".join([*(turn["value"] for turn in row["conversations"]), row[side]["value"]])
        for row in rows
        for side in ("chosen", "rejected")
    ]


def ukp_arguments() -> list[str]:
    """Every argument of UKPConvArg in its three files, each spelling once."""
    strict = [row[side] for row in _lines("ukpconvarg/strict_pairs.jsonl.gz") for side in ("a1", "a2")]
    votes = [row[side] for row in _lines("ukpconvarg/votes.jsonl.gz") for side in ("arg1", "arg2")]
    ranked = [row["argument"] for row in _lines("ukpconvarg/ranking.jsonl.gz")]
    return list(dict.fromkeys([*strict, *votes, *ranked]))


def real_texts(language: str) -> list[str]:
    """What sentences are taken from."""
    if language == "zh":
        return demo_transcripts("zh") + [row["original"] for row in _lines("mlqe_pe/en-zh.jsonl.gz")]
    if language == "uk":
        return [row["original"] for row in _lines("ua_gec/gec_only_test.jsonl.gz")]
    texts = [text for pair in hh_transcripts() for text in pair] + demo_transcripts("en") + ukp_arguments()
    texts += pl.read_parquet(DATA / "wildbench/candidates.parquet")["model_output"].drop_nulls().to_list()
    return texts + [row["question"] for row in _lines("gsm8k/test.jsonl")]


def made_up_texts(language: str) -> list[str]:
    """Sentences of made-up words with the frequencies of a language, where there is no test data."""
    rng = np.random.default_rng(1)
    vocabulary = _made_up(20_000, rng, language)
    places = np.minimum(rng.zipf(1.2, (40_000, 12)) - 1, len(vocabulary) - 1)
    separator = "" if language == "zh" else " "
    return [separator.join(vocabulary[place] for place in row) + "." for row in places.tolist()]


def _made_up(count: int, rng: np.random.Generator, language: str) -> list[str]:
    if language == "zh":
        return [chr(0x4E00 + place) for place in range(min(count, 20_000))]
    letters = np.array(
        list("\u043e\u0430\u0438\u043d\u0432\u0435\u0440\u0442" if language == "uk" else "etaoinshrdlucmfwypvbgk")
    )
    return ["".join(rng.choice(letters, size)) for size in rng.integers(4, 12, count)]


def make_pool(language: str) -> Pool:
    """The sentences of the test data in a language; of Chinese signs instead of words."""
    texts = real_texts(language) if DATA.exists() else made_up_texts(language)
    signs = language == "zh"
    cut = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s*" if signs else r"(?<=[.!?])\s+|\n+")
    parts = [part for text in texts for part in cut.split(text)]
    sentences = [words for part in parts if len(words := WORD.findall(part) if signs else part.split()) >= 3]
    counts = Counter(word for words in sentences for word in words)
    names = [word for word, _ in counts.most_common()]
    if not signs:
        names += [word for word in _made_up(MADE_UP, np.random.default_rng(2), language) if word not in counts]
    ids = {word: number for number, word in enumerate(names)}
    flat = np.array([ids[word] for words in sentences for word in words], dtype=np.int32)
    sizes = np.array([len(words) for words in sentences])
    frequencies = np.cumsum((np.arange(len(names)) + 2.7) ** -1.07)  # Mandelbrot
    separator = "" if signs else " "
    bytes_a_word = sum(len(word.encode()) * count for word, count in counts.items()) / len(flat) + len(separator)
    words = pl.Series("words", names, dtype=pl.String)
    return Pool(words, frequencies / frequencies[-1], flat, np.cumsum(sizes) - sizes, sizes, separator, bytes_a_word)


def document_lengths() -> Array:
    """Lengths of the two transcripts of HH's pairs, as multiples of their mean."""
    if DATA.exists():
        lengths = np.array([len(chosen) + len(rejected) for chosen, rejected in hh_transcripts()], dtype=np.float64)
    else:
        lengths = np.random.default_rng(3).lognormal(0, 0.7, 2000)
    return lengths / lengths.mean()


# -- documents


def _mixed(numbers: Array, salt: int) -> Array:
    """A hash of numbers: what a row holds is drawn with it."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt * 0x9E3779B9)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(29))


def _drawn(pool: Pool, hashes: Array) -> Array:
    """Words with the frequencies of the vocabulary."""
    return np.searchsorted(pool.cumulated, (hashes >> np.uint64(11)) / 2.0**53).astype(np.int32)


def documents(pool: Pool, numbers: Array, lengths: Array) -> list[Array]:
    """The words of the originals of those numbers."""
    wanted = lengths[(_mixed(numbers, 1) % len(lengths)).astype(np.int64)] * MEAN_LENGTH / pool.bytes_a_word
    wanted = np.maximum(wanted.astype(np.int64), 8)
    most = int(wanted.max() / pool.sizes.mean() * 2) + 20
    places = _mixed(np.add.outer(numbers * 1_000_003, np.arange(most)), 2) % len(pool.sizes)
    sizes = pool.sizes[places.astype(np.int64)]
    before = np.cumsum(sizes, axis=1) - sizes
    taken = np.clip(wanted[:, None] - before, 0, sizes)  # the last sentence is cut off
    flat_sizes = taken.ravel()
    begins = np.repeat(pool.starts[places.astype(np.int64)].ravel() - (np.cumsum(flat_sizes) - flat_sizes), flat_sizes)
    flat = pool.flat[begins + np.arange(len(begins))]
    ends = np.cumsum(taken.sum(axis=1))
    hashes = _mixed(np.repeat(numbers, taken.sum(axis=1)) * 1_000_003 + np.arange(len(flat)) - _first(taken), 3)
    new = np.flatnonzero(hashes % np.uint64(1000) < CHANGED * 1000)
    flat[new] = _drawn(pool, _mixed(hashes[new], 4))
    return np.split(flat, ends[:-1])


def _first(taken: Array) -> Array:
    """Of every word, where its document begins."""
    sizes = taken.sum(axis=1)
    return np.repeat(np.cumsum(sizes) - sizes, sizes)


def _altered(pool: Pool, words: Array, kind: int, row: int) -> Array:
    """The words of a copy: some added before or behind, or some substituted or deleted."""
    rng = np.random.default_rng([5, row])
    if kind == ADDED:
        added = _drawn(pool, rng.integers(0, 2**64, max(1, int(rng.uniform(0.01, 0.3) * len(words))), dtype=np.uint64))
        return np.concatenate([added, words] if rng.random() < 0.5 else [words, added])
    if kind == EDITED:
        rate = 0.01 * 30 ** rng.random()
        hit = rng.random(len(words)) < rate
        edited = np.where(hit, _drawn(pool, rng.integers(0, 2**64, len(words), dtype=np.uint64)), words)
        return edited[~hit | (rng.random(len(words)) < 2 / 3)]
    return words


class Plan(NamedTuple):
    """What each row is."""

    kinds: Array  # int8
    numbers: Array  # int64: of the original that it is, or is a copy of


def plan_rows(rows: int) -> Plan:
    """80 in 100 originals, and copies of any of them."""
    rng = np.random.default_rng(7)
    kinds = np.where(rng.random(rows) < 0.8, ORIGINAL, rng.integers(EXACT, EDITED + 1, rows)).astype(np.int8)
    kinds[0] = ORIGINAL
    originals = np.flatnonzero(kinds == ORIGINAL)
    popular = rng.random(rows) < 0.1
    reach = np.where(popular, max(1, len(originals) // 1000), len(originals))
    sources = originals[(rng.random(rows) * reach).astype(np.int64)]
    return Plan(kinds, np.where(kinds == ORIGINAL, np.arange(rows), sources))


def _texts(pool: Pool, plan: Plan, rows: Array, lengths: Array) -> pl.Series:
    """The texts of some rows."""
    if not len(rows):
        return pl.Series([], dtype=pl.String)
    made = documents(pool, plan.numbers[rows], lengths)
    kinds = plan.kinds[rows]
    made = [_altered(pool, words, kinds[i], int(rows[i])) for i, words in enumerate(made)]
    sizes = [len(words) for words in made]
    frame = pl.DataFrame(
        {"text": pool.words.gather(np.concatenate(made)), "at": np.repeat(np.arange(len(made)), sizes)}
    )
    joined = frame.group_by("at", maintain_order=True).agg(pl.col("text").str.join(pool.separator))
    kind, odd, text = pl.lit(pl.Series(kinds)), pl.lit(pl.Series(rows % 2 == 1)), pl.col("text")
    return joined.select(
        pl.when((kind == CASE) & odd)
        .then(text.str.to_uppercase())
        .when(kind == CASE)
        .then(text.str.to_lowercase())
        .when((kind == PUNCTUATION) & odd)
        .then(text.str.replace_all(r"[,;:\u3001\uff0c]", ""))
        .when(kind == PUNCTUATION)
        .then(text.str.replace_all(r"[.\u3002]", "!"))
        .otherwise(text)
        .alias("text")
    ).to_series()


class Recipe(NamedTuple):
    """How the texts of a file are made."""

    plan: Plan
    lengths: Array
    pools: list[Pool]
    languages: Array  # int64 a row: which pool

    def texts(self, rows: Array) -> pl.Series:
        """The texts of some rows."""
        parts = [rows[self.languages[rows] == number] for number in range(len(self.pools))]
        made = [_texts(pool, self.plan, some, self.lengths) for pool, some in zip(self.pools, parts, strict=True)]
        return pl.concat(made).gather(np.argsort(np.concatenate(parts)))


def recipe_of(rows: int, unspaced: float) -> Recipe:
    """So many rows, a share of them Chinese."""
    plan = plan_rows(rows)
    cuts = np.array([unspaced, unspaced + UKRAINIAN]) * 1000
    languages = np.searchsorted(cuts, _mixed(plan.numbers, 6) % 1000, side="right")
    return Recipe(plan, document_lengths(), [make_pool(language) for language in ("zh", "uk", "en")], languages)


def write_texts(folder: Path, rows: int, unspaced: float = 0.0) -> list[Path]:
    """Parquet files of `PART` rows with a column `text`, if they are not there; a share of the rows is Chinese."""
    home = folder / f"texts-{rows}-{unspaced:g}"
    if not (home / "done").exists():
        home.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(rows, unspaced)
        for part, first in enumerate(range(0, rows, PART)):
            end = min(first + PART, rows)
            starts = range(first, end, CHUNK)
            texts = pl.concat([recipe.texts(np.arange(start, min(start + CHUNK, end))) for start in starts])
            texts.rename("text").to_frame().write_parquet(
                home / f"part-{part:04}.parquet", compression="zstd", compression_level=3, row_group_size=CHUNK
            )
        (home / "done").touch()
    return sorted(home.glob("part-*.parquet"))


def read_texts(files: Iterable[Path]) -> pl.Series:
    """All texts of some files."""
    return pl.concat([pl.read_parquet(path) for path in files])["text"]


# -- pairs for exact duplicates


class Planted(NamedTuple):
    """What a file of pairs holds."""

    unique: int  # pairs that differ after folding
    reversed: int  # pairs that stand both ways, once each


def write_pairs(folder: Path, rows: int) -> tuple[Path, Planted]:
    """A Parquet file of pairs of some 1.4 kB, two a prompt, if it is not there, and what it holds.

    Of a hundred rows 8 are exact copies of another, 4 have other white space, 3 are decomposed (NFD), and 5 have the
    sides swapped.
    """
    rng = np.random.default_rng(11)
    kinds = np.searchsorted([0.8, 0.88, 0.92, 0.95], rng.random(rows), side="right")
    originals = np.flatnonzero(kinds == 0)
    sources = np.where(kinds == 0, np.arange(rows), originals[rng.integers(0, len(originals), rows)])
    twice = len(np.unique(sources[kinds == 4]))
    path = folder / f"pairs-{rows}.parquet"
    if not path.exists():
        accents = pl.int_range(pl.len()) % 8 == 0
        text = pl.col("piece")
        accented = pl.when(accents).then(text.str.replace_all("e", "\u00e9", literal=True)).otherwise(text)
        pieces = make_sentences().alias("piece").to_frame().select(accented).to_series()
        writer = None
        for start in range(0, rows, 100_000):
            some = slice(start, min(start + 100_000, rows))
            table = _pairs(pieces, kinds[some], sources[some]).to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(
                path.with_suffix(".tmp"), table.schema, compression="zstd", compression_level=3
            )
            writer.write_table(table, row_group_size=50_000)
        assert writer is not None
        writer.close()
        path.with_suffix(".tmp").rename(path)
    return path, Planted(len(originals) + twice, twice)


def _pairs(pieces: pl.Series, kinds: Array, sources: Array) -> pl.DataFrame:
    kind = pl.lit(pl.Series(kinds))

    def text(of: Array, count: int, salt: int) -> pl.Expr:
        places = [(_mixed(of, salt + place) % len(pieces)).astype(np.int64) for place in range(count)]
        parts = [pl.lit(pieces.gather(place)) for place in places]
        return pl.concat_str(pl.lit(pl.Series(of)).cast(pl.String), *parts, separator=" ")

    def altered(column: str) -> pl.Expr:
        other = {"chosen": "rejected", "rejected": "chosen"}.get(column, column)
        return (
            pl.when(kind == 2)
            .then(pl.col(column).str.replace_all(". ", ".\n\n  ", literal=True))
            .when(kind == 3)
            .then(pl.col(column).str.normalize("NFD"))
            .when(kind == 4)
            .then(pl.col(other))
            .otherwise(pl.col(column))
            .alias(column)
        )

    made = pl.select(prompt=text(sources // 2, 6, 10), chosen=text(sources, 8, 30), rejected=text(sources, 8, 50))
    return made.select(altered(name) for name in made.columns)


# -- the truth


def words_in(text: str) -> list[str]:
    """The words of a text in order."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def grams_in(text: str, ngram: int = NGRAM) -> set[tuple[str, ...]]:
    """The word n-grams of a text; of fewer words than that, one of them all."""
    words = words_in(text)
    if len(words) < ngram:
        return {tuple(words)}
    return set(zip(*(words[place:] for place in range(ngram)), strict=False))


def _all_grams(texts: Iterable[str], ngram: int) -> pl.DataFrame:
    """Every text's distinct grams: row, gram (hash), of how many texts (df), of how many grams the text is (size)."""
    found = [np.fromiter(map(hash, grams_in(text, ngram)), dtype=np.int64) for text in texts]
    sizes = np.array([len(grams) for grams in found])
    frame = pl.DataFrame({"row": np.repeat(np.arange(len(found)), sizes), "gram": np.concatenate(found)})
    return frame.with_columns(pl.Series("size", np.repeat(sizes, sizes)), df=pl.len().over("gram"))


def exact_edges(texts: pl.Series, threshold: float = THRESHOLD, ngram: int = NGRAM) -> Edges:
    """All pairs of texts whose n-grams have a Jaccard similarity of the threshold or more."""
    grams = _all_grams(texts, ngram)
    # no more than the rarest |A| - ceil(t|A|) + 1 are looked up; grams of one text alone find nobody
    place = pl.int_range(pl.len()).over("row")
    sorted_grams = grams.sort("row", "df", "gram").with_columns(place=place)
    room = pl.col("size") - (threshold * pl.col("size") - 1e-9).ceil()
    prefix = sorted_grams.filter(pl.col("place") <= room, pl.col("df") > 1).select("row", "gram", "size")
    pairs = prefix.join(prefix, on="gram", suffix="_right").filter(
        pl.col("row") < pl.col("row_right"),
        pl.min_horizontal("size", "size_right") >= threshold * pl.max_horizontal("size", "size_right") - 1e-9,
    )
    pairs = pairs.select("row", "row_right").unique().sort("row", "row_right")
    left, right = pairs["row"].to_numpy(), pairs["row_right"].to_numpy()
    jaccard = _jaccards(grams, len(texts), left, right)
    near = jaccard >= threshold
    return Edges(left[near], right[near], jaccard[near])


def _jaccards(grams: pl.DataFrame, num_texts: int, left: Array, right: Array) -> Array:
    """Of pairs of rows, by the elementwise product of rows of a sparse matrix."""
    sizes = np.zeros(num_texts, dtype=np.int64)
    sizes[grams["row"].to_numpy()] = grams["size"].to_numpy()
    shared = grams.filter(pl.col("df") > 1).with_columns(column=pl.col("gram").rank("dense") - 1)
    at = shared["row"].to_numpy(), shared["column"].to_numpy().astype(np.int64)
    width = int(at[1].max()) + 1 if shared.height else 1
    matrix = csr_array((np.ones(shared.height, dtype=np.int32), at), shape=(num_texts, width))
    found = [np.zeros(0)]
    for start in range(0, len(left), 20_000):
        one, other = left[start : start + 20_000], right[start : start + 20_000]
        common = matrix[one].multiply(matrix[other]).sum(axis=1)
        found.append(common / (sizes[one] + sizes[other] - common))
    return np.concatenate(found)


def brute_edges(texts: pl.Series, threshold: float = THRESHOLD, ngram: int = NGRAM) -> Edges:
    """The same by comparing all with all, as Python sets."""
    sets = [grams_in(text, ngram) for text in texts]
    found = []
    for right, one in enumerate(sets):
        for left in range(right):
            common = len(one & sets[left])
            jaccard = common / (len(one) + len(sets[left]) - common)
            if jaccard >= threshold:
                found.append((left, right, jaccard))
    found.sort()
    return Edges(*(np.array(column) for column in zip(*found, strict=True)))


def known_edges(files: list[Path]) -> Edges:
    """The truth of some files, kept beside them."""
    path = files[0].parent / "truth.parquet"
    if not path.exists():
        pl.DataFrame(exact_edges(read_texts(files))._asdict()).write_parquet(path)
    return Edges(*(column.to_numpy() for column in pl.read_parquet(path)))


def removed_by(edges: Edges, num_rows: int) -> Array:
    """Which rows go: all of a connected component but its first row."""
    graph = coo_array((np.ones(len(edges.left)), (edges.left, edges.right)), shape=(num_rows, num_rows))
    _, parts = connected_components(graph, directed=False)
    first = np.full(parts.max() + 1, num_rows)
    np.minimum.at(first, parts, np.arange(num_rows))
    return first[parts] != np.arange(num_rows)


class Quality(NamedTuple):
    """A set of rows to remove, beside that of exact Jaccard."""

    precision: float  # removed by both / removed
    recall: float  # removed by both / removed by exact Jaccard
    pair_recall: float | None  # pairs of both / pairs of exact Jaccard


def quality_of(removed: Array, pairs: tuple[Array, Array] | None, truth: Edges) -> Quality:
    """How good a set of rows to remove is, and the pairs that it comes from (left < right)."""
    wanted = removed_by(truth, len(removed))
    both = np.count_nonzero(removed & wanted)
    share = None
    if pairs is not None:
        keys, known = (left * len(removed) + right for left, right in (pairs, truth[:2]))
        share = float(np.isin(known, keys).mean()) if len(known) else 1.0
    return Quality(both / max(1, np.count_nonzero(removed)), both / max(1, np.count_nonzero(wanted)), share)


def main() -> None:
    """Compare the truth with comparing all with all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--unspaced", type=float, default=0.3, help="share of Chinese rows")
    options = parser.parse_args()
    texts = recipe_of(options.rows, options.unspaced).texts(np.arange(options.rows))
    one, other = exact_edges(texts), brute_edges(texts)
    same = all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    print(f"{texts.len()} texts of {texts.str.len_bytes().mean():.0f} bytes, {len(one.left)} pairs of J >= {THRESHOLD}")
    print(f"inverted index and all with all: {'the same' if same else 'DIFFERENT'} ({len(other.left)})")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
