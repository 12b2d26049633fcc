"""Write the pairs of a dataset, or of a file of ready-made pairs, in the layout that another trainer reads.

Comes in: a dataset directory or a source file, and the name of a format. Goes out: one file, or a directory with a
file a split and whatever the format wants beside them. The order of the pairs stays; a pair that the format cannot hold
is left out by name, listed and counted, never bent to fit. A file appears whole or not at all. A source file is taken
as it is: nothing is validated or deduplicated. Where a reference is asked for, its log-probs stand beside the texts, or
the very tokens that were scored take their place. Price: the pairs are read and written some thousand at a time.
"""

import contextlib
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import polars as pl

from prefkit.config import SourceConfig
from prefkit.detection import detect_format
from prefkit.errors import InputError
from prefkit.format import PAIRS, SPLITS, Kind
from prefkit.formats import FORMATS, WRITERS, Writer
from prefkit.formats.writing import Unwritable, Written, from_json, unpacked
from prefkit.pairs import ready_pairs
from prefkit.reference_table import Opened, open_reference
from prefkit.row_files import SUFFIXES, Put, Rows, as_line, row_file
from prefkit.scored_rows import COLUMN_TYPES, SUMS, about, scored_texts, scored_tokens
from prefkit.sources import expand, is_chat_source, read_source
from prefkit.store import atomic_path, dataset_around, read_json, read_manifest
from prefkit.tables import check_parts, table_blocks
from prefkit.text import with_pair_ids

WRITABLE = f"a file ({', '.join(SUFFIXES)}), or a name without an ending for a directory"
ROWS_AT_ONCE = 4_096

Block: TypeAlias = tuple[pl.DataFrame, Rows]  # pairs with their split, and lines that are no pair, each with its reason


class Exported(NamedTuple):
    """What `export_dataset` wrote, and what it left out."""

    files: dict[str, int]  # rows of each
    beside: list[str]  # files that go with them
    left_out: dict[str, int]  # pairs by reason, of a source file also lines that are no pair
    left_out_list: str | None  # the file that names them one by one
    both_splits: bool  # one file holds train and test
    reference: str | None = None  # key of the one whose log-probs are in them


