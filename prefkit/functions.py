"""Functions of the user's own modules, named `module:function`: found from the working directory first, loaded anew.

Comes in: names, and the setting that gave them (rules.function, scorers.function, ...), for messages. Goes out: the
functions, and the files that they are made of: those of their modules, and of all modules of the working directory that
these import. Imports are read from the source text, wherever in it they stand; what is imported under a name made at
run time does not count.
"""

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefkit.errors import ConfigError, InputError, PrefkitError, is_out_of_memory
from prefkit.sources import file_sha256

OWN = "prefkit"  # stays loaded, even where the working directory is its repository
AGAIN = "mend it and type the same command"


def load_functions(names: Sequence[str], setting: str) -> list[Callable[..., Any]]:
    """The functions of these names, in their order; their modules are loaded anew.

    Args:
        names: `module:function` each.
        setting: that names them, for messages.

    Raises:
        ConfigError: a module or function cannot be found, or is none.
    """
    look_here()
    _forget(_local_modules(_modules_of(names)))
    return [_function(name, setting) for name in names]


def module_files(names: Sequence[str], setting: str) -> list[str]:
    """The files of the modules that functions come from, sorted, with all that they import from here.

    Raises:
        ConfigError: a module cannot be found.
    """
    look_here()
    modules = _modules_of(names)
    local = _local_modules(modules)
    installed = (_installed(name, setting) for name in modules if name not in local)
    return sorted({*map(str, local.values()), *installed})


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """The versions of the installed packages that functions come from, by distribution: one file of theirs is not all.

    prefkit's own functions are what their file is, and the standard library has no version of its own.
    """
    local = _local_modules(_modules_of(names))
    packages = {name.split(".")[0] for name in _modules_of(names) if name not in local} - {OWN}
    if not packages:
        return {}
    known = importlib.metadata.packages_distributions()
    found = {told for package in packages for told in known.get(package, [])}
    return {told: importlib.metadata.version(told) for told in sorted(found)}


def module_hashes(names: Sequence[str], setting: str) -> dict[str, str]:
    """The sha256 of every file in `module_files`, by its path in the working directory.

    Of an installed module by its name: where it lies is this machine's matter.

    Raises:
        ConfigError: a module cannot be found.
    """
    look_here()
    modules = _modules_of(names)
    local = _local_modules(modules)
    hashes = {str(path): file_sha256(str(path)) for path in local.values()}
    hashes |= {name: file_sha256(_installed(name, setting)) for name in modules if name not in local}
    return dict(sorted(hashes.items()))


@contextlib.contextmanager
def calling(name: str, function: Callable[..., Any], setting: str, *, where: str = "", expected: str) -> Iterator[None]:
    """Around a call of the user's function: what it raises becomes an error that names the function and what it raised.

    Args:
        name: `module:function`.
        function: that it names.
        setting: that names it.
        where: what it was called with, for a person.
        expected: what it should have given.

    Raises:
        InputError: it raised something. Memory that ran out, and prefkit's own errors, pass as they are.
    """
    try:
        yield
    except PrefkitError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        message = f"{setting} {name} {raised(error, function, module_files([name], setting))}"
        raise InputError(message, where=where, expected=expected, hint=AGAIN) from error


def look_here() -> None:
    """Let imports look into the working directory first."""
    here = str(Path.cwd())
    sys.path[:] = [here, *(path for path in sys.path if path != here)]
    importlib.invalidate_caches()


def _modules_of(names: Sequence[str]) -> list[str]:
    return sorted({name.partition(":")[0] for name in names})


def raised(error: BaseException, function: Callable[..., Any], files: Sequence[str]) -> str:
    """What a function raised, and in which line of its modules, for a message: `raised KeyError in mine.py:3: 'gone'`.

    Args:
        error: what it raised.
        function: that raised it.
        files: of its modules, as `module_files` gives them.
    """
    own = {str(Path(file).absolute()): file for file in files}
    code = getattr(inspect.unwrap(function), "__code__", None)  # a package may name what lies in another of its files
    if code is not None:
        own.setdefault(code.co_filename, code.co_filename)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" in {own[frame.filename]}:{frame.lineno}" for frame in frames if frame.filename in own]
    return f"raised {type(error).__name__}{lines[-1] if lines else ''}: {error}"


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
    """Let the next import read these files, whatever was imported before under their names."""
    for name, path in local.items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is not None and (name in _LOADED or Path(loaded).absolute() == path.absolute()):
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if package in sys.modules:  # a folder without __init__.py, which holds the module as well
                vars(sys.modules[package]).pop(last, None)
    _LOADED.update(name for name in local if name not in sys.modules)


_LOADED: set[str] = set()  # names of modules that functions have brought in: in another directory they mean other files


# -- functions


def _installed(module: str, setting: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # a package runs its __init__.py first
        if not isinstance(error, ModuleNotFoundError) or error.name not in _with_packages(module):
            raise _not_importable(module, error, module, setting) from error
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"{setting}: no module {module}",
            where=module,
            expected="a Python file in the working directory, or an installed module",
        )
    return spec.origin


def _not_importable(module: str, error: BaseException, where: str, setting: str) -> ConfigError:
    message = f"{setting}: {module} cannot be imported: {type(error).__name__}: {error}"
    return ConfigError(message, where=where, expected="a module that Python imports", hint=AGAIN)


def _function(name: str, setting: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    where = str(_local_file(module) or _installed(module, setting))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a .pyc is taken for a file changed in its second
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:
        raise _not_importable(module, error, where, setting) from error
    finally:
        sys.dont_write_bytecode = writes
    if not callable(found):
        raise ConfigError(
            f"{setting}: {module} has no function {attribute}", where=where, expected="module:function", hint=AGAIN
        )
    return found  # type: ignore[no-any-return]
