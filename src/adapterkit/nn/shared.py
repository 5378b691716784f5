"""Tensors that the modules of one adapter share: one module holds them, the others know them.

They lie in a module that each of these finds as `self.shared`. The owner has it for a child, so that it is trained, moved,
saved and counted there, once. To the others it is a plain attribute, which `state_dict`, `to` and `parameters` pass over.
"""

from collections.abc import Iterable

from torch import nn

__all__ = ["SHARED", "borrowed", "share"]

# The attribute's name in each of the modules, and in the keys of the owner's `state_dict`.
SHARED = "shared"


def share(shared: nn.Module, modules: Iterable[nn.Module], *, owner: nn.Module) -> None:
    """Have each of the modules find `shared` as `self.shared`.

    Args:
        shared: The module that holds the tensors.
        modules: Those that share them, the owner among them.
        owner: The one whose child `shared` becomes. The first in the model's order: it is loaded first.
    """
    for module in modules:
        if module is owner:
            module._modules[SHARED] = shared
        else:
            # Past nn.Module.__setattr__, which would make it a child of this one, too.
            module.__dict__[SHARED] = shared


def borrowed(module: nn.Module) -> nn.Module | None:
    """Return what a module shares with others while another one holds it; None if it shares nothing or is the owner."""
    found = module.__dict__.get(SHARED)
    return found if isinstance(found, nn.Module) else None
