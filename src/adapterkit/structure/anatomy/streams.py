"""Find the modules at which a hook sees a residual stream: those that take it, and those that return a step's sum."""

from __future__ import annotations

from torch import nn

from .. import pytree
from ..tracing.flow import bits
from ..tracing.graph import ModuleCall
from .blocks import within
from .branches import Branch, BranchReader
from .description import ModuleInput, ModuleOutput

__all__ = ["Streams"]


class Streams:
    """Finds modules that take or return the streams of branches."""

    def __init__(self, reader: BranchReader) -> None:
        self.reader, self.flow, self.axes = reader, reader.flow, reader.axes

    def taker(self, branch: Branch, stream: int) -> ModuleInput | None:
        """Return the last module, in the block or beside it, that takes a stream before the branch's output is made.

        A hook on it sees the stream, which an adapter beside the branch needs. It is None if no module takes it.

        Args:
            stream: The node that the branch is computed from, or added to.
        """
        flow, made = self.flow, _made(branch)
        root, shape = flow.source(stream), flow.nodes[made].shape
        # Experts gather tokens and scatter them again, behind which features are lost from sight: the addition knows best.
        axis = self.axes.on_the_way(made, branch.end, self.axes.of(branch.addition.skip))
        axis = self.axes.of(made) if axis is None else axis
        taker = None
        for call in flow.calls:
            if call.path is None or not self._may_take_the_stream(call, branch, root, made):
                continue
            for path, i in call.inputs:
                # A path of two is an argument of its own; a longer one lies in a container, which no setting can name.
                is_stream = len(path) == 2 and flow.source(i) == root
                # It must lie as the branch's output does: then one adapter can add to the latter what it reads here.
                if is_stream and flow.nodes[i].shape == shape and self.axes.of(i) in (axis, None):
                    taker = ModuleInput(call.path, _argument(path))
        return taker

    def entering(self, branch: Branch) -> int:
        """Return the node that a branch is computed from: the stream; of several streams, the mixture that enters it."""
        flow, stream, made = self.flow, branch.addition.stream, _made(branch)
        passed = flow.passed(stream, [made]) & ~(1 << stream | 1 << made) if branch.addition.is_mixed else 0
        return next((i for i in bits(passed) if flow.nodes[i].shape == flow.nodes[made].shape), stream)

    def _may_take_the_stream(self, call: ModuleCall, branch: Branch, stream: int, made: int) -> bool:
        """Tell whether a call is near the branch, runs before its output is made, and can carry a hook for this alone."""
        addition = branch.addition
        is_near = within(call.path or "", branch.block) or call.parent is addition.node.call
        if not is_near or not stream < call.start <= made:
            return False
        # An nn.Sequential would run what a hook's site adds to it; an nn.Identity is often put in the place of others.
        is_bad_host = isinstance(call.module, (nn.Sequential, nn.Identity))
        return not is_bad_host and self.reader.repeats[call.path, id(call.parent)] <= 1

    def sum(self, branch: Branch) -> ModuleOutput | None:
        """Return the outermost module of the block that returns the sum, which nothing reads before that."""
        flow, node = self.flow, branch.addition.node.index
        first_reader = min(
            flow.readers_through_views(node), default=len(flow.nodes)
        )  # nothing reads it: the model returns it
        found = [
            (call, path)
            for call in flow.calls
            if self._ends_with_the_sum(call, branch, first_reader)
            for path, i in call.outputs
            if flow.source(i) == node and flow.nodes[i].shape == flow.nodes[node].shape
        ]
        if not found:
            return None
        call, path = min(found, key=lambda pair: len(list(pair[0].around())))
        return self.reader.output_of(call, path)

    def _ends_with_the_sum(self, call: ModuleCall, branch: Branch, first_reader: int) -> bool:
        """Tell whether a call of the block ended after the addition and before anything read the sum."""
        node = branch.addition.node
        if call.path is None or call.end is None or not within(call.path, branch.block):
            return False
        if not call.start <= node.index < call.end <= first_reader:
            return False
        # A module that runs several times returns other tensors, too; unless the addition is inside: ALBERT's block.
        is_around = any(call is around for around in (node.call.around() if node.call else ()))
        return is_around or self.reader.repeats[call.path, id(call.parent)] <= 1


def _made(branch: Branch) -> int:
    """Return the node that a branch's module returns; its end where none does."""
    return dict(branch.call[0].outputs)[branch.call[1]] if branch.call else branch.end


def _argument(path: pytree.Path) -> pytree.Argument:
    """Return an argument of a call, from its path in `(args, kwargs)`: (0, 1) is the second by position."""
    return (int(path[1]), None) if path[0] == 0 else (None, str(path[1]))
