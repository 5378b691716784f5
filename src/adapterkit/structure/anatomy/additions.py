"""Find the residual additions of a recorded forward: skip + branch, where the branch computes from the skip.

    x = x + dropout(down(gelu(up(norm(x)))))

Here x is the stream, and the skip; the branch is the rest. What tells the two operands apart is that one is computed from
the other. Not every such sum is residual, so what only looks like one is taken out again: scores + position bias, gates of
recurrent cells, steps inside another branch, the long skips of a U-Net.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ..tracing.flow import BOUNDED, CONSTANT_STEPS, MATMULS, SOFTMAX, VIEWS, Flow, bits
from ..tracing.graph import ADDITIONS, ModuleCall, Operation

__all__ = ["Addition", "addends", "block_of", "follows", "residual_additions", "side_branches", "up_to_number"]

# The path up to its first number: "encoder.layer.0" of "encoder.layer.0.attention.1".
_NUMBERED = re.compile(r"(.*?(?:^|\.)\d+)(?:\.|$)")

# What scores go through before their softmax.
_MASKING = CONSTANT_STEPS | {"masked_fill", "masked_fill_", "where", "clamp"}


@dataclass(frozen=True)
class Addition:
    """One residual addition.

    Attributes:
        node: The addition itself; its result is the stream from there on.
        stream: The node of the stream that the branch is computed from.
        skip: The operand that carries the stream. It is `stream`, but for views and constant factors.
        branch: The operand that a sub-layer computed.
        is_projected: Whether the skip is a projection of the stream: W x + f(x).
    """

    node: Operation
    stream: int
    skip: int
    branch: int
    is_projected: bool = False


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
    steps = _outermost(flow, [a for a in every if flow.source(a.branch) not in streams])
    return [_from_nearest(flow, step, steps) for step in steps], every


def _from_nearest(flow: Flow, step: Addition, steps: list[Addition]) -> Addition:
    """Return a step with the stream that its branch truly reads: in y2 = x2 + g(x1 + f(x2)) that is the sum x1 + f(x2).

    Reversible blocks add to one stream what they compute from the other.
    """
    inside = flow.between(step.stream, step.branch)
    sums = [a.node.index for a in steps if inside >> a.node.index & 1]
    for i in reversed(sums):
        rest = inside & flow.descendants[i]
        read = {j for k in bits(rest | 1 << step.branch) for j in flow.nodes[k].inputs if j != i}
        if rest & flow.endings and not any(j == step.stream or (inside & ~rest) >> j & 1 for j in read):
            return replace(step, stream=i)
    return step


def side_branches(flow: Flow, steps: list[Addition], every: list[Addition]) -> int:
    """Return the set of nodes in low-rank branches beside single layers: `b(a(x))` of W x + b(a(x)), a LoRA built in.

    What such a layer computes is the layer's; roles name W, the layer itself, and not what someone added to it.
    """
    found, lasting = 0, {step.node.index for step in steps}
    for addition in every:
        inside = flow.between(addition.stream, addition.branch)
        narrow = [i for i in bits(inside & flow.projections) if _size(flow, i) < _size(flow, addition.node.index)]
        if addition.is_projected and addition.node.index not in lasting and narrow:
            found |= inside
    return found


def _size(flow: Flow, index: int) -> int:
    """Return how many numbers a node's tensor has."""
    return math.prod(flow.nodes[index].shape)


def addends(flow: Flow, node: Operation) -> tuple[int, int] | None:
    """Return the two activations that a node adds, one of them times a gate (addcmul) or not; None if it adds none.

    One may be smaller, and is added to each index of some axis: what one token computed, to all tokens.
    """
    if node.op not in ADDITIONS or not node.is_floating or len(node.shape) < 2:
        return None
    added = [i for i in node.inputs[:3] if flow.nodes[i].is_floating and not flow.is_constant[i]]
    operands = [i for i in added if flow.nodes[i].shape == node.shape]
    if len(operands) == 1 and len(added) == 2:
        operands = added if all(len(flow.nodes[i].shape) == len(node.shape) for i in added) else operands
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
    if operands is None:
        return None
    split = _skip_and_branch(flow, *operands, found) or _mixed_skip(flow, node, *operands)
    is_projected = split is None
    split = split or _projected_skip(flow, node, *operands, found)
    if split is None:
        return None
    skip, branch, stream = split
    if _is_straight_through(flow, stream, branch) or _is_inside_a_cell(flow, node):
        return None
    if flow.nodes[skip].shape != node.shape or _is_taken_off(flow, skip, branch) or _is_scores(flow, node):
        return None
    computes = flow.between(stream, branch) & flow.endings
    is_residual = computes and _ends(flow, branch, stream, found)
    return Addition(node, stream, skip, branch, is_projected) if is_residual else None


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
    # Behind a sum, look once more, from its skip: the stream that it continues, or a projection of its own (W x + f(x)).
    inner = [found[i].skip for i in bits(last & sums)]
    deeper = [flow.nearest(i, flow.endings, inside, stop=flow.products | sums) for i in inner]
    return bool(last & flow.endings) or any(deeper)


