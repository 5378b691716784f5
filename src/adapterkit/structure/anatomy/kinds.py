"""Tell what a branch does: attention, cross-attention, feed-forward, convolution, or another way of mixing tokens.

Names of classes are not asked, only operations. A branch with softmax(Q @ K) @ V is an attention; one that mixes no tokens,
each position for itself, is a feed-forward.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import reduce
from operator import or_

from ..tracing.flow import MATMULS, Flow, bits
from ..tracing.graph import Operation
from ..tracing.mixing import may_mix, mixes_tokens
from .additions import Addition
from .attention_operands import Attentions
from .description import Kind
from .feature_axes import FeatureAxes

__all__ = ["branch_kind"]

# Operations that choose experts for tokens.
_ROUTING = frozenset(("topk", "argmax", "one_hot", "_grouped_mm", "histc"))
# Operations that carry something from one token to others.
_MIXING = frozenset(("cumsum", "cumprod", "flip", "logcumsumexp", "roll", "scan", "lstm", "gru", "mkldnn_rnn_layer"))


def branch_kind(attentions: Attentions, addition: Addition, inside: int, end: int, weighing: int = 0) -> tuple[Kind, bool]:
    """Return what the branch of these nodes does, and whether it routes tokens to experts.

    Args:
        end: Its last node.
        weighing: The set of its projections that only choose or weigh what others make.

    The order of the questions matters: an attention has products that mix tokens, and a mixture of experts may sort them.
    """
    flow, axes = attentions.flow, attentions.axes
    nodes = [flow.nodes[i] for i in bits(inside)]
    is_wide = any(_is_wide_convolution(flow, node) for node in nodes)
    # What chooses, and is no router, chooses no experts: TimesNet's convolutions are told by which periods to run.
    routes = any(node.op in _ROUTING for node in nodes) and bool(weighing or not is_wide)
    unweighed = [node for node in nodes if not flow.ancestors[node.index] & weighing]
    cores = list(bits(inside & flow.attentions))
    if cores:
        is_cross = all(attentions.is_cross(core, addition.stream, inside) for core in cores)
        return ("crossattention" if is_cross else "attention"), False
    if _fills_slots(flow, inside, weighing):
        return "feedforward", True
    if not routes and (any(_mixes_tokens(axes, node) for node in nodes) or _is_recurrent(unweighed)):
        return "mixer", False
    multiplies = not routes and any(flow.products >> node.index & 1 and node.op in MATMULS for node in nodes)
    if not routes and not multiplies and (is_wide or any("pool" in node.op for node in nodes)):
        return ("convolution" if is_wide else "mixer"), False  # a convolution may pool besides, to gate channels
    # What looks like a feed-forward so far may still sum over tokens, and what multiplies activations may not: each token's
    # weights by what the experts make of it. A mixture of experts sorts tokens; a short convolution leaves it one.
    moves = None if is_wide else _moves_between_tokens(attentions, addition, inside, end, weighing | attentions.aside)
    return ("mixer", False) if moves or (moves is None and multiplies) else ("feedforward", routes)


def _fills_slots(flow: Flow, inside: int, weighing: int) -> bool:
    """Tell whether one router mixes tokens for the experts, and what the experts return for the tokens (Soft-MoE).

    An attention has other weights on its way in than on its way out, and projects nothing between the two.
    """
    computing = inside & flow.projections & ~weighing

    def is_weighed(node: Operation) -> bool:
        before = (flow.ancestors[i] | 1 << i for i in flow.activations(node))
        return node.op in MATMULS and any(mask & weighing and not mask & computing for mask in before)

    weighed = [i for i in bits(inside & flow.products) if is_weighed(flow.nodes[i])]
    return any(flow.between(weighed[0], i) & computing for i in weighed)


def _moves_between_tokens(attentions: Attentions, addition: Addition, inside: int, end: int, beside: int) -> bool | None:
    """Tell whether numbers show that a position of a branch's end depends on several of those before it.

    It must depend on several of what the projections take, and of what all of that is made of. Between the two, tokens may
    be copied for each expert, or shifted (RWKV's channel mixing). Before it, several streams of one token may be mixed.

    Args:
        beside: The set of projections that only weigh.

    Returns:
        None if they do not tell.
    """
    flow, axes, stream = attentions.flow, attentions.axes, addition.stream
    projections = inside & flow.projections & ~beside
    # The einsum of a weight and a tensor may put axes together before it multiplies, so that the axis is lost from sight.
    is_unclear = any(axes.of(i) is None for k in bits(projections) for i in flow.activations(flow.nodes[k]))
    if not is_unclear and not may_mix(flow, inside):
        return False
    first = [i for i in bits(projections) if not flow.ancestors[i] & projections]
    # What they take, with the axis of its features.
    read = ((flow.nodes[k].op, i) for k in first for i in flow.activations(flow.nodes[k]))
    taken = {i: 1 if op.endswith("convolution") else len(flow.nodes[i].shape) - 1 for op, i in read}
    since = reduce(or_, (flow.between(i, end) | 1 << i for i in first), 0)
    passed = bits(flow.passed(stream, [i for i in taken if i == stream or flow.leads_to(stream, i)]))
    shared = min(reversed([*passed]), key=lambda i: math.prod(flow.nodes[i].shape))

    def axis_of(index: int) -> int | None:
        # Experts gather tokens and scatter them again, behind which features are lost from sight: others know, too.
        found = [axes.of(index), taken.get(index), *(axes.on_the_way(index, i, axis) for i, axis in taken.items())]
        found += [axes.of(addition.skip)] if index == end else []
        return next((axis for axis in found if axis is not None), None)

    moves = None
    for nodes in filter(None, (since & inside, flow.between(shared, end) & inside)):
        try:
            moves = mixes_tokens(attentions.replays, stream, nodes, end, axis_of)
        except ValueError:  # it cannot be run again (it may lie on the meta device), or features are lost from sight
            return None
        if not moves:
            return False
    return moves


def _mixes_tokens(axes: FeatureAxes, node: Operation) -> bool:
    """Tell whether an operation is a scan, a Fourier transform, or projects the tokens' axis."""
    if node.op in _MIXING or node.op.startswith("_fft"):
        return True
    return axes.projects_tokens(node)


def _is_recurrent(nodes: list[Operation]) -> bool:
    """Tell whether one position is read after another: the same tensor at three or more indices of one axis."""
    read = {(node.inputs[0], node.numbers) for node in nodes if node.op == "select" and len(node.inputs) == 1}
    # select(tensor, axis, index). Two are common without recurrence: the first token, the last.
    indices = Counter((source, numbers[0]) for source, numbers in read if len(numbers) == 2)
    return any(count > 2 for count in indices.values())


def _is_wide_convolution(flow: Flow, node: Operation) -> bool:
    """Tell whether an operation is a convolution whose kernel covers more than one position."""
    return node.op.endswith("convolution") and any(size > 1 for size in flow.nodes[node.inputs[1]].shape[2:])
