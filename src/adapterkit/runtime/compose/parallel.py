"""Parallel composition: the batch is repeated as the model is called (`batch.py`), and shared while children are alike.

Blocks below the first one where children differ compute the first child's rows alone, and repeat what they return. So what
children share, such as the lower layers that AdapterDrop leaves bare, is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...composition.facts import facts_of
from ...errors import CompatibilityError
from ...placement.layers import stack_of
from ...structure import pytree
from ...structure.tracing.row_layout import NO_ROWS, Layouts, RowLayout, axis_of_call, rows_at
from ..forward_call import ForwardHook
from ..hooks import KitHook, remove_hooks, set_hook
from ..state import ModelState
from ..sync import forget_compiled
from ..this_call import THIS_CALL
from .batch import BatchEndHook, BatchHook, is_ambiguous, running

__all__ = ["known_axis_of_call", "set_batch_hooks"]

# The attribute of a block that a compiler traces which says whether it computes the first rows alone.
_TRIMMED = "_adapterkit_trimmed"


class FirstRowsHook(KitHook):
    """Let a block in which no child differs from another compute the rows of the first child alone.

    Args:
        copies: How often the batch is repeated.
        axis: The axis of the rows.
        state: The model's.
    """

    is_pre = True
    is_first = True  # before other hooks of ours, such as one that keeps a residual stream: they see these rows as well

    def __init__(self, copies: int, axis: int, state: ModelState) -> None:
        self.copies, self.axis, self.state = copies, axis, state

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return `(args, kwargs)` with the first rows. Shape: as given, but for the rows."""
        call = (args, kwargs)
        rows = self._rows(call) if not _is_watched(module) and self._is_repeated(module) else None
        # For `RepeatRowsHook`: one entry for each block that is running, so that nested calls are told apart.
        if torch.compiler.is_compiling():
            module.__dict__[_TRIMMED] = rows is not None
        else:
            THIS_CALL.first_rows.append(rows is not None)
        if rows is None:
            return None
        for path, tensor in list(pytree.tensors(call)):
            axis = rows_at(tensor, rows, self.axis)
            if axis is not None:
                call = pytree.put(call, path, tensor.narrow(axis, 0, rows // self.copies))
        return call

    def _is_repeated(self, module: nn.Module) -> bool:
        """Tell whether the batch is a repeated one: not while someone looks at the base.

        Raises:
            CompatibilityError: children have differed already in this call, so that the first rows do not stand for all.
        """
        # Nothing is seen there (see `_is_unseen` of `batch.py`), but a checked call has led there.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
            return True
        batch = running(self.state)
        if batch is not None and batch.has_diverged:
            raise CompatibilityError(
                f"the model ran a block ({type(module).__name__}) below the first one whose adapters differ, and after it, "
                "so that Parallel cannot share it: run the model on batch.repeat(...) under ak.BatchSplit instead"
            )
        return batch is not None and batch.is_repeated

    def _rows(self, call: Any) -> int | None:
        """Return the number of rows; None where they lie elsewhere, or a tensor may have them or not (a token mask)."""
        path = pytree.find(call)
        if path is None or pytree.get(call, path).dim() <= self.axis:
            return None
        x: Tensor = pytree.get(call, path)
        rows: int = x.shape[self.axis]
        tensors = [tensor for _, tensor in pytree.tensors(call)]
        is_doubtful = any(is_ambiguous(tensor, x, tensors, rows) for tensor in tensors)
        batch = None if torch.compiler.is_compiling() else running(self.state)
        is_other = batch is not None and rows != batch.rows
        return None if rows % self.copies or is_doubtful or is_other else rows


class RepeatRowsHook(KitHook):
    """Repeat what a block returned, if it computed the rows of the first child alone.

    Args:
        copies: How often the batch is repeated.
        axis: The axis of the rows.
    """

    always = True

    def __init__(self, copies: int, axis: int) -> None:
        self.copies, self.axis = copies, axis

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the output with all rows. Shape: as the block's, but for the rows."""
        if torch.compiler.is_compiling():
            is_trimmed = module.__dict__.pop(_TRIMMED, False)
        else:
            is_trimmed = bool(THIS_CALL.first_rows) and THIS_CALL.first_rows.pop()  # after an exception, too
        path = pytree.find((args, kwargs))
        if not is_trimmed or path is None:
            return None
        # torch gives this hook the arguments as `FirstRowsHook` left them: with the first child's rows.
        rows = pytree.get((args, kwargs), path).shape[self.axis]
        for where, tensor in list(pytree.tensors(output)):
            axis = rows_at(tensor, rows, self.axis)
            if axis is not None:
                output = pytree.put(output, where, torch.cat([tensor] * self.copies, axis))
        return output


def known_axis_of_call(model: nn.Module, layouts: Mapping[str, Layouts]) -> int | None:
    """Return the axis of the rows in what the model takes, as was seen in a run, else as torch's layers say."""
    seen = (rows.axis for way, rows in layouts.get("", {}).items() if way[0] == "input" and rows.axis is not None)
    said = axis_of_call(model) if type(model).__module__.startswith("torch.nn") else None
    return next(seen, said)


def set_batch_hooks(
    model: nn.Module, state: ModelState, dividing: Sequence[tuple[str, RowLayout | None]], layouts: Mapping[str, Layouts]
) -> None:
    """Register the hooks that the active composition needs, and remove those of the one before.

    Args:
        model: The model.
        state: Its state.
        dividing: The hosts, heads apart, at which rows run different adapters, each with how rows lie there.
        layouts: What was seen of where rows lie in what modules take, by path.
    """
    parallel = facts_of(state.activation.active).parallel
    old = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, BatchHook)), None)
    if old is None and parallel is None and not dividing:
        return
    axis = known_axis_of_call(model, layouts) or 0  # where it is not known, no Parallel is active
    _set_hooks_of_model(model, state, BatchHook(parallel, axis) if parallel is not None or dividing else None)
    if parallel is None and (old is None or old.parallel is None):
        return  # a compiler takes these hooks for nothing: what it made without them is right
    blocks = [] if parallel is None else _shared_blocks(model, dividing, layouts)
    _set_hooks_of_blocks(model, state, blocks, copies=1 if parallel is None else len(parallel.children))
    forget_compiled()


