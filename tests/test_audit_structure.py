"""Features hit what they name and not what looks like it; the table equals naive counts, scipy and a jackknife."""

import gzip
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prefkit.audit.features import FEATURES, ROWS, Sides, side_features
from prefkit.audit.significance import fit_length, z_of_signs
from prefkit.audit.structure import Effect, beside_length, pair_similarity, paired_effect, structure_table
from prefkit.audit.values import CATEGORICAL, side_values
from prefkit.format import schema
from prefkit.text import WORD

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
MODEL = {"model_tokens", "truncated", "no_end_token"}  # handed in by whoever has the model
TEXTS = st.text(alphabet="ab ABcß.,!\n'éÉ\u0301Жжїі漢かकि️—’“”\u200d\U0001f600 ", max_size=90)


def block(rows: Sequence[tuple[str, str, str]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(["prompt", "chosen", "rejected"], pl.String), orient="row")


def feature_of(name: str, text: str, prompt: str = "") -> float:
    return float(side_features(block([(prompt, text, "")])).chosen[name][0])


def value_of(name: str, text: str) -> str | None:
    found: str | None = side_values(block([("", text, "")])).chosen[name][0]
    return found


def folded(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


# numbers of a side: hits, and what only looks like one


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("words", "Don't STOP!", 5),
        ("characters", "caf\u00e9 \U0001f600", 6),
        ("lines", "a\n\n  \nb\r\nc", 3),
        ("lines", " \n ", 0),
        ("sentences", "One. Two! Really?! Yes...", 4),
        ("sentences", "It costs 3.5 at example.com", 1),
        ("sentences", "你好。再见！", 2),
        ("sentences", "  ", 0),
        ("bold", "**a** and **two words**", 2),
        ("bold", "<b>x</b> <strong>y</strong>", 2),
        ("bold", "2 ** 3 ** 4, __init__, *one*", 0),
        ("list_items", "- a\n* b\n+ c\n 1. d\n12) e\n• f", 6),
        ("list_items", "1、一\n2、二", 2),
        ("list_items", "-5 degrees\n3.14 is pi\n**bold** start\n---\n1999. A year", 0),
        ("headers", "# One\n### Three\nC# is", 2),
        ("headers", "#hashtag\n####### seven\n    # code", 0),
        ("table_rows", "| a | b |\n|---|---|\n| 1 | 2 |", 3),
        ("table_rows", "a | b\n||x||\n|x|", 0),
        ("code_fences", "```python\nx\n```\n~~~\n~~~", 4),
        ("code_fences", "use `x` or ``y`` or a ``` b", 0),
        ("latex", r"$x^2$ and \(y\) and \[z\] and $n$ and $\alpha$", 5),
        ("latex", "$$E = mc^2$$ \\begin{align}", 2),
        ("latex", "It costs $5 and $10, or $5-$10; echo $HOME $PATH", 0),
        ("links", "see https://a.org/x?y, [b](http://www.b.org) or www.c.org", 3),
        ("links", "a www. prefix, an http header, awww.now", 0),
        ("exclamation_marks", "a! b！ !=", 3),
        ("question_marks", "a? b？ ¿", 2),
        ("emoji", "\U0001f600 \u2705 \u2764\ufe0f", 3),
        ("emoji", "\U0001f44d\U0001f3fd", 1),  # with a skin tone
        ("emoji", "\U0001f468\u200d\U0001f469\u200d\U0001f467", 1),  # a family, joined
        ("emoji", "\U0001f1fa\U0001f1e6\U0001f1ea\U0001f1ea", 2),  # two flags
        ("emoji", "© ™ 1 # → ❤ ä", 0),
        ("typographic_marks", "“a” — ‘b’ «c» … –", 9),
        ("typographic_marks", "\"a\" - 'b' ... é", 0),
        ("repeated_lines", "a b\nc\na b\n- a b.", 0.5),
        ("repeated_lines", "a\nb\n\n\n}\n}\n---\n---", 0),
        ("repeated_lines", "a a a a", 0),
        ("type_token_ratio", "the cat the dog", 0.75),
        ("type_token_ratio", "", 0),
        ("non_latin_share", "ab жї 123", 0.5),
        ("non_latin_share", "naïve “quotes” \U0001f600", 0),
        ("mojibake", "donâ€™t cafÃ© \ufffd Ð¿Ñ€Ð¸Ð²ÐµÑ‚", 4),
        ("mojibake", "PÃO, MAÇÃ”, ESPAÑOL, Âge, â, Ðakota", 0),
        ("control_tokens", "<|im_end|> [INST] x [/INST] </s> <start_of_turn> <<SYS>> <|eot_id|>", 7),
        ("control_tokens", "a <| b |> c, [INSTALL], <span>, <system>, x|>y", 0),
        ("role_markers", "x\n\nHuman: y\n\nAssistant: z\n### Response:\nw", 3),
        ("role_markers", "Human beings: a kind. The Assistant: x\nUsers: y", 0),
    ],
)
def test_a_feature_counts_what_it_names_and_not_what_looks_like_it(name: str, text: str, expected: float) -> None:
    assert feature_of(name, text) == expected


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        (
            "affirmative_opener",
            [
                "Sure, here",
                "Certainly!",
                '"Of course. x',
                "**Absolutely**!",
                "Here's a list",
                "Sure\u2014x",
                "Okay",
                "I'd be happy to help",
                "I\u2019d be glad to",
                "Here are three",
                "Sure here is",
                "sure thing!",
            ],
            [
                "Surely not",
                "Sure-fire ways",
                "Of course not.",
                "Certainly not!",
                "Hereby",
                "Yes, it is",
                "Okayama",
                "The",
                "Absolutely nothing helps",
                "Well, sure, here",
                "Definitely the best",
                "I'd be careful",
            ],
        ),
        (
            "sycophantic_opener",
            [
                "Great question!",
                "What a great question",
                "That's an excellent point.",
                "You're absolutely right",
                "Thank you for asking",
                "That is such a thoughtful question",
                "I love this idea",
                "Thanks for your question",
            ],
            [
                "Great Britain is",
                "Questions are great",
                "You're all right-handed",
                "Thank you for smoking is a film",
                "That's a question of taste",
                "The question is great",
                "Good morning",
                "I love pizza",
            ],
        ),
        (
            "refusals",
            [
                "As an AI, I",
                "as a large language model",
                "I'm sorry, but I can't",
                "I cannot help with that",
                "I\u2019m not able to provide that",
                "I won't be able to answer",
                "I must decline",
                "我无法回答",
                "I can't do that",
            ],
            [
                "As an aid",
                "I'm sorry for your loss",
                "I can't wait to go",
                "I cannot stress this enough",
                "as an airline",
                "They must decline",
                "I can help with that",
                "He said I am able to",
            ],
        ),
        (
            "hedges",
            [
                "It might",
                "Perhaps so",
                "I think so",
                "it may rain",
                "It depends",
                "MAYBE",
                "seems fine",
                "in my opinion",
            ],
            [
                "mighty",
                "In May 1999",
                "likelihood",
                "thinking",
                "The possible",
                "my opinions",
                "it deepened",
                "seemingly",
            ],
        ),
    ],
)
def test_openers_and_wording_hit_and_pass_by(name: str, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if feature_of(name, text) < 1] == []
    assert [text for text in no if feature_of(name, text) > 0] == []


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("Done.", 0),
        ("Done", 1),
        ('He said "so."', 0),
        ("(yes!)", 0),
        ("**so.**\n ", 0),
        ("x\n```\n", 0),
        ("结束。", 0),
        ("great \U0001f600", 0),
        ("the end,", 1),
        ("3.5", 1),
        ("", 1),
        ("(see", 1),
        ("so:", 1),
    ],
)
def test_a_text_that_no_mark_ends_is_flagged(text: str, flag: int) -> None:
    assert feature_of("no_terminal_punctuation", text) == flag


