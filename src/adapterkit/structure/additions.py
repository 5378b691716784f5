"""Find the residual additions of a recorded forward: skip + branch, where the branch computes from the skip."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .flow import Flow
from .graph import ADDITIONS, Call, Node

__all__ = ["Addition", "block_of", "residual_additions"]

_NUMBERED = re.compile(r"(.*?(?:^|\.)\d+)(?:\.|$)")


@dataclass(frozen=True)
class Addition:
    """One residual addition.

    Attributes:
        node: The addition.
        stream: The residual stream, back through views and constant factors.
        skip: The operand that carries the stream.
        branch: The operand that a sub-layer computed.
    """

    node: Node
    stream: int
    skip: int
    branch: int


def residual_additions(flow: Flow) -> list[Addition]:
    """The residual additions, in order: not those inside another's branch in the same block, nor long skips."""
    found: dict[int, Addition] = {}
    for node in flow.nodes:
        addition = _residual(flow, node, found)
        if addition is not None:
            found[node.index] = addition
    return _outermost(flow, list(found.values()))


def block_of(call: Call | None) -> tuple[str, int] | None:
    """The outermost numbered module around a call, as (path, which call of it); None if there is none."""
    for around in reversed(list(call.around()) if call else []):
        match = _NUMBERED.match(around.path or "")
        if match:
            return match[1], id(around)
    return None


def _residual(flow: Flow, node: Node, found: dict[int, Addition]) -> Addition | None:
    """The node as a residual addition, if it is one."""
    if node.op not in ADDITIONS or not node.is_floating or len(node.shape) < 2:
        return None
    operands = [i for i in node.inputs if flow.nodes[i].is_floating][:2]
    if len(operands) < 2 or any(flow.is_constant[i] or flow.nodes[i].shape != node.shape for i in operands):
        return None
    split = _skip_and_branch(flow, operands[0], operands[1], found)
    if split is None:
        return None
    skip, branch, stream = split
    if _is_straight_through(flow, stream, branch):
        return None
    inside = flow.between(stream, branch)
    computes = inside & flow.endings
    # Scores + position bias has projections in both, too, but a branch *ends* in one.
    ends = flow.nearest(branch, flow.endings | _mask(found), inside, stop=flow.products)
    return Addition(node, stream, skip, branch) if computes and ends else None


def _skip_and_branch(flow: Flow, a: int, b: int, found: dict[int, Addition]) -> tuple[int, int, int] | None:
    """Which operand is the stream, and which was computed from it: (skip, branch, stream)."""
    for reach in (flow.source, flow.unscaled):
        roots = [i if i in found else reach(i) for i in (a, b)]
        for skip, branch, root, other in ((a, b, roots[0], roots[1]), (b, a, roots[1], roots[0])):
            if flow.leads_to(root, branch) and not flow.leads_to(other, skip):
                return skip, branch, root
    for skip, branch in ((a, b), (b, a)):  # (x + attention(x)) + mlp(x)
        before = found.get(flow.source(skip))
        if before is not None and flow.leads_to(before.stream, branch):
            return skip, branch, before.stream
    return _projected_skip(flow, a, b)


def _projected_skip(flow: Flow, a: int, b: int) -> tuple[int, int, int] | None:
    """The same where a block that changes the stream's width projects its skip, or pools it: W x + f(x)."""
    common = flow.ancestors[a] & flow.ancestors[b] & flow.from_inputs
    if not common or flow.leads_to(a, b) or flow.leads_to(b, a):
        return None
    stream = common.bit_length() - 1  # the last thing that both come of
    work = {i: flow.between(stream, i) & flow.endings for i in (a, b)}
    skip, branch = sorted((a, b), key=lambda i: work[i].bit_count())
    is_light = work[skip].bit_count() <= 2 and not work[skip] & flow.attentions  # a projection, a pooling
    is_deeper = work[branch].bit_count() > work[skip].bit_count()
    return (skip, branch, stream) if work[skip] and is_light and is_deeper else None


def _is_straight_through(flow: Flow, stream: int, branch: int) -> bool:
    """Whether a branch is something less the stream itself: x + (quantised - x), whose value is `quantised`."""
    node = flow.nodes[flow.source(branch)]
    return node.op in ("sub", "rsub") and any(flow.source(i) == stream for i in node.inputs)


def _outermost(flow: Flow, additions: list[Addition]) -> list[Addition]:
    """Without additions inside a branch of another in their block, and without skips that span several blocks."""
    blocks = {addition.node.index: block_of(addition.node.call) for addition in additions}
    kept = []
    inner: dict[int, list[Addition]] = {}
    for addition in additions:
        inside = flow.between(addition.stream, addition.branch)
        inner[addition.node.index] = [other for other in additions if inside >> other.node.index & 1]
    spans = {index: len({blocks[o.node.index] for o in others} - {None}) for index, others in inner.items()}
    for addition in additions:
        index = addition.node.index
        holders = [o for o in additions if any(i is addition for i in inner[o.node.index])]
        nested = any(blocks[o.node.index] == blocks[index] and spans[o.node.index] < 2 for o in holders)
        if not nested and spans[index] < 2:
            kept.append(addition)
    return kept


def _mask(indices: dict[int, Addition]) -> int:
    return sum(1 << i for i in indices)
