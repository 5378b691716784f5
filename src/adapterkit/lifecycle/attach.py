"""Add adapters to a model and remove them: all or nothing."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..composition.names import check_name
from ..config.fusion import FusionConfig
from ..config.union import Config
from ..errors import AdapterKitError, AdapterNameError, CompatibilityError, ConfigError
from ..heads.hook import sync_labels_hooks
from ..runtime.handover import Handover
from ..runtime.hooks import InputHook, OutputHook, WeightEndHook, WeightHook, set_hook
from ..runtime.lookup import adapter_names, open_parameters, record_of, sites_among, sites_of
from ..runtime.site import AdapterSite
from ..runtime.state import ACTIVATION_LOCK, RECORD, Record
from ..runtime.sync import forget_compiled, sync_site_hooks
from ..structure.paths import SITE
from ..structure.tracing.row_layout import Layouts
from .activate import apply, check_plans
from .build import Part

__all__ = ["attach", "check_free", "detach", "drop_modules", "insert_modules", "refresh", "shared_record"]


def attach(
    model: nn.Module,
    name: str,
    config: Config | FusionConfig,
    parts: Sequence[Part],
    layouts: Mapping[str, Layouts] | None = None,
) -> None:
    """Put an adapter's (or a fusion's) modules into the model: the last step, after which nothing can fail.

    Args:
        layouts: What `seen_layouts` says of the model, if it was asked.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        CompatibilityError: two parts of the model were wrapped apart; or what was seen of it now refutes what is active.
    """
    check_free(model, name)
    record = shared_record(model)
    with ACTIVATION_LOCK:
        before, record.layouts = record.layouts, record.layouts if layouts is None else layouts
        try:
            for composition in record.activation.held if record.layouts is not before else ():
                check_plans(model, record, composition)
        except AdapterKitError:
            record.layouts = before
            raise
        model.__dict__[RECORD] = record
        insert_modules(model, record, name, config, parts, trains=record.frozen is None)


def insert_modules(
    model: nn.Module,
    record: Record,
    name: str,
    config: Config | FusionConfig,
    parts: Sequence[Part],
    *,
    trains: bool,
) -> None:
    """Put modules of an adapter into the model, after those that it has."""
    for part in parts:
        host = model.get_submodule(part.path)
        site = host._modules.get(SITE)
        if not isinstance(site, AdapterSite):
            site = host._modules[SITE] = AdapterSite(record, part.path)
            site.train(host.training)
        handover = Handover[Tensor]() if part.spec is not None and part.spec.residual is not None else None
        open_parameters(part.module.train(host.training), trains)
        site.insert(name, part.module, config, part.spec, handover, part.head)
    record.hosts[name] = (*record.hosts.get(name, ()), *(part.path for part in parts))
    refresh(model, record)


def drop_modules(model: nn.Module, record: Record, name: str, path: str, keys: Container[str] | None = None) -> None:
    """Let go of an adapter's modules at a host, or of those with these keys; of the site and its hooks, if it is empty."""
    host = model.get_submodule(path)
    site: Any = host._modules[SITE]
    if name in site.entries:
        site.discard(name, keys)
    if not site.entries:
        for kind in (OutputHook, InputHook, WeightHook, WeightEndHook):
            set_hook(host, kind, False, record)
        del host._modules[SITE]


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter's modules out of the model, with the hooks that no other adapter needs.

    Raises:
        ActivationError: another thread is running the model with it.
    """
    record = shared_record(model)
    with ACTIVATION_LOCK:
        record.activation.forget(name)
        record.hosts.pop(name, None)
        for path, _, _ in list(sites_of(model)):
            drop_modules(model, record, name, path)
        refresh(model, record)


def check_free(model: nn.Module, name: str) -> None:
    """Raise unless an adapter of this name can be added: AdapterNameError, ConfigError if the model is distributed."""
    check_unsharded(model)
    if check_name(name) in adapter_names(model):
        raise AdapterNameError(f"the model already has an adapter {name!r}; remove it first, or choose another name")


def shared_record(model: nn.Module) -> Record:
    """The model's record, or a new one that is not in the model yet.

    Raises:
        CompatibilityError: parts of the model were wrapped apart, so that two records claim it.
    """
    record, modules = record_of(model) or Record(), dict(model.named_modules())
    apart = [path for path, _, site in sites_among(modules) if site.record is not record]
    apart += [path for path, module in modules.items() if path and RECORD in module.__dict__]
    if apart:
        raise CompatibilityError(
            f"parts of {type(model).__name__} were wrapped on their own ({apart[0]!r} among them); unwrap them, then "
            "wrap the whole model once"
        )
    return record


def refresh(model: nn.Module, record: Record) -> None:
    """Bring hooks and steps in line with the sites."""
    sync_site_hooks(model, record)
    sync_labels_hooks(model, record)
    forget_compiled()
    apply(model, record)


def check_unsharded(model: nn.Module) -> None:
    """Raise where adapters would run but not be synchronised.

    Raises:
        ConfigError: the model is inside a distributed wrapper already.
    """
    kinds = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    for path, module in model.named_modules():
        found = kinds & {base.__name__ for base in type(module).__mro__}
        if found:
            raise ConfigError(
                f"{path or 'the model'} is already wrapped in {found.pop()}, which would not synchronise the adapters; "
                "add adapters first, then distribute the model"
            )
