"""Signatures, permutations and bands are datasketch's, bit by bit; shingles are the plain n-grams of the words."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from datasketch import LeanMinHash, MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit import grams as grams_of_words
from prefkit.minhash import choose_bands, hashes32, permutations, shingles, signatures

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
TEXTS = [
    "",
    " \n",
    "one",
    "One!",
    "a b c d",
    "a b c d e",
    "A  B\tc d\ne",
    "the cat sat on the mat and the cat sat on the mat and the cat sat on the hat",
    "雪が降る夜に猫は静かに眠る。雪が降る夜に犬は走る。",
    "我们明天早上一起去公园散步好吗",
    "mixed 雪 words и слова, caf\u00e9 cafe\u0301 STRASSE stra\u00dfe \U0001f600!",
    "ประเทศไทย is Thai",
    " ".join(f"w{i % 701}" for i in range(3000)),
]
PIECES = [
    "a",
    "b",
    "ab",
    "A",
    "\u00e9",
    "e\u0301",
    "雪",
    "猫",
    "の",
    "!",
    "?",
    " ",
    "  ",
    "\n",
    "_",
    "7",
    "\u00df",
    "и",
]
ANY_TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=16).map("".join), st.text(max_size=20))
Array = np.ndarray[Any, np.dtype[Any]]


def series(texts: list[str]) -> pl.Series:
    return pl.Series("text", texts, pl.String)


def ours(texts: list[str], ngram: int = 5, num_perm: int = 128) -> tuple[list[list[int]], Array]:
    """The 32-bit hashes that go into each signature, and the signatures."""
    found = shingles(series(texts), ngram)
    hashes = hashes32(found)
    assert hashes.dtype == np.uint32
    listed = [hashes[start:end].tolist() for start, end in zip(found.offsets, found.offsets[1:], strict=False)]
    return listed, signatures(found, permutations(num_perm))


def plain(num_perm: int) -> MinHash:
    return MinHash(num_perm=num_perm, seed=1, scheme="affine32", hashfunc=lambda value: value)


# permutations and bands


@pytest.mark.parametrize("num_perm", [16, 64, 100, 128, 256, 1024])
def test_permutations_are_those_of_datasketch(num_perm: int) -> None:
    found = permutations(num_perm)
    assert (str(found.dtype), found.shape) == ("uint32", (2, num_perm))
    assert np.array_equal(found, MinHash(num_perm=num_perm, seed=1, scheme="affine32").permutations)


@pytest.mark.parametrize("weights", [(0.05, 0.95), (0.1, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize(("threshold", "num_perm"), [(0.8, 128), (0.7, 128), (0.9, 128), (0.5, 64), (0.8, 16)])
def test_bands_are_those_that_datasketch_chooses(threshold: float, num_perm: int, weights: tuple[float, float]) -> None:
    index = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=weights)
    assert tuple(choose_bands(threshold, num_perm, weights)) == (index.b, index.r)


@pytest.mark.parametrize("threshold", [0.05, 0.99, 1.0])
@pytest.mark.parametrize("num_perm", [16, 128])
def test_bands_at_the_ends_of_the_range_fit_into_a_signature(threshold: float, num_perm: int) -> None:
    """Where datasketch would refuse (fewer than two bands) there are still some."""
    bands, rows = choose_bands(threshold, num_perm, (0.05, 0.95))
    assert bands >= 1
    assert rows >= 1
    assert bands * rows <= num_perm


# signatures


@pytest.mark.parametrize("num_perm", [16, 100, 128])
@pytest.mark.parametrize("ngram", [1, 3, 5])
def test_signatures_are_those_of_datasketch_fed_the_same_hashes(ngram: int, num_perm: int) -> None:
    hashes, found = ours(TEXTS, ngram, num_perm)
    assert (str(found.dtype), found.shape) == ("uint32", (len(TEXTS), num_perm))
    keyword: dict[str, Any] = {"num_perm": num_perm, "seed": 1, "scheme": "affine32", "hashfunc": lambda value: value}
    for mine, theirs, values in zip(found, MinHash.bulk(hashes, **keyword), hashes, strict=True):
        assert np.array_equal(mine, theirs.hashvalues)
        single = plain(num_perm)
        for value in values:
            single.update(value)
        assert np.array_equal(mine, single.hashvalues)


@PROPERTY
@given(st.lists(ANY_TEXT, max_size=6), st.integers(1, 6))
def test_signatures_of_any_texts_are_those_of_datasketch(texts: list[str], ngram: int) -> None:
    hashes, found = ours(texts, ngram, 32)
    assert found.shape == (len(texts), 32)
    for mine, values in zip(found, hashes, strict=True):
        single = plain(32)
        single.update_batch(values)
        assert np.array_equal(mine, single.hashvalues)


def test_a_signature_does_not_depend_on_its_neighbours() -> None:
    together = ours(TEXTS)[1]
    assert all(np.array_equal(ours([text])[1][0], row) for text, row in zip(TEXTS, together, strict=True))
    assert np.array_equal(ours(TEXTS[::-1])[1], together[::-1])


def test_texts_by_the_thousand_have_the_signatures_that_they_have_alone() -> None:
    """Whatever blocks they are worked through in: long ones, empty ones and many in one."""
    random_ = random.Random(5)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(random_.choices(words, k=random_.choice([0, 1, 4, 5, 40, 200]))) for _ in range(3000)]
    texts[1234] = " ".join(random_.choices(words, k=60_000))
    hashes, found = ours(texts)
    for place in [*random_.sample(range(len(texts)), 60), 0, 1233, 1234, 1235, len(texts) - 1]:
        single = plain(128)
        single.update_batch(hashes[place])
        assert np.array_equal(found[place], single.hashvalues)


def test_texts_with_one_set_of_grams_have_one_signature() -> None:
    """Repeats and order do not count."""
    once = "a b c d e f g"
    _, found = ours([once, f"{once} {once}", f"{once}   {once.upper()} {once}"])
    assert not np.array_equal(found[0], found[1])  # the joints are other grams
    assert np.array_equal(found[1], found[2])


def test_no_texts_have_no_signatures() -> None:
    assert ours([])[1].shape == (0, 128)


Wrap = Callable[[Array], MinHash]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda row: LeanMinHash(seed=1, hashvalues=row, scheme="affine32"),
        lambda row: MinHash(num_perm=128, seed=1, hashvalues=row, scheme="affine32"),
    ],
    ids=["lean", "full"],
)
@pytest.mark.parametrize("weights", [(0.05, 0.95), (0.5, 0.5)])
def test_an_index_of_datasketch_over_our_signatures_finds_the_candidates_of_our_bands(
    wrap: Wrap, weights: tuple[float, float]
) -> None:
    texts = planted(300)
    _, found = ours(texts)
    index = MinHashLSH(threshold=0.8, num_perm=128, weights=weights)
    sketches = [wrap(row) for row in found]
    for place, sketch in enumerate(sketches):
        index.insert(place, sketch)
    bands, rows = choose_bands(0.8, 128, weights)
    assert (bands, rows) == (index.b, index.r)
    cut = found[:, : bands * rows].reshape(len(texts), bands, rows)
    num_candidates = 0
    for place, sketch in enumerate(sketches):
        mine = set(np.flatnonzero((cut == cut[place]).all(axis=2).any(axis=1)).tolist())
        assert set(index.query(sketch)) == mine
        num_candidates += len(mine) - 1
    assert num_candidates > 100


def test_the_share_of_equal_places_estimates_the_similarity() -> None:
    texts = planted(200)
    _, found = ours(texts, num_perm=1024)
    near = [(a, b) for b in range(200) for a in range(b) if oracle.jaccard(texts[a], texts[b], 5) > 0.3]
    assert len(near) > 50
    errors = [float((found[a] == found[b]).mean()) - float(oracle.jaccard(texts[a], texts[b], 5)) for a, b in near]
    assert max(abs(error) for error in errors) < 5 * 0.5 / 1024**0.5
    assert abs(sum(errors) / len(errors)) < 0.01


def planted(number: int) -> list[str]:
    """Texts of which every other one is an edited copy of the one before."""
    random_ = random.Random(3)
    words = [f"w{i}" for i in range(200)]
    texts: list[str] = []
    for place in range(number):
        if place % 2:
            copied = texts[-1].split()
            for _ in range(random_.randrange(3)):
                copied[random_.randrange(len(copied))] = random_.choice(words)
            texts.append(" ".join(copied))
        else:
            texts.append(" ".join(random_.choices(words, k=random_.randrange(30, 80))))
    return texts


# shingles


def listed(texts: list[str], ngram: int) -> list[list[int]]:
    found = shingles(series(texts), ngram)
    assert (str(found.hashes.dtype), len(found.offsets)) == ("uint64", len(texts) + 1)
    return [found.hashes[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)]


def check_shingles(texts: list[str], ngram: int) -> None:
    """One hash for one gram and one gram for one hash, over all the texts; in order, repeats among them."""
    hash_of: dict[tuple[str, ...], int] = {}
    for text, hashes in zip(texts, listed(texts, ngram), strict=True):
        wanted = [gram for gram in oracle.listed_grams(text, ngram) if gram]
        if not wanted:
            assert len(hashes) <= 1  # a text without words: nothing, or that
            continue
        assert len(hashes) == len(wanted)
        for gram, found in zip(wanted, hashes, strict=True):
            assert hash_of.setdefault(gram, found) == found
    assert len(set(hash_of.values())) == len(hash_of)


def test_the_words_of_the_oracle_are_those_of_the_package() -> None:
    for text in TEXTS:
        assert list(oracle.words_of(text)) == grams_of_words.words_in(text, unspaced=True)


@PROPERTY
@given(ANY_TEXT)
def test_the_words_of_the_oracle_are_those_of_the_package_for_any_text(text: str) -> None:
    assert list(oracle.words_of(text)) == grams_of_words.words_in(text, unspaced=True)


@pytest.mark.parametrize("ngram", [1, 2, 3, 5, 8, 32])
def test_shingles_are_the_n_grams_of_the_words(ngram: int) -> None:
    check_shingles(TEXTS, ngram)


@PROPERTY
@given(st.lists(ANY_TEXT, max_size=8), st.integers(1, 6))
def test_shingles_of_any_texts_are_their_n_grams(texts: list[str], ngram: int) -> None:
    check_shingles(texts, ngram)


@PROPERTY
@given(st.lists(ANY_TEXT, min_size=2, max_size=2), st.integers(1, 5))
def test_the_similarity_of_two_sets_of_hashes_is_that_of_their_n_grams(texts: list[str], ngram: int) -> None:
    left, right = (set(hashes) for hashes in listed(texts, ngram))
    one, other = (oracle.grams(text, ngram) - {()} for text in texts)
    if one and other:
        assert (len(left), len(right), len(left & right)) == (len(one), len(other), len(one & other))


def test_a_short_text_is_one_gram_of_all_its_words() -> None:
    assert [len(hashes) for hashes in listed(["a", "a b", "a b c d", "a b c d e", "a b c d e f"], 5)] == [1, 1, 1, 1, 2]
    same = listed(["a b", "A  b", "a b c"], 5)
    assert same[0] == same[1] != same[2]


def test_no_gram_of_one_length_is_a_gram_of_another() -> None:
    """The same word over and over, and beginnings of one text: every length is another gram."""
    repeated = [" ".join(["a"] * length) for length in range(1, 9)]
    begun = [" ".join("abcdefgh"[:length]) for length in range(1, 9)]
    for ngram in (1, 2, 3, 5, 8):
        check_shingles(repeated + begun, ngram)
    short = [hashes[0] for hashes in listed(repeated[:5], 5)]
    assert len(set(short)) == 5
    assert set(listed(["a a a a a a"], 5)[0]) == {short[4]}


def test_words_that_only_join_to_the_same_are_other_grams() -> None:
    check_shingles(["ab c", "a bc", "a b c", "abc", "ab", "a b", "c ab", "abcdefgh i", "abcdefg hi"], 2)
    check_shingles(["ab c", "a bc", "a b c", "abc", "ab", "a b", "c ab", "abcdefgh i", "abcdefg hi"], 5)


def test_the_order_of_words_counts_and_that_of_grams_does_not() -> None:
    one, other = listed(["a b c d e", "e d c b a"], 5)
    assert one != other
    (forward, backward) = listed(["a b a b a", "b a b a b"], 2)
    assert set(forward) == set(backward)
    assert len(set(forward)) == 2


def test_characters_without_spaces_between_words_are_words_by_themselves() -> None:
    assert [len(hashes) for hashes in listed(["猫は静かに眠る", "猫は静か", "slept", "ประเทศ"], 5)] == [3, 1, 1, 2]
    left, right = (set(hashes) for hashes in listed(["今日は雪が降る夜です", "今日は雪が降る朝です"], 3))
    assert len(left & right) == 5


def test_upper_case_and_composed_characters_are_folded_into_one_gram() -> None:
    one, other = listed(["CAF\u00c9 STRASSE Σ", "cafe\u0301 stra\u00dfe σ"], 3)
    assert one == other


def test_hashes_of_grams_keep_their_upper_half() -> None:
    found = shingles(series(TEXTS), 3)
    assert hashes32(found).tolist() == [value >> 32 for value in found.hashes.tolist()]


def test_a_null_among_texts_disturbs_no_other() -> None:
    found = shingles(pl.Series("text", ["a b c", None, "d e f"], pl.String), 2)
    assert len(found.offsets) == 4
    parts = [found.hashes[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    assert [parts[0], parts[2]] == listed(["a b c", "d e f"], 2)
