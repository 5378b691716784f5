"""Norm tuning as a method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import AdapterConfig, Targets
from ..nn.parameter_delta import ParameterDelta
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..structure.hosts import is_norm

__all__ = ["NormTuning", "NormTuningConfig"]


class NormTuningConfig(AdapterConfig):
    """Train the weights and biases of norms: a trained change, zero at first, is added to each.

    Targets are norms or their Parameters; by default every norm of the model.

    Every setting: see `AdapterConfig`.

    Reference: Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models",
    arXiv:2211.08682; Zhao et al. 2024, arXiv:2312.11420.
    """

    method: Literal["norm_tuning"] = "norm_tuning"
    targets: Targets = Field(default=("**",), min_length=1)


class NormTuning:
    """Trained weights and biases of norms."""

    name = "norm_tuning"
    config_type = NormTuningConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"norm_tuning": {}}
    neutral = 0.0  # a change of zero leaves a norm as it is: see `LinearInParameters`

    def placements(self, config: NormTuningConfig) -> tuple[Placement, ...]:
        """Place modules at the Parameters of the targets that are norms."""
        return (Placement(level="parameter", accepts=is_norm_parameter),)

    def build(self, config: NormTuningConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> ParameterDelta:
        """Build the change of one Parameter."""
        return ParameterDelta(host.get_parameter(site.parameters[0]).shape, dtype=dtype)


def is_norm_parameter(owner: nn.Module, _name: str, _parameter: nn.Parameter) -> bool:
    """Tell whether a Parameter is a norm's."""
    # Whose it is decides, not its name: the weight of a norm is called `weight`, as any other.
    return is_norm(owner)
