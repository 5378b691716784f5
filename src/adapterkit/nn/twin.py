"""What the further sites of a tied Parameter hold: the module that the first one trains, without holding it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TiedModule", "trained"]


class TiedModule(nn.Module):
    """Stand for another module of the same adapter, without parameters: those train, move, save and count there, once.

    Args:
        trained: The module; no child, so that it is found under one name.
    """

    trained: Any

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.__dict__["trained"] = trained  # past nn.Module.__setattr__, which would make it a child

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        dtype: torch.dtype = self.trained.compute_dtype
        return dtype

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the Parameter with its change, on the weight's device: a replica's is not where the trained module is."""
        home = next((parameter.device for parameter in self.trained.parameters()), weight.device)
        changed: Tensor = self.trained.adapted(weight.to(home))
        return changed.to(weight.device)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that change if the adapter is merged into them."""
        merged: dict[str, Tensor] = self.trained.merged(tensors)
        return merged

    def extra_repr(self) -> str:
        """Return the type of the module that it stands for, for `print(model)`."""
        return type(self.trained).__name__


def trained(module: nn.Module) -> nn.Module:
    """Return the module that holds what a site trains: itself, or the one that it stands for."""
    found: nn.Module = module.trained if isinstance(module, TiedModule) else module
    return found