def _set_hooks_of_model(model: nn.Module, state: ModelState, hook: BatchHook | None) -> None:
    """Give the model this hook and the one that ends its call, in the place of those before; neither if None."""
    for kind in (BatchHook, BatchEndHook):
        remove_hooks(model, kind)
    if hook is not None:  # after the hook that takes labels off the call
        set_hook(model, hook, state)
        set_hook(model, BatchEndHook(), state)
    for forward_hook in [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ForwardHook)]:
        set_hook(model, forward_hook, state)  # last again: it hands on the repeated batch


def _set_hooks_of_blocks(
    model: nn.Module, state: ModelState, shared: Sequence[tuple[nn.Module, int]], *, copies: int
) -> None:
    """Let these blocks compute the first rows alone, each with the axis of its rows, and all others all rows."""
    for block in model.modules():
        remove_hooks(block, FirstRowsHook)
        remove_hooks(block, RepeatRowsHook)
    for block, axis in shared:
        set_hook(block, FirstRowsHook(copies, axis, state), state)
        set_hook(block, RepeatRowsHook(copies, axis), state)


def _shared_blocks(
    model: nn.Module, dividing: Sequence[tuple[str, RowLayout | None]], layouts: Mapping[str, Layouts]
) -> list[tuple[nn.Module, int]]:
    """Return the blocks below the first in which children differ, each with the axis of the rows that it takes.

    There are none where children differ outside of one stack of blocks (in an encoder and a decoder, in an embedding): what
    runs before them is not known then. The axis is what was seen; else what the block says, if its hosts have theirs there.
    """
    modules = dict(model.named_modules())
    found = [stack_of(path, modules) for path, _ in dividing]  # of each host: the stack, the block's index, their number
    stacks = {None if of_host is None else of_host[0] for of_host in found}
    if len(stacks) != 1 or None in stacks:
        return []
    first = min(index for _, index, _ in filter(None, found))
    (stack,) = stacks
    at_hosts = {rows.axis for _, rows in dividing if rows is not None}
    shared: list[tuple[nn.Module, int]] = []
    for name, block in [*modules[str(stack)].named_children()][:first]:
        seen = layouts.get(f"{stack}.{name}".lstrip("."), {}).get(("input",))
        said = known_axis_of_call(block, {})
        layout = seen or (NO_ROWS if said is None or at_hosts != {said} else RowLayout(said))
        # What else a block takes, a mask say, has its rows on one of the first two axes mostly: nobody can tell.
        if layout.axis is None or layout.axis > 1 or layout.is_flat:
            return []
        shared.append((block, layout.axis))
    return shared


def _is_watched(module: nn.Module) -> bool:
    """Tell whether hooks of others lie in a block: they are to see all rows, and may keep these for the model's output."""
    inside = [module]
    for inner in inside:
        if not all(
            isinstance(hook, KitHook) for hook in (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
        ):
            return True
        inside += [below for below in inner._modules.values() if below is not None]
    return False
