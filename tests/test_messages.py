"""Every message that prefkit can end with: asserted as text by some test, placed, and whole wherever it is carried to.

The first half reads the source: each construction of an error is found by ast, and every longer piece of fixed text of
its message, of its `expected` and of its `hint` must stand in a string literal of some other test file.
"""

import ast
import copy
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prefkit import cli, errors
from prefkit.errors import (
    AuditError,
    CheckError,
    ConfigError,
    DatasetError,
    GateError,
    InputError,
    Interrupted,
    MachineError,
    ModelError,
    PrefkitError,
    SourceError,
)

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
PACKAGE = REPOSITORY / "prefkit"
LONG_ENOUGH = 8  # characters of a piece of a message that no other text of a test holds by chance


def kinds_below(kind: type[PrefkitError]) -> list[type[PrefkitError]]:
    return [kind, *(inner for direct in kind.__subclasses__() for inner in kinds_below(direct))]


TREE = {kind.__name__: kind for kind in kinds_below(PrefkitError)}

# Sites without `where` whose text names no setting either, by a piece of the message, with the reason why nobody misses
# a place in them.
NO_PLACE = {
    "interrupted; what is finished is on disk": "the place is the command, and the hint repeats it",
    "is not set": "the message begins with the name of the setting",
    "out of memory": "the machine as a whole; of a single pair, the caller adds the model",
    "the tokenizer has no chat template": "the caller adds the model's folder; tests read it there",
    ": no template": "the message begins with the name of the setting",
    "the tokenizer has no eos_token": "the caller adds the model's folder (errors.located); a test reads it there",
    "log-probs are not finite": "likewise",
    "has no gradient checkpointing": "likewise",
    "takes its dropout from its config in train mode": "likewise",
    "rules.function": "the caller adds the file and row of the response; a test reads it there",
    "the loss is not finite at step": "the caller adds the run's directory; a test reads it there",
    "the gradient is not finite at step": "likewise",
    "the evaluation at step": "likewise",
    "another process": "the process is the place",
    "a path cannot be a value of type": "the place is the call",
}


# the messages, by ast


class Site(NamedTuple):
    """One place in the source that makes a message: its parts as lists of fixed pieces, longest first.

    `constant`: the parts without anything but fixed text.
    """

    place: str
    file: str
    kind: str
    parts: dict[str, list[str]]
    constant: frozenset[str]
    has_where: bool


class Scope(NamedTuple):
    """What the names of a function may stand for: its own assignments over those of the module."""

    assigned: Mapping[str, list[ast.expr]]
    known: frozenset[str] = frozenset()


def assignments(body: ast.AST) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(body):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _sets(node) else []  # type: ignore[attr-defined]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                found.setdefault(target.id, []).append(value)
    return found


def _sets(node: ast.AST) -> bool:
    return isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr))


def pieces(node: ast.expr | None, scope: Scope) -> Iterator[str]:
    """The fixed text in an expression; a plain name is followed to what was assigned to it."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            for value in values:
                yield from pieces(value, scope)
        case ast.FormattedValue(value=value):
            yield from pieces(value, scope)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from pieces(left, scope)
            yield from pieces(right, scope)
        case ast.IfExp(body=body, orelse=orelse):
            yield from pieces(body, scope)
            yield from pieces(orelse, scope)
        case ast.BoolOp(values=values):
            for value in values:
                yield from pieces(value, scope)
        case ast.Dict(values=values):
            for value in values:
                yield from pieces(value, scope)
        case ast.Subscript(value=ast.Name() as name):
            yield from pieces(name, scope)
        case ast.Name(id=name) if name not in scope.known:
            inner = Scope(scope.assigned, scope.known | {name})
            for value in scope.assigned.get(name, []):
                yield from pieces(value, inner)
        case _:
            return


def longest_first(texts: Iterator[str]) -> list[str]:
    """The lines of the pieces that say something, longest first."""
    lines = {line.strip(" ") for text in texts for line in text.split("\n")}
    return sorted((line for line in lines if re.search("[A-Za-z]{2}", line)), key=lambda line: (-len(line), line))


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


@cache
def parsed(path: Path) -> ast.Module:
    """A file of Python, read once for all tests: there are many, and each test walks them."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[tuple[ast.AST, Scope]]:
    """Every function of a module with what its names stand for; the module itself last, without its functions."""
    outer = assignments(ast.Module([n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))], []))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, Scope(outer | assignments(node))


