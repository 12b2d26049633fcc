"""`prefkit show`: which pairs a reader asked for, where their sides differ, and what in them the audit speaks of.

Comes in: a dataset, a condition in SQL, a token. Goes out: whole texts and places in them, for sides.py to print.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import polars as pl

from prefkit.audit.repair import has_gram
from prefkit.documents import Audit
from prefkit.errors import InputError
from prefkit.format import AUDIT_JSON, AUDIT_SCORES, PAIR_SCORES, PAIRS
from prefkit.grams import words_in
from prefkit.guard import check_statement
from prefkit.query import as_query_error, check_views, connect_dataset
from prefkit.spans import Flag, Spans, differences, flag_places, in_texts, side_words
from prefkit.store import read_document, read_manifest
from prefkit.tables import table_blocks
from prefkit.text import words_of
from prefkit.views import VIEW_NAMES

JOINED = "pairs LEFT JOIN pair_scores USING (pair_id)"
COLUMNS = ", ".join(dict.fromkeys(column.name for column in (*PAIRS, *PAIR_SCORES)))
OF_PAIRS = ("pairs", "pair_scores")
MATCHING = f"SELECT pair_id, shortcut_score FROM {JOINED}"
THOUGHTS = ("reasoning_content", "thinking")  # keys of `extra` that are read like a text
TEXT_NAMES = ("prompt", "chosen", "rejected")
ROWS = 4096  # texts that are searched at once


class Turn(NamedTuple):
    """One message, or the whole of a text: what differs from the other side, and what is flagged."""

    role: str  # with the name of a tool that answers; "" in a text dataset
    text: str
    differs: Spans
    flagged: Spans


class Pair(NamedTuple):
    """One pair; `facts` are all its columns but the texts, those of audit/pair_scores.parquet among them."""

    facts: dict[str, Any]
    tools: list[str]
    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    flagged: list[tuple[str, str]]  # what the audit's findings name and one side has: token, chosen | rejected


class TokenSides(NamedTuple):
    """In how many of the pairs that fit the condition a token is on which side."""

    token: str
    chosen_only: int
    rejected_only: int
    both: int


class Shown(NamedTuple):
    """What `show_pairs` returns: pairs in the order asked for, and how many there are."""

    dataset: str
    pairs: list[Pair]  # facts, tools, and the turns of prompt, chosen and rejected, with the places to mark
    matching: int  # pairs that fit the condition and the token
    total: int  # pairs of the dataset
    by_score: bool  # the highest shortcut_score first, otherwise evenly spaced
    audited: bool
    flagged: list[str]  # what the audit's findings name
    token: TokenSides | None  # in how many pairs it is on which side


def show_pairs(dataset: str | Path, *, where: str | None = None, token: str | None = None, count: int = 5) -> Shown:
    """Some pairs of a dataset: those that give the most away first, if the audit has scored them.

    Args:
        dataset: a dataset directory.
        where: a condition in SQL over the columns of pairs and pair_scores.
        token: a word or n-gram; pairs that have it on one side only or, where there are none, on both.
        count: at most so many pairs.

    Returns:
        pairs with the places where their sides differ and what the audit flags in them, and how many pairs match.

    Raises:
        DatasetError: there is no finished dataset, its audit is damaged, or a file of either was changed.
        InputError: the condition does not hold what it should, or the token no word.

    Example:
        shown = prefkit.show_pairs("demo/dataset", token="certainly", count=2)
        for pair in shown.pairs:
            print(pair.facts["pair_id"], pair.chosen[-1].text, pair.rejected[-1].text)
    """
    root, manifest = Path(dataset), read_manifest(Path(dataset))
    words = _words_asked(token)
    views = _views_named(where)
    check_views(root, views)
    connection = connect_dataset(root, views)
    every = _pair_ids(root, manifest)
    matching = every.join(_matching(connection, where), on="pair_id", maintain_order="left")
    sides = None
    if token is not None:
        matching, sides = _with_token(root, manifest, matching, words)
    by_score = not matching["shortcut_score"].is_null().all()
    picked = _worst(matching, count) if by_score else _evenly(matching, count)
    found = _flags(root)
    asked = [Flag(" ".join(words), words, "anywhere")] if token is not None else []
    pairs = [_pair(row, found, asked) for row in _rows(connection, picked)]
    audited, named = (root / AUDIT_SCORES).exists(), list(dict.fromkeys(flag.name for flag in found))
    return Shown(str(dataset), pairs, matching.height, every.height, by_score, audited, named, sides)


def as_dict(shown: Shown) -> dict[str, Any]:
    """What is shown as plain JSON."""
    pairs = [
        {**pair._asdict(), **{side: [turn._asdict() for turn in getattr(pair, side)] for side in TEXT_NAMES}}
        for pair in shown.pairs
    ]
    return {**shown._asdict(), "pairs": pairs, "token": shown.token and shown.token._asdict()}


# which pairs


def _words_asked(token: str | None) -> tuple[str, ...]:
    words = tuple(words_in(token or ""))
    if token is not None and not words:
        raise InputError("there is no word in it", where="--token", expected="a word or several, such as 'of course'")
    return words


def _pair_ids(root: Path, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """`pair_id` of all pairs in their order, and the `row` it stands in."""
    blocks = table_blocks(root, "pairs", manifest, ["pair_id"], 50_000)
    ids = pl.concat([pl.DataFrame(schema={"pair_id": pl.String}), *blocks])
    return ids.with_row_index("row")


def _matching(connection: duckdb.DuckDBPyConnection, where: str | None) -> pl.DataFrame:
    """`pair_id` and `shortcut_score` of the pairs that fit, in any order."""
    try:
        found: pl.DataFrame = connection.sql(f"{MATCHING} WHERE (\n{where or 'true'}\n)").pl()
    except duckdb.Error as error:
        raise _refused(as_query_error(error).message) from None
    return found


def _views_named(where: str | None) -> Sequence[str]:
    """The views that a condition is about: those of every pair, and any that it names."""
    if where is None:
        return OF_PAIRS
    try:
        # a condition is what can be both a column and in brackets: no clause, no bracket and no statement too many
        if len(duckdb.extract_statements(f"SELECT {where}\n")) != 1:
            raise _refused("several statements")
        asked = check_statement(f"{MATCHING} WHERE (\n{where}\n)")
    except duckdb.Error as error:
        raise _refused(as_query_error(error).message) from None
    except InputError as error:
        raise _refused(error.message) from None
    return VIEW_NAMES if asked.catalogue else [*OF_PAIRS, *asked.views]


def _refused(said: str) -> InputError:
    return InputError(said, where="--where", expected=f"one condition over {COLUMNS}")


def _with_token(
    root: Path, manifest: Mapping[str, Any], matching: pl.DataFrame, words: tuple[str, ...]
) -> tuple[pl.DataFrame, TokenSides]:
    """Those that have the n-gram on one side or, if there are none, on both; and the numbers of each."""
    rows, first, parts = matching["row"].to_numpy(), 0, [np.zeros((0, 2), dtype=bool)]
    for block in table_blocks(root, "pairs", manifest, ["chosen", "rejected"], ROWS):
        low, high = np.searchsorted(rows, [first, first + block.height])
        texts = block[rows[low:high] - first].select(
            words_of(side, manifest["kind"]) for side in ("chosen", "rejected")
        )
        parts.append(np.stack([has_gram(texts[side], words) for side in texts.columns], axis=1))
        first += block.height
    chosen, rejected = np.concatenate(parts).T
    one, both = chosen != rejected, chosen & rejected
    sides = TokenSides(" ".join(words), int((one & chosen).sum()), int((one & rejected).sum()), int(both.sum()))
    return matching.filter(pl.Series(one if one.any() else both)), sides


def _worst(matching: pl.DataFrame, count: int) -> pl.DataFrame:
    return matching.sort("shortcut_score", "row", descending=[True, False], nulls_last=True).head(count)


def _evenly(matching: pl.DataFrame, count: int) -> pl.DataFrame:
    """The middle of each of `count` stretches of the same length."""
    count = min(count, matching.height)
    return matching[[(2 * i + 1) * matching.height // (2 * count) for i in range(count)]]


def _rows(connection: duckdb.DuckDBPyConnection, picked: pl.DataFrame) -> list[dict[str, Any]]:
    """All columns of the picked pairs, in their order."""
    sql = f"SELECT * FROM {JOINED} WHERE pair_id IN (SELECT unnest(?))"
    found = connection.sql(sql, params=[picked["pair_id"].to_list()]).pl()
    rows = {row["pair_id"]: row for row in found.iter_rows(named=True)}
    return [rows[pair_id] for pair_id in picked["pair_id"]]


def _flags(root: Path) -> list[Flag]:
    """What the audit's findings name that can be found in a text: tokens, and words that sides begin or end with."""
    if not (root / AUDIT_JSON).exists():
        return []
    flags = []
    for finding in read_document(root / AUDIT_JSON, Audit)["findings"]:
        feature, _, value = finding["name"].partition(": ")
        if finding["family"] == "tokens":
            flags += [Flag(name, tuple(words_in(name)), "anywhere") for name in (finding["name"], *finding["also"])]
        elif feature in ("first_words", "last_words"):
            flags.append(Flag(finding["name"], tuple(words_in(value)), feature.removesuffix("_words")))
    return [flag for flag in flags if flag.words]


