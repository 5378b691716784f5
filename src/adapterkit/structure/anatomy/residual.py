"""Find the residual additions of a recorded forward.

Not every sum of something and what was computed from it is residual, so what only looks like one is taken out again: scores
+ position bias, gates of recurrent cells, steps inside another branch, the long skips of a U-Net, sums of trends.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..tracing.flow import BOUNDED, CONSTANT_STEPS, MATMULS, SOFTMAX, VIEWS, Flow, bits
from ..tracing.graph import Operation
from .additions import Addition, block_of, follows
from .skips import skip_and_branch

__all__ = ["residual_additions", "side_branches"]

_FACTORS = frozenset(("mul", "mul_"))
# What scores go through before their softmax.
_MASKING = CONSTANT_STEPS | {"masked_fill", "masked_fill_", "where", "clamp"}


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
    looks_like_one = {a.node.index for a in every if _is_one_layer(flow, a) or _is_attended(flow, a.node)}
    left = [a for a in every if flow.source(a.branch) not in streams and a.node.index not in looks_like_one]
    steps = _outermost(flow, left)
    return [_from_nearest(flow, step, steps) for step in steps], every


def _residual(flow: Flow, node: Operation, found: dict[int, Addition]) -> Addition | None:
    """Return the node as a residual addition; None if it is none.

    Args:
        found: The additions before it, by their nodes.
    """
    split = skip_and_branch(flow, node, found)
    if split is None:
        return None
    skip, branch, stream, is_projected, is_mixed = split
    if _is_straight_through(flow, stream, branch) or _is_inside_a_cell(flow, node):
        return None
    if flow.nodes[skip].shape != node.shape or _is_taken_off(flow, skip, branch) or _is_scores(flow, node):
        return None
    computes = flow.between(stream, branch) & flow.endings
    is_residual = computes and _ends(flow, branch, stream, found)
    return Addition(node, stream, skip, branch, is_projected, is_mixed) if is_residual else None


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
    # Behind sums, look once more, from the skip of each: the branch may end in W x + f(x), which starts with a projection.
    starts = [_first_skip(flow, i, found) for i in bits(last & sums)]
    deeper = [flow.nearest(i, flow.endings, inside, stop=flow.products) for i in starts]
    return bool(last & flow.endings) or any(deeper)


def _first_skip(flow: Flow, index: int, found: dict[int, Addition]) -> int:
    """Return what a sum starts from: of (x + f(x)) + g(…) it is x."""
    while index in found:
        index = flow.source(found[index].skip)
    return index


def _is_straight_through(flow: Flow, stream: int, branch: int) -> bool:
    """Tell whether a branch is something less the stream itself: x + (quantised - x), whose value is `quantised`."""
    node = flow.nodes[flow.source(branch)]
    return node.op in ("sub", "rsub") and any(flow.source(i) == stream for i in node.inputs)


def _is_inside_a_cell(flow: Flow, node: Operation) -> bool:
    """Tell whether a sum is a gate of a recurrent cell: all that reads it, or it and a bias, is a sigmoid or tanh."""
    readers, todo = set[int](), [node.index]
    while todo:
        for i in flow.readers_through_views(todo.pop()):
            reader = flow.nodes[i]
            is_shift = reader.op in ("add", "sub", "add_", "sub_") and len(flow.activations(reader)) == 1
            (todo.append if is_shift else readers.add)(i)
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
            others = [k for k in flow.activations(flow.nodes[i]) if flow.nodes[k].is_floating]
            if flow.nodes[i].op in _MASKING and len(others) == 1:
                todo.append(i)
    return False


def _from_nearest(flow: Flow, step: Addition, steps: list[Addition]) -> Addition:
    """Return a step with the stream that its branch truly reads: in y2 = x2 + g(x1 + f(x2)) that is the sum x1 + f(x2).

    Reversible blocks add to one stream what they compute from the other.
    """
    inside = flow.between(step.stream, step.branch)
    # Of a stream beside this one, not of one that the branch makes of it: there y + g(y), with y = W x, is further inside.
    beside = [a for a in steps if inside >> a.node.index & 1 and not flow.leads_to(step.stream, flow.source(a.skip))]
    for i in reversed([a.node.index for a in beside]):
        rest = inside & flow.descendants[i]
        # What operations read, not what is put together with it on the way: one half of a tensor is not the other.
        computing = [k for k in bits(rest | 1 << step.branch) if flow.nodes[k].op not in VIEWS | {"cat", "stack"}]
        read = {flow.source(j) for k in computing for j in flow.activations(flow.nodes[k])} - {i}
        if rest & flow.endings and not any(j == step.stream or (inside & ~rest) >> j & 1 for j in read):
            return replace(step, stream=i)
    return step


def side_branches(flow: Flow, steps: list[Addition], every: list[Addition]) -> int:
    """Return the set of nodes that are beside what a sub-layer computes, so that no role names their layers.

    - Low-rank branches beside single layers: `b(a(x))` of W x + b(a(x)), a LoRA built in. Roles name W, the layer itself.
    - Products that mix the several streams of hyper-connections, before a branch and after it.
    """
    found, lasting = 0, {step.node.index for step in steps}
    for addition in every:
        if addition.node.index not in lasting and (_is_low_rank(flow, addition) or _is_one_layer(flow, addition)):
            found |= flow.between(addition.stream, addition.branch)
        if addition.is_mixed:
            found |= _mixing_streams(flow, addition)
    return found


def _is_one_layer(flow: Flow, addition: Addition) -> bool:
    """Tell whether an addition is W x + b(a(x)) with nothing curved in it: a layer with a LoRA built in, and no step."""
    if not addition.is_projected:
        return False
    inside = flow.between(addition.stream, addition.branch) & ~flow.projections
    return all(flow.nodes[i].op in VIEWS | CONSTANT_STEPS for i in bits(inside))


def _is_low_rank(flow: Flow, addition: Addition) -> bool:
    """Tell whether an addition is W x + b(a(x)), where a(x) is narrower than both."""
    inside = flow.between(addition.stream, addition.branch)
    narrow = (i for i in bits(inside & flow.projections) if _size(flow, i) < _size(flow, addition.node.index))
    return addition.is_projected and any(narrow)


def _mixing_streams(flow: Flow, addition: Addition) -> int:
    """Return the set of projections in a branch whose weight has no axis of features: it mixes streams, and no features."""
    hidden, found = addition.node.shape[-1], 0
    for i in bits(flow.between(addition.stream, addition.branch) & flow.projections):
        weights = [
            flow.nodes[j].shape for j in flow.nodes[i].inputs if flow.is_constant[j] and len(flow.nodes[j].shape) > 1
        ]
        if weights and not any(hidden in shape[-2:] for shape in weights):
            found |= 1 << i
    return found


def _size(flow: Flow, index: int) -> int:
    """Return how many numbers a node's tensor has."""
    return math.prod(flow.nodes[index].shape)


