"""Parallel composition: the batch is repeated for each child, as the model is called, and shared while children are alike.

The model's own pre-hook repeats every tensor of the call that has the rows of the batch. Blocks below the first one where
children differ compute the first rows alone, and repeat what they return.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import values
from .composition import Parallel, parallel_in
from .errors import CompatibilityError
from .generation import is_generating
from .hooks import KitHook, forget_compiled, has_hook, remove_hooks, set_hook
from .layers import stack_of
from .record import RECORD, Record

__all__ = ["check_rows", "row_axis_of", "set_parallel"]

# Of a block that a compiler traces: whether it computes the first rows alone.
_TRIMMED = "_adapterkit_trimmed"


@dataclass
class _Run:
    """A forward with a repeated batch: its rows, and whether children have differed in it yet."""

    rows: int
    has_diverged: bool = False


class _Thread(threading.local):
    """What this thread runs: its forwards, by the `id` of the model's record, and whether the blocks around are trimmed."""

    def __init__(self) -> None:
        self.runs: dict[int, _Run] = {}
        self.trimmed: list[bool] = []


_thread = _Thread()


class RepeatHook(KitHook):
    """Repeat the batch for each child of the active Parallel."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return `(args, kwargs)`, each tensor with the batch's rows as often as there are children. Shape: as given."""
        record: Record = module.__dict__[RECORD]
        parallel = parallel_in(record.activation.active)
        if parallel is None or not record.activation.check(record.activation.active):
            return None
        _refuse_generation(parallel)
        call, rows = _repeated((args, kwargs), parallel, row_axis_of(module))
        if not torch.compiler.is_compiling():
            _thread.runs[id(record)] = _Run(rows)
        return call


class RepeatEndHook(KitHook):
    """Forget the forward, after an exception, too."""

    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        if not torch.compiler.is_compiling():
            _thread.runs.pop(id(module.__dict__[RECORD]), None)


class TrimHook(KitHook):
    """Let a block in which no child differs from another compute the rows of the first child alone.

    `copies`: how often the batch is repeated; `axis`: that of the rows; `record`: the model's.
    """

    is_pre = True
    is_first = True  # what else sees the call sees these rows
    copies = 1
    axis = 0
    record: Record

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return `(args, kwargs)` with the first rows. Shape: as given, but for the rows."""
        call = (args, kwargs)
        is_trimmed = not _is_watched(module) and self._is_repeated() and self._rows(call) is not None
        if torch.compiler.is_compiling():
            module.__dict__[_TRIMMED] = is_trimmed
        else:
            _thread.trimmed.append(is_trimmed)
        rows = self._rows(call)
        if not is_trimmed or rows is None:
            return None
        for path, tensor in list(values.tensors(call)):
            axis = _rows_at(tensor, rows, self.axis)
            if axis is not None:
                call = values.put(call, path, tensor.narrow(axis, 0, rows // self.copies))
        return call

    def _is_repeated(self) -> bool:
        """Whether the batch is a repeated one: not while someone looks at the base."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
            return True
        run = _thread.runs.get(id(self.record))
        if run is not None and run.has_diverged:
            raise CompatibilityError(
                "the model ran a block below the first one whose adapters differ after that one, so that Parallel cannot "
                "share it: run the model on batch.repeat(...) under ak.BatchSplit instead"
            )
        return run is not None

    def _rows(self, call: Any) -> int | None:
        """The rows of the batch; None where another tensor has that size for another reason, as a mask over tokens may."""
        path = values.find(call)
        if path is None or values.get(call, path).dim() <= self.axis:
            return None
        x: Tensor = values.get(call, path)
        rows: int = x.shape[self.axis]
        tensors = [tensor for _, tensor in values.tensors(call)]
        is_doubtful = any(_is_ambiguous(tensor, x, tensors, rows) for tensor in tensors)
        return None if rows % self.copies or is_doubtful else rows


