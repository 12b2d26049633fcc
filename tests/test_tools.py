"""Tool calls survive: read, hashed, validated, stored, rendered by the chat template, and never lost in silence."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from prefkit.build import build_dataset
from prefkit.config import Pipeline
from prefkit.encode import EncodeSettings, encode_pairs
from prefkit.store import read_manifest
from prefkit.tables import read_table

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"z": 1, "a": {"type": "string"}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Київ", "b": [1, None]}}}
ASK = {"role": "user", "content": "Rain?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "8 mm", "tool_call_id": "c1", "name": "weather"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, 8 mm.", "No."))
# prints what a template may see, so that what is rendered can be compared with what transformers itself would render
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}{% endfor %}{% endif %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLIND = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def build(rows: list[dict[str, Any]], pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]) -> Path:
    source = {"path": str(write_jsonl("rows.jsonl", rows)), "format": "trl"}
    return Path(build_dataset(pipeline_of(source, split={"test_share": 0})).dataset)


def pairs_of(dataset: Path) -> pl.DataFrame:
    return read_table(dataset, "pairs", read_manifest(dataset))


def after_the_call() -> dict[str, Any]:
    return {"prompt": [ASK, CALLING, RESULT], "chosen": [YES], "rejected": [NO], "tools": TOOLS}


def encoded(frame: pl.DataFrame, template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    return tokenizer, encode_pairs(frame, tokenizer, EncodeSettings("chat", 4096, 1, "drop", template))


def test_what_a_template_is_given_is_what_the_file_said(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    row = after_the_call()
    tokenizer, found = encoded(pairs_of(build([row], pipeline_of, write_jsonl)))
    pair = found.pairs.row(0, named=True)
    wanted = tokenizer.apply_chat_template(
        row["prompt"] + row["chosen"], tools=TOOLS, chat_template=TEMPLATE, tokenize=False
    )
    assert 'city="Київ" b=[1, null]' in wanted  # the order of arguments is the file's
    ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert pair["prompt_ids"] + pair["chosen_ids"] == ids


def test_arguments_written_as_json_text_render_like_an_object(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    as_text = json.loads(json.dumps(after_the_call()))
    function = as_text["prompt"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    _, one = encoded(pairs_of(build([after_the_call()], pipeline_of, write_jsonl)))
    _, other = encoded(pairs_of(build([as_text], pipeline_of, write_jsonl)))
    assert one.pairs["prompt_ids"].to_list() == other.pairs["prompt_ids"].to_list()


def test_a_call_may_itself_be_the_reply(pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]) -> None:
    dataset = build(
        [{"prompt": [ASK], "chosen": [CALLING], "rejected": [NO], "tools": TOOLS}], pipeline_of, write_jsonl
    )
    (pair,) = pairs_of(dataset).to_dicts()
    assert pair["chosen"][0]["content"] == ""
    assert json.loads(pair["chosen"][0]["extra"]) == {"tool_calls": [CALL]}
    assert json.loads(pair["tools"]) == TOOLS


def test_two_calls_that_differ_in_an_argument_are_no_identical_sides_and_no_duplicates(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    other = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Lviv"}}}]}
    rows = [{"prompt": [ASK], "chosen": [CALLING], "rejected": [other], "tools": TOOLS}]
    assert pairs_of(build(rows, pipeline_of, write_jsonl)).height == 1


def test_other_tools_make_another_prompt_and_another_pair(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    rows = [after_the_call(), after_the_call() | {"tools": None}]
    frame = pairs_of(build(rows, pipeline_of, write_jsonl))
    assert frame["pair_id"].n_unique() == frame["prompt_id"].n_unique() == frame.height == 2


def test_a_dataset_without_tool_calls_has_messages_of_role_and_content_alone(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    plain = build([{"prompt": [ASK], "chosen": [YES], "rejected": [NO]}], pipeline_of, write_jsonl)
    on_disk = pl.read_parquet(plain / "pairs" / "part-*.parquet")
    assert on_disk["prompt"].to_list() == [[ASK]]
    assert on_disk["tools"].to_list() == [None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [ASK, CALLING, RESULT], "chosen": [YES], "rejected": [NO]}, None),
        ({"prompt": [ASK], "chosen": [CALLING, RESULT, YES], "rejected": [NO]}, None),
        ({"prompt": [{"role": "developer", "content": "d"}, ASK], "chosen": [YES], "rejected": [NO]}, None),
        ({"prompt": [ASK], "chosen": [CALLING, RESULT], "rejected": [NO]}, "side_ends_without_assistant_turn"),
        ({"prompt": [ASK, RESULT], "chosen": [YES], "rejected": [NO]}, "roles_out_of_order"),
        ({"prompt": [ASK, CALLING], "chosen": [YES], "rejected": [NO]}, "prompt_ends_without_user_turn"),
        ({"prompt": [ASK], "chosen": [{"role": "assistant", "content": ""}], "rejected": [NO]}, "empty_chosen"),
    ],
)
def test_the_roles_of_a_tool_conversation_have_their_order(
    row: dict[str, Any], reason: str | None, pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    dataset = build([row], pipeline_of, write_jsonl)
    dropped = read_table(dataset, "dropped", read_manifest(dataset))
    assert dropped["reason"].to_list() == ([] if reason is None else [reason])


def test_a_template_that_leaves_tools_out_drops_the_pair_by_name(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    rows = [after_the_call(), {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}]
    _, found = encoded(pairs_of(build(rows, pipeline_of, write_jsonl)), BLIND)
    assert found.dropped["reason"].to_list() == ["template_ignores_tools"]
    assert found.pairs.height == 1


@pytest.mark.parametrize("where", ["argument", "tools"])
def test_a_control_token_in_an_argument_or_a_tool_is_never_encoded(
    where: str, pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    end = tiny_tokenizer().eos_token
    row = after_the_call()
    if where == "argument":
        call = {**CALL, "function": {"name": "weather", "arguments": {"city": end}}}
        row["prompt"] = [ASK, {**CALLING, "tool_calls": [call]}, RESULT]
    else:
        row["tools"] = [{"type": "function", "function": {"name": "weather", "description": end}}]
    _, found = encoded(pairs_of(build([row], pipeline_of, write_jsonl)))
    assert found.dropped["reason"].to_list() == ["control_token_in_text"]


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"tools": "no json"}, "tools", "not_tools"),
        ({"tools": [1]}, "tools", "not_tools"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "chosen",
            "not_text_content",
        ),
        ({"chosen": [{"role": "assistant", "content": None}]}, "chosen", "wrong_type"),
        ({"chosen": [{"role": "assistant"}]}, "chosen", "wrong_type"),
        ({"chosen": [{**YES, "function_call": {"name": "f"}}]}, "chosen", "function_call"),
        ({"tools": '[{"a": "\\ud800"}]'}, "tools", "lone_surrogate"),
        ({"tools": '[{"a": NaN}]'}, "tools", "not_finite"),
        (
            {"chosen": [{**CALLING, "tool_calls": [{"function": {"arguments": {"a": float("inf")}}}]}]},
            "chosen",
            "not_finite",
        ),
    ],
)
def test_what_is_no_message_or_tool_is_a_reject_by_name(
    change: Mapping[str, Any],
    field: str,
    reason: str,
    pipeline_of: Callable[..., Pipeline],
    write_jsonl: Callable[..., Path],
) -> None:
    rows = [after_the_call()] * 10 + [{**after_the_call(), **change}]
    dataset = build(rows, pipeline_of, write_jsonl)
    rejects = read_table(dataset, "rejects", read_manifest(dataset))
    assert rejects.select("line", "field", "reason").rows() == [(11, field, reason)]


def test_text_parts_are_one_text(pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]) -> None:
    parts = [{"type": "text", "text": "Yes, "}, {"type": "text", "value": "8 mm."}]
    row = {"prompt": [ASK], "chosen": [{"role": "assistant", "content": parts}], "rejected": [NO]}
    assert pairs_of(build([row], pipeline_of, write_jsonl))["chosen"][0][0]["content"] == "Yes, 8 mm."


def test_tools_do_not_fit_a_text_dataset(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write_jsonl("rows.jsonl", [row] * 10 + [row | {"tools": TOOLS}])
    built = build_dataset(pipeline_of({"path": str(path), "format": "trl"}, kind="text"))
    assert built.reasons["tools_in_text_dataset"] == 1


def test_what_a_foreign_file_has_under_extra_is_a_key_like_any_other(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    for foreign in ('{"content": "EVIL"}', "x", "[1]", {"content": "EVIL"}, 5):
        row = {"prompt": [ASK], "chosen": [{**YES, "extra": foreign}], "rejected": [NO]}
        assert pairs_of(build([row], pipeline_of, write_jsonl))["chosen"].to_list()[0] == [{**YES, "extra": None}]
    ours = json.dumps({"tool_calls": [CALL]}, ensure_ascii=False)
    row = {"prompt": [ASK], "chosen": [{**CALLING, "content": "", "tool_calls": None, "extra": ours}], "rejected": [NO]}
    assert pairs_of(build([row], pipeline_of, write_jsonl))["chosen"][0][0]["extra"] == ours


def test_a_tool_whose_name_the_user_happens_to_say_is_not_taken_for_printed(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    asked = {"role": "user", "content": "what is the weather"}
    row = {"prompt": [asked], "chosen": [CALLING], "rejected": [NO], "tools": TOOLS}
    _, found = encoded(pairs_of(build([row], pipeline_of, write_jsonl)), BLIND)
    assert found.dropped["reason"].to_list() == ["template_ignores_tools"]


def test_words_beside_a_call_that_the_template_leaves_out_of_a_reply_drop_the_pair(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    either = TEMPLATE.replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}")
    thinking = {**CALLING, "content": "Let me look."}
    rows = [
        {"prompt": [ASK], "chosen": [thinking], "rejected": [NO], "tools": TOOLS},
        {"prompt": [ASK, thinking, RESULT], "chosen": [YES], "rejected": [NO], "tools": TOOLS},  # as when it is used
    ]
    _, found = encoded(pairs_of(build(rows, pipeline_of, write_jsonl)), either)
    assert (found.dropped["reason"].to_list(), found.pairs.height) == (["template_ignores_tools"], 1)


def test_a_control_token_spelt_with_escapes_in_json_text_is_found(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    end = tiny_tokenizer().eos_token
    escaped = "".join(f"\\u{ord(c):04x}" for c in end)
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "' + escaped + '"}'}}
    row = after_the_call() | {"prompt": [ASK, {**CALLING, "tool_calls": [call]}, RESULT]}
    _, found = encoded(pairs_of(build([row], pipeline_of, write_jsonl)))
    assert found.dropped["reason"].to_list() == ["control_token_in_text"]


def test_arguments_nested_without_end_are_no_crash(
    pipeline_of: Callable[..., Pipeline], write_jsonl: Callable[..., Path]
) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": "[" * 100_000}}
    row = after_the_call() | {"prompt": [ASK, {**CALLING, "tool_calls": [call]}, RESULT]}
    _, found = encoded(pairs_of(build([row], pipeline_of, write_jsonl)))
    assert found.pairs.height + found.dropped.height == 1


def test_parquet_gives_no_row_the_arguments_of_another(pipeline_of: Callable[..., Pipeline], tmp_path: Path) -> None:
    rows = []
    for arguments in ({"city": "Lviv"}, {"unit": "C"}):
        call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        rows.append(
            {
                "prompt": [ASK],
                "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
                "rejected": [{**NO, "tool_calls": None}],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "format": "trl"}
    dataset = Path(build_dataset(pipeline_of(source, split={"test_share": 0})).dataset)
    calls = [json.loads(pair["chosen"][0]["extra"])["tool_calls"][0] for pair in pairs_of(dataset).to_dicts()]
    assert [call["function"]["arguments"] for call in calls] == [{"city": "Lviv"}, {"unit": "C"}]
