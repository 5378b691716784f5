"""Compacter and Compacter++ as a method: from config and site to module."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.compacter import CompacterConfig
from ..errors import ConfigError
from ..modules.compacter import CompacterAdapter, SharedFactors
from ..sites import SiteSpec
from ..spots import Placement
from .bottleneck import bottleneck_options, bottleneck_placement, bottleneck_size

__all__ = ["Compacter"]


class Compacter:
    """Bottlenecks made of small factors, most of them shared."""

    name = "compacter"
    config_type = CompacterConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "compacter": {"targets": ("@sublayer.out",)},
        "compacter++": {"targets": ("@block.last",), "at": "sum"},
    }

    def placements(self, config: CompacterConfig) -> tuple[Placement, ...]:
        """As a bottleneck's."""
        return (bottleneck_placement(config),)

    def shared(self, config: CompacterConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> nn.Module | None:
        """The rule, the factors, or both; None where each site has its own."""
        if not (config.shared_rule or config.shared_factors):
            return None
        return SharedFactors(
            config.phm_dim,
            rule=config.shared_rule,
            sizes=_common_sizes(config, sites) if config.shared_factors else None,
            rank=config.phm_rank,
            init=config.init,
            dtype=dtype,
        )

    def build(self, config: CompacterConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> CompacterAdapter:
        """A Compacter of the site's width."""
        return CompacterAdapter(
            site.width,
            bottleneck_size(config, site),
            phm_dim=config.phm_dim,
            rank=config.phm_rank,
            shared_rule=config.shared_rule,
            shared_factors=config.shared_factors,
            init=config.init,
            dtype=dtype,
            **bottleneck_options(config, site),
        )


def _common_sizes(config: CompacterConfig, sites: Sequence[SiteSpec]) -> tuple[int, int, int]:
    """(input, bottleneck, output) of every site, which must be the same ones."""
    found = {(site.input_width, bottleneck_size(config, site), site.width): site.path for site in sites}
    if len(found) > 1:
        listed = ", ".join(f"{' -> '.join(map(str, sizes))} at {path!r}" for sizes, path in list(found.items())[:3])
        raise ConfigError(
            f"shared_factors=True needs the same widths at every site; found {listed}. Leave out sites with exclude=, or "
            "share the rule alone (shared_factors=False)"
        )
    return next(iter(found))
