"""Bottleneck adapters as a method: from config and site to module."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.bottleneck import AnyBottleneckConfig, BottleneckConfig
from ..errors import ConfigError
from ..layers import setting_at
from ..modules.bottleneck import BottleneckAdapter, BottleneckOptions
from ..sites import SiteSpec
from ..spots import Placement

__all__ = ["Bottleneck", "bottleneck_options", "bottleneck_placement", "bottleneck_size"]

_PFEIFFER = {"targets": ("@block.last",), "at": "sum"}
_HOULSBY = {"targets": ("@sublayer.out",), "non_linearity": "swish"}
# He et al. 2022; reads the residual stream, as the adapters library does.
_BESIDE = {"targets": ("@block.last",), "placement": "parallel", "residual": "@stream"}
_PARALLEL = {**_BESIDE, "reduction_factor": 2, "scaling": 4.0}


class Bottleneck:
    """Houlsby, Pfeiffer and parallel adapters, and all between."""

    name = "bottleneck"
    config_type = BottleneckConfig

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pfeiffer": _PFEIFFER,
        "seq_bn": _PFEIFFER,
        "houlsby": _HOULSBY,
        "double_seq_bn": _HOULSBY,
        "parallel": _PARALLEL,
        "par_bn": _PARALLEL,
        "scaled_parallel": {**_PARALLEL, "scaling": "learned"},
        "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
        "adapter_plus": {
            "targets": ("@block.last",),
            "at": "normalised",
            "reduction_factor": 96,
            "non_linearity": "gelu",
            "scaling": "channel",
            "stochastic_depth": 0.1,
            "init": "houlsby",
        },
    }

    def placements(self, config: BottleneckConfig) -> tuple[Placement, ...]:
        """One, of `at`, `placement` and `residual`."""
        return (bottleneck_placement(config),)

    def build(self, config: BottleneckConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> BottleneckAdapter:
        """A bottleneck of the site's width."""
        size, options = bottleneck_size(config, site), bottleneck_options(config, site)
        return BottleneckAdapter(site.width, size, init=config.init, dtype=dtype, **options)


def bottleneck_size(config: AnyBottleneckConfig, site: SiteSpec) -> int:
    """The inner width at a site: as given, or the width there divided by the reduction factor, at least 1."""
    size = setting_at(config.bottleneck_size, site)
    if size is not None:
        return int(size)
    factor = setting_at(config.reduction_factor, site) or config.default_reduction_factor
    if site.width / factor >= 2**31:
        raise ConfigError(
            f"reduction_factor={factor} makes a bottleneck of {site.width / factor:.3g} features at {site.path!r}"
        )
    return max(1, int(site.width // factor))


def bottleneck_options(config: AnyBottleneckConfig, site: SiteSpec) -> BottleneckOptions:
    """The settings that every bottleneck has, as its module takes them."""
    return {
        "input_size": site.input_width,
        "non_linearity": config.non_linearity,
        "norm_before": config.layer_norm_before,
        "norm_after": config.layer_norm_after,
        "residual_before_norm": config.residual_before_layer_norm,
        "scaling": config.scaling,
        "gating": config.gating,
        "dropout": config.dropout,
        "stochastic_depth": config.stochastic_depth,
        "batch_axis": config.batch_axis or 0,
    }


def bottleneck_placement(config: AnyBottleneckConfig) -> Placement:
    """Translate `at`, `placement` and `residual`."""
    if config.at == "renormalised":
        return Placement(at="input", reads="norm")
    if config.placement == "parallel":
        return Placement(reads="residual" if config.residual is not None else "input", residual=config.residual)
    if config.at in ("sum", "normalised"):
        return Placement(at=config.at)
    return Placement(at=config.at, reads="site" if config.residual is None else "sum", residual=config.residual)
