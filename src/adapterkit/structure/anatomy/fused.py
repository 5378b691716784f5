"""Tell which features of a fused projection are an attention's queries, which its keys, which its values.

GPT-2's `c_attn` returns 3 x 768 features, queries first. GPT-NeoX lays them out head by head; others group keys. So it is
told by derivatives, not by layouts: a feature is the query's if the tensor that enters the product with the keys depends on
it (see `tracing.replay`). That holds for any order of heads, grouped keys, rotary positions, norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...errors import TargetError
from ..tracing.flow import Flow
from ..tracing.graph import ModuleCall
from ..tracing.replay import Replays, along
from .attention_operands import Projected
from .description import Anatomy, FusedProjection, Slices
from .feature_axes import FeatureAxes

__all__ = ["fused_projections", "fused_slices"]

_WORDS = {"q": "queries", "k": "keys", "v": "values"}


def fused_slices(anatomy: Anatomy, path: str, weight: str | None = None) -> Slices:
    """Return which features of a module's output, or of a parameter that it projects with, are queries, keys and values.

    Args:
        path: The module.
        weight: The name of the parameter in it; None for the module's output.

    Returns:
        For each of "q", "k", "v" that it makes: ranges (start, stop) of features. () where it makes at most one of them.

    Raises:
        TargetError: they cannot be told apart, or are not features of what the module returns.
    """
    every = [f for s in (*anatomy.sublayers, *anatomy.others) for f in s.fused if f.path == path]
    found = list(dict.fromkeys(f for f in every if f.weight == weight))
    # The reason stands beside the slices that it took away: why they are unknown is told only to who needs them.
    problem = next((f.problem for f in found if f.problem), "its calls differ" if len(found) > 1 else "")
    if problem:
        whole = f"{path}.{weight}" if weight else path
        raise TargetError(
            f"{whole!r} makes queries, keys and values at once, and whose its features are cannot be told: {problem}. "
            f"Target the whole of it by pattern: {whole!r}"
        )
    if every and not found:  # it is fused, but in another tensor than was asked for
        names = list(dict.fromkeys(f"{path}.{f.weight}" if f.weight else path for f in every))
        asked = f"{path}.{weight}" if weight else "features of what it returns"
        raise TargetError(f"{path!r} makes queries, keys and values with {names}, not with {asked}. Target that")
    return found[0].slices if found else ()


def fused_projections(
    flow: Flow, axes: FeatureAxes, replays: Replays, projected: Iterable[Projected]
) -> Iterator[FusedProjection]:
    """Yield the modules that make more than one of an attention's queries, keys and values, with what is whose."""
    by_path: dict[str, list[tuple[Projected, ModuleCall]]] = {}
    for one in projected:
        call = flow.nodes[one.node].call
        if call is not None and call.path is not None:
            by_path.setdefault(call.path, []).append((one, call))
    for path, made in by_path.items():
        if len({one.part for one, _ in made}) > 1:
            yield from _fused_at(flow, axes, replays, path, made)


def _fused_at(
    flow: Flow, axes: FeatureAxes, replays: Replays, path: str, made: list[tuple[Projected, ModuleCall]]
) -> Iterator[FusedProjection]:
    """Yield what one module makes: one for its output, or one for each parameter that it projects with inside.

    Args:
        made: The module's projections, each with the call that it ran in.
    """
    depends: dict[str | None, dict[str, Tensor]] = {}
    known: dict[str | None, int | None] = {}
    try:
        for one, call in made:
            source = _output(flow, axes, one, call) or _parameter(flow, axes, one, call)
            axis = source.axis if source.weight is None else None  # a parameter may be read in parts
            found = replays.dependence(source.start, one.reader, axis, source.since)
            masks = depends.setdefault(source.weight, {})
            masks[one.part] = masks.get(one.part, torch.zeros_like(found)) | found
            known[source.weight] = source.axis
    except (ValueError, RuntimeError) as error:  # the latter where its calls return different shapes
        # The reason goes into the message of `fused_slices`: most adapters ask for no slices, and need no error here.
        yield FusedProjection(path, None, -1, (), str(error))
        return
    for weight, masks in depends.items():
        axis = known[weight] or 0
        if weight is not None:
            # The features lie on the axis along which the masks are not all true: rows of nn.Linear, columns of Conv1D.
            axis = next((a for a in (0, 1) if not all(along(mask, a).all() for mask in masks.values())), axis)
            masks = {part: along(mask, axis) for part, mask in masks.items()}  # noqa: PLW2901  # whole ones until then
        problem = _problem(masks)
        slices = tuple((part, _ranges(masks[part])) for part in _WORDS if part in masks and not problem)
        yield FusedProjection(path, weight, axis, slices, problem)


