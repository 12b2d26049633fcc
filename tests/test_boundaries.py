"""What encoding does to pairs, counted for the audit: tokens and cuts a side, splits, drops, and when they are said."""

from pathlib import Path

import polars as pl
import pytest
from tiny import tiny_tokenizer

from prefkit.audit.verdict import Limits
from prefkit.boundaries import REASONS, Tokenised, find_boundaries, tokenise_pairs
from prefkit.encode import EncodeSettings, encode_pairs
from prefkit.settings import AuditLimits

LIMITS = Limits(**AuditLimits().model_dump(exclude={"strict"}))
NO_SIDES = pl.DataFrame()


def pairs_of(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["prompt", "chosen", "rejected"], orient="row")
    return frame.with_columns(pl.Series("pair_id", [f"pair{i}" for i in range(len(rows))]))


def tokenised(rows: list[tuple[str, str, str]], folder: Path, max_length: int = 64) -> Tokenised:
    settings = EncodeSettings("text", max_length, 2, "drop", None)
    frame = pairs_of(rows)
    return tokenise_pairs(iter([frame.head(2), frame.tail(-2)]), tiny_tokenizer(), settings, folder)


LONG = "many words that go on and on without any end in sight " * 4


def test_ids_are_those_of_precompute_block_by_block_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    rows = [(f"say {i} ", f"yes {i}", f"no, never {i}") for i in range(5)]
    found = tokenised(rows, tmp_path)
    encoded = encode_pairs(pairs_of(rows), tiny_tokenizer(), EncodeSettings("text", 64, 2, "drop", None)).pairs
    for _ in range(2):  # a pass begins anew
        read = pl.concat(list(found.blocks()))
        assert read.to_dict(as_series=False) == encoded.select(read.columns).to_dict(as_series=False)
    assert found.chosen["model_tokens"].to_list() == [len(ids) for ids in encoded["chosen_ids"]]
    assert found.rejected["no_end_token"].sum() == 0  # a text completion ends with one


def test_a_side_that_is_cut_off_has_no_end_token(tmp_path: Path) -> None:
    found = tokenised([("say ", "yes", "no"), ("say ", "yes", LONG), ("say ", LONG, LONG + "x")], tmp_path, 40)
    assert found.rejected["truncated"].to_list() == [0.0, 1.0, 0.0]
    assert found.rejected["no_end_token"].to_list() == [0.0, 1.0, 0.0]
    assert found.chosen["truncated"].to_list() == [0.0, 0.0, 0.0]
    assert found.counts["one_cut_off"] == 1
    assert found.pair_ids["one_cut_off"] == ["pair1"]
    # the third pair differs behind the cut only: encoding drops it, and it has no tokens
    assert found.counts["dropped_identical_after_truncation"] == 1
    assert found.chosen["model_tokens"][2] == 0
    assert pl.concat(list(found.blocks()))["chosen_ids"].to_list()[2] == []


SAID = {
    "prompt_split": "the prompt's tokens are no prefix of those of prompt + completion",
    "one_cut_off": "one side is cut off at max_length and the other is not",
    "both_cut_off": "both sides are cut off at max_length",
    "no_end_token": "neither completion ends with an end token",
    "spells_control_token": "the text spells a control token, and is encoded as text",
    "prompt_cut": "the prompt is cut from its left",
    "dropped_prompt_too_long": "encoding drops the pair (prompt_too_long)",
}


@pytest.mark.parametrize("name", [*SAID])
@pytest.mark.parametrize(("count", "level"), [(9, None), (10, "note"), (49, "note"), (50, "warn")])
def test_what_one_pair_in_a_hundred_suffers_is_said_and_one_in_twenty_is_a_warning(
    name: str, count: int, level: str | None
) -> None:
    found = find_boundaries(Tokenised(lambda: iter(()), NO_SIDES, NO_SIDES, {name: count}, {name: ["x"]}), 1000, LIMITS)
    if level is None:
        assert found == []
        return
    (finding,) = found
    assert (finding.level, finding.family, finding.name) == (level, "boundaries", name)
    assert finding.reason == f"in {count} pairs ({count / 1000:.1%}) {SAID[name]}"
    assert finding.advice
    assert finding.pair_ids == ("x",)


def test_each_says_what_to_do() -> None:
    assert {name: advice for name, (_, advice) in REASONS.items()} == {
        "prompt_split": "end prompts at a token boundary (text), or fix the chat template",
        "one_cut_off": "raise precompute.max_length",
        "both_cut_off": "raise precompute.max_length",
        "no_end_token": "a chat template that ends replies",
        "spells_control_token": "clean the sources",
        "prompt_cut": "raise precompute.max_length",
    }


def test_every_event_has_its_words() -> None:
    assert {*REASONS} | {"dropped_prompt_too_long"} == {*SAID}
