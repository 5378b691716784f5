"""Slices of an axis: the output features of a fused projection that belong to the query, the key, the value."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError

__all__ = ["SliceLayout", "Slices"]

# e.g. (("q", ((0, 64),)), ("v", ((128, 192),))), or with the ranges of two heads (("q", ((0, 8), (24, 32))), …).
Slices = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
"""(name, ranges) of each slice; a range is (start, stop). Empty: one slice, which is everything."""


class SliceLayout:
    """Where the features of some slices lie on an axis, and how tensors that know only these are put there.

    The covered features keep their order on the axis: row i of such a tensor is the i-th feature that any slice covers.
    No index tensors: they would be buffers, lost on the meta device. Heads that repeat (query, key and value of one head
    after another) are one view with an axis of repeats, so that many ranges cost no more than few.

    Args:
        width: Features on the axis.
        slices: The slices; () for all features as one slice.

    Raises:
        ConfigError: A range is empty or outside the axis, or two overlap.
    """

    def __init__(self, width: int, slices: Slices = ()) -> None:
        self.width, self.slices, self.count = width, slices, max(1, len(slices))
        self.is_whole = not slices
        # e.g. [0, 0, -1, -1, 1, 1] for q (0, 2) and v (4, 6) of 6 features; as runs [(0, 2), (-1, 2), (1, 2)].
        owners = _owners(width, slices)
        self.covered = sum(owner >= 0 for owner in owners)
        # Heads that repeat: one slice has as many ranges as there are heads. True of all features, or it is one period.
        repeats = len(slices[0][1]) if slices else 1
        period, rest = divmod(width, repeats)
        if rest or owners != owners[:period] * repeats:
            period, repeats = width, 1
        self._repeats = repeats
        self._runs = _runs(owners[:period])  # (slice or -1, features), of one period

    def sizes(self) -> list[int]:
        """Return how many features each slice has."""
        return [sum(size for owner, size in self._runs if owner == which) * self._repeats for which in range(self.count)]

    def pick(self, values: Tensor, axis: int = -1) -> Tensor:
        """Pick the values of the covered features: `pick(spread(v))` is v.

        Shape: values (..., width, ...), result (..., covered, ...), on `axis`.
        """
        if self.is_whole:
            return values
        axis %= values.dim()
        view = torch.unflatten(values, axis, (self._repeats, -1))
        # accumulate gives one start too many, the end: strict=False drops it.
        starts = accumulate((size for _, size in self._runs), initial=0)
        own = [(start, size) for start, (owner, size) in zip(starts, self._runs, strict=False) if owner >= 0]
        return torch.cat([view.narrow(axis + 1, *run) for run in own], axis + 1).flatten(axis, axis + 1)

    def spread(self, values: Tensor, axis: int = -1) -> Tensor:
        """Put values of the covered features in their places, zeros elsewhere.

        Shape: values (..., covered, ...), result (..., width, ...), on `axis`.
        """
        if self.is_whole:
            return values
        axis %= values.dim()
        pieces = (piece for _, piece in self._pieces(values, axis))
        return torch.cat(list(pieces), axis + 1).flatten(axis, axis + 1)

    def blocks(self, values: Tensor) -> Tensor:
        """Spread the rows of a matrix, and the columns by slice: slice p has columns p * rank to (p + 1) * rank.

        Shape: values (..., covered, rank), result (..., width, slices * rank).
        """
        if self.is_whole:
            return values
        rank, axis = values.shape[-1], values.dim() - 2
        pieces = [
            # Zeros for the columns of the slices before and after. What no slice has is all zeros, in whichever columns.
            F.pad(piece, (max(owner, 0) * rank, (self.count - 1 - max(owner, 0)) * rank))
            for owner, piece in self._pieces(values, axis)
        ]
        return torch.cat(pieces, axis + 1).flatten(axis, axis + 1)

    def gather(self, values: Sequence[Tensor]) -> Tensor:
        """Bring the rows of each slice into the order of the covered features.

        Shape: values[p] (size of slice p, ...), result (covered, ...).
        """
        if self.is_whole:
            return values[0]
        views = [torch.unflatten(value, 0, (self._repeats, -1)) for value in values]  # (repeats, size / repeats, ...), each
        taken, pieces = [0] * self.count, []
        for owner, size in self._runs:
            if owner >= 0:
                pieces.append(views[owner][:, taken[owner] : taken[owner] + size])
                taken[owner] += size
        return torch.cat(pieces, 1).flatten(0, 1)

    def split(self, values: Tensor) -> list[Tensor]:
        """Return the rows of each slice; undo `gather`. Shape: values (covered, ...), result[p] (size of slice p, ...)."""
        if self.is_whole:
            return [values]
        pieces: list[list[Tensor]] = [[] for _ in range(self.count)]
        for owner, piece in self._pieces(values, 0):
            if owner >= 0:
                pieces[owner].append(piece)
        return [torch.cat(own, 1).flatten(0, 1) for own in pieces]

    def _pieces(self, values: Tensor, axis: int) -> Iterable[tuple[int, Tensor]]:
        """Yield each run: its slice and its values, with an axis of repeats before `axis`; zeros where no slice is."""
        view = torch.unflatten(values, axis, (self._repeats, -1))
        start = 0
        for owner, size in self._runs:
            if owner < 0:
                shape = (*view.shape[: axis + 1], size, *view.shape[axis + 2 :])
                yield owner, view.new_zeros(shape)
            else:
                # `values` has no features for runs of no slice, so only these move the start.
                yield owner, view.narrow(axis + 1, start, size)
                start += size


def _owners(width: int, slices: Slices) -> list[int]:
    """Return the index of the slice that each feature belongs to, -1 for none."""
    if not slices:
        return [0] * width
    owners = [-1] * width
    for index, (name, ranges) in enumerate(slices):
        for start, stop in ranges:
            if not 0 <= start < stop <= width:
                raise ConfigError(f"slice {name!r} has the range ({start}, {stop}), which is not within {width} features")
            if any(owner >= 0 for owner in owners[start:stop]):
                raise ConfigError(f"slice {name!r} has the range ({start}, {stop}), which overlaps another range")
            owners[start:stop] = [index] * (stop - start)
        if not ranges:
            raise ConfigError(f"slice {name!r} has no range; give it one, or leave it out")
    return owners


def _runs(owners: list[int]) -> list[tuple[int, int]]:
    """Join neighbours with one owner: list (owner, how many)."""
    runs: list[tuple[int, int]] = []
    for owner in owners:
        if runs and runs[-1][0] == owner:
            runs[-1] = (owner, runs[-1][1] + 1)
        else:
            runs.append((owner, 1))
    return runs
