"""Invertible adapters as a method: one coupling, behind the embedding and, undone, before the output embedding."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..config.invertible import InvertibleConfig
from ..errors import TargetError
from ..modules.invertible import Coupling, InvertibleAdapter
from ..patterns import is_role
from ..sites import SiteSpec
from ..spots import Placement

__all__ = ["Invertible"]


class Invertible:
    """NICE and GLOW couplings of an embedding's features."""

    name = "invertible"
    config_type = InvertibleConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"invertible": {}}

    def placements(self, config: InvertibleConfig) -> tuple[Placement, ...]:
        """Behind the embedding, and before the output embedding, which a model need not have."""
        forward, targets = Placement(tag="forward"), tuple(config.output_targets)
        if not targets:
            return (forward,)
        return forward, Placement(at="input", targets=targets, is_optional=all(map(is_role, targets)), tag="inverse")

    def shared(self, config: InvertibleConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> Coupling:
        """The coupling."""
        widths = {site.width: site.path for site in sites}
        if len(widths) > 1:
            listed = ", ".join(f"{width} at {path!r}" for width, path in widths.items())
            raise TargetError(
                f"an invertible adapter needs one width at all of its places; found {listed}. Name them by targets= and "
                "output_targets=, or leave some out with exclude="
            )
        return Coupling(
            sites[0].width,
            block=config.block,
            reduction_factor=config.reduction_factor,
            non_linearity=config.non_linearity,
            dtype=dtype,
        )

    def build(self, config: InvertibleConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> InvertibleAdapter:
        """The coupling's direction at a site."""
        direction: Literal["forward", "inverse"] = "inverse" if site.tag == "inverse" else "forward"
        return InvertibleAdapter(direction, is_undone=bool(config.output_targets))
