"""Where the rows of the batch lie in a module's tensors, as far as the modules say, or running the model showed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..paths import ancestors
from ..pytree import Path
from ..pytree import tensors as tensors_in

__all__ = [
    "NO_ROWS",
    "UNCLEAR",
    "Layouts",
    "RowAxes",
    "RowLayout",
    "axis_of_call",
    "first_with_rows",
    "rows_at",
    "tokens_in",
]


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a batch lie in a tensor.

    Attributes:
        axis: On which axis; None if it is one tensor for all rows or, where rows are flat, if it is unclear which is whose.
        is_flat: A row is several indices of that axis, one after the other: its tokens, say, or windows of its image.
        of_tokens: They are as many as its tokens.
    """

    axis: int | None
    is_flat: bool = False
    of_tokens: bool = False


NO_ROWS, UNCLEAR = RowLayout(None), RowLayout(None, is_flat=True)
# Of a module: how rows lie in its tensors, as running it showed. By "input" or "output", then the way there in the call,
# `(args, kwargs)`, or in what it returns; of its first floating-point tensor, by that word alone as well.
Layouts = Mapping[Path, RowLayout]


class RowAxes:
    """Where rows lie at each place of a model.

    Inside torch's own layers, and inside what else has a `batch_first`, as that says. Elsewhere on the first axis; not so
    in a model in which something says `batch_first=False`: it may hand its tensors on as they are, or turn them first.

    Args:
        modules: The model's modules by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        said = {path: _batch_first(module) for path, module in modules.items()}
        self._said = {path: is_first for path, is_first in said.items() if is_first is not None}

    def at(self, path: str) -> int | None:
        """The axis of rows in what this module takes and returns; None if that cannot be told."""
        said = next((self._said[outer] for outer in ancestors(path) if outer in self._said), None)
        if said is None:
            return None if False in self._said.values() else 0
        return 0 if said else 1


def axis_of_call(module: nn.Module) -> int:
    """The axis of rows in what a module takes: the second of torch's own that are, or hold, `batch_first=False`."""
    if not type(module).__module__.startswith("torch.nn"):
        return 0
    return 1 if any(_batch_first(inner) is False for inner in module.modules()) else 0


def rows_at(tensor: Tensor, rows: int, axis: int) -> int | None:
    """The axis of a tensor's rows; None if it has none of the batch's."""
    axes = (axis, 0) if tensor.dim() <= 2 else (axis,)  # masks over padding have rows first, whatever the stream has
    return next((at for at in axes if tensor.dim() > at and tensor.shape[at] == rows), None)


def first_with_rows(call: Any, axis: int) -> Tensor | None:
    """The tensor of a model's call that says how many rows there are: the first of two axes or more, else of enough."""
    tensors = [tensor for _, tensor in tensors_in(call) if tensor.dim() > axis]
    return next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0] if tensors else None)


def tokens_in(call: Any, rows: int, axis: int) -> frozenset[int]:
    """How many tokens the rows of a call may have: the sizes of its tensors on the axis beside that of the rows."""
    tensors = (tensor for _, tensor in tensors_in(call) if tensor.dim() > 1)
    return frozenset(tensor.shape[1 - axis] for tensor in tensors if tensor.shape[axis] == rows)


def _batch_first(module: Any) -> bool | None:
    """What a module says of itself, if it does."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = next(iter(module.layers), module)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    said = getattr(module, "batch_first", None)
    return said if isinstance(said, bool) else None
