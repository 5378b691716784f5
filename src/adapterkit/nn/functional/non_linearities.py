"""The non-linearities that a bottleneck may use, by name."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["NON_LINEARITIES", "NonLinearity", "non_linearity"]

NonLinearity = Literal[
    "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "celu",
    "relu6", "mish", "softplus", "softsign", "logsigmoid", "hardswish", "hardtanh", "hardsigmoid", "tanhshrink",
    "softshrink", "hardshrink", "identity",
]  # fmt: skip


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (`gelu_new` in other libraries)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Return the sigmoid approximation of GELU, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def identity(x: Tensor) -> Tensor:
    """Return x, without any non-linearity: the bottleneck is a low-rank linear map."""
    return x


_OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "identity": identity,
    "swish": F.silu,
}
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    name: _OWN.get(name) or getattr(F, name) for name in get_args(NonLinearity)
}


def non_linearity(name: NonLinearity) -> Callable[[Tensor], Tensor]:
    """Return the function with this name, elementwise and without parameters."""
    return NON_LINEARITIES[name]
