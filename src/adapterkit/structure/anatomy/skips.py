"""Tell the operands of an addition apart: the skip, which carries the stream, and the branch, computed from the stream.

x + f(x)            the skip is the stream itself, or a view of it, or times a constant
M h + p f(h)        hyper-connections: a small matrix mixes the several streams that h holds
W x + f(x)          a projection of the stream, where a block changes its width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..tracing.flow import MATMULS, VIEWS, Flow, bits
from ..tracing.graph import ModuleCall, Operation
from .additions import Addition, addends, block_of, up_to_number

__all__ = ["Skip", "skip_and_branch"]


class Skip(NamedTuple):
    """The operands of a residual addition, and the stream: their nodes.

    Attributes:
        is_projected: Whether the skip is a projection of the stream.
        is_mixed: Whether it is a mixture of the several streams in one tensor.
    """

    skip: int
    branch: int
    stream: int
    is_projected: bool = False
    is_mixed: bool = False


def skip_and_branch(flow: Flow, node: Operation, found: Mapping[int, Addition]) -> Skip | None:
    """Tell which of the two activations that a node adds is the stream, and which was computed from it.

    Args:
        found: The residual additions before it, by their nodes.

    Returns:
        None where neither was, and the node is no residual addition.
    """
    operands = addends(flow, node)
    if operands is None:
        return None
    if carried := _carried_skip(flow, *operands, found):
        return Skip(*carried)
    if mixed := _mixed_skip(flow, node, *operands):
        return Skip(*mixed, is_mixed=True)
    projected = _projected_skip(flow, node, *operands, found)
    return None if projected is None else Skip(*projected, is_projected=True)


def _carried_skip(flow: Flow, a: int, b: int, found: Mapping[int, Addition]) -> tuple[int, int, int] | None:
    """Tell which operand is the stream, and which was computed from it: (skip, branch, stream); None if neither was."""
    # First as they are, then also behind constant factors: sqrt(2) * x + f(x).
    for reach in (flow.source, flow.unscaled):
        roots = [i if i in found else reach(i) for i in (a, b)]
        for skip, branch, root, other in ((a, b, roots[0], roots[1]), (b, a, roots[1], roots[0])):
            if flow.leads_to(root, branch) and not flow.leads_to(other, skip):
                return skip, branch, root
    for skip, branch in ((a, b), (b, a)):  # (x + attention(x)) + mlp(x)
        before = found.get(flow.source(skip))
        if before is not None and flow.leads_to(before.stream, branch):
            return skip, branch, before.stream
    return _joined_skip(flow, a, b)


def _joined_skip(flow: Flow, a: int, b: int) -> tuple[int, int, int] | None:
    """Return (skip, branch, stream) of cat(x0, x1) + f(x0, x1): a stream that was taken apart, and is put together."""
    for skip, branch in ((a, b), (b, a)):
        whole = flow.nodes[flow.source(skip)]
        pieces = [flow.source(i) for i in flow.activations(whole)] if whole.op == "cat" else []
        if pieces and all(flow.leads_to(i, branch) for i in pieces) and not flow.leads_to(flow.source(branch), skip):
            return skip, branch, max(pieces)
    return None


def _mixed_skip(flow: Flow, node: Operation, a: int, b: int) -> tuple[int, int, int] | None:
    """Return (skip, branch, stream) of M h + p f(h), where h holds several streams, as hyper-connections add them.

    A small matrix M mixes the streams, and p hands the one tensor that f computes to each of them.
    Shapes: h and M h are (batch, seq, streams, hidden), f(h) is (batch, seq, 1, hidden), p is (batch, seq, streams, 1).
    """
    for skip, branch in ((a, b), (b, a)):
        mixed, handed = flow.nodes[flow.source(skip)], flow.nodes[flow.source(branch)]
        if mixed.op not in MATMULS or flow.attentions >> mixed.index & 1 or not _is_handed_out(flow, handed, node.shape):
            continue
        streams = [s for i in flow.activations(mixed) if (s := _of_shape(flow, i, node.shape)) is not None]
        small = [i for i in mixed.inputs if node.shape[-1] not in flow.nodes[i].shape[-2:]]  # M, and no layer's weight
        if len(streams) == 1 and small and flow.leads_to(streams[0], branch) and not flow.leads_to(mixed.index, branch):
            return skip, branch, streams[0]
    return None


def _is_handed_out(flow: Flow, node: Operation, shape: tuple[int, ...]) -> bool:
    """Tell whether a product repeats one tensor for several streams: (…, 1, hidden) becomes (…, streams, hidden)."""
    taken = [flow.nodes[i].shape for i in flow.activations(node)]
    is_product = node.op in ("mul", "mul_") or node.op in MATMULS
    return is_product and len(shape) > 2 and shape[-2] > 1 and any(given[-2:] == (1, shape[-1]) for given in taken)


def _of_shape(flow: Flow, index: int, shape: tuple[int, ...]) -> int | None:
    """Return the first node of this shape that one is a view of, or is the same numbers in that shape; None if none is."""
    found = None
    while flow.nodes[index].shape == shape or found is None:
        found = index if flow.nodes[index].shape == shape else found
        if flow.nodes[index].op not in VIEWS:
            break
        index = flow.nodes[index].inputs[0]
    return found


def _projected_skip(
    flow: Flow, node: Operation, a: int, b: int, found: Mapping[int, Addition]
) -> tuple[int, int, int] | None:
    """Return (skip, branch, stream) of W x + f(x), as blocks add that change the stream's width, or pool it.

    Neither operand is computed from the other there. So the skip is the lighter of the two: at most one projection.
    """
    common = flow.ancestors[a] & flow.ancestors[b] & flow.from_inputs
    if not common or flow.leads_to(a, b) or flow.leads_to(b, a):
        return None
    stream = common.bit_length() - 1  # the last thing that both come of
    before, after = flow.nodes[stream].shape, flow.nodes[a].shape
    if len(before) != len(after) or before[0] != after[0]:  # scores of an attention are no stream
        return None

    def depth(i: int) -> int:
        return (flow.between(stream, i) & flow.endings).bit_count()

    skip, branch = sorted((a, b), key=depth)
    is_projected = 0 < depth(skip) < depth(branch)
    if not is_projected or not _is_light(flow, node, flow.between(stream, skip)):
        return None
    inside = [found[i].node for i in bits(flow.between(stream, branch) & sum(1 << i for i in found))]
    is_one_block = all(_numbered(other.call) == _numbered(node.call) for other in inside)  # not the levels of a pyramid
    return (skip, branch, stream) if is_one_block else None


def _is_light(flow: Flow, node: Operation, skip: int) -> bool:
    """Tell whether the nodes of a skip are at most one projection, no attention, and of the addition's own block."""
    here = block_of(node.call)
    is_own = all(block_of(flow.nodes[i].call) == here for i in bits(skip & flow.endings))
    return is_own and (skip & flow.projections).bit_count() <= 1 and not skip & flow.attentions


def _numbered(call: ModuleCall | None) -> str:
    """Return the block that a call is in, or its path where that has no number."""
    path = (call.path if call else None) or ""
    return up_to_number(path) or path
