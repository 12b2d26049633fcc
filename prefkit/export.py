"""Write the pairs of a dataset, or of a file of ready-made pairs, in the layout that another trainer reads.

Comes in: a dataset directory or a source file, and the name of a format. Goes out: one file, or a directory with a
file a split and whatever the format wants beside them. The order of the pairs stays; a pair that the format cannot hold
is left out by name, listed and counted, never bent to fit. A file appears whole or not at all. A source file is taken
as it is: nothing is validated or deduplicated. Price: JSON is written as the pairs are read, a dataset part at a time;
Parquet gathers its rows in memory, as its schema is known only at the end.
"""

import contextlib
import difflib
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from prefkit.config import SourceConfig
from prefkit.detection import detect_format
from prefkit.errors import InputError
from prefkit.format import MANIFEST, Kind
from prefkit.formats import FORMATS, WRITERS, Writer
from prefkit.formats.writing import Unwritable, Written, from_json, unpacked
from prefkit.pairs import ready_pairs
from prefkit.records import LONE_SURROGATE
from prefkit.sources import expand, is_chat_source, read_source
from prefkit.store import atomic_path, read_manifest
from prefkit.tables import check_parts
from prefkit.text import with_pair_ids

SPLITS = ("train", "test")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
WRITABLE = f"a file ({', '.join(SUFFIXES)}), or a name without an ending for a directory"
OPEN_KEYS = ("arguments", "tools")  # objects without fixed fields: Arrow would give each row the fields of all others

Rows: TypeAlias = list[dict[str, Any]]
Put: TypeAlias = Callable[[Rows], None]
Block: TypeAlias = tuple[pl.DataFrame, Rows]  # pairs with their split, and lines that are no pair, each with its reason


class Exported(NamedTuple):
    """What an export wrote, and what it left out.

    `files`: name -> rows; `beside`: files that go with them; `left_out`: reason -> pairs (of a source file also lines
    that are no pair), which `left_out_list` names one by one; `both_splits`: one file holds train and test.
    """

    files: dict[str, int]
    beside: list[str]
    left_out: dict[str, int]
    left_out_list: str | None
    both_splits: bool


