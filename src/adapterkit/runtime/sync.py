"""Which hooks the modules of a model need for the sites in it."""

import sys
from collections import defaultdict

import torch
from torch import nn

from ..placement.spec import located
from ..structure.hosts import is_called
from ..structure.paths import ancestors
from .acting import ACTING, acting_at
from .forward_call import ForwardHook, argument_names
from .hooks import (
    PORT,
    ClearHook,
    EncoderHook,
    KitHook,
    StreamHook,
    StreamPort,
    has_hook,
    keep_hook,
    remove_hooks,
    set_hook,
)
from .lookup import sites_of
from .site import AdapterSite, HeadEntry, SiteEntry, root_of
from .state import ModelState

__all__ = ["forget_compiled", "sync_site_hooks"]


def forget_compiled() -> None:
    """Make torch.compile trace anew: a graph that it made before hooks were added would run without them."""
    if "torch._dynamo" in sys.modules:  # what never compiled has nothing to forget, and importing it is slow
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
        port = ports.get(path, StreamPort())  # `get`, since `[]` would make an entry
        _keep_pre_hook(module, StreamHook, state, is_wanted=bool(port.gives))
        keep_hook(module, ClearHook, state, is_wanted=bool(port.clears))
        keep_hook(module, EncoderHook, state, is_wanted=path in encoders)
        if path in ports:
            module.__dict__[PORT] = port
        else:
            module.__dict__.pop(PORT, None)
    _sync_forward_hook(model, state)


def _sync_forward_hook(model: nn.Module, state: ModelState) -> None:
    """Hand the model's call to the sites whose way of acting reads it; no hook where there are none."""
    entries = [entry for _, _, site in sites_of(model) for entries in site.entries.values() for entry in entries]
    reading = [entry for entry in entries if isinstance(entry, SiteEntry) and acting_at(entry.spec.at).reads_forward]
    handovers = tuple(entry.handover for entry in reading if entry.handover is not None)
    if handovers:
        set_hook(model, ForwardHook(argument_names(model), handovers), state)
    else:
        remove_hooks(model, ForwardHook)


def _sync_host_hooks(host: nn.Module, site: AdapterSite, state: ModelState) -> None:
    """Register the hooks of one host that its site needs, in the order of `ACTING`, and remove those that it does not."""
    entries = [entry for entries in site.entries.values() for entry in entries]
    used = {entry.spec.at if isinstance(entry, SiteEntry) else "output" for entry in entries}  # heads act on the output
    for acting in ACTING:
        if acting.before is not None:
            _keep_pre_hook(host, acting.before, state, is_wanted=acting.at in used)
        if acting.after is not None:
            keep_hook(host, acting.after, state, is_wanted=acting.at in used)
    after = [acting.after for acting in ACTING if acting.after is not None and acting.at in used]
    for kind in after[1:]:
        set_hook(host, kind(), state)  # anew: before those that were registered since, and before the hooks of outer ways


def _open_ports(path: str, site: AdapterSite, modules: dict[str, nn.Module], ports: dict[str, StreamPort]) -> None:
    """Note at which modules streams are taken for a site, and when what nobody took is let go."""
    entries = [entry for entries in site.entries.values() for entry in entries]
    for entry in (entry for entry in entries if isinstance(entry, SiteEntry)):
        spec = located(entry.spec, path)
        if entry.handover and acting_at(spec.at).reads_forward:
            ports[""].clears.append(entry.handover)  # "" is the model: the call is of use until it ends
        elif entry.handover and spec.residual is not None:
            ports[spec.residual].gives.append((entry.handover, spec.input))
            # Once the module around both has ended, the site cannot run on this stream any more.
            ports[_called_around(spec.residual, path, modules)].clears.append(entry.handover)
    heads = [entry for entry in entries if isinstance(entry, HeadEntry) and entry.spec.above is not None]
    for root in {root_of(path, entry) for entry in heads}:
        ports[root].clears.append(site.call)


def _keep_pre_hook(module: nn.Module, kind: type[KitHook], state: ModelState, *, is_wanted: bool) -> None:
    """Register a pre-hook, or remove it, keeping ours in their order: that of `ACTING`, then the one that sees the stream.

    The order must not depend on which adapter came first. The stream is what the module takes in the end, so its hook is
    last.
    """
    order = [*(acting.before for acting in ACTING if acting.before is not None), StreamHook]
    is_new = is_wanted and not has_hook(module, kind)
    keep_hook(module, kind, state, is_wanted=is_wanted)
    for later in order[order.index(kind) + 1 :] if is_new else ():
        if has_hook(module, later):
            set_hook(module, later(), state)  # anew, so that it comes last again


def _called_around(one: str, other: str, modules: dict[str, nn.Module]) -> str:
    """Return the path of the innermost module around both, or `one` itself, that is called; an nn.ModuleList never is."""
    around = (path for path in ancestors(one) if path in ancestors(other) and path != other)
    return next((path for path in around if is_called(modules[path])), "")