def _skip_and_branch(flow: Flow, a: int, b: int, found: dict[int, Addition]) -> tuple[int, int, int] | None:
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


def _is_taken_off(flow: Flow, skip: int, branch: int) -> bool:
    """Tell whether a skip is what was computed from a stream and then taken off it, so that it is no stream itself.

    Autoformer takes a moving average off: `trend = average(s)`, `x = s - trend`. Trends are summed up beside the stream.
    """
    source = flow.source(skip)
    return any(
        flow.nodes[i].op in ("sub", "sub_", "rsub")
        and (i == branch or flow.leads_to(i, branch))
        and any(flow.leads_to(j, source) for j in flow.activations(flow.nodes[i]))
        for i in flow.readers_through_views(source)
    )


def _is_scores(flow: Flow, node: Operation) -> bool:
    """Tell whether a sum is an attention's scores: a softmax takes it as it is, masked or scaled."""
    todo = [node.index]
    while todo:
        for i in flow.readers_through_views(todo.pop()):
            if flow.nodes[i].op in SOFTMAX:
                return True
            # A mask or a bias of positions may be added first; something computed may not, for then this is a stream.
            others = flow.activations(flow.nodes[i])
            if flow.nodes[i].op in _MASKING and len(others) == 1:
                todo.append(i)
    return False


def _outermost(flow: Flow, additions: list[Addition]) -> list[Addition]:
    """Return the additions without those inside a branch of another in their block, and without long skips."""
    blocks = {addition.node.index: block_of(addition.node.call) for addition in additions}
    inner: dict[int, list[Addition]] = {}
    for addition in additions:
        inside = flow.between(addition.stream, addition.branch)
        inner[addition.node.index] = [other for other in additions if inside >> other.node.index & 1]
    # A skip is long if additions of several blocks lie in its branch, as in a U-Net, or a stream with layers of its own.
    is_long = {
        outer.node.index: len({blocks[o.node.index] for o in inner[outer.node.index]} - {None}) > 1
        or _holds_a_stream(flow, outer, inner[outer.node.index])
        for outer in additions
    }
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


def _holds_a_stream(flow: Flow, outer: Addition, inside: list[Addition]) -> bool:
    """Tell whether a branch is a transformer behind a projection: x + proj_out(layers(proj_in(x))), as in diffusion U-Nets.

    Its layers are what is adapted, and the skip around them is long, however few they are. A chain of two additions with
    an attention among them is a layer; one alone, or one of convolutions, belongs to the branch.

    Args:
        inside: The additions in the branch of `outer`.
    """
    for addition in inside:
        is_behind = flow.between(outer.stream, addition.stream) & flow.projections
        following = [after for after in inside if after is not addition and follows(flow, addition, after.stream)]
        computed = [flow.between(a.stream, a.branch) for a in (addition, *following)]
        if is_behind and following and any(nodes & (flow.products | flow.attentions) for nodes in computed):
            return True
    return False


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
    if addition.is_projected and not outer.is_projected:  # a layer with a side branch: W x + b(a(x)), a LoRA built in
        return addition.stream == outer.stream or flow.leads_to(outer.stream, addition.stream)
    start = addition.stream
    while True:  # back along its stream, from one addition to the one before
        before = [a for a in inside if follows(flow, a, start)]
        if not before and start == outer.stream:  # x + f(x + g(x)): a step of its own if something is added to it in turn
            is_last = not flow.between(addition.node.index, outer.branch) & flow.endings
            has_steps = start != addition.stream or any(follows(flow, addition, a.stream) for a in every)
            return is_last or not (has_steps or _escapes(flow, addition, outer))
        if not before:
            return flow.leads_to(outer.stream, start)
        start = before[-1].stream


def _escapes(flow: Flow, addition: Addition, outer: Addition) -> bool:
    """Tell whether a sum in a branch is read outside of it, too: in reversible blocks it is a stream of its own."""
    branch = flow.between(outer.stream, outer.branch) | 1 << outer.node.index
    return any(not branch >> i & 1 for i in flow.readers_through_views(addition.node.index))


def follows(flow: Flow, before: Addition, stream: int) -> bool:
    """Tell whether a stream is an addition's result as it is, or normalised: no projection lies between."""
    index = before.node.index
    return index == stream or (flow.leads_to(index, stream) and not flow.between(index, stream) & flow.endings)
