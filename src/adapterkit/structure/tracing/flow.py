"""What flows where in a recorded forward: ancestors and descendants of every node, and which nodes do what.

Sets of nodes are integers, one bit for each node: {0, 3} is 0b1001. A graph of thousands of nodes is searched in
microseconds that way, and all of set algebra is an operator:

    a & b          nodes in both           mask >> i & 1     whether node i is in the set
    a | b          nodes in either         1 << i            the set of node i alone
    a & ~b         nodes in a, not in b    mask.bit_count()  how many there are

Example: `flow.between(stream, end) & flow.projections` are the projections that a branch runs through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from ..base_tensors import base_parameters
from ..hosts import holds_described_weights
from .graph import Graph, ModuleCall, Operation

__all__ = ["Flow", "bits", "is_small"]


def _ops(names: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(names.split())


# Names of operations, as torch dispatches them. Where the model is not torch's alone, a name is added by a `HostType`.

# They hand one tensor's values on: as another view, copy or type.
VIEWS = _ops(
    "view _unsafe_view reshape _reshape_alias t transpose permute movedim expand squeeze unsqueeze flatten unflatten "
    "alias detach clone _to_copy to contiguous native_dropout dropout slice select lift_fresh as_strided"
)
# They may stand between a branch's last projection and its residual addition: they change values (LayerScale, a gate, a
# drop path, windows put back in order), but mix no other tokens or features in.
SCALES = _ops(
    "mul mul_ div div_ neg rsub tanh sigmoid clamp clip nan_to_num sum mean where masked_fill roll pad constant_pad_nd "
    "cat stack split split_with_sizes chunk unbind index gather scatter index_put_ copy_ im2col col2im squeeze_ "
    "unsafe_split index_select unfold"
)
# Of these, or of one of these and a constant, a stream stays the same stream: sqrt(2) * x.
CONSTANT_STEPS = _ops("mul mul_ div div_ add add_ sub sub_")
# Their results are numbers between bounds: a gate, for what it is multiplied with.
BOUNDED = _ops("sigmoid sigmoid_ tanh tanh_")
# Products. One with a weight is a projection; one of two activations is attention's, or a gate between tokens.
MATMULS = _ops(
    "mm addmm bmm baddbmm addbmm mv dot linear matmul einsum mkldnn_linear _grouped_mm "
    "convolution _convolution convolution_overrideable mkldnn_convolution"
)
LOOKUPS = _ops("embedding embedding_bag _embedding_bag index index_select gather")
SOFTMAX = _ops("_softmax _safe_softmax softmax")
# What norms are made of.
NORMS = _ops(
    "native_layer_norm layer_norm _fused_rms_norm rms_norm native_group_norm "  # whole ones
    "rsqrt linalg_vector_norm batch_norm "
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "cudnn_batch_norm "
    "sqrt std std_mean var var_mean"  # norms written by hand
)


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
        endings: The set of nodes in which a branch may end.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes, self.calls = graph, graph.nodes, graph.calls
        self.is_constant = self._from_parameters()
        self.ancestors, self.descendants = self._reach()
        self.from_inputs = self._from_inputs()
        self.projections = self._mask(lambda node: node.op in MATMULS and self._reads_a_weight(node))
        # Products of activations, and softmax: what comes before them is not what a branch ends in.
        self.products = self._mask(lambda node: node.op in SOFTMAX or (node.op in MATMULS and self._has_two(node)))
        self.attentions = self._mask(lambda node: _is_attention(node.op) or self.weights_of(node.index) is not None)
        # Where a branch may end: in a projection, an attention without one, a Fourier transform, a pooling; in a weighted
        # sum of what experts computed.
        self.endings = self.projections | self.attentions | self._mask(lambda node: _is_mixing(node.op))
        weights = self._mask(lambda node: node.op in SOFTMAX | BOUNDED)
        self.endings |= self._mask(lambda node: node.op in MATMULS and self._has_two(node) and self._weighs(node, weights))

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
        with_norm = {id(call) for node in self.nodes if node.op in NORMS and node.call for call in [node.call]}
        return [call for call in self.calls if id(call) in with_norm and call.end is not None and is_small(call)]

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

    def leads_to(self, start: int, end: int) -> bool:
        """Tell whether `end` depends on `start`."""
        return bool(self.ancestors[end] >> start & 1)

    def activations(self, node: Operation) -> list[int]:
        """List a node's inputs that depend on more than parameters."""
        return [i for i in node.inputs if not self.is_constant[i]]

    def source(self, index: int, through: frozenset[str] = VIEWS) -> int:
        """Return the node whose values this one hands on.

        It is looked for back through views, or through the operations given, as long as they have one floating input: of
        `x.view(…).transpose(…)` it is x.
        """
        while self.nodes[index].op in through:
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

    def _mask(self, test: Callable[[Operation], bool]) -> int:
        """Return the set of nodes for which `test` holds."""
        return sum(1 << node.index for node in self.nodes if test(node))

    def _from_parameters(self) -> list[bool]:
        """Tell for each node whether it comes of parameters and buffers alone: weights reach a matmul through casts.

        What a module is called with is no weight, even if it comes of parameters alone (the learned queries of a decoder).
        """
        # Of more than two axes: a weight that is handed to a module (a tied embedding's, to the head) has two at most.
        given = {i for call in self.calls for _, i in call.inputs if len(self.nodes[i].shape) > 2}
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

    def _reads_a_weight(self, node: Operation) -> bool:
        """Tell whether a node takes an activation and something that comes of parameters alone."""
        return not self.is_constant[node.index] and any(self.is_constant[i] for i in node.inputs)

    def _has_two(self, node: Operation) -> bool:
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

    def weights_of(self, index: int) -> int | None:
        """Return the node of Q @ K, if this one is an attention's last product, softmax(Q @ K) @ V; else None.

        A router weighs experts by a softmax, too, but of a projection: then there is no product of activations behind it.
        """
        node = self.nodes[index]
        if node.op not in MATMULS or not self._has_two(node):
            return None
        for i in node.inputs:
            softmax = self.source(i, VIEWS | SCALES)
            if self.nodes[softmax].op in SOFTMAX:
                back = self.ancestors[softmax] | 1 << softmax
                scores = self.nearest(softmax, self.products & ~(1 << softmax), back, stop=self.projections)
                if scores:
                    # A bias by position may be a product as well, and be added to that of queries and keys.
                    return next(filter(self._compares_inputs, bits(scores)), next(bits(scores)))
        return None

    def _compares_inputs(self, index: int) -> bool:
        """Tell whether both factors of a product come of the model's inputs: one of positions alone is a bias."""
        return all(self.from_inputs >> i & 1 for i in self.activations(self.nodes[index])[-2:])


def _is_attention(op: str) -> bool:
    """Tell whether an operation is a whole attention, whichever kernel runs it."""
    return "scaled_dot_product" in op and not op.endswith("backward")


def _is_mixing(op: str) -> bool:
    """Tell whether an operation mixes tokens without a weight: a Fourier transform (FNet), a pooling (PoolFormer)."""
    return op.startswith("_fft") or "pool" in op


def is_small(call: ModuleCall) -> bool:
    """Tell whether a module, with its children, holds vectors alone and no matrices: a norm, whatever its name."""
    vectors_alone = all(p.dim() <= 1 or p.numel() == max(p.shape) for _, p in base_parameters(call.module))
    return vectors_alone and not holds_described_weights(call.module)