def test_copy_rate_is_the_share_of_distinct_words_that_the_prompt_has() -> None:
    assert feature_of("copy_rate", "The cat sat, the cat", prompt="a CAT?") == 0.25  # the cat sat , -> cat
    assert feature_of("copy_rate", "", prompt="a") == 0
    assert feature_of("copy_rate", "a b", prompt="") == 0


@PROPERTY
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=5))
def test_word_features_equal_plain_python(rows: list[tuple[str, str, str]]) -> None:
    found = side_features(block(rows))
    for side, frame in ((1, found.chosen), (2, found.rejected)):
        for row, texts in zip(frame.iter_rows(named=True), rows, strict=True):
            words = folded(texts[side])
            copied = len(set(words) & set(folded(texts[0]))) / max(1, len(set(words)))
            ratio = len(set(words)) / max(1, len(words))
            assert row["words"] == len(words)
            assert (row["copy_rate"], row["type_token_ratio"]) == pytest.approx((copied, ratio), abs=1e-6)


@PROPERTY
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4))
def test_sides_are_treated_alike_and_every_number_is_finite(rows: list[tuple[str, str, str]]) -> None:
    one, other = side_features(block(rows)), side_features(block([(p, y, x) for p, x, y in rows]))
    assert one.chosen.equals(other.rejected)
    assert one.rejected.equals(other.chosen)
    assert one.chosen.columns == [name for name in FEATURES if name not in MODEL]
    assert set(one.chosen.dtypes) == {pl.Float32}
    assert all(column.is_finite().all() and (column >= 0).all() for column in one.chosen)


