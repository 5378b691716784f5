"""How far outputs and gradients lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["default_dtype", "float_tensors", "furthest", "gradients_of", "in_dtype", "relative"]


def float_tensors(value: Any) -> list[Tensor]:
    """All float tensors in a model's output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in float_tensors(part)]


def gradients_of(outputs: Sequence[Tensor], leaves: Sequence[Tensor], *, may_be_unused: bool = False) -> list[Tensor]:
    """The gradients of a random projection of the outputs, the same projection for outputs of the same shapes.

    Args:
        may_be_unused: A leaf that the outputs do not depend on has gradient zero; else it is an error.
    """
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(output.shape, generator=draw, dtype=output.dtype) for output in outputs]
    total = sum((output * weight).mean() for output, weight in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(total, leaves, allow_unused=may_be_unused, materialize_grads=may_be_unused))


def furthest(these: Sequence[Tensor], those: Sequence[Tensor], scale: Callable[[Tensor], Any] = lambda _: 1.0) -> float:
    """The greatest absolute difference, in parts of a scale; infinite where shapes differ, NaN where there is one."""
    if [tensor.shape for tensor in these] != [tensor.shape for tensor in those]:
        return float("inf")
    return float(torch.stack([(a - b).abs().max() / scale(b) for a, b in zip(these, those, strict=True)]).max())


def relative(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The greatest difference of gradients, each tensor's in parts of its own largest entry."""
    return furthest(these, those, lambda tensor: tensor.abs().max().clamp(min=torch.finfo(tensor.dtype).tiny))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors have this dtype: parameters of any library, and masks that a model makes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword inputs with their floating-point tensors in this dtype."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in inputs.items()}
