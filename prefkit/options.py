"""The options that several commands have."""

import json
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(help="A dataset directory, or a pipeline file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="section.key=value", help="Change a setting; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Model = Annotated[str | None, typer.Option("--model", help="Model folder; otherwise the pipeline's.")]


def changed(changes: list[str] | None, **options: object) -> list[str]:
    """`--set` changes, with options that are short for one."""
    named = [
        f"{key.replace('__', '.')}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    return [*(changes or []), *named]
