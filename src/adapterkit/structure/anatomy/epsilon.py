"""The ε-test: move what each sub-layer's module returns, and see that one addition takes exactly that.

The anatomy says "the branch of this addition is what `attention.out` returns". To prove it, `attention.out` returns its
output plus noise of the size of ε, and the operands of all additions are kept. If one of them holds those very numbers,
then what a hook there returns is what is added. Noise rather than a constant, for a constant could come from elsewhere.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from .. import pytree
from ..tracing.flow import SCALES, VIEWS, Flow
from ..tracing.forward import ExampleInputs
from ..tracing.graph import ADDITIONS, Graph, ModuleCall, Operation, record_graph
from .description import Anatomy, Sublayer

__all__ = ["Moved", "epsilon_test"]

EPSILON = 0.125  # exact in every floating dtype, and large beside the rounding of bfloat16


@dataclass(frozen=True)
class Moved:
    """What the ε-test found for one sub-layer.

    Attributes:
        additions: How many additions take what the module returns; it should be one.
        factor: The least and the greatest factor by which they take it: (1.0, 1.0) where it is taken as it is. None where
            it is changed in another way, or there are no numbers (on the meta device).
    """

    additions: int
    factor: tuple[float, float] | None

    @property
    def is_exact(self) -> bool:
        """Tell whether one addition takes exactly what the module returns."""
        return self.additions == 1 and self.factor == (1.0, 1.0)

    def agrees(self, sublayer: Sublayer) -> bool:
        """Tell whether it is as the anatomy says: taken by one addition, as it is or scaled by constants."""
        return self.additions == 1 and (self.is_exact if not sublayer.scales else self.factor is not None)


def epsilon_test(model: nn.Module, inputs: ExampleInputs, anatomy: Anatomy) -> dict[str, Moved]:
    """Run the model once, and map the path of each sub-layer's module to how what it returns enters the stream.

    Each of these modules returns its output plus noise of the size of ε: an addition that takes the very numbers that came
    out takes them from there.
    """
    sublayers = {s.out.path: s for s in (*anatomy.sublayers, *anatomy.others) if s.out is not None}
    returned: dict[str, list[Tensor]] = {path: [] for path in sublayers}
    with ExitStack() as stack:
        for path, sublayer in sublayers.items():
            hook = _Move(sublayer.out.output if sublayer.out else (), returned[path])
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        graph = record_graph(model, inputs, keep_addends=True)
    flow = Flow(graph)
    found: dict[str, list[Moved]] = {}
    for call, tensor in _calls(graph, returned):
        sublayer = sublayers[call.path or ""]
        assert sublayer.out is not None  # noqa: S101  # so chosen above
        node = dict(call.outputs)[sublayer.out.output]
        found.setdefault(call.path or "", []).append(_taken(flow, node, tensor, in_sum=sublayer.is_parallel))
    return {path: _worst(all_calls) for path, all_calls in found.items()}


class _Move:
    """A hook that adds noise to one tensor of an output, and keeps what it returns."""

    def __init__(self, output: pytree.Path, returned: list[Tensor]) -> None:
        self.output, self.returned, self.thread = output, returned, threading.get_ident()

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Return the moved output. Shape: as the output."""
        if threading.get_ident() != self.thread:
            return None
        x: Tensor = pytree.get(output, self.output)
        noise = EPSILON * (1 + torch.rand(x.shape, device=x.device)).to(x.dtype)
        y = torch.sub(x, -noise)  # not an addition: those are what is looked for
        self.returned.append(y.detach().clone())
        return pytree.put(output, self.output, y)


def _calls(graph: Graph, returned: dict[str, list[Tensor]]) -> Iterator[tuple[ModuleCall, Tensor]]:
    """Yield each call of a moved module with the tensor that it returned, in the order in which calls ended."""
    tensors = {path: iter(kept) for path, kept in returned.items()}
    for call in sorted(graph.calls, key=lambda call: -1 if call.end is None else call.end):
        if call.path in tensors and call.end is not None:
            tensor = next(tensors[call.path], None)  # none left: another thread's call, which was not moved
            if tensor is not None:
                yield call, tensor


def _taken(flow: Flow, node: int, tensor: Tensor, *, in_sum: bool) -> Moved:
    """Tell how many steps of the stream take a node's tensor, and times what.

    Args:
        in_sum: The branch is one of several parallel ones: their sum is made first, and enters the stream.
    """
    steps = list(_steps(flow, node, tensor, in_sum=in_sum))
    known = [factor for factor in steps if factor is not None]
    if not known or len(known) < len(steps):
        return Moved(len(steps), None)
    return Moved(len(steps), (min(low for low, _ in known), max(high for _, high in known)))


def _steps(flow: Flow, node: int, tensor: Tensor, *, in_sum: bool) -> Iterator[tuple[float, float] | None]:
    """Yield the factor of each step of the stream that takes the tensor of a node; None if it is no factor."""
    for addition, operand in _additions(flow, node, in_sum=in_sum):
        factor = _factor(addition, operand, tensor)
        if not in_sum or _carries_the_stream(flow, addition, operand):
            yield factor
            continue
        # A sum of parallel branches: what takes that sum takes this branch.
        sums = [i for i in flow.readers[addition.index] if operand in flow.stacked(i)]  # if it is the sum of a stack
        index = sums[0] if addition.op == "stack" else addition.index
        for outer in _steps(flow, index, sum(addition.addends[1:], addition.addends[0]), in_sum=True):
            both = factor is not None and outer is not None
            yield (factor[0] * outer[0], factor[1] * outer[1]) if both else None  # type: ignore[index]  # so checked