def test_a_long_block_is_the_same_as_its_slices() -> None:
    rows = [(f"q{i}", f"A {i % 7} b{i}.\n" * (i % 3), f"é{i}!") for i in range(ROWS + 5)]
    whole = side_features(block(rows))
    parts = [side_features(block(rows[start : start + 1000])) for start in range(0, len(rows), 1000)]
    assert whole.rejected.equals(pl.concat(part.rejected for part in parts))


def test_every_feature_says_its_family_and_what_it_measures() -> None:
    families = {"length", "markup", "opener", "wording", "prompt", "ending", "text", "generator"}
    said = [(one.family, one.doc) for one in FEATURES.values()] + [
        (one.family, one.doc) for one in CATEGORICAL.values()
    ]
    assert {family for family, _ in said} == families
    assert all(doc for _, doc in said)


# values of a side


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Certainly! I'm in.", ("certainly", "certainly !", "certainly ! i"), (".", "in .", "m in .")),
        ("Yes", ("yes", None, None), ("yes", None, None)),
        ("", (None, None, None), (None, None, None)),
        ("I'm", ("i", "i '", "i ' m"), ("m", "' m", "i ' m")),
        ("A" * 200 + " b", ("a" * 200, "a" * 200 + " b", None), ("b", "a" * 200 + " b", None)),
    ],
)
def test_first_and_last_words_are_those_of_the_token_table(text: str, first: tuple[Any], last: tuple[Any]) -> None:
    found = side_values(block([("", text, "")])).chosen.row(0, named=True)
    assert tuple(found[f"first_words_{n}"] for n in (1, 2, 3)) == first
    assert tuple(found[f"last_words_{n}"] for n in (1, 2, 3)) == last


@PROPERTY
@given(st.text(alphabet="abß .,'é\u0301क", max_size=300))
def test_first_and_last_words_equal_those_of_the_whole_text(text: str) -> None:
    words, found = folded(text), side_values(block([("", text, "")])).chosen.row(0, named=True)
    for n in (1, 2, 3):
        assert found[f"first_words_{n}"] == (" ".join(words[:n]) if len(words) >= n else None)
        assert found[f"last_words_{n}"] == (" ".join(words[-n:]) if len(words) >= n else None)


