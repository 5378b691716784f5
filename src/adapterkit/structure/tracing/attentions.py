"""Find attentions in a recorded forward that are not one operation: softmax(Q @ K) @ V, in the ways that people write it.

    scores  = Q @ K        a product of two activations, or (q * k).sum(-1)
    weights = softmax(…)   scores may be scaled, masked, added to a bias or to those of the layer before, mixed over heads
    core    = weights @ V  or, over one key, weights * V: torch leaves out the sum over one entry

A router weighs experts by a softmax, too, but of a projection: then there is no product of activations behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .operations import BOUNDED, MATMULS, SCALES, SOFTMAX, VIEWS, WHOLE_NORMS

if TYPE_CHECKING:
    from .flow import Flow
    from .graph import Operation

__all__ = ["Attending", "find_attentions"]

_SUMS = frozenset(("add", "add_", "sub", "sub_"))  # a bias; the difference of two maps of weights
_STEPS = VIEWS | SCALES | _SUMS | WHOLE_NORMS  # a norm over heads (DeepViT)


@dataclass(frozen=True)
class Attending:
    """How an attention comes to its weights.

    Attributes:
        scores: The product of queries and keys.
        weights: Which input of the attention's last product the weights are.
    """

    scores: int
    weights: int


def find_attentions(flow: Flow) -> dict[int, Attending]:
    """Map each attention's last product to how it comes to its weights."""
    return _Finder(flow).find() if any(node.op in SOFTMAX | {"exp"} for node in flow.nodes) else {}


