"""See where the rows of a batch lie in what modules take and return: run the model on two rows, and on each alone.

If a module returns (2, 3, 8) for both rows together and (1, 3, 8) for each alone, and the former is the latter two joined
along axis 0, then that is the axis of rows. The tensors themselves are not kept, only a sketch of each: see `Sketch`.

Where nothing can be seen, the reason is kept with the result (`SeenRows.why_unknown`). It is no error yet: most adapters
never divide rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
from .row_layout import NO_ROWS, UNCLEAR, Layouts, RowLayout, SeenRows, axis_of_call, first_with_rows, rows_at, tokens_in
from .sketch import Sketch, is_denied, layout_seen, sketch
from .tensors import is_plain

__all__ = ["discover_rows"]

_REMEMBERED: Remembered[SeenRows] = Remembered()


def discover_rows(model: nn.Module, example_inputs: ExampleInputs | None = None) -> SeenRows:
    """Run the model and return where rows lie in the tensors of each module that runs: map its path to its layouts.

    Without inputs tiny ones are made, and what they show is remembered for every model of the same structure. If nothing
    could be seen, the result is empty and says why.
    """
    try:
        if example_inputs is not None:
            return _seen(model, moved_to(example_inputs, model))
        return _REMEMBERED.get(structure_key(model, None), lambda: _seen(model, discover(model)[1]))
    except CompatibilityError as error:  # no inputs could be made on which it runs
        return SeenRows(why_unknown=str(error))


class _NothingSeenError(Exception):
    """Two rows show nothing; its message says why. It never leaves this file."""


def _seen(model: nn.Module, inputs: ExampleInputs) -> SeenRows:
    """Return what two rows show, on the likeliest axis of the inputs that the output does not deny."""
    likely, call = axis_of_call(model), _call(inputs)
    # Not on the last of three or more: those are features.
    count = max(2, *(tensor.dim() - 1 for _, tensor in pytree.tensors(call)), 0)
    reasons = []
    for axis in (likely, *(axis for axis in range(count) if axis != likely)):
        if axis > 1 and first_with_rows(call, axis) is None:
            continue
        try:
            batches = _two_rows(inputs, axis)
            return SeenRows(
                _compared(model, batches, axis),
                why_unknown="running it on two rows, and on each alone, does not show it there",
            )
        except _NothingSeenError as error:
            reasons.append(f"with rows on axis {axis} of the inputs, {error}")
        except CompatibilityError as error:  # some models do not run on two rows, or on one
            reasons.append(f"with rows on axis {axis} of the inputs, {error}")
    return SeenRows(why_unknown="; ".join(dict.fromkeys(reasons)))


def _compared(model: nn.Module, batches: Sequence[ExampleInputs], axis: int) -> dict[str, Layouts]:
    """Return where rows lie, if what lies on this axis of the inputs are rows.

    Args:
        batches: Two rows, the first alone, the second alone.

    Raises:
        _NothingSeenError: they are none: the output has for both rows other numbers than for each alone.
        CompatibilityError: the model does not run on them.
    """
    modules = ((path, module) for path, module in model.named_modules() if SITE not in path.split("."))
    paths = [path for path, module in modules if not isinstance(module, torch.jit.ScriptModule)]
    shapes = _ShapesByData()  # type: ignore[no-untyped-call]  # torch's
    both = observe(model, batches[0], paths, _look, within=shapes)
    one, other = (observe(model, batch, paths, _look) for batch in batches[1:])
    _check_output(both, one, other)
    tokens = tokens_in(_call(batches[0]), 2, axis)
    found = {path: _layouts(both[path], one[path], other[path], tokens) for path in paths}
    if shapes.were_seen:  # a row may have as many indices as the other by chance: of experts, of tokens without padding
        return {path: {key: _unless_chance(rows) for key, rows in held.items()} for path, held in found.items()}
    return found


def _check_output(both: _Seen, one: _Seen, other: _Seen) -> None:
    """Raise _NothingSeenError unless the model's output for both rows is made of what each row gives alone."""
    calls = [seen.get("", ()) for seen in (both, one, other)]
    if not all(len(seen) == 1 for seen in calls):
        raise _NothingSeenError("the model calls itself, or is TorchScript, so its output cannot be compared")
    together, first, second = (seen[0] for seen in calls)
    keys = sorted(together.keys() & first.keys() & second.keys(), key=str)
    tensors = [(together[key], first[key], second[key]) for key in keys if key[0] == "output"]
    # Axes of tokens look like axes of rows until attention mixes tokens: then the numbers differ.
    if any(is_denied(*each) for each in tensors):
        raise _NothingSeenError("the model's output for two rows is not what it gives for each of them alone")
    if all(layout_seen(*each) in (None, NO_ROWS) for each in tensors):
        raise _NothingSeenError("no tensor of the model's output has them")


def _unless_chance(rows: RowLayout) -> RowLayout:
    """Return the layout, but UNCLEAR if only the number of indices speaks for it."""
    return UNCLEAR if rows.is_flat and not rows.of_tokens else rows


