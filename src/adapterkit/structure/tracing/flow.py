"""What flows where in a recorded forward: ancestors and descendants of every node, and which nodes do what.

Sets of nodes are integers, one bit for each node: {0, 3} is 0b1001. A graph of thousands of nodes is searched in
microseconds that way, and all of set algebra is an operator:

    a & b          nodes in both           mask >> i & 1     whether node i is in the set
    a | b          nodes in either         1 << i            the set of node i alone
    a & ~b         nodes in a, not in b    mask.bit_count()  how many there are

Example: `flow.between(stream, end) & flow.projections` are the projections that a branch runs through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property, reduce
from itertools import accumulate
from operator import and_

from ..base_tensors import base_parameters
from ..hosts import holds_described_weights
from .attentions import find_attentions
from .evidence import ask
from .graph import Graph, ModuleCall, Operation
from .operations import BOUNDED, CONSTANT_STEPS, LOOKUPS, MATMULS, NORMS, SCALES, SOFTMAX, VIEWS, WHOLE_NORMS, is_attention
from .parts import piece_of

__all__ = [
    "BOUNDED", "CONSTANT_STEPS", "LOOKUPS", "MATMULS", "NORMS", "SCALES", "SOFTMAX", "VIEWS", "WHOLE_NORMS", "Flow", "bits",
]  # fmt: skip


def bits(mask: int) -> Iterator[int]:
    """Yield the nodes in a set, from the lowest number."""
    while mask:
        low = mask & -mask  # the lowest bit that is set, alone
        yield low.bit_length() - 1
        mask ^= low


class Flow:
    """A recorded graph, and what can be told from it alone.

    Attributes:
        is_constant: For each node, whether it comes of parameters and buffers alone.
        ancestors: For each node, the set of those that it depends on; `descendants`, those that depend on it.
        from_inputs: The set of nodes that depend on what the model was called with.
        projections: The set of products of an activation and a weight.
        products: The set of products of two activations, and of softmaxes.
        attentions: The set of attentions' last products: softmax(Q @ K) @ V.
        attending: For each of these that is no whole operation, its product of queries and keys.
        endings: The set of nodes in which a branch may end.
        evidence: For each operation that no name tells of, what numbers show that it does.
        unknown: The set of those of which they show nothing.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes, self.calls = graph, graph.nodes, graph.calls
        self.is_constant = self._from_parameters()
        self.ancestors, self.descendants = self._reach()
        self.from_inputs = self._from_inputs()
        self.evidence = ask(graph, self.is_constant, self.ancestors)
        asked = self._by_evidence
        self.projections = asked("projection") | self._mask(lambda n: n.op in MATMULS and self._reads_a_weight(n))
        # Products of activations, and softmax: what comes before them is not what a branch ends in.
        self.products = self._mask(lambda node: node.op in SOFTMAX or (node.op in MATMULS and self.has_two(node)))
        self.attending = find_attentions(self)
        self.attentions = asked("attention") | self._mask(lambda n: is_attention(n.op) or n.index in self.attending)
        self.unknown = asked("unknown")
        # Where a branch may end: in a projection, an attention without one, a Fourier transform, a pooling; and in what is
        # not understood, so that what it computes is not overlooked; in a weighted sum of what experts computed.
        self.endings = self.projections | self.attentions | self.unknown | self._mask(lambda n: _is_mixing(n.op))
        weights = self._mask(lambda node: node.op in SOFTMAX | BOUNDED)
        self.endings |= self._mask(lambda node: node.op in MATMULS and self.has_two(node) and self._weighs(node, weights))

    @cached_property
    def readers(self) -> list[list[int]]:
        """List, for each node, those that read it."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for i in node.inputs:
                readers[i].append(node.index)
        return readers

    @cached_property
    def returned(self) -> dict[int, list[tuple[ModuleCall, tuple[int | str, ...]]]]:
        """Map each node that a module call returned to such calls, with where in their output it lies."""
        returned: dict[int, list[tuple[ModuleCall, tuple[int | str, ...]]]] = {}
        for call in self.calls:
            for path, i in call.outputs:
                returned.setdefault(i, []).append((call, path))
        return returned

    @cached_property
    def norm_calls(self) -> list[ModuleCall]:
        """List the calls of modules that normalise and do nothing else."""
        norms = self._by_evidence("norm") | self._mask(lambda node: node.op in NORMS)
        with_norm = {id(self.nodes[i].call) for i in bits(norms)}
        return [call for call in self.calls if id(call) in with_norm and call.end is not None and self.is_small(call)]

    @cached_property
    def coded(self) -> frozenset[tuple[int, int]]:
        """Return pairs of a node and an input of its that begin a product which numbers show: there integers are values."""
        shown = [found for found in self.evidence.values() if found.kind == "projection"]
        return frozenset((reader, self.nodes[reader].inputs[at]) for found in shown for reader, at in found.operands)

    @cached_property
    def sizes(self) -> int:
        """Return the set of nodes by which tokens are divided before they are rounded, one number for each token."""
        found = 0
        for reader, read in self.coded:
            inside = (i for i in bits(self.ancestors[read]) if self.nodes[i].call is self.nodes[reader].call)
            found |= sum(1 << i for i in inside if self.nodes[i].shape[-1:] == (1,))
        return found

    @cached_property
    def features(self) -> int:
        """Return the set of nodes made of features: of floating inputs and of what is looked up.

        Not in it is what is made of positions that were cast to floats, such as the angles of rotary embeddings.
        """
        mask = 0
        for node in self.nodes:
            inputs = self.activations(node)
            starts = node.op == "input" or (node.op in LOOKUPS and len(inputs) < len(node.inputs))
            if node.is_floating and (starts or any(mask >> i & 1 for i in inputs)):
                mask |= 1 << node.index
        return mask

    def between(self, start: int, end: int) -> int:
        """Return the set of nodes on any way from `start` (left out) to `end` (itself in it)."""
        return (self.ancestors[end] | 1 << end) & self.descendants[start]

    def passed(self, start: int, ends: Collection[int]) -> int:
        """Return the set of nodes that every way from `start` to any of these ends leads through, `start` with them."""
        inside = 1 << start
        for end in ends:
            inside |= self.between(start, end)
        on_all_ways = {start: 1 << start}
        for i in bits(inside & ~(1 << start)):  # what a node reads has a lower number
            before = [on_all_ways[j] for j in self.nodes[i].inputs if j in on_all_ways]
            on_all_ways[i] = reduce(and_, before) | 1 << i
        return reduce(and_, (on_all_ways[end] for end in ends if end in on_all_ways), inside)

    def leads_to(self, start: int, end: int) -> bool:
        """Tell whether `end` depends on `start`."""
        return bool(self.ancestors[end] >> start & 1)

    def activations(self, node: Operation) -> list[int]:
        """List a node's inputs that depend on more than parameters."""
        return [i for i in node.inputs if not self.is_constant[i]]

    def source(self, index: int, through: frozenset[str] = VIEWS) -> int:
        """Return the node whose values this one hands on.

        It is looked for back through views, or through the operations given, as long as they have one floating input: of
        `x.view(…).transpose(…)` it is x, and of `cat([a, b]).chunk(2)[0]` it is a.
        """
        while self.nodes[index].op in through:
            piece = piece_of(self.nodes, index)
            if piece is not None:
                index = piece
                continue
            inputs = [i for i in self.activations(self.nodes[index]) if self.nodes[i].is_floating]  # not masks, indices
            if len(inputs) != 1:
                break
            index = inputs[0]
        return index

    def unscaled(self, index: int) -> int:
        """Return `source`, looked for also back through multiplication by a constant, and addition of one."""
        index = self.source(index)
        while self.nodes[index].op in CONSTANT_STEPS and len(self.activations(self.nodes[index])) == 1:
            index = self.source(self.activations(self.nodes[index])[0])
        return index

    def readers_through_views(self, index: int) -> Iterator[int]:
        """Yield the nodes that read this one's values, as they are or as a view of them."""
        for i in self.readers[index]:
            if self.nodes[i].op in VIEWS:
                yield from self.readers_through_views(i)
            else:
                yield i

    def stacked(self, index: int) -> tuple[int, ...]:
        """Return the addends of `torch.stack([a, b]).sum(0)`, or of the stack; empty if the node is neither."""
        node = self.nodes[index]
        stack = self.nodes[node.inputs[0]] if node.op == "sum" else node
        return stack.inputs if stack.op == "stack" and stack.shape[1:] == node.shape else ()

    def nearest(self, index: int, wanted: int, within: int, stop: int = 0) -> int:
        """Return the set of wanted nodes that are met first on the ways back from `index`, itself included.

        Args:
            wanted: The nodes that are looked for. A way ends at the first one.
            within: The nodes that a way may lead through.
            stop: Nodes at which a way ends without finding anything.

        Example: of `down(gelu(up(x)))` the nearest projection, back from its end, is `down` alone.
        """
        found, seen, todo = 0, 0, [index]
        while todo:
            i = todo.pop()
            if seen >> i & 1 or not within >> i & 1:
                continue
            seen |= 1 << i
            if wanted >> i & 1:
                found |= 1 << i
            elif not stop >> i & 1:
                todo.extend(self.nodes[i].inputs)
        return found

    def _by_evidence(self, kind: str) -> int:
        """Return the set of nodes that do this, as numbers show."""
        return sum(1 << i for i, found in self.evidence.items() if found.kind == kind)

    def _mask(self, test: Callable[[Operation], bool]) -> int:
        """Return the set of nodes for which `test` holds."""
        return sum(1 << node.index for node in self.nodes if test(node))

    def _from_parameters(self) -> list[bool]:
        """Tell for each node whether it comes of parameters and buffers alone: weights reach a matmul through casts.

        What a module is called with is no weight, even if it comes of parameters alone (the learned queries of a decoder).
        """
        # Of more than two axes: a weight that is handed to a module (a tied embedding's, to the head) has two at most. And
        # to what multiplies by a matrix: a norm of weights makes weights.
        multiplying = list(accumulate((node.op in MATMULS or not node.is_torchs for node in self.nodes), initial=0))
        calls = (c for c in self.calls if multiplying[c.start] < multiplying[len(self.nodes) if c.end is None else c.end])
        given = {i for call in calls for _, i in call.inputs if len(self.nodes[i].shape) > 2}
        constant: list[bool] = []
        for node in self.nodes:
            derived = node.op == "parameter" or (bool(node.inputs) and all(constant[i] for i in node.inputs))
            constant.append(derived and node.index not in given)
        return constant

    def _from_inputs(self) -> int:
        """Return the set of nodes that depend on what the model was called with, and of its inputs."""
        starts = [node.index for node in self.nodes if node.op == "input"]
        mask = sum(1 << i for i in starts)
        for i in starts:
            mask |= self.descendants[i]
        return mask

    def _reach(self) -> tuple[list[int], list[int]]:
        """Return the set of ancestors and that of descendants of each node, in one pass each."""
        # A node reads lower numbers only, so what it reads is complete when its turn comes; the other way round likewise.
        ancestors, descendants = [0] * len(self.nodes), [0] * len(self.nodes)
        for node in self.nodes:
            for i in node.inputs:
                ancestors[node.index] |= ancestors[i] | 1 << i
        for node in reversed(self.nodes):
            for i in node.inputs:
                descendants[i] |= descendants[node.index] | 1 << node.index
        return ancestors, descendants

    def is_small(self, call: ModuleCall) -> bool:
        """Tell whether a call does nothing but normalise: no product inside, and vectors alone as its weights."""
        # Layers that nobody describes may hold their matrices where no Parameter shows them; what they did shows it.
        inside = (1 << (call.end or call.start)) - (1 << call.start)
        vectors_alone = all(p.dim() <= 1 or p.numel() == max(p.shape) for _, p in base_parameters(call.module))
        is_more = inside & (self.endings | self.products) or holds_described_weights(call.module)
        return vectors_alone and not is_more

    def _reads_a_weight(self, node: Operation) -> bool:
        """Tell whether a node takes an activation and something that comes of parameters alone."""
        return not self.is_constant[node.index] and any(self.is_constant[i] for i in node.inputs)

    def has_two(self, node: Operation) -> bool:
        """Tell whether a node takes two activations and no weight."""
        return not self._reads_a_weight(node) and len(self.activations(node)) > 1

    def _weighs(self, node: Operation, weights: int) -> bool:
        """Tell whether a factor of a product is made of softmaxes alone (or gates), whatever was chosen of them."""
        return any(self._is_made_of(i, weights) for i in self.activations(node))

    def _is_made_of(self, index: int, wanted: int) -> bool:
        """Tell whether every way back from a node meets one that is wanted before a projection or product."""
        seen, todo = 0, [index]
        while todo:
            i = todo.pop()
            node, is_seen = self.nodes[i], seen >> i & 1
            seen |= 1 << i
            if is_seen or wanted >> i & 1:
                continue
            # Numbers alone, no indices: `topk` is one node with both.
            before = [j for j, t in zip(node.inputs, node.taken, strict=False) if t.is_floating_point()]
            before = [j for j in before if not self.is_constant[j]]
            if not before or (self.projections | self.products) >> i & 1:
                return not before and node.op not in ("input", "parameter")  # zeros that weights are scattered into
            todo += before
        return bool(seen & wanted)


def _is_mixing(op: str) -> bool:
    """Tell whether an operation mixes tokens without a weight: a Fourier transform (FNet), a pooling (PoolFormer)."""
    return op.startswith("_fft") or ("pool" in op and "::" not in op)
