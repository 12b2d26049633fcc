r"""What one side of a pair looks like without being read, in values: how it begins and ends, its script and language.

Comes in: a block of texts. Goes out: one value a side for each of CATEGORICAL. Some twenty languages are told by their
function words and letters, others by their script: enough to see that one side answers in another language than the
other. A text with too few such words or letters has none, nor has a language that is not among these.
Price: some 30 microseconds a pair of HH on one core.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl

from prefkit.audit.features import NOT_ASCII, NOT_LATIN, Sides, count, halves, stacked
from prefkit.grams import Array, Grams, hash_words, words_in


class Categorical(NamedTuple):
    """A value of one side. `unknown`: null is not known, and such a pair does not count; else null is none."""

    feature: str
    family: str
    doc: str
    unknown: bool = False


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

# The most frequent words of a language that are short and rarely written alike elsewhere; one that several languages
# have counts for each in equal parts. Scripts below need no words.
_FUNCTION_WORDS = {
    "bg": "се да са че ще съм той тя това като от за на не и в е по до със",
    "cs": "je na se že to jsem ale jako pro není by jsou který byl podle také",
    "da": "og det er en at på som af til den ikke jeg med der et",
    "de": "der die das und ist nicht ich ein zu mit den auf es für im von sie eine",
    "en": "the and of to is that it for you with are this in a be on as have i do no so we my not your can what was an",
    "es": "el la los que y en es un una por para no con las del se de como",
    "et": "ja on ei see et ta oli mis kui ka ning aga seda või kes oma nagu siis selle mida nad pärast üle mitte kuid",
    "fi": "ja on ei se että oli hän kun mutta ovat myös joka",
    "fr": "le la les et est des une pas que dans pour vous du un en je qui sur de il",
    "id": "yang dan di untuk dengan ini itu tidak dari dalam pada saya anda",
    "it": "il che di e è un una non per con sono della gli la le in si",
    "nl": "de het een en van is dat niet ik je voor met zijn op te in",
    "pl": "nie na się że to jest do jak po dla ale są przez od jego tym",
    "pt": "o a os que e é um uma não para com do da em de no na se ao mais foi por como",
    "ro": "și de în a la nu că este pe un o cu din care sunt",
    "ru": "и в не на что с как это по он но я из у к за а его от же бы был так или для все она они мы вы если",
    "sv": "och att det är en som på för inte jag av den till med ett",
    "tr": "bir ve bu için ile de da çok ne değil gibi daha olarak",
    "uk": "і в не на що з та як це до у й за є про від але він вони його для а або я ти ми",
    "vi": "và của là có không được cho các một người trong những",
}
# letters that of the languages above only one has, or has often; each is worth a word
_LETTERS = {
    "cs": "ěřů",
    "de": "ß",
    "es": "ñ¿¡",
    "pl": "łąęśżź",
    "pt": "ã",
    "ro": "ășț",
    "ru": "ыэё",
    "tr": "ğış",
    "uk": "іїєґ",
    "vi": "ơưđạế",
}
_ONE_LANGUAGE = {"Han": "zh", "Japanese": "ja", "Hangul": "ko", "Greek": "el", "Hebrew": "he", "Thai": "th"}
_SCRIPTS = (
    "Latin",
    "Cyrillic",
    "Han",
    "Japanese",
    "Hangul",
    "Arabic",
    "Hebrew",
    "Greek",
    "Devanagari",
    "Thai",
    "Bengali",
    "Tamil",
    "Telugu",
    "Gujarati",
    "Georgian",
    "Armenian",
    "Ethiopic",
)
MIN_FUNCTION_WORDS = 1.5  # of a language, before it is believed: at most .6% of real sentences get a wrong one
LEAD = 1.5  # times as many as of the next language
MIN_KANA = 0.05  # of the characters of a Japanese text, at the least
END = 64  # characters that hold the first or last three words, nearly always
LANGUAGE_CHARS = 400  # enough to tell


def side_values(block: pl.DataFrame) -> Sides:
    """One String column for each of CATEGORICAL but `generator`, of each side; null where there is none.

    Args:
        block: chosen, rejected: plain strings, any number of rows.
    """
    texts = stacked(block)
    ends = [_ends(text) for text in texts["text"]]
    names = [name for name in CATEGORICAL if name.startswith(("first_words", "last_words"))]
    found = pl.DataFrame(ends, schema=dict.fromkeys(names, pl.String), orient="row")
    scripts = _scripts(texts)
    return halves(found.with_columns(scripts, _languages(texts["text"], scripts)))


def _ends(text: str) -> tuple[str | None, ...]:
    """The first 1, 2 and 3 words, then the last 1, 2 and 3; None where there are fewer. `"Oh, no"`: oh / oh , / ..."""
    first, last = _some_words(text, text[:END])[:3], _some_words(text, text[-END:])[-3:]
    return (
        *(" ".join(first[:n]) if n <= len(first) else None for n in _WORDS),
        *(" ".join(last[-n:]) if n <= len(last) else None for n in _WORDS),
    )


def _some_words(text: str, part: str) -> list[str]:
    """The words of a part; of the whole text where the cut may have gone through one of the three that count."""
    found = words_in(part)
    return found if len(found) > len(_WORDS) or len(part) == len(text) else words_in(text)


def _scripts(texts: pl.DataFrame) -> pl.Series:
    """The script of most letters; null without a letter, `other` where it is none of _SCRIPTS."""
    latin = pl.when(pl.col("text").str.contains(r"\p{Latin}")).then(pl.lit("Latin"))
    numbered = texts.with_row_index()
    mixed = numbered.filter(pl.col("text").str.contains(NOT_LATIN)).select("index", script=_dominant())
    joined = numbered.join(mixed, on="index", how="left", maintain_order="left")
    return joined.select(pl.coalesce("script", latin).alias("script")).to_series()


def _dominant() -> pl.Expr:
    """The first of _SCRIPTS that no other outnumbers. Kana make Han Japanese (Jpan of ISO 15924)."""
    counts = {name: count(rf"\p{{{name}}}").cast(pl.Int64) for name in _SCRIPTS if name != "Japanese"}
    kana, han = count(r"[\p{Hiragana}\p{Katakana}]").cast(pl.Int64), counts["Han"]
    japanese = kana > MIN_KANA * (han + kana)
    counts |= {
        "Japanese": pl.when(japanese).then(han + kana).otherwise(0),
        "Han": pl.when(japanese).then(0).otherwise(han),
    }
    counts["other"] = count(r"\p{L}").cast(pl.Int64) - pl.sum_horizontal(counts.values())
    names = [*counts]
    most = pl.concat_list([counts[name] for name in names]).list.arg_max()
    return most.replace_strict(range(len(names)), names, return_dtype=pl.String)


def _languages(texts: pl.Series, scripts: pl.Series) -> pl.Series:
    """The ISO 639-1 code of each text: by script, or by function words of its beginning; else null."""
    begin = texts.str.head(LANGUAGE_CHARS)
    names, votes = _votes(hash_words(begin))
    votes += _letters(begin, names)
    best = votes.argmax(axis=1)
    ordered = np.sort(votes, axis=1)
    sure = (ordered[:, -1] >= MIN_FUNCTION_WORDS) & (ordered[:, -1] >= LEAD * ordered[:, -2])
    spoken = pl.Series(np.where(sure, best, -1)).replace_strict(range(len(names)), names, default=None)
    by_script = scripts.replace_strict(_ONE_LANGUAGE, default=None, return_dtype=pl.String)
    written = scripts.is_in(["Latin", "Cyrillic"])
    return pl.select(pl.when(written).then(spoken).otherwise(by_script).alias("language")).to_series()


def _votes(hashed: Grams) -> tuple[list[str], Array]:
    """Languages, and how many words of each text speak for each of them: (texts, languages)."""
    names, words, weights = _function_words()
    rows = np.repeat(np.arange(len(hashed.offsets) - 1), np.diff(hashed.offsets))
    at = np.minimum(np.searchsorted(words, hashed.hashes), len(words) - 1)
    hit = words[at] == hashed.hashes
    cells = np.bincount(rows[hit] * len(words) + at[hit], minlength=(len(hashed.offsets) - 1) * len(words))
    return names, cells.reshape(-1, len(words)) @ weights


def _letters(texts: pl.Series, names: list[str]) -> Array:
    """How many letters of each text speak for each language: (texts, languages)."""
    frame = texts.alias("text").to_frame()
    rows = frame.select(NOT_ASCII.arg_true()).to_series()
    lower = frame[rows].select(pl.col("text").str.to_lowercase())
    found = np.zeros((len(texts), len(names)))
    for name, letters in _LETTERS.items():
        found[rows.to_numpy(), names.index(name)] = lower.select(count(f"[{letters}]")).to_series().to_numpy()
    return found


@cache
def _function_words() -> tuple[list[str], Array, Array]:
    """Languages, the hashes of their words, ascending, and what each word is worth for each: (words, languages)."""
    names = [*_FUNCTION_WORDS]
    words = sorted({word for of_one in _FUNCTION_WORDS.values() for word in of_one.split()})
    has = np.array([[word in of_one.split() for of_one in _FUNCTION_WORDS.values()] for word in words], dtype=float)
    hashes = hash_words(pl.Series(words)).hashes
    order = np.argsort(hashes)
    return names, hashes[order], (has / has.sum(axis=1, keepdims=True))[order]