# one pair


def _pair(row: Mapping[str, Any], found: Sequence[Flag], asked: Sequence[Flag]) -> Pair:
    """A row with its places; of what findings name, only what one side has and the other lacks, as the audit counts."""
    facts = {name: value for name, value in row.items() if name not in (*TEXT_NAMES, "tools")}
    prompt, chosen, rejected = (_turns(row[name]) for name in TEXT_NAMES)
    sides = [[turn.text for turn in turns] for turns in (chosen, rejected)]
    words = [side_words(texts) for texts in sides]
    one, other = (flag_places(side, found) for side in words)
    alone = [{f: at for f, at in one.items() if f not in other}, {f: at for f, at in other.items() if f not in one}]
    runs = [
        sorted({run for places in (mine, flag_places(side, asked)) for at in places.values() for run in at})
        for side, mine in zip(words, alone, strict=True)
    ]
    marks = [in_texts(side, at, len(texts)) for side, at, texts in zip(words, runs, sides, strict=True)]
    differs = differences(*sides)
    flagged = [(flag.name, side) for side, mine in zip(TEXT_NAMES[1:], alone, strict=True) for flag in mine]
    return Pair(
        facts,
        _tool_names(row["tools"]),
        prompt,
        _marked(chosen, differs[0], marks[0]),
        _marked(rejected, differs[1], marks[1]),
        list(dict.fromkeys(flagged)),
    )


