"""Find the residual additions of a recorded forward: skip + branch, where the branch computes from the skip.

    x = x + dropout(down(gelu(up(norm(x)))))

Here x is the stream, and the skip; the branch is the rest. What tells the two operands apart is that one is computed from
the other. Not every such sum is residual, so what only looks like one is taken out again: scores + position bias, gates of
recurrent cells, steps inside another branch, the long skips of a U-Net.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..tracing.flow import BOUNDED, MATMULS, VIEWS, Flow, bits
from ..tracing.graph import ADDITIONS, ModuleCall, Operation

__all__ = ["Addition", "addends", "block_of", "follows", "residual_additions", "up_to_number"]

# The path up to its first number: "encoder.layer.0" of "encoder.layer.0.attention.1".
_NUMBERED = re.compile(r"(.*?(?:^|\.)\d+)(?:\.|$)")


@dataclass(frozen=True)
class Addition:
    """One residual addition.

    Attributes:
        node: The addition itself; its result is the stream from there on.
        stream: The node of the stream that the branch is computed from.
        skip: The operand that carries the stream. It is `stream`, but for views and constant factors.
        branch: The operand that a sub-layer computed.
    """

    node: Operation
    stream: int
    skip: int
    branch: int


def residual_additions(flow: Flow) -> tuple[list[Addition], list[Addition]]:
    """Return the steps of residual streams, in order, and all additions that look like one.

    No step is an addition inside another's branch in the same block, nor a long skip.
    """
    found: dict[int, Addition] = {}
    for node in flow.nodes:
        addition = _residual(flow, node, found)
        if addition is not None:
            found[node.index] = addition
    every = list(found.values())
    streams = {addition.stream for addition in every}  # adding to one a second time is no step along another
    return _outermost(flow, [a for a in every if flow.source(a.branch) not in streams]), every


def addends(flow: Flow, node: Operation) -> tuple[int, int] | None:
    """Return the two activations that a node adds, one of them times a gate (addcmul) or not; None if it adds none."""
    if node.op not in ADDITIONS or not node.is_floating or len(node.shape) < 2:
        return None
    whole = [i for i in node.inputs[:3] if flow.nodes[i].is_floating and flow.nodes[i].shape == node.shape]
    operands = [i for i in whole if not flow.is_constant[i]]
    # Of addcmul(x, gate, branch) the gate may have the shape of both: the first and the last are meant.
    return (operands[0], operands[-1]) if len(operands) > 1 else None


def block_of(call: ModuleCall | None) -> tuple[str, int] | None:
    """Return the outermost numbered module around a call, as (path, `id` of its call); None if there is none.

    The call counts, for ALBERT runs one module as every block.
    """
    for around in reversed(list(call.around()) if call else []):
        match = _NUMBERED.match(around.path or "")
        if match:
            return match[1], id(around)
    return None


def up_to_number(path: str) -> str:
    """Return the path up to its last number: "h.0" of "h.0.mlp"; empty if it has none."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def _residual(flow: Flow, node: Operation, found: dict[int, Addition]) -> Addition | None:
    """Return the node as a residual addition; None if it is none.

    Args:
        found: The additions before it, by their nodes.
    """
    operands = addends(flow, node)
    split = _skip_and_branch(flow, node, *operands, found) if operands is not None else None
    if split is None:
        return None
    skip, branch, stream = split
    if _is_straight_through(flow, stream, branch) or _is_inside_a_cell(flow, node):
        return None
    computes = flow.between(stream, branch) & flow.endings
    return Addition(node, stream, skip, branch) if computes and _ends(flow, branch, stream, found) else None