class _ShapesByData(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Watch for operations whose output has as many entries as the numbers in their input say: `nonzero`, `x[mask]`."""

    were_seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation. Shape: any."""
        if torch.Tag.dynamic_output_shape in func.tags:
            # Indexing by integers has as many entries as there are indices; by a mask, as many as are true.
            indices = args[1] if func is torch.ops.aten.index.Tensor else None
            is_lookup = indices is not None and all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices)
            self.were_seen |= not is_lookup
        return func(*args, **(kwargs or {}))


def _call(inputs: ExampleInputs) -> Any:
    """Return inputs as a container, in which each tensor has a path."""
    return inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)


def _two_rows(inputs: ExampleInputs, axis: int) -> tuple[ExampleInputs, ExampleInputs, ExampleInputs]:
    """Return two rows of the inputs, the first alone, and the second alone.

    Raises:
        _NothingSeenError: no two rows can be cut out of these inputs.
    """
    call = _call(inputs)
    tensors = list(pytree.tensors(call))
    odd = next((tensor for _, tensor in tensors if not is_plain(tensor)), None)
    if odd is not None:
        raise _NothingSeenError(f"no rows can be cut out of a tensor that is nested, complex, meta or {odd.layout}")
    listed = [key for key in pytree.keys(call) if _is_list_of_tensors(pytree.get(call, (key,)))]
    if listed and not axis:
        return _two_items(call, listed)
    reference = first_with_rows(call, axis)
    if reference is None or not reference.shape[axis]:
        raise _NothingSeenError("they hold no tensor with rows")
    rows = reference.shape[axis]
    both = one = other = call
    try:
        for path, tensor in tensors:
            at = rows_at(tensor, rows, axis)
            if at is not None:  # else it is no part of a row, and the same for all: a table of positions
                first, second = _two_of(tensor, at)
                one, other = pytree.put(one, path, first), pytree.put(other, path, second)
                both = pytree.put(both, path, torch.cat([first, second], at))
    except (TypeError, ValueError, RuntimeError) as error:  # a container that cannot be copied, a tensor that cannot be cut
        raise _NothingSeenError(f"no rows can be cut out of them: {type(error).__name__}: {error}") from error
    return both, one, other


def _is_list_of_tensors(value: Any) -> bool:
    """Tell whether an argument is a list of tensors: of images that differ in size, say, each of which is a row."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)


def _two_items(call: Any, listed: Sequence[int | str]) -> tuple[ExampleInputs, ExampleInputs, ExampleInputs]:
    """Return a call with two items of each of these lists, with the first alone, and with the second alone."""
    both = one = other = call
    for key in listed:
        items = pytree.get(call, (key,))
        first, second = items[0], items[-1]
        second = first.flip(-1) if torch.equal(first, second) and first.dim() else second
        both, one, other = (
            pytree.put(each, (key,), held) for each, held in ((both, [first, second]), (one, [first]), (other, [second]))
        )
    return both, one, other


def _two_of(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return two different rows of a tensor. Shape: as the tensor, with 1 on that axis."""
    first, second = tensor.narrow(axis, 0, 1), tensor.narrow(axis, min(1, tensor.shape[axis] - 1), 1)
    if torch.equal(first, second) and tensor.dim() > 1:
        # Equal rows could not be told apart. Turned round, the second stays valid: the same ids, in another order.
        second = first.flip(0 if axis else -1)
    return first, second


_Seen = Mapping[str, Sequence[Mapping[pytree.Path, Sketch]]]  # path -> its calls, each with the sketches of its tensors


def _look(_path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> dict[pytree.Path, Sketch]:
    """Return a sketch of each tensor that a call takes and returns, keyed as in `Layouts`."""
    sketches: dict[pytree.Path, Sketch] = {}
    for side, value in (("input", (args, kwargs)), ("output", output)):
        held = [(path, tensor) for path, tensor in pytree.tensors(value) if is_plain(tensor)]
        sketches |= {(side, *path): sketch(tensor) for path, tensor in held}
        # `output=1` and `output="hidden"` may name the same tensor of a ModelOutput: it is found by position and by key.
        position = {key: index for index, key in enumerate(pytree.keys(value)) if side == "output"}
        sketches |= {(side, position[path[0]], *path[1:]): sketches[(side, *path)] for path, _ in held if path and position}
        first = pytree.find(value)
        if first is not None and (side, *first) in sketches:
            sketches[(side,)] = sketches[(side, *first)]
    return sketches


_Calls = Sequence[Mapping[pytree.Path, Sketch]]


def _layouts(both: _Calls, one: _Calls, other: _Calls, tokens: Collection[int]) -> Layouts:
    """Return where rows lie in each tensor of a module; left out are those that show nothing, or in which calls differ.

    Args:
        both: The module's calls with both rows; `one` and `other`: with each alone.
        tokens: How many tokens a row may have.
    """
    if not len(both) == len(one) == len(other):  # it runs as often as the numbers say, as an expert may
        return {way: UNCLEAR for call in both for way in call}
    found: dict[pytree.Path, set[RowLayout | None]] = {}
    for a, b, c in zip(both, one, other, strict=True):
        for way in a.keys() & b.keys() & c.keys():
            found.setdefault(way, set()).add(layout_seen(a[way], b[way], c[way], tokens))
    # One that is missing counts as never seen: an error that needs it then says so, with the reason.
    return {way: layout for way, (layout, *others) in found.items() if layout is not None and not others}
