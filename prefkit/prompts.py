"""A file of prompts becomes a frame: what a model is asked, the right answer where there is one, and where it stands.

Comes in: a file or glob (rows.py says of which kinds), or a dataset, one split of which is taken. Goes out: the
prompts in the order of their file, each once and with the id that its pairs have; lines that are no prompt as rejects,
and prompts that cannot be answered as drops with a reason.
"""

import json
from pathlib import Path
from typing import NamedTuple

import polars as pl

from prefkit.checked import check_row, record_frame, reject_frame
from prefkit.detection import keys_found
from prefkit.errors import SourceError
from prefkit.format import MANIFEST, Kind, text_dtype
from prefkit.formats.reading import Columns, Format, Row, holds_messages, read_fields
from prefkit.rows import read_rows
from prefkit.sample_format import sample_schema
from prefkit.sample_settings import PromptsConfig
from prefkit.screen import screen
from prefkit.sources import SourceFile, expand, source_sha256, unchanged
from prefkit.store import read_manifest
from prefkit.tables import read_table
from prefkit.text import VISIBLE, printable, with_prompt_ids

OPTIONAL = ("reference", "tools")
ANSWERED = ("user", "tool")  # roles of a last turn that a model answers
is_chat_row = holds_messages("prompt")


class Prompts(NamedTuple):
    """`kept`, `dropped` and `rejects` are tables of sample_format.py; `rows`: those of the files that were read."""

    kept: pl.DataFrame
    dropped: pl.DataFrame
    rejects: pl.DataFrame
    rows: int
    kind: Kind
    files: list[SourceFile]


def _read(row: Row, columns: Columns) -> list[dict[str, object]]:
    return [read_fields(row, columns, ("prompt",), OPTIONAL)]


PROMPTS_FORMAT = Format(
    "prompts",
    "prompts",
    ("prompt", *OPTIONAL),
    False,
    "prompt [, reference, tools]",
    "what a model is asked, text or messages; columns: maps the names",
    _read,
    is_chat_row,
    required=("prompt",),
)


def _columns(settings: PromptsConfig) -> dict[str, str | list[str]]:
    return {str(name): path for name, path in settings.columns.items()}


def prompts_kind(settings: PromptsConfig, kind: Kind | None, *, has_template: bool) -> Kind:
    """The kind of prompts: the one that is said, or that of the dataset they are of; else by what they are.

    Args:
        settings: the prompts.
        kind: what the pipeline says.
        has_template: whether there is a chat template, so that a plain text is a user's turn.

    Returns:
        chat where the first readable prompt is messages, or there is a template; else text.
    """
    if kind is not None:
        return kind
    if is_dataset(settings):
        found: Kind = read_manifest(Path(settings.path))["kind"]
        return found
    if has_template:
        return "chat"
    rows = (row for path in expand(settings.path) for row in read_rows(path) if row.reason is None)
    first = next(rows, None)
    return "chat" if first is not None and is_chat_row(first.value, _columns(settings)) else "text"


def read_prompts(settings: PromptsConfig, kind: Kind, setting: str = "sample.prompts") -> Prompts:
    """Read and check all prompts.

    Args:
        settings: the file, the names of its columns, and how many of its rows.
        kind: what the prompts become.
        setting: that names them, for messages.

    Raises:
        SourceError: a file is missing, unreadable, or changed while it was read; or no line of it is a prompt.
        DatasetError: the dataset is unfinished or damaged.
    """
    records, rejects, files = read_texts(settings, kind)
    rows = sum(file.rows for file in files)
    known = with_prompt_ids(records, kind)
    screened = screen(known.with_columns(first=pl.col("prompt_id").is_first_distinct()), "prompts", _rules(kind))
    if screened.kept.is_empty():
        _refuse_none(settings, rows, screened.dropped, rejects, setting)
    kept, dropped = (
        frame.select(sample_schema(name, kind).names())
        for name, frame in (("prompts", screened.kept), ("dropped", screened.dropped))
    )
    return Prompts(kept, dropped, rejects, rows, kind, files)


def read_texts(settings: PromptsConfig, kind: Kind) -> tuple[pl.DataFrame, pl.DataFrame, list[SourceFile]]:
    """Every row that is a prompt, with its reference, in the order of the file; many may have one prompt.

    Args:
        settings: as in `read_prompts`.
        kind: what the prompts become.

    Returns:
        prompt, tools, reference, source and source_row of each; rejects; and what was read of each file.
    """
    if not is_dataset(settings):
        refuse_split(settings)
        return _of_files(settings, kind)
    records = _of_dataset(settings, kind)
    manifest = str(Path(settings.path) / MANIFEST)
    return records, reject_frame([]), [SourceFile(manifest, source_sha256(manifest), records.height)]


