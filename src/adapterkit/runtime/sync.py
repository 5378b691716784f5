"""Which hooks the modules of a model need for the sites in it."""

import sys
from collections import defaultdict

import torch
from torch import nn

from ..placement.spec import located
from ..structure.hosts import is_called
from ..structure.paths import ancestors
from .hooks import (
    PORT,
    ClearHook,
    EncoderHook,
    InputHook,
    KitHook,
    OutputHook,
    StreamHook,
    StreamPort,
    WeightEndHook,
    WeightHook,
    has_hook,
    remove_hooks,
    set_hook,
)
from .lookup import sites_of
from .site import AdapterSite, root_of
from .state import ModelState

__all__ = ["forget_compiled", "sync_site_hooks"]


def forget_compiled() -> None:
    """Make torch.compile trace anew: a graph that it made before hooks were added would run without them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def sync_site_hooks(model: nn.Module, state: ModelState) -> None:
    """Register the hooks that the model's sites need, and remove those that none needs any more."""
    modules = dict(model.named_modules())
    ports: dict[str, StreamPort] = defaultdict(StreamPort)
    encoders: set[str] = set()
    for path, host, site in sites_of(model):
        _sync_host_hooks(host, site, state)
        _open_ports(path, site, modules, ports)
        encoders |= {above for above in ancestors(path) if isinstance(modules.get(above), nn.TransformerEncoder)}
    for path, module in modules.items():
        port = ports.get(path, StreamPort())
        _set_pre_hook(module, StreamHook, bool(port.gives), state)
        set_hook(module, ClearHook, bool(port.clears), state)
        set_hook(module, EncoderHook, path in encoders, state)
        if path in ports:
            module.__dict__[PORT] = port
        else:
            module.__dict__.pop(PORT, None)


def _sync_host_hooks(host: nn.Module, site: AdapterSite, state: ModelState) -> None:
    """Register the hooks of one host that its site needs, and remove those that it does not."""
    places = {"output" if e.spec is None else e.spec.at for entries in site.entries.values() for e in entries}
    set_hook(host, OutputHook, "output" in places, state)
    _set_pre_hook(host, WeightHook, "weight" in places, state)
    _set_pre_hook(host, InputHook, "input" in places, state)
    set_hook(host, WeightEndHook, "weight" in places, state)
    if {"output", "weight"} <= places:
        remove_hooks(host, OutputHook)  # so that it comes first again
        set_hook(host, OutputHook, True, state)


def _open_ports(path: str, site: AdapterSite, modules: dict[str, nn.Module], ports: dict[str, StreamPort]) -> None:
    """Say at which modules streams and calls are taken for a site, and where what nobody took is let go."""
    entries = [entry for entries in site.entries.values() for entry in entries]
    for entry in entries:
        spec = located(entry.spec, path) if entry.spec else None
        if entry.handover and spec and spec.residual is not None:
            ports[spec.residual].gives.append((entry.handover, spec.input))
            ports[_called_around(spec.residual, path, modules)].clears.append(entry.handover)
    for root in {root_of(path, entry) for entry in entries if entry.head is not None and entry.head.above is not None}:
        ports[root].clears.append(site.call)


def _set_pre_hook(module: nn.Module, kind: type[KitHook], wanted: bool, state: ModelState) -> None:
    """`set_hook` of one that runs in this order among ours, whichever adapter came first.

    An adapter at the input may run the host on it (a norm), with the weights that it will have; a stream is what the
    module takes.
    """
    order = (WeightHook, InputHook, StreamHook)
    is_new = wanted and not has_hook(module, kind)
    set_hook(module, kind, wanted, state)
    for later in order[order.index(kind) + 1 :] if is_new else ():
        if has_hook(module, later):
            remove_hooks(module, later)
            set_hook(module, later, True, state)


def _called_around(one: str, other: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module around both (`one` may be it) that is called when they are: no nn.ModuleList is."""
    around = (path for path in ancestors(one) if path in ancestors(other) and path != other)
    return next((path for path in around if is_called(modules[path])), "")
