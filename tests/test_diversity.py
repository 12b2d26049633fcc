"""How varied responses are, counted by hand."""

import polars as pl
import pytest

from prefkit.diversity import distinct_n, diversity_by_prompt, mean_similarity, word_pairs, words


def test_words_are_casefolded_and_signs_count() -> None:
    assert words("It's A Test.") == ["it", "'", "s", "a", "test", "."]


def test_distinct_n_counts_different_ngrams_of_all_texts() -> None:
    texts = ["a b a", "a b"]
    assert distinct_n(texts, 1) == pytest.approx(2 / 5)
    assert distinct_n(texts, 2) == pytest.approx(2 / 3)  # (a b), (b a), (a b)
    assert distinct_n(texts, 3) == pytest.approx(1)
    assert distinct_n(texts, 4) is None
    assert distinct_n([], 1) is None
    assert distinct_n(["", " "], 1) is None


def test_a_text_has_word_pairs_with_its_ends() -> None:
    assert word_pairs("42") == {("", "42"), ("42", "")}
    assert word_pairs("") == {("", "")}


def test_similarity_is_the_mean_over_all_twos() -> None:
    assert mean_similarity(["a b", "a c"]) == pytest.approx(1 / 5)
    assert mean_similarity(["a b", "a b"]) == 1
    assert mean_similarity(["a", "b"]) == 0
    # of three: (a b, a c) 1/5, (a b, a b) 1, (a c, a b) 1/5
    assert mean_similarity(["a b", "a c", "A b"]) == pytest.approx(1.4 / 3)
    assert mean_similarity(["a"]) is None


def test_diversity_is_by_prompt_and_null_of_a_single_response() -> None:
    rows = pl.DataFrame({"prompt_id": ["q", "p", "p", "p", "p"], "response": ["one", "a b", "a c", "a b", "a c"]})
    found = diversity_by_prompt(rows)
    assert found["prompt_id"].to_list() == ["p", "q"]
    assert found["distinct_responses"].to_list() == [0.5, None]
    # six twos: two of them are the same text, four share 1/5
    assert found["self_similarity"].to_list() == [pytest.approx((2 + 4 / 5) / 6), None]
    assert diversity_by_prompt(rows.clear()).is_empty()
