"""The audit held to what it promises, on real pairs: what is planted is found, by name, and nothing else is.

Expected values come from the planting itself, from counts in plain Python (planted.py), or from scipy. Rows are never
printed: some are offensive.
"""

import functools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import yaml
from command import Prefkit
from planted import (
    MARK,
    STRUCTURE,
    TOKENS,
    audited,
    built_pairs,
    bulleted,
    cut_anywhere,
    edited,
    endless,
    exchanged,
    grams_of,
    named,
    opened,
    presence,
    probe_accuracy,
    row_of,
    some,
    structure_named,
    thinned,
    tokens_named,
    words_of,
)
from scipy import stats
from tiny import chat_row, snapshot, write_rows

from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline, load_pipeline
from prefkit.judgement import Audited
from prefkit.store import read_manifest
from prefkit.tables import table_blocks

REPOSITORY = Path(__file__).parent.parent
Real = Callable[..., pl.DataFrame]
OPENER = "Zounds dearly! "  # HH has neither word
# What an opener changes besides n-grams that overlap it: a text begins with another word (so that what it began with
# begins fewer texts, and a line that opened a turn no longer does), has one mark, one sentence and three words more.
CHANGED_BY_AN_OPENER = {"first_words", "affirmative_opener", "sycophantic_opener", "role_markers"}
CHANGED_BY_AN_OPENER |= {"exclamation_marks", "sentences", "words", "characters"}
CONFIRMED_NOT = "not confirmed by --strict"
SEVERE = ("warn", "fail")


@pytest.fixture(scope="module", autouse=True)
def _no_rows() -> Iterator[None]:
    """A test that fails shows no rows: some are offensive."""
    with pl.Config(tbl_rows=0, tbl_cols=0):
        yield


