"""Tell which axis of a tensor holds the features, followed from the projection that made them.

A Linear puts its features on the last axis, a convolution on the second. From there an axis is followed through what moves
it: `conv(x).flatten(2).transpose(1, 2)`, the patches of a ViT, has its features on axis 1, then 1, then 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..tracing.flow import Flow
from ..tracing.graph import Operation

__all__ = ["FeatureAxes", "is_depthwise", "is_wide_convolution"]

_CONVOLUTIONS = frozenset(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"))
_MATRIX_PRODUCTS = frozenset(("mm", "bmm", "addmm", "baddbmm", "matmul"))
_CHANNEL_NORMS = ("batch_norm", "group_norm")
_REGROUPED = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"))


class FeatureAxes:
    """Follows the feature axis through a graph."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._found: dict[int, int | None] = {}

    def of(self, index: int) -> int | None:
        """Return the axis of a node's features, counted from the front; None where the graph does not tell."""
        todo = [index]
        while todo:  # not by recursion: a graph is thousands of nodes deep
            i = todo[-1]
            before = [j for j in self._deciding(i) if j not in self._found]
            if i in self._found or not before:
                todo.pop()
                self._found.setdefault(i, self._axis(self.flow.nodes[i]))
            else:
                todo.extend(before)
        return self._found[index]

    def is_last(self, index: int) -> bool | None:
        """Tell whether a node's features lie on its last axis; None where the graph does not tell."""
        node = self.flow.nodes[index]
        inputs = self.flow.activations(node)
        if node.op in _REGROUPED and len(inputs) == 1 and self.flow.nodes[inputs[0]].shape[-1:] == node.shape[-1:]:
            return self.is_last(inputs[0])  # only axes before the last were made one, or several
        axis = self.of(index)
        return None if axis is None else axis == len(node.shape) - 1

    def projects_tokens(self, node: Operation) -> bool:
        """Tell whether a product with a weight runs over the tokens' axis, and leaves features where they are.

        MLP-Mixer does so by a Linear on a transposed tensor or by a pointwise convolution, Linformer with keys and values.
        """
        shown = self.flow.evidence.get(node.index)
        if shown is not None and shown.kind == "projection":  # it mixes features, on the axis that numbers show
            ((reader, at),) = shown.operands
            operand = self.flow.nodes[reader].inputs[at]
            return self.of(operand) not in (len(self.flow.nodes[operand].shape) + shown.input_axis, None)
        if not self.flow.projections >> node.index & 1:
            return False
        taken = self.flow.activations(node)
        if node.op in _CONVOLUTIONS:
            return not is_wide_convolution(self.flow, node) and self.of(taken[0]) not in (1, None)
        if len(taken) != 1:
            return False
        if not self._weighs_from_the_left(node):
            return self.is_last(taken[0]) is False
        axis = self.of(taken[0])
        return axis is not None and axis != len(self.flow.nodes[taken[0]].shape) - 2

    def _weighs_from_the_left(self, node: Operation) -> bool:
        """Tell whether a product is W @ x, which runs over the axis of x before the last; others run over the last."""
        factors = node.inputs[: len(node.taken)][-2:]
        return node.op in _MATRIX_PRODUCTS and len(factors) == 2 and not self.flow.is_constant[factors[1]]

    def on_the_way(self, start: int, end: int, axis: int | None) -> int | None:
        """Return the axis of `start` that becomes this one of `end`; None if that cannot be told, or `end` reads more."""
        way = [end]
        while way[-1] != start:
            before = [i for i in self.flow.nodes[way[-1]].inputs if i == start or self.flow.leads_to(start, i)]
            if len(before) != 1:
                return None
            way += before
        return None if axis is None else self._before(way, axis)

    def _before(self, way: Sequence[int], axis: int) -> int | None:
        """Return the axis that becomes `axis` at the end of a way; None unless exactly one does.

        Args:
            way: The nodes from the end to the start.
        """
        shapes = [self.flow.nodes[i].shape for i in way]
        found = []
        for first in range(len(shapes[-1])):
            now: int | None = first
            for i, before in zip(reversed(way[:-1]), reversed(shapes[1:]), strict=True):
                now = None if now is None else _axis_after(self.flow.nodes[i], before, now)
            found += [first] if now == axis else []
        return found[0] if len(found) == 1 else None

    def _deciding(self, index: int) -> list[int]:
        """List the inputs whose axis decides."""
        return self.flow.activations(self.flow.nodes[index])

    def _projected(self, node: Operation) -> int | None:
        """Return the axis of a projection's features: its own, unless it mixes tokens, for then the features stay in place.

        MLP-Mixer runs a pointwise convolution, or a Linear on a transposed tensor, over the axis of tokens.
        """
        taken = self.flow.activations(node)
        if len(taken) != 1:
            return 1 if node.op in _CONVOLUTIONS else len(node.shape) - 1
        if node.op in _CONVOLUTIONS:
            axis = self._found[taken[0]]
            return axis if axis is not None and len(self.flow.nodes[taken[0]].shape) == len(node.shape) else 1
        if self._weighs_from_the_left(node):
            return self._found[taken[0]]  # whether it mixes features or tokens, these stay where they are
        return None if self.is_last(taken[0]) is False else len(node.shape) - 1

    def _axis(self, node: Operation) -> int | None:
        """Return the axis of a node's features, given those of its inputs."""
        rank, shown = len(node.shape), self.flow.evidence.get(node.index)
        if shown is not None and shown.kind == "projection":
            return rank + shown.axis
        if self.flow.projections >> node.index & 1:
            return self._projected(node)
        if node.op == "embedding" or "layer_norm" in node.op or "rms_norm" in node.op:
            return rank - 1
        if any(name in node.op for name in _CHANNEL_NORMS):
            return 1
        # The first input that tells decides: those of an addition agree, and a gate or a mask often has none.
        for i in self._deciding(node.index):
            axis = self._found[i]
            kept = None if axis is None else _axis_after(node, self.flow.nodes[i].shape, axis)
            if kept is not None:
                return kept
        return None


def is_wide_convolution(flow: Flow, node: Operation) -> bool:
    """Tell whether an operation is a convolution whose kernel covers more than one position."""
    return node.op in _CONVOLUTIONS and any(size > 1 for size in flow.nodes[node.inputs[1]].shape[2:])


def is_depthwise(flow: Flow, node: Operation) -> bool:
    """Tell whether an operation is a convolution of each feature by itself."""
    if node.op not in _CONVOLUTIONS:
        return False
    outputs, inputs = flow.nodes[node.inputs[1]].shape[:2]
    return inputs == 1 < outputs


def _axis_after(node: Operation, shape: tuple[int, ...], axis: int) -> int | None:
    """Return where an operation puts an axis of its input of this shape; None if it does not keep it."""
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
    """Return where an axis lies in another shape of the same numbers in the same order; None if it is not whole there.

    Example: axis 2 of (2, 3, 8) is axis 1 of (6, 8), and none of (2, 3, 2, 4).
    """
    if tuple(old) == tuple(new):
        return axis
    before = math.prod(old[:axis])
    return next((a for a, size in enumerate(new) if size == old[axis] and math.prod(new[:a]) == before), None)
