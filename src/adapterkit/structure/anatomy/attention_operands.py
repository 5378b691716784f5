"""Tell the queries, keys and values of an attention, and the projections that make each.

What enters the products of an attention may have been gated, mixed with the first layer's values, rotated or sampled since
it was projected. A gate, another layer's values and the indices of a sample decide about it, but do not make it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ..tracing.attentions import Attending
from ..tracing.flow import CONSTANT_STEPS, MATMULS, VIEWS, Flow, bits
from .feature_axes import FeatureAxes, is_depthwise

__all__ = ["Attentions", "Projected"]

# Functions of each number for itself that only scale, shift or choose: what they return is still the value.
_STRAIGHT = CONSTANT_STEPS | VIEWS | {"rsub", "neg", "where", "masked_fill", "clamp"}
_Reader = tuple[int, int]  # a node, and which of its inputs


@dataclass(frozen=True)
class Projected:
    """A projection that makes queries, keys or values of an attention.

    Attributes:
        part: What it makes: "q", "k" or "v".
        node: The projection.
        operand: The node that enters the attention's product.
        reader: The node of that product, and at which of its inputs the operand is.
    """

    part: str
    node: int
    operand: int
    reader: tuple[int, int]


class Attentions:
    """The attentions of a forward: what makes their operands, and whether they look at another input.

    Args:
        aside: The set of nodes in low-rank branches beside single layers, which make no operand: the layers do.
    """

    def __init__(self, flow: Flow, axes: FeatureAxes, aside: int) -> None:
        self.flow, self.axes, self.aside = flow, axes, aside
        self._cross: dict[int, bool] = {}  # of the attentions that were asked about

    @cached_property
    def _makers(self) -> dict[int, dict[str, int]]:
        """Map each attention to the set of projections that make its "q", its "k" and its "v".

        What an earlier attention had is left out where there is more: a layer's values may be mixed with the first one's.
        """
        found: dict[int, dict[str, int]] = {}
        earlier = dict.fromkeys("qkv", 0)
        for core in bits(self.flow.attentions):
            readers = dict(zip("qkv", self.operands(core), strict=True))
            made = {
                part: _makers(self.flow, self.axes, self._read(reader), self.aside)
                for part, reader in readers.items()
                if reader is not None
            }
            found[core] = {part: makers & ~earlier[part] or makers for part, makers in made.items()}
            for part, makers in made.items():
                earlier[part] |= makers
        return found

    def projected(self, inside: int) -> Iterator[Projected]:
        """Yield the projections that make the operands of the attentions among these nodes."""
        for core in bits(inside & self.flow.attentions):
            for part, reader in zip("qkv", self.operands(core), strict=True):
                if reader is not None:
                    for i in bits(self._makers[core][part]):
                        yield Projected(part, i, self._read(reader), reader)

    def is_cross(self, core: int, stream: int, inside: int) -> bool:
        """Tell whether an attention's keys come from another input than the stream.

        Args:
            inside: The set of nodes between the stream and the end of the branch, without other steps.
        """
        if core not in self._cross:
            self._cross[core] = self._looks_elsewhere(core, stream, inside)
        return self._cross[core]

    def _looks_elsewhere(self, core: int, stream: int, inside: int) -> bool:
        queries, keys, _ = self.operands(core)
        if keys is None or queries is None:  # one factor is constant: queries that are learned, say
            return False
        # Keys that a layer shares with one before it come from where that one's came.
        makers = self._makers[core]["k"]
        for earlier, is_cross in self._cross.items():
            if makers and makers == self._makers[earlier].get("k"):
                return is_cross
        key, start = self._read(keys), self._start(core, stream)
        if not self.flow.from_inputs >> key & 1:  # keys of parameters alone are a memory of its own, and no other input
            return False
        if not self._is_made_of(self._read(queries), stream, inside, start):
            # They are of the stream as it was when weights were computed, or of the other half of a reversible one.
            if self._taken_by(core, "q") & self._taken_by(core, "k"):
                return False
            return key != stream and not self.flow.leads_to(stream, key)
        return not self._is_made_of(key, stream, inside, start)

    def _taken_by(self, core: int, part: str) -> set[int]:
        """Return what the projections that make queries ("q") or keys ("k") take."""
        makers = (self.flow.nodes[i] for i in bits(self._makers[core].get(part, 0)))
        return {self.flow.source(i) for node in makers for i in self.flow.activations(node)}

    def _start(self, core: int, stream: int) -> int:
        """Return the first node of the innermost module call around an attention that takes the stream; 0 if none does."""
        call, root = self.flow.nodes[core].call, self.flow.source(stream)
        takers = (c for c in (call.around() if call else ()) if any(self.flow.source(i) == root for _, i in c.inputs))
        return next((c.start for c in takers), 0)

    def _is_made_of(self, key: int, stream: int, inside: int, start: int) -> bool:
        """Tell whether keys are made of the stream in the call that takes it: a memory was made of it before."""
        flow, seen, todo = self.flow, 0, [key]
        while todo:
            i = todo.pop()
            if flow.source(i) == flow.source(stream):
                return True
            # Before the call there may be a view or a norm of the stream, but nothing is projected.
            if seen >> i & 1 or not inside >> i & 1 or (i < start and flow.endings >> i & 1):
                continue
            seen |= 1 << i
            todo.extend(flow.nodes[i].inputs)
        return False

    def operands(self, core: int) -> tuple[_Reader | None, ...]:
        """Return where an attention reads its queries, keys and values: a node, and which of its inputs; None if unknown.

        Args:
            core: The attention's last product, or the operation that is a whole attention.
        """
        flow = self.flow
        node, attending = flow.nodes[core], flow.attending.get(core)
        if core in flow.evidence:
            return flow.evidence[core].operands
        if attending is None:  # scaled_dot_product_attention(query, key, value)
            return (core, 0), (core, 1), (core, 2)
        values = [(core, at) for at in range(len(node.taken)) if at != attending.weights]
        product = flow.nodes[attending.scores]
        factors = [(product.index, at) for at in range(len(product.taken)) if not flow.is_constant[product.inputs[at]]]
        query, key = factors[-2:] if len(factors) > 1 else (None, None)  # baddbmm adds its first
        if self._sums_over_the_first(core, attending):
            query, key = key, query
        return query, key, values[0] if values else None

    def _sums_over_the_first(self, core: int, attending: Attending) -> bool:
        """Tell whether an attention sums over the tokens of its first factor, so that those are the keys.

        Of a product (…, n, d) @ (…, d, m), where two streams attend to one another one way sums over m, the other over n.
        """
        flow = self.flow
        weights = flow.nodes[core].inputs[attending.weights]
        rank = len(flow.nodes[attending.scores].shape)
        if flow.nodes[core].op not in MATMULS or flow.nodes[attending.scores].op not in MATMULS:
            return False  # by hand, the query is written first
        summed = len(flow.nodes[weights].shape) - (1 if attending.weights == 0 else 2)
        return self.axes.on_the_way(attending.scores, weights, summed) == rank - 2

    def _read(self, reader: _Reader) -> int:
        """Return the node that one reads at an input."""
        return self.flow.nodes[reader[0]].inputs[reader[1]]


def _makers(flow: Flow, axes: FeatureAxes, operand: int, aside: int) -> int:
    """Return the set of projections that make a tensor: the last ones on its ways back, but for those of gates."""
    found = _last_projections(flow, axes, operand, aside) or flow.nearest(operand, flow.projections, ~aside)
    # The angles of rotary positions may be a product with frequencies, which are constant, as weights are.
    return found & flow.features or found


def _last_projections(flow: Flow, axes: FeatureAxes, operand: int, aside: int) -> int:
    """Return the set of projections that are met first on the ways back along values, not along gates and indices.

    One that runs over tokens (Linformer's of keys and values), or over the neighbours of each feature (a depthwise
    convolution), hands on the features that another made.
    """
    found, seen, todo = 0, aside, [operand]
    while todo:
        i = todo.pop()
        if seen >> i & 1:
            continue
        seen |= 1 << i
        node = flow.nodes[i]
        if flow.projections >> i & 1 and not axes.projects_tokens(node) and not is_depthwise(flow, node):
            found |= 1 << i
        else:
            todo.extend(_values_of(flow, i))
    return found


def _values_of(flow: Flow, index: int) -> list[int]:
    """List the inputs whose values a node hands on: of value * gate, the value; of a tensor and its indices, the tensor."""
    node = flow.nodes[index]
    # Of top-k, which returns values and indices, it is told by the tensor that is read.
    are_indices = {i for i, tensor in zip(node.inputs, node.taken, strict=False) if not tensor.is_floating_point()}
    inputs = [i for i in node.inputs if i not in are_indices] or list(node.inputs)
    if node.op in ("lerp", "lerp_"):  # of two tensors, by a weight
        return list(node.inputs[:2])
    if node.op in ("mul", "mul_", "addcmul"):
        return [i for i in inputs if not _is_gate(flow, i)] or inputs
    return inputs


def _is_gate(flow: Flow, index: int) -> bool:
    """Tell whether a node is a curved function of each number for itself: sigmoid, tanh, silu, a cosine."""
    node = flow.nodes[flow.unscaled(index)]
    while node.op in ("rsub", "neg") and len(flow.activations(node)) == 1:  # 1 - gate
        node = flow.nodes[flow.unscaled(flow.activations(node)[0])]
    tags = getattr(node.operation[0], "tags", ()) if node.operation else ()
    return torch.Tag.pointwise in tags and node.op not in _STRAIGHT
