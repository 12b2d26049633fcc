"""Generate schemas/: JSON Schema of every record and document, and the pages of what lies on disk (`make schemas`)."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from prefkit import format as disk
from prefkit import sample_format
from prefkit.config import Pipeline
from prefkit.documents import DOCUMENTS
from prefkit.formats import list_formats
from prefkit.records import RECORDS, Message
from prefkit.store import write_text


def schema_files() -> dict[str, str]:
    """File name to content of everything in schemas/."""
    singular = {name.removesuffix("s"): record for name, record in RECORDS.items()}
    models: dict[str, type[BaseModel]] = {"message": Message, **singular, "pipeline": Pipeline, **DOCUMENTS}
    schemas = {f"{name}.schema.json": model.model_json_schema(by_alias=True) for name, model in models.items()}
    texts = {name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in schemas.items()}
    pages = {"FORMAT.md": format_page(), "FORMATS.md": formats_page(), "CANDIDATES.md": candidates_page()}
    return {**texts, **pages}


def format_page() -> str:
    """FORMAT.md: the tree of a dataset, and the columns of every table."""
    lines = [
        "# The dataset on disk",
        "",
        f"Format version {disk.FORMAT_VERSION}. Any Parquet reader opens a dataset without prefkit.",
        "",
        *_tree(disk.__doc__),
        "",
        "`pair_id` and `prompt_id` are sha256 hex over the JSON (sorted keys, no spaces, no escapes) of",
        "`[kind, prompt, chosen, rejected]` and `[kind, prompt]`, over the exact text or messages; the text of `tools`",
        "follows where there are some. `<key>`: the first 16 hex digits of sha256 over the JSON of `identity` in",
        "reference.json.",
        "",
        f"`extra` of a message is null or a JSON object of {', '.join(disk.EXTRA_KEYS)}; in a dataset in which no",
        "message has any, messages have role and content alone.",
    ]
    return "\n".join([*lines, *_tables(disk.TABLES)]) + "\n"


def candidates_page() -> str:
    """CANDIDATES.md: the same of sampled and scored candidates."""
    lines = [
        "# Candidates on disk",
        "",
        f"Version {sample_format.SAMPLE_VERSION}. What `prefkit sample` and `prefkit score` write.",
        "",
        *_tree(sample_format.__doc__),
        "",
        "`scored/*.parquet` of several scorers are one table. `prompt_id` is that of a dataset (FORMAT.md).",
    ]
    return "\n".join([*lines, *_tables(sample_format.SAMPLE_TABLES)]) + "\n"


def _tree(doc: str | None) -> list[str]:
    """The drawing in a module's docstring."""
    drawn = (doc or "").split("\n\n")[1]
    return ["```", *(line.removeprefix("    ") for line in drawn.splitlines()), "```"]


def _tables(tables: Mapping[str, tuple[disk.Column, ...]]) -> Iterator[str]:
    for table, columns in tables.items():
        yield from ("", f"## {table}", "", "| column | type | |", "|---|---|---|")
        for column in columns:
            name = disk.TEXT_OR_MESSAGES if column.dtype is None else _dtype_name(str(column.dtype))
            cells = [f"`{column.name}`", name, column.doc]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def formats_page() -> str:
    """FORMATS.md: every outside format that is read or written."""
    lines = [
        "# Formats",
        "",
        "What a source may have (`format:` in a pipeline) and what `prefkit export --to` writes. *found*: by the rows,",
        "where `format:` is left out. *log-probs*: `--with-reference` adds `ref_chosen_logps` and `ref_rejected_logps`",
        "(sums), or the format is made of the scored tokens (ids) and has them. *columns*: the fields whose names",
        "`columns:` may map to those of the file; a format without any has its own names. `system` is a system prompt",
        "beside the prompt.",
        "",
        "| format | read | found | written | log-probs | records | fields | columns | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, told in list_formats().items():
        marks = ["yes" if told[key] else "" for key in ("read", "detected", "written")]
        note = told["note"] + (f"; {told['direction']}" if told["direction"] else "")
        cells = [f"`{name}`", *marks, told["reference"], told["records"] or "", told["fields"]]
        cells += [", ".join(told["columns"]), note]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _dtype_name(dtype: str) -> str:
    return {"List(Int32)": "list<int32>", "List(Float32)": "list<float32>"}.get(dtype, dtype.lower())


def main(folder: str) -> None:
    """Write all files into a folder."""
    for name, text in schema_files().items():
        write_text(Path(folder) / name, text)


if __name__ == "__main__":
    main(sys.argv[1])