def sites_of(path: Path) -> list[Site]:
    """The errors that a module makes: those of the tree, rejects, what pydantic is told, and a validator's words."""
    tree, file = parsed(path), str(path.relative_to(REPOSITORY))
    found: dict[int, Site] = {}
    for function, scope in functions(tree):
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            arguments = {k.arg: k.value for k in node.keywords if k.arg}
            parts: dict[str, ast.expr]
            if name in TREE:
                parts = {"message": node.args[0]} | {k: v for k, v in arguments.items() if k in ("expected", "hint")}
            elif name == "ValueError" and path.name.endswith(("settings.py", "sections.py")):
                parts = {"message": node.args[0]}
            elif name == "Unreadable":
                parts = {"reason": node.args[1]}
            elif name == "PydanticCustomError":
                parts = {"reason": node.args[0]}
            else:
                continue
            fixed = {part: longest_first(pieces(value, scope)) for part, value in parts.items()}
            constant = frozenset(part for part, value in parts.items() if isinstance(value, ast.Constant))
            placed = "where" in arguments or name not in TREE
            at = id(node)  # an inner function is walked twice; its own scope comes last and knows more
            found[at] = Site(f"{file}:{node.lineno}", file, name, fixed, constant, placed)
    return list(found.values())


@cache
def sites() -> list[Site]:
    return [site for path in sorted(PACKAGE.rglob("*.py")) if path.name != "errors.py" for site in sites_of(path)]


@cache
def known_texts() -> list[str]:
    """The string literals of all other test files but docstrings; of a pattern also what it matches, roughly."""
    found: set[str] = set()
    for path in sorted(TESTS.glob("test_*.py")):
        if path == Path(__file__):
            continue
        tree = parsed(path)
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in told}
        found |= {text for text in texts if isinstance(text, str)}
    return sorted(found | {re.sub(r"\\([^A-Za-z0-9\n])", r"\1", text) for text in found})


def is_asserted(piece: str, texts: list[str]) -> bool:
    """A long piece stands somewhere in a literal; a short one is all of it, or stands there as a whole message."""
    if len(piece) >= LONG_ENOUGH:
        return any(piece in text for text in texts)
    whole = re.compile(rf"(^|: ){re.escape(piece)}($|\n)")
    return any(whole.search(text) for text in texts)


def unasserted(part: str) -> list[str]:
    texts = known_texts()
    asked = [
        (site, piece)
        for site in sites()
        for piece in site.parts.get(part, [])
        if len(piece) >= LONG_ENOUGH or part in site.constant
    ]
    return [f"{site.place}: {piece!r}" for site, piece in asked if not is_asserted(piece, texts)]


def test_the_source_is_read_as_it_should_be() -> None:
    """Floors, lest a change of style leave the tests below without anything to check."""
    by_kind = {kind: sum(site.kind == kind for site in sites()) for kind in {site.kind for site in sites()}}
    assert by_kind["ModelError"] >= 20
    assert by_kind["DatasetError"] >= 20
    assert by_kind["ConfigError"] >= 10
    assert by_kind["SourceError"] >= 10
    assert by_kind["Unreadable"] >= 10
    assert by_kind["ValueError"] >= 4
    assert len(known_texts()) > 1500
    raised = re.compile(rf"\b(?:raise|return|error =) ({'|'.join(TREE)})\(")
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "errors.py"}
    assert sum(len(raised.findall(text)) for text in texts.values()) <= sum(s.kind in TREE for s in sites())


@pytest.mark.parametrize("part", ["message", "expected", "hint", "reason"])
def test_every_text_of_an_error_is_asserted_by_some_test(part: str) -> None:
    assert unasserted(part) == []


