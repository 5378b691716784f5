"""What runs: the active adapter, compiled into the steps of each site."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .errors import ActivationError, AdapterNameError
from .hooks import WeightHook, forget_compiled, has_hook
from .record import ACTIVATION_LOCK, Record
from .sites import Entry, Step, adapter_names, sites_of
from .steps import AdaptWeight, AddDelta, AddProjected, Pass, UseHead

__all__ = ["activate", "activated", "apply", "check_known", "step_of"]


def activate(model: nn.Module, record: Record, name: str | None) -> None:
    """Make an adapter active; None is the base alone.

    Raises:
        AdapterNameError: no such adapter.
        ActivationError: another thread is running the model with another adapter, or another one is merged.
    """
    if name is not None:
        check_known(model, name)
    with ACTIVATION_LOCK:
        _check_merged(record, name)
        record.activation.switch(name)
        apply(model, record)


@contextmanager
def activated(model: nn.Module, record: Record, name: str | None) -> Iterator[None]:
    """Make an adapter active within a `with` block; see `activate`."""
    if name is not None:
        check_known(model, name)
    with ACTIVATION_LOCK:
        _check_merged(record, name)
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
    is_stale = False
    for _, host, site in sites_of(model):
        for name, entries in site.entries.items():
            for entry in entries:
                if entry.handover is not None:
                    entry.handover.is_wanted = name == active
        entries = site.entries.get(active, ()) if active else ()
        if active in record.merged:
            entries = tuple(entry for entry in entries if entry.spec is None)  # heads are not in the weights
        steps = [(_place(entry), step_of(entry, active)) for entry in entries] if active else []
        site.input_steps = tuple(step for place, step in steps if place == "input") or idle
        site.output_steps = tuple(step for place, step in steps if place == "output") or idle
        weight_steps = tuple(step for place, step in steps if place == "weight") or idle
        # A graph of the host's own forward, where that is compiled apart from its hooks, has no guard on what they put in
        # the way of its Parameters.
        is_stale |= weight_steps != site.weight_steps and has_hook(host, WeightHook)
        site.weight_steps = weight_steps
    if is_stale:
        forget_compiled()


def check_known(model: nn.Module, name: object) -> None:
    """Raise AdapterNameError, with the nearest names, unless the model has this adapter."""
    names = adapter_names(model)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"It has: {names or 'none'}."
        if name is None:
            hint += " The base alone runs after kit.deactivate(), or inside `with kit.base():`."
        raise AdapterNameError(f"the model has no adapter {name!r}. {hint}")


def _check_merged(record: Record, name: str | None) -> None:
    """Raise ActivationError unless what is to be active contains all that is merged."""
    others = [merged for merged in record.merged if merged != name]
    if others:
        raise ActivationError(
            f"cannot run {'the base' if name is None else repr(name)} alone: {others[0]!r} is merged into the weights, and "
            f"would run as well. Call kit.unmerge({others[0]!r}) first"
        )


def _place(entry: Entry) -> str:
    """Where at the host a module acts."""
    return entry.spec.at if entry.spec is not None else "output"


def step_of(entry: Entry, active: str) -> Step:
    """What a module of the active adapter does."""
    spec = entry.spec
    if spec is None:
        return UseHead(entry.key, active)
    if spec.at == "weight":
        owners = [name.split(".") for name in spec.parameters]
        return AdaptWeight(entry.key, active, tuple((tuple(way), leaf) for *way, leaf in owners))
    if spec.reads == "input":
        return AddProjected(entry.key, active, spec)
    return AddDelta(entry.key, active, spec, entry.handover)
