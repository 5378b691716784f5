"""Add adapters to a model and remove them: all or nothing."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import base_tensors
from .composition import names_in
from .config.base import AdapterConfig
from .config.fusion import FusionConfig
from .config.heads import OwnHead
from .config.union import Config, Union, members
from .errors import (
    ActivationError,
    AdapterKitError,
    AdapterNameError,
    CompatibilityError,
    ConfigError,
    TargetError,
)
from .heads.find import FoundHead, Heads, build_heads, check_apart, check_names, find_heads
from .hooks import InputHook, OutputHook, WeightEndHook, WeightHook, forget_compiled, set_hook, sync_site_hooks
from .layers import check_maps, settings_site
from .merging import unmerge
from .methods import method_of
from .methods.base import Sharing
from .modules.twin import Twin
from .names import check_name
from .patterns import SITE, ancestors, match
from .placement import resolve
from .plan import apply, check_plans
from .record import ACTIVATION_LOCK, RECORD, Handover, Record, silenced
from .sites import (
    AdapterSite,
    HeadSpec,
    SiteSpec,
    adapter_names,
    fusions_of,
    named_parameters,
    open_parameters,
    parameter_at,
    record_of,
    sites_among,
    sites_of,
)
from .spots import asks_for_structure
from .structure.trace import ExampleInputs, outside_inference_mode

__all__ = [
    "Part",
    "add",
    "add_heads",
    "attach",
    "build_parts",
    "check_free",
    "detach",
    "device_near",
    "dtype_at",
    "find_sites",
    "head_parts",
    "needs_structure",
    "remove_head",
    "shared_record",
]


@dataclass(frozen=True)
class Part:
    """One module of an adapter, and where it goes: a site, or the host of a head (spec None)."""

    path: str
    module: nn.Module
    spec: SiteSpec | None
    head: HeadSpec | None = None


def add(
    model: nn.Module,
    name: str,
    config: Config,
    heads: Heads = (),
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Add a new adapter, or raise and leave the model as it was. Raises: see `AdapterKit.add`."""
    check_free(model, name)
    sites = find_sites(model, config, example_inputs)
    found = find_heads(model, heads, example_inputs)
    replaced = [head.path for head in found if head.is_in_place]
    if replaced:
        sites = _outside_heads(model, sites, config, replaced)
        check_apart([site.path for site in sites], replaced)
    attach(model, name, _with_paths(model, config), build_parts(model, config, sites, found))


def add_heads(model: nn.Module, name: str, heads: Heads, example_inputs: ExampleInputs | None = None) -> None:
    """Give an adapter more heads, or raise and leave the model as it was. Raises: see `AdapterKit.add_head`."""
    record = shared_record(model)
    if name in record.merged:
        raise ActivationError(f"adapter {name!r} is merged into the weights; call kit.unmerge({name!r}) first")
    found = find_heads(model, heads, example_inputs)
    held = [(path, entry) for path, _, site in sites_of(model) for entry in site.entries.get(name, ())]
    there = [(path, entry.head) for path, entry in held if entry.head is not None]
    replaced = [path for path, head in there if head.above is None] + [head.path for head in found if head.is_in_place]
    check_names([*(head for _, head in there), *(head.spec for head in found)], replaced)
    check_apart([path for path, entry in held if entry.spec is not None], replaced)
    config, trains = held[0][1].config, any(p.requires_grad for _, p in named_parameters(model, name, heads=True))
    parts = head_parts(model, found)
    with ACTIVATION_LOCK:
        hosts = record.hosts.get(name, ())
        try:
            _insert(model, record, name, config, parts, trains=trains)
            for composition in record.activation.held:
                check_plans(model, record, composition)
        except AdapterKitError:  # what is active, now or after a `with` block, cannot choose between heads
            for path, _, site in list(sites_of(model)):
                if path in {part.path for part in parts}:
                    old = {entry.key for where, entry in held if where == path}
                    _drop(model, record, name, path, {entry.key for entry in site.entries[name]} - old)
            record.hosts[name] = hosts
            _refresh(model, record)
            raise


def remove_head(model: nn.Module, name: str, head: str) -> None:
    """Take a head from an adapter. Raises: see `AdapterKit.remove_head`."""
    record = shared_record(model)
    held = [(path, e) for path, _, site in sites_of(model) for e in site.entries.get(name, ()) if e.head is not None]
    path, entry = next(((path, e) for path, e in held if e.head and e.head.config.name == head), (None, None))
    if path is None or entry is None:
        raise AdapterNameError(
            f"adapter {name!r} has no head {head!r}; it has {[e.head.config.name for _, e in held if e.head] or 'none'}"
        )
    if name in record.merged:
        raise ActivationError(f"adapter {name!r} is merged into the weights; call kit.unmerge({name!r}) first")
    with ACTIVATION_LOCK:
        _drop(model, record, name, path, {entry.key})
        hosts = list(record.hosts[name])
        hosts.remove(path)
        record.hosts[name] = tuple(hosts)
        _refresh(model, record)


