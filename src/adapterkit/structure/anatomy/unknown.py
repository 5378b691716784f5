"""List what is not understood in a model, and refuse the roles that would rest on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ...errors import TargetError
from ..paths import ancestors
from ..tracing.flow import Flow, bits
from .blocks import within
from .branches import Branch
from .description import Anatomy, Unknown

__all__ = ["check_known", "unknown_operations"]


def unknown_operations(flow: Flow, branches: Sequence[Branch]) -> Iterator[Unknown]:
    """Yield the operations of which neither their names nor numbers tell what they do, each once for a module."""
    found: dict[tuple[str, str], Unknown] = {}
    for i in bits(flow.unknown):
        call, name = flow.nodes[i].call, flow.nodes[i].op
        path = (call.path if call else None) or ""
        one = Unknown(path, name, flow.evidence[i].reason, _is_aside(flow, branches, i, path))
        before = found.setdefault((path, name), one)
        if before.is_aside:  # another call of the module may be in the midst
            found[path, name] = one
    yield from found.values()


def _is_aside(flow: Flow, branches: Sequence[Branch], node: int, path: str) -> bool:
    """Tell whether an operation lies before the first step of every stream, or after the last and beside no block."""
    inside = [b for b in branches if b.block is not None]
    if not inside:  # then it may be what hides the blocks
        return False
    is_before = not any(flow.leads_to(b.addition.stream, node) or node > b.addition.stream for b in inside)
    is_after = not flow.descendants[node] & sum(1 << i for i in {b.addition.node.index for b in inside})
    holders = {holder for b in inside if (holder := (b.block or "").rpartition(".")[0])}
    is_beside = any(within(path, place) for place in (*holders, *{b.block for b in inside if b.block}))
    return not is_beside and (is_before or is_after)


def check_known(role: str, anatomy: Anatomy, excluded: Collection[str]) -> None:
    """Raise TargetError where a role would rest on an operation that is not understood.

    Args:
        excluded: Modules that the user leaves out, with what is in them.
    """
    if role in ("@embedding", "@output_embedding"):
        return
    left_out = {*excluded}
    for one in anatomy.unknown:
        if one.is_aside or left_out.intersection(ancestors(one.path)):
            continue
        where = f"set exclude=[{one.path!r}] to go without it, " if one.path else ""
        raise TargetError(
            f"{role!r}: {one.path!r} runs {one.operation!r}, which is not understood ({one.reason}), so that it may be any "
            f"part of a block. Name modules by pattern, {where}or, if it multiplies an input by a weight, describe its "
            f"module by a HostType with products=({one.operation!r},)"
        )
