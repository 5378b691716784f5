"""Where the rows of the batch lie in a module's tensors, as far as the modules say, or running the model showed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .patterns import ancestors
from .values import Path

__all__ = ["NO_ROWS", "Layouts", "RowAxes", "RowLayout", "axis_of_call", "rows_at"]


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a batch lie in a tensor.

    Attributes:
        axis: On which axis; None if it is one tensor for all rows.
        is_flat: A row is several indices of that axis, one after the other: its tokens, say, or windows of its image.
    """

    axis: int | None
    is_flat: bool = False


NO_ROWS = RowLayout(None)
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


def _batch_first(module: Any) -> bool | None:
    """What a module says of itself, if it does."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = next(iter(module.layers), module)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    said = getattr(module, "batch_first", None)
    return said if isinstance(said, bool) else None