def _outside_heads(model: nn.Module, sites: Sequence[SiteSpec], config: Config, heads: Sequence[str]) -> list[SiteSpec]:
    """The sites without those in heads that a method named by itself (every bias, say): the copies train whole.

    Without those, too, at a Parameter that is tied to one outside of the heads, which is what is adapted then.
    """
    named = [index for index, member in enumerate(members(config)) if "targets" in member.model_fields_set]
    outside = [site for site in sites if not {*heads} & {*ancestors(site.path)}]
    tied = {site for group in _tied(model, sites) if any(site in outside for site in group) for site in group}
    kept = [site for site in sites if site in outside or (site.member in named and site not in tied)]
    if not kept:
        raise TargetError(f"all {len(sites)} sites of the adapter lie in its heads {list(heads)}, which train whole anyway")
    return kept


def find_sites(model: nn.Module, config: Config, example_inputs: ExampleInputs | None) -> list[SiteSpec]:
    """The sites that a config would adapt. Raises: see `placement.resolve`."""
    with ACTIVATION_LOCK, silenced():
        sites = resolve(model, [(m, method_of(m).placements(m)) for m in members(config)], example_inputs)
    for index, member in enumerate(members(config)):
        check_maps(member, [site for site in sites if site.member == index])
    return sites


def needs_structure(config: Config) -> bool:
    """Whether a config's places depend on what the model computes."""
    return any(asks_for_structure(m, placement) for m in members(config) for placement in method_of(m).placements(m))


@outside_inference_mode()
def build_parts(
    model: nn.Module, config: Config, sites: Sequence[SiteSpec], heads: Sequence[FoundHead], *, meta: bool = False
) -> list[Part]:
    """The modules of these sites and heads, not yet attached.

    Args:
        meta: Build what is new without memory or values, for a file to fill.
    """
    parts = []
    for index, member in enumerate(members(config)):
        with torch.random.fork_rng(devices=[], enabled=member.seed is not None), torch.device("meta" if meta else "cpu"):
            if member.seed is not None:
                torch.manual_seed(member.seed)
            parts += _build(model, member, [site for site in sites if site.member == index])
    _check_order(parts)
    if not meta:
        for part in parts:
            part.module.to(device_near(model, part.path))
    return parts + head_parts(model, heads, meta=meta)


@outside_inference_mode()
def head_parts(model: nn.Module, heads: Sequence[FoundHead], *, meta: bool = False) -> list[Part]:
    """The modules of these heads, not yet attached: on their hosts' devices, but for copies, which lie where the host does.

    Args:
        meta: Build what is new without memory or values, for a file to fill.
    """
    dtype = dtype_at(model, "", None)
    parts = []
    for head, module in zip(heads, build_heads(model, heads, dtype, meta=meta), strict=True):
        if not meta and not isinstance(head.spec.config, OwnHead):
            module.to(device_near(model, head.path))
        parts.append(Part(head.path, module, None, head.spec))
    return parts


def _check_order(parts: Sequence[Part]) -> None:
    """Raise TargetError where a module that needs what the host itself returned would get it from another module."""
    hosts: dict[str, SiteSpec] = {}
    for part in parts:
        if part.spec is None or part.spec.at != "output":
            continue
        before = hosts.setdefault(part.path, part.spec)
        if before is not part.spec and getattr(part.module, "reads_bare_output", False):
            raise TargetError(
                f"{part.path!r} is adapted by members {before.member} and {part.spec.member} of a union, and the latter "
                f"({type(part.module).__name__}) must come first there; change their order"
            )


def _build(model: nn.Module, config: AdapterConfig, sites: Sequence[SiteSpec]) -> list[Part]:
    """The modules of one config, with what they share reachable from each.

    What several sites share is held by the first in the model alone, so that it trains, moves and is saved once; the
    sites of a file are in the model's order, those of a config need not be.
    """
    method = method_of(config)
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    dtypes = {id(site): dtype_at(model, site.path, config.dtype) for site in sites}
    shared = method.shared(config, sites, dtype=dtypes[id(sites[0])]) if isinstance(method, Sharing) and sites else None
    built: dict[int, nn.Module] = {}
    for tied in _tied(model, sites):
        site, first = settings_site(config, tied), min(tied, key=lambda site: order[site.path])
        module = method.build(config, site, host=model.get_submodule(site.path), dtype=dtypes[id(first)])
        if site.parameters and not hasattr(module, "adapted"):
            raise TargetError(
                f"the method {config.method!r} changes what a layer takes or returns, and none returns what {site.path!r} "
                f"computes with {site.parameters[0]!r}; leave it out, or choose one that changes weights, such as 'lora'"
            )
        built |= {id(site): module if site is first else Twin(module) for site in tied}
    parts = [Part(site.path, built[id(site)], site) for site in sites]
    if shared is not None:
        holding = [part for part in parts if not isinstance(part.module, Twin)]
        owner = min(holding, key=lambda part: order[part.path])
        for part in holding:
            (part.module._modules if part is owner else part.module.__dict__)["shared"] = shared
    return parts


