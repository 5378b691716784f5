"""Read branches off residual additions: what computes each, and the module that yields it.

The module is where an adapter goes. Between it and the addition there may be scales (LayerScale, dropout), and one addition
may add the sum of several branches: x + (attention(z) + mlp(z)).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ...errors import TargetError
from .. import pytree
from ..base_tensors import base_parameters
from ..hosts import holds_described_weights, resolve_host
from ..tracing.flow import BOUNDED, SCALES, VIEWS, Flow, bits
from ..tracing.graph import ADDITIONS, ModuleCall
from ..tracing.replay import Replays
from .additions import Addition, addends
from .attention_operands import Attentions
from .description import Kind, ModuleOutput
from .feature_axes import FeatureAxes
from .kinds import Kinds
from .residual import residual_additions, side_branches
from .routers import routers, weighs_by_softmax
from .token_mixing import TokenMixing

__all__ = ["Branch", "BranchReader", "Turn"]

_JOINS = ("stack", "cat")  # what is put together from several modules' outputs is no one module's


@dataclass(eq=False)
class Turn:
    """The branches of one block, in the order in which they run.

    Attributes:
        is_block: Whether they are one: False of what is beside the blocks, such as an embedding of positions.
    """

    branches: list[Branch]
    is_block: bool = True


@dataclass
class Branch:
    """A branch of an addition while it is being understood.

    Attributes:
        addition: The addition.
        end: The node that is added: its operand, or one addend of that.
        inside: The set of nodes between the stream and the end.
        is_parallel: Whether the addition adds several branches at once.
        kind: What it does.
        routers: The set of its projections that only choose and weigh what others make.
        aside: The set of nodes in low-rank branches beside single layers.
        is_moe: Whether it routes tokens to experts.
        call: The module call that yields it, and where in its output it lies; None if no module does.
        scales: Operations between that and the addition that change values.
        block: The path of its block; None outside of any. Set by `find_blocks`, as `turn` is.
        turn: The turn of its block, with the branches of the same one.
    """

    addition: Addition
    end: int
    inside: int
    is_parallel: bool
    kind: Kind
    routers: int
    aside: int
    is_moe: bool
    call: tuple[ModuleCall, pytree.Path] | None
    scales: tuple[str, ...]
    block: str | None = None
    turn: Turn | None = None


class BranchReader:
    """Reads branches off a flow.

    Attributes:
        additions: The steps of residual streams; `every_addition`: with those that only look like one.
        aside: The set of nodes in low-rank branches beside single layers.
        attentions: Tells of the attentions among the branches what makes their queries, keys and values.
        repeats: Counts how often a module ran, by (path, `id` of the call that it was made in).
    """

    def __init__(self, flow: Flow, modules: dict[str, nn.Module]) -> None:
        self.flow, self.modules, self.axes = flow, modules, FeatureAxes(flow)
        self.additions, self.every_addition = residual_additions(flow)
        self.replays = Replays(flow)
        self.aside = side_branches(flow, self.additions, self.every_addition)
        self.attentions = Attentions(flow, self.axes, self.aside)
        self.kinds = Kinds(self.attentions, TokenMixing(flow, self.axes, self.replays, self.aside))
        self.repeats = Counter((call.path, id(call.parent)) for call in flow.calls)

    def branches(self, addition: Addition) -> Iterator[Branch]:
        """Yield the branch of an addition; several where it adds the sum of parallel branches, scaled or not."""
        total, shared_scales = self._unscaled(addition.branch)
        ends = list(self._parallel(addition, total))
        # One end, or a module returns their sum: then it is one branch, and what scales it is looked for from the addition.
        on_the_way = self.flow.between(total, addition.branch) | 1 << addition.branch
        is_returned = any(list(self._finished(addition, i)) for i in bits(on_the_way))
        if is_returned:  # an attention and a feed-forward are two, whoever returns their sum; experts are one
            ends = list(self._of_two_kinds(addition, total))
        if len(ends) == 1:
            ends, shared_scales = [addition.branch], ()
        for end in ends:
            inside = self._inside(addition, end)
            call, scales = self._module_of(addition, end)
            weighing = 0 if inside & self.flow.attentions else routers(self.flow, inside, end)
            kind, is_moe = self.kinds.of(addition, inside, end, weighing)
            weighing *= kind == "feedforward"
            is_moe = is_moe or weighs_by_softmax(self.flow, weighing, inside)
            # addcmul and the like scale as they add.
            added = () if addition.node.op.startswith("add") and "mul" not in addition.node.op else (addition.node.op,)
            scaled = (*scales, *shared_scales, *added)
            yield Branch(addition, end, inside, len(ends) > 1, kind, weighing, self.aside, is_moe, call, scaled)

    def _inside(self, addition: Addition, end: int) -> int:
        """Return the set of nodes between the stream and the end, without those of steps before it in the same block.

        In (x + attention(x)) + mlp(x + attention(x)) the feed-forward's branch does not hold the attention.
        """
        flow = self.flow
        inside = flow.between(addition.stream, end)
        for other in self.additions:
            i = other.node.index
            if inside >> i & 1 and flow.between(i, end) & flow.endings:
                inside &= ~(flow.ancestors[i] | 1 << i)
        return inside

    def _unscaled(self, end: int) -> tuple[int, tuple[str, ...]]:
        """Return the node that a chain of constant factors starts from, and those factors' operations."""
        start = self.flow.unscaled(end)
        ops = (self.flow.nodes[i].op for i in bits(self.flow.between(start, end)))
        return start, tuple(op for op in ops if op not in VIEWS)

    def _parallel(self, addition: Addition, end: int) -> Iterator[int]:
        """Yield the addends of a sum that no module returns, if each is a branch of its own; else the node itself."""
        flow, node = self.flow, self.flow.nodes[end]
        operands = addends(flow, node) or flow.stacked(end) if not list(self._finished(addition, end)) else ()
        if operands and all(flow.between(addition.stream, i) & flow.projections for i in operands):
            for i in operands:
                yield from self._parallel(addition, i)
        else:
            yield end

    def _of_two_kinds(self, addition: Addition, end: int) -> Iterator[int]:
        """Yield the addends of a sum that a module returns if one attends and the other projects twice; else the sum."""
        flow = self.flow
        operands = addends(flow, flow.nodes[end]) or ()
        inside = [flow.between(addition.stream, i) for i in operands if flow.leads_to(addition.stream, i)]
        attends = [bool(nodes & flow.attentions) for nodes in inside]
        # By matrices: what convolves an attention's values, and is added to what it returns, is part of that.
        linear = [[i for i in bits(nodes & flow.projections) if "conv" not in flow.nodes[i].op] for nodes in inside]
        is_chained = all(any(flow.leads_to(i, k) for i in some for k in some) for some in linear)
        is_two = len(inside) == len(operands) == 2 and attends.count(True) == 1 and is_chained
        yield from operands if is_two else (end,)

    def _finished(self, addition: Addition, node: int) -> Iterator[tuple[ModuleCall, pytree.Path]]:
        """Yield the calls that returned a node before it was added, with where in their output it lies."""
        for call, path in self.flow.returned.get(node, []):
            if call.end is not None and call.end <= addition.node.index and call.path is not None:
                yield call, path

    def _module_of(self, addition: Addition, end: int) -> tuple[tuple[ModuleCall, pytree.Path] | None, tuple[str, ...]]:
        """Return the outermost module whose output is added, and the operations that scale it on the way.

        A module that serves several branches (one dropout for all) is no place to adapt one: then it is the module before.
        If there is none, it is a module with weights that several branches share, as they then would an adapter.
        """
        steps = list(self._back(addition, end))
        for is_wanted in (self.is_hookable, self._is_shared):
            scales: list[str] = []
            for node in steps:
                calls = [(c, path) for c, path in self._finished(addition, node) if is_wanted(c)]
                if calls:
                    return min(calls, key=lambda found: (len(list(found[0].around())), -found[0].start)), tuple(scales)
                op = self.flow.nodes[node].op
                scales += [op] if op not in VIEWS | set(ADDITIONS) else []
        return None, ()

    def _back(self, addition: Addition, end: int) -> Iterator[int]:
        """Yield the branch's last node and those before it, as long as each follows from one other by a view or scale."""
        flow = self.flow
        while True:
            yield end
            node = flow.nodes[end]
            before = [
                i
                for i in node.inputs
                if flow.leads_to(addition.stream, i) and flow.between(addition.stream, i) & flow.endings
            ]
            is_one = len(before) == 1 or (before and node.op not in (*ADDITIONS, *_JOINS))
            if node.op not in VIEWS | SCALES | set(ADDITIONS) or not is_one:
                return
            # Of value * gate, both computed from the stream, go on with the value: the gate is smaller, or between bounds.
            size = max(math.prod(self.flow.nodes[i].shape) for i in before)
            gates = {i for i in before if math.prod(flow.nodes[i].shape) != size or self._is_bounded(i)}
            if len(before) > 1 and len(gates) == len(before):  # z * tanh(y), in a gated unit: which is the value?
                return
            end = max(set(before) - gates or before)

    def _is_bounded(self, index: int) -> bool:
        """Tell whether a node is a number between bounds: a gate, for what it is multiplied with."""
        return self.flow.nodes[self.flow.source(index)].op in BOUNDED

    def output_of(self, call: ModuleCall, path: pytree.Path) -> ModuleOutput:
        """Describe what a call returned at a path of its output."""
        node = self.flow.nodes[dict(call.outputs)[path]]
        axis = self.axes.of(node.index)
        return ModuleOutput(call.path or "", path, node.shape, None if axis is None else axis - len(node.shape))

    def is_hookable(self, call: ModuleCall) -> bool:
        """Tell whether a hook on the module sees this branch, and only this, in each call of the module around it."""
        return self.repeats[call.path, id(call.parent)] == 1 and self.can_carry(call)

    def _is_shared(self, call: ModuleCall) -> bool:
        """Tell whether a hook on a module with weights fires: it may run several times in a call of what is around."""
        has_weights = any(True for _ in base_parameters(call.module)) or holds_described_weights(call.module)
        return has_weights and self.can_carry(call)

    def can_carry(self, call: ModuleCall) -> bool:
        """Tell whether a hook on the module would fire."""
        try:
            resolve_host(call.path or "", self.modules, at_input=False)
        except TargetError:  # the reason is told when a user names the module; here it only makes another module the host
            return False
        return call.path is not None
