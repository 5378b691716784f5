"""What modules may say of themselves, for code that handles the modules of all methods alike.

A module has what stands in one of these protocols where that is true of it. Code that attaches, composes, merges or
combines adapters asks here, and knows no method by its name.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "BiasDelta",
    "LowRankDelta",
    "ReadsBareOutput",
    "Summable",
    "TakesBack",
    "WeightDelta",
    "reads_bare_output",
    "takes_back",
    "why_not_summed",
]


@runtime_checkable
class ReadsBareOutput(Protocol):
    """A module that needs what its host itself returned: of one adapter, nothing may come before it at its host."""

    reads_bare_output: bool


@runtime_checkable
class TakesBack(Protocol):
    """A module that may undo what its adapter did at another site, as the inverse of an invertible adapter does.

    In a stack such modules run in the opposite order: what came last is taken back first.

    Attributes:
        is_inverse: Whether this one does.
    """

    is_inverse: bool


@runtime_checkable
class WeightDelta(Protocol):
    """A module that does nothing but change its host's weight."""

    def weight_delta(self) -> Tensor:
        """Return what is added to the host's weight. Shape: as the weight."""
        ...


@runtime_checkable
class LowRankDelta(Protocol):
    """A module that does nothing but change its host's weight by a product of two thin tensors."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B, laid out as a LoRA's. Shape: `LowRank.a_shape` and `LowRank.b_shape`."""
        ...


@runtime_checkable
class BiasDelta(Protocol):
    """A module that may change its host's bias beside the weight."""

    def bias_delta(self) -> Tensor | None:
        """Return what is added to the host's bias, or None if it has none. Shape: (out,)."""
        ...


@runtime_checkable
class Summable(Protocol):
    """A module that knows whether a weighted sum of its change and another's means anything."""

    def why_not_summed(self) -> str | None:
        """Explain why its change cannot be part of a sum ("is a DoRA, whose …"), or return None if it can."""
        ...


def reads_bare_output(module: nn.Module) -> bool:
    """Tell whether a module needs what its host itself returned."""
    return isinstance(module, ReadsBareOutput) and module.reads_bare_output


def takes_back(module: nn.Module) -> bool:
    """Tell whether a module undoes what its adapter did at another site."""
    return isinstance(module, TakesBack) and module.is_inverse


def why_not_summed(module: nn.Module) -> str | None:
    """Explain why a module's change cannot be part of a weighted sum; None if it can, or the module does not say."""
    return module.why_not_summed() if isinstance(module, Summable) else None