@pytest.mark.parametrize(
    ("text", "script", "language"),
    [
        ("What is the name of the cat?", "Latin", "en"),
        ("Der Hund und die Katze sind nicht hier, es ist zu kalt.", "Latin", "de"),
        ("Le chat est dans la maison avec les enfants et le chien.", "Latin", "fr"),
        ("El perro está en la casa con los niños y una pelota.", "Latin", "es"),
        ("Кошка не спит, и это хорошо, как вы думаете?", "Cyrillic", "ru"),
        ("Кіт не спить, і це добре, як ви думаєте?", "Cyrillic", "uk"),
        ("这是一个测试。", "Han", "zh"),
        ("これは日本語の文です。", "Japanese", "ja"),
        ("이것은 시험입니다", "Hangul", "ko"),
        ("यह एक परीक्षा है", "Devanagari", None),
        ("Ꭰ Ꭱ Ꭲ Ꭳ Ꭴ", "other", None),
        ("Okay", "Latin", None),
        ("42 + 1!", None, None),
        ("“42” \U0001f600", None, None),
        ("The word кот is Russian for cat, and it is short.", "Latin", "en"),
    ],
)
def test_script_and_language(text: str, script: str | None, language: str | None) -> None:
    assert (value_of("script", text), value_of("language", text)) == (script, language)


# the table


def zero(signs: np.ndarray) -> float:
    assert signs.dtype == np.int8
    return 0.0


def table(
    chosen: Sequence[float | None],
    rejected: Sequence[float | None],
    name: str = "bold",
    clusters: Sequence[int] | None = None,
    **named: Any,
) -> dict[str, Any]:
    one, other = (pl.DataFrame({name: pl.Series(side, dtype=pl.Float32)}) for side in (chosen, rejected))
    groups = np.array(range(len(chosen)) if clusters is None else clusters, dtype=np.int64)
    no_values = Sides(pl.DataFrame(), pl.DataFrame())
    found = structure_table(one, other, no_values, clusters=groups, **{"z_of": zero, **named})
    assert found.schema == schema("structure", "text")
    return found.row(0, named=True)


def values_table(pairs: Sequence[tuple[str | None, str | None]], column: str, **named: Any) -> pl.DataFrame:
    sides = Sides(*(pl.DataFrame({column: pl.Series(side, dtype=pl.String)}) for side in zip(*pairs, strict=True)))
    clusters = np.arange(len(pairs), dtype=np.int64)
    none = pl.DataFrame()
    return structure_table(none, none, sides, clusters=clusters, **{"z_of": zero, **named})


def value_row(found: pl.DataFrame, value: str) -> dict[str, Any]:
    return found.row(by_predicate=pl.col("value") == value, named=True)


NUMBERS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@PROPERTY
@given(NUMBERS)
def test_a_feature_is_counted_and_tested_as_scipy_does(pairs: list[tuple[int, int]]) -> None:
    row = table([x for x, _ in pairs], [y for _, y in pairs])
    b, c = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    assert (row["num_chosen_more"], row["num_rejected_more"], row["num_discordant"]) == (b, c, b + c)
    assert row["num_both"] == sum(x > 0 and y > 0 for x, y in pairs)
    assert row["coverage"] == pytest.approx((b + c) / len(pairs))
    assert row["side"] == ("chosen" if b > c else "rejected" if c > b else None)
    assert (row["mean_chosen"], row["mean_rejected"]) == pytest.approx(tuple(np.mean(pairs, axis=0)))
    if b + c == 0:
        assert row["p"] is row["win_rate"] is row["win_rate_low"] is row["q"] is None
        return
    test = stats.binomtest(b, b + c)
    interval = test.proportion_ci(method="wilson")
    assert (row["p"], row["win_rate"]) == pytest.approx((test.pvalue, b / (b + c)))
    assert (row["win_rate_low"], row["win_rate_high"]) == pytest.approx((interval.low, interval.high))
    assert (row["q"] is None) == (b + c < 10)


