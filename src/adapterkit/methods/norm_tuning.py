"""Norm tuning as a method."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.norm_tuning import NormTuningConfig
from ..hosts import is_norm
from ..modules.parameter_delta import ParameterDelta
from ..sites import SiteSpec
from ..spots import Placement

__all__ = ["NormTuning"]


class NormTuning:
    """Trained weights and biases of norms."""

    name = "norm_tuning"
    config_type = NormTuningConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"norm_tuning": {}}
    neutral = 0.0

    def placements(self, config: NormTuningConfig) -> tuple[Placement, ...]:
        """At the Parameters of the targets that are norms."""
        return (Placement(level="parameter", accepts=is_norm_parameter),)

    def build(self, config: NormTuningConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> ParameterDelta:
        """A change for one Parameter."""
        return ParameterDelta(host.get_parameter(site.parameters[0]).shape, dtype=dtype)


def is_norm_parameter(owner: nn.Module, _name: str, _parameter: nn.Parameter) -> bool:
    """Whether a Parameter is a norm's."""
    return is_norm(owner)
