"""The columns on disk are those of the design, name by name; keys and file names are reproducible by hand."""

import hashlib
import json

import polars as pl
import pytest

from prefkit.format import (
    FORMAT_VERSION,
    TABLES,
    Kind,
    canonical_json,
    part_name,
    reference_key,
    schema,
)

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String, "extra": pl.String}))
PLAIN = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
PAIR_COLUMNS = """
    pair_id prompt_id prompt chosen rejected tools split method source source_row annotator chosen_score rejected_score
    margin agreement chosen_model rejected_model num_candidates edit_distance shared_prefix first_divergence weight
"""
TOKEN_COLUMNS = """
    token n alphabet token_ids num_chosen_only num_rejected_only num_both num_discordant num_prompts coverage
    win_rate win_rate_low win_rate_high odds_ratio log_odds_se p q q_by p_permutation
    z_length log_odds_length log_odds_z side one_sided exclusive allowed
"""
REFERENCE_COLUMNS = """
    pair_id prompt_ids chosen_ids rejected_ids num_prompt_tokens num_chosen_tokens num_rejected_tokens
    ref_chosen_logps ref_rejected_logps ref_chosen_token_logps ref_rejected_token_logps
    chosen_truncated rejected_truncated ln_ches
"""


def test_pairs_have_the_columns_of_the_design_in_that_order() -> None:
    assert list(schema("pairs", "text")) == PAIR_COLUMNS.split()


def test_dropped_rows_say_why_and_keep_every_column_of_a_pair_but_its_split() -> None:
    columns = list(schema("dropped", "text"))
    why = ["stage", "reason", "duplicate_of", "contradicts", "jaccard", "cluster_id"]
    assert columns[:9] == [*why, "eval_item", "eval_overlap", "eval_side"]
    assert set(columns[9:]) == set(PAIR_COLUMNS.split()) - {"split"}


def test_rejects_name_source_line_field_reason_and_the_raw_text() -> None:
    assert dict(schema("rejects", "chat")) == {
        "source": pl.String,
        "line": pl.Int64,
        "field": pl.String,
        "reason": pl.String,
        "raw": pl.String,
    }


def test_tokens_have_the_columns_of_the_audit() -> None:
    assert list(schema("tokens", "text")) == TOKEN_COLUMNS.split()


def test_a_reference_holds_float32_sums_and_exactly_the_tokens_that_were_scored() -> None:
    columns = schema("reference", "text")
    assert list(columns) == REFERENCE_COLUMNS.split()
    for name in ("ref_chosen_logps", "ref_rejected_logps", "ln_ches"):
        assert columns[name] == pl.Float32, name
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert columns[name] == pl.List(pl.Int32), name
    for name in ("ref_chosen_token_logps", "ref_rejected_token_logps"):
        assert columns[name] == pl.List(pl.Float32), name


def test_steps_carry_the_metric_names_that_dashboards_know() -> None:
    wanted = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert wanted <= set(schema("steps", "text"))


@pytest.mark.parametrize(("kind", "dtype"), [("chat", MESSAGES), ("text", pl.String)])
def test_prompt_and_sides_are_messages_in_chat_and_strings_in_text(kind: Kind, dtype: pl.DataType) -> None:
    for table in ("pairs", "dropped"):
        columns = schema(table, kind)
        assert [columns[name] for name in ("prompt", "chosen", "rejected")] == [dtype] * 3
        plain = schema(table, kind, plain=True)
        assert plain["prompt"] == (PLAIN if kind == "chat" else pl.String)


def test_every_column_of_every_table_says_what_it_means() -> None:
    assert [column.name for columns in TABLES.values() for column in columns if not column.doc.strip()] == []


def test_canonical_json_sorts_keys_and_writes_no_spaces_and_no_escapes() -> None:
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'


def test_a_reference_key_is_the_hash_of_its_settings_whatever_their_order() -> None:
    identity = {"max_length": 1024, "kind": "chat", "config": {"layers": 2, "heads": 4}}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert reference_key(identity) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert reference_key(dict(reversed(identity.items()))) == reference_key(identity)
    assert reference_key(identity | {"max_length": 512}) != reference_key(identity)


def test_parts_are_numbered_with_five_digits() -> None:
    assert [part_name(0), part_name(12_345)] == ["part-00000.parquet", "part-12345.parquet"]


def test_the_format_has_a_version_to_refuse_newer_ones_by() -> None:
    assert isinstance(FORMAT_VERSION, int)
    assert FORMAT_VERSION >= 1