@pytest.fixture(scope="module")
def real(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """The pairs of one of pipelines/real/*.yaml as plain texts, built once: real("wildbench", rejected="all")."""

    @functools.cache
    def pairs_of(name: str, **pairs: Any) -> pl.DataFrame:
        folder = tmp_path_factory.mktemp(name)
        settings = yaml.safe_load((REPOSITORY / "pipelines" / "real" / f"{name}.yaml").read_text())
        for source in settings["sources"]:
            source["path"] = str(test_data / Path(source["path"]).relative_to("data"))
        settings |= {"dataset": str(folder / "dataset"), "pairs": settings.get("pairs", {}) | pairs}
        path = folder / "pipeline.yaml"
        path.write_text(yaml.safe_dump(settings))
        return built_pairs(load_pipeline(path))

    return pairs_of


@pytest.fixture(scope="module")
def hh(real: Real) -> pl.DataFrame:
    return real("hh")


@pytest.fixture(scope="module")
def plain(hh: pl.DataFrame) -> Audited:
    """HH as it is."""
    return audited(hh)


@pytest.fixture
def dataset_of(tmp_path: Path, pipeline_of: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    """Build a dataset of some pairs; one user turn and one reply each with kind=chat."""

    def make(pairs: pl.DataFrame, kind: str = "text", **sections: Any) -> Pipeline:
        rows = pairs.select("prompt", "chosen", "rejected").to_dicts()
        if kind == "chat":
            rows = [chat_row(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
        source = {"path": str(write_rows(tmp_path / "pairs.jsonl", rows)), "format": "pairs"}
        pipeline = pipeline_of(source, kind=kind, split={"test_share": 0.0}, **sections)
        build_dataset(pipeline)
        return pipeline

    return make


# 1. HH as it is


def test_hh_tells_a_word_that_is_there_from_one_that_echoes_length(plain: Audited, hh: pl.DataFrame) -> None:
    for token in ("sorry", "the", "."):
        row, (b, c, both) = row_of(plain, token), presence(hh, token)
        assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"]) == (b, c, both)
        assert row["p"] == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)
    assert row_of(plain, "sorry")["z_length"] > 4  # type: ignore[operator]
    assert abs(row_of(plain, "the")["z_length"]) < 2  # type: ignore[arg-type]
    (finding,) = named(plain.findings, "tokens", "sorry")
    assert (finding.side, finding.num_pairs) == ("chosen", sum(presence(hh, "sorry")[:2]))


def test_shallow_features_tell_as_much_of_hh_as_was_measured(plain: Audited) -> None:
    found, measured = probe_accuracy(plain), {"length": 0.556, "words": 0.605, "both": 0.609}
    assert {name: found[name] for name in measured} == pytest.approx(measured, abs=0.03)


def test_hh_as_it_is_has_no_more_than_notes(plain: Audited) -> None:
    assert plain.verdict == "note"


# 2. an opener


def of_the_opener(token: str) -> bool:
    """Whether an n-gram can overlap `zounds dearly !` at the beginning of a text."""
    words = token.split()
    return "zounds" in words or "dearly" in words or words[0] == "!"


def new_beside(found: Audited, before: Audited) -> tuple[set[str], set[str]]:
    """Tokens and features that are named now and were not, and that an opener does not touch."""
    tokens = {token for token, _ in tokens_named(found) - tokens_named(before) if not of_the_opener(token)}
    features = {name for name, _ in structure_named(found) - structure_named(before)}
    return tokens, features - CHANGED_BY_AN_OPENER


def test_hh_has_no_word_of_the_opener(hh: pl.DataFrame) -> None:
    assert presence(hh, "zounds") == presence(hh, "dearly") == (0, 0, 0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.5])
def test_an_opener_is_found_however_rare_and_nothing_else_is(
    share: float, seed: int, hh: pl.DataFrame, plain: Audited
) -> None:
    where = some(hh.height, share, seed)
    found = audited(edited(hh, "chosen", opened(OPENER), where))
    assert new_beside(found, plain) == (set(), set())
    for token in ("zounds", "dearly", "zounds dearly", "zounds dearly !"):
        (finding,) = named(found.findings, "tokens", token)
        row = row_of(found, token)
        assert (finding.side, finding.num_pairs, finding.level) == ("chosen", len(where), found.verdict)
        assert (row["num_chosen_only"], row["num_rejected_only"], row["num_both"]) == (len(where), 0, 0)
        assert row["p"] == pytest.approx(2 * 0.5 ** len(where), rel=1e-6)
        assert row["z_length"] > 3  # type: ignore[operator]
        assert row["exclusive"] == (len(where) >= 20)
    assert found.verdict == ("fail" if len(where) >= 0.05 * hh.height else "warn")  # audit.limits.fail_coverage


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_opener_of_rejected_is_found_there(seed: int, hh: pl.DataFrame, plain: Audited) -> None:
    where = some(hh.height, 0.05, seed)
    found = audited(edited(hh, "rejected", opened(OPENER), where))
    (finding,) = named(found.findings, "tokens", "zounds")
    assert (finding.side, finding.level, finding.num_pairs) == ("rejected", "fail", len(where))
    assert row_of(found, "zounds")["exclusive"]
    assert new_beside(found, plain) == (set(), set())


def test_an_opener_of_all_chosen_sides_fails_the_dataset(hh: pl.DataFrame, plain: Audited) -> None:
    found = audited(edited(hh, "chosen", opened(OPENER), some(hh.height, 1.0)))
    (finding,) = named(found.findings, "tokens", "zounds")
    assert (found.verdict, finding.level, finding.coverage) == ("fail", "fail", 1.0)
    assert row_of(found, "zounds")["exclusive"]
    assert found.findings[0] == finding  # what matters is said first
    assert probe_accuracy(found)["words"] > 0.99
    assert new_beside(found, plain) == (set(), set())


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_an_opener_is_told_once(share: float, hh: pl.DataFrame) -> None:
    found = audited(edited(hh, "chosen", opened(OPENER), some(hh.height, share)))
    about = [f.name for f in found.findings if f.family in ("tokens", "structure") and "zounds" in (f.name, *f.also)]
    assert len(about) == 1
    assert named(found.findings, "structure", "first_words: zounds") == []


# 3. other shortcuts, by their own names


def test_planted_length_is_found_as_length(hh: pl.DataFrame) -> None:
    found = audited(edited(hh, "rejected", cut_anywhere, some(hh.height, 0.6)))
    (finding,) = named(found.findings, "structure", "words")
    assert (finding.side, "length" in finding.reason) == ("chosen", True)
    assert probe_accuracy(found)["length"] > 0.6


def only_length(found: Audited, before: Audited) -> set[str]:
    """Tokens without a mark that are named and were not: cut texts also lose the marks at their end."""
    return {token for token, _ in tokens_named(found) - tokens_named(before) if not MARK.search(token)}


def by_the_sign_test(found: Audited, before: Audited) -> set[str]:
    """Tokens without a mark that would be named now and would not have been, if length were not held."""
    named = []
    for table in (found.tables[TOKENS], before.tables[TOKENS]):
        won = pl.max_horizontal("win_rate", 1 - pl.col("win_rate"))
        rows = table.filter((pl.col("q") <= 0.05) & (won >= 0.7) & (pl.col("coverage") >= 0.005))
        named.append({token for token in rows["token"] if not MARK.search(token)})
    return named[0] - named[1]


@pytest.mark.slow
def test_words_do_not_echo_planted_length(hh: pl.DataFrame) -> None:
    """Sides that nothing but length tells apart: exchanged at random, then 60% of the rejected ones made shorter.

    Of single words: an n-gram is broken by what is taken out of its middle, too, and not only gone with it.
    """
    echoes, flagged = 0, 0
    for seed in range(8):
        fair = exchanged(hh, seed)
        before = audited(fair)
        found = audited(edited(fair, "rejected", thinned, some(hh.height, 0.6, seed)))
        echoes += sum(" " not in token for token in by_the_sign_test(found, before))
        flagged += sum(" " not in token for token in only_length(found, before))
        assert named(found.findings, "structure", "words") != []
    assert echoes >= 20
    assert flagged <= echoes / 10


def test_cut_ends_make_no_word_more_than_a_note(hh: pl.DataFrame, plain: Audited) -> None:
    """A text cut at a place loses its last words rather than others (`let me know`), which is more than length."""
    found = audited(edited(hh, "rejected", cut_anywhere, some(hh.height, 0.6)))
    new = only_length(found, plain)
    assert {f.level for f in found.findings if f.family == "tokens" and f.name in new} <= {"note"}
    assert len(new) <= 5


def test_planted_lists_are_found_as_lists(hh: pl.DataFrame) -> None:
    where = some(hh.height, 0.1)
    found = audited(edited(hh, "chosen", bulleted, where))
    (finding,) = named(found.findings, "structure", "list_items")
    assert finding.side == "chosen"
    row = found.tables[STRUCTURE].filter(pl.col("feature") == "list_items").row(0, named=True)
    assert row["num_chosen_more"] >= 0.95 * len(where)


def test_planted_emoji_are_found_as_emoji(hh: pl.DataFrame) -> None:
    where = some(hh.height, 0.05)
    found = audited(edited(hh, "chosen", lambda text, _rng: f"{text} \N{SLIGHTLY SMILING FACE}", where))
    (finding,) = named(found.findings, "structure", "emoji")
    assert (finding.side, finding.level) == ("chosen", "fail")
    assert len(where) <= (finding.num_pairs or 0) <= len(where) + 5  # HH has some of its own


def test_a_missing_end_is_found_as_one(hh: pl.DataFrame) -> None:
    where = some(hh.height, 0.2)
    found = audited(edited(hh, "rejected", endless, where))
    (finding,) = named(found.findings, "structure", "no_terminal_punctuation")
    assert finding.side == "rejected"


def test_a_generator_that_wins_is_found_as_a_generator(hh: pl.DataFrame) -> None:
    wins = some(hh.height, 0.8)
    names = {side: ["gull" if (i in wins) == (side == "chosen") else "otter" for i in range(hh.height)]
             for side in ("chosen", "rejected")}  # fmt: skip
    models = [pl.Series(f"{side}_model", models) for side, models in names.items()]
    found = audited(hh.with_columns(models))
    (probe,) = [f for f in found.findings if (f.family, f.name) == ("probe", "generator")]
    assert probe.win_rate == pytest.approx(len(wins) / hh.height, abs=1e-9)
    (gull,) = named(found.findings, "structure", "generator: gull")
    assert (gull.side, gull.level) == ("chosen", "warn")
    assert gull.win_rate == pytest.approx(len(wins) / hh.height)


# 4. false alarms


def alarms(pairs: pl.DataFrame, seeds: range) -> tuple[int, Counter[str]]:
    """Of so many audits of sides exchanged at random, those at warn or worse, and which families these are of."""
    bad, families = 0, Counter[str]()
    for seed in seeds:
        found = audited(exchanged(pairs, seed))
        bad += found.verdict in SEVERE
        families.update({f.family for f in found.findings if f.level in SEVERE})
    return bad, families


@pytest.mark.slow
def test_sides_exchanged_at_random_hardly_ever_warn(hh: pl.DataFrame) -> None:
    bad, families = alarms(hh, range(200))
    assert bad <= 18, families


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs"), [("wildbench", {"rejected": "all"}), ("ukpconvarg_votes", {})])
def test_sides_exchanged_by_prompt_hardly_ever_warn_where_a_prompt_has_several_pairs(
    name: str, pairs: dict[str, str], real: Real
) -> None:
    """Of 20, more than 5 would be odd (p < .01) if 9% did, which is 18 of 200."""
    bad, families = alarms(real(name, **pairs), range(20))
    assert bad <= 5, families


def test_pairs_of_few_prompts_exchanged_by_prompt_do_not_fail(real: Real) -> None:
    """The quick form: PandaLM has five pairs a prompt."""
    bad, families = alarms(real("pandalm"), range(5))
    assert bad <= 1, families


# 5. datasets of other kinds, and next to none


def test_the_rejected_side_of_llmbar_is_the_longer_one_and_has_more_lists(real: Real) -> None:
    pairs = real("llmbar")
    found = audited(pairs)
    words = [[len(words_of(text)) for text in pairs[side]] for side in ("chosen", "rejected")]
    longer = sum(b > a for a, b in zip(*words, strict=True))
    (finding,) = named(found.findings, "structure", "words")
    row = found.tables[STRUCTURE].filter(pl.col("feature") == "words").row(0, named=True)
    assert (finding.side, row["num_rejected_more"]) == ("rejected", longer)
    (items,) = named(found.findings, "tokens", "2 .")
    one, other, _ = presence(pairs, "2 .")
    assert (items.side, items.num_pairs, other > 5 * one) == ("rejected", one + other, True)
    (lists,) = named(found.findings, "structure", "list_items")
    assert lists.side == "rejected"


def test_corrected_ukrainian_has_its_typography(real: Real) -> None:
    pairs = real("ua_gec")
    found = audited(pairs)
    for mark in ("\N{EM DASH}", "\N{LEFT DOUBLE QUOTATION MARK}"):
        (finding,) = named(found.findings, "tokens", mark)
        assert (finding.side, row_of(found, mark)["num_chosen_only"]) == ("chosen", presence(pairs, mark)[0])
    (finding,) = named(found.findings, "structure", "typographic_marks")
    assert finding.side == "chosen"
    for plain_mark in ("-", '"'):
        (finding,) = named(found.findings, "tokens", plain_mark)
        assert finding.side == "rejected"


def test_answers_that_are_labels_are_said_to_be(real: Real) -> None:
    pairs = real("anthropic_evals")
    found = audited(pairs)
    distinct = len({*pairs["chosen"], *pairs["rejected"]})
    (finding,) = [f for f in found.findings if f.name == "distinct_replies"]
    assert f"the {2 * pairs.height} sides are {distinct} distinct texts" in finding.reason
    assert [f.name for f in audited(pairs, allow_features=["distinct_replies"]).findings] == []


ODD = {
    "no pair": lambda hh: hh.head(0),
    "one pair": lambda hh: hh.head(1),
    "two pairs": lambda hh: hh.head(2),
    "equal sides": lambda hh: hh.head(300).with_columns(rejected="chosen"),
    "one text": lambda hh: hh.head(300).with_columns(chosen=pl.lit("Yes."), rejected=pl.lit("No.")),
    "empty sides": lambda hh: hh.head(300).with_columns(chosen=pl.lit(" \n"), rejected=pl.lit("\u200b")),
    "one side empty": lambda hh: hh.head(300).with_columns(rejected=pl.lit("")),
    "one prompt": lambda hh: hh.head(300).with_columns(prompt=pl.lit("What?")),
    "equal lengths": lambda hh: hh.head(300).with_columns(rejected=pl.col("chosen").str.to_uppercase() + ""),
}


@pytest.mark.parametrize("kind", ODD)
def test_next_to_nothing_is_audited_without_a_crash_or_a_warning(kind: str, hh: pl.DataFrame) -> None:
    pairs = ODD[kind](hh)
    found = audited(pairs)  # pytest makes every warning an error
    json.dumps(found.document, allow_nan=False)
    assert found.pairs == pairs.height
    if kind in ("no pair", "one pair", "two pairs"):
        assert (found.verdict, found.findings) == ("not enough data", [])
    if kind == "equal sides":
        assert found.tables[TOKENS].is_empty()
        assert found.findings == []
    if kind == "one text":
        assert named(found.findings, "tokens", "yes")[0].side == "chosen"
        assert named(found.findings, "tokens", "no")[0].side == "rejected"
        assert found.verdict == "fail"


def test_a_dataset_of_no_pair_is_audited_by_the_command(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline], prefkit: Prefkit
) -> None:
    same = hh.head(5).with_columns(rejected="chosen")  # identical sides are dropped
    ended = prefkit("audit", dataset_of(same).dataset, "--strict", "--json")
    assert (ended.code, ended.last_json()["verdict"], ended.last_json()["pairs"]) == (0, "not enough data", 0)


# 6. few pairs


def test_sixty_pairs_are_not_enough_data_but_an_opener_shows(hh: pl.DataFrame) -> None:
    few = hh.head(60)
    found = audited(few)
    assert (found.verdict, found.findings) == ("not enough data", [])
    found = audited(edited(few, "chosen", opened(OPENER), some(60, 1.0)))
    (finding,) = named(found.findings, "tokens", "zounds")
    assert (found.verdict, finding.level, finding.num_pairs) == ("fail", "fail", 60)


# 7. several pairs of one prompt


def middle(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], "zounds", *words[len(words) // 2 :]])


@pytest.mark.parametrize("edit", [middle, opened("Zounds ")], ids=["middle", "opener"])
def test_thirty_pairs_of_one_prompt_are_one_observation(edit: Any, hh: pl.DataFrame) -> None:
    where = some(hh.height, 30 / hh.height)
    pairs = edited(hh, "chosen", edit, where)
    about = [f for f in audited(pairs).findings if "zounds" in f"{f.name} {f.also}"]
    assert [f.level for f in about if f.family == "tokens"] == ["warn"]
    assert about[0].num_pairs == len(where) == 30
    one = pl.Series("prompt", [hh["prompt"][0] if i in where else p for i, p in enumerate(hh["prompt"])])
    about = [f for f in audited(pairs.with_columns(one)).findings if "zounds" in f"{f.name} {f.also}"]
    assert [(f.level, f.family, f.name) for f in about] == []


def test_a_prompt_counts_once_for_the_level_too(hh: pl.DataFrame) -> None:
    """In 60 pairs of ten prompts: 2 * .5 ** 10 = .002 is no certainty among thousands of tests."""
    where = sorted(some(hh.height, 60 / hh.height))
    prompts = hh["prompt"].to_list()
    for place, i in enumerate(where):
        prompts[i] = prompts[where[place % 10]]
    pairs = edited(hh, "chosen", middle, set(where)).with_columns(pl.Series("prompt", prompts))
    assert {f.level for f in audited(pairs).findings if "zounds" in f"{f.name} {f.also}"} <= {"note"}


# 8. --strict


def test_strict_fills_what_only_it_computes_and_exits_1_at_the_limit(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline], prefkit: Prefkit
) -> None:
    pairs = edited(hh.head(600), "chosen", opened(OPENER), some(600, 0.1))
    dataset = dataset_of(pairs).dataset
    assert prefkit("audit", dataset).code == 0
    tokens = pl.read_parquet(f"{dataset}/{TOKENS}")
    assert tokens["p_permutation"].is_null().all()
    ended = prefkit("audit", dataset, "--strict", "--json")
    assert (ended.code, ended.last_json()["verdict"], ended.last_json()["strict"]) == (1, "fail", True)
    tested = pl.read_parquet(f"{dataset}/{TOKENS}").filter(pl.col("num_discordant") >= 10)
    assert tested["p_permutation"].null_count() == tested["q_by"].null_count() == 0
    q = stats.false_discovery_control(tested["p"].to_numpy(), method="by")
    assert tested["q_by"].to_numpy() == pytest.approx(q)
    planted = tested.filter(pl.col("token") == "zounds").row(0, named=True)
    assert planted["p_permutation"] == pytest.approx(1 / 1001)  # none of 1,000 flips reaches it


def test_what_strict_does_not_confirm_is_a_note(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline], prefkit: Prefkit
) -> None:
    """A word in 18 chosen sides, the only one of some m: 2 * .5 ** 18 * m is below .05, and not times ln m."""

    def anywhere(text: str, rng: random.Random) -> str:
        words = text.split(" ")
        words.insert(rng.randrange(len(words) + 1), "zounds")
        return " ".join(words)

    pairs = edited(exchanged(hh, 3), "chosen", anywhere, some(hh.height, 18 / hh.height))
    dataset = dataset_of(pairs).dataset
    loose = prefkit("audit", dataset, "--json").last_json()
    (finding,) = [f for f in loose["findings"] if f["name"] == "zounds"]
    assert (finding["level"], loose["verdict"]) == ("warn", "warn")
    ended = prefkit("audit", dataset, "--strict", "--json")
    strict = ended.last_json()
    (finding,) = [f for f in strict["findings"] if f["name"] == "zounds"]
    assert (finding["level"], CONFIRMED_NOT in finding["reason"]) == ("note", True)
    assert (ended.code, strict["verdict"]) == (0, "note")
    row = pl.read_parquet(f"{dataset}/{TOKENS}").filter(pl.col("token") == "zounds").row(0, named=True)
    assert row["q_by"] > 0.05
    assert prefkit("audit", dataset, "--strict", "--set", "audit.limits.strict=note").code == 1


