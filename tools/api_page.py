"""Write docs/api.md: every public name of prefkit with its signature and docstring, in the order of the road.

Comes in: the installed package. Goes out: plain Markdown, the same bytes for the same package. Docstrings are read by
griffe (Google style); types are those that the package has at run time, with their aliases resolved.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from pydantic import BaseModel

import prefkit
from prefkit import errors

PLAIN: dict[Any, str] = {None: "None", type(None): "None", Ellipsis: "...", Any: "Any", typing.Literal: "Literal"}
# every name of prefkit.__all__ but the errors, in the order of the road
ROAD: dict[str, tuple[str, ...]] = {
    "Settings": ("load_pipeline", "pipeline_of", "Pipeline"),
    "Sample": ("sample_candidates", "Sampled"),
    "Score": ("score_candidates", "ScoredBy"),
    "Build": ("build_dataset", "Built", "list_formats"),
    "Audit": ("audit_dataset", "Audited", "Finding", "enforce_audit"),
    "Show and repair": ("show_pairs", "Shown", "repair_dataset", "Repaired"),
    "Precompute": ("estimate_reference", "Estimated", "precompute_reference", "Precomputed"),
    "Train": ("train_dpo", "Trained"),
    "Evaluate": ("evaluate_model", "Evaluated"),
    "The whole road and sweeps": ("run_pipeline", "RunThrough", "sweep_pipeline", "Swept", "Outcome", "Spectator"),
    "Read a dataset": ("open_dataset", "Dataset", "DatasetAudit", "DatasetReference", "DatasetRun"),
    "Query": ("query_dataset", "write_query", "list_views"),
    "Look at datasets and runs": ("dataset_info", "read_runs", "Curves", "write_run_page", "RunPage"),
    "Export": ("export_dataset", "Exported"),
    "In a training loop of your own": ("torch_dataset", "torch_stream", "PairCollator", "PairDataset", "PairStream"),
    "Demo": ("run_demo",),
}
HEAD = """# The Python API

Generated from the docstrings by `make docs`. [python.md](python.md) is the way in, with recipes.