def export_dataset(
    target: str | Path,
    to: str,
    out: str | Path,
    split: str | None = None,
    source_format: str | None = None,
    *,
    with_reference: bool = False,
    reference: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write pairs as another trainer reads them.

    Args:
        target: a dataset directory, or a source file whose rows are pairs.
        to: the format, such as trl; `list_formats` has all, those with `written`.
        out: a file by its ending (.jsonl, .jsonl.gz, .json, .parquet), or a directory for a file a split.
        split: train | test, of a dataset; None: all pairs.
        source_format: of a source file; None: found by its rows.
        with_reference: add ref_chosen_logps and ref_rejected_logps, the sums of a reference of the dataset; a format
            that is made of a reference's tokens has them anyway.
        reference: key of the reference, which says `with_reference` as well; None: the only one there is.
        overwrite: whether files that are there may be replaced.

    Returns:
        the files and their rows, and how many pairs the format could not hold, by reason.

    Raises:
        InputError: an unknown format or split, an `out` that must not be written, no pair that the format can hold, or
            no place in it for log-probs.
        DatasetError: the dataset is missing, unfinished or damaged, has no such reference, or `out` cannot be written.
        GateError: the reference's table cannot be what a reference pass has written, or several are there.
        SourceError: the source file cannot be read, or its format is not known.
        MachineError: the disk is full.

    Example:
        exported = prefkit.export_dataset("demo/dataset", "trl", "pairs.jsonl", split="train")
        print(exported.files, exported.left_out)
    """
    target, out = str(target), str(out)
    writer = _writer(to)
    is_dataset = Path(target).is_dir()
    if is_dataset and source_format is not None:
        raise InputError("--from is for a source file, and this is a directory", where=target, hint="leave --from out")
    if not is_dataset and split is not None:
        raise InputError("--split is for a dataset, and this is a file", where=target, hint="leave --split out")
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: there is no such split", where=target, expected=" or ".join(SPLITS))
    scored = with_reference or reference is not None or writer.reference == "ids"
    if scored:
        _refuse_unscored(writer, target, is_dataset=is_dataset)
    splits = SPLITS if split is None else (split,)
    as_directory = _check_out(Path(out), target, splits, is_dataset=is_dataset, overwrite=overwrite)
    opened = open_reference(target, reference) if scored else None
    if opened is not None and writer.reference == "ids":
        blocks = scored_tokens(Path(target), opened, split, Path(out).resolve().parent)
    elif opened is not None:
        blocks = scored_texts(Path(target), opened, split)
    else:
        blocks = _of_dataset(Path(target), split) if is_dataset else _of_file(target, source_format)
    return _write(blocks, writer, Path(out), target, opened, splits if as_directory else None)


def _refuse_unscored(writer: Writer, target: str, *, is_dataset: bool) -> None:
    if not writer.reference:
        have = [name for name, one in WRITERS.items() if one.reference]
        what = f"--with-reference: the format {writer.name} has no place for reference log-probs"
        raise InputError(what, where=target, expected="--to " + ", ".join(have))
    if not is_dataset:
        what = "a file has no reference: log-probs are exported from a dataset"
        raise InputError(what, where=target, hint="prefkit build, and prefkit precompute")


def _writer(to: str) -> Writer:
    if to in WRITERS:
        return WRITERS[to]
    hint = _nearest(to, WRITERS)
    raise InputError(f"--to {to}: there is no such format to write", expected=", ".join(WRITERS), hint=hint)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "prefkit formats lists them"


def _check_out(out: Path, target: str, splits: Iterable[str], *, is_dataset: bool, overwrite: bool) -> bool:
    """Whether `out` is a directory; nothing that is read, and no dataset, may be written over, and no file unasked."""
    as_directory = out.is_dir() or not out.suffix
    if not as_directory and not out.name.endswith(SUFFIXES):
        raise InputError("this kind of file is not written", where=str(out), expected=WRITABLE)
    if as_directory and out.exists() and not out.is_dir():
        raise InputError("is a file whose name does not say what to write", where=str(out), expected=WRITABLE)
    if dataset_around(out) is not None:
        raise InputError("an export cannot be written into a dataset", where=str(out), hint="--out elsewhere")
    read = set() if is_dataset else {Path(name).resolve() for name in expand(target)}
    names = [out / f"{split}.jsonl" for split in splits] if as_directory else [out]
    for name in (*names, _list_path(out), _about_path(out)):
        if name.resolve() in read:
            raise InputError("an export cannot be written over what it reads", where=str(name), hint="--out elsewhere")
    if not overwrite and (there := [str(name) for name in names if name.exists()]):
        hint = "--overwrite replaces it, --out elsewhere leaves it"
        raise InputError("is there already", where=there[0], expected="a new file", hint=hint)
    return as_directory


def _list_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.left_out.jsonl")


def _about_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.reference.json")


# where pairs come from


def _of_dataset(dataset: Path, split: str | None) -> Iterator[Block]:
    """The pairs table, some rows at a time, after all parts are checked."""
    manifest = read_manifest(dataset)
    check_parts(dataset / "pairs", manifest["parts"]["pairs"])
    frames = table_blocks(dataset, "pairs", manifest, [column.name for column in PAIRS], ROWS_AT_ONCE)
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
            prompt, chosen, rejected = (unpacked(row.get(name, "")) for name in ("prompt", "chosen", "rejected"))
            tools = from_json(row["tools"]) if row.get("tools") else None
            rows = writer.write(Written(prompt, chosen, rejected, tools, row))
        except Unwritable as error:
            named = {"pair_id": row["pair_id"], "source": row["source"], "line": row["source_row"]}
            left_out.append({**named, "reason": error.reason})
            continue
        sums = {name: row[name] for name in SUMS if name in row}
        yield row["split"], [{**one, **sums} for one in rows]


# where they go


def _write(
    blocks: Iterator[Block],
    writer: Writer,
    out: Path,
    target: str,
    opened: Opened | None,
    folder: Iterable[str] | None,
) -> Exported:
    """Write the rows, to one file or to one a split of those that a `folder` is asked to have.

    What an earlier export left goes before the new rows are in their place: else the old file of a split, or the old
    reference, would stand beside them.
    """
    as_directory = folder is not None
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
                    puts[path] = files.enter_context(row_file(path, COLUMN_TYPES))
                puts[path](rows)
                counts[path] += len(rows)
                splits[split] = path.name
        reasons = dict(Counter(one["reason"] for one in left_out).most_common())
        if not counts:
            raise _nothing_written(reasons, writer, target)
        beside = _beside(
            writer, out, {split: splits[split] for split in SPLITS if split in splits} if as_directory else {}
        )
        told = _told_before(out, opened.recorded["key"], folder) if opened is not None and folder is not None else {}
        earlier = {out / f"{split}.jsonl" for split in folder or ()} - counts.keys()
        for path in earlier | {_list_path(out), _about_path(out)}:
            path.unlink(missing_ok=True)
    written = {str(path): rows for path, rows in sorted(counts.items(), reverse=True)}  # train, then test
    if opened is not None:
        named = told | {Path(name).name: rows for name, rows in written.items()}
        beside[_about_path(out)] = json.dumps(about(opened, named), indent=2, ensure_ascii=False) + "\n"
    listed = {_list_path(out): "".join(as_line(one) + "\n" for one in left_out)} if left_out else {}
    _put_whole(beside | listed)
    name = str(_list_path(out)) if left_out else None
    both = not as_directory and len(splits) > 1
    key = None if opened is None else opened.recorded["key"]
    return Exported(written, [str(path) for path in beside], reasons, name, both, key)


def _told_before(out: Path, key: str, asked: Iterable[str]) -> dict[str, int]:
    """The files of a folder that an earlier export of other splits wrote beside the same reference, with their rows."""
    said = read_json(_about_path(out)) if _about_path(out).exists() else {}
    others = said.get("files", {}) if said.get("key") == key else {}
    ours = {f"{split}.jsonl" for split in asked}
    return {name: rows for name, rows in others.items() if name not in ours and (out / name).exists()}


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
