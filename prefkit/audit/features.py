r"""What one side of a pair looks like without being read: numbers and values of (prompt, text), the same for both sides.

Comes in: a block of texts (prompt, chosen, rejected: plain strings). Goes out: one number a side for each of FEATURES
(`side_features`), and one value a side for each of CATEGORICAL (`side_values`). Lengths and style are what preference
models over-rely on (Bharadwaj et al., arXiv 2506.05339). The wording features are English but where they say otherwise;
for other languages the tokens and first_words speak. Price: some 40 microseconds a pair of HH on one core.
"""

import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.text import WORD

ROWS = 4096  # a call: the keys of distinct words hold 16 bits of row
HASH_BITS = 48  # of a word within a row; two of 10,000 words of a row meet once in 6 million rows


class Feature(NamedTuple):
    """A number of one side. `expression`: of the column `text`, None where words are counted or a model is asked."""

    family: str
    doc: str
    expression: pl.Expr | None = None
    ascii_has_none: bool = False  # an ASCII text has 0 of it, which spares looking


class Categorical(NamedTuple):
    """A value of one side. `unknown`: null says that it is not known, and the pair does not count, not that it is none."""

    feature: str
    family: str
    doc: str
    unknown: bool = False


class Sides(NamedTuple):
    """The same columns of both sides, one row a pair."""

    chosen: pl.DataFrame
    rejected: pl.DataFrame


TEXT = pl.col("text")


def _count(pattern: str) -> pl.Expr:
    return TEXT.str.count_matches(pattern)


def _opens(pattern: str, but: str = r"\z.") -> pl.Expr:
    """Whether the text begins with a pattern after white space, quotes and markup; `but`: longer openers that do not."""
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
PRAISE = r"(?:great|good|excellent|fantastic|wonderful|amazing|awesome|brilliant|fascinating|interesting|insightful|thoughtful|profound|lovely|terrific)"
# Flattery of the asker: Sharma et al. 2023 (arXiv 2310.13548); one of the five biases of arXiv 2506.05339.
SYCOPHANTIC = (
    rf"(?:what an? |(?:wow,? )?that(?:['’]s| is) (?:such )?an? |such an? )?(?:really |very |truly |absolutely )?{PRAISE} "
    r"(?:question|point|idea|observation|thought|topic|choice|insight)\b|you(?:['’]re| are) (?:so |absolutely |totally "
    r"|completely |quite )?right\b|(?:i )?love (?:this|that|your) (?:question|idea|point)|thank(?:s| you) for (?:asking|"
    r"(?:your|the|this|such an?) (?:\w+ )?question)"
)
# After the refusal prefixes of Zou et al. (llm-attacks, test_prefixes) and their like in five languages, made tighter: a
# plain "I'm sorry" consoles, and "I can't wait" refuses nothing.
REFUSAL = (
    r"(?i)\bas an? (?:(?:large )?language model|ai\b|artificial intelligence)"
    r"|\bsorry,? (?:but )?(?:i|we)(?: can(?:no|['’])t| am| won['’]t| don['’]t|['’]m)\b|\bsorry,? but\b|\bmy apologies\b|\bi apologi[sz]e,? but\b"
    r"|\bi(?: can(?:no|['’])t| can not|['’]m not able to| am not able to|['’]m unable to| am unable to| won['’]t| will not)"
    r"(?: be able to)?(?: (?:really|in good conscience|actually|currently|directly))? (?:help|assist|provide|answer|comply|fulfill?"
    r"|create|generate|write|support|engage|discuss|share|offer|condone|promote|participate|give you|tell you|do that|do this)\b"
    r"|\bi must (?:decline|refuse)\b|很抱歉|对不起|抱歉，|我无法|es tut mir leid, aber|je suis désolée?, mais|lo siento, pero"
    r"|извините, но|к сожалению, я не могу"
)
# Hedges of Hyland, Metadiscourse (2005), appendix; `may` in lower case only, the month is a name.
HEDGE = (
    r"(?i:\b(?:might|could|perhaps|maybe|possibly|probably|likely|presumably|apparently|seems?|appears? to|suggests?|"
    r"somewhat|generally|typically|usually|in my (?:opinion|view)|it depends|i (?:think|believe|guess|suppose)|"
    r"not (?:entirely |completely )?sure)\b)|\bmay\b"
)
# a closing mark, perhaps inside quotes, brackets, markup or a code fence, or a picture
TERMINAL = r"(?:[.!?…。！？।۔؟]|```|~~~|\p{Emoji_Presentation}|\x{FE0F})[\"'”’»」』)\]}*_`\s]*$"
LINE = r"\w(?:.*\w)?"  # from its first to its last word character
# Bytes of UTF-8 read as cp1252 (what ftfy repairs), and U+FFFD. Marks that may follow a capital à or  in a text are left out.
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
NO_LETTERS = pl.max_horizontal(_count(r"\p{L}"), 1)

