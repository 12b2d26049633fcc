import gzip
import json
import re
import sys
import unicodedata
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit import grams as grams_module
from prefkit.audit import counting
from prefkit.audit.counting import ONE, Texts, Weights, as_fixed, count_grams, of_ids, of_words, slots
from prefkit.audit.postings import ids_of, names_of, postings
from prefkit.grams import Lookup, gram_hash, hash_ids, hash_words, ids_hash, ngrams
from prefkit.spill import Spill

quick = settings(deadline=None, derandomize=True, database=None, max_examples=60)
WORD = re.compile(r"\w+|[^\w\s]")
ODD_ONES = "".join(
    [
        "aA ßİıſKÅÅe\u0301\u0308é\u0344ǰΐﬁ’“”",
        "\u2028\u3000\u00a0\x00\x1c\x1f\x7f\x85_·\u0660\u1100\u1161\u11a8한\u09c7\u09be𝔘𐐀😀\u200d\ufeff",
    ]
)
any_text = st.text(max_size=40) | st.text(alphabet=ODD_ONES, max_size=12) | st.text(alphabet="ab'. ", max_size=20)


# -- the plain code


def plain_words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def plain_grams(tokens: Sequence[Any], n: int) -> set[tuple[Any, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def plain_counts(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]], n: int) -> dict[tuple[Any, ...], list[int]]:
    """b, c, both and first pair of every n-gram."""
    b, c, both = Counter[Any](), Counter[Any](), Counter[Any]()
    first: dict[tuple[Any, ...], int] = {}
    for number, (chosen, rejected) in enumerate(pairs):
        one, other = plain_grams(chosen, n), plain_grams(rejected, n)
        b.update(one - other)
        c.update(other - one)
        both.update(one & other)
        for gram in one | other:
            first.setdefault(gram, number)
    return {gram: [b[gram], c[gram], both[gram], number] for gram, number in first.items()}


def plain_mixed(value: int) -> int:
    """The finaliser of MurmurHash3, as published."""
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD % 2**64
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 % 2**64
    return value ^ value >> 33


def texts_of(pairs: Sequence[tuple[str, str]], height: int = 4096) -> Texts:
    frame = pl.DataFrame(pairs, schema={"chosen": pl.String, "rejected": pl.String}, orient="row")
    return lambda: frame.iter_slices(height)


def as_dict(counts: pl.DataFrame, n: int) -> dict[int, list[int]]:
    columns = ("hash", "num_chosen_only", "num_rejected_only", "num_both", "first_pair")
    return {row[0]: list(row[1:]) for row in counts.filter(pl.col("n") == n).select(columns).iter_rows()}


def hashed_plainly(counts: dict[tuple[Any, ...], list[int]], of: Callable[[Any], int] = gram_hash) -> dict[int, Any]:
    return {of(gram): numbers for gram, numbers in counts.items() if numbers[0] + numbers[1] > 0}


def hh(test_data: Path) -> list[tuple[str, str]]:
    with gzip.open(test_data / "hh" / "harmless_base_test_part.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    chosen, rejected = ([row[side].rsplit("\n\nAssistant:", 1)[-1] for row in rows] for side in ("chosen", "rejected"))
    return list(zip(chosen, rejected, strict=True))


# -- hashes


@quick
@given(st.lists(any_text, max_size=8))
def test_words_are_those_of_the_regular_expression_over_folded_text(texts: list[str]) -> None:
    found = hash_words(pl.Series(texts, dtype=pl.String))
    assert np.diff(found.offsets).tolist() == [len(plain_words(text)) for text in texts]
    assert found.hashes.tolist() == [gram_hash([word]) for text in texts for word in plain_words(text)]


@quick
@given(st.lists(any_text, max_size=5), st.integers(1, 4))
def test_n_grams_stay_inside_their_text(texts: list[str], n: int) -> None:
    found = ngrams(hash_words(pl.Series(texts, dtype=pl.String)), n)
    words = [plain_words(text) for text in texts]
    expected = [[gram_hash(some[i : i + n]) for i in range(len(some) - n + 1)] for some in words]
    assert found.hashes.tolist() == [gram for grams in expected for gram in grams]
    assert np.diff(found.offsets).tolist() == [len(grams) for grams in expected]


@pytest.mark.parametrize("around", ["a{}b", "e{}\u0301", "\u1100{}\u0327 Z"])
def test_every_character_that_folds_or_composes_is_read_as_python_reads_it(around: str) -> None:
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)]
    texts = [around.format(chr(point)) for point in points]
    words = [plain_words(text) for text in texts]
    found = hash_words(pl.Series(texts))
    assert np.diff(found.offsets).tolist() == [len(some) for some in words]
    alone = hash_words(pl.Series([word for some in words for word in some]))  # folded already, one word a text
    assert np.diff(alone.offsets).tolist() == [1] * len(alone.hashes)
    assert np.array_equal(found.hashes, alone.hashes)


