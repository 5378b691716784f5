"""The tensors that a module holds, read faster than by attribute."""

from typing import Any

from torch import nn

__all__ = ["own_tensors"]


def own_tensors(module: nn.Module) -> dict[str, Any]:
    """A module's parameters by name, without the look-ups of `nn.Module.__getattr__`, each as dear as a small kernel.

    Replicas of `nn.DataParallel` hold tensors among their attributes instead.
    """
    return module._parameters or vars(module)