class _Finder:
    """Looks at products in the order in which they ran: an earlier attention explains what a later one reads."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.found: dict[int, Attending] = {}
        self.by_hand = sum(1 << node.index for node in flow.nodes if self._is_summed_product(node))
        self.softmaxes = sum(1 << node.index for node in flow.nodes if self._is_softmax(node))
        self.mixers = 0  # projections of scores or weights over heads
        self.cores = 0  # attentions' last products

    def find(self) -> dict[int, Attending]:
        """Return the attentions."""
        for node in self.flow.nodes:
            if self.flow.projections >> node.index & 1 and self._mixes_heads(node):
                self.mixers |= 1 << node.index
            elif self._may_weigh(node):
                attending = self._attending(node)
                if attending is not None:
                    self.found[node.index] = attending
                    self.cores |= 1 << node.index
        return self.found

    # --- what a node is -----------------------------------------------------------------------------------------------

    def _may_weigh(self, node: Operation) -> bool:
        """Tell whether a node may be an attention's last product: one of two activations, over one key or more."""
        if node.op in MATMULS:
            return self.flow.has_two(node)
        return node.op in ("mul", "mul_") and self.flow.has_two(node)

    def _is_summed_product(self, node: Operation) -> bool:
        """Tell whether a node is the first half of (q * k).sum(…): two different activations, multiplied and summed."""
        flow = self.flow
        if node.op != "mul" or len({flow.source(i) for i in flow.activations(node)}) < 2:
            return False
        return any(flow.nodes[i].op == "sum" for i in flow.readers[node.index])

    def _is_softmax(self, node: Operation) -> bool:
        """Tell whether a node is a softmax, or one by hand: exp(x) / exp(x).sum(), or the exp of one's logarithm."""
        flow = self.flow
        if node.op in SOFTMAX:
            return True
        if node.op == "exp":
            before = flow.nodes[flow.source(node.inputs[0])]
            taken_off = {flow.nodes[flow.source(i)].op for i in before.inputs[1:2]} if before.op == "sub" else set()
            return "log_softmax" in before.op or "logsumexp" in taken_off
        above = [flow.source(i) for i in node.inputs[:2]] if node.op == "div" else []
        if len(above) < 2 or flow.nodes[above[0]].op != "exp" or flow.nodes[above[1]].op != "sum":
            return False
        return flow.source(flow.nodes[above[1]].inputs[0]) == above[0]

    def _mixes_heads(self, node: Operation) -> bool:
        """Tell whether a projection takes scores, or weights, and nothing else: talking heads."""
        taken = [i for i in self.flow.activations(node) if self.flow.nodes[i].is_floating]
        return len(taken) == 1 and bool(self._behind(taken[0], self._products() | self.softmaxes))

    def _products(self) -> int:
        """Return the set of products of two activations that are no attention's last."""
        return (self.flow.products | self.by_hand) & ~self.softmaxes & ~self.cores

    # --- the way back -------------------------------------------------------------------------------------------------

    def _attending(self, node: Operation) -> Attending | None:
        """Return how a product weighs, if one of its factors is a softmax of scores; else None."""
        for at, i in enumerate(node.inputs[: len(node.taken)]):
            softmax = self._behind(i, self.softmaxes)
            if not softmax or not self._is_over_keys(node, softmax):
                continue
            scores = self._scores(softmax, [j for n, j in enumerate(node.inputs[: len(node.taken)]) if n != at])
            if scores is not None:
                return Attending(scores, at)
        return None

    def _is_over_keys(self, node: Operation, softmax: int) -> bool:
        """Tell whether a product sums over what the softmax weighs: a matrix product does, one by hand has a sum behind."""
        if node.op in MATMULS or self.by_hand >> node.index & 1:
            return True
        last = self.flow.nodes[softmax.bit_length() - 1]
        return last.op in SOFTMAX and bool(last.numbers) and last.shape[last.numbers[0]] == 1

    def _behind(self, index: int, wanted: int) -> int:
        """Return the set of wanted nodes that a tensor is made of by scales, masks, sums and mixers; 0 if of more."""
        flow, found, seen, todo = self.flow, 0, 0, [index]
        while todo:
            i = todo.pop()
            if seen >> i & 1 or flow.is_constant[i] or not flow.nodes[i].is_floating:
                continue
            seen |= 1 << i
            node = flow.nodes[i]
            if wanted >> i & 1:
                found |= 1 << i
            elif node.op in _STEPS or self.mixers >> i & 1:
                todo.extend(node.inputs)
            elif node.inputs and node.op not in BOUNDED:
                return 0
        return found

    def _scores(self, softmaxes: int, values: Sequence[int]) -> int | None:
        """Return the product of queries and keys behind a softmax; None if there is none.

        Args:
            values: What is weighed: of two products that are added, as of a text and of its layout, the one whose keys are
                made of what the values are made of is meant.
        """
        flow, last = self.flow, softmaxes.bit_length() - 1
        back = flow.ancestors[last] | 1 << last
        wanted = (flow.products | self.by_hand) & ~(1 << last)
        # Not past a projection, unless it mixes heads: behind that of a router lies another layer's attention.
        met = flow.nearest(last, wanted, back, stop=flow.projections & ~self.mixers) & self._products()
        products = [i for i in range(met.bit_length()) if met >> i & 1]
        # A bias by position may be a product as well, and be added to that of queries and keys; and so may be the scores of
        # the layer before, which an earlier attention has used.
        used = {attending.scores for attending in self.found.values()}
        products = [i for i in products if self._compares_inputs(i)] or products
        if len(products) > 1:
            made_of = self._projected_from(values)
            products = [i for i in products if self._projected_from(flow.nodes[i].inputs) & made_of] or products
        return next(iter([i for i in products if i not in used] or products), None)

    def _projected_from(self, nodes: Sequence[int]) -> set[int]:
        """Return what the last projections before some nodes take."""
        flow, everything, last = self.flow, (1 << len(self.flow.nodes)) - 1, 0
        for node in nodes:
            last |= flow.nearest(node, flow.projections, everything)
        found = (node for node in flow.nodes if last >> node.index & 1)
        return {flow.source(i) for node in found for i in flow.activations(node)}

    def _compares_inputs(self, index: int) -> bool:
        """Tell whether both factors of a product come of the model's inputs: one of positions alone is a bias."""
        return all(self.flow.from_inputs >> i & 1 for i in self.flow.activations(self.flow.nodes[index])[-2:])