# 9. the tokens of a model


class Tokens(NamedTuple):
    """An audit with a tokenizer, and what `precompute` would encode of the same pairs."""

    audited: Audited
    document: dict[str, Any]
    table: pl.DataFrame
    encoded: pl.DataFrame
    tokenizer: Any
    planted: set[int]


def model_folder(pairs: pl.DataFrame, folder: Path) -> Path:
    from prefkit.demo.tiny_model import train_tokenizer

    train_tokenizer([*pairs["prompt"], *pairs["rejected"]]).save_pretrained(folder)
    return folder


def with_model(pipeline: Pipeline) -> Tokens:
    from prefkit.encode import EncodeSettings, encode_pairs, resolve_template
    from prefkit.models import load_tokenizer

    found = audit_dataset(pipeline)
    tokenizer, settings = load_tokenizer(str(pipeline.audit.model)), pipeline.precompute
    limits = (settings.max_length, settings.min_completion_tokens, settings.long_prompt)
    dataset, columns = Path(pipeline.dataset), ("pair_id", "prompt", "chosen", "rejected", "tools")
    pairs = pl.concat(list(table_blocks(dataset, "pairs", read_manifest(dataset), columns, 4096)))
    template = resolve_template("chat", settings.chat_template, tokenizer)
    encoded = encode_pairs(pairs, tokenizer, EncodeSettings("chat", *limits, template))
    planted = {i for i, chosen in enumerate(pairs["chosen"]) if chosen[0]["content"].startswith(OPENER)}
    table = pl.read_parquet(f"{pipeline.dataset}/{TOKENS}").filter(pl.col("alphabet") == "model")
    document = json.loads(Path(pipeline.dataset, "audit", "audit.json").read_text())
    return Tokens(found, document, table, encoded.pairs, tokenizer, planted)


