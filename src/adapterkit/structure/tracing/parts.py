"""Tell which part of a tensor a slice is, and what was put there: `cat([a, b]).chunk(2)[0]` is a.

Reversible blocks keep two streams in one tensor. They cut it, change the halves, and put them together again; each stream
is followed through that by the ranges of indices alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .graph import Operation

__all__ = ["piece_of"]

# (axis, first index, index after the last), such as (2, 0, 16) of the first half of (2, 5, 32).
Range = tuple[int, int, int]


def piece_of(nodes: Sequence[Operation], index: int) -> int | None:
    """Return the node that was put, by `cat` or `stack`, exactly where this node cuts; None if it cuts no such tensor."""
    node = nodes[index]
    if node.op == "item" and nodes[node.inputs[0]].op == "unbind":
        unbound = nodes[node.inputs[0]]
        return _stacked(nodes[unbound.inputs[0]], _axis_of(unbound, 0), node.numbers[0])
    if node.op == "select":
        _, axis, at = _arguments(node, ("", 0, 0))
        source = nodes[node.inputs[0]]
        return _stacked(source, axis % len(source.shape), at)
    cut = _range(nodes, node)
    if cut is None:
        return None
    whole, (axis, start, stop) = cut
    if whole.op != "cat" or _axis_of(whole, 0) != axis:
        return None
    at = 0
    for i in whole.inputs[: len(whole.taken)]:
        if at == start and at + nodes[i].shape[axis] == stop:
            return i
        at += nodes[i].shape[axis] if nodes[i].shape != (0,) else 0  # torch lets an empty tensor stand among others
    return None


def _stacked(stack: Operation, axis: int, at: int) -> int | None:
    """Return what a stack has at an index of this axis; None if the node is no stack along it."""
    is_along = stack.op == "stack" and _axis_of(stack, 0) == axis
    return stack.inputs[at % len(stack.taken)] if is_along else None


def _range(nodes: Sequence[Operation], node: Operation) -> tuple[Operation, Range] | None:
    """Return the tensor that a node cuts, and where; None if it cuts none in one piece."""
    whole = nodes[node.inputs[0]] if node.inputs else None
    if node.op == "slice" and whole is not None:
        _, axis, start, stop, step = _arguments(node, ("", 0, None, None, 1))
        axis %= len(whole.shape)
        first, last, _ = slice(start, stop).indices(whole.shape[axis])
        return (whole, (axis, first, last)) if step == 1 else None
    if node.op == "item" and whole is not None and whole.op.endswith(("split", "split_with_sizes")):
        axis, at = _axis_of(whole, 0, at=2), node.numbers[0]
        start = sum(tensor.shape[axis] for tensor in whole.made[:at])
        return nodes[whole.inputs[0]], (axis, start, start + node.shape[axis])
    return None


def _axis_of(node: Operation, default: int, at: int = 1) -> int:
    """Return the axis that an operation is called with, from the front."""
    rank = len(node.made[0].shape)
    args = _arguments(node, ("",) * at + (default,))
    # What `stack` makes has one axis more than what it takes, and `unbind` one axis less: they count from the longer.
    return int(args[at]) % (rank + (node.op == "unbind"))


def _arguments(node: Operation, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an operation by position, with defaults for those that were left out."""
    if node.operation is None:
        return defaults
    function: Any = node.operation[0]
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, node.operation[1], strict=False)) | dict(node.operation[2])
    return tuple(given.get(name, default) for name, default in zip(names, defaults, strict=False))
