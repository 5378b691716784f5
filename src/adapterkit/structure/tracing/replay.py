"""Run a piece of a recorded forward again, on random numbers and with gradients: which entries is a tensor made of?

Example: `qkv = linear(x)` has 24 features, and attention's product with the keys reads a tensor made of some of them.
Which? Those whose derivative is not zero. So all operations between the two are run again on random numbers, and
`torch.autograd.grad` of a random projection of the last tensor says it for all 24 at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .flow import VIEWS, Flow, bits
from .forward import outside_inference_mode

__all__ = ["Replays", "along"]


class Replays:
    """Pieces of one recorded forward, run again. What one shows is remembered for those that do the same (other layers).

    The model is not run, and nothing that it holds is read but integers (indices) and masks: its floating-point numbers
    are replaced by random ones, for zeros (a LoRA, a scale that is yet to be trained) would hide what depends on them.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._found: dict[Hashable, Tensor] = {}

    def dependence(self, start: int, reader: tuple[int, int], axis: int | None, since: int = 0) -> Tensor:
        """Tell which entries of `start`'s tensor influence the tensor that `reader` reads.

        Args:
            start: The node whose tensor is asked about.
            reader: The node that reads the other tensor, and at which of its inputs.
            axis: The axis whose features are asked for; None for all entries.
            since: The first node that counts: those before it are left out.

        Returns:
            True where the derivative of a random projection is not zero, anywhere on the other axes. Shape: (features,), or
            as the node's tensor.

        Raises:
            ValueError: it cannot be told, and why.
        """
        steps = self._steps(start, self.flow.nodes[reader[0]].inputs[reader[1]], since)
        key = self._key(start, self.flow.nodes[reader[0]].taken[reader[1]], axis, steps)
        found = self._found.get(key) if key is not None else None
        if found is None:
            found = self._run(start, reader, steps)
            found = found if axis is None else along(found, axis)
        if key is not None:
            self._found[key] = found
        return found

    def is_scale_free(self, start: int, end: int) -> bool:
        """Tell whether `end`'s tensor is the same when `start`'s is multiplied by two: then what lies between normalises.

        What is mixed with `start`'s before it is normalised, as the first hidden states are, is then multiplied as well.

        The ε of a norm is as nothing beside the numbers that are drawn, which a saturated tanh would still tell apart.

        Raises:
            ValueError: it cannot be told, and why.
        """
        if 0 in self.flow.nodes[end].shape:
            raise ValueError("it has no numbers, as the tokens of an expert that none chose")
        steps = self._steps(start, end, 0)
        key = self._key(start, self.flow.nodes[end].made[0], None, steps)
        key = key and ("scale", key)  # which pieces depend on what is remembered in the same place
        found = self._found.get(key) if key is not None else None
        if found is None:
            beside = self._beside(start, steps)
            is_alone = self._is_same_of_twice(start, end, steps)
            found = torch.tensor(is_alone or (bool(beside) and self._is_same_of_twice(start, end, steps, beside)))
        if key is not None:
            self._found[key] = found
        return bool(found)

    def _is_same_of_twice(self, start: int, end: int, steps: list[int], beside: Sequence[Tensor] = ()) -> bool:
        draws = ((0, 8), (0, 16), (1, 8))  # a seed and a factor each
        one, twice, other = (self._scaled(start, end, steps, seed, times, beside) for seed, times in draws)
        same = torch.allclose(one, twice, rtol=1e-2, atol=1e-2 * float(one.abs().max()))
        return same and not torch.equal(one, other)  # what no input changes is no norm

    def _beside(self, start: int, steps: list[int]) -> list[Tensor]:
        """List the activations that the steps read, and neither make nor have of `start`."""
        flow, made = self.flow, {start, *steps}
        read = ((i, t) for k in steps for i, t in zip(flow.nodes[k].inputs, flow.nodes[k].taken, strict=False))
        return [t for i, t in read if i not in made and not flow.is_constant[i] and _is_drawn(t) and t.numel() > 1]

    def _scaled(
        self, start: int, end: int, steps: list[int], seed: int, times: float, beside: Sequence[Tensor] = ()
    ) -> Tensor:
        """Run the steps again on normal numbers times a factor in the place of `start`'s tensor; return `end`'s, finite.

        Args:
            beside: Other tensors that have numbers times that factor.

        Raises:
            ValueError: it cannot be told, and why.
        """
        nodes, draw = self.flow.nodes, torch.Generator().manual_seed(0)
        recorded = nodes[start].made[0]
        if not recorded.is_floating_point():
            raise ValueError("it is no tensor of floating-point numbers")
        normal = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(seed)) * times
        values = {id(recorded): _stand_in(recorded).copy_(normal)}
        values.update((id(t), _outside(t, draw) * times) for t in beside)
        # A tensor of one number may be an ε, which no other number stands for.
        single = (t for i in steps for t in nodes[i].taken if t.numel() == 1 and not t.is_meta)
        made = {id(t) for i in steps for t in nodes[i].made}
        values.update((id(t), t.detach().clone()) for t in single if id(t) not in made)
        kind = "cpu" if recorded.is_meta else recorded.device.type
        try:
            with outside_inference_mode(), torch.no_grad(), torch.autocast(kind, enabled=False):
                for i in steps:
                    self.step(i, values, lambda tensor: _outside(tensor, draw))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
        found = values[id(nodes[end].made[0])].double().cpu()
        if not found.isfinite().all():
            raise ValueError("what it makes is not finite")
        return found

    def _steps(self, start: int, end: int, since: int) -> list[int]:
        """List the nodes between two, and the views through which they write into memory that is read later."""
        flow = self.flow
        inside = flow.between(start, end) >> since << since if start != end else 0
        for i in bits(inside):
            node = flow.nodes[i]
            # `y[:, 0].mul_(2)` changes y through a view that nothing else reads: that view must be made again, too.
            at = node.inputs[0] if node.op.endswith("_") and node.taken else start
            while at > start and not inside >> at & 1 and flow.nodes[at].op in VIEWS:
                inside |= 1 << at
                at = flow.nodes[at].inputs[0]
        return list(bits(inside))

    def _key(self, start: int, end: Tensor, axis: int | None, steps: list[int]) -> Hashable | None:
        """Return what decides the answer: the operations, and which tensor is read where; None if numbers decide, too.

        Tensors are numbered in the order of their meeting, so that the same piece of another layer has the same key.
        """
        nodes, names = self.flow.nodes, {id(t): 0 for t in self.flow.nodes[start].made}
        made = {id(t) for i in (start, *steps) for t in nodes[i].made}
        lines: list[str] = [_kind_of_tensor(t) for t in nodes[start].made]

        def as_text(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in made and not _is_drawn(leaf):
                raise LookupError  # integers and masks from outside: their values decide, so no other layer has this key
            return f"{names.setdefault(id(leaf), len(names))} {_kind_of_tensor(leaf)}"

        try:
            for i in steps:
                function, args, kwargs = nodes[i].operation or (None, (), {})
                lines.append(f"{function} {tree_map(as_text, (args, kwargs))} -> {tree_map(as_text, nodes[i].made)}")
            return (*lines, axis, as_text(end))
        except LookupError:
            return None

    def _run(self, start: int, reader: tuple[int, int], steps: list[int]) -> Tensor:
        """Run the steps again; return where the derivative by `start`'s tensor is not zero. Shape: as that tensor.

        Raises:
            ValueError: it cannot be told, and why.
        """
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
                    self.step(i, values, lambda tensor: _outside(tensor, draw))
                end = values.get(id(nodes[reader[0]].taken[reader[1]]))
                if end is None or not end.requires_grad:  # no way leads there: nothing depends on it
                    return torch.zeros(leaf.shape, dtype=torch.bool)
                (gradient,) = torch.autograd.grad((end * _outside(end, draw)).sum(), leaf, allow_unused=True)
        except (RuntimeError, NotImplementedError, TypeError) as error:  # an operation without derivative, say
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
        if gradient is None:
            return torch.zeros(leaf.shape, dtype=torch.bool)
        if not gradient.isfinite().all():
            raise ValueError("a derivative is not finite")
        return gradient.ne(0).cpu()

    def step(self, index: int, values: dict[int, Tensor], outside: Callable[[Tensor], Tensor]) -> None:
        """Run one operation on the values of its tensors, and add what it makes to `values`.

        Args:
            values: Maps the `id` of each recorded tensor to the one that stands for it now.
            outside: Returns what stands for one that no step made.
        """
        node = self.flow.nodes[index]
        if node.operation is None:
            return

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) not in values:
                values[id(leaf)] = outside(leaf)
            if isinstance(leaf, Tensor):
                return values[id(leaf)]
            return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        function, args, kwargs = node.operation
        args, kwargs = tree_map(value, (args, kwargs))
        out = args[0] if node.op == "detach" else function(*args, **kwargs)  # what a detached tensor is made of counts
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        values.update((id(then), now) for then, now in zip(node.made, made, strict=True))


