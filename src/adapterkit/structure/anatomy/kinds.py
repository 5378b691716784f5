"""Tell what a branch does: attention, cross-attention, feed-forward, convolution, or another way of mixing tokens.

Names of classes are not asked, only operations. A branch with softmax(Q @ K) @ V is an attention; one that mixes no tokens,
each position for itself, is a feed-forward.
"""

from __future__ import annotations

from collections import Counter

from ..tracing.flow import MATMULS, Flow, bits
from ..tracing.graph import Operation
from .attention_operands import Attentions
from .description import Kind
from .feature_axes import FeatureAxes

__all__ = ["branch_kind"]

# Operations that choose experts for tokens.
_ROUTING = frozenset(("topk", "argmax", "one_hot", "_grouped_mm", "histc"))
# Operations that carry something from one token to others.
_MIXING = frozenset(("cumsum", "cumprod", "flip", "logcumsumexp", "roll", "scan", "lstm", "gru", "mkldnn_rnn_layer"))


def branch_kind(attentions: Attentions, stream: int, inside: int, weighing: int = 0) -> tuple[Kind, bool]:
    """Return what the branch of these nodes does, and whether it routes tokens to experts.

    Args:
        weighing: The set of its projections that only choose or weigh what others make.

    The order of the questions matters: an attention has products that mix tokens, and a mixture of experts may sort them.
    """
    flow, axes = attentions.flow, attentions.axes
    nodes = [flow.nodes[i] for i in bits(inside)]
    routes = any(node.op in _ROUTING for node in nodes)
    unweighed = [node for node in nodes if not flow.ancestors[node.index] & weighing]
    cores = list(bits(inside & flow.attentions))
    if cores:
        return "crossattention" if all(attentions.is_cross(core, stream, inside) for core in cores) else "attention", False
    if routes:
        return "feedforward", True
    if any(_mixes_tokens(flow, axes, node) for node in nodes) or _is_recurrent(unweighed):
        return "mixer", False
    if any(_is_wide_convolution(flow, node) for node in nodes):  # some pool besides, to gate channels
        return "convolution", False
    return ("mixer" if any("pool" in node.op for node in nodes) else "feedforward"), False


def _mixes_tokens(flow: Flow, axes: FeatureAxes, node: Operation) -> bool:
    """Tell whether an operation is a scan, a Fourier transform, a product of activations, or projects the tokens' axis."""
    if node.op in _MIXING or node.op.startswith("_fft"):
        return True
    shown = flow.evidence.get(node.index)
    if shown is not None and shown.kind == "projection":  # it mixes features, on the axis that numbers show
        ((reader, at),) = shown.operands
        operand = flow.nodes[reader].inputs[at]
        return axes.of(operand) not in (len(flow.nodes[operand].shape) + shown.input_axis, None)
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