def literals_of(function: str, pick: str) -> Iterator[tuple[str, str]]:
    """Place and text of the string literals that a function, in whatever module, `pick`s.

    That is: what it returns, keys of its dicts, what it calls `reason`, or the arguments of a call in it.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = parsed(path)
        named = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        for node in (inner for body in (named if function else [tree]) for inner in ast.walk(body)):
            match node:
                case ast.Return(value=ast.expr() as value) if pick == "return":
                    values = [value]
                case ast.Dict(keys=keys) if pick == "keys":
                    values = [key for key in keys if key is not None]
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if pick == name:
                    values = [value]
                case ast.Call(args=args) if called(node) == pick:
                    values = list(args)
                case _:
                    continue
            for inner in (inner for value in values for inner in ast.walk(value)):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield f"{path.relative_to(REPOSITORY)}:{inner.lineno}", inner.value


# where a row loses its place on the road and gets a reason by name: a function ("" for any), and what holds the name
REASONS = [
    ("rules", "keys"),
    ("decontaminate_pairs", "lit"),
    ("", "STAGES"),
    ("", "REASONS"),
    ("", "UNUSED"),
    ("", "RawRow"),
    ("", "Unwritable"),
    ("_csv_row", "reason"),
    ("_reason", "return"),
    ("_rendered", "return"),
    ("_tokenise_guarded", "return"),
    ("_encode_one", "return"),
    ("truncate", "return"),
    ("table_rules", "keys"),
    ("check_reference", "refuse_pairs"),
]
NO_REASONS = {"prompt", "chosen", "rejected", "content", "pair_id", "prompt_ids", "chosen_ids", "rejected_ids"}
NO_REASONS |= {"greater_than", "backslashreplace"}  # names of pydantic and of Python


def test_every_reason_of_a_row_that_is_left_out_is_asserted_by_some_test() -> None:
    texts, missing = known_texts(), []
    for function, pick in REASONS:
        found = [(place, text) for place, text in literals_of(function, pick) if text not in NO_REASONS]
        named = [(place, text) for place, text in found if re.fullmatch(r"[a-z][a-z0-9_ ]+", text)]
        assert named, f"no reason in {function or 'any function'}, {pick}: the table REASONS is out of date"
        for place, text in named:
            word = re.compile(rf"\b{re.escape(text)}\b")
            if not any(word.search(known) for known in texts):
                missing.append(f"{place}: {text!r}")
    assert missing == []


def test_what_a_command_says_of_the_machine_and_of_a_bug_is_asserted_by_some_test() -> None:
    texts, tree = known_texts(), parsed(PACKAGE / "cli.py")
    said: list[tuple[int, str]] = []
    for function, scope in functions(tree):
        name = getattr(function, "name", "")
        for node in ast.walk(function):
            value = node.value if isinstance(node, (ast.Return, ast.Assign)) else None
            if value is not None and name == "answer":
                said += [(node.lineno, found) for found in longest_first(pieces(value, scope))[:1]]  # type: ignore[attr-defined]
    said = [(line, text) for line, text in said if len(text) >= LONG_ENOUGH]
    assert said
    assert [f"prefkit/cli.py:{line}: {text!r}" for line, text in said if not is_asserted(text, texts)] == []


# what else is raised: nothing that a person is meant to read
OTHERS = {
    "Unreadable": "it becomes a reject",
    "Unwritable": "it becomes a line of what an export left out",
    "PydanticCustomError": "it becomes a reject",
    "ValueError": "in a validator of the pipeline; it becomes a ConfigError",
    "AttributeError": "what Python asks of a module's __getattr__",
    "KeyError": "a dotted path that is not there; it becomes a reject",
    "JSONDecodeError": "it becomes a SourceError",
    "Exit": "an exit code after a message is out",
    "ReaderGone": "whoever reads stdout has seen enough: the command ends well",
    "KeyboardInterrupt": "it becomes Interrupted",
    "BrokenPipeError": "the reader has seen enough; no failure",
}


def test_nothing_is_raised_on_purpose_but_errors_of_the_tree() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "?")
                if name[0].isupper() and name not in TREE and name not in OTHERS:
                    found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {name}")
    assert found == []


# the place


SETTING = re.compile(
    r"(^|[^\w.])(--[a-z]|(dataset|sources|pairs|validate|decontaminate|dedupe|build|split|audit|precompute|train)\.\w)"
)


def names_a_setting(site: Site) -> bool:
    told = [*site.parts.get("message", []), *site.parts.get("expected", [])]
    return any(SETTING.search(text) for text in told)


def holds(site: Site, piece: str) -> bool:
    return piece in " ".join(site.parts.get("message", []))


def excused(site: Site) -> bool:
    return any(holds(site, piece) for piece in NO_PLACE)


def test_every_error_says_where_or_names_the_setting() -> None:
    bare = [site for site in sites() if not (site.has_where or names_a_setting(site) or excused(site))]
    assert [f"{site.place}: {site.kind} {site.parts['message'][:1]}" for site in bare] == []


def test_no_excuse_outlives_its_message() -> None:
    for piece in NO_PLACE:
        mine = [site for site in sites() if holds(site, piece)]
        assert mine, f"there is no message with {piece!r} any more"
        assert any(not (s.has_where or names_a_setting(s)) for s in mine), f"{piece!r} needs no excuse any more"


# the tree and its exit codes


def drawn_tree() -> dict[str, tuple[str, int | None]]:
    """The tree of the docstring: each kind with the one it hangs from and its own exit code, if it shows one."""
    found: dict[str, tuple[str, int | None]] = {}
    above: list[tuple[int, str]] = [(-1, "Exception")]
    for line in str(errors.__doc__).splitlines():
        if shown := re.match(r"^( {4}[|+\- ]*)([A-Z]\w+)(?: +(\d+))?(?: {2,}|$)", line):
            depth, name, code = len(shown[1]), shown[2], shown[3]
            while above[-1][0] >= depth:
                above.pop()
            found[name] = above[-1][1], int(code) if code else None
            above.append((depth, name))
    return found


def test_the_tree_of_the_docstring_is_the_tree() -> None:
    drawn = drawn_tree()
    assert set(drawn) == set(TREE)
    for name, (parent, code) in drawn.items():
        kind = TREE[name]
        assert kind.__bases__[0].__name__ == parent, name
        if name != "PrefkitError":
            assert kind("x").exit_code == (code if code is not None else TREE[parent].exit_code), name


def documented_codes() -> dict[int, str]:
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    sentence = re.search(r"Exit codes: (.*?interrupted)", readme)
    assert sentence
    found = re.findall(r"(?:^|, )(\d+) (.*?)(?=, \d+ |$)", sentence[1])
    return {int(code): words for code, words in found}


def test_the_readme_says_what_each_exit_code_of_the_tree_means() -> None:
    codes = documented_codes()
    words = {CheckError: "check", InputError: "bad input", MachineError: "disk or memory", Interrupted: "interrupted"}
    for kind, word in words.items():
        assert word in codes[kind("x").exit_code]
    assert {kind("x").exit_code for kind in TREE.values()} <= set(codes)


def test_the_readme_and_the_command_line_name_the_same_exit_codes() -> None:
    told = " ".join(str(cli.__doc__).split())
    sentence = re.search(r"Exit codes: (.*?)\.", told)
    assert sentence
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", sentence[1])} == set(documented_codes())


# an error stays whole


HOSTILE = {
    "quotes": "she said \"no\" and 'yes' and \\ and \\n",
    "newlines": "one\ntwo\r\nthree\u2028four",
    "escaped bytes": os.fsdecode(b"caf\xe9/\xff\xfe.jsonl"),
    "half a surrogate pair": "\ud83d",
    "markup": "[red]x[/red] [/] <b>&amp;</b> {{ x }} %s {0}",
    "control characters": "\x1b[31m\x07\x00\x7f\x9b",
    "other scripts": "雪 \U0001f600 \u202e",
}


def kinds() -> list[type[PrefkitError]]:
    return list(TREE.values())


def whole(kind: type[PrefkitError], text: str = "") -> PrefkitError:
    return kind(f"what {text}", where=f"where {text}", expected=f"expected {text}", hint=f"hint {text}")


@pytest.mark.parametrize("name", HOSTILE)
def test_the_dict_of_an_error_is_valid_json_and_comes_back_as_it_was(name: str) -> None:
    error = whole(InputError, HOSTILE[name])
    written = json.dumps(error.as_dict(), allow_nan=False)
    assert json.loads(written.encode("ascii")) == {
        "kind": "InputError",
        "message": f"what {HOSTILE[name]}",
        "where": f"where {HOSTILE[name]}",
        "expected": f"expected {HOSTILE[name]}",
        "hint": f"hint {HOSTILE[name]}",
    }


@pytest.mark.parametrize("kind", kinds())
def test_an_error_survives_the_way_to_another_process_with_all_its_parts(kind: type[PrefkitError]) -> None:
    error = whole(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is kind
        assert (str(back), back.as_dict(), back.exit_code) == (str(error), error.as_dict(), error.exit_code)
    assert copy.copy(error).as_dict() == copy.deepcopy(error).as_dict() == error.as_dict()
    bare = pickle.loads(pickle.dumps(kind("alone")))
    assert (str(bare), bare.as_dict()) == ("alone", {"kind": kind.__name__, "message": "alone"})


def test_an_error_of_a_real_process_comes_back_with_all_its_parts(tmp_path: Path) -> None:
    code = (
        "import pickle, sys\n"
        "from prefkit.info import dataset_info\n"
        "from prefkit.errors import PrefkitError\n"
        "try:\n    dataset_info('nowhere')\n"
        "except PrefkitError as error:\n    sys.stdout.buffer.write(pickle.dumps(error))\n"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    error = pickle.loads(made.stdout)
    assert str(error) == "nowhere: neither a dataset nor a run\n  expected: a directory with manifest.json or run.json"


# what a terminal is shown


class Shown(NamedTuple):
    """What a command wrote, as bytes."""

    code: int
    out: bytes
    err: bytes


Prefkit = Callable[..., Shown]


@pytest.fixture
def prefkit(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Prefkit:
    """Run a command in this process, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Shown:
        monkeypatch.setattr(sys, "argv", ["prefkit", *arguments])
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfdbinary.readouterr()
        return Shown(ended.value.code if isinstance(ended.value.code, int) else 0, out, err)

    return run


