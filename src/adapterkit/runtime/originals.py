"""The base model θ: its tensors, apart from what adapterkit added, and their digests."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from ..structure.base_tensors import base_parameters, base_tensors, digest, parameter_at
from .lookup import sites_of

__all__ = ["base_digests", "fingerprint", "originals_of"]


def base_digests(model: nn.Module) -> dict[str, str]:
    """Map the name of each base tensor to its digest; for weights into which adapters are merged, to the original's."""
    originals = originals_of(model)
    return {name: digest(originals.get(id(tensor), tensor)) for name, tensor in base_tensors(model)}


def fingerprint(model: nn.Module) -> str:
    """Return one digest of all base parameters: it tells which weights these are, merged or not."""
    originals = originals_of(model)
    lines = (f"{name} {digest(originals.get(id(p), p))}" for name, p in base_parameters(model))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def originals_of(model: nn.Module) -> dict[int, Tensor]:
    """Map the `id` of each Parameter into which adapters are merged to the tensor that it was before."""
    return {
        # By the `id`: one site has the original of a tied Parameter, and it counts under all of its names.
        id(parameter_at(host, name)): original.value
        for _, host, site in sites_of(model)
        for name, original in site.originals.items()
    }
