"""Where the rows of a batch lie in a module's tensors: as modules say, or as running the model showed.

For a batch of 2 rows with 3 tokens each and 8 features:

    (2, 3, 8)   RowLayout(0)                  most models: rows on the first axis
    (3, 2, 8)   RowLayout(1)                  rows on the second axis: torch's layers with batch_first=False
    (6, 8)      RowLayout(0, is_flat=True)    each row is several indices, one after the other: its tokens, its windows
    (6, 8)      the same with in_turn=True    the first token of each row, then the second of each: (tokens * batch, 8)
    (3, 8)      NO_ROWS                       one tensor for all rows: an embedding of positions

and UNCLEAR, where a row has several indices and nothing says which: experts that see some tokens of each.
"""

from collections.abc import Iterable, Mapping
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
    "SeenRows",
    "axis_of_call",
    "first_with_rows",
    "rows_at",
    "tokens_in",
]


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a batch lie in a tensor.

    Attributes:
        axis: The axis of the rows. None if the tensor is one for all rows or, where `is_flat`, if it is unclear which
            index is whose.
        is_flat: A row is several indices of that axis: its tokens, say, or windows of its image.
        of_tokens: A row has as many of these indices as it has tokens.
        in_turn: These are not one after the other, but every index after one of each other row.
    """

    axis: int | None
    is_flat: bool = False
    of_tokens: bool = False
    in_turn: bool = False


NO_ROWS, UNCLEAR = RowLayout(None), RowLayout(None, is_flat=True)
# Maps each tensor of one module to how rows lie in it. A key is "input" or "output", followed by the path in the call,
# `(args, kwargs)`, or in what the module returns. The first floating-point tensor is also found by that word alone.
# Example: {("input", 0, 0): RowLayout(0), ("input",): RowLayout(0), ("output",): RowLayout(0, is_flat=True)}
Layouts = Mapping[Path, RowLayout]


class SeenRows(dict[str, Layouts]):
    """Where rows lie, as running a model showed: map each module's path to its `Layouts`.

    Attributes:
        why_unknown: Why nothing is known of a module that is missing here. It goes into the message of an error that
            needs to know (`note`), so that the reason is told where it matters, however long ago the model was run.
        was_looked_for: Whether the model was run to see it, or cannot be.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layouts] | Iterable[tuple[str, Layouts]] = (),
        *,
        why_unknown: str | None = None,
    ) -> None:
        super().__init__(layouts)
        self.was_looked_for = why_unknown is not None
        self.why_unknown = why_unknown or "the model was not run to see it"

    def note(self, path: str) -> str:
        """Return the reason in brackets, to stand in a message about this module; empty if its rows were seen."""
        return "" if path in self else f" (where rows lie was not seen: {self.why_unknown})"


class RowAxes:
    """The axis of rows at each path of a model, as its modules say: what counts where running it showed nothing.

    Inside torch's own layers, and inside whatever else has a `batch_first`, that says it. Elsewhere it is unknown: a model
    may have its rows on any axis, and turn its tensors on the way.

    Args:
        modules: Maps the path of each of the model's modules to it.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        said = {path: _batch_first(module) for path, module in modules.items()}
        self._said = {path: is_first for path, is_first in said.items() if is_first is not None}

    def at(self, path: str) -> int | None:
        """Return the axis of rows in what the module at `path` takes and returns; None if that cannot be told."""
        said = next((self._said[outer] for outer in ancestors(path) if outer in self._said), None)
        return None if said is None else 0 if said else 1


def axis_of_call(module: nn.Module) -> int:
    """Return the axis of rows in what a model takes: 1 for torch's layers with `batch_first=False`, else 0."""
    # Only if the model itself is torch's: a model of someone's that holds such layers may turn what it takes.
    if not type(module).__module__.startswith("torch.nn"):
        return 0
    return 1 if any(_batch_first(inner) is False for inner in module.modules()) else 0


def rows_at(tensor: Tensor, rows: int, axis: int) -> int | None:
    """Return the axis on which a tensor has as many indices as the batch has rows, `axis` first; None if on none."""
    axes = (axis, 0) if tensor.dim() <= 2 else (axis,)  # masks over padding have rows first, whatever the stream has
    return next((at for at in axes if tensor.dim() > at and tensor.shape[at] == rows), None)


def first_with_rows(call: Any, axis: int) -> Tensor | None:
    """Return the tensor of a model's call that tells the number of rows; None if none has that axis.

    The first of at least two axes is taken, for one of one axis may be a list of positions or of labels.
    """
    tensors = [tensor for _, tensor in tensors_in(call) if tensor.dim() > axis]
    return next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0] if tensors else None)


def tokens_in(call: Any, rows: int, axis: int) -> frozenset[int]:
    """Return how many tokens a row of a call may have: the sizes of its tensors on the axis beside that of the rows."""
    tensors = (tensor for _, tensor in tensors_in(call) if tensor.dim() > 1)
    beside = axis - 1 if axis else 1
    return frozenset(t.shape[beside] for t in tensors if t.dim() > axis and t.shape[axis] == rows)


def _batch_first(module: Any) -> bool | None:
    """Return what a module says of itself by `batch_first`; None if it says nothing."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = next(iter(module.layers), module)  # one without layers says nothing
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    said = getattr(module, "batch_first", None)
    return said if isinstance(said, bool) else None
