"""Ids are hashes of the exact text that anyone can recompute; folding is for duplicate keys only."""

import hashlib
import re
import unicodedata

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.format import MESSAGES
from prefkit.text import canonical, flat, pair_id, prompt_id, with_pair_ids, words_of

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True, database=None)
NFC, NFD = "caf\u00e9", "cafe\u0301"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def folded(*texts: str) -> list[str]:
    return pl.DataFrame({"text": texts}).select(canonical(pl.col("text"))).to_series().to_list()


def flattened(*conversations: list[dict[str, str]]) -> list[str]:
    dtype = MESSAGES
    return (
        pl.DataFrame({"side": pl.Series(conversations, dtype=dtype)}).select(flat("side", "chat")).to_series().to_list()
    )


def test_a_text_pair_id_is_the_hash_of_one_line_of_json() -> None:
    assert pair_id("text", "p", "c", "r") == sha256('["text","p","c","r"]')
    assert prompt_id("text", "p") == sha256('["text","p"]')


def test_a_chat_pair_id_hashes_the_messages_with_sorted_keys() -> None:
    expected = (
        '["chat",[{"content":"p","role":"user"}],[{"content":"c","role":"assistant"}],'
        '[{"content":"r","role":"assistant"}]]'
    )
    assert pair_id("chat", [user("p")], [assistant("c")], [assistant("r")]) == sha256(expected)
    assert prompt_id("chat", [user("p")]) == sha256('["chat",[{"content":"p","role":"user"}]]')


def test_ids_hash_text_as_utf8_without_escapes_but_with_json_quoting() -> None:
    assert pair_id("text", 'say "é"\n', "雪", "\U0001f600") == sha256('["text","say \\"é\\"\\n","雪","\U0001f600"]')


def test_the_order_of_keys_in_a_message_changes_no_id() -> None:
    assert prompt_id("chat", [{"content": "p", "role": "user"}]) == prompt_id(
        "chat", [{"role": "user", "content": "p"}]
    )


def test_two_texts_that_only_fold_to_the_same_have_different_ids_and_one_duplicate_key() -> None:
    assert pair_id("text", NFC, "c", "r") != pair_id("text", NFD, "c", "r")
    assert pair_id("text", "p", "a  b", "r") != pair_id("text", "p", "a b", "r")
    assert folded(NFC, "a  b") == folded(NFD, "a b")


def test_swapping_the_sides_moving_a_word_or_changing_the_kind_gives_another_id() -> None:
    ids = {
        pair_id("text", "p", "c", "r"),
        pair_id("text", "p", "r", "c"),
        pair_id("text", "pc", "", "r"),
        pair_id("chat", "p", "c", "r"),
    }
    assert len(ids) == 4


def test_a_frame_gets_the_same_ids_as_single_pairs_in_any_row_order() -> None:
    frame = pl.DataFrame({"prompt": ["p", NFD], "chosen": ["c", "雪"], "rejected": ["r", "x\ty"]})
    ids = with_pair_ids(frame, "text")
    assert ids["pair_id"].to_list() == [pair_id("text", *row) for row in frame.iter_rows()]
    assert ids["prompt_id"].to_list() == [prompt_id("text", row[0]) for row in frame.iter_rows()]
    assert with_pair_ids(frame.reverse(), "text")["pair_id"].to_list() == ids["pair_id"].to_list()[::-1]


def test_a_chat_frame_gets_the_same_ids_as_plain_messages() -> None:
    row = {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    dtype = MESSAGES
    frame = pl.DataFrame([row], schema=dict.fromkeys(row, dtype))
    assert with_pair_ids(frame, "chat")["pair_id"].to_list() == [
        pair_id("chat", row["prompt"], row["chosen"], row["rejected"])
    ]


def test_no_rows_get_no_ids() -> None:
    frame = pl.DataFrame(schema={"prompt": pl.String, "chosen": pl.String, "rejected": pl.String})
    assert with_pair_ids(frame, "text").select("pair_id", "prompt_id").is_empty()


@PROPERTY
@given(
    st.text(
        alphabet="aA.\u00e9e\u0301\u00c5A\u030a \t\n\r\u00a0\u2009\u3000\u200b\ufb01\u00b2\uac00\u1100\u1161",
        max_size=12,
    )
)
def test_folding_is_nfc_with_runs_of_white_space_as_one_space_and_bare_ends(text: str) -> None:
    expected = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
    assert folded(text) == [expected]
    assert folded(expected) == [expected]


def test_folding_keeps_case_and_punctuation() -> None:
    assert len(set(folded("Yes.", "yes.", "Yes"))) == 3


def test_the_flat_form_of_messages_tells_roles_and_boundaries_apart() -> None:
    conversations = [
        [user("a"), assistant("b")],
        [user("a"), user("b")],
        [user("a"), assistant("b"), assistant("")],
        [user("ab")],
        [user("a\nb")],
    ]
    assert len(set(flattened(*conversations))) == len(conversations)


def test_no_content_can_pass_for_a_boundary_between_messages() -> None:
    several = [assistant("x"), user("y"), assistant("z")]
    for inner in ("\x1e", "\n", ","):
        for colon in ("\x1f", ":", ": "):
            one = [assistant(f"x{inner}user{colon}y{inner}assistant{colon}z")]
            assert len(set(flattened(several, one))) == 2, (inner, colon)


def test_words_are_the_contents_of_messages_without_their_roles() -> None:
    dtype = MESSAGES
    frame = pl.DataFrame({"side": pl.Series([[assistant("Hi"), user("there")]], dtype=dtype)})
    text = frame.select(words_of("side", "chat")).item()
    assert text.split() == ["Hi", "there"]
