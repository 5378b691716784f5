"""The tensors that a module holds, read faster than by attribute."""

from typing import Any

from torch import nn

__all__ = ["own_tensors"]


def own_tensors(module: nn.Module) -> dict[str, Any]:
    """Return a module's parameters by name.

    `nn.Module.__getattr__` looks a parameter up as slowly as a small kernel runs; this does not.

    Replicas of `nn.DataParallel` hold tensors among their attributes instead.
    """
    return module._parameters or vars(module)