def along(mask: Tensor, axis: int) -> Tensor:
    """Return where a mask is true anywhere on the other axes. Shape: (features,)."""
    return mask.movedim(axis, 0).flatten(1).any(1) if mask.dim() > 1 else mask


def _outside(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Return a stand-in for a tensor: random numbers from 0.5 to 1.5; of integers and masks, a copy.

    Roots and logarithms of such numbers exist, and none is zero.

    Raises:
        ValueError: integers or masks on the meta device have no values.
    """
    if not _is_drawn(tensor):
        if tensor.is_meta:
            raise ValueError("it depends on integers or masks, which have no values on the meta device")
        return tensor.detach().clone()
    shape = (*tensor.shape, 2) if tensor.is_complex() else tensor.shape
    drawn = torch.rand(shape, generator=draw, device="cpu") + 0.5
    drawn = torch.view_as_complex(drawn) if tensor.is_complex() else drawn
    return _stand_in(tensor).copy_(drawn)


def _stand_in(tensor: Tensor) -> Tensor:
    """Return an empty tensor that is laid out as one is, for views of it; on the CPU for one that has no numbers."""
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.empty_like(tensor, device=device, requires_grad=False)


def _is_drawn(tensor: Tensor) -> bool:
    """Tell whether random numbers may stand for those of a tensor."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided


def _kind_of_tensor(tensor: Tensor) -> str:
    """Return shape, dtype and device as text."""
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
