r"""Words and n-grams as 64-bit hashes, whole blocks of texts at once: no Python object a word.

A word is `\w+|[^\w\s]` over casefolded NFC text, for all of Unicode; the plain code is `words_in`. Two n-grams of one n
share a hash with probability 2^-53: among ten million of them, .006 pairs are expected to. Price: some 5 nanoseconds a
byte of English on one core.

A hash is a multiple of 2^SPARE_BITS: whoever sorts hashes keeps a pair and its side in the bits below. Hashes are the
same on every machine, and stored nowhere.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefkit.text import WORD

SPARE_BITS = 11
SPACE, IN_WORD, MARK, SIGN = 0, 1, 2, 3  # a kind of character; a mark is a word by itself, and so is a sign
UNSETTLED = 4  # added to a kind: the character may fold or compose, so that its text is folded by Python
EMPTY = np.uint64(2**64 - 1)  # no hash: it is no multiple of 2^SPARE_BITS
_KEPT = np.uint64(2**64 - 2**SPARE_BITS)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_LOWER = bytes(range(256)).lower()
# ours: scripts that put no space between words, as the names of their characters begin
_UNSPACED = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
_HIGH = 128  # bytes from here on are of characters outside ASCII
_CHUNK = 8  # bytes of a word that are mixed in at a time
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_CHUNK + 1)], dtype=np.uint64)

Array = np.ndarray[Any, np.dtype[Any]]


class Grams(NamedTuple):
    """The n-grams of documents in their order: those of document i are `hashes[offsets[i]:offsets[i + 1]]`."""

    hashes: Array  # uint64 (T,)
    offsets: Array  # int64 (documents + 1,)


def hash_words(texts: pl.Series, *, marks: bool = True, unspaced: bool = False) -> Grams:
    """The words of each text, in order; of a null none.

    Args:
        texts: strings.
        marks: whether what is neither a word character nor white space counts as a word.
        unspaced: each character of a script that puts no space between words is a word by itself, a sign.
    """
    raw, offsets = _bytes_of(texts)
    raw, kinds = _kinds(raw, unspaced=unspaced)
    unsettled = np.flatnonzero(kinds >= UNSETTLED)
    if len(unsettled):
        rows = np.unique(np.searchsorted(offsets, unsettled, side="right") - 1)
        raw, kinds, offsets = _refolded(texts.gather(rows).to_list(), rows, raw, kinds, offsets, unspaced=unspaced)
    if not marks:
        kinds = np.where(kinds == MARK, np.uint8(SPACE), kinds)
    starts, ends = _spans(raw, kinds, offsets)
    return Grams(_hash_spans(raw, starts, ends), np.searchsorted(starts, offsets).astype(np.int64))


def hash_ids(ids: pl.Series) -> Grams:
    """The token ids of each list<int32>, in order; of a null none."""
    lengths = ids.list.len().fill_null(0).to_numpy()
    flat = ids.drop_nulls().explode(empty_as_null=False).cast(pl.Int64).to_numpy()
    return Grams(_mixed(flat.astype(np.uint64) + np.uint64(1)) & _KEPT, offsets_of(lengths))


def ngrams(grams: Grams, n: int) -> Grams:
    """The n-grams inside each document, from its 1-grams; none crosses from one document into the next."""
    found = grams
    for length in range(1, n):
        found = extended(found, grams, length)
    return found


def joined_words(words: Grams, n: int) -> Grams:
    """The n-grams of each document from its 1-grams, hashed in one go; a document of fewer words has one: all of them.

    The hashes are no multiples of those of `ngrams`, and a document without a word has the hash of nothing.
    """
    lengths = np.diff(words.offsets)
    counts = np.maximum(lengths - n + 1, 1)
    offsets = offsets_of(counts)
    powers = _ODD ** np.arange(n, dtype=np.uint64)
    summed = np.zeros(max(len(words.hashes) - n + 1, 0), dtype=np.uint64)
    for place in range(n):
        summed += words.hashes[place : place + len(summed)] * powers[n - 1 - place]
    short = np.flatnonzero(lengths < n)
    if not len(short):
        inside = ~_at_ends(words.offsets, n - 1)[: len(summed)]
        return Grams(_mixed(summed[inside] + np.uint64(n)) & _KEPT, offsets)
    found = np.empty(int(offsets[-1]), dtype=np.uint64)
    alone = np.zeros(len(found), dtype=bool)
    alone[offsets[short]] = True
    found[~alone] = summed[~_at_ends(words.offsets, n - 1)[: len(summed)]] + np.uint64(n)
    whole = np.zeros(len(short), dtype=np.uint64)
    for place in range(n - 1):
        more = np.flatnonzero(lengths[short] > place)
        whole[more] = whole[more] * _ODD + words.hashes[words.offsets[short[more]] + place]
    found[alone] = whole + lengths[short].astype(np.uint64)  # hashes are multiples of 2^SPARE_BITS: lengths never meet
    return Grams(_mixed(found) & _KEPT, offsets)


def extended(grams: Grams, words: Grams, n: int, known: Array | None = None) -> Grams:
    """The (n + 1)-grams of each document, from its n-grams and its 1-grams.

    Args:
        grams: n-grams of every document.
        words: 1-grams of the same documents.
        n: length of `grams`.
        known: which of `grams` count, bool (T,): an (n + 1)-gram is left out unless both its parts do.
    """
    head, tail = ~_at_ends(grams.offsets), ~_at_starts(grams.offsets, 1)
    after = words.hashes[~_at_starts(words.offsets, n)]
    if known is None:
        return Grams(_joined(grams.hashes[head], after), offsets_of(np.maximum(np.diff(grams.offsets) - 1, 0)))
    both = known[head] & known[tail]
    offsets = offsets_of(np.maximum(np.diff(grams.offsets) - 1, 0))
    return Grams(_joined(grams.hashes[head][both], after[both]), offsets_of(both)[offsets])


def selected(grams: Grams, mask: Array) -> Grams:
    """Some of the n-grams of each document."""
    return Grams(grams.hashes[mask], offsets_of(mask)[grams.offsets])


def _at_starts(offsets: Array, count: int) -> Array:
    """The first `count` places of each document."""
    found = np.zeros(int(offsets[-1]), dtype=bool)
    for place in range(count):
        at = offsets[:-1] + place
        found[at[at < offsets[1:]]] = True
    return found


def _at_ends(offsets: Array, count: int = 1) -> Array:
    """The last `count` places of each document, or all it has."""
    found = np.zeros(int(offsets[-1]), dtype=bool)
    for place in range(1, count + 1):
        at = offsets[1:] - place
        found[at[at >= offsets[:-1]]] = True
    return found


def gram_hash(words: Sequence[str]) -> int:
    """The hash of one n-gram of words as they stand, folded already: the plain code of `hash_words` and `ngrams`."""
    return _of_sequence([_hash_word(word) for word in words])


def ids_hash(ids: Sequence[int]) -> int:
    """The hash of one n-gram of token ids."""
    return _of_sequence([_mixed_int(token + 1) & int(_KEPT) for token in ids])


def fold(text: str) -> str:
    """NFC, then casefolded: the text that words are cut from."""
    return unicodedata.normalize("NFC", text).casefold()


def words_in(text: str, *, marks: bool = True, unspaced: bool = False) -> list[str]:
    """The words of a text in order, as strings. `"Hi, hi!"` gives hi , hi !"""
    words = WORD.findall(fold(text))
    if unspaced:
        words = [part for word in words for part in _apart(word)]
    return words if marks else [word for word in words if _kind_of(ord(word[0]), unspaced=unspaced) % UNSETTLED != MARK]


class Lookup(NamedTuple):
    """A set of distinct hashes and the place of each: an open table in the order of the hashes.

    A hash stands at its highest bits or, where others do, behind them. Looking one up costs some 5 nanoseconds, where a
    binary search costs 100.
    """

    table: Array  # uint64, EMPTY where nothing stands
    places: Array  # int32, parallel: where the hash stood in the array that the table was made from
    shift: int

    @classmethod
    def of(cls, hashes: Array) -> "Lookup":
        """The table of some distinct hashes."""
        bits = max(len(hashes).bit_length() + 1, 4)  # at most half full
        order = np.argsort(hashes, kind="stable")
        wanted = (hashes[order] >> np.uint64(64 - bits)).astype(np.int64)
        ranks = np.arange(len(hashes))
        at = np.maximum.accumulate(wanted - ranks) + ranks  # the first free slot from the wanted one on
        table = np.full(2**bits + len(hashes) + 1, EMPTY, dtype=np.uint64)
        places = np.full(len(table), -1, dtype=np.int32)
        table[at], places[at] = hashes[order], order
        return cls(table, places, 64 - bits)

    def find(self, hashes: Array) -> Array:
        """The place of each hash, -1 where it is not in the set; int32."""
        at = (hashes >> np.uint64(self.shift)).astype(np.int64)
        seen = self.table[at]
        passed = np.flatnonzero(seen < hashes)  # no hash stands behind a larger one
        while len(passed):
            at[passed] += 1
            passed = passed[self.table[at[passed]] < hashes[passed]]
        return np.where(self.table[at] == hashes, self.places[at], -1)


# -- one at a time


def _hash_word(word: str) -> int:
    data, mixed = word.encode(), 0
    for start in range(0, len(data), _CHUNK):
        part = int.from_bytes(data[start : start + _CHUNK], "little")
        mixed = _mixed_int(mixed * int(_ODD) ^ part)
    return mixed & int(_KEPT)


def _of_sequence(hashes: Sequence[int]) -> int:
    joined = hashes[0]
    for word in hashes[1:]:
        joined = _mixed_int(joined * int(_ODD) + word) & int(_KEPT)
    return joined


def _mixed_int(value: int) -> int:
    return int(_mixed(np.array([value % 2**64], dtype=np.uint64))[0])


def _apart(word: str) -> list[str]:
    """A word, its signs apart from the rest."""
    parts = [""]
    for character in word:
        if _is_unspaced(character):
            parts += [character, ""]
        else:
            parts[-1] += character
    return [part for part in parts if part]


# -- many at a time


def _mixed(values: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby), a bijection of 64 bits."""
    mixed: Array = values ^ (values >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed


def _joined(grams: Array, words: Array) -> Array:
    mixed = _mixed(grams * _ODD + words)
    mixed &= _KEPT
    return mixed


def offsets_of(lengths: Array) -> Array:
    """Where documents of these lengths begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _bytes_of(texts: pl.Series) -> tuple[Array, Array]:
    """The UTF-8 of all texts, ASCII letters in lower case, and where each begins; `_CHUNK` bytes follow the last."""
    whole = texts.fill_null("") if texts.null_count() else texts  # each call of Polars costs a block of texts some time
    array = whole.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    _, places, data = array.buffers()
    offsets = np.frombuffer(places, dtype=np.int64)[array.offset : array.offset + len(texts) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    inside = b"" if data is None else memoryview(data)[first:last]
    lower = b"".join([inside, bytes(_CHUNK)]).translate(_LOWER)
    return np.frombuffer(lower, dtype=np.uint8), offsets - first


def _refolded(
    texts: Sequence[str], rows: Array, raw: Array, kinds: Array, offsets: Array, *, unspaced: bool
) -> tuple[Array, Array, Array]:
    """Bytes, kinds and offsets of all texts, those of some rows (their texts are given) folded by Python."""
    folded = [fold(text).encode() for text in texts]
    new = np.frombuffer(b"".join([*folded, bytes(_CHUNK)]), dtype=np.uint8)
    new_kinds = _kinds(new, unspaced=unspaced)[1] & ~np.uint8(UNSETTLED)
    lengths = np.diff(offsets)
    lengths[rows] = [len(text) for text in folded]
    ends = np.cumsum(lengths[rows])
    raw_parts, kind_parts, done = [], [], 0
    places = zip(offsets[rows], offsets[rows + 1], ends - lengths[rows], ends, strict=True)
    for begin, end, first, last in places:
        raw_parts += [raw[done:begin], new[first:last]]
        kind_parts += [kinds[done:begin], new_kinds[first:last]]
        done = end
    return np.concatenate([*raw_parts, raw[done:]]), np.concatenate([*kind_parts, kinds[done:]]), offsets_of(lengths)


def _kinds(raw: Array, *, unspaced: bool) -> tuple[Array, Array]:
    """The bytes with what folds to as many bytes folded, and the kind of the character that each is of.

    The `_CHUNK` bytes behind the last text have no kind.
    """
    kinds = np.frombuffer(raw[:-_CHUNK].tobytes().translate(_kinds_of_ascii()), dtype=np.uint8)
    if not len(raw) or raw.max() < _HIGH:
        return raw, kinds
    kinds = kinds.copy()
    leads = np.flatnonzero(raw[:-_CHUNK] >= 0xC0)
    sizes = 2 + (raw[leads] >= 0xE0) + (raw[leads] >= 0xF0)
    points = code_points(raw, leads)
    folded = _looked_up(points, np.uint32, _simply_folded)
    found = _looked_up(folded, np.uint8, partial(_kind_of, unspaced=unspaced))
    kinds[leads] = found
    for place in (1, 2, 3):
        longer = sizes > place
        kinds[leads[longer] + place] = found[longer]
    return _written(raw, leads, sizes, points, folded), kinds


def _written(raw: Array, leads: Array, sizes: Array, points: Array, folded: Array) -> Array:
    """Bytes with other characters of as many bytes in the places of some."""
    changed = np.flatnonzero(folded != points)
    if not len(changed):
        return raw
    raw, at, size, left = raw.copy(), leads[changed], sizes[changed], folded[changed]
    for place in (3, 2, 1):
        longer = size > place
        raw[at[longer] + place] = 0x80 | (left[longer] & 0x3F)
        left = np.where(longer, left >> 6, left)
    raw[at] = np.array([0, 0, 0xC0, 0xE0, 0xF0], dtype=np.uint32)[size] | left
    return raw


def code_points(raw: Array, leads: Array) -> Array:
    """The code points of the UTF-8 characters of 2 to 4 bytes that begin at `leads`."""
    sizes = 2 + (raw[leads] >= 0xE0) + (raw[leads] >= 0xF0)
    points: Array = raw[leads] & np.array([0, 0, 0x1F, 0x0F, 0x07], dtype=np.uint32)[sizes]
    for place in (1, 2, 3):
        longer = np.flatnonzero(sizes > place)
        points[longer] = points[longer] << 6 | (raw[leads[longer] + place] & 0x3F)
    return points


def _looked_up(points: Array, dtype: type[np.generic], look: Callable[[int], int]) -> Array:
    """What a function says of each code point, asked once for each that there is."""
    seen = np.zeros(int(points.max()) + 1, dtype=dtype)
    seen[points] = 1
    distinct = np.flatnonzero(seen)
    seen[distinct] = [look(point) for point in distinct.tolist()]
    return seen[points]


@lru_cache(maxsize=100_000)
def _simply_folded(point: int) -> int:
    """What a character folds to if that is one settled character of as many bytes; else itself."""
    character = chr(point)
    folded = character.casefold()
    simple = (
        len(folded) == 1
        and len(folded.encode()) == len(character.encode())
        and _kind_of(ord(folded)) < UNSETTLED
        and unicodedata.is_normalized("NFC", character)
        and not unicodedata.combining(character)
        and point not in composing()
    )
    return ord(folded) if simple else point


@cache
def _kinds_of_ascii() -> bytes:
    return bytes(_kind_of(point) if point < _HIGH else MARK for point in range(256))


@lru_cache(maxsize=100_000)
def _kind_of(point: int, *, unspaced: bool = False) -> int:
    """SPACE, IN_WORD or MARK as `WORD` sees a character, plus UNSETTLED where folding may change it or what is near."""
    character = chr(point)
    kind = IN_WORD if character.isalnum() or character == "_" else SPACE if character.isspace() else MARK
    if unspaced and kind == IN_WORD and _is_unspaced(character):
        kind = SIGN
    settled = point < _HIGH or (
        character.casefold() == character
        and unicodedata.is_normalized("NFC", character)
        and not unicodedata.combining(character)  # marks of one letter are put in order
        and point not in composing()
    )
    return kind if settled else kind + UNSETTLED


def _is_unspaced(character: str) -> bool:
    return ord(character) >= _HIGH and unicodedata.name(character, "").startswith(_UNSPACED)


@cache
def composing() -> frozenset[int]:
    """The characters that may become one with the character before them."""
    parts = (unicodedata.decomposition(chr(point)).split() for point in range(0x30000))  # two planes have any
    seconds = {int(pair[1], 16) for pair in parts if len(pair) == 2 and not pair[0].startswith("<")}
    return frozenset(seconds) | frozenset(range(0x1161, 0x11C3))  # vowels and final consonants of Hangul, by rule


def _spans(raw: Array, kinds: Array, offsets: Array) -> tuple[Array, Array]:
    """Where words begin and where they end: a run of IN_WORD inside a text, or one mark."""
    length = len(kinds)
    inside = kinds == IN_WORD
    edge = np.ones(length + 1, dtype=bool)  # at i: byte i is of another word than byte i - 1
    if length:
        np.logical_and(inside[1:], inside[:-1], out=edge[1:-1])
        np.logical_not(edge[1:-1], out=edge[1:-1])
        if raw.max() >= _HIGH:
            edge[:-1] &= (raw[:-_CHUNK] & 0xC0) != 0x80  # not in the middle of a character
    edge[offsets] = True
    visible = kinds != SPACE
    return np.flatnonzero(edge[:-1] & visible), np.flatnonzero(edge[1:] & visible) + 1


def _hash_spans(raw: Array, starts: Array, ends: Array) -> Array:
    """What `_hash_word` gives for the bytes of each span, eight bytes at a time of all words that are that long."""
    eights = np.ndarray(shape=(len(raw) - _CHUNK + 1,), dtype="<u8", buffer=raw.data, strides=(1,))
    left = ends - starts
    hashes = _mixed(eights[starts] & _FIRST_BYTES[np.minimum(left, _CHUNK)])
    longer = np.flatnonzero(left > _CHUNK)
    done = _CHUNK
    while len(longer):
        part = eights[starts[longer] + done] & _FIRST_BYTES[np.minimum(left[longer] - done, _CHUNK)]
        hashes[longer] = _mixed(hashes[longer] * _ODD ^ part)
        done += _CHUNK
        longer = longer[left[longer] > done]
    hashes &= _KEPT
    return hashes
