"""Weights that a module computes anew from other Parameters: by a parametrisation, or by the hooks of older torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .projections import projection_of

__all__ = ["no_parameter", "why_no_effect"]

# What older torch registers as forward pre-hooks: the hook's class, what it appends to the tensor's name for the Parameters
# that it reads, and the function that ends it.
_HOOKS: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (WeightNorm, ("_g", "_v"), "remove_weight_norm"),
    (SpectralNorm, ("_orig",), "remove_spectral_norm"),
    (BasePruningMethod, ("_orig",), "prune.remove"),
)


@dataclass(frozen=True)
class _Computed:
    """A tensor that a module computes before it runs.

    Attributes:
        leaf: Its name in the module.
        sources: The names of the Parameters that it is made of by a hook; () for a parametrisation, whose Parameters lie in
            a module of their own.
        by: What computes it.
        ended_by: The function of torch.nn.utils that ends this.
    """

    leaf: str
    sources: tuple[str, ...]
    by: str
    ended_by: str


def no_parameter(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map each name that looks like a Parameter's, but is a computed tensor's → the message that says so."""
    messages = {}
    for path, module in modules.items():
        for found in _computed_in(module):
            name = f"{path}.{found.leaf}".lstrip(".")
            messages[name] = (
                f"{name!r} is no Parameter: {found.by} of {path!r} computes it. {_what_instead(path, module, found)}"
            )
    return messages


def why_no_effect(path: str, module: nn.Module, leaf: str) -> str | None:
    """Explain why a change of this Parameter would change nothing; None if it would change something.

    Ours are hooks, too, and run after those that were there: what these have computed by then is what the module runs with.
    """
    for found in _computed_in(module):
        if leaf in found.sources:
            return (
                f"a change of {f'{path}.{leaf}'.lstrip('.')!r} would do nothing: a hook of {path!r} itself ({found.by}) "
                f"computes {found.leaf!r} from it before any of ours. {_what_instead(path, module, found)}"
            )
    return None


def _computed_in(module: nn.Module) -> Iterator[_Computed]:
    """Yield the tensors that a module computes before it runs."""
    parametrised: Any = module.parametrizations if is_parametrized(module) else {}
    for leaf, steps in parametrised.items():
        # The classes of torch are private: "_WeightNorm", "_SpectralNorm". One may take what another returns.
        by = " and ".join(type(step).__name__.lstrip("_") for step in steps)
        # No sources: a parametrisation reads them when the forward asks for the weight, which is after our hooks.
        yield _Computed(leaf, (), by, "parametrize.remove_parametrizations")
    for hook in module._forward_pre_hooks.values():
        for kind, suffixes, ended_by in _HOOKS:
            if isinstance(hook, kind):
                leaf = getattr(hook, "_tensor_name" if kind is BasePruningMethod else "name")
                yield _Computed(leaf, tuple(leaf + suffix for suffix in suffixes), type(hook).__name__, ended_by)


def _what_instead(path: str, module: nn.Module, found: _Computed) -> str:
    """Say what to do instead: a layer's weight can be adapted beside the layer, whatever computes it."""
    # The output projection of nn.MultiheadAttention looks like a layer, and is never called.
    is_layer = projection_of(module) is not None and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    beside = f"Target the module {path!r} instead, exclude" if is_layer and found.leaf == "weight" else "Exclude"
    return f"{beside} it, or end that first: torch.nn.utils.{found.ended_by}"