Each command is one call, and each name below is imported from `prefkit` (`import prefkit` itself loads nothing heavy).
Where a call takes a `target`, that is a dataset directory, a pipeline file or a loaded `Pipeline`; `changes` are
settings by their dotted keys, `{"train.beta": 0.05}`, as `--set` takes them on the command line. `tell` is called with
lines for a person, `watch` with how far the work is; both are silent by default. The examples begin with
`import prefkit` and run, in their order, beside the dataset that `prefkit demo` makes.
"""


def api_page() -> str:
    """The whole page."""
    blocks = [HEAD, "\n".join(contents())]
    for title, names in ROAD.items():
        blocks.append(f"## {title}")
        for name in names:
            blocks += entry(name, getattr(prefkit, name))
    return "\n\n".join(block.strip("\n") for block in [*blocks, *errors_section()]) + "\n"


def contents() -> Iterator[str]:
    """A line a section."""
    for title, names in ROAD.items():
        yield f"* [{title}](#{anchor(title)}): " + ", ".join(f"[`{name}`](#{anchor(name)})" for name in names)
    yield "* [Errors](#errors)"


def anchor(heading: str) -> str:
    """What a forge makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def entry(name: str, value: Any) -> Iterator[str]:
    """The blocks of one name."""
    yield f"### {name}"
    if inspect.isfunction(value):
        yield code(f"prefkit.{name}{signature(value)}")
        yield from docstring(value)
        return
    yield from docstring(value)
    if issubclass(value, BaseModel):
        yield from fields_of_model(value)
    elif issubclass(value, tuple):
        yield "\n".join(fields_of_tuple(value))
    else:
        yield "\n".join(members(value))


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```"


# types, as a reader writes them


def hints(value: Any) -> dict[str, str]:
    """The type of each parameter or field, and of the result (`return`)."""
    return {name: as_text(hint) for name, hint in typing.get_type_hints(value).items()}


def as_text(hint: Any) -> str:
    """A type in the words of its source, without modules but for `pl`; the same in every version of Python."""
    origin, inside = typing.get_origin(hint), [*map(as_text, typing.get_args(hint))]
    if isinstance(hint, list):  # the parameters of a Callable
        return f"[{', '.join(map(as_text, hint))}]"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(inside)
    if origin is typing.Annotated:
        return inside[0]
    if origin is not None:
        return f"{as_text(origin)}[{', '.join(inside)}]"
    return PLAIN.get(hint) or name_of(hint)


def name_of(kind: Any) -> str:
    """The name of a type, and of a value in a Literal its source."""
    if isinstance(kind, str):
        return repr(kind)
    return f"pl.{kind.__name__}" if kind.__module__.startswith("polars.") else str(kind.__name__)


def signature(function: Any) -> str:
    """Names and defaults; what is called has `...` for a default. A long one has a line an argument."""
    parts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        stars = "*" * ((parameter.kind is parameter.VAR_POSITIONAL) + 2 * (parameter.kind is parameter.VAR_KEYWORD))
        default = parameter.default
        shown = "" if default is parameter.empty else "=..." if inspect.isfunction(default) else f"={default!r}"
        parts.append(f"{stars}{parameter.name}{shown}")
    result = f" -> {hints(function)['return']}"
    short = f"({', '.join(parts)}){result}"
    return short if len(short) < 90 else "(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


# docstrings


def sections(value: Any) -> list[Any]:
    """A docstring, parsed."""
    return [*griffe.Docstring(inspect.getdoc(value) or "", lineno=1).parse("google", warnings=False)]


def docstring(value: Any) -> Iterator[str]:
    """The sections of a docstring as Markdown."""
    told = hints(value)
    for section in sections(value):
        kind = section.kind.value
        if kind == "text":
            yield section.value
        elif kind == "parameters":
            listed = (f"* `{one.name}` (`{told[one.name]}`): {on_one_line(one.description)}" for one in section.value)
            yield "\n".join(["**Args**", "", *listed])
        elif kind == "returns":
            what = on_one_line(" ".join(one.description for one in section.value))
            yield f"**Returns** `{told['return']}`: {what}"
        elif kind == "raises":
            listed = (f"* `{one.annotation}`: {on_one_line(one.description)}" for one in section.value)
            yield "\n".join(["**Raises**", "", *listed])
        elif kind == "admonition" and section.value.kind == "example":
            yield code(section.value.contents)
        elif kind != "attributes":  # those stand with the members
            raise SystemExit(f"a section of kind {kind} has no form on the page: {section.value}")


def on_one_line(text: str) -> str:
    """Without its line breaks."""
    return " ".join(text.split())


# what a type has


def fields_of_tuple(kind: Any) -> Iterator[str]:
    """A field a line, with the comment that stands behind it in the source."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(kind), re.MULTILINE))
    for name, hint in hints(kind).items():
        yield f"* `.{name}` (`{hint}`)" + (f": {comments[name]}" if name in comments else "")


def fields_of_model(kind: type[BaseModel]) -> Iterator[str]:
    """A key a line, with its description or that of its section."""
    lines = []
    for name, field in kind.model_fields.items():
        inside = [one for one in (field.annotation, *typing.get_args(field.annotation)) if inspect.isclass(one)]
        section = next((one for one in inside if issubclass(one, BaseModel)), None)
        told = field.description or (on_one_line(sections(section)[0].value) if section else "")
        lines.append(f"* `.{name}` (`{as_text(field.annotation)}`): {told}")
    yield "\n".join(lines)
    yield "[schemas/pipeline.schema.json](../schemas/pipeline.schema.json) has every key with its default."


def members(kind: Any) -> Iterator[str]:
    """Attributes, properties and methods in the order of the source, with what they raise."""
    told = hints(kind)
    for section in sections(kind):
        for one in section.value if section.kind.value == "attributes" else []:
            yield f"* `.{one.name}` (`{told[one.name]}`): {on_one_line(one.description)}"
    for name, member in vars(kind).items():
        if name.startswith("_") or not (isinstance(member, property) or inspect.isfunction(member)):
            continue
        function: Any = member.fget if isinstance(member, property) else member
        call = (
            "" if isinstance(member, property) else f"({', '.join(list(inspect.signature(function).parameters)[1:])})"
        )
        first, *rest = sections(function)
        yield f"* `.{name}{call}` (`{hints(function)['return']}`): {on_one_line(first.value)}"
        for section in rest:
            for one in section.value:
                what = f"raises `{one.annotation}`" if section.kind.value == "raises" else f"`{one.name}`"
                yield f"    * {what}: {on_one_line(one.description)}"


def errors_section() -> Iterator[str]:
    """The tree of the docstring, and what each error says."""
    yield "## Errors"
    yield "All that prefkit raises on purpose, with the exit code that each kind ends a command with:"
    tree = (errors.__doc__ or "").split("\n\n")[1]
    yield "\n".join(["```", *(line.removeprefix("    ") for line in tree.splitlines()), "```"])
    yield (
        "`message` says what is wrong, `where` names file, line, row or field, `expected` what would have been right,\n"
        "`hint` the next command to type; `as_dict()` has them for programs."
    )
    lines = ("try:", '    prefkit.open_dataset("nowhere")', "except prefkit.PrefkitError as error:")
    yield code("\n".join([*lines, "    print(error.message, error.where, error.hint)"]))
    named = (name for name in vars(errors) if name in prefkit.__all__)
    yield "\n".join(f"* `{name}`: {on_one_line(inspect.getdoc(getattr(errors, name)) or '')}" for name in named)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(api_page(), encoding="utf-8")
    else:
        sys.stdout.write(api_page())
