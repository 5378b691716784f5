"""LoRA and DoRA as a method: from config and site to module."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.lora import LoRAConfig
from ..host_weight import base_weight, check_multiplies
from ..layers import setting_at
from ..modules.dora import DoRA, magnitude_of
from ..modules.lora import LoRA as LoRAModule
from ..sites import SiteSpec
from ..spots import Placement
from ..weights import projection_at

__all__ = ["LoRA"]


class LoRA:
    """Low-rank changes of weights, plain, rank-stabilised and weight-decomposed."""

    name = "lora"
    config_type = LoRAConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lora": {}, "dora": {"use_dora": True}}

    def placements(self, config: LoRAConfig) -> tuple[Placement, ...]:
        """At the targets' weights."""
        return (Placement(level="projection", reads="input"),)

    def build(self, config: LoRAConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A pair of factors in the geometry of the host's weight."""
        projection, rank = projection_at(site, host), setting_at(config.rank, site)
        both: dict[str, Any] = {
            "scaling": setting_at(config.alpha, site) / (math.sqrt(rank) if config.use_rslora else rank),
            "dropout": config.dropout,
            "init": config.init,
            "parts": site.parts,
            "dtype": dtype,
        }
        if config.use_dora:
            weight = base_weight(site, host)
            check_multiplies(site, host, projection)
            magnitude = None if weight.is_meta else magnitude_of(projection, weight.to(dtype), parts=site.parts)
            return DoRA(projection, rank, magnitude=magnitude, **both)
        both |= {"bias": config.bias, "gating": config.gating, "batch_axis": config.batch_axis}
        return LoRAModule(projection, rank, **both)
