"""The modules of an adapter and its heads, built for their places, not yet in the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config.fusion import FusionConfig
from ..config.settings import AdapterConfig
from ..config.union import Config, members
from ..errors import ConfigError, TargetError
from ..heads.config import OwnHead
from ..heads.find import FoundHead, build_heads
from ..heads.spec import HeadSpec
from ..methods import method_of
from ..methods.method import AdaptsParameter, SharesTensors
from ..nn.fusion import Fusion
from ..nn.seeded import seeded
from ..nn.shared import share
from ..nn.traits import reads_bare_output
from ..nn.twin import TiedModule
from ..placement.layers import settings_site
from ..placement.spec import SiteSpec
from ..structure.base_tensors import base_tensors, parameter_at
from ..structure.paths import ancestors
from ..structure.tracing.forward import outside_inference_mode

__all__ = [
    "BuiltModule",
    "build_fusion_modules",
    "build_head_modules",
    "build_modules",
    "device_near",
    "dtype_at",
    "tied_groups",
]


@dataclass(frozen=True)
class BuiltModule:
    """One module of an adapter, and where it goes: to a site, or to the host of a head."""

    path: str
    module: nn.Module
    spec: SiteSpec | HeadSpec


@outside_inference_mode()
def build_modules(model: nn.Module, config: Config, sites: Sequence[SiteSpec], *, meta: bool = False) -> list[BuiltModule]:
    """Build the modules of these sites, on their hosts' devices, not yet attached.

    Args:
        meta: Build them without memory or values, for a file to fill.
    """
    built = []
    for index, member in enumerate(members(config)):
        # Each member apart: one with a seed starts the same, whatever other members a union has.
        with seeded(member.seed, meta=meta):
            built += _build(model, member, [site for site in sites if site.member == index])
    _check_order(built)
    return built if meta else _near_hosts(model, built)


@outside_inference_mode()
def build_fusion_modules(
    model: nn.Module, config: FusionConfig, sites: Sequence[SiteSpec], *, meta: bool = False
) -> list[BuiltModule]:
    """Build the modules of a fusion, one for each of its sites, on their hosts' devices, not yet attached.

    Args:
        meta: Build them without memory or values, for a file to fill.

    Raises:
        ConfigError: without a projection, the queries do not fit the keys.
    """
    with seeded(config.seed, meta=meta):
        built = [BuiltModule(site.path, _build_fusion(model, site, config), site) for site in sites]
    return built if meta else _near_hosts(model, built)


def _near_hosts(model: nn.Module, built: list[BuiltModule]) -> list[BuiltModule]:
    """Move each module to where its host computes."""
    for one in built:
        # Moved, not made there: a seed gives the same values on every device, since all are drawn on the CPU.
        one.module.to(device_near(model, one.path))
    return built


@outside_inference_mode()
def build_head_modules(model: nn.Module, heads: Sequence[FoundHead], *, meta: bool = False) -> list[BuiltModule]:
    """Build the modules of these heads, not yet attached.

    New ones lie where their hosts compute. Copies of the model's own lie where the host does.

    Args:
        meta: Build what is new without memory or values, for a file to fill.
    """
    dtype = dtype_at(model, "", None)
    built = []
    for head, module in zip(heads, build_heads(model, heads, dtype, meta=meta), strict=True):
        if not meta and not isinstance(head.spec.config, OwnHead):
            module.to(device_near(model, head.path))
        built.append(BuiltModule(head.path, module, head.spec))
    return built


def _check_order(built: Sequence[BuiltModule]) -> None:
    """Raise TargetError where a module that needs what the host itself returned would get what another has changed."""
    hosts: dict[str, SiteSpec] = {}
    for one in built:
        if not isinstance(one.spec, SiteSpec) or one.spec.at != "output":
            continue
        before = hosts.setdefault(one.path, one.spec)
        if before is not one.spec and reads_bare_output(one.module):
            raise TargetError(
                f"{one.path!r} is adapted by members {before.member} and {one.spec.member} of a union, and the latter "
                f"({type(one.module).__name__}) must come first there; change their order"
            )


def _build(model: nn.Module, config: AdapterConfig, sites: Sequence[SiteSpec]) -> list[BuiltModule]:
    """Build the modules of one config, with what they share reachable from each.

    What several sites share is held by the first in the model alone, so that it trains, moves and is saved once. The
    sites of a file are in the model's order; those of a config need not be.
    """
    method = method_of(config)
    # By every path of a shared module: a site may go by any of them.
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    dtypes = {site.path: dtype_at(model, site.path, config.dtype) for site in sites}
    # First, so that a seed gives the same shared tensors however many sites there are.
    shared = None
    if isinstance(method, SharesTensors) and sites:
        shared = method.shared(config, sites, dtype=dtypes[sites[0].path])
    built: dict[int, nn.Module] = {}  # by the `id` of the site: two sites of one adapter may be equal
    for tied in tied_groups(model, sites):
        first = min(tied, key=lambda site: order[site.path])
        module = _build_tied(model, config, tied, dtype=dtypes[first.path])
        built |= {id(site): module if site is first else TiedModule(module) for site in tied}
    modules = [BuiltModule(site.path, built[id(site)], site) for site in sites]
    if shared is not None:
        # A TiedModule has no tensors, and calls the module that it stands for: it needs to borrow nothing.
        holding = [one for one in modules if not isinstance(one.module, TiedModule)]
        owner = min(holding, key=lambda one: order[one.path]).module
        share(shared, [one.module for one in holding], owner=owner)
    return modules


def _build_tied(model: nn.Module, config: AdapterConfig, tied: Sequence[SiteSpec], *, dtype: torch.dtype) -> nn.Module:
    """Build the one module that serves all sites of a tied Parameter, or the one site of another.

    Raises:
        TargetError: the site is a Parameter, and the method's modules change no Parameters.
    """
    site = settings_site(config, tied)
    module = method_of(config).build(config, site, host=model.get_submodule(site.path), dtype=dtype)
    if site.parameters and not isinstance(module, AdaptsParameter):
        raise TargetError(
            f"the method {config.method!r} changes what a layer takes or returns, and none returns what {site.path!r} "
            f"computes with {site.parameters[0]!r}; leave it out, or choose one that changes weights, such as 'lora'"
        )
    return module


def _build_fusion(model: nn.Module, spec: SiteSpec, config: FusionConfig) -> Fusion:
    """Build the module of a fusion at one site."""
    if not config.query and spec.input_width != spec.width:
        raise ConfigError(
            f"query=False compares what is read at {spec.path!r}, of {spec.input_width} features, with what is added, of "
            f"{spec.width}; leave query=True, or give query_reads='site'"
        )
    return Fusion(
        spec.width,
        query_size=spec.input_width,
        query=config.query,
        key=config.key,
        value=config.value,
        value_init=config.value_init,
        residual_before=config.residual_before,
        temperature=config.temperature,
        dropout=config.dropout,
        dtype=dtype_at(model, spec.path, config.dtype),
    )


def tied_groups(model: nn.Module, sites: Sequence[SiteSpec]) -> list[list[SiteSpec]]:
    """Group the sites: those at one tied Parameter together, every other one alone."""
    groups: dict[object, list[SiteSpec]] = {}
    for site in sites:
        parameter = parameter_at(model.get_submodule(site.path), site.parameters[0]) if site.parameters else None
        # A tied weight is one Parameter under two names, so its `id` groups them. Tag and slices tell several modules at
        # one Parameter apart: each has its own counterpart under the other name.
        groups.setdefault(site if parameter is None else (id(parameter), site.tag, site.slices), []).append(site)
    return list(groups.values())


def parameter_near(model: nn.Module, path: str) -> torch.Tensor:
    """Return a floating-point tensor of the host, or of the innermost module around it that has one."""
    for around in ancestors(path):
        for _, tensor in base_tensors(model.get_submodule(around)):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)  # a model without tensors: torch's default device and dtype


def device_near(model: nn.Module, path: str) -> torch.device:
    """Return the device on which the host computes: that of its parameters, or where accelerate moves them to."""
    for around in ancestors(path):
        # accelerate may keep weights on the meta device, and bring them to this one for each forward.
        device = getattr(getattr(model.get_submodule(around), "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.empty(0, device=device).device  # it may be an index, such as 0
    return parameter_near(model, path).device


def dtype_at(model: nn.Module, path: str, given: str | None) -> torch.dtype:
    """Return the dtype of new modules at a host: the given one, else float32, or float64 on a float64 host.

    It is float32 on half-precision and quantised hosts, too: what trains needs more bits than what rests.
    """
    if given is not None:
        return getattr(torch, given)  # type: ignore[no-any-return]  # one of `DType`
    return torch.float64 if parameter_near(model, path).dtype == torch.float64 else torch.float32
