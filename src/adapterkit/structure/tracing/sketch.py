"""Recognise rows in a tensor by a few sums of it: the tensors of two rows, and of each alone, need not be kept.

Of what a module returns for both rows a sketch is kept, and one of what it returns for each alone. Joined along the axis of
the rows, the latter two must have the sums of the former.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .row_layout import NO_ROWS, UNCLEAR, RowLayout

__all__ = ["Sketch", "is_denied", "layout_seen", "sketch"]

# How far the sums of a row in a batch may be from those that it has alone, as a part of the largest: float32; narrower.
_ROUNDING, _COARSE = 1e-4, 0.02


class Sketch(NamedTuple):
    """What is kept of a tensor to recognise it: its shape, and sums that tell its entries apart.

    Attributes:
        shape: Its shape.
        along: For each axis, a weighted sum of the entries at each index. Of (2, 3, 8): shapes (2,), (3,), (8,).
        tolerance: How far sums may be apart, as a part of the largest.
    """

    shape: tuple[int, ...]
    along: tuple[Tensor, ...]
    tolerance: float


def sketch(tensor: Tensor) -> Sketch:
    """Return the sketch of a tensor of any shape."""
    numbers = tensor.detach().float().nan_to_num().clamp(-1e4, 1e4)  # masks hold the least numbers that there are
    along = []
    # Weights cos(0), cos(1), … differ from one another, so that an exchange of two entries changes the sum.
    for axis in range(tensor.dim()):
        lines = numbers.movedim(axis, 0).unsqueeze(-1).flatten(1)
        along.append(lines @ torch.cos(torch.arange(lines.shape[1], device=lines.device, dtype=lines.dtype)))
    return Sketch(tuple(tensor.shape), tuple(along), _ROUNDING if tensor.element_size() > 2 else _COARSE)


def layout_seen(both: Sketch, one: Sketch, other: Sketch, tokens: Collection[int] = ()) -> RowLayout | None:
    """Return where the rows lie in a tensor of both, given what each alone has there; None if that does not show it."""
    if both.shape == one.shape == other.shape:
        is_same = all(_same(both, a, b) for alone in (one, other) for a, b in zip(both.along, alone.along, strict=True))
        return NO_ROWS if is_same else None
    for axis in _joining(both, one, other):
        orders = _orders(both, one, other, axis)
        if len(one.along[axis]) == 1 and orders:
            return RowLayout(axis)
        if len(orders) == 1:  # of equal sums, either may be meant
            count = len(one.along[axis])
            return RowLayout(axis, is_flat=True, of_tokens=count in tokens, in_turn=orders == ["in turn"])
    return UNCLEAR if _several_each(both, one, other) else None


def _orders(both: Sketch, one: Sketch, other: Sketch, axis: int) -> list[str]:
    """List the orders in which the indices of two rows on an axis make those of both: one row, then the other; in turn."""
    found, first, second = (each.along[axis] for each in (both, one, other))
    orders = {"one by one": torch.cat([first, second]), "in turn": torch.stack([first, second], 1).flatten()}
    return [name for name, wanted in orders.items() if _same(both, found, wanted)]


def _several_each(both: Sketch, one: Sketch, other: Sketch) -> bool:
    """Tell whether each row has several indices of an axis, or another number of them than the other row."""
    if not len(both.shape) == len(one.shape) == len(other.shape):
        return False
    sizes = list(zip(both.shape, one.shape, other.shape, strict=True))
    differing = [(two, a, b) for two, a, b in sizes if not two == a == b]
    return len(differing) == 1 and all(two == a + b and (a, b) != (1, 1) for two, a, b in differing)


def is_denied(both: Sketch, one: Sketch, other: Sketch) -> bool:
    """Tell whether a tensor has the shape that the two rows make together, but other numbers than they have alone."""
    orders = [_orders(both, one, other, axis) for axis in _joining(both, one, other)]
    return bool(orders) and not any(orders)


def _joining(both: Sketch, one: Sketch, other: Sketch) -> Iterator[int]:
    """Yield the axes along which what the two rows have alone, equally much, joins to the shape of `both`."""
    for axis in range(len(both.along)):
        shapes = {(*s.shape[:axis], *s.shape[axis + 1 :]) for s in (both, one, other)}
        if len(shapes) == 1 and 2 * one.shape[axis] == 2 * other.shape[axis] == both.shape[axis]:
            yield axis


def _same(both: Sketch, found: Tensor, wanted: Tensor) -> bool:
    """Tell whether two vectors of sums are equal, to the rounding of the dtype."""
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= both.tolerance * scale).all())
