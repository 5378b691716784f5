"""The seam for a kernel that does a whole module in one pass, the addition to the host's tensor included.

On a GPU an adapter costs launches and passes over memory, not arithmetic. What surrounds a module, a cast, `x + delta` and
the module's own norm after it, costs as much as the module. A module with `added` does all of that itself.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["FusedAddition", "can_add"]


@runtime_checkable
class FusedAddition(Protocol):
    """A module that can return `x + delta`, where others return the delta.

    It has `forward`, too, which stays the definition: compositions that weigh or mix deltas call that, and `added` agrees
    with it.

    Attributes:
        is_fused: Whether its settings are ones that `added` knows. Read once, when an adapter is activated.
    """

    is_fused: bool

    def added(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return the tensor at the site with the adapter's change.

        It equals, to rounding, in value and in the gradients of `z`, `x` and every parameter,

            x + self(z.to(self.compute_dtype), x).to(x.dtype)           for a module that is called as module(z, x)
            x + self(z.to(self.compute_dtype), x, host).to(x.dtype)     for one that is called as module(z, x, host)

        What the caller sees to: the features are on the last axis of z and x, and their widths are those of the site. x is
        no nested tensor. The module has no forward hooks, which `added` would pass by.

        What `added` sees to: it is right on every device, in every dtype, under autocast, `torch.compile` and `torch.func`;
        where its kernel cannot run, it computes the line above. z and x may be the same tensor, may be strided, may have
        no rows, and are not changed in place.

        Args:
            z: What the adapter reads, in the dtype that it was read in: casting it is the kernel's. Ids stay integers.
            x: The tensor at the site, in the host's dtype.
            host: The host, for modules that change its weight; others do not look at it.

        Shape: z (..., input), x and the result (..., output). The result has x's dtype.
        """
        ...


def can_add(module: nn.Module) -> bool:
    """Tell whether a module's `added` may stand for adding what the module returns."""
    return isinstance(module, FusedAddition) and module.is_fused
