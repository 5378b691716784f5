"""Find modules by name: dotted suffixes, globs, regular expressions, predicates."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..config.settings import Predicate
from ..errors import TargetError
from ..structure.paths import modules_by_path

__all__ = ["RoleFinder", "is_role", "match", "matches_nothing", "matching", "nothing_matches"]

# What finds the modules that have a role, such as "@attention.out".
RoleFinder = Callable[[str], Sequence[str]]

_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]+\]")
_GLOB_MEANS = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}


def is_role(target: object) -> bool:
    """Whether a target is written as a role, not as a pattern."""
    return isinstance(target, str) and target.startswith("@")


def match(
    model: nn.Module,
    targets: Sequence[str | Predicate],
    exclude: Sequence[str | Predicate] = (),
    roles: RoleFinder | None = None,
) -> list[str]:
    """The paths of the modules that a list of targets names, in the model's order, each module once.

    A module that is reachable under several names is matched by any of them and returned under the first.

    Args:
        roles: Finds the modules that have a role; without it, there are none.

    Raises:
        TargetError: a target matches nothing (with the nearest names), or everything it matches is excluded.
    """
    modules = modules_by_path(model)
    first_name: dict[int, str] = {}
    for path, module in modules.items():
        first_name.setdefault(id(module), path)

    def named(targets: Sequence[str | Predicate]) -> Iterator[set[str]]:
        for target in targets:
            if is_role(target) and roles is not None:
                yield {first_name[id(modules[path])] for path in roles(str(target))}
            else:
                yield {first_name[id(modules[path])] for path in modules if _matches(target, path, modules[path])}

    wanted: set[str] = set()
    for target, found in zip(targets, named(targets), strict=True):
        if not found:
            raise TargetError(nothing_matches(target, model, list(modules)))
        wanted |= found
    left_out = list(named(exclude))
    for target, found in zip(exclude, left_out, strict=True):
        if not found:
            raise TargetError("exclude: " + nothing_matches(target, model, list(modules)))
    kept = wanted.difference(*left_out)
    if not kept:
        raise TargetError(f"every module that targets={list(targets)} matches is excluded by exclude={list(exclude)}")
    return [path for path in dict.fromkeys(first_name.values()) if path in kept]


def matches_nothing(modules: Mapping[str, nn.Module], targets: Sequence[str | Predicate], roles: RoleFinder) -> bool:
    """Whether none of these targets names any module."""
    return not any(roles(str(target)) if is_role(target) else matching(target, modules) for target in targets)


def matching(target: str | Predicate, modules: Mapping[str, Any]) -> list[str]:
    """The paths that a pattern or predicate matches. Raises TargetError: neither, or not a regular expression."""
    return [path for path, module in modules.items() if _matches(target, path, module)]


def _matches(target: str | Predicate, path: str, module: Any) -> bool:
    if isinstance(target, nn.Module) or not (isinstance(target, str) or callable(target)):
        raise TargetError(f"a module is named by its path, or found by a predicate; found {type(target).__name__}")
    if not isinstance(target, str):
        return bool(target(module, path))
    return _compile(target).fullmatch(path) is not None


def _compile(target: str) -> re.Pattern[str]:
    """A string target as a regular expression for the whole path."""
    try:
        return re.compile(target[3:] if target.startswith("re:") else _translate(target))
    except re.error as error:
        raise TargetError(f"{target!r} is not a pattern: {error}") from error


def _translate(target: str) -> str:
    """A glob as a regular expression for whole components at the end of a path."""
    if not target:
        return ""
    pieces, end = [], 0
    for glob in _GLOB.finditer(target):
        pieces += [re.escape(target[end : glob.start()]), _GLOB_MEANS.get(glob[0], glob[0])]
        end = glob.end()
    return r"(?:.*\.)?" + "".join(pieces) + re.escape(target[end:])


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def nothing_matches(
    target: str | Predicate, model: nn.Module, paths: Sequence[str], parameters: Sequence[str] = (), such_as: str = ""
) -> str:
    """The message for a target without a match, with the names that come nearest.

    Args:
        paths: The modules that there are.
        parameters: The names of Parameters, where those can be targets as well.
        such_as: What could stand for a role in a model that does not have it.
    """
    name = type(model).__name__
    if is_role(target):
        example = f", e.g. {such_as}" if such_as else ""
        return (
            f"{target!r}: tracing {name} finds no such place; `kit.tree()` shows what there is. In what is no transformer, "
            f"name modules{example}"
        )
    if not isinstance(target, str):
        return f"the predicate {getattr(target, '__name__', target)!r} is true for no module of {name}"
    there = " and ".join([_count(paths, "module"), *([_count(parameters, "Parameter")] if parameters else [])])
    tails = {".".join(path.split(".")[-n:]): None for path in (*paths, *parameters) if path for n in (1, 2, 3)}
    near = difflib.get_close_matches(target, list(tails), n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(map(repr, near))}. " if near else ""
    return (
        f"{target!r} matches no module of {name}, which has {there}. {hint}"
        "Change it, or call kit.sites(config) to list what would match."
    )
