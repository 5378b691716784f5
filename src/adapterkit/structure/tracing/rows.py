"""Where the rows of a batch lie in what modules take and return: seen by running the model on two, and on each alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import CompatibilityError
from .. import pytree
from ..anatomy.discover import Remembered, discover
from ..paths import SITE
from .forward import ExampleInputs, observe
from .inputs import moved_to
from .key import structure_key
from .row_layout import NO_ROWS, UNCLEAR, Layouts, RowLayout, axis_of_call, first_with_rows, rows_at, tokens_in

__all__ = ["discover_rows"]

_REMEMBERED: Remembered[Mapping[str, Layouts]] = Remembered()
# How far a row's sums may be, in a batch, from those that it has alone, as a part of the largest; and in narrow dtypes.
_ROUNDING, _COARSE = 1e-4, 0.02


def discover_rows(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Mapping[str, Layouts]:
    """By the path of each module that runs: where rows lie in its tensors, as far as two rows of the inputs show it.

    Without inputs tiny ones are made, and what they show is remembered for every model of the same structure.
    """
    try:
        if example_inputs is not None:
            return _seen(model, moved_to(example_inputs, model))
        return _REMEMBERED.get(structure_key(model, None), lambda: _seen(model, discover(model)[1]))
    except CompatibilityError:  # it runs on no such inputs
        return {}


def _seen(model: nn.Module, inputs: ExampleInputs) -> dict[str, Layouts]:
    """What two rows show, on the likelier axis of the inputs or, if the output denies that, on the other."""
    likely = axis_of_call(model)
    for axis in (likely, 1 - likely):
        try:
            batches = _two_rows(inputs, axis)
        except (TypeError, ValueError, RuntimeError):  # containers that cannot be copied, tensors that cannot be cut
            return {}
        with suppress(CompatibilityError):  # it does not run on so few
            found = {} if batches is None else _compared(model, batches, axis)
            if found:
                return found
    return {}


def _compared(model: nn.Module, batches: Sequence[ExampleInputs], axis: int) -> dict[str, Layouts]:
    """Where rows lie, if those on this axis of the inputs are rows: each has in the output what it has alone there."""
    modules = ((path, module) for path, module in model.named_modules() if SITE not in path.split("."))
    paths = [path for path, module in modules if not isinstance(module, torch.jit.ScriptModule)]
    shapes = _ShapesByData()  # type: ignore[no-untyped-call]  # torch's
    both = observe(model, batches[0], paths, _look, within=shapes)
    one, other = (observe(model, batch, paths, _look) for batch in batches[1:])
    if not all(len(seen.get("", ())) == 1 for seen in (both, one, other)):  # it calls itself, or is TorchScript
        return {}
    (output,), (first,), (second,) = both[""], one[""], other[""]
    tensors = [
        (output[way], first[way], second[way]) for way in output if way[0] == "output" and way in first and way in second
    ]
    if not any(_layout(*each) not in (None, NO_ROWS) for each in tensors) or any(_is_denied(*each) for each in tensors):
        return {}
    tokens = tokens_in(_call(batches[0]), 2, axis)
    found = {path: _layouts(both[path], one[path], other[path], tokens) for path in paths}
    if shapes.were_seen:  # a row may have as many indices as the other by chance: of experts, of tokens without padding
        for path, held in found.items():
            found[path] = {way: UNCLEAR if rows.is_flat and not rows.of_tokens else rows for way, rows in held.items()}
    return found


class _ShapesByData(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Watch for operations whose output has as many entries as the numbers in their input say."""

    were_seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation. Shape: any."""
        if torch.Tag.dynamic_output_shape in func.tags:
            indices = args[1] if func is torch.ops.aten.index.Tensor else None
            is_lookup = indices is not None and all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices)
            self.were_seen |= not is_lookup
        return func(*args, **(kwargs or {}))


def _call(inputs: ExampleInputs) -> Any:
    return inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)


def _two_rows(inputs: ExampleInputs, axis: int) -> tuple[ExampleInputs, ExampleInputs, ExampleInputs] | None:
    """Two rows of the inputs, and each of them alone; of one row the second is the first turned round."""
    call = _call(inputs)
    tensors = list(pytree.tensors(call))
    reference = first_with_rows(call, axis)
    if reference is None or not reference.shape[axis] or not all(map(_is_plain, (tensor for _, tensor in tensors))):
        return None
    rows = reference.shape[axis]
    both = one = other = call
    for path, tensor in tensors:
        at = rows_at(tensor, rows, axis)
        if at is None:
            continue
        first, second = tensor.narrow(at, 0, 1), tensor.narrow(at, min(1, rows - 1), 1)
        if torch.equal(first, second) and tensor.dim() > 1:
            second = first.flip(0 if at else -1)
        one, other = pytree.put(one, path, first), pytree.put(other, path, second)
        both = pytree.put(both, path, torch.cat([first, second], at))
    return both, one, other


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_complex() or tensor.is_meta)


class _Sketch(NamedTuple):
    """A tensor's shape and, for each index of its first two axes, a weighted sum of what lies there."""

    shape: tuple[int, ...]
    along: tuple[Tensor, ...]
    tolerance: float