@pytest.fixture
def model_tokens(hh: pl.DataFrame, dataset_of: Callable[..., Pipeline], tmp_path: Path) -> Tokens:
    pairs = edited(hh.head(400), "chosen", opened(OPENER), some(400, 0.15))
    folder = model_folder(pairs, tmp_path / "tokenizer")
    return with_model(dataset_of(pairs, "chat", audit={"model": str(folder)}, precompute={"max_length": 1024}))


def test_tokens_of_the_model_are_counted_as_plain_python_counts_them(model_tokens: Tokens) -> None:
    counts: dict[tuple[int, ...], list[int]] = {}
    for sides in model_tokens.encoded.select("chosen_ids", "rejected_ids").iter_rows():
        chosen, rejected = (grams_of(ids) for ids in sides)
        for place, grams in enumerate((chosen - rejected, rejected - chosen, chosen & rejected)):
            for gram in grams:
                counts.setdefault(gram, [0, 0, 0])[place] += 1  # type: ignore[arg-type]
    # of three tokens only those whose parts of two are in ten pairs each are counted
    common = {gram for gram, of in counts.items() if len(gram) == 2 and sum(of) >= 10}
    wanted = {
        gram: tuple(of)
        for gram, of in counts.items()
        if of[0] + of[1] >= 10 and (len(gram) < 3 or common.issuperset(pairwise(gram)))
    }
    columns = ("num_chosen_only", "num_rejected_only", "num_both")
    found = {tuple(row["token_ids"]): tuple(row[name] for name in columns) for row in model_tokens.table.to_dicts()}
    assert found == wanted
    decode = model_tokens.tokenizer.decode
    rows = model_tokens.table.select("token_ids", "token").iter_rows()
    assert all(decode(ids, clean_up_tokenization_spaces=False) == token for ids, token in rows)


