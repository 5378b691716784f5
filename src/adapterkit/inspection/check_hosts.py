"""Check that adapters are where they were put: hooks, hosts, devices."""

from collections.abc import Iterator, Mapping

from torch import nn

from ..heads.hook import LabelsHook
from ..runtime.acting import acting_at
from ..runtime.hooks import has_hook
from ..runtime.site import AdapterSite, Entry, HeadEntry, SiteEntry, root_of
from ..runtime.state import STATE, ModelState
from ..structure.paths import SITE

__all__ = ["lost_hosts", "missing_hooks", "on_other_devices"]

Hosts = Mapping[str, tuple[nn.Module, AdapterSite]]  # map the path of each host to it and its site


def missing_hooks(model: nn.Module, hosts: Hosts) -> Iterator[str]:
    """Yield a sentence for each hook of an adapter that is gone."""
    for path, (host, site) in hosts.items():
        for name, entries in site.entries.items():
            if not all(_has_hooks(host, entry) for entry in entries):
                yield f"the hook of adapter {name!r} on {path!r} is gone: someone removed it"
            # A head on the output takes its labels off the call of the model that it belongs to: a hook there does that.
            heads = [entry for entry in entries if isinstance(entry, HeadEntry) and entry.spec.above is not None]
            roots = {root_of(path, entry) for entry in heads}
            if not all(has_hook(model.get_submodule(root), LabelsHook) for root in roots):
                yield f"the hook that takes labels for the heads of adapter {name!r} is gone: someone removed it"


def _has_hooks(host: nn.Module, entry: Entry) -> bool:
    """Tell whether a host has the hooks that a module of an adapter needs there."""
    acting = acting_at(entry.spec.at if isinstance(entry, SiteEntry) else "output")  # heads change what the host returns
    return all(has_hook(host, kind) for kind in (acting.before, acting.after) if kind is not None)


def lost_hosts(model: nn.Module, state: ModelState, hosts: Hosts) -> Iterator[str]:
    """Yield a sentence for each module that was put in place of a host: the adapter went with the host."""
    if model.__dict__.get(STATE) is not state:  # a part of a wrapped model: its paths are others
        return
    for name, paths in state.hosts.items():
        for path in paths:
            if path not in hosts or name not in hosts[path][1].entries:
                yield f"{path!r} was replaced since adapter {name!r} was added: remove the adapter, and add it anew"


def on_other_devices(hosts: Hosts) -> Iterator[str]:
    """Yield a sentence for each adapter that is on another device than its host."""
    for path, (host, site) in hosts.items():
        if hasattr(host, "_hf_hook"):  # accelerate moves the host's parameters while it runs
            continue
        # The site is a child of the host: without the test, the adapter's own device would count as the host's.
        devices = {p.device for name, p in host.named_parameters() if SITE not in name.split(".") and not p.is_meta}
        for name in site.entries:
            own = {p.device for _, module in site.modules_of(name) for p in module.parameters()}
            # A host without parameters, or split over several devices, does not say on which one its adapter should be.
            wrong = own - devices if len(devices) == 1 else set()
            if wrong:
                yield f"adapter {name!r} at {path!r} is on {wrong.pop()}, its host on {next(iter(devices))}"