def _carries_the_stream(flow: Flow, addition: Operation, operand: int) -> bool:
    """Tell whether the other operand is what this one is computed from.

    If not, both are branches, and their sum is yet to be added to the stream.
    """
    others = [flow.source(i) for i in addition.inputs[:2] if i != operand]
    before = [j for i in others if flow.nodes[i].op in ADDITIONS for j in flow.activations(flow.nodes[i])]
    return any(flow.leads_to(flow.source(i), operand) for i in (*others, *before)) or not flow.readers[addition.index]


def _additions(flow: Flow, node: int, *, in_sum: bool) -> Iterator[tuple[Operation, int]]:
    """Yield the additions of two activations that a node reaches through views and scales alone, with their operand.

    A stack of parallel branches (`in_sum`) whose sum is taken is one of them.
    """
    for i in flow.readers[node]:
        reader = flow.nodes[i]
        others = [j for j in flow.activations(reader) if j != node and flow.nodes[j].is_floating]
        is_stack = in_sum and reader.op == "stack" and any(node in flow.stacked(j) for j in flow.readers[i])
        is_less = reader.op in ("sub", "sub_") and reader.inputs[0] == node  # f - x is no step
        if others and (is_stack or (reader.op in ADDITIONS and not is_less)):
            yield reader, node
        elif reader.op in VIEWS | SCALES | set(ADDITIONS):
            yield from _additions(flow, i, in_sum=in_sum)


def _factor(addition: Operation, operand: int, tensor: Tensor) -> tuple[float, float] | None:
    """Return the range of factors that make the operand of the tensor, up to constants added to it; None if none do.

    A factor may differ along one axis (LayerScale), or along all but one (a gate for each token).
    """
    taken = addition.addends[addition.inputs.index(operand)]
    if taken.is_meta:
        return None
    if not tensor.isfinite().any():  # nothing is left that could be compared
        return None
    tensor, taken = (numbers.nan_to_num(0.0, 0.0, 0.0) for numbers in (tensor, taken))  # a masked row may be all NaN
    # Sorted, for heads may be merged, windows put back, or tokens dropped on the way.
    ours, theirs = tensor.flatten().sort()[0], taken.flatten().sort()[0]
    if torch.equal(ours, theirs) or (theirs.numel() < ours.numel() and torch.isin(theirs, ours).all()):
        return 1.0, 1.0  # the same numbers in another order, or a slice of them
    if taken.numel() % max(1, tensor.numel()):
        return None
    # y = factor * x (+ constant), with a factor for each index of one axis, or for each index of all others.
    tolerance = 16 * torch.finfo(taken.dtype).eps
    fits = (
        _fitted(x.double(), taken.double(), along, tolerance, centre=centre)
        for x in _arranged(tensor, taken.shape)
        for axis in range(taken.dim())
        for along in ([a for a in range(taken.dim()) if a != axis], [axis])
        for centre in (False, True)
    )
    return next((factor for factor in fits if factor is not None), None)


def _arranged(tensor: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """Yield the tensor in this shape, with its axes in their order, then in every other; also repeated along one axis."""
    if math.prod(shape) == tensor.numel():
        yield from (tensor.permute(order).reshape(shape) for order in permutations(range(tensor.dim())))
    for axis in range(len(shape)):  # handed to several streams: (batch, seq, hidden) to (batch, seq, streams, hidden)
        if (*shape[:axis], *shape[axis + 1 :]) == tuple(tensor.shape):
            yield tensor.unsqueeze(axis).expand(shape)


def _fitted(x: Tensor, y: Tensor, along: list[int], tolerance: float, *, centre: bool) -> tuple[float, float] | None:
    """Return the range of the factors, constant along these axes, by which y is x; None if there are none.

    Args:
        centre: y may differ by a constant besides, as after an offset or a mean that was taken off.
    """
    if math.prod(x.shape[axis] for axis in along) < (3 if centre else 2):  # fewer points fit any line
        return None
    if centre:
        x, y = x - x.mean(along, keepdim=True), y - y.mean(along, keepdim=True)
    # Least squares: the best factor, which then must fit at every point.
    factor = (x * y).sum(along, keepdim=True) / (x * x).sum(along, keepdim=True)
    if not torch.allclose(y, factor * x, rtol=0.0, atol=tolerance * float(y.abs().max())):
        return None
    low, high = float(factor.min()), float(factor.max())
    return (1.0, 1.0) if max(abs(low - 1), abs(high - 1)) < tolerance else (low, high)


def _worst(calls: list[Moved]) -> Moved:
    """Return one result for all calls of a module: as bad as the worst of them."""
    factors = [call.factor for call in calls if call.factor is not None]
    whole = len(factors) == len(calls)
    return Moved(
        next((call.additions for call in calls if call.additions != 1), 1),  # one, if every call is as it should be
        (min(low for low, _ in factors), max(high for _, high in factors)) if whole else None,
    )
