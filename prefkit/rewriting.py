"""The `rules:` of a rewrite source as functions: regular expressions, or functions of the user's own modules.

The files of these modules, and those of all modules of the working directory that they import (functions.py), count as
sources of the dataset: a changed function is another build.
"""

import re
from collections.abc import Callable, Sequence

from prefkit import functions
from prefkit.config import RewriteRule
from prefkit.corrections import Rule
from prefkit.errors import SourceError
from prefkit.functions import AGAIN, calling, load_functions
from prefkit.records import LONE_SURROGATE

EVERY = "a text for every response"
SETTING = "rules.function"


def make_rules(rules: Sequence[RewriteRule]) -> list[Rule]:
    """The rules of a source, in their order; each named by its pattern or function. Modules are loaded anew.

    Raises:
        ConfigError: a module or function cannot be found, or is none.
    """
    named = _functions_of(rules)
    loaded = dict(zip(named, load_functions(named, SETTING), strict=True))
    names = [rule.pattern or str(rule.function) for rule in rules]
    names = [f"{name} (rule {number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]
    return [Rule(name, _step(rule, loaded), tuple(rule.gone)) for name, rule in zip(names, rules, strict=True)]


def _step(rule: RewriteRule, loaded: dict[str, Callable[[str], str]]) -> Callable[[str], str]:
    if rule.function is not None:
        return _checked(rule.function, loaded[rule.function])
    pattern = re.compile(rule.pattern or "", re.IGNORECASE if rule.ignore_case else 0)
    return lambda text: pattern.sub(rule.replace, text)


def module_files(rules: Sequence[RewriteRule]) -> list[str]:
    """The files of the modules that the functions of the rules come from, sorted, with all that they import from here.

    Raises:
        ConfigError: a module cannot be found.
    """
    return functions.module_files(_functions_of(rules), SETTING)


def _functions_of(rules: Sequence[RewriteRule]) -> list[str]:
    return [rule.function for rule in rules if rule.function is not None]


def _checked(name: str, function: Callable[[str], str]) -> Callable[[str], str]:
    """The function, with an error that names it where it fails or gives no text; the caller adds the row."""

    def apply(text: str) -> str:
        with calling(name, function, SETTING, expected=EVERY):
            made = function(text)
        if not isinstance(made, str):
            raise SourceError(f"rules.function {name} gave {type(made).__name__}", expected=EVERY, hint=AGAIN)
        if LONE_SURROGATE.search(made):
            message = f"rules.function {name} gave half a surrogate pair, which is no character"
            raise SourceError(message, expected=EVERY, hint=AGAIN)
        return made

    return apply
