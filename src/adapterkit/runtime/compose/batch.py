"""The batch that a model is called with, known while the model runs: what is divided at a place must be its rows.

A hook on the model keeps the sizes of its call where rows run different adapters, and repeats the batch for a Parallel. In
eager mode only: a compiler sees neither what is kept nor the checks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ...composition.nodes import Composition, Parallel
from ...composition.rows import fixed_rows, least_rows, rows_of
from ...errors import CompatibilityError
from ...structure import pytree
from ...structure.tracing.row_layout import RowLayout, first_with_rows, rows_at, tokens_in
from ..hooks import KitHook
from ..state import STATE, ModelState
from ..this_call import THIS_CALL

__all__ = [
    "Batch",
    "BatchEndHook",
    "BatchHook",
    "check_repeated",
    "check_sizes",
    "indices_per_row",
    "is_ambiguous",
    "is_generating",
    "is_of_tokens",
    "running",
]


@dataclass
class Batch:
    """What a model was called with.

    Attributes:
        sizes: Those of what may be rows: the first axes of tensors, the lengths of lists.
        rows: As many as its first tensor has on the axis of rows, a repeated batch those of all; None without a tensor.
        tokens: How many each row may have.
        is_repeated: Whether a Parallel repeats the batch.
        has_diverged: Whether the Parallel's children have differed yet.
    """

    sizes: frozenset[int]
    rows: int | None = None
    tokens: frozenset[int] = frozenset()
    is_repeated: bool = False
    has_diverged: bool = False


class BatchHook(KitHook):
    """Keep what the model is called with, the batch repeated for each child of a Parallel, if one is active.

    Args:
        parallel: The active Parallel; None if there is none.
        axis: The axis of the rows.
    """

    is_pre = True

    def __init__(self, parallel: Parallel | None, axis: int) -> None:
        self.parallel, self.axis = parallel, axis

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return `(args, kwargs)`, each tensor with the batch's rows as often as there are children. Shape: as given."""
        state: ModelState = module.__dict__[STATE]
        call = (args, kwargs)
        first = first_with_rows(call, self.axis)
        rows = None if first is None else first.shape[self.axis]
        tokens = frozenset[int]() if rows is None else tokens_in(call, rows, self.axis)
        # Not inside of `without_adapters`, which runs the batch as it is.
        is_repeated = self.parallel is not None and state.activation.check(state.activation.active)
        if self.parallel is not None and is_repeated:
            _refuse_generation(self.parallel)
            # The call's own tensors are repeated here, once, and not at the first site: masks and positions that the model
            # makes of its arguments then fit as well (decision 0010).
            call, rows = _repeated(call, self.parallel, self.axis)
            rows_of(state.activation.active, rows)  # raises for a wrong number, where no site may count rows
        if not torch.compiler.is_compiling():
            # Of the call as it came: a site may see these sizes or, of a repeated batch, `rows`.
            sizes = frozenset(
                size for value in (*args, *kwargs.values()) for size in _sizes_in(value, max(2, self.axis + 1))
            )
            THIS_CALL.batches.setdefault(id(state), []).append(Batch(sizes, rows, tokens, is_repeated))
        return call if is_repeated else None


class BatchEndHook(KitHook):
    """Forget the call, after an exception, too."""

    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        if torch.compiler.is_compiling():
            return
        calls = THIS_CALL.batches.get(id(module.__dict__[STATE]), [])
        if calls:
            calls.pop()  # a model may run within its own call: the innermost ends first
        if not calls:
            THIS_CALL.batches.pop(id(module.__dict__[STATE]), None)


def running(state: ModelState) -> Batch | None:
    """Return what this thread called the model with; None outside of a call that was seen."""
    calls = THIS_CALL.batches.get(id(state))
    return calls[-1] if calls else None


def check_sizes(state: ModelState, path: str, tensor: Tensor, axis: int) -> None:
    """Raise CompatibilityError where a tensor's axis that is divided as rows cannot be the batch's.

    Only sizes are compared: an axis of another kind that is as long as the batch is not noticed here.
    """
    if _is_unseen():
        return
    batch, size = running(state), tensor.shape[axis]
    if batch is not None and batch.sizes and size not in batch.sizes:
        raise CompatibilityError(
            f"{path!r} has a tensor of shape {tuple(tensor.shape)}, with {size} rows on axis {axis}, and the model was "
            f"called with sizes {sorted(batch.sizes)}: that is not the batch whose rows are divided"
            f"{state.layouts.note(path)}. Leave this place out with exclude="
        )


