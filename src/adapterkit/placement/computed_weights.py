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

_HOOKS: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (WeightNorm, ("_g", "_v"), "remove_weight_norm"),
    (SpectralNorm, ("_orig",), "remove_spectral_norm"),
    (BasePruningMethod, ("_orig",), "prune.remove"),
)


@dataclass(frozen=True)
class _Computed:
    """A tensor that a module computes: its name there, the Parameters it is made of, by what, and what ends that."""

    leaf: str
    sources: tuple[str, ...]
    by: str
    ended_by: str


def no_parameter(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names that look like those of Parameters, but are of computed tensors; each with the message that says so."""
    return {
        name: f"{name!r} is no Parameter: {found.by} of {path!r} computes it. {_way_out(path, module, found)}"
        for path, module in modules.items()
        for found in _computed(module)
        for name in [f"{path}.{found.leaf}".lstrip(".")]
    }


def why_no_effect(path: str, module: nn.Module, leaf: str) -> str | None:
    """Why a change of this Parameter would change nothing; None if nothing is computed from it before our hooks run."""
    for found in _computed(module):
        if leaf in found.sources:
            return (
                f"a change of {f'{path}.{leaf}'.lstrip('.')!r} would do nothing: a hook of {path!r} itself ({found.by}) "
                f"computes {found.leaf!r} from it before any of ours. {_way_out(path, module, found)}"
            )
    return None


def _computed(module: nn.Module) -> Iterator[_Computed]:
    """What a module computes before it runs."""
    parametrised: Any = module.parametrizations if is_parametrized(module) else {}
    for leaf, steps in parametrised.items():
        by = " and ".join(type(step).__name__.lstrip("_") for step in steps)
        yield _Computed(leaf, (), by, "parametrize.remove_parametrizations")
    for hook in module._forward_pre_hooks.values():
        for kind, suffixes, ended_by in _HOOKS:
            if isinstance(hook, kind):
                leaf = getattr(hook, "_tensor_name" if kind is BasePruningMethod else "name")
                yield _Computed(leaf, tuple(leaf + suffix for suffix in suffixes), type(hook).__name__, ended_by)


def _way_out(path: str, module: nn.Module, found: _Computed) -> str:
    """What to do instead: a layer's weight can be adapted beside the layer, whatever computes it."""
    is_layer = projection_of(module) is not None and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    beside = f"Target the module {path!r} instead, exclude" if is_layer and found.leaf == "weight" else "Exclude"
    return f"{beside} it, or end that first: torch.nn.utils.{found.ended_by}"
