"""Heads: copies of the model's own output layers, owned by an adapter, run in their place while it is active."""

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from .errors import TargetError
from .hooks import remove_hooks
from .hosts import resolve_host
from .patterns import SITE, ancestors, match, modules_by_path
from .structure.trace import ExampleInputs, observe

__all__ = ["check_apart", "copy_heads", "find_heads"]


def find_heads(
    model: nn.Module, heads: str | Sequence[str], sites: Sequence[str], example_inputs: ExampleInputs | None
) -> list[str]:
    """The paths of the modules that an adapter would own copies of. An `nn.Sequential` stands for its layers.

    Raises:
        TargetError: a pattern matches nothing, what it matches has no parameters, a site or head lies in a head, or one
            never runs on the example inputs.
    """
    modules = modules_by_path(model)
    heads = [heads] if isinstance(heads, str) else heads
    paths = [path for head in match(model, heads) for path in _parametrised(head, modules)] if heads else []
    paths = list(dict.fromkeys(resolve_host(path, modules, at_input=False) for path in paths))
    if heads and not paths:
        raise TargetError(f"heads={list(heads)} have no parameters of their own to train")
    check_apart(sites, paths)
    if paths and example_inputs is not None:
        calls = observe(model, example_inputs, paths, lambda *_: None)
        never = [path for path, seen in calls.items() if not seen]
        if never:
            raise TargetError(f"the heads {never} never ran on the example inputs, so copies of them would not either")
    return paths


def check_apart(sites: Sequence[str], heads: Sequence[str]) -> None:
    """Raise TargetError if a site or head lies in a head: a copy runs in its place, so it would not."""
    for head in heads:
        inside = [path for path in (*sites, *(other for other in heads if other != head)) if head in ancestors(path)]
        if inside:
            raise TargetError(f"{inside} lie inside the head {head!r}, which the adapter replaces by a copy; exclude them")


def copy_heads(heads: list[nn.Module]) -> list[nn.Module]:
    """Copies of heads without what adapterkit put there; weights that they share, their copies share."""
    copies = copy.deepcopy(heads)
    for module in {module for head in copies for module in head.modules()}:
        if SITE in module._modules:  # TorchScript's have no pop
            del module._modules[SITE]
        remove_hooks(module)
    return copies


def _parametrised(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The path itself, or, of a Sequential, those of its layers that have parameters."""
    module = modules[path]
    if type(module) is nn.Sequential:
        return [inner for name in module._modules for inner in _parametrised(f"{path}.{name}".lstrip("."), modules)]
    return [path] if any(True for _ in module.parameters()) else []