def test_one_sided_begins_at_twenty_pairs_and_exclusive_where_the_other_side_has_none() -> None:
    bare, marked = [0.0] * 20, [1.0] * 20
    row = table(marked, bare)
    assert (row["one_sided"], row["exclusive"], row["side"]) == (True, True, "chosen")
    assert not table(marked[1:], bare[1:])["one_sided"]
    row = table([*bare, 1], [*marked, 1])  # one more pair has it on both sides
    assert (row["one_sided"], row["exclusive"], row["side"]) == (True, False, "rejected")
    assert not table([*marked, 0], [*bare, 1])["one_sided"]


def test_a_pair_whose_number_is_unknown_does_not_count() -> None:
    row = table([1, None, 2, 5], [0, 3, math.nan, 5], name="truncated")
    assert (row["num_chosen_more"], row["num_rejected_more"], row["num_both"]) == (1, 0, 1)
    assert (row["mean_chosen"], row["mean_rejected"], row["coverage"]) == (3, 2.5, 0.25)


@pytest.mark.parametrize(("chosen", "rejected"), [([], []), ([0, 0], [0, 0]), ([2, 2], [1, 1]), ([None], [None])])
def test_a_constant_difference_or_no_pair_has_no_effect(chosen: list[Any], rejected: list[Any]) -> None:
    row = table(chosen, rejected)
    assert row["effect"] is row["effect_low"] is row["effect_high"] is row["q"] is None
    assert row["exclusive"] is False


def test_one_prompt_gives_an_effect_without_an_interval() -> None:
    row = table([1, 2, 4], [0, 0, 0], clusters=[0, 0, 0])
    assert row["effect"] == pytest.approx(np.mean([1, 2, 4]) / np.std([1, 2, 4], ddof=1))
    assert row["effect_low"] is row["effect_high"] is None


def test_z_is_asked_of_the_signs_and_never_of_words() -> None:
    asked: list[list[int]] = []

    def z_of(signs: np.ndarray) -> float:
        asked.append(signs.tolist())
        return 2.5

    assert table([3, 0, 1], [1, 4, 1], z_of=z_of)["z_length"] == 2.5
    assert asked == [[1, -1, 0]]
    assert table([3, 0], [1, 4], name="words", z_of=z_of)["z_length"] is None
    assert table([1, 1], [1, 1], z_of=z_of)["z_length"] is None
    assert len(asked) == 1
    assert table([3, 0], [1, 4], z_of=lambda _: math.nan)["z_length"] is None


def half_width(found: Effect) -> float:
    assert found.effect is not None
    assert found.low is not None
    assert found.high is not None
    assert found.effect - found.low == pytest.approx(found.high - found.effect)
    return (found.high - found.low) / 2


def test_beside_length_is_the_score_test_of_all_signs() -> None:
    rng = np.random.default_rng(1)
    model = fit_length(rng.integers(1, 90, 400), rng.integers(1, 70, 400))
    z_of = beside_length(model)
    for share in (0.02, 0.5, 1.0):
        signs = (rng.choice([-1, 1], 400) * (rng.random(400) < share)).astype(np.int8)
        assert z_of(signs) == pytest.approx(z_of_signs(signs, model))
    assert math.isnan(z_of(np.zeros(400, dtype=np.int8)))


def jackknife(differences: np.ndarray, clusters: np.ndarray) -> float:
    """The standard error of mean / sd by leaving out one cluster at a time (Efron and Tibshirani 1993, eq. 11.5)."""
    names = np.unique(clusters)
    left = [differences[clusters != name] for name in names]
    effects = np.array([some.mean() / some.std(ddof=1) for some in left])
    return math.sqrt((len(names) - 1) / len(names) * ((effects - effects.mean()) ** 2).sum())


@pytest.mark.parametrize(("shift", "zeros"), [(0.0, 0.0), (0.8, 0.0), (0.3, 0.6)])
def test_the_interval_of_an_effect_agrees_with_a_jackknife_by_prompt(shift: float, zeros: float) -> None:
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 300, 900)
    x = rng.normal(shift, 1, 900) + 0.8 * rng.normal(0, 1, 300)[clusters]
    x[rng.random(900) < zeros] = 0
    some = np.flatnonzero(x)
    found = paired_effect(x[some], clusters[some], np.bincount(clusters))
    assert found.effect == pytest.approx(x.mean() / x.std(ddof=1))
    width = stats.t.ppf(0.975, len(np.unique(clusters)) - 1) * jackknife(x, clusters)
    assert half_width(found) == pytest.approx(width, rel=0.05)