def _look(_path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> dict[pytree.Path, _Sketch]:
    """A sketch of every tensor in a call and in what it returns, by its path; the first one's under the side alone, too."""
    sketches: dict[pytree.Path, _Sketch] = {}
    for side, value in (("input", (args, kwargs)), ("output", output)):
        held = [(path, tensor) for path, tensor in pytree.tensors(value) if _is_plain(tensor)]
        sketches |= {(side, *path): _sketch(tensor) for path, tensor in held}
        places = {key: index for index, key in enumerate(pytree.keys(value)) if side == "output"}
        sketches |= {(side, places[path[0]], *path[1:]): sketches[(side, *path)] for path, _ in held if path and places}
        first = pytree.find(value)
        if first is not None and (side, *first) in sketches:
            sketches[(side,)] = sketches[(side, *first)]
    return sketches


def _sketch(tensor: Tensor) -> _Sketch:
    numbers = tensor.detach().float().nan_to_num().clamp(-1e4, 1e4)  # masks hold the least numbers that there are
    along = []
    for axis in range(min(2, tensor.dim())):
        lines = numbers.movedim(axis, 0).unsqueeze(-1).flatten(1)
        along.append(lines @ torch.cos(torch.arange(lines.shape[1], device=lines.device, dtype=lines.dtype)))
    return _Sketch(tuple(tensor.shape), tuple(along), _ROUNDING if tensor.element_size() > 2 else _COARSE)


_Calls = Sequence[Mapping[pytree.Path, _Sketch]]


def _layouts(both: _Calls, one: _Calls, other: _Calls, tokens: Collection[int]) -> Layouts:
    """Where rows lie in each tensor of a module, the same in all of its calls."""
    if not len(both) == len(one) == len(other):  # it runs as often as the numbers say, as an expert may
        return {way: UNCLEAR for call in both for way in call}
    found: dict[pytree.Path, set[RowLayout | None]] = {}
    for a, b, c in zip(both, one, other, strict=True):
        for way in a.keys() & b.keys() & c.keys():
            found.setdefault(way, set()).add(_layout(a[way], b[way], c[way], tokens))
    return {way: layout for way, (layout, *others) in found.items() if layout is not None and not others}


def _layout(both: _Sketch, one: _Sketch, other: _Sketch, tokens: Collection[int] = ()) -> RowLayout | None:
    """Where the rows lie in a tensor of both, given what each alone has there; None if that does not show it."""
    if both.shape == one.shape == other.shape:
        is_same = all(_same(both, a, b) for alone in (one, other) for a, b in zip(both.along, alone.along, strict=True))
        return NO_ROWS if is_same else None
    for axis in _joining(both, one, other):
        found, first, second = (sketch.along[axis] for sketch in (both, one, other))
        if not _same(both, found, torch.cat([first, second])):
            continue
        count = len(first)
        if count == 1 or not _same(
            both, found, torch.stack([first, second], 1).flatten()
        ):  # rows in turn would be the same
            return RowLayout(axis, is_flat=count > 1, of_tokens=count > 1 and count in tokens)
    return UNCLEAR if _several_each(both, one, other) else None


def _several_each(both: _Sketch, one: _Sketch, other: _Sketch) -> bool:
    """Whether each row has several indices of the first axis, or another number of them than the other row."""
    sizes = [sketch.shape[:1] for sketch in (both, one, other)]
    rest = {sketch.shape[1:] for sketch in (both, one, other)}
    return len(rest) == 1 and all(sizes) and sizes[0][0] == sizes[1][0] + sizes[2][0] and sizes[1:] != [(1,), (1,)]


def _is_denied(both: _Sketch, one: _Sketch, other: _Sketch) -> bool:
    """Whether a tensor has the shape that what each row has alone makes together, and other numbers."""
    pairs = [(both.along[axis], torch.cat([one.along[axis], other.along[axis]])) for axis in _joining(both, one, other)]
    return bool(pairs) and not any(_same(both, found, wanted) for found, wanted in pairs)


def _joining(both: _Sketch, one: _Sketch, other: _Sketch) -> Iterator[int]:
    """The axes along which what each row has alone, as much as the other, makes a tensor of the shape of both."""
    for axis in range(len(both.along)):
        shapes = {(*s.shape[:axis], *s.shape[axis + 1 :]) for s in (both, one, other)}
        if len(shapes) == 1 and 2 * one.shape[axis] == 2 * other.shape[axis] == both.shape[axis]:
            yield axis


def _same(both: _Sketch, found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= both.tolerance * scale).all())
