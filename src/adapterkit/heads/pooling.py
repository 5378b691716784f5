"""One vector for each row of a batch of sequences."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import CompatibilityError

__all__ = ["Pooling", "pooled"]

Pooling = Literal["first", "last", "mean"]


def pooled(hidden: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """Return the first position (the [CLS] token of encoders), the last real one, or the mean of the real ones.

    What is pooled already, of shape (batch, hidden), stays as it is.

    Args:
        mask: 1 (or True) where a position is real, 0 where it is padding; all are without it.

    Shape:
        hidden (batch, seq, hidden), mask (batch, seq), result (batch, hidden)

    Raises:
        CompatibilityError: the mask has another shape.
    """
    if hidden.dim() == 2:
        return hidden
    if how == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden[:, -1] if how == "last" else hidden.mean(1)
    if mask.shape != hidden.shape[:2]:
        raise CompatibilityError(
            f"pooling={how!r} needs a mask of shape (batch, seq), here {tuple(hidden.shape[:2])}; found "
            f"{tuple(mask.shape)}. Give the model such a mask, or use pooling='first'"
        )
    # Masks are booleans, integers or floats, and may lie on another device than the last layer.
    is_real = mask.to(hidden.device) != 0
    if how == "mean":
        weights = is_real.to(hidden.dtype)  # (batch, seq)
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    # Not the number of real positions less one: padding may be on the left. A row of padding alone gives its first one.
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * is_real).argmax(1)
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