def _tied(model: nn.Module, sites: Sequence[SiteSpec]) -> list[list[SiteSpec]]:
    """The sites, those at the same Parameter together."""
    groups: dict[object, list[SiteSpec]] = {}
    for site in sites:
        parameter = parameter_at(model.get_submodule(site.path), site.parameters[0]) if site.parameters else None
        groups.setdefault(site if parameter is None else (id(parameter), site.tag, site.parts), []).append(site)
    return list(groups.values())


def attach(model: nn.Module, name: str, config: Config | FusionConfig, parts: Sequence[Part]) -> None:
    """Put an adapter's (or a fusion's) modules into the model. Nothing can fail from here on but a lack of memory.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        CompatibilityError: two parts of the model were wrapped apart.
    """
    check_free(model, name)
    record = shared_record(model)
    model.__dict__[RECORD] = record
    with ACTIVATION_LOCK:
        _insert(model, record, name, config, parts, trains=record.frozen is None)


def _insert(
    model: nn.Module, record: Record, name: str, config: Config | FusionConfig, parts: Sequence[Part], *, trains: bool
) -> None:
    """Put modules of an adapter into the model, after those that it has."""
    for part in parts:
        host = model.get_submodule(part.path)
        site = host._modules.get(SITE)
        if not isinstance(site, AdapterSite):
            site = host._modules[SITE] = AdapterSite(record, part.path)
            site.train(host.training)
        handover = Handover() if part.spec is not None and part.spec.residual is not None else None
        open_parameters(part.module.train(host.training), trains)
        site.insert(name, part.module, config, part.spec, handover, part.head)
    record.hosts[name] = (*record.hosts.get(name, ()), *(part.path for part in parts))
    _refresh(model, record)


def _drop(model: nn.Module, record: Record, name: str, path: str, keys: Container[str] | None = None) -> None:
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
    """Take an adapter out of the model, hooks and all, where no other adapter needs them; out of the weights, too.

    Raises:
        ActivationError: another thread is running the model with it.
        CompatibilityError: it is merged, and the weights have changed since; or a fusion weighs it.
    """
    record = shared_record(model)
    weighed = [fusion for fusion, fuse in fusions_of(model).items() if name != fusion and name in names_in(fuse)]
    if weighed:
        raise CompatibilityError(
            f"adapter {name!r} is weighed by the fusion {weighed[0]!r}, which cannot run without it; call "
            f"kit.remove({weighed[0]!r}), or kit.prune_fusion, first"
        )
    with ACTIVATION_LOCK:
        if name in record.merged:
            record.activation.check_forgettable(name)
            unmerge(model, record, name)
        record.activation.forget(name)
        record.hosts.pop(name, None)
        for path, _, _ in list(sites_of(model)):
            _drop(model, record, name, path)
        _refresh(model, record)


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


def _refresh(model: nn.Module, record: Record) -> None:
    """Bring hooks and steps in line with the sites."""
    sync_site_hooks(model, record)
    forget_compiled()
    apply(model, record)


def _with_paths(model: nn.Module, config: Config) -> Config:
    """The config with predicates replaced by what they matched, so that it can be saved."""
    if isinstance(config, Union):
        return Union(*(_member_with_paths(model, member) for member in config.configs))
    return _member_with_paths(model, config)


def _member_with_paths(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """`_with_paths` of one config."""

    def paths(targets: Sequence[Any]) -> list[str]:
        return [
            path
            for target in targets
            for path in ([target] if isinstance(target, str) else [f"re:{re.escape(p)}" for p in match(model, [target])])
        ]

    # A method may have lists of targets of its own.
    named = {name: getattr(config, name) for name in type(config).model_fields}
    lists = {name: value for name, value in named.items() if isinstance(value, tuple) and any(map(callable, value))}
    return config.override({name: paths(value) for name, value in lists.items()})


def parameter_near(model: nn.Module, path: str) -> torch.Tensor:
    """A floating-point tensor of the host's, or of the innermost module around it that has one."""
    for around in ancestors(path):
        for _, tensor in base_tensors(model.get_submodule(around)):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)


def device_near(model: nn.Module, path: str) -> torch.device:
    """Where the host computes: where its parameters are or, if accelerate moves them, where it moves them to."""
    for around in ancestors(path):
        device = getattr(getattr(model.get_submodule(around), "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.empty(0, device=device).device
    return parameter_near(model, path).device


def dtype_at(model: nn.Module, path: str, given: str | None) -> torch.dtype:
    """As given, else float32, on half-precision and quantised hosts as well; float64 on a float64 host."""
    if given is not None:
        return getattr(torch, given)  # type: ignore[no-any-return]  # one of `DType`
    return torch.float64 if parameter_near(model, path).dtype == torch.float64 else torch.float32


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