def _marked(turns: Sequence[Turn], differs: Sequence[Spans], flagged: Sequence[Spans]) -> list[Turn]:
    return [Turn(turn.role, turn.text, *at) for turn, at in zip(turns, zip(differs, flagged, strict=True), strict=True)]


def _turns(text: str | list[dict[str, Any]]) -> list[Turn]:
    if isinstance(text, str):
        return [Turn("", text, [], [])]
    return [_turn(message, json.loads(message.get("extra") or "{}")) for message in text]


def _turn(message: Mapping[str, Any], extra: Mapping[str, Any]) -> Turn:
    """A message as it is read: its thoughts, its content, and its calls, one a line."""
    calls = extra.get("tool_calls") or []
    parts = [f"({key}) {_as_text(extra[key])}" for key in THOUGHTS if extra.get(key)]
    parts += [message["content"]] if message["content"] or not (parts or calls) else []
    parts += [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    role = " ".join([message["role"], *(str(extra[key]) for key in ("name", "tool_call_id") if extra.get(key))])
    return Turn(role, "\n".join(parts), [], [])


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        return f"call {_as_text(call)}"
    return f"call {_as_text(function['name'])} {_as_text(function.get('arguments', ''))}".rstrip()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tool_names(tools: str | None) -> list[str]:
    listed = json.loads(tools or "[]")
    inner = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in listed]
    return [_as_text(tool.get("name", tool) if isinstance(tool, dict) else tool) for tool in inner]
