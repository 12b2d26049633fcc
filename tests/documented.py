"""Pages as their readers take them: the blocks of a page, the commands in them, and what they are said to print.

A page is Markdown. Executable are, without any mark of their own: indented blocks with `$ ` before a command, fenced
blocks in sh, python, yaml and sql, and fenced blocks without a language that begin with a command. What stands below a
`$ ` command is what it prints: lines of `...` stand for any lines, and what a command says of its progress before its
result may be left out; nothing else may. A comment `# exits with 1` behind a command names its exit code.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PROGRAMS = {"prefkit", "python", "duckdb", "cat", "cd", "cp", "echo", "head", "ls", "mkdir", "rm", "tail", "wc"}
SHELL = {"sh", "bash", "console", "shell"}
FENCE = re.compile(r"^( *)```(\w*)")
# what a command tells before its result
PROGRESS = re.compile(
    r"(adding|auditing|balancing|batches of|building|comparing|counting|cutting off|encoding|fitting|hashing|"
    r"looking at|reading|scoring|training on|writing) "
)
OMITTED = "..."
KEY = re.compile(r"\b[0-9a-f]{16,64}\b")
NUMBER = re.compile(r"\d+\.\d+")


class Block(NamedTuple):
    """A block of a page: the number of its first line, from 1; commands, python, yaml, sql or text; what it holds."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def name(self) -> tuple[str, str]:
        """The page and the first line: what a test calls a block by."""
        return self.page, self.text.splitlines()[0].strip()


class Command(NamedTuple):
    """A command of a block as a shell reads it, the lines below it, and the exit code that it is said to have."""

    page: str
    text: str
    shown: list[str]
    code: int

    @property
    def name(self) -> tuple[str, str]:
        """The page and the first line, without what `...` would hide."""
        return self.page, self.text.splitlines()[0].strip()

    @property
    def words(self) -> list[str]:
        """Its words, without quotes and comments."""
        return shlex.split(self.text.replace("\\\n", " "), comments=True)

    @property
    def needs_a_shell(self) -> bool:
        """Whether it pipes, redirects, joins commands or names files by a pattern."""
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", self.text)
        return re.search(r"[|&;<>()*?~$`]", re.sub(r"\s#.*", "", bare)) is not None


def blocks_of(page: str, text: str) -> list[Block]:
    """The code blocks of a Markdown page, in order."""
    lines, found, at = text.splitlines(), [], 0
    while at < len(lines):
        if fence := FENCE.match(lines[at]):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == "```")
            inside = textwrap.dedent("\n".join(lines[at + 1 : end]))
            found.append(Block(page, at + 2, _kind(fence[2], inside), inside))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            inside = textwrap.dedent("\n".join(lines[at:end])).rstrip()
            is_session = any(line.startswith("$ ") for line in inside.splitlines())
            found.append(Block(page, at + 1, "commands" if is_session else "text", inside))
            at = end
        else:
            at += 1
    return found


def _kind(language: str, inside: str) -> str:
    if language in SHELL or (not language and inside.split(maxsplit=1)[0] in {*PROGRAMS, "$"}):
        return "commands"
    return language if language in ("python", "yaml", "sql") else "text"


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block, quotes and lines that end in a backslash going on below; each with what it prints."""
    lines = block.text.splitlines()
    is_session = any(line.startswith("$ ") for line in lines)
    while lines:
        line = lines.pop(0)
        if not line.strip() or (not is_session and line.startswith("#")):
            continue
        assert line.startswith("$ ") or not is_session, f"{block.page}:{block.line}: {line!r} is no command's"
        text = line.removeprefix("$ ")
        while _goes_on(text):
            text += "\n" + lines.pop(0)
        shown: list[str] = []
        while is_session and lines and not lines[0].startswith("$ "):
            shown.append(lines.pop(0).rstrip())
        while shown and not shown[-1]:
            shown.pop()
        said = re.search(r"\s#.*\bexits with (\d+)\s*$", text)
        yield Command(block.page, text, shown, int(said[1]) if said else 0)


def _goes_on(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return text.endswith("\\")


def untrue(shown: Sequence[str], printed: str, *, exact: bool = True) -> str | None:
    """What a page shows that a command did not print; None where it is all true.

    Args:
        shown: the lines of the page.
        printed: what the command wrote.
        exact: whether keys and numbers with a point must be the very same, and not only close by: they come from
            weights that another kind of processor rounds otherwise.
    """
    lines = [line.rstrip() for line in printed.splitlines()]
    if not shown:
        return None
    stretches: list[list[str]] = [[]]
    for line in shown:
        if line.strip() == OMITTED:
            stretches.append([])
        else:
            stretches[-1].append(line)
    at = 0
    while (
        stretches[0] and at < len(lines) and PROGRESS.match(lines[at]) and not _alike(stretches[0][0], lines[at], exact)
    ):
        at += 1
    for number, stretch in enumerate(stretches):
        begins = [at] if number == 0 else range(at, len(lines) - len(stretch) + 1)
        if 0 < number == len(stretches) - 1 and stretch:  # the last ones stand at the end
            begins = begins[-1:]
        found = next((n for n in begins if _stretch_at(stretch, lines, n, exact)), None)
        if found is None:
            return _difference(stretch, lines[at:])
        at = found + len(stretch)
    if stretches[-1] and at < len(lines):
        return f"left out without a line of {OMITTED}: {lines[at]!r}"
    return None


def _stretch_at(stretch: Sequence[str], lines: Sequence[str], at: int, exact: bool) -> bool:
    here = lines[at : at + len(stretch)]
    return len(here) == len(stretch) and all(_alike(*both, exact) for both in zip(stretch, here, strict=True))


def _alike(shown: str, printed: str, exact: bool) -> bool:
    if exact or shown == printed:
        return shown == printed
    one, other = (KEY.sub("KEY", line) for line in (shown, printed))
    values = [[float(number) for number in NUMBER.findall(line)] for line in (one, other)]
    return NUMBER.sub("N", one) == NUMBER.sub("N", other) and all(
        abs(a - b) <= 0.02 + 0.1 * max(a, b) for a, b in zip(*values, strict=True)
    )


def _difference(stretch: Sequence[str], lines: Sequence[str]) -> str:
    missing = next((line for line in stretch if line not in lines), stretch[0])
    return f"not printed, or not in this place: {missing!r}\nprinted:\n" + "\n".join(lines)
