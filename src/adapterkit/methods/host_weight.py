"""What methods that measure a host's weight must know of it: DoRA trains its length."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import TargetError
from ..nn.functional.projections import Projection, project, random_input
from ..placement.patterns import SITE
from ..runtime.site import AdapterSite, SiteSpec

__all__ = ["base_weight", "check_multiplies"]


def base_weight(site: SiteSpec, host: nn.Module) -> Tensor:
    """The weight at a site, without adapters that are merged into it.

    Raises:
        TargetError: it has no length to measure: quantised, or computed in a way that looking at it would move.
    """
    name = site.parameters[0] if site.parameters else "weight"
    held = host._modules.get(SITE)
    if isinstance(held, AdapterSite) and name in held.originals:
        return held.originals[name].value
    way, _, leaf = name.rpartition(".")
    owner: Any = host.get_submodule(way)
    is_steady = leaf in owner._parameters
    if not is_steady and is_parametrized(owner, leaf):
        is_steady = not any(True for _ in owner.parametrizations[leaf].buffers())  # spectral norm's move as they are read
    if not is_steady:
        raise TargetError(
            f"the {leaf} of {site.path!r} is computed before each forward, in a way that looking at it would move "
            "(spectral norm) or does not show (legacy weight norm, pruning): it has no length to train from; use LoRA there"
        )
    weight: Tensor = getattr(owner, leaf)
    if not weight.is_floating_point():
        raise TargetError(f"the {leaf} of {site.path!r} is {weight.dtype}, quantised: it has no length; use LoRA there")
    return weight.detach()


@torch.no_grad()
def check_multiplies(site: SiteSpec, host: nn.Module, projection: Projection) -> None:
    """Raise TargetError if a host with a forward of its own does more than multiply by its weight and add its bias."""
    if not projection.has_own_forward or site.parameters or next(host.parameters()).is_meta:
        return
    module: Any = host
    z = random_input(projection, module.weight)
    found, expected = module.forward(z), project(projection, z, module.weight, getattr(module, "bias", None))
    if not isinstance(found, Tensor) or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise TargetError(
            f"{site.path!r} ({type(host).__name__}) has a forward of its own that does more than multiply by its weight "
            "(it scales, say), so that the change of its weight's length cannot be told from its output; use LoRA there"
        )