def test_the_opener_is_found_among_the_tokens_of_the_model(model_tokens: Tokens) -> None:
    ids = model_tokens.tokenizer.encode(OPENER.strip(), add_special_tokens=False)
    triples = {tuple(ids[at : at + 3]) for at in range(len(ids) - 2)}
    rows = [row for row in model_tokens.table.to_dicts() if tuple(row["token_ids"]) in triples]
    exclusive = [row for row in rows if row["exclusive"]]
    assert exclusive
    assert {(row["num_chosen_only"], row["num_rejected_only"]) for row in exclusive} == {(len(model_tokens.planted), 0)}
    told = {token for token, side in tokens_named(model_tokens.audited) if side == "chosen"}
    assert {row["token"] for row in exclusive} <= told
    assert len(named(model_tokens.audited.findings, "tokens", "zounds")) == 1


def test_replies_cut_by_max_length_are_found(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """Rejected sides of a third of the pairs become too long for max_length; no chosen side is."""
    sizes = [pl.col(column).str.len_chars() for column in ("prompt", "chosen", "rejected")]
    short = hh.filter(pl.max_horizontal(sizes) < 300).head(300)
    where = some(short.height, 0.33)
    pairs = edited(short, "rejected", lambda text, _rng: " ".join([f"{text} And so on."] * 60), where)
    folder = model_folder(short, tmp_path / "tokenizer")
    sections = {"audit": {"model": str(folder)}, "precompute": {"max_length": 384}}
    found = with_model(dataset_of(pairs, "chat", **sections))
    chosen, rejected = (found.encoded[f"{side}_truncated"].to_list() for side in ("chosen", "rejected"))
    cut = sum(b and not a for a, b in zip(chosen, rejected, strict=True))
    assert 0.9 * len(where) <= cut <= len(where)
    for feature in ("truncated", "no_end_token"):
        (finding,) = named(found.audited.findings, "structure", feature)
        assert (finding.side, finding.num_pairs, finding.win_rate) == ("rejected", cut, 0.0)
    boundaries = found.document["boundaries"]
    assert boundaries["one_cut_off"] == sum(a != b for a, b in zip(chosen, rejected, strict=True))
    assert boundaries["prompt_split"] == sum(found.encoded["num_boundary_tokens"] > 0)
    (finding,) = [f for f in found.audited.findings if f.family == "boundaries" and f.name == "one_cut_off"]
    assert (finding.num_pairs, finding.level) == (boundaries["one_cut_off"], "warn")


# 10. the same bytes


def audit_files(dataset: str) -> dict[str, bytes]:
    return snapshot(Path(dataset) / "audit")


def test_another_audit_writes_the_same_bytes(hh: pl.DataFrame, dataset_of: Callable[..., Pipeline]) -> None:
    pipeline = dataset_of(edited(hh.head(500), "chosen", opened(OPENER), some(500, 0.05)))
    audit_dataset(pipeline, strict=True)
    first = audit_files(pipeline.dataset)
    assert {"audit.json", "tokens.parquet", "structure.parquet", "probe.parquet", "pair_scores.parquet"} <= {*first}
    audit_dataset(pipeline, strict=True)
    assert audit_files(pipeline.dataset) == first


def test_a_small_memory_limit_changes_nothing_that_is_found(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline]
) -> None:
    pipeline = dataset_of(edited(hh.head(500), "chosen", opened(OPENER), some(500, 0.05)))
    audit_dataset(pipeline)
    first = audit_files(pipeline.dataset)
    audit_dataset(pipeline.model_copy(update={"audit": pipeline.audit.model_copy(update={"memory_limit": "1MB"})}))
    second = audit_files(pipeline.dataset)
    documents = [json.loads(files.pop("audit.json")) for files in (first, second)]
    assert [document["settings"].pop("memory_limit") for document in documents] == ["1GB", "1MB"]
    assert documents[0] == documents[1]
    assert first == second


