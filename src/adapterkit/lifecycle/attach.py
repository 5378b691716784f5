"""Put built modules into a model and take them out again, with their sites and hooks."""

from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from ..composition.names import check_name
from ..config.fusion import FusionConfig
from ..config.union import Config
from ..errors import AdapterKitError, AdapterNameError, CompatibilityError, ConfigError
from ..heads.hook import sync_labels_hooks
from ..placement.spec import SiteSpec
from ..runtime.acting import ACTING, acting_at
from ..runtime.handover import Handover
from ..runtime.hooks import remove_hooks
from ..runtime.lookup import adapter_names, find_state, open_parameters, sites_among, sites_of
from ..runtime.site import AdapterSite
from ..runtime.state import ACTIVATION_LOCK, STATE, ModelState
from ..runtime.sync import forget_compiled, sync_site_hooks
from ..structure.paths import SITE
from ..structure.tracing.row_layout import SeenRows
from .activate import apply, check_plans
from .build import BuiltModule

__all__ = ["attach", "check_free", "detach", "drop_modules", "insert_modules", "refresh", "state_of"]


def attach(
    model: nn.Module,
    name: str,
    config: Config | FusionConfig,
    modules: Sequence[BuiltModule],
    layouts: SeenRows | None = None,
) -> None:
    """Put an adapter's (or a fusion's) modules into the model: the last step, after which nothing can fail.

    Args:
        layouts: What `seen_layouts` says of the model, if it was asked.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        CompatibilityError: two parts of the model were wrapped apart; or what was seen of it now refutes what is active.
    """
    check_free(model, name)
    state = state_of(model)
    with ACTIVATION_LOCK:
        before, state.layouts = state.layouts, state.layouts if layouts is None else layouts
        try:
            # What is active was checked against what was seen before; its rows may turn out to lie elsewhere.
            for composition in state.activation.scheduled if state.layouts is not before else ():
                check_plans(model, state, composition)
        except AdapterKitError:
            state.layouts = before
            raise
        # Only now: where `add` fails, a model that was never wrapped keeps no trace of it.
        model.__dict__[STATE] = state
        # On a frozen base only what the user opens trains: a new adapter must not join the one in training.
        insert_modules(model, state, name, config, modules, trains=state.frozen is None)


def insert_modules(
    model: nn.Module,
    state: ModelState,
    name: str,
    config: Config | FusionConfig,
    modules: Sequence[BuiltModule],
    *,
    trains: bool,
) -> None:
    """Put modules of an adapter into the model, after those that it has."""
    for built in modules:
        host = model.get_submodule(built.path)
        site = host._modules.get(SITE)
        if not isinstance(site, AdapterSite):
            site = host._modules[SITE] = AdapterSite(state, built.path)
            site.train(host.training)  # a new module is in training mode, whatever its host is in
        spec = built.spec
        reads_more = isinstance(spec, SiteSpec) and (spec.residual is not None or acting_at(spec.at).reads_forward)
        handover = Handover[Any]() if reads_more else None
        open_parameters(built.module.train(host.training), trains=trains)
        site.insert(name, built.module, config, spec, handover)
    # A path for each module, so that a host with two of them is there twice.
    state.hosts[name] = (*state.hosts.get(name, ()), *(built.path for built in modules))
    refresh(model, state)


def drop_modules(model: nn.Module, name: str, path: str, keys: Container[str] | None = None) -> None:
    """Remove an adapter's modules from a host, or those with these keys; remove the site and its hooks if it is empty."""
    host = model.get_submodule(path)
    site: Any = host._modules[SITE]
    if name in site.entries:
        site.discard(name, keys)
    if not site.entries:
        # Here, since `sync_site_hooks` goes from site to site, and would not come by this host again.
        for kind in (kind for acting in ACTING for kind in (acting.before, acting.after) if kind is not None):
            remove_hooks(host, kind)
        del host._modules[SITE]


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter's modules out of the model, with the hooks that no other adapter needs.

    Raises:
        ActivationError: another thread is running the model with it.
    """
    state = state_of(model)
    with ACTIVATION_LOCK:
        state.activation.forget(name)  # first: it raises where another thread runs the adapter
        state.hosts.pop(name, None)
        for path, _, _ in list(sites_of(model)):
            drop_modules(model, name, path)
        refresh(model, state)


def check_free(model: nn.Module, name: str) -> None:
    """Raise unless an adapter of this name can be added: AdapterNameError, ConfigError if the model is distributed."""
    check_unsharded(model)
    if check_name(name) in adapter_names(model):
        raise AdapterNameError(f"the model already has an adapter {name!r}; remove it first, or choose another name")


def state_of(model: nn.Module) -> ModelState:
    """Return the model's state, or a new one that is not in the model yet.

    Raises:
        CompatibilityError: parts of the model were wrapped apart, so that two states claim it.
    """
    state, modules = find_state(model) or ModelState(), dict(model.named_modules())
    apart = [path for path, _, site in sites_among(modules) if site.state is not state]
    # A state belongs on the root, whose path is "". One further down is of a part that was wrapped alone.
    apart += [path for path, module in modules.items() if path and STATE in module.__dict__]
    if apart:
        raise CompatibilityError(
            f"parts of {type(model).__name__} were wrapped on their own ({apart[0]!r} among them); unwrap them, then "
            "wrap the whole model once"
        )
    return state


def refresh(model: nn.Module, state: ModelState) -> None:
    """Bring hooks and steps in line with the sites, after these have changed."""
    sync_site_hooks(model, state)
    sync_labels_hooks(model, state)
    forget_compiled()
    apply(model, state)


def check_unsharded(model: nn.Module) -> None:
    """Raise where adapters would run but not be synchronised.

    Raises:
        ConfigError: the model is inside a distributed wrapper already.
    """
    kinds = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    for path, module in model.named_modules():
        # All bases: `fully_shard` gives a module a new class of its own, with FSDPModule among its bases.
        found = kinds & {base.__name__ for base in type(module).__mro__}
        if found:
            raise ConfigError(
                f"{path or 'the model'} is already wrapped in {found.pop()}, which would not synchronise the adapters; "
                "add adapters first, then distribute the model"
            )
