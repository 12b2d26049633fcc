"""What every format module is made of: a row of a file in, the fields of one or more records out.

A reader is a pure function from a decoded row to plain dicts whose keys are the fields of a model in `records.py`. It
decides where the prompt ends and which side is the better one, and nothing else; types are checked afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = Mapping[str, str | list[str]]  # an empty path: the file says nothing of it
Reader: TypeAlias = Callable[[Row, Columns], list[dict[str, Any]]]
Family: TypeAlias = Literal["pairs", "candidates", "corrections", "responses", "comparisons", "prompts"]


BESIDE = frozenset({"system", "system_prompt", "context", "history", "input"})  # layouts not ours put it by a prompt
# names under which such layouts keep a question, or what goes before it
ASKED = BESIDE | {"question", "query", "instruction", "instructions", "inputs", "problem", "post", "request", "user"}
ASKED |= {"trajectory", "messages", "conversation", "conversations", "dialog", "dialogue", "turns", "prompts"}
SYSTEM_ROLES = ("system", "developer")


class Unreadable(Exception):  # noqa: N818 - it becomes a reject, not an error that anyone sees
    """A row that cannot become a record: `field` is at fault (None: the whole row), `reason` is the rule's name."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class Format(NamedTuple):
    """One outside format: its name in a pipeline, the kind of record it gives, its fields, and its reader.

    `columns`: our names that a pipeline's `columns:` may map; `required`: those of them that no record can do without;
    `scored`: whether the source may set `direction:`; `direction`: which score, rank or label is the better one, in
    words, where the format itself says so; `detect`: why a row has this layout, in words, or None where it has not (no
    `detect`: it is never guessed).
    """

    name: str
    family: Family
    columns: tuple[str, ...]
    scored: bool
    fields: str
    note: str
    read: Reader
    is_chat: Callable[[Row, Columns], bool]
    direction: str = ""
    detect: Callable[[Row], str | None] | None = None
    required: tuple[str, ...] = ()


def dig(row: Row, path: str) -> Any:
    """The value at a dotted path (`answers.0.text`); a key that holds the dots itself wins. Missing: KeyError."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise KeyError(path)
    return value


def require(row: Row, path: str) -> Any:
    """The value at a dotted path, or the reject `missing_field`."""
    try:
        return dig(row, path)
    except KeyError:
        raise Unreadable(path, "missing_field") from None


def optional_of(row: Row, columns: Columns, name: str) -> Any:
    """What a row says of a field that it may lack: None where it says nothing, as an empty cell of a .csv does.

    A path that `columns:` names must be there; an empty one leaves out what the row has under the field's own name.
    """
    where = columns.get(name)
    value = row.get(name) if where is None else None if where == "" else require(row, str(where))
    return None if isinstance(value, str) and value == "" else value


def read_fields(row: Row, columns: Columns, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """The fields of a record under our names; optional ones where the row says something."""
    record = {
        name: prompt_of(row, columns) if name == "prompt" else require(row, str(columns.get(name, name)))
        for name in required
    }
    given = {name: optional_of(row, columns, name) for name in optional}
    return record | {name: value for name, value in given.items() if value is not None}


def prompt_of(row: Row, columns: Columns) -> Any:
    """The prompt at its path, or the texts at its paths, a line each (Alpaca's instruction and input).

    Texts that are empty are left out of the several. The column that `columns:` calls system becomes its first turn.
    """
    where = columns.get("prompt", "prompt")
    if not isinstance(where, list):
        return with_system(require(row, where), *system_of(row, columns))
    parts = [require(row, path) for path in where]
    if wrong := next((path for path, part in zip(where, parts, strict=True) if not isinstance(part, str | None)), None):
        raise Unreadable(wrong, "wrong_type")
    return with_system("\n".join(part for part in parts if part), *system_of(row, columns))


def system_of(row: Row, columns: Columns) -> tuple[Any, str]:
    """The system prompt of a row and its path; only `columns:` can say where it is.

    A column of that name is not taken for one: in a table of machine translations it is the program that made them.
    """
    where = str(columns.get("system", ""))
    return (require(row, where) if where else None), where


def with_system(prompt: Any, system: Any, field: str) -> Any:
    """A prompt with its system prompt as the first turn; that of a conversation which has one already stays.

    Example: `with_system("Hi", "Be brief.", "system")` gives a system turn "Be brief." and a user turn "Hi".

    Raises:
        Unreadable: the system prompt is no text.
    """
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise Unreadable(field, "wrong_type")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(turns, list) or (isinstance(first, Mapping) and first.get("role") in SYSTEM_ROLES):
        return prompt
    return [{"role": "system", "content": system}, *turns]


def says_more(row: Row, names: frozenset[str]) -> bool:
    """Whether a row has a column of one of these names, in upper or lower case."""
    return any(name.casefold() in names for name in row)


def holds_messages(*names: str) -> Callable[[Row, Columns], bool]:
    """Whether one of the fields of a row is a list of messages, or `columns:` names a system prompt beside them.

    A system prompt makes messages of the prompt; as the first row may lack one, its column decides.
    """
    return lambda row, columns: bool(columns.get("system")) or any(is_chat_field(row, columns, name) for name in names)


def is_chat_field(row: Row, columns: Columns, name: str, *, of_list: bool = False) -> bool:
    """Whether a field (of a list of values: its first) holds messages."""
    where = columns.get(name, name)
    try:
        value = dig(row, where if isinstance(where, str) else where[0])
    except KeyError:
        return False
    if of_list and isinstance(where, str):
        value = value[0] if isinstance(value, list) and value else None
    return isinstance(value, list)
