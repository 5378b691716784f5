"""What a model says of itself while it runs: here is the branch of this sub-layer, there the sum.

Each of the generated blocks hands its branches and sums through `branch` and `total`. They return what they were given;
unless a formula is being tried. Then they return what the formula makes of it. So the right output of a model with adapters
is computed by the model itself, from the definition of a preset, without a hook and without a path:

    s = total(place, x + branch(place, part(norm(x)), reads=x))

An adapter that is missing, too many, at another tensor, on another axis, or reads something else gives another output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Formula", "Place", "branch", "total", "trying"]

Norm = Callable[[Tensor], Tensor]


@dataclass
class Place:
    """A sub-layer, as the generator made it.

    Attributes:
        kinds: What it does, in the library's words; where two words are as right, both.
        axis: The axis of the features in what it adds.
        is_last: Whether its block ends in it, on its stream.
    """

    kinds: tuple[str, ...]
    axis: int
    is_last: bool = False


class Formula:
    """What a preset is defined to do at each branch and each sum; nothing, if a subclass does not say."""

    def branch(self, place: Place, x: Tensor, reads: tuple[Tensor, ...]) -> Tensor:
        """Return the adapted branch. `reads`: the stream that it comes of, in each way of saying which that is."""
        return x

    def total(self, place: Place, s: Tensor, norm: Norm | None, stage: str) -> Tensor:
        """Return the adapted sum.

        Args:
            norm: What follows it in a post-norm block.
            stage: Which of two tensors it is that may be called the sum, where there are two; else empty.
        """
        return s


_tried: list[Formula] = []


@contextmanager
def trying(formula: Formula) -> Iterator[None]:
    """Make every branch and sum what a formula makes of it."""
    _tried.append(formula)
    try:
        yield
    finally:
        _tried.pop()


def branch(place: Place, x: Tensor, *reads: Tensor) -> Tensor:
    """Hand on a branch, right before it is added (or scaled by a function, which no hook can follow)."""
    return _tried[-1].branch(place, x, reads) if _tried else x


def total(place: Place, s: Tensor, norm: Norm | None = None, stage: str = "") -> Tensor:
    """Hand on the sum of stream and branch, before the norm of a post-norm block."""
    return _tried[-1].total(place, s, norm, stage) if _tried else s
