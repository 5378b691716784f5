"""Random weights that leave nothing degenerate."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["randomise"]


def randomise(model: nn.Module) -> nn.Module:
    """Draw constant parameters (norms, biases, layer scales) anew around their value, so that nothing is degenerate."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and not (parameter != parameter.flatten()[0]).any():
                noise = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
                value = parameter.flatten()[0].abs().clamp(min=0.05)
                parameter.add_(0.2 * value * noise)
                if float(parameter.abs().max()) < 0.05:
                    parameter.add_(0.05)
    return model
