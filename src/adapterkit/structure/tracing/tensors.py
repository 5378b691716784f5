"""Ask of any tensor what not every kind of tensor answers: its shape, its memory, whether it can be computed with."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["is_plain", "memory_of", "shape_of", "storage_of"]


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor can be cut, summed and compared: it is dense, real, has values, and is of no running vmap."""
    is_odd = tensor.is_nested or tensor.is_complex() or tensor.is_meta or tensor.is_quantized
    return tensor.layout is torch.strided and not is_odd and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape; () for a nested one, whose rows differ."""
    return () if tensor.is_nested else tuple(tensor.shape)


def storage_of(tensor: Tensor) -> int:
    """Return a number for the storage that a tensor lies in."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        # Sparse and similar tensors have no storage of their own: each counts as apart, for nothing can be a view of it.
        return -id(tensor)


def memory_of(tensor: Tensor) -> Hashable | None:
    """Return what two objects have in common that show the same memory in the same way; None if that cannot be told.

    `x.as_subclass(...)`, `x.data` and `torch.from_numpy(x.numpy())` are such objects beside x.
    """
    if not is_plain(tensor) or not tensor.numel():
        return None
    try:
        address = tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass that holds its values elsewhere
        return None
    return (address, tuple(tensor.shape), tensor.stride(), tensor.dtype) if address else None
