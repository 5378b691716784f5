"""A trained difference to a parameter of the host: biases (BitFit), the weights of norms, or any other."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["ParameterDelta"]


class ParameterDelta(nn.Module):
    """Train a parameter of the host by a delta that is held apart from it: the host's own stays as it is.

    Args:
        shape: The parameter's shape, () for a number.
        dtype: What the delta is.

    Reference: Ben Zaken et al. 2022 (BitFit, biases), arXiv:2106.10199. The delta starts at zero, so a new adapter is the
    identity; trained without weight decay it takes the path that the parameter itself would take.
    """

    def __init__(self, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the delta back to zero."""
        nn.init.zeros_(self.delta)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return self.delta.dtype

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the parameter with the delta, in the dtype of the one given. Shape: as the delta."""
        return (weight + self.delta).to(weight.dtype)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the parameter that is given becomes if the adapter is merged into it, under its name."""
        return {name: self.adapted(tensor) for name, tensor in tensors.items()}

    def extra_repr(self) -> str:
        """Return the shape, for `print(model)`."""
        return f"{tuple(self.delta.shape)}"
