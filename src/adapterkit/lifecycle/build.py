"""The modules of an adapter and its heads, built for their places, not yet in the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config.settings import AdapterConfig
from ..config.union import Config, members
from ..errors import TargetError
from ..heads.config import OwnHead
from ..heads.find import FoundHead, build_heads
from ..heads.spec import HeadSpec
from ..methods import method_of
from ..methods.method import SharesTensors
from ..nn.twin import TiedModule
from ..placement.layers import settings_site
from ..placement.spec import SiteSpec
from ..structure.base_tensors import base_tensors, parameter_at
from ..structure.paths import ancestors
from ..structure.tracing.forward import outside_inference_mode

__all__ = ["BuiltModule", "build_head_modules", "build_modules", "device_near", "dtype_at", "tied_groups"]


@dataclass(frozen=True)
class BuiltModule:
    """One module of an adapter, and where it goes: to a site, or to the host of a head."""

    path: str
    module: nn.Module
    spec: SiteSpec | HeadSpec


@outside_inference_mode()
def build_modules(
    model: nn.Module, config: Config, sites: Sequence[SiteSpec], heads: Sequence[FoundHead], *, meta: bool = False
) -> list[BuiltModule]:
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
    return parts + build_head_modules(model, heads, meta=meta)


@outside_inference_mode()
def build_head_modules(model: nn.Module, heads: Sequence[FoundHead], *, meta: bool = False) -> list[BuiltModule]:
    """The modules of these heads, not yet attached: on their hosts' devices, but for copies, which lie where the host does.

    Args:
        meta: Build what is new without memory or values, for a file to fill.
    """
    dtype = dtype_at(model, "", None)
    parts = []
    for head, module in zip(heads, build_heads(model, heads, dtype, meta=meta), strict=True):
        if not meta and not isinstance(head.spec.config, OwnHead):
            module.to(device_near(model, head.path))
        parts.append(BuiltModule(head.path, module, head.spec))
    return parts


def _check_order(parts: Sequence[BuiltModule]) -> None:
    """Raise TargetError where a module that needs what the host itself returned would get it from another module."""
    hosts: dict[str, SiteSpec] = {}
    for part in parts:
        if not isinstance(part.spec, SiteSpec) or part.spec.at != "output":
            continue
        before = hosts.setdefault(part.path, part.spec)
        if before is not part.spec and getattr(part.module, "reads_bare_output", False):
            raise TargetError(
                f"{part.path!r} is adapted by members {before.member} and {part.spec.member} of a union, and the latter "
                f"({type(part.module).__name__}) must come first there; change their order"
            )


def _build(model: nn.Module, config: AdapterConfig, sites: Sequence[SiteSpec]) -> list[BuiltModule]:
    """The modules of one config, with what they share reachable from each.

    What several sites share is held by the first in the model alone, so that it trains, moves and is saved once; the
    sites of a file are in the model's order, those of a config need not be.
    """
    method = method_of(config)
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    dtypes = {id(site): dtype_at(model, site.path, config.dtype) for site in sites}
    shared = (
        method.shared(config, sites, dtype=dtypes[id(sites[0])]) if isinstance(method, SharesTensors) and sites else None
    )
    built: dict[int, nn.Module] = {}
    for tied in tied_groups(model, sites):
        site, first = settings_site(config, tied), min(tied, key=lambda site: order[site.path])
        module = method.build(config, site, host=model.get_submodule(site.path), dtype=dtypes[id(first)])
        if site.parameters and not hasattr(module, "adapted"):
            raise TargetError(
                f"the method {config.method!r} changes what a layer takes or returns, and none returns what {site.path!r} "
                f"computes with {site.parameters[0]!r}; leave it out, or choose one that changes weights, such as 'lora'"
            )
        built |= {id(site): module if site is first else TiedModule(module) for site in tied}
    parts = [BuiltModule(site.path, built[id(site)], site) for site in sites]
    if shared is not None:
        holding = [part for part in parts if not isinstance(part.module, TiedModule)]
        owner = min(holding, key=lambda part: order[part.path])
        for part in holding:
            (part.module._modules if part is owner else part.module.__dict__)["shared"] = shared
    return parts


def tied_groups(model: nn.Module, sites: Sequence[SiteSpec]) -> list[list[SiteSpec]]:
    """The sites, those at the same Parameter together."""
    groups: dict[object, list[SiteSpec]] = {}
    for site in sites:
        parameter = parameter_at(model.get_submodule(site.path), site.parameters[0]) if site.parameters else None
        groups.setdefault(site if parameter is None else (id(parameter), site.tag, site.slices), []).append(site)
    return list(groups.values())


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