def test_no_settled_character_composes_with_one_before_it() -> None:
    seconds = set()
    for point in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
    jamo = [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]  # of Hangul syllables, which compose by rule
    assert all(grams_module._kind_of(point) >= grams_module.UNSETTLED for point in [*seconds, *jamo])


def test_the_hash_of_a_word_mixes_eight_bytes_at_a_time() -> None:
    kept, odd = 2**64 - 2**11, 0x9E3779B97F4A7C15
    cat, long = plain_mixed(int.from_bytes(b"cat", "little")), plain_mixed(int.from_bytes(b"straight", "little"))
    longer = plain_mixed((long * odd % 2**64) ^ int.from_bytes(b"ened", "little"))
    assert gram_hash(["cat"]) == cat & kept
    assert gram_hash(["straightened"]) == longer & kept
    both = plain_mixed(((cat & kept) * odd + (longer & kept)) % 2**64)
    assert gram_hash(["cat", "straightened"]) == both & kept
    assert ngrams(hash_words(pl.Series(["Cat STRAIGHTENED"])), 2).hashes.tolist() == [both & kept]


def test_words_do_not_run_from_one_text_into_the_next() -> None:
    found = hash_words(pl.Series(["ab", "", None, "cd", "é", "f"], dtype=pl.String))
    assert found.offsets.tolist() == [0, 1, 1, 1, 2, 3, 4]
    assert found.hashes.tolist() == [gram_hash([word]) for word in ("ab", "cd", "é", "f")]


def test_hashing_leaves_the_texts_as_they_are() -> None:
    texts = pl.Series(["Straße", "CAFE\u0301"])
    hash_words(texts)
    assert texts.to_list() == ["Straße", "CAFE\u0301"]


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17, 5000])
def test_long_words_differ_in_their_last_letter(length: int) -> None:
    found = hash_words(pl.Series(["x" * length, "x" * (length - 1) + "y", "X" * length]))
    assert found.hashes[0] == found.hashes[2] != found.hashes[1]
    assert found.hashes.tolist()[:2] == [gram_hash(["x" * length]), gram_hash(["x" * (length - 1) + "y"])]


def test_token_ids_are_hashed_in_their_lists() -> None:
    found = hash_ids(pl.Series([[1, 0], None, [], [128_255]], dtype=pl.List(pl.Int32)))
    assert found.offsets.tolist() == [0, 2, 2, 2, 3]
    assert found.hashes.tolist() == [ids_hash([1]), ids_hash([0]), ids_hash([128_255])]
    assert ngrams(found, 2).hashes.tolist() == [ids_hash([1, 0])]


@quick
@given(st.sets(st.integers(0, 2**10)), st.lists(st.integers(0, 2**10)), st.sampled_from([11, 40, 54]))
def test_a_lookup_is_a_dictionary(inside: set[int], asked: list[int], shift: int) -> None:
    """With shift 11 all hashes want the same slot."""
    keys = np.array(sorted(inside, key=lambda key: key * 7 % 31), dtype=np.uint64) << np.uint64(shift)
    places = {int(key): place for place, key in enumerate(keys)}
    queries = np.array(asked, dtype=np.uint64) << np.uint64(shift)
    assert Lookup.of(keys).find(queries).tolist() == [places.get(int(query), -1) for query in queries]


