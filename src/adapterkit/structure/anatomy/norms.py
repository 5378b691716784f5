"""Tell where a block normalises around a branch: by a module, by torch's function, or by hand.

    x = norm(x + f(x))      "post": what is normalised is the sum, and the result is the next stream
    x = x + f(norm(x))      "pre": what is normalised is the stream, and the branch computes from that

A module is taken for a norm if it runs an operation that norms are made of, and holds no matrices. Where none is found,
numbers are asked (`Replays.is_scale_free`): what makes the same of twice its input normalises it, however it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..tracing.flow import NORMS, SCALES, VIEWS, Flow, bits
from ..tracing.graph import ModuleCall
from ..tracing.replay import Replays
from .additions import Addition
from .blocks import within
from .branches import Branch
from .description import Norm
from .products import first_of, last_of

__all__ = ["Norms"]

_CLIPS = frozenset(("clamp", "clamp_"))  # what keeps a sum in the range of half precision, in front of its norm


class Norms:
    """Finds the norms around branches.

    Args:
        additions: The steps of the residual streams.
    """

    def __init__(self, flow: Flow, additions: list[Addition], replays: Replays) -> None:
        self.flow, self.additions, self.replays = flow, additions, replays

    def kind(self, branch: Branch, *, is_after: bool) -> Norm:
        """Tell where the block normalises around a branch.

        Args:
            is_after: It normalises the sum.
        """
        # Last things first: (before the branch, at its end) decide, and a norm after the addition counts without either.
        is_at_end = self._is_at_end(branch)
        if any(self._takes_stream(call, branch) for call in self.flow.norm_calls) or self._is_before_by_hand(branch):
            return "sandwich" if is_at_end else "pre"
        if is_at_end:
            return "end"
        return "post" if is_after else "none"

    def _takes_stream(self, call: ModuleCall, branch: Branch) -> bool:
        """Tell whether a norm takes the stream, mixed or not with another, and the branch computes from what it returns."""
        flow, root = self.flow, self.flow.source(branch.addition.stream)
        if not any(branch.inside >> i & 1 for _, i in call.outputs):
            return False
        # What was projected since is no stream any more: the norm of an attention's queries is not the block's.
        return any(
            flow.source(i) == root or (flow.leads_to(root, i) and not flow.between(root, i) & flow.endings)
            for _, i in call.inputs
        )

    def _is_before_by_hand(self, branch: Branch) -> bool:
        """Tell whether what the branch's first projections read is the stream, normalised by no module."""
        flow, root = self.flow, self.flow.source(branch.addition.stream)
        read = {j for i in bits(first_of(flow, branch)) for j in flow.activations(flow.nodes[i])}
        return any(self._normalises(root, i) for i in read if flow.leads_to(root, i))

    def _is_at_end(self, branch: Branch) -> bool:
        """Tell whether the branch's output is normalised before it is added."""
        flow = self.flow
        end = flow.source(branch.end, VIEWS | SCALES)
        if any(i in (end, branch.end) for call in flow.norm_calls for _, i in call.outputs):
            return True
        last = list(bits(last_of(flow, branch)))
        return len(last) == 1 and last[0] != end and self._normalises(last[0], branch.end)

    def is_end_by_hand(self, branch: Branch) -> bool:
        """Tell whether what the branch's module returns is normalised, by no module, before it is added."""
        if branch.call is None or not branch.scales:  # it is added as it is
            return False
        call, path = branch.call
        return self._normalises(dict(call.outputs)[path], branch.end)

    # --- after the addition -------------------------------------------------------------------------------------------

    def after(self, branch: Branch) -> ModuleCall | None:
        """Return the norm, in the block or beside it, that takes the sum and makes the stream of it; None if none does."""
        flow, node = self.flow, branch.addition.node.index
        if self._goes_on(node):
            return None
        readers = list(flow.readers_through_views(node))
        for call in self._candidates(branch):
            takes = any(flow.unscaled(flow.source(i, VIEWS | _CLIPS)) == flow.source(node) for _, i in call.inputs)
            if not takes or call.path is None or not call.outputs:
                continue
            if within(call.path, branch.block) or self._is_beside(call, branch, readers):
                return call
        return None

    def _candidates(self, branch: Branch) -> Iterator[ModuleCall]:
        """Yield the calls of norms; then those that make what the numbers say is normalised, of whatever operations."""
        yield from self.flow.norm_calls
        made = self._normalised(branch)
        yield from (
            c for c in self.flow.calls if made in {i for _, i in c.outputs} and c.end is not None and self.flow.is_small(c)
        )

    def is_after_by_hand(self, branch: Branch) -> bool:
        """Tell whether the sum is normalised; where `after` is None, a function or a few operations do it."""
        return self._normalised(branch) is not None

    def _goes_on(self, node: int) -> bool:
        """Tell whether the next branch is added to a sum itself, or to what the sum was put together with."""
        joined = (i for i in self.flow.readers_through_views(node) if self.flow.nodes[i].op == "cat")
        return self.is_stream(node) or any(map(self.is_stream, joined))

    def is_stream(self, node: int) -> bool:
        """Tell whether something is added to a node in turn."""
        return any(node in (a.stream, self.flow.source(a.skip)) for a in self.additions)

    def _is_beside(self, call: ModuleCall, branch: Branch, readers: list[int]) -> bool:
        """Tell whether a norm outside of the block, called by what adds, is the block's: a model may hold its norms itself.

        It is if nothing else reads the sum, or if something is added to what it returns.

        Args:
            readers: What reads the sum.
        """
        if call.parent is not branch.addition.node.call:
            return False
        is_alone = bool(readers) and all(call.start <= i < (call.end or 0) for i in readers)
        return is_alone or self.is_stream(call.outputs[0][1])

    def _normalised(self, branch: Branch) -> int | None:
        """Return the sum as it is normalised: the stream of the next step, or what the block returns; None if it is not."""
        node = branch.addition.node.index
        if self._goes_on(node):
            return None
        return next((i for i in self._following(branch) if self._normalises(node, i)), None)

    def _following(self, branch: Branch) -> Iterator[int]:
        """Yield what the sum may go on as: the streams of steps that follow it, and what calls of its block return."""
        flow, node = self.flow, branch.addition.node.index
        for addition in self.additions:
            yield from (i for i in (addition.stream, flow.source(addition.skip)) if flow.leads_to(node, i))
        for call in flow.calls:
            if branch.block and within(call.path or "", branch.block) and call.end is not None and call.end > node:
                yield from (flow.source(i) for _, i in call.outputs if flow.leads_to(node, i))

    def _normalises(self, start: int, end: int) -> bool:
        """Tell whether something between two nodes, where nothing is projected, makes the same of twice its input."""
        flow = self.flow
        if flow.source(end) == start or flow.between(start, end) & flow.endings:
            return False
        try:
            return self.replays.is_scale_free(start, end)
        except ValueError:
            return any(flow.nodes[i].op in NORMS for i in bits(flow.between(start, end)))  # then its operations must do

    def runs_again(self, path: str, branch: Branch) -> bool:
        """Tell whether a module runs more than once in one call of the block, so that a hook sees other tensors as well."""

        def around(call: ModuleCall) -> ModuleCall | None:
            # One that runs beside the block is counted in what calls it.
            return next((outer for outer in call.around() if outer.path == branch.block), call.parent)

        runs = Counter(around(call) for call in self.flow.calls if call.path == path)
        return max(runs.values()) > 1