@pytest.mark.slow
def test_the_number_of_threads_changes_no_byte(hh: pl.DataFrame, dataset_of: Callable[..., Pipeline]) -> None:
    dataset = dataset_of(edited(hh, "chosen", opened(OPENER), some(hh.height, 0.02))).dataset
    found = []
    for threads in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "prefkit", "audit", dataset, "--strict", "--set", "audit.num_flips=200"],
            env={**os.environ, "POLARS_MAX_THREADS": threads, "OMP_NUM_THREADS": "1"},
            check=False,
            capture_output=True,
        )
        found.append(audit_files(dataset))
    assert found[0] == found[1]
    assert "audit.json" in found[0]


@pytest.mark.slow
def test_all_of_hh_through_the_dataset_says_what_the_pairs_in_memory_say(
    hh: pl.DataFrame, dataset_of: Callable[..., Pipeline]
) -> None:
    pairs = edited(hh, "chosen", opened(OPENER), some(hh.height, 0.02))
    found, other = audit_dataset(dataset_of(pairs)), audited(pairs)
    assert (found.verdict, found.pairs) == (other.verdict, other.pairs)
    assert [(f.level, f.name, f.num_pairs, f.p, f.also) for f in found.findings] == [
        (f.level, f.name, f.num_pairs, f.p, f.also) for f in other.findings
    ]