# -- counts


@quick
@given(st.lists(st.tuples(any_text, any_text), max_size=12), st.integers(1, 5))
def test_counts_are_those_of_sets_and_counters(pairs: list[tuple[str, str]], height: int) -> None:
    counts = count_grams(texts_of(pairs, height), of_words, (1, 2))
    words = [(plain_words(chosen), plain_words(rejected)) for chosen, rejected in pairs]
    for n in (1, 2):
        assert as_dict(counts, n) == hashed_plainly(plain_counts(words, n))


def test_the_table_has_one_order_and_its_columns_whatever_comes_in() -> None:
    empty = count_grams(texts_of([]), of_words, (1, 2, 3))
    full = count_grams(texts_of([("b a", "c"), ("a a", "")]), of_words, (2, 1))
    expected = {"hash": pl.UInt64, "n": pl.Int32}
    expected |= dict.fromkeys(("num_chosen_only", "num_rejected_only", "num_both", "first_pair"), pl.Int64)
    assert dict(empty.schema) == dict(full.schema) == expected
    assert empty.is_empty()
    assert full["n"].to_list() == [1, 1, 1, 2, 2]
    assert all(full.filter(pl.col("n") == n)["hash"].is_sorted() for n in (1, 2))
    assert as_dict(full, 1)[gram_hash(["a"])] == [2, 0, 0, 0]


def test_what_is_on_both_sides_cancels() -> None:
    counts = count_grams(texts_of([("the cat", "the dog"), ("the", "the"), ("the", "a")]), of_words, [1])
    assert as_dict(counts, 1) == {
        gram_hash(["the"]): [1, 0, 2, 0],
        gram_hash(["cat"]): [1, 0, 0, 0],
        gram_hash(["dog"]): [0, 1, 0, 0],
        gram_hash(["a"]): [0, 1, 0, 2],
    }
    assert count_grams(texts_of([("same", "same")]), of_words, [1]).is_empty()


def test_rare_n_grams_are_left_out_on_request() -> None:
    pairs = [("sorry", "x")] * 10 + [("fine", "x")] * 9
    counts = count_grams(texts_of(pairs), of_words, [1], min_discordant=10)
    assert as_dict(counts, 1) == {gram_hash(["sorry"]): [10, 0, 0, 0], gram_hash(["x"]): [0, 19, 0, 0]}


