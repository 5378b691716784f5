"""Train one adapter: freeze the base and all other adapters, open this one, make it active."""

from torch import nn

from ..runtime.lookup import adapter_names
from ..runtime.state import ModelState
from .activate import activate, check_active, check_known
from .freeze import check_may_train, freeze, set_training

__all__ = ["freeze_adapter", "train_adapter", "unfreeze_adapter"]


def train_adapter(model: nn.Module, state: ModelState, name: str, *, reentrant: bool) -> None:
    """Freeze the base and all other adapters, open this one with its heads, and activate it.

    Args:
        reentrant: Whether the model may be checkpointed in the reentrant way; see `freeze`.

    Raises:
        AdapterNameError: no such adapter.
        ActivationError: it, or another adapter, is merged.
    """
    check_known(model, name)
    check_may_train(state, name)
    activate(model, state, check_active(model, name))  # first: from here on nothing can fail
    freeze(model, state, reentrant=reentrant)
    for other in adapter_names(model):
        set_training(model, state, other, trains=other == name)


def freeze_adapter(model: nn.Module, state: ModelState, name: str) -> None:
    """Stop an adapter's parameters from training, its heads' too. Raises AdapterNameError."""
    check_known(model, name)
    set_training(model, state, name, trains=False)


def unfreeze_adapter(model: nn.Module, state: ModelState, name: str) -> None:
    """Let an adapter's parameters train, its heads' too. Raises AdapterNameError; ActivationError if it is merged."""
    check_known(model, name)
    set_training(model, state, name, trains=True)