def _is_attended(flow: Flow, node: Operation) -> bool:
    """Tell whether attentions read a sum as it is, and nothing else does but sums: values that a layer has from another."""
    readers = list(flow.readers_through_views(node.index))
    steps = {"add", "add_", "mul", "mul_"}  # the next layer mixes it with its own
    cores = [i for i in readers if (flow.products | flow.attentions) >> i & 1]
    return bool(cores) and all(i in cores or flow.nodes[i].op in steps for i in readers)


def _outermost(flow: Flow, additions: list[Addition]) -> list[Addition]:
    """Return the additions without those inside a branch of another in their block, and without long skips."""
    blocks = {addition.node.index: block_of(addition.node.call) for addition in additions}
    inner: dict[int, list[Addition]] = {}
    for addition in additions:
        inside = flow.between(addition.stream, addition.branch)
        inner[addition.node.index] = [other for other in additions if inside >> other.node.index & 1]
    # A skip is long if additions of several blocks lie in its branch, as in a U-Net, or a stream with layers of its own.
    is_long = {}
    for outer in additions:
        own = [other for other in inner[outer.node.index] if other.node.index >= _own_start(flow, outer)]
        is_several = len({blocks[other.node.index] for other in own} - {None}) > 1
        is_long[outer.node.index] = is_several or _holds_a_stream(flow, outer, own)
    return [
        addition
        for addition in additions
        if not is_long[addition.node.index]
        and not any(
            not is_long[outer.node.index]
            and (blocks[outer.node.index] == blocks[addition.node.index] or _is_low_rank(flow, addition))
            and _is_nested(flow, addition, outer, inner[outer.node.index], additions)
            for outer in additions
        )
    ]