def process(folder: Path, *arguments: str | bytes) -> Shown:
    """The command in a process of its own, under a locale that refuses what is no UTF-8, as most are."""
    settings = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "200"}
    command: list[str | bytes] = [sys.executable, "-m", "prefkit", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, env=settings, timeout=120, check=False)
    return Shown(ended.returncode, ended.stdout, ended.stderr)


def controls(written: bytes) -> list[str]:
    return [c for c in written.decode() if not c.isprintable() and c not in "\n\t"]


ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [ConfigError, SourceError, MachineError, GateError, Interrupted])
def test_no_control_character_of_an_error_reaches_a_terminal_and_its_json_is_read_back(
    kind: type[PrefkitError],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise whole(kind, HOSTILE[name])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prefkit.info.dataset_info", fail)
    monkeypatch.setattr(sys, "argv", ["prefkit", "info", "x", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfdbinary.readouterr()
    assert ended.value.code == kind("x").exit_code
    assert controls(err) == []
    assert out.count(b"\n") == 1
    said = json.loads(out.decode())["error"]
    assert (said["kind"], said["message"].split()[0]) == (kind.__name__, "what")


def hostile_dataset(folder: Path) -> None:
    """A dataset whose source's name, prompt and words are escape sequences."""
    words = "".join(
        json.dumps({"prompt": f"p{i}{ESCAPE}", "chosen": f"{ESCAPE}x good {i}", "rejected": f"bad {i}"}) + "\n"
        for i in range(40)
    )
    (folder / f"rows{ESCAPE}.jsonl").write_text(words)
    (folder / "pipeline.yaml").write_text("dataset: data\nsources: [{path: 'rows*.jsonl', format: pairs}]\n")


def test_escape_sequences_in_names_and_data_never_reach_a_terminal_in_an_error(
    prefkit: Prefkit, tmp_path: Path
) -> None:
    hostile_dataset(tmp_path)
    rows = tmp_path / f"rows{ESCAPE}.jsonl"
    commands: list[tuple[int, tuple[str, ...]]] = [
        (2, ("build", f"gone{ESCAPE}.yaml")),
        (2, ("build", "pipeline.yaml", "--set", f"train.{ESCAPE}=1")),
        (2, ("build", "pipeline.yaml", "--set", f"train.beta={ESCAPE}")),
        (2, ("build", "pipeline.yaml", "--set", f"sources.0.path={ESCAPE}")),
        (2, ("build", "pipeline.yaml", "--out", f"pipeline.yaml/{ESCAPE}")),
        (2, ("info", f"gone{ESCAPE}")),
        (2, ("query", f"gone{ESCAPE}", "select 1")),
        (2, ("precompute", "pipeline.yaml", "--model", f"gone{ESCAPE}")),
        (2, (f"no{ESCAPE}command",)),
        (2, ("build", f"--no{ESCAPE}option")),
        (2, ("query", "data", "select 1", "--format", ESCAPE)),
    ]
    for code, arguments in commands:
        shown = prefkit(*arguments)
        assert (shown.code, controls(shown.err), shown.out) == (code, [], b""), arguments
    rows.write_text('{"prompt": "p", "chosen": "c"}\n' * 3)
    shown = prefkit("build", "pipeline.yaml")
    assert (shown.code, controls(shown.err)) == (2, [])
    assert b"3 of 3 rows could not become a record" in shown.err
    rows.write_text(json.dumps({f"{ESCAPE}": 1}) + "\n")
    shown = prefkit("build", "pipeline.yaml")
    assert (shown.code, controls(shown.err)) == (2, [])


def test_escape_sequences_in_words_never_reach_a_terminal_in_a_strict_audit_or_a_query_that_fails(
    prefkit: Prefkit, tmp_path: Path
) -> None:
    hostile_dataset(tmp_path)
    assert prefkit("build", "pipeline.yaml").code == 0
    audited = prefkit("audit", "data", "--strict")
    assert (audited.code, controls(audited.err)) == (1, [])
    assert b"error: data: the verdict is fail" in audited.err or b"error: the verdict is fail" in audited.err
    for sql in ("select cast(prompt as int) from pairs", f"select {ESCAPE}", f'select * from "{ESCAPE}"'):
        for form in ("table", "csv"):
            failed = prefkit("query", "data", sql, "--format", form)
            assert (failed.code, controls(failed.err), failed.out) == (2, [], b""), sql


def test_what_a_command_prints_of_names_holds_no_escape_sequence(prefkit: Prefkit, tmp_path: Path) -> None:
    hostile_dataset(tmp_path)
    name = f"rows{ESCAPE}.jsonl"
    (tmp_path / "named.yaml").write_text(
        json.dumps({"dataset": "data", "sources": [{"path": name, "format": "pairs"}]})
    )
    for arguments in (("build", "named.yaml"), ("info", "data"), ("query", "data", "from pairs"), ("audit", "data")):
        shown = prefkit(*arguments)
        assert shown.code == 0, shown.err
        assert (controls(shown.out), controls(shown.err)) == ([], []), arguments


def test_a_name_that_is_no_utf8_is_an_error_like_any_other(tmp_path: Path) -> None:
    for arguments in (
        ("info", b"gone\xff"),
        ("build", b"gone\xff.yaml"),
        ("query", b"gone\xff", "select 1"),
    ):
        for more in ((), ("--json",)) if arguments[0] != "query" else ((),):
            shown = process(tmp_path, *arguments, *more)
            assert (shown.code, b"Traceback" in shown.err) == (2, False), (arguments, shown.err)
            assert "gone\ufffd" in shown.err.decode(), arguments
            assert len(shown.out.splitlines()) == len(more)
            if more:
                assert json.loads(shown.out.decode())["error"]["kind"] in ("DatasetError", "ConfigError")


def test_a_line_break_in_a_name_cannot_forge_a_part_of_a_message(prefkit: Prefkit) -> None:
    shown = prefkit("info", "x\n  next: rm -rf ~")
    lines = shown.err.decode().splitlines()
    assert [line for line in lines if line.lstrip().startswith("next: rm")] == []


def test_the_command_that_goes_on_after_an_interruption_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/prefkit", "train", "my data", "--set", "train.seed=$(x)"])
    assert cli.answer(None, as_json=False) == 130
    command = capsys.readouterr().err.rpartition("  next: ")[2]
    assert shlex.split(command) == ["prefkit", "train", "my data", "--set", "train.seed=$(x)"]


# one place, one kind


EXAMPLES: list[tuple[type[PrefkitError], int]] = [
    (PrefkitError, 2),
    (InputError, 2),
    (ConfigError, 2),
    (SourceError, 2),
    (DatasetError, 2),
    (ModelError, 2),
    (CheckError, 1),
    (GateError, 1),
    (AuditError, 1),
    (MachineError, 3),
    (Interrupted, 130),
]


@pytest.mark.parametrize(("kind", "code"), EXAMPLES)
def test_a_command_ends_with_the_exit_code_of_its_error(
    kind: type[PrefkitError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise kind("too bad", where="here", expected="better", hint="prefkit formats")

    monkeypatch.setattr("prefkit.info.dataset_info", fail)
    monkeypatch.setattr(sys, "argv", ["prefkit", "info", "x", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code
    hint = "prefkit info x --json" if kind is Interrupted else "prefkit formats"
    assert err == f"error: here: too bad\n  expected: better\n  next: {hint}\n"
    told = {"kind": kind.__name__, "message": "too bad", "where": "here", "expected": "better", "hint": hint}
    assert json.loads(out) == {"error": told}


def test_every_kind_has_its_example() -> None:
    assert {kind for kind, _ in EXAMPLES} == set(TREE.values())