class UntrimHook(KitHook):
    """Repeat what a block returned, if it computed the rows of the first child alone."""

    always = True
    copies = 1
    axis = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the output with all rows. Shape: as the block's, but for the rows."""
        if torch.compiler.is_compiling():
            is_trimmed = module.__dict__.pop(_TRIMMED, False)
        else:
            is_trimmed = bool(_thread.trimmed) and _thread.trimmed.pop()
        path = values.find((args, kwargs))
        if not is_trimmed or path is None:
            return None
        rows = values.get((args, kwargs), path).shape[self.axis]
        for where, tensor in list(values.tensors(output)):
            axis = _rows_at(tensor, rows, self.axis)
            if axis is not None:
                output = values.put(output, where, torch.cat([tensor] * self.copies, axis))
        return output


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks of others lie in a block: they are to see all rows, and may keep these for the model's output."""
    inside = [module]
    for inner in inside:
        if not all(
            isinstance(hook, KitHook) for hook in (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
        ):
            return True
        inside += [below for below in inner._modules.values() if below is not None]
    return False


def check_rows(record: Record, path: str, tensor: Tensor, axis: int) -> None:
    """Raise CompatibilityError unless a tensor at which the children of a Parallel differ has the repeated batch's rows."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
        return
    run = _thread.runs.get(id(record))
    if run is None:
        raise CompatibilityError(
            f"Parallel repeats the batch as the model itself is called, and {path!r} ran outside of that: call the model"
        )
    run.has_diverged = True
    if tensor.dim() <= axis or tensor.shape[axis] != run.rows:
        raise CompatibilityError(
            f"{path!r} has a tensor of shape {tuple(tensor.shape)}, the repeated batch {run.rows} rows, which should be "
            f"on axis {axis}: exclude this place, or run the children one by one"
        )


def set_parallel(model: nn.Module, record: Record, diverging: Sequence[str]) -> None:
    """Have the hooks that the active composition needs.

    Args:
        diverging: The hosts, heads apart, at which rows run different adapters.
    """
    parallel = parallel_in(record.activation.active)
    if parallel is None and not has_hook(model, RepeatHook):
        return
    for module in model.modules():
        for kind in (RepeatHook, RepeatEndHook, TrimHook, UntrimHook):
            remove_hooks(module, kind)
    if parallel is not None:
        set_hook(model, RepeatHook, True, record)  # after the hooks that take labels off the call
        set_hook(model, RepeatEndHook, True, record)
        for block in _shared_blocks(model, diverging):
            for kind in (TrimHook, UntrimHook):
                set_hook(block, kind, True, record)
            for hook in (*block._forward_pre_hooks.values(), *block._forward_hooks.values()):
                if isinstance(hook, (TrimHook, UntrimHook)):
                    hook.copies, hook.axis = len(parallel.children), row_axis_of(block)
                if isinstance(hook, TrimHook):
                    hook.record = record
    forget_compiled()


def _shared_blocks(model: nn.Module, diverging: Sequence[str]) -> list[nn.Module]:
    """The blocks below the first in which children differ, where they differ in one stack of blocks and nowhere else."""
    modules = dict(model.named_modules())
    places = [stack_of(path, modules) for path in diverging]
    stacks = {None if place is None else place[0] for place in places}
    if len(stacks) != 1 or None in stacks:
        return []
    first = min(index for _, index, _ in filter(None, places))
    (stack,) = stacks
    return list(modules[str(stack)].children())[:first]


def row_axis_of(module: nn.Module) -> int:
    """The axis of the rows in what a module takes: the second of torch's own layers that say `batch_first=False`."""
    if not type(module).__module__.startswith("torch.nn"):
        return 0
    return 1 if any(getattr(inner, "batch_first", True) is False for inner in module.modules()) else 0


def _refuse_generation(parallel: Parallel) -> None:
    """Raise CompatibilityError inside `generate`, which goes on with as many rows as it was given."""
    if is_generating():
        count, children = len(parallel.children), ", ".join(map(repr, parallel.children))
        raise CompatibilityError(
            f"generate goes on with the rows that it was given, and Parallel returns {count} times as many: activate "
            f"ak.BatchSplit({children}), and generate from prompts.repeat({count}, 1)"
        )


def _repeated(call: Any, parallel: Parallel, axis: int) -> tuple[Any, int]:
    """The call with its rows repeated, and their number then."""
    tensors = list(values.tensors(call))
    reference = next((tensor for _, tensor in tensors if tensor.dim() > axis), None)
    if reference is None:
        raise CompatibilityError("Parallel repeats the rows of what the model takes, and this call has no tensor with rows")
    rows, copies = reference.shape[axis], len(parallel.children)
    shared = parallel.shared or ()
    for path, tensor in tensors:
        where = None if path[1] in shared else _rows_at(tensor, rows, axis)
        if where is None:
            continue
        if parallel.shared is None and _is_ambiguous(tensor, reference, [t for _, t in tensors], rows):
            raise CompatibilityError(
                f"argument {path[1]!r}, of shape {tuple(tensor.shape)}, may have the {rows} rows of the batch, or its "
                f"{rows} tokens: name what is no part of a row, Parallel(..., shared=[{path[1]!r}]), or shared=[] if all is"
            )
        call = values.put(call, path, torch.cat([tensor] * copies, where))
    return call, rows * copies


def _rows_at(tensor: Tensor, rows: int, axis: int) -> int | None:
    """The axis of a tensor's rows; None if it has none of the batch's."""
    axes = (axis, 0) if tensor.dim() <= 2 else (axis,)  # masks over padding have rows first, whatever the stream has
    return next((at for at in axes if tensor.dim() > at and tensor.shape[at] == rows), None)


def _is_ambiguous(tensor: Tensor, reference: Tensor, others: Sequence[Tensor], rows: int) -> bool:
    """Whether a tensor with the batch's rows may be a mask or positions: there are as many tokens, and it has few axes."""
    if tensor.dim() > 2 or tensor.shape == reference.shape:
        return False
    streams = (reference, *(other for other in others if other.dim() == 3))  # (batch, seq, hidden), or the ids
    return any(stream.dim() in (2, 3) and stream.shape[0] == stream.shape[1] == rows for stream in streams)