def is_dataset(settings: PromptsConfig) -> bool:
    """Whether the prompts are those of a dataset's pairs; an unfinished one is one too, and is refused as such."""
    return (Path(settings.path) / MANIFEST).exists() or (Path(settings.path) / "pairs").is_dir()


def refuse_split(settings: PromptsConfig) -> None:
    """Refuse a split of files.

    Raises:
        SourceError: there is one, and no dataset.
    """
    if settings.split is not None and not is_dataset(settings):
        expected = "the folder of a dataset, or no split:"
        raise SourceError("split is of a dataset, and this is none", where=settings.path, expected=expected)


def _rules(kind: Kind) -> dict[str, pl.Expr]:
    """Why a prompt is not answered."""
    if kind == "text":
        empty: dict[str, pl.Expr] = {"empty_prompt": ~pl.col("prompt").str.contains(VISIBLE)}
    else:
        last = pl.col("prompt").list.last()
        said = pl.col("prompt").list.eval(pl.element().struct.field("content").str.contains(VISIBLE)).list.any()
        empty = {
            "empty_prompt": ~said.fill_null(False),
            "no_user_turn_last": ~last.struct.field("role").is_in(ANSWERED).fill_null(False),
        }
    return {**empty, "duplicate": ~pl.col("first")}


def _refuse_none(
    settings: PromptsConfig, rows: int, dropped: pl.DataFrame, rejects: pl.DataFrame, setting: str
) -> None:
    frames = [frame["reason"].value_counts(sort=True) for frame in (dropped, rejects)]
    found = ", ".join(f"{count} {reason}" for reason, count in pl.concat(frames).iter_rows())
    missing = rejects.filter(pl.col("reason") == "missing_field")
    absent, hint = missing["field"].unique(maintain_order=True).to_list(), ""
    if absent:
        found += f"; no {', '.join(map(printable, absent))}: a row has {keys_found(json.loads(missing['raw'][0]))}"
        ours = {path: name for name, path in settings.columns.items()}
        hint = f"--set {setting}.columns.{ours.get(absent[0], absent[0])}=NAME says in which column it is"
    raise SourceError(
        f"none of its {rows} rows is a prompt that can be answered: {found}" if found else "holds no prompt",
        where=settings.path,
        expected="a prompt a row: text, or messages whose last turn is the user's",
        hint=hint,
    )


def _of_dataset(settings: PromptsConfig, kind: Kind) -> pl.DataFrame:
    """The prompts of a dataset's pairs of one split, each once."""
    folder = Path(settings.path)
    manifest = read_manifest(folder)
    if settings.columns or manifest["kind"] != kind:
        raise SourceError(
            "a dataset has columns and a kind of its own",
            where=settings.path,
            expected=f"kind {manifest['kind']}, and no columns:",
        )
    split = settings.split or "train"
    pairs = read_table(folder, "pairs", manifest).filter(pl.col("split") == split)
    if pairs.is_empty():
        others = "a split: section with test_share, or a file of prompts" if split == "test" else ""
        raise SourceError(f"holds no {split} pairs to take prompts of", where=settings.path, expected=others)
    unique = pairs.unique("prompt_id", keep="first", maintain_order=True)
    tools = pl.col("tools") if "tools" in unique.columns else pl.lit(None, pl.String).alias("tools")
    found = unique.select("prompt", tools, pl.lit(None, pl.String).alias("reference"), "source", "source_row")
    return found.head(settings.limit) if settings.limit else found


def _of_files(settings: PromptsConfig, kind: Kind) -> tuple[pl.DataFrame, pl.DataFrame, list[SourceFile]]:
    """Records and rejects of all files, and what was read of each."""
    records: list[dict[str, object]] = []
    rejects: list[dict[str, object]] = []
    files = []
    columns = _columns(settings)
    for path in expand(settings.path):
        with unchanged(path):
            digest, rows = source_sha256(path), 0
            for row in read_rows(path):
                if settings.limit is not None and len(records) >= settings.limit:
                    break
                rows += 1
                check_row(row, PROMPTS_FORMAT, columns, kind, path, records, rejects)
            files.append(SourceFile(path, digest, rows))
    found = record_frame(records, "prompts", kind, None) if records else _no_records(kind)
    return found, reject_frame(rejects), files


def _no_records(kind: Kind) -> pl.DataFrame:
    names = {"prompt": text_dtype(kind), "tools": pl.String, "reference": pl.String}
    return pl.DataFrame(schema={**names, "source": pl.String, "source_row": pl.Int64})