def test_with_one_pair_a_prompt_and_normal_differences_the_interval_is_the_textbooks() -> None:
    x = stats.norm.ppf((np.arange(2000) + 0.5) / 2000) + 0.7
    found = paired_effect(x, np.arange(2000), np.ones(2000, dtype=np.int64))
    assert half_width(found) == pytest.approx(1.96 * math.sqrt((1 + 0.7**2 / 2) / 2000), rel=0.01)


def test_the_interval_covers_the_true_effect_in_95_of_100_samples() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(400):
        clusters = np.repeat(np.arange(60), 3)
        x = 0.5 + rng.normal(0, 1, 60)[clusters] + rng.normal(0, 1, 180)  # sd = sqrt 2
        found = paired_effect(x, clusters, np.full(60, 3))
        covered += abs((found.effect or 0) - 0.5 / math.sqrt(2)) <= half_width(found)
    assert 0.915 <= covered / 400 <= 0.98  # 95% +- 3 standard errors


def test_q_is_over_features_and_values_together() -> None:
    numbers = {"bold": [1.0] * 12 + [0.0] * 4, "emoji": [1.0] * 9 + [0.0] * 7, "links": [1.0] * 10 + [0.0] * 6}
    chosen = pl.DataFrame(numbers)
    rejected = pl.DataFrame({"bold": [0.0] * 16, "emoji": [0.0] * 16, "links": [0.0] * 14 + [1.0] * 2})
    values = Sides(pl.DataFrame({"script": ["Latin"] * 16}), pl.DataFrame({"script": ["Han"] * 11 + ["Latin"] * 5}))
    found = structure_table(chosen, rejected, values, clusters=np.arange(16), z_of=zero)
    p = {
        ("bold", None): stats.binomtest(12, 12).pvalue,
        ("links", None): stats.binomtest(10, 12).pvalue,
        ("script", "Latin"): stats.binomtest(11, 11).pvalue,
        ("script", "Han"): stats.binomtest(0, 11).pvalue,
    }
    q = dict(zip(p, stats.false_discovery_control([*p.values()]), strict=True))
    rows = {(row["feature"], row["value"]): row for row in found.iter_rows(named=True)}
    assert {key: row["q"] for key, row in rows.items() if row["q"] is not None} == pytest.approx(q)
    assert rows["emoji", None]["q"] is None


VALUES = st.lists(st.tuples(*[st.sampled_from([None, "a", "b", "c"])] * 2), min_size=1, max_size=80)


@PROPERTY
@given(VALUES, st.sampled_from(["first_words_1", "generator"]))
def test_values_equal_a_naive_count(pairs: list[tuple[str | None, str | None]], column: str) -> None:
    pairs = pairs * 7  # so that values reach ten pairs
    found = values_table(pairs, column)
    known = [pair for pair in pairs if column == "first_words_1" or None not in pair]
    only = [Counter(pair[side] for pair in known if pair[0] != pair[1]) for side in (0, 1)]
    both = Counter(x for x, y in known if x == y)
    seen = {value for value in "abc" if only[0][value] + only[1][value] >= 10}
    assert set(found["value"]) == seen
    for value in seen:
        row = value_row(found, value)
        b, c = only[0][value], only[1][value]
        assert (row["num_chosen_more"], row["num_rejected_more"], row["num_both"]) == (b, c, both[value])
        x = np.array([float(one == value) - float(other == value) for one, other in known])
        assert row["effect"] == (pytest.approx(x.mean() / x.std(ddof=1)) if x.std() else None)
        assert row["mean_chosen"] == pytest.approx(sum(one == value for one, _ in known) / len(known))
        assert row["coverage"] == pytest.approx((b + c) / len(pairs))
        assert row["exclusive"] == (min(b, c) == 0 and b + c >= 20 and not both[value])


