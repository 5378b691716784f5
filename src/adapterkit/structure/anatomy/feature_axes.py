"""Which axis of a tensor holds the features, followed from the projection that made them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..tracing.flow import Flow
from ..tracing.graph import Operation

__all__ = ["FeatureAxes"]

_CONVOLUTIONS = frozenset(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"))
_CHANNEL_NORMS = ("batch_norm", "group_norm")
_REGROUPED = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"))


class FeatureAxes:
    """Follows the feature axis through a graph: a Linear's is the last, a convolution's the second."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._found: dict[int, int | None] = {}

    def of(self, index: int) -> int | None:
        """The axis of a node's features, counted from the front; None where the graph does not tell."""
        todo = [index]
        while todo:  # not by recursion: a graph is thousands of nodes deep
            i = todo[-1]
            before = [j for j in self._asked(i) if j not in self._found]
            if i in self._found or not before:
                todo.pop()
                self._found.setdefault(i, self._axis(self.flow.nodes[i]))
            else:
                todo.extend(before)
        return self._found[index]

    def is_last(self, index: int) -> bool | None:
        """Whether a node's features lie on its last axis; None where the graph does not tell."""
        node = self.flow.nodes[index]
        inputs = self.flow.activations(node)
        if node.op in _REGROUPED and len(inputs) == 1 and self.flow.nodes[inputs[0]].shape[-1:] == node.shape[-1:]:
            return self.is_last(inputs[0])  # axes before the last were made one
        axis = self.of(index)
        return None if axis is None else axis == len(node.shape) - 1

    def on_the_way(self, start: int, end: int, axis: int | None) -> int | None:
        """The axis of `start` that becomes this one of `end`, which comes of nothing else; None where that is not so."""
        way = [end]
        while way[-1] != start:
            before = [i for i in self.flow.nodes[way[-1]].inputs if i == start or self.flow.leads_to(start, i)]
            if len(before) != 1:
                return None
            way += before
        return None if axis is None else self._before(way, axis)

    def _before(self, way: Sequence[int], axis: int) -> int | None:
        """The axis of the first node on a way, given backwards, that becomes this one of the last; None if not one does."""
        shapes = [self.flow.nodes[i].shape for i in way]
        found = []
        for first in range(len(shapes[-1])):
            now: int | None = first
            for i, before in zip(reversed(way[:-1]), reversed(shapes[1:]), strict=True):
                now = None if now is None else _moved(self.flow.nodes[i], before, now)
            found += [first] if now == axis else []
        return found[0] if len(found) == 1 else None

    def _asked(self, index: int) -> list[int]:
        """The inputs whose axis decides."""
        return [] if self.flow.projections >> index & 1 else self.flow.activations(self.flow.nodes[index])

    def _axis(self, node: Operation) -> int | None:
        rank = len(node.shape)
        if self.flow.projections >> node.index & 1:
            return 1 if node.op in _CONVOLUTIONS else rank - 1
        if node.op == "embedding" or "layer_norm" in node.op or "rms_norm" in node.op:
            return rank - 1
        if any(name in node.op for name in _CHANNEL_NORMS):
            return 1
        for i in self._asked(node.index):
            axis = self._found[i]
            kept = None if axis is None else _moved(node, self.flow.nodes[i].shape, axis)
            if kept is not None:
                return kept
        return None


def _moved(node: Operation, shape: tuple[int, ...], axis: int) -> int | None:
    """Where an operation puts an axis of its input of this shape; None if it does not keep it."""
    rank, numbers = len(shape), node.numbers
    if node.op == "permute":
        return [n % rank for n in numbers].index(axis)
    if node.op in ("transpose", "t", "numpy_T"):
        one, other = (n % rank for n in numbers) if len(numbers) == 2 else (0, rank - 1)
        return {one: other, other: one}.get(axis, axis)
    if node.op == "unsqueeze":
        return axis + (axis >= numbers[0] % (rank + 1))
    if node.op in _REGROUPED or len(node.shape) != rank:
        return _regrouped(shape, node.shape, axis)
    return axis if node.shape[axis] == shape[axis] else None


def _regrouped(old: Sequence[int], new: Sequence[int], axis: int) -> int | None:
    """Where an axis lies in another shape of the same numbers in the same order, if it is whole there."""
    before = math.prod(old[:axis])
    return next((a for a, size in enumerate(new) if size == old[axis] and math.prod(new[:a]) == before), None)
