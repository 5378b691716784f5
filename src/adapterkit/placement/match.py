"""From a list of targets to the modules that it names."""

from collections.abc import Mapping, Sequence

from torch import nn

from ..config.settings import Predicate
from ..errors import TargetError
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.roles import role_paths
from ..structure.paths import modules_by_path
from .hints import nothing_matches
from .patterns import is_role, matching

__all__ = ["first_names", "match", "match_nothing", "named_by"]

Targets = Sequence[str | Predicate]


def match(
    model: nn.Module,
    targets: Targets,
    exclude: Targets = (),
    *,
    discovery: Discovery | None = None,
    at_sum: bool = False,
) -> list[str]:
    """Return the paths of the modules that a list of targets names, in the model's order, each module once.

    A module that is reachable under several names is matched by any of them and returned under the first.

    Args:
        discovery: Finds the modules that have a role; without it, no module has one.
        at_sum: Whether what is adapted is the sum behind a branch, so that a role may name one that no module returns.

    Raises:
        TargetError: a target matches nothing (with the nearest names), or everything it matches is excluded.
    """
    modules = modules_by_path(model)
    first = first_names(modules)

    def found_by(target: str | Predicate, setting: str) -> set[str]:
        # Under one name, so that a module which is excluded by its second name is found among those wanted by its first.
        found = {first[id(modules[path])] for path in named_by(target, modules, discovery, at_sum=at_sum)}
        if not found:
            raise TargetError(setting + nothing_matches(target, model, modules, discovery=discovery))
        return found

    wanted: set[str] = set().union(*(found_by(target, "") for target in targets))
    left_out: set[str] = set().union(*(found_by(target, "exclude: ") for target in exclude))
    if not wanted - left_out:
        raise TargetError(f"every module that targets={list(targets)} matches is excluded by exclude={list(exclude)}")
    return [path for path in dict.fromkeys(first.values()) if path in wanted - left_out]


def match_nothing(modules: Mapping[str, nn.Module], targets: Targets, discovery: Discovery) -> bool:
    """Tell whether none of these targets names any module."""
    return not any(named_by(target, modules, discovery) for target in targets)


def named_by(
    target: str | Predicate, modules: Mapping[str, nn.Module], discovery: Discovery | None, *, at_sum: bool = False
) -> list[str]:
    """Return the paths that one target names: a role, a pattern or a predicate. A role names nothing without discovery."""
    if is_role(target) and discovery is not None:
        return role_paths(target, discovery.anatomy, at_sum=at_sum)
    return matching(target, modules)


def first_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Map the `id` of each module to the first of its paths."""
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return first