def test_a_pair_with_an_unknown_generator_does_not_count_but_one_without_words_does() -> None:
    pairs = [("m1", "m2")] * 12 + [("m1", None)] * 30 + [(None, None)] * 8
    row = value_row(values_table(pairs, "generator"), "m1")
    assert (row["num_chosen_more"], row["mean_chosen"], row["coverage"]) == (12, 1, 12 / 50)
    row = value_row(values_table(pairs, "first_words_3"), "m1")
    assert (row["num_chosen_more"], row["mean_chosen"], row["coverage"]) == (42, 42 / 50, 42 / 50)


def test_a_value_on_both_sides_of_one_pair_is_one_sided_and_not_exclusive() -> None:
    row = value_row(values_table([("a", "b")] * 20, "script"), "a")
    assert (row["one_sided"], row["exclusive"]) == (True, True)
    row = value_row(values_table([("a", "b")] * 20 + [("a", "a")], "script"), "a")
    assert (row["one_sided"], row["exclusive"]) == (True, False)


def test_values_are_under_the_name_of_their_feature_surest_first() -> None:
    pairs = [("sure", "i")] * 15 + [("no", "the")] * 12
    found = values_table(pairs, "first_words_1")
    assert found["feature"].to_list() == ["first_words"] * 4
    assert found["value"].to_list() == ["i", "sure", "no", "the"]
    assert set(found["family"]) == {"opener"}


def test_what_the_pipeline_allows_is_marked() -> None:
    found = values_table([("Certainly !", "i ' m")] * 12, "first_words_2", allow=["certainly"])
    assert value_row(found, "Certainly !")["allowed"]
    assert not value_row(found, "i ' m")["allowed"]
    assert not table([1, 1], [0, 0], allow=["bold"])["allowed"]  # the word, not the feature
    assert table([1, 1], [0, 0], allow_features=["bold"])["allowed"]


@settings(PROPERTY, max_examples=15)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=12))
def test_exchanging_the_sides_mirrors_the_table(rows: list[tuple[str, str, str]]) -> None:
    found = []
    for pairs in (rows * 4, [(p, y, x) for p, x, y in rows * 4]):
        chosen, rejected = side_features(block(pairs))
        clusters = np.arange(len(pairs)) % len(rows)
        made = structure_table(chosen, rejected, side_values(block(pairs)), clusters=clusters, z_of=zero)
        found.append(made.sort("feature", "value"))
    one, other = found
    for name, mirrored in (("num_chosen_more", "num_rejected_more"), ("mean_chosen", "mean_rejected"), ("p", "p")):
        assert one[name].to_list() == other[mirrored].to_list()
    assert one["effect"].to_list() == pytest.approx((-other["effect"]).to_list())
    assert one["effect_low"].to_list() == pytest.approx((-other["effect_high"]).to_list())


# how alike the sides are


def pairs_of(rows: Sequence[tuple[str, str]], size: int = 4) -> Callable[[], Iterator[pl.DataFrame]]:
    return lambda: block([("", *row) for row in rows]).iter_slices(size)