@dataclass(frozen=True)
class _Source:
    """The tensor whose features are told apart: what a module returns, or a parameter that it projects with inside.

    Attributes:
        weight: The parameter's name in the module; None for what it returns.
        start: The tensor's node.
        axis: The axis of its features; None if it is not known.
        since: The first node that counts: an earlier call may read the same parameter.
    """

    weight: str | None
    start: int
    axis: int | None
    since: int = 0


def _output(flow: Flow, axes: FeatureAxes, one: Projected, call: ModuleCall) -> _Source | None:
    """Return what the module returns, if that is one tensor, and between the projection and the attention; else None.

    Raises:
        ValueError: the axis of its features is not known.
    """
    returned = [i for _, i in call.outputs if not flow.is_constant[i] and flow.nodes[i].is_floating]
    if len(returned) != 1 or call.end is None or call.end > one.reader[0]:
        return None
    is_after = returned[0] == one.node or flow.leads_to(one.node, returned[0])
    is_before = returned[0] == one.operand or flow.leads_to(returned[0], one.operand)
    if not is_after or not is_before:
        return None
    axis = axes.of(returned[0])
    if axis is None:
        raise ValueError("the axis of its features is not known")
    return _Source(None, returned[0], axis - len(flow.nodes[returned[0]].shape))


def _parameter(flow: Flow, axes: FeatureAxes, one: Projected, call: ModuleCall) -> _Source:
    """Return the parameter that the projection reads.

    Raises:
        ValueError: it is no matrix of the module's own; the message says what it is.
    """
    node = flow.nodes[one.node]
    # Back from the operand that is a weight, through casts and transposes, to the parameter itself.
    taken = [i for i in node.inputs[: len(node.taken)] if flow.is_constant[i] and len(flow.nodes[i].shape) > 1]
    if not taken:
        raise ValueError(f"it projects inside with {node.op!r}, and which Parameter that multiplies by is not known")
    origin = taken[-1]
    while flow.nodes[origin].op != "parameter" and len(flow.nodes[origin].inputs) == 1:
        (origin,) = flow.nodes[origin].inputs
    held = flow.nodes[origin].made[0]
    name = next((name for name, parameter in call.module.named_parameters() if parameter is held), None)
    if name is None or held.dim() != 2:
        raise ValueError(f"it projects inside with {name or 'a tensor'} of shape {tuple(held.shape)}, no matrix of its own")
    is_transposed = node.op == "linear" or "convolution" in node.op
    axis = axes.on_the_way(origin, taken[-1], 0 if is_transposed else len(flow.nodes[taken[-1]].shape) - 1)
    return _Source(name, origin, axis, since=call.start)


def _problem(masks: Mapping[str, Tensor]) -> str:
    """Explain why the features cannot be told apart; empty if each belongs to at most one of q, k and v.

    Args:
        masks: Map "q", "k" and "v" to where the features are theirs.
    """
    for part, mask in masks.items():
        if not mask.any():
            return f"its {_WORDS[part]} depend on none of them in a way that a derivative shows"
    for one, other in combinations(masks, 2):
        both = _ranges(masks[one] & masks[other])
        if both:
            return f"features {', '.join(f'{a}:{b}' for a, b in both[:3])} make {_WORDS[one]} and {_WORDS[other]} both"
    return ""


def _ranges(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the runs of true values, as (start, stop)."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, stops = edges.eq(1).nonzero().flatten().tolist(), edges.eq(-1).nonzero().flatten().tolist()
    return tuple(zip(starts, stops, strict=True))
