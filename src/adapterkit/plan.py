"""What runs: the active adapter, compiled into the steps of each site."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .errors import AdapterNameError
from .record import ACTIVATION_LOCK, Record
from .sites import AdapterSite, Step, adapter_names, site_key, sites_of
from .steps import AddDelta, Pass, UseHead

__all__ = ["activate", "activated", "check_known"]


def activate(model: nn.Module, record: Record, name: str | None) -> None:
    """Make an adapter active; None is the base alone.

    Raises:
        AdapterNameError: no such adapter.
        ActivationError: another thread is running the model with another adapter.
    """
    if name is not None:
        check_known(model, name)
    with ACTIVATION_LOCK:
        record.activation.switch(name)
        apply(model, record)


@contextmanager
def activated(model: nn.Module, record: Record, name: str | None) -> Iterator[None]:
    """Make an adapter active within a `with` block; see `activate`."""
    if name is not None:
        check_known(model, name)
    with ACTIVATION_LOCK:
        record.activation.enter(name)
        apply(model, record)
    try:
        yield
    finally:
        with ACTIVATION_LOCK:
            record.activation.leave()
            apply(model, record)


def apply(model: nn.Module, record: Record) -> None:
    """Put the steps of what is active at every site."""
    active = record.activation.active
    # A model in which nothing was ever active needs no checks, and its hooks stay empty.
    idle = (Pass(active),) if record.activation.was_used else ()
    for _, _, site in sites_of(model):
        for name, entry in site.entries.items():
            if entry.handover is not None:
                entry.handover.is_wanted = name == active
        at_input, step = _step(site, active)
        site.input_steps = (step,) if step is not None and at_input else idle
        site.output_steps = (step,) if step is not None and not at_input else idle


def check_known(model: nn.Module, name: str) -> None:
    """Raise AdapterNameError, with the nearest names, unless the model has this adapter."""
    names = adapter_names(model)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"It has: {names or 'none'}."
        raise AdapterNameError(f"the model has no adapter {name!r}. {hint}")


def _step(site: AdapterSite, active: str | None) -> tuple[bool, Step | None]:
    """What the active adapter does at a site, if anything, and whether it does so to the host's input."""
    if active is None or active not in site.entries:
        return False, None
    entry, key = site.entries[active], site_key(active)
    if entry.spec is None:
        return False, UseHead(key, active)
    return entry.spec.at == "input", AddDelta(key, active, entry.spec, entry.handover)
