"""The ways in which adapters act at a host: on its output, its input, its weights. One object for each, in one tuple.

A new way is a file with its step and its hooks, and one entry of `ACTING`: whatever plans, hooks, verification, merging,
files or trees must know of it is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..composition.nodes import Composition
from ..errors import ConfigError
from ..nn.fused import can_add
from .hooks import InputHook, KitHook, OutputHook, WeightEndHook, WeightHook
from .site import SiteEntry
from .steps import AdaptWeight, AddDelta, AddProjected, Step

__all__ = ["ACTING", "Acting", "acting_at"]


@dataclass(frozen=True)
class Acting:
    """One way of acting at a host.

    Attributes:
        at: Its name, which `Placement.at` and `SiteSpec.at` say.
        step: Makes the step of one module, from the site's entry, the active composition and the module. A way whose steps
            add to a tensor makes an `AddsToTensor`, which compositions can run on some rows or tokens.
        before: The hook that runs before the host, if it needs one.
        after: The hook that runs after the host, if it needs one.
        is_shared: All rows and tokens share what is changed, such as a Parameter: no composition can divide it.
        is_unguarded: The host's own forward reads what is changed around its arguments, so that a graph compiled of it must
            be made anew when the steps change.
        reads_forward: Each module gets the call of the whole model (its mask, positions and cache) as a `ForwardCall`,
            through the handover of its entry.
        merge_rank: The place in the order in which adapters at one host are merged, lowest first; None if what is done so
            cannot be merged into weights.
        label: What stands behind an adapter's name in a tree.
    """

    at: str
    step: Callable[[SiteEntry, Composition, nn.Module], Step]
    before: type[KitHook] | None = None
    after: type[KitHook] | None = None
    is_shared: bool = False
    is_unguarded: bool = False
    reads_forward: bool = False
    merge_rank: int | None = None
    label: str = ""


def _adapt_weight(entry: SiteEntry, active: Composition, _module: nn.Module) -> Step:
    """Make the step that changes a Parameter."""
    # e.g. ("attn.in_proj_weight",) becomes ((("attn",), "in_proj_weight"),)
    owners = [name.split(".") for name in entry.spec.parameters]
    return AdaptWeight(entry.key, active, tuple((tuple(way), leaf) for *way, leaf in owners))


def _add(entry: SiteEntry, active: Composition, module: nn.Module) -> Step:
    """Make the step that adds to a tensor."""
    if entry.spec.reads == "own_input":
        return AddProjected(entry.key, active, entry.spec, can_add(module))
    return AddDelta(entry.key, active, entry.spec, entry.handover, can_add(module))


# From the outside in: hooks before the host run in this order, hooks after it in the opposite one. An adapter at the input
# may run the host on it (a norm), with the weights that the host will have; one at the output may read those weights, too.
# Merging has another order: a changed weight is what an output is added to, and an input is scaled before both.
ACTING: tuple[Acting, ...] = (
    Acting(
        "weight", _adapt_weight, before=WeightHook, after=WeightEndHook,
        is_shared=True, is_unguarded=True, merge_rank=0, label="(weight)",
    ),
    Acting("input", _add, before=InputHook, merge_rank=2, label="(input)"),
    Acting("output", _add, after=OutputHook, merge_rank=1),
)  # fmt: skip


def acting_at(at: str) -> Acting:
    """Return the way of acting with this name. Raises ConfigError if there is none."""
    for acting in ACTING:
        if acting.at == at:
            return acting
    raise ConfigError(f"adapters act at {[acting.at for acting in ACTING]}; found {at!r}")