def made(num_pairs: int, seed: int, words: int = 40) -> list[tuple[str, str]]:
    """Pairs of some 12 words with the frequencies of a language."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.zipf(1.4, (num_pairs, 2, 12)), words)
    lengths = rng.integers(0, 13, (num_pairs, 2))
    sides = [
        [
            " ".join(f"w{word}" for word in text[:length])
            for text, length in zip(drawn[:, k], lengths[:, k], strict=True)
        ]
        for k in (0, 1)
    ]
    return list(zip(*sides, strict=True))


def plain_trigrams(words: Sequence[tuple[list[str], list[str]]]) -> dict[int, Any]:
    """Those both of whose bigrams are in ten pairs."""
    common = {gram for gram, numbers in plain_counts(words, 2).items() if sum(numbers[:3]) >= 10}
    counted = plain_counts(words, 3)
    return hashed_plainly({g: numbers for g, numbers in counted.items() if {g[:2], g[1:]} <= common})


@pytest.mark.parametrize("n", [(3,), (1, 2, 3)])
def test_trigrams_are_counted_where_both_bigrams_are_in_ten_pairs(n: tuple[int, ...]) -> None:
    pairs = made(300, seed=1)
    words = [(plain_words(chosen), plain_words(rejected)) for chosen, rejected in pairs]
    counts = count_grams(texts_of(pairs), of_words, n)
    expected = plain_trigrams(words)
    assert 0 < len(expected) < len(hashed_plainly(plain_counts(words, 3)))
    assert as_dict(counts, 3) == expected
    assert sorted(set(counts["n"])) == list(n)


def test_a_phrase_is_counted_whose_words_are_on_both_sides() -> None:
    """The bigrams are discordant in two pairs only, and yet in 12."""
    pairs = [("a b c", "a b c")] * 10 + [("a b c", "a b x b c")] * 2
    assert as_dict(count_grams(texts_of(pairs), of_words, [3]), 3) == {gram_hash(["a", "b", "c"]): [2, 0, 10, 0]}


def test_sums_are_those_of_the_pairs_that_an_n_gram_separates() -> None:
    pairs = made(200, seed=2)
    rng = np.random.default_rng(3)
    weights = Weights(as_fixed(rng.normal(size=(200, 2))), as_fixed(rng.uniform(size=(200, 3))))
    counts = count_grams(texts_of(pairs, 7), of_words, (1, 2), weights=weights)
    sums: dict[tuple[int, int], list[int]] = {}
    for number, sides in enumerate(pairs):
        for n in (1, 2):
            chosen, rejected = (plain_grams(plain_words(side), n) for side in sides)
            for gram in chosen ^ rejected:
                sign = 1 if gram in chosen else -1
                new = [sign * int(x) for x in weights.signed[number]] + [int(x) for x in weights.unsigned[number]]
                old = sums.get((n, gram_hash(gram)), [0] * 5)
                sums[n, gram_hash(gram)] = [x + y for x, y in zip(old, new, strict=True)]
    names = ["signed_0", "signed_1", "unsigned_0", "unsigned_1", "unsigned_2"]
    assert {(row[0], row[1]): list(row[2:]) for row in counts.select("n", "hash", *names).iter_rows()} == sums


def test_fixed_point_rounds_to_the_nearest() -> None:
    assert as_fixed(np.array([1.0, -0.5, 0.4 / ONE, 0.6 / ONE])).tolist() == [2**30, -(2**29), 0, 1]


@pytest.mark.parametrize(("memory_limit", "height"), [(0, 100), (20_000, 20), (100_000, 4096), (10**9, 7)])
def test_results_depend_on_neither_memory_nor_blocks(memory_limit: int, height: int, tmp_path: Path) -> None:
    pairs = made(250, seed=4, words=300)
    weights = Weights(as_fixed(np.arange(250.0)[:, None]), as_fixed(np.ones((250, 1))))
    expected = count_grams(texts_of(pairs), of_words, (1, 2, 3), weights=weights)
    with Spill(tmp_path) as scratch:
        counts = count_grams(
            texts_of(pairs, height), of_words, (1, 2, 3), weights=weights, memory_limit=memory_limit, scratch=scratch
        )
        assert (scratch.folder is not None) == (memory_limit < 10**9)
        assert not list(scratch.partitions())
    assert counts.equals(expected)
    assert not list(tmp_path.iterdir())


def test_large_blocks_are_cut_where_their_bytes_or_pairs_are_many() -> None:
    pairs = [(f"w{i} " + "long " * 3000, "x") for i in range(150)] + made(3000, seed=5)
    words = [(plain_words(chosen), plain_words(rejected)) for chosen, rejected in pairs]
    counts = count_grams(texts_of(pairs, 10_000), of_words, [1])
    assert as_dict(counts, 1) == hashed_plainly(plain_counts(words, 1))


def test_only_some_n_grams_are_counted_on_request() -> None:
    pairs = made(100, seed=6)
    everything = plain_counts([(plain_words(one), plain_words(other)) for one, other in pairs], 3)
    rare = min(everything, key=lambda gram: (sum(everything[gram][:3]), gram))  # not held back by the rule of trigrams
    only = np.array([gram_hash(["w1"]), gram_hash(["w1", "w2"]), gram_hash(rare), gram_hash(["absent"])], np.uint64)
    counts = count_grams(texts_of(pairs), of_words, (1, 2, 3), only=np.append(only, only))
    full = count_grams(texts_of(pairs), of_words, (1, 2))
    assert counts.filter(pl.col("n") < 3).equals(full.filter(pl.col("hash").is_in(only.tolist())))
    assert as_dict(counts, 3) == {gram_hash(rare): everything[rare]}


def test_token_ids_are_counted_like_words() -> None:
    pairs = [([5, 6, 7], [5]), ([6], [6, 7]), ([], [5])]
    frame = pl.DataFrame(pairs, schema=dict.fromkeys(("chosen_ids", "rejected_ids"), pl.List(pl.Int32)), orient="row")
    counts = count_grams(lambda: frame.iter_slices(2), of_ids, (1, 2))
    for n in (1, 2):
        assert as_dict(counts, n) == hashed_plainly(plain_counts(pairs, n), ids_hash)
    assert ids_of(lambda: frame.iter_slices(2), counts.filter(pl.col("n") == 2).sort("first_pair")) in (
        [[5, 6], [6, 7]],
        [[6, 7], [5, 6]],
    )


def test_slots_are_sorted_and_say_the_side() -> None:
    block = pl.DataFrame({"chosen": ["a b a", "b"], "rejected": ["b c", "a"]})
    found = slots(*of_words(block))
    expected = sorted([("a", 0, 1), ("b", 0, 0), ("c", 0, -1), ("b", 1, 1), ("a", 1, -1)], key=lambda slot: slot[1])
    expected.sort(key=lambda slot: gram_hash([slot[0]]))
    assert list(zip(found.hashes.tolist(), found.pairs.tolist(), found.signs.tolist(), strict=True)) == [
        (gram_hash([word]), pair, sign) for word, pair, sign in expected
    ]


# -- names and postings


@quick
@given(st.lists(st.tuples(any_text, any_text), max_size=8), st.integers(1, 3))
def test_names_are_the_words_of_the_n_gram(pairs: list[tuple[str, str]], height: int) -> None:
    texts = texts_of(pairs, height)
    counts = count_grams(texts, of_words, (1, 2)).reverse()
    words = [(plain_words(chosen), plain_words(rejected)) for chosen, rejected in pairs]
    spelt = {gram_hash(gram): " ".join(gram) for n in (1, 2) for gram in plain_counts(words, n)}
    assert names_of(texts, counts) == [spelt[gram] for gram in counts["hash"]]


def test_an_n_gram_is_spelt_with_spaces_between_its_words() -> None:
    texts = texts_of([("Yes. I'm", "no")])
    wanted = pl.DataFrame({"hash": [gram_hash(["i", "'", "m"])], "n": [3], "first_pair": [0]})
    wanted = wanted.cast({"hash": pl.UInt64})
    assert names_of(texts, wanted) == ["i ' m"]
    assert names_of(texts, wanted.clear()) == []


@quick
@given(st.lists(st.tuples(any_text, any_text), max_size=8), st.integers(1, 3))
def test_postings_are_all_discordant_pairs(pairs: list[tuple[str, str]], height: int) -> None:
    texts = texts_of(pairs, height)
    wanted = count_grams(texts, of_words, (1, 2))[::2].reverse()
    rows = {key: row for row, key in enumerate(wanted.select("hash", "n").iter_rows())}
    expected = []
    for number, sides in enumerate(pairs):
        for n in (1, 2):
            chosen, rejected = (plain_grams(plain_words(side), n) for side in sides)
            found = [(rows.get((gram_hash(gram), n)), gram in chosen) for gram in chosen ^ rejected]
            expected += [(row, number, 1 if ahead else -1) for row, ahead in found if row is not None]
    gram, pair, sign = postings(texts, of_words, wanted)
    assert list(zip(gram.tolist(), pair.tolist(), sign.tolist(), strict=True)) == sorted(expected)
    assert [array.dtype.name for array in (gram, pair, sign)] == ["int64", "int64", "int8"]


def test_postings_say_what_the_counts_say() -> None:
    pairs = made(300, seed=7)
    counts = count_grams(texts_of(pairs), of_words, (1, 2, 3))
    gram, _, sign = postings(texts_of(pairs, 50), of_words, counts)
    assert np.bincount(gram[sign > 0], minlength=counts.height).tolist() == counts["num_chosen_only"].to_list()
    assert np.bincount(gram[sign < 0], minlength=counts.height).tolist() == counts["num_rejected_only"].to_list()


# -- scratch


def test_a_spill_gives_back_what_it_got_by_partition_once(tmp_path: Path) -> None:
    with Spill(tmp_path / "scratch") as scratch:
        assert not (tmp_path / "scratch").exists()
        for partition, value in [(3, 1), (0, 2), (3, 3)]:
            scratch.append(partition, pl.DataFrame({"x": [value]}))
        assert [(number, frame["x"].to_list()) for number, frame in scratch.partitions()] == [(0, [2]), (3, [1, 3])]
        assert list(scratch.partitions()) == []
    assert not list((tmp_path / "scratch").iterdir())


def test_a_spill_leaves_nothing_when_the_work_fails(tmp_path: Path) -> None:
    def fail() -> Iterator[pl.DataFrame]:
        yield from texts_of(made(50, seed=8))()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Spill(tmp_path) as scratch:
        count_grams(fail, of_words, memory_limit=0, scratch=scratch)
    assert not list(tmp_path.iterdir())


def test_tables_of_partitions_are_let_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together do not fit into memory."""
    merged, made_so_far = counting.merged, list[weakref.ref[pl.DataFrame]]()

    def watched(counts: pl.DataFrame) -> pl.DataFrame:
        assert sum(table() is not None for table in made_so_far) <= 3  # one a length of n-grams, and the one in hand
        table = merged(counts)
        made_so_far.append(weakref.ref(table))
        return table

    class InMemory:
        def __init__(self) -> None:
            self.parts: dict[int, list[pl.DataFrame]] = {}

        def append(self, partition: int, frame: pl.DataFrame) -> None:
            self.parts.setdefault(partition, []).append(frame)

        def partitions(self) -> Iterator[tuple[int, pl.DataFrame]]:
            return ((number, pl.concat(self.parts.pop(number))) for number in sorted(self.parts))

    monkeypatch.setattr(counting, "merged", watched)
    count_grams(texts_of(made(200, seed=9)), of_words, (1, 2), memory_limit=0, scratch=InMemory())
    assert len(made_so_far) > 64


