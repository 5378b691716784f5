"""Random weights for a peer's adapter, of a size that keeps activations near 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .case import Key, Leaf

__all__ = ["draw_"]

# Tensors that scale, about 1; those of a coupling stay small, so that it is far from no deeper layer's range.
_ABOUT_ONE = {"scale", "lambda_b", "lambda_d"}


def draw_(leaves: Mapping[Key, Leaf], seed: int) -> None:
    """Draw every tensor that is trained, each parameter once, whatever it was before; magnitudes about what they were."""
    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for key, leaf in leaves.items():
        parameter = leaf.parameter
        if id(parameter) in seen or not leaf.is_trained:
            continue
        seen.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        if key.name == "magnitude":
            new = parameter.detach() * (1 + 0.3 * noise.clamp(-2, 2))
        elif key.name in _ABOUT_ONE:
            new = 1 + 0.3 * noise.clamp(-2, 2)
        elif leaf.offset is not None:
            new = parameter.detach() + 0.3 * noise
        else:
            new = 0.5 * noise if parameter.dim() < 2 else 0.5 * noise / (parameter[0].numel() ** 0.5)
        if key.name == "phm_rule":
            new = noise / parameter.shape[0] ** 0.5
        parameter.data.copy_(new if leaf.within is None else new * leaf.within)
        parameter.requires_grad_(True)
