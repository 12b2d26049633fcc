"""The `rules:` of a rewrite source as functions: regular expressions, or functions of the user's own modules.

Modules are found from the working directory first. Their files, and those of all modules of the working directory that
they import, count as sources of the dataset: a changed function is another build. Imports are read from the source
text, wherever in it they stand; what is imported under a name made at run time does not count.
"""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefkit.config import RewriteRule
from prefkit.corrections import Rule
from prefkit.errors import ConfigError, SourceError
from prefkit.records import LONE_SURROGATE

OWN = "prefkit"  # stays loaded, even where the working directory is its repository
EVERY = "a text for every response"
AGAIN = "mend it and type the same command"


def make_rules(rules: Sequence[RewriteRule]) -> list[Rule]:
    """The rules of a source, in their order; each named by its pattern or function. Modules are loaded anew.

    Raises:
        ConfigError: a module or function cannot be found, or is none.
    """
    _look_here()
    _forget(_local_modules(_modules_of(rules)))
    names = [rule.pattern or str(rule.function) for rule in rules]
    names = [f"{name} (rule {number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]
    return [Rule(name, _step(rule), tuple(rule.gone)) for name, rule in zip(names, rules, strict=True)]


def _step(rule: RewriteRule) -> Callable[[str], str]:
    if rule.function is not None:
        return _checked(rule.function, _function(rule.function))
    pattern = re.compile(rule.pattern or "", re.IGNORECASE if rule.ignore_case else 0)
    return lambda text: pattern.sub(rule.replace, text)


def module_files(rules: Sequence[RewriteRule]) -> list[str]:
    """The files of the modules that the functions of the rules come from, sorted, with all that they import from here.

    Raises:
        ConfigError: a module cannot be found.
    """
    _look_here()
    modules = _modules_of(rules)
    local = _local_modules(modules)
    return sorted({*map(str, local.values()), *(_installed(name) for name in modules if name not in local)})


def _look_here() -> None:
    here = str(Path.cwd())
    sys.path[:] = [here, *(path for path in sys.path if path != here)]
    importlib.invalidate_caches()


def _modules_of(rules: Sequence[RewriteRule]) -> list[str]:
    return sorted({rule.function.partition(":")[0] for rule in rules if rule.function is not None})


# -- modules of the working directory


def _local_modules(names: Sequence[str]) -> dict[str, Path]:
    """The modules of the working directory behind some names: themselves, their packages, and all that these import.

    Nothing of them runs. Paths are relative to the working directory.
    """
    found: dict[str, Path] = {}
    todo = [*names]
    while todo:
        name = todo.pop()
        for whole in _with_packages(name):
            path = _local_file(whole) if whole not in found and whole.split(".")[0] != OWN else None
            if path is not None:
                found[whole] = path
                todo += _imported(whole, path)
    return found


def _with_packages(name: str) -> list[str]:
    """`a.b.c` as a, a.b, a.b.c."""
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps) + 1)]


def _local_file(name: str) -> Path | None:
    """The file of a module of the working directory; None for a folder without __init__.py."""
    place = Path(*name.split("."))
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def _imported(name: str, path: Path) -> Iterator[str]:
    """The names that may be modules in every import of a file; of one that is no Python there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return  # importing it says so
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = [*base, *(node.module.split(".") if node.module else [])]
            if whole:
                yield ".".join(whole)
            yield from (".".join([*whole, alias.name]) for alias in node.names if alias.name != "*")


def _forget(local: dict[str, Path]) -> None:
    """Let the next import read these files, whatever rules imported before under their names."""
    for name, path in local.items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is not None and (name in _LOADED or Path(loaded).absolute() == path.absolute()):
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if package in sys.modules:  # a folder without __init__.py, which holds the module as well
                vars(sys.modules[package]).pop(last, None)
    _LOADED.update(name for name in local if name not in sys.modules)


_LOADED: set[str] = set()  # names of modules that rules have brought in: in another directory they mean other files


# -- functions


def _installed(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # a package runs its __init__.py first
        if not isinstance(error, ModuleNotFoundError) or error.name not in _with_packages(module):
            raise _not_importable(module, error, module) from error
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"rules.function: no module {module}",
            where=module,
            expected="a Python file in the working directory, or an installed module",
        )
    return spec.origin


def _not_importable(module: str, error: BaseException, where: str) -> ConfigError:
    message = f"rules.function: {module} cannot be imported: {type(error).__name__}: {error}"
    return ConfigError(message, where=where, expected="a module that Python imports", hint=AGAIN)


def _function(name: str) -> Callable[[str], str]:
    module, _, attribute = name.partition(":")
    where = str(_local_file(module) or _installed(module))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a .pyc is taken for a file changed in its second
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:
        raise _not_importable(module, error, where) from error
    finally:
        sys.dont_write_bytecode = writes
    if not callable(found):
        raise ConfigError(
            f"rules.function: {module} has no function {attribute}", where=where, expected="module:function", hint=AGAIN
        )
    return found  # type: ignore[no-any-return]


def _checked(name: str, function: Callable[[str], str]) -> Callable[[str], str]:
    """The function, with an error that names it where it fails or gives no text; the caller adds the row."""

    def apply(text: str) -> str:
        try:
            made = function(text)
        except (Exception, SystemExit) as error:
            message = f"rules.function {name} raised {type(error).__name__}: {error}"
            raise SourceError(message, expected=EVERY, hint=AGAIN) from error
        if not isinstance(made, str):
            raise SourceError(f"rules.function {name} gave {type(made).__name__}", expected=EVERY, hint=AGAIN)
        if LONE_SURROGATE.search(made):
            message = f"rules.function {name} gave half a surrogate pair, which is no character"
            raise SourceError(message, expected=EVERY, hint=AGAIN)
        return made

    return apply
