"""Run a part of a recorded forward again, on random numbers and with gradients: what of a tensor is another made of?"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .flow import VIEWS, Flow, bits
from .forward import outside_inference_mode

__all__ = ["Replays", "along"]


class Replays:
    """Parts of one recorded forward, run again. What was found for a part is remembered for those that do the same.

    The model is not run, and nothing that it holds is read but integers (indices) and masks: its floating-point numbers
    are replaced by random ones, for zeros (a LoRA, a scale that is yet to be trained) would hide what depends on them.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._found: dict[Hashable, Tensor] = {}

    def dependence(self, start: int, reader: tuple[int, int], axis: int | None, since: int = 0) -> Tensor:
        """Of which numbers of a node's tensor one is made that is read further on.

        Args:
            start: The node.
            reader: What reads the other tensor, and at which of its inputs.
            axis: The axis whose features are asked for; None for all numbers.
            since: The first node that counts.

        Returns:
            True where the derivative of a random projection is not zero, anywhere on the other axes. Shape: (features,), or
            as the node's tensor.

        Raises:
            ValueError: it cannot be told, and why.
        """
        steps = self._steps(start, self.flow.nodes[reader[0]].inputs[reader[1]], since)
        key = self._key(start, reader, axis, steps)
        found = self._found.get(key) if key is not None else None
        if found is None:
            found = self._run(start, reader, steps)
            found = found if axis is None else along(found, axis)
        if key is not None:
            self._found[key] = found
        return found

    def _steps(self, start: int, end: int, since: int) -> list[int]:
        """The nodes between two, and the views through which they write into memory that is read later."""
        flow = self.flow
        inside = flow.between(start, end) >> since << since if start != end else 0
        for i in bits(inside):
            node = flow.nodes[i]
            at = node.inputs[0] if node.op.endswith("_") and node.taken else start
            while at > start and not inside >> at & 1 and flow.nodes[at].op in VIEWS:
                inside |= 1 << at
                at = flow.nodes[at].inputs[0]
        return list(bits(inside))

    def _key(self, start: int, reader: tuple[int, int], axis: int | None, steps: list[int]) -> Hashable | None:
        """What decides the answer: the operations, and which tensor is read where; None if numbers decide, too."""
        nodes, names = self.flow.nodes, {id(t): 0 for t in self.flow.nodes[start].made}
        made = {id(t) for i in (start, *steps) for t in nodes[i].made}
        said: list[str] = [_described(t) for t in nodes[start].made]

        def named(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in made and not _is_drawn(leaf):
                raise LookupError  # its own integers count
            return f"{names.setdefault(id(leaf), len(names))} {_described(leaf)}"

        try:
            for i in steps:
                function, args, kwargs = nodes[i].operation or (None, (), {})
                said.append(f"{function} {tree_map(named, (args, kwargs))} -> {tree_map(named, nodes[i].made)}")
            return (*said, axis, named(nodes[reader[0]].taken[reader[1]]))
        except LookupError:
            return None

    def _run(self, start: int, reader: tuple[int, int], steps: list[int]) -> Tensor:
        nodes, draw = self.flow.nodes, torch.Generator().manual_seed(0)
        recorded = nodes[start].made[0]
        if len(nodes[start].made) != 1 or not recorded.is_floating_point():
            raise ValueError("it is not one tensor of floating-point numbers")
        kind = "cpu" if recorded.is_meta else recorded.device.type
        try:
            with outside_inference_mode(), torch.enable_grad(), torch.autocast(kind, enabled=False):
                leaf = _outside(recorded, draw).requires_grad_()
                values = {id(recorded): leaf.clone()}  # which, unlike a leaf, may be changed in place
                for i in steps:
                    self._step(i, values, draw)
                end = values.get(id(nodes[reader[0]].taken[reader[1]]))
                if end is None or not end.requires_grad:
                    return torch.zeros(leaf.shape, dtype=torch.bool)
                (gradient,) = torch.autograd.grad((end * _outside(end, draw)).sum(), leaf, allow_unused=True)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
        if gradient is None:
            return torch.zeros(leaf.shape, dtype=torch.bool)
        if not gradient.isfinite().all():
            raise ValueError("a derivative is not finite")
        return gradient.ne(0).cpu()

    def _step(self, index: int, values: dict[int, Tensor], draw: torch.Generator) -> None:
        """Run one operation on the values of its tensors, and keep what it makes."""
        node = self.flow.nodes[index]
        if node.operation is None:
            return

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) not in values:
                values[id(leaf)] = _outside(leaf, draw)
            if isinstance(leaf, Tensor):
                return values[id(leaf)]
            return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        function, args, kwargs = node.operation
        args, kwargs = tree_map(value, (args, kwargs))
        out = args[0] if node.op == "detach" else function(*args, **kwargs)  # what a detached tensor is made of counts
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        values.update((id(then), now) for then, now in zip(node.made, made, strict=True))


def along(mask: Tensor, axis: int) -> Tensor:
    """Where a mask is true anywhere on the other axes. Shape: (features,)."""
    return mask.movedim(axis, 0).flatten(1).any(1) if mask.dim() > 1 else mask


def _outside(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Random numbers from 0.5 to 1.5 (of which there are roots and logarithms) for a tensor; a copy of integers."""
    if not _is_drawn(tensor):
        if tensor.is_meta:
            raise ValueError("it depends on integers or masks, which have no values on the meta device")
        return tensor.detach().clone()
    shape = (*tensor.shape, 2) if tensor.is_complex() else tensor.shape
    drawn = torch.rand(shape, generator=draw, device="cpu") + 0.5
    drawn = torch.view_as_complex(drawn) if tensor.is_complex() else drawn
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.empty_like(tensor, device=device, requires_grad=False).copy_(drawn)  # laid out as it was, for views of it


def _is_drawn(tensor: Tensor) -> bool:
    """Whether random numbers may stand for those of a tensor."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