# -- real data


def test_counts_of_real_pairs_are_those_of_counters(test_data: Path, tmp_path: Path) -> None:
    pairs = hh(test_data)
    with Spill(tmp_path) as scratch:
        counts = count_grams(texts_of(pairs), of_words, (1, 2, 3), memory_limit=2_000_000, scratch=scratch)
    words = [(plain_words(chosen), plain_words(rejected)) for chosen, rejected in pairs]
    table = {n: {" ".join(gram): v for gram, v in plain_counts(words, n).items() if v[0] + v[1]} for n in (1, 2)}
    named = counts.with_columns(name=pl.Series(names_of(texts_of(pairs), counts)))
    columns = ("name", "num_chosen_only", "num_rejected_only", "num_both", "first_pair")
    for n in (1, 2):
        rows = named.filter(pl.col("n") == n).select(columns).iter_rows()
        assert {row[0]: list(row[1:]) for row in rows} == table[n]
    assert as_dict(counts, 3) == plain_trigrams(words)


@pytest.mark.slow
def test_every_character_of_unicode_is_read_as_python_reads_it() -> None:
    points = [*range(0x20000, sys.maxunicode + 1)]
    for some in pairwise([*range(0, len(points), 100_000), len(points)]):
        texts = [f"a{chr(point)}b" for point in points[slice(*some)]]
        words = [plain_words(text) for text in texts]
        found = hash_words(pl.Series(texts))
        assert np.diff(found.offsets).tolist() == [len(parts) for parts in words]
        alone = hash_words(pl.Series([word for parts in words for word in parts]))
        assert np.array_equal(found.hashes, alone.hashes)
