"""IA3 as a method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..config.ia3 import IA3Config
from ..errors import TargetError
from ..modules import scaling
from ..sites import SiteSpec
from ..spots import Placement
from ..weights import projection_at

__all__ = ["IA3"]


class IA3:
    """Trained scales of activations."""

    name = "ia3"
    config_type = IA3Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ia3": {}}
    neutral = 1.0

    def placements(self, config: IA3Config) -> tuple[Placement, ...]:
        """On the output of targets, and on the input of feed-forward targets."""
        outputs = Placement(level="projection", tag="output")
        # Whoever names targets need not have a transformer: then the default finds no feed-forward, and that is no error.
        inputs = Placement(
            at="input",
            level="projection",
            targets=tuple(config.feedforward_targets),
            is_optional=config.names_targets_alone,
            tag="input",
        )
        return (outputs,) * bool(config.targets) + (inputs,) * bool(config.feedforward_targets)

    def build(self, config: IA3Config, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> scaling.IA3:
        """A vector of the site's width, or of that of the parts."""
        if site.parameters:
            raise TargetError(
                f"IA3 scales what {site.path!r} computes from {site.parameters[0]!r} and a bias inside itself, where "
                "no hook reaches it; use LoRA there, or target the feed-forward alone"
            )
        scales: Literal["output", "input"] = "input" if site.at == "input" else "output"
        return scaling.IA3(site.width, scales=scales, projection=projection_at(site, host), parts=site.parts, dtype=dtype)
