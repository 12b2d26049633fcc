"""Which rows hold nearly the same texts: candidates that share a band of their signatures, each verified exactly.

Comes in: Parquet files with texts. Goes out: pairs of rows with their Jaccard similarities. What is held in memory is a
few dozen bytes a row; band keys and the n-gram sets of candidates lie in temporary files. Several processes share the
files; the result does not depend on how many.

A row may have two texts, the sides of a pair: then two rows meet wherever any text of one shares a band with any of the
other. So rows whose sides both match are found twice as surely as texts are, and so are those that match crosswise.
Rows of different scopes never meet.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from prefkit.buckets import COMPARED, components, jaccards, meeting_rows, sets_of
from prefkit.format import MESSAGES, PLAIN_MESSAGES, Kind
from prefkit.grams import Array, hash_words, joined_words, offsets_of
from prefkit.minhash import Nearness, band_keys, permutations, signatures
from prefkit.store import SCRATCH, written
from prefkit.text import asked, words_of
from prefkit.workers import done_by, processes_of

BATCH_ROWS, BATCH_BYTES = 2048, 1 << 26  # read in one go, at most
TEXTS, TEXT_BYTES = 256, 1 << 20  # hashed in one go: more leave the processor's cache
COMPARED_BY_ONE = 64 * COMPARED  # pairs that a process is given in one go
Watch = Callable[[int, int], None]


class Near(NamedTuple):
    """Pairs of rows of one text each, left < right, and their Jaccard similarity, at or above the threshold."""

    left: Array
    right: Array
    jaccard: Array


class Met(NamedTuple):
    """Pairs of rows that share a band, and how similar they are.

    `similar`: float64 (pairs, 1), or of rows of two texts (pairs, 4): first and first, second and second, first and
    second, second and first. `crowded`: there was a bucket in which not all met all.
    """

    left: Array
    right: Array
    similar: Array
    crowded: bool


class TextFile(NamedTuple):
    """Row groups of a Parquet file, and its columns of texts: strings, or in a chat dataset messages.

    The column `prompt` of a chat dataset is read as `asked`, others as `words_of`.
    """

    path: Path
    groups: tuple[int, ...]
    rows: int
    columns: tuple[str, ...]
    kind: Kind = "text"


def text_files(paths: Sequence[Path], columns: tuple[str, ...], kind: Kind = "text") -> list[TextFile]:
    """A `TextFile` for each row group."""
    found = []
    for path in paths:
        metadata = pq.read_metadata(path)
        found += [
            TextFile(path, (group,), metadata.row_group(group).num_rows, columns, kind)
            for group in range(metadata.num_row_groups)
        ]
    return found


def near_texts(texts: pl.Series, nearness: Nearness = Nearness()) -> Near:  # noqa: B008  immutable
    """All pairs of similar texts, but for the few near the threshold that share no band.

    Args:
        texts: strings.
        nearness: when two are similar.
    """
    with tempfile.TemporaryDirectory(prefix="prefkit-") as folder:
        path = Path(folder) / "texts.parquet"
        texts.alias("text").to_frame().write_parquet(path, compression="uncompressed", row_group_size=65_536)
        return near_in_parts([path], "text", nearness, scratch=Path(folder))


def near_in_parts(
    files: Sequence[Path],
    column: str,
    nearness: Nearness = Nearness(),  # noqa: B008  immutable
    *,
    processes: int = 1,
    scratch: Path | None = None,
) -> Near:
    """`near_texts` of a column of Parquet files, whose rows are numbered through, in bounded memory."""
    texts = text_files(files, (column,))
    with (
        processes_of(min(processes, len(texts))) as pool,
        Meeting(texts, nearness, pool=pool, scratch=scratch) as meeting,
    ):
        met = meeting.meet()
    enough = met.similar[:, 0] >= nearness.threshold
    return Near(met.left[enough], met.right[enough], met.similar[enough, 0])


def kept_of(num_rows: int, near: Near) -> Array:
    """The first row of the connected component of each row: int64 (num_rows,), itself where it is alone."""
    component = components(num_rows, near.left, near.right)
    first = np.full(num_rows, num_rows, np.int64)
    np.minimum.at(first, component, np.arange(num_rows))
    return first[component]


class Meeting:
    """The texts of some files with their signatures, ready to be compared; temporary files go at the end.

    Args:
        files: rows are numbered through all of them; a row has as many texts as files have columns, one or two.
        nearness: when two are similar.
        rows: bool a row, which take part; None: all.
        scope: uint64 a row: rows of different scopes never meet; None: all may.
        rank: a number a row, by which the first of a crowd is chosen; None: the row's own.
        pool: processes that share the work (`workers.processes_of`); None: this one alone.
        scratch: folder for temporary files; the system's own if None.
        watch: told how many rows have signatures, of how many.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(
        self,
        files: Sequence[TextFile],
        nearness: Nearness,
        *,
        rows: Array | None = None,
        scope: Array | None = None,
        rank: Array | None = None,
        pool: ProcessPoolExecutor | None = None,
        scratch: Path | None = None,
        watch: Watch = lambda _done, _total: None,
    ) -> None:
        self.files, self.nearness, self.watch = files, nearness, watch
        self.firsts = offsets_of(np.array([file.rows for file in files], np.int64))
        num_rows = int(self.firsts[-1])
        self.rows = np.ones(num_rows, np.bool_) if rows is None else rows
        self.scope = scope
        self.num_texts = len(files[0].columns) if files else 1
        numbers = np.flatnonzero(self.rows)
        order = np.argsort(numbers if rank is None else rank[numbers], kind="stable")
        self.by_place = numbers[order]  # rows that take part, the first in rank first
        self.place = np.zeros(num_rows, np.int64)
        self.place[self.by_place] = np.arange(len(order))
        self.short = np.zeros((num_rows, self.num_texts), np.bool_)  # texts of fewer words than an n-gram has
        self.parent = scratch or Path(tempfile.gettempdir())
        self.folder: Path | None = None
        self.pool = pool

    def __enter__(self) -> Self:
        with written(self.parent):
            self.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.parent))
        try:
            self._sign()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def meet(self, among: Array | None = None) -> Met:
        """Compare the rows that share a band; of those `among` only (bool a row)."""
        chosen = self.rows if among is None else self.rows & among
        places = [self.place[np.flatnonzero(chosen[begin:end]) + begin] for begin, end in self._spans()]
        texts = np.concatenate([np.empty(0, np.int64), *places]) * self.num_texts
        texts = (texts[:, None] + np.arange(self.num_texts)).ravel()
        pairs, crowded = meeting_rows(self._bands(chosen), texts, self.num_texts)
        left, right = self.by_place[pairs >> np.uint64(32)], self.by_place[pairs & np.uint64(2**32 - 1)]
        if self.scope is not None:  # keys of bands are hashes
            one_scope = self.scope[left] == self.scope[right]
            left, right = left[one_scope], right[one_scope]
        return self.compare(np.minimum(left, right), np.maximum(left, right))._replace(crowded=crowded)

    def compare(self, left: Array, right: Array) -> Met:
        """How similar given pairs of rows are."""
        num_texts = self.num_texts
        if not len(left):
            return Met(left, right, np.empty((0, num_texts**2)), crowded=False)
        rows = np.unique(np.concatenate([left, right]))
        counts = self._write_sets(rows)
        starts = offsets_of(counts)
        places = [np.searchsorted(rows, side) * num_texts for side in (left, right)]
        columns = []
        for texts in ((0, 0),) if num_texts == 1 else ((0, 0), (1, 1), (0, 1), (1, 0)):
            at = [place + text for place, text in zip(places, texts, strict=True)]
            columns.append(self._jaccards([starts[a] for a in at], [counts[a] for a in at]))
        return Met(left, right, np.stack(columns, axis=1), crowded=False)

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts[:-1].tolist(), self.firsts[1:].tolist(), strict=True)

    def _path(self, name: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{number:05d}"

    def _sign(self) -> None:
        calls, numbers = [], []
        for number, (begin, end) in enumerate(self._spans()):
            rows = np.flatnonzero(self.rows[begin:end])
            scope = None if self.scope is None else self.scope[begin + rows]
            calls.append((sign_file, self.files[number], rows, scope, self.nearness, self._path("keys", number)))
            numbers.append(begin + rows)
        done = 0
        with written(self.parent):
            for rows, short in zip(numbers, done_by(self.pool, calls), strict=True):
                self.short[rows] = short
                done += len(rows)
                self.watch(done, len(self.by_place))

    def _bands(self, chosen: Array) -> Iterator[Array]:
        """The keys of each band, of the texts of chosen rows in order."""
        bands = self.nearness.bands()[0]
        whole = [_mapped(self._path("keys", number), bands) for number in range(len(self.files))]
        taken = [np.repeat(chosen[begin:end][self.rows[begin:end]], self.num_texts) for begin, end in self._spans()]
        for band in range(bands):
            keys = [np.asarray(file[band])[take] for file, take in zip(whole, taken, strict=True)]
            yield np.concatenate([np.empty(0, np.uint64), *keys])

    def _write_sets(self, rows: Array) -> Array:
        """Write the n-gram sets of all texts of some rows (ascending) one after the other; their sizes."""
        cuts = np.searchsorted(rows, self.firsts)
        calls = [
            (
                write_sets,
                self.files[n],
                rows[cuts[n] : cuts[n + 1]] - self.firsts[n],
                self.nearness,
                self._path("set", n),
            )
            for n in range(len(self.files))
            if cuts[n] < cuts[n + 1]
        ]
        sizes = []
        with written(self.parent), self._path("sets", 0).open("wb") as whole:
            for (*_, path), counts in zip(calls, done_by(self.pool, calls), strict=True):
                sizes.append(counts)
                with path.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
                path.unlink()
        return np.concatenate(sizes)

    def _jaccards(self, starts: Sequence[Array], counts: Sequence[Array]) -> Array:
        some = [slice(begin, begin + COMPARED_BY_ONE) for begin in range(0, len(starts[0]), COMPARED_BY_ONE)]
        path = self._path("sets", 0)
        calls = [(compare_sets, path, [s[part] for s in starts], [c[part] for c in counts]) for part in some]
        return np.concatenate([*done_by(self.pool, calls)])


def _mapped(path: Path, bands: int) -> Array:
    size = path.stat().st_size // (8 * bands)
    return np.memmap(path, np.uint64, "r", shape=(bands, size)) if size else np.empty((bands, 0), np.uint64)


# -- what a process does


def sign_file(file: TextFile, rows: Array, scope: Array | None, nearness: Nearness, path: Path) -> Array:
    """Write the band keys of some rows of a file: uint64 (bands, texts), the texts of a row side by side.

    Returns:
        bool (rows, texts): which have fewer words than an n-gram.
    """
    bands, per_band = nearness.bands()
    chosen = permutations(nearness.num_perm)[:, : bands * per_band]
    num_texts = len(file.columns)
    keys = np.empty((bands, len(rows) * num_texts), np.uint64)
    short = np.zeros((len(rows), num_texts), np.bool_)
    for first, texts in texts_of(file, rows):
        for number, name in enumerate(file.columns):
            words = hash_words(texts[name], unspaced=True)
            short[first : first + texts.height, number] = np.diff(words.offsets) < nearness.ngram
            found = band_keys(signatures(joined_words(words, nearness.ngram), chosen), bands, per_band)
            if scope is not None:
                found = found + scope[first : first + texts.height] * np.uint64(0x9E3779B97F4A7C15)
            keys[:, first * num_texts + number : (first + texts.height) * num_texts : num_texts] = found
    with path.open("wb") as out:  # no mapped file: on a full disk that would end the process
        out.write(keys.data)
    return short


def write_sets(file: TextFile, rows: Array, nearness: Nearness, path: Path) -> Array:
    """Write the n-gram sets of some rows of a file, the texts of a row one after the other; their sizes."""
    sizes = []
    with path.open("wb") as out:
        for _, texts in texts_of(file, rows):
            mixed = pl.concat([texts[name].alias("text").to_frame().with_row_index("row") for name in file.columns])
            grams = sets_of(mixed.sort("row", maintain_order=True)["text"], nearness.ngram)
            out.write(grams.hashes.tobytes())
            sizes.append(np.diff(grams.offsets))
    return np.concatenate(sizes)


def compare_sets(path: Path, starts: tuple[Array, Array], counts: tuple[Array, Array]) -> Array:
    """`jaccards` of sets in a file."""
    return jaccards(np.memmap(path, np.uint64, "r"), starts, counts)


def texts_of(file: TextFile, rows: Array) -> Iterator[tuple[int, pl.DataFrame]]:
    """The texts of some rows (ascending) of a file, some at a time, with the number of those before."""
    views = [asked(name, file.kind) if name == "prompt" else words_of(name, file.kind) for name in file.columns]
    if not len(rows):
        return
    done = begin = 0
    # pre_buffer would keep the compressed file in memory
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as whole:
        size = sum(whole.metadata.row_group(group).total_byte_size for group in file.groups)
        height = max(1, min(BATCH_ROWS, BATCH_BYTES * file.rows // max(size, 1)))
        for batch in whole.iter_batches(height, list(file.groups), list(file.columns), use_threads=False):
            end = begin + batch.num_rows
            wanted = rows[done : np.searchsorted(rows, end)] - begin
            begin = end
            if not len(wanted):
                continue
            frame = pl.DataFrame(pl.from_arrow(batch))
            frame = frame if len(wanted) == frame.height else frame[wanted]
            texts = frame.cast({PLAIN_MESSAGES: MESSAGES}).select(views)
            for some in _pieces(texts):
                yield done, some
                done += some.height


def _pieces(texts: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Some rows at a time: as many as stay in the processor's cache, and of giant ones one."""
    sizes = np.cumsum(texts.select(pl.sum_horizontal(pl.all().str.len_bytes().fill_null(0))).to_series().to_numpy())
    begin = 0
    while begin < texts.height:
        before = int(sizes[begin - 1]) if begin else 0
        full = int(np.searchsorted(sizes, before + TEXT_BYTES, side="right"))
        end = min(begin + TEXTS, max(full, begin + 1))
        yield texts.slice(begin, end - begin)
        begin = end
