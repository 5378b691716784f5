"""Ask numbers whether a piece of a forward mixes tokens: does one position of its end depend on others of its start?

    y = (key * scores.softmax(1)).sum(1, keepdim=True)      every token has a share in y
    y = experts[chosen](x)                                  each token has its own, whoever sorts and gathers them

The operations are run again with gradients. What chose (indices, masks, counts) stays as it was recorded, so that a token
which pushes another out of an expert does not mix with it. Norms hand on their input: a norm over tokens is a norm still.
Gates that are one for all tokens, as squeeze and excitation has them, weigh features, and carry no token to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flow import BOUNDED, VIEWS, WHOLE_NORMS, Flow, bits
from .forward import outside_inference_mode
from .graph import Operation
from .replay import Replays

__all__ = ["may_mix", "mixes_tokens"]

# A shift of the tokens before a feed-forward (RWKV's channel mixing) leaves it one: nothing is computed from several.
_SHIFTS = frozenset(("constant_pad_nd", "pad", "cat", "copy_"))
_PICKING = frozenset(("topk", "sort", "max", "min", "kthvalue", "median", "mode"))  # numbers, and where they were
_PLACES = 8  # that are asked, for one alone may happen to depend on one token: a group that took no other
_LOST = "on which axis the features of what they read or make lie is not known"
_GATES = BOUNDED | {"hardsigmoid", "hardsigmoid_", "clamp", "hardtanh"}


def may_mix(flow: Flow, inside: int) -> bool:
    """Tell whether any of these nodes may carry something from one token to another; of those of an MLP none may."""
    norms = 0
    for call in flow.norm_calls:
        norms |= (1 << (call.end or 0)) - (1 << call.start)
    rest = inside & ~(norms | flow.projections)
    return any(_may_move(flow.nodes[i]) for i in bits(rest))


def _may_move(node: Operation) -> bool:
    """Tell whether an operation makes numbers, and not each of the one number at its place."""
    tags = getattr(node.operation[0], "tags", ()) if node.operation else ()
    return node.is_floating and node.op not in VIEWS | WHOLE_NORMS | _SHIFTS and torch.Tag.pointwise not in tags


def mixes_tokens(replays: Replays, stream: int, inside: int, end: int, axis_of: Callable[[int], int | None]) -> bool:
    """Tell whether any of some positions of `end` depends on several positions of what these nodes read.

    Args:
        stream: The node that all of them compute from.
        inside: The nodes.
        axis_of: Tells the axis of a node's features, which are no positions; None where it is not known.

    Raises:
        ValueError: it cannot be told, and why.
    """
    starts = _read(replays.flow, stream, inside)
    made, axis = replays.flow.nodes[end].made[0], axis_of(end)
    if axis is None:
        raise ValueError(_LOST)
    try:
        with outside_inference_mode(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            values, leaves = _leaves([tensor for _, tensor in starts])
            for i in bits(inside):
                _run(replays, replays.flow.nodes[i], values, tuple(made.shape))
            known = [
                (leaf, found) for leaf, (i, _) in zip(leaves, starts, strict=True) if (found := axis_of(i)) is not None
            ]
            if any(_reaches_several(place, known) for place in _places(values[id(made)], axis)):
                return True
    except (RuntimeError, NotImplementedError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
    if len(known) < len(leaves):
        raise ValueError(_LOST)
    return False


def _read(flow: Flow, stream: int, inside: int) -> list[tuple[int, Tensor]]:
    """List the tensors that nodes read of a stream, of what was made of it before, or of a memory, each with its node."""
    found: dict[int, tuple[int, Tensor]] = {}
    of_tokens = flow.descendants[stream] | 1 << stream | (flow.features & flow.from_inputs)
    for k in bits(inside):
        for i, tensor in zip(flow.nodes[k].inputs, flow.nodes[k].taken, strict=False):
            if (of_tokens & ~inside) >> i & 1 and tensor.is_floating_point():
                found[id(tensor)] = (i, tensor)
    return list(found.values())


def _leaves(starts: Sequence[Tensor]) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Return random numbers that stand for tensors, by the `id` of each, and the leaves of which they are made."""
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(t.shape, generator=draw).to(t).requires_grad_() for t in starts if not t.is_meta]
    if not leaves or len(leaves) < len(starts):
        raise ValueError("there are no numbers to change")
    return {id(t): leaf.clone() for t, leaf in zip(starts, leaves, strict=True)}, leaves


def _run(replays: Replays, node: Operation, values: dict[int, Tensor], shape: tuple[int, ...]) -> None:
    """Run one operation. What it makes of integers and truth values is as it was recorded.

    Args:
        shape: That of the end of the branch.
    """
    if node.op in {*WHOLE_NORMS, "detach"} and id(node.taken[0]) in values:
        same = values[id(node.taken[0])]
        # Of hard - soft.detach() + soft, a choice that is trained, the soft one tells which tokens it is made of.
        values[id(node.made[0])] = same.detach() if node.op == "detach" else same
        return
    replays.step(node.index, values, _as_recorded)
    values.update((id(t), t) for t in node.made if not t.is_floating_point() and not t.is_complex())
    if node.op in _PICKING and len(node.made) == 2:
        values[id(node.made[0])] = _picked(node, values)
    if node.op in _GATES and len(node.shape) == len(shape) and math.prod(node.shape) < math.prod(shape):
        values[id(node.made[0])] = values[id(node.made[0])].detach()


def _picked(node: Operation, values: dict[int, Tensor]) -> Tensor:
    """Return what an operation picks where it picked when it was recorded; of other numbers it would pick others."""
    function: Any = node.operation[0] if node.operation else None
    args = node.operation[1] if node.operation else ()
    names = [argument.name for argument in function._schema.arguments]
    dim, indices, source = dict(zip(names, args, strict=False)).get("dim", -1), node.made[1], values[id(node.taken[0])]
    is_kept = indices.dim() == source.dim()
    found = source.gather(dim, indices if is_kept else indices.unsqueeze(dim))
    return found if is_kept else found.squeeze(dim)


def _as_recorded(tensor: Tensor) -> Tensor:
    """Return a tensor from outside; but random numbers for one of zeros, which would hide what depends on it."""
    if tensor.is_meta:
        raise ValueError("the meta device has no numbers")
    if tensor.is_floating_point() and not tensor.any():
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor.detach()


def _places(made: Tensor, axis: int) -> list[Tensor]:
    """Return the features at some positions of a tensor, the first and the last of them."""
    rows = made.movedim(axis, -1).flatten(0, -2)
    return [rows[n * (len(rows) - 1) // (_PLACES - 1)] for n in range(_PLACES)]


def _reaches_several(place: Tensor, leaves: Sequence[tuple[Tensor, int]]) -> bool:
    """Tell whether features at one position depend on several positions of one of the leaves.

    Args:
        leaves: Each with the axis of its features.
    """
    if not place.requires_grad or not leaves:
        return False
    weights = torch.randn(place.shape, generator=torch.Generator().manual_seed(0)).to(place)
    wanted = [leaf for leaf, _ in leaves]
    gradients = torch.autograd.grad((place * weights).sum(), wanted, retain_graph=True, allow_unused=True)
    found = [(gradient, axis) for gradient, (_, axis) in zip(gradients, leaves, strict=True) if gradient is not None]
    if any(not gradient.isfinite().all() for gradient, _ in found):
        raise ValueError("a derivative is not finite")
    return any(int(gradient.ne(0).any(axis).sum()) > 1 for gradient, axis in found)