def _ends(flow: Flow, branch: int, stream: int, found: dict[int, Addition]) -> bool:
    """Tell whether a branch ends in a projection, or in an addition to one.

    What has a projection only further back is something else: scores + position bias; or the sum of a block, to which an
    embedding of positions is added once more.
    """
    # Back from the end, what comes first of: where a branch may end, a product of activations, another sum.
    inside, sums = flow.between(stream, branch), sum(1 << i for i in found)
    last = flow.nearest(branch, flow.endings | flow.products | sums, inside)
    if any(flow.nodes[i].op in MATMULS for i in bits(last & flow.products & ~flow.endings)):
        return False  # a product without a weight, and no attention: scores
    # Behind a sum, look once more, from the stream that it continues.
    inner = [found[i].stream for i in bits(last & sums)]
    deeper = [flow.nearest(i, flow.endings, inside, stop=flow.products | sums) for i in inner]
    return bool(last & flow.endings) or any(deeper)


def _skip_and_branch(
    flow: Flow, node: Operation, a: int, b: int, found: dict[int, Addition]
) -> tuple[int, int, int] | None:
    """Tell which operand is the stream, and which was computed from it: (skip, branch, stream); None if that is unclear."""
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
    return _projected_skip(flow, node, a, b, found)


def _projected_skip(flow: Flow, node: Operation, a: int, b: int, found: dict[int, Addition]) -> tuple[int, int, int] | None:
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


def _is_straight_through(flow: Flow, stream: int, branch: int) -> bool:
    """Tell whether a branch is something less the stream itself: x + (quantised - x), whose value is `quantised`."""
    node = flow.nodes[flow.source(branch)]
    return node.op in ("sub", "rsub") and any(flow.source(i) == stream for i in node.inputs)


def _is_inside_a_cell(flow: Flow, node: Operation) -> bool:
    """Tell whether a sum is a gate of a recurrent cell: all that reads it is a sigmoid or tanh."""
    readers = [j for i in flow.readers[node.index] for j in (flow.readers[i] if flow.nodes[i].op in VIEWS else [i])]
    return bool(readers) and all(flow.nodes[i].op in BOUNDED for i in readers)


def _outermost(flow: Flow, additions: list[Addition]) -> list[Addition]:
    """Return the additions without those inside a branch of another in their block, and without long skips.

    A skip is long if additions of several blocks lie in its branch, as in a U-Net.
    """
    blocks = {addition.node.index: block_of(addition.node.call) for addition in additions}
    inner: dict[int, list[Addition]] = {}
    for addition in additions:
        inside = flow.between(addition.stream, addition.branch)
        inner[addition.node.index] = [other for other in additions if inside >> other.node.index & 1]
    is_long = {index: len({blocks[o.node.index] for o in others} - {None}) > 1 for index, others in inner.items()}
    return [
        addition
        for addition in additions
        if not is_long[addition.node.index]
        and not any(
            not is_long[outer.node.index]
            and blocks[outer.node.index] == blocks[addition.node.index]
            and _is_nested(flow, addition, outer, inner[outer.node.index], additions)
            for outer in additions
        )
    ]


def _is_nested(flow: Flow, addition: Addition, outer: Addition, inside: list[Addition], every: list[Addition]) -> bool:
    """Tell whether an addition in a branch belongs to it, and not to another stream that the branch looks at.

    Args:
        inside: The additions in the branch of `outer`.
        every: All additions.

    Example: in x + f(y + g(y)), where the branch makes y of x, y + g(y) belongs to the branch. A decoder that looks at the
    memory of an encoder has all additions of the encoder in its branch, and they belong to the encoder's stream.
    """
    if addition not in inside:
        return False
    start = addition.stream
    while True:  # back along its stream, from one addition to the one before
        before = [a for a in inside if follows(flow, a, start)]
        if not before and start == outer.stream:  # x + f(x + g(x)): a step of its own if something is added to it in turn
            is_last = not flow.between(addition.node.index, outer.branch) & flow.endings
            has_steps = start != addition.stream or any(follows(flow, addition, a.stream) for a in every)
            return is_last or not has_steps
        if not before:
            return flow.leads_to(outer.stream, start)
        start = before[-1].stream


def follows(flow: Flow, before: Addition, stream: int) -> bool:
    """Tell whether a stream is an addition's result as it is, or normalised: no projection lies between."""
    index = before.node.index
    return index == stream or (flow.leads_to(index, stream) and not flow.between(index, stream) & flow.endings)