def test_similarity_is_in_words() -> None:
    rows = [("a b c", "A b d"), ("x", "y"), ("same.", "same."), ("a b", "a b c d")]
    found = pair_similarity(pairs_of(rows), len(rows))
    # prefixes 2/3, 0, 1, 1; distances 1/3, 1, 0, 2/4
    assert found["num_pairs"] == 4
    assert (found["shared_prefix"]["min"], found["shared_prefix"]["max"]) == (0, 1)
    assert found["shared_prefix"]["median"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["edit_distance"]["median"] == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_similarity_is_of_evenly_spaced_pairs_whatever_the_blocks(size: int) -> None:
    rows = [("a", "a") if i % 3 == 0 else ("a", "b") for i in range(10)]  # of every third: 0, 3, 6 and 9
    found = pair_similarity(pairs_of(rows, size), 10, at_most=4)
    assert found["num_pairs"] == 4
    assert found["edit_distance"]["max"] == 0


def test_similarity_of_no_pairs_is_none() -> None:
    assert pair_similarity(pairs_of([]), 0) == {"num_pairs": 0, "shared_prefix": None, "edit_distance": None}


# real data


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def real_table(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    frame = block(rows)
    chosen, rejected = side_features(frame)
    return structure_table(chosen, rejected, side_values(frame), clusters=np.arange(frame.height), z_of=zero)


def feature_row(found: pl.DataFrame, name: str) -> dict[str, Any]:
    return found.row(by_predicate=(pl.col("feature") == name) & pl.col("value").is_null(), named=True)


def test_the_rejected_sides_of_llmbar_are_longer_and_more_marked_up(test_data: Path) -> None:
    rows = [
        (r["input"], r[f"output_{r['label']}"], r[f"output_{3 - r['label']}"])
        for r in lines_of(test_data / "llmbar" / "llmbar.jsonl")
    ]
    found = real_table(rows)
    for name in ("words", "lines", "sentences", "list_items"):
        row = feature_row(found, name)
        assert (row["side"], row["q"] < 0.05, row["effect_high"] < 0) == ("rejected", True, True), name


def test_corrected_ukrainian_has_dashes_and_ends_its_sentences(test_data: Path) -> None:
    rows = [
        (r["original"], r["corrected"], r["original"])
        for r in lines_of(test_data / "ua_gec" / "gec_only_test.jsonl.gz")
        if r["corrected"] != r["original"]
    ]
    found = real_table(rows)
    marks, unended = feature_row(found, "typographic_marks"), feature_row(found, "no_terminal_punctuation")
    assert (marks["side"], marks["win_rate"] > 0.8, marks["effect_low"] > 0.3) == ("chosen", True, True)
    assert (unended["side"], unended["q"] < 0.001) == ("rejected", True)
    dash = found.row(by_predicate=(pl.col("feature") == "first_words") & (pl.col("value") == "—"), named=True)
    assert (dash["side"], dash["win_rate"] > 0.95, dash["q"] < 0.001) == ("chosen", True, True)
    languages = side_values(block(rows)).chosen["language"]
    assert ((languages == "uk").sum(), (languages == "ru").sum()) > (0.85 * len(rows), 0)
    assert (languages.is_not_null() & (languages != "uk")).sum() < 0.01 * len(rows)


def test_the_one_word_answers_of_the_evals_are_their_first_and_last_words(test_data: Path) -> None:
    rows = [
        (r["question"], r["answer_not_matching_behavior"], r["answer_matching_behavior"])
        for r in lines_of(test_data / "anthropic_evals" / "agreeableness.jsonl")
    ]
    found = real_table(rows)
    assert {(r["feature"], r["value"]) for r in found.iter_rows(named=True) if r["value"] is not None} == {
        (name, value) for name in ("first_words", "last_words") for value in ("yes", "no")
    }
    yes = sum(row[1].strip() == "Yes" for row in rows)
    first = found.row(by_predicate=(pl.col("feature") == "first_words") & (pl.col("value") == "yes"), named=True)
    assert (first["num_chosen_more"], first["num_rejected_more"]) == (yes, len(rows) - yes)
    assert feature_row(found, "words")["num_discordant"] == 0


def test_translations_have_the_script_and_language_they_should(test_data: Path) -> None:
    for name, side, script, language in (
        ("en-zh", "original", "Han", "zh"),
        ("ru-en", "source", "Cyrillic", "ru"),
        ("et-en", "original", "Latin", "en"),
    ):
        texts = [r[side] for r in lines_of(test_data / "mlqe_pe" / f"{name}.jsonl.gz")]
        found = side_values(block([("", text, "") for text in texts])).chosen
        assert (found["script"] == script).sum() > 0.9 * len(texts)
        told = found.filter(pl.col("script") == script)["language"].drop_nulls()
        assert len(told) > 0.5 * len(texts)
        assert (told == language).sum() > 0.98 * len(told)
