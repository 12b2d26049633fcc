r"""What one side of a pair looks like without being read, in numbers: a function of (prompt, text), the same for both.

Comes in: a block of texts (prompt, chosen, rejected: plain strings). Goes out: one number a side for each of FEATURES.
Lengths and style are what preference models over-rely on (Bharadwaj et al., arXiv 2506.05339). The openers and the
wording are English, but for some refusals; of other languages the tokens and first_words tell. Price: some 30
microseconds a pair of HH on one core.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.grams import Array, Grams, hash_words

ROWS = 4096  # a call: the keys of distinct words hold 16 bits of row
HASH_BITS = 48  # of a word within a row; two of 10,000 words of a row meet once in 6 million rows


class Feature(NamedTuple):
    """A number of one side.

    `expression`: of the column `text`; None where words are counted or a model is asked. `where`: which texts can have
    any of it, so that others need no looking at and have 0.
    """

    family: str
    doc: str
    expression: pl.Expr | None = None
    where: pl.Expr | None = None


class Sides(NamedTuple):
    """The same columns of both sides, one row a pair."""

    chosen: pl.DataFrame
    rejected: pl.DataFrame


TEXT = pl.col("text")
NOT_ASCII = TEXT.str.len_bytes() != TEXT.str.len_chars()
NOT_LATIN = r"[\p{L}--\p{Latin}]"


def count(pattern: str) -> pl.Expr:
    """How often a pattern is in `text`."""
    return TEXT.str.count_matches(pattern)


def _opens(pattern: str, but: str = r"\z.") -> pl.Expr:
    """Whether a text begins with a pattern, after white space, quotes and markup, and not with what `but` matches."""
    begin = r"(?i)^[\s\"'“*_>#]*"
    return TEXT.str.contains(f"{begin}(?:{pattern})") & ~TEXT.str.contains(f"{begin}(?:{but})")


# A sentence ends in a mark before white space, so that 3.5 and e.g.this do not; other scripts write no space after it.
SENTENCE_ENDS = r"[.!?…]+[\"'”’»)\]*_]*(?:\s|$)|[。！？।۔؟]+"
# CommonMark: ** opens before a character and closes after one, so `2 ** 3 ** 4` is none. __name__ is code more often.
BOLD = r"\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*|<(?:b|strong)>"
# CommonMark 0.31 section 5.2: a marker and a space; -5 and 3.14 are none, nor is a year of four digits.
LIST_ITEM = r"(?m)^[ \t]*(?:(?:[-*+•‣◦]|\d{1,3}[.)])[ \t]+|\d{1,3}[、．])\S"
HEADER = r"(?m)^ {0,3}#{1,6}[ \t]+\S"  # section 4.2: a hashtag has no space
TABLE_ROW = r"(?m)^[ \t]*\|[^|\n]+\|[^|\n]+\|"
CODE_FENCE = r"(?m)^[ \t]*(?:`{3,}|~{3,})"
# pandoc's tex_math_dollars: no space inside the dollars, no digit after them; and TeX between, so that prices are none.
LATEX = (
    r"\\\([^\n]+?\\\)|\\\[(?s:.+?)\\\]|\\begin\{|\$\$[^$]+\$\$"
    r"|\$(?:[A-Za-z]|\\[^$\n]*[^\s$]|[^\s$\\][^$\n]*[\\^_=][^$\n]*[^\s$])\$(?:[^0-9]|$)"
)
LINK = r"(?i)https?://\S+|\bwww\.\w\S*"
# Unicode TR51: shown as a picture by default or by U+FE0F; modifiers and joined pictures belong to the first. No ©.
EMOJI = (
    r"[\x{1F1E6}-\x{1F1FF}]{2}|(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}\x{FE0F})"
    r"(?:[\x{1F3FB}-\x{1F3FF}\x{FE0F}]|\x{200D}\p{Extended_Pictographic})*"
)
TYPOGRAPHIC = "[‒–—―‘’‚‛“”„‟«»‹›…]"

# "Sure, here is" is what attacks aim for (Zou et al. 2023, arXiv 2307.15043). `Yes` is an answer: first_words shows it.
AFFIRMATIVE = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|definitely|gladly|okay|ok|no problem|got it)(?:[^\w\s-]|\s*[—–]"
    r"|$|\s+(?:here|i|let|thing|we)\b)|here(?:['’]s| is| are)\b|(?:i['’]d|i would|i['’]ll) (?:be )?(?:happy|glad) to\b"
    r"|(?:i['’]m )?(?:happy|glad) to help"
)
NOT_AFFIRMATIVE = r"(?:of course|certainly|absolutely|definitely),? not\b"
PRAISE = (
    r"(?:great|good|excellent|fantastic|wonderful|amazing|awesome|brilliant|fascinating|interesting|insightful|thoughtful"
    r"|profound|lovely|terrific)"
)
# Flattery of the asker: Sharma et al. 2023 (arXiv 2310.13548); one of the five biases of arXiv 2506.05339.
SYCOPHANTIC = (
    r"(?:what an? |(?:wow,? )?that(?:['’]s| is) (?:such )?an? |such an? )?(?:really |very |truly |absolutely )?"
    rf"{PRAISE} (?:question|point|idea|observation|thought|topic|choice|insight)\b"
    r"|you(?:['’]re| are) (?:so |absolutely |totally |completely |quite )?right\b"
    r"|(?:i )?love (?:this|that|your) (?:question|idea|point)"
    r"|thank(?:s| you) for (?:asking|(?:your|the|this|such an?) (?:\w+ )?question)"
)
# After the refusal prefixes of Zou et al. (llm-attacks, test_prefixes), tighter, as a plain "I'm sorry" consoles and
# "I can't wait" refuses nothing; and their like in five languages.
REFUSAL = (
    r"(?i)\bas an? (?:(?:large )?language model|ai\b|artificial intelligence)"
    r"|\bsorry,? (?:but )?(?:i|we)(?: can(?:no|['’])t| am| won['’]t| don['’]t|['’]m)\b|\bsorry,? but\b"
    r"|\bmy apologies\b|\bi apologi[sz]e,? but\b|\bi must (?:decline|refuse)\b"
    r"|\bi(?: can(?:no|['’])t| can not|(?: am|['’]m) (?:not able|unable) to| won['’]t| will not)(?: be able to)?"
    r"(?: (?:really|in good conscience|actually|currently|directly))? (?:help|assist|provide|answer|comply|fulfill?"
    r"|create|generate|write|support|engage|discuss|share|offer|condone|promote|participate|give you|tell you"
    r"|do (?:that|this))\b"
    r"|很抱歉|对不起|抱歉，|我无法|es tut mir leid, aber|je suis désolée?, mais|lo siento, pero|извините, но"
    r"|к сожалению, я не могу"
)
# Hedges of Hyland, Metadiscourse (2005), appendix; `may` in lower case only, the month is a name. ASCII (-u): 12 times
# as fast.
HEDGE = (
    r"(?i-u:\b(?:might|could|perhaps|maybe|possibly|probably|likely|presumably|apparently|seems?|appears? to|suggests?|"
    r"somewhat|generally|typically|usually|in my (?:opinion|view)|it depends|i (?:think|believe|guess|suppose)|"
    r"not (?:entirely |completely )?sure)\b)|(?-u:\bmay\b)"
)
# a closing mark, perhaps inside quotes, brackets, markup or a code fence, or a picture
TERMINAL = r"(?:[.!?…。！？।۔؟]|```|~~~|\p{Emoji_Presentation}|\x{FE0F})[\"'”’»」』)\]}*_`\s]*$"
LINE = r"\w(?:.*\w)?"  # from its first to its last word character
# Bytes of UTF-8 read as cp1252 (what ftfy repairs), and U+FFFD. Marks that may follow a capital Ã or Â are left out.
MOJIBAKE = (
    r"\x{FFFD}|ï»¿|â€|â„¢|Ã[\x{80}-\x{9F}\x{A1}-\x{AA}\x{AC}-\x{BA}\x{BC}-\x{BF}€ƒ†‡ˆ‰Š‹Œ•˜™šœžŸ]"
    r"|Â[\x{80}-\x{9F}\x{A0}-\x{AA}\x{AC}-\x{BA}\x{BC}-\x{BF}]|(?:[ÐÑ][\x{80}-\x{BF}€ƒ„†‡ˆ‰Š‹Œ‘’“”•–—˜™šœžŸ‚…]){2,}"
)
# As chat templates and tokenizers write them: ChatML, Llama, Mistral, Gemma, DeepSeek. F# writes `<| ` with a space.
CONTROL = (
    r"(?i)<\|[a-z0-9_]+\|>|<｜[^｜\n]{1,40}｜>|</s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|<\|?endoftext\|?>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]"
)
# Turns written into a reply: HH's, Alpaca's, Vicuna's.
ROLE = r"(?m)^(?:(?:Human|Assistant|User|USER|ASSISTANT|AI): |### ?(?:Instruction|Response|Input|Human|Assistant)\b)"

_FEATURES: dict[str, Feature] = {
    "words": Feature("length", "words and marks of the text"),
    "characters": Feature("length", "code points", TEXT.str.len_chars()),
    "lines": Feature("length", "lines that are not blank", count(r"\S[^\n]*")),
    "sentences": Feature(
        "length",
        "ends of sentences, at least 1 in a text",
        pl.max_horizontal(count(SENTENCE_ENDS), TEXT.str.contains(r"\S").cast(pl.UInt32)),
    ),
    "model_tokens": Feature("length", "tokens of the model"),
    "bold": Feature("markup", "**bold** stretches", count(BOLD)),
    "list_items": Feature("markup", "lines that begin as an item of a list", count(LIST_ITEM)),
    "headers": Feature("markup", "Markdown headers", count(HEADER)),
    "table_rows": Feature("markup", "rows of Markdown tables", count(TABLE_ROW)),
    "code_fences": Feature("markup", "lines that open or close a block of code", count(CODE_FENCE)),
    "latex": Feature("markup", "formulas in TeX", count(LATEX)),
    "links": Feature("markup", "web addresses", count(LINK)),
    "exclamation_marks": Feature("markup", "exclamation marks", count("[!！]")),
    "question_marks": Feature("markup", "question marks", count("[?？؟]")),
    "emoji": Feature("markup", "emoji", count(EMOJI), where=NOT_ASCII),
    "typographic_marks": Feature(
        "markup", "dashes, curly quotes, guillemets and ellipses", count(TYPOGRAPHIC), where=NOT_ASCII
    ),
    "affirmative_opener": Feature(
        "opener", "1 if it begins with Sure, Certainly, Here is ...", _opens(AFFIRMATIVE, NOT_AFFIRMATIVE)
    ),
    "sycophantic_opener": Feature("opener", "1 if it begins by praising or thanking the asker", _opens(SYCOPHANTIC)),
    "refusals": Feature("wording", "phrases that refuse: as an AI, I cannot help ...", count(REFUSAL)),
    "hedges": Feature("wording", "words that hedge: might, perhaps, usually ...", count(HEDGE)),
    "copy_rate": Feature("prompt", "share of its distinct words that the prompt has, 0..1"),
    "no_terminal_punctuation": Feature(
        "ending",
        "1 if no mark ends it: perhaps cut off",
        ~TEXT.str.strip_chars_end().str.tail(24).str.contains(TERMINAL),
    ),
    "truncated": Feature("ending", "1 if the model's max_length cut it"),
    "no_end_token": Feature("ending", "1 if it is encoded without an end token"),
    "repeated_lines": Feature(
        "text",
        "share of its lines with words that were there before, 0..1 (Rae et al., arXiv 2112.11446, table A1)",
        (1 - TEXT.str.extract_all(LINE).list.n_unique() / TEXT.str.extract_all(LINE).list.len()).fill_nan(0),
        where=TEXT.str.contains("\n", literal=True),
    ),
    "type_token_ratio": Feature("text", "distinct words / words, 0..1; falls with length"),
    "non_latin_share": Feature(
        "text",
        "share of its letters that are not Latin, 0..1",
        count(NOT_LATIN) / count(r"\p{L}"),
        where=TEXT.str.contains(NOT_LATIN),
    ),
    "mojibake": Feature("text", "broken encodings: â€™ for ’, Ã© for é, U+FFFD", count(MOJIBAKE), where=NOT_ASCII),
    "control_tokens": Feature("text", "control tokens spelt out: <|im_end|>, [INST], </s> ...", count(CONTROL)),
    "role_markers": Feature("text", "lines that open a turn: Human:, ### Response ...", count(ROLE)),
}
FEATURES: Mapping[str, Feature] = MappingProxyType(_FEATURES)


def side_features(block: pl.DataFrame) -> Sides:
    """One Float32 column for each of FEATURES that needs no model, of each side.

    Args:
        block: prompt, chosen, rejected: plain strings, any number of rows.
    """
    parts = [_block_features(part) for part in block.iter_slices(ROWS)] or [_block_features(block)]
    return Sides(pl.concat(part.chosen for part in parts), pl.concat(part.rejected for part in parts))


def _block_features(block: pl.DataFrame) -> Sides:
    texts = stacked(block)
    found = [_word_features(block["prompt"], texts["text"]).get_columns()]
    found += [
        [_counted(texts, feature).alias(name)] for name, feature in FEATURES.items() if feature.expression is not None
    ]
    columns = {column.name: column.cast(pl.Float32) for group in found for column in group}
    return halves(pl.DataFrame([columns[name] for name in FEATURES if name in columns]))


def stacked(block: pl.DataFrame) -> pl.DataFrame:
    """All chosen sides, then all rejected ones, as `text`."""
    return pl.concat([block["chosen"], block["rejected"]]).alias("text").to_frame()


def halves(frame: pl.DataFrame) -> Sides:
    """The opposite of `stacked`, of whatever columns."""
    half = frame.height // 2
    return Sides(frame.head(half), frame.tail(half))


def _counted(texts: pl.DataFrame, feature: Feature) -> pl.Series:
    assert feature.expression is not None
    if feature.where is None:
        return texts.select(feature.expression).to_series()
    rows = texts.select(feature.where.arg_true()).to_series()
    found = np.zeros(texts.height, dtype=np.float32)
    found[rows.to_numpy()] = texts[rows].select(feature.expression).to_series().to_numpy()
    return pl.Series(found)


def _word_features(prompts: pl.Series, sides: pl.Series) -> pl.DataFrame:
    """words, copy_rate and type_token_ratio of each side; `sides`: chosen sides, then rejected ones."""
    hashed = hash_words(sides)
    words = np.diff(hashed.offsets)
    mine, of_prompts = _distinct(hashed), _distinct(hash_words(prompts))
    twice = np.concatenate([of_prompts, of_prompts + np.uint64(len(prompts) << HASH_BITS)])
    rows = (mine >> np.uint64(HASH_BITS)).astype(np.int64)
    distinct = np.bincount(rows, minlength=len(sides))
    copied = np.bincount(rows[_within(mine, twice)], minlength=len(sides))
    rate, ratio = (over / np.maximum(1, under) for over, under in ((copied, distinct), (distinct, words)))
    return pl.DataFrame({"words": words, "copy_rate": rate, "type_token_ratio": ratio})


def _distinct(hashed: Grams) -> Array:
    """(row << HASH_BITS | hash) of the distinct words of each row, ascending."""
    rows = np.repeat(np.arange(len(hashed.offsets) - 1, dtype=np.uint64), np.diff(hashed.offsets))
    keys = rows << np.uint64(HASH_BITS) | hashed.hashes >> np.uint64(64 - HASH_BITS)
    keys = pl.Series(keys, dtype=pl.UInt64).sort().to_numpy()
    return np.asarray(keys[np.diff(keys, prepend=~keys[:1]) != 0])


def _within(keys: Array, others: Array) -> Array:
    """Which of ascending keys are among other ascending keys."""
    if not len(others):
        return np.zeros(len(keys), dtype=bool)
    return np.asarray(others[np.minimum(np.searchsorted(others, keys), len(others) - 1)] == keys)
