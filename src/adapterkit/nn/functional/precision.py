"""The dtype that is computed in, where it matters."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["as_stored"]


def as_stored(tensor: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors, even under autocast on this tensor's device."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
