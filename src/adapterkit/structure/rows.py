"""Where the rows of a batch lie in what modules take and return: seen by running the model on two, and on each alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import values
from ..errors import CompatibilityError
from ..patterns import SITE
from ..row_axis import NO_ROWS, Layouts, RowLayout, axis_of_call, rows_at
from .discover import Remembered, discover
from .inputs import moved_to
from .key import structure_key
from .trace import ExampleInputs, observe

__all__ = ["discover_rows"]

_REMEMBERED: Remembered[Mapping[str, Layouts]] = Remembered()
# How far a row's sums may be, in a batch, from those that it has alone, as a part of the largest; and in narrow dtypes.
_ROUNDING, _COARSE = 1e-4, 0.02


def discover_rows(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Mapping[str, Layouts]:
    """By the path of each module that runs: where rows lie in its tensors, as far as two rows of the inputs show it.

    Tiny inputs are made if there are none. Remembered for every model of the same structure.
    """
    try:
        return _REMEMBERED.get(structure_key(model, example_inputs), lambda: _seen(model, example_inputs))
    except CompatibilityError:  # it runs on no such inputs
        return {}


def _seen(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Layouts]:
    inputs = discover(model)[1] if example_inputs is None else moved_to(example_inputs, model)
    modules = ((path, module) for path, module in model.named_modules() if SITE not in path.split("."))
    paths = [path for path, module in modules if not isinstance(module, torch.jit.ScriptModule)]
    batches = _two_rows(inputs, axis_of_call(model))
    if batches is None:
        return {}
    both, one, other = (observe(model, batch, paths, _look) for batch in batches)
    return {path: _layouts(both[path], one[path], other[path]) for path in paths}


def _two_rows(inputs: ExampleInputs, axis: int) -> tuple[ExampleInputs, ExampleInputs, ExampleInputs] | None:
    """Two rows of the inputs, and each of them alone; of one row the second is the first turned round."""
    call = inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)
    tensors = list(values.tensors(call))
    rows = next((tensor.shape[axis] for _, tensor in tensors if tensor.dim() > axis), 0)
    if not rows or any(tensor.is_meta for _, tensor in tensors):
        return None
    both = one = other = call
    for path, tensor in tensors:
        at = rows_at(tensor, rows, axis)
        if at is None:
            continue
        first, second = tensor.narrow(at, 0, 1), tensor.narrow(at, min(1, rows - 1), 1)
        if torch.equal(first, second) and tensor.dim() > 1:
            second = first.flip(0 if at else -1)
        one, other = values.put(one, path, first), values.put(other, path, second)
        both = values.put(both, path, torch.cat([first, second], at))
    return both, one, other


class _Sketch(NamedTuple):
    """A tensor's shape and, for each index of its first two axes, a weighted sum of what lies there."""

    shape: tuple[int, ...]
    along: tuple[Tensor, ...]
    tolerance: float


def _look(_path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> dict[values.Path, _Sketch]:
    """A sketch of every tensor in a call and in what it returns, by its path; the first one's under the side alone, too."""
    sketches: dict[values.Path, _Sketch] = {}
    for side, value in (("input", (args, kwargs)), ("output", output)):
        for path, tensor in values.tensors(value):
            if not (tensor.is_nested or tensor.is_complex() or tensor.is_meta or tensor.is_sparse):
                sketches[(side, *path)] = _sketch(tensor)
        first = values.find(value)
        if first is not None and (side, *first) in sketches:
            sketches[(side,)] = sketches[(side, *first)]
    return sketches


def _sketch(tensor: Tensor) -> _Sketch:
    numbers = tensor.detach().float().nan_to_num().clamp(-1e4, 1e4)  # masks hold the least numbers that there are
    along = []
    for axis in range(min(2, tensor.dim())):
        lines = numbers.movedim(axis, 0).reshape(tensor.shape[axis], -1)
        along.append(lines @ torch.cos(torch.arange(lines.shape[1], device=lines.device, dtype=lines.dtype)))
    return _Sketch(tuple(tensor.shape), tuple(along), _ROUNDING if tensor.element_size() > 2 else _COARSE)


_Calls = Sequence[Mapping[values.Path, _Sketch]]


def _layouts(both: _Calls, one: _Calls, other: _Calls) -> Layouts:
    """Where rows lie in each tensor of a module, the same in all of its calls."""
    if not len(both) == len(one) == len(other):
        return {}
    found: dict[values.Path, set[RowLayout | None]] = {}
    for sketches in zip(both, one, other, strict=True):
        for path in set.intersection(*(set(call) for call in sketches)):
            found.setdefault(path, set()).add(_layout(*(call[path] for call in sketches)))
    return {path: layout for path, (layout, *others) in found.items() if layout is not None and not others}


def _layout(both: _Sketch, one: _Sketch, other: _Sketch) -> RowLayout | None:
    """Where the rows lie in a tensor of both, given what each alone has there; None if that does not show it."""

    def same(found: Tensor, wanted: Tensor) -> bool:
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        return found.shape == wanted.shape and bool(((found - wanted).abs() <= both.tolerance * scale).all())

    if both.shape == one.shape == other.shape:
        return NO_ROWS if all(map(same, both.along, one.along)) and all(map(same, both.along, other.along)) else None
    for axis, (found, first, second) in enumerate(zip(both.along, one.along, other.along, strict=False)):
        shapes = {(*s.shape[:axis], *s.shape[axis + 1 :]) for s in (both, one, other)}
        if len(shapes) > 1 or len(first) != len(second) or not same(found, torch.cat([first, second])):
            continue
        is_flat = len(first) > 1
        if not is_flat or not same(found, torch.stack([first, second], 1).flatten()):  # rows in turn would be the same
            return RowLayout(axis, is_flat)
    return None
