"""What is told of a finding and what is not: one thing once, by its own name, and only what the data can hold."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from planted import audited
from tiny import tiny_tokenizer

from prefkit.audit.findings import strict_structure
from prefkit.audit.significance import fit_length, z_by_prompt, z_of_signs
from prefkit.audit.verdict import Finding
from prefkit.audits import audit_dataset
from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.errors import ConfigError

NOUNS = [f"noun{i}" for i in range(60)]


def sentence(rng: random.Random, low: int = 6, high: int = 12) -> str:
    return " ".join(rng.choice(NOUNS) for _ in range(rng.randint(low, high)))


def pairs_of(count: int, edit: Callable[[int, str, str], tuple[str, str]], prompts: int | None = None) -> pl.DataFrame:
    rng = random.Random(0)
    rows = [edit(i, sentence(rng), sentence(rng)) for i in range(count)]
    return pl.DataFrame(rows, schema=["chosen", "rejected"], orient="row").with_columns(
        pl.Series("pair_id", [f"id{i}" for i in range(count)]),
        pl.Series("prompt", [f"p{i % (prompts or count)}" for i in range(count)]),
        pl.lit("file").alias("source"),
    )


def test_a_thousand_pairs_of_five_prompts_could_not_have_shown_a_token() -> None:
    """A word on every chosen side is five observations, p = .06: that it is no finding must not be called a pass."""
    found = audited(pairs_of(1000, lambda _i, one, other: (f"Zork {one.split(maxsplit=1)[1]}", other), prompts=5))
    assert [finding.name for finding in found.findings if finding.family == "tokens"] == []
    assert not found.power.enough
    assert found.verdict != "pass"
    assert found.document["prompts"] == 5


def test_a_language_is_told_although_a_word_spells_its_code() -> None:
    spanish = "el perro que come en la casa es un amigo de los que no son para mi"
    english = "the dog that is in the house and you are with it for a friend of mine"
    frame = pairs_of(120, lambda i, _one, _other: (f"{spanish} {i}", f"{english} {i}"))
    names = [finding.name for finding in audited(frame).findings]
    assert "language: es" in names


def test_a_generator_is_told_although_a_token_spells_its_name() -> None:
    frame = pairs_of(200, lambda i, one, other: (f"{'as gpt' if i % 2 else 'as me'} {one}", other))
    models = [pl.lit(name).alias(column) for name, column in (("gpt", "chosen_model"), ("owl", "rejected_model"))]
    names = [finding.name for finding in audited(frame.with_columns(models)).findings]
    assert "generator: gpt" in names


@pytest.mark.parametrize("count", [60, 200])
def test_where_length_separates_all_pairs_it_is_told_once_and_no_word_is(count: int) -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(40)]

    def edit(_i: int, _one: str, _other: str) -> tuple[str, str]:
        return " ".join(rng.choice(words) for _ in range(rng.randint(30, 50))), rng.choice(("yes", "no", *words[:6]))

    found = [f for f in audited(pairs_of(count, edit)).findings if f.family in ("tokens", "structure")]
    assert [finding.name for finding in found if finding.level == "fail" and finding.family == "tokens"] == []
    named = ("words", "characters", "type_token_ratio")
    assert [finding.name for finding in found if finding.name in named] == ["words"]


def test_an_entry_of_the_allow_list_that_matches_nothing_is_named() -> None:
    frame = pairs_of(60, lambda _i, one, other: (f"Zork {one}", other))
    assert audited(frame, allow=["zork", "zebra", "re:zeb.*"]).document["allow_unused"] == ["zebra", "re:zeb.*"]


def test_what_is_allowed_is_named_with_its_value() -> None:
    frame = pairs_of(200, lambda _i, one, other: (f"Zork {one}", other))
    allowed = audited(frame, allow=["zork"]).allowed
    assert "first_words: zork" in allowed
    assert "first_words" not in allowed


def test_z_by_prompt_is_z_where_each_prompt_has_one_pair_and_of_unit_spread_where_pairs_go_together() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, (2, 1000))
    model = fit_length(*lengths)
    signs = rng.choice(np.array([-1, 0, 1], dtype=np.int8), 1000)
    alone = np.arange(1000)
    assert z_by_prompt(signs, model, alone) == pytest.approx(z_of_signs(signs, model))
    clusters, drawn = np.repeat(np.arange(100), 10), []
    for sides in rng.choice(np.array([-1, 1], dtype=np.int8), (300, 100)):  # all pairs of a prompt have it on one side
        drawn += [z_by_prompt(np.repeat(sides, 10), model, clusters)]
    assert 0.85 < float(np.std(drawn)) < 1.15  # of a z of its own, z_of_signs has 3.1


def test_a_dataset_of_no_pairs_is_audited_with_a_tokenizer_too(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline], tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}]
    sections: dict[str, Any] = {"audit": {"model": str(tmp_path / "model")}}
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"}, kind="text", **sections)
    build_dataset(pipeline)
    found = audit_dataset(pipeline)
    assert (found.verdict, found.document["tokens"]) == ("not enough data", {"word": 0, "model": 0})


def test_an_audit_that_is_not_kept_leaves_nothing(
    write_jsonl: Callable[..., Path], pipeline_of: Callable[..., Pipeline]
) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    pipeline = pipeline_of({"path": str(write_jsonl("rows.jsonl", rows)), "format": "pairs"})
    build_dataset(pipeline)
    before = sorted(path.name for path in Path(pipeline.dataset).rglob("*"))
    kept_none = audit_dataset(pipeline, keep=False)
    assert sorted(path.name for path in Path(pipeline.dataset).rglob("*")) == before
    kept = dict(audit_dataset(pipeline).document)
    assert [part["file"] for part in kept.pop("parts")][:2] == ["tokens.parquet", "structure.parquet"]
    assert kept == kept_none.document


def test_a_negative_seed_is_refused(pipeline_of: Callable[..., Pipeline]) -> None:
    with pytest.raises(ConfigError, match=r"audit\.seed"):
        pipeline_of({"path": "a.jsonl", "format": "pairs"}, audit={"seed": -1})


def test_structure_that_benjamini_yekutieli_does_not_confirm_is_a_note_under_strict() -> None:
    """Of ten tests the least p is multiplied by 10 (1 + 1/2 + ... + 1/10) = 29.3: .002 gives .059, .001 gives .029."""
    rest = [0.5] * 9
    for p, level in ((0.002, "note"), (0.001, "warn")):
        table = pl.DataFrame({"p": [p, *rest, 1e-9], "q": [0.02, *rest, None]})
        finding = Finding("warn", "structure", "bold", "chosen", "it is bold", "", p=p)
        (found,) = strict_structure([finding], table, 0.05)
        assert found.level == level
        assert ("not confirmed by --strict" in found.reason) == (level == "note")
