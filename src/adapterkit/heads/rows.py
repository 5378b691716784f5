"""The outputs of heads that ran on different rows of a batch, put together in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CompatibilityError
from ..structure import pytree

__all__ = ["HeadOutput", "Logits", "Piece", "in_row_order", "join_rows", "rows_of_call", "some_rows"]

Logits = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Piece:
    """What a head made of its rows.

    Attributes:
        owner: Its adapter.
        head: Its name.
        logits: A row of them may be of several rows of the batch (choices).
        rows: The first row of the batch that each is of, in ascending order.
    """

    owner: str
    head: str
    logits: Tensor
    rows: Sequence[int]


def some_rows(tensor: Tensor, rows: Sequence[int], axis: int = 0) -> Tensor:
    """Return these rows of a tensor: a view of it where they lie together. Shape: as it, with as many rows."""
    # A copy only where it must be: hidden states are large, and rows of one adapter mostly lie together.
    if len(rows) == tensor.shape[axis] and list(rows) == list(range(len(rows))):
        return tensor
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor.narrow(axis, rows[0], len(rows))
    return tensor.index_select(axis, torch.tensor(list(rows), device=tensor.device))


def rows_of_call(value: Any, count: int, rows: Sequence[int], axis: int) -> Any:
    """Return arguments or an output with these rows alone, in each tensor that has `count` rows; others stay whole."""
    for path, tensor in list(pytree.tensors(value)):
        if tensor.dim() > axis and tensor.shape[axis] == count:
            value = pytree.put(value, path, some_rows(tensor, rows, axis))
    return value


def in_row_order(pieces: Sequence[Piece], absent: Sequence[int]) -> Logits:
    """Return the logits in the order of the rows: one tensor where all have them, of one shape; else one for each, or None.

    Args:
        absent: The rows of which no piece is.
    """
    if len(pieces) == 1 and not absent:
        return pieces[0].logits
    # Heads with other numbers of labels, or rows without a head, have no common tensor.
    if not absent and len({(p.logits.shape[1:], p.logits.dtype, p.logits.device) for p in pieces}) == 1:
        order = _order([row for piece in pieces for row in piece.rows])
        return some_rows(torch.cat([piece.logits for piece in pieces]), order)
    # Map row → its logits, e.g. {0: (2,), 1: None, 2: (5,)} in shapes.
    each: dict[int, Tensor | None] = dict.fromkeys(absent)
    each |= {row: piece.logits[i] for piece in pieces for i, row in enumerate(piece.rows)}
    return tuple(each[row] for row in sorted(each))


def join_rows(outputs: Sequence[tuple[Any, Sequence[int]]], axis: int, what: str) -> Any:
    """Return the outputs of heads in a module's place, each of its own rows, as one output of all rows.

    Args:
        outputs: Each with the rows that it is of. Tensors without an axis of rows (a loss) are those of the first.
        axis: The axis of the rows.
        what: What returns them, for the message.

    Raises:
        CompatibilityError: they differ in more than their rows.
    """
    if len(outputs) == 1:
        return outputs[0][0]
    # Rows come grouped by head; `order` takes them back into the order of the batch.
    first, order = outputs[0][0], _order([row for _, rows in outputs for row in rows])
    found = [{path: t for path, t in pytree.tensors(output) if t.dim() > axis} for output, _ in outputs]
    # All but the axis of rows, of which each has its own number.
    shapes = [{path: (*t.shape[:axis], *t.shape[axis + 1 :]) for path, t in tensors.items()} for tensors in found]
    if any(other != shapes[0] for other in shapes[1:]):
        listed = "; ".join(str([tuple(t.shape) for t in tensors.values()]) for tensors in found)
        raise CompatibilityError(
            f"{what} returns tensors of other shapes for some rows than for others, not fit for one: {listed}. "
            "Run those adapters apart, or give them heads on the output, such as ak.ClassificationHead(…): these return "
            "one tensor for each row"
        )
    for path in shapes[0]:
        together = torch.cat([tensors[path] for tensors in found], axis)
        first = pytree.put(first, path, some_rows(together, order, axis))
    return first


def _order(rows: Sequence[int]) -> list[int]:
    """Return the indices at which the rows lie, from the lowest row on: the order that sorts them."""
    return sorted(range(len(rows)), key=lambda index: rows[index])


class HeadOutput(NamedTuple):
    """What a model returns while a head on its output is active. The loss comes first, as Hugging Face's Trainer wants it.

    Where rows of a batch have different heads, logits are one tensor in the order of the rows if all rows have them, of
    one shape; else a tuple with one tensor for each row, None for a row without.

    Attributes:
        loss: The sum of `losses`; None without labels.
        logits: Of the head; of the first one where an adapter has several.
        losses: By adapter, the sum of its heads' losses, each a mean over that adapter's rows.
        heads: The logits by the name of the head.
        output: What the model itself returned.
    """

    loss: Tensor | None
    logits: Logits
    losses: dict[str, Tensor]
    heads: dict[str, Logits]
    output: Any
