"""Take everything out of a model that adapterkit added or changed; leave it out of a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..runtime.lookup import adapter_names, fusions_of
from ..runtime.state import STATE, ModelState
from .activate import activate
from .add import remove
from .freeze import unfreeze
from .merging.merge import unmerge_all

__all__ = ["base_checkpoint", "unwrap"]


def unwrap(model: nn.Module, state: ModelState) -> None:
    """Remove all adapters and fusions, unfreeze the base, forget the model's state.

    Raises:
        ActivationError: another thread is running the model with an adapter.
        CompatibilityError: an adapter is merged, and the weights have changed since.
    """
    for name in adapter_names(model):
        state.activation.check_forgettable(name)  # first: what raises here leaves all as it was
    # While the sites are there: they hold the original weights.
    unmerge_all(model, state)
    activate(model, state, None)
    unfreeze(model, state)
    # Fusions first: an adapter that one weighs cannot be removed before it.
    for name in dict.fromkeys((*fusions_of(model), *adapter_names(model))):
        remove(model, name)
    model.__dict__.pop(STATE, None)


@contextmanager
def base_checkpoint(state: ModelState) -> Iterator[None]:
    """Within the block, `state_dict()` of the model leaves adapters out."""
    before, state.omit_adapters = state.omit_adapters, True
    try:
        yield
    finally:
        state.omit_adapters = before
