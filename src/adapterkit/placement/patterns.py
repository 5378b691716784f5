"""The language of targets: dotted suffixes, globs, regular expressions, predicates, and roles, which start with "@"."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn

from ..config.settings import Predicate
from ..errors import TargetError

__all__ = ["is_role", "matching"]

_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]+\]")  # "**" first: else it would be read as two "*"
_GLOB_MEANS = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}


def is_role(target: object) -> TypeGuard[str]:
    """Tell whether a target is written as a role ("@attention.q"), not as a pattern."""
    return isinstance(target, str) and target.startswith("@")


def matching(target: str | Predicate, modules: Mapping[str, Any]) -> list[str]:
    """Return the paths that a pattern or predicate matches.

    Args:
        modules: Map path → module. A pattern looks at the paths alone.

    Raises:
        TargetError: the target is neither pattern nor predicate, or no regular expression.
    """
    # A module is callable, too, and would run as a predicate.
    if isinstance(target, nn.Module) or not (isinstance(target, str) or callable(target)):
        raise TargetError(f"a module is named by its path, or found by a predicate; found {type(target).__name__}")
    if isinstance(target, type):  # calling a class would make a module
        raise TargetError(
            f"the class {target.__name__} is no predicate: write lambda module, path: isinstance(module, {target.__name__})"
        )
    if not isinstance(target, str):
        return [path for path, module in modules.items() if target(module, path)]
    whole_path = _compile(target)
    return [path for path in modules if whole_path.fullmatch(path)]


def _compile(target: str) -> re.Pattern[str]:
    """Turn a string target into a regular expression for the whole path."""
    try:
        return re.compile(target[3:] if target.startswith("re:") else _translate(target))
    except re.error as error:
        raise TargetError(f"{target!r} is not a pattern: {error}") from error


def _translate(target: str) -> str:
    """Turn a glob into a regular expression for whole components at the end of a path: "ut" does not match "out"."""
    if not target:  # the model itself, whose path is empty
        return ""
    pieces, end = [], 0
    for glob in _GLOB.finditer(target):
        # A set such as "[0-3]" means the same in both languages, and stays; "[!0]" is any but 0, within a component.
        what = re.sub(r"^\[!", "[^.", glob[0])
        pieces += [re.escape(target[end : glob.start()]), _GLOB_MEANS.get(what, what)]
        end = glob.end()
    # "output.dense" -> r"(?:.*\.)?output\.dense": anything may stand before it, up to a dot.
    return r"(?:.*\.)?" + "".join(pieces) + re.escape(target[end:])
