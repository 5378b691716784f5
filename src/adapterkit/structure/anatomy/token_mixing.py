"""Choose the piece of a branch in which numbers are asked whether it mixes tokens.

It is asked since the branch's first projections, and since what all of these are made of. Between the two, tokens may be
copied for each expert, or shifted (RWKV's channel mixing); before, several streams of one token mixed. None of it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_

from ..tracing.flow import Flow, bits
from ..tracing.mixing import may_mix, mixes_tokens
from ..tracing.replay import Replays
from .additions import Addition
from .feature_axes import FeatureAxes

__all__ = ["TokenMixing"]


class TokenMixing:
    """Asks numbers whether branches mix tokens.

    Args:
        aside: The set of nodes in low-rank branches beside single layers.
    """

    def __init__(self, flow: Flow, axes: FeatureAxes, replays: Replays, aside: int) -> None:
        self.flow, self.axes, self.replays, self.aside = flow, axes, replays, aside

    def is_in(self, addition: Addition, inside: int, end: int, weighing: int) -> bool | None:
        """Tell whether a position of a branch's end depends on several of those before it.

        Args:
            inside: The set of nodes of the branch.
            end: Its last node.
            weighing: The set of its projections that only choose or weigh what others make.

        Returns:
            None if numbers do not tell.
        """
        projections = inside & self.flow.projections & ~(weighing | self.aside)
        # An einsum may put axes together before it multiplies by a weight, so that features are lost from sight.
        is_clear = all(self.axes.of(i) is not None for _, i in self._taken(projections))
        if is_clear and not may_mix(self.flow, inside):
            return False
        moves = None
        axis_of = self._axis_of(addition, end, self._first_taken(projections))
        for nodes in self._pieces(addition, inside, end, projections):
            try:
                moves = mixes_tokens(self.replays, addition.stream, nodes, end, axis_of)
            except ValueError:  # it cannot be run again (it may lie on the meta device), or features are lost from sight
                return None
            if not moves:
                return False
        return moves

    def _pieces(self, addition: Addition, inside: int, end: int, projections: int) -> Iterator[int]:
        """Yield the two sets of nodes that must mix tokens: since the first projections, and since what all these share."""
        flow, stream = self.flow, addition.stream
        first = (i for i in bits(projections) if not flow.ancestors[i] & projections)
        since = reduce(or_, (flow.between(i, end) | 1 << i for i in first), 0)
        if since & inside:
            yield since & inside
        ends = [i for i in self._first_taken(projections) if i == stream or flow.leads_to(stream, i)]
        shared = [*bits(flow.passed(stream, ends))]
        # Of what all ways lead through, the last of those with the fewest numbers: copies and several streams have more.
        start = min(reversed(shared), key=lambda i: math.prod(flow.nodes[i].shape))
        yield flow.between(start, end) & inside

    def _taken(self, projections: int) -> Iterator[tuple[int, int]]:
        """Yield (projection, node) of what projections take."""
        return ((k, i) for k in bits(projections) for i in self.flow.activations(self.flow.nodes[k]))

    def _first_taken(self, projections: int) -> dict[int, int]:
        """Map each node that a first projection takes → the axis of its features."""
        flow = self.flow
        taken = [(k, i) for k, i in self._taken(projections) if not flow.ancestors[k] & projections]
        is_channels = {i: flow.nodes[k].op.endswith("convolution") for k, i in taken}
        return {i: 1 if is_channels[i] else len(flow.nodes[i].shape) - 1 for i in is_channels}

    def _axis_of(self, addition: Addition, end: int, taken: dict[int, int]) -> Callable[[int], int | None]:
        """Return what tells the axis of a node's features, also where experts gather and scatter tokens."""

        def axis_of(index: int) -> int | None:
            found = [self.axes.of(index), taken.get(index)]
            found += [self.axes.on_the_way(index, i, axis) for i, axis in taken.items()]
            found += [self.axes.of(addition.skip)] if index == end else []
            return next((axis for axis in found if axis is not None), None)

        return axis_of
