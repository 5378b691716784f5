"""Tell whether a model has the weights that a saved adapter was trained on."""

import warnings

from torch import nn

from ..runtime.originals import fingerprint
from .saved_adapter import SavedAdapter

__all__ = ["BaseMismatchWarning", "warn_of_other_base"]


class BaseMismatchWarning(UserWarning):
    """The adapter was trained on other weights than the model has."""


def warn_of_other_base(model: nn.Module, saved: SavedAdapter) -> None:
    """Warn if the model's weights are not those that the adapter was trained on, as far as its format knows them."""
    # None: the format does not say what the base was.
    if saved.base is None or fingerprint(model) == saved.base.fingerprint:
        return
    # Only one digest over all tensors is stored: which of them differ cannot be told.
    warnings.warn(
        f"adapter {saved.name!r} was trained on {saved.base_name!r} with other weights (or another dtype) than this "
        f"{type(model).__name__} has: expect other outputs. Pass any_base=True if that is meant.",
        BaseMismatchWarning,
        stacklevel=4,  # the line that calls kit.load
    )