_FEATURES: dict[str, Feature] = {
    "words": Feature("length", "words and marks of the text"),
    "characters": Feature("length", "code points", TEXT.str.len_chars()),
    "lines": Feature("length", "lines that are not blank", _count(r"\S[^\n]*")),
    "sentences": Feature(
        "length",
        "ends of sentences, at least 1 in a text",
        pl.max_horizontal(_count(SENTENCE_ENDS), TEXT.str.contains(r"\S").cast(pl.UInt32)),
    ),
    "model_tokens": Feature("length", "tokens of the model"),
    "bold": Feature("markup", "**bold** stretches", _count(BOLD)),
    "list_items": Feature("markup", "lines that begin as an item of a list", _count(LIST_ITEM)),
    "headers": Feature("markup", "Markdown headers", _count(HEADER)),
    "table_rows": Feature("markup", "rows of Markdown tables", _count(TABLE_ROW)),
    "code_fences": Feature("markup", "lines that open or close a block of code", _count(CODE_FENCE)),
    "latex": Feature("markup", "formulas in TeX", _count(LATEX)),
    "links": Feature("markup", "web addresses", _count(LINK)),
    "exclamation_marks": Feature("markup", "exclamation marks", _count("[!！]")),
    "question_marks": Feature("markup", "question marks", _count("[?？؟]")),
    "emoji": Feature("markup", "emoji", _count(EMOJI), ascii_has_none=True),
    "typographic_marks": Feature(
        "markup", "dashes, curly quotes, guillemets and ellipses", _count(TYPOGRAPHIC), ascii_has_none=True
    ),
    "affirmative_opener": Feature(
        "opener", "1 if it begins with Sure, Certainly, Here is ...", _opens(AFFIRMATIVE, NOT_AFFIRMATIVE)
    ),
    "sycophantic_opener": Feature("opener", "1 if it begins by praising or thanking the asker", _opens(SYCOPHANTIC)),
    "refusals": Feature("wording", "phrases that refuse: as an AI, I cannot help ...", _count(REFUSAL)),
    "hedges": Feature("wording", "words that hedge: might, perhaps, usually ...", _count(HEDGE)),
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
    ),
    "type_token_ratio": Feature("text", "distinct words / words, 0..1; falls with length"),
    "non_latin_share": Feature(
        "text", "share of its letters that are not Latin, 0..1", _count(r"[\p{L}--\p{Latin}]") / NO_LETTERS, True
    ),
    "mojibake": Feature("text", "broken encodings: â€™ for ’, Ã© for é, U+FFFD", _count(MOJIBAKE), True),
    "control_tokens": Feature("text", "control tokens spelt out: <|im_end|>, [INST], </s> ...", _count(CONTROL)),
    "role_markers": Feature("text", "lines that open a turn: Human:, ### Response ...", _count(ROLE)),
}
FEATURES: Mapping[str, Feature] = MappingProxyType(_FEATURES)

_WORDS = range(1, 4)
CATEGORICAL: Mapping[str, Categorical] = MappingProxyType(
    {f"first_words_{n}": Categorical("first_words", "opener", "its first 1 to 3 words") for n in _WORDS}
    | {f"last_words_{n}": Categorical("last_words", "ending", "its last 1 to 3 words") for n in _WORDS}
    | {
        "script": Categorical("script", "text", "Unicode script of most of its letters", unknown=True),
        "language": Categorical("language", "text", "language by its function words or script", unknown=True),
        "generator": Categorical("generator", "generator", "the model that wrote it", unknown=True),
    }
)
