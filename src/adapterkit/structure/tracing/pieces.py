"""Cut a piece out of a recorded forward around an operation that nobody names, and run it on other numbers.

A layer of int8 rounds its input with one operation and multiplies with another. Between them lie integers, which cannot be
asked how they change; so a piece reaches back from an operation to the nearest floating-point activations, its sources.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .forward import outside_inference_mode
from .graph import Operation

__all__ = ["Piece", "is_number", "piece_at"]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some operations, and the floating-point activations that they compute from.

    Attributes:
        steps: The operations, in order.
        sources: The activations, in the order in which the last operation reads them.
        readers: Where each is read first: a node, and which of its inputs.
        constants: The tensors that come of parameters and buffers.
    """

    steps: tuple[Operation, ...]
    sources: tuple[Tensor, ...]
    readers: tuple[tuple[int, int], ...]
    constants: tuple[Tensor, ...]

    @property
    def end(self) -> Operation:
        """Return the operation that the piece was cut out for."""
        return self.steps[-1]

    @property
    def has_weights(self) -> bool:
        """Tell whether it reads a matrix of the model's, or an object that is no tensor and may hold one."""
        leaves = [leaf for step in self.steps for leaf in tree_leaves(step.operation[1:] if step.operation else ())]
        return any(t.numel() > max(t.shape, default=0) for t in self.constants) or any(map(_may_hold_tensors, leaves))

    @cached_property
    def rounded(self) -> dict[int, float]:
        """Map those of the sources that become integers, or numbers of eight bits, as they are → the greatest of these."""
        coded = {id(t): s.made[0].dtype for s in self.steps if s.op == "_to_copy" and not is_number(s) for t in s.taken}
        limits = {at: _limits(coded[id(source)]) for at, source in enumerate(self.sources) if id(source) in coded}
        return {at: found[1] for at, found in limits.items() if found is not None}

    def key(self) -> Hashable:
        """Return what pieces that do the same have in common: operations, shapes, types and numbers."""
        return tuple(f"{s.operation[0]} {tree_map(_as_text, s.operation[1:])}" for s in self.steps if s.operation)

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """Run the operations with other values of the sources, and return the last one's tensor, in double precision.

        Raises:
            ValueError: it cannot be run again, and why.
        """
        if any(tensor.is_meta for tensor in (*self.sources, *self.end.made)):
            raise ValueError("the meta device has no numbers")
        known = {id(source): value.clone() for source, value in zip(self.sources, values, strict=True)}
        try:
            with outside_inference_mode(), torch.no_grad():
                for step in self.steps:
                    self._step(step, known)
        except Exception as error:  # an operation of any package, on numbers that it was never given: it may raise anything
            raise ValueError(f"it cannot be run again: {type(error).__name__}: {str(error)[:200]}") from error
        result = known[id(self.end.made[0])].double()
        if not result.isfinite().all():
            raise ValueError("run again, it returns numbers that are not finite")
        return result

    def _step(self, step: Operation, known: dict[int, Tensor]) -> None:
        """Run one operation on the values of its tensors, and add what it makes to `known`."""
        assert step.operation is not None  # noqa: S101  # steps are operations

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) not in known:
                known[id(leaf)] = self._constant(leaf)
            return known[id(leaf)] if isinstance(leaf, Tensor) else leaf

        function, args, kwargs = step.operation
        args, kwargs = tree_map(value, (args, kwargs))
        if step.op == "_to_copy" and not is_number(step):  # past the range of its integers a number would come out anywhere
            limits = _limits(step.made[0].dtype)
            args = (args[0] if limits is None else args[0].clamp(*limits), *args[1:])
        made = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        if made:  # else it wrote into its arguments, which are known
            known.update((id(then), now) for then, now in zip(step.made, made, strict=True))

    def _constant(self, tensor: Tensor) -> Tensor:
        """Return a tensor from outside as it was; but random numbers for a weight of zeros, which would hide all."""
        if tensor.is_floating_point() and any(tensor is c for c in self.constants) and not tensor.any():
            return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
        return tensor.detach().clone()


def piece_at(nodes: Sequence[Operation], end: Operation, held: int, made_of_nothing: int) -> Piece:
    """Return the piece that ends in a node.

    Args:
        held: The set of nodes that come of what the model holds: parameters, buffers and tensors in plain attributes.
        made_of_nothing: The set of nodes that come of no tensor at all, as positions do.
    """
    steps: dict[int, Operation] = {}
    sources: dict[int, tuple[Tensor, tuple[int, int]]] = {}
    constants: dict[int, Tensor] = {}
    todo = [end]
    while todo:
        node = todo.pop()
        steps[node.index] = node
        for at, tensor in enumerate(node.taken):
            maker = nodes[node.inputs[at]]
            if held >> maker.index & 1:
                constants[id(tensor)] = tensor
            elif made_of_nothing >> maker.index & 1:
                continue
            elif _is_fine(tensor) and (is_number(maker) or maker.operation is None):
                sources.setdefault(id(tensor), (tensor, (node.index, at)))
            elif maker.operation is not None and maker.index not in steps:
                todo.append(maker)  # integers between: what were they made of?
    found = sorted(sources.values(), key=lambda source: (-source[1][0], source[1][1]))
    ordered = tuple(steps[i] for i in sorted(steps))
    return Piece(ordered, tuple(t for t, _ in found), tuple(r for _, r in found), tuple(constants.values()))


def is_number(node: Operation) -> bool:
    """Tell whether a node makes floating-point numbers. Those of eight bits are codes of numbers, as integers are."""
    return node.is_floating and _is_fine(node.made[0])


def _is_fine(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _limits(dtype: torch.dtype) -> tuple[float, float] | None:
    """Return the smallest and the greatest number that a type can hold; None of truth values."""
    if dtype == torch.bool:
        return None
    found = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return found.min, found.max


def _may_hold_tensors(leaf: object) -> bool:
    """Tell whether an argument is an object of which only its operation knows what it holds: packed weights, say."""
    plain = (Tensor, int, float, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return leaf is not None and not isinstance(leaf, plain)


def _as_text(leaf: Any) -> Any:
    """Return a tensor as its shape, type and device, an object as its type; anything else as it is."""
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device}"
    return type(leaf).__name__ if _may_hold_tensors(leaf) else leaf
