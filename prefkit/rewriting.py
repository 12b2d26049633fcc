"""The `rules:` of a rewrite source as functions: regular expressions, or functions of the user's own modules.

Modules are found from the working directory first. Their files count as sources of the dataset: a changed function is
another build.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prefkit.config import RewriteRule
from prefkit.corrections import Rule
from prefkit.errors import ConfigError, SourceError


def make_rules(rules: Sequence[RewriteRule]) -> list[Rule]:
    """The rules of a source, in their order; each named by its pattern or function.

    Raises:
        ConfigError: a module or function cannot be found, or is none.
    """
    return [Rule(rule.pattern or str(rule.function), _step(rule), tuple(rule.gone)) for rule in rules]


def _step(rule: RewriteRule) -> Callable[[str], str]:
    if rule.function is not None:
        return _checked(rule.function, _function(rule.function))
    pattern = re.compile(rule.pattern or "", re.IGNORECASE if rule.ignore_case else 0)
    return lambda text: pattern.sub(rule.replace, text)


def module_files(rules: Sequence[RewriteRule]) -> list[str]:
    """The files of the modules that the functions of the rules come from, sorted, without those of Python itself.

    Raises:
        ConfigError: a module cannot be found.
    """
    names = {rule.function.partition(":")[0] for rule in rules if rule.function is not None}
    return sorted({_file_of(name) for name in names})


def _file_of(module: str) -> str:
    _look_here()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"rules.function: no module {module}",
            where=module,
            expected="a Python file in the working directory, or an installed module",
        )
    path = Path(spec.origin)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _look_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()


def _function(name: str) -> Callable[[str], str]:
    module, _, attribute = name.partition(":")
    where = _file_of(module)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise ConfigError(
            f"rules.function: {module} cannot be imported: {type(error).__name__}: {error}", where=where
        ) from error
    if not callable(found):
        raise ConfigError(f"rules.function: {module} has no function {attribute}", where=where)
    return found  # type: ignore[no-any-return]


def _checked(name: str, function: Callable[[str], str]) -> Callable[[str], str]:
    """The function, with an error that names it where it fails or gives no text; the caller adds the row."""

    def apply(text: str) -> str:
        try:
            made = function(text)
        except Exception as error:
            raise SourceError(
                f"rules.function {name} raised {type(error).__name__}: {error}",
                expected="a text for every response",
                hint="mend it and type the same command",
            ) from error
        if not isinstance(made, str):
            raise SourceError(f"rules.function {name} gave {type(made).__name__}", expected="a text for every response")
        return made

    return apply
