"""VeRA as a method."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.vera import VeRAConfig
from ..modules.vera import VeRA as VeRAModule
from ..modules.vera import VeRABases
from ..ops.parts import PartsLayout
from ..sites import SiteSpec
from ..spots import Placement
from ..weights import projection_at

__all__ = ["VeRA"]


class VeRA:
    """Trained vectors between random matrices."""

    name = "vera"
    config_type = VeRAConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vera": {}}

    def placements(self, config: VeRAConfig) -> tuple[Placement, ...]:
        """At the targets' weights."""
        return (Placement(level="projection", reads="input"),)

    def shared(self, config: VeRAConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> VeRABases:
        """Matrices as large as the largest site."""
        most_in = max(site.input_width for site in sites)
        most_out = max(max(PartsLayout(site.width, site.parts).sizes() or [site.width]) for site in sites)
        return VeRABases(config.rank, most_in, most_out, dtype=dtype)

    def build(self, config: VeRAConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> VeRAModule:
        """The vectors of one site."""
        projection = projection_at(site, host)
        return VeRAModule(
            projection, config.rank, initial=config.initial, dropout=config.dropout, parts=site.parts, dtype=dtype
        )