def indices_per_row(
    state: ModelState, path: str, tensor: Tensor, layout: RowLayout, composition: Composition | None
) -> int:
    """Return how many indices of its axis each row has, in a tensor that has several for each row.

    An example is (batch * tokens, features), where a model flattens its tokens. Of rows one after the other, a composition
    without sizes takes the fewest that it can divide, each of them several of the batch.

    Raises:
        CompatibilityError: the rows are not those of the composition, or the tensor is not that of all their tokens.
    """
    size, batch = tensor.shape[layout.axis or 0], None if _is_unseen() else running(state)
    # Of rows in turn, fewer would take each other's indices, too.
    seen = batch.rows if batch is not None and layout.in_turn else None
    # Else the fewest, not the batch's: a recomputation, which sees no call, must divide the tensor in the same way.
    rows = fixed_rows(composition) or seen or max(1, least_rows(composition))
    wrong = f"{rows} rows do not divide it" if size % rows else None
    if layout.in_turn and fixed_rows(composition) is None and not seen:
        wrong = "they lie in turn, and how many rows there are is not seen here (under a compiler, say)"
    if batch is not None and batch.rows:
        wrong = _misfit(batch, batch.rows, size, layout, composition) or wrong
    if wrong is not None and size:
        raise CompatibilityError(
            f"{path!r} has a tensor of shape {tuple(tensor.shape)}, in which each row of the batch is several indices of "
            f"axis {layout.axis}: {wrong}. Name as many rows as there are, or exclude this place"
        )
    return max(1, size // rows)


def _misfit(batch: Batch, rows: int, size: int, layout: RowLayout, composition: Composition | None) -> str | None:
    """Tell why an axis of this size is not that of the batch's rows as the composition takes them; None if it is."""
    if size % rows or (layout.of_tokens and size // rows not in batch.tokens):
        return f"{rows} rows of {sorted(batch.tokens)} tokens do not make it"
    try:
        rows_of(composition, rows)
    except CompatibilityError as error:
        return str(error)
    return None


def is_of_tokens(state: ModelState, size: int) -> bool:
    """Tell whether an axis may be that of the tokens of a row, as far as the model's call is seen."""
    batch = None if _is_unseen() else running(state)
    return batch is None or size in batch.tokens


def check_repeated(state: ModelState, path: str, tensor: Tensor, axis: int, per_row: int) -> None:
    """Raise CompatibilityError where a tensor at which a Parallel's children differ does not have its repeated rows."""
    if _is_unseen():
        return
    batch = running(state)
    if batch is None or not batch.is_repeated or batch.rows is None:
        raise CompatibilityError(
            f"Parallel repeats the batch as the model itself is called, and {path!r} ran outside of that: call the model"
        )
    batch.has_diverged = True  # a block that runs after this has rows that differ; see `FirstRowsHook`
    size = tensor.shape[axis] if tensor.dim() > axis else None
    if size is None or (size % batch.rows if per_row > 1 else size != batch.rows):
        raise CompatibilityError(
            f"{path!r} has a tensor of shape {tuple(tensor.shape)}, the repeated batch {batch.rows} rows, which should be "
            f"on axis {axis}: exclude this place, or run the children one by one"
        )


def _is_unseen() -> bool:
    """Tell whether no call is seen here: under a compiler, and where checkpointing runs a forward again.

    A recomputation runs parts of the model after the call has ended, in a backward; the first run was checked.
    """
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0


def is_ambiguous(tensor: Tensor, reference: Tensor, others: Sequence[Tensor], rows: int) -> bool:
    """Tell whether a tensor with the batch's rows may be a mask or positions: tokens are as many, and it has few axes."""
    if tensor.dim() > 2 or tensor.shape == reference.shape:
        return False
    # As many tokens as rows: (4, 4) may be a padding mask (batch, seq) or an attention mask (seq, seq).
    streams = (reference, *(other for other in others if other.dim() == 3))  # (batch, seq, hidden), or the ids
    return any(stream.dim() in (2, 3) and stream.shape[0] == stream.shape[1] == rows for stream in streams)


def _refuse_generation(parallel: Parallel) -> None:
    """Raise CompatibilityError inside `generate`, which goes on with as many rows as it was given."""
    if is_generating():
        count, children = len(parallel.children), ", ".join(map(repr, parallel.children))
        raise CompatibilityError(
            f"generate goes on with the rows that it was given, and Parallel returns {count} times as many: activate "
            f"ak.BatchSplit({children}), and generate from prompts.repeat({count}, 1)"
        )


def _repeated(call: Any, parallel: Parallel, axis: int) -> tuple[Any, int]:
    """Return the call with its rows repeated, and their number then.

    Raises:
        CompatibilityError: it has no rows, or one of its tensors may have them or not.
    """
    tensors, reference = list(pytree.tensors(call)), first_with_rows(call, axis)
    if reference is None:
        found = [type(value).__name__ for value in (*call[0], *call[1].values())]
        raise CompatibilityError(
            f"Parallel repeats the rows of what the model takes, and this call has no tensor with rows; found {found}"
        )
    if axis > 1 and len(tensors) > 1:
        raise CompatibilityError(
            f"Parallel repeats the rows of all that the model takes; it has them on axis {axis}, and on which axis each of "
            f"{len(tensors)} tensors has them cannot be told: run it on a repeated batch under ak.BatchSplit"
        )
    rows, copies = reference.shape[axis], len(parallel.children)
    shared = parallel.shared or ()
    for path, tensor in tensors:
        where = None if path[1] in shared else rows_at(tensor, rows, axis)
        if where is None:
            continue
        if parallel.shared is None and is_ambiguous(tensor, reference, [t for _, t in tensors], rows):
            raise CompatibilityError(
                f"argument {path[1]!r}, of shape {tuple(tensor.shape)}, may have the {rows} rows of the batch, or its "
                f"{rows} tokens: name what is no part of a row, Parallel(..., shared=[{path[1]!r}]), or shared=[] if all is"
            )
        # Whole batches one after the other, not each row `copies` times: outputs come in the order of the children.
        call = pytree.put(call, path, torch.cat([tensor] * copies, where))
    return call, rows * copies


def _sizes_in(value: Any, axes: int) -> Iterator[int]:
    """Yield the sizes of what may be rows: of tensors the first axes, of lists their lengths."""
    if isinstance(value, Tensor):
        yield from value.shape[:axes]
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _sizes_in(item, axes)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _sizes_in(item, axes)


def is_generating() -> bool:
    """Tell whether `generate` of transformers is running the model; never while a compiler traces it.

    It looks for a function of that name among this thread's callers. `generate` sets nothing that a hook could read and
    gives the model's call no sign of itself, and a wrapper around `model.generate` would replace a method of the user's.
    Only steps that are wrong inside `generate` ask: those of a Parallel, and of heads that score no next token.
    """
    if torch.compiler.is_compiling():  # a compiler cannot follow frames
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("transformers.")
