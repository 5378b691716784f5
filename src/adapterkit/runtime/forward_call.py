"""What the whole model is called with, for adapters that need to know more than their host takes.

Prefixes in the keys and values, say, must lengthen the mask, move the positions, and stand aside once a cache holds them.
An attention deep in the model need not be given any of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .handover import Handover
from .hooks import KitHook

__all__ = ["ForwardCall", "ForwardHook", "argument_names"]

# What models call these arguments, the likeliest first.
_MASKS = ("attention_mask", "mask", "src_key_padding_mask", "key_padding_mask")
_POSITIONS = ("position_ids", "cache_position", "positions")
_CACHES = ("past_key_values", "cache_params", "cache")


class ForwardCall(NamedTuple):
    """The arguments of one call of the model, by name; those without a name are left out.

    Attributes:
        arguments: Map a parameter's name in the model's `forward` to what was given for it.
    """

    arguments: Mapping[str, Any]

    def first(self, *names: str) -> Any:
        """Return the first of these arguments that was given and is not None; None if none was."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)

    @property
    def mask(self) -> Any:
        """The mask over tokens, as the model was given it; None without one."""
        return self.first(*_MASKS)

    @property
    def positions(self) -> Any:
        """The positions of the tokens; None if the model was left to count them."""
        return self.first(*_POSITIONS)

    @property
    def cache(self) -> Any:
        """The cache of keys and values; None without one."""
        return self.first(*_CACHES)


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional arguments that a model's `forward` takes, as far as its signature tells."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # TorchScript's and builtins have none: what is given by position has no name then
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


class ForwardHook(KitHook):
    """Hand the model's call to the sites whose way of acting reads it.

    Args:
        names: Those of the model's positional arguments.
        handovers: Where each site takes the call from.
    """

    is_pre = True

    def __init__(self, names: tuple[str, ...], handovers: tuple[Handover[ForwardCall], ...]) -> None:
        self.names, self.handovers = names, handovers

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Leave the call for the sites. Shape: any."""
        # More arguments than names are those of a *args: they have no name.
        call = ForwardCall({**dict(zip(self.names, args, strict=False)), **kwargs})
        for handover in self.handovers:
            if handover.wanted:
                handover.give(call)
