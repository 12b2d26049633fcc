"""Text identities: stable content hashes over exact text, and the folding used only to find duplicates.

Ids are computed over the EXACT text or messages, never folded: two texts with different token ids must not share an id.
"""

import hashlib
import re
from typing import Any

import polars as pl

from prefkit.format import Kind, canonical_json

WORD = re.compile(r"\w+|[^\w\s]")
VISIBLE = r"[^\s\p{Cf}]"  # no white space, and no format character (zero-width space, byte order mark)
SETTING_ROLES = ("system", "developer")  # of messages that set the scene and ask for nothing
CALLS = '"tool_calls"'  # a key of `extra`; inside a JSON text its quotes would be escaped


def content_hash(*parts: object) -> str:
    """Sha256 hex over the JSON of the parts: the one hash behind pair_id and prompt_id."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def pair_id(kind: Kind, prompt: object, chosen: object, rejected: object, tools: str | None = None) -> str:
    """The id of a pair: the same text gives the same id on any machine, in any order, in any dataset."""
    return content_hash(kind, prompt, chosen, rejected, *([] if tools is None else [tools]))


def prompt_id(kind: Kind, prompt: object, tools: str | None = None) -> str:
    """The id of a prompt; every pair of one prompt shares it. Other tools make another prompt."""
    return content_hash(kind, prompt, *([] if tools is None else [tools]))


def with_prompt_ids(frame: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Add `prompt_id` to a frame with a `prompt` column, and `tools` if any prompt has some."""
    (prompts,) = _written(frame, "prompt")
    ids = [_hashed(kind, prompt, end) for prompt, end in zip(prompts, _ends(frame), strict=True)]
    return frame.with_columns(pl.Series("prompt_id", ids, pl.String))


def with_pair_ids(frame: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Add `pair_id` and `prompt_id` to a frame with `prompt`, `chosen` and `rejected`: each text is written once."""
    rows = [*zip(*_written(frame, "prompt", "chosen", "rejected"), _ends(frame), strict=True)]
    pairs = [_hashed(kind, f"{prompt},{chosen},{rejected}", end) for prompt, chosen, rejected, end in rows]
    prompts = [_hashed(kind, prompt, end) for prompt, *_, end in rows]
    ids = {"pair_id": pairs, "prompt_id": prompts}
    return frame.with_columns(pl.Series(name, values, pl.String) for name, values in ids.items())


def _hashed(kind: Kind, texts: str, end: str) -> str:
    """`content_hash` of a kind, of texts that are JSON already, and of tools, if there are any."""
    return hashlib.sha256(f'["{kind}",{texts}{end}]'.encode()).hexdigest()


def _written(frame: pl.DataFrame, *names: str) -> list[list[str]]:
    """Columns as JSON, messages without fields that they do not have."""
    return [[canonical_json(bare(text)) for text in frame[name].to_list()] for name in names]


def _ends(frame: pl.DataFrame) -> list[str]:
    """What the tools of each row add to the JSON that is hashed."""
    if "tools" not in frame.columns or frame["tools"].null_count() == frame.height:
        return [""] * frame.height
    return ["" if tools is None else f",{canonical_json(tools)}" for tools in frame["tools"].to_list()]


def bare(text: Any) -> Any:
    """Messages without an empty `extra`; a string as it is."""
    if not isinstance(text, list):
        return text
    return [{key: value for key, value in m.items() if key != "extra" or value is not None} for m in text]


def flat(column: str, kind: Kind) -> pl.Expr:
    """A text or message column as one string, roles included, so that equal strings mean equal values."""
    if kind == "text":
        return pl.col(column)
    role, content, extra = (_escaped(pl.element().struct.field(name)) for name in ("role", "content", "extra"))
    rest = pl.concat_str(pl.lit("\x1f"), extra).fill_null("")
    return pl.col(column).list.eval(pl.concat_str(role, pl.lit("\x1f"), content, rest)).list.join("\x1e")


def _escaped(text: pl.Expr) -> pl.Expr:
    """No text can pass for a boundary between messages."""
    for number, separator in enumerate("\x1d\x1e\x1f"):
        text = text.str.replace_all(separator, f"\x1d{number}", literal=True)
    return text


def words_of(column: str, kind: Kind) -> pl.Expr:
    """A text or message column as the plain text a reader sees: contents and tool calls only, one message a line."""
    if kind == "text":
        return pl.col(column)
    content, extra = (pl.element().struct.field(name) for name in ("content", "extra"))
    calls = extra.str.contains(CALLS, literal=True).fill_null(False)
    return (
        pl.col(column).list.eval(pl.when(calls).then(pl.concat_str(content, extra)).otherwise(content)).list.join("\n")
    )


def asked(column: str, kind: Kind) -> pl.Expr:
    """A prompt as the words of those who speak in it: what a system or developer message sets is left out."""
    if kind == "text":
        return pl.col(column)
    said = pl.col(column).list.filter(~pl.element().struct.field("role").is_in(SETTING_ROLES))
    return said.list.eval(pl.element().struct.field("content")).list.join("\n")


def says_nothing(column: str, kind: Kind) -> pl.Expr:
    """Whether a reply is empty: its last message has no character that can be seen, and calls no tool."""
    if kind == "text":
        return ~pl.col(column).str.contains(VISIBLE)
    last = pl.col(column).list.last()
    calls = last.struct.field("extra").str.contains(CALLS, literal=True).fill_null(False)
    return ~last.struct.field("content").str.contains(VISIBLE).fill_null(False) & ~calls


def printable(text: str) -> str:
    """A text that a terminal can be shown: control characters (escape sequences, bells) become the replacement mark."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def visible(text: str) -> str:
    """A text on one line in which everything can be seen: line ends, control and direction characters escaped."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def canonical(text: pl.Expr) -> pl.Expr:
    """Fold a string expression for duplicate keys: NFC, runs of white space to one space, ends stripped."""
    return text.str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
