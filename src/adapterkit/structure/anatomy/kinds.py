"""Tell what a branch does: attention, cross-attention, feed-forward, convolution, or another way of mixing tokens.

Names of classes are not asked, only operations. A branch with softmax(Q @ K) @ V is an attention; one that mixes no tokens,
each position for itself, is a feed-forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..tracing.flow import MATMULS, Flow, bits
from ..tracing.graph import Operation
from .description import Kind
from .feature_axes import FeatureAxes

__all__ = ["Projected", "branch_kind", "projected"]

# Operations that choose experts for tokens.
_ROUTING = frozenset(("topk", "argmax", "one_hot", "_grouped_mm", "histc"))
# Operations that carry something from one token to others.
_MIXING = frozenset(("cumsum", "cumprod", "flip", "logcumsumexp", "roll", "scan", "lstm", "gru", "mkldnn_rnn_layer"))


def branch_kind(flow: Flow, axes: FeatureAxes, stream: int, inside: int, weighing: int = 0) -> tuple[Kind, bool]:
    """Return what the branch of these nodes does, and whether it routes tokens to experts.

    Args:
        weighing: The set of its projections that only choose or weigh what others make.

    The order of the questions matters: an attention has products that mix tokens, and a mixture of experts may sort them.
    """
    nodes = [flow.nodes[i] for i in bits(inside)]
    routes = any(node.op in _ROUTING for node in nodes)
    unweighed = [node for node in nodes if not flow.ancestors[node.index] & weighing]
    cores = list(bits(inside & flow.attentions))
    if cores:
        return "crossattention" if all(_is_cross(flow, stream, core) for core in cores) else "attention", False
    if routes:
        return "feedforward", True
    if any(_mixes_tokens(flow, axes, node) for node in nodes) or _is_recurrent(unweighed):
        return "mixer", False
    if any(_is_wide_convolution(flow, node) for node in nodes):  # some pool besides, to gate channels
        return "convolution", False
    return ("mixer" if any("pool" in node.op for node in nodes) else "feedforward"), False


def _operands(flow: Flow, core: int) -> tuple[tuple[int, int] | None, ...]:
    """Return where an attention reads its queries, keys and values: for each, a node and which of its inputs; else None.

    Args:
        core: The attention's last product, or the operation that is a whole attention.
    """
    node, scores = flow.nodes[core], flow.weights_of(core)
    if scores is None:  # scaled_dot_product_attention(query, key, value)
        return (core, 0), (core, 1), (core, 2)
    read = range(len(node.taken))  # behind them, `inputs` has what wrote into their memory
    values = [(core, at) for at in read if not flow.between(scores, node.inputs[at]) and node.inputs[at] != scores]
    product = flow.nodes[scores]
    factors = [(scores, at) for at in range(len(product.taken)) if not flow.is_constant[product.inputs[at]]]
    query, key = factors[-2:] if len(factors) > 1 else (None, None)  # baddbmm adds its first
    return query, key, values[0] if values else None


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


def projected(flow: Flow, inside: int) -> Iterator[Projected]:
    """Yield the last projections before the products of the attentions among these nodes."""
    for core in bits(inside & flow.attentions):
        for part, reader in zip("qkv", _operands(flow, core), strict=True):
            if reader is not None:
                operand = flow.nodes[reader[0]].inputs[reader[1]]
                before = flow.ancestors[operand] | 1 << operand
                found = flow.nearest(operand, flow.projections, before)
                # The angles of rotary positions may be a product with frequencies, which are constant, as weights are.
                for i in bits(found & flow.features or found):
                    yield Projected(part, i, operand, reader)


def _is_cross(flow: Flow, stream: int, core: int) -> bool:
    """Tell whether an attention's keys come from another input than the stream."""
    _, reader, _ = _operands(flow, core)
    if reader is None:  # one factor is constant: queries that are learned, say
        return False
    key = flow.nodes[reader[0]].inputs[reader[1]]
    if key == stream or flow.leads_to(stream, key):
        return False
    return bool(flow.from_inputs >> key & 1)  # keys of parameters alone are a memory of its own, and no other input


def _mixes_tokens(flow: Flow, axes: FeatureAxes, node: Operation) -> bool:
    """Tell whether an operation is a scan, a Fourier transform, a product of activations, or projects the tokens' axis."""
    if node.op in _MIXING or node.op.startswith("_fft"):
        return True
    if node.op not in MATMULS:
        return False
    if flow.products >> node.index & 1:
        return True
    taken = flow.activations(node)
    # MLP-Mixer projects the axis of tokens, by a Linear on a transposed tensor or by a pointwise convolution.
    if node.op.endswith("convolution"):
        return not _is_wide_convolution(flow, node) and axes.of(taken[0]) not in (1, None)
    return len(taken) == 1 and axes.is_last(taken[0]) is False


def _is_recurrent(nodes: list[Operation]) -> bool:
    """Tell whether one position is read after another: the same tensor at three or more indices of one axis."""
    read = {(node.inputs[0], node.numbers) for node in nodes if node.op == "select" and len(node.inputs) == 1}
    # select(tensor, axis, index). Two are common without recurrence: the first token, the last.
    indices = Counter((source, numbers[0]) for source, numbers in read if len(numbers) == 2)
    return any(count > 2 for count in indices.values())


def _is_wide_convolution(flow: Flow, node: Operation) -> bool:
    """Tell whether an operation is a convolution whose kernel covers more than one position."""
    return node.op.endswith("convolution") and any(size > 1 for size in flow.nodes[node.inputs[1]].shape[2:])
