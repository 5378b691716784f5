"""The hook on a model that takes labels, and whatever else is for heads, off the model's call."""

from collections import defaultdict
from typing import Any

from torch import nn

from ..runtime.handover import Handover
from ..runtime.hooks import KitHook, keep_hook
from ..runtime.lookup import sites_of
from ..runtime.site import HeadEntry, root_of
from ..runtime.state import ModelState
from .call import HeadInputs, take_head_inputs

__all__ = ["LabelsHook", "sync_labels_hooks"]

# The attribute of a model that holds the handovers of its sites with heads on the output.
_HANDOVERS = "_adapterkit_labels"


class LabelsHook(KitHook):
    """Take off the model's call what is for the heads on its output: labels, which the model need not know."""

    is_pre = True
    is_first = True  # before the hook that repeats the batch, and before those of others: none is to see labels

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments that are left, or None for no change. Shape: as given; choices are made rows."""
        is_changed = False
        # `wanted` is None while no adapter with such a head is active: the call then goes on as it came.
        for handover in module.__dict__[_HANDOVERS]:
            if handover.wanted is not None:
                args, kwargs, call = take_head_inputs(handover.wanted, module, args, kwargs)
                handover.give(call)
                is_changed = True
        return (args, kwargs) if is_changed else None


def sync_labels_hooks(model: nn.Module, state: ModelState) -> None:
    """Register the hook on each module whose output an adapter's head reads; remove it where none does any more."""
    handovers: dict[str, list[Handover[HeadInputs]]] = defaultdict(list)
    # The model that is called may be a part of the wrapped one (an encoder by itself), with a head on its own output.
    for path, _, site in sites_of(model):
        entries = [entry for entries in site.entries.values() for entry in entries]
        on_output = [entry for entry in entries if isinstance(entry, HeadEntry) and entry.spec.above is not None]
        # Several heads at one host may be of different models: of a Sequential, and of its last layer by itself.
        for root in {root_of(path, entry) for entry in on_output}:
            handovers[root].append(site.call)
    for path, module in model.named_modules():
        keep_hook(module, LabelsHook, state, is_wanted=path in handovers)
        if path in handovers:
            module.__dict__[_HANDOVERS] = handovers[path]
        else:
            module.__dict__.pop(_HANDOVERS, None)