def _own_start(flow: Flow, addition: Addition) -> int:
    """Return the first node of the module call that adds, if it computes the branch from the stream inside; else 0.

    What was made before that call is a memory, which the branch only looks at, even if it was made of the same stream.
    """
    start = addition.node.call.start if addition.node.call else 0
    inside = flow.between(addition.stream, addition.branch) >> start << start | 1 << addition.stream
    return start if flow.nearest(addition.branch, 1 << addition.stream, inside) else 0


def _holds_a_stream(flow: Flow, outer: Addition, inside: list[Addition]) -> bool:
    """Tell whether a branch is a transformer behind a projection: x + proj_out(layers(proj_in(x))), as in diffusion U-Nets.

    Its layers are what is adapted, and the skip around them is long, however few they are. A chain of two additions that
    compute on tokens is a layer; one alone, or one of convolutions, belongs to the branch. A stream that is not made of the
    outer one, and only looks at it, is beside it.

    Args:
        inside: The additions in the branch of `outer`.
    """
    found = {addition.node.index: addition for addition in inside}
    for addition in inside:
        first = _first_skip(flow, flow.source(addition.skip), found)
        if first != outer.stream and not flow.leads_to(outer.stream, first):
            continue
        is_behind = flow.between(outer.stream, addition.stream) & flow.projections
        following = [
            a for a in inside if a is not addition and follows(flow, addition, a.stream) and _is_in(outer, addition, a)
        ]
        computed = [flow.between(a.stream, a.branch) for a in (addition, *following)]
        is_value = _arrives_whole(flow, [addition, *following][-1].node.index, outer)
        if is_behind and following and is_value and any(_is_of_tokens(flow, nodes) for nodes in computed):
            return True
    return False


def _arrives_whole(flow: Flow, start: int, outer: Addition) -> bool:
    """Tell whether a node arrives at the end of a branch as a value, not as a gate: a factor of more numbers than its own.

    A transformer of one channel may compute how much each position of a convolution counts.
    """
    inside, seen, todo = flow.between(outer.stream, outer.branch), 0, [start]
    while todo:
        i = todo.pop()
        if i == outer.branch:
            return True
        readers = [flow.nodes[k] for k in flow.readers[i] if inside >> k & 1 and not seen >> k & 1]
        size = math.prod(flow.nodes[i].shape)
        todo += [n.index for n in readers if n.op not in _FACTORS or math.prod(n.shape) <= size]
        seen |= sum(1 << n.index for n in readers)
    return False


def _is_of_tokens(flow: Flow, nodes: int) -> bool:
    """Tell whether a branch attends, or multiplies features by a matrix, as no branch of convolutions does."""
    linear = (i for i in bits(nodes & flow.projections) if "convolution" not in flow.nodes[i].op)
    return bool(nodes & (flow.products | flow.attentions)) or any(linear)


def _is_in(outer: Addition, one: Addition, other: Addition) -> bool:
    """Tell whether two additions are made in a call that the call of a third made, or in that itself.

    MobileBERT narrows its stream within each block and adds around that in the block's last module: both are streams.
    """
    around = [*one.node.call.around()] if one.node.call else []
    shared = next((c for c in (other.node.call.around() if other.node.call else ()) if c in around), None)
    return outer.node.call is None or (shared is not None and outer.node.call in shared.around())


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
    if addition.is_projected and not outer.is_projected and not _goes_on(flow, addition, every):
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


def _goes_on(flow: Flow, addition: Addition, every: list[Addition]) -> bool:
    """Tell whether something is added to a sum in turn; to W x + b(a(x)), a layer with a LoRA built in, nothing is."""
    return any(follows(flow, addition, after.stream) and not after.is_projected for after in every)


def _escapes(flow: Flow, addition: Addition, outer: Addition) -> bool:
    """Tell whether a sum in a branch is read outside of it, too: in reversible blocks it is a stream of its own."""
    branch = flow.between(outer.stream, outer.branch) | 1 << outer.node.index
    return any(not branch >> i & 1 for i in flow.readers_through_views(addition.node.index))
