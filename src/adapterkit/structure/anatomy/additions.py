"""Say what a residual addition is: skip + branch, where the branch computes from the skip.

    x = x + dropout(down(gelu(up(norm(x)))))

Here x is the stream, and the skip; the branch is the rest. `skips` tells the two operands apart, `residual` finds all
additions of a forward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..tracing.flow import Flow
from ..tracing.graph import ADDITIONS, ModuleCall, Operation

__all__ = ["Addition", "addends", "block_of", "follows", "up_to_number"]

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
        is_projected: Whether the skip is a projection of the stream: W x + f(x).
        is_mixed: Whether it is a mixture of several streams that lie in one tensor: M h + p f(h).
    """

    node: Operation
    stream: int
    skip: int
    branch: int
    is_projected: bool = False
    is_mixed: bool = False


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


def follows(flow: Flow, before: Addition, stream: int) -> bool:
    """Tell whether a stream is an addition's result as it is, or normalised: no projection lies between."""
    index = before.node.index
    return index == stream or (flow.leads_to(index, stream) and not flow.between(index, stream) & flow.endings)