def export_dataset(
    target: str,
    to: str,
    out: str,
    split: str | None = None,
    source_format: str | None = None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write pairs in the format `to`.

    Args:
        target: a dataset directory, or a source file whose rows are pairs.
        to: a name of formats.WRITERS.
        out: a file by its ending (.jsonl, .jsonl.gz, .json, .parquet), or a directory for a file a split.
        split: train | test, of a dataset; None: all pairs.
        source_format: of a source file; None: found by its rows.
        overwrite: whether files that are there may be replaced.

    Raises:
        InputError: an unknown format or split, an `out` that must not be written, or no pair that the format can hold.
        DatasetError: the dataset is missing, unfinished or damaged, or `out` cannot be written.
        SourceError: the source file cannot be read, or its format is not known.
        MachineError: the disk is full.
    """
    writer = _writer(to)
    is_dataset = Path(target).is_dir()
    if is_dataset and source_format is not None:
        raise InputError("--from is for a source file, and this is a directory", where=target, hint="leave --from out")
    if not is_dataset and split is not None:
        raise InputError("--split is for a dataset, and this is a file", where=target, hint="leave --split out")
    blocks = _of_dataset(Path(target), split) if is_dataset else _of_file(target, source_format)
    as_directory = _check_out(Path(out), target, is_dataset=is_dataset, overwrite=overwrite)
    return _write(blocks, writer, Path(out), target, as_directory=as_directory)


def _writer(to: str) -> Writer:
    if to in WRITERS:
        return WRITERS[to]
    hint = _nearest(to, WRITERS)
    raise InputError(f"--to {to}: there is no such format to write", expected=", ".join(WRITERS), hint=hint)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "prefkit formats lists them"


def _check_out(out: Path, target: str, *, is_dataset: bool, overwrite: bool) -> bool:
    """Whether `out` is a directory; nothing that is read, and no dataset, may be written over, and no file unasked."""
    as_directory = out.is_dir() or not out.suffix
    if not as_directory and not out.name.endswith(SUFFIXES):
        raise InputError("this kind of file is not written", where=str(out), expected=WRITABLE)
    if as_directory and out.exists() and not out.is_dir():
        raise InputError("is a file whose name does not say what to write", where=str(out), expected=WRITABLE)
    own = [Path(target).resolve()] if is_dataset else []
    own += [folder for folder in (out.resolve(), *out.resolve().parents) if _is_dataset(folder)]
    if any(out.resolve().is_relative_to(folder) for folder in own):
        raise InputError("an export cannot be written into a dataset", where=str(out), hint="--out elsewhere")
    read = set() if is_dataset else {Path(name).resolve() for name in expand(target)}
    names = [out / f"{split}.jsonl" for split in SPLITS] if as_directory else [out]
    for name in (*names, _list_path(out)):
        if name.resolve() in read:
            raise InputError("an export cannot be written over what it reads", where=str(name), hint="--out elsewhere")
    if not overwrite and (there := [str(name) for name in names if name.exists()]):
        hint = "--overwrite replaces it, --out elsewhere leaves it"
        raise InputError("is there already", where=there[0], expected="a new file", hint=hint)
    return as_directory


def _is_dataset(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / "pairs").is_dir()


def _list_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.left_out.jsonl")


# where pairs come from


def _of_dataset(dataset: Path, split: str | None) -> Iterator[Block]:
    """The pairs table, part by part, after all parts are checked."""
    manifest = read_manifest(dataset)
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: there is no such split", expected=" or ".join(SPLITS))
    parts = manifest["parts"]["pairs"]
    check_parts(dataset / "pairs", parts)
    frames = (pl.read_parquet(dataset / "pairs" / part["file"], glob=False) for part in parts)
    return ((frame if split is None else frame.filter(pl.col("split") == split), []) for frame in frames)


def _of_file(path: str, source_format: str | None) -> Iterator[Block]:
    """The pairs of a source file, block by block, as one train split."""
    if source_format is not None and source_format not in FORMATS:
        hint = _nearest(source_format, FORMATS)
        raise InputError(f"--from {source_format}: there is no such format to read", hint=hint)
    form = FORMATS[source_format or detect_format(path).format]
    if form.family != "pairs":
        what = f"rows of format {form.name} are {form.family}, and only pairs are exported"
        raise InputError(what, where=path, hint="prefkit build makes pairs of them; export its dataset")
    source = SourceConfig(path=path, format=form.name)
    kind: Kind = "chat" if is_chat_source(source) else "text"
    for block in read_source(source, kind):
        pairs = with_pair_ids(ready_pairs(block.records, "higher_is_better"), kind)
        unread = block.rejects.select("source", "line", "field", "reason").to_dicts()
        yield pairs.with_columns(split=pl.lit("train")), unread


def _translate(pairs: pl.DataFrame, writer: Writer, left_out: Rows) -> Iterator[tuple[str, Rows]]:
    """The split and the rows of each pair that the format can hold; the others are added to `left_out`."""
    for row in pairs.iter_rows(named=True):
        try:
            prompt, chosen, rejected = (unpacked(row[name]) for name in ("prompt", "chosen", "rejected"))
            tools = from_json(row["tools"]) if row.get("tools") else None
            yield row["split"], writer.write(Written(prompt, chosen, rejected, tools, row))
        except Unwritable as error:
            named = {"pair_id": row["pair_id"], "source": row["source"], "line": row["source_row"]}
            left_out.append({**named, "reason": error.reason})


# where they go


def _write(blocks: Iterator[Block], writer: Writer, out: Path, target: str, *, as_directory: bool) -> Exported:
    left_out: Rows = []
    counts: Counter[Path] = Counter()
    splits: dict[str, str] = {}
    with contextlib.ExitStack() as files:
        puts: dict[Path, Put] = {}
        for pairs, unread in blocks:
            left_out += unread
            for split, rows in _translate(pairs, writer, left_out):
                path = out / f"{split}.jsonl" if as_directory else out
                if path not in puts:
                    puts[path] = files.enter_context(_opened(path))
                puts[path](rows)
                counts[path] += len(rows)
                splits[split] = path.name
        reasons = dict(Counter(one["reason"] for one in left_out).most_common())
        if not counts:
            raise _nothing_written(reasons, writer, target)
        beside = _beside(
            writer, out, {split: splits[split] for split in SPLITS if split in splits} if as_directory else {}
        )
    _put_whole(beside)
    _list_path(out).unlink(missing_ok=True)  # of an earlier export
    listed = {_list_path(out): "".join(_as_json(one) + "\n" for one in left_out)} if left_out else {}
    _put_whole(listed)
    written = {str(path): rows for path, rows in sorted(counts.items(), reverse=True)}  # train, then test
    name = str(_list_path(out)) if left_out else None
    return Exported(written, [str(path) for path in beside], reasons, name, not as_directory and len(splits) > 1)


def _put_whole(texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _nothing_written(reasons: Mapping[str, int], writer: Writer, target: str) -> InputError:
    if not reasons:
        return InputError("there are no pairs to export", where=target)
    named = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return InputError(f"{writer.name} can hold none of the pairs: {named}", where=target, hint="another --to")


def _beside(writer: Writer, out: Path, names: Mapping[str, str]) -> dict[Path, str]:
    """The files that go with the exported ones; what is there already must be the same."""
    if writer.beside is None or not names:
        return {}
    texts = {out / name: text for name, text in writer.beside(names).items()}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            hint = "--out elsewhere, and copy its entries by hand"
            raise InputError("is there already, and says something else", where=str(path), hint=hint)
    return texts


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Put]:
    """A function that adds rows to a file, which is in its place when the block has ended well."""
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            gathered: Rows = []
            yield gathered.extend
            _write_parquet(gathered, temporary, path)
            return
        packed = path.suffix == ".gz"
        with contextlib.ExitStack() as files:
            raw = files.enter_context(temporary.open("wb"))
            # neither name nor time in its header: the same pairs give the same bytes
            stream = files.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if packed else raw
            text = files.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))
            before = chain(["[\n"], repeat(",\n")) if path.suffix == ".json" else repeat("")
            after = "" if path.suffix == ".json" else "\n"
            yield lambda rows: text.writelines(f"{next(before)}{_as_json(row)}{after}" for row in rows)
            text.write("\n]\n" if path.suffix == ".json" else "")


def _as_json(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return json.dumps(row) if LONE_SURROGATE.search(text) else text  # half a character has no UTF-8


def _write_parquet(rows: Rows, temporary: Path, path: Path) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        columns = {name: pa.array([_for_columns(row.get(name), name) for row in rows]) for name in names}
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the rows fit no one schema: {reason}", where=str(path), hint="--out FILE.jsonl") from None


def _for_columns(value: Any, name: str) -> Any:
    """A value as a column can hold it: what has no fixed fields becomes JSON text."""
    if isinstance(value, (dict, list)) and name in OPEN_KEYS:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return {key: _for_columns(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_for_columns(inner, "") for inner in value]
    return value
